"""What a node decides by itself while no global controller decides anything: what cannot wait for one.

                    the acts are gone
      led ──────────────────────────────────▶ alone
       ▲                                         │
       └─────────────── acts are there ──────────┘

    led      a leader writes `NS-acts/acts` every third of a lease, and they are there for one: they are gone when nobody has
             led for a lease, and when somebody leads whose policy gives no answer. The key is read now and then; nothing else.
    alone    the reports of the workers of this node are folded into a view of them alone, and every `PERIOD_S` two policies
             look at that: sessions that wait behind a long call go to another worker of the node, and an agent that cannot
             follow begins on another one, within its `max_instances` and its `resources`. States hold as the last leader left
             them. Nothing is ever killed here.

An act goes to the worker that is to do it on the link by which it is supervised, and so to that very process and no successor.
It bears no term and overrides nobody: a session moves by compare-and-set in `NS-places` whoever wants it to, and an act of a
leader who comes at the same time finds the session gone, which is no more than a refusal. `NS-acts` is read once more right
before acts are sent.

What only everybody together can know is left alone. Of `max_instances` all that serve an agent count, and of an agent that has
such a bound and is served by other nodes none begins here, since two nodes that are alone could both take the last one.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from nalar_mq.actions import Act, Migrate, Provision, describe
from nalar_mq.address import Subjects
from nalar_mq.config import LEASE_S
from nalar_mq.errors import BrokerError, WireError
from nalar_mq.logs import logger
from nalar_mq.messages import decode_member
from nalar_mq.transport import KeyValue, Transport

if TYPE_CHECKING:
    from .guards import Guards
    from .policy import Policy
    from .view import View

PERIOD_S: Final = 0.25
_ACTS: Final = "acts"
_LOOK: Final = 0.1  # of a lease
_PATIENCE: Final = 0.5  # of a lease: a controller that starts together with the node decides by then
_DECIDING: Final = ("observer", "guards", "policies")  # imported when they are first needed: they bring numpy
_log = logger(__name__)


class Team(Protocol):
    """The workers of a node."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all of them, whether they run now or not."""
        ...

    def act(self, name: str, act: Act) -> bool:
        """Has one of them do something once; False if it cannot be told."""
        ...


class Reflexes:
    """Decides for one node, through one connection after the other.

    Args:
        subjects: where reports and acts are.
        node: its name.
        team: what it decides about.
        lease_s: how long an act is there.

    Attributes:
        is_alone: nobody else decides.
        done: acts that workers were told.
        failed: rounds that an error has ended; nothing came of them.
        left_alone: how often an agent was not given another instance, since other nodes serve it.
    """

    def __init__(self, subjects: Subjects, node: str, team: Team, *, lease_s: float = LEASE_S) -> None:
        self._subjects = subjects
        self._node = node
        self._team = team
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._looked_at = -math.inf
        self.is_alone = False
        self.done = 0
        self.failed = 0
        self.left_alone: Counter[str] = Counter()

    async def run(self, transport: Transport) -> None:
        """Decides until it is cancelled.

        Raises:
            BrokerError: the broker does not answer; it may be run again, with another connection.
        """
        acts = await transport.key_value(self._subjects.acts_bucket, ttl_s=self._lease_s)
        members = await transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
        await asyncio.sleep(_PATIENCE * self._lease_s)
        try:
            while True:
                await self._look(acts)
                if self.is_alone:
                    await self._decide_alone(transport, acts, members)
                await asyncio.sleep(_LOOK * self._lease_s)
        finally:
            self.is_alone = False

    async def _look(self, acts: KeyValue) -> None:
        entry = await acts.get(_ACTS)
        self._looked_at = self._loop.time()
        if self.is_alone is not (entry is None):
            self.is_alone = entry is None
            _log.info("node.alone" if self.is_alone else "node.led", node=self._node)

    async def _decide_alone(self, transport: Transport, acts: KeyValue, members: KeyValue) -> None:
        for module in _DECIDING:
            await asyncio.to_thread(import_module, f".{module}", __package__)
        from .guards import Guards
        from .observer import Observer
        from .policies import HeadOfLine, Overload

        guards, policies = Guards(), (HeadOfLine(), Overload())

        async def go_round() -> None:
            await observer.listen(self._team.names)
            try:
                observer.collect()
                wanted = self._wanted(observer.view, policies, guards) if observer.is_informed else []
                bounded = any(isinstance(act, Provision) for act in wanted)
                elsewhere = await self._served_elsewhere(members) if bounded else set[str]()
                if wanted:
                    await self._look(acts)
                    self._tell(wanted, observer.view, elsewhere)
            finally:
                observer.release()

        async with Observer(transport, self._subjects, lease_s=self._lease_s, processes=()) as observer:
            while self.is_alone:
                try:
                    await go_round()
                except BrokerError:
                    raise
                except Exception:
                    self.failed += 1
                    _log.exception("reflexes.round_failed", node=self._node)
                await asyncio.sleep(PERIOD_S)
                if self._loop.time() - self._looked_at >= _LOOK * self._lease_s:
                    await self._look(acts)

    def _wanted(self, view: View, policies: Iterable[Policy], guards: Guards) -> list[Act]:
        verdict = guards.check(view, [action for policy in policies for action in policy.decide(view)], self._loop.time())
        for refusal in verdict.refusals:
            _log.debug("act.refused", node=self._node, reason=refusal.reason)
        return list(verdict.acts)

    def _tell(self, wanted: list[Act], view: View, elsewhere: set[str]) -> None:
        for act in wanted if self.is_alone else ():
            match act:
                case Migrate():
                    name = act.source
                case Provision() if act.agent in elsewhere and view.able[act.agent].max_instances is not None:
                    self.left_alone[act.agent] += 1
                    continue
                case Provision():
                    spare = view.spare(act.agent, self._node)
                    name = spare[0].name if spare else ""
                    act = msgspec.structs.replace(act, worker=name)
                case _:
                    continue
            if name and self._team.act(name, act):
                self.done += 1
                _log.info("act.told", node=self._node, worker=name, act=describe(act), reason=act.reason)

    async def _served_elsewhere(self, members: KeyValue) -> set[str]:
        """The actors that other nodes serve."""
        found: set[str] = set()
        for entry in await members.entries():
            try:
                member = decode_member(entry.value or b"")
            except WireError as error:
                _log.debug("member.unreadable", process=entry.key, error=str(error))
            else:
                found |= member.actors.keys() if member.node != self._node else set[str]()
        return found
