"""Managed state while workers and the broker are killed or frozen and sessions move: what was acknowledged is there, once.

Each session has one caller, who numbers his calls and keeps what he was answered. The session keeps the numbers in a list and
counts them. In the end, for every session: the list is in order, without repetition, holds every call that was acknowledged,
where its answer said, and of the others only such as failed with an error. The show runs short in every test run, and long
with `--slow`, where it prints its counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest
from waiting import PATIENCE_S, until

from nalar_mq.broker import EmbeddedBroker
from nalar_mq.client import Client, connect
from nalar_mq.config import Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.supervision import Limits, Phase
from nalar_mq.errors import CallError, MigrationError
from nalar_mq.store import HERE, Store

APP = Path(__file__).parent / "apps" / "accounts_app.py"
LEASE_S = 3.0


class Show(msgspec.Struct, frozen=True):
    """How much happens."""

    sessions: int
    workers: int
    seconds: float
    kill_every_s: tuple[float, float]
    movers: int
    broker_kills: int
    freezes: bool


SHORT = Show(sessions=40, workers=3, seconds=8.0, kill_every_s=(0.8, 1.6), movers=2, broker_kills=1, freezes=False)
FULL = Show(sessions=200, workers=4, seconds=60.0, kill_every_s=(0.2, 1.0), movers=4, broker_kills=2, freezes=True)


class Caller:
    """The only one who changes a session."""

    def __init__(self, client: Client, name: str, retries: int, rng: Random) -> None:
        self.name = name
        self.retries = retries
        self.acknowledged: dict[int, int] = {}
        self.failed: dict[int, str] = {}
        self._account = client.options(session=name, retries=retries, timeout_s=PATIENCE_S)
        self._rng = rng

    async def call_until(self, is_over: asyncio.Event) -> None:
        number = 0
        while not is_over.is_set():
            burst = range(number, number + self._rng.randint(1, 4))
            number = burst.stop
            methods = [self._rng.choice(("add", "add_in_thread")) for _ in burst]
            await asyncio.gather(
                *[self._settle(n, self._account.call(f"Account.{method}", n)) for n, method in zip(burst, methods, strict=True)]
            )
            await asyncio.sleep(self._rng.uniform(0.0, 0.3))

    async def _settle(self, number: int, future: Awaitable[int]) -> None:
        try:
            self.acknowledged[number] = await future
        except CallError as error:
            self.failed[number] = type(error).__name__

    async def read(self) -> tuple[int, list[int]]:
        # Somebody killed a moment ago may still seem to serve.
        total, entries = await self._account.options(retries=10).call("Account.read")
        return total, entries

    def check(self, total: int, entries: list[int]) -> None:
        assert entries == sorted(set(entries)), f"{self.name}: out of order or twice: {_disorder(entries)}"
        assert total == len(entries)
        positions = {number: position for position, number in enumerate(entries, 1)}
        wrong = {
            number: (said, positions.get(number)) for number, said in self.acknowledged.items() if said != positions.get(number)
        }
        assert not wrong, f"{self.name}: acknowledged (said, found): {wrong}"
        assert positions.keys() <= self.acknowledged.keys() | self.failed.keys()


def _disorder(entries: list[int]) -> list[list[int]]:
    return [entries[max(0, at - 3) : at + 3] for at in range(1, len(entries)) if entries[at] <= entries[at - 1]]


class Site:
    """Workers, of which one is apart: nobody kills it for standing still."""

    def __init__(
        self, broker: EmbeddedBroker, node: LocalController, apart: LocalController, client: Client, rng: Random
    ) -> None:
        self.broker = broker
        self.node = node
        self.apart = apart
        self.client = client
        self.rng = rng
        self.done: Counter[str] = Counter()
        self.is_over = asyncio.Event()

    def serving(self) -> dict[str, int]:
        pids = {**self.node.pids, **self.apart.pids}
        phases = {**self.node.phases, **self.apart.phases}
        return {name: pid for name, pid in pids.items() if phases[name] is Phase.READY}

    async def is_complete(self) -> None:
        await until(lambda: len(self.serving()) == len(self.node.names) + 1, "somebody is missing")

    # What goes wrong, until the show is over.

    async def kill_workers(self, every_s: tuple[float, float]) -> None:
        while not self.is_over.is_set():
            await asyncio.sleep(self.rng.uniform(*every_s))
            serving = self.serving()
            mine = [pid for name, pid in serving.items() if name in self.node.names]
            if mine and len(serving) > 1:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(mine), signal.SIGKILL)
                    self.done["workers killed"] += 1

    async def kill_broker(self, pauses_s: list[float]) -> None:
        for pause_s in pauses_s:
            await asyncio.sleep(pause_s)
            assert self.broker.pid is not None
            os.kill(self.broker.pid, signal.SIGKILL)
            self.done["brokers killed"] += 1

    async def freeze(self, controller: LocalController) -> None:
        """A worker stands still until it has been given up; if its controller lets it, it wakes up then."""
        await until(lambda: set(self.serving()) & set(controller.names), "nobody to freeze")
        name = next(name for name in controller.names if name in self.serving())
        pid, table = controller.pids[name], self.client.process.table
        incarnation = table.members[name].incarnation
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(
                lambda: name not in table.members or table.members[name].incarnation != incarnation, "it was never given up"
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        await until(lambda: controller.pids.get(name, pid) != pid, "who was given up goes on")
        self.done["workers frozen"] += 1

    async def move_sessions(self, sessions: list[str]) -> None:
        while not self.is_over.is_set():
            await asyncio.sleep(self.rng.uniform(0.0, 0.2))
            to = self.rng.choice([*self.node.names, *self.apart.names])
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.client.migrate("Account", self.rng.choice(sessions), to=to)
                self.done["sessions moved"] += 1
            except (MigrationError, CallError):
                self.done["moves refused"] += 1


@asynccontextmanager
async def site(folder: Path, workers: int, rng: Random) -> AsyncIterator[Site]:
    async with EmbeddedBroker(folder / "broker", restart_attempts=50) as broker:
        common = Settings(broker=broker.access, lease_s=LEASE_S, state=str(folder / "state"))
        here, there = (msgspec.structs.replace(common, node=node) for node in ("here", "apart"))
        async with (
            LocalController(APP, here, workers=workers - 1, log_level="error") as node,
            LocalController(APP, there, workers=1, limits=Limits(), log_level="error") as apart,
            connect(settings=here) as client,
        ):
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(node.ready(), apart.ready())
                await client.wait_for("Account")
            yield Site(broker, node, apart, client, rng)


@pytest.mark.parametrize(
    "show",
    [pytest.param(SHORT, id="short"), pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
async def test_acknowledged_is_applied_once_and_in_order(
    show: Show, namespace: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = Random(f"state under fire {namespace if show == SHORT else ''}")
    async with site(tmp_path, show.workers, rng) as here:
        callers = [Caller(here.client, f"s{n}", 10 if n % 2 else 0, Random(n)) for n in range(show.sessions)]
        await here.is_complete()
        async with asyncio.TaskGroup() as under_way:
            for caller in callers:
                under_way.create_task(caller.call_until(here.is_over))
            under_way.create_task(here.kill_workers(show.kill_every_s))
            under_way.create_task(here.kill_broker([show.seconds / (show.broker_kills + 1)] * show.broker_kills))
            for _ in range(show.movers):
                under_way.create_task(here.move_sessions([caller.name for caller in callers]))
            if show.freezes:
                under_way.create_task(here.freeze(here.node))
                under_way.create_task(here.freeze(here.apart))
            await asyncio.sleep(show.seconds)
            here.is_over.set()
        await here.is_complete()
        async with asyncio.timeout(PATIENCE_S):
            found = await asyncio.gather(*[caller.read() for caller in callers])
    for caller, (total, entries) in zip(callers, found, strict=True):
        caller.check(total, entries)
    assert on_disk(tmp_path / "state") == {
        caller.name: len(entries) for caller, (_, entries) in zip(callers, found, strict=True)
    }
    assert here.done["brokers killed"] == show.broker_kills
    if show != SHORT:
        with capfd.disabled():
            print(f"\n{counts(here, callers, sum(total for total, _ in found))}", flush=True)


def on_disk(state: Path) -> dict[str, int]:
    """How many entries each session has in the only store that serves it."""
    found: dict[str, int] = {}
    for folder in state.iterdir():
        store = Store.open(folder, "test")
        try:
            for session in store.sessions():
                if session.standing != HERE:
                    continue
                assert session.name not in found, f"{session.name} is in two stores"
                found[session.name] = len(store.load(session)["entries"])
        finally:
            store.close()
    return found


def counts(here: Site, callers: list[Caller], applied: int) -> str:
    acknowledged = sum(len(caller.acknowledged) for caller in callers)
    failed = {
        retries: Counter(error for caller in callers if caller.retries == retries for error in caller.failed.values())
        for retries in (0, 10)
    }
    return (
        f"{len(callers)} sessions: {acknowledged:,} calls acknowledged, all applied once and in order; {applied:,} applied; "
        f"failed without retries {dict(failed[0])}, with ten {dict(failed[10])}; {dict(here.done)}"
    )
