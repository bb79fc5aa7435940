"""What the commands of `nalar` do, without the command line: `cli` reads the options, this carries them out.

up, worker    a node, or several, that serves until it is told to stop; `up` with a global controller
run           a node for the time of one call, or the node that `up` started beside the app
call, ps, trace
              a client of what runs already
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec

from nalar_mq.address import Address, Subjects, check_token, random_token
from nalar_mq.arguments import Arguments, Parameters, parameters_of, parse_arguments
from nalar_mq.broker import (
    NODE_KEY_FILE,
    RUNTIME_FOLDER,
    RuntimeFile,
    port_is_free,
    read_left_runtime_file,
    read_node_key,
    read_runtime_file,
    remove_runtime_file,
    what_died,
    write_runtime_file,
)
from nalar_mq.client import Client, Migration, connect
from nalar_mq.config import (
    DEFAULT_PORT,
    BrokerAccess,
    NamedBroker,
    Settings,
    engine_variables,
    find_broker,
    find_named_broker,
    find_namespace,
    load_settings,
    trusts_broker,
)
from nalar_mq.controllers.crash_reports import CrashRow, read_crashes, tell_crashes
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.node_acts import NodeActs
from nalar_mq.controllers.node_folder import NodeFolder, NodeRecord
from nalar_mq.controllers.reflexes import Reflexes
from nalar_mq.controllers.supervision import Limits
from nalar_mq.directives import did_you_mean
from nalar_mq.errors import (
    BrokerAuthError,
    BrokerError,
    ConfigError,
    MigrationError,
    UnknownCallError,
    UnknownClassError,
    WorkerStartError,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.exits import CallFailed, Interrupted
from nalar_mq.future import Future
from nalar_mq.gate import can_be
from nalar_mq.guarded_broker import GuardedBroker
from nalar_mq.identity import issued
from nalar_mq.installation import Finding
from nalar_mq.logs import logger
from nalar_mq.lookout import Glance
from nalar_mq.manifest import MANIFEST_NAME, RuntimeEntry, load_manifest
from nalar_mq.messages import Drainage, Member
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.permissions import Role
from nalar_mq.scratch import clear_away, scratch_folder
from nalar_mq.streams import lay_out
from nalar_mq.traces import Trace

if TYPE_CHECKING:
    from nalar_mq.app import App
    from nalar_mq.controllers.deciding import Decider
    from nalar_mq.controllers.global_controller import GlobalController

T = TypeVar("T")

DEFAULT_WORKERS: Final = 2
_NODES: Final = "nodes"
_SERVED_WITHIN_S: Final = 3.0
_RUN_DRAIN_S: Final = 2.0
_GOVERN_AGAIN_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.1
_CANCEL_AGAIN_S: Final = 5.0  # a cancellation that is lost is rare, and a clean-up that takes a while is not
_log = logger(__name__)


class BrokerChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The broker and the namespace as the command line names them; None for what it does not."""

    nats: str | None = None
    context: str | None = None
    namespace: str | None = None
    trust_broker: bool = False


class CallWish(msgspec.Struct, frozen=True, kw_only=True):
    """A call as the command line describes it."""

    name: str
    words: tuple[str, ...] = ()
    json_text: str | None = None
    session: str | None = None
    timeout_s: float | None = None
    priority: int = 0


Show = Callable[[str], None]
_Work = Callable[[], Coroutine[Any, Any, None]]
Take = Callable[[Any], None]


def app_file(path: Path) -> Path:
    """The file that APP names: a manifest, a Python file, or of a folder the manifest in it, else the app that is up there.

    Raises:
        ConfigError: it is none of these.
    """
    file = path
    if path.is_dir():
        file = path / MANIFEST_NAME
        if not file.exists() and (running := read_runtime_file(path)) is not None and running.app:
            file = path / running.app
    if not file.exists():
        raise ConfigError(f"{file}: there is no such file: APP is a nalar.toml, a folder with one, or a Python file")
    if file.suffix not in (".toml", ".py"):
        raise ConfigError(f"{file}: neither a .toml nor a .py file: APP is a nalar.toml, a folder with one, or a Python file")
    return file.resolve()


