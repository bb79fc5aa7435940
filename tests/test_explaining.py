"""What is told of one call, from what its processes remember and from the history of decisions."""

from __future__ import annotations

import pytest

from nalar_mq.actions import Allow, Decided, Kill, Limit, Migrate, Refused, Route, SetPriority, State, Weights
from nalar_mq.controllers.explaining import explained
from nalar_mq.errors import UnknownCallError
from nalar_mq.lookout import Glance, View
from nalar_mq.messages import CallRecord, Explanation

ID = b"i" * 16


def record(arrived_s: float, began_s: float = 0.0, ended_s: float = 0.0, *, id: bytes = ID, state: str = "done") -> CallRecord:
    return CallRecord(id, b"", "writer", "write", "ann", "", "client", 0, 0, arrived_s, began_s, ended_s, state)


def decided(at_s: float, *began: State, ended: tuple[State, ...] = ()) -> Decided:
    return Decided(version=1, controller="c", term=1, at_s=at_s, began=began, ended=ended)


def told(history: list[Decided], *views: View) -> list[tuple[float, str, str, str]]:
    steps = explained(ID, views, history).steps
    assert [step.at_s for step in steps] == sorted(step.at_s for step in steps)
    return [(step.at_s, step.where, step.what, step.reason) for step in steps]


def test_its_life_is_told_on_one_clock() -> None:
    first = View(
        "w1", Glance(0), ahead_s=100.0, records=(record(1.0, state="cancelled", ended_s=2.0), record(0.0, id=b"o" * 16))
    )
    second = View(
        "w2", Glance(0), ahead_s=50.0, records=(record(53.0, 54.0, 55.0),), explanations=(Explanation(53.5, "moved", "room"),)
    )
    owner = View("client", Glance(0), ahead_s=0.0, explanations=(Explanation(100.5, "sent to w1", "by weights"),))
    assert told([], second, first, owner) == [
        (100.5, "client", "sent to w1", "by weights"),
        (101.0, "w1", "came from client, priority 0", ""),
        (102.0, "w1", "cancelled", ""),
        (103.0, "w2", "came from client, priority 0", ""),
        (103.5, "w2", "moved", "room"),
        (104.0, "w2", "began after 1.000 s", ""),
        (105.0, "w2", "done", ""),
    ]


def test_of_the_decisions_those_count_that_held_while_it_was_there_and_were_about_it() -> None:
    route, other = Route("ann", "writer", "w1", "its home"), Route("bob", "writer", "w1")
    early, late = SetPriority("ann", 5, "", "she pays"), SetPriority("ann", 9, "", "she waits")
    gone, limit = Weights("writer", ("w1",), (1.0,), "it was so"), Limit("writer", 2, "bob")
    history = [
        decided(1.0, route, other, gone, limit, Allow("reader")),
        decided(2.0, early, ended=(gone,)),
        decided(12.0, late),
        decided(13.0, ended=(late,)),
        Decided(
            version=1,
            controller="c",
            at_s=14.0,
            acts=(Migrate("ann", "writer", "w1", "w2", "room"), Kill("w9"), Migrate("bob", "writer", "w1", "w2")),
            refused=(Refused("session ann has priority 2000", "too high"), Refused("session annabel has priority 2000", "")),
        ),
        decided(40.0, SetPriority("ann", 1)),
    ]
    steps = told(history, View("w1", Glance(0), records=(record(10.0, 20.0, 30.0),)))
    assert [step for step in steps if step[1] == "controller"] == [
        (1.0, "controller", "session ann of writer goes to w1", "its home"),
        (2.0, "controller", "session ann has priority 5", "she pays"),
        (12.0, "controller", "session ann has priority 9", "she waits"),
        (13.0, "controller", "no more: session ann has priority 9", ""),
        (14.0, "controller", "session ann of writer moves from w1 to w2", "room"),
        (14.0, "controller", "refused: session ann has priority 2000", "too high"),
    ]


def test_a_call_that_nobody_remembers_is_unknown() -> None:
    with pytest.raises(UnknownCallError, match=ID.hex()):
        explained(ID, [View("w1", Glance(0))], [])
