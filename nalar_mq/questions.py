"""Questions that somebody outside is to answer, and their answers, durable in the broker.

    NS.question.<id>    the question, while somebody waits for its answer; in the ledger `NS-questions`
    NS.answered.<id>    its answer, for a week; in the ledger `NS-answers`
    NS.answer.<id>      where any NATS client answers it, as a request

A question has the id of the future that waits for it: a job that runs again asks the same question, finds it there, and asks
nobody twice. Its deadline is a moment, not a time that begins anew. An answer is appended on condition that there is none: of
several the first one counts, and the others are told. When the deadline has passed, who waits answers it in the same way, with
the default or with nothing, so that an answer at the last moment counts or is refused, but not both.

Whoever lists or answers questions takes away those that nobody waits for any more: of jobs that have ended, and of processes
that are gone. All others are taken away by who asked them, once it is durable what became of them; but what an attempt at a job
has asked, and not seen answered when it failed, stays for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec

from nalar_mq.address import Address, Subjects, is_token
from nalar_mq.annotations import to_json
from nalar_mq.errors import (
    AnswerError,
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    KeyConflictError,
    QuestionClosedError,
    UnknownQuestionError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.json_schema import problem_of
from nalar_mq.logs import logger
from nalar_mq.transport import Delivered, Kept, Ledger, Subscription, Transport

T = TypeVar("T")

_log = logger(__name__)
_KEPT_S: Final = 7 * 24 * 3600.0
_RETRY_S: Final = 0.5
_LOOK_AGAIN_S: Final = 30.0
_SOON_S: Final = 0.01
_JOINED_S: Final = 60.0  # for everybody to have heard of a process that has just come


class Question(msgspec.Struct, frozen=True, omit_defaults=True, rename={"schema_": "schema"}):
    """A question that waits for its answer.

    Attributes:
        id: of the question, which is that of the future that waits.
        text: what is asked.
        schema_: of the answer, as a JSON schema; in JSON `schema`.
        asker: the call that asks, as its actor's name; empty for a program of its own.
        job: whose call it is, or empty.
        session: whose call it is, or empty.
        asked_at: in seconds since the epoch.
        deadline_at: until when it can be answered; None for as long as somebody waits.
        default: what counts as the answer after that; absent if there is none.
        process: `name/incarnation` of the process that waits.
    """

    id: str
    text: str
    schema_: dict[str, Any] = {}
    asker: str = ""
    job: str = ""
    session: str = ""
    asked_at: float = 0.0
    deadline_at: float | None = None
    default: Any = msgspec.UNSET
    process: str = ""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a question: `value` is absent if the deadline has passed and there is no default."""

    id: str
    value: Any = msgspec.UNSET
    is_late: bool = False
    at: float = 0.0


_questions: Final = msgspec.json.Decoder(Question)
_answers: Final = msgspec.json.Decoder(Answer)


