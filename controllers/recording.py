"""Telemetry in a file: what `nalar policy record` writes and `nalar policy replay` reads.

A line that names the format and its version, then frames: the length of the payload, a checksum that goes on from that of the
frame before, and the payload as MessagePack: seconds since the beginning, the process that has reported, its report as it came.
A file whose writer was killed ends in the middle of a frame, and is good up to there.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import msgspec

from nalar_mq.errors import RecordingDamagedError, RecordingError, RecordingVersionError

VERSION: Final = 1
_FIRST_WORDS: Final = b"nalar-mq telemetry "
_HEAD: Final = struct.Struct(">II")
_LONGEST: Final = 1 << 30


class Recorded(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A report as it came: seconds since the recording began, its sender, its bytes."""

    at_s: float
    sender: str
    data: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Recorded)


class Recording:
    """Writes a file; a context manager. What was recorded is in the file at the latest when it is closed.

    Args:
        path: of the file, which must not exist.

    Attributes:
        reports: how many it has.
        size_bytes: of the file so far.

    Raises:
        RecordingError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sum = 0
        self.reports = 0
        head = _FIRST_WORDS + str(VERSION).encode() + b"\n"
        self.size_bytes = len(head)
        try:
            self._file = path.open("xb")
            self._file.write(head)
        except OSError as error:
            raise RecordingError(f"{path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def add(self, report: Recorded) -> None:
        """One report more.

        Raises:
            RecordingError: it cannot be written.
        """
        payload = _encoder.encode(report)
        self._sum = zlib.crc32(payload, self._sum)
        try:
            self._file.write(_HEAD.pack(len(payload), self._sum) + payload)
        except OSError as error:
            raise self._unwritten(error) from None
        self.reports += 1
        self.size_bytes += _HEAD.size + len(payload)

    def close(self) -> None:
        """Ends; idempotent."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> RecordingError:
        return RecordingError(f"{self._path} cannot be written: {error.strerror or error}")


def read_recording(path: Path) -> Iterator[Recorded]:
    """The reports in a file, in the order in which they came.

    Raises:
        RecordingError: there is no such file, or it is none.
        RecordingDamagedError: its bytes are not those that were written.
        RecordingVersionError: it was written by another version.
    """
    try:
        with path.open("rb") as file:
            _check_head(path, file)
            yield from _frames(path, file)
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_head(path: Path, file: BinaryIO) -> None:
    line = file.readline(64)
    version = line.removeprefix(_FIRST_WORDS).strip()
    if not line.startswith(_FIRST_WORDS) or not line.endswith(b"\n") or not version.isdigit():
        raise RecordingError(f"{path} is no recording: `nalar policy record` writes one")
    if int(version) != VERSION:
        raise RecordingVersionError(f"{path} was written in version {int(version)} of the format; this program reads {VERSION}")


def _frames(path: Path, file: BinaryIO) -> Iterator[Recorded]:
    sum_ = 0
    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, wanted = _HEAD.unpack(head)
        begins = file.tell()
        if begins + length > size and length <= _LONGEST:
            return
        payload = file.read(length) if length <= _LONGEST else b""
        sum_ = zlib.crc32(payload, sum_)
        if sum_ != wanted or not payload:
            raise RecordingDamagedError(f"{path} is damaged: the {length:,} bytes from {begins:,} do not match their checksum")
        try:
            yield _decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise RecordingDamagedError(f"{path} is damaged at byte {begins:,}: {error}") from None
