"""Real workers obey a real global controller, in virtual time over a transport in memory."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from virtual_time import simulated

from nalar_mq import simulation
from nalar_mq.address import Address, Subjects
from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.guards import Bounds
from nalar_mq.controllers.policies import ShortestRemaining
from nalar_mq.controllers.policy import (
    Action,
    Policy,
    SetPriorities,
    allow,
    kill,
    limit,
    migrate,
    provision,
    route,
    set_priority,
)
from nalar_mq.controllers.view import View
from nalar_mq.errors import NotAllowedError, UnknownActorError
from nalar_mq.future import Future
from nalar_mq.lookout import View as Answer
from nalar_mq.memory_transport import Faults, MemoryHub
from nalar_mq.messages import Call, Forward, Returned
from nalar_mq.values import encode_arguments
from nalar_mq.worker import Worker

APP = load_app(Path(__file__).parent / "apps" / "governed_app.py")
governed_app: Any = sys.modules[APP.actors["Clerk"].target.__module__]
LEASE_S = 3.0


class Mind:
    """A policy that wants what it is told to want."""

    def __init__(self) -> None:
        self.wanted: Callable[[View], Iterable[Action]] = lambda _: ()

    def want(self, *actions: Action) -> None:
        self.wanted = lambda _: actions

    def want_once(self, *actions: Action) -> None:
        waiting = [actions]
        self.wanted = lambda _: waiting.pop() if waiting else ()

    def decide(self, view: View) -> Iterable[Action]:
        return self.wanted(view)


class World:
    """Workers, a client, and a controller whose mind can be changed."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace="t", node="here", lease_s=LEASE_S, state=str(folder)
        )
        self.hub = MemoryHub(1)
        self.mind = Mind()
        self.workers: dict[str, Worker] = {}
        self.client: Client
        self.controller: GlobalController

    async def begin(self, names: Iterable[str], policy: Policy | None) -> None:
        governed_app.GATES.clear()
        governed_app.ORDER.clear()
        for name in names:
            await self.add(name)
        self.client = await self.connect("client-c")
        transport = await self.hub.connect("control")
        self.controller = GlobalController(
            transport,
            Subjects("t"),
            Address("control", 1),
            Trusted(policy or self.mind),
            lease_s=LEASE_S,
            bounds=Bounds(cooldown_s=0.5),
        )
        await self.controller.start()
        await self.rounds()

    async def add(self, name: str, serves: Iterable[str] | None = None, app: App = APP) -> Worker:
        worker = self.workers[name] = Worker(
            app, self.settings, name=name, serves=serves, connect=self.hub.connect, random=Random(name), is_simulated=True
        )
        await worker.start()
        return worker

    async def connect(self, name: str, tenant: str = "") -> Client:
        client = connect(settings=self.settings, name=name, tenant=tenant, connect=self.hub.connect, random=Random(name))
        return await client.__aenter__()

    async def end(self) -> None:
        for gate in governed_app.GATES.values():
            gate.set()
        await self.controller.aclose()
        await self.client.__aexit__(None, None, None)
        for worker in self.workers.values():
            await worker.aclose()

    async def rounds(self, seconds: float = 2.0) -> None:
        """Long enough for reports to be seen and decisions to be obeyed."""
        await asyncio.sleep(seconds)

    def call(self, actor: str, name: str, session: str, **options: Any) -> Future[Any]:
        return self.client.options(session=session, **options).call(actor, name)

    def running(self, worker: str) -> int:
        return self.workers[worker].running

    async def explain(self, future: Future[Any]) -> list[tuple[str, str, str]]:
        """Who says what was decided, and why."""
        found: list[Answer] = await self.client.process.lookout.ask(
            [*(w.process.me for w in self.workers.values()), self.client.process.me], explain=future.id
        )
        return [(answer.name, said.what, said.reason) for answer in found for said in answer.explanations]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@contextlib.asynccontextmanager
