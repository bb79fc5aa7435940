"""The seam to the outside world: what the runtime needs of a message system, and nothing more.

Two implementations pass one contract suite: `nats_transport.NatsTransport` and `memory_transport.MemoryTransport`.

Everything here is called from the event loop of the connection. What a caller may rely on:

* `publish` is at most once, never blocks and never raises for a broker that is away: what is published meanwhile is kept up
  to a bound and then dropped, oldest first; order holds per publisher and subject. The channel makes up for the rest.
* Handlers are plain functions called on the event loop, one message at a time per subscription, in order. An exception in
  a handler is logged and harms nobody else.
* Subscriptions outlive reconnects.
* Key-value, queue and object operations answer or raise `BrokerError`; they never hang longer than the transport's own
  request time-out (objects: and the time their size takes). A broker that is away is waited for within that time.
* An operation that raised for want of an answer may have happened all the same.
* After `aclose`, `publish` does nothing, watches end, and every other operation raises `BrokerError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec


class Delivered(msgspec.Struct, frozen=True):
    """One message as a handler sees it: `reply` is the subject to answer to, or empty."""

    subject: str
    data: bytes
    reply: str = ""
    headers: Mapping[str, str] | None = None


def is_direct(message: Delivered, prefix: str) -> bool:
    """True if whoever published `message` may publish to the subject that it bears, which begins with `prefix`.

    JetStream also publishes on behalf of others, with its own right to publish anywhere: what a consumer delivers bears the
    subject it had in the stream, and a reply subject; a copy of what a stream holds bears headers. The messages that processes
    tell each other have neither.
    """
    return not message.reply and message.headers is None and message.subject.startswith(prefix)


Handler = Callable[[Delivered], None]


class Subscription(Protocol):
    """A live subscription."""

    async def unsubscribe(self) -> None:
        """Ends it; idempotent. No handler call begins after it returns."""
        ...


class KeyEntry(msgspec.Struct, frozen=True):
    """A key's present value; `value` is None for a key that was deleted or expired (in watches only)."""

    key: str
    value: bytes | None
    revision: int


class KeyValue(Protocol):
    """One bucket. Revisions grow with every write to the bucket."""

    async def get(self, key: str) -> KeyEntry | None:
        """The present entry, or None for a key that is absent, deleted or expired."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Writes a key that must not exist; returns its revision. Raises `KeyConflictError` if it does."""
        ...

    async def claim(self, key: str, value: bytes) -> KeyEntry | None:
        """Writes a key that has no value, and returns None; else what it has."""
        ...

    async def put(self, key: str, value: bytes) -> int:
        """Writes a key whatever it holds; returns its revision."""
        ...

    async def update(self, key: str, value: bytes, last: int) -> int:
        """Writes a key whose revision is `last`; returns the new one. Raises `KeyConflictError` if it is not."""
        ...

    async def delete(self, key: str, last: int | None = None) -> None:
        """Removes a key, if its revision is `last` where given. Raises `KeyConflictError` if it is not."""
        ...

    async def entries(self) -> list[KeyEntry]:
        """All present entries."""
        ...

    def watch(self) -> AsyncIterator[KeyEntry | None]:
        """Present entries, then None once, then every change until the iterator is closed.

        It outlives losses of the broker; of several changes to a key meanwhile the last is reported. Expiry may go
        unreported.
        """
        ...


class QueueMessage(Protocol):
    """A message taken from a work queue; nobody else gets it until it is returned or its time runs out."""

    @property
    def subject(self) -> str:
        """What it was published to."""
        ...

    @property
    def data(self) -> bytes:
        """What was published."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers it was published with, and `Nats-Msg-Id` if it has an id."""
        ...

    @property
    def sequence(self) -> int:
        """Its number in the queue."""
        ...

    @property
    def deliveries(self) -> int:
        """How often it has been delivered, this time included."""
        ...

    async def ack(self) -> None:
        """Done: it leaves the queue."""
        ...

    async def nak(self, delay_s: float = 0.0) -> None:
        """Back into the queue, to be delivered again after `delay_s`."""
        ...

    async def term(self, reason: str = "") -> None:
        """Never deliver it again."""
        ...

    async def in_progress(self) -> None:
        """Still working: its time starts anew."""
        ...


class Kept(msgspec.Struct, frozen=True):
    """A message that a queue or a ledger holds; `sequence` is its number there."""

    subject: str
    data: bytes
    sequence: int
    headers: Mapping[str, str] = {}


class WorkQueue(Protocol):
    """A durable queue: what `publish` returned from is kept until somebody acknowledges it."""

    async def publish(
        self, subject: str, data: bytes, *, message_id: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bool]:
        """Returns the sequence, and True if `message_id` was there already (then nothing was added)."""
        ...

    async def pull(self, subject: str, *, batch: int, timeout_s: float, ack_wait_s: float) -> list[QueueMessage]:
        """Up to `batch` messages for a subject filter, as soon as there are any; an empty list after `timeout_s`."""
        ...

    async def depth(self) -> int:
        """How many messages it holds."""
        ...

    async def subjects(self) -> dict[str, int]:
        """How many messages it holds by subject, those in somebody's hands included."""
        ...

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        """Messages for a subject filter as they lie there, nobody's turn being taken; otherwise as `Ledger.read`."""
        ...

    async def holds(self, sequence: int) -> bool:
        """True while the message of that number has not been acknowledged or removed, in somebody's hands or not."""
        ...

    async def remove(self, sequence: int) -> bool:
        """Removes a message, which nobody is given any more; False if it is not there. Who has it in hand is not told."""
        ...


