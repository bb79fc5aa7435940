"""What one attempt at a job sees, another one sees again, whatever else may have changed. Pure: no transport, no loop."""

from __future__ import annotations

import tracemalloc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.history import History, Memory, root_id
from nalar_mq.messages import (
    WIRE_VERSION,
    Begun,
    Fail,
    Observation,
    Outcome,
    Pack,
    Reading,
    Resolve,
    Unseen,
    Voided,
    encode_record,
)

JOB = "j"
ROOT = root_id(JOB, 0)
LOST = "nalar_mq.errors:WorkerLostError"


def call(history: History, name: str, payload: bytes = b"") -> bytes:
    return history.id_of(name, "", "s", "", b"", payload)


def value(id: bytes, payload: bytes = b"v") -> Outcome:
    return Outcome(JOB, ROOT, Resolve(id, payload))


def failure(id: bytes) -> Outcome:
    return Outcome(JOB, ROOT, Fail(id, "m:E", "text"))


def loss(id: bytes, worker: str = "w") -> Outcome:
    return Outcome(JOB, ROOT, Fail(id, LOST, f"worker {worker} was lost"))


def void(*ids: bytes) -> Voided:
    return Voided(JOB, ROOT, ids)


def again(*past: Observation, in_order: bool = True, failures: int = 0) -> History:
    return History(JOB, ROOT, in_order=in_order, memory=Memory({ROOT: past}, {}, ()), failures=failures)


def test_the_same_program_issues_the_same_ids() -> None:
    first, second = (History(JOB, ROOT, in_order=True) for _ in range(2))
    ids = [call(first, "a"), call(first, "a"), call(first, "b"), call(first, "a", b"x")]
    assert ids == [call(second, "a"), call(second, "a"), call(second, "b"), call(second, "a", b"x")]
    assert len(set(ids)) == 4
    assert all(len(id) == 16 for id in ids)


def test_what_is_called_in_another_order_has_the_same_ids() -> None:
    first, second = (History(JOB, ROOT, in_order=True) for _ in range(2))
    a, b = call(first, "a"), call(first, "b")
    assert (call(second, "b"), call(second, "a")) == (b, a)


def test_neither_jobs_nor_lives_nor_makers_share_ids() -> None:
    roots = {root_id("j", 0), root_id("j", 1), root_id("k", 0)}
    assert len(roots) == 3
    assert len({History(JOB, root, in_order=True).id_of("a", "", "s", "", b"", b"") for root in roots}) == 3


def test_words_of_a_call_do_not_run_into_each_other() -> None:
    history = History(JOB, ROOT, in_order=True)
    assert history.id_of("ab", "c", "", "", b"", b"") != history.id_of("a", "bc", "", "", b"", b"")


def test_outcomes_appear_in_the_order_in_which_they_appeared() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c = (call(plan, name) for name in "abc")
    history = again(value(c), value(a), failure(b))
    seen = []
    for id in (a, b, c):
        assert history.expects(id)
        assert history.made(id) is None
        seen += [result.id for result in history.due()]
    assert seen == [c, a, b]
    assert not history.is_repeating


def test_a_call_that_was_not_seen_is_not_expected() -> None:
    plan = History(JOB, ROOT, in_order=True)
    history = again(value(call(plan, "a")))
    assert not history.expects(call(plan, "b"))


def test_an_outcome_waits_for_the_looks_that_found_nothing_before_it() -> None:
    a = call(History(JOB, ROOT, in_order=True), "a")
    history = again(Unseen(JOB, ROOT, 1, 2), value(a))
    history.made(a)
    assert history.due() == []
    assert history.was_unseen(history.look())
    assert history.due() == []
    assert history.was_unseen(history.look())
    assert [result.id for result in history.due()] == [a]
    assert not history.was_unseen(history.look())


def test_who_looks_at_something_out_of_turn_gets_what_comes_before_it_too() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c = (call(plan, name) for name in "abc")
    history = again(value(a), Unseen(JOB, ROOT, 5, 5), value(b), value(c))
    history.made(b)
    assert history.due() == []
    assert [result.id for result in history.hurry(b)] == [b]
    late = history.made(a)
    assert late is not None
    assert late.id == a
    history.made(c)
    assert [result.id for result in history.due()] == [c]


