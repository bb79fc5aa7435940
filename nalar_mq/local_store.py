"""Large values as files in a folder that the processes of one user on one machine share.

A file is named `<owner>.<incarnation>.<random>` after the process that answers for the value. Beside it stands
`<owner>.<incarnation>.lock`, which that process keeps locked for as long as it lives: whoever can lock it knows that the
process is dead, whatever runtime it belonged to, and removes its files. Files of an owner on another machine have no lock
here; they go when their owner says so, when it is declared lost, or after a week.

Two processes see the same folder if they read the same random text in its file `id`. That says more than the name of the
machine: containers on one machine may not share a folder, and machines may.

Everything here blocks and is for threads, except `open`, which is short.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nalar_mq.logs import logger

KEPT_S: Final = 7 * 24 * 3600.0
_UNFINISHED_S: Final = 3600.0
_LOCK: Final = ".lock"
_UNFINISHED: Final = ".part-"
_log = logger(__name__)


class LocalStore:
    """One process's view of the folder. Made by `open`.

    Attributes:
        id: the same for all processes that see this folder, and for no others.
    """

    def __init__(self, folder: Path, id: str, owner: str, lock: int) -> None:
        self.id = id
        self._folder = folder
        self._owner = owner
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, owner: str) -> LocalStore | None:
        """The store in `folder`, made if it is not there, for the process `owner`; None, and a warning, if it cannot be used.

        The folder must belong to this user, and nobody else may enter it.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise PermissionError(f"{folder} must be a folder of this user that nobody else can enter (mode 0700)")
            return cls(folder, _id_of(folder), owner, _locked(folder, owner))
        except OSError as error:
            _log.warning("local_store.unusable", folder=str(folder), error=str(error))
            return None

    def write(self, name: str, data: bytes) -> None:
        """Keeps `data` under `name`, whole or not at all.

        Raises:
            OSError: it cannot; no space, for one.
        """
        part = self._folder / f"{_UNFINISHED}{name}"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            part.rename(self._folder / name)
            if self._lock < 0:
                self.remove(name)  # closed meanwhile: nobody would
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> bytes:
        """What is kept under `name`.

        Raises:
            OSError: it is not there or cannot be read.
        """
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            return file.readall()

    def remove(self, name: str) -> None:
        """Removes what is kept under `name`, if anything is."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def remove_all_of(self, owner: str) -> None:
        """Removes everything that `owner` answers for."""
        for path in self._values():
            if path.name.startswith(f"{owner}."):
                self.remove(path.name)

    def names(self) -> list[str]:
        """What is kept here, whoever answers for it."""
        return [path.name for path in self._values()]

    def _values(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                if path.name.count(".") == 2 and path.name[0] != "." and path.suffix != _LOCK:
                    yield path

    def sweep(self) -> None:
        """Removes what dead processes have left behind."""
        with contextlib.suppress(OSError):
            for path in list(self._folder.glob(f"*{_LOCK}")):
                owner = path.name.removesuffix(_LOCK)
                if owner != self._owner:
                    self._bury(owner, path)
            self._remove_old(f"{_UNFINISHED}*", _UNFINISHED_S)
            self._remove_old("[!.]*.*.*", KEPT_S)

    def _bury(self, owner: str, path: Path) -> None:
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.remove_all_of(owner)
                path.unlink()
            finally:
                os.close(lock)

    def _remove_old(self, pattern: str, age_s: float) -> None:
        before = time.time() - age_s
        for path in self._folder.glob(pattern):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < before and not path.name.endswith(_LOCK):
                    path.unlink()

    def close(self) -> None:
        """Removes everything this process answers for; idempotent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            self.remove_all_of(self._owner)
            self.remove(f"{self._owner}{_LOCK}")
            os.close(lock)


def _id_of(folder: Path) -> str:
    """Written by whoever comes first; complete for all who see it."""
    path = folder / "id"
    if not path.exists():
        own = folder / f"{_UNFINISHED}id-{os.urandom(8).hex()}"
        own.write_text(os.urandom(16).hex())
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
    return path.read_text()


def _locked(folder: Path, owner: str) -> int:
    """A lock gets its name when it is locked, so that nobody finds the one of a living process open."""
    unnamed = folder / f"{_UNFINISHED}lock-{os.urandom(8).hex()}"
    lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / f"{owner}{_LOCK}")
    except BaseException:
        os.close(lock)
        unnamed.unlink(missing_ok=True)
        raise
    return lock
