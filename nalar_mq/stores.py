"""The stores that one worker has open, and where in them a session is.

A folder for state has a store per worker slot: `STATE/1`, `STATE/2` and so on. A worker opens the first one that nobody has
open, so that one which was killed finds its own again; a store that nobody has opened for a while, because there are fewer
workers than before, is opened beside its own by whoever finds it. Sessions are found by looking: new ones go into the first.

Agents whose state is `replicated` have stores of their own, `STATE/r1` and so on: see `replication`.

All stores of a runtime belong to one directory of sessions, the places bucket, which has an id of its own. A store of another
directory is not opened: sessions would be served there that others know elsewhere. With `adopts`, which a broker that belongs
to the app allows, its sessions are entered in the directory instead. Where several are open, a session that none of them
knows is put where the directory says. There it begins, whatever stores are opened before its first commit: a copy in one of
those was on its way to another worker, and the directory does not name it. Of a folder that was copied one is refused
(`openings`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

from nalar_mq.address import Address, Subjects
from nalar_mq.committer import Committer, Done, Ship
from nalar_mq.errors import (
    BrokerError,
    KeyConflictError,
    NalarError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreLostError,
)
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Place, encode_record
from nalar_mq.openings import Openings
from nalar_mq.replication import Replication, Shipper, set_aside
from nalar_mq.store import HERE, LEAVING, LEFT, STAGED, Change, Commit, Entries, Record, Removal, Session, Store
from nalar_mq.transport import KeyValue, Transport

DIRECTORY_KEY: Final = "_directory"
_ASSIGNED: Final = "assigned"  # it begins there
_BACK: Final = "back"  # it begins anew where it has left
_UNKNOWN: Final = "unknown"
_BY_LIKELIHOOD: Final = (HERE, _ASSIGNED, STAGED, LEAVING, _BACK, LEFT, _UNKNOWN)
_SLOTS: Final = 1_000
_ADOPTED_AT_ONCE: Final = 256
_ASSIGNED_KEPT: Final = 10_000
_CLOSING_S: Final = 1.0
_log = logger(__name__)


class Kept:
    """A session and the store that keeps it."""

    __slots__ = ("committer", "session")

    def __init__(self, committer: Committer, session: Session) -> None:
        self.committer = committer
        self.session = session

    def rank(self, assigned: str | None) -> int:
        """Lower where the session is more likely to be served.

        One of which nothing has been committed yet is in the store `assigned`, whatever of it was on its way to another.
        """
        standing = self.session.standing if self.session.is_kept else _UNKNOWN
        if self.committer.store.id == assigned:
            standing = {_UNKNOWN: _ASSIGNED, LEFT: _BACK}.get(standing, standing)
        return _BY_LIKELIHOOD.index(standing)


class Stores:
    """The open stores of one worker; for any thread, once `join` has returned.

    Args:
        folder: holds a folder for each slot.
        owner: name of the worker.
        replicated: agents whose sessions are kept by the broker as well; the others' are kept on this machine alone.
        on_lost: is told, in some thread, that a store was taken over by another process.
        committer: makes what writes into a store.
        random: source of the ids of those that are made.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        replicated: Collection[str],
        on_lost: Callable[[], None],
        committer: Callable[[Store, Callable[[], None], Ship | None], Committer] = Committer,
        random: Random | None = None,
    ) -> None:
        self._folder = folder
        self._owner = owner
        self._replicated = frozenset(replicated)
        self._on_lost = on_lost
        self._committer = committer
        self._random = random or SystemRandom()
        self._open: dict[bool, dict[str, Committer]] = {False: {}, True: {}}
        self._shippers: list[Shipper] = []
        self._replication: Replication | None = None
        self._openings: Openings | None = None
        self._refused: set[str] = set()
        self._free: set[str] = set()
        self._assigned: dict[tuple[str, str], str] = {}
        self._looked_at: dict[tuple[str, str], str | None] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the stores that are on this machine alone, that for new sessions first."""
        return tuple(self._open[False])

    @property
    def replicated_ids(self) -> tuple[str, ...]:
        """Ids of the replicated ones, that for new sessions first."""
        return tuple(self._open[True])

    async def open(
        self, transport: Transport, subjects: Subjects, me: Address, actors: Iterable[str], *, adopts: bool, lease_s: float
    ) -> None:
        """Opens the first free store of each kind that `actors` need, or makes one.

        Raises:
            StoreCopiedError: the folder of one was copied, and the other one goes on.
            StoreForeignError: one belongs to another directory than that of this broker and namespace.
            StoreError: the folder cannot be used.
            BrokerError: the broker does not answer.
        """
        self._replication = Replication(transport, subjects, me, self._on_lost)
        self._openings = Openings(transport, subjects, me, lease_s)
        bucket = await transport.key_value(subjects.places_bucket)
        directory = await _directory_of(bucket, self._random)
        for is_replicated in sorted({actor in self._replicated for actor in actors}):
            while True:
                store = await asyncio.to_thread(self._first_free, is_replicated)
                try:
                    await self._join(store, bucket, directory, adopts=adopts)
                    await self._add(store, is_replicated=is_replicated)
                    break
                except StoreLostError as error:
                    await asyncio.to_thread(self._set_aside, store, error)
                except BaseException:
                    await asyncio.to_thread(store.close)
                    raise

    def _first_free(self, is_replicated: bool) -> Store:
        for slot in range(1, _SLOTS):
            folder = self._folder / (f"r{slot}" if is_replicated else str(slot))
            try:
                return Store.open(folder, self._owner, id=self._random.randbytes(8).hex())
            except StoreBusyError:
                continue
            except StoreDamagedError as error:
                _log.error("store.damaged", folder=str(folder), error=str(error))
        raise StoreError(f"all {_SLOTS:,} stores in {self._folder} are open or damaged", str(self._folder))

    def _set_aside(self, store: Store, error: StoreLostError) -> None:
        store.close()
        _log.warning("store.set_aside", folder=str(set_aside(store.folder)), reason=str(error))

    async def _add(self, store: Store, *, is_replicated: bool) -> None:
        ship: Ship | None = None
        if is_replicated:
            assert self._replication is not None
            shipper = await self._replication.open(store)
            self._shippers.append(shipper)
            ship = shipper.ship
        committer = self._committer(store, self._on_lost, ship)
        # Replaced, never changed: threads that look for sessions read it meanwhile.
        self._open = {**self._open, is_replicated: {**self._open[is_replicated], store.id: committer}}

    async def _join(self, store: Store, bucket: KeyValue, directory: str, *, adopts: bool) -> None:
        if adopts and store.directory not in ("", directory):
            await adopt(store, bucket, directory)
        await asyncio.to_thread(store.belong_to, directory)
        await self._note_opening(store)

    async def _note_opening(self, store: Store) -> None:
        assert self._openings is not None
        await self._openings.note(store, has_other=store.id in (*self.ids, *self.replicated_ids))

    async def take_free_ones(self, transport: Transport, subjects: Subjects, *, adopts: bool) -> bool:
        """Opens the stores that nobody had open at this call and at the one before; True if there were any."""
        free, taken = await asyncio.to_thread(self._look)
        if not taken:
            self._free = free
            return False
        self._free = set()
        try:
            bucket = await transport.key_value(subjects.places_bucket)
            directory = await _directory_of(bucket, self._random)
            while taken:
                await self._take(taken[-1], bucket, directory, adopts=adopts)
                taken.pop()
        finally:
            for store in taken:  # the broker is away, or this worker ends: others may have them
                store.close()
        return True

    async def _take(self, store: Store, bucket: KeyValue, directory: str, *, adopts: bool) -> None:
        try:
            await self._join(store, bucket, directory, adopts=adopts)
            await self._add(store, is_replicated=store.folder.name.startswith("r"))
        except StoreLostError as error:
            await asyncio.to_thread(self._set_aside, store, error)
        except (StoreError, BrokerError) as error:
            if str(error) not in self._refused:  # it is tried again and again: the other copy may end
                self._refused.add(str(error))
                _log.error("store.not_opened", folder=str(store.folder), error=str(error))
            await asyncio.to_thread(store.close)
        except BaseException:  # this worker ends: others may have it
            store.close()
            raise
        else:
            _log.info("store.opened", store=store.id, folder=str(store.folder))

    @property
    def folder(self) -> Path:
        """Holds a folder for each of them."""
        return self._folder.resolve()

    @property
    def all(self) -> list[Committer]:
        """The open stores, each with what writes into it."""
        return self._all()

    def may_open(self, folder: Path) -> bool:
        """True if that is the folder of a store which this worker opens when nobody has it open."""
        kinds = "r?" if self._replicated else ""
        return folder.parent == self.folder and re.fullmatch(rf"{kinds}\d+", folder.name) is not None

    async def take(self, folder: Path, transport: Transport, subjects: Subjects, *, adopts: bool) -> bool:
        """Opens the store in `folder`; False if somebody has it open.

        Raises:
            StoreError: it cannot be opened.
            BrokerError: the broker does not answer.
        """
        try:
            store = await asyncio.to_thread(Store.open, folder, self._owner)
        except StoreBusyError:
            return False
        try:
            bucket = await transport.key_value(subjects.places_bucket)
            directory = await _directory_of(bucket, self._random)
        except BaseException:
            await asyncio.to_thread(store.close)
            raise
        await self._take(store, bucket, directory, adopts=adopts)
        return True

    def _look(self) -> tuple[set[str], list[Store]]:
        mine = {committer.store.folder.name for committer in self._all()}
        kinds = "r?" if self._replicated else ""
        free: set[str] = set()
        taken: list[Store] = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self._folder)):
                if name in mine or not re.fullmatch(rf"{kinds}\d+", name) or not Store.is_free(self._folder / name):
                    continue
                if name not in self._free:
                    free.add(name)
                    continue
                try:
                    taken.append(Store.open(self._folder / name, self._owner))
                except StoreError as error:
                    _log.error("store.not_opened", folder=str(self._folder / name), error=str(error))
        return free, taken

    async def take_over(
        self, is_held: Callable[[str], bool], is_gone: Callable[[Address], Awaitable[bool]], after_s: float, directory: str
    ) -> bool:
        """Goes on with replicated stores whose machine is gone; True if there were any.

        Args:
            is_held: somebody has that store open.
            is_gone: judges who had it last.
            after_s: for how long nobody must have had it open: he may come back to what is on his disk.
            directory: that they belong to.
        """
        assert self._replication is not None
        has_taken = False
        for id in await self._replication.orphans(is_held, after_s):
            holder = await self._replication.holder(id)
            if holder is None or id in self._open[True]:
                continue
            is_mine = holder == self._replication.me  # it was to be, and the broker went away in between
            if not is_mine and not await is_gone(holder):
                continue
            store = await self._replication.take_over(id, self._folder / f"unfinished-{id}", self._owner)
            if store is None:
                continue
            try:
                await asyncio.to_thread(store.move_to, directory)
                await asyncio.to_thread(self._name, store)
                await self._note_opening(store)
                await self._add(store, is_replicated=True)
            except BaseException:
                await asyncio.to_thread(store.close)
                raise
            has_taken = True
        return has_taken

    def _name(self, store: Store) -> None:
        """Gives a copy that is whole the name of the first free slot."""
        for slot in range(1, _SLOTS):
            folder = self._folder / f"r{slot}"
            with contextlib.suppress(OSError):  # somebody was faster
                if not folder.exists():
                    store.rename(folder)
                    return
        raise StoreError(f"all {_SLOTS:,} stores in {self._folder} are taken", str(self._folder))

    def _all(self) -> list[Committer]:
        return [committer for committers in self._open.values() for committer in committers.values()]

    def stores_of(self, actor: str) -> list[Store]:
        """The open stores in which sessions of an actor may be."""
        return [committer.store for committer in self._open[actor in self._replicated].values()]

    def session(self, actor: str, name: str) -> Kept:
        """Where a session is; of a new one, where it will be. If several stores know it, that which is likelier to have it.

        Raises:
            StateDamagedError: it cannot be read.
        """
        assigned = self._assigned.get((actor, name))
        found: Kept | None = None
        for committer in self._open[actor in self._replicated].values():
            kept = Kept(committer, committer.store.session(actor, name))
            if kept.rank(assigned) == 0:
                return kept
            if found is None or kept.rank(assigned) < found.rank(assigned):
                found = kept
        assert found is not None
        return found

    def is_undecided(self, actor: str, name: str) -> bool:
        """True if only the directory knows which of the open stores, or which other one, has a session that is not here."""
        return len(self._open[actor in self._replicated]) > 1 and (actor, name) not in self._assigned

    def assign(self, actor: str, name: str, store: str) -> None:
        """Says in which of the open stores a session is to be that none of them has, whichever are opened from now on."""
        self._assigned[actor, name] = store
        if len(self._assigned) > _ASSIGNED_KEPT:
            self._assigned.pop(next(iter(self._assigned)))

    def unassign(self, actor: str, name: str) -> None:
        """The session has left, or has ended: if it comes back, that may be to another of the open stores."""
        self._assigned.pop((actor, name), None)

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

    def change(self, kept: Kept, changes: Sequence[Change], *, schema: int, kinds: Mapping[str, str]) -> None:
        """Changes a session beside all calls; it is durable on return. Not for the loop.

        Raises:
            Exception: whatever the store could not do.
        """
        header = kept.session.header
        standing, other = (header.standing, header.other) if header is not None else (HERE, "")
        done = threading.Event()
        failures: list[Exception] = []

        def tell(error: Exception | None) -> None:
            failures.extend([] if error is None else [error])
            done.set()

        kept.committer.put(Commit(kept.session, changes, b"", b"", False, schema, kinds, standing, other), tell)
        done.wait()
        if failures:
            raise failures[0]

    def commit(
        self,
        kept: Kept,
        changes: Sequence[Change],
        call: bytes,
        payload: bytes,
        done: Done,
        *,
        is_job: bool,
        schema: int,
        kinds: Mapping[str, str],
    ) -> None:
        """Has the changes of a call and its result made durable; `done` is told in another thread."""
        kept.committer.put(Commit(kept.session, changes, call, payload, is_job, schema, kinds), done)

    def forget_idle(self, actor: str, prefix: str, before_s: float, is_loaded: Callable[[str], bool]) -> list[tuple[str, str]]:
        """Removes sessions whose names begin with `prefix` and that nobody has changed since `before_s`, some at a time.

        Returns the name of each and the id of its store.
        """
        gone: list[tuple[str, str]] = []
        for committer in self._all():
            after, sessions = self._looked_at.get((actor, committer.store.id)), []
            with contextlib.suppress(StoreError):
                sessions = committer.store.sessions_from(actor, prefix, after)
            self._looked_at[actor, committer.store.id] = sessions[-1].name if sessions else None
            for session in sessions:
                if session.header is not None and session.header.used_s < before_s and not is_loaded(session.name):
                    committer.put(Removal(session), lambda _: None)
                    self.unassign(actor, session.name)
                    gone.append((session.name, committer.store.id))
        return gone

    def forget_since(self, prefix: str, since_s: float) -> None:
        """Removes all sessions whose names begin with `prefix` and that somebody has changed since then."""
        for committer in self._all():
            after: tuple[str, str] | None = None
            while sessions := committer.store.sessions(after):
                for session in sessions:
                    if session.name.startswith(prefix) and session.header is not None and session.header.used_s >= since_s:
                        committer.put(Removal(session), lambda _: None)
                after = sessions[-1].actor, sessions[-1].name

    async def _note_closing(self, committers: Iterable[Committer]) -> None:
        """Copies that have been made of the stores while they were open do not go on in their place."""
        if self._openings is None or not self._openings.is_reachable:
            return
        with contextlib.suppress(NalarError, TimeoutError):
            async with asyncio.timeout(_CLOSING_S):
                await asyncio.gather(*(self._openings.note(committer.store, is_closing=True) for committer in committers))

    async def aclose(self) -> None:
        """Writes what has been committed so far and closes all stores; idempotent."""
        committers, self._open = self._all(), {False: {}, True: {}}
        async with contextlib.AsyncExitStack() as stack:  # all of them, whatever goes wrong: others wait for them
            for committer in committers:
                stack.push_async_callback(asyncio.to_thread, committer.close)
            for shipper in self._shippers:
                stack.push_async_callback(shipper.aclose)
            await self._note_closing(committers)


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


async def directory_of(transport: Transport, subjects: Subjects) -> str:
    """The id of the directory of sessions of a broker and namespace."""
    return await _directory_of(await transport.key_value(subjects.places_bucket), SystemRandom())


async def _directory_of(bucket: KeyValue, random: Random) -> str:
    """The id of a directory, which gets one if it has none."""
    while True:
        entry = await bucket.get(DIRECTORY_KEY)
        if entry is not None and entry.value is not None:
            return entry.value.decode("ascii", "replace")
        made = random.randbytes(8).hex()
        with contextlib.suppress(KeyConflictError):
            await bucket.create(DIRECTORY_KEY, made.encode())
            return made
