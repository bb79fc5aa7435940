"""The global controller at work: real telemetry over a real broker, from nodes on which no calls run.

A round begins when the nodes send what has changed, and ends when the broker has the priorities that follow from it. What the
controller does between rounds counts in `all_cpu_p50_ms`, what the broker and the nodes do meanwhile in `others_cpu_mean_ms`.
Beside it: what it takes to schedule one future by a mailbox that holds them all, and by a controller that would have to do it
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean, median, quantiles

import psutil
import work

from nalar_mq import event_loop
from nalar_mq.address import Address, Subjects
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.changes import Changes
from nalar_mq.config import BrokerAccess
from nalar_mq.controllers.deciding import Trusted
from nalar_mq.controllers.global_controller import GlobalController
from nalar_mq.controllers.policies import ShortestRemaining
from nalar_mq.mailbox import Mailbox
from nalar_mq.messages import Call
from nalar_mq.nats_transport import NatsTransport

FUTURES = int(os.environ.get("BENCH_CONTROL_FUTURES", "131072"))
NODES = int(os.environ.get("BENCH_CONTROL_NODES", "64"))
AGENTS = int(os.environ.get("BENCH_CONTROL_AGENTS", "128"))
ROUNDS = int(os.environ.get("BENCH_CONTROL_ROUNDS", "40"))
SCHEDULED = int(os.environ.get("BENCH_CONTROL_SCHEDULED", "50000"))
SEED = int(os.environ.get("BENCH_SEED", "1"))
_NAMESPACE = "control"
_LEASE_S = 3600.0  # the nodes are silent while they make up what has changed
_WARM_UP = 3


class Hosts:
    """The processes that play the nodes."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def do(self, command: str) -> int:
        """Has all of them do it; how many reports they have ready."""
        return sum(await asyncio.gather(*[self._one(process, command) for process in self._processes]))

    async def _one(self, process: asyncio.subprocess.Process, command: str) -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{command}\n".encode())
        line = await process.stdout.readline()
        if not line:
            raise SystemExit("the nodes have ended")
        return int(json.loads(line)["reports"])


