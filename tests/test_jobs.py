"""Durable jobs and direct calls from any NATS client, over both transports; what needs a real broker says so."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import date
from math import nan
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy
import pytest
from waiting import until

from nalar_mq import errors
from nalar_mq.actor import function_spec
from nalar_mq.address import Subjects
from nalar_mq.app import App, load_app
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.directives import Directives
from nalar_mq.intake import IntakeOptions
from nalar_mq.interchange import read_arguments, write_value
from nalar_mq.job_commands import unserved
from nalar_mq.jobs import JobError, JobResult, Jobs, read_result
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.messages import WIRE_VERSION, Running
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Delivered, Kept, QueueMessage, Transport
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "jobs_app.py"
PATIENCE_S = 60.0
QUICK = IntakeOptions(ack_wait_s=1.5, look_again_s=0.2, unserved_s=0.5, no_workflow_s=0.1, back_off_s=0.05)


class Bench:
    """Workers on demand, and a client that is a program in another language: it knows subjects and bytes only."""

    foreign: Transport

    def __init__(self, app: App, settings: Settings, connect: Callable[[str], Awaitable[Transport]], hub: MemoryHub) -> None:
        self.app = app
        self.settings = settings
        self.connect = connect
        self.hub = hub
        self.subjects = Subjects(settings.namespace)
        self.stack = AsyncExitStack()
        self.actors: Any = importlib.import_module("jobs_app")

    async def worker(self, name: str, options: IntakeOptions = QUICK) -> Worker:
        worker = Worker(self.app, self.settings, name=name, intake=options, connect=self.connect, lease_in_thread=False)
        return await self.stack.enter_async_context(worker)

    async def client(self) -> Client:
        return await self.stack.enter_async_context(connect(settings=self.settings, connect=self.connect))

    async def jobs(self) -> Jobs:
        return await Jobs.open(self.foreign, self.subjects)

    async def publish(self, workflow: str, payload: bytes, **headers: str) -> int:
        """What `nats pub` does, with the broker's acknowledgement."""
        queue = await self.foreign.work_queue(self.subjects.jobs_queue, [self.subjects.job("*")])
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        message_id = given.pop("Nats-Msg-Id", "")
        sequence, _ = await queue.publish(self.subjects.job(workflow), payload, message_id=message_id, headers=given)
        return sequence

    async def result(self, id: str) -> JobResult:
        async with asyncio.timeout(PATIENCE_S):
            return await (await self.jobs()).wait(id)

    async def request(self, name: str, payload: bytes, **headers: str) -> tuple[bytes, dict[str, str]]:
        """What `nats req` does."""
        answered: asyncio.Future[Delivered] = asyncio.get_running_loop().create_future()
        inbox = f"_INBOX.{self.settings.namespace}.{len(payload)}.{id(answered)}"
        subscription = await self.foreign.subscribe(inbox, answered.set_result)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.foreign.publish(self.subjects.call(name), payload, reply=inbox, headers=given or None)
        async with asyncio.timeout(PATIENCE_S):
            message = await answered
        await subscription.unsubscribe()
        return message.data, dict(message.headers or {})

    async def emptied(self) -> None:
        """Returns when no job is in the queue."""
        queue = (await self.jobs()).queue
        async with asyncio.timeout(PATIENCE_S):
            while await queue.depth():
                await asyncio.sleep(0.02)


@pytest.fixture(params=["memory", "nats"])
async def bench(request: pytest.FixtureRequest, namespace: str, broker_access: BrokerAccess) -> AsyncIterator[Bench]:
    hub = MemoryHub(seed=1)

    async def over_nats(name: str) -> Transport:
        return await NatsTransport.connect(broker_access, name=name)

    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=2.0)
    made = Bench(load_app(APP), settings, hub.connect if request.param == "memory" else over_nats, hub)
    made.actors.GATES.clear()
    made.actors.RUNS.clear()
    async with made.stack:
        made.foreign = await made.connect("foreign")
        made.stack.push_async_callback(made.foreign.aclose)
        yield made


only_in_memory = pytest.mark.parametrize("bench", ["memory"], indirect=True)


# Jobs


@pytest.mark.parametrize(
    "payload",
    [
        b'{"question": "why?", "times": 2}',
        b'\xef\xbb\xbf ["why?", 2]',
        msgspec.msgpack.encode({"question": "why?", "times": 2}),
        msgspec.msgpack.encode(["why?", 2]),
    ],
    ids=["object", "array", "MessagePack map", "MessagePack array"],
)
async def test_a_published_job_has_a_result_that_anybody_can_read(bench: Bench, payload: bytes) -> None:
    await bench.worker("one")
    sequence = await bench.publish("answer", payload)
    result = await bench.result(f"job-{sequence}")
    assert (result.state, result.value) == ("done", {"answer": "WHY?WHY?", "score": 4})
    await bench.emptied()
    kept = await (await bench.foreign.ledger(bench.subjects.results_ledger, [])).last(bench.subjects.result(f"job-{sequence}"))
    assert kept is not None
    plain = json.loads(kept.data)
    assert plain["id"] == f"job-{sequence}"
    assert plain["workflow"] == "answer"
    assert "error" not in plain
    assert plain["timings"]["attempts"] == 1
    assert await (await bench.jobs()).overview() == await (await bench.jobs()).overview()


async def test_results_are_heard_live(bench: Bench) -> None:
    await bench.worker("one")
    heard: asyncio.Future[Delivered] = asyncio.get_running_loop().create_future()
    await bench.foreign.subscribe(bench.subjects.result("mine"), heard.set_result)
    await bench.publish("answer", b'["x"]', Nats_Msg_Id="mine")
    async with asyncio.timeout(PATIENCE_S):
        assert read_result((await heard).data).value == {"answer": "X", "score": 2}


async def test_a_job_that_waits_for_its_worker_is_done_when_one_comes(bench: Bench) -> None:
    jobs = await bench.jobs()
    await bench.publish("answer", b'["x"]', Nats_Msg_Id="early")
    assert (await jobs.status("early")).state == "queued"
    await bench.worker("one")
    assert (await bench.result("early")).value["answer"] == "X"


async def test_one_id_is_one_job(bench: Bench) -> None:
    await bench.worker("one")
    await bench.worker("two")
    for _ in range(5):
        await bench.publish("gated", b'["a-x"]', Nalar_Job_Id="same")
    await until(lambda: "gated a-x" in bench.actors.RUNS)
    bench.actors.GATES["a"].set()
    assert (await bench.result("same")).value == "a-x"
    await bench.publish("gated", b'["a-x"]', Nalar_Job_Id="same")
    await bench.emptied()
    assert bench.actors.RUNS == ["gated a-x"]


