"""What policies may say, what becomes of it, and what happens to those that misbehave."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from views import World
from waiting import PATIENCE_S, until

from nalar_mq.columns import RUNNING, Serves
from nalar_mq.controllers.deciding import Reloaded
from nalar_mq.controllers.guards import Bounds, Guards
from nalar_mq.controllers.policy import (
    Act,
    Action,
    Composed,
    Kill,
    Limit,
    Migrate,
    Provision,
    Route,
    SetPriorities,
    SetPriority,
    Weights,
    allow,
    by_rank,
    kill,
    limit,
    migrate,
    provision,
    route,
    set_priority,
)
from nalar_mq.controllers.policy_file import PolicyFile
from nalar_mq.controllers.view import View
from nalar_mq.errors import ConfigError, PolicyFailedError, PolicyLoadError, PolicyTimeoutError


class Says:
    def __init__(self, *actions: Action) -> None:
        self._actions = actions

    def decide(self, view: View) -> Iterable[Action]:
        return self._actions


def test_both_forms_of_route() -> None:
    assert route("s", "a", "w1", reason="r") == Route("s", "a", "w1", "r")
    assert route("a", ["w1", "w2"], [1, 3]) == Weights("a", ("w1", "w2"), (1.0, 3.0))
    with pytest.raises(TypeError, match="session"):
        route("s", "a", [1.0])  # type: ignore[call-overload]


def test_both_forms_of_set_priority() -> None:
    assert set_priority("s", 3) == SetPriority("s", 3, "")
    assert set_priority("s", 3, "a") == SetPriority("s", 3, "a")


def test_of_policies_that_speak_about_the_same_the_later_is_heard() -> None:
    both = Composed(Says(set_priority("s", 1), kill("w1")), Says(set_priority("s", 2), set_priority("s", 3, "a")))
    assert list(both.decide(View())) == [set_priority("s", 2), kill("w1"), set_priority("s", 3, "a")]


def test_priorities_of_many_are_composed_session_by_session() -> None:
    first = SetPriorities(np.array([0, 1], np.int32), np.array([5, 5], np.int32), "one")
    later = SetPriorities(np.array([1, 2], np.int32), np.array([7, 7], np.int32), "other")
    (found,) = Composed(Says(first), Says(later)).decide(View())
    assert isinstance(found, SetPriorities)
    assert dict(zip(found.sessions.tolist(), found.values.tolist(), strict=True)) == {0: 5, 1: 7, 2: 7}
    assert found.reason == "one; other"


def test_ranks_become_priorities_of_sessions() -> None:
    world = World()
    world.worker("w1", a=None)
    for number in range(8):
        world.call("w1", "a", f"s{number % 4}", id=bytes([number + 1]) * 16)
    view = world.tick()
    keys = np.array([bytes_of(view, row)[0] for row in view.live], np.float64)  # 1 to 8: s0 has 1 and 5, s3 has 4 and 8
    ranked = by_rank(view, keys, levels=8)
    by_name = {view.sessions.name(s): v for s, v in zip(ranked.sessions.tolist(), ranked.values.tolist(), strict=True)}
    assert by_name == {"s0": 7, "s1": 6, "s2": 5, "s3": 4}


def bytes_of(view: View, row: int) -> bytes:
    return int(view.futures.high[row]).to_bytes(8, "little")


def busy_world(max_instances: int | None = 3) -> World:
    world = World()
    plain = Serves("agent", max_instances=max_instances, resources={"gpu": 1.0})
    pinned = Serves("agent", stateful=True)
    world.worker("w1", "n1", {"gpu": (1.0, 2.0)}, a=plain, pinned=pinned)
    world.worker("w2", "n2", {"gpu": (1.0, 1.0)}, a=plain, pinned=pinned)
    world.worker("w3", "n2", lonely=None)
    world.call("w1", "a", "s1", RUNNING)
    world.changes["w1"].hold("a", "held")
    world.tick()
    return world


def test_the_last_instance_stays_though_none_is_asked_for() -> None:
    world = World()
    for name in ("w1", "w2"):
        world.worker(name, a=Serves("agent", min_instances=0))
    wanted = [kill("w1", "a"), kill("w2", "a"), kill("w2")]
    verdict = Guards().check(world.tick(), wanted, 100.0)
    assert verdict.acts == (kill("w1", "a"),)
    assert {reason for _, reason in verdict.refusals} == {"'a' would have fewer than 1 instances"}


def test_an_agent_goes_to_no_node_whose_app_does_not_have_it() -> None:
    world = World()
    world.worker("w1", "n1", able=("a", "b"), a=None, b=None)
    world.worker("w2", "n2", able=("b",), b=None)
    verdict = Guards().check(world.tick(), [provision("a", "n2")], 100.0)
    assert [refusal.reason for refusal in verdict.refusals] == ["the app of 'n2' has no 'a'"]
    world.worker("w3", "n2", able=("a", "b", "c"), b=None, c=None)
    view = world.tick()
    assert Guards().check(view, [provision("a", "n2")], 100.0).acts == (provision("a", "n2"),)
    assert [address.name for address in view.spare("a", "n2")] == ["w3"], "not the one that serves less and could not serve it"


def test_an_agent_that_nobody_serves_is_provisioned_where_an_app_has_it_and_there_is_room() -> None:
    slot = Serves("agent", min_instances=0, max_instances=1, resources={"slot": 1.0})
    full = Serves("agent", resources={"slot": 2.0})
    world = World()
    world.worker("w1", "n1", {"slot": (0.0, 2.0)}, {"a": slot, "b": full}, b=full)
    world.worker("w2", "n2", {"slot": (0.0, 1.0)}, {"a": slot, "c": slot}, c=slot)
    world.worker("w3", "n3", {"slot": (0.0, 1.0)}, {"a": slot})
    wanted = [provision("a", "n1"), provision("a", "n2"), provision("a", "n3"), provision("z", "n3"), kill("w2", "c")]
    view = world.tick()
    assert not view.serving("a")
    assert [view.has_room(node, "a") for node in ("n1", "n2", "n3")] == [False, False, True]
    verdict = Guards().check(view, wanted, 100.0)
    assert verdict.acts == (provision("a", "n3"),)
    assert [reason for _, reason in verdict.refusals] == [
        "'n1' has 0 of slot left, and 1 are needed",
        "'n2' has 0 of slot left, and 1 are needed",
        "no app has an agent 'z'",
        "'c' would have fewer than 1 instances",
    ]
    guards = Guards()
    assert guards.check(view, [provision("a", "n3")], 100.0).acts
    world.worker("w4", "n4", {"slot": (0.0, 1.0)}, {"a": slot})
    again = guards.check(world.tick(), [provision("a", "n4")], 101.0)
    assert [reason for _, reason in again.refusals] == ["'a' has its 1 instances"], "one has been promised"


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (route("s1", "a", "w2"), ""),
        (route("s9", "a", "w2"), "no session 's9'"),
        (route("s1", "b", "w2"), "nobody serves an agent 'b'"),
        (route("s1", "a", "w9"), "no worker 'w9'"),
        (route("s1", "a", "w3"), "'w3' does not serve 'a'"),
        (route("held", "a", "w1"), ""),
        (route("held", "a", "w2"), "has to be migrated"),
        (route("a", ["w1", "w2"], [1, 3]), ""),
        (route("a", ["w1", "w2"], [1]), "as many weights"),
        (route("a", [], []), "as many weights"),
        (route("a", ["w1"], [float("nan")]), "weights have to be"),
        (route("a", ["w1", "w2"], [0, 0]), "weights have to be"),
        (route("a", ["w1", "w9"], [1, 1]), "no worker 'w9'"),
        (set_priority("s1", 5), ""),
        (set_priority("s1", 5, "a"), ""),
        (set_priority("s1", 5, "b"), "nobody serves"),
        (set_priority("s9", 5), "no session"),
        (set_priority("s1", 5_000), "priorities are from"),
        (set_priority("s1", 1.5), "expected `int`|Expected `int`"),  # type: ignore[arg-type]
        (set_priority(None, 1), "Expected `str`"),  # type: ignore[arg-type]
        (SetPriorities(np.array([0]), np.array([1])), ""),
        (SetPriorities(np.array([900]), np.array([1])), "no session of such a number"),
        (SetPriorities(np.array([0]), np.array([5000])), "priorities are from"),
        (SetPriorities(np.array([0]), np.array([1, 2])), "as many values"),
        (SetPriorities(np.array([0]), np.array([1.5])), "integers"),
        (SetPriorities([0], [1]), "arrays"),  # type: ignore[arg-type]
        (limit("a", 0, session="s1"), ""),
        (limit("a", -1), "0 is the least"),
        (limit("a", 1, session="s9"), "no session"),
        (limit("a", 0, tenant="acme", refuses=True), ""),
        (limit("a", 1, tenant="acme", refuses=True), "refused"),
        (limit("a", 0, job="nowhere"), "no job 'nowhere'"),
        (allow("a", tenants=["acme"]), ""),
        (allow("b"), "nobody serves"),
        (migrate("s1", "a", "w1", "w2"), ""),
        (migrate("s1", "a", "w1", "w1"), "both ends"),
        (migrate("s1", "a", "w9", "w2"), "no worker 'w9'"),
        (migrate("s1", "pinned", "w1", "w2"), "never move"),
        (migrate("held", "a", "w2", "w1"), "is at 'w1', not at 'w2'"),
        (kill("w2"), ""),
        (kill("w9"), "no worker"),
        (kill("w3"), "fewer than 1 instances"),
        (kill("w1", "lonely"), "does not serve"),
        (provision("a", "n1"), ""),
        (provision("a", "n2"), "0 of gpu left, and 1 are needed"),
        (provision("a", "n9"), "no node 'n9'"),
        (provision("b", "n1"), "no app has an agent 'b'"),
        ("kill w2", "str is no action"),
    ],
)
def test_actions_are_admitted_or_refused_with_a_reason(action: Action, words: str) -> None:
    verdict = Guards().check(busy_world().view, [action], 100.0)
    admitted = [*verdict.states, *verdict.acts]
    if words:
        ((_, reason),) = verdict.refusals
        assert re.search(words, reason), reason
        assert not admitted
    else:
        assert admitted == [action], verdict.refusals


def test_what_has_been_promised_counts() -> None:
    view = busy_world().view
    verdict = Guards().check(view, [provision("a", "n1"), kill("w2"), kill("w1"), route("s1", "a", "w2")], 100.0)
    assert verdict.acts == (provision("a", "n1"), kill("w2"))
    assert [reason for _, reason in verdict.refusals] == [
        "'a' would have fewer than 1 instances",
        "'w2' is about to stop",
    ]


def test_an_instance_that_drains_is_not_one_that_is_left() -> None:
    world = busy_world()
    world.changes["w1"].set_draining()
    verdict = Guards().check(world.tick(), [kill("w2")], 100.0)
    assert [reason for _, reason in verdict.refusals] == ["'a' would have fewer than 1 instances"]
    assert Guards().check(world.view, [kill("w1")], 100.0).refusals == ()


@pytest.mark.parametrize(("most", "words"), [(3, "has its 3 instances"), (None, "0 of gpu left")])
def test_an_instance_that_starts_is_counted_until_it_should_be_there(most: int | None, words: str) -> None:
    guards, view, act = Guards(Bounds(cooldown_s=0.0, settling_s=30.0)), busy_world(most).view, provision("a", "n1")
    assert guards.check(view, [act], 100.0).acts
    assert words in guards.check(view, [act], 101.0).refusals[0].reason
    assert guards.check(view, [act], 131.0).acts


@pytest.mark.parametrize("act", [migrate("s1", "a", "w1", "w2"), kill("w2")])
def test_the_same_act_is_not_done_again_at_once(act: Act) -> None:
    rests = {"rest_s": 10.0, "cooldown_s": 0.0} if isinstance(act, Migrate) else {"rest_s": 0.0, "cooldown_s": 10.0}
    guards, view = Guards(Bounds(**rests, settling_s=0.0)), busy_world().view
    assert guards.check(view, [act], 100.0).acts == (act,)
    assert "not again within 10 s" in guards.check(view, [act], 105.0).refusals[0].reason
    assert guards.check(view, [act], 110.0).acts == (act,)


def test_what_was_promised_counts_until_it_can_be_seen() -> None:
    guards, world = Guards(Bounds(settling_s=30.0)), busy_world(None)
    act = provision("a", "n1")
    assert guards.check(world.view, [act], 100.0).acts == (act,)
    assert "left" in guards.check(world.view, [act], 101.0).refusals[0].reason
    world.worker("w9", "n1", a=world.view.agents["a"])
    world.changes["w1"].set_resources({"gpu": (0.0, 4.0)})
    assert guards.check(world.tick(), [act], 102.0).acts == (act,)


def test_only_so_many_acts_in_a_while() -> None:
    guards = Guards(Bounds(migrations=3, window_s=60.0))
    world = busy_world()
    for number in range(5):
        world.call("w1", "a", f"t{number}")
    view = world.tick()
    moves = [migrate(f"t{number}", "a", "w1", "w2") for number in range(5)]
    verdict = guards.check(view, moves, 100.0)
    assert (len(verdict.acts), len(verdict.refusals)) == (3, 2)
    assert guards.check(view, moves[3:], 161.0).acts == tuple(moves[3:])


def test_a_flood_ends() -> None:
    def flood() -> Iterable[Action]:
        while True:
            yield set_priority("s1", 1)

    verdict = Guards(Bounds(actions=100)).check(busy_world().view, flood(), 100.0)
    assert verdict.states == (set_priority("s1", 1),)
    assert verdict.refusals[0].reason == "more than 100 actions in one answer"


# Policies of users.

GOOD = """
from nalar_mq.controllers.policy import kill, set_priority

