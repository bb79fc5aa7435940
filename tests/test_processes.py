"""Real processes that are killed, frozen and drained under load, each test with a runtime of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil
import pytest
from waiting import until

from nalar_mq import errors
from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import LEASE_S, BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.process import Process
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "fire.py"
WORKER = Path(__file__).parent / "apps" / "one_worker.py"
NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
PATIENCE_S = 60.0


async def within(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def outcome(future: Any) -> Any:
    try:
        return await future
    except Exception as error:
        return error


async def outcomes(futures: list[Any]) -> list[Any]:
    return list(await within(asyncio.gather(*map(outcome, futures))))


def traces(folder: Path) -> Counter[str]:
    """How often each line was left, by whatever process."""
    return Counter(line for file in folder.iterdir() for line in file.read_text().splitlines())


def incarnations(client: Client) -> dict[str, int]:
    return {name: member.incarnation for name, member in client.process.table.members.items() if member.role == "worker"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    return tmp_path / "traces"


@pytest.fixture
def settings(broker_access: BrokerAccess, namespace: str) -> Settings:
    return Settings(broker=broker_access, namespace=namespace, node="here")


@pytest.fixture
async def node(settings: Settings) -> AsyncIterator[LocalController]:
    """Two worker processes."""
    async with LocalController(APP, settings, workers=2, log_level="warning") as controller:
        await within(controller.ready())
        yield controller


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with connect(settings=settings) as client:
        yield client


class Program:
    """A process of the test's own, whose lines on stdout are read."""

    def __init__(self, *command: object, log: Path, **env: str) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*map(str, command)], stdout=out, stderr=subprocess.STDOUT, env=os.environ | env, stdin=subprocess.DEVNULL
            )

    async def says(self, text: str) -> None:
        await until(lambda: text in self.log.read_text() or self.process.poll() is not None, f"never said {text!r}")
        assert text in self.log.read_text(), self.log.read_text()

    async def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)


def by_hand(settings: Settings, log: Path, node: str) -> Program:
    """`nalar worker` with one worker process."""
    url = settings.broker.urls[0].replace("://", f"://{settings.broker.token}@")
    options = ("--nats", url, "--namespace", settings.namespace, "--node", node, "--workers", "1", "--outlive", "0")
    return Program(NALAR, "worker", APP, *options, log=log)


async def test_a_worker_killed_under_load(node: LocalController, client: Client, folder: Path) -> None:
    await client.wait_for("square")
    may_retry, may_not = client.options(retries=2), client.options(retries=0)
    retried = [may_retry.call("square", n, str(folder), 1.5) for n in range(200)]
    single = [may_not.call("square", 1000 + n, str(folder), 1.5) for n in range(200)]
    await until(lambda: len(traces(folder)) > 100, "nothing ever ran")
    os.kill(node.pids["here-1"], signal.SIGKILL)
    later = [may_retry.call("square", 2000 + n, str(folder), 0.01) for n in range(50)]

    assert await outcomes(retried) == [n * n for n in range(200)]
    assert await outcomes(later) == [(2000 + n) ** 2 for n in range(50)]
    found = await outcomes(single)
    lost = [result for result in found if isinstance(result, errors.WorkerLostError)]
    assert 0 < len(lost) < 200
    assert all("here-1" in str(error) for error in lost)
    assert [r for r in found if not isinstance(r, errors.WorkerLostError)] == [
        (1000 + n) ** 2 for n, r in enumerate(found) if not isinstance(r, errors.WorkerLostError)
    ]
    ended = traces(folder)
    assert all(ended[f"began {1000 + n}"] <= 1 for n in range(200)), "a call that may not be retried ran twice"
    await until(lambda: len(incarnations(client)) == 2, "the killed worker never came back")


async def test_calls_of_a_worker_that_stops_go_elsewhere(settings: Settings, client: Client, folder: Path) -> None:
    first = Worker(load_app(APP), settings, name="first")
    await first.start()
    try:
        await client.wait_for("square")
        retried = [client.options(retries=1).call("square", n, str(folder), 1.0) for n in range(10)]
        single = [client.call("endure", str(n), str(folder)) for n in range(10)]
        await until(lambda: len(traces(folder)) == 20, "some never began")
        async with Worker(load_app(APP), settings, name="second"):
            await until(lambda: len(incarnations(client)) == 2, "the second never joined")
            await first.aclose()
            assert await outcomes(retried) == [n * n for n in range(10)]
            found = await outcomes(single)
            assert all(isinstance(error, errors.WorkerLostError) for error in found), found
    finally:
        await first.aclose()