def load_quietly(app: Path) -> App:
    """Loads an app; what its modules print while they are imported goes to stderr."""
    from nalar_mq.app import load_app  # most commands load none, and it takes a tenth of their start

    with contextlib.redirect_stdout(sys.stderr):
        return load_app(app)


def _tell_unshared(app: App, capacities: Mapping[str, float], tell: Show) -> None:
    """Says which resources actors want of which nobody has said how much there is: then they are not shared out."""
    wanted: dict[str, list[str]] = {}
    for name, spec in sorted(app.actors.items()):
        for resource in spec.directives.resources:
            wanted.setdefault(resource, []).append(name)
    for resource, actors in sorted(wanted.items()):
        if resource not in capacities:
            hint = f"say how much there is with --resources {resource}=N"
            tell(f"{resource!r}, which is wanted by {', '.join(actors)}, is not shared out: {hint}")


async def interruptible(command: Coroutine[Any, Any, T]) -> T:
    """Carries out a command; SIGINT or SIGTERM unwinds it, a second one ends the process.

    Raises:
        Interrupted: it was unwound.
    """
    stop = asyncio.Event()
    with on_signals(stop.set):
        task = asyncio.ensure_future(command)
        await _first(task, stop.wait())
    if task.cancelled():
        raise Interrupted
    return task.result()


async def up(
    app: Path,
    choice: BrokerChoice,
    *,
    nodes: int,
    workers: int | None,
    capacities: Mapping[str, float],
    port: int | None,
    policy: str | None,
    controls: bool,
    log_level: str,
    show: Show,
    tell: Show,
    state: Path | None = None,
) -> None:
    """Broker, controllers and the workers of `nodes` on this machine, until SIGINT or SIGTERM.

    Args:
        app, choice: what runs, and where.
        nodes, workers: how many nodes, and workers of each.
        capacities: what actors with `resources` share on each of them; if empty, every worker serves the whole app.
        port: of the broker.
        policy: of the global controller, as `FILE.py:Name`; None for the default one.
        controls: there is a global controller.
        log_level: of the workers.
        show, tell: take the URL of the broker, and what people want to know.
    """
    running = read_runtime_file(app.parent)
    if running is not None:
        raise ConfigError(_is_up(running, app))
    loaded = load_quietly(app)  # what is wrong with it is said once, and before anything starts
    _tell_unshared(loaded, capacities, tell)
    entry = _runtime_entry(app)
    decider = await _decider(policy) if policy is not None else None
    NodeFolder.clear_away(app.parent / RUNTIME_FOLDER / _NODES)
    clear_away()
    async with AsyncExitStack() as stack:
        broker: GuardedBroker | None = None
        access = find_broker(nats=choice.nats, context=choice.context, selected_context=False)
        if access is None:
            broker = await stack.enter_async_context(_own_broker(app.parent, _namespace(choice, entry), port))
            access = broker.node_access
        elif port is not None:
            raise ConfigError("--port is for the embedded broker, but another broker is named: leave out one of the two")
        settings = Settings(
            broker=access,
            namespace=_namespace(choice, entry),
            node=_node_name(),
            trust_broker=trusts_broker(choice.trust_broker),
            adopts_state=broker is not None,
            state=_folder(state),
        )
        if broker is None:
            await _reach(settings)
        stack.callback(remove_runtime_file, app.parent)
        _announce(app, settings)
        show(access.urls[0])
        controllers = [_controller(app, node, entry, workers, log_level, capacities) for node in _nodes(settings, nodes)]
        beside: list[_Work] = [functools.partial(_obey, settings, controller) for controller in controllers]
        if controls:
            beside.append(functools.partial(govern, settings, decider, tell))
        reporters = [functools.partial(_report_crashes, settings, controller) for controller in controllers]
        await _serve(controllers, broker, tell, beside, reporters)


