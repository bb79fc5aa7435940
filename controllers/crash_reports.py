"""What a node tells everybody of its workers that keep ending: `nalar ps`.

    node ──every third of a lease, while there is something to tell──▶ NS-nodes/<node> ──▶ who looks

An entry goes when the node has been calm for a while, and within a lease when the node is gone. Of a node all of whose workers
serve nothing is written. Times are seconds before the entry was written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from nalar_mq.address import Subjects
from nalar_mq.errors import MalformedMessageError
from nalar_mq.transport import Transport

_REASON: Final = 400


class CrashRow(msgspec.Struct, frozen=True):
    """A worker that has ended though nobody wanted it, once or several times soon after each other.

    Attributes:
        state: of its slot now, as `supervision` has it.
        times: how often.
        since_s, last_s: how long ago it began, and how long ago the last time was.
        reason: of the last time, in one line.
    """

    state: str
    times: int
    since_s: float
    last_s: float
    reason: str

    def describe(self) -> str:
        """In words."""
        often = f"{self.times} times within {self.since_s:.0f} s" if self.times > 1 else f"once, {self.last_s:.0f} s ago"
        return f"has ended {often}, is {self.state} now: {self.reason}"


_decoder: Final = msgspec.json.Decoder(dict[str, CrashRow])


class Crashing(Protocol):
    """The workers of a node."""

    def crashes(self) -> Mapping[str, CrashRow]:
        """Those that have ended lately."""
        ...


async def tell_crashes(transport: Transport, subjects: Subjects, node: str, workers: Crashing, lease_s: float) -> None:
    """Tells of them; returns when all is calm.

    Args:
        transport, subjects: where.
        node, workers: whose.
        lease_s: how long an entry is there.

    Raises:
        BrokerError: the broker does not answer; it may be called again, with another connection.
    """
    bucket = await transport.key_value(subjects.nodes_bucket, ttl_s=lease_s)
    while crashes := workers.crashes():
        rows = {name: msgspec.structs.replace(row, reason=_one_line(row.reason)) for name, row in crashes.items()}
        await bucket.put(node, msgspec.json.encode(rows))
        await asyncio.sleep(lease_s / 3)
    await bucket.delete(node)


async def read_crashes(transport: Transport, subjects: Subjects, lease_s: float) -> dict[str, dict[str, CrashRow]]:
    """What nodes tell, by node and worker; an entry that cannot be read counts as none.

    Raises:
        BrokerError: the broker does not answer, or does not have that.
    """
    bucket = await transport.key_value(subjects.nodes_bucket, ttl_s=lease_s)
    found: dict[str, dict[str, CrashRow]] = {}
    for entry in await bucket.entries():
        if entry.value is not None:
            try:
                found[entry.key] = decode_crashes(entry.value)
            except MalformedMessageError:
                continue
    return found


def decode_crashes(data: bytes) -> dict[str, CrashRow]:
    """Reads what a node has written.

    Raises:
        MalformedMessageError: it is not that.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(f"not the crashes of a node: {error}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_REASON]
