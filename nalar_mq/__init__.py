"""Actors for LLM agent workflows over NATS.

Everything a program needs is here; the modules below are the runtime's own.
"""

from nalar_mq.actor import agent, method, tool, workflow
from nalar_mq.client import Client, connect
from nalar_mq.context import CallContext, context
from nalar_mq.errors import (
    ArgumentError,
    BrokerError,
    CallCancelledError,
    CallError,
    CallTimeoutError,
    ConfigError,
    NalarError,
    NotConnectedError,
    OverloadedError,
    RemoteError,
    StateLostError,
    UnknownActorError,
    ValueNotEncodableError,
    ValueTooLargeError,
    WaitCycleError,
    WorkerLostError,
)
from nalar_mq.future import Future, Stream, as_completed, gather

__all__ = [
    "ArgumentError",
    "BrokerError",
    "CallCancelledError",
    "CallContext",
    "CallError",
    "CallTimeoutError",
    "Client",
    "ConfigError",
    "Future",
    "NalarError",
    "NotConnectedError",
    "OverloadedError",
    "RemoteError",
    "StateLostError",
    "Stream",
    "UnknownActorError",
    "ValueNotEncodableError",
    "ValueTooLargeError",
    "WaitCycleError",
    "WorkerLostError",
    "agent",
    "as_completed",
    "connect",
    "context",
    "gather",
    "method",
    "tool",
    "workflow",
]
