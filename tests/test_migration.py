"""Sessions that move to another worker while they are used."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from waiting import until

from nalar_mq import values
from nalar_mq.app import load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import MigrationError, WorkerLostError
from nalar_mq.host import Host
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import Piece
from nalar_mq.migration import Migrations
from nalar_mq.store import LEFT
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "state_app.py"


class Runtime:
    """Two workers, `first` and `second`, and a client."""

    def __init__(self, namespace: str, state: Path) -> None:
        self.hub = MemoryHub(seed=1)
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace=namespace, node="here", lease_s=1.0, state=str(state)
        )
        self._app = load_app(APP)
        self.workers = {name: self.worker(name) for name in ("first", "second")}
        self.client = self.another_client()

    def worker(self, name: str, state: Path | None = None) -> Worker:
        settings = self.settings if state is None else msgspec.structs.replace(self.settings, state=str(state))
        return Worker(self._app, settings, name=name, connect=self.hub.connect, lease_in_thread=False)

    def another_client(self) -> Client:
        return connect(settings=self.settings, connect=self.hub.connect)

    async def holder(self, session: str) -> str:
        """Who has the session, as the directory says."""
        process = self.workers["first"].process
        places = process.places
        key = places.key_in_store("Notebook", session)
        places._known.pop(key, None)
        place, _ = await places._decide(key, "Notebook")
        holder = process.table.holder(place) if isinstance(place, str) else None
        assert holder is not None
        return holder.name

    async def other(self, session: str) -> str:
        return "second" if await self.holder(session) == "first" else "first"


def migrations_of(worker: Worker) -> Migrations:
    host = worker.process.calls.host
    assert isinstance(host, Host) and host.migrations is not None
    return host.migrations


@pytest.fixture
async def runtime(namespace: str, tmp_path: Path) -> AsyncIterator[Runtime]:
    made = Runtime(namespace, tmp_path / "state")
    async with made.workers["first"], made.workers["second"], made.client:
        yield made


async def test_a_session_moves_with_its_state(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    for text in "abc":
        await ann.call("Notebook.note", text)
    there = await runtime.other("ann")
    moved = await runtime.client.migrate("Notebook", "ann", to=there)
    assert moved.size_bytes > 0
    assert await runtime.holder("ann") == there
    assert await ann.call("Notebook.note", "d") == 4
    assert await ann.call("Notebook.all") == (["a", "b", "c", "d"], {"a": 1, "b": 1, "c": 1, "d": 1}, 4)
    assert runtime.workers[there].process.calls.host is not None


async def test_it_moves_back_and_forth(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    for count in range(6):
        assert await ann.call("Notebook.note", str(count)) == count + 1
        await runtime.client.migrate("Notebook", "ann", to=await runtime.other("ann"))
    assert await ann.call("Notebook.read") == [str(count) for count in range(6)]


async def test_a_session_comes_back_with_the_store_that_it_left_for(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    await ann.call("Notebook.note", "a")
    here, there = await runtime.holder("ann"), await runtime.other("ann")
    await runtime.client.migrate("Notebook", "ann", to=there)
    assert await ann.call("Notebook.note", "b") == 2
    await runtime.workers[there].aclose()
    assert await ann.call("Notebook.note", "c") == 3
    assert await ann.call("Notebook.read") == ["a", "b", "c"]
    async with runtime.worker("third"):
        await runtime.client.migrate("Notebook", "ann", to="third")
        assert await ann.call("Notebook.note", "d") == 4
    assert await ann.call("Notebook.all") == (["a", "b", "c", "d"], {"a": 1, "b": 1, "c": 1, "d": 1}, 4)
    assert runtime.workers[here].process.stores is not None
    assert len(runtime.workers[here].process.stores.ids) == 3


@pytest.mark.parametrize("is_drained", [False, True])
async def test_calls_go_in_no_circle_when_a_session_comes_back_with_a_store_that_it_went_to_in_two_steps(
    runtime: Runtime, is_drained: bool
) -> None:
    """Whoever opens the third worker's store has noted for one of the two sessions that the other worker has it."""
    sessions = {"ann": ["first", "second", "third"], "bob": ["second", "first", "third"]}
    third = runtime.worker("third")
    async with third:
        for session, path in sessions.items():
            await runtime.client.options(session=session).call("Notebook.read")
            for place in path:
                await runtime.client.migrate("Notebook", session, to=place)
                await runtime.client.options(session=session).call("Notebook.note", place)
        if is_drained:
            await third.drain(5.0)
    for session, path in sessions.items():
        caller = runtime.client.options(session=session, timeout_s=30.0)
        assert await caller.call("Notebook.note", "back") == 4
        assert await caller.call("Notebook.read") == [*path, "back"]


