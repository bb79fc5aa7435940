"""The benchmark itself: it runs, checks what comes back, and writes the shape that others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "BENCH_RTT_CALLS": "20",
    "BENCH_PIPE_CALLS": "500",
    "BENCH_FAN_CALLS": "2000",
    "BENCH_CHAIN_CALLS": "20",
    "BENCH_JOBS": "20",
    "BENCH_JOBS_ALONE": "5",
    "BENCH_LARGE_CALLS": "2",
    "BENCH_LARGE_MB": "1",
    "BENCH_KEPT_SESSIONS": "100",
    "BENCH_KEPT_CALLS": "20",
    "BENCH_KEPT_KILLS": "1",
    "BENCH_MOVES": "2",
    "BENCH_MOVED_MB": "2",
}


def test_all_figures_of_all_benchmarks_in_one_object(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    names = ["calls", "futures", "chain", "startup", "jobs", "stages", "large"]
    command = [sys.executable, "-m", "bench", *names, "--runs", "1", "--seed", "7", "--json", str(target)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | SMALL, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(target.read_text())
    assert found["bench"] == "calls,futures,chain,startup,jobs,stages,large"
    assert (found["seed"], found["runs"], found["failures"]) == (7, 1, {})
    assert found["machine"]["cores"] and found["versions"]["nalar"]
    figures = found["systems"]["nalar"]
    wanted = {
        *("rtt_p50_us", "rtt_p99_us", "pipe_per_s", "fan_s", "rss_peak_fan_mb"),
        *("chain_ms", "chain_affinity_ms", "startup_s", "rss_idle_mb"),
        *("jobs_per_s", "job_p50_ms", "jobs_nosync_per_s", "job_nosync_p50_ms"),
        *("return_1mb_ms", "take_1mb_ms", "return_broker_1mb_ms", "take_broker_1mb_ms", "copy_1mb_ms"),
    }
    assert wanted <= figures.keys()
    assert all(value > 0 for value in figures.values())
    assert found["spread"]["nalar"]["chain_ms"] == [figures["chain_ms"]] * 2
    assert "rtt_p50_us" in ran.stdout


def test_the_figures_of_the_global_controller(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    options = ["--futures", "600", "--nodes", "4", "--agents", "8", "--runs", "1", "--json", str(target)]
    small = {"BENCH_CONTROL_ROUNDS": "3", "BENCH_CONTROL_SCHEDULED": "500"}
    command = [sys.executable, "-m", "bench", "control", *options]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | small, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(target.read_text())["systems"]["nalar"]
    times = {"loop_p50_ms", "loop_p99_ms", "collect_p99_ms", "policy_p99_ms", "schedule_us", "one_level_schedule_us"}
    assert times | {"bytes_per_future"} <= figures.keys()
    assert all(figures[name] >= 0 for name in times), figures
    assert 0 < figures["loop_p50_ms"] <= figures["loop_p99_ms"]


def test_the_figures_of_policies(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "policies", "--runs", "1", "--json", str(target)]
    small = {
        "BENCH_POLICIES_WORKERS": "2",
        "BENCH_HEAD_SECONDS": "1",
        "BENCH_SWING_SECONDS": "1",
        "BENCH_ALIVE_FUTURES": "500",
    }
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | small, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(target.read_text())["systems"]["nalar"]
    assert {
        "without_short_p99_ms",
        "default_short_p99_ms",
        "default_moves",
        "swing_oracle_per_s",
        "alive_loop_p50_ms",
    } <= figures.keys()
    assert figures["alive_seen"] >= 500


@pytest.mark.parametrize("name", ["control", "policies"])
def test_some_are_measured_by_themselves(name: str) -> None:
    command = [sys.executable, "-m", "bench", name, "calls"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ran.returncode != 0
    assert "by itself" in ran.stderr


def test_the_figures_of_managed_state(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "state", "replay", "--runs", "1", "--json", str(target)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | SMALL, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(target.read_text())["systems"]["nalar"]
    rates = {f"{what}_per_s_{n}" for what in ("node", "memory", "lmdb_commits") for n in (1, 16, 256)}
    others = {"append_ratio", "start_s_1m", "start_rss_mb_1m", "first_call_p99_ms_1m", "new_sessions_per_s", "kv_creates_per_s"}
    assert figures.keys() == rates | others | {"recovery_p99_s", "recovery_frozen_p99_s", "lease_s"}
    assert all(value > 0 for value in figures.values())
    assert figures["recovery_frozen_p99_s"] > figures["lease_s"] * 2 / 3


def test_the_figures_of_migration(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "migration", "--runs", "1", "--json", str(target)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | SMALL, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(target.read_text())["systems"]["nalar"]
    pauses = {f"pause_p{percent}_ms_{size}" for size in ("1kb", "1mb", "100mb") for percent in (50, 99)}
    assert figures.keys() == pauses | {f"{what}_mb_per_s" for what in ("transfer", "copy")} | {
        f"others_p99_ms_{when}" for when in ("quiet", "meanwhile")
    }
    assert all(value > 0 for value in figures.values())
    assert all(figures[f"pause_p50_ms_{size}"] <= figures[f"pause_p99_ms_{size}"] for size in ("1kb", "1mb", "100mb"))


def test_an_unknown_system_is_named() -> None:
    command = [sys.executable, "-m", "bench", "calls", "--against", "abacus"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ran.returncode != 0
    assert "abacus" in ran.stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import work; work.answered; work.expect(1, 2)", "wrong answer: 1 in place of 2"),
        ("import work; work.phase('pipe'); raise SystemExit('out of order')", "phase 'pipe'.*out of order"),
        ("import time, work; work.phase('rtt'); time.sleep(60)", "phase 'rtt' took longer"),
    ],
)
def test_a_system_that_fails_says_where(program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.measuring import BenchmarkError, run_once
    from bench.systems import SYSTEMS, System

    file = tmp_path / "program.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(SYSTEMS['nalar'].program.parent)!r}); {program}\n")
    monkeypatch.setattr(System, "program", property(lambda self: file))
    with pytest.raises(BenchmarkError, match=words):
        run_once(System("broken", "", (), "nalar-mq", limit_s=1.0), ["calls"], 1)
