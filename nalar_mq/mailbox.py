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
* A re-entrant call (its own ancestor holds the session) runs at once, beside its ancestor and outside all limits.

Numbers: a session remembers per sender which of the last numbers it had, so that a duplicate is told from a latecomer, which
goes before the higher numbers still queued. With `hold_gaps` a number that has not come holds the higher ones back until it
comes or is skipped; every sender must then skip each number it gives up.

Costs: put, take, finish and remove are O(log n) amortised; a change of a session's priority costs O(log n) for each of its
queued calls.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable

DEFAULT_AGING_S = 5.0
_REMEMBERED_NUMBERS = 256
_REMEMBERED_SESSIONS = 100_000
_SLACK = 64


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    WAITING = enum.auto()
    GONE = enum.auto()


class _Entry:
    """One call."""

    __slots__ = (
        "arrived_s",
        "batch",
        "has_slot",
        "is_ready",
        "is_reentrant",
        "key",
        "number",
        "priority",
        "rank",
        "sender",
        "serial",
        "session",
        "state",
    )

    def __init__(self, key: bytes, session: str, sender: str, number: int, priority: int, arrived_s: float) -> None:
        self.key = key
        self.session = session
        self.sender = sender
        self.number = number
        self.priority = priority
        self.arrived_s = arrived_s
        self.rank = 0.0
        self.serial = 0
        self.batch = ""
        self.has_slot = False
        self.is_ready = False
        self.is_reentrant = False
        self.state = _State.QUEUED


_Ranked = tuple[float, int, _Entry]


class _Sorted:
    """Ranked entries, the least first. Most come in order: those cost no more than in a plain queue, the others in a heap."""

    __slots__ = ("_late", "_timely")

    def __init__(self) -> None:
        self._timely: deque[_Ranked] = deque()
        self._late: list[_Ranked] = []

    def __len__(self) -> int:
        return len(self._timely) + len(self._late)

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


class _Numbers:
    """Which numbers of one sender a session has had: the highest, and a bit for each of those shortly below it."""

    __slots__ = ("_bits", "_highest")

    def __init__(self) -> None:
        self._highest = 0
        self._bits = 0

    def add(self, number: int) -> bool:
        """Notes a number; False if it was there already."""
        ahead = number - self._highest
        if ahead > 0:
            kept = self._bits << ahead if ahead < _REMEMBERED_NUMBERS else 0
            self._bits = (kept | 1) & ((1 << _REMEMBERED_NUMBERS) - 1)
            self._highest = number
            return True
        bit = 1 << -ahead if -ahead < _REMEMBERED_NUMBERS else 0
        if self._bits & bit:
            return False
        self._bits |= bit
        return True


class _Line:
    """Queued calls of one sender to one session, by number; `candidate` is the last one that was offered to run."""

    __slots__ = ("_entries", "_skipped", "candidate", "expected", "numbers")

    def __init__(self) -> None:
        self.numbers = _Numbers()
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
            if first[2].state is _State.QUEUED:
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


