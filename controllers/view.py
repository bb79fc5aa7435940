"""The live picture of everything: reports of all processes folded into numpy columns, for policies to look at. Pure.

    Report ──fold──▶ process: slots, kinds, sessions, jobs ──▶ futures, a row each ◀── queries of policies
                        │  a number is missing, or it contradicts itself
                        ▼
                     its rows stay as they are until a whole, in pieces, replaces all of them

* A report is checked before it is used. One that is malformed, forged, late or from the future is refused with a typed error
  and counted; so is one after a gap. What cannot be trusted any more is in `stale` until everything has been told anew.
* Times of a process become times of the view by the smallest difference between the two clocks that a report has shown.
* `settle` connects what has been folded since the last time: who made whom, how deep, and what follows what. Rows, names and
  figures are of the last `settle`; it costs what has changed, not what there is.
* What a policy asks of all futures is one pass over columns; what it asks of one is a look-up.

How much work is ahead of a future (`remaining`) is learnt from what followed earlier calls of its kind in their sessions: its
own mean time, and what was ahead of the call that began next (temporal differences).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nalar_mq.address import Address
from nalar_mq.columns import (
    BEGUN,
    BUCKETS,
    CHANGED,
    CREATED,
    ENDED,
    HELD,
    MOST_SLOTS,
    MOVED,
    NO_JOB,
    QUEUED,
    RUNNING,
    SPENT,
    TALLIES,
    WAITING,
    Columns,
    Named,
    Report,
    Serves,
    bucket_floor_s,
    decode_report,
)
from nalar_mq.errors import (
    ForgedReportError,
    FutureReportError,
    LateReportError,
    MalformedReportError,
    MissedReportError,
    WireError,
)

from .tables import Bytes, Floats, Futures, Ints, Longs, Mask, Names, Words, rows_of

FUTURE_S: Final = 60.0  # what the clock of a process may be ahead of what its earlier reports have shown
_MEMORY: Final = 1000  # calls of a kind that its mean times remember
_RATE: Final = 0.05
_TRIES: Final = 3  # settlements in which a parent that was not told of yet is looked for
_DEEPEST: Final = 1024
_NOT_HELD: Final = -1
_UNKNOWN: Final = 1 << 40  # more than any count: the next one begins anew

_Column: TypeAlias = npt.NDArray[np.generic]


class Replica(NamedTuple):
    """What runs calls of an agent in one worker; its worker's name is the name of the instance."""

    agent: str
    worker: str
    incarnation: int
    node: str
    queued: int
    running: int
    concurrency: int
    is_draining: bool

    @property
    def load(self) -> float:
        """Calls in hand for each that it can run at once."""
        return (self.queued + self.running) / self.concurrency


class Node(NamedTuple):
    """A machine or GPU: its workers, and what its processes report of its resources, used and available."""

    name: str
    workers: tuple[str, ...]
    resources: Mapping[str, tuple[float, float]]


class _Edges:
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
        return self.waiter.nbytes + self.birth.nbytes + self.high.nbytes + self.low.nbytes

    def add(self, waiter: Ints, birth: Longs, high: Words, low: Words) -> None:
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


class _Process:
    """One incarnation of a process that reports, with its own numbers for everything and what they mean here."""

    def __init__(self, place: int, report: Report, ahead_s: float) -> None:
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
        self.former_kinds = np.zeros(0, np.int32)
        self.rows = np.full(64, -1, np.int32)
        self.kinds = np.zeros(0, np.int32)
        self.sessions = np.full(64, -1, np.int32)
        self.jobs = np.full(64, -1, np.int32)
        self.told: dict[int, tuple[int, float, float]] = {}
        self.buckets: dict[tuple[int, int], int] = {}
        self.spent = np.zeros(64)
        self.tenants: dict[str, float] = {}
        self.held: set[tuple[int, int]] = set()
        self.serves: dict[str, Serves] = {}
        self.able: frozenset[str] | None = None
        self.queues: dict[str, tuple[int, int]] = {}
        self.resources: dict[str, tuple[float, float]] = {}

    def reset(self, former: Ints) -> None:
        """Nothing of it is known, except where its futures were and what it has counted."""
        self.former = former
        self.former_kinds = self.kinds
        self.rows = np.full(len(former), -1, np.int32)
        self.kinds = np.zeros(0, np.int32)
        self.sessions = np.full(64, -1, np.int32)
        self.jobs = np.full(64, -1, np.int32)
        self.spent = np.zeros(64)
        self.held = set()

    def name_kinds(self, numbers: Ints) -> None:
        """Takes further kinds. If they are others than before, what was counted for those is not known any more."""
        before = len(self.kinds)
        self.kinds = np.concatenate((self.kinds, numbers))
        known = self.former_kinds[before : before + len(numbers)]
        for place in (before + np.flatnonzero(known != numbers[: len(known)])).tolist():
            self.told[place] = (_UNKNOWN, 0.0, 0.0)
            self.buckets |= {(place, code): _UNKNOWN for code in range(512)}

    def grow_sessions(self) -> None:
        """Room for the costs of all its sessions."""
        more = len(self.sessions) - len(self.spent)
        if more > 0:
            self.spent = np.concatenate((self.spent, np.zeros(more)))

    @property
    def address(self) -> Address:
        return Address(self.name, self.incarnation)

    def could_serve(self, agent: str) -> bool:
        """True if its app has the agent, as far as it has told."""
        return self.able is None or agent in self.able


