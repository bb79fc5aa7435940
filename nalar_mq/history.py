"""What one call of a job does and sees, so that another attempt at it does and sees the same. No I/O, no clock.

Ids. A call made inside a job has an id that follows from who made it, what it calls, with what, and how often the same has
been called before: the same program issues the same ids in every attempt. A future among the arguments stands for its own id.

Seeing again. A later attempt is handed what the former ones observed (`journal`):

    a workflow, in order     Its program may depend on which call ended first, or on a look that found nothing. So outcomes
                             appear in the order in which they appeared before, each not before the looks that preceded it
                             have been repeated (they find nothing again). Calls that were not observed run, or go on.
                             A wait that asyncio cut short, as `asyncio.timeout` does, is a look that found nothing: the same
                             wait lasts until it is cut short again, and what came later does not appear before that.
    anything else            An outcome appears as soon as the call is made again: order is not recorded for agents and
                             tools, whose own calls are found by id and not repeated.
    after a failure          The job is tried again because something failed; then failed outcomes do not appear, so that
                             what failed runs again and what succeeded does not, and order means nothing any more.
    after a loss             An attempt may end with the loss of something else than its own worker: a call was lost more often
                             than it may be sent again, or shed. Nobody is at fault, and the same error from the journal
                             would end every other attempt as well. So whoever ends with such an error voids it: a `Voided`
                             says which of its calls failed of it, its text being the same, and which were lost after the
                             first of those: a worker takes many calls with it, and each of them would end an attempt that
                             costs nobody anything. They are made again. What came before the first of them is seen again
                             in its order. What came after it has no order any more, since the program may go another way
                             from there: it counts as what has ended just now, and is observed again when its call is made,
                             or the clock read. Should the process be lost before the `Voided` is durable, the next attempt
                             ends in the same way and writes it.
    after its end            When a call has ended with an error, or been cancelled, what it has called and still runs is
                             cancelled, since another attempt makes it again. What that comes to is nothing that its program
                             has seen, and may be written after the next attempt has read what there was. So a failure is
                             not written at all, and a value is marked as late (`is_late`): it has no order, and does not
                             count where another attempt has observed the same call. It is observed when its call is made
                             again. Looks and readings of code that goes on after its call has ended are not written, and
                             it can call nothing more: that would be taken for the same call of the next attempt.

The clock shows what it showed before, each reading by its number, and never less than at the last one; the random numbers
of a call follow from its id.

While a workflow repeats, it does nothing else: calls that were not made before, or whose outcome nobody saw, are held until
all has been seen again. So a program that does something else than before comes to a standstill before it has done anything;
`next_wanted` says what it does not do. Looks and readings that it leaves out do not matter (`skip_looks`).

The first observation of a workflow says by which code it was made; other code does not go on with the job.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import dropwhile
from random import Random
from typing import NamedTuple, cast

from nalar_mq.address import Address
from nalar_mq.errors import OverloadedError, OwnerLostError, WorkerLostError
from nalar_mq.messages import Begun, Fail, Observation, Outcome, Reading, Resolve, Unseen, Voided

_LOSSES = WorkerLostError, OwnerLostError, OverloadedError
_LOSS_KINDS = frozenset(f"{loss.__module__}:{loss.__qualname__}" for loss in _LOSSES)
RETRIES = 100  # of the calls that one execution of a job makes, all together
_ROOT = b"job"
_MOST_VOIDED = 1000  # calls that one observation says to be void
_FIRST_WAIT = 2**56  # waits have greater numbers than looks


def root_id(job: str, life: int) -> bytes:
    """The id of the call that is the job itself; another one for each life, which knows nothing of the former ones."""
    return _digest((_ROOT, job.encode(), life.to_bytes(4, "big")))


def _digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(4, "big"))
        found.update(part)
    return found.digest()


def losses_in(error: BaseException) -> list[WorkerLostError | OwnerLostError | OverloadedError]:
    """The losses with which a program has ended, more than one of a task group; none if anything else is among them."""
    if isinstance(error, _LOSSES):
        return [error]
    if not isinstance(error, BaseExceptionGroup):
        return []
    parts: tuple[BaseException, ...] = cast("BaseExceptionGroup[BaseException]", error).exceptions
    found = [losses_in(part) for part in parts]
    return [loss for losses in found for loss in losses] if all(found) else []


class Memory(NamedTuple):
    """What is known of the former attempts at a job, for a call that is tried again.

    Attributes:
        past: by call, what it observed, in order.
        located: calls that still run, or have ended unseen, and where.
        lost: processes that are gone.
    """

    past: Mapping[bytes, Sequence[Observation]]
    located: dict[bytes, Address]
    lost: tuple[str, ...]

    @property
    def seen(self) -> int:
        """How many calls have come to a value that is kept, and not repeated."""
        outcomes = (seen.result for observed in self.past.values() for seen in observed if type(seen) is Outcome)
        return len({result.id for result in outcomes if type(result) is Resolve})


class History:
    """The history of one execution. What stands below `Any thread` may be called from any, the rest on the loop.

    Attributes:
        job: id of the job.
        call_id: the execution it belongs to.
        memory: of former attempts; None in the first one.
        failures: attempts of the job that ended with an error.
        on_the_way: looks that found nothing, and readings of the clock, that are not durable yet.
        retries_left: how often the calls of this execution may still be sent again after the loss of a worker.
        version: of the code that this execution runs; empty where it does not matter.
        former_version: of the code that began the job; empty if nothing has been observed.
        held: what is to be done when all has been seen again, in order.
        is_over: the execution has ended.
    """

    __slots__ = (
        "_counts",
        "_cut_again",
        "_failed",
        "_known",
        "_late",
        "_latest_s",
        "_lock",
        "_looks",
        "_loose",
        "_loose_readings",
        "_made",
        "_noted",
        "_observed_s",
        "_queue",
        "_random",
        "_readings",
        "_seen_readings",
        "_unseen",
        "_waiting_again",
        "_waits",
        "call_id",
        "failures",
        "former_version",
        "held",
        "is_over",
        "job",
        "memory",
        "on_the_way",
        "retries_left",
        "version",
    )

    def __init__(
        self,
        job: str,
        call_id: bytes,
        *,
        in_order: bool,
        memory: Memory | None = None,
        failures: int = 0,
        version: str = "",
        began_s: float = 0.0,
    ) -> None:
        self.job = job
        self.call_id = call_id
        self.memory = memory
        self.failures = failures
        self.on_the_way = 0
        self.retries_left = RETRIES
        self.version = version
        self.former_version = ""
        self.held: list[Callable[[], None]] = []
        self.is_over = False
        self._observed_s = began_s
        self._lock = threading.Lock()
        self._counts: dict[bytes, int] = {}
        self._looks = 0
        self._noted: list[tuple[int, int]] = []
        self._made: set[bytes] = set()
        self._late: set[bytes] = set()
        self._known: dict[bytes, Resolve | Fail] = {}
        self._loose: dict[bytes, Resolve | Fail] = {}
        self._loose_readings: set[int] = set()
        self._failed: dict[bytes, tuple[str, int]] = {}  # the kind, and the hash of the text
        self._queue: deque[Observation] = deque()
        self._unseen: list[tuple[int, int]] = []
        self._waits: dict[bytes, int] = {}
        self._waiting_again: set[int] = set()
        self._cut_again: set[int] = set()
        self._readings = 0
        self._seen_readings: dict[int, float] = {}
        self._latest_s = 0.0
        self._random: Random | None = None
        if memory is not None:
            for observation in memory.past.get(call_id, ()):
                self._remember(observation, in_order=in_order and not failures)

    def _remember(self, observation: Observation, *, in_order: bool) -> None:
        if type(observation) is Outcome:
            result = observation.result
            if result.id in self._known or (self.failures and type(result) is Fail):
                return
            if observation.is_late:
                self._loose.setdefault(result.id, result)
                return
            self._loose.pop(result.id, None)
            self._known[result.id] = result
            self._note_failed(result)
            if in_order:
                self._queue.append(observation)
        elif type(observation) is Voided:
            self._void(observation)
        elif type(observation) is Unseen and in_order:
            self._unseen.append((observation.first, observation.last))
            self._queue.append(observation)
        elif type(observation) is Begun:
            self.former_version = observation.version
            self._forget()
        elif type(observation) is Reading:
            self._seen_readings.setdefault(observation.number, observation.at_s)
            self._loose_readings.discard(observation.number)
            if in_order:
                self._queue.append(observation)

    def _note_failed(self, result: Resolve | Fail) -> None:
        if type(result) is Fail:
            self._failed.pop(result.id, None)  # what is observed again comes last
            self._failed[result.id] = sys.intern(result.kind), hash(result.text)

    def _void(self, voided: Voided) -> None:
        """Takes these failures out, and with the first of them the order of what came after it."""
        gone = {id for id in voided.ids if type(self._known.get(id)) is Fail or type(self._loose.get(id)) is Fail}
        for id in gone:
            self._known.pop(id, None)
            self._loose.pop(id, None)
            del self._failed[id]
        seen = list(self._queue)
        cut = next((place for place, head in enumerate(seen) if type(head) is Outcome and head.result.id in gone), None)
        if cut is not None:
            self._queue = deque(seen[:cut])
            self._unseen = [(head.first, head.last) for head in self._queue if type(head) is Unseen]
            after = [head.result for head in seen[cut:] if type(head) is Outcome and head.result.id not in gone]
            self._loose |= {result.id: self._known.pop(result.id) for result in after}
            self._loose_readings |= {head.number for head in seen[cut:] if type(head) is Reading}

    def _forget(self) -> None:
        self._known.clear()
        self._loose.clear()
        self._loose_readings.clear()
        self._failed.clear()
        self._queue.clear()
        self._unseen.clear()
        self._seen_readings.clear()

    # Any thread.

    def id_of(self, actor: str, method: str, session: str, instance: str, init: bytes, payload: bytes) -> bytes:
        """The id of the next call of that kind with those arguments."""
        words = (actor.encode(), method.encode(), session.encode(), instance.encode(), init, payload)
        kind = _digest((self.call_id, *words))
        with self._lock:
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return kind if count == 1 else _digest((kind, count.to_bytes(8, "big")))

    def look(self) -> int:
        """The program looks whether a future has a value: the number of the look, from 1."""
        with self._lock:
            self._looks += 1
            return self._looks

    def wait(self, what: bytes) -> int:
        """The program waits for `what` on the loop: the number of the wait, whatever else it does meanwhile."""
        with self._lock:
            count = self._waits[what] = self._waits.get(what, 0) + 1
        return _FIRST_WAIT + int.from_bytes(_digest((what, count.to_bytes(8, "big")))[:7], "big")

    def waits_again(self, number: int) -> None:
        """The program waits where a former attempt did until that was cut short; `cut_again` tells when this one is."""
        with self._lock:
            self._waiting_again.add(number)

    def cut_again(self, number: int) -> None:
        """The wait has been cut short as before."""
        with self._lock:
            self._waiting_again.discard(number)
            self._cut_again.add(number)

    @property
    def is_waiting_again(self) -> bool:
        """True while time has to pass for the program as it did before."""
        return bool(self._waiting_again)

    def was_unseen(self, number: int) -> bool:
        """True if a former attempt's look or wait of that number found nothing."""
        return any(first <= number <= last for first, last in self._unseen)

    def note_unseen(self, number: int) -> bool:
        """A look found nothing; True if `take_noted` is to be called for it, False if it will be anyway."""
        with self._lock:
            if self._noted and self._noted[-1][1] == number - 1:
                self._noted[-1] = (self._noted[-1][0], number)
                return False
            self._noted.append((number, number))
            return len(self._noted) == 1

    def read_clock(self, wall_s: float) -> tuple[float, Reading | None]:
        """What the clock shows, in seconds since the epoch; unless its place is known from before, also what to journal."""
        with self._lock:
            self._readings += 1
            number = self._readings
            seen_s = self._seen_readings.pop(number, None)
            self._latest_s = max(self._latest_s, wall_s) if seen_s is None else seen_s
            is_new = seen_s is None or number in self._loose_readings
            return self._latest_s, Reading(self.job, self.call_id, number, self._latest_s) if is_new else None

    @property
    def random(self) -> Random:
        """The random numbers of this call, from one generator."""
        with self._lock:
            if self._random is None:
                self._random = Random(_digest((b"random", self.call_id)))
            return self._random

    @property
    def is_repeating(self) -> bool:
        """True while there is something that a former attempt saw and this one has not seen yet."""
        return bool(self._queue)

    def expects(self, id: bytes) -> bool:
        """True if a former attempt saw how the call ended, and this one has not yet."""
        return id in self._known

    @property
    def progress(self) -> int:
        """Grows with every call that is made, every look, every reading of the clock, and whatever is seen again."""
        with self._lock:
            return self._looks + self._readings + sum(self._counts.values()) - len(self._queue)

    # On the loop.

    def take_noted(self) -> list[Unseen]:
        """The looks that found nothing and were not taken yet."""
        with self._lock:
            noted, self._noted = self._noted, []
        return [Unseen(self.job, self.call_id, first, last) for first, last in noted]

    def made(self, id: bytes) -> Resolve | Fail | None:
        """The call has been made (again): its outcome if it may appear now; if it is expected, `due` gives it later."""
        if not self._queue or id in self._late:
            return self._known.pop(id, None)
        self._made.add(id)
        return None

    def take_loose(self, id: bytes) -> Resolve | Fail | None:
        """How the call ended, if that is known and has no order any more: it is to be observed again."""
        return self._loose.pop(id, None)

    def due(self) -> list[Resolve | Fail]:
        """The outcomes that may appear now, in order."""
        found: list[Resolve | Fail] = []
        while self._queue:
            head = self._queue[0]
            if type(head) is Outcome:
                if head.result.id not in self._made:
                    break
                found.append(self._known.pop(head.result.id))
                self._made.discard(head.result.id)
            elif not self._has_repeated(head):
                break
            self._queue.popleft()
        return found

    def _has_repeated(self, observation: Observation) -> bool:
        if type(observation) is Reading:
            return self._readings >= observation.number
        if type(observation) is Unseen and observation.last >= _FIRST_WAIT:
            return observation.last in self._cut_again
        return type(observation) is Unseen and self._looks >= observation.last

    def hurry(self, id: bytes) -> list[Resolve | Fail]:
        """The program looks at `id` on the loop, where it cannot wait for its turn: the outcomes up to that one, out of order.

        What has not been made so far appears when it is.
        """
        found: list[Resolve | Fail] = []
        while self._queue and id in self._known:
            head = self._queue.popleft()
            if type(head) is not Outcome:
                continue
            if head.result.id in self._made:
                self._made.discard(head.result.id)
                found.append(self._known.pop(head.result.id))
            else:
                self._late.add(head.result.id)
        return found

    def skip_looks(self) -> bool:
        """The program stands still: gives up the looks and readings that are next; False if it is a call that is missing."""
        before = len(self._queue)
        while self._queue and type(self._queue[0]) is not Outcome:
            self._queue.popleft()
        return len(self._queue) < before

    def stop_repeating(self) -> None:
        """What former attempts saw does not matter any more."""
        self._queue.clear()

    @property
    def next_wanted(self) -> Outcome | None:
        """The first outcome that a former attempt saw of a call which this one has not made (yet)."""
        outcomes = (seen for seen in self._queue if type(seen) is Outcome)
        return next((seen for seen in outcomes if seen.result.id not in self._made), None)

    # What this attempt observes.

    def outcome(self, result: Resolve | Fail, now_s: float, *, is_late: bool = False) -> Outcome:
        """What is to be journaled of a call that has ended; late if its maker had ended before."""
        if is_late:
            return Outcome(self.job, self.call_id, result, is_late=True)
        after_s, self._observed_s = max(0.0, now_s - self._observed_s), now_s
        self._note_failed(result)
        return Outcome(self.job, self.call_id, result, after_s)

    def voided(self, losses: Iterable[tuple[str, str]]) -> list[Voided]:
        """What is to be journaled when the program has ended with losses of these kinds and texts; nothing without such calls.

        Of very many calls in parts, of which each fits into a message. If not all become durable, the next attempt meets the
        loss of a call that is in none, and ends as this one.
        """
        met = {(kind, hash(text)) for kind, text in losses}
        found = dropwhile(lambda item: item[1] not in met, self._failed.items())
        ids = [id for id, failed in found if failed in met or failed[0] in _LOSS_KINDS]
        parts = (tuple(ids[start : start + _MOST_VOIDED]) for start in range(0, len(ids), _MOST_VOIDED))
        return [Voided(self.job, self.call_id, part) for part in parts]

    def opening(self) -> Begun | None:
        """What is to be journaled before anything else, the first time; None if it stands there."""
        if not self.version or self.former_version:
            return None
        self.former_version = self.version
        return Begun(self.job, self.call_id, self.version)
