"""Folders of stores that were copied: of each store one goes on, and whoever opens another one hears of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from waiting import until

from nalar_mq.address import Address, Subjects
from nalar_mq.app import load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import BrokerError, StoreCopiedError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.openings import Openings
from nalar_mq.store import Store
from nalar_mq.worker import Worker

APP = load_app(Path(__file__).parent / "apps" / "state_app.py")
LEASE_S = 1.0


class Runtime:
    """A broker in memory; each machine has a folder for its state."""

    def __init__(self, namespace: str, root: Path) -> None:
        self.hub = MemoryHub(seed=1)
        self.namespace = namespace
        self.root = root

    def settings(self, machine: str) -> Settings:
        return Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)),
            namespace=self.namespace,
            node=machine,
            lease_s=LEASE_S,
            state=str(self.root / machine),
            local_store="off",
        )

    def worker(self, name: str, machine: str) -> Worker:
        return Worker(APP, self.settings(machine), name=name, connect=self.hub.connect, lease_in_thread=False)

    def client(self) -> Client:
        return connect(settings=self.settings("nowhere"), connect=self.hub.connect)

    def copy(self, source: str, target: str) -> Path:
        """As `cp -r` does."""
        made = self.root / target
        shutil.copytree(self.root / source, made)
        return made

    async def openings(self, incarnation: int = 1) -> Openings:
        transport = await self.hub.connect(f"shell-{incarnation}")
        return Openings(transport, Subjects(self.namespace), Address("shell", incarnation), LEASE_S)


@pytest.fixture
def runtime(namespace: str, tmp_path: Path) -> Runtime:
    return Runtime(namespace, tmp_path)


async def test_a_copy_of_a_store_that_is_open_is_not_opened_by_another_worker(runtime: Runtime) -> None:
    async with runtime.client() as client, runtime.worker("first", "here") as first:
        ann = client.options(session="ann")
        await ann.call("Notebook.note", "a")
        copy = runtime.copy("here/1", "there/1")
        with pytest.raises(StoreCopiedError, match=r"there/1 is a copy of .*here/1, which is open in worker 'first'"):
            await runtime.worker("second", "there").start()
        assert await ann.call("Notebook.note", "b") == 2
        assert not first.process.declared_lost.done()
        shutil.rmtree(copy)
        async with runtime.worker("second", "there"):
            assert await ann.call("Notebook.note", "c") == 3


async def test_a_copy_beside_it_is_not_opened_by_who_has_the_store(runtime: Runtime) -> None:
    async with runtime.client() as client, runtime.worker("first", "here") as first:
        ann, stores = client.options(session="ann"), first.process.stores
        await ann.call("Notebook.note", "a")
        copy = runtime.copy("here/1", "here/2")
        await ann.call("Notebook.note", "b")
        with capture_logs() as logs:
            await until(lambda: any("here/2 is a copy" in said.get("error", "") for said in logs))
        assert stores is not None
        assert "2" not in [committer.store.folder.name for committer in stores.all]
        await until(lambda: Store.is_free(copy))
        assert await ann.call("Notebook.all") == (["a", "b"], {"a": 1, "b": 1}, 2)


async def test_a_former_copy_of_a_store_that_went_on_is_refused_until_it_is_adopted(runtime: Runtime) -> None:
    async with runtime.client() as client:
        ann = client.options(session="ann", timeout_s=60.0)
        async with runtime.worker("first", "here"):
            await ann.call("Notebook.note", "a")
        runtime.copy("here/1", "there/1")
        async with runtime.worker("first", "here"):
            await ann.call("Notebook.note", "b")
        with pytest.raises(StoreCopiedError, match=r"there/1 is a copy of .*here/1, which went on.*nalar state adopt"):
            await runtime.worker("second", "there").start()
        store = Store.open(runtime.root / "there" / "1", "shell")
        await (await runtime.openings()).note(store, anyway=True)
        store.close()
        async with runtime.worker("second", "there"):
            assert await ann.call("Notebook.read") == ["a"]
        with pytest.raises(StoreCopiedError, match=r"here/1 is a copy of the store in .*there/1, which went on"):
            await runtime.worker("first", "here").start()


async def test_a_copy_of_a_store_that_was_open_then_does_not_go_on_when_that_is_closed(runtime: Runtime) -> None:
    """What was committed after it had been made is in the other one."""
    async with runtime.client() as client:
        ann = client.options(session="ann", timeout_s=60.0)
        async with runtime.worker("first", "here"):
            await ann.call("Notebook.note", "a")
            runtime.copy("here/1", "there/1")
            await ann.call("Notebook.note", "b")
        shutil.move(runtime.root / "here", runtime.root / "elsewhere")
        with pytest.raises(StoreCopiedError, match=r"there/1 is a copy of .*here/1, which went on"):
            await runtime.worker("second", "there").start()
        async with runtime.worker("first", "elsewhere"):
            assert await ann.call("Notebook.read") == ["a", "b"]


async def test_of_two_folders_on_a_machine_neither_is_taken_for_the_other(runtime: Runtime) -> None:
    """Its worker was killed, and of the copy nobody knows what it lacks."""
    async with runtime.client() as client:
        ann = client.options(session="ann", timeout_s=60.0)
        first = runtime.worker("first", "here")
        await first.start()
        await ann.call("Notebook.note", "a")
        runtime.copy("here/1", "there/1")
        await ann.call("Notebook.note", "b")
        runtime.hub.kill("first")
        assert first.process.stores is not None
        await first.process.stores.aclose()
        with pytest.raises(StoreCopiedError, match=r"there/1 is a copy of .*here/1, which is there, too"):
            await runtime.worker("second", "there").start()
        async with runtime.worker("first", "here"):
            assert await ann.call("Notebook.read") == ["a", "b"]


async def test_what_is_open_cannot_be_replaced_by_a_copy(runtime: Runtime) -> None:
    async with runtime.client() as client, runtime.worker("first", "here"):
        await client.options(session="ann").call("Notebook.note", "a")
        store = Store.open(runtime.copy("here/1", "there/1"), "shell")
        with pytest.raises(StoreCopiedError, match="is open in worker 'first'"):
            await (await runtime.openings()).note(store, anyway=True)
        store.close()


async def test_a_folder_that_was_moved_goes_on(runtime: Runtime) -> None:
    """Also when its worker was killed: the next one waits until its lease has run out."""
    async with runtime.client() as client:
        ann = client.options(session="ann", timeout_s=60.0)
        first = runtime.worker("first", "here")
        await first.start()
        await ann.call("Notebook.note", "a")
        runtime.hub.kill("first")
        assert first.process.stores is not None
        await first.process.stores.aclose()
        runtime.copy("here/1", "there/1")
        shutil.rmtree(runtime.root / "here")
        async with runtime.worker("second", "there"):
            assert await ann.call("Notebook.note", "b") == 2
        async with runtime.worker("third", "there"):
            assert await ann.call("Notebook.note", "c") == 3


async def test_a_broker_that_writes_nothing_for_long_does_no_harm(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is full, say: what can be read is answered, and whoever opens the store tries again and again."""
    folder = runtime.root / "here" / "1"
    openings = await runtime.openings()
    bucket = await (await runtime.hub.connect("other")).key_value(Subjects(runtime.namespace).places_bucket)

    async def refuse(self: object, key: str, value: bytes, revision: int) -> int:
        raise BrokerError("it is full")

    for _ in range(3):
        store = Store.open(folder, "shell")
        await openings.note(store)
        store.close()
        with monkeypatch.context() as patched:
            patched.setattr(type(bucket), "update", refuse)
            for _ in range(40):
                store = Store.open(folder, "shell")
                with pytest.raises(BrokerError, match="full"):
                    await openings.note(store)
                store.close()
    store = Store.open(folder, "shell")
    await openings.note(store)
    assert len(store.openings) < 40
    store.close()


