"""Key/value buckets over NATS: compare-and-set by revision, and watches that miss nothing.

A bucket is a stream that keeps the last message of each subject `$KV.bucket.key`; a revision is the number of a message in it.
A watch reads it through a consumer that the broker forgets with us. Heartbeats tell of a consumer that has ended, and the
numbers of its deliveries of one that has left something out: then another goes on behind what was seen last.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Final

from nalar_mq.errors import AddressError, BrokerError, KeyConflictError
from nalar_mq.logs import logger
from nalar_mq.nats_connection import NatsConnection
from nalar_mq.nats_errors import NO_STREAM, WRONG_REVISION, checked_bucket
from nalar_mq.nats_streams import open_stream, place_of
from nalar_mq.stand_in import loaded_when_used
from nalar_mq.transport import Delivered, KeyEntry, KeyValue

with loaded_when_used("aiohttp"):
    import nats.js.errors
    from nats.js import api

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_log = logger(__name__)

_WATCH_HEARTBEAT_S: Final = 5.0
_WATCH_SILENCE_S: Final = 12.0
_WATCH_RETRIES: Final = 8
_WATCH_PAUSE_S: Final = 0.05
_KEY = re.compile(r"[-/_=A-Za-z0-9]+(\.[-/_=A-Za-z0-9]+)*")


async def open_bucket(connection: NatsConnection, bucket: str, ttl_s: float | None) -> KeyValue:
    """Opens a bucket, creating it where it does not exist; one that exists is used as it is, whatever its ttl."""
    checked_bucket(bucket)

    async def make() -> None:
        await connection.jetstream.create_key_value(config=api.KeyValueConfig(bucket=bucket, ttl=ttl_s, history=1))

    await open_stream(connection, f"KV_{bucket}", make)
    return _KeyValue(connection, bucket)


class _KeyValue:
    """A bucket: a stream that keeps the last message of each subject `$KV.bucket.key`."""

    def __init__(self, connection: NatsConnection, bucket: str) -> None:
        self._connection = connection
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
        watch = _Watch(self._connection, self._stream, self._prefix)
        async with contextlib.aclosing(watch.entries()) as entries:
            async for entry in entries:
                if entry is None:
                    break
                found[entry.key] = entry
        return list(found.values())

    async def watch(self) -> AsyncIterator[KeyEntry | None]:
        async with contextlib.aclosing(_Watch(self._connection, self._stream, self._prefix).entries()) as entries:
            async for entry in entries:
                yield entry

    async def _last(self, key: str) -> KeyEntry | None:
        subject = self._subject(key)

        async def read() -> KeyEntry | None:
            try:
                message = await self._connection.jetstream.get_msg(self._stream, subject=subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code == NO_STREAM:
                    raise BrokerError(f"bucket {self._bucket!r} does not exist any more") from None
                return None
            return KeyEntry(key, _value_of(message.data or b"", message.headers), message.seq or 0)

        return await self._connection.ask(f"reading {key!r} of {self._bucket!r}", read)

    async def _write(self, key: str, value: bytes, *, last: int | None = None, operation: str = "") -> int:
        subject = self._subject(key)
        self._connection.check_size(f"key {key!r}", len(value))
        headers: dict[str, Any] = {}
        if operation:
            headers["KV-Operation"] = operation
        if last is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(last)

        async def publish() -> int:
            try:
                return (await self._connection.jetstream.publish(subject, value, headers=headers or None)).seq
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    raise KeyConflictError(key) from None
                raise

        return await self._connection.ask(f"writing {key!r} of {self._bucket!r}", publish)

    def _subject(self, key: str) -> str:
        if _KEY.fullmatch(key) is None:
            raise AddressError(f"key {key[:140]!r} is not allowed")
        return self._prefix + key


class _Watch:
    """The present entries of a bucket and its changes, over ephemeral consumers that are replaced when one falls silent."""

    def __init__(self, connection: NatsConnection, stream: str, prefix: str) -> None:
        self._connection = connection
        self._stream = stream
        self._prefix = prefix
        self._arrived: asyncio.Queue[tuple[int, Delivered | None]] = asyncio.Queue()
        self._sid = 0
        self._consumer = ""
        self._seen = 0
        self._delivered = 0
        self._initial = 0

    async def entries(self) -> AsyncGenerator[KeyEntry | None, None]:
        self._connection.on_connection(self._on_connection)
        self._connection.on_end(self._wake)
        try:
            await self._open()
            is_complete = False
            while not self._connection.is_closed:
                if not is_complete and self._delivered >= self._initial:
                    is_complete = True
                    yield None
                message = await self._next()
                if message is None:
                    await self._reopen()
                    continue
                place = place_of(message.reply)
                self._seen, self._delivered = place.in_stream, place.in_consumer
                if place.pending == 0:
                    self._initial = 0
                entry = KeyEntry(
                    message.subject[len(self._prefix) :], _value_of(message.data, message.headers), place.in_stream
                )
                if is_complete or entry.value is not None:
                    yield entry
        finally:
            self._connection.forget(self._on_connection, self._wake)
            self._close()

    async def _open(self) -> None:
        inbox = self._connection.client.new_inbox()
        self._delivered = 0
        self._sid = sid = self._connection.client.listen(inbox, lambda message: self._arrived.put_nowait((sid, message)))
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
        jetstream = self._connection.jetstream
        try:
            made = await self._connection.ask("watch", lambda: jetstream.add_consumer(self._stream, config))
        except BaseException:
            self._connection.client.forget(sid)
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
                    return message if place_of(message.reply).in_consumer == self._delivered + 1 else None
                reached = (message.headers or {}).get("Nats-Last-Consumer", "0")
                if status != "100" or int(reached) > self._delivered:
                    return None
            except ValueError:
                _log.debug("watch.stray_message", stream=self._stream)  # the broker does not say such things

    async def _reopen(self) -> None:
        failures = 0
        while True:
            self._close()
            await self._connection.client.connected.wait()
            if self._connection.is_closed:
                return
            try:
                info = await self._connection.ask("watch", lambda: self._connection.jetstream.stream_info(self._stream))
                # A bucket that has been made again counts from 1 again.
                self._seen = self._seen if info.state.last_seq >= self._seen else 0
                await self._open()
                return
            except BrokerError:
                failures += 1
                if failures > _WATCH_RETRIES:
                    raise
                await asyncio.sleep(_WATCH_PAUSE_S * 2**failures)

    def _on_connection(self, is_connected: bool) -> None:
        if is_connected:
            self._wake()

    def _wake(self) -> None:
        self._arrived.put_nowait((self._sid, None))

    def _close(self) -> None:
        self._connection.client.forget(self._sid)
        consumer, self._consumer = self._consumer, ""
        if consumer and self._connection.is_connected:
            # The answer is of no interest: a consumer that nobody listens to ends by itself.
            self._connection.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}", b"")


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
