"""What calls do when something goes wrong in an unusual way or order; one worker and its clients in one process."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from fractions import Fraction
from pathlib import Path
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, cast

import numpy
import pytest
from virtual_time import simulated
from waiting import until

import nalar_mq
from nalar_mq import calls as calls_module
from nalar_mq import errors, values
from nalar_mq import host as host_module
from nalar_mq.address import Address
from nalar_mq.app import load_app
from nalar_mq.call_context import CallOptions
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.event_loop import BlockingLoopError
from nalar_mq.host import Host
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Call, Credit, Member, Resolve
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "edge.py"
PATIENCE_S = 60.0  # other processes may have the machine


class Runtime:
    worker: Worker

    def __init__(self) -> None:
        self.hub = MemoryHub(seed=3)
        self.settings = Settings(broker=BrokerAccess(urls=("nats://127.0.0.1:4222",)), namespace="edge", node="here")
        self.app = load_app(APP)
        self.stack = AsyncExitStack()
        self.actors: Any = importlib.import_module("edge")

    @property
    def host(self) -> Host:
        host = self.worker._host
        assert host is not None
        return host

    def started(self, actor: str) -> int:
        return sum(e.started and e.call.actor == actor for e in self.host._executions.values())

    async def start_worker(self, name: str) -> Worker:
        worker = Worker(self.app, self.settings, name=name, connect=self.hub.connect, lease_in_thread=False)
        return await self.stack.enter_async_context(worker)

    def client(self, name: str | None = None) -> Client:
        return connect(settings=self.settings, connect=self.hub.connect, name=name)

    async def open_client(self, name: str | None = None) -> Client:
        return await self.stack.enter_async_context(self.client(name))


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    made = Runtime()
    made.actors.GATES.clear()
    made.actors.STOPPED.clear()
    async with made.stack:
        made.worker = await made.start_worker("only")
        yield made
        for gate in made.actors.GATES.values():
            gate.set()


# Arguments that are futures.


async def test_values_that_came_wait_as_long_as_the_calls_that_need_them(runtime: Runtime) -> None:
    await runtime.open_client()
    a = runtime.actors
    lengths = [a.measure("go", a.large(400_000).later) for _ in range(100)]
    await until(lambda: all(e.missing is None for e in runtime.host._executions.values()) and runtime.worker.running == 100)
    a.gate("go").set()
    assert [await future for future in lengths] == [400_000] * 100


async def test_the_future_of_another_client_may_be_an_argument(runtime: Runtime) -> None:
    one, two = await runtime.open_client("one"), await runtime.open_client("two")
    waiting = one.call("wait_at", "far")
    echoed = two.call("echo", waiting)
    runtime.actors.gate("far").set()
    assert await asyncio.wait_for(_value(echoed), PATIENCE_S) == "far"


async def test_a_cancelled_argument_ends_the_call_that_waits_for_it(runtime: Runtime) -> None:
    await runtime.open_client()
    a = runtime.actors
    argument = a.wait_at("never")
    call = a.echo(argument)
    await until(lambda: runtime.worker.running == 2)
    argument.cancel()
    with pytest.raises(errors.CallCancelledError):
        await asyncio.wait_for(_value(call), PATIENCE_S)
    await until(lambda: runtime.worker.running == 0)
    assert not runtime.host._waiting


# Sessions.


def fields_of(thing: Any) -> dict[str, Any]:
    """What the slots of an object hold, whether its class is plain Python or compiled."""
    of_slots = MemberDescriptorType | GetSetDescriptorType
    return {name: getattr(thing, name) for name, found in vars(type(thing)).items() if isinstance(found, of_slots)}


async def test_a_later_process_of_the_same_name_numbers_its_calls_anew(runtime: Runtime) -> None:
    for expected in (1, 2, 3):
        async with runtime.client("same") as client:
            assert await client.options(session="s").call("Keeper.add", 1) == expected


async def test_what_is_kept_of_sessions_without_a_name_does_not_grow(runtime: Runtime) -> None:
    client = await runtime.open_client()
    for _ in range(50):
        await client.call("Keeper.add", 1)
    await until(lambda: runtime.worker.running == 0)
    calls = client.process.calls
    attributes = {name: value for owner in (calls, calls._crossings) for name, value in fields_of(owner).items()}
    assert {"_entries", "hops"} <= attributes.keys()
    kept = {name: len(held) for name, held in attributes.items() if isinstance(held, dict | list | set)}
    kept["_wheel"] = sum(map(len, calls._wheel.values()))
    assert max(kept.values()) < 5, kept


async def test_an_instance_is_not_idle_while_its_call_runs(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_SESSION_IDLE_S", 0.3)
    client = await runtime.open_client()
    a = runtime.actors
    kept = client.call("keeps", "idle")
    replica = runtime.host._replicas["Keeper"]
    await until(lambda: runtime.started("Keeper") == 1)
    key = next(iter(replica.holders))
    await until(lambda: asyncio.get_running_loop().time() - replica._last_used[key] > 1.7 or bool(a.STOPPED))
    assert not a.STOPPED
    a.gate("idle").set()
    assert await kept == 2


# Many at once.


async def test_thousands_of_queued_calls_that_cannot_begin_all_end(runtime: Runtime) -> None:
    client = await runtime.open_client()
    a = runtime.actors
    first = a.one_at_a_time("many")
    await until(lambda: runtime.started("one_at_a_time") == 1)
    bad = [client.call("one_at_a_time", 7) for _ in range(1200)]
    last = a.one_at_a_time("many")
    await until(lambda: runtime.worker.running == 1202)
    a.gate("many").set()
    assert await first == "many"
    assert await asyncio.wait_for(_value(last), PATIENCE_S) == "many"
    assert all([isinstance(await _error(future), TypeError) for future in bad])
    assert runtime.host._replicas["one_at_a_time"].mailbox.running == 0


async def test_cancelling_one_call_of_a_batch_leaves_the_others_alone(runtime: Runtime) -> None:
    await runtime.open_client()
    a = runtime.actors
    alone = a.together("alone")
    await until(lambda: runtime.started("together") == 1)
    batch = [a.together(name) for name in "abc"]
    await until(lambda: runtime.worker.running == 4)
    a.gate("first-alone").set()
    assert await alone == "alone"
    await until(a.gate("batch-begun").is_set)
    batch[0].cancel("not this one")
    with pytest.raises(errors.CallCancelledError, match="not this one"):
        await batch[0]
    a.gate("batch").set()
    assert [await future for future in batch[1:]] == ["B", "C"]


async def test_a_batch_goes_to_the_instance_its_calls_are_for(runtime: Runtime) -> None:
    client = await runtime.open_client()
    caller, context = client.process.calls, client.context

    def tell(name: str, x: int) -> Any:
        options = CallOptions(init=values.encode_arguments((name,), {}))
        return caller.call(context, "Named", "tell", (x,), {}, options)

    first = tell("first", 0)
    await until(lambda: runtime.started("Named") == 1)
    others = [tell(name, x) for x in range(3) for name in ("left", "right")]
    await until(lambda: runtime.worker.running == 7)
    runtime.actors.gate("named").set()
    assert await first == "first0"
    assert [await future for future in others] == [f"{name}{x}" for x in range(3) for name in ("left", "right")]


# Streams.


async def test_a_generator_whose_pieces_nobody_takes_is_bounded(runtime: Runtime) -> None:
    await runtime.open_client()
    with pytest.raises(errors.ValueTooLargeError):
        await asyncio.wait_for(_value(runtime.actors.endless.options(timeout_s=2 * PATIENCE_S)()), PATIENCE_S)
    with pytest.raises(errors.ValueTooLargeError):
        await asyncio.wait_for(_value(runtime.actors.endless_in_thread.options(timeout_s=2 * PATIENCE_S)()), PATIENCE_S)
    await until(lambda: runtime.worker.running == 0)


async def test_a_generator_that_raises_gives_its_pieces_before_its_error(runtime: Runtime) -> None:
    await runtime.open_client()
    stream = runtime.actors.breaks_off(100).stream()
    assert [await anext(stream) for _ in range(100)] == list(range(100))
    with pytest.raises(ValueError, match="broken off"):
        await anext(stream)


async def test_a_cancelled_generator_is_closed_before_its_call_ends(runtime: Runtime) -> None:
    await runtime.open_client()
    future = runtime.actors.endless()
    stream = future.stream()
    assert [await anext(stream) for _ in range(10)] == list(range(10))
    future.cancel()
    with pytest.raises(errors.CallCancelledError):
        await future
    assert runtime.actors.gate("endless-ended").is_set()


async def test_credit_may_overtake_its_call(runtime: Runtime) -> None:
    client = await runtime.open_client()
    me, id = client.process.me, b"early-credit-123"
    runtime.host.on_credit(me, Credit(id, 64))
    runtime.host.on_call(me, Call(id, "endless", "", values.encode_arguments((), {}), "s"), 0.0)
    outflow = runtime.host._executions[id].outflow
    assert outflow is not None
    await until(lambda: outflow._sent == 64)


async def test_threads_ways_of_waiting_are_refused_on_the_loop(runtime: Runtime) -> None:
    await runtime.open_client()
    waiting = runtime.actors.wait_at("loop")
    with pytest.raises(BlockingLoopError):
        next(waiting.stream())
    with pytest.raises(BlockingLoopError):
        next(nalar_mq.as_completed([waiting]))
    with pytest.raises(BlockingLoopError):
        waiting.value()


# Errors.


async def test_an_error_of_any_size_and_manner_ends_its_call(runtime: Runtime) -> None:
    client = await runtime.open_client()
    a = runtime.actors
    error = await asyncio.wait_for(_error(a.says_too_much(3_000_000)), PATIENCE_S)
    assert "ValueError" in repr(error) or isinstance(error, ValueError)
    for _ in range(3):
        client.cast("mute")
        assert await asyncio.wait_for(_error(a.mute()), PATIENCE_S) is not None
    await until(lambda: runtime.worker.running == 0)
    assert all(replica.mailbox.running == 0 for replica in runtime.host._replicas.values())


@pytest.mark.parametrize("call", ["Stillborn.ask", "Stillborn.ask_in_thread", "Unstarted.ask", "ends_itself"])
async def test_what_cannot_be_made_or_ends_itself_fails_its_calls(runtime: Runtime, call: str) -> None:
    client = await runtime.open_client()
    for _ in range(3):
        error = await asyncio.wait_for(_error(client.options(session="s").call(call)), PATIENCE_S)
        assert isinstance(error, errors.CallError | RuntimeError)
    await until(lambda: runtime.worker.running == 0)


async def test_futures_that_end_with_their_process_have_errors_of_their_own(runtime: Runtime) -> None:
    async with runtime.client() as client:
        futures = [client.call("wait_at", f"never{i}") for i in range(3)]
    failures = [future.error() for future in futures]
    assert [getattr(error, "call_id", None) for error in failures] == [future.id.hex() for future in futures]


# Time.


async def test_an_endless_timeout_is_none(runtime: Runtime) -> None:
    await runtime.open_client()
    a = runtime.actors
    assert await a.echo.options(timeout_s=math.inf)(1) == 1
    assert await a.echo.options(timeout_s=1e300)(1) == 1


@pytest.mark.parametrize("child", ["wait_at", "echo"])
async def test_a_deadline_names_the_call_that_it_was_given_for(runtime: Runtime, child: str) -> None:
    client = await runtime.open_client()
    for _ in range(5):
        with pytest.raises(errors.CallTimeoutError, match=r"^asks_on_and_on did not end before its deadline") as raised:
            await client.options(timeout_s=0.2).call("asks_on_and_on", child)
        assert raised.value.actor == "asks_on_and_on"
        assert errors.path_of(raised.value) in ((), ("asks_on_and_on", child))
        assert "mailbox" not in str(raised.value)


async def test_a_deadline_of_a_child_that_is_before_that_of_its_caller_is_its_own(runtime: Runtime) -> None:
    client = await runtime.open_client()
    with pytest.raises(errors.CallTimeoutError, match=r"^wait_at did not end before its deadline") as raised:
        await client.options(timeout_s=PATIENCE_S).call("asks_impatiently")
    assert errors.path_of(raised.value) == ("asks_impatiently", "wait_at")


async def test_a_cast_ends_at_its_deadline(runtime: Runtime) -> None:
    client = await runtime.open_client()
    client.options(timeout_s=2.0).cast("wait_at", "never")
    await until(lambda: runtime.started("wait_at") == 1)
    await until(lambda: runtime.worker.running == 0)


async def test_a_cast_outlives_the_client_that_made_it(runtime: Runtime) -> None:
    a = runtime.actors
    async with runtime.client() as client:
        client.cast("wait_at", "later")
        client.call("wait_at", "other")
        await until(lambda: runtime.started("wait_at") == 2)
    await until(lambda: runtime.started("wait_at") < 2)
    assert runtime.started("wait_at") == 1
    before = runtime.host.completed
    a.gate("later").set()
    await until(lambda: runtime.worker.running == 0)
    assert runtime.host.completed == before + 1


@simulated
async def test_grace_begins_anew_for_calls_that_wait_anew() -> None:
    runtime, loop = Runtime(), asyncio.get_running_loop()
    async with runtime.client() as client:
        future = client.options(retries=1).call("ghost")
        await asyncio.sleep(0.7 * calls_module.GRACE_S)
        ghost, process = Address("ghost", 5), client.process
        process.table.join("ghost", Member(WIRE_VERSION, 5, "here", "worker", 1, {"ghost": ActorInfo("tool", {})}))
        process.calls.on_table_changed()
        await asyncio.sleep(0)
        waits_anew = loop.time()
        process.endpoint.lose(ghost)
        with pytest.raises(errors.UnknownActorError):
            await future
        assert loop.time() - waits_anew > 0.9 * calls_module.GRACE_S


async def test_a_call_that_is_made_while_nobody_serves_its_actor_is_retried_as_often_as_others(tmp_path: Path) -> None:
    hub, app = MemoryHub(seed=3), load_app(APP.parent / "ledger_app.py")
    settings = Settings(
        broker=BrokerAccess(urls=("nats://127.0.0.1:4222",)), namespace="edge", node="here", lease_s=1.0, state=str(tmp_path)
    )

    def worker(name: str) -> Worker:
        return Worker(app, settings, name=name, connect=hub.connect, lease_in_thread=False)

    async with asyncio.timeout(PATIENCE_S), connect(settings=settings, connect=hub.connect) as client:
        async with worker("first"):
            assert await client.call("later", 1, 0.0) == 1
        await until(lambda: client.process.table.info("later") is None)
        future = client.call("later", 2, 0.5)
        async with worker("second") as second:
            await until(lambda: second.running)
            hub.kill("second")
            async with worker("third"):
                assert await future == 2


async def test_who_ignores_its_cancellation_holds_nobody_up(runtime: Runtime) -> None:
    await runtime.open_client()
    future = runtime.actors.stubborn("s")
    await until(lambda: runtime.started("stubborn") == 1)
    future.cancel()
    with pytest.raises(errors.CallCancelledError) as raised:
        await asyncio.wait_for(_value(future), PATIENCE_S)
    assert raised.value.started


# Threads and children.


def test_a_call_after_the_loop_has_closed_fails() -> None:
    async def main() -> Any:
        runtime = Runtime()
        async with runtime.stack:
            client = await runtime.open_client()
            return client.process.calls, client.context

    caller, context = asyncio.run(main())
    future = caller.call(context, "echo", "", (1,), {}, CallOptions())
    with pytest.raises(errors.CallCancelledError):
        future.value(timeout=3)


async def test_a_child_process_ends_though_it_was_cancelled_before_it_began(runtime: Runtime) -> None:
    await runtime.open_client()
    for _ in range(3):
        future = runtime.actors.sleeps(300)
        await until(lambda: runtime.started("sleeps") == 1)
        future.cancel()
        with pytest.raises(errors.CallCancelledError):
            await future
        await until(lambda: runtime.started("sleeps") == 0)


async def test_cancelling_a_child_process_ends_its_own_children_and_never_blocks(runtime: Runtime, tmp_path: Path) -> None:
    await runtime.open_client()
    pid_file = tmp_path / "pid"
    future = runtime.actors.leaves_a_child_behind(300, str(pid_file))
    await until(pid_file.exists)
    future.cancel()
    with pytest.raises(errors.CallCancelledError):
        await asyncio.wait_for(_value(future), PATIENCE_S)
    await until(lambda: runtime.started("leaves_a_child_behind") == 0)
    await until(lambda: _has_ended(int(pid_file.read_text())))


def _has_ended(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


# What comes from others.


async def test_a_result_that_makes_no_sense_does_not_stop_the_others(runtime: Runtime) -> None:
    client = await runtime.open_client()
    calls = client.process.calls
    broken, good = runtime.actors.wait_at("a"), runtime.actors.wait_at("b")
    stream = broken.stream()
    await until(lambda: runtime.started("wait_at") == 2)
    unknown = values.encode([1]).replace(b"\x01", b"\xc7\x03\x0bxyz")
    calls.on_messages(runtime.worker.process.me, [Resolve(broken.id, unknown), Resolve(good.id, values.encode(2))])
    assert await asyncio.wait_for(_value(good), PATIENCE_S) == 2
    with pytest.raises(errors.WireError):
        await asyncio.wait_for(anext(stream), PATIENCE_S)
    with pytest.raises(errors.WireError):
        await asyncio.wait_for(_value(broken), PATIENCE_S)
    assert calls.pending == 0


async def _value(future: Any) -> Any:
    return await future


async def _error(future: Any) -> BaseException | None:
    try:
        await future
    except BaseException as error:
        return error
    return None


# What a program gives by mistake.


async def test_what_is_no_name_and_no_option_is_refused_with_what_would_be(runtime: Runtime) -> None:
    client: Any = await runtime.open_client()
    for make in (client.call, client.cast, client.stream, None):
        with pytest.raises(errors.ArgumentError, match=r"'agent\.method', not by"):
            make(make) if make is not None else await client.wait_for(5)
    stub = runtime.actors.asks_impatiently
    for given in (client, stub):
        with pytest.raises(errors.AddressError, match=r"session is a text of .*, not 5"):
            given.options(session=5)
        with pytest.raises(errors.ArgumentError, match="timeout_s is a number of seconds, or None for no deadline, not '3'"):
            given.options(timeout_s="3")
        with pytest.raises(errors.ArgumentError, match=r"timeout_s is .*, not nan"):
            given.options(timeout_s=math.nan)
        with pytest.raises(errors.ArgumentError, match=r"priority is a whole number, not 1\.5"):
            given.options(priority=1.5)
        with pytest.raises(errors.ArgumentError, match="retries is a whole number, not '1'"):
            given.options(retries="1")
    numbers = {"priority": numpy.int64(1), "retries": numpy.int8(2), "timeout_s": Fraction(PATIENCE_S)}
    assert await runtime.actors.echo.options(**numbers)(1) == 1
    with pytest.raises(errors.AddressError, match="tenant is a text"):
        client.options(tenant=5)
    with pytest.raises(errors.AddressError, match="client name is a text"):
        runtime.client(cast("Any", 5))
    with pytest.raises(errors.AddressError, match="workflow is a text"):
        await client.submit(5)


def test_help_shows_what_is_asynchronous() -> None:
    for method in (Client.members, Client.wait_for, Client.submit):
        assert "-> 'Coroutine[" in str(inspect.signature(method))
