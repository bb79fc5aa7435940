"""An agent that notes which calls have had an effect, for tests."""

from __future__ import annotations

from nalar_mq import ManagedList, ManagedValue, agent, method


@agent
class Account:
    entries: ManagedList[int]
    total: ManagedValue[int] = ManagedValue(0)

    @method
    async def add(self, number: int) -> int:
        self.entries.append(number)
        self.total.value += 1
        return len(self.entries)

    @method
    def add_in_thread(self, number: int) -> int:
        self.entries.append(number)
        self.total.value += 1
        return len(self.entries)

    @method
    async def read(self) -> tuple[int, list[int]]:
        return self.total.value, list(self.entries)
