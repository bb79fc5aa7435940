"""Logs of a process: structlog on stderr, for people on a terminal and as JSON lines elsewhere; secrets are blotted out.

The name of an event is the name of the telemetry event it tells of (`worker.ready`), what it is about stands in fields.
What libraries log through `logging` takes the same way out.

In a program of somebody else, who has configured nothing, warnings and errors go to stderr and nothing ever to stdout; one
that has configured structlog gets our events in its own way.

structlog is loaded when there is something to log: a program that only makes calls starts faster by a tenth.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Generator, MutableMapping
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO, TypeAlias, cast

if TYPE_CHECKING:
    import structlog

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
_LEVELS: Final[dict[Level, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|credentials?|authorization|api_key|nkey_seed)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_BLOT: Final = "***"
_UNSEEN: Final = ("debug", "info")  # where nobody has configured anything


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of a module; how it logs is decided at each event, by whether structlog has been configured by then."""
    return cast("structlog.typing.FilteringBoundLogger", _Logger(name))


class _Logger:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if "structlog" not in sys.modules and attribute in _UNSEEN:
            return _ignore
        import structlog

        found = structlog.get_logger(self._name) if structlog.is_configured() else _unconfigured()
        return getattr(found, attribute)


def _ignore(*_: object, **__: object) -> None:
    """An event that nobody wants to see."""


class _Sink(io.TextIOBase):
    """A stream that never fails: who logs goes on, although nobody can read it, when stderr is closed or its disk full."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # Looked up at each event: a program may replace its stderr.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            (self._stream or sys.stderr).write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            (self._stream or sys.stderr).flush()


def _unconfigured() -> Any:
    import structlog

    return structlog.wrap_logger(
        structlog.PrintLogger(cast(TextIO, _Sink())),
        processors=[
            structlog.stdlib.add_log_level,
            redact,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )


def configure_logs(level: Level = "info", *, as_json: bool | None = None, stream: TextIO | None = None) -> None:
    """Sets up the logs of this process; called once, by whoever owns the process, never by a library.

    Args:
        level: what is less than this is dropped.
        as_json: one JSON object a line; None decides by whether `stream` is a terminal.
        stream: where to; stderr if not given.
    """
    with _hidden("rich"):
        import structlog

    out = cast(TextIO, _Sink(stream))
    on_terminal = (stream if stream is not None else sys.stderr).isatty()
    wants_json = not on_terminal if as_json is None else as_json
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, *_rendering(wants_json, on_terminal)],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    _configure_libraries(shared, _rendering(wants_json, on_terminal), out, max(_LEVELS[level], logging.WARNING))


@contextlib.contextmanager
def _hidden(module: str) -> Generator[None]:
    """structlog loads rich for tracebacks that are not printed here: a tenth of what a worker does before it serves."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replaces values whose names say that they are secret, and user names and passwords in URLs."""
    for key, value in event.items():
        if _SECRET_KEY.search(key):
            event[key] = _BLOT
        elif isinstance(value, str) and "://" in value:
            event[key] = _USER_INFO.sub(f"{_BLOT}@", value)
    return event


def _rendering(as_json: bool, colors: bool) -> list[structlog.typing.Processor]:
    import structlog

    if as_json:
        return [structlog.processors.JSONRenderer(default=repr)]
    return [structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24)]


def _configure_libraries(
    shared: list[structlog.typing.Processor], rendering: list[structlog.typing.Processor], out: TextIO, level: int
) -> None:
    import structlog

    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *rendering,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
