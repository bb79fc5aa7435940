"""The controller of everything: one leader that decides, and standbys that see the same and take over.

    Observer ──View──▶ policy ──▶ guards ──▶ States, Acts, Ranks      (only the leader)
                                       └──▶ AuditTrail: what is new of that, and why

The view stands still while a policy looks at it. No call waits for any of this. A round takes as long as it takes; the next one
begins after a pause that is no shorter, so that a controller with much to see decides less often and never takes more than half
of a processor. One that has just begun to listen decides nothing before it knows who is there: what held, holds on.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, NamedTuple, Self

from nalar_mq.actions import States, decode_decision, encode_decision
from nalar_mq.address import Address, Subjects
from nalar_mq.config import LEASE_S
from nalar_mq.errors import BrokerError, KeyConflictError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.transport import Delivered, KeyValue, Ledger, Subscription, Transport

from .audit import AuditTrail
from .deciding import PERIOD_S, Decider, Reloaded, Trusted, decision_of
from .decision_ledger import open_history
from .governing import Decision, Governor
from .guards import Bounds
from .leadership import Leadership, open_lead
from .observer import Observer
from .overview import Overview, encode_overview, overview_of
from .view import View

__all__ = ["Decider", "GlobalController", "Reloaded", "Round", "Trusted"]
_LONGEST_PERIOD_S: Final = 5.0
_STATES: Final = "states"
_ACTS: Final = "acts"
_log = logger(__name__)


class Round(NamedTuple):
    """How long the parts of a round took, in seconds, and what it was about."""

    reports: int
    futures: int
    collect_s: float
    policy_s: float
    publish_s: float

    @property
    def whole_s(self) -> float:
        """All of it."""
        return self.collect_s + self.policy_s + self.publish_s


class GlobalController:
    """One of the controllers of a namespace, leader or standby; an async context manager.

    Args:
        transport, subjects, me: of this process.
        decider: where decisions come from while it leads.
        lease_s: a leader that is gone is replaced within this time.
        bounds: what a policy may do.
        period_s: the least time from one round to the next.
        is_driven: rounds are made only by `make_round`.

    Attributes:
        observer: what has been reported.
        governor: what it has decided.
        audit: what it tells people of that.
        rounds: how many there have been.
        last: the last one.
        deposed: how often a write of this controller has met that of a later leader.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        me: Address,
        decider: Decider,
        *,
        lease_s: float = LEASE_S,
        bounds: Bounds | None = None,
        period_s: float = PERIOD_S,
        is_driven: bool = False,
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._decider = decider
        self._error = ""
        self._lease_s = lease_s
        self._period_s = period_s
        self._is_driven = is_driven
        self._loop = asyncio.get_running_loop()
        self._sealed = 0
        self._states_revision = 0
        self._acts_revision = 0
        self._leadership: Leadership | None = None
        self._control: KeyValue | None = None
        self._acts: KeyValue | None = None
        self._decisions: Ledger | None = None
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._turned = asyncio.Condition()
        self.observer = Observer(transport, subjects, lease_s=lease_s)
        self.governor = Governor(bounds)
        self.audit = AuditTrail(me.name, str(decider))
        self.rounds = 0
        self._is_in_round = False
        self.last = Round(0, 0, 0.0, 0.0, 0.0)
        self.deposed = 0

    @property
    def view(self) -> View:
        """What has been reported."""
        return self.observer.view

    @property
    def is_leader(self) -> bool:
        """True if it decides."""
        return self._leadership is not None and self._leadership.is_current

    @property
    def leader(self) -> str:
        """The name of the controller that leads, as far as this one knows; empty for nobody."""
        return self._leadership.leader if self._leadership is not None else ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begins to listen, and to stand for leader.

        Raises:
            BrokerError: the broker does not answer.
        """
        leader = await self._open()
        self._leadership = Leadership(leader, self._me, self._lease_s, self._loop.time)
        await self.observer.start()
        self._subscription = await self._transport.subscribe(self._subjects.overview, self._on_question)
        self._tasks = [self._loop.create_task(self._stand(self._leadership), name=f"leadership-{self._me.name}")]
        if not self._is_driven:
            self._tasks.append(self._loop.create_task(self._go_round(), name=f"rounds-{self._me.name}"))

    async def _open(self) -> KeyValue:
        """Opens what it writes to, or makes it anew where the broker has lost it; returns the bucket of the leader."""
        leader = await open_lead(self._transport, self._subjects, self._lease_s)
        self._control = await self._transport.key_value(self._subjects.control_bucket)
        self._acts = await self._transport.key_value(self._subjects.acts_bucket, ttl_s=self._lease_s)
        self._decisions = await open_history(self._transport, self._subjects)
        return leader

    async def aclose(self) -> None:
        """Ends, and leaves the lead to others; idempotent."""
        tasks, self._tasks = self._tasks, []
        await cancel_all(tasks)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        await self.observer.aclose()
        if self._leadership is not None:
            await self._leadership.release()

    async def until_round(self, number: int) -> None:
        """Returns when so many rounds have been made."""
        async with self._turned:
            await self._turned.wait_for(lambda: self.rounds >= number)

    # Leading.

    async def _stand(self, leadership: Leadership) -> None:
        answered_at = self._loop.time()
        while True:
            try:
                await leadership.step()
                answered_at = self._loop.time()
            except BrokerError as error:
                _log.debug("leadership.no_answer", error=str(error))
                if self._transport.is_connected and self._loop.time() - answered_at > self._lease_s:
                    with contextlib.suppress(BrokerError):
                        await self._open()
            await asyncio.sleep(leadership.pause_s)

    async def _seal(self, leadership: Leadership) -> None:
        """Writes over what a former leader has written, so that its writes are refused from now on."""
        assert self._control is not None
        assert self._acts is not None
        found = await self._control.get(_STATES)
        former: tuple[States, ...] = ()
        if found is not None and found.value is not None:
            with contextlib.suppress(WireError):
                former = (decode_decision(found.value, States),)
        states, acts = self.governor.begin_term(leadership.term, former[0].states if former else ())
        data = encode_decision(states)
        self._states_revision = await _over(self._control, _STATES, data, found.revision if found else 0)
        last = await self._acts.get(_ACTS)
        self._acts_revision = await _over(self._acts, _ACTS, encode_decision(acts), last.revision if last else 0)
        self._transport.publish(self._subjects.states, data)
        self._sealed = leadership.term
        self.audit.note_lead(leadership.term)
        _log.info("leadership.taken", term=leadership.term, name=self._me.name)

    def _depose(self, leadership: Leadership) -> None:
        self.deposed += 1
        leadership.resign()
        _log.warning("leadership.lost", name=self._me.name)

    # Rounds.

    async def _go_round(self) -> None:
        while True:
            try:
                await self.make_round()
            except BrokerError as error:
                _log.warning("controller.round_failed", error=str(error))
            except Exception:
                _log.exception("controller.round_failed")
            await asyncio.sleep(min(max(self._period_s - self.last.whole_s, self.last.whole_s), _LONGEST_PERIOD_S))

    async def make_round(self) -> Round:
        """Sees, decides and tells, once.

        Raises:
            BrokerError: the broker did not answer; what has been seen stays.
        """
        try:
            self.last = await self._round()
        finally:
            self._is_in_round = False
            self.observer.release()
            self.rounds += 1
            async with self._turned:
                self._turned.notify_all()
        return self.last

    async def _round(self) -> Round:
        self._is_in_round = True
        begun = self._loop.time()
        reports = self.observer.collect()
        collected = decided = self._loop.time()
        leadership = self._leadership
        knows = self._is_driven or self.observer.is_informed
        if leadership is not None and leadership.is_current and knows:
            try:
                if self._sealed != leadership.term:
                    await self._seal(leadership)
                decision = await decision_of(self._decider, self.governor, self.view, self._loop.time())
                decided = self._loop.time()
                self._error = decision.error
                if leadership.is_current:
                    await self._publish(leadership, decision)
                    await self._tell(leadership, decision)
            except KeyConflictError:
                self._depose(leadership)
        ended = self._loop.time()
        return Round(reports, len(self.view.futures), collected - begun, decided - collected, ended - decided)

    async def _publish(self, leadership: Leadership, decision: Decision) -> None:
        assert self._control is not None
        assert self._acts is not None
        if decision.error:
            return
        for name, ranks in self.governor.changed_ranks(self.view):
            self._transport.publish(self._subjects.ranks(name), encode_decision(ranks))
        states = self.governor.changed_states(decision)
        if states is not None:
            data = encode_decision(states)
            try:
                self._states_revision = await self._control.update(_STATES, data, self._states_revision)
            except BrokerError:
                leadership.resign()  # nobody knows whether it was written: who leads next reads what holds
                raise
            self._transport.publish(self._subjects.states, data)
        acts = self.governor.ordered_acts(self.view, decision, self._lease_s)
        if acts is not None:
            self._acts_revision = await self._write_acts(self._acts, encode_decision(acts))

    async def _write_acts(self, bucket: KeyValue, data: bytes) -> int:
        """Over the acts that were written last, or where those have expired."""
        try:
            return await bucket.update(_ACTS, data, self._acts_revision)
        except KeyConflictError:
            if await bucket.get(_ACTS) is not None:
                raise
            return await bucket.create(_ACTS, data)

    # Telling people.

    async def _tell(self, leadership: Leadership, decision: Decision) -> None:
        assert self._decisions is not None
        self.audit.note(leadership.term, decision, self.observer.complaints(), self._loop.time())
        await self.audit.write(self._decisions, self._subjects.decided)

    def _on_question(self, message: Delivered) -> None:
        if message.reply.startswith((self._subjects.inbox(""), "_INBOX.")) and self.is_leader:  # not where it would be a frame
            self._transport.publish(message.reply, encode_overview(self.overview()))

    def overview(self) -> Overview:
        """What it sees and does, for people."""
        if not self._is_in_round:
            self.observer.collect()
        overview = overview_of(
            self.view,
            controller=self._me.name,
            policy=str(self._decider),
            term=self._leadership.term if self._leadership is not None else 0,
            rounds=self.rounds,
            round_s=self.last.whole_s,
            decisions=self.audit.recent,
            error=self._error or self._decider.trouble,
        )
        if not self._is_in_round:
            self.observer.release()
        return overview


async def _over(bucket: KeyValue, key: str, data: bytes, revision: int) -> int:
    return await bucket.update(key, data, revision) if revision else await bucket.create(key, data)
