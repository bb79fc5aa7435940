"""Jobs: workflow calls that survive their caller and their workers, open to any NATS client.

    publish NS.job.<workflow>  ──▶  queue NS-jobs  ──▶  a worker pulls it  ──▶  NS-running: who runs it
                                                                │
                                     NS.result.<id>  ◀──────────┴──────────▶  NS.dead.<id>
                                     (ledger NS-results)                      (ledger NS-dead)

A job's id is its header `Nats-Msg-Id`, else `job-<sequence in the queue>`. One id is one job for as long as its result is
kept, however often it is published.

On whose behalf a job runs is said by its subject, `NS.job.<workflow>.<tenant>`, since who may publish there is up to the
broker's permissions; on `NS.job.<workflow>` it is nobody's. The header `Nalar-Tenant` repeats it: what JetStream itself
publishes when somebody asks it to, with its own right to publish anywhere, bears none. A job of which the two differ goes to
the dead letters, as nobody's.

What ends a job is one message on `NS.result.<id>`, appended on condition that there is none: of a result, a failure and a
cancellation that race, the first one counts and the others are dropped. Only after that does the message leave the queue.
So at every moment an accepted job lies in the queue, in the results or in both, and whoever finds it in both just takes it
out of the queue. Who cancels a job that nobody has in hand does that at once.

    in the queue, no record                      queued
    in the queue, record with a process          running
    in the queue, record without a process       waits for another attempt
    result                                       done, failed or cancelled

A value that is larger than a message lies in the object store `NS-results`, as JSON, and the result says where (`value_at`);
it goes when the result goes.

A failed job, and a message that is none, lies in the dead letters too; so does one of a name that nobody has served for a
while, and soon one of a name that is served, but as a tool or an agent. Taking it from there is publishing it again under
its id (in `Nalar-Job-Id`, since the broker would take a repeated `Nats-Msg-Id` for a double), after its result is removed.

A failure has one dead letter. Both the result and the letter say in `Nalar-Sequence` which message has failed:

    result  ──▶  letter  ──▶  message out of the queue            by whoever had the message, or by its next holder
                   └───────▶  message out of the queue  ──▶  letter removed, or published again        by a person

Whoever finds a failed result under the id of a message asks whether it is of that message: a duplicate has not failed, and
just goes. If it is, and there is no letter of it, and the message is still in the queue, then nobody has written the letter
yet: a person who removes one takes the message out of the queue first, as does every holder after the letter. The letter
is appended on condition that the former one under its key is what was seen. And whoever has had a message in hand before
begins it only if it is in the queue after it has no result: else a person has published it again meanwhile. That is done
twice where the first answer of the broker is lost, or by two people at once: the result that goes before it is that of the
message that has failed, no other, so that what the first one has come to is found by the second. What is published again
says in `Nalar-Sequence` which message it stands for: the failure of that one does not end it, and goes. It may be written
late, by a process that stood still: who fails looks first whether its record still stands, but may stand still after that.
Until the next holder has removed it, who asks how the job has ended finds the record of a message that stands for the failed
one, and is told that it has not; and its large values and what lies in journals of it stay.

Headers are the publisher's word: permissions of the broker are about subjects. So whoever may publish a job may give it any
id, and by these two headers have one that has failed run again, in other words as well; what has ended otherwise stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from nalar_mq.address import Address, Subjects, check_token, is_token, random_token
from nalar_mq.errors import (
    AddressError,
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    CallCancelledError,
    CallTimeoutError,
    KeyConflictError,
    MalformedMessageError,
    ObjectDamagedError,
    RemoteError,
    UnknownActorError,
    UnknownJobError,
    ValueLostError,
    ValueTooLargeError,
    WireError,
)
from nalar_mq.interchange import write_value
from nalar_mq.messages import Running, decode_running, encode_record
from nalar_mq.transport import Kept, Ledger, ObjectStore, QueueMessage, Transport, WorkQueue

T = TypeVar("T")

MESSAGE_ID: Final = "Nats-Msg-Id"
JOB_ID: Final = "Nalar-Job-Id"
TENANT: Final = "Nalar-Tenant"
_SEQUENCE: Final = "Nalar-Sequence"
RESULTS_KEPT_S: Final = 7 * 24 * 3600.0
_OF_THE_QUEUE: Final = re.compile(r"job-[0-9]+")
_HEADER_ROOM: Final = 4096
_CAUSE_SHOWN: Final = 800
_TEXT_KEPT: Final = 16_384
VALUE_LIMIT_BYTES: Final = 1024 * 1024 * 1024  # of a value, as JSON
_LOOK_AGAIN_S: Final = 5.0
_SOON_S: Final = 0.005
_RETRY_S: Final = 0.5
_KINDS: Final = {"agent": "an agent", "tool": "a tool"}

State = Literal["done", "failed", "cancelled"]
Phase = Literal["queued", "running", "done", "failed", "cancelled"]


class JobError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a job failed: the name of the exception's type, its text, and the line of the program that raised it, if known."""

    type: str
    message: str
    where: str = ""


