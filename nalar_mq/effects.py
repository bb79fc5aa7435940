"""What a workflow takes from the world besides its calls: time, chance and side effects of its own.

A workflow of a job may run again, and is to do the same as before (`history`). Clocks, random numbers and whatever else may be
different the next time are therefore asked for here:

    now()               the time, noted in the journal
    random()            random numbers that follow from the call
    sleep(seconds)      the moment of waking is noted, so that another attempt waits for the rest only
    effect(f, ...)      runs a function of the program's own and notes its result

Each of them gives another attempt what it gave the first one, in the same order among the outcomes of calls. `sleep` and
`effect` return when that is durable; what `now` has told becomes durable before any call or effect that follows it is made. An
effect does not begin while others may hold its process to be lost, and go on with the job.
Outside of jobs they do the plain thing, and outside of the runtime, too.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, overload

from nalar_mq import values
from nalar_mq.call_context import CallContext, current_context
from nalar_mq.claims import INLINE_LIMIT_BYTES, check_size
from nalar_mq.errors import CallCancelledError, ValueNotEncodableError
from nalar_mq.event_loop import BlockingLoopError, running_loop
from nalar_mq.future import Future

P = ParamSpec("P")
T = TypeVar("T")

_NOTHING: Final = values.encode(None)
_LONGEST_S: Final = 1e9


def now() -> datetime:
    """The present time, in UTC; within one call of a job it never goes back, whichever machines the job runs on.

    In a job each reading is noted: in another attempt the same reading shows the same time.
    """
    context = current_context.get()
    if context is None or context.history is None:
        return datetime.now(UTC)
    return datetime.fromtimestamp(context.caller.witness.read_clock(context.history), UTC)


def random() -> Random:
    """A generator of random numbers; in a job one for each call, the same object each time, which follows from the call's id.

    So another attempt that draws in the same order draws the same numbers. Tasks and threads that draw side by side may come
    in another order: let the workflow draw before it begins them. Not for secrets.
    """
    context = current_context.get()
    return Random() if context is None or context.history is None else context.history.random


def sleep(seconds: float) -> Awaitable[None]:
    """Waits: `await` it on an event loop; in a thread it returns when the time has passed.

    Others run in the place of a call that sleeps; synchronous code keeps its thread. In a job, the moment of waking is
    noted, so that another attempt waits only for what is left of the time. The deadline of the call goes on meanwhile:
    `timeout_s` of the workflow must be longer.

    Raises:
        ValueError: `seconds` is no number of seconds.
        CallCancelledError: the call has been cancelled, before or while it slept.
    """
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"sleep() takes 0 to {_LONGEST_S:g} seconds, not {seconds}")
    context, is_on_loop = current_context.get(), running_loop() is not None
    if context is None:
        if is_on_loop:
            return asyncio.sleep(seconds)
        time.sleep(seconds)
        return _Past()
    context.check_cancelled()
    future = _alarm(context, seconds)
    if not is_on_loop:
        future.value()
    return future


class _Past:
    """What has happened already; awaiting it waits for nothing."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


def _alarm(context: CallContext, seconds: float) -> Future[None]:
    history = context.history
    wakes_at_s = seconds + (time.time() if history is None else context.caller.witness.read_clock(history))
    caller = context.caller

    def begin(future: Future[Any]) -> None:
        timer = caller.loop.call_later(max(0.0, wakes_at_s - time.time()), caller.end, future, _NOTHING)
        future.on_end(timer.cancel)

    return caller.own(context, "sleep", values.encode(wakes_at_s), begin, is_parked=True)


@overload
def effect(
    function: Callable[Concatenate[Callable[P, T], P], Coroutine[Any, Any, T]],  # such as asyncio.to_thread
    called: Callable[P, T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Coroutine[Any, Any, T]: ...
@overload
def effect(function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...
@overload
def effect(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
def effect(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Runs a function of the program's own, and in a job notes its result: for what is to happen once, or may vary.

    A plain function gives its result, an `async` one is awaited. On an event loop, a plain function runs in a thread by
    `await effect(asyncio.to_thread, function, ...)`.

    In a job the function runs at least once, and never again once its result, or the error it raised, is in the journal: after
    that another attempt is given what is there. It does not begin before all that led to it is durable. Inside,
    `context().idempotency_key` is the same in every attempt and another one for each effect. Effects that run side by side are
    told apart by their function and arguments. Calls that the function makes belong to no job: they are repeated with it.

    Raises:
        BlockingLoopError: a plain function on the event loop of the runtime.
        ValueNotEncodableError, ValueTooLargeError: the result cannot be noted; 512 KiB can.
        CallCancelledError: the call has been cancelled.
        BaseException: what the function raised.
    """
    if getattr(type(function), "__nalar_actor__", False):
        raise TypeError(f"{function!r} is an actor, and what becomes of its calls is noted anyway: call it without effect()")
    context = current_context.get()
    is_async = inspect.iscoroutinefunction(function)
    if context is not None:
        context.check_cancelled()
        if not is_async and running_loop() is context.caller.loop:
            name = _name_of(function)
            raise BlockingLoopError(f"effect({name})", f"`await effect(asyncio.to_thread, {name}, ...)`")
    work = functools.partial(function, *args, **kwargs)
    if context is None or context.history is None:
        return work()
    effect = _Effect(context, function, args, kwargs)
    return effect.run_on_loop(work) if is_async else effect.run_in_thread(work)


class _Effect:
    """One effect of a call of a job: it has its turn when what led to it is durable, unless its outcome is known."""

    def __init__(
        self, context: CallContext, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._outer = context
        self._caller = context.caller
        self._name = f"effect({_name_of(function)})"
        self._turn: Future[bool] = Future(context.caller, b"", self._name)
        self._future = context.caller.own(context, self._name, _told_apart(args, kwargs), lambda _: self._has_turn(True))
        self._context = context.of_effect(self._future.id)
        if not self._future.on_end(lambda: self._has_turn(False)):
            self._has_turn(False)

    def _has_turn(self, is_to_run: bool) -> None:
        self._turn.resolve(values.encode(is_to_run))

    def run_in_thread(self, work: Callable[[], Any]) -> Any:
        if self._turn.value():
            with self._ending(), _inside(self._context):
                self._end(work())
        return self._future.value()

    async def run_on_loop(self, work: Callable[[], Awaitable[Any]]) -> Any:
        if await self._turn:
            with self._ending(), _inside(self._context):
                self._end(await work())
        return await self._future

    def _end(self, result: Any) -> None:
        payload = values.encode(result, None, f"the result of {self._name}")
        check_size(f"the result of {self._name}", len(payload), self._name, limit_bytes=INLINE_LIMIT_BYTES)
        self._caller.end(self._future, payload)

    @contextmanager
    def _ending(self) -> Generator[None]:
        """An error is an outcome, too. The end of the call is none: the job may go on elsewhere."""
        try:
            yield
        except Exception as error:
            self._caller.end(self._future, None, error)
        except BaseException:
            if not self._outer.cancelled:
                self._caller.end(self._future, None, CallCancelledError(f"{self._name} was interrupted", started=True))
            raise


@contextmanager
def _inside(context: CallContext) -> Generator[None]:
    token = current_context.set(context)
    try:
        yield
    finally:
        current_context.reset(token)


def _told_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """What tells an effect from another one of the same function: its arguments, if they can be written down."""
    try:
        return values.encode_arguments(args, kwargs, [])
    except ValueNotEncodableError:
        return b""


def _name_of(function: Callable[..., Any]) -> str:
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    return str(getattr(plain, "__qualname__", type(plain).__qualname__))
