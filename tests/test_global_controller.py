"""Leaders, standbys and what they publish, in virtual time over a transport in memory."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from virtual_time import simulated
from waiting import until

from nalar_mq.actions import (
    Acts,
    Decided,
    Ranks,
    Refused,
    States,
    Unused,
    decode_decided,
    decode_decision,
    encode_decision,
)
from nalar_mq.address import Address, Subjects
from nalar_mq.changes import Changes, Tracked
from nalar_mq.columns import DONE, FEW_SLOTS, MOST_SLOTS, RUNNING, Named, Serves, decode_again, decode_report, encode_report
from nalar_mq.config import BrokerAccess
from nalar_mq.controllers.deciding import Reloaded, Trusted
from nalar_mq.controllers.global_controller import GlobalController
from nalar_mq.controllers.observer import Observer
from nalar_mq.controllers.overview import decode_overview
from nalar_mq.controllers.policies import LeastLoaded, ShortestRemaining
from nalar_mq.controllers.policy import Action, Kill, Policy, SetPriority, Weights, allow, kill, set_priority
from nalar_mq.controllers.policy_file import PolicyFile
from nalar_mq.controllers.view import View
from nalar_mq.errors import BrokerError, PolicyFailedError
from nalar_mq.memory_transport import Faults, MemoryHub, MemoryTransport
from nalar_mq.messages import Call
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.standing import Standing

LEASE_S = 3.0
SUBJECTS = Subjects("t")


class Worker:
    """A process that reports, answers when it is asked again, and obeys."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.changes = Changes(name, 7, f"node-{name}")
        self.changes.set_serves({"a": Serves("agent")})
        self.standing = Standing(name, 7)
        self.ranks: dict[str, int] = {}
        self.acts: list[Any] = []
        self.calls = 0
        self.wholes = 0
        self.transport: MemoryTransport

    async def join(self, hub: MemoryHub) -> Worker:
        self.transport = await hub.connect(self.name)
        self.acts_bucket = await self.transport.key_value(SUBJECTS.acts_bucket, ttl_s=LEASE_S)
        await self.transport.subscribe(SUBJECTS.again(self.name), lambda m: self._tell_all(m.data))
        await self.transport.subscribe(SUBJECTS.states, lambda m: self.standing.take_states(m.data))
        await self.transport.subscribe(SUBJECTS.ranks(self.name), lambda m: self._take_ranks(m.data))
        self.task = asyncio.get_running_loop().create_task(self._report())
        return self

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def call(self, session: str, agent: str = "a", state: int = 2) -> Tracked:
        self.calls += 1
        id = f"{self.name}-{self.calls}".encode().ljust(16, b".")
        return self.changes.begin(Call(id, agent, "run", b"", session=session), self.now, state)

    def _tell_all(self, data: bytes) -> None:
        assert decode_again(data).incarnation == 7
        self.wholes += 1
        self._send(self.changes.whole(self.now, 4_000))

    def _send(self, reports: Iterable[bytes]) -> None:
        for data in reports:
            self.transport.publish(SUBJECTS.report(self.name), data)

    def _take_ranks(self, data: bytes) -> None:
        taken = self.standing.take_ranks(data)
        if taken is not None:
            report, is_whole, ranks = taken
            if is_whole:
                self.ranks.clear()
            for slot, value in ranks:
                session = self.changes.session_at(slot, report)
                if session is not None:
                    self.ranks[session] = value

    async def _report(self) -> None:
        while True:
            self._send(self.changes.reports(self.now, 4_000))
            with contextlib.suppress(BrokerError):  # it is cut off
                entry = await self.acts_bucket.get("acts")
                if entry is not None and entry.value is not None:
                    self.acts += self.standing.take_acts(entry.value, lambda name: 7)
            await asyncio.sleep(0.2)


class Mind:
    """A policy whose mind can be changed."""

    def __init__(self, *wanted: Action) -> None:
        self.wanted: tuple[Action, ...] = wanted
        self.error: Exception | None = None

    def decide(self, view: View) -> Iterable[Action]:
        if self.error is not None:
            raise self.error
        return self.wanted


async def controller(hub: MemoryHub, name: str, policy: Policy) -> GlobalController:
    transport = await hub.connect(name)
    found = GlobalController(transport, SUBJECTS, Address(name, 1), Trusted(policy), lease_s=LEASE_S)
    await found.start()
    return found


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub(1)


