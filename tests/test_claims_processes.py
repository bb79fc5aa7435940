"""Large values between real processes: who copies through the broker, and what is left when they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until, until_collected

from nalar_mq import errors
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.nats_transport import NatsTransport

APP = Path(__file__).parent / "apps" / "large_app.py"
SIZE = 3_000_000
PATIENCE_S = 60.0


def values_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*.*.{32 * '[0-9a-f]'}"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NALAR_LOCAL_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def settings(broker_access: BrokerAccess, namespace: str, store: Path) -> Settings:
    return Settings(broker=broker_access, namespace=namespace, node="here", lease_s=3.0)


@pytest.fixture
async def node(settings: Settings) -> AsyncIterator[LocalController]:
    async with LocalController(APP, settings, workers=2, log_level="warning") as controller:
        await controller.ready()
        yield controller


@pytest.fixture
async def objects(broker_access: BrokerAccess, settings: Settings) -> AsyncIterator[Callable[[], Any]]:
    async with await NatsTransport.connect(broker_access, name="observer") as transport:

        async def names() -> list[str]:
            return await (await transport.object_store(f"{settings.namespace}-claims")).names()

        yield names


async def test_processes_of_one_node_leave_the_broker_alone(
    node: LocalController, settings: Settings, store: Path, objects: Callable[[], Any]
) -> None:
    async with connect(settings=settings) as client:
        await client.wait_for("make")
        value = client.call("make", SIZE, 7)
        ran = {(await client.call("where", value))[0] for _ in range(8)}
        assert len(ran) == 2, "only one of the workers ran them"
        assert await value == bytes([7]) * SIZE
        assert await client.call("make_in_child", SIZE) == bytes(SIZE)
        assert len(values_in(store)) >= 1
        assert await objects() == []
        del value
        await until_collected(lambda: not values_in(store))


async def test_a_client_on_another_machine_gets_them_through_the_broker(
    node: LocalController, settings: Settings, store: Path, tmp_path: Path, objects: Callable[[], Any]
) -> None:

    elsewhere = msgspec.structs.replace(settings, local_store=str(tmp_path / "elsewhere"))
    async with connect(settings=elsewhere) as client:
        await client.wait_for("make")
        value = client.call("make", SIZE, 7)
        assert (await client.call("where", value))[1] == SIZE
        assert await value == bytes([7]) * SIZE
        assert len(await objects()) == 1
        assert (await client.call("where", bytes(SIZE)))[1] == SIZE
        del value

        async def nothing() -> bool:
            return await objects() == [] and not values_in(store)

        await until_collected(nothing)


@pytest.mark.parametrize("local_store", ["", "off"], ids=["folder", "broker"])
async def test_a_producer_that_is_killed_takes_nothing_with_it(
    node: LocalController, settings: Settings, store: Path, local_store: str
) -> None:

    async with connect(settings=msgspec.structs.replace(settings, local_store=local_store)) as client:
        await client.wait_for("make")
        value = client.call("make", SIZE, 9)
        await until(value.available)
        for pid in node.pids.values():
            os.kill(pid, signal.SIGKILL)
        assert await value == bytes([9]) * SIZE


HOLDER = """
import asyncio, sys
from nalar_mq import connect
from nalar_mq.config import BrokerAccess, Settings

async def main():
    settings = Settings(broker=BrokerAccess(urls=(sys.argv[1],), token=sys.argv[2]), namespace=sys.argv[3], lease_s=3.0,
                        local_store=sys.argv[4])
    async with connect(settings=settings) as client:
        await client.wait_for("make")
        value = client.call("make", 3_000_000)
        await value
        print("holds", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("local_store", ["", "off"], ids=["folder", "broker"])
async def test_what_a_killed_holder_held_is_removed(
    node: LocalController, settings: Settings, store: Path, local_store: str, objects: Callable[[], Any], tmp_path: Path
) -> None:

    access = settings.broker
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, access.urls[0], access.token, settings.namespace, local_store),
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert (await asyncio.wait_for(holder.stdout.readline(), PATIENCE_S)).strip() == b"holds"
    kept = values_in(store) or await objects()
    assert len(kept) == 1
    holder.kill()
    await holder.wait()

    async def nothing() -> bool:
        return await objects() == [] and not values_in(store)

    await until_collected(nothing)


async def test_a_call_whose_worker_is_killed_gets_its_large_argument_again(
    node: LocalController, settings: Settings, tmp_path: Path
) -> None:
    async with connect(settings=settings) as client:
        await client.wait_for("hold")
        folder = tmp_path / "pids"
        folder.mkdir()
        waiting = client.call("hold", bytes(SIZE), str(folder))
        await until_collected(lambda: list(folder.iterdir()))
        [first] = folder.iterdir()
        os.kill(int(first.name), signal.SIGKILL)
        await until_collected(lambda: len(list(folder.iterdir())) == 2)
        (folder / "go").touch()
        assert await asyncio.wait_for(waiting, PATIENCE_S) == SIZE


@pytest.mark.slow
async def test_a_hundred_megabytes_there_and_back(node: LocalController, settings: Settings, store: Path) -> None:
    async with connect(settings=settings) as client:
        await client.wait_for("make")
        await _there_and_back(client, 100_000_000)
        await until_collected(lambda: not values_in(store))
        with pytest.raises(errors.ValueTooLargeError, match="1,073,741,824"):
            await client.call("make", 1024**3)


async def _there_and_back(client: Client, size: int) -> None:
    value = client.call("make", size, 3)
    assert (await client.call("where", value))[1] == size
    assert (await value) == bytes([3]) * size
    assert (await client.call("where", bytes(size)))[1] == size
