"""The tools of a long job, which write down every run outside: see `witness`."""

import asyncio

from witness import note

from nalar_mq import tool


@tool
async def square(key: str, n: int, seconds: float) -> int:
    note("began", key)
    await asyncio.sleep(seconds)
    note("ended", key)
    return n * n


@tool
async def fold(key: str, folded: int, order: list[int]) -> int:
    """What depends on everything before it, and on its order."""
    note("began", key)
    for n in order:
        folded = (folded * 31 + n) % 1_000_003
    note("ended", key)
    return folded
