"""Stores that outlive their machine: what they write is kept by the broker as well, before anybody is told.

    NS-stores      store -> who has it open, and which copy of it            changed by compare-and-set
    NS-replicas    NS.replica.<store>: Shipment, Shipment, ... [StoreSeal] Shipment, ...
    NS-snapshots   <store>.<commits>: how many parts; <store>.<commits>.<part>: all sessions

Shipping. What one transaction has written locally is appended to the subject of the store (`SoleWriter`), all transactions
that ended meanwhile in one message, and only then told. A message names the last transaction that it holds whole. A store that
is opened again and whose last transaction is another one than that was killed in between: it begins with a snapshot.

Snapshots. Now and then all sessions are written into the object store, while others change: what changes meanwhile is in the
messages after the one at which the snapshot began, and they say what an entry is, not what was done to it, so that it does no
harm to apply them to what has them already. The messages before are removed then.

Taking over. When nobody has had a replicated store open for a while, one of the others enters himself as its holder, with a
copy of his own; appends a seal, after which nothing of the former holder is accepted; makes a store of the last snapshot and
the messages after it; and opens it. Until the copy is whole its folder has a name under which nobody opens it: who is killed on
the way leaves nothing that could be taken for the store, and the next one begins anew. A copy that is not the one of the
holder is never opened again: it is set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from nalar_mq.address import Address, Subjects
from nalar_mq.committer import Done
from nalar_mq.errors import BrokerError, KeyConflictError, NalarError, StoreDamagedError, StoreLostError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import (
    WIRE_VERSION,
    Shipment,
    StoreHolder,
    StoreSeal,
    decode_holder,
    decode_replica,
    encode_record,
)
from nalar_mq.sole_writer import SoleWriter
from nalar_mq.store import Change, Commit, Departure, Outcome, Removal, Session, Store, Write
from nalar_mq.transport import KeyValue, Ledger, ObjectStore, Transport

_PART_BYTES: Final = 512 * 1024
_MESSAGE_BYTES: Final = 512 * 1024  # of transactions that are put together into one message
_SNAPSHOT_BYTES: Final = 64 * 1024 * 1024  # shipped since the last one
_SNAPSHOT_PART_BYTES: Final = 16 * 1024 * 1024
_APPLIED_AT_ONCE: Final = 500
_LOOK_S: Final = 0.05
_log = logger(__name__)


class _Shipped(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A write, as it is shipped: a commit, a removal (`kind` "r") or a departure ("d")."""

    kind: str
    actor: str
    name: str
    changes: list[Change] = []
    call: bytes = b""
    payload: bytes = b""
    is_job: bool = False
    schema: int = 0
    kinds: dict[str, str] = {}
    standing: str = ""
    other: str = ""
    records: list[tuple[bytes, bytes, float, bool]] = []


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(list[_Shipped])


def _shipped(write: Write) -> _Shipped:
    session = write.session
    if isinstance(write, Removal):
        return _Shipped("r", session.actor, session.name)
    if isinstance(write, Departure):
        return _Shipped("d", session.actor, session.name, standing=write.standing, other=write.other)
    return _Shipped(
        "c",
        session.actor,
        session.name,
        [*(() if write.lump is None else write.lump.changes()), *write.changes],
        write.call,
        write.payload,
        write.is_job,
        write.schema,
        dict(write.kinds),
        write.standing,
        write.other,
        [(one.call, one.payload, one.at_s, one.is_job) for one in write.records],
    )


class _Batch(msgspec.Struct, eq=False):
    """Transactions on their way: their number, their writes, and who is told."""

    commits: int
    data: bytes
    told: list[Done]


