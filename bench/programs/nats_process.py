"""A NATS server and worker processes for systems that bring neither; ended with the program."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import work


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """True if somebody does."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def wait_until_listens(port: int) -> None:
    """Returns when somebody listens on `port`; raises `TimeoutError` after 20 s."""
    deadline = time.monotonic() + 20.0
    while not listens(port):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens on port {port}")
        time.sleep(0.01)


@contextlib.contextmanager
def running(*options: str) -> Iterator[str]:
    """A server of its own, started with further `options`; gives its URL."""
    port = free_port()
    server = Path(sysconfig.get_path("scripts")) / "nats-server"
    with _ended(subprocess.Popen([str(server), "-a", "127.0.0.1", "-p", str(port), *options], stderr=subprocess.DEVNULL)):
        wait_until_listens(port)
        yield f"nats://127.0.0.1:{port}"


@contextlib.contextmanager
def workers(program: str, arguments: Sequence[Sequence[str]]) -> Iterator[None]:
    """One process running `program` for each list of arguments."""
    with contextlib.ExitStack() as stack:
        for words in arguments:
            stack.enter_context(_ended(subprocess.Popen([sys.executable, program, *words])))
        yield


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def first_answer(call: Callable[[], Awaitable[Any]]) -> None:
    """Calls until the workers are there."""
    for _ in range(2000):
        with contextlib.suppress(Exception):
            work.expect(await asyncio.wait_for(call(), 2.0), 1)
            return
        await asyncio.sleep(0.01)
    raise SystemExit("no worker has answered")
