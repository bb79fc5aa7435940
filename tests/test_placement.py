"""The routing table against a naive model of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq.address import Address
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Load, Member
from nalar_mq.placement import RoutingTable

NAMES = ("a", "b", "c", "d")
ACTORS = ("plain", "single", "pair")
LIMITS = {"plain": None, "single": 1, "pair": 2}


def _member(incarnation: int, actors: frozenset[str], draining: bool = False) -> Member:
    infos = {actor: ActorInfo("tool", {}, max_instances=LIMITS[actor]) for actor in sorted(actors)}
    return Member(WIRE_VERSION, incarnation, "node", "worker", 1, infos, draining)


class Model:
    """What the table should know, worked out from all that has happened."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.dead: set[Address] = set()

    def join(self, name: str, member: Member) -> Address | None:
        former = self.members.get(name)
        is_dead = any(dead.name == name and dead.incarnation >= member.incarnation for dead in self.dead)
        if is_dead or (former is not None and former.incarnation > member.incarnation):
            return None
        self.members[name] = member
        if former is None or former.incarnation == member.incarnation:
            return None
        return Address(name, former.incarnation)

    def leave(self, address: Address) -> bool:
        self.dead.add(address)
        member = self.members.get(address.name)
        if member is None or member.incarnation > address.incarnation:
            return False
        del self.members[address.name]
        return True

    def replicas(self, actor: str) -> set[Address]:
        serving = [Address(n, m.incarnation) for n, m in self.members.items() if actor in m.actors and not m.draining]
        return set(sorted(serving, key=lambda address: (address.incarnation, address.name))[: LIMITS[actor]])

    def leaving(self, actor: str) -> set[Address]:
        return {Address(n, m.incarnation) for n, m in self.members.items() if actor in m.actors and m.draining}


_joins = st.tuples(
    st.just("join"), st.sampled_from(NAMES), st.integers(1, 4), st.frozensets(st.sampled_from(ACTORS)), st.booleans()
)
_leaves = st.tuples(st.just("leave"), st.sampled_from(NAMES), st.integers(1, 4), st.just(frozenset[str]()), st.just(False))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(_joins | _leaves, max_size=30),
    seed=st.integers(0, 1000),
    load=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)),
)
def test_the_table_knows_what_a_naive_model_knows(
    steps: list[tuple[str, str, int, frozenset[str], bool]], seed: int, load: dict[str, int]
) -> None:
    table, model = RoutingTable(Random(seed)), Model()
    for what, name, incarnation, actors, draining in steps:
        address = Address(name, incarnation)
        if what == "join":
            member = _member(incarnation, actors, draining)
            assert table.join(name, member) == model.join(name, member)
        else:
            assert table.leave(address) == model.leave(address)
        assert not (table.is_alive(address) and table.is_lost(address))
    assert dict(table.members) == model.members
    for actor in ACTORS:
        replicas = model.replicas(actor)
        assert set(table.replicas(actor)) == replicas
        replicas = replicas or model.leaving(actor)  # the last ones that serve it are chosen though they drain
        assert (table.info(actor) is None) == (not replicas)
        assert table.rank(actor, "key", or_leaving=True) in (replicas or {None})
        chosen = {table.choose(actor, load) for _ in range(20)} - {None}
        assert chosen <= replicas
        assert bool(chosen) == bool(replicas)
        most = max((load.get(address.name, 0) for address in replicas), default=0)
        if sum(load.get(address.name, 0) == most for address in replicas) == 1 and len(replicas) > 1:
            assert all(load.get(address.name, 0) < most for address in chosen if address is not None)
    for dead in model.dead:
        assert table.is_lost(dead)
        assert not table.is_alive(dead)


@settings(max_examples=60, deadline=None)
@given(key=st.text(max_size=20), names=st.sets(st.text("xyz", min_size=1), min_size=2, max_size=8), seed=st.integers(0, 9))
def test_a_session_moves_only_if_its_own_place_goes(key: str, names: set[str], seed: int) -> None:
    tables = [RoutingTable(Random(seed)), RoutingTable(Random(seed + 1))]
    for table, order in zip(tables, (sorted(names), sorted(names, reverse=True)), strict=True):
        for name in order:
            table.join(name, _member(1, frozenset({"plain"})))
    place = tables[0].rank("plain", key)
    assert place is not None
    assert tables[1].rank("plain", key) == place
    for name in sorted(names - {place.name}):
        tables[0].leave(Address(name, 1))
        assert tables[0].rank("plain", key) == place
    tables[0].leave(place)
    assert tables[0].rank("plain", key) is None


NOBODY: dict[str, dict[str, int]] = {}

