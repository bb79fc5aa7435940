"""Who is alive: every process keeps a leased record in the members bucket and a routing table of everybody else's.

A record is renewed three times per lease, by a thread with a connection of its own where one is given, so that code which
blocks the event loop costs nobody his lease; of a worker that thread tells of such code (`loop_watch`). Joining and leaving are
learnt by watching the bucket, death by reading.

Death
    When a member's renewals have not been seen for a lease, its key is read: an absent one has expired. Only a process that
    has been connected and has seen its own renewals for one full lease judges others, so that nobody is lost to an outage of
    the broker, or because the judge stood still himself. Who finds the key absent writes the incarnation into the lost
    bucket, then reads the key again, and only if it is still absent takes the member to be lost, for good.

Return
    A process whose key has expired, because the broker was away or because it stood still itself, writes the key again
    under the same incarnation, then reads the lost bucket. If its incarnation stands there, somebody has given its calls to
    others: it takes its key back and is told so once (`on_declared_lost`); it must end, and may come again as a higher
    incarnation. If not, it goes on as if nothing had happened.

    One writes the declaration before it reads the key, the other the key before it reads the declaration: so of the two at
    least one sees what the other has done, and nobody goes on whom somebody else holds to be lost.

Standing still
    A process that stood still may wake up with calls in its hands that others run by now. It begins none of them before its
    lease has been confirmed again: `is_current` is false while the latest renewal lies a lease back. The time counts in which
    the whole machine slept: the others were awake.

Replacement
    A process that finds a higher incarnation under its own name has been replaced and is told so once (`on_replaced`).

Records that cannot be understood are counted and change nothing. So are those of clients that claim to serve something: by its
name, which the broker guards, everybody knows a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from nalar_mq.address import Address, Subjects, check_token, is_client_name
from nalar_mq.config import LEASE_S
from nalar_mq.errors import BrokerError, KeyConflictError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.loop_watch import LoopWatch
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Lost, Member, decode_lost, decode_member, encode_record
from nalar_mq.placement import RoutingTable
from nalar_mq.transport import KeyEntry, KeyValue, Transport

_AWAKE_AND_ASLEEP = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # elsewhere than on Linux the latter counts both
LOST_KEPT_S = 7 * 24 * 3600.0  # a process that stood still for longer has lost its connection, too
_log = logger(__name__)

ConnectTransport = Callable[[], Awaitable[Transport]]


def _clock_s() -> float:
    """Seconds, of which those in which the machine sleeps count."""
    return time.clock_gettime(_AWAKE_AND_ASLEEP)


class Register:
    """The lost bucket: who has been declared lost. It is opened when it is first needed, which is rare."""

    def __init__(self, transport: Transport, bucket: str) -> None:
        self._transport = transport
        self._name = bucket
        self._bucket: KeyValue | None = None

    async def _open(self) -> KeyValue:
        if self._bucket is None:
            self._bucket = await self._transport.key_value(self._name, ttl_s=LOST_KEPT_S)
        return self._bucket

    async def declare(self, address: Address) -> None:
        """Writes that this incarnation is lost; when it returns, everybody who reads finds it."""
        bucket = await self._open()
        value = encode_record(Lost(WIRE_VERSION, address.incarnation))
        while True:
            entry = await bucket.get(address.name)
            if entry is not None and _lost_in(entry) >= address.incarnation:
                return
            with contextlib.suppress(KeyConflictError):
                if entry is None:
                    await bucket.create(address.name, value)
                else:
                    await bucket.update(address.name, value, entry.revision)
                return

    async def holds(self, address: Address) -> bool:
        """True if this incarnation has been declared lost."""
        bucket = await self._open()
        entry = await bucket.get(address.name)
        return entry is not None and _lost_in(entry) >= address.incarnation


def incarnation_in(entry: KeyEntry) -> int | None:
    """Of the process that wrote the record; None if it cannot be read."""
    try:
        return decode_member(entry.value or b"").incarnation
    except WireError:
        return None


def _lost_in(entry: KeyEntry) -> int:
    try:
        return decode_lost(entry.value or b"").incarnation
    except WireError:
        return -1


class LeaseEvents(Protocol):
    """What a lease tells its process; each at most once, and only one of them."""

    def on_replaced(self) -> None:
        """Somebody else has taken the name."""
        ...

    def on_declared_lost(self) -> None:
        """Others have given this incarnation up."""
        ...


class Lease:
    """Keeps one record alive. All methods belong to one event loop, which need not be the runtime's."""

    def __init__(
        self,
        bucket: KeyValue,
        register: Register,
        name: str,
        member: Member,
        events: LeaseEvents,
        clock: Callable[[], float],
    ) -> None:
        self._bucket = bucket
        self._register = register
        self._name = name
        self._member = member
        self._events = events
        self._clock = clock
        self._confirmed_at = float("-inf")
        self._revision = 0
        self._was_absent = False
        self._writing = asyncio.Lock()
        self.is_over = False

    async def acquire(self) -> None:
        """Writes the record, in place of any earlier incarnation's."""
        began = self._clock()
        self._revision = await self._bucket.put(self._name, encode_record(self._member))
        self._confirmed_at = began

    def age_s(self) -> float:
        """How long ago the latest renewal that succeeded was begun. Any thread."""
        return self._clock() - self._confirmed_at

    async def renew(self) -> None:
        """Writes it again, unless somebody else has taken the name or others have given this incarnation up."""
        async with self._writing:
            await self._renew()

    async def _renew(self) -> None:
        if self.is_over:
            return
        began = self._clock()
        value = encode_record(self._member)
        try:
            self._revision = await self._bucket.update(self._name, value, self._revision)
        except KeyConflictError:
            await self._recover(value)
        if self._was_absent and not self.is_over:
            await self._check_register()
        if not self.is_over:
            self._confirmed_at = began

    async def _recover(self, value: bytes) -> None:
        entry = await self._bucket.get(self._name)
        if entry is None:
            self._was_absent = True
            self._revision = await self._bucket.create(self._name, value)
            return
        with contextlib.suppress(WireError):
            if entry.value is not None and decode_member(entry.value).incarnation > self._member.incarnation:
                self.is_over = True
                self._events.on_replaced()
                return
        self._revision = await self._bucket.update(self._name, value, entry.revision)

    async def _check_register(self) -> None:
        if await self._register.holds(Address(self._name, self._member.incarnation)):
            self.is_over = True
            self._events.on_declared_lost()
            await self.release()
        self._was_absent = False

    async def change(self, member: Member) -> None:
        """Replaces what the record says."""
        self._member = member
        await self.renew()

    async def release(self) -> None:
        """Removes the record if it is still ours."""
        with contextlib.suppress(BrokerError):
            await self._bucket.delete(self._name, self._revision)

    async def keep(self, period_s: float) -> None:
        """Renews until it is over. What is not answered within a period is tried again soon, as the lease has but three."""
        pause_s = period_s
        while not self.is_over:
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(period_s):
                    await self.renew()
                pause_s = period_s
            except (BrokerError, TimeoutError) as error:
                pause_s = period_s / 4
                _log.debug("lease.renewal_failed", member=self._name, error=repr(error))


