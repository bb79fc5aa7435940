"""What ends tasks that a library keeps from ending."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from nalar_mq.commands import _first
from nalar_mq.event_loop import cancel_all


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


async def release(heard: list[str]) -> None:
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(0.6)
        heard.append("released")


async def nested(heard: list[str]) -> None:
    await _first(asyncio.sleep(600), release(heard))


async def test_a_task_that_cleans_up_for_long_is_left_to_do_so() -> None:
    heard: list[str] = []
    await _first(asyncio.sleep(0.01), release(heard), nested(heard))
    assert heard == ["released", "released"]


async def test_who_ends_tasks_and_is_ended_himself_leaves_none_behind() -> None:
    heard: list[str] = []
    task = asyncio.create_task(release(heard))
    await asyncio.sleep(0)
    ending = asyncio.create_task(cancel_all([task], again_s=60.0))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert task.cancelled()
    assert heard == ["released"]
