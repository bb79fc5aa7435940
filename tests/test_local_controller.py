from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from waiting import until

from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.supervision import (
    Action,
    Crashes,
    Exited,
    Heard,
    Leaving,
    Limits,
    Moving,
    Phase,
    Ready,
    Slot,
    Stop,
    Tick,
    decide,
)
from nalar_mq.errors import ConfigError, WorkerStartError

LIMITS = Limits(start_timeout_s=5, drain_timeout_s=7, healthy_after_s=10, first_pause_s=1, longest_pause_s=8, max_failures=3)
WAITING = Slot(name="w")
STARTING = Slot(name="w", phase=Phase.STARTING, due=105)
READY = Slot(name="w", phase=Phase.READY, due=math.inf, ready_at=100, has_served=True)
STARTING_AGAIN = Slot(name="w", phase=Phase.STARTING, due=105, has_served=True)
STOPPING = Slot(name="w", phase=Phase.STOPPING, due=107, has_served=True)
STOPPED = Slot(name="w", phase=Phase.STOPPED, due=math.inf)

DECISIONS = [
    ("a slot that is due starts", WAITING, Tick(), 100, Phase.STARTING, 105, Action.START),
    ("a pause is kept", Slot(name="w", due=200), Tick(), 100, Phase.WAITING, 200, Action.NONE),
    ("ready", STARTING, Ready(), 101, Phase.READY, math.inf, Action.NONE),
    ("a start that takes too long is ended", STARTING, Tick(), 105, Phase.STARTING, math.inf, Action.KILL),
    ("a start that may take longer goes on", STARTING, Tick(), 104, Phase.STARTING, 105, Action.NONE),
    ("the successor of what served for long starts at once", READY, Exited(-9), 110, Phase.WAITING, 110, Action.NONE),
    ("first failure", STARTING, Exited(1), 101, Phase.WAITING, 102, Action.NONE),
    ("failures spread", STARTING, Exited(1, "", 1.0), 101, Phase.WAITING, 102.5, Action.NONE),
    ("a fault of the user is final", STARTING, Exited(2), 101, Phase.FAILED, math.inf, Action.NONE),
    ("what has served is never given up", READY, Exited(2), 101, Phase.WAITING, 102, Action.NONE),
    ("one that was declared lost has a successor", READY, Exited(5), 101, Phase.WAITING, 102, Action.NONE),
    ("a name that another has is given up", READY, Exited(4), 101, Phase.FAILED, math.inf, Action.NONE),
    ("stop while waiting", WAITING, Stop(7), 100, Phase.STOPPED, math.inf, Action.NONE),
    ("stop while starting", STARTING, Stop(7), 100, Phase.STOPPING, 107, Action.TERMINATE),
    ("stop", READY, Stop(7), 100, Phase.STOPPING, 107, Action.TERMINATE),
    ("a second stop may only hurry", STOPPING, Stop(1), 100, Phase.STOPPING, 101, Action.NONE),
    ("a second stop never delays", STOPPING, Stop(50), 100, Phase.STOPPING, 107, Action.NONE),
    ("drained", STOPPING, Exited(0), 103, Phase.STOPPED, math.inf, Action.NONE),
    ("drained too long", STOPPING, Tick(), 107, Phase.STOPPING, math.inf, Action.KILL),
    ("a drain that gets on may take longer", STOPPING, Moving(), 105, Phase.STOPPING, 120, Action.NONE),
    ("and never takes shorter for that", STOPPING, Moving(), 91, Phase.STOPPING, 107, Action.NONE),
    ("moving changes nothing that is not to stop", READY, Moving(), 105, Phase.READY, math.inf, Action.NONE),
    ("what somebody else has drained stays away", READY, Exited(6), 101, Phase.STOPPED, math.inf, Action.NONE),
    ("one that leaves for want of a controller may take its time", STARTING, Leaving(9), 101, Phase.STARTING, 110, Action.NONE),
    ("and gets more while it gets on", STARTING, Moving(), 104, Phase.STARTING, 119, Action.NONE),
    ("and has a successor", STARTING_AGAIN, Exited(1), 104, Phase.WAITING, 105, Action.NONE),
    ("ready too late to matter", STOPPING, Ready(), 103, Phase.STOPPING, 107, Action.NONE),
    ("over is over", STOPPED, Tick(), 1e9, Phase.STOPPED, math.inf, Action.NONE),
    ("over is over, whoever exits", STOPPED, Exited(1), 1e9, Phase.STOPPED, math.inf, Action.NONE),
]


