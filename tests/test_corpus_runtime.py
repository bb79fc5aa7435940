"""The corpus of users' patterns over the real runtime: each is a workflow whose tools and agents live in two workers."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.worker import Worker
from tests.test_corpus import FOLDER, NAMES, PLAIN

Outcome = tuple[str, str]


def manifest_of(module: str) -> str:
    """A manifest of the corpus: tools, agents, and every pattern as a workflow."""
    tables = [
        *(f"[tools.{tool.__name__}]\nsource = '{module}:{tool.__name__}'" for tool in PLAIN.TOOLS),
        *(f"[agents.{agent.__name__}]\nsource = '{module}:{agent.__name__}'" for agent in PLAIN.AGENTS),
        *(f"[workflows.{name}]\nsource = '{module}:{name}'" for name in NAMES),
    ]
    return "\n\n".join(tables)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copy(FOLDER / "patterns.py", folder / "served_patterns.py")
    (folder / "nalar.toml").write_text(manifest_of("served_patterns"))
    app = load_app(folder)
    yield app
    app.unload()
    sys.path.remove(str(folder))
    del sys.modules["served_patterns"]


@pytest.fixture(scope="module")
def outcomes(app: App, broker_access: BrokerAccess) -> dict[str, Outcome]:
    settings = Settings(broker=broker_access, namespace=f"corpus-{os.getpid()}", node="here")
    return asyncio.run(_all_outcomes(app, settings))


async def _all_outcomes(app: App, settings: Settings) -> dict[str, Outcome]:
    async with (
        Worker(app, settings, name="first", lease_in_thread=False),
        Worker(app, settings, name="second", lease_in_thread=False),
        connect(settings=settings) as client,
    ):
        return {name: await _outcome_over(client, name) for name in NAMES}


async def _outcome_over(client: Client, name: str) -> Outcome:
    try:
        return "value", repr(await client.options(timeout_s=20).call(name))
    except Exception as error:
        return "error", f"{type(error).__qualname__}{error.args!r}"


def _outcome_of(run: Any) -> Outcome:
    try:
        return "value", repr(run()).replace(PLAIN.__name__, "served_patterns")
    except Exception as error:
        return "error", f"{type(error).__qualname__}{error.args!r}"


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_gives_what_plain_python_gives(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == _outcome_of(getattr(PLAIN, name))
