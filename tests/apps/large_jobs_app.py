"""Jobs whose calls take and give large values. What runs is written down where the tests look."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from nalar_mq import agent, gather, method, tool, workflow

RUNS: list[str] = []
GATES: dict[str, asyncio.Event] = {}


def gate(name: str) -> asyncio.Event:
    return GATES.setdefault(name, asyncio.Event())


def note(line: str) -> None:
    RUNS.append(line)
    log = os.environ.get("LARGE_JOBS_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{line} {os.getpid()}\n")


async def opened(name: str) -> None:
    """Returns when a gate is open: an event in tests with one process, a file in those with several."""
    log = os.environ.get("LARGE_JOBS_LOG")
    if not log:
        await gate(name).wait()
        return
    while not Path(f"{log}-{name}").exists():
        await asyncio.sleep(0.02)


@tool
async def make(size: int, mark: int) -> bytes:
    note(f"make {mark}")
    return bytes([mark]) * size


@tool
def weigh(blob: bytes) -> int:
    note(f"weigh {blob[0]}")
    return len(blob)


@tool
async def held(blob: bytes, name: str) -> int:
    note(f"held {name}")
    await opened(name)
    return len(blob)


@tool
async def pieces(size: int, count: int) -> AsyncIterator[bytes]:
    note(f"pieces {count}")
    for mark in range(count):
        yield bytes([mark]) * size


@agent
class Scale:
    """Makes calls of its own with large values."""

    @method
    async def both(self, blob: bytes, size: int) -> bytes:
        note(f"both {blob[0]}")
        other = await make(size, blob[0] + 1)
        return blob + other


@workflow
async def every_way(size: int) -> list[int]:
    """Large results that are looked at and not, passed on and given, of tools, agents and generators."""
    looked = await make(size, 1)
    unseen = make(size, 2)
    weights = await gather(weigh(looked), weigh(unseen.later), weigh(bytes([3]) * size))
    joined = await Scale.both(looked, size)
    parts = [len(part) async for part in pieces(size, 2).stream()]
    return [*weights, len(joined), *parts]


@workflow
async def returns(size: int, mark: int = 7) -> str:
    return chr(mark + 64) * size


@workflow
async def interrupted(size: int, name: str) -> list[int]:
    """What was made and weighed before the gate is seen again after a loss."""
    note(f"interrupted {name}")
    first = await make(size, 1)
    weight = await weigh(first)
    second = make(size, 2)
    await weigh(second.later)
    await opened(name)
    return [weight, await weigh(await second), await weigh(first + b"x")]


@workflow
async def waits(size: int, name: str) -> int:
    note(f"waits {name}")
    return sum(await gather(held(bytes([5]) * size, name), held(bytes([5]) * size, name)))


@workflow(retries=1)
async def fails(size: int) -> None:
    """Fails for good after it has made a large value."""
    await make(size, 9)
    raise ValueError("never")


@tool
async def make_when(size: int, name: str) -> bytes:
    note(f"make_when {name}")
    await opened(name)
    return bytes(size)


@workflow
async def tries(size: int, timeout_s: float) -> str:
    """What becomes of a call whose result needs much room."""
    try:
        await make.options(timeout_s=timeout_s)(size, 1)
    except Exception as error:
        return type(error).__name__
    return "made"


@workflow
async def returns_when(size: int, name: str) -> str:
    note(f"returns_when {name}")
    await opened(name)
    return "x" * size
