"""What the broker in memory can do beyond the contract: faults from a seed, and processes that fall silent or die."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nalar_mq import simulation
from nalar_mq.errors import BrokerError
from nalar_mq.memory_transport import Faults, MemoryHub, MemoryTransport
from nalar_mq.transport import Delivered


def record(messages: list[bytes]) -> Any:
    def on_message(message: Delivered) -> None:
        messages.append(message.data)

    return on_message


async def listener(hub: MemoryHub, name: str = "b", queue: str = "") -> tuple[MemoryTransport, list[bytes]]:
    transport = await hub.connect(name)
    got: list[bytes] = []
    await transport.subscribe("x.>", record(got), queue=queue)
    return transport, got


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


def received_under(faults: Faults | None, seed: int = 0, count: int = 200) -> list[bytes]:
    async def main() -> list[bytes]:
        hub = MemoryHub(seed, faults)
        a = await hub.connect("a")
        _, got = await listener(hub)
        for data in numbered(count):
            a.publish("x.y", data)
            await asyncio.sleep(0.001)
        await asyncio.sleep(10)
        return got

    return simulation.run(main())


def test_without_faults_everything_arrives_in_order() -> None:
    assert received_under(None) == received_under(Faults()) == numbered(200)


def test_delay_alone_keeps_the_order() -> None:
    assert received_under(Faults(delay_s=(0.0, 0.5))) == numbered(200)


def test_drop_loses_some_in_order() -> None:
    got = received_under(Faults(drop=0.3))
    assert 100 < len(got) < 180
    assert got == sorted(got, key=int)


def test_duplicates_come_twice() -> None:
    got = received_under(Faults(duplicate=0.3))
    assert 230 < len(got) < 290
    assert set(got) == set(numbered(200))


def test_reorder_lets_later_ones_overtake() -> None:
    got = received_under(Faults(reorder=0.3, delay_s=(0.0, 0.02)))
    assert got != numbered(200)
    assert sorted(got, key=int) == numbered(200)


def test_faults_come_from_the_seed() -> None:
    faults = Faults(drop=0.2, duplicate=0.2, reorder=0.2, delay_s=(0.0, 0.1))
    assert received_under(faults, 1) == received_under(faults, 1)
    assert received_under(faults, 1) != received_under(faults, 2)


def test_faults_do_not_touch_requests_keys_and_queues() -> None:
    async def main() -> None:
        hub = MemoryHub(0, Faults(drop=1.0))
        a, b = await hub.connect("a"), await hub.connect("b")
        await b.subscribe("ask", lambda message: b.publish(message.reply, message.data))
        assert (await a.request("ask", b"1", timeout_s=1)).data == b"1"
        bucket = await a.key_value("bucket")
        assert await bucket.create("k", b"1") == 1
        queue = await a.work_queue("queue", ["job.*"])
        assert await queue.publish("job.a", b"1") == (1, False)
        assert len(await queue.pull("job.a", batch=1, timeout_s=1, ack_wait_s=1)) == 1

    simulation.run(main())


def test_a_partition_separates_two_and_nobody_else() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        (b, b_got), (_, c_got) = await listener(hub, "b"), await listener(hub, "c")
        a_got: list[bytes] = []
        await a.subscribe("y", record(a_got))
        hub.partition("a", "b")
        a.publish("x.y", b"1")
        b.publish("y", b"1")
        await asyncio.sleep(1)
        assert (a_got, b_got, c_got) == ([], [], [b"1"])
        hub.heal("b", "a")
        a.publish("x.y", b"2")
        await asyncio.sleep(1)
        assert (b_got, c_got) == ([b"2"], [b"1", b"2"])

    simulation.run(main())


def test_a_queue_group_does_not_choose_a_member_out_of_reach() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        (_, b_got), (_, c_got) = await listener(hub, "b", "g"), await listener(hub, "c", "g")
        hub.partition("a", "b")
        for data in numbered(20):
            a.publish("x.y", data)
        await asyncio.sleep(1)
        assert (b_got, c_got) == ([], numbered(20))

    simulation.run(main())


def test_a_paused_process_hears_and_says_everything_later_in_order() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        b, got = await listener(hub)
        said: list[bytes] = []
        await a.subscribe("y", record(said))
        hub.pause("b")
        for data in numbered(5):
            a.publish("x.y", data)
            b.publish("y", data)
        waiting = asyncio.create_task(b.flush())
        await asyncio.sleep(1)
        assert not got
        assert not said
        assert not waiting.done()
        hub.resume("b")
        a.publish("x.y", b"5")
        await asyncio.sleep(1)
        assert got == numbered(6)
        assert said == numbered(5)
        await waiting

    simulation.run(main())


def test_one_cut_off_from_the_broker_hears_it_fails_and_sends_later() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        b, got = await listener(hub)
        states: list[bool] = []
        a.on_connection(states.append)
        bucket = await a.key_value("bucket")
        hub.cut("a")
        hub.cut("a")
        assert not a.is_connected
        a.publish("x.y", b"1")
        with pytest.raises(BrokerError):
            await bucket.put("k", b"1")
        assert not got
        hub.restore("a")
        await asyncio.sleep(1)
        assert states == [False, True]
        assert got == [b"1"]
        assert await bucket.put("k", b"1") == 1
        hub.cut("b")
        a.publish("x.y", b"lost: nobody keeps it for b")
        await asyncio.sleep(1)
        hub.restore("b")
        await asyncio.sleep(1)
        assert got == [b"1"]
        assert b.is_connected

    simulation.run(main())


def test_what_one_cut_off_publishes_is_kept_up_to_a_bound_the_oldest_goes_first() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        _, got = await listener(hub)
        hub.cut("a")
        for number in range(20):
            a.publish("x.y", bytes((number,)) * 1_000_000)
        hub.restore("a")
        await asyncio.sleep(1)
        assert [data[0] for data in got] == list(range(12, 20))

    simulation.run(main())


def test_a_killed_process_is_gone_and_its_name_can_come_back() -> None:
    async def main() -> None:
        hub = MemoryHub()
        a = await hub.connect("a")
        b, got = await listener(hub)
        watched: list[object] = []

        async def watch() -> None:
            bucket = await b.key_value("bucket")
            watched.extend([entry async for entry in bucket.watch()])

        watching = asyncio.create_task(watch())
        await asyncio.sleep(1)
        a.publish("x.y", b"on its way")
        hub.kill("b")
        b.publish("x.y", b"unheard")
        await asyncio.sleep(1)
        assert not got
        await watching
        assert watched == [None]
        with pytest.raises(BrokerError):
            await b.flush()
        await b.aclose()
        _, again = await listener(hub)
        a.publish("x.y", b"1")
        await asyncio.sleep(1)
        assert again == [b"1"]

    simulation.run(main())


async def test_it_works_on_a_loop_in_real_time() -> None:
    hub = MemoryHub()
    a, b = await hub.connect("a"), await hub.connect("b")
    heard = asyncio.Event()
    await b.subscribe("x", lambda _: heard.set())
    a.publish("x", b"")
    await asyncio.wait_for(heard.wait(), 60)
    await a.aclose()
    await b.aclose()


def test_time_jumps_and_tasks_end_with_the_run() -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("cancelled")

    async def main() -> float:
        loop = asyncio.get_running_loop()
        asyncio.create_task(forever())  # noqa: RUF006
        began_s = loop.time()
        await asyncio.sleep(86_400)
        assert await asyncio.to_thread(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return loop.time() - began_s

    assert simulation.run(main()) == pytest.approx(86_400)
    assert ended == ["cancelled"]


def test_a_deadlock_is_an_error_that_names_who_waits() -> None:
    async def main() -> None:
        await asyncio.gather(asyncio.create_task(asyncio.Event().wait(), name="the one that waits"))

    with pytest.raises(simulation.DeadlockError, match="the one that waits") as caught:
        simulation.run(main())
    assert "the one that waits" in caught.value.waiting


def test_a_livelock_is_an_error() -> None:
    """Who does the same again and again without a pause is told apart from who does it with one."""
    pauses_s = [0.002] * 500 + [0.0] * 500

    async def main() -> None:
        while pauses_s:
            await asyncio.sleep(pauses_s.pop(0))

    with pytest.raises(simulation.LivelockError, match=r"livelock at 1\.000000 s: the loop has turned \d+ times"):
        simulation.run(main(), turns_at_once=200)
    assert 250 < len(pauses_s) < 400


def test_no_two_readings_of_the_simulated_wall_clock_are_the_same() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, simulation.SimulatedLoop)
        readings = [loop.wall_time() for _ in range(1000)]
        await asyncio.sleep(60)
        return [*readings, loop.wall_time()]

    readings = simulation.run(main())
    assert len({int(reading * 1e6) for reading in readings}) == len(readings)
    assert readings[-1] - readings[0] == pytest.approx(60)


def test_the_randomness_of_the_loop_is_the_seed() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, simulation.SimulatedLoop)
        return loop.random.random()

    assert simulation.run(main(), 3) == simulation.run(main(), 3) != simulation.run(main(), 4)
