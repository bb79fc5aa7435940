"""What a running call knows of itself; its children inherit it without the user's help."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

from nalar_mq.address import Address, check_token
from nalar_mq.errors import ArgumentError, CallCancelledError, NotConnectedError
from nalar_mq.history import History

if TYPE_CHECKING:
    from nalar_mq.future import Future, FutureInfo
    from nalar_mq.questions import Answer, Question


class Slot(Protocol):
    """A running call's claim on its replica: given up while the call waits, taken back before it goes on."""

    def give_up(self) -> None:
        """The call waits now; others may run in its place. Any thread."""
        ...

    def take_back(self) -> None:
        """The call goes on. Any thread."""
        ...

    def spend(self, amount: float, unit: str) -> None:
        """The call has cost so much. Any thread."""
        ...

    @property
    def holds(self) -> tuple[str, ...]:
        """`actor/session/instance` of the sessions that the call and its callers hold."""
        ...


class Witness(Protocol):
    """Shows the program of a job what it may see of its calls."""

    def look(self, future: Future[Any], history: History) -> bool:
        """A call of a job looks whether a future of its own has ended: True if it has, for all attempts. Any thread."""
        ...

    def go_on(self, history: History) -> None:
        """A call of a job has looked as a former attempt did: shows what comes next. Any thread."""
        ...

    def note_unseen(self, history: History, number: int) -> None:
        """A look of that number found nothing. Any thread."""
        ...

    def cut_again(self, history: History, number: int) -> None:
        """A wait of that number has been cut short as in a former attempt. Any thread."""
        ...

    def read_clock(self, history: History) -> float:
        """What the clock shows a call of a job, in seconds since the epoch. Any thread."""
        ...


class Caller(Protocol):
    """Makes calls: the runtime of this process as stubs see it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it runs on."""
        ...

    @property
    def witness(self) -> Witness:
        """For calls of jobs."""
        ...

    def call(
        self,
        context: CallContext,
        actor: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
    ) -> Future[Any]:
        """Makes a call and returns its future at once. Any thread.

        Raises:
            ValueNotEncodableError, ValueTooLargeError: an argument cannot travel.
        """
        ...

    def cancel(self, future: Future[Any], reason: str) -> None:
        """Nobody wants the result any more. Any thread."""
        ...

    def prioritise(self, future: Future[Any], priority: int) -> None:
        """Gives the call another priority, higher or lower. Any thread."""
        ...

    def lend_priority(self, future: Future[Any], priority: int) -> None:
        """A call of that priority waits for the future: its own is not lower from now on. Any thread."""
        ...

    def info(self, future: Future[Any]) -> FutureInfo:
        """What is known of it. Any thread."""
        ...

    def credit(self, future: Future[Any], limit: int) -> None:
        """The consumer of a stream takes chunks up to number `limit`. Any thread."""
        ...

    def own(
        self,
        context: CallContext,
        name: str,
        payload: bytes,
        begin: Callable[[Future[Any]], None],
        *,
        is_parked: bool = False,
    ) -> Future[Any]:
        """A future that this very process is to end, by `end`: no call, but in a job noted like one. Any thread.

        Args:
            context: whose it is.
            name: what it is, for people and, in a job, for its id.
            payload: what tells it from others of the same name in the same job.
            is_parked: it waits for people or time, for as long as that takes.
            begin: called on the loop unless a former attempt at the job saw it end, once it is durable what led to it.
        """
        ...

    def end(self, future: Future[Any], payload: bytes | None, error: BaseException | None = None) -> None:
        """Ends a future made by `own`, with an encoded value or an error; nothing happens if it has ended. Any thread."""
        ...

    def ask(self, future: Future[Any], question: Question, on_answer: Callable[[Answer], None]) -> None:
        """Asks somebody outside what `future`, made by `own`, waits for; on the loop."""
        ...


class Root(NamedTuple):
    """How the call is made that is a job itself: its id, which attempt it is (see `messages.Call`), where it runs already."""

    id: bytes
    attempt: int = 0
    lost: tuple[str, ...] = ()
    failures: int = 0
    located: Address | None = None


_OPTIONS: Final = ("cast", "init", "instance", "priority", "retries", "root", "session", "tenant", "timeout_s")


