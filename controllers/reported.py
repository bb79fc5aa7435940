"""What all processes have reported, folded into numpy columns. Pure.

    Report ──fold──▶ process: slots, kinds, sessions, jobs ──▶ futures, a row each
                        │  a number is missing, or it contradicts itself
                        ▼
                     its rows stay as they are until a whole, in pieces, replaces all of them

* A report is checked before it is used. One that is malformed, forged, late or from the future is refused with a typed error
  and counted, and changes nothing; so is one after a gap. What cannot be trusted any more is in `stale` until everything has
  been told anew.
* Reports that have come together are folded together: the first one that waits of each process, then the second ones, and so
  on. Those of one process keep their order; between processes there is none. What is done for each report alone is to read it
  and to see whether its number is the next; then the columns of all are checked and folded end to end. If one of them is
  refused, what has been done for the others is taken back and each is folded by itself, so that it is the only one.
* A kind has its number for as long as a process has it, and longer: what has been learnt of it is there when the next process
  has it. Only when there is no room for others, those that no process has are given up, all at once. So are agents that nobody
  has or serves, and tenants of which there is no session, when they are as many as the others.
* Times of a process become times of the view by the smallest difference between the two clocks that a report has shown.

    fold_all ──▶ one report of each process ──▶ checks, in the order of the parts of a report ──▶ effects
                              ▲                      │ refused
                              └───── one by one ◀────┴ what has been written into slots is taken back
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from nalar_mq.address import Address, is_client_name
from nalar_mq.columns import (
    BUCKETS,
    CHANGED,
    ENDED,
    HELD,
    MOVED,
    NO_JOB,
    RUNNING,
    SPENT,
    TALLIES,
    Report,
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

from .batches import Told, check_states, refuse
from .processes import CODES, Fold, Process, Slots, are_distinct
from .spending import Accounts, Spending
from .tables import Bytes, Edges, Floats, Futures, Ints, Longs, Mask, Names, Numbers, Words, rows_of

_MOST_SILENT: Final = 200_000  # accounts of processes that are gone, or silent, and may be heard again
FUTURE_S: Final = 60.0  # what the clock of a process may be ahead of what its earlier reports have shown
MOST_KINDS_OF_ALL: Final = 16_384
_AT_ONCE_BYTES: Final = 1 << 20  # reports that are folded together: more of them would only take memory
_MEMORY: Final = 1000  # calls of a kind that its mean times remember
_UNKNOWN_COUNT: Final = 0xFFFF_FFFF  # more than any count but itself: the next one begins anew
_UNKNOWN_ENDED: Final = 1 << 40


class Incoming(NamedTuple):
    """A report: who has sent it, its bytes, and when it came on the clock of the view."""

    sender: str
    data: bytes
    at: float


class Reported:
    """All processes, agents, sessions, jobs and live futures, as far as they have been reported.

    Attributes:
        futures: a row for each live future.
        sessions, jobs: their names.
        session_live, session_tenant: by number of the session: live futures, number of the tenant.
        kinds: actor and method by number; two empty texts where a number stands for none.
        kind_agent: number of its agent, by number of the kind.
        service_s, wait_s: mean time of work and of waiting, by number of the kind.
        spending: what sessions, jobs, workflows, agents and tenants have cost.
        refused: reports that were not used, by the name of the error.
    """

    def __init__(self) -> None:
        self.futures = Futures()
        self.sessions = Names()
        self.jobs = Names()
        self.session_live = np.zeros(self.sessions.room, np.int32)
        self.session_tenant = np.zeros(self.sessions.room, np.int32)
        self.kinds: list[tuple[str, str]] = []
        self.kind_agent = np.zeros(0, np.int32)
        self.service_s: Floats = np.zeros(0)
        self.wait_s: Floats = np.zeros(0)
        self._tenants = Numbers(self._used_tenants)
        self._tenants.take("")
        self.spending = Spending()
        self._silent_accounts: dict[str, tuple[int, Accounts]] = {}
        self._silent_count = 0
        self.refused: Counter[str] = Counter()
        self._slots = Slots()
        self._processes: dict[str, Process] = {}
        self._places: list[Process | None] = []
        self._kind_numbers: dict[tuple[str, str], int] = {}
        self._free_kinds: list[int] = []
        self._agents = Numbers(self._used_agents)
        self._counted: Floats = np.zeros(0)
        self._ahead_s: Floats = np.zeros(0)
        self._histogram = np.zeros((0, CODES), np.int64)
        self._last_kind = np.full(self.sessions.room, -1, np.int32)
        self._came: list[Ints] = []
        self._went: list[Ints] = []
        self._edges = Edges()
        self._held: dict[tuple[int, int], str] = {}

    # Folding.

    def fold(self, sender: str, data: bytes, now: float) -> None:
        """Takes a report that came from `sender`.

        Raises:
            ReportError, UnsupportedVersionError: it is not used; the type says why, and `refused` counts it.
        """
        for _, error in self.fold_all([Incoming(sender, data, now)]):
            raise error

    def fold_all(self, reports: Iterable[Incoming]) -> list[tuple[str, WireError]]:
        """Takes reports, those of each sender in their order; returns who has sent those that are not used, and why."""
        waiting: dict[str, deque[Incoming]] = {}
        for report in reports:
            waiting.setdefault(report.sender, deque()).append(report)
        refused: list[tuple[str, WireError]] = []
        while waiting:
            refused += self._fold_wave([queue.popleft() for queue in waiting.values()])
            waiting = {sender: queue for sender, queue in waiting.items() if queue}
        self.refused.update(type(error).__name__ for _, error in refused)
        return refused

    def _fold_wave(self, wave: list[Incoming]) -> list[tuple[str, WireError]]:
        """Takes reports of different senders."""
        refused: list[tuple[str, WireError]] = []
        taken: list[tuple[Process, Report]] = []
        size = 0
        for incoming in wave:
            try:
                report = decode_report(incoming.data)
                process = self._admit(incoming.sender, report, incoming.at)
                if not self._is_plain(process, report):
                    continue
            except WireError as error:
                refused.append((incoming.sender, error))
                continue
            if size + len(incoming.data) > _AT_ONCE_BYTES:
                refused += self._fold_together(taken)
                taken, size = [], 0
            taken.append((process, report))
            size += len(incoming.data)
        return refused + self._fold_together(taken)

    def _fold_together(self, taken: list[tuple[Process, Report]]) -> list[tuple[str, WireError]]:
        """Takes reports of different processes that are the next ones; where one is refused, each of them by itself.

        What fails in another way than by being refused is a mistake of this program. It must not keep the others from being
        heard: it is refused as malformed, and those whose reports may have been taken in part are stale.
        """
        if not taken:
            return []
        try:
            fold = self._checked(taken)
        except WireError as error:
            if len(taken) > 1:
                return [refused for each in taken for refused in self._fold_together([each])]
            process = taken[0][0]
            process.is_stale = True
            return [(process.name, error)]
        try:
            for effect in fold.effects:
                effect()
        except Exception as error:
            for process in fold.processes:
                process.is_stale = True
            return [(process.name, _as_malformed(error)) for process in fold.processes]
        return []

    def _admit(self, sender: str, report: Report, now: float) -> Process:
        if report.name != sender:
            raise ForgedReportError(f"{sender!r} reports as {report.name!r}")
        if is_client_name(sender):
            raise ForgedReportError(f"{sender!r} is a client: workers report")
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

    def _join(self, report: Report, now: float) -> Process:
        try:
            place = self._places.index(None)
        except ValueError:
            place = len(self._places)
            self._places.append(None)
        process = Process(place, report, now - report.now_s, self._slots)
        incarnation, accounts = self._take_silent(process.name)
        if incarnation == process.address.incarnation:
            process.accounts = accounts  # a former incarnation is never heard again, and what it has spent is in the sums
        self._processes[process.name] = self._places[place] = process
        return process

    def _is_plain(self, process: Process, report: Report) -> bool:
        """Takes note of the report's number; True if it tells of changes since the one before, False if it has been taken."""
        is_next = report.number == process.number + 1
        process.number = report.number
        if not is_next:
            process.is_stale = True
            process.pieces = []
        if report.piece:
            self._take_piece(process, report)
            return False
        if process.is_stale:
            raise MissedReportError(f"reports of {process.name!r} before number {report.number} are missing")
        return True

    def _take_piece(self, process: Process, piece: Report) -> None:
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

    def _replace(self, process: Process, pieces: list[Report]) -> None:
        """Everything that is known of the process is what the pieces say; rows of futures that are still there stay."""
        slots = self._slots
        sessions, jobs = self._used(process)
        self._forget_states(process)
        process.former = slots.futures.of(process.rows, "number").copy()
        process.kind_count = 0
        process.taken.clear()
        process.is_stale = False
        slots.futures.clear(process.rows)
        slots.kinds.clear(process.kinds, "number")
        slots.sessions.clear(process.sessions)
        slots.jobs.clear(process.jobs)
        try:
            for piece in pieces:
                for _, error in self._fold_together([(process, piece)]):
                    raise error
            self._remove(process.former[process.former >= 0])
        except WireError:
            left: Ints = slots.futures.of(process.rows, "number")
            self._remove(left[left >= 0])
            self._remove(process.former[process.former >= 0])
            slots.futures.clear(process.rows)
            process.is_stale = True
            raise
        finally:
            process.former = None
            self.sessions.close(sessions)
            self.jobs.close(jobs)

    def _used(self, process: Process) -> tuple[Ints, Ints]:
        """The numbers of its sessions and jobs."""
        sessions: Ints = self._slots.sessions.of(process.sessions, "number")
        jobs: Ints = self._slots.jobs.of(process.jobs, "number")
        return sessions[sessions >= 0], jobs[jobs >= 0]

    def _checked(self, taken: Sequence[tuple[Process, Report]]) -> Fold:
        """Reports of different processes, ready to take effect: all of them, or none and nothing has changed.

        Raises:
            ReportError: one of them contradicts itself, or what was reported before.
        """
        fold = Fold(self._slots, taken)
        try:
            with fold.undo:
                self._take_names(fold)
                self._take_futures(fold)
                self._take_held(fold)
                self._take_ended(fold)
                self._take_counts(fold)
                fold.undo.pop_all()
        except WireError:
            raise
        except Exception as error:
            raise _as_malformed(error) from error
        for process, report in taken:
            fold.then(self._take_facts, process, report)
        return fold

    def _take_names(self, fold: Fold) -> None:
        for process, report in zip(fold.processes, fold.batch.reports, strict=True):
            before = report.kinds_before
            refuse(before > process.kind_count or (report.kinds and before < process.kind_count), "kinds")
            if report.kinds:
                fold.undo.callback(self._unname_kinds, process, before)
                self._name_kinds(process, self._kinds_of(report.kinds))
        for what, names in (("sessions", self.sessions), ("jobs", self.jobs)):
            named = fold.batch.names(what)
            if named is None:
                continue
            places, column = fold.take(what, named.counts, named.slots)
            numbers, newly = names.open(named.names)
            fold.undo.callback(names.close, numbers)
            column[places] = numbers
            if names is self.sessions and len(newly):
                self._add_sessions(numbers[newly], [named.tenants[place] for place in newly.tolist()])

    def _name_kinds(self, process: Process, numbers: list[int]) -> None:
        """Takes further kinds. If they are others than before, what was counted for those is not known any more."""
        kinds, before = self._slots.kinds, process.kind_count
        process.kind_count += len(numbers)
        kinds.widen(process.kinds, process.kind_count)
        part = slice(before, process.kind_count)
        kinds.of(process.kinds, "number")[part] = numbers
        counted = kinds.of(process.kinds, "counted")[part]
        others = before + np.flatnonzero((counted >= 0) & (counted != numbers))
        kinds.of(process.kinds, "buckets")[others] = _UNKNOWN_COUNT
        kinds.of(process.kinds, "ended")[others] = _UNKNOWN_ENDED
        counted[:] = numbers

    def _unname_kinds(self, process: Process, count: int) -> None:
        self._slots.kinds.of(process.kinds, "number")[count : process.kind_count] = -1
        process.kind_count = count

    def _add_sessions(self, numbers: Ints, tenants: list[str]) -> None:
        """Sessions get rows of their own."""
        if self.sessions.room > len(self.session_live):
            more = self.sessions.room - len(self.session_live)
            self.session_live = np.concatenate((self.session_live, np.zeros(more, np.int32)))
            self.session_tenant = np.concatenate((self.session_tenant, np.zeros(more, np.int32)))
            self._last_kind = np.concatenate((self._last_kind, np.full(more, -1, np.int32)))
        self._last_kind[numbers] = -1
        known = self._tenants.numbers
        self.session_tenant[numbers] = [known.get(tenant, -1) for tenant in tenants]
        unknown = numbers[self.session_tenant[numbers] < 0]
        self.session_tenant[unknown] = 0
        for number, tenant in zip(numbers.tolist(), tenants, strict=True) if len(unknown) else ():
            self.session_tenant[number] = self._tenants.take(tenant)  # used, before another one is taken

    @property
    def tenants(self) -> Sequence[str]:
        """Names of tenants by number; the first one is empty, and so are those that stand for none."""
        return self._tenants.names

    def _used_tenants(self) -> Iterable[int]:
        return {0, *self.session_tenant[self.sessions.used()].tolist()}

    def _kinds_of(self, kinds: Sequence[tuple[str, str]]) -> list[int]:
        """The numbers of kinds; those that have none get one, all of them in one step."""
        newly = [kind for kind in dict.fromkeys(kinds) if kind not in self._kind_numbers]
        if newly:
            room = MOST_KINDS_OF_ALL - len(self.kinds) + len(self._free_kinds)
            if len(newly) > room:
                self._give_up_kinds(kinds)
                room = MOST_KINDS_OF_ALL - len(self.kinds) + len(self._free_kinds)
            refuse(len(newly) > room, f"more than {MOST_KINDS_OF_ALL} kinds of all processes")
            self._add_kinds(newly)
        return [self._kind_numbers[kind] for kind in kinds]

    def _add_kinds(self, newly: Sequence[tuple[str, str]]) -> None:
        again = self._free_kinds[: len(newly)]
        del self._free_kinds[: len(newly)]
        further = len(newly) - len(again)
        numbers = [*again, *range(len(self.kinds), len(self.kinds) + further)]
        if further:
            more = np.zeros(further)
            self.kinds += [("", "")] * further
            self.kind_agent = np.append(self.kind_agent, np.zeros(further, np.int32))
            self.service_s, self.wait_s = np.append(self.service_s, more), np.append(self.wait_s, more)
            self._counted, self._ahead_s = np.append(self._counted, more), np.append(self._ahead_s, more)
            self._histogram = np.concatenate((self._histogram, np.zeros((further, CODES), np.int64)))
        for number, kind in zip(numbers, newly, strict=True):
            self.kinds[number], self._kind_numbers[kind] = kind, number
            self.kind_agent[number] = self._agents.take(kind[0])

    def _give_up_kinds(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Forgets the kinds that no process has, and no call that is alive; `wanted` are about to be some process's."""
        used = np.zeros(len(self.kinds), np.bool_)
        used[[self._kind_numbers[kind] for kind in wanted if kind in self._kind_numbers]] = True
        used[self.futures.kind[self.futures.live()]] = True
        for name in ("number", "counted"):
            numbers = self._slots.kinds[name]
            used[numbers[numbers >= 0]] = True
        used[self._free_kinds] = True
        gone = np.flatnonzero(~used)
        self._last_kind[np.isin(self._last_kind, gone)] = -1
        for column in (self.service_s, self.wait_s, self._counted, self._ahead_s, self._histogram):
            column[gone] = 0
        for number in gone.tolist():
            del self._kind_numbers[self.kinds[number]]
            self.kinds[number] = "", ""
        self._free_kinds += gone.tolist()

    def _used_agents(self) -> Iterable[int]:
        """Of kinds, which may be nobody's any more, of what is served, and of what is held."""
        of_kinds = self.kind_agent[list(self._kind_numbers.values())].tolist()
        served = (self._agents.numbers.get(name, 0) for process in self._processes.values() for name in process.serves)
        held = (agent for process in self._processes.values() for agent, _ in process.held)
        return {*of_kinds, *served, *held}

    def _take_futures(self, fold: Fold) -> None:
        self._take_begun(fold)
        told = fold.batch.told("changed", CHANGED)
        if told is not None:
            _, rows = fold.looked_up("futures", told.counts, told.places("slots"))
            states, at = told.columns["states"], told.times("at")
            check_states(states)
            fold.batch.check_times(told.counts, at)
            at += fold.each(told.counts, [process.ahead_s for process in fold.processes])
            fold.then(self._change, rows, states, at)
        told = fold.batch.told("moved", MOVED)
        if told is not None:
            _, rows = fold.looked_up("futures", told.counts, told.places("slots"))
            fold.then(self.futures.priority.__setitem__, rows, told.columns["priorities"])

    def _change(self, rows: Ints, states: Bytes, at: Floats) -> None:
        futures = self.futures
        futures.state[rows], futures.since[rows] = states, at
        begins = (states == RUNNING) & (futures.began[rows] == 0.0)
        futures.began[rows[begins]] = at[begins]

    def _take_begun(self, fold: Fold) -> None:
        begun = fold.batch.begun()
        if begun is None:
            return
        told, ids, parents, deps = begun
        slots, counts = told.places("slots"), told.counts
        places, column = fold.take("futures", counts, slots)
        _, kinds = fold.looked_up("kinds", counts, told.places("kinds"))
        _, sessions = fold.looked_up("sessions", counts, told.places("sessions"))
        jobs = self._jobs_of(fold, told)
        states = told.columns["states"].astype(np.uint8)
        check_states(states)
        arrived, began, deadlines = (told.times(name) for name in ("arrived", "began", "deadlines"))
        fold.batch.check_times(counts, arrived, began)
        refuse(np.isnan(deadlines).any(), "a deadline that is no time")

        numbers = (kinds, sessions, jobs)
        rows, is_new = self._place(fold, slots, ids, numbers)
        added = self.futures.add(ids[is_new, 0], ids[is_new, 1], states[is_new])
        fold.undo.callback(self.futures.remove, added)
        rows[is_new] = added
        column[places] = rows
        owners = fold.each(counts, [process.place for process in fold.processes]).astype(np.int32)
        self.futures.process[added], self.futures.slot[added] = owners[is_new], slots[is_new]
        ahead_s = fold.each(counts, [process.ahead_s for process in fold.processes])
        times = (arrived + ahead_s, np.where(began > 0.0, began + ahead_s, 0.0), deadlines + ahead_s)
        fold.then(self._begin, rows, is_new, numbers, states, times, told)
        fold.then(self._connect, rows, is_new, parents, told.places("dep_counts"), deps)

    def _jobs_of(self, fold: Fold, told: Told) -> Ints:
        slots = told.places("jobs")
        has_job = slots != NO_JOB
        jobs = np.full(len(slots), -1, np.int32)
        if has_job.any():
            owners = np.repeat(np.arange(len(told.counts)), told.counts)
            counts = np.bincount(owners[has_job], minlength=len(told.counts))
            _, jobs[has_job] = fold.looked_up("jobs", counts, slots[has_job])
        return jobs

    def _place(self, fold: Fold, slots: Longs, ids: Words, numbers: tuple[Ints, Ints, Ints]) -> tuple[Ints, Mask]:
        """The rows of futures that were known before everything is told anew, and which of the futures were not."""
        rows = np.full(len(slots), -1, np.int32)
        former = fold.processes[0].former
        if former is None:
            return rows, rows < 0
        futures, (kinds, sessions, jobs) = self.futures, numbers
        inside = np.flatnonzero(slots < len(former))
        old = former[slots[inside]]
        same = (old >= 0) & (futures.high[old] == ids[inside, 0]) & (futures.low[old] == ids[inside, 1])
        same &= (futures.kind[old] == kinds[inside]) & (futures.session[old] == sessions[inside])
        same &= futures.job[old] == jobs[inside]
        rows[inside[same]] = old[same]
        former[slots[inside[same]]] = -1
        fold.undo.callback(former.__setitem__, slots[inside[same]], old[same])
        return rows, rows < 0

    def _begin(
        self,
        rows: Ints,
        is_new: Mask,
        numbers: tuple[Ints, Ints, Ints],
        states: Bytes,
        times: tuple[Floats, Floats, Floats],
        told: Told,
    ) -> None:
        futures, added = self.futures, rows[is_new]
        kinds, sessions, jobs = (column[is_new] for column in numbers)
        futures.kind[added], futures.session[added], futures.job[added] = kinds, sessions, jobs
        self._came.append(sessions)
        self.sessions.use(sessions)
        self.jobs.use(jobs[jobs >= 0])
        futures.state[rows] = states
        futures.arrived[rows], futures.began[rows], futures.deadline[rows] = times
        futures.since[rows] = np.where(times[1] > 0.0, times[1], times[0])
        futures.priority[rows] = told.columns["priorities"]
        futures.budget[rows] = told.columns["budgets"]

    def _connect(self, rows: Ints, is_new: Mask, parents: Words, dep_counts: Longs, deps: Words) -> None:
        futures, added = self.futures, rows[is_new]
        futures.parent_high[added], futures.parent_low[added] = parents[is_new, 0], parents[is_new, 1]
        if len(deps):
            wanted = np.repeat(is_new, dep_counts)
            waiters = np.repeat(rows, dep_counts)[wanted]
            self._edges.add(waiters, futures.birth[waiters], deps[wanted, 0], deps[wanted, 1])

    def _take_held(self, fold: Fold) -> None:
        for table, act in (("held", self._hold), ("let_go", self._let_go)):
            told = fold.batch.told(table, HELD)
            if told is None:
                continue
            _, kinds = fold.looked_up("kinds", told.counts, told.places("kinds"))
            _, sessions = fold.looked_up("sessions", told.counts, told.places("sessions"))
            keys = list(zip(self.kind_agent[kinds].tolist(), sessions.tolist(), strict=True))
            for number, rows in told.runs():
                fold.then(act, fold.processes[number], keys[rows])

    def _hold(self, process: Process, keys: list[tuple[int, int]]) -> None:
        newly = set(keys) - process.held
        process.held |= newly
        self.sessions.use(rows_of(session for _, session in newly))
        self._held.update(dict.fromkeys(keys, process.name))

    def _let_go(self, process: Process, keys: list[tuple[int, int]]) -> None:
        gone = set(keys) & process.held
        process.held -= gone
        self.sessions.close(rows_of(session for _, session in gone))
        for key in keys:
            if self._held.get(key) == process.name:
                del self._held[key]
                self._held.update((key, other.name) for other in self._processes.values() if key in other.held)

    def _take_ended(self, fold: Fold) -> None:
        told = fold.batch.told("ended", ENDED)
        if told is not None:
            rows = fold.leave("futures", told.counts, told.places("slots"))
            fold.then(self._remove, rows)
        for what, names in (("sessions", self.sessions), ("jobs", self.jobs)):
            told = fold.batch.slots(f"{what}_closed")
            if told is not None:
                numbers = fold.leave(what, told.counts, told.places("slots"))
                fold.then(names.close, numbers)

    def _remove(self, rows: Ints) -> None:
        sessions, jobs = self.futures.session[rows], self.futures.job[rows]
        self.futures.remove(rows)
        self._went.append(sessions)
        self.sessions.close(sessions)
        self.jobs.close(jobs[jobs >= 0])

    def _take_counts(self, fold: Fold) -> None:
        """What has been counted."""
        told = fold.batch.told("tallies", TALLIES)
        if told is not None:
            places, kinds = fold.looked_up("kinds", told.counts, told.places("kinds"))
            refuse(not are_distinct(self._slots.kinds["counted"], places), "a kind that is counted twice")
            sums = tuple(told.times(name) for name in ("ended", "waited_s", "ran_s"))
            refuse(not all(np.isfinite(each).all() for each in sums), "sums that are none")
            fold.then(self._count, places, kinds, *sums)
        told = fold.batch.told("buckets", BUCKETS)
        if told is not None:
            places, kinds = fold.looked_up("kinds", told.counts, told.places("kinds"))
            refuse((told.columns["is_work"] > np.uint8(1)).any(), "a bucket of nothing")
            codes = told.places("is_work") << 8 | told.places("buckets")
            fold.then(self._count_times, places, kinds, codes, told.places("counts"))
        self._take_spent(fold)

    def _count(self, places: Longs, kinds: Ints, ended: Floats, waited_s: Floats, ran_s: Floats) -> None:
        """Mean times that follow what has come lately."""
        slots, size = self._slots.kinds, len(self.kinds)
        more = ended - slots["ended"][places]
        counts = more > 0
        waited, ran = (now - slots[name][places] for name, now in (("waited_s", waited_s), ("ran_s", ran_s)))
        for name, now in (("ended", ended), ("waited_s", waited_s), ("ran_s", ran_s)):
            slots[name][places] = now
        kinds = kinds[counts]
        further = np.bincount(kinds, weights=more[counts], minlength=size)
        before = self._counted
        seen = further > 0
        total = (before + further)[seen]
        for means, lately in ((self.service_s, ran), (self.wait_s, waited)):
            added = np.bincount(kinds, weights=np.maximum(lately[counts], 0.0), minlength=size)
            means[seen] = (means * before + added)[seen] / total
        self._counted[seen] = np.minimum(total, _MEMORY)

    def _count_times(self, places: Longs, kinds: Ints, codes: Longs, counts: Longs) -> None:
        """How many calls took how long; what was long ago weighs less."""
        told = self._slots.kinds["buckets"]
        more = counts - told[places, codes].astype(np.int64)
        told[places, codes] = counts
        np.add.at(self._histogram, (kinds, codes), np.maximum(more, 0))
        seen = np.unique(kinds)
        full = seen[self._histogram[seen].sum(axis=1) > 40 * _MEMORY]
        self._histogram[full] //= 2

    def _take_spent(self, fold: Fold) -> None:
        for process, report in zip(fold.processes, fold.batch.reports, strict=True):
            if report.spent.columns:
                columns = zip(SPENT.values(), report.spent.columns, strict=False)
                numbers, amounts = (np.frombuffer(data, kind).tolist() for kind, data in columns)
                spent = dict(zip(numbers, amounts, strict=True))
                process.accounts.check(report.accounts, spent)
                fold.then(self.spending.take, process.accounts, report.accounts, report.accounts_from, spent)

    def _take_facts(self, process: Process, report: Report) -> None:
        process.is_draining = report.draining
        if report.serves is not None:
            process.serves = report.serves
            for actor in report.serves:
                self._agents.take(actor)
        if report.able is not None:
            process.able = report.able
        if report.queues is not None:
            process.queues = report.queues
        if report.resources is not None:
            process.resources = report.resources
        if report.engines is not None:
            process.engines = report.engines

    # Processes that are gone, or of which something is missing.

    def forget(self, name: str) -> None:
        """A process is gone, and with it all that it has reported; idempotent."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        if process.accounts:
            self._take_silent(name)
            self._silent_accounts[name] = process.address.incarnation, process.accounts
            self._silent_count += len(process.accounts)
            while self._silent_count > _MOST_SILENT and len(self._silent_accounts) > 1:
                self._take_silent(next(iter(self._silent_accounts)))
        slots = self._slots
        self._places[process.place] = None
        rows: Ints = slots.futures.of(process.rows, "number")
        self._remove(rows[rows >= 0])
        self._forget_states(process)
        sessions, jobs = self._used(process)
        self.sessions.close(sessions)
        self.jobs.close(jobs)
        for table, stretch in (
            (slots.futures, process.rows),
            (slots.kinds, process.kinds),
            (slots.sessions, process.sessions),
            (slots.jobs, process.jobs),
        ):
            table.remove(stretch)

    def _take_silent(self, name: str) -> tuple[int, Accounts]:
        """The incarnation of a process that is gone, or silent, and what it has told to have spent; -1 if nothing is known."""
        found = self._silent_accounts.pop(name, None) or (-1, Accounts())
        self._silent_count -= len(found[1])
        return found

    def _forget_states(self, process: Process) -> None:
        self._let_go(process, list(process.held))

    def sessions_of(self, worker: str) -> tuple[int, int, Ints]:
        """The incarnation of a process, its last report, and the numbers of its sessions by their slots there, -1 for none."""
        process = self._processes[worker]
        return process.incarnation, process.number, self._slots.sessions.of(process.sessions, "number")

    def stale(self) -> list[Address]:
        """Processes of which reports are missing: everything has to be told anew."""
        return [process.address for process in self._processes.values() if process.is_stale]

    def silent(self, since_s: float) -> list[Address]:
        """Processes of which nothing that was admitted has been heard since then."""
        return [process.address for process in self._processes.values() if process.heard_at < since_s]


def _as_malformed(error: Exception) -> MalformedReportError:
    return MalformedReportError(f"{type(error).__name__}: {error}")
