"""A store whose files are not what was written is refused, or names what is damaged; it gives no other state, nor crashes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import damaged_store
import pytest

from nalar_mq import pages
from nalar_mq.store import Store

PAGE = 4096
BATCH = 100
REGIONS = ("meta", "branch", "leaf", "long", "free list", "free")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these cases are about bytes, not about disks."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "1"
    damaged_store.build(folder)
    return folder


def regions_of(folder: Path) -> dict[str, list[int]]:
    """The pages of a file by what they are for."""
    found: dict[str, list[int]] = {region: [] for region in REGIONS}
    file = os.open(folder / "data.mdb", os.O_RDONLY)
    meta = pages.read_meta(file)
    check = pages._Check(file, meta, True)
    check.run()
    for page in range(meta.pages):
        flags = int.from_bytes(os.pread(file, 2, page * PAGE + 10), sys.byteorder)
        kind = {1: "branch", 2: "leaf", 8: "meta"}.get(flags, "long")
        region = "free list" if page == meta.free.root else "free" if check._live[page] == 2 else kind
        found[region].append(page)
    os.close(file)
    return found


def run(source: Path, scratch: Path, cases: Iterable[dict[str, Any]]) -> Counter[str]:
    """Verdicts of child processes on all cases; fails with the cases that went wrong or ended their process."""
    store = Store.read(source)
    waiting = [case | {"id": store.id} for case in cases]
    store.close()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        child = subprocess.run(
            [sys.executable, damaged_store.__file__, source, scratch],
            input="".join(json.dumps(case) + "\n" for case in batch),
            capture_output=True,
            text=True,
        )
        verdicts = child.stdout.splitlines()
        for case, verdict in zip(batch, verdicts, strict=False):
            counts[verdict] += 1
            if verdict.startswith("wrong"):
                wrong.append(f"{case}: {verdict}")
        if len(verdicts) < len(batch):
            wrong.append(f"{batch[len(verdicts)]}: ended by {child.returncode}: {child.stderr[-300:]}")
            waiting = batch[len(verdicts) + 1 :] + waiting
    assert not wrong, "\n".join(wrong[:20])
    return counts


def flips(source: Path, seed: int, count: int) -> list[dict[str, Any]]:
    """In each region `count` times one bit."""
    chosen = random.Random(seed)
    print(f"seed {seed}")
    found = regions_of(source)
    assert all(found.values()), {region: len(numbers) for region, numbers in found.items()}
    return [
        {"file": "data.mdb", "bits": [chosen.choice(numbers) * PAGE * 8 + bit_in(chosen, region)], "region": region}
        for region, numbers in found.items()
        for _ in range(count)
    ]


def bit_in(chosen: random.Random, region: str) -> int:
    size = 160 if region == "meta" else PAGE
    return chosen.randrange((48 if chosen.random() < 0.3 else size) * 8)


def test_a_file_that_was_cut(source: Path, scratch: Path) -> None:
    size = (source / "data.mdb").stat().st_size
    cuts = [size * part // 16 for part in range(16)] + [PAGE * page + 100 for page in range(6)]
    counts = run(source, scratch, [{"file": "data.mdb", "cut": cut} for cut in cuts])
    assert set(counts) == {"refused"}


def test_a_bit_in_each_region(source: Path, scratch: Path) -> None:
    counts = run(source, scratch, flips(source, random.randrange(1 << 32), 30))
    assert counts["refused"] and counts["named"] and counts["equal"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_bits(source: Path, scratch: Path) -> None:
    run(source, scratch, flips(source, random.randrange(1 << 32), 2000))


def test_the_files_beside_it(source: Path, scratch: Path) -> None:
    cases: list[dict[str, Any]] = []
    for file in ("commits", "owner", "lock.mdb"):
        bits = (source / file).stat().st_size * 8
        cases += [{"file": file, "bits": [bit]} for bit in random.sample(range(bits), 25)]
        cases += [{"file": file, "cut": cut} for cut in (0, 1, bits // 16)]
    assert set(run(source, scratch, cases)) == {"equal"}
