"""Reports of several processes as one: their columns end to end, and whether what stands in them can be. Pure.

    report of a:  slots 0 1 2      ┐
    report of b:  slots 0          ├─▶ slots 0 1 2 0 5 6, and how many of them are of each report: 3 1 2
    report of c:  slots 5 6        ┘

A call of numpy costs as much for three numbers as for three hundred, and most reports are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nalar_mq.columns import BEGUN, CREATED, MOST_SLOTS, WAITING, Begun, Report, width_of
from nalar_mq.errors import FutureReportError, MalformedReportError

from .tables import Floats, Longs, Words

Column: TypeAlias = npt.NDArray[np.generic]

_EARLY_S: Final = 1.0  # what may lie between two readings of a clock


class Told(NamedTuple):
    """Columns by name, and how many of their rows are of each report."""

    columns: dict[str, Column]
    counts: Longs

    def places(self, column: str) -> Longs:
        """A column of slots or other numbers of the processes."""
        return self.columns[column].astype(np.int64)

    def times(self, column: str) -> Floats:
        """A column of times or amounts."""
        return self.columns[column].astype(np.float64)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """The number of each report that has rows here, and which they are."""
        stop = 0
        for number, count in enumerate(self.counts.tolist()):
            if count:
                yield number, slice(stop, stop + count)
                stop += count


class Names(NamedTuple):
    """Slots that are taken, their names, and the tenants of those; how many are of each report."""

    slots: Longs
    names: list[str]
    tenants: list[str]
    counts: Longs


class Batch:
    """Reports, at most one of each process.

    Attributes:
        reports: as they were decoded.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = reports

    def told(self, table: str, kinds: dict[str, str]) -> Told | None:
        """The rows of a table in all reports; None if there are none."""
        parts = [getattr(report, table).columns for report in self.reports]
        there = [part for part in parts if part and part[0]]
        if not there:
            return None
        columns = {
            name: np.frombuffer(b"".join([part[place] for part in there]), kind)
            for place, (name, kind) in enumerate(kinds.items())
        }
        width = width_of(next(iter(kinds.values())))
        return Told(columns, _counted([len(part[0]) // width if part else 0 for part in parts]))

    def begun(self) -> tuple[Told, Words, Words, Words] | None:
        """The futures that are told of for the first time; halves of their ids, of their parents' and of all they wait for.

        The columns of ids are not among the others. None if there are none.
        """
        parts = [report.begun for report in self.reports]
        there = [part for part in parts if part is not None and part.slots]
        if not there:
            return None
        columns = {name: np.frombuffer(_joined(there, name), kind) for name, kind in BEGUN.items() if "," not in kind}
        told = Told(columns, _counted([len(part.slots) // 4 if part is not None else 0 for part in parts]))
        sizes = told.counts[told.counts > 0]
        needed = np.add.reduceat(told.places("dep_counts"), np.cumsum(sizes) - sizes)
        refuse((16 * needed != [len(part.deps) for part in there]).any(), "dependencies")
        ids, parents, deps = (_words(_joined(there, name)) for name in ("ids", "parents", "deps"))
        return told, ids, parents, deps

    def slots(self, column: str) -> Told | None:
        """A column of slots that stands alone in each report: `sessions_closed`, `jobs_closed`."""
        parts: list[bytes] = [getattr(report, column) for report in self.reports]
        if not any(parts):
            return None
        return Told({"slots": np.frombuffer(b"".join(parts), "<u4")}, _counted([len(part) // 4 for part in parts]))

    def names(self, column: str) -> Names | None:
        """Slots of `sessions` or `jobs` that are taken, and their names; the tenants are empty where none is told."""
        parts = [getattr(report, column) for report in self.reports]
        if not any(part.names for part in parts):
            return None
        slots = np.frombuffer(b"".join([part.slots for part in parts]), "<u4").astype(np.int64)
        names = list(chain.from_iterable(part.names for part in parts))
        tenants = list(chain.from_iterable(part.tenants or ("",) * len(part.names) for part in parts))
        return Names(slots, names, tenants, _counted([len(part.names) for part in parts]))

    def check_times(self, counts: Longs, *columns: Floats) -> None:
        """Refuses what is no time, or has not happened yet when its report was made."""
        latest = np.repeat(np.array([report.now_s for report in self.reports]), counts) + _EARLY_S
        for column in columns:
            refuse(not np.isfinite(column).all(), "a time that is none")
            if (column > latest).any():
                number = int(np.repeat(np.arange(len(counts)), counts)[column > latest][0])
                report = self.reports[number]
                raise FutureReportError(f"report {report.number} of {report.name!r} tells of what has not happened yet")


def _counted(counts: list[int]) -> Longs:
    return np.array(counts, np.int64)


def _joined(parts: list[Begun], name: str) -> bytes:
    return b"".join([getattr(part, name) for part in parts])


def _words(ids: bytes) -> Words:
    return np.frombuffer(ids, "<u8").reshape(-1, 2).astype(np.uint64)


def highest_of(slots: Longs, counts: Longs) -> list[tuple[int, int]]:
    """The number of each report that has slots here, and the highest of them.

    Raises:
        MalformedReportError: it is beyond all that there are.
    """
    numbers = np.flatnonzero(counts)
    stops = np.cumsum(counts[numbers])
    highest = np.maximum.reduceat(slots, stops - counts[numbers])
    refuse((highest >= MOST_SLOTS).any(), "a slot beyond all that there are")
    return list(zip(numbers.tolist(), highest.tolist(), strict=True))


def check_states(states: Column) -> None:
    """Refuses what is no state of a future."""
    refuse(int(states.min()) < CREATED or int(states.max()) > WAITING, "a state that is none")


def refuse(condition: object, reason: str) -> None:
    """Raises `MalformedReportError` where the condition holds."""
    if condition:
        raise MalformedReportError(reason)
