"""Which worker serves what at first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.columns import Serves
from nalar_mq.controllers.assignment import added, assigned

SLOT = {"slot": 1.0}


def plan(actors: dict[str, Serves], workers: int, **capacities: float) -> list[str]:
    """What each worker serves, by first letters."""
    return ["".join(sorted(assigned(actors, place, workers, capacities))) for place in range(workers)]


@pytest.mark.parametrize(
    ("actors", "workers", "capacities", "expected"),
    [
        ({"a": Serves("agent", resources=SLOT), "b": Serves("agent", resources=SLOT)}, 4, {"slot": 4}, ["a", "b", "a", "b"]),
        ({"a": Serves("agent"), "b": Serves("agent", resources=SLOT)}, 3, {"slot": 1}, ["ab", "a", "a"]),
        ({"a": Serves("agent", resources=SLOT), "b": Serves("agent", resources=SLOT)}, 2, {"slot": 9}, ["ab", "ab"]),
        ({"a": Serves("agent", resources={"gpu": 1.0})}, 2, {"slot": 1}, ["a", "a"]),
        ({"a": Serves("agent", resources=SLOT, max_instances=1)}, 3, {"slot": 9}, ["a", "", ""]),
        ({"a": Serves("agent", resources=SLOT, min_instances=2)}, 3, {"slot": 0}, ["a", "a", ""]),
        ({"a": Serves("agent", resources={"slot": 0.1})}, 3, {"slot": 0.3}, ["a", "a", "a"]),
        (
            {"a": Serves("agent", resources={"slot": 2.0}), "b": Serves("agent", resources=SLOT)},
            3,
            {"slot": 4},
            ["a", "b", "b"],
        ),
    ],
)
def test_the_capacities_are_shared_out(
    actors: dict[str, Serves], workers: int, capacities: dict[str, float], expected: list[str]
) -> None:
    assert plan(actors, workers, **capacities) == expected


_serves = st.builds(
    Serves,
    st.just("agent"),
    min_instances=st.integers(0, 3),
    max_instances=st.one_of(st.none(), st.integers(3, 5)),
    resources=st.dictionaries(st.sampled_from(["slot", "gpu", "other"]), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
)


@given(
    actors=st.dictionaries(st.sampled_from("abcdef"), _serves),
    workers=st.integers(1, 6),
    capacities=st.dictionaries(st.sampled_from(["slot", "gpu"]), st.sampled_from([0.0, 1.0, 4.0])),
)
def test_bounds_and_capacities_hold(actors: dict[str, Serves], workers: int, capacities: dict[str, float]) -> None:
    counts = Counter(actor for place in range(workers) for actor in assigned(actors, place, workers, capacities))
    used = Counter[str]()
    for actor, serves in actors.items():
        reserves = serves.resources.keys() & capacities.keys()
        if not reserves:
            assert counts[actor] == workers
            continue
        assert counts[actor] >= min(serves.min_instances, workers)
        assert counts[actor] <= workers
        if serves.max_instances is not None:
            assert counts[actor] <= serves.max_instances
        beyond = counts[actor] - min(serves.min_instances, workers)
        for name in reserves:
            used[name] += counts[actor] * serves.resources[name]
            if beyond:
                assert serves.resources[name] <= capacities[name]
    if all(serves.min_instances == 0 for serves in actors.values()):
        assert all(used[name] <= capacities[name] + 1e-6 for name in capacities)


def test_a_worker_that_is_added_leaves_to_the_others_what_they_have() -> None:
    actors = {name: Serves("agent", resources=SLOT) for name in ("a", "b")} | {"free": Serves("agent")}
    assert plan(actors, 1, slot=3) == ["abfree"], "one slot is left"
    assert added(actors, "b", {"slot": 3}) == {"b", "free"}
