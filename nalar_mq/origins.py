"""Where in the user's code the futures were made that something still holds, and tracebacks of the user's own lines."""

# What runs through here is of any type whatever.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import os
import sys
import types
import weakref
from typing import Any, Final, cast

from nalar_mq.future import Future

MARK: Final = sys.intern("nalar:rewritten")

AnyFuture = Future[Any]


class Origin(weakref.ref[AnyFuture]):
    """Remembers where in the user's code a living future was made."""

    __slots__ = ("filename", "key", "line")

    filename: str
    key: int
    line: int


class _Living(dict[int, Origin]):
    """The origins of all futures that rewritten code made and something still holds, by identity."""

    def note(self, future: AnyFuture, frame: types.FrameType | None) -> None:
        origin = Origin(future, self.forget)
        origin.key = id(future)
        origin.filename = frame.f_code.co_filename if frame is not None else "?"
        origin.line = frame.f_lineno if frame is not None else 0
        self[origin.key] = origin

    def forget(self, origin: weakref.ref[AnyFuture]) -> None:
        key = cast(Origin, origin).key
        if self.get(key) is origin:
            del self[key]


living: Final = _Living()


def living_count() -> int:
    """How many futures made by rewritten code something still holds."""
    return len(living)


def is_rewritten(code: types.CodeType) -> bool:
    """True if functions with this code may be given futures."""
    consts = code.co_consts
    return bool(consts) and consts[-1] is MARK


_FOLDERS: Final = (os.path.dirname(__file__), "nalar_mq")  # as Python names it, and as compiled modules do


def _is_runtime(code: types.CodeType) -> bool:
    return code.co_filename.rpartition(os.sep)[0] in _FOLDERS


def user_frame(frame: types.FrameType | None = None) -> types.FrameType | None:
    """The frame of the user that leads to `frame`, or to the caller."""
    frame = frame or sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and _is_runtime(frame.f_code):
        frame = frame.f_back
    return frame


def strip(error: BaseException | None) -> None:
    """Takes the runtime's frames out of the traceback of `error` and of what caused it: what remains is the user's own."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            found.__traceback__ = _stripped(found.__traceback__)
            pending += [found.__cause__, found.__context__]


def _stripped(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The same traceback without frames of the runtime; as it is if there are no others."""
    frames: list[types.TracebackType] = []
    inner = traceback
    while inner is not None:
        if not _is_runtime(inner.tb_frame.f_code):
            frames.append(inner)
        inner = inner.tb_next
    if not frames:
        return traceback
    for frame in reversed(frames):
        frame.tb_next = inner
        inner = frame
    return inner
