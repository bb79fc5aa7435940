"""Actors that the tests of the runtime call."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from nalar_mq import Future, agent, as_completed, context, gather, method, tool, workflow


@dataclass
class Report:
    title: str
    points: tuple[int, ...]


class Refused(Exception):
    def __init__(self, why: str, code: int) -> None:
        super().__init__(why, code)
        self.code = code


GATES: dict[str, threading.Event] = {}


def gate(name: str) -> threading.Event:
    return GATES.setdefault(name, threading.Event())


@tool
async def echo(x: object) -> object:
    return x


@tool
async def add(a: int, b: int = 0) -> int:
    return a + b


@tool
def double(x: int) -> int:
    return 2 * x


@tool
def who() -> int:
    return os.getpid()


@tool
async def refuse(why: str) -> None:
    raise Refused(why, 7)


@tool
async def exits() -> None:
    raise SystemExit(3)


@tool
async def wait_at(name: str) -> str:
    while not gate(name).is_set():
        await asyncio.sleep(0.005)
    return name


@tool
def block_at(name: str) -> str:
    gate(name).wait(30)
    return name


@tool(concurrency=1)
async def waits_for_another(name: str) -> str:
    return await wait_at(name)


@tool(concurrency=1)
async def one_at_a_time(name: str) -> str:
    while not gate(name).is_set():
        await asyncio.sleep(0.005)
    return name


@tool
async def opens(name: str) -> None:
    gate(name).set()


@tool
async def numbers(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


@tool
def sync_numbers(n: int) -> Iterator[int]:
    yield from range(n)


@tool
async def endless() -> AsyncIterator[int]:
    i = 0
    try:
        while True:
            yield i
            i += 1
            await asyncio.sleep(0)
    finally:
        gate("endless-ended").set()


@tool
async def unencodable() -> object:
    return threading.Lock()


@tool
async def large(size: int) -> bytes:
    return b"x" * size


@tool
async def session_and_priority() -> tuple[str, int, bool]:
    c = context()
    return c.session, c.priority, c.is_root


@tool
async def left_s() -> float:
    deadline = context().deadline
    return -1.0 if deadline is None else deadline - asyncio.get_running_loop().time()


@agent(stateful=True)
class Counter:
    def __init__(self) -> None:
        self.n = 0
        self.life: list[str] = []

    async def on_start(self) -> None:
        self.life.append("started")

    @method
    async def add(self, k: int) -> int:
        before = self.n
        await asyncio.sleep(0)
        self.n = before + k
        return self.n

    @method
    def add_sync(self, k: int) -> int:
        before = self.n
        time.sleep(0.0001)
        self.n = before + k
        return self.n

    @method
    async def history(self) -> list[str]:
        return self.life

    @method
    async def place(self) -> str:
        caller: Any = context().caller
        return str(caller.me.name)

    @method
    async def twice(self, k: int) -> int:
        """Calls its own session from inside."""
        await Counter.add(k)
        return await Counter.add(k)

    @method
    async def held_by(self, name: str) -> str:
        return await wait_at(name)


@tool(batchable=True, concurrency=1)
async def square(x: int) -> int:
    await asyncio.sleep(0.02)
    return x * x


BATCHES: list[int] = []


def square_batch(xs: list[int]) -> list[int]:
    BATCHES.append(len(xs))
    return [x * x for x in xs]


@tool(batchable=True, concurrency=1)
async def misbatched(x: int) -> int:
    await asyncio.sleep(0.02)
    return x


def misbatched_batch(xs: list[int]) -> list[int]:
    return xs[:1]


@tool(isolation="process")
def elsewhere(x: int) -> tuple[int, int]:
    if x < 0:
        raise ValueError("negative", x)
    return os.getpid(), x


@tool(isolation="process")
def dies() -> None:
    os.kill(os.getpid(), 9)


@tool(isolation="process")
def sleeps(seconds: float) -> None:
    time.sleep(seconds)


@tool(preemptable="interrupt")
def interruptible() -> str:
    gate("interrupt").wait(30)
    return "interrupted"


def interrupt() -> None:
    gate("interrupt").set()


TURNS: list[str] = []


@tool(max_instances=1, concurrency=1)
async def block_turn(name: str) -> str:
    TURNS.append(name)
    while not gate(name).is_set():
        await asyncio.sleep(0.005)
    return name


@workflow
async def waits_for_turn(name: str) -> str:
    return await block_turn.options(priority=-1)(name)


@tool(concurrency=1)
def narrow_gate(name: str) -> None:
    gate(name).wait(30)


@tool(max_instances=1)
def wait_in_one(name: str) -> None:
    gate(name).wait(30)


@tool
async def where() -> str:
    caller: Any = context().caller
    return str(caller.me.name)


@tool(max_instances=1)
async def only_one() -> str:
    caller: Any = context().caller
    return str(caller.me.name)


@agent(stateful=True)
class Left:
    @method
    async def ask(self, other: str, depth: int) -> int:
        return 0 if depth == 0 else 1 + await Right.ask.options(session=other)(other, depth - 1)


@agent(stateful=True)
class Right:
    @method
    async def ask(self, other: str, depth: int) -> int:
        return 0 if depth == 0 else 1 + await Left.ask.options(session=other)(other, depth - 1)


@agent(stateful=True)
class Fork:
    @method
    async def take_with(self, other: str, meet: str) -> str:
        gate(f"{meet}-{context().session}").set()
        while not all(gate(f"{meet}-{name}").is_set() for name in (other, context().session)):
            await asyncio.sleep(0.005)
        return await Fork.name.options(session=other)()

    @method
    async def name(self) -> str:
        return context().session


@agent
class Desk:
    made = 0

    def __init__(self) -> None:
        Desk.made += 1

    @method
    async def instances(self) -> int:
        return Desk.made

    @method
    async def report(self, title: str) -> Report:
        return Report(title, (1, 2))


@workflow
async def parallel(n: int) -> int:
    return sum(await gather(*[double(i) for i in range(n)]))


@workflow
async def passed_on(n: int) -> int:
    x: Future[int] = add(0, 0)
    for _ in range(n):
        x = add(x.later, 1)
    return await x


@workflow
def recursive(n: int) -> int:
    return 0 if n == 0 else 1 + recursive(n - 1).value()


@workflow(concurrency=1)
def narrow(n: int) -> int:
    return 0 if n == 0 else 1 + narrow(n - 1).value()


@workflow
async def first_of(names: list[str]) -> list[str]:
    return [await done async for done in as_completed([wait_at(name) for name in names])]


@workflow
async def refused_below(depth: int) -> None:
    await (refuse("below") if depth == 0 else refused_below(depth - 1))


@workflow
async def refused_as_argument() -> None:
    await echo(refuse("argument").later)


@workflow
async def caught() -> str:
    try:
        await refuse("no")
    except Refused as refused:
        return f"{refused.code}"
    return "not raised"


@workflow
async def waits_for_child(name: str) -> str:
    return await wait_at(name)


@workflow
async def count_in_session(times: int) -> int:
    last = 0
    for future in [Counter.add(1) for _ in range(times)]:
        last = await future
    return last


@workflow
async def deadlines() -> tuple[float, float]:
    return await left_s(), await left_s.options(timeout_s=30.0)()
