"""What a worker process runs: takes its order from the local controller, serves, and ends with it.

Started as `python -m nalar_mq.controllers.worker_process FD`, where FD is its end of the socket pair that
`local_controller` describes. SIGTERM drains, as `nalar drain` does; a second one ends the process at once. When the
controller is gone the process ends at once, too: on Linux the kernel sees to it, elsewhere the end of the stream does. Where
the node has a folder it goes on, and looks there for a successor of the controller; if none has come within `orphan_s`, it
drains. A successor that comes while it drains, for that or since the former controller ended, is told so; it starts another one
in its place when it has left, unless it is to have none.

A broker that is busy or restarts may take longer to answer than a request waits. While a worker has not joined yet it begins
anew then, after pauses that grow to some seconds, as long as half a minute has not passed; what waiting does not heal, such
as credentials that are refused, ends the process at once.

All that it needs in any case is imported before it takes its order, which a spare waits for. That it lives is told by a
thread of its own: code that blocks the event loop, for however long, does not stand still.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Final, cast

import msgspec

from nalar_mq import event_loop
from nalar_mq.actions import Act
from nalar_mq.app import load_app
from nalar_mq.errors import BrokerError, BrokerTimeoutError, BrokerUnreachableError, ConfigError, StoreError
from nalar_mq.event_loop import cancel_all
from nalar_mq.exits import EXIT_BROKER, EXIT_CONFIG, EXIT_DRAINED, EXIT_LOST, EXIT_REPLACED
from nalar_mq.logs import Level, configure_logs, logger
from nalar_mq.worker import Worker, serves_of

from .assignment import added, assigned
from .local_controller import Order, Rejoin, Report
from .node_folder import connect_to

_PR_SET_PDEATHSIG: Final = 1
_MAX_ORDER_BYTES: Final = 1 << 20
_BEATS_OF_A_LEASE: Final = 6
_LOOK_EVERY_S: Final = 0.2
_TELL_MOVES_S: Final = 1.0
_PATIENCE_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_IMPORTED_LATER: Final = ("nalar_mq.nats_transport",)  # by what serves, when it is first needed
_acts: Final = msgspec.json.Decoder(Act)
_log = logger(__name__)


def main() -> None:
    """Serves until told to stop; the exit code is 0, or says why not, with a code of `exits`."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    for module in _IMPORTED_LATER:
        import_module(module)
    order = _read_order(link)
    if not order.node_folder:
        _die_with(order.parent_pid)
    configure_logs(cast(Level, order.log_level))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what users print is seen at once, and not lost with the process
    try:
        if event_loop.run(_serve(order, link)):
            _report(link, Report("it was drained", EXIT_DRAINED))
            sys.exit(EXIT_DRAINED)
    except (ConfigError, StoreError) as error:
        _report(link, Report(str(error), EXIT_CONFIG))
        sys.exit(EXIT_CONFIG)
    except BrokerError as error:
        _report(link, Report(str(error), EXIT_BROKER))
        sys.exit(EXIT_BROKER)
    except _Replaced:
        reason = f"another process serves as {order.name!r}: give each node a name of its own by --node"
        _report(link, Report(reason, EXIT_REPLACED))
        sys.exit(EXIT_REPLACED)
    except _DeclaredLost:
        _report(link, Report("it stood still for longer than its lease, and the others have given it up", EXIT_LOST))
        sys.exit(EXIT_LOST)


class _Replaced(Exception):
    """Another process has taken the name of this worker."""


class _DeclaredLost(Exception):
    """Others have given this incarnation up; a successor under the same name may serve."""


