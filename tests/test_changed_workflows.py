"""A job whose workflow is not what it was, or does not do what it did, ends with an error that says so, and repeats nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nalar_mq.errors import RemoteError
from nalar_mq.jobs import DeadLetter, JobHandle
from nalar_mq.messages import Unseen
from nalar_mq.worker import Worker
from tests.test_resumption import PATIENCE_S, Site, lose_driver, site_of

APP = Path(__file__).parent / "apps" / "resume_app.py"


@pytest.fixture
async def site(namespace: str) -> AsyncIterator[Site]:
    async with site_of(APP, "resume_app", namespace) as made:
        made.actors.STRAYS.clear()
        yield made
        for gate in made.actors.HELD.values():
            gate.set()


async def error_of(job: JobHandle) -> str:
    with pytest.raises(RemoteError) as caught:
        await job.result(timeout=PATIENCE_S)
    assert caught.value.type_name == "WorkflowChangedError"
    return str(caught.value)


def kept_in(worker: Worker) -> int:
    """How many calls have ended there and are kept until their outcome is durable."""
    host = worker._host
    return len(host._kept) if host is not None else 0


async def dead_letter(site: Site) -> DeadLetter:
    jobs = await site.client.jobs()
    [letter] = [letter async for letter in jobs.dead_letters()]
    return letter


async def test_other_code_does_not_go_on_with_a_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    spec = site.app.actors["chain"]
    job, old = await site.submit("chain", "a", 6), spec.version
    await site.ran("step 3")
    await site.journaled(4)
    monkeypatch.setattr(spec, "version", "other")
    await lose_driver(site)
    said = await error_of(job)
    assert job.id in said
    assert f"begun by {old}, now other" in said
    assert f"nalar dead-letters retry {job.id}" in said
    assert "WorkflowChangedError" in (await dead_letter(site)).cause
    assert [site.count(f"step {n}") for n in range(6)] == [1, 1, 1, 1, 0, 0]


async def test_from_the_dead_letters_it_begins_afresh_and_goes_on_by_its_new_code(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("chain", "a", 6)
    await site.ran("step 3")
    await site.journaled(4)
    monkeypatch.setattr(site.app.actors["chain"], "version", "other")
    await lose_driver(site)
    await error_of(job)
    assert await (await site.client.jobs()).retry(await dead_letter(site))
    await site.ran("step 3", 2)
    await site.journaled(8)
    site.hub.kill("driver2")
    await site.serve("driver3", "workflow")
    await site.ran("chain a", 3)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == 6
    assert [site.count(f"step {n}") for n in range(6)] == [2, 2, 2, 2, 1, 1]


async def test_a_job_that_nothing_is_known_of_is_begun_by_any_code(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    monkeypatch.setattr(site.app.actors["waits_for_tool"], "version", "other")
    await lose_driver(site)
    await site.ran("waits_for_tool a", 2)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == "a"


@pytest.mark.parametrize("workflow", ["strays", "strays_in_thread"])
async def test_a_workflow_that_calls_something_else_is_ended_before_that_runs(
    site: Site, workflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nalar_mq.witness._STANDSTILL_S", 0.5)
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit(workflow, "s")
    await site.ran("step 201")
    await site.journaled(2)
    site.actors.STRAYS.append("s")
    site.hub.kill("driver")
    other = await site.serve("driver2", "workflow")
    said = await error_of(job)
    assert "does not make the calls again" in said
    assert f"both times {site.app.actors[workflow].version}" in said
    assert (site.count("step 200"), site.count("step 201"), site.count("step 299")) == (1, 1, 0)
    await site.until(lambda: other.running == 0 and other.process.calls.pending == 0)


async def test_a_workflow_that_ends_early_is_not_done(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("stops_short", "s")
    await site.ran("step 201")
    await site.journaled(2)
    site.actors.STRAYS.append("s")
    await lose_driver(site)
    assert "ends without the calls" in await error_of(job)


async def test_nothing_is_left_of_what_waited_for_the_rest_of_a_workflow_that_ends_early(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("stops_short_beside", "s")
    await site.ran("step 201")
    await site.ran("gated s-beside")
    await site.journaled(2)
    site.actors.STRAYS.append("s")
    site.hub.kill("driver")
    other = await site.serve("driver2", "workflow")
    await site.ran("strays s", 2)
    await site.until(lambda: other.process.calls.pending == 2)  # the job and the call that goes on
    site.open("s-beside")
    await site.journaled(3)
    site.open("s")
    assert "ends without the calls" in await error_of(job)
    await site.until(lambda: other.process.calls.pending == 0 and not kept_in(tools))


async def test_nothing_is_left_of_what_waited_for_a_look_that_a_workflow_does_without(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("looks_less", "l")
    await site.ran("gated l-beside")
    await site.journaled(1, Unseen)
    site.actors.STRAYS.append("l")
    site.hub.kill("driver")
    other = await site.serve("driver2", "workflow")
    await site.ran("looks_less l", 2)
    site.open("l-beside")
    await site.journaled(1)
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == "l"
    await site.until(lambda: other.process.calls.pending == 0 and not kept_in(tools))


async def test_a_cancelled_job_ends_while_it_repeats(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("strays_in_thread", "s")
    await site.ran("step 201")
    await site.journaled(2)
    site.actors.STRAYS.append("s")
    site.hub.kill("driver")
    other = await site.serve("driver2", "workflow")
    await site.ran("strays s", 2)
    assert await job.cancel()
    await site.until(lambda: other.running == 0 and other.process.calls.pending == 0)


async def test_what_is_new_comes_after_all_that_was_seen(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a program that takes its time, as it did before, has not changed."""
    monkeypatch.setattr("nalar_mq.witness._STANDSTILL_S", 0.0)
    monkeypatch.setattr("nalar_mq.witness._SLOWER", 50.0)
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("sees_more", "m")
    await site.ran("step 301")
    await site.journaled(2)
    site.hub.kill("driver")
    site.open("m-a")
    site.open("m-b")
    await site.serve("driver2", "workflow")
    found = await job.result(timeout=PATIENCE_S)
    assert sorted(found) == ["a", "b", "followed"]
    assert found[0] == "followed"
    assert (site.count("step 300"), site.count("step 301")) == (1, 1)
