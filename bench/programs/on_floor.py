"""No system, but the floor: packed messages over a bare NATS client that can do nothing else, two worker processes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import nats_process
import uvloop
import work

_MESSAGES_A_FRAME = 64
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(list[tuple[int, int, int]]).decode  # id, what is added, value


class BareClient(asyncio.Protocol):
    """PUB and SUB, and nothing against loss: no reconnect, no TLS, no authentication."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._handler: Callable[[bytes], None] = lambda data: None
        self._transport: Any = None

    @classmethod
    async def open(cls, url: str, subject: str, handler: Callable[[bytes], None]) -> BareClient:
        """Connects and hands what arrives on `subject` to `handler`."""
        parts = urlsplit(url)
        _, client = await asyncio.get_running_loop().create_connection(cls, parts.hostname or "", parts.port or 0)
        client._handler = handler
        client._transport.write(b'CONNECT {"verbose":false}\r\nSUB %b 1\r\nPING\r\n' % subject.encode())
        await client.opened
        return client

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def publish(self, subject: bytes, data: bytes) -> None:
        """Sends one message."""
        self._transport.write(b"PUB %b %d\r\n%b\r\n" % (subject, len(data), data))

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            line = data[at:end]
            at_next = end + 2
            if line.startswith(b"MSG"):
                at_next += int(line[line.rfind(b" ") + 1 :]) + 2
                if at_next > len(data):
                    break
                self._handler(data[end + 2 : at_next - 2])
            elif line == b"PONG" and not self.opened.done():
                self.opened.set_result(None)
            elif line == b"PING":
                self._transport.write(b"PONG\r\n")
            at = at_next
        self._rest = data[at:]


async def serve(url: str, worker: str) -> None:
    def on_calls(data: bytes) -> None:
        client.publish(b"caller", _encode([(id, 0, value + added) for id, added, value in _decode(data)]))

    client = await BareClient.open(url, f"worker{worker}", on_calls)
    await asyncio.Event().wait()


class PackedCaller:
    """Calls of one turn of the loop travel together."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._futures: dict[int, asyncio.Future[int]] = {}
        self._waiting: list[list[tuple[int, int, int]]] = [[], []]
        self._number = 0
        self._flushing = False

    async def open(self, url: str) -> None:
        self._client = await BareClient.open(url, "caller", self._on_results)

    def _on_results(self, data: bytes) -> None:
        for id, _, value in _decode(data):
            future = self._futures.pop(id, None)
            if future is not None and not future.done():
                future.set_result(value)

    def submit(self, worker: int, added: int, value: int) -> asyncio.Future[int]:
        self._number += 1
        future = self._futures[self._number] = self._loop.create_future()
        self._waiting[worker].append((self._number, added, value))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        self._flushing = False
        for worker, calls in enumerate(self._waiting):
            for first in range(0, len(calls), _MESSAGES_A_FRAME):
                self._client.publish(b"worker%d" % worker, _encode(calls[first : first + _MESSAGES_A_FRAME]))
            calls.clear()


async def collect(futures: list[Any]) -> list[Any]:
    for future in futures:
        await future
    return [future.result() for future in futures]


async def measure(url: str) -> None:
    caller = PackedCaller()
    await caller.open(url)
    for worker in range(2):
        await nats_process.first_answer(lambda worker=worker: caller.submit(worker, 0, 1))
    work.answered()
    if work.wants("rtt"):
        await work.round_trips_async(lambda i: caller.submit(0, 0, i))
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, lambda i: caller.submit(i & 1, 0, i), collect)
    if work.wants("chain"):
        await work.chain_awaited(lambda x, i: caller.submit(i & 1, 1, x))
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, lambda i: caller.submit(i & 1, 0, i), collect)
    work.done()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(serve(*sys.argv[1:]))
    else:
        with nats_process.running() as nats_url, nats_process.workers(__file__, [[nats_url, "0"], [nats_url, "1"]]):
            uvloop.run(measure(nats_url))
