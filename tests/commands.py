"""The command `nalar`: run to its end, in a process of its own or in this one, or going on until it is told to stop."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from waiting import PATIENCE_S, eventually

from nalar_mq.cli import run_command
from nalar_mq.config import BrokerAccess

NALAR = Path(sysconfig.get_path("scripts")) / "nalar"


def environment(home: Path) -> dict[str, str]:
    """The variables of this process, without those that tell `nalar` anything, and with another home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NALAR_", "NATS_", "XDG_"))}
    return kept | {"HOME": str(home)}


def naming(access: BrokerAccess, namespace: str) -> dict[str, str]:
    """The variables that name a broker and a namespace there."""
    return {"NATS_URL": access.urls[0], "NATS_TOKEN": access.token, "NALAR_NAMESPACE": namespace}


def nalar(*words: object, cwd: Path, code: int = 0, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end and checks its exit code; no traceback reaches the user."""
    done = subprocess.run(
        [NALAR, *map(str, words)],
        cwd=cwd,
        env=environment(cwd) | variables,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return _checked(done, code)


def nalar_here(*words: object, cwd: Path, code: int = 0, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`nalar`, without a process of its own: for what it says and does, where it does not matter how it starts and ends."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, environment(cwd) | variables, clear=True),
        mock.patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        ended = run_command([str(word) for word in words])
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return _checked(subprocess.CompletedProcess(words, ended, *said), code)


def _checked(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


class Shell:
    """`nalar` in a folder, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: object, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return nalar_here(*words, cwd=self.folder, code=code, stdin=stdin)

    def json(self, *words: object) -> Any:
        """What a command prints as JSON."""
        return json.loads(self(*words, "--json").stdout)


class Running:
    """A command that goes on until it is told to stop."""

    def __init__(self, *words: object, cwd: Path, variables: Mapping[str, str] | None = None) -> None:
        self._errors = cwd / f"stderr-{time.monotonic_ns()}"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [NALAR, *map(str, words)],
                cwd=cwd,
                env=environment(cwd) | (variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    @property
    def said(self) -> str:
        return self._errors.read_text()

    def says(self, text: str) -> str:
        """All that it has said, once `text` is in it."""
        eventually(lambda: text in self.said or self.process.poll() is not None, f"never said {text!r}")
        assert text in self.said, self.said
        return self.said

    def children(self) -> list[psutil.Process]:
        """The processes that it has begun, and those of these; none if it has ended: whoever asks then has better to tell."""
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code; who does not stop is killed, and the test fails."""
        self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went between the two looks
        return True
