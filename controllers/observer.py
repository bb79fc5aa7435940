"""Listens to all reports and folds them into a view, a round at a time; asks again for those that are missing.

    NS.report.* ──▶ inbox ──▶ View
    NS.again.<process> ◀── a report is missing

              collect
    moving ────────────▶ still      moving: reports are folded soon, those of one turn of the loop together, and the view is
       ▲                   │                of use to nobody
       │                   │        still: they are kept, and the view is as of `collect`
       └───── release ─────┘

Folding takes most of the time of a round, so whoever releases the view when he has seen it has it sooner the next time. It
stands still from the beginning. Whoever wants to see what the controllers see has one of these: it changes nothing, apart from
what a process tells anew when it is asked again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Final, Self

from nalar_mq.actions import Unused
from nalar_mq.address import Subjects
from nalar_mq.columns import Again, encode_report
from nalar_mq.config import LEASE_S
from nalar_mq.errors import MissedReportError, WireError
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.transport import Delivered, Subscription, Transport, is_direct

from .reported import Incoming
from .view import View

FIRST_SIGHT_S: Final = 0.8  # whoever is there has reported three times by then
_SILENT_LEASES: Final = 2.0
_AGAIN_S: Final = 1.0
_INBOX_BYTES: Final = 512 * 1024 * 1024
_UNUSED_SORTS: Final = 64
_log = logger(__name__)

Tap = Callable[[str, bytes, float], None]


class Folding:
    """Folds reports into a view and notes which could not be used.

    Attributes:
        view: the picture.
        unused: reports that were refused; `view.refused` counts them by reason.
    """

    def __init__(self, view: View, lease_s: float = LEASE_S) -> None:
        self.view = view
        self.unused = 0
        self._lease_s = lease_s
        self._complaints: dict[tuple[str, str], Unused] = {}

    def take(self, reports: Iterable[Incoming]) -> None:
        """Reports have come."""
        for sender, error in self.view.fold_all(reports):
            self.unused += 1
            if not isinstance(error, MissedReportError):  # messages get lost: it is asked again
                self._note(sender, error)

    def _note(self, sender: str, error: WireError) -> None:
        key = sender, type(error).__name__
        former = self._complaints.get(key)
        if former is None:
            _log.debug("report.refused", process=sender, reason=str(error))
        if former is not None or len(self._complaints) < _UNUSED_SORTS:
            self._complaints[key] = Unused(*key, str(error), former.count + 1 if former is not None else 1)

    def settle(self, now: float) -> None:
        """Makes the view that of now; processes that have been silent for long are forgotten."""
        for address in self.view.silent(now - _SILENT_LEASES * self._lease_s):
            self.view.forget(address.name)
        self.view.settle(now)

    def complaints(self) -> list[Unused]:
        """The reports that could not be used since the last time, by process and sort."""
        complaints, self._complaints = self._complaints, {}
        return list(complaints.values())


class Observer:
    """What has been reported, as of the last `collect` until `release`; an async context manager.

    Args:
        transport, subjects: where reports come from.
        lease_s: a process of which nothing is heard for two of them is forgotten.
        tap: is handed every report as it comes: its sender, its bytes, and the time on the loop's clock.
        processes: whose reports; those of all, unless told otherwise.

    Attributes:
        is_informed: it has listened for long enough to know everybody, and has been told all that it had missed; or it has
            waited for that for a lease. What is not in the view before is perhaps only not known yet.
        dropped: reports for which there was no room, or that the process has not sent itself.
        waiting: reports that have come since the last `collect`.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        *,
        lease_s: float = LEASE_S,
        tap: Tap | None = None,
        processes: Iterable[str] = ("*",),
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._lease_s = lease_s
        self._tap = tap
        self._loop = asyncio.get_running_loop()
        self._inbox: list[Incoming] = []
        self._inbox_bytes = 0
        self._is_still = True
        self._asked: dict[str, float] = {}
        self._folding = Folding(View(), lease_s)
        self._processes = tuple(processes)
        self._subscriptions: dict[str, Subscription] = {}
        self._listens_since = math.inf
        self.is_informed = False
        self.dropped = 0
        self.waiting = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begins to listen."""
        self._listens_since = self._loop.time()
        await self.listen(self._processes)

    async def listen(self, processes: Iterable[str]) -> None:
        """Hears these processes, too."""
        for name in processes:
            if name not in self._subscriptions:
                self._subscriptions[name] = await self._transport.subscribe(self._subjects.report(name), self._on_report)

    async def aclose(self) -> None:
        """Ends; idempotent."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            await subscription.unsubscribe()

    @property
    def view(self) -> View:
        """The picture."""
        return self._folding.view

    @property
    def unused(self) -> int:
        """Reports that were refused; `view.refused` counts them by reason."""
        return self._folding.unused

    def _on_report(self, message: Delivered) -> None:
        if self._inbox_bytes > _INBOX_BYTES or not is_direct(message, self._subjects.report("")):
            self.dropped += 1
            return
        report = Incoming(message.subject.rpartition(".")[2], message.data, self._loop.time())
        self.waiting += 1
        if not self._inbox and not self._is_still:
            self._loop.call_soon(self._fold_moving)
        self._inbox.append(report)
        self._inbox_bytes += len(report.data)
        if self._tap is not None:
            self._tap(*report)

    def _fold_moving(self) -> None:
        if not self._is_still:
            self._fold()

    def _fold(self) -> None:
        inbox, self._inbox, self._inbox_bytes = self._inbox, [], 0
        self._folding.take(inbox)

    def release(self) -> None:
        """Lets the view move until the next `collect`; idempotent."""
        self._is_still = False
        self._fold()

    def collect(self) -> int:
        """Folds what has come, and has the view stand still from now on; returns how many reports have come."""
        self._fold()
        self._is_still = True
        waiting, self.waiting = self.waiting, 0
        now = self._loop.time()
        stale = self.view.stale()
        self._asked = {address.name: self._asked.get(address.name, -math.inf) for address in stale}
        for address in stale:
            if now - self._asked[address.name] >= _AGAIN_S:
                self._asked[address.name] = now
                again = encode_report(Again(WIRE_VERSION, address.incarnation))
                self._transport.publish(self._subjects.again(address.name), again)
        self._folding.settle(now)
        listened_s = now - self._listens_since
        self.is_informed = self.is_informed or listened_s >= (self._lease_s if stale else FIRST_SIGHT_S)
        return waiting

    def complaints(self) -> list[Unused]:
        """The reports that could not be used since the last time, by process and sort."""
        return self._folding.complaints()
