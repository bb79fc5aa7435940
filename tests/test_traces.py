"""The tree of a run, made of what workers remember."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.errors import UnknownCallError
from nalar_mq.lookout import Glance, View
from nalar_mq.messages import CallRecord
from nalar_mq.traces import WIDTH, Trace, lines_of, trace_of

NODES = {"w1": "here", "w2": "there", "here-1": "here"}


def record(id: str, parent: str = "", at: float = 10.0, **fields: Any) -> CallRecord:
    """A call whose id is made of one letter; it waits for 1 s and runs for 2 s unless told otherwise."""
    known = {"actor": id, "method": "", "session": "s", "job": "", "owner": "c", "priority": 0, "attempt": 0, "state": "done"}
    times = {"began_s": at + 1.0, "ended_s": at + 3.0}
    return CallRecord(_id(id), _id(parent), arrived_s=at, **(known | times | fields))


def _id(name: str) -> bytes:
    return name.encode() * 16


def view(name: str, *records: CallRecord, ahead_s: float = 0.0, now_s: float = 50.0) -> View:
    return View(name, Glance(0), now_s, ahead_s, records)


def shape(trace: Trace) -> str:
    return " ".join(f"{'-' * call.depth}{call.name}" for call in trace.calls)


ONE_RUN = [
    view("w1", record("a"), record("d", "b", 13), record("c", "a", 12)),
    view("w2", record("b", "a", 1011), record("e", "c", 1014), ahead_s=-1000.0),
]


@pytest.mark.parametrize("wanted", [_id(name).hex() for name in "abcde"] + [_id("b").hex().upper(), "s", ""])
def test_a_run_is_shown_from_its_root_whichever_of_its_calls_is_named(wanted: str) -> None:
    trace = trace_of(wanted, ONE_RUN, NODES)
    assert shape(trace) == "a -b --d -c --e"
    assert [call.start_s for call in trace.calls] == [0, 1, 3, 2, 4], "clocks of two machines are brought together"
    assert [call.worker for call in trace.calls] == ["w1", "w2", "w1", "w1", "w2"]
    assert {(call.waited_s, call.ran_s) for call in trace.calls} == {(1.0, 2.0)}


CHOICES = [
    ("a session in two runs", "t", [record("a", session="t"), record("b", session="t", at=9), record("c")], "b a"),
    ("a job, run twice", "j", [record("a", job="j"), record("b", "a", 11, job="j"), record("c", job="j", at=12)], "a -b c"),
    ("a session that begins below the root", "t", [record("a"), record("b", "a", session="t")], "a -b"),
    ("the run that began last, not the last call", "", [record("a", at=1), record("b", at=5), record("c", "a", 9)], "b"),
    ("a maker that is forgotten", _id("b").hex(), [record("b", "a"), record("c", "b", 11)], "b -c"),
    ("in the order of arrival", "s", [record("a"), record("c", "a", 12), record("b", "a", 11)], "a -b -c"),
    ("two that made each other", "s", [record("a", "b"), record("b", "a")], "a -b"),
    ("one that made itself", "s", [record("a", "a")], "a"),
]


@pytest.mark.parametrize(("wanted", "records", "expected"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_what_is_shown(wanted: str, records: list[CallRecord], expected: str) -> None:
    assert shape(trace_of(wanted, [view("w1", *records)], NODES)) == expected


def test_of_several_records_of_a_call_the_last_one_counts() -> None:
    live = record("a", state="running", ended_s=0.0)
    first = record("b", state="failed", attempt=0, ended_s=99.0)
    views = [view("w1", record("a"), live, first), view("w2", record("b", attempt=1), live)]
    assert [(call.state, call.worker) for call in trace_of("s", views, NODES).calls] == [("done", "w1"), ("done", "w2")]


LIVE = [
    ("queued", {"began_s": 0.0, "ended_s": 0.0}, 40.0, None),
    ("running", {"began_s": 12.0, "ended_s": 0.0}, 2.0, 38.0),
    ("waiting", {"began_s": 12.0, "ended_s": 0.0}, 2.0, 38.0),
    ("cancelled", {"began_s": 0.0, "ended_s": 15.0}, 5.0, None),
]


@pytest.mark.parametrize(("state", "times", "waited_s", "ran_s"), LIVE)
def test_a_call_that_has_not_ended_or_begun(state: str, times: dict[str, float], waited_s: float, ran_s: float | None) -> None:
    (call,) = trace_of("", [view("w1", record("a", state=state, **times))], NODES).calls
    assert (call.state, call.waited_s, call.ran_s) == (state, waited_s, ran_s)


@pytest.mark.parametrize("wanted", ["nobody", "0" * 32, ""])
def test_what_nobody_remembers_is_told(wanted: str) -> None:
    views = [view("w1", record("a"))] if wanted else [view("w1")]
    with pytest.raises(UnknownCallError) as caught:
        trace_of(wanted, views, NODES)
    assert caught.value.wanted == wanted


def test_the_tree_as_text() -> None:
    records = [
        record("a", actor="answer"),
        record("b", "a", 11, actor="desk", method="read"),
        record("c", "b", 12, actor="desk", method="+"),
        record("d", "b", 12.5, actor="desk", method=".name", state="queued", began_s=0.0, ended_s=0.0),
        record("e", "a", 13, actor="desk", method="=name", state="failed", error="builtins:ValueError"),
        record("f", "e", 14, actor="search"),
    ]
    assert str(trace_of("s", [view("here-1", *records[:3]), view("w2", *records[3:])], NODES)).splitlines() == [
        "CALL                                            START   WAITED      RAN WORKER",
        "answer                                          0.000    1.000    2.000 here-1",
        "├─ desk.read                                    1.000    1.000    2.000 here-1",
        "│  ├─ desk()                                    2.000    1.000    2.000 here-1",
        "│  └─ desk.name                                 2.500   37.500        - there/w2",
        "│       queued",
        "└─ desk.name =                                  3.000    1.000    2.000 there/w2",
        "   │  failed: builtins:ValueError",
        "   └─ search                                    4.000    1.000    2.000 there/w2",
    ]


_names = st.text(min_size=1, max_size=200)


@given(
    names=st.lists(_names, min_size=1, max_size=30),
    worker=_names,
    parents=st.lists(st.integers(0, 29), min_size=30, max_size=30),
    state=st.sampled_from(["queued", "failed", "done", "anything at all\x1b" * 20]),
    times=st.tuples(*[st.floats(0, 1e7)] * 3),
)
def test_any_run_fits_the_width_and_harms_no_terminal(
    names: list[str], worker: str, parents: list[int], state: str, times: tuple[float, float, float]
) -> None:
    ids = [bytes([number]) * 16 for number in range(len(names))]
    records = [
        CallRecord(id, ids[parents[n] % n] if n else b"", name, name, "s", "", name, 0, 0, *times, state, name)
        for n, (id, name) in enumerate(zip(ids, names, strict=True))
    ]
    trace = trace_of("s", [view(worker, *records)], {worker: names[0]})
    assert sorted(call.id for call in trace.calls) == sorted(id.hex() for id in ids)
    for line in lines_of(trace.calls):
        assert len(line) <= WIDTH
        assert line.isprintable()


def test_a_run_ten_thousand_calls_deep_is_shown() -> None:
    ids = [number.to_bytes(16, "big") for number in range(10_000)]
    deep = [
        CallRecord(id, ids[n - 1] if n else b"", "f", "", "s", "", "c", 0, 0, float(n), n + 0.5, n + 1.0, "done")
        for n, id in enumerate(ids)
    ]
    lines = lines_of(trace_of("s", [view("w1", *deep)], NODES).calls)
    assert len(lines) == 10_001
    assert "(9999) f" in lines[-1]
