"""Jobs whose processes are lost go on where they were: nothing that was seen is run again or seen differently.

Workflows and what they call are served by different workers, so that each of them can be lost alone. A worker that is killed
here loses its connections but goes on running in this very process, like one that stood still and wakes up: whatever it does
after that must not be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until

from nalar_mq.address import Address
from nalar_mq.app import App, load_app
from nalar_mq.call_context import DEFAULT_OPTIONS, CallContext
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import CallCancelledError, OwnerLostError, RemoteError
from nalar_mq.future import Future, as_completed
from nalar_mq.history import History
from nalar_mq.intake import Intake, IntakeOptions
from nalar_mq.jobs import JOB_ID, JobHandle, Jobs
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import (
    Fail,
    Locate,
    Located,
    Message,
    Observation,
    Outcome,
    Pack,
    Resolve,
    Running,
    Voided,
    decode_journal,
)
from nalar_mq.values import encode, encode_error
from nalar_mq.witness import Witness
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "resume_app.py"
PATIENCE_S = 40.0
QUICK = IntakeOptions(ack_wait_s=1.5, look_again_s=0.2, back_off_s=0.05)


class Site:
    """Workers that serve a part of the app each, and a client."""

    def __init__(self, settings: Settings, hub: MemoryHub, stack: AsyncExitStack, path: Path, module: str) -> None:
        self.app = load_app(path)
        self.actors: Any = importlib.import_module(module)
        self.settings = settings
        self.hub = hub
        self.stack = stack
        self.intake = QUICK
        self.client: Client
        self.workers: list[Worker] = []

    async def serve(self, name: str, *wanted: str) -> Worker:
        """Starts a worker for all actors of these kinds, and for those of these names."""
        specs = {key: spec for key, spec in self.app.actors.items() if spec.kind in wanted or key in wanted}
        worker = Worker(
            App(self.app.path, specs),
            self.settings,
            name=name,
            intake=self.intake,
            connect=self.hub.connect,
            lease_in_thread=False,
        )
        self.workers.append(await self.stack.enter_async_context(worker))
        return worker

    async def submit(self, workflow: str, *args: object) -> JobHandle:
        return await self.client.submit(workflow, *args)

    async def until(self, condition: Callable[[], object]) -> None:
        await until(condition, self._in_vain, within_s=PATIENCE_S)

    def _in_vain(self) -> str:
        return f"waited in vain; ran: {self.actors.RUNS}; {'; '.join(map(_state_of, self.workers))}"

    def count(self, line: str) -> int:
        return int(self.actors.RUNS.count(line))

    async def ran(self, line: str, times: int = 1) -> None:
        await self.until(lambda: self.count(line) >= times)

    def open(self, gate: str) -> None:
        self.actors.gate(gate).set()

    def deliveries(self) -> int:
        """How often the queue has given out the job that it has."""
        return max((item.deliveries for queue in self.hub.queues.values() for item in queue.items.values()), default=0)

    def give_out_again(self) -> None:
        """Has the queue give out what it has, as if whoever holds it had been silent for too long."""
        for queue in self.hub.queues.values():
            for item in queue.items.values():
                item.due_s = 0.0
            queue.wake()

    async def journaled(self, count: int, kind: type[Observation] = Outcome) -> None:
        """Returns once so many observations of that kind lie in journals."""
        subjects = self.client.process.subjects
        ledger = await self.client.process.transport.ledger(subjects.journal_ledger, [subjects.journal("*", "*")])

        async def found() -> bool:
            messages = await ledger.read(subjects.journal("*", "*"), limit=10_000)
            packs = [decode_journal(message.data) for message in messages]
            seen = (observation for pack in packs if isinstance(pack, Pack) for observation in pack.observations)
            return sum(isinstance(observation, kind) for observation in seen) >= count

        await self.until(found)


def _state_of(worker: Worker) -> str:
    """What to know of a worker that does not do what it should."""
    process = worker.process
    life = "lives" if process.is_current() else "may be held to be lost"
    life = "was given up" if process.declared_lost.done() else life
    return f"{worker.name} {life}, runs {worker.running}, waits for {process.calls.pending}"


@contextlib.asynccontextmanager
async def site_of(path: Path, module: str, namespace: str) -> AsyncIterator[Site]:
    hub = MemoryHub(seed=3)
    settings = Settings(broker=BrokerAccess(urls=("nats://nowhere",)), namespace=namespace, node="here", lease_s=1.5)
    async with AsyncExitStack() as stack:
        made = Site(settings, hub, stack, path, module)
        for kept in (made.actors.RUNS, made.actors.GATES, made.actors.SEEN, made.actors.HELD):
            kept.clear()
        made.client = await stack.enter_async_context(connect(settings=settings, connect=hub.connect))
        yield made


@pytest.fixture
async def site(namespace: str) -> AsyncIterator[Site]:
    async with site_of(APP, "resume_app", namespace) as made:
        yield made


async def lose_driver(site: Site) -> None:
    """Takes the worker of workflows away; another one comes."""
    site.hub.kill("driver")
    await site.serve("driver2", "workflow")


async def test_what_was_seen_is_not_run_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("chain", "a", 8)
    await site.ran("step 4")
    await site.journaled(5)
    await lose_driver(site)
    await site.ran("chain a", 2)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == 8
    assert [site.count(f"step {n}") for n in range(8)] == [1] * 8


async def test_a_call_that_still_runs_is_waited_for(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    await lose_driver(site)
    await site.ran("waits_for_tool a", 2)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == "a"
    assert site.count("gated a") == 1


async def test_a_call_that_ended_while_nobody_owned_it_is_not_run_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    site.hub.kill("driver")
    site.open("a")
    await site.serve("driver2", "workflow")
    assert await job.result(timeout=PATIENCE_S) == "a"
    assert site.count("gated a") == 1


async def test_a_workflow_outlives_the_worker_that_took_it_in(site: Site) -> None:
    """Who takes a job in need not be who runs it: the former is lost here, the latter goes on."""
    await site.serve("tools", "tool")
    first, second = await site.serve("driver", "workflow"), await site.serve("driver2", "workflow")
    jobs = [await site.submit("chain", f"j{n}", 4) for n in range(12)]
    await site.until(lambda: sum(line.startswith("chain") for line in site.actors.RUNS) == 12)
    assert first.running and second.running
    site.hub.kill("driver")
    for n in range(12):
        site.open(f"j{n}")
    results = [await job.result(timeout=PATIENCE_S) for job in jobs]
    assert results == [4] * 12


async def test_completion_order_and_vain_looks_are_seen_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("order", "o")
    await site.ran("gated o-c")
    for position, letter in enumerate("cab"):
        site.open(f"o-{letter}")
        await site.ran(f"step {ord(letter) * 1000 + position + 1}")
    await site.journaled(6)
    await lose_driver(site)
    await site.until(lambda: site.actors.SEEN["o"].count("begin") == 2 and len(site.actors.SEEN["o"]) == 10)
    site.open("o")
    assert await job.result(timeout=PATIENCE_S) == ["c", "a", "b"]
    assert site.actors.SEEN["o"] == ["begin", "3 looks", "c", "a", "b"] * 2
    assert sorted(site.actors.RUNS) == sorted(set(site.actors.RUNS)), "something ran again"


async def test_completion_order_is_seen_again_when_all_have_ended(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("order_at_the_end", "o")
    await site.ran("gated o-c")
    for position, letter in enumerate("cab"):
        site.open(f"o-{letter}")
        await site.journaled(position + 1)
    await site.ran("step 201")
    await site.journaled(4)
    await lose_driver(site)
    site.open("o")
    assert await job.result(timeout=PATIENCE_S) == ["c", "a", "b"]
    assert sorted(site.actors.RUNS) == ["gated o-a", "gated o-b", "gated o-c", "step 201"]


async def test_the_first_error_is_seen_again_when_all_have_failed(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("first_error", "e")
    await site.ran("fails_at e-c")
    for position, letter in enumerate("cab"):
        site.open(f"e-{letter}")
        await site.journaled(position + 1)
    site.open("e-goes-on")
    await site.ran(f"step {ord('c')}")
    await site.journaled(4)
    await lose_driver(site)
    site.open("e")
    assert await job.result(timeout=PATIENCE_S) == "e-c"
    assert site.count(f"step {ord('c')}") == 1


async def test_calls_that_an_agent_has_made_are_not_repeated_when_it_is_lost(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("agents", "agent")
    job = await site.submit("nested", "n")
    await site.ran("step 100")
    await site.journaled(1)
    site.hub.kill("agents")
    await site.serve("agents2", "agent")
    await site.ran("work 100", 2)
    site.open("n")
    assert await job.result(timeout=PATIENCE_S) == 102
    assert site.count("step 100") == site.count("step 101") == 1


async def test_an_agent_at_work_is_adopted(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("agents", "agent")
    await site.serve("driver", "workflow")
    job = await site.submit("nested", "n")
    await site.ran("step 100")
    await lose_driver(site)
    await site.ran("nested n", 2)
    site.open("n")
    assert await job.result(timeout=PATIENCE_S) == 102
    assert site.count("work 100") == site.count("step 100") == site.count("step 101") == 1


async def test_driver_and_agent_lost_together(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("agents", "agent")
    await site.serve("driver", "workflow")
    job = await site.submit("nested", "n")
    await site.ran("step 100")
    await site.journaled(1)
    site.hub.kill("agents")
    site.hub.kill("driver")
    await site.serve("both", "agent", "workflow")
    await site.ran("work 100", 2)
    site.open("n")
    assert await job.result(timeout=PATIENCE_S) == 102
    assert site.count("step 100") == site.count("step 101") == 1


async def test_everything_lost_but_the_journal(site: Site) -> None:
    await site.serve("driver", "workflow", "tool")
    job = await site.submit("chain", "a", 6)
    await site.ran("step 3")
    await site.journaled(4)
    site.hub.kill("driver")
    site.open("a")
    await site.serve("driver2", "workflow", "tool")
    assert await job.result(timeout=PATIENCE_S) == 6
    # The killed worker goes on in this process, alone: its own tools may run, but those that were journaled ran once.
    assert [site.count(f"step {n}") for n in range(4)] == [1] * 4


async def test_one_job_is_interrupted_again_and_again(site: Site) -> None:
    await site.serve("tools", "tool")
    name = "driver0"
    await site.serve(name, "workflow")
    job = await site.submit("chain", "a", 4)
    await site.ran("step 2")
    await site.journaled(3)
    for number in range(1, 5):
        site.hub.kill(name)
        name = f"driver{number}"
        await site.serve(name, "workflow")
        await site.ran("chain a", number + 1)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == 4
    assert [site.count(f"step {n}") for n in range(4)] == [1] * 4
    [ended] = (await (await site.client.jobs()).overview()).ended
    assert ended.timings.attempts == 5


async def test_a_job_whose_workers_are_lost_is_given_up_only_if_it_gets_no_further(site: Site) -> None:
    limit, jobs = IntakeOptions().losses, await site.client.jobs()

    async def lose(name: str, losses: int) -> None:
        """So often have workers of the job been lost; one more is."""
        site.hub.kill(name)
        held = await jobs.holder(job.id)
        assert held is not None
        await jobs.hold(job.id, msgspec.structs.replace(held[0], losses=losses), held[1])

    await site.serve("tools", "tool")
    await site.serve("driver0", "workflow")
    job = await site.submit("chain", "a", 4)
    await site.ran("step 2")
    await site.journaled(3)
    await lose("driver0", limit)
    await site.serve("driver1", "workflow")
    await site.ran("chain a", 2)
    held = await jobs.holder(job.id)
    assert held is not None
    assert (held[0].losses, held[0].excused, held[0].seen) == (limit + 1, limit + 1, 3)
    await lose("driver1", 2 * limit + 1)
    await site.serve("driver2", "workflow")
    with pytest.raises(RemoteError, match=f"its worker was lost {2 * limit + 2} times"):
        await job.result(timeout=PATIENCE_S)
    assert site.count("chain a") == 2


async def test_idempotency_keys_are_the_same_in_every_attempt_and_different_for_every_call(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    first = await (await site.client.submit("keys", job_id="k")).result(timeout=PATIENCE_S)
    assert len(set(first)) == 3
    jobs = await site.client.jobs()
    await (await site.client.process.transport.ledger(site.client.process.subjects.results_ledger, [])).purge(
        site.client.process.subjects.result("k")
    )
    await jobs.queue.publish(site.client.process.subjects.job("keys"), b"[]", headers={"Nalar-Job-Id": "k"})
    assert await (await site.client.job("k")).result(timeout=PATIENCE_S) == first
    assert all(re.fullmatch("[0-9a-f]{32}", found) for found in first)


async def test_after_a_failure_what_succeeded_is_not_repeated(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("half", "h")
    assert await job.result(timeout=PATIENCE_S) == 41
    assert (site.count("half h"), site.count("step 40"), site.count("fails_once 41")) == (2, 1, 2)


async def test_a_dead_letter_that_is_tried_again_does_not_find_its_failure_though_its_worker_died(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between the dead letter and the moment when all are told that nobody needs what they know of the job."""
    await site.serve("tools", "tool")
    intake = (await site.serve("driver", "workflow"))._intake
    monkeypatch.setattr(intake, "_leave", lambda *_: asyncio.Event().wait())
    job = await site.submit("half_once", "h")
    jobs = await site.client.jobs()

    async def has_failed() -> bool:
        return await jobs.dead_letter(job.id) is not None

    await site.until(has_failed)
    letter = await jobs.dead_letter(job.id)
    assert letter is not None
    site.hub.kill("driver")
    await jobs.retry(letter)
    await site.serve("driver2", "workflow")
    assert await job.result(timeout=PATIENCE_S) == 60 + 1
    assert await jobs.dead_letter(job.id) is None


