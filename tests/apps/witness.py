"""Actors that write down every run in one file which outlives whoever writes: `began KEY PID` and `ended KEY PID`."""

import asyncio
import os
import time

from nalar_mq import gather, tool, workflow


def note(what: str, key: str) -> None:
    """One line, whole and in its order, whatever becomes of this process."""
    file = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{what} {key} {os.getpid()}\n".encode())
    finally:
        os.close(file)


@tool
async def square(key: str, n: int, seconds: float) -> int:
    note("began", key)
    await asyncio.sleep(seconds)
    note("ended", key)
    return n * n


@workflow(concurrency=64)
async def steps(key: str, n: int, seconds: float) -> int:
    """Two calls one after the other, two beside each other, and one that needs both."""
    first = await square(f"{key}/1", n, seconds)
    second = await square(f"{key}/2", first + 1, seconds)
    left, right = await gather(square(f"{key}/3", second % 7, seconds), square(f"{key}/4", second % 11, seconds))
    return await square(f"{key}/5", left + right, seconds)


@workflow
async def patient(key: str, seconds: float) -> int:
    """One call that takes its time."""
    return await square(key, 3, seconds)


@tool
async def hog(key: str, seconds: float) -> str:
    """Does to the event loop what nobody should."""
    note("began", key)
    time.sleep(seconds)
    note("ended", key)
    return "done"


@workflow
async def hogged(key: str, seconds: float) -> str:
    return await hog(key, seconds)


@tool
async def weigh(key: str, load: bytes) -> int:
    note("began", key)
    note("ended", key)
    return len(load)
