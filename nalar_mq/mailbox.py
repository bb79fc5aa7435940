"""The ordered pending calls of one replica. Pure: no I/O and no clock; the time is an argument.

A call is queued, then taken and running; while it waits for others it gives up its slot and later takes it back; then it is
finished. A queued call can be removed.

    put ──> queued ──take──> running ──finish──> gone
               │              │    ^
             remove          wait resume
               v              v    │
              gone           waiting ──finish──> gone

Which call is next:

* At most `concurrency` calls run. A waiting call does not count. One that resumes goes on at once, before any queued one, even
  if that makes one too many for a while: it holds its session and others may wait for it.
* With `per_session`, a session runs one call at a time and stays its own while that call waits. Calls of one sender to one
  session run in the order of their numbers; between senders the one that came first is first. A call that waits for its
  arguments holds back only later calls of its own sender in its session. Calls numbered 0 have no order.
* Without it, every call stands for itself.
* Between sessions (or calls) priority decides, with aging: `aging_s` seconds of waiting weigh as much as one level. A session
  ranks as its best call. Since all age alike, the rank `arrival - priority * aging_s` never changes while a call waits.
* A session that is frozen, since it moves to another worker, begins no call; those that run go on.
* A re-entrant call (its own ancestor holds the session) runs at once, beside its ancestor and outside all limits.
* Where the calls of a session, a tenant or a job are limited (`limits`), one whose turn comes while there is no room is held
  back, and others pass it; when there is room, the best of those that are held back competes again.

Numbers: a session remembers per sender which of the last numbers it had, so that a duplicate is told from a latecomer, which
goes before the higher numbers still queued. With `hold_gaps` a number that has not come holds the higher ones back until it
comes or is skipped; every sender must then skip each number it gives up.

Costs: put, take, finish and remove are O(log n) amortised; a change of a session's priority costs one look at each of its
queued calls, and O(log n) for each where they are out of order or stand for themselves, and then the first such change one look
at every queued call; a change of one call's priority costs O(log n).
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from nalar_mq.limits import Group, Limits

DEFAULT_AGING_S = 5.0
_REMEMBERED_NUMBERS = 256
_ALL_NUMBERS = (1 << _REMEMBERED_NUMBERS) - 1
_REMEMBERED_SESSIONS = 100_000
_SLACK = 64
_FEW = 64  # so many entries are moved within a list faster than a block of a deque is made, and take a tenth of its memory


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    WAITING = enum.auto()
    GONE = enum.auto()


# Found faster than the members of the class.
_QUEUED: Final = _State.QUEUED
_RUNNING: Final = _State.RUNNING
_WAITING: Final = _State.WAITING
_GONE: Final = _State.GONE


class _Entry(msgspec.Struct, eq=False, gc=False):
    """One call. It refers to nothing that could refer to it, so the garbage collector need not look at it.

    Attributes:
        is_moved: its rank has changed since it was queued.
        is_held: its turn came while one of its groups had no room.
        groups: limited groups that it counts in while it runs.
    """

    key: bytes
    session: str
    sender: str
    number: int
    priority: int
    arrived_s: float
    rank: float
    serial: int
    batch: str
    is_ready: bool
    is_reentrant: bool
    has_slot: bool = False
    is_moved: bool = False
    state: _State = _QUEUED
    tenant: str = ""
    job: str = ""
    is_held: bool = False
    groups: tuple[Group, ...] = ()


_Ranked = tuple[float, int, _Entry]
_Plain = list[_Entry] | deque[_Entry]
_Admits = Callable[[_Entry], bool]
"""False for an entry that may not run now; it is held back then."""


class _Sorted:
    """Ranked entries, the least first. Most come in order: those cost no more than in a plain queue, the others in a heap."""

    __slots__ = ("_late", "_timely")

    def __init__(self) -> None:
        self._timely: deque[_Ranked] = deque()
        self._late: list[_Ranked] = []

    def __len__(self) -> int:
        return len(self._timely) + len(self._late)

    def __iter__(self) -> Iterator[_Ranked]:
        yield from self._timely
        yield from self._late

    def push(self, item: _Ranked) -> None:
        timely = self._timely
        if not timely or timely[-1] < item:
            timely.append(item)
        else:
            heapq.heappush(self._late, item)

    def first(self) -> _Ranked | None:
        timely, late = self._timely, self._late
        if late and (not timely or late[0] < timely[0]):
            return late[0]
        return timely[0] if timely else None

    def pop(self) -> None:
        """Drops the first one; there must be one."""
        timely, late = self._timely, self._late
        if late and (not timely or late[0] < timely[0]):
            heapq.heappop(late)
        else:
            timely.popleft()

    def compact(self) -> None:
        """Drops those that mean nothing any more."""
        self._timely = deque(item for item in self._timely if _is_current(item))
        self._late = [item for item in self._late if _is_current(item)]
        heapq.heapify(self._late)


class _ByRank:
    """Entries by rank, the least first. Those that come in order stand in a plain queue, with no tuple for each of them;
    the others, and those whose rank changes later, in a heap.
    """

    __slots__ = ("_late", "_timely")

    def __init__(self) -> None:
        self._timely: deque[_Entry] = deque()
        self._late: list[_Ranked] = []

    def push(self, entry: _Entry, wanted: int) -> None:
        """Adds an entry, or notes its changed rank; `wanted` entries of those in it still count."""
        timely = self._timely
        while timely and timely[-1].is_moved:
            timely.pop()
        last = timely[-1] if timely else entry
        if entry.is_moved or last.rank > entry.rank or (last.rank == entry.rank and last.serial > entry.serial):
            heapq.heappush(self._late, (entry.rank, entry.serial, entry))
        else:
            timely.append(entry)
        if len(timely) + len(self._late) > 2 * wanted + _SLACK:
            self._timely = deque(entry for entry in timely if entry.is_ready and not entry.is_moved and entry.state is _QUEUED)
            self._late = [item for item in self._late if item[2].is_ready and _is_current(item)]
            heapq.heapify(self._late)

    def pop(self) -> _Entry | None:
        """Takes the first queued entry; one that is held back comes again when it is not any more."""
        timely, late = self._timely, self._late
        while late and not (late[0][2].is_ready and _is_current(late[0])):
            heapq.heappop(late)
        while timely and (timely[0].state is not _QUEUED or timely[0].is_moved or not timely[0].is_ready):
            timely.popleft()
        if late and (not timely or late[0][:2] < (timely[0].rank, timely[0].serial)):
            return heapq.heappop(late)[2]
        return timely.popleft() if timely else None


class _Numbers:
    """Which numbers of one sender a session has had: the highest, and a bit for each of those shortly below it."""

    __slots__ = ("_bits", "highest")

    def __init__(self) -> None:
        self.highest = 0
        self._bits = _ALL_NUMBERS  # there are none below 1

    def add(self, number: int) -> bool:
        """Notes a number; False if it was there already."""
        ahead = number - self.highest
        if ahead == 1 and self._bits == _ALL_NUMBERS:  # the next one of an unbroken row, as most are
            self.highest = number
            return True
        if ahead > 0:
            kept = self._bits << ahead if ahead < _REMEMBERED_NUMBERS else 0
            self._bits = (kept | 1) & _ALL_NUMBERS
            self.highest = number
            return True
        bit = 1 << -ahead if -ahead < _REMEMBERED_NUMBERS else 0
        if self._bits & bit:
            return False
        self._bits |= bit
        return True


class _Line:
    """Queued calls of one sender to one session, by number; `candidate` is the last one that was offered to run."""

    __slots__ = ("_entries", "_skipped", "candidate", "expected")

    def __init__(self) -> None:
        self.expected = 0
        self.candidate: _Entry | None = None
        self._entries = _Sorted()
        self._skipped: set[int] = set()

    def add(self, entry: _Entry) -> None:
        if not self.expected:
            self.expected = entry.number
        self._entries.push((entry.number, entry.serial, entry))

    def head(self) -> _Entry | None:
        """The queued call with the lowest number."""
        entries = self._entries
        while (first := entries.first()) is not None:
            if first[2].state is _QUEUED:
                return first[2]
            entries.pop()
        return None

    def pass_by(self, number: int) -> None:
        """`number` holds nobody back any more."""
        if number >= self.expected:
            self._skipped.add(number)
        while self.expected in self._skipped:
            self._skipped.discard(self.expected)
            self.expected += 1


class _Tangle:
    """The queued calls of a session that came out of order, wait for arguments, or differ in priority."""

    __slots__ = ("_heads", "_hold_gaps", "_lines", "_ranks")

    def __init__(self, hold_gaps: bool) -> None:
        self._hold_gaps = hold_gaps
        self._lines: dict[str, _Line] = {}
        self._heads: list[tuple[int, _Entry]] = []
        self._ranks = _Sorted()

    def _line(self, sender: str) -> _Line:
        found = self._lines.get(sender)
        if found is None:
            found = self._lines[sender] = _Line()
        return found

    def add(self, entry: _Entry, queued: int) -> None:
        if entry.number:
            self._line(entry.sender).add(entry)
        self.rank(entry, queued)
        self.offer_head(entry)

    def entries(self) -> Iterable[_Entry]:
        """All calls in it, and some that have left."""
        return {id(entry): entry for _, _, entry in self._ranks}.values()

    def rank(self, entry: _Entry, queued: int) -> None:
        """Notes the entry's rank, which may have changed; `queued` calls count."""
        self._ranks.push((entry.rank, entry.serial, entry))
        if len(self._ranks) > 2 * queued + _SLACK:
            self._ranks.compact()

    def offer_head(self, entry: _Entry) -> None:
        """Makes the call that `entry` may have uncovered, or is, a candidate."""
        if entry.number:
            self._offer_line(self._lines[entry.sender])
        elif entry.state is _QUEUED and entry.is_ready:
            heapq.heappush(self._heads, (entry.serial, entry))

    def skip(self, sender: str, number: int) -> None:
        line = self._line(sender)
        if self._hold_gaps:
            line.pass_by(number)
        self._offer_line(line)

    def next(self) -> _Entry | None:
        heads = self._heads
        while heads and not self._may_run(heads[0][1]):
            passed = heapq.heappop(heads)[1]
            line = self._lines[passed.sender] if passed.number else None
            if line is not None and line.candidate is passed:
                line.candidate = None  # it is offered again once the lower number that has come is gone
        return heads[0][1] if heads else None

    def best(self) -> tuple[float, int]:
        """Rank of the best queued call, with its serial. There must be one."""
        ranks = self._ranks
        while (first := ranks.first()) is not None:
            if _is_current(first):
                return first[:2]
            ranks.pop()
        raise LookupError("a session without queued calls has no best one")

    def _offer_line(self, line: _Line) -> None:
        head = line.head()
        if head is None or head is line.candidate or not head.is_ready:
            return
        if not self._hold_gaps or head.number <= line.expected:
            line.candidate = head
            heapq.heappush(self._heads, (head.serial, head))

    def _may_run(self, entry: _Entry) -> bool:
        if entry.state is not _QUEUED or not entry.is_ready:
            return False
        if not entry.number:
            return True
        line = self._lines[entry.sender]
        return line.head() is entry and (not self._hold_gaps or entry.number <= line.expected)


