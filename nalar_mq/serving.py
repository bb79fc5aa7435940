"""Which of its app's actors a worker serves: those that it began with, until the global controller decides otherwise.

    provision   It serves one more. Its record says so, and everybody sends calls to it from then on.
    retire      It serves one less, out of its record first. Calls without state that have not begun are passed on, and so are
                those that still come; sessions in stores move to those who serve the actor, some at a time, idle ones from the
                disk included; what runs goes on to its end. A session in the memory of an instance cannot move: its calls are
                served here until it ends, and new ones begin elsewhere.

    serving ──▶ its record says no more that it serves it ──▶ nothing of it waits here that could be elsewhere
       ▲                         │
       └── nobody else serves it ┘

The last instance that is known is never retired, nor are the last ones at the same time: all see records change in the same
order, so whoever of them finds no other when its own has changed serves it again. A broker that does not answer is waited for,
and sessions that did not move meanwhile are tried again. That a worker ends is for the controller of its node.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from nalar_mq.actions import Act, Kill, Provision
from nalar_mq.changes import Changes
from nalar_mq.columns import Serves
from nalar_mq.errors import BrokerError, NalarError
from nalar_mq.host import Host
from nalar_mq.logs import logger
from nalar_mq.messages import ActorInfo, Migrate
from nalar_mq.process import Process
from nalar_mq.store import HERE, LEAVING, STAGED, Store
from nalar_mq.stores import Stores

_AT_ONCE: Final = 8  # sessions that move at a time
_TRIES: Final = 3  # of sessions that could move and did not
_log = logger(__name__)


class Serving:
    """The actors of one worker, and what it does when others are wanted of it.

    Args:
        process, host, changes, stores: of the worker.
        infos, serves: what is told of each actor of its app.
        served: those that it serves at first.
        on_change: is told what it serves from now on, before anybody else is.
    """

    def __init__(
        self,
        process: Process,
        host: Host,
        changes: Changes,
        stores: Stores | None,
        infos: Mapping[str, ActorInfo],
        serves: Mapping[str, Serves],
        served: Iterable[str],
        on_change: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self._process = process
        self._host = host
        self._changes = changes
        self._stores = stores
        self._infos = infos
        self._serves = serves
        self._served = set(served)
        self._on_change = on_change
        self._turn = asyncio.Lock()
        host.retired = set(infos) - self._served
        changes.set_serves({actor: serves[actor] for actor in sorted(self._served)})
        changes.set_able(serves)

    @property
    def actors(self) -> frozenset[str]:
        """What it serves now."""
        return frozenset(self._served)

    async def act(self, act: Act) -> None:
        """Does what is to happen once, if it is for this worker to do."""
        me = self._process.me.name
        match act:
            case Kill() if act.instance == me and act.agent:
                await self.retire(act.agent, act.reason)
            case Provision() if act.worker == me:
                await self.provision(act.agent, act.reason)
            case _:
                await self._host.act(act)

    async def provision(self, actor: str, reason: str = "") -> None:
        """Serves one more actor; when it returns, its record says so."""
        async with self._turn:
            if actor not in self._infos:
                _log.warning("actor.not_provisioned", actor=actor, error="it is not in the app of this worker")
                return
            self._served.add(actor)
            self._host.retired.discard(actor)
            await self._tell(actor)
        _log.info("actor.provisioned", actor=actor, reason=reason)

    async def retire(self, actor: str, reason: str = "") -> None:
        """Serves one actor less; returns when nothing of it waits here that could be elsewhere."""
        async with self._turn:
            if actor not in self._served:
                return
            if not self._others(actor):
                _log.warning("actor.not_retired", actor=actor, error="nobody else serves it")
                return
            self._served.discard(actor)
            self._host.retired.add(actor)
            await self._tell(actor)
            if not self._others(actor):
                self._served.add(actor)
                self._host.retired.discard(actor)
                await self._tell(actor)
                _log.warning("actor.not_retired", actor=actor, error="nobody else serves it any more")
                return
        self._host.empty(actor, reason)
        moved = await self._move_sessions(actor, self._stores) if self._stores is not None else 0
        _log.info("actor.retired", actor=actor, reason=reason, sessions=moved)

    async def _tell(self, actor: str) -> None:
        """Says whether it serves the actor; returns when that has changed the record, and what changed before is known."""
        if self._on_change is not None:
            self._on_change(self.actors)
        self._changes.set_serves({actor: self._serves[actor] for actor in sorted(self._served)})
        try:
            await self._process.membership.serve({actor: self._infos[actor] for actor in sorted(self._served)})
        except BrokerError as error:
            _log.warning("actors.not_told", actor=actor, error=str(error))  # the next renewal of the record tells it
        await self._process.until(lambda: self._is_told(actor), None)

    def _is_told(self, actor: str) -> bool:
        mine = self._process.table.members.get(self._process.me.name)
        return mine is not None and (actor in mine.actors) == (actor in self._served)

    def _others(self, actor: str) -> list[str]:
        me = self._process.me
        return [address.name for address in self._process.table.replicas(actor) if address != me]

    # Sessions in stores.

    async def _move_sessions(self, actor: str, stores: Stores) -> int:
        """Moves them to those with the fewest; one that cannot move is served here."""
        if self._host.migrations is None or not self._infos[actor].is_kept:
            return 0
        given: Counter[str] = Counter()
        moved = 0
        for _ in range(_TRIES):
            outcomes = await self._sweep(actor, stores, given)
            moved += outcomes[True]
            if not outcomes[False] or actor in self._served:
                break
            await self._pause()
        return moved

    async def _pause(self) -> None:
        """Returns after a while, if the broker is there then."""
        while True:
            await asyncio.sleep(self._process.settings.lease_s)
            if self._process.transport.is_connected:
                return

    async def _sweep(self, actor: str, stores: Stores, given: Counter[str]) -> Counter[bool]:
        """How many sessions have moved, and how many that are here have not."""
        room = asyncio.Semaphore(_AT_ONCE)
        outcomes: Counter[bool] = Counter()

        async def move(key: str) -> None:
            async with room:
                if actor in self._served:
                    return  # it is wanted here again
                target = min(self._keepers(actor), key=lambda name: (given[name], name), default="")
                given[target] += 1
                outcomes[target != "" and await self._move(actor, key, target)] += 1

        for store in stores.stores_of(actor):
            after: str | None = None
            while keys := await asyncio.to_thread(_some, store, actor, after):
                await asyncio.gather(*(move(key) for key, standing in keys if standing == HERE))
                outcomes[False] += sum(standing in (STAGED, LEAVING) for _, standing in keys)  # on their way, yet
                after = keys[-1][0]
        return outcomes

    def _keepers(self, actor: str) -> list[str]:
        """Who could take its sessions."""
        members = self._process.table.members
        return [name for name in self._others(actor) if members[name].stores or members[name].replicated]

    async def _move(self, actor: str, key: str, target: str) -> bool:
        migrations = self._host.migrations
        assert migrations is not None
        try:
            await migrations.move(Migrate(self._process.calls.fresh_id(), actor, key, target))
        except NalarError as error:
            _log.info("session.not_migrated", actor=actor, session=key, to=target, error=str(error))
            return False
        return True


def _some(store: Store, actor: str, after: str | None) -> list[tuple[str, str]]:
    """Sessions of an actor that stand in a store, from the one after `after`, and how."""
    return [(session.name, session.standing) for session in store.sessions_from(actor, "", after)]
