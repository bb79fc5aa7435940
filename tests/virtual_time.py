"""Tests that are played in virtual time: a loop that does not wait."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

from nalar_mq import simulation


def simulated(scene: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test that plays `scene`, with the fixtures that it asks for."""

    @functools.wraps(scene)
    def test(**fixtures: object) -> None:
        async def play() -> None:
            async with asyncio.timeout(100_000):
                await scene(**fixtures)

        simulation.run(play())

    return test
