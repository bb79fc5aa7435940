"""The controller of one node: keeps its worker processes running and ends them in order.

What happens to each of them is decided in `supervision`; here it is carried out. A worker is a child process running
`worker_process`, joined to this one by a socket pair:

    controller -> worker     one line of JSON, the `Order`; the end of the stream means that the controller is gone
    controller -> worker     one line of JSON for each `Act` that it is to do now
    worker -> controller     one line of JSON for each `Report`; an empty line, several times a lease, from one that serves

A worker that loses its controller goes on for a while where it is told to: a node that keeps a `NodeFolder` has a successor
that finds its workers there, and they find it. Each connects and says who it is; the successor takes it over without a restart.

    worker -> successor      one line of JSON, `Rejoin`
    successor -> worker      an empty line: it is taken over. From then on both go on as above.

What a worker serves is decided anew while it runs (`nalar_mq.serving`). It reports that before it tells anybody else; the next
process in its place begins with it, and so does one that a successor of this controller starts: the `NodeRecord` has it,
together with the workers that were added to the node and those that were stopped for good.

The settings go through that socket, not through the command line, since they hold secrets: the credentials of this worker, not
those that they were made of (`nalar_mq.identity`). Each child leads a session of its own, so that an interrupt at the terminal
reaches this process alone, and what a child started ends with it.

Sessions that are kept in the store of a worker wait for its successor when it dies. Where there are such sessions, one more
process is started once all workers serve, and given no order: the spare. It has imported the runtime and waits, so that it
serves in a fraction of the time that a process takes to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from nalar_mq.actions import Act
from nalar_mq.config import Settings
from nalar_mq.errors import ConfigError, WorkerStartError
from nalar_mq.identity import issued
from nalar_mq.logs import logger
from nalar_mq.permissions import Role

from .adoption import AdoptedProcess, Link, peer_of
from .crash_reports import CrashRow
from .node_folder import NodeFolder, NodeRecord, Running, start_of
from .supervision import Action, Event, Exited, Heard, Leaving, Limits, Moving, Phase, Ready, Slot, Stop, Tick, decide

WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "nalar_mq.controllers.worker_process")


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process is told when it starts.

    `place` is its number among the `workers` of the node, from 0; `capacities` is what those may reserve together, and if that
    is empty each of them serves the whole app. One that was added to them has no place: it is there for `agent`. `serves` is
    what its predecessor served, if that was decided while it ran; then it counts and nothing else.
    """

    app: str
    name: str
    settings: Settings
    parent_pid: int
    drain_timeout_s: float
    log_level: str = "info"
    node_folder: str = ""
    orphan_s: float = 0.0
    place: int = 0
    workers: int = 1
    capacities: dict[str, float] = {}
    agent: str | None = None
    serves: tuple[str, ...] | None = None


class Rejoin(msgspec.Struct, frozen=True):
    """What a worker says to the successor of its controller."""

    name: str


class Report(msgspec.Struct, frozen=True):
    """What a worker process says of itself.

    Attributes:
        failure: why it cannot serve; empty for "I serve".
        code: with which it ends then.
        keeps_state: sessions are kept in a store of its own.
        is_moving: it is drained, and has moved some more of them to other workers.
        is_leaving: it drains since before this controller was there, and will be gone.
        serves: the actors that it serves from now on.
    """

    failure: str = ""
    code: int = 0
    keeps_state: bool = False
    is_moving: bool = False
    is_leaving: bool = False
    serves: tuple[str, ...] | None = None


class _Child:
    """A process, from its start to its last exit; the spare is in no slot yet. An adopted one has no link before it rejoins."""

    def __init__(self, process: asyncio.subprocess.Process | AdoptedProcess, link: socket.socket | None) -> None:
        self.process = process
        self.link = link
        self.writer: asyncio.StreamWriter | None = None
        self.rejoined: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self.failure = ""
        self.code = 0

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None