async def test_a_worker_frozen_beyond_its_lease_is_killed_and_has_a_successor(
    node: LocalController, client: Client, folder: Path
) -> None:
    await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
    before, pids = incarnations(client), node.pids
    done = [client.call("square", n, str(folder)) for n in range(50)]
    assert await outcomes(done) == [n * n for n in range(50)]

    retried = [client.options(retries=1).call("square", 100 + n, str(folder), 0.5) for n in range(40)]
    single = [client.call("square_in_thread", 200 + n, str(folder), 2.5) for n in range(20)]
    await until(lambda: sum(traces(folder)[f"began {n}"] for n in range(200, 220)) == 20, "some never began")
    os.kill(pids["here-1"], signal.SIGSTOP)
    assert await outcomes(retried) == [(100 + n) ** 2 for n in range(40)]
    found = await outcomes(single)
    assert {type(result) for result in found} <= {int, errors.WorkerLostError}
    assert any(isinstance(result, errors.WorkerLostError) for result in found)

    await until(lambda: incarnations(client).get("here-1", 0) > before["here-1"], "it has no successor")
    assert incarnations(client)["here-2"] == before["here-2"]
    assert node.pids["here-1"] != pids["here-1"]
    assert not psutil.pid_exists(pids["here-1"])
    ran = traces(folder)
    assert all(ran[f"began {n}"] == ran[f"ended {n}"] == 1 for n in range(50))
    served = set[int]()
    async with asyncio.timeout(PATIENCE_S):
        while served != set(node.pids.values()):
            served.add(await client.call("who"))


