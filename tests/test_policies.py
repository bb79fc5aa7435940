"""What the shipped policies make of small worlds."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
from views import World

from nalar_mq.columns import DONE, RUNNING, Serves
from nalar_mq.controllers import policies
from nalar_mq.controllers import policy as actions
from nalar_mq.controllers.guards import Guards
from nalar_mq.controllers.policies import (
    BudgetLimits,
    DeadlineFirst,
    FairShare,
    HeadOfLine,
    HighPriority,
    LeastLoaded,
    LongestFirst,
    Reallocation,
    SessionAffinity,
    ShortestRemaining,
)
from nalar_mq.controllers.policy import (
    Action,
    Kill,
    Limit,
    Migrate,
    Policy,
    Provision,
    Route,
    SetPriorities,
    SetPriority,
    Weights,
)
from nalar_mq.controllers.policy_file import PolicyFile
from nalar_mq.controllers.view import View


def decided(policy: Policy, view: View) -> list[Action]:
    """What a policy says, all of which the guards admit."""
    actions = list(policy.decide(view))
    assert Guards().check(view, actions, view.now).refusals == ()
    assert all(action.reason for action in actions)
    return actions


def order(policy: Policy, view: View, alike: int = 1) -> list[str]:
    """Sessions, those that go first at the head; `alike` of them have the same priority."""
    (ranked,) = decided(policy, view)
    assert isinstance(ranked, SetPriorities)
    names = [view.sessions.name(session) for session in ranked.sessions.tolist()]
    values = ranked.values.tolist()
    assert len(set(values)) == len(values) - alike + 1
    return sorted(names, key=lambda name: -values[names.index(name)])


def two_workers(**serves: Serves | None) -> World:
    world = World()
    world.worker("w1", "n1", **serves)
    world.worker("w2", "n2", **serves)
    return world


@pytest.mark.parametrize(
    ("queues", "weights"),
    [(((0, 1), (2, 1)), (1.0, 0.5)), (((9, 0), (0, 0)), (0.1, 1.0)), (((99, 0), (0, 0)), (0.1, 1.0))],
)
def test_least_loaded(queues: tuple[tuple[int, int], tuple[int, int]], weights: tuple[float, float]) -> None:
    world = two_workers(a=None)
    world.queue("w1", a=queues[0])
    world.queue("w2", a=queues[1])
    (action,) = decided(LeastLoaded(), world.tick())
    assert isinstance(action, Weights)
    assert (action.instances, action.weights) == (("w1", "w2"), weights)


@pytest.mark.parametrize("queues", [((0, 0), (0, 0)), ((0, 1), (0, 0)), ((3, 1), (3, 1)), ((50, 1), (49, 1))])
def test_least_loaded_says_nothing_while_all_can_follow_or_none_can(queues: tuple[tuple[int, int], tuple[int, int]]) -> None:
    world = two_workers(a=None)
    world.queue("w1", a=queues[0])
    world.queue("w2", a=queues[1])
    assert decided(LeastLoaded(), world.tick()) == []


def test_least_loaded_leaves_out_who_drains() -> None:
    world = two_workers(a=None)
    world.worker("w3", "n2", a=None)
    world.queue("w1", a=(3, 1))
    world.changes["w2"].set_draining()
    (action,) = decided(LeastLoaded(), world.tick())
    assert isinstance(action, Weights)
    assert action.instances == ("w1", "w3")


def behind_a_long_call(serves: Serves | None = None, ran_s: float = 5.0) -> World:
    world = two_workers(a=serves)
    world.call("w1", "a", "long", RUNNING)
    world.call("w1", "a", "long")
    world.queue("w1", a=(6, 1))
    for number in range(5):
        world.call("w1", "a", f"short-{number}")
        world.tick(ran_s / 5)
    world.tick()
    return world


def test_what_waits_behind_a_long_call_moves_the_longest_waiting_first() -> None:
    moves = decided(HeadOfLine(moves=3), behind_a_long_call().view)
    assert [(m.session, m.source, m.target) for m in moves if isinstance(m, Migrate)] == [
        (f"short-{number}", "w1", "w2") for number in range(3)
    ]


def test_nothing_moves_without_need_or_room() -> None:
    assert decided(HeadOfLine(running_s=60), behind_a_long_call().view) == []
    assert decided(HeadOfLine(), behind_a_long_call(Serves("agent", stateful=True)).view) == []
    assert decided(HeadOfLine(), behind_a_long_call(Serves("agent", concurrency=2)).view) == []
    world = behind_a_long_call()
    world.queue("w2", a=(3, 1))
    assert decided(HeadOfLine(), world.tick()) == []


ON_GPU = Serves("agent", resources={"gpu": 1.0})


def test_an_idle_agent_makes_room_and_a_busy_one_takes_it() -> None:
    world = World()
    world.worker("w1", "n1", {"gpu": (0.0, 2.0)}, idle=ON_GPU, other=None)
    world.worker("w2", "n2", idle=ON_GPU)
    world.worker("w3", "n1", busy=ON_GPU)
    world.queue("w3", busy=(5, 1))
    (stop,) = decided(Reallocation(), world.tick())
    assert isinstance(stop, Kill)
    assert (stop.instance, stop.agent) == ("w1", "idle")
    world.changes["w1"].set_serves({"other": Serves("agent")})
    (start,) = decided(Reallocation(), world.tick())
    assert isinstance(start, Provision)
    assert (start.agent, start.node) == ("busy", "n1")


@pytest.mark.parametrize(("busy", "idle"), [((0, 1), (0, 0)), ((9, 1), (1, 0))])
def test_no_instance_changes_hands_while_all_can_follow_or_none_idles(busy: tuple[int, int], idle: tuple[int, int]) -> None:
    world = two_workers(idle=ON_GPU)
    world.worker("w3", "n1", busy=ON_GPU)
    world.queue("w3", busy=busy)
    world.queue("w1", idle=idle)
    world.queue("w2", idle=idle)
    assert decided(Reallocation(), world.tick()) == []


@pytest.mark.parametrize("idle", [Serves("agent"), Serves("agent", resources={"cpu": 8.0})])
def test_no_instance_changes_hands_for_resources_that_it_does_not_have(idle: Serves) -> None:
    world = two_workers(idle=idle)
    world.worker("w3", "n1", busy=ON_GPU)
    world.queue("w3", busy=(9, 1))
    assert decided(Reallocation(), world.tick()) == []


def test_an_agent_that_nobody_serves_gets_an_instance_where_there_is_room() -> None:
    none_needed = Serves("agent", min_instances=0, resources={"gpu": 1.0})
    apps = {"left_out": none_needed, "free": Serves("agent"), "served": ON_GPU}
    world = World()
    world.worker("w1", "n1", {"gpu": (0.0, 1.0)}, apps, served=ON_GPU)
    assert decided(Reallocation(), world.tick()) == [], "there is no room"
    world.worker("w2", "n2", {"gpu": (0.0, 1.0)}, apps)
    (start,) = decided(Reallocation(), world.tick())
    assert isinstance(start, Provision)
    assert (start.agent, start.node) == ("left_out", "n2"), "not what reserves nothing: who does not serve that was told not to"
    world.changes["w2"].set_serves({"left_out": none_needed})
    assert decided(Reallocation(), world.tick()) == []


def test_what_is_left_on_nodes_is_found_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many agents are served by nobody, for want of room on each of many nodes."""
    world, left_out = World(), Serves("agent", min_instances=0, resources={"gpu": 1.0})
    apps = {f"left_out{number}": left_out for number in range(10)}
    for number in range(20):
        world.worker(f"w{number}", f"n{number}", {"gpu": (0.0, 1.0)}, apps, served=ON_GPU)
    view, nodes, asked = world.tick(), vars(View)["nodes"].fget, list[int]()

    def counted(view: View) -> object:
        asked.append(view.version)
        return nodes(view)

    monkeypatch.setattr(View, "nodes", property(counted))
    assert decided(Reallocation(), view) == []
    assert len(asked) <= 3