@contextlib.asynccontextmanager
async def hosts(access: BrokerAccess) -> AsyncIterator[Hosts]:
    """Two processes with half of the nodes each."""
    agents = [f"agent-{number}" for number in range(AGENTS)]
    nodes = [(number, agents[number % AGENTS :: NODES] or agents[:1]) for number in range(NODES)]
    processes: list[asyncio.subprocess.Process] = []
    try:
        for part in (nodes[::2], nodes[1::2]):
            program = Path(__file__).parent / "control_nodes.py"
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
            process = await asyncio.create_subprocess_exec(sys.executable, str(program), **pipes)
            processes.append(process)
            plan = {"urls": access.urls, "token": access.token, "namespace": _NAMESPACE, "seed": SEED}
            line = json.dumps(plan | {"nodes": part, "futures": max(1, FUTURES // NODES)})
            assert process.stdin is not None
            process.stdin.write(f"{line}\n".encode())
        yield Hosts(processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def rounds(access: BrokerAccess) -> None:
    """Every future is there; then rounds in each of which a tenth of them changes."""
    transport = await NatsTransport.connect(access, name="controller")
    me, decider = Address("controller", 1), Trusted(ShortestRemaining())
    try:
        async with (
            hosts(access) as nodes,
            GlobalController(transport, Subjects(_NAMESPACE), me, decider, lease_s=_LEASE_S, is_driven=True) as controller,
        ):
            while not controller.is_leader:
                await asyncio.sleep(0.01)
            gc.collect()
            before = psutil.Process().memory_info().rss
            expected = await nodes.do("load")
            await one_round(controller, transport, nodes, expected)
            wanted = NODES * max(1, FUTURES // NODES)
            work.expect(len(controller.view.futures), wanted)
            others = psutil.Process().children(recursive=True)
            found: list[tuple[float, ...]] = []
            for _ in range(_WARM_UP + ROUNDS):
                used = time.process_time()
                expected = await nodes.do("change")
                others_used = cpu_of(others)
                of_round = await one_round(controller, transport, nodes, expected)
                found.append((*of_round, time.process_time() - used, cpu_of(others) - others_used))
                ranked = controller.governor.wanted
                work.expect(ranked is not None and len(ranked.sessions) == len(controller.view.sessions), True)
            work.expect((len(controller.view.futures), controller.view.stale(), controller.observer.dropped), (wanted, [], 0))
            gc.collect()
            work.figure("bytes_per_future", round((psutil.Process().memory_info().rss - before) / wanted, 1))
            tell(found[_WARM_UP:])
            work.figure("one_level_schedule_us", round(one_level(controller) * 1e6, 1))
    finally:
        await transport.aclose()


def cpu_of(processes: list[psutil.Process]) -> float:
    """Their processor time until now."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def one_round(controller: GlobalController, transport: NatsTransport, nodes: Hosts, expected: int) -> tuple[float, ...]:
    """Seconds of the whole, of collecting, of the policy, and of the processor in this process."""
    begun, used = time.perf_counter(), time.process_time()
    while await nodes.do("publish"):
        await transport.flush()
    await transport.flush()
    work.expect(controller.observer.waiting, expected)
    arrived = time.perf_counter()
    last = await controller.make_round()
    await transport.flush()
    ended, worked = time.perf_counter(), time.process_time() - used
    return ended - begun, arrived - begun + last.collect_s, last.policy_s, worked


def tell(found: list[tuple[float, ...]]) -> None:
    """The figures of the rounds."""
    loop, collect, policy, worked, whole, others = zip(*found, strict=True)
    work.figure("loop_p50_ms", round(median(loop) * 1e3, 2))
    work.figure("loop_cpu_p50_ms", round(median(worked) * 1e3, 2))
    work.figure("all_cpu_p50_ms", round(median(whole) * 1e3, 2))
    work.figure("others_cpu_mean_ms", round(mean(others) * 1e3, 2))  # the kernel counts it in hundredths of a second
    for name, seconds in (("loop", loop), ("collect", collect), ("policy", policy)):
        work.figure(f"{name}_p99_ms", round(quantiles(seconds, n=100, method="inclusive")[98] * 1e3, 2))


def one_level(controller: GlobalController) -> float:
    """Seconds to schedule one future where no mailbox does: see what has changed, rank all, take the first."""
    view, changes = controller.view, Changes("central", 1, "central")
    policy = ShortestRemaining()
    found: list[float] = []
    for number in range(20):
        now = asyncio.get_running_loop().time()
        changes.begin(Call(number.to_bytes(16, "little"), "agent-0", "run", b"", session="central"), now)
        reports = changes.reports(now, 1 << 20)
        begun = time.perf_counter()
        for data in reports:
            view.fold("central", data, now)
        view.settle(now)
        (ranked,) = policy.decide(view)
        int(ranked.sessions[ranked.values.argmax()])
        found.append(time.perf_counter() - begun)
    return median(found)


def two_level() -> None:
    """The time for one call in a mailbox that holds them all: it comes, the first is taken, and has ended.

    Sessions differ in priority and keep their order, waiting makes older calls more urgent, and with every tenth call a session
    gets another priority.
    """
    chance = random.Random(SEED)
    mailbox = Mailbox(concurrency=32, per_session=True, high_water=2 * FUTURES + SCHEDULED)
    sessions = [f"session-{number}" for number in range(max(1, FUTURES // _PER_SESSION))]
    numbers = dict.fromkeys(sessions, 0)
    for number in range(FUTURES):
        _put(mailbox, numbers, sessions[number % len(sessions)], number, number * 1e-5)
    for session in sessions[:: max(1, len(sessions) // 1000)]:
        mailbox.set_priority(session, chance.randrange(16))
    chosen = [chance.choice(sessions) for _ in range(SCHEDULED)]
    keys = [(FUTURES + number).to_bytes(16, "big") for number in range(SCHEDULED)]
    priorities = [chance.randrange(16) for _ in range(SCHEDULED)]
    now = FUTURES * 1e-5
    work.expect(len(mailbox), FUTURES)
    gc.collect()
    begun, used = time.perf_counter(), time.process_time()
    for number, session in enumerate(chosen):
        now += 1e-5
        numbers[session] += 1
        mailbox.put(keys[number], session=session, sender="w", number=numbers[session], priority=hash(session) & 3, now=now)
        if not number % 10:
            mailbox.set_priority(session, priorities[number])
        taken = mailbox.take(now)
        assert taken is not None
        mailbox.finish(taken)
    seconds, worked = time.perf_counter() - begun, time.process_time() - used
    work.expect(len(mailbox), FUTURES)
    work.figure("schedule_us", round(seconds / SCHEDULED * 1e6, 2))
    work.figure("schedule_cpu_us", round(worked / SCHEDULED * 1e6, 2))


_PER_SESSION = 8


def _put(mailbox: Mailbox, numbers: dict[str, int], session: str, number: int, now: float) -> None:
    numbers[session] += 1
    mailbox.put(
        number.to_bytes(16, "big"), session=session, sender="w", number=numbers[session], priority=hash(session) & 3, now=now
    )


async def main() -> None:
    """The rounds, then the mailbox."""
    work.phase("control")
    with tempfile.TemporaryDirectory(prefix="nalar-bench-", ignore_cleanup_errors=True) as folder:
        async with EmbeddedBroker(Path(folder)) as broker:
            await rounds(broker.access)
    gc.collect()
    gc.freeze()
    two_level()
    work.done()


if __name__ == "__main__":
    event_loop.run(main())
