"""Tells of code that blocks an event loop: which call it is, where it stands, and for how long.

The watch runs on another loop, in another thread, and asks the one that is watched to do nothing, once a second. Only the time
counts in which the watch itself has run: a process that stood still as a whole has not blocked anything.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from nalar_mq.logs import logger

_EVERY_S: Final = 1.0
_STEP_S: Final = 0.1
_BLOCKED_S: Final = 2.0
_HINT: Final = "what else is async in the worker waits for it: `await` what takes long, or leave out `async` for a thread"
_OURS: Final = tuple(str(Path(file).parent) + "/" for file in (__file__, asyncio.__file__))
_log = logger(__name__)


class LoopWatch:
    """Made in the thread of the loop that it watches; `run` belongs to another one.

    Args:
        loop: which is watched.
        name: of its process.
        blocked_s: for how long it must have been blocked before that is told.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, blocked_s: float = _BLOCKED_S) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._name = name
        self._blocked_s = blocked_s

    async def run(self) -> None:
        """Watches until it is cancelled, or the loop is closed."""
        while True:
            await asyncio.sleep(_EVERY_S)
            turned = threading.Event()
            try:
                self._loop.call_soon_threadsafe(turned.set)
            except RuntimeError:
                return
            waited_s, is_told = 0.0, False
            while not turned.is_set():
                await asyncio.sleep(_STEP_S)
                waited_s += _STEP_S
                if not is_told and waited_s >= self._blocked_s and not turned.is_set():
                    is_told = True
                    self._tell(waited_s)
            if is_told:
                _log.warning("loop.turns_again", worker=self._name, blocked_s=round(waited_s, 1))

    def _tell(self, waited_s: float) -> None:
        call, at = _place(sys._current_frames().get(self._thread))  # pyright: ignore[reportPrivateUsage]
        _log.warning("loop.blocked", worker=self._name, call=call, at=at, blocked_s=round(waited_s, 1), hint=_HINT)


def _place(innermost: FrameType | None) -> tuple[str, str]:
    """The function that ours or asyncio has called, and the line at which the thread stands."""
    if innermost is None:
        return "", ""
    call, frame = innermost.f_code.co_qualname, innermost.f_back
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        call, frame = frame.f_code.co_qualname, frame.f_back
    return call, f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
