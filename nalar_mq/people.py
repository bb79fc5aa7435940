"""People: what a program asks somebody outside, and waits for.

    if await nalar_mq.ask("May I send 40 letters?", schema=bool, timeout_s=3600, default=False): ...

A question is a future like that of a call. Who answers it is outside: `nalar answer`, `client.answer`, or any NATS client.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Final, TypeVar, overload

import msgspec

from nalar_mq import values
from nalar_mq.annotations import check, from_json, to_json
from nalar_mq.call_context import CallContext, require_context
from nalar_mq.errors import CallTimeoutError
from nalar_mq.event_loop import running_loop
from nalar_mq.future import Future
from nalar_mq.json_schema import problem_of, schema_of
from nalar_mq.logs import logger
from nalar_mq.questions import Answer, Question

T = TypeVar("T")
_log = logger(__name__)
_NONE: Any = msgspec.UNSET


class Ask:
    """Asks somebody outside; the future gets the answer.

    While it is waited for, others run in the place of the call; synchronous code keeps its thread, and the log says so. The
    deadline of the call goes on meanwhile: for questions that may take days the workflow needs `timeout_s = inf`.

    In a job the question survives everything: it lies in the broker, with the moment of its deadline, another attempt at the
    job waits for the same one, and once its answer is in the journal it is never asked again. Elsewhere it goes away with the
    process that asked. It goes away, too, when its call ends or the future is cancelled.

    Args:
        question: the text.
        schema: of the answer: a type, a pydantic model, or a JSON schema; anything at all if left out. The answer is checked
            by it before it is taken, and is of that type.
        timeout_s: seconds until nobody can answer any more; None for as long as the call may wait.
        default: the answer after that.

    Raises (when waited for):
        CallTimeoutError: nobody has answered in time, and there is no default.
        CallCancelledError: nobody wants the answer any more.

    Raises (at once):
        NotConnectedError: there is no runtime here.
        TypeError, ValueError: there is no schema for that type, or the default does not fit it.
    """

    __nalar_actor__ = True

    @overload
    def __call__(self, question: str, /, *, schema: type[T], timeout_s: float | None = ..., default: T = ...) -> Future[T]: ...
    @overload
    def __call__(
        self, question: str, /, *, schema: Any = ..., timeout_s: float | None = ..., default: Any = ...
    ) -> Future[Any]: ...
    def __call__(
        self, question: str, /, *, schema: Any = None, timeout_s: float | None = None, default: Any = _NONE
    ) -> Future[Any]:
        """Asks; see the class."""
        context = require_context("ask")
        wanted = {} if schema is None else schema_of(schema)
        fallback = default if default is msgspec.UNSET else from_json(to_json(default))
        problem = "" if fallback is msgspec.UNSET else problem_of(fallback, wanted)
        if problem:
            raise ValueError(f"the default of {question!r} is no answer to it: {problem}")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0 seconds, not {timeout_s:g}")
        if running_loop() is None:
            _log.info("question.holds_thread", question=question, hint="an async workflow waits without one")
        return _asked(context, question, wanted, Any if _is_schema(schema) else schema, timeout_s, fallback)


ask: Final = Ask()


def _is_schema(schema: Any) -> bool:
    return schema is None or isinstance(schema, dict)


def _asked(
    context: CallContext, text: str, schema: dict[str, Any], wanted: Any, timeout_s: float | None, default: Any
) -> Future[Any]:
    caller = context.caller
    now = time.time()

    def begin(future: Future[Any]) -> None:
        question = Question(
            future.id.hex(),
            text,
            schema,
            job=context.job,
            session=context.session,
            asked_at=now,
            deadline_at=None if timeout_s is None else now + timeout_s,
            default=default,
        )
        caller.ask(future, question, functools.partial(_end, context, future, question, wanted))

    told_apart = values.encode([text, to_json(schema)])
    return caller.own(context, "ask", told_apart, begin, is_parked=True)


def _end(context: CallContext, future: Future[Any], question: Question, wanted: Any, answer: Answer) -> None:
    """The question has been answered, or will not be."""
    try:
        if answer.value is msgspec.UNSET:
            raise CallTimeoutError(f"nobody has answered {question.text!r} in time", actor="ask")
        payload = values.encode(check(answer.value, wanted, f"the answer to {question.text!r}"))
    except Exception as error:
        context.caller.end(future, None, error)
    else:
        context.caller.end(future, payload)
