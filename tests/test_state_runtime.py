"""Agents with managed state in workers: what calls leave behind, over the in-memory transport."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nalar_mq.app import load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import CallCancelledError, StateWriteError, ValueNotEncodableError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "state_app.py"


@pytest.fixture
async def client(namespace: str) -> AsyncIterator[Client]:
    hub, app = MemoryHub(seed=1), load_app(APP)
    settings = Settings(broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace=namespace, node="here", lease_s=2.0)

    def worker(name: str) -> Worker:
        return Worker(app, settings, name=name, connect=hub.connect, lease_in_thread=False)

    async with worker("first"), worker("second"), connect(settings=settings, connect=hub.connect) as made:
        yield made


@pytest.fixture
def app() -> Any:
    return importlib.import_module("state_app")


async def test_sessions_have_state_of_their_own_and_failed_calls_leave_none(client: Client) -> None:
    ann, ben = client.options(session="ann"), client.options(session="ben")
    assert await ann.call("Notebook.note", "a") == 1
    assert await ben.call("Notebook.note_in_thread", "b") == 1
    for name in ("Notebook.note", "Notebook.note_in_thread"):
        with pytest.raises(ValueError, match="lost"):
            await ann.call(name, "lost", fails=True)
    with pytest.raises(ValueNotEncodableError):
        await ann.call("Notebook.note_and_return_what_cannot_travel", "lost")
    assert await ann.call("Notebook.note", "c") == 2
    assert await ann.call("Notebook.all") == (["a", "c"], {"a": 1, "c": 1}, 2)
    assert await ben.call("Notebook.all") == (["b"], {}, 1)
    assert await ann.call("Notebook.itself") == ["a", "c"]


async def test_calls_of_a_session_run_one_by_one(client: Client) -> None:
    ann = client.options(session="ann")
    futures = [ann.call("Notebook.note" if n % 2 else "Notebook.note_in_thread", str(n), fails=n % 5 == 0) for n in range(50)]
    await asyncio.gather(*futures, return_exceptions=True)
    assert await ann.call("Notebook.read") == [str(n) for n in range(50) if n % 5]


async def test_a_cancelled_call_leaves_nothing(client: Client, app: Any) -> None:
    ann = client.options(session="ann")
    app.BEGUN["ann"] = asyncio.Event()
    await ann.call("Notebook.note", "a")
    future = ann.call("Notebook.note_for_ever", "lost")
    await app.BEGUN["ann"].wait()
    future.cancel()
    with pytest.raises(CallCancelledError):
        await future
    assert await ann.call("Notebook.read") == ["a"]


async def test_a_cancelled_call_in_a_thread_keeps_its_session_until_it_has_returned_and_leaves_nothing(
    client: Client, app: Any
) -> None:
    ann = client.options(session="ann")
    app.GATES.update({"begun": threading.Event(), "go on": threading.Event()})
    future = ann.call("Notebook.note_and_block", "lost")
    await asyncio.to_thread(app.GATES["begun"].wait, 20)
    future.cancel()
    with pytest.raises(CallCancelledError):
        await future
    reading = ann.call("Notebook.read")
    app.GATES["go on"].set()
    assert await reading == []


async def test_a_call_that_comes_back_to_its_own_session_reads_and_does_not_write(client: Client) -> None:
    ann = client.options(session="ann")
    assert await ann.call("Notebook.ask_itself", "a", writes=False) == ["a"]
    with pytest.raises(StateWriteError, match="another call holds the session"):
        await ann.call("Notebook.ask_itself", "lost", writes=True)
    assert await ann.call("Notebook.read") == ["a"]


async def test_a_constructor_does_not_write(client: Client) -> None:
    with pytest.raises(StateWriteError, match=r"Hasty\[ann\]\.notes can only be changed by a call"):
        await client.options(session="ann").call("Hasty.read")