async def worker(
    app: Path,
    choice: BrokerChoice,
    *,
    workers: int | None,
    capacities: Mapping[str, float],
    node: str | None,
    orphan_s: float,
    log_level: str,
    show: Show,
    tell: Show,
    state: Path | None = None,
) -> None:
    """One node of a runtime whose broker is there already, until SIGINT or SIGTERM.

    Args:
        app, choice: what it serves, and where.
        workers: how many.
        capacities: as for `up`.
        node: its name; if None, that of a node of this app whose controller was killed, else a fresh one.
        orphan_s: how long its workers outlive this process if it is killed, for its successor to take them over.
        log_level: of the workers.
        show, tell: take the URL of the broker, and what people want to know.
        state: folder for the managed state of sessions; None for what the environment says.
    """
    _tell_unshared(load_quietly(app), capacities, tell)
    entry = _runtime_entry(app)
    settings = _settings(app.parent, choice, entry, node=check_token(node, "node") if node else "")
    settings = _as_node(settings, app.parent)
    folder = _node_folder(app, settings) if orphan_s > 0 else None
    settings = msgspec.structs.replace(settings, node=settings.node or (folder.name if folder is not None else _node_name()))
    try:
        settings = msgspec.structs.replace(settings, state=_folder(state))
        await _reach(settings)
    except BaseException:
        if folder is not None:
            folder.give_up()
        raise
    controller = _controller(app, settings, entry, workers, log_level, capacities, folder, orphan_s)
    show(settings.broker.urls[0])
    beside = [functools.partial(_obey, settings, controller)]
    await _serve([controller], None, tell, beside, [functools.partial(_report_crashes, settings, controller)])


async def controller(choice: BrokerChoice, *, app: Path | None, policy: str | None, tell: Show) -> None:
    """A global controller of a runtime whose broker is there, until SIGINT or SIGTERM; a standby while another one leads.

    Raises:
        PolicyLoadError: there is no such policy.
    """
    settings = _as_node(settings_of(choice, app), app.parent if app else Path.cwd())
    decider = await _decider(policy)
    await _reach(settings)
    stop = asyncio.Event()
    with on_signals(stop.set):
        await _first(stop.wait(), govern(settings, decider, tell))


async def run(
    app: Path,
    choice: BrokerChoice,
    wish: CallWish,
    *,
    workers: int | None,
    log_level: str,
    stream: bool,
    take: Take,
    take_trace: Callable[[Trace], None] | None = None,
) -> None:
    """Calls an actor of an app and hands the result, or each piece of it, to `take`, and what was called to `take_trace`.

    What `up` runs beside the app is used if it is there and no broker is named; else broker and workers live as long as
    the call.
    """
    loaded = load_quietly(app)
    arguments = _arguments_for(loaded, wish)
    entry = _runtime_entry(app)
    named = find_broker(nats=choice.nats, context=choice.context, selected_context=False)
    running = read_runtime_file(app.parent) if named is None else None
    async with AsyncExitStack() as stack:
        if running is not None:
            settings = Settings(broker=running.access, namespace=running.namespace, node=_node_name())
        else:
            namespace = _namespace(choice, entry)
            access = named or await _short_lived_broker(stack, namespace)
            ends_since_s = time.time() if named is None else None
            settings = Settings(
                broker=access,
                namespace=namespace,
                node=_node_name(),
                adopts_state=named is None,
                ends_since_s=ends_since_s,
            )
        client = await stack.enter_async_context(connect(settings=settings))
        guards: list[Coroutine[Any, Any, None]] = []
        if running is None:
            controller = _controller(app, settings, entry, workers, log_level)
            await stack.enter_async_context(controller)
            await controller.ready()
            stack.push_async_callback(controller.drain, _RUN_DRAIN_S)
            guards = [controller.failed()]
        await client.wait_for(wish.name, _SERVED_WITHIN_S)
        await _first(_call(client, wish, arguments, stream, take, take_trace), *guards)


