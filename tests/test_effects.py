"""Time, chance and effects: in a job another attempt is given what the first one was, elsewhere they are what they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import nalar_mq
from nalar_mq.errors import RemoteError
from nalar_mq.history import History
from nalar_mq.messages import Reading
from nalar_mq.sole_writer import SoleWriter
from tests.test_resumption import PATIENCE_S, Site, lose_driver, site_of

APP = Path(__file__).parent / "apps" / "effects_app.py"
HOUR_S = 3600.0


@pytest.fixture
async def site(namespace: str) -> AsyncIterator[Site]:
    async with site_of(APP, "effects_app", namespace) as made:
        yield made
        for gate in made.actors.HELD.values():
            gate.set()


@pytest.mark.parametrize("workflow", ["takes", "takes_in_thread"])
async def test_another_attempt_is_given_the_same(site: Site, workflow: str) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit(workflow, "t")
    await site.until(lambda: len(site.actors.SEEN.get("t", ())) == 1)
    await lose_driver(site)
    await site.until(lambda: len(site.actors.SEEN["t"]) == 2)
    site.open("t")
    site.actors.held("t").set()
    await job.result(timeout=PATIENCE_S)
    first, second = site.actors.SEEN["t"]
    assert first == second
    assert (site.count("order t-1"), site.count("order t-2"), site.count("refused t")) in ((1, 1, 0), (1, 1, 1))
    assert sum(line.startswith("step") for line in site.actors.RUNS) == 1
    assert all(moment.tzinfo is UTC for moment in first if isinstance(moment, datetime))


async def test_an_effect_has_a_key_of_its_own_that_is_the_same_in_every_attempt(site: Site) -> None:
    await site.serve("driver", "workflow")
    job = await site.submit("side_by_side", "s")
    await site.journaled(5)
    await lose_driver(site)
    await site.ran("side_by_side s", 2)
    site.open("s")
    found = await job.result(timeout=PATIENCE_S)
    assert len({key for key, _ in found}) == 5
    assert [site.count(f"order s-{n}") for n in range(5)] == [1] * 5


async def test_who_is_held_to_be_lost_begins_no_effect(site: Site) -> None:
    """The job goes on elsewhere, while the program of its former attempt does so, too."""
    driver = await site.serve("driver", "workflow")
    job = await site.submit("takes_late", "t")
    await site.ran("takes_late t")
    await lose_driver(site)
    await site.ran("takes_late t", 2)
    assert not driver.process.is_current()
    site.open("t")
    assert await job.result(timeout=PATIENCE_S) == 2
    assert site.count("order t") == 1


@pytest.mark.parametrize("workflow", ["sleeps", "sleeps_in_thread"])
async def test_who_sleeps_leaves_room_for_others(site: Site, workflow: str) -> None:
    await site.serve("driver", "workflow")
    await site.submit(workflow, "long", HOUR_S)
    await site.ran("sleeps long")
    async with asyncio.timeout(PATIENCE_S):
        assert await site.client.call(workflow, "short", 0.01) == "short"
        assert await (await site.submit(workflow, "job", 0.01)).result() == "job"


@pytest.mark.parametrize("workflow", ["sleeps", "sleeps_in_thread"])
async def test_another_attempt_sleeps_only_for_the_rest(site: Site, workflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.serve("driver", "workflow")
    job = await site.submit(workflow, "s", HOUR_S)
    await site.ran("sleeps s")
    await site.journaled(1, Reading)
    site.hub.kill("driver")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + HOUR_S)
    await site.serve("driver2", "workflow")
    assert await job.result(timeout=PATIENCE_S) == "s"
    assert site.count("sleeps s") == 2


@pytest.mark.parametrize("workflow", ["sleeps", "sleeps_in_thread"])
async def test_a_cancelled_job_sleeps_no_more(site: Site, workflow: str) -> None:
    driver = await site.serve("driver", "workflow")
    job = await site.submit(workflow, "s", HOUR_S)
    await site.journaled(1, Reading)
    assert await job.cancel()
    await site.until(lambda: driver.running == 0 and driver.process.calls.pending == 0)


async def test_an_alarm_among_calls_rings_in_the_same_place_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("races", "r")
    await site.ran("step r ['alarm']")
    site.open("r-b")
    await site.ran("step r ['alarm', 'b']")
    site.open("r-a")
    await site.until(lambda: len(site.actors.SEEN.get("r", ())) == 1)
    await lose_driver(site)
    await site.until(lambda: len(site.actors.SEEN["r"]) == 2)
    site.open("r")
    assert await job.result(timeout=PATIENCE_S) == ["alarm", "b", "a"]
    assert site.actors.SEEN["r"] == [["alarm", "b", "a"]] * 2
    assert sorted(site.actors.RUNS) == sorted(set(site.actors.RUNS)), "something ran again"


async def test_an_effect_begins_when_what_led_to_it_is_durable(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    accepts, append = asyncio.Event(), SoleWriter.append

    async def late(self: SoleWriter, data: bytes) -> bool:
        await accepts.wait()
        return await append(self, data)

    monkeypatch.setattr(SoleWriter, "append", late)
    await site.serve("driver", "workflow")
    job = await site.submit("decides_by_clock", "d")
    await site.ran("decides d")
    for _ in range(100):
        await asyncio.sleep(0)
    assert site.count("order d") == 0
    accepts.set()
    await job.result(timeout=PATIENCE_S)
    assert site.count("order d") == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("plain_on_loop", "p"), "await effect.asyncio.to_thread, order"),
        (("too_large",), "result of effect"),
        (("of_an_actor",), "is an actor"),
    ],
)
async def test_what_cannot_be_is_said(site: Site, call: tuple[str, ...], says: str) -> None:
    await site.serve("driver", "workflow")
    with pytest.raises(RemoteError, match=says):
        await (await site.submit(*call)).result(timeout=PATIENCE_S)


async def test_outside_of_jobs_it_is_the_plain_thing(site: Site) -> None:
    await site.serve("all", "workflow", "tool")
    site.open("p")
    site.actors.held("p").set()
    async with asyncio.timeout(PATIENCE_S):
        first = await site.client.call("takes", "p")
        second = await site.client.call("takes_in_thread", "p")
    assert first[1] != second[1]
    assert first[-1] == first[-2]
    assert second[-1] == second[1]
    assert site.count("order p-1") == 2


async def test_outside_of_the_runtime_it_is_the_plain_thing() -> None:
    async def later(x: int) -> int:
        return x

    before = datetime.now(UTC)
    assert before <= nalar_mq.now() <= datetime.now(UTC)
    assert nalar_mq.effect(len, "abc") == 3
    assert await nalar_mq.effect(later, 4) == 4
    assert 0 <= nalar_mq.random().random() < 1
    await nalar_mq.sleep(0)
    await asyncio.to_thread(nalar_mq.sleep, 0)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            nalar_mq.sleep(wrong)


def test_the_clock_of_a_call_never_goes_back() -> None:
    history = History("j", b"p", in_order=True)
    shown = [history.read_clock(wall_s)[0] for wall_s in (5.0, 3.0, 6.0)]
    assert shown == [5.0, 5.0, 6.0]


PLAIN = """
from nalar_mq import effect, now, random, sleep

