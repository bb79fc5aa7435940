"""Workflows that take time, chance and effects from the runtime. What runs is written down where the tests look."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from nalar_mq import as_completed, context, effect, now, random, sleep, tool, workflow

RUNS: list[str] = []
GATES: dict[str, asyncio.Event] = {}
SEEN: dict[str, list[Any]] = {}
HELD: dict[str, threading.Event] = {}


def gate(name: str) -> asyncio.Event:
    return GATES.setdefault(name, asyncio.Event())


def held(name: str) -> threading.Event:
    return HELD.setdefault(name, threading.Event())


@tool
async def step(x: object) -> object:
    RUNS.append(f"step {x}")
    return x


@tool
async def gated(name: str) -> str:
    RUNS.append(f"gated {name}")
    await gate(name).wait()
    return name


def order(name: str) -> tuple[str, int]:
    RUNS.append(f"order {name}")
    return context().idempotency_key, RUNS.count(f"order {name}")


async def order_later(name: str) -> tuple[str, int]:
    await asyncio.sleep(0)
    return order(name)


def refused(name: str) -> None:
    RUNS.append(f"refused {name}")
    raise ValueError(f"{name} is refused")


@workflow
async def takes(name: str) -> list[object]:
    RUNS.append(f"takes {name}")
    trail = SEEN.setdefault(name, [])
    found: list[object] = [now(), random().random(), random().randrange(100)]
    found.append(await effect(order_later, f"{name}-1"))
    found.append(await effect(asyncio.to_thread, order, f"{name}-2"))
    await sleep(0.01)
    found += [now(), random().random()]
    found.append(await step(found[-1]))
    trail.append(found)
    await gate(name).wait()
    return found


@workflow
def takes_in_thread(name: str) -> list[object]:
    RUNS.append(f"takes_in_thread {name}")
    trail = SEEN.setdefault(name, [])
    found: list[object] = [now(), random().random(), effect(order, f"{name}-1")]
    sleep(0.01)
    found += [effect(order, name=f"{name}-2"), now()]
    try:
        effect(refused, name)
    except ValueError as error:
        found.append(str(error))
    found.append(step(found[1]).value())
    trail.append(found)
    held(name).wait(30)
    return found


@workflow
async def takes_late(name: str) -> int:
    RUNS.append(f"takes_late {name}")
    await gate(name).wait()
    found = await effect(order_later, name)
    RUNS.append(f"took {name}")
    return len(found)


@workflow(concurrency=1, timeout_s=None)
async def sleeps(name: str, seconds: float) -> str:
    RUNS.append(f"sleeps {name}")
    await sleep(seconds)
    return name


@workflow(concurrency=1, timeout_s=None)
def sleeps_in_thread(name: str, seconds: float) -> str:
    RUNS.append(f"sleeps {name}")
    sleep(seconds)
    return name


@workflow
async def races(name: str) -> list[str]:
    """The alarm and the calls end in an order that is seen again."""
    trail = SEEN.setdefault(name, [])
    alarm: Any = sleep(0.05)
    labels = {id(alarm): "alarm"}
    calls: list[Any] = [gated(f"{name}-{letter}") for letter in "ab"]
    labels |= {id(call): letter for call, letter in zip(calls, "ab", strict=True)}
    order: list[str] = []
    async for future in as_completed([alarm, *calls]):
        order.append(labels[id(future)])
        await step(f"{name} {order}")
    trail.append(order)
    await gate(name).wait()
    return order


@workflow
async def side_by_side(name: str) -> list[tuple[str, int]]:
    RUNS.append(f"side_by_side {name}")
    found = await asyncio.gather(*(effect(order_later, f"{name}-{n}") for n in range(5)))
    await gate(name).wait()
    return found


@workflow
async def plain_on_loop(name: str) -> object:
    return effect(order, name)


@workflow
async def too_large() -> object:
    return await effect(asyncio.to_thread, bytes, 1024 * 1024)


@workflow
async def of_an_actor() -> object:
    return await effect(step, 1)


@workflow
async def decides_by_clock(name: str) -> object:
    """What the clock said must be durable before the effect that follows from it."""
    found = now()
    RUNS.append(f"decides {name}")
    return [found, await effect(order_later, name)]
