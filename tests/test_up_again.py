"""`nalar up` is killed and started again in the same folder: what ends with it, what goes on, and what comes back."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import Running, is_gone
from waiting import PATIENCE_S, eventually, until

from nalar_mq.broker import read_runtime_file
from nalar_mq.client import connect
from nalar_mq.config import Settings

APP = """
import os

from nalar_mq import ManagedList, agent, method


@agent(retries=1)
class Desk:
    notes: ManagedList[str]

    @method
    async def add(self, note: str) -> tuple[int, list[str]]:
        self.notes.append(note)
        return os.getpid(), list(self.notes)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody ends the children of a killed parent")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    (tmp_path / "flow.py").write_text(APP)
    commands: list[Running] = []
    children: list[psutil.Process] = []

    def begin(*words: str) -> Running:
        commands.append(Running(*words, cwd=tmp_path))
        commands[-1].says("are ready")
        children.extend(commands[-1].children())
        return commands[-1]

    yield begin
    for command in reversed(commands):
        if command.process.poll() is None:
            command.end()
    for child in children:
        if not is_gone(child):
            child.kill()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


async def test_stores_are_taken_over_at_once_and_nodes_and_clients_come_back(
    begin: Callable[..., Running], tmp_path: Path
) -> None:
    words = ("up", "flow.py", "--workers", "2", "--port", free_port())
    first = await asyncio.to_thread(begin, *words)
    await asyncio.to_thread(begin, "worker", "flow.py", "--workers", "1", "--node", "beside")
    running = read_runtime_file(tmp_path)
    assert running is not None
    sessions = [f"s{number}" for number in range(12)]
    async with connect(settings=Settings(broker=running.access, namespace=running.namespace)) as client:
        await client.wait_for("Desk")

        async def note(text: str) -> list[tuple[int, list[str]]]:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.gather(*[client.options(session=name).call("Desk.add", text) for name in sessions])

        members = client.process.table.members
        await until(lambda: len(client.process.table.replicas("Desk")) == 3, "one is missing")
        beside = members["beside-1"].pid
        before = await note("first")
        ends = first.children()
        await asyncio.to_thread(first.end, signal.SIGKILL)
        await until(lambda: all(map(is_gone, ends)), "a child goes on")
        await asyncio.to_thread(begin, *words)
        after = await note("second")
        assert [notes for _, notes in after] == [["first", "second"]] * len(sessions)
        assert {pid for pid, _ in after} & {pid for pid, _ in before} <= {beside}
        await until(lambda: "beside-1" in members, "it does not come back")
        assert members["beside-1"].pid == beside


def test_workers_that_have_lost_both_their_controller_and_their_broker_end(
    begin: Callable[..., Running], tmp_path: Path
) -> None:
    up = begin("up", "flow.py", "--workers", "1", "--port", free_port())
    node = begin("worker", "flow.py", "--workers", "1", "--node", "beside", "--outlive", "1")
    workers = node.children()
    node.end(signal.SIGKILL)
    up.end(signal.SIGKILL)
    eventually(lambda: all(map(is_gone, workers)), "it is left for ever")
    begin("up", "flow.py", "--workers", "1", "--port", free_port())
    assert not (tmp_path / ".nalar" / "nodes").exists()