class CallOptions:
    """How one call is made; None means: as the context or the actor's directives say."""

    __slots__ = _OPTIONS

    def __init__(
        self,
        *,
        session: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = -1.0,
        retries: int | None = None,
        instance: str = "",
        init: bytes = b"",
        cast: bool = False,
        root: Root | None = None,
        tenant: str | None = None,
    ) -> None:
        self.session = session
        self.priority = priority
        self.timeout_s = timeout_s
        self.retries = retries
        self.instance = instance
        self.init = init
        self.cast = cast
        self.root = root
        self.tenant = tenant

    def but(self, **changes: Any) -> CallOptions:
        """The same options with some of them changed."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _OPTIONS}
        fields.update(changes)
        return CallOptions(**fields)

    def with_given(self, *, session: Any, priority: Any, timeout_s: Any, retries: Any) -> CallOptions:
        """The same options with those changed that are given: what was chosen in an earlier step stays.

        What is given comes from a program as it is, and may be of any type.

        Args:
            session, priority, retries: not given if None.
            timeout_s: not given if negative; None is no deadline.

        Raises:
            AddressError: the session is no token.
            ArgumentError: one of the others is no number, or not a whole one.
        """
        if session is not None:
            check_token(session, "session")
        _check_number("priority", priority, Integral, "a whole number")
        _check_number("retries", retries, Integral, "a whole number")
        _check_number("timeout_s", timeout_s, Real, "a number of seconds, or None for no deadline")
        changes: dict[str, Any] = {} if session is None else {"session": session}
        changes |= {name: int(n) for name, n in (("priority", priority), ("retries", retries)) if n is not None}
        if timeout_s is None or timeout_s >= 0:
            changes["timeout_s"] = None if timeout_s is None else float(timeout_s)
        return self.but(**changes)


DEFAULT_OPTIONS = CallOptions()


def _check_number(name: str, value: Any, kind: type, wanted: str) -> None:
    is_itself: Any = value == value  # what is no number is not; of numpy, that is no `bool`
    if value is not None and not (isinstance(value, kind) and is_itself):
        raise ArgumentError(f"{name} is {wanted}, not {value!r}")


class CallContext(msgspec.Struct, eq=False):
    """The context of one running call, or of a client's program, for which `call_id` is empty.

    Attributes:
        caller: makes calls on behalf of this context.
        call_id: id of the running call.
        is_root: no other call made it.
        session: its session; empty in a client that gave none: each call then gets one of its own.
        job: its job, or empty.
        priority: inherited by children.
        deadline: on the clock of `caller.loop`; None for no deadline.
        trace: W3C `traceparent`, or empty.
        budget: what may still be spent, or None.
        slot: its claim on the replica, or None outside a worker.
        cancelled: why it must stop, or empty while it may go on.
        constructed: how many agent instances its driver has made so far.
        history: what it has made and seen, if it belongs to a job.
        actor: the agent, tool or workflow that runs; empty in a program outside.
        tenant: on whose behalf; inherited by children.
        workflow: the outermost one that it is part of, itself included; empty where there is none.
    """

    caller: Caller
    call_id: bytes = b""
    is_root: bool = True
    session: str = ""
    job: str = ""
    priority: int = 0
    deadline: float | None = None
    trace: str = ""
    budget: float | None = None
    slot: Slot | None = None
    cancelled: str = ""
    constructed: int = 0
    history: History | None = None
    actor: str = ""
    tenant: str = ""
    workflow: str = ""

    def of_effect(self, id: bytes) -> CallContext:
        """The same for the code of an effect with that id, which is remembered as a whole: it has no history of its own."""
        return CallContext(
            self.caller,
            id,
            False,
            self.session,
            "",
            self.priority,
            self.deadline,
            self.trace,
            self.budget,
            self.slot,
            self.cancelled,
            self.constructed,
            None,
            self.actor,
            self.tenant,
            self.workflow,
        )

    def check_cancelled(self) -> None:
        """Raises `CallCancelledError` if this call must stop."""
        if self.cancelled:
            raise CallCancelledError(self.cancelled, call_id=self.call_id.hex(), started=True)

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this call: hand it to services that can tell a repeated request."""
        return self.call_id.hex()


current_context: ContextVar[CallContext | None] = ContextVar("nalar_call", default=None)


def require_context(actor: str) -> CallContext:
    """The context of the running code.

    Raises:
        NotConnectedError: there is none; `actor` is named in the message.
        CallCancelledError: the running call has been cancelled.
    """
    context = current_context.get()
    if context is None:
        raise NotConnectedError(actor)
    if context.cancelled:
        context.check_cancelled()
    return context


def context() -> CallContext:
    """The context of the running call: its session, job, deadline and idempotency key.

    Raises:
        NotConnectedError: no call is running here.
    """
    found = current_context.get()
    if found is None:
        raise NotConnectedError()
    return found
