"""What the commands of `nalar state` do, without the command line: `cli` reads the options, this carries them out.

Reading works while workers have the stores open. Writing does not: it takes a store for itself, or says who has it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from nalar_mq.commands import BrokerChoice
from nalar_mq.errors import ConfigError, StateDamagedError, StoreCopiedError, StoreError, UnknownClassError
from nalar_mq.field_types import kind_in
from nalar_mq.job_commands import client_of
from nalar_mq.openings import Openings
from nalar_mq.session_state import cell_from, pair_from, value_of
from nalar_mq.state_export import ExportWriter, SessionFrame, read_export
from nalar_mq.store import (
    HERE,
    LEAVING,
    Commit,
    Entries,
    Outcome,
    Removal,
    Session,
    Store,
    Whole,
    Write,
    owner_of,
)
from nalar_mq.stores import adopt as adopt_store
from nalar_mq.stores import directory_of

_AT_ONCE: Final = 256
_AT_ONCE_BYTES: Final = 8 * 1024 * 1024

Name = tuple[str, str]


class StoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """A store as `nalar state ls` shows it.

    Attributes:
        store: its folder within the folder for state.
        problem: why nothing else is known of it; empty if all is well.
    """

    store: str
    id: str = ""
    directory: str = ""
    size_bytes: int = 0
    sessions: int = 0
    open_in: str = ""
    pid: int | None = None
    problem: str = ""


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session as `nalar state ls AGENT` shows it; `used_s` in seconds since 1970."""

    store: str
    session: str
    entries: int = 0
    size_bytes: int = 0
    used_s: float = 0.0
    standing: str = ""
    problem: str = ""


class Exported(msgspec.Struct, frozen=True):
    """How many sessions were exported, and what is wrong with those that were not."""

    sessions: int
    skipped: list[str]


def stores(state: Path) -> list[StoreRow]:
    """The stores in a folder for state."""
    return [_store_row(folder) for folder in _folders(state)]


def _store_row(folder: Path) -> StoreRow:
    owner = None if Store.is_free(folder) else owner_of(folder)
    try:
        with contextlib.closing(Store.read(folder)) as store:
            return StoreRow(
                store=folder.name,
                id=store.id,
                directory=store.directory,
                size_bytes=store.size_bytes(),
                sessions=store.count(),
                open_in=owner.name if owner is not None else "",
                pid=owner.pid if owner is not None else None,
            )
    except StoreError as error:
        return StoreRow(store=folder.name, problem=str(error))


def sessions(state: Path, agent: str) -> Iterator[SessionRow]:
    """The sessions of an agent in all stores, each read whole."""
    for store in _read_all(state):
        for actor, name in _names(store, agent):
            try:
                whole = store.whole(actor, name)
            except StateDamagedError as error:
                yield SessionRow(store=store.folder.name, session=name, problem=str(error))
                continue
            if whole is not None:
                yield _session_row(store, name, whole)


def _session_row(store: Store, name: str, whole: Whole) -> SessionRow:
    sizes = [len(data) for entries in whole.entries.values() for _, data in entries]
    return SessionRow(
        store=store.folder.name,
        session=name,
        entries=len(sizes),
        size_bytes=sum(sizes),
        used_s=whole.header.used_s,
        standing=whole.header.standing,
    )


def show(state: Path, agent: str, session: str) -> dict[str, Any]:
    """What is kept of a session: its fields as plain values, a list, a dict or a value each.

    A value of a class that is not loaded here is shown as text that names the class.

    Raises:
        ConfigError: no store keeps such a session.
        StateDamagedError: it is not what was written.
    """
    for store in _read_all(state):
        whole = store.whole(agent, session)
        if whole is not None and whole.header.standing in (HERE, LEAVING):
            return {
                "agent": agent,
                "session": session,
                "store": store.folder.name,
                "schema": whole.header.schema,
                "used_s": whole.header.used_s,
                "calls": len(whole.outcomes),
                "state": _plain(whole.header.kinds, whole.entries),
            }
    raise _unknown(state, agent, session)


