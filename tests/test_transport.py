"""What every transport promises, asked of each of them: `nalar_mq.transport` is the text, this is its proof."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import pytest

from nalar_mq.config import BrokerAccess
from nalar_mq.errors import BrokerError, KeyConflictError, ValueTooLargeError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import (
    Delivered,
    KeyEntry,
    KeyValue,
    Ledger,
    ServiceEndpoint,
    ServiceFailure,
    ServiceRequest,
    Transport,
    WorkQueue,
)

MakeTransport: TypeAlias = Callable[[], Awaitable[Transport]]
PATIENCE_S = 60.0


@pytest.fixture(params=["memory", "nats"])
async def make_transport(
    request: pytest.FixtureRequest, broker_access: BrokerAccess, namespace: str
) -> AsyncIterator[MakeTransport]:
    hub = MemoryHub(seed=1)
    made: list[Transport] = []

    async def make() -> Transport:
        name = f"{namespace}-{len(made)}"
        made.append(await (hub.connect(name) if request.param == "memory" else NatsTransport.connect(broker_access, name=name)))
        return made[-1]

    yield make
    for transport in made:
        await transport.aclose()


@pytest.fixture
async def transport(make_transport: MakeTransport) -> Transport:
    return await make_transport()


class Inbox:
    """A handler that keeps what it gets and can be waited for."""

    def __init__(self) -> None:
        self.messages: list[Delivered] = []
        self._grown = asyncio.Event()

    def __call__(self, message: Delivered) -> None:
        self.messages.append(message)
        self._grown.set()

    @property
    def data(self) -> list[bytes]:
        return [message.data for message in self.messages]

    async def wait(self, count: int) -> list[Delivered]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.messages) < count:
                self._grown.clear()
                await self._grown.wait()
        return self.messages


async def settle(*transports: Transport) -> None:
    """Returns when whatever was published before has been delivered, if it ever will be."""
    for transport in transports:
        await transport.flush()
    for transport in transports:
        await transport.flush()
    for _ in range(3):
        await asyncio.sleep(0)


# Messages


async def test_message_arrives_as_it_was_sent(transport: Transport, namespace: str) -> None:
    inbox = Inbox()
    await transport.subscribe(f"{namespace}.a.*", inbox)
    transport.publish(
        f"{namespace}.a.b", b"\x00\r\nPUB x 0\r\n", reply=f"{namespace}.reply", headers={"One": "1", "Two": "zwei ß"}
    )
    [message] = await inbox.wait(1)
    assert message.subject == f"{namespace}.a.b"
    assert message.data == b"\x00\r\nPUB x 0\r\n"
    assert message.reply == f"{namespace}.reply"
    assert dict(message.headers or {}) == {"One": "1", "Two": "zwei ß"}


async def test_empty_message_has_no_headers_and_no_reply(transport: Transport, namespace: str) -> None:
    inbox = Inbox()
    await transport.subscribe(f"{namespace}.a", inbox)
    transport.publish(f"{namespace}.a", b"")
    [message] = await inbox.wait(1)
    assert (message.data, message.reply, message.headers) == (b"", "", None)


async def test_order_holds_per_publisher_and_subject(make_transport: MakeTransport, namespace: str) -> None:
    sender, receiver = await make_transport(), await make_transport()
    inbox = Inbox()
    await receiver.subscribe(f"{namespace}.>", inbox)
    for number in range(3000):
        sender.publish(f"{namespace}.{number % 3}", b"%d" % number)
        if number % 700 == 0:
            await asyncio.sleep(0)
    await inbox.wait(3000)
    assert inbox.data == [b"%d" % number for number in range(3000)]


async def test_requests_and_publications_keep_one_order(make_transport: MakeTransport, namespace: str) -> None:
    sender, receiver = await make_transport(), await make_transport()
    inbox = Inbox()

    def answer(message: Delivered) -> None:
        inbox(message)
        if message.reply:
            receiver.publish(message.reply, b"")

    await receiver.subscribe(f"{namespace}.a", answer)
    for number in range(50):
        sender.publish(f"{namespace}.a", b"%d" % number)
    await sender.request(f"{namespace}.a", b"request", timeout_s=PATIENCE_S)
    assert inbox.data == [*(b"%d" % number for number in range(50)), b"request"]


async def test_publish_is_taken_up_after_flush(make_transport: MakeTransport, namespace: str) -> None:
    sender, receiver = await make_transport(), await make_transport()
    inbox = Inbox()
    await receiver.subscribe(f"{namespace}.a", inbox)
    sender.publish(f"{namespace}.a", b"x")
    await settle(sender, receiver)
    assert inbox.data == [b"x"]


async def test_subscription_is_known_to_the_broker_when_it_returns(make_transport: MakeTransport, namespace: str) -> None:
    sender, receiver = await make_transport(), await make_transport()
    for number in range(20):
        inbox = Inbox()
        await receiver.subscribe(f"{namespace}.{number}", inbox)
        sender.publish(f"{namespace}.{number}", b"x")
        await inbox.wait(1)


async def test_handler_that_raises_harms_nobody(transport: Transport, namespace: str) -> None:
    good, calls = Inbox(), Inbox()

    def bad(message: Delivered) -> None:
        calls(message)
        raise RuntimeError("on purpose")

    await transport.subscribe(f"{namespace}.a", bad)
    await transport.subscribe(f"{namespace}.a", good)
    for number in range(3):
        transport.publish(f"{namespace}.a", b"%d" % number)
    await good.wait(3)
    await calls.wait(3)
    assert transport.is_connected


async def test_handlers_may_publish_and_subscribers_may_be_many(transport: Transport, namespace: str) -> None:
    inboxes = [Inbox() for _ in range(3)]
    for inbox in inboxes:
        await transport.subscribe(f"{namespace}.out", inbox)
    await transport.subscribe(f"{namespace}.in", lambda message: transport.publish(f"{namespace}.out", message.data))
    transport.publish(f"{namespace}.in", b"x")
    for inbox in inboxes:
        await inbox.wait(1)


async def test_queue_gives_each_message_to_one_member(make_transport: MakeTransport, namespace: str) -> None:
    members, sender, inboxes = [await make_transport() for _ in range(3)], await make_transport(), [Inbox() for _ in range(3)]
    for member, inbox in zip(members, inboxes, strict=True):
        await member.subscribe(f"{namespace}.a", inbox, queue="q")
    for number in range(300):
        sender.publish(f"{namespace}.a", b"%d" % number)
    await settle(sender, *members)
    assert sorted(int(data) for inbox in inboxes for data in inbox.data) == list(range(300))
    assert all(inbox.messages for inbox in inboxes)


async def test_no_handler_call_begins_after_unsubscribe(transport: Transport, namespace: str) -> None:
    inbox = Inbox()
    subscription = await transport.subscribe(f"{namespace}.a", inbox)
    for _ in range(10):
        transport.publish(f"{namespace}.a", b"x")
    await subscription.unsubscribe()
    had = len(inbox.messages)
    await subscription.unsubscribe()
    transport.publish(f"{namespace}.a", b"x")
    await settle(transport)
    assert len(inbox.messages) == had


async def test_subscription_may_end_itself(transport: Transport, namespace: str) -> None:
    inbox = Inbox()
    ended: list[asyncio.Task[None]] = []

    def end(message: Delivered) -> None:
        inbox(message)
        ended.append(asyncio.create_task(subscription.unsubscribe()))

    subscription = await transport.subscribe(f"{namespace}.a", end)
    transport.publish(f"{namespace}.a", b"x")
    await inbox.wait(1)
    await asyncio.gather(*ended)
    transport.publish(f"{namespace}.a", b"y")
    await settle(transport)
    assert inbox.data == [b"x"]


async def test_largest_message_travels_and_one_byte_more_is_refused(transport: Transport, namespace: str) -> None:
    inbox = Inbox()
    await transport.subscribe(f"{namespace}.a", inbox)
    transport.publish(f"{namespace}.a", b"x" * transport.max_payload)
    with pytest.raises(ValueTooLargeError) as caught:
        transport.publish(f"{namespace}.a", b"x" * (transport.max_payload + 1))
    assert caught.value.size_bytes == transport.max_payload + 1
    assert caught.value.limit_bytes == transport.max_payload
    transport.publish(f"{namespace}.a", b"after")
    await inbox.wait(2)
    assert [len(data) for data in inbox.data] == [transport.max_payload, 5]


async def test_headers_count_against_the_limit(transport: Transport, namespace: str) -> None:
    with pytest.raises(ValueTooLargeError):
        transport.publish(f"{namespace}.a", b"x" * transport.max_payload, headers={"One": "1"})
    await transport.flush()
    assert transport.is_connected


# Requests


async def test_request_gets_its_answer(transport: Transport, namespace: str) -> None:
    await transport.subscribe(f"{namespace}.a", lambda message: transport.publish(message.reply, message.data[::-1]))
    answers = await asyncio.gather(
        *(transport.request(f"{namespace}.a", b"%d!" % number, timeout_s=PATIENCE_S) for number in range(50))
    )
    assert [answer.data for answer in answers] == [(b"%d!" % number)[::-1] for number in range(50)]


async def test_request_without_responder_fails_at_once(transport: Transport, namespace: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(BrokerError):
            await transport.request(f"{namespace}.nobody", b"", timeout_s=10 * PATIENCE_S)


async def test_request_without_answer_fails_when_time_is_up(transport: Transport, namespace: str) -> None:
    await transport.subscribe(f"{namespace}.silent", Inbox())
    with pytest.raises(BrokerError):
        await transport.request(f"{namespace}.silent", b"", timeout_s=0.05)
    await transport.flush()


# Keys and values


@pytest.fixture
async def bucket(transport: Transport, namespace: str) -> KeyValue:
    return await transport.key_value(namespace)


async def test_key_lives_through_its_operations(bucket: KeyValue) -> None:
    assert await bucket.get("k") is None
    first = await bucket.create("k", b"1")
    second = await bucket.update("k", b"2", first)
    third = await bucket.put("k", b"3")
    assert first < second < third
    assert await bucket.get("k") == KeyEntry("k", b"3", third)
    await bucket.delete("k")
    assert await bucket.get("k") is None


async def test_a_claim_is_of_who_comes_first_and_others_are_told_what_is_there(bucket: KeyValue) -> None:
    claims = await asyncio.gather(*(bucket.claim("k", b"%d" % number) for number in range(20)))
    (winner,) = [number for number, present in enumerate(claims) if present is None]
    entry = await bucket.get("k")
    assert entry is not None
    assert entry.value == b"%d" % winner
    assert all(present == entry for number, present in enumerate(claims) if number != winner)
    await bucket.delete("k")
    assert await bucket.claim("k", b"again") is None
    after = await bucket.claim("k", b"late")
    assert after is not None
    assert (after.value, after.revision > entry.revision) == (b"again", True)


async def test_create_refuses_a_key_that_exists_and_takes_a_deleted_one(bucket: KeyValue) -> None:
    first = await bucket.create("k", b"1")
    with pytest.raises(KeyConflictError) as caught:
        await bucket.create("k", b"2")
    assert caught.value.key == "k"
    await bucket.delete("k")
    assert await bucket.create("k", b"3") > first


async def test_compare_and_set_refuses_every_other_revision(bucket: KeyValue) -> None:
    first = await bucket.create("k", b"1")
    second = await bucket.update("k", b"2", first)
    for stale in (first, second + 1):
        with pytest.raises(KeyConflictError):
            await bucket.update("k", b"x", stale)
        with pytest.raises(KeyConflictError):
            await bucket.delete("k", stale)
    assert await bucket.get("k") == KeyEntry("k", b"2", second)
    await bucket.delete("k", second)
    with pytest.raises(KeyConflictError):
        await bucket.update("k", b"x", second)


async def test_one_of_many_wins_a_compare_and_set(make_transport: MakeTransport, namespace: str) -> None:
    buckets = [await (await make_transport()).key_value(namespace) for _ in range(4)]
    results = await asyncio.gather(
        *(bucket.create("leader", b"%d" % number) for number, bucket in enumerate(buckets)), return_exceptions=True
    )
    won = [number for number, result in enumerate(results) if isinstance(result, int)]
    assert len(won) == 1
    assert all(isinstance(result, int | KeyConflictError) for result in results)
    entry = await buckets[0].get("leader")
    assert entry is not None
    assert entry.value == b"%d" % won[0]


async def test_empty_value_is_a_value(bucket: KeyValue) -> None:
    revision = await bucket.put("k", b"")
    assert await bucket.get("k") == KeyEntry("k", b"", revision)
    assert await bucket.entries() == [KeyEntry("k", b"", revision)]


async def test_entries_are_the_present_ones(bucket: KeyValue) -> None:
    assert await bucket.entries() == []
    for number in range(300):
        await bucket.put(f"k.{number % 100}", b"%d" % number)
    await bucket.delete("k.7")
    entries = {entry.key: entry.value for entry in await bucket.entries()}
    assert entries == {f"k.{number % 100}": b"%d" % number for number in range(200, 300) if number != 207}


async def test_too_large_a_value_is_refused_as_such(transport: Transport, bucket: KeyValue) -> None:
    with pytest.raises(ValueTooLargeError):
        await bucket.put("k", b"x" * (transport.max_payload + 1))
    assert await bucket.get("k") is None


async def test_entries_expire_unless_they_are_renewed(transport: Transport, namespace: str) -> None:
    bucket = await transport.key_value(namespace, ttl_s=2.5)
    first = await bucket.create("k", b"1")
    await bucket.create("dies", b"1")
    renewed = first
    async with asyncio.timeout(PATIENCE_S):
        while await bucket.get("dies") is not None:
            renewed = await bucket.update("k", b"1", renewed)
            await asyncio.sleep(0.05)
        assert await bucket.get("k") == KeyEntry("k", b"1", renewed)
        while await bucket.get("k") is not None:
            await asyncio.sleep(0.05)
    with pytest.raises(KeyConflictError):
        await bucket.update("k", b"stale", renewed)
    assert await bucket.create("k", b"2") > renewed


async def test_bucket_that_exists_is_used_as_it_is(make_transport: MakeTransport, namespace: str) -> None:
    one = await (await make_transport()).key_value(namespace, ttl_s=60.0)
    await one.put("k", b"1")
    other = await (await make_transport()).key_value(namespace)
    assert (await other.entries())[0].value == b"1"


async def test_two_may_make_one_bucket_at_once(make_transport: MakeTransport, namespace: str) -> None:
    transports = [await make_transport() for _ in range(3)]
    buckets = await asyncio.gather(
        *(transport.key_value(namespace, ttl_s=30.0 + number) for number, transport in enumerate(transports))
    )
    await buckets[0].put("k", b"1")
    assert [entry.value for bucket in buckets for entry in await bucket.entries()] == [b"1"] * 3


async def taken(watch: AsyncIterator[KeyEntry | None], count: int) -> list[tuple[str, bytes | None] | None]:
    found: list[tuple[str, bytes | None] | None] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            entry = await anext(watch)
            found.append(None if entry is None else (entry.key, entry.value))
    return found


async def test_watch_gives_what_is_there_then_none_then_changes(bucket: KeyValue) -> None:
    await bucket.put("a", b"old")
    await bucket.put("b", b"1")
    await bucket.put("a", b"2")
    await bucket.put("gone", b"x")
    await bucket.delete("gone")
    watch: Any = bucket.watch()
    async with contextlib.aclosing(watch):
        present = await taken(watch, 3)
        assert sorted(present[:2], key=str) == [("a", b"2"), ("b", b"1")]
        assert present[2] is None
        await bucket.put("c", b"3")
        await bucket.delete("b")
        await bucket.create("b", b"4")
        assert await taken(watch, 3) == [("c", b"3"), ("b", None), ("b", b"4")]


async def test_watch_of_an_empty_bucket_says_so_first(bucket: KeyValue) -> None:
    watch: Any = bucket.watch()
    async with contextlib.aclosing(watch):
        assert await taken(watch, 1) == [None]
        await bucket.put("a", b"1")
        assert await taken(watch, 1) == [("a", b"1")]


async def test_watch_misses_nothing_of_a_storm(make_transport: MakeTransport, namespace: str) -> None:
    writer = await (await make_transport()).key_value(namespace)
    watched = await (await make_transport()).key_value(namespace)
    for number in range(50):
        await writer.put(f"before-{number}", b"")
    watch: Any = watched.watch()
    async with contextlib.aclosing(watch):
        storm = asyncio.gather(*(writer.put(f"during-{number}", b"") for number in range(200)))
        seen: set[str] = set()
        nones = 0
        async with asyncio.timeout(PATIENCE_S):
            while len(seen) < 250 or not nones:
                entry = await anext(watch)
                nones += entry is None
                seen |= {entry.key} if entry is not None else set()
        await storm
    assert nones == 1
    assert seen == {f"before-{number}" for number in range(50)} | {f"during-{number}" for number in range(200)}


# Work queues


@pytest.fixture
async def queue(transport: Transport, namespace: str) -> WorkQueue:
    return await transport.work_queue(namespace, [f"{namespace}.jobs.*"])


async def test_queue_keeps_messages_until_they_are_acknowledged(queue: WorkQueue, namespace: str) -> None:
    sequence, was_there = await queue.publish(f"{namespace}.jobs.a", b"1", headers={"One": "1"})
    assert not was_there
    assert await queue.depth() == 1
    [message] = await queue.pull(f"{namespace}.jobs.*", batch=5, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    assert (message.subject, message.data, message.sequence) == (f"{namespace}.jobs.a", b"1", sequence)
    assert message.headers["One"] == "1"
    assert message.deliveries == 1
    assert await queue.depth() == 1
    await message.ack()
    assert await queue.depth() == 0
    assert await queue.pull(f"{namespace}.jobs.*", batch=5, timeout_s=0.05, ack_wait_s=30.0) == []


async def test_queue_knows_doubles_by_their_id(queue: WorkQueue, namespace: str) -> None:
    first = await queue.publish(f"{namespace}.jobs.a", b"1", message_id="m")
    second = await queue.publish(f"{namespace}.jobs.a", b"2", message_id="m")
    assert second == (first[0], True)
    assert await queue.depth() == 1


async def test_returned_message_comes_again_and_ended_one_does_not(queue: WorkQueue, namespace: str) -> None:
    await queue.publish(f"{namespace}.jobs.a", b"1")
    [message] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    await message.nak()
    [again] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    assert (again.data, again.deliveries) == (b"1", 2)
    await again.term("poison")
    assert await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=0.05, ack_wait_s=30.0) == []
    assert await queue.depth() == 0


async def test_delayed_return_waits(queue: WorkQueue, namespace: str) -> None:
    await queue.publish(f"{namespace}.jobs.a", b"1")
    [message] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    await message.nak(1.0)
    assert await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=0.0, ack_wait_s=30.0) == []
    [again] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    await again.ack()


async def test_silent_holder_loses_the_message_and_a_busy_one_keeps_it(queue: WorkQueue, namespace: str) -> None:
    await queue.publish(f"{namespace}.jobs.a", b"1")
    [held] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=2.5)
    for _ in range(14):
        assert await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=0.2, ack_wait_s=2.5) == []
        await held.in_progress()
    [again] = await queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=2.5)
    assert again.deliveries == 2


async def test_waiting_pull_returns_when_something_comes(queue: WorkQueue, namespace: str) -> None:
    pull = asyncio.create_task(queue.pull(f"{namespace}.jobs.*", batch=10, timeout_s=PATIENCE_S, ack_wait_s=30.0))
    await queue.depth()
    await queue.publish(f"{namespace}.jobs.a", b"1")
    async with asyncio.timeout(PATIENCE_S / 2):
        assert [message.data for message in await pull] == [b"1"]


async def test_consumers_share_the_queue(make_transport: MakeTransport, namespace: str) -> None:
    queues = [await (await make_transport()).work_queue(namespace, [f"{namespace}.jobs.*"]) for _ in range(3)]
    for number in range(60):
        await queues[0].publish(f"{namespace}.jobs.{number}", b"%d" % number)

    async def work(queue: WorkQueue) -> list[bytes]:
        done: list[bytes] = []
        while await queue.depth():
            for message in await queue.pull(f"{namespace}.jobs.*", batch=7, timeout_s=0.2, ack_wait_s=30.0):
                done.append(message.data)
                await message.ack()
        return done

    async with asyncio.timeout(PATIENCE_S):
        done = [data for share in await asyncio.gather(*(work(queue) for queue in queues)) for data in share]
    assert sorted(map(int, done)) == list(range(60))


async def test_cancelled_pull_loses_nothing(queue: WorkQueue, namespace: str) -> None:
    for number in range(10):
        pull = asyncio.create_task(queue.pull(f"{namespace}.jobs.*", batch=1, timeout_s=PATIENCE_S, ack_wait_s=2.0))
        await queue.depth()
        await queue.publish(f"{namespace}.jobs.a", b"%d" % number)
        pull.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            for message in await pull:
                await message.nak()
    got: set[int] = set()
    async with asyncio.timeout(PATIENCE_S):
        while await queue.depth():
            for message in await queue.pull(f"{namespace}.jobs.*", batch=10, timeout_s=1.0, ack_wait_s=2.0):
                got.add(int(message.data))
                await message.ack()
    assert got == set(range(10))


async def test_queue_refuses_a_subject_it_does_not_cover(queue: WorkQueue, namespace: str) -> None:
    with pytest.raises(BrokerError):
        await queue.publish(f"{namespace}.elsewhere", b"1")


async def test_queue_shows_what_it_holds_and_nobody_loses_a_turn(queue: WorkQueue, namespace: str) -> None:
    for number in range(5):
        await queue.publish(f"{namespace}.jobs.{'ab'[number % 2]}", b"%d" % number, headers={"N": str(number)})
    assert await queue.subjects() == {f"{namespace}.jobs.a": 3, f"{namespace}.jobs.b": 2}
    seen = await queue.read(f"{namespace}.jobs.a")
    assert [(kept.data, kept.headers) for kept in seen] == [(b"0", {"N": "0"}), (b"2", {"N": "2"}), (b"4", {"N": "4"})]
    assert [kept.data for kept in await queue.read(f"{namespace}.jobs.a", after=seen[0].sequence, limit=1)] == [b"2"]
    pulled = await queue.pull(f"{namespace}.jobs.a", batch=5, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    assert [message.sequence for message in pulled] == [kept.sequence for kept in seen]


async def test_queue_gives_nobody_what_was_removed(queue: WorkQueue, namespace: str) -> None:
    subject = f"{namespace}.jobs.a"
    waiting, in_hand, done = [(await queue.publish(subject, b"%d" % number))[0] for number in range(3)]
    pulled = {
        message.sequence: message for message in await queue.pull(subject, batch=3, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    }
    await pulled[waiting].nak()
    await pulled[done].ack()
    assert [await queue.holds(sequence) for sequence in (waiting, in_hand, done, done + 1)] == [True, True, False, False]
    assert [await queue.remove(sequence) for sequence in (waiting, in_hand, done, done + 1)] == [True, True, False, False]
    assert [await queue.holds(sequence) for sequence in (waiting, in_hand)] == [False, False]
    await pulled[in_hand].nak()
    last, _ = await queue.publish(subject, b"last")
    [message] = await queue.pull(subject, batch=3, timeout_s=PATIENCE_S, ack_wait_s=30.0)
    assert message.sequence == last
    assert await queue.pull(subject, batch=3, timeout_s=0.05, ack_wait_s=30.0) == []
    await pulled[in_hand].ack()
    assert await queue.depth() == 1


# Ledgers


@pytest.fixture
async def ledger(transport: Transport, namespace: str) -> Ledger:
    return await transport.ledger(namespace, [f"{namespace}.kept.*"])


async def test_ledger_keeps_what_is_appended_in_order(ledger: Ledger, namespace: str) -> None:
    subject = f"{namespace}.kept.a"
    assert await ledger.last(subject) is None
    assert await ledger.read(f"{namespace}.kept.*") == []
    sequences = [await ledger.append(subject, b"%d" % number, headers={"N": str(number)}) for number in range(10)]
    other = await ledger.append(f"{namespace}.kept.b", b"")
    assert sequences == sorted(sequences)
    newest = await ledger.last(subject)
    assert newest is not None
    assert (newest.data, newest.sequence, newest.headers["N"]) == (b"9", sequences[-1], "9")
    found, after = [], 0
    while page := await ledger.read(f"{namespace}.kept.*", after=after, limit=4):
        found += page
        after = page[-1].sequence
    assert [kept.sequence for kept in found] == [*sequences, other]
    assert [(kept.data, kept.headers) for kept in found] == [(b"%d" % n, {"N": str(n)}) for n in range(10)] + [(b"", {})]
    assert await ledger.remove(sequences[3])
    assert not await ledger.remove(sequences[3])
    assert not await ledger.remove(999_999)
    assert [kept.sequence for kept in await ledger.read(subject)] == [*sequences[:3], *sequences[4:]]
    await ledger.purge(subject)
    assert [kept.sequence for kept in await ledger.read(f"{namespace}.kept.*")] == [other]
    assert await ledger.last(subject) is None


async def test_one_of_many_appends_behind_the_same_message(make_transport: MakeTransport, namespace: str) -> None:
    ledgers = [await (await make_transport()).ledger(namespace, [f"{namespace}.kept.*"]) for _ in range(4)]
    subject = f"{namespace}.kept.a"
    await ledgers[0].append(f"{namespace}.kept.b", b"of no matter to the other subject")
    last = 0
    for _ in range(3):
        results = await asyncio.gather(*(ledger.append(subject, b"x", last=last) for ledger in ledgers), return_exceptions=True)
        assert sum(isinstance(result, KeyConflictError) for result in results) == 3
        [last] = [result for result in results if isinstance(result, int)]


async def test_ledger_tells_its_listeners_at_once(transport: Transport, ledger: Ledger, namespace: str) -> None:
    inbox = Inbox()
    await transport.subscribe(f"{namespace}.kept.a", inbox)
    await ledger.append(f"{namespace}.kept.a", b"1", last=0)
    await inbox.wait(1)
    assert inbox.messages[0].data == b"1"


async def test_ledger_forgets_by_number_and_by_age(transport: Transport, namespace: str) -> None:
    newest = await transport.ledger(f"{namespace}-one", [f"{namespace}.one.*"], per_subject=1)
    await newest.append(f"{namespace}.one.a", b"1")
    await newest.append(f"{namespace}.one.a", b"2")
    assert [kept.data for kept in await newest.read(f"{namespace}.one.*")] == [b"2"]
    young = await transport.ledger(f"{namespace}-young", [f"{namespace}.young.*"], max_age_s=1.0)
    await young.append(f"{namespace}.young.a", b"1")
    async with asyncio.timeout(PATIENCE_S):
        while await young.last(f"{namespace}.young.a") is not None:
            await asyncio.sleep(0.05)
    assert await young.append(f"{namespace}.young.a", b"2", last=0) > 0


async def test_ledger_refuses_what_it_does_not_cover_or_cannot_hold(
    ledger: Ledger, transport: Transport, namespace: str
) -> None:
    with pytest.raises(BrokerError):
        await ledger.append(f"{namespace}.elsewhere", b"1")
    with pytest.raises(ValueTooLargeError):
        await ledger.append(f"{namespace}.kept.a", bytes(transport.max_payload + 1))


# Objects


async def test_object_comes_back_as_it_was(transport: Transport, namespace: str) -> None:
    store = await transport.object_store(namespace)
    large = bytes(range(256)) * 4096 * 3
    assert await store.get("a b/ß") is None
    await store.put("a b/ß", large)
    assert await store.get("a b/ß") == large
    await store.put("a b/ß", b"")
    assert await store.get("a b/ß") == b""
    await store.delete("a b/ß")
    await store.delete("a b/ß")
    assert await store.get("a b/ß") is None


# Services


async def serve_echo(transport: Transport, namespace: str) -> Any:
    async def echo(request: ServiceRequest) -> bytes:
        if request.data == b"refuse":
            raise ServiceFailure(404, "no such\r\nthing")
        if request.data == b"break":
            raise RuntimeError("broken")
        return request.data

    endpoint = ServiceEndpoint("echo", f"{namespace}.echo", echo, {"kind": "test"})
    return await transport.serve(f"{namespace}-echo", [endpoint], version="1.2.3", description="says it again")


async def test_service_answers_and_names_its_failures(make_transport: MakeTransport, namespace: str) -> None:
    server, client = await make_transport(), await make_transport()
    await serve_echo(server, namespace)
    answer = await client.request(f"{namespace}.echo", b"hello", timeout_s=PATIENCE_S)
    assert (answer.data, answer.headers) == (b"hello", None)
    refusal = await client.request(f"{namespace}.echo", b"refuse", timeout_s=PATIENCE_S)
    assert (refusal.headers or {})["Nats-Service-Error-Code"] == "404"
    assert "no such" in (refusal.headers or {})["Nats-Service-Error"]
    broken = await client.request(f"{namespace}.echo", b"break", timeout_s=PATIENCE_S)
    assert dict(broken.headers or {}) == {"Nats-Service-Error": "broken", "Nats-Service-Error-Code": "500"}


async def test_service_is_found_inspected_and_counted(make_transport: MakeTransport, namespace: str) -> None:
    server, client = await make_transport(), await make_transport()
    await serve_echo(server, namespace)
    await client.request(f"{namespace}.echo", b"hello", timeout_s=PATIENCE_S)
    await client.request(f"{namespace}.echo", b"break", timeout_s=PATIENCE_S)

    async def ask(verb: str) -> dict[str, Any]:
        answer = await client.request(f"$SRV.{verb}.{namespace}-echo", b"", timeout_s=PATIENCE_S)
        described: dict[str, Any] = json.loads(answer.data)
        return described

    assert (await ask("PING"))["version"] == "1.2.3"
    info = await ask("INFO")
    assert info["description"] == "says it again"
    assert info["endpoints"][0]["subject"] == f"{namespace}.echo"
    assert info["endpoints"][0]["metadata"] == {"kind": "test"}
    stats = await ask("STATS")
    assert (stats["endpoints"][0]["num_requests"], stats["endpoints"][0]["num_errors"]) == (2, 1)


async def test_stopped_service_answers_no_more(make_transport: MakeTransport, namespace: str) -> None:
    server, client = await make_transport(), await make_transport()
    service = await serve_echo(server, namespace)
    await service.stop()
    await service.stop()
    await server.flush()
    with pytest.raises(BrokerError):
        await client.request(f"{namespace}.echo", b"hello", timeout_s=PATIENCE_S)


async def test_service_handles_requests_at_once(make_transport: MakeTransport, namespace: str) -> None:
    server, client = await make_transport(), await make_transport()
    both = asyncio.Barrier(2)

    async def meet(request: ServiceRequest) -> bytes:
        await both.wait()
        return b"met"

    await server.serve(f"{namespace}-meet", [ServiceEndpoint("meet", f"{namespace}.meet", meet)], version="1.0.0")
    answers = await asyncio.gather(*(client.request(f"{namespace}.meet", b"", timeout_s=PATIENCE_S) for _ in range(2)))
    assert [answer.data for answer in answers] == [b"met", b"met"]


# The end


async def test_close_sends_what_is_pending_and_may_be_repeated(make_transport: MakeTransport, namespace: str) -> None:
    sender, receiver = await make_transport(), await make_transport()
    inbox = Inbox()
    await receiver.subscribe(f"{namespace}.a", inbox)
    for number in range(100):
        sender.publish(f"{namespace}.a", b"%d" % number)
    await sender.aclose()
    await sender.aclose()
    await inbox.wait(100)
    assert not sender.is_connected


async def test_after_the_end_publish_is_mute_and_the_rest_fails(make_transport: MakeTransport, namespace: str) -> None:
    transport, other = await make_transport(), await make_transport()
    inbox = Inbox()
    await transport.subscribe(f"{namespace}.a", inbox)
    bucket = await transport.key_value(namespace)
    await transport.aclose()
    transport.publish(f"{namespace}.a", b"x")
    other.publish(f"{namespace}.a", b"x")
    await other.flush()
    assert inbox.messages == []
    for operation in (transport.flush(), bucket.get("k"), transport.subscribe(f"{namespace}.a", inbox)):
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(BrokerError):
                await operation


async def test_watches_end_with_the_transport(make_transport: MakeTransport, namespace: str) -> None:
    transport = await make_transport()
    bucket = await transport.key_value(namespace)
    entered = asyncio.Event()

    async def follow() -> list[KeyEntry | None]:
        seen: list[KeyEntry | None] = []
        async for entry in bucket.watch():
            seen.append(entry)
            entered.set()
        return seen

    following = asyncio.create_task(follow())
    await entered.wait()
    await transport.aclose()
    async with asyncio.timeout(PATIENCE_S):
        assert await following == [None]