async def _serve(order: Order, link: socket.socket) -> bool:
    """Returns when the worker has ended at somebody's wish; True if it was drained."""
    loop = asyncio.get_running_loop()
    draining, stopping = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stopping if draining.is_set() else draining).set()

    loop.add_signal_handler(signal.SIGTERM, on_signal)
    loop.add_signal_handler(signal.SIGINT, on_signal)
    link.setblocking(False)
    app = load_app(Path(order.app))
    serves: Iterable[str] | None = order.serves
    if serves is None and order.capacities:
        actors = {name: serves_of(spec) for name, spec in app.actors.items()}
        if order.agent is None:
            serves = assigned(actors, order.place, order.workers, order.capacities)
        else:
            serves = added(actors, order.agent, order.capacities)
    standing = _Standing(order.serves)

    def on_serving(actors: frozenset[str]) -> None:
        standing.serves = tuple(sorted(actors))
        _report(link, Report(serves=standing.serves))

    def make() -> Worker:
        return Worker(app, order.settings, name=order.name, serves=serves, on_serving=on_serving, resources=order.capacities)

    worker = await begin(make, draining)
    tasks: list[asyncio.Task[None]] = []
    try:
        period_s = order.settings.lease_s / _BEATS_OF_A_LEASE
        beats = {"goes_on": bool(order.node_folder)}
        threading.Thread(target=_beat, args=(link, period_s), kwargs=beats, daemon=True).start()
        _report(link, Report(keeps_state=worker.process.stores is not None))
        drained = loop.create_task(_drain(worker, draining, order.drain_timeout_s))
        ends = (
            _attached(
                order,
                link,
                Report(keeps_state=worker.process.stores is not None),
                draining,
                standing,
                worker.process.enforcement.do,
            ),
            _closed(worker),
            _set(stopping),
            _tell_moves(worker, link),
        )
        tasks = [drained, *map(loop.create_task, ends)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if drained.done():
            drained.result()
        if worker.process.replaced.done():
            raise _Replaced
        if worker.process.declared_lost.done():
            raise _DeclaredLost
        if standing.is_abandoned:
            _report(link, Report("it has drained, as began before this controller was there"))
            return False
        return worker.was_drained
    finally:
        await cancel_all(tasks)
        await worker.aclose()


async def begin(make: Callable[[], Worker], unwanted: asyncio.Event) -> Worker:
    """A worker that has joined: the first that does, of those that are made while the broker is away or slow to answer.

    Raises:
        BrokerError: the broker refuses it, or does not answer for too long, or the worker is not wanted any more.
    """
    loop = asyncio.get_running_loop()
    until_s, pause_s = loop.time() + _PATIENCE_S, _FIRST_PAUSE_S
    while True:
        worker = make()
        try:
            await worker.start()
        except BaseException as error:
            await worker.aclose()
            is_late = loop.time() + pause_s > until_s
            if is_late or not isinstance(error, BrokerTimeoutError | BrokerUnreachableError) or await _comes(unwanted, pause_s):
                raise
            _log.warning("worker.begins_anew", worker=worker.name, reason=str(error))
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
        else:
            return worker


async def _comes(event: asyncio.Event, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
    return event.is_set()


class _Standing:
    """How a worker stands with its controller.

    Attributes:
        serves: the actors that it serves, if that was decided while it ran, or while its predecessor did.
        is_abandoned: it drains, for want of a controller or at the wish of a former one: the present one may want another.
    """

    def __init__(self, serves: tuple[str, ...] | None) -> None:
        self.serves = serves
        self.is_abandoned = False


async def _attached(
    order: Order,
    link: socket.socket,
    report: Report,
    draining: asyncio.Event,
    standing: _Standing,
    do: Callable[[Act], None],
) -> None:
    """Does what the controller wants, and returns when that is gone.

    Where workers go on without, it looks for a successor; if none comes in time, it has this one drained.
    """
    while True:
        with contextlib.suppress(OSError):
            await _obey(link, do)
        if not order.node_folder:
            return
        _log.warning("worker.orphaned", worker=order.name, for_s=order.orphan_s)
        try:
            async with asyncio.timeout(order.orphan_s):
                await _rejoin(order, link)
        except TimeoutError:
            draining.set()
            await _rejoin(order, link)
        standing.is_abandoned = draining.is_set()
        _log.info("worker.rejoined", worker=order.name)
        if standing.serves is not None:
            _report(link, Report(serves=standing.serves))
        _report(link, Report(is_leaving=True) if standing.is_abandoned else report)


async def _obey(link: socket.socket, do: Callable[[Act], None]) -> None:
    """Does what the controller says until it is gone; what makes no sense is left out."""
    loop, rest = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(link, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in filter(None, lines):
            try:
                do(_acts.decode(line))
            except msgspec.DecodeError as error:
                _log.warning("act.unreadable", error=str(error))


async def _rejoin(order: Order, link: socket.socket) -> None:
    """Looks for a successor of the controller until one takes this worker over; `link` leads to it then."""
    loop = asyncio.get_running_loop()
    words = msgspec.json.encode(Rejoin(order.name)) + b"\n"
    while True:
        with contextlib.suppress(OSError), connect_to(Path(order.node_folder)) as found:
            await loop.sock_sendall(found, words)
            if await loop.sock_recv(found, 1):
                os.dup2(found.fileno(), link.fileno(), inheritable=False)
                return
        await asyncio.sleep(_LOOK_EVERY_S)


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def _drain(worker: Worker, wanted: asyncio.Event, grace_s: float) -> None:
    await wanted.wait()
    await worker.drain(grace_s)


async def _tell_moves(worker: Worker, link: socket.socket) -> None:
    """Tells the controller that sessions move: a worker is not ended for being slow as long as they do."""
    told = 0
    while True:
        await asyncio.sleep(_TELL_MOVES_S)
        if worker.sessions_moved > told:
            told = worker.sessions_moved
            _report(link, Report(is_moving=True))


async def _closed(worker: Worker) -> None:
    await worker.closed


def _read_order(link: socket.socket) -> Order:
    data = b""
    while not data.endswith(b"\n"):
        piece = link.recv(65536)
        if not piece or len(data) > _MAX_ORDER_BYTES:
            sys.exit(1)
        data += piece
    return msgspec.json.decode(data, type=Order)


def _report(link: socket.socket, report: Report) -> None:
    with contextlib.suppress(OSError):
        link.send(msgspec.json.encode(report) + b"\n")


def _beat(link: socket.socket, period_s: float, *, goes_on: bool) -> None:
    while True:
        time.sleep(period_s)
        try:
            link.send(b"\n")
        except BlockingIOError:
            pass  # nobody has read for long: the controller stands still
        except OSError:
            if not goes_on:
                return


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


if __name__ == "__main__":
    main()