class _Lane:
    """One session: its lines, its running call, and its place among the sessions."""

    __slots__ = ("_heads", "_ranks", "busy", "hold_gaps", "lines", "offered", "queued")

    def __init__(self, hold_gaps: bool) -> None:
        self.hold_gaps = hold_gaps
        self.lines: dict[str, _Line] = {}
        self.busy: _Entry | None = None
        self.offered: tuple[float, int] | None = None
        self.queued = 0
        self._heads: list[tuple[int, _Entry]] = []
        self._ranks = _Sorted()

    def line(self, sender: str) -> _Line:
        found = self.lines.get(sender)
        if found is None:
            found = self.lines[sender] = _Line()
        return found

    def add(self, entry: _Entry) -> None:
        self.queued += 1
        if entry.number:
            self.line(entry.sender).add(entry)
        self.rank(entry)
        self.offer_head(entry)

    def rank(self, entry: _Entry) -> None:
        """Notes the entry's rank, which may have changed."""
        self._ranks.push((entry.rank, entry.serial, entry))
        if len(self._ranks) > 2 * self.queued + _SLACK:
            self._ranks.compact()

    def offer_head(self, entry: _Entry) -> None:
        """Makes the call that `entry` may have uncovered, or is, a candidate."""
        if entry.number:
            self._offer_line(self.lines[entry.sender])
        elif entry.state is _State.QUEUED and entry.is_ready:
            heapq.heappush(self._heads, (entry.serial, entry))

    def skip(self, sender: str, number: int) -> None:
        line = self.line(sender)
        if self.hold_gaps:
            line.pass_by(number)
        self._offer_line(line)

    def next(self) -> _Entry | None:
        """The call to run when the session's turn comes."""
        heads = self._heads
        while heads and not self._may_run(heads[0][1]):
            heapq.heappop(heads)
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
        if not self.hold_gaps or head.number <= line.expected:
            line.candidate = head
            heapq.heappush(self._heads, (head.serial, head))

    def _may_run(self, entry: _Entry) -> bool:
        if entry.state is not _State.QUEUED or not entry.is_ready:
            return False
        if not entry.number:
            return True
        line = self.lines[entry.sender]
        return line.head() is entry and (not self.hold_gaps or entry.number <= line.expected)


def _is_current(item: _Ranked) -> bool:
    rank, _, entry = item
    return entry.state is _State.QUEUED and entry.rank == rank


