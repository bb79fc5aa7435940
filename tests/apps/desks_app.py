"""Actors that say where they run, and note outside what has run, for tests of what is decided about them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from nalar_mq import ManagedList, agent, method, tool

FOLDER = Path(os.environ.get("DESKS_FOLDER", "."))


async def wait_for(gate: str) -> None:
    while gate and not (FOLDER / gate).exists():
        await asyncio.sleep(0.01)


def note(line: str) -> None:
    """Appends to a file that all processes share; short lines are whole."""
    with (FOLDER / "ran").open("a") as ran:
        ran.write(f"{line}\n")


@tool
async def where() -> int:
    return os.getpid()


@tool
async def stay() -> None:
    await asyncio.Event().wait()


@tool(concurrency=1)
async def in_turn(name: str, gate: str = "") -> str:
    note(name)
    await wait_for(gate)
    return name


@agent(concurrency=1)
class Desk:
    notes: ManagedList[str]

    @method
    async def add(self, name: str, gate: str = "") -> tuple[int, list[str]]:
        """The process it runs in, and what the session has been told."""
        await wait_for(gate)
        self.notes.append(name)
        return os.getpid(), list(self.notes)
