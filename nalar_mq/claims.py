"""Large values travel by claim check: the value is kept beside the messages, and a claim goes in its place.

On the wire
    A value above `INLINE_LIMIT_BYTES` is replaced by a claim: the byte 0xC1, which MessagePack never uses and `values` so
    never writes, then a `Claim`. It stands where the payload of a `Resolve` or of a `Chunk` would. Large arguments are the
    value of one more future: `Call.payload` is that future, its id stands first of all in `Call.deps`, and the caller pushes
    its claim as it pushes any other value. So nothing else knows of claims, and no field was added to a message.

Where it is kept
    As a file in the folder of the machine (`local_store`) for those who see the same folder, in the object store of the broker
    for the others, in both if there are both among those who are known to want it. What does not fit onto the disk goes to the
    object store. Whoever pushes a claim on to somebody who cannot read it puts the value into the object store first.

Who writes, who holds
    The producer writes it, once, before it sends the claim. The owner of the future holds it, and nobody else: a consumer is
    the executor of a call whose arguments the future stands in, and the owner keeps the future until that call has ended. So
    the last holder lets go when nothing in the owner's process refers to the future any more; then the value is removed. A
    piece of a stream is held until it is taken. A cast ends when it is sent, so what it depends on is held for its time-out.

When processes die
    The name of a value begins with its owner. A dead producer changes nothing. What a dead owner held is removed by the
    workers: from the folder when its lock is free or it is declared lost, from the object store when it is declared lost, and
    again by a sweep from time to time. The object store forgets values after a week, if all else fails.

Reading
    Off the event loop, by who looks, into one copy, and checked against a SHA-256 that the producer computed. Arguments are
    read when the call has its turn, so that no more of them are in memory than calls run at once.

Jobs
    The journal of a job outlives all processes, and its claims with it. So the large values of its calls belong to the job, in
    place of an owner, and lie in the object store until it has ended (`job_values`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable
from random import Random
from typing import Any, Final, TypeVar

import msgspec

from nalar_mq import values
from nalar_mq.address import Address, Subjects
from nalar_mq.errors import (
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    BrokerFullError,
    MalformedMessageError,
    ObjectDamagedError,
    ValueLostError,
    ValueTooLargeError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.job_values import JobValues, job_of, name_of
from nalar_mq.local_store import KEPT_S, LocalStore
from nalar_mq.logs import logger
from nalar_mq.messages import Release
from nalar_mq.placement import RoutingTable
from nalar_mq.threads import LoopInbox
from nalar_mq.transport import ObjectStore, Transport

T = TypeVar("T")

INLINE_LIMIT_BYTES: Final = 512 * 1024
VALUE_LIMIT_BYTES: Final = 1024 * 1024 * 1024
MARK: Final = b"\xc1"
_VERSION: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}\.[0-9]{1,20}\.[0-9a-f]{32}")
_RETRY_S: Final = 0.5
_FULL_RETRY_S: Final = 2.0
_READ_PATIENCE_S: Final = 60.0
_CLOSE_S: Final = 2.0
_AT_ONCE: Final = 4
_OBJECT_SWEEP: Final = 10  # leases between two looks through the object store
_log = logger(__name__)


class Claim(msgspec.Struct, array_like=True, frozen=True):
    """Where a large value is.

    Attributes:
        version: of this form.
        name: `<owner>.<incarnation>.<random>`, or that of a value of a job.
        size_bytes: of the encoded value.
        digest: its SHA-256.
        folder: id of the local store that has it; empty for none.
        in_objects: the object store of the broker has it.
    """

    version: int
    name: str
    size_bytes: int
    digest: bytes
    folder: str = ""
    in_objects: bool = False


_claims: Final = msgspec.msgpack.Decoder(Claim)


def write_claim(claim: Claim) -> bytes:
    """The bytes that stand in the place of the value."""
    return MARK + msgspec.msgpack.encode(claim)


def read_claim(payload: bytes) -> Claim:
    """Reads what `write_claim` made.

    Raises:
        MalformedMessageError: it is no claim, or of a version that is not understood here.
    """
    try:
        claim = _claims.decode(memoryview(payload)[1:])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedMessageError(f"not a claim: {error}") from None
    if claim.version != _VERSION or not (_NAME.fullmatch(claim.name) or job_of(claim.name)):
        raise MalformedMessageError("not a claim of a kind that is understood here")
    return claim


def check_size(what: str, size_bytes: int, label: str, *, limit_bytes: int | None = None) -> None:
    """Returns if a value of `size_bytes` may travel.

    Raises:
        ValueTooLargeError: it may not; says what would.
    """
    if limit_bytes is None:
        limit_bytes = VALUE_LIMIT_BYTES
    if size_bytes > limit_bytes:
        raise ValueTooLargeError(
            f"too large: {what}: {size_bytes:,} bytes encoded, and {limit_bytes:,} is the most that travels: "
            "pass a path or a key to the data instead",
            actor=label,
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


class Held:
    """A large value that this process answers for: removed when nothing refers to this any more, unless a job needs it."""

    __slots__ = ("_claims", "_data", "_job", "_storing", "claim")

    def __init__(self, claims: Claims, claim: Claim | None, data: bytes | None = None, job: str = "") -> None:
        self.claim = claim
        self._claims = claims
        self._data = data
        self._job = job
        self._storing = asyncio.Lock()

    async def offer(self, consumer: Address, deadline: float | None) -> bytes:
        """A claim that `consumer` can read; on the loop."""
        async with self._storing:
            if self.claim is None:
                assert self._data is not None
                self.claim = await self._claims.keep(self._data, self._claims.me, [consumer], deadline, self._job)
                self._data = None
            elif not self._claims.can_read(consumer, self.claim):
                self.claim = await self._claims.export(self.claim, deadline)
            return write_claim(self.claim)

    async def value(self) -> Any:
        """The value; on the loop.

        Raises:
            ValueLostError: it is missing or damaged.
            WireError: as in `values.decode`.
        """
        assert self.claim is not None
        return await self._claims.value(self.claim)

    def value_in_thread(self) -> Any:
        """The same, in any other thread."""
        return asyncio.run_coroutine_threadsafe(self.value(), self._claims.loop).result()

    def __del__(self) -> None:
        if self.claim is not None:
            self._claims.let_go(self.claim)


class Claims:
    """The large values of one process. For the loop, except what is said to be for any thread.

    Args:
        transport, subjects, table, me, random: of the process.
        store: the folder of this machine; None to use the object store for everything.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        table: RoutingTable,
        me: Address,
        store: LocalStore | None,
        random: Random,
    ) -> None:
        self.me = me
        self.loop = asyncio.get_running_loop()
        self.tell: Callable[[Address, Release], None] | None = None
        self._transport = transport
        self._bucket = subjects.claims_bucket
        self._table = table
        self._store = store
        self._random = random
        self._inbox = LoopInbox(self.loop)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._objects: ObjectStore | None = None
        self._writing = asyncio.Semaphore(_AT_ONCE)
        self._in_objects: set[str] = set()
        self._lost: set[Address] = set()
        self._orphans: set[str] = set()
        self._is_closed = False
        self._of_jobs = JobValues(transport, subjects, self._open, self._begin)

    # Handles.

    def taken(self, payload: bytes) -> Held:
        """The handle of a claim that has come for this process to hold.

        Raises:
            MalformedMessageError: it is no claim.
        """
        claim = read_claim(payload)
        if claim.in_objects and not job_of(claim.name):
            self._in_objects.add(claim.name)
        return Held(self, claim)

    def made(self, data: bytes, job: str = "") -> Held:
        """The handle of a value of this process, or of a job, that is kept when somebody is to get it. Any thread."""
        return Held(self, None, data, job)

    def offer(
        self, held: Held, consumer: Address, deadline: float | None, then: Callable[[bytes | None, Exception | None], None]
    ) -> None:
        """Gives `then` a claim that `consumer` can read, or what went wrong; at once if nothing is to be done first."""
        if held.claim is not None and self.can_read(consumer, held.claim):
            then(write_claim(held.claim), None)
            return

        async def work() -> None:
            try:
                payload = await held.offer(consumer, deadline)
            except Exception as error:
                then(None, error)
            else:
                then(payload, None)

        self._begin(work())

    def let_go(self, claim: Claim) -> None:
        """Nobody needs it any more. Any thread."""
        if claim.name.startswith(_prefix(self.me)) and not self._is_closed:
            self._inbox.put(lambda: self._begin(self._remove(claim)))

    def drop(self, payload: bytes) -> None:
        """A claim that this process made and will not send; of a job, others may have sent the same."""
        claim = read_claim(payload)
        if not job_of(claim.name):
            self._begin(self._remove(claim))

    def on_release(self, sender: Address, release: Release) -> None:
        """An owner elsewhere has let go of a value in the folder of this machine."""
        if self._store is not None and _NAME.fullmatch(release.name) and release.name.startswith(_prefix(sender)):
            self._begin(asyncio.to_thread(self._store.remove, release.name))

    def _begin(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Writing.

    async def keep(
        self, data: bytes, owner: Address, readers: Iterable[Address], deadline: float | None, job: str = ""
    ) -> Claim:
        """Keeps a value where all of `readers` find it, for `owner` to hold; that of a job for all, until the job ends.

        A broker that is away is waited for until `deadline`, and in a job one that is full, too.

        Raises:
            BrokerFullError: the broker has no room for it.
            BrokerError: it could not be kept.
        """
        async with self._writing:
            digest = await asyncio.to_thread(_digest, data)
        if job:
            return await self._keep_of_job(data, digest, job, deadline)
        return await self._keep_of_owner(data, digest, owner, readers, deadline)

    async def _keep_of_job(self, data: bytes, digest: bytes, job: str, deadline: float | None) -> Claim:
        claim = Claim(_VERSION, name_of(job, digest), len(data), digest, in_objects=True)

        async def put() -> None:
            async with self._writing:
                await self._of_jobs.put(claim.name, data)

        await self._patiently(put, deadline, for_room=True)
        return claim

    async def _keep_of_owner(
        self, data: bytes, digest: bytes, owner: Address, readers: Iterable[Address], deadline: float | None
    ) -> Claim:
        claim = Claim(_VERSION, f"{_prefix(owner)}{self._random.getrandbits(128):032x}", len(data), digest)
        near = [self._is_near(reader) for reader in readers]
        if any(near):
            async with self._writing:
                claim = await asyncio.to_thread(self._write_file, claim, data)
        if not all(near) or not claim.folder:
            try:
                claim = await self._put(claim, data, deadline)
            except BaseException:
                self._begin(self._remove(claim))
                raise
        return claim

    async def export(self, claim: Claim, deadline: float | None) -> Claim:
        """Puts a value of the folder into the object store, too."""
        return await self._put(claim, await self.read(write_claim(claim)), deadline)

    def _write_file(self, claim: Claim, data: bytes) -> Claim:
        assert self._store is not None
        try:
            self._store.write(claim.name, data)
        except OSError as error:
            _log.warning("claims.not_kept_locally", size_bytes=len(data), error=str(error))
            return claim
        return msgspec.structs.replace(claim, folder=self._store.id)

    async def _put(self, claim: Claim, data: bytes, deadline: float | None) -> Claim:
        async def put() -> None:
            async with self._writing:
                await (await self._open()).put(claim.name, data)

        await self._patiently(put, deadline)
        if claim.name.startswith(_prefix(self.me)):
            self._in_objects.add(claim.name)
        return msgspec.structs.replace(claim, in_objects=True)

    async def _open(self) -> ObjectStore:
        if self._objects is None:
            self._objects = await self._transport.object_store(self._bucket, max_age_s=KEPT_S)
        return self._objects

    async def _patiently(self, operation: Callable[[], Awaitable[T]], deadline: float | None, *, for_room: bool = False) -> T:
        pause_s = _RETRY_S
        while True:
            try:
                return await operation()
            except (BrokerAuthError, BrokerFeatureError, ObjectDamagedError):
                raise
            except BrokerError as error:
                if isinstance(error, BrokerFullError):
                    if not for_room:
                        raise
                    pause_s = _FULL_RETRY_S
                    _log.warning("claims.waits_for_room", reason=str(error))
                if self._is_closed or (deadline is not None and self.loop.time() + pause_s > deadline):
                    raise
                await asyncio.sleep(pause_s)

    # Reading.

    def _is_near(self, address: Address) -> bool:
        return self._store is not None and self._folder_of(address) == self._store.id

    def _folder_of(self, address: Address) -> str:
        if address == self.me:
            return self._store.id if self._store is not None else ""
        member = self._table.members.get(address.name)
        return member.folder if member is not None and member.incarnation == address.incarnation else ""

    def can_read(self, address: Address, claim: Claim) -> bool:
        """True if that process finds the value."""
        return claim.in_objects or (claim.folder != "" and self._folder_of(address) == claim.folder)

    async def read(self, payload: bytes) -> bytes:
        """The bytes that a claim stands for.

        Raises:
            ValueLostError: they are missing or damaged.
            BrokerError: the broker did not answer.
            MalformedMessageError: it is no claim.
        """
        claim = read_claim(payload)
        if self._has_file(claim):
            try:
                return await asyncio.to_thread(self._read_file, claim)
            except ValueLostError as error:
                if not claim.in_objects:
                    raise
                _log.warning("claims.file_unusable", name=claim.name, error=str(error))
        if not claim.in_objects:
            raise _lost(claim, "it lies in the folder of another machine")
        data = await self._get(claim)
        await asyncio.to_thread(_check, claim, data, "the object store")
        return data

    async def value(self, claim: Claim) -> Any:
        """The value that a claim stands for; raises as `read` and `values.decode` do."""
        data = await self.read(write_claim(claim))
        return await asyncio.to_thread(values.decode, data)

    def _has_file(self, claim: Claim) -> bool:
        return self._store is not None and claim.folder == self._store.id

    def _read_file(self, claim: Claim) -> bytes:
        assert self._store is not None
        try:
            data = self._store.read(claim.name)
        except OSError as error:
            raise _lost(claim, f"its file cannot be read: {error.strerror or error}") from None
        _check(claim, data, "its file")
        return data

    async def _get(self, claim: Claim) -> bytes:
        async def get() -> bytes | None:
            return await (await self._open()).get(claim.name)

        try:
            data = await self._patiently(get, None if job_of(claim.name) else self.loop.time() + _READ_PATIENCE_S)
        except ObjectDamagedError:
            raise _lost(claim, "its checksum does not match in the object store") from None
        if data is None:
            raise _lost(claim, "the object store does not have it")
        return data

    # Removing.

    async def _remove(self, claim: Claim) -> None:
        if self._store is not None and claim.folder == self._store.id:
            await asyncio.to_thread(self._store.remove, claim.name)
        elif claim.folder:
            self._ask_to_remove(claim)
        if claim.in_objects:
            await self._remove_object(claim.name)

    def _ask_to_remove(self, claim: Claim) -> None:
        for name, member in self._table.members.items():
            if member.folder == claim.folder and self.tell is not None:
                self.tell(Address(name, member.incarnation), Release(claim.name))
                return

    async def _remove_object(self, name: str) -> None:
        async def delete() -> None:
            await (await self._open()).delete(name)

        try:
            await self._patiently(delete, self.loop.time() + _READ_PATIENCE_S)
        except BrokerError as error:
            _log.debug("claims.not_removed", name=name, error=str(error))
        else:
            self._in_objects.discard(name)

    # What dead processes have left.

    def start(self, lease_s: float) -> None:
        """Begins to remove, from time to time, what dead processes have left."""
        self._begin(self._keep_clean(lease_s))

    def on_lost(self, address: Address) -> None:
        """That process has been declared lost or has left."""
        self._lost.add(address)
        if self._store is not None and not self._is_closed:
            self._begin(asyncio.to_thread(self._store.remove_all_of, _prefix(address)[:-1]))

    async def _keep_clean(self, lease_s: float) -> None:
        number = 0
        while True:
            if self._store is not None:
                await asyncio.to_thread(self._store.sweep)
                await self._remove_files_of_the_lost(self._store)
            await asyncio.sleep(lease_s)
            number += 1
            lost, self._lost = self._lost, set()
            if lost or number % _OBJECT_SWEEP == 0:
                try:
                    await self._of_jobs.sweep(self._of_jobs.names)
                    if self._is_first_worker():
                        await self._sweep_objects(lost)
                except BrokerError as error:
                    self._lost |= lost
                    _log.debug("claims.sweep_failed", error=str(error))

    async def _remove_files_of_the_lost(self, store: LocalStore) -> None:
        """What producers wrote for an owner that was gone by then."""
        for name in await asyncio.to_thread(store.names):
            owner = _owner_of(name)
            if owner is not None and self._table.is_lost(owner):
                await asyncio.to_thread(store.remove, name)

    def _is_first_worker(self) -> bool:
        return self.me.name == min(
            (name for name, member in self._table.members.items() if member.role == "worker"), default=self.me.name
        )

    async def _sweep_objects(self, lost: set[Address]) -> None:
        """Values of jobs that have ended go, those of owners that are lost, and at the second look of owners nobody knows."""
        objects = await self._open()
        orphans: set[str] = set()
        names = await objects.names()
        await self._of_jobs.sweep(names)
        for name in names:
            owner = _owner_of(name)
            if owner is None or self._table.is_alive(owner):
                continue
            if owner in lost or name in self._orphans:
                await objects.delete(name)
            else:
                orphans.add(name)
        self._orphans = orphans

    async def aclose(self) -> None:
        """Removes what this process holds; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        await cancel_all(list(self._tasks))
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.gather(*(self._remove_object(name) for name in list(self._in_objects)))
        except TimeoutError:
            _log.debug("claims.left_behind", count=len(self._in_objects))
        if self._store is not None:
            await asyncio.to_thread(self._store.close)


def _prefix(owner: Address) -> str:
    return f"{owner.name}.{owner.incarnation}."


def _owner_of(name: str) -> Address | None:
    if _NAME.fullmatch(name) is None:
        return None
    owner, incarnation, _ = name.split(".")
    return Address(owner, int(incarnation))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _check(claim: Claim, data: bytes, place: str) -> None:
    if len(data) != claim.size_bytes or _digest(data) != claim.digest:
        raise _lost(claim, f"the checksum of {place} does not match")


def _lost(claim: Claim, why: str) -> ValueLostError:
    text = f"a value of {claim.size_bytes:,} bytes is lost: {why}: make the call again (value {claim.name})"
    return ValueLostError(text, name=claim.name)
