"""State that was kept by a former version of its agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nalar_mq import ManagedDict, ManagedList, ManagedValue, agent, method, upgrade
from nalar_mq.actor import spec_of
from nalar_mq.app import App
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import DirectiveError, StateSchemaError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.worker import Worker


@agent(name="Notebook")
class First:
    notes: ManagedList[str]
    title: ManagedValue[str] = ManagedValue("untitled")

    @method
    async def note(self, text: str) -> int:
        self.notes.append(text)
        self.title.value = text
        return len(self.notes)


@agent(name="Notebook")
class Second:
    notes: ManagedDict[str, int]
    title: ManagedValue[str] = ManagedValue("untitled")

    @upgrade(1)
    @staticmethod
    def counted(state: dict[str, Any]) -> dict[str, Any]:
        return {"notes": {text: state["notes"].count(text) for text in state["notes"]}, "title": state["title"].upper()}

    @method
    async def note(self, text: str) -> int:
        self.notes[text] = self.notes.get(text, 0) + 1
        return len(self.notes)

    @method
    async def all(self) -> tuple[dict[str, int], str]:
        return self.notes.copy(), self.title.value


@agent(name="Notebook")
class Third(Second):
    @upgrade(2)
    @staticmethod
    def doubled(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"notes": {text: 2 * count for text, count in state["notes"].items()}}

    @method
    async def all(self) -> tuple[dict[str, int], str]:
        return self.notes.copy(), self.title.value


@agent(name="Notebook")
class Forgetful:
    other: ManagedList[str]

    @method
    async def note(self, text: str) -> int:
        self.other.append(text)
        return len(self.other)


@agent(name="Notebook")
class Broken:
    notes: ManagedList[str]

    @upgrade(1)
    @staticmethod
    def wrong(state: dict[str, Any]) -> dict[str, Any]:
        return {"nothing": state["nobody"]}

    @method
    async def note(self, text: str) -> int:
        self.notes.append(text)
        return len(self.notes)


@agent(name="Notebook")
class Numbered:
    notes: ManagedList[int]
    title: ManagedValue[str] = ManagedValue("untitled")

    @method
    async def note(self, text: str) -> int:
        self.notes.append(len(text))
        return len(self.notes)


@agent(name="Notebook")
class Measured(Numbered):
    notes: ManagedList[int]

    @upgrade(1)
    @staticmethod
    def measured(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"notes": [len(text) for text in state["notes"]]}

    @method
    async def all(self) -> list[int]:
        return list(self.notes)


@agent(name="Notebook")
class Wider(First):
    notes: ManagedList[str | None]


class Runtime:
    def __init__(self, namespace: str, state: Path) -> None:
        self.hub = MemoryHub(seed=1)
        self.settings = Settings(
            broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace=namespace, node="here", lease_s=1.0, state=str(state)
        )

    async def call(self, cls: type, name: str, *args: Any) -> Any:
        """A call of a session in a worker that serves that version of the agent."""
        spec = spec_of(cls)
        assert spec is not None
        app = App(Path(__file__), {spec.name: spec})
        worker = Worker(app, self.settings, name="worker", connect=self.hub.connect, lease_in_thread=False)
        async with worker, connect(settings=self.settings, connect=self.hub.connect) as client:
            return await client.options(session="ann").call(f"Notebook.{name}", *args)


@pytest.fixture
def runtime(namespace: str, tmp_path: Path) -> Runtime:
    return Runtime(namespace, tmp_path / "state")


async def test_state_is_upgraded_step_by_step_and_once(runtime: Runtime) -> None:
    for text in ("a", "b", "a"):
        await runtime.call(First, "note", text)
    assert await runtime.call(Second, "all") == ({"a": 2, "b": 1}, "A")
    assert await runtime.call(Second, "note", "c") == 3
    assert await runtime.call(Third, "all") == ({"a": 4, "b": 2, "c": 2}, "A")
    assert await runtime.call(Third, "all") == ({"a": 4, "b": 2, "c": 2}, "A")


async def test_several_versions_at_once(runtime: Runtime) -> None:
    await runtime.call(First, "note", "a")
    assert await runtime.call(Third, "all") == ({"a": 2}, "A")


async def test_state_of_a_later_version_is_refused_and_stays(runtime: Runtime) -> None:
    await runtime.call(First, "note", "a")
    assert await runtime.call(Second, "note", "b") == 2
    with pytest.raises(StateSchemaError, match="kept by version 2 of its agent, and this one is version 1"):
        await runtime.call(First, "note", "c")
    assert await runtime.call(Second, "all") == ({"a": 1, "b": 1}, "A")


async def test_a_field_that_is_gone_is_not_forgotten_silently(runtime: Runtime) -> None:
    await runtime.call(First, "note", "a")
    with pytest.raises(
        StateSchemaError, match=r"was kept with a list\[str\] 'notes', which is not there any more: .*@upgrade\(1\)"
    ):
        await runtime.call(Forgetful, "note", "b")
    assert await runtime.call(First, "note", "b") == 2


async def test_what_is_of_another_type_now_is_not_read_as_if_it_were_of_that(runtime: Runtime) -> None:
    """`Numbered` would go on with a list of texts and numbers, and not know it."""
    await runtime.call(First, "note", "abc")
    with pytest.raises(
        StateSchemaError, match=r"was kept with a list\[str\] 'notes', which is a list\[int\] now: .*@upgrade\(1\)"
    ):
        await runtime.call(Numbered, "note", "b")
    assert await runtime.call(Wider, "note", "b") == 2
    with pytest.raises(StateSchemaError, match=r"was kept with a list\[None \| str\] 'notes'"):
        await runtime.call(First, "note", "c")
    assert await runtime.call(Measured, "all") == [3, 1]
    assert await runtime.call(Measured, "note", "") == 3


async def test_an_upgrade_that_fails_leaves_the_session_as_it_was(runtime: Runtime) -> None:
    await runtime.call(First, "note", "a")
    with pytest.raises(StateSchemaError, match="cannot be upgraded from version 1: KeyError"):
        await runtime.call(Broken, "note", "b")
    assert await runtime.call(First, "note", "b") == 2


def test_upgrades_are_checked_when_they_are_declared() -> None:
    with pytest.raises(DirectiveError, match="the first version of an agent's state is 1"):
        upgrade(0)
    with pytest.raises(DirectiveError, match="stands above @staticmethod"):

        class _Wrong:
            @upgrade(1)
            def with_self(self) -> None: ...

    with pytest.raises(DirectiveError, match=r"two methods are marked @upgrade\(1\)"):

        @agent
        class _Twice:
            notes: ManagedList[str]

            @upgrade(1)
            @staticmethod
            def one(state: dict[str, Any]) -> dict[str, Any]:
                return state

            @upgrade(1)
            @staticmethod
            def other(state: dict[str, Any]) -> dict[str, Any]:
                return state

            @method
            async def note(self) -> None: ...
