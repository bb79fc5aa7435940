"""Calls of one owner stay in order when a worker dies to which they were sent on after their session; in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import msgspec
import pytest

from nalar_mq import simulation
from nalar_mq.address import Subjects
from nalar_mq.app import load_app
from nalar_mq.calls import GRACE_S
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import WorkerLostError
from nalar_mq.memory_transport import MemoryHub, MemoryTransport
from nalar_mq.messages import Crossing, Forwarded, Migrate, Piece, Returned
from nalar_mq.stores import Stores
from nalar_mq.transport import Delivered
from nalar_mq.worker import Worker

APP = load_app(Path(__file__).parent / "apps" / "ledger_app.py")
NAMESPACE = "order"
LONG_S = 5.0


class SlowHub(MemoryHub):
    """Holds what `slow` processes send to each other, one way, until it is let go."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.slow: set[tuple[str, str]] = set()
        self.routed = 0
        self._held: list[tuple[MemoryTransport, Delivered]] = []

    def route(self, source: MemoryTransport, message: Delivered, *, undisturbed: bool = False) -> None:
        self.routed += 1
        subjects = Subjects(NAMESPACE)
        if any(source.name == sender and message.subject == subjects.box(to, sender) for sender, to in self.slow):
            self._held.append((source, message))
        else:
            super().route(source, message, undisturbed=undisturbed)

    def let_go(self) -> None:
        self.slow.clear()
        held, self._held = self._held, []
        for source, message in held:
            self.route(source, message)


class World:
    """Workers on one machine, and their clients."""

    def __init__(self, state: Path) -> None:
        self.hub = SlowHub()
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)),
            namespace=NAMESPACE,
            node="here",
            lease_s=1.0,
            state=str(state),
            local_store="off",
        )
        self.workers: dict[str, Worker] = {}

    async def start(self, name: str, node: str = "here") -> None:
        settings = self.settings
        if node != "here":
            settings = msgspec.structs.replace(settings, node=node, state=f"{settings.state}-{node}")
        self.workers[name] = worker = Worker(
            APP,
            settings,
            name=name,
            connect=self.hub.connect,
            random=random.Random(name),
            clock=wall_time(),
            is_simulated=True,
        )
        await worker.start()

    async def client(self, name: str) -> Client:
        chance = random.Random(name)
        made = connect(settings=self.settings, name=name, connect=self.hub.connect, random=chance, clock=wall_time())
        return await made.__aenter__()

    def kill(self, name: str) -> None:
        """As SIGKILL does: nothing more is written or sent, and its stores are free."""
        self.hub.kill(name)
        worker = self.workers.pop(name)
        assert worker._host is not None
        worker._host._invoker._runner.close()
        stores = worker.process.stores
        assert stores is not None
        for committer in stores.all:
            committer._waiting = SimpleQueue()
            committer._background.clear()
            committer.store.close()


def wall_time() -> Callable[[], float]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, simulation.SimulatedLoop)
    return loop.wall_time


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not holds():
            await asyncio.sleep(0.001)


async def begin(world: World, *path: str) -> tuple[Client, Client]:
    """The owner of a session that has moved along `path`, of which it knows the first step, and who has moved it."""
    for name in path:
        await world.start(name)
    owner, other = await world.client("client-owner"), await world.client("client-other")
    await other.options(session="ann").call("Ledger.read")
    await other.migrate("Ledger", "ann", to=path[0])
    await owner.options(session="ann").call("Ledger.apply", "0", [], 0.0)
    for name in path[1:]:
        await other.migrate("Ledger", "ann", to=name)
    return owner, other


async def end(world: World, owner: Client, other: Client) -> list[str]:
    """The calls that have taken effect."""
    log = (await owner.options(session="ann").call("Ledger.read"))[0]
    for client in (owner, other):
        await client.__aexit__(None, None, None)
    for worker in world.workers.values():
        await worker.aclose()
    return list(log)


