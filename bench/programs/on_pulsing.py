"""Pulsing: two actors on nodes of their own. Its connection pool ends above some 32 calls in flight, so 16 at a time."""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from typing import Any

import nats_process
import pulsing
import work

_AT_ONCE = 16


class Echo(pulsing.Actor):  # type: ignore[misc]
    async def receive(self, msg: Any) -> Any:
        return {"x": msg["x"] + msg["added"]}


async def serve(port: int, seed: int, worker: str) -> None:
    await pulsing.init(addr=f"127.0.0.1:{port}", seeds=[f"127.0.0.1:{seed}"])
    await pulsing.spawn(Echo(), name=f"actors/echo{worker}", public=True)
    await asyncio.Event().wait()


async def windowed(name: str, count: int, call: Any) -> None:
    """`count` calls, `_AT_ONCE` of them in flight."""
    work.phase(name)
    numbers = iter(range(count))

    async def go_on() -> None:
        for number in numbers:
            work.expect(await call(number), number)

    begun = time.perf_counter()
    await asyncio.gather(*[go_on() for _ in range(_AT_ONCE)])
    work.tell_many(name, count, time.perf_counter() - begun)


async def measure(port: int) -> None:
    system = await pulsing.init(addr=f"127.0.0.1:{port}")
    ports = [nats_process.free_port() for _ in range(2)]
    arguments = [[str(own), str(port), str(number)] for number, own in enumerate(ports)]
    with nats_process.workers(__file__, arguments):
        actors = [await system.resolve_named(f"actors/echo{number}", timeout=20) for number in range(2)]

        async def call(worker: int, x: int, added: int = 0) -> Any:
            answer = await actors[worker].ask({"x": x, "added": added})
            return pickle.loads(answer.payload)["x"]  # an answer from another node comes as pulsing has packed it

        work.expect([await call(0, 1), await call(1, 1)], [1, 1])
        work.answered()
        if work.wants("rtt"):
            await work.round_trips_async(lambda i: call(0, i))
        if work.wants("pipe"):
            await windowed("pipe", work.PIPE_CALLS, lambda i: call(i & 1, i))
        if work.wants("chain"):
            await work.chain_awaited(lambda x, i: call(i & 1, x, 1))
        if work.wants("fan"):
            await windowed("fan", work.FAN_CALLS, lambda i: call(i & 1, i))
        work.done()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
    else:
        asyncio.run(measure(nats_process.free_port()))