def test_what_was_observed_before_a_workflow_began_is_void() -> None:
    a = call(History(JOB, ROOT, in_order=True), "a")
    history = again(Begun(JOB, ROOT, "old"), Reading(JOB, ROOT, 1, 5.0), value(a), Begun(JOB, ROOT, "new"), value(a, b"w"))
    assert history.former_version == "new"
    assert history.opening() is None
    assert history.read_clock(7.0)[0] == 7.0
    assert history.made(a) is None
    assert [result.payload for result in history.due() if isinstance(result, Resolve)] == [b"w"]


def test_the_first_observation_says_by_which_code_it_was_made() -> None:
    history = History(JOB, ROOT, in_order=True, version="v")
    assert history.opening() == Begun(JOB, ROOT, "v")
    assert history.opening() is None
    assert History(JOB, ROOT, in_order=True).opening() is None


def test_the_clock_shows_again_what_it_showed_before_what_follows_appears() -> None:
    a = call(History(JOB, ROOT, in_order=True), "a")
    history = again(Reading(JOB, ROOT, 1, 5.0), Reading(JOB, ROOT, 2, 6.0), value(a))
    history.made(a)
    assert history.read_clock(9.0) == (5.0, None)
    assert history.due() == []
    assert history.read_clock(9.0) == (6.0, None)
    assert [result.id for result in history.due()] == [a]
    assert history.read_clock(9.0) == (9.0, Reading(JOB, ROOT, 3, 9.0))


def test_a_program_at_a_standstill_gives_up_looks_but_no_calls() -> None:
    a = call(History(JOB, ROOT, in_order=True), "a")
    history = again(Unseen(JOB, ROOT, 1, 3), Reading(JOB, ROOT, 1, 5.0), value(a))
    assert history.skip_looks()
    assert not history.skip_looks()
    assert history.next_wanted == value(a)
    history.made(a)
    assert history.next_wanted is None


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("failures", [0, 1])
def test_what_came_late_is_observed_again_when_its_call_is_made(in_order: bool, failures: int) -> None:
    first = History(JOB, ROOT, in_order=in_order)
    a, b = call(first, "a"), call(first, "b")
    late = first.outcome(Resolve(b, b"late"), 1.0, is_late=True)
    history = again(value(a), late, in_order=in_order, failures=failures)
    assert history.made(call(history, "a")) or history.due()
    assert not history.is_repeating
    assert not history.expects(b)
    assert history.take_loose(call(history, "b")) == late.result


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("comes_first", [True, False])
def test_what_came_late_does_not_count_where_it_was_observed(in_order: bool, comes_first: bool) -> None:
    first = History(JOB, ROOT, in_order=in_order)
    a, b = call(first, "a"), call(first, "b")
    late, seen = first.outcome(Resolve(b, b"late"), 1.0, is_late=True), value(b, b"seen")
    history = again(*((late, value(a), seen) if comes_first else (value(a), seen, late)), in_order=in_order)
    found = [history.made(call(history, "b")), *history.due(), history.made(call(history, "a")), *history.due()]
    assert [result.payload for result in found if result] == ([b"v", b"seen"] if in_order else [b"seen", b"v"])
    assert history.take_loose(b) is None


def test_agents_and_tools_find_outcomes_in_any_order() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b = call(plan, "a"), call(plan, "b")
    history = again(value(a), Unseen(JOB, ROOT, 1, 9), failure(b), in_order=False)
    found = history.made(b)
    assert isinstance(found, Fail)
    assert not history.was_unseen(1)
    assert history.made(a) is not None


def test_after_a_failure_only_what_succeeded_is_seen_again() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b = call(plan, "a"), call(plan, "b")
    history = again(failure(a), value(b), failures=1)
    assert not history.expects(a)
    assert isinstance(history.made(b), Resolve)


def test_a_loss_that_has_ended_an_attempt_is_made_again_after_what_came_before_it_in_its_order() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c, d = (call(plan, name) for name in "abcd")
    history = again(value(c), value(b), loss(a), value(d), Unseen(JOB, ROOT, 1, 1), void(a))
    assert not history.expects(a) and history.take_loose(a) is None
    assert history.made(b) is None and history.due() == [] and history.is_repeating
    history.made(c)
    assert [result.id for result in history.due()] == [c, b]
    assert not history.is_repeating and history.next_wanted is None
    assert not history.expects(d) and isinstance(history.take_loose(d), Resolve), "it came after the loss: it is new again"
    assert history.take_loose(d) is None
    assert not history.was_unseen(history.look()), "it was looked at after the loss"


