"""Sends what happens to the calls of a process to the controllers, as `nalar_mq.columns` says it.

A report is published every `PERIOD_S`; one that asks for everything anew (`Again`) gets it in place of the next report, however
many have asked meanwhile. Nothing is kept for anybody: what is published while nobody listens is gone, and whoever comes later
asks. Of many calls that come at once some are told of in each report, and so are those of them that are still there in the
next ones: no report keeps the loop for long. A process that has so much to tell that it takes long all the same does so less
often, and never spends more than a tenth of its time on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from nalar_mq.address import Address, Subjects
from nalar_mq.changes import Changes
from nalar_mq.columns import EngineFigures, decode_again
from nalar_mq.errors import WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.transport import Delivered, Subscription, Transport

PERIOD_S: Final = 0.25
_SHARE: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_MOST_BEGUN: Final = 4_000  # about 10 ms
_LOOK_EVERY_S: Final = 2.0
_MOST_BYTES: Final = 1024 * 1024
_HEAD_BYTES: Final = 64 * 1024  # of a report, for all that is not columns of calls
_log = logger(__name__)

Queues = Callable[[], Mapping[str, tuple[int, int]]]
"""Queued and running calls by actor."""
Engines = Callable[[], Awaitable[Mapping[str, EngineFigures]]]
"""What is to be told of model servers, by name."""
Figures = Callable[[], Mapping[str, tuple[float, float]]]
"""Used and available amounts by resource; is called in a thread."""


class Reporter:
    """Reports for one process.

    Args:
        transport, subjects, me: of the process.
        changes: what it collects.
        queues: what is queued and running now.
        figures: what its machine has and uses; None to say nothing of that.
        engines: what the model servers that it asks have in hand; None to say nothing of that.
        stopwatch: tells how long making a report takes, so that it takes no more than its share.

    Attributes:
        sent: reports that were published.
        asked: how often everything was asked for anew.
        unreadable: what came and made no sense.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        me: Address,
        changes: Changes,
        queues: Queues,
        figures: Figures | None = None,
        stopwatch: Callable[[], float] = time.perf_counter,
        engines: Engines | None = None,
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._changes = changes
        self._queues = queues
        self._figures = figures
        self._engines = engines
        self._stopwatch = stopwatch
        self._limit = min(transport.max_payload, _MOST_BYTES) - _HEAD_BYTES
        self._loop = asyncio.get_running_loop()
        self._is_asked = False
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.sent = 0
        self.asked = 0
        self.unreadable = 0

    async def start(self) -> None:
        """Begins to report, and to listen to who wants everything."""
        self._subscription = await self._transport.subscribe(self._subjects.again(self._me.name), self._on_again)
        self._tasks = [self._loop.create_task(self._report(), name=f"reports-{self._me.name}")]
        if self._figures is not None:
            self._tasks.append(self._loop.create_task(self._look(self._figures), name=f"resources-{self._me.name}"))
        if self._engines is not None:
            self._tasks.append(self._loop.create_task(self._look_at(self._engines), name=f"engines-{self._me.name}"))

    async def aclose(self) -> None:
        """Ends; idempotent."""
        tasks, self._tasks = self._tasks, []
        await cancel_all(tasks)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def _on_again(self, message: Delivered) -> None:
        try:
            asked = decode_again(message.data)
        except WireError as error:
            self.unreadable += 1
            _log.debug("reports.question_unreadable", error=str(error))
            return
        if asked.incarnation == self._me.incarnation:
            self.asked += 1
            self._is_asked = True

    async def _report(self) -> None:
        while True:
            began = self._stopwatch()
            try:
                self._publish()
            except Exception:
                _log.exception("reports.failed")
            took_s = self._stopwatch() - began
            await asyncio.sleep(min(max(PERIOD_S, took_s / _SHARE), _LONGEST_PAUSE_S))

    def _publish(self) -> None:
        """What has happened since the last time, or everything if somebody has asked."""
        changes, now = self._changes, self._loop.time()
        changes.set_queues(self._queues())
        is_asked, self._is_asked = self._is_asked, False
        reports = changes.whole(now, self._limit) if is_asked else changes.reports(now, self._limit, _MOST_BEGUN)
        if not self._transport.is_connected:
            return  # they will be missed, and everything asked for
        for report in reports:
            self._transport.publish(self._subjects.report(self._me.name), report)
            self.sent += 1

    async def _look_at(self, engines: Engines) -> None:
        while True:
            try:
                self._changes.set_engines(await engines())
            except Exception:
                _log.exception("reports.engines_failed")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self, figures: Figures) -> None:
        while True:
            try:
                self._changes.set_resources(await asyncio.to_thread(figures))
            except Exception:
                _log.exception("reports.resources_failed")
            await asyncio.sleep(_LOOK_EVERY_S)
