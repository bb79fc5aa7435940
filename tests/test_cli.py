from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import NALAR, Running, environment, is_gone, nalar, nalar_here
from waiting import PATIENCE_S, eventually

from nalar_mq.app import load_app
from nalar_mq.arguments import Parameters, parameters_of, parse_arguments, wanted_type
from nalar_mq.broker import write_runtime_file
from nalar_mq.cli import run_command
from nalar_mq.client import connect
from nalar_mq.client_module import client_module
from nalar_mq.errors import BrokerUnreachableError, ConfigError, RemoteTraceback, UnknownActorError
from nalar_mq.exits import CallFailed, Interrupted, explain

FLOW = '''
"""A small program that knows nothing of the runtime."""

import os
import time

print("this goes to stderr")


def search(query: str, limit: int = 2) -> list[str]:
    """Finds passages."""
    return [f"{query} {number}" for number in range(limit)]


class Writer:
    """Writes."""

    def __init__(self, tone: str = "dry") -> None:
        self.tone = tone

    def write(self, parts: list[str]) -> str:
        return f"{self.tone}: " + ", ".join(parts)


def answer(question: str, limit: int = 2) -> str:
    """Answers a question."""
    return Writer().write(search(question, limit))


def fail(text: str) -> None:
    raise ValueError(text + chr(10) + "second line")


def echo(value, text: str = ""):
    return {"value": value, "text": text}


def count(to: int):
    for number in range(to):
        yield f"{number},"


def sleep(seconds: float, started: str) -> str:
    open(started, "w").close()
    time.sleep(seconds)
    return "slept"


def pid() -> int:
    return os.getpid()
'''
MANIFEST = '[agents.writer]\nsource = "small:Writer"\n' + "".join(
    f'[{table}.{name}]\nsource = "small:{name}"\n'
    for table, name in [
        ("tools", "search"),
        ("workflows", "answer"),
        ("workflows", "fail"),
        ("workflows", "echo"),
        ("tools", "count"),
        ("tools", "sleep"),
        ("tools", "pid"),
    ]
)


def write_app(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.py").write_text(FLOW)
    (folder / "nalar.toml").write_text(MANIFEST)
    return folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "app")


# Arguments.


def some(question: str, limit: int = 3, *more: object, note: str | None = None, data=None, **rest: object) -> None: ...


PARSED = [
    (["question=5"], [], {"question": "5"}),
    (["limit=5"], [], {"limit": 5}),
    (["limit=five"], [], {"limit": "five"}),
    (["question:=5"], [], {"question": 5}),
    (["note=5", "data=null"], [], {"note": "5", "data": None}),
    (["note=null"], [], {"note": None}),
    (['data={"a": [1]}'], [], {"data": {"a": [1]}}),
    (["other=1"], [], {"other": 1}),
    (["5", "5", "5"], ["5", 5, 5], {}),
    (["what is a = b?", "x"], ["what is a = b?", "x"], {}),
    (["question=a=b\nc"], [], {"question": "a=b\nc"}),
    ([], [], {}),
]


@pytest.mark.parametrize(("words", "args", "kwargs"), PARSED)
def test_arguments(words, args, kwargs):
    assert parse_arguments(words, None, parameters_of(str(inspect.signature(some)))) == (args, kwargs)


def test_arguments_as_json():
    assert parse_arguments([], '{"a": 1}', Parameters()) == ([], {"a": 1})
    assert parse_arguments([], "[1, null]", Parameters()) == ([1, None], {})


@pytest.mark.parametrize(
    ("words", "json_text", "says"),
    [
        (["questio=1"], None, "no parameter 'questio': did you mean 'question'"),
        (["zzz=1"], None, "known are question, limit"),
        (["limit=1", "limit=2"], None, "'limit' is given twice"),
        (["limit:=five"], None, "limit:= needs JSON.*write limit=five"),
        (["x"], "{}", "choose one"),
        ([], "3", "an object .* or an array"),
        ([], "{", "not JSON"),
        ([], "[" * 100_000, "not JSON"),
    ],
)
def test_arguments_that_are_refused(words, json_text, says):
    parameters = parameters_of("(question: str, limit: int = 3) -> str")
    with pytest.raises(ConfigError, match=says):
        parse_arguments(words, json_text, parameters)


