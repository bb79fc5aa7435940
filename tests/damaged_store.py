"""Opens damaged copies of a store, one after the other, and says of each what came of it; run as a process of its own.

A line of JSON per case on stdin, a line per verdict on stdout: `refused` at opening, `named` when a session was read or
written, `equal` to what was kept, or `wrong` with what was seen.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nalar_mq.errors import StateDamagedError, StoreDamagedError, StoreError
from nalar_mq.store import Commit, Entries, Store

FIRST = 1 << 63
SESSIONS = 30
ROUNDS = 6
Name = tuple[str, str]


class Kept:
    """What a store is to hold, as plain values."""

    def __init__(self) -> None:
        self.state: dict[Name, dict[str, dict[int, bytes]]] = {}
        self.records: dict[Name, dict[bytes, bytes]] = {}

    def apply(self, name: Name, commit: Commit) -> None:
        fields = self.state.setdefault(name, {})
        for field, order, data in commit.changes:
            if data is None:
                fields.setdefault(field, {}).pop(order, None)
            else:
                fields.setdefault(field, {})[order] = data
        if commit.call:
            self.records.setdefault(name, {})[commit.call] = commit.payload

    def entries(self, name: Name) -> Entries:
        fields = self.state[name]
        return {field: sorted(found.items()) for field, found in sorted(fields.items()) if found}


def commits(store: Store, kept: Kept, round: int, wide: bool = True) -> Iterator[Commit]:
    """Changes of many kinds, the same for the same `round`."""
    for number in range(SESSIONS):
        name = ("notes" if number % 3 else "memory", f"session-{number:02}")
        session = store.session(*name)
        length = (3, 40, 150, 9000)[(number + round) % 4] if wide else 30
        changes: list[tuple[str, int, bytes | None]] = [
            ("items", FIRST + (round * 7 + place) % 40, b"%d" % (round + place) + bytes([65 + place]) * length)
            for place in range(number % 7)
        ]
        if round % 3 == 2:
            changes.append(("items", FIRST + round, None))
        if number % 5 == 0:
            changes.append(("title", FIRST, b"title %d" % round))
        call = round.to_bytes(8, "big") + number.to_bytes(8, "little")
        commit = Commit(session, changes, call, b"result %d " % round + bytes(number), number % 4 == 0, 1, {"items": "list"})
        kept.apply(name, commit)
        yield commit


def build(folder: Path) -> None:
    """Makes the store that is damaged later."""
    store = Store.open(folder, "builder")
    store.belong_to("here")
    kept = Kept()
    for round in range(ROUNDS):
        assert store.write(list(commits(store, kept, round))) == [None] * SESSIONS
    store.close()


def expected() -> Kept:
    """What `build` has kept."""

    class Nothing:
        def session(self, actor: str, name: str) -> Any:
            return None

    kept = Kept()
    for round in range(ROUNDS):
        for _ in commits(Nothing(), kept, round):  # type: ignore[arg-type]
            pass
    return kept


def damage(folder: Path, case: dict[str, Any]) -> None:
    path = folder / case["file"]
    data = bytearray(path.read_bytes())
    if "cut" in case:
        del data[case["cut"] :]
    for bit in case.get("bits", ()):
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def read_all(store: Store, kept: Kept) -> set[Name]:
    """Compares all that can be read; returns the sessions that are said to be damaged."""
    named: set[Name] = set()
    for name in kept.state:
        try:
            session = store.session(*name)
            found = store.load(session)
            records = {call: getattr(store.record(session, call), "payload", None) for call in kept.records[name]}
        except StateDamagedError as error:
            assert repr(name[1]) in str(error), error
            named.add(name)
            continue
        assert dict(sorted(found.items())) == kept.entries(name), f"{name}: other state"
        assert records == kept.records[name], f"{name}: other records"
    listed = [(session.actor, session.name) for session in store.sessions() if session.header is not None]
    assert set(listed) | named >= set(kept.state), "sessions that are not listed"
    assert set(listed) <= set(kept.state), "sessions that nobody made"
    return named


def verdict(folder: Path, source: Path, case: dict[str, Any]) -> str:
    shutil.copytree(source, folder)
    damage(folder, case)
    kept = expected()
    identity = case["id"]
    for round in (100, 101):
        try:
            store = Store.open(folder, "reader")
        except StoreDamagedError as error:
            assert str(folder) in str(error)
            return "refused"
        try:
            assert (store.id, store.directory) == (identity, "here"), "another store"
            named = read_all(store, kept)
            for name in named:
                del kept.state[name]
            refusals = [error for error in store.write(_writable(store, kept, round)) if error is not None]
            # An entry that reads well may say that it is none: its session is refused when it is written, and only that.
            assert len(refusals) < 2, refusals
            assert all(isinstance(refusal, StoreDamagedError) for refusal in refusals), refusals
            if named or refusals:
                return "named"
        except StoreError:
            return "named"
        finally:
            store.close()
    return "equal"


def _writable(store: Store, kept: Kept, round: int) -> list[Commit]:
    """Changes of the sessions that are not damaged."""

    class Sound:
        def session(self, actor: str, name: str) -> Any:
            return store.session(actor, name) if (actor, name) in kept.state else None

    made = [commit for commit in commits(Sound(), Kept(), round, wide=False) if commit.session is not None]  # type: ignore[arg-type]
    for commit in made:
        kept.apply((commit.session.actor, commit.session.name), commit)
    return made


def main() -> None:
    source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    for number, line in enumerate(sys.stdin):
        folder = scratch / str(number)
        try:
            said = verdict(folder, source, json.loads(line))
        except Exception as error:
            said = f"wrong: {type(error).__name__}: {error}"
        shutil.rmtree(folder)
        print(said.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
