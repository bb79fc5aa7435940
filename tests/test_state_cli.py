"""The commands for kept state: beside workers that have the stores open, and on stores that nobody has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Running, Shell, nalar

from nalar_mq import values
from nalar_mq.config import BrokerAccess
from nalar_mq.store import Commit, Outcome, Store

APP = Path(__file__).parent / "apps" / "state_app.py"
FIRST = 1 << 63


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def shown(shell: Shell, agent: str, session: str) -> dict[str, Any]:
    return dict(json.loads(shell("state", "show", agent, session).stdout))


def fill(store: Store, names: range) -> None:
    """Sessions of a notebook with two notes each, and what a call came to."""
    notes = [("notes", FIRST, values.encode("one")), ("notes", FIRST + 1, values.encode(["two"]))]
    counts = [("counts", FIRST, values.encode("one") + values.encode(1)), ("total", FIRST, values.encode(2))]
    kinds = {"notes": "list", "counts": "dict", "total": "value"}
    commits = [
        Commit(store.session("notebook", f"s{name}"), [*notes, *counts], b"call-%d" % name, b"result", False, 1, kinds)
        for name in names
    ]
    assert store.write(commits) == [None] * len(commits)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder for state with two stores."""
    folder = tmp_path / ".nalar" / "state"
    for slot in (1, 2):
        store = Store.open(folder / str(slot), "builder")
        store.belong_to("somewhere")
        fill(store, range(slot * 10, slot * 10 + 5))
        store.close()
    return folder


def flip(path: Path, wanted: bytes) -> None:
    """Changes a bit of every place that holds `wanted`."""
    data = path.read_bytes()
    assert wanted in data
    path.write_bytes(data.replace(wanted, bytes((wanted[0] ^ 1,)) + wanted[1:]))


@pytest.fixture
def running(shell: Shell) -> Iterator[Running]:
    """An app with managed state that is up in the shell's folder."""
    shutil.copy(APP, shell.folder)
    up = Running("up", APP.name, "--workers", "1", cwd=shell.folder)
    try:
        up.says("ready")
        yield up
    finally:
        up.end()


def test_beside_a_worker_and_after_it(shell: Shell, running: Running) -> None:
    for _ in range(2):
        shell("call", "Notebook.note", "hello", "--session", "ann")
    (row,) = shell.json("state", "ls")
    assert row["sessions"] >= 1 and row["pid"] and row["open_in"]
    sessions = shell.json("state", "ls", "Notebook")
    assert [(row["session"].partition("/")[0], row["entries"]) for row in sessions] == [("ann", 4)]
    name = sessions[0]["session"]
    notebook = shown(shell, "Notebook", name)
    assert notebook["state"] == {"notes": ["hello", "hello"], "counts": {"hello": 2}, "total": 2} and notebook["calls"] == 2
    assert "2 sessions" not in shell("state", "export", "all.nalar").stderr
    for command in (["drop", "Notebook", name], ["compact"], ["import", "all.nalar", "--replace"], ["adopt"]):
        assert f"process {row['pid']}" in shell("state", *command, code=2).stderr
    shell("call", "Notebook.note", "bye", "--session", "ann")
    running.end()
    shell("state", "verify")
    assert "there already" in shell("state", "import", "all.nalar", code=2).stderr
    shell("state", "import", "all.nalar", "--replace")
    assert shown(shell, "Notebook", name)["state"]["notes"] == ["hello", "hello"]
    done = nalar("run", APP.name, "Notebook.note", "again", "--session", "ann", cwd=shell.folder)
    assert done.stdout == "3\n"


def test_a_run_says_nothing_of_sessions_and_leaves_those_that_have_a_name(shell: Shell) -> None:
    shutil.copy(APP, shell.folder)
    for session in ([], ["--session", "ann"], []):
        done = nalar("run", APP.name, "Notebook.note", "hello", "--workers", "1", *session, cwd=shell.folder)
        assert (done.stdout, done.stderr) == ("1\n", "")
    assert [row["session"].partition("/")[0] for row in shell.json("state", "ls", "Notebook")] == ["ann"]


def test_lists_and_shows(shell: Shell, kept: Path) -> None:
    rows = shell.json("state", "ls")
    assert [(row["store"], row["sessions"], row["directory"], row["pid"]) for row in rows] == [
        ("1", 5, "somewhere", None),
        ("2", 5, "somewhere", None),
    ]
    assert "s14" in shell("state", "ls", "notebook", "--state", kept).stdout
    assert shown(shell, "notebook", "s23")["state"] == {"notes": ["one", ["two"]], "counts": {"one": 1}, "total": 2}
    assert "nalar state ls notebook" in shell("state", "show", "notebook", "nobody", code=2).stderr
    assert "--state" in shell("state", "ls", "--state", "nowhere", code=2).stderr


