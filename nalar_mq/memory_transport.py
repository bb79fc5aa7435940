"""A broker inside the process, for tests, simulation and programs that need no network: the second `Transport`.

A `MemoryHub` is the broker; `connect` gives the connection of one process. Without `Faults` a message is delivered in the
next turn of the loop. With them, published messages are delayed, dropped, doubled and overtaken, all from the hub's seed;
key-value, queue, object and service operations are never disturbed, since a broker answers those or fails.

What can be done to the processes:

    partition(a, b)   messages between the two are lost, until `heal`
    cut(name)         the process has lost the broker: listeners hear it, publications wait, operations fail; until `restore`
    pause(name)       the process is stopped (SIGSTOP): what it says and hears waits, until `resume`
    kill(name)        it is gone: nothing is delivered to it or heard of it any more; the name may connect again
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any

import msgspec

from nalar_mq.errors import BrokerError, BrokerTimeoutError, KeyConflictError, ValueTooLargeError
from nalar_mq.logs import logger
from nalar_mq.transport import (
    Delivered,
    Handler,
    Kept,
    KeyEntry,
    KeyValue,
    Ledger,
    ObjectStore,
    QueueMessage,
    Service,
    ServiceEndpoint,
    ServiceFailure,
    ServiceRequest,
    Subscription,
    WorkQueue,
)

_log = logger(__name__)

_INBOX = "_INBOX."
_DEDUPLICATION_S = 120.0
_REQUEST_TIMEOUT_S = 5.0
_PENDING_BYTES = 8 * 1024 * 1024
_TICK_S = 1e-7


class Faults(msgspec.Struct, frozen=True):
    """What happens to published messages.

    Attributes:
        drop: probability that a message is lost.
        duplicate: probability that it arrives twice.
        reorder: probability that later messages may overtake it.
        delay_s: least and greatest time on the way.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_s: tuple[float, float] = (0.0, 0.0)


def subject_matches(pattern: str, subject: str) -> bool:
    """True if `subject` falls under `pattern`, in which `*` is any one token and a last `>` is one or more."""
    wanted = pattern.split(".")
    tokens = subject.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted):
        return False
    return all(want in ("*", token) for want, token in zip(wanted, tokens, strict=False))


