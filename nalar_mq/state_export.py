"""Sessions in one file: what `nalar state export` writes and `nalar state import` reads.

A line that names the format, then frames: the length of the payload, a checksum that goes on from that of the frame before,
and the payload as MessagePack: a session, its entries in pieces, what its calls came to; at last the number of sessions. So
a file that was cut, changed, or put together anew is told from a whole one.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from nalar_mq.errors import StoreDamagedError, StoreError, StoreFullError, StoreVersionError
from nalar_mq.store import Entries, Outcome, Whole

VERSION: Final = 1
_FIRST_WORDS: Final = b"nalar-mq state "
_HEAD: Final = struct.Struct(">II")
_PIECE_BYTES: Final = 1024 * 1024
_LONGEST: Final = 1 << 31


class SessionFrame(msgspec.Struct, array_like=True, frozen=True, tag="session"):
    """The beginning of a session."""

    actor: str
    name: str
    schema: int
    kinds: dict[str, str]
    used_s: float


class EntriesFrame(msgspec.Struct, array_like=True, frozen=True, tag="entries"):
    """Some entries of the session that has begun."""

    field: str
    entries: list[tuple[int, bytes]]


class OutcomesFrame(msgspec.Struct, array_like=True, frozen=True, tag="outcomes"):
    """What calls of the session that has begun came to."""

    outcomes: list[Outcome]


class EndFrame(msgspec.Struct, array_like=True, frozen=True, tag="end"):
    """The end of the file."""

    sessions: int


Frame = SessionFrame | EntriesFrame | OutcomesFrame | EndFrame
_DECODER: Final = msgspec.msgpack.Decoder(Frame)


class ExportWriter:
    """Writes a file that takes the name `path` only when it is whole; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.sessions = 0
        self._path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}")
        self._sum = 0
        try:
            self._file = self._draft.open("wb")
            self._file.write(_FIRST_WORDS + b"%d\n" % VERSION)
        except OSError as error:
            raise _not_written(path, error) from error

    def __enter__(self) -> ExportWriter:
        return self

    def put(self, actor: str, name: str, whole: Whole) -> None:
        """Adds a session.

        Raises:
            StoreError: the file cannot be written.
        """
        header = whole.header
        self._put(SessionFrame(actor, name, header.schema, header.kinds, header.used_s))
        for field, entries in whole.entries.items():
            for piece in _pieces(entries):
                self._put(EntriesFrame(field, piece))
        for outcome in whole.outcomes:
            self._put(OutcomesFrame([outcome]))
        self.sessions += 1

    def _put(self, frame: Frame) -> None:
        payload = msgspec.msgpack.encode(frame)
        self._sum = zlib.crc32(payload, self._sum)
        try:
            self._file.write(_HEAD.pack(len(payload), self._sum) + payload)
        except OSError as error:
            raise _not_written(self._path, error) from error

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._put(EndFrame(self.sessions))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._draft.replace(self._path)
        except OSError as failure:
            raise _not_written(self._path, failure) from failure
        finally:
            self._file.close()
            self._draft.unlink(missing_ok=True)


def _pieces(entries: list[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    piece: list[tuple[int, bytes]] = []
    size = 0
    for order, data in entries:
        piece.append((order, data))
        size += len(data) + 16
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def read_export(path: Path) -> Iterator[tuple[SessionFrame, Entries, list[Outcome]]]:
    """The sessions of a file, in their order; only when the last one has been given, it is known that all are there.

    Raises:
        StoreDamagedError: the file is not what was written.
        StoreVersionError: another version has written it.
        StoreError: it is no export, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            _check_first_line(path, file)
            begun: SessionFrame | None = None
            entries: Entries = {}
            outcomes: list[Outcome] = []
            count = 0
            for frame in _frames(path, file):
                if isinstance(frame, (SessionFrame, EndFrame)):
                    if begun is not None:
                        yield begun, entries, outcomes
                        count += 1
                    if isinstance(frame, EndFrame):
                        if frame.sessions != count or file.read(1):
                            raise _damaged(path, f"it has {count:,} sessions and should have {frame.sessions:,}")
                        return
                    begun, entries, outcomes = frame, {}, []
                elif begun is None:
                    raise _damaged(path, "it does not begin with a session")
                elif isinstance(frame, EntriesFrame):
                    entries.setdefault(frame.field, []).extend(frame.entries)
                else:
                    outcomes.extend(frame.outcomes)
            raise _damaged(path, "its end is missing")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", str(path)) from error


def _check_first_line(path: Path, file: BinaryIO) -> None:
    line = file.readline(64)
    version = line[len(_FIRST_WORDS) :].strip()
    if not line.startswith(_FIRST_WORDS) or not version.isdigit():
        raise StoreError(f"{path} is no export of sessions: name a file that nalar state export has written", str(path))
    if int(version) != VERSION:
        raise StoreVersionError(
            f"{path} has format {int(version)}, and this version of nalar-mq reads format {VERSION}: "
            f"import it with the version that wrote it",
            str(path),
        )


def _frames(path: Path, file: BinaryIO) -> Iterator[Frame]:
    sum_ = 0
    while head := file.read(_HEAD.size):
        if len(head) < _HEAD.size:
            raise _damaged(path, "its end is missing")
        size, expected = _HEAD.unpack(head)
        payload = file.read(size) if size <= _LONGEST else b""
        sum_ = zlib.crc32(payload, sum_)
        if len(payload) < size or sum_ != expected:
            raise _damaged(path, f"what stands before byte {file.tell():,} does not match its checksum, or its end is missing")
        try:
            yield _DECODER.decode(payload)
        except msgspec.MsgspecError as error:
            raise _damaged(path, f"what stands before byte {file.tell():,} cannot be read: {error}") from error


def _damaged(path: Path, what: str) -> StoreDamagedError:
    return StoreDamagedError(f"{path} is damaged: {what}; nothing of it was imported", str(path))


def _not_written(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(f"{path} cannot be written: there is no room on its disk", str(path))
    return StoreError(f"{path} cannot be written: {error.strerror or error}", str(path))
