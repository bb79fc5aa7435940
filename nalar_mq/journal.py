"""The journal of one process: what the calls of jobs that it has made came to, durable before anybody acts on it.

Why. A job runs again in another process when its worker is lost. Its program then makes the same calls under the same ids
(`history`), and whatever had been seen of them must be seen again, the same values in the same order, without running them
again. So no outcome of a call that belongs to a job is shown to the code that made the call before it stands here.

    NS.journal.<process>.<incarnation>   one subject for one life of a process, in the ledger `NS-journal`
        Pack, Pack, Pack, ... [Seal]

Writing. All observations of one turn of the loop, of whatever jobs, travel in one message; while one message is on its way
the next one gathers, so that a slow disk makes larger messages and not more of them. Every message is appended on condition
that the last one of the subject is the writer's own (`sole_writer`), so that a seal is noticed, and a lost answer harms nobody.

Fencing. Who goes on with a job of a lost process first ends that process's journal with a `Seal`, by the same condition, and
then reads it. From then on nothing of the former writer is accepted: should it only have stood still, it finds the seal with
its next observation, which nobody has seen, and ends.

Reading takes the whole subject once and sorts it by call; sealed journals never change, and what was read of them is kept.

What is kept. An observation is needed until the call that made it has an outcome that is durable itself; `release` says so,
and where nobody can say it, since the job went on elsewhere, the job's result does.
What lies before the first observation that is still needed is removed from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import BrokerError, KeyConflictError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.jobs import is_tried_again, sequence_in
from nalar_mq.logs import logger
from nalar_mq.messages import (
    WIRE_VERSION,
    Observation,
    Outcome,
    Pack,
    Seal,
    Voided,
    decode_journal,
    encode_record,
)
from nalar_mq.sole_writer import SoleWriter
from nalar_mq.transport import Kept, Ledger, Transport

_log = logger(__name__)

KEPT_S: Final = 7 * 24 * 3600.0
_PACK_BYTES: Final = 512 * 1024
_ENTRY_BYTES: Final = 128  # of an observation besides its payload
_ID_BYTES: Final = 18  # of a call, among others
_TRIM_EVERY_S: Final = 5.0
_JOURNALS_KEPT: Final = 32
_RELEASED_KEPT: Final = 10_000
_REMOVE_S: Final = 1.0

Sighting = tuple[int, Observation]
"""An observation, and the number of the message that holds it: numbers of all journals grow with time."""
Past = Mapping[bytes, Sequence[Sighting]]
"""By the id of a call, what it observed, in order."""


class Journal:
    """The journal of this process, and the way to read those of others. Everything is for the loop.

    Args:
        transport, subjects, me: of the process.
        on_sealed: somebody has taken over from this process; nothing more becomes durable.

    Attributes:
        unreadable: messages in journals that made no sense, and were passed over.
    """

    def __init__(self, transport: Transport, subjects: Subjects, me: Address, on_sealed: Callable[[], None]) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._subject = subjects.journal(me.name, me.incarnation)
        self._on_sealed = on_sealed
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Observation | None, Callable[[], None] | None]] = []
        self._writer: asyncio.Task[None] | None = None
        self._trimmer: asyncio.Task[None] | None = None
        self._ledger: Ledger | None = None
        self._appender = SoleWriter(self._open, self._subject)
        self._first_of: dict[bytes, int] = {}
        self._job_of: dict[bytes, str] = {}
        self._released: OrderedDict[bytes, None] = OrderedDict()
        self._trimmed_below = 0
        self._sealed: OrderedDict[Address, dict[str, Past]] = OrderedDict()
        self._is_over = False
        self.unreadable = 0

    # Writing.

    def put(self, observation: Observation, on_durable: Callable[[], None] | None = None) -> None:
        """Appends an observation soon; `on_durable` is called once it is kept, and never if this process was taken over."""
        self._add(observation, on_durable)

    def after(self, function: Callable[[], None]) -> None:
        """Calls `function` once everything put so far is durable."""
        self._add(None, function)

    def _add(self, observation: Observation | None, on_durable: Callable[[], None] | None) -> None:
        if self._is_over:
            return
        self._waiting.append((observation, on_durable))
        if self._writer is None:
            self._start_writing()

    def _start_writing(self) -> None:
        self._writer = self._loop.create_task(self._write())
        self._writer.add_done_callback(self._on_written)

    def _on_written(self, writer: asyncio.Task[None]) -> None:
        self._writer = None
        if writer.cancelled():
            return
        error = writer.exception()
        if error is not None:
            self._loop.call_exception_handler({"message": "the journal cannot be written", "exception": error})
            self._end()
        elif self._waiting:
            self._start_writing()

    async def _write(self) -> None:
        while self._waiting and not self._is_over:
            batch = self._next_batch()
            observations = tuple([observation for observation, _ in batch if observation is not None])
            if observations and not await self._appender.append(encode_record(Pack(WIRE_VERSION, observations))):
                self._end()
                return
            for observation in observations:
                self._note(observation)
            for _, on_durable in batch:
                if on_durable is not None:
                    self._tell(on_durable)

    def _next_batch(self) -> list[tuple[Observation | None, Callable[[], None] | None]]:
        """As much of what waits as fits into one message, one observation at least."""
        size_bytes = 0
        for count, (observation, _) in enumerate(self._waiting):
            size_bytes += _size_of(observation)
            if size_bytes > _PACK_BYTES and count:
                batch, self._waiting = self._waiting[:count], self._waiting[count:]
                return batch
        batch, self._waiting = self._waiting, []
        return batch

    def _note(self, observation: Observation) -> None:
        if observation.parent in self._released:
            return
        self._first_of.setdefault(observation.parent, self._appender.last)
        self._job_of[observation.parent] = observation.job
        if self._trimmer is None:
            self._trimmer = self._loop.create_task(self._trim())

    def _tell(self, on_durable: Callable[[], None]) -> None:
        try:
            on_durable()
        except Exception as error:  # one of them must not keep the others waiting
            self._loop.call_exception_handler({"message": "a journaled outcome could not be delivered", "exception": error})

    def _end(self) -> None:
        self._is_over = True
        self._waiting.clear()
        self._on_sealed()

    async def _open(self) -> Ledger:
        if self._ledger is None:
            filters = [self._subjects.journal("*", "*")]
            self._ledger = await self._transport.ledger(self._subjects.journal_ledger, filters, max_age_s=KEPT_S)
        return self._ledger

    # What is not needed any more.

    def release(self, parent: bytes) -> None:
        """The outcome of call `parent` is durable elsewhere: what it observed is not needed any more."""
        self._first_of.pop(parent, None)
        self._job_of.pop(parent, None)
        self._released[parent] = None  # something of it may still be on its way
        if len(self._released) > _RELEASED_KEPT:
            self._released.popitem(last=False)

    def has_of(self, job: str) -> bool:
        """True if this journal holds observations of the job that may be needed."""
        return job in self._job_of.values()

    async def _trim(self) -> None:
        """Removes what lies before everything that is needed; the last message stays, since the next one refers to it."""
        while True:
            await asyncio.sleep(_TRIM_EVERY_S)
            await self._release_oldest_ended()
            below = min(self._first_of.values(), default=self._appender.last)
            if below <= self._trimmed_below:
                continue
            try:
                await (await self._open()).purge(self._subject, below=below)
                self._trimmed_below = below
            except BrokerError as error:
                _log.debug("journal.trim_failed", reason=str(error))

    async def _release_oldest_ended(self) -> None:
        """Looks whether the job has ended that holds back the most: nobody tells a process that had part in it before."""
        oldest = min(self._first_of, key=self._first_of.__getitem__, default=None)
        if oldest is None:
            return
        job = self._job_of[oldest]
        with contextlib.suppress(BrokerError):
            results = await self._transport.ledger(self._subjects.results_ledger, [self._subjects.result("*")])
            found = await results.last(self._subjects.result(job))
            if found is not None and not await is_tried_again(self._transport, self._subjects, job, sequence_in(found.headers)):
                for parent in [parent for parent, of in self._job_of.items() if of == job]:
                    self.release(parent)

    # Reading.

    async def writers(self) -> list[Address]:
        """The processes, present and past, whose journals hold anything.

        Raises:
            BrokerError: the broker does not answer.
        """
        subjects = await (await self._open()).subjects()
        found = (self._subjects.journal_writer(subject) for subject in subjects)
        return [address for address in found if address is not None]

    async def is_sealed(self, writer: Address) -> bool:
        """True if somebody has taken over from a process already: then it is gone, whoever has heard of that.

        Raises:
            BrokerError: the broker does not answer.
        """
        if writer in self._sealed:
            return True
        last = await (await self._open()).last(self._subjects.journal(writer.name, writer.incarnation))
        return last is not None and self._is_seal(last.data)

    async def read(self, writer: Address, job: str, *, is_lost: bool) -> Past:
        """What calls of a job observed in a process; that of a lost one is sealed first.

        Raises:
            BrokerError: the broker does not answer.
        """
        if not is_lost:
            subject = self._subjects.journal(writer.name, writer.incarnation)
            return _sorted([kept async for kept in _pages(await self._open(), subject)], self).get(job, {})
        found = self._sealed.get(writer)
        if found is None:
            found = self._sealed[writer] = await self._seal_and_read(writer)
            while len(self._sealed) > _JOURNALS_KEPT:
                self._sealed.popitem(last=False)
        return found.get(job, {})

    async def _seal_and_read(self, writer: Address) -> dict[str, Past]:
        ledger = await self._open()
        subject = self._subjects.journal(writer.name, writer.incarnation)
        seal = encode_record(Seal(WIRE_VERSION, self._me.name))
        messages: list[Kept] = []
        while True:
            after = messages[-1].sequence if messages else 0
            messages.extend([kept async for kept in _pages(ledger, subject, after)])
            if messages and self._is_seal(messages[-1].data):
                return _sorted(messages, self)
            try:
                await ledger.append(subject, seal, last=messages[-1].sequence if messages else 0)
            except KeyConflictError:
                continue
            _log.info("journal.sealed", process=writer.name, incarnation=writer.incarnation)

    def _is_seal(self, data: bytes) -> bool:
        try:
            return isinstance(decode_journal(data), Seal)
        except WireError:
            return False

    async def aclose(self) -> None:
        """Ends; what is not durable by now is not told, and a journal that nobody needs is removed. Idempotent."""
        is_needed = self._is_over or bool(self._waiting or self._first_of)
        self._is_over = True
        tasks = [task for task in (self._writer, self._trimmer) if task is not None]
        self._writer = self._trimmer = None
        await cancel_all(tasks)
        if self._appender.last and not is_needed and self._transport.is_connected:
            with contextlib.suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(_REMOVE_S):
                    await (await self._open()).purge(self._subject)


def _size_of(observation: Observation | None) -> int:
    if type(observation) is Voided:
        return _ENTRY_BYTES + _ID_BYTES * len(observation.ids)
    if type(observation) is not Outcome:
        return _ENTRY_BYTES
    result = observation.result
    traceback = len(getattr(result, "traceback", "")) + len(getattr(result, "text", ""))
    return _ENTRY_BYTES + len(result.payload) + 4 * traceback


def _sorted(messages: Iterable[Kept], journal: Journal) -> dict[str, Past]:
    """Observations by job and call, in order."""
    by_job: dict[str, dict[bytes, list[Sighting]]] = {}
    for sighting in _sightings(messages, journal):
        observation = sighting[1]
        by_job.setdefault(observation.job, {}).setdefault(observation.parent, []).append(sighting)
    return dict(by_job)


def _sightings(messages: Iterable[Kept], journal: Journal) -> Iterator[Sighting]:
    for kept in messages:
        try:
            message = decode_journal(kept.data)
        except WireError as error:
            journal.unreadable += 1
            _log.warning("journal.unreadable", subject=kept.subject, sequence=kept.sequence, reason=str(error))
            continue
        if isinstance(message, Pack):
            yield from ((kept.sequence, observation) for observation in message.observations)


async def _pages(ledger: Ledger, subject: str, after: int = 0) -> AsyncIterator[Kept]:
    while page := await ledger.read(subject, after=after):
        for kept in page:
            yield kept
        after = page[-1].sequence
