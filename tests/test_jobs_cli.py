"""The commands for jobs, as processes beside a runtime; and a broker that does not keep what it acknowledges."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from commands import Running, Shell, nalar
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
    eventually(lambda: shell.json("dead-letters", "ls"), "there is no letter")  # it comes after the result
    [letter] = shell.json("dead-letters", "ls")
    assert (letter["key"], letter["failed_at"]) == (
        "b1",
        datetime.fromisoformat(letter["failed_at"]).isoformat("T", "milliseconds"),
    )
    assert letter["failed_at"] in shell("dead-letters", "ls").stdout
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


def test_jobs_of_lines_that_fail(shell: Shell) -> None:
    done = shell("submit", "answer", "--file", "-", "--wait", stdin='["a"]\n[1]\n["b"]\n', code=1)
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["done", "failed", "done"]
    assert "3 accepted, 3 ended, 1 failed\n" in done.stderr
    done = shell("submit", "broken", "--file", "-", "--wait", "--progress", stdin='["a"]\n["b"]\n', code=1)
    assert "2 accepted, 2 ended, 2 failed" in done.stderr
    shell("submit", "broken", "--file", "-", stdin='["a"]\n')


def test_arguments_larger_than_a_message(shell: Shell) -> None:
    """The line that is meant is named, and what to do."""
    text = json.dumps(["x" * 2_000_000])
    for done in (
        shell("submit", "answer", "--file", "-", stdin=f'["a"]\n\n{text}\n', code=2),
        shell("submit", "answer", "--json", text, code=2),
    ):
        assert "2,000,004 bytes" in done.stderr
        assert "pass a path or a key to the data instead" in done.stderr
        assert "line 3: " in shell("submit", "answer", "--file", "-", stdin=f"[]\n[]\n{text}", code=2).stderr


def test_what_is_said_of_jobs_that_go_on_or_were_there_before(shell: Shell) -> None:
    waiting = Running("submit", "gated", "z-1", "--id", "z", "--wait", cwd=shell.folder)
    waiting.says("job z\n")
    eventually(lambda: shell.json("status", "z")["state"] == "running", "it never began")
    assert waiting.end(signal.SIGINT) == 130
    assert "job z goes on: `nalar result z --wait`" in waiting.said
    assert "job z was there before and has begun" in shell("submit", "gated", "z-2", "--id", "z").stderr
    assert "is cancelled" in shell("cancel", "z").stderr
    again = shell("submit", "gated", "z-3", "--id", "z")
    assert again.stdout == "z\n"
    assert "job z was there before and has ended: it is cancelled; the same id is the same job" in again.stderr


def test_a_folder_in_which_an_app_is_up_names_it(shell: Shell) -> None:
    elsewhere = Shell(shell.folder.parent)
    assert elsewhere("submit", "answer", "why", "--id", "f", "--wait", "--app", shell.folder).stdout
    assert [job["id"] for job in elsewhere.json("jobs", "--app", shell.folder)["ended"]] == ["f"]
    assert elsewhere.json("ps", "--app", shell.folder)["members"]
    assert "there is no such file" in elsewhere("ps", "--app", ".", code=2).stderr


def test_classes_of_the_app_that_is_up_here_can_be_read(shell: Shell) -> None:
    """In a process that has not loaded it."""
    found = nalar("call", "move", 'point:={"x": 1, "y": 2}', "by=3", cwd=shell.folder)
    assert json.loads(found.stdout) == {"x": 4, "y": 2}
    failed = nalar("call", "unfit", "oh", cwd=shell.folder, code=1)
    assert failed.stderr.startswith("nalar: error: unfit failed: UnfitError: (5, 'oh')\n       at ")
    assert re.search(r"jobs_app\.py:\d+$", failed.stderr.rstrip())
    url = json.loads((shell.folder / ".nalar" / "runtime.json").read_text())
    elsewhere = {"NATS_URL": url["url"], "NATS_TOKEN": url["token"]}
    unread = nalar("call", "move", 'point:={"x": 1}', "by=3", cwd=shell.folder.parent, code=1, **elsewhere)
    assert "what move gave cannot be read here" in unread.stderr
    assert "--app APP" in unread.stderr


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
