"""Actors for LLM agent workflows over NATS.

Everything a program needs is here; the modules below are the runtime's own. Names are imported when they are first used, so
that a program pays for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from nalar_mq.actor import agent, method, tool, workflow
    from nalar_mq.call_context import CallContext, context
    from nalar_mq.client import Client, connect
    from nalar_mq.effects import effect, now, random, sleep
    from nalar_mq.errors import (
        AnswerError,
        ArgumentError,
        BrokerError,
        CallCancelledError,
        CallError,
        CallExpiredError,
        CallTimeoutError,
        ConfigError,
        CopyChangedError,
        NalarError,
        NotAllowedError,
        NotConnectedError,
        OverloadedError,
        QuestionClosedError,
        RemoteError,
        SessionLostError,
        StateLostError,
        StateMutatedError,
        StateTypeError,
        StateWriteError,
        StreamRestartedError,
        UnknownActorError,
        UnknownCallError,
        UnknownJobError,
        UnknownMethodError,
        UnknownQuestionError,
        ValueLostError,
        ValueNotEncodableError,
        ValueTooLargeError,
        WaitCycleError,
        WorkerLostError,
        WorkflowChangedError,
    )
    from nalar_mq.future import Future, FutureInfo, Stream, Waited, as_completed, gather, wait
    from nalar_mq.jobs import JobHandle, JobResult, JobStatus
    from nalar_mq.people import ask
    from nalar_mq.questions import Question
    from nalar_mq.schema import upgrade
    from nalar_mq.spending import spend
    from nalar_mq.state import ManagedDict, ManagedList, ManagedValue
    from nalar_mq.traces import Trace, TracedCall

_HOMES: Final = {
    "actor": (
        "agent",
        "method",
        "tool",
        "workflow",
    ),
    "client": (
        "Client",
        "connect",
    ),
    "call_context": (
        "CallContext",
        "context",
    ),
    "effects": (
        "effect",
        "now",
        "random",
        "sleep",
    ),
    "errors": (
        "AnswerError",
        "ArgumentError",
        "BrokerError",
        "CallCancelledError",
        "CallError",
        "CallExpiredError",
        "CallTimeoutError",
        "ConfigError",
        "CopyChangedError",
        "NalarError",
        "NotAllowedError",
        "NotConnectedError",
        "OverloadedError",
        "QuestionClosedError",
        "RemoteError",
        "SessionLostError",
        "StateLostError",
        "StateMutatedError",
        "StateTypeError",
        "StateWriteError",
        "StreamRestartedError",
        "UnknownActorError",
        "UnknownCallError",
        "UnknownJobError",
        "UnknownMethodError",
        "UnknownQuestionError",
        "ValueNotEncodableError",
        "ValueLostError",
        "ValueTooLargeError",
        "WaitCycleError",
        "WorkerLostError",
        "WorkflowChangedError",
    ),
    "future": (
        "Future",
        "FutureInfo",
        "Stream",
        "Waited",
        "as_completed",
        "gather",
        "wait",
    ),
    "jobs": (
        "JobHandle",
        "JobResult",
        "JobStatus",
    ),
    "people": ("ask",),
    "questions": ("Question",),
    "schema": ("upgrade",),
    "spending": ("spend",),
    "state": (
        "ManagedDict",
        "ManagedList",
        "ManagedValue",
    ),
    "traces": (
        "Trace",
        "TracedCall",
    ),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnswerError",
    "ArgumentError",
    "BrokerError",
    "CallCancelledError",
    "CallContext",
    "CallError",
    "CallExpiredError",
    "CallTimeoutError",
    "Client",
    "ConfigError",
    "CopyChangedError",
    "Future",
    "FutureInfo",
    "JobHandle",
    "JobResult",
    "JobStatus",
    "ManagedDict",
    "ManagedList",
    "ManagedValue",
    "NalarError",
    "NotAllowedError",
    "NotConnectedError",
    "OverloadedError",
    "Question",
    "QuestionClosedError",
    "RemoteError",
    "SessionLostError",
    "StateLostError",
    "StateMutatedError",
    "StateTypeError",
    "StateWriteError",
    "Stream",
    "StreamRestartedError",
    "Trace",
    "TracedCall",
    "UnknownActorError",
    "UnknownCallError",
    "UnknownJobError",
    "UnknownMethodError",
    "UnknownQuestionError",
    "ValueLostError",
    "ValueNotEncodableError",
    "ValueTooLargeError",
    "WaitCycleError",
    "Waited",
    "WorkerLostError",
    "WorkflowChangedError",
    "agent",
    "as_completed",
    "ask",
    "connect",
    "context",
    "effect",
    "gather",
    "method",
    "now",
    "random",
    "sleep",
    "spend",
    "tool",
    "upgrade",
    "wait",
    "workflow",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"nalar_mq.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
