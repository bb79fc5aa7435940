"""The channel under every fault its header speaks of, in virtual time; and over bytes that nobody meant to send."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from waiting import until

from nalar_mq import simulation
from nalar_mq.address import Address, Subjects
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.channel import Endpoint
from nalar_mq.config import BrokerAccess
from nalar_mq.errors import ValueTooLargeError
from nalar_mq.memory_transport import Faults, MemoryHub
from nalar_mq.messages import (
    WIRE_VERSION,
    Bye,
    Call,
    Cancel,
    Frame,
    Gone,
    Message,
    Resolve,
    encode_frame,
    encode_message,
    encode_packet,
)
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Transport

SUBJECTS = Subjects()


class Process:
    """One life of a process: an endpoint, and everything it was given."""

    def __init__(self, transport: Transport, me: Address, window_calls: int, subjects: Subjects = SUBJECTS) -> None:
        self.me = me
        self.transport = transport
        self.got: dict[Address, list[Message]] = {}
        self.lost: dict[Address, tuple[list[Message], list[Message]]] = {}
        self.settled: dict[Address, bool] = {}
        self.endpoint = Endpoint(
            transport, subjects, me, on_messages=self.on_messages, on_lost=self.on_lost, window_calls=window_calls
        )

    @classmethod
    async def start(cls, hub: MemoryHub, name: str, incarnation: int = 1, window_calls: int = 8192) -> Process:
        process = cls(await hub.connect(name), Address(name, incarnation), window_calls)
        await process.endpoint.start()
        return process

    def on_messages(self, sender: Address, messages: Sequence[Message]) -> None:
        self.got.setdefault(sender, []).extend(messages)

    def on_lost(self, address: Address, unsent: list[Message], unknown: list[Message], was_settled: bool) -> None:
        before = self.lost.setdefault(address, ([], []))
        before[0].extend(unsent)
        before[1].extend(unknown)
        self.settled[address] = was_settled

    def ids_from(self, sender: Address) -> list[int]:
        return [number_of(message) for message in self.got.get(sender, [])]

    def put(self, data: bytes, sender: str) -> None:
        """Bytes as they arrive from `sender`."""
        self.transport.publish(SUBJECTS.box(self.me.name, sender), data)


def call(number: int, size_bytes: int = 0) -> Call:
    return Call(number.to_bytes(16, "big"), "tool", "", b"x" * size_bytes)


def resolve(number: int, size_bytes: int = 0) -> Resolve:
    return Resolve(number.to_bytes(16, "big"), b"y" * size_bytes)


def number_of(message: Message) -> int:
    return int.from_bytes(message.id, "big")


def test_messages_of_one_turn_travel_in_one_frame_in_order():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        for number in range(800):
            a.endpoint.send(b.me, call(number) if number % 2 else resolve(number))
        assert await a.endpoint.drain(5)
        assert b.ids_from(a.me) == list(range(800))
        assert a.endpoint.stats.frames_sent == 4
        assert b.endpoint.stats.messages_received == 800
        assert a.endpoint.pending_calls(b.me) == 0
        assert a.endpoint.stats.frames_resent == 0

    simulation.run(main())


def test_frames_are_cut_at_their_size_and_large_messages_travel_alone():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        sizes = [10, 40_000, 40_000, 300_000, 10, 10]
        for number, size in enumerate(sizes):
            a.endpoint.send(b.me, resolve(number, size))
        assert await a.endpoint.drain(5)
        assert b.ids_from(a.me) == list(range(6))
        assert a.endpoint.stats.frames_sent == 4

    simulation.run(main())


def test_what_lingers_leaves_with_the_next_message_or_soon_alone_or_at_the_end():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        for number in (1, 2):
            a.endpoint.send(b.me, resolve(number), linger=True)
            await asyncio.sleep(0)
        assert not a.endpoint.stats.frames_sent
        a.endpoint.send(b.me, resolve(3))
        await asyncio.sleep(0)
        assert a.endpoint.stats.frames_sent == 1
        a.endpoint.send(b.me, resolve(4), linger=True)
        assert await a.endpoint.drain(0.2)
        assert a.endpoint.stats.frames_sent == 2
        a.endpoint.send(b.me, resolve(5), linger=True)
        await a.endpoint.aclose()
        await until(lambda: len(b.ids_from(a.me)) == 5)
        assert b.ids_from(a.me) == [1, 2, 3, 4, 5]

    simulation.run(main())


def test_a_message_larger_than_the_transport_carries_is_refused_at_send():
    async def main() -> None:
        hub = MemoryHub(max_payload=100_000)
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        with pytest.raises(ValueTooLargeError) as caught:
            a.endpoint.send(b.me, call(1, 100_000))
        assert caught.value.limit_bytes < 100_000 < caught.value.size_bytes
        a.endpoint.send(b.me, call(2, 98_000))
        assert await a.endpoint.drain(5)
        assert b.ids_from(a.me) == [2]

    simulation.run(main())


def test_the_window_holds_calls_back_and_nothing_else():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a", window_calls=2), await Process.start(hub, "b")
        hub.pause("b")
        for number in range(5):
            a.endpoint.send(b.me, call(number))
        a.endpoint.send(b.me, Cancel(call(9).id))
        await asyncio.sleep(0.1)
        assert a.endpoint.pending_calls(b.me) == 5
        assert not a.endpoint.withdraw(b.me, call(1).id), "it has left"
        assert a.endpoint.withdraw(b.me, call(3).id)
        assert not a.endpoint.withdraw(b.me, call(3).id)
        hub.resume("b")
        assert await a.endpoint.drain(5)
        assert b.ids_from(a.me) == [0, 1, 9, 2, 4]

    simulation.run(main())


def test_the_window_is_one_of_bytes_as_well():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        hub.pause("b")
        for number in range(40):
            a.endpoint.send(b.me, call(number, 500_000))
        a.endpoint.send(b.me, resolve(40))
        await asyncio.sleep(0.1)
        assert not a.endpoint.withdraw(b.me, call(16).id), "it has left"
        assert a.endpoint.withdraw(b.me, call(17).id), "8 MiB are out"
        hub.resume("b")
        assert await a.endpoint.drain(60)
        assert b.ids_from(a.me) == [*range(17), 40, *range(18, 40)]

    simulation.run(main())


def test_two_processes_that_flood_each_other_through_windows_of_one_go_on():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a", window_calls=1), await Process.start(hub, "b", window_calls=1)
        for number in range(500):
            a.endpoint.send(b.me, call(number))
            b.endpoint.send(a.me, call(number))
        assert await a.endpoint.drain(60)
        assert await b.endpoint.drain(60)
        assert a.ids_from(b.me) == b.ids_from(a.me) == list(range(500))

    simulation.run(main())


@pytest.mark.parametrize("kind", ["partition", "cut", "pause"])
def test_an_interruption_loses_nothing(kind: str):
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        a.endpoint.send(b.me, call(0))
        assert await a.endpoint.drain(1)
        {"partition": lambda: hub.partition("a", "b"), "cut": lambda: hub.cut("b"), "pause": lambda: hub.pause("b")}[kind]()
        for number in range(1, 5_000):
            a.endpoint.send(b.me, resolve(number, 100))
            if number % 500 == 0:
                await asyncio.sleep(0.5)
        {"partition": hub.heal, "cut": lambda: hub.restore("b"), "pause": lambda: hub.resume("b")}[kind]()
        assert await a.endpoint.drain(30)
        assert b.ids_from(a.me) == list(range(5_000))

    simulation.run(main())


def test_after_a_reconnect_frames_are_sent_again_at_once():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        hub.cut("b")
        for number in range(300):
            a.endpoint.send(b.me, resolve(number, 2_000))
        await asyncio.sleep(30)
        hub.cut("a")
        a.endpoint.send(b.me, call(300))
        await asyncio.sleep(1)
        hub.restore("b")
        hub.restore("a")
        assert await a.endpoint.drain(0.2)
        assert b.ids_from(a.me) == list(range(301))

    simulation.run(main())


def test_a_lost_incarnation_gives_back_what_was_not_acknowledged_once():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a", window_calls=3), await Process.start(hub, "b")
        a.endpoint.send(b.me, call(0))
        assert await a.endpoint.drain(1)
        hub.kill("b")
        for number in range(1, 6):
            a.endpoint.send(b.me, call(number))
        await asyncio.sleep(1)
        a.endpoint.send(b.me, resolve(6))
        a.endpoint.lose(b.me)
        unsent, unknown = a.lost[b.me]
        assert [number_of(message) for message in unknown] == [1, 2, 3]
        assert [number_of(message) for message in unsent] == [6, 4, 5]
        a.endpoint.lose(b.me)
        a.endpoint.send(b.me, call(7))
        await asyncio.sleep(0)
        assert [number_of(message) for message in unsent] == [6, 4, 5, 7]
        assert a.endpoint.pending_calls(b.me) == 0
        assert await a.endpoint.drain(0)

    simulation.run(main())


def test_who_was_never_written_to_is_lost_once():
    async def main() -> None:
        hub = MemoryHub()
        a, stranger = await Process.start(hub, "a"), Address("stranger", 7)
        a.endpoint.lose(stranger)
        assert a.lost[stranger] == ([], [])
        del a.lost[stranger]
        a.endpoint.lose(stranger)
        a.endpoint.lose(Address("stranger", 6))
        assert not a.lost

    simulation.run(main())


def test_a_successor_ends_the_channel_of_the_life_before():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b", 1)
        a.endpoint.send(b.me, call(0))
        assert await a.endpoint.drain(1)
        hub.kill("b")
        a.endpoint.send(b.me, call(1))
        successor = await Process.start(hub, "b", 2)
        await until(lambda: b.me in a.lost)
        assert a.lost[b.me] == ([], [call(1)])
        a.endpoint.send(b.me, call(2))
        a.endpoint.send(successor.me, call(3))
        assert await a.endpoint.drain(1)
        assert a.lost[b.me] == ([call(2)], [call(1)])
        assert successor.ids_from(a.me) == [3]
        assert successor.endpoint.stats.gone_sent == 1

    simulation.run(main())


def test_one_held_to_be_lost_hears_it_when_it_speaks_and_its_words_count_no_more():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        b.endpoint.send(a.me, call(0))
        assert await b.endpoint.drain(1)
        a.endpoint.lose(b.me)
        b.endpoint.send(a.me, call(1))
        await until(lambda: a.me in b.lost)
        assert b.lost[a.me] == ([], [call(1)])
        assert a.ids_from(b.me) == [0]

    simulation.run(main())


def test_an_answer_to_an_earlier_life_does_not_harm_the_present_one():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b", 2)
        b.endpoint.send(a.me, call(0))
        assert await b.endpoint.drain(1)
        b.put(encode_packet(Gone(WIRE_VERSION, a.me.incarnation, a.me.incarnation, 1)), "a")
        b.put(encode_packet(Gone(WIRE_VERSION, 9, 8, 2)), "a")
        await asyncio.sleep(0.1)
        assert not b.lost
        b.put(encode_packet(Gone(WIRE_VERSION, a.me.incarnation, a.me.incarnation, 2)), "a")
        await asyncio.sleep(0.1)
        assert a.me in b.lost

    simulation.run(main())


def test_what_was_not_read_before_a_bye_comes_back_as_if_it_had_never_left():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        a.endpoint.send(b.me, call(0))
        assert await a.endpoint.drain(1)
        b.endpoint.stop_reading()
        a.endpoint.send(b.me, call(1))
        await asyncio.sleep(0.1)
        b.endpoint.leave()
        a.endpoint.send(b.me, call(2))
        await asyncio.sleep(0.1)
        assert b.ids_from(a.me) == [0]
        assert a.lost[b.me] == ([call(1), call(2)], [])
        await b.endpoint.aclose()

    simulation.run(main())


def test_a_frame_for_a_successor_is_ignored_by_the_life_before():
    async def main() -> None:
        hub = MemoryHub()
        zombie, a = await Process.start(hub, "z", 1), await Process.start(hub, "a")
        successor = await Process.start(hub, "z", 2)
        a.endpoint.send(successor.me, call(1))
        assert await a.endpoint.drain(1)
        assert not zombie.got
        assert zombie.endpoint.stats.gone_sent == 0
        assert successor.ids_from(a.me) == [1]
        zombie.endpoint.send(a.me, call(2))
        await until(lambda: a.me in zombie.lost)
        assert zombie.me not in a.got
        assert successor.me not in a.lost
        a.endpoint.send(successor.me, call(3))
        assert await a.endpoint.drain(1)

    simulation.run(main())


def test_bye_ends_the_channel_at_once():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        b.endpoint.send(a.me, call(1))
        await b.endpoint.aclose()
        await b.endpoint.aclose()
        await until(lambda: b.me in a.lost)
        assert a.ids_from(b.me) == [1]
        b.endpoint.send(a.me, call(2))
        await asyncio.sleep(1)
        assert a.ids_from(b.me) == [1]

    simulation.run(main())


@pytest.mark.parametrize("is_read", [True, False])
def test_who_takes_leave_says_whether_all_was_read_that_it_had_sent(is_read: bool):
    async def main() -> None:
        hub = MemoryHub()
        a, b, c = await Process.start(hub, "a"), await Process.start(hub, "b"), await Process.start(hub, "c")
        b.endpoint.send(a.me, call(1))
        assert await b.endpoint.drain(1)
        if not is_read:
            hub.partition("b", "c")
        b.endpoint.send(c.me, call(2))
        assert await b.endpoint.drain(1) is is_read
        b.endpoint.leave()
        await until(lambda: b.me in a.lost)
        assert a.settled == {b.me: is_read}
        await b.endpoint.aclose()

    simulation.run(main())


def test_a_handler_that_raises_or_calls_back_harms_nobody():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        heard = []

        def on_messages(sender: Address, messages: Sequence[Message]) -> None:
            heard.extend(messages)
            if len(heard) == 1:
                raise RuntimeError("a bug above")
            if len(heard) == 2:
                b.endpoint.lose(sender)

        b.endpoint._on_messages = on_messages  # pyright: ignore[reportPrivateUsage]
        for number in range(2):
            a.endpoint.send(b.me, call(number))
            assert await a.endpoint.drain(1) or number == 1
        a.endpoint.send(b.me, call(2))
        await until(lambda: b.me in a.lost)
        assert [number_of(message) for message in heard] == [0, 1]

    simulation.run(main())


def test_a_frame_with_an_unreadable_message_delivers_the_others():
    async def main() -> None:
        hub = MemoryHub()
        b = await Process.start(hub, "b")
        parts = [encode_message(call(1)), b"\x92\xcc\xc8\x01", encode_message(call(2))]
        b.put(encode_frame(1, 1, 1, 0, parts), "a")
        await asyncio.sleep(0.1)
        assert b.ids_from(Address("a", 1)) == [1, 2]
        assert b.endpoint.stats.malformed == 1
        assert b.endpoint.stats.acks_sent == 1

    simulation.run(main())


def test_acknowledgements_of_what_was_never_sent_are_refused():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        a.endpoint.send(b.me, call(1))
        assert await a.endpoint.drain(1)
        for bad in (
            Frame(WIRE_VERSION, 1, 1, 2, 99, (call(8),)),
            Frame(WIRE_VERSION, 1, 1, -1, 1),
            Frame(WIRE_VERSION, 1, 1, 2, -1),
        ):
            b.put(encode_packet(bad), "a")
        b.put(encode_packet(Frame(WIRE_VERSION, 1, 1, 1, 7, (call(8),))), "stranger")
        b.put(encode_packet(Frame(WIRE_VERSION, 1, 1, 0, 0)), "stranger")
        await asyncio.sleep(0.1)
        assert b.endpoint.stats.malformed == 3
        assert b.endpoint.stats.stray == 2
        a.endpoint.send(b.me, call(2))
        assert await a.endpoint.drain(1)
        assert b.ids_from(a.me) == [1, 2]

    simulation.run(main())


def test_a_frame_that_comes_twice_is_acknowledged_twice_and_delivered_once():
    async def main() -> None:
        b = await Process.start(MemoryHub(), "b")
        frames = [encode_frame(1, 1, seq, 0, [encode_message(call(seq))]) for seq in (1, 2)]
        for number, data in enumerate([frames[0], frames[1], frames[0], frames[1]]):
            b.put(data, "a")
            await asyncio.sleep(0.1 if number < 2 else 0.001)
        assert b.endpoint.stats.duplicates == 2
        assert b.endpoint.stats.early == 0
        assert b.endpoint.stats.acks_sent == 4
        assert b.ids_from(Address("a", 1)) == [1, 2]

    simulation.run(main())


def test_many_lost_frames_are_made_up_for_without_a_time_out_each():
    async def main() -> None:
        hub = MemoryHub(faults=Faults(delay_s=(0.001, 0.001)))
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        hub.partition("a", "b")
        for number in range(1_000):
            a.endpoint.send(b.me, resolve(number, 60_000))
        await asyncio.sleep(0.1)
        hub.heal()
        assert await a.endpoint.drain(0.5)
        assert b.ids_from(a.me) == list(range(1_000))
        assert a.endpoint.stats.frames_resent == 1_000

    simulation.run(main())


def test_a_dead_neighbour_does_not_slow_the_others_down():
    async def main() -> None:
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        a.endpoint.send(Address("dead", 1), call(1))
        await asyncio.sleep(20.1)
        hub.partition("a", "b")
        a.endpoint.send(b.me, call(2))
        await asyncio.sleep(0.01)
        hub.heal()
        await until(lambda: b.ids_from(a.me) == [2], within_s=0.6)

    simulation.run(main())


async def test_a_loop_that_stood_still_looks_at_what_came_before_it_sends_again():
    hub = MemoryHub()
    a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
    a.endpoint.send(b.me, call(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.6)
    assert await a.endpoint.drain(10)
    assert a.endpoint.stats.frames_resent == 0
    await a.endpoint.aclose()
    await b.endpoint.aclose()


def test_a_process_can_send_to_itself():
    async def main() -> None:
        a = await Process.start(MemoryHub(), "a")
        for number in range(100):
            a.endpoint.send(a.me, call(number))
        assert await a.endpoint.drain(5)
        assert a.ids_from(a.me) == list(range(100))
        await a.endpoint.aclose()

    simulation.run(main())


def test_another_wire_version_is_counted():
    async def main() -> None:
        b = await Process.start(MemoryHub(), "b")
        b.put(encode_packet(Bye(WIRE_VERSION + 1, 1)), "a")
        await asyncio.sleep(0.1)
        assert b.endpoint.stats.unsupported == 1

    simulation.run(main())


def test_frames_far_ahead_are_not_kept():
    async def main() -> None:
        b = await Process.start(MemoryHub(), "b")
        for seq in range(2, 2_000):
            b.put(encode_frame(1, 1, seq, 0, [encode_message(call(seq))]), "a")
        await asyncio.sleep(0.1)
        assert b.endpoint.stats.early == 255
        assert b.endpoint.stats.overflowed == 1_998 - 255
        b.put(encode_frame(1, 1, 1, 0, [encode_message(call(1))]), "a")
        await asyncio.sleep(0.1)
        assert b.ids_from(Address("a", 1)) == list(range(1, 257))

    simulation.run(main())


class Schedule:
    """Two or three processes that talk under faults drawn from a seed, some of which restart; then quiet, then the count."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.lives: list[Process] = []
        self.sent: dict[tuple[Address, Address], list[int]] = {}
        self.withdrawn: dict[tuple[Address, Address], list[int]] = {}
        self.killed: set[Address] = set()
        self.numbers = 0

    async def run(self) -> None:
        chance = self.random
        faults = Faults(
            drop=chance.choice([0.0, 0.05, 0.3]),
            duplicate=chance.choice([0.0, 0.2]),
            reorder=chance.choice([0.0, 0.3]),
            delay_s=chance.choice([(0.0, 0.0), (0.001, 0.02), (0.0, 0.6)]),
        )
        self.hub = MemoryHub(self.seed, faults)
        names = ["a", "b", "c"][: chance.choice([2, 2, 3])]
        present = {name: await self.start(name, 1) for name in names}
        for _ in range(chance.randint(5, 30)):
            await self.step(present)
        self.hub.faults = None
        self.hub.heal()
        for name in names:
            self.hub.resume(name)
            self.hub.restore(name)
        await self.settle(list(present.values()))
        self.check()

    async def start(self, name: str, incarnation: int) -> Process:
        process = await Process.start(self.hub, name, incarnation, self.random.choice([1, 2, 8192]))
        self.lives.append(process)
        return process

    async def step(self, present: dict[str, Process]) -> None:
        chance = self.random
        names = list(present)
        one, other = chance.sample(names, 2)
        doing = chance.random()
        if doing < 0.7:
            self.talk(present[one], present[other])
        elif doing < 0.76:
            self.hub.partition(one, other)
        elif doing < 0.82:
            self.hub.heal()
        elif doing < 0.87:
            chance.choice([self.hub.cut, self.hub.restore, self.hub.pause, self.hub.resume])(one)
        elif doing < 0.90:
            self.killed.add(present[one].me)
            self.hub.kill(one)
            present[one] = await self.start(one, present[one].me.incarnation + 1)
        await asyncio.sleep(chance.choice([0.0, 0.001, 0.05, 0.7]))

    def talk(self, one: Process, other: Process) -> None:
        pair = (one.me, other.me)
        for _ in range(self.random.choice([1, 5, 150])):
            self.numbers += 1
            message = self.random.choice([call, resolve])(self.numbers, self.random.choice([0, 0, 10, 2_000]))
            one.endpoint.send(other.me, message)
            self.sent.setdefault(pair, []).append(self.numbers)
        if self.random.random() < 0.2:
            number = self.random.choice(self.sent[pair])
            if one.endpoint.withdraw(other.me, call(number).id):
                self.withdrawn.setdefault(pair, []).append(number)

    async def settle(self, present: list[Process]) -> None:
        for one in present:
            for other in present:
                if one is not other:
                    self.talk(one, other)
        for one in present:
            assert await one.endpoint.drain(120), f"seed {self.seed}: {one.me} does not settle"
        await asyncio.sleep(3)

    def check(self) -> None:
        by_address = {process.me: process for process in self.lives}
        for pair, sent in self.sent.items():
            one, other = by_address[pair[0]], by_address[pair[1]]
            got = other.ids_from(one.me)
            unsent, unknown = ([number_of(m) for m in part] for part in one.lost.get(other.me, ([], [])))
            back = self.withdrawn.get(pair, [])
            where = f"seed {self.seed}, {one.me} to {other.me}"
            assert len(set(got)) == len(got), f"{where}: doubled"
            assert not set(got) & (set(unsent) | set(back)), f"{where}: given back and delivered"
            assert len(unsent) + len(unknown) == len(set(unsent) | set(unknown)), f"{where}: given back twice"
            for kind in (Call, Resolve):
                order = [number_of(message) for message in other.got.get(one.me, []) if type(message) is kind]
                assert order == sorted(order), f"{where}: reordered"
            if one.me not in self.killed:
                assert set(sent) == set(got) | set(unsent) | set(unknown) | set(back), f"{where}: lost"
            if not {one.me, other.me} & self.killed:
                assert not unknown, f"{where}: given back between living incarnations"
                assert not unsent, f"{where}: given back between living incarnations"


