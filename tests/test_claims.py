"""Large values: where they are kept, who finds them, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until, until_collected

from nalar_mq import claims, errors, gather, values
from nalar_mq.app import load_app
from nalar_mq.claims import Claim, read_claim, write_claim
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.host import Host
from nalar_mq.local_store import LocalStore
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import ObjectStore, Transport
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "large_app.py"
SIZE = 700_000
PATIENCE_S = 60.0


async def within(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


class Runtime:
    """Workers and clients of one namespace, each with the folder it is given."""

    def __init__(
        self, namespace: str, access: BrokerAccess, connect: Callable[[str], Awaitable[Transport]], root: Path
    ) -> None:
        self.namespace, self.access, self.connect, self.root = namespace, access, connect, root
        self.app = load_app(APP)
        self.actors: Any = importlib.import_module("large_app")
        self.stack = AsyncExitStack()

    def settings(self, store: str) -> Settings:
        local_store = store if store == "off" else str(self.root / store)
        return Settings(broker=self.access, namespace=self.namespace, node=store, lease_s=2.0, local_store=local_store)

    async def worker(self, name: str, store: str = "here") -> Worker:
        worker = Worker(self.app, self.settings(store), name=name, connect=self.connect, lease_in_thread=False)
        return await self.stack.enter_async_context(worker)

    async def client(self, store: str = "here") -> Client:
        client = await self.stack.enter_async_context(connect(settings=self.settings(store), connect=self.connect))
        await client.wait_for("make")
        return client

    async def objects(self) -> ObjectStore:
        transport = await self.connect("observer")
        self.stack.push_async_callback(transport.aclose)
        return await transport.object_store(f"{self.namespace}-claims")

    def files(self, store: str = "here") -> list[Path]:
        return sorted((self.root / store).glob(f"*.*.{32 * '[0-9a-f]'}"))


@pytest.fixture(params=["memory", "nats"])
async def runtime(
    request: pytest.FixtureRequest, namespace: str, broker_access: BrokerAccess, tmp_path: Path
) -> AsyncIterator[Runtime]:
    hub = MemoryHub(seed=1)

    async def over_nats(name: str) -> Transport:
        return await NatsTransport.connect(broker_access, name=name)

    made = Runtime(namespace, broker_access, hub.connect if request.param == "memory" else over_nats, tmp_path)
    async with made.stack:
        yield made


# Claims as bytes.

_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner) | st.sets(st.integers()),
)


@given(_plain)
def test_no_value_begins_as_a_claim_does(value: object) -> None:
    assert values.encode(value)[:1] != claims.MARK
    assert values.encode_arguments([value], {})[:1] != claims.MARK


def test_no_claim_is_a_value() -> None:
    claim = write_claim(Claim(1, "w.1." + "0" * 32, 5, b"d"))
    with pytest.raises(errors.MalformedMessageError):
        values.decode(claim)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_claim_are_refused(rest: bytes) -> None:
    try:
        claim = read_claim(claims.MARK + rest)
    except errors.MalformedMessageError:
        return
    assert read_claim(write_claim(claim)) == claim


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "w.1." + "0" * 31 + "/", "w.1", "", "w.1." + "0" * 33, "a/b.1." + "0" * 32]
)
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(errors.MalformedMessageError):
        read_claim(claims.MARK + msgspec.msgpack.encode(Claim(1, name, 1, b"")))


# Every way a value can go, on one machine and between two.


async def test_a_call_whose_process_stood_still_while_it_read_its_arguments_waits(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await runtime.worker("first")
    await runtime.client()
    process, has_slept = worker.process, asyncio.Event()
    read, is_current = process.claims.read, process.membership.is_current

    async def read_for_long(claim: bytes) -> bytes:
        found = await read(claim)
        has_slept.set()
        return found

    monkeypatch.setattr(process.claims, "read", read_for_long)
    monkeypatch.setattr(process.membership, "is_current", lambda: is_current() and not has_slept.is_set())
    future = runtime.actors.digest_in_thread(runtime.actors.text(SIZE))
    await within(has_slept.wait())
    await asyncio.sleep(0.3)  # enough for it to run
    assert not future.available()
    has_slept.clear()
    assert await within(future) == hashlib.sha256(runtime.actors.text(SIZE)).hexdigest()


@pytest.mark.parametrize("stores", [("here", "here"), ("here", "there"), ("off", "off"), ("off", "here")], ids="-".join)
async def test_every_way_a_large_value_can_go(runtime: Runtime, stores: tuple[str, str]) -> None:
    await runtime.worker("first", stores[0])
    await runtime.worker("second", stores[1])
    client = await runtime.client("here")
    text, a = runtime.actors.text, runtime.actors
    expected = hashlib.sha256(text(SIZE, 1) + text(SIZE, 2) + text(SIZE, 2)).hexdigest()

    for _ in range(2):  # each of the two workers is to have its turn
        assert await within(a.make(SIZE, 3)) == text(SIZE, 3)
        assert await within(a.make_in_thread(SIZE, 4)) == text(SIZE, 4)
        two = hashlib.sha256(text(SIZE, 5) + text(SIZE, 6)).hexdigest()
        assert await within(a.digest(text(SIZE, 5), text(SIZE, 6))) == two
        assert await within(a.digest_in_thread(text(SIZE, 5), text(SIZE, 6))) == two
        assert await within(client.call("passes", SIZE)) == expected
        assert await within(client.call("answers", SIZE)) == [text(SIZE, 1), text(SIZE, 2)]
        found = await within(gather(a.make(SIZE), a.make(10), a.make(SIZE)))
        assert [len(value) for value in found] == [SIZE, 10, SIZE]

    sizes = [10, SIZE, 20, 2 * SIZE, 30]
    for name in ("pieces", "pieces_in_thread"):
        assert [len(piece) async for piece in client.stream(name, sizes)] == sizes
        assert [len(piece) for piece in await within(client.call(name, sizes))] == sizes
    session = client.options(session="one")
    piled = [session.call("Pile.put", text(size)) for size in (SIZE, 1, 2 * SIZE, 2)]
    assert [await within(future) for future in piled][-1] == [SIZE, 1, 2 * SIZE, 2], "a large argument was overtaken"
    del found, piled
    objects = await runtime.objects()

    async def nothing_left() -> bool:
        files = [path for store in {*stores, "here"} - {"off"} for path in runtime.files(store)]
        return not files and await objects.names() == []

    await until_collected(nothing_left)


async def test_processes_of_one_machine_leave_the_broker_alone(runtime: Runtime) -> None:
    await runtime.worker("first")
    await runtime.worker("second")
    client = await runtime.client()
    future = runtime.actors.make(SIZE)
    assert await within(runtime.actors.digest(future, b"x" * SIZE))
    await within(client.call("passes", SIZE))
    assert len(runtime.files()) >= 1
    assert await (await runtime.objects()).names() == []
    assert len(await within(future)) == SIZE


async def test_a_value_stays_until_its_last_holder_lets_go(runtime: Runtime) -> None:
    await runtime.worker("only")
    await runtime.client()
    future = runtime.actors.make(SIZE)
    await until(future.available)
    waiting = runtime.actors.where(future.later)
    held = future.held()
    assert held is not None and held.claim is not None
    names = {held.claim.name}
    del future, held
    assert (await within(waiting))[1] == SIZE
    await until_collected(lambda: not names & {path.name for path in runtime.files()})


async def test_a_cast_gets_its_large_arguments(runtime: Runtime, tmp_path: Path) -> None:
    await runtime.worker("only")
    client = await runtime.client()
    client.cast("note", str(tmp_path / "noted"), b"x" * SIZE)
    future = runtime.actors.make(SIZE)
    await until(future.available)
    client.cast("note", str(tmp_path / "noted-too"), future)
    del future
    await until_collected(lambda: (tmp_path / "noted").exists() and (tmp_path / "noted-too").exists())


async def test_a_result_that_nobody_wants_any_more_is_not_kept(runtime: Runtime) -> None:
    await runtime.worker("only")
    await runtime.client()
    for _ in range(5):
        future = runtime.actors.make(SIZE)
        future.cancel()
        with pytest.raises(errors.CallCancelledError):
            await within(future)
    del future
    await until_collected(lambda: runtime.files() == [])


async def test_an_error_with_a_large_field_keeps_its_text(runtime: Runtime) -> None:
    await runtime.worker("only")
    await runtime.client()
    with pytest.raises(errors.RemoteError, match="ValueError"):
        await within(runtime.actors.refuse(b"x" * SIZE))


# What goes wrong.


async def test_a_damaged_file_is_an_error_that_says_so(runtime: Runtime) -> None:
    await runtime.worker("only")
    await runtime.client()
    future = runtime.actors.make(SIZE)
    await until(future.available)
    [path] = runtime.files()
    data = bytearray(path.read_bytes())
    data[SIZE // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.ValueLostError, match=r"checksum.*make the call again") as raised:
        await within(future)
    assert raised.value.name == path.name
    with pytest.raises(errors.ValueLostError, match="checksum"):
        await within(runtime.actors.digest(future))
    path.write_bytes(data[:100])
    with pytest.raises(errors.ValueLostError):
        await within(future)
    path.unlink()
    with pytest.raises(errors.ValueLostError, match="cannot be read"):
        await within(future)
    assert await within(runtime.actors.make(3)) == b"\0\0\0"


async def test_a_damaged_object_is_an_error_that_says_so(runtime: Runtime) -> None:
    await runtime.worker("only", "off")
    await runtime.client()
    future = runtime.actors.make(SIZE)
    await until(future.available)
    objects = await runtime.objects()
    [name] = await objects.names()
    data = bytearray(await objects.get(name) or b"")
    data[SIZE // 2] ^= 1
    await objects.put(name, bytes(data))
    with pytest.raises(errors.ValueLostError, match="checksum of the object store"):
        await within(future)
    await objects.delete(name)
    with pytest.raises(errors.ValueLostError, match="does not have it"):
        await within(runtime.actors.digest(future))


async def test_what_does_not_fit_onto_the_disk_goes_to_the_broker(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await runtime.worker("only")
    await runtime.client()

    def full(self: LocalStore, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "write", full)
    future = runtime.actors.make(SIZE)
    assert len(await within(future)) == SIZE
    assert runtime.files() == [] and len(await (await runtime.objects()).names()) == 1
    assert await within(runtime.actors.digest(b"x" * SIZE))


async def test_beyond_the_limit_is_an_error_that_says_what_to_do(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await runtime.worker("only")
    client = await runtime.client()
    monkeypatch.setattr(claims, "VALUE_LIMIT_BYTES", 2 * SIZE)
    with pytest.raises(errors.ValueTooLargeError, match="pass a path"):
        client.call("digest", b"x" * (2 * SIZE))
    for name in ("make", "make_in_thread"):
        with pytest.raises(errors.ValueTooLargeError, match="the result of make") as raised:
            await within(client.call(name, 2 * SIZE))
        assert raised.value.limit_bytes == 2 * SIZE
    stream = client.stream("pieces", [1, 2 * SIZE])
    assert await within(anext(stream)) == b"\0"
    with pytest.raises(errors.ValueTooLargeError, match="a piece of pieces"):
        await within(anext(stream))
    assert len(await within(client.call("make", SIZE))) == SIZE


@pytest.mark.interpreted
async def test_a_claim_that_makes_no_sense_fails_its_future_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    await runtime.worker("only")
    client = await runtime.client()

    async def nonsense(host: Host, execution: object, data: bytes) -> bytes:
        return claims.MARK + b"\x93\x01"

    monkeypatch.setattr(Host, "_fitting", lambda host, execution, payload, is_wanted: payload)
    monkeypatch.setattr(Host, "_claim_for", nonsense)
    with pytest.raises(errors.MalformedMessageError):
        await within(client.call("make", SIZE))
    assert await within(client.call("make", 2)) == b"\0\0"


def test_a_program_without_a_loop_takes_large_values(namespace: str, broker_access: BrokerAccess, tmp_path: Path) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, local_store=str(tmp_path / "s"))

    async def serve(ready: asyncio.Event, done: asyncio.Event) -> None:
        async with Worker(load_app(APP), settings, name="w"):
            ready.set()
            await done.wait()

    async def main() -> None:
        ready, done = asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(serve(ready, done))
        await ready.wait()
        await asyncio.to_thread(ask)
        done.set()
        await serving

    def ask() -> None:
        with connect(settings=settings) as client:
            client.run(client.wait_for, "make")
            assert len(client.call("make", SIZE).value(PATIENCE_S)) == SIZE
            assert [len(piece) for piece in client.stream("pieces", [SIZE, 3])] == [SIZE, 3]
            assert client.call("where", b"x" * SIZE).value(PATIENCE_S)[1] == SIZE

    asyncio.run(main())
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["id"]


# The folder.


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert LocalStore.open(folder, "w.1") is None
    assert LocalStore.open(tmp_path / "file" / "\0".replace("\0", "x"), "w.1") is not None
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert LocalStore.open(tmp_path / "link", "w.1") is None


def test_a_sweep_takes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    first, second = LocalStore.open(tmp_path / "s", "a.1"), LocalStore.open(tmp_path / "s", "b.1")
    assert first is not None and second is not None and first.id == second.id
    first.write("a.1.00", b"x")
    second.write("b.1.00", b"y")
    second.write("elsewhere.1.00", b"z")
    second.sweep()
    assert sorted(second.names()) == ["a.1.00", "b.1.00", "elsewhere.1.00"]
    os.close(first._lock)  # as when the process ends
    second.sweep()
    assert sorted(second.names()) == ["b.1.00", "elsewhere.1.00"]
    second.close()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["elsewhere.1.00", "id"]
