"""What former attempts at a job have done, gathered before it is tried again.

    1. Every live worker is asked which calls of the job it has whose owner is gone (`Locate`), and told which processes are
       held to be lost, so that it takes nothing more from those. An answer is waited for until it comes or that worker is
       lost: one whose loop is blocked answers late, and what it has must not be run twice. So does one whose journal is not
       durable yet: it might be read without what comes before all that the next attempt observes.
    2. The journals of the processes that are no more are sealed and read, and those of live ones that hold something of it.

Jobs that are tried again at the same time are asked for together. The broker is waited for as long as it is away.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

from nalar_mq.address import Address
from nalar_mq.errors import BrokerError
from nalar_mq.event_loop import cancel_all
from nalar_mq.history import Memory
from nalar_mq.journal import Journal, Past, Sighting
from nalar_mq.logs import logger
from nalar_mq.messages import Locate, Located, Message, Observation
from nalar_mq.placement import RoutingTable

_log = logger(__name__)
_RETRY_S: Final = 0.2
_LOST_KEPT: Final = 64

Tell = Callable[[Address, Message], None]
HoldLost = Callable[[Address], None]
IsGone = Callable[[Address], Awaitable[bool]]


class Finder(Protocol):
    """The part of a worker that knows its calls."""

    def calls_without_owner(self, jobs: frozenset[str]) -> list[bytes]:
        """Calls of jobs that are queued, run or have ended here, and whose owner is gone."""
        ...


class _Question:
    """One round: the answers of workers that were asked, by address; None while one is owed."""

    def __init__(self) -> None:
        self.answers: dict[Address, Located | None] = {}
        self.answered = asyncio.Event()

    def take(self, sender: Address, located: Located) -> None:
        if sender in self.answers:
            self.answers[sender] = located
            self.look()

    def give_up(self, address: Address) -> None:
        for asked in [a for a in self.answers if a.name == address.name and a.incarnation <= address.incarnation]:
            del self.answers[asked]
        self.look()

    def look(self) -> None:
        if None not in self.answers.values():
            self.answered.set()


class Recall:
    """The resumption of jobs in one process. Everything is for the loop.

    Args:
        me, table, journal: of the process.
        tell: sends a message to a process.
        hold_lost: takes nothing more from a process.
        is_gone: judges a process that is not in the table.
    """

    def __init__(
        self, me: Address, table: RoutingTable, journal: Journal, tell: Tell, hold_lost: HoldLost, is_gone: IsGone
    ) -> None:
        self._me = me
        self._table = table
        self._journal = journal
        self._tell = tell
        self._hold_lost = hold_lost
        self._is_gone = is_gone
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._wanted: list[tuple[str, asyncio.Future[Memory]]] = []
        self._lost: dict[Address, None] = {}
        self._working: asyncio.Task[None] | None = None
        self.finder: Finder | None = None

    async def memory(self, job: str, lost: Iterable[str]) -> Memory:
        """What is known of a job; `lost` are processes, as `name/incarnation`, that had part in it and are gone."""
        for address in filter(None, map(Address.parse, lost)):
            self._lose(address)
        future: asyncio.Future[Memory] = asyncio.get_running_loop().create_future()
        self._wanted.append((job, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    def _lose(self, address: Address) -> None:
        if address != self._me:
            self._note_lost(address)
            self._hold_lost(address)

    def _note_lost(self, address: Address) -> None:
        self._lost.setdefault(address)
        if len(self._lost) > _LOST_KEPT:
            del self._lost[next(iter(self._lost))]

    async def _work(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, []
            jobs = frozenset(job for job, _ in wanted)
            try:
                memories = await self._gather(jobs)
            except Exception as error:
                for _, future in wanted:
                    if not future.done():
                        future.set_exception(error)
                continue
            for job, future in wanted:
                if not future.done():
                    future.set_result(memories[job])

    async def _gather(self, jobs: frozenset[str]) -> dict[str, Memory]:
        while True:
            answers = await self._ask(jobs)
            await self._until_durable()
            try:
                pasts = await self._read(jobs, answers)
            except BrokerError as error:
                _log.debug("recall.read_failed", reason=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            located = {id: address for address, answer in answers.items() for id in answer.ids}
            if self.finder is not None:
                located |= dict.fromkeys(self.finder.calls_without_owner(jobs), self._me)
            lost = tuple(map(str, self._lost))
            return {job: Memory(_in_order(pasts[job]), dict(located), lost) for job in jobs}

    async def _until_durable(self) -> None:
        """Returns when the journal of this process holds all that was put into it; not once somebody has taken over."""
        durable = asyncio.Event()
        self._journal.after(durable.set)
        await durable.wait()

    # Asking.

    async def _ask(self, jobs: frozenset[str]) -> dict[Address, Located]:
        number, question = next(self._numbers), _Question()
        members = self._table.members.items()
        workers = [Address(name, member.incarnation) for name, member in members if member.role == "worker"]
        question.answers = {address: None for address in workers if address != self._me}
        self._questions[number] = question
        try:
            locate = Locate(number, tuple(sorted(jobs)), tuple(map(str, self._lost)))
            for address in list(question.answers):
                self._tell(address, locate)
            question.look()
            await question.answered.wait()
        finally:
            del self._questions[number]
        return {address: answer for address, answer in question.answers.items() if answer is not None}

    def on_located(self, sender: Address, located: Located) -> None:
        """A worker has answered."""
        question = self._questions.get(located.number)
        if question is not None:
            question.take(sender, located)

    def on_locate(self, sender: Address, locate: Locate) -> None:
        """Another process goes on with jobs."""
        for address in filter(None, map(Address.parse, locate.lost)):
            self._lose(address)
        self._journal.after(functools.partial(self._say, sender, locate))

    def _say(self, sender: Address, locate: Locate) -> None:
        jobs = frozenset(locate.jobs)
        ids = self.finder.calls_without_owner(jobs) if self.finder is not None else []
        journaled = tuple(job for job in locate.jobs if self._journal.has_of(job))
        self._tell(sender, Located(locate.number, tuple(ids), journaled))

    def on_lost(self, address: Address) -> None:
        """That process will answer nothing any more."""
        for question in self._questions.values():
            question.give_up(address)

    # Reading.

    async def _read(self, jobs: frozenset[str], answers: dict[Address, Located]) -> dict[str, list[Past]]:
        pasts: dict[str, list[Past]] = {job: [] for job in jobs}
        for writer in await self._journal.writers():
            if writer == self._me:
                found = [job for job in jobs if self._journal.has_of(job)]
            elif writer in answers:
                found = [job for job in jobs if job in answers[writer].journaled]
            elif await self._journal.is_sealed(writer) or await self._is_gone(writer):
                self._note_lost(writer)
                for job in jobs:
                    pasts[job].append(await self._journal.read(writer, job, is_lost=True))
                continue
            else:
                continue  # it has come since we asked
            for job in found:
                pasts[job].append(await self._journal.read(writer, job, is_lost=False))
        return pasts

    async def aclose(self) -> None:
        """Gives up what is being gathered; idempotent."""
        if self._working is not None:
            await cancel_all([self._working])
        for _, future in self._wanted:
            future.cancel()


def _in_order(pasts: list[Past]) -> dict[bytes, list[Observation]]:
    """What several journals hold, by call, in the order in which it was written."""
    merged: dict[bytes, list[Sighting]] = {}
    for past in pasts:
        for call_id, sightings in past.items():
            merged.setdefault(call_id, []).extend(sightings)
    return {
        call_id: [observation for _, observation in sorted(sightings, key=lambda sighting: sighting[0])]
        for call_id, sightings in merged.items()
    }
