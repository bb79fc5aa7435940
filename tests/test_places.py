"""Where sessions live, as several processes see it; the key-value store is the one in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from random import Random
from typing import Any, cast

import msgspec
import pytest

from nalar_mq import simulation
from nalar_mq.address import Address, Subjects
from nalar_mq.errors import BrokerError, CallError, SessionUnavailableError, StateLostError, WorkerLostError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Member, encode_record
from nalar_mq.placement import RoutingTable
from nalar_mq.places import PATIENCE_S, Places, place_of
from nalar_mq.transport import Transport

SUBJECTS = Subjects("places")
Answer = tuple[bytes, Address | None, CallError | None]


def _member(incarnation: int) -> Member:
    return Member(WIRE_VERSION, incarnation, "node", "worker", 1, {"agent": ActorInfo("agent", {}, stateful=True)})


class Asker:
    """One process that asks for places."""

    def __init__(self, transport: Transport, *names: str) -> None:
        self.table = RoutingTable(Random(1))
        self.places = Places(transport, SUBJECTS, self.table)
        self.answers: list[Answer] = []
        self.gone: set[bytes] = set()
        for name in names:
            self.table.join(name, _member(1))

    def take(self, id: bytes, address: Address | None, error: CallError | None) -> bool:
        self.answers.append((id, address, error))
        return id not in self.gone

    async def ask(self, key: str, *ids: bytes) -> list[Answer]:
        self.answers.clear()
        for id in ids:
            self.places.find(key, "agent", id, self.take)
        async with asyncio.timeout(60):
            while len(self.answers) < len(ids):
                await asyncio.sleep(0)
        return list(self.answers)


async def test_whoever_asks_first_decides_for_all() -> None:
    hub = MemoryHub(seed=1)
    one, two = Asker(await hub.connect("one"), "a", "b"), Asker(await hub.connect("two"), "b", "a")
    answers = await asyncio.gather(*[asker.ask("agent.s", b"1", b"2") for asker in (one, two)])
    assert {address for found in answers for _, address, _ in found} == {answers[0][0][1]}
    assert [id for id, _, _ in answers[0]] == [b"1", b"2"]
    assert one.places.known("agent.s") == two.places.known("agent.s") == answers[0][0][1]


async def test_a_loss_is_told_once_and_to_somebody_who_waits() -> None:
    hub = MemoryHub(seed=1)
    asker = Asker(await hub.connect("one"), "a")
    assert await asker.ask("agent.s", b"1") == [(b"1", Address("a", 1), None)]
    asker.table.leave(Address("a", 1))
    assert asker.places.known("agent.s") is None
    asker.table.join("b", _member(1))
    asker.gone.add(b"2")
    answers = await asker.ask("agent.s", b"2", b"3", b"4")
    assert [type(error) for _, _, error in answers] == [StateLostError, StateLostError, type(None)]
    assert {address for _, address, _ in answers} == {Address("b", 1)}


async def test_a_process_that_others_have_heard_of_first_is_not_taken_for_dead() -> None:
    hub = MemoryHub(seed=1)
    members = await (await hub.connect("c")).key_value(SUBJECTS.members_bucket)
    await members.put("late", encode_record(_member(1)))
    knowing, unknowing = Asker(await hub.connect("one"), "late"), Asker(await hub.connect("two"), "a")
    assert await knowing.ask("agent.s", b"1") == [(b"1", Address("late", 1), None)]
    assert await unknowing.ask("agent.s", b"1") == [(b"1", Address("late", 1), None)]
    unknowing.table.join("late", _member(1))
    unknowing.table.leave(Address("late", 1))
    ((_, address, error),) = await unknowing.ask("agent.s", b"2")
    assert (address, type(error)) == (Address("a", 1), StateLostError)


async def test_nobody_waits_for_ever_if_the_store_fails_or_another_asker_does() -> None:
    class Failing:
        async def key_value(self, bucket: str) -> Any:
            raise ZeroDivisionError(bucket)

    asker = Asker(cast("Transport", Failing()), "a")
    answers = await asker.ask("agent.s", b"1", b"2")
    assert [type(error) for _, _, error in answers] == [WorkerLostError] * 2
    working = Asker(await MemoryHub(seed=1).connect("one"), "a")

    def fails(id: bytes, address: Address | None, error: CallError | None) -> bool:
        raise ZeroDivisionError

    working.places.find("agent.s", "agent", b"0", fails)
    assert await working.ask("agent.s", b"1") == [(b"1", Address("a", 1), None)]


async def test_a_broker_that_is_away_for_a_while_is_asked_again() -> None:
    hub = MemoryHub(seed=1)
    asker = Asker(await hub.connect("one"), "a")
    hub.cut("one")
    asking = asyncio.create_task(asker.ask("agent.s", b"1"))
    await asyncio.sleep(6.0)  # longer than one answer is waited for
    assert not asking.done()
    hub.restore("one")
    assert await asking == [(b"1", Address("a", 1), None)]


@pytest.mark.parametrize("is_done", [True, False])
async def test_a_loss_is_told_though_the_answer_of_the_broker_is_lost(is_done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the session would begin anew, and nobody had been told."""
    hub = MemoryHub(seed=1)
    transport = await hub.connect("one")
    asker = Asker(transport, "a")
    await asker.ask("agent.s", b"1")
    asker.table.leave(Address("a", 1))
    asker.table.join("b", _member(1))
    bucket = type(await transport.key_value(SUBJECTS.places_bucket))
    update = bucket.update

    async def lose(self: Any, key: str, value: bytes, revision: int) -> int:
        monkeypatch.undo()
        if is_done:
            await update(self, key, value, revision)
        raise BrokerError("no answer")

    monkeypatch.setattr(bucket, "update", lose)
    answers = await asker.ask("agent.s", b"2", b"3")
    assert [type(error) for _, _, error in answers] == [StateLostError, type(None)]