def test_what_was_observed_again_after_a_loss_is_seen_in_that_order_by_the_next_attempt() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c, d, e = (call(plan, name) for name in "abcde")
    history = again(value(b), loss(a), value(c), value(e), void(a), value(d), value(c), value(a))
    for id in (a, c, d):
        assert history.made(id) is None and history.due() == []
    history.made(b)
    assert [result.id for result in history.due()] == [b, d, c, a]
    assert isinstance(history.take_loose(e), Resolve), "it was not observed again"


def test_what_the_clock_showed_after_a_loss_is_shown_and_seen_in_order_again() -> None:
    """It shows the same, so that what was called with it is found; the next attempt sees it before what came after it."""
    plan = History(JOB, ROOT, in_order=True)
    a, b = call(plan, "a"), call(plan, "b")
    past = [Reading(JOB, ROOT, 1, 10.0), loss(a), Reading(JOB, ROOT, 2, 20.0), void(a)]
    second = again(*past)
    assert second.read_clock(99.0) == (10.0, None)
    shown, reading = second.read_clock(99.0)
    assert (shown, reading) == (20.0, Reading(JOB, ROOT, 2, 20.0))
    assert reading is not None
    third = again(*past, reading, value(a), value(b))
    for id in (a, b):
        third.made(id)
    assert third.read_clock(99.0) == (10.0, None)
    assert third.due() == [], "it had read the clock again before that"
    assert third.read_clock(99.0) == (20.0, None)
    assert [result.id for result in third.due()] == [a, b]


def test_a_call_may_be_lost_again() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c, d = (call(plan, name) for name in "abcd")
    history = again(loss(a), value(b), void(a), value(c), value(b), loss(a, "v"), value(d), void(a), value(a))
    assert not history.expects(d) and isinstance(history.take_loose(d), Resolve)
    assert history.made(a) is None and history.made(b) is None and history.due() == []
    history.made(c)
    assert [result.id for result in history.due()] == [c, b, a]


def test_a_failure_that_has_no_order_any_more_can_be_void_as_well() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c = (call(plan, name) for name in "abc")
    history = again(loss(a), loss(b), void(a), value(a), value(c), void(b))
    assert history.take_loose(b) is None and not history.expects(b)
    assert history.made(c) is None and history.made(a) is None
    assert [result.id for result in history.due()] == [a, c]
    history = again(loss(a), loss(b), void(a), loss(b), value(c), void(b))
    assert not history.expects(b) and history.take_loose(b) is None
    assert isinstance(history.take_loose(c), Resolve)


def test_what_depended_on_a_lost_call_is_void_with_it_and_other_failures_are_not() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c, d = (call(plan, name) for name in "abcd")
    history = again(loss(d, "v"), loss(a), failure(b))
    assert history.outcome(Fail(c, LOST, "worker w was lost"), 1.0).parent == ROOT
    assert history.voided([(LOST, "worker w was lost")]) == [void(a, c)]
    assert history.voided([("m:E", "worker w was lost")]) == []
    assert again(loss(a), void(a)).voided([(LOST, "worker w was lost")]) == []


def test_what_was_lost_after_a_loss_is_void_with_it() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b, c, d = (call(plan, name) for name in "abcd")
    history = again(loss(c, "v"), loss(a), failure(b))
    history.outcome(Fail(d, LOST, "worker u was lost"), 1.0)
    assert history.voided([(LOST, "worker w was lost")]) == [void(a, d)]
    history.outcome(Fail(c, LOST, "worker v was lost"), 2.0)
    assert history.voided([(LOST, "worker w was lost")]) == [void(a, d, c)], "it was observed again, after the others"


def test_very_many_losses_are_void_in_parts() -> None:
    ids = [number.to_bytes(16, "big") for number in range(70_000)]
    history = History(JOB, ROOT, in_order=True)
    past = [history.outcome(loss(id).result, 0.0) for id in ids]
    parts = history.voided([(LOST, "worker w was lost")])
    assert max(len(encode_record(Pack(WIRE_VERSION, (part,)))) for part in parts) < 32_000
    later = again(*past, *parts)
    assert not any(map(later.expects, ids)) and not any(map(later.take_loose, ids))
    some = again(*past, parts[0])
    assert not some.expects(ids[0]) and isinstance(some.take_loose(ids[-1]), Fail), "the next attempt ends with that one"


def test_the_texts_of_failures_are_not_kept() -> None:
    """A program may meet very many of them, and go on."""
    history = History(JOB, ROOT, in_order=True)
    tracemalloc.start()
    try:
        for number in range(200):
            history.outcome(Fail(number.to_bytes(16, "big"), "m:E", f"{number}" + "x" * 100_000), 0.0)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


