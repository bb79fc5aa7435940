"""Values that do not fit into a message: calls that return one or take one, and bare copies through the broker beside them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO
from statistics import median
from typing import NamedTuple

import nalar_app
import nats
import work
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore

from nalar_mq.config import BrokerAccess

_COPIES = "copies"


class _Operation(NamedTuple):
    run: Callable[[], Awaitable[object]]
    wanted: object


async def near(access: BrokerAccess, namespace: str) -> None:
    """Between processes that share a folder."""
    async with _jetstream(access) as jetstream:
        for mb in work.LARGE_MB:
            work.phase(f"large_{mb}mb")
            await _check_way(jetstream, namespace, mb, through_broker=False)
            await _measure(mb, {"return": _return(mb), "take": _take(mb)})


async def through_broker(access: BrokerAccess, namespace: str) -> None:
    """Between processes that share none; in turns with them nats-py puts a value into the same broker and gets it out again."""
    async with _jetstream(access) as jetstream:
        copies = await jetstream.create_object_store(_COPIES)
        for mb in work.LARGE_MB:
            work.phase(f"large_broker_{mb}mb")
            await _check_way(jetstream, namespace, mb, through_broker=True)
            await _measure(mb, {"return_broker": _return(mb), "take_broker": _take(mb), "copy": _copy(copies, mb)})


@contextlib.asynccontextmanager
async def _jetstream(access: BrokerAccess) -> AsyncIterator[JetStreamContext]:
    connection = await nats.connect(list(access.urls), token=access.token or None)
    try:
        yield connection.jetstream(timeout=60.0)
    finally:
        await connection.close()


async def _check_way(jetstream: JetStreamContext, namespace: str, mb: int, *, through_broker: bool) -> None:
    """Makes sure that a value goes the way that is measured."""
    future = nalar_app.Echo.give.options(session="large")(mb)
    await future
    try:
        kept = (await jetstream.stream_info(f"OBJ_{namespace}-claims")).state.messages > 0
    except NotFoundError:
        kept = False
    work.expect(kept, through_broker)


def _return(mb: int) -> _Operation:
    give = nalar_app.Echo.give.options(session="large")
    return _Operation(lambda: give(mb), work.blob(mb))


def _take(mb: int) -> _Operation:
    take = nalar_app.Echo.take.options(session="large")
    blob = work.blob(mb)
    return _Operation(lambda: take(blob), len(blob))


def _copy(copies: ObjectStore, mb: int) -> _Operation:
    blob = work.blob(mb)

    async def put_and_get() -> bytes:
        found = BytesIO()
        await copies.put(_COPIES, blob)
        await copies.get(_COPIES, writeinto=found)
        return found.getvalue()

    return _Operation(put_and_get, blob)


async def _measure(mb: int, operations: dict[str, _Operation]) -> None:
    """Medians of the operations, which take turns; the first turn only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(work.LARGE_CALLS + 1):
        for name, (run, wanted) in operations.items():
            begun = time.perf_counter()
            found = await run()
            seconds[name].append(time.perf_counter() - begun)
            if found != wanted:
                raise SystemExit(f"wrong answer: {name} of {mb} MB")
            del found
    for name, (_, *later) in seconds.items():
        work.figure(f"{name}_{mb}mb_ms", round(median(later) * 1e3, 2))
