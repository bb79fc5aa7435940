"""Workflows that are interrupted, for the tests of jobs that go on. What runs is written down where the tests look."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from nalar_mq import Future, agent, as_completed, context, gather, method, tool, workflow
from nalar_mq.errors import OverloadedError, WorkerLostError

RUNS: list[str] = []
GATES: dict[str, asyncio.Event] = {}
HELD: dict[str, threading.Event] = {}
SEEN: dict[str, list[Any]] = {}
STREAMS: list[Any] = []
STRAYS: list[str] = []  # names of jobs that go another way from now on


def gate(name: str) -> asyncio.Event:
    return GATES.setdefault(name, asyncio.Event())


@tool
async def step(x: int) -> int:
    RUNS.append(f"step {x}")
    return x + 1


@tool
async def gated(name: str) -> str:
    RUNS.append(f"gated {name}")
    await gate(name).wait()
    return name


@agent
class Alone:
    """Is served by workers of its own, which can be lost without those of anything else."""

    @method
    async def wait(self, name: str) -> str:
        RUNS.append(f"alone {name}")
        await gate(name).wait()
        return name

    @method
    async def stay(self, name: str) -> str:
        RUNS.append(f"stays {name}")
        await gate(name).wait()
        return name

    @method
    async def rest(self, name: str) -> str:
        RUNS.append(f"rests {name}")
        await gate(name).wait()
        return name


@tool
async def key(x: int) -> str:
    RUNS.append(f"key {x}")
    return context().idempotency_key


@tool
async def fails_once(x: int) -> int:
    RUNS.append(f"fails_once {x}")
    if RUNS.count(f"fails_once {x}") == 1:
        raise ValueError(f"{x} is not ready")
    return x


@tool
async def fails(x: int) -> int:
    RUNS.append(f"fails {x}")
    raise ValueError(f"{x} never is")


@tool
async def fails_at(name: str) -> None:
    RUNS.append(f"fails_at {name}")
    await gate(name).wait()
    raise ValueError(name)


@agent
class Clerk:
    """Makes calls of its own."""

    @method
    async def work(self, number: int, until: str) -> int:
        RUNS.append(f"work {number}")
        number = await step(number)
        await gate(until).wait()
        return await step(number)

    @method
    async def risk(self, name: str) -> int:
        RUNS.append(f"risk {name}")
        number = await step(920)
        await Alone.wait(name)
        return number

    @method
    async def lean(self, name: str) -> str:
        RUNS.append(f"leans {name}")
        return await gated(name)

    @method
    async def risk_two(self, name: str) -> list[str]:
        RUNS.append(f"risk_two {name}")
        return await gather(Alone.wait(name), gated(name))


@agent(stateful=True)
class Counter:
    """Keeps what it knows in memory alone."""

    def __init__(self) -> None:
        self.count = 0

    @method
    async def add(self, n: int) -> int:
        RUNS.append(f"add {n}")
        self.count += n
        return self.count


@workflow
async def chain(name: str, steps: int) -> int:
    RUNS.append(f"chain {name}")
    number = 0
    for position in range(steps):
        number = await step(number)
        if position == steps // 2:
            await gate(name).wait()
    return number


@workflow
async def waits_for_tool(name: str) -> str:
    RUNS.append(f"waits_for_tool {name}")
    return await gated(name)


@workflow
async def order(name: str) -> list[str]:
    """Goes by the order in which its calls end, and by looks that find nothing."""
    trail: list[str] = SEEN.setdefault(name, [])
    trail.append("begin")
    futures = [gated(f"{name}-{letter}") for letter in "abc"]
    looks = sum(not futures[0].available() for _ in range(3))
    trail.append(f"{looks} looks")
    found: list[str] = []
    async for future in as_completed(futures):
        found.append((await future)[-1])
        trail.append(found[-1])
        await step(ord(found[-1]) * 1000 + len(found))
    await gate(name).wait()
    return found


@workflow
async def order_at_the_end(name: str) -> list[str]:
    """Makes nothing of the order in which its calls end before all of them have."""
    found = [(await future)[-1] async for future in as_completed([gated(f"{name}-{letter}") for letter in "abc"])]
    await step(int("".join(str("abc".index(letter)) for letter in found)))
    await gate(name).wait()
    return found


@workflow
async def first_error(name: str) -> str:
    """Goes by which of its calls fails first."""
    try:
        await gather(*[fails_at(f"{name}-{letter}") for letter in "abc"])
    except ValueError as error:
        await gate(f"{name}-goes-on").wait()
        await step(ord(str(error)[-1]))
        await gate(name).wait()
        return str(error)
    return ""


@workflow
async def nested(name: str) -> int:
    RUNS.append(f"nested {name}")
    return await Clerk.work(100, name)


@workflow
async def keys() -> list[str]:
    return list(await gather(key(1), key(1), key(2)))


@workflow(retries=1)
async def half(name: str) -> int:
    RUNS.append(f"half {name}")
    first = await step(40)
    return await fails_once(first)


@workflow
async def half_once(name: str) -> int:
    RUNS.append(f"half_once {name}")
    return await fails_once(await step(60))


@workflow
async def catches(name: str) -> str:
    RUNS.append(f"catches {name}")
    try:
        await fails(7)
    except ValueError as error:
        await gate(name).wait()
        return f"{type(error).__name__}: {error}"
    return "nothing"


@workflow
async def counts(name: str) -> int:
    RUNS.append(f"counts {name}")
    await Counter.add(1)
    await gate(name).wait()
    return await Counter.add(10)


@workflow
async def passes_on(name: str) -> int:
    RUNS.append(f"passes_on {name}")
    number = step(step(step(0).later).later)
    await gate(name).wait()
    return await step(number.later)


@tool
async def pieces(count: int) -> AsyncIterator[int]:
    RUNS.append(f"pieces {count}")
    for number in range(count):
        yield number


@workflow
async def reads_stream(name: str) -> list[int]:
    found = [piece async for piece in pieces(5).stream()]
    SEEN.setdefault(name, []).append(found)
    await gate(name).wait()
    return found


@workflow(retries=2)
async def uses_failed(name: str) -> int:
    return await step(fails_once(50).later)


@tool
def stubborn(name: str) -> int:
    """Goes on in its thread after its deadline, the first time."""
    RUNS.append(f"stubborn {name}")
    tried = RUNS.count(f"stubborn {name}")
    if tried == 1:
        HELD.setdefault(name, threading.Event()).wait(30)
    return tried


@workflow(retries=5)
async def insists(name: str) -> int:
    RUNS.append(f"insists {name}")
    first = RUNS.count(f"insists {name}") == 1
    return await stubborn.options(timeout_s=0.2 if first else None)(name)


@workflow
async def falls_back(name: str) -> str:
    try:
        return await gated(name)
    except Exception as error:
        return f"fallback {type(error).__name__}"


@agent
class Wanderer:
    """Is told to go and makes calls of its own on the way."""

    @method
    async def go(self, number: int) -> None:
        await step(number)


@workflow
async def casts(name: str) -> int:
    Wanderer.go.cast(700)
    return await step(1)


@workflow(retries=1)
async def fails_beside(name: str) -> str:
    RUNS.append(f"fails_beside {name}")
    slow = gated(name)
    await fails_once(90)
    return await slow


@workflow
async def slow_twin(name: str) -> list[str]:
    """Computes for a while between two calls: its first call is made late, in every attempt."""
    later = asyncio.ensure_future(_late(name))
    first = await gated(f"{name}-z")
    SEEN.setdefault(name, []).append(first[-1])
    await later
    await gate(name).wait()
    return SEEN[name]


async def _late(name: str) -> None:
    await asyncio.sleep(0.3)
    SEEN.setdefault(name, []).append((await gated(f"{name}-a"))[-1])


@workflow
async def strays(name: str) -> int:
    RUNS.append(f"strays {name}")
    await step(200)
    found = await step(299 if name in STRAYS else 201)
    await gate(name).wait()
    return found


@workflow
def strays_in_thread(name: str) -> int:
    RUNS.append(f"strays {name}")
    step(200).value()
    found = step(299 if name in STRAYS else 201).value()
    HELD.setdefault(name, threading.Event()).wait(30)
    return found


@workflow
async def stops_short(name: str) -> int:
    RUNS.append(f"strays {name}")
    found = await step(200)
    if name not in STRAYS:
        found = await step(201)
        await gate(name).wait()
    return found


@workflow
async def stops_short_beside(name: str) -> int:
    """Ends early while a call that goes on has ended, too, and waits for what the program does not do."""
    RUNS.append(f"strays {name}")
    gated(f"{name}-beside")
    found = await step(200)
    if name not in STRAYS:
        found = await step(201)
    await gate(name).wait()
    return found


@workflow
async def looks_less(name: str) -> str:
    """Does without a look, as what goes by the clock may, while a call that it does not wait for ends."""
    RUNS.append(f"looks_less {name}")
    beside = gated(f"{name}-beside")
    if name not in STRAYS:
        beside.available()
    await gate(name).wait()
    return name


@workflow
async def sees_more(name: str) -> list[str]:
    """Two calls that go on when the workflow is lost, and one in between that takes the program its time."""
    RUNS.append(f"sees_more {name}")
    calls = [gated(f"{name}-{letter}") for letter in "ab"]
    order: list[str] = []

    async def follow() -> None:
        await step(300)
        await asyncio.sleep(0.3)
        await step(301)
        order.append("followed")

    following = asyncio.ensure_future(follow())
    async for call in as_completed(calls):
        letter = await call
        order.append(letter[-1])
    await following
    return order


async def _by_wait_for(futures: list[Future[str]]) -> object:
    return await asyncio.wait_for(futures[0], 0.3)


async def _by_timeout(futures: list[Future[str]]) -> object:
    async with asyncio.timeout(0.3):
        return await futures[0]


async def _by_gather(futures: list[Future[str]]) -> object:
    async with asyncio.timeout(0.3):
        return await gather(*futures)


async def _by_as_completed(futures: list[Future[str]]) -> object:
    async with asyncio.timeout(0.3):
        return [await future async for future in as_completed(futures)]


async def _by_stream(futures: list[Future[str]]) -> object:
    stream = futures[0].stream()
    STREAMS.append(stream)  # one that is let go cancels its call
    async with asyncio.timeout(0.3):
        return [piece async for piece in stream]


async def _by_task(futures: list[Future[str]]) -> object:
    task = asyncio.ensure_future(_by_timeout(futures))
    await asyncio.wait([task])
    return task.result()


HASTY = {
    "wait_for": _by_wait_for,
    "timeout": _by_timeout,
    "gather": _by_gather,
    "as_completed": _by_as_completed,
    "stream": _by_stream,
    "task": _by_task,
}


@workflow
async def hasty(name: str, way: str) -> list[str]:
    """Waits in vain with a time-out of asyncio, while calls beside that end; then for the value itself."""
    trail: list[str] = SEEN.setdefault(name, [])
    await step(1)
    future = gated(f"{name}-slow")
    beside = asyncio.ensure_future(_two_steps())
    try:
        await HASTY[way]([future])
        found = ["value"]
    except TimeoutError:
        found = ["late"]
    trail.extend(found)
    found.append(await future)
    trail.append(found[-1])
    await beside
    await step(30)
    await gate(name).wait()
    return found


async def _two_steps() -> None:
    await step(40)
    await step(41)


@workflow
async def patient(name: str) -> str:
    """A time-out that does not pass, and a value that comes within it."""
    async with asyncio.timeout(60):
        first = await gated(f"{name}-slow")
    await gate(name).wait()
    return first


@workflow
async def overloaded_once(name: str) -> str:
    """Its first attempt ends with an error that is not its own, while a call of it runs."""
    RUNS.append(f"overloaded_once {name}")
    future = gated(name)
    if RUNS.count(f"overloaded_once {name}") == 1:
        await gate(f"{name}-falls").wait()
        raise OverloadedError("nobody has room", retry_after_s=0.1)
    return await future


@workflow
async def loses_one(name: str) -> list[str]:
    """Goes by the order of its first calls, then needs one whose workers are lost, and cleans up after it in any case."""
    RUNS.append(f"loses_one {name}")
    order = [(await future)[-1] async for future in as_completed([gated(f"{name}-{letter}") for letter in "ab"])]
    await step(int("".join(str("ab".index(letter)) for letter in order)))
    beside = step(900)
    try:
        order.append(await Alone.wait(name))
    finally:
        await step(901)
    await beside
    return order


@workflow
async def loses_below(name: str) -> int:
    RUNS.append(f"loses_below {name}")
    return await Clerk.risk(name)


@workflow
async def loses_beside(name: str) -> list[str]:
    """Is lost with a call while an agent waits for a call of its own."""
    RUNS.append(f"loses_beside {name}")
    return await gather(Alone.wait(name), Clerk.lean(name))


@workflow
async def loses_two_below(name: str) -> list[str]:
    RUNS.append(f"loses_two_below {name}")
    return await Clerk.risk_two(name)


@workflow
async def loses_passed_on(name: str) -> str:
    RUNS.append(f"loses_passed_on {name}")
    return await Alone.wait(Alone.wait(name).later)


@workflow
async def outlives(name: str) -> str:
    """Goes on without a call whose workers are lost."""
    RUNS.append(f"outlives {name}")
    try:
        found = await Alone.wait(name)
    except WorkerLostError:
        found = "lost"
    await step(910)
    await gate(name).wait()
    return found


@workflow
async def outlives_later(name: str) -> str:
    RUNS.append(f"outlives_later {name}")
    found = await Alone.wait(name)
    await step(910)
    await gate(f"{name}-end").wait()
    return found


@workflow
async def needs_alone(name: str) -> str:
    RUNS.append(f"needs_alone {name}")
    return await Alone.wait(name)


@workflow
async def loses_in_a_group(name: str) -> list[str]:
    RUNS.append(f"loses_in_a_group {name}")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_alone(name)) for _ in range(2)]
    return [task.result() for task in tasks]


@workflow
async def loses_several(name: str) -> list[str]:
    """Is lost with calls that have nothing in common but their worker."""
    RUNS.append(f"loses_several {name}")
    return await gather(Alone.wait(name), Alone.stay(name), Alone.rest(name))


async def _alone(name: str) -> str:
    return await Alone.wait(name)


@workflow(retries=1)
async def leaves_a_task(name: str) -> list[str]:
    """Ends with an error while a task of its own goes on, which is nobody's then."""
    number = min(2, RUNS.count(f"leaves_a_task {name}") + 1)
    RUNS.append(f"leaves_a_task {name}")

    async def goes_on() -> str:
        await gate(f"{name}-{number}").wait()
        try:
            return await gated(name)
        finally:
            RUNS.append(f"{name}-{number} is over")

    async def breaks() -> str:
        return str(await fails_once(990))

    return list(await asyncio.gather(goes_on(), breaks()))