async def test_a_store_that_was_closed_goes_on_elsewhere_at_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start in a container may be on a machine of another name."""
    async with runtime.client() as client:
        for number in range(3):
            with monkeypatch.context() as patched:
                patched.setattr("socket.gethostname", lambda number=number: f"machine-{number}")
                patched.setattr(Openings, "_is_gone", None)  # nobody is waited for
                async with runtime.worker(f"w{number}", "here"):
                    assert await client.options(session="ann").call("Notebook.note", "a") == number + 1


async def test_a_worker_that_is_given_up_while_it_closes_its_stores_closes_them(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker does not answer: who is to go on with them needs them all the same."""
    asked = asyncio.Event()

    async def wait(self: object, store: Store, **_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    async with runtime.worker("w1", "here") as worker, runtime.client() as client:
        assert await client.options(session="ann").call("Notebook.note", "a") == 1
        stores = worker.process.stores
        assert stores is not None
        with monkeypatch.context() as patched:
            patched.setattr(Openings, "note", wait)
            closing = asyncio.create_task(stores.aclose())
            await asked.wait()
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
        Store.open(runtime.root / "here" / "1", "shell").close()


@pytest.mark.parametrize("back", [1, 2, 5])
async def test_a_directory_that_goes_back_does_not_make_a_copy_of_the_store(runtime: Runtime, back: int) -> None:
    """Its broker had not synced what it had acknowledged when the power failed."""
    folder = runtime.root / "here" / "1"
    openings = await runtime.openings()
    bucket = await (await runtime.hub.connect("other")).key_value(Subjects(runtime.namespace).places_bucket)
    records: list[bytes] = []
    for number in range(8):
        store = Store.open(folder, "shell")
        await openings.note(store)
        key = f"_copy-{store.copy}"
        store.close()
        entry = await bucket.get(key)
        assert entry is not None and entry.value is not None
        records.append(entry.value)
        if number == 3:
            runtime.copy("here/1", "there/1")
    store = Store.open(runtime.root / "there" / "1", "shell")
    with pytest.raises(StoreCopiedError, match="remove the copy"):
        await openings.note(store)
    store.close()
    await bucket.update(key, records[-1 - back], entry.revision)
    store = Store.open(folder, "shell")
    await openings.note(store)
    store.close()


async def test_a_backup_in_the_place_of_a_store_is_no_copy_to_be_removed(runtime: Runtime) -> None:
    folder = runtime.root / "here" / "1"
    openings = await runtime.openings()
    for number in range(2):
        store = Store.open(folder, "shell")
        await openings.note(store)
        store.close()
        if number == 0:
            runtime.copy("here/1", "backup")
    for path in (runtime.root / "backup").iterdir():
        shutil.copy(path, folder / path.name)
    store = Store.open(folder, "shell")
    with pytest.raises(StoreCopiedError, match=r"has a former state of the store .* nalar state adopt"):
        await openings.note(store)
    await openings.note(store, anyway=True)
    store.close()


async def test_an_opening_whose_answer_is_lost_does_no_harm(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been sent may be written at once, later, or never: the store can be opened, and a copy from before cannot."""
    folder = runtime.root / "here" / "1"
    openings = await runtime.openings()
    bucket = await (await runtime.hub.connect("other")).key_value(Subjects(runtime.namespace).places_bucket)
    kind = type(bucket)
    update, late = kind.update, list[tuple[str, bytes, int]]()
    store = Store.open(folder, "shell")
    await openings.note(store)
    store.close()
    runtime.copy("here/1", "before")
    for fate in ("never", "at once", "later", "never", "at once"):

        async def lose(self: object, key: str, value: bytes, revision: int, fate: str = fate) -> int:
            if fate == "at once":
                await update(bucket, key, value, revision)
            elif fate == "later":
                late.append((key, value, revision))
            raise BrokerError("no answer")

        store = Store.open(folder, "shell")
        with monkeypatch.context() as patched:
            patched.setattr(kind, "update", lose)
            with pytest.raises(BrokerError):
                await openings.note(store)
        store.close()
        store = Store.open(folder, "shell")
        for sent in late:
            await update(bucket, *sent)
        late.clear()
        await openings.note(store)
        store.close()
    store = Store.open(runtime.root / "before", "shell")
    with pytest.raises(StoreCopiedError, match="went on"):
        await openings.note(store)
    store.close()