class Ledger(Protocol):
    """Durable messages by subject, kept for a time. Who subscribes to their subjects gets what is appended live, too."""

    async def append(
        self, subject: str, data: bytes, *, last: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        """Adds a message and returns its sequence; it is durable then.

        Args:
            subject: one of the ledger's.
            data: what to keep.
            last: add it only if the newest message of the subject has this sequence, 0 meaning that there is none.
            headers: kept with it.

        Raises:
            KeyConflictError: the newest message of the subject is another one than `last`.
        """
        ...

    async def last(self, subject: str) -> Kept | None:
        """The newest message of a subject, or None."""
        ...

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        """The oldest messages for a subject filter with a sequence above `after`, in order.

        At most `limit`, fewer if they are large; an empty list means that there are no more.
        """
        ...

    async def subjects(self) -> dict[str, int]:
        """How many messages it holds by subject."""
        ...

    async def remove(self, sequence: int) -> bool:
        """Removes one message, without a trace; False if it is not there any more."""
        ...

    async def purge(self, subject: str, *, below: int | None = None) -> None:
        """Removes all messages for a subject filter, or those whose sequence is lower than `below`."""
        ...


class ObjectStore(Protocol):
    """Values too large for a message."""

    async def put(self, name: str, data: bytes) -> None:
        """Stores the bytes under `name`, in place of what was there.

        Raises:
            BrokerFullError: there is no room for them.
        """
        ...

    async def names(self) -> list[str]:
        """The names of all objects."""
        ...

    async def get(self, name: str) -> bytes | None:
        """The bytes, checked against their digest; None if absent.

        Raises:
            ObjectDamagedError: they do not match it.
        """
        ...

    async def delete(self, name: str) -> None:
        """Removes `name`, without a trace; idempotent."""
        ...


class ServiceRequest(msgspec.Struct, frozen=True):
    """A request to a service endpoint."""

    subject: str
    data: bytes
    headers: Mapping[str, str]


class ServiceFailure(Exception):
    """Raised by a service handler to answer with an error: `code` as in HTTP, `description` for people."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.code = code
        self.description = description


class ServiceEndpoint(msgspec.Struct, frozen=True):
    """One subject of a service; `name` is a token."""

    name: str
    subject: str
    handler: Callable[[ServiceRequest], Awaitable[bytes]]
    metadata: Mapping[str, str] = {}


class Service(Protocol):
    """A running service that answers discovery."""

    async def stop(self, patience_s: float | None = None) -> None:
        """Takes no more requests and lets those that run finish, for `patience_s` or a request's time-out; idempotent."""
        ...


class Transport(Protocol):
    """A connection of one process to the broker."""

    @property
    def max_payload(self) -> int:
        """Bytes that one message may hold."""
        ...

    @property
    def is_connected(self) -> bool:
        """False between a loss and the reconnect, and after `aclose`."""
        ...

    @property
    def url(self) -> str:
        """Where it is connected to, without secrets."""
        ...

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener(True)` after each reconnect and `listener(False)` after each loss, on the event loop."""
        ...

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Hands a message over for sending.

        Raises:
            ValueTooLargeError: it is larger than `max_payload`, headers included.
        """
        ...

    async def syncs(self) -> bool | None:
        """True if the broker syncs to disk before it acknowledges, None if it does not let us know."""
        ...

    async def flush(self) -> None:
        """Returns when the broker has seen everything published so far. Raises `BrokerError` if it does not answer."""
        ...

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Delivers messages for `subject` (wildcards allowed) to `handler`; with `queue`, to one member of it each.

        When it returns, the broker knows of the subscription.
        """
        ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Delivered:
        """One request and its answer; not for the path of calls. Raises `BrokerError` for no responder or no answer."""
        ...

    async def key_value(self, bucket: str, *, ttl_s: float | None = None) -> KeyValue:
        """Opens a bucket, creating it where it does not exist; entries expire `ttl_s` after their last write."""
        ...

    async def work_queue(self, name: str, subjects: list[str]) -> WorkQueue:
        """Opens a durable queue over subject filters, creating it where it does not exist."""
        ...

    async def ledger(
        self, name: str, subjects: list[str], *, max_age_s: float | None = None, per_subject: int | None = None
    ) -> Ledger:
        """Opens a ledger over subject filters, creating it where it does not exist; one that exists is used as it is.

        Args:
            name: a token.
            subjects: filters of what it keeps.
            max_age_s: messages older than this go.
            per_subject: of each subject only that many messages stay, the newest ones.
        """
        ...

    async def object_store(self, bucket: str, *, max_age_s: float | None = None) -> ObjectStore:
        """Opens an object store, creating it where it does not exist; one that exists is used as it is.

        Args:
            bucket: a token.
            max_age_s: objects older than this go.
        """
        ...

    async def serve(self, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str = "") -> Service:
        """Runs a service that the `nats micro` commands can list, inspect and call."""
        ...

    async def aclose(self) -> None:
        """Sends what is pending and closes; idempotent."""
        ...
