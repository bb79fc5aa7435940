"""Answers calls of any NATS client: `NS.call.<name>`, a service that `nats micro` and every client library can find.

A request is arguments as `interchange` describes them, the answer is the value in the same form. Headers may say more:
`Nalar-Session`, `Nalar-Timeout-S`, `Nalar-Priority`. What fails is answered with `Nats-Service-Error` and a code:

    400   the request cannot be read, or its arguments do not fit
    404   nobody serves that name, nor began to within the 3 s that a call waits for that
    408   the deadline has passed
    413   the value is larger than what one message holds
    499   the call was cancelled
    500   what was called raised an error
    503   too many calls, or the worker was lost; another attempt may succeed

`NS.answer.<id>` is an endpoint of the same service: a request with JSON answers the question `<id>` (`questions`). 404 says
that nobody waits for an answer to that, 409 that it has one by now, 400 what is wrong with this one.

There is no durability of calls: if the process that took the request dies, there is no answer. `jobs` are for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from nalar_mq.actor import ActorSpec
from nalar_mq.address import Subjects, check_token
from nalar_mq.annotations import from_json
from nalar_mq.call_context import CallContext, CallOptions
from nalar_mq.calls import Calls
from nalar_mq.claims import check_size
from nalar_mq.errors import (
    AddressError,
    AnswerError,
    ArgumentError,
    BrokerError,
    CallCancelledError,
    CallError,
    CallTimeoutError,
    MalformedMessageError,
    OverloadedError,
    OwnerLostError,
    QuestionClosedError,
    UnknownActorError,
    UnknownMethodError,
    UnknownQuestionError,
    ValueTooLargeError,
    WorkerLostError,
)
from nalar_mq.interchange import Arguments, read_arguments, write_value
from nalar_mq.questions import Questions
from nalar_mq.transport import Service, ServiceEndpoint, ServiceFailure, ServiceRequest, Transport

SESSION: Final = "Nalar-Session"
TIMEOUT: Final = "Nalar-Timeout-S"
PRIORITY: Final = "Nalar-Priority"
_HEADER_ROOM_BYTES: Final = 4096
_AT_ONCE: Final = 10_000
_LONGEST_S: Final = 1e8
_MOST_URGENT: Final = 1_000_000


class Door:
    """The service of one worker, from `start` to `aclose`.

    Args:
        specs: what the worker serves; each tool and workflow gets an endpoint, and one takes every other name.
        calls: makes the calls; they may run in any worker.
        transport, subjects: of the process.
    """

    def __init__(self, specs: Mapping[str, ActorSpec], calls: Calls, transport: Transport, subjects: Subjects) -> None:
        self._specs = specs
        self._calls = calls
        self._transport = transport
        self._subjects = subjects
        self._prefix = len(subjects.call(""))
        self._service: Service | None = None
        self._questions: Questions | None = None
        self._pending = 0

    async def start(self) -> None:
        """When it returns, requests are answered and the service is found.

        Raises:
            BrokerError: the broker does not answer.
        """
        endpoints = [self._endpoint(spec) for spec in self._specs.values() if spec.kind != "agent"]
        endpoints.append(ServiceEndpoint("question", self._subjects.answer("*"), self._answer_question, {"kind": "question"}))
        endpoints.append(ServiceEndpoint("any", self._subjects.call(">"), self._answer, {"kind": "any other name"}))
        about = f"actors of the namespace {self._subjects.namespace}"
        name = self._subjects.namespace
        self._service = await self._transport.serve(name, endpoints, version=version("nalar-mq"), description=about)

    async def aclose(self, patience_s: float = 0.0) -> None:
        """Takes no more requests and lets those that run finish, for `patience_s`; idempotent."""
        service, self._service = self._service, None
        if service is not None:
            await service.stop(patience_s)

    def _endpoint(self, spec: ActorSpec) -> ServiceEndpoint:
        about = {"kind": spec.kind, "signature": str(spec.methods[""].signature), "description": spec.doc}
        return ServiceEndpoint(spec.name, self._subjects.call(spec.name), self._answer, about)

    async def _answer(self, request: ServiceRequest) -> bytes:
        name = request.subject[self._prefix :]
        if self._pending >= _AT_ONCE:
            raise ServiceFailure(503, f"{self._pending} calls are being answered here; try again later")
        self._pending += 1
        try:
            arguments = read_arguments(request.data)
            value = await self._call(name, arguments, _options(request.headers))
            return self._fitting(write_value(value, is_json=arguments.is_json), name)
        except ServiceFailure:
            raise
        except Exception as error:
            raise ServiceFailure(_code(error, name), f"{type(error).__name__}: {error}") from None
        finally:
            self._pending -= 1

    async def _answer_question(self, request: ServiceRequest) -> bytes:
        """Answers a question of `ask` with the JSON of the request."""
        id = request.subject.rpartition(".")[2]
        try:
            if self._questions is None:
                self._questions = await Questions.open(self._transport, self._subjects)
            answer = await self._questions.answer(id, from_json(request.data), self._calls.is_alive)
        except Exception as error:
            raise ServiceFailure(_answer_code(error), f"{type(error).__name__}: {error}") from None
        return write_value({"id": answer.id, "answered": True})

    def _fitting(self, answer: bytes, name: str) -> bytes:
        """Other clients know of no claims: what is larger than one message is refused."""
        what = f"the answer of {name}"
        check_size(what, len(answer), name, limit_bytes=self._transport.max_payload - _HEADER_ROOM_BYTES)
        return answer

    async def _call(self, name: str, arguments: Arguments, options: CallOptions) -> Any:
        actor, _, method = name.partition(".")
        context = CallContext(self._calls)
        future = self._calls.call(context, actor, method, tuple(arguments.args), arguments.kwargs, options)
        try:
            return await future
        except asyncio.CancelledError:
            future.cancel("its worker is stopping")
            raise


def _options(headers: Mapping[str, str]) -> CallOptions:
    """What the headers ask for.

    Raises:
        ServiceFailure: they cannot be understood.
    """
    try:
        session = headers.get(SESSION)
        timeout_s = float(headers.get(TIMEOUT, "-1"))
        priority = int(headers.get(PRIORITY, "0"))
        if TIMEOUT in headers and not 0 < timeout_s <= _LONGEST_S:
            raise ValueError(f"{TIMEOUT} must be above 0 and at most {_LONGEST_S:g}")
        if abs(priority) > _MOST_URGENT:
            raise ValueError(f"{PRIORITY} must be between -{_MOST_URGENT} and {_MOST_URGENT}")
        return CallOptions(
            session=check_token(session, "session") if session else None,
            timeout_s=timeout_s,
            priority=priority if PRIORITY in headers else None,
        )
    except (ValueError, AddressError) as error:
        raise ServiceFailure(400, f"a header cannot be understood: {error}") from None


def _code(error: Exception, name: str) -> int:
    match error:
        case MalformedMessageError():
            return 400
        case UnknownActorError() | UnknownMethodError() | ArgumentError() if _is_about(error, name):
            return 400 if isinstance(error, ArgumentError) else 404
        case CallTimeoutError():
            return 408
        case ValueTooLargeError() if _is_about(error, name):
            return 413
        case CallCancelledError():
            return 499
        case OverloadedError() | WorkerLostError() | OwnerLostError():
            return 503
        case _:
            return 500


def _answer_code(error: Exception) -> int:
    match error:
        case MalformedMessageError() | AnswerError():
            return 400
        case UnknownQuestionError():
            return 404
        case QuestionClosedError():
            return 409
        case BrokerError():
            return 503
        case _:
            return 500


def _is_about(error: CallError, name: str) -> bool:
    """True if the call that was asked for failed, and not one that it made."""
    return error.actor in (name, name.partition(".")[0])