RUNS, GATES, SEEN, HELD = [], {}, {}, {}


def word(x):
    RUNS.append(f"word {x}")
    return x + "!"


def order(x):
    RUNS.append(f"order {x}")
    return f"{x} no. {RUNS.count(f'order {x}')}"


def flow(name):
    began = now()
    words = [word(name + letter) for letter in "ab"]
    receipt = effect(order, words[0])
    sleep(0.01)
    return f"{words[1]} {receipt} {now() >= began} {random().random() < 1}"
"""


async def test_unmodified_python_has_them_too(tmp_path: Path, namespace: str) -> None:
    (tmp_path / "plain_flow.py").write_text(PLAIN)
    tables = (f"[{kind}.{name}]\nsource = 'plain_flow:{name}'" for kind, name in (("tools", "word"), ("workflows", "flow")))
    (tmp_path / "nalar.toml").write_text("\n".join(tables))
    plain: dict[str, Any] = {}
    exec(PLAIN, plain)
    expected = "xb! xa! no. 1 True True"
    assert await asyncio.to_thread(plain["flow"], "x") == expected
    async with site_of(tmp_path, "plain_flow", namespace) as site:
        await site.serve("all", "workflow", "tool")
        async with asyncio.timeout(PATIENCE_S):
            assert await (await site.submit("flow", "x")).result() == expected
            assert await site.client.call("flow", "y") == expected.replace("x", "y")
        site.app.unload()
