"""Where the history of decisions is kept: the ledger `NS-decisions`, which anybody may read without a controller."""

from __future__ import annotations

import contextlib
from typing import Final

from nalar_mq.actions import Decided, decode_decided
from nalar_mq.address import Subjects
from nalar_mq.errors import WireError
from nalar_mq.transport import Ledger, Transport

KEPT: Final = 1000
KEPT_S: Final = 7 * 24 * 3600.0


async def open_history(transport: Transport, subjects: Subjects) -> Ledger:
    """Where decisions are kept: the last `KEPT` entries, for a week."""
    return await transport.ledger(subjects.decisions_ledger, [subjects.decided], max_age_s=KEPT_S, per_subject=KEPT)


async def read_history(ledger: Ledger, subjects: Subjects) -> list[Decided]:
    """All entries that are kept, the oldest first; those of other versions are left out."""
    found: list[Decided] = []
    after = 0
    while entries := await ledger.read(subjects.decided, after=after):
        after = entries[-1].sequence
        for entry in entries:
            with contextlib.suppress(WireError):
                found.append(decode_decided(entry.data))
    return found
