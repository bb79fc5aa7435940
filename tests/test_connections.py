"""Connections that go bad without an end: who is behind one finds out, comes back, and nothing is lost meanwhile."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until

from nalar_mq import errors
from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.intake import IntakeOptions
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Transport
from nalar_mq.worker import Worker
from tests.proxies import Fault, Proxy
from tests.test_nats_transport import plain_server
from tests.witness import Witness, result_of

APP = Path(__file__).parent / "apps" / "witness.py"
WORKER = Path(__file__).parent / "apps" / "one_worker.py"
PATIENCE_S = 60.0
QUICK = IntakeOptions(ack_wait_s=1.5, look_again_s=0.2)
FAULTS: list[Fault] = ["swallow up", "swallow down", "stall"]

Connect = Callable[[str], Awaitable[Transport]]


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Witness:
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    return Witness(tmp_path / "witness")


@pytest.fixture
def app() -> App:
    return load_app(APP)


async def result(client: Client, key: str, n: int) -> Any:
    """What a job returns; submitted again under its id until somebody says that it is accepted."""
    while True:
        try:
            handle = await client.submit("steps", key, n, 0.1, job_id=key)
        except errors.BrokerError:
            continue
        return await handle.result(PATIENCE_S)


class Pair:
    """A worker and a client, one of them behind a proxy."""

    def __init__(self, worker: Worker, client: Client, proxy: Proxy, behind: str) -> None:
        self.worker = worker
        self.client = client
        self.proxy = proxy
        process = worker.process if behind == "worker" else client.process
        self.states: list[bool] = []
        self.noticed_at = 0.0
        process.transport.on_connection(self._on_connection)

    def _on_connection(self, is_connected: bool) -> None:
        self.states.append(is_connected)
        self.noticed_at = self.noticed_at or asyncio.get_running_loop().time()

    @classmethod
    @asynccontextmanager
    async def made(cls, app: App, settings: Settings, behind: str, **options: Any) -> AsyncIterator[Pair]:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(Proxy(settings.broker))

            async def through(name: str) -> Transport:
                return await NatsTransport.connect(proxy.access, name=name, **options)

            async def straight(name: str) -> Transport:
                return await NatsTransport.connect(settings.broker, name=name, **options)

            ways: tuple[Connect, Connect] = (through, straight) if behind == "worker" else (straight, through)
            worker = await stack.enter_async_context(Worker(app, settings, name="w", connect=ways[0], intake=QUICK))
            client = await stack.enter_async_context(connect(settings=settings, connect=ways[1]))
            await client.wait_for("square")
            yield cls(worker, client, proxy, behind)

    async def go_through(self, fault: Fault, witness: Witness, prefix: str) -> float:
        """Calls and jobs under way, and made, while the connection is bad; how long it took to notice."""
        once = self.client.options(retries=0)
        calls = [once.call("square", f"{prefix}-c{n}", n, 0.3) for n in range(200)]
        jobs = [asyncio.ensure_future(result(self.client, f"{prefix}-j{n}", n)) for n in range(10)]
        await until(lambda: witness.began(prefix) >= 205)
        self.proxy.harm(fault)
        harmed_at = asyncio.get_running_loop().time()
        calls += [once.call("square", f"{prefix}-c{n}", n, 0.0) for n in range(200, 300)]
        jobs += [asyncio.ensure_future(result(self.client, f"{prefix}-j{n}", n)) for n in range(10, 15)]
        async with asyncio.timeout(PATIENCE_S):
            assert await asyncio.gather(*calls) == [n * n for n in range(300)]
            assert await asyncio.gather(*jobs) == [result_of(n) for n in range(15)]
        assert self.states == [False, True]
        assert not self.worker.closed.done()
        assert [key for key in witness.repeated() if key.startswith(prefix)] == []
        return self.noticed_at - harmed_at


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("behind", ["worker", "client"])
async def test_a_bad_connection_is_found_out_and_nothing_is_lost(
    behind: str, fault: Fault, app: App, broker_access: BrokerAccess, namespace: str, witness: Witness
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here")
    async with Pair.made(app, settings, behind, ping_interval_s=0.6, request_timeout_s=3.0) as pair:
        await pair.go_through(fault, witness, "x")


@pytest.mark.slow
async def test_bad_connections_are_found_out_within_ten_seconds(
    app: App, broker_access: BrokerAccess, namespace: str, witness: Witness, capfd: pytest.CaptureFixture[str]
) -> None:
    async def noticed_after_s(behind: str, fault: Fault) -> float:
        name = f"{behind}-{fault.replace(' ', '-')}"
        settings = Settings(broker=broker_access, namespace=f"{namespace}-{name}", node="here")
        async with Pair.made(app, settings, behind) as pair:
            return await pair.go_through(fault, witness, name)

    cases = [(behind, fault) for behind in ("worker", "client") for fault in FAULTS]
    found = await asyncio.gather(*(noticed_after_s(*case) for case in cases))
    with capfd.disabled():
        for case, seconds in zip(cases, found, strict=True):
            print(f"\n{case[1]} at the {case[0]}: noticed after {seconds:.1f} s", end="")
    assert max(found) < 10


async def test_a_slow_consumer_is_cut_off_by_its_broker_and_nothing_is_lost(
    namespace: str, witness: Witness, tmp_path: Path
) -> None:
    """The worker's loop stands still while more comes for it than the broker keeps for anybody."""
    log = tmp_path / "server.log"
    config = f'jetstream {{ store_dir: "{tmp_path}" }}\nmax_pending: 1MB\nlog_file: "{log}"'
    async with plain_server(tmp_path, config) as place:
        settings = Settings(broker=BrokerAccess(urls=(f"nats://{place}",)), namespace=namespace, node="here", trust_broker=True)
        command = (sys.executable, WORKER, msgspec.json.encode(settings).decode(), str(APP))
        worker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert worker.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                assert await worker.stdout.readline() == b"ready\n"
            async with connect(settings=settings) as client:
                await client.wait_for("hog", PATIENCE_S)
                once = client.options(retries=0)
                jobs = [asyncio.ensure_future(result(client, f"j{n}", n)) for n in range(10)]
                await until(lambda: witness.began("j") >= 10)
                hog = once.call("hog", "hog", 3.0)
                await until(lambda: witness.began("hog"))
                calls = [once.call("weigh", f"c{n}", b"x" * 100_000) for n in range(400)]
                async with asyncio.timeout(PATIENCE_S):
                    assert await asyncio.gather(*calls) == [100_000] * 400
                    assert await asyncio.gather(*jobs) == [result_of(n) for n in range(10)]
                    assert await hog == "done"
            assert "Slow Consumer" in log.read_text()
            assert witness.repeated() == {}
        finally:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()


def test_a_program_whose_broker_is_not_there_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("NATS_URL", "NALAR_NATS_URL", "NATS_CONTEXT", "NALAR_NATS_CONTEXT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(errors.ConfigError, match=r"nalar up APP.*connect\(url\).*NATS_URL") as unknown:
        connect()
    assert "--" not in str(unknown.value), "a program has no flags of the command line"
    with (
        pytest.raises(errors.BrokerUnreachableError, match=r"127\.0\.0\.1:1.*`connect\(url\)` or NATS_URL") as away,
        connect("nats://127.0.0.1:1"),
    ):
        pass
    shown = traceback.format_exception(away.value)
    assert "nats_" not in "".join(shown) and "The above exception" not in "".join(shown)
