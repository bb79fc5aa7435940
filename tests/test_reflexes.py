"""What a node does by itself while nobody leads, with worker processes and a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S, until

from nalar_mq import simulation
from nalar_mq.actions import Act, Acts, Kill, Order, Provision, encode_decision
from nalar_mq.address import Subjects
from nalar_mq.changes import Changes
from nalar_mq.client import Client, connect
from nalar_mq.columns import Serves
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.reflexes import Reflexes
from nalar_mq.event_loop import cancel_all
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Member, encode_record
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import KeyEntry, KeyValue, Transport

APP = Path(__file__).parent / "apps" / "reflex_app.py"
LEASE_S = 3.0


class Site:
    """A node of three workers and nobody who leads."""

    def __init__(self, folder: Path, node: LocalController, client: Client, reflexes: Reflexes, acts: KeyValue) -> None:
        self.folder = folder
        self.node = node
        self.client = client
        self.reflexes = reflexes
        self.acts = acts

    async def lead(self, *orders: Order) -> None:
        """Decides as a leader does, once: for a lease, somebody leads."""
        await self.acts.put("acts", encode_decision(Acts(WIRE_VERSION, 1, len(orders), orders)))

    def serves(self, actor: str) -> set[str]:
        return {address.name for address in self.client.process.table.replicas(actor)}


@asynccontextmanager
async def site_of(access: BrokerAccess, namespace: str, folder: Path, **capacities: float) -> AsyncIterator[Site]:
    settings = Settings(broker=access, namespace=namespace, node="here", lease_s=LEASE_S, state=str(folder / "state"))
    subjects = Subjects(namespace)
    async with (
        await NatsTransport.connect(access, name="node") as transport,
        LocalController(
            APP,
            settings,
            workers=3,
            variables={"REFLEX_FOLDER": str(folder)},
            capacities=capacities,
            log_level="warning",
        ) as node,
        connect(settings=settings) as client,
    ):
        await node.ready()
        await client.wait_for("Desk")
        await until(lambda: len(client.process.table.replicas("Desk")) == 3, "a worker is missing")
        reflexes = Reflexes(subjects, "here", node, lease_s=LEASE_S)
        running = asyncio.create_task(reflexes.run(transport))
        try:
            acts = await transport.key_value(subjects.acts_bucket, ttl_s=LEASE_S)
            yield Site(folder, node, client, reflexes, acts)
            assert not running.done(), running
        finally:
            await cancel_all([running])


@pytest.fixture
async def site(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_of(broker_access, namespace, tmp_path) as site:
        yield site


@pytest.fixture
async def bounded(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_of(broker_access, namespace, tmp_path, slot=2.0, gpu=2.0) as site:
        yield site


async def homes(site: Site, sessions: Iterable[str]) -> dict[str, int]:
    """The processes in which the desks of the sessions are."""
    names = list(sessions)
    found = await asyncio.gather(*[site.client.options(session=name).call("Desk.add", "first") for name in names])
    return dict(zip(names, (pid for pid, _ in found), strict=True))


def hold_at(site: Site, agent: str, gate: Path) -> asyncio.Future[int]:
    return asyncio.ensure_future(site.client.options(session=gate.name).call(f"{agent}.hold", str(gate)))


async def test_sessions_behind_a_long_call_go_elsewhere_with_their_state_while_nobody_leads(site: Site) -> None:
    await site.lead()
    where = await homes(site, [f"s{number}" for number in range(24)])
    held = max(set(where.values()), key=list(where.values()).count)
    long_one, *stuck = [session for session, pid in where.items() if pid == held]
    assert stuck
    lasts = asyncio.ensure_future(site.client.options(session=long_one).call("Desk.add", "long", str(site.folder / "gate")))
    await until(lambda: (site.folder / "gate.waits").exists(), "it does not run")
    waiting = [asyncio.ensure_future(site.client.options(session=name).call("Desk.add", "second")) for name in stuck]
    async with asyncio.timeout(PATIENCE_S):
        answers = await asyncio.gather(*waiting)
    assert await site.acts.get("acts") is None, "they have been moved while somebody led"
    assert all(notes == ["first", "second"] for _, notes in answers)
    assert held not in {pid for pid, _ in answers}
    assert site.reflexes.done >= len(stuck)
    assert not lasts.done()
    (site.folder / "gate").touch()
    assert await lasts == (held, ["first", "long"])


async def test_an_agent_that_has_too_much_begins_elsewhere_within_what_there_is(bounded: Site) -> None:
    """Two of its instances may be on the node; one of them was retired when somebody led."""
    site = bounded
    one, two = sorted(site.serves("Press"))
    member = site.client.process.table.members[two]
    await site.lead(Order(1, Kill(two, "Press"), {two: member.incarnation}))
    await until(lambda: site.serves("Press") == {one}, "it is not obeyed")
    gates = [site.folder / f"gate-{number}" for number in range(4)]
    calls = [hold_at(site, "Press", gate) for gate in gates]
    await until(lambda: len(site.serves("Press")) == 2, "it does not begin")
    await until(lambda: len(list(site.folder.glob("gate-*.waits"))) == 2, "nothing went there")
    assert site.serves("Press") <= set(site.node.names)
    for gate in gates:
        gate.touch()
    assert len(set(await asyncio.gather(*calls))) == 2
    assert len(site.serves("Press")) == 2, "there is no room for more"


async def test_an_agent_with_a_bound_that_other_nodes_serve_is_left_alone(bounded: Site) -> None:
    site, transport = bounded, bounded.client.process.transport
    members = await transport.key_value(site.client.process.subjects.members_bucket, ttl_s=LEASE_S)
    stranger = encode_record(Member(WIRE_VERSION, 7, "elsewhere", "worker", 1, actors={"Rare": ActorInfo("agent", {})}))
    retired = {actor: max(site.serves(actor)) for actor in ("Rare", "Press")}

    async def stays() -> None:
        while True:
            await members.put("elsewhere-1", stranger)
            await asyncio.sleep(LEASE_S / 6)

    def hold(agent: str) -> list[asyncio.Future[int]]:
        gates = [site.folder / f"{agent}-{number}" for number in range(16)]
        return [hold_at(site, agent, gate) for gate in gates]

    there, waiting = asyncio.create_task(stays()), list[asyncio.Future[int]]()
    try:
        incarnations = {name: site.client.process.table.members[name].incarnation for name in retired.values()}
        await site.lead(
            *[
                Order(number, Kill(name, actor), {name: incarnations[name]})
                for number, (actor, name) in enumerate(retired.items(), 1)
            ]
        )
        await until(lambda: not any(name in site.serves(actor) for actor, name in retired.items()), "it is not obeyed")
        waiting += hold("Rare")
        await until(lambda: any(site.folder.glob("Rare-*.waits")), "it does not run")
        await until(lambda: site.reflexes.is_alone, "somebody leads")
        await until(lambda: site.reflexes.left_alone["Rare"], "it is not looked at")
        waiting += hold("Press")
        await until(lambda: len(site.serves("Press")) == 2, "it does not begin")
        assert len(site.serves("Rare") - {"elsewhere-1"}) == 1
    finally:
        await cancel_all([there, *waiting])


# In virtual time: a node of two workers, one of which has far too much, and nobody who leads.

SUBJECTS = Subjects("t")


class Team:
    """Two workers that note what they are told; to be asked for their names fails `failures` times."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.told: list[tuple[str, Act]] = []

    @property
    def names(self) -> tuple[str, ...]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("nobody has thought of this")
        return "w1", "w2"

    def act(self, name: str, act: Act) -> bool:
        self.told.append((name, act))
        return True


