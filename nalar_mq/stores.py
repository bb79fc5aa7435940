"""The stores that one worker has open, and where in them a session is.

A folder for state has a store per worker slot: `STATE/1`, `STATE/2` and so on. A worker opens the first one that nobody has
open, so that one which was killed finds its own again; a store that nobody has opened for a while, because there are fewer
workers than before, is opened beside its own by whoever finds it. Sessions are found by looking: new ones go into the first.

All stores of a runtime belong to one directory of sessions, the places bucket, which has an id of its own. A store of another
directory is not opened: sessions would be served there that others know elsewhere. With `adopts`, which a broker that belongs
to the app allows, its sessions are entered in the directory instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from nalar_mq.address import Subjects
from nalar_mq.committer import Committer, Done
from nalar_mq.errors import KeyConflictError, StoreBusyError, StoreDamagedError, StoreError
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Place, encode_record
from nalar_mq.store import HERE, LEAVING, Change, Commit, Entries, Record, Removal, Session, Store
from nalar_mq.transport import KeyValue, Transport

DIRECTORY_KEY: Final = "_directory"
_SLOTS: Final = 1_000
_ADOPTED_AT_ONCE: Final = 256
_log = logger(__name__)


class Kept:
    """A session and the store that keeps it."""

    __slots__ = ("committer", "session")

    def __init__(self, committer: Committer, session: Session) -> None:
        self.committer = committer
        self.session = session


class Stores:
    """The open stores of one worker; for any thread, once `open` has returned.

    Args:
        folder: holds a folder for each slot.
        owner: name of the worker.
        on_lost: is told, in some thread, that a store was taken over by another process.
    """

    def __init__(self, folder: Path, owner: str, on_lost: Callable[[], None]) -> None:
        self._folder = folder
        self._owner = owner
        self._on_lost = on_lost
        self._open: dict[str, Committer] = {}
        self._free: set[str] = set()
        self._looked_at: dict[tuple[str, str], str | None] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the stores, that for new sessions first."""
        return tuple(self._open)

    def open(self) -> None:
        """Opens the first free store, or makes one.

        Raises:
            StoreError: the folder cannot be used.
        """
        for slot in range(1, _SLOTS):
            folder = self._folder / str(slot)
            try:
                self._add(Store.open(folder, self._owner))
                return
            except StoreBusyError:
                continue
            except StoreDamagedError as error:
                _log.error("store.damaged", folder=str(folder), error=str(error))
        raise StoreError(f"all {_SLOTS:,} stores in {self._folder} are open or damaged", str(self._folder))

    def _add(self, store: Store) -> Committer:
        committer = Committer(store, self._on_lost)
        self._open = {**self._open, store.id: committer}
        return committer

    async def join(self, transport: Transport, subjects: Subjects, *, adopts: bool) -> None:
        """Makes sure that the open stores belong to the directory of this broker and namespace.

        Raises:
            StoreForeignError: one belongs to another.
        """
        bucket = await transport.key_value(subjects.places_bucket)
        directory = await _directory_of(bucket)
        for committer in self._open.values():
            await self._join(committer.store, bucket, directory, adopts=adopts)

    async def _join(self, store: Store, bucket: KeyValue, directory: str, *, adopts: bool) -> None:
        if adopts and store.directory not in ("", directory):
            await adopt(store, bucket, directory)
        await asyncio.to_thread(store.belong_to, directory)

    async def take_free_ones(self, transport: Transport, subjects: Subjects, *, adopts: bool) -> bool:
        """Opens the stores that nobody had open at this call and at the one before; True if there were any."""
        free, taken = await asyncio.to_thread(self._look)
        if not taken:
            self._free = free
            return False
        bucket = await transport.key_value(subjects.places_bucket)
        directory = await _directory_of(bucket)
        for store in taken:
            try:
                await self._join(store, bucket, directory, adopts=adopts)
            except StoreError as error:
                _log.error("store.foreign", folder=str(store.folder), error=str(error))
                store.close()
            else:
                self._add(store)
                _log.info("store.opened", store=store.id, folder=str(store.folder))
        self._free = set()
        return True

    def _look(self) -> tuple[set[str], list[Store]]:
        mine = {committer.store.folder.name for committer in self._open.values()}
        free: set[str] = set()
        taken: list[Store] = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self._folder)):
                if not name.isdigit() or name in mine or not Store.is_free(self._folder / name):
                    continue
                if name not in self._free:
                    free.add(name)
                    continue
                try:
                    taken.append(Store.open(self._folder / name, self._owner))
                except StoreError as error:
                    _log.error("store.not_opened", folder=str(self._folder / name), error=str(error))
        return free, taken

    def session(self, actor: str, name: str) -> Kept:
        """Where a session is; of a new one, where it will be.

        Raises:
            StateDamagedError: it cannot be read.
        """
        first: Kept | None = None
        for committer in self._open.values():
            session = committer.store.session(actor, name)
            if session.is_kept:
                return Kept(committer, session)
            first = first or Kept(committer, session)
        assert first is not None
        return first

    def load(self, kept: Kept) -> Entries:
        """All entries of a session, checked.

        Raises:
            StateDamagedError: something is missing or is not what was written.
        """
        return kept.committer.store.load(kept.session)

    def record(self, actor: str, name: str, call: bytes) -> Record | None:
        """What a call of a session came to, if that is known.

        Raises:
            StateDamagedError: it cannot be read.
        """
        kept = self.session(actor, name)
        return kept.committer.store.record(kept.session, call)

    def commit(
        self,
        kept: Kept,
        changes: Sequence[Change],
        call: bytes,
        payload: bytes,
        done: Done,
        *,
        is_job: bool,
        kinds: Mapping[str, str],
    ) -> None:
        """Has the changes of a call and its result made durable; `done` is told in another thread."""
        kept.committer.put(Commit(kept.session, changes, call, payload, is_job, 0, kinds), done)

    def forget_idle(self, actor: str, prefix: str, before_s: float, is_loaded: Callable[[str], bool]) -> list[tuple[str, str]]:
        """Removes sessions whose names begin with `prefix` and that nobody has changed since `before_s`, some at a time.

        Returns the name of each and the id of its store.
        """
        gone: list[tuple[str, str]] = []
        for committer in self._open.values():
            after, sessions = self._looked_at.get((actor, committer.store.id)), []
            with contextlib.suppress(StoreError):
                sessions = committer.store.sessions_from(actor, prefix, after)
            self._looked_at[actor, committer.store.id] = sessions[-1].name if sessions else None
            for session in sessions:
                if session.header is not None and session.header.used_s < before_s and not is_loaded(session.name):
                    committer.put(Removal(session), lambda _: None)
                    gone.append((session.name, committer.store.id))
        return gone

    def close(self) -> None:
        """Writes what has been committed so far and closes all stores; idempotent."""
        committers, self._open = list(self._open.values()), {}
        for committer in committers:
            committer.close()


