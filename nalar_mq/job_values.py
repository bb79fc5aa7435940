"""Large values of jobs: kept in the object store of the broker for as long as the job lasts.

The journal of a job outlives the processes that made and took the values of its calls, and so do these values. One of them is
named `<job>.job.<digest of its content>`: another attempt at the job that makes it again, or another call that is given the
same arguments, means the same object. No process holds it, and nobody counts who refers to it.

Whoever stores one listens for the result of the job, which ends it whatever it is, and removes the value then. What is left
behind, since its process was killed or the end was not heard, a sweep removes: what belongs to a job that has a result. One
that was tried again after it had failed has not ended by a failure that was written late (`jobs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from nalar_mq.address import Subjects
from nalar_mq.errors import BrokerError, WireError
from nalar_mq.jobs import is_tried_again, read_result, sequence_in
from nalar_mq.logs import logger
from nalar_mq.transport import Delivered, Ledger, ObjectStore, Subscription, Transport

_NAME: Final = re.compile(r"([A-Za-z0-9_-]{1,128})\.job\.[0-9a-f]{32}")
_FIRST_PAUSE_S: Final = 0.01
_LOOKS: Final = 8
_log = logger(__name__)


def name_of(job: str, digest: bytes) -> str:
    """The name of a value of a job, from its SHA-256."""
    return f"{job}.job.{digest[:16].hex()}"


def job_of(name: str) -> str:
    """The job whose value bears that name; empty if none does."""
    found = _NAME.fullmatch(name)
    return "" if found is None else found[1]


class JobValues:
    """The values of jobs that one process has stored. Everything is for the loop.

    Args:
        transport, subjects: of the process.
        open_objects: the object store that the values lie in.
        begin: runs a coroutine beside all else, for as long as the process lives.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        open_objects: Callable[[], Awaitable[ObjectStore]],
        begin: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._open_objects = open_objects
        self._begin = begin
        self._names: dict[str, set[str]] = {}
        self._watches: dict[str, Subscription] = {}
        self._ledger: Ledger | None = None

    async def put(self, name: str, data: bytes) -> None:
        """Stores a value, unless it is there, until its job ends.

        Raises:
            BrokerError: it could not be stored.
        """
        job = job_of(name)
        self._names.setdefault(job, set()).add(name)
        if job not in self._watches:
            await self._watch(job)
        await (await self._open_objects()).put(name, data)

    async def _watch(self, job: str) -> None:
        def on_result(_: Delivered) -> None:
            self._begin(self._remove_when_ended(job))

        watch = await self._transport.subscribe(self._subjects.result(job), on_result)
        if self._watches.setdefault(job, watch) is not watch:
            await watch.unsubscribe()

    async def _remove_when_ended(self, job: str) -> None:
        """Listeners hear of a result before the broker has stored it, and of one that it then refuses, too."""
        pause_s = _FIRST_PAUSE_S
        try:
            for _ in range(_LOOKS):
                if await self._has_ended(job):
                    await self._remove(job, self._names.get(job, ()))
                    return
                await asyncio.sleep(pause_s)
                pause_s *= 2
        except BrokerError as error:
            _log.debug("job_values.left_behind", job=job, error=str(error))

    async def _has_ended(self, job: str) -> bool:
        if self._ledger is None:
            self._ledger = await self._transport.ledger(self._subjects.results_ledger, [self._subjects.result("*")])
        found = await self._ledger.last(self._subjects.result(job))
        with contextlib.suppress(WireError):  # what is no result ends no job
            if found is not None and read_result(found.data).id == job:
                return not await is_tried_again(self._transport, self._subjects, job, sequence_in(found.headers))
        return False

    async def _remove(self, job: str, names: Iterable[str]) -> None:
        objects = await self._open_objects()
        for name in list(names):
            await objects.delete(name)
        self._names.pop(job, None)
        watch = self._watches.pop(job, None)
        if watch is not None:
            await watch.unsubscribe()

    @property
    def names(self) -> list[str]:
        """The values that this process has stored and not removed."""
        return [name for names in self._names.values() for name in names]

    async def sweep(self, names: Iterable[str]) -> None:
        """Removes those of the named values whose job has ended.

        Raises:
            BrokerError: the broker does not answer.
        """
        by_job: dict[str, set[str]] = {}
        for name in names:
            by_job.setdefault(job_of(name), set()).add(name)
        for job, of_job in by_job.items():
            if job and await self._has_ended(job):
                await self._remove(job, of_job)
