"""Workflows that ask somebody outside. What runs is written down where the tests look."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import nalar_mq
from nalar_mq import as_completed, tool, workflow
from nalar_mq.agents import human

RUNS: list[str] = []
GATES: dict[str, asyncio.Event] = {}
SEEN: dict[str, list[Any]] = {}
HELD: dict[str, threading.Event] = {}


@dataclass
class Verdict:
    good: bool
    reason: str = ""


@tool
async def step(x: int) -> int:
    RUNS.append(f"step {x}")
    return x


@workflow(timeout_s=None, concurrency=1)
async def asks(name: str) -> str:
    RUNS.append(f"asks {name}")
    await step(1)
    verdict = await nalar_mq.ask(f"Is {name} good?", schema=Verdict)
    return f"{verdict.good} {verdict.reason}"


@workflow(timeout_s=None, concurrency=1)
def asks_in_thread(name: str) -> str:
    RUNS.append(f"asks {name}")
    step(1).value()
    verdict = nalar_mq.ask(f"Is {name} good?", schema=Verdict).value()
    return f"{verdict.good} {verdict.reason}"


@workflow
async def asks_for_a_while(name: str, timeout_s: float, default: object = None) -> object:
    RUNS.append(f"asks {name}")
    fallback: Any = {} if default is None else {"default": default}
    return await nalar_mq.ask(f"What about {name}?", timeout_s=timeout_s, **fallback)


@workflow(timeout_s=None)
async def asks_two(name: str) -> list[str]:
    RUNS.append(f"asks {name}")
    questions = [nalar_mq.ask(f"{name} {which}?", schema=str) for which in ("first", "second")]
    return [await question async for question in as_completed(questions)]


@workflow(timeout_s=None)
async def asks_and_forgets(name: str) -> str:
    question = nalar_mq.ask(f"{name}?")
    await step(2)
    question.cancel()
    return name


@workflow(timeout_s=None, retries=1)
async def asks_and_fails(name: str, by_tool: bool) -> str:
    """Fails once, when it has asked."""
    RUNS.append(f"asks {name}")
    question = choose(f"{name}?") if by_tool else nalar_mq.ask(f"{name}?", schema=str, timeout_s=3600.0)
    if RUNS.count(f"asks {name}") == 1:
        await GATES.setdefault(name, asyncio.Event()).wait()
        raise ValueError(name)
    return await question


@tool(timeout_s=None)
def choose(question: str) -> str:
    return human.ask(question, ["red", "blue"])


@workflow(timeout_s=None, concurrency=1)
async def asks_by_tool(name: str) -> str:
    RUNS.append(f"asks {name}")
    return await choose(f"{name}?")