def export(state: Path, file: Path, *, agents: tuple[str, ...] = (), skip_damaged: bool = False) -> Exported:
    """Writes all sessions, or those of some agents, into a file, with what their last calls came to.

    Each session is written as it is at one moment. The file is there whole or not at all.

    Raises:
        StateDamagedError: a session is damaged, and damaged ones are not to be skipped.
        StoreError: a store cannot be read, or the file not be written.
    """
    skipped: list[str] = []
    with ExportWriter(file) as writer:
        for store in _read_all(state):
            for actor, name in _names(store):
                if agents and actor not in agents:
                    continue
                try:
                    whole = store.whole(actor, name)
                except StateDamagedError as error:
                    if not skip_damaged:
                        raise StateDamagedError(f"{error}; to export the others, say --skip-damaged") from error
                    skipped.append(str(error))
                    continue
                if whole is not None and whole.header.standing in (HERE, LEAVING):
                    writer.put(actor, name, whole)
    return Exported(writer.sessions, skipped)


def restore(state: Path, file: Path, *, replace: bool = False) -> int:
    """Puts the sessions of an export into the stores of a folder; returns how many.

    The file is read whole before anything is written. If then something fails, sessions that were not there before go again.
    The stores have to be adopted afterwards by the directory of a broker; one that belongs to the app does it by itself.

    Raises:
        ConfigError: sessions are there already, and are not to be replaced.
        StoreBusyError: a process has one of the stores open.
        StoreError: the file is no whole export, or there is no room.
    """
    names = _names_in(file)
    with contextlib.ExitStack() as stack:
        opened = [_taken(stack, folder) for folder in _folders(state, may_be_none=True)]
        opened = opened or [_taken(stack, state / "1")]
        there = {name: found[-1] for name in names if (found := [store for store in opened if _keeps(store, *name)])}
        if there and not replace:
            actor, session = next(iter(there))
            raise ConfigError(
                f"{len(there):,} of these sessions are there already, as {session!r} of {actor!r}: "
                f"nothing was imported; say --replace to have them replaced"
            )
        _import_all(file, opened[0], there)
    return len(names)


def _import_all(file: Path, first: Store, there: Mapping[Name, Store]) -> None:
    done: list[Session] = []
    try:
        for store, writes in _batches(file, first, there):
            store.write_together(writes)
            store.move_to(f"imported-{os.urandom(4).hex()}")
            done += [write.session for write in writes if (write.session.actor, write.session.name) not in there]
    except StoreError:
        for start in range(0, len(done), _AT_ONCE):
            first.write([Removal(session) for session in done[start : start + _AT_ONCE]])
        raise


def _batches(file: Path, first: Store, there: Mapping[Name, Store]) -> Iterator[tuple[Store, list[Write]]]:
    """Some writes of sessions that go into one store, in one transaction."""
    writes: list[Write] = []
    target, size = first, 0
    for begun, entries, outcomes in read_export(file):
        store = there.get((begun.actor, begun.name), first)
        if writes and (store is not target or len(writes) >= _AT_ONCE or size >= _AT_ONCE_BYTES):
            yield target, writes
            writes, size = [], 0
        target = store
        writes += _writes_of(begun, entries, outcomes, replaces=(begun.actor, begun.name) in there)
        size += sum(len(data) for some in entries.values() for _, data in some)
    if writes:
        yield target, writes


def _writes_of(begun: SessionFrame, entries: Entries, outcomes: list[Outcome], *, replaces: bool) -> list[Write]:
    session = Session(begun.actor, begun.name, None)
    changes = [(field, order, data) for field, some in entries.items() for order, data in some]
    commit = Commit(session, changes, b"", b"", False, begun.schema, begun.kinds, records=outcomes)
    return [Removal(session), commit] if replaces else [commit]


def _names_in(file: Path) -> list[Name]:
    names = [(begun.actor, begun.name) for begun, _, _ in read_export(file)]
    if len(set(names)) < len(names):
        raise StoreError(f"{file} has sessions twice: nothing was imported", str(file))
    return names


def _keeps(store: Store, actor: str, session: str) -> bool:
    try:
        return store.session(actor, session).is_kept
    except StateDamagedError:
        return True


def verify(state: Path) -> Iterator[str]:
    """Reads all stores whole, and tells what is not as it was written."""
    for folder in _folders(state):
        try:
            with contextlib.closing(Store.read(folder, whole=True)) as store:
                yield from store.findings()
        except StoreError as error:
            yield str(error)


