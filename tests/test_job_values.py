"""Large values in jobs: of their calls, which outlive every process, and of the jobs themselves, which any client can read."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until

from nalar_mq import errors, jobs
from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.intake import IntakeOptions
from nalar_mq.job_values import job_of, name_of
from nalar_mq.jobs import JobResult
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import ObjectStore, Transport
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "large_jobs_app.py"
SIZE = 700_000
PATIENCE_S = 60.0
QUICK = IntakeOptions(ack_wait_s=1.5, look_again_s=0.2, back_off_s=0.05)


class Site:
    """Workers that serve a part of the app each, every one on a machine of its own, and a client."""

    client: Client

    def __init__(self, settings: Settings, hub: MemoryHub, connect: Callable[[str], Awaitable[Transport]], root: Path) -> None:
        self.app = load_app(APP)
        self.actors: Any = importlib.import_module("large_jobs_app")
        self.settings = settings
        self.hub = hub
        self.connect = connect
        self.root = root
        self.stack = AsyncExitStack()

    async def serve(self, name: str, *kinds: str) -> Worker:
        specs = {key: spec for key, spec in self.app.actors.items() if not kinds or spec.kind in kinds}
        settings = msgspec.structs.replace(self.settings, local_store=str(self.root / name))
        worker = Worker(
            App(self.app.path, specs), settings, name=name, intake=QUICK, connect=self.connect, lease_in_thread=False
        )
        return await self.stack.enter_async_context(worker)

    async def run(self, workflow: str, *args: object) -> Any:
        return await (await self.client.submit(workflow, *args)).result(timeout=PATIENCE_S)

    async def ran(self, line: str, times: int = 1) -> None:
        await until(lambda: self.actors.RUNS.count(line) >= times)

    async def store(self, kind: str) -> ObjectStore:
        return await self.client.process.transport.object_store(f"{self.settings.namespace}-{kind}")

    async def emptied(self, kind: str = "claims") -> None:
        store = await self.store(kind)

        async def nothing() -> bool:
            return await store.names() == []

        await until(nothing)


@pytest.fixture(params=["memory", "nats"])
async def site(
    request: pytest.FixtureRequest, namespace: str, broker_access: BrokerAccess, tmp_path: Path
) -> AsyncIterator[Site]:
    async for made in _site(request.param == "memory", namespace, broker_access, tmp_path):
        yield made


@pytest.fixture
async def losable(namespace: str, broker_access: BrokerAccess, tmp_path: Path) -> AsyncIterator[Site]:
    """A site whose workers can be killed: on the broker in memory."""
    async for made in _site(True, namespace, broker_access, tmp_path):
        yield made


async def _site(in_memory: bool, namespace: str, access: BrokerAccess, root: Path) -> AsyncIterator[Site]:
    hub = MemoryHub(seed=5)

    async def over_nats(name: str) -> Transport:
        return await NatsTransport.connect(access, name=name)

    settings = Settings(broker=access, namespace=namespace, node="here", lease_s=1.5, local_store=str(root / "client"))
    made = Site(settings, hub, hub.connect if in_memory else over_nats, root)
    made.actors.RUNS.clear()
    made.actors.GATES.clear()
    async with made.stack:
        made.client = await made.stack.enter_async_context(connect(settings=settings, connect=made.connect))
        yield made


# Values of calls.


async def test_every_way_a_large_value_can_go_in_a_job(site: Site) -> None:
    await site.serve("tools", "tool", "agent")
    await site.serve("driver", "workflow")
    assert await site.run("every_way", SIZE) == [SIZE, SIZE, SIZE, 2 * SIZE, SIZE, SIZE]
    await site.emptied()


async def test_values_belong_to_the_job_and_go_when_it_ends(site: Site) -> None:
    await site.serve("all")
    handle = await site.client.submit("interrupted", SIZE, "g", job_id="mine")
    store = await site.store("claims")
    await site.ran("weigh 2")

    async def kept() -> bool:
        return len(await store.names()) == 3  # two that were made, and one again as the arguments of a call

    await until(kept)
    assert {job_of(name) for name in await store.names()} == {"mine"}
    assert [path.name for path in (site.root / "all").glob("*.job.*")] == [], "it lies where another machine cannot read it"
    site.actors.gate("g").set()
    assert await handle.result(timeout=PATIENCE_S) == [SIZE, SIZE, SIZE + 1]
    await site.emptied()


async def test_values_of_a_job_that_fails_go_when_it_is_dead(site: Site) -> None:
    await site.serve("all")
    with pytest.raises(errors.RemoteError, match="never"):
        await site.run("fails", SIZE)
    assert site.actors.RUNS.count("make 9") == 1, "the second attempt made again what had succeeded"
    await site.emptied()


async def test_a_cancelled_job_leaves_no_values(site: Site) -> None:
    worker = await site.serve("all")
    handle = await site.client.submit("waits", SIZE, "g")
    await site.ran("held g", 2)
    assert len(await (await site.store("claims")).names()) == 1
    assert await handle.cancel()
    await until(lambda: worker.running == 0)
    await site.emptied()


async def test_calls_that_are_given_the_same_share_what_is_stored(site: Site) -> None:
    await site.serve("all")
    handle = await site.client.submit("waits", SIZE, "g")
    await site.ran("held g", 2)
    assert len(await (await site.store("claims")).names()) == 1
    site.actors.gate("g").set()
    assert await handle.result(timeout=PATIENCE_S) == 2 * SIZE
    await site.emptied()


# After losses.


async def test_a_large_outcome_is_seen_again_by_another_machine(losable: Site) -> None:
    await losable.serve("tools", "tool")
    await losable.serve("driver", "workflow")
    handle = await losable.client.submit("interrupted", SIZE, "g")
    await losable.ran("weigh 2")
    await until(lambda: losable.client.process.table.replicas("make"))
    losable.hub.kill("driver")
    await losable.serve("driver2", "workflow")
    await losable.ran("interrupted g", 2)
    losable.actors.gate("g").set()
    assert await handle.result(timeout=PATIENCE_S) == [SIZE, SIZE, SIZE + 1]
    assert [losable.actors.RUNS.count(f"make {mark}") for mark in (1, 2)] == [1, 1]
    await losable.emptied()


async def test_large_outcomes_outlive_whoever_made_them(losable: Site) -> None:
    await losable.serve("tools", "tool")
    await losable.serve("driver", "workflow")
    handle = await losable.client.submit("interrupted", SIZE, "g")
    await losable.ran("weigh 2")
    losable.hub.kill("tools")
    losable.hub.kill("driver")
    await losable.serve("both", "tool", "workflow")
    await losable.ran("interrupted g", 2)
    losable.actors.gate("g").set()
    assert await handle.result(timeout=PATIENCE_S) == [SIZE, SIZE, SIZE + 1]
    assert losable.actors.RUNS.count("make 1") == 1


async def test_a_call_with_large_arguments_is_adopted(losable: Site) -> None:
    await losable.serve("tools", "tool")
    await losable.serve("driver", "workflow")
    handle = await losable.client.submit("waits", SIZE, "g")
    await losable.ran("held g", 2)
    losable.hub.kill("driver")
    await losable.serve("driver2", "workflow")
    await losable.ran("waits g", 2)
    losable.actors.gate("g").set()
    assert await handle.result(timeout=PATIENCE_S) == 2 * SIZE
    assert losable.actors.RUNS.count("held g") == 2, "the same arguments are the same call"


async def test_a_sweep_removes_what_the_killed_have_left(losable: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nalar_mq.claims._OBJECT_SWEEP", 1)
    store = await losable.store("claims")
    await store.put(name_of("ended", b"0" * 32), b"left behind")
    await store.put(name_of("runs", b"1" * 32), b"still needed")
    ended = await losable.client.jobs()
    await ended.finish(JobResult("ended", "w", "done", 1))
    await losable.serve("all")

    async def gone() -> bool:
        return [job_of(name) for name in await store.names()] == ["runs"]

    await until(gone)


async def test_values_outlive_killed_workers(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    """Processes that are killed; nothing is on the disk of the one that goes on."""
    log = tmp_path / "log"
    log.touch()
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=3.0)
    variables = {"LARGE_JOBS_LOG": str(log), "NALAR_LOCAL_STORE": "off"}
    async with LocalController(APP, settings, workers=2, variables=variables, log_level="error") as node:
        await node.ready()
        async with connect(settings=settings) as client, asyncio.timeout(PATIENCE_S):
            handle = await client.submit("interrupted", 3_000_000, "g")
            while "weigh 2" not in log.read_text():
                await asyncio.sleep(0.02)
            [driver] = [int(line.split()[-1]) for line in log.read_text().splitlines() if line.startswith("interrupted")]
            os.kill(driver, signal.SIGKILL)
            while log.read_text().count("interrupted g") < 2:
                await asyncio.sleep(0.02)
            Path(f"{log}-g").touch()
            assert await handle.result() == [3_000_000, 3_000_000, 3_000_001]
            makers = [line.split() for line in log.read_text().splitlines() if line.startswith("make 1")]
            assert len(makers) == 1, "a call whose outcome was journaled ran again"


# Values of jobs.


async def test_a_job_may_return_more_than_one_message_holds(site: Site) -> None:
    await site.serve("all")
    handle = await site.client.submit("returns", 3_000_000, 1, job_id="long")
    assert await handle.result(timeout=PATIENCE_S) == "A" * 3_000_000
    listed = await site.client.jobs()
    [ended] = (await listed.overview()).ended
    assert (ended.id, ended.value) == ("long", msgspec.UNSET) and ended.value_at
    await listed.forget_result("long")
    await site.emptied("results")


async def test_any_nats_client_can_read_it(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    """With nats-py alone, by what the result says of itself."""
    import nats

    async for site in _site(False, namespace, broker_access, tmp_path):
        await site.serve("all")
        await (await site.client.submit("returns", 3_000_000, 2, job_id="long")).result(timeout=PATIENCE_S)
        plain: Any = await nats.connect(broker_access.urls[0], token=broker_access.token)
        try:
            jetstream = plain.jetstream()
            found = await jetstream.get_last_msg(f"{namespace}-results", f"{namespace}.result.long")
            said = json.loads(found.data)
            at = said["value_at"]
            assert (said["state"], "value" in said) == ("done", False)
            read = await (await jetstream.object_store(at["bucket"])).get(at["object"])
            assert (len(read.data), hashlib.sha256(read.data).hexdigest()) == (at["size_bytes"], at["sha256"])
            assert json.loads(read.data) == "B" * 3_000_000
        finally:
            await plain.close()


async def test_of_two_ends_the_first_counts_and_the_other_leaves_nothing(site: Site) -> None:
    listed = await site.client.jobs()
    ends = [JobResult("twice", "w", "done", letter * 2_000_000) for letter in "ab"]
    counted = await asyncio.gather(*(listed.finish(end) for end in ends))
    assert sorted(counted) == [False, True]
    found = await listed.result("twice")
    assert found is not None and found.value_at
    assert (await listed.whole(found)).value == ends[counted.index(True)].value
    assert await (await site.store("results")).names() == [found.value_at.object]
    assert not await listed.finish(ends[counted.index(True)])
    assert (await listed.whole(found)).value == ends[counted.index(True)].value, "ending it again took the value away"


async def test_a_damaged_value_is_an_error_that_says_so(site: Site) -> None:
    listed = await site.client.jobs()
    await listed.finish(JobResult("hurt", "w", "done", "a" * 2_000_000))
    found = await listed.result("hurt")
    assert found is not None and found.value_at
    store = await site.store("results")
    await store.put(found.value_at.object, b'"b"')
    with pytest.raises(errors.ValueLostError, match="missing or damaged"):
        await (await site.client.job("hurt")).result(timeout=PATIENCE_S)
    await store.delete(found.value_at.object)
    with pytest.raises(errors.ValueLostError, match="missing or damaged"):
        await (await site.client.job("hurt")).result(timeout=PATIENCE_S)


async def test_beyond_the_limit_the_job_fails_and_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "VALUE_LIMIT_BYTES", 2_000_000)
    await site.serve("all")
    with pytest.raises(errors.RemoteError, match=r"ValueTooLargeError.*2,000,000"):
        await site.run("returns", 2_000_000)


@pytest.mark.parametrize("name", ["a.job." + "0" * 31, "a.1." + "0" * 32, ".job." + "0" * 32, "a.job.x/" + "0" * 30, ""])
def test_other_names_are_no_values_of_jobs(name: str) -> None:
    assert job_of(name) == ""
    assert job_of(name_of("a-job", b"\xff" * 32)) == "a-job"
