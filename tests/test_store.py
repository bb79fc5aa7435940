"""The store: what is committed is there whole or not at all, and damage is named."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nalar_mq.committer import Committer, background_bytes
from nalar_mq.errors import StoreBusyError, StoreForeignError, StoreLostError
from nalar_mq.store import HERE, JOB_RECORD_S, LEFT, RECORD_S, STAGED, Commit, Departure, Removal, Row, Store, examine, lump_of

FIRST = 1 << 63


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "1", "w-1")
    yield opened
    opened.close()


def test_what_is_written_is_there_after_it_is_opened_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "1", "w-1")
    session = store.session("notes", "ann")
    assert not session.is_kept
    changes = [("items", FIRST, b"one"), ("items", FIRST + 1, b"two"), ("title", FIRST, b"t")]
    assert store.write([Commit(session, changes, id_of(1), b"result")]) == [None]
    store.close()
    store = Store.open(tmp_path / "1", "w-1")
    session = store.session("notes", "ann")
    assert store.load(session) == {"items": [(FIRST, b"one"), (FIRST + 1, b"two")], "title": [(FIRST, b"t")]}
    record = store.record(session, id_of(1))
    assert record is not None and record.payload == b"result"
    assert store.record(session, id_of(2)) is None
    store.close()


def test_changes_and_removals_leave_nothing_behind(store: Store) -> None:
    session = store.session("notes", "ann")
    store.write([Commit(session, [("items", FIRST + n, b"%d" % n) for n in range(10)], id_of(1), b"")])
    store.write([Commit(session, [("items", FIRST + 3, None), ("items", FIRST + 4, b"four")], id_of(2), b"")])
    loaded = store.load(store.session("notes", "ann"))["items"]
    assert [data for _, data in loaded] == [b"0", b"1", b"2", b"four", b"5", b"6", b"7", b"8", b"9"]
    store.write([Removal(session)])
    assert not store.session("notes", "ann").is_kept
    again = store.session("notes", "ann")
    store.write([Commit(again, [("items", FIRST, b"new")], id_of(3), b"")])
    assert store.load(store.session("notes", "ann")) == {"items": [(FIRST, b"new")]}
    assert store.count() == 1


def test_a_long_value_that_becomes_a_short_one_is_no_damage(tmp_path: Path) -> None:
    for data in (b"long" * 5_000, b"medium" * 1_200, b"short"):
        store = Store.open(tmp_path / "1", "w-1")
        store.write([Commit(store.session("notes", "ann"), [("items", FIRST, data)], b"", b"")])
        assert store.load(store.session("notes", "ann")) == {"items": [(FIRST, data)]}
        store.close()
    assert examine(tmp_path / "1") == []


def test_what_a_call_came_to_is_recorded_once(store: Store) -> None:
    session = store.session("notes", "ann")
    commits = [Commit(session, [("items", FIRST, b"one")], id_of(number), b"r%d" % number) for number in (1, 2)]
    for _ in range(2):  # what was shipped to another store may be applied there again
        assert store.write(commits) == [None, None]
    session = store.session("notes", "ann")
    assert store.load(session) == {"items": [(FIRST, b"one")]}
    assert [outcome.payload for outcome in store.outcomes(session)] == [b"r1", b"r2"]


def test_several_calls_of_one_session_in_one_transaction(store: Store) -> None:
    session = store.session("notes", "ann")
    writes = [Commit(session, [("items", FIRST + n, b"%d" % n)], id_of(n), b"r%d" % n) for n in range(5)]
    assert store.write(writes) == [None] * 5
    assert len(store.load(store.session("notes", "ann"))["items"]) == 5
    record = store.record(session, id_of(3))
    assert record is not None and record.payload == b"r3"


def test_records_expire_from_the_oldest(store: Store) -> None:
    session = store.session("notes", "ann")
    store.write([Commit(session, [], id_of(1), b"call")], now_s=1000.0)
    store.write([Commit(session, [], id_of(2), b"job", is_job=True)], now_s=1000.0)
    store.write([Commit(session, [], id_of(3), b"call")], now_s=1000.0 + RECORD_S)
    assert store.record(session, id_of(1)) is None
    assert store.record(session, id_of(2)) is not None
    store.write([Commit(session, [], id_of(4), b"call")], now_s=1000.0 + JOB_RECORD_S)
    assert store.record(session, id_of(2)) is None


def test_a_store_is_open_in_one_process_at_a_time(store: Store) -> None:
    with pytest.raises(StoreBusyError, match=rf"'w-1', process {os.getpid()}"):
        Store.open(store.folder, "w-2")


def test_whoever_lost_it_writes_nothing(store: Store) -> None:
    session = store.session("notes", "ann")
    store.write([Commit(session, [("items", FIRST, b"mine")], id_of(1), b"")])
    os.unlink(store.folder / "owner")  # the lock of a process that is held to be dead, and is not
    take_over = "import pathlib, sys; from nalar_mq.store import Store; Store.open(pathlib.Path(sys.argv[1]), 'w-2').close()"
    subprocess.run([sys.executable, "-c", take_over, str(store.folder)], check=True)
    with pytest.raises(StoreLostError):
        store.write([Commit(session, [("items", FIRST, b"late")], id_of(2), b"")])
    assert store.load(store.session("notes", "ann")) == {"items": [(FIRST, b"mine")]}


def test_a_store_stays_in_its_directory(store: Store) -> None:
    store.belong_to("one")
    store.belong_to("two")  # it has nothing yet
    store.write([Commit(store.session("notes", "ann"), [("items", FIRST, b"x")], id_of(1), b"")])
    with pytest.raises(StoreForeignError, match="nalar state adopt"):
        store.belong_to("three")
    store.move_to("three")
    store.belong_to("three")


def test_the_committer_tells_everybody_in_order(tmp_path: Path) -> None:
    committer = Committer(Store.open(tmp_path / "1", "w-1"), lambda: None)
    sessions = [committer.store.session("notes", f"s{n}") for n in range(10)]
    told: list[tuple[int, Exception | None]] = []
    done = threading.Event()

    def tell(number: int, error: Exception | None) -> None:
        told.append((number, error))
        if number == 499:
            done.set()

    for number in range(500):
        commit = Commit(sessions[number % 10], [("items", FIRST + number, b"x")], id_of(number), b"")
        committer.put(commit, lambda error, number=number: tell(number, error))  # type: ignore[misc]
    assert done.wait(30)
    assert told == [(number, None) for number in range(500)]
    assert committer.commits < 500
    committer.close()
    store = Store.open(tmp_path / "1", "w-1")
    assert [len(store.load(store.session("notes", f"s{n}"))["items"]) for n in range(10)] == [50] * 10
    store.close()


def _rows_of(store: Store, limit_bytes: int) -> list[list[Row]]:
    """All of a session, in parts."""
    session, after, parts = store.session("notes", "ann"), b"", []
    while True:
        rows, after = store.rows(session, after, limit_bytes)
        parts.append(rows)
        if not after:
            return parts


@pytest.mark.parametrize("other", ["none", "before", "after"])
def test_rows_are_in_another_store_what_they_are_here(store: Store, tmp_path: Path, other: str) -> None:
    """Whether they can go to its end, or others stand behind them, or some of them are there already."""
    items = [("items", FIRST + n, b"%d" % n * (n % 50)) for n in range(1_000)]
    changes = [*items, ("large", FIRST, b"x" * 1_000_000), ("title", FIRST, b"t")]
    store.write(
        [Commit(store.session("notes", "bob"), items, b"", b""), Commit(store.session("notes", "ann"), changes, b"", b"")]
    )
    parts = _rows_of(store, 5_000)
    assert len(parts) > 10
    assert max(sum(len(value) for _, value in rows[:-1]) for rows in parts) < 5_000
    there = Store.open(tmp_path / "2", "w-2")
    if other == "before":
        there.write([Commit(there.session("notes", "bob"), items, b"", b"")])
    session = there.session("notes", "ann")
    for number, rows in enumerate(parts):
        assert there.write([Commit(session, [], b"", b"", standing=STAGED, other="1", lump=lump_of(rows))]) == [None]
        if other == "after" and number == 3:
            there.write([Commit(there.session("notes", "bob"), items, b"", b"")])
            assert there.write([Commit(session, [], b"", b"", standing=STAGED, other="1", lump=lump_of(rows))]) == [None]
    assert there.load(session) == store.load(store.session("notes", "ann"))
    assert session.sums == store.session("notes", "ann").sums
    assert list(there.findings()) == []
    there.close()
    assert examine(tmp_path / "2") == []


@pytest.mark.parametrize("byte", [12, -1, None])
def test_no_lump_has_a_row_that_is_damaged(store: Store, byte: int | None) -> None:
    store.write([Commit(store.session("notes", "ann"), [("items", FIRST + n, b"%d" % n) for n in range(9)], b"", b"")])
    ((*rows, (key, value)),) = _rows_of(store, 5_000)
    assert lump_of([*rows, (key, value)]) is not None
    damaged = bytearray(key + value)
    if byte is not None:
        damaged[byte] ^= 1
    data = bytes(damaged) if byte is not None else key + value[:2]
    assert lump_of([*rows, (data[: len(key)], data[len(key) :])]) is None


def test_what_departs_leaves_the_entries_of_others(store: Store) -> None:
    items = [("items", FIRST + n, b"%d" % n) for n in range(2_400)]
    sessions = [store.session("notes", name) for name in ("ann", "bob", "cid")]
    store.write([Commit(session, items, b"", b"") for session in sessions])
    for session in sessions[1:]:
        for left in (True, True, False, False):
            assert store.write([Departure(session, "2", HERE)]) == [None]
            assert bool(store.rows(session, b"", 1)[0]) == left
        assert session.standing == LEFT
    assert len(store.load(store.session("notes", "ann"))["items"]) == 2_400
    assert list(store.findings()) == []


def test_what_calls_have_changed_does_not_wait_for_the_background(tmp_path: Path) -> None:
    committer = Committer(Store.open(tmp_path / "1", "w-1"), lambda: None)
    moving, called = committer.store.session("notes", "moving"), committer.store.session("notes", "called")
    told: list[int] = []
    done = threading.Event()

    def tell(number: int, error: Exception | None) -> None:
        assert error is None
        told.append(number)
        if number == 99:
            done.set()

    for number in range(100):
        commit = Commit(moving, [("items", FIRST + number, b"x" * 256 * 1024)], b"", b"", standing=STAGED, other="elsewhere")
        committer.put(commit, lambda error, number=number: tell(number, error), in_background=True)  # type: ignore[misc]
    committer.put(Commit(called, [("items", FIRST, b"x")], id_of(1), b""), lambda error: tell(-1, error))
    committer.close()
    assert done.is_set()
    assert [number for number in told if number >= 0] == list(range(100))
    assert told.index(-1) < 50


def test_the_background_has_more_of_a_quick_disk_and_never_less_than_at_first() -> None:
    least = size = background_bytes(0, 1.0)
    for _ in range(100):
        size = background_bytes(size, 0.001)
    assert size == background_bytes(size, 0.001) == 4 * least
    for _ in range(100):
        size = background_bytes(size, 0.1)
    assert size == least > 0