def test_the_last_instance_stays() -> None:
    world = World()
    world.worker("w1", "n1", idle=ON_GPU)
    world.worker("w2", "n1", busy=ON_GPU)
    world.queue("w2", busy=(9, 1))
    assert decided(Reallocation(), world.tick()) == []


def stages() -> World:
    """Sessions at an early and at a late stage of the same workflow."""
    world = two_workers(plan=None, write=None)
    for number in range(60):
        for agent, seconds in (("plan", 6.0), ("write", 2.0)):
            world.teach("w1", agent, seconds, f"before-{number}", times=1)
    world.call("w1", "write", "late")
    world.call("w1", "plan", "early")
    world.tick()
    return world


def test_late_stages_first() -> None:
    assert order(ShortestRemaining(), stages().view) == ["late", "early"]


def test_early_stages_first() -> None:
    assert order(LongestFirst(), stages().view) == ["early", "late"]


def test_every_live_future_is_ranked() -> None:
    world = two_workers(a=None)
    for number in range(200):
        world.call("w1", "a", f"s{number}")
    (ranked,) = decided(ShortestRemaining(), world.tick())
    assert isinstance(ranked, SetPriorities)
    assert len(ranked.sessions) == 200


def test_sessions_stay_where_they_have_been_unless_that_is_too_much() -> None:
    world = two_workers(a=None)
    world.call("w1", "a", "s1")
    world.call("w2", "a", "s2")
    world.queue("w2", a=(9, 1))
    routes = decided(SessionAffinity(), world.tick())
    assert [(r.session, r.instance) for r in routes if isinstance(r, Route)] == [("s1", "w1")]