async def lose_calls_that_were_sent_on(state: Path, successor: str) -> list[str]:
    """1 and 2 are lost with w2, to which w1 sent them on; before their owner hears of that, 3 comes to w1."""
    world = World(state)
    owner, other = await begin(world, "w1", "w2")
    ann, w1 = owner.options(session="ann", timeout_s=None), world.workers["w1"].process
    store = w1.places.store_known("Ledger.ann")
    world.hub.slow = {("w1", "client-owner")}
    calls = [ann.call("Ledger.apply", token, [], LONG_S) for token in ("1", "2")]
    await until(lambda: world.workers["w2"].running == 2)
    world.kill("w2")
    if successor == "w2":
        await world.start("w2")
    await until(lambda: (holder := w1.table.holder(store)) is not None and holder == world.workers[successor].process.me)
    calls.append(ann.call("Ledger.apply", "3", [], 0.0))
    calls.append(ann.cast("Ledger.apply", "4", [], 0.0))
    await asyncio.sleep(1.0)
    world.hub.let_go()
    calls.append(ann.call("Ledger.apply", "5", [], 0.0))
    await asyncio.gather(*(call for call in calls if call is not None))
    return await end(world, owner, other)


@pytest.mark.parametrize("successor", ["w1", "w2"])
def test_later_calls_do_not_overtake_those_that_were_sent_on_and_lost(successor: str, tmp_path: Path) -> None:
    assert simulation.run(lose_calls_that_were_sent_on(tmp_path, successor)) == list("012345")


async def lose_calls_whose_way_is_not_known(state: Path) -> list[str]:
    """1 goes by w1 and w2 to w3 and is lost there; its owner knows that all had arrived, but not yet that 1 was in w3."""
    world = World(state)
    owner, other = await begin(world, "w1", "w2", "w3")
    ann = owner.options(session="ann", timeout_s=None)
    world.hub.slow = {("w2", "client-owner")}
    first = ann.call("Ledger.apply", "1", [], LONG_S)
    store = world.workers["w3"].process.stores
    assert store is not None
    await until(lambda: owner.process.places.store_known("Ledger.ann") == store.ids[0])
    world.kill("w3")
    await world.start("w3")
    later = ann.call("Ledger.apply", "2", [], 0.0)
    await asyncio.sleep(1.0)
    world.hub.let_go()
    await asyncio.gather(first, later)
    return await end(world, owner, other)


def test_later_calls_wait_until_it_is_known_where_former_ones_are(tmp_path: Path) -> None:
    assert simulation.run(lose_calls_whose_way_is_not_known(tmp_path)) == list("012")


async def answer_a_question_that_has_been_asked_anew(state: Path) -> list[str]:
    """2 goes by w3 and w1 to w2 and is lost there; that all had come to w1 is heard later, in answer to a former question."""
    world = World(state)
    await world.start("w2")
    owner, other = await begin(world, "w3", "w1")
    ann, w1 = owner.options(session="ann", timeout_s=None), world.workers["w1"].process
    world.hub.slow = {("w1", "client-owner")}
    calls = [ann.call("Ledger.apply", "1", [], 0.5), ann.call("Ledger.apply", "2", [], LONG_S)]
    await until(lambda: "Ledger.ann" in owner.process.calls._crossings.open)
    moving = asyncio.create_task(other.migrate("Ledger", "ann", to="w2"))
    calls.append(ann.call("Ledger.apply", "3", [], 0.0))
    await moving
    store = w1.places.store_known("Ledger.ann")
    await until(lambda: world.workers["w2"].running == 1)
    lost = world.workers["w2"].process.me
    world.kill("w2")
    await world.start("w2")
    await until(lambda: w1.table.is_lost(lost) and owner.process.table.is_lost(lost) and w1.table.holder(store) is not None)
    await asyncio.sleep(0.5)
    world.hub.let_go()
    await asyncio.gather(*calls)
    return await end(world, owner, other)


def test_an_answer_to_a_former_question_does_not_count(tmp_path: Path) -> None:
    assert simulation.run(answer_a_question_that_has_been_asked_anew(tmp_path)) == list("0123")


