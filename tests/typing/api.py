"""Checked by mypy and pyright, never run: what the decorators infer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import assert_type

from nalar_mq import (
    Future,
    FutureInfo,
    ManagedDict,
    ManagedList,
    ManagedValue,
    Waited,
    agent,
    as_completed,
    ask,
    connect,
    effect,
    gather,
    method,
    now,
    random,
    sleep,
    tool,
    wait,
    workflow,
)


@dataclass
class Report:
    text: str


@tool
async def search(query: str, limit: int = 5) -> list[str]:
    return [query] * limit


@tool(retries=2, timeout_s=5)
def count(words: list[str]) -> int:
    return len(words)


@tool
async def tokens(n: int) -> AsyncIterator[str]:
    for i in range(n):
        yield str(i)


@tool
def lines(n: int) -> Iterator[str]:
    for i in range(n):
        yield str(i)


@agent(stateful=True)
class Analyst:
    @method
    async def analyse(self, question: str) -> Report:
        return Report(question)

    @method
    def note(self, text: str) -> None: ...


@agent
class Plain:
    @method
    async def hello(self) -> str:
        return "hello"


@agent
class Notebook:
    reports: ManagedList[Report]
    seen: ManagedDict[str, int]
    title: ManagedValue[str] = ManagedValue("untitled")

    @method
    def note(self, report: Report) -> int:
        self.reports.append(report)
        self.reports += [report]
        self.seen |= {report.text: 1}
        self.title.value = report.text
        assert_type(self.reports[0], Report)
        assert_type(self.reports[1:], list[Report])
        assert_type(self.reports.pop(), Report)
        assert_type(self.reports + [report], list[Report])  # noqa: RUF005
        assert_type(self.seen["a"], int)
        assert_type(self.seen.get("a"), int | None)
        assert_type(list(self.seen.items()), list[tuple[str, int]])
        assert_type(self.seen | {"b": 2}, dict[str, int])
        assert_type(self.title.value, str)
        self.reports.sort(key=lambda found: found.text)
        self.reports.append("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self.seen[3] = 3  # type: ignore[index]  # pyright: ignore[reportArgumentType]
        self.title.value = 3  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        return len(self.reports)


@workflow
async def answer(question: str) -> str:
    found = search(question)
    assert_type(found, Future[list[str]])
    assert_type(await found, list[str])
    assert_type(found.value(timeout=1), list[str])
    assert_type(found.available(), bool)
    assert_type(await count(found.later), int)
    assert_type(count(found.later), Future[int])
    assert_type(tokens(3), Future[list[str]])
    assert_type(lines(3), Future[list[str]])
    report = Analyst.analyse(question)
    assert_type(report, Future[Report])
    assert_type(await Analyst.analyse.options(session="s", priority=2, timeout_s=None)(question), Report)
    assert_type(await gather(found, report), tuple[list[str], Report])
    assert_type(Analyst.note.cast("x"), None)
    assert_type(await wait([report], return_when="FIRST_COMPLETED"), Waited[Report])
    assert_type(wait([report], timeout=1).value().done, list[Future[Report]])
    assert_type(found.info(), FutureInfo)
    assert_type(found.set_priority(3), None)
    assert_type(await Plain.hello(), str)
    async for done in as_completed([report]):
        assert_type(done, Future[Report])
    assert_type(await Analyst().analyse("plain method"), Report)
    assert_type(search.options(session="s")("q"), Future[list[str]])
    search(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Analyst.analyse()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    search("x").value().nothing  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
    return (await report).text


async def outside() -> None:
    async with connect("nats://127.0.0.1:4222") as client:
        assert_type(await answer("q"), str)
        await client.options(session="s").call("answer", "q")


async def at_any_time(title: str) -> Report:
    return Report(title)


async def world() -> None:
    assert_type(now(), datetime)
    assert_type(random(), Random)
    assert_type(effect(len, "a"), int)
    assert_type(await effect(at_any_time, title="a"), Report)
    assert_type(await effect(asyncio.to_thread, len, "a"), int)
    await sleep(1)
    effect(len, 1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


async def people() -> None:
    assert_type(ask("Well?", schema=Report, timeout_s=5), Future[Report])
    assert_type(await ask("Well?", schema=bool, default=False), bool)
    await ask("Well?", schema={"type": "integer"})