async def test_after_a_failure_another_worker_finds_what_succeeded(site: Site) -> None:
    await site.serve("tools", "tool")
    await asyncio.gather(*(site.serve(f"driver{n}", "workflow") for n in range(3)))
    jobs = [await site.submit("half", f"h{n}") for n in range(12)]
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
    assert set(map(str, results)) <= {"41"}
    assert all(site.count(f"half h{n}") == 2 for n in range(12) if site.count(f"half h{n}") > 1)


async def test_an_error_that_was_caught_is_caught_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("catches", "c")
    await site.ran("fails 7")
    await site.journaled(1)
    await lose_driver(site)
    await site.ran("catches c", 2)
    site.open("c")
    assert await job.result(timeout=PATIENCE_S) == "ValueError: 7 never is"
    assert site.count("fails 7") == 1


async def test_a_job_whose_agent_has_lost_its_memory_begins_anew(site: Site) -> None:
    await site.serve("driver", "workflow")
    await site.serve("agents", "agent")
    job = await site.submit("counts", "c")
    await site.ran("add 1")
    await site.journaled(1)
    site.hub.kill("agents")
    await site.serve("agents2", "agent")
    site.open("c")
    assert await job.result(timeout=PATIENCE_S) == 11
    assert site.count("add 1") >= 2


