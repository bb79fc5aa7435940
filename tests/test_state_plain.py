"""Unmodified code whose lists and dicts the manifest has kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalar_mq.app import load_app
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import DirectiveError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "plain_state"


async def test_fields_that_the_manifest_names_are_kept(namespace: str, tmp_path: Path) -> None:
    hub, app = MemoryHub(seed=1), load_app(APP)
    settings = Settings(
        broker=BrokerAccess(urls=("nats://nowhere:1",)), namespace=namespace, node="here", lease_s=1.0, state=str(tmp_path)
    )

    def worker(name: str) -> Worker:
        return Worker(app, settings, name=name, connect=hub.connect, lease_in_thread=False)

    async with connect(settings=settings, connect=hub.connect) as client:
        ann = client.options(session="ann")
        async with worker("first"):
            with pytest.raises(ValueError, match="wrong"):
                await ann.call("Notes.note", "wrong")
            assert await ann.call("Notes.note", "a") == 2
            with pytest.raises(ValueError, match="wrong"):
                await ann.call("Notes.note", "wrong")
        async with worker("second"):
            assert await ann.call("Notes.note", "b") == 3
            assert await ann.call("Notes.all") == (["first", "a", "b"], {"a": 1, "b": 1})
            assert await client.options(session="ben").call("Notes.all") == (["first"], {})
            assert await client.call("story", ["x", "y"]) == (["first", "x", "y"], {"x": 1, "y": 1})


@pytest.mark.parametrize(
    ("field", "said"),
    [("nothing", "'managed' names 'nothing', which is not annotated"), ("title", "'managed' names 'title', which is not")],
)
def test_what_cannot_be_managed_is_said(tmp_path: Path, field: str, said: str) -> None:
    module = f"plain_{field}"
    (tmp_path / f"{module}.py").write_text("class Notes:\n    title: str\n    def note(self) -> None: ...\n")
    (tmp_path / "nalar.toml").write_text(f'[agents.Notes]\nsource = "{module}:Notes"\nmanaged = ["{field}"]\n')
    with pytest.raises(DirectiveError, match=rf"nalar\.toml:2: class Notes: {said}"):
        load_app(tmp_path)