def test_a_session_that_was_raised_goes_first_and_moves_to_where_there_is_room() -> None:
    world = two_workers(a=None)
    world.call("w1", "a", "other", RUNNING)
    world.call("w1", "a", "vip")
    first, move = decided(HighPriority("vip"), world.tick())
    assert isinstance(first, SetPriority)
    assert isinstance(move, Migrate)
    assert (first.session, first.value) == ("vip", 100)
    assert (move.source, move.target) == ("w1", "w2")
    world.queue("w2", a=(0, 1))
    assert len(decided(HighPriority("vip"), world.tick())) == 1
    assert decided(HighPriority("nobody"), world.view) == []


@pytest.mark.parametrize(("shares", "first"), [({}, "few"), ({"many": 10.0}, "many")])
def test_tenants_that_use_less_than_their_share_go_first(shares: dict[str, float], first: str) -> None:
    world = two_workers(a=None)
    for number in range(6):
        world.call("w1", "a", "m", tenant="many")
        if number < 2:
            world.call("w1", "a", "f", tenant="few")
    (ranked,) = decided(FairShare(shares), world.tick())
    assert isinstance(ranked, SetPriorities)
    best = ranked.sessions[np.argmax(ranked.values)]
    assert world.view.tenants[int(world.view.session_tenant[best])] == first


def test_who_can_wait_least_goes_first() -> None:
    world = stages()
    world.call("w1", "write", "soon", timeout_s=10.0)
    world.call("w1", "plan", "sooner for its work", timeout_s=12.0)
    world.call("w1", "write", "never")
    assert order(DeadlineFirst(), world.tick(), alike=3)[:2] == ["sooner for its work", "soon"]