async def test_what_cannot_be_read_goes_to_the_dead_letters_with_its_cause(bench: Bench) -> None:
    await bench.worker("one")
    unreadable = [b"{not json", b"\xc7\x01\x05x", b"\x81\x01\x02", b"\xff", b"[1,2", b"\x91" * 5000, b'"\xff"']
    ids = [f"job-{await bench.publish('answer', payload)}" for payload in unreadable]
    ids.append(f"job-{await bench.publish('answer', b'[1, 2, 3, 4]')}")
    ids.append(f"job-{await bench.publish('answer', json.dumps({'quest': 1}).encode())}")
    ids.append(f"job-{await bench.publish('answer', json.dumps({'question': [1]}).encode())}")
    for id in ids:
        result = await bench.result(id)
        assert result.state == "failed"
        assert result.error and result.error.type in ("MalformedMessageError", "ArgumentError")
    bad = await bench.publish("answer", b"[]", Nalar_Job_Id="not a token!")
    await bench.emptied()
    letters = {letter.key: letter async for letter in (await bench.jobs()).dead_letters()}
    assert letters.keys() == {*ids, f"seq-{bad}"}
    assert "not allowed" in letters[f"seq-{bad}"].cause
    assert letters[ids[0]].data == unreadable[0]
    assert "missing a required argument" in letters[ids[-2]].cause or "unexpected" in letters[ids[-2]].cause
    assert bench.actors.RUNS == []


async def test_a_job_of_what_is_no_workflow_goes_to_the_dead_letters_at_once(bench: Bench) -> None:
    """And not after the time in which somebody may come who serves an unknown name."""
    patient = msgspec.structs.replace(QUICK, unserved_s=3600.0)
    await bench.worker("one", patient)
    await bench.publish("double", b"[1]", Nats_Msg_Id="plain")
    await bench.publish("double.of", b"[1]", Nats_Msg_Id="dotted")
    await bench.publish("nobody", b"[1]", Nats_Msg_Id="waits")
    for id in ("plain", "dotted"):
        result = await bench.result(id)
        assert result.error and result.error.type == "UnknownActorError"
        assert "'double' is no workflow but a tool" in result.error.message
    jobs = await bench.jobs()
    assert (await jobs.status("waits")).state == "queued"
    while await jobs.queue.depth() > 1:
        await asyncio.sleep(0.02)
    letters = {letter.key: letter.cause async for letter in jobs.dead_letters()}
    assert letters.keys() == {"plain", "dotted"}
    assert "no workflow but a tool" in letters["plain"]


