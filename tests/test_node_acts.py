"""What a node does of what the global controller wants done, in virtual time over a transport in memory."""

from __future__ import annotations

import asyncio

from nalar_mq import simulation
from nalar_mq.actions import Act, Acts, Kill, Migrate, Order, Provision, encode_decision
from nalar_mq.address import Subjects
from nalar_mq.controllers.node_acts import NodeActs
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Member, encode_record

LEASE_S = 6.0
SUBJECTS = Subjects("t")


class Node:
    """A node of two workers, one of which serves one agent only."""

    def __init__(self, hub: MemoryHub) -> None:
        self.hub = hub
        self.names = ("n-1", "n-2")
        self.done: list[str] = []
        self.orders: list[Order] = []

    def stop_worker(self, name: str) -> None:
        self.done.append(f"stop {name}")

    def add_worker(self, agent: str) -> str:
        self.done.append(f"add {agent}")
        return "n-3"

    async def join(self) -> asyncio.Task[None]:
        transport = await self.hub.connect("node")
        self.acts = await transport.key_value(SUBJECTS.acts_bucket, ttl_s=LEASE_S)
        members = await transport.key_value(SUBJECTS.members_bucket, ttl_s=1e6)
        for name, serves in {"n-1": ("a",), "n-2": ("a", "b"), "m-1": ("a",)}.items():
            actors = {actor: ActorInfo("agent", {}) for actor in serves}
            await members.put(name, encode_record(Member(WIRE_VERSION, 7, "worker", "n", 1, actors=actors)))
        self.obeys = NodeActs(SUBJECTS, "n", self, lease_s=LEASE_S)
        return asyncio.create_task(self.obeys.run(transport))

    async def publish(self, *acts: tuple[Act, dict[str, int]]) -> None:
        """As a leader does: with those of the last lease."""
        self.orders += [Order(number, *act) for number, act in enumerate(acts, len(self.orders) + 1)]
        await self.acts.put("acts", encode_decision(Acts(WIRE_VERSION, 1, len(self.orders), tuple(self.orders))))
        await asyncio.sleep(0.1)


def played(orders: list[tuple[Act, dict[str, int]]], before: list[tuple[Act, dict[str, int]]] | None = None) -> list[str]:
    async def play() -> list[str]:
        node = Node(MemoryHub(1))
        if before is not None:
            node.acts = await (await node.hub.connect("leader")).key_value(SUBJECTS.acts_bucket, ttl_s=LEASE_S)
            await node.publish(*before)
        task = await node.join()
        await asyncio.sleep(0.1)
        await node.publish(*orders)
        await node.publish()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return node.done

    return simulation.run(play())


def test_workers_are_stopped_and_added_each_once() -> None:
    assert played([(Kill("n-1"), {"n-1": 7}), (Provision("a", "n"), {})]) == ["stop n-1", "add a"]


def test_what_is_for_others_or_for_another_life_is_left_alone() -> None:
    kills = [(Kill("m-1"), {"m-1": 7}), (Kill("n-1"), {"n-1": 6}), (Kill("n-9"), {"n-9": 1})]
    others: list[tuple[Act, dict[str, int]]] = [
        (Provision("a", "m"), {}),
        (Migrate("s", "a", "n-1", "n-2"), {"n-1": 7, "n-2": 7}),
    ]
    assert played([*kills, *others]) == []


def test_what_a_worker_is_to_serve_it_sees_to_itself() -> None:
    kills: list[tuple[Act, dict[str, int]]] = [(Kill("n-1", "a"), {"n-1": 7}), (Kill("n-2", "a"), {"n-2": 7})]
    assert played([*kills, (Provision("a", "n", worker="n-2"), {"n-2": 7})]) == []


def test_what_was_published_before_the_node_listened_is_not_done() -> None:
    assert played([], before=[(Provision("a", "n"), {}), (Kill("n-1"), {"n-1": 7})]) == []


def test_with_another_connection_it_does_what_it_has_missed_and_nothing_twice() -> None:
    async def play() -> list[str]:
        node = Node(MemoryHub(1))
        task = await node.join()
        await asyncio.sleep(0.1)
        await node.publish((Provision("a", "n"), {}))
        await ended(task)
        await node.publish((Kill("n-1"), {"n-1": 7}))
        task = asyncio.create_task(node.obeys.run(await node.hub.connect("node-again")))
        await asyncio.sleep(0.1)
        await node.publish()
        await ended(task)
        return node.done

    async def ended(task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert simulation.run(play()) == ["add a", "stop n-1"]
