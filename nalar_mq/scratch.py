"""Temporary folders that go with their process, however it ends.

    nalar-run-<random>/.alive   made and locked
                      /alive    the same file, once it is locked; the lock is the process's, and the system takes it back

A folder goes when its process ends as it should. What a killed one has left is removed by the next process of the same user
that makes a folder or looks for it (`clear_away`): a file `alive` that can be locked is nobody's any more, since none ever
stands there unlocked. A folder without one is let be: its process has not got so far.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Final

_PREFIX: Final = "nalar-run-"
_ALIVE: Final = "alive"


@contextlib.contextmanager
def scratch_folder() -> Generator[Path]:
    """A folder of this process, readable by its user only, until the block ends or the process is gone."""
    clear_away()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    hidden = folder / f".{_ALIVE}"
    lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hidden.rename(folder / _ALIVE)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def clear_away() -> None:
    """Removes the folders of this user's processes that are gone; what cannot be removed is let be."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    lock = os.open(folder / _ALIVE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Removes all that is in a folder, and `alive` last, so that what could not be removed is found again."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _ALIVE:
                path.unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [_ALIVE]:
            (folder / _ALIVE).unlink()
        folder.rmdir()
