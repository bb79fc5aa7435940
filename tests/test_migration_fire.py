"""Somebody is killed while a large session that is used is on its way to another worker: afterwards one has it, whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S, until

from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.errors import CallError, KeyConflictError, MigrationError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.store import HERE, LEAVING, STAGED, Store
from nalar_mq.transport import KeyValue
from nalar_mq.worker import Worker

APPS = Path(__file__).parent / "apps"
ENTRY_BYTES, FILLED_AT_ONCE = 2_000, 1_000
SHORT, FULL = 5_000, 25_000  # entries


class Site:
    """Two workers, one session between them, and its only caller."""

    def __init__(self, broker: EmbeddedBroker, node: LocalController, client: Client, state: Path) -> None:
        self.broker = broker
        self.node = node
        self.client = client
        self.state = state
        self.session: Any = client.options(session="ann", timeout_s=PATIENCE_S, retries=10)
        self.acknowledged: list[int] = []

    async def fill(self, entries: int) -> None:
        for first in range(0, entries, FILLED_AT_ONCE):
            await self.session.call("Carrier.fill", first, FILLED_AT_ONCE, ENTRY_BYTES)

    async def keep_calling(self) -> None:
        for number in range(1, 1 << 32):
            assert await self.session.call("Carrier.touch", number) == number
            self.acknowledged.append(number)

    async def served(self) -> None:
        """Returns when some more calls have been answered."""
        wanted = len(self.acknowledged) + 5
        await until(lambda: len(self.acknowledged) >= wanted, "the calls stand still")

    async def holder(self) -> str:
        """The worker that has the session, as the directory says."""
        async with asyncio.timeout(PATIENCE_S):
            while (at := await self.client.process.places.locate("Carrier.ann", "Carrier")) is None:
                await asyncio.sleep(0.05)
        return at.name

    async def under_way(self, moving: asyncio.Task[Any], entries: int) -> None:
        """Returns when so many entries of the session are in another store."""
        stores = [Store.read(folder) for folder in self.state.iterdir()]
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not any(_staged_in(store) >= entries for store in stores):
                    assert not moving.done(), moving
                    await asyncio.sleep(0.001)
        finally:
            for store in stores:
                store.close()

    async def ready_to_move(self) -> None:
        """Moves the session, as soon as what was begun before has been cleared away."""
        async with asyncio.timeout(PATIENCE_S):
            await self.node.ready()
            while True:
                try:
                    await self.client.migrate("Carrier", "ann", to=await self.other())
                    return
                except (MigrationError, CallError):
                    await asyncio.sleep(0.2)

    async def other(self) -> str:
        """The worker that does not have the session."""
        holder = await self.holder()
        return next(name for name in self.node.names if name != holder)

    async def kill_during_a_move(self, victim: str, entries: int) -> None:
        source, target = await self.holder(), await self.other()
        moving = asyncio.create_task(self.client.migrate("Carrier", "ann", to=target))
        await self.under_way(moving, entries)
        pid = self.broker.pid if victim == "broker" else self.node.pids[source if victim == "source" else target]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            if victim == "broker":
                await asyncio.wait([moving])  # it may go on where it was
            else:
                with pytest.raises((MigrationError, CallError), match="lost"):
                    await moving


def _staged_in(store: Store) -> int:
    header = store.session("Carrier", "ann").header
    return header.sums.get("entries", (0, 0))[0] if header is not None and header.standing == STAGED else 0


@contextlib.asynccontextmanager
async def _site(folder: Path) -> AsyncIterator[Site]:
    async with EmbeddedBroker(folder / "broker", restart_attempts=50) as broker:
        settings = Settings(broker=broker.access, lease_s=3.0, state=str(folder / "state"))
        async with (
            LocalController(APPS / "carrier_app.py", settings, workers=2, log_level="error") as node,
            connect(settings=settings) as client,
        ):
            async with asyncio.timeout(PATIENCE_S):
                await node.ready()
                await client.wait_for("Carrier")
            yield Site(broker, node, client, folder / "state")


@pytest.mark.parametrize("entries", [SHORT, pytest.param(FULL, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_somebody_is_killed_while_a_large_session_is_on_its_way(entries: int, tmp_path: Path) -> None:
    async with _site(tmp_path) as site:
        await site.fill(entries)
        calling = asyncio.create_task(site.keep_calling())
        await site.served()
        for victim in ("target", "broker", "source"):
            await site.kill_during_a_move(victim, entries // 4)
            await site.served()
            await site.ready_to_move()
            await site.served()
        assert not calling.done()
        calling.cancel()
        await asyncio.wait([calling])
        log, count, size, last = await site.session.call("Carrier.read")
    assert log[: len(site.acknowledged)] == site.acknowledged
    assert log == list(range(1, len(log) + 1))
    assert len(log) - len(site.acknowledged) <= 1
    assert (count, size) == (entries, entries * ENTRY_BYTES)
    assert last == {number % entries: number for number in log}
    assert len(_served_in(tmp_path / "state")) == 1


def _served_in(state: Path) -> list[str]:
    """The stores that serve the session by themselves."""
    found: list[str] = []
    for folder in state.iterdir():
        store = Store.open(folder, "test")
        session = store.session("Carrier", "ann")
        if session.is_kept and session.standing == HERE:
            found.append(store.id)
        assert list(store.findings()) == []
        store.close()
    return found


class _Slow:
    """The directory of sessions: changes reach the broker when they are let through, and who wants them hears of it no more."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        self.asked = asyncio.Event()
        self.let_through = asyncio.Event()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def update(self, key: str, value: bytes, revision: int) -> int:
        self.asked.set()
        await self.let_through.wait()
        try:
            self.answer.set_result(await self._bucket.update(key, value, revision))
        except Exception as error:
            self.answer.set_exception(error)
        await asyncio.Event().wait()
        raise AssertionError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)