async def states_kept(hub: MemoryHub) -> States:
    bucket = await (await hub.connect("reader")).key_value(SUBJECTS.control_bucket)
    entry = await bucket.get("states")
    assert entry is not None
    assert entry.value is not None
    return decode_decision(entry.value, States)


@simulated
async def test_states_are_told_and_kept_and_change_when_the_policy_changes_its_mind(hub: MemoryHub) -> None:
    mind = Mind(set_priority("s", 1, reason="why"))
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: worker.standing.states)
    assert worker.standing.states == (SetPriority("s", 1, "", "why"),)
    assert (await states_kept(hub)).states == worker.standing.states
    mind.wanted = (set_priority("s", 2),)
    await until(lambda: worker.standing.states == (SetPriority("s", 2),))
    number = (await states_kept(hub)).number
    await asyncio.sleep(5)
    assert (await states_kept(hub)).number == number
    assert [decision.states for decision in leader.governor.history if decision.states][-1] == worker.standing.states


@simulated
async def test_the_view_follows_reports_when_nobody_looks_at_it_and_stands_still_otherwise(hub: MemoryHub) -> None:
    async with Observer(await hub.connect("o"), SUBJECTS, lease_s=LEASE_S) as observer:
        worker = await Worker("w").join(hub)
        worker.call("s")
        await until(lambda: observer.waiting)
        assert not len(observer.view.futures)
        while not len(observer.view.futures):
            assert observer.collect()
            await asyncio.sleep(0.3)
        worker.call("s")
        await asyncio.sleep(1)
        assert observer.waiting
        assert len(observer.view.futures) == len(observer.view.live) == 1
        observer.release()
        assert len(observer.view.futures) == 2
        worker.call("s")
        await until(lambda: len(observer.view.futures) == 3)
        assert observer.collect() >= 2
        assert len(observer.view.live) == 3


@simulated
async def test_a_standby_takes_over_within_the_lease_and_what_held_holds_on(hub: MemoryHub) -> None:
    first, second = Mind(set_priority("s", 1)), Mind(set_priority("s", 1))
    worker = await Worker("w").join(hub)
    worker.call("s")
    one, other = await controller(hub, "c1", first), await controller(hub, "c2", second)
    await until(lambda: worker.standing.states and other.leader == "c1")
    assert one.is_leader
    assert not other.is_leader
    assert len(other.view.futures) == len(one.view.futures) == 1
    term = (await states_kept(hub)).term
    hub.kill("c1")
    second.error = PolicyFailedError("not yet")
    began_s = asyncio.get_running_loop().time()
    await until(lambda: other.is_leader)
    assert asyncio.get_running_loop().time() - began_s <= LEASE_S
    await other.until_round(other.rounds + 2)
    kept = await states_kept(hub)
    assert kept.term > term
    assert kept.states == worker.standing.states == (SetPriority("s", 1),)
    second.error, second.wanted = None, (set_priority("s", 9),)
    await until(lambda: worker.standing.states == (SetPriority("s", 9),))


@simulated
async def test_of_two_leaders_the_former_is_refused_everywhere(hub: MemoryHub) -> None:
    first, second = Mind(set_priority("s", 1)), Mind(set_priority("s", 2))
    worker = await Worker("w").join(hub)
    worker.call("s")
    one = await controller(hub, "c1", first)
    await until(lambda: one.is_leader and worker.standing.states)
    other = await controller(hub, "c2", second)
    await other.until_round(2)
    hub.pause("c1")
    first.wanted = (set_priority("s", 666), kill("w"))
    await until(lambda: other.is_leader and worker.standing.states == (SetPriority("s", 2),))
    hub.resume("c1")
    await until(lambda: one.leader == "c2")
    await asyncio.sleep(2 * LEASE_S)
    assert one.deposed
    assert not one.is_leader
    assert worker.standing.states == (await states_kept(hub)).states == (SetPriority("s", 2),)
    assert worker.acts == []


@simulated
async def test_what_a_former_leader_says_to_the_processes_is_refused_there(hub: MemoryHub) -> None:
    worker = await Worker("w").join(hub)
    worker.call("s")
    one = await controller(hub, "c1", ShortestRemaining())
    await until(lambda: worker.ranks)
    other = await controller(hub, "c2", ShortestRemaining())
    await other.until_round(2)
    hub.pause("c1")
    worker.call("t")
    await until(lambda: other.is_leader and "t" in worker.ranks)
    hub.resume("c1")
    await until(lambda: one.leader == "c2")
    states = States(1, 1, 99, (SetPriority("s", 666),))
    for record, take in (
        (states, worker.standing.take_states),
        (Ranks(1, 1, 99, 7, 9, True, b"", b""), worker.standing.take_ranks),
    ):
        before = worker.standing.refused["former leader"]
        assert not take(encode_decision(record))
        assert worker.standing.refused["former leader"] == before + 1
    assert worker.standing.take_acts(encode_decision(Acts(1, 1, 5, ())), lambda name: 7) == []


