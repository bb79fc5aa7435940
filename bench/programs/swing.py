"""A load that swings from one tool to another and back: what reallocation makes of it, beside nothing and beside an oracle.

There is room for eight instances of both tools together, unless told otherwise, each of which runs one call at a time. So many
clients call all the time, nine of ten calls one tool, and at each swing the other one. The oracle knows when that is: its
instances end and begin by the same actions, without waiting for a queue to form.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import policies_app
import work

from nalar_mq import Client, connect
from nalar_mq.address import Address, Subjects
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers import policies
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.policy import Action, Policy, kill, provision
from nalar_mq.controllers.view import View
from nalar_mq.nats_transport import NatsTransport

SLOTS = int(os.environ.get("BENCH_POLICIES_WORKERS", "8"))
CLIENTS = 32
CALL_S = 0.05
SHARE = 0.9
PHASES = ("red", "blue", "red")
PHASE_S = float(os.environ.get("BENCH_SWING_SECONDS", "20"))
WINDOW_S = 1.0


class Clock:
    """Which tool most calls are for."""

    favourite = PHASES[0]


class Nothing:
    """Leaves all as it is."""

    def decide(self, view: View) -> Iterable[Action]:
        """Nothing."""
        return ()


class Oracle:
    """Gives all instances but one to the tool that most calls are for, as soon as they are."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def decide(self, view: View) -> Iterable[Action]:
        """As many as can be, at once."""
        other = "blue" if self._clock.favourite == "red" else "red"
        serving = view.serving(other)
        for replica in serving[1:]:
            yield kill(replica.worker, other, reason="it swings")
        for node in view.nodes:
            if view.has_room(node, self._clock.favourite):
                yield provision(self._clock.favourite, node, reason="it has swung")


async def load(client: Client, clock: Clock, done: list[float], seed: int) -> None:
    """Clients that call all the time; `done` gets the times at which calls ended."""
    is_over = False

    async def one(chance: random.Random) -> None:
        while not is_over:
            other = "blue" if clock.favourite == "red" else "red"
            await client.call(clock.favourite if chance.random() < SHARE else other, CALL_S)
            done.append(time.perf_counter())

    clients = [asyncio.ensure_future(one(random.Random(f"{seed} {number}"))) for number in range(CLIENTS)]
    for favourite in PHASES:
        clock.favourite = favourite
        await asyncio.sleep(PHASE_S)
    is_over = True
    await asyncio.gather(*clients)


def rates(done: list[float], begun: float) -> list[float]:
    """Calls a second in each window."""
    counts = [0] * round(len(PHASES) * PHASE_S / WINDOW_S)
    for at in done:
        place = int((at - begun) / WINDOW_S)
        if place < len(counts):
            counts[place] += 1
    return [count / WINDOW_S for count in counts]


def settled_s(found: list[float], wanted: list[float]) -> float:
    """The longest time from a swing until the calls of three seconds are within 10 % of those of a settled oracle."""
    windows = round(PHASE_S / WINDOW_S)
    longest = 0.0
    for first in range(0, len(found), windows):
        steady = mean(wanted[first + windows // 2 : first + windows])
        after = (at for at in range(windows) if mean(found[first + at : min(first + at + 3, first + windows)]) >= 0.9 * steady)
        longest = max(longest, next(after, windows) * WINDOW_S)
    return longest


async def once(access: BrokerAccess, folder: Path, seed: int, name: str, policy: Policy, clock: Clock) -> list[float]:
    """The rates with a policy."""
    settings = Settings(broker=access, namespace=f"swing-{name}", node="bench", state=str(folder / f"swing-{name}"))
    app = Path(policies_app.__file__)
    transport = await NatsTransport.connect(access, name="controller")
    try:
        async with (
            LocalController(app, settings, workers=SLOTS, capacities={"slot": SLOTS}, log_level="warning") as node,
            connect(settings=settings, random=random.Random(seed)) as client,
            GlobalController(transport, Subjects(settings.namespace), Address("controller", 1), Trusted(policy)) as above,
        ):
            await asyncio.gather(node.ready(), client.wait_for("red"), client.wait_for("blue"))
            while not (above.is_leader and len(above.view.workers) == SLOTS):
                await asyncio.sleep(0.1)
            work.phase(f"swing_{name}")
            done: list[float] = []
            begun = time.perf_counter()
            await load(client, clock, done, seed)
            return rates(done, begun)
    finally:
        await transport.aclose()


async def measure(access: BrokerAccess, folder: Path, seed: int) -> None:
    """Nothing, the default policies, and the oracle."""
    found: dict[str, list[float]] = {}
    clock = Clock()
    for name, policy in (("without", Nothing()), ("default", policies.default()), ("oracle", Oracle(clock))):
        found[name] = await once(access, folder, seed, name, policy, clock)
        work.figure(f"swing_{name}_per_s", round(sum(found[name]) / len(found[name]), 1))
    work.figure("swing_settled_s", settled_s(found["default"], found["oracle"]))
