"""Has the calls that arrive at a worker, from their arrival to their end.

Life of an execution, all on the event loop:

    arrived ──▶ queued ──▶ running ──▶ ended: Resolve or Fail to its owner and to every consumer
                  │  ▲        │
                  │  │        └─ waits for a future: its slot is free for others, its session stays its own
                  │  └─ ready once every future it depends on has a value
                  └─ cancelled, or its owner lost: it leaves the mailbox and never runs

Values are pushed here before, with or after the call that needs them, since they come from other processes; what has come
is kept for a while, and what has not come is asked for. A dependency that failed fails the call with the same error.

Standing still. A process that stood still for longer than its lease finds calls in its hands that others run by now. It begins
none of them before its lease is confirmed again (`membership`): neither what it has received meanwhile, nor what had been
chosen and waited for its turn on the loop or for its arguments, nor an effect of a program that goes on.

Ends. The code of a call (`invoker`) comes to a result or an error. A call that is cancelled ends at its next `await`; in a
thread at its next call to an actor, and what it returns after that is dropped while its session stays held until the thread
has returned.

State that is kept. What a call has changed goes, with its result, into the store of the worker before anybody is told; its
session is held until then. A call that is sent again and is recorded there is answered from the record and does not run.

Calls of jobs. What such a call came to is kept until its owner says that it is durable, and the call goes on when its owner
is lost: whoever tries the job again asks for it by its id, and is its owner from then on. A call of a later attempt waits in
the mailbox until what former attempts have done is known (`recall`).
Large values come as claims (see `claims`). They are read and decoded in a thread when the call has its turn, not before, so
that the concurrency of an actor bounds what is in memory; a result that is too large for a message is kept before it is sent,
and until then the call has not ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

import msgspec
from msgspec.structs import force_setattr

from nalar_mq import actions, origins, values
from nalar_mq.actor import ActorSpec
from nalar_mq.address import LONGEST_TOKEN, Address, is_client_name
from nalar_mq.call_context import CallContext
from nalar_mq.calls import Calls
from nalar_mq.changes import Changes
from nalar_mq.claims import INLINE_LIMIT_BYTES, MARK, read_claim, write_claim
from nalar_mq.columns import CANCELLED as WAS_CANCELLED
from nalar_mq.columns import CREATED, DONE, FAILED, QUEUED, RUNNING, WAITING
from nalar_mq.errors import (
    ArgumentError,
    CallCancelledError,
    CallError,
    CallExpiredError,
    CallTimeoutError,
    MigrationError,
    NalarError,
    NotAllowedError,
    OverloadedError,
    StateDamagedError,
    StateNotKeptError,
    StoreError,
    UnknownActorError,
    UnknownMethodError,
    WaitCycleError,
    WorkflowChangedError,
    path_of,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.execution import CANCELLED, Execution, Resumed, session_key_of, workflow_of
from nalar_mq.history import History, Memory, losses_in
from nalar_mq.invoker import Invoker
from nalar_mq.isolation import Children
from nalar_mq.limits import Group, groups_with
from nalar_mq.logs import logger
from nalar_mq.messages import (
    Call,
    CallRecord,
    Cancel,
    Consume,
    Credit,
    Explanation,
    Fail,
    Forward,
    Forwarded,
    Migrate,
    Parked,
    Prioritise,
    Probe,
    Resolve,
    Returned,
    Settled,
    Want,
)
from nalar_mq.migration import Key, Migrations
from nalar_mq.outflow import Outflow
from nalar_mq.placement import RoutingTable
from nalar_mq.replica import Replica
from nalar_mq.rules import Admission, Priorities
from nalar_mq.runner import Runner
from nalar_mq.session_state import SessionState
from nalar_mq.state import Arrival
from nalar_mq.store import Outcome
from nalar_mq.stores import Kept, Stores
from nalar_mq.stub import method_of_instance
from nalar_mq.threads import LoopInbox, Threads

_EARLY = 1_000  # credits and priorities that are kept for calls which have not come yet
_PUSHED_KEPT = 20_000
_PUSHED_BYTES = 32 * 1024 * 1024
_WANT_AFTER_S = 1.0
_PROBE_AFTER_S = 1.0
_PROBE_HOPS = 64
BATCH_LIMIT = 64
_PATH_SHOWN = 63
_FORGET_EVERY_S = 60.0
_IN_MEMORY_S = 60.0  # a session in a store leaves memory after this long without a call
_SESSION_IDLE_S = 3600.0  # a session that nobody named is forgotten after this long without a call
_KEPT_S = 3600.0  # what a call of a job came to, when nobody asks for it
HIGH_WATER = 250_000  # calls that a worker holds before it sheds; about 0.8 KB each and their arguments
REMEMBERED = 10_000  # calls that have ended and can be asked for; about 0.4 KB each
_NOTHING = values.encode(None)
_MOVED = "it moved with its session"
_FAILED = "the call that made it has failed"
_ALL: Group = ("", "", "")
_NAMES_KEPT = 10_000
_NAMES = re.compile(r"[A-Za-z0-9_-]*")
_log = logger(__name__)


Remember = Callable[[str, tuple[str, ...]], Coroutine[Any, Any, Memory]]
"""What former attempts at a job have done, given its id and the processes that were lost."""


class Gate(Protocol):
    """Decides about the calls that come to a worker which drains.

    Attributes:
        is_closing: what comes back from here was not to begin, also of what nobody else serves.
    """

    is_closing: bool

    def refusal(self, replica: Replica) -> CallError | None:
        """What calls of that actor end with; None if they do not."""
        ...

    def returns(self, owner: Address, call: Call, replica: Replica) -> bool:
        """True if the call goes back to its owner, who sends it elsewhere."""
        ...


class _Kept(msgspec.Struct, eq=False):
    """What a call of a job came to, for whoever owns it."""

    message: Resolve | Fail
    job: str
    owner: Address
    at: float


class Host:
    """The executions of one worker. Implements `calls.Host`; everything is for the loop unless it says otherwise.

    Attributes:
        migrations: the sessions that move, if there are any stores.
        retired: actors that the worker could serve and does not.
    """

    # Of an object with more than 30 attributes Python finds each method, and each attribute, anew.
    __slots__ = (
        "_admission",
        "_below_holders",
        "_calls",
        "_changes",
        "_clock",
        "_early_credits",
        "_early_priorities",
        "_ended",
        "_executions",
        "_forget_at",
        "_high_water",
        "_inbox",
        "_invoker",
        "_is_closing",
        "_is_muted",
        "_kept",
        "_limits",
        "_looks",
        "_loop",
        "_loop_thread",
        "_may_begin",
        "_moving",
        "_names",
        "_priorities",
        "_pushed",
        "_pushed_bytes",
        "_quiet",
        "_recalling",
        "_remember",
        "_replicas",
        "_sender_names",
        "_stores",
        "_table",
        "_threads",
        "_unwatched",
        "_upkeep",
        "_waiting",
        "_waiting_in_jobs",
        "completed",
        "gate",
        "migrations",
        "retired",
        "shed",
    )

    def __init__(
        self,
        specs: dict[str, ActorSpec],
        calls: Calls,
        children: Children,
        *,
        name: str,
        may_begin: Callable[[], bool],
        remember: Remember,
        table: RoutingTable,
        changes: Changes,
        stores: Stores | None = None,
        clock: Callable[[], float] = time.time,
        high_water: int = HIGH_WATER,
        threads: Threads | None = None,
    ) -> None:
        self._stores = stores
        self._changes = changes
        self._clock = clock
        self._table = table
        self._admission = Admission()
        self._priorities: Priorities | None = None
        self._limits: dict[str, dict[Group, actions.Limit]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._calls = calls
        self._replicas = {spec.name: Replica(spec, self._loop, stores) for spec in specs.values()}
        self._executions: dict[bytes, Execution] = {}
        self._below_holders: dict[bytes, Execution] = {}  # those whose callers hold sessions
        self._waiting: dict[bytes, list[Execution]] = {}
        self._pushed: OrderedDict[bytes, Resolve | Fail] = OrderedDict()
        self._pushed_bytes = 0
        self._early_credits: OrderedDict[bytes, int] = OrderedDict()
        self._early_priorities: OrderedDict[bytes, int] = OrderedDict()
        self._unwatched: dict[bytes, Execution] = {}
        self._kept: dict[bytes, _Kept] = {}
        self._remember = remember
        self._recalling: set[asyncio.Task[None]] = set()
        self._waiting_in_jobs: dict[bytes, Execution] = {}
        self._is_muted = False
        self.gate: Gate | None = None
        self._quiet: dict[Key, asyncio.Future[None]] = {}
        self.migrations: Migrations | None = None
        self.retired: set[str] = set()
        self._forget_at = self._loop.time() + _FORGET_EVERY_S
        self._is_closing = False
        self._threads = threads or Threads(f"{name}-call")
        self._inbox = LoopInbox(self._loop)
        runner = Runner(self._loop, calls.flush, clock)
        self._may_begin = may_begin
        self._invoker = Invoker(self, self._loop, self._inbox, runner, self._threads, children, may_begin)
        self._moving: set[asyncio.Task[None]] = set()
        self._upkeep: asyncio.Task[None] | None = None
        self._ended: deque[CallRecord] = deque(maxlen=REMEMBERED)
        self._sender_names: dict[Address, str] = {}
        self._names: dict[str, str] = {}  # of sessions that have called, and are names
        self._looks = (
            self._pump_all,
            self._ask_for_values,
            self._end_unwatched,
            self._look_for_circles,
            self._look_for_parked,
            self._end_idle_sessions,
            self._forget_kept_sessions,
            self._end_kept,
        )
        self._high_water = high_water
        self.completed = 0
        self.shed = 0

    def start(self) -> None:
        """Begins to look after what waits for long."""
        self._upkeep = self._loop.create_task(self._keep_up())

    def on_loop(self, function: Callable[[], None]) -> None:
        """Runs `function` on the loop: now if this is its thread, else soon. Any thread."""
        if threading.get_ident() == self._loop_thread:
            function()
        else:
            self._inbox.put(function)

    # What arrives.

    def on_call(self, owner: Address, call: Call, now: float, *, hops: int = 0) -> None:
        """A call has arrived at `now`, forwarded `hops` times: queues it, or refuses it with a typed error."""
        if self._is_closing:
            return  # those before it have been ended: its owner hears of the loss and sends all of them elsewhere
        if (call.id in self._executions or call.id in self._kept) and self._is_known(owner, call, hops):
            return
        replica = self._replicas.get(call.actor)
        if replica is None:
            self._refuse(owner, call, UnknownActorError(f"worker {self._calls.me.name!r} does not serve {call.actor!r}"))
            return
        session = self._names.get(call.session)
        if (session is None or call.instance or call.job or call.tenant or call.timeout_s != call.timeout_s) and (
            malformed := _malformed(call)
        ) is not None:
            self._refuse(owner, call, malformed)
            return
        if replica.stores is not None and self._is_elsewhere(owner, call, hops, replica):
            return
        method = replica.spec.methods.get(call.method) or method_of_instance(replica.spec, call.method)
        if method is None:
            known = ", ".join(name for name in replica.spec.methods if name) or "none; it is called by its own name"
            wrong = f"has no method {call.method!r}" if call.method else "is an agent and is called by `agent.method`"
            self._refuse(owner, call, UnknownMethodError(f"{call.actor!r} {wrong}; it has: {known}"))
            return
        if self._admission.has_rules and (forbidden := self._forbidden(owner, call)) is not None:
            self._refuse(owner, call, forbidden)
            return
        if self.retired and not hops and (replacement := self._replacement(replica)) is not None:
            self._pass_on(owner, call, replacement, "it is not served here any more")
            return
        if self._table.is_governed and not hops and (ordered := self._ordered_elsewhere(replica, call)) is not None:
            self._pass_on(owner, call, *ordered)
            return
        if replica.stores is not None and (call.attempt or call.job or hops) and self._is_recorded(owner, call, replica.stores):
            return
        if self.gate is not None and self._is_turned_away(owner, call, replica, self.gate):
            return
        self._share_names(call, session, replica.spec.name, method.name)
        if self._early_priorities:
            force_setattr(call, "priority", self._early_priorities.pop(call.id, call.priority))
        session_key = session_key_of(call) if call.instance else call.session
        told = self._changes.begin(call, now, QUEUED, call.tenant)
        execution = Execution(self, owner, call, replica, method, now, now, session_key, told, hops)
        self._executions[call.id] = execution
        if call.holds:
            self._below_holders[call.id] = execution
        is_ready = True
        if call.cast and call.timeout_s is not None:
            self._unwatched[call.id] = execution
        if call.deps:
            self._await_values(execution)
            is_ready = not execution.missing
        if call.job and call.attempt:
            self._begin_recalling(execution)
            is_ready = False
        if not is_ready:
            told.state = CREATED
        if self._early_credits and (limit := self._early_credits.pop(call.id, 0)):
            self.outflow(execution).allow(limit)
        # An ancestor that has ended holds nothing any more: then the call queues like any other.
        reentrant = bool(call.holds) and execution.hold in call.holds and session_key in replica.holders
        is_new = replica.mailbox.put(
            call.id,
            session=session_key,
            sender=self._sender_names.get(owner) or self._sender_name(owner),
            number=call.number,
            priority=call.priority,
            now=now,
            ready=is_ready,
            reentrant=reentrant,
            batch=_batch_key(call) if replica.spec.directives.batchable else "",
            tenant=call.tenant,
            job=call.job,
        )
        if not is_new:
            self._answer_error(execution, CallExpiredError(f"session {call.session!r} has had this call already"))
            self._forget(execution)
            return
        self.pump(replica)
        if len(self._executions) > self._high_water:
            self._shed(replica)

    def _share_names(self, call: Call, session: str | None, actor: str, method: str) -> None:
        """Has queued calls share the names that each of them brought: a fifth of what a call takes."""
        force_setattr(call, "actor", actor)
        force_setattr(call, "method", method)
        if session is not None:
            force_setattr(call, "session", session)
        elif not call.session.startswith("auto-"):  # those have one call, as a rule
            if len(self._names) >= _NAMES_KEPT:
                self._names.clear()
            self._names[call.session] = call.session

    def on_spent(self, execution: Execution, amount: float, unit: str) -> None:
        """A call has cost something."""
        self._changes.spend(execution.call, workflow_of(execution), amount, unit)

    def _is_known(self, owner: Address, call: Call, hops: int) -> bool:
        """True if the call is here already: of a job that is tried again, it has another owner from now on.

        What failed in an attempt that failed is run anew, once it has wound down, and so is what was cancelled in any.
        """
        kept = self._kept.get(call.id)
        if kept is not None and type(kept.message) is Fail:
            if call.failures or kept.message.kind == CANCELLED:
                del self._kept[call.id]
                kept = None
            else:
                kept.message = msgspec.structs.replace(kept.message, epoch=call.epoch)
        if kept is not None:
            kept.owner = owner
            self._calls.tell(owner, kept.message)
            return True
        execution = self._executions.get(call.id)
        if execution is None:
            return False
        if call.attempt > execution.call.attempt:  # of this one its owner knows the way, should it go on from here
            force_setattr(execution.call, "attempt", call.attempt)
            execution.hops = hops
        if call.job and execution.is_winding_down:
            execution.resumed = execution.resumed or Resumed()
            execution.resumed.following = owner, call
        elif call.job:
            force_setattr(execution.call, "epoch", call.epoch)
            execution.owner = owner
            execution.is_parked = False  # as far as that one knows
            if execution.resumed is not None:
                execution.resumed.is_orphan = False
            self._unwatched.pop(call.id, None)
        return True

    # Draining (`draining`).

    def _is_turned_away(self, owner: Address, call: Call, replica: Replica, gate: Gate) -> bool:
        error = gate.refusal(replica)
        if error is not None:
            self._refuse(owner, call, error)
        elif gate.returns(owner, call, replica):
            self._return(owner, call, replica)
        else:
            return False
        return True

    @property
    def replicas(self) -> Iterable[Replica]:
        """What is served here."""
        return self._replicas.values()

    @property
    def executions(self) -> list[Execution]:
        """Calls that are queued or run."""
        return list(self._executions.values())

    def give_back(self, execution: Execution) -> None:
        """Hands a call that has not begun back to its owner, who sends it elsewhere."""
        call = self._with_time_left(execution)
        self._send_away(execution)
        self._return(execution.owner, call, execution.replica)

    def _return(self, owner: Address, call: Call, replica: Replica) -> None:
        if replica.stores is not None and self.migrations is not None:
            self.migrations.on_given_back((call.actor, session_key_of(call)), owner)
        self._calls.tell(owner, Returned(call, is_closing=self.gate is not None and self.gate.is_closing))

    def end_with(self, execution: Execution, error: CallError) -> None:
        """Answers a call with an error, and ends it."""
        self._answer_error(execution, error)
        self._cancel(execution, str(error))

    def end_running(self, executions: Iterable[Execution]) -> None:
        """Ends these calls; their owners hear that this worker is lost, and may send them elsewhere."""
        for execution in executions:
            if execution.is_committing:
                continue  # it ends by itself, and has taken effect
            execution.is_answered = True  # nobody cancelled it
            self._cancel(execution, "its worker is stopping", with_children=not execution.call.job)

    def _is_elsewhere(self, owner: Address, call: Call, hops: int, replica: Replica) -> bool:
        """True if the session of the call has moved, and the call has been sent after it."""
        migrations = self.migrations
        if migrations is None:
            return False
        key = call.actor, session_key_of(call)
        if not replica.has_instance(key[1]):
            try:
                migrations.look(key)
            except (CallError, StoreError) as error:
                self._refuse(owner, call, error if isinstance(error, CallError) else StateDamagedError(str(error)))
                return True
        return migrations.passes_on(key, owner, call, hops)

    # Sessions that move (`migration.Holder`).

    def refusal(self, actor: str) -> str:
        """Why sessions of that agent can neither leave nor come; empty if they can."""
        replica = self._replicas.get(actor)
        if replica is None:
            return f"worker {self._calls.me.name!r} does not serve {actor!r}"
        if replica.stores is not None:
            return ""
        if replica.spec.managed:
            return f"sessions of {actor!r} are in memory alone (durability 'memory'), and end with their worker"
        if replica.spec.stateful:
            return f"sessions of {actor!r} never move: it is stateful, and what it keeps in `self` cannot be carried"
        return f"{actor!r} has no sessions: its calls go anywhere"

    def is_loaded(self, key: Key) -> bool:
        """True if an instance of the session is in memory."""
        return self._replicas[key[0]].has_instance(key[1])

    def freeze(self, key: Key) -> None:
        """No call of the session begins."""
        self._replicas[key[0]].mailbox.freeze(key[1])

    async def quiet(self, key: Key) -> None:
        """Returns when no call of the session runs and nothing of it is being committed."""
        while key[1] in self._replicas[key[0]].holders:
            waiter = self._quiet.setdefault(key, self._loop.create_future())
            await asyncio.shield(waiter)

    def thaw(self, key: Key) -> None:
        """Calls of the session begin."""
        replica = self._replicas[key[0]]
        replica.mailbox.thaw(key[1])
        self.pump(replica)

    def release(self, key: Key) -> list[Forward]:
        """Lets the session go, thawed: its instance, and the calls that have not begun, which are returned."""
        replica = self._replicas[key[0]]
        waiting: list[Forward] = []
        for execution in list(self._executions.values()):
            if execution.started or execution.replica is not replica or execution.session_key != key[1]:
                continue
            waiting.append(Forward(*execution.owner, self._with_time_left(execution), execution.hops + 1))
            self._send_away(execution)
        self._end_instances(replica, [key[1]])
        replica.mailbox.thaw(key[1])
        replica.mailbox.forget_session(key[1])  # what comes back may have numbers that were here before
        return waiting

    def _with_time_left(self, execution: Execution) -> Call:
        if execution.deadline is None:
            return execution.call
        return msgspec.structs.replace(execution.call, timeout_s=max(0.0, execution.deadline - self._loop.time()))

    def _send_away(self, execution: Execution) -> None:
        """A call that has not begun is queued here no more; it will be elsewhere."""
        execution.replica.mailbox.remove(execution.call.id)
        execution.failure = _MOVED
        self._forget(execution)

    def take_forwarded(self, forward: Forward) -> None:
        """A call that came to where its session was before, or that another worker has passed on.

        Of the latter its owner is told by who has got it, so that it cannot be lost between two who know nothing of it.
        """
        owner, call = Address(forward.name, forward.incarnation), forward.call
        if self._calls.is_lost(owner) and not call.job and not call.cast:
            return
        replica = self._replicas.get(call.actor)
        if replica is None or not replica.spec.stateful:
            self._calls.tell(
                owner, Forwarded(call.id, *self._calls.me, forward.hops, call.actor, call.session, "", call.attempt)
            )
        self.on_call(owner, call, self._loop.time(), hops=forward.hops)

    # What the global controller decides (`enforcement.Enforcer`).

    def obey(self, states: Iterable[actions.State]) -> None:
        """These hold from now on, and no others: also for what is queued."""
        states = tuple(states)
        changed = self._admission.take_states(states)
        if changed:
            self._end_forbidden(changed)
        self._set_limits(states)
        self._move_queued(states)

    def _forbidden(self, owner: Address, call: Call) -> NotAllowedError | None:
        """Why the call may not be made."""
        member = self._table.members.get(owner.name)
        # Not only of what it serves now: what it serves no more may still run there.
        is_worker = member is not None and member.role == "worker" and not is_client_name(owner.name)
        caller = call.caller if call.caller and (owner == self._calls.me or is_worker) else owner.name
        rule = self._admission.rule_against(call.actor, caller, call.tenant)
        if rule is None:
            return self._shut_out(call)
        whose = f"{caller!r} of tenant {call.tenant!r}" if call.tenant else f"{caller!r}"
        _log.warning(
            "call.not_allowed", actor=call.actor, caller=caller, process=owner.name, tenant=call.tenant, reason=rule.reason
        )
        self._note("refused", rule.reason or f"{caller} may not call {call.actor}", id=call.id)
        why = f": {rule.reason}" if rule.reason else ""
        return NotAllowedError(f"{whose} may not call {call.actor!r}{why}", reason=rule.reason)

    def _shut_out(self, call: Call) -> NotAllowedError | None:
        limit = self._admission.shut_by(call.actor, call.session, call.tenant, call.job)
        if limit is None:
            return None
        self._note("refused", limit.reason or actions.describe(limit), id=call.id)
        why = f": {limit.reason}" if limit.reason else ""
        return NotAllowedError(f"{actions.describe(limit)}{why}", reason=limit.reason)

    def _end_forbidden(self, changed: Mapping[str, set[Group] | None]) -> None:
        for execution in list(self._executions.values()):
            call = execution.call
            if execution.started or execution.ended or call.actor not in changed:
                continue
            groups = changed[call.actor]
            if groups is not None and groups.isdisjoint(groups_with(call.session, call.tenant, call.job)):
                continue
            forbidden = self._forbidden(execution.owner, execution.call)
            if forbidden is not None:
                self._give_up(execution, forbidden)

    def _set_limits(self, states: tuple[actions.State, ...]) -> None:
        former, limits = self._limits, dict[str, dict[Group, actions.Limit]]()
        for state in states:
            if isinstance(state, actions.Limit) and not state.refuses:
                limits.setdefault(state.agent, {})[state.session, state.tenant, state.job] = state
        self._limits = limits
        for actor in former.keys() | limits.keys():
            replica, now = self._replicas.get(actor), limits.get(actor, {})
            if replica is None or now == former.get(actor, {}):
                continue
            groups = {group: limit.running for group, limit in now.items()}
            replica.mailbox.limit(groups.pop(_ALL, None), groups)
            for group, limit in now.items():
                whose = f" of job {group[2]}" if group[2] else f" of tenant {group[1]}" if group[1] else ""
                self._note(f"at most {limit.running}{whose} at once", limit.reason, session=group[0], actor=actor)
            self.pump(replica)

    def _move_queued(self, states: tuple[actions.State, ...]) -> None:
        """Passes on what is queued here, has no state, and is to be elsewhere."""
        actors = {state.agent for state in states if isinstance(state, actions.Route)}
        actors |= {actor for actor in self._replicas if self._table.is_shut(actor, self._calls.me.name)}
        if not actors & self._replicas.keys():
            return
        for execution in list(self._executions.values()):
            if execution.started or execution.resumed is not None or execution.call.actor not in actors:
                continue
            call = execution.call
            ordered = self._ordered_elsewhere(execution.replica, call, is_shut=True)
            if ordered is not None:
                self._pass_on_queued(execution, *ordered)

    def _ordered_elsewhere(self, replica: Replica, call: Call, *, is_shut: bool = False) -> tuple[Address, str] | None:
        """Where a call without state is to be if not here, and why; with `is_shut` also if this instance is to have none."""
        if replica.spec.stateful:
            return None
        me = self._calls.me
        ordered = self._table.route_of(call.actor, call.session)
        if ordered is None and is_shut and self._table.is_shut(call.actor, me.name):
            ordered = self._table.ordered(call.actor, call.session)
        return ordered if ordered is not None and ordered[0] != me else None

    def _replacement(self, replica: Replica) -> Address | None:
        """Who serves an actor without state in place of this worker, which does not any more; None if it does, or nobody."""
        actor = replica.spec.name
        if replica.spec.stateful or actor not in self.retired:
            return None
        address = self._table.choose(actor, self._calls.in_flight.get(actor, {}))
        return address if address != self._calls.me else None

    def empty(self, actor: str, reason: str) -> None:
        """The actor is retired: its calls without state that have not begun go to others."""
        replica = self._replicas[actor]
        for execution in list(self._executions.values()):
            if execution.replica is not replica or execution.started or execution.resumed is not None:
                continue
            replacement = self._replacement(replica)
            if replacement is not None:
                self._pass_on_queued(execution, replacement, reason or "it is not served here any more")

    def _pass_on_queued(self, execution: Execution, target: Address, reason: str) -> None:
        owner, call, hops = execution.owner, self._with_time_left(execution), execution.hops + 1
        self._send_away(execution)
        self._pass_on(owner, call, target, reason, hops)

    def _pass_on(self, owner: Address, call: Call, target: Address, reason: str, hops: int = 1) -> None:
        self._note(f"passed on to {target.name}", reason, id=call.id)
        self._calls.tell(target, Forward(owner.name, owner.incarnation, call, hops))

    def set_session_priorities(self, sessions: Iterable[str], priorities: Priorities) -> None:
        """The calls of the sessions, queued and to come, have these priorities from now on."""
        self._priorities = priorities
        sessions = tuple(sessions)
        for actor, replica in self._replicas.items():
            for session in sessions:
                replica.mailbox.set_priority(session, priorities.of(session, actor))

    async def act(self, act: actions.Act) -> None:
        """Moves a session that is to move, if it is here."""
        if isinstance(act, actions.Migrate) and act.source == self._calls.me.name:
            await self._migrate(act)

    async def _migrate(self, act: actions.Migrate) -> None:
        replica, member = self._replicas.get(act.agent), self._table.members.get(act.target)
        if replica is None or member is None:
            _log.warning("session.not_migrated", actor=act.agent, session=act.session, to=act.target, error="it is not there")
            return
        if not replica.spec.stateful:
            target = Address(act.target, member.incarnation)
            for execution in list(self._executions.values()):
                if execution.replica is replica and execution.call.session == act.session and not execution.started:
                    self._pass_on_queued(execution, target, act.reason)
            return
        for key in sorted(replica.held.get(act.session, ())) or [act.session]:
            await self._migrate_one(key, act)

    async def _migrate_one(self, key: str, act: actions.Migrate) -> None:
        session, _, _ = key.partition("/")
        try:
            refusal = self.refusal(act.agent)
            if refusal or self.migrations is None:
                raise MigrationError(refusal)
            await self.migrations.move(Migrate(self._calls.fresh_id(), act.agent, key, act.target))
        except NalarError as error:
            _log.warning("session.not_migrated", actor=act.agent, session=key, to=act.target, error=str(error))
            self._note(f"not moved to {act.target}: {error}", act.reason, session=session, actor=act.agent)
        else:
            self._note(f"moved to {act.target}", act.reason, session=session, actor=act.agent)

    def _note(self, what: str, reason: str, *, id: bytes = b"", session: str = "", actor: str = "") -> None:
        self._calls.explanations.note(self._loop.time(), what, reason, id=id, session=session, actor=actor)

    def explain(self, id: bytes) -> list[Explanation]:
        """What was decided here about the session and the actor of a call that runs here or has, and how it stands now."""
        execution = self._executions.get(id)
        record = execution.record(0.0) if execution is not None else _last_of(self._ended, id)
        if record is None:
            return []
        now = self._loop.time()
        until_s = now if record.error == _MOVED else record.ended_s or now
        found = self._calls.explanations.of_session(record.session, record.actor, until_s)
        if execution is None:
            return found
        rank = None if self._priorities is None else self._priorities.rank_of(record.session)
        if rank is not None and not execution.started:
            found.append(Explanation(now, f"rank {rank} of its session", "the ranks of all sessions"))
        if execution.replica.mailbox.is_held(id):
            found.append(Explanation(now, "held back by a limit", ""))
        return found

    def arrival(self, key: Key, version: int) -> Arrival | None:
        """What gathers a session that comes, kept by that version of its agent; None if a call is to read it from the store.

        Raises:
            MigrationError: it cannot be served here.
        """
        spec = self._replicas[key[0]].spec
        if version > spec.state_version:
            raise MigrationError(
                f"version {version} of {key[0]!r} has kept the session, and worker {self._calls.me.name!r} has version "
                f"{spec.state_version}"
            )
        if spec.transparent or version != spec.state_version or not isinstance(spec.target, type):
            return None
        return Arrival(spec.target)

    async def stage(self, key: Key, kept: Kept, arrival: Arrival) -> None:
        """Makes an instance of what has come."""
        replica = self._replicas[key[0]]
        await self._invoker.make(replica, key[1], kept, arrival)
        self._hold(replica, key[1])

    def _is_recorded(self, owner: Address, call: Call, stores: Stores) -> bool:
        """True if the call has taken effect already: then its owner is told what it came to, or why that is not known."""
        try:
            record = stores.record(call.actor, session_key_of(call), call.id)
        except (CallError, StoreError) as error:
            self._refuse(owner, call, error if isinstance(error, CallError) else StateDamagedError(str(error)))
            return True
        if record is None:
            return False
        message = Resolve(call.id, record.payload)
        if call.job:
            self._kept[call.id] = _Kept(message, call.job, owner, self._loop.time())
        if not call.cast:
            self._calls.tell(owner, message)
        return True

    def _begin_recalling(self, execution: Execution) -> None:
        execution.resumed = Resumed(is_recalling=True)
        task = self._loop.create_task(self._recall(execution))
        self._recalling.add(task)
        task.add_done_callback(self._recalling.discard)

    async def _recall(self, execution: Execution) -> None:
        resumed = execution.resumed
        assert resumed is not None
        try:
            resumed.memory = await self._remember(execution.call.job, execution.call.lost)
        except Exception as error:
            _log.exception("call.recall_failed", actor=execution.label, job=execution.call.job)
            self._give_up(execution, error)
            return
        resumed.is_recalling = False
        if not execution.missing and not execution.ended:
            self._make_ready(execution)

    def _give_up(self, execution: Execution, error: Exception) -> None:
        """Ends a call that cannot begin."""
        if not execution.ended:
            execution.replica.mailbox.remove(execution.call.id)
            self._answer_error(execution, error)
            self._forget(execution)

    def _sender_name(self, owner: Address) -> str:
        """The name of a sender in mailboxes, which `_sender_names` keeps: the same object for all its calls."""
        name = self._sender_names[owner] = f"{owner.name}/{owner.incarnation}"
        return name

    def _shed(self, replica: Replica) -> None:
        """Gives back the queued call that matters least: of the lowest priority the youngest, perhaps the one just come."""
        id = replica.mailbox.shed()
        execution = self._executions.get(id) if id is not None else None
        if execution is None:
            return
        self.shed += 1
        text = f"worker {self._calls.me.name!r} holds {self._high_water:,} calls, and this one mattered least"
        retry_after_s = max(1.0, replica.mailbox.last_wait_s)
        self._answer_error(execution, OverloadedError(text, retry_after_s=retry_after_s))
        self._forget(execution)

    def _refuse(self, owner: Address, call: Call, error: CallError) -> None:
        error.call_id, error.actor = call.id.hex(), call.actor
        if not call.cast:
            self._calls.tell(owner, Fail(call.id, *values.encode_error(error), epoch=call.epoch))

    def _await_values(self, execution: Execution) -> None:
        pushed, deps = self._pushed, execution.call.deps
        if execution.call.failures:  # what failed before is made again under the same id: its former error says nothing
            for id in [id for id in deps if type(pushed.get(id)) is Fail]:
                self._forget_push(id)
        execution.given = {id: pushed[id] for id in deps if id in pushed}
        missing = {id for id in deps if id not in pushed}
        if missing:
            execution.missing = missing
            for id in missing:
                self._waiting.setdefault(id, []).append(execution)

    def on_pushed(self, message: Resolve | Fail) -> None:
        """A value that an execution here depends on, or may soon."""
        known = self._pushed.get(message.id)
        if known is not None:
            if type(known) is not Fail or type(message) is Fail:
                return
            self._forget_push(message.id)  # a later attempt at its job has succeeded where that one had failed
        self._pushed[message.id] = message
        self._pushed_bytes += len(message.payload)
        for execution in self._waiting.pop(message.id, ()):
            missing = execution.missing
            if missing is not None and execution.given is not None:
                missing.discard(message.id)
                execution.given[message.id] = message
                if not missing and not execution.ended:
                    execution.missing = None
                    if not execution.is_recalling:
                        self._make_ready(execution)
        while len(self._pushed) > _PUSHED_KEPT or self._pushed_bytes > _PUSHED_BYTES:
            self._forget_oldest_push()

    def _make_ready(self, execution: Execution) -> None:
        """It has its arguments, and may begin."""
        self._changes.change(execution.told, QUEUED, self._loop.time())
        execution.replica.mailbox.mark_ready(execution.call.id)
        self.pump(execution.replica)

    def _forget_oldest_push(self) -> None:
        self._forget_push(next(iter(self._pushed)))

    def _forget_push(self, id: bytes) -> None:
        self._pushed_bytes -= len(self._pushed.pop(id).payload)

    def on_cancel(self, owner: Address, cancel: Cancel) -> None:
        """The owner does not want the result any more."""
        execution = self._executions.get(cancel.id)
        if execution is not None and execution.following is not None and execution.following[0] == owner:
            assert execution.resumed is not None
            call, execution.resumed.following = execution.following[1], None
            self._refuse(owner, call, CallCancelledError(cancel.reason or "cancelled", started=False))
        elif execution is not None and execution.owner == owner:
            self._cancel(execution, cancel.reason)

    def _cancel(self, execution: Execution, reason: str, *, with_children: bool = True) -> None:
        if not execution.started:
            execution.replica.mailbox.remove(execution.call.id)
            self._answer_error(execution, CallCancelledError(reason or "cancelled", started=False))
            self._forget(execution)
            self.pump(execution.replica)
            return
        if execution.is_batched:
            self._answer_error(execution, CallCancelledError(reason or "cancelled", started=True))
            return  # the others want the batch to go on
        context = execution.context
        if context is None or context.cancelled or execution.is_committing:
            return
        context.cancelled = reason or "cancelled"
        if with_children:
            if context.history is not None:
                self._calls.abandon_children(execution.call.id, context.cancelled)
                self._calls.witness.stop_repeating(context.history)
            else:
                self._calls.cancel_children(execution.call.id, context.cancelled)
        self._preempt(execution)
        if execution.child is not None:
            execution.child()
        if execution.outflow is not None:
            execution.outflow.close()
        if execution.task is not None:
            execution.task.cancel()
        else:
            self._answer_error(execution, CallCancelledError(context.cancelled, started=True))

    def _preempt(self, execution: Execution) -> None:
        """Calls the function that the user named for stopping a running call."""
        hook = execution.replica.spec.directives.preemptable
        if hook:
            self._invoker.run_hook(execution, hook)

    def on_consume(self, owner: Address, consume: Consume) -> None:
        """The result is to be pushed to one more process; if it has been sent already, the owner sees to that."""
        execution = self._executions.get(consume.id)
        if execution is None or execution.owner != owner:
            return
        consumer = Address(consume.name, consume.incarnation)
        if execution.consumers is None:
            execution.consumers = [consumer]
        elif consumer not in execution.consumers:
            execution.consumers.append(consumer)

    def on_credit(self, owner: Address, credit: Credit) -> None:
        """The owner takes pieces of the stream up to a number; a call that waits for room in the channel comes later."""
        execution = self._executions.get(credit.id)
        if execution is None:
            self._early_credits[credit.id] = credit.limit
            if len(self._early_credits) > _EARLY:
                self._early_credits.popitem(last=False)
        elif execution.owner == owner:
            self.outflow(execution).allow(credit.limit)

    def on_prioritise(self, owner: Address, message: Prioritise) -> None:
        """The owner has given the call another priority; a call that waits for room in the channel comes later."""
        execution = self._executions.get(message.id)
        if execution is None:
            self._early_priorities[message.id] = message.priority
            if len(self._early_priorities) > _EARLY:
                self._early_priorities.popitem(last=False)
        elif execution.owner == owner:
            force_setattr(execution.call, "priority", message.priority)
            self._changes.move(execution.told, message.priority)
            execution.replica.mailbox.prioritise(message.id, message.priority)
            if execution.context is not None:
                execution.context.priority = message.priority
                self._calls.lend_priority_to_children(message.id, message.priority)

    def outflow(self, execution: Execution) -> Outflow:
        """Where the pieces go that a generator yields."""
        if execution.outflow is None:
            send = functools.partial(self._calls.tell, execution.owner)
            keep = functools.partial(self._claim_for, execution)
            execution.outflow = Outflow(execution.call, execution.label, send, keep, self._loop)
        return execution.outflow

    def on_owner_lost(self, owner: Address) -> None:
        """Nobody is left who wants that process's calls: they end, their children with them.

        Casts go on, since nobody ever waited for them, and so do calls of jobs, which another attempt may ask for; unless
        they need a value that now never comes.
        """
        self._sender_names.pop(owner, None)
        for execution in [e for e in self._executions.values() if e.owner == owner]:
            if execution.call.cast and not execution.missing:
                continue
            if _may_be_adopted(execution):
                execution.resumed = execution.resumed or Resumed()
                execution.resumed.is_orphan = True
                if execution.call.timeout_s is not None:
                    self._unwatched[execution.call.id] = execution
                continue
            execution.is_answered = True
            self._cancel(execution, f"its caller {owner.name!r} is gone")

    def calls_without_owner(self, jobs: frozenset[str]) -> list[bytes]:
        """Calls of jobs that are queued, run or have ended here, and whose owner is gone."""
        if self._is_muted:
            return []
        orphans = (e for e in self._executions.values() if e.is_orphan and e.call.job in jobs)
        running = [execution.call.id for execution in orphans if not execution.is_winding_down]
        ended = [id for id, kept in self._kept.items() if kept.job in jobs and self._calls.is_lost(kept.owner)]
        return running + ended

    def label_of(self, id: bytes) -> str:
        """The actor, and its method, of a call that runs here; empty if it does not."""
        execution = self._executions.get(id)
        return "" if execution is None else execution.label

    def on_wait(self, execution: Execution) -> None:
        """A call waits for others."""
        self._changes.change(execution.told, WAITING, self._loop.time())
        if execution.call.job:
            self._waiting_in_jobs[execution.call.id] = execution

    def on_resume(self, execution: Execution) -> None:
        """A call waits no more."""
        self._changes.change(execution.told, RUNNING, self._loop.time())
        if execution.call.job:
            self._waiting_in_jobs.pop(execution.call.id, None)
            self._park(execution, False)

    def _look_for_parked(self, _: float) -> None:
        """Tells the owners of calls that wait for nothing but people or time: whoever has taken in the job has room then."""
        for id, execution in self._waiting_in_jobs.items():
            self._park(execution, self._calls.waits_for_outside(id))

    def _park(self, execution: Execution, is_parked: bool) -> None:
        if execution.is_parked != is_parked:
            execution.is_parked = is_parked
            self._calls.tell(execution.owner, Parked(execution.call.id, is_parked))

    def may_begin(self) -> bool:
        """False while others may hold this process to be lost."""
        return self._may_begin()

    def is_waiting(self, id: bytes) -> bool:
        """True if the call runs here and waits for others."""
        execution = self._executions.get(id)
        return execution is not None and execution.waits > 0

    def on_standstill(self, history: History) -> None:
        """A workflow that repeats a job waits, and does not do what it did before: it is ended."""
        execution = self._executions.get(history.call_id)
        if execution is not None and not execution.is_winding_down:
            self._answer_error(execution, _changed(execution, history, "it does not make the calls again that it made before"))
            self._cancel(execution, "its workflow has changed")

    def mute(self) -> None:
        """Others hold this process to be lost: what its calls of jobs come to from now on is no answer to anybody."""
        self._is_muted = True
        for execution in self._executions.values():
            if execution.call.job:
                execution.is_answered = True
        self._kept.clear()

    def on_settled(self, owner: Address, settled: Settled) -> None:
        """What a call of a job came to is durable: nobody will ask for it, nor for what it has observed."""
        kept, execution = self._kept.get(settled.id), self._executions.get(settled.id)
        if kept is None and execution is not None and execution.owner == owner:
            execution.resumed = execution.resumed or Resumed()
            execution.resumed.is_settled = True
        if kept is not None and kept.owner == owner:
            del self._kept[settled.id]
            if not settled.again and self._calls.journal is not None:
                self._calls.journal.release(settled.id)

    # Running.

    def pump(self, replica: Replica) -> None:
        """Starts what may run now. What ends at once meanwhile makes room for this same pump, not for one inside it.

        Nothing does while this process may be held to be lost, and others may run its calls; `_keep_up` looks again.
        """
        if replica.is_pumping or not replica.mailbox.has_next():
            return
        replica.is_pumping = True
        try:
            if replica.spec.directives.batchable:
                self._pump_batches(replica)
            else:
                self._pump_calls(replica)
        finally:
            replica.is_pumping = False

    def _pump_calls(self, replica: Replica) -> None:
        mailbox, now = replica.mailbox, self._loop.time()
        while self._may_begin():
            id = mailbox.take(now)
            if id is None:
                return
            execution = self._executions.get(id)
            if execution is None:
                mailbox.finish(id)
            else:
                self._start(execution, now)
            if not mailbox.has_next():
                return

    def _pump_batches(self, replica: Replica) -> None:
        while self._may_begin():
            now = self._loop.time()
            ids = replica.mailbox.take_batch(now, BATCH_LIMIT)
            if not ids:
                return
            executions = [execution for id in ids if (execution := self._executions.get(id)) is not None]
            batch = executions[0].method.batch if len(executions) > 1 else None
            if batch is None:
                for execution in executions:
                    self._start(execution, now)
            else:
                self._start_batch(batch, executions, now)

    def _start_batch(self, batch: Callable[..., Any], executions: list[Execution], now: float) -> None:
        """Runs several calls as one; those that cannot begin end by themselves."""
        begun: list[Execution] = []
        arguments: list[Any] = []
        for execution in executions:
            if execution.has_claims:
                self._start(execution, now)
                continue
            prepared = self._prepare(execution, now)
            if prepared is None:
                continue
            args, kwargs = prepared
            if len(args) == 1 and not kwargs:
                begun.append(execution)
                arguments.append(args[0])
            else:
                self._run(execution, args, kwargs)
        for execution in begun:
            execution.is_batched = True
        if begun:
            self._invoker.run_batch(batch, begun, arguments)

    def _start(self, execution: Execution, now: float) -> None:
        if execution.given is not None and execution.has_claims:
            if self._has_begun(execution, now):
                execution.context = self._context_of(execution)
                execution.task = self._move(self._load_and_run(execution))
            return
        if not self._has_begun(execution, now):
            return
        try:
            args, kwargs = self._arguments(execution)
        except Exception as error:
            self.end(execution, None, error)
            return
        execution.context = self._context_of(execution)
        self._run(execution, args, kwargs)

    def _move(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that brings a large value in or out."""
        task = self._loop.create_task(work)
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)
        return task

    async def _load_and_run(self, execution: Execution) -> None:
        assert execution.given is not None
        try:
            for id, found in execution.given.items():
                if type(found) is Resolve and found.payload[:1] == MARK:
                    execution.given[id] = Resolve(id, await self._calls.claims.read(found.payload))
            args, kwargs = await asyncio.to_thread(self._arguments, execution)
            if not self._may_begin():
                await self._invoker.until_current()
        except BaseException as error:
            self.end(execution, None, error)
            return
        execution.given = None  # decoded: the bytes are needed no more
        execution.task = None
        self._run(execution, args, kwargs)

    def _prepare(self, execution: Execution, now: float) -> tuple[list[Any], dict[str, Any]] | None:
        """Its arguments, with its context made; None if it has ended instead."""
        if not self._has_begun(execution, now):
            return None
        try:
            args, kwargs = self._arguments(execution)
        except Exception as error:
            self.end(execution, None, error)
            return None
        execution.context = self._context_of(execution)
        return args, kwargs

    def _has_begun(self, execution: Execution, now: float) -> bool:
        """False if it has ended instead."""
        call, replica = execution.call, execution.replica
        execution.started = True
        execution.began = now
        self._changes.change(execution.told, RUNNING, now)
        if replica.spec.stateful:
            session_key = execution.session_key
            replica.holders.setdefault(session_key, call.id)
            if session_key not in replica.instances:
                self._hold(replica, session_key, call.tenant)
        if call.timeout_s is not None and now >= execution.arrived + call.timeout_s:
            waited = f"it came {call.timeout_s:.3g} s before that and waited for {now - execution.arrived:.3g} s"
            self.end(execution, None, CallTimeoutError(f"{execution.label} was not begun before its deadline: {waited}"))
            return False
        if execution.given is not None and (failed := self._failed_dependency(execution.given)) is not None:
            self._end_with_fail(execution, failed)
            return False
        return True

    def _context_of(self, execution: Execution) -> CallContext:
        call = execution.call
        timeout_s = call.timeout_s
        return CallContext(
            self._calls,
            call.id,
            not call.parent,
            call.session,
            call.job,
            call.priority,
            None if timeout_s is None else execution.arrived + timeout_s,
            call.trace,
            call.budget,
            execution,
            history=_history_of(execution) if call.job else None,
            actor=call.actor,
            tenant=call.tenant,
            workflow=call.workflow or execution.replica.workflow,
        )

    def _run(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> None:
        history = None if execution.context is None else execution.context.history
        if history is not None and history.memory is not None:
            if history.former_version not in ("", history.version):
                self.end(execution, None, _changed(execution, history, "it was begun by another version of its workflow"))
                return
            self._calls.witness.watch(history)
        self._invoker.run(execution, args, kwargs)

    def _failed_dependency(self, given: dict[bytes, Resolve | Fail]) -> Fail | None:
        return next((found for found in given.values() if type(found) is Fail), None)

    def _arguments(self, execution: Execution) -> tuple[list[Any], dict[str, Any]]:
        call = execution.call
        args, kwargs = values.decode_arguments(call.payload, execution.value_of if call.deps else None)
        spec = execution.replica.spec
        if spec.transparent and call.parent:
            return args, kwargs
        return execution.method.fitted(execution.method.label, args, kwargs)

    # The end of an execution.

    def end(self, execution: Execution, payload: bytes | None, error: BaseException | None) -> None:
        """The code of a call has come to an encoded result, or an error."""
        context = execution.context
        if context is not None:
            if context.cancelled:
                error = CallCancelledError(context.cancelled, started=True)
            history = context.history
            if error is None and history is not None and history.is_repeating:
                if history.next_wanted is not None:
                    error = _changed(execution, history, "it ends without the calls that it made before")
                else:
                    self._calls.witness.skip_looks(history)
        if payload is not None and (len(payload) > INLINE_LIMIT_BYTES or payload[:1] == MARK):
            is_wanted = error is None and not execution.is_answered and not execution.call.cast
            if is_wanted and payload[:1] != MARK:
                execution.task = self._move(self._keep_and_end(execution, payload))
                return
            payload = self._fitting(execution, payload, is_wanted)
        if error is None and execution.changes and execution.replica.stores is not None:
            assert payload is not None
            self._commit(execution, payload, execution.replica.stores)
        else:
            self._close(execution, payload, error)

    def _commit(self, execution: Execution, payload: bytes, stores: Stores) -> None:
        """Nobody is told, and the session is held, until what the call has changed is durable."""
        call, state, changes = execution.call, execution.managed, execution.changes
        assert state is not None and state.kept is not None and changes is not None

        def done(error: Exception | None) -> None:
            self._inbox.put(functools.partial(self._committed, execution, payload, error))

        execution.is_committing = True
        spec = execution.replica.spec
        stores.commit(
            state.kept,
            changes,
            call.id,
            payload,
            done,
            is_job=bool(call.job),
            schema=spec.state_version,
            kinds=spec.managed_kinds,
        )

    def _committed(self, execution: Execution, payload: bytes, cause: Exception | None) -> None:
        execution.is_committing = False
        error = None if cause is None else StateNotKeptError(f"what {execution.label} has changed was not kept: {cause}")
        if error is None and self.migrations is not None and execution.changes is not None:
            call = execution.call
            outcome = Outcome(call.id, payload, self._clock(), bool(call.job))
            self.migrations.on_commit((call.actor, execution.session_key), execution.changes, outcome)
        self._close(execution, payload, error)
        if error is not None:  # the next call reads what is in the store
            self._end_instances(execution.replica, [execution.session_key])

    def _close(self, execution: Execution, payload: bytes | None, error: BaseException | None) -> None:
        if execution.managed is not None:
            _end_changes(execution.managed, error)
            if error is not None and execution.managed.kept is not None and not execution.managed.was_kept:
                self._end_instances(execution.replica, [execution.session_key], even_held=True)
        try:
            if error is None:
                assert payload is not None
                pushed = _names(execution.consumers) if execution.consumers else ()
                self._answer(execution, Resolve(execution.call.id, payload, pushed))
            else:
                self._abandon(execution)
                self._answer_error(execution, error)
        except Exception as cause:  # it does not fit through the transport
            execution.is_answered = False
            self._abandon(execution)
            self._answer_error(execution, cause)
        finally:
            self._finish(execution)

    def _abandon(self, execution: Execution) -> None:
        """What a call of a job that has failed had called ends, and what it had begun calls no more: another attempt does."""
        call, context = execution.call, execution.context
        if call.job and not (call.cast or execution.is_answered or self._is_closing):
            self._calls.abandon_children(call.id, _FAILED)
            if context is not None and context.history is not None:
                context.cancelled = context.cancelled or _FAILED
                self._calls.witness.stop_repeating(context.history)

    async def _keep_and_end(self, execution: Execution, data: bytes) -> None:
        claim: bytes | None = None
        error: BaseException | None = None
        try:
            claim = await self._claim_for(execution, data)
        except BaseException as cause:
            error = cause
        execution.task = None
        self.end(execution, claim, error)

    async def _claim_for(self, execution: Execution, data: bytes) -> bytes:
        """A claim for a value that the owner of a call is to hold."""
        readers = [execution.owner, *(execution.consumers or ())]
        kept = self._calls.claims.keep(data, execution.owner, readers, execution.deadline, execution.call.job)
        return write_claim(await kept)

    def _fitting(self, execution: Execution, payload: bytes, is_wanted: bool) -> bytes:
        """A claim for those who can read it, the owner serves the others; nothing for a value that nobody wants."""
        claims = self._calls.claims
        if not is_wanted:
            if payload[:1] == MARK:
                claims.drop(payload)
            return _NOTHING
        claim = read_claim(payload)
        execution.consumers = [consumer for consumer in execution.consumers or () if claims.can_read(consumer, claim)] or None
        return payload

    def _end_with_fail(self, execution: Execution, cause: Fail) -> None:
        fail = msgspec.structs.replace(
            cause,
            id=execution.call.id,
            pushed=_names(execution.consumers),
            path=_path(execution, cause.path),
            epoch=execution.call.epoch,
        )
        execution.failure = cause.kind
        self._answer(execution, fail)
        self._finish(execution)

    def _finish(self, execution: Execution) -> None:
        self._forget(execution)
        replica, call = execution.replica, execution.call
        session_key = execution.session_key
        if replica.spec.stateful and replica.holders.get(session_key) == call.id:
            del replica.holders[session_key]
            if not replica.has_used(session_key):  # idle from now on, not from its beginning
                self._let_go(replica, session_key)
            if self._quiet and (waiter := self._quiet.pop((call.actor, session_key), None)) is not None:
                waiter.set_result(None)
        replica.mailbox.finish(call.id)
        if call.job and _is_forgotten(execution) and self._calls.journal is not None:
            self._calls.journal.release(call.id)
        self.completed += 1
        self.pump(replica)

    def _forget(self, execution: Execution) -> None:
        execution.ended = True
        now = self._loop.time()
        self._ended.append(execution.record(now))
        self._changes.end(execution.told, _outcome_of(execution) if execution.failure else DONE, now)
        if execution.context is not None and execution.context.history is not None:
            execution.context.history.is_over = True
        execution.context = None  # it refers back: without this only the garbage collector would find the two
        call, resumed = execution.call, execution.resumed
        self._executions.pop(call.id, None)
        if call.job:
            self._waiting_in_jobs.pop(call.id, None)
        if call.holds:
            self._below_holders.pop(call.id, None)
        if call.cast or (resumed is not None and resumed.is_orphan):
            self._unwatched.pop(call.id, None)
        if execution.missing:
            for id in execution.missing:
                waiting = self._waiting.get(id)
                if waiting is not None:
                    waiting.remove(execution)
                    if not waiting:
                        del self._waiting[id]
        if resumed is not None and resumed.following is not None:
            self._loop.call_soon(self.on_call, *resumed.following, now)

    def _answer_error(self, execution: Execution, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = CallCancelledError("cancelled itself", started=execution.started)
        below = path_of(error)
        if isinstance(error, CallTimeoutError) and error.actor and error.actor != execution.label:
            below = below or (error.actor,)
            error = self._late(execution, error, below)
        if isinstance(error, CallError):
            error.call_id = error.call_id or execution.call.id.hex()
            error.actor = error.actor or execution.label
        origins.strip(error)
        failure = values.encode_error(error)
        if len(failure.payload) > INLINE_LIMIT_BYTES:
            failure = failure._replace(payload=b"")  # its text and traceback are short
        execution.failure = failure.kind
        history = None if execution.context is None else execution.context.history
        if history is not None and (losses := losses_in(error)):
            self._calls.witness.void(history, losses)
        if execution.call.cast:
            _log.error("cast.failed", actor=execution.label, error=failure.text, kind=failure.kind)
        path, epoch = _path(execution, below), execution.call.epoch
        self._answer(execution, Fail(execution.call.id, *failure, _names(execution.consumers), path, epoch))

    def _late(self, execution: Execution, error: CallTimeoutError, below: tuple[str, ...]) -> CallTimeoutError:
        """How a call ends that a time-out of a call it made ends: if its own deadline has passed, by that."""
        timeout_s = execution.call.timeout_s
        if timeout_s is None or self._loop.time() < execution.arrived + timeout_s:
            return error
        late = CallTimeoutError(f"{execution.label} did not end before its deadline: it waited for {' -> '.join(below)}")
        late.__cause__ = error
        return late

    def _answer(self, execution: Execution, message: Resolve | Fail) -> None:
        resumed = execution.resumed
        if execution.is_answered or (resumed is not None and resumed.following is not None):
            return
        execution.is_answered = True
        call, consumers = execution.call, execution.consumers
        if call.job and not _is_forgotten(execution):
            self._kept[call.id] = _Kept(message, call.job, execution.owner, self._loop.time())
        if consumers is not None:
            self._push(consumers, execution.owner, message)
        if not call.cast and (resumed is None or not resumed.is_orphan):
            # Who has passed a future on seldom waits for its value as well: those who need it come first.
            self._calls.tell(execution.owner, message, linger=message.pushed != ())

    def _push(self, consumers: list[Address], owner: Address, message: Resolve | Fail) -> None:
        for consumer in consumers:
            if consumer == owner:
                continue
            if consumer == self._calls.me:
                self.on_pushed(message)
            else:
                self._calls.tell(consumer, message)

    # What waits for long.

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_WANT_AFTER_S)
            now = self._loop.time()
            for look in self._looks:
                try:
                    look(now)
                except Exception:
                    _log.exception("host.upkeep_failed")

    def _pump_all(self, _: float) -> None:
        self.pump_all()

    def pump_all(self) -> None:
        """Begins what had to wait until this process may begin calls."""
        for replica in self._replicas.values():
            self.pump(replica)

    def _ask_for_values(self, now: float) -> None:
        for id, executions in list(self._waiting.items()):
            for execution in list(executions):
                if now - execution.wanted_at >= _WANT_AFTER_S:
                    execution.wanted_at = now + min(10.0, now - execution.arrived)
                    self._calls.tell(execution.owner, Want(id))

    def _end_kept(self, now: float) -> None:
        """What a job that was never tried again came to."""
        for id in [id for id, kept in self._kept.items() if now - kept.at > _KEPT_S and self._calls.is_lost(kept.owner)]:
            del self._kept[id]
            if self._calls.journal is not None:
                self._calls.journal.release(id)

    def _end_unwatched(self, now: float) -> None:
        """Of casts, and of calls whose owner is gone, nobody else watches the deadline."""
        for execution in [e for e in self._unwatched.values() if e.deadline is not None and e.deadline <= now]:
            if execution.is_orphan:
                execution.is_answered = True  # the deadline was its owner's; who asks for it now has another one
            self._cancel(execution, "its deadline has passed")

    def _look_for_circles(self, now: float) -> None:
        """Asks for every call that has queued for long whether it waits for itself.

        The probe follows what the call waits for: the holder of its session, the calls that the holder has made and that
        have not ended, the holders of the sessions that those queue for. If it comes back, it has been round a circle.
        """
        if not any(replica.holders for replica in self._replicas.values()):
            return
        for execution in list(self._below_holders.values()):
            is_queued = not execution.started and execution.missing is None
            if is_queued and now - execution.arrived > _PROBE_AFTER_S and execution.replica.spec.stateful:
                id = execution.call.id
                self._pass_probe_on(execution, Probe(id, id, id))

    def on_probe(self, probe: Probe) -> None:
        """Somebody looks for a circle of waiting calls."""
        execution = self._executions.get(probe.id)
        if execution is None or len(probe.path) >= _PROBE_HOPS:
            return
        if execution.started:
            self._calls.probe_children(probe.id, probe)
        elif probe.id == probe.origin:
            if probe.least == probe.origin:
                self._break_circle(execution, probe.path)
        elif execution.replica.spec.stateful:
            self._pass_probe_on(execution, probe)

    def _pass_probe_on(self, execution: Execution, probe: Probe) -> None:
        holder = execution.replica.holders.get(execution.session_key)
        if holder is None:
            return
        least = min(probe.least, execution.call.id)
        path = (*probe.path, f"{execution.call.actor}[{execution.session_key}]")
        self._calls.probe_children(holder, Probe(b"", probe.origin, least, path))

    def _break_circle(self, execution: Execution, path: tuple[str, ...]) -> None:
        circle = " -> ".join((*path, path[0]))
        error = WaitCycleError(f"these sessions wait for each other: {circle}", cycle=path)
        execution.replica.mailbox.remove(execution.call.id)
        self._answer_error(execution, error)
        self._forget(execution)
        self.pump(execution.replica)

    def _end_idle_sessions(self, now: float) -> None:
        for replica in self._replicas.values():
            if replica.stores is not None:
                self._end_instances(replica, replica.idle("", now - _IN_MEMORY_S))  # read again when they are called
                continue
            for key in self._end_instances(replica, replica.idle("auto-", now - _SESSION_IDLE_S)):
                if replica.spec.stateful:
                    session, _, instance = key.partition("/")
                    self._calls.release_place(replica.spec.name, session, instance)

    def _end_instances(self, replica: Replica, keys: list[str], *, even_held: bool = False) -> list[str]:
        """Ends those of them that no call holds; returns their keys."""
        ended = [key for key in keys if even_held or key not in replica.holders]
        for key in ended:
            self._let_go(replica, key)
            self._threads.run(functools.partial(replica.end, replica.take_out(key)))
        return ended

    def _hold(self, replica: Replica, key: str, tenant: str = "") -> None:
        """The state of a session, or of one instance within it, is in memory here."""
        session = key.partition("/")[0]
        keys = replica.held.setdefault(session, set())
        if not keys:
            self._changes.hold(replica.spec.name, session, tenant)
        keys.add(key)

    def _let_go(self, replica: Replica, key: str) -> None:
        session = key.partition("/")[0]
        keys = replica.held.get(session)
        if keys is None or key not in keys:
            return
        keys.discard(key)
        if not keys:
            del replica.held[session]
            self._changes.let_go(replica.spec.name, session)

    def _forget_kept_sessions(self, now: float) -> None:
        """Of the sessions in stores that nobody named and nobody has called for long, some at a time."""
        if self._stores is None or now < self._forget_at:
            return
        self._forget_at = now + _FORGET_EVERY_S
        actors = [name for name, replica in self._replicas.items() if replica.stores is not None]
        before_s = self._clock() - _SESSION_IDLE_S
        self._threads.run(functools.partial(self._forget_in_thread, self._stores, actors, before_s))

    def _forget_in_thread(self, stores: Stores, actors: list[str], before_s: float) -> None:
        for actor in actors:
            is_loaded = self._replicas[actor].has_instance
            for key, store in stores.forget_idle(actor, "auto-", before_s, is_loaded):
                session, _, instance = key.partition("/")
                self._inbox.put(functools.partial(self._calls.release_place, actor, session, instance, store))

    def load(self) -> dict[str, tuple[int, int]]:
        """Queued and running calls by actor; those without any are left out."""
        counts = ((name, len(replica.mailbox), replica.mailbox.running) for name, replica in self._replicas.items())
        return {name: (queued, running) for name, queued, running in counts if queued or running}

    def records(self) -> list[CallRecord]:
        """Calls that have not ended, of very many the first ones, and the last ones that have."""
        live = itertools.islice(self._executions.values(), REMEMBERED)
        return [*(execution.record(0.0) for execution in live), *self._ended]

    @property
    def running(self) -> int:
        """Calls that are queued or run."""
        return len(self._executions)

    async def aclose(self) -> None:
        """Ends all instances and threads; what still runs is cancelled."""
        self._is_closing = True
        self.end_running(self.executions)
        await cancel_all(self._recalling)
        if self._upkeep is not None:
            self._upkeep.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._upkeep
        tasks = [*(e.task for e in self._executions.values() if e.task is not None), *self._moving]
        if tasks:
            await asyncio.wait(tasks, timeout=2.0)
        await self._invoker.stop_instances(self._replicas.values())
        self._invoker.close()


def _outcome_of(execution: Execution) -> int:
    """How a call without a value has ended, as reports tell it; one that has moved counts for nothing here."""
    return WAS_CANCELLED if execution.failure in (CANCELLED, _MOVED) else FAILED


def _last_of(records: deque[CallRecord], id: bytes) -> CallRecord | None:
    return next((record for record in reversed(records) if record.id == id), None)


def _is_forgotten(execution: Execution) -> bool:
    """True for a call of a job that nobody will ask for: what it comes to is not kept, nor what it has observed."""
    return execution.call.cast or (execution.resumed is not None and execution.resumed.is_settled)


def _may_be_adopted(execution: Execution) -> bool:
    """True for a call of a job that another owner can take over as it is: it needs nothing of the former one."""
    outflow = execution.outflow
    return bool(execution.call.job) and not execution.missing and (outflow is None or not outflow.is_streaming)


def _history_of(execution: Execution) -> History:
    call = execution.call
    memory = None if execution.resumed is None else execution.resumed.memory
    is_root = not call.parent
    version = execution.replica.spec.version if is_root else ""
    return History(
        call.job,
        call.id,
        in_order=is_root,
        memory=memory,
        failures=call.failures,
        version=version,
        began_s=execution.began,
    )


def _changed(execution: Execution, history: History, how: str) -> WorkflowChangedError:
    old, new, job = history.former_version, history.version, history.job
    versions = f"begun by {old}, now {new}" if old != new else f"both times {new}"
    return WorkflowChangedError(
        f"job {job!r} of {execution.label!r} cannot go on: {how} ({versions}). Let workers with the former code end such jobs "
        f"before others take their place; `nalar dead-letters retry {job}` begins this one afresh",
        job=job,
        old_version=old,
        new_version=new,
    )


def _malformed(call: Call) -> ArgumentError | None:
    """What no process of ours puts into a call: names go on into reports, where one that is none spoils all the others."""
    names = call.session + call.instance + call.job + call.tenant
    if not _NAMES.fullmatch(names) or (
        len(names) > LONGEST_TOKEN and max(map(len, (call.session, call.instance, call.job, call.tenant))) > LONGEST_TOKEN
    ):
        wrong = "its session, instance, job or tenant is no name"
    elif call.timeout_s is not None and math.isnan(call.timeout_s):
        wrong = f"a deadline in {call.timeout_s} s is no time"
    else:
        return None
    return ArgumentError(f"{call.actor!r} cannot be called so: {wrong}", actor=call.actor)


def _batch_key(call: Call) -> str:
    """What calls have in common that may run as one: the method, and the instance it is bound to."""
    return f"{call.method or call.actor}/{call.init.hex()}"


def _names(consumers: list[Address] | None) -> tuple[str, ...]:
    return tuple(consumer.name for consumer in consumers) if consumers else ()


def _path(execution: Execution, below: tuple[str, ...]) -> tuple[str, ...]:
    """The calls that an error has come through; of very many the lower ones."""
    return (execution.label, *below[-_PATH_SHOWN:])


def _end_changes(state: SessionState, error: BaseException | None) -> None:
    if error is None:
        state.commit()
    else:
        state.roll_back()