def _read(columns: Columns, table: Mapping[str, str]) -> dict[str, _Column]:
    pairs = zip(table.items(), columns.columns, strict=False)
    return {name: np.frombuffer(data, kind) for (name, kind), data in pairs}


def _widened(column: npt.NDArray[np.int32], least: int) -> npt.NDArray[np.int32]:
    if least <= len(column):
        return column
    return np.concatenate((column, np.full(max(least, 2 * len(column)) - len(column), -1, np.int32)))


def _halves(data: bytes) -> tuple[Words, Words]:
    pairs = np.frombuffer(data, "<u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def _refuse(condition: object, reason: str) -> None:
    if condition:
        raise MalformedReportError(reason)


class View:
    """All processes, agents, sessions, jobs and live futures, as far as they have been reported.

    Attributes:
        futures: a row for each live future.
        sessions, jobs: their names.
        session_live, session_tenant, session_spent: by number of the session: live futures, number of the tenant, cost.
        kinds: actor and method by number.
        kind_agent: number of its agent, by number of the kind.
        service_s, wait_s: mean time of work and of waiting, by number of the kind.
        tenants: their names by number; the first one is empty.
        now: of the last `settle`.
        version: grows with each `settle`.
        refused: reports that were not used, by the name of the error.
    """

    def __init__(self) -> None:
        self.futures = Futures()
        self.sessions = Names()
        self.jobs = Names()
        self.session_live = np.zeros(self.sessions.room, np.int32)
        self.session_tenant = np.zeros(self.sessions.room, np.int32)
        self.session_spent = np.zeros(self.sessions.room)
        self.kinds: list[tuple[str, str]] = []
        self.kind_agent = np.zeros(0, np.int32)
        self.service_s: Floats = np.zeros(0)
        self.wait_s: Floats = np.zeros(0)
        self.tenants: list[str] = [""]
        self.tenant_spent: defaultdict[str, float] = defaultdict(float)
        self.now = 0.0
        self.version = 0
        self.refused: Counter[str] = Counter()
        self._processes: dict[str, _Process] = {}
        self._places: list[_Process | None] = []
        self._kind_numbers: dict[tuple[str, str], int] = {}
        self._agents: dict[str, int] = {}
        self._tenant_numbers: dict[str, int] = {"": 0}
        self._counted: Floats = np.zeros(0)
        self._ahead_s: Floats = np.zeros(0)
        self._histogram = np.zeros((0, 512), np.int64)
        self._histogram_sums: list[int] = []
        self._last_kind = np.full(self.sessions.room, -1, np.int32)
        self._came: list[Ints] = []
        self._went: list[Ints] = []
        self._edges = _Edges()
        self._orphans: list[tuple[int, Ints, Longs]] = []
        self._held: dict[tuple[int, int], str] = {}
        self._replicas: dict[str, tuple[Replica, ...]] | None = None
        self._live: Ints | None = None

    # Folding.

    def fold(self, sender: str, data: bytes, now: float) -> None:
        """Takes a report that came from `sender`.

        Raises:
            ReportError, UnsupportedVersionError: it is not used; the type says why, and `refused` counts it.
        """
        try:
            report = decode_report(data)
            process = self._admit(sender, report, now)
            self._take(process, report)
        except WireError as error:
            self.refused[type(error).__name__] += 1
            raise

    def _admit(self, sender: str, report: Report, now: float) -> _Process:
        if report.name != sender:
            raise ForgedReportError(f"{sender!r} reports as {report.name!r}")
        process = self._processes.get(sender)
        if process is None or process.incarnation < report.incarnation:
            self.forget(sender)
            process = self._join(report, now)
        is_late = report.number <= process.number and not (process.is_stale and report.piece)
        if report.incarnation < process.incarnation or is_late:
            raise LateReportError(f"report {report.number} of {report.name}/{report.incarnation} came too late")
        if report.node != process.node:
            raise ForgedReportError(f"{sender!r} is on node {process.node!r}, and reports for {report.node!r}")
        ahead_s = now - report.now_s
        if ahead_s < process.ahead_s - FUTURE_S:
            raise FutureReportError(f"report {report.number} of {sender!r} is {process.ahead_s - ahead_s:.0f} s early")
        process.ahead_s = min(process.ahead_s, ahead_s)
        process.heard_at = now
        return process

    def _join(self, report: Report, now: float) -> _Process:
        try:
            place = self._places.index(None)
        except ValueError:
            place = len(self._places)
            self._places.append(None)
        process = _Process(place, report, now - report.now_s)
        self._processes[process.name] = self._places[place] = process
        return process

    def _take(self, process: _Process, report: Report) -> None:
        is_next = report.number == process.number + 1
        process.number = report.number
        if not is_next:
            process.is_stale = True
            process.pieces = []
        if report.piece:
            self._take_piece(process, report)
        elif process.is_stale:
            raise MissedReportError(f"reports of {process.name!r} before number {report.number} are missing")
        else:
            self._apply(process, report)

    def _take_piece(self, process: _Process, piece: Report) -> None:
        if piece.piece == 1:
            process.pieces = []
        if piece.piece != len(process.pieces) + 1 or (process.pieces and process.pieces[0].pieces != piece.pieces):
            process.pieces = []
            process.is_stale = True
            raise MissedReportError(f"piece {piece.piece} of {piece.pieces} of {process.name!r} came without those before it")
        process.pieces.append(piece)
        if piece.piece == piece.pieces:
            pieces, process.pieces = process.pieces, []
            self._replace(process, pieces)

    def _replace(self, process: _Process, pieces: list[Report]) -> None:
        """Everything that is known of the process is what the pieces say; rows of futures that are still there stay."""
        former = process.rows
        sessions, jobs = process.sessions[process.sessions >= 0], process.jobs[process.jobs >= 0]
        self._forget_states(process)
        process.reset(former)
        process.is_stale = False
        try:
            for piece in pieces:
                self._apply(process, piece)
        except WireError:
            self._remove(process.rows[process.rows >= 0])
            process.rows[:] = -1
            process.is_stale = True
            raise
        finally:
            assert process.former is not None
            self._remove(process.former[process.former >= 0])
            process.former = None
            self.sessions.close(sessions)
            self.jobs.close(jobs)

    def _apply(self, process: _Process, report: Report) -> None:
        try:
            self._take_names(process, report)
            self._take_futures(process, report)
            self._take_held(process, report)
            self._take_ended(process, report)
            self._take_counts(process, report)
            self._take_facts(process, report)
        except WireError:
            process.is_stale = True
            raise

    def _take_names(self, process: _Process, report: Report) -> None:
        _refuse(
            report.kinds_before > len(process.kinds) or (report.kinds and report.kinds_before < len(process.kinds)), "kinds"
        )
        if report.kinds:
            numbers = rows_of(self._kind(kind) for kind in report.kinds)
            process.name_kinds(numbers)
        process.sessions = self._open(process.sessions, report.sessions, self.sessions)
        if report.sessions.names:
            process.grow_sessions()
        process.jobs = self._open(process.jobs, report.jobs, self.jobs)

    def _open(self, slots_to_names: Ints, named: Named, names: Names) -> Ints:
        """The names in these slots; sessions get rows of their own."""
        if not named.names:
            return slots_to_names
        slots = np.frombuffer(named.slots, "<u4")
        highest = int(slots.max())
        _refuse(highest >= MOST_SLOTS, "a slot beyond all that there are")
        widened = _widened(slots_to_names, highest + 1)
        _refuse((widened[slots] >= 0).any() or not _are_distinct(widened, slots), "a name for a slot that has one")
        numbers, newly = names.open(named.names)
        widened[slots] = numbers
        if names is self.sessions:
            self._add_sessions(newly, dict(zip(numbers.tolist(), named.tenants, strict=False)))
        return widened

    def _add_sessions(self, numbers: list[int], tenants: Mapping[int, str]) -> None:
        if self.sessions.room > len(self.session_live):
            more = self.sessions.room - len(self.session_live)
            self.session_live = np.concatenate((self.session_live, np.zeros(more, np.int32)))
            self.session_tenant = np.concatenate((self.session_tenant, np.zeros(more, np.int32)))
            self.session_spent = np.concatenate((self.session_spent, np.zeros(more)))
            self._last_kind = np.concatenate((self._last_kind, np.full(more, -1, np.int32)))
        rows = rows_of(numbers)
        self.session_spent[rows] = 0.0
        self._last_kind[rows] = -1
        self.session_tenant[rows] = 0
        if tenants:
            self.session_tenant[rows] = rows_of(self._tenant(tenants.get(number, "")) for number in numbers)

    def _tenant(self, name: str) -> int:
        number = self._tenant_numbers.get(name)
        if number is None:
            number = self._tenant_numbers[name] = len(self.tenants)
            self.tenants.append(name)
        return number

    def _kind(self, kind: tuple[str, str]) -> int:
        number = self._kind_numbers.get(kind)
        if number is None:
            number = self._kind_numbers[kind] = len(self.kinds)
            self.kinds.append(kind)
            self.kind_agent = np.append(self.kind_agent, np.int32(self._agent(kind[0])))
            self.service_s, self.wait_s = np.append(self.service_s, 0.0), np.append(self.wait_s, 0.0)
            self._counted, self._ahead_s = np.append(self._counted, 0.0), np.append(self._ahead_s, 0.0)
            self._histogram = np.concatenate((self._histogram, np.zeros((1, 512), np.int64)))
            self._histogram_sums.append(0)
        return number

    def _agent(self, name: str) -> int:
        return self._agents.setdefault(name, len(self._agents))

    def _take_futures(self, process: _Process, report: Report) -> None:
        if report.begun is not None and report.begun.slots:
            self._begin(process, report)
        if report.changed.columns:
            told = _read(report.changed, CHANGED)
            rows = self._rows(process, told["slots"])
            states, at = told["states"], told["at"].astype(np.float64)
            _check_states(states)
            _check_times(report, at)
            at += process.ahead_s
            futures = self.futures
            futures.state[rows], futures.since[rows] = states, at
            begins = (states == RUNNING) & (futures.began[rows] == 0.0)
            futures.began[rows[begins]] = at[begins]
        if report.moved.columns:
            told = _read(report.moved, MOVED)
            self.futures.priority[self._rows(process, told["slots"])] = told["priorities"]

    def _rows(self, process: _Process, slots: _Column) -> Ints:
        """Rows of slots that are in use."""
        return _looked_up(process.rows, slots, "future")

    def _begin(self, process: _Process, report: Report) -> None:
        begun = report.begun
        assert begun is not None
        told = {name: np.frombuffer(getattr(begun, name), kind) for name, kind in BEGUN.items() if "," not in kind}
        slots = told["slots"].astype(np.int64)
        count, highest = len(slots), int(slots.max())
        _refuse(highest >= MOST_SLOTS, "a slot beyond all that there are")
        process.rows = _widened(process.rows, highest + 1)
        is_free = (process.rows[slots] < 0).all() and _are_distinct(process.rows, slots)
        _refuse(not is_free, "a slot that is in use, or twice the same")
        kinds = _looked_up(process.kinds, told["kinds"], "kind")
        sessions = _looked_up(process.sessions, told["sessions"], "session")
        has_job = told["jobs"].astype(np.int64) != NO_JOB
        jobs = np.full(count, -1, np.int32)
        jobs[has_job] = _looked_up(process.jobs, told["jobs"][has_job], "job")
        states = told["states"].astype(np.uint8)
        arrived, began, deadlines = (told[name].astype(np.float64) for name in ("arrived", "began", "deadlines"))
        _check_states(states)
        _check_times(report, arrived, began)
        _refuse(np.isnan(deadlines).any(), "a deadline that is no time")
        dep_counts = told["dep_counts"].astype(np.int64)
        _refuse(int(dep_counts.sum()) * 16 != len(begun.deps), "dependencies")

        high, low = _halves(begun.ids)
        rows, is_new = self._place(process, slots, (high, low), (kinds, sessions, jobs), states)
        process.rows[slots] = rows
        futures, ahead_s = self.futures, process.ahead_s
        futures.priority[rows] = told["priorities"].astype(np.int32)
        futures.arrived[rows] = arrived + ahead_s
        futures.began[rows] = np.where(began > 0.0, began + ahead_s, 0.0)
        futures.since[rows] = np.where(began > 0.0, began, arrived) + ahead_s
        futures.deadline[rows] = deadlines + ahead_s
        futures.budget[rows] = told["budgets"].astype(np.float32)
        self._connect(rows, is_new, begun.parents, dep_counts, begun.deps)

    def _place(
        self, process: _Process, slots: Longs, ids: tuple[Words, Words], numbers: tuple[Ints, Ints, Ints], states: Bytes
    ) -> tuple[Ints, Mask]:
        """Rows for futures, and which of them are new; those that are known already keep theirs."""
        futures, (kinds, sessions, jobs) = self.futures, numbers
        rows = np.full(len(slots), -1, np.int32)
        if process.former is not None:
            inside = np.flatnonzero(slots < len(process.former))
            old = process.former[slots[inside]]
            same = (old >= 0) & (futures.high[old] == ids[0][inside]) & (futures.low[old] == ids[1][inside])
            same &= (futures.kind[old] == kinds[inside]) & (futures.session[old] == sessions[inside])
            same &= futures.job[old] == jobs[inside]
            rows[inside[same]] = old[same]
            process.former[slots[inside[same]]] = -1
            futures.state[old[same]] = states[inside[same]]
        is_new = rows < 0
        added = futures.add(ids[0][is_new], ids[1][is_new], states[is_new])
        rows[is_new] = added
        futures.process[added], futures.slot[added] = process.place, slots[is_new]
        futures.kind[added], futures.session[added], futures.job[added] = kinds[is_new], sessions[is_new], jobs[is_new]
        self._came.append(sessions[is_new])
        self.sessions.use(sessions[is_new])
        self.jobs.use(jobs[is_new & (jobs >= 0)])
        return rows, is_new

    def _connect(self, rows: Ints, is_new: Mask, parents: bytes, dep_counts: Longs, deps: bytes) -> None:
        futures, added = self.futures, rows[is_new]
        high, low = _halves(parents)
        futures.parent_high[added], futures.parent_low[added] = high[is_new], low[is_new]
        if deps:
            waiters = np.repeat(rows, dep_counts)
            dep_high, dep_low = _halves(deps)
            wanted = np.repeat(is_new, dep_counts)
            waiters = waiters[wanted]
            self._edges.add(waiters, futures.birth[waiters], dep_high[wanted], dep_low[wanted])

    def _take_held(self, process: _Process, report: Report) -> None:
        for columns, is_held in ((report.held, True), (report.let_go, False)):
            if not columns.columns:
                continue
            told = _read(columns, HELD)
            agents = self.kind_agent[_looked_up(process.kinds, told["kinds"], "kind")]
            sessions = _looked_up(process.sessions, told["sessions"], "session")
            for key in zip(agents.tolist(), sessions.tolist(), strict=True):
                if is_held:
                    self._hold(process, key)
                else:
                    self._let_go(process, key)

    def _hold(self, process: _Process, key: tuple[int, int]) -> None:
        if key not in process.held:
            process.held.add(key)
            self.sessions.use(rows_of(key[1:]))
        self._held[key] = process.name

    def _let_go(self, process: _Process, key: tuple[int, int]) -> None:
        if key in process.held:
            process.held.discard(key)
            self.sessions.close(rows_of(key[1:]))
        if self._held.get(key) == process.name:
            del self._held[key]
            self._held.update((key, other.name) for other in self._processes.values() if key in other.held)

    def _take_ended(self, process: _Process, report: Report) -> None:
        if report.ended.columns:
            slots = _read(report.ended, ENDED)["slots"]
            rows = self._rows(process, slots)
            _refuse(not _are_distinct(process.rows, slots), "a future that ends twice")
            process.rows[slots] = -1
            self._remove(rows)
        for name, closed in (("sessions", report.sessions_closed), ("jobs", report.jobs_closed)):
            if not closed:
                continue
            slots = np.frombuffer(closed, "<u4")
            table: Ints = getattr(process, name)
            rows = _looked_up(table, slots, name)
            _refuse(not _are_distinct(table, slots), "a slot that is closed twice")
            if name == "sessions":
                process.spent[slots] = 0.0
                self.sessions.close(rows)
            else:
                self.jobs.close(rows)
            table[slots] = -1

    def _remove(self, rows: Ints) -> None:
        sessions, jobs = self.futures.session[rows], self.futures.job[rows]
        self.futures.remove(rows)
        self._went.append(sessions)
        self.sessions.close(sessions)
        self.jobs.close(jobs[jobs >= 0])

    def _take_counts(self, process: _Process, report: Report) -> None:
        """What has been counted; few rows as a rule, so they are gone through one by one."""
        if report.tallies.columns:
            self._take_tallies(process, _read(report.tallies, TALLIES))
        if report.buckets.columns:
            self._take_buckets(process, _read(report.buckets, BUCKETS))
        self._take_spent(process, report)

    def _take_tallies(self, process: _Process, told: dict[str, _Column]) -> None:
        """Mean times that follow what has come lately."""
        kinds: list[int] = _looked_up(process.kinds, told["kinds"], "kind").tolist()
        rows: list[tuple[int, int, int, float, float]] = list(zip(*(column.tolist() for column in told.values()), strict=True))
        for kind, (place, ended, _, waited_s, ran_s) in zip(kinds, rows, strict=True):
            _refuse(not (abs(waited_s) < np.inf and abs(ran_s) < np.inf), "sums that are none")
            former = process.told.get(place, (0, 0.0, 0.0))
            process.told[place] = (ended, waited_s, ran_s)
            more = ended - former[0]
            if more > 0:
                before = float(self._counted[kind])
                self.service_s[kind] = (self.service_s[kind] * before + max(ran_s - former[2], 0.0)) / (before + more)
                self.wait_s[kind] = (self.wait_s[kind] * before + max(waited_s - former[1], 0.0)) / (before + more)
                self._counted[kind] = min(before + more, float(_MEMORY))

    def _take_buckets(self, process: _Process, told: dict[str, _Column]) -> None:
        kinds: list[int] = _looked_up(process.kinds, told["kinds"], "kind").tolist()
        rows: list[tuple[int, int, int, int]] = list(zip(*(column.tolist() for column in told.values()), strict=True))
        for kind, (place, is_work, bucket, count) in zip(kinds, rows, strict=True):
            _refuse(is_work > 1, "a bucket of nothing")
            code = is_work << 8 | bucket
            more = count - process.buckets.get((place, code), 0)
            process.buckets[place, code] = count
            if more > 0:
                self._histogram[kind, code] += more
                self._histogram_sums[kind] += more
                if self._histogram_sums[kind] > 40 * _MEMORY:
                    self._histogram[kind] //= 2
                    self._histogram_sums[kind] = int(self._histogram[kind].sum())

    def _take_spent(self, process: _Process, report: Report) -> None:
        if report.spent.columns:
            told = _read(report.spent, SPENT)
            slots, amounts = told["sessions"].astype(np.int64), told["amounts"].astype(np.float64)
            rows = _looked_up(process.sessions, told["sessions"], "session")
            _refuse(not np.isfinite(amounts).all(), "a cost that is none")
            np.add.at(self.session_spent, rows, amounts - process.spent[slots])
            process.spent[slots] = amounts
        for tenant, amount in report.tenants.items():
            _refuse(not abs(amount) < float("inf"), "a cost that is none")
            self.tenant_spent[tenant] += amount - process.tenants.get(tenant, 0.0)
            process.tenants[tenant] = amount

    def _take_facts(self, process: _Process, report: Report) -> None:
        process.is_draining = report.draining
        if report.serves is not None:
            process.serves = report.serves
            for actor in report.serves:
                self._agent(actor)
        if report.able is not None:
            process.able = frozenset(report.able)
        if report.queues is not None:
            process.queues = report.queues
        if report.resources is not None:
            process.resources = report.resources

    # Processes that are gone.

    def forget(self, name: str) -> None:
        """A process is gone, and with it all that it has reported; idempotent."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        self._places[process.place] = None
        self._remove(process.rows[process.rows >= 0])
        self._forget_states(process)
        self.sessions.close(process.sessions[process.sessions >= 0])
        self.jobs.close(process.jobs[process.jobs >= 0])

    def _forget_states(self, process: _Process) -> None:
        opened = process.sessions >= 0
        np.subtract.at(self.session_spent, process.sessions[opened], process.spent[: len(opened)][opened])
        for key in list(process.held):
            self._let_go(process, key)

    def sessions_of(self, worker: str) -> tuple[int, int, Ints]:
        """The incarnation of a process, its last report, and the numbers of its sessions by their slots there, -1 for none."""
        process = self._processes[worker]
        return process.incarnation, process.number, process.sessions

    def stale(self) -> list[Address]:
        """Processes of which reports are missing: everything has to be told anew."""
        return [process.address for process in self._processes.values() if process.is_stale]

    def silent(self, since_s: float) -> list[Address]:
        """Processes of which nothing that was admitted has been heard since then."""
        return [process.address for process in self._processes.values() if process.heard_at < since_s]

    # Settling.

    def settle(self, now: float) -> None:
        """Connects what has been folded since the last time; queries answer from here on as of `now`."""
        self.now = now
        self.version += 1
        self._replicas = None
        self._live = None
        self._count_sessions()
        rows = self.futures.settle()
        self._learn(rows)
        self._find_parents(rows)
        self._edges.settle(self.futures)
        self.sessions.settle()
        self.jobs.settle()

    def _count_sessions(self) -> None:
        """Where nothing is left in a session, no work was ahead of what began there last."""
        came, went, self._came, self._went = self._came, self._went, [], []
        room = len(self.session_live)
        if came:
            self.session_live += np.bincount(np.concatenate(came), minlength=room).astype(np.int32)
        if not went:
            return
        left = np.concatenate(went)
        self.session_live -= np.bincount(left, minlength=room).astype(np.int32)
        resting = np.unique(left[self.session_live[left] == 0])
        last = self._last_kind[resting]
        self._last_kind[resting] = -1
        ended = last[last >= 0]
        self._nudge(ended, self.service_s[ended])

    def _learn(self, rows: Ints) -> None:
        """What began in a session is what was ahead of the call that began there before it."""
        if not len(rows):
            return
        futures = self.futures
        rows = rows[np.lexsort((futures.birth[rows], futures.arrived[rows], futures.session[rows]))]
        kinds, sessions = futures.kind[rows], futures.session[rows]
        is_first = np.append(True, sessions[1:] != sessions[:-1])
        before = np.where(is_first, self._last_kind[sessions], np.append(np.int32(-1), kinds[:-1]))
        follows = before >= 0
        self._nudge(before[follows], self.service_s[before[follows]] + self._ahead_s[kinds[follows]])
        is_last = np.append(is_first[1:], True)
        self._last_kind[sessions[is_last]] = kinds[is_last]

    def _nudge(self, kinds: Ints, targets: Floats) -> None:
        """Moves what is ahead of each kind towards the mean of its targets, the further the more there are."""
        counts = np.bincount(kinds, minlength=len(self._ahead_s))
        sums = np.bincount(kinds, weights=targets, minlength=len(self._ahead_s))
        seen = np.flatnonzero(counts)
        share = 1.0 - (1.0 - _RATE) ** counts[seen]
        self._ahead_s[seen] += share * (sums[seen] / counts[seen] - self._ahead_s[seen])

    def _find_parents(self, rows: Ints) -> None:
        """Looks for the parents of new rows, and a few times more for those that have not been told of yet."""
        births = self.futures.birth
        waiting, self._orphans = self._orphans, []
        for tried, lost, born in [(0, rows, births[rows]), *waiting]:
            lost = self._adopt(lost[births[lost] == born])
            if len(lost) and tried + 1 < _TRIES:
                self._orphans.append((tried + 1, lost, births[lost]))

    def _adopt(self, rows: Ints) -> Ints:
        """Notes the parents of rows that are alive; returns those whose parents are not, or are not known."""
        futures = self.futures
        rows = rows[(futures.parent_high[rows] | futures.parent_low[rows]) != 0]
        parents = futures.find(futures.parent_high[rows], futures.parent_low[rows])
        found = parents >= 0
        known, lost = rows[found], rows[~found]
        futures.parent[known] = parents[found]
        futures.parent_birth[known] = futures.birth[parents[found]]
        self._deepen(known, parents[found])
        return lost

    def _deepen(self, rows: Ints, parents: Ints) -> None:
        depth = self.futures.depth
        for _ in range(_DEEPEST):
            deeper = depth[parents] + 1
            if np.array_equal(deeper, depth[rows]):
                return
            depth[rows] = np.minimum(deeper, _DEEPEST)

    # Queries.

    @property
    def live(self) -> Ints:
        """Rows of all live futures."""
        if self._live is None:
            self._live = self.futures.live()
        return self._live

    @property
    def nbytes(self) -> int:
        """Memory of the columns of futures and of what they wait for."""
        return self.futures.nbytes + self._edges.nbytes + sum(process.rows.nbytes for process in self._processes.values())

    @property
    def agents(self) -> Mapping[str, Serves]:
        """What is served anywhere, by name."""
        return {name: serves for process in self._processes.values() for name, serves in process.serves.items()}

    @property
    def processes(self) -> Mapping[str, Address]:
        """All processes that report, by name."""
        return {process.name: process.address for process in self._processes.values()}

    @property
    def workers(self) -> Mapping[str, Address]:
        """The processes that serve something, by name."""
        return {process.name: process.address for process in self._processes.values() if process.serves}

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All nodes by name."""
        workers: dict[str, list[str]] = {}
        resources: dict[str, dict[str, tuple[float, float]]] = {}
        for process in self._processes.values():
            of_node = workers.setdefault(process.node, [])
            if process.serves:
                of_node.append(process.name)
            resources.setdefault(process.node, {}).update(process.resources)
        return {name: Node(name, tuple(sorted(workers[name])), resources[name]) for name in sorted(workers)}

    def left(self, node: str, resource: str) -> float:
        """How much of a resource of a node is neither used nor reserved by the instances there."""
        found = self.nodes.get(node)
        used, whole = found.resources.get(resource, (0.0, 0.0)) if found is not None else (0.0, 0.0)
        reserved = sum(
            serves.resources[resource] * sum(replica.node == node for replica in self.replicas(agent))
            for agent, serves in self.agents.items()
            if resource in serves.resources
        )
        return whole - max(used, reserved)

    def has_room(self, node: str, agent: str) -> bool:
        """True if a node has what another instance of an agent would reserve."""
        serves = self.agents.get(agent)
        return serves is not None and all(self.left(node, name) >= amount for name, amount in serves.resources.items())

    def spare(self, agent: str, node: str) -> list[Address]:
        """The workers of a node that could serve an agent besides what they serve, those that serve the least first."""
        found = [
            (len(process.serves), process.name, process.address)
            for process in self._processes.values()
            if process.node == node and agent not in process.serves and not process.is_draining and process.could_serve(agent)
        ]
        return [address for _, _, address in sorted(found)]

    def could_serve(self, agent: str, node: str) -> bool:
        """True if a worker of the node has the agent in its app, or does not tell what is there: others of it would have it."""
        return any(process.node == node and process.could_serve(agent) for process in self._processes.values())

    def node_of(self, worker: str) -> str:
        """The node of a worker; empty if it is not known."""
        process = self._processes.get(worker)
        return process.node if process is not None else ""

    def replicas(self, agent: str) -> tuple[Replica, ...]:
        """Where an agent is served, by name of the worker."""
        if self._replicas is None:
            self._replicas = self._all_replicas()
        return self._replicas.get(agent, ())

    def _all_replicas(self) -> dict[str, tuple[Replica, ...]]:
        found: dict[str, list[Replica]] = {}
        for name in sorted(self._processes):
            process = self._processes[name]
            for agent, serves in process.serves.items():
                queued, running = process.queues.get(agent, (0, 0))
                replica = Replica(
                    agent,
                    name,
                    process.incarnation,
                    process.node,
                    queued,
                    running,
                    max(serves.concurrency, 1),
                    process.is_draining,
                )
                found.setdefault(agent, []).append(replica)
        return {agent: tuple(replicas) for agent, replicas in found.items()}

    def serving(self, agent: str) -> tuple[Replica, ...]:
        """Its replicas that take new calls."""
        return tuple(replica for replica in self.replicas(agent) if not replica.is_draining)

    def load(self, agent: str) -> float:
        """Calls in hand of all its replicas that take new ones, for each that those can run at once."""
        serving = self.serving(agent)
        return sum(r.queued + r.running for r in serving) / sum(r.concurrency for r in serving) if serving else 0.0

    def imbalance(self, agent: str) -> float:
        """The greatest load of its replicas as a multiple of their mean; 1 if they are all alike, or idle."""
        loads = [replica.load for replica in self.replicas(agent)]
        return max(loads) * len(loads) / sum(loads) if loads and sum(loads) else 1.0

    def holder(self, session: str, agent: str) -> str:
        """The worker that holds the state of a session of an agent; empty if none is known."""
        return self._held.get((self._agents.get(agent, _NOT_HELD), self.sessions.number(session)), "")

    def worker_at(self, place: int) -> str:
        """The worker by the number in the column `process`."""
        process = self._places[place]
        return process.name if process is not None else ""

    def agent_numbers(self) -> Mapping[str, int]:
        """Numbers of agents as in `kind_agent`."""
        return self._agents

    def worker_of(self, row: int) -> str:
        """The worker that has a live future."""
        return self.worker_at(int(self.futures.process[row]))

    def agent_of(self, row: int) -> str:
        """The agent that a live future calls."""
        return self.kinds[int(self.futures.kind[row])][0]

    def homes(self, agent: str) -> Iterator[tuple[str, str]]:
        """Sessions with live futures of an agent, by name, and the worker that has the latest of each."""
        futures, live = self.futures, self.live
        rows = live[self.kind_agent[futures.kind[live]] == self._agents.get(agent, -1)]
        rows = rows[np.argsort(futures.arrived[rows], kind="stable")]
        latest = dict(zip(futures.session[rows].tolist(), futures.process[rows].tolist(), strict=True))
        for session, place in latest.items():
            yield self.sessions.name(session), self.worker_at(place)

    def id_of(self, row: int) -> bytes:
        """The id of a live future."""
        high, low = int(self.futures.high[row]), int(self.futures.low[row])
        return high.to_bytes(8, "little") + low.to_bytes(8, "little")

    def find(self, id: bytes) -> int:
        """The row of a live future, -1 if there is none."""
        high, low = _halves(id)
        return int(self.futures.find(high, low)[0])

    def rows_in(self, session: str) -> Ints:
        """Rows of the live futures of a session; one pass."""
        number = self.sessions.number(session)
        return self.live[self.futures.session[self.live] == number] if number >= 0 else self.live[:0]

    def waited(self, rows: Ints) -> Floats:
        """Seconds that each has waited before it began, until now if it has not."""
        futures = self.futures
        began = futures.began[rows]
        return np.maximum(np.where(began > 0.0, began, self.now) - futures.arrived[rows], 0.0)

    def ran(self, rows: Ints) -> Floats:
        """Seconds since each began to run, what it waited for others included; 0 for those that have not."""
        began = self.futures.began[rows]
        return np.where(began > 0.0, np.maximum(self.now - began, 0.0), 0.0)

    def remaining(self, rows: Ints) -> Floats:
        """Seconds of work that are ahead of each in its session, its own included."""
        kinds = self.futures.kind[rows]
        ahead_s = self._ahead_s[kinds]
        running = np.flatnonzero(self.futures.state[rows] == RUNNING)
        ahead_s[running] -= np.minimum(self.ran(rows[running]), self.service_s[kinds[running]])
        return np.maximum(ahead_s, 0.0)

    def quantile(self, agent: str, method: str, share: float, *, waiting: bool = False) -> float:
        """The time of work, or of waiting, that this share of the calls of a method stays below."""
        number = self._kind_numbers.get((agent, method))
        if number is None:
            return 0.0
        counts = self._histogram[number, :256] if waiting else self._histogram[number, 256:]
        passed = np.cumsum(counts)
        if not passed[-1]:
            return 0.0
        return bucket_floor_s(int(np.searchsorted(passed, share * passed[-1])) + 1)

    def waits(self) -> tuple[Ints, Ints]:
        """All pairs of a live future that waits and a live one it waits for: its arguments, or the calls it has made."""
        futures, edges = self.futures, self._edges
        still = edges.waits(futures)
        needed = futures.find(edges.high[still], edges.low[still])
        by_argument = needed >= 0
        self._adopt(self.live[futures.parents(self.live) < 0])
        parents = futures.parents(self.live)
        by_call = (parents >= 0) & (futures.state[parents] == WAITING)
        waiters = np.concatenate((edges.waiter[still][by_argument], parents[by_call]))
        return waiters, np.concatenate((needed[by_argument], self.live[by_call]))

    def blockers(self, row: int) -> Ints:
        """What a live future waits for."""
        waiters, needed = self.waits()
        found: Ints = needed[waiters == row]
        return found

    def blocked(self, row: int) -> Ints:
        """What waits for a live future."""
        waiters, needed = self.waits()
        found: Ints = waiters[needed == row]
        return found

    def queued_behind(self, running_s: float) -> Iterator[tuple[str, str, Ints]]:
        """Where all calls that can run at once have run for longer than `running_s`: agent, worker, and what is queued.

        Futures of sessions that something runs of there are left out: they would have to wait anywhere.
        """
        futures, live = self.futures, self.live
        agents = max(len(self._agents), 1)
        places = futures.process[live].astype(np.int64) * agents + self.kind_agent[futures.kind[live]]
        is_running = (futures.state[live] == RUNNING) | (futures.state[live] == WAITING)
        is_long = (futures.state[live] == RUNNING) & (self.ran(live) > running_s)
        is_queued = futures.state[live] == QUEUED
        size = len(self._places) * agents
        long_ones, queued_ones = (np.bincount(places[which], minlength=size) for which in (is_long, is_queued))
        names = list(self._agents)
        for place in np.flatnonzero((long_ones > 0) & (queued_ones > 0)).tolist():
            process, agent = self._places[place // agents], names[place % agents]
            if process is None or agent not in process.serves or long_ones[place] < process.serves[agent].concurrency:
                continue
            here = places == place
            queued, busy = live[is_queued & here], futures.session[live[is_running & here]]
            yield agent, process.name, queued[~np.isin(futures.session[queued], busy)]


def _looked_up(table: Ints, numbers: _Column, what: str) -> Ints:
    """What the numbers of a process stand for."""
    if not len(numbers):
        return table[:0]
    _refuse(int(numbers.max()) >= len(table), f"a {what} that was never named")
    found: Ints = table[numbers]
    _refuse(int(found.min()) < 0, f"a {what} that has no name")
    return found


def _are_distinct(table: Ints, places: _Column) -> bool:
    """True if no place is named twice; the table is as before."""
    marks = np.arange(len(places), dtype=np.int32)
    former = table[places]
    table[places] = marks
    distinct = bool((table[places] == marks).all())
    table[places] = former
    return distinct


def _check_states(states: _Column) -> None:
    _refuse(int(states.min()) < CREATED or int(states.max()) > WAITING, "a state that is none")


def _check_times(report: Report, *columns: Floats) -> None:
    for column in columns:
        highest = column.max()
        _refuse(not (column.min() > -np.inf and highest < np.inf), "a time that is none")
        if highest > report.now_s + 1.0:
            raise FutureReportError(f"report {report.number} of {report.name!r} tells of what has not happened yet")