@pytest.mark.parametrize(
    ("slot", "event", "now", "phase", "due", "action"), [row[1:] for row in DECISIONS], ids=[row[0] for row in DECISIONS]
)
def test_decisions(slot, event, now, phase, due, action):
    after, done = decide(slot, event, now, LIMITS)
    assert (after.phase, after.due, done) == (phase, due, action)


def after_failures(slot: Slot, count: int, *, ready: bool) -> list[Slot]:
    """The slot after each of `count` starts that end at once."""
    seen = []
    for _ in range(count):
        slot, action = decide(slot, Tick(), slot.due, LIMITS)
        assert action is Action.START
        if ready:
            slot, _ = decide(slot, Ready(), 0.0, LIMITS)
        slot, _ = decide(slot, Exited(1), 0.0, LIMITS)
        seen.append(slot)
    return seen


def test_a_crash_loop_is_given_up():
    slots = after_failures(WAITING, 3, ready=False)
    assert [slot.phase for slot in slots] == [Phase.WAITING, Phase.WAITING, Phase.FAILED]
    assert slots[-1].reason == "it ended with code 1 before it served, 3 times in a row"


def test_pauses_double_up_to_a_bound_while_it_serves_in_between():
    assert [slot.due for slot in after_failures(WAITING, 6, ready=True)] == [1, 2, 4, 8, 8, 8]


def test_a_healthy_life_forgives_earlier_failures():
    slot = Slot(name="w", phase=Phase.READY, ready_at=100, failures=2, has_served=True)
    assert decide(slot, Exited(-9), 109, LIMITS)[0].failures == 3
    assert decide(slot, Exited(-9), 110, LIMITS)[0].failures == 1


def crashed(slot: Slot, now: float, reason: str = "") -> Slot:
    """The slot after another start that came to serve and ended without being asked to."""
    slot, _ = decide(msgspec.structs.replace(slot, due=now), Tick(), now, LIMITS)
    slot, _ = decide(slot, Ready(), now, LIMITS)
    return decide(slot, Exited(-9, reason), now + 1.0, LIMITS)[0]


def test_what_ends_again_and_again_is_told_of_until_it_has_been_calm_for_a_while():
    slot = WAITING
    assert slot.crashes_at(0.0, LIMITS) is None
    for now in (100.0, 150.0, 205.0):
        slot = crashed(slot, now, f"at {now}")
    assert slot.crashes_at(206.0, LIMITS) == Crashes(3, 101.0, 206.0, "at 205.0")
    assert slot.crashes_at(206.0 + LIMITS.calm_s, LIMITS) is None
    slot = crashed(slot, 400.0)
    assert slot.crashes_at(401.0, LIMITS) == Crashes(1, 401.0, 401.0, "it was ended by signal 9 while it served")


def test_what_was_asked_for_is_no_crash():
    slot, _ = decide(READY, Stop(7), 100, LIMITS)
    for code, before in ((0, slot), (-9, slot), (6, READY)):
        after, _ = decide(before, Exited(code), 103, LIMITS)
        assert after.phase is Phase.STOPPED
        assert after.crashes_at(103, LIMITS) is None


WATCHFUL = msgspec.structs.replace(LIMITS, silence_s=12.0)


def after_periods(slot: Slot, *delays_s: float) -> tuple[Slot, list[Action]]:
    """The slot after as many periods without a word, and what is to be done after each; it is looked at that much too late."""
    actions = []
    for delay_s in delays_s:
        slot, action = decide(slot, Tick(), slot.due + delay_s, WATCHFUL)
        actions.append(action)
    return slot, actions


def test_a_process_that_serves_and_is_silent_for_longer_than_a_lease_is_killed():
    slot, _ = decide(STARTING, Ready(), 100.0, WATCHFUL)
    slot, actions = after_periods(slot, *[0.1] * 12)
    assert set(actions) == {Action.NONE}
    assert slot.due - 100.0 > WATCHFUL.silence_s
    _, actions = after_periods(slot, 0.1)
    assert actions == [Action.KILL]
    heard, _ = decide(slot, Heard(), slot.due, WATCHFUL)
    assert after_periods(heard, 0.1)[1] == [Action.NONE]


def test_a_controller_that_stood_still_judges_nobody_for_it():
    slot, _ = decide(STARTING, Ready(), 100.0, WATCHFUL)
    assert Action.KILL not in after_periods(slot, *[0.1] * 6, 50.0, *[0.1] * 6)[1]
    assert Action.KILL not in after_periods(slot, *[3.0] * 40)[1]


