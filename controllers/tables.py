"""Rows of numpy columns: the live futures, an index of them by id, names with numbers, and what waits for what. Pure.

Every operation takes arrays of rows and does its work in a few passes over them, whatever else is in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from nalar_mq.columns import CREATED

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_EMPTY: Final = -1
_GONE: Final = -2
_LEAST_ROWS: Final = 1024
_FACTOR: Final = np.uint64(0x9E37_79B9_7F4A_7C15)
_ODD: Final = np.uint64(0xC2B2_AE3D_27D4_EB4F)
_SHIFT: Final = np.uint64(29)
_HALF: Final = np.uint64(32)


def rows_of(values: Iterable[int]) -> Ints:
    """Row numbers as an array."""
    return np.fromiter(values, np.int32)


class Index:
    """Rows by 128-bit id: open addressing with linear probing, at most a quarter full.

    Several rows may have one id; `find` gives one of them. A place that is left is empty again at once if the next one is, so
    that places left behind do not add up.
    """

    def __init__(self) -> None:
        self._table = np.full(4 * _LEAST_ROWS, _EMPTY, np.int32)
        self._places = np.full(_LEAST_ROWS, -1, np.int32)
        self._left: list[Ints] = []

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self._table.nbytes + self._places.nbytes

    def rebuild(self, high: Words, low: Words, rows: Ints) -> None:
        """Makes room for all rows of the columns, and holds `rows`."""
        self._table = np.full(4 * len(high), _EMPTY, np.int32)
        self._places = np.full(len(high), -1, np.int32)
        self._left = []
        self.insert(high[rows], low[rows], rows)

    def insert(self, high: Words, low: Words, rows: Ints) -> None:
        """Adds rows with these ids."""
        table, mask = self._table, len(self._table) - 1
        places = self._first(high, low)
        while len(rows):
            free = table[places] < 0
            table[places[free]] = rows[free]
            won = table[places] == rows
            self._places[rows[won]] = places[won]
            rows, places = rows[~won], (places[~won] + 1) & mask

    def holds(self, rows: Ints) -> Mask:
        """Which of the rows are in it."""
        held: Mask = self._places[rows] >= 0
        return held

    def leave(self, rows: Ints) -> None:
        """Takes rows out; their places are free after `sweep`."""
        places = self._places[rows]
        self._left.append(places[places >= 0])
        self._places[rows] = -1

    def sweep(self) -> None:
        """Frees the places that have been left."""
        if not self._left:
            return
        table, mask = self._table, len(self._table) - 1
        places = np.concatenate(self._left)
        self._left = []
        table[places] = _GONE
        while len(places):
            places = places[table[(places + 1) & mask] == _EMPTY]
            table[places] = _EMPTY
            places = (places - 1) & mask
            places = places[table[places] == _GONE]

    def find(self, high: Words, low: Words, ids_high: Words, ids_low: Words) -> Ints:
        """The row of each id, -1 for those that are not there; `ids_high` and `ids_low` are the columns of all rows."""
        table, mask = self._table, len(self._table) - 1
        found = np.full(len(high), -1, np.int32)
        asked = np.arange(len(high))
        places = self._first(high, low)
        while len(asked):
            rows = table[places]
            here = rows >= 0
            here[here] = (ids_high[rows[here]] == high[asked[here]]) & (ids_low[rows[here]] == low[asked[here]])
            found[asked[here]] = rows[here]
            on = ~here & (rows != _EMPTY)
            asked, places = asked[on], (places[on] + 1) & mask
        return found

    def _first(self, high: Words, low: Words) -> Ints:
        # Ids of one process differ in a few bytes of one half, wherever those stand: all bits have to reach the lowest ones.
        mixed = (high * _FACTOR) ^ low
        mixed = (mixed ^ (mixed >> _HALF)) * _ODD
        mixed = (mixed ^ (mixed >> _SHIFT)) * _FACTOR
        mixed ^= mixed >> _HALF
        return (mixed & np.uint64(len(self._table) - 1)).astype(np.int32)


class Futures:
    """The live futures, a row each; a row is used again when its future is gone. Of free rows `state` is 0.

    Attributes:
        high, low: halves of the id.
        birth: grows from future to future, so that a row which has been used again is told from what it was.
        state: `CREATED` and so on of `nalar_mq.columns`, 0 for a free row.
        process, slot: where it was told of.
        kind, session, job: numbers in the tables of the view; -1 for no job.
        priority: as it was last told.
        arrived, began, since: when it came, began to run, came into its present state; on the view's clock, 0 for not yet.
        deadline, budget: infinite for none.
        parent, parent_birth: row of the call that made it, as long as that has this birth; -1 if it is not known.
        parent_high, parent_low: its id; zeros for none.
        depth: calls above it that were alive when it was first seen.
    """

    high: Words
    low: Words
    birth: Longs
    state: Bytes
    process: Ints
    slot: Ints
    kind: Ints
    session: Ints
    job: Ints
    priority: Ints
    arrived: Floats
    began: Floats
    since: Floats
    deadline: Floats
    budget: npt.NDArray[np.float32]
    parent: Ints
    parent_birth: Longs
    parent_high: Words
    parent_low: Words
    depth: Ints

    _COLUMNS: Final = {
        **dict.fromkeys(("high", "low", "parent_high", "parent_low"), np.uint64),
        **dict.fromkeys(("birth", "parent_birth"), np.int64),
        **dict.fromkeys(("process", "slot", "kind", "session", "job", "priority", "parent", "depth"), np.int32),
        **dict.fromkeys(("arrived", "began", "since", "deadline"), np.float64),
        "state": np.uint8,
        "budget": np.float32,
    }

    def __init__(self) -> None:
        for name, kind in self._COLUMNS.items():
            setattr(self, name, np.zeros(_LEAST_ROWS, kind))
        self._free: Ints = np.arange(_LEAST_ROWS - 1, -1, -1, dtype=np.int32)
        self._free_count: int = _LEAST_ROWS
        self._born = 0
        self._added: list[Ints] = []
        self._index = Index()

    def __len__(self) -> int:
        """Live futures."""
        return len(self.state) - self._free_count

    @property
    def nbytes(self) -> int:
        """Memory of all columns and of the index."""
        columns: int = sum(getattr(self, name).nbytes for name in self._COLUMNS)
        return columns + self._free.nbytes + self._index.nbytes

    def live(self) -> Ints:
        """Rows of all live futures."""
        return np.flatnonzero(self.state).astype(np.int32)

    def add(self, high: Words, low: Words, state: Bytes) -> Ints:
        """Rows for further futures; the caller fills their other columns."""
        count = len(high)
        while self._free_count < count:
            self._grow()
        self._free_count -= count
        rows = self._free[self._free_count : self._free_count + count].copy()
        self.high[rows], self.low[rows], self.state[rows] = high, low, state
        self.birth[rows] = np.arange(self._born + 1, self._born + 1 + count)
        self._born += count
        self.parent[rows] = -1
        self.depth[rows] = 0
        self._added.append(rows)
        return rows

    def remove(self, rows: Ints) -> None:
        """Frees rows that are in use."""
        self._index.leave(rows)
        self.state[rows] = 0
        self.birth[rows] = 0
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def settle(self) -> Ints:
        """Makes everything added since the last time findable, and returns those of it that are still there."""
        self._index.sweep()
        added, self._added = self._added, []
        rows = np.unique(np.concatenate(added)) if added else np.zeros(0, np.int32)
        rows = rows[self.state[rows] > 0]
        fresh = rows[~self._index.holds(rows)]
        self._index.insert(self.high[fresh], self.low[fresh], fresh)
        return rows

    def find(self, high: Words, low: Words) -> Ints:
        """The row of each id, -1 for those of no live future that has been there at the last `settle`."""
        return self._index.find(high, low, self.high, self.low)

    def parents(self, rows: Ints) -> Ints:
        """The rows of the calls that made them, -1 where those are not alive or not known."""
        parents = self.parent[rows]
        return np.where(self.birth[parents] == self.parent_birth[rows], parents, -1).astype(np.int32)

    def _grow(self) -> None:
        size = len(self.state)
        for name in self._COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(size, column.dtype))))
        fresh = np.arange(2 * size - 1, size - 1, -1, dtype=np.int32)
        # Free rows lie below; what is behind them in the stack means nothing.
        self._free = np.concatenate((fresh, self._free))
        self._free_count += size
        self._index.rebuild(self.high, self.low, self.live())


class Names:
    """Names with numbers, for as long as somebody uses them; a number is used again when its name is gone."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._free: list[int] = []
        self._used: list[Ints] = []
        self._closed: list[Ints] = []
        self.uses = np.zeros(_LEAST_ROWS, np.int32)

    def __len__(self) -> int:
        """Names that are used."""
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    @property
    def room(self) -> int:
        """All numbers are below this."""
        return len(self.uses)

    def number(self, name: str) -> int:
        """The number of a name, -1 if it is not used."""
        return self._numbers.get(name, -1)

    def name(self, number: int) -> str:
        """The name that has a number."""
        return self._names[number]

    def used(self) -> Ints:
        """Numbers of all names."""
        return rows_of(self._numbers.values())

    def open(self, names: Sequence[str]) -> tuple[Ints, Ints]:
        """Numbers of names, each of which is used once more; and the places in `names` of those that have newly got theirs."""
        numbers = self._numbers
        found = list(map(numbers.get, names))
        newly: list[int] = []
        for place, number in enumerate(found):
            if number is None:
                name = names[place]
                known = numbers.get(name)  # it may have come twice
                if known is None:
                    known = numbers[name] = self._take(name)
                    newly.append(place)
                found[place] = known
        rows = np.array(found, np.int32)
        self._used.append(rows)
        return rows, rows_of(newly)

    def _take(self, name: str) -> int:
        if self._free:
            number = self._free.pop()
            self._names[number] = name
            return number
        self._names.append(name)
        if len(self._names) > len(self.uses):
            self.uses = np.concatenate((self.uses, np.zeros_like(self.uses)))
        return len(self._names) - 1

    def use(self, rows: Ints) -> None:
        """Each of these numbers, which are used, is used once more."""
        self._used.append(rows)

    def close(self, rows: Ints) -> None:
        """Each is used once less; those that are used no more are gone after `settle`."""
        self._closed.append(rows)

    def settle(self) -> None:
        """Counts, and gives up the names that nobody uses any more."""
        used, self._used = self._used, []
        if used:
            self.uses += np.bincount(np.concatenate(used), minlength=self.room).astype(np.int32)
        closed, self._closed = self._closed, []
        if not closed:
            return
        rows = np.concatenate(closed)
        self.uses -= np.bincount(rows, minlength=self.room).astype(np.int32)
        gone: list[int] = np.unique(rows[self.uses[rows] == 0]).tolist()
        numbers, names = self._numbers, self._names
        for number in gone:
            del numbers[names[number]]
            names[number] = ""
        self._free += gone


