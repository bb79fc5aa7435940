"""No system, but what it has to beat: plain request and reply through nats-py, two worker processes."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import nats
import nats_process
import uvloop
import work


async def serve(url: str, worker: str) -> None:
    connection = await nats.connect(url)

    async def on_echo(message: Any) -> None:
        await connection.publish(message.reply, message.data)

    async def on_increment(message: Any) -> None:
        await connection.publish(message.reply, b"%d" % (int(message.data) + 1))

    await connection.subscribe(f"{worker}.echo", cb=on_echo)
    await connection.subscribe(f"{worker}.increment", cb=on_increment)
    await asyncio.Event().wait()


async def collect(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


async def measure(url: str) -> None:
    connection = await nats.connect(url)

    async def request(subject: str, x: int) -> int:
        return int((await connection.request(subject, b"%d" % x, timeout=280)).data)

    async def echo(i: int) -> int:
        return await request(f"{i & 1}.echo", i)

    for worker in range(2):
        await nats_process.first_answer(lambda worker=worker: request(f"{worker}.echo", 1))
    work.answered()
    if work.wants("rtt"):
        await work.round_trips_async(lambda i: request("0.echo", i))
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, lambda i: asyncio.ensure_future(echo(i)), collect)
    if work.wants("chain"):
        await work.chain_awaited(lambda x, i: request(f"{i & 1}.increment", x))
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, lambda i: asyncio.ensure_future(echo(i)), collect)
    work.done()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(serve(*sys.argv[1:]))
    else:
        with nats_process.running() as nats_url, nats_process.workers(__file__, [[nats_url, "0"], [nats_url, "1"]]):
            uvloop.run(measure(nats_url))
