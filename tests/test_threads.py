"""Threads for synchronous code, and the way from threads to the loop."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

from nalar_mq.threads import LoopInbox, Threads


def _note(seen: set[threading.Thread], done: threading.Event) -> None:
    seen.add(threading.current_thread())
    done.set()


def test_idle_threads_are_used_again_and_busy_ones_bound_nothing() -> None:
    threads = Threads("t")
    used: set[threading.Thread] = set()
    gate, begun = threading.Event(), threading.Semaphore(0)

    def blocks() -> None:
        begun.release()
        gate.wait(10)

    for _ in range(100):
        threads.run(blocks)
    assert all(begun.acquire(timeout=10) for _ in range(100))
    gate.set()
    for _ in range(50):
        done = threading.Event()
        threads.run(functools.partial(_note, used, done))
        assert done.wait(10)
    assert len(used) <= 100
    threads.close()


def test_threads_end_when_they_are_closed_and_work_given_later_still_runs() -> None:
    threads = Threads("closing")
    before = threading.active_count()
    found: set[threading.Thread] = set()
    for _ in range(5):
        done = threading.Event()
        threads.run(functools.partial(_note, found, done))
        assert done.wait(10)
    threads.close()
    done = threading.Event()
    threads.run(functools.partial(_note, found, done))
    assert done.wait(10)
    for thread in found:
        thread.join(10)
    assert threading.active_count() <= before


async def test_what_many_threads_put_runs_once_each_in_the_order_of_each() -> None:
    loop = asyncio.get_running_loop()
    inbox, seen, all_there = LoopInbox(loop), list[tuple[int, int]](), asyncio.Event()

    def note(thread: int, number: int) -> None:
        assert asyncio.get_running_loop() is loop
        seen.append((thread, number))
        if len(seen) == 8 * 2000:
            all_there.set()

    def put(thread: int) -> None:
        for number in range(2000):
            inbox.put(functools.partial(note, thread, number))

    putters = [threading.Thread(target=put, args=(thread,)) for thread in range(8)]
    for putter in putters:
        putter.start()
    async with asyncio.timeout(60):
        await all_there.wait()
    for putter in putters:
        putter.join()
    assert len(set(seen)) == len(seen)
    assert all([n for t, n in seen if t == thread] == list(range(2000)) for thread in range(8))


async def test_one_that_fails_stops_none_behind_it() -> None:
    loop = asyncio.get_running_loop()
    problems: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, problem: problems.append(problem))
    inbox, done = LoopInbox(loop), asyncio.Event()

    def fails() -> None:
        raise ZeroDivisionError

    inbox.put(fails)
    inbox.put(done.set)
    async with asyncio.timeout(60):
        await done.wait()
    assert [type(problem["exception"]) for problem in problems] == [ZeroDivisionError]


async def test_who_never_ceases_to_put_leaves_the_loop_its_other_work() -> None:
    loop = asyncio.get_running_loop()
    inbox, others, rounds = LoopInbox(loop), 0, 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        if others < 10 and rounds < 100_000:
            inbox.put(again)

    inbox.put(again)
    while others < 10:
        others += 1
        await asyncio.sleep(0)
    assert rounds < 100


def test_nothing_is_put_once_the_loop_has_closed() -> None:
    loop = asyncio.new_event_loop()
    inbox = LoopInbox(loop)
    loop.close()
    assert not inbox.put(lambda: None)
    assert not inbox.put(lambda: None)