@pytest.mark.parametrize(
    ("annotation", "wanted"),
    [
        ("str", str),
        ("str | None", str | None),
        ("Optional[int]", int | None),
        ("typing.Optional[Point]", Any),
        ("list[dict[str, Point]]", list[dict[str, Any]]),
        ("Point | int", Any),
        ("tuple[int, ...]", Any),
        ("Literal['str']", Any),
        ("", Any),
        ("not python", Any),
        ("list[int, int]", list[Any]),
    ],
)
def test_annotations_are_known_as_far_as_built_in_types_can_say(annotation: str, wanted: object) -> None:
    assert wanted_type(annotation) == wanted


def test_signatures_that_cannot_be_read_know_nothing():
    assert parameters_of("(x=<object object at 0x1>)") == Parameters()
    assert parameters_of("") == Parameters()
    assert parameters_of("(q: 'str', *, n: 'int' = 1)").annotations == {"q": "str", "n": "int"}


# What a user sees of an error.


def failed_below() -> KeyError:
    """As it arrives from a workflow whose agent raised it."""
    error = KeyError("x")
    caused = "The above exception was the direct cause of the following exception:"
    below = """Traceback (most recent call last):\n  File "/app/below.py", line 7, in read\nKeyError: 'x'\n"""
    above = """Traceback (most recent call last):\n  File "/app/flow.py", line 3, in flow\nKeyError: 'x'\n"""
    error.__cause__ = RemoteTraceback(f"{below}\n\n{caused}\n\n{above}")
    return error


RUNTIME = """Traceback (most recent call last):\n  File "/lib/nalar_mq/host.py", line 9, in read\nAttributeError: no x\n"""
DRIVER = """Traceback (most recent call last):\n  File "/app/flow.py", line 3, in flow\nAttributeError: no x\n"""
CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"


def failed_in_the_runtime(*tracebacks: str) -> Exception:
    error = AttributeError("no x")
    error.__cause__ = RemoteTraceback(CAUSED.join(tracebacks))
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            CallFailed(failed_in_the_runtime(RUNTIME, DRIVER), "flow"),
            1,
            "nalar: error: flow failed: AttributeError: no x\n       at /app/flow.py:3",
        ),
        (CallFailed(failed_in_the_runtime(RUNTIME), "flow"), 1, "nalar: error: flow failed: AttributeError: no x"),
        (ConfigError("wrong\nthere"), 2, "nalar: error: wrong there"),
        (BrokerUnreachableError("nobody answers"), 3, "nalar: error: nobody answers"),
        (UnknownActorError("nobody serves 'x'"), 1, "nalar: error: nobody serves 'x'"),
        (CallFailed(ValueError("bad"), "flow"), 1, "nalar: error: flow failed: ValueError: bad"),
        (CallFailed(failed_below(), "flow"), 1, "nalar: error: flow failed: KeyError: 'x'\n       at /app/below.py:7"),
        (Interrupted(), 130, "nalar: interrupted"),
        (KeyError("x"), 70, "nalar: internal error: KeyError: 'x' (`nalar --debug ...` shows where)"),
    ],
)
def test_errors_are_explained(error, code, text):
    assert explain(error) == (code, text)


