"""The corpus of users' patterns over the real runtime: each is a workflow whose tools and agents live in two workers."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Running, is_gone

from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.worker import Worker
from tests.test_corpus import FOLDER, plainly

Outcome = tuple[str, str]
PLAIN = {name: plainly(name) for name in ("patterns", "agents")}
CASES = [(name, pattern.__name__) for name, module in PLAIN.items() for pattern in module.PATTERNS]


def manifest_of(module: str, plain: Any) -> str:
    """A manifest of one file: its tools, its agents, and every pattern as a workflow."""
    tables = [
        *(f"[tools.{tool.__name__}]\nsource = '{module}:{tool.__name__}'" for tool in plain.TOOLS),
        *(f"[agents.{agent.__name__}]\nsource = '{module}:{agent.__name__}'" for agent in plain.AGENTS),
        *(f"[workflows.{pattern.__name__}]\nsource = '{module}:{pattern.__name__}'" for pattern in plain.PATTERNS),
    ]
    return "\n\n".join(tables)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with an app for each file of the corpus."""
    made = {name: tmp_path_factory.mktemp(name) for name in PLAIN}
    for name, folder in made.items():
        shutil.copy(FOLDER / f"{name}.py", folder / f"served_{name}.py")
        (folder / "nalar.toml").write_text(manifest_of(f"served_{name}", PLAIN[name]))
    return made


@pytest.fixture(scope="module")
def apps(folders: dict[str, Path]) -> Iterator[dict[str, App]]:
    apps = {name: load_app(folder) for name, folder in folders.items()}
    yield apps
    for name, app in apps.items():
        app.unload()
        sys.path.remove(str(folders[name]))
        del sys.modules[f"served_{name}"]


@pytest.fixture(scope="module")
def outcomes(apps: dict[str, App], broker_access: BrokerAccess) -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    for name, app in apps.items():
        settings = Settings(broker=broker_access, namespace=f"corpus-{os.getpid()}-{name}", node="here")
        found |= asyncio.run(_all_outcomes(name, app, settings))
    return found


async def _all_outcomes(name: str, app: App, settings: Settings) -> dict[tuple[str, str], Outcome]:
    async with (
        Worker(app, settings, name="first", lease_in_thread=False),
        Worker(app, settings, name="second", lease_in_thread=False),
        connect(settings=settings) as client,
    ):
        return {case: await _outcome_over(client, case[1]) for case in CASES if case[0] == name}


async def _outcome_over(client: Client, pattern: str) -> Outcome:
    try:
        return "value", repr(await client.options(timeout_s=20).call(pattern))
    except Exception as error:
        return "error", f"{type(error).__qualname__}{error.args!r}"


def _plain_outcome(module: str, pattern: str) -> Outcome:
    try:
        result = getattr(PLAIN[module], pattern)()
        result = asyncio.run(result) if inspect.iscoroutine(result) else result
        return "value", repr(result).replace(PLAIN[module].__name__, f"served_{module}")
    except Exception as error:
        return "error", f"{type(error).__qualname__}{error.args!r}"


@pytest.mark.parametrize(("module", "pattern"), CASES)
def test_the_runtime_gives_what_plain_python_gives(module: str, pattern: str, outcomes: dict[tuple[str, str], Outcome]) -> None:
    assert outcomes[module, pattern] == _plain_outcome(module, pattern)


@pytest.fixture(scope="module", params=list(PLAIN))
def up(request: pytest.FixtureRequest, folders: dict[str, Path], apps: dict[str, App]) -> Iterator[tuple[str, Path]]:
    """A file of the corpus and its folder, served by two worker processes."""
    folder = folders[request.param]
    running = Running("up", ".", "--workers", "2", cwd=folder)
    try:
        running.says("2 workers are ready")
        yield request.param, folder
    finally:
        children = running.children()
        assert running.end() == 0
        assert all(map(is_gone, children))


def test_worker_processes_give_what_plain_python_gives(up: tuple[str, Path]) -> None:
    name, folder = up

    async def outcomes() -> dict[str, Outcome]:
        async with connect(app=folder) as client:
            found = [_outcome_over(client, pattern) for module, pattern in CASES if module == name]
            return dict(zip((p for m, p in CASES if m == name), await asyncio.gather(*found), strict=True))

    expected = {pattern: _plain_outcome(name, pattern) for module, pattern in CASES if module == name}
    assert asyncio.run(outcomes()) == expected
