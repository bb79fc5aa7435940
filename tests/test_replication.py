"""Replicated state: it goes on when the machine of its worker is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from nalar_mq import replication, values
from nalar_mq.app import load_app
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Caller, Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import Call
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "state_app.py"
PATIENCE_S = 60.0


class Machines:
    """Workers with a disk of their own each, and a client."""

    def __init__(self, namespace: str, disks: Path) -> None:
        self.hub = MemoryHub(seed=1)
        self.disks = disks
        self._namespace = namespace
        self._app = load_app(APP)
        self.client: Client = connect(settings=self._settings("client"), connect=self.hub.connect)

    def _settings(self, name: str) -> Settings:
        return Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)),
            namespace=self._namespace,
            node=name,
            lease_s=0.5,
            state=str(self.disks / name),
        )

    def worker(self, name: str) -> Worker:
        return Worker(self._app, self._settings(name), name=name, connect=self.hub.connect, lease_in_thread=False)

    def burn(self, name: str) -> None:
        """The machine is gone, with its disk."""
        self.hub.kill(name)
        shutil.move(self.disks / name, self.disks / f"{name}-burnt")


@pytest.fixture
def machines(namespace: str, tmp_path: Path) -> Machines:
    return Machines(namespace, tmp_path)


async def _put(client: Any, session: str, *texts: str) -> list[int]:
    ann = client.options(session=session)
    return [await ann.call("Archive.put", text) for text in texts]


async def test_sessions_go_on_on_another_machine(machines: Machines) -> None:
    async with machines.client as client:
        first = machines.worker("first")
        await first.start()
        for session in ("ann", "ben"):
            assert await _put(client, session, "a", "b") == [1, 2]
        machines.burn("first")
        async with asyncio.timeout(PATIENCE_S), machines.worker("second"):
            for session in ("ann", "ben"):
                assert await _put(client, session, "c") == [3]
                assert await client.options(session=session).call("Archive.all") == ["a", "b", "c"]
        await first.aclose()


async def test_a_call_that_is_sent_again_after_the_loss_takes_effect_once(machines: Machines) -> None:
    async with machines.client as client:
        first = machines.worker("first")
        await first.start()
        future = client.options(session="ann").call("Archive.put", "a")
        assert await future == 1
        again = Call(future.id, "Archive", "put", values.encode_arguments(["a"], {}), session="ann", attempt=1)
        machines.burn("first")
        async with asyncio.timeout(PATIENCE_S), machines.worker("second") as second:
            assert await client.options(session="ann").call("Archive.all") == ["a"]
            client.process.calls.tell(second.process.me, again)
            assert await _put(client, "ann", "b") == [2]
        await first.aclose()


async def test_snapshots_replace_what_came_before_them(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "_SNAPSHOT_BYTES", 20_000)
    async with machines.client as client:
        first = machines.worker("first")
        await first.start()
        ann = client.options(session="ann")
        for number in range(60):
            await ann.call("Archive.put", str(number), 1000)
        ledger = await client.process.transport.ledger(
            client.process.subjects.replicas_ledger, [client.process.subjects.replica("*")]
        )
        async with asyncio.timeout(PATIENCE_S):
            while sum((await ledger.subjects()).values()) > 50:
                await asyncio.sleep(0.05)
        machines.burn("first")
        async with asyncio.timeout(PATIENCE_S), machines.worker("second"):
            assert await ann.call("Archive.put", "last") == 61
            found = await ann.call("Archive.all")
            assert [text.rstrip(".") for text in found] == [*map(str, range(60)), "last"]
        await first.aclose()


async def test_a_value_larger_than_a_message_is_shipped_in_parts(machines: Machines) -> None:
    async with machines.client as client:
        first = machines.worker("first")
        await first.start()
        ann = client.options(session="ann")
        assert await ann.call("Archive.put", "large", 3_000_000) == 1
        machines.burn("first")
        async with asyncio.timeout(PATIENCE_S), machines.worker("second"):
            assert await _put(client, "ann", "b") == [2]
            assert [len(text) for text in await ann.call("Archive.all")] == [3_000_005, 1]
        await first.aclose()


async def test_a_copy_that_was_passed_by_is_set_aside(machines: Machines) -> None:
    """Whoever comes back to a disk that others went on without does not serve what is on it."""
    async with machines.client as client:
        first = machines.worker("first")
        await first.start()
        await _put(client, "ann", "a")
        machines.burn("first")
        await first.aclose()
        async with asyncio.timeout(PATIENCE_S), machines.worker("second"):
            assert await _put(client, "ann", "b") == [2]
            shutil.move(machines.disks / "first-burnt", machines.disks / "first")
            async with machines.worker("first"):
                assert await _put(client, "ann", "c") == [3]
                assert [path.name[:7] for path in (machines.disks / "first").glob("r1.*")] == ["r1.left"]


async def test_a_worker_that_comes_back_goes_on_with_its_own_disk(machines: Machines) -> None:
    async with machines.client as client:
        async with machines.worker("first"):
            await _put(client, "ann", "a")
        async with asyncio.timeout(PATIENCE_S), machines.worker("first"):
            assert await _put(client, "ann", "b") == [2]


async def test_a_machine_burns_while_it_is_used(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    """Real processes and a real broker: what was acknowledged is there, once, and in order."""

    def settings(node: str) -> Settings:
        return Settings(broker=broker_access, namespace=namespace, node=node, lease_s=1.5, state=str(tmp_path / node))

    async with LocalController(APP, settings("one"), workers=1) as one:
        await one.ready()
        async with connect(settings=settings("client")) as client:
            await client.wait_for("Archive", PATIENCE_S)
            sessions = [client.options(session=f"s{number}", timeout_s=PATIENCE_S) for number in range(4)]
            is_burning = asyncio.Event()

            async def put(session: Any) -> list[str]:
                acknowledged: list[str] = []
                for number in range(60):
                    if number == 20:
                        is_burning.set()
                    await session.call("Archive.put", str(number))
                    acknowledged.append(str(number))
                return acknowledged

            puts = [asyncio.create_task(put(session)) for session in sessions]
            await is_burning.wait()
            shutil.move(tmp_path / "one", tmp_path / "burnt")
            for pid in one.pids.values():
                os.kill(pid, signal.SIGKILL)
            await one.aclose()
            async with LocalController(APP, settings("two"), workers=1) as two:
                await two.ready()
                async with asyncio.timeout(PATIENCE_S):
                    for session, task in zip(sessions, puts, strict=True):
                        assert await session.call("Archive.all") is not None
                        assert await task == [str(number) for number in range(60)]
                        assert await session.call("Archive.all") == [str(number) for number in range(60)]


async def sessions_of_a_burnt_machine(client: Client, settings: Settings, state: Path) -> list[Caller]:
    """Twenty sessions with sixty texts each, whose worker is dead and whose folder is gone."""
    sessions = [client.options(session=f"s{number}", timeout_s=2 * PATIENCE_S) for number in range(20)]
    async with LocalController(APP, settings, workers=1) as one:
        await one.ready()
        await client.wait_for("Archive", PATIENCE_S)
        for number in range(60):
            await asyncio.gather(*[session.call("Archive.put", str(number), 4000) for session in sessions])
        shutil.move(state, state.with_name("burnt"))
        for pid in one.pids.values():
            os.kill(pid, signal.SIGKILL)
    return sessions


async def test_who_takes_a_store_over_is_killed_half_way(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    """What he has left is not taken for the store, not even on his own machine."""

    def settings(node: str) -> Settings:
        return Settings(broker=broker_access, namespace=namespace, node=node, lease_s=1.5, state=str(tmp_path / node))

    async with connect(settings=settings("client")) as client, asyncio.timeout(PATIENCE_S):
        sessions = await sessions_of_a_burnt_machine(client, settings("one"), tmp_path / "one")
        async with LocalController(APP, settings("two"), workers=1) as two:
            await two.ready()
            while not any(path.stat().st_size > 1_000_000 for path in (tmp_path / "two").glob("*/data.mdb")):
                await asyncio.sleep(0.001)
            for pid in two.pids.values():
                os.kill(pid, signal.SIGKILL)
            for session in sessions:
                found = await session.call("Archive.all")
                assert [text.rstrip(".") for text in found] == [str(number) for number in range(60)]
            assert await sessions[0].call("Archive.put", "last") == 61
            assert not list((tmp_path / "two").glob("unfinished-*"))


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_broker_goes_away_while_a_store_is_taken_over(harm: signal.Signals, namespace: str, tmp_path: Path) -> None:
    """A real one, which is killed or stands still: the copy is begun anew when it is back, and nothing of it is missing."""
    async with EmbeddedBroker(tmp_path / "broker") as broker, asyncio.timeout(2 * PATIENCE_S):

        def settings(node: str) -> Settings:
            return Settings(broker=broker.access, namespace=namespace, node=node, lease_s=1.5, state=str(tmp_path / node))

        async with connect(settings=settings("client")) as client:
            sessions = await sessions_of_a_burnt_machine(client, settings("one"), tmp_path / "one")
            async with LocalController(APP, settings("two"), workers=1) as two:
                await two.ready()
                while not list((tmp_path / "two").glob("unfinished-*")):
                    await asyncio.sleep(0.001)
                assert broker.pid is not None
                os.kill(broker.pid, harm)
                if harm == signal.SIGSTOP:
                    await asyncio.sleep(3.0)
                    assert not (tmp_path / "two" / "r2").exists(), "it was over before"
                    os.kill(broker.pid, signal.SIGCONT)
                for session in sessions:
                    found = await session.call("Archive.all")
                    assert [text.rstrip(".") for text in found] == [str(number) for number in range(60)]
                assert await asyncio.gather(*[session.call("Archive.put", "last") for session in sessions]) == [61] * 20
                assert not list((tmp_path / "two").glob("unfinished-*"))