LOADS = [
    # what it shows, reported by a, reported by b, in flight at the report, in flight now, chosen
    ("without reports, what is in flight", None, None, {}, {"a": 2, "b": 1}, "b"),
    ("the calls of others count", {"plain": (3, 1)}, {"plain": (0, 1)}, {}, {}, "b"),
    ("queued and running count alike", {"plain": (0, 4)}, {"plain": (3, 0)}, {}, {}, "b"),
    ("one's own calls count once", {"plain": (3, 1)}, {"plain": (0, 1)}, {"a": 4}, {"a": 4, "b": 5}, "a"),
    ("what was sent since counts", {"plain": (0, 1)}, {"plain": (2, 1)}, {"a": 1}, {"a": 5}, "b"),
    ("what has come back since counts", {"plain": (5, 1)}, {"plain": (1, 1)}, {"a": 6}, {"a": 1}, "a"),
    ("a report never hides what is in flight", {}, {"plain": (0, 2)}, {"a": 9}, {"a": 9}, "b"),
    ("of equal queues the less busy process", {"pair": (5, 5)}, {"pair": (0, 1)}, {}, {}, "b"),
    ("another actor's queue decides nothing else", {"pair": (5, 5)}, {"pair": (0, 1)}, {}, {"b": 1}, "a"),
]


@pytest.mark.parametrize(("of_a", "of_b", "then", "now", "chosen"), [row[1:] for row in LOADS], ids=[row[0] for row in LOADS])
def test_the_shorter_queue_is_chosen(
    of_a: dict[str, tuple[int, int]] | None,
    of_b: dict[str, tuple[int, int]] | None,
    then: dict[str, int],
    now: dict[str, int],
    chosen: str,
) -> None:
    table = RoutingTable(Random(1))
    for name, reported in (("a", of_a), ("b", of_b)):
        table.join(name, _member(1, frozenset(ACTORS)))
        if reported is not None:
            assert table.report(name, Load(WIRE_VERSION, 1, 1, reported), {"plain": then})
    assert {table.choose("plain", now) for _ in range(20)} == {Address(chosen, 1)}


def test_reports_that_are_late_or_nobody_s_change_nothing() -> None:
    table = RoutingTable(Random(1))
    for name in ("a", "b"):
        table.join(name, _member(2, frozenset(ACTORS)))
    busy = {"plain": (50, 50)}
    assert table.report("a", Load(WIRE_VERSION, 2, 7, {"plain": (0, 1)}), NOBODY)
    assert table.report("b", Load(WIRE_VERSION, 2, 1, {"plain": (0, 2)}), NOBODY)
    late = [("a", 2, 7), ("a", 2, 6), ("a", 2, -1)]
    foreign = [("a", 1, 8), ("a", 3, 8), ("c", 2, 8), ("", 2, 8)]
    for name, incarnation, number in late + foreign:
        assert not table.report(name, Load(WIRE_VERSION, incarnation, number, busy), NOBODY)
    assert {table.choose("plain", {}) for _ in range(20)} == {Address("a", 2)}


def test_a_successor_begins_without_its_predecessor_s_load() -> None:
    table = RoutingTable(Random(1))
    for name in ("a", "b"):
        table.join(name, _member(1, frozenset(ACTORS)))
        table.report(name, Load(WIRE_VERSION, 1, 9, {"plain": (9, 9) if name == "a" else (0, 1)}), NOBODY)
    table.join("a", _member(2, frozenset(ACTORS)))
    assert {table.choose("plain", {}) for _ in range(20)} == {Address("a", 2)}
    assert table.report("a", Load(WIRE_VERSION, 2, 1, {"plain": (9, 9)}), NOBODY), "numbers begin anew, too"
    assert {table.choose("plain", {}) for _ in range(20)} == {Address("b", 1)}


def test_two_apps_may_know_an_actor_as_different_things() -> None:
    table = RoutingTable(Random(1))
    as_workflow = Member(WIRE_VERSION, 1, "node", "worker", 1, {"plain": ActorInfo("workflow", {})}, True)
    table.join("a", _member(1, frozenset({"plain"})))
    assert (table.kinds("plain"), table.kinds("single")) == ({"tool"}, set())
    table.join("b", as_workflow)
    assert table.kinds("plain") == {"tool", "workflow"}


def test_of_workers_that_drain_those_that_begin_nothing_any_more_are_not_chosen() -> None:
    table = RoutingTable(Random(1))
    first, second = Address("first", 1), Address("second", 1)
    for address in (first, second):
        table.join(address.name, _member(1, frozenset({"plain"}), draining=True))
    table.close(first)
    assert {table.choose("plain", {}) for _ in range(20)} == {second}
    table.close(second)
    assert table.choose("plain", {}) is None
    table.join("first", _member(2, frozenset({"plain"}), draining=True))
    assert table.choose("plain", {}) == Address("first", 2)
