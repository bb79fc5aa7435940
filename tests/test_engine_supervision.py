"""An engine that dies is started again, by its own supervisor, and once for all who use it; the server is a stand-in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from waiting import until

from nalar_mq import engine_process, values
from nalar_mq.agents.llm import Llm
from nalar_mq.doctor import examine_model
from nalar_mq.engines import EngineState, LocalEngine, local_engine_state
from nalar_mq.errors import EngineCrashLoopError
from nalar_mq.installation import State

STAND_INS = Path(__file__).parent / "stand_ins"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a server outlives its supervisor")


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class Place:
    """The folder of an engine, and the file of its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "engine"
        self.model = folder / "model.gguf"
        self.engines: list[LocalEngine] = []
        self.says()

    def says(self, **told: int) -> None:
        self.model.write_text(json.dumps(told))

    @property
    def starts(self) -> list[int]:
        path = self.model.with_name("model.gguf.starts")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def state(self) -> EngineState:
        state = local_engine_state({"NALAR_ENGINE_DIR": str(self.folder)})
        assert state is not None
        return state

    def user(self) -> LocalEngine:
        self.engines.append(LocalEngine(self.folder, model=self.model))
        return self.engines[-1]


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    place = Place(tmp_path)
    yield place
    for engine in place.engines:
        engine.close()
    await until(lambda: not (place.folder / "engine.state").exists(), "it goes on")
    assert not any(is_alive(pid) for pid in place.starts)
    assert not list(place.folder.glob(f"{engine_process.USER_PREFIX}*"))


async def test_a_server_that_is_killed_is_started_again_before_anybody_asks(place: Place) -> None:
    engine = place.user()
    before = await engine.ensure()
    (first,) = place.starts
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(place.starts) == 2 and place.state.phase == "ready", "it has no successor")
    assert (place.state.restarts, place.state.failures) == (1, 1)
    assert "signal 9" in place.state.reason or "memory" in place.state.reason
    after = await engine.ensure()
    assert after != before
    assert place.starts[1:] == [place.state.pid]


async def test_a_request_that_was_cut_is_made_again(place: Place, tmp_path: Path) -> None:
    llm = Llm(engine=place.user())
    gate = tmp_path / "gate"
    cut = asyncio.ensure_future(llm.chat(f"wait for {gate}"))
    await until(lambda: (tmp_path / "gate.waits").exists(), "it is not asked")
    (first,) = place.starts
    os.kill(first, signal.SIGKILL)
    gate.touch()
    assert int(await cut) == place.state.pid != first
    await llm.on_stop()


async def test_a_server_that_keeps_ending_is_told_apart_and_tried_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.says(ends=7)
    engine = place.user()
    with pytest.raises(EngineCrashLoopError, match=r"ended with code 7.*told to end") as caught:
        await engine.ensure()
    assert caught.value.failures >= engine_process.MAX_FAILURES
    back = values.decode_error(*values.encode_error(caught.value))
    assert isinstance(back, EngineCrashLoopError)
    assert back.failures == caught.value.failures
    assert len(place.starts) >= engine_process.MAX_FAILURES
    monkeypatch.setenv("NALAR_ENGINE_DIR", str(place.folder))
    (finding,) = [finding for finding in examine_model() if finding.check == "engine"]
    assert finding.state is State.WARNING
    assert "ended with code 7" in finding.found
    place.says()
    await until(lambda: place.state.phase == "ready", "it is not tried on")
    await engine.ensure()
    (finding,) = [finding for finding in examine_model() if finding.check == "engine"]
    assert finding.state is State.OK


async def test_whoever_comes_meanwhile_starts_no_second_one(place: Place) -> None:
    await asyncio.gather(*(place.user().ensure() for _ in range(4)))
    assert len(place.starts) == 1
    os.kill(place.starts[0], signal.SIGKILL)
    accesses = await asyncio.gather(*(engine.ensure() for engine in place.engines))
    assert len({access.url for access in accesses}) == 1
    assert len(place.starts) == 2


async def test_a_server_ends_with_its_supervisor_and_both_are_started_again(place: Place) -> None:
    engine = place.user()
    await engine.ensure()
    os.kill(place.state.supervisor, signal.SIGKILL)
    (first,) = place.starts
    await until(lambda: not is_alive(first), "it goes on")
    await engine.ensure()
    assert len(place.starts) == 2


USER = """
import asyncio, sys
from pathlib import Path
from nalar_mq.engines import LocalEngine
asyncio.run(LocalEngine(Path(sys.argv[1]), model=Path(sys.argv[2])).ensure())
print("ready", flush=True)
sys.stdin.read()
"""


async def test_it_waits_for_the_successor_of_a_user_that_died(place: Place) -> None:
    user = await asyncio.create_subprocess_exec(
        sys.executable, "-c", USER, str(place.folder), str(place.model), stdin=-1, stdout=-1, env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(Path(__file__).parent.parent)])
        }
    )  # fmt: skip
    assert user.stdout is not None
    assert await user.stdout.readline() == b"ready\n"
    user.kill()
    died_at = asyncio.get_running_loop().time()
    await user.wait()
    engine = place.user()
    await engine.ensure()
    await asyncio.sleep(0.5)
    await engine.ensure()
    if asyncio.get_running_loop().time() - died_at < engine_process.GRACE_S:  # else this machine was too slow for it
        assert len(place.starts) == 1


async def test_an_end_for_want_of_memory_is_told_apart() -> None:
    killed, ended, failed = signal.SIGKILL.value, signal.SIGTERM.value, 3 << 8
    why = engine_process._why
    assert "memory ran out" in why(killed, is_for_memory=True)
    assert why(killed, is_for_memory=False) == "it was ended by signal 9"
    assert why(ended, is_for_memory=True) == "it was ended by signal 15"
    assert why(failed, is_for_memory=True) == "it ended with code 3"
    assert engine_process._memory_kills() >= 0


async def test_a_request_survives_several_ends_of_the_server(place: Place, tmp_path: Path) -> None:
    llm = Llm(engine=place.user())
    gate = tmp_path / "gate"
    cut = asyncio.ensure_future(llm.chat(f"wait for {gate}"))
    for _ in range(3):
        await until(lambda: (tmp_path / "gate.waits").exists(), "it is not asked")
        victim = place.starts[-1]
        (tmp_path / "gate.waits").unlink()
        os.kill(victim, signal.SIGKILL)
    gate.touch()
    assert int(await cut) == place.starts[-1]
    assert len(place.starts) == 4
    await llm.on_stop()