class Mine:
    def decide(self, view):
        yield set_priority("s", 1, reason="first")
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    return file


async def test_a_policy_in_a_file_decides(tmp_path: Path) -> None:
    policy = PolicyFile(f"{written(tmp_path, GOOD)}:Mine")
    await policy.load()
    assert await policy.decide(View()) == [set_priority("s", 1, reason="first")]


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (None, "Mine", "cannot be read"),
        ("class Mine(:", "Mine", r"cannot be imported: .*line 1"),
        ("import nothing_like_it", "Mine", r"cannot be imported: ModuleNotFoundError: .*line 1"),
        ("x = 1\n\nraise SystemExit(3)", "Mine", r"cannot be imported: SystemExit: 3 \(line 3\)"),
        (GOOD, "Mien", "did you mean 'Mine'"),
        ("Mine = 3", "Mine", "no method `decide"),
        ("class Mine:\n  def __init__(self, x): ...", "Mine", "takes arguments: make it there"),
        ("while True: pass", "Mine", "did not answer within 0.5 s"),
    ],
)
async def test_what_is_no_policy_is_refused(tmp_path: Path, text: str | None, name: str, words: str) -> None:
    file = tmp_path / "mine.py" if text is None else written(tmp_path, text)
    policy = PolicyFile(f"{file}:{name}", deadline_s=0.5 if "did not answer" in words else PATIENCE_S)
    with pytest.raises(PolicyLoadError, match=words) as caught:
        await policy.load()
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("where", ["mine.py", "mine.py:", ":Mine", "mine.py:no name"])
def test_a_place_that_names_no_policy(where: str) -> None:
    with pytest.raises(PolicyLoadError, match=r"FILE\.py:Name"):
        PolicyFile(where)


