"""A TCP proxy whose connections can go bad in the ways that real ones do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Literal, Self

from nalar_mq.config import BrokerAccess

Fault = Literal["swallow up", "swallow down", "stall"]
UntilInTime = Callable[[bytes], Awaitable[None]]
_CHUNK_BYTES = 64 * 1024


class _Link:
    """One client's connection, in both directions; what is wrong with it stays wrong until it is cut."""

    def __init__(self) -> None:
        self.fault: Fault | None = None

    async def carry(
        self, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter, until_in_time: UntilInTime
    ) -> None:
        while data := await source.read(_CHUNK_BYTES):
            if direction == "down":
                await until_in_time(data)
            if self.fault == "stall" and direction == "down":
                await asyncio.Event().wait()
            if self.fault != f"swallow {direction}":
                sink.write(data)
                await sink.drain()
        if self.fault == f"swallow {direction}":
            await asyncio.Event().wait()  # the end is swallowed, too


class Proxy:
    """Stands between a client and its broker; connections made after a fault are whole."""

    def __init__(self, access: BrokerAccess) -> None:
        self._token = access.token
        self._host, _, port = access.urls[0].rpartition("//")[2].rpartition(":")
        self._port = int(port)
        self._links: list[_Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.late = b""
        self.in_time = asyncio.Event()

    @property
    def access(self) -> BrokerAccess:
        """The broker, through here."""
        host, port = self._server.sockets[0].getsockname()
        return BrokerAccess(urls=(f"nats://{host}:{port}",), token=self._token)

    def harm(self, fault: Fault) -> None:
        """Does that to all connections there are: one direction is swallowed, or what the client is sent is read no more."""
        for link in self._links:
            link.fault = fault

    def delay(self, answers: bytes) -> None:
        """From now on what has these bytes in it goes down no more, nor what comes after it, until `in_time` is set."""
        self.late = answers

    def cut(self) -> None:
        """Ends all connections."""
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        link = _Link()
        self._links.append(link)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there, up = await asyncio.open_connection(self._host, self._port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._carry(link, "up", reader, up))
                    both.create_task(self._carry(link, "down", there, writer))
            except* (OSError, EOFError):
                pass
            finally:
                self._links.remove(link)
                up.close()
                writer.close()

    async def _carry(self, link: _Link, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        await link.carry(direction, source, sink, self._until_in_time)
        raise EOFError

    async def _until_in_time(self, data: bytes) -> None:
        if self.late and self.late in data:
            await self.in_time.wait()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        while self._tasks:
            await asyncio.wait(self._tasks)