async def call(choice: BrokerChoice, wish: CallWish, *, app: Path | None, stream: bool, take: Take) -> None:
    """Calls an actor of a runtime that is there and hands the result, or each piece of it, to `take`."""
    if app is not None:
        load_quietly(app)
    settings = settings_of(choice, app)
    async with connect(settings=settings) as client:
        await client.wait_for(wish.name, _SERVED_WITHIN_S)
        parameters = _parameters_among(await client.members(), wish.name)
        arguments = parse_arguments(wish.words, wish.json_text, parameters)
        load = functools.partial(_load_what_is_up, settings) if app is None else None
        await _call(client, wish, arguments, stream, take, load=load)


def _load_what_is_up(settings: Settings) -> bool:
    """Loads the app of this folder that is up, if that is what was called; False if it is not, or cannot be loaded here."""
    running = read_runtime_file(Path.cwd())
    if running is None or not running.app or settings.broker.urls != (running.url,):
        return False
    if Path(running.app).name != running.app or not _is_our_own(Path.cwd() / running.app):
        return False  # somebody else's code, which nobody has asked for here
    try:
        load_quietly(Path.cwd() / running.app)
    except ConfigError as error:
        _log.debug("app.not_loaded", app=running.app, error=str(error))
        return False
    return True


def _is_our_own(path: Path) -> bool:
    """False for what belongs to another user, or is not there."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


async def prepare(choice: BrokerChoice, *, app: Path | None) -> None:
    """Creates the streams and buckets of a runtime that do not exist yet; at the broker of `nalar up` all of them do."""
    folder = app.parent if app else Path.cwd()
    settings = _settings(folder, choice, RuntimeEntry(), node=_node_name())
    if _as_node(settings, folder).broker.node_key:
        return
    async with await NatsTransport.connect(settings.broker, name=settings.node) as transport:
        await lay_out(transport, Subjects(settings.namespace), settings.lease_s)


class Seen(msgspec.Struct, frozen=True):
    """A process of a runtime, and what it has in hand; None if it did not answer."""

    name: str
    member: Member
    glance: Glance | None


async def processes(
    choice: BrokerChoice, *, app: Path | None, wait_s: float
) -> tuple[Settings, list[Seen], dict[str, dict[str, CrashRow]]]:
    """The processes of a runtime that is there, how it was reached, and which workers of which nodes keep ending.

    Raises:
        WorkerStartError: no worker served within `wait_s`, if that is not 0.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + wait_s
    settings = await _settings_within(wait_s, choice, app)
    async with connect(settings=settings) as client:
        table = client.process.table
        if wait_s and not await client.process.until(lambda: bool(table.known_actors()), max(until_s - loop.time(), 0.0)):
            raise WorkerStartError(f"no worker serves anything yet, after {wait_s:g} s")
        views, crashes = await asyncio.gather(client.look(), _crashes(client))
        glances = {view.name: view.glance for view in views}
        others = [(name, member) for name, member in await client.members() if name != client.process.name]
        return settings, [Seen(name, member, glances.get(name)) for name, member in others], crashes


async def _crashes(client: Client) -> dict[str, dict[str, CrashRow]]:
    process = client.process
    try:
        return await read_crashes(process.transport, process.subjects, process.settings.lease_s)
    except BrokerError as error:  # one that was prepared before there was such a thing
        _log.debug("crashes.unreadable", error=str(error))
        return {}


async def trace(choice: BrokerChoice, wanted: str, *, app: Path | None) -> Trace:
    """The run that a call, a session or a job belongs to, of a runtime that is there."""
    settings = settings_of(choice, app)
    async with connect(settings=settings) as client:
        return await client.trace(wanted)


async def drain(
    choice: BrokerChoice, worker: str, *, grace_s: float, app: Path | None, take: Callable[[Drainage], None]
) -> Drainage:
    """Drains a worker, and hands what is left to be done to `take` now and then; returns what became of it, when it is gone.

    Raises:
        DrainError: there is no such worker, it is drained already, or it was lost before it had come to the end.
    """
    async with connect(settings=settings_of(choice, app)) as client:
        return await client.drain(worker, grace_s=grace_s, on_progress=take)


