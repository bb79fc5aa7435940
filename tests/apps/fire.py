"""Actors that leave traces of their runs in files, for tests that kill processes."""

import asyncio
import os
import time
from pathlib import Path

from nalar_mq import agent, gather, method, tool, workflow


def trace(folder: str, what: object) -> None:
    """One line in the file of this process; lines of killed processes stay."""
    with (Path(folder) / str(os.getpid())).open("a") as file:
        file.write(f"{what}\n")


@tool
async def who() -> int:
    return os.getpid()


@tool
async def square(n: int, folder: str, seconds: float = 0.0) -> int:
    trace(folder, f"began {n}")
    await asyncio.sleep(seconds)
    trace(folder, f"ended {n}")
    return n * n


@tool
def square_in_thread(n: int, folder: str, seconds: float = 0.0) -> int:
    trace(folder, f"began {n}")
    time.sleep(seconds)
    trace(folder, f"ended {n}")
    return n * n


@tool
async def endure(name: str, folder: str) -> None:
    """Runs until it is cancelled."""
    trace(folder, f"began {name}")
    try:
        await asyncio.Event().wait()
    finally:
        trace(folder, f"cancelled {name}")


@tool
async def hog(seconds: float, folder: str) -> str:
    """Does to the event loop what nobody should."""
    trace(folder, "began hog")
    time.sleep(seconds)
    trace(folder, "ended hog")
    return "done"


@workflow
async def ping(depth: int) -> int:
    return depth if depth == 0 else 1 + await pong(depth - 1)


@workflow
async def pong(depth: int) -> int:
    return depth if depth == 0 else 1 + await ping(depth - 1)


@workflow
async def flood(width: int, depth: int) -> int:
    return sum(await gather(*[ping(depth) for _ in range(width)]))


@agent(stateful=True)
class Tally:
    def __init__(self) -> None:
        self.count = 0

    @method
    async def add(self, k: int) -> tuple[int, int]:
        """The sum so far, and the process that keeps it."""
        self.count += k
        return self.count, os.getpid()