class Shipper:
    """Ships what one open store writes. `ship` is for the thread of its committer, all else for the loop.

    Args:
        replication: of the process.
        store: what is shipped.
        writer: of its subject.
        on_lost: somebody else goes on with the store; nothing more is acknowledged.
    """

    def __init__(self, replication: Replication, store: Store, writer: SoleWriter, on_lost: Callable[[], None]) -> None:
        self._replication = replication
        self.store = store
        self._writer = writer
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Batch] = []
        self._task: asyncio.Task[None] | None = None
        self._snapshot: asyncio.Task[None] | None = None
        self._shipped_bytes = 0
        self._acknowledged = store.commits
        self._is_over = False

    def ship(self, batch: list[tuple[Write, Done]], commits: int) -> None:
        """Takes what a transaction has written; tells everybody once the broker has it."""
        data = _encoder.encode([_shipped(write) for write, _ in batch])
        one = _Batch(commits, data, [done for _, done in batch])
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._add, one)

    def _add(self, batch: _Batch) -> None:
        if self._is_over:
            _tell(batch.told, self._lost())
            return
        self._waiting.append(batch)
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting and not self._is_over:
            batches = self._next()
            data = b"".join((_array_head(len(batches)), *(batch.data for batch in batches)))
            told = [done for batch in batches for done in batch.told]
            try:
                is_accepted = await self._append(data, batches[-1].commits)
            except BrokerError as error:
                _log.error("store.cannot_be_shipped", store=self.store.id, error=str(error))
                is_accepted = False
            if not is_accepted:
                self._end(told)
                return
            self._acknowledged = batches[-1].commits
            _tell(told, None)
            self._shipped_bytes += len(data)
            if self._shipped_bytes > _SNAPSHOT_BYTES and (self._snapshot is None or self._snapshot.done()):
                self._shipped_bytes = 0
                self._snapshot = self._loop.create_task(self._take_snapshot())

    def _next(self) -> list[_Batch]:
        size = 0
        for count, batch in enumerate(self._waiting):
            size += len(batch.data)
            if size > _MESSAGE_BYTES and count:
                batches, self._waiting = self._waiting[:count], self._waiting[count:]
                return batches
        batches, self._waiting = self._waiting, []
        return batches

    async def _append(self, data: bytes, commits: int) -> bool:
        starts = range(0, len(data), _PART_BYTES)
        for part, start in enumerate(starts, 1):
            piece = data[start : start + _PART_BYTES]
            message = encode_record(Shipment(WIRE_VERSION, commits, part, len(starts), piece))
            if not await self._writer.append(message):
                return False
        return True

    def _lost(self) -> StoreLostError:
        return StoreLostError(f"another worker goes on with store {self.store.id}", str(self.store.folder))

    def _end(self, told: list[Done]) -> None:
        self._is_over = True
        _log.error("store.lost", store=self.store.id, folder=str(self.store.folder))
        _tell(told, self._lost())
        for batch in self._waiting:
            _tell(batch.told, self._lost())
        self._waiting.clear()
        self._on_lost()

    async def take_snapshot(self) -> None:
        """Puts all sessions into the object store; what came before is not needed any more then.

        Raises:
            BrokerError: the broker has no room, or does not answer.
        """
        below, commits = self._writer.last, self.store.commits
        count = 0
        snapshots = await self._replication.snapshots()
        for data in _parts_of(self.store):
            count += 1
            await snapshots.put(f"{self.store.id}.{commits}.{count}", await asyncio.to_thread(data))
        await self._until_shipped(self.store.commits)  # what is in the snapshot is in the messages, too, or it is none
        await snapshots.put(f"{self.store.id}.{commits}", _encoder.encode(count))
        await (await self._replication.ledger()).purge(self._replication.subject(self.store.id), below=below)
        for name in await snapshots.names():
            store, _, rest = name.partition(".")
            if store == self.store.id and rest.partition(".")[0] != str(commits):
                await snapshots.delete(name)
        _log.info("store.snapshot_taken", store=self.store.id, commits=commits, parts=count)

    async def _until_shipped(self, commits: int) -> None:
        while self._acknowledged < commits:
            if self._is_over:
                raise self._lost()
            await asyncio.sleep(_LOOK_S)

    async def _take_snapshot(self) -> None:
        try:
            await self.take_snapshot()
        except NalarError as error:
            _log.warning("store.snapshot_failed", store=self.store.id, error=str(error))

    async def aclose(self) -> None:
        """Ships what has been written, for a while at most."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task], timeout=2.0)
        self._is_over = True
        await cancel_all([task for task in (self._task, self._snapshot) if task is not None])


class Replication:
    """The replicated stores of one worker. For the loop.

    Args:
        transport, subjects, me: of the process.
        on_lost: another worker goes on with a store of this one.
    """

    def __init__(self, transport: Transport, subjects: Subjects, me: Address, on_lost: Callable[[], None]) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._on_lost = on_lost
        self._seen: dict[str, tuple[int, float]] = {}

    def subject(self, store: str) -> str:
        """Where a store is shipped to."""
        return self._subjects.replica(store)

    async def ledger(self) -> Ledger:
        """Of all stores."""
        return await self._transport.ledger(self._subjects.replicas_ledger, [self._subjects.replica("*")])

    async def snapshots(self) -> ObjectStore:
        """Of all stores."""
        return await self._transport.object_store(self._subjects.snapshots_bucket)

    async def holders(self) -> KeyValue:
        """Who has which store open."""
        return await self._transport.key_value(self._subjects.stores_bucket)

    async def open(self, store: Store) -> Shipper:
        """Has an open store shipped from now on.

        Raises:
            StoreLostError: another copy of it goes on.
            BrokerError: the broker does not answer.
        """
        await self._claim(store)
        ledger = await self.ledger()
        last = await ledger.last(self.subject(store.id))
        shipper = Shipper(
            self, store, SoleWriter(self.ledger, self.subject(store.id), 0 if last is None else last.sequence), self._on_lost
        )
        if store.count() and _commits_in(last.data if last is not None else b"") != store.commits:
            await shipper.take_snapshot()
        return shipper

    async def _claim(self, store: Store) -> None:
        bucket, mine = await self.holders(), encode_record(StoreHolder(WIRE_VERSION, store.copy, *self._me))
        while True:
            entry = await bucket.get(store.id)
            try:
                if entry is None or entry.value is None:
                    await bucket.create(store.id, mine)
                elif _holder_in(entry.value).copy == store.copy:
                    await bucket.update(store.id, mine, entry.revision)
                else:
                    where = _holder_in(entry.value).name
                    raise StoreLostError(f"worker {where!r} goes on with store {store.id} by another copy", str(store.folder))
                return
            except KeyConflictError:
                continue

    async def orphans(self, is_held: Callable[[str], bool], after_s: float) -> list[str]:
        """Stores that nobody has had open for `after_s`, as far as this process has seen."""
        now = asyncio.get_running_loop().time()
        entries = await (await self.holders()).entries()
        found: list[str] = []
        for entry in entries:
            if is_held(entry.key):
                self._seen.pop(entry.key, None)
                continue
            revision, since = self._seen.setdefault(entry.key, (entry.revision, now))
            if revision != entry.revision:
                self._seen[entry.key] = entry.revision, now
            elif now - since >= after_s:
                found.append(entry.key)
        return found

    @property
    def me(self) -> Address:
        """Who enters himself as a holder."""
        return self._me

    async def holder(self, store: str) -> Address | None:
        """Who entered himself last as the holder of a store."""
        entry = await (await self.holders()).get(store)
        if entry is None or entry.value is None:
            return None
        holder = _holder_in(entry.value)
        return Address(holder.name, holder.incarnation)

    async def take_over(self, id: str, folder: Path, owner: str) -> Store | None:
        """Makes a copy of a store of a lost machine in `folder`, and opens it; None if another worker was faster.

        What is in the folder is replaced: as long as the copy is not whole, it must not bear the name of a store.

        Raises:
            StoreError: the folder cannot be used.
            BrokerError: the broker does not answer.
            StoreDamagedError: what was shipped is not whole.
        """
        bucket = await self.holders()
        entry = await bucket.get(id)
        if entry is None:
            return None
        store = await asyncio.to_thread(_begun, folder, owner, id)
        try:
            try:
                await bucket.update(id, encode_record(StoreHolder(WIRE_VERSION, store.copy, *self._me)), entry.revision)
            except KeyConflictError:
                await asyncio.to_thread(_remove, store)
                return None
            commits = await self._restore(store)
        except BaseException:
            await asyncio.to_thread(_remove, store)
            raise
        await asyncio.to_thread(store.restamp, commits)
        _log.info("store.taken_over", store=id, folder=str(folder), sessions=store.count(), commits=commits)
        return store

    async def _restore(self, store: Store) -> int:
        """Fills a store with what was shipped, after it is sealed; returns the number of its last transaction."""
        ledger, subject = await self.ledger(), self.subject(store.id)
        messages: list[Shipment] = []
        last, commits = 0, 0
        while True:
            while page := await ledger.read(subject, after=last):
                for kept in page:
                    last = kept.sequence
                    message = _message_in(kept.data)
                    commits = max(commits, message.commits) if _is_whole(message) else commits
                    if isinstance(message, Shipment):
                        messages.append(message)
            _, snapshot_commits = await self._snapshot_of(store.id)
            commits = max(commits, snapshot_commits)
            try:
                seal = encode_record(StoreSeal(WIRE_VERSION, store.copy, commits))
                await ledger.append(subject, seal, last=last)
                break
            except KeyConflictError:
                continue
        applier = _Applier(store)
        snapshot, _ = await self._snapshot_of(store.id)
        for name in snapshot:
            data = await (await self.snapshots()).get(name)
            if data is None:
                raise StoreDamagedError(f"the snapshot of store {store.id} lacks {name}", str(store.folder))
            await asyncio.to_thread(applier.apply, _writes_in(data))
        for data in _whole(messages):
            await asyncio.to_thread(applier.apply, _batches_in(data))
        return commits

    async def _snapshot_of(self, id: str) -> tuple[list[str], int]:
        """The names of the parts of the last snapshot, and the number of the last transaction in it."""
        snapshots = await self.snapshots()
        numbers = [name.partition(".")[2] for name in await snapshots.names() if name.startswith(f"{id}.")]
        latest = max((int(number) for number in numbers if number.isdigit()), default=None)
        if latest is None:
            return [], 0
        count = msgspec.msgpack.decode(await snapshots.get(f"{id}.{latest}") or b"\x00", type=int)
        return [f"{id}.{latest}.{part}" for part in range(1, count + 1)], latest


class _Applier:
    """Writes into a store what another copy of it has written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sessions: dict[tuple[str, str], Session] = {}

    def apply(self, shipped: Iterable[_Shipped]) -> None:
        """In order; many in one transaction. In a thread."""
        some: list[Write] = []
        for one in shipped:
            some.append(self._write_of(one))
            if len(some) >= _APPLIED_AT_ONCE:
                self._write(some)
                some = []
        self._write(some)

    def _write(self, writes: list[Write]) -> None:
        for error in self._store.write(writes) if writes else ():
            if error is not None:
                raise error

    def _write_of(self, shipped: _Shipped) -> Write:
        key = shipped.actor, shipped.name
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = self._store.session(*key)
        if shipped.kind == "r":
            return Removal(session)
        if shipped.kind == "d":
            return Departure(session, shipped.other, shipped.standing)
        records = [Outcome(*record) for record in shipped.records]
        return Commit(
            session,
            shipped.changes,
            shipped.call,
            shipped.payload,
            shipped.is_job,
            shipped.schema,
            shipped.kinds,
            shipped.standing,
            shipped.other,
            records,
        )