async def migrate(choice: BrokerChoice, agent: str, session: str, target: str, *, instance: str, app: Path | None) -> Migration:
    """Moves a session to another worker.

    Raises:
        MigrationError: it is where it was, or there is none.
        UnknownActorError: nobody serves the agent.
    """
    settings = settings_of(choice, app)
    async with connect(settings=settings) as client:
        await client.wait_for(agent, _SERVED_WITHIN_S)
        info, places = client.process.table.info(agent), client.process.places
        key = places.key(agent, session, instance)
        if info is not None and info.is_kept and not await places.is_known(key):
            raise MigrationError(f"there is no session {session!r} of {agent!r}: one begins with its first call")
        return await client.migrate(agent, session, to=target, instance=instance)


async def doctor(choice: BrokerChoice, *, app: Path | None, take: Callable[[Finding], None]) -> None:
    """Hands each finding about this machine and the broker that is named to `take`."""
    from nalar_mq.doctor import examine

    folder = app.parent if app else Path.cwd()
    running = read_runtime_file(folder)

    def find() -> NamedBroker | None:
        find_namespace(choice.namespace)
        return find_named_broker(nats=choice.nats, context=choice.context, runtime=running.access if running else None)

    async for finding in examine(folder, find, running):
        take(finding)


def _is_up(running: RuntimeFile, app: Path) -> str:
    at = f"at {running.url} (process {running.pid})"
    if not running.app or running.app == app.name:
        return f"this app is up already {at}: `nalar call` uses it"
    return (
        f"another app of this folder, {running.app}, is up {at}: stop it first, have `nalar worker {app.name}` serve this one "
        f"beside it, name both in one {MANIFEST_NAME}, or put this one into a folder of its own"
    )


def _folder(state: Path | None) -> str:
    """The folder for managed state as settings have it.

    Raises:
        ConfigError: it is a file.
    """
    if state is not None and state.exists() and not state.is_dir():
        raise ConfigError(f"{state} is not a folder: --state names the folder for the managed state of sessions")
    return "" if state is None else str(state.resolve())


async def _reach(settings: Settings) -> None:
    """Raises at once what every worker would fail with, again and again."""
    first, subjects = f"{settings.node}-1", Subjects(settings.namespace)
    async with await NatsTransport.connect(issued(settings.broker, first, Role.WORKER), name=settings.node) as transport:
        if not await can_be(transport, subjects, first):
            raise BrokerAuthError(
                f"these credentials do not let a process serve as {first!r}: a node of `nalar up` runs beside its app, where "
                f"{NODE_KEY_FILE} lies; for a broker of yours `nalar permissions` prints what is needed"
            )
        if await can_be(transport, subjects, random_token("anybody")):
            _log.info("identity.claimed", hint="this broker lets a process speak in any name: see `nalar permissions --help`")


def _as_node(settings: Settings, folder: Path) -> Settings:
    """With the key to make credentials of, if the broker is that of what runs beside the app."""
    running = read_runtime_file(folder)
    if running is None or not running.token or running.token != settings.broker.token:
        return settings
    return msgspec.structs.replace(settings, broker=msgspec.structs.replace(settings.broker, node_key=read_node_key(folder)))


def _node_folder(app: Path, settings: Settings) -> NodeFolder | None:
    """The folder of the node that is named, else of one that a killed controller has left, else of a fresh one."""
    nodes = app.parent / RUNTIME_FOLDER / _NODES
    if settings.node:
        return NodeFolder.claim(nodes / settings.node)
    wanted = NodeRecord(app=str(app), urls=settings.broker.urls, namespace=settings.namespace)
    return NodeFolder.left_behind(nodes, wanted) or NodeFolder.claim(nodes / _node_name())


def _nodes(settings: Settings, count: int) -> list[Settings]:
    """The settings of each of the nodes that this machine is taken for."""
    if count == 1:
        return [settings]
    return [msgspec.structs.replace(settings, node=f"{settings.node}-{number}") for number in range(1, count + 1)]