def complains(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that is wrong says on stderr, as one line."""
    assert run_command([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = [line for line in printed.err.splitlines() if line.startswith("nalar: error: ")]
    assert len(said) == 1, printed.err
    return said[0]


COMMANDS = ("up", "worker", "run", "call", "ps", "trace", "check", "stubs", "model", "doctor", "version")


def test_help_lists_commands_and_exit_codes(capsys):
    assert run_command(["--help"]) == 0
    printed = capsys.readouterr().out
    for word in (*COMMANDS, "130", "NALAR_UP_WORKERS"):
        assert word in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert run_command([command, "--help"]) == 0
    assert "Usage: nalar " + command in capsys.readouterr().out


def test_help_does_not_load_the_runtime():
    program = (
        "import sys, nalar_mq.cli; heavy = {'nalar_mq.commands', 'nalar_mq.app', 'nalar_mq.engines'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version(capsys, word):
    assert run_command([word]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*( \(compiled\))?\n", capsys.readouterr().out)


def test_wrong_command_lines(capsys, app):
    assert "No such command 'upp'" in complains(capsys, "upp")
    assert "No such option" in complains(capsys, "ps", "--jason")
    assert "--workers" in complains(capsys, "up", app, "--workers", "0")
    assert "there is no such file" in complains(capsys, "check", app / "absent")
    (app / "x.txt").write_text("")
    assert "neither a .toml nor a .py file" in complains(capsys, "check", app / "x.txt")
    assert "nats://host:4222" in complains(capsys, "worker", app, "--nats", "http://x")
    assert "namespace 'a.b' is not allowed" in complains(capsys, "worker", app, "--nats", "x", "--namespace", "a.b")
    assert "node 'a b' is not allowed" in complains(capsys, "worker", app, "--nats", "x", "--node", "a b")
    assert "is a name of more than" in complains(capsys, "worker", app, "--nats", "x", "--resources", f"{'g' * 1000}=1")
    many = ",".join(f"gpu{number}=1" for number in range(257))
    assert "at most 256 resources, not 257" in complains(capsys, "worker", app, "--nats", "x", "--resources", many)


def test_wrong_apps(capsys, tmp_path):
    def wrong(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return complains(capsys, "check", tmp_path / name)

    assert "nalar.toml:1: " in wrong("nalar.toml", "[agent.x]\n")
    assert "broken_syntax.py:2" in wrong("broken_syntax.py", "x = 1\ndef f(:\n")
    assert "no @agent, @tool or @workflow" in wrong("nothing_here.py", "x = 1\n")
    assert "ZeroDivisionError" in wrong("raises_at_import.py", "1 / 0\n")
    assert "there is no module 'absent_module'" in wrong("nalar.toml", '[tools.a]\nsource = "absent_module:f"\n')
    two = "from nalar_mq.actor import tool\n@tool\ndef f(): ...\n@tool(name='f')\ndef g(): ...\n"
    assert "two actors have the name 'f'" in wrong("two_of_one_name.py", two)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["answr"], "the app has no actor 'answr': did you mean 'answer'"),
        (["writer.writ"], "did you mean 'writer.write'"),
        (["answer"], "missing a required argument: 'question'"),
        (["answer", "quest=1"], "no parameter 'quest': did you mean 'question'"),
    ],
)
def test_wrong_calls_are_answered_before_anything_starts(capsys, app, words, says):
    assert says in complains(capsys, "run", app, *words)


def test_check_lists_actors(capsys, app):
    assert run_command(["check", str(app)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^writer\.write +agent +\(parts: list\[str\]\) -> str", printed.out, re.MULTILINE)
    assert "this goes to stderr" not in printed.out


def test_check_lists_actors_as_json(capsys, app):
    assert run_command(["check", str(app), "--json"]) == 0
    actors = {actor["name"]: actor for actor in json.loads(capsys.readouterr().out)}
    assert actors["search"]["signature"] == "(query: str, limit: int = 2) -> list[str]"
    assert actors["answer"]["doc"] == "Answers a question."


def test_options_come_from_the_environment(capsys, app, monkeypatch):
    monkeypatch.setenv("NALAR_CHECK_JSON", "1")
    assert run_command(["check", str(app)]) == 0
    json.loads(capsys.readouterr().out)


# The typed client module.

TYPED = '''
from __future__ import annotations
import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Optional
from nalar_mq.actor import agent, method, tool, workflow

UNSET = object()

@dataclass
class Report:
    text: str

@tool(name="find-it")
async def find(
    query: str, /, limit: int = 3, *more: int, mode: Literal["a", "b"] = "a", at: datetime.date | None = None
) -> list[Report]:
    """Finds "it" in C:\\\\."""
    return []

@agent
class Analyst:
    @method
    async def analyse(self, question: str, self_: Optional[list[dict[str, float]]] = None, extra=UNSET) -> tuple[int, ...]: ...
    @method
    async def pieces(self, client: str) -> AsyncIterator[str]:
        yield client

@workflow
def lambda_(client: str, *, end: bytes = b"x") -> None: ...
'''


@pytest.fixture
def typed_module(tmp_path: Path) -> Path:
    (tmp_path / "typed_app.py").write_text(TYPED)
    path = tmp_path / "generated.py"
    path.write_text(client_module(load_app(tmp_path / "typed_app.py")))
    return path


def test_the_client_module_has_the_signatures_of_the_app(typed_module):
    text = typed_module.read_text()
    compile(text, "generated.py", "exec")
    assert (
        "def find_it(client: Client, query: str, limit: int = 3, *more: int, mode: Literal['a', 'b'] = 'a', "
        "at: datetime.date | None = None) -> Future[list[Any]]:"
    ) in text
    assert "def analyse(self, question: str, self_: list[dict[str, float]] | None = None, extra: Any = None)" in text
    assert "-> Future[tuple[int, ...]]" in text
    assert "def pieces(self, client: str) -> Future[list[str]]" in text
    assert "def lambda_(client: Client, client_: str, *, end: bytes = b'x') -> Future[None]:" in text


def test_stubs_go_to_stdout(capsys, app):
    assert run_command(["stubs", str(app)]) == 0
    assert "def answer(client: Client, question: str, limit: int = 2) -> Future[str]:" in capsys.readouterr().out


def test_stubs_go_to_a_file(app, tmp_path):
    assert run_command(["stubs", str(app), "-o", str(tmp_path / "out.py")]) == 0
    assert "class writer:" in (tmp_path / "out.py").read_text()


def test_stubs_go_nowhere(capsys, app, tmp_path):
    assert "cannot be written" in complains(capsys, "stubs", app, "-o", tmp_path / "no" / "out.py")


@pytest.mark.slow
def test_the_client_module_type_checks(typed_module):
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(typed_module)],
        cwd=typed_module.parent,
        env=os.environ | {"MYPYPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# The commands as processes, on a real broker.


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an app that is up."""
    folder = write_app(tmp_path_factory.mktemp("up") / "app")
    running = Running("up", ".", "--workers", "1", cwd=folder)
    try:
        running.says("1 workers are ready")
        yield folder
    finally:
        children = running.children()
        assert running.end() == 0
        assert all(map(is_gone, children))
        assert not (folder / ".nalar" / "runtime.json").exists()


def test_what_is_up_has_a_controller_that_decides_nothing_without_need(runtime):
    eventually(lambda: "leads" in nalar_here("policy", "show", cwd=runtime).stderr.partition("nobody")[0], "nobody leads")
    eventually(lambda: nalar_here("policy", "history", cwd=runtime).stdout, "the history is empty")
    for _ in range(3):
        nalar("call", "answer", "question=why", cwd=runtime)
    first, *others = json.loads(nalar_here("policy", "history", "--json", cwd=runtime).stdout)
    assert (first["policy"], first["took_lead"]) == ("default", True)
    assert not [entry for entry in others if entry.keys() & {"began", "ended", "acts", "refused"}]
    assert nalar_here("policy", "show", cwd=runtime).stdout == ""


def test_call(runtime):
    assert nalar("call", "answer", "question=why", cwd=runtime).stdout == "dry: why 0, why 1\n"
    assert json.loads(nalar("call", "search", "1", "limit=1", cwd=runtime).stdout) == ["1 0"]
    assert nalar("call", "count", "3", "--stream", cwd=runtime).stdout == "0,1,2,"
    assert nalar("call", "count", "0", "--stream", cwd=runtime).stdout == ""
    assert "dry: why 0, why 1" in nalar("call", "answer", "why", "--stream", cwd=runtime).stdout
    found = nalar("call", "echo", "--json", '{"value": [1, null], "text": "é"}', "--app", runtime, cwd=runtime.parent)
    assert json.loads(found.stdout) == {"value": [1, None], "text": "é"}
    assert nalar("call", "answer", "x", "--json-output", cwd=runtime).stdout == '"dry: x 0, x 1"\n'


def test_calls_that_fail(runtime):
    printed = nalar("call", "fail", "text=broken", cwd=runtime, code=1).stderr
    assert printed.startswith("nalar: error: fail failed: ValueError: broken second line\n")
    assert re.search(r"at \S+small\.py:\d+$", printed.rstrip())
    assert "nobody serves 'answr'" in nalar("call", "answr", cwd=runtime, code=1).stderr


def test_ps(runtime):
    pid = json.loads(nalar("call", "pid", cwd=runtime).stdout)
    seen = json.loads(nalar_here("ps", "--json", cwd=runtime).stdout)
    (worker,) = [member for member in seen["members"] if member["pid"] == pid]
    assert worker["role"] == "worker"
    assert worker["state"] == "serving"
    assert worker["actors"]["answer"]["methods"] == {"": "(question: str, limit: int = 2) -> str"}
    assert worker["actors"]["answer"]["running"] == 0
    assert worker["name"] in nalar_here("ps", cwd=runtime).stdout
    assert worker["node"] not in seen["crashes"]


def test_ps_tells_of_workers_that_keep_ending(app):
    def worker() -> dict[str, Any] | None:
        members = json.loads(nalar_here("ps", "--json", cwd=app).stdout)["members"]
        return next((member for member in members if member["role"] == "worker"), None)

    def crashes() -> dict[str, Any]:
        told = json.loads(nalar_here("ps", "--json", cwd=app).stdout)["crashes"]
        return {name: row for workers in told.values() for name, row in workers.items()}

    def others(pids: set[int]) -> bool:
        found = worker()
        return found is not None and found["pid"] not in pids

    running = Running("up", ".", "--workers", "1", cwd=app)
    try:
        running.says("1 workers are ready")
        killed: set[int] = set()
        for _ in range(2):
            eventually(lambda: others(killed), "it has no successor")
            found = worker()
            assert found is not None
            os.kill(found["pid"], signal.SIGKILL)
            killed.add(found["pid"])
        eventually(lambda: crashes().get(found["name"], {}).get("times") == 2, "nobody tells of it")
        assert crashes()[found["name"]]["reason"].startswith("it was ended by signal 9")
        assert re.search(
            rf"^nalar: worker {found['name']} of node \S+ has ended 2 times within \d+ s, is \w+ now: it was ended by signal 9",
            nalar_here("ps", cwd=app).stderr,
            re.MULTILINE,
        )
    finally:
        running.end()


def test_ps_shows_queues_and_futures(runtime, tmp_path):
    started = tmp_path / "started"
    caller = subprocess.Popen(
        [NALAR, "call", "sleep", "300", str(started)], cwd=runtime, env=environment(runtime), stderr=subprocess.PIPE, text=True
    )
    try:
        eventually(started.exists, "it never began")
        members = json.loads(nalar_here("ps", "--json", cwd=runtime).stdout)["members"]
        (worker,) = [member for member in members if member["role"] == "worker" and member["actors"]["sleep"]["running"]]
        assert (worker["actors"]["sleep"]["queued"], worker["actors"]["sleep"]["running"]) == (0, 1)
        assert worker["ended"] >= 0
        assert [member["futures"] for member in members if member["pid"] == caller.pid] == [1]
        assert re.search(r"sleep\(0\+1\)", nalar_here("ps", cwd=runtime).stdout)
        (running,) = json.loads(nalar_here("trace", "--last", "--json", cwd=runtime).stdout)
        assert (running["name"], running["state"]) == ("sleep", "running")
    finally:
        caller.send_signal(signal.SIGINT)
        caller.communicate(timeout=PATIENCE_S)


def test_trace(runtime):
    nalar("call", "answer", "question=why", "--session", "traced", cwd=runtime)
    calls = json.loads(nalar_here("trace", "traced", "--json", cwd=runtime).stdout)
    assert [call["name"] for call in calls][:1] == ["answer"]
    assert {"search", "writer.write"} < {call["name"] for call in calls}
    assert {call["state"] for call in calls} == {"done"}
    assert [call["depth"] for call in calls] == [0] + [1] * (len(calls) - 1)
    shown = nalar_here("trace", calls[1]["id"], cwd=runtime).stdout
    assert shown == nalar_here("trace", "--last", cwd=runtime).stdout
    assert re.search(r"^answer +0\.000 ", shown, re.MULTILINE)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "no worker remembers" in nalar_here("trace", "nobody", cwd=runtime, code=1).stderr
    for wrong in ([], ["x", "--last"]):
        assert "or the last run by --last" in nalar_here("trace", *wrong, cwd=runtime, code=2).stderr


def test_run_uses_what_is_up(runtime):
    worker = json.loads(nalar("call", "pid", cwd=runtime).stdout)
    assert json.loads(nalar("run", runtime, "pid", cwd=runtime.parent).stdout) == worker


def test_up_twice(runtime):
    assert "this app is up already" in nalar("up", ".", cwd=runtime, code=2).stderr
    said = nalar("up", "small.py", cwd=runtime, code=2).stderr
    assert "another app of this folder, nalar.toml, is up at nats://" in said
    assert "`nalar worker small.py`" in said


def test_what_is_no_call_is_not_explained(runtime):
    assert "takes the id of one" in nalar_here("explain", "nonsense", cwd=runtime, code=2).stderr


def test_the_url_of_what_is_up_in_this_folder_is_enough(runtime, tmp_path):
    url = json.loads((runtime / ".nalar" / "runtime.json").read_text())["url"]
    assert "serving" in nalar_here("ps", "--nats", url, cwd=runtime).stdout
    nalar("prepare", "--nats", url, cwd=runtime)
    assert "name the app by --app" in nalar_here("ps", "--nats", url, cwd=tmp_path, code=3).stderr


def test_wrong_credentials(runtime):
    url = json.loads((runtime / ".nalar" / "runtime.json").read_text())["url"].replace("://", "://wrong@")
    assert "wrong@" not in nalar_here("ps", "--nats", url, cwd=runtime, code=3).stderr


def test_a_node_joins_and_leaves(runtime):
    node = Running("worker", ".", "--workers", "1", "--node", "second", cwd=runtime)
    try:
        node.says("1 workers are ready")
        members = json.loads(nalar_here("ps", "--json", cwd=runtime).stdout)["members"]
        assert "second-1" in [member["name"] for member in members]
    finally:
        assert node.end(signal.SIGINT) == 0


def test_several_nodes_on_one_machine_serve_and_are_drained_together(app):
    running = Running("up", ".", "--nodes", "2", "--workers", "1", cwd=app)
    running.says("2 workers are ready on 2 nodes")
    workers = [row for row in json.loads(nalar_here("ps", "--json", cwd=app).stdout)["members"] if row["role"] == "worker"]
    assert len({row["pid"] for row in workers}) == 2
    assert [row["node"].rpartition("-")[2] for row in sorted(workers, key=lambda row: row["node"])] == ["1", "2"]
    assert [row["name"] for row in workers] == [f"{row['node']}-1" for row in workers]
    shown = nalar_here("ps", cwd=app).stdout
    assert all(re.search(rf"^{row['name']} +worker +{row['node']} ", shown, re.MULTILINE) for row in workers)

    children = running.children()
    caller = subprocess.Popen(
        [NALAR, "call", "sleep", "1.5", "began"], cwd=app, env=environment(app), stdout=subprocess.PIPE, text=True
    )
    eventually((app / "began").exists, "the call never began")
    assert running.end() == 0
    assert caller.communicate(timeout=PATIENCE_S)[0] == "slept\n"
    assert caller.returncode == 0
    assert all(map(is_gone, children))


def test_a_node_that_fails_ends_the_others(app):
    fails_at_the_third_load = (
        "import os\nnames = [str(number) for number in range(2) if not os.path.exists(str(number))]\n"
        "assert names, 'the node that fails'\nos.mkdir(names[0])\n"
    )
    (app / "small.py").write_text(fails_at_the_third_load + FLOW)
    running = Running("up", ".", "--nodes", "2", "--workers", "1", cwd=app)
    assert running.process.wait(PATIENCE_S) == 2
    said = [line for line in running.said.splitlines() if line.startswith("nalar: error: ")]
    assert len(said) == 1
    assert "the node that fails" in said[0]
    assert not (app / ".nalar" / "runtime.json").exists()
    assert not [each for each in psutil.process_iter() if str(app) in _command_line(each)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join([process.cwd(), *process.cmdline()])
    except psutil.Error:
        return ""


def test_a_node_whose_name_is_taken_gives_up(runtime):
    first = Running("worker", ".", "--workers", "1", "--node", "twice", cwd=runtime)
    try:
        first.says("1 workers are ready")
        second = Running("worker", ".", "--workers", "1", "--node", "twice", cwd=runtime)
        try:
            assert first.process.wait(PATIENCE_S) == 2
            assert "another process serves as 'twice-1'" in first.said
            second.says("1 workers are ready")
        finally:
            assert second.end() == 0
    finally:
        first.end()


def test_run_brings_everything_and_takes_it_away(app):
    done = nalar("run", ".", "answer", "question=why", "--workers", "1", cwd=app)
    assert done.stdout == "dry: why 0, why 1\n"
    assert "this goes to stderr" in done.stderr
    assert "WAITED" not in done.stderr
    assert not (app / ".nalar").exists()


def test_run_shows_what_was_called(app):
    done = nalar("run", ".", "answer", "question=why", "--workers", "1", "--trace", cwd=app)
    assert done.stdout == "dry: why 0, why 1\n"
    assert re.search(r"^└─ writer\.write ", done.stderr, re.MULTILINE)
    failed = nalar("run", ".", "fail", "text=x", "--workers", "1", "--trace", cwd=app, code=1)
    assert "failed: builtins:ValueError" in failed.stderr


def test_an_interrupted_run_leaves_nothing_behind(app):
    running = Running("run", ".", "sleep", "30", "began", "--workers", "1", cwd=app)
    eventually((app / "began").exists, "the call never began")
    children = running.children()
    assert len(children) >= 2
    assert running.end(signal.SIGINT) == 130
    eventually(lambda: all(map(is_gone, children)), "a child goes on")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends the broker of a killed parent")
def test_what_a_killed_run_leaves_behind_goes_with_the_next_one(app, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    running = Running("run", ".", "sleep", "30", "began", "--workers", "1", cwd=app)
    eventually((app / "began").exists, "the call never began")
    children = running.children()
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: all(map(is_gone, children)), "a child goes on")
    assert list(temporary.glob("nalar-run-*")) != []
    nalar("run", ".", "pid", "--workers", "1", cwd=app)
    assert list(temporary.glob("nalar-run-*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends the broker of a killed parent")
def test_killing_up_kills_its_children(app):
    running = Running("up", ".", "--workers", "1", cwd=app)
    running.says("1 workers are ready")
    children = running.children()
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: all(map(is_gone, children)), "a child goes on")
    said = nalar_here("ps", cwd=app, code=2).stderr
    assert f"no broker is known: what was up here, process {running.process.pid}, has died: `nalar up nalar.toml` in" in said
    with contextlib.chdir(app), pytest.raises(ConfigError, match=f"process {running.process.pid}, has died"):
        connect()


def test_a_script_waits_for_what_is_to_come_up(app):
    assert "no broker is known: start one" in nalar("ps", "--wait", "0.2", cwd=app, code=2).stderr
    running = Running("up", ".", "--workers", "1", cwd=app)
    try:
        assert "answer" in nalar("ps", "--wait", PATIENCE_S, cwd=app).stdout
        assert nalar_here("call", "answer", "question=why", cwd=app).stdout
    finally:
        running.end()


def test_who_reads_no_further_is_no_failure(runtime):
    nalar_here("ps", "--wait", PATIENCE_S, cwd=runtime)
    eventually(lambda: nalar_here("top", "--once", cwd=runtime).stdout, "nobody leads")
    for command in (["top", "--once"], ["ps"], ["jobs"]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing) as stdout:
            done = subprocess.run(
                [NALAR, *command], cwd=runtime, env=environment(runtime), stdout=stdout, stderr=subprocess.PIPE, text=True
            )
        assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (0, False, False), done.stderr


@pytest.mark.parametrize("module", ["nalar_mq.cli", "click", "nalar_mq.commands", "nalar_mq.client"])
def test_an_interrupt_while_modules_are_loaded_is_one_line(tmp_path, module):
    program = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["nalar", "call", "nothing", "--nats", "nats://127.0.0.1:1"]
from nalar_mq.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (130, "nalar: interrupted")


@pytest.mark.parametrize("command", [("ps",), ("ps", "--json"), ("trace", "--last"), ("trace", "some-session", "--json")])
@pytest.mark.parametrize("where", ["named", "left behind"])
def test_looking_without_a_broker_says_why_in_one_line(app, command, where):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else listens there meanwhile
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        if where == "named":
            done = nalar_here(*command, "--nats", url, cwd=app, code=3)
        else:  # as `up` leaves it while its broker is away: the file's process lives, and nobody listens
            write_runtime_file(app, url=url, token="t")
            done = nalar_here(*command, cwd=app, code=3)
    assert done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith("nalar: error: ")
    assert url.partition("://")[2] in said


def test_no_broker_there(app):
    assert "127.0.0.1:1" in nalar_here("ps", "--nats", "nats://127.0.0.1:1", cwd=app, code=3).stderr
    assert "127.0.0.1:1" in nalar("run", ".", "pid", cwd=app, code=3, NATS_URL="nats://127.0.0.1:1").stderr


def test_an_app_that_breaks_while_it_loads_ends_up_with_one_line(app):
    (app / "small.py").write_text("import absent_module_of_a_test\n")
    printed = nalar("up", ".", "--workers", "1", cwd=app, code=2).stderr
    assert "absent_module_of_a_test" in next(line for line in printed.splitlines() if line.startswith("nalar: error: "))


def test_a_port_in_use(app):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in nalar("up", ".", "--port", port, cwd=app, code=3).stderr