class MemoryHub:
    """The broker: deterministic from `seed` as far as the program that uses it is.

    Args:
        seed: of every random decision.
        faults: what happens to published messages; may be replaced at any time by assignment.
        max_payload: bytes that one message may hold.
    """

    def __init__(self, seed: int = 0, faults: Faults | None = None, *, max_payload: int = 1024 * 1024) -> None:
        self.faults = faults
        self.max_payload = max_payload
        self.buckets: dict[str, _Bucket] = {}
        self.queues: dict[str, _Queue] = {}
        self.ledgers: dict[str, _Ledger] = {}
        self.objects: dict[str, dict[str, bytes]] = {}
        self._random = random.Random(seed)
        self._transports: dict[str, list[MemoryTransport]] = {}
        self._subscriptions: list[_Subscription] = []
        self._routes: dict[str, tuple[list[_Subscription], list[list[_Subscription]]]] = {}
        self._partitions: set[frozenset[str]] = set()
        self._serial = 0

    async def connect(self, name: str) -> MemoryTransport:
        """The connection of a process called `name`; a name may have several."""
        await asyncio.sleep(0)
        transport = MemoryTransport(self, name, self.next_serial())
        self._transports.setdefault(name, []).append(transport)
        return transport

    def partition(self, a: str, b: str) -> None:
        """Loses every message published between the processes `a` and `b` from now on."""
        self._partitions.add(frozenset((a, b)))

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """Ends the partition between `a` and `b`, or all partitions."""
        if a is None or b is None:
            self._partitions.clear()
        else:
            self._partitions.discard(frozenset((a, b)))

    def cut(self, name: str) -> None:
        """Takes the broker away from the process `name`."""
        for transport in self._transports.get(name, ()):
            transport.set_connected(False)

    def restore(self, name: str) -> None:
        """Gives the broker back to the process `name`; what it published meanwhile is sent."""
        for transport in self._transports.get(name, ()):
            transport.set_connected(True)

    def pause(self, name: str) -> None:
        """Stops the process `name`, as far as anyone can see from outside."""
        for transport in self._transports.get(name, ()):
            transport.set_paused(True)

    def resume(self, name: str) -> None:
        """Lets the process `name` go on; what it missed is delivered in order."""
        for transport in self._transports.get(name, ()):
            transport.set_paused(False)

    def kill(self, name: str) -> None:
        """Ends every connection of the process `name` without a word."""
        for transport in list(self._transports.get(name, ())):
            transport.die()

    def next_serial(self) -> int:
        """A number not used before in this hub."""
        self._serial += 1
        return self._serial

    def add_subscription(self, subscription: _Subscription) -> None:
        """From now on messages are routed to `subscription`."""
        self._subscriptions.append(subscription)
        self._routes.clear()

    def remove_subscription(self, subscription: _Subscription) -> None:
        """Undoes `add_subscription`; idempotent."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            self._routes.clear()

    def forget(self, transport: MemoryTransport) -> None:
        """Takes a closed connection out of everything."""
        self._transports[transport.name] = [other for other in self._transports[transport.name] if other is not transport]
        self._subscriptions = [kept for kept in self._subscriptions if kept.transport is not transport]
        self._routes.clear()

    def has_listener(self, subject: str) -> bool:
        """True if anybody, or a queue, would get a message for `subject`."""
        every, groups = self._route(subject)
        return bool(every or groups) or any(queue.takes(subject) for queue in self.queues.values())

    def route(self, source: MemoryTransport, message: Delivered, *, undisturbed: bool = False) -> None:
        """Sends `message` to everyone it is for, and into every queue over its subject."""
        if self.queues:
            self._enqueue(source, message)
        every, groups = self._route(message.subject)
        faults = None if undisturbed or message.subject.startswith(_INBOX) else self.faults
        for subscription in every:
            self._send(source, subscription, message, faults)
        for group in groups:
            within_reach = [member for member in group if self._reaches(source, member)]
            if within_reach:
                self._send(source, self._random.choice(within_reach), message, faults)

    def _enqueue(self, source: MemoryTransport, message: Delivered) -> None:
        for queue in self.queues.values():
            if queue.takes(message.subject):
                headers = dict(message.headers or {})
                sequence, duplicate = queue.add(message.subject, message.data, headers.get("Nats-Msg-Id", ""), headers)
                if message.reply:
                    answer = {"stream": queue.name, "seq": sequence} | ({"duplicate": True} if duplicate else {})
                    self.route(source, Delivered(message.reply, json.dumps(answer).encode()), undisturbed=True)

    def _route(self, subject: str) -> tuple[list[_Subscription], list[list[_Subscription]]]:
        found = self._routes.get(subject)
        if found is None:
            every: list[_Subscription] = []
            groups: dict[str, list[_Subscription]] = {}
            for subscription in self._subscriptions:
                if not subject_matches(subscription.pattern, subject):
                    continue
                if subscription.queue:
                    groups.setdefault(subscription.queue, []).append(subscription)
                else:
                    every.append(subscription)
            if len(self._routes) > 100_000:
                self._routes.clear()
            found = self._routes[subject] = (every, list(groups.values()))
        return found

    def _reaches(self, source: MemoryTransport, subscription: _Subscription) -> bool:
        return not self._partitions or frozenset((source.name, subscription.transport.name)) not in self._partitions

    def _send(self, source: MemoryTransport, subscription: _Subscription, message: Delivered, faults: Faults | None) -> None:
        if not self._reaches(source, subscription):
            return
        if faults is None:
            subscription.deliver_soon(message)
            return
        copies = 1 + (self._random.random() < faults.duplicate)
        for _ in range(copies):
            if self._random.random() >= faults.drop:
                self._send_late(source, subscription, message, faults)

    def _send_late(self, source: MemoryTransport, subscription: _Subscription, message: Delivered, faults: Faults) -> None:
        low_s, high_s = faults.delay_s
        delay_s = self._random.uniform(low_s, high_s)
        if self._random.random() < faults.reorder:
            delay_s += self._random.uniform(0.0, max(high_s, 0.01))
            subscription.deliver_at(subscription.transport.loop.time() + delay_s, message)
        else:
            subscription.deliver_in_order(source.serial, delay_s, message)


class _Subscription:
    """One handler and its place in the hub."""

    __slots__ = ("_due_s", "_handler", "_is_live", "pattern", "queue", "transport")

    def __init__(self, transport: MemoryTransport, pattern: str, handler: Handler, queue: str) -> None:
        self.transport = transport
        self.pattern = pattern
        self.queue = queue
        self._handler = handler
        self._is_live = True
        self._due_s: dict[int, float] = {}

    async def unsubscribe(self) -> None:
        self._is_live = False
        self.transport.hub.remove_subscription(self)

    def deliver_soon(self, message: Delivered) -> None:
        self.transport.loop.call_soon(self.deliver, message)

    def deliver_at(self, when_s: float, message: Delivered) -> None:
        self.transport.loop.call_at(when_s, self.deliver, message)

    def deliver_in_order(self, source: int, delay_s: float, message: Delivered) -> None:
        """Not before what the same publisher sent earlier: timers of one instant have no order."""
        when_s = max(self.transport.loop.time() + delay_s, self._due_s.get(source, 0.0) + _TICK_S)
        self._due_s[source] = when_s
        self.deliver_at(when_s, message)

    def deliver(self, message: Delivered) -> None:
        transport = self.transport
        if not self._is_live or transport.is_closed:
            return
        if transport.is_paused:
            transport.hold(self, message)
            return
        if not transport.is_connected:
            return
        try:
            self._handler(message)
        except Exception:
            _log.exception("transport.handler_failed", subject=message.subject)


class MemoryTransport:
    """The connection of one process to a `MemoryHub`; see `Transport` for what it promises."""

    def __init__(self, hub: MemoryHub, name: str, serial: int) -> None:
        self.hub = hub
        self.name = name
        self.serial = serial
        self.loop = asyncio.get_running_loop()
        self.is_closed = False
        self.is_paused = False
        self._is_cut = False
        self._listeners: list[Callable[[bool], None]] = []
        self._held: deque[tuple[_Subscription, Delivered]] = deque()
        self._pending: deque[Delivered] = deque()
        self._pending_bytes = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: list[Callable[[], None]] = []

    @property
    def max_payload(self) -> int:
        """Bytes that one message may hold."""
        return self.hub.max_payload

    @property
    def is_connected(self) -> bool:
        """False while the process is cut off, and after the end."""
        return not self._is_cut and not self.is_closed

    @property
    def url(self) -> str:
        """`memory://` and the name of the process."""
        return f"memory://{self.name}"

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener` with True after `restore` and with False after `cut`."""
        self._listeners.append(listener)

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Hands a message over.

        Raises:
            ValueTooLargeError: it is larger than `max_payload`.
        """
        self.check_size(subject, data, headers)
        message = Delivered(subject, data, reply, headers)
        if self.is_closed:
            return
        if self._is_cut or self.is_paused:
            self._keep(message)
        else:
            self.hub.route(self, message)

    async def syncs(self) -> bool | None:
        """True: what it keeps, it keeps as long as there is anybody who could ask."""
        return True

    async def flush(self) -> None:
        """Returns when the hub has everything published so far. Raises `BrokerError` if it stays away."""
        await self.reach()

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Delivers messages for `subject` to `handler`; with `queue`, to one member of it each."""
        await self.reach()
        subscription = _Subscription(self, subject, handler, queue)
        self.hub.add_subscription(subscription)
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Delivered:
        """One request and its answer. Raises `BrokerError` for no responder or no answer."""
        self.check_size(subject, data)
        await self.reach()
        if not self.hub.has_listener(subject):
            raise BrokerError(f"nobody answers on {subject!r}")
        answer: asyncio.Future[Delivered] = self.loop.create_future()

        def on_answer(message: Delivered) -> None:
            if not answer.done():
                answer.set_result(message)

        inbox = f"{_INBOX}{self.serial}.{self.hub.next_serial()}"
        subscription = _Subscription(self, inbox, on_answer, "")
        self.hub.add_subscription(subscription)
        try:
            self.hub.route(self, Delivered(subject, data, inbox), undisturbed=True)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise BrokerTimeoutError(f"no answer on {subject!r} within {timeout_s} s") from None
        finally:
            await subscription.unsubscribe()

    async def key_value(self, bucket: str, *, ttl_s: float | None = None) -> KeyValue:
        """Opens a bucket, creating it where it does not exist."""
        await self.reach()
        return _KeyValue(self, self.hub.buckets.setdefault(bucket, _Bucket(self.loop, ttl_s)))

    async def work_queue(self, name: str, subjects: list[str]) -> WorkQueue:
        """Opens a queue, creating it where it does not exist."""
        await self.reach()
        return _WorkQueue(self, self.hub.queues.setdefault(name, _Queue(self.loop, name, list(subjects))))

    async def ledger(
        self, name: str, subjects: list[str], *, max_age_s: float | None = None, per_subject: int | None = None
    ) -> Ledger:
        """Opens a ledger, creating it where it does not exist."""
        await self.reach()
        made = _Ledger(self.loop, name, list(subjects), max_age_s, per_subject)
        return _OpenLedger(self, self.hub.ledgers.setdefault(name, made))

    async def object_store(self, bucket: str, *, max_age_s: float | None = None) -> ObjectStore:
        """Opens an object store, creating it where it does not exist."""
        await self.reach()
        return _ObjectStore(self, self.hub.objects.setdefault(bucket, {}))

    async def serve(self, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str = "") -> Service:
        """Runs a service that answers discovery as ADR-32 describes it."""
        service = _Service(self, name, endpoints, version, description)
        await service.start()
        return service

    async def aclose(self) -> None:
        """Closes; idempotent."""
        if not self.is_closed:
            await asyncio.sleep(0)
            self.die()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*tasks, return_exceptions=True)

    def die(self) -> None:
        """Ends at once, without a word to anybody."""
        if self.is_closed:
            return
        self.is_closed = True
        self._changed.set()
        self.hub.forget(self)
        self._held.clear()
        self._pending.clear()
        for task in self._tasks:
            task.cancel()
        for end in list(self._ended):
            end()

    def set_connected(self, connected: bool) -> None:
        """What `MemoryHub.cut` and `restore` do to this connection."""
        if self._is_cut == (not connected) or self.is_closed:
            return
        self._is_cut = not connected
        if connected:
            self._wake()
        for listener in list(self._listeners):
            self.loop.call_soon(listener, connected)

    def set_paused(self, paused: bool) -> None:
        """What `MemoryHub.pause` and `resume` do to this connection."""
        if self.is_paused == paused or self.is_closed:
            return
        self.is_paused = paused
        if not paused:
            self._wake()
            while self._held:
                subscription, message = self._held.popleft()
                subscription.deliver_soon(message)

    def hold(self, subscription: _Subscription, message: Delivered) -> None:
        """Keeps a message for a stopped process."""
        self._held.append((subscription, message))

    async def reach(self, timeout_s: float | None = _REQUEST_TIMEOUT_S) -> None:
        """Returns when the broker answers this process, at least one turn of the loop later.

        Raises:
            BrokerError: it is closed, or it does not answer in time.
        """
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(timeout_s):
                while (self._is_cut or self.is_paused) and not self.is_closed:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise BrokerTimeoutError(f"no answer from {self.url} within {timeout_s} s") from None
        if self.is_closed:
            raise BrokerError(f"{self.url} is closed")

    def start_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` as a task that ends with this connection."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_end(self, end: Callable[[], None]) -> Callable[[], None]:
        """Calls `end` when this connection ends; returns what takes that back."""
        self._ended.append(end)
        return lambda: self._ended.remove(end)

    def _wake(self) -> None:
        self._changed.set()
        if not self._is_cut and not self.is_paused:
            self._pending_bytes = 0
            while self._pending:
                self.hub.route(self, self._pending.popleft())

    def _keep(self, message: Delivered) -> None:
        self._pending.append(message)
        self._pending_bytes += len(message.data)
        while self._pending_bytes > _PENDING_BYTES:
            self._pending_bytes -= len(self._pending.popleft().data)

    def check_size(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Raises `ValueTooLargeError` for what no message can hold."""
        size_bytes = len(data) + sum(len(key) + len(value) + 4 for key, value in (headers or {}).items())
        if size_bytes > self.hub.max_payload:
            raise ValueTooLargeError(
                f"a message of {size_bytes} bytes for {subject!r} is larger than {self.hub.max_payload}",
                size_bytes=size_bytes,
                limit_bytes=self.hub.max_payload,
            )


class _Bucket:
    """The keys of one bucket, whoever looks at them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ttl_s: float | None) -> None:
        self.watchers: list[asyncio.Queue[KeyEntry | None]] = []
        self._loop = loop
        self._ttl_s = ttl_s
        self._revision = 0
        self._entries: dict[str, tuple[KeyEntry, float]] = {}

    def get(self, key: str) -> KeyEntry | None:
        found = self._entries.get(key)
        if found is None:
            return None
        entry, written_s = found
        if self._ttl_s is not None and self._loop.time() - written_s >= self._ttl_s:
            del self._entries[key]
            return None
        return entry

    def entries(self) -> list[KeyEntry]:
        present = [self.get(key) for key in list(self._entries)]
        return [entry for entry in present if entry is not None]

    def write(self, key: str, value: bytes) -> int:
        self._revision += 1
        entry = KeyEntry(key, value, self._revision)
        self._entries[key] = (entry, self._loop.time())
        self._tell(entry)
        return self._revision

    def delete(self, key: str) -> None:
        self._revision += 1
        self._entries.pop(key, None)
        self._tell(KeyEntry(key, None, self._revision))

    def _tell(self, entry: KeyEntry) -> None:
        for watcher in self.watchers:
            watcher.put_nowait(entry)


class _KeyValue:
    """A bucket as one process sees it."""

    def __init__(self, transport: MemoryTransport, bucket: _Bucket) -> None:
        self._transport = transport
        self._bucket = bucket

    async def get(self, key: str) -> KeyEntry | None:
        await self._transport.reach()
        return self._bucket.get(key)

    async def create(self, key: str, value: bytes) -> int:
        self._transport.check_size(key, value)
        await self._transport.reach()
        if self._bucket.get(key) is not None:
            raise KeyConflictError(key)
        return self._bucket.write(key, value)

    async def claim(self, key: str, value: bytes) -> KeyEntry | None:
        self._transport.check_size(key, value)
        await self._transport.reach()
        present = self._bucket.get(key)
        if present is None:
            self._bucket.write(key, value)
        return present

    async def put(self, key: str, value: bytes) -> int:
        self._transport.check_size(key, value)
        await self._transport.reach()
        return self._bucket.write(key, value)

    async def update(self, key: str, value: bytes, last: int) -> int:
        self._transport.check_size(key, value)
        await self._transport.reach()
        self._check(key, last)
        return self._bucket.write(key, value)

    async def delete(self, key: str, last: int | None = None) -> None:
        await self._transport.reach()
        if last is not None:
            self._check(key, last)
        self._bucket.delete(key)

    async def entries(self) -> list[KeyEntry]:
        await self._transport.reach()
        return self._bucket.entries()

    async def watch(self) -> AsyncIterator[KeyEntry | None]:
        await self._transport.reach()
        changes: asyncio.Queue[KeyEntry | None] = asyncio.Queue()
        forget_end = self._transport.on_end(lambda: changes.put_nowait(None))
        self._bucket.watchers.append(changes)
        try:
            for entry in self._bucket.entries():
                yield entry
            yield None
            while (change := await changes.get()) is not None:
                await self._transport.reach(None)
                yield change
        finally:
            self._bucket.watchers.remove(changes)
            forget_end()

    def _check(self, key: str, last: int) -> None:
        entry = self._bucket.get(key)
        if entry is None or entry.revision != last:
            raise KeyConflictError(key)


class _Item:
    """One message of a queue; invisible until `due_s` while somebody has it."""

    __slots__ = ("data", "deliveries", "due_s", "headers", "sequence", "subject")

    def __init__(self, sequence: int, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        self.sequence = sequence
        self.subject = subject
        self.data = data
        self.headers = headers
        self.deliveries = 0
        self.due_s = 0.0


class _Queue:
    """The messages of one work queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, subjects: list[str]) -> None:
        self.loop = loop
        self.name = name
        self.items: dict[int, _Item] = {}
        self._subjects = subjects
        self._sequence = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self._waiters: list[asyncio.Future[None]] = []

    def takes(self, subject: str) -> bool:
        return any(subject_matches(pattern, subject) for pattern in self._subjects)

    def add(self, subject: str, data: bytes, message_id: str, headers: Mapping[str, str]) -> tuple[int, bool]:
        now_s = self.loop.time()
        if message_id:
            known = self._seen.get(message_id)
            if known is not None and now_s - known[1] < _DEDUPLICATION_S:
                return known[0], True
        self._sequence += 1
        if message_id:
            self._seen[message_id] = (self._sequence, now_s)
        self.items[self._sequence] = _Item(self._sequence, subject, data, headers)
        self.wake()
        return self._sequence, False

    def take(self, pattern: str, batch: int, ack_wait_s: float) -> list[_Item]:
        now_s = self.loop.time()
        taken: list[_Item] = []
        for item in self.items.values():
            if len(taken) >= batch:
                break
            if item.due_s <= now_s and subject_matches(pattern, item.subject):
                item.deliveries += 1
                item.due_s = now_s + ack_wait_s
                taken.append(item)
        return taken

    def wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self, pattern: str, until_s: float) -> None:
        """Returns when something may have become visible under `pattern`, or at `until_s`."""
        due_s = min((item.due_s for item in self.items.values() if subject_matches(pattern, item.subject)), default=until_s)
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiters.append(waiter)
        await asyncio.wait([waiter], timeout=max(0.0, min(due_s, until_s) - self.loop.time()))
        if waiter in self._waiters:
            self._waiters.remove(waiter)


class _QueueMessage:
    """A message taken from a queue, in the hands of one process."""

    def __init__(self, transport: MemoryTransport, queue: _Queue, item: _Item, ack_wait_s: float) -> None:
        self._transport = transport
        self._queue = queue
        self._item = item
        self._ack_wait_s = ack_wait_s
        self._deliveries = item.deliveries

    @property
    def subject(self) -> str:
        return self._item.subject

    @property
    def data(self) -> bytes:
        return self._item.data

    @property
    def headers(self) -> Mapping[str, str]:
        return self._item.headers

    @property
    def sequence(self) -> int:
        return self._item.sequence

    @property
    def deliveries(self) -> int:
        return self._deliveries

    async def ack(self) -> None:
        await self._transport.reach()
        self._queue.items.pop(self._item.sequence, None)

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._transport.reach()
        self._item.due_s = self._queue.loop.time() + delay_s
        self._queue.wake()

    async def term(self, reason: str = "") -> None:
        await self.ack()

    async def in_progress(self) -> None:
        await self._transport.reach()
        self._item.due_s = self._queue.loop.time() + self._ack_wait_s


class _WorkQueue:
    """A queue as one process sees it."""

    def __init__(self, transport: MemoryTransport, queue: _Queue) -> None:
        self._transport = transport
        self._queue = queue

    async def publish(
        self, subject: str, data: bytes, *, message_id: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bool]:
        self._transport.check_size(subject, data, headers)
        await self._transport.reach()
        if not self._queue.takes(subject):
            raise BrokerError(f"the queue {self._queue.name!r} takes nothing on {subject!r}")
        stamped = dict(headers or {}) | ({"Nats-Msg-Id": message_id} if message_id else {})
        return self._queue.add(subject, data, message_id, stamped)

    async def pull(self, subject: str, *, batch: int, timeout_s: float, ack_wait_s: float) -> list[QueueMessage]:
        until_s = self._queue.loop.time() + timeout_s
        await self._transport.reach()
        while True:
            taken = self._queue.take(subject, batch, ack_wait_s)
            if taken or self._queue.loop.time() >= until_s:
                return [_QueueMessage(self._transport, self._queue, item, ack_wait_s) for item in taken]
            await self._queue.wait(subject, until_s)
            await self._transport.reach()

    async def depth(self) -> int:
        await self._transport.reach()
        return len(self._queue.items)

    async def subjects(self) -> dict[str, int]:
        await self._transport.reach()
        return dict(Counter(item.subject for item in self._queue.items.values()))

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        await self._transport.reach()
        items = [i for i in self._queue.items.values() if i.sequence > after and subject_matches(subject, i.subject)]
        return [Kept(item.subject, item.data, item.sequence, item.headers) for item in items[:limit]]

    async def holds(self, sequence: int) -> bool:
        await self._transport.reach()
        return sequence in self._queue.items

    async def remove(self, sequence: int) -> bool:
        await self._transport.reach()
        return self._queue.items.pop(sequence, None) is not None


class _Ledger:
    """The messages of one ledger, by sequence."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        subjects: list[str],
        max_age_s: float | None,
        per_subject: int | None,
    ) -> None:
        self.name = name
        self._loop = loop
        self._subjects = subjects
        self._max_age_s = max_age_s
        self._per_subject = per_subject
        self._messages: dict[int, tuple[Kept, float]] = {}
        self._by_subject: dict[str, list[int]] = {}
        self._sequence = 0

    def takes(self, subject: str) -> bool:
        return any(subject_matches(pattern, subject) for pattern in self._subjects)

    def add(self, subject: str, data: bytes, headers: Mapping[str, str]) -> int:
        self._sequence += 1
        self._messages[self._sequence] = (Kept(subject, data, self._sequence, headers), self._loop.time())
        own = self._by_subject.setdefault(subject, [])
        own.append(self._sequence)
        if self._per_subject is not None and len(own) > self._per_subject:
            del self._messages[own.pop(0)]
        return self._sequence

    def last(self, subject: str) -> Kept | None:
        self._forget_old()
        own = self._by_subject.get(subject)
        return self._messages[own[-1]][0] if own else None

    def find(self, sequence: int) -> Kept | None:
        self._forget_old()
        found = self._messages.get(sequence)
        return None if found is None else found[0]

    def all(self, pattern: str) -> Iterator[Kept]:
        self._forget_old()
        return (message for message, _ in self._messages.values() if subject_matches(pattern, message.subject))

    def remove(self, message: Kept) -> None:
        del self._messages[message.sequence]
        own = self._by_subject[message.subject]
        own.remove(message.sequence)
        if not own:
            del self._by_subject[message.subject]

    def _forget_old(self) -> None:
        if self._max_age_s is None:
            return
        oldest_s = self._loop.time() - self._max_age_s
        for message, written_s in list(self._messages.values()):
            if written_s > oldest_s:
                return
            self.remove(message)


class _OpenLedger:
    """A ledger as one process sees it."""

    def __init__(self, transport: MemoryTransport, ledger: _Ledger) -> None:
        self._transport = transport
        self._ledger = ledger

    async def append(
        self, subject: str, data: bytes, *, last: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        self._transport.check_size(subject, data, headers)
        await self._transport.reach()
        if not self._ledger.takes(subject):
            raise BrokerError(f"{self._ledger.name!r} keeps nothing on {subject!r}")
        newest = self._ledger.last(subject)
        if last is not None and last != (0 if newest is None else newest.sequence):
            raise KeyConflictError(subject)
        sequence = self._ledger.add(subject, data, dict(headers or {}))
        self._transport.hub.route(self._transport, Delivered(subject, data, "", headers), undisturbed=True)
        return sequence

    async def last(self, subject: str) -> Kept | None:
        await self._transport.reach()
        return self._ledger.last(subject)

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        await self._transport.reach()
        newer = (message for message in self._ledger.all(subject) if message.sequence > after)
        return list(itertools.islice(newer, limit))

    async def remove(self, sequence: int) -> bool:
        await self._transport.reach()
        found = self._ledger.find(sequence)
        if found is not None:
            self._ledger.remove(found)
        return found is not None

    async def subjects(self) -> dict[str, int]:
        await self._transport.reach()
        return dict(Counter(message.subject for message in self._ledger.all(">")))

    async def purge(self, subject: str, *, below: int | None = None) -> None:
        await self._transport.reach()
        for message in list(self._ledger.all(subject)):
            if below is None or message.sequence < below:
                self._ledger.remove(message)


class _ObjectStore:
    """An object store as one process sees it."""

    def __init__(self, transport: MemoryTransport, objects: dict[str, bytes]) -> None:
        self._transport = transport
        self._objects = objects

    async def put(self, name: str, data: bytes) -> None:
        await self._transport.reach()
        self._objects[name] = data

    async def names(self) -> list[str]:
        await self._transport.reach()
        return sorted(self._objects)

    async def get(self, name: str) -> bytes | None:
        await self._transport.reach()
        return self._objects.get(name)

    async def delete(self, name: str) -> None:
        await self._transport.reach()
        self._objects.pop(name, None)


class _Service:
    """Endpoints of one process, and its answers to `$SRV.PING`, `INFO` and `STATS`."""

    def __init__(
        self, transport: MemoryTransport, name: str, endpoints: list[ServiceEndpoint], version: str, description: str
    ) -> None:
        self._transport = transport
        self._endpoints = endpoints
        self._description = description
        self._identity: dict[str, Any] = {
            "name": name,
            "id": f"memory{transport.hub.next_serial()}",
            "version": version,
            "metadata": {},
        }
        self._requests = dict.fromkeys((endpoint.name for endpoint in endpoints), 0)
        self._errors = dict.fromkeys((endpoint.name for endpoint in endpoints), 0)
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        for endpoint in self._endpoints:
            await self._listen(endpoint.subject, self._on_request(endpoint), "q")
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for scope in ("", f".{self._identity['name']}", f".{self._identity['name']}.{self._identity['id']}"):
                await self._listen(f"$SRV.{verb}{scope}", self._on_discovery(describe), "")

    async def stop(self, patience_s: float | None = None) -> None:
        while self._subscriptions:
            await self._subscriptions.pop().unsubscribe()

    async def _listen(self, subject: str, handler: Handler, queue: str) -> None:
        self._subscriptions.append(await self._transport.subscribe(subject, handler, queue=queue))

    def _on_request(self, endpoint: ServiceEndpoint) -> Handler:
        return lambda message: self._transport.start_task(self._answer(endpoint, message))

    def _on_discovery(self, describe: Callable[[], dict[str, Any]]) -> Handler:
        def answer(message: Delivered) -> None:
            if message.reply:
                self._transport.publish(message.reply, json.dumps(describe()).encode())

        return answer

    async def _answer(self, endpoint: ServiceEndpoint, message: Delivered) -> None:
        self._requests[endpoint.name] += 1
        data, headers = b"", None
        try:
            data = await endpoint.handler(ServiceRequest(message.subject, message.data, message.headers or {}))
        except Exception as error:
            self._errors[endpoint.name] += 1
            headers = _failure_headers(error)
        if message.reply:
            self._transport.publish(message.reply, data, headers=headers)

    def _ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response", **self._identity}

    def _info(self) -> dict[str, Any]:
        endpoints = [
            {"name": endpoint.name, "subject": endpoint.subject, "queue_group": "q", "metadata": dict(endpoint.metadata)}
            for endpoint in self._endpoints
        ]
        described = {"description": self._description, "endpoints": endpoints}
        return {"type": "io.nats.micro.v1.info_response", **self._identity, **described}

    def _stats(self) -> dict[str, Any]:
        endpoints = [
            {
                "name": endpoint.name,
                "subject": endpoint.subject,
                "queue_group": "q",
                "num_requests": self._requests[endpoint.name],
                "num_errors": self._errors[endpoint.name],
            }
            for endpoint in self._endpoints
        ]
        return {"type": "io.nats.micro.v1.stats_response", **self._identity, "endpoints": endpoints}


def _failure_headers(error: Exception) -> dict[str, str]:
    code, description = (error.code, error.description) if isinstance(error, ServiceFailure) else (500, str(error))
    return {"Nats-Service-Error": description, "Nats-Service-Error-Code": str(code)}
