"""Agents whose sessions have state: on disk, and in memory alone."""

from __future__ import annotations

import os
import time

from nalar_mq import ManagedDict, ManagedList, ManagedValue, agent, method


@agent
class Kept:
    """On disk before a call is answered."""

    total: ManagedValue[int] = ManagedValue(0)
    entries: ManagedList[int]

    @method
    async def add(self, number: int) -> int:
        self.total.value += number
        return self.total.value

    @method
    async def append(self, number: int) -> int:
        self.entries.append(number)
        return len(self.entries)


@agent(durability="memory")
class Held:
    """In the memory of its worker."""

    total: ManagedValue[int] = ManagedValue(0)

    @method
    async def add(self, number: int) -> int:
        self.total.value += number
        return self.total.value


@agent
class Carried:
    """Moves while it is called, and says when its calls ran."""

    entries: ManagedDict[int, bytes]

    @method
    async def fill(self, first: int, count: int, size: int) -> int:
        self.entries.update({number: number.to_bytes(4, "big") * (size // 4) for number in range(first, first + count)})
        return len(self.entries)

    @method
    async def touch(self, numbers: list[int], at: int) -> tuple[int, float, float]:
        """The process that ran it, and when, on the clock that all processes of a machine share."""
        begun = time.monotonic()
        for number in numbers:
            self.entries[number] = at.to_bytes(4, "big") * (len(self.entries[number]) // 4)
        return os.getpid(), begun, time.monotonic()
