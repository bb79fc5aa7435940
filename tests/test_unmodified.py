"""A program that imports nothing of ours, run by Python and by the command, as real processes."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from nalar_mq.app import load_app
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import ArgumentError, RemoteTraceback, path_of
from nalar_mq.exits import raised_at
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.worker import Worker

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain"
NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
PATIENCE_S = 60.0

Interval = tuple[float, float]


def output_of(*command: object, home: Path, times: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NALAR_", "NATS_", "XDG_"))}
    done = subprocess.run(
        [*map(str, command)],
        cwd=home,
        env=kept | {"HOME": str(home), "READING_TIMES": str(times)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def intervals(times: Path) -> list[Interval]:
    lines = [line.split() for line in times.read_text().splitlines()]
    return [(float(began), float(ended)) for _, began, ended in lines]


def overlaps(times: Path) -> list[tuple[Interval, Interval]]:
    return [(a, b) for a, b in combinations(intervals(times), 2) if a[0] < b[1] and b[0] < a[1]]


def imported_in(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in modules + names}


def test_the_example_is_a_plain_program() -> None:
    source = (EXAMPLE / "flow.py").read_text()
    assert imported_in(EXAMPLE / "flow.py") <= sys.stdlib_module_names
    assert not any(isinstance(node, (ast.Await, ast.AsyncFunctionDef)) for node in ast.walk(ast.parse(source)))
    assert "uture" not in source


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "texts").mkdir(parents=True)
    for name in ("flow.py", "nalar.toml", *(f"texts/{text.name}" for text in EXAMPLE.glob("texts/*.txt"))):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())
    return folder


def test_python_and_nalar_give_the_same_answer_and_only_nalar_overlaps_the_calls(app: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    plain = output_of(sys.executable, app / "flow.py", home=tmp_path, times=alone)
    served = output_of(NALAR, "run", app / "nalar.toml", "report", home=tmp_path, times=together)
    assert plain.startswith("harbour: 39 words, most often 'boats'\n")
    assert served == plain
    assert len(intervals(alone)) == len(intervals(together)) == 3
    assert overlaps(alone) == []
    assert overlaps(together) != []


FAILING = """\
class Clerk:
    def file(self, number):
        return {}[number]


def check(number):
    raise ValueError(f"{number} is wrong")


def late():
    first = Clerk().file(3)
    second = len("other work")
    return first + second


def nested():
    return sorted(map(check, [1]))


def own():
    return check_all([0])


def check_all(numbers):
    return [1 / number for number in numbers]


def misspelt():
    return Clerk().flie(3)
"""
FAILING_MANIFEST = """
[agents.clerk]
source = "failing:Clerk"
[tools.check]
source = "failing:check"
[workflows.late]
source = "failing:late"
[workflows.nested]
source = "failing:nested"
[workflows.own]
source = "failing:own"
[workflows.misspelt]
source = "failing:misspelt"
"""


def outcome_of(folder: Path, access: BrokerAccess, monkeypatch: pytest.MonkeyPatch, workflow: str) -> BaseException:
    """The error of a workflow of `FAILING`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "failing.py").write_text(FAILING)
    (folder / "nalar.toml").write_text(FAILING_MANIFEST)
    app = load_app(folder)
    settings = Settings(broker=access, namespace="unmodified", node="here")

    async def call() -> BaseException:
        hub = MemoryHub(seed=1)
        async with (
            Worker(app, settings, name="w", connect=hub.connect, lease_in_thread=False),
            connect(settings=settings, connect=hub.connect) as client,
        ):
            with pytest.raises(Exception) as raised:
                await client.call(workflow)
            return raised.value

    try:
        return asyncio.run(call())
    finally:
        app.unload()


def test_what_the_runtime_raises_for_a_line_of_the_program_is_told_of_that_line(
    tmp_path: Path, broker_access: BrokerAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = outcome_of(tmp_path, broker_access, monkeypatch, "misspelt")
    assert isinstance(error, AttributeError)
    assert raised_at(error) == f"{tmp_path / 'failing.py'}:29"
    assert path_of(error) == ("misspelt", "clerk.flie")


@pytest.mark.parametrize(
    ("workflow", "error", "lines"),
    [
        ("late", KeyError, [3, 13, 11]),
        ("nested", ValueError, [7, 17]),
        ("own", ZeroDivisionError, [21, 25]),
    ],
)
def test_a_traceback_shows_the_users_lines_and_no_others(
    tmp_path: Path,
    broker_access: BrokerAccess,
    monkeypatch: pytest.MonkeyPatch,
    workflow: str,
    error: type[Exception],
    lines: list[int],
) -> None:
    found = outcome_of(tmp_path, broker_access, monkeypatch, workflow)
    cause = found.__cause__
    assert isinstance(found, error)
    assert isinstance(cause, RemoteTraceback)
    text = str(cause)
    assert set(re.findall(r'File "(.*?)"', text)) == {str(tmp_path / "failing.py")}
    assert list(dict.fromkeys(map(int, re.findall(r"line (\d+)", text)))) == lines


GENERATORS = """\
class Clerk:
    def stamp(self, number: int) -> str:
        return f"page {number}"


def pages(count: int):
    clerk = Clerk()
    for number in range(count):
        yield clerk.stamp(number)


async def asynchronous(count: int):
    for number in range(count):
        yield f"page {number}"
"""
GENERATORS_MANIFEST = """
[agents.clerk]
source = "generators:Clerk"
[workflows.pages]
source = "generators:pages"
[workflows.asynchronous]
source = "generators:asynchronous"
"""


@pytest.mark.parametrize("workflow", ["pages", "asynchronous"])
def test_a_workflow_that_yields_gives_its_pieces(
    tmp_path: Path, broker_access: BrokerAccess, monkeypatch: pytest.MonkeyPatch, workflow: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "generators.py").write_text(GENERATORS)
    (tmp_path / "nalar.toml").write_text(GENERATORS_MANIFEST)
    app = load_app(tmp_path)
    settings = Settings(broker=broker_access, namespace="unmodified", node="here")

    async def call() -> tuple[list[str], list[str]]:
        hub = MemoryHub(seed=1)
        async with (
            Worker(app, settings, name="w", connect=hub.connect, lease_in_thread=False),
            connect(settings=settings, connect=hub.connect) as client,
        ):
            return await client.call(workflow, 3), [piece async for piece in client.stream(workflow, 3)]

    whole, streamed = asyncio.run(call())
    app.unload()
    assert whole == streamed == ["page 0", "page 1", "page 2"]


def test_an_agent_made_with_arguments_cannot_be_called_from_outside(
    tmp_path: Path, broker_access: BrokerAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "made.py").write_text(
        "class Clerk:\n    def __init__(self, name):\n        self.name = name\n    def sign(self):\n        return self.name\n"
    )
    (tmp_path / "nalar.toml").write_text('[agents.clerk]\nsource = "made:Clerk"\n')
    app = load_app(tmp_path)
    settings = Settings(broker=broker_access, namespace="unmodified", node="here")

    async def call() -> None:
        hub = MemoryHub(seed=1)
        async with (
            Worker(app, settings, name="w", connect=hub.connect, lease_in_thread=False),
            connect(settings=settings, connect=hub.connect) as client,
        ):
            with pytest.raises(ArgumentError, match=r"only a workflow that makes it can call it: .*'name'"):
                await client.call("clerk.sign")

    asyncio.run(call())
    app.unload()