def _parts_of(store: Store) -> Iterable[Callable[[], bytes]]:
    """All sessions of a store in parts, each read when it is asked for."""
    after: tuple[str, str] | None = None
    is_over = False

    def read() -> bytes:
        nonlocal after, is_over
        found: list[_Shipped] = []
        size = 0
        while size < _SNAPSHOT_PART_BYTES:
            sessions = store.sessions(after, 100)
            if not sessions:
                is_over = True
                break
            for session in sessions:
                found.append(_whole_session(store, session))
                size += sum(len(data or b"") + 32 for _, _, data in found[-1].changes)
            after = sessions[-1].actor, sessions[-1].name
        return _encoder.encode(found)

    while not is_over:
        yield read


def _whole_session(store: Store, session: Session) -> _Shipped:
    session = store.session(session.actor, session.name)
    changes: list[Change] = [(field, order, data) for field, some in store.load(session).items() for order, data in some]
    header = session.header
    if header is None:
        return _Shipped("r", session.actor, session.name)
    return _Shipped(
        "c",
        session.actor,
        session.name,
        changes,
        schema=header.schema,
        kinds=header.kinds,
        standing=header.standing,
        other=header.other,
        records=[(one.call, one.payload, one.at_s, one.is_job) for one in store.outcomes(session)],
    )


