"""A user's own policy: loaded from `FILE.py:Name`, loaded again when the file changes, and contained while it runs.

A policy runs in a thread of its own, with a deadline. A thread and no child process, because it looks at the whole view, some
hundred bytes for each of a million futures: to hand that over would cost more than most policies do. One that does not answer
in time gets an exception in the middle of what it does, which ends any loop in Python; until it has ended, and where that
cannot be done because it waits outside Python, for good, the policy is not asked again before its file changes. What it says
late is dropped. The controller goes on meanwhile, and what was decided before stays in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import itertools
import sys
import threading
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

from nalar_mq.errors import PolicyError, PolicyFailedError, PolicyLoadError, PolicyTimeoutError

from .policy import Action, Policy
from .view import View

DEADLINE_S: Final = 2.0
_MOST_ACTIONS: Final = 100_000  # more than any guard admits
_T = TypeVar("_T")
_Stamp = tuple[int, int, int]


class _OverdueError(BaseException):
    """Raised inside a policy whose time is over; no `except Exception` of its catches it."""


class _Run:
    """One call in a thread of its own.

    Attributes:
        done: the outcome.
        is_over: it has come back, whether anybody waits for that or not.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[object] = self._loop.create_future()
        self.is_over = False
        self._thread = threading.Thread(target=self._work, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[], object]) -> None:
        try:
            result, error = work(), None
        except BaseException as caught:
            result, error = None, caught
        self.is_over = True  # the thread lives on for a moment, with nothing of the user's to do
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: object, error: BaseException | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(PolicyFailedError(_told(error)))

    def interrupt(self) -> None:
        """Raises an exception in it, at its next step in Python."""
        if self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(_OverdueError))


def _told(error: BaseException) -> str:
    """What went wrong in user code, and in which line."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno})"
    line = next((frame.lineno for frame in reversed(frames) if frame.filename != __file__), None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


class Contained:
    """Runs code that is not trusted to end or to work; one call at a time."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._run: _Run | None = None

    @property
    def is_stuck(self) -> bool:
        """True if a call that was given up has not ended."""
        return self._run is not None and not self._run.is_over

    async def call(self, work: Callable[[], _T], name: str) -> _T:
        """What `work` returns.

        Raises:
            PolicyFailedError: it raised.
            PolicyTimeoutError: it did not return in time, or a former one still has not.
        """
        if self.is_stuck:
            raise PolicyTimeoutError(f"{name} has still not come back from a former call")
        self._run = run = _Run(work, name)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await run.done  # type: ignore[return-value]
        except TimeoutError:
            raise PolicyTimeoutError(f"{name} did not answer within {self._deadline_s:g} s") from None
        finally:
            if not run.done.done() or run.done.cancelled():
                run.interrupt()


class PolicyFile:
    """The policy that `FILE.py:Name` names: a class without arguments, or an object, with a method `decide`.

    Args:
        where: the file and the name in it.
        deadline_s: for loading it, and for each answer.
    """

    def __init__(self, where: str, *, deadline_s: float = DEADLINE_S) -> None:
        file, _, name = where.rpartition(":")
        if not file or not name.isidentifier():
            raise PolicyLoadError(f"{where!r} names no policy: write it as FILE.py:Name")
        self._path = Path(file)
        self._name = name
        self._deadline_s = deadline_s
        self._contained = Contained(deadline_s)
        self._policy: Policy | None = None
        self._stamp: _Stamp | None = None

    def __str__(self) -> str:
        return f"{self._path}:{self._name}"

    @property
    def is_stuck(self) -> bool:
        """True if it is still busy with an answer that nobody waits for any more."""
        return self._contained.is_stuck

    def has_changed(self) -> bool:
        """True if the file is another than the one that was loaded last, or that could not be."""
        return self._present() != self._stamp

    def _present(self) -> _Stamp:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return found.st_mtime_ns, found.st_size, found.st_ino

    async def load(self) -> None:
        """Loads the file as it is now; a former policy stays in its place if that fails.

        Raises:
            PolicyLoadError: there is no such file or name, it cannot be imported, or it is no policy.
        """
        self._stamp = self._present()
        contained = Contained(self._deadline_s)
        try:
            policy = await contained.call(lambda: _loaded(self._path, self._name), str(self))
        except PolicyLoadError:
            raise
        except PolicyError as error:
            raise PolicyLoadError(f"{self._path} cannot be imported: {error}") from None
        if isinstance(policy, PolicyLoadError):
            raise policy
        self._policy = policy
        self._contained = Contained(self._deadline_s)

    async def decide(self, view: View) -> list[Action]:
        """What the policy says to a view.

        Raises:
            PolicyFailedError, PolicyTimeoutError: it does not.
        """
        policy = self._policy
        if policy is None:
            raise PolicyFailedError(f"{self} has not been loaded")
        return await self._contained.call(lambda: list(itertools.islice(policy.decide(view), _MOST_ACTIONS)), str(self))


def needs_nothing(policy: type) -> bool:
    """True if a class can be made without arguments."""
    try:
        parameters = inspect.signature(policy).parameters.values()
    except (TypeError, ValueError):
        return True
    return all(
        parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in parameters
    )


def _loaded(path: Path, name: str) -> Policy | PolicyLoadError:
    """The policy of that name; errors of the user's are returned, since an exception would be taken for one of the file's."""
    try:
        source = path.read_bytes()
    except OSError as error:
        return PolicyLoadError(f"{path} cannot be read: {error.strerror or error}")
    module = ModuleType(f"nalar_policy.{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    if name not in vars(module):
        known = [key for key in vars(module) if not key.startswith("_")]
        close = get_close_matches(name, known, n=1)
        return PolicyLoadError(f"there is no {name!r} in {path}" + (f": did you mean {close[0]!r}?" if close else ""))
    found = vars(module)[name]
    if isinstance(found, type) and not needs_nothing(found):
        advice = f"make it there, as in `made = {name}(...)`, and name `made`"
        return PolicyLoadError(f"{name!r} in {path} takes arguments: {advice}")
    policy = found() if isinstance(found, type) else found
    if not callable(getattr(policy, "decide", None)):
        return PolicyLoadError(f"{name!r} in {path} is no policy: it has no method `decide(view)`")
    return policy  # type: ignore[no-any-return]
