"""xoscar: two actors in processes of their own, over direct sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import work
import xoscar


class Echo(xoscar.Actor):  # type: ignore[misc]
    async def echo(self, x: int) -> int:
        return x

    async def increment(self, x: int) -> int:
        return x + 1


async def collect(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


async def main() -> None:
    pool = await xoscar.create_actor_pool("127.0.0.1:0", n_process=2, subprocess_start_method="spawn")
    actors = [await xoscar.create_actor(Echo, address=a, uid=a) for a in list(pool.sub_processes)]
    work.expect([await actor.echo(1) for actor in actors], [1, 1])
    work.answered()

    def submit(i: int) -> Any:
        return asyncio.ensure_future(actors[i & 1].echo(i))

    if work.wants("rtt"):
        await work.round_trips_async(actors[0].echo)
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, submit, collect)
    if work.wants("chain"):
        await work.chain_awaited(lambda x, i: actors[i & 1].increment(x))
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, submit, collect)
    work.done()
    await pool.stop()


if __name__ == "__main__":
    asyncio.run(main())
