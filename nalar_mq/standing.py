"""What is in force at one process: the decisions it has heard of, and which of them it refuses. Pure.

The last decisions hold until others replace them, whether anybody leads or not. A record of a lower term than the highest that
has been seen is of a leader that is none any more, and is refused; so is one that a later record has overtaken.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, TypeVar

from nalar_mq.actions import Act, Acts, Ranks, State, States, decode_decision
from nalar_mq.errors import WireError

_REMEMBERED: Final = 10_000
_T = TypeVar("_T", States, Acts, Ranks)


class Standing:
    """The decisions that one process obeys.

    Args:
        name, incarnation: of the process.

    Attributes:
        states: what holds.
        refused: records that were not used, by the reason.
    """

    def __init__(self, name: str, incarnation: int) -> None:
        self._name = name
        self._incarnation = incarnation
        self._term = 0
        self._states_number = 0
        self._ranks_number = 0
        self._done: set[tuple[int, int]] = set()
        self._done_in_order: deque[tuple[int, int]] = deque()
        self.states: tuple[State, ...] = ()
        self.refused: Counter[str] = Counter()

    def take_states(self, data: bytes) -> bool:
        """Takes a `States`; True if it has replaced what held."""
        record = self._read(data, States)
        if record is None:
            return False
        if (record.term, record.number) == (self._term, self._states_number):
            return False  # read once more
        is_later = record.term > self._term or record.number > self._states_number
        if not self._follows(record.term) or not is_later:
            self.refused["late"] += 1
            return False
        self._states_number = record.number
        self.states = record.states
        return True

    def take_acts(self, data: bytes, incarnation_of: Callable[[str], int | None]) -> list[Act]:
        """Takes an `Acts`; returns those that are to be done now, each once.

        Args:
            data: the record.
            incarnation_of: which life of a process is lived now; None if it is not known.
        """
        record = self._read(data, Acts)
        if record is None or not self._follows(record.term):
            return []
        due: list[Act] = []
        for order in record.orders:
            key = (record.term, order.number)
            if key in self._done:
                continue
            self._remember(key)
            if all(incarnation_of(name) == incarnation for name, incarnation in order.incarnations.items()):
                due.append(order.act)
            else:
                self.refused["another incarnation"] += 1
        return due

    def take_ranks(self, data: bytes) -> tuple[int, bool, list[tuple[int, int]]] | None:
        """Takes a `Ranks`: the report that its slots are of, whether it names all, and slots with priorities."""
        record = self._read(data, Ranks)
        if record is None or not self._follows(record.term):
            return None
        if record.incarnation != self._incarnation:
            self.refused["another incarnation"] += 1
            return None
        if record.number <= self._ranks_number:
            self.refused["late"] += 1
            return None
        self._ranks_number = record.number
        slots = (slot for (slot,) in struct.iter_unpack("<I", record.sessions))
        values = (value for (value,) in struct.iter_unpack("<h", record.values))
        return record.report, record.is_whole, list(zip(slots, values, strict=True))

    def _read(self, data: bytes, kind: type[_T]) -> _T | None:
        try:
            return decode_decision(data, kind)
        except WireError:
            self.refused["unreadable"] += 1
            return None

    def _follows(self, term: int) -> bool:
        """False, and counted, if somebody else leads since."""
        if term < self._term:
            self.refused["former leader"] += 1
            return False
        if term > self._term:
            self._term = term
            self._states_number = self._ranks_number = 0
        return True

    def _remember(self, key: tuple[int, int]) -> None:
        self._done.add(key)
        self._done_in_order.append(key)
        if len(self._done_in_order) > _REMEMBERED:
            self._done.discard(self._done_in_order.popleft())
