"""FastStream: request and reply over NATS, two worker processes in a queue group."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import nats_process
import work
from faststream.nats import NatsBroker


async def serve(url: str) -> None:
    broker = NatsBroker(url, logger=None)

    async def echo(x: int) -> int:
        return x

    async def increment(x: int) -> int:
        return x + 1

    broker.subscriber("echo", queue="workers", max_workers=1)(echo)
    broker.subscriber("increment", queue="workers", max_workers=1)(increment)
    await broker.start()
    await asyncio.Event().wait()


async def collect(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


async def measure(url: str) -> None:
    broker = NatsBroker(url, logger=None)
    await broker.start()

    async def echo(x: int) -> Any:
        return await (await broker.request(x, "echo", timeout=280)).decode()

    async def increment(x: int, _: int) -> Any:
        return await (await broker.request(x, "increment", timeout=280)).decode()

    await nats_process.first_answer(lambda: echo(1))
    work.answered()
    if work.wants("rtt"):
        await work.round_trips_async(echo)
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, lambda i: asyncio.ensure_future(echo(i)), collect)
    if work.wants("chain"):
        await work.chain_awaited(increment)
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, lambda i: asyncio.ensure_future(echo(i)), collect)
    work.done()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(serve(sys.argv[1]))
    else:
        with nats_process.running() as nats_url, nats_process.workers(__file__, [[nats_url]] * 2):
            asyncio.run(measure(nats_url))