async def test_a_call_finds_a_session_that_has_gone_on_from_a_store_that_nobody_opens_again(
    runtime: Runtime, tmp_path: Path
) -> None:
    ann = runtime.client.options(session="ann")
    third = runtime.worker("third", tmp_path / "of another node")
    async with runtime.another_client() as late:
        async with third:
            await ann.call("Notebook.read")
            await runtime.client.migrate("Notebook", "ann", to="first")
            await late.options(session="ann").call("Notebook.read")
            for place in ("third", "second"):
                await runtime.client.migrate("Notebook", "ann", to=place)
                await ann.call("Notebook.note", place)
        assert await late.options(session="ann", timeout_s=30.0).call("Notebook.read") == ["third", "second"]


async def test_what_waits_for_a_store_waits_at_its_owner_when_the_worker_where_it_waited_leaves(
    runtime: Runtime, tmp_path: Path
) -> None:
    """The owner does not know that the session has moved; nobody has the store open where it is now."""
    ann, elsewhere = runtime.client.options(session="ann"), tmp_path / "of another node"
    async with runtime.another_client() as late:
        async with runtime.worker("third", elsewhere):
            assert await ann.call("Notebook.note", "a") == 1
            if await runtime.holder("ann") != "first":
                await runtime.client.migrate("Notebook", "ann", to="first")
            assert await late.options(session="ann").call("Notebook.read") == ["a"]
            await runtime.client.migrate("Notebook", "ann", to="third")
            assert await ann.call("Notebook.note", "b") == 2
        waiting = [late.options(session="ann", timeout_s=60.0).call("Notebook.note", text) for text in "cd"]
        first = migrations_of(runtime.workers["first"])
        async with asyncio.timeout(60.0):
            while sum(map(len, first._parked.values())) < len(waiting):
                await asyncio.sleep(0.01)
        await runtime.workers["first"].drain(5.0)
        await runtime.workers["first"].aclose()
        assert not any(call.available() for call in waiting)
        async with runtime.worker("fourth", elsewhere):
            assert [await call for call in waiting] == [3, 4]
            assert await ann.call("Notebook.read") == ["a", "b", "c", "d"]


async def test_a_session_stays_in_its_store_though_a_copy_comes_back_with_that_of_a_worker_which_died(runtime: Runtime) -> None:
    """Nothing had been committed of it when it was on its way there; whoever has both stores may not commit to the copy."""
    ann, begun = runtime.client.options(session="ann", timeout_s=60.0), asyncio.Event()
    importlib.import_module("state_app").BEGUN["ann"] = begun
    running = ann.call("Notebook.note_for_ever", "of this nothing stays")
    await begun.wait()
    waiting = ann.call("Notebook.note", "a")
    here, there = await runtime.holder("ann"), await runtime.other("ann")
    source, target = runtime.workers[here].process.stores, runtime.workers[there].process.stores
    assert source is not None and target is not None
    moving = asyncio.create_task(runtime.client.migrate("Notebook", "ann", to=there))
    while not target.session("Notebook", "ann").session.is_kept:
        await asyncio.sleep(0)
    runtime.hub.kill(there)
    await target.aclose()
    with pytest.raises(MigrationError):
        await moving
    await until(lambda: len(source.ids) >= 2)
    running.cancel()
    assert await waiting == 1
    await runtime.workers[here].aclose()
    async with runtime.worker("third"), runtime.worker("fourth"):
        assert await ann.call("Notebook.read") == ["a"]


