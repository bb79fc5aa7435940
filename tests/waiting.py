"""How tests wait for what others do: for a condition, with patience, never for a time."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import pytest

PATIENCE_S = 90.0
_PAUSE_S = 0.01


async def until(
    condition: Callable[[], object], what: str | Callable[[], str] = "it never came true", within_s: float = PATIENCE_S
) -> None:
    """Returns when it holds, or what it awaits does; the test fails and says `what` is wrong if it never does."""
    try:
        async with asyncio.timeout(within_s):
            while not await _holds(condition):
                await asyncio.sleep(_PAUSE_S)
    except TimeoutError:
        pytest.fail(what if isinstance(what, str) else what())


async def until_collected(condition: Callable[[], object], what: str = "somebody still refers to it") -> None:
    """`until`, for what happens when nobody refers to something any more."""

    async def holds() -> object:
        gc.collect()
        return await _holds(condition)

    await until(holds, what)


def eventually(condition: Callable[[], object], what: str) -> None:
    """`until`, where there is no loop."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(what)
        time.sleep(_PAUSE_S)


async def _holds(condition: Callable[[], object]) -> object:
    found = condition()
    return await found if asyncio.iscoroutine(found) else found
