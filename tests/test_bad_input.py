"""What a user can do wrong: each has a typed error in Python, and on the command line an exit code and one clear line."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Running, nalar_here

from nalar_mq import errors
from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker, read_runtime_file
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.worker import Worker

PATIENCE_S = 60.0

GOOD = """
import threading

from nalar_mq import agent, method, tool, workflow


@workflow
async def answer(question: str, limit: int = 3) -> str:
    return f"{question}: {limit}"


@tool
async def lock() -> object:
    return threading.Lock()


@workflow
async def wraps_lock() -> object:
    return {"deep": [await lock()]}


@tool
async def large(size: int) -> str:
    return "x" * size


@tool
async def takes(text: str) -> int:
    return len(text)


@agent
class Writer:
    @method
    async def write(self, parts: list[str]) -> str:
        return ", ".join(parts)
"""

APPS = {
    "syntax.py": (
        "from nalar_mq import tool\n\n@tool\ndef f(:\n    pass\n",
        errors.AppError,
        ["syntax.py:4", "invalid syntax"],
    ),
    "import_fails.py": ("import absent_module\n", errors.AppError, ["absent_module", "import_fails.py:1"]),
    "raises.py": ("x = {}['key']\n", errors.AppError, ["KeyError", "raises.py:1"]),
    "nothing.py": ("def f(): ...\n", errors.AppError, ["nothing.py", "nalar.toml"]),
    "twice.py": (
        "from nalar_mq import tool\n@tool\ndef f(): ...\n@tool(name='f')\ndef g(): ...\n",
        errors.DirectiveError,
        ["two actors have the name 'f'", "name="],
    ),
    "stateful_batch.py": (
        "from nalar_mq import agent, method\n"
        "@agent(stateful=True, batchable=True)\n"
        "class A:\n"
        "    @method\n"
        "    async def f(self, x: int) -> int: return x\n",
        errors.DirectiveError,
        ["'A'", "batchable", "stateful"],
    ),
    "no_batch.py": (
        "from nalar_mq import tool\n@tool(batchable=True)\ndef f(x: int) -> int: return x\n",
        errors.DirectiveError,
        ["no_batch.py:2", "tool 'f'", "wants a function `f_batch`"],
    ),
    "least_above_most.py": (
        "from nalar_mq import tool\n@tool(min_instances=3, max_instances=2)\ndef f(): ...\n",
        errors.DirectiveError,
        ["min_instances", "max_instances"],
    ),
    "unknown_directive.toml": ('[tools.f]\nsource = "m:f"\nretrys = 3\n', errors.DirectiveError, [".toml:3", "retries"]),
    "wrong_value.toml": ('[tools.f]\nsource = "m:f"\nretries = "many"\n', errors.ConfigError, [".toml:3", "retries"]),
    "no_batch.toml": (
        '[tools.f]\nsource = "m:f"\nbatchable = true\n',
        errors.DirectiveError,
        ["no_batch.toml:", "tool 'f'", "wants a function `f_batch`"],
    ),
    "no_toml.toml": ("[tools.f\n", errors.ManifestError, ["no_toml.toml:1"]),
    "same_name.toml": (
        '[tools.f]\nsource = "m:f"\n[workflows.f]\nsource = "m:g"\n',
        errors.ConfigError,
        ["'f'", "same_name.toml:"],
    ),
}


def complaint(*arguments: object, cwd: Path, code: int, **env: str) -> str:
    """Runs a command that must fail; the one line that it says to the user."""
    done = nalar_here(*arguments, cwd=cwd, code=code, **env)
    assert done.stdout in ("", *_urls(done.stdout))
    said = [line for line in done.stderr.splitlines() if line.startswith("nalar: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("nalar: error: ")
    if arguments[0] in ("call", "check", "ps"):
        assert [line for line in done.stderr.splitlines() if not line.startswith("       ")] == said
    return said[0]


def _urls(text: str) -> list[str]:
    """A node has said the URL of its broker already when a worker fails."""
    return [text] if text.startswith("nats://") and text.count("\n") == 1 else []


# Apps.


@pytest.mark.parametrize("name", APPS)
def test_a_wrong_app_has_a_type_and_a_line(tmp_path: Path, name: str) -> None:
    text, error_type, words = APPS[name]
    (tmp_path / name).write_text(text)
    (tmp_path / "m.py").write_text("def f(): ...\ndef g(): ...\n")
    with pytest.raises(error_type) as raised:
        load_app(tmp_path / name)
    for word in words:
        assert word in str(raised.value)
    said = complaint("check", name, cwd=tmp_path, code=2)
    for word in words:
        assert word in said


@pytest.mark.parametrize("command", [("run", "syntax.py", "f"), ("up", "syntax.py"), ("worker", "syntax.py")])
def test_a_wrong_app_is_answered_alike_by_every_command(runtime: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "syntax.py").write_text(APPS["syntax.py"][0])
    running = read_runtime_file(runtime)
    assert running is not None
    env = {"NATS_URL": running.url.replace("://", f"://{running.token}@")} if command[0] == "worker" else {}
    assert "syntax.py:4: invalid syntax" in complaint(*command, cwd=tmp_path, code=2, **env)


# Calls.


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an app that is up."""
    folder = tmp_path_factory.mktemp("bad") / "app"
    folder.mkdir()
    (folder / "good.py").write_text(GOOD)
    running = Running("up", "good.py", "--workers", "1", cwd=folder)
    try:
        running.says("1 workers are ready")
        yield folder
    finally:
        assert running.end() == 0


