"""The pieces that a generator yields, on their way to whoever called it."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nalar_mq import values
from nalar_mq.claims import INLINE_LIMIT_BYTES, check_size
from nalar_mq.messages import Call, Chunk

_KEPT_LIMIT_BYTES: Final = 64 * 1024 * 1024  # of pieces that nobody takes, in memory
_OVERHEAD_BYTES: Final = 128


class Outflow:
    """The pieces that a generator yields: kept for the value of the call, or sent as a stream once somebody asks for it.

    Args:
        call, label: whose pieces they are.
        send: sends one of them.
        keep: keeps a large one elsewhere and gives the claim that is sent in its place.
        loop: of the worker.
    """

    def __init__(
        self,
        call: Call,
        label: str,
        send: Callable[[Chunk], None],
        keep: Callable[[bytes], Awaitable[bytes]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._call = call
        self._label = label
        self._send = send
        self._keep = keep
        self._keeping: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
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
        while self._kept and self._sent < self._limit and self._keeping is None:
            if len(self._kept[0]) > INLINE_LIMIT_BYTES:
                self._keeping = self._loop.create_task(self._replace_first(self._kept[0]))
                return
            self._sent += 1
            self._send(Chunk(call.id, self._sent, self._kept.popleft(), call.attempt))
        if not self._kept:
            room, self._room = self._room, []
            for wake in room:
                wake()

    async def _replace_first(self, piece: bytes) -> None:
        """Pieces after a large one wait until it is kept, and so does the generator."""
        try:
            claim = await self._keep(piece)
            if self._kept and self._kept[0] is piece:
                self._kept[0] = claim
        except Exception as error:
            self._failure = error
            self._kept.clear()
        self._keeping = None
        self._flush()

    def close(self) -> None:
        """Nobody takes more pieces; whoever waits for room goes on. On the loop."""
        self._is_closed = True
        self._kept.clear()
        self._flush()

    def encoded(self, piece: Any) -> bytes:
        """A piece as bytes; any thread.

        Raises:
            ValueTooLargeError: it does not fit, or all together do not fit into one value and nobody has asked for a stream.
            BrokerError: an earlier piece could not be kept.
        """
        self.check()
        label = self._label
        payload = values.encode(piece, None, f"a piece of {label}")
        self._size_bytes += len(payload) + _OVERHEAD_BYTES
        check_size(f"a piece of {label}", len(payload), label)
        if not self.is_streaming and not self._is_closed:
            what = f"the pieces of {label}, which nobody takes as a stream,"
            check_size(what, self._size_bytes, label, limit_bytes=_KEPT_LIMIT_BYTES)
        return payload

    def check(self) -> None:
        """Raises what went wrong when an earlier piece was to be kept."""
        if self._failure is not None:
            raise self._failure

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
        """The pieces that were not sent, decoded; any thread."""
        return [values.decode(piece) for piece in self._kept]

    async def drained(self) -> None:
        """Returns when a stream's last piece has been sent."""
        if self.is_streaming and self._kept:
            room: asyncio.Future[None] = self._loop.create_future()
            self.on_room(functools.partial(settle, room))
            await room
        self.check()


def settle(future: asyncio.Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Ends an asyncio future, unless it has ended."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