async def test_jobs_of_what_has_become_a_workflow_are_not_turned_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another app begins to serve the name while jobs of it go to the dead letters."""
    for number in range(40):
        await bench.publish("double", b"[1]", Nats_Msg_Id=f"d{number}")
    other = App(APP, {"double": function_spec("workflow", "double", bench.actors.echo.spec.target, Directives())})
    worker = await bench.worker("one", msgspec.structs.replace(QUICK, no_workflow_s=3600.0))
    intake, rejected = worker._intake, list[str]()
    assert intake is not None
    reject = intake._reject

    async def then_served(message: QueueMessage, id: str, error: errors.NalarError) -> None:
        await reject(message, id, error)
        rejected.append(id)
        if len(rejected) == 1:
            made = Worker(other, bench.settings, name="two", intake=QUICK, connect=bench.connect, lease_in_thread=False)
            await bench.stack.enter_async_context(made)
            await until(lambda: "workflow" in worker.process.table.kinds("double"))

    monkeypatch.setattr(intake, "_reject", then_served)
    await intake._clear(bench.subjects.job("double"), intake._not_for_jobs)
    states = [(await bench.result(f"d{number}")).state for number in range(40)]
    assert (states.count("failed"), states.count("done"), len(rejected)) == (1, 39, 1)


async def test_a_double_that_is_no_workflow_does_not_end_the_job_that_runs(bench: Bench) -> None:
    await bench.worker("one")
    await bench.publish("gated", b'["x"]', Nats_Msg_Id="x")
    await until(lambda: "gated x" in bench.actors.RUNS)
    await bench.publish("double", b"[1]", Nalar_Job_Id="x")
    await bench.publish("double", b"[1]", Nats_Msg_Id="y")
    assert (await bench.result("y")).state == "failed"
    assert await (await bench.jobs()).ended("x") is None
    bench.actors.GATES["x"].set()
    assert (await bench.result("x")).state == "done"
    await bench.emptied()


async def test_a_failed_job_is_tried_as_often_as_its_workflow_says(bench: Bench) -> None:
    await bench.worker("one")
    await bench.worker("two")
    await bench.publish("flaky", b'["a", 2]', Nats_Msg_Id="a")
    await bench.publish("flaky", b'["b", 9]', Nats_Msg_Id="b")
    await bench.publish("broken", b'["c"]', Nats_Msg_Id="c")
    first, second, third = await bench.result("a"), await bench.result("b"), await bench.result("c")
    assert (first.state, first.value, first.timings.attempts) == ("done", 3, 3)
    assert second.error and (second.error.type, second.error.message) == ("ValueError", "attempt 3")
    assert third.error and third.error.type == "KeyError"
    await bench.emptied()
    assert sorted([letter.job async for letter in (await bench.jobs()).dead_letters()]) == ["b", "c"]
    assert sorted(bench.actors.RUNS) == ["flaky a"] * 3 + ["flaky b"] * 3


async def test_dead_letters_are_retried_and_dropped(bench: Bench) -> None:
    await bench.worker("one")
    jobs = await bench.jobs()
    await bench.publish("flaky", b'["a", 4]', Nats_Msg_Id="a")
    await bench.publish("broken", b'["c"]', Nats_Msg_Id="c")
    await bench.result("a")
    await bench.result("c")
    await bench.emptied()
    letter = await jobs.dead_letter("a")
    assert letter is not None
    assert await jobs.retry(letter)
    result = await bench.result("a")
    assert (result.state, result.value) == ("done", 5)
    former = await jobs.dead_letter("c")
    assert former is not None
    assert await jobs.retry(former)
    await bench.result("c")
    await bench.emptied()
    await jobs.drop(former)  # it has failed again since: that letter is another one
    other = await jobs.dead_letter("c")
    assert other is not None
    await jobs.drop(other)
    assert [letter async for letter in jobs.dead_letters()] == []
    assert (await jobs.status("c")).state == "failed"


async def failed_and_dropped(bench: Bench) -> Jobs:
    """Job `c` has failed, its dead letter was dropped, and nobody takes jobs any more."""
    worker = await bench.worker("one")
    jobs = await bench.jobs()
    await bench.publish("broken", b'["c"]', Nalar_Job_Id="c")
    await bench.result("c")
    await bench.emptied()
    letter = await jobs.dead_letter("c")
    assert letter is not None
    await jobs.drop(letter)
    await worker.aclose()
    return jobs


async def test_a_dead_letter_that_was_dropped_does_not_come_back_with_a_duplicate(bench: Bench) -> None:
    """That was in other hands before, which had no room for it."""
    jobs = await failed_and_dropped(bench)
    await bench.publish("broken", b'["c"]', Nalar_Job_Id="c")
    (message,) = await jobs.queue.pull(bench.subjects.job("broken"), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    await message.nak(0.0)
    await bench.worker("two")
    await bench.emptied()
    assert [letter async for letter in jobs.dead_letters()] == []


async def test_a_dead_letter_is_written_though_who_failed_died_before_it(bench: Bench) -> None:
    jobs = await bench.jobs()
    sequence = await bench.publish("broken", b'["c"]', Nalar_Job_Id="c")
    (message,) = await jobs.queue.pull(bench.subjects.job("broken"), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    await jobs.hold("c", Running(WIRE_VERSION, "dead", 1, sequence, "broken"), 0)
    await jobs.finish(JobResult("c", "broken", "failed", error=JobError("KeyError", "'c'")), failed=sequence)
    await message.nak(0.0)
    await bench.worker("one")
    await bench.emptied()
    assert [letter.job async for letter in jobs.dead_letters()] == ["c"]


async def failed_by_one_that_died(bench: Bench, workflow: str, payload: bytes, id: str) -> tuple[Jobs, QueueMessage]:
    """A job that has its result and its dead letter, and lies in the queue all the same: its message, in our hands."""
    jobs = await bench.jobs()
    sequence = await bench.publish(workflow, payload, Nalar_Job_Id=id)
    (message,) = await jobs.queue.pull(bench.subjects.job(workflow), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    await jobs.hold(id, Running(WIRE_VERSION, "dead", 1, sequence, workflow), 0)
    await jobs.finish(JobResult(id, workflow, "failed", error=JobError("KeyError", "it")), failed=sequence)
    await jobs.bury(message, id, KeyError("it"))
    return jobs, message


async def test_a_dead_letter_is_written_once_however_often_its_message_comes(bench: Bench) -> None:
    jobs, message = await failed_by_one_that_died(bench, "broken", b'["c"]', "c")
    letter = await jobs.dead_letter("c")
    await message.nak(0.0)
    await bench.worker("one")
    await bench.emptied()
    assert [other async for other in jobs.dead_letters()] == [letter]


async def test_a_dead_letter_that_was_dropped_is_not_written_anew_by_the_next_who_has_its_message(bench: Bench) -> None:
    jobs, message = await failed_by_one_that_died(bench, "broken", b'["c"]', "c")
    letter = await jobs.dead_letter("c")
    assert letter is not None
    await jobs.drop(letter)
    await message.nak(0.0)
    await bench.worker("one")
    await bench.emptied()
    assert [other async for other in jobs.dead_letters()] == []
    await jobs.bury(message, "c", KeyError("by one that had it in hand meanwhile"))
    assert [other async for other in jobs.dead_letters()] == []


async def test_a_dead_letter_that_is_tried_again_is_the_only_message_of_its_job(bench: Bench) -> None:
    jobs, message = await failed_by_one_that_died(bench, "answer", b'["x"]', "x")
    letter = await jobs.dead_letter("x")
    assert letter is not None
    assert await jobs.retry(letter)
    assert not await jobs.is_queued(message.sequence)
    await message.nak(0.0)
    await bench.worker("one")
    assert (await bench.result("x")).state == "done"
    await bench.emptied()
    assert bench.actors.RUNS.count("answer x") == 1
    assert [other async for other in jobs.dead_letters()] == []


async def test_who_tries_a_dead_letter_again_twice_has_it_run_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time the broker has taken it, but its answer is lost; by the second time the job is done."""
    jobs, _ = await failed_by_one_that_died(bench, "answer", b'["x"]', "x")
    letter = await jobs.dead_letter("x")
    assert letter is not None
    publish = jobs.queue.publish

    async def unanswered(*args: Any, **kwargs: Any) -> tuple[int, bool]:
        await publish(*args, **kwargs)
        raise errors.BrokerUnreachableError("nats://nowhere")

    with monkeypatch.context() as patched:
        patched.setattr(jobs.queue, "publish", unanswered)
        with pytest.raises(errors.BrokerUnreachableError):
            await jobs.retry(letter)
    await bench.worker("one")
    assert (await bench.result("x")).state == "done"
    await bench.emptied()
    assert await jobs.dead_letter("x") == letter
    assert not await jobs.retry(letter)
    await bench.emptied()
    assert (await bench.result("x")).state == "done"
    assert bench.actors.RUNS.count("answer x") == 1
    assert [other async for other in jobs.dead_letters()] == []


@pytest.mark.parametrize("begins", ["before it runs", "while it runs"])
@pytest.mark.parametrize("ends", ["done", "failed"])
async def test_a_failure_that_comes_late_does_not_end_what_was_published_again(bench: Bench, begins: str, ends: str) -> None:
    """Its process stood still before it wrote the result; others have run the job meanwhile, which has failed as well."""
    workflow, payload = ("gated", b'["x"]') if ends == "done" else ("gated_broken", b'["x"]')
    jobs, message = await failed_by_one_that_died(bench, workflow, payload, "x")
    letter = await jobs.dead_letter("x")
    assert letter is not None
    late = JobResult("x", workflow, "failed", error=JobError("KeyError", "late"))
    await jobs.retry(letter)
    if begins == "before it runs":
        assert await jobs.finish(late, failed=message.sequence)
    await bench.worker("one")
    await until(lambda: bench.actors.RUNS.count(f"{workflow} x") == 1)
    waits = asyncio.create_task(bench.result("x"))
    if begins == "while it runs":
        assert await jobs.finish(late, failed=message.sequence)
        assert await jobs.result("x") is None
        assert (await jobs.status("x")).state == "running"
        await asyncio.sleep(2 * QUICK.ack_wait_s)  # it looks now and then whether somebody has ended it
    bench.actors.GATES["x"].set()
    await bench.emptied()
    result = await bench.result("x")
    assert await waits == result
    assert (result.state, result.error.message if result.error else "") == (ends, "it broke" if ends == "failed" else "")
    assert [other.cause async for other in jobs.dead_letters()] == ([] if ends == "done" else ["ValueError: it broke"])


