"""Real worker processes that are drained, by command and by signal, and killed in the middle of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import PATIENCE_S, until

from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.supervision import Phase
from nalar_mq.errors import DrainError

APP = Path(__file__).parent / "apps" / "drain_app.py"
NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
SESSIONS = [f"s{number}" for number in range(12)]


def workers(client: Client) -> dict[str, bool]:
    """Whether each of them is drained."""
    return {name: m.draining for name, m in client.process.table.members.items() if m.role == "worker"}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "nalar_mq.cli", *map(str, words)] if not NALAR.exists() else [str(NALAR), *map(str, words)]


def broker_options(settings: Settings) -> tuple[str, ...]:
    url = settings.broker.urls[0].replace("://", f"://{settings.broker.token}@")
    return "--nats", url, "--namespace", settings.namespace


class Load:
    """Callers that call one after the other, sessions and tools; every call of a tool leaves a trace of its own."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client = client
        self._folder = folder
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.notes: dict[str, list[int]] = {session: [] for session in SESSIONS}
        self.traced: list[str] = []
        folder.mkdir()

    async def __aenter__(self) -> Load:
        work = [*(self._note(session) for session in SESSIONS), *(self._trace(number) for number in range(4))]
        self._tasks = [asyncio.create_task(one) for one in work]
        return self

    async def __aexit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._stopping.set()
        if error is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks)  # no call has failed

    async def _note(self, session: str) -> None:
        caller = self._client.options(session=session, timeout_s=PATIENCE_S)
        while not self._stopping.is_set():
            self.notes[session].append(await caller.call("Notebook.note", 0.01))

    async def _trace(self, number: int) -> None:
        caller = self._client.options(timeout_s=PATIENCE_S)
        while not self._stopping.is_set():
            self.traced.append(await caller.call("trace", str(self._folder), f"{number}-{len(self.traced)}", 0.02))

    async def grows(self) -> None:
        """Returns when every session has been called again, twice."""
        before = {session: len(notes) for session, notes in self.notes.items()}
        await until(lambda: all(len(self.notes[one]) > count + 1 for one, count in before.items()), "a session stands still")

    def check(self) -> None:
        """Every call ran once, and in order."""
        for notes in self.notes.values():
            assert notes == list(range(1, len(notes) + 1))
        for name in self.traced:
            assert (self._folder / name).read_text() == f"{name}\n"


@pytest.fixture
def settings(broker_access: BrokerAccess, namespace: str) -> Settings:
    return Settings(broker=broker_access, namespace=namespace, node="here")


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with connect(settings=settings) as client:
        yield client


async def run(*words: object) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, command(*words), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


async def test_a_worker_drained_by_command_under_load(settings: Settings, client: Client, tmp_path: Path) -> None:
    async with LocalController(APP, settings, workers=2, log_level="warning") as node:
        await node.ready()
        await until(lambda: len(workers(client)) == 2, "somebody is missing")
        load = Load(client, tmp_path / "traces")
        async with load:
            await load.grows()
            ended = await run("drain", "here-1", "--grace", "5", "--json", *broker_options(settings))
            assert ended.returncode == 0, ended.stderr
            assert msgspec.json.decode(ended.stdout)["stores"] == 1
            await load.grows()
        load.check()
        await until(lambda: node.phases["here-1"] is Phase.STOPPED, "the drained worker is started again")
        assert list(workers(client)) == ["here-2"]
        refused = await run("drain", "here-1", *broker_options(settings))
        assert refused.returncode == 1
        assert "there is no worker 'here-1'; workers are: here-2" in refused.stderr
        assert "Traceback" not in refused.stderr


async def test_one_of_two_nodes_is_stopped(settings: Settings, client: Client, tmp_path: Path) -> None:
    """The nodes have folders of their own, as on two machines: sessions move from one to the other."""
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in ("one", "two"):
            options = ("--node", name, "--workers", 1, "--state", tmp_path / name, "--outlive", 0, *broker_options(settings))
            with (tmp_path / f"{name}.log").open("w") as log:
                nodes[name] = subprocess.Popen(
                    command("worker", APP, *options),
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"NALAR_LOCAL_STORE": str(tmp_path / f"{name}-large")},
                )
        await until(lambda: len(workers(client)) == 2, "somebody is missing")
        load = Load(client, tmp_path / "traces")
        async with load:
            await load.grows()
            nodes["one"].send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(nodes["one"].wait, PATIENCE_S) == 0
            await load.grows()
        load.check()
        assert list(workers(client)) == ["two-1"]
    finally:
        for process in nodes.values():
            process.kill()
            process.wait()


async def test_a_node_whose_broker_is_gone_ends_and_says_so(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        log = tmp_path / "node.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                command("worker", APP, "--workers", 1, "--state", tmp_path / "state", *broker_options(settings)),
                stdout=file,
                stderr=file,
            )
        try:
            await until(lambda: "workers are ready" in log.read_text(), "it does not begin")
            await broker.aclose()
            await until(lambda: "jobs.pull_failed" in log.read_text(), "nobody has noticed")
            node.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(node.wait, PATIENCE_S) == 0
            assert "the broker is away: nobody can be told" in log.read_text()
        finally:
            node.kill()
            node.wait()


async def test_a_worker_killed_while_it_is_drained(settings: Settings, client: Client, tmp_path: Path) -> None:
    """Its sessions have one owner and all that was acknowledged."""
    async with LocalController(APP, settings, workers=2, log_level="error") as node:
        await node.ready()
        await until(lambda: len(workers(client)) == 2, "somebody is missing")
        notes: dict[str, Any] = {}
        for session in SESSIONS:
            notes[session] = await client.options(session=session).call("Notebook.note")
        long = [client.options(session=one, retries=3, timeout_s=PATIENCE_S).call("Notebook.note", 1.0) for one in SESSIONS]
        draining = asyncio.create_task(client.drain("here-1", grace_s=60.0))
        await until(lambda: workers(client)["here-1"], "it is not drained")
        os.kill(node.pids["here-1"], signal.SIGKILL)
        with pytest.raises(DrainError, match="was lost before"):
            await draining
        assert await asyncio.gather(*long) == [2] * len(SESSIONS)
        for session in SESSIONS:
            assert await client.options(session=session, timeout_s=PATIENCE_S).call("Notebook.note") == 3


@pytest.mark.slow
async def test_the_broker_is_killed_while_a_worker_is_drained(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        async with LocalController(APP, settings, workers=2, log_level="error") as node, connect(settings=settings) as client:
            await node.ready()
            await until(lambda: len(workers(client)) == 2, "somebody is missing")
            load = Load(client, tmp_path / "traces")
            async with load:
                await load.grows()
                held = [client.call("trace", str(tmp_path / "traces"), f"held{n}", 2.0) for n in range(4)]
                draining = asyncio.create_task(client.drain("here-1", grace_s=30.0))
                await until(lambda: workers(client)["here-1"], "it is not drained")
                assert broker.pid is not None
                os.kill(broker.pid, signal.SIGKILL)
                await draining
                await asyncio.gather(*held)
                await load.grows()
            load.check()
            await until(lambda: node.phases["here-1"] is Phase.STOPPED, "the drained worker is started again")