async def adopt(store: Store, bucket: KeyValue, directory: str) -> int:
    """Enters all sessions of a store in a directory, and the store with them; those that others have there are left out.

    Returns how many were left out.
    """
    left_out, after = 0, None
    while sessions := await asyncio.to_thread(store.sessions, after):
        for start in range(0, len(sessions), _ADOPTED_AT_ONCE):
            some = [one for one in sessions[start : start + _ADOPTED_AT_ONCE] if one.standing in (HERE, LEAVING)]
            entered = await asyncio.gather(*(_enter(store.id, bucket, session) for session in some))
            left_out += entered.count(False)
        after = (sessions[-1].actor, sessions[-1].name)
    await asyncio.to_thread(store.move_to, directory)
    _log.info("store.adopted", store=store.id, folder=str(store.folder), left_out=left_out)
    return left_out


async def _enter(store: str, bucket: KeyValue, session: Session) -> bool:
    key, record = f"{session.actor}.{session.name.replace('/', '.')}", encode_record(Place(WIRE_VERSION, "", 0, store))
    try:
        await bucket.create(key, record)
    except KeyConflictError:
        entry = await bucket.get(key)
        is_mine = entry is not None and entry.value == record
        if not is_mine:
            _log.warning("session.held_elsewhere", key=key, store=store)
        return is_mine
    return True


async def _directory_of(bucket: KeyValue) -> str:
    """The id of a directory, which gets one if it has none."""
    while True:
        entry = await bucket.get(DIRECTORY_KEY)
        if entry is not None and entry.value is not None:
            return entry.value.decode("ascii", "replace")
        made = os.urandom(8).hex()
        with contextlib.suppress(KeyConflictError):
            await bucket.create(DIRECTORY_KEY, made.encode())
            return made