@simulated
async def test_acts_are_done_once_name_an_incarnation_and_end_with_the_lease(hub: MemoryHub) -> None:
    mind = Mind()
    one, other = await Worker("w1").join(hub), await Worker("w2").join(hub)
    await controller(hub, "c1", mind)
    await until(lambda: one.transport.is_connected)
    await asyncio.sleep(1)
    mind.wanted = (kill("w2", reason="it idles"),)
    await until(lambda: one.acts)
    mind.wanted = ()
    await asyncio.sleep(1)
    assert one.acts == other.acts == [Kill("w2", "", "it idles")]
    entry = await one.acts_bucket.get("acts")
    assert entry is not None
    orders = decode_decision(entry.value or b"", Acts).orders
    assert [order.incarnations for order in orders] == [{"w2": 7}]
    stranger = Standing("w3", 1)
    assert stranger.take_acts(entry.value or b"", lambda name: 8) == []
    assert stranger.refused["another incarnation"] == 1
    await asyncio.sleep(2 * LEASE_S)
    entry = await one.acts_bucket.get("acts")
    assert entry is not None
    assert decode_decision(entry.value or b"", Acts).orders == ()
    hub.kill("c1")
    await asyncio.sleep(2 * LEASE_S)
    assert await one.acts_bucket.get("acts") is None