async def _decider(policy: str | None) -> Decider:
    from nalar_mq.controllers.deciding import decider_of

    return await decider_of(policy)


async def govern(settings: Settings, decider: Decider | None, tell: Show) -> None:
    """Runs a global controller for as long as it is let, through losses of the broker; tells when the lead changes."""
    from nalar_mq.controllers.global_controller import GlobalController

    decider = decider or await _decider(None)
    name = random_token(f"{settings.node[:96]}-controller")

    async def lead(transport: NatsTransport, subjects: Subjects) -> None:
        me = Address(name, 1)
        async with GlobalController(transport, subjects, me, decider, lease_s=settings.lease_s) as controller:
            await _tell_lead(controller, name, tell)

    await _connected_again_and_again(settings, name, lead)


async def _obey(settings: Settings, controller: LocalController) -> None:
    """Has a node do what is decided about its workers, and decide by itself while nobody else does; until it is cancelled."""

    subjects = Subjects(settings.namespace)
    acts = NodeActs(subjects, controller.node, controller, lease_s=settings.lease_s)
    reflexes = Reflexes(subjects, controller.node, controller, lease_s=settings.lease_s)

    async def obey(transport: NatsTransport, _subjects: Subjects) -> None:
        await _all((acts.run(transport), reflexes.run(transport)))

    await _connected_again_and_again(settings, random_token(f"{controller.node[:96]}-node"), obey)


async def _report_crashes(settings: Settings, controller: LocalController) -> NoReturn:
    """Tells everybody of workers of a node that keep ending, with a connection only while there are any."""
    name = random_token(f"{controller.node[:96]}-crashes")
    while True:
        await controller.crashed()
        try:
            async with await _connected_as(settings, name) as transport:
                await tell_crashes(transport, Subjects(settings.namespace), controller.node, controller, settings.lease_s)
        except BrokerError as error:
            _log.debug("crashes.not_told", name=name, error=str(error))
            await asyncio.sleep(_GOVERN_AGAIN_S)


async def _connected_again_and_again(
    settings: Settings, name: str, work: Callable[[NatsTransport, Subjects], Awaitable[None]]
) -> NoReturn:
    """Does the work with a connection of its own; with another one when the broker did not answer."""
    subjects = Subjects(settings.namespace)
    while True:
        try:
            async with await _connected_as(settings, name) as transport:
                await work(transport, subjects)
        except BrokerError as error:
            _log.warning("controller.no_broker", name=name, error=str(error))
        await asyncio.sleep(_GOVERN_AGAIN_S)


async def _connected_as(settings: Settings, name: str) -> NatsTransport:
    """A connection of a controller of that name."""
    access = issued(settings.broker, name, Role.CONTROLLER)
    return await NatsTransport.connect(access, name=name, inbox=Subjects(settings.namespace).inbox(name))


async def _tell_lead(controller: GlobalController, name: str, tell: Show) -> NoReturn:
    told = ""
    while True:
        await controller.until_round(controller.rounds + 1)
        if controller.leader and controller.leader != told:
            told = controller.leader
            tell(
                f"controller {name} " + ("leads" if told == name else f"stands by: {told} leads, and decides by its own policy")
            )