def test_who_has_spent_the_budget_begins_nothing_more() -> None:
    world = two_workers(a=None, b=None)
    poor = world.call("w1", "a", "s1", tenant="poor")
    rich = world.call("w2", "a", "s2", tenant="rich")
    world.spend("w1", poor, 3.0)
    world.spend("w2", rich, 3.0)
    world.spend("w2", rich, 100.0, "usd")
    limits = decided(BudgetLimits({"poor": 3.0, "rich": 3.5}), world.tick())
    assert {(one.agent, one.tenant, one.running) for one in limits if isinstance(one, Limit)} == {
        ("a", "poor", 0),
        ("b", "poor", 0),
    }
    assert {one.reason for one in limits} == {"tenant 'poor' has spent 3 tokens"}
    world.spend("w2", rich, 4.0)
    limits = decided(BudgetLimits(per_session=5.0), world.tick())
    assert {(one.agent, one.session) for one in limits if isinstance(one, Limit)} == {("a", "s2"), ("b", "s2")}
    limits = decided(BudgetLimits(per_session=99.0, unit="usd"), world.tick())
    assert {one.reason for one in limits} == {"session 's2' has spent 99 usd"}


def test_a_job_that_has_spent_its_budget_and_no_other_begins_nothing_more() -> None:
    world = two_workers(a=None)
    dear = world.call("w1", "a", "shared", job="dear")
    cheap = world.call("w2", "a", "shared", job="cheap")
    world.spend("w1", dear, 60.0)
    world.spend("w2", dear, 50.0)
    world.spend("w2", cheap, 90.0)
    limits = decided(BudgetLimits(per_job=100.0), world.tick())
    assert {(one.agent, one.job, one.session) for one in limits if isinstance(one, Limit)} == {("a", "dear", "")}
    world.changes["w1"].end(dear, DONE, world.now)
    assert decided(BudgetLimits(per_job=100.0), world.tick()) == [], "nothing of it is left that could be limited"


async def test_the_policy_in_the_readme_does_what_it_says(tmp_path: Path) -> None:
    code = next(block for block in readme_blocks("python") if "class PaidFirst" in block)
    (tmp_path / "mine.py").write_text(code)
    file = PolicyFile(f"{tmp_path / 'mine.py'}:Mine")
    await file.load()
    world = two_workers(report=Serves("workflow", concurrency=2))
    world.call("w1", "report", "paid-ann")
    world.call("w1", "report", "bob")
    assert await file.decide(world.tick()) == [SetPriority("paid-ann", 10, "", "it is paid for")]
    world.queue("w1", report=(20, 2))
    world.queue("w2", report=(20, 2))
    assert Limit("report", 4, "", "", "the others have to get on, too") in await file.decide(world.tick())


def readme_blocks(language: str) -> list[str]:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


def test_the_page_on_policies_names_what_there_is() -> None:
    page = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    shipped = [
        name for name, found in vars(policies).items() if inspect.isclass(found) and found.__module__ == policies.__name__
    ]
    words = [*shipped, *(name for name in actions.__all__ if name.islower() and name != "by_rank")]
    assert len(words) > 15
    assert [word for word in words if f"`{word}" not in page] == []


def test_each_policy_can_be_read_at_one_look() -> None:
    def size(policy: type) -> int:
        return len([line for line in inspect.getsource(policy).splitlines() if line.strip()])

    assert size(LeastLoaded) + size(HeadOfLine) + size(Reallocation) < 100
    for policy in (
        ShortestRemaining,
        LongestFirst,
        SessionAffinity,
        HighPriority,
        FairShare,
        DeadlineFirst,
        BudgetLimits,
    ):
        assert size(policy) <= 20, policy


def test_the_default_works_on_nothing() -> None:
    assert decided(policies.default(), View()) == []
    for policy in (ShortestRemaining(), LongestFirst(), SessionAffinity(), FairShare(), DeadlineFirst(), BudgetLimits()):
        for action in policy.decide(View()):
            assert isinstance(action, SetPriorities)
            assert not len(action.sessions)
    assert all(map(math.isinf, BudgetLimits().most))
