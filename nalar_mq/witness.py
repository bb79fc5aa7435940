"""What the program of a job may see of its calls, and when: nothing that another attempt could not see again.

A call that a job makes ends in two steps:

    in flight ──▶ kept ──▶ ended: its future has the outcome, and so has whoever waits for it as an argument (its executor
                   │       is not told to push it); the executor is told that it may forget it (`Settled`)
                   └─ its first outcome is on the way into the journal

A later attempt (`history`) repeats what former ones saw, in the order in which they saw it. Until it has seen all of that,
outcomes that come anew are held, until its end at most. Looks that found nothing and readings of the clock are known to the
program at once: they become durable before anything that it does next leaves the process.

A standstill. A workflow that has changed may wait for what no former attempt waited for, while all that these saw waits for its
turn. Found waiting for long, and no further, it is told so.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from nalar_mq import values
from nalar_mq.address import Address
from nalar_mq.claims import MARK, Claims
from nalar_mq.entries import Entry
from nalar_mq.errors import WireError
from nalar_mq.future import Future, waiting
from nalar_mq.history import History, losses_in
from nalar_mq.journal import Journal
from nalar_mq.messages import Fail, Message, Observation, Reading, Resolve, Settled, Unseen
from nalar_mq.receivers import Host

_STANDSTILL_S = 5.0  # how long a workflow that repeats a job may wait and do nothing of what it did before
_SLOWER = 3.0  # and how often the time that it took the first time
_WATCH_EVERY_S = 0.5


class _Calls(Protocol):
    """The part of `calls` that this needs."""

    loop: asyncio.AbstractEventLoop
    claims: Claims
    journal: Journal | None
    host: Host | None

    @property
    def is_closed(self) -> bool: ...

    def is_on_loop(self) -> bool: ...
    def run_on_loop(self, function: Callable[[], None]) -> None: ...
    def tell(self, address: Address, message: Message) -> None: ...
    def push_to_missed(self, consumers: list[Address], message: Resolve | Fail) -> None: ...
    def stop_watching(self, entry: Entry) -> None: ...
    def finish(self, entry: Entry) -> None: ...


class Witness:
    """Shows the programs of jobs of one process what their calls came to. Implements `call_context.Witness`.

    Every method not said to be for any thread is for the loop.
    """

    __slots__ = ("_calls", "_entries")

    def __init__(self, calls: _Calls, entries: dict[bytes, Entry]) -> None:
        self._calls = calls
        self._entries = entries

    def once_durable(self, function: Callable[[], None]) -> None:
        """Calls it when all is durable that the journal was given so far."""
        self._journal().after(function)

    def _journal(self) -> Journal:
        assert self._calls.journal is not None
        return self._calls.journal

    def keep(self, entry: Entry, message: Resolve | Fail, history: History) -> None:
        """The first outcome of a call of a job: its maker sees it once it is durable."""
        if entry.is_kept:
            return
        assert entry.part is not None
        is_late = entry.part.is_abandoned or history.is_over
        if is_late and type(message) is Fail:
            self.appear(entry, message, again=True)
            return
        entry.part.is_kept = True
        self._calls.stop_watching(entry)
        result = msgspec.structs.replace(message, pushed=()) if message.pushed else message
        appear = functools.partial(self.appear, entry, result)
        outcome = history.outcome(result, self._calls.loop.time(), is_late=is_late)
        self.observe(history, outcome, lambda: _when_repeated(history, appear))

    def observe(self, history: History, observation: Observation, on_durable: Callable[[], None] | None = None) -> None:
        """Journals what the call of `history` is about to see."""
        opening = history.opening()
        if opening is not None:
            self._journal().put(opening)
        self._journal().put(observation, on_durable)

    def void(self, history: History, losses: Iterable[BaseException]) -> None:
        """A call of a job ends with losses: what it had called and that failed of them is made again by another attempt."""
        for voided in history.voided([values.encode_error(loss)[:2] for loss in losses]):
            self.observe(history, voided)

    def appear(self, entry: Entry, result: Resolve | Fail, *, again: bool = False) -> None:
        """Shows an outcome that is durable; with `again`, one that need not be, since the call will be made again."""
        if self._entries.get(result.id) is not entry:
            return
        if type(result) is Resolve:
            self._resolve(entry.future, result.payload)
        else:
            assert type(result) is Fail
            error = error_in(result, entry.future.actor)
            again = again or bool(losses_in(error))  # it is made again, and goes on where it was, if that ends the job
            entry.future.fail(error)
        self._calls.finish(entry)
        if entry.consumers is not None:
            self._calls.push_to_missed(entry.consumers, result)
        if entry.address is not None:
            self._calls.tell(entry.address, Settled(result.id, again))

    def _resolve(self, future: Future[Any], payload: bytes) -> None:
        if payload[:1] != MARK:
            future.resolve(payload)
            return
        try:
            future.resolve(self._calls.claims.taken(payload))
        except WireError as error:
            future.fail(error)

    def is_remembered(self, entry: Entry, history: History | None) -> bool:
        """True if a former attempt saw how the call ended: then it is not made again, and ends when its turn comes."""
        id = entry.future.id
        if history is None or history.memory is None:
            return False
        if not history.expects(id):
            loose = history.take_loose(id)
            if loose is not None:
                self.keep(entry, loose, history)
            return loose is not None
        result = history.made(id)
        if result is not None:
            self.appear(entry, result)
        self._go_on(history)
        return True

    def _go_on(self, history: History, hurried: Sequence[Resolve | Fail] = ()) -> None:
        """Shows what is due, and when all has been seen again does what was held meanwhile."""
        for result in (*history.due(), *hurried):
            entry = self._entries.get(result.id)
            if entry is not None:
                self.appear(entry, result)
        while history.held and not history.is_repeating:
            history.held.pop(0)()

    def look(self, future: Future[Any], history: History) -> bool:
        """A call of a job looks whether a future has ended; says what former attempts were told. Any thread."""
        number = history.look()
        is_on_loop = self._calls.is_on_loop()
        if history.was_unseen(number):
            self.go_on(history)
            return False
        if history.expects(future.id):
            if is_on_loop:
                self._go_on(history)
                self._go_on(history, history.hurry(future.id))
            else:
                appeared = threading.Event()
                if future.on_end(appeared.set):
                    with waiting(future):
                        appeared.wait()
        if future.has_ended():
            return True
        self.note_unseen(history, number)
        return False

    def go_on(self, history: History) -> None:
        """A call of a job has looked as a former attempt did: shows what comes next. Any thread."""
        self._calls.run_on_loop(functools.partial(self._go_on, history))

    def note_unseen(self, history: History, number: int) -> None:
        """A look found nothing: what the job calls after that waits until this is durable. Any thread."""
        if history.note_unseen(number):
            self._calls.run_on_loop(lambda: self._journal_unseen(history))

    def read_clock(self, history: History) -> float:
        """What the clock shows a call of a job, in seconds since the epoch. Any thread."""
        at_s, reading = history.read_clock(time.time())
        if reading is None:
            self.go_on(history)
        else:
            self._calls.run_on_loop(functools.partial(self._journal_on_the_way, history, reading))
        return at_s

    def cut_again(self, history: History, number: int) -> None:
        """A wait has been cut short where a former attempt's was: what came after that may appear. Any thread."""
        history.cut_again(number)
        self.go_on(history)

    def _journal_unseen(self, history: History) -> None:
        for unseen in history.take_noted():
            self._journal_on_the_way(history, unseen)

    def _journal_on_the_way(self, history: History, observation: Unseen | Reading) -> None:
        """What the program knows already becomes durable before anything that it does now can be seen."""
        if not history.is_over:
            history.on_the_way += 1
            self.observe(history, observation, functools.partial(_has_landed, history))

    def stop_repeating(self, history: History) -> None:
        """The call has been cancelled: what it has made ends now."""
        history.stop_repeating()
        self._go_on(history)

    def skip_looks(self, history: History) -> None:
        """The call has ended, and done without looks and readings that a former attempt did: what waited for them appears."""
        while history.skip_looks():
            self._go_on(history)

    def watch(self, history: History) -> None:
        """Watches over a workflow that repeats a job: it may come to a standstill."""
        if history.is_repeating:
            self._calls.loop.call_later(_WATCH_EVERY_S, self._watch, history, history.progress, 0)

    def _watch(self, history: History, progress: int, idle: int) -> None:
        """`idle` looks have found it waiting and no further; they are counted, since a busy machine makes few of them."""
        host = self._calls.host
        if host is None or self._calls.is_closed or not history.is_repeating:
            return
        is_idle = history.progress == progress and not history.is_waiting_again and host.is_waiting(history.call_id)
        idle = idle + 1 if is_idle else 0
        wanted = history.next_wanted
        if idle * _WATCH_EVERY_S > _STANDSTILL_S + _SLOWER * (0.0 if wanted is None else wanted.after_s):
            if not history.skip_looks():
                host.on_standstill(history)
                return
            self._go_on(history)
        self._calls.loop.call_later(_WATCH_EVERY_S, self._watch, history, history.progress, idle)


def _when_repeated(history: History, function: Callable[[], None]) -> None:
    """Now, or when all that a former attempt saw has been seen again: nothing comes in between."""
    if history.is_repeating:
        history.held.append(function)
    else:
        function()


def _has_landed(history: History) -> None:
    history.on_the_way -= 1


def error_in(message: Fail, actor: str) -> Exception:
    """The error that a call of `actor` has ended with."""
    return values.decode_error(
        message.kind, message.text, message.payload, message.traceback, message.id.hex(), actor, message.path
    )
