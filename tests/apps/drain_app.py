"""What there is to drain: a tool, sessions in stores, and sessions in memory."""

import asyncio
from pathlib import Path

from nalar_mq import ManagedList, agent, method, sleep, tool, workflow


@tool
async def echo(seconds: float = 0.0) -> float:
    await asyncio.sleep(seconds)
    return seconds


@tool(concurrency=2)
async def trace(folder: str, name: str, seconds: float = 0.0) -> str:
    """Leaves a line before it is done, so that calls which run twice are found out."""
    with (Path(folder) / name).open("a") as file:
        file.write(f"{name}\n")
    await asyncio.sleep(seconds)
    return name


@agent
class Notebook:
    notes: ManagedList[int]

    @method
    async def note(self, seconds: float = 0.0) -> int:
        """How many notes there are, this one included."""
        await asyncio.sleep(seconds)
        self.notes.append(len(self.notes))
        return len(self.notes)

    @method
    async def read(self) -> list[int]:
        return list(self.notes)


@agent(stateful=True)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    @method
    async def add(self, seconds: float = 0.0) -> int:
        await asyncio.sleep(seconds)
        self.count += 1
        return self.count


@workflow
async def echoes(steps: int, seconds: float) -> int:
    """Calls a tool, again and again."""
    for _ in range(steps):
        await echo(seconds)
    return steps


@workflow
async def report(steps: int, seconds: float) -> int:
    """Calls a tool and a session one after the other."""
    for _ in range(steps):
        await echo(seconds)
        await Notebook.note()
    return steps


@workflow
async def rest(folder: str, seconds: float) -> str:
    """Sleeps between two calls."""
    await trace(folder, "before")
    await sleep(seconds)
    return await trace(folder, "after")
