"""Calls and jobs at once while workers and the broker are killed or frozen: all of them end once and right.

Each show runs short in every test run and long with `--slow`, where it prints its counts. What ran, and where, is counted
outside the processes: see `apps/witness.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import pytest
from waiting import until

from nalar_mq import errors
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.supervision import Limits
from nalar_mq.nats_transport import NatsTransport
from tests.witness import Witness, result_of

APP = Path(__file__).parent / "apps" / "witness.py"
WORKERS = 3
CALLS_OF_A_JOB = 5
PATIENCE_S = 50.0

Say = Callable[[str], None]


class Load(msgspec.Struct, frozen=True):
    """What is under way while something goes wrong."""

    rounds: int
    calls: int
    jobs: int


SHORT = Load(rounds=1, calls=600, jobs=12)


class Site:
    """Three worker processes and a client, and who of the workers has died so far."""

    def __init__(self, node: LocalController, client: Client, witness: Witness) -> None:
        self.node = node
        self.client = client
        self.witness = witness
        self.dead: set[int] = set()
        self.frozen: set[int] = set()

    @property
    def incarnations(self) -> dict[str, int]:
        members = self.client.process.table.members
        return {name: member.incarnation for name, member in members.items() if member.role == "worker"}

    async def is_complete(self) -> None:
        """All workers are there, each in its present life."""
        await until(lambda: set(self.incarnations) == set(self.node.names) == set(self.node.pids), "somebody is missing")

    async def submit(self, key: str, n: int, seconds: float) -> int:
        """The result of a job that has been accepted; asked for again under its id if nobody said that it was."""
        while True:
            try:
                handle = await self.client.submit("steps", key, n, seconds, job_id=key)
                break
            except errors.BrokerError:
                continue
        value = await handle.result()
        assert isinstance(value, int)
        return value

    async def round(self, number: int, load: Load, harm: Callable[[], Awaitable[None]], moment: float) -> None:
        """Calls and jobs, and something that goes wrong when that share of them has begun."""
        before = self.witness.began()
        may_retry = self.client.options(retries=5)
        calls = [may_retry.call("square", f"c{number}-{n}", n, 0.1) for n in range(load.calls)]
        jobs = [asyncio.ensure_future(self.submit(f"j{number}-{n}", n, 0.1)) for n in range(load.jobs)]
        share = moment * (load.calls + load.jobs * CALLS_OF_A_JOB)
        await until(lambda: self.witness.began() - before >= share, "too few have begun")
        await harm()
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.gather(*calls) == [n * n for n in range(load.calls)]
            assert await asyncio.gather(*jobs) == [result_of(n) for n in range(load.jobs)]

    async def check(self, load: Load) -> None:
        """Everything has run, nothing without need twice, and nothing is left over."""
        jobs = await self.client.jobs()
        async with asyncio.timeout(PATIENCE_S):
            while await jobs.queue.depth() or (await jobs.overview()).running:
                await asyncio.sleep(0.1)
        assert [letter async for letter in jobs.dead_letters()] == []
        assert await self.results_written() == load.rounds * load.jobs, "a job ended twice"
        assert len(self.witness.runs()) == load.rounds * (load.calls + load.jobs * CALLS_OF_A_JOB)
        assert self.witness.unended() == []
        assert self.witness.unexplained(self.dead, self.frozen) == {}, (
            "something ran twice although whoever had it first lived on"
        )
        assert self.witness.repeated_in_spite_of_its_result() == {}

    async def results_written(self) -> int:
        """How many results the broker has ever taken, those that are not kept included."""
        transport = self.client.process.transport
        assert isinstance(transport, NatsTransport)
        stream = await transport.jetstream.stream_info(self.client.process.subjects.results_ledger)
        return int(stream.state.last_seq)

    def counts(self, load: Load) -> str:
        repeated = self.witness.repeated()
        calls = sum(key.startswith("c") for key in repeated)
        return (
            f"{load.rounds} times {load.calls:,} calls and {load.jobs} jobs of {CALLS_OF_A_JOB}: all right; {len(self.dead)} "
            f"workers lost; run again: {calls} calls, {len(repeated) - calls} calls of jobs; without need: "
            f"{len(self.witness.unexplained(self.dead, self.frozen))}"
        )

    # What goes wrong.

    async def kill(self, rng: Random) -> None:
        pid = rng.choice([pid for pid in self.node.pids.values() if psutil.pid_exists(pid)])
        self.dead.add(pid)
        os.kill(pid, signal.SIGKILL)

    async def freeze(self, rng: Random) -> int:
        """Returns when the others have given it up."""
        name = rng.choice(self.node.names)
        pid, before = self.node.pids[name], self.incarnations[name]
        self.dead.add(pid)
        self.frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: self.incarnations.get(name) != before, "the frozen worker was never given up")
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        return pid

    async def ends(self, pids: list[int]) -> None:
        await until(lambda: not any(map(psutil.pid_exists, pids)), "who was given up goes on")


@asynccontextmanager
async def site(broker: BrokerAccess, namespace: str, folder: Path, limits: Limits | None = None) -> AsyncIterator[Site]:
    witness = Witness(folder / "witness")
    settings = Settings(broker=broker, namespace=namespace, node="here")
    variables = {"WITNESS": str(witness.file)}
    async with LocalController(APP, settings, workers=WORKERS, limits=limits, variables=variables, log_level="error") as node:
        async with asyncio.timeout(PATIENCE_S):
            await node.ready()
        async with connect(settings=settings) as client:
            here = Site(node, client, witness)
            await here.is_complete()
            yield here


def shows(full: Load) -> Any:
    slow = [pytest.mark.slow, pytest.mark.timeout(60 + full.rounds * 90)]
    return pytest.mark.parametrize("load", [pytest.param(SHORT, id="short"), pytest.param(full, id="full", marks=slow)])


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], load: Load) -> Say:
    def aloud(text: str) -> None:
        if load != SHORT:
            with capfd.disabled():
                print(f"\n{text}", flush=True)

    return aloud


@shows(Load(rounds=20, calls=10_000, jobs=200))
async def test_killed_workers(load: Load, say: Say, broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    rng = Random(namespace if load == SHORT else "killed workers")
    async with site(broker_access, namespace, tmp_path) as here:
        for number in range(load.rounds):
            await here.round(number, load, lambda: here.kill(rng), rng.uniform(0.05, 0.9))
            await here.is_complete()
        await here.check(load)
        assert len(here.dead) == load.rounds
        say(f"kill -9 of a worker: {here.counts(load)}")


@shows(Load(rounds=5, calls=10_000, jobs=200))
async def test_killed_broker(load: Load, say: Say, tmp_path: Path) -> None:
    rng = Random("killed broker")
    async with (
        EmbeddedBroker(tmp_path / "broker", restart_attempts=50) as broker,
        site(broker.access, "killed", tmp_path) as here,
    ):
        incarnations = here.incarnations

        async def kill() -> None:
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            await until(lambda: not here.client.process.transport.is_connected, "the client never noticed")

        for number in range(load.rounds):
            await here.round(number, load, kill, rng.uniform(0.05, 0.9))
        await here.check(load)
        assert here.witness.repeated() == {}, "something ran twice although no worker was lost"
        assert here.incarnations == incarnations
        say(f"kill -9 of the broker: {here.counts(load)}")


@shows(Load(rounds=5, calls=10_000, jobs=200))
async def test_frozen_workers(load: Load, say: Say, broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    rng = Random("frozen workers")
    never_killed = Limits()
    async with site(broker_access, namespace, tmp_path, never_killed) as here:
        for number in range(load.rounds):
            frozen: list[int] = []

            async def freeze(frozen: list[int] = frozen) -> None:
                frozen.append(await here.freeze(rng))

            try:
                await here.round(number, load, freeze, rng.uniform(0.05, 0.9))
            finally:
                for pid in frozen:
                    os.kill(pid, signal.SIGCONT)
            await here.ends(frozen)
            await here.is_complete()
        await here.check(load)
        say(f"SIGSTOP of a worker past its lease, then SIGCONT: {here.counts(load)}")