async def test_an_exception_is_contained_and_told_with_its_line(tmp_path: Path) -> None:
    policy = PolicyFile(f"{written(tmp_path, GOOD.replace('1, reason', '1 / 0, reason'))}:Mine")
    await policy.load()
    with pytest.raises(PolicyFailedError, match=r"ZeroDivisionError: division by zero \(line 6\)"):
        await policy.decide(View())


async def hurried(tmp_path: Path, text: str, deadline_s: float) -> PolicyFile:
    """A policy that may take its time to be loaded, and has that long for each answer until it is loaded again."""
    policy = PolicyFile(f"{written(tmp_path, text)}:Mine", deadline_s=PATIENCE_S)
    await policy.load()
    policy._contained._deadline_s = deadline_s
    return policy


LOOPING = """
class Mine:
    calls = 0

    def decide(self, view):
        self.calls += 1
        if self.calls > 1:
            return
        yield
        """
LOOPS = [
    "while True: pass",
    "import itertools\n        for _ in itertools.count(): pass",
    """while True:
            try:
                sum(range(100))
            except Exception:
                pass""",
]


@pytest.mark.parametrize("loop", LOOPS)
async def test_an_endless_loop_is_ended_and_the_policy_asked_again(tmp_path: Path, loop: str) -> None:
    policy = await hurried(tmp_path, LOOPING + loop, 0.5)
    with pytest.raises((PolicyTimeoutError, PolicyFailedError)):
        await policy.decide(View())
    await until(lambda: not policy.is_stuck)

    async def answers() -> bool:
        with contextlib.suppress(PolicyTimeoutError):
            return await policy.decide(View()) == []
        return False

    await until(answers)


