"""Actors that make and take large values."""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from nalar_mq import agent, method, tool, workflow


def text(size: int, mark: int = 0) -> bytes:
    return bytes([mark]) * size


@tool
async def make(size: int, mark: int = 0) -> bytes:
    return text(size, mark)


@tool
def make_in_thread(size: int, mark: int = 0) -> bytes:
    return text(size, mark)


@tool(isolation="process")
def make_in_child(size: int) -> bytes:
    return text(size)


@tool
async def digest(*blobs: bytes) -> str:
    return hashlib.sha256(b"".join(blobs)).hexdigest()


@tool
def digest_in_thread(*blobs: bytes) -> str:
    return hashlib.sha256(b"".join(blobs)).hexdigest()


@tool
async def note(path: str, blob: bytes) -> None:
    Path(path).write_text(str(len(blob)))


@tool
async def where(blob: bytes) -> tuple[int, int]:
    return os.getpid(), len(blob)


@tool(retries=2)
async def hold(blob: bytes, path: str) -> int:
    """Runs until it is let go by a file."""
    Path(path, str(os.getpid())).touch()
    while not Path(path, "go").exists():
        await asyncio.sleep(0.02)
    return len(blob)


@tool
async def pieces(sizes: list[int]):  # type: ignore[no-untyped-def]
    for number, size in enumerate(sizes):
        yield text(size, number)


@tool
def pieces_in_thread(sizes: list[int]) -> Iterator[bytes]:
    for number, size in enumerate(sizes):
        yield text(size, number)


@tool
async def refuse(blob: bytes) -> None:
    raise ValueError(blob)


@agent(stateful=True)
class Pile:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    @method
    async def put(self, blob: bytes) -> list[int]:
        self.sizes.append(len(blob))
        return self.sizes


@workflow
async def passes(size: int) -> str:
    """Passes a value on that it never looks at, and one that it does."""
    unseen, seen = make(size, 1), make_in_thread(size, 2)
    looked = await seen
    return await digest(unseen.later, seen.later, looked)


@workflow
async def answers(size: int) -> list[bytes]:
    return [await make(size, 1), await make_in_thread(size, 2)]
