"""Takes jobs out of the queue and has them run: the part of a worker that serves `NS.job.<workflow>`.

Life of a job in here, each step waiting for the broker for as long as it is away:

    pulled ──▶ recorded in NS-running ──▶ has it ended? ──▶ runs ──▶ result ──▶ record removed ──▶ out of the queue
                 │                          │                 │
                 │                          │                 └─ failed, and may be tried again: back into the queue for a
                 │                          │                    while, the record saying how often it has failed
                 │                          └─ yes: a dead letter, if it was this message that failed and there is none
                 │                             (`jobs`), then out of the queue
                 └─ somebody alive runs it, under this message or another one: back into the queue, to be looked at again,
                    unless it has ended; that is how a job is run by one process at a time although the queue gives a message
                    to another worker when its holder is silent

Whether it has ended is looked up after it is recorded: before, it may end, and its former record be removed, in between.
A message that had been in other hands before is not run if it is not in the queue after that.

What a worker has in hand is bounded: it pulls only what it has room for. While a job runs, its message is kept from other
workers by heartbeats; if those fail because the worker's loop is blocked or the broker away, the record does the same, for
as long as the worker's lease lives.

A job that is run again, here or elsewhere, is the same call under the same id (`history`): if it still runs somewhere, this
worker waits for it there, and if not, it finds again what it had done. Only when the memory of a session that it used is
lost, it begins another life, which knows nothing of the former ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from random import Random
from typing import Any, Final

import msgspec

from nalar_mq.actor import ActorSpec
from nalar_mq.address import Address, Subjects
from nalar_mq.call_context import CallContext, CallOptions, Root
from nalar_mq.calls import JOB_RETRIES, Calls
from nalar_mq.errors import (
    AddressError,
    ArgumentError,
    BrokerError,
    BrokerFeatureError,
    KeyConflictError,
    MalformedMessageError,
    NalarError,
    RemoteError,
    StateLostError,
    UnknownActorError,
    ValueTooLargeError,
    WireError,
    WorkerLostError,
    WorkflowChangedError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.exits import raised_at
from nalar_mq.future import Future
from nalar_mq.history import Memory, losses_in, root_id
from nalar_mq.interchange import read_arguments
from nalar_mq.jobs import (
    Ended,
    JobError,
    JobResult,
    Jobs,
    Timings,
    check_durable,
    job_id_of,
    no_workflow,
    plain_text,
    sequence_in,
    write_job_value,
)
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Running
from nalar_mq.placement import RoutingTable
from nalar_mq.transport import Delivered, QueueMessage, Subscription, Transport

_log = logger(__name__)


class IntakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How jobs are taken in.

    Attributes:
        at_once: jobs of one workflow that a worker has in hand at most; fewer if the workflow's concurrency is lower.
        ack_wait_s: a message whose holder has been silent for this long is given to another worker.
        look_again_s: pause before a message is looked at again whose job somebody else runs.
        losses: how often the worker of a job may be lost before the job is given up, unless it has got further meanwhile.
        unserved_s: jobs of a workflow that nobody has served for this long go to the dead letters.
        no_workflow_s: pause between two looks for jobs of what is served but is no workflow; those that are there both times
            go to the dead letters.
        back_off_s: pause before the second attempt of a failed job; twice that before the third, and so on.
    """

    at_once: int = 64
    ack_wait_s: float = 4.0
    look_again_s: float = 1.0
    losses: int = 8
    unserved_s: float = 900.0
    no_workflow_s: float = 30.0
    back_off_s: float = 1.0


_BATCH: Final = 16
_BEATS: Final = 5  # heartbeats in the time that the queue waits for one
_BEATS_A_LOOK: Final = 3
_PULL_S: Final = 10.0
_RETRY_S: Final = 1.0
_BACK_OFF_MAX_S: Final = 60.0


class _Job:
    """One job in the hands of this worker."""

    __slots__ = (
        "begun",
        "excused",
        "failures",
        "future",
        "id",
        "is_parked",
        "life",
        "losses",
        "lost",
        "message",
        "revision",
        "seen",
        "spec",
    )

    def __init__(self, spec: ActorSpec, message: QueueMessage) -> None:
        self.spec = spec
        self.message = message
        self.id = ""
        self.revision = 0
        self.failures = 0
        self.losses = 0
        self.excused = 0
        self.seen = 0
        self.begun = 0
        self.life = 0
        self.lost: tuple[str, ...] = ()
        self.future: Future[Any] | None = None
        self.is_parked = False


