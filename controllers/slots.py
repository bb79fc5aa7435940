"""The slots of many processes in common columns, so that those of all can be looked up at once. Pure.

    process:   a             b        (free)      c
    column:    | 7 3 - 9 | 4 4 | . . . . . . | 0 - - - |      a slot is a place in the stretch of its process

A stretch that gets too short moves to the end, and is twice as long there; when the columns are full, all stretches move
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .tables import Longs

_LEAST_SLOTS: Final = 64


class Stretch:
    """Where the slots of one process are in the columns of `Stretches`; it may move when any of them is widened."""

    __slots__ = ("size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size


class Reach(NamedTuple):
    """Where several stretches are now: valid until one is made, widened or removed."""

    starts: Longs
    sizes: Longs

    def places(self, counts: Longs, slots: Longs) -> Longs | None:
        """Where slots of the stretches are, so many of each, one after the other; None if one lies outside of its stretch."""
        if (slots >= np.repeat(self.sizes, counts)).any():
            return None
        found: Longs = np.repeat(self.starts, counts) + slots
        return found


class Stretches:
    """Columns for the slots of many processes, a stretch for each, so that those of all can be looked up at once.

    Args:
        columns: for each one its type, what stands in a slot that is not used, and how wide it is.
    """

    def __init__(self, columns: Mapping[str, tuple[type[np.generic], float, tuple[int, ...]]]) -> None:
        self._kinds = columns
        self._stretches: list[Stretch] = []
        self._end = 0
        self._columns = self._made(_LEAST_SLOTS)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A column; another one after a stretch has been made, widened or removed."""
        return self._columns[name]

    @property
    def nbytes(self) -> int:
        """Memory of all columns."""
        return sum(column.nbytes for column in self._columns.values())

    def add(self, size: int) -> Stretch:
        """Another stretch, of slots that are not used."""
        stretch = Stretch(self._room_for(size), size)
        self._stretches.append(stretch)
        return stretch

    def of(self, stretch: Stretch, name: str) -> npt.NDArray[Any]:
        """The part of a column that belongs to a stretch."""
        return self._columns[name][stretch.start : stretch.start + stretch.size]

    def widen(self, stretch: Stretch, least: int) -> None:
        """Makes a stretch as long as that, if it is not."""
        if least <= stretch.size:
            return
        size = max(least, 2 * stretch.size)
        start = self._room_for(size)
        for name, column in self._columns.items():
            column[start : start + stretch.size] = self.of(stretch, name)
        self.clear(stretch)
        stretch.start, stretch.size = start, size

    def clear(self, stretch: Stretch, *names: str) -> None:
        """Empties the slots of a stretch in the named columns, or in all of them."""
        for name in names or self._columns:
            self.of(stretch, name)[:] = self._kinds[name][1]

    def remove(self, stretch: Stretch) -> None:
        """A stretch is gone; where little is left, the others move together into less memory."""
        self.clear(stretch)
        self._stretches.remove(stretch)
        if self._length > 8 * max(sum(other.size for other in self._stretches), _LEAST_SLOTS):
            self._gather(0)

    def reach(self, stretches: Sequence[Stretch]) -> Reach:
        """Where these are now."""
        starts, sizes = [stretch.start for stretch in stretches], [stretch.size for stretch in stretches]
        return Reach(np.array(starts, np.int64), np.array(sizes, np.int64))

    def _made(self, size: int) -> dict[str, npt.NDArray[Any]]:
        return {name: np.full((size, *width), empty, kind) for name, (kind, empty, width) in self._kinds.items()}

    @property
    def _length(self) -> int:
        return len(next(iter(self._columns.values())))

    def _room_for(self, size: int) -> int:
        """The beginning of so many free slots behind all stretches, which move together where there are not enough."""
        if self._end + size > self._length:
            self._gather(size)
        start = self._end
        self._end += size
        return start

    def _gather(self, room: int) -> None:
        """Moves all stretches together, into columns that have room for so many further slots and half as much again."""
        used = sum(stretch.size for stretch in self._stretches) + room
        length = _LEAST_SLOTS
        while length < used + used // 2:
            length *= 2
        columns, end = self._made(length), 0
        for stretch in self._stretches:
            for name, column in columns.items():
                column[end : end + stretch.size] = self.of(stretch, name)
            stretch.start = end
            end += stretch.size
        self._columns, self._end = columns, end