def test_only_what_serves_is_judged_by_its_silence():
    assert after_periods(STARTING, 0.0)[0].silent_for == 0
    stopping, _ = decide(READY, Stop(7), 100, WATCHFUL)
    assert stopping.due == 107


# From here on with real processes. The worker is a script of a few lines that speaks the protocol of the real one.

SCRIPT = """
import json, os, signal, socket, subprocess, sys, time
link = socket.socket(fileno=int(sys.argv[1]))
order = json.loads(link.makefile().readline())
print("on stdout", flush=True)
with open(order["app"] + "." + order["name"], "a") as log:
    log.write(f"{os.getpid()}\\n")
def ready():
    link.send(b'{"failure": ""}\\n')
def fail(reason):
    link.send(json.dumps({"failure": reason}).encode() + b"\\n")
"""


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def controller(self, body: str, *, workers: int = 1, **limits: float) -> LocalController:
        script = self.folder / "worker.py"
        script.write_text(SCRIPT + body)
        settings = Settings(broker=BrokerAccess(urls=("nats://127.0.0.1:1",), token="secret"), node="n")
        patience = {"first_pause_s": 0.01, "longest_pause_s": 0.05, "max_failures": 3} | limits
        return LocalController(
            self.folder / "app",
            settings,
            workers=workers,
            limits=Limits(**patience),
            rng=random.Random(1),
            command=(sys.executable, str(script)),
        )

    def pids(self, name: str) -> list[int]:
        """Process ids that a worker has had so far."""
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self.folder / f"app.{name}").read_text().split()]
        return []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


SERVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); ready(); signal.pause()"


async def test_single_workers_are_stopped_and_added_and_the_node_stays(bench):
    async with bench.controller(SERVES, workers=2, most_workers=3) as controller:
        await controller.ready()
        failed = asyncio.create_task(controller.failed())
        for name in controller.names:
            controller.stop_worker(name)
        await until(lambda: not controller.pids)
        assert not failed.done()
        assert [controller.add_worker("a") for _ in range(4)] == ["n-1", "n-2", "n-3", ""]
        await until(lambda: set(controller.phases.values()) == {Phase.READY})
        assert [len(bench.pids(name)) for name in controller.names] == [2, 2, 1]
        await controller.drain()
        await failed
        assert controller.add_worker("a") == ""


async def test_workers_serve_under_their_names_and_end_with_the_controller(bench, capfd):
    controller = bench.controller(SERVES, workers=2)
    async with controller:
        await controller.ready()
        assert controller.names == ("n-1", "n-2")
        pids = controller.pids
        assert pids == {name: bench.pids(name)[0] for name in controller.names}
        assert all(alive(pid) for pid in pids.values())
        await controller.start()
        assert controller.pids == pids
    assert not any(alive(pid) for pid in pids.values())
    printed = capfd.readouterr()
    assert "on stdout" in printed.err
    assert "on stdout" not in printed.out
    await controller.aclose()


async def test_a_worker_that_dies_is_started_again_under_its_name(bench):
    async with bench.controller(SERVES, workers=2) as controller:
        await controller.ready()
        other, victim = controller.pids["n-1"], controller.pids["n-2"]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: controller.pids.get("n-2", victim) != victim)
        await controller.ready()
        assert bench.pids("n-2") == [victim, controller.pids["n-2"]]
        assert controller.pids["n-1"] == other


async def test_a_worker_that_stands_still_is_killed_and_started_again(bench):
    body = """
ready()
while True:
    time.sleep(0.05)
    link.send(b"\\n")
"""
    async with bench.controller(body, silence_s=1.5) as controller:
        await controller.ready()
        victim = controller.pids["n-1"]
        os.kill(victim, signal.SIGSTOP)
        await until(lambda: controller.pids.get("n-1", victim) != victim)
        assert not alive(victim)


KEEPS_STATE = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
link.send(b'{"failure": "", "keeps_state": true}\\n')
signal.pause()
"""


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if alive(child.pid)}


async def test_a_spare_takes_the_place_of_a_worker_that_dies_and_ends_with_the_controller(bench):
    before = children()
    async with bench.controller(KEEPS_STATE, workers=2) as controller:
        await controller.ready()
        await until(lambda: len(children() - before) == 3)
        (spare,) = children() - before - set(controller.pids.values())
        os.kill(controller.pids["n-2"], signal.SIGKILL)
        await until(lambda: controller.pids.get("n-2") == spare)
        await until(lambda: len(children() - before) == 3)
    assert children() <= before


async def test_a_spare_that_was_killed_is_replaced_or_done_without(bench):
    before = children()
    async with bench.controller(KEEPS_STATE) as controller:
        await controller.ready()
        await until(lambda: len(children() - before) == 2)
        victim = controller.pids["n-1"]
        (spare,) = children() - before - {victim}
        os.kill(spare, signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: controller.pids.get("n-1") not in (None, victim, spare))
        await controller.ready()


async def test_drain_waits_for_what_has_begun(bench):
    body = """
