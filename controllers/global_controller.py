"""The controller of everything: one leader that decides, and standbys that see the same and take over.

    NS.report.* ──▶ inbox ──fold──▶ View ──settle──▶ policy ──▶ guards ──▶ States, Acts, Ranks      (only the leader)
                     again ◀── a report is missing

Reports are collected while they come and folded at the beginning of a round, so that the view stands still while a policy looks
at it. No call waits for any of this. A round takes as long as it takes; the next one begins after a pause that is no shorter,
so that a controller with much to see decides less often and never takes more than half of a processor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol, Self

from nalar_mq.actions import States, decode_decision, encode_decision
from nalar_mq.address import Address, Subjects
from nalar_mq.columns import Again, encode_report
from nalar_mq.config import LEASE_S
from nalar_mq.errors import BrokerError, KeyConflictError, PolicyError, ReportError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.transport import Delivered, KeyValue, Subscription, Transport

from .governing import Decision, Governor
from .guards import Bounds
from .leadership import LIFE, Leadership
from .policy import Action, Policy
from .policy_file import PolicyFile
from .view import View

PERIOD_S: Final = 0.25
_LONGEST_PERIOD_S: Final = 5.0
_STATES: Final = "states"
_ACTS: Final = "acts"
_SILENT_LEASES: Final = 2.0
_AGAIN_S: Final = 1.0
_INBOX_BYTES: Final = 512 * 1024 * 1024
_log = logger(__name__)


class Decider(Protocol):
    """Where decisions come from."""

    async def decide(self, view: View) -> Iterable[Action]:
        """What is wanted.

        Raises:
            PolicyError: there is no answer.
        """
        ...


class Trusted:
    """A policy that came with the runtime: it runs where it is asked."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        return self._policy.decide(view)


