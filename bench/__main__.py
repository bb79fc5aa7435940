"""`python -m bench calls futures chain startup jobs --against ray,xoscar --json results.json`.

`python -m bench control --futures 131072 --nodes 64 --agents 128` measures the global controller, and `python -m bench
policies` what policies make of a load, each by itself."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from bench.measuring import NAMES, BenchmarkError, figures_of, run_once
from bench.report import Runs, as_object, show
from bench.systems import ALONE, SYSTEMS, make_ready, version_of


def main() -> None:
    """Measures, prints the table, and writes the JSON; the exit code is 1 if a system failed."""
    wanted = _arguments()
    against = [name for name in wanted.against.split(",") if name]
    unknown = [name for name in against if name not in SYSTEMS]
    if unknown:
        sys.exit(f"bench: unknown system {unknown[0]!r}; known are: {', '.join(sorted(SYSTEMS))}")
    for name in ALONE.keys() & set(wanted.names):
        if len(set(wanted.names)) > 1 or against:
            sys.exit(f"bench: {name} is measured by itself")
    if "control" in wanted.names:
        os.environ |= {f"BENCH_CONTROL_{name.upper()}": str(vars(wanted)[name]) for name in ("futures", "nodes", "agents")}
    systems = list(dict.fromkeys(["nalar", *against]))
    failures: dict[str, str] = {}
    for name in list(systems):
        try:
            make_ready(SYSTEMS[name])
        except (subprocess.CalledProcessError, OSError) as error:
            failures[name] = f"cannot be installed: {error}"
            systems.remove(name)
    names = list(dict.fromkeys(wanted.names))
    results = _measure(systems, names, wanted.runs, wanted.seed, failures)
    versions = {name: version_of(SYSTEMS[name]) for name in systems}
    outcome = as_object(names, versions, wanted.seed, wanted.runs, results, failures)
    show(outcome, figures_of(names))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failures else 0)


def _measure(systems: list[str], names: list[str], runs: int, seed: int, failures: dict[str, str]) -> Runs:
    """Runs the systems in turns, in another order each time, so that what else the machine does hits all of them."""
    order = random.Random(seed)
    results: Runs = {name: [] for name in systems}
    for number in range(runs):
        for name in order.sample(systems, len(systems)):
            if name in failures:
                continue
            print(f"run {number + 1} of {runs}: {name}", file=sys.stderr)
            try:
                results[name].append(run_once(ALONE.get(names[0], SYSTEMS[name]), names, seed + number))
            except BenchmarkError as error:
                failures[name] = str(error)
    return results


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, help="what to measure")
    parser.add_argument("--against", default="", metavar="A,B", help=f"other systems beside it: {', '.join(sorted(SYSTEMS))}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--futures", type=int, default=131_072, help="control: live futures (131072)")
    parser.add_argument("--nodes", type=int, default=64, help="control: nodes that report (64)")
    parser.add_argument("--agents", type=int, default=128, help="control: agents on them (128)")
    parser.add_argument("--runs", type=int, default=5, help="medians of so many runs (5)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the systems and of nalar's choices (1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