@simulated
async def test_sessions_are_told_their_ranks_as_they_change(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", ShortestRemaining())
    futures = [worker.call(f"s{number}") for number in range(20)]
    await until(lambda: len(worker.ranks) == 20)
    for future in futures:
        worker.changes.end(future, DONE, worker.now)
    worker.call("new")
    await until(lambda: "new" in worker.ranks)
    await leader.until_round(leader.rounds + 40)
    assert set(worker.ranks) == {"new"}


@simulated
async def test_ranks_are_obeyed_by_a_process_that_was_silent_for_long(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", ShortestRemaining())
    for number in range(20):
        worker.call(f"s{number}")
        await leader.until_round(leader.rounds + 2)
    await until(lambda: len(worker.ranks) == 20)
    hub.cut("w")
    await until(lambda: "w" not in leader.view.workers)
    hub.restore("w")
    worker.call("new")
    await until(lambda: "w" in leader.view.workers)
    await leader.until_round(leader.rounds + 5)
    assert "new" in worker.ranks
    assert worker.standing.refused["late"] == 0


@simulated
async def test_ranks_of_a_former_leader_hold_no_more_when_its_successor_ranks_nothing(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", ShortestRemaining())
    worker.call("s")
    await until(lambda: worker.ranks)
    await leader.aclose()
    successor = await controller(hub, "c2", Mind())
    await until(lambda: successor.is_leader)
    await until(lambda: not worker.ranks)


@simulated
async def test_lost_doubled_and_late_reports_are_healed(hub: MemoryHub) -> None:
    workers = [await Worker(f"w{number}").join(hub) for number in range(4)]
    leader, standby = await controller(hub, "c1", LeastLoaded()), await controller(hub, "c2", LeastLoaded())
    hub.faults = Faults(drop=0.2, duplicate=0.2, reorder=0.2, delay_s=(0.0, 0.3))
    futures: list[tuple[Worker, Tracked]] = []
    for number in range(300):
        worker = workers[number % 4]
        futures.append((worker, worker.call(f"s{number % 30}")))
        if number % 3 == 0:
            owner, ended = futures.pop(number % len(futures))
            owner.changes.end(ended, DONE, owner.now)
        await asyncio.sleep(0.05)
    assert sum(worker.wholes for worker in workers)
    hub.faults = None
    await asyncio.sleep(5)
    for each in (leader, standby):
        assert not each.view.stale()
        assert len(each.view.futures) == len(futures)


@simulated
async def test_a_standby_that_comes_later_sees_everything(hub: MemoryHub) -> None:
    worker = await Worker("w").join(hub)
    for number in range(200):
        worker.call(f"s{number}")
    await controller(hub, "c1", LeastLoaded())
    await asyncio.sleep(2)
    later = await controller(hub, "c2", LeastLoaded())
    await until(lambda: len(later.view.futures) == 200, within_s=3.0)


@simulated
async def test_a_process_that_is_silent_is_forgotten(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", LeastLoaded())
    worker.call("s")
    await until(lambda: len(leader.view.futures))
    worker.task.cancel()
    await until(lambda: not len(leader.view.futures), within_s=4 * LEASE_S)
    assert not leader.view.workers


@simulated
async def test_a_policy_that_fails_leaves_everything_as_it_was(hub: MemoryHub) -> None:
    mind = Mind(set_priority("s", 1))
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: worker.standing.states)
    for error in (PolicyFailedError("it raised"), ZeroDivisionError("by zero")):
        mind.error = error
        await leader.until_round(leader.rounds + 3)
        assert str(error) in leader.governor.history[-1].error
        assert worker.standing.states == leader.governor.states == (SetPriority("s", 1),)
    mind.error = None
    mind.wanted = (set_priority("s", 2), set_priority("nobody", 1))
    await until(lambda: worker.standing.states == (SetPriority("s", 2),))
    assert [refusal.reason for refusal in leader.governor.history[-1].refusals] == ["there is no session 'nobody'"]


@simulated
async def test_without_the_broker_a_leader_stops_deciding_and_goes_on_afterwards(hub: MemoryHub) -> None:
    mind = Mind(set_priority("s", 1))
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: worker.standing.states)
    hub.cut("c1")
    await until(lambda: not leader.is_leader)
    await asyncio.sleep(10 * LEASE_S)
    mind.wanted = (set_priority("s", 2),)
    hub.restore("c1")
    await until(lambda: worker.standing.states == (SetPriority("s", 2),))


@simulated
async def test_states_that_the_broker_did_not_take_are_written_again(hub: MemoryHub) -> None:
    mind = Mind()
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: leader.is_leader and "s" in leader.view.sessions)
    await leader.until_round(leader.rounds + 2)
    mind.wanted = (set_priority("s", 3),)
    hub.cut("c1")
    await leader.until_round(leader.rounds + 2)
    hub.restore("c1")
    await until(lambda: worker.standing.states == (SetPriority("s", 3),))
    assert (await states_kept(hub)).states == worker.standing.states


@simulated
async def test_who_leaves_gives_up_the_lead_at_once(hub: MemoryHub) -> None:
    one, other = await controller(hub, "c1", LeastLoaded()), await controller(hub, "c2", LeastLoaded())
    await until(lambda: one.is_leader or other.is_leader)
    leader, standby = (one, other) if one.is_leader else (other, one)
    await leader.aclose()
    began_s = asyncio.get_running_loop().time()
    await until(lambda: standby.is_leader)
    assert asyncio.get_running_loop().time() - began_s < LEASE_S / 5
    await leader.aclose()


@simulated
async def test_weights_follow_the_queues(hub: MemoryHub) -> None:
    workers = [await Worker(name).join(hub) for name in ("w1", "w2")]
    await controller(hub, "c1", LeastLoaded())
    workers[0].changes.set_queues({"a": (3, 0)})
    await until(
        lambda: workers[1].standing.states == (Weights("a", ("w1", "w2"), (0.2, 1.0), "by what is queued and running"),)
    )


async def entries(hub: MemoryHub) -> list[Decided]:
    """The history, as anybody can read it."""
    reader = await hub.connect("historian")
    ledger = await reader.ledger(SUBJECTS.decisions_ledger, [SUBJECTS.decided])
    return [decode_decided(kept.data) for kept in await ledger.read(SUBJECTS.decided, limit=10_000)]


@simulated
async def test_the_history_tells_what_is_new_and_why_and_repeats_no_refusal(hub: MemoryHub) -> None:
    mind = Mind()
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: "s" in leader.view.sessions)
    mind.wanted = (set_priority("s", 1, reason="why"),)
    await until(lambda: worker.standing.states)
    mind.wanted = (kill("w", reason="it idles"), set_priority("nobody", 1))
    await leader.until_round(leader.rounds + 40)
    mind.error = ZeroDivisionError("by zero")
    await leader.until_round(leader.rounds + 40)
    found = await entries(hub)
    assert [(entry.controller, entry.policy, entry.term > 0) for entry in found] == [("c1", "Mind", True)] * len(found)
    assert found[0].took_lead
    assert [entry.began for entry in found if entry.began] == [(SetPriority("s", 1, "", "why"),)]
    assert [entry.ended for entry in found if entry.ended] == [(SetPriority("s", 1, "", "why"),)]
    refused = [refusal for entry in found for refusal in entry.refused]
    assert refused == [
        Refused("all of w stops", "'a' would have fewer than 1 instances"),
        Refused("session nobody has priority 1", "there is no session 'nobody'"),
    ]
    assert [entry.error for entry in found if entry.error] == ["ZeroDivisionError: by zero"]
    assert len(found) == 4


