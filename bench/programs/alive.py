"""So many real futures alive at once, over real workers and a real broker, while the default policies decide about all of them.

Every call has one argument that is not there yet. When the controller has seen all of them alive, and has made a few more
rounds, the argument is resolved, and they end.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from statistics import median

import alive_app
import work

from nalar_mq import connect, gather
from nalar_mq.address import Address, Subjects
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers import policies
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.nats_transport import NatsTransport

FUTURES = int(os.environ.get("BENCH_ALIVE_FUTURES", "130000"))
WORKERS = 2
ROUNDS = 20
PATIENCE_S = 120.0


async def watched(above: GlobalController, wanted: int) -> tuple[int, list[float]]:
    """The most futures that were seen alive at once, and the seconds of the rounds in which that many were seen."""
    most, seconds, seen = 0, list[float](), above.rounds
    async with asyncio.timeout(PATIENCE_S):
        while len(seconds) < ROUNDS:
            await asyncio.sleep(0.01)
            most = max(most, above.last.futures)
            if above.rounds != seen and above.last.futures >= wanted:
                seen = above.rounds
                seconds.append(above.last.whole_s)
    return most, seconds


async def measure(access: BrokerAccess, folder: Path, seed: int) -> None:
    """Fans out, waits until all are seen, lets them end."""
    gate = folder / "gate"
    settings = Settings(broker=access, namespace="alive", node="bench")
    variables = {"BENCH_ALIVE_GATE": str(gate)}
    transport = await NatsTransport.connect(access, name="controller")
    decider = Trusted(policies.default())
    try:
        async with (
            LocalController(
                Path(alive_app.__file__), settings, workers=WORKERS, variables=variables, log_level="warning"
            ) as controller,
            connect(settings=settings, random=random.Random(seed)) as client,
            GlobalController(transport, Subjects("alive"), Address("controller", 1), decider) as above,
        ):
            await asyncio.gather(controller.ready(), client.wait_for("hold"))
            work.phase("alive")
            begun = time.perf_counter()
            held = alive_app.hold()
            futures = [alive_app.add.options(timeout_s=600.0)(held.later, number) for number in range(FUTURES)]
            most, seconds = await watched(above, FUTURES)
            gate.touch()
            work.expect(list(await gather(*futures)), [number + 1 for number in range(FUTURES)])
            work.expect(above.observer.dropped, 0)
            work.figure("alive_s", round(time.perf_counter() - begun, 2))
            work.figure("alive_seen", most)
            work.figure("alive_loop_p50_ms", round(median(seconds) * 1e3, 1))
            work.figure("alive_loop_max_ms", round(max(seconds) * 1e3, 1))
    finally:
        await transport.aclose()