def test_a_damaged_session_is_named_and_left_out_of_an_export(shell: Shell, kept: Path) -> None:
    store = Store.open(kept / "1", "builder")
    store.write([Commit(store.session("notebook", "s12"), [("notes", FIRST + 2, b"\xa7unhappy")], b"", b"")])
    store.close()
    flip(kept / "1" / "data.mdb", b"\xa7unhappy")
    assert "'s12'" in shell("state", "verify", code=1).stdout
    assert "'s12'" in shell("state", "show", "notebook", "s12", code=1).stderr
    assert "damaged" in shell("state", "ls", "notebook").stdout
    assert "--skip-damaged" in shell("state", "export", "all.nalar", code=1).stderr
    assert not list(shell.folder.glob("*all.nalar*"))
    done = shell("state", "export", "all.nalar", "--skip-damaged")
    assert "9 sessions exported, 1 left out" in done.stderr and "'s12'" in done.stderr
    shell("state", "drop", "notebook", "s12")
    assert "as it was written" in shell("state", "verify").stderr


def test_a_damaged_session_is_restored_from_an_export(shell: Shell, kept: Path) -> None:
    shell("state", "export", "all.nalar")
    store = Store.open(kept / "2", "builder")
    store.write([Commit(store.session("notebook", "s21"), [("notes", FIRST + 2, b"\xa7unhappy")], b"", b"")])
    store.close()
    flip(kept / "2" / "data.mdb", b"\xa7unhappy")
    assert "10 sessions imported" in shell("state", "import", "all.nalar", "--replace").stderr
    shell("state", "verify")
    assert shown(shell, "notebook", "s21")["state"] == {"notes": ["one", ["two"]], "counts": {"one": 1}, "total": 2}


def test_an_export_comes_into_another_folder_whole(shell: Shell, kept: Path) -> None:
    shell("state", "export", "all.nalar")
    shell("state", "import", "all.nalar", "--state", "other")
    assert shell.json("state", "ls", "--state", "other")[0]["sessions"] == 10
    store = Store.open(shell.folder / "other" / "1", "reader")
    session = store.session("notebook", "s24")
    assert session.header is not None and session.header.schema == 1
    (outcome,) = store.outcomes(session)
    assert outcome == Outcome(b"call-24", b"result", outcome.at_s, False)
    store.close()


def test_foreign_and_damaged_exports_leave_nothing(shell: Shell, kept: Path) -> None:
    shell("state", "export", "all.nalar", "--agent", "notebook")
    whole = (shell.folder / "all.nalar").read_bytes()
    cases = {
        "foreign": (b"PK\x03\x04" + bytes(500), "is no export"),
        "empty": (b"", "is no export"),
        "future": (whole.replace(b"state 1", b"state 9", 1), "has format 9"),
        "short": (whole[:-20], "its end is missing"),
        "flipped": (whole[:700] + bytes((whole[700] ^ 4,)) + whole[701:], "is damaged"),
        "longer": (whole + b"x", "is damaged"),
    }
    for name, (data, reason) in cases.items():
        (shell.folder / name).write_bytes(data)
        assert reason in shell("state", "import", name, "--state", "other", code=2).stderr, name
        assert not (shell.folder / "other").exists()
    assert "cannot be read" in shell("state", "import", "missing", "--state", "other", code=2).stderr


def test_compaction_gives_room_back_and_keeps_all(shell: Shell, kept: Path) -> None:
    store = Store.open(kept / "1", "builder")
    session = store.session("notebook", "large")
    store.write([Commit(session, [("notes", FIRST + n, values.encode("x" * 5000)) for n in range(500)], b"", b"")])
    store.close()
    shell("state", "drop", "notebook", "large")
    before = (kept / "1" / "data.mdb").stat().st_size
    shell("state", "compact")
    assert (kept / "1" / "data.mdb").stat().st_size < before / 10
    shell("state", "verify")
    assert shown(shell, "notebook", "s11")["state"] == {"notes": ["one", ["two"]], "counts": {"one": 1}, "total": 2}
    store = Store.open(kept / "1", "builder")
    fill(store, range(15, 18))
    store.close()
    shell("state", "verify")


def test_stores_are_adopted_by_another_directory(shell: Shell, kept: Path, broker_access: BrokerAccess, namespace: str) -> None:
    url = broker_access.urls[0].replace("nats://", f"nats://{broker_access.token}@")
    done = shell("state", "adopt", "--nats", url, "--namespace", namespace)
    assert "store 1: 5 sessions\n" in done.stderr and "store 2: 5 sessions\n" in done.stderr
    directories = {row["directory"] for row in shell.json("state", "ls")}
    assert len(directories) == 1 and directories != {"somewhere"}
