"""Limits of a mailbox against a plain count, and that nothing that may run is left waiting."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq.limits import Group
from nalar_mq.mailbox import Mailbox


class Play:
    """A mailbox under random use, and what has to hold of it."""

    def __init__(self, seed: int, *, per_session: bool, concurrency: int) -> None:
        self.chance = Random(seed)
        self.mailbox = Mailbox(concurrency=concurrency, per_session=per_session)
        self.per_session = per_session
        self.concurrency = concurrency
        self.limits: dict[Group, int] = {}
        self.calls: dict[bytes, tuple[str, str, str]] = {}
        self.queued: set[bytes] = set()
        self.unready: set[bytes] = set()
        self.running: set[bytes] = set()
        self.waiting: set[bytes] = set()
        self.now = 0.0
        self.numbers = 0

    def groups_of(self, key: bytes) -> list[Group]:
        mine = self.calls[key]
        return [group for group in self.limits if all(name in ("", own) for name, own in zip(group, mine, strict=True))]

    def has_room(self, key: bytes) -> bool:
        counts = Counter(group for other in self.running for group in self.groups_of(other))
        return all(counts[group] < self.limits[group] for group in self.groups_of(key))

    def step(self) -> None:
        self.now += self.chance.choice([0.0, 0.5])
        act = self.chance.choice(["put", "put", "take", "take", "finish", "finish", "wait", "resume", "remove", "more"])
        if act == "put":
            self.put()
        elif act == "take":
            self.take()
        elif act == "finish" and self.running | self.waiting:
            key = self.pick(self.running | self.waiting)
            self.mailbox.finish(key)
            self.running.discard(key)
            self.waiting.discard(key)
        elif act == "wait" and self.running:
            key = self.pick(self.running)
            self.mailbox.wait(key)
            self.running.remove(key)
            self.waiting.add(key)
        elif act == "resume" and self.waiting:
            key = self.pick(self.waiting)
            self.mailbox.resume(key)
            self.waiting.remove(key)
            self.running.add(key)
        elif act == "remove" and self.queued:
            key = self.pick(self.queued)
            assert self.mailbox.remove(key)
            self.queued.remove(key)
            self.unready.discard(key)
        elif act == "more":
            self.change()

    def pick(self, among: set[bytes]) -> bytes:
        return self.chance.choice(sorted(among))

    def put(self) -> None:
        self.numbers += 1
        key, session, tenant = b"%06d" % self.numbers, self.chance.choice("abc"), self.chance.choice(["", "t", "u"])
        job = self.chance.choice(["", "", "j", "k"])
        instance = self.chance.choice(["", "/1"]) if self.per_session else ""
        is_ready = self.chance.random() < 0.8
        self.calls[key] = session, tenant, job
        sender = self.chance.choice("xy")
        assert self.mailbox.put(
            key,
            session=session + instance,
            sender=sender,
            number=self.numbers if self.per_session else 0,
            priority=self.chance.choice([0, 0, 3]),
            now=self.now,
            ready=is_ready,
            tenant=tenant,
            job=job,
        )
        self.queued.add(key)
        if not is_ready:
            self.unready.add(key)

    def change(self) -> None:
        act = self.chance.randrange(4)
        if act == 0 and self.unready:
            key = self.pick(self.unready)
            self.mailbox.mark_ready(key)
            self.unready.remove(key)
        elif act == 1:
            self.mailbox.set_priority(self.chance.choice("abc"), self.chance.choice([None, -2, 4]))
        elif act == 2:
            groups: list[Group] = [("a", "", ""), ("", "t", ""), ("", "u", ""), ("b", "t", ""), ("c", "", "")]
            groups += [("", "", "j"), ("", "t", "k"), ("b", "", "j")]
            self.limits = {group: self.chance.choice([0, 1, 1, 2, 3]) for group in groups if self.chance.random() < 0.5}
            self.mailbox.limit(None, self.limits)
        elif self.queued:
            self.mailbox.prioritise(self.pick(self.queued), self.chance.choice([-3, 7]))

    def take(self) -> bool:
        key = self.mailbox.take(self.now)
        if key is None:
            return False
        assert key in self.queued - self.unready
        assert self.has_room(key), f"{self.calls[key]} runs beyond {self.limits}"
        self.queued.remove(key)
        self.running.add(key)
        return True

    def settle(self) -> None:
        """All that runs ends and all that is not limited to nothing runs: nothing may be left behind."""
        for key in sorted(self.unready):
            self.mailbox.mark_ready(key)
        self.unready.clear()
        while True:
            while self.take():
                pass
            if not self.per_session and len(self.running) < self.concurrency:
                assert not [key for key in self.queued if self.has_room(key)], "there is room for it, and it waits"
            over = sorted(self.running | self.waiting)
            if not over:
                break
            key = self.chance.choice(over)
            self.mailbox.finish(key)
            self.running.discard(key)
            self.waiting.discard(key)
        left = [key for key in self.queued if all(self.limits[group] for group in self.groups_of(key))]
        if not self.per_session or all(self.limits.values()):  # one that may never run holds its session back
            assert not left
        self.limits = {}
        self.mailbox.limit(None, {})
        while self.take():
            for key in sorted(self.running):
                self.mailbox.finish(key)
            self.running.clear()
        assert not self.queued
        assert len(self.mailbox) == 0
        assert not self.mailbox._held
        assert self.mailbox.running == 0


@pytest.mark.parametrize("per_session", [False, True])
@given(seed=st.integers(0, 1 << 32), concurrency=st.sampled_from([1, 2, 100]), steps=st.integers(1, 120))
@settings(max_examples=150, deadline=None)
def test_limits_are_kept_and_nothing_is_left_behind(per_session: bool, seed: int, concurrency: int, steps: int) -> None:
    play = Play(seed, per_session=per_session, concurrency=concurrency)
    for _ in range(steps):
        play.step()
    play.settle()


def test_the_best_of_those_that_are_held_back_is_next() -> None:
    mailbox = Mailbox(concurrency=10, per_session=False)
    mailbox.limit(None, {("", "t", ""): 1})
    for number in range(6):
        key = b"%d" % number
        mailbox.put(key, session=f"s{number}", sender="x", priority=number, now=0.0, tenant="t")
    assert [mailbox.take(1.0) for _ in range(2)] == [b"5", None]
    assert mailbox.is_held(b"4")
    mailbox.set_priority("s1", 50)
    mailbox.finish(b"5")
    assert [mailbox.take(1.0) for _ in range(2)] == [b"1", None]
    mailbox.finish(b"1")
    assert mailbox.take(1.0) == b"4"


def test_a_call_that_waits_for_others_gives_its_place_to_them() -> None:
    mailbox = Mailbox(concurrency=10, per_session=False)
    mailbox.limit(None, {("s", "", ""): 1})
    mailbox.put(b"outer", session="s", sender="x", now=0.0)
    assert mailbox.take(0.0) == b"outer"
    mailbox.put(b"inner", session="s", sender="x", now=0.0)
    assert mailbox.take(0.0) is None
    mailbox.wait(b"outer")
    assert mailbox.take(0.0) == b"inner"
    mailbox.resume(b"outer")
    mailbox.put(b"third", session="s", sender="x", now=0.0)
    mailbox.finish(b"inner")
    assert mailbox.take(0.0) is None
    mailbox.finish(b"outer")
    assert mailbox.take(0.0) == b"third"


def test_fewer_at_once_than_its_concurrency() -> None:
    mailbox = Mailbox(concurrency=4, per_session=False)
    for number in range(8):
        mailbox.put(b"%d" % number, session="s", sender="x", now=0.0)
    mailbox.limit(2, {})
    assert [mailbox.take(0.0) for _ in range(3)] == [b"0", b"1", None]
    mailbox.limit(100, {})
    assert [mailbox.take(0.0) for _ in range(3)] == [b"2", b"3", None]
    mailbox.limit(0, {})
    for key in (b"0", b"1", b"2", b"3"):
        mailbox.finish(key)
    assert not mailbox.has_next()
    mailbox.limit(None, {})
    assert mailbox.take(0.0) == b"4"
