"""The commands for jobs, as processes beside a runtime; and a broker that does not keep what it acknowledges."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Running, Shell
from waiting import eventually

from nalar_mq import nats_connection
from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker, find_nats_server
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings, trusts_broker
from nalar_mq.errors import BrokerFeatureError
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "jobs_app.py"
PATIENCE_S = 60.0


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shutil.copy(APP, tmp_path)
    up = Running("up", APP.name, "--workers", "1", cwd=tmp_path)
    try:
        up.says("ready")
        yield Shell(tmp_path)
    finally:
        up.end()


@pytest.mark.timeout(300)
def test_jobs_by_the_command_line(shell: Shell) -> None:
    assert json.loads(shell("submit", "answer", "question=why", "--wait").stdout) == {"answer": "WHY", "score": 2}
    assert shell("submit", "gated", "a-1", "--id", "g1").stdout == "g1\n"
    eventually(lambda: shell.json("status", "g1")["state"] == "running", "it never began")
    assert "has not ended: it is running" in shell("result", "g1", code=2).stderr
    assert [job["id"] for job in shell.json("jobs")["running"]] == ["g1"]
    assert "is cancelled" in shell("cancel", "g1").stderr
    assert "had ended already" in shell("cancel", "g1").stderr
    assert shell.json("status", "g1")["state"] == "cancelled"
    assert "CallCancelledError" in shell("result", "g1", code=1).stderr
    assert "there is no job 'never'" in shell("status", "never", code=1).stderr
    assert "KeyError" in shell("submit", "broken", "x", "--id", "b1", "--wait", code=1).stderr
    assert [letter["key"] for letter in shell.json("dead-letters", "ls")] == ["b1"]
    assert "1 published again\n" in shell("dead-letters", "retry", "b1").stderr
    assert "KeyError" in shell("result", "b1", "--wait", code=1).stderr
    assert "1 removed" in shell("dead-letters", "drop", "b1").stderr
    assert "by their keys" in shell("dead-letters", "drop", code=2).stderr
    assert "g1" in shell("jobs").stdout


def test_questions_by_the_command_line(shell: Shell) -> None:
    shell("submit", "may_i", "what=go", "--id", "m1")
    while not (found := shell.json("ps", "--waiting")):
        time.sleep(0.05)
    [question] = found
    assert (question["text"], question["asker"], question["job"]) == ("May I go?", "may_i", "m1")
    assert question["schema"] == {"type": "boolean"}
    assert "boolean is wanted at $, not 3" in shell("answer", question["id"], "3", code=1).stderr
    assert "a text needs quotes" in shell("answer", question["id"], "yes", code=2).stderr
    assert "is answered" in shell("answer", question["id"], "true").stderr
    assert "answered before" in shell("answer", question["id"], "false", code=1).stderr
    assert shell("result", "m1", "--wait").stdout.strip() in ("yes", '"yes"')
    assert "May I go?" not in shell("ps", "--waiting").stdout


def test_a_job_of_every_line(shell: Shell) -> None:
    lines = "".join(f"[{number}]\n\n" for number in range(300))
    done = shell("submit", "three_calls", "--file", "-", "--id", "l", "--wait", "--progress", stdin=lines)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["id"] for result in results] == [f"l-{2 * number + 1}" for number in range(300)]
    assert [result["value"] for result in results] == [8 * number for number in range(300)]
    assert "300 accepted, 300 ended" in done.stderr
    ids = shell("submit", "three_calls", "--file", "-", "--id", "l", stdin=lines).stdout.split()
    assert ids == [result["id"] for result in results]
    assert "line 2 is not JSON" in shell("submit", "answer", "--file", "-", stdin='["x"]\n{', code=2).stderr


# A broker that does not sync


@pytest.mark.parametrize("syncs", [True, False])
async def test_jobs_need_a_broker_that_keeps_them(syncs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, monitor = first.getsockname()[1], second.getsockname()[1]
    interval = "sync_interval: always" if syncs else ""
    config = tmp_path / "broker.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\nhttp: "127.0.0.1:{monitor}"\njetstream {{ store_dir: "{tmp_path}"\n{interval} }}\n'
    )
    monkeypatch.setattr(nats_connection, "_MONITOR_PORT", monitor)
    server = await asyncio.create_subprocess_exec(find_nats_server(), "-c", config, stderr=subprocess.DEVNULL)
    settings = Settings(broker=BrokerAccess(urls=(f"nats://127.0.0.1:{port}",)), node="here")
    trusting = Settings(broker=settings.broker, node="here", trust_broker=True)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                except OSError:
                    await asyncio.sleep(0.05)
            app = load_app(APP)
            async with connect(settings=settings) as client, Worker(app, settings, name="careful", lease_in_thread=False):
                assert await client.process.transport.syncs() is syncs
                assert await client.call("double", 1) == 2
                if syncs:
                    assert await (await client.submit("three_calls", 1)).result() == 8
                    return
                with pytest.raises(BrokerFeatureError, match="NALAR_TRUST_BROKER"):
                    await client.submit("three_calls", 1)
            async with connect(settings=trusting) as client, Worker(app, trusting, name="trusting", lease_in_thread=False):
                assert await (await client.submit("three_calls", 1)).result() == 8
    finally:
        server.terminate()
        await server.wait()


async def test_another_server_on_the_monitoring_port_says_nothing_of_ours(
    broker_access: BrokerAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EmbeddedBroker(tmp_path) as broker:
        monkeypatch.setattr(nats_connection, "_MONITOR_PORT", int(broker.url.rpartition(":")[2]))
        transport = await NatsTransport.connect(broker_access, name="asks")
        assert await transport.syncs() is None
        await transport.aclose()


async def test_two_may_ask_the_monitoring_at_once(broker_access: BrokerAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds a package that does not have its module yet, which the first still loads."""
    monkeypatch.setattr(nats_connection, "_MONITOR_PORT", 1)
    monkeypatch.delattr(urllib, "request")
    transport = await NatsTransport.connect(broker_access, name="asks")
    assert await transport.syncs() is None
    await transport.aclose()


def test_trust_is_given_by_hand_or_by_the_environment() -> None:
    assert trusts_broker(True, environ={})
    assert trusts_broker(environ={"NALAR_TRUST_BROKER": "1"})
    assert not trusts_broker(environ={"NALAR_TRUST_BROKER": "0"})
    assert not trusts_broker(environ={})