@pytest.mark.parametrize("request_comes", ["before", "after", "never"])
async def test_the_source_is_killed_when_it_changes_the_directory(request_comes: str, namespace: str, tmp_path: Path) -> None:
    """Its store says that the session leaves; who opens that store does not know whether the change comes to the directory."""
    hub = MemoryHub(seed=1)
    settings = Settings(
        broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace=namespace, node="here", lease_s=1.0, state=str(tmp_path)
    )
    app = load_app(APPS / "carrier_app.py")

    def worker(name: str) -> Worker:
        return Worker(app, settings, name=name, connect=hub.connect, lease_in_thread=False)

    first, second, third = worker("first"), worker("second"), worker("third")
    async with asyncio.timeout(PATIENCE_S), connect(settings=settings, connect=hub.connect) as client:
        await first.start()
        ann = client.options(session="ann", retries=10)
        await ann.call("Carrier.fill", 0, 100, 100)
        assert await ann.call("Carrier.touch", 1) == 1
        async with second:
            assert first._host is not None and first._host.migrations is not None
            migrations = first._host.migrations
            slow: Any = _Slow(await migrations._directory())
            # Made by the client's connection, so that the request outlives who has sent it.
            slow._bucket = await client.process.transport.key_value(client.process.subjects.places_bucket)
            migrations._bucket = slow
            members = first.process.table.members  # it cannot be told to move to somebody whom it does not know
            await until(lambda: "second" in members and members["second"].stores, "the second never joined")
            moving = asyncio.create_task(client.migrate("Carrier", "ann", to="second"))
            await asyncio.wait([moving, asyncio.create_task(slow.asked.wait())], return_when=asyncio.FIRST_COMPLETED)
            assert not moving.done(), moving
            stores = first.process.stores
            assert stores is not None
            assert stores.session("Carrier", "ann").session.standing == LEAVING
            if request_comes == "before":
                slow.let_through.set()
                await asyncio.wait([slow.answer])
            hub.kill("first")
            for committer in stores._all():
                await asyncio.to_thread(committer.close)
            async with third:
                with pytest.raises((MigrationError, CallError)):
                    await moving
                assert await ann.call("Carrier.touch", 2) == 2
                if request_comes == "after":
                    slow.let_through.set()
                    with pytest.raises(KeyConflictError):
                        await slow.answer
                assert await ann.call("Carrier.touch", 3) == 3
                log, count, size, last = await ann.call("Carrier.read")
                assert (log, count, size, last) == ([1, 2, 3], 100, 10_000, {1: 1, 2: 2, 3: 3})
                at = await client.process.places.locate("Carrier.ann", "Carrier")
                assert at is not None
                if request_comes == "before":
                    assert at.name == "second"
            await first.aclose()
    assert len(_served_in(tmp_path)) == 1
