"""Agents with managed state, for tests."""

from __future__ import annotations

import asyncio
import threading

from nalar_mq import ManagedDict, ManagedList, ManagedValue, agent, context, method

BEGUN: dict[str, asyncio.Event] = {}
GATES: dict[str, threading.Event] = {}


@agent(durability="replicated", retries=5)
class Archive:
    items: ManagedList[str]
    seen: ManagedDict[str, int]

    @method
    async def put(self, text: str, size: int = 0) -> int:
        self.items.append(text + "." * size)
        self.seen[text] = self.seen.get(text, 0) + 1
        return len(self.items)

    @method
    async def all(self) -> list[str]:
        return list(self.items)


@agent
class Notebook:
    notes: ManagedList[str]
    counts: ManagedDict[str, int]
    total: ManagedValue[int] = ManagedValue(0)

    @method
    async def note(self, text: str, fails: bool = False) -> int:
        self.notes.append(text)
        self.counts[text] = self.counts.get(text, 0) + 1
        self.total.value += 1
        await asyncio.sleep(0)
        if fails:
            raise ValueError(text)
        return len(self.notes)

    @method
    async def note_anew(self, texts: list[str], size: int) -> None:
        self.notes = [text + "." * size for text in texts]  # type: ignore[assignment]

    @method
    def note_in_thread(self, text: str, fails: bool = False) -> int:
        self.notes.append(text)
        self.total.value += 1
        if fails:
            raise ValueError(text)
        return self.total.value

    @method
    async def note_for_ever(self, text: str) -> None:
        self.notes.append(text)
        BEGUN[context().session].set()
        await asyncio.Event().wait()

    @method
    def note_and_block(self, text: str) -> None:
        self.notes.append(text)
        GATES["begun"].set()
        GATES["go on"].wait(20)

    @method
    def note_and_return_what_cannot_travel(self, text: str) -> object:
        self.notes.append(text)
        return threading.Lock()

    @method
    async def ask_itself(self, text: str, writes: bool) -> list[str]:
        self.notes.append(text)
        if writes:
            await Notebook.note("from below")
        return await Notebook.read()

    @method
    async def read(self) -> list[str]:
        return list(self.notes)

    @method
    async def all(self) -> tuple[list[str], dict[str, int], int]:
        return list(self.notes), dict(self.counts), self.total.value

    @method
    async def itself(self) -> object:
        return self.notes


@agent
class Hasty:
    notes: ManagedList[str]

    def __init__(self) -> None:
        self.notes.append("at the beginning")

    @method
    async def read(self) -> list[str]:
        return list(self.notes)