def _whole(messages: Iterable[Shipment]) -> Iterable[bytes]:
    """What was shipped in one go, put together; what is not whole was never acknowledged."""
    parts: list[bytes] = []
    for message in messages:
        if message.part == 1:
            parts = []
        parts.append(message.data)
        if len(parts) == message.parts:
            yield b"".join(parts)
            parts = []


def _is_whole(message: Shipment | StoreSeal) -> bool:
    return isinstance(message, StoreSeal) or message.part == message.parts


def _commits_in(data: bytes) -> int:
    """The last transaction that the last message of a store holds whole; -1 if that cannot be said."""
    try:
        message = decode_replica(data)
    except WireError:
        return -1
    return message.commits if _is_whole(message) else -1


def _message_in(data: bytes) -> Shipment | StoreSeal:
    try:
        return decode_replica(data)
    except WireError as error:
        raise StoreDamagedError(f"what was shipped of a store cannot be read: {error}") from error


def _holder_in(data: bytes) -> StoreHolder:
    try:
        return decode_holder(data)
    except WireError:
        return StoreHolder(WIRE_VERSION, "", "", 0)


def _writes_in(data: bytes) -> list[_Shipped]:
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise StoreDamagedError(f"what was shipped of a store cannot be read: {error}") from error


def _batches_in(data: bytes) -> Iterable[_Shipped]:
    try:
        batches = msgspec.msgpack.decode(data, type=list[list[_Shipped]])
    except msgspec.MsgspecError as error:
        raise StoreDamagedError(f"what was shipped of a store cannot be read: {error}") from error
    return (one for batch in batches for one in batch)


def _array_head(length: int) -> bytes:
    return bytes((0x90 | length,)) if length < 16 else b"\xdd" + length.to_bytes(4, "big")


def _tell(told: list[Done], error: Exception | None) -> None:
    for done in told:
        try:
            done(error)
        except Exception:
            _log.exception("store.listener_failed")


def _begun(folder: Path, owner: str, id: str) -> Store:
    """A new store with that id, in the place of what somebody who was killed has left in the folder."""
    if folder.exists():
        with contextlib.suppress(StoreDamagedError):
            _remove(Store.open(folder, owner))
        shutil.rmtree(folder, ignore_errors=True)
    return Store.open(folder, owner, id=id)


def _remove(store: Store) -> None:
    store.close()
    shutil.rmtree(store.folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames the folder of a copy that is not the holder's, so that nobody opens it; returns where it is."""
    target = folder.with_name(f"{folder.name}.left-{int(time.time())}")
    folder.rename(target)
    return target
