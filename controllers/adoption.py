"""Worker processes that another controller has started: no children of this process, and waited for all the same."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Final

from .node_folder import Running, signal_to

_CREDENTIALS: Final = struct.Struct("3i")  # id of the process, of its user, and of its group
EXIT_UNKNOWN: Final = 1

Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AdoptedProcess:
    """What `asyncio.subprocess.Process` is for a child; its exit code is not known and stands for a failure.

    Attributes:
        pid: its id.
        returncode: None while it lives.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.pid = pid
        self.returncode: int | None = None
        self._loop.add_reader(pidfd, self._on_end)

    @classmethod
    def find(cls, running: Running) -> AdoptedProcess | None:
        """The process, if it lives."""
        try:
            pidfd = os.pidfd_open(running.pid)
        except OSError:
            return None
        if running.is_alive:  # from now on its id is nobody else's: the descriptor holds it
            return cls(running.pid, pidfd)
        os.close(pidfd)
        return None

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.returncode = EXIT_UNKNOWN
        self._ended.set()

    def send_signal(self, number: int) -> None:
        """As for a child."""
        if self.returncode is None:
            signal_to(self._pidfd, number)

    async def wait(self) -> int:
        """Returns when it has ended."""
        await self._ended.wait()
        return EXIT_UNKNOWN


def peer_of(writer: asyncio.StreamWriter) -> int:
    """The id of the process at the other end of a local connection, as the system tells it."""
    connection: socket.socket = writer.get_extra_info("socket")
    pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid)
