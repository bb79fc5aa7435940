"""Futures: their two ends, their waiters on loops and in threads, their streams."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from waiting import until

from nalar_mq import as_completed, gather, values, wait
from nalar_mq.call_context import Caller
from nalar_mq.errors import CallTimeoutError, StreamRestartedError
from nalar_mq.event_loop import BlockingLoopError
from nalar_mq.future import STREAM_WINDOW, Future


class Owner:
    """The runtime that owns the futures of a test."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.credits: list[int] = []
        self.made = 0

    def future(self) -> Future[Any]:
        self.made += 1
        return Future(cast("Caller", self), self.made.to_bytes(16, "big"), "actor.method")

    def credit(self, future: Future[Any], limit: int) -> None:
        self.credits.append(limit)

    def cancel(self, future: Future[Any], reason: str) -> None:
        future.fail(RuntimeError(reason))


@pytest.fixture
async def owner() -> Owner:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(16))
    return Owner(loop)


async def test_the_first_end_wins(owner: Owner) -> None:
    resolved, failed = owner.future(), owner.future()
    assert resolved.resolve(values.encode(1))
    assert not resolved.fail(ValueError())
    assert not resolved.resolve(values.encode(2))
    assert failed.fail(ValueError("first"))
    assert not failed.resolve(values.encode(1))
    assert await resolved == 1
    assert (resolved.available(), resolved.failed(), failed.available(), failed.failed()) == (True, False, True, True)
    with pytest.raises(ValueError, match="first"):
        await failed


async def test_everybody_sees_the_same_value_and_it_travels_as_it_was_changed(owner: Owner) -> None:
    future = owner.future()
    future.resolve(values.encode([1, 2]))
    seen: list[Any] = []
    barrier = threading.Barrier(8)

    def look() -> None:
        barrier.wait(10)
        seen.append(future.value())

    await asyncio.gather(*[asyncio.to_thread(look) for _ in range(8)])
    assert all(value is seen[0] for value in seen)
    seen[0].append(3)
    payload = future.payload()
    assert payload is not None
    assert values.decode(payload) == [1, 2, 3]


async def test_waiters_in_threads_and_on_other_loops_are_woken(owner: Owner) -> None:
    future = owner.future()

    async def elsewhere() -> Any:
        return await future

    waiting = [asyncio.to_thread(future.value, 10) for _ in range(4)]
    waiting += [asyncio.to_thread(asyncio.run, elsewhere()) for _ in range(4)]
    tasks = [asyncio.ensure_future(each) for each in waiting]
    await until(lambda: len(future._waiters or ()) == 8)
    future.resolve(values.encode("here"))
    assert await asyncio.gather(*tasks) == ["here"] * 8


async def test_a_waiter_that_fails_keeps_no_other_from_waking(owner: Owner) -> None:
    problems: list[Any] = []
    owner.loop.set_exception_handler(lambda _, problem: problems.append(problem["exception"]))
    future = owner.future()

    def fails() -> None:
        raise ZeroDivisionError

    future.on_end(fails)
    woken = threading.Event()
    future.on_end(woken.set)
    future.resolve(values.encode(1))
    assert woken.is_set()
    assert [type(problem) for problem in problems] == [ZeroDivisionError]


async def test_waiting_for_a_time_ends_the_waiting_only(owner: Owner) -> None:
    future = owner.future()
    with pytest.raises(CallTimeoutError, match="still runs"):
        await asyncio.to_thread(future.value, 0.01)
    assert not future._waiters
    task = asyncio.ensure_future(_value(future))
    await until(lambda: bool(future._waiters))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not future._waiters
    future.resolve(values.encode(1))
    assert await future == 1


async def test_looking_often_at_an_error_does_not_lengthen_it(owner: Owner) -> None:
    future = owner.future()
    future.fail(ValueError("again"))
    lengths: list[int] = []
    for _ in range(5):
        with pytest.raises(ValueError, match="again") as raised:
            future.value()
        lengths.append(len(traceback.extract_tb(raised.value.__traceback__)))
    assert len(set(lengths)) == 1


async def test_gather_raises_the_first_error_and_keeps_the_order(owner: Owner) -> None:
    futures = [owner.future() for _ in range(5)]
    all_of_them = asyncio.ensure_future(gather(*futures))
    for number in (3, 1, 4, 0, 2):
        futures[number].resolve(values.encode(number))
    assert await all_of_them == (0, 1, 2, 3, 4)
    futures = [owner.future() for _ in range(3)]
    failing = asyncio.ensure_future(gather(*futures))
    await until(lambda: all(future._waiters for future in futures))
    futures[1].fail(ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        await failing
    assert await gather() == ()


async def test_what_has_ended_before_keeps_the_order_of_its_ends(owner: Owner) -> None:
    futures = [owner.future() for _ in range(4)]
    futures[2].fail(ValueError("first"))
    futures[0].fail(ValueError("second"))
    futures[3].resolve(values.encode(3))
    completed = as_completed(futures)
    futures[1].resolve(values.encode(1))
    assert [futures.index(future) async for future in completed] == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="first"):
        await gather(*futures)


