"""A session that is large, and notes which calls have had an effect, for tests."""

from __future__ import annotations

from nalar_mq import ManagedDict, ManagedList, agent, method


@agent
class Carrier:
    entries: ManagedDict[int, bytes]
    log: ManagedList[int]

    @method
    async def fill(self, first: int, count: int, size: int) -> int:
        self.entries.update(dict.fromkeys(range(first, first + count), bytes(size)))
        return len(self.entries)

    @method
    async def touch(self, number: int) -> int:
        """Changes the entry of that number, modulo how many there are; returns how many calls have done so."""
        key = number % len(self.entries)
        self.entries[key] = number.to_bytes(8, "big") + self.entries[key][8:]
        self.log.append(number)
        return len(self.log)

    @method
    async def read(self) -> tuple[list[int], int, int, dict[int, int]]:
        """The calls, how many entries there are and their bytes, and who has changed which of them last."""
        last = {key: int.from_bytes(value[:8], "big") for key, value in self.entries.items() if value[:8] != bytes(8)}
        return list(self.log), len(self.entries), sum(map(len, self.entries.values())), last
