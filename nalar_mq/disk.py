"""Room on the disk where a broker of ours keeps its data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

LEAST_FREE_BYTES: Final = 16 * 1024 * 1024


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder that exists."""
    return shutil.disk_usage(folder).free


def want_of_room(folder: str | Path) -> str:
    """That there is too little room for a broker to go on, and where; empty if there is enough or nobody knows."""
    try:
        free = free_bytes(Path(folder))
    except OSError:
        return ""
    return "" if free >= LEAST_FREE_BYTES else f"the disk of {folder} has only {free // 1024} KiB free: make room there"
