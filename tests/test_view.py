"""The view against a plain model of it, whatever happens to the reports on their way, and against what really is."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq import columns
from nalar_mq.changes import Changes, Tracked
from nalar_mq.columns import CREATED, DONE, FAILED, NO_JOB, QUEUED, RUNNING, WAITING, Report, Serves, decode_report
from nalar_mq.controllers.reported import MOST_KINDS_OF_ALL, Incoming
from nalar_mq.controllers.view import View
from nalar_mq.errors import (
    ForgedReportError,
    FutureReportError,
    LateReportError,
    MalformedReportError,
    MissedReportError,
    WireError,
)
from nalar_mq.messages import Call

TENANTS = {"s0": "acme", "s1": "bolt"}
LIMIT = 700  # small, so that reports come in parts


@dataclass
class ModelProcess:
    incarnation: int
    number: int = 0
    ahead_s: float = math.inf
    stale: bool = False
    pieces: list[Report] = field(default_factory=list)
    kinds: list[tuple[str, str]] = field(default_factory=list)
    sessions: dict[int, tuple[str, str]] = field(default_factory=dict)
    jobs: dict[int, str] = field(default_factory=dict)
    futures: dict[int, dict[str, Any]] = field(default_factory=dict)
    held: set[tuple[str, str]] = field(default_factory=set)
    queues: dict[str, tuple[int, int]] = field(default_factory=dict)
    ended: dict[tuple[str, str], int] = field(default_factory=dict)


def rows(table: dict[str, str], packed: tuple[bytes, ...]) -> Iterator[tuple[Any, ...]]:
    codes = {"<u8": "Q", "<u4": "I", "<u2": "H", "<u1": "B", "<i4": "i", "<f8": "d", "<f4": "f"}
    for code in table.values():
        assert "," in code or code in codes
    found = []
    for code, data in zip(table.values(), packed, strict=True):
        if "," in code:
            found.append([data[start : start + 16] for start in range(0, len(data), 16)])
        else:
            found.append([value for (value,) in struct.iter_unpack("<" + codes[code], data)])
    return zip(*found, strict=True)


class Model:
    """The rules of the view, with dictionaries."""

    def __init__(self) -> None:
        self.processes: dict[str, ModelProcess] = {}

    def fold(self, report: Report, now: float) -> str:
        process = self.processes.get(report.name)
        if process is None or process.incarnation < report.incarnation:
            process = self.processes[report.name] = ModelProcess(report.incarnation, stale=report.number != 1)
        is_late = report.number <= process.number and not (process.stale and report.piece)
        if report.incarnation < process.incarnation or is_late:
            return "late"
        process.ahead_s = min(process.ahead_s, now - report.now_s)
        if report.number != process.number + 1:
            process.stale, process.pieces = True, []
        process.number = report.number
        if report.piece:
            return self.piece(process, report)
        if process.stale:
            return "missed"
        self.apply(process, report)
        return "used"

    def piece(self, process: ModelProcess, report: Report) -> str:
        if report.piece == 1:
            process.pieces = []
        if report.piece != len(process.pieces) + 1:
            process.pieces, process.stale = [], True
            return "missed"
        process.pieces.append(report)
        if report.piece == report.pieces:
            pieces, process.pieces = process.pieces, []
            process.kinds, process.sessions, process.jobs, process.held = [], {}, {}, set()
            process.futures, process.stale = {}, False
            for piece in pieces:
                self.apply(process, piece)
        return "used"

    def apply(self, process: ModelProcess, report: Report) -> None:
        process.kinds += report.kinds
        tenants = report.sessions.tenants or ("",) * len(report.sessions.names)
        for (slot,), name, tenant in zip(
            struct.iter_unpack("<I", report.sessions.slots), report.sessions.names, tenants, strict=True
        ):
            process.sessions[slot] = (name, tenant)
        for (slot,), name in zip(struct.iter_unpack("<I", report.jobs.slots), report.jobs.names, strict=True):
            process.jobs[slot] = name
        if report.begun is not None:
            deps = [report.begun.deps[start : start + 16] for start in range(0, len(report.begun.deps), 16)]
            packed = tuple(getattr(report.begun, name) for name in columns.BEGUN)
            for slot, id, parent, kind, session, job, priority, state, arrived, began, deadline, budget, count in rows(
                columns.BEGUN, packed
            ):
                process.futures[slot] = {
                    "id": id,
                    "parent": parent,
                    "kind": process.kinds[kind],
                    "session": process.sessions[session],
                    "job": "" if job == NO_JOB else process.jobs[job],
                    "priority": priority,
                    "state": state,
                    "arrived": arrived + process.ahead_s,
                    "began": began + process.ahead_s if began else 0.0,
                    "deadline": deadline + process.ahead_s,
                    "budget": budget,
                    "deps": deps[:count],
                }
                deps = deps[count:]
        if report.changed.columns:
            for slot, state, at in rows(columns.CHANGED, report.changed.columns):
                future = process.futures[slot]
                future["state"] = state
                if state == RUNNING and not future["began"]:
                    future["began"] = at + process.ahead_s
        if report.moved.columns:
            for slot, priority in rows(columns.MOVED, report.moved.columns):
                process.futures[slot]["priority"] = priority
        if report.held.columns:
            process.held |= {(process.kinds[k][0], process.sessions[s][0]) for k, s in rows(columns.HELD, report.held.columns)}
        if report.let_go.columns:
            process.held -= {
                (process.kinds[k][0], process.sessions[s][0]) for k, s in rows(columns.HELD, report.let_go.columns)
            }
        if report.ended.columns:
            for slot, _ in rows(columns.ENDED, report.ended.columns):
                del process.futures[slot]
        for (slot,) in struct.iter_unpack("<I", report.sessions_closed):
            del process.sessions[slot]
        for (slot,) in struct.iter_unpack("<I", report.jobs_closed):
            del process.jobs[slot]
        if report.queues is not None:
            process.queues = report.queues


def seen_by(view: View) -> dict[tuple[str, bytes], dict[str, Any]]:
    futures, found = view.futures, {}
    for row in view.live.tolist():
        id = struct.pack("<QQ", int(futures.high[row]), int(futures.low[row]))
        session = int(futures.session[row])
        found[view.worker_at(int(futures.process[row])), id] = {
            "id": id,
            "parent": struct.pack("<QQ", int(futures.parent_high[row]), int(futures.parent_low[row])),
            "kind": view.kinds[int(futures.kind[row])],
            "session": (view.sessions.name(session), view.tenants[int(view.session_tenant[session])]),
            "job": view.jobs.name(int(futures.job[row])) if futures.job[row] >= 0 else "",
            "priority": int(futures.priority[row]),
            "state": int(futures.state[row]),
            "arrived": float(futures.arrived[row]),
            "began": float(futures.began[row]),
            "deadline": float(futures.deadline[row]),
            "budget": float(futures.budget[row]),
        }
    return found


def agree(view: View, model: Model) -> None:
    expected = {
        (name, future["id"]): {key: value for key, value in future.items() if key != "deps"}
        for name, process in model.processes.items()
        for future in process.futures.values()
    }
    found = seen_by(view)
    assert found.keys() == expected.keys()
    for key, future in expected.items():
        for name, value in future.items():
            assert found[key][name] == (pytest.approx(value) if isinstance(value, float) else value), (key, name)
    live: dict[str, int] = {}
    for future in expected.values():
        live[future["session"][0]] = live.get(future["session"][0], 0) + 1
    for process in model.processes.values():
        for name, _ in process.sessions.values():
            assert view.session_live[view.sessions.number(name)] == live.get(name, 0)
    named = {name for process in model.processes.values() for name, _ in process.sessions.values()}
    assert len(view.sessions) == len(named)
    assert len(view.jobs) == len({job for process in model.processes.values() for job in process.jobs.values()})
    for name, process in model.processes.items():
        for agent, session in process.held:
            holders = {other for other, p in model.processes.items() if (agent, session) in p.held}
            assert view.holder(session, agent) in holders, name
    check_waits(view, model)


def check_waits(view: View, model: Model) -> None:
    futures = [(name, future) for name, process in model.processes.items() for future in process.futures.values()]
    alive = {future["id"] for _, future in futures}
    waiting = {future["id"] for _, future in futures if future["state"] == WAITING}
    expected = {(f["id"], dep) for _, f in futures if f["state"] == CREATED for dep in f["deps"] if dep in alive}
    expected |= {(f["parent"], f["id"]) for _, f in futures if f["parent"] in waiting}
    columns_of = view.futures
    ids = [struct.pack("<QQ", int(h), int(lo)) for h, lo in zip(columns_of.high, columns_of.low, strict=True)]
    waiters, needed = view.waits()
    assert {(ids[w], ids[n]) for w, n in zip(waiters.tolist(), needed.tolist(), strict=True)} == expected


class Sender:
    """A process that does anything, and what its reports should come to."""

    def __init__(self, random: Random, name: str, incarnation: int = 1) -> None:
        self.random = random
        self.name = name
        self.changes = Changes(name, incarnation, f"node-{name}")
        self.live: list[Tracked] = []
        self.clock_s = random.uniform(10, 1000)

    def step(self, ids: list[bytes]) -> None:
        random, now = self.random, self.clock_s
        match random.randrange(10):
            case 0 | 1 | 2 | 3:
                self.begin(ids)
            case 4 | 5 if self.live:
                self.changes.change(random.choice(self.live), random.choice([QUEUED, RUNNING, WAITING]), now)
            case 6 | 7 if self.live:
                self.changes.end(self.live.pop(random.randrange(len(self.live))), random.choice([DONE, FAILED]), now)
            case 8 if self.live:
                self.changes.move(random.choice(self.live), random.randrange(-5, 5))
            case 9:
                agent, session = random.choice("ab"), f"s{random.randrange(4)}"
                if random.random() < 0.6:
                    self.changes.hold(agent, session, TENANTS.get(session, ""))
                else:
                    self.changes.let_go(agent, session)
            case _:
                self.clock_s += random.random()

    def begin(self, ids: list[bytes]) -> None:
        random = self.random
        id = random.randbytes(16)
        call = Call(
            id,
            random.choice(["a", "b"]),
            random.choice(["read", "write", ""]),
            b"",
            session=f"s{random.randrange(5)}",
            job=random.choice(["", "j1", "j2"]),
            parent=random.choice([b"", *ids[-5:]]),
            deps=tuple(random.choices(ids, k=random.randrange(3))) if ids else (),
            priority=random.randrange(-3, 3),
            timeout_s=random.choice([None, 3.0]),
        )
        ids.append(id)
        tenant = TENANTS.get(call.session, "")
        self.live.append(self.changes.begin(call, self.clock_s, random.choice([CREATED, QUEUED, RUNNING]), tenant))


class Network:
    """What has been sent and is not folded yet; it is folded together."""

    def __init__(self) -> None:
        self.view, self.model = View(), Model()
        self._waiting: list[Incoming] = []

    def send(self, sender: str, data: bytes, now: float) -> None:
        self._waiting.append(Incoming(sender, data, now))

    def deliver(self) -> None:
        waiting, self._waiting = self._waiting, []
        outcomes = {"late": LateReportError, "missed": MissedReportError}
        folded = [(report.sender, self.model.fold(decode_report(report.data), report.at)) for report in waiting]
        expected = Counter((sender, outcomes[outcome]) for sender, outcome in folded if outcome in outcomes)
        assert Counter((sender, type(error)) for sender, error in self.view.fold_all(waiting)) == expected

    def settle(self, now: float) -> None:
        self.deliver()
        self.view.settle(now)
        agree(self.view, self.model)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_whatever_happens_to_reports_the_view_is_what_the_model_is(seed: int, steps: int) -> None:
    random = Random(seed)
    network = Network()
    view = network.view
    senders = [Sender(random, name) for name in "pqr"]
    ids: list[bytes] = []
    held_up: list[tuple[str, bytes]] = []
    together = random.random()
    now = 5000.0
    for step in range(steps):
        now += random.random()
        sender = random.choice(senders)
        for _ in range(random.randrange(12)):
            sender.step(ids)
        reports = (
            sender.changes.reports(sender.clock_s, LIMIT)
            if random.random() < 0.8
            else sender.changes.whole(sender.clock_s, LIMIT)
        )
        for data in reports:
            match random.randrange(12):
                case 0:
                    continue
                case 1:
                    held_up.append((sender.name, data))
                    continue
                case 2:
                    network.send(sender.name, data, now)
            network.send(sender.name, data, now)
            if held_up and random.random() < 0.3:
                network.send(*held_up.pop(), now)
            if random.random() > together:
                network.deliver()
        if random.random() < 0.1:
            place = random.randrange(len(senders))
            senders[place] = Sender(random, senders[place].name, step + 2)
        if random.random() < 0.3:
            network.settle(now)
    network.deliver()
    for address in view.stale():
        sender = next(sender for sender in senders if sender.name == address.name)
        for data in sender.changes.whole(sender.clock_s, LIMIT):
            network.send(sender.name, data, now)
    for sender in senders:
        for data in sender.changes.reports(sender.clock_s, LIMIT):
            network.send(sender.name, data, now)
    network.deliver()
    for sender in senders:  # one that lost its last report, or its first, has noticed by now
        if any(address.name == sender.name for address in view.stale()):
            for data in sender.changes.whole(sender.clock_s, LIMIT):
                network.send(sender.name, data, now)
    network.settle(now)
    assert not view.stale()
    truth = {(sender.name, future.call.id): future for sender in senders for future in sender.live}
    found = seen_by(view)
    assert found.keys() == truth.keys()
    for key, future in truth.items():
        assert (found[key]["state"], found[key]["priority"]) == (future.state, future.priority)
    for sender in senders:
        view.forget(sender.name)
    view.settle(now)
    assert len(view.futures) == len(view.sessions) == len(view.jobs) == 0
    assert not view.session_live.any()
    assert not view.waits()[0].size


def call(number: int, actor: str = "a", **fields: Any) -> Call:
    return Call(number.to_bytes(16, "big"), actor, "m", b"", **{"session": "s", **fields})


def told(*calls: Call, state: int = QUEUED) -> tuple[Changes, list[Tracked], View]:
    changes, view = Changes("w", 1, "n"), View()
    futures = [changes.begin(each, 1.0, state) for each in calls]
    for data in changes.reports(2.0, 1 << 20):
        view.fold("w", data, 102.0)
    view.settle(103.0)
    return changes, futures, view


def test_depth_is_the_number_of_live_callers_above() -> None:
    chain = [call(n, parent=(n - 1).to_bytes(16, "big") if n > 1 else b"") for n in range(1, 7)]
    _, _, view = told(*reversed(chain))
    assert [int(view.futures.depth[view.find(each.id)]) for each in chain] == [0, 1, 2, 3, 4, 5]


def test_a_parent_that_is_told_of_later_is_found() -> None:
    _, _, view = told(call(2, parent=(1).to_bytes(16, "big")))
    other = Changes("v", 1, "n")
    other.begin(call(1), 1.0)
    for data in other.reports(1.0, 1 << 20):
        view.fold("v", data, 104.0)
    view.settle(104.0)
    assert view.futures.depth[view.find(call(2).id)] == 1


def test_times_are_on_the_clock_of_the_view() -> None:
    changes, (future,), view = told(call(1))
    assert view.waited(view.live) == pytest.approx([2.0])
    changes.change(future, RUNNING, 5.0)
    for data in changes.reports(6.0, 1 << 20):
        view.fold("w", data, 106.5)
    view.settle(107.0)
    assert view.waited(view.live) == pytest.approx([4.0])
    assert view.ran(view.live) == pytest.approx([2.0])


def test_work_ahead_is_learnt_from_what_followed() -> None:
    changes, view, now = Changes("w", 1, "n"), View(), 0.0

    def report() -> None:
        for data in changes.reports(now, 1 << 20):
            view.fold("w", data, now)
        view.settle(now)

    for run in range(100):
        driver = changes.begin(call(4 * run + 1, "driver", session=f"s{run}"), now, WAITING)
        for step, (actor, seconds) in enumerate((("plan", 1.0), ("search", 4.0), ("write", 2.0))):
            future = changes.begin(call(4 * run + step + 2, actor, session=f"s{run}"), now)
            changes.change(future, RUNNING, now)
            report()
            now += seconds
            changes.end(future, DONE, now)
        changes.end(driver, DONE, now)
        report()
    actors = ("plan", "search", "write")
    for number, actor in enumerate(actors):
        changes.begin(call(10_000 + number, actor, session=f"t{number}"), now)
    report()
    rows = [view.find(call(10_000 + number).id) for number in range(len(actors))]
    assert view.remaining(np.array(rows, np.int32)).tolist() == pytest.approx([7.0, 6.0, 2.0], rel=0.1)


def test_replicas_queues_and_imbalance() -> None:
    view = View()
    for name, queued in (("w1", 6), ("w2", 0)):
        changes = Changes(name, 1, "n")
        changes.set_serves({"a": Serves("agent", concurrency=2)})
        changes.set_queues({"a": (queued, 2)})
        changes.set_resources({"cpu": (1.0, 4.0)})
        for data in changes.reports(1.0, 1 << 20):
            view.fold(name, data, 1.0)
    view.settle(1.0)
    assert [(replica.worker, replica.load) for replica in view.replicas("a")] == [("w1", 4.0), ("w2", 1.0)]
    assert view.imbalance("a") == pytest.approx(1.6)
    assert view.nodes["n"].workers == ("w1", "w2")
    assert view.nodes["n"].resources == {"cpu": (1.0, 4.0)}


def test_quantiles_and_means_of_calls_that_were_never_told_of() -> None:
    changes, view = Changes("w", 1, "n"), View()
    for seconds in (0.1,) * 90 + (10.0,) * 10:
        future = changes.begin(call(1), 0.0)
        changes.change(future, RUNNING, 0.5)
        changes.end(future, DONE, 0.5 + seconds)
    for data in changes.reports(20.0, 1 << 20):
        view.fold("w", data, 20.0)
    view.settle(20.0)
    assert len(view.futures) == 0
    assert view.service_s[0] == pytest.approx(1.09)
    assert view.wait_s[0] == pytest.approx(0.5)
    assert view.quantile("a", "m", 0.5) == pytest.approx(0.1, rel=0.3)
    assert view.quantile("a", "m", 0.95) == pytest.approx(10.0, rel=0.3)


def test_calls_behind_long_ones_are_found() -> None:
    changes, view = Changes("w", 1, "n"), View()
    changes.set_serves({"a": Serves("agent")})
    long_one = changes.begin(call(1), 1.0)
    changes.change(long_one, RUNNING, 1.0)
    changes.begin(call(2, session="behind"), 1.0)
    for data in changes.reports(9.0, 1 << 20):
        view.fold("w", data, 9.0)
    view.settle(9.0)
    assert list(view.queued_behind(10.0)) == []
    ((agent, worker, rows),) = view.queued_behind(5.0)
    assert (agent, worker) == ("a", "w")
    assert [view.sessions.name(int(view.futures.session[row])) for row in rows] == ["behind"]


def refused(view: View, sender: str, data: bytes, now: float = 102.0) -> type[Exception]:
    with pytest.raises(WireError) as caught:
        view.fold(sender, data, now)
    assert view.refused[type(caught.value).__name__]
    return type(caught.value)


@pytest.mark.parametrize("what", ["serves", "able"])
@pytest.mark.parametrize("amount", [-1e9, math.inf, math.nan])
def test_an_instance_reserves_an_amount_that_is_one(what: str, amount: float) -> None:
    """Less than nothing would leave room on every node for as many instances as anybody wants."""
    changes, _, view = told(call(1))
    (data,) = changes.reports(3.0, 1 << 20)
    bad = columns.encode_report(altered(data, **{what: {"a": Serves("agent", resources={"gpu": amount})}}))
    assert refused(view, "w", bad) is MalformedReportError
    view.fold("w", data, 102.0)


def test_reports_of_others_are_forged() -> None:
    changes, _, view = told(call(1))
    (data,) = changes.reports(3.0, 1 << 20)
    assert refused(view, "other", data) is ForgedReportError
    (data,) = changes.reports(3.0, 1 << 20)
    moved = columns.encode_report(altered(data, node="elsewhere"))
    assert refused(view, "w", moved) is ForgedReportError
    client = columns.encode_report(altered(data, name="client-x"))
    assert refused(view, "client-x", client) is ForgedReportError
    assert list(view.processes) == ["w"]


def altered(data: bytes, **fields: Any) -> Report:
    report = decode_report(data)
    return Report(**{name: getattr(report, name) for name in report.__struct_fields__} | fields)


def test_reports_from_the_future_are_refused() -> None:
    changes, (future,), view = told(call(1))
    assert (
        refused(view, "w", columns.encode_report(altered(changes.reports(3.0, 1 << 20)[0], now_s=500.0))) is FutureReportError
    )
    changes.change(future, RUNNING, 90.0)
    assert refused(view, "w", changes.reports(4.0, 1 << 20)[0]) in (FutureReportError, MissedReportError)


@pytest.mark.parametrize(
    "fields",
    [
        {"ended": columns.Columns((b"\x09\0\0\0", b"\0"))},
        {"ended": columns.Columns((b"\0\0\0\0\0\0\0\0", b"\0\0"))},
        {"changed": columns.Columns((b"\0\0\0\0", b"\x07", struct.pack("<d", 1.0)))},
        {"changed": columns.Columns((b"\0\0\0\0", b"\x02", struct.pack("<d", math.nan)))},
        {"moved": columns.Columns((b"\xff\xff\xff\xff", b"\0\0\0\0"))},
        {"kinds_before": 7},
        {"kinds_before": 0, "kinds": (("x", "y"),)},
        {"sessions": columns.Named(b"\0\0\0\0", ("other",))},
        {"sessions": columns.Named(b"\0\0\0\xff", ("other",))},
        {"sessions_closed": b"\x05\0\0\0"},
        {"sessions_closed": b"\0\0\0\0\0\0\0\0"},
        {"held": columns.Columns((b"\x09\0", b"\0\0\0\0"))},
        {"tallies": columns.Columns((b"\0\0", b"\0" * 4, b"\0" * 4, struct.pack("<d", math.inf), b"\0" * 8))},
        {"buckets": columns.Columns((b"\0\0", b"\x02", b"\0", b"\0" * 4))},
        {"spent": columns.Columns((b"\0\0\0\0", struct.pack("<d", 1.0)))},
    ],
)
def test_what_contradicts_itself_is_refused_and_healed(fields: dict[str, Any]) -> None:
    changes, _, view = told(call(1))
    bad = columns.encode_report(altered(changes.reports(3.0, 1 << 20)[0], **fields))
    assert refused(view, "w", bad) is MalformedReportError
    assert [address.name for address in view.stale()] == ["w"]
    assert refused(view, "w", changes.reports(3.0, 1 << 20)[0]) is MissedReportError
    for data in changes.whole(4.0, 1 << 20):
        view.fold("w", data, 104.0)
    view.settle(104.0)
    assert not view.stale()
    assert [view.sessions.name(int(view.futures.session[row])) for row in view.live] == ["s"]


@pytest.mark.parametrize(
    "fields",
    [
        {"ended": columns.Columns((b"\x63\0\0\0", b"\0"))},
        {"ended": columns.Columns((b"\0\0\0\0\0\0\0\0", b"\0\0"))},
        {"changed": columns.Columns((b"\0\0\0\0", b"\x02", struct.pack("<d", 1e9)))},
        {"sessions_closed": b"\x09\0\0\0"},
        {"tallies": columns.Columns((b"\0\0", b"\0" * 4, b"\0" * 4, struct.pack("<d", math.inf), b"\0" * 8))},
        {"spent": columns.Columns((b"\0\0\0\0", struct.pack("<d", math.nan)))},
        {"held": columns.Columns((b"\x09\0", b"\0\0\0\0"))},
        {"name": "nobody"},
        {"number": 7},
        {"now_s": 500.0},
    ],
)
def test_of_reports_that_come_together_a_bad_one_is_refused_alone(fields: dict[str, Any]) -> None:
    """And what the good ones say is folded once, as if the bad one had said nothing."""
    view, reference = View(), View()
    workers = {name: Changes(name, 1, "n") for name in "pqrs"}
    first = {
        name: changes.begin(call(number, session=f"s{number}"), 1.0) for number, (name, changes) in enumerate(workers.items())
    }
    together: list[Incoming] = []
    for name, changes in workers.items():
        (data,) = changes.reports(2.0, 1 << 20)
        assert not view.fold_all([Incoming(name, data, 102.0)])
        reference.fold(name, data, 102.0)
        number = 10 + ord(name)
        if name == "s":
            changes.hold("a", "held")
        else:
            future = changes.begin(call(number, "b", session=f"t{number}", job=f"j{number}", deps=(call(3).id,)), 2.5)
            changes.spend(future.call, "w", 1.0, "tokens")
        changes.change(first[name], RUNNING, 2.5)
        changes.end(changes.begin(call(1), 2.5), DONE, 2.5)
        if name != "p":
            changes.end(first[name], DONE, 2.6)
        (data,) = changes.reports(3.0, 1 << 20)
        if name == "r":
            together.append(Incoming(name, columns.encode_report(altered(data, **fields)), 103.0))
        else:
            together.append(Incoming(name, data, 103.0))
            reference.fold(name, data, 103.0)
    ((sender, error),) = view.fold_all(together)
    assert (sender, view.refused) == ("r", Counter([type(error).__name__]))
    with pytest.raises(type(error)):
        reference.fold(*together[2])
    for each in (view, reference):
        each.settle(104.0)
    assert picture_of(view) == picture_of(reference)
    assert view.stale() == reference.stale()
    for name in workers:
        view.forget(name)
    view.settle(105.0)
    assert (len(view.futures), len(view.sessions), len(view.jobs)) == (0, 0, 0)


def test_columns_without_rows_say_nothing() -> None:
    changes, _, view = told(call(1))
    other = Changes("v", 1, "n")
    other.begin(call(2), 1.0)
    tables = ("changed", "moved", "ended", "tallies", "buckets", "held", "let_go", "spent")
    empty = {table: columns.Columns((b"",) * len(columns._TABLES[table])) for table in tables}
    nothing = columns.Begun(*(b"",) * len(columns.Begun.__struct_fields__))
    bad = columns.encode_report(altered(changes.reports(3.0, 1 << 20)[0], begun=nothing, **empty))
    together = [Incoming("w", bad, 103.0), *(Incoming("v", data, 103.0) for data in other.reports(3.0, 1 << 20))]
    assert not view.fold_all(together)
    view.settle(104.0)
    assert len(view.futures) == 2


@pytest.mark.parametrize("step", ["_take_counts", "_take_facts"])
def test_a_mistake_in_this_program_does_not_keep_others_from_being_heard(step: str) -> None:
    class Mistaken(View):
        def _take_counts(self, fold: Any) -> None:
            if step == "_take_counts" and any(process.name == "w" for process in fold.processes) and is_broken:
                raise IndexError("it happens")
            super()._take_counts(fold)

        def _take_facts(self, process: Any, report: Report) -> None:
            if step == "_take_facts" and process.name == "w" and is_broken:
                raise IndexError("it happens")
            super()._take_facts(process, report)

    is_broken = True
    view = Mistaken()
    workers = {name: Changes(name, 1, "n") for name in "vwx"}
    for number, changes in enumerate(workers.values()):
        changes.begin(call(number + 1, session=f"s{number}"), 1.0)
    reports = [Incoming(name, data, 2.0) for name, changes in workers.items() for data in changes.reports(1.0, 1 << 20)]
    refused = view.fold_all(reports)
    assert "w" in [sender for sender, _ in refused]
    assert {type(error) for _, error in refused} == {MalformedReportError}
    assert {address.name for address in view.stale()} == {sender for sender, _ in refused}
    is_broken = False
    again = [name for name in workers if any(address.name == name for address in view.stale())]
    assert not view.fold_all([Incoming(name, data, 3.0) for name in again for data in workers[name].whole(2.0, 1 << 20)])
    view.settle(3.0)
    assert not view.stale()
    assert sorted(view.sessions.name(int(view.futures.session[row])) for row in view.live) == ["s0", "s1", "s2"]


def picture_of(view: View) -> dict[str, Any]:
    sessions = sorted(view.sessions.name(number) for number in view.sessions.used().tolist())
    numbers = [view.sessions.number(name) for name in sessions]
    return {
        "futures": seen_by(view),
        "sessions": sessions,
        "live": view.session_live[numbers].tolist(),
        "spent": {scope: view.spending.totals(scope) for scope in columns.SCOPES},
        "jobs": len(view.jobs),
        "holder": bool(view.holder("held", "a")),
        "times": {kind: (view.service_s[n], view.wait_s[n], view.quantile(*kind, 0.5)) for n, kind in enumerate(view.kinds)},
    }


def test_a_whole_that_contradicts_itself_leaves_nothing_behind() -> None:
    changes, _, view = told(call(1), call(2))
    changes.begin(call(3), 2.0)
    pieces = changes.whole(3.0, 1 << 20)
    bad = columns.encode_report(altered(pieces[-1], moved=columns.Columns((b"\xff\xff\xff\xff", b"\0\0\0\0"))))
    for data in pieces[:-1]:
        view.fold("w", data, 103.0)
    assert refused(view, "w", bad) is MalformedReportError
    view.settle(103.0)
    assert (len(view.futures), len(view.live)) == (0, 0)
    for data in changes.whole(4.0, 1 << 20):
        view.fold("w", data, 104.0)
    view.settle(104.0)
    assert (len(view.futures), len(view.live)) == (3, 3)
    view.forget("w")
    view.settle(105.0)
    assert (len(view.futures), len(view.sessions)) == (0, 0)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert issubclass(refused(View(), "w", data), WireError)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_reports_harm_nobody(seed: int) -> None:
    random = Random(seed)
    changes, _, view = told(call(1), call(2, parent=call(1).id, deps=(call(1).id,)), state=CREATED)
    for number in range(5):
        changes.begin(call(number + 3, session=f"t{number}", job="j"), 3.0, CREATED)
        changes.hold("a", f"t{number}")
        for data in changes.reports(3.0, 1 << 20):
            damaged = bytearray(data)
            for _ in range(random.randrange(1, 4)):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            try:
                view.fold("w", bytes(damaged), 103.0)
            except WireError:
                continue
        view.settle(104.0)
        view.waits()
        view.remaining(view.live)
    if [address.incarnation for address in view.silent(math.inf)] != [1]:
        view.forget("w")  # the damage was to its incarnation: it is not heard any more, and so forgotten
    for data in changes.whole(5.0, 1 << 20):
        view.fold("w", data, 105.0)
    view.settle(105.0)
    assert len(view.futures) == 7
    view.forget("w")
    view.settle(106.0)
    assert (len(view.futures), len(view.sessions), len(view.jobs)) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_reports_harm_nobody_who_reports_at_the_same_time(seed: int) -> None:
    random = Random(seed)
    view, reference = View(), View()
    damaged, sound = Changes("w", 1, "n"), Changes("v", 1, "n")
    live: list[Tracked] = []
    for number in range(8):
        for changes, first in ((damaged, 1), (sound, 100)):
            future = changes.begin(call(first + number, session=f"t{number}", job="j"), 3.0, CREATED)
            changes.hold("a", f"t{number}")
            if changes is sound:
                live.append(future)
        if number > 2:
            sound.end(live.pop(random.randrange(len(live))), DONE, 3.0)
        together: list[Incoming] = []
        whole = random.random() < 0.3
        for data in damaged.whole(3.0, LIMIT) if whole else damaged.reports(3.0, 1 << 20):
            harmed = bytearray(data)
            for _ in range(random.randrange(4)):
                harmed[random.randrange(len(harmed))] = random.randrange(256)
            together.append(Incoming("w", bytes(harmed), 103.0))
        reports = [Incoming("v", data, 103.0) for data in sound.reports(3.0, 1 << 20)]
        if not whole:
            random.shuffle(together)
        assert {sender for sender, _ in view.fold_all([*together, *reports])} <= {"w"}
        assert not reference.fold_all(reports)
        view.settle(104.0)
    view.forget("w")
    for each in (view, reference):
        each.settle(105.0)
    assert seen_by(view) == seen_by(reference)
    assert sorted(id for _, id in seen_by(view)) == sorted(future.call.id for future in live)
    assert view.session_live[view.sessions.used()].sum() == len(live)
    view.forget("v")
    view.settle(106.0)
    assert (len(view.futures), len(view.sessions), len(view.jobs)) == (0, 0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "é" * 300},
        {"job": "j" * 300},
        {"tenant": "t" * 300},
        {"timeout_s": math.nan},
        {"timeout_s": -math.inf},
        {"timeout_s": 1e308},
        {"budget": math.nan},
        {"budget": 1e308},
        {"priority": 1 << 62},
        {"parent": b"p" * 99},
        {"deps": (b"d" * 3,)},
    ],
)
def test_what_a_call_from_outside_says_never_has_the_report_of_its_worker_refused(fields: dict[str, Any]) -> None:
    changes, view = Changes("w", 1, "n"), View()
    strange = call(1, **fields)
    changes.begin(strange, 1.0, CREATED)
    changes.begin(call(2), 1.0)
    changes.hold("a", strange.session, strange.tenant)
    for amount in (1.0, 1.7e308, 1.7e308):
        changes.spend(strange, "", amount, "tokens")
    for now, data in ((2.0, changes.reports(2.0, 1 << 20)), (3.0, changes.whole(3.0, 1 << 20))):
        assert not view.fold_all([Incoming("w", report, now) for report in data])
        view.settle(now)
        assert len(view.futures) == 2


def naming(data: bytes, name: str, incarnation: int, kinds: tuple[tuple[str, str], ...]) -> bytes:
    """A report like `data` in which a process names these kinds."""
    fields = {"name": name, "incarnation": incarnation, "number": 1, "kinds": kinds}
    return columns.encode_report(altered(data, begun=None, sessions=columns.NOBODY, **fields))


def kinds_of(deployment: int, count: int = columns.MOST_KINDS) -> tuple[tuple[str, str], ...]:
    return tuple((f"agent-{deployment}-{number}", "m") for number in range(count))


def test_processes_that_live_name_no_kinds_without_end() -> None:
    changes, _, view = told(call(1))
    (data,) = changes.reports(3.0, 1 << 20)
    for number in range(20):
        report = naming(data, f"x{number}", 1, kinds_of(number))
        if len(view.kinds) + columns.MOST_KINDS <= MOST_KINDS_OF_ALL:
            view.fold(f"x{number}", report, 103.0)
        else:
            assert refused(view, f"x{number}", report) is MalformedReportError
    assert len(view.kinds) == len(view.kind_agent) == len(view.service_s) <= MOST_KINDS_OF_ALL
    view.fold("w", data, 103.0)
    view.settle(104.0)
    assert len(view.futures) == 1


def test_agents_that_nobody_serves_any_more_and_tenants_without_sessions_are_given_up() -> None:
    """However many names there have been; those that are used stay what they are."""
    stays, view = Changes("stays", 1, "n"), View()
    held = stays.begin(call(1, actor="kept", session="s"), 1.0, QUEUED, "acme")
    stays.hold("holds", "s", "acme")
    for report in stays.reports(2.0, 1 << 20):
        view.fold("stays", report, 2.0)
    for life in range(1, 60):
        served = {f"agent-{life}-{number}": Serves("agent") for number in range(100)}
        changes = Changes("x", life, "n")
        changes.set_serves(served)
        for number in range(100):
            changes.begin(call(10_000 * life + number, session=f"s-{life}-{number}"), 1.0, QUEUED, f"tenant-{life}-{number}")
        for report in changes.reports(2.0 + life, 1 << 20):
            view.fold("x", report, 2.0 + life)
        view.settle(2.0 + life)
        assert served.keys() <= view.agent_numbers().keys()
        tenants = [view.tenants[int(number)] for number in view.session_tenant[view.sessions.used()]]
        assert set(tenants) == {"acme", *(f"tenant-{life}-{number}" for number in range(100))}
    assert len(view.tenants) < 2000
    assert len(view.agent_numbers()) < 2000
    assert view.holder("s", "holds") == "stays"
    row = next(row for row in view.live.tolist() if view.worker_of(row) == "stays")
    assert view.kind_agent[view.futures.kind[row]] == view.agent_numbers()["kept"]
    assert [session for session, _ in view.homes("kept")] == ["s"]
    stays.end(held, DONE, 80.0)
    for report in stays.reports(81.0, 1 << 20):
        view.fold("stays", report, 81.0)
    view.settle(82.0)
    assert not list(view.homes("kept"))


@pytest.mark.parametrize("names", [["x" * 258], [str(number) for number in range(257)]])
@pytest.mark.parametrize("what", ["resources", "serves", "able"])
def test_resources_have_names_and_are_counted(what: str, names: list[str]) -> None:
    changes, _, view = told(call(1))
    (data,) = changes.reports(3.0, 1 << 20)
    amounts = dict.fromkeys(names, 1.0)
    part = dict.fromkeys(names, (0.0, 1.0)) if what == "resources" else {"a": Serves("agent", resources=amounts)}
    assert refused(view, "w", columns.encode_report(altered(data, **{what: part}))) is MalformedReportError
    view.fold("w", data, 102.0)


@pytest.mark.parametrize("what", ["serves", "able", "queues"])
def test_a_process_has_no_more_actors_than_kinds(what: str) -> None:
    changes, _, view = told(call(1))
    (data,) = changes.reports(3.0, 1 << 20)
    part = dict.fromkeys(map(str, range(columns.MOST_KINDS + 1)), (0, 0) if what == "queues" else Serves("agent"))
    assert refused(view, "w", columns.encode_report(altered(data, **{what: part}))) is MalformedReportError


def test_kinds_that_nobody_has_any_more_leave_room_for_others() -> None:
    """However many deployments there have been, each with other names, the latest is seen; what stayed is what it was."""
    stays, leaves = Changes("stays", 1, "n"), Changes("leaves", 1, "n")
    view = View()
    held = stays.begin(call(1, actor="kept"), 1.0)
    for name, changes, actor in (("stays", stays, "kept"), ("leaves", leaves, "former")):
        for number in range(2, 30):
            future = changes.begin(call(number, actor=actor), 1.0)
            changes.change(future, RUNNING, 1.0)
            changes.end(future, DONE, 5.0)
        for report in changes.reports(6.0, 1 << 20):
            view.fold(name, report, 6.0)
    view.settle(7.0)
    assert view.service_s[view.kinds.index(("former", "m"))] > 0
    kept_s = view.service_s[view.kinds.index(("kept", "m"))]
    (begins,) = told(call(1))[0].reports(6.0, 1 << 20)
    for deployment in range(1, 12):
        view.fold("x", naming(begins, "x", deployment, kinds_of(deployment)), 8.0 + deployment)
        if deployment == 2:
            view.forget("leaves")
        view.settle(8.0 + deployment)
    assert len(view.kinds) == len(view.kind_agent) == len(view.service_s) == len(view._histogram) <= MOST_KINDS_OF_ALL
    assert ("former", "m") not in view.kinds
    assert set(kinds_of(11)) <= set(view.kinds)
    assert not view.service_s[[view.kinds.index(kind) for kind in kinds_of(11, 50)]].any()
    assert view.service_s[view.kinds.index(("kept", "m"))] == kept_s > 0
    (row,) = view.live.tolist()
    assert view.agent_of(row) == "kept"
    numbers = view.agent_numbers()
    assert all(view.kind_agent[view.kinds.index(kind)] == numbers[kind[0]] for kind in kinds_of(11, 50))
    stays.end(held, DONE, 20.0)
    for report in stays.reports(21.0, 1 << 20):
        view.fold("stays", report, 21.0)
    view.settle(22.0)
    assert len(view.futures) == 0


@pytest.mark.parametrize("what", ["futures", "sessions"])
def test_a_slot_far_beyond_all_that_a_process_has_taken_is_refused_and_takes_no_room(what: str) -> None:
    changes, _, view = told(call(1))
    changes.begin(call(2, session="other"), 3.0)
    (data,) = changes.reports(4.0, 1 << 20)
    begun = decode_report(data).begun
    assert begun is not None
    before = view._slots.futures.nbytes + view._slots.sessions.nbytes
    for slot, is_used in ((columns.MOST_SLOTS - 1, False), (columns.FEW_SLOTS, False), (columns.FEW_SLOTS - 1, True)):
        far = struct.pack("<I", slot)
        parts = {"slots" if what == "futures" else "sessions": far}
        fields = {name: getattr(begun, name) for name in begun.__struct_fields__} | parts
        named = {} if what == "futures" else {"sessions": columns.Named(far, ("other",))}
        report = columns.encode_report(altered(data, begun=columns.Begun(**fields), **named))
        if is_used:
            _, _, view = told(call(1))
            view.fold("w", report, 104.0)
            assert len(view.futures) == 2
        else:
            with pytest.raises(MalformedReportError, match=rf"slot {slot} of {what} of a process that has taken 2 of them"):
                view.fold("w", report, 104.0)
            assert view._slots.futures.nbytes + view._slots.sessions.nbytes == before
            _, _, view = told(call(1))


def test_a_process_that_had_very_many_calls_is_seen_by_whoever_comes_later() -> None:
    """What it tells anew has slots of its own, though the few that are left had high ones."""
    changes, early = Changes("w", 1, "n"), View()
    futures = [changes.begin(call(n, session=f"s{n}", job=f"j{n}"), 1.0) for n in range(1, columns.FEW_SLOTS + 3000)]
    changes.hold("a", "held")
    for data in changes.reports(2.0, 1 << 20):
        early.fold("w", data, 2.0)
    for future in futures[:-2500]:
        changes.end(future, DONE, 3.0)
    for data in changes.reports(4.0, 1 << 20):
        early.fold("w", data, 4.0)
    late, left = View(), futures[-2500:]
    acts = (lambda: None, lambda: changes.begin(call(9, session="new"), 7.0), lambda: changes.let_go("a", "held"))
    for now, act in enumerate(acts, 8):
        act()
        reports = changes.whole(now, 40_000) if now == 8 else changes.reports(now, 1 << 20)
        for view in (early, late):
            for data in reports:
                view.fold("w", data, now)
            view.settle(now)
    for view in (early, late):
        assert len(view.futures) == len(left) + 1
        row = int(view.find(left[-1].call.id))
        assert (view.sessions.name(int(view.futures.session[row])), view.jobs.name(int(view.futures.job[row]))) == (
            left[-1].call.session,
            left[-1].call.job,
        )
        assert "held" not in view.sessions and "new" in view.sessions
    changes.change(left[0], RUNNING, 12.0)
    changes.move(left[1], 7)
    for data in changes.reports(13.0, 1 << 20):
        late.fold("w", data, 13.0)
    late.settle(13.0)
    assert late.futures.state[int(late.find(left[0].call.id))] == RUNNING
    assert late.futures.priority[int(late.find(left[1].call.id))] == 7
    _, number, sessions = late.sessions_of("w")
    slot = int(np.flatnonzero(sessions == late.sessions.number(left[5].call.session))[0])
    assert changes.session_at(slot, number) == left[5].call.session
    assert changes.session_at(slot, 1) is None, "in that report it had another"


def test_a_name_that_is_too_long_is_refused() -> None:
    changes = Changes("w", 1, "n")
    changes.begin(call(1), 1.0)
    (data,) = changes.reports(1.0, 1 << 20)
    longest = "é" * columns.LONGEST_NAME
    for name, accepts in ((longest, True), (longest + "m", False)):
        named = altered(data, sessions=columns.Named(b"\0\0\0\0", (name,)))
        if accepts:
            View().fold("w", columns.encode_report(named), 1.0)
        else:
            assert refused(View(), "w", columns.encode_report(named)) is MalformedReportError


def test_reports_stay_below_their_limit() -> None:
    changes = Changes("w", 1, "n")
    futures = [changes.begin(call(n + 1, session=f"session-{n}", deps=(call(n).id,) * 3), 1.0, CREATED) for n in range(2000)]
    limit = 8_000
    view = View()
    for act in (
        lambda: None,
        lambda: [changes.change(f, RUNNING, 2.0) for f in futures],
        lambda: [changes.end(f, DONE, 3.0) for f in futures],
    ):
        act()
        reports = changes.reports(4.0, limit)
        assert len(reports) > 1
        assert max(map(len, reports)) <= limit + 512
        for data in reports:
            view.fold("w", data, 4.0)
    assert len(view.futures) == 0