async def world(folder: Path, *names: str, policy: Policy | None = None) -> AsyncIterator[World]:
    found = World(folder)
    await found.begin(names, policy)
    try:
        yield found
    finally:
        await found.end()


def shut(*names: str) -> None:
    for name in names:
        governed_app.gate(name)


def open_all() -> None:
    for gate in governed_app.GATES.values():
        gate.set()


def started() -> list[str]:
    return list(governed_app.ORDER)


@simulated
async def test_a_session_goes_where_it_is_routed_and_what_is_queued_elsewhere_follows(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("busy")
        busy = [scene.call("one_by_one", "busy", f"b{number}") for number in range(2)]
        queued = [scene.call("one_by_one", f"q{number}", "s") for number in range(8)]
        later = scene.client.options(session="s").call("side_by_side", "later", queued[7])
        await scene.rounds()
        assert scene.running("w1") + scene.running("w2") == 11
        scene.mind.want(route("s", "one_by_one", "w2", reason="it likes it there"))
        await scene.rounds()
        assert scene.workers["w2"].process.calls.host is not None
        load = {name: worker.process.calls.host.load() for name, worker in scene.workers.items()}  # type: ignore[union-attr]
        assert load["w1"].get("one_by_one") == (0, 1)
        assert load["w2"]["one_by_one"] == (8, 1)
        new = scene.call("one_by_one", "new", "s")
        said = await scene.explain(new)
        assert ("client-c", "sent to w2", "it likes it there") in said
        assert ("w1", "passed on to w2", "it likes it there") in [said for each in queued for said in await scene.explain(each)]
        open_all()
        assert await asyncio.gather(*queued, new) == [*(f"q{number}" for number in range(8)), "new"]
        assert await later == "laterq7"
        await asyncio.gather(*busy)
        assert scene.client.process.calls.in_flight["one_by_one"] == {"w1": 0, "w2": 0}
        assert sorted(started()) == sorted(["busy", "busy", *(f"q{n}" for n in range(8)), "new", "later"])


@simulated
async def test_calls_that_were_passed_on_survive_the_loss_of_who_passed_them_and_of_who_got_them(folder: Path) -> None:
    async with world(folder, "w1", "w2", "w3") as scene:
        shut("busy")
        for number in range(3):
            scene.call("one_by_one", "busy", f"b{number}")
        queued = [scene.call("one_by_one", f"q{number}", "s", retries=3) for number in range(9)]
        await scene.rounds()
        scene.mind.want(route("s", "one_by_one", "w2"))
        await scene.rounds()
        scene.hub.kill("w1")
        scene.hub.kill("w1-lease")
        await scene.rounds(4 * LEASE_S)
        scene.mind.want(route("s", "one_by_one", "w3"))
        await scene.rounds()
        scene.hub.kill("w2")
        scene.hub.kill("w2-lease")
        await scene.rounds(4 * LEASE_S)
        open_all()
        assert await asyncio.gather(*queued) == [f"q{number}" for number in range(9)]


@simulated
async def test_a_session_without_state_begins_where_it_is_routed_and_one_with_state_stays(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        homes = {}
        await scene.client.options(session="old").call("Clerk.note", "one")
        await scene.rounds()
        home = scene.controller.view.holder("old", "Clerk")
        other = "w2" if home == "w1" else "w1"
        shut("wait")
        for number in range(6):
            target = ("w1", "w2")[number % 2]
            held = scene.client.options(session=f"n{number}").call("side_by_side", "wait")
            homes[f"n{number}"] = target, held
        await scene.rounds()
        wanted = [route(session, "Clerk", target) for session, (target, _) in homes.items()]
        scene.mind.want(*wanted, route("old", "Clerk", other))
        await scene.rounds()
        assert len(scene.controller.governor.states) == 6, "a session with state is not routed away from it"
        for session in homes:
            await scene.client.options(session=session).call("Clerk.note", "x")
        assert await scene.client.options(session="old").call("Clerk.note", "two") == ["one", "two"]
        await scene.rounds()
        assert {s: scene.controller.view.holder(s, "Clerk") for s in homes} == {s: t for s, (t, _) in homes.items()}


@pytest.mark.parametrize("callers", [1, 8])
def test_calls_are_divided_as_the_weights_say(tmp_path: Path, callers: int) -> None:
    async def play() -> None:
        async with world(tmp_path, "w1", "w2", "w3") as scene:
            shut("held")
            keep = scene.call("side_by_side", "held", "s")
            scene.mind.want(route("side_by_side", ["w1", "w2", "w3"], [0.6, 0.3, 0.1]))
            await scene.rounds()
            clients = [await scene.connect(f"x{number}") for number in range(callers)]
            before = Counter({name: worker.process.calls.host.completed for name, worker in scene.workers.items()})  # type: ignore[union-attr]
            calls = 400
            for number in range(calls):
                await clients[number % callers].call("side_by_side", f"n{number}")
            after = Counter({name: worker.process.calls.host.completed for name, worker in scene.workers.items()})  # type: ignore[union-attr]
            shares = {name: count / calls for name, count in (after - before).items()}
            for name, share in (("w1", 0.6), ("w2", 0.3), ("w3", 0.1)):
                assert abs(shares[name] - share) < 0.05, shares
            open_all()
            await keep
            for client in clients:
                await client.__aexit__(None, None, None)

    simulation.run(play())


@simulated
async def test_an_instance_without_a_share_gives_up_what_is_queued_there(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("busy")
        busy = [scene.call("one_by_one", "busy", f"b{number}") for number in range(2)]
        queued = [scene.call("one_by_one", f"q{number}", f"s{number}") for number in range(6)]
        await scene.rounds()
        scene.mind.want(route("one_by_one", ["w1", "w2"], [0.0, 1.0]))
        await scene.rounds()
        assert (scene.running("w1"), scene.running("w2")) == (1, 7)
        scene.mind.want(route("one_by_one", ["w1", "w2"], [1.0, 0.0]))
        await scene.rounds()
        assert (scene.running("w1"), scene.running("w2")) == (7, 1)
        open_all()
        assert await asyncio.gather(*busy, *queued)


@simulated
async def test_waiting_calls_of_a_session_that_is_raised_overtake(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        shut("busy")
        futures = [scene.call("one_by_one", "busy", "b")]
        for number in range(4):
            futures += [scene.call("one_by_one", f"{session}{number}", session) for session in ("a", "b", "c")]
        await scene.rounds()
        scene.mind.want(set_priority("c", 5, reason="it is late"), set_priority("b", 9, "side_by_side"), set_priority("a", -5))
        await scene.rounds()
        futures += [scene.call("one_by_one", "c4", "c"), scene.call("one_by_one", "d0", "d", priority=3)]
        await scene.rounds()
        assert ("w1", "its session has priority 5", "it is late") in await scene.explain(futures[3])
        open_all()
        await asyncio.gather(*futures)
        assert started() == [
            "busy",
            *(f"c{n}" for n in range(5)),
            "d0",
            *(f"b{n}" for n in range(4)),
            *(f"a{n}" for n in range(4)),
        ]


@simulated
async def test_ranks_of_many_sessions_are_obeyed_and_a_priority_of_its_own_wins(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        shut("busy")
        futures = [scene.call("one_by_one", "busy", "b")]
        futures += [scene.call("one_by_one", f"s{number}", f"s{number}") for number in range(30)]
        await scene.rounds()

        def wanted(view: View) -> Iterable[Action]:
            live = [number for number in range(30) if f"s{number}" in view.sessions]
            numbers = np.array([view.sessions.number(f"s{number}") for number in live], np.int32)
            yield SetPriorities(numbers, np.array(live, np.int32), "the later the better")
            if "s3" in view.sessions:
                yield set_priority("s3", 100)

        scene.mind.wanted = wanted
        await scene.rounds()
        said = await scene.explain(futures[6])
        assert ("w1", "rank 5 of its session", "the ranks of all sessions") in said
        open_all()
        await asyncio.gather(*futures)
        expected = [3, *(number for number in reversed(range(30)) if number != 3)]
        assert started() == ["busy", *(f"s{number}" for number in expected)]
        scene.mind.wanted = lambda _: ()
        await scene.rounds(20.0)
        shut("busy")
        futures = [scene.call("one_by_one", "busy", "b"), *(scene.call("one_by_one", f"s{n}", f"s{n}") for n in range(3))]
        await scene.rounds()
        open_all()
        await asyncio.gather(*futures)
        assert started()[-3:] == ["s0", "s1", "s2"], "what is not said again holds no more"


@simulated
async def test_a_limit_keeps_and_what_is_beyond_it_waits(folder: Path) -> None:
    async with world(folder, "w1") as scene:
        shut("held")
        clients = {tenant: await scene.connect(tenant, tenant) for tenant in ("acme", "other")}
        futures = [clients[t].options(session="s").call("side_by_side", "held") for t in ("acme", "other") for _ in range(6)]
        await scene.rounds()
        assert started().count("held") == 12
        scene.mind.want(limit("side_by_side", 3, tenant="acme", reason="it has paid for three"))
        await scene.rounds()
        more = [clients[t].options(session="s").call("side_by_side", t) for t in ("acme", "other") for _ in range(4)]
        await scene.rounds()
        assert started().count("other") == 4
        assert started().count("acme") == 0, "six of them run, and three may"
        said = await scene.explain(more[0])
        assert ("w1", "held back by a limit", "") in said
        assert ("w1", "at most 3 of tenant acme at once", "it has paid for three") in said
        open_all()
        await asyncio.gather(*futures, *more)
        governed_app.GATES.clear()
        shut("held")
        futures = [clients["acme"].call("side_by_side", "held") for _ in range(10)]
        await scene.rounds()
        assert scene.workers["w1"].running == 10
        assert started().count("held") == 12 + 3
        scene.mind.want(limit("side_by_side", 5))
        await scene.rounds()
        assert started().count("held") == 12 + 5
        scene.mind.want()
        await scene.rounds()
        assert started().count("held") == 12 + 10
        open_all()
        await asyncio.gather(*futures)
        for client in clients.values():
            await client.__aexit__(None, None, None)


@simulated
async def test_of_a_tenant_that_is_refused_nothing_is_left_in_the_queue_and_others_stay_there(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("busy")
        busy = [scene.call("one_by_one", "busy", f"s{number}") for number in range(2)]
        poor = scene.client.options(session="p", tenant="poor").call("one_by_one", "poor")
        rich = scene.client.options(session="r", tenant="rich").call("one_by_one", "rich")
        session = scene.call("one_by_one", "session", "q")
        await scene.rounds()
        of_poor = limit("one_by_one", 0, tenant="poor", refuses=True, reason="it has spent all it had")
        scene.mind.want(of_poor)
        await scene.rounds()
        with pytest.raises(
            NotAllowedError, match="of tenant poor to one_by_one are refused: it has spent all it had"
        ) as refused:
            await poor
        assert refused.value.reason == "it has spent all it had"
        scene.mind.want(of_poor, limit("one_by_one", 0, session="q", refuses=True, reason="so has it"))
        await scene.rounds()
        with pytest.raises(NotAllowedError, match="so has it"):
            await session
        with pytest.raises(NotAllowedError):
            await scene.client.options(session="late", tenant="poor").call("one_by_one", "late")
        assert not rich.available()
        open_all()
        assert await rich == "rich"
        await asyncio.gather(*busy)
        scene.mind.want()
        await scene.rounds()
        assert await scene.client.options(session="p", tenant="poor").call("one_by_one", "again") == "again"
        assert {"poor", "session", "late"}.isdisjoint(started())


@simulated
async def test_who_is_not_allowed_is_refused_also_when_the_call_is_queued_already(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("busy")
        acme = await scene.connect("paying", "acme")
        busy = [scene.call("one_by_one", "busy", f"s{number}") for number in range(2)]
        queued = scene.call("one_by_one", "queued", "q")
        good = acme.options(session="g").call("one_by_one", "good")
        by_workflow = scene.client.options(session="a").call("ask", "asked", "one_by_one")
        await scene.rounds()
        scene.mind.want(allow("one_by_one", callers=["ask"], tenants=["acme"], reason="it costs money"))
        await scene.rounds()
        with pytest.raises(NotAllowedError, match="it costs money") as refused:
            await queued
        assert refused.value.reason == "it costs money"
        with pytest.raises(NotAllowedError):
            await scene.call("one_by_one", "late", "q")
        with pytest.raises(NotAllowedError):
            await scene.client.options(session="q", tenant="nobody").call("one_by_one", "late")
        assert any(what == "refused" for _, what, _ in await scene.explain(queued))
        open_all()
        assert await good == "good"
        assert await by_workflow == "asked"
        assert await acme.call("ask", "again", "one_by_one") == "again"
        assert await scene.client.options(tenant="acme").call("one_by_one", "behalf") == "behalf"
        await asyncio.gather(*busy)
        scene.mind.want(allow("one_by_one", callers=["client-c"]))
        await scene.rounds()
        assert await scene.call("one_by_one", "named", "q") == "named"
        scene.mind.want()
        await scene.rounds()
        assert await acme.call("one_by_one", "free") == "free"
        assert "late" not in started()
        await acme.__aexit__(None, None, None)


@simulated
async def test_who_was_allowed_stays_so_while_its_instance_is_killed(folder: Path) -> None:
    async with world(folder) as scene:
        await scene.add("w1", serves=["ask"])
        await scene.add("w2", serves=["one_by_one"])
        shut("busy")
        busy = scene.call("one_by_one", "busy", "b")
        asked = scene.client.options(session="a").call("ask", "asked", "one_by_one")
        await scene.rounds()
        await scene.add("w3", serves=["ask"])
        await scene.rounds()
        scene.mind.want_once(kill("w1", "ask"))
        await scene.rounds()
        assert serving(scene, "ask") == ["w3"]
        assert scene.running("w1") == 1, "what runs goes on"
        scene.mind.want(allow("one_by_one", callers=["ask"]))
        await scene.rounds()
        open_all()
        assert await asked == "asked"
        await busy


@simulated
async def test_a_former_attempt_that_comes_back_is_not_sent_anew(folder: Path) -> None:
    async with world(folder, "w1", "w2", "w3", "w4") as scene:
        shut("held")
        future = scene.client.options(session="s", retries=2).call("side_by_side", "held")
        await scene.rounds()
        (had,) = (name for name in scene.workers if scene.running(name))
        scene.hub.kill(had)
        await scene.rounds(5 * LEASE_S)
        (has,) = (name for name in scene.workers if name != had and scene.running(name))
        former = Call(future.id, "side_by_side", "", encode_arguments(("held",), {}, []), "s", timeout_s=60.0)
        drains = next(name for name in scene.workers if name not in (had, has))
        scene.workers[drains].process.calls.tell(scene.client.process.me, Returned(former))
        await scene.rounds()
        assert [name for name in scene.workers if name != had and scene.running(name)] == [has]
        open_all()
        assert await future == "held"


@simulated
async def test_a_client_cannot_have_others_call_for_it(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        scene.mind.want(allow("one_by_one", callers=["ask"]))
        await scene.rounds()
        payload, me = encode_arguments(("forged",), {}, []), scene.workers["w2"].process.me
        for number, cast in enumerate((False, True)):
            call = Call(bytes([number]) * 16, "one_by_one", "", payload, "s", timeout_s=60.0, cast=cast, caller="ask")
            for message in (Forward(me.name, me.incarnation, call), Returned(call)):
                scene.client.process.calls.tell(scene.workers["w1"].process.me, message)
        await scene.rounds()
        assert started() == []


@simulated
async def test_a_session_is_migrated_with_its_state_and_what_waits(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        assert await scene.client.options(session="s").call("Ledger.note", "one") == ["one"]
        await scene.rounds()
        home = scene.controller.view.holder("s", "Ledger")
        other = "w2" if home == "w1" else "w1"
        shut("two")
        calls = [scene.client.options(session="s").call("Ledger.note", name) for name in ("two", "three", "four")]
        shut("held")
        held = scene.call("one_by_one", "held", "x")
        await scene.rounds()
        scene.mind.want(migrate("s", "Ledger", home, other, reason="it is crowded"))
        await scene.rounds(1.0)
        scene.mind.want()
        open_all()
        assert (await asyncio.gather(*calls))[-1] == ["one", "two", "three", "four"]
        await scene.rounds()
        assert scene.controller.view.holder("s", "Ledger") == other
        last = scene.client.options(session="s").call("Ledger.note", "five")
        assert await last == ["one", "two", "three", "four", "five"]
        assert (home, f"moved to {other}", "it is crowded") in await scene.explain(calls[1])
        await held


@simulated
async def test_queued_calls_of_a_session_without_state_are_migrated(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("busy")
        scene.mind.want(route("one_by_one", ["w1"], [1.0]))
        await scene.rounds()
        busy = scene.call("one_by_one", "busy", "b")
        queued = [scene.call("one_by_one", f"q{number}", "s") for number in range(3)]
        await scene.rounds()
        assert scene.running("w1") == 4
        scene.mind.want(migrate("s", "one_by_one", "w1", "w2", reason="it waits behind a long one"))
        assert await asyncio.gather(*queued) == ["q0", "q1", "q2"]
        assert scene.running("w1") == 1
        open_all()
        await busy


@simulated
async def test_whoever_comes_later_obeys_from_its_first_call_on(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        scene.mind.want(route("side_by_side", ["w2"], [1.0]), allow("Clerk", callers=["nobody"]))
        await scene.rounds()
        client, worker = await scene.connect("late"), await scene.add("w0")
        for number in range(20):
            await client.call("side_by_side", f"n{number}")
        assert worker.process.calls.host is not None
        assert worker.process.calls.host.completed == 0
        for session in range(20):
            with pytest.raises(NotAllowedError):
                await client.options(session=f"s{session}").call("Clerk.note", "x")
        await client.__aexit__(None, None, None)


@simulated
async def test_what_was_lost_on_its_way_is_made_up_for(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        scene.hub.faults = Faults(drop=0.5, duplicate=0.2, reorder=0.2, delay_s=(0.0, 0.2))
        for instance in ("w1", "w2", "w1"):
            scene.mind.want(route("side_by_side", [instance], [1.0]))
            await scene.rounds(6 * LEASE_S)
        scene.hub.faults = None
        await scene.rounds(2 * LEASE_S)
        before = scene.workers["w2"].process.calls.host.completed  # type: ignore[union-attr]
        for number in range(20):
            await scene.client.call("side_by_side", f"n{number}")
        assert scene.workers["w2"].process.calls.host.completed == before  # type: ignore[union-attr]


@simulated
async def test_without_a_controller_what_was_decided_last_holds_on(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        scene.mind.want(route("side_by_side", ["w2"], [1.0]))
        await scene.rounds()
        await scene.controller.aclose()
        await scene.rounds(10 * LEASE_S)
        for number in range(20):
            await scene.client.call("side_by_side", f"n{number}")
        assert scene.workers["w1"].process.calls.host.completed == 0  # type: ignore[union-attr]


@simulated
async def test_a_policy_that_ships_runs_against_real_workers(folder: Path) -> None:
    async with world(folder, "w1", policy=ShortestRemaining()) as scene:
        shut("busy")
        futures = [scene.call("one_by_one", "busy", "b")]
        futures += [scene.call("one_by_one", f"q{number}", f"s{number}") for number in range(50)]
        await scene.rounds()
        open_all()
        await asyncio.gather(*futures)
        assert set(scene.controller.view.refused) <= {"MissedReportError"}, "it came later than the worker"


def serving(scene: World, actor: str) -> list[str]:
    return sorted(name for name, worker in scene.workers.items() if actor in worker.serving)


@simulated
async def test_an_instance_is_killed_and_another_agent_gets_its_place(folder: Path) -> None:
    async with world(folder) as scene:
        for name in ("w1", "w2"):
            await scene.add(name, serves=["one_by_one", "ask"])
        for name in ("w3", "w4"):
            await scene.add(name, serves=["side_by_side"])
        shut("held")
        held = [scene.call("one_by_one", "held", f"h{number}") for number in range(2)]
        queued = [scene.call("one_by_one", f"q{number}", f"s{number}") for number in range(6)]
        await scene.rounds()
        assert (scene.running("w1"), scene.running("w2")) == (4, 4)
        scene.mind.want_once(kill("w1", "one_by_one", reason="it idles"), provision("side_by_side", "here"))
        await scene.rounds()
        assert serving(scene, "one_by_one") == ["w2"]
        assert serving(scene, "ask") == ["w1", "w2"]
        assert serving(scene, "side_by_side") == ["w1", "w3", "w4"], "who serves the least serves one more"
        assert (scene.running("w1"), scene.running("w2")) == (1, 7), "what runs goes on, what waits is passed on"
        assert [replica.worker for replica in scene.controller.view.replicas("one_by_one")] == ["w2"]
        open_all()
        assert await asyncio.gather(*held, *queued)
        await scene.rounds()
        completed = {name: worker.process.calls.host.completed for name, worker in scene.workers.items()}  # type: ignore[union-attr]
        for number in range(12):
            assert await scene.client.call("one_by_one", f"n{number}")
            assert await scene.client.call("side_by_side", f"n{number}")
        after = {name: worker.process.calls.host.completed for name, worker in scene.workers.items()}  # type: ignore[union-attr]
        assert after["w2"] - completed["w2"] == 12
        assert after["w1"] > completed["w1"]
        scene.mind.want(kill("w2", "one_by_one"))
        await scene.rounds()
        assert serving(scene, "one_by_one") == ["w2"], "the last one stays"


@simulated
async def test_the_sessions_of_an_instance_that_is_killed_move_idle_ones_too(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        for number in range(30):
            await scene.client.options(session=f"s{number}").call("Ledger.note", "one")
        await scene.rounds(200.0)
        shut("busy")
        busy = scene.client.options(session="s3").call("Ledger.note", "busy")
        behind = scene.client.options(session="s3").call("Ledger.note", "behind")
        await scene.rounds()
        scene.mind.want_once(kill("w1", "Ledger"))
        await scene.rounds(1.0)
        more = [scene.client.options(session=f"s{number}").call("Ledger.note", "two") for number in range(30)]
        await scene.rounds()
        open_all()
        assert await busy == ["one", "busy"]
        assert await behind == ["one", "busy", "behind"]
        assert [len(seen) for seen in await asyncio.gather(*more)] == [4 if number == 3 else 2 for number in range(30)]
        await scene.rounds(10.0)
        view = scene.controller.view
        assert {view.holder(f"s{number}", "Ledger") for number in range(30)} == {"w2"}
        before = scene.workers["w1"].process.calls.host.completed  # type: ignore[union-attr]
        for number in range(40):
            await scene.client.options(session=f"new{number}").call("Ledger.note", "one")
        assert scene.workers["w1"].process.calls.host.completed == before  # type: ignore[union-attr]


@simulated
async def test_an_agent_is_given_to_a_worker_whose_app_has_it(folder: Path) -> None:
    async with world(folder) as scene:
        await scene.add("w1", serves=["side_by_side"])
        await scene.add("w2", serves=["ask", "where", "Clerk", "Ledger"])
        await scene.add("w3", app=load_app(Path(__file__).parent / "apps" / "drain_app.py"), serves=["echo"])
        await scene.rounds()
        scene.mind.want_once(provision("side_by_side", "here"))
        await scene.rounds()
        assert serving(scene, "side_by_side") == ["w1", "w2"]


@simulated
async def test_an_agent_that_nobody_served_at_first_is_served_when_it_is_wanted(folder: Path) -> None:
    async with world(folder) as scene:
        await scene.add("w1", serves=["where"])
        await scene.rounds()
        with pytest.raises(UnknownActorError):
            await scene.client.call("side_by_side", "early")
        scene.mind.want_once(provision("side_by_side", "here"))
        await scene.rounds()
        assert serving(scene, "side_by_side") == ["w1"]
        assert await scene.client.call("side_by_side", "later") == "later"


@simulated
async def test_the_last_instances_are_not_killed_at_once(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        shut("held")
        held = [scene.call("one_by_one", "held", f"h{number}") for number in range(2)]
        queued = [scene.call("one_by_one", f"q{number}", f"s{number}") for number in range(6)]
        await scene.rounds()
        both = [worker._serving for worker in scene.workers.values() if worker._serving is not None]
        await asyncio.gather(*(each.retire("one_by_one") for each in both))  # as for an agent that needs no instances
        await scene.rounds()
        assert serving(scene, "one_by_one")
        later = scene.call("one_by_one", "later", "l")
        open_all()
        assert await asyncio.gather(*held, *queued, later)


@simulated
async def test_an_instance_is_killed_while_the_broker_is_away(folder: Path) -> None:
    async with world(folder, "w1", "w2") as scene:
        for number in range(10):
            await scene.client.options(session=f"s{number}").call("Ledger.note", "one")
        worker = scene.workers["w1"]
        for outage in ("before it has told", "while sessions move"):
            assert worker._serving is not None
            if outage == "before it has told":
                scene.hub.cut("w1")
            retiring = asyncio.create_task(worker._serving.retire("Ledger"))
            if outage == "while sessions move":
                while "Ledger" in scene.client.process.table.members["w1"].actors:
                    await asyncio.sleep(0.001)
                scene.hub.cut("w1")
            await asyncio.sleep(LEASE_S / 2)
            assert not retiring.done()
            scene.hub.restore("w1")
            await retiring
            await scene.rounds()
            for number in range(10):
                await scene.client.options(session=f"s{number}").call("Ledger.note", "two")
            stores, places = scene.workers["w2"].process.stores, scene.client.process.places
            assert stores is not None
            assert {places.store_known(f"Ledger.s{number}") for number in range(10)} == set(stores.ids)
            await worker._serving.provision("Ledger")
            for number in range(10):
                await scene.client.migrate("Ledger", f"s{number}", to="w1")


@simulated
async def test_calls_never_fail_while_instances_come_and_go(folder: Path) -> None:
    async with world(folder, "w1", "w2", "w3") as scene:
        ended: list[str] = []

        async def work(number: int) -> None:
            caller = scene.client.options(session=f"s{number % 7}")
            for turn in range(60):
                actor = ("side_by_side", "Ledger.note", "one_by_one")[turn % 3]
                await caller.call(actor, f"{number}-{turn}")
                ended.append(actor)
                await asyncio.sleep(0.05)

        workers = [asyncio.get_running_loop().create_task(work(number)) for number in range(20)]
        for number in range(6):
            name = f"w{number % 3 + 1}"
            scene.mind.want_once(*(kill(name, actor) for actor in ("side_by_side", "Ledger", "one_by_one")))
            await scene.rounds(0.7)
            scene.mind.want_once(*(provision(actor, "here") for actor in ("side_by_side", "Ledger", "one_by_one")))
            await scene.rounds(0.7)
        await asyncio.gather(*workers)
        assert len(ended) == 1200
