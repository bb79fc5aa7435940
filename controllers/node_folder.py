"""What a node keeps on its machine, so that its workers outlive the process of its controller, and the next one finds them.

    <nodes>/<node>/lock           held by the controller for as long as it lives
                   node.json      `NodeRecord`: what the node serves, and which processes are its workers
                   control.sock   where workers that have lost their controller find its successor

A process is named by its id and the time of its start, so that another one which has got the same id is not taken for it. The
folder goes when the controller ends as it should; what a killed one has left is for its successor.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import msgspec

IS_SUPPORTED: Final = sys.platform == "linux"  # elsewhere a process that is no child cannot be waited for
_LOCK: Final = "lock"
_RECORD: Final = "node.json"
_SOCKET: Final = "control.sock"
_LONGEST_PATH: Final = 100


class Running(msgspec.Struct, frozen=True):
    """A process: its id, and its start in ticks of the system."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """True if this very process is there and has not ended."""
        return start_of(self.pid) == self.started


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A node, for the next controller of it.

    Attributes:
        app: the file that it serves.
        urls, namespace: of its broker.
        workers: the processes, by the names of the workers.
        serves: the actors of those workers of which it was decided since they began.
        added: the workers that came to those it began with, with the agents that they came for.
        stopped: the workers that are not wanted any more.
    """

    app: str
    urls: tuple[str, ...]
    namespace: str
    workers: dict[str, Running] = {}
    serves: dict[str, tuple[str, ...]] = {}
    added: dict[str, str] = {}
    stopped: tuple[str, ...] = ()

    @property
    def has_workers(self) -> bool:
        """True if one of them lives."""
        return any(worker.is_alive for worker in self.workers.values())

    def serves_like(self, other: NodeRecord) -> bool:
        """True if the workers of one can be those of the other."""
        return (self.app, self.urls, self.namespace) == (other.app, other.urls, other.namespace)


class NodeFolder:
    """The folder of a node, which this process has the lock of.

    Attributes:
        name: of the node.
        path: of the folder.
        found: what a former controller has left; None if there is nothing.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._lock = lock
        self.name = path.name
        self.path = path
        self.found = _record_in(path)

    @classmethod
    def claim(cls, path: Path) -> Self | None:
        """The folder of a node, made if it is not there; None if another process has it, or it cannot be made."""
        if not IS_SUPPORTED:
            return None
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:  # else its former owner has removed it meanwhile
                return cls(path, lock)
        except OSError:
            pass
        os.close(lock)
        return None

    @classmethod
    def left_behind(cls, nodes: Path, wanted: NodeRecord) -> Self | None:
        """A node that serves the same, whose controller is gone and of whose workers one lives; others are cleared away."""
        for path in _folders(nodes):
            folder = cls.claim(path)
            if folder is None:
                continue
            found = folder.found
            if found is not None and found.has_workers and found.serves_like(wanted):
                return folder
            folder.give_up()
        return None

    @classmethod
    def clear_away(cls, nodes: Path) -> None:
        """Removes the folders of nodes of which nothing lives."""
        for path in _folders(nodes):
            folder = cls.claim(path)
            if folder is not None:
                folder.give_up()

    def write(self, record: NodeRecord) -> None:
        """Replaces what is there in one step."""
        fd, scratch = tempfile.mkstemp(dir=self.path, prefix=f".{_RECORD}-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(record))
            os.replace(scratch, self.path / _RECORD)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise

    def listen(self) -> socket.socket:
        """Where workers of this node may connect to."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                (self.path / _SOCKET).unlink()
            with _short(self.path) as path:
                listener.bind(path)
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        return listener

    def leave(self) -> None:
        """Gives the lock back; all that is there stays."""
        os.close(self._lock)

    def give_up(self) -> None:
        """There is to be no node: what a former controller has left stays for the next one, and else nothing does."""
        if self.found is not None and self.found.has_workers:
            self.leave()
        else:
            self.remove()

    def remove(self) -> None:
        """The node is no more; also removes the folders above it that are empty then."""
        for name in (_RECORD, _SOCKET, _LOCK):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        with contextlib.suppress(OSError):
            for folder in (self.path, self.path.parent, self.path.parent.parent):
                folder.rmdir()
        self.leave()


def connect_to(folder: Path) -> socket.socket:
    """A connection to the controller of the node of that folder.

    Raises:
        OSError: there is none.
    """
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with _short(folder) as path:
            link.connect(path)
    except BaseException:
        link.close()
        raise
    return link


def start_of(pid: int) -> int | None:
    """When a process has started, in ticks of the system; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def signal_to(pidfd: int, number: int) -> None:
    """Sends a signal to the process of a `pidfd`; nothing happens if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _folders(nodes: Path) -> list[Path]:
    try:
        return sorted(path for path in nodes.iterdir() if path.is_dir())
    except OSError:
        return []


def _record_in(folder: Path) -> NodeRecord | None:
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=NodeRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A path of the socket that is short enough for one."""
    path = str(folder / _SOCKET)
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield path
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_SOCKET}"
    finally:
        os.close(fd)
