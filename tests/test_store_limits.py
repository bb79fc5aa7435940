"""Stores without room, without leave to write, of other versions, and of processes that are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nalar_mq import store as store_module
from nalar_mq.errors import StoreError, StoreFullError, StoreVersionError
from nalar_mq.store import Commit, Removal, Session, Store, examine

FIRST = 1 << 63
MB = 1024 * 1024


def is_mounted(folder: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not is_mounted(folder, "-o", "size=8m"):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def commit(session: Session, number: int, size: int, call: bytes = b"") -> Commit:
    return Commit(session, [("items", FIRST + number, bytes([number % 256]) * size)], call, b"")


def check_that_room_runs_out_and_comes_back(store: Store, large: int) -> None:
    small, big = store.session("notes", "small"), store.session("notes", "big")
    assert store.write([commit(small, 0, 100), commit(big, 0, 100)]) == [None, None]
    errors = store.write([commit(small, 1, 100), commit(big, 1, large), commit(small, 2, 100)])
    assert isinstance(errors[1], StoreFullError) and "nalar state drop" in str(errors[1])
    assert errors[0] is None and errors[2] is None
    assert len(store.load(store.session("notes", "small"))["items"]) == 3
    assert len(store.load(store.session("notes", "big"))["items"]) == 1
    number = 2
    while store.write([commit(big, number, 100_000)]) == [None]:
        number += 1
    assert len(store.load(store.session("notes", "big"))["items"]) == number - 1


def test_a_full_disk(disk: Path) -> None:
    store = Store.open(disk / "1", "w-1")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(2 * MB))
    check_that_room_runs_out_and_comes_back(store, 20 * MB)
    ballast.unlink()
    big = store.session("notes", "big")
    assert store.write([commit(big, 5_000, 100_000)]) == [None]
    store.close()
    assert examine(disk / "1") == []


def test_a_disk_that_is_full_from_the_start(disk: Path) -> None:
    with (disk / "ballast").open("wb") as ballast, pytest.raises(OSError):
        while True:
            os.write(ballast.fileno(), bytes(4096))
    with pytest.raises(StoreFullError):
        Store.open(disk / "1", "w-1")
    (disk / "ballast").unlink()
    Store.open(disk / "1", "w-1").close()


def test_a_full_map(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "1", "w-1", limit_bytes=4 * MB)
    check_that_room_runs_out_and_comes_back(store, 20 * MB)
    store.close()
    store = Store.open(tmp_path / "1", "w-1", limit_bytes=16 * MB)
    assert store.write([commit(store.session("notes", "big"), 5_000, 4 * MB)]) == [None]
    store.close()


def test_a_disk_that_may_only_be_read(disk: Path) -> None:
    store = Store.open(disk / "1", "w-1")
    store.write([commit(store.session("notes", "ann"), 0, 10)])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StoreError, match="Read-only"):
        Store.open(disk / "1", "w-1")
    store = Store.read(disk / "1")
    assert store.load(store.session("notes", "ann")) == {"items": [(FIRST, bytes(10))]}
    store.close()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    Store.open(disk / "1", "w-1").close()


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "1", "w-1")
    store.write([commit(store.session("notes", "ann"), 0, 10)])
    store.close()
    monkeypatch.setattr(store_module, "FORMAT", 3)
    with pytest.raises(StoreVersionError, match=r"has format 1.*nalar state export"):
        Store.open(tmp_path / "1", "w-1")
    steps: list[int] = []

    def upgrade(number: int) -> store_module.Upgrade:
        return lambda txn, trees: steps.append(number + 0 * txn.stat(trees["entries"])["entries"])

    with pytest.raises(StoreVersionError):
        Store.open(tmp_path / "1", "w-1", upgrades={1: upgrade(1)})
    Store.open(tmp_path / "1", "w-1", upgrades={1: upgrade(1), 2: upgrade(2)}).close()
    assert steps == [1, 1, 2]  # the first attempt came to nothing, and left nothing
    monkeypatch.setattr(store_module, "FORMAT", 1)
    for open_store in (lambda: Store.open(tmp_path / "1", "w-1"), lambda: Store.read(tmp_path / "1")):
        with pytest.raises(StoreVersionError, match=r"has format 3.*knows formats up to 1"):
            open_store()
    monkeypatch.setattr(store_module, "FORMAT", 3)
    store = Store.open(tmp_path / "1", "w-1")
    assert store.load(store.session("notes", "ann")) == {"items": [(FIRST, bytes(10))]}
    store.close()


WRITER = """
import pathlib, sys
from nalar_mq.store import Commit, Store
store = Store.open(pathlib.Path(sys.argv[1]), "writer")
first = int(sys.argv[2])
for number in range(first, first + 1_000_000):
    a, b = (store.session("notes", name) for name in ("a", "b"))
    changes = [("items", number, b"%d" % number * 300), ("total", 1, b"%d" % number)]
    commits = [Commit(s, changes, number.to_bytes(8, "big"), b"r%d" % number) for s in (a, b)]
    assert store.write(commits) == [None, None]
    print(number, flush=True)