class Numbers:
    """Names with numbers, which they keep while somebody may use them: nobody says when that is over.

    Once there are twice as many as were used when that was looked at last, `take` wants to know which are used now, and the
    numbers of all others are used again.
    """

    def __init__(self, used: Callable[[], Iterable[int]]) -> None:
        self._used = used
        self._most = _LEAST_ROWS
        self._free: list[int] = []
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []

    def take(self, name: str) -> int:
        """The number of a name, which may have been given up before and gets one anew."""
        number = self.numbers.get(name)
        if number is None:
            if len(self.numbers) >= self._most:
                self._give_up()
            number = self.numbers[name] = self._free.pop() if self._free else len(self.names)
            self.names[number : number + 1] = [name]
        return number

    def _give_up(self) -> None:
        for number in set(self.numbers.values()).difference(self._used()):
            del self.numbers[self.names[number]]
            self.names[number] = ""
            self._free.append(number)
        self._most = max(_LEAST_ROWS, 2 * len(self.numbers))


class Edges:
    """Which future waits for which id as an argument."""

    def __init__(self) -> None:
        self.waiter: Ints = np.zeros(0, np.int32)
        self.birth: Longs = np.zeros(0, np.int64)
        self.high: Words = np.zeros(0, np.uint64)
        self.low: Words = np.zeros(0, np.uint64)
        self._further: list[tuple[Ints, Longs, Words, Words]] = []
        self._live = 0

    @property
    def nbytes(self) -> int:
        """Memory of what has been taken in."""
        return self.waiter.nbytes + self.birth.nbytes + self.high.nbytes + self.low.nbytes

    def add(self, waiter: Ints, birth: Longs, high: Words, low: Words) -> None:
        """Rows that wait, with their births, and the ids they wait for."""
        self._further.append((waiter, birth, high, low))

    def settle(self, futures: Futures) -> None:
        """Takes in what was added; drops what waits no more when that is half of it."""
        if self._further:
            parts = [(self.waiter, self.birth, self.high, self.low), *self._further]
            self._further = []
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            self.waiter, self.birth, self.high, self.low = columns
        if len(self.waiter) > 2 * self._live + 4096:
            kept = self.waits(futures)
            self.waiter, self.birth, self.high, self.low = (
                self.waiter[kept],
                self.birth[kept],
                self.high[kept],
                self.low[kept],
            )
            self._live = len(self.waiter)

    def waits(self, futures: Futures) -> Mask:
        """Which of them still wait."""
        still: Mask = (futures.birth[self.waiter] == self.birth) & (futures.state[self.waiter] == CREATED)
        return still
