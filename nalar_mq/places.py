"""Where the sessions of stateful actors live: one entry per session in the places bucket, written by compare-and-set.

The first caller proposes the replica that ranks highest for the session; whoever writes the entry first has decided, and all
others read it. Entries name an incarnation, so a session whose process has died is found to be lost by the next caller, who
writes the successor's entry and is told `StateLostError`, once; everybody after him starts with an empty state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import BrokerError, CallError, KeyConflictError, NalarError, StateLostError, WireError, WorkerLostError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import WIRE_VERSION, Place, decode_member, decode_place, encode_record
from nalar_mq.placement import RoutingTable
from nalar_mq.transport import KeyValue, Transport

OnPlaced = Callable[[bytes, Address | None, CallError | None], bool]
"""Is told the id it asked for, the place and what went wrong; False if nobody waits for the answer any more."""

_PLACES_KEPT = 200_000
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
        self._known: dict[str, Address] = {}
        self._finding: dict[str, list[tuple[bytes, OnPlaced]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def key(actor: str, session: str, instance: str) -> str:
        """The key of one instance of a stateful actor."""
        return f"{actor}.{session}.{instance}" if instance else f"{actor}.{session}"

    def known(self, key: str) -> Address | None:
        """Where it is, if this process knows and has heard nothing of that process's death."""
        if key in self._finding:
            return None
        address = self._known.get(key)
        return address if address is not None and self._table.is_alive(address) else None

    def find(self, key: str, actor: str, id: bytes, on_placed: OnPlaced) -> None:
        """Looks the place up or decides it; answers each asker once, in the order of asking."""
        waiting = self._finding.get(key)
        if waiting is not None:
            waiting.append((id, on_placed))
            return
        self._finding[key] = [(id, on_placed)]
        task = asyncio.get_running_loop().create_task(self._find(key, actor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find(self, key: str, actor: str) -> None:
        address: Address | None = None
        error: CallError | None = None
        lost = False
        try:
            address, lost = await self._decide(key, actor)
        except NalarError as cause:
            error = WorkerLostError(f"the place of {key} could not be read: {cause}")
        except Exception as cause:
            _log.exception("places.find_failed", key=key)
            error = WorkerLostError(f"the place of {key} could not be read: {cause!r}")
        if address is not None:
            self._known[key] = address
            if len(self._known) > _PLACES_KEPT:
                del self._known[next(iter(self._known))]
        for id, on_placed in self._finding.pop(key):
            try:
                was_told = on_placed(id, address, _state_lost(key) if lost else error)
            except Exception:
                _log.exception("places.asker_failed", key=key)
            else:
                lost = lost and not was_told

    async def _decide(self, key: str, actor: str) -> tuple[Address | None, bool]:
        """The place, and whether a former one was lost; None if there is no replica to propose."""
        if self._bucket is None:
            self._bucket = await self._transport.key_value(self._subjects.places_bucket)
        while True:
            entry = await self._bucket.get(key)
            former = self._read(entry.value) if entry is not None and entry.value is not None else None
            if former is not None and (self._table.is_alive(former) or await self._has_just_joined(former)):
                return former, False
            proposed = self._table.rank(actor, key)
            if proposed is None:
                return None, False
            record = encode_record(Place(WIRE_VERSION, proposed.name, proposed.incarnation))
            try:
                if entry is None:
                    await self._bucket.create(key, record)
                else:
                    await self._bucket.update(key, record, entry.revision)
            except KeyConflictError:
                continue
            return proposed, entry is not None

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

    def release(self, key: str, address: Address) -> None:
        """Removes the entry of a session that has ended at `address`, soon."""
        self._known.pop(key, None)
        task = asyncio.get_running_loop().create_task(self._release(key, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, key: str, address: Address) -> None:
        with contextlib.suppress(BrokerError):
            await self._remove(key, address)

    async def _remove(self, key: str, address: Address) -> None:
        if self._bucket is None:
            self._bucket = await self._transport.key_value(self._subjects.places_bucket)
        entry = await self._bucket.get(key)
        if entry is not None and entry.value is not None and self._read(entry.value) == address:
            await self._bucket.delete(key, entry.revision)

    def _read(self, value: bytes) -> Address | None:
        try:
            place = decode_place(value)
        except WireError:
            self.unreadable += 1
            return None
        return Address(place.name, place.incarnation)

    def forget(self, address: Address) -> None:
        """That process is gone; its sessions are looked up again."""
        self._known = {key: place for key, place in self._known.items() if place != address}

    async def aclose(self) -> None:
        """Gives up what is being looked up."""
        await cancel_all(self._tasks)


def _state_lost(key: str) -> StateLostError:
    return StateLostError(f"the memory of {key} was lost with its worker; the next call starts with an empty state")