async def test_a_failure_that_comes_late_takes_nothing_from_what_was_published_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its large values nor what is in the journal."""
    monkeypatch.setattr("nalar_mq.journal._TRIM_EVERY_S", 0.05)
    jobs, message = await failed_by_one_that_died(bench, "gated_twice", b'["x"]', "x")
    letter = await jobs.dead_letter("x")
    assert letter is not None
    await jobs.retry(letter)
    process = (await bench.worker("one", msgspec.structs.replace(QUICK, ack_wait_s=60.0))).process
    await until(lambda: "gated_twice x" in bench.actors.RUNS)
    journal = process.calls.journal
    assert journal is not None
    await until(lambda: journal.has_of("x"))
    objects = await process.claims._open()
    await process.claims._of_jobs.put(name := "x.job." + "0" * 32, b"value")
    late = JobResult("x", "gated_twice", "failed", error=JobError("KeyError", "late"))
    assert await jobs.finish(late, failed=message.sequence)
    await asyncio.sleep(0.5)  # enough for both to be taken away
    assert await objects.get(name) == b"value"
    assert journal.has_of("x")
    bench.actors.GATES["x"].set()
    await jobs.forget_result("x", failed=message.sequence)  # as its holder does now and then
    assert (await bench.result("x")).state == "done"
    async with asyncio.timeout(PATIENCE_S):
        while await objects.get(name) is not None or journal.has_of("x"):
            await asyncio.sleep(0.02)


async def test_what_goes_on_can_be_cancelled_though_a_failure_has_come_late(bench: Bench) -> None:
    jobs, message = await failed_by_one_that_died(bench, "gated", b'["x"]', "x")
    letter = await jobs.dead_letter("x")
    assert letter is not None
    await jobs.retry(letter)
    worker = await bench.worker("one")
    await until(lambda: bench.actors.RUNS.count("gated x") == 1)
    assert await jobs.finish(JobResult("x", "gated", "failed", error=JobError("KeyError", "late")), failed=message.sequence)
    assert await jobs.cancel("x")
    assert (await bench.result("x")).state == "cancelled"
    await until(lambda: not worker.running)
    assert not await jobs.cancel("x")


async def test_who_fails_when_others_have_taken_its_job_over_ends_nothing(bench: Bench) -> None:
    """They may have ended it, and a person begun it anew."""
    jobs = await bench.jobs()
    sequence = await bench.publish("gated_broken", b'["x"]', Nalar_Job_Id="x")
    worker = await bench.worker("one")
    await until(lambda: bench.actors.RUNS.count("gated_broken x") == 1)
    held = await jobs.holder("x")
    assert held is not None
    await jobs.hold("x", Running(WIRE_VERSION, "other", 1, sequence, "gated_broken"), held[1])
    bench.actors.GATES["x"].set()
    intake = worker._intake
    await until(lambda: intake is not None and intake.in_hand == 0)
    assert await jobs.ended("x") is None
    assert (await bench.result("x")).state == "failed"  # by its next holder, as that other one is gone, too


async def test_a_result_that_comes_while_a_former_one_is_forgotten_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two try a dead letter again; for one of them the job is done while it looks."""
    jobs, _ = await failed_by_one_that_died(bench, "answer", b'["x"]', "x")
    letter, other = await jobs.dead_letter("x"), await bench.jobs()
    assert letter is not None
    last = other._results.last

    async def slow(subject: str) -> Kept | None:
        found = await last(subject)
        await jobs.retry(letter)
        await bench.worker("one")
        assert (await bench.result("x")).state == "done"
        return found

    with monkeypatch.context() as patched:
        patched.setattr(other._results, "last", slow)
        assert await other.retry(letter)
    await bench.emptied()
    assert (await bench.result("x")).state == "done"
    assert bench.actors.RUNS.count("answer x") == 1


