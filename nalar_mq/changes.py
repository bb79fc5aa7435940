"""Collects what happens to the futures of one process, and makes reports of it. Pure: no I/O, and time is an argument.

A future's life as it is told of (see `nalar_mq.columns`):

    begin ──▶ fresh ──reports──▶ has a slot ──change, move──▶ told anew ──end──▶ told of as ended, slot free
                └──end──▶ only counted

What costs something is done for the futures that are still there when a report is made, so that a call which is over soon
costs its process no more than its counting. The columns are made by `array`: a worker needs no numpy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from math import inf, isnan
from typing import Any, Final, TypeVar

import msgspec

from nalar_mq.columns import (
    CREATED,
    FAILED,
    FEW_SLOTS,
    LONGEST_NAME,
    MOST_ACCOUNTS,
    MOST_KINDS,
    MOST_SLOTS,
    NO_JOB,
    NOBODY,
    QUEUED,
    RUNNING,
    SCOPES,
    Account,
    Begun,
    Columns,
    EngineFigures,
    Named,
    Report,
    Serves,
    bucket_of,
    encode_report,
)
from nalar_mq.messages import WIRE_VERSION, Call

_NO_ID: Final = bytes(16)
_MOST_DEPS: Final = 1024
_ROW_BYTES: Final = 88
_MOST: Final = 0xFFFF_FFFF
_SAMPLES: Final = 200
_IS_LITTLE: Final = sys.byteorder == "little"
_OVER: Final = Call(b"", "", "", b"")
_T = TypeVar("_T")


class Tracked(msgspec.Struct, eq=False, gc=False):
    """A future of this process as `Changes` follows it. Whoever has the call keeps this beside it.

    Attributes:
        slot: -1 before it has been told of.
        since_s: when it came into its present state.
        ran_s: seconds it has run, without what it waited for others.
    """

    call: Call
    state: int
    arrived_s: float
    since_s: float
    priority: int
    tenant: str
    slot: int = -1
    began_s: float = 0.0
    ran_s: float = 0.0
    is_changed: bool = False


class _Tally:
    """Calls of one kind that have ended: in all, and the times of those since the last report, for a while the raw ones."""

    __slots__ = ("buckets", "ended", "failed", "number", "ran_s", "waited_s", "waits", "works")

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended = 0
        self.failed = 0
        self.waited_s = 0.0
        self.ran_s = 0.0
        self.waits: list[float] = []
        self.works: list[float] = []
        self.buckets: dict[int, int] = {}

    def row(self) -> tuple[int, int, int, float, float]:
        """Its row in the column of tallies; the raw times have to have been taken."""
        return self.number, self.ended & _MOST, self.failed & _MOST, self.waited_s, self.ran_s

    def take_buckets(self, *, whole: bool) -> list[tuple[int, int, int]]:
        """Times of work or of waiting, bucket and count, for each bucket that has changed, or for all of them."""
        changed = {**_counted(self.waits, 0), **_counted(self.works, 256)}
        buckets = self.buckets
        for code, count in changed.items():
            buckets[code] = buckets.get(code, 0) + count
        self.ended += len(self.waits)
        self.waited_s += sum(self.waits)
        self.ran_s += sum(self.works)
        self.waits, self.works = [], []
        return [(code >> 8, code & 255, buckets[code] & _MOST) for code in (buckets if whole else changed)]


def _counted(times_s: list[float], offset: int) -> dict[int, int]:
    """How many of the times fall into each bucket; of many every n-th is looked at, and counts for n."""
    step = len(times_s) // _SAMPLES + 1
    found: dict[int, int] = {}
    for time_s in times_s[::step]:
        code = offset + bucket_of(time_s)
        found[code] = found.get(code, 0) + step
    return found


class _Sum:
    """What has been spent for one account."""

    __slots__ = ("account", "amount", "is_named")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.amount = 0.0
        self.is_named = False


class _Interned:
    """Names with slots for as long as somebody uses them."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._uses: list[int] = []
        self._names: list[str] = []
        self._tenants: list[str] = []
        self._free: list[int] = []
        self._opened: dict[int, None] = {}
        self._closed: list[int] = []
        self._since: list[int] = []

    def name_at(self, slot: int, number: int) -> str | None:
        """The name that has a slot, if it has had it since before report `number`."""
        is_there = 0 <= slot < len(self._names) and self._uses[slot] > 0 and self._since[slot] < number
        return self._names[slot] if is_there else None

    def use(self, name: str, number: int, tenant: str = "") -> int:
        """The slot of a name, which is used once more; `number` is that of the last report."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = self._take(name, tenant)
            self._since[slot] = number
            self._opened[slot] = None
        self._uses[slot] += 1
        return slot

    def _take(self, name: str, tenant: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._names[slot], self._tenants[slot] = name, tenant
            return slot
        self._uses.append(0)
        self._since.append(0)
        self._names.append(name)
        self._tenants.append(tenant)
        return len(self._uses) - 1

    def leave(self, slot: int) -> None:
        """It is used once less."""
        self._uses[slot] -= 1
        if self._uses[slot]:
            return
        del self._slots[self._names[slot]]
        if slot in self._opened:
            del self._opened[slot]
            self._free.append(slot)
        else:
            self._closed.append(slot)

    def take_opened(self, among: Iterable[int]) -> Named:
        """The names of the slots in `among` that have to be told."""
        opened = self._opened
        slots = [slot for slot in dict.fromkeys(among) if slot in opened] if opened else []
        if not slots:
            return NOBODY
        for slot in slots:
            del opened[slot]
        names, tenants = (tuple(_clipped(texts[slot]) for slot in slots) for texts in (self._names, self._tenants))
        return Named(_column("I", slots), names, tenants if any(tenants) else ())

    def take_closed(self) -> list[int]:
        """The slots whose names have been told and are used no more; they are free from now on."""
        closed, self._closed = self._closed, []
        self._free += closed
        return closed

    def number_anew(self, slots: Iterable[int], number: int) -> dict[int, int]:
        """Other slots for all names that are used, by the former ones; from 0 on, in the order in which `slots` has them."""
        anew = {slot: place for place, slot in enumerate(dict.fromkeys(slots))}
        self._uses = [self._uses[slot] for slot in anew]
        self._names = [self._names[slot] for slot in anew]
        self._tenants = [self._tenants[slot] for slot in anew]
        self._slots = {name: slot for slot, name in enumerate(self._names)}
        self._since = [number] * len(anew)
        self._free, self._opened, self._closed = [], {}, []
        return anew

    @property
    def room(self) -> int:
        """All slots are below this."""
        return len(self._uses)

    def open_again(self, slot: int) -> None:
        """Its name has to be told anew."""
        self._opened[slot] = None


class _Row(msgspec.Struct, eq=False, gc=False):
    """A future with its numbers."""

    future: Tracked
    kind: int
    session: int
    job: int


class _Parcels:
    """The fields of several reports, each of at most about `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = limit
        self.fields: list[dict[str, Any]] = [{}]

    def add(self, size: int, **fields: Any) -> None:
        """Puts fields that belong together into one report, the last one where they fit."""
        if size > self._room or not self.fields[-1].keys().isdisjoint(fields):
            self.fields.append({})
            self._room = self._limit
        self.fields[-1].update(fields)
        self._room -= size


def _slices(rows: list[_T], size: int) -> Iterator[list[_T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _name_bytes(text: str) -> int:
    return 6 + (len(text) if text.isascii() else 4 * len(text))


class Changes:
    """Collects what happens to the futures of one process, and makes reports of it.

    `begin`, `change` and `end` are made to cost next to nothing; the work is done in `reports`, for the futures that are
    still there then.

    Args:
        name, incarnation, node: of the process.
    """

    def __init__(self, name: str, incarnation: int, node: str) -> None:
        self._name = name
        self._incarnation = incarnation
        self._node = node
        self._number = 0
        self._fresh: list[Tracked] = []
        self._changed: list[Tracked] = []
        self._moved: dict[int, int] = {}
        self._ended: list[tuple[int, int]] = []
        self._rows: list[_Row | None] = []
        self._free: list[int] = []
        self._kinds: dict[tuple[str, str], _Tally] = {}
        self._kinds_told = 0
        self._sessions = _Interned()
        self._jobs = _Interned()
        self._held: dict[tuple[str, str], int] = {}
        self._newly_held: dict[tuple[str, str], int] = {}
        self._let_go: list[tuple[int, int]] = []
        self._accounts: dict[str, dict[tuple[str, str], _Sum]] = {scope: {} for scope in SCOPES}
        self._opened_accounts = 0
        self._newly_spent: dict[int, _Sum] = {}
        self._draining = False
        self._facts: dict[str, Any] = {}
        self._new_facts: dict[str, Any] = {}

    # What happens to futures.

    def begin(self, call: Call, now: float, state: int = QUEUED, tenant: str = "") -> Tracked:
        """A call has come."""
        future = Tracked(call, state, now, now, call.priority, tenant)
        self._fresh.append(future)
        return future

    def change(self, future: Tracked, state: int, now: float) -> None:
        """It is in another state from now on."""
        if future.state == RUNNING:
            future.ran_s += now - future.since_s
        elif state == RUNNING and not future.began_s:
            future.began_s = now
        future.state = state
        future.since_s = now
        if future.slot >= 0 and not future.is_changed:
            future.is_changed = True
            self._changed.append(future)

    def move(self, future: Tracked, priority: int) -> None:
        """It has another priority from now on."""
        future.priority = priority
        if future.slot >= 0:
            self._moved[future.slot] = priority

    def end(self, future: Tracked, outcome: int, now: float) -> None:
        """It is over; of a future that was over already nothing changes."""
        if not future.state:
            return
        call = future.call
        kind = (call.actor, call.method)
        tally = self._kinds.get(kind) or self._tally(kind)
        tally.waits.append((future.began_s or now) - future.arrived_s)
        tally.works.append(future.ran_s + now - future.since_s if future.state == RUNNING else future.ran_s)
        if outcome == FAILED:
            tally.failed += 1
        future.state = 0
        if future.slot >= 0:
            self._ended.append((future.slot, outcome))
        else:
            future.call = _OVER  # it stays in `_fresh` until the next report: its arguments need not

    def spend(self, call: Call, workflow: str, amount: float, unit: str) -> None:
        """A call that is part of a workflow, or of none, has cost something."""
        names = (call.session, call.job, workflow, call.actor, call.tenant)
        for scope, name in zip(SCOPES, names, strict=True):
            if name and len(name) <= LONGEST_NAME:  # else no report with it would be used
                self._spend(scope, name, unit, amount)

    def _spend(self, scope: str, name: str, unit: str, amount: float) -> None:
        accounts = self._accounts[scope]
        found = accounts.get((name, unit))
        if found is None:
            if len(accounts) >= MOST_ACCOUNTS:  # each scope by itself: sessions come and go, tenants stay
                del accounts[next(iter(accounts))]
            found = accounts[name, unit] = _Sum(Account(self._opened_accounts, scope, _clipped(name), _clipped(unit)))
            self._opened_accounts += 1
        found.amount = min(found.amount + amount, sys.float_info.max)  # what is infinite would be refused
        self._newly_spent[found.account.number] = found

    def hold(self, agent: str, session: str, tenant: str = "") -> None:
        """The state of the session is here."""
        if (agent, session) not in self._held:
            self._held[agent, session] = self._newly_held[agent, session] = self._sessions.use(session, self._number, tenant)

    def let_go(self, agent: str, session: str) -> None:
        """It is not here any more."""
        slot = self._held.pop((agent, session), None)
        if slot is None:
            return
        if self._newly_held.pop((agent, session), None) is None:
            self._let_go.append((self._number_of((agent, "")), slot))
        self._sessions.leave(slot)

    def session_at(self, slot: int, number: int) -> str | None:
        """The session that had a slot in report `number` and still has it; None if that is not known to be so."""
        return self._sessions.name_at(slot, number)

    # What is true of the process as a whole.

    def set_draining(self) -> None:
        """It takes no new calls from now on."""
        self._draining = True

    def set_serves(self, serves: Mapping[str, Serves]) -> None:
        """What it serves from now on."""
        self._set("serves", dict(serves))

    def set_able(self, actors: Mapping[str, Serves]) -> None:
        """What it could serve, whether it does or not."""
        self._set("able", dict(actors))

    def set_resources(self, resources: Mapping[str, tuple[float, float]]) -> None:
        """Used and available amounts of now."""
        self._set("resources", dict(resources))

    def set_engines(self, engines: Mapping[str, EngineFigures]) -> None:
        """The model servers that it has asked, as they are now."""
        self._set("engines", dict(engines))

    def set_queues(self, queues: Mapping[str, tuple[int, int]]) -> None:
        """Queued and running calls of now, by actor."""
        self._set("queues", dict(queues))

    def _set(self, name: str, fact: object) -> None:
        if self._facts.get(name) != fact:
            self._facts[name] = self._new_facts[name] = fact

    # Reports.

    def reports(self, now: float, limit: int, most_begun: int = MOST_SLOTS) -> list[bytes]:
        """What has happened since the last time, in one report or more, each of at most about `limit` bytes.

        There is one even if nothing has happened: it shows that none is missing. At most `most_begun` futures are told of for
        the first time, the oldest; the others the next time, if they are still there.
        """
        parcels = _Parcels(limit)
        self._add_facts(parcels)
        self._add_begun(parcels, self._take_fresh(most_begun), limit)
        self._add_changes(parcels, limit)
        self._add_held(parcels, list(self._newly_held.items()), limit)
        self._add_ended(parcels, limit)
        self._add_counts(parcels, limit, whole=False)
        return self._encoded(now, parcels, is_whole=False)

    def whole(self, now: float, limit: int) -> list[bytes]:
        """Everything anew, in pieces of at most about `limit` bytes each."""
        self._drop_changes()
        parcels = _Parcels(limit)
        self._new_facts = dict(self._facts)
        self._kinds_told = 0
        self._add_facts(parcels)
        rows = [row for row in self._rows if row is not None]
        if max(len(self._rows), self._sessions.room, self._jobs.room) > FEW_SLOTS:
            self._number_anew(rows)
        for row in rows:
            self._sessions.open_again(row.session)
            if row.job != NO_JOB:
                self._jobs.open_again(row.job)
        for slot in self._held.values():
            self._sessions.open_again(slot)
        self._add_begun(parcels, [*rows, *self._take_fresh()], limit)
        self._add_held(parcels, list(self._held.items()), limit)
        for accounts in self._accounts.values():
            self._newly_spent |= {found.account.number: found for found in accounts.values()}
        for found in self._newly_spent.values():
            found.is_named = False
        self._add_counts(parcels, limit, whole=True)
        return self._encoded(now, parcels, is_whole=True)

    def _number_anew(self, rows: list[_Row]) -> None:
        """Gives all slots anew, in the order in which they are told of in a whole: where many were, few may be left."""
        self._rows, self._free = list(rows), []
        sessions = self._sessions.number_anew((*(row.session for row in rows), *self._held.values()), self._number)
        jobs = self._jobs.number_anew((row.job for row in rows if row.job != NO_JOB), self._number)
        self._held = {key: sessions[slot] for key, slot in self._held.items()}
        for slot, row in enumerate(rows):
            row.future.slot = slot
            row.session = sessions[row.session]
            row.job = row.job if row.job == NO_JOB else jobs[row.job]

    def _take_fresh(self, most: int = MOST_SLOTS) -> list[_Row]:
        """Rows of the futures that are to be told of for the first time."""
        fresh, self._fresh = self._fresh, []
        if len(fresh) > most:
            live = [future for future in fresh if future.state]
            fresh, self._fresh = live[:most], live[most:]
        room = MOST_SLOTS - len(self._rows) + len(self._free)
        return [self._row(future) for future in fresh[:room] if future.state]

    def _row(self, future: Tracked) -> _Row:
        call = future.call
        session = self._sessions.use(call.session, self._number, future.tenant)
        job = self._jobs.use(call.job, self._number) if call.job else NO_JOB
        row = _Row(future, self._number_of((call.actor, call.method)), session, job)
        if self._free:
            future.slot = self._free.pop()
            self._rows[future.slot] = row
        else:
            future.slot = len(self._rows)
            self._rows.append(row)
        return row

    def _drop_changes(self) -> None:
        """What has changed need not be told, since everything will be."""
        for future in self._changed:
            future.is_changed = False
        self._changed = []
        self._moved = {}
        self._free_ended()
        self._let_go = []
        self._newly_held = {}
        self._sessions.take_closed()
        self._jobs.take_closed()

    def _free_ended(self) -> list[tuple[int, int]]:
        ended, self._ended = self._ended, []
        for slot, _ in ended:
            row = self._rows[slot]
            assert row is not None
            self._rows[slot] = None
            self._free.append(slot)
            self._sessions.leave(row.session)
            if row.job != NO_JOB:
                self._jobs.leave(row.job)
        return ended

    def _add_facts(self, parcels: _Parcels) -> None:
        facts, self._new_facts = self._new_facts, {}
        parcels.add(sum(64 * len(fact) for fact in facts.values()), **facts)

    def _add_begun(self, parcels: _Parcels, rows: list[_Row], limit: int) -> None:
        chunk: list[_Row] = []
        size = 0
        for row in rows:
            call = row.future.call
            row_size = _ROW_BYTES + _name_bytes(call.session) + _name_bytes(call.job) + _name_bytes(row.future.tenant)
            if row.future.state == CREATED:
                row_size += 16 * min(len(call.deps), _MOST_DEPS)
            if chunk and size + row_size > limit:
                self._add_rows(parcels, chunk, size)
                chunk, size = [], 0
            chunk.append(row)
            size += row_size
        if chunk:
            self._add_rows(parcels, chunk, size)

    def _add_rows(self, parcels: _Parcels, rows: list[_Row], size: int) -> None:
        parcels.add(size, begun=_begun(rows), **self._take_names(rows), **self._new_kinds())

    def _take_names(self, rows: list[_Row]) -> dict[str, Any]:
        sessions = self._sessions.take_opened(row.session for row in rows)
        jobs = self._jobs.take_opened(row.job for row in rows)
        return {"sessions": sessions, "jobs": jobs}

    def _new_kinds(self) -> dict[str, Any]:
        """The kinds that have to be told before they are used."""
        before, self._kinds_told = self._kinds_told, len(self._kinds)
        return {"kinds_before": before, "kinds": tuple(self._kinds)[before:]} if len(self._kinds) > before else {}

    def _add_changes(self, parcels: _Parcels, limit: int) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            future.is_changed = False
        alive = [(future.slot, future.state, future.since_s) for future in changed if future.state]
        for part in _slices(alive, max(1, limit // 16)):
            parcels.add(13 * len(part), changed=_columns("IBd", part))
        moved, self._moved = self._moved, {}
        ended = {slot for slot, _ in self._ended}
        priorities = [(slot, _fit_priority(priority)) for slot, priority in moved.items() if slot not in ended]
        for moves in _slices(priorities, max(1, limit // 16)):
            parcels.add(8 * len(moves), moved=_columns("Ii", moves))

    def _add_held(self, parcels: _Parcels, held: list[tuple[tuple[str, str], int]], limit: int) -> None:
        self._newly_held = {}
        for part in _slices(held, max(1, limit // (2 * LONGEST_NAME))):
            rows = [(self._number_of((agent, "")), slot) for (agent, _), slot in part]
            names = {"sessions": self._sessions.take_opened(slot for _, slot in rows)}
            size = sum(12 + _name_bytes(session) for (_, session), _ in part)
            parcels.add(size, held=_columns("HI", rows), **names, **self._new_kinds())
        let_go, self._let_go = self._let_go, []
        for gone in _slices(let_go, max(1, limit // 8)):
            parcels.add(6 * len(gone), let_go=_columns("HI", gone), **self._new_kinds())

    def _add_ended(self, parcels: _Parcels, limit: int) -> None:
        """Last of all that concerns futures: a session that goes on has been used again by then."""
        for part in _slices(self._free_ended(), max(1, limit // 8)):
            parcels.add(5 * len(part), ended=_columns("IB", part))
        for name, interned in (("sessions_closed", self._sessions), ("jobs_closed", self._jobs)):
            for closed in _slices(interned.take_closed(), max(1, limit // 8)):
                parcels.add(4 * len(closed), **{name: _column("I", closed)})

    def _add_counts(self, parcels: _Parcels, limit: int, *, whole: bool) -> None:
        tallies = [tally for tally in self._kinds.values() if tally.waits or (whole and tally.ended)]
        buckets = [(tally.number, *bucket) for tally in tallies for bucket in tally.take_buckets(whole=whole)]
        for part in _slices(tallies, max(1, limit // 32)):
            parcels.add(26 * len(part), tallies=_columns("HIIdd", [tally.row() for tally in part]), **self._new_kinds())
        for counted in _slices(buckets, max(1, limit // 16)):
            parcels.add(8 * len(counted), buckets=_columns("HBBI", counted))
        self._add_spent(parcels, limit)

    def _add_spent(self, parcels: _Parcels, limit: int) -> None:
        newly, self._newly_spent = self._newly_spent, {}
        per_report = max(1, limit // (8 * LONGEST_NAME))
        # In the order of their numbers, so that those that have been dropped meanwhile can be left behind one after the other.
        rest = sorted(newly.values(), key=lambda one: one.account.number)
        firsts = {
            scope: next((one.account.number for one in accounts.values()), 0) for scope, accounts in self._accounts.items()
        }
        while rest:
            sums, rest = rest[:per_report], rest[per_report:]
            named = tuple(one.account for one in sums if not one.is_named)
            for one in sums:
                one.is_named = True
            size = 12 * len(sums) + sum(32 + sum(map(_name_bytes, account.texts)) for account in named)
            parcels.add(
                size,
                spent=_columns("Id", [(one.account.number, one.amount) for one in sums]),
                accounts=named,
                accounts_from=tuple(min(first, rest[0].account.number) if rest else first for first in firsts.values()),
            )

    def _encoded(self, now: float, parcels: _Parcels, *, is_whole: bool) -> list[bytes]:
        first = self._number + 1
        self._number += len(parcels.fields)
        pieces = len(parcels.fields) if is_whole else 0
        return [
            encode_report(
                Report(
                    version=WIRE_VERSION,
                    name=self._name,
                    incarnation=self._incarnation,
                    node=self._node,
                    number=first + place,
                    now_s=now,
                    piece=place + 1 if is_whole else 0,
                    pieces=pieces,
                    draining=self._draining,
                    **fields,
                )
            )
            for place, fields in enumerate(parcels.fields)
        ]

    def _number_of(self, kind: tuple[str, str]) -> int:
        return (self._kinds.get(kind) or self._tally(kind)).number

    def _tally(self, kind: tuple[str, str]) -> _Tally:
        """A tally for a kind that has none; when there are too many kinds, all others count as one."""
        if len(self._kinds) >= MOST_KINDS - 1:
            kind = ("", "")
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = _Tally(len(self._kinds))
        return found


def _clipped(name: str) -> str:
    """A name as it is told. Names come from outside, and one that is too long would have the whole report refused."""
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME]


def _fit_priority(priority: int) -> int:
    return max(-(1 << 31), min(priority, (1 << 31) - 1))


def _column(code: str, values: Iterable[Any]) -> bytes:
    column = array(code, values)
    if not _IS_LITTLE:
        column.byteswap()
    return column.tobytes()


def _columns(codes: str, rows: Iterable[tuple[Any, ...]]) -> Columns:
    return Columns(tuple(_column(code, values) for code, values in zip(codes, zip(*rows, strict=True), strict=True)))


def _id(id: bytes) -> bytes:
    return id if len(id) == 16 else (id + _NO_ID)[:16]


def _begun(rows: list[_Row]) -> Begun:
    futures = [row.future for row in rows]
    calls = [future.call for future in futures]
    deps = [future.call.deps[:_MOST_DEPS] if future.state == CREATED else () for future in futures]
    left = [inf if call.timeout_s is None or isnan(call.timeout_s) else call.timeout_s for call in calls]
    return Begun(
        slots=_column("I", [future.slot for future in futures]),
        ids=b"".join([_id(call.id) for call in calls]),
        parents=b"".join([_id(call.parent) for call in calls]),
        kinds=_column("H", [row.kind for row in rows]),
        sessions=_column("I", [row.session for row in rows]),
        jobs=_column("I", [row.job for row in rows]),
        priorities=_column("i", [_fit_priority(future.priority) for future in futures]),
        states=_column("B", [future.state for future in futures]),
        arrived=_column("d", [future.arrived_s for future in futures]),
        began=_column("d", [future.began_s for future in futures]),
        deadlines=_column("d", [future.arrived_s + timeout_s for future, timeout_s in zip(futures, left, strict=True)]),
        budgets=_column("f", [inf if call.budget is None else call.budget for call in calls]),
        dep_counts=_column("H", list(map(len, deps))),
        deps=b"".join([_id(id) for each in deps for id in each]),
    )