async def test_values_that_were_passed_on_get_there_after_a_loss(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("passes_on", "p")
    await site.ran("step 2")
    await site.journaled(3)
    await lose_driver(site)
    await site.ran("passes_on p", 2)
    site.open("p")
    assert await job.result(timeout=PATIENCE_S) == 4
    assert [site.count(f"step {n}") for n in range(4)] == [1] * 4


async def test_a_job_that_has_ended_leaves_nothing_in_journals_or_workers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nalar_mq.journal._TRIM_EVERY_S", 0.05)
    tools, driver = await site.serve("tools", "tool"), await site.serve("driver", "workflow")
    for number in range(3):
        site.open(f"e{number}")
        assert await (await site.submit("chain", f"e{number}", 5)).result(timeout=PATIENCE_S) == 5
    ledger = await site.client.process.transport.ledger(site.client.process.subjects.journal_ledger, [])
    async with asyncio.timeout(PATIENCE_S):
        while sum((await ledger.subjects()).values()) > 1:
            await asyncio.sleep(0.02)
    for worker in (tools, driver):
        assert worker._host is not None
        assert worker._host._kept == {}
        assert worker._host._executions == {}


async def test_a_cancelled_job_stops_what_it_has_called(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    assert await job.cancel()
    await site.until(lambda: tools.running == 0)


async def test_a_call_whose_past_cannot_be_read_ends_with_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("chain", "a", 4)
    await site.ran("step 2")
    site.hub.kill("driver")
    second = await site.serve("driver2", "workflow")
    assert second._host is not None

    async def refuse(job: str, lost: tuple[str, ...]) -> Any:
        raise RuntimeError("cannot be read")

    monkeypatch.setattr(second._host, "_remember", refuse)
    with pytest.raises(RemoteError, match="cannot be read"):
        await job.result(timeout=PATIENCE_S)


async def test_a_stream_that_was_read_is_read_again(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("reads_stream", "s")
    await site.until(lambda: len(site.actors.SEEN.get("s", ())) == 1)
    await lose_driver(site)
    await site.until(lambda: len(site.actors.SEEN["s"]) == 2)
    site.open("s")
    assert await job.result(timeout=PATIENCE_S) == [0, 1, 2, 3, 4]
    assert site.actors.SEEN["s"] == [[0, 1, 2, 3, 4]] * 2
    assert site.count("pieces 5") == 1


async def test_an_argument_that_failed_once_is_what_it_is_now(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("uses_failed", "u")
    assert await job.result(timeout=PATIENCE_S) == 51
    assert (site.count("fails_once 50"), site.count("step 50")) == (2, 1)


async def test_a_call_that_still_winds_down_runs_anew_when_it_has(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("insists", "i")
    await site.ran("insists i", 2)
    site.actors.HELD["i"].set()
    assert await job.result(timeout=PATIENCE_S) == 2
    assert site.count("stubborn i") == 2


async def test_what_a_program_makes_of_the_end_of_its_process_counts_for_nothing(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("taker", "workflow")
    doomed = await site.serve("driver", "workflow")
    jobs = [await site.submit("falls_back", f"f{n}") for n in range(12)]
    await site.until(lambda: sum(line.startswith("gated f") for line in site.actors.RUNS) == 12)
    assert doomed.running
    doomed.process.on_declared_lost()
    await site.until(lambda: not doomed.running)  # its programs have returned what they made of it
    site.hub.kill("driver")
    for n in range(12):
        site.open(f"f{n}")
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(*(job.result() for job in jobs)) == [f"f{n}" for n in range(12)]


async def test_a_call_behind_a_vain_look_can_be_cancelled_and_ends_with_its_process(site: Site) -> None:
    await site.serve("tools", "tool")
    driver = await site.serve("driver", "workflow")
    site.hub.cut("driver")
    context = CallContext(driver.process.calls, call_id=b"p", job="j", session="s")
    context.history = History("j", b"p", in_order=True)
    first = driver.process.calls.call(context, "gated", "", ("x",), {}, DEFAULT_OPTIONS)
    assert not first.available()
    second = driver.process.calls.call(context, "gated", "", ("y",), {}, DEFAULT_OPTIONS)
    assert driver.process.calls.pending == 2
    driver.process.calls.close(OwnerLostError("over"))
    with pytest.raises(OwnerLostError):
        async with asyncio.timeout(PATIENCE_S):
            await second
    site.hub.restore("driver")


async def test_nothing_is_left_of_casts_failures_and_other_workers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nalar_mq.journal._TRIM_EVERY_S", 0.05)
    await site.serve("tools", "tool", "agent")
    drivers = [await site.serve(f"driver{n}", "workflow") for n in range(3)]
    jobs = [await site.submit(*call) for n in range(6) for call in (("casts", f"c{n}"), ("half", f"h{n}"))]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(job.result() for job in jobs))
    await site.until(lambda: not any(driver.process.calls.journal._first_of for driver in drivers))  # type: ignore[union-attr]
    ledger = await site.client.process.transport.ledger(site.client.process.subjects.journal_ledger, [])
    async with asyncio.timeout(PATIENCE_S):
        while max((await ledger.subjects()).values()) > 1:
            await asyncio.sleep(0.02)


async def test_what_a_failed_workflow_has_called_does_not_go_on_beside_its_next_attempt(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("fails_beside", "b")
    await site.ran("fails_beside b", 2)
    await site.ran("gated b", 2)
    await site.until(lambda: tools.running == 1)
    site.open("b")
    assert await job.result(timeout=PATIENCE_S) == "b"


@pytest.mark.parametrize("comes", ["before", "beside"])
async def test_what_a_failed_workflow_has_begun_by_itself_calls_nothing_more(site: Site, comes: str) -> None:
    """A task that nobody waits for any more: its calls are those that the next attempt makes, too."""
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("leaves_a_task", "t")
    await site.ran("leaves_a_task t", 2)
    if comes == "beside":
        site.open("t-2")
        await site.ran("gated t")
    site.open("t-1")
    await site.until(lambda: "t-1 is over" in site.actors.RUNS)
    site.open("t-2")
    await site.ran("gated t")
    site.open("t")
    assert await job.result(timeout=PATIENCE_S) == ["t", "990"]
    assert (site.count("leaves_a_task t"), site.count("gated t")) == (2, 1)


@pytest.mark.parametrize("way", ["closed", "drained"])
async def test_a_stopped_worker_is_waited_for_before_its_jobs_go_on(site: Site, way: str) -> None:
    await asyncio.gather(*(site.serve(f"tools{n}", "tool") for n in range(2)))
    first = await site.serve("driver", "workflow")
    jobs = [await site.submit("waits_for_tool", f"w{n}") for n in range(6)]
    await site.until(lambda: sum(line.startswith("gated") for line in site.actors.RUNS) == 6)
    await site.serve("driver2", "workflow")
    if way == "drained":
        await first.drain(0.0)
    await first.aclose()
    await site.until(lambda: sum(line.startswith("waits_for_tool") for line in site.actors.RUNS) == 12)
    for n in range(6):
        site.open(f"w{n}")
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(*(job.result() for job in jobs)) == [f"w{n}" for n in range(6)]
    assert [site.count(f"gated w{n}") for n in range(6)] == [1] * 6


async def test_a_workflow_that_takes_its_time_sees_the_same_order(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("slow_twin", "t")
    await site.ran("gated t-a")
    site.open("t-a")
    await site.until(lambda: site.actors.SEEN.get("t") == ["a"])
    site.open("t-z")
    await site.until(lambda: site.actors.SEEN["t"] == ["a", "z"])
    await lose_driver(site)
    await site.until(lambda: len(site.actors.SEEN["t"]) == 4)
    site.open("t")
    await job.result(timeout=PATIENCE_S)
    assert site.actors.SEEN["t"] == ["a", "z"] * 2


@pytest.mark.parametrize("way", ["wait_for", "timeout", "gather", "as_completed", "stream", "task"])
async def test_a_time_out_of_asyncio_is_seen_again(site: Site, way: str) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("hasty", "y", way)
    await site.until(lambda: site.actors.SEEN.get("y") == ["late"])
    site.open("y-slow")
    await site.ran("step 30")
    await lose_driver(site)
    await site.until(lambda: len(site.actors.SEEN["y"]) == 4)
    site.open("y")
    assert await job.result(timeout=PATIENCE_S) == ["late", "y-slow"]
    assert site.actors.SEEN["y"] == ["late", "y-slow"] * 2
    assert sorted(site.actors.RUNS) == ["gated y-slow", "step 1", "step 30", "step 40", "step 41"]


async def test_a_job_that_is_given_out_again_before_its_slow_worker_has_claimed_it_is_begun_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, hold = asyncio.Event(), Jobs.hold

    async def answered_late(self: Jobs, id: str, record: Running, revision: int) -> int:
        written = await hold(self, id, record, revision)
        if not revision:
            await answers.wait()
        return written

    monkeypatch.setattr(Jobs, "hold", answered_late)
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.until(lambda: site.deliveries() > 2 or bool(site.count("gated a")))
    assert site.count("gated a") == 0, "it was begun while its first claim was on the way"
    answers.set()
    await site.ran("gated a")
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == "a"
    [ended] = (await (await site.client.jobs()).overview()).ended
    assert ended.timings.attempts == site.count("waits_for_tool a") == site.count("gated a") == 1


async def test_a_job_that_ends_while_another_worker_is_slow_to_claim_it_is_not_run_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    intake = (await site.serve("driver2", "workflow"))._intake
    assert intake is not None
    has_looked, goes_on, claim = asyncio.Event(), asyncio.Event(), intake._claim

    async def late(job: Any) -> bool:
        has_looked.set()
        await goes_on.wait()
        return await claim(job)

    monkeypatch.setattr(intake, "_claim", late)
    while not has_looked.is_set():
        site.give_out_again()
        await asyncio.sleep(0.01)
    site.open("a")
    assert await job.result(timeout=PATIENCE_S) == "a"
    jobs = await site.client.jobs()
    async with asyncio.timeout(PATIENCE_S):
        while await jobs.records():
            await asyncio.sleep(0.01)
    goes_on.set()
    await site.until(lambda: not intake.in_hand)
    assert await jobs.records() == []
    assert site.count("waits_for_tool a") == site.count("gated a") == 1


async def test_a_double_of_a_job_that_ends_while_it_is_being_claimed_is_not_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("waits_for_tool", "a")
    await site.ran("gated a")
    is_here, goes_on, claim = asyncio.Event(), asyncio.Event(), Intake._claim_at_once

    async def late(self: Intake, job: Any) -> bool:
        is_here.set()
        await goes_on.wait()
        return await claim(self, job)

    monkeypatch.setattr(Intake, "_claim_at_once", late)
    jobs = await site.client.jobs()
    await jobs.queue.publish(site.client.process.subjects.job("waits_for_tool"), b'["a"]', headers={JOB_ID: job.id})
    async with asyncio.timeout(PATIENCE_S):
        await is_here.wait()
        site.open("a")
        assert await job.result() == "a"
        while await jobs.records():
            await asyncio.sleep(0.01)
        goes_on.set()
        while await jobs.queue.depth():
            await asyncio.sleep(0.01)
    assert await jobs.records() == []
    assert site.count("waits_for_tool a") == site.count("gated a") == 1


async def test_a_time_out_that_has_not_passed_is_none(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("patient", "q")
    site.open("q-slow")
    await site.ran("gated q-slow")
    await site.journaled(1)
    await lose_driver(site)
    site.open("q")
    assert await job.result(timeout=PATIENCE_S) == "q-slow"
    assert site.count("gated q-slow") == 1


async def test_a_wait_that_ended_with_its_worker_is_no_time_out(site: Site) -> None:
    await site.serve("tools", "tool")
    first = await site.serve("driver", "workflow")
    job = await site.submit("patient", "q")
    await site.ran("gated q-slow")
    await first.aclose()
    await site.serve("driver2", "workflow")
    site.open("q-slow")
    site.open("q")
    assert await job.result(timeout=PATIENCE_S) == "q-slow"


async def test_what_an_earlier_making_of_a_call_came_to_does_not_end_a_later_one(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    driver = await site.serve("driver", "workflow")
    calls = driver.process.calls
    await driver.process.wait_for("gated", PATIENCE_S)

    def make() -> Future[Any]:
        context = CallContext(calls, call_id=b"p", job="j", session="s")
        context.history = History("j", b"p", in_order=True)
        return calls.call(context, "gated", "", ("x",), {}, DEFAULT_OPTIONS)

    def late_failure(epoch: int) -> None:
        error = encode_error(CallCancelledError("cancelled", started=True))
        calls.on_messages(tools.process.me, [Fail(second.id, *error, epoch=epoch)])

    first, second = make(), make()
    assert first.id == second.id
    with pytest.raises(OwnerLostError):
        await first
    late_failure(1)
    await site.ran("gated x")
    third = make()
    late_failure(2)
    site.open("x")
    async with asyncio.timeout(PATIENCE_S):
        assert await third == "x"
    assert site.count("gated x") == 1, "a call that runs is adopted by whoever makes it again"


async def test_what_was_cancelled_with_an_attempt_runs_in_the_next_one(site: Site) -> None:
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit("overloaded_once", "o")
    await site.ran("gated o")
    site.open("o-falls")
    await site.ran("gated o", 2)
    assert tools.running == 1
    site.open("o")
    assert await job.result(timeout=PATIENCE_S) == "o"


LOSSES_OF_A_CALL = 2


@pytest.fixture
def one_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of a job is sent again once after the loss of its worker, as each loss takes a lease to be seen."""
    monkeypatch.setattr("nalar_mq.calls.JOB_RETRIES", LOSSES_OF_A_CALL - 1)
    monkeypatch.setattr("nalar_mq.intake.JOB_RETRIES", LOSSES_OF_A_CALL - 1)


async def lose_alone(site: Site, name: str, begin: int = 0) -> None:
    """Kills whoever runs a call, as often as it takes for it to be lost for good; another worker stands ready."""
    for number in range(begin, begin + LOSSES_OF_A_CALL):
        await site.ran(f"alone {name}", number + 1)
        site.hub.kill(f"alone{number}")
        await site.serve(f"alone{number + 1}", "Alone")


async def test_a_call_that_is_lost_too_often_is_made_again_when_its_job_is_tried_again(site: Site, one_retry: None) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_one", "l")
    for letter in "ba":
        await site.ran(f"gated l-{letter}")
        site.open(f"l-{letter}")
        await site.journaled("ba".index(letter) + 1)
    await lose_alone(site, "l")
    await site.ran("alone l", LOSSES_OF_A_CALL + 1)
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == ["b", "a", "l"]
    ran = {line: site.count(line) for line in ("gated l-a", "gated l-b", "step 10", "step 1", "step 900", "step 901")}
    assert ran == {"gated l-a": 1, "gated l-b": 1, "step 10": 1, "step 1": 0, "step 900": 1, "step 901": 1}
    assert (site.count("loses_one l"), site.count("alone l")) == (2, LOSSES_OF_A_CALL + 1)
    [ended] = (await (await site.client.jobs()).overview()).ended
    assert ended.timings.attempts == 2


@pytest.mark.interpreted
async def test_what_is_void_is_said_by_the_next_attempt_if_it_was_not_durable(
    site: Site, one_retry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    void, unsaid = Witness.void, [1]

    def once_lost(self: Witness, history: History, losses: list[BaseException]) -> None:
        if unsaid:
            unsaid.pop()
        else:
            void(self, history, losses)

    monkeypatch.setattr(Witness, "void", once_lost)
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("needs_alone", "n")
    await lose_alone(site, "n")
    site.open("n")
    assert await job.result(timeout=PATIENCE_S) == "n"
    assert (site.count("needs_alone n"), site.count("alone n")) == (3, LOSSES_OF_A_CALL + 1)


async def test_who_goes_on_elsewhere_makes_a_lost_call_again_too(site: Site, one_retry: None) -> None:
    """What it came to is seen by a third attempt, although the journal has the loss of it first."""
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("outlives_later", "o")
    await lose_alone(site, "o")
    await site.ran("alone o", LOSSES_OF_A_CALL + 1)
    site.open("o")
    await site.ran("step 910")
    await site.journaled(2)
    await lose_driver(site)
    await site.ran("outlives_later o", 3)
    site.open("o-end")
    assert await job.result(timeout=PATIENCE_S) == "o"
    assert (site.count("alone o"), site.count("step 910")) == (LOSSES_OF_A_CALL + 1, 1)


async def test_an_agent_whose_call_is_lost_too_often_goes_on_where_it_was(site: Site, one_retry: None) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("clerks", "Clerk")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_below", "l")
    await lose_alone(site, "l")
    await site.ran("alone l", LOSSES_OF_A_CALL + 1)
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == 921
    assert (site.count("risk l"), site.count("step 920"), site.count("alone l")) == (2, 1, LOSSES_OF_A_CALL + 1)


async def test_what_an_agent_had_called_when_its_attempt_ended_has_not_failed_in_the_next_one(
    site: Site, one_retry: None
) -> None:
    """It was cancelled with the agent, whose program has seen nothing of that."""
    tools = await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("clerks", "Clerk")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_beside", "l")
    await site.ran("gated l")
    await lose_alone(site, "l")
    await site.ran("gated l", 2)
    assert tools.running == 1
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == ["l", "l"]
    assert (site.count("loses_beside l"), site.count("leans l"), site.count("gated l")) == (2, 2, 2)


async def test_what_an_agent_had_called_does_not_go_on_beside_its_next_attempt(site: Site, one_retry: None) -> None:
    """Its own loss would end one more attempt, too."""
    tools = [await site.serve(f"tools{number}", "tool") for number in range(2)]
    await site.serve("driver", "workflow")
    clerks = await site.serve("clerks0", "Clerk")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_two_below", "l")
    await site.ran("gated l")
    await clerks.process.membership.drain()  # it goes on, and takes nothing more
    await site.serve("clerks1", "Clerk")
    await lose_alone(site, "l")
    await site.ran("gated l", 2)
    await site.until(lambda: sum(worker.running for worker in tools) == 1)
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == ["l", "l"]


async def test_what_comes_after_an_attempt_has_ended_has_no_place_in_the_order_of_the_next_one(site: Site) -> None:
    """Its process lives and writes it when the next attempt has read what there was; a third one reads both."""
    tools = await site.serve("tools", "tool")
    drivers = [await site.serve(f"driver{number}", "workflow") for number in range(3)]
    histories: list[History] = []
    for driver in drivers:
        await driver.process.wait_for("gated", PATIENCE_S)

    async def make(driver: Worker) -> list[Future[Any]]:
        memory = await driver.process.recall.memory("j", ()) if histories else None
        histories.append(History("j", b"p", in_order=True, memory=memory))
        context = CallContext(driver.process.calls, call_id=b"p", job="j", session="s", history=histories[-1])
        return [driver.process.calls.call(context, "gated", "", (name,), {}, DEFAULT_OPTIONS) for name in ("x", "y")]

    def come(driver: Worker, future: Future[Any], name: str) -> None:
        driver.process.calls.on_messages(tools.process.me, [Resolve(future.id, encode(name))])

    first, second = await make(drivers[0]), await make(drivers[1])
    drivers[0].process.calls.abandon_children(b"p", "its maker has failed")
    come(drivers[0], first[0], "x")
    await site.journaled(1)
    for position in (1, 0):
        come(drivers[1], second[position], "xy"[position])
        await site.journaled(3 - position)
    async with asyncio.timeout(PATIENCE_S):
        assert [await future async for future in as_completed(await make(drivers[2]))] == ["y", "x"]


async def test_what_was_to_be_given_a_lost_value_is_made_again_with_it(site: Site, one_retry: None) -> None:
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_passed_on", "l")
    await lose_alone(site, "l")
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == "l"
    assert site.count("alone l") == LOSSES_OF_A_CALL + 2


async def test_the_losses_of_a_task_group_are_no_failure(site: Site, one_retry: None) -> None:
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_in_a_group", "l")
    for number in range(LOSSES_OF_A_CALL):
        await site.ran("alone l", 2 * number + 2)
        site.hub.kill(f"alone{number}")
        await site.serve(f"alone{number + 1}", "Alone")
    await site.ran("loses_in_a_group l", 2)
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == ["l", "l"]


async def test_calls_that_were_lost_together_are_made_again_together(site: Site, one_retry: None) -> None:
    """The program has met one of the losses; the others have cost no further workers, and count no more than that one."""
    site.intake = msgspec.structs.replace(QUICK, losses=2 * LOSSES_OF_A_CALL)
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("loses_several", "l")
    for number in range(LOSSES_OF_A_CALL + 1):
        for line in ("alone l", "stays l", "rests l"):
            await site.ran(line, number + 1)
        if number < LOSSES_OF_A_CALL:
            site.hub.kill(f"alone{number}")
            await site.serve(f"alone{number + 1}", "Alone")
    site.open("l")
    assert await job.result(timeout=PATIENCE_S) == ["l", "l", "l"]
    assert site.count("loses_several l") == 2


async def test_an_attempt_begins_when_what_the_former_one_observed_is_durable(
    site: Site, one_retry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of the former one lives, and the broker is slow to keep what it has written last."""
    driver = await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    journal, goes_on = driver.process.calls.journal, asyncio.Event()
    assert journal is not None
    append = journal._appender.append

    async def slow(data: bytes) -> bool:
        pack = decode_journal(data)
        if isinstance(pack, Pack) and any(isinstance(observation, Voided) for observation in pack.observations):
            await goes_on.wait()
        return await append(data)

    monkeypatch.setattr(journal._appender, "append", slow)
    job = await site.submit("needs_alone", "n")
    await lose_alone(site, "n")
    await site.until(lambda: site.deliveries() >= 2)
    await asyncio.sleep(0.5)  # enough for an attempt that waits for nothing to begin
    goes_on.set()
    await site.ran("alone n", LOSSES_OF_A_CALL + 1)
    site.open("n")
    assert await job.result(timeout=PATIENCE_S) == "n"
    assert site.count("needs_alone n") == 2


async def test_a_process_says_what_it_has_of_a_job_when_that_is_durable(site: Site) -> None:
    driver = await site.serve("driver", "workflow")
    journal, recall, told = driver.process.calls.journal, driver.process.recall, list[Message]()
    assert journal is not None
    other, begun, goes_on = Address("other", 1), asyncio.Event(), asyncio.Event()

    async def slow(data: bytes) -> bool:
        begun.set()
        return await goes_on.wait()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal._appender, "append", slow)
        patched.setattr(recall, "_tell", lambda to, message: told.append(message))
        journal.put(Outcome("j", b"p", Fail(b"c", "m:E", "text")))
        await begun.wait()
        recall.on_locate(other, Locate(1, ("j", "k"), ()))
        await asyncio.sleep(0.1)
        assert told == []
        goes_on.set()
        await site.until(lambda: told)
    assert told == [Located(1, (), ("j",))]


async def test_a_loss_that_the_program_has_met_is_met_again(site: Site, one_retry: None) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("outlives", "o")
    await lose_alone(site, "o")
    await site.ran("step 910")
    await site.journaled(2)
    await lose_driver(site)
    await site.ran("outlives o", 2)
    site.open("o")
    assert await job.result(timeout=PATIENCE_S) == "lost"
    assert (site.count("alone o"), site.count("step 910")) == (LOSSES_OF_A_CALL, 1)


async def test_a_job_with_a_call_that_kills_its_workers_is_given_up(site: Site, one_retry: None) -> None:
    """Every worker that it has cost speaks against it, as it gets no further."""
    site.intake = msgspec.structs.replace(QUICK, losses=2 * LOSSES_OF_A_CALL)
    await site.serve("driver", "workflow")
    await site.serve("alone0", "Alone")
    job = await site.submit("needs_alone", "n")
    for attempt in range(3):
        await lose_alone(site, "n", attempt * LOSSES_OF_A_CALL)
    with pytest.raises(RemoteError, match=r"was lost while it had Alone\.wait"):
        await job.result(timeout=PATIENCE_S)
    assert (site.count("needs_alone n"), site.count("alone n")) == (3, 3 * LOSSES_OF_A_CALL)
