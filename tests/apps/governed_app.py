"""Agents of all sorts whose calls end when they are told to, for tests of what controllers see and decide."""

from __future__ import annotations

import asyncio
import os

from nalar_mq import ManagedList, agent, method, tool, workflow

GATES: dict[str, asyncio.Event] = {}
ORDER: list[str] = []


def gate(name: str) -> asyncio.Event:
    """What calls of that name wait for."""
    return GATES.setdefault(name, asyncio.Event())


async def pass_gate(name: str) -> None:
    """Notes that it has begun, and waits for its gate if there is one."""
    ORDER.append(name)
    found = GATES.get(name)
    if found is not None:
        await found.wait()


@tool(concurrency=1)
async def one_by_one(name: str) -> str:
    await pass_gate(name)
    return name


@tool
async def where() -> int:
    return os.getpid()


@tool(resources={"slot": 1})
async def left() -> int:
    return os.getpid()


@tool(resources={"slot": 1})
async def right() -> int:
    return os.getpid()


@tool
async def side_by_side(name: str, given: str = "") -> str:
    await pass_gate(name)
    return name + given


@agent(stateful=True)
class Clerk:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @method
    async def note(self, name: str) -> list[str]:
        await pass_gate(name)
        self.seen.append(name)
        return self.seen


@agent
class Ledger:
    entries: ManagedList[str]

    @method
    async def note(self, name: str) -> list[str]:
        await pass_gate(name)
        self.entries.append(name)
        return list(self.entries)


@workflow
async def ask(name: str, target: str) -> str:
    if target == "Clerk":
        return (await Clerk.note(name))[-1]
    return await (one_by_one(name) if target == "one_by_one" else side_by_side(name))
