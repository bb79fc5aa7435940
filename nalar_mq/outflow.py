"""The pieces that a generator yields, on their way to whoever called it."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from nalar_mq import values
from nalar_mq.calls import VALUE_LIMIT_BYTES, too_large
from nalar_mq.messages import Call, Chunk


class Outflow:
    """The pieces that a generator yields: kept for the value of the call, or sent as a stream once somebody asks for it."""

    def __init__(self, call: Call, label: str, send: Callable[[Chunk], None], loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._label = label
        self._send = send
        self._loop = loop
        self._kept: deque[bytes] = deque()
        self._size_bytes = 0
        self._sent = 0
        self._limit = 0
        self._is_closed = False
        self._room: list[Callable[[], object]] = []

    @property
    def is_streaming(self) -> bool:
        """True once somebody has asked for the pieces as they come."""
        return self._limit > 0

    def allow(self, limit: int) -> None:
        """The consumer takes pieces up to number `limit`; on the loop."""
        self._limit = max(self._limit, limit)
        self._flush()

    def _flush(self) -> None:
        call = self._call
        while self._kept and self._sent < self._limit:
            self._sent += 1
            self._send(Chunk(call.id, self._sent, self._kept.popleft(), call.attempt))
        if not self._kept:
            room, self._room = self._room, []
            for wake in room:
                wake()

    def close(self) -> None:
        """Nobody takes more pieces; whoever waits for room goes on. On the loop."""
        self._is_closed = True
        self._kept.clear()
        self._flush()

    def encoded(self, piece: Any) -> bytes:
        """A piece as bytes; any thread.

        Raises:
            ValueTooLargeError: it does not fit, or all together do not fit into one value and nobody has asked for a stream.
        """
        label = self._label
        payload = values.encode(piece, None, f"a piece of {label}")
        self._size_bytes += len(payload)
        if len(payload) > VALUE_LIMIT_BYTES:
            raise too_large(f"a piece of {label}", len(payload), label)
        if self._size_bytes > VALUE_LIMIT_BYTES and not self.is_streaming and not self._is_closed:
            raise too_large(f"the pieces of {label}, which nobody takes as a stream,", self._size_bytes, label)
        return payload

    def put(self, payload: bytes) -> bool:
        """Adds a piece; False if the producer should wait for room. On the loop."""
        if self._is_closed:
            return True
        self._kept.append(payload)
        if self.is_streaming:
            self._flush()
        return not (self.is_streaming and self._kept)

    def on_room(self, wake: Callable[[], object]) -> None:
        """Calls `wake` once there is room; on the loop."""
        if self.is_streaming and self._kept:
            self._room.append(wake)
        else:
            wake()

    def rest(self) -> list[Any]:
        """The pieces that were not sent, decoded."""
        return [values.decode(piece) for piece in self._kept]

    async def drained(self) -> None:
        """Returns when a stream's last piece has been sent."""
        if self.is_streaming and self._kept:
            room: asyncio.Future[None] = self._loop.create_future()
            self.on_room(functools.partial(settle, room))
            await room


def settle(future: asyncio.Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Ends an asyncio future, unless it has ended."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
