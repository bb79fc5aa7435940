"""Appends to one subject of a ledger, as the only one who may: whoever ends that by an append of his own is noticed.

Every message is appended on condition that the last one of the subject is the writer's own. If the answer is lost, the writer
reads what lies there last: its own message (then it was accepted), the one before (then it was not, and is sent again), or
somebody else's, who has taken over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from nalar_mq.errors import BrokerAuthError, BrokerError, BrokerFeatureError, KeyConflictError
from nalar_mq.logs import logger
from nalar_mq.transport import Ledger

_RETRY_S: Final = 0.2
_log = logger(__name__)


class SoleWriter:
    """The writer of `subject`.

    Args:
        open_ledger: gives the ledger.
        subject: where to.
        last: the sequence of the newest message there; 0 if there is none.

    Attributes:
        last: as above, after what has been appended since.
    """

    def __init__(self, open_ledger: Callable[[], Awaitable[Ledger]], subject: str, last: int = 0) -> None:
        self._open_ledger = open_ledger
        self._subject = subject
        self.last = last

    async def append(self, data: bytes) -> bool:
        """Appends a message, waiting for a broker that is away; False if somebody else has appended.

        Raises:
            BrokerAuthError, BrokerFeatureError: waiting would not help.
        """
        is_repeated = False
        while True:
            try:
                ledger = await self._open_ledger()
                if is_repeated:
                    accepted = await self._has_accepted(ledger, data)
                    if accepted is not None:
                        return accepted
                self.last = await ledger.append(self._subject, data, last=self.last)
                return True
            except KeyConflictError:
                if is_repeated:
                    await asyncio.sleep(_RETRY_S)
                is_repeated = True
            except (BrokerAuthError, BrokerFeatureError):
                raise
            except BrokerError as error:
                _log.debug("ledger.append_failed", subject=self._subject, reason=str(error))
                is_repeated = True
                await asyncio.sleep(_RETRY_S)

    async def _has_accepted(self, ledger: Ledger, data: bytes) -> bool | None:
        """Whether `data` lies there last; False if something else does, None if what was there before still does."""
        found = await ledger.last(self._subject)
        if found is None or found.sequence == self.last:
            self.last = 0 if found is None else found.sequence
            return None
        if found.data == data:
            self.last = found.sequence
            return True
        return False
