"""The commands of the global controller, as processes beside a broker and workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import Running, naming
from waiting import PATIENCE_S, eventually

from nalar_mq.cli import run_command
from nalar_mq.config import BrokerAccess

POLICY = '''
from nalar_mq.controllers.policy import allow, kill


class Mine:
    """Closes an agent, and wants what cannot be."""

    def decide(self, view):
        yield allow("wait", callers=["chat"], tenants=["acme"], reason="it is dear")
        yield kill("nobody", reason="it idles")
'''
APP = """
import asyncio
from pathlib import Path

from nalar_mq import tool, workflow


@tool(concurrency=1)
async def wait(path: str) -> str:
    while not Path(path).exists():
        await asyncio.sleep(0.02)
    return path


@workflow
async def chat(path: str) -> str:
    return await wait(path)
"""


class Done(NamedTuple):
    """What a command has printed."""

    stdout: str
    stderr: str


class Site:
    """A broker and a namespace, and a shell that knows them."""

    def __init__(self, folder: Path, variables: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.running: list[Running] = []
        self._variables = variables
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> Done:
        """Runs the command to its end, in this process; no traceback reaches the user."""
        ended = run_command(words)
        done = Done(*self._capsys.readouterr())
        assert ended == code, done
        assert "Traceback" not in done.stderr
        return done

    def json(self, *words: str) -> Any:
        """What a command prints as JSON."""
        return json.loads(self(*words, "--json").stdout)

    def start(self, *words: str) -> Running:
        self.running.append(Running(*words, cwd=self.folder, variables=self._variables))
        return self.running[-1]


@pytest.fixture
def site(
    broker_access: BrokerAccess,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("NALAR_", "NATS_", "XDG_"))]:
        monkeypatch.delenv(name)
    variables = naming(broker_access, namespace)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    site = Site(tmp_path, variables, capsys)
    yield site
    for running in site.running:
        running.end(signal.SIGKILL)


def test_a_second_controller_stands_by_and_leads_when_the_first_is_killed(site: Site) -> None:
    first = site.start("controller")
    name = first.says("leads").rpartition("nalar: controller ")[2].split()[0]
    second = site.start("controller")
    second.says(f"stands by: {name} leads")
    first.end(signal.SIGKILL)
    eventually(lambda: second.said.count("leads") == 2, "the standby does not lead")
    assert second.end() == 0


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("mine.py", "write it as FILE.py:Name"),
        ("nowhere.py:Mine", "cannot be read"),
        ("mine.py:Mien", "did you mean 'Mine'?"),
        ("nothing.py:Mine", "'Mine' in nothing.py is no policy"),
        ("nothing.py:Wants", "takes arguments: make it there"),
        ("BudgetLimits", "Mine = BudgetLimits("),
        ("HighPriority", "Mine = HighPriority("),
        (
            "Nobody",
            "HeadOfLine, Reallocation, Overload, ShortestRemaining, LongestFirst, SessionAffinity, FairShare, DeadlineFirst\n",
        ),
        ("broken.py:Mine", "broken.py cannot be imported: invalid syntax (line 1)"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_a_mistake_of_the_command_line(site: Site, policy: str, says: str) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    (site.folder / "broken.py").write_text("policy of mine\n")
    (site.folder / "nothing.py").write_text("class Wants:\n    def __init__(self, what): ...\n\n\nMine = None\n")
    for words in (("controller",), ("up", "mine.py")):
        done = site(*words, "--policy", policy, code=2)
        if words == ("controller",):
            assert says in done.stderr


def test_no_policy_without_a_controller(site: Site) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    assert "leave out one" in site("up", "mine.py", "--policy", "mine.py:Mine", "--no-controller", code=2).stderr


def test_what_is_decided_refused_and_seen_is_told(site: Site) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    (site.folder / "flow.py").write_text(APP)
    gate = site.folder / "gate"
    controller = site.start("controller", "--policy", "mine.py:Mine")
    worker = site.start("worker", "flow.py", "--workers", "1", "--node", "n1")
    worker.says("workers are ready")
    jobs = [site("submit", "chat", str(gate)).stdout.strip() for _ in range(3)]

    eventually(lambda: site.json("policy", "show")["states"], "nothing is in force")
    shown = site.json("policy", "show")
    assert shown["leader"] in controller.said
    assert (shown["policy"], shown["term"] > 0) == ("mine.py:Mine", True)
    assert [(state["type"], state["agent"], state["callers"]) for state in shown["states"]] == [("allow", "wait", ["chat"])]
    assert "wait may be called by chat, tenant acme: it is dear" in site("policy", "show").stdout
    refused = "refused: all of nobody stops: there is no worker 'nobody'"
    assert refused in site("policy", "history").stdout

    eventually(lambda: site.json("top", "--once")["futures"] == 6, "calls are not seen")
    seen = site.json("top", "--once")
    assert [(row["name"], row["count"], row["workers"]) for row in seen["nodes"]] == [("n1", 1, ["n1-1"])]
    (tool,) = (row for row in seen["agents"] if row["name"] == "wait")
    assert (tool["kind"], tool["instances"], tool["queued"], tool["running"]) == ("tool", 1, 2, 1)
    assert {wait["call"] for wait in seen["waits"]} == {"wait"}
    assert len(seen["waits"]) == 2
    for words in ("policy mine.py:Mine", "WAITING CALL", "n1-1", refused):
        assert words in site("top", "--once").stdout

    assert "chat may call wait: wait may be called by chat" in site("policy", "explain-access", "chat", "wait").stdout
    assert "somebody may not call wait" in site("policy", "explain-access", "somebody", "wait", code=1).stdout
    assert site.json("policy", "explain-access", "somebody", "wait", "--tenant", "acme")["is_allowed"]
    anybody = site("policy", "explain-access", "anybody", "chat")
    assert "there is no rule about chat" in anybody.stdout
    assert "nobody serves 'anybody' now" in anybody.stderr
    assert not site("policy", "explain-access", "wait", "chat").stderr
    assert "did you mean 'chat'?" in site("policy", "explain-access", "wait", "chatt", code=2).stderr

    (explained,) = (site.json("explain", wait["future"]) for wait in seen["waits"][:1])
    assert (explained["call"], explained["state"]) == ("wait", "queued")
    steps = [(step["where"], step["what"]) for step in explained["steps"]]
    assert ("n1-1", "came from n1-1, priority 0") in steps
    assert ("controller", "wait may be called by chat, tenant acme") in steps
    assert "tenant acme: it is dear" in site("explain", explained["id"]).stdout
    assert "nalar top" in site("explain", "nonsense", code=2).stderr

    (site.folder / "mine.py").write_text(POLICY.replace("acme", "globex") + "        raise ValueError(view.now < 0)\n")
    eventually(lambda: "no answer, all stays as it was" in site("policy", "history").stdout, "its error is not told")
    assert "ValueError: False (line 11)" in site("policy", "history").stdout
    fails = "the policy fails, and what was decided before holds on: ValueError: False (line 11)"
    eventually(lambda: fails in site("policy", "show").stderr, "it is not shown")
    assert fails in site("top", "--once").stdout
    assert site.json("policy", "show")["states"] == shown["states"]

    gate.touch()
    assert [site("result", job, "--wait").stdout for job in jobs] == [f"{gate}\n"] * 3
    assert controller.end() == worker.end() == 0
    assert "nobody leads" in site("policy", "show").stderr
    assert site.json("policy", "show")["states"] == shown["states"]
    assert "start one with `nalar controller`" in site("top", "--once", code=3).stderr


TOO_EARLY = "nobody serves an agent 'wait'"


def said(done: Done) -> list[str]:
    """What comes of a policy, but for what it is told before the worker has reported for the first time."""
    lines = [line.partition(" s  ")[2] for line in done.stdout.splitlines()]
    return sorted(line for line in lines if not line.endswith(TOO_EARLY))


def test_a_policy_is_tried_on_what_is_there_and_on_what_was_recorded(site: Site) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    (site.folder / "broken.py").write_text("class Mine:\n    def decide(self, view):\n        while True:\n            pass\n")
    (site.folder / "flow.py").write_text(APP)
    site.start("worker", "flow.py", "--workers", "1", "--node", "n1").says("workers are ready")
    says = ["refused: all of nobody stops: there is no worker 'nobody'", "wait may be called by chat, tenant acme: it is dear"]

    tried = site("policy", "test", "mine.py:Mine", "--seconds", "0.5")
    assert said(tried) == says
    assert "1 processes and 0 calls in hand" in tried.stderr
    assert site.json("policy", "show")["states"] == []
    assert "did not answer within" in site("policy", "test", "broken.py:Mine", "--seconds", "0", code=1).stdout

    site("policy", "record", "trace", "--seconds", "1.5")
    assert "cannot be written: File exists" in site("policy", "record", "trace", "--seconds", "0", code=2).stderr
    replayed = site("policy", "replay", "mine.py:Mine", "trace")
    assert said(replayed) == says
    assert site("policy", "replay", "mine.py:Mine", "trace").stdout == replayed.stdout
    entries = [json.loads(line) for line in site("policy", "replay", "mine.py:Mine", "trace", "--json").stdout.splitlines()]
    reasons = [refused["reason"] for entry in entries for refused in entry.get("refused", ())]
    assert [reason for reason in reasons if reason != TOO_EARLY] == ["there is no worker 'nobody'"]
    assert "is no recording" in site("policy", "replay", "mine.py:Mine", "flow.py", code=2).stderr


ELASTIC = '''
from nalar_mq.controllers.policy import kill, provision


class Elastic:
    """Keeps as many workers as a file says."""

    def decide(self, view):
        with open("wanted") as file:
            wanted = int(file.read())
        if len(view.workers) < wanted:
            yield provision("chat", "n1", reason="too few")
        for worker in sorted(view.workers)[wanted:]:
            yield kill(worker, reason="too many")
'''


@pytest.mark.slow
def test_workers_come_and_go_as_the_policy_says(site: Site) -> None:
    (site.folder / "elastic.py").write_text(ELASTIC)
    (site.folder / "flow.py").write_text(APP)
    wanted = site.folder / "wanted"
    wanted.write_text("2")
    worker = site.start("worker", "flow.py", "--workers", "1", "--node", "n1")
    worker.says("workers are ready")
    site.start("controller", "--policy", "elastic.py:Elastic")

    def served() -> list[str]:
        return [member["name"] for member in site.json("ps")["members"] if member["role"] == "worker"]

    eventually(lambda: served() == ["n1-1", "n1-2"], "no worker has come")
    wanted.write_text("1")
    eventually(lambda: served() == ["n1-1"], "no worker has gone")
    assert "all of n1-2 stops: too many" in site("policy", "history").stdout
    (site.folder / "gate").touch()
    assert site("call", "chat", str(site.folder / "gate")).stdout == f"{site.folder / 'gate'}\n"
    assert worker.end() == 0


def test_commands_that_look_at_no_view_load_no_numpy() -> None:
    code = "import sys, nalar_mq.commands, nalar_mq.job_commands; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "False\n"
