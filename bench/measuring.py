"""Runs the program of one system once: reads what it says, watches the memory of all its processes, ends what is left."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import psutil

from bench.systems import System

_SAMPLE_S = 0.1
_SECTIONS = {
    "calls": "rtt,pipe",
    "futures": "fan",
    "chain": "chain",
    "startup": "none",
    "jobs": "jobs",
    "stages": "stages",
    "large": "large",
    "control": "control",
    "policies": "head,swing,alive",
    "state": "state",
    "replay": "recovery",
    "migration": "moving",
}
_FIGURES = {
    "calls": ("rtt_p50_us", "rtt_p99_us", "pipe_per_s", "tool_rtt_p50_us", "tool_rtt_p99_us", "tool_pipe_per_s"),
    "futures": ("fan_s", "fan_per_s", "rss_peak_fan_mb"),
    "chain": ("chain_ms", "chain_affinity_ms"),
    "startup": ("startup_s", "rss_idle_mb"),
    "stages": (
        *("stage_made_us", "stage_sent_us", "stage_there_us", "stage_begun_us"),
        *("stage_answered_us", "stage_back_us", "stage_awaited_us", "stage_whole_us"),
    ),
    "large": tuple(
        f"{way}_{mb}mb_ms" for mb in (1, 10, 100) for way in ("return", "take", "return_broker", "take_broker", "copy")
    ),
    "control": (
        *("loop_p50_ms", "loop_p99_ms", "collect_p99_ms", "policy_p99_ms"),
        *("schedule_us", "one_level_schedule_us", "bytes_per_future"),
        *("loop_cpu_p50_ms", "all_cpu_p50_ms", "others_cpu_mean_ms", "schedule_cpu_us"),
    ),
    "policies": (
        *(f"{policies}_short_{part}_ms" for part in ("p50", "p99") for policies in ("without", "default")),
        *("default_moves", "swing_without_per_s", "swing_default_per_s", "swing_oracle_per_s", "swing_settled_s"),
        *("alive_s", "alive_seen", "alive_loop_p50_ms", "alive_loop_max_ms"),
    ),
    "state": (
        *(f"{what}_per_s_{n}" for n in (1, 16, 256) for what in ("node", "memory", "lmdb_commits")),
        *("new_sessions_per_s", "kv_creates_per_s", "append_ratio"),
        *("start_s_1m", "start_rss_mb_1m", "first_call_p99_ms_1m"),
    ),
    "replay": ("recovery_p99_s", "recovery_frozen_p99_s", "lease_s"),
    "migration": (
        *(f"pause_p{percent}_ms_{size}" for size in ("1kb", "1mb", "100mb") for percent in (50, 99)),
        *("others_p99_ms_quiet", "others_p99_ms_meanwhile", "transfer_mb_per_s", "copy_mb_per_s"),
    ),
    "jobs": ("jobs_per_s", "job_p50_ms", "jobs_nosync_per_s", "job_nosync_p50_ms"),
}
NAMES = tuple(_SECTIONS)


class BenchmarkError(Exception):
    """A system did not do its work."""


def figures_of(names: list[str]) -> list[str]:
    """The figures that the named benchmarks give, in their order."""
    return [figure for name in names for figure in _FIGURES[name]]


def run_once(system: System, names: list[str], seed: int) -> dict[str, float]:
    """All figures of one run.

    Raises:
        BenchmarkError: it failed, was wrong, or took longer than its limit; says in which phase.
    """
    with tempfile.TemporaryFile() as errors:
        run = _Run(system, _environment(system, names, seed), errors)
        try:
            figures = run.follow()
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}; last words: {_last_words(errors)}") from None
        finally:
            run.end()
    wanted = figures_of(names)
    return {name: figures[name] for name in wanted if name in figures}


def _environment(system: System, names: list[str], seed: int) -> dict[str, str]:
    root = Path(__file__).parent.parent
    return {
        **os.environ,
        "PATH": f"{system.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(root) if not system.environment else "",
        "BENCH_SECTIONS": ",".join(_SECTIONS[name] for name in names),
        "BENCH_SEED": str(seed),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "none"


class _Run:
    def __init__(self, system: System, environment: dict[str, str], errors: IO[bytes]) -> None:
        self._limit_s = system.limit_s
        self._figures: dict[str, float] = {}
        self._phase = "startup"
        self._phase_begun = self._begun = time.monotonic()
        self._is_done = False
        self._process = subprocess.Popen(
            [str(system.python), "-u", str(system.program)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        self._family: dict[int, psutil.Process] = {}
        self._root = psutil.Process(self._process.pid)

    def follow(self) -> dict[str, float]:
        """Returns the figures when the program says that it is done."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            due = 0.0
            rest = b""
            while not self._is_done:
                if selector.select(_SAMPLE_S):
                    piece = os.read(self._process.stdout.fileno(), 65536)
                    if not piece:
                        raise BenchmarkError(f"ended in phase {self._phase!r} with code {self._process.wait()}")
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        self._take(line)
                now = time.monotonic()
                if now >= due:
                    due = now + _SAMPLE_S
                    self._sample()
                if now - self._phase_begun > self._limit_s:
                    raise BenchmarkError(f"phase {self._phase!r} took longer than {self._limit_s:.0f} s")
        return self._figures

    def _take(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
        except ValueError:
            return  # systems print things of their own
        match said:
            case {"phase": str(name)}:
                self._sample()
                self._phase, self._phase_begun = name, time.monotonic()
            case {"first": float(at)}:
                self._figures["startup_s"] = round(at - self._begun, 3)
            case {"figure": str(name), "value": int() | float() as value}:
                self._figures[name] = value
            case {"done": True}:
                self._sample()
                self._is_done = True
            case _:
                pass

    def _sample(self) -> None:
        """Resident memory of all processes together, those included whose parent has gone."""
        with contextlib.suppress(psutil.Error):
            for child in (self._root, *self._root.children(recursive=True)):
                self._family.setdefault(child.pid, child)
        total = 0
        for pid, process in list(self._family.items()):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                del self._family[pid]
        total_mb = round(total / 1e6, 1)
        if self._phase == "idle":
            self._figures["rss_idle_mb"] = total_mb
        elif self._phase == "fan":
            self._figures["rss_peak_fan_mb"] = max(total_mb, self._figures.get("rss_peak_fan_mb", 0.0))

    def end(self) -> None:
        """Lets the program end by itself for a moment, then ends all of its processes."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(8.0 if self._is_done else 0.0)
        family = list(self._family.values())
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=4.0)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
