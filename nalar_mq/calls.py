"""The calls that this process has made: the table of futures, routing, deadlines, cancellation, and the loss of workers.

Life of an entry, all on the event loop:

    made ──▶ routed ──▶ sent ──▶ ended (Resolve, Fail, deadline, cancelled, worker lost)
      │         │
      │         └─ no replica known: waits until one joins, the grace period or its deadline ends
      └─ the session of a stateful actor has no known place: waits for the key-value store

Who calls from a thread goes through an inbox with one wake-up for many calls; order per thread holds.

A future may stand in the arguments of a further call before it has a value. The caller is then its registry: it tells the
future's executor to push the value straight to the consumer as well (`Consume`), and itself pushes to those consumers that
the executor's `Resolve` does not name. A consumer that waits for long asks (`Want`). So each of the three messages may be
late or miss its addressee, and the value still arrives. Arguments that are too large for a message are such a future, too.

Draining. A worker that drains gives calls back that it has not begun (`Returned`). They go elsewhere at once, and those of a
session in its store when it has left and somebody else has opened that, before all later ones.

Loss. When the incarnation that has a call is lost, a call that was never sent to it is routed anew; one that may have run is
sent again under the same id if it may be retried, and else fails with `WorkerLostError`.

Calls that were passed on after a session are followed by `crossings`. What a job sees of its calls, and when, is the
matter of `witness`. What a call of a job has made and still runs when it ends with an error is cancelled, and it makes no
more. A job that is tried again makes the same calls (`history`): those whose outcome former attempts saw get it without being
sent, those that still run somewhere are sent there, where they have a new owner from then on, and the others run.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from nalar_mq import values
from nalar_mq.actor import label_of
from nalar_mq.address import Address, is_client_name
from nalar_mq.call_context import CallContext, CallOptions, Root
from nalar_mq.channel import Endpoint
from nalar_mq.claims import INLINE_LIMIT_BYTES, MARK, Claims, Held, check_size
from nalar_mq.crossings import Crossings
from nalar_mq.entries import Entry, JobPart, number_of
from nalar_mq.errors import (
    CallCancelledError,
    CallError,
    CallTimeoutError,
    DrainError,
    MigrationError,
    NalarError,
    OwnerLostError,
    UnknownActorError,
    ValueTooLargeError,
    WireError,
    WorkerLostError,
    nobody_serves,
    path_of,
)
from nalar_mq.explanations import Explanations
from nalar_mq.future import Facts, Future, FutureInfo
from nalar_mq.history import History
from nalar_mq.journal import Journal
from nalar_mq.logs import logger
from nalar_mq.lookout import Glance
from nalar_mq.messages import (
    Abandon,
    Accepted,
    ActorInfo,
    Arrived,
    Bequest,
    Call,
    CallRecord,
    Cancel,
    Chunk,
    Consume,
    Credit,
    Crossing,
    Drain,
    Drainage,
    Explanation,
    Fail,
    Forward,
    Forwarded,
    Load,
    Locate,
    Located,
    Message,
    Migrate,
    Migrated,
    Parked,
    Piece,
    Prioritise,
    Probe,
    Release,
    Resolve,
    Returned,
    Settled,
    Taken,
    Thaw,
    Want,
)
from nalar_mq.placement import RoutingTable
from nalar_mq.places import Places
from nalar_mq.questions import Answer, Asker, Question
from nalar_mq.receivers import Draining, Host, Migrating, Resumption
from nalar_mq.threads import LoopInbox
from nalar_mq.witness import Witness, error_in

JOB_RETRIES = 3  # of a call that belongs to a job, after the loss of its worker
GRACE_S = 3.0  # how long a call waits for somebody to serve an actor that nobody serves yet
_FIRST_PAUSE_S = 0.05  # before a call is sent again, doubled with each attempt
_LONGEST_PAUSE_S = 2.0
_CANCEL_GRACE_S = 2.0  # how long the executor has to say whether a cancelled call had started
_TICK_S = 0.05
_HELD_S = 0.1  # before what a process must not begin is looked at again
_CAST_HOLDS_S = 600.0  # how long at most large values are held for a cast
_LONGEST_S = 1e9  # a timeout beyond this, infinity among them, is none: timers cannot hold it
_LABELS_KEPT = 10_000
_log = logger(__name__)


class _Drained:
    """A worker that is drained at the wish of this process."""

    def __init__(self, address: Address, gone: asyncio.Future[Drainage], told: Callable[[Drainage], None] | None) -> None:
        self.address = address
        self.gone = gone
        self._told = told
        self._last = Drainage(b"")

    def hear(self, drainage: Drainage) -> None:
        if drainage.refusal:
            self.fail(drainage.refusal)
            return
        self._last = drainage
        if self._told is not None:
            self._told(drainage)

    def lose(self) -> None:
        if self._last.is_over and not self.gone.done():
            self.gone.set_result(self._last)
        self.fail(f"worker {self.address.name!r} was lost before it had come to the end: drain it again when it is back")

    def fail(self, text: str) -> None:
        if not self.gone.done():
            self.gone.set_exception(DrainError(text, self.address.name))


def _number_at(pair: tuple[Entry, Call | None]) -> int:
    entry, call = pair
    return number_of(entry) if call is None else call.number


class Calls:
    """The calls of one process. Implements `context.Caller`; every method not said to be for any thread is for the loop.

    Attributes:
        in_flight: by actor and process name, calls that were sent there and have not ended.
        on_parked: hears of a job whether it waits for nothing but people or time.
        explanations: what was decided about calls in this process.
    """

    # Of an object with more than 30 attributes Python finds each method, and each attribute, anew.
    __slots__ = (
        "_children",
        "_closed",
        "_crossings",
        "_draining",
        "_endpoint",
        "_entries",
        "_epochs",
        "_grace",
        "_inbox",
        "_labels",
        "_lent",
        "_local",
        "_migrating",
        "_next_tick",
        "_numbers",
        "_places",
        "_random",
        "_root",
        "_session_numbers",
        "_table",
        "_thread_id",
        "_ticking",
        "_unrouted",
        "_unsettled",
        "_wheel",
        "asker",
        "claims",
        "draining",
        "explanations",
        "host",
        "in_flight",
        "journal",
        "loop",
        "me",
        "migrations",
        "on_parked",
        "resumption",
        "witness",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        table: RoutingTable,
        places: Places,
        claims: Claims,
        me: Address,
        random: Random,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.me = me
        self.host: Host | None = None
        self.resumption: Resumption | None = None
        self.journal: Journal | None = None
        self.asker: Asker | None = None
        self.on_parked: Callable[[bytes, bool], None] | None = None
        self._endpoint = endpoint
        self._table = table
        self._places = places
        self.claims = claims
        claims.tell = self.tell
        self._thread_id = threading.get_ident()
        self._random = random
        self._unsettled: dict[bytes, Address] = {}
        self._root = random.getrandbits(64).to_bytes(8, "big")
        self._numbers = itertools.count(1)
        self._epochs = itertools.count(1)
        self._inbox = LoopInbox(self.loop)
        self._entries: dict[bytes, Entry] = {}
        self._crossings = Crossings(self, self._entries, table, places)
        self.witness = Witness(self, self._entries)
        self._children: dict[bytes, dict[bytes, None]] = {}
        self._lent: dict[bytes, tuple[Future[Any], int]] = {}
        self.in_flight: dict[str, dict[str, int]] = {}
        self.explanations = Explanations()
        self._unrouted: dict[str, list[Entry]] = {}
        self._grace: dict[str, asyncio.TimerHandle] = {}
        self._wheel: dict[int, dict[bytes, None]] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._next_tick = 0
        self._session_numbers = itertools.count(1)  # one count for all: a session wants them to grow, gaps do not matter
        self._migrating: dict[bytes, tuple[Address, asyncio.Future[Migrated]]] = {}
        self._draining: dict[bytes, _Drained] = {}
        self.migrations: Migrating | None = None
        self.draining: Draining | None = None
        self._local: list[Message] = []
        self._labels: dict[tuple[str, str], str] = {}
        self._closed: CallError | None = None

    # Making a call (any thread).

    def call(
        self,
        context: CallContext,
        actor: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Future[Any]:
        """Makes a call and returns its future at once. Any thread.

        Raises:
            ValueNotEncodableError, ValueTooLargeError: an argument cannot travel.
        """
        label = self._labels.get((actor, method)) or self._label(actor, method)
        deps: list[values.Deferred] = []
        payload = given = values.encode_arguments(args, kwargs, deps)
        if len(payload) > INLINE_LIMIT_BYTES:
            check_size(f"the arguments of {label}", len(payload), label)
            payload = self._as_future(payload, label, deps, context.job)
        if options.init:
            check_size(f"what {actor!r} is made with", len(options.init), label, limit_bytes=INLINE_LIMIT_BYTES)
        info = self._table.last_info(actor) or _UNKNOWN
        now = self.loop.time()
        deadline = self._deadline(context, options, info, now)
        history, root = context.history, options.root
        session = options.session or context.session
        if history is not None:
            id = history.id_of(actor, method, session, options.instance, options.init, given)
        elif root is not None:
            id = root.id
        else:
            id = self._root + next(self._numbers).to_bytes(8, "big")
        shared, session = session, session or _auto_session(id)
        future: Future[Any] = Future(self, id, label, history)
        is_on_loop = threading.get_ident() == self._thread_id
        place = self._places.key(actor, session, options.instance) if info.stateful else ""
        call = Call(
            id,
            actor,
            method,
            payload,
            session,
            options.instance,
            options.init,
            tuple([dep.ref() for dep in deps]) if deps else (),
            context.call_id,
            context.job,
            options.priority if options.priority is not None else context.priority or info.priority,
            None if deadline is None else deadline - now,
            next(self._session_numbers) if place and is_on_loop else 0,
            () if context.slot is None else context.slot.holds,
            options.cast,
            0,
            context.trace,
            context.budget,
            epoch=next(self._epochs) if context.job else 0,
            caller=context.actor,
            tenant=context.tenant if options.tenant is None else options.tenant,
            workflow=context.workflow,
        )
        if root is not None or (history is not None and history.memory is not None):
            call = _tried_again(call, root, history)
        retries = options.retries if options.retries is not None else info.retries
        if context.job and options.retries is None:
            retries = max(JOB_RETRIES, retries)
        entry = Entry(future, call, context.call_id, deadline, place, retries, actor, now, shared, context.job, call.priority)
        if root is not None:
            entry.part = JobPart(None, root.located, call.epoch)
        elif history is not None:
            located = None if history.memory is None else history.memory.located.pop(id, None)
            entry.part = JobPart(history, located, call.epoch)
        if deps:
            entry.depends = [dep for dep in deps if isinstance(dep, Future)]
        if is_on_loop:
            self._launch(entry)
        else:
            self._launch_from_thread(entry)
        return future

    def own(
        self,
        context: CallContext,
        name: str,
        payload: bytes,
        begin: Callable[[Future[Any]], None],
        *,
        is_parked: bool = False,
    ) -> Future[Any]:
        """A future that this very process is to end, by `end`: no call, but in a job noted like one. Any thread."""
        history = context.history
        if history is not None:
            id = history.id_of("", name, "", "", b"", payload)
        else:
            id = self._root + next(self._numbers).to_bytes(8, "big")
        future: Future[Any] = Future(self, id, name, history)
        now, job = self.loop.time(), context.job
        entry = Entry(future, None, context.call_id, None, "", 0, name, now, context.session, job, context.priority)
        entry.part = JobPart(history, begin=functools.partial(begin, future), is_parked=is_parked)
        if threading.get_ident() == self._thread_id:
            self._launch(entry)
        else:
            self._launch_from_thread(entry)
        return future

    def end(self, future: Future[Any], payload: bytes | None, error: BaseException | None = None) -> None:
        """Ends a future made by `own`, with an encoded value or an error; nothing happens if it has ended. Any thread."""
        failure = None if payload is not None else Fail(future.id, *values.encode_error(error or Exception()))
        self.run_on_loop(functools.partial(self._end_own, future, failure or Resolve(future.id, payload or b"")))

    def _end_own(self, future: Future[Any], message: Resolve | Fail) -> None:
        entry = self._entries.get(future.id)
        if entry is None or entry.future is not future:
            return
        if entry.history is not None:
            self.witness.keep(entry, message, entry.history)
        else:
            self.witness.appear(entry, message)

    def ask(self, future: Future[Any], question: Question, on_answer: Callable[[Answer], None]) -> None:
        """Asks somebody outside what `future`, made by `own`, waits for; on the loop.

        The question goes away when the future ends, unless a job goes on elsewhere or may be tried again.
        """
        assert self.asker is not None
        entry = self._entries.get(future.id)
        part = None if entry is None or not question.job else entry.part
        actor = self.host.label_of(entry.parent) if entry is not None and self.host is not None else ""
        end = self.asker.ask(msgspec.structs.replace(question, asker=actor, process=str(self.me)), on_answer)
        if not future.on_end(lambda: end(part is None or not (part.is_abandoned or self._closed is not None))):
            end(True)

    def _as_future(self, arguments: bytes, label: str, deps: list[values.Deferred], job: str) -> bytes:
        """What stands for arguments that are too large for a message: a future of this process, which has them."""
        id = self._root + next(self._numbers).to_bytes(8, "big")
        future: Future[Any] = Future(self, id, f"the arguments of {label}")
        future.resolve(self.claims.made(arguments, job))
        later: list[values.Deferred] = []
        payload = values.encode(future, later)
        deps[:0] = later
        return payload

    def _launch_from_thread(self, entry: Entry) -> None:
        if self._closed is not None or not self._inbox.put(functools.partial(self._launch, entry)):
            entry.future.fail(copy.copy(self._closed) or CallCancelledError("its event loop has closed", started=False))

    def _label(self, actor: str, method: str) -> str:
        """`actor.method`, which `_labels` keeps: the same object for all futures of a method."""
        if len(self._labels) > _LABELS_KEPT:
            self._labels.clear()
        label = self._labels[actor, method] = label_of(actor, method)
        return label

    def _deadline(self, context: CallContext, options: CallOptions, info: ActorInfo, now: float) -> float | None:
        timeout_s = options.timeout_s if options.timeout_s is None or options.timeout_s >= 0 else info.timeout_s
        if timeout_s is None or timeout_s > _LONGEST_S:
            return context.deadline
        own = now + timeout_s
        return own if context.deadline is None or own < context.deadline else context.deadline

    def cancel(self, future: Future[Any], reason: str) -> None:
        """Nobody wants the result any more. Any thread."""
        self._inbox.put(lambda: self._cancel(future.id, reason))

    def prioritise(self, future: Future[Any], priority: int) -> None:
        """Gives the call another priority, higher or lower. Any thread."""
        self._inbox.put(lambda: self._prioritise(future.id, priority))

    def lend_priority(self, future: Future[Any], priority: int) -> None:
        """A call of that priority waits for the future: its own is not lower from now on. Any thread."""
        entry = self._entries.get(future.id)
        if entry is not None and entry.priority < priority:
            self._inbox.put(lambda: self._lend_priority(future.id, priority))

    def info(self, future: Future[Any]) -> FutureInfo:
        """What is known of it. Any thread."""
        entry = self._entries.get(future.id)
        facts = future.facts if entry is None else _facts(entry, 0.0)
        ahead_s = time.time() - self.loop.time()
        return FutureInfo(
            id=future.id.hex(),
            actor=future.actor,
            parent=facts.parent.hex(),
            dependencies=tuple(id.hex() for id in facts.dependencies),
            executor=facts.executor,
            consumers=facts.consumers,
            session=facts.session or _auto_session(future.id),
            job=facts.job,
            priority=facts.priority,
            deadline_at=None if facts.deadline is None else facts.deadline + ahead_s,
            state=future.state,
            made_at=facts.made + ahead_s if facts.made else None,
            ended_at=facts.ended + ahead_s if facts.ended else None,
        )

    def credit(self, future: Future[Any], limit: int) -> None:
        """The consumer of a stream takes pieces up to number `limit`. Any thread."""
        if threading.get_ident() == self._thread_id:
            self._credit(future.id, limit)
        else:
            self._inbox.put(lambda: self._credit(future.id, limit))

    # Routing and sending.

    def _launch(self, entry: Entry) -> None:
        future = entry.future
        if self._closed is not None:
            future.fail(copy.copy(self._closed))
            return
        if entry.part is not None:
            self._give_way(entry)
        self._entries[future.id] = entry
        if entry.parent:
            self._children.setdefault(entry.parent, {})[future.id] = None
        for dep in entry.depends or ():
            self._lent[dep.id] = dep, self._lent.get(dep.id, (dep, 0))[1] + 1
            self._lend_priority(dep.id, entry.priority)
        if entry.deadline is not None:
            self._watch_deadline(entry, entry.deadline)
        if entry.part is None:
            self._route(entry)
        elif entry.part.history is not None and entry.part.history.on_the_way:
            self.witness.once_durable(lambda: self._route_in_job(entry))  # not before it is known why the program makes it
        else:
            self._route_in_job(entry)

    def _route_in_job(self, entry: Entry) -> None:
        if self._entries.get(entry.future.id) is not entry or entry.part is None or entry.part.is_kept:
            return
        history = entry.part.history
        if self.witness.is_remembered(entry, history):
            return
        if history is not None and history.is_repeating and entry.part.located is None:
            history.held.append(lambda: self._route_in_job(entry))
        elif entry.part.begin is None:
            self._route(entry)
        elif self.host is not None and not self.host.may_begin():
            self.loop.call_later(_HELD_S, self._route_in_job, entry)
        else:
            entry.part.begin()

    def _route(self, entry: Entry) -> None:
        call = entry.call
        assert call is not None
        if entry.part is not None and entry.part.located is not None:
            located, entry.part.located = entry.part.located, None
            if not self._table.is_lost(located):
                self._send(entry, call, located)
                return
        info = self._table.info(call.actor)
        if info is None or not (info.stateful or call.parent or self._table.replicas(call.actor)):
            self._hold_unrouted(entry, call.actor)
        elif info.stateful:
            self._route_to_session(entry, call)
        else:
            address = self._ordered(call) if self._table.is_governed else None
            address = address or self._table.choose(call.actor, self.in_flight.get(call.actor, _NONE))
            if address is None:
                self._hold_unrouted(entry, call.actor)
            else:
                self._send(entry, call, address)

    def _ordered(self, call: Call) -> Address | None:
        """Where the global controller wants the call; None if that is not decided."""
        ordered = self._table.ordered(call.actor, call.session)
        if ordered is None:
            return None
        address, reason = ordered
        self.explanations.note(self.loop.time(), f"sent to {address.name}", reason, id=call.id)
        return address

    def _hold_unrouted(self, entry: Entry, actor: str) -> None:
        waiting = self._unrouted.get(actor)
        if waiting is None:
            self._unrouted[actor] = [entry]
            self._grace[actor] = self.loop.call_later(GRACE_S, self._give_up_unrouted, actor)
        else:
            waiting.append(entry)

    def _pop_unrouted(self, actor: str) -> list[Entry]:
        self._grace.pop(actor).cancel()
        return [entry for entry in self._unrouted.pop(actor) if entry.future.id in self._entries]

    def _give_up_unrouted(self, actor: str) -> None:
        deaf_s = GRACE_S - self._endpoint.connected_for_s()
        if deaf_s > 0:  # somebody may serve it of whom this process has not heard yet
            self._grace[actor] = self.loop.call_later(deaf_s, self._give_up_unrouted, actor)
            return
        for entry in self._pop_unrouted(actor):
            self._end_with(entry, UnknownActorError(nobody_serves(actor, self._table.known_actors()), actor=actor))

    def on_table_changed(self) -> None:
        """The routing table has changed: calls that found no replica look again."""
        self._places.on_table_changed()
        self._crossings.on_table_changed()
        if self.migrations is not None:
            self.migrations.on_table_changed()
        for actor in [actor for actor in self._unrouted if self._table.replicas(actor)]:
            for entry in self._pop_unrouted(actor):
                self.again(entry)

    def _route_to_session(self, entry: Entry, call: Call) -> None:
        key = entry.place = entry.place or self._places.key(call.actor, call.session, call.instance)
        if not call.number:
            call = entry.call = msgspec.structs.replace(call, number=next(self._session_numbers))
        crossing = self._crossings.open
        if crossing and key in crossing:
            crossing[key].waiting.append(entry)
            return
        address = self._places.known(key)
        if address is not None:
            self._send(entry, call, address)
        else:
            self._places.find(key, call.actor, entry.future.id, self._placed, or_leaving=bool(call.parent))

    def _placed(self, id: bytes, address: Address | None, error: CallError | None) -> bool:
        entry = self._entries.get(id)
        if entry is None or entry.call is None:
            return False
        if error is not None:
            self._end_with(entry, copy.copy(error))
        elif address is None and not self._table.replicas(entry.actor):
            self._hold_unrouted(entry, entry.actor)
        elif address is None:
            self.again(entry)
        else:
            self._send(entry, self._with_time_left(entry, entry.call), address)
        return True

    def _send(self, entry: Entry, call: Call, address: Address) -> None:
        entry.address = address
        name, in_flight = address.name, self.in_flight.get(entry.actor)
        if in_flight is None:
            in_flight = self.in_flight[entry.actor] = {}
        in_flight[name] = in_flight.get(name, 0) + 1
        try:
            if address == self.me:
                self.tell(address, call)
            else:
                self._endpoint.send(address, call)
        except ValueTooLargeError as error:
            self._end_with(entry, error)
            return
        if entry.address is not address:
            return  # lost while it was being sent, and on its way again
        if entry.credit:
            self.tell(address, Credit(call.id, entry.credit))
        if entry.depends is not None:
            for dep in entry.depends:
                self.lend(dep, address, entry.deadline)
        elif not entry.retries:
            entry.call = None  # nothing here will send it again: let the arguments go
        if call.cast:
            if entry.history is not None:
                self.witness.observe(entry.history, entry.history.outcome(Resolve(call.id, b""), self.loop.time()))
            self._hold_for_cast(entry)
            self.finish(entry)

    def _hold_for_cast(self, entry: Entry) -> None:
        """Nobody tells when a cast has ended: the large values it needs are held for as long as it may wait."""
        large = [dep for dep in entry.depends or () if dep.held() is not None or not dep.available()]
        if large:
            now = self.loop.time()
            holds_s = _CAST_HOLDS_S if entry.deadline is None else min(_CAST_HOLDS_S, entry.deadline - now)
            self.loop.call_later(holds_s, large.clear)

    def cast_again(self, sender: Address, call: Call) -> Entry:
        """An entry for a cast, which was over here when it had been sent."""
        info = self._table.info(call.actor) or _UNKNOWN
        place = self._places.key(call.actor, call.session, call.instance) if info.stateful else ""
        deadline = None if call.timeout_s is None else self.loop.time() + call.timeout_s
        future: Future[Any] = Future(self, call.id, self._label(call.actor, call.method))
        entry = Entry(
            future, call, b"", deadline, place, 0, call.actor, self.loop.time(), call.session, call.job, call.priority
        )
        entry.address = sender
        self._entries[call.id] = entry
        in_flight = self.in_flight.setdefault(call.actor, {})
        in_flight[sender.name] = in_flight.get(sender.name, 0) + 1
        return entry

    def tell(self, address: Address, message: Message, *, linger: bool = False) -> None:
        """Sends a message, which may `linger` for others to travel with; to this process itself by the shortest way."""
        if address != self.me:
            self._endpoint.send(address, message, linger=linger)
            return
        if not self._local:
            self.loop.call_soon(self._deliver_local)
        self._local.append(message)

    def flush(self) -> None:
        """Sends what has been told so far, without waiting for the end of this turn of the loop."""
        self._endpoint.flush()

    def _deliver_local(self) -> None:
        messages, self._local = self._local, []
        self.on_messages(self.me, messages)

    def lend(self, dep: Future[Any], consumer: Address, deadline: float | None) -> None:
        """Sees to it that `consumer` gets the value of `dep`."""
        entry = self._entries.get(dep.id)
        if entry is None:
            # It has ended; or another client in this process has made it, or a thread whose call is still in the inbox.
            if not dep.on_end(lambda: self._inbox.put(lambda: self._push(dep, consumer, deadline))):
                self._push(dep, consumer, deadline)
            return
        if entry.consumers is None:
            entry.consumers = []
        entry.consumers.append(consumer)
        if entry.address is not None and consumer != self.me and entry.history is None:
            self.tell(entry.address, Consume(dep.id, consumer.name, consumer.incarnation))

    def _push(self, dep: Future[Any], consumer: Address, deadline: float | None = None) -> None:
        held = dep.held()
        if held is not None:
            self._push_large(dep.id, held, consumer, deadline)
            return
        message = _outcome_of(dep)
        if message is not None:
            self.push_to_missed([consumer], message)

    def _push_large(self, id: bytes, held: Held, consumer: Address, deadline: float | None = None) -> None:
        def push(payload: bytes | None, error: Exception | None) -> None:
            message = Resolve(id, payload) if payload is not None else Fail(id, *values.encode_error(error or Exception()))
            self.push_to_missed([consumer], message)

        self.claims.offer(held, consumer, deadline, push)

    # What comes in.

    def on_messages(self, sender: Address, messages: Sequence[Message]) -> None:
        """Messages of one frame, in order; one that cannot be served does not keep the others from it."""
        host = self.host
        now = self.loop.time()  # one object for all calls of a frame
        for message in messages:
            kind = type(message)
            try:
                if kind is Resolve:
                    self._on_resolve(message)  # type: ignore[arg-type]
                elif kind is not Call:
                    self._on_rare(sender, message)
                elif host is not None:
                    host.on_call(sender, message, now)  # type: ignore[arg-type]
                else:
                    self._refuse(sender, message)  # type: ignore[arg-type]
            except Exception:
                _log.exception("call.message_failed", sender=sender.name, message=kind.__name__)

    def _on_rare(self, sender: Address, message: Message) -> None:
        match message:
            case Forward() | Forwarded() | Returned() | Piece() | Thaw() | Abandon() | Arrived() | Bequest() if is_client_name(
                sender.name
            ):  # these speak for others, and of what only workers have
                _log.warning("call.not_from_a_client", sender=sender.name, message=type(message).__name__)
            case Fail():
                self._on_fail(message)
            case Chunk():
                self._on_chunk(message)
            case Want():
                self._on_want(sender, message)
            case Cancel() if self.host is not None:
                self.host.on_cancel(sender, message)
            case Consume() if self.host is not None:
                self.host.on_consume(sender, message)
            case Credit() if self.host is not None:
                self.host.on_credit(sender, message)
            case Prioritise() if self.host is not None:
                self.host.on_prioritise(sender, message)
            case Probe() if self.host is not None:
                self.host.on_probe(message)
            case Parked():
                self._on_parked(message)
            case Settled() if self.host is not None:
                self.host.on_settled(sender, message)
            case Locate() if self.resumption is not None:
                self.resumption.on_locate(sender, message)
            case Located() if self.resumption is not None:
                self.resumption.on_located(sender, message)
            case (
                Migrate()
                | Migrated()
                | Piece()
                | Taken()
                | Thaw()
                | Abandon()
                | Forward()
                | Crossing()
                | Arrived()
                | Forwarded()
            ):
                self._on_migration(sender, message)
            case Release():
                self.claims.on_release(sender, message)
            case Returned():
                self._crossings.on_returned(sender, message)
            case Drain() | Drainage() | Bequest() | Accepted():
                self._on_draining(sender, message)
            case _:
                _log.warning("call.unexpected_message", sender=sender.name, message=type(message).__name__)

    def _on_migration(self, sender: Address, message: Message) -> None:
        moves = self.migrations
        match message:
            case Arrived():
                self._crossings.on_arrived(message)
            case Forwarded():
                self._crossings.on_forwarded(sender, message)
            case Migrated():
                self._on_migrated(message)
            case Migrate() if moves is None:
                refusal = self.host.refusal(message.actor) if self.host is not None else ""
                self.tell(sender, Migrated(message.id, refusal or f"process {self.me.name!r} keeps no sessions"))
            case Forward() if not self._is_stateful(message.call.actor):
                if self.host is not None:
                    self.host.take_forwarded(message)
            case Piece() if moves is None:
                self.tell(sender, Taken(message.id, message.number, f"process {self.me.name!r} keeps no sessions"))
            case _ if moves is None:
                _log.warning("call.unexpected_message", sender=sender.name, message=type(message).__name__)
            case Migrate():
                moves.on_migrate(sender, message)
            case Piece():
                moves.on_piece(sender, message)
            case Taken():
                moves.on_taken(message)
            case Thaw():
                moves.on_thaw(message.id)
            case Abandon():
                moves.on_abandon(message.id)
            case Forward():
                moves.on_forward(message)
            case Crossing():
                moves.on_crossing(message)
            case _:
                pass

    def _on_draining(self, sender: Address, message: Drain | Drainage | Bequest | Accepted) -> None:
        match message:
            case Drainage():
                if (drained := self._draining.get(message.id)) is not None:
                    drained.hear(message)
            case Drain() if self.draining is None:
                self.tell(sender, Drainage(message.id, f"process {self.me.name!r} is no worker"))
            case Bequest() if self.draining is None:
                self.tell(sender, Accepted(message.id, f"process {self.me.name!r} is no worker"))
            case _ if self.draining is None:
                _log.warning("call.unexpected_message", sender=sender.name, message=type(message).__name__)
            case Drain():
                self.draining.on_drain(sender, message)
            case Bequest():
                self.draining.on_bequest(sender, message)
            case Accepted():
                self.draining.on_accepted(message)

    # Sessions that have moved (`migration`).

    def _is_stateful(self, actor: str) -> bool:
        info = self._table.info(actor)
        return info is not None and info.stateful

    async def migrate(self, actor: str, session: str, target: str) -> Migrated:
        """Has a session moved to worker `target`; returns what became of that.

        Raises:
            MigrationError: nobody has the session, or whoever has it was lost meanwhile.
        """
        if self._table.info(actor) is None:
            raise MigrationError(f"nobody serves {actor!r}")
        try:
            address = await self._places.locate(self._places.key_in_store(actor, session), actor)
        except NalarError as error:
            raise MigrationError(str(error)) from error
        if address is None:
            raise MigrationError(f"nobody serves {actor!r}")
        if self._closed is not None:
            raise MigrationError(str(self._closed))
        id = self.fresh_id()
        answer: asyncio.Future[Migrated] = self.loop.create_future()
        self._migrating[id] = address, answer
        try:
            self.tell(address, Migrate(id, actor, session, target))
            return await answer
        finally:
            del self._migrating[id]

    def fresh_id(self) -> bytes:
        """16 bytes that nothing else is named by."""
        return self._root + next(self._numbers).to_bytes(8, "big")

    async def drain(self, address: Address, grace_s: float, told: Callable[[Drainage], None] | None) -> Drainage:
        """Has a worker drained, and returns what it told last when it is gone; `told` hears what it tells meanwhile.

        Raises:
            DrainError: it refuses, or was lost before it had come to the end.
        """
        if self._closed is not None:
            raise DrainError(str(self._closed), address.name)
        id = self._root + next(self._numbers).to_bytes(8, "big")
        drained = self._draining[id] = _Drained(address, self.loop.create_future(), told)
        try:
            self.tell(address, Drain(id, grace_s))
            return await drained.gone
        finally:
            del self._draining[id]

    def _on_migrated(self, migrated: Migrated) -> None:
        found = self._migrating.get(migrated.id)
        if found is not None and not found[1].done():
            found[1].set_result(migrated)

    def _refuse(self, sender: Address, call: Call) -> None:
        error = UnknownActorError(f"process {self.me.name!r} serves no actors", actor=call.actor)
        self.tell(sender, Fail(call.id, *values.encode_error(error), epoch=call.epoch))

    def _on_parked(self, message: Parked) -> None:
        entry = self._entries.get(message.id)
        if entry is None or entry.part is None:
            return
        entry.part.is_parked = message.is_parked
        if entry.part.history is None and self.on_parked is not None:
            self.on_parked(message.id, message.is_parked)

    def waits_for_outside(self, parent: bytes) -> bool:
        """True if a call waits for nothing but people or time, as far as what it has made tells."""
        made = [self._entries[id] for id in self._children.get(parent, ())]
        return bool(made) and all(entry.part is not None and entry.part.is_parked for entry in made)

    def _on_chunk(self, message: Chunk) -> None:
        entry = self._entries.get(message.id)
        is_large = message.payload[:1] == MARK
        payload = self.claims.taken(message.payload) if is_large else message.payload
        if entry is not None:
            entry.future.chunk(message.number, payload, message.attempt)

    def _on_large_resolve(self, message: Resolve, entry: Entry | None) -> None:
        """A claim, which is let go at once if nobody here wants it any more."""
        try:
            held = self.claims.taken(message.payload)
        except WireError as error:
            if entry is not None:
                self._end_with(entry, error)
            return
        if entry is None:
            return
        if entry.history is not None:
            self.witness.keep(entry, message, entry.history)
            return
        entry.future.resolve(held)
        self.finish(entry)
        for consumer in entry.consumers or ():
            if consumer == self.me or consumer.name not in message.pushed:
                self._push_large(message.id, held, consumer)

    def _on_resolve(self, message: Resolve) -> None:
        entry = self._entries.get(message.id)
        if message.payload[:1] == MARK and (entry is not None or message.id.startswith(self._root)):
            self._on_large_resolve(message, entry)
        elif entry is not None:
            if entry.part is not None and entry.part.history is not None:
                self.witness.keep(entry, message, entry.part.history)
                return
            entry.future.resolve(message.payload)
            self.finish(entry)
            if entry.consumers is not None:
                self.push_to_missed(entry.consumers, message)
        elif self.host is not None and not message.id.startswith(self._root):
            self.host.on_pushed(message)

    def _on_fail(self, message: Fail) -> None:
        entry = self._entries.get(message.id)
        if entry is not None:
            if entry.part is not None and entry.part.epoch != message.epoch:
                return  # what an earlier making of the call came to
            if entry.part is not None and entry.part.history is not None:
                self.witness.keep(entry, message, entry.part.history)
                return
            entry.future.fail(error_in(message, entry.future.actor))
            self.finish(entry)
            if entry.consumers is not None:
                self.push_to_missed(entry.consumers, message)
        elif self.host is not None and not message.id.startswith(self._root):
            self.host.on_pushed(message)

    def push_to_missed(self, consumers: list[Address], message: Resolve | Fail) -> None:
        """Tells those consumers that its executor has not told."""
        for consumer in consumers:
            if consumer == self.me:
                self._push_here(message)
            elif consumer.name not in message.pushed:
                self.tell(consumer, message)

    def _push_here(self, message: Resolve | Fail) -> None:
        if self.host is not None:
            self.host.on_pushed(message)

    def _on_want(self, sender: Address, want: Want) -> None:
        entry = self._entries.get(want.id)
        if entry is not None:
            if entry.consumers is None:
                entry.consumers = []
            if sender not in entry.consumers:
                entry.consumers.append(sender)
            return
        lent = self._lent.get(want.id)
        if lent is not None:
            self._push(lent[0], sender)

    def on_load(self, process: str, load: Load) -> bool:
        """A worker tells what it has in hand; False if its report is late or nobody's."""
        return self._table.report(process, load, self.in_flight)

    def glance(self) -> Glance:
        """How much this process has in hand."""
        host = self.host
        if host is None:
            return Glance(len(self._entries))
        return Glance(len(self._entries), host.completed, host.load())

    def explain(self, id: bytes) -> list[Explanation]:
        """What was decided here about a call, in the order of time."""
        found = self.explanations.of_call(id)
        if self.host is not None:
            found += self.host.explain(id)
        return sorted(found, key=lambda explanation: explanation.at_s)

    def records(self) -> list[CallRecord]:
        """The calls that run here or have run here lately."""
        return self.host.records() if self.host is not None else []

    # How an entry ends.

    def finish(self, entry: Entry) -> None:
        """Its future has ended: nothing is kept of it."""
        id = entry.future.id
        if self._entries.pop(id, None) is None:
            return
        crossings = self._crossings
        if crossings.open or crossings.hops:
            crossings.forget(entry)
        if entry.tick and (bucket := self._wheel.get(entry.tick)) is not None:
            bucket.pop(id, None)
        entry.future.facts = _facts(entry, self.loop.time())
        if entry.parent:
            siblings = self._children[entry.parent]
            del siblings[id]
            if not siblings:
                del self._children[entry.parent]
        for dep in entry.depends or ():
            self._give_back(dep.id)
        if entry.part is not None and entry.part.history is None and entry.address is not None:
            self._unsettled[id] = entry.address
        if entry.address is not None:
            self.in_flight[entry.actor][entry.address.name] -= 1

    def _give_back(self, id: bytes) -> None:
        dep, calls = self._lent[id]
        if calls > 1:
            self._lent[id] = dep, calls - 1
        else:
            del self._lent[id]

    def stop_watching(self, entry: Entry) -> None:
        """Its deadline ends it no more."""
        if entry.tick:
            bucket = self._wheel.get(entry.tick)
            if bucket is not None:
                bucket.pop(entry.future.id, None)

    def _end_with(self, entry: Entry, error: BaseException) -> None:
        if isinstance(error, CallError):
            error.call_id = error.call_id or entry.future.id.hex()
            error.actor = error.actor or entry.future.actor
        if entry.history is not None and self._closed is None:
            self.witness.keep(entry, Fail(entry.future.id, *values.encode_error(error)), entry.history)
            return
        entry.future.fail(error)
        self.finish(entry)
        if entry.consumers is not None:
            self.push_to_missed(entry.consumers, Fail(entry.future.id, *values.encode_error(error)))

    def _watch_deadline(self, entry: Entry, deadline: float) -> None:
        tick = entry.tick = int(deadline / _TICK_S) + 1
        bucket = self._wheel.get(tick)
        if bucket is None:
            bucket = self._wheel[tick] = {}
        bucket[entry.future.id] = None
        if self._ticking is None or tick < self._next_tick:
            self._arm(tick)

    def _arm(self, tick: int) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._next_tick = tick
        self._ticking = self.loop.call_at(tick * _TICK_S, self._on_tick)

    def _on_tick(self) -> None:
        self._ticking = None
        now = self.loop.time()
        for tick in sorted(tick for tick in self._wheel if tick * _TICK_S <= now):
            for id in list(self._wheel.pop(tick)):
                self._expire(id)
        empty = [tick for tick, bucket in self._wheel.items() if not bucket]
        for tick in empty:
            del self._wheel[tick]
        if self._wheel:
            self._arm(min(self._wheel))

    def _expire(self, id: bytes) -> None:
        entry = self._entries.get(id)
        if entry is None:
            return
        entry.tick = 0
        if entry.is_kept:
            return
        if entry.cancelling:
            self._end_with(entry, CallCancelledError("cancelled; its worker did not answer", started=True))
            return
        self._stop_executor(entry, "its deadline has passed")
        self._end_with(entry, CallTimeoutError(f"{entry.future.actor} did not end before its deadline"))

    def _stop_executor(self, entry: Entry, reason: str) -> bool:
        """Tells the executor to stop; False if the call has never left."""
        address = entry.address
        if address is None:
            return False
        if address != self.me and self._endpoint.withdraw(address, entry.future.id):
            return False
        self.tell(address, Cancel(entry.future.id, reason))
        return True

    def _cancel(self, id: bytes, reason: str) -> None:
        entry = self._entries.get(id)
        if entry is None or entry.cancelling or entry.is_kept:
            return
        if not self._stop_executor(entry, reason):
            self._end_with(entry, CallCancelledError(reason, started=False))
            return
        entry.cancelling = True
        self.stop_watching(entry)
        self._watch_deadline(entry, self.loop.time() + _CANCEL_GRACE_S)

    def _credit(self, id: bytes, limit: int) -> None:
        entry = self._entries.get(id)
        if entry is None:
            return
        entry.credit = limit
        if entry.address is not None:
            self.tell(entry.address, Credit(id, limit))

    def _prioritise(self, id: bytes, priority: int) -> None:
        entry = self._entries.get(id)
        if entry is None or entry.priority == priority:
            return
        entry.priority = priority
        if entry.call is not None:
            entry.call = msgspec.structs.replace(entry.call, priority=priority)
        if entry.address is not None:
            self.tell(entry.address, Prioritise(id, priority))
        for dep in entry.depends or ():
            self._lend_priority(dep.id, priority)

    def _lend_priority(self, id: bytes, priority: int) -> None:
        entry = self._entries.get(id)
        if entry is not None and entry.priority < priority:
            self._prioritise(id, priority)

    def lend_priority_to_children(self, parent: bytes, priority: int) -> None:
        """The call `parent` has that priority: the calls it has made and that have not ended have no lower one."""
        for id in list(self._children.get(parent, ())):
            self._lend_priority(id, priority)

    def probe_children(self, parent: bytes, probe: Probe) -> None:
        """Passes a probe on to the executors of all calls that `parent` has made and that have not ended."""
        for id in self._children.get(parent, ()):
            address = self._entries[id].address
            if address is not None:
                self.tell(address, msgspec.structs.replace(probe, id=id))

    def cancel_children(self, parent: bytes, reason: str) -> None:
        """Cancels every call that `parent` has made and that has not ended."""
        for id in list(self._children.get(parent, ())):
            self._cancel(id, reason)

    def abandon_children(self, parent: bytes, reason: str) -> None:
        """Cancels what a call of a job that has failed, or was cancelled, had called: in another attempt it runs anew."""
        for id in list(self._children.get(parent, ())):
            part = self._entries[id].part
            if part is not None:
                part.is_abandoned = True
            self._cancel(id, reason)

    def release_place(self, actor: str, session: str, instance: str, store: str = "") -> None:
        """The session has ended here, or in that store; whoever calls it next decides its place anew."""
        self._places.release(self._places.key(actor, session, instance), store or self.me)

    # Jobs.

    def _give_way(self, entry: Entry) -> None:
        """The same call is made by another attempt in this very process: the former one's future is nobody's any more."""
        former = self._entries.get(entry.future.id)
        if former is not None:
            assert entry.part is not None
            entry.part.located = former.address
            former.future.fail(OwnerLostError("another attempt at the job has made this call", actor=former.future.actor))
            former.consumers = None
            self.finish(former)

    def is_on_loop(self) -> bool:
        """True in the thread of the loop. Any thread."""
        return threading.get_ident() == self._thread_id

    @property
    def is_closed(self) -> bool:
        """True once `close` was called."""
        return self._closed is not None

    def run_on_loop(self, function: Callable[[], None]) -> None:
        """Calls it on the loop, at once if that is this thread. Any thread."""
        if threading.get_ident() == self._thread_id:
            function()
        else:
            self._inbox.put(function)

    def settle(self, future: Future[Any], *, again: bool = False) -> None:
        """The outcome of a job is durable; with `again`, it will be made again and needs what it has seen so far."""
        address = self._unsettled.pop(future.id, None)
        if address is not None:
            self.tell(address, Settled(future.id, again))

    def is_alive(self, address: Address) -> bool:
        """False if that incarnation is gone, or was never heard of."""
        return address == self.me or self._table.is_alive(address)

    def is_lost(self, address: Address) -> bool:
        """True if that incarnation has left, was lost or was replaced."""
        return self._table.is_lost(address)

    # Losses.

    def on_lost(self, address: Address, unsent: list[Message], unknown: list[Message], *, was_settled: bool = False) -> None:
        """That incarnation is gone: its calls run elsewhere or fail, and nobody there wants ours any more.

        With `was_settled`, calls that it has passed on are where it said.
        """
        self._places.forget(address)
        never_left = {message.id: message for message in unsent if type(message) is Call}
        never_left |= self._crossings.take_returned(address)
        for call in [call for call in never_left.values() if call.cast and not call.deps and call.id not in self._entries]:
            self.cast_again(address, call)
        here = [(entry, never_left.get(entry.future.id)) for entry in self._entries.values() if self._was_at(entry, address)]
        for entry, unread in sorted(here, key=_number_at):
            self.move_on(entry, unread)
        for in_flight in self.in_flight.values():
            if not in_flight.get(address.name):  # a successor of the same name may have calls by now
                in_flight.pop(address.name, None)
        self._crossings.on_lost(address, was_settled)
        for drained in self._draining.values():
            if drained.address == address:
                drained.lose()
        for place, answer in self._migrating.values():
            if place == address and not answer.done():
                answer.set_exception(MigrationError(f"worker {address.name!r} was lost while it moved the session"))
        if self.host is not None:
            self.host.on_owner_lost(address)
            self._take_back(address, unsent, unknown)
        if self.migrations is not None:
            self.migrations.on_lost(address, (*unsent, *unknown))

    def _take_back(self, lost: Address, unsent: list[Message], unknown: list[Message]) -> None:
        """Calls without state that were sent on to a process which is gone.

        Those that never left are here again. Of the others their owners are told where they were, and know what to do then; who
        has heard of that from there already has done it.
        """
        assert self.host is not None
        for message in unsent:
            if isinstance(message, Forward) and not self._is_stateful(message.call.actor):
                self.host.take_forwarded(message)
        for message in unknown:
            if isinstance(message, Forward) and not self._is_stateful(message.call.actor):
                owner, call = Address(message.name, message.incarnation), message.call
                self.tell(owner, Forwarded(call.id, *lost, message.hops, call.actor, call.session, "", call.attempt))

    def _was_at(self, entry: Entry, lost: Address) -> bool:
        """True for a call that is there, or in an incarnation between that and the present one, of which nobody has told us."""
        at = entry.address
        return at is not None and at.name == lost.name and (at == lost or self._table.is_lost(at))

    def move_on(self, entry: Entry, unsent: Call | None) -> None:
        """Its worker has it no more: it goes elsewhere, or fails. `unsent`: the call as it is if it has not begun there."""
        lost = entry.address
        assert lost is not None
        self.in_flight[entry.actor][lost.name] -= 1
        entry.address = None
        self._crossings.look_over(entry.place)
        if entry.is_kept:
            return
        if entry.cancelling:
            self._end_with(entry, CallCancelledError("cancelled; its worker was lost", started=unsent is None))
        elif unsent is not None:
            if (
                entry.future.id in self._crossings.hops
            ):  # it was passed on: what is yet to be heard of that is told apart by the attempt
                unsent = msgspec.structs.replace(unsent, attempt=unsent.attempt + 1)
                self._crossings.sent_anew(unsent.id, unsent.attempt)
            entry.call = unsent
            self.again(entry)
        elif entry.call is not None and self._may_retry(entry):
            call = entry.call
            known = (*call.lost, str(lost)) if call.job else ()
            entry.call = msgspec.structs.replace(call, attempt=call.attempt + 1, lost=known)
            self._crossings.sent_anew(entry.future.id, call.attempt + 1)
            if self._places.store_known(entry.place):  # in their order, and not before somebody has opened the store again
                self.again(entry)
                return
            self.loop.call_later(self._pause_s(call.attempt), self._after_pause, entry)
        else:
            error = WorkerLostError(f"worker {lost.name!r} was lost while it had {entry.future.actor}; it may have run")
            error.worker = str(lost)
            self._end_with(entry, error)

    def _may_retry(self, entry: Entry) -> bool:
        """Takes one retry from the call's own, and in a job from those of all calls together."""
        history = entry.history
        if entry.retries <= 0 or (history is not None and history.retries_left <= 0):
            return False
        entry.retries -= 1
        if history is not None:
            history.retries_left -= 1
        return True

    def _pause_s(self, attempt: int) -> float:
        """Spreads the calls of a lost worker, and leaves the others more time the more often that has happened."""
        return float(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt) * self._random.uniform(0.5, 1.0))

    def _after_pause(self, entry: Entry) -> None:
        if self._entries.get(entry.future.id) is entry and not entry.is_kept:
            self.again(entry)

    def again(self, entry: Entry) -> None:
        """Routes it anew."""
        call = entry.call
        assert call is not None
        entry.call = self._with_time_left(entry, call)
        self._route(entry)

    def _with_time_left(self, entry: Entry, call: Call) -> Call:
        if entry.deadline is None:
            return call
        return msgspec.structs.replace(call, timeout_s=max(0.0, entry.deadline - self.loop.time()))

    # The end.

    @property
    def pending(self) -> int:
        """Calls that have not ended."""
        return len(self._entries)

    def close(self, error: CallError, *, is_given_up: bool = False) -> None:
        """Fails what has not ended, and every later call.

        With `is_given_up`, others go on with the jobs of this process: what its programs make of these failures, which
        nobody else has seen, counts for nothing.
        """
        self._closed = error
        if is_given_up and self.host is not None:
            self.host.mute()
        for entry in list(self._entries.values()):
            if entry.part is None:  # another attempt at the job may want what runs
                self._stop_executor(entry, "its caller has closed")
            self._end_with(entry, copy.copy(error))
        for drained in self._draining.values():
            drained.fail(str(error))
        for _, answer in self._migrating.values():
            if not answer.done():
                answer.set_exception(MigrationError(str(error)))
        for timer in (self._ticking, *self._grace.values()):
            if timer is not None:
                timer.cancel()
        self._ticking = None