class Timings(msgspec.Struct, frozen=True):
    """When and how long: `finished_at` in ISO 8601 and UTC; `ran_s` of the last attempt."""

    finished_at: str = ""
    ran_s: float = 0.0
    attempts: int = 1


class ValueAt(msgspec.Struct, frozen=True):
    """Where the value of a job is that is larger than a message: an object that holds it as JSON; `sha256` in hexadecimal."""

    bucket: str
    object: str
    size_bytes: int
    sha256: str


class JobResult(msgspec.Struct, frozen=True):
    """What lies on `NS.result.<id>`, as JSON; `value` or `value_at` only if done, `error` only if failed or cancelled."""

    id: str
    workflow: str
    state: State
    value: Any = msgspec.UNSET
    value_at: ValueAt | msgspec.UnsetType = msgspec.UNSET
    error: JobError | msgspec.UnsetType = msgspec.UNSET
    timings: Timings = Timings()


class Ended(NamedTuple):
    """How a job has ended; `failed` is the number of the message in the queue that has failed, 0 if none has."""

    result: JobResult
    failed: int = 0


class JobStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a job stands; `worker` only while it runs, `error` only if it failed."""

    id: str
    workflow: str
    state: Phase
    worker: str = ""
    failures: int = 0
    error: JobError | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    """A job that could not be done, as it was published, and why.

    Attributes:
        message: its number in the queue, 0 if not known.
        failed_at: in ISO 8601 and UTC, empty if not known.
    """

    key: str
    job: str
    workflow: str
    subject: str
    cause: str
    data: bytes
    sequence: int
    is_cut: bool = False
    message: int = 0
    failed_at: str = ""


class Overview(msgspec.Struct, frozen=True):
    """Jobs by where they stand: how many lie in the queue, by workflow; those that run; the last ones that have ended."""

    queued: dict[str, int]
    running: list[JobStatus]
    ended: list[JobResult]


_results: Final = msgspec.json.Decoder(JobResult)


class Jobs:
    """The jobs of one namespace, as any process may see and change them. Made by `open`.

    Raises (every operation):
        BrokerError: the broker does not answer, or cannot keep what it is asked to.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        queue: WorkQueue,
        results: Ledger,
        dead: Ledger,
        running: Ledger,
        results_kept_s: float,
        is_alive: Callable[[Address], bool],
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self.queue = queue
        self._running = running
        self._results = results
        self._dead = dead
        self._kept_s = results_kept_s
        self._is_alive = is_alive
        self._objects: ObjectStore | None = None
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        transport: Transport,
        subjects: Subjects,
        *,
        results_kept_s: float = RESULTS_KEPT_S,
        is_alive: Callable[[Address], bool] = lambda _: True,
    ) -> Jobs:
        """Opens queue, ledgers and bucket, creating what does not exist; results are kept for `results_kept_s`.

        A job whose worker is not alive, as far as `is_alive` knows, waits for another one.
        """
        queue, results, dead, running = await asyncio.gather(
            transport.work_queue(subjects.jobs_queue, [subjects.job("*"), subjects.job("*", "*")]),
            transport.ledger(subjects.results_ledger, [subjects.result("*")], max_age_s=results_kept_s, per_subject=1),
            transport.ledger(subjects.dead_ledger, [subjects.dead("*")], per_subject=1),
            transport.ledger(subjects.running_ledger, [subjects.running("*")], per_subject=1),
        )
        return cls(transport, subjects, queue, results, dead, running, results_kept_s, is_alive)

    # Publishing.

    async def submit(self, workflow: str, payload: bytes, job_id: str = "", tenant: str = "") -> str:
        """Makes a job of a payload as `interchange` describes it, on behalf of a tenant; returns its id once the broker has it.

        An id that is known already adds nothing. After an error the job may be there all the same; to submit it again
        under the same id is safe.

        Raises:
            AddressError: workflow, id or tenant are no tokens.
            ValueTooLargeError: the payload is larger than one message, which has to have room for it also as a dead letter.
        """
        check_token(workflow, "workflow")
        self._check_size(workflow, len(payload))
        id = job_id_of({MESSAGE_ID: job_id}, 0) if job_id else random_token("j")
        headers = {TENANT: check_token(tenant, "tenant")} if tenant else None
        await self.queue.publish(self._subjects.job(workflow, tenant), payload, message_id=id, headers=headers)
        return id

    def _check_size(self, workflow: str, size_bytes: int) -> None:
        limit_bytes = self._transport.max_payload - _HEADER_ROOM
        if size_bytes > limit_bytes:
            raise ValueTooLargeError(
                f"the arguments of a job of {workflow} have {size_bytes:,} bytes as JSON, and {limit_bytes:,} is the most that "
                "one message of the broker has room for: pass a path or a key to the data instead",
                actor=workflow,
                size_bytes=size_bytes,
                limit_bytes=limit_bytes,
            )

    # How it ends.

    async def result(self, id: str) -> JobResult | None:
        """How a job has ended, or None if it has not, or if it is not known any more."""
        ended = await self.ended(id)
        return None if ended is None or await self._goes_on(id, ended) else ended.result

    async def _goes_on(self, id: str, ended: Ended) -> bool:
        """True if what has failed was published again since, and is in somebody's hands: then that was written late."""
        held = await self.holder(id) if ended.failed else None
        if held is None or held[0].sequence <= ended.failed:
            return False
        after = held[0].sequence - 1
        found = await self.queue.read(self._subjects.job(">"), after=after, limit=1)
        return any(kept.sequence == after + 1 and sequence_in(kept.headers) >= ended.failed for kept in found)

    async def ended(self, id: str) -> Ended | None:
        """What lies there of how it has ended, with what has failed if it has."""
        kept = await self._results.last(self._subjects.result(check_token(id, "job id")))
        return None if kept is None else Ended(read_result(kept.data), sequence_in(kept.headers))

    async def wait(self, id: str) -> JobResult:
        """How a job ends, as soon as it does; waits while the broker is away.

        Raises:
            BrokerError: the connection has been closed.
        """
        arrived = asyncio.Event()
        subject = self._subjects.result(check_token(id, "job id"))
        subscription = await self.patiently(lambda: self._transport.subscribe(subject, lambda _: arrived.set()))
        try:
            look_again_s = _LOOK_AGAIN_S
            while True:
                arrived.clear()
                found = await self.patiently(lambda: self.result(id))
                if found is not None:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(look_again_s):
                        await arrived.wait()
                # Listeners hear of a result before the broker has stored it, and of one that it then refuses, too.
                look_again_s = _SOON_S if arrived.is_set() else min(_LOOK_AGAIN_S, 2 * look_again_s)
        finally:
            await subscription.unsubscribe()

    async def patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Repeats an operation until the broker has answered it.

        Raises:
            BrokerAuthError, BrokerFeatureError, KeyConflictError, ObjectDamagedError: trying again would not help.
            BrokerError: `close` has been called.
        """
        while True:
            try:
                return await operation()
            except (BrokerAuthError, BrokerFeatureError, KeyConflictError, ObjectDamagedError):
                raise
            except BrokerError:
                if self._is_closed:
                    raise
                await asyncio.sleep(_RETRY_S)

    def close(self) -> None:
        """Nobody waits for the broker any more."""
        self._is_closed = True

    async def whole(self, result: JobResult) -> JobResult:
        """The result with its value in it, wherever that lies; a broker that is away is waited for.

        Raises:
            ValueLostError: the value is large, and missing or damaged.
        """
        if not result.value_at:
            return result
        value = await self._value_at(result.id, result.value_at)
        return msgspec.structs.replace(result, value=value, value_at=msgspec.UNSET)

    async def _value_at(self, id: str, at: ValueAt) -> Any:
        async def get() -> bytes | None:
            return await (await self._open_objects()).get(at.object)

        def read(data: bytes | None) -> Any:
            if data is None or hashlib.sha256(data).hexdigest() != at.sha256:
                raise ObjectDamagedError(at.object)
            return msgspec.json.decode(data)

        try:
            return await asyncio.to_thread(read, await self.patiently(get))
        except (ObjectDamagedError, msgspec.DecodeError, RecursionError):
            text = f"the value of job {id!r}, {at.size_bytes:,} bytes, is missing or damaged in the object store {at.bucket!r}"
            raise ValueLostError(text, name=at.object) from None

    async def _open_objects(self) -> ObjectStore:
        if self._objects is None:
            self._objects = await self._transport.object_store(self._subjects.results_bucket, max_age_s=self._kept_s)
        return self._objects

    async def forget_result(self, id: str, *, failed: int = 0) -> bool:
        """Removes what lies where the result of a job belongs; what comes there meanwhile stays.

        Args:
            id: of the job.
            failed: only the failure of the message of that number, if it is one; all else stays, and this returns False.
        """
        kept = await self._results.last(self._subjects.result(id))
        if kept is None:
            return True
        if failed and sequence_in(kept.headers) != failed:
            return False
        await self._results.purge(self._subjects.result(id), below=kept.sequence + 1)
        with contextlib.suppress(WireError):
            if at := read_result(kept.data).value_at:
                await (await self._open_objects()).delete(at.object)
        return True

    async def finish(self, result: JobResult, *, failed: int = 0) -> bool:
        """Ends a job; False if it has ended already, and this is dropped.

        Args:
            result: how it has ended.
            failed: the number of the message in the queue that has failed, if it has.

        Raises:
            ValueTooLargeError: the value is larger than what can be kept.
        """
        data = msgspec.json.encode(result)
        if len(data) <= self._transport.max_payload - _HEADER_ROOM:
            return await self._append(result.id, data, failed)
        apart = await self._with_value_apart(result)
        if await self._append(result.id, msgspec.json.encode(apart)):
            return True
        ended = await self.result(result.id)
        if apart.value_at and (ended is None or ended.value_at != apart.value_at):
            await (await self._open_objects()).delete(apart.value_at.object)
        return False

    async def _append(self, id: str, data: bytes, failed: int = 0) -> bool:
        headers = {_SEQUENCE: str(failed)} if failed else None
        try:
            await self._results.append(self._subjects.result(id), data, last=0, headers=headers)
        except KeyConflictError:
            return False
        return True

    async def _with_value_apart(self, result: JobResult) -> JobResult:
        """The same with its value as an object; the same value gets the same name, however often this is tried."""
        value = await asyncio.to_thread(msgspec.json.encode, result.value)
        if len(value) > VALUE_LIMIT_BYTES:
            text = f"the result of {result.workflow} has {len(value):,} bytes as JSON; {VALUE_LIMIT_BYTES:,} can be kept"
            raise ValueTooLargeError(text, actor=result.workflow, size_bytes=len(value), limit_bytes=VALUE_LIMIT_BYTES)
        digest = (await asyncio.to_thread(hashlib.sha256, value)).hexdigest()
        at = ValueAt(self._subjects.results_bucket, f"{result.id}.{digest[:32]}", len(value), digest)
        await (await self._open_objects()).put(at.object, value)
        return msgspec.structs.replace(result, value=msgspec.UNSET, value_at=at)

    async def cancel(self, id: str, reason: str = "cancelled by a client") -> bool:
        """Ends a job without a value, whether it runs or not; False if it had ended.

        It counts from now on. What runs is told to stop, and is not heard if it does not.

        Raises:
            UnknownJobError: there is no such job.
        """
        status = await self.status(id)
        cancelled = JobResult(id, status.workflow, "cancelled", error=JobError("CallCancelledError", reason))
        while not await self.finish(cancelled):
            ended = await self.ended(id)
            if ended is not None and not await self._goes_on(id, ended):
                return False
            if ended is not None:
                await self.forget_result(id, failed=ended.failed)
        self._transport.publish(self._subjects.cancel(id), reason.encode())
        with contextlib.suppress(BrokerError):  # it has ended; its next holder does the rest
            await self._take_out_ended(id)
        return True

    async def _take_out_ended(self, id: str) -> None:
        """Takes a job that has ended out of the queue, unless somebody has it in hand, who does that."""
        held = await self.holder(id)
        if held is None:
            waiting = await self._find_queued(id)
            if waiting is not None:
                await self.queue.remove(waiting.sequence)
        elif not self._runs(held[0]):
            await self.release(held[1])
            await self.queue.remove(held[0].sequence)

    # Looking.

    async def status(self, id: str) -> JobStatus:
        """Where a job stands; looks through the queue for one that has not begun.

        Raises:
            UnknownJobError: there is no such job, or its result is not kept any more.
        """
        result = await self.result(id)
        if result is None:
            held = await self.holder(id)
            if held is not None:
                return self._status_of(id, held[0])
            waiting = await self._find_queued(id)
            result = None if waiting is not None else await self.result(id)
            if waiting is not None:
                return JobStatus(id, self.workflow_of(waiting.subject), "queued")
        if result is None:
            raise UnknownJobError(id)
        return JobStatus(id, result.workflow, result.state, error=result.error or None)

    def _runs(self, held: Running) -> bool:
        return bool(held.name) and self._is_alive(Address(held.name, held.incarnation))

    def _status_of(self, id: str, held: Running) -> JobStatus:
        runs = self._runs(held)
        return JobStatus(id, held.workflow, "running" if runs else "queued", held.name if runs else "", held.failures)

    async def holder(self, id: str) -> tuple[Running, int] | None:
        """The record of a job that runs or waits for another attempt, and its revision."""
        kept = await self._running.last(self._subjects.running(id))
        return None if kept is None else (_read_running(kept), kept.sequence)

    async def hold(self, id: str, record: Running, revision: int) -> int:
        """Writes the record of a job whose present one has that revision, 0 meaning none; returns the new revision.

        Raises:
            KeyConflictError: somebody else has written it.
        """
        return await self._running.append(self._subjects.running(id), encode_record(record), last=revision)

    async def records(self) -> list[tuple[str, Running, int]]:
        """All records, as id, record and revision."""
        held = _pages(self._running.read, self._subjects.running("*"))
        return [(kept.subject.rpartition(".")[2], _read_running(kept), kept.sequence) async for kept in held]

    async def release(self, revision: int) -> bool:
        """Removes the record of that revision; False if it has been removed or replaced."""
        return await self._running.remove(revision)

    async def is_queued(self, sequence: int) -> bool:
        """True while the message of that number is in the queue, in somebody's hands or not."""
        return await self.queue.holds(sequence)

    async def _find_queued(self, id: str) -> Kept | None:
        async for message in _pages(self.queue.read, self._subjects.job(">")):
            with contextlib.suppress(AddressError):  # whoever takes it in finds that it is no job
                if job_id_of(message.headers, message.sequence) == id:
                    return message
        return None

    async def overview(self, limit: int = 50) -> Overview:
        """All jobs that have not ended, by counts, and the last `limit` that have."""
        counts = await self.queue.subjects()
        running = [self._status_of(id, held) for id, held, _ in await self.records()]
        ended: list[JobResult] = []
        async for kept in _pages(self._results.read, self._subjects.result("*")):
            ended.append(read_result(kept.data))
            if len(ended) > 2 * limit:
                del ended[:-limit]
        queued = Counter[str]()
        for subject, count in sorted(counts.items()):
            queued[self.workflow_of(subject)] += count
        return Overview(dict(queued), running, ended[-limit:] if limit else [])

    def workflow_of(self, subject: str) -> str:
        """The workflow in a subject of jobs."""
        return self._words_of(subject)[0]

    def kind_of(self, subject: str) -> str:
        """The pattern of all subjects on which there are jobs of the same workflow, of some tenant or of none."""
        workflow, tenant = self._words_of(subject)
        return self._subjects.job(workflow, "*" if tenant else "")

    def tenant_of(self, subject: str, headers: Mapping[str, str]) -> str:
        """On whose behalf a job runs; empty for nobody's.

        Raises:
            MalformedMessageError: what subject and header say differs, or is no tenant.
        """
        tenant, repeated = self._words_of(subject)[1], headers.get(TENANT, "")
        if tenant != repeated:
            said = f"{subject!r} with the header {TENANT}: {repeated}" if repeated else f"{subject!r} without {TENANT}"
            raise MalformedMessageError(f"whose job it is says its subject, and the header {TENANT} the same: not {said}")
        if tenant and not is_token(tenant):
            raise MalformedMessageError(f"{tenant!r} is no tenant: letters, digits, - and _ make one")
        return tenant

    def _words_of(self, subject: str) -> tuple[str, str]:
        workflow, _, tenant = subject.removeprefix(self._subjects.job("")).partition(".")
        return workflow, tenant

    # Dead letters.

    async def bury(self, message: QueueMessage, id: str, error: BaseException) -> None:
        """Keeps what was published, with the cause, unless that has been done."""
        workflow, subject = self.workflow_of(message.subject), message.subject
        try:
            self.tenant_of(subject, message.headers)
        except MalformedMessageError:
            subject = self._subjects.job(workflow)  # tried again, it is nobody's
        headers = {
            "Nalar-Workflow": workflow,
            "Nalar-Subject": subject,
            "Nalar-Cause": _cause(error),
            "Nalar-Failed-At": datetime.now(UTC).isoformat(timespec="milliseconds"),
            _SEQUENCE: str(message.sequence),
        }
        if id:
            headers[JOB_ID] = id
        data, room = message.data, self._transport.max_payload - _HEADER_ROOM
        if len(data) > room:
            data = data[:room]
            headers["Nalar-Cut-From-Bytes"] = str(len(message.data))
        letter = self._subjects.dead(id or f"seq-{message.sequence}")
        while True:
            former = await self._dead.last(letter)
            if former is not None and sequence_in(former.headers) == message.sequence:
                return
            if not await self.is_queued(message.sequence):
                return  # it has been written, and somebody has removed it since
            with contextlib.suppress(KeyConflictError):
                await self._dead.append(letter, data, last=0 if former is None else former.sequence, headers=headers)
                return

    async def dead_letters(self) -> AsyncIterator[DeadLetter]:
        """All of them, oldest first."""
        async for kept in _pages(self._dead.read, self._subjects.dead("*")):
            yield _dead_letter(kept)

    async def dead_letter(self, key: str) -> DeadLetter | None:
        """One of them by the last token of its subject: the job's id, or `seq-<number>`."""
        kept = await self._dead.last(self._subjects.dead(check_token(key, "key of a dead letter")))
        return None if kept is None else _dead_letter(kept)

    async def retry(self, letter: DeadLetter) -> bool:
        """Publishes a dead letter again, under the id of its job if it has one, and removes it.

        Nothing is published if the job has ended since that message failed, as somebody has done so before: then this is False.

        Raises:
            ValueTooLargeError: it was too large to be kept whole.
        """
        if letter.is_cut:
            raise ValueTooLargeError(f"dead letter {letter.key!r} was too large to be kept whole, so it cannot be retried")
        await self._take_out(letter)
        is_to_run = not letter.job or await self.forget_result(letter.job, failed=letter.message)
        if is_to_run:
            headers = {JOB_ID: letter.job} if letter.job else {}
            if letter.message:
                headers[_SEQUENCE] = str(letter.message)
            if tenant := self._words_of(letter.subject)[1]:
                headers[TENANT] = tenant
            await self.queue.publish(letter.subject, letter.data, headers=headers)
        await self._remove(letter)
        return is_to_run

    async def drop(self, letter: DeadLetter) -> None:
        """Removes a dead letter; one that has come under its key since stays."""
        await self._take_out(letter)
        await self._remove(letter)

    async def _take_out(self, letter: DeadLetter) -> None:
        """Takes the message that has failed out of the queue, if whoever had it died before doing so."""
        if letter.message:
            await self.queue.remove(letter.message)

    async def _remove(self, letter: DeadLetter) -> None:
        await self._dead.purge(self._subjects.dead(letter.key), below=letter.sequence + 1)