class LeaseThread:
    """Runs a `Lease` in a thread with its own event loop and connection."""

    def __init__(
        self, connect: ConnectTransport, subjects: Subjects, name: str, member: Member, lease_s: float, events: LeaseEvents
    ) -> None:
        self._connect = connect
        self._subjects = subjects
        self._name = name
        self._member = member
        self._lease_s = lease_s
        self._owner = asyncio.get_running_loop()
        self._watch = LoopWatch(self._owner, name)
        self._ready: asyncio.Future[None] = self._owner.create_future()
        self._events = events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lease: Lease | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"lease-{name}", daemon=True)

    async def start(self) -> None:
        """Returns when the record is written. Raises `BrokerError` if it cannot be."""
        self._thread.start()
        await self._ready

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            transport = await self._connect()
        except Exception as error:
            self._tell(error)
            return
        try:
            await self._hold(transport)
        finally:
            await transport.aclose()

    async def _hold(self, transport: Transport) -> None:
        assert self._stop is not None
        try:
            bucket = await transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
            register = Register(transport, self._subjects.lost_bucket)
            self._lease = Lease(bucket, register, self._name, self._member, self, _clock_s)
            await self._lease.acquire()
        except Exception as error:
            self._tell(error)
            return
        self._tell(None)
        beside = [asyncio.create_task(self._lease.keep(self._lease_s / 3))]
        if self._member.role == "worker":
            beside.append(asyncio.create_task(self._watch.run()))
        await self._stop.wait()
        await cancel_all(beside)
        if transport.is_connected:  # else it runs out by itself
            await self._lease.release()

    def _tell(self, error: Exception | None) -> None:
        def tell() -> None:
            if self._ready.done():
                return
            if error is None:
                self._ready.set_result(None)
            else:
                self._ready.set_exception(error)

        with contextlib.suppress(RuntimeError):
            self._owner.call_soon_threadsafe(tell)

    def on_replaced(self) -> None:
        """Passes it on to the runtime's loop."""
        with contextlib.suppress(RuntimeError):
            self._owner.call_soon_threadsafe(self._events.on_replaced)

    def on_declared_lost(self) -> None:
        """Passes it on to the runtime's loop."""
        with contextlib.suppress(RuntimeError):
            self._owner.call_soon_threadsafe(self._events.on_declared_lost)

    def age_s(self) -> float:
        """How long ago the latest renewal that succeeded was begun."""
        return self._lease.age_s() if self._lease is not None else float("inf")

    async def change(self, member: Member) -> None:
        """Replaces what the record says."""
        if self._lease is not None and self._loop is not None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._lease.change(member), self._loop))

    async def aclose(self) -> None:
        """Removes the record and ends the thread."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 10.0)


class LeaseTask:
    """Runs a `Lease` on the runtime's own loop: for clients' short lives and for simulation."""

    def __init__(self, lease: Lease, lease_s: float) -> None:
        self._lease = lease
        self._lease_s = lease_s
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the record is written."""
        await self._lease.acquire()
        self._keeping = asyncio.create_task(self._lease.keep(self._lease_s / 3))

    def age_s(self) -> float:
        """How long ago the latest renewal that succeeded was begun."""
        return self._lease.age_s()

    async def change(self, member: Member) -> None:
        """Replaces what the record says."""
        await self._lease.change(member)

    async def aclose(self) -> None:
        """Removes the record."""
        if self._keeping is not None:
            await cancel_all([self._keeping])
        await self._lease.release()


