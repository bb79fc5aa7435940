"""Coroutines without a task for each: order, contexts, suspension, cancellation."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

import pytest

from nalar_mq.runner import Runner

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


class Given:
    """What a runner was given, and what it told."""

    def __init__(self) -> None:
        self.runner = Runner(asyncio.get_running_loop(), self._paused, self._time)
        self.now_s = 0.0
        self.tasks: list[asyncio.Task[None]] = []
        self.pauses = 0
        self.seen: list[object] = []
        self._changed = asyncio.Event()

    def _time(self) -> float:
        return self.now_s

    def _paused(self) -> None:
        self.pauses += 1

    def run(self, coroutine: Coroutine[Any, Any, None], **values: str) -> None:
        context = contextvars.copy_context()
        for value in values.values():
            context.run(variable.set, value)
        self.runner.run(coroutine, context, self.tasks.append)

    def see(self, thing: object) -> None:
        self.seen.append(thing)
        self._changed.set()

    async def until(self, count: int) -> list[object]:
        async with asyncio.timeout(60):
            while len(self.seen) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.seen


async def test_what_never_suspends_runs_in_order_in_one_task() -> None:
    given = Given()
    tasks: set[asyncio.Task[Any] | None] = set()

    async def note(number: int) -> None:
        tasks.add(asyncio.current_task())
        given.see(number)

    for number in range(50):
        given.run(note(number))
    assert await given.until(50) == list(range(50))
    assert len(tasks) == 1
    assert given.tasks == []
    assert given.pauses == 1


@pytest.mark.parametrize(("each_takes_s", "before_others"), [(0.0, 300), (0.001, 10)])
async def test_others_on_the_loop_get_their_turn(each_takes_s: float, before_others: int) -> None:
    given = Given()
    loop = asyncio.get_running_loop()

    async def go_on(left: int) -> None:
        given.see(left)
        given.now_s += each_takes_s
        if left == 1000:
            loop.call_soon(given.see, "other")
        if left:
            given.run(go_on(left - 1))

    given.run(go_on(1000))
    seen = await given.until(1002)
    assert seen.index("other") < before_others


async def test_one_that_suspends_keeps_its_task_and_does_not_hold_up_the_rest() -> None:
    given = Given()
    gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    first: list[Any] = []

    async def wait() -> None:
        first.append(asyncio.current_task())
        given.see(await gate)
        first.append(asyncio.current_task())

    async def note() -> None:
        first.append(asyncio.current_task())
        given.see("next")

    given.run(wait())
    given.run(note())
    assert await given.until(1) == ["next"]
    gate.set_result("opened")
    assert await given.until(2) == ["next", "opened"]
    await given.tasks[0]
    waited, other, waited_still = first
    assert waited is waited_still is given.tasks[0]
    assert other is not waited


async def test_every_step_runs_in_the_coroutines_own_context() -> None:
    given = Given()

    async def note(other: str) -> None:
        before = variable.get()
        variable.set(other)
        await asyncio.sleep(0)
        child = await asyncio.create_task(_read())
        given.see((before, variable.get(), child))

    given.run(note("b"), start="a")
    given.run(note("d"), start="c")
    assert sorted(map(str, await given.until(2))) == ["('a', 'b', 'b')", "('c', 'd', 'd')"]
    assert variable.get() == "outside"


async def _read() -> str:
    return variable.get()


async def test_cancelling_its_task_ends_one_that_has_suspended() -> None:
    given = Given()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # it may wait while it unwinds
            given.see("cancelled")
            raise

    given.run(wait())
    while not given.tasks:
        await asyncio.sleep(0)
    given.tasks[0].cancel()
    assert await given.until(1) == ["cancelled"]
    with pytest.raises(asyncio.CancelledError):
        await given.tasks[0]


async def test_time_outs_and_task_groups_work_from_the_first_step() -> None:
    given = Given()

    async def late() -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            given.see("late")

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_read())
        given.see(task.result())

    given.run(late())
    given.run(grouped(), value="grouped")
    assert sorted(map(str, await given.until(2))) == ["grouped", "late"]


async def test_one_that_cancels_itself_without_waiting_harms_no_other() -> None:
    given = Given()

    async def harm() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        given.see("harm")

    async def wait() -> None:
        await asyncio.sleep(0)
        given.see("unharmed")

    given.run(harm())
    given.run(wait())
    assert await given.until(2) == ["harm", "unharmed"]


async def test_one_that_fails_does_not_stop_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    given = Given()

    async def fail() -> None:
        raise ValueError("on purpose")

    async def note() -> None:
        given.see("next")

    given.run(fail())
    given.run(note())
    assert await given.until(1) == ["next"]


async def test_close_drops_what_has_not_begun() -> None:
    given = Given()

    async def note() -> None:
        given.see("begun")

    given.run(note())
    given.runner.close()
    for _ in range(3):
        await asyncio.sleep(0)
    assert given.seen == []
