"""A long job whose workers are killed at random moments: what its calls did is done once, and its result is right.

What ran, and where, is counted outside the processes: see `apps/witness.py`. Each show runs short in every test run and long
with `--slow`, where it prints its counts.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from waiting import until

from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from tests.witness import Witness

APPS = Path(__file__).parent / "apps"
SQUARES, ADDS = 6, 3  # in each round of the job, and one call more
KEY = "long"
PATIENCE_S = 100.0

Say = Callable[[str], None]


class Show(msgspec.Struct, frozen=True):
    """How long the job is, and how often its worker is killed."""

    rounds: int
    kills: int

    @property
    def tool_calls(self) -> int:
        return self.rounds * (SQUARES + 1)


SHORT = Show(rounds=4, kills=3)
FULL = Show(rounds=20, kills=20)


class Site:
    """The workers that are killed, others that are not, and who has been killed so far."""

    def __init__(self, nodes: Sequence[LocalController], client: Client, witness: Witness, rng: Random) -> None:
        self.nodes = nodes
        self.client = client
        self.witness = witness
        self.rng = rng
        self.dead: set[int] = set()

    def attempts(self) -> list[int]:
        """Who began to run the workflow, in order."""
        self.witness.read()
        return [pid for what, _, pid in self.witness.lines if what == "attempt"]

    def gone(self) -> set[int]:
        """Who has run something and lives no more; a loaded machine may lose a worker by itself."""
        self.witness.read()
        alive = {pid for node in self.nodes for pid in node.pids.values()}
        return {pid for *_, pid in self.witness.lines} - alive

    def runs_of(self, is_effect: bool) -> dict[str, list[int]]:
        return {key: pids for key, pids in self.witness.runs().items() if key.startswith("effect/") == is_effect}

    async def until(self, condition: Callable[[], object], what: str) -> None:
        await until(condition, lambda: f"{what}; attempts: {len(self.attempts())}, runs: {len(self.witness.runs())}")

    def runner(self) -> int | None:
        """Who runs the workflow, if anybody does."""
        pid = next(reversed(self.attempts()), None)
        return pid if pid not in self.dead and pid in self.nodes[0].pids.values() else None

    async def runs(self, job: asyncio.Future[Any]) -> None:
        await self.until(lambda: self.runner() is not None or job.done(), "nobody went on with the job")

    async def kill_at(self, share: int, job: asyncio.Future[Any]) -> None:
        """Kills who runs the workflow, some time after so many calls have begun."""
        await self.until(lambda: len(self.witness.runs()) >= share or job.done(), "the job stands still")
        await self.runs(job)
        await asyncio.sleep(self.rng.uniform(0.0, 0.3))
        await self.runs(job)
        pid = self.runner()
        assert pid is not None, f"it ended too early: {job}"
        self.dead.add(pid)
        os.kill(pid, signal.SIGKILL)

    def check_result(self, show: Show, result: dict[str, Any]) -> None:
        folded = 0
        for order in result["orders"]:
            assert sorted(order) == list(range(SQUARES))
            for n in order:
                folded = (folded * 31 + n) % 1_000_003
        assert len(result["orders"]) == show.rounds
        assert result["folded"] == folded
        adds = range(show.rounds * ADDS)
        assert result["counts"] == [[n + 1, sum(adds[: n + 1])] for n in adds]

    async def check_tally(self, show: Show) -> None:
        total, numbers = await self.client.options(session=KEY, retries=5).call("Tally.read")
        assert numbers == list(range(show.rounds * ADDS)), "an agent's call had its effect twice, or not at all"
        assert total == sum(numbers)

    def check_runs(self, show: Show, result: dict[str, Any]) -> None:
        """Another attempt makes the calls that the former one made, and no others; only what a lost worker ran runs again."""
        assert len(self.runs_of(is_effect=False)) == show.tool_calls
        effects = self.runs_of(is_effect=True)
        assert len(effects) == show.rounds
        assert result["effects"] == [pids[-1] for pids in effects.values()]
        assert self.witness.unexplained(self.gone()) == {}, "something ran twice although whoever had it first lived on"
        assert self.witness.unended() == list(effects)

    async def check_left(self) -> None:
        """Nothing is left over."""
        jobs = await self.client.jobs()
        async with asyncio.timeout(PATIENCE_S):
            while await jobs.queue.depth() or (await jobs.overview()).running:
                await asyncio.sleep(0.1)
        assert [letter async for letter in jobs.dead_letters()] == []

    def counts(self, show: Show) -> str:
        def times(is_effect: bool) -> dict[int, int]:
            return dict(sorted(Counter(len(pids) for pids in self.runs_of(is_effect).values()).items()))

        return (
            f"a job of {show.rounds * (SQUARES + ADDS + 1)} calls and {show.rounds} effects; {len(self.dead)} kills, "
            f"{len(self.attempts())} attempts; calls of tools by how often they ran: {times(False)}; effects: {times(True)}; "
            f"adds to the tally: {show.rounds * ADDS}, each once"
        )


@asynccontextmanager
async def site(settings: Settings, folder: Path, rng: Random, killed: str, spared: str = "") -> AsyncIterator[Site]:
    """Two workers that serve the app `killed`, and one, if there is such an app, that serves `spared`."""
    witness = Witness(folder / "witness")

    def node(app: str, workers: int) -> LocalController:
        named = msgspec.structs.replace(settings, node=app)
        variables = {"WITNESS": str(witness.file)}
        return LocalController(APPS / f"{app}.py", named, workers=workers, variables=variables, log_level="error")

    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(app, workers)) for app, workers in ((killed, 2), (spared, 1)) if app]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(node.ready() for node in nodes))
        client = await stack.enter_async_context(connect(settings=settings))
        yield Site(nodes, client, witness, rng)


async def run(here: Site, show: Show) -> dict[str, Any]:
    """The result of the job, whose worker is killed so many times, spread over its calls."""
    handle = await here.client.submit("long_job", KEY, show.rounds, 0.3, job_id=KEY)
    job = asyncio.ensure_future(handle.result())
    shares = sorted(here.rng.sample(range((show.rounds - 2) * (SQUARES + 2)), show.kills))
    for share in shares:
        await here.kill_at(share, job)
    async with asyncio.timeout(PATIENCE_S):
        result = await job
    assert isinstance(result, dict)
    return result


shows = pytest.mark.parametrize(
    "show",
    [pytest.param(SHORT, id="short"), pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], show: Show) -> Say:
    def aloud(text: str) -> None:
        if show != SHORT:
            with capfd.disabled():
                print(f"\n{text}", flush=True)

    return aloud


async def check(here: Site, show: Show, result: dict[str, Any]) -> None:
    here.check_result(show, result)
    here.check_runs(show, result)
    await here.check_tally(show)
    await here.check_left()
    assert len(here.dead) == show.kills


@shows
async def test_a_job_whose_worker_is_killed_again_and_again(
    show: Show, say: Say, broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    """Nobody kills those who run its tools, so no tool runs twice."""
    rng = Random(namespace if show == SHORT else "killed workflows")
    settings = Settings(broker=broker_access, namespace=namespace)
    async with site(settings, tmp_path, rng, killed="long_job", spared="long_job_tools") as here:
        await check(here, show, await run(here, show))
        say(f"kill -9 of the worker of the workflow: {here.counts(show)}")


@shows
async def test_a_job_whose_tools_are_killed_with_it(
    show: Show, say: Say, broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    rng = Random(namespace if show == SHORT else "killed with the tools")
    settings = Settings(broker=broker_access, namespace=namespace)
    async with site(settings, tmp_path, rng, killed="long_job_whole") as here:
        await check(here, show, await run(here, show))
        say(f"kill -9 of the worker of the workflow and its tools: {here.counts(show)}")
