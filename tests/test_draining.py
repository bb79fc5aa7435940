"""Workers that are drained: what they have goes on elsewhere, and nobody's call fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from waiting import PATIENCE_S, until

from nalar_mq import draining, simulation
from nalar_mq.address import Address
from nalar_mq.app import load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.draining import Draining
from nalar_mq.errors import DrainError, SessionLostError, StateLostError, WorkerLostError
from nalar_mq.future import Future
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import Drainage
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "drain_app.py"


class Runtime:
    """Workers of one app on a hub, and a client; each worker keeps its state in the folder of its node."""

    def __init__(self, namespace: str, state: Path) -> None:
        self.hub = MemoryHub(seed=1)
        self.namespace = namespace
        self.state = state
        self.app = load_app(APP)
        self.client = connect(settings=self.settings("here"), connect=self.hub.connect)

    def settings(self, node: str) -> Settings:
        return Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)),
            namespace=self.namespace,
            node=node,
            lease_s=3.0,
            state=str(self.state / node),
            local_store="off",
        )

    def worker(self, name: str, node: str = "here") -> Worker:
        return Worker(self.app, self.settings(node), name=name, connect=self.hub.connect, lease_in_thread=False)


@pytest.fixture
async def runtime(namespace: str, tmp_path: Path) -> AsyncIterator[Runtime]:
    made = Runtime(namespace, tmp_path / "state")
    async with made.client:
        yield made


class Load:
    """Callers that call one after the other until they are told to stop; what came of it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stopping = asyncio.Event()
        self.results: dict[str, list[Any]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self, name: str, *args: Any, session: str, **kwargs: Any) -> None:
        self.results[session] = []
        self._tasks.append(asyncio.create_task(self._call(name, args, session)))

    async def _call(self, name: str, args: tuple[Any, ...], session: str) -> None:
        caller = self.client.options(session=session, timeout_s=30)
        while not self.stopping.is_set():
            try:
                self.results[session].append(await caller.call(name, *args))
            except Exception as error:
                self.results[session].append(error)

    async def grows(self, by: int) -> None:
        """Returns when every caller has had so many more answers."""
        goals = {session: len(results) + by for session, results in self.results.items()}
        await until(
            lambda: all(len(self.results[session]) >= goal for session, goal in goals.items()), "a session stands still"
        )

    async def end(self) -> None:
        self.stopping.set()
        await asyncio.gather(*self._tasks)


def failures(load: Load) -> list[Exception]:
    return [result for results in load.results.values() for result in results if isinstance(result, Exception)]