@simulated
async def test_the_history_tells_of_reports_that_could_not_be_used(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", LeastLoaded())
    await until(lambda: leader.view.workers and leader.is_leader)
    liar = await hub.connect("liar")
    for data in (b"nonsense", Changes("w", 7, "elsewhere").reports(worker.now, 4_000)[0]):
        for _ in range(5):
            liar.publish(SUBJECTS.report("liar"), data)
    liar.publish(SUBJECTS.report("w"), Changes("w", 7, "elsewhere").reports(worker.now, 4_000)[0])
    liar.publish(SUBJECTS.report("w"), Changes("w", 7, "node-w").reports(worker.now, 4_000)[0])
    await leader.until_round(leader.rounds + 10)
    told = {(unused.process, unused.error): unused for entry in await entries(hub) for unused in entry.reports}
    assert told["liar", "MalformedReportError"].count == 5
    assert told["liar", "ForgedReportError"] == Unused("liar", "ForgedReportError", "'liar' reports as 'w'", 5)
    assert told["w", "LateReportError"].count == 2
    assert worker.standing.states == ()


@simulated
async def test_the_history_tells_of_a_slot_that_would_take_too_much_room(hub: MemoryHub) -> None:
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", LeastLoaded())
    await until(lambda: leader.audit.recent)
    greedy, changes = await hub.connect("greedy"), Changes("greedy", 1, "n")
    changes.hold("a", "s")
    report = decode_report(changes.reports(worker.now, 4_000)[0])
    far = struct.pack("<I", MOST_SLOTS - 1)
    greedy.publish(SUBJECTS.report("greedy"), encode_report(msgspec.structs.replace(report, sessions=Named(far, ("s",)))))
    await leader.until_round(leader.rounds + 10)
    (told,) = [unused for entry in await entries(hub) for unused in entry.reports if unused.process == "greedy"]
    assert told.reason == (f"slot {MOST_SLOTS - 1} of sessions of a process that has taken 1 of them: {FEW_SLOTS} are the most")


@simulated
async def test_what_the_broker_does_not_keep_now_is_told_later(hub: MemoryHub) -> None:
    mind = Mind()
    worker, leader = await Worker("w").join(hub), await controller(hub, "c1", mind)
    worker.call("s")
    await until(lambda: leader.is_leader and "s" in leader.view.sessions)
    hub.cut("c1")
    await until(lambda: not leader.is_leader)
    hub.restore("c1")
    mind.wanted = (set_priority("s", 3, reason="back"),)
    await until(lambda: worker.standing.states)
    await leader.until_round(leader.rounds + 2)
    found = await entries(hub)
    assert [entry.term for entry in found if entry.took_lead] == sorted({entry.term for entry in found})
    assert found[-1].began == (SetPriority("s", 3, "", "back"),)


@simulated
async def test_the_leader_answers_what_it_sees(hub: MemoryHub) -> None:
    worker = await Worker("w").join(hub)
    asker = await hub.connect("asker")
    first, second = await controller(hub, "c1", LeastLoaded()), await controller(hub, "c2", LeastLoaded())
    for number in range(30):
        worker.call(f"s{number}")
        await asyncio.sleep(0.01)
    worker.changes.set_queues({"a": (30, 0)})
    leader = await until_one_leads(first, second)
    await until(lambda: len(leader.view.futures) == 30 and leader.audit.recent)
    answer = await asker.request(SUBJECTS.overview, b"", timeout_s=5.0)
    seen = decode_overview(answer.data)
    assert (seen.controller, seen.futures, seen.sessions) == (leader.leader, 30, 30)
    assert [(row.name, row.instances, row.queued) for row in seen.agents] == [("a", 1, 30)]
    assert [(row.name, row.workers) for row in seen.nodes] == [("node-w", ("w",))]
    assert [row.session for row in seen.waits] == [f"s{number}" for number in range(20)]
    assert {row.call for row in seen.waits} == {"a.run"}
    assert bytes.fromhex(seen.waits[0].future).startswith(b"w-1")
    assert any(entry.took_lead for entry in seen.decisions)


@simulated
async def test_a_new_leader_takes_nothing_back_before_it_knows_who_is_there(hub: MemoryHub) -> None:
    workers = [await Worker(f"w{number}").join(hub) for number in range(3)]
    rule = allow("a", callers=("b",))
    first = await controller(hub, "c1", Mind(rule))
    await until(lambda: all(worker.standing.states == (rule,) for worker in workers))
    heard: list[States] = []
    listener = await hub.connect("listener")
    await listener.subscribe(SUBJECTS.states, lambda m: heard.append(decode_decision(m.data, States)))
    hub.kill("c1")
    hub.faults = Faults(drop=0.3)
    second = await controller(hub, "c2", Mind(rule))
    await until(lambda: second.is_leader and second.observer.is_informed)
    await second.until_round(second.rounds + 10)
    assert first.leader == "c1"
    assert (await states_kept(hub)).states == (rule,)
    assert {record.states for record in heard} <= {(rule,)}
    assert not [refusal for decision in second.governor.history for refusal in decision.refusals]


async def until_one_leads(*controllers: GlobalController) -> GlobalController:
    await until(lambda: any(each.is_leader for each in controllers))
    return next(each for each in controllers if each.is_leader)


async def test_a_file_that_loops_or_breaks_leaves_everything_as_it_was_and_is_loaded_again(tmp_path: Path) -> None:
    def write(body: str) -> None:
        (tmp_path / "mine.py").write_text(
            f"from nalar_mq.controllers.policy import set_priority\n\nclass Mine:\n    def decide(self, view):\n{body}\n"
        )

    hub = MemoryHub(1)
    write("        return [set_priority('s', 1)]")
    file = PolicyFile(f"{tmp_path / 'mine.py'}:Mine", deadline_s=2.5)
    worker = await Worker("w").join(hub)
    worker.call("s")
    transport = await hub.connect("c1")
    async with GlobalController(transport, SUBJECTS, Address("c1", 1), Reloaded(file), lease_s=LEASE_S) as leader:
        await until(lambda: worker.standing.states == (SetPriority("s", 1),))
        for body, words in (("        while True: pass", "did not answer"), ("        return [", "cannot be imported")):
            write(body)
            await until(lambda words=words: words in leader.governor.history[-1].error)  # type: ignore[misc]
            assert worker.standing.states == (SetPriority("s", 1),)
            assert leader.is_leader
        write("        return [set_priority('s', 2)]")
        await until(lambda: worker.standing.states == (SetPriority("s", 2),))
    worker.task.cancel()


def test_rubbish_is_refused() -> None:
    standing = Standing("w", 1)
    assert not standing.take_states(b"rubbish")
    assert not standing.take_ranks(b"\x97\xcc\xeb\x01\x01\x01\x01\x01\xc3\xc4\x01a\xc4\x00")
    assert standing.take_acts(b"", lambda name: 1) == []
    assert standing.refused["unreadable"] == 3


async def test_the_same_over_a_real_broker(broker_access: BrokerAccess, namespace: str) -> None:
    subjects = Subjects(namespace)
    transports = [await NatsTransport.connect(broker_access, name=name) for name in ("c1", "w")]
    try:
        async with GlobalController(transports[0], subjects, Address("c1", 1), Trusted(ShortestRemaining())) as leader:
            changes, standing = Changes("w", 1, "n"), Standing("w", 1)
            changes.set_serves({"a": Serves("agent")})
            changes.begin(Call(bytes(16), "a", "run", b"", session="s"), 1.0, RUNNING)
            heard = asyncio.Event()
            ranks: list[tuple[int, int]] = []

            def on_ranks(message: Any) -> None:
                ranks.extend((standing.take_ranks(message.data) or (0, True, []))[2])
                heard.set()

            await transports[1].subscribe(subjects.ranks("w"), on_ranks)
            for data in changes.reports(1.0, 1 << 19):
                transports[1].publish(subjects.report("w"), data)
            async with asyncio.timeout(60):
                await heard.wait()
            assert [changes.session_at(slot, 9) for slot, _ in ranks] == ["s"]
            assert leader.is_leader
    finally:
        for transport in transports:
            await transport.aclose()
