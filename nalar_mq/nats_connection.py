"""One connection to a NATS server: publish, subscribe and request, and one way to ask the broker for anything else.

What JetStream keeps, and services, are built on this (`nats_transport`). Whatever waits for an answer goes through `ask`: it
waits for a connection, is bounded, and raises only errors of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final, Self, TypeVar

from nalar_mq.config import BrokerAccess
from nalar_mq.disk import want_of_room
from nalar_mq.errors import (
    AddressError,
    BrokerAuthError,
    BrokerError,
    BrokerTimeoutError,
    BrokerUnreachableError,
    ValueTooLargeError,
)
from nalar_mq.logs import logger
from nalar_mq.nats_client import NatsClient, close, connected_client
from nalar_mq.nats_errors import checked_pattern, checked_subject, named, shown
from nalar_mq.stand_in import loaded_when_used
from nalar_mq.transport import Delivered, Handler, Subscription

with loaded_when_used("aiohttp"):
    import nats.errors
    from nats.aio.client import Srv
    from nats.js import JetStreamContext

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_log = logger(__name__)
_T = TypeVar("_T")

_CONNECT_TIMEOUT_S: Final = 5.0
_PING_INTERVAL_S: Final = 1.0
_STOOD_STILL_S: Final = 0.5
_CACHED_SUBJECTS: Final = 4096
_MONITOR_PORT: Final = 8222
_MONITOR_TIMEOUT_S: Final = 1.0
_MONITOR_BYTES: Final = 1024 * 1024
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
LINE_BREAKS: Final = str.maketrans({"\r": " ", "\n": " "})


class NatsConnection:
    """The connection of one process to a NATS server; made by `connect`."""

    def __init__(self, client: NatsClient, request_timeout_s: float) -> None:
        self._client = client
        self._request_timeout_s = request_timeout_s
        self._jetstream = client.jetstream(timeout=request_timeout_s)
        self._listeners: list[Callable[[bool], None]] = []
        self._enders: list[Callable[[], None]] = []
        self._prefixes: dict[str, bytes] = {}
        self._is_closing = False
        self._data_dir = ""
        self._url = shown(client._current_server.uri.geturl()) if client._current_server else ""

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
    ) -> Self:
        """Connects to the first of the URLs that accepts us; takes 5 s at most, of which each URL has its share.

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
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _CONNECT_TIMEOUT_S
        options: dict[str, Any] = {"name": name, "ping_interval": ping_interval_s}  # it sleeps for that long
        if inbox:
            options["inbox_prefix"] = inbox
        for tried, url in enumerate(access.urls):
            share_s = (deadline_s - loop.time()) / (len(access.urls) - tried)
            try:
                client = await connected_client(access, url, options, share_s, chance or random.Random())
            except BrokerError as error:
                # A refusal says more than a silence.
                failure = error if failure is None or isinstance(error, BrokerAuthError) else failure
                continue
            return cls._of(client, access, request_timeout_s)
        assert failure is not None
        raise failure

    @classmethod
    def _of(cls, client: NatsClient, access: BrokerAccess, request_timeout_s: float) -> Self:
        transport = cls(client, request_timeout_s)
        transport._data_dir = access.data_dir
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
        block = encoded_headers(headers) if headers else b""
        size_bytes = len(data) + len(block)
        if size_bytes > self._client._max_payload:
            raise _too_large(subject, size_bytes, self.max_payload)
        if self._is_closing:
            return
        answer_to = b"%b " % checked_subject(reply).encode() if reply else b""
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
        checked_pattern(subject)
        if queue:
            checked_subject(queue)
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
        checked_subject(subject)
        self.check_size(subject, len(data))

        async def exchange() -> Delivered:
            try:
                answer = await self._client.request(subject, data, timeout=timeout_s)
            except nats.errors.NoRespondersError:
                raise BrokerError(f"nobody answers on {subject!r}") from None
            return Delivered(answer.subject, answer.data, answer.reply, answer.headers)

        return await self.ask(f"request to {subject!r}", exchange, timeout_s)

    async def aclose(self) -> None:
        """Sends what is pending and closes; idempotent."""
        if self._is_closing:
            return
        if self.is_connected:
            with contextlib.suppress(BrokerError):
                await self.flush()
        self._is_closing = True
        # Whoever waits for a connection learns that there will be none.
        self._client.connected.set()
        for ender in list(self._enders):
            ender()
        await close(self._client)

    async def __aenter__(self) -> Self:
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
    def client(self) -> NatsClient:
        """nats-py's client, for what is built on this connection."""
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        """nats-py's JetStream, for what is built on this connection."""
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
            raise BrokerTimeoutError(self._silence(doing, limit_s)) from None
        except (nats.errors.Error, OSError) as error:
            raise named(doing, error) from error

    def _silence(self, doing: str, limit_s: float) -> str:
        """What is said when no answer has come in time; a full disk keeps a server from answering what would write."""
        text = f"{doing}: the broker at {self._url} did not answer within {limit_s:g} s"
        want = want_of_room(self._data_dir) if self._data_dir else ""
        return f"{text}: {want}" if want else text

    def _check_open(self) -> None:
        if self._is_closing:
            raise BrokerError("the connection to the broker has been closed")

    def _prefix(self, subject: str) -> bytes:
        checked_subject(subject)
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
            self._url = shown(self._client._current_server.uri.geturl())
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

    def __init__(self, client: NatsClient, sid: int) -> None:
        self._client = client
        self._sid = sid

    async def unsubscribe(self) -> None:
        self._client.forget(self._sid)


def encoded_headers(headers: Mapping[str, str]) -> bytes:
    """Headers as they stand in a message. Raises `AddressError` for a name that no header can have."""
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if _HEADER_NAME.fullmatch(name) is None:
            raise AddressError(f"header {name[:140]!r} is not allowed")
        lines.append(f"{name}: {value.translate(LINE_BREAKS).strip()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


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


def _monitoring(url: str) -> bytes:
    """What the broker's monitoring answers; proxies are not asked.

    Raises:
        OSError: it does not answer, or not by HTTP.
    """
    # They load as much as a small program: only those who ask pay for it. From the module itself: while another thread loads
    # it, its package may not have it yet.
    from http.client import HTTPException
    from urllib.request import ProxyHandler, build_opener

    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(url, timeout=_MONITOR_TIMEOUT_S) as answer:
            return bytes(answer.read(_MONITOR_BYTES))
    except HTTPException as error:
        raise OSError(f"{url}: {error!r}") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _too_large(what: str, size_bytes: int, limit_bytes: int) -> ValueTooLargeError:
    return ValueTooLargeError(
        f"{what}: {size_bytes} bytes are more than the {limit_bytes} that one message may hold",
        size_bytes=size_bytes,
        limit_bytes=limit_bytes,
    )
