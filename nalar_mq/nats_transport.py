"""`Transport` over NATS: nats-py for connecting, reconnecting, TLS and requests; a data path of its own above it.

The data path. `publish` appends a command to the outbox; one callback per loop turn joins the outbox into one write. What
arrives for a handler of ours goes from the socket straight into it (`nats_reader`), and nats-py reads the rest. Everything
that leaves goes through the same outbox, so that a ping, and the pong that answers it, cannot overtake a message published
before it.

    publish ─► outbox ─► (once per loop turn) ─► socket        connected
                  │                                            socket full: waits until it has drained
                  └─► kept, bounded, oldest dropped            away: sent after the reconnect

Of the commands only publications wait for a reconnect. Subscriptions are replayed from nats-py's table, pings and pongs
belong to one connection.

Where nats-py would leave a connection dead (an error reply of the server, an exception while reading, a late pong), this
module reconnects. It reconnects for ever; the first connect fails fast and typed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar, cast
from urllib.parse import ParseResult

from nalar_mq.config import BrokerAccess
from nalar_mq.errors import (
    AddressError,
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    BrokerFullError,
    BrokerUnreachableError,
    KeyConflictError,
    ObjectDamagedError,
    ValueTooLargeError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.nats_reader import Sorter, SortingReader
from nalar_mq.stand_in import loaded_when_used
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

with loaded_when_used("aiohttp"):  # nats-py imports it for web sockets, and doubles what an import of it takes
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client, Srv
    from nats.aio.subscription import Subscription as _NatsSubscription
    from nats.aio.transport import TcpTransport, WebSocketTransport
    from nats.js import JetStreamContext, api

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_log = logger(__name__)
_T = TypeVar("_T")

_CONNECT_TIMEOUT_S: Final = 5.0
_ATTEMPT_TIMEOUT_S: Final = 2
_PING_INTERVAL_S: Final = 1.0
_PINGS_OUTSTANDING: Final = 2
_RECONNECT_PAUSE_S: Final = 0.05
_RECONNECT_PAUSE_MAX_S: Final = 1.0
_STOOD_STILL_S: Final = 0.5
_OUTBOX_BYTES: Final = 32 * 1024 * 1024
_SOCKET_BYTES: Final = 1024 * 1024
_CACHED_SUBJECTS: Final = 4096
_WATCH_HEARTBEAT_S: Final = 5.0
_WATCH_SILENCE_S: Final = 12.0
_WATCH_RETRIES: Final = 8
_OBJECT_BYTES_PER_S: Final = 2 * 1024 * 1024
_OBJECT_PIECE_BYTES: Final = 512 * 1024
_OBJECT_PIECES: Final = 8  # on their way at once
_OBJECT_BATCH: Final = 64  # pieces asked for at once

_SUBJECT = re.compile(r"[^\s.]+(\.[^\s.]+)*")
_BUCKET = re.compile(r"[A-Za-z0-9_-]+")
_KEY = re.compile(r"[-/_=A-Za-z0-9]+(\.[-/_=A-Za-z0-9]+)*")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LINE_BREAKS: Final = str.maketrans({"\r": " ", "\n": " "})

# Complaints after which the server keeps the connection open.
_HARMLESS_ERRORS: Final = (
    "permissions violation",
    "invalid subject",
    "invalid publish subject",
    "invalid subscription",
    "maximum subscriptions exceeded",
)
_WRONG_REVISION: Final = (10071, 10164)
_STREAM_EXISTS: Final = 10058
_NO_STREAM: Final = 10059
_NO_MESSAGE: Final = (10037, 10043, 10057)
_LOST: Final = "lost"
_MONITOR_PORT: Final = 8222
_MONITOR_TIMEOUT_S: Final = 1.0
_MONITOR_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 8 * 1024 * 1024
_NO_JETSTREAM: Final = (10039, 10076)
_DISK_FULL: Final = "no space left on device"
_NO_ROOM: Final = (10002, 10023, 10028, 10047, 10077, 10122)


class _Tcp(TcpTransport):
    """nats-py's connection with asyncio's own upgrade to TLS, which ends without warnings.

    It reads the bytes that `handlers` have no use for.
    """

    def __init__(self, handlers: Mapping[bytes, Handler]) -> None:
        cast("Any", super()).__init__()
        self._handlers = handlers

    def __bool__(self) -> bool:
        # The client replaces what is not true.
        return True

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        reader = SortingReader(Sorter(self._handlers).sort, buffer_size)
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout):
            transport, _ = await loop.create_connection(lambda: protocol, uri.hostname or "", uri.port or 0)
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        assert self._io_writer is not None
        host = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            await self._io_writer.start_tls(ssl_context, server_hostname=host)


class _WebSocket(WebSocketTransport):
    """nats-py's connection over a web socket; it reads the bytes that `handlers` have no use for."""

    def __init__(self, handlers: Mapping[bytes, Handler], headers: Any) -> None:
        super().__init__(headers)
        self._sorter = Sorter(handlers)

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(buffer_size)
        return self._sorter.sort(data)


