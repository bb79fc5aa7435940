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
from typing import Any, Final, NoReturn, TypeVar, TypeVarTuple, Unpack

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_INSTANT_S: Final = 0.001
_LAST_ROUNDS = 100
_TURNS_AT_ONCE: Final = 1_000_000
_EPOCH_S: Final = 1_577_836_800.0  # every simulation begins with the year 2020
_READING_S: Final = 1e-5


class DeadlockError(RuntimeError):
    """Every task waits and no timer is set: the simulated program can never go on.

    Attributes:
        waiting: names of the tasks that had not ended.
    """

    def __init__(self, at_s: float, waiting: tuple[str, ...]) -> None:
        shown = ", ".join(waiting[:8]) + (f" and {len(waiting) - 8} more" if len(waiting) > 8 else "")
        super().__init__(f"deadlock at {at_s:.6f} s: nothing is scheduled and these tasks wait: {shown or 'none'}")
        self.waiting = waiting


class LivelockError(RuntimeError):
    """The simulated program goes on and on, and time does not: something is done again and again without a pause.

    Attributes:
        turns: how often the loop has turned.
    """

    def __init__(self, at_s: float, turns: int) -> None:
        super().__init__(f"livelock at {at_s:.6f} s: the loop has turned {turns:,} times within {_INSTANT_S * 1e3:.0f} ms")
        self.turns = turns


class _Clock:
    """Takes the place of the selector: to wait is to move the time."""

    def __init__(self, turns_at_once: int) -> None:
        self.now_s = 0.0
        self._turns_at_once = turns_at_once
        self._instant_s = 0.0
        self._turns = 0

    def select(self, timeout_s: float | None) -> list[NoReturn]:
        if timeout_s is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(asyncio.get_running_loop()))
            raise DeadlockError(self.now_s, tuple(waiting))
        if timeout_s > 0:
            self.now_s += timeout_s
        self._turns += 1
        if self.now_s - self._instant_s > _INSTANT_S:
            self._instant_s, self._turns = self.now_s, 0
        elif self._turns > self._turns_at_once:
            turns, self._turns = self._turns, 0
            raise LivelockError(self.now_s, turns)
        return []


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop whose time is its own. `random` is seeded and belongs to the simulation."""

    def __init__(self, seed: int = 0, turns_at_once: int = _TURNS_AT_ONCE) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self._selector = _Clock(turns_at_once)
        self._wall_s = _EPOCH_S

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._selector.now_s

    def wall_time(self) -> float:
        """Seconds since 1970, for all that is simulated to read from the wall: no two readings are the same."""
        self._wall_s = max(_EPOCH_S + self._selector.now_s, self._wall_s + _READING_S)
        return self._wall_s

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


def run(main: Coroutine[Any, Any, _T], seed: int = 0, turns_at_once: int = _TURNS_AT_ONCE) -> _T:
    """Runs `main` in a `SimulatedLoop` of its own and returns its result; what it left running is cancelled.

    Args:
        main: the program.
        seed: of the loop's `random`.
        turns_at_once: how often the loop may turn within a millisecond of its time.

    Raises:
        DeadlockError: every task waits and no timer is set.
        LivelockError: the loop has turned more often than that.
    """
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(seed, turns_at_once)) as runner:
        try:
            return runner.run(main)
        finally:
            runner.run(_end_the_rest())


async def _end_the_rest() -> None:
    """Cancels what is left, and what that begins in its turn: the loop would end before that has had its first one."""
    for _ in range(_LAST_ROUNDS):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        for task in others:
            task.cancel()
        await asyncio.sleep(0)
