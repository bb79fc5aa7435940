"""Questions to people: kept in the broker, answered once, asked once, whatever is lost meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

import nalar_mq
from nalar_mq.agents import human
from nalar_mq.client import connect
from nalar_mq.errors import (
    AnswerError,
    CallTimeoutError,
    NotConnectedError,
    QuestionClosedError,
    RemoteError,
    UnknownQuestionError,
)
from nalar_mq.json_schema import problem_of, schema_of
from nalar_mq.questions import Question
from tests.test_resumption import PATIENCE_S, Site, lose_driver, site_of

APP = Path(__file__).parent / "apps" / "people_app.py"
WORKFLOWS = pytest.mark.parametrize("workflow", ["asks", "asks_in_thread"])


@pytest.fixture
async def site(namespace: str) -> AsyncIterator[Site]:
    async with site_of(APP, "people_app", namespace) as made:
        yield made


async def questions(site: Site, count: int = 1) -> list[Question]:
    """So many questions, as soon as they are asked."""
    async with asyncio.timeout(PATIENCE_S):
        while len(found := await site.client.questions()) != count:
            await asyncio.sleep(0.01)
    return found


@WORKFLOWS
async def test_a_question_is_answered_from_outside(site: Site, workflow: str) -> None:
    await site.serve("all", "workflow", "tool")
    job = await site.submit(workflow, "it")
    [question] = await questions(site)
    assert (question.text, question.asker, question.job) == ("Is it good?", workflow, job.id)
    assert question.schema_ == msgspec.json.schema(site.actors.Verdict)
    await site.client.answer(question.id, site.actors.Verdict(True, "yes"))
    assert await job.result(timeout=PATIENCE_S) == "True yes"
    await questions(site, 0)


@WORKFLOWS
async def test_it_outlives_who_asked_and_is_asked_once(site: Site, workflow: str) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    job = await site.submit(workflow, "it")
    [first] = await questions(site)
    await lose_driver(site)
    await site.ran("asks it", 2)
    assert await questions(site) == [first]
    await site.client.answer(first.id, {"good": False, "reason": "no"})
    assert await job.result(timeout=PATIENCE_S) == "False no"
    assert site.count("step 1") == 1


async def test_an_answer_that_comes_while_nobody_is_there_counts(site: Site) -> None:
    await site.serve("driver", "workflow", "tool")
    job = await site.submit("asks", "it")
    [question] = await questions(site)
    site.hub.kill("driver")
    await site.client.answer(question.id, {"good": True})
    await site.serve("driver2", "workflow", "tool")
    assert await job.result(timeout=PATIENCE_S) == "True "


@pytest.mark.parametrize("by_tool", [False, True])
async def test_a_question_stays_as_it_is_when_its_job_is_tried_again(site: Site, by_tool: bool) -> None:
    """It can be answered meanwhile, and its deadline does not begin anew."""
    site.intake = msgspec.structs.replace(site.intake, back_off_s=2.0)
    await site.serve("driver", "workflow", "tool")
    job = await site.submit("asks_and_fails", "it", by_tool)
    [first] = await questions(site)
    site.actors.GATES["it"].set()
    jobs = await site.client.jobs()

    async def waits_for_another_attempt() -> bool:
        held = await jobs.holder(job.id)
        return held is not None and held[0].failures == 1

    await until(waits_for_another_attempt)
    assert await questions(site) == [first]
    assert site.count("asks it") == 1
    await site.client.answer(first.id, "blue")
    assert await job.result(timeout=PATIENCE_S) == "blue"
    assert site.count("asks it") == 2
    await questions(site, 0)


async def test_answers_are_seen_again_in_their_order(site: Site) -> None:
    await site.serve("driver", "workflow")
    job = await site.submit("asks_two", "q")
    found = {question.text: question.id for question in await questions(site, 2)}
    await site.client.answer(found["q second?"], "b")
    await questions(site, 1)
    await site.journaled(1)
    await lose_driver(site)
    await site.ran("asks q", 2)
    await site.client.answer(found["q first?"], "a")
    assert await job.result(timeout=PATIENCE_S) == ["b", "a"]


@WORKFLOWS
async def test_who_waits_for_people_leaves_room_for_others(site: Site, workflow: str) -> None:
    """Two jobs of a workflow that runs one at a time, and both have asked."""
    await site.serve("driver", "workflow", "tool")
    jobs = [await site.submit(workflow, name) for name in ("one", "two")]
    for question in await questions(site, 2):
        await site.client.answer(question.id, {"good": True, "reason": question.text})
    async with asyncio.timeout(PATIENCE_S):
        assert [await job.result() for job in jobs] == ["True Is one good?", "True Is two good?"]


async def test_people_as_a_tool(site: Site) -> None:
    await site.serve("tools", "tool")
    await site.serve("driver", "workflow")
    jobs = [await site.submit("asks_by_tool", name) for name in ("one", "two")]
    found = await questions(site, 2)
    with pytest.raises(AnswerError, match='one of "red", "blue"'):
        await site.client.answer(found[0].id, "green")
    await lose_driver(site)
    for question in found:
        await site.client.answer(question.id, "blue")
    async with asyncio.timeout(PATIENCE_S):
        assert [await job.result() for job in jobs] == ["blue", "blue"]


async def test_the_first_answer_wins_and_the_others_are_told(site: Site) -> None:
    await site.serve("all", "workflow", "tool")
    job = await site.submit("asks", "it")
    [question] = await questions(site)
    answers = [site.client.answer(question.id, {"good": True, "reason": str(n)}) for n in range(5)]
    outcomes = await asyncio.gather(*answers, return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 1
    assert all(outcome is None or isinstance(outcome, QuestionClosedError) for outcome in outcomes)
    assert await job.result(timeout=PATIENCE_S) == f"True {outcomes.index(None)}"
    with pytest.raises(QuestionClosedError, match="answered before"):
        await site.client.answer(question.id, {"good": False})


@pytest.mark.parametrize(
    ("value", "says"),
    [(3, "object is wanted at"), ({}, "'good' is missing"), ({"good": "x"}, r'boolean is wanted at \$.good, not "x"')],
)
async def test_an_answer_that_does_not_fit_is_refused(site: Site, value: object, says: str) -> None:
    await site.serve("all", "workflow", "tool")
    await site.submit("asks", "it")
    [question] = await questions(site)
    with pytest.raises(AnswerError, match=says):
        await site.client.answer(question.id, value)
    assert await questions(site) == [question]


async def test_what_nobody_asks_cannot_be_answered(site: Site) -> None:
    for id in ("0" * 32, "no token"):
        with pytest.raises(UnknownQuestionError):
            await site.client.answer(id, 1)


async def test_at_its_deadline_the_default_is_the_answer(site: Site) -> None:
    await site.serve("all", "workflow")
    assert await (await site.submit("asks_for_a_while", "it", 0.05, "so be it")).result(timeout=PATIENCE_S) == "so be it"
    with pytest.raises(RemoteError, match=r"nobody has answered 'What about it\?' in time") as caught:
        await (await site.submit("asks_for_a_while", "it", 0.05)).result(timeout=PATIENCE_S)
    assert caught.value.type_name == "CallTimeoutError"
    with pytest.raises(CallTimeoutError):
        await site.client.call("asks_for_a_while", "it", 0.05)
    await questions(site, 0)


async def test_a_deadline_passes_although_nobody_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.serve("driver", "workflow")
    job = await site.submit("asks_for_a_while", "it", 3600.0, "late")
    [question] = await questions(site)
    site.hub.kill("driver")
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600.0)
    with pytest.raises(QuestionClosedError, match="deadline") as caught:
        await site.client.answer(question.id, 1)
    assert caught.value.is_late
    await site.serve("driver2", "workflow")
    assert await job.result(timeout=PATIENCE_S) == "late"


@pytest.mark.parametrize("workflow", ["asks", "asks_in_thread"])
async def test_a_question_goes_away_with_its_job(site: Site, workflow: str) -> None:
    driver = await site.serve("driver", "workflow", "tool")
    job = await site.submit(workflow, "it")
    [question] = await questions(site)
    assert await job.cancel()
    await questions(site, 0)
    with pytest.raises(UnknownQuestionError):
        await site.client.answer(question.id, {"good": True})
    await site.until(lambda: driver.running == 0)


async def test_a_job_that_is_cancelled_while_nobody_has_it_leaves_no_question(site: Site) -> None:
    await site.serve("driver", "workflow", "tool")
    job = await site.submit("asks", "it")
    await questions(site)
    site.hub.kill("driver")
    assert await job.cancel()
    await questions(site, 0)


async def test_a_question_that_is_given_up_goes_away(site: Site) -> None:
    await site.serve("all", "workflow", "tool")
    assert await (await site.submit("asks_and_forgets", "it")).result(timeout=PATIENCE_S) == "it"
    await questions(site, 0)


async def test_outside_of_jobs_it_goes_away_with_who_asked(site: Site) -> None:
    async with connect(settings=site.settings, connect=site.hub.connect, name="curious"):
        asked = nalar_mq.ask("Well?", schema=int)
        [question] = await questions(site)
        await site.client.answer(question.id, 7)
        assert await asked == 7
        again = nalar_mq.ask("And?")
        await questions(site)
    assert again.failed()
    await questions(site, 0)


async def test_any_client_of_the_broker_answers(site: Site) -> None:
    await site.serve("all", "workflow", "tool")
    job = await site.submit("asks", "it")
    [question] = await questions(site)
    process = site.client.process

    async def request(id: str, data: bytes) -> tuple[str, bytes]:
        answer = await process.transport.request(process.subjects.answer(id), data, timeout_s=PATIENCE_S)
        return (answer.headers or {}).get("Nats-Service-Error-Code", ""), answer.data

    assert (await request(question.id, b"nonsense"))[0] == "400"
    assert (await request(question.id, b'{"good": 1}'))[0] == "400"
    assert (await request("0" * 32, b"1"))[0] == "404"
    code, data = await request(question.id, b'{"good": true}')
    assert (code, json.loads(data)) == ("", {"id": question.id, "answered": True})
    assert (await request(question.id, b'{"good": true}'))[0] == "409"
    assert await job.result(timeout=PATIENCE_S) == "True "


async def test_what_cannot_be_asked_is_refused_at_once(site: Site) -> None:
    with pytest.raises(ValueError, match=r"default of 'Well\?' is no answer"):
        nalar_mq.ask("Well?", schema=int, default="seven")
    with pytest.raises(ValueError, match="above 0"):
        nalar_mq.ask("Well?", timeout_s=0)
    with pytest.raises(TypeError):
        nalar_mq.ask("Well?", schema=asyncio.Event)
    await questions(site, 0)


def test_outside_of_the_runtime_people_are_asked_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConnectedError):
        nalar_mq.ask("Well?")
    said: Iterator[str] = iter(["green", "blue", "why not", "perhaps", "yes"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert human.ask("Which?", ["red", "blue"]) == "blue"
    assert human.ask("Why?") == "why not"
    assert human.approve("Now?")


class Part(msgspec.Struct):
    size: int
    kind: Literal["a", "b"] = "a"


class Whole(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parts: list[Part]
    by_name: dict[str, float | None] = {}
    pair: tuple[int, str] | None = None
    inner: Whole | None = None


NOT_WHOLE = st.floats(-2, 2).filter(lambda number: not number.is_integer())
JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(-2, 2).filter(lambda x: not x.is_integer())
    | st.sampled_from(["a", "b", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "parts", "size", "kind", "by_name", "pair", "inner"]), inner, max_size=4)
    ),
)
FITTING: Any = st.builds(
    Whole,
    name=st.text(max_size=3),
    parts=st.lists(st.builds(Part, size=st.integers(-5, 5)), max_size=2),
    by_name=st.dictionaries(st.text(max_size=2), st.none() | st.floats(-2, 2), max_size=2),
    pair=st.none() | st.tuples(st.integers(), st.text(max_size=2)),
)


@given(JSON | FITTING.map(msgspec.to_builtins))
def test_schemas_judge_as_the_types_they_were_made_of(value: Any) -> None:
    value = json.loads(json.dumps(value))
    for wanted in (Whole, Part, list[Part], dict[str, int], int | str | None, bool):
        try:
            msgspec.convert(value, wanted)
            fits = True
        except msgspec.ValidationError:
            fits = False
        assert (problem_of(value, schema_of(wanted)) == "") == fits, (value, wanted)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["integer", "null"]}, None, "x"),
        ({"const": 3}, 3, 4),
        ({"minLength": 2, "pattern": "^a"}, "ab", "ba"),
        ({"minimum": 1, "exclusiveMaximum": 3}, 2, 3),
        ({"allOf": [{"minimum": 1}, {"multipleOf": 2}]}, 4, 3),
        ({"items": {"type": "string"}, "maxItems": 1}, ["a"], ["a", "b"]),
        ({"additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": "b"}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}, None, 1),
        ({"additionalProperties": False, "properties": {"a": {}}}, {"a": 1}, {"b": 1}),
    ],
)
def test_schemas_that_were_written_by_hand(schema: dict[str, Any], good: Any, bad: Any) -> None:
    assert problem_of(good, schema) == ""
    assert "$" in problem_of(bad, schema)
