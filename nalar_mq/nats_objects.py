"""Object stores over NATS: values of any size, as other NATS clients know them.

An object is a description, on `$O.bucket.M.<its name>`, and pieces, on `$O.bucket.C.<an id>`. It counts from the moment its
description is there, and its pieces outlive that. So a description is written after the pieces and only in place of the one
that was there before, and removed before them.

nats-py waits for each piece of an object to be acknowledged before it sends the next one, waits a quarter of a second now
and then while it reads, and leaves a mark for each object that it deletes; so objects are written, read and removed here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
from collections import deque
from datetime import UTC, datetime
from typing import Final, NamedTuple

from nalar_mq.errors import ObjectDamagedError
from nalar_mq.event_loop import cancel_all
from nalar_mq.nats_connection import NatsConnection
from nalar_mq.nats_errors import WRONG_REVISION, checked_bucket
from nalar_mq.nats_streams import READ_BYTES, open_stream, read_stream
from nalar_mq.stand_in import loaded_when_used
from nalar_mq.transport import ObjectStore

with loaded_when_used("aiohttp"):
    import nats.js.errors
    from nats.js import api

# nats-py is typed only in part: what comes out of it is checked where it enters this module.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false

_OBJECT_BYTES_PER_S: Final = 2 * 1024 * 1024
_OBJECT_PIECE_BYTES: Final = 512 * 1024
_OBJECT_PIECES: Final = 8  # on their way at once
_OBJECT_BATCH: Final = 64  # pieces asked for at once


async def open_object_store(connection: NatsConnection, bucket: str, max_age_s: float | None) -> ObjectStore:
    """Opens an object store, creating it where it does not exist."""
    checked_bucket(bucket)

    async def make() -> None:
        await connection.jetstream.create_object_store(bucket, config=api.ObjectStoreConfig(ttl=max_age_s))

    await open_stream(connection, f"OBJ_{bucket}", make)
    return _ObjectStore(connection, bucket)


class _Object(NamedTuple):
    """An object of a bucket: its description, and the number of the message that holds it."""

    info: api.ObjectInfo
    sequence: int


class _ObjectStore:
    """An object store of JetStream, as other NATS clients know it."""

    def __init__(self, connection: NatsConnection, bucket: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"

    async def put(self, name: str, data: bytes) -> None:
        async def write() -> None:
            digest = await asyncio.to_thread(_object_digest, data)
            while not await self._replace(name, digest, data):
                pass

        await self._connection.ask(f"storing object {name!r}", write, self._patience_s(len(data)))

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
        subject, view, jetstream = f"$O.{self._bucket}.C.{id}", memoryview(data), self._connection.jetstream
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
            await self._connection.jetstream.publish(f"$O.{self._bucket}.{_meta_token(info.name)}", text, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code in WRONG_REVISION:
                return False
            raise
        return True

    async def _find(self, name: str) -> _Object | None:
        try:
            found = await self._connection.jetstream.get_msg(self._stream, subject=f"$O.{self._bucket}.{_meta_token(name)}")
        except nats.js.errors.NotFoundError:
            return None
        try:
            info = api.ObjectInfo.from_response(json.loads(found.data or b""))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ObjectDamagedError(f"the description of object {name!r} cannot be read") from None
        return None if info.deleted else _Object(info, found.seq or 0)

    async def _purge(self, subject: str) -> None:
        await self._connection.jetstream.purge_stream(self._stream, subject=f"$O.{self._bucket}.{subject}")

    async def get(self, name: str) -> bytes | None:
        found = await self._connection.ask(f"finding object {name!r}", lambda: self._find(name))
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
            patience_s = self._patience_s(READ_BYTES)
            page = await read_stream(self._connection, self._stream, subject, after, _OBJECT_BATCH, patience_s)
            if not page:
                break
            pieces.extend(kept.data for kept in page)
            left_bytes -= sum(len(kept.data) for kept in page)
            after = page[-1].sequence
        return pieces

    async def names(self) -> list[str]:
        prefix = f"$O.{self._bucket}.M."

        async def look() -> list[str]:
            found = await self._connection.jetstream.stream_info(self._stream, subjects_filter=f"{prefix}>")
            return sorted(found.state.subjects or {})

        subjects = await self._connection.ask(f"names of {self._bucket!r}", look)
        return [base64.urlsafe_b64decode(subject.removeprefix(prefix)).decode("utf-8", "replace") for subject in subjects]

    async def delete(self, name: str) -> None:
        async def remove() -> None:
            found = await self._find(name)
            if found is not None:
                await self._purge(_meta_token(name))
                await self._purge(f"C.{found.info.nuid}")

        await self._connection.ask(f"deleting object {name!r}", remove)

    @property
    def _piece_bytes(self) -> int:
        return min(_OBJECT_PIECE_BYTES, self._connection.max_payload)

    def _patience_s(self, size_bytes: int) -> float:
        return self._connection.request_timeout_s + size_bytes / _OBJECT_BYTES_PER_S


def _meta_token(name: str) -> str:
    """Where the description of an object lies, under the subjects of its bucket."""
    return f"M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def _object_digest(data: bytes) -> str:
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()}"
