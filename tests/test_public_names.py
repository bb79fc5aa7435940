"""What `import nalar_mq` offers is a promise: a change of this list is a change for users."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nalar_mq

PUBLIC = [
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
    "UnknownJobError",
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
    "UnknownMethodError",
    "UnknownQuestionError",
    "ValueNotEncodableError",
    "ValueLostError",
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


def test_the_public_names_are_these() -> None:
    assert sorted(nalar_mq.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(nalar_mq, name) is not None
        assert name in dir(nalar_mq)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nalar_mq.nonsense  # noqa: B018


def test_importing_the_package_loads_no_broker_client() -> None:
    code = "import nalar_mq, sys; assert not {'nats', 'click', 'aiohttp', 'lmdb'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
