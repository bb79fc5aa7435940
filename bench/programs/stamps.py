"""When the last frame came into this process, and when the first one left since somebody looked: the stages of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nalar_mq.channel import Endpoint


class Stamps:
    """Times on the machine's monotonic clock, in seconds: one clock for all its processes. `left` is 0 until a frame has."""

    came = 0.0
    left = 0.0

    def take_left(self) -> float:
        """When a frame left first since this was asked last."""
        left, self.left = self.left, 0.0
        return left


def watched() -> Stamps:
    """Has every endpoint that is made in this process from now on note its frames."""
    stamps = Stamps()
    on_delivered: Callable[..., None] = vars(Endpoint)["_on_delivered"]
    publish: Callable[..., None] = vars(Endpoint)["_publish"]

    def note_arrival(*arguments: Any) -> None:
        stamps.came = time.monotonic()
        on_delivered(*arguments)

    def note_departure(*arguments: Any) -> None:
        stamps.left = stamps.left or time.monotonic()  # not afterwards: who writes wakes others, and may lose the processor
        publish(*arguments)

    setattr(Endpoint, "_on_delivered", note_arrival)  # noqa: B010 - the endpoint offers no place to look from
    setattr(Endpoint, "_publish", note_departure)  # noqa: B010
    return stamps