class Questions:
    """The questions of one namespace, as any process may see and answer them. Made by `open`.

    Raises (every operation):
        BrokerError: the broker does not answer.
    """

    def __init__(self, subjects: Subjects, questions: Ledger, answers: Ledger, results: Ledger) -> None:
        self._subjects = subjects
        self._questions = questions
        self._answers = answers
        self._results = results

    @classmethod
    async def open(cls, transport: Transport, subjects: Subjects) -> Questions:
        """Opens the ledgers, creating what does not exist."""
        questions, answers, results = await asyncio.gather(
            transport.ledger(subjects.questions_ledger, [subjects.question("*")], per_subject=1),
            transport.ledger(subjects.answers_ledger, [subjects.answered("*")], max_age_s=_KEPT_S, per_subject=1),
            transport.ledger(subjects.results_ledger, [subjects.result("*")], max_age_s=_KEPT_S, per_subject=1),
        )
        return cls(subjects, questions, answers, results)

    async def ask(self, question: Question) -> Question:
        """Keeps a question; returns it as it stands there if it has been asked before."""
        subject = self._subjects.question(question.id)
        found = await self._find(question.id)
        if found is not None:
            return found
        if await self.answered(question.id) is not None:  # a job that begins afresh asks again
            await self._answers.purge(self._subjects.answered(question.id))
        try:
            await self._questions.append(subject, to_json(question), last=0)
        except KeyConflictError:
            return await self._find(question.id) or question
        return question

    async def answer(self, id: str, value: Any, is_alive: Callable[[Address], bool]) -> Answer:
        """Answers a question; when it returns, the answer counts and is durable.

        Args:
            id: of the question.
            value: as JSON has it.
            is_alive: judges the processes that wait.

        Raises:
            UnknownQuestionError: nobody asks that.
            QuestionClosedError: it has been answered before, or its deadline has passed.
            AnswerError: the value is not what is asked for; the message says why.
        """
        question = await self._find(id) if is_token(id) else None
        closed = await self.answered(id) if is_token(id) else None
        if closed is not None:
            raise _closed(closed)
        if question is None or not await self._is_wanted(question, is_alive):
            raise UnknownQuestionError(id)
        problem = problem_of(value, question.schema_)
        if problem:
            raise AnswerError(f"this does not answer {question.text!r}: {problem}", id)
        now = time.time()
        is_late = question.deadline_at is not None and now >= question.deadline_at
        answer = await self.close(_late_answer(question, now) if is_late else Answer(id, value, at=now))
        if is_late or answer.at != now:
            raise _closed(answer)
        return answer

    async def close(self, answer: Answer) -> Answer:
        """Writes an answer unless there is one; returns the one that counts."""
        try:
            await self._answers.append(self._subjects.answered(answer.id), to_json(answer), last=0)
        except KeyConflictError:
            return await self.answered(answer.id) or answer
        return answer

    async def answered(self, id: str) -> Answer | None:
        """The answer to a question, or None."""
        kept = await self._answers.last(self._subjects.answered(id))
        with contextlib.suppress(msgspec.DecodeError):
            return None if kept is None else _answers.decode(kept.data)
        return None

    async def expire(self, question: Question) -> Answer:
        """The deadline has passed: its default is the answer, or nothing is, unless somebody was faster."""
        return await self.close(_late_answer(question, time.time()))

    async def forget(self, id: str) -> None:
        """Nobody waits for the answer any more."""
        await self._questions.purge(self._subjects.question(id))

    async def waiting(self, is_alive: Callable[[Address], bool]) -> list[Question]:
        """Those that can be answered, the oldest first."""
        return [
            question
            async for question in self._all()
            if await self.answered(question.id) is None and await self._is_wanted(question, is_alive)
        ]

    async def _find(self, id: str) -> Question | None:
        kept = await self._questions.last(self._subjects.question(id))
        return None if kept is None else _read(kept)

    async def _all(self) -> AsyncIterator[Question]:
        after = 0
        while page := await self._questions.read(self._subjects.question("*"), after=after):
            for kept in page:
                question = _read(kept)
                if question is not None:
                    yield question
            after = page[-1].sequence

    async def _is_wanted(self, question: Question, is_alive: Callable[[Address], bool]) -> bool:
        """False if nobody waits any more; then it is forgotten, if that is beyond doubt."""
        if question.job:
            is_wanted = await self._results.last(self._subjects.result(question.job)) is None
            is_certain = not is_wanted
        else:
            asker = Address.parse(question.process)
            is_wanted = asker is not None and is_alive(asker)
            is_certain = not is_wanted and time.time() - question.asked_at > _JOINED_S
        if is_certain:
            await self.forget(question.id)
        return is_wanted


