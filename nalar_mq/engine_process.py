"""The process of the embedded model server: llama.cpp behind its OpenAI-compatible HTTP interface, on a loopback port.

Run as a file by `nalar_mq.engines`, which says how the processes of a machine share one engine. It imports nothing of the
package, so that it is up as fast as the model loads. It is two processes, a supervisor and the server itself:

    start ──▶ supervisor ──▶ server      the server ends: another one is started, at once if it has served for a while, else
                 ▲  └────────────┘       after a pause that doubles; after `MAX_FAILURES` in a row that is a crash loop, which
                                         is told and tried on. The supervisor ends: the server ends with it (Linux).

Files in its folder:

    engine.lock    locked by both for as long as one of them lives; the kernel unlocks it, however they end: there is no second
    engine.users   each process that uses the engine holds a shared lock on it; when nobody does, the engine ends
    engine.user-*  one of each user, who removes it when it gives the engine up: where one is left when nobody uses the engine,
                   its process has died and has perhaps a successor, for which the engine waits for `GRACE_S`
    engine.json    where the server listens, and its key; there once it answers
    engine.state   how its supervision goes, for people and for those who wait: phase, failures in a row, restarts, why the last
                   one ended, and the process ids

Neither workers nor their controllers own an engine: whichever of them is killed, it serves on, and is started once. When memory
runs out, the system is told to end the server rather than the processes that use it; `engine.state` says so then.

Exit codes of the start: 0 the engine goes on in the background and holds the lock, 3 another one holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

LOCK_NAME: Final = "engine.lock"
USERS_NAME: Final = "engine.users"
USER_PREFIX: Final = "engine.user-"
ACCESS_NAME: Final = "engine.json"
STATE_NAME: Final = "engine.state"
LOG_NAME: Final = "engine.log"
EXIT_ANOTHER: Final = 3
STARTING: Final = "starting"
READY: Final = "ready"
PAUSING: Final = "pausing"
MAX_FAILURES: Final = 4
GRACE_S: Final = 5.0
_POLL_S: Final = 0.1
_HEALTHY_AFTER_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 30.0
_LONGEST_START_S: Final = 600.0
_PR_SET_PDEATHSIG: Final = 1
_ENDED_FIRST: Final = b"500"  # of 1000: before processes of the same size that say nothing
_ERRORS_ONLY: Final = 1


def main(folder: Path, model: str, parallel: int, context_tokens: int, threads: int) -> int:
    """Takes the lock, goes into the background and serves until nobody uses the engine."""
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _try_lock(lock):
        return EXIT_ANOTHER
    (folder / ACCESS_NAME).unlink(missing_ok=True)
    _write(folder / STATE_NAME, {"phase": STARTING})
    if os.fork():
        return 0
    os.setsid()

    def serve() -> None:
        key = secrets.token_hex(16)
        server = _serve(model, key, parallel, context_tokens, threads)
        told = {"url": server.listening_address, "api_key": key, "pid": os.getpid(), "model": Path(model).stem}
        _write(folder / ACCESS_NAME, told)
        while True:
            signal.pause()

    _Supervisor(folder, serve).run()
    return 0


class _Supervisor:
    """Keeps one server running for as long as somebody uses it."""

    def __init__(self, folder: Path, serve: Callable[[], None]) -> None:
        self._folder = folder
        self._serve = serve
        self._users = os.open(folder / USERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._unused_since: float | None = None
        self._failures = 0
        self._restarts = 0
        self._reason = ""

    def run(self) -> None:
        """Returns when nobody uses the engine, and it has ended."""
        while True:
            ended = self._run_once()
            if ended is None:
                break
            served_s, self._reason = ended
            self._restarts += 1
            self._failures = 1 if served_s >= _HEALTHY_AFTER_S else self._failures + 1
            if served_s < _HEALTHY_AFTER_S and self._is_unused_within(
                min(_FIRST_PAUSE_S * 2 ** (self._failures - 1), _LONGEST_PAUSE_S)
            ):
                break
        for path in (*self._folder.glob(f"{USER_PREFIX}*"), self._folder / STATE_NAME):
            path.unlink(missing_ok=True)

    def _run_once(self) -> tuple[float, str] | None:
        """One server: for how long it has served and why it ended; None if it was ended since nobody uses it."""
        began, ready_at = time.monotonic(), None
        child = self._fork()
        self._tell(STARTING, child)
        try:
            while True:
                kills = _memory_kills()
                time.sleep(_POLL_S)
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    served_s = time.monotonic() - ready_at if ready_at is not None else 0.0
                    return served_s, _why(status, is_for_memory=_memory_kills() > kills)
                if ready_at is None and (self._folder / ACCESS_NAME).exists():
                    ready_at = time.monotonic()
                    self._tell(READY, child)
                if self._is_unused():
                    _end(child)
                    return None
                if ready_at is None and time.monotonic() - began > _LONGEST_START_S:
                    os.kill(child, signal.SIGKILL)
        finally:
            (self._folder / ACCESS_NAME).unlink(missing_ok=True)

    def _fork(self) -> int:
        supervisor = os.getpid()
        child = os.fork()
        if child:
            return child
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                _offer_to_be_ended()
            if os.getppid() == supervisor:
                self._serve()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _is_unused_within(self, pause_s: float) -> bool:
        self._tell(PAUSING, 0)
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            if self._is_unused():
                return True
            time.sleep(_POLL_S)
        return False

    def _is_unused(self) -> bool:
        """True if nobody uses the engine and nobody is waited for; then nobody can until this process has ended."""
        if not _try_lock(self._users):
            self._unused_since = None
            return False
        now = time.monotonic()
        if self._unused_since is None:
            self._unused_since = now
        if now - self._unused_since >= GRACE_S or not any(self._folder.glob(f"{USER_PREFIX}*")):
            return True
        fcntl.flock(self._users, fcntl.LOCK_UN)
        return False

    def _tell(self, phase: str, pid: int) -> None:
        state = {"phase": phase, "failures": self._failures, "restarts": self._restarts, "reason": self._reason}
        _write(self._folder / STATE_NAME, {**state, "pid": pid, "supervisor": os.getpid()})


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _why(status: int, *, is_for_memory: bool) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and is_for_memory:
        return "the system ended it, since memory ran out"
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"


def _memory_kills() -> int:
    """How many processes the system has ended so far since memory ran out."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _offer_to_be_ended() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(_ENDED_FIRST)


def _serve(model: str, key: str, parallel: int, context_tokens: int, threads: int) -> Any:
    llama: Any = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = model
    params.model_alias = {Path(model).stem}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_parallel = parallel
    params.n_ctx = context_tokens * parallel
    params.cache_ram_mib = 0
    params.ui = False
    params.endpoint_metrics = True
    params.verbosity = _ERRORS_ONLY
    if threads:
        params.cpuparams.n_threads = threads
    return llama.Server(params)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Writes the file so that a reader sees all of it or none, and nobody else reads the key."""
    draft = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