_UNKNOWN = ActorInfo("", {})


def _tried_again(call: Call, root: Root | None, history: History | None) -> Call:
    """The call as it is made by a later attempt at its job."""
    if root is not None:
        return msgspec.structs.replace(call, attempt=root.attempt, lost=root.lost, failures=root.failures)
    assert history is not None and history.memory is not None
    return msgspec.structs.replace(call, attempt=1, lost=history.memory.lost, failures=history.failures)


_NONE: dict[str, int] = {}


def _auto_session(id: bytes) -> str:
    """The session of a call that was given none: its own."""
    return f"auto-{id.hex()}"


def _facts(entry: Entry, ended: float) -> Facts:
    return Facts(
        entry.parent,
        tuple([dep.id for dep in entry.depends]) if entry.depends else (),
        entry.address.name if entry.address is not None else "",
        tuple([consumer.name for consumer in entry.consumers]) if entry.consumers else (),
        entry.session,
        entry.job,
        entry.priority,
        entry.deadline,
        entry.made,
        ended,
    )


def _outcome_of(dep: Future[Any]) -> Resolve | Fail | None:
    """What tells others how it ended; None if it has not."""
    try:
        error = dep.error()
        payload = None if error is not None else dep.encoded()
    except Exception as cause:  # the value was changed after it came, and cannot travel any more
        error, payload = cause, None
    if error is not None:
        return Fail(dep.id, *values.encode_error(error), path=path_of(error))
    return None if payload is None else Resolve(dep.id, payload)