async def is_tried_again(transport: Transport, subjects: Subjects, id: str, failed: int) -> bool:
    """True if somebody has a later message of a job in hand than the one that has failed: what the job has is still needed."""
    if not failed:
        return False
    running = await transport.ledger(subjects.running_ledger, [subjects.running("*")], per_subject=1)
    kept = await running.last(subjects.running(id))
    return kept is not None and _read_running(kept).sequence > failed


async def check_durable(transport: Transport) -> None:
    """Returns unless the broker is known to lose jobs with its power; what it does not let us know is assumed.

    Raises:
        BrokerFeatureError: it acknowledges what it has not synced to disk.
    """
    if await transport.syncs() is False:
        raise BrokerFeatureError(
            f"the broker at {transport.url} acknowledges jobs before they are on its disk: set `jetstream {{ sync_interval: "
            "always }` there, or accept that a power failure loses jobs by --trust-broker or NALAR_TRUST_BROKER=1"
        )


class JobHandle:
    """A job as its client sees it. Made by `Client.submit` and `Client.job`; what it does is asynchronous.

    To await the handle itself gives the handle.
    """

    def __init__(self, open_jobs: Callable[[], Awaitable[Jobs]], id: str) -> None:
        self._open_jobs = open_jobs
        self.id = check_token(id, "job id")

    def __await__(self) -> Generator[Any, None, JobHandle]:
        async def opened() -> JobHandle:
            await self._open_jobs()
            return self

        return opened().__await__()

    async def result(self, timeout: float | None = None) -> Any:
        """The job's value, as JSON has it: dicts, lists, texts, numbers.

        Args:
            timeout: seconds to wait at most; the job goes on after that.

        Raises:
            RemoteError: it failed; `type_name` says with what.
            CallCancelledError: somebody cancelled it.
            ValueLostError: its value is large, and missing or damaged.
            CallTimeoutError: it has not ended within `timeout`.
        """
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                jobs = await self._open_jobs()
                return value_of(await jobs.whole(await jobs.wait(self.id)))
        except TimeoutError:
            if not limit.expired():
                raise
            raise CallTimeoutError(f"job {self.id!r} had no result after {timeout} s; it goes on") from None

    async def status(self) -> JobStatus:
        """Where it stands.

        Raises:
            UnknownJobError: there is no such job, or its result is not kept any more.
        """
        return await (await self._open_jobs()).status(self.id)

    async def cancel(self) -> bool:
        """Ends it without a value, whether it runs or not; False if it had ended.

        Raises:
            UnknownJobError: there is no such job.
        """
        return await (await self._open_jobs()).cancel(self.id)

    def __repr__(self) -> str:
        return f"<job {self.id}>"


