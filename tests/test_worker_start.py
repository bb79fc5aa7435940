"""A worker process whose broker is slow to answer when it begins: it begins anew, for some time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from proxies import Proxy
from waiting import until

from nalar_mq.app import load_app
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers import worker_process
from nalar_mq.errors import BrokerAuthError, BrokerTimeoutError, BrokerUnreachableError
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Transport
from nalar_mq.worker import Worker

APP = load_app(Path(__file__).parent / "apps" / "jobs_app.py")
JETSTREAM = b"io.nats.jetstream.api"  # in all answers of the broker about streams


@pytest.fixture
async def proxy(broker_access: BrokerAccess) -> AsyncIterator[Proxy]:
    async with Proxy(broker_access) as made:
        yield made


def maker(access: BrokerAccess, namespace: str, made: list[Worker]) -> Callable[[], Worker]:
    async def connect(name: str) -> Transport:
        return await NatsTransport.connect(access, name=name, request_timeout_s=0.3)

    def make() -> Worker:
        settings = Settings(broker=access, namespace=namespace, node="here", lease_s=2.0)
        made.append(Worker(APP, settings, name="slow", connect=connect))
        return made[-1]

    return make


async def test_a_worker_waits_for_a_broker_that_is_slow_to_open_its_streams(proxy: Proxy, namespace: str) -> None:
    made: list[Worker] = []
    proxy.delay(JETSTREAM)
    beginning = asyncio.create_task(worker_process.begin(maker(proxy.access, namespace, made), asyncio.Event()))
    await until(lambda: len(made) == 3)
    proxy.in_time.set()
    worker = await beginning
    assert worker is made[-1]
    assert worker.process.is_current()
    await worker.aclose()


async def test_its_patience_has_an_end(proxy: Proxy, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_PATIENCE_S", 2.5)
    made: list[Worker] = []
    proxy.delay(JETSTREAM)
    with pytest.raises(BrokerTimeoutError, match="did not answer"):
        await worker_process.begin(maker(proxy.access, namespace, made), asyncio.Event())
    assert len(made) > 1
    proxy.in_time.set()


async def test_who_is_not_wanted_any_more_waits_no_longer(namespace: str) -> None:
    made: list[Worker] = []
    unwanted = asyncio.Event()
    make = maker(BrokerAccess(urls=("nats://127.0.0.1:1",)), namespace, made)
    beginning = asyncio.create_task(worker_process.begin(make, unwanted))
    await until(lambda: len(made) == 2)
    unwanted.set()
    with pytest.raises(BrokerUnreachableError):
        await beginning
    assert len(made) <= 3


async def test_what_waiting_does_not_heal_ends_at_once(broker_access: BrokerAccess, namespace: str) -> None:
    made: list[Worker] = []
    with pytest.raises(BrokerAuthError):
        await worker_process.begin(maker(BrokerAccess(urls=broker_access.urls), namespace, made), asyncio.Event())
    assert len(made) == 1
