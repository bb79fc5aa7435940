"""What ends tasks that a library keeps from ending."""

from __future__ import annotations

import asyncio
import contextlib

from nalar_mq.commands import _first


async def deaf(heard: list[str]) -> None:
    """Loses its first cancellation, as `asyncio.wait_for` of Python 3.11 may."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(600)
    heard.append("cancelled")
    await asyncio.sleep(600)


async def test_a_task_that_loses_a_cancellation_holds_up_nobody() -> None:
    heard: list[str] = []
    async with asyncio.timeout(30):
        await _first(asyncio.sleep(0.01), deaf(heard))
    assert heard == ["cancelled"]