async def test_a_message_that_is_published_again_while_it_is_in_hand_runs_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder has not looked yet how the job has ended when the result goes."""
    jobs, message = await failed_by_one_that_died(bench, "answer", b'["x"]', "x")
    intake, goes_on = (await bench.worker("one"))._intake, asyncio.Event()
    monkeypatch.setattr(intake, "_until_current", goes_on.wait)
    await message.nak(0.0)
    await until(lambda: intake is not None and intake.in_hand == 1)
    letter = await jobs.dead_letter("x")
    assert letter is not None
    await jobs.retry(letter)
    goes_on.set()
    assert (await bench.result("x")).state == "done"
    await bench.emptied()
    assert bench.actors.RUNS.count("answer x") == 1
    assert [other async for other in jobs.dead_letters()] == []


async def test_a_duplicate_of_a_failed_job_has_not_failed_though_who_had_it_died(bench: Bench) -> None:
    jobs = await failed_and_dropped(bench)
    sequence = await bench.publish("broken", b'["c"]', Nalar_Job_Id="c")
    (message,) = await jobs.queue.pull(bench.subjects.job("broken"), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    await jobs.hold("c", Running(WIRE_VERSION, "dead", 1, sequence, "broken"), 0)
    await message.nak(0.0)
    await bench.worker("two")
    await bench.emptied()
    assert [letter async for letter in jobs.dead_letters()] == []


async def test_what_nobody_serves_is_no_failure_of_a_job_that_is_done(bench: Bench) -> None:
    await bench.worker("one")
    await bench.publish("answer", b'["x"]', Nalar_Job_Id="x")
    await bench.result("x")
    await bench.publish("nobody", b'["x"]', Nalar_Job_Id="x")
    await bench.emptied()
    assert [letter async for letter in (await bench.jobs()).dead_letters()] == []
    assert (await bench.result("x")).state == "done"


@only_in_memory
async def test_what_a_worker_has_no_room_for_goes_back_though_it_takes_nothing_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a tenant and those of nobody are taken at once, and share their room."""
    slow, jobs = IntakeOptions(ack_wait_s=3600.0), await bench.jobs()
    for number in range(3):
        await bench.publish("gated", f'["a-{number}"]'.encode(), Nalar_Job_Id=f"n{number}")
        await jobs.submit("gated", f'["a-t{number}"]'.encode(), f"t{number}", "acme")
    (one,) = await jobs.queue.pull(bench.subjects.job("gated"), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    nak, returning, may_return = type(one).nak, 0, asyncio.Event()
    await nak(one, 0.0)

    async def slow_nak(self: Any, delay_s: float) -> None:
        nonlocal returning
        returning += 1
        await may_return.wait()
        await nak(self, delay_s)

    with monkeypatch.context() as patched:
        patched.setattr(type(one), "nak", slow_nak)
        worker = await bench.worker("one", slow)
        assert worker._intake is not None
        await until(lambda: returning > 0)
        stopping = asyncio.create_task(worker._intake.stop_taking())
        await asyncio.sleep(0.1)
        may_return.set()
        await stopping
    await bench.worker("two", slow)
    bench.actors.GATES["a"].set()
    for number in range(3):
        assert (await bench.result(f"n{number}")).state == (await bench.result(f"t{number}")).state == "done"
    assert len(bench.actors.RUNS) == 6


async def test_jobs_that_nobody_serves_are_swept_out(bench: Bench) -> None:
    await bench.worker("one")
    await bench.publish("nobody", b"{}", Nats_Msg_Id="a")
    result = await bench.result("a")
    assert result.error and "served are: answer" in result.error.message
    await bench.emptied()
    letter = await (await bench.jobs()).dead_letter("a")
    assert letter is not None
    assert letter.workflow == "nobody"


async def test_a_job_is_cancelled_whether_it_runs_or_waits(bench: Bench) -> None:
    worker = await bench.worker("one")
    client = await bench.client()
    running = [await client.submit("gated", name=f"a-{n}", job_id=f"r{n}") for n in range(3)]
    await until(lambda: len(bench.actors.RUNS) == 3)
    waiting = await client.submit("gated", "a-w", job_id="w")
    assert (await running[0].status()).state == "running"
    assert (await running[0].status()).worker == "one"
    assert (await waiting.status()).state == "queued"
    assert await waiting.cancel()
    assert await running[0].cancel()
    assert not await running[0].cancel()
    for handle in (waiting, running[0]):
        with pytest.raises(errors.CallCancelledError):
            await handle.result(timeout=PATIENCE_S)
    await until(lambda: worker.running == 2)
    bench.actors.GATES["a"].set()
    assert [await handle.result(timeout=PATIENCE_S) for handle in running[1:]] == ["a-1", "a-2"]
    await bench.emptied()
    assert "gated a-w" not in bench.actors.RUNS
    with pytest.raises(errors.UnknownJobError):
        await (await client.job("never")).cancel()


async def test_a_cancelled_job_that_nobody_has_in_hand_leaves_the_queue_at_once(bench: Bench) -> None:
    """Whether nobody has begun it, or it waits for another attempt."""
    await bench.worker("one", msgspec.structs.replace(QUICK, unserved_s=3600.0, back_off_s=3600.0))
    client, jobs = await bench.client(), await bench.jobs()
    await client.wait_for("flaky")
    for workflow, id in (("nobody", "n1"), ("nobody", "n2"), ("flaky", "f")):
        await client.submit(workflow, "x", 9, job_id=id)
    async with asyncio.timeout(PATIENCE_S):
        while (held := await jobs.holder("f")) is None or held[0].name or not held[0].failures:
            await asyncio.sleep(0.02)
    assert (await jobs.overview()).queued == {"nobody": 2, "flaky": 1}
    for id in ("n1", "f"):
        assert await (await client.job(id)).cancel()
    overview = await jobs.overview()
    assert (overview.queued, overview.running) == ({"nobody": 1}, [])
    assert sorted(result.id for result in overview.ended) == ["f", "n1"]
    assert (await jobs.status("n2")).state == "queued"


async def test_what_has_no_id_in_the_queue_keeps_nobody_from_seeing_the_others(bench: Bench) -> None:
    """Whoever may publish puts it there, and it lies there for as long as nobody looks after its workflow."""
    await bench.publish("nobody", b"[]", Nalar_Job_Id="no.id")
    await bench.publish("nobody", b"[]", Nats_Msg_Id="a")
    jobs = await bench.jobs()
    assert (await jobs.status("a")).state == "queued"
    assert await jobs.cancel("a")
    assert (await jobs.overview()).queued == {"nobody": 1}
    with pytest.raises(errors.UnknownJobError):
        await jobs.status("b")


async def test_a_worker_takes_only_what_it_has_room_for(bench: Bench) -> None:
    worker = await bench.worker("one")
    client = await bench.client()
    handles = [await client.submit("gated", f"a-{n}") for n in range(20)]
    await until(lambda: len(bench.actors.RUNS) == 3)
    overview = await (await bench.jobs()).overview()
    assert overview.queued == {"gated": 20}
    assert len(overview.running) == 3
    assert worker._intake is not None
    assert worker._intake.in_hand == 3
    bench.actors.GATES["a"].set()
    assert [await handle.result(timeout=PATIENCE_S) for handle in handles] == [f"a-{n}" for n in range(20)]
    assert len(bench.actors.RUNS) == 20


async def test_a_job_longer_than_every_wait_runs_once(bench: Bench) -> None:
    await bench.worker("one")
    await bench.worker("two")
    client = await bench.client()
    handle = await client.submit("gated", "a-x")
    await until(lambda: bench.actors.RUNS == ["gated a-x"])
    with pytest.raises(TimeoutError):
        await handle.result(timeout=3 * QUICK.ack_wait_s)
    assert bench.actors.RUNS == ["gated a-x"]
    bench.actors.GATES["a"].set()
    assert await handle.result(timeout=PATIENCE_S) == "a-x"


async def test_objects_arrive_as_the_annotations_say(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    handle = await client.submit("move", bench.actors.Point(1, 2), by=3)
    assert await handle.result(timeout=PATIENCE_S) == {"x": 4, "y": 2}
    with pytest.raises(errors.ArgumentError):
        await client.submit("move", 1, point=3)
    with pytest.raises(errors.AddressError):
        await client.submit("move", 1, by=2, job_id="no token")


async def test_a_job_that_was_submitted_elsewhere(bench: Bench) -> None:
    """Its handle can be used as it is, and awaited."""
    await bench.worker("one")
    client = await bench.client()
    job = client.job("a")
    with pytest.raises(errors.UnknownJobError):
        await job.status()
    await bench.publish("gated", b'["a-x"]', Nats_Msg_Id="a")
    with pytest.raises(errors.CallTimeoutError, match=r"job 'a' had no result after 0\.05 s; it goes on"):
        await job.result(timeout=0.05)
    bench.actors.GATES["a"].set()
    assert await client.job("a").result(timeout=PATIENCE_S) == "a-x"
    assert await job is job
    with pytest.raises(errors.AddressError, match="job id is a text"):
        client.job(7)  # type: ignore[arg-type]


class Title(str):
    """A text that is more than one."""


async def test_what_json_can_say_arrives_as_the_annotations_say(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    await client.wait_for("kinds")
    handle = await client.submit("kinds", Title("x"), tags={"y"}, data=b"z", when=date(2030, 1, 2))
    assert await handle.result(timeout=PATIENCE_S) == ["'x'", "{'y'}", "b'z'", "datetime.date(2030, 1, 2)"]
    handle = await client.submit("move", bench.actors.Point(1, 2), by=numpy.int64(3))
    assert await handle.result(timeout=PATIENCE_S) == {"x": 4, "y": 2}
    handle = await client.submit("echo", (1, {2}, PurePosixPath("a"), bench.actors.Point(3, 4)))
    assert await handle.result(timeout=PATIENCE_S) == [1, [2], "a", {"x": 3, "y": 4}]


@only_in_memory
@pytest.mark.parametrize(
    ("name", "value", "refused", "why"),
    [
        ("kinds", object(), errors.ArgumentError, "argument 'text' of kinds must be str, not object"),
        ("kinds", b"x", errors.ArgumentError, "must be str, not bytes b'x'"),
        ("kinds", date(2030, 1, 2), errors.ArgumentError, "must be str, not date"),
        ("kinds", ["x"], errors.ArgumentError, "must be str, not list"),
        ("echo", object(), errors.ValueNotEncodableError, "argument 'value' of echo .* class object has no form in JSON"),
        ("echo", [{"a": ValueError("x")}], errors.ValueNotEncodableError, "class ValueError has no form in JSON"),
        ("echo", [nan], errors.ValueNotEncodableError, "the number nan has no form in JSON"),
        ("echo", {1: 2}, errors.ValueNotEncodableError, "the key 1 of a dict would become a text"),
        ("echo", b"x", errors.ValueNotEncodableError, "annotated `bytes`"),
        ("nobody", object(), errors.ValueNotEncodableError, "argument '0' of nobody"),
    ],
)
async def test_an_argument_that_would_arrive_as_something_else_is_refused(
    bench: Bench, name: str, value: object, refused: type[errors.CallError], why: str
) -> None:
    await bench.worker("one")
    client = await bench.client()
    await client.wait_for("kinds")
    with pytest.raises(refused, match=why) as error:
        await client.submit(name, value)
    assert error.value.actor == name
    assert await (await bench.jobs()).queue.depth() == 0


async def test_failures_reach_the_client_by_type(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    with pytest.raises(errors.RemoteError, match="KeyError") as raised:
        await (await client.submit("broken", "x")).result(timeout=PATIENCE_S)
    assert raised.value.type_name == "KeyError"
    with pytest.raises(errors.RemoteError, match="ArgumentError"):
        await (await client.submit("inner_mistake")).result(timeout=PATIENCE_S)
    with pytest.raises(errors.RemoteError, match="CallTimeoutError"):
        await (await client.submit("late")).result(timeout=PATIENCE_S)


async def test_a_stopped_worker_gives_its_jobs_back(bench: Bench) -> None:
    first = await bench.worker("one")
    client = await bench.client()
    handles = [await client.submit("gated", f"a-{n}") for n in range(3)]
    await until(lambda: len(bench.actors.RUNS) == 3)
    await first.aclose()
    await bench.worker("two")
    await until(lambda: len(bench.actors.RUNS) == 6)
    bench.actors.GATES["a"].set()
    assert [await handle.result(timeout=PATIENCE_S) for handle in handles] == ["a-0", "a-1", "a-2"]


async def test_a_draining_worker_finishes_its_jobs(bench: Bench) -> None:
    first = await bench.worker("one")
    client = await bench.client()
    handle = await client.submit("gated", "a-0")
    await until(lambda: len(bench.actors.RUNS) == 1)
    drained = asyncio.create_task(first.drain(PATIENCE_S))
    later = await client.submit("answer", "x")
    bench.actors.GATES["a"].set()
    assert await drained
    assert await handle.result(timeout=PATIENCE_S) == "a-0"
    assert (await later.status()).state == "queued"


@pytest.mark.timeout(300)
async def test_a_job_bears_the_tenant_that_its_subject_names(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    await client.wait_for("on_behalf")
    acme = await client.options(tenant="acme").submit("on_behalf")
    nobodys = await client.submit("on_behalf")
    assert await acme.result(timeout=PATIENCE_S) == ["acme", "acme"]
    assert await nobodys.result(timeout=PATIENCE_S) == ["", ""]
    tenant = await bench.stack.enter_async_context(connect(settings=bench.settings, connect=bench.connect, tenant="beta"))
    await tenant.wait_for("on_behalf")
    assert await (await tenant.submit("on_behalf")).result(timeout=PATIENCE_S) == ["beta", "beta"]
    assert await (await tenant.options(tenant="").submit("on_behalf")).result(timeout=PATIENCE_S) == ["", ""]
    with pytest.raises(errors.AddressError):
        client.options(tenant="a.b")
    await bench.emptied()


@pytest.mark.parametrize(
    ("workflow", "headers"),
    [("on_behalf", {"Nalar_Tenant": "acme"}), ("on_behalf.acme", {}), ("on_behalf.acme", {"Nalar_Tenant": "beta"})],
)
async def test_a_job_whose_subject_and_header_differ_runs_for_nobody(
    bench: Bench, workflow: str, headers: dict[str, str]
) -> None:
    """A header can be written by everybody, and what the broker is made to publish by itself has none."""
    await bench.worker("one")
    jobs = await bench.jobs()
    await bench.publish(workflow, b"[]", Nats_Msg_Id="wrong", **headers)
    result = await bench.result("wrong")
    assert result.state == "failed" and result.error and result.error.type == "MalformedMessageError"
    await bench.emptied()
    assert not bench.actors.RUNS
    (letter,) = [letter async for letter in jobs.dead_letters()]
    await jobs.retry(letter)
    assert (await bench.result("wrong")).value == ["", ""], "what is tried again has no tenant that nobody has vouched for"


async def test_a_dead_letter_that_is_tried_again_keeps_its_tenant(bench: Bench) -> None:
    jobs = await bench.jobs()
    await jobs.submit("on_behalf", b'["too", "many"]', "dead", "acme")
    await bench.worker("one")
    assert (await bench.result("dead")).state == "failed"
    await bench.emptied()
    (letter,) = [letter async for letter in jobs.dead_letters()]
    await jobs.retry(msgspec.structs.replace(letter, data=b"[]"))
    assert (await bench.result("dead")).value == ["acme", "acme"]


async def test_jobs_of_tenants_that_nobody_serves_go_to_the_dead_letters(bench: Bench) -> None:
    jobs = await bench.jobs()
    for tenant in ("acme", "beta", ""):
        await jobs.submit("unknown", b"[]", f"of-{tenant}", tenant)
    assert (await jobs.overview()).queued == {"unknown": 3}
    assert (await jobs.status("of-acme")).workflow == "unknown"
    await bench.worker("one")
    for tenant in ("acme", "beta", ""):
        assert (await bench.result(f"of-{tenant}")).state == "failed"
    await bench.emptied()


async def test_those_with_and_without_a_tenant_share_the_room_there_is(bench: Bench) -> None:
    client = await bench.client()
    jobs = [
        await client.options(tenant=tenant).submit("gated", f"room-{number}-{tenant}")
        for number in range(8)
        for tenant in ("acme", "beta", "")
    ]
    worker = await bench.worker("one")
    intake = worker._intake
    assert intake is not None
    most = 0
    await until(lambda: intake.in_hand >= 3)
    for _ in range(20):
        most = max(most, intake.in_hand)
        await asyncio.sleep(0.02)
    bench.actors.GATES["room"].set()
    for job in jobs:
        await job.result(timeout=PATIENCE_S)
        most = max(most, intake.in_hand)
    assert most == 3


async def test_very_many_jobs_at_once_are_taken_in_as_there_is_room(bench: Bench) -> None:
    count = 300 if bench.foreign.url.startswith("memory") else 1200
    worker = await bench.worker("one")
    jobs = await bench.jobs()

    async def submit(n: int) -> None:
        await jobs.patiently(lambda: jobs.submit("three_calls", b"[%d]" % n, f"j{n}"))

    await asyncio.gather(*map(submit, range(count)))
    most = 0
    left = count
    while left:
        async with asyncio.timeout(PATIENCE_S):
            while (depth := await jobs.queue.depth()) >= left:
                assert worker._intake is not None
                most = max(most, worker._intake.in_hand)
                await asyncio.sleep(0.01)  # who asks without a pause leaves nothing for those who work
        left = depth
    assert 0 < most <= QUICK.at_once
    values = [await jobs.result(f"j{n}") for n in range(0, count, 37)]
    assert [result.value if result else None for result in values] == [8 * n for n in range(0, count, 37)]


@only_in_memory
async def test_a_job_survives_the_loss_of_its_worker(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    handle = await client.submit("gated", "a-0")
    await until(lambda: len(bench.actors.RUNS) == 1)
    bench.hub.kill("one")
    await bench.worker("two")
    await until(lambda: len(bench.actors.RUNS) == 2)
    bench.actors.GATES["a"].set()
    assert await handle.result(timeout=PATIENCE_S) == "a-0"
    assert (await (await bench.jobs()).result(handle.id) or JobResult("", "", "failed")).timings.attempts == 2


async def test_a_job_that_takes_its_workers_down_is_given_up(bench: Bench) -> None:
    jobs = await bench.jobs()
    sequence = await bench.publish("answer", b'["x"]', Nats_Msg_Id="killer")
    lost = Running(WIRE_VERSION, "gone", 1, sequence, "answer", losses=QUICK.losses)
    await jobs.hold("killer", lost, 0)
    await bench.worker("one")
    result = await bench.result("killer")
    assert result.error and result.error.type == "WorkerLostError"
    assert bench.actors.RUNS == []


async def test_a_record_of_a_message_that_is_gone_holds_nobody_back(bench: Bench) -> None:
    jobs = await bench.jobs()
    await bench.publish("answer", b'["x"]', Nats_Msg_Id="again")
    await jobs.hold("again", Running(WIRE_VERSION, "one", 1, 999_999, "answer", failures=5), 0)
    await bench.worker("one")
    assert (await bench.result("again")).state == "done"


async def test_a_record_that_a_dead_process_left_of_an_ended_job_goes(bench: Bench) -> None:
    jobs = await bench.jobs()
    await bench.worker("one")
    handle = await (await bench.client()).submit("answer", "x", job_id="ended")
    await handle.result(timeout=PATIENCE_S)
    await bench.emptied()
    await jobs.hold("ended", Running(WIRE_VERSION, "dead", 1, 1, "answer"), 0)
    await jobs.hold("goes-on", Running(WIRE_VERSION, "dead", 1, 1, "answer"), 0)
    async with asyncio.timeout(PATIENCE_S):
        while await jobs.holder("ended") is not None:
            await asyncio.sleep(0.02)
    assert await jobs.holder("goes-on") is not None


async def test_the_record_of_a_job_that_was_tried_again_stays_though_a_failure_has_come_late(bench: Bench) -> None:
    jobs = await bench.jobs()
    first = await bench.publish("nobody", b"[]", Nalar_Job_Id="ended")
    again = await bench.publish("gated", b'["x"]', Nalar_Job_Id="x", Nalar_Sequence=str(first))
    await jobs.queue.pull(bench.subjects.job("gated"), batch=1, timeout_s=5.0, ack_wait_s=60.0)
    await jobs.queue.remove(first)
    for id, sequence in (("x", again), ("ended", first)):
        await jobs.hold(id, Running(WIRE_VERSION, "dead", 1, sequence, "gated", failures=1), 0)
        await jobs.finish(JobResult(id, "gated", "failed", error=JobError("KeyError", "late")), failed=first)
    await bench.worker("one")
    async with asyncio.timeout(PATIENCE_S):
        while await jobs.holder("ended") is not None:
            await asyncio.sleep(0.02)
    assert await jobs.holder("x") is not None


async def test_a_result_is_seen_as_soon_as_it_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker tells listeners of a result before it has stored it: looking just then finds nothing."""
    monkeypatch.setattr("nalar_mq.jobs._LOOK_AGAIN_S", 100 * PATIENCE_S)
    await bench.worker("one")
    client = await bench.client()
    handles = await asyncio.gather(*(client.submit("three_calls", number) for number in range(60)))
    results = await asyncio.gather(*(handle.result(timeout=PATIENCE_S) for handle in handles))
    assert results == [8 * number for number in range(60)]


async def test_garbage_in_the_place_of_a_result_ends_nothing(bench: Bench) -> None:
    ledger = await bench.foreign.ledger(bench.subjects.results_ledger, [bench.subjects.result("*")])
    await bench.worker("one")
    await bench.publish("gated", b'["a-x"]', Nats_Msg_Id="mine")
    await until(lambda: bench.actors.RUNS == ["gated a-x"])
    for id in ("mine", "later"):
        await ledger.append(bench.subjects.result(id), b"{garbage")
    await bench.publish("answer", b'["y"]', Nats_Msg_Id="later")
    async with asyncio.timeout(PATIENCE_S):  # a heartbeat takes it away
        while (await ledger.last(bench.subjects.result("mine"))) is not None:
            await asyncio.sleep(0.02)
    bench.actors.GATES["a"].set()
    assert (await bench.result("mine")).value == "a-x"
    await bench.emptied()
    assert (await bench.result("later")).state == "done"


async def test_garbage_under_the_id_of_a_running_job_does_not_end_it(bench: Bench) -> None:
    await bench.worker("one")
    await bench.publish("gated", b'["a-x"]', Nalar_Job_Id="mine")
    await until(lambda: bench.actors.RUNS == ["gated a-x"])
    await bench.publish("gated", b"{garbage", Nalar_Job_Id="mine")
    queue = (await bench.jobs()).queue
    assert await queue.depth() == 2
    bench.actors.GATES["a"].set()
    assert (await bench.result("mine")).value == "a-x"
    await bench.emptied()
    assert [letter async for letter in (await bench.jobs()).dead_letters()] == []


async def test_ids_of_the_queue_cannot_be_given_by_hand(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    with pytest.raises(errors.AddressError, match="job-<number>"):
        await client.submit("answer", "x", job_id="job-5")
    await bench.publish("answer", b'["taken"]', Nats_Msg_Id="job-5")
    await bench.emptied()
    [letter] = [letter async for letter in (await bench.jobs()).dead_letters()]
    assert "job-<number>" in letter.cause
    assert bench.actors.RUNS == []


async def test_jobs_leave_nothing_but_their_results_behind(bench: Bench) -> None:
    await bench.worker("one")
    client = await bench.client()
    handles = [await client.submit("answer", "x") for _ in range(5)]
    await asyncio.gather(*(handle.result(timeout=PATIENCE_S) for handle in handles))
    await bench.emptied()
    ledger = await bench.foreign.ledger(bench.subjects.running_ledger, [])
    assert await ledger.read(bench.subjects.running("*")) == []
    assert len((await (await client.jobs()).overview()).ended) == 5


async def test_an_error_that_is_no_plain_text_is_told_all_the_same(bench: Bench) -> None:
    await bench.worker("one")
    for text in ("\ud800", "x" * 2_000_000):
        sequence = await bench.publish("unspeakable", json.dumps([len(text)]).encode())
        result = await bench.result(f"job-{sequence}")
        assert result.error and result.error.type == "ValueError"
        assert len(result.error.message) <= 20_000


# Direct calls


async def test_a_call_from_any_client_is_answered_in_its_own_form(bench: Bench) -> None:
    await bench.worker("one")
    data, headers = await bench.request("answer", b'{"question": "why?"}')
    assert (json.loads(data), headers) == ({"answer": "WHY?", "score": 2}, {})
    data, _ = await bench.request("double", msgspec.msgpack.encode([4]))
    assert msgspec.msgpack.decode(data) == 8
    data, _ = await bench.request("echo", b"[null]", Nalar_Session="s", Nalar_Timeout_S="5", Nalar_Priority="2")
    assert data == b"null"
    assert bench.actors.RUNS.count("double 4") == 1


@pytest.mark.parametrize(
    ("name", "payload", "headers", "code"),
    [
        ("answer", b"{", {}, 400),
        ("answer", b'{"q": 1}', {}, 400),
        ("answer", b'{"question": 1}', {}, 400),
        ("answer", b'["x"]', {"Nalar_Timeout_S": "soon"}, 400),
        ("answer", b'["x"]', {"Nalar_Timeout_S": "nan"}, 400),
        ("answer", b'["x"]', {"Nalar_Timeout_S": "inf"}, 400),
        ("answer", b'["x"]', {"Nalar_Priority": "99999999999999999999"}, 400),
        ("answer", b'["x"]', {"Nalar_Session": "a b"}, 400),
        ("nobody", b"", {}, 404),
        ("answer.method", b"", {}, 404),
        ("late", b"", {}, 408),
        ("large", b"[2000000]", {}, 413),
        ("broken", b'["x"]', {}, 500),
        ("inner_mistake", b"", {}, 500),
    ],
)
async def test_a_failed_call_is_answered_with_its_code(
    bench: Bench, name: str, payload: bytes, headers: dict[str, str], code: int
) -> None:
    await bench.worker("one")
    data, answered = await bench.request(name, payload, **headers)
    assert (data, answered["Nats-Service-Error-Code"]) == (b"", str(code))
    assert answered["Nats-Service-Error"]


async def test_the_service_shows_what_can_be_called(bench: Bench) -> None:
    await bench.worker("one")
    namespace = bench.settings.namespace
    answer = await bench.foreign.request(f"$SRV.INFO.{namespace}", b"", timeout_s=PATIENCE_S)
    endpoints = {endpoint["name"]: endpoint for endpoint in json.loads(answer.data)["endpoints"]}
    assert endpoints["answer"]["subject"] == f"{namespace}.call.answer"
    assert endpoints["answer"]["metadata"]["signature"].startswith("(question: ")
    assert "double" in endpoints


# Arguments and values of other programs


@pytest.mark.parametrize("data", [b"", b"  ", b"[]", b"{}", b"\x90", b"\x80"])
def test_no_arguments_are_no_arguments(data: bytes) -> None:
    arguments = read_arguments(data)
    assert (arguments.args, arguments.kwargs) == ([], {})


@pytest.mark.parametrize("value", ["text", 1.5, None, True, -1, ["a"], {"a": [1, {"b": None}]}])
def test_a_value_comes_back_from_both_forms(value: Any) -> None:
    for is_json in (True, False):
        written = write_value([value], is_json=is_json)
        arguments = read_arguments(written)
        assert (arguments.args, arguments.is_json) == ([value], is_json)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "^not JSON: "),
        (b"nul", "^not JSON: "),
        (b"\xff\xfe not json", "^neither JSON nor MessagePack: "),
        (b"\xc1", "^neither JSON nor MessagePack: "),
        (b"\x81", "^neither JSON nor MessagePack: "),
        (b"\xd9\x02\xff\xff", "^neither JSON nor MessagePack: "),
        (b"\x81\x01\x01", "names that are texts"),
        (b"\xc7\x01\x07a", "extension 7 is not understood"),
    ],
)
def test_what_is_neither_form_is_malformed(data: bytes, why: str) -> None:
    with pytest.raises(errors.MalformedMessageError, match=why):
        read_arguments(data)


async def test_a_job_whose_worker_is_gone_is_said_to_wait(bench: Bench) -> None:
    client = await bench.client()
    jobs = await client.jobs()
    await jobs.hold("j1", Running(WIRE_VERSION, "dead", 5, 1, "gated"), 0)
    [job] = (await jobs.overview()).running
    assert (job.id, job.state, job.worker) == ("j1", "queued", "")
    status = await (await client.job("j1")).status()
    assert (status.state, status.worker) == ("queued", "")
    worker = await bench.worker("one")
    handle = await client.submit("gated", "a-0")
    await until(lambda: bool(bench.actors.RUNS))
    assert (await handle.status()).worker == worker.name
    bench.actors.GATES["a"].set()
    await handle.result(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ([], {}, "missing a required argument: 'question'"),
        ([], {"quest": "x"}, "missing a required argument"),
        (["x"], {"quest": "x"}, "unexpected keyword argument 'quest'"),
        (["x", "y", "z"], {}, "too many positional arguments"),
    ],
)
async def test_a_job_that_would_fail_is_refused_where_its_workflow_is_known(
    bench: Bench, args: list[str], kwargs: dict[str, str], why: str
) -> None:
    client = await bench.client()
    await client.submit("answer", *args, job_id="blind", **({} if args else kwargs))
    await bench.worker("one")
    await client.wait_for("answer")
    with pytest.raises(errors.ArgumentError, match=why) as refused:
        await client.submit("answer", *args, **kwargs)
    assert refused.value.actor == "answer"
    with pytest.raises(errors.UnknownActorError, match="'double' is no workflow but a tool"):
        await client.submit("double", 1)


async def test_who_submits_what_nobody_serves_is_told(bench: Bench) -> None:
    client = await bench.client()
    assert "no workflows" in unserved(client, "nobody")
    await bench.worker("one")
    await client.wait_for("answer")
    said = unserved(client, "nobody")
    assert "nobody serves 'nobody' now" in said and "answer" in said and "double" not in said
    assert (await (await client.submit("nobody", 1)).status()).state == "queued"
