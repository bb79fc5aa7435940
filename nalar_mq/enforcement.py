"""Has one process obey what the global controller decides, as `nalar_mq.actions` says it comes.

    NS.states, NS-control/states ──▶ Standing ──▶ routes: the routing table of every process
                                              └─▶ priorities, limits, permissions: the host of a worker
    NS.ranks.<me> ─────────────────▶ Standing ──▶ priorities of many sessions: the host
    NS-acts/acts, watched ─────────▶ Standing ──▶ the worker that is to serve, or has the session which is to move

What holds is read before the first call comes in, and again once in a lease: a message that was lost is made up for then. What
cannot be read changes nothing. Priorities of many sessions are set some at a time, between calls.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Protocol

from nalar_mq.actions import NO_RANK, Act, SetPriority, State
from nalar_mq.address import Address, Subjects
from nalar_mq.changes import Changes
from nalar_mq.errors import BrokerError
from nalar_mq.event_loop import cancel_all
from nalar_mq.explanations import Explanations
from nalar_mq.logs import logger
from nalar_mq.placement import RoutingTable
from nalar_mq.rules import Priorities
from nalar_mq.standing import Standing
from nalar_mq.transport import Delivered, Handler, KeyValue, Subscription, Transport, is_direct

STATES: Final = "states"
ACTS: Final = "acts"
_AT_ONCE: Final = 500  # sessions that are given priorities in one turn of the loop
_log = logger(__name__)


Acting = Callable[[Act], Coroutine[Any, Any, None]]
"""Does what is to happen once, if it is for this worker to do."""


class Enforcer(Protocol):
    """The part of a worker that runs calls, as one who obeys."""

    def obey(self, states: Iterable[State]) -> None:
        """These hold from now on, and no others."""
        ...

    def set_session_priorities(self, sessions: Iterable[str], priorities: Priorities) -> None:
        """The calls of the sessions, queued and to come, have these priorities from now on."""
        ...


class Enforcement:
    """The decisions that one process obeys.

    Args:
        transport, subjects, me, table: of the process.
        explanations: where what was decided about its sessions is noted.
        lease_s: what holds is read again once in this time.

    Attributes:
        standing: what is in force.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        me: Address,
        table: RoutingTable,
        explanations: Explanations,
        lease_s: float,
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._table = table
        self._explanations = explanations
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._enforcer: Enforcer | None = None
        self._changes: Changes | None = None
        self._priorities = Priorities()
        self._to_set: dict[str, None] = {}
        self._has_to_set = asyncio.Event()
        self._control: KeyValue | None = None
        self._subscriptions: list[Subscription] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._acting: set[asyncio.Task[None]] = set()
        self._act: Acting | None = None
        self.standing = Standing(me.name, me.incarnation)

    async def start(self, enforcer: Enforcer | None = None, changes: Changes | None = None, act: Acting | None = None) -> None:
        """Begins to obey: when it returns, what holds is in force.

        Args:
            enforcer: who runs calls; None in a process that only calls.
            changes: what that one reports, to which ranks refer.
            act: does what is to happen once, if it is for this worker to do.

        Raises:
            BrokerError: what holds cannot be read.
        """
        self._enforcer, self._changes, self._act = enforcer, changes, act
        await self._listen(self._subjects.states, self._on_states)
        self._control = await self._transport.key_value(self._subjects.control_bucket)
        await self._read()
        self._begin(self._read_again(), "states")
        if enforcer is not None:
            await self._listen(self._subjects.ranks(self._me.name), self._on_ranks)
            acts = await self._transport.key_value(self._subjects.acts_bucket, ttl_s=self._lease_s)
            if act is not None:
                self._begin(self._watch_acts(acts, act), "acts")
            self._begin(self._set_priorities(enforcer), "priorities")

    async def _listen(self, subject: str, handler: Handler) -> None:
        self._subscriptions.append(await self._transport.subscribe(subject, handler))

    def _begin(self, work: Coroutine[Any, Any, None], what: str) -> None:
        self._tasks.append(self._loop.create_task(work, name=f"{what}-{self._me.name}"))

    async def aclose(self) -> None:
        """Ends; idempotent."""
        tasks, self._tasks = self._tasks, []
        await cancel_all([*tasks, *self._acting])
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.unsubscribe()

    def do(self, act: Act) -> None:
        """Does something once that no leader has ordered; the caller means this very process."""
        if self._act is not None:
            self._begin_act(self._act, act)

    # What holds.

    def _on_states(self, message: Delivered) -> None:
        if is_direct(message, self._subjects.states):
            self._take_states(message.data)

    def _take_states(self, data: bytes) -> None:
        if not self.standing.take_states(data):
            return
        states = self.standing.states
        self._table.obey(states)
        changed = self._priorities.take_states(states)
        if self._enforcer is not None:
            self._enforcer.set_session_priorities({state.session for state in changed}, self._priorities)
            self._note(changed)
            self._enforcer.obey(states)
        _log.debug("decisions.in_force", states=len(states))

    def _note(self, changed: Iterable[SetPriority]) -> None:
        now = self._loop.time()
        for state in changed:
            holds = self._priorities.holds(state)
            what = f"its session has priority {state.value}" if holds else f"its session has priority {state.value} no more"
            reason = state.reason if holds else ""
            self._explanations.note(now, what, reason, session=state.session, actor=state.agent)

    async def _read(self) -> None:
        assert self._control is not None
        entry = await self._control.get(STATES)
        if entry is not None and entry.value is not None:
            self._take_states(entry.value)

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s)
            try:
                await self._read()
            except BrokerError as error:
                _log.debug("decisions.no_answer", error=str(error))

    # Priorities of many.

    def _on_ranks(self, message: Delivered) -> None:
        taken = self.standing.take_ranks(message.data) if is_direct(message, self._subjects.ranks(self._me.name)) else None
        if taken is None or self._changes is None:
            return
        report, is_whole, slots = taken
        ranks: list[tuple[str, int | None]] = []
        for slot, rank in slots:
            session = self._changes.session_at(slot, report)
            if session is not None:
                ranks.append((session, None if rank == NO_RANK else rank))
        self._to_set |= dict.fromkeys(self._priorities.take_ranks(ranks, is_whole=is_whole))
        if self._to_set:
            self._has_to_set.set()

    async def _set_priorities(self, enforcer: Enforcer) -> None:
        while True:
            await self._has_to_set.wait()
            while self._to_set:
                some = list(itertools.islice(self._to_set, _AT_ONCE))
                for session in some:
                    del self._to_set[session]
                enforcer.set_session_priorities(some, self._priorities)
                await asyncio.sleep(0)
            self._has_to_set.clear()

    # What is to happen once.

    async def _watch_acts(self, acts: KeyValue, act: Acting) -> None:
        while True:
            try:
                async for entry in acts.watch():
                    if entry is not None and entry.key == ACTS and entry.value is not None:
                        self._take_acts(entry.value, act)
            except BrokerError as error:
                _log.debug("acts.watch_failed", error=str(error))
            except Exception:
                _log.exception("acts.watch_failed")
            await asyncio.sleep(self._lease_s / 6)

    def _take_acts(self, data: bytes, act: Acting) -> None:
        for due in self.standing.take_acts(data, self._incarnation_of):
            self._begin_act(act, due)

    def _begin_act(self, act: Acting, due: Act) -> None:
        task = self._loop.create_task(self._do(act, due))
        self._acting.add(task)
        task.add_done_callback(self._acting.discard)

    async def _do(self, act: Acting, due: Act) -> None:
        try:
            await act(due)
        except Exception:
            _log.exception("act.failed", act=type(due).__name__, reason=due.reason)

    def _incarnation_of(self, name: str) -> int | None:
        member = self._table.members.get(name)
        return None if member is None else member.incarnation