def compact(state: Path) -> list[tuple[str, int, int]]:
    """Writes the stores anew without free pages; returns of each its folder, and its bytes before and after.

    Raises:
        StoreBusyError: a process has one of them open.
        StoreError: there is no room for the copy.
    """
    done: list[tuple[str, int, int]] = []
    for folder in _folders(state):
        store = Store.open(folder, "nalar state")
        before = store.size_bytes()
        store.compact_here()
        done.append((folder.name, before, store.size_bytes()))
    return done


def drop(state: Path, agent: str, session: str) -> None:
    """Removes what is kept of a session, damaged or not.

    Raises:
        ConfigError: no store keeps such a session.
        StoreBusyError: a process has the store open.
    """
    with contextlib.ExitStack() as stack:
        found = [store for store in (_taken(stack, folder) for folder in _folders(state)) if _keeps(store, agent, session)]
        if not found:
            raise _unknown(state, agent, session)
        for store in found:
            store.write_together([Removal(Session(agent, session, None))])


async def adopt(choice: BrokerChoice, app: Path | None, state: Path) -> list[tuple[str, int, int]]:
    """Enters the sessions of all stores in the directory of a broker.

    Returns of each store its folder, how many sessions it keeps, and how many were left out, since others have them there.

    Raises:
        StoreBusyError: a process has one of them open.
        StoreCopiedError: one is a copy of another one, or of one that is open elsewhere.
    """
    done: list[tuple[str, int, int]] = []
    with contextlib.ExitStack() as stack:
        opened = [_taken(stack, folder) for folder in _folders(state)]
        for one, other in itertools.combinations(opened, 2):
            if one.id == other.id:
                text = f"{one.folder} and {other.folder} are copies of one store: remove that which is not to go on"
                raise StoreCopiedError(text, str(other.folder))
        async with client_of(choice, app) as client:
            transport, subjects = client.process.transport, client.process.subjects
            directory = await directory_of(transport, subjects)
            bucket = await transport.key_value(subjects.places_bucket)
            openings = Openings(transport, subjects, client.process.me, client.process.settings.lease_s)
            for store in opened:
                await openings.note(store, anyway=True)
                left_out = await adopt_store(store, bucket, directory)
                done.append((store.folder.name, store.count(), left_out))
    return done


def _folders(state: Path, *, may_be_none: bool = False) -> list[Path]:
    try:
        found = [state / name for name in os.listdir(state) if name.isdigit() and (state / name).is_dir()]
    except OSError:
        found = []
    if not found and not may_be_none:
        raise ConfigError(f"there are no stores in {state}: name the folder by --state, or the app by --app")
    return sorted(found, key=lambda folder: int(folder.name))


def _read_all(state: Path) -> Iterator[Store]:
    for folder in _folders(state):
        with contextlib.closing(Store.read(folder)) as store:
            yield store


def _taken(stack: contextlib.ExitStack, folder: Path) -> Store:
    store = Store.open(folder, "nalar state")
    stack.callback(store.close)
    return store


def _names(store: Store, agent: str | None = None) -> Iterator[Name]:
    after: Name | None = None if agent is None else (agent, "")
    while some := store.sessions(after):
        for session in some:
            if agent is not None and session.actor != agent:
                return
            yield session.actor, session.name
        after = some[-1].actor, some[-1].name


def _unknown(state: Path, agent: str, session: str) -> ConfigError:
    return ConfigError(
        f"no store in {state} keeps session {session!r} of {agent!r}: `nalar state ls {agent}` lists what is there"
    )


def _plain(kinds: Mapping[str, str], entries: Entries) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in dict.fromkeys((*kinds, *entries)):
        data = [data for _, data in entries.get(field, [])]
        kind = kind_in(kinds.get(field, "list"))
        if kind == "dict":
            plain[field] = dict(_pair(one) for one in data)
        elif kind == "list":
            plain[field] = [_value(one) for one in data]
        elif data:
            plain[field] = _value(data[-1])
    return plain


def _value(data: bytes) -> Any:
    try:
        return value_of(cell_from(data))
    except UnknownClassError as error:
        return _unloaded(error)


def _pair(data: bytes) -> tuple[Any, Any]:
    try:
        key, cell = pair_from(data)
    except UnknownClassError as error:
        return _unloaded(error), None
    try:
        return key, value_of(cell)
    except UnknownClassError as error:
        return key, _unloaded(error)


def _unloaded(error: UnknownClassError) -> str:
    return f"<{error.class_name}: shown with --app>"
