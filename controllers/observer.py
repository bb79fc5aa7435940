"""Listens to all reports and folds them into a view, a round at a time; asks again for those that are missing.

    NS.report.* ──▶ inbox ──▶ View
    NS.again.<process> ◀── a report is missing

              collect
    moving ────────────▶ still      moving: reports are folded as they come, and the view is of use to nobody
       ▲                   │        still: they are kept, and the view is as of `collect`
       └───── release ─────┘

Folding takes most of the time of a round, so whoever releases the view when he has seen it has it sooner the next time. It
stands still from the beginning. Whoever wants to see what the controllers see has one of these: it changes nothing, apart from
what a process tells anew when it is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Self

from nalar_mq.actions import Unused
from nalar_mq.address import Subjects
from nalar_mq.columns import Again, encode_report
from nalar_mq.config import LEASE_S
from nalar_mq.errors import MissedReportError, WireError
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.transport import Delivered, Subscription, Transport, is_direct

from .view import View

_SILENT_LEASES: Final = 2.0
_AGAIN_S: Final = 1.0
_INBOX_BYTES: Final = 512 * 1024 * 1024
_UNUSED_SORTS: Final = 64
_log = logger(__name__)

Tap = Callable[[str, bytes, float], None]


class Observer:
    """What has been reported, as of the last `collect` until `release`; an async context manager.

    Args:
        transport, subjects: where reports come from.
        lease_s: a process of which nothing is heard for two of them is forgotten.
        tap: is handed every report as it comes: its sender, its bytes, and the time on the loop's clock.

    Attributes:
        view: the picture.
        dropped: reports for which there was no room, or that the process has not sent itself.
        unused: reports that were refused; `view.refused` counts them by reason.
        waiting: reports that have come since the last `collect`.
    """

    def __init__(self, transport: Transport, subjects: Subjects, *, lease_s: float = LEASE_S, tap: Tap | None = None) -> None:
        self._transport = transport
        self._subjects = subjects
        self._lease_s = lease_s
        self._tap = tap
        self._loop = asyncio.get_running_loop()
        self._inbox: list[tuple[str, bytes, float]] = []
        self._inbox_bytes = 0
        self._is_still = True
        self._asked: dict[str, float] = {}
        self._complaints: dict[tuple[str, str], Unused] = {}
        self._subscription: Subscription | None = None
        self.view = View()
        self.dropped = 0
        self.unused = 0
        self.waiting = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begins to listen."""
        self._subscription = await self._transport.subscribe(self._subjects.report("*"), self._on_report)

    async def aclose(self) -> None:
        """Ends; idempotent."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def _on_report(self, message: Delivered) -> None:
        if self._inbox_bytes > _INBOX_BYTES or not is_direct(message, self._subjects.report("")):
            self.dropped += 1
            return
        sender, now = message.subject.rpartition(".")[2], self._loop.time()
        self.waiting += 1
        if self._is_still:
            self._inbox_bytes += len(message.data)
            self._inbox.append((sender, message.data, now))
        else:
            self._fold(sender, message.data, now)
        if self._tap is not None:
            self._tap(sender, message.data, now)

    def _fold(self, sender: str, data: bytes, at: float) -> None:
        try:
            self.view.fold(sender, data, at)
        except WireError as error:
            self._note(sender, error)

    def release(self) -> None:
        """Lets the view move until the next `collect`; idempotent."""
        inbox, self._inbox, self._inbox_bytes = self._inbox, [], 0
        self._is_still = False
        for report in inbox:
            self._fold(*report)

    def collect(self) -> int:
        """Folds what has come, and has the view stand still from now on; returns how many reports have come."""
        self.release()
        self._is_still = True
        waiting, self.waiting = self.waiting, 0
        now = self._loop.time()
        for address in self.view.silent(now - _SILENT_LEASES * self._lease_s):
            self.view.forget(address.name)
            self._asked.pop(address.name, None)
        for address in self.view.stale():
            if now - self._asked.get(address.name, -_AGAIN_S) >= _AGAIN_S:
                self._asked[address.name] = now
                again = encode_report(Again(WIRE_VERSION, address.incarnation))
                self._transport.publish(self._subjects.again(address.name), again)
        self.view.settle(now)
        return waiting

    def _note(self, sender: str, error: WireError) -> None:
        self.unused += 1
        if isinstance(error, MissedReportError):
            return  # messages get lost: it is asked again
        key = sender, type(error).__name__
        former = self._complaints.get(key)
        if former is None:
            _log.debug("report.refused", process=sender, reason=str(error))
        if former is not None or len(self._complaints) < _UNUSED_SORTS:
            self._complaints[key] = Unused(*key, str(error), former.count + 1 if former is not None else 1)

    def complaints(self) -> list[Unused]:
        """The reports that could not be used since the last time, by process and sort."""
        complaints, self._complaints = self._complaints, {}
        return list(complaints.values())