async def report(hub: MemoryHub) -> None:
    """As workers do: the first serves what has too much, the second could."""
    press = Serves("agent", concurrency=1, resources={"slot": 1.0})
    transport = await hub.connect("workers")
    changes = {name: Changes(name, 1, "here") for name in ("w1", "w2")}
    changes["w1"].set_serves({"Press": press})
    for each in changes.values():
        each.set_able({"Press": press})
        each.set_resources({"slot": (0.0, 2.0)})
    changes["w1"].set_queues({"Press": (5, 1)})
    while True:
        for name, each in changes.items():
            for data in each.whole(asyncio.get_running_loop().time(), 100_000):
                transport.publish(SUBJECTS.report(name), data)
        await asyncio.sleep(0.25)


async def decided(team: Team, wrap: Callable[[Transport], Transport] = lambda transport: transport) -> Reflexes:
    """What comes of it within some leases."""
    hub = MemoryHub(1)
    reflexes = Reflexes(SUBJECTS, "here", team, lease_s=LEASE_S)
    tasks = [asyncio.create_task(report(hub)), asyncio.create_task(reflexes.run(wrap(await hub.connect("node"))))]
    await asyncio.sleep(3 * LEASE_S)
    assert not any(task.done() for task in tasks), tasks
    await cancel_all(tasks)
    return reflexes


def test_a_round_that_fails_is_no_more_than_that() -> None:
    team = Team(failures=3)
    assert simulation.run(decided(team)).failed == 3
    assert [(name, type(act), act.agent) for name, act in team.told] == [("w2", Provision, "Press")]


class MembersThatLast:
    """A bucket in which somebody leads again by the time that all of it has been read."""

    def __init__(self, bucket: KeyValue, acts: KeyValue) -> None:
        self._bucket = bucket
        self._acts = acts

    async def entries(self) -> list[KeyEntry]:
        found = await self._bucket.entries()
        await self._acts.put("acts", encode_decision(Acts(WIRE_VERSION, 1, 1, ())))
        return found


def test_who_leads_again_while_it_decides_is_not_overridden() -> None:
    def wrap(transport: Transport) -> Transport:
        opens = transport.key_value

        async def key_value(bucket: str, *, ttl_s: float | None = None) -> Any:
            found = await opens(bucket, ttl_s=ttl_s)
            if bucket != SUBJECTS.members_bucket:
                return found
            return MembersThatLast(found, await opens(SUBJECTS.acts_bucket, ttl_s=LEASE_S))

        transport.key_value = key_value  # type: ignore[method-assign]
        return transport

    team = Team()
    simulation.run(decided(team, wrap))
    assert team.told == []
