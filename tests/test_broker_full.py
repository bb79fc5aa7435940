"""Large values while the broker has no room for them or is away: who waits, for how long, and what he is told."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from waiting import until

from nalar_mq import errors
from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.intake import IntakeOptions
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.worker import Worker
from tests.test_nats_transport import plain_server

APP = Path(__file__).parent / "apps" / "large_jobs_app.py"
ROOM = 12 * 1024 * 1024
TOO_MUCH = 14 * 1024 * 1024
MUCH = 4 * 1024 * 1024
PATIENCE_S = 60.0
QUICK = IntakeOptions(ack_wait_s=1.5, look_again_s=0.2, back_off_s=0.05)


class Site:
    """A worker and a client that share no folder: every large value needs the broker."""

    def __init__(self, worker: Worker, client: Client) -> None:
        self.worker = worker
        self.client = client
        self.actors: Any = importlib.import_module("large_jobs_app")
        self.actors.RUNS.clear()
        self.actors.GATES.clear()

    async def fill(self) -> None:
        """Takes the room that there is, but for a little."""
        self._filler = await self.client.process.transport.ledger("filler", ["filler"])
        piece = 512 * 1024
        while True:
            try:
                await self._filler.append("filler", bytes(piece))
            except errors.BrokerFullError:
                if piece < 1024:
                    return
                piece //= 2

    async def make_room(self) -> None:
        await self._filler.purge("filler")

    async def emptied(self) -> None:
        store = await self.client.process.transport.object_store(f"{self.client.process.subjects.namespace}-claims")
        async with asyncio.timeout(PATIENCE_S):
            while await store.names():
                await asyncio.sleep(0.02)


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def _site(access: BrokerAccess, namespace: str, stack: AsyncExitStack, request_timeout_s: float = 5.0) -> Site:
    settings = Settings(broker=access, namespace=namespace, node="here", lease_s=2.0, local_store="off")

    async def dial(name: str) -> NatsTransport:
        return await NatsTransport.connect(access, name=name, request_timeout_s=request_timeout_s)

    worker = await stack.enter_async_context(
        Worker(load_app(APP), settings, name="w", intake=QUICK, connect=dial, lease_in_thread=False)
    )
    client = await stack.enter_async_context(connect(settings=settings, connect=dial))
    await client.wait_for("make")
    return Site(worker, client)


@pytest.fixture
async def small(tmp_path: Path, namespace: str) -> AsyncIterator[Site]:
    """On a broker that keeps 12 MB altogether."""
    config = f'jetstream {{ store_dir: "{tmp_path / "js"}", max_file_store: {ROOM}, sync_interval: always }}'
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(plain_server(tmp_path, config))
        yield await _site(BrokerAccess(urls=(f"nats://{url}",)), namespace, stack)


async def test_a_value_without_room_is_a_typed_error_at_once_and_leaves_nothing(small: Site) -> None:
    client = small.client
    for _ in range(2):
        for call in (client.call("make", TOO_MUCH, 1), client.call("weigh", bytes(TOO_MUCH))):
            with pytest.raises(errors.BrokerFullError, match="more storage"):
                await within(call)
        assert await within(client.call("weigh", bytes(MUCH))) == MUCH, "what did not fit has left something behind"
        assert len(await within(client.call("make", MUCH, 1))) == MUCH
        await small.emptied()


async def test_the_calls_of_a_job_wait_for_room(small: Site) -> None:
    handle = await small.client.submit("interrupted", MUCH // 4, "g")
    await until(lambda: "weigh 2" in small.actors.RUNS)
    await small.fill()
    small.actors.gate("g").set()
    await asyncio.sleep(1.0)  # the worker tries meanwhile
    assert (await handle.status()).state == "running"
    await small.make_room()
    assert await handle.result(timeout=PATIENCE_S) == [MUCH // 4, MUCH // 4, MUCH // 4 + 1]
    assert small.actors.RUNS.count("make 1") == 1
    await small.emptied()


async def test_a_call_of_a_job_waits_for_room_until_its_deadline(small: Site) -> None:
    handle = await small.client.submit("tries", TOO_MUCH, 3.0)
    said = await handle.result(timeout=PATIENCE_S)
    assert said in ("BrokerFullError", "CallTimeoutError")
    await small.emptied()
    assert await (await small.client.submit("tries", MUCH, 30.0)).result(timeout=PATIENCE_S) == "made"


async def test_the_value_of_a_job_waits_for_room(small: Site) -> None:
    handle = await small.client.submit("returns_when", MUCH, "g")
    await until(lambda: "returns_when g" in small.actors.RUNS)
    await small.fill()
    small.actors.gate("g").set()
    assert (await handle.status()).state == "running"
    await asyncio.sleep(1.0)  # the worker tries meanwhile
    assert (await handle.status()).state == "running"
    await small.make_room()
    assert len(await handle.result(timeout=PATIENCE_S)) == MUCH
    assert small.actors.RUNS.count("returns_when g") == 1


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(64 * 1024)) == 64 * 1024:
            pass


async def test_a_full_disk_costs_typed_errors_and_nothing_that_was_accepted(tiny_disk: Path, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(EmbeddedBroker(tiny_disk / "broker"))
        site = await _site(broker.access, namespace, stack, request_timeout_s=2.0)
        job = await site.client.submit("interrupted", MUCH // 4, "g")
        await until(lambda: "weigh 2" in site.actors.RUNS)
        await asyncio.to_thread(_fill, tiny_disk / "filler")
        site.actors.gate("g").set()
        soon = site.client.options(timeout_s=3.0)
        for call in (soon.call("make", MUCH, 3), soon.call("weigh", bytes(MUCH))):
            with pytest.raises((errors.BrokerError, errors.CallTimeoutError)):
                await within(call)
        (tiny_disk / "filler").unlink()
        assert await job.result(timeout=PATIENCE_S) == [MUCH // 4, MUCH // 4, MUCH // 4 + 1]
        assert await within(site.client.call("weigh", bytes(MUCH))) == MUCH
        assert broker.restarts == 1


@pytest.mark.parametrize("dies", [False, True])
async def test_a_disk_that_was_full_is_told_and_costs_nothing_that_was_acknowledged(tiny_disk: Path, dies: bool) -> None:
    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(EmbeddedBroker(tiny_disk / "broker"))
            transport = await stack.enter_async_context(
                await NatsTransport.connect(broker.access, name="test", request_timeout_s=1.0)
            )
            ledgers = [await transport.ledger(name, [name]) for name in ("a", "b")]
            kept: list[list[bytes]] = [[], []]
            await asyncio.to_thread(_fill, tiny_disk / "filler")
            refusals: list[str] = []
            for number in itertools.count():
                if len(refusals) == 3:
                    break
                data = b"%d " % number + bytes(3000)
                try:
                    await ledgers[number % 2].append("ab"[number % 2], data)
                    kept[number % 2].append(data)
                except errors.BrokerTimeoutError as error:
                    refusals.append(str(error))
            assert all(f"the disk of {tiny_disk / 'broker'} has only" in refusal for refusal in refusals)
            await until(lambda: any(entry["event"] == "broker.disk_full" for entry in logs))
            assert not broker.restarts
            if dies:
                assert broker.pid is not None
                os.kill(broker.pid, signal.SIGKILL)
                await until(lambda: not transport.is_connected)
            (tiny_disk / "filler").unlink()
            await until(lambda: broker.restarts == 1 and transport.is_connected)
            for ledger, subject, data in zip(ledgers, "ab", kept, strict=True):
                got = [each.data for each in await ledger.read(subject, limit=100_000)]
                assert [each for each in got if each in data] == data, "something acknowledged is lost, or has changed places"
                await ledger.append(subject, b"more")
    events = [entry["event"] for entry in logs]
    told = ["broker.disk_full", "broker.disk_has_room", "broker.ended", "broker.began_again"]
    assert sorted(events) == sorted(told)


# Away.


@pytest.fixture
async def losable(tmp_path: Path, namespace: str) -> AsyncIterator[tuple[Site, EmbeddedBroker]]:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(EmbeddedBroker(tmp_path / "broker"))
        yield await _site(broker.access, namespace, stack, request_timeout_s=2.0), broker


async def test_a_broker_that_comes_back_is_waited_for(losable: tuple[Site, EmbeddedBroker]) -> None:
    site, broker = losable
    job = await site.client.submit("interrupted", MUCH, "g")
    call = site.client.call("make_when", MUCH, "g")
    await until(lambda: {"make_when g", "weigh 2"} <= set(site.actors.RUNS))
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)
    site.actors.gate("g").set()
    given = site.client.call("weigh", bytes(MUCH))
    assert len(await within(call)) == MUCH
    assert await within(given) == MUCH
    assert await job.result(timeout=PATIENCE_S) == [MUCH, MUCH, MUCH + 1]
    assert broker.restarts == 1


async def test_a_broker_that_dies_is_told_once_by_who_pulls_jobs_from_it(losable: tuple[Site, EmbeddedBroker]) -> None:
    _, broker = losable
    with capture_logs() as logs:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        await until(lambda: any(entry["event"] == "jobs.pulled_again" for entry in logs))
    told = [entry["event"] for entry in logs if entry["event"].startswith("jobs.pull")]
    assert told == ["jobs.pull_failed", "jobs.pulled_again"]


async def test_a_broker_that_stays_away_is_waited_for_until_the_deadline(losable: tuple[Site, EmbeddedBroker]) -> None:
    site, broker = losable
    soon = site.client.options(timeout_s=3.0)
    making = soon.call("make_when", MUCH, "g")
    await until(lambda: "make_when g" in site.actors.RUNS)
    await broker.aclose()
    site.actors.gate("g").set()
    taking = soon.call("weigh", bytes(MUCH))
    for call in (making, taking):
        with pytest.raises((errors.CallTimeoutError, errors.BrokerError)):
            await within(call)
    await broker.start()