def no_workflow(name: str, kind: str) -> UnknownActorError:
    """What to say of a job of an actor that is no workflow."""
    what = f"{name!r} is no workflow but {_KINDS.get(kind, kind)}"
    return UnknownActorError(f"{what}: jobs are calls of workflows; `call` it, or have a workflow do so", actor=name)


def job_id_of(headers: Mapping[str, str], sequence: int) -> str:
    """The id of a job.

    Raises:
        AddressError: the one it was given is not allowed.
    """
    taken_up = headers.get(JOB_ID)
    if taken_up:
        return check_token(taken_up, "job id")
    given = headers.get(MESSAGE_ID)
    if given and _OF_THE_QUEUE.fullmatch(given):
        raise AddressError(f"job id {given!r} is not allowed: job-<number> are the ids of jobs that were given none")
    return check_token(given, "job id") if given else f"job-{sequence}"


def value_of(result: JobResult) -> Any:
    """The value of a job that is done, from its whole result.

    Raises:
        RemoteError: it failed.
        CallCancelledError: it was cancelled.
    """
    if result.state == "done":
        return None if result.value is msgspec.UNSET else result.value
    error = result.error or JobError("", "")
    if result.state == "cancelled":
        raise CallCancelledError(f"job {result.id!r}: {error.message}", actor=result.workflow, started=True)
    text = f"job {result.id!r} failed: {error.type}: {error.message}"
    failed = RemoteError(text, actor=result.workflow, type_name=error.type)
    failed.is_of_job, failed.where = True, error.where
    raise failed


