"""Threads for synchronous code: as many as run or wait, and no fewer kept than have been needed lately.

A call that waits for another one keeps its thread, and the mailbox, not the number of threads, bounds what runs at once; so
there is no upper bound here that a chain of waiting calls could exhaust.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

_IDLE_S = 30.0


class Threads:
    """Runs functions in threads, reusing idle ones, the most recently used first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: deque[_Thread] = deque()
        self._count = 0
        self._closed = False

    def run(self, function: Callable[[], object]) -> None:
        """Runs `function`, which must not raise, in a thread; returns at once."""
        with self._lock:
            thread = self._idle.pop() if self._idle else None
            if thread is None:
                self._count += 1
            number = self._count
        if thread is None:
            thread = _Thread(self, f"{self._name}-{number}")
            thread.give(function)
            thread.start()
        else:
            thread.give(function)

    def rest(self, thread: _Thread) -> bool:
        """`thread` has nothing to do; False tells it to end."""
        with self._lock:
            if self._closed:
                return False
            self._idle.append(thread)
            return True

    def retire(self, thread: _Thread) -> bool:
        """`thread` has been idle for long; True tells it to end, False that work has just been given to it."""
        with self._lock:
            if thread in self._idle:
                self._idle.remove(thread)
                return True
            return False

    def close(self) -> None:
        """Idle threads end; busy ones end after what they do. They are daemons and hold up nothing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, deque()
        for thread in idle:
            thread.give(None)


class LoopThreads(Threads):
    """Runs the functions on an event loop, each in a turn of its own: for simulation. None of them may wait for the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__("loop")
        self._loop = loop

    def run(self, function: Callable[[], object]) -> None:
        """Runs `function` in a later turn of the loop."""
        self._loop.call_soon(function)


class _Thread(threading.Thread):
    def __init__(self, threads: Threads, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._threads = threads
        self._work: Callable[[], object] | None = None
        self._given = threading.Semaphore(0)

    def give(self, function: Callable[[], object] | None) -> None:
        self._work = function
        self._given.release()

    def run(self) -> None:
        while True:
            if not self._given.acquire(timeout=_IDLE_S):
                if self._threads.retire(self):
                    return
                self._given.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            work()
            del work
            if not self._threads.rest(self):
                return


class LoopInbox:
    """Functions from other threads to be run on the event loop, with one wake-up for all that are put meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._armed = False

    def put(self, function: Callable[[], None]) -> bool:
        """Runs `function` on the loop soon, in order; any thread. False, and it never runs, once the loop has closed."""
        self._waiting.append(function)
        return self._armed or self._arm()

    def _arm(self) -> bool:
        self._armed = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            self._armed = False
            self._waiting.clear()
            return False
        return True

    def _drain(self) -> None:
        # Cleared first: whatever is appended from here on either is counted below or arms again.
        self._armed = False
        waiting = self._waiting
        try:
            for _ in range(len(waiting)):  # threads that never cease to put leave the loop its other work
                self._run(waiting.popleft())
        finally:
            if waiting and not self._armed:
                self._arm()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            self._loop.call_exception_handler({"message": "a function put from a thread failed", "exception": error})