@pytest.mark.parametrize("block", range(10))
def test_nothing_is_lost_doubled_or_reordered_under_seeded_faults(block: int):
    for seed in range(block * 120, (block + 1) * 120):
        simulation.run(Schedule(seed).run(), seed)


def test_a_schedule_replays_exactly():
    def trace(seed: int) -> list[object]:
        schedule = Schedule(seed)
        simulation.run(schedule.run(), seed)
        return [(process.me, process.endpoint.stats, process.lost) for process in schedule.lives]

    assert trace(77) == trace(77)


async def test_over_a_real_broker_both_sides_flood_each_other(broker_access: BrokerAccess, namespace: str) -> None:
    processes = await _real_pair(broker_access, namespace, window_calls=1_000)
    a, b = processes
    for number in range(20_000):
        a.endpoint.send(b.me, call(number, 50))
        b.endpoint.send(a.me, resolve(number))
        if number % 500 == 0:
            await asyncio.sleep(0)
    assert await a.endpoint.drain(30)
    assert await b.endpoint.drain(30)
    assert a.ids_from(b.me) == b.ids_from(a.me) == list(range(20_000))
    for process in processes:
        await process.endpoint.aclose()
        await process.transport.aclose()


async def test_a_broker_that_is_killed_under_way_costs_nothing(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path) as broker:
        a, b = await _real_pair(broker.access, "nalar")
        connected: asyncio.Queue[bool] = asyncio.Queue()
        a.transport.on_connection(connected.put_nowait)
        for number in range(5_000):
            a.endpoint.send(b.me, call(number, 100))
            b.endpoint.send(a.me, resolve(number))
            if number == 2_000:
                assert broker.pid is not None
                os.kill(broker.pid, signal.SIGKILL)
            if number % 100 == 0:
                await asyncio.sleep(0)
        while not await asyncio.wait_for(connected.get(), 30):
            a.endpoint.send(b.me, call(5_000))
        assert await a.endpoint.drain(30)
        assert await b.endpoint.drain(30)
        assert b.ids_from(a.me) == list(range(5_001))
        assert a.ids_from(b.me) == list(range(5_000))
        assert not a.lost
        assert not b.lost
        for process in (a, b):
            await process.endpoint.aclose()
            await process.transport.aclose()


