"""The mailbox against a naive model of its rules, and the rules one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq.mailbox import Mailbox

AGING_S = 4


@dataclass
class Pending:
    key: bytes
    session: str
    sender: str
    number: int
    priority: int
    arrived: int
    ready: bool
    reentrant: bool
    serial: int
    state: str = "queued"


@dataclass
class NaiveMailbox:
    """The rules as one would write them down first: everything is looked at every time."""

    concurrency: int
    per_session: bool
    hold_gaps: bool
    calls: list[Pending] = field(default_factory=list)
    had: set[tuple[str, str, int]] = field(default_factory=set)
    expected: dict[tuple[str, str], int] = field(default_factory=dict)
    passed: set[tuple[str, str, int]] = field(default_factory=set)
    priorities: dict[str, int] = field(default_factory=dict)
    urgent: list[Pending] = field(default_factory=list)
    serial: int = 0

    def queued(self) -> list[Pending]:
        return [call for call in self.calls if call.state == "queued"]

    def find(self, key: bytes) -> Pending | None:
        return next((call for call in self.calls if call.key == key), None)

    def put(self, call: Pending) -> bool:
        name = (call.session, call.sender, call.number)
        if self.find(call.key) is not None:
            return False
        if self.per_session and call.number:
            if name in self.had:
                return False
            self.had.add(name)
            if call.reentrant:
                self.passed.add(name)
            else:
                self.expected.setdefault(name[:2], call.number)
        self.serial += 1
        call.serial = self.serial
        self.calls.append(call)
        if call.reentrant and call.ready:
            self.urgent.append(call)
        return True

    def mark_ready(self, key: bytes) -> None:
        call = self.find(key)
        if call is not None and call.state == "queued" and not call.ready:
            call.ready = True
            if call.reentrant:
                self.urgent.append(call)

    def running(self) -> int:
        return sum(call.state == "running" and not call.reentrant for call in self.calls)

    def rank(self, call: Pending) -> tuple[int, int]:
        priority = self.priorities.get(call.session, call.priority)
        return (call.arrived - priority * AGING_S, call.serial)

    def may_run(self, call: Pending) -> bool:
        if not call.ready:
            return False
        if not self.per_session or not call.number:
            return True
        rivals = [c for c in self.plain() if c.session == call.session and c.sender == call.sender and c.number]
        if min(rivals, key=lambda c: (c.number, c.serial)) is not call:
            return False
        if not self.hold_gaps:
            return True
        first = self.expected[call.session, call.sender]
        return all((call.session, call.sender, number) in self.passed for number in range(first, call.number))

    def plain(self) -> list[Pending]:
        return [call for call in self.queued() if not call.reentrant]

    def take(self) -> bytes | None:
        while self.urgent:
            call = self.urgent.pop(0)
            if call.state == "queued":
                call.state = "running"
                return call.key
        if self.running() >= self.concurrency:
            return None
        call = self.next_of_session() if self.per_session else self.next_call()
        if call is None:
            return None
        call.state = "running"
        self.passed.add((call.session, call.sender, call.number))
        return call.key

    def next_call(self) -> Pending | None:
        return min(filter(self.may_run, self.plain()), key=self.rank, default=None)

    def next_of_session(self) -> Pending | None:
        busy = {call.session for call in self.calls if call.state != "queued" and not call.reentrant}
        runnable = [call for call in self.plain() if call.session not in busy and self.may_run(call)]
        if not runnable:
            return None
        sessions = {call.session for call in runnable}
        best = min((call for call in self.plain() if call.session in sessions), key=self.rank)
        return min((call for call in runnable if call.session == best.session), key=lambda call: call.serial)

    def wait(self, key: bytes) -> None:
        call = self.find(key)
        if call is not None and call.state == "running":
            call.state = "waiting"

    def resume(self, key: bytes) -> None:
        call = self.find(key)
        if call is not None and call.state == "waiting":
            call.state = "running"

    def finish(self, key: bytes) -> None:
        call = self.find(key)
        if call is not None and call.state != "queued":
            self.calls.remove(call)

    def remove(self, key: bytes) -> bool:
        call = self.find(key)
        if call is None or call.state != "queued":
            return False
        call.state = "gone"
        self.calls.remove(call)
        self.passed.add((call.session, call.sender, call.number))
        return True

    def shed(self) -> bytes | None:
        victims = self.plain()
        if not victims:
            return None
        worst = min(victims, key=lambda call: (self.priorities.get(call.session, call.priority), -call.serial))
        self.remove(worst.key)
        return worst.key

    def set_priority(self, session: str, value: int | None) -> None:
        if value is None:
            self.priorities.pop(session, None)
        else:
            self.priorities[session] = value

    def prioritise(self, key: bytes, value: int) -> bool:
        call = self.find(key)
        if call is None or call.state != "queued":
            return False
        call.priority = value
        return True

    def skip(self, session: str, sender: str, number: int) -> None:
        if self.per_session:
            self.had.add((session, sender, number))
            self.passed.add((session, sender, number))


class Pair:
    """A mailbox and its model, driven together by one source of choices."""

    def __init__(self, chance: random.Random, *, per_session: bool, hold_gaps: bool, concurrency: int) -> None:
        self.chance = chance
        self.mailbox = Mailbox(concurrency=concurrency, per_session=per_session, aging_s=AGING_S, hold_gaps=hold_gaps)
        self.model = NaiveMailbox(concurrency, per_session, hold_gaps)
        self.now = 0
        self.keys = 0
        self.next_number: dict[tuple[str, str], int] = {}

    def key(self) -> bytes:
        known = [call.key for call in self.model.calls]
        return self.chance.choice(known) if known and self.chance.random() < 0.95 else b"unknown"

    def step(self) -> None:
        chance = self.chance
        self.now += chance.choice([0, 0, 1, 5])
        doing = chance.choice(["put"] * 6 + ["take"] * 5 + ["finish"] * 3 + ["ready", "wait", "resume", "remove", "other"])
        if doing == "put":
            self.put()
        elif doing == "take":
            self.same(self.mailbox.take(self.now), self.model.take())
        elif doing == "other":
            self.other()
        else:
            name = {"ready": "mark_ready"}.get(doing, doing)
            key = self.key()
            self.same(getattr(self.mailbox, name)(key), getattr(self.model, name)(key))
        assert len(self.mailbox) == len(self.model.queued())
        assert self.mailbox.running == self.model.running()

    def same(self, got: Any, wanted: Any) -> None:
        assert got == wanted

    def put(self) -> None:
        chance = self.chance
        session, sender = chance.choice("stu"), chance.choice("xyz")
        number = self.number(session, sender)
        self.keys += 1
        key = b"%d" % self.keys if chance.random() < 0.97 else self.key()
        priority, ready, reentrant = chance.choice([0, 0, 1, 3, -2]), chance.random() < 0.8, chance.random() < 0.05
        got = self.mailbox.put(
            key,
            session=session,
            sender=sender,
            number=number,
            priority=priority,
            now=self.now,
            ready=ready,
            reentrant=reentrant,
        )
        self.same(got, self.model.put(Pending(key, session, sender, number, priority, self.now, ready, reentrant, 0)))

    def number(self, session: str, sender: str) -> int:
        """Mostly the next one; sometimes none, a gap, or one from the past."""
        chance = self.chance
        kind = chance.random()
        if kind < 0.2:
            return 0
        following = self.next_number.get((session, sender), chance.choice([1, 7]))
        if kind < 0.3:
            return max(1, following - chance.randint(1, 4))
        if kind < 0.4:
            following += chance.randint(1, 3)
        self.next_number[session, sender] = following + 1
        return following

    def other(self) -> None:
        chance = self.chance
        kind = chance.random()
        session, sender = chance.choice("stu"), chance.choice("xyz")
        if kind < 0.4:
            self.same(self.mailbox.shed(), self.model.shed())
        elif kind < 0.7:
            value = chance.choice([None, 0, 2, 5])
            self.mailbox.set_priority(session, value)
            self.model.set_priority(session, value)
        elif kind < 0.85:
            key, priority = self.key(), chance.choice([-3, 0, 1, 4])
            self.same(self.mailbox.prioritise(key, priority), self.model.prioritise(key, priority))
        else:
            number = self.next_number.get((session, sender), 1)
            self.next_number[session, sender] = number + 1
            self.mailbox.skip(session, sender, number)
            self.model.skip(session, sender, number)

    def empty(self) -> None:
        """Everything that may run runs to its end."""
        for call in list(self.model.calls):
            self.mailbox.mark_ready(call.key)
            self.model.mark_ready(call.key)
        for _ in range(10_000):
            for call in [call for call in self.model.calls if call.state != "queued"]:
                self.mailbox.finish(call.key)
                self.model.finish(call.key)
            got = self.mailbox.take(self.now)
            self.same(got, self.model.take())
            if got is None and not self.model.running():
                return
        raise AssertionError("it does not empty")


@settings(max_examples=150, deadline=None)
@given(
    chance=st.randoms(use_true_random=False),
    steps=st.integers(1, 150),
    per_session=st.booleans(),
    hold_gaps=st.booleans(),
    concurrency=st.integers(1, 4),
)
def test_it_does_what_the_naive_model_does(
    chance: random.Random, steps: int, per_session: bool, hold_gaps: bool, concurrency: int
) -> None:
    pair = Pair(chance, per_session=per_session, hold_gaps=hold_gaps, concurrency=concurrency)
    for _ in range(steps):
        pair.step()
    pair.empty()
    if not hold_gaps:
        assert len(pair.mailbox) == 0


@pytest.mark.parametrize("seed", range(40))
def test_long_runs_agree_with_the_naive_model(seed: int) -> None:
    chance = random.Random(seed)
    pair = Pair(chance, per_session=seed % 4 != 0, hold_gaps=seed % 2 == 0, concurrency=chance.choice([1, 3, 50]))
    for _ in range(600):
        pair.step()
    pair.empty()


def put(mailbox: Mailbox, key: bytes, session: str = "s", sender: str = "x", now: float = 0.0, **more: Any) -> bool:
    return mailbox.put(key, session=session, sender=sender, now=now, **more)


def test_a_session_runs_one_call_at_a_time_and_stays_its_own_while_the_call_waits() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True)
    put(mailbox, b"1", "s", number=1)
    put(mailbox, b"2", "s", number=2)
    put(mailbox, b"3", "t", number=1)
    assert [mailbox.take(0), mailbox.take(0)] == [b"1", None]
    mailbox.wait(b"1")
    assert [mailbox.take(0), mailbox.take(0)] == [b"3", None]
    mailbox.resume(b"1")
    assert mailbox.running == 2, "it goes on at once"
    mailbox.finish(b"3")
    assert mailbox.take(0) is None
    mailbox.finish(b"1")
    assert mailbox.take(0) == b"2"


def test_two_hundred_nested_calls_run_with_a_concurrency_of_one() -> None:
    mailbox = Mailbox(concurrency=1, per_session=False)
    for depth in range(200):
        put(mailbox, b"%d" % depth)
        assert mailbox.take(0) == b"%d" % depth
        mailbox.wait(b"%d" % depth)
    for depth in reversed(range(200)):
        mailbox.resume(b"%d" % depth)
        assert mailbox.running == 1
        mailbox.finish(b"%d" % depth)
    assert mailbox.running == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_long_session_keeps_its_order_whatever_becomes_of_its_priority(seed: int) -> None:
    """It grows and shrinks past the length from which its calls are kept otherwise; some of them are removed."""
    chance = random.Random(seed)
    mailbox = Mailbox(concurrency=1, per_session=True)
    queued: list[bytes] = []
    number = 0
    for length in (3, 200, 40, 90, 0):
        while len(queued) < length:
            number += 1
            key = b"%d" % number
            assert put(mailbox, key, number=number, now=number / 100, priority=chance.choice([0, 0, 0, number % 3]))
            queued.append(key)
        while len(queued) > length:
            if chance.random() < 0.4:
                key = queued.pop(chance.randrange(len(queued)))
                assert mailbox.remove(key)
            else:
                taken = mailbox.take(number / 100)
                assert taken == queued.pop(0)
                mailbox.finish(taken)
            if chance.random() < 0.1:
                mailbox.set_priority("s", chance.choice([None, 0, 5]))
        assert len(mailbox) == len(queued)
    assert not put(mailbox, b"late", number=number)


def test_a_call_that_waits_for_arguments_holds_back_its_own_sender_only() -> None:
    mailbox = Mailbox(concurrency=9, per_session=True)
    put(mailbox, b"x1", sender="x", number=1, ready=False)
    put(mailbox, b"x2", sender="x", number=2)
    put(mailbox, b"y1", sender="y", number=1)
    assert mailbox.take(0) == b"y1"
    mailbox.finish(b"y1")
    assert mailbox.take(0) is None
    mailbox.mark_ready(b"x1")
    assert mailbox.take(0) == b"x1"
    mailbox.finish(b"x1")
    assert mailbox.take(0) == b"x2"


def test_a_latecomer_goes_first_and_a_duplicate_is_told() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True)
    assert put(mailbox, b"5", number=5)
    assert put(mailbox, b"7", number=7)
    assert put(mailbox, b"4", number=4)
    assert not put(mailbox, b"again", number=5)
    assert not put(mailbox, b"7", number=8)
    order = []
    while (key := mailbox.take(0)) is not None:
        order.append(key)
        mailbox.finish(key)
    assert order == [b"4", b"5", b"7"]
    assert not put(mailbox, b"much later", number=7)
    mailbox.forget_session("s")
    assert put(mailbox, b"unknown again", number=7)


def test_aging_lets_a_low_priority_pass_in_the_end() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True, aging_s=10.0)
    put(mailbox, b"old", "s", now=0.0, priority=0)
    put(mailbox, b"urgent", "t", now=9.0, priority=1)
    put(mailbox, b"late", "u", now=11.0, priority=1)
    assert mailbox.take(11.0) == b"urgent"
    mailbox.finish(b"urgent")
    assert mailbox.take(11.0) == b"old"
    assert mailbox.last_wait_s == 11.0


def test_a_session_has_the_highest_priority_of_its_calls_but_keeps_its_order() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True)
    put(mailbox, b"t1", "t", number=1)
    put(mailbox, b"s1", "s", number=1)
    put(mailbox, b"s2", "s", number=2, priority=5)
    assert mailbox.take(0) == b"s1"
    mailbox.finish(b"s1")
    assert mailbox.take(0) == b"s2"


def test_a_re_entrant_call_runs_beside_its_ancestor() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True)
    put(mailbox, b"1", number=1)
    put(mailbox, b"2", number=2)
    assert mailbox.take(0) == b"1"
    put(mailbox, b"inner", number=3, reentrant=True)
    put(mailbox, b"inner that waits", reentrant=True, ready=False)
    assert [mailbox.take(0), mailbox.take(0)] == [b"inner", None]
    mailbox.mark_ready(b"inner that waits")
    assert mailbox.take(0) == b"inner that waits"
    assert mailbox.running == 1
    mailbox.finish(b"inner")
    assert mailbox.take(0) is None
    mailbox.finish(b"1")
    assert mailbox.take(0) == b"2"


def test_shedding_takes_the_lowest_priority_and_of_it_the_youngest() -> None:
    mailbox = Mailbox(concurrency=1, per_session=False, high_water=3)
    for key, priority in ((b"a", 1), (b"b", 0), (b"c", 0), (b"d", 2)):
        put(mailbox, key, session=key.decode(), priority=priority)
    assert mailbox.is_full
    assert mailbox.shed() == b"c"
    assert not mailbox.is_full
    mailbox.set_priority("d", -1)
    assert [mailbox.shed() for _ in range(4)] == [b"d", b"b", b"a", None]


def test_a_gap_holds_back_until_it_is_skipped_if_asked_for() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True, hold_gaps=True)
    put(mailbox, b"1", number=1)
    put(mailbox, b"3", number=3)
    assert mailbox.take(0) == b"1"
    mailbox.finish(b"1")
    assert mailbox.take(0) is None
    mailbox.skip("s", "x", 2)
    assert mailbox.take(0) == b"3"
    assert not put(mailbox, b"2", number=2)


def test_a_batch_shares_one_slot_and_takes_its_own_kind_only() -> None:
    mailbox = Mailbox(concurrency=1, per_session=False)
    for key, batch in ((b"a", "embed"), (b"b", "rank"), (b"c", "embed"), (b"d", "embed"), (b"e", "")):
        put(mailbox, key, batch=batch)
    put(mailbox, b"best", batch="embed", priority=1)
    put(mailbox, b"unready", batch="embed", priority=9, ready=False)
    assert mailbox.take_batch(0, 3) == [b"best", b"a", b"c"]
    assert mailbox.running == 1
    assert mailbox.take_batch(0, 3) == []
    for key in (b"a", b"c", b"best"):
        assert mailbox.running == 1
        mailbox.finish(key)
    assert mailbox.remove(b"d")
    assert mailbox.take_batch(0, 3) == [b"b"]
    mailbox.finish(b"b")
    assert mailbox.take_batch(0, 3) == [b"e"]


def test_with_sessions_a_batch_is_one_call() -> None:
    mailbox = Mailbox(concurrency=9, per_session=True)
    put(mailbox, b"a", "s", batch="embed")
    put(mailbox, b"b", "t", batch="embed")
    assert mailbox.take_batch(0, 9) == [b"a"]


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency"):
        Mailbox(concurrency=0, per_session=True)
    with pytest.raises(ValueError, match="aging"):
        Mailbox(concurrency=1, per_session=True, aging_s=0)


@pytest.mark.parametrize("per_session", [True, False])
def test_what_is_removed_leaves_no_residue(per_session: bool) -> None:
    mailbox = Mailbox(concurrency=1, per_session=per_session)
    put(mailbox, b"stays", "first", number=1)
    assert mailbox.take(0) == b"stays"
    put(mailbox, b"waits", "first", number=2)
    for number in range(20_000):
        put(mailbox, b"%d" % number, "s", number=number + 1, priority=-1, batch="x")
        assert mailbox.remove(b"%d" % number)
    assert len(mailbox) == 1
    assert _reachable(mailbox) < 5_000


def _reachable(thing: object) -> int:
    """How many containers and objects hang on `thing`."""
    import gc

    seen: set[int] = set()
    stack = [thing]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        stack.extend(gc.get_referents(item))
    return len(seen)


def test_a_call_runs_after_a_lower_number_that_came_later_was_removed() -> None:
    mailbox = Mailbox(concurrency=1, per_session=True)
    mailbox.put(b"second", session="s", sender="x", number=2, now=0.0)
    mailbox.put(b"first", session="s", sender="x", number=1, now=1.0, ready=False)
    assert mailbox.take(2.0) is None
    mailbox.remove(b"first")
    assert mailbox.take(3.0) == b"second"
