"""Who is alive, mostly in virtual time: what leases, outages and processes that stand still lead to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from random import Random
from typing import Any

import pytest
from waiting import until

from nalar_mq import simulation
from nalar_mq.address import Address, Subjects
from nalar_mq.config import LEASE_S, BrokerAccess
from nalar_mq.errors import BrokerError
from nalar_mq.membership import Membership
from nalar_mq.memory_transport import MemoryHub, MemoryTransport
from nalar_mq.messages import WIRE_VERSION, Lost, Member, encode_record
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.placement import RoutingTable

SUBJECTS = Subjects("t")


class Somebody:
    """A process as far as membership goes."""

    def __init__(self, name: str, incarnation: int = 1) -> None:
        self.me = Address(name, incarnation)
        self.table = RoutingTable(Random(1))
        self.lost: list[Address] = []
        self.events: list[str] = []
        self.transport: MemoryTransport
        self.membership: Membership

    async def join(self, hub: MemoryHub) -> Somebody:
        self.transport = await hub.connect(self.me.name)
        self.membership = Membership(
            self.transport,
            SUBJECTS,
            self.table,
            self.me,
            Member(WIRE_VERSION, self.me.incarnation, "n", "worker", 1),
            on_change=lambda: None,
            on_lost=self.lost.append,
            events=self,
        )
        await self.membership.start()
        return self

    def on_replaced(self) -> None:
        self.events.append("replaced")

    def on_declared_lost(self) -> None:
        self.events.append("declared lost")

    @property
    def sees(self) -> set[str]:
        return set(self.table.members)

    async def leave(self) -> None:
        await self.membership.aclose()
        await self.transport.aclose()


async def test_the_time_in_which_a_machine_sleeps_counts(
    broker_access: BrokerAccess, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, subjects, slept_s = Somebody("a"), Subjects(namespace), 0.0
    clock = time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda which: clock(which) + slept_s)
    async with await NatsTransport.connect(broker_access, name="a") as transport:
        membership = Membership(
            transport,
            subjects,
            one.table,
            one.me,
            Member(WIRE_VERSION, 1, "n", "worker", 1),
            on_change=lambda: None,
            on_lost=one.lost.append,
            events=one,
            lease_connect=lambda: NatsTransport.connect(broker_access, name="a-lease"),
        )
        await membership.start()
        assert membership.is_current()
        slept_s = 2 * LEASE_S
        assert not membership.is_current()
        await until(membership.is_current, within_s=60.0)
        assert one.events == []
        await membership.aclose()


def simulated(scene: Any) -> Any:
    def test() -> None:
        async def play() -> None:
            hub = MemoryHub(1)
            a, b, c = [await Somebody(name).join(hub) for name in "abc"]
            await asyncio.sleep(2 * LEASE_S)
            assert a.sees == b.sees == c.sees == {"a", "b", "c"}
            async with asyncio.timeout(10_000):
                await scene(hub, a, b, c)

        simulation.run(play())

    test.__name__ = test.__qualname__ = scene.__name__
    return test


async def freeze(somebody: Somebody, seconds: float) -> None:
    """Neither its renewals nor its judgement go on; then everything that it missed comes at once."""
    membership = somebody.membership
    membership._tasks[-1].cancel()
    lease: Any = membership._lease
    lease._keeping.cancel()
    somebody.transport.set_paused(True)
    await asyncio.sleep(seconds)
    somebody.transport.set_paused(False)
    lease._keeping = asyncio.create_task(_wake(lease))
    membership._tasks[-1] = asyncio.create_task(membership._look_for_the_dead())


async def _wake(lease: Any) -> None:
    with contextlib.suppress(BrokerError):
        await lease._lease.renew()
    await lease._lease.keep(LEASE_S / 3)


@simulated
async def test_one_that_leaves_is_gone_at_once(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    await a.leave()
    await asyncio.sleep(0.1)
    assert b.sees == c.sees == {"b", "c"}
    assert b.lost == c.lost == [a.me]


@simulated
async def test_one_that_is_killed_is_lost_after_a_lease(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    hub.kill("a")
    await asyncio.sleep(LEASE_S / 2)
    assert b.sees == {"a", "b", "c"}
    await asyncio.sleep(LEASE_S)
    assert b.sees == c.sees == {"b", "c"}
    assert b.lost == c.lost == [a.me]
    assert b.events == c.events == []


@simulated
async def test_an_outage_of_the_broker_kills_nobody(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    for name in "abc":
        hub.cut(name)
    await asyncio.sleep(5 * LEASE_S)
    for name in "abc":
        hub.restore(name)
    assert not a.membership.is_current()
    await asyncio.sleep(3 * LEASE_S)
    assert a.membership.is_current()
    assert a.sees == b.sees == c.sees == {"a", "b", "c"}
    assert a.lost == b.lost == c.lost == []
    assert a.events == b.events == c.events == []


@simulated
async def test_one_cut_off_for_long_is_lost_for_all_and_told_so(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    hub.cut("a")
    assert a.membership.is_current()
    await asyncio.sleep(3 * LEASE_S)
    assert not a.membership.is_current()
    assert b.lost == c.lost == [a.me]
    hub.restore("a")
    await asyncio.sleep(2 * LEASE_S)
    assert a.events == ["declared lost"]
    assert not a.membership.is_current()
    assert b.sees == c.sees == {"b", "c"}
    again = await Somebody("a", 2).join(hub)
    await asyncio.sleep(0.1)
    assert b.sees == c.sees == again.sees == {"a", "b", "c"}
    await asyncio.sleep(3 * LEASE_S)
    assert again.events == []


@simulated
async def test_one_cut_off_for_less_than_a_lease_goes_on(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    hub.cut("a")
    await asyncio.sleep(LEASE_S / 2)
    hub.restore("a")
    await asyncio.sleep(3 * LEASE_S)
    assert a.sees == b.sees == c.sees == {"a", "b", "c"}
    assert a.events == []


@simulated
async def test_one_that_nobody_missed_goes_on(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    """All stand still but the broker, as when a laptop sleeps: keys expire, and nobody was there to see it."""
    for name in "abc":
        hub.cut(name)
    await asyncio.sleep(3 * LEASE_S)
    assert await (await (await hub.connect("x")).key_value(SUBJECTS.members_bucket)).entries() == []
    for name in "abc":
        hub.restore(name)
    await asyncio.sleep(3 * LEASE_S)
    assert a.sees == b.sees == c.sees == {"a", "b", "c"}
    assert a.events == b.events == c.events == []


@simulated
async def test_one_that_stood_still_does_not_judge_before_it_has_looked_for_a_lease(
    hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody
) -> None:
    hub.cut("a")
    freezing = asyncio.create_task(freeze(b, 2 * LEASE_S))
    hub.cut("c")
    await asyncio.sleep(2 * LEASE_S - 0.1)
    await freezing
    hub.restore("a")
    hub.restore("c")
    await asyncio.sleep(3 * LEASE_S)
    assert b.lost == []
    assert a.sees == b.sees == c.sees == {"a", "b", "c"}


@simulated
async def test_a_successor_takes_the_name(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    successor = await Somebody("a", 2).join(hub)
    await asyncio.sleep(LEASE_S)
    assert a.events == ["replaced"]
    assert b.lost == [a.me]
    assert b.table.is_alive(successor.me)
    await asyncio.sleep(3 * LEASE_S)
    assert b.table.is_alive(successor.me)
    assert successor.events == []


@simulated
async def test_declarations_are_kept_apart_by_incarnation(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    """An old declaration does not concern a successor, and one that makes no sense concerns nobody."""
    bucket = await (await hub.connect("x")).key_value(SUBJECTS.lost_bucket)
    await bucket.put("a", encode_record(Lost(WIRE_VERSION, 0)))
    await bucket.put("b", b"\xc1")
    members = await (await hub.connect("x")).key_value(SUBJECTS.members_bucket)
    await members.delete("a")
    await members.delete("b")
    await asyncio.sleep(LEASE_S)
    assert a.events == b.events == []


@pytest.mark.parametrize("seed", range(40))
def test_whoever_is_given_up_by_one_does_not_go_on_for_another(seed: int) -> None:
    """Cuts of random lengths at random times: at the end everybody agrees, or has been told to end."""

    async def play() -> None:
        rng = Random(seed)
        hub = MemoryHub(seed)
        crowd = [await Somebody(name).join(hub) for name in "abcde"]
        for _ in range(12):
            for name in "abcde":
                if rng.random() < 0.3:
                    hub.cut(name)
                elif rng.random() < 0.7:
                    hub.restore(name)
            await asyncio.sleep(rng.choice((0.5, 2.0, 5.9, 6.1, 7.0, 13.0)))
        for name in "abcde":
            hub.restore(name)
        await asyncio.sleep(4 * LEASE_S)
        ended = {one.me.name for one in crowd if one.events}
        living = [one for one in crowd if one.me.name not in ended]
        for one in living:
            assert one.sees == {other.me.name for other in living}, (one.me.name, ended)
        given_up = {address.name for one in crowd for address in one.lost}
        assert given_up == ended

    simulation.run(play())


class Between:
    """A register that lets something happen just before a declaration."""

    def __init__(self, somebody: Somebody, happens: Any) -> None:
        self.register = somebody.membership._register
        self.happens = happens

    async def declare(self, address: Address) -> None:
        await self.happens()
        await self.register.declare(address)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.register, name)


@simulated
async def test_one_that_comes_back_while_it_is_judged_is_not_gone(
    hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody
) -> None:
    bucket = await b.transport.key_value(SUBJECTS.members_bucket, ttl_s=LEASE_S)
    stranger = Address("stranger", 5)
    record = encode_record(Member(WIRE_VERSION, 5, "n", "worker", 1))

    async def comes_back() -> None:
        await bucket.put("stranger", record)

    a.membership._register = Between(a, comes_back)  # type: ignore[assignment]
    assert not await a.membership.is_gone(stranger)
    assert stranger not in a.lost


@simulated
async def test_a_record_that_cannot_be_read_is_no_death(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    bucket = await b.transport.key_value(SUBJECTS.members_bucket, ttl_s=LEASE_S)
    await bucket.put("newer", b"\x01 of another version")
    assert not await a.membership.is_gone(Address("newer", 5))
    assert a.lost == []


@simulated
async def test_one_that_nobody_knows_is_gone(hub: MemoryHub, a: Somebody, b: Somebody, c: Somebody) -> None:
    assert await a.membership.is_gone(Address("unheard-of", 5))
    assert a.lost == [Address("unheard-of", 5)]
    assert await b.membership.is_gone(Address("unheard-of", 5))
