"""Ray: two actors in processes of their own, on a cluster of this machine."""

from __future__ import annotations

import time
from typing import Any, cast

import ray
import work


@ray.remote(num_cpus=1)
class Echo:
    def echo(self, x: int) -> int:
        return x

    def increment(self, x: int) -> int:
        return x + 1


def main() -> None:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=1 << 29,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    actors: list[Any] = [cast("Any", Echo).remote() for _ in range(2)]
    work.expect(ray.get([actor.echo.remote(1) for actor in actors]), [1, 1])
    work.answered()
    if work.wants("rtt"):
        work.round_trips(lambda i: ray.get(actors[0].echo.remote(i)))
    if work.wants("pipe"):
        work.many("pipe", work.PIPE_CALLS, lambda i: actors[i & 1].echo.remote(i), ray.get)
    if work.wants("chain"):
        work.phase("chain")
        begun = time.perf_counter()
        value: Any = 0
        for number in range(work.CHAIN_CALLS):
            value = actors[number & 1].increment.remote(value)
        result = ray.get(value)
        work.figure("chain_ms", round((time.perf_counter() - begun) * 1e3, 1))
        work.expect(result, work.CHAIN_CALLS)
    if work.wants("fan"):
        work.many("fan", work.FAN_CALLS, lambda i: actors[i & 1].echo.remote(i), ray.get)
    work.done()


if __name__ == "__main__":
    main()