async def _real_pair(access: BrokerAccess, namespace: str, window_calls: int = 8192) -> tuple[Process, Process]:
    made: list[Process] = []
    for name in ("a", "b"):
        transport = await NatsTransport.connect(access, name=name)
        process = Process(transport, Address(name, 1), window_calls, Subjects(namespace))
        await process.endpoint.start()
        made.append(process)
    return made[0], made[1]


def _mangle(chance: random.Random, packets: list[bytes]) -> bytes:
    data = bytearray(chance.choice(packets))
    kind = chance.random()
    if kind < 0.25:
        return chance.randbytes(chance.randint(0, 60))
    if kind < 0.45:
        return bytes(data[: chance.randint(0, len(data))])
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if kind < 0.6:
        position = chance.randrange(len(data))
        data[position:position] = chance.randbytes(chance.randint(1, 8))
    return bytes(data)


def test_a_hundred_thousand_malformed_packets_do_no_harm():
    async def main() -> None:
        chance = random.Random(5)
        hub = MemoryHub()
        a, b = await Process.start(hub, "a"), await Process.start(hub, "b")
        packets = [
            encode_frame(1, 1, 1, 0, [encode_message(call(1)), encode_message(resolve(2, 40))]),
            encode_packet(Frame(WIRE_VERSION, 1, 1, 0, 0)),
            encode_packet(Gone(WIRE_VERSION, 2, 1, 1)),
            encode_packet(Bye(WIRE_VERSION, 1)),
        ]
        subject = SUBJECTS.box("b", "stranger")
        for number in range(100_000):
            a.transport.publish(subject, _mangle(chance, packets))
            if number % 1_000 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(1)
        assert b.endpoint.stats.malformed > 20_000
        a.endpoint.send(b.me, call(7))
        assert await a.endpoint.drain(5)
        assert b.ids_from(a.me) == [7]

    simulation.run(main())