class _Lane:
    """One session: the numbers it has had, its queued calls, its running call, and its place among the sessions.

    While the calls that are queued came in order and ready, none better than one before it, the first is both the next to
    run and the best: a plain queue holds them. A call that is otherwise makes a `_Tangle` of them, until all have left.
    Where numbers hold back higher ones it is always a tangle, which remembers them.
    """

    __slots__ = (
        *("_highest_rank", "_other_numbers", "_plain", "_tangle", "_tidy_at", "busy", "first_numbers", "first_sender"),
        *("hold_gaps", "is_frozen", "is_held", "offered", "queued"),
    )

    def __init__(self, hold_gaps: bool) -> None:
        self.hold_gaps = hold_gaps
        self.busy: _Entry | None = None
        self.is_frozen = False
        self.is_held = False
        self.offered: tuple[float, int] | None = None
        self.queued = 0
        # Most sessions have one sender: a dictionary for it would take more than all else that is here.
        self.first_sender: str | None = None
        self.first_numbers = _Numbers()
        self._other_numbers: dict[str, _Numbers] | None = None
        self._plain: _Plain | None = None
        self._tidy_at = _FEW
        self._highest_rank = -math.inf  # of what is plain; looking for it in the last entry would cost a few cache misses
        self._tangle: _Tangle | None = _Tangle(hold_gaps) if hold_gaps else None

    def note(self, sender: str, number: int) -> bool:
        """Notes that the sender's `number` has come; False if it had before."""
        return self.numbers_of(sender).add(number)

    def numbers_of(self, sender: str) -> _Numbers:
        """Those that a sender has used here."""
        if sender == self.first_sender:
            return self.first_numbers
        if self.first_sender is None:
            self.first_sender = sender
            return self.first_numbers
        others = self._other_numbers
        if others is None:
            others = self._other_numbers = {}
        found = others.get(sender)
        if found is None:
            found = others[sender] = _Numbers()
        return found

    def add(self, entry: _Entry, *, is_latest: bool) -> bool:
        """Queues a call, the latest of its sender or not; False if the call to run next and the best one are what they were."""
        self.queued += 1
        if self._tangle is not None:
            self._tangle.add(entry, self.queued)
            return True
        plain, rank = self._plain, entry.rank
        if is_latest and entry.is_ready and (not plain or self._highest_rank <= rank):
            if plain is None:
                self._plain = [entry]
                self._tidy_at = _FEW
            else:
                plain.append(entry)
                if len(plain) > self._tidy_at:
                    self._tidy(plain)
            self._highest_rank = rank
            return self.queued == 1
        self._tangled().add(entry, self.queued)
        return True

    def _tidy(self, plain: _Plain) -> None:
        """Drops those that have been removed, and looks again when they may be half of it; many are in a deque."""
        if isinstance(plain, list) or len(plain) > 2 * self.queued + _SLACK:
            self._plain = deque(entry for entry in plain if entry.state is _QUEUED)
        self._tidy_at = 2 * self.queued + _SLACK

    def _tangled(self) -> _Tangle:
        """Its queued calls as a tangle."""
        tangle = self._tangle
        if tangle is None:
            tangle = self._tangle = _Tangle(self.hold_gaps)
            for entry in self._plain or ():
                if entry.state is _QUEUED:
                    tangle.add(entry, self.queued)
            self._plain = None
        return tangle

    def leave(self, entry: _Entry) -> None:
        """`entry` is no longer queued."""
        self.queued -= 1
        if self._tangle is not None and entry.number:
            self._tangle.skip(entry.sender, entry.number)
        if not self.queued:
            self._plain = None
            if not self.hold_gaps:
                self._tangle = None

    def rank(self, entry: _Entry) -> None:
        """Notes that the entry's rank has changed."""
        self._tangled().rank(entry, self.queued)

    def rank_all(self, entries: list[_Entry]) -> None:
        """Notes that the ranks of all its queued calls have changed; they may still be in order."""
        if self._tangle is not None:
            for entry in entries:
                self._tangle.rank(entry, self.queued)
            return
        last = -math.inf
        for entry in entries:
            if entry.rank < last:
                self._tangled()
                return
            last = entry.rank
        self._highest_rank = last

    def entries(self) -> list[_Entry]:
        """Its queued calls."""
        held = self._tangle.entries() if self._tangle is not None else self._plain or ()
        return [entry for entry in held if entry.state is _QUEUED]

    def mark_ready(self, entry: _Entry) -> None:
        self._tangled().offer_head(entry)

    def skip(self, sender: str, number: int) -> None:
        self.note(sender, number)
        if self._tangle is not None:
            self._tangle.skip(sender, number)

    def first(self) -> _Entry | None:
        """The call that `take` would give."""
        if self._tangle is not None:
            return self._tangle.next()
        return next((entry for entry in self._plain or () if entry.state is _QUEUED), None)

    def take(self) -> _Entry | None:
        """The call to run now that the session's turn has come; it is no longer queued."""
        if self._tangle is not None:
            entry = self._tangle.next()
            if entry is not None:
                entry.state = _RUNNING
                self.leave(entry)
            return entry
        plain = self._plain
        while plain:
            entry = plain[0]
            del plain[0]
            if entry.state is _QUEUED:
                entry.state = _RUNNING
                self.queued -= 1
                if not self.queued:
                    self._plain = None
                return entry
        return None

    def offer(self) -> tuple[float, int] | None:
        """Rank of the best queued call, with its serial; None if none may run."""
        if self._tangle is not None:
            return None if self._tangle.next() is None else self._tangle.best()
        plain = self._plain
        while plain:
            first = plain[0]
            if first.state is _QUEUED:
                return first.rank, first.serial
            del plain[0]
        return None


