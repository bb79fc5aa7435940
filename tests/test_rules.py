"""Priorities, permissions, shares and explanations: the pure parts of obeying."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from nalar_mq.actions import Allow, Limit, Route, SetPriority, Weights
from nalar_mq.address import Address
from nalar_mq.explanations import Explanations
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Explanation, Member
from nalar_mq.placement import RoutingTable
from nalar_mq.rules import Admission, Priorities


def test_the_priority_of_a_session_is_the_nearest_that_was_given() -> None:
    rules = Priorities()
    assert rules.take_ranks([("s", 1), ("t", 2)], is_whole=False) == {"s", "t"}
    everywhere, here = SetPriority("s", 3), SetPriority("s", 4, "a")
    assert rules.take_states([everywhere, here]) == [everywhere, here]
    assert [rules.of("s", "a"), rules.of("s", "b"), rules.of("t", "a"), rules.of("u", "a")] == [4, 3, 2, None]
    assert rules.take_states([everywhere]) == [here]
    assert not rules.holds(here)
    assert rules.of("s", "a") == 3
    assert rules.take_states([]) == [everywhere]
    assert rules.of("s", "a") == 1
    assert rules.take_ranks([("s", None), ("s", None), ("t", 2)], is_whole=False) == {"s"}
    assert rules.take_ranks([("u", 5)], is_whole=True) == {"t", "u"}
    assert [rules.of(session, "a") for session in "stu"] == [None, None, 5]
    assert rules.take_states([SetPriority("u", 0)]) == [SetPriority("u", 0)]
    assert rules.of("u", "a") == 0, "a priority of 0 is one"


@pytest.mark.parametrize(
    ("agent", "caller", "tenant", "is_allowed"),
    [
        ("free", "anybody", "", True),
        ("paid", "anybody", "", False),
        ("paid", "ask", "", True),
        ("paid", "anybody", "acme", True),
        ("paid", "anybody", "other", False),
        ("closed", "ask", "acme", False),
        ("anonymous", "x", "", False),
    ],
)
def test_who_may_call_what(agent: str, caller: str, tenant: str, is_allowed: bool) -> None:
    rules = Admission()
    states = [Allow("paid", ("ask",), ("acme",)), Allow("closed"), Allow("anonymous", (), ("",))]
    assert rules.take_states(states) == dict.fromkeys(("paid", "closed", "anonymous"))
    assert (rules.rule_against(agent, caller, tenant) is None) is is_allowed
    assert rules.take_states(states[:2]) == {"anonymous": None}
    assert rules.take_states([]) == {"paid": None, "closed": None}
    assert not rules.has_rules


@pytest.mark.parametrize(
    ("whose", "is_refused"),
    [(("s", "", ""), False), (("s", "", "j"), True), (("s", "t", ""), True), (("q", "u", "k"), False), (("q", "t", "k"), True)],
)
def test_of_whom_no_calls_are_taken(whose: tuple[str, str, str], is_refused: bool) -> None:
    rules = Admission()
    states = [Limit("a", 0, job="j", refuses=True), Limit("a", 0, tenant="t", refuses=True), Limit("a", 0, "s")]
    assert rules.take_states(states[1:]) == {"a": {("", "t", "")}}
    assert rules.take_states(states) == {"a": {("", "", "j")}}
    assert rules.has_rules
    assert (rules.shut_by("a", *whose) is not None) is is_refused
    assert rules.shut_by("b", *whose) is None
    assert rules.take_states(states) == {}
    assert rules.take_states(states[2:]) == {}, "nothing more is refused than before"
    assert not rules.has_rules


def test_of_how_many_no_calls_are_taken_makes_no_difference_to_a_call() -> None:
    rules = Admission()
    rules.take_states([Limit("a", 0, f"s{number}", refuses=True) for number in range(100_000)])
    for number in range(100_000):
        assert rules.shut_by("a", f"t{number}", "", "") is None
    assert rules.shut_by("a", "s99999", "t", "j")


def table_of(*names: str, stateful: bool = False) -> RoutingTable:
    table = RoutingTable(Random(1))
    for name in names:
        table.join(name, Member(WIRE_VERSION, 1, "n", "worker", 1, {"a": ActorInfo("agent", {"m": ""}, stateful)}))
    return table


def test_sessions_that_begin_are_divided_by_shares_alike_at_everybody() -> None:
    names = ("w1", "w2", "w3")
    one, other = table_of(*names, stateful=True), table_of(*reversed(names), stateful=True)
    for table in (one, other):
        table.obey([Weights("a", names, (3.0, 1.0, 0.0)), Route("s7", "a", "w3", "why")])
    keys = [f"a.s{number}" for number in range(4000)]
    places = [one.rank("a", key) for key in keys]
    assert places == [other.rank("a", key) for key in keys]
    assert places[7] == Address("w3", 1)
    counts = Counter(place.name for place in places if place is not None)
    assert counts["w3"] == 1
    assert counts["w1"] / len(keys) == pytest.approx(0.75, abs=0.05)
    one.leave(Address("w1", 1))
    moved = [one.rank("a", key) for key, place in zip(keys, places, strict=True) if place != Address("w1", 1)]
    assert set(moved) == {Address("w2", 1), Address("w3", 1)}, "those of the others stay"


def test_where_no_instance_with_a_share_is_left_calls_go_as_if_there_were_none() -> None:
    table = table_of("w1", "w2")
    table.obey([Weights("a", ("w1", "gone"), (1.0, 1.0), "why")])
    assert {table.ordered("a", "s") for _ in range(10)} == {(Address("w1", 1), "why")}
    assert table.is_shut("a", "w2")
    table.leave(Address("w1", 1))
    assert table.ordered("a", "s") is None
    assert not table.is_shut("a", "w2")
    assert table.choose("a", {}) == Address("w2", 1)
    table.obey([Route("s", "a", "w1")])
    assert table.ordered("a", "s") is None, "it is not there"
    table.obey([])
    assert not table.is_governed


def test_a_few_calls_are_divided_as_they_should_be() -> None:
    table = table_of("w1", "w2", "w3", "w4")
    table.obey([Weights("a", ("w1", "w2", "w3", "w4"), (4.0, 3.0, 2.0, 1.0))])
    for _ in range(20):
        found = Counter(ordered[0].name for _ in range(40) if (ordered := table.ordered("a", "s")) is not None)
        assert all(abs(found[name] - 4 * share) <= 3 for name, share in (("w1", 4), ("w2", 3), ("w3", 2), ("w4", 1)))


def test_explanations_are_those_of_the_call_and_the_oldest_are_forgotten() -> None:
    notes = Explanations(kept=4)
    notes.note(1.0, "old", "", id=b"x")
    notes.note(2.0, "sent", "why", id=b"x")
    notes.note(3.0, "raised", "", session="s")
    notes.note(4.0, "limited", "", actor="a")
    notes.note(5.0, "moved", "", session="s", actor="b")
    assert notes.of_call(b"x") == [Explanation(2.0, "sent", "why")]
    assert [note.what for note in notes.of_session("s", "a", 9.0)] == ["raised", "limited"]
    assert [note.what for note in notes.of_session("s", "b", 9.0)] == ["raised", "moved"]
    assert [note.what for note in notes.of_session("s", "b", 4.0)] == ["raised"]
    assert notes.of_session("t", "c", 9.0) == []
