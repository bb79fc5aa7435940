"""The event loop of a process of ours: uvloop where it is installed, asyncio's own elsewhere."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

T = TypeVar("T")

# Calls in flight are many small objects that end by reference counting: a collection over them costs more than all the rest
# of a call and finds nothing. Python's own first threshold is 700.
_COLLECT_AFTER = 50_000


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on a fresh loop and returns what it returns; an interrupt cancels it and is raised afterwards."""
    gc.set_threshold(_COLLECT_AFTER, 20, 20)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    return factory
