"""The work that every system is measured by. Runs in the virtual environments of all of them: the standard library only.

A program prints one line of JSON for each thing it has to say, and its parent does the rest:

    {"phase": NAME}                   what is done from now on is measured under this name
    {"figure": NAME, "value": NUMBER}
    {"first": SECONDS}                the first call has been answered, on the machine's monotonic clock
    {"done": true}                    nothing more follows

Everything that comes back is compared with what was sent.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from statistics import quantiles
from typing import Any

RTT_CALLS = int(os.environ.get("BENCH_RTT_CALLS", "2000"))
PIPE_CALLS = int(os.environ.get("BENCH_PIPE_CALLS", "20000"))
FAN_CALLS = int(os.environ.get("BENCH_FAN_CALLS", "130000"))
CHAIN_CALLS = int(os.environ.get("BENCH_CHAIN_CALLS", "1000"))
JOBS = int(os.environ.get("BENCH_JOBS", "1000"))
JOBS_ALONE = int(os.environ.get("BENCH_JOBS_ALONE", "100"))
LARGE_CALLS = int(os.environ.get("BENCH_LARGE_CALLS", "5"))
LARGE_MB = [int(mb) for mb in os.environ.get("BENCH_LARGE_MB", "1,10,100").split(",")]
KEPT_SESSIONS = int(os.environ.get("BENCH_KEPT_SESSIONS", "1000000"))
KEPT_CALLS = int(os.environ.get("BENCH_KEPT_CALLS", "800"))
KEPT_KILLS = int(os.environ.get("BENCH_KEPT_KILLS", "30"))
MOVES = int(os.environ.get("BENCH_MOVES", "40"))
MOVED_MB = int(os.environ.get("BENCH_MOVED_MB", "100"))
IDLE_S = 2.0
_WARM_UP = 100
_SECTIONS = frozenset(os.environ.get("BENCH_SECTIONS", "rtt,pipe,fan,chain").split(","))


def wants(section: str) -> bool:
    """True if this run measures that: `rtt`, `pipe`, `fan` and so on; `bench.measuring` says which there are."""
    return section in _SECTIONS


@cache
def blob(mb: int) -> bytes:
    """A value of so many million bytes, the same in every process."""
    return random.Random(mb).randbytes(mb * 1_000_000)


def phase(name: str) -> None:
    """From now on the system does this."""
    print(json.dumps({"phase": name}), flush=True)


def figure(name: str, value: float) -> None:
    """Says what was measured."""
    print(json.dumps({"figure": name, "value": value}), flush=True)


def answered() -> None:
    """The first call has been answered; returns after a pause in which the memory at rest is measured."""
    print(json.dumps({"first": time.monotonic()}), flush=True)
    phase("idle")
    time.sleep(IDLE_S)
    phase("idle no more")


def done() -> None:
    """Everything has been measured."""
    print(json.dumps({"done": True}), flush=True)


def expect(found: object, wanted: object) -> None:
    """Raises unless they are equal: a wrong answer is worth no measurement."""
    if found != wanted:
        raise SystemExit(f"wrong answer: {str(found)[:200]} in place of {str(wanted)[:200]}")


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest one that was measured."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _tell_round_trips(seconds: Sequence[float], prefix: str) -> None:
    cuts = quantiles(seconds[_WARM_UP:], n=100)
    figure(f"{prefix}rtt_p50_us", round(cuts[49] * 1e6))
    figure(f"{prefix}rtt_p99_us", round(cuts[98] * 1e6))


def round_trips(call: Callable[[int], Any]) -> None:
    """One call after the other, from a plain program."""
    phase("rtt")
    seconds: list[float] = []
    for number in range(RTT_CALLS + _WARM_UP):
        begun = time.perf_counter()
        answer = call(number)
        seconds.append(time.perf_counter() - begun)
        expect(answer, number)
    _tell_round_trips(seconds, "")


async def round_trips_async(call: Callable[[int], Awaitable[Any]], prefix: str = "") -> None:
    """One call after the other, on an event loop."""
    phase(f"{prefix}rtt")
    seconds: list[float] = []
    for number in range(RTT_CALLS + _WARM_UP):
        begun = time.perf_counter()
        answer = await call(number)
        seconds.append(time.perf_counter() - begun)
        expect(answer, number)
    _tell_round_trips(seconds, prefix)


def tell_many(name: str, count: int, seconds: float) -> None:
    """Says how long `count` calls in flight at once took."""
    figure(f"{name}_s", round(seconds, 3))
    figure(f"{name}_per_s", round(count / seconds))


def many(name: str, count: int, submit: Callable[[int], Any], collect: Callable[[list[Any]], Iterable[Any]]) -> None:
    """`count` calls in flight at once, from a plain program."""
    phase(name)
    begun = time.perf_counter()
    answers = list(collect([submit(number) for number in range(count)]))
    tell_many(name, count, time.perf_counter() - begun)
    expect(answers, list(range(count)))


async def many_async(
    name: str, count: int, submit: Callable[[int], Any], collect: Callable[[list[Any]], Awaitable[Iterable[Any]]]
) -> None:
    """`count` calls in flight at once, on an event loop."""
    phase(name)
    begun = time.perf_counter()
    answers = list(await collect([submit(number) for number in range(count)]))
    tell_many(name, count, time.perf_counter() - begun)
    expect(answers, list(range(count)))


async def chain_awaited(increment: Callable[[int, int], Awaitable[int]]) -> None:
    """Calls that each take the former's result, for systems where the caller has to wait for every one of them."""
    phase("chain")
    begun = time.perf_counter()
    value = 0
    for number in range(CHAIN_CALLS):
        value = await increment(value, number)
    figure("chain_ms", round((time.perf_counter() - begun) * 1e3, 1))
    expect(value, CHAIN_CALLS)
