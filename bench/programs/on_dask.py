"""Dask: two actors in worker processes; its chain is one of tasks, whose futures can be passed on."""

from __future__ import annotations

import time
from typing import Any

import dask
import work
from distributed import Client, LocalCluster


class Echo:
    def echo(self, x: int) -> int:
        return x


def increment(x: int) -> int:
    return x + 1


def results(futures: list[Any]) -> list[Any]:
    return [future.result() for future in futures]


def main() -> None:
    dask.config.set({"distributed.worker.memory.terminate": False, "distributed.admin.log-length": 0})
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0, silence_logs=50
    )
    client = Client(cluster)
    names = list(client.scheduler_info()["workers"])
    actors: list[Any] = [client.submit(Echo, actor=True, workers=[name], pure=False).result() for name in names]
    work.expect(results([actor.echo(1) for actor in actors]), [1, 1])
    work.answered()
    if work.wants("rtt"):
        work.round_trips(lambda i: actors[0].echo(i).result())
    if work.wants("pipe"):
        work.many("pipe", work.PIPE_CALLS, lambda i: actors[i & 1].echo(i), results)
    if work.wants("chain"):
        work.phase("chain")
        begun = time.perf_counter()
        value: Any = 0
        for _ in range(work.CHAIN_CALLS):
            value = client.submit(increment, value, pure=False)
        result = value.result()
        work.figure("chain_ms", round((time.perf_counter() - begun) * 1e3, 1))
        work.expect(result, work.CHAIN_CALLS)
    if work.wants("fan"):
        work.many("fan", work.FAN_CALLS, lambda i: actors[i & 1].echo(i), results)
    work.done()


if __name__ == "__main__":
    main()
