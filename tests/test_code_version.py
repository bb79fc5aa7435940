"""The version of a workflow's code: what counts, and what does not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from nalar_mq import code_version
from nalar_mq.actor import spec_of
from nalar_mq.app import load_app
from nalar_mq.code_version import Versions

CODE = '''
from nalar_mq import tool, workflow

LIMIT = 3
UNUSED = 4


@tool
async def step(x: int) -> int:
    return x + 1


def halved(x: int) -> int:
    """Half of it."""
    return rounded(x / 2)


def rounded(x: float) -> int:
    return int(x)


def unused() -> None: ...


@workflow(timeout_s=5)
async def flow(start: int, by: int = 2) -> int:
    """Steps."""
    for _ in range(LIMIT):
        start = halved(await step(start) + by)
    return start
'''

Version = Callable[[str], str]


@pytest.fixture
def version(tmp_path: Path) -> Iterator[Version]:
    numbers = count()

    def of(code: str) -> str:
        file = tmp_path / f"coded{next(numbers)}.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Versions(lambda found: spec_of(found) is not None).of(module.flow.function)

    yield of
    for name in [name for name in sys.modules if name.startswith("coded")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ by)", "- by)"),
        ("by: int = 2", "by: int = 3"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("x / 2", "x / 3"),
        ("int(x)", "round(x)"),
        ("    return start", "    await step(0)\n    return start"),
    ],
)
def test_what_the_workflow_does_counts(version: Version, old: str, new: str) -> None:
    assert version(CODE) != version(CODE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Steps."""', '"""Steps, and halves."""'),
        ('    """Steps."""\n', ""),
        ('"""Half of it."""', "# half\n"),
        ("UNUSED = 4", "UNUSED = 5\n\n\n"),
        ("def unused() -> None: ...", "def unused() -> int:\n    return 1"),
        ("timeout_s=5", "timeout_s=50, retries=2"),
        ("start: int, by: int", "start: object, by: object"),
        ("return x + 1", "return x + 2"),
        ("LIMIT = 3\nUNUSED = 4", "UNUSED = 4\nLIMIT = 3"),
    ],
)
def test_nothing_else_does(version: Version, old: str, new: str) -> None:
    changed = CODE.replace(old, new)
    assert changed != CODE
    assert version(CODE) == version(changed)


def test_code_without_a_source_has_no_version() -> None:
    names: dict[str, Any] = {}
    exec("def flow(): ...", names)
    assert Versions(lambda found: False).of(names["flow"]) == ""


def test_workflows_of_one_file_have_the_versions_that_they_have_alone_and_it_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one uses the function of another, whose decorators count then."""
    code = "from functools import cache\n\n" + "".join(
        f"@cache\ndef {name}(): return {calls}\n\n" for name, calls in (("one", "1"), ("two", "one()"), ("three", "two()"))
    )
    (tmp_path / "coded_together.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("coded_together")
    parsed: list[str] = []
    parse = code_version.parse
    monkeypatch.setattr(code_version, "parse", lambda source, path: parsed.append(path) or parse(source, path))
    functions = [module.one, module.two, module.three]
    alone = [Versions(lambda found: False).of(function) for function in functions]
    parsed.clear()
    together = Versions(lambda found: False)
    assert [together.of(function) for function in functions] == alone
    assert len(set(alone)) == 3
    assert len(parsed) == 1
    del sys.modules["coded_together"]


PLAIN = """
def word(x):
    return x


def flow(x):
    return helped(word(x))


def helped(x):
    return x
"""


def test_unmodified_python_has_versions_too_and_a_given_one_counts_alone(tmp_path: Path) -> None:
    def spec(name: str, code: str, *more: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "versioned.py").write_text(code)
        tables = ["[tools.word]", "source = 'versioned:word'", "[workflows.flow]", "source = 'versioned:flow'", *more]
        (folder / "nalar.toml").write_text("\n".join(tables))
        app = load_app(folder)
        app.unload()
        return app.actors["flow"]

    first = spec("a", PLAIN)
    assert first.version == spec("b", PLAIN.replace("x)\n\n\ndef helped", "x)  # changed\n\n\ndef helped")).version
    assert first.version == spec("c", PLAIN.replace("def word(x):\n    return x", "def word(x):\n    return x + x")).version
    assert first.version != spec("d", PLAIN.replace("def helped(x):\n    return x", "def helped(x):\n    return x + x")).version
    assert spec("e", PLAIN, "version = '7'").version == "7"