async def test_calls_wait_for_a_killed_broker_and_go_on(tmp_path: Path, folder: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        async with LocalController(APP, settings, workers=2, log_level="error") as node, connect(settings=settings) as client:
            await within(node.ready())
            await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
            before = incarnations(client)
            during = [client.call("square", n, str(folder), 0.4) for n in range(50)]
            tally = [await client.options(session="s").call("Tally.add", 1)]
            await until(lambda: len(traces(folder)) >= 50, "nothing ever ran")
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            await until(lambda: not client.process.transport.is_connected, "the client never noticed")
            during += [client.call("square", 100 + n, str(folder)) for n in range(50)]
            during += [client.options(session=f"s{n}").call("Tally.add", n) for n in range(5)]
            results = await outcomes(during)
            assert results[:100] == [n * n for n in [*range(50), *range(100, 150)]]
            assert [result[0] for result in results[100:]] == list(range(5))
            tally.append(await client.options(session="s").call("Tally.add", 1))
            assert [count for count, _ in tally] == [1, 2]
            assert len({pid for _, pid in tally}) == 1
            ran = traces(folder)
            assert all(ran[f"ended {n}"] == 1 for n in [*range(50), *range(100, 150)]), "a call ran twice"

            other = Settings(broker=broker.access, node="there")
            async with LocalController(APP, other, workers=1, log_level="error") as second:
                await within(second.ready())
                await until(lambda: "there-1" in incarnations(client), "a joining member was not seen after the outage")
                assert {name: incarnations(client)[name] for name in before} == before
            await until(lambda: "there-1" not in incarnations(client), "a leaving member was not seen after the outage")


@pytest.mark.slow
async def test_a_broker_that_stands_still_costs_nobody_his_life(tmp_path: Path, folder: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = Settings(broker=broker.access, node="here")
        async with LocalController(APP, settings, workers=2, log_level="error") as node, connect(settings=settings) as client:
            await within(node.ready())
            await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
            before, pids = incarnations(client), node.pids
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGSTOP)
            calls = [client.call("square", n, str(folder)) for n in range(20)]
            await asyncio.sleep(LEASE_S * 1.5)  # what is waited for is that nothing happens
            os.kill(broker.pid, signal.SIGCONT)
            assert await outcomes(calls) == [n * n for n in range(20)]
            await asyncio.sleep(LEASE_S * 1.5)
            assert incarnations(client) == before
            assert node.pids == pids


async def test_two_nodes_started_by_hand_share_the_work(
    settings: Settings, client: Client, tmp_path: Path, folder: Path
) -> None:
    first = by_hand(settings, tmp_path / "first.log", "one")
    second = by_hand(settings, tmp_path / "second.log", "two")
    try:
        await first.says("1 workers are ready")
        await second.says("1 workers are ready")
        await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
        pids = await outcomes([client.call("who") for _ in range(100)])
        assert len(set(pids)) == 2
        assert os.getpid() not in pids
        assert min(Counter(pids).values()) >= 20

        running = [client.call("square", n, str(folder), 1.0) for n in range(20)]
        await until(lambda: len(traces(folder)) == 20, "some never began")
        second.process.send_signal(signal.SIGTERM)
        assert await outcomes(running) == [n * n for n in range(20)]
        assert await second.end() == 0

        lost = [client.call("endure", str(n), str(folder)) for n in range(5)]
        await until(lambda: traces(folder)["began 4"] == 2, "some never began")  # `square` left one, too
        began = time.monotonic()
        first.process.kill()
        found = await outcomes(lost)
        assert all(isinstance(error, errors.WorkerLostError) for error in found), found
        assert time.monotonic() - began < 5 * LEASE_S  # generous: other processes may have the machine
        with pytest.raises(errors.UnknownActorError):
            await within(client.call("who"))
    finally:
        await first.end(signal.SIGKILL)
        await second.end(signal.SIGKILL)


CALLER = """
import asyncio, sys
import msgspec, nalar_mq
from nalar_mq.config import Settings

async def main():
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    async with nalar_mq.connect(settings=settings) as client:
        await client.wait_for("endure")
        calls = [client.call("endure", str(n), sys.argv[2]) for n in range(10)]
        print("called", flush=True)
        await calls[0]

asyncio.run(main())
"""


async def test_the_calls_of_a_killed_client_are_cancelled(
    node: LocalController, settings: Settings, tmp_path: Path, folder: Path
) -> None:
    caller = Program(sys.executable, "-c", CALLER, msgspec.json.encode(settings).decode(), folder, log=tmp_path / "log")
    try:
        await until(lambda: sum(traces(folder).values()) == 10, "some never began")
        caller.process.kill()
        began = time.monotonic()
        await until(lambda: all(traces(folder)[f"cancelled {n}"] == 1 for n in range(10)), "some go on")
        assert time.monotonic() - began < 5 * LEASE_S  # generous: other processes may have the machine
    finally:
        await caller.end(signal.SIGKILL)


FROZEN = """
import asyncio, sys
import msgspec, nalar_mq
from nalar_mq.config import Settings
from nalar_mq.errors import NalarError, OwnerLostError

async def main():
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    async with nalar_mq.connect(settings=settings, name="client-frozen") as client:
        await client.wait_for("endure")
        call = client.call("endure", "frozen", sys.argv[2])
        try:
            await call
        except OwnerLostError as error:
            print("ended:", error, flush=True)
        while True:
            try:
                await client.wait_for("square", 1.0)
                print("again:", await client.call("square", 7, sys.argv[2]), flush=True)
                return
            except NalarError:
                await asyncio.sleep(0.1)

asyncio.run(main())
"""


async def test_a_client_frozen_beyond_its_lease_is_told_and_begins_again(
    node: LocalController, client: Client, settings: Settings, tmp_path: Path, folder: Path
) -> None:
    caller = Program(sys.executable, "-c", FROZEN, msgspec.json.encode(settings).decode(), folder, log=tmp_path / "log")
    try:
        await until(lambda: traces(folder)["began frozen"], "it never began")
        caller.process.send_signal(signal.SIGSTOP)
        await until(lambda: traces(folder)["cancelled frozen"], "its call goes on")
        await until(lambda: "client-frozen" not in client.process.table.members, "it was never given up")
        caller.process.send_signal(signal.SIGCONT)
        await caller.says("stood still for longer than its lease")
        await caller.says("again: 49")
        assert await asyncio.to_thread(caller.process.wait, PATIENCE_S) == 0
    finally:
        await caller.end(signal.SIGKILL)


async def test_two_workers_that_flood_each_other_go_on(node: LocalController, client: Client) -> None:
    await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
    assert await outcomes([client.call("flood", 100, 6) for _ in range(10)]) == [600] * 10


async def test_a_flood_to_one_actor_leaves_the_others_alone(node: LocalController, client: Client, folder: Path) -> None:
    await until(lambda: len(incarnations(client)) == 2, "somebody is missing")
    took_s: list[float] = []

    async def timed(name: str, *arguments: Any) -> float:
        began = time.monotonic()
        await client.call(name, *arguments)
        return time.monotonic() - began

    flood = [asyncio.ensure_future(timed("square", n, str(folder), 0.1)) for n in range(10_000)]
    await until(lambda: any(call.done() for call in flood), "the flood never began")
    while not flood[-1].done() and len(took_s) < 100:
        took_s.append(await timed("who"))
    waited_s = await within(asyncio.gather(*flood))
    assert len(took_s) >= 10
    assert median(took_s) < median(waited_s) / 5


async def test_code_that_blocks_the_event_loop_keeps_its_lease(settings: Settings, folder: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(settings, lease_s=2.0)
    worker = Program(sys.executable, WORKER, msgspec.json.encode(settings).decode(), APP, log=tmp_path / "log")
    try:
        await worker.says("ready")
        judge = Process(settings, name="judge", role="client")
        await judge.start()
        try:
            async with connect(settings=settings) as client:
                await client.wait_for("hog")
                assert await within(client.options(retries=1).call("hog", 7.0, str(folder))) == "done"
            assert traces(folder) == {"began hog": 1, "ended hog": 1}
            assert "w" in judge.table.members
        finally:
            await judge.aclose()
    finally:
        await worker.end(signal.SIGKILL)


async def test_up_call_and_ps_from_another_folder(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "fire.py").write_text(APP.read_text())
    up = Program(NALAR, "up", home / "fire.py", "--workers", "1", log=tmp_path / "up.log")
    try:
        await up.says("1 workers are ready")

        def nalar(*words: object) -> str:
            command = [NALAR, *map(str, words)]
            return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout

        called = await asyncio.to_thread(nalar, "call", "flood", "--app", home / "fire.py", "width=3", "depth=2")
        assert called == "6\n"
        listed = json.loads(await asyncio.to_thread(nalar, "ps", "--json", "--app", home / "fire.py"))
        workers = [member for member in listed["members"] if member["role"] == "worker"]
        assert [member["name"].rpartition("-")[2] for member in workers] == ["1"]
        assert "Tally" in workers[0]["actors"]
        children = psutil.Process(up.process.pid).children(recursive=True)
    finally:
        assert await up.end() == 0
    assert not any(child.is_running() for child in children)