class Membership:
    """This process's own record, and the routing table of all.

    Args:
        on_change: the table has changed.
        on_lost: that incarnation is dead or has left.
        events: told if this process must end.
        lease_connect: opens the connection of the lease's own thread; None to renew on the loop.

    Attributes:
        unreadable: records that made no sense.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        table: RoutingTable,
        me: Address,
        member: Member,
        *,
        on_change: Callable[[], None],
        on_lost: Callable[[Address], None],
        events: LeaseEvents,
        lease_connect: ConnectTransport | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._table = table
        self._me = me
        self._member = member
        self._on_change = on_change
        self._on_lost = on_lost
        self._events = events
        self._lease_connect = lease_connect
        self._lease_s = lease_s
        self._seen_at: dict[str, float] = {}
        self._reachable_at = 0.0
        self.unreadable = 0
        self._register = Register(transport, subjects.lost_bucket)
        self._bucket: KeyValue | None = None
        self._lease: LeaseThread | LeaseTask | None = None
        self._clock = _clock_s
        self._current_until = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._snapshot: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Writes our record and returns when the table holds everybody who was there."""
        loop = asyncio.get_running_loop()
        self._reachable_at = loop.time()
        self._transport.on_connection(self._connection)
        self._bucket = await self._transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
        name, member, lease_s = self._me.name, self._member, self._lease_s
        if self._lease_connect is None:
            self._clock = loop.time
            lease = Lease(self._bucket, self._register, name, member, self._events, loop.time)
            self._lease = LeaseTask(lease, lease_s)
        else:
            self._lease = LeaseThread(self._lease_connect, self._subjects, name, member, lease_s, self._events)
        self._snapshot = loop.create_future()
        self._tasks.append(asyncio.create_task(self._watch()))
        await self._lease.start()
        await self._snapshot
        self._tasks.append(asyncio.create_task(self._look_for_the_dead()))

    def is_current(self) -> bool:
        """False while others may hold this process to be lost: it begins nothing then."""
        return self._clock() < self._current_until or self._is_confirmed()

    def _is_confirmed(self) -> bool:
        """Asks the lease, and notes until when its answer holds: every call asks."""
        if self._lease is None:
            return False
        now, age_s = self._clock(), self._lease.age_s()
        self._current_until = now + self._lease_s - age_s
        return age_s < self._lease_s

    async def drain(self) -> None:
        """Tells everybody that this process takes no new calls."""
        self._member = msgspec.structs.replace(self._member, draining=True)
        if self._lease is not None:
            await self._lease.change(self._member)

    async def serve(self, actors: dict[str, ActorInfo]) -> None:
        """Tells everybody which actors this process serves from now on."""
        self._member = msgspec.structs.replace(self._member, actors=actors)
        if self._lease is not None:
            await self._lease.change(self._member)

    async def hold(self, stores: tuple[str, ...], replicated: tuple[str, ...]) -> None:
        """Tells everybody which stores this process has open."""
        self._member = msgspec.structs.replace(self._member, stores=stores, replicated=replicated)
        if self._lease is not None:
            await self._lease.change(self._member)

    async def is_gone(self, address: Address) -> bool:
        """Judges a process that the table may never have held: True once it is held to be lost, by everybody.

        Returns when that is known: not before the broker has been reachable for a lease.

        Raises:
            BrokerError: the broker does not answer.
        """
        while not self._table.is_lost(address):
            if self._table.is_alive(address):
                return False
            now = asyncio.get_running_loop().time()
            if not self._is_blind(now) and now - self._reachable_at >= self._lease_s:
                verdict = await self._judge(address)
                if verdict is not None:
                    return verdict
            await asyncio.sleep(self._lease_s / 6)
        return True

    async def _judge(self, address: Address) -> bool | None:
        """True if it is gone, False if not, None if that has to be looked at again."""
        assert self._bucket is not None
        entry = await self._bucket.get(address.name)
        if entry is None:
            await self._register.declare(address)
            # It may have come back in between, without having seen the declaration: then it is not gone.
            entry = await self._bucket.get(address.name)
        if entry is not None:
            incarnation = incarnation_in(entry)
            if incarnation is None or incarnation < address.incarnation:
                return False  # a record that cannot be read says that somebody lives
            if incarnation == address.incarnation:
                self._take(entry)
                return None
        self._table.leave(address)
        self._on_lost(address)
        return True

    async def aclose(self) -> None:
        """Removes our record and stops watching; idempotent."""
        tasks, self._tasks = self._tasks, []
        await cancel_all(tasks)
        lease, self._lease = self._lease, None
        self._current_until = float("-inf")
        if lease is not None:
            await lease.aclose()

    def _connection(self, is_connected: bool) -> None:
        self._reachable_at = asyncio.get_running_loop().time() if is_connected else float("inf")

    async def _watch(self) -> None:
        assert self._bucket is not None
        while True:
            try:
                async for entry in self._bucket.watch():
                    if entry is not None:
                        self._take(entry)
                    elif self._snapshot is not None and not self._snapshot.done():
                        self._snapshot.set_result(None)
            except BrokerError as error:
                _log.debug("membership.watch_failed", error=str(error))
            except Exception:
                _log.exception("membership.watch_failed")
            await asyncio.sleep(self._lease_s / 6)

    def _take(self, entry: KeyEntry) -> None:
        if entry.value is None:
            member = self._table.members.get(entry.key)
            if member is not None:
                self._lose(Address(entry.key, member.incarnation))
            return
        try:
            member = decode_member(entry.value)
            check_token(entry.key, "member name")
            if is_client_name(entry.key) and (member.actors or member.stores or member.replicated):
                raise WireError("clients serve nothing")
        except WireError as error:
            self.unreadable += 1
            _log.debug("membership.record_unreadable", member=entry.key, error=str(error))
            return
        now = asyncio.get_running_loop().time()
        if entry.key == self._me.name and self._is_blind(now):
            self._reachable_at = max(self._reachable_at, now)
        self._seen_at[entry.key] = now
        if self._table.members.get(entry.key) == member:
            return
        version = self._table.version
        former_holders = self._former_holders(entry.key, member)
        former = self._table.join(entry.key, member)
        if former is not None:
            self._on_lost(former)
        for address in former_holders:
            self._lose(address)
        if self._table.version != version:
            self._on_change()

    def _former_holders(self, name: str, member: Member) -> list[Address]:
        """Who had stores open that this member has just opened: they have ended, since nobody opens what another one holds.

        Calls that such a process had not answered go before all that are sent to its successor.
        """
        if self._snapshot is not None and not self._snapshot.done():
            return []  # of those who were here before us nobody can tell who came later
        known = self._table.members.get(name)
        opened = set(member.stores).difference(known.stores if known is not None else ())
        others = [(other, one) for other, one in self._table.members.items() if other not in (name, self._me.name)]
        return [Address(other, one.incarnation) for other, one in others if not opened.isdisjoint(one.stores)]

    def _lose(self, address: Address) -> None:
        self._seen_at.pop(address.name, None)
        if self._table.leave(address):
            self._on_lost(address)
            self._on_change()

    def _is_blind(self, now: float) -> bool:
        """True if one of our own renewals, at least, has not been seen: then nothing can be said of others."""
        return now - self._seen_at.get(self._me.name, now) > self._lease_s * 2 / 3

    async def _look_for_the_dead(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._lease_s / 6)
            now = loop.time()
            if self._is_blind(now) or now - self._reachable_at < self._lease_s:
                continue
            silent = [name for name, at in self._seen_at.items() if now - at > self._lease_s and name != self._me.name]
            for name in silent:
                try:
                    await self._read(name)
                except BrokerError as error:
                    _log.debug("membership.read_failed", member=name, error=str(error))
                except Exception:
                    _log.exception("membership.read_failed", member=name)

    async def _read(self, name: str) -> None:
        assert self._bucket is not None
        member = self._table.members.get(name)
        entry = await self._bucket.get(name)
        if entry is not None:
            self._take(entry)
        elif member is None:
            self._seen_at.pop(name, None)
        else:
            await self._declare_lost(Address(name, member.incarnation))

    async def _declare_lost(self, address: Address) -> None:
        assert self._bucket is not None
        await self._register.declare(address)
        entry = await self._bucket.get(address.name)
        if entry is None:
            self._lose(address)
        else:
            self._take(entry)