class Reloaded:
    """The policy in a file, as the file is now; the former one where it cannot be loaded."""

    def __init__(self, file: PolicyFile) -> None:
        self._file = file

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        if self._file.has_changed():
            await self._file.load()
            _log.info("policy.loaded", file=str(self._file))
        return await self._file.decide(view)


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
        view: what has been reported.
        governor: what it has decided, with its history.
        rounds: how many there have been.
        last: the last one.
        dropped: reports for which there was no room.
        unused: reports that were refused; `view.refused` counts them by reason.
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
        self._lease_s = lease_s
        self._period_s = period_s
        self._is_driven = is_driven
        self._loop = asyncio.get_running_loop()
        self._inbox: list[tuple[str, bytes, float]] = []
        self._inbox_bytes = 0
        self._asked: dict[str, float] = {}
        self._sealed = 0
        self._states_revision = 0
        self._acts_revision = 0
        self._leadership: Leadership | None = None
        self._control: KeyValue | None = None
        self._acts: KeyValue | None = None
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._turned = asyncio.Condition()
        self.view = View()
        self.governor = Governor(bounds)
        self.rounds = 0
        self.last = Round(0, 0, 0.0, 0.0, 0.0)
        self.dropped = 0
        self.unused = 0
        self.deposed = 0

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
        """Begins to listen, and to stand for leader."""
        leader = await self._transport.key_value(self._subjects.leader_bucket, ttl_s=LIFE * self._lease_s)
        self._control = await self._transport.key_value(self._subjects.control_bucket)
        self._acts = await self._transport.key_value(self._subjects.acts_bucket, ttl_s=self._lease_s)
        self._leadership = Leadership(leader, self._me, self._lease_s, self._loop.time)
        self._subscription = await self._transport.subscribe(self._subjects.report("*"), self._on_report)
        self._tasks = [self._loop.create_task(self._stand(self._leadership), name=f"leadership-{self._me.name}")]
        if not self._is_driven:
            self._tasks.append(self._loop.create_task(self._go_round(), name=f"rounds-{self._me.name}"))

    async def aclose(self) -> None:
        """Ends, and leaves the lead to others; idempotent."""
        tasks, self._tasks = self._tasks, []
        await cancel_all(tasks)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        if self._leadership is not None:
            await self._leadership.release()

    async def until_round(self, number: int) -> None:
        """Returns when so many rounds have been made."""
        async with self._turned:
            await self._turned.wait_for(lambda: self.rounds >= number)

    # Leading.

    async def _stand(self, leadership: Leadership) -> None:
        while True:
            try:
                await leadership.step()
            except BrokerError as error:
                _log.debug("leadership.no_answer", error=str(error))
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
        _log.info("leadership.taken", term=leadership.term, name=self._me.name)

    def _depose(self, leadership: Leadership) -> None:
        self.deposed += 1
        leadership.resign()
        _log.warning("leadership.lost", name=self._me.name)

    # Rounds.

    def _on_report(self, message: Delivered) -> None:
        if self._inbox_bytes > _INBOX_BYTES:
            self.dropped += 1
            return
        self._inbox_bytes += len(message.data)
        self._inbox.append((message.subject.rpartition(".")[2], message.data, self._loop.time()))

    async def _go_round(self) -> None:
        while True:
            try:
                await self.make_round()
            except BrokerError as error:
                _log.warning("controller.round_failed", error=str(error))
            except Exception:
                _log.exception("controller.round_failed")
            await asyncio.sleep(min(max(self._period_s - self.last.whole_s, self.last.whole_s), _LONGEST_PERIOD_S))

    @property
    def waiting(self) -> int:
        """Reports that have come since the last round."""
        return len(self._inbox)

    async def make_round(self) -> Round:
        """Sees, decides and tells, once.

        Raises:
            BrokerError: the broker did not answer; what has been seen stays.
        """
        try:
            self.last = await self._round()
        finally:
            self.rounds += 1
            async with self._turned:
                self._turned.notify_all()
        return self.last

    async def _round(self) -> Round:
        begun = self._loop.time()
        reports = self._collect()
        collected = self._loop.time()
        leadership = self._leadership
        decision: Decision | None = None
        if leadership is not None and leadership.is_current:
            try:
                if self._sealed != leadership.term:
                    await self._seal(leadership)
                decision = await self._decide()
                decided = self._loop.time()
                if decision is not None and leadership.is_current:
                    await self._publish(decision)
            except KeyConflictError:
                self._depose(leadership)
        ended = self._loop.time()
        if decision is None:
            decided = ended
        return Round(reports, len(self.view.futures), collected - begun, decided - collected, ended - decided)

    def _collect(self) -> int:
        inbox, self._inbox, self._inbox_bytes = self._inbox, [], 0
        for sender, data, at in inbox:
            try:
                self.view.fold(sender, data, at)
            except WireError as error:
                self.unused += 1
                if not isinstance(error, ReportError) or self.unused % 1000 == 1:
                    _log.debug("report.refused", process=sender, reason=str(error))
        now = self._loop.time()
        for address in self.view.silent(now - _SILENT_LEASES * self._lease_s):
            self.view.forget(address.name)
        for address in self.view.stale():
            self._ask_again(address, now)
        self.view.settle(now)
        return len(inbox)

    def _ask_again(self, address: Address, now: float) -> None:
        if now - self._asked.get(address.name, -_AGAIN_S) >= _AGAIN_S:
            self._asked[address.name] = now
            self._transport.publish(self._subjects.again(address.name), encode_report(Again(WIRE_VERSION, address.incarnation)))

    async def _decide(self) -> Decision | None:
        """What the policy says, checked; None if it says nothing, and then all stays as it is."""
        try:
            actions = await self._decider.decide(self.view)
            return self.governor.decide(self.view, actions, self._loop.time())
        except PolicyError as error:
            self._complain(str(error))
        except Exception as error:
            self._complain(f"{type(error).__name__}: {error}")
        return None

    def _complain(self, error: str) -> None:
        self.governor.fail(error, self._loop.time())
        _log.warning("policy.failed", error=error)

    async def _publish(self, decision: Decision) -> None:
        assert self._control is not None
        assert self._acts is not None
        for name, ranks in self.governor.changed_ranks(self.view):
            self._transport.publish(self._subjects.ranks(name), encode_decision(ranks))
        states = self.governor.changed_states(decision)
        if states is not None:
            data = encode_decision(states)
            self._states_revision = await self._control.update(_STATES, data, self._states_revision)
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


async def _over(bucket: KeyValue, key: str, data: bytes, revision: int) -> int:
    return await bucket.update(key, data, revision) if revision else await bucket.create(key, data)
