"""Bytes that mean no good, on everything that a worker and a client listen to, over a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from nalar_mq.app import load_app
from nalar_mq.channel import ChannelStats
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import StateLostError, WireError
from nalar_mq.messages import (
    WIRE_VERSION,
    Bye,
    Call,
    CallRecord,
    Cancel,
    Chunk,
    Consume,
    Credit,
    Fail,
    Frame,
    Gone,
    Load,
    Look,
    Member,
    Place,
    Prioritise,
    Probe,
    Resolve,
    Seen,
    Want,
    decode_load,
    decode_look,
    decode_lost,
    decode_member,
    decode_packet,
    decode_place,
    decode_seen,
    encode_call_record,
    encode_message,
    encode_packet,
    encode_record,
    encode_seen,
    salvage_frame,
)
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.process import Process
from nalar_mq.transport import Delivered, KeyEntry
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "fire.py"
PACKETS = 100_000
REST = 20_000
BURST = 500
RECORDS = 150
UNREADABLE = KeyEntry("", b"", 0)


class Target:
    """A worker and a client of it; the client's calls show whether both are well."""

    def __init__(self, worker: Worker, client: Client, attacker: NatsTransport) -> None:
        self.worker = worker
        self.client = client
        self.attacker = attacker
        self.answered = 0

    @property
    def processes(self) -> list[Process]:
        return [self.worker.process, self.client.process]

    async def is_well(self) -> None:
        """The next good calls are served."""
        async with asyncio.timeout(60):
            assert await self.client.call("ping", 2) == 2
            total, _ = await self.client.options(session="kept").call("Tally.add", 1)
        self.answered += 1
        assert total == self.answered

    async def settle(self) -> None:
        """Returns when everything that was published has been heard."""
        await self.attacker.flush()
        for process in self.processes:
            await process.transport.flush()


@pytest.fixture
async def target(namespace: str, broker_access: BrokerAccess) -> AsyncIterator[Target]:
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    attacker = await NatsTransport.connect(broker_access, name="attacker")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(attacker.aclose)
        worker = await stack.enter_async_context(Worker(load_app(APP), settings, name="worker"))
        client = await stack.enter_async_context(connect(settings=settings, name="client-1"))
        await client.wait_for("ping")
        yield Target(worker, client, attacker)


def unreadable(data: bytes) -> bool:
    """True if nothing of a packet can be read."""
    try:
        salvage_frame(data)
    except WireError:
        try:
            decode_packet(data)
        except WireError:
            return True
    return False


