"""Jobs while worker processes and the broker are killed: what was accepted ends once, and right."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import psutil
import pytest
from waiting import until

from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import LEASE_S, BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.jobs import JobHandle, Jobs

APP = Path(__file__).parent / "apps" / "jobs_app.py"
PATIENCE_S = 110.0


class Site:
    """Three worker processes and a client; what the workers do is written into a file."""

    def __init__(self, node: LocalController, client: Client, log: Path) -> None:
        self.node = node
        self.client = client
        self.log = log

    def runs(self) -> dict[str, list[int]]:
        """Which processes have run each thing."""
        runs: defaultdict[str, list[int]] = defaultdict(list)
        for line in self.log.read_text().splitlines():
            what, _, pid = line.rpartition(" ")
            runs[what].append(int(pid))
        return runs

    def count(self, word: str) -> int:
        return sum(len(pids) for what, pids in self.runs().items() if what.startswith(word))

    async def submit(self, count: int, pause_s: float) -> list[JobHandle]:
        made = (self.client.submit("steps", 10 * n, pause_s, job_id=f"j{n}") for n in range(count))
        return list(await asyncio.gather(*made))

    async def check(self, handles: list[JobHandle]) -> None:
        """Every job has its right result, and nothing is left over."""
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*(handle.result() for handle in handles))
            assert results == [10 * n + 3 for n in range(len(handles))]
            jobs = await self.client.jobs()
            while await jobs.queue.depth() or (await jobs.overview()).running:
                await asyncio.sleep(0.1)
        assert [letter async for letter in jobs.dead_letters()] == []

    @property
    def serving(self) -> set[int]:
        """Processes that are workers, as far as the client knows."""
        return {member.pid for member in self.client.process.table.members.values() if member.role == "worker"}

    def repeated_without_need(self) -> dict[str, list[int]]:
        """What was run more than once by workers that live."""
        alive = self.serving
        return {what: pids for what, pids in self.runs().items() if sum(pid in alive for pid in pids) > 1}

    async def check_repeated(self) -> None:
        """Only what ran in a worker that was lost has been run again; a loaded machine may lose one by itself."""
        with contextlib.suppress(TimeoutError):  # the client may hear of a loss a lease later than those who go on
            async with asyncio.timeout(3 * LEASE_S):
                while self.repeated_without_need():
                    await asyncio.sleep(0.1)
        assert self.repeated_without_need() == {}, "work was repeated although its worker was not lost"


@asynccontextmanager
async def site(settings: Settings, log: Path) -> AsyncIterator[Site]:
    log.touch()
    variables = {"JOBS_LOG": str(log)}
    async with LocalController(APP, settings, workers=3, variables=variables, log_level="error") as node:
        async with asyncio.timeout(PATIENCE_S):
            await node.ready()
        async with connect(settings=settings) as client:
            yield Site(node, client, log)


async def kill_workers(site: Site, kills: int, total: int, rng: Random) -> None:
    """Kills one worker after another, at random moments spread over the run, each when the former one has a successor."""
    for number in range(kills):
        await until(lambda number=number: site.count("slowly") >= total * (number + 1) // (kills + 1))
        await asyncio.sleep(rng.uniform(0.0, 0.05))
        pids = [pid for pid in site.node.pids.values() if psutil.pid_exists(pid)]
        killed = rng.choice(pids)
        os.kill(killed, signal.SIGKILL)
        await until(lambda killed=killed: len(site.serving - {killed}) == 3)


async def test_jobs_survive_killed_workers(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    async with site(settings, tmp_path / "log") as here:
        handles = await here.submit(60, 0.3)
        await kill_workers(here, 2, 180, Random(1))
        await here.check(handles)
        await here.check_repeated()


async def test_jobs_survive_a_killed_broker(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        async with site(settings, tmp_path / "log") as here:
            handles = await here.submit(60, 0.3)
            await until(lambda: here.count("slowly") > 40)
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            await here.check(handles)
            await here.check_repeated()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_worker_that_stands_still_and_wakes_up_changes_nothing(
    broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    async with site(settings, tmp_path / "log") as here:
        handles = await here.submit(60, 0.5)
        await until(lambda: here.count("slowly") > 40)
        pid = here.node.pids["here-2"]
        os.kill(pid, signal.SIGSTOP)
        try:
            await here.check(handles)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        await until(lambda: here.node.pids.get("here-2") not in (None, pid))
        await here.check(handles)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_many_kills(tmp_path: Path) -> None:
    rng = Random(7)
    async with EmbeddedBroker(tmp_path / "broker", restart_attempts=50) as broker:
        settings = Settings(broker=broker.access, node="here")
        async with site(settings, tmp_path / "log") as here:
            handles = await here.submit(400, 0.5)
            await kill_workers(here, 10, 1200, rng)
            await here.check(handles)


class Memory:
    """What processes take, in MiB: before, and at most so far."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.before = self.now()
        self.peak = dict(self.before)

    def now(self) -> dict[str, int]:
        return {name: process.memory_info().rss // 2**20 for name, process in self.processes.items()}

    def look(self) -> None:
        self.peak = {name: max(self.peak[name], mib) for name, mib in self.now().items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_jobs_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    count, loop = 100_000, asyncio.get_running_loop()
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        async with site(settings, tmp_path / "log") as here:
            jobs: Jobs = await here.client.jobs()
            assert broker.pid is not None
            memory = Memory(here.node.pids | {"broker": broker.pid})
            room = asyncio.Semaphore(500)
            began = loop.time()

            async def publish(number: int) -> None:
                async with room:
                    await jobs.submit("three_calls", b"[%d]" % number, f"j{number}")

            await asyncio.gather(*(publish(number) for number in range(count)))
            accepted_s = loop.time() - began
            async with asyncio.timeout(1500):
                while await jobs.queue.depth():
                    memory.look()
                    await asyncio.sleep(0.5)
            done_s = loop.time() - began
            with capfd.disabled():
                print(f"\n{count:,} jobs: accepted in {accepted_s:.0f} s, done in {done_s:.0f} s, {count / done_s:.0f} jobs/s")
                print(f"MiB before: {memory.before}; at most: {memory.peak}")
            for name in here.node.names:
                assert memory.peak[name] < memory.before[name] + 128
            for number in range(0, count, 997):
                result = await jobs.result(f"j{number}")
                assert result is not None
                assert result.value == 8 * number
