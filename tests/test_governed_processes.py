"""What a global controller decides, watched from outside, with real processes; and what becomes of calls when one is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import Running, naming
from controlled import ControlledSite, Mind, controller_of
from waiting import PATIENCE_S, until

from nalar_mq.actions import Leader, State, States, decode_decision
from nalar_mq.address import Subjects
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.guards import Bounds
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.policy import Action, allow, kill, limit, migrate, provision, route, set_priority
from nalar_mq.errors import NotAllowedError
from nalar_mq.future import Future
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import KeyValue

APP = Path(__file__).parent / "apps" / "desks_app.py"
LEASE_S = 3.0

POLICY = """
from nalar_mq.controllers.policy import route


class Mine:
    def decide(self, view):
        yield route("where", sorted(view.workers), [1.0] * len(view.workers), reason="to see that it holds on")
"""


SLOTS = """
from nalar_mq import tool


@tool(min_instances=0, resources={"slot": 1})
async def first() -> str:
    return "first"


@tool(min_instances=0, resources={"slot": 1})
async def other() -> str:
    return "other"
"""


class Site(ControlledSite):
    """Three workers, a client, and a controller that decides what it is told to decide."""

    mind: Mind

    async def decide(self, *actions: Action) -> None:
        """Returns when that, and nothing else, holds or has been ordered, and this process has heard of it."""
        self.mind.wanted = actions
        states = tuple(action for action in actions if isinstance(action, State))
        acts = [action for action in actions if not isinstance(action, State)]
        governor = self.controller.governor
        ordered = lambda: {act for decision in governor.history for act in decision.acts}  # noqa: E731
        await until(lambda: governor.states == states and ordered().issuperset(acts), f"not decided: {governor.history}")
        await until(lambda: self.client.process.enforcement.standing.states == states, "it was never told")

    async def knows(self, session: str) -> Future[Any]:
        """Returns when the controller knows the session, by a call of it that goes on until the test ends."""
        call = self.client.options(session=session).call("stay")
        await until(lambda: session in self.controller.view.sessions, "it was never reported")
        return call

    def pid(self, worker: str) -> int:
        return self.node.pids[worker]


@asynccontextmanager
async def workers(access: BrokerAccess, namespace: str, folder: Path) -> AsyncIterator[tuple[LocalController, Client]]:
    settings = Settings(broker=access, namespace=namespace, node="here", lease_s=LEASE_S, state=str(folder / "state"))
    variables = {"DESKS_FOLDER": str(folder)}
    async with (
        LocalController(APP, settings, workers=3, variables=variables, log_level="warning") as node,
        connect(settings=settings) as client,
    ):
        await node.ready()
        await client.wait_for("where")
        await until(lambda: len(client.process.table.replicas("where")) == 3, "a worker is missing")
        yield node, client


@pytest.fixture
async def site(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    mind = Mind()
    async with (
        workers(broker_access, namespace, tmp_path) as (node, client),
        controller_of(broker_access, namespace, mind, lease_s=LEASE_S, bounds=Bounds(cooldown_s=0.0)) as controller,
    ):
        await until(lambda: controller.is_leader and len(controller.view.workers) == 3, "nobody has reported")
        yield Site(tmp_path, node, client, controller, mind)


async def test_a_session_lands_where_it_is_routed(site: Site) -> None:
    for worker in site.node.names:
        await site.knows(f"to-{worker}")
        await site.decide(route(f"to-{worker}", "Desk", worker, reason="the test wants it there"))
        desk = site.client.options(session=f"to-{worker}")
        assert (await desk.call("Desk.add", "x"))[0] == site.pid(worker)


async def test_calls_are_divided_by_weights(site: Site) -> None:
    one, two, three = site.node.names
    await site.decide(route("where", [one, two, three], [0.5, 0.3, 0.2], reason="the test wants it so"))
    found = Counter(await asyncio.gather(*[site.client.call("where") for _ in range(3000)]))
    shares = {worker: found[site.pid(worker)] / 3000 for worker in site.node.names}
    assert shares == pytest.approx({one: 0.5, two: 0.3, three: 0.2}, abs=0.05)


async def test_a_session_that_is_raised_overtakes_what_waits_and_moves_with_its_state(site: Site) -> None:
    one = site.node.names[0]
    await site.decide(route("in_turn", [one], [1.0], reason="all in one queue"))
    first = site.client.call("in_turn", "first", gate="go")
    await until(lambda: site.written("ran") == ["first"], "it does not begin")
    waiting = [site.client.options(session=name).call("in_turn", name) for name in ("a", "b", "c")]
    await until(lambda: "c" in site.controller.view.sessions, "it was never reported")
    raised = set_priority("c", 9, reason="the test wants it first")
    await site.decide(route("in_turn", [one], [1.0], reason="all in one queue"), raised)
    await asyncio.sleep(LEASE_S)  # within which the worker has heard of it, whatever becomes of messages
    site.open("go")
    await asyncio.gather(first, *waiting)
    assert site.written("ran") == ["first", "c", "a", "b"]


async def test_a_session_is_migrated_with_its_state_and_with_what_waits_behind_a_call(site: Site) -> None:
    one, two, _ = site.node.names
    await asyncio.gather(site.knows("moves"), site.knows("stays"))
    await site.decide(route("moves", "Desk", one), route("stays", "Desk", one))
    moves, stays = site.client.options(session="moves"), site.client.options(session="stays")
    assert (await moves.call("Desk.add", "before"))[0] == site.pid(one)
    long = stays.call("Desk.add", "long", gate="end")
    await until(lambda: site.controller.view.holder("stays", "Desk") == one, "it was never reported")
    behind = asyncio.ensure_future(moves.call("Desk.add", "behind"))
    await site.decide(migrate("moves", "Desk", one, two, reason="it waits behind a long call"))
    async with asyncio.timeout(PATIENCE_S):
        assert await behind == (site.pid(two), ["before", "behind"])
    assert not long.available()
    site.open("end")
    assert (await long)[0] == site.pid(one)


async def test_a_limit_keeps_and_who_is_not_allowed_is_refused(site: Site) -> None:
    await site.decide(limit("where", 0, reason="it is too dear"), allow("Desk", callers=["in_turn"], reason="it is private"))
    held = site.client.call("where")
    with pytest.raises(NotAllowedError, match="it is private"):
        for _ in range(100):
            await site.client.options(session="refused").call("Desk.add", "x")
            await asyncio.sleep(0.1)
    assert not held.available()
    await site.decide()
    assert await held in site.node.pids.values()
    assert (await site.client.options(session="refused").call("Desk.add", "y"))[1][-1] == "y"


async def test_a_worker_that_dies_comes_back_with_what_was_decided_for_it(site: Site) -> None:
    one, table = site.node.names[0], site.client.process.table
    serves = lambda: {actor for actor, info in members(one).items() if info}  # noqa: E731
    members = lambda name: table.members[name].actors if name in table.members else {}  # noqa: E731

    async def dies() -> None:
        incarnation, pid = table.members[one].incarnation, site.pid(one)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: site.node.pids.get(one, pid) != pid, "it has no successor")
        await until(lambda: one in table.members and table.members[one].incarnation != incarnation, "it does not join")

    before = serves()
    await site.decide(kill(one, "where", reason="the test wants it"))
    await until(lambda: serves() == before - {"where"}, "it is not obeyed")
    await site.decide()
    await dies()
    assert serves() == before - {"where"}
    await site.decide(provision("where", "here", reason="the test wants it back"))
    await site.decide()
    await until(lambda: serves() == before, "it is not obeyed")
    await dies()
    assert serves() == before


async def test_an_agent_that_got_no_slot_at_first_gets_one_when_there_is_room(
    broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    """It has none on either node, since another agent comes before it there; then that makes room on one of them."""
    settings = Settings(broker=broker_access, namespace=namespace, lease_s=LEASE_S)
    app, mind = tmp_path / "app.py", Mind()
    app.write_text(SLOTS)
    nodes = [
        LocalController(app, msgspec.structs.replace(settings, node=name), workers=1, capacities={"slot": 1.0})
        for name in ("n1", "n2")
    ]
    async with (
        nodes[0],
        nodes[1],
        connect(settings=settings) as client,
        controller_of(broker_access, namespace, mind, lease_s=LEASE_S) as controller,
    ):
        view = controller.view
        await until(lambda: len(view.replicas("first")) == 2, "a node is missing")
        await until(lambda: view.left("n2", "slot") == 0.0, "its capacities are missing")
        assert view.replicas("other") == ()
        (on_n2,) = view.nodes["n2"].workers
        mind.wanted = (kill(on_n2, "first", reason="to make room"),)
        await until(lambda: len(view.replicas("first")) == 1, "it is not obeyed")
        mind.wanted = (provision("other", "n2", reason="there is room"),)
        await until(lambda: bool(view.replicas("other")), f"it is not obeyed: {controller.governor.history}")
        mind.wanted = ()
        assert await client.call("other") == "other"
        assert view.left("n2", "slot") == 0.0


class Controllers:
    """Global controllers in processes of their own, with a policy in a file."""

    def __init__(self, access: BrokerAccess, namespace: str, folder: Path) -> None:
        (folder / "mine.py").write_text(POLICY)
        self._folder = folder
        self._variables = naming(access, namespace)
        self._running: list[Running] = []

    def start(self) -> Running:
        self._running.append(Running("controller", "--policy", "mine.py:Mine", cwd=self._folder, variables=self._variables))
        return self._running[-1]

    def end(self) -> None:
        for each in self._running:
            each.process.send_signal(signal.SIGCONT)
            each.end(signal.SIGKILL)


async def record(bucket: KeyValue, key: str, kind: Any) -> Any:
    entry = await bucket.get(key)
    return None if entry is None or entry.value is None else decode_decision(entry.value, kind)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
async def test_no_call_notices_that_the_global_controller_is_gone(
    sign: signal.Signals, broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    """Killed, or paused for so long that another one leads: then what it does when it wakes up is refused."""
    subjects, controllers = Subjects(namespace), Controllers(broker_access, namespace, tmp_path)
    transport = await NatsTransport.connect(broker_access, name="watching")
    try:
        async with workers(broker_access, namespace, tmp_path) as (_, client):
            first = controllers.start()
            await until(lambda: "leadership.taken" in first.said, "nobody leads")
            leader = await transport.key_value(subjects.leader_bucket)
            control = await transport.key_value(subjects.control_bucket)

            async def has_led(than: str, states: States | None) -> tuple[str, States]:
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        name, held = await record(leader, "leader", Leader), await record(control, "states", States)
                        term = 0 if states is None else states.term
                        if name is not None and name.name != than and held is not None and held.states and held.term > term:
                            return name.name, held
                        await asyncio.sleep(0.05)

            name, states = await has_led("", None)
            controllers.start()
            is_over, done, failed = False, Counter[str](), list[BaseException]()

            async def load(session: str) -> None:
                desk = client.options(session=session)
                while not is_over:
                    try:
                        await asyncio.gather(client.call("where"), desk.call("Desk.add", "x"))
                        done[session] += 1
                    except Exception as error:
                        failed.append(error)
                        return

            loads = [asyncio.ensure_future(load(f"s{n}")) for n in range(4)]
            await until(lambda: sum(done.values()) > 50, "nothing is done")
            begun = asyncio.get_running_loop().time()
            first.process.send_signal(sign)
            _, later = await has_led(name, states)
            took_s = asyncio.get_running_loop().time() - begun
            assert later.states == states.states
            if sign is signal.SIGSTOP:
                first.process.send_signal(signal.SIGCONT)
                await until(lambda: "leadership.lost" in first.said or "stands by" in first.said, "")
            before = sum(done.values())
            await until(lambda: sum(done.values()) > before + 50 or failed, "nothing is done")
            assert (await record(control, "states", States)).term == later.term
            is_over = True
            await asyncio.gather(*loads)
            assert not failed
            assert took_s < PATIENCE_S
    finally:
        controllers.end()
        await transport.aclose()