def write_job_value(value: object) -> msgspec.Raw:
    """A value as it stands in a result.

    Raises:
        ValueError: it contains itself or is nested too deeply.
    """
    return msgspec.Raw(write_value(value))


def read_result(data: bytes) -> JobResult:
    """Reads what lies on a result subject.

    Raises:
        MalformedMessageError: it is no result.
    """
    try:
        return _results.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedMessageError(f"not the result of a job: {error}") from None


def _read_running(kept: Kept) -> Running:
    """The record, or one that names nobody if it cannot be read: then the job may be taken over."""
    try:
        return decode_running(kept.data)
    except WireError:
        return Running(0, "", 0, 0, "")


def _cause(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {plain_text(error)}".split())[:_CAUSE_SHOWN]


def plain_text(error: BaseException) -> str:
    """An error's text as any program can read it, cut where it is very long."""
    return str(error)[:_TEXT_KEPT].encode("utf-8", "replace").decode()


def _dead_letter(kept: Kept) -> DeadLetter:
    headers = kept.headers
    return DeadLetter(
        kept.subject.rpartition(".")[2],
        headers.get(JOB_ID, ""),
        headers.get("Nalar-Workflow", ""),
        headers.get("Nalar-Subject", ""),
        headers.get("Nalar-Cause", ""),
        kept.data,
        kept.sequence,
        "Nalar-Cut-From-Bytes" in headers,
        sequence_in(headers),
        headers.get("Nalar-Failed-At", ""),
    )


def sequence_in(headers: Mapping[str, str]) -> int:
    """The number of the message that has failed, as a result, a dead letter or its successor says it; 0 if it does not."""
    said = headers.get(_SEQUENCE, "")
    return int(said) if said.isascii() and said.isdigit() else 0


async def _pages(read: Callable[..., Any], subject: str) -> AsyncIterator[Kept]:
    after = 0
    while page := await read(subject, after=after):
        for kept in page:
            yield kept
        after = page[-1].sequence
