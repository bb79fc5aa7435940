"""Sessions that move between two workers while they are called: the pause, what others notice, and the bytes per second.

The pause is from the end of the last call in the one worker to the start of the first one in the other, as the agent saw them.
A session is called without pause, and a hundredth of its entries is changed in each second.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import work
from kept import Bench

from nalar_mq import Client
from nalar_mq.client import Caller
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Delivered

SIZES = {"1kb": (10, 100), "1mb": (1_000, 1_000), "100mb": (work.MOVED_MB * 1_000, 1_000)}  # entries, and bytes of each
_FILLED_AT_ONCE = 2_000
_CALLERS = 2
_CHANGED_PER_S = 0.01
_CALL_EVERY_S = 0.002
_REST_S = 0.3
_QUIET_S = 2.0
_COPIED_BYTES = 128 * 1024


class _Carried:
    """One session, its callers, and when its calls ran."""

    def __init__(self, client: Client, size: str) -> None:
        self.name = f"carried-{size}"
        self.count, self._bytes = SIZES[size]
        self._caller = client.options(session=self.name, timeout_s=None)
        self._random = random.Random(1)
        self._owed = 0.0
        self.calls: list[tuple[int, float, float]] = []

    async def fill(self) -> None:
        for first in range(0, self.count, _FILLED_AT_ONCE):
            await self._caller.call("Carried.fill", first, min(_FILLED_AT_ONCE, self.count - first), self._bytes)

    async def keep_calling(self) -> None:
        begun = time.monotonic()
        while True:
            now = time.monotonic()
            self._owed += (now - begun) * self.count * _CHANGED_PER_S / _CALLERS
            begun, due = now, int(self._owed)
            self._owed -= due
            numbers = self._random.sample(range(self.count), min(due, self.count))
            self.calls.append(tuple(await self._caller.call("Carried.touch", numbers, len(self.calls))))
            await asyncio.sleep(_CALL_EVERY_S)

    def pause_s(self) -> float:
        """Of the move that lies between the calls so far; they are forgotten."""
        calls, self.calls = sorted(self.calls, key=lambda call: call[1]), []
        former = calls[0][0]
        last = max(ended for process, _, ended in calls if process == former)
        return min(begun for process, begun, _ in calls if process != former) - last


async def measure(bench: Bench) -> None:
    """All figures of `migration`."""
    async with bench.runtime("moving", workers=2) as (_, client):
        await client.wait_for("Carried")
        for size in SIZES:
            await _pauses(client, size, max(2, work.MOVES // (10 if size == "100mb" else 1)))
    work.phase("copy")
    work.figure("copy_mb_per_s", round(await _copied_mb_per_s(bench), 1))


async def _pauses(client: Client, size: str, moves: int) -> None:
    work.phase(f"fill_{size}")
    carried = _Carried(client, size)
    await carried.fill()
    work.phase(f"pause_{size}")
    pauses: list[float] = []
    rates: list[float] = []
    others = _Others(client)
    is_large = size == "100mb"
    if is_large:
        async with others.calling():
            await asyncio.sleep(_QUIET_S)
        work.figure("others_p99_ms_quiet", round(work.percentile(others.take(), 99), 2))
    beside = [others.keep_calling()] if is_large else []
    async with _running(*beside, *[carried.keep_calling() for _ in range(_CALLERS)]):
        for _ in range(moves):
            await asyncio.sleep(_REST_S)
            begun = time.monotonic()
            moved = await client.migrate("Carried", carried.name, to=await _other(client, carried.name))
            rates.append(moved.size_bytes / 1e6 / (time.monotonic() - begun))
            await asyncio.sleep(_REST_S)
            pauses.append(carried.pause_s() * 1e3)
    work.figure(f"pause_p50_ms_{size}", round(work.percentile(pauses, 50), 2))
    work.figure(f"pause_p99_ms_{size}", round(work.percentile(pauses, 99), 2))
    if is_large:
        work.figure("others_p99_ms_meanwhile", round(work.percentile(others.take(), 99), 2))
        work.figure("transfer_mb_per_s", round(work.percentile(rates, 50), 1))


async def _other(client: Client, session: str) -> str:
    """The worker that does not have the session."""
    workers = sorted(name for name, member in client.process.table.members.items() if member.role == "worker")
    at = await client.process.places.locate(f"Carried.{session}", "Carried")
    assert at is not None
    return next(name for name in workers if name != at.name)


class _Others:
    """Twenty other sessions, each called twenty times a second."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.took_ms: list[float] = []

    def take(self) -> list[float]:
        """How long the calls took since the last time it was asked."""
        took_ms, self.took_ms = self.took_ms, []
        return took_ms

    def calling(self) -> contextlib.AbstractAsyncContextManager[None]:
        return _running(self.keep_calling())

    async def keep_calling(self) -> None:
        await asyncio.gather(*[self._call(self._client.options(session=f"other{number}")) for number in range(20)])

    async def _call(self, session: Caller) -> None:
        while True:
            begun = time.perf_counter()
            await session.call("Kept.add", 1)
            self.took_ms.append((time.perf_counter() - begun) * 1e3)
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """They run meanwhile, and one that fails has been for nothing."""
    tasks = [asyncio.create_task(one) for one in works]
    try:
        yield
    finally:
        failed = [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if failed:
            raise SystemExit(f"what ran meanwhile has ended: {failed[0]!r}")


async def _copied_mb_per_s(bench: Bench) -> float:
    """What two connections to the broker reach, in pieces as large as those of a session, a few on their way at a time."""
    one = await NatsTransport.connect(bench.settings.broker, name="copy-from")
    other = await NatsTransport.connect(bench.settings.broker, name="copy-to")
    pieces, room, came = 800, asyncio.Semaphore(8), asyncio.Semaphore(0)

    def on_piece(_: Delivered) -> None:
        room.release()
        came.release()

    await other.subscribe("copy.piece", on_piece)
    await other.flush()
    data = random.Random(1).randbytes(_COPIED_BYTES)
    begun = time.monotonic()
    for _ in range(pieces):
        await room.acquire()
        one.publish("copy.piece", data)
    for _ in range(pieces):
        await came.acquire()
    took_s = time.monotonic() - begun
    await one.aclose()
    await other.aclose()
    return pieces * _COPIED_BYTES / 1e6 / took_s
