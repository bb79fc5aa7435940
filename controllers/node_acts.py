"""Has one node do what the global controller wants done once to its workers.

    NS-acts/acts, watched ──▶ Standing ──▶ Kill of a worker:      it drains and stays away
                                       └─▶ Provision on the node: one more worker, under the name of one that was stopped if
                                                                  there is one, and none of those that run is named for it

What a worker is to serve, one agent more or one less, it sees to itself (`nalar_mq.serving`). Each act is done at most once.
What was published before the node first listened was for others, or has been done by a former controller of the node; if it is
still wanted, it is said again. What is published while the node has lost its connection it finds with the next one, for as long
as it is there.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from nalar_mq.actions import Act, Kill, Provision
from nalar_mq.address import Subjects
from nalar_mq.config import LEASE_S
from nalar_mq.errors import WireError
from nalar_mq.logs import logger
from nalar_mq.messages import Member, decode_member
from nalar_mq.standing import Standing
from nalar_mq.transport import KeyValue, Transport

_ACTS: Final = "acts"
_PAUSE_S: Final = 1.0
_log = logger(__name__)


class Workers(Protocol):
    """The workers of a node."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all of them, whether they run now or not."""
        ...

    def stop_worker(self, name: str) -> None:
        """Lets it finish what it has begun and ends it, for good."""
        ...

    def add_worker(self, agent: str) -> str:
        """Starts one more for `agent`; its name, or an empty one if there is no room."""
        ...


class NodeActs:
    """Obeys for one node, through one connection after the other.

    Args:
        subjects: where acts are published.
        node: its name.
        workers: what it acts on.
        lease_s: how long an act is there.
    """

    def __init__(self, subjects: Subjects, node: str, workers: Workers, *, lease_s: float = LEASE_S) -> None:
        self._subjects = subjects
        self._node = node
        self._workers = workers
        self._lease_s = lease_s
        self._standing = Standing(node, 0)
        self._has_begun = False

    async def run(self, transport: Transport) -> None:
        """Obeys until it is cancelled.

        Raises:
            BrokerError: the broker does not answer; it may be run again, with another connection.
        """
        acts = await transport.key_value(self._subjects.acts_bucket, ttl_s=self._lease_s)
        members = await transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
        while True:
            async for entry in acts.watch():
                if entry is None:
                    self._has_begun = True
                elif entry.key == _ACTS and entry.value is not None:
                    await self._take(entry.value, members)
            await asyncio.sleep(_PAUSE_S)

    async def _take(self, data: bytes, members: KeyValue) -> None:
        known = await self._members(members)
        due = self._standing.take_acts(data, lambda name: known[name].incarnation if name in known else None)
        for act in due if self._has_begun else ():
            self._do(act, known)

    async def _members(self, members: KeyValue) -> dict[str, Member]:
        """The workers of this node as they are known to all."""
        found: dict[str, Member] = {}
        for name in self._workers.names:
            entry = await members.get(name)
            if entry is not None and entry.value is not None:
                try:
                    found[name] = decode_member(entry.value)
                except WireError as error:
                    _log.debug("member.unreadable", process=name, error=str(error))
        return found

    def _do(self, act: Act, known: dict[str, Member]) -> None:
        match act:
            case Kill() if act.instance in known and not act.agent:
                _log.info("worker.to_stop", worker=act.instance, reason=act.reason)
                self._workers.stop_worker(act.instance)
            case Provision() if act.node == self._node and not act.worker:
                name = self._workers.add_worker(act.agent)
                _log.info("worker.to_start", worker=name, agent=act.agent, reason=act.reason)
            case _:
                pass
