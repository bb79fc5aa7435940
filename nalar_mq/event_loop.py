"""The event loop of a process of ours, uvloop where it is installed and asyncio's own elsewhere; and how its tasks end."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable, Coroutine, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

T = TypeVar("T")
_CANCEL_AGAIN_S = 0.25

# Calls in flight are many small objects that end by reference counting: a collection over them costs more than all the rest
# of a call and finds nothing. Python's own first threshold is 700; with 50,000 a fan of 130,000 calls takes a tenth longer.
# Dead cycles may take some tens of megabytes before they are found; the runtime itself makes next to none.
_COLLECT_AFTER = 200_000


class BlockingLoopError(RuntimeError):
    """A thread's way of waiting was used on the event loop, where it would wait for ever."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"{what} would block the event loop it depends on: use {instead}")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on a fresh loop and returns what it returns; an interrupt cancels it and is raised afterwards."""
    gc.set_threshold(_COLLECT_AFTER, 20, 20)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]], *, again_s: float = _CANCEL_AGAIN_S) -> None:
    """Cancels tasks and returns when they have ended, also if this is cancelled itself meanwhile; that is raised then.

    Cancels again what goes on after `again_s`: `asyncio.wait_for` of Python 3.11, which the broker's client uses, may lose a
    cancellation. Tasks that clean up for longer want a longer one.
    """
    loop = asyncio.get_running_loop()
    pending = {task for task in tasks if not task.done()} - {asyncio.current_task()}
    was_cancelled, again = False, -math.inf
    while pending:
        now = loop.time()
        if now >= again:
            again = now + again_s
            for task in pending:
                task.cancel()
        try:
            await asyncio.wait(pending, timeout=again - now)
        except asyncio.CancelledError:
            was_cancelled = True
        pending = {task for task in pending if not task.done()}
    if was_cancelled:
        raise asyncio.CancelledError


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    return factory


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread; None if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