class Intake:
    """The jobs of one worker, from `start` to `aclose`.

    Args:
        specs: what the worker serves; of these the workflows are taken.
        calls: makes the calls; who takes a job in need not be who runs it.
        transport, subjects, table, me, random: of the process.
        remember: what former attempts at a job have done, given its id and the processes that were lost.
        is_gone: judges a process that is not in the table.
        until_current: returns while nobody can hold this process to be lost.
        trust_broker: jobs are taken even from a broker that is known not to sync.
        options: how much and how long.
    """

    def __init__(
        self,
        specs: Mapping[str, ActorSpec],
        calls: Calls,
        transport: Transport,
        subjects: Subjects,
        table: RoutingTable,
        me: Address,
        random: Random,
        *,
        remember: Callable[[str, tuple[str, ...]], Awaitable[Memory]],
        is_gone: Callable[[Address], Awaitable[bool]],
        until_current: Callable[[], Awaitable[None]],
        trust_broker: bool = False,
        options: IntakeOptions | None = None,
    ) -> None:
        self._workflows = [spec for spec in specs.values() if spec.kind == "workflow"]
        self._calls = calls
        self._transport = transport
        self._subjects = subjects
        self._table = table
        self._me = me
        self._random = random
        self._remember = remember
        self._is_gone = is_gone
        self._until_current = until_current
        self._trust_broker = trust_broker
        self._options = options or IntakeOptions()
        self._loop = asyncio.get_running_loop()
        self._in_hand: dict[str, int] = {spec.name: 0 for spec in self._workflows}
        self._running: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._returning: set[asyncio.Task[None]] = set()
        self._pullers: list[asyncio.Task[None]] = []
        self._upkeep: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None
        self._changed = asyncio.Event()
        self._unserved_since: dict[str, float] = {}
        self._failing: set[str] = set()  # subjects of which nothing can be pulled
        self._failing_since_s = 0.0
        self._is_closing = False
        self.jobs: Jobs

    async def start(self) -> None:
        """Begins to pull. When it returns, what any client publishes is kept.

        On a broker that is known not to sync, and not trusted, no jobs are taken: the log says so.

        Raises:
            BrokerError: the broker does not answer.
        """
        try:
            if not self._trust_broker:
                await check_durable(self._transport)
        except BrokerFeatureError as error:
            _log.error("jobs.refused", reason=str(error))
            return
        self.jobs = await Jobs.open(self._transport, self._subjects)
        self._calls.on_parked = self._on_call_parked
        self._subscription = await self._transport.subscribe(self._subjects.cancel("*"), self._on_cancel)
        subjects = [(spec, self._subjects.job(spec.name, tenant)) for spec in self._workflows for tenant in ("", "*")]
        self._pullers = [self._loop.create_task(self._pull(spec, subject)) for spec, subject in subjects]
        self._upkeep = [self._loop.create_task(work) for work in (self._keep_in_hand(), self._sweep(), self._turn_away())]

    @property
    def in_hand(self) -> int:
        """Jobs that this worker has taken and not yet ended or given back."""
        return len(self._tasks)

    @property
    def at_work(self) -> int:
        """The same without those that wait for nothing but people or time."""
        return sum(not job.is_parked for job in self._running.values())

    async def stop_taking(self) -> None:
        """Takes nothing more; what it has in hand goes on."""
        await cancel_all(self._pullers)
        await self._until_put_back()

    async def aclose(self) -> None:
        """Gives back what has not ended; idempotent."""
        self._is_closing = True
        if hasattr(self, "jobs"):
            self.jobs.close()
        await cancel_all([*self._pullers, *self._upkeep])
        await self._until_put_back()
        await cancel_all([*self._tasks, *self._returning])
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    # Pulling.

    async def _pull(self, spec: ActorSpec, subject: str) -> None:
        limit = min(spec.concurrency, self._options.at_once)
        while True:
            room = limit - self._in_hand[spec.name]
            if room <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                messages = await self.jobs.queue.pull(
                    subject, batch=min(room, _BATCH), timeout_s=_PULL_S, ack_wait_s=self._options.ack_wait_s
                )
            except BrokerError as error:
                self._cannot_pull(subject, error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._has_pulled(subject)
            room = max(limit - self._in_hand[spec.name], 0)  # some of it may have gone to those of the other subject meanwhile
            for message in messages[:room]:
                self._take(spec, message)
            for message in messages[room:]:
                task = self._loop.create_task(self._put_back(message))
                self._returning.add(task)
                task.add_done_callback(self._returning.discard)

    def _cannot_pull(self, subject: str, error: BrokerError) -> None:
        """Says it once in an outage, whichever of the subjects it hits first."""
        if not self._failing:
            self._failing_since_s = self._loop.time()
            _log.warning("jobs.pull_failed", worker=self._me.name, reason=str(error), hint="it is tried until it succeeds")
        self._failing.add(subject)

    def _has_pulled(self, subject: str) -> None:
        if subject in self._failing:
            self._failing.discard(subject)
            if not self._failing:
                after_s = round(self._loop.time() - self._failing_since_s, 1)
                _log.warning("jobs.pulled_again", worker=self._me.name, after_s=after_s)

    async def _put_back(self, message: QueueMessage) -> None:
        with contextlib.suppress(BrokerError):
            await message.nak(0.0)

    async def _until_put_back(self) -> None:
        if self._returning:
            await asyncio.wait(self._returning, timeout=_RETRY_S)

    def _take(self, spec: ActorSpec, message: QueueMessage) -> None:
        self._in_hand[spec.name] += 1
        task = self._loop.create_task(self._handle(_Job(spec, message)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, job: _Job) -> None:
        try:
            await self._carry_out(job)
        except BrokerError as error:
            _log.warning("job.interrupted", job=job.id, workflow=job.spec.name, reason=str(error))
        except asyncio.CancelledError:
            await self._give_back(job)
            raise
        except Exception:
            _log.exception("job.crashed", job=job.id, workflow=job.spec.name)
            job.losses += 1
            await self._give_back(job, self._options.back_off_s)
        finally:
            if self._running.get(job.id) is job:
                del self._running[job.id]
            self._on_parked(job, True)

    def _on_parked(self, job: _Job, is_parked: bool) -> None:
        """A job that waits for nothing but people or time leaves room for others, as one that has ended."""
        if job.is_parked != is_parked:
            job.is_parked = is_parked
            self._in_hand[job.spec.name] -= 1 if is_parked else -1
            self._changed.set()

    async def _give_back(self, job: _Job, pause_s: float = 0.0) -> None:
        """Lets another worker have the job soon, rather than when its time in our hands is over; what runs goes on.

        A worker that stops leaves the record as it is: nobody goes on with the job before that worker is gone, and with it
        what its programs could still do.
        """
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                if self._is_closing:
                    await job.message.nak(_RETRY_S)
                elif job.revision:
                    await self._try_again(job, pause_s)
                else:
                    await job.message.nak(pause_s)

    async def _carry_out(self, job: _Job) -> None:
        try:
            job.id = job_id_of(job.message.headers, job.message.sequence)
        except WireError as error:
            await self._reject(job.message, "", error)
            return
        if self._is_here(job):
            return
        await self._until_current()  # who slept through its lease may hold a job that others have ended by now
        is_claimed = await self._claim_at_once(job)
        found = await self.jobs.patiently(lambda: self._ended(job.id, job.message))
        if found is None and not is_claimed:
            if not await self._claim(job):
                return
            # Who had it may have ended it meanwhile.
            found = await self.jobs.patiently(lambda: self._ended(job.id, job.message))
            if found is None and not await self.jobs.patiently(lambda: self.jobs.is_queued(job.message.sequence)):
                await self.jobs.patiently(lambda: self._forget(job))  # it has failed, and somebody has published it again
                return
        if found is not None:
            await self._leave(job, found)
        elif job.losses - job.excused > self._options.losses and not await self._has_got_further(job):
            lost = WorkerLostError(f"its worker was lost {job.losses} times", actor=job.spec.name)
            await self._fail(job, lost, ran_s=0.0)
        else:
            await self._run(job)

    def _is_here(self, job: _Job) -> bool:
        """True if this worker has the job in hand, and was so slow with it that the queue gave the message out again."""
        mine = self._running.setdefault(job.id, job)
        if mine is job or mine.message.sequence != job.message.sequence:
            return False
        mine.message = job.message
        return True

    # Who runs it.

    async def _claim_at_once(self, job: _Job) -> bool:
        """Records that this worker runs a job that nobody has begun, as most are; False says nothing."""
        if job.message.deliveries > 1:
            return False
        try:
            job.revision = await self.jobs.hold(job.id, self._record(job, self._me.name, self._me.incarnation, 0), 0)
        except BrokerError:
            return False
        self._running[job.id] = job
        return True

    async def _claim(self, job: _Job) -> bool:
        """Records that this worker runs the job; False if somebody else does, or this worker does already."""
        me = self._me
        while True:
            held = await self.jobs.patiently(lambda: self.jobs.holder(job.id))
            if held is not None and not await self._may_take_over(job, held[0]):
                return False
            record = self._record(job, me.name, me.incarnation, job.begun)
            try:
                job.revision = await self.jobs.hold(job.id, record, 0 if held is None else held[1])
            except KeyConflictError:
                continue
            except BrokerError:
                # It may have been written: the next look will tell.
                if self._is_closing:
                    raise
                await asyncio.sleep(_RETRY_S)
                continue
            self._running[job.id] = job
            return True

    def _record(self, job: _Job, name: str, incarnation: int, begun: int) -> Running:
        return Running(
            WIRE_VERSION,
            name,
            incarnation,
            job.message.sequence,
            job.spec.name,
            job.failures,
            job.losses,
            begun,
            job.life,
            job.lost,
            job.excused,
            job.seen,
        )

    async def _may_take_over(self, job: _Job, record: Running) -> bool:
        """Judges by the record that is there; a message that must wait is given back."""
        holder = Address(record.name, record.incarnation)
        if record.sequence != job.message.sequence:
            if not self._has_in_hand(job.id, holder) and not await self.jobs.patiently(
                lambda: self.jobs.is_queued(record.sequence)
            ):
                return True
            await job.message.nak(self._options.look_again_s)
            return False
        if holder != self._me and record.name and not await self._has_left(job, holder):
            await job.message.nak(self._options.look_again_s)
            return False
        job.failures, job.life, job.lost = record.failures, record.life, record.lost
        job.losses, job.begun = record.losses, record.begun
        job.excused, job.seen = record.excused, record.seen
        if record.name:
            job.begun += 1
            if holder != self._me:
                job.losses += 1
                job.lost = _with(job.lost, str(holder))
        return True

    def _has_in_hand(self, id: str, holder: Address) -> bool:
        """True if a living process has, or may have, another message of the job in hand, though it be out of the queue."""
        if holder == self._me:
            return (held := self._running.get(id)) is not None and bool(held.revision)
        return self._table.is_alive(holder)

    async def _has_left(self, job: _Job, holder: Address) -> bool:
        if self._table.is_alive(holder):
            return False
        await job.message.in_progress()  # to be sure of a process that nobody here knows takes a lease
        return await self.jobs.patiently(lambda: self._is_gone(holder))

    # Running it.

    async def _run(self, job: _Job) -> None:
        name = job.spec.name
        begun_s = self._loop.time()
        try:
            context = CallContext(self._calls, job=job.id, tenant=self.jobs.tenant_of(job.message.subject, job.message.headers))
            arguments = read_arguments(job.message.data)
            options = CallOptions(retries=0, root=await self._root(job))
            job.future = self._calls.call(context, name, "", tuple(arguments.args), arguments.kwargs, options)
            value = await _as_json(job.future)
        except Exception as error:
            await self._on_error(job, error, self._loop.time() - begun_s)
            return
        done = JobResult(job.id, name, "done", value, timings=self._timings(job, self._loop.time() - begun_s))
        try:
            before = await self._finish(done, job.message)
        except ValueTooLargeError as error:
            await self._fail(job, error, done.timings.ran_s)
            return
        _log.info("job.done" if before is None else "job.ended_elsewhere", job=job.id, workflow=name)
        await self._leave(job, before)

    async def _has_got_further(self, job: _Job) -> bool:
        """True if the job has seen more than when its losses were last excused; now they are, and that is recorded."""
        seen = (await self._remember(job.id, job.lost)).seen
        if seen <= job.seen:
            return False
        job.excused, job.seen = job.losses, seen
        record = self._record(job, self._me.name, self._me.incarnation, job.begun)
        job.revision = await self.jobs.patiently(lambda: self.jobs.hold(job.id, record, job.revision))
        return True

    async def _root(self, job: _Job) -> Root:
        id = root_id(job.id, job.life)
        if not job.begun:
            return Root(id)
        memory = await self._remember(job.id, job.lost)
        return Root(id, job.begun, memory.lost, job.failures, memory.located.get(id))

    async def _on_error(self, job: _Job, error: Exception, ran_s: float) -> None:
        if self._is_closing:
            await self._give_back(job)
        elif isinstance(error, UnknownActorError) and not self._table.replicas(job.spec.name):
            await self._give_back(job, self._options.back_off_s)  # it was taken while this worker began to drain
        elif isinstance(error, StateLostError) and job.losses - job.excused < self._options.losses:
            job.losses += 1
            self._settle(job)
            job.life, job.begun, job.lost, job.seen = job.life + 1, -1, (), 0
            await self._try_again(job, self._options.back_off_s)
        elif _is_lost(error) and (job.losses - job.excused < self._options.losses or await self._has_got_further(job)):
            job.losses += 1
            self._note_losses(job, [loss for loss in losses_in(error) if isinstance(loss, WorkerLostError)])
            self._settle(job, again=True)
            await self._try_again(job, self._options.back_off_s)
        elif (found := await self.jobs.patiently(lambda: self._ended(job.id, job.message))) is not None:
            await self._leave(job, found)
        elif job.failures < job.spec.directives.retries and not _is_hopeless(error, job.spec.name):
            job.failures += 1
            self._settle(job, again=True)
            pause_s = min(_BACK_OFF_MAX_S, self._options.back_off_s * 2 ** (job.failures - 1))
            _log.warning("job.retried", job=job.id, workflow=job.spec.name, failures=job.failures, reason=repr(error))
            await self._try_again(job, pause_s * self._random.uniform(0.5, 1.0))
        else:
            await self._fail(job, error, ran_s)

    def _note_losses(self, job: _Job, losses: list[WorkerLostError]) -> None:
        own = job.future.id.hex() if job.future is not None else ""
        if any(loss.call_id not in ("", own) for loss in losses):
            job.excused -= JOB_RETRIES  # a call of it was lost, which has cost so many workers before
        for worker in [loss.worker for loss in losses if loss.worker]:
            job.lost = _with(job.lost, worker)

    def _settle(self, job: _Job, *, again: bool = False) -> None:
        if job.future is not None:
            self._calls.settle(job.future, again=again)

    async def _try_again(self, job: _Job, pause_s: float) -> None:
        waiting = self._record(job, "", 0, job.begun + 1)
        with contextlib.suppress(KeyConflictError):
            await self.jobs.patiently(lambda: self.jobs.hold(job.id, waiting, job.revision))
        if self._running.get(job.id) is job:
            del self._running[job.id]
        await job.message.nak(pause_s)

    async def _fail(self, job: _Job, error: Exception, ran_s: float) -> None:
        if not await self._still_holds(job):
            _log.warning("job.taken_over", job=job.id, workflow=job.spec.name, reason=repr(error))
            return
        failed = JobResult(job.id, job.spec.name, "failed", error=describe(error), timings=self._timings(job, ran_s))
        _log.warning("job.failed", job=job.id, workflow=job.spec.name, reason=repr(error))
        await self._end_in_failure(failed, job.message, error)
        await self._leave(job, None)

    async def _still_holds(self, job: _Job) -> bool:
        """False if others have taken the job over: while this process stood still they may have ended it, and begun it anew."""
        held = await self.jobs.patiently(lambda: self.jobs.holder(job.id))
        return held is not None and held[1] == job.revision

    async def _end_in_failure(self, failed: JobResult, message: QueueMessage, error: BaseException) -> None:
        """Writes the result and the dead letter, unless the job has ended by something else than this message."""
        before = await self._finish(failed, message, failed=message.sequence)
        if before is not None and before.failed != message.sequence:
            return
        await self.jobs.patiently(lambda: self.jobs.bury(message, failed.id, error))

    async def _finish(self, result: JobResult, message: QueueMessage, *, failed: int = 0) -> Ended | None:
        """Writes the result; how the job had ended before, if it had, and this one is dropped."""
        while not await self.jobs.patiently(lambda: self.jobs.finish(result, failed=failed)):
            before = await self.jobs.patiently(lambda: self._ended(result.id, message))
            if before is not None or not await self.jobs.patiently(lambda: self.jobs.is_queued(message.sequence)):
                return before
        return None

    def _timings(self, job: _Job, ran_s: float) -> Timings:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return Timings(now, round(ran_s, 6), 1 + job.failures + job.losses)

    async def _leave(self, job: _Job, found: Ended | None) -> None:
        """The job has ended: takes it out of everything but the results.

        `found` is a result that was there when the message came: if it is the failure of this message, who wrote it may have
        died before it wrote the dead letter.
        """
        if found is not None and found.failed == job.message.sequence and (said := found.result.error):
            error = RemoteError(said.message, type_name=said.type)
            await self.jobs.patiently(lambda: self.jobs.bury(job.message, job.id, error))
        self._settle(job)
        await self.jobs.patiently(lambda: self._forget(job))
        await job.message.ack()

    async def _forget(self, job: _Job) -> None:
        held = (await self.jobs.holder(job.id)) if not job.revision else None
        if held is not None and held[0].sequence != job.message.sequence:
            return
        revision = held[1] if held is not None else job.revision
        if revision:
            await self.jobs.release(revision)

    async def _reject(self, message: QueueMessage, id: str, error: NalarError) -> None:
        """What cannot be run goes to the dead letters; who waits for it learns why."""
        workflow = self.jobs.workflow_of(message.subject)
        _log.warning("job.rejected", job=id, workflow=workflow, sequence=message.sequence, reason=str(error))
        if id:
            rejected = JobResult(id, workflow, "failed", error=describe(error), timings=Timings(attempts=0))
            await self._end_in_failure(rejected, message, error)
        else:
            await self.jobs.patiently(lambda: self.jobs.bury(message, id, error))
        await message.ack()

    # Upkeep.

    def _on_call_parked(self, id: bytes, is_parked: bool) -> None:
        for job in self._running.values():
            if job.future is not None and job.future.id == id:
                self._on_parked(job, is_parked)

    def _on_cancel(self, message: Delivered) -> None:
        job = self._running.get(message.subject.rpartition(".")[2])
        if job is not None and job.future is not None:
            job.future.cancel(message.data.decode("utf-8", "replace") or "cancelled")

    async def _keep_in_hand(self) -> None:
        """Heartbeats, and now and then a look at whether somebody has ended what runs here."""
        for number in itertools.count():
            await asyncio.sleep(self._options.ack_wait_s / _BEATS)
            looks = number % _BEATS_A_LOOK == 0
            await asyncio.gather(*(self._beat(job, looks=looks) for job in list(self._running.values()) if job.revision))

    async def _ended(self, id: str, message: QueueMessage | None = None) -> Ended | None:
        """How a job has ended. What stands there and is no result was not written by us: it goes, and ends nothing.

        So does the failure of the message for which `message`, if it is given, was published again, or of one before that.
        """
        try:
            ended = await self.jobs.ended(id)
        except WireError as error:
            _log.warning("job.result_unreadable", job=id, reason=str(error))
            await self.jobs.forget_result(id)
            return None
        former = sequence_in(message.headers) if message is not None else 0
        if ended is None or not 0 < ended.failed <= former:
            return ended
        await self.jobs.forget_result(id, failed=ended.failed)
        return None

    async def _beat(self, job: _Job, *, looks: bool) -> None:
        try:
            await job.message.in_progress()
            ended = await self._ended(job.id, job.message) if looks else None
        except BrokerError:
            return
        if ended is not None and job.future is not None and self._running.get(job.id) is job:
            job.future.cancel("the job has ended elsewhere")

    async def _sweep(self) -> None:
        """Jobs whose workflow nobody serves go to the dead letters after a while."""
        while True:
            await asyncio.sleep(self._options.unserved_s / 4 * self._random.uniform(0.8, 1.2))
            with contextlib.suppress(BrokerError, WireError):
                for subject in self._long_unserved(await self.jobs.queue.subjects()):
                    await self._clear(subject, self._unserved)
                await self._clear_records()

    async def _clear_records(self) -> None:
        """Removes records of jobs that have ended, left by processes that died after others had ended them.

        While the message is in the queue its next holder does that, who knows whether what lies there has ended it.
        """
        for id, held, revision in await self.jobs.records():
            if self._table.is_alive(Address(held.name, held.incarnation)) or await self.jobs.is_queued(held.sequence):
                continue
            if await self._ended(id) is not None:
                await self.jobs.release(revision)

    def _long_unserved(self, subjects: Mapping[str, int]) -> list[str]:
        now_s = self._loop.time()
        alone = {subject for subject in subjects if not self._table.replicas(self.jobs.workflow_of(subject))}
        unserved = set(map(self.jobs.kind_of, alone))
        self._unserved_since = {subject: self._unserved_since.get(subject, now_s) for subject in unserved}
        return [subject for subject, since_s in self._unserved_since.items() if now_s - since_s >= self._options.unserved_s]

    def _unserved(self, workflow: str) -> UnknownActorError | None:
        if self._table.replicas(workflow):
            return None
        known = ", ".join(spec for spec in self._table.known_actors()) or "nothing"
        text = f"nobody has served {workflow!r} for {self._options.unserved_s:g} s; served are: {known}"
        return UnknownActorError(text, actor=workflow)

    async def _turn_away(self) -> None:
        """Jobs of what is served, but is no workflow, go to the dead letters.

        A name that another app begins to serve as a workflow is known to whoever publishes before it is known here, and one
        whose workers are all started anew is not served for a moment: hence the second look, and the long pause before it.
        """
        suspects: set[str] = set()
        while True:
            await asyncio.sleep(self._options.no_workflow_s * self._random.uniform(0.8, 1.2))
            with contextlib.suppress(BrokerError, WireError):
                found = {self.jobs.kind_of(subject) for subject in await self.jobs.queue.subjects()}
                found = {subject for subject in found if self._other_kind(self.jobs.workflow_of(subject))}
                for subject in found & suspects:
                    await self._clear(subject, self._not_for_jobs)
                suspects = found

    def _other_kind(self, name: str) -> str:
        """What an actor is that somebody serves and nobody as a workflow; else empty."""
        kinds = self._table.kinds(name)
        return "" if "workflow" in kinds or not self._table.replicas(name) else min(kinds)

    def _not_for_jobs(self, name: str) -> UnknownActorError | None:
        kind = self._other_kind(name)
        return no_workflow(name, kind) if kind else None

    async def _clear(self, subject: str, cause: Callable[[str], NalarError | None]) -> None:
        """Rejects all jobs of a subject for as long as there is a `cause`, which is asked again: that takes its time."""
        ack_wait_s, workflow = self._options.ack_wait_s, self.jobs.workflow_of(subject)
        while cause(workflow) is not None:
            messages = await self.jobs.queue.pull(subject, batch=_BATCH, timeout_s=0.0, ack_wait_s=ack_wait_s)
            if not messages:
                return
            for message in messages:
                error, id = cause(workflow), _id_or_nothing(message)
                if error is None:
                    await message.nak(0.0)
                elif id and await self._is_in_hand(id, message):
                    await message.nak(self._options.look_again_s)
                else:
                    await self._reject(message, id, error)

    async def _is_in_hand(self, id: str, message: QueueMessage) -> bool:
        """True if the job has begun under another message: then this one is a double, whatever it says."""
        held = await self.jobs.patiently(lambda: self.jobs.holder(id))
        if held is None or held[0].sequence == message.sequence:
            return False
        return await self.jobs.patiently(lambda: self.jobs.is_queued(held[0].sequence))


async def _as_json(future: Future[Any]) -> msgspec.Raw:
    value = await future
    return write_job_value(value) if future.held() is None else await asyncio.to_thread(write_job_value, value)


def _with(lost: tuple[str, ...], one: str) -> tuple[str, ...]:
    return lost if one in lost else (*lost, one)


def describe(error: BaseException) -> JobError:
    """An error as it stands in a result."""
    name = error.type_name.rpartition(":")[2] if isinstance(error, RemoteError) and error.type_name else type(error).__name__
    return JobError(name, plain_text(error), raised_at(error))


def _is_hopeless(error: BaseException, workflow: str) -> bool:
    """True if another attempt cannot succeed: what was published is no call of the workflow, or it is another one by now."""
    return isinstance(error, MalformedMessageError | WorkflowChangedError) or (
        isinstance(error, ArgumentError) and error.actor == workflow
    )


def _is_lost(error: BaseException) -> bool:
    """True if it is not the workflow that is at fault, but a process that it needed."""
    return isinstance(error, StateLostError) or bool(losses_in(error))


def _id_or_nothing(message: QueueMessage) -> str:
    try:
        return job_id_of(message.headers, message.sequence)
    except AddressError:
        return ""
