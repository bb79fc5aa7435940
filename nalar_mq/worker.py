"""A process that serves an app's actors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from random import Random, SystemRandom
from typing import Final

from nalar_mq.actor import ActorSpec
from nalar_mq.app import App
from nalar_mq.changes import Changes
from nalar_mq.columns import Serves
from nalar_mq.committer import Committer, LoopCommitter
from nalar_mq.config import Settings, find_state
from nalar_mq.door import Door
from nalar_mq.draining import Draining
from nalar_mq.engine_use import EngineUses, engine_uses
from nalar_mq.engines import EngineWatch
from nalar_mq.errors import BrokerError, StoreError
from nalar_mq.event_loop import cancel_all
from nalar_mq.host import HIGH_WATER, Host
from nalar_mq.intake import Intake, IntakeOptions
from nalar_mq.isolation import Children
from nalar_mq.jobs import check_durable
from nalar_mq.logs import logger
from nalar_mq.messages import ActorInfo, Drainage
from nalar_mq.migration import Migrations
from nalar_mq.process import Connect, Process
from nalar_mq.reporting import Figures, Reporter
from nalar_mq.resources import Machine
from nalar_mq.serving import Serving
from nalar_mq.stores import Stores, directory_of
from nalar_mq.threads import LoopThreads

_BACK_AFTER_LEASES: Final = 3  # for whoever had a replicated store: it is on its disk, and not on that of others
_ANSWERS_S: Final = 0.5  # for the answers to calls that have just been ended
_log = logger(__name__)


class Worker:
    """Serves the actors of `app` under `name` from `start` to `drain` or `aclose`; an async context manager.

    Args:
        app: what to serve.
        settings: broker, namespace and node.
        name: a token, unique in the namespace; the process that had it before is replaced.
        intake: how it takes jobs in.
        high_water: calls it holds before it gives back those of the lowest priority with `OverloadedError`.
        serves: the actors that it serves at first; all of the app if None.
        on_serving: is told which it serves whenever that is decided anew.
        resources: what its machine has beside what it finds there, by name.
        connect, lease_in_thread, random, clock: as for `Process`.
        is_simulated: it has no threads: synchronous code and commits run on the loop, which may be one in virtual time.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        name: str,
        intake: IntakeOptions | None = None,
        high_water: int = HIGH_WATER,
        serves: Iterable[str] | None = None,
        on_serving: Callable[[frozenset[str]], None] | None = None,
        resources: Mapping[str, float] | None = None,
        connect: Connect | None = None,
        lease_in_thread: bool = True,
        random: Random | None = None,
        clock: Callable[[], float] = time.time,
        is_simulated: bool = False,
    ) -> None:
        self._app = app
        self._infos = {spec.name: info_of(spec) for spec in app.actors.values()}
        self._served = frozenset(self._infos if serves is None else serves) & self._infos.keys()
        self._resources = {name: (0.0, amount) for name, amount in (resources or {}).items()}
        self._serving: Serving | None = None
        self._on_serving = on_serving
        self._process = Process(
            settings,
            name=name,
            role="worker",
            actors={name: info for name, info in self._infos.items() if name in self._served},
            connect=connect,
            lease_in_thread=lease_in_thread and not is_simulated,
            random=random,
            clock=clock,
        )
        self._host: Host | None = None
        self._changes: Changes | None = None
        self._intake_options = intake
        self._high_water = high_water
        self._is_simulated = is_simulated
        self._random = random or SystemRandom()
        self._clock = clock
        self._intake: Intake | None = None
        self._door: Door | None = None
        self._looking: asyncio.Task[None] | None = None
        self._draining: Draining | None = None
        self._leaving: asyncio.Task[Drainage] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process.replaced.add_done_callback(lambda _: self._end())
        self._process.declared_lost.add_done_callback(lambda _: self._end())

    @property
    def name(self) -> str:
        """Its name."""
        return self._process.name

    @property
    def process(self) -> Process:
        """Its part in the runtime."""
        return self._process

    @property
    def closed(self) -> asyncio.Future[None]:
        """Ends when the worker has closed or must close: it was drained, was replaced under its name, or others gave it up."""
        return self._ended

    @property
    def serving(self) -> frozenset[str]:
        """The actors that it serves now."""
        return self._served if self._serving is None else self._serving.actors

    @property
    def running(self) -> int:
        """Calls that are queued or run here."""
        return self._host.running if self._host is not None else 0

    async def start(self) -> None:
        """Joins the runtime; when it returns, calls arrive.

        Raises:
            BrokerError: the broker is not there, refuses us, or lacks something.
        """
        await self._process.start(self._begin_hosting)
        if self._host is not None:
            self._host.pump_all()  # calls may have come before the lease was confirmed
        try:
            await self._open_to_all()
        except BaseException:
            await self.aclose()
            raise
        _log.info("worker.started", worker=self.name, actors=sorted(self._app.actors))

    async def _begin_hosting(self) -> None:
        calls = self._process.calls
        stores = await self._open_stores()
        uses = EngineUses()
        engine_uses.set(uses)  # the code of the calls runs in copies of this context
        changes = self._changes = Changes(self.name, self._process.me.incarnation, self._process.settings.node)
        self._host = calls.host = Host(
            self._app.actors,
            calls,
            Children(self._app.path),
            name=self.name,
            may_begin=self._process.is_current,
            remember=self._process.recall.memory,
            table=self._process.table,
            changes=changes,
            stores=stores,
            clock=self._clock,
            high_water=self._high_water,
            threads=LoopThreads(asyncio.get_running_loop()) if self._is_simulated else None,
        )
        self._process.recall.finder = self._host
        if stores is not None:
            process = self._process
            migrations = Migrations(
                process.transport,
                process.subjects,
                process.table,
                process.places,
                process.me,
                stores,
                self._host,
                calls.tell,
            )
            calls.migrations = self._host.migrations = migrations
            process.on_close(migrations.aclose)
        kept = {spec.name: spec.is_replicated for spec in self._app.actors.values() if spec.is_kept}
        self._draining = calls.draining = Draining(
            self._process, self._host, stores, self._host.migrations, kept, self._begin_drain
        )
        self._host.start()
        reporter = Reporter(
            self._process.transport,
            self._process.subjects,
            self._process.me,
            changes,
            self._host.load,
            self._figures(),
            asyncio.get_running_loop().time if self._is_simulated else time.perf_counter,
            None if self._is_simulated else EngineWatch(uses).look,
        )
        serves = {spec.name: serves_of(spec) for spec in self._app.actors.values()}
        serving = self._serving = Serving(
            self._process, self._host, changes, stores, self._infos, serves, self._served, self._on_serving
        )
        self._process.on_close(reporter.aclose)
        await reporter.start()
        await self._process.enforcement.start(self._host, changes, serving.act)

    def _figures(self) -> Figures | None:
        """What its machine has and uses; in a simulation only what it was told."""
        told = self._resources
        if self._is_simulated:
            return (lambda: told) if told else None
        machine = Machine()
        return lambda: machine.look() | told

    async def _open_stores(self) -> Stores | None:
        """The stores of this worker, if it serves agents whose state is kept."""
        if not any(spec.is_kept for spec in self._app.actors.values()):
            return None
        process, loop = self._process, asyncio.get_running_loop()

        def on_lost() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(process.on_declared_lost)

        folder = find_state(process.settings.state, self._app.path.parent)
        kept = [spec.name for spec in self._app.actors.values() if spec.is_kept]
        replicated = [spec.name for spec in self._app.actors.values() if spec.is_replicated]
        if replicated and not process.settings.trust_broker:
            await check_durable(process.transport)
        committer = functools.partial(LoopCommitter if self._is_simulated else Committer, clock=self._clock)
        stores = process.stores = Stores(folder, self.name, replicated, on_lost, committer, self._random)
        process.on_close(stores.aclose)
        adopts, lease_s = process.settings.adopts_state, process.settings.lease_s
        await stores.open(process.transport, process.subjects, process.me, kept, adopts=adopts, lease_s=lease_s)
        return stores

    async def _look_for_free_stores(self, stores: Stores) -> None:
        """Opens what nobody has open, so that no session waits for a worker that will not come back."""
        process = self._process
        while True:
            await asyncio.sleep(process.settings.lease_s)
            try:
                has_more = await stores.take_free_ones(
                    process.transport, process.subjects, adopts=process.settings.adopts_state
                )
                if any(spec.is_replicated for spec in self._app.actors.values()):
                    has_more |= await stores.take_over(
                        lambda store: process.table.holder(store) is not None,
                        process.membership.is_gone,
                        _BACK_AFTER_LEASES * process.settings.lease_s,
                        await directory_of(process.transport, process.subjects),
                    )
                if has_more:
                    if self._host is not None and self._host.migrations is not None:
                        self._host.migrations.on_stores_opened()
                    await process.membership.hold(stores.ids, stores.replicated_ids)
            except (BrokerError, StoreError) as error:
                _log.warning("store.look_failed", error=str(error))

    async def _open_to_all(self) -> None:
        """Takes jobs and calls from any client of the broker."""
        process, specs = self._process, self._app.actors
        calls, transport, subjects = process.calls, process.transport, process.subjects
        self._door = Door(specs, calls, transport, subjects)
        self._intake = Intake(
            specs,
            calls,
            transport,
            subjects,
            process.table,
            process.me,
            self._random,
            remember=process.recall.memory,
            is_gone=process.membership.is_gone,
            until_current=process.until_current,
            trust_broker=process.settings.trust_broker,
            options=self._intake_options,
        )
        await asyncio.gather(self._door.start(), self._intake.start())
        if process.stores is not None:
            self._looking = asyncio.create_task(self._look_for_free_stores(process.stores))

    async def drain(self, grace_s: float) -> Drainage:
        """Takes nothing new, finishes what it has, moves the sessions it keeps to other workers, and leaves (`draining`).

        What cannot move may go on for `grace_s` and is ended then. When this returns, `closed` has ended and nobody sends
        anything any more; `aclose` is still to be called. To be drained twice is the same as once. If others give this worker
        up meanwhile, that is the end of it: what is returned is not over then.
        """
        self._begin_drain(grace_s)
        assert self._leaving is not None
        return await asyncio.shield(self._leaving)

    def _begin_drain(self, grace_s: float) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._drain(grace_s), name=f"drain-{self.name}")

    async def _drain(self, grace_s: float) -> Drainage:
        assert self._draining is not None
        if self._changes is not None:
            self._changes.set_draining()
        if self._looking is not None:
            await cancel_all([self._looking])
        given_up = self._process.declared_lost, self._process.replaced
        running = asyncio.create_task(self._draining.run(grace_s, self._intake, self._door))
        try:
            await asyncio.wait((running, *given_up), return_when=asyncio.FIRST_COMPLETED)
            return self._draining.progress() if any(lost.done() for lost in given_up) else running.result()
        finally:
            await cancel_all([running])
            self._end()

    @property
    def sessions_moved(self) -> int:
        """Sessions that have moved to other workers since it is drained."""
        return 0 if self._draining is None else self._draining.moved

    @property
    def was_drained(self) -> bool:
        """True if it has left after all it had was finished or moved."""
        leaving = self._leaving
        has_ended = leaving is not None and leaving.done() and not leaving.cancelled() and leaving.exception() is None
        return leaving is not None and has_ended and leaving.result().is_over

    async def aclose(self) -> None:
        """Ends what runs and leaves; idempotent."""
        if self._leaving is not None:
            await cancel_all([self._leaving])
        if self._draining is not None:
            await self._draining.aclose()
        door, self._door = self._door, None
        intake, self._intake = self._intake, None
        host, self._host = self._host, None
        looking, self._looking = self._looking, None
        if looking is not None:
            await cancel_all([looking])
        if intake is not None:
            await intake.aclose()
        if host is not None:
            await host.aclose()
        if door is not None:
            await door.aclose(_ANSWERS_S)
        await self._process.aclose()
        self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def __aenter__(self) -> Worker:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


def serves_of(spec: ActorSpec) -> Serves:
    """What a worker tells the controllers of an actor."""
    directives = spec.directives
    return Serves(
        spec.kind,
        spec.stateful and not spec.is_kept,
        spec.concurrency,
        directives.min_instances,
        directives.max_instances,
        directives.resources,
    )


def info_of(spec: ActorSpec) -> ActorInfo:
    """What a worker tells others of an actor."""
    return ActorInfo(
        spec.kind,
        {name: str(method.signature) for name, method in spec.methods.items()},
        spec.stateful,
        spec.doc,
        spec.directives.timeout_s,
        spec.directives.retries,
        spec.directives.priority,
        spec.directives.max_instances,
        spec.is_kept,
        spec.is_replicated,
    )
