"""Calls that wait for one argument, until a file is there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from nalar_mq import tool

GATE = Path(os.environ.get("BENCH_ALIVE_GATE", "gate"))


@tool
async def hold() -> int:
    """One, once the file is there."""
    while not GATE.exists():
        await asyncio.sleep(0.01)
    return 1


@tool
async def add(held: int, number: int) -> int:
    """Waits for `held`."""
    return held + number
