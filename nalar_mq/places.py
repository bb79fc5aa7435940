"""Where the sessions of stateful actors live: one entry per session in the places bucket, written by compare-and-set.

The first caller proposes the replica that ranks highest for the session; whoever writes the entry first has decided, and all
others read it.

In memory      The entry names an incarnation, so a session whose process has died is found to be lost by the next caller, who
               writes the successor's entry and is told `StateLostError`, once; everybody after him starts with an empty state.
In a store     The entry names the store, and who has that open says so in its own record: a worker that takes over the store
               of a dead one takes over all its sessions with that one record. While nobody has it open, callers wait; after
               `PATIENCE_S` they are told `SessionUnavailableError`. Such a session never begins anew.

A broker that does not answer is asked again for as long. A write whose answer is lost may have been done: an entry that is
found to be what was to be written counts as this caller's, so that it is told of the loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Callable

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import (
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    BrokerFullError,
    CallError,
    KeyConflictError,
    NalarError,
    SessionUnavailableError,
    StateLostError,
    WireError,
    WorkerLostError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Place, decode_member, decode_place, encode_record
from nalar_mq.placement import RoutingTable
from nalar_mq.transport import KeyValue, Transport

OnPlaced = Callable[[bytes, Address | None, CallError | None], bool]
"""Is told the id it asked for, the place and what went wrong; False if nobody waits for the answer any more."""

_PLACES_KEPT = 200_000
PATIENCE_S = 30.0  # for a store that nobody has open: its worker may be on its way back
_READ_AGAIN_S = 1.0
_READ_SELDOM_S = 8.0
_ASK_AGAIN_S = 0.2
_ASK_SELDOM_S = 2.0
_RETRY_AFTER_S = 5.0
_log = logger(__name__)


class Places:
    """The places this process knows, and the way to learn others.

    Attributes:
        unreadable: entries that made no sense; they are overwritten as if their process were lost.
    """

    def __init__(self, transport: Transport, subjects: Subjects, table: RoutingTable) -> None:
        self._transport = transport
        self._subjects = subjects
        self._table = table
        self.unreadable = 0
        self._bucket: KeyValue | None = None
        self._known: dict[str, Address | str] = {}
        self._changed = asyncio.Event()
        self._finding: dict[str, list[tuple[bytes, OnPlaced]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def key(actor: str, session: str, instance: str) -> str:
        """The key of one instance of a stateful actor."""
        return f"{actor}.{session}.{instance}" if instance else f"{actor}.{session}"

    @staticmethod
    def key_in_store(actor: str, session: str) -> str:
        """The key of a session as stores name it: with an instance, `session/instance`."""
        return f"{actor}.{session.replace('/', '.')}"

    def learn(self, key: str, store: str) -> None:
        """The session is in that store now."""
        if key not in self._finding:
            self._known[key] = store

    def store_known(self, key: str) -> str:
        """The store that it is in, as far as this process knows; empty if it does not."""
        place = self._known.get(key)
        return place if isinstance(place, str) else ""

    def known(self, key: str) -> Address | None:
        """Where it is, if this process knows and has heard nothing of that process's death."""
        if key in self._finding:
            return None
        place = self._known.get(key)
        if type(place) is str:
            return self._table.holder(place)
        return place if place is not None and self._table.is_alive(place) else None  # type: ignore[arg-type, return-value]

    def on_table_changed(self) -> None:
        """The routing table has changed: perhaps somebody has opened a store that is waited for."""
        self._changed.set()

    def find(self, key: str, actor: str, id: bytes, on_placed: OnPlaced, *, or_leaving: bool = False) -> None:
        """Looks the place up or decides it; answers each asker once, in the order of asking.

        With `or_leaving`, in a worker that is drained if nobody else serves the actor.
        """
        waiting = self._finding.get(key)
        if waiting is not None:
            waiting.append((id, on_placed))
            return
        self._finding[key] = [(id, on_placed)]
        task = asyncio.get_running_loop().create_task(self._find(key, actor, or_leaving))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find(self, key: str, actor: str, or_leaving: bool) -> None:
        address: Address | None = None
        place: Address | str | None = None
        error: CallError | None = None
        lost = False
        try:
            place, lost = await self._decide_patiently(key, actor, or_leaving=or_leaving)
            if isinstance(place, str):
                place, address = await self._holder(place, key)
            else:
                address = place
        except CallError as cause:
            error = cause
        except NalarError as cause:
            error = WorkerLostError(f"the place of {key} could not be read: {cause}")
        except Exception as cause:
            _log.exception("places.find_failed", key=key)
            error = WorkerLostError(f"the place of {key} could not be read: {cause!r}")
        if place is not None:
            self._known[key] = place
            if len(self._known) > _PLACES_KEPT:
                del self._known[next(iter(self._known))]
        for id, on_placed in self._finding.pop(key):
            try:
                was_told = on_placed(id, address, _state_lost(key) if lost else error)
            except Exception:
                _log.exception("places.asker_failed", key=key)
            else:
                lost = lost and not was_told

    async def locate(self, key: str, actor: str) -> Address | None:
        """Where the directory says that it is now, or where it begins; None if nobody serves the actor.

        Calls go on to where this process knows it to be: their order is seen to by whoever forwards them.

        Raises:
            NalarError: the directory cannot be read, or nobody has the store open.
        """
        info = self._table.info(actor)
        if info is None or not info.is_kept:
            return self._table.rank(actor, key)
        place, _ = await self._decide(key, actor)
        return (await self._holder(place, key))[1] if isinstance(place, str) else place

    async def is_known(self, key: str) -> bool:
        """True if the directory says where it is; it is not put anywhere for that.

        Raises:
            NalarError: the directory cannot be read.
        """
        entry = await (await self._opened()).get(key)
        return entry is not None and entry.value is not None

    async def _opened(self) -> KeyValue:
        if self._bucket is None:
            self._bucket = await self._transport.key_value(self._subjects.places_bucket)
        return self._bucket

    async def _holder(self, store: str, key: str) -> tuple[str, Address]:
        """The store, and who has it open as soon as somebody has.

        The session may have moved on before its worker left, and after the directory was read: it is read again meanwhile, less
        and less often, since very many may wait for one store, and however often the table changes.
        """
        clock, pause_s = asyncio.get_running_loop().time, _READ_AGAIN_S * _spread(key)
        read_at = clock() + pause_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    self._changed.clear()
                    holder = self._table.holder(store)
                    if holder is not None:
                        return store, holder
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(read_at):
                            await self._changed.wait()
                    if clock() < read_at:
                        continue
                    pause_s = min(2 * pause_s, _READ_SELDOM_S)
                    read_at = clock() + pause_s
                    with contextlib.suppress(BrokerError):
                        entry = await (await self._opened()).get(key)
                        named = self._read(entry.value) if entry is not None and entry.value is not None else None
                        store = named if isinstance(named, str) else store
        raise SessionUnavailableError(
            f"nobody has the state of {key} open (store {store}): its worker or its machine is gone; it is kept there and "
            f"served again when that is back",
            retry_after_s=_RETRY_AFTER_S,
        )

    async def _decide_patiently(self, key: str, actor: str, *, or_leaving: bool) -> tuple[Address | str | None, bool]:
        clock, perhaps_written = asyncio.get_running_loop().time, set[bytes]()
        until, pause_s = clock() + PATIENCE_S, _ASK_AGAIN_S * _spread(key)
        while True:
            try:
                return await self._decide(key, actor, or_leaving=or_leaving, perhaps_written=perhaps_written)
            except (BrokerAuthError, BrokerFeatureError, BrokerFullError):
                raise
            except BrokerError as error:
                if clock() >= until:
                    raise
                _log.debug("places.no_answer", key=key, error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _ASK_SELDOM_S)

    async def _decide(
        self, key: str, actor: str, *, or_leaving: bool = False, perhaps_written: set[bytes] | None = None
    ) -> tuple[Address | str | None, bool]:
        """The place, and whether a former one was lost; None if there is no replica to propose.

        In `perhaps_written` stays what was written over the entry of a lost process, if it is not known whether it was.
        """
        bucket = await self._opened()
        may_be_new = True  # most sessions that nobody here knows begin now: who writes first need not read
        while True:
            proposed = self._proposed(key, actor, or_leaving)
            if may_be_new and proposed is not None:
                entry = await bucket.claim(key, encode_record(place_of(*proposed)))
                if entry is None:
                    return proposed[1] or proposed[0], False
            else:
                entry = await bucket.get(key)
            may_be_new = False
            former = self._read(entry.value) if entry is not None and entry.value is not None else None
            if former is not None and perhaps_written and entry is not None and entry.value in perhaps_written:
                return former, True
            if isinstance(former, str):
                return former, False
            if former is not None and (self._table.is_alive(former) or await self._has_just_joined(former)):
                return former, False
            proposed = self._proposed(key, actor, or_leaving)
            if proposed is None:
                return None, False
            record = encode_record(place_of(*proposed))
            try:
                if entry is None:
                    await bucket.create(key, record)
                else:
                    await bucket.update(key, record, entry.revision)
            except KeyConflictError:
                continue
            except BrokerError:
                if entry is not None and perhaps_written is not None:
                    perhaps_written.add(record)
                raise
            return proposed[1] or proposed[0], entry is not None

    def _proposed(self, key: str, actor: str, or_leaving: bool) -> tuple[Address, str] | None:
        """Where a session is to begin, and in which store if it is kept; None if nobody serves the actor."""
        address = self._table.rank(actor, key, or_leaving=or_leaving)
        if address is None:
            return None
        info = self._table.info(actor)
        if info is None or not info.is_kept:
            return address, ""
        return address, self._table.store_of(address, is_replicated=info.is_replicated)

    async def _has_just_joined(self, address: Address) -> bool:
        """True for a live process of which whoever wrote the entry has heard before this one."""
        if self._table.is_lost(address):
            return False
        members = await self._transport.key_value(self._subjects.members_bucket)
        entry = await members.get(address.name)
        if entry is None or entry.value is None:
            return False
        try:
            return decode_member(entry.value).incarnation == address.incarnation
        except WireError:
            return False

    def release(self, key: str, address: Address | str) -> None:
        """Removes the entry of a session that has ended at `address`, or in that store, soon."""
        self._known.pop(key, None)
        task = asyncio.get_running_loop().create_task(self._release(key, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, key: str, address: Address | str) -> None:
        with contextlib.suppress(BrokerError):
            await self._remove(key, address)

    async def _remove(self, key: str, address: Address | str) -> None:
        bucket = await self._opened()
        entry = await bucket.get(key)
        if entry is not None and entry.value is not None and self._read(entry.value) == address:
            await bucket.delete(key, entry.revision)

    def _read(self, value: bytes) -> Address | str | None:
        try:
            place = decode_place(value)
        except WireError:
            self.unreadable += 1
            return None
        return place.store or Address(place.name, place.incarnation)

    def forget(self, address: Address) -> None:
        """That process is gone; its sessions are looked up again."""
        self._known = {key: place for key, place in self._known.items() if place != address}

    async def aclose(self) -> None:
        """Gives up what is being looked up."""
        await cancel_all(self._tasks)


def place_of(address: Address, store: str = "") -> Place:
    """The entry of a session in that store, or in the memory of that process."""
    return Place(WIRE_VERSION, "", 0, store) if store else Place(WIRE_VERSION, address.name, address.incarnation)


def _state_lost(key: str) -> StateLostError:
    return StateLostError(f"the memory of {key} was lost with its worker; the next call starts with an empty state")


def _spread(key: str) -> float:
    """Between 0.75 and 1.25, another for each key: what waits for the same does not ask all at once."""
    return 0.75 + zlib.crc32(key.encode()) / (1 << 33)