async def test_a_session_that_has_moved_on_before_its_worker_left_is_found() -> None:
    hub = MemoryHub(seed=1)
    asker = Asker(await hub.connect("one"))
    bucket = await (await hub.connect("two")).key_value(SUBJECTS.places_bucket)
    entry = await bucket.create("agent.s", encode_record(place_of(Address("gone", 1), "left")))
    asking = asyncio.create_task(asker.ask("agent.s", b"1"))
    await asyncio.sleep(0.1)
    await bucket.update("agent.s", encode_record(place_of(Address("b", 1), "here")), entry)
    asker.table.join("b", msgspec.structs.replace(_member(1), stores=("here",)))
    assert await asking == [(b"1", Address("b", 1), None)]
    assert asker.places.store_known("agent.s") == "here"


async def wait_for_a_store(hub: MemoryHub, changes: Iterable[float]) -> tuple[list[Answer], int]:
    """Nobody opens it, while the table changes at these times; returns how often the directory was read as well."""
    asker, reads = Asker(await hub.connect("one"), "a"), 0
    bucket = await (await hub.connect("two")).key_value(SUBJECTS.places_bucket)
    await bucket.create("agent.s", encode_record(place_of(Address("gone", 1), "left")))
    kind = type(bucket)
    get = kind.get

    async def count(self: Any, key: str) -> Any:
        nonlocal reads
        reads += 1
        return await get(self, key)

    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "get", count)
        began = loop.time()
        for at in changes:
            loop.call_at(began + at, asker.places.on_table_changed)
        asker.places.find("agent.s", "agent", b"1", asker.take)
        while not asker.answers and loop.time() < began + 3 * PATIENCE_S:
            await asyncio.sleep(0.01)
    return asker.answers, reads


@pytest.mark.parametrize("changes", [(), [PATIENCE_S - 1e-9], [PATIENCE_S], [PATIENCE_S + 1e-9]])
def test_a_store_that_nobody_opens_is_waited_for_with_patience_and_not_for_ever(changes: Iterable[float]) -> None:
    answers, reads = simulation.run(wait_for_a_store(MemoryHub(seed=1), changes))
    assert [type(error) for _, _, error in answers] == [SessionUnavailableError]
    assert reads < 10


def test_the_directory_is_read_again_however_often_the_table_changes() -> None:
    changes = [number / 4 for number in range(int(4 * PATIENCE_S))]
    (_, quiet), (answers, restless) = (simulation.run(wait_for_a_store(MemoryHub(seed=1), at)) for at in ((), changes))
    assert [type(error) for _, _, error in answers] == [SessionUnavailableError]
    assert quiet > 3
    assert restless == quiet


async def test_without_a_replica_there_is_no_place() -> None:
    asker = Asker(await MemoryHub(seed=1).connect("one"))
    assert await asker.ask("agent.s", b"1") == [(b"1", None, None)]
    assert asker.places.known("agent.s") is None