class _Client(Client):
    """nats-py's client with a direct way for messages in and out."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.connected = asyncio.Event()
        self.dropped = 0
        self.fails_fast = True
        self.needs_tls = False
        self.denied: set[str] = set()
        self.refused = (float("-inf"), "")  # when, and the subject that we might not publish to
        self._chance = chance
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[bytes, Handler] = {}
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._is_write_due = False
        self._congestion = asyncio.Event()
        self._attempts = 0

    def enqueue(self, command: bytes) -> None:
        """Sends a publication, now or when that is possible again; what the socket does not take at once it takes together."""
        if not self._outbox and not self._congestion.is_set() and self._can_write():
            self._write(command)
            return
        self._outbox.append(command)
        self._outbox_bytes += len(command)
        if self._outbox_bytes > _SOCKET_BYTES:
            self._write_out()
            self._drop_oldest()
        elif not self._is_write_due:
            self._is_write_due = True
            self._loop.call_soon(self._write_out)

    def listen(self, subject: str, handler: Handler, queue: str = "") -> int:
        """Subscribes; returns the id for `forget`."""
        self._sid += 1
        subscription = _NatsSubscription(self, self._sid, subject, queue=queue)
        self._subs[self._sid] = subscription
        self._handlers[b"%d" % self._sid] = handler
        self._send_now(f"SUB {subject} {queue} {self._sid}\r\n".encode())
        return self._sid

    def forget(self, sid: int) -> None:
        """Ends a subscription; idempotent."""
        if self._handlers.pop(b"%d" % sid, None) is not None:
            self._subs.pop(sid, None)
            self._send_now(f"UNSUB {sid}\r\n".encode())

    def abort(self) -> None:
        """Cuts the connection without sending what the socket still holds, and without waiting."""
        if isinstance(self._transport, TcpTransport):
            if self._transport._io_writer is not None:
                self._transport._io_writer.transport.abort()
            self._transport = None

    def send_pending(self) -> None:
        """Writes the outbox now."""
        self._write_out(even_if_congested=True)

    def _drop_oldest(self) -> None:
        if self._outbox_bytes > _OUTBOX_BYTES and not self.dropped:
            _log.warning("transport.messages_dropped", buffered_bytes=self._outbox_bytes)
        while self._outbox_bytes > _OUTBOX_BYTES:
            self._outbox_bytes -= len(self._outbox.popleft())
            self.dropped += 1

    def _write_out(self, even_if_congested: bool = False) -> None:
        self._is_write_due = False
        if not self._outbox or not self._can_write() or (self._congestion.is_set() and not even_if_congested):
            return
        joined = b"".join(self._outbox)
        self._outbox.clear()
        self._outbox_bytes = 0
        self._write(joined)

    def _send_now(self, command: bytes) -> None:
        if self._can_write():
            self.send_pending()
            self._write(command)

    def _can_write(self) -> bool:
        if not self.is_connected or self._transport is None:
            return False
        writer = self._writer()
        return writer is None or not writer.is_closing()

    def _writer(self) -> asyncio.StreamWriter | None:
        transport: object = self._transport
        return transport._io_writer if type(transport) is _Tcp else None  # `isinstance` is slow: its class is abstract

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)
        writer = self._writer()
        if writer is None or writer.transport.get_write_buffer_size() > _SOCKET_BYTES:
            self._congestion.set()

    async def _flusher(self) -> None:
        while True:
            await self._congestion.wait()
            assert self._transport is not None
            try:
                await cast("Any", self._transport).drain()
            except OSError as error:
                await self._process_op_err(error)
                return
            self._congestion.clear()
            self._write_out()

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        if cmd.startswith((b"PUB ", b"HPUB ")):
            self.enqueue(cmd)
        else:
            self._send_now(cmd)

    async def _flush_pending(self, force_flush: bool = False) -> None:
        self._write_out()

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        self._pongs.append(future if future is not None else self._loop.create_future())
        self._send_now(b"PING\r\n")

    async def _process_pong(self) -> None:
        self._pings_outstanding = 0
        if self._pongs:
            waiter = self._pongs.pop(0)
            if not waiter.done():
                waiter.set_result(True)

    async def _process_err(self, err_msg: str) -> None:
        if any(harmless in err_msg for harmless in _HARMLESS_ERRORS):
            denied = re.findall(r'subscription to "([^"]*)"', err_msg)
            self.denied.update(denied)
            for subject in re.findall(r'publish to "([^"]*)"', err_msg):
                self.refused = (self._loop.time(), subject)
            if not denied:  # else `subscribe` raises
                _log.warning("transport.refused", reason=err_msg.strip("'"))
            return
        await self._process_op_err(nats.errors.Error(err_msg.strip("'")))

    async def _read_loop(self) -> None:
        await super()._read_loop()
        task = asyncio.current_task()
        was_cancelled = task is None or task.cancelling() > 0
        if self.is_connected and not was_cancelled and task is self._reading_task:
            await self._process_op_err(nats.errors.ProtocolError())

    async def _attempt_reconnect(self) -> None:
        while True:
            try:
                await super()._attempt_reconnect()
                return
            except Exception as error:
                _log.warning("transport.reconnect_failed", reason=repr(error))
                await asyncio.sleep(self._pause_s())

    async def _select_next_server(self) -> None:
        while True:
            server = self._server_pool.pop(0)
            self._server_pool.append(server)
            if self._attempts:
                await asyncio.sleep(self._pause_s())
            self._attempts += 1
            try:
                await self._connect_to_server(server)
            except Exception:
                if self.fails_fast:
                    raise
                continue
            self._current_server = server
            return

    async def _connect_to_server(self, s: Srv) -> None:
        if self._transport is not None:
            cast("Any", self._transport).close()
        elif s.uri.scheme in ("nats", "tls"):
            self._transport = cast("Any", _Tcp)(self._handlers)
        else:
            self._transport = cast("Any", _WebSocket)(self._handlers, self.options["ws_connection_headers"])
        self._congestion.clear()
        await super()._connect_to_server(s)

    def _connect_command(self) -> bytes:
        if self.needs_tls and not self._server_info.get("tls_required"):
            raise nats.errors.SecureConnWantedError
        command = super()._connect_command()
        token = self.options["token"]
        if token is None or self.options["user"] is None:
            return command
        verb, _, said = command.partition(b" ")  # nats-py sends one or the other
        return b"%b %b\r\n" % (verb, json.dumps(json.loads(said) | {"auth_token": token}).encode())

    def _pause_s(self) -> float:
        pause_s: float = min(_RECONNECT_PAUSE_S * 2.0 ** min(self._attempts, 10), _RECONNECT_PAUSE_MAX_S)
        return pause_s * self._chance.uniform(0.5, 1.0)

    def has_connected(self) -> None:
        """The next loss begins with the shortest pause again."""
        self._attempts = 0
        self.connected.set()


class NatsTransport:
    """The connection of one process to a NATS server; made by `connect`. See `Transport` for what it promises."""

    def __init__(self, client: _Client, request_timeout_s: float) -> None:
        self._client = client
        self._request_timeout_s = request_timeout_s
        self._jetstream = client.jetstream(timeout=request_timeout_s)
        self._listeners: list[Callable[[bool], None]] = []
        self._enders: list[Callable[[], None]] = []
        self._prefixes: dict[str, bytes] = {}
        self._services: list[_Service] = []
        self._is_closing = False
        self._url = _shown(client._current_server.uri.geturl()) if client._current_server else ""

    @classmethod
    async def connect(
        cls,
        access: BrokerAccess,
        *,
        name: str,
        inbox: str = "",
        request_timeout_s: float = 5.0,
        ping_interval_s: float = _PING_INTERVAL_S,
        chance: random.Random | None = None,
    ) -> NatsTransport:
        """Connects to the first of the URLs that accepts us; takes 5 s at most.

        A connection over which the broker does not answer any more is replaced after 3 s, in time for a lease to be renewed.

        Args:
            access: URLs and credentials.
            name: how the broker's operator sees this connection.
            inbox: what the subjects begin with on which it is answered; those of all NATS clients if empty.
            request_timeout_s: bound of every operation that waits for an answer.
            ping_interval_s: pause between two questions whether the broker is there.
            chance: spreads reconnects of many processes over time.

        Raises:
            BrokerUnreachableError: no NATS server answers.
            BrokerAuthError: a server answers, and refuses the credentials; or they cannot be read.
        """
        if not access.urls:
            raise BrokerUnreachableError("no broker URL is given")
        failure: BrokerError | None = None
        deadline_s = asyncio.get_running_loop().time() + _CONNECT_TIMEOUT_S
        options: dict[str, Any] = {"name": name, "ping_interval": ping_interval_s}  # it sleeps for that long
        if inbox:
            options["inbox_prefix"] = inbox
        for url in access.urls:
            try:
                client = await _connected_client(access, url, options, deadline_s, chance or random.Random())
            except BrokerError as error:
                # A refusal says more than a silence.
                failure = error if failure is None or isinstance(error, BrokerAuthError) else failure
                continue
            return cls._of(client, access, request_timeout_s)
        assert failure is not None
        raise failure

    @classmethod
    def _of(cls, client: _Client, access: BrokerAccess, request_timeout_s: float) -> NatsTransport:
        transport = cls(client, request_timeout_s)
        known = {server.uri.netloc for server in client._server_pool}
        for url in access.urls:
            with contextlib.suppress(nats.errors.Error):
                uri = client._parse_server_uri(url)
                if uri.netloc not in known:
                    client._server_pool.append(Srv(uri))
        client._disconnected_cb = transport._on_loss
        client._reconnected_cb = transport._on_return
        client.has_connected()
        return transport

    @property
    def max_payload(self) -> int:
        """Bytes that one message may hold, headers included."""
        return int(self._client.max_payload)

    @property
    def is_connected(self) -> bool:
        """False between a loss and the reconnect, and after the end."""
        return self._client.connected.is_set() and not self._is_closing

    @property
    def url(self) -> str:
        """Where it is connected to, or was last, without secrets."""
        return self._url

    @property
    def dropped(self) -> int:
        """How many publications were given up because the broker was away for too long."""
        return self._client.dropped

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener(True)` after each reconnect and `listener(False)` after each loss, on the event loop."""
        self._listeners.append(listener)

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Hands a message over for sending; without effect after `aclose`.

        Raises:
            ValueTooLargeError: it is larger than `max_payload`.
            AddressError: the subject cannot be published to.
        """
        prefix = self._prefixes.get(subject) or self._prefix(subject)
        block = _encoded_headers(headers) if headers else b""
        size_bytes = len(data) + len(block)
        if size_bytes > self._client._max_payload:
            raise _too_large(subject, size_bytes, self.max_payload)
        if self._is_closing:
            return
        answer_to = b"%b " % _checked_subject(reply).encode() if reply else b""
        if block:
            sizes = b"%d %d\r\n" % (len(block), size_bytes)
            self._client.enqueue(b"".join((b"H", prefix, answer_to, sizes, block, data, b"\r\n")))
        else:
            self._client.enqueue(b"%b%b%d\r\n%b\r\n" % (prefix, answer_to, size_bytes, data))

    async def syncs(self) -> bool | None:
        """What the server's monitoring says, if it listens on its usual port; None if nothing, or another server, does."""
        server = self._client._current_server
        host = server.uri.hostname if server is not None else None
        if not host:
            return None
        try:
            told: Any = json.loads(await asyncio.to_thread(_monitoring, f"http://{_bracketed(host)}:{_MONITOR_PORT}/jsz"))
            if told["server_id"] != self._client._server_info["server_id"]:
                return None
            return bool(told["config"].get("sync_always"))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    async def flush(self) -> None:
        """Returns when the broker has seen everything published so far. Raises `BrokerError` if it does not answer."""

        async def ping() -> None:
            pong: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            await self._client._send_ping(pong)
            await pong

        await self.ask("flush", ping)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Delivers messages for `subject` to `handler`; with `queue`, to one member of it each.

        Raises:
            BrokerError: the broker does not answer; there is no subscription then.
            BrokerAuthError: we may not subscribe to it.
            AddressError: the subject cannot be subscribed to.
        """
        _checked_pattern(subject)
        if queue:
            _checked_subject(queue)
        self._check_open()
        sid = self._client.listen(subject, handler, queue)
        try:
            await self.flush()
        except BaseException:
            self._client.forget(sid)
            raise
        if subject.lower() in self._client.denied:
            self._client.denied.discard(subject.lower())
            self._client.forget(sid)
            raise BrokerAuthError(f"the broker does not allow us to subscribe to {subject!r}")
        return _Subscription(self._client, sid)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Delivered:
        """One request and its answer. Raises `BrokerError` for no responder or no answer."""
        _checked_subject(subject)
        self.check_size(subject, len(data))

        async def exchange() -> Delivered:
            try:
                answer = await self._client.request(subject, data, timeout=timeout_s)
            except nats.errors.NoRespondersError:
                raise BrokerError(f"nobody answers on {subject!r}") from None
            return Delivered(answer.subject, answer.data, answer.reply, answer.headers)

        return await self.ask(f"request to {subject!r}", exchange, timeout_s)

    async def key_value(self, bucket: str, *, ttl_s: float | None = None) -> KeyValue:
        """Opens a bucket, creating it where it does not exist; one that exists is used as it is, whatever its ttl."""
        _checked_bucket(bucket)

        async def make() -> None:
            await self._jetstream.create_key_value(config=api.KeyValueConfig(bucket=bucket, ttl=ttl_s, history=1))

        await self._open_stream(f"KV_{bucket}", make)
        return _KeyValue(self, bucket)

    async def work_queue(self, name: str, subjects: list[str]) -> WorkQueue:
        """Opens a durable queue over subject filters, creating it where it does not exist, adding filters it lacks."""
        _checked_bucket(name)
        for subject in subjects:
            _checked_pattern(subject)

        async def make() -> None:
            await self._jetstream.add_stream(
                name=name,
                subjects=subjects,
                retention=api.RetentionPolicy.WORK_QUEUE,
                storage=api.StorageType.FILE,
                allow_direct=True,
            )

        async def extend() -> None:
            config = (await self._jetstream.stream_info(name)).config
            if missing := [subject for subject in subjects if subject not in (config.subjects or [])]:
                await self._jetstream.update_stream(config, subjects=[*(config.subjects or []), *missing])

        await self._open_stream(name, make)
        await self.ask(f"queue {name!r}", extend)
        return _WorkQueue(self, name)

    async def ledger(
        self, name: str, subjects: list[str], *, max_age_s: float | None = None, per_subject: int | None = None
    ) -> Ledger:
        """Opens a ledger over subject filters, creating it where it does not exist; one that exists is used as it is."""
        _checked_bucket(name)
        for subject in subjects:
            _checked_pattern(subject)

        async def make() -> None:
            await self._jetstream.add_stream(
                name=name,
                subjects=subjects,
                retention=api.RetentionPolicy.LIMITS,
                storage=api.StorageType.FILE,
                max_age=max_age_s,
                max_msgs_per_subject=-1 if per_subject is None else per_subject,
                allow_direct=True,
            )

        await self._open_stream(name, make)
        return _Ledger(self, name)

    async def object_store(self, bucket: str, *, max_age_s: float | None = None) -> ObjectStore:
        """Opens an object store, creating it where it does not exist."""
        _checked_bucket(bucket)

        async def make() -> None:
            await self._jetstream.create_object_store(bucket, config=api.ObjectStoreConfig(ttl=max_age_s))

        await self._open_stream(f"OBJ_{bucket}", make)
        return _ObjectStore(self, bucket)

    async def serve(self, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str = "") -> Service:
        """Runs a service that the `nats micro` commands can list, inspect and call; requests are handled at once."""
        service = _Service(self, name, endpoints, version=version, description=description)
        self._services.append(service)
        try:
            await service.start()
        except BaseException:
            await service.stop()
            raise
        return service

    async def aclose(self) -> None:
        """Sends what is pending and closes; idempotent."""
        if self._is_closing:
            return
        for service in self._services:
            with contextlib.suppress(BrokerError):
                await service.stop()
        if self.is_connected:
            with contextlib.suppress(BrokerError):
                await self.flush()
        self._is_closing = True
        # Whoever waits for a connection learns that there will be none.
        self._client.connected.set()
        for ender in list(self._enders):
            ender()
        await _close(self._client)

    async def __aenter__(self) -> NatsTransport:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def is_closed(self) -> bool:
        """True from `aclose` on."""
        return self._is_closing

    @property
    def request_timeout_s(self) -> float:
        """Bound of every operation that waits for an answer."""
        return self._request_timeout_s

    @property
    def client(self) -> _Client:
        """nats-py's client, for the parts of this module."""
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        """nats-py's JetStream, for the parts of this module."""
        return self._jetstream

    def check_size(self, what: str, size_bytes: int) -> None:
        """Raises `ValueTooLargeError` for what no message can hold."""
        if size_bytes > self.max_payload:
            raise _too_large(what, size_bytes, self.max_payload)

    async def ask(self, doing: str, operation: Callable[[], Awaitable[_T]], timeout_s: float | None = None) -> _T:
        """Waits for a connection, then for `operation`, both within the time-out; gives its errors our names.

        The time-out begins anew if this process itself stood still: the answer may be here, and only unread.
        """
        self._check_open()
        limit_s = self._request_timeout_s if timeout_s is None else timeout_s
        began_s = asyncio.get_running_loop().time()
        try:
            async with _time_of_a_broker(limit_s):
                await self._client.connected.wait()
                self._check_open()
                return await operation()
        except TimeoutError:
            refused_s, subject = self._client.refused
            if refused_s >= began_s:
                advice = "`nalar permissions` prints what a process needs"
                raise BrokerAuthError(f"{doing}: the broker does not allow us to publish to {subject!r}; {advice}") from None
            raise BrokerError(f"{doing}: the broker at {self._url} did not answer within {limit_s:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise _named(doing, error) from error

    def _check_open(self) -> None:
        if self._is_closing:
            raise BrokerError("the connection to the broker has been closed")

    async def _open_stream(self, stream: str, make: Callable[[], Awaitable[None]]) -> None:
        async def look_or_make() -> None:
            try:
                await self._jetstream.stream_info(stream)
            except nats.js.errors.NotFoundError:
                with _tolerating(_STREAM_EXISTS):
                    await make()

        await self.ask(f"opening {stream!r}", look_or_make)

    def _prefix(self, subject: str) -> bytes:
        _checked_subject(subject)
        if len(self._prefixes) >= _CACHED_SUBJECTS:
            self._prefixes.clear()
        prefix = self._prefixes[subject] = f"PUB {subject} ".encode()
        return prefix

    async def _on_loss(self) -> None:
        if self._client.connected.is_set() and not self._is_closing:
            self._client.connected.clear()
            self._tell(False)

    async def _on_return(self) -> None:
        self._client.has_connected()
        if self._client._current_server is not None:
            self._url = _shown(self._client._current_server.uri.geturl())
        self._tell(True)

    def _tell(self, is_connected: bool) -> None:
        for listener in list(self._listeners):
            try:
                listener(is_connected)
            except Exception:
                _log.exception("transport.listener_failed")

    def on_end(self, listener: Callable[[], None]) -> None:
        """Calls `listener` when this connection is closed by us."""
        self._enders.append(listener)

    def forget(self, listener: Callable[[bool], None], ender: Callable[[], None]) -> None:
        """Undoes `on_connection` and `on_end`."""
        self._listeners.remove(listener)
        self._enders.remove(ender)


class _Subscription:
    """A handler at the client."""

    def __init__(self, client: _Client, sid: int) -> None:
        self._client = client
        self._sid = sid

    async def unsubscribe(self) -> None:
        self._client.forget(self._sid)


class _KeyValue:
    """A bucket: a stream that keeps the last message of each subject `$KV.bucket.key`."""

    def __init__(self, transport: NatsTransport, bucket: str) -> None:
        self._transport = transport
        self._bucket = bucket
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."

    async def get(self, key: str) -> KeyEntry | None:
        found = await self._last(key)
        return None if found is None or found.value is None else found

    async def create(self, key: str, value: bytes) -> int:
        try:
            return await self._write(key, value, last=0)
        except KeyConflictError:
            # What a deletion leaves behind counts as a revision, but not as a value.
            present = await self._last(key)
            if present is None or present.value is not None:
                raise
        return await self._write(key, value, last=present.revision)

    async def claim(self, key: str, value: bytes) -> KeyEntry | None:
        last = 0
        while True:
            try:
                await self._write(key, value, last=last)
            except KeyConflictError:
                present = await self._last(key)
                if present is not None and present.value is not None:
                    return present
                last = 0 if present is None else present.revision  # what a deletion leaves behind has no value
            else:
                return None

    async def put(self, key: str, value: bytes) -> int:
        return await self._write(key, value)

    async def update(self, key: str, value: bytes, last: int) -> int:
        return await self._write(key, value, last=last)

    async def delete(self, key: str, last: int | None = None) -> None:
        await self._write(key, b"", last=last, operation="DEL")

    async def entries(self) -> list[KeyEntry]:
        found: dict[str, KeyEntry] = {}
        watch = _Watch(self._transport, self._stream, self._prefix)
        async with contextlib.aclosing(watch.entries()) as entries:
            async for entry in entries:
                if entry is None:
                    break
                found[entry.key] = entry
        return list(found.values())

    async def watch(self) -> AsyncIterator[KeyEntry | None]:
        async with contextlib.aclosing(_Watch(self._transport, self._stream, self._prefix).entries()) as entries:
            async for entry in entries:
                yield entry

    async def _last(self, key: str) -> KeyEntry | None:
        subject = self._subject(key)

        async def read() -> KeyEntry | None:
            try:
                message = await self._transport.jetstream.get_msg(self._stream, subject=subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code == _NO_STREAM:
                    raise BrokerError(f"bucket {self._bucket!r} does not exist any more") from None
                return None
            return KeyEntry(key, _value_of(message.data or b"", message.headers), message.seq or 0)

        return await self._transport.ask(f"reading {key!r} of {self._bucket!r}", read)

    async def _write(self, key: str, value: bytes, *, last: int | None = None, operation: str = "") -> int:
        subject = self._subject(key)
        self._transport.check_size(f"key {key!r}", len(value))
        headers: dict[str, Any] = {}
        if operation:
            headers["KV-Operation"] = operation
        if last is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(last)

        async def publish() -> int:
            try:
                return (await self._transport.jetstream.publish(subject, value, headers=headers or None)).seq
            except nats.js.errors.APIError as error:
                if error.err_code in _WRONG_REVISION:
                    raise KeyConflictError(key) from None
                raise

        return await self._transport.ask(f"writing {key!r} of {self._bucket!r}", publish)

    def _subject(self, key: str) -> str:
        if _KEY.fullmatch(key) is None:
            raise AddressError(f"key {key[:140]!r} is not allowed")
        return self._prefix + key


class _Place(NamedTuple):
    """Where a message stands: in its stream, in the deliveries of its consumer, and how many are to follow."""

    in_stream: int
    in_consumer: int
    pending: int
    deliveries: int


class _Watch:
    """The present entries of a bucket and its changes, over ephemeral consumers that are replaced when one falls silent."""

    def __init__(self, transport: NatsTransport, stream: str, prefix: str) -> None:
        self._transport = transport
        self._stream = stream
        self._prefix = prefix
        self._arrived: asyncio.Queue[tuple[int, Delivered | None]] = asyncio.Queue()
        self._sid = 0
        self._consumer = ""
        self._seen = 0
        self._delivered = 0
        self._initial = 0

    async def entries(self) -> AsyncGenerator[KeyEntry | None, None]:
        self._transport.on_connection(self._on_connection)
        self._transport.on_end(self._wake)
        try:
            await self._open()
            is_complete = False
            while not self._transport.is_closed:
                if not is_complete and self._delivered >= self._initial:
                    is_complete = True
                    yield None
                message = await self._next()
                if message is None:
                    await self._reopen()
                    continue
                place = _place(message.reply)
                self._seen, self._delivered = place.in_stream, place.in_consumer
                if place.pending == 0:
                    self._initial = 0
                entry = KeyEntry(
                    message.subject[len(self._prefix) :], _value_of(message.data, message.headers), place.in_stream
                )
                if is_complete or entry.value is not None:
                    yield entry
        finally:
            self._transport.forget(self._on_connection, self._wake)
            self._close()

    async def _open(self) -> None:
        inbox = self._transport.client.new_inbox()
        self._delivered = 0
        self._sid = sid = self._transport.client.listen(inbox, lambda message: self._arrived.put_nowait((sid, message)))
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=api.AckPolicy.NONE,
            filter_subject=f"{self._prefix}>",
            idle_heartbeat=_WATCH_HEARTBEAT_S,
            inactive_threshold=_WATCH_SILENCE_S * 2,
            max_deliver=1,
            mem_storage=True,
            num_replicas=1,
        )
        if self._seen:
            config.deliver_policy = api.DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = self._seen + 1
        jetstream = self._transport.jetstream
        try:
            made = await self._transport.ask("watch", lambda: jetstream.add_consumer(self._stream, config))
        except BaseException:
            self._transport.client.forget(sid)
            raise
        self._consumer = made.name
        self._initial = (made.num_pending or 0) + (made.delivered.consumer_seq if made.delivered else 0)

    async def _next(self) -> Delivered | None:
        """The next entry in order, or None if one may have been missed."""
        while True:
            try:
                async with asyncio.timeout(_WATCH_SILENCE_S):
                    sid, message = await self._arrived.get()
            except TimeoutError:
                return None
            if sid != self._sid:
                continue
            if message is None:
                return None
            status = (message.headers or {}).get("Status")
            try:
                if status is None:
                    return message if _place(message.reply).in_consumer == self._delivered + 1 else None
                reached = (message.headers or {}).get("Nats-Last-Consumer", "0")
                if status != "100" or int(reached) > self._delivered:
                    return None
            except ValueError:
                _log.debug("watch.stray_message", stream=self._stream)  # the broker does not say such things

    async def _reopen(self) -> None:
        failures = 0
        while True:
            self._close()
            await self._transport.client.connected.wait()
            if self._transport.is_closed:
                return
            try:
                info = await self._transport.ask("watch", lambda: self._transport.jetstream.stream_info(self._stream))
                # A bucket that has been made again counts from 1 again.
                self._seen = self._seen if info.state.last_seq >= self._seen else 0
                await self._open()
                return
            except BrokerError:
                failures += 1
                if failures > _WATCH_RETRIES:
                    raise
                await asyncio.sleep(_RECONNECT_PAUSE_S * 2**failures)

    def _on_connection(self, is_connected: bool) -> None:
        if is_connected:
            self._wake()

    def _wake(self) -> None:
        self._arrived.put_nowait((self._sid, None))

    def _close(self) -> None:
        self._transport.client.forget(self._sid)
        consumer, self._consumer = self._consumer, ""
        if consumer and self._transport.is_connected:
            # The answer is of no interest: a consumer that nobody listens to ends by itself.
            self._transport.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}", b"")


