"""nats-py's client for connecting, reconnecting, TLS and requests, with a data path of our own in it.

The data path. `enqueue` appends a command to the outbox; one callback per loop turn joins the outbox into one write. What
arrives for a handler of ours goes from the socket straight into it (`nats_reader`), and nats-py reads the rest. Everything
that leaves goes through the same outbox, so that a ping, and the pong that answers it, cannot overtake a message published
before it.

    enqueue ─► outbox ─► (once per loop turn) ─► socket        connected
                  │                                            socket full: waits until it has drained
                  └─► kept, bounded, oldest dropped            away: sent after the reconnect

Of the commands only publications wait for a reconnect. Subscriptions are replayed from nats-py's table, pings and pongs
belong to one connection.

Where nats-py would leave a connection dead (an error reply of the server, an exception while reading, a late pong), this
module reconnects. It reconnects for ever; the first connect fails fast and typed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import ParseResult

from nalar_mq.config import BrokerAccess
from nalar_mq.errors import BrokerAuthError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.nats_errors import connect_error
from nalar_mq.nats_reader import Sorter
from nalar_mq.stand_in import loaded_when_used
from nalar_mq.transport import Handler

with loaded_when_used("aiohttp"):  # nats-py imports it for web sockets, and doubles what an import of it takes
    import nats.errors
    from nats.aio.client import Client, Srv
    from nats.aio.subscription import Subscription
    from nats.aio.transport import TcpTransport, WebSocketTransport

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_log = logger(__name__)

_ATTEMPT_TIMEOUT_S: Final = 2
_PINGS_OUTSTANDING: Final = 2
_RECONNECT_PAUSE_S: Final = 0.05
_RECONNECT_PAUSE_MAX_S: Final = 1.0
_OUTBOX_BYTES: Final = 32 * 1024 * 1024
_SOCKET_BYTES: Final = 1024 * 1024

# Complaints after which the server keeps the connection open.
_HARMLESS_ERRORS: Final = (
    "permissions violation",
    "invalid subject",
    "invalid publish subject",
    "invalid subscription",
    "maximum subscriptions exceeded",
)


class _SortingReader(asyncio.StreamReader):
    """A stream in which only those bytes arrive that the sorter gives back."""

    def __init__(self, sort: Callable[[bytes], bytes], limit: int) -> None:
        super().__init__(limit, asyncio.get_running_loop())
        self._sort = sort

    def feed_data(self, data: Any) -> None:
        """Called with what comes from the socket."""
        others = self._sort(data)
        if others:
            super().feed_data(others)


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
        reader = _SortingReader(Sorter(self._handlers).sort, buffer_size)
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout):
            transport, _ = await loop.create_connection(lambda: protocol, uri.hostname or "", uri.port or 0)
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def readline(self) -> bytes:
        """What nats-py reads while it connects. A server that takes its time to let somebody in asks meanwhile whether he is
        there; nats-py takes the question for the end of that, and then neither sends nor fails.
        """
        read: Callable[[], Awaitable[bytes]] = cast("Any", super()).readline
        while (line := await read()) == b"PING\r\n":
            cast("Any", self).write(b"PONG\r\n")
        return line

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


class NatsClient(Client):
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
        subscription = Subscription(self, self._sid, subject, queue=queue)
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


async def connected_client(
    access: BrokerAccess, url: str, wanted: Mapping[str, Any], within_s: float, chance: random.Random
) -> NatsClient:
    """A client that has connected to `url` and reconnects from now on; `wanted` are options of nats-py.

    A broker that is busy may take all the time there is to let it in, the first time; later there are many attempts.

    Raises:
        BrokerUnreachableError: no NATS server answers.
        BrokerAuthError: a server answers, and refuses the credentials; or they cannot be read.
    """
    client = NatsClient(chance)
    options = {**_credentials(access), **wanted}
    client.needs_tls = "tls" in options or url.startswith(("tls://", "wss://"))
    try:
        async with asyncio.timeout(within_s):
            await client.connect(
                [url],
                error_cb=_ignore_error,
                allow_reconnect=False,
                connect_timeout=math.ceil(within_s),
                max_outstanding_pings=_PINGS_OUTSTANDING,
                max_reconnect_attempts=-1,
                dont_randomize=True,
                **options,
            )
    except BaseException as error:
        client.abort()
        await close(client)
        if not isinstance(error, Exception):
            raise
        raise connect_error(url, error, access) from error
    client.fails_fast = False
    client.options |= {"allow_reconnect": True, "connect_timeout": _ATTEMPT_TIMEOUT_S}
    return client


async def close(client: NatsClient) -> None:
    """Closes a client, by force if it takes too long."""
    try:
        async with asyncio.timeout(_ATTEMPT_TIMEOUT_S):
            await client.close()
    except Exception:
        client.abort()
    if client._reconnection_task is not None:
        await cancel_all([client._reconnection_task])


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