async def test_one_that_takes_too_long_is_left_alone_for_a_while(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    asked.touch()
    text = f"""
class Mine:
    def decide(self, view):
        with open({str(asked)!r}, "a") as file:
            file.write("x")
        while True: pass
"""
    reloaded = Reloaded(await hurried(tmp_path, text, 0.05))
    for _ in range(100):
        with pytest.raises(PolicyTimeoutError, match="did not answer within"):
            await reloaded.decide(View())
    assert len(asked.read_text()) < 10
    written(tmp_path, GOOD)
    assert await reloaded.decide(View()) == [set_priority("s", 1, reason="first")]


async def test_a_file_that_cannot_be_loaded_again_is_told_while_the_former_policy_decides(tmp_path: Path) -> None:
    file = PolicyFile(f"{written(tmp_path, GOOD)}:Mine")
    await file.load()
    reloaded = Reloaded(file)
    written(tmp_path, "policy of mine")
    with pytest.raises(PolicyLoadError):
        await reloaded.decide(View())
    assert await reloaded.decide(View()) == [set_priority("s", 1, reason="first")]
    assert "cannot be imported" in reloaded.trouble
    written(tmp_path, GOOD)
    assert await reloaded.decide(View()) == [set_priority("s", 1, reason="first")]
    assert reloaded.trouble == ""


async def test_one_that_cannot_be_ended_is_not_asked_again_until_its_file_changes(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    text = f"import os\nclass Mine:\n    def decide(self, view):\n        os.read({reading}, 1)\n        return []\n"
    policy = await hurried(tmp_path, text, 1.0)
    try:
        for _ in range(2):
            with pytest.raises(PolicyTimeoutError):
                await policy.decide(View())
        assert policy.is_stuck
        written(tmp_path, GOOD)
        assert policy.has_changed()
        await policy.load()
        assert await policy.decide(View()) == [set_priority("s", 1, reason="first")]
    finally:
        os.write(writing, b"x")
        os.close(writing)
        os.close(reading)


async def test_a_changed_file_is_loaded_again_and_a_broken_one_leaves_the_former_policy(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    policy = PolicyFile(f"{file}:Mine")
    await policy.load()
    assert not policy.has_changed()
    written(tmp_path, GOOD.replace("first", "second one"))
    assert policy.has_changed()
    await policy.load()
    assert await policy.decide(View()) == [set_priority("s", 1, reason="second one")]
    written(tmp_path, "class Mine(:")
    assert policy.has_changed()
    with pytest.raises(PolicyLoadError):
        await policy.load()
    assert not policy.has_changed()
    assert await policy.decide(View()) == [set_priority("s", 1, reason="second one")]


def test_names_of_the_primitives() -> None:
    assert [type(action) for action in (migrate("s", "a", "w", "v"), kill("w"), provision("a", "n"), limit("a", 1))] == [
        Migrate,
        Kill,
        Provision,
        Limit,
    ]