def _is_current(item: _Ranked) -> bool:
    rank, _, entry = item
    return entry.state is _QUEUED and entry.rank == rank


class _BySession:
    """Queued calls of which one at a time runs in each session.

    Attributes:
        ready: sessions that could run a call, with those that no longer can; nothing, if `pop` would give nothing.
    """

    def __init__(self, hold_gaps: bool) -> None:
        self._hold_gaps = hold_gaps
        self._lanes: dict[str, _Lane] = {}
        self._instances: dict[str, set[str]] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self.ready: list[tuple[float, int, _Lane]] = []

    def note(self, session: str, sender: str, number: int) -> bool:
        """Notes that `number` has come; False if it had before."""
        return self._lane(session).note(sender, number)

    def add(self, entry: _Entry) -> bool:
        """Queues a call; False if its number had come before."""
        session, number = entry.session, entry.number
        lane = self._lanes.get(session) or self._lane(session)
        is_latest = True
        if number:
            numbers = lane.first_numbers if entry.sender == lane.first_sender else lane.numbers_of(entry.sender)
            if not numbers.add(number):
                return False
            is_latest = numbers.highest == number
        if not lane.queued:
            self._idle.pop(session, None)
        if lane.add(entry, is_latest=is_latest) and lane.busy is None:
            lane.is_held = False  # another call may be its first one now
            self._offer(lane)
        return True

    def mark_ready(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        lane.mark_ready(entry)
        lane.is_held = False
        self._offer(lane)

    def unhold(self, entry: _Entry) -> None:
        """`entry`, which was held back, competes again."""
        lane = self._lanes[entry.session]
        lane.is_held = False
        self._offer(lane)

    def pop(self, admits: _Admits | None) -> _Entry | None:
        while self.ready:
            rank, serial, lane = heapq.heappop(self.ready)
            if lane.offered != (rank, serial):
                continue
            lane.offered = None
            if admits is not None and (first := lane.first()) is not None and not admits(first):
                lane.is_held = True
                continue
            lane.busy = lane.take()
            if lane.busy is not None:
                return lane.busy
        return None

    def pop_of(self, batch: str, admits: _Admits | None) -> _Entry | None:
        return None

    def leave(self, entry: _Entry) -> None:
        """`entry` is no longer queued."""
        lane = self._lanes[entry.session]
        lane.leave(entry)
        lane.is_held = False
        self._offer(lane)
        self._rest(entry.session, lane)

    def finish(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        if lane.busy is entry:
            lane.busy = None
            if lane.queued:
                self._offer(lane)
            else:
                self._rest(entry.session, lane)

    def rank(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        lane.rank(entry)
        self._offer(lane)

    def queued(self, session: str) -> list[_Entry]:
        """The queued calls of a session, or of one instance within it."""
        lane = self._lanes.get(session)
        return lane.entries() if lane is not None and lane.queued else []

    def parts(self, session: str) -> list[str]:
        """A session and the instances within it, as far as there are any."""
        here = [session] if session in self._lanes else []
        return [*here, *self._instances.get(session, ())]

    def rank_session(self, session: str, entries: list[_Entry]) -> None:
        """The ranks of all queued calls of a session, or of one instance within it, have changed."""
        lane = self._lanes[session]
        lane.rank_all(entries)
        self._offer(lane)

    def skip(self, session: str, sender: str, number: int) -> None:
        lane = self._lane(session)
        lane.skip(sender, number)
        self._offer(lane)

    def freeze(self, session: str, is_frozen: bool) -> None:
        lane = self._lane(session)
        lane.is_frozen = is_frozen
        self._idle.pop(session, None)
        self._offer(lane)
        self._rest(session, lane)

    def forget(self, session: str) -> None:
        if session in self._idle:
            del self._idle[session]
            self._drop(session)

    def _lane(self, session: str) -> _Lane:
        lane = self._lanes.get(session)
        if lane is None:
            lane = self._lanes[session] = _Lane(self._hold_gaps)
            if (whole := _whole(session)) != session:
                self._instances.setdefault(whole, set()).add(session)
            self._rest(session, lane)
        return lane

    def _drop(self, session: str) -> None:
        del self._lanes[session]
        if (whole := _whole(session)) != session:
            instances = self._instances[whole]
            instances.discard(session)
            if not instances:
                del self._instances[whole]

    def _offer(self, lane: _Lane) -> None:
        """Gives the session its present place among those that could run a call."""
        best = lane.offer() if lane.busy is None and not lane.is_frozen and not lane.is_held else None
        if best == lane.offered:
            return
        lane.offered = best
        if best is not None:
            heapq.heappush(self.ready, (*best, lane))
            if len(self.ready) > 2 * len(self._lanes) + _SLACK:
                self.ready = [(*other.offered, other) for other in self._lanes.values() if other.offered is not None]
                heapq.heapify(self.ready)

    def _rest(self, session: str, lane: _Lane) -> None:
        """Keeps the numbers of a session without calls for a while; of many such sessions the oldest go."""
        if lane.queued == 0 and lane.busy is None and not lane.is_frozen:
            self._idle[session] = None
            if len(self._idle) > _REMEMBERED_SESSIONS:
                self._drop(self._idle.popitem(last=False)[0])


class _ByCall:
    """Queued calls that have nothing to do with each other.

    Attributes:
        ready: how many calls `pop` may give.
    """

    def __init__(self) -> None:
        self._all = _ByRank()
        self._batches: dict[str, _ByRank] = {}
        self.ready = 0

    def note(self, session: str, sender: str, number: int) -> bool:
        return True

    def add(self, entry: _Entry) -> bool:
        if entry.is_ready:
            self.mark_ready(entry)
        return True

    def mark_ready(self, entry: _Entry) -> None:
        self.ready += 1
        self._push(entry)

    def unhold(self, entry: _Entry) -> None:
        """`entry`, which was held back, competes again."""
        entry.is_ready = True
        self.mark_ready(entry)

    def pop(self, admits: _Admits | None) -> _Entry | None:
        return self._pop(self._all, admits)

    def pop_of(self, batch: str, admits: _Admits | None) -> _Entry | None:
        found = self._batches.get(batch)
        return None if found is None else self._pop(found, admits)

    def _pop(self, ranked: _ByRank, admits: _Admits | None) -> _Entry | None:
        while (entry := ranked.pop()) is not None:
            self.ready -= 1
            if admits is None or admits(entry):
                entry.state = _RUNNING
                return entry
            entry.is_ready = False
        return None

    def leave(self, entry: _Entry) -> None:
        self.ready -= entry.is_ready

    def finish(self, entry: _Entry) -> None:
        pass

    def rank(self, entry: _Entry) -> None:
        if entry.is_ready:
            self._push(entry)

    def skip(self, session: str, sender: str, number: int) -> None:
        pass

    def forget(self, session: str) -> None:
        pass

    def _push(self, entry: _Entry) -> None:
        self._all.push(entry, self.ready)
        if entry.batch:
            batch = self._batches.get(entry.batch)
            if batch is None:
                batch = self._batches[entry.batch] = _ByRank()
            batch.push(entry, self.ready)


def _whole(session: str) -> str:
    """The session of which it is, or is one instance."""
    return session.partition("/")[0] if "/" in session else session


class Mailbox:
    """The pending calls of a replica, and which of them runs next.

    Call keys are opaque and unique among the calls that are not gone. Times are seconds of one clock, and do not go back. A
    session `a/b` is the instance `b` within the session `a`: it has a line of its own, and the priority and limits of `a`.

    Args:
        concurrency: calls that may run at once; one that waits does not count.
        per_session: one call of a session at a time, in the order of each sender.
        high_water: queued calls beyond which `is_full` holds; the mailbox itself refuses nothing.
        aging_s: seconds of waiting that weigh as much as one level of priority.
        hold_gaps: a missing number holds the higher ones of its sender and session back until it comes or is skipped.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        per_session: bool,
        high_water: int = 100_000,
        aging_s: float = DEFAULT_AGING_S,
        hold_gaps: bool = False,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: at least one call must be able to run")
        if aging_s <= 0:
            raise ValueError(f"aging_s is {aging_s}: without aging a low priority would wait for ever")
        self.concurrency = concurrency
        self._own_concurrency = concurrency
        self._limits: Limits | None = None
        self._admits: _Admits | None = None
        self._held: dict[Group, list[_Ranked]] = {}
        self.high_water = high_water
        self.last_wait_s = 0.0
        self._aging_s = aging_s
        self._queue: _BySession | _ByCall = _BySession(hold_gaps) if per_session else _ByCall()
        self._entries: dict[bytes, _Entry] = {}
        self._queued_of: dict[str, dict[bytes, _Entry]] | None = None
        self._priorities: dict[str, int] = {}
        self._urgent: deque[_Entry] = deque()
        self._worst: list[tuple[int, int, _Entry]] | None = None
        self._serial = 0
        self._queued = 0
        self._slots_used = 0

    def __len__(self) -> int:
        """Queued calls."""
        return self._queued

    @property
    def running(self) -> int:
        """Calls that run now, those that wait not counted, re-entrant ones neither."""
        return self._slots_used

    @property
    def is_full(self) -> bool:
        """True if more calls are queued than `high_water`."""
        return self._queued > self.high_water

    def put(
        self,
        call_key: bytes,
        *,
        session: str,
        sender: str,
        number: int = 0,
        priority: int = 0,
        now: float,
        ready: bool = True,
        reentrant: bool = False,
        batch: str = "",
        tenant: str = "",
        job: str = "",
    ) -> bool:
        """Queues a call; False, and nothing is changed, if it is a duplicate by its key or number.

        Args:
            call_key: names the call from now on.
            session: the session it belongs to.
            sender: who sent it.
            number: its place among the sender's calls to the session, from 1; 0 for none.
            priority: higher runs earlier, unless `set_priority` holds for the session.
            now: the time of its arrival.
            ready: False if it waits for arguments, until `mark_ready`.
            reentrant: an ancestor of the call holds the session.
            batch: what it may share a batch with, if not empty; without `per_session` only.
            tenant, job: on whose behalf and in which job it is made, for limits.
        """
        if call_key in self._entries:
            return False
        self._serial = serial = self._serial + 1
        effective = self._priorities.get(_whole(session), priority) if self._priorities else priority
        rank = now - effective * self._aging_s if effective else now
        entry = _Entry(call_key, session, sender, number, priority, now, rank, serial, batch, ready, reentrant)
        if not reentrant:
            if not self._queue.add(entry):
                return False
        elif number and not self._queue.note(session, sender, number):
            return False
        self._entries[call_key] = entry
        self._queued += 1
        if tenant:
            entry.tenant = tenant
        if job:
            entry.job = job
        if self._queued_of is not None:
            self._queued_of.setdefault(_whole(session), {})[call_key] = entry
        if not reentrant:
            if self._worst is not None:
                self._note_worst(effective, entry)
            return True
        if number:
            self._queue.skip(session, sender, number)
        if ready:
            self._urgent.append(entry)
        return True

    def mark_ready(self, call_key: bytes) -> None:
        """The arguments of a queued call are there."""
        entry = self._entries.get(call_key)
        if entry is None or entry.is_ready or entry.is_held or entry.state is not _QUEUED:
            return
        entry.is_ready = True
        if entry.is_reentrant:
            self._urgent.append(entry)
        else:
            self._queue.mark_ready(entry)

    def has_next(self) -> bool:
        """False if `take` would give nothing; it may give nothing all the same."""
        return bool(self._urgent or (self._slots_used < self.concurrency and self._queue.ready))

    def take(self, now: float) -> bytes | None:
        """The call to run next, which is running from now on; None if none may."""
        entry = self._take_urgent() if self._urgent else None
        if entry is None:
            if self._slots_used >= self.concurrency:
                return None
            entry = self._queue.pop(self._admits)
            if entry is None:
                return None
            entry.has_slot = True
            self._slots_used += 1
        self.last_wait_s = now - entry.arrived_s
        if self._queued_of is None:
            self._queued -= 1
        else:
            self._unqueue(entry)
        return entry.key

    def take_batch(self, now: float, limit: int) -> list[bytes]:
        """The call to run next and up to `limit` - 1 that were put with the same `batch`, best first; they share its slot.

        The slot is that of the first call: `wait`, `resume` and `finish` of the others do not change it.
        """
        first = self.take(now)
        if first is None:
            return []
        keys = [first]
        batch = self._entries[first].batch
        while batch and len(keys) < limit and (entry := self._queue.pop_of(batch, self._admits)) is not None:
            self._unqueue(entry)
            keys.append(entry.key)
        return keys

    def wait(self, call_key: bytes) -> None:
        """A running call waits for others: its slot is free, its session stays its own."""
        entry = self._entries.get(call_key)
        if entry is not None and entry.state is _RUNNING:
            entry.state = _WAITING
            self._slots_used -= entry.has_slot
            if entry.groups:
                self._leave_groups(entry)

    def resume(self, call_key: bytes) -> None:
        """A waiting call goes on, at once."""
        entry = self._entries.get(call_key)
        if entry is not None and entry.state is _WAITING:
            entry.state = _RUNNING
            self._slots_used += entry.has_slot
            if self._limits is not None and not entry.is_reentrant:
                self._enter_groups(entry, self._limits)

    def finish(self, call_key: bytes) -> None:
        """A running or waiting call has ended; the next one of its session may run."""
        entry = self._entries.get(call_key)
        if entry is None or entry.state is _QUEUED:
            return
        if entry.has_slot and entry.state is _RUNNING:
            self._slots_used -= 1
        entry.state = _GONE
        del self._entries[call_key]
        if not entry.is_reentrant:
            self._queue.finish(entry)
        if entry.groups:
            self._leave_groups(entry)

    def remove(self, call_key: bytes) -> bool:
        """Takes a call out of the queue; False if it is not queued."""
        entry = self._entries.get(call_key)
        if entry is None or entry.state is not _QUEUED:
            return False
        entry.state = _GONE
        del self._entries[call_key]
        self._unqueue(entry)
        if not entry.is_reentrant:
            self._queue.leave(entry)
        if self._limits is not None:  # it may have been let compete, and nobody else in its place
            for group in self._limits.groups_of(_whole(entry.session), entry.tenant, entry.job):
                self._release(group, self._limits)
        return True

    def shed(self) -> bytes | None:
        """Removes the queued call that matters least, of the lowest priority the youngest, and returns its key.

        Re-entrant calls are never shed, since calls that run wait for them.
        """
        if self._worst is None:
            self._worst = [(self._priority(entry), -entry.serial, entry) for entry in self._all_queued()]
            heapq.heapify(self._worst)
        while self._worst:
            priority, _, entry = heapq.heappop(self._worst)
            if entry.state is _QUEUED and priority == self._priority(entry):
                self.remove(entry.key)
                return entry.key
        return None

    def set_priority(self, session: str, value: int | None) -> None:
        """Gives all calls of a session, queued and to come, the priority `value`; None gives them back their own."""
        if value is None:
            self._priorities.pop(session, None)
        else:
            self._priorities[session] = value
        if isinstance(self._queue, _BySession):
            for part in self._queue.parts(session):
                entries = self._queue.queued(part)
                for entry in entries:
                    self._change_rank(entry, entry.priority if value is None else value)
                if entries:
                    self._queue.rank_session(part, entries)
            return
        if self._queued_of is None:
            self._queued_of = {}
            for entry in self._entries.values():
                if entry.state is _QUEUED:
                    self._queued_of.setdefault(_whole(entry.session), {})[entry.key] = entry
        for entry in self._queued_of.get(session, {}).values():
            self._set_rank(entry)

    def limit(self, running: int | None, groups: Mapping[Group, int]) -> None:
        """Replaces all limits; what is queued already is held back by them, or is not any more, and what runs goes on.

        Args:
            running: calls that may run at once at most, if that is fewer than `concurrency`; None for no limit.
            groups: the same for the calls of a session, a tenant or a job, or of what is in several of them.
        """
        self.concurrency = self._own_concurrency if running is None else min(self._own_concurrency, running)
        if not groups and self._limits is None:
            return
        limits = self._limits = Limits(groups) if groups else None
        self._admits = self._admit if groups else None
        self._held = {}
        for entry in self._entries.values():
            entry.groups = ()
            if entry.is_held:
                entry.is_held = False
                self._queue.unhold(entry)
            elif limits is not None and entry.state is _RUNNING and not entry.is_reentrant:
                self._enter_groups(entry, limits)

    def is_held(self, call_key: bytes) -> bool:
        """True for a queued call whose turn has come and that is held back by a limit."""
        entry = self._entries.get(call_key)
        return entry is not None and entry.is_held and entry.state is _QUEUED

    def _admit(self, entry: _Entry) -> bool:
        """True if all its groups have room: it counts in them from now on. Else it is held back until they have."""
        limits = self._limits
        assert limits is not None
        groups = limits.groups_of(_whole(entry.session), entry.tenant, entry.job)
        full = limits.full_among(groups)
        if not full:
            limits.enter(groups)
            entry.groups = groups
            entry.is_held = False
            return True
        if not entry.is_held:
            entry.is_held = True
            self._note_held(entry, full)
        for group in groups:
            if group not in full:
                self._release(group, limits)  # there may be others for whom there is room
        return False

    def _enter_groups(self, entry: _Entry, limits: Limits) -> None:
        """A call that runs counts in its groups, whether they have room or not."""
        entry.groups = limits.groups_of(_whole(entry.session), entry.tenant, entry.job)
        limits.enter(entry.groups)

    def _note_held(self, entry: _Entry, groups: tuple[Group, ...]) -> None:
        for group in groups:
            heapq.heappush(self._held.setdefault(group, []), (entry.rank, entry.serial, entry))

    def _leave_groups(self, entry: _Entry) -> None:
        """The call counts no more, and others may compete in its place."""
        groups, entry.groups = entry.groups, ()
        limits = self._limits
        if limits is not None:
            limits.leave(groups)
            for group in groups:
                self._release(group, limits)

    def _release(self, group: Group, limits: Limits) -> None:
        """Lets as many of those that a group held back compete as it has room for, the best first.

        Those for which another one of their groups has no room wait for that.
        """
        held, room = self._held.get(group), limits.room_in(group)
        while held and room > 0:
            ranked = heapq.heappop(held)
            entry = ranked[2]
            if not entry.is_held or not _is_current(ranked):
                continue
            full = limits.full_among(limits.groups_of(_whole(entry.session), entry.tenant, entry.job))
            if full:
                self._note_held(entry, full)
                continue
            room -= 1
            entry.is_held = False
            self._queue.unhold(entry)

    def prioritise(self, call_key: bytes, value: int) -> bool:
        """Gives a queued call another priority; False if it is not queued. One that its session has been given prevails."""
        entry = self._entries.get(call_key)
        if entry is None or entry.state is not _QUEUED:
            return False
        entry.priority = value
        self._set_rank(entry)
        return True

    def skip(self, session: str, sender: str, number: int) -> None:
        """The sender gives up that number of the session; a call that bears it and comes later is a duplicate."""
        self._queue.skip(session, sender, number)

    def freeze(self, session: str) -> None:
        """No further call of the session begins, re-entrant ones of its running call excepted, until `thaw`."""
        if isinstance(self._queue, _BySession):
            self._queue.freeze(session, True)

    def thaw(self, session: str) -> None:
        """Calls of the session begin again."""
        if isinstance(self._queue, _BySession):
            self._queue.freeze(session, False)

    def forget_session(self, session: str) -> None:
        """Drops what is remembered of a session, or of one instance within it, that has no calls: its numbers."""
        if not self._has_queued(session):
            self._queue.forget(session)

    def _has_queued(self, session: str) -> bool:
        if isinstance(self._queue, _BySession):
            return bool(self._queue.queued(session))
        return self._queued_of is not None and _whole(session) in self._queued_of

    def _all_queued(self) -> Iterable[_Entry]:
        return (e for e in self._entries.values() if e.state is _QUEUED and not e.is_reentrant)

    def _take_urgent(self) -> _Entry | None:
        while self._urgent:
            entry = self._urgent.popleft()
            if entry.state is _QUEUED:
                entry.state = _RUNNING
                return entry
        return None

    def _unqueue(self, entry: _Entry) -> None:
        self._queued -= 1
        if self._queued_of is not None:
            session = _whole(entry.session)
            queued = self._queued_of[session]
            del queued[entry.key]
            if not queued:
                del self._queued_of[session]

    def _priority(self, entry: _Entry) -> int:
        return self._priorities.get(_whole(entry.session), entry.priority)

    def _set_rank(self, entry: _Entry) -> None:
        self._change_rank(entry, self._priority(entry))
        if not entry.is_reentrant:
            self._queue.rank(entry)

    def _change_rank(self, entry: _Entry, priority: int) -> None:
        """Gives an entry the rank of its present priority; the queue has to be told."""
        entry.rank = entry.arrived_s - priority * self._aging_s
        entry.is_moved = True
        if entry.is_held and self._limits is not None:
            self._note_held(entry, self._limits.groups_of(_whole(entry.session), entry.tenant, entry.job))
        if self._worst is not None and not entry.is_reentrant:
            self._note_worst(priority, entry)

    def _note_worst(self, priority: int, entry: _Entry) -> None:
        assert self._worst is not None
        heapq.heappush(self._worst, (priority, -entry.serial, entry))
        if len(self._worst) > 2 * self._queued + _SLACK:
            self._worst = None
