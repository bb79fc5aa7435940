"""One real broker for the whole run; a namespace of its own for every test."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from hypothesis import HealthCheck, settings

from nalar_mq.broker import EmbeddedBroker
from nalar_mq.config import BrokerAccess
from nalar_mq.installation import is_compiled
from nalar_mq.syntax import uncollected

# How long an example takes is a matter of the machine; all else is as it is by default, in continuous integration as well.
settings.register_profile("unhurried", parent=settings(), deadline=None, suppress_health_check=(HealthCheck.too_slow,))
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is compiled cannot be patched: tests that do that are for plain Python."""
    if is_compiled():
        for item in items:
            if item.get_closest_marker("interpreted"):
                item.add_marker(pytest.mark.skip(reason="patches what is compiled here"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def broker_access(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BrokerAccess]:
    """How to reach the broker of this test run; it demands a token. Leave it running: others use it too."""
    folder: Path = tmp_path_factory.mktemp("broker")
    async with EmbeddedBroker(folder) as broker:
        yield broker.access


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """pytest parses the source of what failed, which a finalizer must not disturb: see `nalar_mq.syntax`."""
    with uncollected():
        return (yield)


@pytest.fixture
def namespace(_numbers: Iterator[int]) -> str:
    """A namespace that no other test uses."""
    return f"t{os.getpid()}-{next(_numbers)}"


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the managed state of another one."""
    monkeypatch.setenv("NALAR_STATE", str(tmp_path / "state"))


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A test that sets up logs leaves none of that to the next one."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