def finish(*_):
    open(order["app"] + ".finished", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, finish); ready(); signal.pause()
"""
    async with bench.controller(body) as controller:
        await controller.ready()
        await controller.drain()
        assert (bench.folder / "app.finished").exists()
        assert controller.phases == {"n-1": Phase.STOPPED}
        await controller.drain()


async def test_a_worker_that_does_not_drain_is_killed_with_what_it_started(bench):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
open(order["app"] + ".child", "w").write(str(child.pid))
ready()
while True: time.sleep(1)
"""
    async with bench.controller(body) as controller:
        await controller.ready()
        child = int((bench.folder / "app.child").read_text())
        pid = controller.pids["n-1"]
        await controller.drain(0.2)
        assert not alive(pid)
        await until(lambda: not alive(child))


async def test_an_app_that_cannot_be_loaded_is_not_tried_again(bench):
    async with bench.controller('fail("flow.py:3: no such module"); sys.exit(2)') as controller:
        with pytest.raises(ConfigError, match=r"^flow\.py:3: no such module$"):
            await controller.ready()
        with pytest.raises(ConfigError):
            await controller.failed()
        assert len(bench.pids("n-1")) == 1


async def test_a_crash_loop_is_given_up_with_its_reason(bench):
    async with bench.controller("sys.exit(7)") as controller:
        with pytest.raises(
            WorkerStartError, match="'n-1' is given up: it ended with code 7 before it served, 3 times"
        ) as caught:
            await controller.ready()
        assert caught.value.worker == "n-1"
        assert len(bench.pids("n-1")) == 3


async def test_a_start_that_hangs_is_ended(bench):
    async with bench.controller("time.sleep(1000)", start_timeout_s=0.5, max_failures=1) as controller:
        await until(lambda: controller.pids)
        (hung,) = controller.pids.values()
        with pytest.raises(WorkerStartError, match="signal 9 before it served"):
            await controller.ready()
        assert not alive(hung)


async def test_a_command_that_is_not_there(tmp_path):
    settings = Settings(broker=BrokerAccess(urls=("nats://127.0.0.1:1",)), node="n")
    limits = Limits(first_pause_s=0.01, max_failures=2)
    async with LocalController(tmp_path, settings, workers=1, limits=limits, command=("/absent",)) as controller:
        with pytest.raises(WorkerStartError, match="it cannot be started"):
            await controller.ready()


async def test_nonsense_on_the_link_harms_only_that_worker(bench):
    body = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
link.send(b"x" * 200_000 + b"\\n" if order["name"] == "n-1" else b'{"failure": ""}\\n')
signal.pause()
"""
    async with bench.controller(body, workers=2, start_timeout_s=4, max_failures=1) as controller:
        with pytest.raises(WorkerStartError, match="'n-1' is given up"):
            await controller.ready()
        assert controller.phases["n-2"] is Phase.READY


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
async def test_settings_are_not_on_the_command_line(bench):
    async with bench.controller(SERVES) as controller:
        await controller.ready()
        assert "secret" not in " ".join(psutil.Process(controller.pids["n-1"]).cmdline())


async def test_a_worker_that_is_added_changes_nothing_for_the_others(bench):
    body = "open(f\"{order['app']}.order.{order['name']}\", \"w\").write(json.dumps(order)); " + SERVES
    async with bench.controller(body, workers=1) as controller:
        await controller.ready()
        assert controller.add_worker("a") == "n-2"
        await until(lambda: controller.phases.get("n-2") is Phase.READY)
        os.kill(controller.pids["n-1"], signal.SIGKILL)
        await until(lambda: len(bench.pids("n-1")) == 2 and controller.phases["n-1"] is Phase.READY)
        orders = {name: json.loads((bench.folder / f"app.order.{name}").read_text()) for name in controller.names}
        assert [(order["workers"], order["agent"]) for order in orders.values()] == [(1, None), (1, "a")]
        await controller.drain()
