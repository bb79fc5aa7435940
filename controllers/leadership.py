"""Which global controller leads: a key with a short life, written by compare-and-set.

    absent ──create──▶ somebody leads ──update, again and again──▶ …
       ▲                      │ stops: the key goes, or is deleted by who leaves
       └──────────────────────┘

The revision of the create is the *term*. A leader that has not renewed the key for its life is one no more, and knows it by its
own clock; where it is stopped between that look and what it does, its writes meet those of its successor and are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from nalar_mq.actions import Leader, decode_decision, encode_decision
from nalar_mq.address import Address, Subjects
from nalar_mq.errors import BrokerError, KeyConflictError, WireError
from nalar_mq.messages import WIRE_VERSION
from nalar_mq.transport import KeyValue, Transport

KEY: Final = "leader"
LIFE: Final = 0.6  # of a lease: a standby that looks every tenth of one leads before a lease is over
RENEWAL: Final = 0.2
LOOK: Final = 0.1


async def open_lead(transport: Transport, subjects: Subjects, lease_s: float) -> KeyValue:
    """The bucket of the leader's key."""
    return await transport.key_value(subjects.leader_bucket, ttl_s=LIFE * lease_s)


async def leader_in(bucket: KeyValue) -> str:
    """The name of the controller that leads; empty for nobody.

    Raises:
        BrokerError: the broker does not answer.
    """
    entry = await bucket.get(KEY)
    return _name_in(entry.value) if entry is not None else ""


class Leadership:
    """The part of one controller in it.

    Args:
        bucket: whose entries live for `LIFE` of a lease.
        me: the controller.
        lease_s: as everywhere.
        clock: seconds.

    Attributes:
        term: of this controller; 0 while it does not lead.
        leader: who leads, as last seen; empty for nobody.
    """

    def __init__(self, bucket: KeyValue, me: Address, lease_s: float, clock: Callable[[], float]) -> None:
        self._bucket = bucket
        self._value = encode_decision(Leader(WIRE_VERSION, me.name, me.incarnation))
        self._me = me
        self._life_s = LIFE * lease_s
        self._lease_s = lease_s
        self._clock = clock
        self._revision = 0
        self._confirmed_at = float("-inf")
        self.term = 0
        self.leader = ""

    @property
    def is_current(self) -> bool:
        """True while it leads and nobody else can."""
        return self.term > 0 and self._clock() - self._confirmed_at < self._life_s

    @property
    def pause_s(self) -> float:
        """Until the next step."""
        return (RENEWAL if self.term else LOOK) * self._lease_s

    async def step(self) -> None:
        """Renews the key, or takes it if it is free.

        Raises:
            BrokerError: the broker does not answer; nothing is known to have changed.
        """
        began = self._clock()
        if self.term:
            try:
                self._revision = await self._bucket.update(KEY, self._value, self._revision)
            except KeyConflictError:
                self.resign()
                return
            self._confirmed_at = began
            return
        entry = await self._bucket.get(KEY)
        if entry is not None:
            self.leader = _name_in(entry.value)
            return
        with contextlib.suppress(KeyConflictError):
            self._revision = await self._bucket.create(KEY, self._value)
            self.term, self.leader, self._confirmed_at = self._revision, self._me.name, began

    def resign(self) -> None:
        """It does not lead any more: somebody else has taken over."""
        self.term = 0
        self.leader = ""

    async def release(self) -> None:
        """Leaves the key to others at once."""
        if self.term:
            self.resign()
            with contextlib.suppress(BrokerError):
                await self._bucket.delete(KEY, self._revision)


def _name_in(value: bytes | None) -> str:
    try:
        return decode_decision(value or b"", Leader).name
    except WireError:
        return ""