def honest_packets(rng: random.Random, incarnation: int) -> list[bytes]:
    """Packets as somebody of another name might send them to a process of this incarnation."""
    id = rng.randbytes(16)
    messages = (
        Call(id, "square", "", b"\x92\x90\x80", deps=(rng.randbytes(16),), timeout_s=0.5),
        Call(rng.randbytes(16), "Tally", "add", rng.randbytes(9), session="theirs", number=1),
        Call(rng.randbytes(16), "who", "", rng.randbytes(3), init=rng.randbytes(5)),
        Resolve(id, rng.randbytes(20), ("worker",)),
        Fail(id, "builtins:ValueError", "no", rng.randbytes(6)),
        Cancel(id),
        Consume(id, "client-1", 7),
        Chunk(id, 1, rng.randbytes(4)),
        Credit(id, 2**40),
        Want(id),
        Probe(id, id, id, ("a/s",)),
        Prioritise(id, 2**62),
    )
    frames = [Frame(WIRE_VERSION, 5, incarnation, seq, 0, (message,)) for seq, message in enumerate(messages, 1)]
    others = [
        Frame(WIRE_VERSION, 5, incarnation, 2**62, 0, messages),
        Frame(WIRE_VERSION, 6, incarnation - 1, 1, 0),
        Frame(WIRE_VERSION + 1, 5, incarnation, 1, 0),
        Frame(WIRE_VERSION, -5, incarnation, -1, -1),
        Gone(WIRE_VERSION, 2**62, incarnation, 5),
        Gone(WIRE_VERSION, 5, 5, incarnation),
        Bye(WIRE_VERSION, -1),
    ]
    return [encode_packet(packet) for packet in [*frames, *others]]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four bytes changed, lost or added; or cut off; or twice."""
    changed = bytearray(data)
    match rng.randrange(6):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            return data + data
        case 2:
            return data + rng.randbytes(rng.randrange(1, 9))
        case _:
            for _ in range(rng.randrange(1, 5)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)


def hostile_packets(rng: random.Random, incarnation: int, max_payload: int) -> Iterator[tuple[str, bytes]]:
    """Senders and packets without end; what comes in the name of a living process is never readable."""
    honest = honest_packets(rng, incarnation)
    while True:
        kind = rng.random()
        if kind < 0.7:
            yield f"attacker{rng.randrange(50)}", mutated(rng, rng.choice(honest))
        elif kind < 0.999:
            data = rng.randbytes(rng.choice((0, 1, 2, 3, 10, 100)))
            yield rng.choice(("worker", "client-1", "x", "y" * 128)), data if unreadable(data) else b""
        else:
            yield "big", rng.choice((b"\x91", b"\xdd\xff\xff\xff\xff", b"\x00", rng.randbytes(1))) * (max_payload // 8)


def heard(stats: ChannelStats) -> int:
    return stats.malformed + stats.unsupported


async def test_a_hundred_thousand_hostile_packets(target: Target) -> None:
    rng = random.Random(20_261)
    subjects = target.worker.process.subjects
    sources = [(p, hostile_packets(rng, p.me.incarnation, target.attacker.max_payload)) for p in target.processes]
    unread = dict.fromkeys((p.name for p in target.processes), 0)
    await target.is_well()
    for start in range(0, PACKETS, BURST):
        for _ in range(BURST):
            process, source = rng.choice(sources)
            sender, data = next(source)
            unread[process.name] += unreadable(data)
            target.attacker.publish(subjects.box(process.name, sender), data)
        await target.settle()
        if start % 10_000 == 0:
            await target.is_well()
    await target.settle()
    await target.is_well()
    for process in target.processes:
        assert unread[process.name] > PACKETS / 5
        assert heard(process.endpoint.stats) >= unread[process.name], "a packet that made no sense was not counted"
        assert not process.replaced.done()
        assert not process.declared_lost.done()


async def test_calls_go_on_while_packets_rain(target: Target) -> None:
    rng = random.Random(5)
    subjects = target.worker.process.subjects
    sources = [(p, hostile_packets(rng, p.me.incarnation, target.attacker.max_payload)) for p in target.processes]
    calls = [target.client.call("flood", 3, 3) for _ in range(50)]
    for _ in range(40):
        for _ in range(100):
            process, source = rng.choice(sources)
            sender, data = next(source)
            target.attacker.publish(subjects.box(process.name, sender), data)
        await target.settle()
        calls.append(target.client.call("flood", 3, 3))
    async with asyncio.timeout(60):
        assert await asyncio.gather(*map(_value, calls)) == [9] * len(calls)
    await target.is_well()


async def _value(future: Any) -> Any:
    return await future


def test_hostile_packets_are_of_every_kind() -> None:
    rng = random.Random(1)
    source = hostile_packets(rng, 1000, 8_000)
    packets = [data for _, (_, data) in zip(range(20_000), source, strict=False)]
    assert 0.2 < sum(map(unreadable, packets)) / len(packets) < 0.95
    assert any(len(data) == 0 for data in packets)
    assert any(len(data) >= 1_000 for data in packets)
    assert any(b"\xc4" in data and not unreadable(data) for data in packets)
    assert encode_message(Cancel(b"i")) not in packets


def hostile_records(rng: random.Random, honest: bytes) -> list[bytes]:
    fixed = [b"", b"\xc1", b"\x90", b"\x91" * 5_000, honest[:-1], honest + b"\x00", b"\x00" * 100_000]
    return fixed + [mutated(rng, honest) if rng.random() < 0.7 else rng.randbytes(30) for _ in range(RECORDS)]


def is_readable(data: bytes) -> bool:
    for decode in (decode_member, decode_place, decode_lost, decode_load, decode_look, decode_seen):
        with contextlib.suppress(WireError):
            decode(data)
            return True
    return False


async def test_hostile_records_of_members(target: Target) -> None:
    rng = random.Random(7)
    bucket = await target.attacker.key_value(target.worker.process.subjects.members_bucket)
    await target.is_well()
    me = target.worker.process
    honest = encode_record(Member(WIRE_VERSION, 9, "n", "worker", 1, me.table.members["worker"].actors))
    written = 0
    for number, data in enumerate(hostile_records(rng, honest)):
        if not is_readable(data):
            written += 1
            await bucket.put(rng.choice(("worker", "client-1", "nobody", f"new{number}")), data)
    await bucket.put("not.a.token", encode_record(Member(WIRE_VERSION, 9, "n", "worker", 1, {})))
    await target.is_well()
    for process in target.processes:
        async with asyncio.timeout(60):
            while process.membership.unreadable < written / 2:  # a watch may skip what has been overwritten
                await asyncio.sleep(0.01)
        assert set(process.table.members) == {"worker", "client-1"}
    async with asyncio.timeout(60):  # both write their own records again
        while not all([is_readable((await bucket.get(name) or UNREADABLE).value or b"") for name in ("worker", "client-1")]):
            await asyncio.sleep(0.1)
    await target.is_well()


async def test_hostile_records_of_places(target: Target) -> None:
    rng = random.Random(8)
    bucket = await target.attacker.key_value(target.worker.process.subjects.places_bucket)
    await target.is_well()
    process = target.client.process
    honest = encode_record(Place(WIRE_VERSION, "worker", target.worker.process.me.incarnation))
    records = [data for data in hostile_records(rng, honest) if not is_readable(data)][:60]
    for number, data in enumerate(records):
        await bucket.put(process.places.key("Tally", f"s{number}", ""), data)
    async with asyncio.timeout(60):
        for number in range(len(records)):
            caller = target.client.options(session=f"s{number}")
            with pytest.raises(StateLostError):
                await caller.call("Tally.add", 1)
            assert (await caller.call("Tally.add", 1))[0] == 1
    assert process.places.unreadable >= len(records) - records.count(b"")
    await target.is_well()


async def test_hostile_reports_of_load(target: Target) -> None:
    rng = random.Random(10)
    subjects = target.worker.process.subjects
    incarnation = target.worker.process.me.incarnation
    honest = encode_record(Load(WIRE_VERSION, incarnation, 1, {"ping": (2**62, 2**62)}))
    unreadable = [data for data in hostile_records(rng, honest) if not is_readable(data)]
    for data in unreadable:
        target.attacker.publish(subjects.load(rng.choice(("worker", "client-1", "nobody"))), data)
    foreign = [("nobody", incarnation), ("worker", incarnation - 1), ("client-1", incarnation), ("w" * 128, 0)] * 50
    for name, life in foreign:
        target.attacker.publish(subjects.load(name), encode_record(Load(WIRE_VERSION, life, 2**60, {"ping": (2**62, -1)})))
    await target.settle()
    for process in target.processes:
        assert process.telemetry.unreadable == len(unreadable)
        assert process.telemetry.unused >= len(foreign)
    heard = target.client.process.telemetry.heard
    await target.is_well()
    await until(lambda: target.client.process.telemetry.heard != heard, "nobody reports any more")


async def test_hostile_questions_and_answers(target: Target) -> None:
    rng = random.Random(11)
    process = target.worker.process
    subjects, life = process.subjects, process.me.incarnation
    looks = hostile_records(rng, encode_record(Look(WIRE_VERSION, 1, True)))
    record = CallRecord(b"i" * 16, b"i" * 16, "a", "m", "s", "j", "o", 0, 0, float("nan"), float("inf"), -1.0)
    seen = encode_seen(Seen(WIRE_VERSION, 1, life, 1, True, 1.0, 2.0, 3, 4), [encode_call_record(record)])
    answers = hostile_records(rng, seen)
    unreadable = 0
    for data in looks:
        target.attacker.publish(subjects.look("worker", f"asker{rng.randrange(200)}"), data)
        unreadable += not is_readable(data)
    for data in answers:
        target.attacker.publish(subjects.seen("worker", rng.choice(("client-1", "nobody"))), data)
        unreadable += not is_readable(data)
    for number in range(500):
        target.attacker.publish(subjects.look("worker", f"asker{number}"), encode_record(Look(WIRE_VERSION, number, True)))
    target.attacker.publish(subjects.seen("worker", "client-1"), seen)
    await target.settle()
    await target.is_well()
    assert process.lookout.unreadable == unreadable
    assert process.lookout.refused > 0
    async with asyncio.timeout(60):
        while not await target.client.look():
            pass


async def test_an_answer_of_nonsense_to_a_question_is_shown_all_the_same(target: Target) -> None:
    """The attacker answers in the name of the worker, before it does."""
    process, me = target.worker.process, target.client.process.me
    nan, inf = float("nan"), float("inf")
    records = [
        CallRecord(id, parent, "a\x1b[2J", "+\n", "s", "j" * 9_000, "o", 2**63, -1, nan, inf, -inf, "\x00", "e" * 9_000)
        for id, parent in ((b"", b""), (b"x", b"y"), (b"y", b"x"), (b"long" * 99, b"x"))
    ]
    life = process.me.incarnation
    for question in range(1, 4):
        pieces = [
            encode_seen(
                Seen(WIRE_VERSION, question, life, piece, last, nan, -inf, -1, -1), list(map(encode_call_record, records))
            )
            for piece, last in ((2, True), (1, False), (1, True), (2, True))
        ]
        asked = asyncio.ensure_future(target.client.trace("s"))
        await asyncio.sleep(0)
        for piece in pieces:
            target.client.process.lookout._on_seen(Delivered(process.subjects.seen(me.name, "worker"), piece))
        assert str(await asked).replace("\n", "").isprintable()
    await target.is_well()


def subscribed(process: Process) -> set[str]:
    """The subjects that a process listens to, patterns as they are."""
    return {s.subject for s in process.transport.client._subs.values()}  # type: ignore[attr-defined]


async def test_rubbish_on_every_subject_that_is_listened_to(target: Target) -> None:
    """What the other tests single out, and all the rest: calls, cancellations, questions to the service."""
    rng = random.Random(12)
    subjects = target.worker.process.subjects
    patterns = sorted({subject for process in target.processes for subject in subscribed(process)})
    for expected in (subjects.box("worker", "*"), subjects.cancel("*"), subjects.call("square"), "$SRV.PING"):
        assert expected in patterns
    honest = [b'{"n": 3, "folder": "/nowhere"}', b'[3, "/nowhere", 0.5]', b"\x82\xa1n\x03\xa6folder\xa1/", b'{"seconds": "x"}']
    refused = 0

    def on_answer(message: Delivered) -> None:
        nonlocal refused
        refused += "Nats-Service-Error-Code" in (message.headers or {})

    await target.attacker.subscribe("attacker.answers", on_answer)
    for number in range(REST):
        subject = rng.choice(patterns)
        for _ in range(subject.count("*")):
            subject = subject.replace("*", rng.choice(("worker", "client-1", "x", f"y{number}")), 1)
        data = rng.choice((rng.randbytes(rng.randrange(40)), mutated(rng, rng.choice(honest)), b"\x91" * 2_000))
        headers = rng.choice((None, None, {"Nalar-Timeout-S": "x"}, {"Nalar-Session": "a b", "Nalar-Priority": "-"}))
        target.attacker.publish(subject, data, reply=rng.choice(("", "attacker.answers")), headers=headers)
        if number % BURST == 0:
            await target.settle()
    await target.settle()
    await target.is_well()
    await target.settle()
    assert refused > REST / 100
    assert set(target.client.process.table.members) == {"worker", "client-1"}


async def test_rubbish_on_the_connection_s_own_subjects(target: Target) -> None:
    """Answers to requests, and what watches are told: only the broker should know these subjects."""
    rng = random.Random(9)
    inboxes = [subject for process in target.processes for subject in subscribed(process) if ".inbox." in subject]
    assert len(inboxes) >= 4
    for number in range(3_000):
        subject = rng.choice(inboxes).replace("*", f"x{number}")
        reply = rng.choice(("", "x", "a.b.c.d.e.f.g.h.i", "9." * 8 + "9"))
        headers = rng.choice((None, {"Status": "100"}, {"Status": "x", "Nats-Last-Consumer": "y"}))
        target.attacker.publish(subject, rng.randbytes(rng.randrange(40)), reply=reply, headers=headers)
        if number % 100 == 0:
            await target.settle()
    await target.settle()
    await target.is_well()
    async with connect(settings=target.client.process.settings, name="client-late"):
        await until(lambda: all("client-late" in each.table.members for each in target.processes), "it is no member")
    await until(lambda: not any("client-late" in each.table.members for each in target.processes), "it is still a member")
