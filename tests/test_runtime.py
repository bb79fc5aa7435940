"""Workers and clients in one process, over both transports."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until

import nalar_mq
from nalar_mq import errors
from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.host import REMEMBERED
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Transport
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "basic.py"
PATIENCE_S = 60.0  # other processes may have the machine


class Runtime:
    """Two workers and a client; more of both on demand."""

    first: Worker
    second: Worker

    def __init__(self, app: App, settings: Settings, connect: Callable[[str], Awaitable[Transport]], hub: MemoryHub) -> None:
        self.app = app
        self.hub = hub
        self.settings = settings
        self.connect = connect
        self.stack = AsyncExitStack()
        self.actors: Any = importlib.import_module("basic")

    def started(self, actor: str) -> int:
        """Calls of `actor` that have begun and not ended."""
        hosts = [worker._host for worker in (self.first, self.second)]
        return sum(e.started and e.call.actor == actor for host in hosts if host for e in host._executions.values())

    async def worker(self, name: str, **options: Any) -> Worker:
        worker = Worker(self.app, self.settings, name=name, connect=self.connect, lease_in_thread=False, **options)
        return await self.stack.enter_async_context(worker)

    async def client(self, **options: Any) -> Client:
        return await self.stack.enter_async_context(connect(settings=self.settings, connect=self.connect, **options))


@pytest.fixture(params=["memory", "nats"])
async def runtime(request: pytest.FixtureRequest, namespace: str, broker_access: BrokerAccess) -> AsyncIterator[Runtime]:
    hub = MemoryHub(seed=1)

    async def over_nats(name: str) -> Transport:
        return await NatsTransport.connect(broker_access, name=name)

    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=2.0)
    made = Runtime(load_app(APP), settings, hub.connect if request.param == "memory" else over_nats, hub)
    made.actors.GATES.clear()
    made.actors.TURNS.clear()
    async with made.stack:
        made.first = await made.worker("first")
        made.second = await made.worker("second")
        yield made


only_in_memory = pytest.mark.parametrize("runtime", ["memory"], indirect=True)  # there a process can be killed alone


async def test_a_call_returns_what_plain_python_returns(runtime: Runtime) -> None:
    client = await runtime.client()
    a = runtime.actors
    assert await client.call("add", 2, b=3) == 5
    assert await a.double(21) == 42
    assert await a.parallel(20) == sum(2 * i for i in range(20))
    assert await a.Desk.report("t") == a.Report("t", (1, 2))
    for value in [None, (1, [2, {3: "x"}]), {1, 2}, a.Report("x", (4,)), b"\x00", 10**40, 1.5j]:
        assert await a.echo(value) == value


async def test_unresolved_futures_travel_as_arguments(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    assert await a.passed_on(100) == 100
    x = a.add(1, 2)
    assert await a.echo({"deep": [x, (x, x)]}) == {"deep": [3, (3, 3)]}


async def test_a_failed_future_fails_the_call_it_was_passed_to(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    failing = a.refuse("no")
    with pytest.raises(a.Refused) as raised:
        await a.add(failing, 1)
    assert raised.value.code == 7
    with pytest.raises(a.Refused):
        await a.echo([failing])
    assert await a.caught() == "7"


async def test_an_error_tells_the_calls_it_has_come_through(runtime: Runtime) -> None:
    client = await runtime.client()
    paths = {
        "refuse": ("refuse",),
        "refused_as_argument": ("refused_as_argument", "echo", "refuse"),
        "Left.ask": ("Left.ask",),
    }
    for name, path in paths.items():
        with pytest.raises((runtime.actors.Refused, errors.ArgumentError)) as raised:
            await client.call(name, *(["no"] if name == "refuse" else []))
        cause = raised.value.__cause__
        assert isinstance(cause, errors.RemoteTraceback)
        assert (cause.path, cause.actor) == (path, name)
        assert f"in {' -> '.join(path)} (call " in str(cause)
    with pytest.raises(runtime.actors.Refused) as raised:
        await client.call("refused_below", 80)
    path = errors.path_of(raised.value)
    assert (len(path), path[0], path[-1]) == (64, "refused_below", "refuse")


async def test_errors_of_every_kind_have_their_types(runtime: Runtime) -> None:
    client = await runtime.client()
    a = runtime.actors
    with pytest.raises(errors.UnknownActorError, match=r"served are: .*add"):
        await client.call("nobody")
    with pytest.raises(errors.UnknownMethodError, match="it has: add"):
        await client.call("Counter.nothing")
    with pytest.raises(errors.ArgumentError, match="missing a required argument: 'a'"):
        await client.call("add")
    with pytest.raises(TypeError, match="'a' of add must be int"):
        await client.call("add", "x")
    with pytest.raises(errors.ArgumentError):
        a.add()
    with pytest.raises(errors.ValueNotEncodableError, match="lock"):
        await a.unencodable()
    with pytest.raises(errors.ValueNotEncodableError):
        a.echo(asyncio.Lock())
    assert len(await a.large(400_000)) == 400_000
    with pytest.raises(errors.RemoteError, match="SystemExit"):
        await a.exits()
    assert await a.add(1, 1) == 2


async def test_a_call_outside_a_runtime_says_how_to_get_one() -> None:
    load_app(APP)
    actors = importlib.import_module("basic")
    with pytest.raises(errors.NotConnectedError, match="nalar run"):
        actors.echo(1)


async def test_streams_come_in_order_and_slow_the_producer(runtime: Runtime) -> None:
    client = await runtime.client()
    a = runtime.actors
    assert [x async for x in client.stream("numbers", 500)] == list(range(500))
    assert [x async for x in a.sync_numbers(300).stream()] == list(range(300))
    assert await a.numbers(4) == [0, 1, 2, 3]
    assert [x async for x in client.stream("add", 1, 2)] == [3]
    assert await a.sync_numbers(3) == [0, 1, 2]
    async for piece in a.endless().stream():
        if piece == 3:
            break
    assert await asyncio.to_thread(a.gate("endless-ended").wait, 5)
    a.gate("endless-ended").clear()
    endless = a.endless()
    taken = [x async for _, x in _first_of(endless.stream(), 1000)]
    assert taken == list(range(1000))
    endless.cancel()
    with pytest.raises(errors.CallCancelledError):
        await endless
    assert await asyncio.to_thread(a.gate("endless-ended").wait, 5)


async def _first_of(stream: Any, n: int) -> AsyncIterator[tuple[int, Any]]:
    for i in range(n):
        yield i, await anext(stream)


async def test_sessions_of_a_stateful_agent_are_apart_and_in_order(runtime: Runtime) -> None:
    await runtime.client()
    counter = runtime.actors.Counter
    results: dict[str, list[int]] = {}
    for session in ("a", "b", "c"):
        add, add_sync = counter.add.options(session=session), counter.add_sync.options(session=session)
        futures = [(add_sync if i % 3 else add)(1) for i in range(60)]
        results[session] = [await future for future in futures]
    assert results == {session: list(range(1, 61)) for session in results}
    assert await counter.history.options(session="a")() == ["started"]


async def test_a_call_chain_may_enter_its_own_session_again(runtime: Runtime) -> None:
    await runtime.client()
    assert await runtime.actors.Counter.twice.options(session="s")(5) == 10
    assert await runtime.actors.count_in_session.options(session="s")(3) == 13


async def test_options_given_in_steps_add_up(runtime: Runtime) -> None:
    await runtime.worker("w")
    client = await runtime.client()
    by_name = client.options(session="steps").options(timeout_s=9.0).options(priority=2)
    assert await by_name.call("Counter.add", 1) == 1
    assert await by_name.options(retries=3).call("Counter.add", 1) == 2
    add = runtime.actors.Counter.add.options(session="steps").options(retries=3)
    assert await add.options(timeout_s=None)(1) == 3
    assert await add.options(session="other")(1) == 1


async def test_two_clients_agree_on_the_place_of_a_session(runtime: Runtime) -> None:
    one, two = await runtime.client(), await runtime.client()
    futures = [c.options(session=f"s{i % 7}").call("Counter.add", 1) for i in range(70) for c in (one, two)]
    values = [await future for future in futures]
    assert sorted(values) == sorted([n for n in range(1, 21) for _ in range(7)])


async def test_a_session_of_a_stateful_agent_never_moves(runtime: Runtime) -> None:
    client = await runtime.client()
    assert await client.options(session="s").call("Counter.add", 1) == 1
    with pytest.raises(errors.MigrationError, match="sessions of 'Counter' never move: it is stateful"):
        await client.migrate("Counter", "s", to=runtime.second.name)
    assert await client.options(session="s").call("Counter.add", 1) == 2


async def test_an_agent_without_state_has_one_instance_per_replica(runtime: Runtime) -> None:
    await runtime.client()
    runtime.actors.Desk.made = 0
    counts = [await runtime.actors.Desk.instances() for _ in range(30)]
    assert max(counts) <= 2


async def test_sync_recursion_goes_deeper_than_any_concurrency(runtime: Runtime) -> None:
    await runtime.client()
    assert await runtime.actors.narrow(200) == 200


async def test_two_workers_that_flood_each_other_through_windows_of_one_go_on(runtime: Runtime) -> None:
    await runtime.client()
    for worker in (runtime.first, runtime.second):
        worker.process.endpoint._window_calls = 1
        worker.process.endpoint._ack_messages = 0
    calls = [runtime.actors.parallel(20) for _ in range(20)]
    assert [await call for call in calls] == [sum(2 * n for n in range(20))] * 20


async def test_a_waiting_call_gives_up_its_slot_and_a_computing_one_does_not(runtime: Runtime) -> None:
    client = await runtime.client()
    a = runtime.actors
    waiting = [a.waits_for_another("slot") for _ in range(6)]
    computing = [a.one_at_a_time("slot") for _ in range(6)]
    await until(lambda: runtime.started("wait_at") == 6)
    assert runtime.started("one_at_a_time") == 2
    await client.call("opens", "slot")
    assert [await future for future in [*waiting, *computing]] == ["slot"] * 12


async def test_as_completed_follows_the_order_of_ends(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    order = a.first_of(["x", "y", "z"])
    for name in ("z", "x", "y"):
        done = a.wait_at(name)
        await a.opens(name)
        await done
        await asyncio.sleep(0.05)
    assert await order == ["z", "x", "y"]


async def test_a_deadline_ends_a_call_and_its_children(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    with pytest.raises(TimeoutError) as raised:
        await a.waits_for_child.options(timeout_s=0.2)("never")
    assert isinstance(raised.value, errors.CallTimeoutError)
    await until(lambda: runtime.first.running + runtime.second.running == 0)
    outer, inner = await a.deadlines.options(timeout_s=80.0)()
    assert inner <= 30.0 < outer <= 80.0
    assert await a.left_s.options(timeout_s=None)() == -1.0


async def test_cancelling_says_whether_the_call_had_started(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    running, queued = a.one_at_a_time("c"), [a.one_at_a_time("c") for _ in range(8)]
    await until(lambda: runtime.first.running + runtime.second.running == 9)
    queued[-1].cancel("not needed")
    with pytest.raises(errors.CallCancelledError, match="not needed") as raised:
        await queued[-1]
    assert raised.value.started is False
    blocked = a.block_at("b")
    await until(lambda: runtime.first.running + runtime.second.running == 9)
    blocked.cancel()
    with pytest.raises(errors.CallCancelledError) as raised:
        await blocked
    assert raised.value.started is True
    a.gate("b").set()
    await a.opens("c")
    assert [await future for future in [running, *queued[:-1]]] == ["c"] * 8


async def test_children_inherit_session_and_priority(runtime: Runtime) -> None:
    client = await runtime.client()
    session, priority, is_root = await client.options(session="mine", priority=4).call("session_and_priority")
    assert (session, priority, is_root) == ("mine", 4, True)
    first, _, _ = await client.call("session_and_priority")
    second, _, _ = await client.call("session_and_priority")
    assert first != second


@only_in_memory
async def test_a_lost_worker_fails_its_calls_and_retries_those_that_may_be(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    plain = [a.wait_at("lost") for _ in range(8)]
    retried = [a.wait_at.options(retries=1)("lost") for _ in range(8)]
    first = runtime.first
    await until(lambda: first.running + runtime.second.running == 16)
    on_first = first.running
    assert on_first
    runtime.hub.kill("first")
    await until(lambda: any(future.failed() for future in plain), within_s=20)
    await a.opens.options(retries=1)("lost")
    assert [await future for future in retried] == ["lost"] * 8
    outcomes = [await _outcome(future) for future in plain]
    assert set(outcomes) == {"lost", errors.WorkerLostError}


async def test_a_lost_client_takes_its_calls_with_it(runtime: Runtime) -> None:
    client = connect(settings=runtime.settings, connect=runtime.connect)
    async with client:
        client.call("waits_for_child", "never")
        await until(lambda: runtime.first.running + runtime.second.running == 2)
    await until(lambda: runtime.first.running + runtime.second.running == 0)


async def test_a_drained_worker_finishes_and_gets_nothing_new(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    calls = [a.wait_at("drain") for _ in range(8)]
    first, second = runtime.first, runtime.second
    await until(lambda: first.running + second.running == 8)
    had = first.running
    draining = asyncio.ensure_future(first.drain(20))
    table = second.process.table
    await until(lambda: all(address.name != "first" for address in table.replicas("add")))
    later = [a.wait_at("drain") for _ in range(8)]
    await until(lambda: second.running == 8 - had + 8)
    assert first.running == had
    await a.opens("drain")
    assert [await future for future in [*calls, *later]] == ["drain"] * 16
    assert await draining


@only_in_memory
async def test_the_session_of_a_dead_worker_is_reported_lost_once(runtime: Runtime) -> None:
    await runtime.client()
    add = runtime.actors.Counter.add.options(session="gone")
    assert await add(1) == 1
    holder = await runtime.actors.Counter.place.options(session="gone")()
    runtime.hub.kill(holder)
    outcomes = [await _outcome(add(1)) for _ in range(4)]
    assert outcomes[-4:] in ([errors.WorkerLostError, errors.StateLostError, 1, 2], [errors.StateLostError, 1, 2, 3])


async def test_a_later_process_of_the_same_name_replaces_the_former(runtime: Runtime) -> None:
    await runtime.client()
    first = runtime.first
    again = await runtime.worker("first")
    async with asyncio.timeout(PATIENCE_S):
        await first.closed
    assert not again.closed.done()
    assert await runtime.actors.add.options(retries=1)(1, 2) == 3


async def test_waiting_calls_of_a_batchable_tool_run_as_one(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    a.BATCHES.clear()
    assert [await f for f in [a.square(i) for i in range(60)]] == [i * i for i in range(60)]
    assert max(a.BATCHES) > 5
    assert sum(a.BATCHES) <= 60
    outcomes = [await _outcome(f) for f in [a.misbatched(i) for i in range(20)]]
    assert TypeError in outcomes
    assert await a.misbatched(3) == 3


async def test_isolated_code_runs_in_a_child_that_may_die(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    pid, x = await a.elsewhere(5)
    assert (pid != os.getpid(), x) == (True, 5)
    with pytest.raises(ValueError, match="negative") as raised:
        await a.elsewhere(-1)
    assert raised.value.args == ("negative", -1)
    with pytest.raises(errors.WorkerLostError, match="signal 9"):
        await a.dies()
    long = a.sleeps(60)
    await until(lambda: runtime.started("sleeps") == 1)
    long.cancel()
    with pytest.raises(errors.CallCancelledError):
        await long
    await until(lambda: runtime.started("sleeps") == 0)


async def test_a_cancelled_call_is_interrupted_by_the_function_named_for_it(runtime: Runtime) -> None:
    await runtime.client()
    running = runtime.actors.interruptible()
    await until(lambda: runtime.started("interruptible") == 1)
    running.cancel()
    with pytest.raises(errors.CallCancelledError):
        await running
    await until(lambda: runtime.started("interruptible") == 0)


async def test_calls_go_to_no_more_replicas_than_max_instances(runtime: Runtime) -> None:
    await runtime.client()
    assert {await runtime.actors.only_one() for _ in range(20)} == {"first"}


async def test_calls_go_where_others_have_sent_less(runtime: Runtime) -> None:
    others = await runtime.client()
    busy = [others.call("wait_in_one", "load") for _ in range(6)]
    client = await runtime.client()
    async with asyncio.timeout(PATIENCE_S):
        while {await client.call("where") for _ in range(64)} != {"second"}:
            pass
    await client.call("opens", "load")
    assert await nalar_mq.gather(*busy) == (None,) * 6
    async with asyncio.timeout(PATIENCE_S):
        while {await client.call("where") for _ in range(64)} != {"first", "second"}:
            pass


async def test_a_run_is_traced_from_its_root_across_workers(runtime: Runtime) -> None:
    client = await runtime.client()
    future = client.options(session="one").call("parallel", 8)
    await future
    await client.call("add", 1)
    trace = await client.trace(future)
    root, *children = trace.calls
    assert (root.id, root.name, root.state, root.session, root.owner) == (
        future.id.hex(),
        "parallel",
        "done",
        "one",
        client.name,
    )
    assert [(call.name, call.depth, call.parent) for call in children] == [("double", 1, root.id)] * 8
    assert {call.worker for call in trace.calls} <= {"first", "second"}
    assert len({call.worker for call in children}) == 2
    assert all(call.owner == root.worker and call.node == "here" for call in children)
    assert root.ran_s is not None
    for call in children:
        assert call.ran_s is not None
        assert call.start_s + call.waited_s + call.ran_s <= root.waited_s + root.ran_s + 0.1
    assert (await client.trace("one")).calls == (await client.trace(children[3].id)).calls == trace.calls
    assert [call.name for call in (await client.trace()).calls] == ["add"]


async def test_a_run_is_traced_while_it_goes_on_and_after_it_has_failed(runtime: Runtime) -> None:
    client = await runtime.client()
    waiting = client.call("waits_for_child", "traced")
    await until(lambda: runtime.started("wait_at") == 1)
    assert [call.state for call in (await client.trace(waiting)).calls] == ["waiting", "running"]
    await client.call("opens", "traced")
    await waiting
    assert await client.call("caught") == "7"
    root, failed = (await client.trace()).calls
    assert (root.state, failed.state, failed.error) == ("done", "failed", "basic:Refused")
    cancelled = client.call("wait_at", "never")
    await until(lambda: runtime.started("wait_at") == 1)
    cancelled.cancel()
    with pytest.raises(errors.CallCancelledError):
        await cancelled
    assert [call.state for call in (await client.trace(cancelled)).calls] == ["cancelled"]
    with pytest.raises(errors.UnknownCallError, match="'nobody'"):
        await client.trace("nobody")


async def test_workers_tell_what_they_have_in_hand(runtime: Runtime) -> None:
    client = await runtime.client(name="client-asks")
    futures = [client.call("narrow_gate", "look") for _ in range(6)]
    await until(lambda: runtime.started("narrow_gate") == 2)
    other = await runtime.client(name="client-other")
    pending = [other.call("wait_at", "look") for _ in range(3)]
    await until(lambda: runtime.started("wait_at") == 3)
    views = {view.name: view.glance for view in await client.look()}
    assert list(views) == ["client-other", "first", "second"]
    assert views["client-other"].futures == 3
    hands = [views[name].actors["narrow_gate"] for name in ("first", "second")]
    assert sum(queued for queued, _ in hands) == 4
    assert [running for _, running in hands] == [1, 1]
    await client.call("opens", "look")
    await nalar_mq.gather(*futures, *pending)
    ended = {view.name: view.glance.ended for view in await client.look()}
    assert ended["first"] + ended["second"] == 10
    assert ended["client-other"] == 0


async def test_a_worker_remembers_its_last_calls_in_any_number_of_pieces(runtime: Runtime) -> None:
    client = await runtime.client()
    host = runtime.first._host
    assert host is not None
    await client.call("add", 1)
    record = next(r for worker in (runtime.first, runtime.second) if worker._host for r in worker._host.records())
    for number in range(REMEMBERED + 500):
        host._ended.append(msgspec.structs.replace(record, id=number.to_bytes(16, "big"), parent=b"\xff" * 16, session="many"))
    trace = await client.trace("many")
    assert len(trace.calls) == REMEMBERED
    assert int(trace.calls[0].id, 16) == 500


def _priorities(runtime: Runtime, actor: str) -> list[int]:
    hosts = [worker._host for worker in (runtime.first, runtime.second)]
    return [record.priority for host in hosts if host for record in host.records() if record.actor == actor]


async def _turns(runtime: Runtime, futures: list[Any]) -> list[str]:
    """Lets all of them run, and tells in which order they began."""
    for name in ("one", "two", "three", "four"):
        await runtime.actors.opens(name)
    await nalar_mq.gather(*futures)
    return list(runtime.actors.TURNS)


async def test_a_future_can_be_given_another_priority(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    futures = [a.block_turn("one")]
    await until(lambda: a.TURNS == ["one"])
    futures += [a.block_turn(name) for name in ("two", "three", "four")]
    futures[3].set_priority(5)
    futures[1].set_priority(-5)
    await until(lambda: sorted(_priorities(runtime, "block_turn")) == [-5, 0, 0, 5])
    assert [future.info().priority for future in futures] == [0, -5, 0, 5]
    assert await _turns(runtime, futures) == ["one", "four", "three", "two"]


async def test_who_waits_for_a_future_lends_it_its_priority(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    futures = [a.block_turn("one")]
    await until(lambda: a.TURNS == ["one"])
    futures += [a.block_turn("two"), a.block_turn("three")]
    futures.append(a.echo.options(priority=7)(a.echo(futures[2].later).later))
    futures.append(a.waits_for_turn.options(priority=4)("four"))
    await until(lambda: sorted(_priorities(runtime, "block_turn")) == [0, 0, 4, 7])
    assert await _turns(runtime, futures) == ["one", "three", "four", "two"]


async def test_what_is_known_of_a_future(runtime: Runtime) -> None:
    client = await runtime.client(name="client-owner")
    a = runtime.actors
    waiting = client.options(session="known", timeout_s=60, priority=2).call("wait_at", "info")
    needs_it = a.echo(waiting.later)
    await until(lambda: runtime.started("wait_at") == 1 and waiting.info().consumers != ())
    info, depends = waiting.info(), needs_it.info()
    assert (info.id, info.actor, info.parent, info.session) == (waiting.id.hex(), "wait_at", "", "known")
    assert (info.state, info.priority, info.job, info.dependencies) == ("pending", 2, "", ())
    assert {info.executor, *info.consumers, depends.executor} <= {"first", "second"}
    assert info.consumers == (depends.executor,)
    assert depends.dependencies == (info.id,)
    assert depends.session == f"auto-{needs_it.id.hex()}"
    assert info.made_at is not None and info.deadline_at is not None and info.ended_at is None
    assert info.deadline_at - info.made_at == pytest.approx(60, abs=1e-3)
    await a.opens("info")
    await waiting
    ended = waiting.info()
    assert (ended.state, ended.executor, ended.consumers) == ("resolved", info.executor, info.consumers)
    assert ended.ended_at is not None and ended.made_at is not None and ended.ended_at >= ended.made_at
    failed = a.refuse("no")
    with pytest.raises(a.Refused):
        await failed
    cancelled = a.wait_at("never")
    cancelled.cancel()
    done, pending = await nalar_mq.wait([failed, cancelled])
    assert (done, pending) == ([failed, cancelled], [])
    assert [future.info().state for future in done] == ["failed", "cancelled"]


async def test_calls_that_wait_for_each_other_are_told_so(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    one = a.Fork.take_with.options(session="a")("b", "table")
    other = a.Fork.take_with.options(session="b")("a", "table")
    outcomes = [await _outcome(one), await _outcome(other)]
    assert errors.WaitCycleError in outcomes
    assert {"a", "b"} & set(outcomes)
    with pytest.raises(errors.WaitCycleError) as raised:
        await (one if outcomes[0] is errors.WaitCycleError else other)
    assert set(raised.value.cycle) == {"Fork[a]", "Fork[b]"}
    assert await a.Left.ask.options(session="x")("x", 6) == 6  # a chain that comes back to its own session is no circle


async def test_an_overloaded_worker_gives_back_what_matters_least(runtime: Runtime) -> None:
    settings = msgspec.structs.replace(runtime.settings, namespace=f"{runtime.settings.namespace}-full")
    runtime.settings = settings
    worker = await runtime.worker("small", high_water=20)
    client = await runtime.client()
    running = client.call("one_at_a_time", "full")
    await until(lambda: worker.running == 1)
    low = [client.options(priority=0).call("one_at_a_time", "full") for _ in range(30)]
    high = [client.options(priority=5).call("one_at_a_time", "full") for _ in range(15)]
    await until(lambda: sum(future.failed() for future in low) == 26)
    assert not any(future.failed() for future in high)
    shed = [future for future in low if future.failed()]
    assert shed == low[4:]  # of one priority the youngest
    with pytest.raises(errors.OverloadedError) as raised:
        await shed[0]
    assert raised.value.retry_after_s >= 1.0
    runtime.actors.gate("full").set()
    assert [await future for future in [running, *low[:4], *high]] == ["full"] * 20


@only_in_memory
async def test_who_slept_through_its_lease_begins_none_of_the_calls_that_came_meanwhile(runtime: Runtime) -> None:
    client = await runtime.client()
    assert runtime.first._host is not None
    completed = runtime.first._host.completed
    runtime.hub.pause("first")
    calls = [client.options(retries=2).call("add", n, b=1) for n in range(40)]
    assert [await call for call in calls] == [n + 1 for n in range(40)]
    assert "first" not in client.process.table.members
    runtime.hub.resume("first")
    await asyncio.wait_for(asyncio.shield(runtime.first.closed), PATIENCE_S)
    assert runtime.first.running > 0
    assert runtime.first._host.completed == completed


async def test_a_cast_runs_and_gives_nothing_back(runtime: Runtime) -> None:
    client = await runtime.client()
    runtime.actors.opens.cast("cast")
    client.cast("opens", "cast-by-name")
    assert await asyncio.to_thread(runtime.actors.gate("cast").wait, 5)
    assert await asyncio.to_thread(runtime.actors.gate("cast-by-name").wait, 5)


async def test_gather_raises_the_first_error_at_once(runtime: Runtime) -> None:
    await runtime.client()
    a = runtime.actors
    with pytest.raises(a.Refused):
        await nalar_mq.gather(a.wait_at("g"), a.refuse("x"))
    assert await nalar_mq.gather(a.add(1), a.add(2)) == (1, 2)


def test_a_plain_program_uses_a_client_without_a_loop(broker_access: BrokerAccess, namespace: str) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    app = load_app(APP)

    async def serve(ready: asyncio.Event, stop: asyncio.Event) -> None:
        async with Worker(app, settings, name="w"):
            ready.set()
            await stop.wait()

    async def main() -> None:
        ready, stop = asyncio.Event(), asyncio.Event()
        serving = asyncio.ensure_future(serve(ready, stop))
        await ready.wait()
        try:
            await asyncio.to_thread(program)
        finally:
            stop.set()
            await serving

    def program() -> None:
        actors = importlib.import_module("basic")
        with connect(settings=settings) as client:
            assert client.call("add", 1, 2).value(timeout=10) == 3
            assert list(client.stream("numbers", 100)) == list(range(100))
            assert sorted(f.value() for f in nalar_mq.as_completed([actors.add(i) for i in range(3)])) == [0, 1, 2]
            assert actors.add(actors.add(1, 1), 1).value() == 3
            with pytest.raises(RuntimeError, match=r"`members` is asynchronous.*client\.run\(client\.members, \.\.\.\)"):
                client.members()
            assert [name for name, _ in client.run(client.members)] == sorted([client.name, "w"])

    asyncio.run(main())


async def _outcome(future: Any) -> Any:
    try:
        return await future
    except (errors.CallError, TypeError) as error:
        return type(error)
