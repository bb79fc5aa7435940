"""Calls that outlast every lease, heartbeat and wait of the system run once, whether they let others run or not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from waiting import until

from nalar_mq.client import Client, connect
from nalar_mq.config import LEASE_S, BrokerAccess, Settings
from nalar_mq.intake import IntakeOptions
from tests.witness import Witness

APP = Path(__file__).parent / "apps" / "witness.py"
PATIENCE_S = 100.0
QUICK_LEASE_S = 2.0

WORKER = """
import asyncio, sys
import msgspec
from pathlib import Path
from nalar_mq.app import load_app
from nalar_mq.config import Settings
from nalar_mq.intake import IntakeOptions
from nalar_mq.worker import Worker

async def main():
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    intake = msgspec.json.decode(sys.argv[2], type=IntakeOptions)
    async with Worker(load_app(Path(sys.argv[3])), settings, name=sys.argv[4], intake=intake) as worker:
        await worker.closed

asyncio.run(main())
"""


@asynccontextmanager
async def two_workers(settings: Settings, intake: IntakeOptions) -> AsyncIterator[Client]:
    words = [msgspec.json.encode(options).decode() for options in (settings, intake)]
    command = (sys.executable, "-c", WORKER, *words, str(APP))
    workers = [await asyncio.create_subprocess_exec(*command, name) for name in ("one", "two")]
    try:
        async with connect(settings=settings) as client:
            await until(lambda: len(client.process.table.replicas("square")) >= len(workers), "a worker is missing")
            yield client
            assert [worker.returncode for worker in workers] == [None, None]
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Witness:
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    return Witness(tmp_path / "witness")


LONG = [
    pytest.param(QUICK_LEASE_S, IntakeOptions(ack_wait_s=1.5, look_again_s=0.2), id="short waits"),
    pytest.param(LEASE_S, IntakeOptions(), id="as it is", marks=[pytest.mark.slow, pytest.mark.timeout(200)]),
]


@pytest.mark.parametrize(("lease_s", "intake"), LONG)
async def test_a_call_longer_than_every_wait_runs_once(
    lease_s: float, intake: IntakeOptions, broker_access: BrokerAccess, namespace: str, witness: Witness
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=lease_s)
    seconds = 3.5 * max(lease_s, intake.ack_wait_s, intake.look_again_s)
    async with two_workers(settings, intake) as client, asyncio.timeout(PATIENCE_S):
        call = client.options(retries=3).call("square", "call", 2, seconds)
        job = await client.submit("patient", "job", seconds, job_id="job")
        assert (await call, await job.result()) == (4, 9)
        assert witness.runs().keys() == {"call", "job"}
        assert witness.repeated() == {}


@pytest.mark.parametrize(("lease_s", "intake"), LONG)
async def test_a_call_that_blocks_its_loop_for_three_leases_runs_once(
    lease_s: float, intake: IntakeOptions, broker_access: BrokerAccess, namespace: str, witness: Witness
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=lease_s)
    seconds = 3 * max(lease_s, intake.ack_wait_s)
    async with two_workers(settings, intake) as client, asyncio.timeout(PATIENCE_S):
        call = client.options(retries=3).call("hog", "call", seconds)
        job = await client.submit("hogged", "job", seconds, job_id="job")
        assert (await call, await job.result()) == ("done", "done")
        assert witness.runs().keys() == {"call", "job"}
        assert witness.repeated() == {}
