"""Runs the code of an app for one call: on the loop, in a thread, or in a child process.

Async code runs on the loop, without a task for each call (`runner`); sync code in threads (`threads`); code that asks for it
in a child process (`isolation`). A generator pours into an `outflow`, and waits where its consumer is slow. Several calls of
an actor that takes them so run as one, of which each gets its own result.

Nothing of an app begins while this process may be held to be lost, since others may run its calls then: what had its turn
before it stood still waits until it is current again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from typing import Any, Protocol, cast

from nalar_mq import values
from nalar_mq.actor import ActorSpec
from nalar_mq.call_context import current_context
from nalar_mq.claims import INLINE_LIMIT_BYTES, check_size
from nalar_mq.execution import Execution
from nalar_mq.future import Future
from nalar_mq.isolation import Children, completed
from nalar_mq.logs import logger
from nalar_mq.outflow import Outflow, settle
from nalar_mq.replica import Replica
from nalar_mq.runner import Runner
from nalar_mq.spending import spent_by
from nalar_mq.state import Arrival, state_of
from nalar_mq.stores import Kept
from nalar_mq.threads import LoopInbox, Threads
from nalar_mq.transparent import run_driver

_HELD_S = 0.1
_STOP_S = 5.0
_log = logger(__name__)


class _Host(Protocol):
    """The part of `host` that this needs."""

    def end(self, execution: Execution, payload: bytes | None, error: BaseException | None) -> None: ...
    def outflow(self, execution: Execution) -> Outflow: ...


class Invoker:
    """Runs the code of one worker's actors; on the loop unless it says otherwise."""

    __slots__ = ("_base", "_children", "_host", "_inbox", "_loop", "_may_begin", "_runner", "_threads")

    def __init__(
        self,
        host: _Host,
        loop: asyncio.AbstractEventLoop,
        inbox: LoopInbox,
        runner: Runner,
        threads: Threads,
        children: Children,
        may_begin: Callable[[], bool],
    ) -> None:
        """`may_begin` is false while this process may be held to be lost."""
        self._host = host
        self._loop = loop
        self._inbox = inbox
        self._runner = runner
        self._threads = threads
        self._children = children
        self._may_begin = may_begin
        self._base = contextvars.copy_context()

    def run(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Begins a call whose context has been made; `host.end` hears what it came to."""
        if execution.method.is_async and execution.replica.uses_loop:
            self._runner.run(self._run_on_loop(execution, args, kwargs), self._base.copy(), execution.has_suspended)
        else:
            variables = self._variables(execution)
            self._threads.run(lambda: variables.run(self._run_in_thread, execution, args, kwargs))

    def run_batch(self, batch: Callable[..., Any], executions: list[Execution], arguments: list[Any]) -> None:
        """Begins several calls as one, each with one argument, in the context of the first."""
        variables = self._variables(executions[0])
        self._threads.run(lambda: variables.run(self._run_batch_in_thread, batch, executions, arguments))

    async def make(self, replica: Replica, key: str, kept: Kept, arrival: Arrival) -> None:
        """Makes an instance of a session that comes from elsewhere."""
        made: asyncio.Future[None] = self._loop.create_future()
        self._threads.run(functools.partial(self._gather_in_thread, replica, key, kept, arrival, made))
        await made

    def run_hook(self, execution: Execution, hook: str) -> None:
        """Has an agent do what it does when a call of its is preempted."""
        self._threads.run(functools.partial(_call_preempt_hook, execution, hook))

    async def until_current(self) -> None:
        """Returns when this process is certainly not held to be lost."""
        while True:
            await asyncio.sleep(_HELD_S)
            if self._may_begin():
                return

    def close(self) -> None:
        """Ends all threads and child processes."""
        self._runner.close()
        self._children.close()
        self._threads.close()

    def _run_batch_in_thread(self, batch: Callable[..., Any], executions: list[Execution], arguments: list[Any]) -> None:
        payloads: list[bytes] = []
        error: BaseException | None = None
        label = executions[0].label
        try:
            function = self._bound_in_thread(executions[0], batch)
            with spent_by(functools.partial(_spend_together, executions)):
                results = _results_of_batch(completed(function(arguments)), len(arguments), label)
            payloads = [_checked_size(values.encode(result, None, f"a result of {label}"), executions[0]) for result in results]
        except BaseException as cause:
            error = cause
        for position, execution in enumerate(executions):
            payload = None if error is not None else payloads[position]
            self._inbox.put(functools.partial(self._host.end, execution, payload, error))

    def _variables(self, execution: Execution) -> contextvars.Context:
        variables = self._base.copy()
        variables.run(current_context.set, execution.context)
        return variables

    async def _run_on_loop(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> None:
        payload: bytes | None = None
        error: BaseException | None = None
        context, method = execution.context, execution.method
        current_context.set(context)
        try:
            if context is not None and context.cancelled:
                context.check_cancelled()
            if not self._may_begin():
                await self.until_current()  # the process stood still between the choice of this call and its turn
            function = self._function_on_loop(execution) or await self._made_on_loop(execution)
            result = function(*args, **kwargs)
            if method.style == "async_generator":
                result = await self._pour(execution, result)
            else:
                result = await result
            deps: list[values.Deferred] = []
            payload = values.encode(result, deps, method.result_label)
            if deps:
                payload = await self._encoded_on_loop(execution, result, deps)
            _seal(execution, payload)
        except BaseException as cause:
            error = cause
        self._host.end(execution, payload, error)

    def _function_on_loop(self, execution: Execution) -> Callable[..., Any] | None:
        """What the call is to run; None if its instance has yet to be made."""
        replica, function = execution.replica, execution.method.function
        if replica.spec.kind != "agent":
            return function
        instance = replica.instances.get(execution.session_key if replica.spec.stateful else _instance_key(execution))
        if instance is None or replica.spec.managed:
            return None if instance is None else _bound(execution, instance, function)
        return function.__get__(instance)  # type: ignore[no-any-return]

    async def _made_on_loop(self, execution: Execution) -> Callable[..., Any]:
        made: asyncio.Future[Any] = self._loop.create_future()
        variables = contextvars.copy_context()
        key = _instance_key(execution)
        self._threads.run(lambda: variables.run(self._make_in_thread, execution, key, made))
        return _bound(execution, await made, execution.method.function)

    def _make_in_thread(self, execution: Execution, key: str, made: asyncio.Future[Any]) -> None:
        try:
            instance = execution.replica.make(key, execution.call.init)
        except BaseException as error:
            cause = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._inbox.put(functools.partial(settle, made, None, cause))
        else:
            self._inbox.put(functools.partial(settle, made, instance))

    async def _pour(self, execution: Execution, pieces: AsyncIterator[Any]) -> Any:
        outflow = self._host.outflow(execution)
        async with _closing(pieces):
            async for piece in pieces:
                if not outflow.put(outflow.encoded(piece)):
                    room: asyncio.Future[None] = self._loop.create_future()
                    outflow.on_room(functools.partial(settle, room))
                    await room
        await outflow.drained()
        return None if outflow.is_streaming else outflow.rest()

    async def _encoded_on_loop(self, execution: Execution, result: Any, deps: list[values.Deferred]) -> bytes:
        for dep in deps:
            if isinstance(dep, Future):
                await dep
        return values.encode(result, None, execution.method.result_label)

    def _run_in_thread(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> None:
        payload: bytes | None = None
        error: BaseException | None = None
        try:
            result = self._result_in_thread(execution, args, kwargs)
            deps: list[values.Deferred] = []
            payload = values.encode(result, deps, execution.method.result_label)
            if deps:
                for dep in deps:
                    if isinstance(dep, Future):
                        dep.value()
                payload = values.encode(result, None, execution.method.result_label)
            _seal(execution, payload)
        except BaseException as cause:
            error = cause
        self._inbox.put(lambda: self._host.end(execution, payload if error is None else None, error))

    def _result_in_thread(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> Any:
        spec, method = execution.replica.spec, execution.method
        if spec.directives.isolation == "process":
            return self._result_in_child(execution, args, kwargs)
        function = self._bound_in_thread(execution, method.function)
        result = run_driver(function, args, kwargs) if _is_driver(spec) else function(*args, **kwargs)
        return self._pour_in_thread(execution, result) if method.style in ("generator", "async_generator") else result

    def _bound_in_thread(self, execution: Execution, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of the instance that the call is for; of no instance for a tool or workflow."""
        if execution.replica.spec.kind != "agent":
            return function
        key = _instance_key(execution)
        instance = execution.replica.instances.get(key)
        if instance is None:
            instance = execution.replica.make(key, execution.call.init)
        return _bound(execution, instance, function)

    def _result_in_child(self, execution: Execution, args: list[Any], kwargs: dict[str, Any]) -> Any:
        def stoppable(stop: Callable[[], None]) -> None:
            execution.child = stop
            if execution.context is not None and execution.context.cancelled:
                stop()  # it was cancelled before there was anything to stop

        call = execution.call
        payload = values.encode_arguments(args, kwargs)
        return self._children.run(call.actor, call.method, call.init, payload, stoppable)

    def _pour_in_thread(self, execution: Execution, pieces: Iterator[Any]) -> Any:
        outflow = self._host.outflow(execution)
        try:
            for piece in pieces:
                room = threading.Event()
                self._inbox.put(functools.partial(_put_and_tell, outflow, outflow.encoded(piece), room))
                room.wait()
                if execution.context is not None:
                    execution.context.check_cancelled()
        finally:
            if isinstance(pieces, Generator):
                cast("Generator[Any, None, None]", pieces).close()
        drained = threading.Event()
        self._inbox.put(lambda: outflow.on_room(drained.set))
        drained.wait()
        outflow.check()
        return None if outflow.is_streaming else outflow.rest()

    def _gather_in_thread(self, replica: Replica, key: str, kept: Kept, arrival: Arrival, made: asyncio.Future[None]) -> None:
        try:
            replica.make(key, b"", kept, arrival)
        except BaseException as error:
            cause = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._inbox.put(functools.partial(settle, made, None, cause))
        else:
            self._inbox.put(functools.partial(settle, made, None))

    async def stop_instances(self, replicas: Iterable[Replica]) -> None:
        """Ends all instances; an `on_stop` that takes longer than its time is left behind in its thread."""
        stopped: list[asyncio.Future[None]] = []
        for replica in replicas:
            done: asyncio.Future[None] = self._loop.create_future()
            stopped.append(done)
            self._threads.run(functools.partial(self._stop_in_thread, replica, done))
        _, late = await asyncio.wait(stopped, timeout=_STOP_S)
        if late:
            _log.warning("agent.on_stop_too_slow", hint=f"on_stop has {_STOP_S:.0f} s")

    def _stop_in_thread(self, replica: Replica, done: asyncio.Future[None]) -> None:
        try:
            replica.stop()
        finally:
            self._inbox.put(functools.partial(settle, done))


def _closing(pieces: AsyncIterator[Any]) -> contextlib.AbstractAsyncContextManager[Any]:
    """Closes a generator at the end; what else gives pieces has nothing to close."""
    if isinstance(pieces, AsyncGenerator):
        return contextlib.aclosing(cast("AsyncGenerator[Any, None]", pieces))
    return contextlib.nullcontext()


def _is_driver(spec: ActorSpec) -> bool:
    return spec.transparent and spec.kind == "workflow"


def _instance_key(execution: Execution) -> str:
    call = execution.call
    if execution.replica.spec.stateful:
        return execution.session_key
    return hashlib.blake2b(call.init, digest_size=16).hexdigest() if call.init else "-"


def _spend_together(executions: list[Execution], amount: float, unit: str) -> None:
    for execution in executions:
        execution.spend(amount / len(executions), unit)


def _results_of_batch(results: Any, count: int, label: str) -> list[Any]:
    if results.__class__ is not list or len(results) != count:
        raise TypeError(f"{label}_batch was given {count} arguments and must return a list of as many results")
    checked: list[Any] = results
    return checked


def _bound(execution: Execution, instance: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of that instance; the call that holds the session may change its managed state from now on."""
    replica, context = execution.replica, execution.context
    if replica.spec.managed and context is not None and replica.holders.get(execution.session_key) == execution.call.id:
        execution.managed = state_of(instance)
        execution.managed.begin(context)
    return function.__get__(instance)  # type: ignore[no-any-return]


def _seal(execution: Execution, payload: bytes) -> None:
    """Raises if the result cannot travel or the managed state cannot be kept; nothing is changed after that."""
    if len(payload) > INLINE_LIMIT_BYTES:
        _checked_size(payload, execution)
    if execution.managed is not None:
        execution.changes = execution.managed.seal()


def _checked_size(payload: bytes, execution: Execution) -> bytes:
    if len(payload) > INLINE_LIMIT_BYTES:
        check_size(execution.method.result_label, len(payload), execution.label)
    return payload


def _put_and_tell(outflow: Outflow, payload: bytes, room: threading.Event) -> None:
    if outflow.put(payload):
        room.set()
    else:
        outflow.on_room(room.set)


def _call_preempt_hook(execution: Execution, hook: str) -> None:
    spec = execution.replica.spec
    try:
        if spec.kind == "agent":
            instance = execution.replica.instances.get(_instance_key(execution))
            if instance is not None:
                getattr(instance, hook)()
        else:
            getattr(sys.modules[spec.target.__module__], hook)()
    except Exception as error:
        _log.warning("call.preempt_hook_failed", actor=spec.name, error=repr(error))