class Asker:
    """The questions that this process waits for. Everything is for the loop.

    Args:
        transport, subjects: of the process.
    """

    def __init__(self, transport: Transport, subjects: Subjects) -> None:
        self._transport = transport
        self._subjects = subjects
        self._opening: asyncio.Task[Questions] | None = None
        self._subscription: Subscription | None = None
        self._heard: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._forgetting: dict[str, asyncio.Task[None]] = {}
        self._is_closed = False

    def ask(self, question: Question, on_answer: Callable[[Answer], None]) -> Callable[[bool], None]:
        """Asks, and calls `on_answer` once with what becomes of it.

        Returns what is to be called when that is durable or nobody waits any more: with True to take the question away, with
        False to leave it for another attempt.
        """
        task = self._begin(self._pursue(question, on_answer))

        def end(is_over: bool) -> None:
            task.cancel()
            if is_over and not self._is_closed:
                self._forgetting[question.id] = self._begin(self._forget(question.id))

        return end

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _pursue(self, question: Question, on_answer: Callable[[Answer], None]) -> None:
        heard = self._heard[question.id] = asyncio.Event()
        try:
            answer = await self._answer_to(question, heard)
        except BrokerError as error:
            _log.error("question.failed", question=question.id, reason=str(error))
            raise
        finally:
            self._heard.pop(question.id, None)
        on_answer(answer)

    async def _answer_to(self, question: Question, heard: asyncio.Event) -> Answer:
        if question.id in self._forgetting:  # a former attempt at the job has given it up
            await asyncio.wait([self._forgetting[question.id]])
        questions = await self._patiently(self._open)
        question = await self._patiently(lambda: questions.ask(question))
        look_again_s = _LOOK_AGAIN_S
        while True:
            heard.clear()
            answer = await self._patiently(lambda: questions.answered(question.id))
            if answer is not None:
                return answer
            left_s = _LOOK_AGAIN_S if question.deadline_at is None else question.deadline_at - time.time()
            if left_s <= 0:
                return await self._patiently(lambda: questions.expire(question))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(look_again_s, left_s)):
                    await heard.wait()
            # Listeners hear of an answer before the broker has stored it, and of one that it then refuses, too.
            look_again_s = _SOON_S if heard.is_set() else min(_LOOK_AGAIN_S, 2 * look_again_s)

    async def _open(self) -> Questions:
        if self._opening is None or (self._opening.done() and (self._opening.cancelled() or self._opening.exception())):
            self._opening = asyncio.get_running_loop().create_task(self._open_and_listen())
        return await asyncio.shield(self._opening)

    async def _open_and_listen(self) -> Questions:
        questions = await Questions.open(self._transport, self._subjects)
        if self._subscription is None:
            self._subscription = await self._transport.subscribe(self._subjects.answered("*"), self._on_answered)
            self._transport.on_connection(lambda is_connected: self._look_at_all() if is_connected else None)
        return questions

    def _on_answered(self, message: Delivered) -> None:
        heard = self._heard.get(message.subject.rpartition(".")[2])
        if heard is not None:
            heard.set()

    def _look_at_all(self) -> None:
        for heard in self._heard.values():
            heard.set()

    async def _forget(self, id: str) -> None:
        try:
            questions = await self._patiently(self._open)
            await self._patiently(lambda: questions.forget(id))
        finally:
            if self._forgetting.get(id) is asyncio.current_task():
                del self._forgetting[id]

    async def _patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await operation()
            except (BrokerAuthError, BrokerFeatureError):
                raise
            except BrokerError as error:
                _log.debug("question.delayed", reason=str(error))
                await asyncio.sleep(_RETRY_S)

    async def aclose(self) -> None:
        """Waits for nothing any more; idempotent."""
        self._is_closed = True
        await cancel_all([*self._tasks, *([self._opening] if self._opening is not None else [])])
        if self._subscription is not None and self._transport.is_connected:
            with contextlib.suppress(BrokerError):
                await self._subscription.unsubscribe()


def _late_answer(question: Question, now: float) -> Answer:
    return Answer(question.id, question.default, is_late=True, at=now)


def _closed(answer: Answer) -> QuestionClosedError:
    what = "its deadline has passed" if answer.is_late else "it has been answered before"
    return QuestionClosedError(f"question {answer.id!r} can be answered no more: {what}", answer.id, is_late=answer.is_late)


def _read(kept: Kept) -> Question | None:
    """What stands there; None for what is no question, which was not written by us."""
    try:
        return _questions.decode(kept.data)
    except (msgspec.DecodeError, UnicodeError):
        _log.warning("question.unreadable", subject=kept.subject, sequence=kept.sequence)
        return None
