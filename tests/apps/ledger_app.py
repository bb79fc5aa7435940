"""An agent whose calls do all that can be done to a managed list and a managed dict, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, MutableSequence
from typing import Any

from nalar_mq import ManagedDict, ManagedList, ManagedValue, agent, method, tool

Step = list[Any]
Picture = tuple[list[str], list[int], list[tuple[str, int]], int]


def play(items: MutableSequence[int], table: MutableMapping[str, int], steps: list[Step]) -> None:
    """Does the same to plain and to managed ones."""
    for name, *given in steps:
        place = given[0] % (len(items) + 1) if given and isinstance(given[0], int) else 0
        match name:
            case "append":
                items.append(given[0])
            case "insert":
                items.insert(place, given[1])
            case "pop":
                if place < len(items):
                    items.pop(place)
            case "replace":
                items[place : place + 2] = given[1]
            case "reverse":
                items.reverse()
            case "clear":
                items.clear()
                table.clear()
            case "set":
                table[given[0]] = given[1]
            case "delete":
                table.pop(given[0], None)
            case _:
                table.update(given[0])


@agent(retries=50)
class Ledger:
    log: ManagedList[str]
    items: ManagedList[int]
    table: ManagedDict[str, int]
    total: ManagedValue[int] = ManagedValue(0)

    @method
    async def apply(self, token: str, steps: list[Step], pause_s: float, fails: bool = False, given: int = 0) -> Picture:
        self.log.append(token)
        play(self.items, self.table, steps)
        self.total.value += 1
        await asyncio.sleep(pause_s)
        if fails:
            raise ValueError(token)
        return self._picture()

    @method
    async def read(self) -> Picture:
        return self._picture()

    def _picture(self) -> Picture:
        return list(self.log), list(self.items), list(self.table.items()), self.total.value


@tool(retries=50)
async def later(value: int, pause_s: float) -> int:
    await asyncio.sleep(pause_s)
    return value