"""


def test_a_writer_that_is_killed(tmp_path: Path) -> None:
    told = 0
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "1"), str(told + 1)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(20):
            told = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        rest, _ = child.communicate()
        told = max([told, *(int(line) for line in rest.split("\n")[:-1])])
        assert examine(tmp_path / "1") == []
        store = Store.open(tmp_path / "1", "reader")
        totals = set()
        for name in ("a", "b"):
            session = store.session("notes", name)
            found = store.load(session)
            last = found["items"][-1][0]
            assert found["items"] == [(number, b"%d" % number * 300) for number in range(1, last + 1)]
            assert found["total"] == [(1, b"%d" % last)]
            assert [outcome.payload for outcome in store.outcomes(session)] == [b"r%d" % n for n in range(1, last + 1)]
            totals.add(last)
        store.close()
        (last,) = totals
        assert told <= last <= told + 1
        told = last


class StoreMachine(RuleBasedStateMachine):
    """A store against plain dicts, over commits, removals, failures and reopenings; its map grows as it must."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=memory))
        self.store = Store.open(self.folder / "1", "w-1")
        self.kept: dict[str, dict[int, bytes]] = {}
        self.records: dict[str, dict[bytes, bytes]] = {}
        self.calls = 0

    names = st.sampled_from(["a", "ab", "b", "c/1"])
    changes = st.lists(
        st.tuples(st.integers(0, 12), st.one_of(st.none(), st.binary(max_size=20), st.sampled_from([0, 9_000]).map(bytes))),
        max_size=6,
    )

    @rule(commits=st.lists(st.tuples(names, changes, st.booleans()), min_size=1, max_size=4))
    def commit(self, commits: list[tuple[str, list[tuple[int, bytes | None]], bool]]) -> None:
        sessions = {name: self.store.session("notes", name) for name, _, _ in commits}
        writes = []
        for name, changes, is_job in commits:
            self.calls += 1
            call = self.calls.to_bytes(8, "little")
            writes.append(Commit(sessions[name], [("f", order, data) for order, data in changes], call, call * 2, is_job))
            kept = self.kept.setdefault(name, {})
            for order, data in changes:
                kept.pop(order, None)
                if data is not None:
                    kept[order] = data
            self.records.setdefault(name, {})[call] = call * 2
        assert self.store.write(writes) == [None] * len(writes)

    @rule(name=names)
    def remove(self, name: str) -> None:
        assert self.store.write([Removal(self.store.session("notes", name))]) == [None]
        self.kept.pop(name, None)
        self.records.pop(name, None)

    @rule(name=names)
    def fail(self, name: str) -> None:
        bad = Commit(self.store.session("notes", name), [("f", 1, b"x"), ("f" * 600, 1, b"x")], b"", b"")
        (error,) = self.store.write([bad])
        assert isinstance(error, StoreError)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        assert examine(self.folder / "1") == []
        self.store = Store.open(self.folder / "1", "w-1")

    @precondition(lambda self: self.kept)
    @rule()
    def compact(self) -> None:
        self.store.compact_here()
        self.store = Store.open(self.folder / "1", "w-1")

    @invariant()
    def all_is_there(self) -> None:
        assert [session.name for session in self.store.sessions()] == sorted(self.kept)
        for name, kept in self.kept.items():
            session = self.store.session("notes", name)
            assert dict(self.store.load(session).get("f", [])) == kept
            assert {outcome.call: outcome.payload for outcome in self.store.outcomes(session)} == self.records[name]
        assert list(self.store.findings()) == []

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, print_blob=True)
TestStoreMachine = StoreMachine.TestCase


def test_the_map_grows_while_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FIRST_MAP", MB)
    store = Store.open(tmp_path / "1", "w-1")
    store.write([commit(store.session("notes", "ann"), 0, 1000)])
    code = """
import pathlib, sys
from nalar_mq.store import Store
store = Store.read(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
for _ in sys.stdin:
    whole = store.whole("notes", "ann")
    print(len(whole.entries["items"]), flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "1")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None and reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for number in range(1, 60):
        assert store.write([commit(store.session("notes", "ann"), number, 100_000)]) == [None]
        print("now", file=reader.stdin, flush=True)
        assert reader.stdout.readline() == f"{number + 1}\n"
    reader.communicate()
    store.close()