class LocalController:
    """Supervises `workers` worker processes of one app; an async context manager that ends them all on leaving.

    A worker that ends is started again under the same name, at once or after a pause, unless it was drained. One that keeps
    ending, or whose app cannot be loaded, is given up: `failed` tells. One that stands still for a lease is killed, and
    started again.

    Args:
        app: the file of the app.
        settings: for the workers; `node` begins their names.
        workers: how many.
        limits: how patient the supervision is.
        rng: spreads restarts.
        command: what is started; the number of the socket is added.
        variables: added to the environment of the workers.
        capacities: what actors with `resources` may reserve on the node, by name: `assignment` shares them out among the
            workers. If there are none, every worker serves the whole app.
        log_level: of the workers.
        folder: where its workers outlive it for `limits.orphan_s`; None if they end with it.
    """

    def __init__(
        self,
        app: Path,
        settings: Settings,
        *,
        workers: int,
        limits: Limits | None = None,
        rng: random.Random | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        variables: Mapping[str, str] | None = None,
        capacities: Mapping[str, float] | None = None,
        log_level: str = "info",
        folder: NodeFolder | None = None,
    ) -> None:
        names = [f"{settings.node}-{number}" for number in range(1, workers + 1)]
        self._app = app
        self._settings = settings
        self._limits = limits or Limits(silence_s=settings.lease_s)
        self._rng = rng or random.Random()
        self._command = tuple(command)
        self._variables = dict(variables or {})
        self._capacities = dict(capacities or {})
        self._log_level = log_level
        self._folder = folder
        self._log = logger(__name__).bind(node=settings.node)
        self._slots = {name: Slot(name=name) for name in names}
        self._planned = workers
        self._added: dict[str, str] = {}
        self._serves: dict[str, tuple[str, ...]] = {}
        self._stopped: set[str] = set()
        self._children: dict[str, _Child] = {}
        self._spare: _Child | None = None
        self._wants_spare = False
        self._is_reduced = False
        self._is_ending = False
        self._events: asyncio.Queue[tuple[str, Event]] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._running: asyncio.Task[None] | None = None

    @property
    def node(self) -> str:
        """The name of the node."""
        return self._settings.node

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the workers."""
        return tuple(self._slots)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that run now, by name."""
        return {name: child.process.pid for name, child in self._children.items()}

    @property
    def phases(self) -> dict[str, Phase]:
        """Where each worker is in its life, by name."""
        return {name: slot.phase for name, slot in self._slots.items()}

    def crashes(self) -> dict[str, CrashRow]:
        """The workers that have ended lately though nobody wanted it, by name."""
        now = asyncio.get_running_loop().time()
        found = {name: (slot, slot.crashes_at(now, self._limits)) for name, slot in self._slots.items()}
        return {
            name: CrashRow(slot.phase.value, crashes.count, now - crashes.since, now - crashes.last, crashes.reason)
            for name, (slot, crashes) in found.items()
            if crashes is not None
        }

    async def crashed(self) -> None:
        """Returns when there are such workers."""
        await self._until(lambda: bool(self.crashes()))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begins to start the workers; idempotent."""
        if self._running is None:
            self._running = asyncio.create_task(self._supervise(), name=f"local-controller-{self._settings.node}")

    async def ready(self) -> None:
        """Returns when all workers serve.

        Raises:
            ConfigError: a worker cannot load the app.
            WorkerStartError: a worker ended again and again.
        """
        await self._until(lambda: self._failure() is not None or self._all_serve())
        self._raise_failure()

    async def failed(self) -> None:
        """Returns when the controller has been stopped; raises as `ready` does as soon as a worker is given up."""
        await self._until(lambda: self._failure() is not None or self._is_over)
        self._raise_failure()

    def stop_worker(self, name: str) -> None:
        """Lets a worker finish what it has begun and ends it; it is not started again, and the node stays."""
        self._is_reduced = True
        self._events.put_nowait((name, Stop(self._limits.drain_timeout_s + self._limits.closing_s)))

    def add_worker(self, agent: str) -> str:
        """Starts one more worker, under the name of one that was stopped if there is one; empty if there are enough.

        Where capacities are told it serves `agent`, and what reserves nothing: what others have it leaves to them.
        """
        stopped = [name for name, slot in self._slots.items() if slot.phase is Phase.STOPPED]
        if self._is_ending or (not stopped and len(self._slots) >= self._limits.most_workers):
            return ""
        name = stopped[0] if stopped else f"{self._settings.node}-{len(self._slots) + 1}"
        self._added[name] = agent
        self._serves.pop(name, None)
        self._stopped.discard(name)
        self._slots[name] = Slot(name=name, has_served=True)  # the node goes on, whatever becomes of it
        self._events.put_nowait((name, Tick()))
        return name

    def act(self, name: str, act: Act) -> bool:
        """Has the present process of a worker that serves do something once; False if there is none."""
        child, slot = self._children.get(name), self._slots.get(name)
        if child is None or child.writer is None or slot is None or slot.phase is not Phase.READY:
            return False
        child.writer.write(msgspec.json.encode(act) + b"\n")
        return True

    async def drain(self, timeout_s: float | None = None) -> None:
        """Has every worker drained (`nalar_mq.draining`), ends those that take longer than `timeout_s`, and returns then."""
        if self._running is None or self._running.done():
            return
        stop = Stop(self._limits.drain_timeout_s + self._limits.closing_s if timeout_s is None else timeout_s)
        self._is_ending = True
        for name in self._slots:
            self._events.put_nowait((name, stop))
        await asyncio.shield(self._running)

    async def aclose(self) -> None:
        """Ends every worker now; idempotent."""
        try:
            await self.drain(0.0)
        finally:
            if self._running is not None and not self._running.done():
                self._running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._running

    async def _supervise(self) -> None:
        door: asyncio.Server | None = None
        try:
            async with asyncio.TaskGroup() as watchers:
                if self._folder is not None:
                    await self._adopt(self._folder, watchers)
                    door = await self._open_door(self._folder)
                while not self._is_over or self._children:
                    name, event = await self._next_event()
                    for slot_name in (name,) if name else tuple(self._slots):
                        await self._apply(slot_name, event, watchers)
                    await self._keep_spare()
                    async with self._changed:
                        self._changed.notify_all()
        finally:
            for child in self._children.values():
                _kill_group(child.process.pid)
            await self._drop_spare()
            if door is not None:
                door.close()
            if self._folder is not None:
                self._folder.remove()
            async with self._changed:
                self._changed.notify_all()

    # Workers of a former controller of the node.

    async def _adopt(self, folder: NodeFolder, watchers: asyncio.TaskGroup) -> None:
        """Takes what lives and can stay for its own; ends what cannot before it starts anything under the same names."""
        found, record = folder.found, self._record()
        if found is not None and found.has_workers and found.serves_like(record):
            self._go_on_with(found)
        strangers: list[AdoptedProcess] = []
        adopted: dict[str, AdoptedProcess] = {}
        for name, running in found.workers.items() if found is not None else ():
            process = AdoptedProcess.find(running)
            if process is None:
                continue
            if found is None or not found.serves_like(record) or name not in self._slots:
                strangers.append(process)
            else:
                adopted[name] = process
        await asyncio.gather(*(self._end(process) for process in strangers))
        due = asyncio.get_running_loop().time() + self._limits.rejoin_s  # they find the door from now on
        for name, process in adopted.items():
            if self._slots[name].phase is Phase.STOPPED:  # it drains
                leaves = due - self._limits.rejoin_s + self._limits.drain_timeout_s + self._limits.closing_s
                self._slots[name] = Slot(name=name, phase=Phase.STOPPING, due=leaves, has_served=True)
            else:
                self._slots[name] = Slot(name=name, phase=Phase.STARTING, due=due, has_served=True)
            child = self._children[name] = _Child(process, None)
            watchers.create_task(self._watch(name, child), name=f"watch-{name}")

    def _go_on_with(self, found: NodeRecord) -> None:
        """What was decided about the workers of the node since it began holds on."""
        for name, agent in found.added.items():
            if name not in self._slots:  # else the node is to have so many workers now
                self._added[name] = agent
                self._slots[name] = Slot(name=name, has_served=True)
        self._stopped = set(found.stopped) & self._slots.keys()
        for name in self._stopped:
            self._slots[name] = Slot(name=name, phase=Phase.STOPPED, due=math.inf)
            self._is_reduced = True
        self._serves |= {name: serves for name, serves in found.serves.items() if name in self._slots}

    async def _open_door(self, folder: NodeFolder) -> asyncio.Server | None:
        """Where workers rejoin; None, and then they end with this process, if there cannot be such a thing."""
        try:
            door = await asyncio.start_unix_server(self._on_rejoin, sock=folder.listen())
        except OSError as error:
            self._log.warning("node.no_door", folder=str(folder.path), error=str(error))
            self._folder = None
            folder.remove()
            return None
        self._keep_record()
        return door

    async def _end(self, stranger: AdoptedProcess) -> None:
        self._log.info("worker.left_over", pid=stranger.pid)
        stranger.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stranger.wait(), self._limits.drain_timeout_s + self._limits.closing_s)
        _kill_group(stranger.pid)
        await stranger.wait()

    async def _on_rejoin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._limits.rejoin_s):
                rejoin = msgspec.json.decode(await reader.readline(), type=Rejoin)
        except (OSError, ValueError, TimeoutError):
            writer.close()
            return
        child = self._children.get(rejoin.name)
        if child is None or child.link is not None or child.rejoined.done() or child.process.pid != peer_of(writer):
            writer.close()
            return
        child.rejoined.set_result((reader, writer))
        self._log.info("worker.adopted", worker=rejoin.name, pid=child.process.pid)

    def _record(self) -> NodeRecord:
        settings = self._settings
        started = {name: (child.process.pid, start_of(child.process.pid)) for name, child in self._children.items()}
        return NodeRecord(
            app=str(self._app),
            urls=settings.broker.urls,
            namespace=settings.namespace,
            workers={name: Running(pid, start) for name, (pid, start) in started.items() if start is not None},
            serves=self._serves,
            added=self._added,
            stopped=tuple(sorted(self._stopped)),
        )

    def _keep_record(self) -> None:
        if self._folder is not None:
            try:
                self._folder.write(self._record())
            except OSError as error:
                self._log.warning("node.record_not_kept", error=str(error))

    async def _next_event(self) -> tuple[str, Event]:
        due = min((slot.due for slot in self._slots.values()), default=float("inf"))
        try:
            async with asyncio.timeout_at(None if due == float("inf") else due):
                return await self._events.get()
        except TimeoutError:
            return "", Tick()

    async def _apply(self, name: str, event: Event, watchers: asyncio.TaskGroup) -> None:
        now = asyncio.get_running_loop().time()
        before = self._slots[name]
        self._slots[name], action = decide(before, event, now, self._limits)
        self._is_reduced |= self._slots[name].phase is Phase.STOPPED and not self._is_ending
        self._tell(before, self._slots[name], event)
        if self._slots[name].is_unwanted and not before.is_unwanted and not self._is_ending:
            self._stopped.add(name)
            self._keep_record()
        child = self._children.get(name)
        if action is Action.START:
            await self._start_child(name, watchers)
        elif child is not None and action is Action.TERMINATE:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        elif child is not None and action is Action.KILL:
            _kill_group(child.process.pid)

    async def _start_child(self, name: str, watchers: asyncio.TaskGroup) -> None:
        try:
            child = await self._take_spare() or await self._launch()
        except OSError as error:
            self._events.put_nowait((name, Exited(1, f"it cannot be started: {error}", self._rng.random())))
            return
        self._children[name] = child
        self._keep_record()
        self._log.info("worker.launched", worker=name, pid=child.process.pid)
        watchers.create_task(self._watch(name, child), name=f"watch-{name}")

    async def _launch(self) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=os.environ | self._variables,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Child(process, ours)

    async def _keep_spare(self) -> None:
        if self._wants_spare and self._all_serve() and (self._spare is None or not self._spare.is_alive):
            await self._drop_spare()
            with contextlib.suppress(OSError):
                self._spare = await self._launch()

    async def _take_spare(self) -> _Child | None:
        if self._spare is not None and not self._spare.is_alive:
            await self._drop_spare()
        spare, self._spare = self._spare, None
        return spare

    async def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.link is not None:
                spare.link.close()
            if spare.is_alive:
                _kill_group(spare.process.pid)
            await spare.process.wait()

    async def _watch(self, name: str, child: _Child) -> None:
        try:
            await self._talk(name, child)
        finally:
            code = await child.process.wait()
            _kill_group(child.process.pid)
            del self._children[name]
            self._keep_record()
        self._events.put_nowait((name, Exited(child.code or code, child.failure, self._rng.random())))

    async def _talk(self, name: str, child: _Child) -> None:
        link = await self._linked(child)
        if link is None:
            return
        reader, writer = link
        try:
            writer.write(b"\n" if child.link is None else msgspec.json.encode(self._order(name)) + b"\n")
            child.writer = writer
            while line := await reader.readline():
                self._events.put_nowait((name, Heard()))
                if line == b"\n":
                    continue
                report = msgspec.json.decode(line, type=Report)
                if report.serves is not None:
                    self._serves[name] = report.serves
                    self._keep_record()
                    continue
                if report.is_moving:
                    self._events.put_nowait((name, Moving()))
                    continue
                if report.is_leaving:
                    self._events.put_nowait((name, Leaving(self._limits.drain_timeout_s + self._limits.closing_s)))
                    continue
                child.failure, child.code = report.failure, report.code
                self._wants_spare |= report.keeps_state
                if not report.failure:
                    self._events.put_nowait((name, Ready()))
            await child.process.wait()
        except (OSError, ValueError) as error:
            self._log.debug("worker.link_lost", worker=name, error=str(error))
        finally:
            child.writer = None
            writer.close()

    async def _linked(self, child: _Child) -> Link | None:
        """The connection to a process; None if it has ended before there was one."""
        if child.link is not None:
            return await asyncio.open_connection(sock=child.link)
        ended = asyncio.ensure_future(child.process.wait())
        try:
            await asyncio.wait((ended, child.rejoined), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        return child.rejoined.result() if child.rejoined.done() else None

    def _order(self, name: str) -> Order:
        return Order(
            app=str(self._app),
            name=name,
            settings=msgspec.structs.replace(self._settings, broker=issued(self._settings.broker, name, Role.WORKER)),
            parent_pid=os.getpid(),
            drain_timeout_s=self._limits.drain_timeout_s,
            log_level=self._log_level,
            node_folder=str(self._folder.path) if self._folder is not None else "",
            orphan_s=self._limits.orphan_s,
            place=self.names.index(name),
            workers=self._planned,
            agent=self._added.get(name),
            capacities=self._capacities,
            serves=self._serves.get(name),
        )

    def _tell(self, before: Slot, after: Slot, event: Event) -> None:
        log = self._log.bind(worker=after.name)
        if isinstance(event, Exited) and before.phase is not Phase.STOPPING and after.phase is not Phase.STOPPED:
            log.warning(
                "worker.exited", code=event.code, reason=event.reason, failures=after.failures, stood_still=before.stands_still
            )
        if after.phase is before.phase:
            return
        if after.phase is Phase.FAILED:
            log.error("worker.given_up", reason=after.reason)
        elif after.phase in (Phase.READY, Phase.STOPPED):
            log.info(f"worker.{after.phase.value}")

    def _failure(self) -> Slot | None:
        return next((slot for slot in self._slots.values() if slot.phase is Phase.FAILED), None)

    def _raise_failure(self) -> None:
        slot = self._failure()
        if slot is None:
            return
        if slot.failures == 0:
            raise ConfigError(slot.reason)
        raise WorkerStartError(f"worker {slot.name!r} is given up: {slot.reason}; its last words are in the log", slot.name)

    def _all_serve(self) -> bool:
        """True if every worker serves, of those that have not been stopped."""
        return all(slot.phase in (Phase.READY, Phase.STOPPED) for slot in self._slots.values())

    @property
    def _is_over(self) -> bool:
        """True if nothing will happen any more: workers that were stopped one by one leave a node that may get others."""
        stays = self._is_reduced and not self._is_ending and self._failure() is None
        return not stays and all(slot.is_over for slot in self._slots.values())

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