class _WorkQueue:
    """A stream that keeps each message until it is acknowledged, with one durable consumer per subject filter."""

    def __init__(self, transport: NatsTransport, name: str) -> None:
        self._transport = transport
        self._name = name
        self._consumers: dict[tuple[str, float], str] = {}

    async def publish(
        self, subject: str, data: bytes, *, message_id: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bool]:
        _checked_subject(subject)
        self._transport.check_size(subject, len(data))
        sent: dict[str, Any] = dict(headers or {})
        if message_id:
            sent["Nats-Msg-Id"] = message_id

        async def put() -> tuple[int, bool]:
            try:
                receipt = await self._transport.jetstream.publish(subject, data, stream=self._name, headers=sent)
            except nats.js.errors.NoStreamResponseError:
                raise BrokerError(f"the queue {self._name!r} takes nothing on {subject!r}") from None
            return receipt.seq, bool(receipt.duplicate)

        return await self._transport.ask(f"publishing into {self._name!r}", put)

    async def pull(self, subject: str, *, batch: int, timeout_s: float, ack_wait_s: float) -> list[QueueMessage]:
        consumer = await self._consumer(subject, ack_wait_s)
        # What is there comes at once. Only if nothing is does the second request wait, for one message: of a larger batch
        # those that arrive after the first one would be in flight to nobody.
        taken = await self._fetch(consumer, batch, None)
        if not taken and timeout_s > 0:
            taken = await self._fetch(consumer, 1, timeout_s)
            if taken and batch > 1:
                taken += await self._fetch(consumer, batch - 1, None)
        return list(taken)

    async def depth(self) -> int:
        info = await self._transport.ask(f"depth of {self._name!r}", lambda: self._transport.jetstream.stream_info(self._name))
        return int(info.state.messages)

    async def subjects(self) -> dict[str, int]:
        return await _subjects_of(self._transport, self._name)

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        return await _read_stream(self._transport, self._name, subject, after, limit)

    async def holds(self, sequence: int) -> bool:
        async def look() -> bool:
            try:
                await self._transport.jetstream.get_msg(self._name, sequence)  # of the leader: others may not know it yet
            except nats.js.errors.NotFoundError as error:
                if error.err_code == _NO_STREAM:
                    raise BrokerError(f"{self._name!r} does not exist any more") from None
                return False
            return True

        return await self._transport.ask(f"looking for message {sequence} of {self._name!r}", look)

    async def remove(self, sequence: int) -> bool:
        return await _remove(self._transport, self._name, sequence)

    async def _consumer(self, subject: str, ack_wait_s: float) -> str:
        known = self._consumers.get((subject, ack_wait_s))
        if known is not None:
            return known
        _checked_pattern(subject)
        durable = _durable_name(subject)
        config = api.ConsumerConfig(
            durable_name=durable,
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
            max_ack_pending=-1,
        )
        await self._transport.ask(
            f"consumer of {subject!r}", lambda: self._transport.jetstream.add_consumer(self._name, config)
        )
        self._consumers[subject, ack_wait_s] = durable
        return durable

    async def _fetch(self, consumer: str, batch: int, wait_s: float | None) -> list[_QueueMessage]:
        client = self._transport.client
        taken: list[_QueueMessage] = []
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_message(message: Delivered) -> None:
            status = (message.headers or {}).get("Status")
            if status is None:
                taken.append(_QueueMessage(self._transport, message))
            if not ended.done() and (len(taken) >= batch or status not in (None, "100")):
                ended.set_result(status or "")

        def on_connection(is_connected: bool) -> None:
            if not is_connected and not ended.done():
                ended.set_result(_LOST)

        def on_end() -> None:
            on_connection(False)

        wanted: dict[str, int | bool] = {"batch": batch}
        wanted |= {"no_wait": True} if wait_s is None else {"expires": int(wait_s * 1e9)}
        inbox = client.new_inbox()
        sid = client.listen(inbox, on_message)

        async def exchange() -> str:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.{consumer}"
            self._transport.publish(subject, json.dumps(wanted).encode(), reply=inbox)
            client.send_pending()
            return await ended

        self._transport.on_connection(on_connection)
        self._transport.on_end(on_end)
        try:
            status = await self._transport.ask(f"pulling from {self._name!r}", exchange, self._patience_s(wait_s))
        except BrokerError:
            if not taken:
                raise
            status = ""
        except asyncio.CancelledError:
            for message in taken:
                message.give_back()
            raise
        finally:
            client.forget(sid)
            self._transport.forget(on_connection, on_end)
        if status == _LOST and not taken:
            raise BrokerError(f"pulling from {self._name!r}: the connection to the broker was lost")
        if status not in ("", "404", "408") and not taken:
            self._consumers.clear()
            raise BrokerError(f"pulling from {self._name!r}: the consumer is gone (status {status})")
        return taken

    def _patience_s(self, wait_s: float | None) -> float:
        return self._transport.request_timeout_s + (wait_s or 0.0)