def test_only_a_failure_can_be_void() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b = call(plan, "a"), call(plan, "b")
    for in_order in (True, False):
        history = again(value(a), loss(b), void(a, b), in_order=in_order)
        history.made(a)
        assert in_order or not history.expects(a)
        assert [result.id for result in history.due()] == ([a] if in_order else [])
        assert not history.expects(b)


def test_a_wait_that_was_cut_short_is_cut_again_before_anything_later_appears() -> None:
    plan = History(JOB, ROOT, in_order=True)
    a, b = call(plan, "a"), call(plan, "b")
    number = plan.wait(a)
    assert plan.note_unseen(number)
    history = again(value(b), *plan.take_noted(), value(a))
    assert not history.was_unseen(history.wait(b))
    assert history.made(a) is None and history.due() == []
    assert history.wait(a) == number and history.was_unseen(number)
    history.waits_again(number)
    assert history.made(b) is None
    assert [found.id for found in history.due()] == [b]
    assert history.is_waiting_again and history.is_repeating
    history.cut_again(number)
    assert [found.id for found in history.due()] == [a]
    assert not history.is_waiting_again
    assert history.wait(a) not in (number, plan.look())


def test_waits_have_their_numbers_whatever_else_waits_and_looks() -> None:
    first, second = (History(JOB, ROOT, in_order=True) for _ in range(2))
    a, b = call(first, "a"), call(first, "b")
    numbers = [first.wait(a), first.wait(a), first.wait(b)]
    second.look()
    assert [second.wait(b), second.wait(a), second.wait(a)] == [numbers[2], numbers[0], numbers[1]]
    assert len(set(numbers)) == 3


def test_looks_that_found_nothing_are_noted_together() -> None:
    history = History(JOB, ROOT, in_order=True)
    assert history.note_unseen(1)
    assert not history.note_unseen(2)
    assert not history.note_unseen(4)
    assert history.take_noted() == [Unseen(JOB, ROOT, 1, 2), Unseen(JOB, ROOT, 4, 4)]
    assert history.take_noted() == []
    assert history.note_unseen(5)


class Program:
    """Makes calls, looks at them and takes them as they end, by random numbers of its own and by what it has seen."""

    def __init__(self, seed: int, history: History) -> None:
        self.random = Random(seed)
        self.history = history
        self.made: list[bytes] = []
        self.ended: dict[bytes, bytes] = {}
        self.trail: list[object] = []
        self.leaning = 0

    def run(self, steps: int) -> list[object]:
        while len(self.trail) < steps:
            self.step()
        return self.trail

    def step(self) -> None:
        choice = (self.random.random() + self.leaning / 10) % 1.0
        taken = [entry[1] for entry in self.trail if isinstance(entry, tuple) and entry[0] == "took"]
        if choice < 0.4 or not self.made:
            self.made.append(call(self.history, f"t{self.random.randrange(3)}"))
            self.on_made(self.made[-1])
            self.trail.append(("made", self.made[-1]))
        elif choice < 0.7 or len(taken) == len(self.made):
            wanted = self.made[self.random.randrange(len(self.made))]
            seen = self.look(wanted)
            self.leaning += seen
            self.trail.append(("looked", wanted, seen))
        else:
            first = self.next_ended(taken)
            self.leaning += len(self.ended[first])
            self.trail.append(("took", first, self.ended[first]))

    def on_made(self, id: bytes) -> None:
        raise NotImplementedError

    def look(self, wanted: bytes) -> bool:
        raise NotImplementedError

    def next_ended(self, taken: list[object]) -> bytes:
        return next(id for id in self.ended if id not in taken)


class First(Program):
    """The attempt that is interrupted: the world ends its calls when it likes."""

    def __init__(self, seed: int, world: Random) -> None:
        super().__init__(seed, History(JOB, ROOT, in_order=True))
        self.world = world
        self.journal: list[Observation] = []

    def on_made(self, id: bytes) -> None:
        for pending in [id for id in self.made if id not in self.ended]:
            if self.world.random() < 0.3:
                self.end(pending)

    def end(self, id: bytes) -> None:
        self.ended[id] = b"x" * self.world.randrange(5)
        self.journal.append(value(id, self.ended[id]))

    def look(self, wanted: bytes) -> bool:
        number = self.history.look()
        if wanted not in self.ended:
            self.journal.append(Unseen(JOB, ROOT, number, number))
        return wanted in self.ended

    def next_ended(self, taken: list[object]) -> bytes:
        pending = [id for id in self.made if id not in self.ended]
        if pending and all(id in taken for id in self.ended):
            self.end(self.world.choice(pending))
        return super().next_ended(taken)


