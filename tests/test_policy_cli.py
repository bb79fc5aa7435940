"""The commands of the global controller, as processes beside a broker and workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nalar_mq.config import BrokerAccess

NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
PATIENCE_S = 90.0

POLICY = '''
from nalar_mq.controllers.policy import kill, set_priority


class Mine:
    """Raises one session, and wants what cannot be."""

    def decide(self, view):
        if "ann" in view.sessions:
            yield set_priority("ann", 5, reason="she pays")
        yield kill("nobody")
'''


class Site:
    """A broker and a namespace, and a shell that knows them."""

    def __init__(self, access: BrokerAccess, namespace: str, folder: Path) -> None:
        self.access = access
        self.namespace = namespace
        self.folder = folder
        self.running: list[subprocess.Popen[str]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NALAR_", "NATS_", "XDG_"))}
        self.environment = kept | {
            "HOME": str(folder),
            "NATS_URL": access.urls[0],
            "NATS_TOKEN": access.token,
            "NALAR_NAMESPACE": namespace,
        }

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs the command to its end; no traceback reaches the user."""
        done = subprocess.run(
            [NALAR, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def start(self, *words: str) -> Running:
        return Running(self, *words)


class Running:
    """A command that goes on until it is told to stop."""

    def __init__(self, site: Site, *words: str) -> None:
        self.errors = site.folder / f"stderr-{len(site.running)}"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [NALAR, *words], cwd=site.folder, env=site.environment, stdout=subprocess.DEVNULL, stderr=errors, text=True
            )
        site.running.append(self.process)

    @property
    def said(self) -> str:
        return self.errors.read_text()

    def says(self, text: str) -> str:
        eventually(lambda: text in self.said or self.process.poll() is not None, f"never said {text!r}")
        assert text in self.said
        return self.said

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def site(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> Iterator[Site]:
    site = Site(broker_access, namespace, tmp_path)
    yield site
    for process in site.running:
        if process.poll() is None:
            process.kill()
            process.wait()


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
        ("broken.py:Mine", "broken.py cannot be imported: invalid syntax (line 1)"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_a_mistake_of_the_command_line(site: Site, policy: str, says: str) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    (site.folder / "broken.py").write_text("policy of mine\n")
    for words in (("controller",), ("up", "mine.py")):
        done = site(*words, "--policy", policy, code=2)
        if words == ("controller",):
            assert says in done.stderr


def test_no_policy_without_a_controller(site: Site) -> None:
    (site.folder / "mine.py").write_text(POLICY)
    assert "leave out one" in site("up", "mine.py", "--policy", "mine.py:Mine", "--no-controller", code=2).stderr
