"""An asyncio event loop in virtual time: when every task waits, the clock jumps to the next timer.

Hours of protocol pass in milliseconds, and a run is a function of its seed: nothing in the loop reads the wall clock, the
operating system's randomness, sockets or threads. `run_in_executor` (and so `asyncio.to_thread`) calls its function on the
loop, in a later turn; code that would block there for the loop itself cannot be simulated.

Iteration over sets of strings depends on `PYTHONHASHSEED`; code that is to be replayed from a seed does not decide by it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class DeadlockError(RuntimeError):
    """Every task waits and no timer is set: the simulated program can never go on.

    Attributes:
        waiting: names of the tasks that had not ended.
    """

    def __init__(self, at_s: float, waiting: tuple[str, ...]) -> None:
        shown = ", ".join(waiting[:8]) + (f" and {len(waiting) - 8} more" if len(waiting) > 8 else "")
        super().__init__(f"deadlock at {at_s:.6f} s: nothing is scheduled and these tasks wait: {shown or 'none'}")
        self.waiting = waiting


class _Clock:
    """Takes the place of the selector: to wait is to move the time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def select(self, timeout_s: float | None) -> list[NoReturn]:
        if timeout_s is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(asyncio.get_running_loop()))
            raise DeadlockError(self.now_s, tuple(waiting))
        if timeout_s > 0:
            self.now_s += timeout_s
        return []


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop whose time is its own. `random` is seeded and belongs to the simulation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self._selector = _Clock()

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._selector.now_s

    def run_in_executor(self, executor: Executor | None, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts) -> asyncio.Future[_T]:
        """Calls `func` on the loop itself, in a later turn; `executor` is ignored."""
        future: asyncio.Future[_T] = self.create_future()

        def call() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_soon(call)
        return future

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""


def run(main: Coroutine[Any, Any, _T], seed: int = 0) -> _T:
    """Runs `main` in a `SimulatedLoop` of its own and returns its result; what it left running is cancelled.

    Raises:
        DeadlockError: every task waits and no timer is set.
    """
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(seed)) as runner:
        return runner.run(main)