async def leave_before_it_is_known_that_calls_have_arrived(state: Path, *, is_killed: bool) -> list[str]:
    """w1 has sent 1 on to w2 and leaves; what w2 says of it comes later."""
    world = World(state)
    owner, other = await begin(world, "w1", "w2")
    ann = owner.options(session="ann", timeout_s=None)
    world.hub.slow = {("w2", "client-owner")}
    call = ann.options(retries=0).call("Ledger.apply", "1", [], 0.1)
    await until(lambda: "Ledger.ann" in owner.process.calls._crossings.open)
    if is_killed:
        world.kill("w1")
        await until(lambda: "w1" not in owner.process.table.members)
    else:
        w1 = world.workers.pop("w1")
        await w1.drain(0.1)
        await w1.aclose()
    await asyncio.sleep(0.5)
    world.hub.let_go()
    await call
    return await end(world, owner, other)


def test_calls_that_were_sent_on_do_not_fail_when_who_did_it_leaves(tmp_path: Path) -> None:
    assert simulation.run(leave_before_it_is_known_that_calls_have_arrived(tmp_path, is_killed=False)) == list("01")


def test_calls_that_were_perhaps_sent_on_fail_when_who_did_it_is_killed(tmp_path: Path) -> None:
    with pytest.raises(WorkerLostError):
        simulation.run(leave_before_it_is_known_that_calls_have_arrived(tmp_path, is_killed=True))


async def look_for_a_worker_while_the_broker_is_away(state: Path) -> list[str]:
    """The only worker dies, and its successor begins while the owner is cut off, until after it would have given up."""
    world = World(state)
    owner, other = await begin(world, "w1")
    world.kill("w1")
    await until(lambda: "w1" not in owner.process.table.members)
    call = owner.options(session="ann", timeout_s=None).call("Ledger.apply", "1", [], 0.0)
    await asyncio.sleep(GRACE_S - 0.3)
    world.hub.cut("client-owner")
    await world.start("w1")
    await asyncio.sleep(0.5)
    world.hub.restore("client-owner")
    await call
    return await end(world, owner, other)


def test_who_is_cut_off_does_not_find_that_nobody_serves(tmp_path: Path) -> None:
    assert simulation.run(look_for_a_worker_while_the_broker_is_away(tmp_path)) == list("01")


async def give_back_what_nobody_knows_was_sent_on(state: Path) -> tuple[list[str], int]:
    """w1 sends 1 and 2 on to w2, which leaves while 1 runs; their owner hears from w2 that 2 comes back, nothing from w1."""
    world = World(state)
    owner, other = await begin(world, "w1", "w2")
    ann = owner.options(session="ann", timeout_s=None)
    world.hub.slow = {("w1", "client-owner")}
    calls = [ann.call("Ledger.apply", token, [], 0.5) for token in ("1", "2")]
    await until(lambda: world.workers["w2"].running == 2)
    before = world.hub.routed
    w2 = world.workers.pop("w2")
    leaving = asyncio.create_task(w2.drain(0.1))
    await until(lambda: owner.process.table.members["w2"].draining)
    await asyncio.sleep(0.3)
    sent = world.hub.routed - before
    calls.append(ann.call("Ledger.apply", "3", [], 0.0))
    await leaving
    await w2.aclose()
    await asyncio.sleep(1.0)
    world.hub.let_go()
    await asyncio.gather(*calls)
    return await end(world, owner, other), sent


def test_what_comes_back_unexpectedly_waits_for_its_session(tmp_path: Path) -> None:
    log, sent = simulation.run(give_back_what_nobody_knows_was_sent_on(tmp_path))
    assert log == list("0123")
    assert sent < 500, "it has been sent to and fro"


