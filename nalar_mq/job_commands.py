"""What the commands of `nalar` do with jobs, without the command line: `cli` reads the options, this carries them out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from nalar_mq.address import check_token
from nalar_mq.annotations import from_json
from nalar_mq.arguments import parameters_of, parse_arguments
from nalar_mq.client import Client, connect
from nalar_mq.commands import BrokerChoice, settings_of
from nalar_mq.errors import ConfigError, MalformedMessageError, UnknownJobError, ValueTooLargeError
from nalar_mq.event_loop import cancel_all
from nalar_mq.exits import CallFailed
from nalar_mq.interchange import write_value
from nalar_mq.jobs import DeadLetter, JobResult, Jobs, JobStatus, Overview, value_of
from nalar_mq.questions import Question

T = TypeVar("T")

_IN_FLIGHT: Final = 256


class Tally(NamedTuple):
    """Jobs of one command: how many were accepted, how many results have been handed over, and how many say no value."""

    accepted: int = 0
    ended: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.accepted} accepted, {self.ended} ended, {self.failed} failed"


Progress = Callable[[Tally], None]


class JobWish(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the command line describes it."""

    workflow: str
    words: tuple[str, ...] = ()
    json_text: str | None = None
    id: str = ""
    tenant: str = ""


async def submit(choice: BrokerChoice, app: Path | None, wish: JobWish) -> tuple[str, str]:
    """Makes one job; returns its id once the broker has it, and what is to be said of it, if anything.

    Raises:
        ArgumentError: whoever serves the workflow does not take these arguments.
        UnknownActorError: what is served under that name is no workflow.
        ValueTooLargeError: the arguments are larger than one message.
    """
    async with client_of(choice, app) as client:
        info = client.process.table.info(wish.workflow)
        parameters = parameters_of(info.methods.get("", "") if info is not None else "")
        args, kwargs = parse_arguments(wish.words, wish.json_text, parameters)
        former = await known_before(await client.jobs(), wish.id) if wish.id else ""
        whose = client.options(tenant=wish.tenant)
        handle = await whose.submit(wish.workflow, *args, job_id=wish.id or None, **kwargs)
        return handle.id, former or ("" if info is not None else unserved(client, wish.workflow))


async def known_before(jobs: Jobs, id: str) -> str:
    """What to know of an id under which a job has ended or begun already: it is that job, and runs no more often."""
    ended = await jobs.result(id)
    if ended is None and await jobs.holder(id) is None:
        return ""
    how = f"has ended: it is {ended.state}" if ended is not None else "has begun"
    return f"job {id} was there before and {how}; the same id is the same job, whatever its arguments"


def unserved(client: Client, workflow: str) -> str:
    """What to know of a job of a workflow that nobody serves."""
    table = client.process.table
    served = [name for name in table.known_actors() if (info := table.info(name)) and info.kind == "workflow"]
    close = get_close_matches(workflow, served, n=1)
    hint = f"did you mean {close[0]!r}? Served" if close else "served"
    known = ", ".join(served) or "no workflows"
    return f"nobody serves {workflow!r} now, and the job waits until somebody does; {hint} are: {known}"


async def submit_lines(
    choice: BrokerChoice,
    app: Path | None,
    workflow: str,
    lines: Iterable[str],
    *,
    prefix: str,
    tenant: str,
    wait: bool,
    take: Callable[[str], None],
    take_result: Callable[[JobResult], None],
    on_progress: Progress,
) -> Tally:
    """Makes a job of every line of JSON, in order, some hundreds at a time.

    Args:
        choice, app, workflow: as for `submit`.
        lines: JSON; empty lines are left out.
        prefix: the ids become `<prefix>-<number of the line>`, so that submitting the lines again adds nothing; if empty,
            they are fresh.
        tenant: on whose behalf the jobs run; empty for nobody's.
        wait: hand over the results, in the order of the lines.
        take: gets the id of each job once the broker has it.
        take_result: gets each result.
        on_progress: hears how many jobs were accepted, and how many of them have ended and failed.

    Raises:
        ConfigError: a line is not JSON.
        ValueTooLargeError: one is larger than one message.
    """
    async with client_of(choice, app) as client:
        jobs = await client.jobs(to_submit=True)
        ids: deque[str] = deque()
        so_far = Tally()
        async for id in _in_order(_submissions(jobs, workflow, lines, prefix, tenant)):
            so_far = so_far._replace(accepted=so_far.accepted + 1)
            on_progress(so_far)
            if wait:
                ids.append(id)
            else:
                take(id)
        async for result in _in_order(jobs.wait(id) for id in ids):
            so_far = so_far._replace(ended=so_far.ended + 1, failed=so_far.failed + (result.state != "done"))
            take_result(await jobs.whole(result))
            on_progress(so_far)
        return so_far


