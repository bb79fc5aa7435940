"""A program that imports nothing of ours, run by Python and by the command, as real processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain"
NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
PATIENCE_S = 60.0

Interval = tuple[float, float]


def output_of(*command: object, home: Path, times: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NALAR_", "NATS_", "XDG_"))}
    done = subprocess.run(
        [*map(str, command)],
        cwd=home,
        env=kept | {"HOME": str(home), "READING_TIMES": str(times)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def intervals(times: Path) -> list[Interval]:
    lines = [line.split() for line in times.read_text().splitlines()]
    return [(float(began), float(ended)) for _, began, ended in lines]


def overlaps(times: Path) -> list[tuple[Interval, Interval]]:
    return [(a, b) for a, b in combinations(intervals(times), 2) if a[0] < b[1] and b[0] < a[1]]


def imported_in(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in modules + names}


def test_the_example_is_a_plain_program() -> None:
    source = (EXAMPLE / "flow.py").read_text()
    assert imported_in(EXAMPLE / "flow.py") <= sys.stdlib_module_names
    assert not any(isinstance(node, (ast.Await, ast.AsyncFunctionDef)) for node in ast.walk(ast.parse(source)))
    assert "uture" not in source


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "texts").mkdir(parents=True)
    for name in ("flow.py", "nalar.toml", *(f"texts/{text.name}" for text in EXAMPLE.glob("texts/*.txt"))):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())
    return folder


def test_python_and_nalar_give_the_same_answer_and_only_nalar_overlaps_the_calls(app: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    plain = output_of(sys.executable, app / "flow.py", home=tmp_path, times=alone)
    served = output_of(NALAR, "run", app / "nalar.toml", "report", home=tmp_path, times=together)
    assert plain.startswith("harbour: 39 words, most often 'boats'\n")
    assert served == plain
    assert len(intervals(alone)) == len(intervals(together)) == 3
    assert overlaps(alone) == []
    assert overlaps(together) != []