class Second(Program):
    """Another attempt, which has only the journal of the first one."""

    def __init__(self, seed: int, journal: list[Observation]) -> None:
        super().__init__(seed, again(*journal))

    def on_made(self, id: bytes) -> None:
        if self.history.expects(id):
            result = self.history.made(id)
            self.take([result] if result is not None else [])
        self.take(self.history.due())

    def take(self, results: list[Resolve | Fail]) -> None:
        self.ended |= {result.id: result.payload for result in results}

    def look(self, wanted: bytes) -> bool:
        unseen = self.history.was_unseen(self.history.look())
        self.take(self.history.due())
        return wanted in self.ended and not unseen


@given(st.integers(0, 2**32), st.integers(0, 2**32), st.integers(1, 60))
def test_a_program_that_goes_by_what_it_sees_takes_the_same_way_again(seed: int, world: int, steps: int) -> None:
    first = First(seed, Random(world))
    trail = first.run(steps)
    assert Second(seed, first.journal).run(steps) == trail


class Lost(Exception):
    """The program has met the loss of a call, and ends with it."""

    def __init__(self, text: str) -> None:
        self.text = text


class Attempt(Program):
    """Sees again what is in the journal, and goes on from there; some of its calls are lost."""

    def __init__(self, seed: int, world: Random, journal: list[Observation]) -> None:
        super().__init__(seed, again(*journal))
        self.world = world
        self.journal = journal
        self.held: list[Resolve | Fail] = []
        self.lost: dict[bytes, str] = {}
        self.appeared: dict[bytes, int] = {}

    def on_made(self, id: bytes) -> None:
        if self.history.expects(id):
            result = self.history.made(id)
            self.take([result] if result is not None else [])
        elif loose := self.history.take_loose(id):
            self.observe(loose)
        self.go_on()
        for pending in self.pending:
            if self.world.random() < 0.3:
                self.end(pending)

    def go_on(self) -> None:
        self.take(self.history.due())
        if not self.history.is_repeating:
            self.take(self.held)
            self.held.clear()

    @property
    def pending(self) -> list[bytes]:
        if self.history.is_repeating:
            return []
        return [id for id in self.made if id not in self.ended and not self.history.expects(id)]

    def end(self, id: bytes) -> None:
        if self.world.random() < 0.15:
            result: Resolve | Fail = Fail(id, LOST, f"worker {self.world.randrange(3)} was lost")
        else:
            result = Resolve(id, b"x" * self.world.randrange(5))
        self.observe(result)
        self.go_on()

    def observe(self, result: Resolve | Fail) -> None:
        self.journal.append(self.history.outcome(result, 0.0))
        self.held.append(result)

    def take(self, results: list[Resolve | Fail]) -> None:
        self.ended |= {result.id: result.payload for result in results}
        self.appeared |= {result.id: len(self.trail) for result in results}
        self.lost |= {result.id: result.text for result in results if isinstance(result, Fail)}

    def look(self, wanted: bytes) -> bool:
        number = self.history.look()
        unseen = self.history.was_unseen(number)
        self.go_on()
        if wanted not in self.ended and not unseen:
            self.journal.append(Unseen(JOB, ROOT, number, number))
        return wanted in self.ended and not unseen

    def next_ended(self, taken: list[object]) -> bytes:
        if all(id in taken for id in self.ended):
            self.end(self.world.choice(self.pending))
        first = super().next_ended(taken)
        if first in self.lost:
            raise Lost(self.lost[first])
        return first


@given(st.integers(0, 2**32), st.integers(0, 2**32), st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_every_attempt_goes_the_way_of_the_former_one_up_to_a_loss_that_ended_it(
    seed: int, world: int, lengths: list[int]
) -> None:
    journal: list[Observation] = []
    chance = Random(world)
    former: list[object] = []
    for steps in lengths:
        attempt = Attempt(seed, chance, journal)
        try:
            attempt.run(steps)
        except Lost as error:
            voided = attempt.history.voided([(LOST, error.text)])
            assert voided
            journal += voided
            assert attempt.trail[: len(former)] == former, "the former attempt got further without this loss"
            former = attempt.trail[: min(attempt.appeared.get(id, len(attempt.trail)) for part in voided for id in part.ids)]
        else:
            assert attempt.trail[: len(former)] == former[:steps]
            former = max(former, attempt.trail, key=len)