async def result(choice: BrokerChoice, app: Path | None, id: str, *, wait: bool) -> Any:
    """The value of a job.

    Raises:
        CallFailed: it failed or was cancelled.
        UnknownJobError: it has not ended, and nobody wants to wait; or there is none.
    """
    async with client_of(choice, app) as client:
        jobs = await client.jobs()
        found = await jobs.wait(id) if wait else await jobs.result(id)
        if found is None:
            status = await jobs.status(id)
            raise ConfigError(f"job {id!r} has not ended: it is {status.state}; `nalar result {id} --wait` waits for it")
        return checked_value(await jobs.whole(found))


async def status(choice: BrokerChoice, app: Path | None, id: str) -> JobStatus:
    """Where a job stands."""
    async with client_of(choice, app) as client:
        return await (await client.jobs()).status(id)


async def cancel(choice: BrokerChoice, app: Path | None, id: str) -> bool:
    """Ends a job; False if it had ended."""
    async with client_of(choice, app) as client:
        return await (await client.jobs()).cancel(id)


async def overview(choice: BrokerChoice, app: Path | None, limit: int) -> Overview:
    """All jobs by where they stand, and the last `limit` that have ended."""
    async with client_of(choice, app) as client:
        return await (await client.jobs()).overview(limit)


async def dead_letters(choice: BrokerChoice, app: Path | None) -> list[DeadLetter]:
    """All dead letters, oldest first."""
    async with client_of(choice, app) as client:
        return [letter async for letter in (await client.jobs()).dead_letters()]


async def retry(choice: BrokerChoice, app: Path | None, keys: tuple[str, ...]) -> tuple[int, int]:
    """Publishes dead letters again, all of them if none is named.

    Returns how many were, and how many have only been removed, since their jobs have ended after they had failed.
    """
    async with client_of(choice, app) as client:
        jobs = await client.jobs()
        published = [await jobs.retry(letter) for letter in await _chosen(jobs, keys)]
        return sum(published), len(published) - sum(published)


async def drop(choice: BrokerChoice, app: Path | None, keys: tuple[str, ...]) -> int:
    """Removes dead letters, all of them if none is named; returns how many."""
    async with client_of(choice, app) as client:
        jobs = await client.jobs()
        letters = await _chosen(jobs, keys)
        for letter in letters:
            await jobs.drop(letter)
        return len(letters)


def checked_value(found: JobResult) -> Any:
    """The value of a job that is done.

    Raises:
        CallFailed: it is not.
    """
    try:
        return value_of(found)
    except Exception as error:
        raise CallFailed(error, found.workflow) from error


async def _chosen(jobs: Jobs, keys: tuple[str, ...]) -> list[DeadLetter]:
    if not keys:
        return [letter async for letter in jobs.dead_letters()]
    found = [(key, await jobs.dead_letter(key)) for key in keys]
    for key, letter in found:
        if letter is None:
            raise UnknownJobError(key)
    return [letter for _, letter in found if letter is not None]


def _submissions(
    jobs: Jobs, workflow: str, lines: Iterable[str], prefix: str, tenant: str
) -> Iterator[Coroutine[Any, Any, str]]:
    if prefix:
        check_token(prefix, "--id")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"line {number} is not JSON: {error}") from None
        yield _submit_line(jobs, workflow, number, write_value(value), f"{prefix}-{number}" if prefix else "", tenant)


async def _submit_line(jobs: Jobs, workflow: str, number: int, arguments: bytes, id: str, tenant: str) -> str:
    try:
        return await jobs.submit(workflow, arguments, id, tenant)
    except ValueTooLargeError as error:
        raise ValueTooLargeError(
            f"line {number}: {error}", actor=error.actor, size_bytes=error.size_bytes, limit_bytes=error.limit_bytes
        ) from None


async def questions(choice: BrokerChoice, app: Path | None) -> list[Question]:
    """The questions that wait for an answer, oldest first."""
    async with client_of(choice, app) as client:
        return await client.questions()


async def answer(choice: BrokerChoice, app: Path | None, id: str, json_text: str) -> None:
    """Answers a question.

    Raises:
        ConfigError: the answer is not JSON.
        UnknownQuestionError, QuestionClosedError, AnswerError: it cannot be answered, or not by that.
    """
    try:
        value = from_json(json_text)
    except MalformedMessageError as error:
        raise ConfigError(f"the answer is {error}; a text needs quotes of its own: '\"yes\"'") from None
    async with client_of(choice, app) as client:
        await client.answer(id, value)


async def _in_order(work: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[T]:
    """The results of coroutines in their order, while some hundreds of them run."""
    running: deque[asyncio.Task[T]] = deque()
    try:
        for coroutine in work:
            running.append(asyncio.ensure_future(coroutine))
            if len(running) >= _IN_FLIGHT:
                yield await running[0]
                running.popleft()
        while running:
            yield await running[0]
            running.popleft()
    finally:
        await cancel_all(running)


def client_of(choice: BrokerChoice, app: Path | None) -> Client:
    """A client of the runtime that is meant."""
    return connect(settings=settings_of(choice, app))
