"""Workflows for the tests of jobs and of calls from other programs. What happens is written down where the tests look."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from nalar_mq import ask, context, tool, workflow

GATES: dict[str, asyncio.Event] = {}
RUNS: list[str] = []


def note(line: str) -> None:
    RUNS.append(line)
    if "JOBS_LOG" in os.environ:
        with Path(os.environ["JOBS_LOG"]).open("a") as log:
            log.write(f"{line} {os.getpid()}\n")


@dataclass
class Point:
    x: int
    y: int = 0


@tool
async def double(x: int) -> int:
    note(f"double {x}")
    return 2 * x


@workflow
async def answer(question: str, times: int = 1) -> dict[str, Any]:
    note(f"answer {question}")
    return {"answer": question.upper() * times, "score": await double(times)}


@tool
async def whose() -> str:
    return context().tenant


@workflow
async def on_behalf(gate: str = "") -> list[str]:
    """The tenant of its own call, and of one that it makes."""
    note(f"on_behalf {context().tenant}")
    if gate:
        await GATES.setdefault(gate, asyncio.Event()).wait()
    return [context().tenant, await whose()]


@workflow
async def move(point: Point, by: int) -> Point:
    return Point(point.x + by, point.y)


@workflow(concurrency=3)
async def gated(name: str) -> str:
    note(f"gated {name}")
    gate = GATES.setdefault(name.partition("-")[0], asyncio.Event())
    await gate.wait()
    return name


@workflow
async def gated_twice(name: str) -> int:
    """Has a call behind it when it waits."""
    found = await double(1)
    note(f"gated_twice {name}")
    await GATES.setdefault(name, asyncio.Event()).wait()
    return found


@workflow
async def gated_broken(name: str) -> None:
    note(f"gated_broken {name}")
    await GATES.setdefault(name, asyncio.Event()).wait()
    raise ValueError("it broke")


@workflow(retries=2)
async def flaky(name: str, failures: int) -> int:
    note(f"flaky {name}")
    tried = RUNS.count(f"flaky {name}")
    if tried <= failures:
        raise ValueError(f"attempt {tried}")
    return tried


@workflow
async def broken(text: str) -> None:
    raise KeyError(text)


class UnfitError(Exception):
    """Known to the app only."""


@workflow
async def unfit(text: str) -> None:
    raise UnfitError(5, text)


@workflow
async def unspeakable(size: int) -> None:
    raise ValueError("\ud800" if size == 1 else "x" * size)


@workflow
async def inner_mistake() -> int:
    wrong: Any = "no number"
    return await double(wrong)


@workflow
async def large(size: int) -> str:
    return "x" * size


@workflow(timeout_s=0.2)
async def late() -> None:
    await asyncio.Event().wait()


@workflow
async def echo(value: Any) -> Any:
    return value


@workflow
async def kinds(text: str = "", tags: set[str] | None = None, data: bytes = b"", when: date | None = None) -> list[str]:
    return [repr(each) for each in (text, tags, data, when)]


@workflow(concurrency=64)
async def three_calls(number: int) -> int:
    return await double(await double(await double(number)))


@tool
async def slowly(x: int, pause_s: float) -> int:
    note(f"slowly {x}")
    await asyncio.sleep(pause_s)
    return x + 1


@workflow(concurrency=64)
async def steps(number: int, pause_s: float) -> int:
    note(f"steps {number}")
    for _ in range(3):
        number = await slowly(number, pause_s)
    note(f"end {number}")
    return number


@workflow(timeout_s=None)
async def may_i(what: str) -> str:
    return "yes" if await ask(f"May I {what}?", schema=bool) else "no"