async def move_a_session_whose_calls_have_been_given_back(state: Path, slow: set[tuple[str, str]]) -> tuple[list[str], int]:
    """w1 leaves and gives calls back; w2, which was to go on with its store, dies, and the session moves to w3 after that."""
    world = World(state)
    owner, other = await begin(world, "w1", "w2")
    await other.migrate("Ledger", "ann", to="w1")
    await world.start("w3", "there")
    ann = owner.options(session="ann", timeout_s=None, retries=0)
    await ann.call("Ledger.read")
    w1 = world.workers.pop("w1")
    busy = [other.options(session="ann", retries=0).call("Ledger.apply", f"o{number}", [], 0.2) for number in range(20)]
    await until(lambda: w1.running == len(busy))
    leaving = asyncio.create_task(w1.drain(60.0))
    calls = [ann.call("Ledger.apply", str(number), [], 0.0) for number in range(1, 4)]
    await until(lambda: len(owner.process.calls._crossings._returned.get(w1.process.me, ())) == len(calls))
    world.kill("w2")
    world.hub.slow = set(slow)
    number = len(calls)
    while not leaving.done():
        number += 1
        calls.append(ann.call("Ledger.apply", str(number), [], 0.001))
        await asyncio.sleep(0.05)
        if number == 140:  # 7 s: it has been found that w2 does not answer, and the session moves
            world.hub.let_go()
    world.hub.let_go()
    ended = await leaving
    await w1.aclose()
    calls += [ann.call("Ledger.apply", str(later), [], 0.0) for later in range(number + 1, number + 4)]
    await asyncio.gather(*calls, *busy)
    assert ended.moved == 1, "it went as a whole, or stayed"
    return await end(world, owner, other), number + 3


@pytest.mark.parametrize(
    "slow", [(), [("w1", "client-owner")], [("w3", "client-owner")], [("w1", "w3")], [("client-owner", "w1")]]
)
def test_calls_that_were_given_back_keep_their_order_when_their_session_moves_then(
    slow: list[tuple[str, str]], tmp_path: Path
) -> None:
    log, number = simulation.run(move_a_session_whose_calls_have_been_given_back(tmp_path, set(slow)))
    assert [token for token in log if token[0] != "o"] == [*map(str, range(number + 1))]
    assert [token for token in log if token[0] == "o"] == [f"o{one}" for one in range(20)]


async def pass_on_a_call_whose_owner_hears_of_it_late(state: Path) -> None:
    """A worker says that it has passed a call on to another; when that is heard the call has come back and is elsewhere."""
    world = World(state)
    for name in ("w1", "w2", "w3"):
        await world.start(name)
    owner, other = await world.client("client-owner"), await world.client("client-other")
    future = owner.call("later", 1, 1.0)
    calls = owner.process.calls
    (entry,) = calls._entries.values()
    await until(lambda: entry.address is not None)
    first, call = entry.address, entry.call
    assert first is not None
    assert call is not None
    second = next(worker.process.me for name, worker in world.workers.items() if name != first.name)
    calls._crossings.on_returned(second, Returned(call))
    await until(lambda: entry.address not in (None, second) and entry.call is not call)
    third = entry.address
    calls._crossings.on_forwarded(second, Forwarded(call.id, *second, 1, "later", call.session, "", 0))
    assert entry.address == third
    world.kill(second.name)
    assert await future == 1
    for client in (owner, other):
        await client.__aexit__(None, None, None)
    for worker in world.workers.values():
        await worker.aclose()


def test_a_late_notice_of_a_former_attempt_moves_nothing(tmp_path: Path) -> None:
    simulation.run(pass_on_a_call_whose_owner_hears_of_it_late(tmp_path))


async def tell_a_worker_that_has_closed_its_stores(state: Path, patched: pytest.MonkeyPatch) -> None:
    world = World(state)
    close = Stores.aclose

    async def aclose(stores: Stores) -> None:
        await close(stores)
        world.hub.let_go()
        await asyncio.sleep(0.1)

    patched.setattr(Stores, "aclose", aclose)
    owner, other = await begin(world, "w1")
    w1 = world.workers.pop("w1")
    me, there = other.process.me, w1.process.me
    world.hub.slow = {("client-other", "w1")}
    other.process.calls.tell(there, Crossing(*me, "Ledger", "ann"))
    other.process.calls.tell(there, Migrate(b"id", "Ledger", "ann", "w2"))
    other.process.calls.tell(there, Piece(b"id", 1, "", "Ledger", "bob", "store", [], [], 0, {}, {}))
    await w1.aclose()
    for client in (owner, other):
        await client.__aexit__(None, None, None)


def test_what_comes_when_the_stores_are_closed_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulation.run(tell_a_worker_that_has_closed_its_stores(tmp_path, monkeypatch))
    assert "Traceback" not in "".join(capsys.readouterr())
