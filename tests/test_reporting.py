"""What workers tell the controllers while they work: real workers, in virtual time, and a view that folds their reports."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from virtual_time import simulated

from nalar_mq.address import Address, Subjects
from nalar_mq.app import load_app
from nalar_mq.changes import Changes
from nalar_mq.client import Client, connect
from nalar_mq.columns import CANCELLED, CREATED, DONE, QUEUED, RUNNING, WAITING, Again, encode_report
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.view import View
from nalar_mq.errors import CallCancelledError, WireError
from nalar_mq.memory_transport import Faults, MemoryHub
from nalar_mq.messages import WIRE_VERSION, Call
from nalar_mq.reporting import PERIOD_S, Reporter
from nalar_mq.resources import Machine
from nalar_mq.transport import Delivered
from nalar_mq.values import encode_arguments
from nalar_mq.worker import Worker

APP = load_app(Path(__file__).parent / "apps" / "governed_app.py")
governed_app: Any = sys.modules[APP.actors["Clerk"].target.__module__]
SUBJECTS = Subjects("t")


class World:
    """Workers, a client, and a view that asks again for what it has missed."""

    def __init__(self, folder: Path, faults: Faults | None = None) -> None:
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace="t", node="here", lease_s=3.0, state=str(folder)
        )
        self.hub = MemoryHub(1, faults)
        self.view = View()
        self.workers: dict[str, Worker] = {}
        self.refused: list[str] = []
        self.client: Client

    async def begin(self, *names: str) -> None:
        governed_app.GATES.clear()
        governed_app.ORDER.clear()
        self.transport = await self.hub.connect("observer")
        await self.transport.subscribe(SUBJECTS.report("*"), self._fold)
        for name in names:
            self.workers[name] = worker = Worker(
                APP, self.settings, name=name, connect=self.hub.connect, random=Random(name), is_simulated=True
            )
            await worker.start()
        self.client = connect(settings=self.settings, name="c", connect=self.hub.connect, random=Random(2))
        await self.client.__aenter__()

    def _fold(self, message: Delivered) -> None:
        try:
            self.view.fold(message.subject.rpartition(".")[2], message.data, asyncio.get_running_loop().time())
        except WireError as error:
            self.refused.append(type(error).__name__)

    async def end(self) -> None:
        await self.client.__aexit__(None, None, None)
        for worker in self.workers.values():
            await worker.aclose()

    async def look(self) -> View:
        """The view after everybody has reported."""
        await asyncio.sleep(4 * PERIOD_S)
        for address in self.view.stale():
            self.transport.publish(SUBJECTS.again(address.name), encode_report(Again(WIRE_VERSION, address.incarnation)))
        await asyncio.sleep(4 * PERIOD_S)
        self.view.settle(asyncio.get_running_loop().time())
        return self.view

    def states(self) -> dict[tuple[str, str], int]:
        """State of each live future, by actor and session."""
        view = self.view
        return {
            (view.agent_of(row), view.sessions.name(int(view.futures.session[row]))): int(view.futures.state[row])
            for row in view.live.tolist()
        }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@contextlib.asynccontextmanager
async def world(folder: Path, *names: str, faults: Faults | None = None) -> AsyncIterator[World]:
    found = World(folder, faults)
    await found.begin(*names)
    try:
        yield found
    finally:
        await found.end()


@simulated
async def test_a_view_sees_every_state_of_a_call_and_what_it_waits_for(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        for name in ("first", "second", "inner"):
            governed_app.gate(name)
        first = scene.client.options(session="s1").call("side_by_side", "first")
        later = scene.client.options(session="s2").call("side_by_side", "later", first)
        running = scene.client.options(session="s3").call("one_by_one", "second")
        queued = scene.client.options(session="s4", priority=7).call("one_by_one", "queued")
        outer = scene.client.options(session="s5").call("ask", "inner", "side_by_side")
        view = await scene.look()
        assert scene.states() == {
            ("side_by_side", "s1"): RUNNING,
            ("side_by_side", "s2"): CREATED,
            ("one_by_one", "s3"): RUNNING,
            ("one_by_one", "s4"): QUEUED,
            ("ask", "s5"): WAITING,
            ("side_by_side", "s5"): RUNNING,
        }
        assert view.blockers(view.find(later.id)).tolist() == [view.find(first.id)]
        inner = next(row for row in view.rows_in("s5").tolist() if view.agent_of(row) == "side_by_side")
        assert view.blockers(view.find(outer.id)).tolist() == [inner]
        assert int(view.futures.priority[view.find(queued.id)]) == 7
        queued.set_priority(9)
        view = await scene.look()
        assert int(view.futures.priority[view.find(queued.id)]) == 9
        assert [(r.queued, r.running) for r in view.replicas("one_by_one")] == [(1, 1)]
        for name in ("first", "second", "inner"):
            governed_app.gate(name).set()
        assert await asyncio.gather(first, later, running, queued, outer) == [
            "first",
            "laterfirst",
            "second",
            "queued",
            "inner",
        ]
        view = await scene.look()
        assert not len(view.futures)
        assert not len(view.sessions)
        assert scene.refused == []


@simulated
async def test_what_a_process_serves_and_holds_is_told(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        caller = scene.client.options(session="s")
        await caller.call("Clerk.note", "one")
        await caller.call("Ledger.note", "two")
        view = await scene.look()
        assert set(view.workers) == {"w1", "w2"}
        assert view.agents["Clerk"].stateful
        assert not view.agents["Ledger"].stateful
        assert view.agents["one_by_one"].concurrency == 1
        homes = {agent: view.holder("s", agent) for agent in ("Clerk", "Ledger")}
        assert set(homes.values()) <= {"w1", "w2"}
        other = "w2" if homes["Ledger"] == "w1" else "w1"
        assert (await scene.client.migrate("Ledger", "s", to=other)).size_bytes
        view = await scene.look()
        assert view.holder("s", "Ledger") == other
        assert await caller.call("Ledger.note", "three") == ["two", "three"]
        assert (await scene.look()).holder("s", "Ledger") == other
        draining = scene.workers["w1"]
        assert await draining.drain(10.0)
        assert [replica.worker for replica in (await scene.look()).replicas("one_by_one") if replica.is_draining] == ["w1"]


@simulated
async def test_lost_reports_are_told_anew_when_they_are_asked_for(folder: Path) -> None:
    faults = Faults()
    async with world(folder, "w1", faults=faults) as scene:
        governed_app.gate("held")
        futures = [scene.client.options(session=f"s{n}").call("side_by_side", "held") for n in range(20)]
        await scene.look()
        assert len(scene.view.futures) == 20
        scene.hub.cut("observer")
        futures += [scene.client.options(session=f"t{n}").call("side_by_side", "held") for n in range(20)]
        futures[0].cancel()
        await asyncio.sleep(5 * PERIOD_S)
        scene.hub.restore("observer")
        await scene.look()
        await scene.look()
        assert not scene.view.stale()
        assert "MissedReportError" in scene.refused
        assert len(scene.view.futures) == 39
        governed_app.gate("held").set()
        with contextlib.suppress(CallCancelledError):
            await futures[0]
        await asyncio.gather(*futures[1:])
        assert not len((await scene.look()).futures)


@simulated
async def test_no_call_of_a_client_keeps_a_worker_from_being_heard(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        calls, worker = scene.client.process.calls, scene.workers["w1"]
        forged: list[dict[str, Any]] = [{name: "x" * 129} for name in ("session", "instance", "job", "tenant")]
        forged += [{"session": "a\nb"}, {"tenant": "a.b"}, {"timeout_s": float("nan")}]
        for fields in forged:
            call = Call(calls.fresh_id(), "Ledger", "note", encode_arguments(("one",), {}), **{"session": "s", **fields})
            calls.tell(worker.process.me, call)
        longest = scene.client.options(session="s" * 128, tenant="t" * 128, timeout_s=float("inf"))
        await longest.call("Ledger.note", "one")
        assert await scene.client.options(session="s").call("Ledger.note", "two") == ["two"]
        view = await scene.look()
        assert view.holder("s" * 128, "Ledger") == "w1"
        assert not view.stale()
        assert not scene.refused


@simulated
async def test_many_who_ask_for_everything_get_it_once(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        await scene.look()
        incarnation = scene.workers["w1"].process.me.incarnation
        seen: list[bytes] = []
        await scene.transport.subscribe(SUBJECTS.report("w1"), lambda m: seen.append(m.data))
        for _ in range(50):
            scene.transport.publish(SUBJECTS.again("w1"), encode_report(Again(WIRE_VERSION, incarnation)))
        scene.transport.publish(SUBJECTS.again("w1"), encode_report(Again(WIRE_VERSION, incarnation + 1)))
        scene.transport.publish(SUBJECTS.again("w1"), b"nonsense")
        await asyncio.sleep(4.5 * PERIOD_S)
        assert 4 <= len(seen) <= 5
        assert scene.view.stale() == []


async def test_without_listeners_and_without_a_broker_nothing_is_kept() -> None:
    hub = MemoryHub(1)
    transport = await hub.connect("w")
    changes = Changes("w", 1, "n")
    reporter = Reporter(transport, SUBJECTS, Address("w", 1), changes, dict)
    payload = bytes(1000)
    for cut in (False, True):
        if cut:
            hub.cut("w")
        for number in range(3000):
            call = Call(number.to_bytes(16, "big"), "a", "m", payload, session=f"s{number}")
            told = changes.begin(call, float(number))
            changes.change(told, RUNNING, float(number))
            changes.end(told, CANCELLED if number % 2 else DONE, number + 0.5)
            assert told.call.payload == b"", "the arguments of a call that is over are not kept for the next report"
            if number % 100 == 0:
                reporter._publish()
        reporter._publish()
        assert not changes._fresh
        assert not changes._rows
    assert reporter.sent == 31


def test_the_machine_says_what_it_has() -> None:
    for used, whole in Machine().look().values():
        assert 0 <= used <= whole * 1.01
    assert {"cpu", "memory_gb"} <= set(Machine().look())


def test_a_call_ends_once() -> None:
    changes = Changes("w", 1, "n")
    told = changes.begin(Call(bytes(16), "a", "m", b"", session="s"), 0.0)
    view = View()
    for now, act in ((1.0, lambda: None), (2.0, lambda: [changes.end(told, DONE, 2.0), changes.end(told, DONE, 2.0)])):
        act()
        for report in changes.reports(now, 10_000):
            view.fold("w", report, now)
        view.settle(now)
    assert not len(view.futures)
    assert not view.stale()


def test_of_many_calls_that_come_at_once_some_are_told_of_in_each_report() -> None:
    changes, view, now = Changes("w", 1, "n"), View(), 1.0
    futures = [
        changes.begin(Call(number.to_bytes(16, "big"), "a", "m", b"", session=f"s{number % 7}"), now) for number in range(100)
    ]
    for future in futures[:50]:
        changes.end(future, DONE, now)
    for expected in (20, 40, 50, 50):
        now += 1.0
        for report in changes.reports(now, 10_000, 20):
            view.fold("w", report, now)
        view.settle(now)
        assert len(view.futures) == expected
    for future in futures[50:]:
        changes.end(future, DONE, now)
    for report in changes.reports(now, 10_000, 20):
        view.fold("w", report, now)
    view.settle(now)
    assert not len(view.futures)
