"""Managed state that is kept: it outlives its worker, once for every call, and never begins anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from waiting import until

from nalar_mq import host, places, values
from nalar_mq.app import load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import (
    SessionUnavailableError,
    StateDamagedError,
    StateNotKeptError,
    StoreForeignError,
    StoreFullError,
)
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import Call
from nalar_mq.store import Store
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "state_app.py"


class Runtime:
    """A broker in memory, and the state of its workers on disk."""

    def __init__(self, namespace: str, state: Path, *, adopts: bool = False) -> None:
        self.hub = MemoryHub(seed=1)
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)),
            namespace=namespace,
            node="here",
            lease_s=1.0,
            state=str(state),
            adopts_state=adopts,
        )
        self._app = load_app(APP)

    def worker(self, name: str) -> Worker:
        return Worker(self._app, self.settings, name=name, connect=self.hub.connect, lease_in_thread=False)

    def client(self) -> Client:
        return connect(settings=self.settings, connect=self.hub.connect)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def runtime(namespace: str, state: Path) -> Runtime:
    return Runtime(namespace, state)


async def test_a_session_goes_on_in_the_next_worker(runtime: Runtime) -> None:
    async with runtime.client() as client:
        ann = client.options(session="ann")
        async with runtime.worker("first"):
            assert await ann.call("Notebook.note", "a") == 1
            with pytest.raises(ValueError, match="lost"):
                await ann.call("Notebook.note", "lost", fails=True)
        async with runtime.worker("second"):
            assert await ann.call("Notebook.note", "b") == 2
            assert await ann.call("Notebook.all") == (["a", "b"], {"a": 1, "b": 1}, 2)


async def test_calls_wait_for_the_store_of_their_session(runtime: Runtime) -> None:
    async with runtime.client() as client:
        ann = client.options(session="ann")
        async with runtime.worker("first"):
            await ann.call("Notebook.note", "a")
        future = ann.call("Notebook.note", "b")
        async with runtime.worker("second"):
            assert await future == 2


async def test_a_session_whose_store_nobody_has_is_refused_and_not_begun_anew(
    runtime: Runtime, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.3)
    async with runtime.client() as client:
        ann = client.options(session="ann")
        async with runtime.worker("first"):
            await ann.call("Notebook.note", "a")
        state.rename(state.with_name("elsewhere"))
        async with runtime.worker("second"):
            with pytest.raises(SessionUnavailableError, match=r"nobody has the state of Notebook\.ann open"):
                await ann.call("Notebook.note", "b")
            assert await client.options(session="ben").call("Notebook.note", "c") == 1


async def test_fewer_workers_serve_the_sessions_of_all(runtime: Runtime) -> None:
    names = [f"s{number}" for number in range(12)]
    async with runtime.client() as client:
        sessions = [client.options(session=name) for name in names]
        async with runtime.worker("first"), runtime.worker("second"), runtime.worker("third"):
            await asyncio.gather(*(session.call("Notebook.note", "a") for session in sessions))
            assert len({tuple(m.stores) for _, m in await client.members() if m.role == "worker"}) == 3
        async with runtime.worker("fourth"):
            counts = await asyncio.gather(*(session.call("Notebook.note", "b") for session in sessions))
            assert counts == [2] * len(names)


async def test_a_damaged_session_is_named_and_the_others_are_served(runtime: Runtime, state: Path) -> None:
    async with runtime.client() as client:
        ann, ben = client.options(session="ann"), client.options(session="ben")
        async with runtime.worker("first"):
            await asyncio.gather(ann.call("Notebook.note", "a"), ben.call("Notebook.note", "b"))
        _damage(state / "1", "ann")
        async with runtime.worker("first"):
            with pytest.raises(StateDamagedError, match="session 'ann' of 'Notebook'"):
                await ann.call("Notebook.note", "c")
            assert await ben.call("Notebook.note", "d") == 2


def _damage(folder: Path, name: str) -> None:
    """Removes an entry behind the back of the header."""
    store = Store.open(folder, "test")
    session = store.session("Notebook", name)
    header = session.header
    assert header is not None
    prefix = header.number.to_bytes(8, "big")
    with store._env.begin(write=True) as txn, txn.cursor(db=store._trees["entries"]) as cursor:
        assert cursor.set_range(prefix) and cursor.key().startswith(prefix)
        cursor.delete()
    store.close()


async def test_state_of_another_directory_is_refused_unless_the_broker_is_the_apps_own(
    runtime: Runtime, namespace: str, state: Path
) -> None:
    async with runtime.client() as client, runtime.worker("first"):
        await client.options(session="ann").call("Notebook.note", "a")
    with pytest.raises(StoreForeignError, match="nalar state adopt"):
        async with Runtime(namespace, state).worker("first"):
            pass
    other = Runtime(namespace, state, adopts=True)
    async with other.client() as client, other.worker("first"):
        assert await client.options(session="ann").call("Notebook.note", "b") == 2


async def test_a_call_that_is_sent_again_takes_effect_once(runtime: Runtime) -> None:
    async with runtime.client() as client:
        ann = client.options(session="ann")
        async with runtime.worker("first") as worker:
            future = ann.call("Notebook.note", "a")
            assert await future == 1
            again = Call(future.id, "Notebook", "note", values.encode_arguments(["a"], {}), session="ann", attempt=1)
        async with runtime.worker("second") as worker:
            client.process.calls.tell(worker.process.me, again)
            assert await ann.call("Notebook.read") == ["a"]
            assert await ann.call("Notebook.note", "b") == 2


async def test_what_cannot_be_written_fails_its_call_and_the_session_goes_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with runtime.client() as client, runtime.worker("first"):
        ann = client.options(session="ann")
        await ann.call("Notebook.note", "a")
        with monkeypatch.context() as patch:
            full = StoreFullError("it is full")
            patch.setattr(Store, "write", lambda _, writes, now_s: [full] * len(writes))
            with pytest.raises(StateNotKeptError, match="it is full"):
                await ann.call("Notebook.note", "lost")
        assert await ann.call("Notebook.note", "b") == 2
        assert await ann.call("Notebook.read") == ["a", "b"]


async def test_sessions_leave_memory_and_come_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_IN_MEMORY_S", 0.0)
    async with runtime.client() as client, runtime.worker("first") as worker:
        ann = client.options(session="ann")
        await ann.call("Notebook.note", "a")
        serving = worker.process.calls.host
        assert isinstance(serving, host.Host)
        replica = serving._replicas["Notebook"]
        await until(lambda: not replica.has_instance("ann"), "it is kept in memory")
        assert await ann.call("Notebook.note", "b") == 2
