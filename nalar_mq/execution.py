"""One call in a worker, from its arrival to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from nalar_mq import values
from nalar_mq.actor import MethodSpec
from nalar_mq.address import Address
from nalar_mq.call_context import CallContext
from nalar_mq.changes import Tracked
from nalar_mq.claims import MARK
from nalar_mq.errors import CallCancelledError
from nalar_mq.history import Memory
from nalar_mq.messages import Call, CallRecord, Fail, Resolve
from nalar_mq.outflow import Outflow
from nalar_mq.replica import Replica
from nalar_mq.session_state import Change, SessionState

CANCELLED = f"{CallCancelledError.__module__}:{CallCancelledError.__qualname__}"


class Pump(Protocol):
    """What an execution needs of its host."""

    def on_loop(self, function: Callable[[], None]) -> None:
        """Runs `function` on the loop; any thread."""
        ...

    def pump(self, replica: Replica) -> None:
        """Starts what may run now."""
        ...

    def on_wait(self, execution: Execution) -> None:
        """A call waits for others."""
        ...

    def on_resume(self, execution: Execution) -> None:
        """A call waits no more."""
        ...

    def on_spent(self, execution: Execution, amount: float, unit: str) -> None:
        """A call has cost something."""
        ...


def session_key_of(call: Call) -> str:
    """What the mailbox keeps apart: a session, or one instance within it."""
    return f"{call.session}/{call.instance}" if call.instance else call.session


def workflow_of(execution: Execution) -> str:
    """The outermost workflow that a call is part of, itself included; empty where there is none."""
    return execution.call.workflow or execution.replica.workflow


class Resumed(msgspec.Struct, eq=False):
    """What is to be known of a call of a job whose owner was lost, or which is a later attempt at one; others do without.

    Attributes:
        is_orphan: its owner is gone, and nobody has asked for it since.
        is_recalling: what former attempts have done is being looked for.
        memory: what they have done.
        is_settled: its outcome is durable, although it has not ended here: its owner had given it up.
        following: the call as a later attempt has made it, and by whom, while this one is winding down.
    """

    is_orphan: bool = False
    is_recalling: bool = False
    memory: Memory | None = None
    is_settled: bool = False
    following: tuple[Address, Call] | None = None


class Execution(msgspec.Struct, eq=False):
    """One call in this worker; also its slot in the replica (`context.Slot`).

    A struct, which is made in a fifth of the time that an `__init__` in Python takes.
    """

    host: Pump
    owner: Address
    call: Call
    replica: Replica
    method: MethodSpec
    arrived: float
    wanted_at: float
    session_key: str
    told: Tracked
    hops: int = 0
    missing: set[bytes] | None = None
    given: dict[bytes, Resolve | Fail] | None = None
    consumers: list[Address] | None = None
    context: CallContext | None = None
    task: asyncio.Task[None] | None = None
    child: Callable[[], None] | None = None
    outflow: Outflow | None = None
    began: float = 0.0
    failure: str = ""
    started: bool = False
    ended: bool = False
    is_answered: bool = False
    is_batched: bool = False
    resumed: Resumed | None = None
    managed: SessionState | None = None
    changes: list[Change] | None = None
    is_committing: bool = False
    waits: int = 0
    is_parked: bool = False

    @property
    def deadline(self) -> float | None:
        """On the clock of the loop; None for no deadline."""
        timeout_s = self.call.timeout_s
        return None if timeout_s is None else self.arrived + timeout_s

    @property
    def is_orphan(self) -> bool:
        """Its owner is gone, and nobody has asked for it since."""
        return self.resumed is not None and self.resumed.is_orphan

    @property
    def is_recalling(self) -> bool:
        """It may not begin yet: what former attempts at its job have done is being looked for."""
        return self.resumed is not None and self.resumed.is_recalling

    @property
    def following(self) -> tuple[Address, Call] | None:
        """The call as a later attempt has made it, which begins when this one has wound down."""
        return None if self.resumed is None else self.resumed.following

    @property
    def is_winding_down(self) -> bool:
        """It has been answered, or will be with nothing but its cancellation: what it still does is no matter to anybody."""
        return self.is_answered or (self.context is not None and bool(self.context.cancelled))

    def has_suspended(self, task: asyncio.Task[None]) -> None:
        """It waits on the loop for the first time; `task` is its own from now on."""
        self.task = task

    @property
    def label(self) -> str:
        """`actor` or `actor.method`."""
        return self.method.label

    @property
    def hold(self) -> str:
        """How this execution's session is named in the `holds` of its children."""
        return f"{self.call.actor}/{self.session_key}"

    @property
    def holds(self) -> tuple[str, ...]:
        """The sessions that its children find held."""
        call = self.call
        return (*call.holds, self.hold) if self.replica.spec.stateful else call.holds

    @property
    def state(self) -> str:
        """Where it stands, as in `CallRecord`."""
        if self.failure:
            return "cancelled" if self.failure == CANCELLED else "failed"
        if self.ended:
            return "done"
        return ("waiting" if self.waits else "running") if self.started else "queued"

    def record(self, ended_s: float) -> CallRecord:
        """What is kept of it, or shown while it has not ended."""
        call = self.call
        return CallRecord(
            call.id,
            call.parent,
            call.actor,
            call.method,
            call.session,
            call.job,
            self.owner.name,
            call.priority,
            call.attempt,
            self.arrived,
            self.began,
            ended_s,
            "done" if self.ended and not self.failure else self.state,
            self.failure,
        )

    def value_of(self, id: bytes) -> Any:
        """The value of a future that it depends on."""
        assert self.given is not None
        return values.decode(self.given[id].payload, self.value_of)

    @property
    def has_claims(self) -> bool:
        """True if a value that it depends on is kept elsewhere."""
        return self.given is not None and any(found.payload[:1] == MARK for found in self.given.values())

    def give_up(self) -> None:
        """It waits. Any thread."""
        self.host.on_loop(self._wait)

    def take_back(self) -> None:
        """It goes on. Any thread."""
        self.host.on_loop(self._resume)

    def spend(self, amount: float, unit: str) -> None:
        """It has cost something. Any thread."""
        self.host.on_loop(lambda: self.host.on_spent(self, amount, unit))

    def _wait(self) -> None:
        self.waits += 1
        if self.waits == 1 and not self.ended:
            self.replica.mailbox.wait(self.call.id)
            self.host.pump(self.replica)
            self.host.on_wait(self)

    def _resume(self) -> None:
        self.waits -= 1
        if self.waits == 0 and not self.ended:
            self.replica.mailbox.resume(self.call.id)
            self.host.on_resume(self)
