"""Which folder has a store: of one that was copied, the copy or what it was copied from is refused, before two serve the same.

    NS-places   _copy-<copy of the store>: who opened it last, in which folder, and the token of that opening

A lock keeps a folder from being opened twice, and knows nothing of a copy of it. So each opening has a token:

    in the store, before      T0 ──▶ T0, T1
    in the directory          T0 ────────────▶ T1      by compare-and-set

The store keeps former tokens: an answer may be lost, and the directory may go back, if its broker had not synced it.
A store that does not have the token in the directory was copied before the last opening, and what was committed since is
elsewhere: it is refused. One that has it, and is not in the folder of the last opening, is a copy of a store that was open, or
has been moved. It is refused while the other folder is there, as far as that can be seen from here, or the process lives that
opened it; if they have gone, it is the store from then on, and the other one, should it come back, does not have the token.

Who closes a store changes the token once more, and is not its holder any more. So what was copied of it while it was open,
perhaps long before, can go on only if its process was killed: then nobody knows which commits it lacks. And whoever opens it
next waits for nobody.

A folder is known by its machine, device and inode. That these are others after a restart costs no more than the time in which
the lease of the process that opened it before runs out.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Final

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import KeyConflictError, StoreCopiedError, WireError
from nalar_mq.membership import Register, incarnation_in
from nalar_mq.messages import WIRE_VERSION, StoreOpening, decode_opening, encode_record
from nalar_mq.store import Store
from nalar_mq.transport import Transport

_NOBODY: Final = Address("", 0)
_KEPT: Final = 32  # former tokens


class Openings:
    """Notes in the directory which stores this process opens.

    Args:
        transport, subjects: where the directory is.
        me: this process.
        lease_s: after which a process that is not heard of is gone.
    """

    def __init__(self, transport: Transport, subjects: Subjects, me: Address, lease_s: float) -> None:
        self._transport = transport
        self._subjects = subjects
        self._me = me
        self._lease_s = lease_s

    @property
    def is_reachable(self) -> bool:
        """False while there is no broker."""
        return self._transport.is_connected

    async def note(self, store: Store, *, has_other: bool = False, anyway: bool = False, is_closing: bool = False) -> None:
        """A store is opened here; on return it is the one of its copies that goes on.

        Args:
            store: that is open and serves nothing yet.
            has_other: this process has a store of the same id open already.
            is_closing: it is about to be closed, and whoever opens it next need not wait for this process.
            anyway: whatever others have written since it was copied; not if one of those is open.

        Raises:
            StoreCopiedError: another one goes on, or has gone on.
            BrokerError: the broker does not answer.
        """
        bucket, key = await self._transport.key_value(self._subjects.places_bucket), f"_copy-{store.copy}"
        host, folder, file = socket.gethostname(), str(store.folder.resolve()), _file(store.folder)
        while True:
            entry = await bucket.get(key)
            known = None if entry is None or entry.value is None else _read(entry.value)
            if known is not None and not anyway and known.token not in store.openings:
                raise _copied(store, known, host, "went on")
            is_elsewhere = known is not None and (known.host, known.file) != (host, file)
            if known is not None and is_elsewhere and await self._is_open(known, has_other=has_other):
                raise _copied(store, known, host, f"is open in worker {known.name!r}")
            if known is not None and is_elsewhere and not anyway and known.host == host and _file(known.folder) == known.file:
                raise _copied(store, known, host, "is there, too")
            token = os.urandom(8).hex()
            # That of the directory stays, however often it could not be changed.
            written = () if known is None else (known.token,)
            former = [one for one in store.openings if one not in written]
            await asyncio.to_thread(store.note_openings, (*former[-_KEPT:], *written, token))
            record = encode_record(
                StoreOpening(WIRE_VERSION, token, *(_NOBODY if is_closing else self._me), host, folder, file)
            )
            try:
                if entry is None:
                    await bucket.create(key, record)
                else:
                    await bucket.update(key, record, entry.revision)
            except KeyConflictError:
                continue
            return

    async def _is_open(self, known: StoreOpening, *, has_other: bool) -> bool:
        address = Address(known.name, known.incarnation)
        if address == _NOBODY:
            return False
        return has_other if address == self._me else not await self._is_gone(address)

    async def _is_gone(self, address: Address) -> bool:
        """Judges as `membership` does, before this process is a member: looks until the lease is renewed or has run out."""
        members = await self._transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
        clock = asyncio.get_running_loop().time
        register = Register(self._transport, self._subjects.lost_bucket)
        seen: int | None = None
        absent_since = clock()
        while True:
            entry = await members.get(address.name)
            if entry is None and clock() - absent_since >= self._lease_s:
                await register.declare(address)
                entry = await members.get(address.name)
                if entry is None:
                    return True
            if entry is not None:
                absent_since = clock()
                incarnation = incarnation_in(entry)
                if incarnation != address.incarnation:
                    return incarnation is not None and incarnation > address.incarnation
                if seen not in (None, entry.revision):
                    return False
                seen = entry.revision
            await asyncio.sleep(self._lease_s / 6)


def _file(folder: Path | str) -> str:
    """What tells a folder from others; empty if there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return ""
    return f"{found.st_dev}.{found.st_ino}"


def _read(data: bytes) -> StoreOpening | None:
    try:
        return decode_opening(data)
    except WireError:
        return None


def _copied(store: Store, known: StoreOpening, host: str, what: str) -> StoreCopiedError:
    is_replicated = not store.folder.name.isdigit()  # then the broker has all there is
    if (known.host, known.file) == (host, _file(store.folder)):
        text = f"{store.folder} has a former state of the store that was open there last, as a backup in its place has"
        further = "remove it" if is_replicated else "bring the later one back; or, if this is to go on, say: nalar state adopt"
        return StoreCopiedError(f"{text}: {further}", str(store.folder))
    where = known.folder if known.host == host else f"{known.folder} on {known.host}"
    text = f"{store.folder} is a copy of the store in {where}, which {what}: remove the copy"
    if not is_replicated:
        text += "; or, if it is to go on in place of that one, end who has that open, and say: nalar state adopt"
    return StoreCopiedError(text, str(store.folder))
