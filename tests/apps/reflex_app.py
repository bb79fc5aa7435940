"""Agents that wait for files, for tests of what a node does by itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from nalar_mq import ManagedList, agent, method


async def wait_for(gate: str) -> None:
    if gate:
        Path(gate + ".waits").touch()
    while gate and not Path(gate).exists():
        await asyncio.sleep(0.01)


@agent(concurrency=1)
class Desk:
    notes: ManagedList[str]

    @method
    async def add(self, note: str, gate: str = "") -> tuple[int, list[str]]:
        """The process it runs in, and what the session has been told."""
        await wait_for(gate)
        self.notes.append(note)
        return os.getpid(), list(self.notes)


@agent(concurrency=1, resources={"slot": 1})
class Press:
    @method
    async def hold(self, gate: str) -> int:
        """The process it runs in."""
        await wait_for(gate)
        return os.getpid()


@agent(concurrency=1, resources={"gpu": 1}, max_instances=3)
class Rare:
    @method
    async def hold(self, gate: str) -> int:
        """The process it runs in."""
        await wait_for(gate)
        return os.getpid()
