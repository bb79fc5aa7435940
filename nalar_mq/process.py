"""One process of a runtime: its connection, its channels, its membership and its calls, put together and taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random, SystemRandom

from nalar_mq.address import Address, Subjects, check_token
from nalar_mq.calls import Calls
from nalar_mq.channel import Endpoint
from nalar_mq.claims import Claims
from nalar_mq.config import Settings, find_local_store
from nalar_mq.enforcement import Enforcement
from nalar_mq.errors import CallError, OwnerLostError, WireError, WorkerLostError
from nalar_mq.journal import Journal
from nalar_mq.local_store import LocalStore
from nalar_mq.logs import logger
from nalar_mq.lookout import Lookout
from nalar_mq.membership import Membership
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Member, Message, decode_member
from nalar_mq.placement import RoutingTable
from nalar_mq.places import Places
from nalar_mq.questions import Asker
from nalar_mq.recall import Recall
from nalar_mq.stores import Stores
from nalar_mq.telemetry import Telemetry
from nalar_mq.transport import Transport

Connect = Callable[[str], Awaitable[Transport]]
_log = logger(__name__)


class Process:
    """What a worker and a client have in common.

    Args:
        settings: broker, namespace and node.
        name: a token; a later process of the same name replaces this one.
        role: `worker` or `client`.
        actors: what it serves.
        connect: opens a connection to the broker under a name; the NATS transport if None.
        lease_in_thread: renew the lease from a thread with a connection of its own, so that code which blocks the loop
            does not cost the process its life.
        random: source of ids and choices; the operating system's if None.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        role: str,
        actors: dict[str, ActorInfo] | None = None,
        connect: Connect | None = None,
        lease_in_thread: bool = True,
        random: Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.name = check_token(name, "process name")
        self.subjects = Subjects(settings.namespace)
        self.replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.declared_lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stores: Stores | None = None
        self._role = role
        self._actors = actors or {}
        self._connect = connect or self._connect_nats
        self._lease_in_thread = lease_in_thread
        self._lease_s = settings.lease_s
        self._random = random or SystemRandom()
        self._clock = clock
        self._table_changed = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def _connect_nats(self, name: str) -> Transport:
        from nalar_mq.nats_transport import NatsTransport

        return await NatsTransport.connect(self.settings.broker, name=name, inbox=self.subjects.inbox(self.name))

    async def start(self, before_joining: Callable[[], Awaitable[None]] | None = None) -> None:
        """Connects and joins. When it returns, calls can be made, and everybody who was there is in the table.

        `before_joining` is awaited when calls can be made and nobody can reach this process yet.

        Raises:
            BrokerError: the broker is not there, refuses us, or lacks something.
        """
        try:
            await self._start(before_joining)
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self, before_joining: Callable[[], Awaitable[None]] | None) -> None:
        transport = self.transport = await self._connect(self.name)
        self._stack.push_async_callback(transport.aclose)
        me = self.me = Address(self.name, await self._next_incarnation(transport))
        self.table = RoutingTable(self._random)
        places = Places(transport, self.subjects, self.table)
        self._stack.push_async_callback(places.aclose)
        self.endpoint = Endpoint(transport, self.subjects, me, on_messages=self._on_messages, on_lost=self._on_lost)
        self._stack.push_async_callback(self.endpoint.aclose)
        self.places = places
        folder = find_local_store(self.settings.local_store)
        store = LocalStore.open(folder, f"{me.name}.{me.incarnation}") if folder is not None else None
        self.claims = Claims(transport, self.subjects, self.table, me, store, self._random)
        self._stack.push_async_callback(self.claims.aclose)
        self.calls = Calls(self.endpoint, self.table, places, self.claims, me, self._random)
        journal = self.calls.journal = Journal(transport, self.subjects, me, self.on_declared_lost)
        self._stack.push_async_callback(journal.aclose)
        self.recall = self.calls.resumption = Recall(me, self.table, journal, self.calls.tell, self._hold_lost, self._is_gone)
        self._stack.push_async_callback(self.recall.aclose)
        asker = self.calls.asker = Asker(transport, self.subjects)
        self._stack.push_async_callback(asker.aclose)
        self.enforcement = Enforcement(transport, self.subjects, me, self.table, self.calls.explanations, self._lease_s)
        self._stack.push_async_callback(self.enforcement.aclose)
        if before_joining is not None:
            await before_joining()
        else:
            await self.enforcement.start()
        self._stack.callback(self.endpoint.stop_reading)
        await self.endpoint.start()
        self.membership = Membership(
            transport,
            self.subjects,
            self.table,
            me,
            self._member(store),
            on_change=self._on_table_changed,
            on_lost=self._on_member_lost,
            events=self,
            lease_connect=self._connect_lease if self._lease_in_thread else None,
            lease_s=self._lease_s,
        )
        self._stack.push_async_callback(self.membership.aclose)
        await self.membership.start()
        if self._role == "worker":
            self.claims.start(self._lease_s)
        self.telemetry = Telemetry(transport, self.subjects, me, self.calls.on_load)
        self._stack.push_async_callback(self.telemetry.aclose)
        self.lookout = Lookout(transport, self.subjects, me, self.calls)
        self._stack.push_async_callback(self.lookout.aclose)
        await self.lookout.start()
        await self.telemetry.start(self.calls.host.load if self.calls.host is not None else None)

    def _member(self, store: LocalStore | None) -> Member:
        return Member(
            WIRE_VERSION,
            self.me.incarnation,
            self.settings.node,
            self._role,
            os.getpid(),
            self._actors,
            folder=store.id if store is not None else "",
            stores=self.stores.ids if self.stores is not None else (),
            replicated=self.stores.replicated_ids if self.stores is not None else (),
        )

    async def _connect_lease(self) -> Transport:
        return await self._connect(f"{self.name}-lease")

    async def _next_incarnation(self, transport: Transport) -> int:
        """Higher than that of every process that had this name before, whatever the clocks say."""
        bucket = await transport.key_value(self.subjects.members_bucket, ttl_s=self._lease_s)
        entry = await bucket.get(self.name)
        now = int(self._clock() * 1e6)
        with contextlib.suppress(WireError):
            if entry is not None and entry.value is not None:
                return max(now, decode_member(entry.value).incarnation + 1)
        return now

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has `close` awaited when this process has left and reads nothing any more; what it tells then may still arrive."""
        self._stack.push_async_callback(close)

    def _on_messages(self, sender: Address, messages: Sequence[Message]) -> None:
        self.calls.on_messages(sender, messages)

    def _on_member_lost(self, address: Address) -> None:
        self.endpoint.lose(address)
        self.claims.on_lost(address)

    def _on_lost(self, address: Address, unsent: list[Message], unknown: list[Message], was_settled: bool) -> None:
        self.table.leave(address)
        self.recall.on_lost(address)
        self.calls.on_lost(address, unsent, unknown, was_settled=was_settled)

    def _hold_lost(self, address: Address) -> None:
        """Others hold it to be lost: so does this process, whatever it has heard itself."""
        if self.table.leave(address):
            self._on_table_changed()
        self.endpoint.lose(address)

    async def _is_gone(self, address: Address) -> bool:
        return await self.membership.is_gone(address)

    def _on_table_changed(self) -> None:
        self._table_changed.set()
        self.calls.on_table_changed()

    def on_replaced(self) -> None:
        """Another process was started under our name (`membership.LeaseEvents`)."""
        _log.error("process.replaced", process=self.name, hint="another process was started under the same name")
        if not self.replaced.done():
            self.replaced.set_result(None)
        self.calls.close(OwnerLostError(f"another process was started under the name {self.name!r}"), is_given_up=True)

    def on_declared_lost(self) -> None:
        """This process stood still for longer than its lease, and others have given it up (`membership.LeaseEvents`)."""
        _log.error("process.declared_lost", process=self.name, hint="it stood still for longer than its lease")
        if not self.declared_lost.done():
            self.declared_lost.set_result(None)
        error = OwnerLostError(f"process {self.name!r} stood still for longer than its lease and was given up")
        self.calls.close(error, is_given_up=True)

    def is_current(self) -> bool:
        """False while others may hold this process to be lost: it begins nothing then."""
        return self.membership.is_current()

    async def until_current(self) -> None:
        """Returns while nobody can hold this process to be lost."""
        while True:
            if self.is_current():
                return
            await asyncio.sleep(self._lease_s / 60)  # nothing tells when a renewal in another thread has been confirmed

    async def wait_for(self, actor: str, timeout_s: float) -> bool:
        """Returns True once somebody serves `actor`, False after `timeout_s`."""
        return await self.until(lambda: bool(self.table.replicas(actor)), timeout_s)

    async def until(self, holds: Callable[[], bool], timeout_s: float | None) -> bool:
        """Returns True once the routing table is as `holds` says, False after `timeout_s` if there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._table_changed.clear()
                    await self._table_changed.wait()
        return holds()

    async def aclose(self, error: CallError | None = None) -> None:
        """Fails what has not ended and leaves; idempotent."""
        if hasattr(self, "calls"):
            self.calls.close(error or WorkerLostError(f"process {self.name!r} has closed"))
            if self.transport.is_connected:
                await self.endpoint.drain(0.5)
        await self._stack.aclose()