class _BySession:
    """Queued calls of which one at a time runs in each session."""

    def __init__(self, hold_gaps: bool) -> None:
        self._hold_gaps = hold_gaps
        self._lanes: dict[str, _Lane] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._heap: list[tuple[float, int, _Lane]] = []

    def note(self, session: str, sender: str, number: int) -> bool:
        """Notes that `number` has come; False if it had before."""
        return self._lane(session).line(sender).numbers.add(number)

    def add(self, entry: _Entry) -> None:
        lane = self._lane(entry.session)
        self._idle.pop(entry.session, None)
        lane.add(entry)
        self._offer(lane)

    def mark_ready(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        lane.offer_head(entry)
        self._offer(lane)

    def pop(self) -> _Entry | None:
        while self._heap:
            rank, serial, lane = heapq.heappop(self._heap)
            if lane.offered != (rank, serial):
                continue
            lane.offered = None
            entry = lane.next()
            if entry is None:
                continue
            lane.busy = entry
            entry.state = _State.RUNNING
            self.leave(entry)
            return entry
        return None

    def pop_of(self, batch: str) -> _Entry | None:
        return None

    def leave(self, entry: _Entry) -> None:
        """`entry` is no longer queued."""
        lane = self._lanes[entry.session]
        lane.queued -= 1
        if entry.number:
            lane.skip(entry.sender, entry.number)
        self._offer(lane)
        self._rest(entry.session, lane)

    def finish(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        if lane.busy is entry:
            lane.busy = None
            self._offer(lane)
            self._rest(entry.session, lane)

    def rank(self, entry: _Entry) -> None:
        lane = self._lanes[entry.session]
        lane.rank(entry)
        self._offer(lane)

    def skip(self, session: str, sender: str, number: int) -> None:
        lane = self._lane(session)
        lane.line(sender).numbers.add(number)
        lane.skip(sender, number)
        self._offer(lane)

    def forget(self, session: str) -> None:
        if session in self._idle:
            del self._idle[session]
            del self._lanes[session]

    def _lane(self, session: str) -> _Lane:
        lane = self._lanes.get(session)
        if lane is None:
            lane = self._lanes[session] = _Lane(self._hold_gaps)
            self._rest(session, lane)
        return lane

    def _offer(self, lane: _Lane) -> None:
        """Gives the session its present place among those that could run a call."""
        if lane.busy is not None or lane.next() is None:
            lane.offered = None
            return
        best = lane.best()
        if best != lane.offered:
            lane.offered = best
            heapq.heappush(self._heap, (*best, lane))
            if len(self._heap) > 2 * len(self._lanes) + _SLACK:
                self._heap = [(*other.offered, other) for other in self._lanes.values() if other.offered is not None]
                heapq.heapify(self._heap)

    def _rest(self, session: str, lane: _Lane) -> None:
        """Keeps the numbers of a session without calls for a while; of many such sessions the oldest go."""
        if lane.queued == 0 and lane.busy is None:
            self._idle[session] = None
            if len(self._idle) > _REMEMBERED_SESSIONS:
                del self._lanes[self._idle.popitem(last=False)[0]]


class _ByCall:
    """Queued calls that have nothing to do with each other."""

    def __init__(self) -> None:
        self._sorted = _Sorted()
        self._batches: dict[str, _Sorted] = {}
        self._ready = 0

    def note(self, session: str, sender: str, number: int) -> bool:
        return True

    def add(self, entry: _Entry) -> None:
        if entry.is_ready:
            self.mark_ready(entry)

    def mark_ready(self, entry: _Entry) -> None:
        self._ready += 1
        self._push(entry)

    def pop(self) -> _Entry | None:
        return self._pop(self._sorted)

    def pop_of(self, batch: str) -> _Entry | None:
        found = self._batches.get(batch)
        return None if found is None else self._pop(found)

    def _pop(self, ranked: _Sorted) -> _Entry | None:
        while (item := ranked.first()) is not None:
            ranked.pop()
            if _is_current(item):
                item[2].state = _State.RUNNING
                self.leave(item[2])
                return item[2]
        return None

    def leave(self, entry: _Entry) -> None:
        self._ready -= entry.is_ready

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
        item = (entry.rank, entry.serial, entry)
        _push_compactly(self._sorted, item, self._ready)
        if entry.batch:
            batch = self._batches.get(entry.batch)
            if batch is None:
                batch = self._batches[entry.batch] = _Sorted()
            _push_compactly(batch, item, self._ready)


def _push_compactly(ranked: _Sorted, item: _Ranked, wanted: int) -> None:
    ranked.push(item)
    if len(ranked) > 2 * wanted + _SLACK:
        ranked.compact()


class Mailbox:
    """The pending calls of a replica, and which of them runs next.

    Call keys are opaque and unique among the calls that are not gone. Times are seconds of one clock, and do not go back.

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
        self.high_water = high_water
        self.last_wait_s = 0.0
        self._aging_s = aging_s
        self._queue: _BySession | _ByCall = _BySession(hold_gaps) if per_session else _ByCall()
        self._entries: dict[bytes, _Entry] = {}
        self._queued_of: dict[str, _Entry | dict[bytes, _Entry]] = {}
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
        """
        if call_key in self._entries or (number and not self._queue.note(session, sender, number)):
            return False
        self._serial += 1
        entry = self._entries[call_key] = _Entry(call_key, session, sender, number, priority, now)
        entry.serial = self._serial
        entry.is_ready = ready
        entry.is_reentrant = reentrant
        entry.batch = batch
        self._queued += 1
        self._note_queued(entry)
        self._set_rank(entry)
        if not reentrant:
            self._queue.add(entry)
            return True
        if number:
            self._queue.skip(session, sender, number)
        if ready:
            self._urgent.append(entry)
        return True

    def mark_ready(self, call_key: bytes) -> None:
        """The arguments of a queued call are there."""
        entry = self._entries.get(call_key)
        if entry is None or entry.is_ready or entry.state is not _State.QUEUED:
            return
        entry.is_ready = True
        if entry.is_reentrant:
            self._urgent.append(entry)
        else:
            self._queue.mark_ready(entry)

    def take(self, now: float) -> bytes | None:
        """The call to run next, which is running from now on; None if none may."""
        entry = self._take_urgent()
        if entry is None:
            if self._slots_used >= self.concurrency:
                return None
            entry = self._queue.pop()
            if entry is None:
                return None
            entry.has_slot = True
            self._slots_used += 1
        self.last_wait_s = now - entry.arrived_s
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
        while batch and len(keys) < limit and (entry := self._queue.pop_of(batch)) is not None:
            self._unqueue(entry)
            keys.append(entry.key)
        return keys

    def wait(self, call_key: bytes) -> None:
        """A running call waits for others: its slot is free, its session stays its own."""
        entry = self._entries.get(call_key)
        if entry is not None and entry.state is _State.RUNNING:
            entry.state = _State.WAITING
            self._slots_used -= entry.has_slot

    def resume(self, call_key: bytes) -> None:
        """A waiting call goes on, at once."""
        entry = self._entries.get(call_key)
        if entry is not None and entry.state is _State.WAITING:
            entry.state = _State.RUNNING
            self._slots_used += entry.has_slot

    def finish(self, call_key: bytes) -> None:
        """A running or waiting call has ended; the next one of its session may run."""
        entry = self._entries.get(call_key)
        if entry is None or entry.state is _State.QUEUED:
            return
        if entry.state is _State.RUNNING:
            self._slots_used -= entry.has_slot
        entry.state = _State.GONE
        del self._entries[call_key]
        if not entry.is_reentrant:
            self._queue.finish(entry)

    def remove(self, call_key: bytes) -> bool:
        """Takes a call out of the queue; False if it is not queued."""
        entry = self._entries.get(call_key)
        if entry is None or entry.state is not _State.QUEUED:
            return False
        entry.state = _State.GONE
        del self._entries[call_key]
        self._unqueue(entry)
        if not entry.is_reentrant:
            self._queue.leave(entry)
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
            if entry.state is _State.QUEUED and priority == self._priority(entry):
                self.remove(entry.key)
                return entry.key
        return None

    def set_priority(self, session: str, value: int | None) -> None:
        """Gives all calls of a session, queued and to come, the priority `value`; None gives them back their own."""
        if value is None:
            self._priorities.pop(session, None)
        else:
            self._priorities[session] = value
        for entry in self._queued_in(session):
            self._set_rank(entry)
            if not entry.is_reentrant:
                self._queue.rank(entry)

    def skip(self, session: str, sender: str, number: int) -> None:
        """The sender gives up that number of the session; a call that bears it and comes later is a duplicate."""
        self._queue.skip(session, sender, number)

    def forget_session(self, session: str) -> None:
        """Drops what is remembered of a session that has no calls: its numbers and its priority."""
        if session not in self._queued_of:
            self._queue.forget(session)
            self._priorities.pop(session, None)

    def _all_queued(self) -> Iterable[_Entry]:
        return (e for e in self._entries.values() if e.state is _State.QUEUED and not e.is_reentrant)

    def _take_urgent(self) -> _Entry | None:
        while self._urgent:
            entry = self._urgent.popleft()
            if entry.state is _State.QUEUED:
                entry.state = _State.RUNNING
                return entry
        return None

    def _unqueue(self, entry: _Entry) -> None:
        self._queued -= 1
        found = self._queued_of[entry.session]
        if isinstance(found, dict):
            del found[entry.key]
        if found is entry or not found:
            del self._queued_of[entry.session]

    def _note_queued(self, entry: _Entry) -> None:
        # Most sessions queue one call: a dict for each of them would be a fifth of what a queued call takes.
        found = self._queued_of.setdefault(entry.session, entry)
        if isinstance(found, dict):
            found[entry.key] = entry
        elif found is not entry:
            self._queued_of[entry.session] = {found.key: found, entry.key: entry}

    def _queued_in(self, session: str) -> list[_Entry]:
        found = self._queued_of.get(session)
        if found is None:
            return []
        return list(found.values()) if isinstance(found, dict) else [found]

    def _priority(self, entry: _Entry) -> int:
        return self._priorities.get(entry.session, entry.priority)

    def _set_rank(self, entry: _Entry) -> None:
        priority = self._priority(entry)
        entry.rank = entry.arrived_s - priority * self._aging_s
        if self._worst is not None and not entry.is_reentrant:
            heapq.heappush(self._worst, (priority, -entry.serial, entry))
            if len(self._worst) > 2 * self._queued + _SLACK:
                self._worst = None
