"""Actors that misbehave, for tests of what the runtime does then."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator

from nalar_mq import agent, context, method, tool, workflow

GATES: dict[str, threading.Event] = {}
STOPPED: list[str] = []


def gate(name: str) -> threading.Event:
    return GATES.setdefault(name, threading.Event())


async def passed(name: str) -> None:
    while not gate(name).is_set():
        await asyncio.sleep(0.005)


@tool
async def echo(x: object) -> object:
    return x


@tool
async def wait_at(name: str) -> str:
    gate(f"{name}-begun").set()
    await passed(name)
    return name


@workflow
async def asks_on_and_on(child: str) -> None:
    while True:
        await (echo(1) if child == "echo" else wait_at("never"))


@workflow
async def asks_impatiently() -> None:
    await wait_at.options(timeout_s=0.1)("never")


@tool
async def large(size: int) -> bytes:
    return b"x" * size


@tool(concurrency=1)
async def measure(name: str, blob: bytes) -> int:
    await passed(name)
    return len(blob)


@tool(concurrency=1)
async def one_at_a_time(name: str) -> str:
    await passed(name)
    return name


@tool
async def says_too_much(size: int) -> None:
    raise ValueError("x" * size, {"rest": "y" * size})


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no text either")


@tool(concurrency=1)
async def mute() -> None:
    raise MuteError


@tool(batchable=True, concurrency=1)
async def together(name: str) -> str:
    await passed("first-alone")
    return name


def together_batch(names: list[str]) -> list[str]:
    gate("batch-begun").set()
    gate("batch").wait(20)
    return [name.upper() for name in names]


@agent(batchable=True, concurrency=1)
class Named:
    def __init__(self, name: str = "") -> None:
        self.name = name

    @method
    def tell(self, x: int) -> str:
        gate("named").wait(20)
        return f"{self.name}{x}"

    def tell_batch(self, xs: list[int]) -> list[str]:
        return [f"{self.name}{x}" for x in xs]


@tool
async def endless() -> AsyncIterator[int]:
    i = 0
    try:
        while True:
            yield i
            i += 1
            if not i % 100:
                await asyncio.sleep(0)
    finally:
        gate("endless-ended").set()


@tool
def endless_in_thread() -> Iterator[bytes]:
    while True:
        yield bytes(10_000)


@tool
async def breaks_off(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i
    raise ValueError("broken off")


@agent(stateful=True)
class Keeper:
    def __init__(self) -> None:
        self.n = 0

    def on_stop(self) -> None:
        STOPPED.append("stopped")

    @method
    async def add(self, k: int) -> int:
        self.n += k
        return self.n

    @method
    async def holds(self, name: str) -> int:
        await passed(name)
        return self.n


@workflow
async def keeps(name: str) -> int:
    await Keeper.add(1)
    await Keeper.holds(name)
    return await Keeper.add(1)


@agent(stateful=True)
class Stillborn:
    def __init__(self) -> None:
        raise SystemExit(4)

    @method
    async def ask(self) -> int:
        return 1

    @method
    def ask_in_thread(self) -> int:
        return 1


@agent(stateful=True)
class Unstarted:
    async def on_start(self) -> None:
        raise RuntimeError("cannot start")

    @method
    async def ask(self) -> int:
        return 1


@tool(isolation="process")
def sleeps(seconds: float) -> None:
    time.sleep(seconds)


@tool(isolation="process")
def leaves_a_child_behind(seconds: float, pid_file: str) -> None:
    pid = os.fork()
    if pid:
        with open(pid_file + ".tmp", "w") as file:
            file.write(str(pid))
        os.rename(pid_file + ".tmp", pid_file)
    time.sleep(seconds)


@tool
async def stubborn(name: str) -> str:
    try:
        await passed(name)
    except asyncio.CancelledError:
        await passed(f"{name}-at-last")
    return "went on"


@workflow
def in_thread(name: str) -> str:
    return wait_at(name).value()


@tool
async def ends_itself() -> None:
    raise asyncio.CancelledError


@tool
async def session() -> str:
    return context().session
