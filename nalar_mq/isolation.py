"""Child processes for code that asked for one (`isolation="process"`).

A child loads the app once and then runs one call at a time: the parent writes a frame with the call, the child answers with a
frame that holds the result or the error. A frame is a length of four bytes and MessagePack. The child has no runtime, so
code in it cannot call actors; unmodified Python runs there as it stands. A call that is cancelled ends with its child,
and a child that dies ends its call with `WorkerLostError`. A child ends when its parent's pipe closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec

from nalar_mq import values
from nalar_mq.errors import WorkerLostError
from nalar_mq.spending import spend, spent_by

_IDLE_CHILDREN = 4


class Job(msgspec.Struct, array_like=True, frozen=True):
    """One call for a child."""

    actor: str
    method: str
    init: bytes
    payload: bytes


class Outcome(msgspec.Struct, array_like=True, frozen=True):
    """What became of it: a value, or the parts of a `Fail`; and what it has cost, by unit."""

    payload: bytes
    failure: tuple[str, str, bytes, str] | None = None
    costs: dict[str, float] = {}


class Children:
    """The child processes of one worker. Every method is for any thread."""

    def __init__(self, app_path: Path) -> None:
        self._app_path = app_path
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._closed = False

    def run(self, actor: str, method: str, init: bytes, payload: bytes, stoppable: Callable[[Callable[[], None]], None]) -> Any:
        """Runs a call in a child and returns its value; blocks. `stoppable` is given what kills the child.

        Raises:
            WorkerLostError: the child died.
            BaseException: whatever the call raised.
        """
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is None:
            child = _Child(self._app_path)
        stoppable(child.stop)
        try:
            outcome = child.ask(Job(actor, method, init, payload))
        except (OSError, EOFError):
            child.end()
            label = f"{actor}.{method}" if method else actor
            raise WorkerLostError(f"the child process that ran {label} ended with {child.exit_code()}", actor=label) from None
        self._keep(child)
        for unit, amount in outcome.costs.items():
            spend(amount, unit)
        if outcome.failure is not None:
            kind, text, details, traceback = outcome.failure
            raise values.decode_error(kind, text, details, traceback, "", actor)
        return values.decode(outcome.payload)

    def _keep(self, child: _Child) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CHILDREN:
                self._idle.append(child)
                return
        child.end()

    def close(self) -> None:
        """Ends all idle children; busy ones end after their call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()


class _Costs:
    """What a call in this child has spent, by unit."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float, unit: str) -> None:
        with self._lock:
            self.sums[unit] = self.sums.get(unit, 0.0) + amount


class _Child:
    def __init__(self, app_path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nalar_mq.isolation", str(app_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._lock = threading.Lock()

    def ask(self, job: Job) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        _write(self._process.stdin, msgspec.msgpack.encode(job))
        return msgspec.msgpack.decode(_read(self._process.stdout), type=Outcome)

    def stop(self) -> None:
        """Kills it and the processes it has started; waits for nothing, so that it may be called on the loop."""
        with self._lock:
            if self._process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills it, and leaves nothing of it; in the thread of its call, or where no call is."""
        self.stop()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def exit_code(self) -> str:
        code = self._process.poll()
        return "no exit code" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(4, "big") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    size = pipe.read(4)
    if len(size) < 4:
        raise EOFError
    data = pipe.read(int.from_bytes(size, "big"))
    if len(data) < int.from_bytes(size, "big"):
        raise EOFError
    return data


def serve(app_path: Path) -> None:
    """Runs as a child until the parent's pipe closes. What the user's code prints goes to standard error."""
    from nalar_mq.app import load_app

    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for pipe in (requests, answers):  # a process that the user's code forks off would keep them open
        os.register_at_fork(after_in_child=pipe.close)
    threading.Thread(target=_end_with_parent, args=(requests.fileno(),), daemon=True).start()
    app = load_app(app_path)
    instances: dict[tuple[str, bytes], Any] = {}
    while True:
        try:
            job = msgspec.msgpack.decode(_read(requests), type=Job)
        except EOFError:
            return
        costs = _Costs()
        try:
            spec = app.actors[job.actor]
            function = spec.methods[job.method].function
            if spec.kind == "agent":
                function = function.__get__(_instance(instances, spec.target, job))
            args, kwargs = values.decode_arguments(job.payload)
            with spent_by(costs.add):
                value = completed(function(*args, **kwargs))
            outcome = Outcome(values.encode(value, None, f"the result of {job.actor}"), costs=costs.sums)
        except BaseException as error:
            failure = values.encode_error(error)
            outcome = Outcome(b"", (failure.kind, failure.text, failure.payload, failure.traceback), costs.sums)
        _write(answers, msgspec.msgpack.encode(outcome))


def _end_with_parent(pipe: int) -> None:
    """Ends this process, in the middle of a call too, when nobody is left at the other end of the pipe."""
    hang_up = select.poll()
    hang_up.register(pipe, 0)
    hang_up.poll()
    os._exit(1)


def _instance(instances: dict[tuple[str, bytes], Any], target: Callable[..., Any], job: Job) -> Any:
    key = (job.actor, job.init)
    if key not in instances:
        args, kwargs = values.decode_arguments(job.init) if job.init else ([], {})
        instances[key] = target(*args, **kwargs)
    return instances[key]


def completed(result: Any) -> Any:
    """The value of what a function returned: coroutines are run, generators drained."""
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    if inspect.isgenerator(result):
        return list(result)
    if inspect.isasyncgen(result):

        async def drain() -> list[Any]:
            return [piece async for piece in result]

        return asyncio.run(drain())
    return result


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
