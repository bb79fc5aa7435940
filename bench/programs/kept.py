"""Managed state: calls of sessions on disk and in memory beside LMDB alone, a worker with a million of them, and one that dies.

Large stores are written as a worker writes them, from what a call through the runtime has left there. The directory has the
entries of those sessions that are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median

import lmdb
import msgspec
import psutil
import work

from nalar_mq import Client, connect
from nalar_mq.address import Subjects
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.messages import WIRE_VERSION, Place, encode_record
from nalar_mq.store import Commit, Entries, Session, Store

APP = Path(__file__).with_name("kept_app.py")
IN_FLIGHT = (1, 16, 256)
_MODEL = "model"
_FIRST_CALLS = 1_000
_AT_ONCE = 256
_APPENDS = 300
_WRITTEN_AT_ONCE = 2_000
_SLOT = "1"
_HEALTHY_S = 7.0  # between two ends: a worker that has served has a successor at once, and a spare is there again


class Bench:
    """What all measurements share: a broker, a folder for state, and a model of a session that has been called once."""

    def __init__(self, access: BrokerAccess, folder: Path) -> None:
        self.settings = Settings(broker=access, namespace="kept", node="kept", state=str(folder / "state"))
        self._folder = folder
        self._model: tuple[Entries, dict[str, str]] | None = None

    @contextlib.asynccontextmanager
    async def runtime(self, name: str, workers: int = 1) -> AsyncIterator[tuple[LocalController, Client]]:
        """Workers with the state of that name, in a namespace of that name."""
        settings = msgspec.structs.replace(self.settings, namespace=name, state=str(self._folder / name))
        async with (
            LocalController(APP, settings, workers=workers, log_level="error") as controller,
            connect(settings=settings) as client,
        ):
            await controller.ready()
            await asyncio.gather(client.wait_for("Kept"), client.wait_for("Held"))
            yield controller, client

    def folder_of(self, name: str) -> Path:
        """Where the stores of that name are."""
        return self._folder / name

    async def prepare(self, name: str, sessions: int) -> list[str]:
        """A store of so many sessions, and which of them the directory knows."""
        entries, kinds = await self._model_of_a_session()
        folder = self._folder / name / _SLOT
        store = await asyncio.to_thread(Store.open, folder, "bench")
        try:
            await asyncio.to_thread(_fill, store, entries, kinds, sessions)
            known = [f"s{number}" for number in random.Random(1).sample(range(sessions), min(_FIRST_CALLS, sessions))]
            await self._enter(name, store.id, known)
        finally:
            store.close()
        return known

    async def _model_of_a_session(self) -> tuple[Entries, dict[str, str]]:
        if self._model is None:
            async with self.runtime(_MODEL) as (_, client):
                work.expect(await client.options(session=_MODEL).call("Kept.add", 1), 1)
            store = Store.open(self._folder / _MODEL / _SLOT, "bench")
            session = store.session("Kept", _MODEL)
            assert session.header is not None
            self._model = store.load(session), dict(session.header.kinds)
            store.close()
        return self._model

    async def _enter(self, name: str, store: str, sessions: list[str]) -> None:
        async with connect(settings=msgspec.structs.replace(self.settings, namespace=name)) as client:
            bucket = await client.process.transport.key_value(Subjects(name).places_bucket)
            record = encode_record(Place(WIRE_VERSION, "", 0, store))
            for start in range(0, len(sessions), _AT_ONCE):
                await asyncio.gather(
                    *[bucket.create(f"Kept.{session}", record) for session in sessions[start : start + _AT_ONCE]]
                )


def _fill(store: Store, entries: Entries, kinds: dict[str, str], sessions: int) -> None:
    changes = [(field, order, data) for field, found in entries.items() for order, data in found]
    for start in range(0, sessions, _WRITTEN_AT_ONCE):
        numbers = range(start, min(start + _WRITTEN_AT_ONCE, sessions))
        writes = [Commit(Session("Kept", f"s{n}", None), changes, b"bench%011d" % n, b"\x01", kinds=kinds) for n in numbers]
        failed = [error for error in store.write(writes) if error is not None]
        if failed:
            raise failed[0]


async def state(bench: Bench) -> None:
    """All figures of `state`."""
    await _rates(bench)
    await asyncio.to_thread(_lmdb_alone, bench.folder_of("alone"))
    await _new_sessions(bench)
    await _appends(bench)
    await _million(bench)


async def _rates(bench: Bench) -> None:
    """Calls per second, with so many sessions in flight, each of which makes one call after the other."""
    async with bench.runtime("rates") as (_, client):
        for in_flight in IN_FLIGHT:
            for actor, figure in (("Held", "memory"), ("Kept", "node")):
                work.phase(f"{figure}_{in_flight}")
                calls = _calls_of_one(in_flight)
                sessions = [client.options(session=f"r{number}") for number in range(in_flight)]
                await asyncio.gather(*[session.call(f"{actor}.add", 0) for session in sessions])

                async def call_on(session: Client, actor: str = actor, calls: int = calls) -> None:
                    for _ in range(calls):
                        before = await session.call(f"{actor}.add", 1)
                    assert before

                begun = time.perf_counter()
                await asyncio.gather(*[call_on(session) for session in sessions])
                work.figure(f"{figure}_per_s_{in_flight}", round(in_flight * calls / (time.perf_counter() - begun), 1))


def _calls_of_one(in_flight: int) -> int:
    """More where fewer sessions call: a rate needs some hundred calls, and a large one some thousand."""
    return max(4, work.KEPT_CALLS * 8 // (8 + in_flight))


def _lmdb_alone(folder: Path) -> None:
    """What a call writes, put into LMDB by a loop, with one sync for each transaction of so many of them."""
    folder.mkdir()
    env = lmdb.open(str(folder), max_dbs=8, map_size=1 << 30)
    sessions, entries, records, calls, about = [env.open_db(name) for name in (b"s", b"e", b"r", b"c", b"a")]
    try:
        for in_flight in IN_FLIGHT:
            work.phase(f"lmdb_{in_flight}")
            rounds = _calls_of_one(in_flight)
            begun = time.perf_counter()
            for number in range(rounds):
                with env.begin(write=True) as txn:
                    for session in range(in_flight):
                        key, place = session.to_bytes(8, "big"), b"c" + number.to_bytes(8, "big") + session.to_bytes(4, "big")
                        txn.put(key + b"total\0" + key, bytes(12), db=entries)
                        txn.put(b"Kept\0r" + key, bytes(60), db=sessions)
                        txn.put(place, bytes(48), db=records)
                        txn.put(key + place, place, db=calls)
                    txn.put(b"commits", number.to_bytes(8, "big"), db=about)
            work.figure(f"lmdb_commits_per_s_{in_flight}", round(in_flight * rounds / (time.perf_counter() - begun), 1))
    finally:
        env.close()


async def _new_sessions(bench: Bench) -> None:
    """First calls of sessions, and bare creations of keys in a bucket of the same broker, so many at once."""
    count = 5 * work.KEPT_CALLS
    async with bench.runtime("new") as (_, client):
        work.phase("new_sessions")
        await client.options(session="warm").call("Kept.add", 1)
        seconds = await _many(count, lambda n: client.options(session=f"n{n}").call("Kept.add", 1))
        work.figure("new_sessions_per_s", round(count / seconds, 1))
        work.phase("kv_creates")
        bucket = await client.process.transport.key_value("bench-creates")
        record = encode_record(Place(WIRE_VERSION, "", 0, "0123456789abcdef"))
        seconds = await _many(count, lambda n: bucket.create(f"Kept.n{n}", record))
        work.figure("kv_creates_per_s", round(count / seconds, 1))


async def _many(count: int, make: Callable[[int], Awaitable[object]]) -> float:
    numbers = iter(range(count))

    async def one_after_the_other() -> None:
        for number in numbers:
            await make(number)

    begun = time.perf_counter()
    await asyncio.gather(*[one_after_the_other() for _ in range(_AT_ONCE)])
    return time.perf_counter() - begun


async def _appends(bench: Bench) -> None:
    """One more entry at the end of a long list and of a short one, in turns."""
    work.phase("append")
    async with bench.runtime("append") as (_, client):
        lists = {"long": work.KEPT_SESSIONS, "short": 10}
        for name in lists:
            work.expect(await client.options(session=name).call("Kept.append", 0), 1)
    await asyncio.to_thread(_lengthen, bench, lists)
    async with bench.runtime("append") as (_, client):
        sessions = {name: client.options(session=name, timeout_s=600) for name in lists}
        for name, length in lists.items():
            work.expect(await sessions[name].call("Kept.append", 0), length + 1)
        seconds: dict[str, list[float]] = {name: [] for name in lists}
        for number in range(_APPENDS):
            for name in lists:
                begun = time.perf_counter()
                work.expect(await sessions[name].call("Kept.append", number), lists[name] + number + 2)
                seconds[name].append(time.perf_counter() - begun)
        work.figure("append_ratio", round(median(seconds["long"]) / median(seconds["short"]), 3))


def _lengthen(bench: Bench, lists: dict[str, int]) -> None:
    store = Store.open(bench.folder_of("append") / _SLOT, "bench")
    for name, length in lists.items():
        session = store.session("Kept", name)
        assert session.header is not None
        ((first, data),) = store.load(session)["entries"]
        for start in range(1, length, _WRITTEN_AT_ONCE):
            orders = range(first + start, first + min(start + _WRITTEN_AT_ONCE, length))
            store.write([Commit(session, [("entries", n, data) for n in orders], b"", b"", kinds=session.header.kinds)])
    store.close()


async def _million(bench: Bench) -> None:
    work.phase("fill_1m")
    known = await bench.prepare("million", work.KEPT_SESSIONS)
    work.phase("start_1m")
    begun = time.perf_counter()
    async with bench.runtime("million") as (controller, client):
        work.figure("start_s_1m", round(time.perf_counter() - begun, 3))
        (pid,) = controller.pids.values()
        work.figure("start_rss_mb_1m", round(psutil.Process(pid).memory_info().rss / 1e6, 1))
        work.phase("first_calls_1m")
        await client.options(session="warm").call("Kept.add", 1)
        seconds = []
        for session in known:
            begun = time.perf_counter()
            work.expect(await client.options(session=session).call("Kept.add", 1), 2)
            seconds.append(time.perf_counter() - begun)
        work.figure("first_call_p99_ms_1m", round(_p99(seconds) * 1e3, 2))


def _p99(seconds: list[float]) -> float:
    """The one that 99 of 100 do not exceed; of few, the largest."""
    return sorted(seconds)[-(len(seconds) // 100) - 1]


async def recovery(bench: Bench) -> None:
    """From the end of a worker that holds many sessions to the next answer of one of them, under moderate load."""
    work.phase("fill_recovery")
    known = iter(await bench.prepare("recovery", work.KEPT_SESSIONS // 10))
    async with bench.runtime("recovery", workers=2) as (controller, client):
        work.figure("lease_s", bench.settings.lease_s)
        loading = asyncio.create_task(_load(client))
        for figure, end, times in (
            ("recovery_p99_s", signal.SIGKILL, work.KEPT_KILLS),
            ("recovery_frozen_p99_s", signal.SIGSTOP, max(1, work.KEPT_KILLS // 10)),
        ):
            work.phase(figure)
            seconds = []
            for _ in range(times):
                await asyncio.sleep(_HEALTHY_S)
                seconds.append(await _end_and_call(controller, client, next(known), next(known), end))
            work.figure(figure, round(_p99(seconds), 3))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


async def _load(client: Client) -> None:
    """Some hundred calls a second of twenty other sessions."""
    sessions = [client.options(session=f"load{number}", retries=100) for number in range(20)]

    async def call_on(session: Client) -> None:
        while True:
            await session.call("Kept.add", 1)
            await asyncio.sleep(0.1)

    await asyncio.gather(*[call_on(session) for session in sessions])


async def _end_and_call(controller: LocalController, client: Client, before: str, after: str, end: signal.Signals) -> float:
    await client.options(session=before).call("Kept.add", 1)
    holder = client.process.places.known(f"Kept.{before}")
    assert holder is not None
    os.kill(controller.pids[holder.name], end)
    begun = time.perf_counter()
    work.expect(await client.options(session=after, retries=10).call("Kept.add", 1), 2)
    return time.perf_counter() - begun