async def test_as_completed_gives_each_once_in_the_order_of_their_ends(owner: Owner) -> None:
    futures = [owner.future() for _ in range(6)]
    order = [4, 0, 5, 2, 1, 3]
    futures[4].resolve(values.encode(4))

    def take() -> list[int]:
        return [future.value() for future in as_completed(futures)]

    async def take_on_loop() -> list[int]:
        return [await future async for future in as_completed(futures)]

    in_thread = asyncio.ensure_future(asyncio.to_thread(take))
    on_loop = asyncio.ensure_future(take_on_loop())
    await until(lambda: len(futures[3]._waiters or ()) == 2)
    for number in order[1:]:
        futures[number].resolve(values.encode(number))
    assert await on_loop == await in_thread == order


WAITS = [
    # ends what; how each ends, in this order; what is done then
    ("ALL_COMPLETED", {3: 3, 0: ValueError(), 1: 1, 2: 2}, [0, 1, 2, 3]),
    ("FIRST_COMPLETED", {2: 2}, [2]),
    ("FIRST_COMPLETED", {2: ValueError()}, [2]),
    ("FIRST_EXCEPTION", {3: 3, 1: ValueError()}, [1, 3]),
    ("FIRST_EXCEPTION", {3: 3, 0: 0, 1: 1, 2: 2}, [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("return_when", "ends", "done"), WAITS)
@pytest.mark.parametrize("before", [False, True], ids=["while it waits", "before it waits"])
async def test_wait_returns_when_enough_have_ended(
    owner: Owner, return_when: Any, ends: dict[int, Any], done: list[int], before: bool
) -> None:
    futures = [owner.future() for _ in range(4)]

    def end() -> None:
        for number, outcome in ends.items():
            if isinstance(outcome, Exception):
                futures[number].fail(outcome)
            else:
                futures[number].resolve(values.encode(outcome))

    async def on_loop() -> Any:
        return await wait(futures, return_when=return_when)

    if before:
        end()
    in_thread = asyncio.ensure_future(asyncio.to_thread(lambda: wait(futures, return_when=return_when).value()))
    waiting = asyncio.ensure_future(on_loop())
    if not before:
        await until(lambda: len(futures[2]._waiters or ()) == 2)
        end()
    for waited in (await waiting, await in_thread):
        assert [futures.index(future) for future in waited.done] == done
        assert [futures.index(future) for future in waited.pending] == [n for n in range(4) if n not in done]
    assert not any(future._waiters for future in futures), "nobody waits any more"


async def test_wait_gives_what_there_is_when_its_time_is_over(owner: Owner) -> None:
    futures = [owner.future(), owner.future()]
    futures[1].resolve(values.encode(1))
    for waited in (await wait(futures, timeout=0.01), await asyncio.to_thread(lambda: wait(futures, timeout=0.01).value())):
        assert waited == ([futures[1]], [futures[0]])
    assert await wait([]) == ([], [])
    assert await wait([], return_when="FIRST_COMPLETED") == ([], [])
    with pytest.raises(BlockingLoopError):
        wait(futures).value()
    with pytest.raises(ValueError, match="FIRST_COMPLETED"):
        wait(futures, return_when=cast("Any", "SOON"))


async def test_pieces_come_once_in_order_and_ask_for_more(owner: Owner) -> None:
    future = owner.future()
    stream = future.stream()
    taken = asyncio.ensure_future(_all(stream))
    for number in range(1, 101):
        future.chunk(number, values.encode(number), 0)
        future.chunk(number, values.encode("twice"), 0)
        await asyncio.sleep(0)
    future.chunk(200, values.encode("too early"), 0)
    future.resolve(values.encode(None))
    assert await taken == list(range(1, 101))
    assert owner.credits[:2] == [STREAM_WINDOW, STREAM_WINDOW // 2 + STREAM_WINDOW]


async def test_another_attempt_ends_a_stream_of_which_pieces_were_taken(owner: Owner) -> None:
    untaken, taken = owner.future(), owner.future()
    streams = [untaken.stream(), taken.stream()]
    for future in (untaken, taken):
        future.chunk(1, values.encode("old"), 0)
    assert await anext(streams[1]) == "old"
    for future in (untaken, taken):
        future.chunk(1, values.encode("fresh"), 1)
    assert await anext(streams[0]) == "fresh"
    with pytest.raises(StreamRestartedError):
        await anext(streams[1])


async def test_a_stream_asked_for_at_the_end_still_has_every_piece_once(owner: Owner) -> None:
    for _ in range(50):
        future = owner.future()
        barrier = threading.Barrier(2)

        def ask(future: Future[Any] = future, barrier: threading.Barrier = barrier) -> list[Any]:
            barrier.wait(10)
            return list(future.stream())

        asking = asyncio.ensure_future(asyncio.to_thread(ask))
        await asyncio.to_thread(barrier.wait, 10)
        future.resolve(values.encode([1, 2, 3]))
        assert await asking == [1, 2, 3]


async def test_waiting_as_threads_do_is_refused_on_the_loop_of_the_owner(owner: Owner) -> None:
    future = owner.future()
    for block in (future.value, future.stream().__next__, as_completed([future]).__next__):
        with pytest.raises(BlockingLoopError, match=r"await|async for"):
            cast("Callable[[], object]", block)()


async def _all(stream: Any) -> list[Any]:
    return [piece async for piece in stream]


async def _value(future: Future[Any]) -> Any:
    return await future


async def test_a_future_that_is_iterated_over_names_its_stream(owner: Owner) -> None:
    future: Any = owner.future()
    with pytest.raises(TypeError, match=r"what actor\.method yields, write `async for piece in future\.stream\(\)`"):
        async for _ in future:
            pass
