"""Agents whose sessions have state: on disk, and in memory alone."""

from __future__ import annotations

from nalar_mq import ManagedList, ManagedValue, agent, method


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