class _QueueMessage:
    """A message of a work queue, in our hands."""

    def __init__(self, transport: NatsTransport, message: Delivered) -> None:
        self._transport = transport
        self._message = message
        self._place = _place(message.reply)

    @property
    def subject(self) -> str:
        return self._message.subject

    @property
    def data(self) -> bytes:
        return self._message.data

    @property
    def headers(self) -> Mapping[str, str]:
        return self._message.headers or {}

    @property
    def sequence(self) -> int:
        return self._place.in_stream

    @property
    def deliveries(self) -> int:
        return self._place.deliveries

    async def ack(self) -> None:
        await self._answer(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._answer(b"-NAK " + json.dumps({"delay": int(delay_s * 1e9)}).encode() if delay_s > 0 else b"-NAK")

    async def term(self, reason: str = "") -> None:
        await self._answer(f"+TERM {reason.translate(_LINE_BREAKS)}".rstrip().encode())

    async def in_progress(self) -> None:
        await self._answer(b"+WPI")

    def give_back(self) -> None:
        """`nak` without waiting for the broker."""
        self._transport.publish(self._message.reply, b"-NAK")

    async def _answer(self, verb: bytes) -> None:
        # As a request, so that it has happened when this returns.
        client = self._transport.client
        await self._transport.ask(
            f"answering message {self.sequence}",
            lambda: client.request(self._message.reply, verb, timeout=self._transport.request_timeout_s),
        )


class _Ledger:
    """A stream with limits."""

    def __init__(self, transport: NatsTransport, name: str) -> None:
        self._transport = transport
        self._name = name

    async def append(
        self, subject: str, data: bytes, *, last: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        _checked_subject(subject)
        sent: dict[str, Any] = dict(headers or {})
        if last is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(last)
        self._transport.check_size(subject, len(data) + (len(_encoded_headers(sent)) if sent else 0))

        async def publish() -> int:
            try:
                return (await self._transport.jetstream.publish(subject, data, stream=self._name, headers=sent or None)).seq
            except nats.js.errors.NoStreamResponseError:
                raise BrokerError(f"{self._name!r} keeps nothing on {subject!r}") from None
            except nats.js.errors.APIError as error:
                if error.err_code in _WRONG_REVISION:
                    raise KeyConflictError(subject) from None
                raise

        return await self._transport.ask(f"appending to {self._name!r}", publish)

    async def last(self, subject: str) -> Kept | None:
        _checked_subject(subject)

        async def read() -> Kept | None:
            try:
                found = await self._transport.jetstream.get_msg(self._name, subject=subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code == _NO_STREAM:
                    raise BrokerError(f"{self._name!r} does not exist any more") from None
                return None
            return Kept(subject, found.data or b"", found.seq or 0, _own_headers(found.headers or {}))

        return await self._transport.ask(f"reading {subject!r}", read)

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        return await _read_stream(self._transport, self._name, subject, after, limit)

    async def remove(self, sequence: int) -> bool:
        return await _remove(self._transport, self._name, sequence)

    async def subjects(self) -> dict[str, int]:
        return await _subjects_of(self._transport, self._name)

    async def purge(self, subject: str, *, below: int | None = None) -> None:
        _checked_pattern(subject)

        if below is not None and below <= 1:
            return  # there is nothing, and the broker takes 0 for "all of them"

        async def remove() -> None:
            await self._transport.jetstream.purge_stream(self._name, seq=below, subject=subject)

        await self._transport.ask(f"purging {subject!r}", remove)


async def _remove(transport: NatsTransport, stream: str, sequence: int) -> bool:
    """Removes one message; False if it is not there."""

    async def delete() -> bool:
        try:
            return await _delete(transport.jetstream, stream, sequence)
        except nats.js.errors.APIError as error:
            if error.err_code in _NO_MESSAGE:
                return False
            raise

    return await transport.ask(f"removing from {stream!r}", delete)


async def _delete(jetstream: JetStreamContext, stream: str, sequence: int) -> bool:
    """Without overwriting the bytes on disk, as `delete_msg` has it done, which costs the broker more than all the rest."""
    request = json.dumps({"seq": sequence, "no_erase": True}).encode()
    answer = await jetstream._api_request(f"{jetstream._prefix}.STREAM.MSG.DELETE.{stream}", request)
    return bool(answer["success"])


async def _subjects_of(transport: NatsTransport, stream: str) -> dict[str, int]:
    async def count() -> dict[str, int]:
        return (await transport.jetstream.stream_info(stream, subjects_filter=">")).state.subjects or {}

    return await transport.ask(f"subjects of {stream!r}", count)


async def _read_stream(
    transport: NatsTransport, stream: str, subject: str, after: int, limit: int, timeout_s: float | None = None
) -> list[Kept]:
    """Messages of a stream in one exchange: a batched direct get (ADR-31), whose answers end with a status."""
    _checked_pattern(subject)
    found: list[Kept] = []
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_message(message: Delivered) -> None:
        headers = dict(message.headers or {})
        status = headers.get("Status")
        if status is not None:
            if not ended.done():
                ended.set_result(status)
            return
        found.append(Kept(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), _own_headers(headers)))

    wanted = {"seq": after + 1, "next_by_subj": subject, "batch": limit, "max_bytes": _READ_BYTES}
    inbox = transport.client.new_inbox()
    sid = transport.client.listen(inbox, on_message)

    async def exchange() -> str:
        transport.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(wanted).encode(), reply=inbox)
        transport.client.send_pending()
        return await ended

    try:
        status = await transport.ask(f"reading {stream!r}", exchange, timeout_s)
    finally:
        transport.client.forget(sid)
    if status not in ("204", "404"):
        raise BrokerError(f"reading {stream!r}: the broker answers with status {status}")
    return found


def _meta_token(name: str) -> str:
    """Where the description of an object lies, under the subjects of its bucket."""
    return f"M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a publisher gave for its readers, without those that were for the broker."""
    return {name: value for name, value in headers.items() if not name.startswith("Nats-") or name == "Nats-Msg-Id"}


class _Object(NamedTuple):
    """An object of a bucket: its description, and the number of the message that holds it."""

    info: api.ObjectInfo
    sequence: int


class _ObjectStore:
    """An object store of JetStream, as other NATS clients know it.

    nats-py waits for each piece of an object to be acknowledged before it sends the next one, waits a quarter of a second now
    and then while it reads, and leaves a mark for each object that it deletes; so objects are written, read and removed here.

    An object counts from the moment its description is there, and its pieces outlive that. So a description is written after
    the pieces and only in place of the one that was there before, and removed before them.
    """

    def __init__(self, transport: NatsTransport, bucket: str) -> None:
        self._transport = transport
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"

    async def put(self, name: str, data: bytes) -> None:
        async def write() -> None:
            digest = await asyncio.to_thread(_object_digest, data)
            while not await self._replace(name, digest, data):
                pass

        await self._transport.ask(f"storing object {name!r}", write, self._patience_s(len(data)))

    async def _replace(self, name: str, digest: str, data: bytes) -> bool:
        """False if somebody else has written the object meanwhile."""
        former = await self._find(name)
        if former is not None and former.info.digest == digest:
            return True
        id = os.urandom(16).hex()
        try:
            pieces = await self._write(id, data)
            info = api.ObjectInfo(
                name=name,
                bucket=self._bucket,
                nuid=id,
                size=len(data),
                chunks=pieces,
                digest=digest,
                mtime=datetime.now(UTC).isoformat(),
                options=api.ObjectMetaOptions(max_chunk_size=self._piece_bytes),
            )
            is_written = await self._describe(info, 0 if former is None else former.sequence)
        except BaseException:
            with contextlib.suppress(Exception):
                await self._purge(f"C.{id}")
            raise
        if not is_written:
            await self._purge(f"C.{id}")
        elif former is not None:
            await self._purge(f"C.{former.info.nuid}")
        return is_written

    async def _write(self, id: str, data: bytes) -> int:
        """Writes the pieces of an object and returns their number."""
        subject, view, jetstream = f"$O.{self._bucket}.C.{id}", memoryview(data), self._transport.jetstream
        starts = range(0, len(data), self._piece_bytes)
        acks: deque[asyncio.Task[api.PubAck]] = deque()
        try:
            for start in starts:
                piece = bytes(view[start : start + self._piece_bytes])
                acks.append(asyncio.ensure_future(jetstream.publish(subject, piece)))
                if len(acks) >= _OBJECT_PIECES:
                    await acks.popleft()
            while acks:
                await acks.popleft()
        finally:
            await cancel_all(acks)
            for ack in acks:
                if not ack.cancelled():
                    ack.exception()  # one of them is raised already: nobody asks for the others
        return len(starts)

    async def _describe(self, info: api.ObjectInfo, last: int) -> bool:
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(last)}
        text = json.dumps(info.as_dict()).encode()
        try:
            await self._transport.jetstream.publish(f"$O.{self._bucket}.{_meta_token(info.name)}", text, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_REVISION:
                return False
            raise
        return True

    async def _find(self, name: str) -> _Object | None:
        try:
            found = await self._transport.jetstream.get_msg(self._stream, subject=f"$O.{self._bucket}.{_meta_token(name)}")
        except nats.js.errors.NotFoundError:
            return None
        try:
            info = api.ObjectInfo.from_response(json.loads(found.data or b""))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ObjectDamagedError(f"the description of object {name!r} cannot be read") from None
        return None if info.deleted else _Object(info, found.seq or 0)

    async def _purge(self, subject: str) -> None:
        await self._transport.jetstream.purge_stream(self._stream, subject=f"$O.{self._bucket}.{subject}")

    async def get(self, name: str) -> bytes | None:
        found = await self._transport.ask(f"finding object {name!r}", lambda: self._find(name))
        if found is None:
            return None
        data = b"".join(await self._pieces(found.info))
        if len(data) != found.info.size or await asyncio.to_thread(_object_digest, data) != found.info.digest:
            raise ObjectDamagedError(f"object {name!r} does not match its checksum")
        return data

    async def _pieces(self, info: api.ObjectInfo) -> list[bytes]:
        pieces: list[bytes] = []
        subject, after, left_bytes = f"$O.{self._bucket}.C.{info.nuid}", 0, info.size or 0
        while left_bytes > 0:
            patience_s = self._patience_s(_READ_BYTES)
            page = await _read_stream(self._transport, self._stream, subject, after, _OBJECT_BATCH, patience_s)
            if not page:
                break
            pieces.extend(kept.data for kept in page)
            left_bytes -= sum(len(kept.data) for kept in page)
            after = page[-1].sequence
        return pieces

    async def names(self) -> list[str]:
        prefix = f"$O.{self._bucket}.M."

        async def look() -> list[str]:
            found = await self._transport.jetstream.stream_info(self._stream, subjects_filter=f"{prefix}>")
            return sorted(found.state.subjects or {})

        subjects = await self._transport.ask(f"names of {self._bucket!r}", look)
        return [base64.urlsafe_b64decode(subject.removeprefix(prefix)).decode("utf-8", "replace") for subject in subjects]

    async def delete(self, name: str) -> None:
        async def remove() -> None:
            found = await self._find(name)
            if found is not None:
                await self._purge(_meta_token(name))
                await self._purge(f"C.{found.info.nuid}")

        await self._transport.ask(f"deleting object {name!r}", remove)

    @property
    def _piece_bytes(self) -> int:
        return min(_OBJECT_PIECE_BYTES, self._transport.max_payload)

    def _patience_s(self, size_bytes: int) -> float:
        return self._transport.request_timeout_s + size_bytes / _OBJECT_BYTES_PER_S


def _object_digest(data: bytes) -> str:
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()}"


