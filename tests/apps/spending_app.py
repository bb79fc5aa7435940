"""Actors whose calls cost something, and note outside what has run."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from nalar_mq import agent, context, method, spend, tool, workflow

FOLDER = Path(os.environ.get("SPENDING_FOLDER", "."))


@tool
async def buy(name: str, amount: float, unit: str = "tokens") -> str:
    spend(amount, unit)
    with (FOLDER / "bought").open("a") as bought:
        bought.write(f"{name}\n")
    return name


@tool
async def wait_for(gate: str) -> None:
    while not (FOLDER / gate).exists():
        await asyncio.sleep(0.01)


@workflow
async def shop(name: str, amount: float, gate: str) -> list[str]:
    """Buys, waits until the gate is open, and buys once more."""
    first = await buy(f"{name}-1", amount)
    await wait_for(gate)
    return [first, await buy(f"{name}-2", amount)]


@tool
async def whose() -> str:
    return context().tenant


@workflow
async def on_behalf(gate: str) -> list[str]:
    """The tenant of its own call, of one that it makes before the gate is open, and of one that it makes later."""
    first = await whose()
    with (FOLDER / "waits").open("a") as waits:
        waits.write(f"{os.getpid()}\n")
    await wait_for(gate)
    return [context().tenant, first, await whose()]


@workflow
async def outer(amount: float) -> str:
    return await inner(amount)


@workflow
async def inner(amount: float) -> str:
    return await buy("inner", amount)


@tool
def buy_and_fail(amount: float) -> None:
    spend(amount)
    raise ValueError("paid for nothing")


@tool(isolation="process")
def buy_apart(amount: float) -> int:
    spend(amount)
    spend(amount, "searches")
    return os.getpid()


@tool(batchable=True, concurrency=1)
def buy_together(amount: float) -> float:
    spend(amount)
    return amount


def buy_together_batch(amounts: list[float]) -> list[float]:
    spend(sum(amounts))
    return amounts


@agent
class Shop:
    @method
    def buy_in_thread(self, amount: float) -> str:
        """A thread of the program's own belongs to no call: what it spends there has to be said by the call."""
        mine = threading.Thread(target=spend, args=(1e9,))
        mine.start()
        mine.join()
        spend(amount)
        return threading.current_thread().name
