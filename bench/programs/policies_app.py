"""Agents whose instances run one call at a time, so that a policy has something to decide."""

from __future__ import annotations

import asyncio

from nalar_mq import ManagedList, agent, method, tool


@agent(concurrency=1)
class Desk:
    """Keeps what each of its sessions has asked, in the order in which it was done."""

    done: ManagedList[int]

    @method
    async def work(self, number: int, seconds: float) -> int:
        """Takes so long; returns how many calls the session has had."""
        await asyncio.sleep(seconds)
        self.done.append(number)
        return len(self.done)

    @method
    async def history(self) -> list[int]:
        """The numbers of its calls, in the order in which they were done."""
        return list(self.done)


@tool(concurrency=1, resources={"slot": 1})
async def red(seconds: float) -> None:
    """Takes so long."""
    await asyncio.sleep(seconds)


@tool(concurrency=1, resources={"slot": 1})
async def blue(seconds: float) -> None:
    """Takes so long."""
    await asyncio.sleep(seconds)
