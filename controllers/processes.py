"""Processes that report, what their slots stand for, and reports of several processes on their way. Pure.

Fold:  slots taken and left, and what they stood for noted ──▶ all good: effects
                                                          └──▶ one is refused: everything taken back
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nalar_mq.address import Address
from nalar_mq.columns import FEW_SLOTS, EngineFigures, Report, Serves

from .batches import Batch, highest_of, refuse
from .slots import Reach, Stretches
from .spending import Accounts
from .tables import Floats, Ints, Longs

_SPARSE: Final = 4  # slots for each that a process has taken
CODES: Final = 512  # buckets of waiting, then those of work

_Numbers = npt.NDArray[Any]


class Process:
    """One incarnation of a process that reports. Its own numbers for everything are slots of its stretches.

    `taken` is how many of futures, sessions and jobs it has given slots since it has told everything anew.
    """

    def __init__(self, place: int, report: Report, ahead_s: float, slots: Slots) -> None:
        self.place = place
        self.name = report.name
        self.incarnation = report.incarnation
        self.node = report.node
        self.number = 0
        self.heard_at = 0.0
        self.ahead_s = ahead_s
        self.is_stale = report.number != 1
        self.is_draining = False
        self.pieces: list[Report] = []
        self.former: Ints | None = None
        self.rows = slots.futures.add(64)
        self.kinds = slots.kinds.add(4)
        self.sessions = slots.sessions.add(64)
        self.jobs = slots.jobs.add(8)
        self.kind_count = 0
        self.taken: Counter[str] = Counter()
        self.accounts = Accounts()
        self.held: set[tuple[int, int]] = set()
        self.serves: dict[str, Serves] = {}
        self.able: dict[str, Serves] | None = None
        self.queues: dict[str, tuple[int, int]] = {}
        self.resources: dict[str, tuple[float, float]] = {}
        self.engines: dict[str, EngineFigures] = {}

    @property
    def address(self) -> Address:
        """Which incarnation of which process it is."""
        return Address(self.name, self.incarnation)

    def could_serve(self, agent: str) -> bool:
        """True if its app has the agent, as far as it has told."""
        return self.able is None or agent in self.able


class Slots:
    """What the slots of all processes stand for; -1 for nothing.

    Attributes:
        futures: the row of each.
        sessions: the number of each, and what the process has said that it has cost.
        jobs: the number of each.
        kinds: the number of each; and of which kind the process has counted what, the last time.
    """

    def __init__(self) -> None:
        number = (np.int32, -1, ())
        self.futures = Stretches({"number": number})
        self.sessions = Stretches({"number": number})
        self.jobs = Stretches({"number": number})
        self.kinds = Stretches(
            {
                "number": number,
                "counted": number,
                "ended": (np.int64, 0, ()),
                "waited_s": (np.float64, 0.0, ()),
                "ran_s": (np.float64, 0.0, ()),
                "buckets": (np.uint32, 0, (CODES,)),
            }
        )


class Fold:
    """Reports of different processes on their way: what to do when all have been found good, and what to take back if not."""

    def __init__(self, slots: Slots, taken: Sequence[tuple[Process, Report]]) -> None:
        self._slots = slots
        self.processes = [process for process, _ in taken]
        self.batch = Batch([report for _, report in taken])
        self.undo = ExitStack()
        self.effects: list[Callable[[], None]] = []

    def reach(self, what: str) -> tuple[Stretches, Reach]:
        """Columns of slots, and where those of the processes are."""
        table: Stretches = getattr(self._slots, what)
        name = "rows" if what == "futures" else what
        return table, table.reach([getattr(process, name) for process in self.processes])

    def looked_up(self, what: str, counts: Longs, slots: Longs) -> tuple[Longs, Ints]:
        """Places of slots that are in use, and what they stand for."""
        table, reach = self.reach(what)
        places = reach.places(counts, slots)
        if places is None:
            refuse(True, f"one of the {what} that was never named")
        assert places is not None
        found: Ints = table["number"][places]
        refuse(len(found) and int(found.min()) < 0, f"one of the {what} that has no name")
        return places, found

    def take(self, what: str, counts: Longs, slots: Longs) -> tuple[Longs, _Numbers]:
        """Places of slots that are free, and the column to write into."""
        table: Stretches = getattr(self._slots, what)
        name = "rows" if what == "futures" else what
        for number, highest in highest_of(slots, counts):
            process = self.processes[number]
            self._count_taken(process, what, int(counts[number]), highest)
            table.widen(getattr(process, name), highest + 1)
        _, reach = self.reach(what)
        places = reach.places(counts, slots)
        assert places is not None
        column = table["number"]
        refuse((column[places] >= 0).any() or not are_distinct(column, places), f"one of the {what} in a slot that has one")
        self.undo.callback(column.__setitem__, places, -1)
        return places, column

    def _count_taken(self, process: Process, what: str, count: int, highest: int) -> None:
        taken = process.taken[what] + count
        most = max(FEW_SLOTS, _SPARSE * taken)
        refuse(highest >= most, f"slot {highest} of {what} of a process that has taken {taken} of them: {most} are the most")
        self.undo.callback(process.taken.__setitem__, what, process.taken[what])
        process.taken[what] = taken

    def leave(self, what: str, counts: Longs, slots: Longs) -> Ints:
        """Frees slots; what they stood for."""
        places, found = self.looked_up(what, counts, slots)
        column = getattr(self._slots, what)["number"]
        refuse(not are_distinct(column, places), f"one of the {what} that ends twice")
        self.undo.callback(column.__setitem__, places, found)
        column[places] = -1
        return found

    def then(self, effect: Callable[..., None], *args: Any) -> None:
        """Does it when all reports have been found good."""
        self.effects.append(partial(effect, *args))

    def each(self, counts: Longs, values: Sequence[float]) -> Floats:
        """A value of each process, for each of its rows."""
        return np.repeat(np.array(values, np.float64), counts)


def are_distinct(column: _Numbers, places: Longs) -> bool:
    """True if no place is named twice; the column is as before."""
    marks = np.arange(len(places), dtype=np.int32)
    former = column[places]
    column[places] = marks
    distinct = bool((column[places] == marks).all())
    column[places] = former
    return distinct
