"""The app that is up in a folder, as other commands there find it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nalar_mq import commands
from nalar_mq.broker import RuntimeFile
from nalar_mq.config import BrokerAccess, Settings


@pytest.mark.parametrize(("named", "user", "is_loaded"), [("app.py", 0, True), ("app.py", 1, False), ("../app.py", 0, False)])
def test_what_is_up_here_is_loaded_if_it_is_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, user: int, is_loaded: bool
) -> None:
    """In a folder that others may write to, the file that names the app may be anybody's."""
    (tmp_path / "here").mkdir()
    mark = tmp_path / "loaded"
    for folder in (tmp_path, tmp_path / "here"):
        (folder / "app.py").write_text(
            f"open({str(mark)!r}, 'w').close()\nfrom nalar_mq import tool\n\n\n@tool\ndef t(): ...\n"
        )
    monkeypatch.chdir(tmp_path / "here")
    up = RuntimeFile(url="nats://x:1", token="t", namespace="n", pid=1, app=named)
    monkeypatch.setattr(commands, "read_runtime_file", lambda _: up)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + user)
    settings = Settings(broker=BrokerAccess(urls=(up.url,)), namespace="n", node="n", local_store="off")
    assert commands._load_what_is_up(settings) is is_loaded
    assert mark.exists() is is_loaded
