"""This runtime: the embedded broker, a local controller with two worker processes, and a client, as `nalar run` has them.

What only one benchmark needs is imported for that one: the start of this program is measured, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import nalar_app
import nats_process
import work

from nalar_mq import Client, connect, event_loop, gather
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController

WORKERS = 2


async def sessions_apart() -> list[str]:
    """One session for each worker process."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < WORKERS:
        session = f"s{number}"
        found.setdefault(await nalar_app.Echo.process.options(session=session)(), session)
        number += 1
    return list(found.values())


async def chain(figure: str, increments: list[Any]) -> None:
    """Futures are passed on before they have a value; the client waits for the last one only."""
    work.phase(figure)
    begun = time.perf_counter()
    value: Any = 0
    for number in range(work.CHAIN_CALLS):
        value = increments[number % len(increments)](value)
    result = await value
    work.figure(figure, round((time.perf_counter() - begun) * 1e3, 1))
    work.expect(result, work.CHAIN_CALLS)


async def measure(client: Client) -> None:
    """Everything, one after the other."""
    work.expect(await client.call("echo", 1), 1)
    work.answered()
    sessions = await sessions_apart()
    echoes = [nalar_app.Echo.echo.options(session=session) for session in sessions]
    increments = [nalar_app.Echo.increment.options(session=session) for session in sessions]

    async def collect(futures: list[Any]) -> tuple[Any, ...]:
        return await gather(*futures)

    if work.wants("rtt"):
        await work.round_trips_async(echoes[0])
        await work.round_trips_async(nalar_app.echo, "tool_")
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, lambda i: echoes[i & 1](i), collect)
        await work.many_async("tool_pipe", work.PIPE_CALLS, nalar_app.echo, collect)
    if work.wants("chain"):
        await chain("chain_ms", increments)
        await chain("chain_affinity_ms", increments[:1])
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, lambda i: echoes[i & 1](i), collect)
    if work.wants("stages"):
        await stages()
    if work.wants("jobs"):
        await jobs(client, "jobs")


async def stages() -> None:
    """Where the time of one call goes: medians of each stage."""
    work.phase("stages")
    found: dict[str, list[float]] = {}
    calls: list[tuple[float, ...]] = []
    stamped = nalar_app.Echo.stamped.options(session="stages")
    for _ in range(work.RTT_CALLS):
        nalar_app.STAMPS.take_left()
        begun = time.monotonic()
        future = stamped()
        made = time.monotonic()
        left_before, there, first_line = await future
        calls.append(
            (begun, made, nalar_app.STAMPS.take_left(), there, first_line, nalar_app.STAMPS.came, time.monotonic(), left_before)
        )
    names = ("made", "sent", "there", "begun", "answered", "back", "awaited", "whole")
    for call, later in pairwise(calls[work.RTT_CALLS // 4 :]):
        begun, made, sent, there, first_line, back, awaited, _ = call
        answered = later[-1]
        times = (begun, made, sent, there, first_line, answered, back, awaited)
        for name, took in zip(names, [*[b - a for a, b in pairwise(times)], awaited - begun], strict=True):
            found.setdefault(name, []).append(took)
    for name, seconds in found.items():
        work.figure(f"stage_{name}_us", round(median(seconds) * 1e6, 1))


async def jobs(client: Client, prefix: str) -> None:
    """Jobs of three calls each: one after the other, then many at once. Every one is durable when `submit` returns."""
    work.phase(prefix)
    seconds: list[float] = []
    for number in range(work.JOBS_ALONE):
        begun = time.perf_counter()
        answer = await (await client.submit("three_steps", number)).result()
        seconds.append(time.perf_counter() - begun)
        work.expect(answer, number)
    work.figure(f"{prefix.replace('jobs', 'job')}_p50_ms", round(median(seconds) * 1e3, 2))

    async def one(number: int) -> Any:
        return await (await client.submit("three_steps", number)).result()

    begun = time.perf_counter()
    answers = await asyncio.gather(*[one(number) for number in range(work.JOBS)])
    work.figure(f"{prefix}_per_s", round(work.JOBS / (time.perf_counter() - begun), 1))
    work.expect(answers, list(range(work.JOBS)))


@contextlib.asynccontextmanager
async def runtime(access: BrokerAccess, local_store: str, namespace: str = "bench") -> AsyncIterator[Client]:
    """Two worker processes and a client on a broker, with a folder for large values or `off`."""
    seed = int(os.environ.get("BENCH_SEED", "0"))
    settings = Settings(broker=access, namespace=namespace, node="bench", local_store=local_store)
    app = Path(nalar_app.__file__)
    async with (
        LocalController(
            app,
            settings,
            workers=WORKERS,
            rng=random.Random(seed),
            variables={"NALAR_LOCAL_STORE": local_store},
            log_level="warning",
        ) as controller,
        connect(settings=settings, random=random.Random(seed)) as client,
    ):
        await asyncio.gather(controller.ready(), client.wait_for("echo"))
        yield client


async def with_kept_sessions(access: BrokerAccess, folder: Path) -> None:
    """What is measured with sessions in stores."""
    wanted = [part for part in ("state", "recovery", "moving") if work.wants(part)]
    if not wanted:
        return
    kept = import_module("kept")
    sessions = kept.Bench(access, folder)
    if "state" in wanted:
        await kept.state(sessions)
    if "recovery" in wanted:
        await kept.recovery(sessions)
    if "moving" in wanted:
        await import_module("moving").measure(sessions)


async def main() -> None:
    """Starts everything and ends it afterwards; again for jobs without sync, and for large values without a folder."""
    with tempfile.TemporaryDirectory(prefix="nalar-bench-", ignore_cleanup_errors=True) as folder:
        store = str(Path(folder) / "large")
        async with EmbeddedBroker(Path(folder)) as broker:
            async with runtime(broker.access, store) as client:
                await measure(client)
                if work.wants("large"):
                    await import_module("large").near(broker.access, "bench")
            if work.wants("large"):
                async with runtime(broker.access, "off", "apart"):
                    await import_module("large").through_broker(broker.access, "apart")
            await with_kept_sessions(broker.access, Path(folder) / "kept")
        if work.wants("jobs"):
            with nats_process.running("-js", "-sd", str(Path(folder) / "unsynced")) as url:
                async with runtime(BrokerAccess(urls=(url,)), store) as client:
                    await jobs(client, "jobs_nosync")
    work.done()


if __name__ == "__main__":
    event_loop.run(main())
