"""Temporary folders of processes that end, are killed, or live."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nalar_mq.scratch import clear_away, scratch_folder

HOLDER = """
import sys
from nalar_mq.scratch import scratch_folder

with scratch_folder() as folder:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "data").write_text("x")
    print(folder, flush=True)
    sys.stdin.readline()
"""


class Holder:
    """Another process with a folder of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", HOLDER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def end(self) -> None:
        self.process.communicate("\n")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def hold(temporary: Path) -> Iterator[Callable[[], Holder]]:
    holders: list[Holder] = []

    def make() -> Holder:
        holders.append(Holder())
        return holders[-1]

    yield make
    for holder in holders:
        if holder.process.poll() is None:
            holder.kill()


def test_a_folder_goes_with_its_block(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "data").write_text("x")
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_folder_goes_with_its_process(temporary: Path, hold: Callable[[], Holder]) -> None:
    holder = hold()
    assert (holder.folder / "deep" / "er" / "data").read_text() == "x"
    holder.end()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_and_that_of_a_living_one_stays(temporary: Path, hold: Callable[[], Holder]) -> None:
    killed, living = hold(), hold()
    killed.kill()
    assert killed.folder.is_dir()
    clear_away()
    assert not killed.folder.exists()
    assert (living.folder / "deep" / "er" / "data").read_text() == "x"


def test_whoever_makes_a_folder_clears_away_what_was_left(temporary: Path, hold: Callable[[], Holder]) -> None:
    killed = hold()
    killed.kill()
    with scratch_folder() as folder:
        assert list(temporary.iterdir()) == [folder]
        clear_away()
        assert list(temporary.iterdir()) == [folder]


def test_what_a_process_has_not_locked_yet_stays(temporary: Path) -> None:
    """The files of one that has just made its folder."""
    begun = temporary / "nalar-run-begun"
    begun.mkdir()
    (begun / ".alive").write_text("")
    clear_away()
    assert (begun / ".alive").exists()


def test_nothing_is_removed_through_a_link(temporary: Path, hold: Callable[[], Holder]) -> None:
    kept = temporary / "kept"
    kept.mkdir()
    (kept / "alive").write_text("")
    (temporary / "nalar-run-link").symlink_to(kept)
    killed = hold()
    killed.kill()
    (killed.folder / "away").symlink_to(kept)
    clear_away()
    assert not killed.folder.exists()
    assert (kept / "alive").exists()
