"""What a stream of JetStream is to us: a work queue, whose messages go when they are acknowledged, or a ledger with limits.

A work queue has one durable consumer for each subject filter that somebody pulls from; a ledger has none. Both, and object
stores, are read by batched direct gets (ADR-31): one exchange for many messages. Buckets and object stores are streams as well
and are opened by what stands here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, Final, NamedTuple

from nalar_mq.errors import BrokerError, KeyConflictError
from nalar_mq.nats_connection import LINE_BREAKS, NatsConnection, encoded_headers
from nalar_mq.nats_errors import NO_STREAM, WRONG_REVISION, checked_bucket, checked_pattern, checked_subject
from nalar_mq.stand_in import loaded_when_used
from nalar_mq.transport import Delivered, Kept, Ledger, QueueMessage, WorkQueue

with loaded_when_used("aiohttp"):
    import nats.js.errors
    from nats.js import JetStreamContext, api

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_READS: Final = 5  # of a page of which answers were lost
READ_BYTES: Final = 8 * 1024 * 1024  # that one exchange reads
_STREAM_EXISTS: Final = 10058
_NO_MESSAGE: Final = (10037, 10043, 10057)
_LOST: Final = "lost"


async def open_work_queue(connection: NatsConnection, name: str, subjects: list[str]) -> WorkQueue:
    """Opens a durable queue over subject filters, creating it where it does not exist, adding filters it lacks."""
    checked_bucket(name)
    for subject in subjects:
        checked_pattern(subject)

    async def make() -> None:
        await connection.jetstream.add_stream(
            name=name,
            subjects=subjects,
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType.FILE,
            allow_direct=True,
        )

    async def extend() -> None:
        config = (await connection.jetstream.stream_info(name)).config
        if missing := [subject for subject in subjects if subject not in (config.subjects or [])]:
            await connection.jetstream.update_stream(config, subjects=[*(config.subjects or []), *missing])

    await open_stream(connection, name, make)
    await connection.ask(f"queue {name!r}", extend)
    return _WorkQueue(connection, name)


async def open_ledger(
    connection: NatsConnection, name: str, subjects: list[str], max_age_s: float | None, per_subject: int | None
) -> Ledger:
    """Opens a ledger over subject filters, creating it where it does not exist; one that exists is used as it is."""
    checked_bucket(name)
    for subject in subjects:
        checked_pattern(subject)

    async def make() -> None:
        await connection.jetstream.add_stream(
            name=name,
            subjects=subjects,
            retention=api.RetentionPolicy.LIMITS,
            storage=api.StorageType.FILE,
            max_age=max_age_s,
            max_msgs_per_subject=-1 if per_subject is None else per_subject,
            allow_direct=True,
        )

    await open_stream(connection, name, make)
    return _Ledger(connection, name)


async def open_stream(connection: NatsConnection, stream: str, make: Callable[[], Awaitable[None]]) -> None:
    """Has `make` make a stream that does not exist."""

    async def look_or_make() -> None:
        try:
            await connection.jetstream.stream_info(stream)
        except nats.js.errors.NotFoundError:
            with _tolerating(_STREAM_EXISTS):
                await make()

    await connection.ask(f"opening {stream!r}", look_or_make)


@contextlib.contextmanager
def _tolerating(err_code: int) -> Generator[None, None, None]:
    try:
        yield
    except nats.js.errors.APIError as error:
        if error.err_code != err_code:
            raise


class _WorkQueue:
    """A stream that keeps each message until it is acknowledged, with one durable consumer per subject filter."""

    def __init__(self, connection: NatsConnection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._consumers: dict[tuple[str, float], str] = {}

    async def publish(
        self, subject: str, data: bytes, *, message_id: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bool]:
        checked_subject(subject)
        self._connection.check_size(subject, len(data))
        sent: dict[str, Any] = dict(headers or {})
        if message_id:
            sent["Nats-Msg-Id"] = message_id

        async def put() -> tuple[int, bool]:
            try:
                receipt = await self._connection.jetstream.publish(subject, data, stream=self._name, headers=sent)
            except nats.js.errors.NoStreamResponseError:
                raise BrokerError(f"the queue {self._name!r} takes nothing on {subject!r}") from None
            return receipt.seq, bool(receipt.duplicate)

        return await self._connection.ask(f"publishing into {self._name!r}", put)

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
        info = await self._connection.ask(
            f"depth of {self._name!r}", lambda: self._connection.jetstream.stream_info(self._name)
        )
        return int(info.state.messages)

    async def subjects(self) -> dict[str, int]:
        return await _subjects_of(self._connection, self._name)

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        return await read_stream(self._connection, self._name, subject, after, limit)

    async def holds(self, sequence: int) -> bool:
        async def look() -> bool:
            try:
                await self._connection.jetstream.get_msg(self._name, sequence)  # of the leader: others may not know it yet
            except nats.js.errors.NotFoundError as error:
                if error.err_code == NO_STREAM:
                    raise BrokerError(f"{self._name!r} does not exist any more") from None
                return False
            return True

        return await self._connection.ask(f"looking for message {sequence} of {self._name!r}", look)

    async def remove(self, sequence: int) -> bool:
        return await _remove(self._connection, self._name, sequence)

    async def _consumer(self, subject: str, ack_wait_s: float) -> str:
        known = self._consumers.get((subject, ack_wait_s))
        if known is not None:
            return known
        checked_pattern(subject)
        durable = _durable_name(subject)
        config = api.ConsumerConfig(
            durable_name=durable,
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
            max_ack_pending=-1,
        )
        await self._connection.ask(
            f"consumer of {subject!r}", lambda: self._connection.jetstream.add_consumer(self._name, config)
        )
        self._consumers[subject, ack_wait_s] = durable
        return durable

    async def _fetch(self, consumer: str, batch: int, wait_s: float | None) -> list[_QueueMessage]:
        client = self._connection.client
        taken: list[_QueueMessage] = []
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_message(message: Delivered) -> None:
            status = (message.headers or {}).get("Status")
            if status is None:
                taken.append(_QueueMessage(self._connection, message))
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
            self._connection.publish(subject, json.dumps(wanted).encode(), reply=inbox)
            client.send_pending()
            return await ended

        self._connection.on_connection(on_connection)
        self._connection.on_end(on_end)
        try:
            status = await self._connection.ask(f"pulling from {self._name!r}", exchange, self._patience_s(wait_s))
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
            self._connection.forget(on_connection, on_end)
        if status == _LOST and not taken:
            raise BrokerError(f"pulling from {self._name!r}: the connection to the broker was lost")
        if status not in ("", "404", "408") and not taken:
            self._consumers.clear()
            raise BrokerError(f"pulling from {self._name!r}: the consumer is gone (status {status})")
        return taken

    def _patience_s(self, wait_s: float | None) -> float:
        return self._connection.request_timeout_s + (wait_s or 0.0)


class _QueueMessage:
    """A message of a work queue, in our hands."""

    def __init__(self, connection: NatsConnection, message: Delivered) -> None:
        self._connection = connection
        self._message = message
        self._place = place_of(message.reply)

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
        await self._answer(f"+TERM {reason.translate(LINE_BREAKS)}".rstrip().encode())

    async def in_progress(self) -> None:
        await self._answer(b"+WPI")

    def give_back(self) -> None:
        """`nak` without waiting for the broker."""
        self._connection.publish(self._message.reply, b"-NAK")

    async def _answer(self, verb: bytes) -> None:
        # As a request, so that it has happened when this returns.
        client = self._connection.client
        await self._connection.ask(
            f"answering message {self.sequence}",
            lambda: client.request(self._message.reply, verb, timeout=self._connection.request_timeout_s),
        )


class _Ledger:
    """A stream with limits."""

    def __init__(self, connection: NatsConnection, name: str) -> None:
        self._connection = connection
        self._name = name

    async def append(
        self, subject: str, data: bytes, *, last: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        checked_subject(subject)
        sent: dict[str, Any] = dict(headers or {})
        if last is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(last)
        self._connection.check_size(subject, len(data) + (len(encoded_headers(sent)) if sent else 0))

        async def publish() -> int:
            try:
                return (await self._connection.jetstream.publish(subject, data, stream=self._name, headers=sent or None)).seq
            except nats.js.errors.NoStreamResponseError:
                raise BrokerError(f"{self._name!r} keeps nothing on {subject!r}") from None
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    raise KeyConflictError(subject) from None
                raise

        return await self._connection.ask(f"appending to {self._name!r}", publish)

    async def last(self, subject: str) -> Kept | None:
        checked_subject(subject)

        async def read() -> Kept | None:
            try:
                found = await self._connection.jetstream.get_msg(self._name, subject=subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code == NO_STREAM:
                    raise BrokerError(f"{self._name!r} does not exist any more") from None
                return None
            return Kept(subject, found.data or b"", found.seq or 0, _own_headers(found.headers or {}))

        return await self._connection.ask(f"reading {subject!r}", read)

    async def read(self, subject: str, *, after: int = 0, limit: int = 256) -> list[Kept]:
        return await read_stream(self._connection, self._name, subject, after, limit)

    async def remove(self, sequence: int) -> bool:
        return await _remove(self._connection, self._name, sequence)

    async def subjects(self) -> dict[str, int]:
        return await _subjects_of(self._connection, self._name)

    async def purge(self, subject: str, *, below: int | None = None) -> None:
        checked_pattern(subject)

        if below is not None and below <= 1:
            return  # there is nothing, and the broker takes 0 for "all of them"

        async def remove() -> None:
            await self._connection.jetstream.purge_stream(self._name, seq=below, subject=subject)

        await self._connection.ask(f"purging {subject!r}", remove)


async def _remove(connection: NatsConnection, stream: str, sequence: int) -> bool:
    """Removes one message; False if it is not there."""

    async def delete() -> bool:
        try:
            return await _delete(connection.jetstream, stream, sequence)
        except nats.js.errors.APIError as error:
            if error.err_code in _NO_MESSAGE:
                return False
            raise

    return await connection.ask(f"removing from {stream!r}", delete)


async def _delete(jetstream: JetStreamContext, stream: str, sequence: int) -> bool:
    """Without overwriting the bytes on disk, as `delete_msg` has it done, which costs the broker more than all the rest."""
    request = json.dumps({"seq": sequence, "no_erase": True}).encode()
    answer = await jetstream._api_request(f"{jetstream._prefix}.STREAM.MSG.DELETE.{stream}", request)
    return bool(answer["success"])


async def _subjects_of(connection: NatsConnection, stream: str) -> dict[str, int]:
    async def count() -> dict[str, int]:
        return (await connection.jetstream.stream_info(stream, subjects_filter=">")).state.subjects or {}

    return await connection.ask(f"subjects of {stream!r}", count)


async def read_stream(
    connection: NatsConnection, stream: str, subject: str, after: int, limit: int, timeout_s: float | None = None
) -> list[Kept]:
    """Messages of a stream in one exchange: a batched direct get (ADR-31), whose answers end with a status.

    The broker may answer in part over a connection that is gone and in part over the next one. Each answer bears the number of
    the one before it: where one is missing, all are asked for again.
    """
    checked_pattern(subject)
    for _ in range(_READS):
        found = await _read_once(connection, stream, subject, after, limit, timeout_s)
        if found is not None:
            return found
    raise BrokerError(f"reading {stream!r}: answers of the broker were lost {_READS} times")


async def _read_once(
    connection: NatsConnection, stream: str, subject: str, after: int, limit: int, timeout_s: float | None
) -> list[Kept] | None:
    """None if answers are missing."""
    found: list[Kept] = []
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    last, is_whole = 0, True

    def on_message(message: Delivered) -> None:
        nonlocal last, is_whole
        headers = dict(message.headers or {})
        status = headers.get("Status")
        if status is None or status == "204":
            is_whole = is_whole and int(headers.get("Nats-Last-Sequence", last)) == last
        if status is None:
            last = int(headers["Nats-Sequence"])
            found.append(Kept(headers["Nats-Subject"], message.data, last, _own_headers(headers)))
        elif not ended.done():
            ended.set_result(status)

    wanted = {"seq": after + 1, "next_by_subj": subject, "batch": limit, "max_bytes": READ_BYTES}
    inbox = connection.client.new_inbox()
    sid = connection.client.listen(inbox, on_message)

    async def exchange() -> str:
        connection.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(wanted).encode(), reply=inbox)
        connection.client.send_pending()
        return await ended

    try:
        status = await connection.ask(f"reading {stream!r}", exchange, timeout_s)
    finally:
        connection.client.forget(sid)
    if status not in ("204", "404"):
        raise BrokerError(f"reading {stream!r}: the broker answers with status {status}")
    return found if is_whole else None


def _own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that a publisher gave for its readers, without those that were for the broker."""
    return {name: value for name, value in headers.items() if not name.startswith("Nats-") or name == "Nats-Msg-Id"}


class Place(NamedTuple):
    """Where a message stands: in its stream, in the deliveries of its consumer, and how many are to follow."""

    in_stream: int
    in_consumer: int
    pending: int
    deliveries: int


def place_of(reply: str) -> Place:
    """Reads `$JS.ACK.[domain.account.]stream.consumer.deliveries.in_stream.in_consumer.time.pending[.token]`."""
    tokens = reply.split(".")
    first = 4 if len(tokens) == 9 else 6
    deliveries, in_stream, in_consumer, _, pending = (int(token) for token in tokens[first : first + 5])
    return Place(in_stream, in_consumer, pending, deliveries)


def _durable_name(subject: str) -> str:
    """A consumer's name for a subject filter: legible, and different for different filters."""
    legible = re.sub(r"[^A-Za-z0-9_-]+", "-", subject)[:40].strip("-")
    return f"{legible}-{hashlib.blake2b(subject.encode(), digest_size=6).hexdigest()}"
