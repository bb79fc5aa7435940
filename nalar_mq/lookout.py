"""What a process tells whoever asks: how many calls it has, and of each what it knows. Not on the path of any call.

    asker ──Look──▶ NS.look.<process>.<asker>
    asker ◀──Seen── NS.seen.<asker>.<process>      one piece or many, each below what a message may hold

A process answers one asker after the other, a piece in each turn of its loop, so that to be asked costs its calls little.
Nothing is sent twice: an asker that misses a piece, or gets no answer in time, knows it and may ask again.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import msgspec

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import (
    WIRE_VERSION,
    CallRecord,
    Explanation,
    Look,
    Seen,
    decode_look,
    decode_seen,
    encode_call_record,
    encode_record,
    encode_seen,
)
from nalar_mq.transport import Delivered, Subscription, Transport, is_direct

ASKERS: Final = 64
PATIENCE_S: Final = 3.0
_PIECE_BYTES: Final = 256 * 1024
_HEAD_BYTES: Final = 64 * 1024  # of a piece, for all that is not records
_CLOCK_STEP_S: Final = 0.05
_EXPLANATIONS: Final = 200  # about one call: the last ones
_log = logger(__name__)


class Glance(msgspec.Struct, frozen=True):
    """How much a process has in hand: `futures`, `ended` and `actors` of a `Seen`."""

    futures: int
    ended: int = 0
    actors: dict[str, tuple[int, int]] = {}


class Source(Protocol):
    """What a process can tell of itself."""

    def glance(self) -> Glance:
        """How much it has in hand."""
        ...

    def records(self) -> list[CallRecord]:
        """The calls that it runs, or has run lately."""
        ...

    def explain(self, id: bytes) -> list[Explanation]:
        """What was decided here about a call, in the order of time."""
        ...


class View(msgspec.Struct, frozen=True):
    """What one process has answered.

    Attributes:
        name: of the process.
        glance: how much it has in hand.
        now_s: when it answered, on the clock of the records.
        ahead_s: what to add to a time of that clock for seconds since the epoch.
        records: of its calls; empty if they were not asked for.
        explanations: what was decided there about the call that was asked for.
    """

    name: str
    glance: Glance
    now_s: float = 0.0
    ahead_s: float = 0.0
    records: tuple[CallRecord, ...] = ()
    explanations: tuple[Explanation, ...] = ()


class Lookout:
    """Answers for one process, and asks others on its behalf.

    Args:
        transport, subjects, me: of the process.
        source: what it tells of itself.

    Attributes:
        unreadable: questions and answers that made no sense, or were passed on by the broker for somebody else.
        refused: questions beyond those of `ASKERS` processes that wait already.
    """

    def __init__(self, transport: Transport, subjects: Subjects, me: Address, source: Source) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._source = source
        self._ahead_s = math.inf
        self._questions: dict[str, Look] = {}
        self._numbers = itertools.count(1)
        self._asking: dict[int, _Answers] = {}
        self._subscriptions: list[Subscription] = []
        self._answering: asyncio.Task[None] | None = None
        self.unreadable = 0
        self.refused = 0

    async def start(self) -> None:
        """Begins to answer."""
        heard = [
            (self._subjects.look(self._me.name, "*"), self._on_look),
            (self._subjects.seen(self._me.name, "*"), self._on_seen),
        ]
        for subject, handler in heard:
            self._subscriptions.append(await self._transport.subscribe(subject, handler))

    async def aclose(self) -> None:
        """Ends; idempotent."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.unsubscribe()
        answering, self._answering = self._answering, None
        if answering is not None:
            await cancel_all([answering])

    # Answering.

    def _on_look(self, message: Delivered) -> None:
        asker = message.subject.rpartition(".")[2]
        if not is_direct(message, self._subjects.look(self._me.name, "")):
            self.unreadable += 1
            return
        try:
            look = decode_look(message.data)
        except WireError as error:
            self.unreadable += 1
            _log.debug("lookout.question_unreadable", asker=asker, error=str(error))
            return
        if len(self._questions) >= ASKERS and asker not in self._questions:
            self.refused += 1
            return
        self._questions[asker] = look
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._answer_all())

    async def _answer_all(self) -> None:
        while self._questions:
            asker = next(iter(self._questions))
            look = self._questions.pop(asker)
            try:
                for piece in self._pieces(look):
                    self._transport.publish(self._subjects.seen(asker, self._me.name), piece)
                    await asyncio.sleep(0)
            except Exception:
                _log.exception("lookout.answer_failed", asker=asker)

    def _pieces(self, look: Look) -> Iterator[bytes]:
        glance = self._source.glance()
        now_s = asyncio.get_running_loop().time()
        head = Seen(
            WIRE_VERSION,
            look.question,
            self._me.incarnation,
            1,
            False,
            now_s + self._ahead(now_s),
            now_s,
            glance.futures,
            glance.ended,
            glance.actors,
            explanations=tuple(self._source.explain(look.explain)[-_EXPLANATIONS:]) if look.explain else (),
        )
        limit = min(_PIECE_BYTES, self._transport.max_payload - _HEAD_BYTES)
        parts: list[bytes] = []
        size = 0
        for record in self._source.records() if look.records else ():
            part = encode_call_record(record)
            if len(part) > limit:
                continue
            if size + len(part) > limit:
                yield encode_seen(head, parts)
                head = msgspec.structs.replace(head, piece=head.piece + 1, explanations=())
                parts, size = [], 0
            parts.append(part)
            size += len(part)
        yield encode_seen(msgspec.structs.replace(head, is_last=True), parts)

    def _ahead(self, now_s: float) -> float:
        """From the loop's clock to the wall's; the same for all answers unless one of the two has been set."""
        ahead_s = time.time() - now_s
        if abs(ahead_s - self._ahead_s) > _CLOCK_STEP_S:
            self._ahead_s = ahead_s
        return self._ahead_s

    # Asking.

    async def ask(
        self,
        processes: Iterable[Address],
        *,
        records: bool = False,
        explain: bytes = b"",
        timeout_s: float = PATIENCE_S,
    ) -> list[View]:
        """What each of the processes answers; those that have not within `timeout_s` are left out. Sorted by name.

        Args:
            processes: whom to ask.
            records: ask for their calls.
            explain: id of a call of which they are to tell what was decided about it.
            timeout_s: how long to wait.
        """
        number = next(self._numbers)
        answers = self._asking[number] = _Answers(processes)
        try:
            question = encode_record(Look(WIRE_VERSION, number, records, explain))
            for name in list(answers.missing):
                self._transport.publish(self._subjects.look(name, self._me.name), question)
            async with asyncio.timeout(timeout_s):
                await answers.complete.wait()
        except TimeoutError:
            _log.debug("lookout.no_answer", processes=sorted(answers.missing))
        finally:
            del self._asking[number]
        return [answers.views[name] for name in sorted(answers.views)]

    def _on_seen(self, message: Delivered) -> None:
        sender = message.subject.rpartition(".")[2]
        if not is_direct(message, self._subjects.seen(self._me.name, "")):
            self.unreadable += 1
            return
        try:
            seen = decode_seen(message.data)
        except WireError as error:
            self.unreadable += 1
            _log.debug("lookout.answer_unreadable", process=sender, error=str(error))
            return
        answers = self._asking.get(seen.question)
        if answers is not None:
            answers.take(sender, seen)


class _Answers:
    """The answers to one question, as they come in."""

    def __init__(self, processes: Iterable[Address]) -> None:
        self.missing = {address.name: address.incarnation for address in processes}
        self.views: dict[str, View] = {}
        self.complete = asyncio.Event()
        self._pieces: dict[str, list[Seen]] = {}
        self._check()

    def take(self, sender: str, seen: Seen) -> None:
        if self.missing.get(sender) != seen.incarnation:
            return
        pieces = self._pieces.setdefault(sender, [])
        if seen.piece != len(pieces) + 1:
            return  # one before it is missing: without that it is no answer
        pieces.append(seen)
        if seen.is_last:
            records = tuple(itertools.chain.from_iterable(piece.records for piece in pieces))
            glance = Glance(seen.futures, seen.ended, seen.actors)
            ahead_s = round(seen.wall_s - seen.now_s, 6)
            explanations = tuple(itertools.chain.from_iterable(piece.explanations for piece in pieces))
            self.views[sender] = View(sender, glance, seen.now_s, ahead_s, records, explanations)
            del self.missing[sender], self._pieces[sender]
            self._check()

    def _check(self) -> None:
        if not self.missing:
            self.complete.set()
