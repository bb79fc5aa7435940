"""Takes the messages of some subscriptions out of what a NATS server sends, as it comes from the socket. Pure: no I/O.

A message whose subscription has a handler here goes into it at once: no buffer, no queue and no task between the socket and
the handler. All other bytes are given back in their order, whole commands at a time, for the client that reads the rest.

    MSG subject sid [reply] size                 then `size` bytes and CRLF
    HMSG subject sid [reply] head_size size      the first `head_size` bytes are headers
    PING, PONG, INFO, +OK, -ERR ...              one line each

What is no such command, and everything after it, is given back as it is: the client complains and begins a connection anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nalar_mq.logs import logger
from nalar_mq.transport import Delivered, Handler

_LONGEST_LINE: Final = 64 * 1024
_MESSAGE: Final = ord("M")
_MESSAGE_WITH_HEADERS: Final = ord("H")
_log = logger(__name__)


class Sorter:
    """Of one connection. `handlers` are by the number of their subscription, as it stands in a message; they may change."""

    def __init__(self, handlers: Mapping[bytes, Handler]) -> None:
        self._handlers = handlers
        self._pieces: list[bytes] = []
        self._size = 0
        self._needed = 0
        self._has_lost_track = False

    def sort(self, data: bytes) -> bytes:
        """Handles what it can of the next bytes and returns the others."""
        if self._has_lost_track:
            return data
        if self._pieces:
            self._pieces.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return b""
            data = b"".join(self._pieces)
            self._pieces.clear()
        others: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            stop = self._sort_one(data, at, others)
            if stop > end:
                self._keep(data[at:], stop - at, others)
                break
            at = stop
        return b"".join(others)

    def _sort_one(self, data: bytes, at: int, others: list[bytes]) -> int:
        """Sorts the command that begins at `at`, if it is complete; returns where it ends, or more than there is."""
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return len(data) + 1
        body = line_end + 2
        handler: Handler | None = None
        words: list[bytes] = []
        stop = body
        if data[at] == _MESSAGE or data[at] == _MESSAGE_WITH_HEADERS:
            words = data[at:line_end].split()
            try:
                stop = body + int(words[-1]) + 2
                handler = self._handlers.get(words[2])
            except (ValueError, IndexError):
                stop = -1
            if stop < body + 2 or stop > len(data):
                return self._lose_track(data, at, others) if stop < body + 2 else stop
        if handler is None:
            others.append(data[at:stop])
        else:
            _hand_over(handler, words, data[body : stop - 2])
        return stop

    def _keep(self, data: bytes, needed: int, others: list[bytes]) -> None:
        """Keeps the beginning of a command until the rest of it has come."""
        if needed > len(data) > _LONGEST_LINE and b"\r\n" not in data:
            self._lose_track(data, 0, others)
            return
        self._pieces.append(data)
        self._size = len(data)
        self._needed = needed

    def _lose_track(self, data: bytes, at: int, others: list[bytes]) -> int:
        self._has_lost_track = True
        others.append(data[at:])
        return len(data)


def _hand_over(handler: Handler, words: list[bytes], body: bytes) -> None:
    headers: dict[str, str] | None = None
    has_headers = words[0] == b"HMSG"
    try:
        if has_headers:
            size = int(words[-2])
            headers, body = parsed_headers(body[:size]), body[size:]
        reply = words[3].decode("utf-8", "replace") if len(words) == 5 + has_headers else ""
        handler(Delivered(words[1].decode("utf-8", "replace"), body, reply, headers))
    except Exception:
        _log.exception("transport.handler_failed", subject=words[1].decode("utf-8", "replace"))


def parsed_headers(block: bytes) -> dict[str, str] | None:
    """Headers by name, those of the server's own messages with `Status` and `Description`; None if there are none."""
    first, *lines = block.split(b"\r\n")
    _, _, status = first.partition(b" ")
    code, _, description = status.strip().partition(b" ")
    found: dict[str, str] = {}
    if code.isdigit():
        found["Status"] = code.decode()
        if description:
            found["Description"] = description.decode("utf-8", "replace")
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon and name:
            found[name.decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
    return found or None