async def _serve(
    controllers: Sequence[LocalController],
    broker: GuardedBroker | None,
    tell: Show,
    beside: Sequence[_Work] = (),
    always: Sequence[_Work] = (),
) -> None:
    """Runs nodes until SIGINT or SIGTERM, what goes on `beside` them once their workers serve, and what always does."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    with on_signals(lambda: (hurry if stop.is_set() else stop).set()):
        async with _started(controllers):
            await _first(stop.wait(), _watch(controllers, tell, beside), *_guards(broker), *(work() for work in always))
            if stop.is_set():
                tell("draining: what has begun is finished; a second signal ends it at once")
                await _first(hurry.wait(), _all(controller.drain() for controller in controllers))


@contextlib.asynccontextmanager
async def _started(controllers: Sequence[LocalController]) -> AsyncGenerator[None]:
    try:
        for controller in controllers:
            await controller.start()
        yield
    finally:
        await _all(controller.aclose() for controller in controllers)


async def _watch(controllers: Sequence[LocalController], tell: Show, beside: Sequence[_Work]) -> None:
    await _all(controller.ready() for controller in controllers)
    workers = sum(len(controller.names) for controller in controllers)
    tell(f"{workers} workers are ready" + (f" on {len(controllers)} nodes" if len(controllers) > 1 else ""))
    await _first(_all(controller.failed() for controller in controllers), *(work() for work in beside))


def _guards(broker: GuardedBroker | None) -> list[Coroutine[Any, Any, None]]:
    return [] if broker is None else [_broker_failed(broker)]


async def _broker_failed(broker: GuardedBroker) -> None:
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    broker.server.on_failure(failed.set_exception)
    await failed


@contextlib.contextmanager
def on_signals(handler: Callable[[], object]) -> Generator[None]:
    """Calls `handler` for SIGINT and SIGTERM, on the event loop, in place of what they did before."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _first(*things: Awaitable[Any]) -> None:
    """Returns or raises as the first of them that ends; the others are cancelled and have ended by then."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in tasks if task.done()]
    finally:
        await cancel_all(tasks, again_s=_CANCEL_AGAIN_S)
    for task in ended:
        task.result()


async def _all(things: Iterable[Awaitable[Any]]) -> None:
    """Returns when all of them have, or raises as the first that fails; the others are cancelled and have ended by then."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks, again_s=_CANCEL_AGAIN_S)


async def _call(
    client: Client,
    wish: CallWish,
    arguments: Arguments,
    stream: bool,
    take: Take,
    take_trace: Callable[[Trace], None] | None = None,
    load: Callable[[], bool] | None = None,
) -> None:
    """Calls, and hands over what comes; if that is of a class which is not there, it is read again after `load`."""
    args, kwargs = arguments
    caller = client.options(session=wish.session, priority=wish.priority)
    if wish.timeout_s is not None:
        caller = caller.options(timeout_s=wish.timeout_s)
    future: Future[Any] | None = None
    try:
        future = caller.call(wish.name, *args, **kwargs)
        taken = 0
        if stream:
            async for piece in future.stream():
                take(piece)
                taken += 1
        try:
            value = await future
        except UnknownClassError as error:
            if error.__cause__ is not None or load is None or not load():
                raise
            value = await future
        if not stream or (not taken and value not in (None, [])):  # not a generator after all
            take(value)
    except (BrokerError, BrokenPipeError):
        raise
    except Exception as error:
        raise CallFailed(error, wish.name) from error
    finally:
        if take_trace is not None and future is not None and future.available():
            with contextlib.suppress(UnknownCallError):  # it never came to a worker
                take_trace(await client.trace(future))


async def _short_lived_broker(stack: AsyncExitStack, namespace: str) -> BrokerAccess:
    folder = stack.enter_context(scratch_folder())
    broker = await stack.enter_async_context(GuardedBroker(folder, namespace=namespace))
    return broker.node_access


def _runtime_entry(app: Path) -> RuntimeEntry:
    return load_manifest(app).runtime if app.suffix == ".toml" else RuntimeEntry()


def _controller(
    app: Path,
    settings: Settings,
    entry: RuntimeEntry,
    workers: int | None,
    log_level: str,
    capacities: Mapping[str, float] | None = None,
    folder: NodeFolder | None = None,
    orphan_s: float = 0.0,
) -> LocalController:
    return LocalController(
        app,
        settings,
        workers=workers or entry.workers or DEFAULT_WORKERS,
        variables=engine_variables(entry.engine_url, entry.engine_model),
        capacities=capacities,
        log_level=log_level,
        limits=Limits(silence_s=settings.lease_s, orphan_s=orphan_s),
        folder=folder,
    )