class _Service:
    """Endpoints, and the answers to discovery that the `nats micro` commands ask for (ADR-32)."""

    def __init__(
        self, transport: NatsTransport, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str
    ) -> None:
        self._transport = transport
        self._identity: dict[str, Any] = {
            "name": name,
            "id": transport.client._nuid.next().decode(),
            "version": version,
            "metadata": {},
        }
        self._description = description
        self._endpoints = [_Endpoint(endpoint) for endpoint in endpoints]
        self._roots = {endpoint.subject.partition(".")[0] for endpoint in endpoints}
        self._started = datetime.now(UTC)
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        subscribe = self._transport.subscribe
        opening = [subscribe(one.subject, self._on_request(one), queue="q") for one in self._endpoints]
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            scopes = ("", f".{self._identity['name']}", f".{self._identity['name']}.{self._identity['id']}")
            opening.extend(subscribe(f"$SRV.{verb}{scope}", self._on_discovery(describe)) for scope in scopes)
        self._subscriptions.extend(await asyncio.gather(*opening))

    async def stop(self, patience_s: float | None = None) -> None:
        while self._subscriptions:
            await self._subscriptions.pop().unsubscribe()
        if self._tasks:
            limit_s = self._transport.request_timeout_s if patience_s is None else patience_s
            _, late = await asyncio.wait(self._tasks, timeout=limit_s)
            await cancel_all(late)

    def _on_request(self, endpoint: _Endpoint) -> Handler:
        def answer(message: Delivered) -> None:
            task = asyncio.create_task(self._answer(endpoint, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return answer

    async def _answer(self, endpoint: _Endpoint, message: Delivered) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        data, headers = await endpoint.handle(message)
        endpoint.busy_s += loop.time() - begun_s
        if not self._may_answer(message.reply):
            return
        try:
            self._transport.publish(message.reply, data, headers=headers)
        except ValueTooLargeError as error:
            self._transport.publish(message.reply, b"", headers=endpoint.failed(error))

    def _on_discovery(self, describe: Callable[[], dict[str, Any]]) -> Handler:
        def answer(message: Delivered) -> None:
            if self._may_answer(message.reply):
                self._transport.publish(message.reply, json.dumps(describe()).encode())

        return answer

    def _may_answer(self, reply: str) -> bool:
        """An answer leaves under our name: it goes to no subject that means something to the broker or to our own kind."""
        return bool(reply) and not reply.startswith("$") and reply.partition(".")[0] not in self._roots

    def _ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response", **self._identity}

    def _info(self) -> dict[str, Any]:
        endpoints = [endpoint.described() for endpoint in self._endpoints]
        return {
            "type": "io.nats.micro.v1.info_response",
            **self._identity,
            "description": self._description,
            "endpoints": endpoints,
        }

    def _stats(self) -> dict[str, Any]:
        started = self._started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        endpoints = [endpoint.stats() for endpoint in self._endpoints]
        return {"type": "io.nats.micro.v1.stats_response", **self._identity, "started": started, "endpoints": endpoints}


class _Endpoint:
    """One subject of a service and its counters."""

    def __init__(self, endpoint: ServiceEndpoint) -> None:
        self.subject = endpoint.subject
        self.busy_s = 0.0
        self._endpoint = endpoint
        self._requests = 0
        self._errors = 0
        self._last_error = ""

    async def handle(self, message: Delivered) -> tuple[bytes, dict[str, str] | None]:
        """The answer to a request: its bytes, and the headers of a failure."""
        self._requests += 1
        try:
            request = ServiceRequest(message.subject, message.data, message.headers or {})
            return await self._endpoint.handler(request), None
        except Exception as error:
            return b"", self.failed(error)

    def failed(self, error: Exception) -> dict[str, str]:
        """Counts a failure; returns the headers that tell of it."""
        code, text = (error.code, error.description) if isinstance(error, ServiceFailure) else (500, str(error) or repr(error))
        self._errors += 1
        self._last_error = f"{code}:{text}"
        return {"Nats-Service-Error": text, "Nats-Service-Error-Code": str(code)}

    def described(self) -> dict[str, Any]:
        return {
            "name": self._endpoint.name,
            "subject": self.subject,
            "queue_group": "q",
            "metadata": dict(self._endpoint.metadata),
        }

    def stats(self) -> dict[str, Any]:
        busy_ns = int(self.busy_s * 1e9)
        return {
            "name": self._endpoint.name,
            "subject": self.subject,
            "queue_group": "q",
            "num_requests": self._requests,
            "num_errors": self._errors,
            "last_error": self._last_error,
            "processing_time": busy_ns,
            "average_processing_time": busy_ns // max(self._requests, 1),
        }


async def _connected_client(
    access: BrokerAccess, url: str, wanted: Mapping[str, Any], deadline_s: float, chance: random.Random
) -> _Client:
    client = _Client(chance)
    options = {**_credentials(access), **wanted}
    client.needs_tls = "tls" in options or url.startswith(("tls://", "wss://"))
    try:
        async with asyncio.timeout_at(deadline_s):
            await client.connect(
                [url],
                error_cb=_ignore_error,
                allow_reconnect=False,
                connect_timeout=_ATTEMPT_TIMEOUT_S,
                max_outstanding_pings=_PINGS_OUTSTANDING,
                max_reconnect_attempts=-1,
                dont_randomize=True,
                **options,
            )
    except BaseException as error:
        client.abort()
        await _close(client)
        if not isinstance(error, Exception):
            raise
        raise _connect_error(url, error, access) from error
    client.fails_fast = False
    client.options["allow_reconnect"] = True
    return client


def _monitoring(url: str) -> bytes:
    """What the broker's monitoring answers; proxies are not asked.

    Raises:
        OSError: it does not answer, or not by HTTP.
    """
    import urllib.request  # loads as much as a small program: only those who ask pay for it
    from http.client import HTTPException

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_MONITOR_TIMEOUT_S) as answer:
            return bytes(answer.read(_MONITOR_BYTES))
    except HTTPException as error:
        raise OSError(f"{url}: {error!r}") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _ignore_error(_error: Exception) -> None:
    """What matters of nats-py's errors shows in the state of the connection."""


def _credentials(access: BrokerAccess) -> dict[str, Any]:
    for path in (access.creds_file, access.nkey_seed_file, access.tls_ca_file, access.tls_cert_file, access.tls_key_file):
        if path and not os.access(path, os.R_OK):
            raise BrokerAuthError(f"{path} cannot be read: credentials for the broker were expected there")
    options: dict[str, Any] = {
        "token": access.token or None,
        "user": access.user or None,
        "password": access.password or None,
        "user_credentials": access.creds_file or None,
        "nkeys_seed": access.nkey_seed_file or None,
    }
    if access.tls_ca_file or access.tls_cert_file:
        try:
            context = ssl.create_default_context(cafile=access.tls_ca_file or None)
            if access.tls_cert_file:
                context.load_cert_chain(access.tls_cert_file, access.tls_key_file or None)
        except (OSError, ValueError) as error:
            raise BrokerAuthError(f"the TLS files for the broker cannot be used: {error}") from error
        options["tls"] = context
    return {option: value for option, value in options.items() if value is not None}


@contextlib.asynccontextmanager
async def _time_of_a_broker(limit_s: float) -> AsyncGenerator[None]:
    """A time-out that does not count the time in which this process itself stood still."""
    loop = asyncio.get_running_loop()
    due = loop.time() + limit_s
    async with asyncio.timeout(None) as timeout:

        def on_due() -> None:
            now = loop.time()
            timeout.reschedule(now + limit_s if now - due > _STOOD_STILL_S else now)

        timer = loop.call_at(due, on_due)
        try:
            yield
        finally:
            timer.cancel()


async def _close(client: _Client) -> None:
    try:
        async with asyncio.timeout(_ATTEMPT_TIMEOUT_S):
            await client.close()
    except Exception:
        client.abort()
    if client._reconnection_task is not None:
        await cancel_all([client._reconnection_task])


def _connect_error(url: str, error: Exception, access: BrokerAccess) -> BrokerError:
    where = _shown(url)
    text = str(error).removeprefix("nats: ").strip("'\" ")
    if "authorization" in text.lower() or "authentication" in text.lower():
        return BrokerAuthError(f"the broker at {where} refuses {_refused(access, url)}")
    if isinstance(error, ImportError):
        return BrokerAuthError(f"these credentials or this kind of URL need another package: {error}")
    if access.creds_file and not isinstance(error, (OSError, nats.errors.Error)):
        return BrokerAuthError(f"{access.creds_file} holds no credentials of NATS")
    if access.nkey_seed_file and not isinstance(error, (OSError, nats.errors.Error)):
        return BrokerAuthError(f"{access.nkey_seed_file} holds no seed of an nkey")
    if isinstance(error, ssl.SSLError):
        return BrokerUnreachableError(f"TLS with the broker at {where} fails: {error.reason or text}", where)
    if isinstance(error, nats.errors.SecureConnWantedError):
        return BrokerUnreachableError(f"the broker at {where} does not speak TLS, which was asked for", where)
    if "INFO" in text or isinstance(error, (TimeoutError, nats.errors.ProtocolError)):
        return BrokerUnreachableError(f"no NATS server answers at {where}", where)
    if ("invalid" in text and "url" in text) or isinstance(error, ValueError):
        return BrokerUnreachableError(f"{where!r} is not the URL of a broker: write it as nats://host:4222", where)
    return BrokerUnreachableError(f"no broker can be reached at {where}: {text or repr(error)}", where)


def _refused(access: BrokerAccess, url: str) -> str:
    if access.token and access.user:
        return (
            f"the credentials given: either `nalar up` has been started anew, and .nalar/runtime.json has the present ones, or "
            f"another client has the name {access.user!r}"
        )
    is_given = access.token or access.user or access.creds_file or access.nkey_seed_file or "@" in url
    if is_given:
        return "the credentials given"
    return (
        "a connection without credentials: those of `nalar up` are in .nalar/runtime.json beside its app; "
        "name the app by --app, or run this in its folder"
    )


def _shown(url: str) -> str:
    """`url` without user, password and token."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _named(doing: str, error: Exception) -> BrokerError:
    """An error of nats-py as one of ours."""
    code = getattr(error, "err_code", None)
    if code in _NO_ROOM or _DISK_FULL in str(error):
        text = "give JetStream more storage, or remove data; restart a server whose disk was full"
        return BrokerFullError(f"{doing}: the broker has no room for it ({error}): {text}")
    if isinstance(error, nats.js.errors.NoStreamResponseError | nats.js.errors.ServiceUnavailableError) or (
        code in _NO_JETSTREAM
    ):
        return BrokerFeatureError(f"{doing}: JetStream does not answer: enable it at the broker (`nats-server --jetstream`)")
    return BrokerError(f"{doing}: {str(error).removeprefix('nats: ') or repr(error)}")


@contextlib.contextmanager
def _tolerating(err_code: int) -> Generator[None, None, None]:
    try:
        yield
    except nats.js.errors.APIError as error:
        if error.err_code != err_code:
            raise


def _too_large(what: str, size_bytes: int, limit_bytes: int) -> ValueTooLargeError:
    return ValueTooLargeError(
        f"{what}: {size_bytes} bytes are more than the {limit_bytes} that one message may hold",
        size_bytes=size_bytes,
        limit_bytes=limit_bytes,
    )


def _checked_subject(subject: str) -> str:
    if _SUBJECT.fullmatch(subject) is None:
        raise AddressError(f"subject {subject[:140]!r} is not allowed")
    return subject


def _checked_pattern(subject: str) -> str:
    tokens = _checked_subject(subject).split(".")
    if ">" in tokens[:-1]:
        raise AddressError(f"subject {subject[:140]!r} is not allowed: '>' can only be its last token")
    return subject


def _checked_bucket(name: str) -> str:
    if _BUCKET.fullmatch(name) is None:
        raise AddressError(f"bucket or queue {name[:140]!r} is not allowed: A-Z, a-z, 0-9, '_' and '-' are")
    return name


def _encoded_headers(headers: Mapping[str, str]) -> bytes:
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if _HEADER_NAME.fullmatch(name) is None:
            raise AddressError(f"header {name[:140]!r} is not allowed")
        lines.append(f"{name}: {value.translate(_LINE_BREAKS).strip()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _value_of(data: bytes, headers: Mapping[str, str] | None) -> bytes | None:
    """The value of a bucket's message, or None if it marks that there is none.

    A copy from another stream has been put there by the broker, for somebody who may not have the right to: it has no value
    that anybody could read, and whoever has that right writes over it.
    """
    if headers and "Nats-Subject" in headers:
        return b""
    if headers and ("KV-Operation" in headers or "Nats-Marker-Reason" in headers):
        return None
    return data


def _place(reply: str) -> _Place:
    """Reads `$JS.ACK.[domain.account.]stream.consumer.deliveries.in_stream.in_consumer.time.pending[.token]`."""
    tokens = reply.split(".")
    first = 4 if len(tokens) == 9 else 6
    deliveries, in_stream, in_consumer, _, pending = (int(token) for token in tokens[first : first + 5])
    return _Place(in_stream, in_consumer, pending, deliveries)


def _durable_name(subject: str) -> str:
    """A consumer's name for a subject filter: legible, and different for different filters."""
    legible = re.sub(r"[^A-Za-z0-9_-]+", "-", subject)[:40].strip("-")
    return f"{legible}-{hashlib.blake2b(subject.encode(), digest_size=6).hexdigest()}"
