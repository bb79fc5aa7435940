"""Code that blocks the loop of a worker: it is named while it does, and nothing else is."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from structlog.testing import capture_logs
from waiting import until

from nalar_mq.app import load_app
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.loop_watch import LoopWatch
from nalar_mq.worker import Worker

APP = """
import time

from nalar_mq import tool, workflow

BEGUN = []


def wait(seconds):
    BEGUN.append(seconds)
    time.sleep(seconds)


@workflow
async def blocks(seconds: float) -> str:
    wait(seconds)
    return "done"


@tool
def has_a_thread(seconds: float) -> str:
    wait(seconds)
    return "done"
"""


async def test_the_call_that_blocks_the_loop_of_a_worker_is_named(
    tmp_path: Path, broker_access: BrokerAccess, namespace: str
) -> None:
    (tmp_path / "blocking_app.py").write_text(APP)
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    with capture_logs() as logs:
        async with Worker(load_app(tmp_path / "blocking_app.py"), settings, name="w"), connect(settings=settings) as client:
            await client.wait_for("blocks", 60.0)
            assert await client.call("has_a_thread", 3.5) == "done"
            assert not [entry for entry in logs if entry["event"].startswith("loop.")]
            assert await client.call("blocks", 3.5) == "done"
            await until(lambda: any(entry["event"] == "loop.turns_again" for entry in logs))
    blocked, again = (entry for entry in logs if entry["event"].startswith("loop."))
    line = APP.splitlines().index("    time.sleep(seconds)") + 1
    assert (blocked["event"], blocked["call"], blocked["worker"]) == ("loop.blocked", "blocks", "w")
    assert blocked["at"] == f"{tmp_path / 'blocking_app.py'}:{line}"
    assert again["event"] == "loop.turns_again"


async def test_a_loop_that_turns_is_not_told_of() -> None:
    watch = LoopWatch(asyncio.get_running_loop(), "w", blocked_s=1.0)
    with capture_logs() as logs:
        watching = threading.Thread(target=lambda: asyncio.run(_for_a_while(watch)))
        watching.start()
        while watching.is_alive():
            time.sleep(0.05)
            await asyncio.sleep(0)
    assert logs == []


async def _for_a_while(watch: LoopWatch) -> None:
    try:
        async with asyncio.timeout(2.5):
            await watch.run()
    except TimeoutError:
        pass