def _own_broker(folder: Path, namespace: str, port: int | None) -> GuardedBroker:
    """With port and secrets of one that was killed here, so that nodes and clients find it again; else with new ones."""
    data, former = folder / RUNTIME_FOLDER / "broker", read_left_runtime_file(folder)
    key, needs_port = read_node_key(folder), port is not None
    if former is None or former.namespace != namespace or not former.token or not key:
        return GuardedBroker(data, namespace=namespace, port=_port(port), needs_port=needs_port)
    _log.info("broker.goes_on", url=former.url)
    return GuardedBroker(
        data,
        namespace=namespace,
        port=_port(port, former.url),
        needs_port=needs_port,
        token=former.token,
        node_key=key,
    )


def _port(port: int | None, former_url: str = "") -> int | None:
    if port is not None:
        return port
    former = former_url.rpartition(":")[2]
    wanted = [int(former)] if former.isdecimal() and int(former) < 65536 else []
    return next((port for port in (*wanted, DEFAULT_PORT) if port_is_free("127.0.0.1", port)), None)


def _namespace(choice: BrokerChoice, entry: RuntimeEntry) -> str:
    return find_namespace(choice.namespace, entry.namespace)


def settings_of(choice: BrokerChoice, app: Path | None) -> Settings:
    """Of a client of the runtime that is named, or runs beside the app, or in this folder.

    Raises:
        ConfigError: no broker is named anywhere.
    """
    return _settings(_folder_of(app), choice, RuntimeEntry(), node=_node_name())


async def _settings_within(wait_s: float, choice: BrokerChoice, app: Path | None) -> Settings:
    """As `settings_of`; waits for so long for what is to come up."""
    is_named = find_broker(nats=choice.nats, context=choice.context) is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while not is_named:
                await asyncio.sleep(_LOOK_AGAIN_S)
                is_named = read_runtime_file(_folder_of(app)) is not None
    return settings_of(choice, app)


def _folder_of(app: Path | None) -> Path:
    return app.parent if app else Path.cwd()


def _settings(folder: Path, choice: BrokerChoice, entry: RuntimeEntry, *, node: str) -> Settings:
    running = read_runtime_file(folder)
    return load_settings(
        nats=choice.nats,
        context=choice.context,
        runtime=running.access if running else None,
        namespace=choice.namespace,
        trust_broker=choice.trust_broker,
        app_namespace=_known_namespace(running, entry),
        node=node,
        died="" if running else what_died(folder),
    )


def _known_namespace(running: RuntimeFile | None, entry: RuntimeEntry) -> str:
    return entry.namespace or (running.namespace if running else "")


def _announce(app: Path, settings: Settings) -> None:
    access = settings.broker
    url, token, node_key, data_dir = access.urls[0], access.token, access.node_key, access.data_dir
    if access == BrokerAccess(urls=(url,), token=token, node_key=node_key, data_dir=data_dir):
        write_runtime_file(
            app.parent,
            url=url,
            token=token,
            namespace=settings.namespace,
            node_key=node_key,
            app=app.name,
            data_dir=data_dir,
        )


def _node_name() -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0])[:64] or "node"
    return random_token(host)


def _arguments_for(app: App, wish: CallWish) -> Arguments:
    actor, _, method = wish.name.partition(".")
    spec = app.actors.get(actor)
    if spec is None:
        raise ConfigError(f"the app has no actor {actor!r}: {did_you_mean(actor, tuple(app.actors))}")
    if method not in spec.methods:
        known = tuple(f"{actor}.{name}" if name else actor for name in spec.methods)
        raise ConfigError(f"{wish.name!r} cannot be called: {did_you_mean(wish.name, known)}")
    found = spec.methods[method]
    args, kwargs = parse_arguments(wish.words, wish.json_text, parameters_of(str(found.signature)))
    found.check_arguments(wish.name, tuple(args), kwargs)
    return args, kwargs


def _parameters_among(processes: list[tuple[str, Member]], name: str) -> Parameters:
    actor, _, method = name.partition(".")
    for _, member in processes:
        info = member.actors.get(actor)
        if info is not None and method in info.methods:
            return parameters_of(info.methods[method])
    return Parameters()
