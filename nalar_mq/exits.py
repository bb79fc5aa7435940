"""How a command of ours ends: its exit codes, and the lines that tell a user why."""

from __future__ import annotations

import re
from typing import Final

from nalar_mq.errors import (
    ArgumentError,
    BrokerError,
    CallError,
    ConfigError,
    NalarError,
    NotConnectedError,
    RemoteError,
    StoreError,
    UnknownClassError,
    ValueTooLargeError,
    WireError,
    WorkerStartError,
    path_of,
)

EXIT_OK: Final = 0
EXIT_CALL_FAILED: Final = 1
EXIT_CONFIG: Final = 2
EXIT_BROKER: Final = 3
EXIT_REPLACED: Final = 4  # of a worker process: another one serves under its name
EXIT_LOST: Final = 5  # of a worker process: it stood still, and the others have given it up
EXIT_DRAINED: Final = 6  # of a worker process: somebody wanted it to be drained, and it has been
EXIT_INTERNAL: Final = 70
EXIT_INTERRUPTED: Final = 130

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CAUSED = "The above exception was the direct cause of the following exception:"


class Interrupted(Exception):
    """Somebody wants the command to end before it is done."""


class CallFailed(Exception):
    """What was called raised `error`."""

    def __init__(self, error: Exception, name: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.name = name


def explain(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and what to tell of it."""
    match error:
        case CallFailed():
            return EXIT_CALL_FAILED, _call_failure(error)
        case Interrupted():
            return EXIT_INTERRUPTED, "nalar: interrupted"
        case ConfigError() | NotConnectedError() | WireError() | ArgumentError() | ValueTooLargeError() | StoreError():
            return EXIT_CONFIG, f"nalar: error: {one_line(error)}"
        case BrokerError() | WorkerStartError():
            return EXIT_BROKER, f"nalar: error: {one_line(error)}"
        case NalarError():
            return EXIT_CALL_FAILED, f"nalar: error: {one_line(error)}"
        case _:
            what = f"{type(error).__name__}: {one_line(error)}"
            return EXIT_INTERNAL, f"nalar: internal error: {what} (`nalar --debug ...` shows where)"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _call_failure(failure: CallFailed) -> str:
    error = failure.error
    if isinstance(error, RemoteError) and error.is_of_job:
        return f"nalar: error: {one_line(error)}" + (f"\n       at {error.where}" if error.where else "")
    if isinstance(error, UnknownClassError) and error.__cause__ is None:  # raised here, not by what was called
        read = f"nalar: error: what {failure.name} gave cannot be read here: {one_line(error)}"
        return f"{read}\n       --app APP loads the classes of an app"
    actor = getattr(error, "actor", "") or failure.name
    is_foreign = isinstance(error, RemoteError) and bool(error.type_name)  # then its text begins with the name of its class
    text = f"nalar: error: {actor} failed: " + ("" if is_foreign else f"{type(error).__name__}: ") + one_line(error)
    where = "" if isinstance(error, CallError) and not is_foreign else raised_at(error)
    path = path_of(error)
    through = f", in {' -> '.join(path)}" if len(path) > 1 else ""
    return f"{text}\n       at {where}{through}" if where else text


def raised_at(error: BaseException) -> str:
    """The line of a program at which it was raised by a callee, as `file:line`; empty if the runtime has raised it.

    Where the runtime has raised it for a line of the program, as for an attribute that an agent has not, that line.
    """
    tracebacks = str(error.__cause__ or "").split(_CAUSED)
    raised = next((each for each in tracebacks if each.rstrip().endswith(str(error).rstrip())), tracebacks[-1])
    for traceback in (raised, *tracebacks):
        theirs = [frame for frame in _FRAME.findall(traceback) if "/nalar_mq/" not in f"/{frame[0]}"]
        if theirs:
            return f"{theirs[-1][0]}:{theirs[-1][1]}"
    return ""