async def test_the_owner_hears_of_every_step_of_a_call_that_is_sent_after_its_session(runtime: Runtime) -> None:
    """Else it would wait for a call that was lost with the last of the workers that had it."""
    ann, begun = runtime.client.options(session="ann"), asyncio.Event()
    importlib.import_module("state_app").BEGUN["ann"] = begun
    third = runtime.worker("third")
    async with third, runtime.another_client() as late:
        await ann.call("Notebook.read")
        await runtime.client.migrate("Notebook", "ann", to="first")
        await late.options(session="ann").call("Notebook.read")
        await runtime.client.migrate("Notebook", "ann", to="second")
        before = ann.call("Notebook.note_for_ever", "it holds the session there")
        await begun.wait()
        begun.clear()
        future = late.options(session="ann", timeout_s=30.0).call("Notebook.note_for_ever", "it is sent on twice")
        await until(lambda: runtime.workers["second"].running >= 2)
        moving = asyncio.create_task(runtime.client.migrate("Notebook", "ann", to="third"))
        await asyncio.sleep(0.1)
        before.cancel()
        await moving
        await begun.wait()
        assert third.running == 1
        runtime.hub.kill("third")
        with pytest.raises(WorkerLostError):
            await future


async def test_calls_of_several_callers_go_on_in_order_while_it_moves(runtime: Runtime) -> None:
    """Each caller's calls are applied once and in its order, whoever of them has heard of the move."""
    async with runtime.another_client() as other:
        callers = [runtime.client.options(session="ann"), other.options(session="ann")]
        await callers[0].call("Notebook.note", "begin")

        async def calls(number: int) -> None:
            futures = []
            for count in range(300):
                futures.append(callers[number].call("Notebook.note", f"{number}-{count}"))
                if count % 10 == 0:
                    await asyncio.sleep(0.002)
            await asyncio.gather(*futures)

        async def moves() -> None:
            for _ in range(8):
                await runtime.client.migrate("Notebook", "ann", to=await runtime.other("ann"))
                await asyncio.sleep(0.02)

        await asyncio.gather(calls(0), calls(1), moves())
        notes = await callers[0].call("Notebook.read")
    for number in range(2):
        mine = [note for note in notes if note.startswith(f"{number}-")]
        assert mine == [f"{number}-{count}" for count in range(300)]


async def test_calls_that_change_more_than_a_message_carries_while_it_moves(runtime: Runtime) -> None:
    """Entries of a session that is small otherwise: all calls change more than may wait for the freeze."""
    ann = runtime.client.options(session="ann")
    made, kept = 0, -1

    def texts(count: int) -> list[str]:
        return [f"{count}-{number}" for number in range(4)]

    async def calls() -> None:
        nonlocal made, kept
        for made in itertools.count():
            await ann.call("Notebook.note_anew", texts(made), 600_000 if made % 2 else 300_000)
            kept = made

    calling = asyncio.create_task(calls())
    for _ in range(2):
        await runtime.client.migrate("Notebook", "ann", to=await runtime.other("ann"))
        before = kept
        while kept == before:
            assert not calling.done()
            await asyncio.sleep(0.01)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert [note.rstrip(".") for note in await ann.call("Notebook.read")] in (texts(kept), texts(made))