async def test_a_worker_drained_under_load_fails_no_call(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tools run elsewhere, its sessions in whoever opens its store, however long the machine takes for their calls."""
    monkeypatch.setattr(draining, "_LONG_S", PATIENCE_S)
    first, second = runtime.worker("first"), runtime.worker("second")
    async with first, second, Load(runtime.client) as load:
        for number in range(8):
            load.begin("Notebook.note", 0.001, session=f"n{number}")
            load.begin("echo", 0.001, session=f"e{number}")
        await load.grows(5)
        ended = await first.drain(30.0)
        await first.aclose()
        await load.grows(5)
        await load.end()
        assert failures(load) == []
        assert (ended.stores, ended.moved, ended.lost, ended.stayed) == (1, 0, 0, 0)
        for number in range(8):
            assert load.results[f"n{number}"] == list(range(1, len(load.results[f"n{number}"]) + 1))


async def test_sessions_move_to_another_node(runtime: Runtime) -> None:
    """Those that are called meanwhile and those that only lie on the disk."""
    async with runtime.worker("first") as first:
        for number in range(40):
            await runtime.client.options(session=f"idle{number}").call("Notebook.note")
        async with runtime.worker("second", "there"), runtime.worker("third", "there"), Load(runtime.client) as load:
            for number in range(4):
                load.begin("Notebook.note", 0.001, session=f"n{number}")
            await load.grows(5)
            ended = await first.drain(30.0)
            await first.aclose()
            await load.grows(5)
            await load.end()
            assert failures(load) == []
            assert ended.moved >= 40
            assert (ended.stores, ended.stayed) == (0, 0)
            for number in range(40):
                assert await runtime.client.options(session=f"idle{number}").call("Notebook.note") == 2
            for number in range(4):
                assert load.results[f"n{number}"] == list(range(1, len(load.results[f"n{number}"]) + 1))


async def test_a_session_in_memory_ends_when_its_grace_is_over(runtime: Runtime) -> None:
    async with runtime.worker("first") as first, runtime.worker("second"):
        here = await session_in(runtime, "first")
        async with Load(runtime.client) as load:
            load.begin("Counter.add", 0.01, session=here)
            await load.grows(5)
            began = asyncio.get_running_loop().time()
            ended = await first.drain(1.5)
            assert asyncio.get_running_loop().time() - began >= 1.5
            await first.aclose()
            await load.grows(5)
            await load.end()
            assert ended.lost == 1
            results = load.results[here]
            ends = [number for number, result in enumerate(results) if isinstance(result, SessionLostError)]
            assert ends
            lost = [number for number, result in enumerate(results) if type(result) is StateLostError]
            assert lost == [ends[-1] + 1]
            assert results[: ends[0]] == list(range(2, ends[0] + 2))
            assert results[lost[0] + 1 :] == list(range(1, len(results) - lost[0]))


async def session_in(runtime: Runtime, worker: str, actor: str = "Counter.add") -> str:
    """A session that has been called once and is in that worker."""
    for number in range(100):
        name = f"{worker}-{number}"
        await runtime.client.options(session=name).call(actor)
        key = runtime.client.process.places.key(actor.partition(".")[0], name, "")
        address = runtime.client.process.places.known(key)
        if address is not None and address.name == worker:
            return name
    raise AssertionError(f"no session was ever placed in {worker}")


async def test_a_session_in_memory_that_is_quiet_is_not_waited_for(runtime: Runtime) -> None:
    async with runtime.worker("first") as first, runtime.worker("second"):
        here = runtime.client.options(session=await session_in(runtime, "first"))
        async with asyncio.timeout(20):
            ended = await first.drain(3600.0)
        assert ended.lost >= 1
        with pytest.raises(StateLostError, match="was lost with its worker"):
            await here.call("Counter.add")
        assert await here.call("Counter.add") == 1


async def test_calls_that_wait_in_a_queue_go_elsewhere_and_run_once(runtime: Runtime, tmp_path: Path) -> None:
    async with runtime.worker("first") as first:
        calls = [runtime.client.call("trace", str(tmp_path), f"t{number}", 0.1) for number in range(30)]
        await until(lambda: first.running >= 30, "some never began")
        async with runtime.worker("second"):
            await first.drain(30.0)
            await first.aclose()
            assert await asyncio.gather(*calls) == [f"t{number}" for number in range(30)]
    assert all((tmp_path / f"t{number}").read_text() == f"t{number}\n" for number in range(30))


async def test_a_long_call_of_one_session_does_not_hold_up_the_others(runtime: Runtime) -> None:
    async with runtime.worker("first") as first, runtime.worker("second"):
        slow = runtime.client.options(session=await session_in(runtime, "first", "Notebook.note"))
        long = slow.call("Notebook.note", 5.0)
        behind = slow.call("Notebook.note")
        async with Load(runtime.client) as load:
            for number in range(4):
                load.begin("Notebook.note", 0.001, session=f"n{number}")
            await load.grows(2)
            draining = asyncio.create_task(first.drain(30.0))
            await load.grows(10)
            assert not long.available()
            ended = await draining
            assert [await long, await behind] == [2, 3]
            await load.end()
            assert failures(load) == []
            assert ended.stores == 1
            assert ended.moved >= 1


async def test_without_another_worker_it_ends_at_once_and_keeps_what_it_has(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    async with runtime.worker("first") as first:
        assert await ann.call("Notebook.note") == 1
        assert await ann.call("Counter.add") == 1
        async with asyncio.timeout(20):
            ended = await first.drain(3600.0)
        assert (ended.stayed, ended.lost) == (1, 1)
    waiting = ann.call("Notebook.note")
    async with runtime.worker("next"):
        assert await waiting == 2


async def test_what_has_begun_is_finished_when_all_workers_are_drained(runtime: Runtime) -> None:
    async with runtime.worker("first") as first, runtime.worker("second") as second:
        running = [runtime.client.call("report", 20, 0.02) for _ in range(4)]
        await until(lambda: begun(first, "report") + begun(second, "report") == 4, "some never began")
        await asyncio.gather(first.drain(30.0), second.drain(30.0))
        assert await asyncio.gather(*running) == [20] * 4


async def test_a_worker_that_closes_begins_nothing_that_others_can(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers that are drained at once the first to be done gives back what a workflow at the other one calls."""
    bequeath, closing, goes_on = Draining._bequeath, asyncio.Event(), asyncio.Event()
    async with runtime.worker("first") as first, runtime.worker("second") as second:
        running = runtime.client.call("echoes", 30, 0.02)
        await until(lambda: begun(first, "echoes") + begun(second, "echoes") == 1, "it never began")
        busy, idle = (first, second) if begun(first, "echoes") else (second, first)

        async def held(self: Draining) -> None:
            if self._process is idle.process:
                closing.set()
                await goes_on.wait()
            await bequeath(self)

        monkeypatch.setattr(Draining, "_bequeath", held)
        drains = [asyncio.create_task(worker.drain(30.0)) for worker in (busy, idle)]
        await asyncio.wait_for(closing.wait(), PATIENCE_S)
        assert idle._host is not None
        completed = idle._host.completed
        assert await asyncio.wait_for(_value(running), PATIENCE_S) == 30
        assert idle._host.completed == completed
        goes_on.set()
        await asyncio.gather(*drains)


def begun(worker: Worker, actor: str) -> int:
    """How many calls of that actor run there."""
    assert worker._host is not None
    return sum(execution.started and execution.call.actor == actor for execution in worker._host.executions)


async def _value(future: Future[Any]) -> Any:
    return await future


async def test_a_client_drains_a_worker_and_hears_what_became_of_it(runtime: Runtime) -> None:
    async with runtime.worker("first") as first, runtime.worker("second"):
        await session_in(runtime, "first", "Notebook.note")
        running = [runtime.client.call("trace", str(runtime.state.parent), f"c{number}", 0.3) for number in range(2)]
        told: list[Drainage] = []
        ending = asyncio.ensure_future(first.closed)
        draining = asyncio.create_task(runtime.client.drain("first", grace_s=20.0, on_progress=told.append))
        await ending
        assert first.was_drained
        await first.aclose()
        ended = await draining
        assert (ended.stores, ended.lost, ended.stayed) == (1, 0, 0)
        assert told[-1] == ended
        assert await asyncio.gather(*running) == ["c0", "c1"]
        assert "first" not in runtime.client.process.table.members


async def test_a_worker_lost_while_it_drains_is_told_of(runtime: Runtime) -> None:
    first, second = runtime.worker("first"), runtime.worker("second")
    async with second:
        await first.start()
        held = runtime.client.options(session=await session_in(runtime, "first")).call("Counter.add", 60.0)
        draining = asyncio.create_task(runtime.client.drain("first", grace_s=3600.0))
        await until(lambda: runtime.client.process.table.members["first"].draining, "it does not drain")
        with pytest.raises(DrainError, match="drained already"):
            await runtime.client.drain("first")
        runtime.hub.kill("first")
        with pytest.raises(DrainError, match="was lost before") as caught:
            await draining
        assert caught.value.worker == "first"
        with pytest.raises(WorkerLostError):
            await held
    await first.aclose()


async def test_what_cannot_be_drained_says_why(runtime: Runtime) -> None:
    async with runtime.worker("first"):
        for name, grace_s, text in (
            ("nobody", 1.0, "there is no worker 'nobody'; workers are: first"),
            (runtime.client.name, 1.0, "is a client; workers are: first"),
            ("first", -1.0, "a grace period of -1 s cannot be"),
            ("first", float("nan"), "a grace period of nan s cannot be"),
        ):
            with pytest.raises(DrainError, match=text):
                await runtime.client.drain(name, grace_s=grace_s)
        here = Address("first", runtime.client.process.table.members["first"].incarnation)
        with pytest.raises(DrainError, match="cannot be"):  # also if the client has not looked
            await runtime.client.process.calls.drain(here, -1.0, None)
        assert await runtime.client.call("echo") == 0.0


async def test_jobs_go_on_elsewhere_and_those_that_sleep_are_not_waited_for(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    async with runtime.worker("first") as first:
        resting = await runtime.client.submit("rest", folder=str(tmp_path / "traces"), seconds=2.5)
        working = await runtime.client.submit("report", steps=20, seconds=0.05)
        assert first._intake is not None
        intake = first._intake
        await until(lambda: intake.in_hand == 2 and intake.at_work == 1, "none of them is known to sleep")
        async with runtime.worker("second"):
            async with asyncio.timeout(60):
                await first.drain(3600.0)
                assert await working.result() == 20
                await first.aclose()
                assert await resting.result() == "after"
    for name in ("before", "after"):
        assert (tmp_path / "traces" / name).read_text() == f"{name}\n"


async def test_a_job_that_outlasts_the_grace_goes_on_in_another_worker(runtime: Runtime) -> None:
    async with runtime.worker("first") as first:
        working = await runtime.client.submit("report", steps=20, seconds=0.05)
        assert first._intake is not None
        await until(lambda: first._intake.at_work, "it never began")
        async with runtime.worker("second"):
            await first.drain(0.2)
            await first.aclose()
            async with asyncio.timeout(60):
                assert await working.result() == 20


async def drained_beside_killed_ones(folder: Path, killed: int, *, lives: bool) -> tuple[Drainage, float]:
    """A worker is drained when others of its machine have just been killed, and one lives or none; and how long that takes."""
    hub, workers = MemoryHub(seed=1), list[Worker]()
    broker = BrokerAccess(urls=("nats://nowhere:1",))
    settings = Settings(broker=broker, namespace="t", node="here", lease_s=60.0, state=str(folder), local_store="off")
    names = ["leaves", *(f"a{number}" for number in range(killed)), *(["lives"] if lives else [])]
    for name in names:
        worker = Worker(load_app(APP), settings, name=name, connect=hub.connect, random=Random(name), is_simulated=True)
        workers.append(worker)
        await worker.start()
    client = connect(settings=settings, name="client-c", connect=hub.connect, random=Random("c"))
    async with client:
        await client.wait_for("echo")
        assert await client.options(session="s").call("Notebook.note", 0.0) == 1
        for number in range(killed):
            hub.kill(f"a{number}")
        begun = asyncio.get_running_loop().time()
        ended = await workers[0].drain(30.0)
        took_s = asyncio.get_running_loop().time() - begun
    for worker in workers:
        await worker.aclose()
    return ended, took_s


def test_of_workers_that_were_killed_just_now_nobody_waits_for_one_after_the_other(tmp_path: Path) -> None:
    ended, took_s = simulation.run(drained_beside_killed_ones(tmp_path, 6, lives=True))
    assert (ended.stores, ended.silent) == (1, ()), "one that answers is enough"
    assert took_s < 2 * draining._ANSWER_S, "it waits for them to read its last words, all together"


def test_workers_that_do_not_answer_are_asked_together_and_named(tmp_path: Path) -> None:
    ended, took_s = simulation.run(drained_beside_killed_ones(tmp_path, 6, lives=False))
    assert (ended.stores, ended.silent) == (0, tuple(f"a{number}" for number in range(6)))
    assert took_s < 3 * draining._ANSWER_S
