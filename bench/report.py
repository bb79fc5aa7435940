"""The results of several runs: as JSON, and as a table for people."""

from __future__ import annotations

import os
import platform
import sys
from statistics import median
from typing import Any

Runs = dict[str, list[dict[str, float]]]


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_object(names: list[str], versions: dict[str, str], seed: int, runs: int, results: Runs, failures: dict[str, str]) -> Any:
    """Medians by system and figure, with the lowest and highest value beside them."""
    return {
        "bench": ",".join(names),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
        "seed": seed,
        "runs": runs,
        "systems": {system: _folded(found, median) for system, found in results.items()},
        "spread": {system: _folded(found, lambda values: [min(values), max(values)]) for system, found in results.items()},
        "failures": failures,
    }


def _folded(runs: list[dict[str, float]], fold: Any) -> dict[str, Any]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: fold([run[name] for run in runs if name in run]) for name in names}


def show(outcome: Any, figures: list[str]) -> None:
    """Prints the table: medians, the spread in brackets, and how often nalar's figure the others' are."""
    versions = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    place = outcome["machine"]
    print(f"{place['cpu']}, {place['cores']} cores, {place['system']}, load {place['load_1m']}")
    print(f"{versions}; seed {outcome['seed']}, medians of {outcome['runs']} runs [lowest .. highest], interleaved")
    systems = list(outcome["systems"])
    known = [figure for figure in figures if any(figure in outcome["systems"][system] for system in systems)]
    rows = [["", *systems], *([figure, *(_cell(outcome, system, figure) for system in systems)] for figure in known)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(systems) + 1)]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    for system, reason in outcome["failures"].items():
        print(f"{system}: {reason}", file=sys.stderr)


def _cell(outcome: Any, system: str, figure: str) -> str:
    value = outcome["systems"][system].get(figure)
    if value is None:
        return "-"
    lowest, highest = outcome["spread"][system][figure]
    text = f"{value:,.10g}" if lowest == highest else f"{value:,.10g} [{lowest:,.10g} .. {highest:,.10g}]"
    ours = outcome["systems"].get("nalar", {}).get(figure)
    return f"{text} ({value / ours:.2f}x)" if ours and system != "nalar" else text