async def test_what_cannot_move_says_why_and_is_served_on(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    await ann.call("Notebook.note", "a")
    with pytest.raises(MigrationError, match="there is no worker 'nobody'; there are: first, second"):
        await runtime.client.migrate("Notebook", "ann", to="nobody")
    with pytest.raises(MigrationError, match="does not keep sessions of 'Notebook'"):
        await runtime.client.migrate("Notebook", "ann", to=runtime.client.process.name)
    assert await ann.call("Notebook.note", "b") == 2


@pytest.mark.parametrize("size", [1, 600_000], ids=["seen there", "seen here"])
async def test_a_session_with_an_entry_that_is_damaged_stays_and_moves_once_it_is_mended(runtime: Runtime, size: int) -> None:
    """Where it comes from sees it in what is too large for one message: then parts of the session are there already."""
    ann = runtime.client.options(session="ann")
    for count in range(3):
        await ann.call("Notebook.note", str(count))
    here, there = await runtime.holder("ann"), await runtime.other("ann")
    stores = runtime.workers[here].process.stores
    assert stores is not None
    store = stores.session("Notebook", "ann").committer.store
    (first, _), *_ = store.rows(store.session("Notebook", "ann"), b"", 1)[0]
    key = first[:8] + b"\xff\0" + first[-8:]
    with store._env.begin(write=True) as txn:
        txn.put(key, bytes(size), db=store._trees["entries"])
    for _ in range(2):
        with pytest.raises(MigrationError, match="'ann' of 'Notebook' is damaged"):
            await runtime.client.migrate("Notebook", "ann", to=there)
    assert await runtime.holder("ann") == here
    await until(lambda: not migrations_of(runtime.workers[there])._coming, "it is not given up there")
    with store._env.begin(write=True) as txn:
        txn.delete(key, db=store._trees["entries"])
    await runtime.client.migrate("Notebook", "ann", to=there)
    assert await runtime.holder("ann") == there
    assert await ann.call("Notebook.note", "3") == 4
    assert await ann.call("Notebook.read") == ["0", "1", "2", "3"]


async def test_nothing_stays_of_a_session_that_is_given_up_while_pieces_of_it_wait(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    await ann.call("Notebook.note", "a")
    here, there = runtime.workers[await runtime.holder("ann")], runtime.workers[await runtime.other("ann")]
    source, target = here.process.stores, there.process.stores
    assert source is not None and target is not None
    migrations = migrations_of(there)
    session = source.session("Notebook", "ann").session
    assert session.header is not None
    for number in range(1, 9):
        key, data = b"notes\0" + number.to_bytes(8, "big"), values.encode("x")
        rows = [(bytes(8) + key, zlib.crc32(key + data).to_bytes(4, "big") + data)]
        store = source.session("Notebook", "ann").committer.store.id
        piece = Piece(b"1" * 16, number, "", "Notebook", "ann", store, kinds=session.header.kinds, rows=rows)
        migrations.on_piece(here.process.calls.me, piece)
    migrations.on_abandon(b"1" * 16)
    kept = target.session("Notebook", "ann").committer.store
    await until(lambda: kept.session("Notebook", "ann").standing == LEFT)
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert kept.session("Notebook", "ann").standing == LEFT
    assert kept.rows(kept.session("Notebook", "ann"), b"", 1) == ([], b"")
    assert await ann.call("Notebook.note", "b") == 2
    await runtime.client.migrate("Notebook", "ann", to=await runtime.other("ann"))
    assert await ann.call("Notebook.read") == ["a", "b"]


async def test_a_session_that_was_never_called_cannot_move_or_begins_there(runtime: Runtime) -> None:
    places = runtime.client.process.places
    assert not await places.is_known("Notebook.new")
    moved = await runtime.client.migrate("Notebook", "new", to="second")
    assert moved.size_bytes == 0
    assert await places.is_known("Notebook.new")
    assert await runtime.holder("new") == "second"
    assert await runtime.client.options(session="new").call("Notebook.note", "a") == 1


async def test_the_target_dies_on_the_way(runtime: Runtime) -> None:
    ann = runtime.client.options(session="ann")
    await ann.call("Notebook.note", "a")
    there = await runtime.other("ann")
    runtime.hub.kill(there)
    with pytest.raises(MigrationError, match=f"worker '{there}'"):
        await runtime.client.migrate("Notebook", "ann", to=there)
    assert await ann.call("Notebook.note", "b") == 2
