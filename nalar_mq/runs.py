"""The calls that a run of a workflow has made: errors in the order of the program, and the end of all calls.

Inside a `try` or `with` body (`Guard`) each statement waits for the calls made during it; when it raises, the error of an
earlier call goes first, and later calls, which plain Python would not have made, are forgotten. The same order holds for a
workflow as a whole (`RunScope`).
"""

# What runs through here is of any type whatever.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, Final

from nalar_mq.depth import deep, force
from nalar_mq.future import Future, waiting
from nalar_mq.origins import AnyFuture, living, strip, user_frame


class _Journal(threading.local):
    """The futures made by this thread inside the guards that are open, in the order of the program."""

    def __init__(self) -> None:
        self.depth = 0
        self.made: list[AnyFuture] = []


journal: Final = _Journal()


def noted(result: Any, frame: types.FrameType | None = None) -> Any:
    """Enters the future of a call that was just made into all books, once, as made in `frame` of the user; returns it."""
    if isinstance(result, Future):
        future = result
        if id(future) not in living:
            living.note(future, user_frame(frame))
            if journal.depth:
                journal.made.append(future)
            scope = _scope.get()
            if scope is not None:
                scope.add(future)
    return result


def mark() -> int:
    """The place in this thread's journal where a statement begins."""
    return len(journal.made)


def settled(start: int, x: Any) -> Any:
    """`x` in values, after all calls made since `start` have ended; raises the error of the first that failed."""
    if not living:
        return x
    made = journal.made[start:]
    del journal.made[start:]
    wait_in_order(made)
    return deep(x)


def wait_in_order(made: list[AnyFuture]) -> None:
    """Waits for calls in the order of the program; raises the first error that nobody has looked at."""
    for i, future in enumerate(made):
        try:
            if not future.seen:
                force(future)
        except BaseException:
            _abandon(made[i + 1 :])
            raise


def _abandon(futures: Iterable[AnyFuture]) -> None:
    for future in futures:
        future.seen = True


def _earlier_error(made: list[AnyFuture], error: BaseException) -> BaseException | None:
    """The error of a call that plain Python would have met before `error`; forgets the calls after it."""
    for i, future in enumerate(made):
        if future.seen and future.error() is not error:
            continue
        found = error if future.seen else _error_of(future)
        if found is not None:
            _abandon(made[i + 1 :])
            return None if found is error else found
    return None


def _error_of(future: AnyFuture) -> Exception | None:
    try:
        force(future)
    except Exception as error:
        return error
    return None


def _raise_instead(error: BaseException) -> None:
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context


class Guard:
    """Stands around the body of a `try` or `with`: what the body called has ended, and raised, before it is left."""

    __slots__ = ("_start",)

    def __enter__(self) -> None:
        journal.depth += 1
        self._start = len(journal.made)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        journal.depth -= 1
        if len(journal.made) == self._start:
            return
        made = journal.made[self._start :]
        del journal.made[self._start :]
        if error is None:
            wait_in_order(made)
        elif isinstance(error, Exception):
            earlier = _earlier_error(made, error)
            if earlier is not None:
                _raise_instead(earlier)


def handled() -> None:
    """First statement of an `except` block: the user sees a traceback of the user's own lines."""
    strip(sys.exception())


class RunScope:
    """All calls that one run of a workflow made, in whichever of its threads; use as a context manager.

    Leaving the block waits for all of them. An error that nobody has looked at is raised then; when the block itself raises,
    the error of an earlier call goes first, as in plain Python.

    Args:
        carried: context variables that threads started by rewritten code inherit, besides the scope itself.
    """

    def __init__(self, carried: Sequence[ContextVar[Any]] = ()) -> None:
        self._made: list[AnyFuture] = []
        self._lock = threading.Lock()
        self._prune_at = 256
        self.carried = tuple(carried)

    def add(self, future: AnyFuture) -> None:
        """Enters a call; one that has ended well or was looked at may be forgotten."""
        with self._lock:
            self._made.append(future)
            if len(self._made) >= self._prune_at:
                self._made = [f for f in self._made if not _is_over(f)]
                self._prune_at = max(256, 2 * len(self._made))

    def settle(self) -> None:
        """Waits until all calls made so far have ended, without looking at how."""
        with self._lock:
            made = list(self._made)
        for future in made:
            done = threading.Event()
            if future.on_end(done.set):
                with waiting():
                    done.wait()

    def finish(self) -> None:
        """Waits for all calls, also those made meanwhile; raises the first error that nobody has looked at."""
        while self._made:
            with self._lock:
                made, self._made = self._made, []
            wait_in_order(made)

    def __enter__(self) -> RunScope:
        self._token = _scope.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self.finish()
            elif isinstance(error, Exception):
                self._fail(error)
        finally:
            _scope.reset(self._token)

    def _fail(self, error: Exception) -> None:
        earlier = _earlier_error(self._made, error)
        if earlier is not None:
            _raise_instead(earlier)


def _is_over(future: AnyFuture) -> bool:
    return future.has_ended() and (future.seen or not future.has_failed())


_scope: Final[ContextVar[RunScope | None]] = ContextVar("nalar_run_scope", default=None)


def run_scope(carried: Sequence[ContextVar[Any]] = ()) -> RunScope:
    """A scope for one run of a workflow; see `RunScope`."""
    return RunScope(carried)


def run(f: Callable[..., Any], /, *args: Any, carried: Sequence[ContextVar[Any]] = (), **kwargs: Any) -> Any:
    """Runs one workflow to the end of all its calls and returns its result in values."""
    with run_scope(carried):
        return deep(f(*args, **kwargs))


def settle_calls() -> None:
    """Waits until all calls that this run has made have ended, without looking at how; outside of a run it does nothing."""
    scope = _scope.get()
    if scope is not None:
        scope.settle()


def carry_over(receiver: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lets threads that rewritten code starts belong to its run."""
    scope = _scope.get()
    if scope is None:
        return args
    if isinstance(receiver, threading.Thread) and name == "start":
        vars(receiver)["run"] = functools.partial(_run_in, scope, _values_of(scope), receiver.run)
    elif name in ("submit", "map") and args:
        return (functools.partial(_run_in, scope, _values_of(scope), args[0]), *args[1:])
    return args


def _values_of(scope: RunScope) -> list[tuple[ContextVar[Any], Any]]:
    return [(variable, variable.get()) for variable in scope.carried if variable.get(None) is not None]


def _run_in(
    scope: RunScope, carried: list[tuple[ContextVar[Any], Any]], f: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    tokens = [(variable, variable.set(x)) for variable, x in [(_scope, scope), *carried]]
    try:
        return f(*args, **kwargs)
    finally:
        for variable, token in tokens:
            variable.reset(token)
