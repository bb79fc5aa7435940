"""Coroutines that seldom suspend, run on the event loop without a task for each of them.

    given ──▶ ready ──▶ runs in the runner's task, one after the other ──▶ ended
                              │
                              └─ suspends: the task is its own from now on, and the runner takes another for the rest

Many calls to async code never wait for anything. Here such a call costs no task and no turn of the loop, and what several of
them send leaves together. Each coroutine has a context (`contextvars`) of its own, in which all of its steps run, and finds
itself in a task that nobody else uses once it has suspended: `asyncio.timeout`, `asyncio.TaskGroup` and `cancel` work.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

from nalar_mq.logs import logger

# What runs before others on the loop get their turn: so many coroutines, or as many as end in that time. All that they send
# to one process in one turn is one frame, and a frame costs its three processes as much as some ten of the calls in it. The
# time is that for which Python lets a thread keep others waiting; with 3 ms, 20,000 calls at once cost a tenth more CPU.
_PER_TURN: Final = 256
_TURN_S: Final = 0.005
_log = logger(__name__)

OnSuspend = Callable[["asyncio.Task[None]"], None]


class Runner:
    """Runs coroutines in the order in which they were given, each until it ends or first suspends; all on one loop.

    `on_pause` is called when one has ended that had a task to itself, or all that were ready have been run. `clock` is asked
    how long a turn takes: that of the loop may stand still meanwhile.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_pause: Callable[[], None], clock: Callable[[], float]) -> None:
        self._loop = loop
        self._on_pause = on_pause
        self._clock = clock
        self._ready: deque[tuple[Coroutine[Any, Any, None], contextvars.Context, OnSuspend]] = deque()
        self._task: asyncio.Task[None] | None = None

    def run(self, coroutine: Coroutine[Any, Any, None], variables: contextvars.Context, on_suspend: OnSuspend) -> None:
        """Runs `coroutine` soon, in the context `variables`; `on_suspend` gets its task when it first suspends."""
        self._ready.append((coroutine, variables, on_suspend))
        if self._task is None:
            self._begin()

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._work())

    async def _work(self) -> None:
        task = self._task
        assert task is not None
        clock = self._clock
        left, until = _PER_TURN, clock() + _TURN_S
        try:
            while self._ready and not task.cancelling():
                coroutine, variables, on_suspend = self._ready.popleft()
                try:
                    awaited = variables.run(coroutine.send, None)
                except StopIteration:
                    pass  # most never suspend: they cost no generator of their own
                except Exception:
                    _log.exception("runner.coroutine_failed")
                else:
                    on_suspend(task)
                    self._hand_over()
                    await self._rest(coroutine, variables, awaited)
                    return
                left -= 1
                if not left or clock() > until:
                    await asyncio.sleep(0)
                    left, until = _PER_TURN, clock() + _TURN_S
        finally:
            if self._task is task:
                self._hand_over()
            self._on_pause()

    def _hand_over(self) -> None:
        """The task of now belongs to the coroutine in it, or ends; another one does the rest."""
        self._task = None
        if self._ready:
            self._begin()

    @types.coroutine
    def _rest(
        self, coroutine: Coroutine[Any, Any, None], variables: contextvars.Context, awaited: Any
    ) -> Generator[Any, Any, None]:
        """Runs a coroutine that waits for `awaited` to its end."""
        step: Callable[[Any], Any] = coroutine.send
        sent: Any = None
        while True:
            try:
                sent = yield awaited
                step = coroutine.send
            except BaseException as error:
                step, sent = coroutine.throw, error
            try:
                awaited = variables.run(step, sent)
            except StopIteration:
                return
            except Exception:
                _log.exception("runner.coroutine_failed")
                return

    def close(self) -> None:
        """Drops what has not begun."""
        while self._ready:
            self._ready.popleft()[0].close()