CALLS = {
    "unknown workflow": (["answr", "question=x"], {}, errors.UnknownActorError, ["answr", "answer"]),
    "unknown method": (["Writer.wrte"], {}, errors.UnknownMethodError, ["wrte", "write"]),
    "missing argument": (["answer"], {}, errors.ArgumentError, ["answer", "missing", "'question'"]),
    "unknown argument": (["answer"], {"question": "x", "limits": 1}, TypeError, ["limits"]),
    "wrong type": (["answer"], {"question": "x", "limit": "many"}, TypeError, ["'limit'", "int"]),
    "wrong inner type": (["Writer.write"], {"parts": [1, 2]}, TypeError, ["'parts'", "list[str]"]),
    "result cannot travel": (["lock"], {}, errors.ValueNotEncodableError, ["lock", "result"]),
    "deep result cannot travel": (["wraps_lock"], {}, errors.ValueNotEncodableError, ["lock"]),
}


@pytest.fixture
async def client(tmp_path: Path, namespace: str, broker_access: BrokerAccess) -> AsyncIterator[Client]:
    (tmp_path / "good.py").write_text(GOOD)
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    async with Worker(load_app(tmp_path / "good.py"), settings, name="w"), connect(settings=settings) as client:
        await client.wait_for("answer")
        yield client


@pytest.mark.parametrize("case", CALLS)
async def test_a_wrong_call_has_a_type(client: Client, case: str) -> None:
    words, kwargs, error_type, says = CALLS[case]
    with pytest.raises(error_type) as raised:
        async with asyncio.timeout(PATIENCE_S):
            await client.call(words[0], **kwargs)
    for word in says:
        assert word in str(raised.value), str(raised.value)
    assert await client.call("answer", "still there") == "still there: 3"


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_told_in_one_line(runtime: Path, case: str) -> None:
    words, kwargs, _, says = CALLS[case]
    said = complaint("call", *words, *[_as_word(item) for item in kwargs.items()], cwd=runtime, code=_code(case))
    for word in says:
        assert word in said


def _as_word(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name}:={json.dumps(value)}"


def _code(case: str) -> int:
    return 2 if case == "unknown argument" else 1


def test_a_large_argument_is_told_in_one_line(runtime: Path) -> None:
    text = "x" * 100_000  # one word of a command line holds 128 KiB
    said = complaint("call", "takes", f"text={text}", *[f"text{n}={text}" for n in range(6)], cwd=runtime, code=2)
    assert "no parameter 'text0'" in said
    said = complaint("call", "answer", *[text] * 6, cwd=runtime, code=1)
    assert "too many positional arguments" in said


# Brokers.


async def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    settings = Settings(broker=BrokerAccess(urls=("nats://127.0.0.1:1",)), node="here")
    with pytest.raises(errors.BrokerUnreachableError, match=r"127\.0\.0\.1:1") as raised:
        async with connect(settings=settings):
            pass
    assert "127.0.0.1:1" in raised.value.url


async def test_wrong_credentials(broker_access: BrokerAccess) -> None:
    access = BrokerAccess(urls=broker_access.urls, token="wrong")
    with pytest.raises(errors.BrokerAuthError):
        async with connect(settings=Settings(broker=access, node="here")):
            pass


async def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(errors.BrokerStartError, match=f"{port}.*in use"):
            await EmbeddedBroker(tmp_path / "broker", port=port).start()


def test_brokers_on_the_command_line(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    nowhere = "nats://127.0.0.1:1"
    for command in (
        ("ps",),
        ("call", "answer", "x"),
        ("run", "good.py", "answer", "x"),
        ("worker", "good.py"),
        ("up", "good.py"),
    ):
        assert "127.0.0.1:1" in complaint(*command, "--nats", nowhere, cwd=tmp_path, code=3)
    assert "nalar up" in complaint("ps", cwd=tmp_path, code=2)
    running = read_runtime_file(runtime)
    assert running is not None
    wrong = running.url.replace("://", "://wrong-token@")
    for command in (("ps",), ("worker", "good.py")):
        said = complaint(*command, "--nats", wrong, cwd=tmp_path, code=3)
        assert "credentials" in said
        assert "wrong-token" not in said
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port}" in complaint("up", "good.py", "--port", port, cwd=tmp_path, code=3)
