"""The actors that the calls go to."""

from __future__ import annotations

import os
import time

import stamps
import work

from nalar_mq import agent, method, tool, workflow

STAMPS = stamps.watched() if work.wants("stages") else stamps.Stamps()


@agent(stateful=True)
class Echo:
    """One instance a session, whose calls run in order, as the actors of the systems beside it do."""

    @method
    async def echo(self, x: int) -> int:
        return x

    @method
    async def increment(self, x: int) -> int:
        return x + 1

    @method
    async def process(self) -> int:
        return os.getpid()

    @method
    async def give(self, mb: int) -> bytes:
        return work.blob(mb)

    @method
    async def take(self, blob: bytes) -> int:
        return len(blob)

    @method
    async def stamped(self) -> list[float]:
        """When the answer of the call before left, when this call came, and when it began to run."""
        return [STAMPS.take_left(), STAMPS.came, time.monotonic()]


@tool
async def echo(x: int) -> int:
    """Any worker may run it."""
    return x


@workflow
async def three_steps(x: int) -> int:
    """Each call waits for the one before it."""
    return await echo(await echo(await echo(x)))
