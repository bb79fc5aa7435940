"""Rows, their index and names with numbers, against dictionaries."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import numpy as np
import pytest

from nalar_mq.controllers.slots import Stretch, Stretches
from nalar_mq.controllers.tables import Futures, Index, Names, rows_of


def halves(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([id >> 64 for id in ids], np.uint64), np.array([id & (2**64 - 1) for id in ids], np.uint64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [128, 12])
def test_futures_are_found_by_id_as_long_as_they_are_there(seed: int, bits: int) -> None:
    random = Random(seed)
    futures, expected = Futures(), dict[int, int]()
    for _ in range(60):
        fresh = list({id for _ in range(random.randrange(400)) if (id := random.getrandbits(bits)) not in expected})
        high, low = halves(fresh)
        rows = futures.add(high, low, np.ones(len(fresh), np.uint8))
        expected |= dict(zip(fresh, rows.tolist(), strict=True))
        gone = random.sample(sorted(expected), random.randrange(len(expected) + 1) // 2)
        futures.remove(rows_of(expected.pop(id) for id in gone))
        if random.random() < 0.7:
            assert set(futures.settle().tolist()) <= set(expected.values())
            assert len(futures) == len(expected) == len(set(expected.values()))
            assert futures.find(*halves(list(expected))).tolist() == list(expected.values())
            strangers = [id for id in gone if id not in expected]
            assert (futures.find(*halves(strangers)) == -1).all()
            assert sorted(futures.live().tolist()) == sorted(expected.values())


@pytest.mark.parametrize("places", [[7], [15], [6, 7], [13, 14, 15], [0, 1], [8, 9, 10], [3, 12], [5, 9]])
def test_ids_that_differ_in_a_few_bytes_are_found_as_fast_as_any(places: list[int]) -> None:
    """As those of one process do: a random half, and a counter."""
    count = min(20_000, 256 ** len(places))
    counters = np.arange(count, dtype=np.uint64)
    ids = np.frombuffer(Random(3).randbytes(16) * count, np.uint8).reshape(count, 16).copy()
    for place, byte in enumerate(reversed(places)):
        ids[:, byte] = (counters >> np.uint64(8 * place)) & np.uint64(255)
    words = ids.view(np.uint64)
    high, low, rows = words[:, 0], words[:, 1], np.arange(count, dtype=np.int32)
    index = Index()
    index.rebuild(np.resize(high, 32_768), np.resize(low, 32_768), rows)
    farthest = (index._places[rows] - index._first(high, low)) & (4 * 32_768 - 1)
    assert farthest.max() < 48
    assert (index.find(high, low, high, low) == rows).all()


def test_names_keep_their_numbers_while_somebody_uses_them() -> None:
    random = Random(7)
    names, uses, numbers = Names(), dict[str, int](), dict[str, int]()
    for _ in range(300):
        opened = [f"n{random.randrange(3000)}" for _ in range(random.randrange(30))]
        found, newly = names.open(opened)
        fresh = [opened[place] for place in newly.tolist()]
        assert sorted(fresh) == sorted({name for name in opened if not uses.get(name)})
        for name, number in zip(opened, found.tolist(), strict=True):
            assert numbers.setdefault(name, number) == number
            uses[name] = uses.get(name, 0) + 1
        closed = [
            random.choice([name for name in uses if uses[name]]) for _ in range(random.randrange(20)) if any(uses.values())
        ]
        closed = list(dict.fromkeys(closed))
        names.close(rows_of(numbers[name] for name in closed))
        for name in closed:
            uses[name] -= 1
        names.settle()
        for name in closed:
            if not uses[name]:
                del numbers[name]
        assert len(names) == len(numbers)
        assert all(names.number(name) == number and names.name(number) == name for name, number in numbers.items())
        assert names.number("nobody") == -1
        assert set(names.used().tolist()) == set(numbers.values())


@pytest.mark.parametrize("seed", range(4))
def test_slots_keep_what_they_stand_for_wherever_their_stretches_are(seed: int) -> None:
    random = Random(seed)
    table = Stretches({"number": (np.int32, -1, ()), "counts": (np.uint32, 0, (3,))})
    expected: dict[Stretch, dict[int, int]] = {}
    for _ in range(400):
        match random.randrange(4):
            case 0:
                expected[table.add(random.randrange(1, 40))] = {}
            case 1 if expected:
                stretch = random.choice(list(expected))
                table.widen(stretch, random.randrange(1, 300))
            case 2 if len(expected) > 5:
                stretch = random.choice(list(expected))
                table.remove(stretch)
                del expected[stretch]
            case 3 if expected:
                stretch = random.choice(list(expected))
                slot, value = random.randrange(stretch.size), random.randrange(1000)
                table.of(stretch, "number")[slot] = value
                table.of(stretch, "counts")[slot] = value
                expected[stretch][slot] = value
        for stretch, slots in expected.items():
            numbers = table.of(stretch, "number")
            assert len(numbers) == stretch.size
            assert {slot: int(numbers[slot]) for slot in np.flatnonzero(numbers >= 0).tolist()} == slots
            assert {slot for slot in range(stretch.size) if table.of(stretch, "counts")[slot].any()} <= slots.keys()
    stretches = list(expected)
    counts = np.array([len(expected[stretch]) for stretch in stretches])
    slots = np.array([slot for stretch in stretches for slot in expected[stretch]], np.int64)
    places = table.reach(stretches).places(counts, slots)
    assert places is not None
    assert table["number"][places].tolist() == [value for stretch in stretches for value in expected[stretch].values()]
    outside = table.reach(stretches[:1]).places(np.array([1]), np.array([stretches[0].size]))
    assert outside is None
    before = table.nbytes
    huge = [table.add(1 << 18) for _ in range(4)]
    for stretch in huge:
        table.remove(stretch)
    assert table.nbytes <= 8 * before
    for stretch in stretches:
        numbers = table.of(stretch, "number")
        assert {slot: int(numbers[slot]) for slot in np.flatnonzero(numbers >= 0).tolist()} == expected[stretch]


def test_a_worker_reports_and_obeys_without_numpy() -> None:
    program = "import sys, nalar_mq.changes, nalar_mq.standing; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
