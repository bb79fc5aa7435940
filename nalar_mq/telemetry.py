"""What workers tell of themselves while they work, and who listens to it: the load of each, for the choice of a replica.

A worker publishes a `Load` when it differs from the last one, at most four times a second, and again after some seconds even
if nothing has changed, since a report may be lost on its way and a caller may have come after it. Nothing depends on a
report: without any, callers go by what they have in flight themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Load, decode_load, encode_record
from nalar_mq.transport import Delivered, Subscription, Transport, is_direct

PERIOD_S: Final = 0.25
_REPEAT_S: Final = 5.0
_log = logger(__name__)

Sample = Callable[[], dict[str, tuple[int, int]]]


class Telemetry:
    """The reports of one process, and those it hears.

    Args:
        transport, subjects, me: of the process.
        on_load: takes the report of a process by name; False if it could not use it.

    Attributes:
        sent: reports of this process.
        heard: reports that were used.
        unused: reports that came too late, or from nobody who is known.
        unreadable: what came and was no report, or not told by the process itself.
    """

    def __init__(self, transport: Transport, subjects: Subjects, me: Address, on_load: Callable[[str, Load], bool]) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._on_load = on_load
        self._subscription: Subscription | None = None
        self._reporting: asyncio.Task[None] | None = None
        self.sent = 0
        self.heard = 0
        self.unused = 0
        self.unreadable = 0

    async def start(self, sample: Sample | None) -> None:
        """Begins to listen, and to report what `sample` gives, if there is one."""
        self._subscription = await self._transport.subscribe(self._subjects.load("*"), self._on_report)
        if sample is not None:
            self._reporting = asyncio.get_running_loop().create_task(self._report(sample))

    async def aclose(self) -> None:
        """Ends both; idempotent."""
        reporting, self._reporting = self._reporting, None
        if reporting is not None:
            await cancel_all([reporting])
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    async def _report(self, sample: Sample) -> None:
        loop = asyncio.get_running_loop()
        last: dict[str, tuple[int, int]] = {}
        repeat_at = loop.time() + _REPEAT_S
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                load = sample()
                if load != last or loop.time() >= repeat_at:
                    last, repeat_at = load, loop.time() + _REPEAT_S
                    self._publish(load)
            except Exception:
                _log.exception("telemetry.report_failed")

    def _publish(self, load: dict[str, tuple[int, int]]) -> None:
        self.sent += 1
        report = Load(WIRE_VERSION, self._me.incarnation, self.sent, load)
        self._transport.publish(self._subjects.load(self._me.name), encode_record(report))

    def _on_report(self, message: Delivered) -> None:
        if not is_direct(message, self._subjects.load("")):
            self.unreadable += 1
            return
        try:
            load = decode_load(message.data)
        except WireError as error:
            self.unreadable += 1
            _log.debug("telemetry.report_unreadable", subject=message.subject, error=str(error))
            return
        if self._on_load(message.subject.rpartition(".")[2], load):
            self.heard += 1
        else:
            self.unused += 1
