"""Short calls behind long ones: what the policies that come with the runtime make of it, beside none.

Some instances, eight unless told otherwise, run one call at a time, at 70 % of what they can do. Sessions come at random, as
open-loop load does; each sends a few bursts of calls, and waits for one before it sends the next. Most calls are short; now and
then the last call of a burst is long, so that no call waits behind a long one of its own session. Both halves get the same
sessions at the same times.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import policies_app
import work

from nalar_mq import Client, connect
from nalar_mq.actions import Migrate
from nalar_mq.address import Address, Subjects
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers import policies
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.nats_transport import NatsTransport

REPLICAS = int(os.environ.get("BENCH_POLICIES_WORKERS", "8"))
LOAD = 0.7
SHORT_S = 0.05
LONG_S = 5.0
LONG_SHARE = 0.06  # of the bursts
BURST = 3
BURSTS = 3
SECONDS = float(os.environ.get("BENCH_HEAD_SECONDS", "60"))


class Session(NamedTuple):
    """When it comes, and how long each call of its bursts takes."""

    name: str
    at_s: float
    bursts: list[list[float]]


def sessions(seed: int) -> list[Session]:
    """The sessions that come within `SECONDS`."""
    chance = random.Random(seed)
    burst_s = (BURST - LONG_SHARE) * SHORT_S + LONG_SHARE * LONG_S
    every_s = BURSTS * burst_s / (REPLICAS * LOAD)
    found: list[Session] = []
    at_s = chance.expovariate(1 / every_s)
    while at_s < SECONDS:
        bursts = [[SHORT_S] * (BURST - 1) + [LONG_S if chance.random() < LONG_SHARE else SHORT_S] for _ in range(BURSTS)]
        found.append(Session(f"s{len(found)}", at_s, bursts))
        at_s += chance.expovariate(1 / every_s)
    return found


async def follow(client: Client, session: Session, begun: float, waited: list[float]) -> None:
    """Plays one session, notes how long its short calls took, and checks that they were done in their order."""
    await asyncio.sleep(begun + session.at_s - time.perf_counter())
    desk = client.options(session=session.name)
    number = 0
    for burst in session.bursts:

        async def one(number: int, seconds: float) -> None:
            sent = time.perf_counter()
            work.expect(await desk.call("Desk.work", number, seconds), number + 1)
            if seconds == SHORT_S:
                waited.append(time.perf_counter() - sent)

        async with asyncio.TaskGroup() as calls:
            for seconds in burst:
                calls.create_task(one(number, seconds))
                number += 1
    work.expect(await desk.call("Desk.history"), list(range(number)))


async def half(client: Client, prefix: str, seed: int) -> None:
    """All sessions once."""
    work.phase(prefix)
    waited: list[float] = []
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as under_way:
        for session in sessions(seed):
            under_way.create_task(follow(client, session, begun, waited))
    work.figure(f"{prefix}_short_p50_ms", round(work.percentile(waited, 50) * 1e3, 1))
    work.figure(f"{prefix}_short_p99_ms", round(work.percentile(waited, 99) * 1e3, 1))


async def measure(access: BrokerAccess, folder: Path, seed: int) -> None:
    """Without a controller, then with one and the policies it has by default."""
    for prefix in ("without", "default"):
        settings = Settings(broker=access, namespace=prefix, node="bench", state=str(folder / prefix))
        app = Path(policies_app.__file__)
        async with (
            LocalController(app, settings, workers=REPLICAS, log_level="warning") as controller,
            connect(settings=settings, random=random.Random(seed)) as client,
        ):
            await asyncio.gather(controller.ready(), client.wait_for("Desk"))
            if prefix == "without":
                await half(client, prefix, seed)
                continue
            transport = await NatsTransport.connect(access, name="controller")
            try:
                decider = Trusted(policies.default())
                async with GlobalController(transport, Subjects(prefix), Address("controller", 1), decider) as above:
                    await half(client, prefix, seed)
                    moves = [act for one in above.governor.history for act in one.acts if isinstance(act, Migrate)]
                    work.figure("default_moves", len(moves))
            finally:
                await transport.aclose()
