"""Writes what calls have changed into a store: one thread, one transaction for all that has come meanwhile, one fsync.

Who puts something is told when it is durable, or why it is not, in the order of putting. While one transaction is being
synced the next one gathers, so that the calls that end in one fsync share the following one, however many they are; up to
`_BYTES`, so that a large one does not have all others wait for it.

What is put in the background, sessions on their way here and the copies of those that have left, keeps an order of its own:
a transaction has all that calls have changed, and beside it at least `_BACKGROUND_BYTES` of the background. Where the disk is
quick it has more, up to four times as much, as long as that takes no more than `_BACKGROUND_S`: a sync costs about the same
whatever it writes, and a call waits for the transaction before its own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from nalar_mq.errors import StoreError, StoreLostError
from nalar_mq.logs import logger
from nalar_mq.store import Commit, Departure, Store, Write

_BYTES: Final = 16 * 1024 * 1024
_BACKGROUND_BYTES: Final = 512 * 1024
_BACKGROUND_MOST_BYTES: Final = 4 * _BACKGROUND_BYTES
_BACKGROUND_S: Final = 0.01
_DEPARTURE_BYTES: Final = 128 * 1024  # about what the entries take that go at once
_AT_ONCE: Final = 4096
_log = logger(__name__)

Done = Callable[[Exception | None], None]
"""Is told, in the thread of the committer, that a write is durable, or why it is not."""

Ship = Callable[[list[tuple[Write, Done]], int], None]
"""Is given, in the thread of the committer, what one transaction has written, and its number; tells everybody in the end."""


class Committer:
    """The one that writes into `store`.

    Args:
        store: is written by nobody else, and closed by `close`.
        on_lost: is told, in the thread, that another process has taken the store over; nothing is written after that.
        ship: takes what has been written, before anybody is told.
        clock: seconds since 1970, by which records of calls expire.

    Attributes:
        commits: transactions so far.
        written: writes in them.
    """

    def __init__(
        self, store: Store, on_lost: Callable[[], None], ship: Ship | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self._clock = clock
        self._ship = ship
        self.commits = 0
        self.written = 0
        self._on_lost = on_lost
        self._waiting: SimpleQueue[tuple[Write, Done, bool] | None] = SimpleQueue()  # None is the last
        self._background: deque[tuple[Write, Done]] = deque()
        self._background_bytes = _BACKGROUND_BYTES
        self._is_ending = False
        self._lost: StoreLostError | None = None
        self._thread: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"store-{self.store.id}", daemon=True)
        self._thread.start()

    def put(self, write: Write, done: Done, *, in_background: bool = False) -> None:
        """Writes it soon, in the background after what calls have changed; any thread."""
        self._waiting.put((write, done, in_background))

    def _run(self) -> None:
        while batch := self._batch():
            is_full = bool(self._background)
            begun = time.perf_counter()
            self._write(batch)
            if is_full:
                self._background_bytes = background_bytes(self._background_bytes, time.perf_counter() - begun)

    def _batch(self) -> list[tuple[Write, Done]]:
        """What goes into the next transaction, as soon as there is something; nothing after the end."""
        batch: list[tuple[Write, Done]] = []
        size = 0
        while size < _BYTES and len(batch) < _AT_ONCE and not self._is_ending:
            if self._waiting.empty() and (batch or self._background):
                break
            one = self._waiting.get()
            if one is None:
                self._is_ending = True
                break
            write, done, in_background = one
            if in_background:
                self._background.append((write, done))
            else:
                batch.append((write, done))
                size += _size_of(write)
        size = 0
        while self._background and size < self._background_bytes:
            batch.append(self._background.popleft())
            size += _size_of(batch[-1][0])
        return batch

    def _write(self, batch: list[tuple[Write, Done]]) -> None:
        results = self._results([write for write, _ in batch])
        self.commits += 1
        self.written += len(batch)
        if self._ship is not None:
            written = [one for one, result in zip(batch, results, strict=True) if result is None]
            if written:
                self._ship(written, self.store.commits)
            failed = [(one, result) for one, result in zip(batch, results, strict=True) if result is not None]
            batch, results = [one for one, _ in failed], [result for _, result in failed]
        for (_, done), result in zip(batch, results, strict=True):
            try:
                done(result)
            except Exception:
                _log.exception("store.listener_failed", store=self.store.id)

    def _results(self, writes: list[Write]) -> list[Exception | None]:
        if self._lost is not None:
            return [self._lost] * len(writes)
        try:
            return self.store.write(writes, self._clock())
        except StoreLostError as error:
            self._lost = error
            _log.error("store.lost", store=self.store.id, folder=str(self.store.folder))
            self._on_lost()
            return [error] * len(writes)
        except Exception as error:
            _log.exception("store.write_failed", store=self.store.id)
            wrong = StoreError(f"{self.store.folder}: {error!r}", str(self.store.folder))
            return [wrong] * len(writes)

    def close(self) -> None:
        """Writes what has been put, and closes the store; idempotent."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        self.store.close()


class LoopCommitter(Committer):
    """Writes on the event loop it is made on, some time after what is put: for simulation."""

    _LATER_S: Final = 0.002

    def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_due = False

    def put(self, write: Write, done: Done, *, in_background: bool = False) -> None:
        """Writes it soon, in the background after what calls have changed."""
        super().put(write, done, in_background=in_background)
        if not self._is_due:
            self._is_due = True
            self._loop.call_later(self._LATER_S, self._write_waiting)

    def _write_waiting(self) -> None:
        self._is_due = False
        while not self._waiting.empty() or self._background:
            self._write(self._batch())

    def close(self) -> None:
        """Writes what has been put, and closes the store; idempotent."""
        self._write_waiting()
        self.store.close()


def background_bytes(former: int, took_s: float) -> int:
    """How much of the background goes into a transaction after one that had `former` and took `took_s`."""
    wanted = former * 9 // 8 if took_s < _BACKGROUND_S else former * 3 // 4
    return min(max(wanted, _BACKGROUND_BYTES), _BACKGROUND_MOST_BYTES)


def _size_of(write: Write) -> int:
    if isinstance(write, Departure):
        return _DEPARTURE_BYTES
    if not isinstance(write, Commit):
        return 0
    entries = sum(len(data) for _, _, data in write.changes if data is not None)
    if write.lump is not None:
        entries += sum(len(value) for _, value in write.lump.rows)
    return entries + len(write.payload) + sum(len(outcome.payload) for outcome in write.records)
