"""Journals over both transports: what is told to be durable is read again, a seal ends its writer, nothing needed goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from waiting import until

from nalar_mq.address import Address, Subjects
from nalar_mq.config import BrokerAccess
from nalar_mq.errors import BrokerError
from nalar_mq.journal import Journal
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import Outcome, Resolve, Unseen, Voided
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Ledger, Transport

PATIENCE_S = 20.0
FIRST = Address("first", 7)


class Site:
    """Journals of several processes of one namespace."""

    def __init__(self, connect: Callable[[str], Awaitable[Transport]], namespace: str) -> None:
        self.connect = connect
        self.subjects = Subjects(namespace)
        self.stack = AsyncExitStack()
        self.sealed: list[Address] = []

    async def journal(self, me: Address = FIRST) -> Journal:
        transport = await self.connect(me.name)
        self.stack.push_async_callback(transport.aclose)
        journal = Journal(transport, self.subjects, me, lambda: self.sealed.append(me))
        self.stack.push_async_callback(journal.aclose)
        return journal

    async def ledger(self) -> Ledger:
        transport = await self.connect("reader")
        self.stack.push_async_callback(transport.aclose)
        return await transport.ledger(self.subjects.journal_ledger, [self.subjects.journal("*", "*")])


@pytest.fixture(params=["memory", "nats"])
async def site(request: pytest.FixtureRequest, namespace: str, broker_access: BrokerAccess) -> AsyncIterator[Site]:
    hub = MemoryHub(seed=1)

    async def over_nats(name: str) -> Transport:
        return await NatsTransport.connect(broker_access, name=name)

    made = Site(hub.connect if request.param == "memory" else over_nats, namespace)
    async with made.stack:
        yield made


def outcome(number: int, *, job: str = "j", parent: bytes = b"p", size: int = 1) -> Outcome:
    return Outcome(job, parent, Resolve(number.to_bytes(16, "big"), b"v" * size))


async def durable(journal: Journal) -> None:
    done = asyncio.Event()
    journal.after(done.set)
    async with asyncio.timeout(PATIENCE_S):
        await done.wait()


async def written(journal: Journal, observations: list[Outcome]) -> None:
    for observation in observations:
        journal.put(observation)
    await durable(journal)


async def test_what_is_durable_is_read_again_by_job_and_call(site: Site) -> None:
    journal = await site.journal()
    told: list[int] = []
    for number in range(200):
        observation = outcome(number, job=f"j{number % 2}", parent=b"p%d" % (number % 3))
        journal.put(observation, lambda number=number: told.append(number))
        if number % 50 == 0:
            await asyncio.sleep(0)
    journal.put(Unseen("j0", b"p0", 1, 3))
    await durable(journal)
    assert told == list(range(200))

    other = await site.journal(Address("other", 1))
    assert await other.writers() == [FIRST]
    past = await other.read(FIRST, "j0", is_lost=False)
    assert sorted(past) == [b"p0", b"p1", b"p2"]
    found = [observation for _, observation in past[b"p0"]]
    assert found == [*(outcome(n, job="j0", parent=b"p0") for n in range(0, 200, 6)), Unseen("j0", b"p0", 1, 3)]
    assert await other.read(FIRST, "no such job", is_lost=False) == {}


async def test_observations_of_one_turn_share_a_message(site: Site) -> None:
    journal = await site.journal()
    await written(journal, [outcome(number) for number in range(500)])
    ledger = await site.ledger()
    assert len(await ledger.read(site.subjects.journal("*", "*"))) == 1


async def test_very_many_void_calls_travel_in_several_messages(site: Site) -> None:
    journal, ids = await site.journal(), tuple([number.to_bytes(16, "big") for number in range(1000)])
    voided = [Voided("j", b"p", ids)] * 80
    for observation in voided:
        journal.put(observation)
    await durable(journal)
    past = await (await site.journal(Address("other", 1))).read(FIRST, "j", is_lost=True)
    assert [observation for _, observation in past[b"p"]] == voided


async def test_large_observations_travel_in_several_messages(site: Site) -> None:
    journal = await site.journal()
    await written(journal, [outcome(number, size=200_000) for number in range(7)])
    past = await (await site.journal(Address("other", 1))).read(FIRST, "j", is_lost=True)
    assert [observation for _, observation in past[b"p"]] == [outcome(number, size=200_000) for number in range(7)]


async def test_a_sealed_journal_takes_nothing_more_and_its_writer_learns_it(site: Site) -> None:
    journal = await site.journal()
    await written(journal, [outcome(1)])
    successor = await site.journal(Address("successor", 1))
    assert len((await successor.read(FIRST, "j", is_lost=True))[b"p"]) == 1

    told: list[int] = []
    journal.put(outcome(2), lambda: told.append(2))
    await until(lambda: site.sealed, "it still writes")
    assert site.sealed == [FIRST]
    journal.put(outcome(3), lambda: told.append(3))
    await asyncio.sleep(0)
    third = await site.journal(Address("third", 1))
    assert [o for _, o in (await third.read(FIRST, "j", is_lost=True))[b"p"]] == [outcome(1)]
    assert told == []


async def test_a_journal_that_was_never_written_can_be_sealed(site: Site) -> None:
    successor = await site.journal(Address("successor", 1))
    assert await successor.read(FIRST, "j", is_lost=True) == {}
    journal = await site.journal()
    journal.put(outcome(1))
    await until(lambda: site.sealed, "it still writes")


async def test_two_that_seal_at_once_read_the_same(site: Site) -> None:
    await written(await site.journal(), [outcome(number) for number in range(3)])
    others = [await site.journal(Address(f"other{n}", n)) for n in range(4)]
    pasts = await asyncio.gather(*(other.read(FIRST, "j", is_lost=True) for other in others))
    assert all(past == pasts[0] for past in pasts)
    assert len(pasts[0][b"p"]) == 3


async def test_what_is_needed_stays_and_the_rest_goes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nalar_mq.journal._TRIM_EVERY_S", 0.02)
    journal, ledger = await site.journal(), await site.ledger()
    for number in range(10):
        await written(journal, [outcome(number, job=f"j{number}", parent=b"p%d" % number)])
    assert journal.has_of("j3")
    for number in range(5):
        journal.release(b"p%d" % number)
    assert not journal.has_of("j3")

    async def count(wanted: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(await ledger.read(site.subjects.journal("*", "*"))) != wanted:
                await asyncio.sleep(0.01)

    await count(5)
    for number in range(5, 10):
        journal.release(b"p%d" % number)
    await count(1)  # the last one stays: the next one refers to it
    await written(journal, [outcome(11, job="k", parent=b"k")])
    await count(1)
    assert (await (await site.journal(Address("other", 1))).read(FIRST, "k", is_lost=True)).keys() == {b"k"}


async def test_a_journal_that_nobody_needs_goes_with_its_process(site: Site) -> None:
    needed, done = await site.journal(FIRST), await site.journal(Address("done", 1))
    await written(needed, [outcome(1)])
    await written(done, [outcome(2, parent=b"q")])
    done.release(b"q")
    await done.aclose()
    await needed.aclose()
    assert await (await site.journal(Address("other", 1))).writers() == [FIRST]


async def test_a_seal_is_known_to_all(site: Site) -> None:
    await written(await site.journal(), [outcome(1)])
    others = [await site.journal(Address(f"other{n}", n)) for n in range(2)]
    assert not await others[0].is_sealed(FIRST)
    await others[0].read(FIRST, "j", is_lost=True)
    assert await others[0].is_sealed(FIRST)
    assert await others[1].is_sealed(FIRST)


async def test_bytes_that_make_no_sense_are_counted_and_passed_over(site: Site) -> None:
    await written(await site.journal(), [outcome(1)])
    ledger = await site.ledger()
    for rubbish in (b"", b"\xc1", b"\x93\xcc\xce\x63\x90"):
        await ledger.append(site.subjects.journal(FIRST.name, FIRST.incarnation), rubbish)
    await ledger.append(site.subjects.journal("nobody", "x"), b"?")
    other = await site.journal(Address("other", 1))
    assert await other.writers() == [FIRST]
    assert len((await other.read(FIRST, "j", is_lost=True))[b"p"]) == 1
    assert other.unreadable == 3


class Flaky:
    """A ledger whose answers get lost, before or after it has done what was asked."""

    def __init__(self, ledger: Ledger, losses: list[str]) -> None:
        self.ledger = ledger
        self.losses = losses

    async def append(self, subject: str, data: bytes, *, last: int | None = None) -> int:
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "before":
            raise BrokerError("no answer")
        sequence = await self.ledger.append(subject, data, last=last)
        if loss == "after":
            raise BrokerError("no answer")
        return sequence

    def __getattr__(self, name: str) -> object:
        return getattr(self.ledger, name)


@pytest.mark.parametrize("losses", [["before"], ["after"], ["before", "after"], ["after", "before", "before", "after"]])
async def test_an_answer_that_is_lost_neither_loses_nor_doubles(
    site: Site, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nalar_mq.sole_writer._RETRY_S", 0.01)
    journal = await site.journal()
    journal._ledger = Flaky(await site.ledger(), list(losses))  # type: ignore[assignment]
    for number in range(4):
        await written(journal, [outcome(number)])
    past = await (await site.journal(Address("other", 1))).read(FIRST, "j", is_lost=True)
    assert [observation for _, observation in past[b"p"]] == [outcome(number) for number in range(4)]
