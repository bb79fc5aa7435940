"""How tests wait for what other processes do: for a condition, with patience, never for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

PATIENCE_S = 90.0


async def until(condition: Callable[[], object], what: str) -> None:
    """Returns when it holds; the test fails and says `what` is wrong if it never does."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(what)
