"""Calls actors from any program.

    async with nalar_mq.connect() as client:               # or: with nalar_mq.connect() as client, in a plain program
        report = await client.call("answer", "What is ...?")
        async for piece in client.stream("llm.stream", "Tell me ..."):
            print(piece, end="")

Inside the block the stubs of decorated actors work, too: `await search("...")`, `await Analyst.analyse("...")`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import msgspec

from nalar_mq.address import CLIENT_PREFIX, Address, check_token, is_client_name, is_text, random_token
from nalar_mq.annotations import check, from_json, to_json
from nalar_mq.arguments import check_fit, parameters_of, wanted_type
from nalar_mq.broker import read_runtime_file, what_died
from nalar_mq.call_context import DEFAULT_OPTIONS, CallContext, CallOptions, current_context
from nalar_mq.config import Settings, load_settings
from nalar_mq.errors import (
    ArgumentError,
    BrokerError,
    BrokerUnreachableError,
    CallCancelledError,
    DrainError,
    MigrationError,
    UnknownActorError,
    ValueNotEncodableError,
    nobody_serves,
)
from nalar_mq.event_loop import cancel_all
from nalar_mq.future import Future, Stream
from nalar_mq.identity import new_secret, presented
from nalar_mq.interchange import json_argument, write_value
from nalar_mq.jobs import JobHandle, Jobs, check_durable, no_workflow
from nalar_mq.lookout import View
from nalar_mq.messages import Drainage, Member
from nalar_mq.process import Connect, Process
from nalar_mq.questions import Question, Questions
from nalar_mq.traces import Trace, trace_of

T = TypeVar("T")
P = ParamSpec("P")

_ADVICE = (
    "start one with `nalar up APP`, or name one by `connect(url)` or NATS_URL; `connect(app=...)` finds that of an app that is "
    "up for another folder"
)
_UNREACHABLE = "start it, or name another one by `connect(url)` or NATS_URL"
_REJOIN_PAUSE_S = 1.0
_SAYS_NOTHING = ("", "Any", "typing.Any", "object")  # annotations
_BYTES = (bytes, bytearray, memoryview)
_NOT_OPEN = (
    "the client is not open: use it as `async with connect() as client`, without an event loop as `with connect() as client`"
)


def connect(
    url: str | None = None,
    *,
    settings: Settings | None = None,
    app: Path | str | None = None,
    name: str | None = None,
    tenant: str = "",
    connect: Connect | None = None,
    random: Random | None = None,
    clock: Callable[[], float] = time.time,
) -> Client:
    """A client of a running runtime; use it with `async with`, or with `with` in a program without an event loop.

    Args:
        url: of the broker, as `nats://host:port`; None to look in `NALAR_NATS_URL` and `NATS_URL`, then in
            `.nalar/runtime.json` beside `app`, where `nalar up` writes it, then in the selected context of the `nats` command.
        settings: everything at once, in place of `url`.
        app: the app's folder, manifest or file; the working directory if None.
        name: how others see this client, after `client-` if it does not begin so; a fresh name if None.
        tenant: on whose behalf it calls and submits jobs, for rules and limits; a token.
        connect, random, clock: as for `Process`.

    Raises:
        AddressError: the name or the tenant is no token.
        ConfigError: the URL is none, or there is none to be found.
    """
    advice = _UNREACHABLE if settings is None else ""
    if settings is None:
        place = Path.cwd() if app is None else Path(app)
        folder = place if place.is_dir() else place.parent
        running = read_runtime_file(folder)
        settings = load_settings(
            nats=url,
            runtime=running.access if running else None,
            app_namespace=running.namespace if running and url is None else "",
            advice=_ADVICE,
            died="" if running else what_died(folder),
        )
    return Client(settings, name=name, tenant=tenant, connect=connect, random=random, clock=clock, advice=advice)


class Caller:
    """Makes calls by name with certain options."""

    def __init__(self, client: Client, options: CallOptions) -> None:
        self._client = client
        self._options = options

    def options(
        self,
        *,
        session: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = -1.0,
        retries: int | None = None,
        tenant: str | None = None,
    ) -> Caller:
        """The same with other options; those left out stay as they are.

        Args:
            session: the session the calls belong to; one for each call if None.
            priority: higher runs earlier.
            timeout_s: seconds until the deadline; None for no deadline; what the actor's directives say if left out.
            retries: how often a call may be sent again after its worker was lost.
            tenant: on whose behalf calls and jobs are made, in place of the client's; what they call inherits it.

        Raises:
            AddressError: session or tenant are no tokens.
            ArgumentError: one of the others is no number.
        """
        if tenant:
            check_token(tenant, "tenant")
        changed = self._options.with_given(session=session, priority=priority, timeout_s=timeout_s, retries=retries)
        return Caller(self._client, changed if tenant is None else changed.but(tenant=tenant))

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Calls a workflow, a tool or `agent.method`; the future is there at once. Any thread.

        Raises:
            ArgumentError: the name is no text.
            ValueNotEncodableError, ValueTooLargeError: an argument cannot travel.
        """
        actor, method = _actor_and_method(name)
        context = self._client.context
        return context.caller.call(context, actor, method, args, kwargs, self._options)

    def cast(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        """Calls and wants no result."""
        actor, method = _actor_and_method(name)
        context = self._client.context
        context.caller.call(context, actor, method, args, kwargs, self._options.but(cast=True))

    def stream(self, name: str, /, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Calls a generator and gives its pieces as they come, with `async for`, or with `for` in a plain program."""
        return self.call(name, *args, **kwargs).stream()

    def submit(self, workflow: str, /, *args: Any, job_id: str | None = None, **kwargs: Any) -> Coroutine[Any, Any, JobHandle]:
        """Makes a durable call of a workflow; when it returns, the broker has it, and no loss of a process undoes that.

        A job whose worker is lost runs again from its start. Arguments travel as JSON: objects arrive as what the
        workflow's annotations say. Of the options only the tenant counts: a job has a session and a deadline of its own, and
        all calls of the job are made on behalf of that tenant, also when another worker goes on with it.

        Args:
            workflow: its name; it need not be served yet.
            args: by position; together with `kwargs` only if the workflow is served, so that their names are known.
            job_id: a token; submitting it again is the same job. A fresh one if None.
            kwargs: by name.

        Raises:
            AddressError: `workflow` or `job_id` is no token.
            ArgumentError: positional and named arguments cannot be put together, or whoever serves it does not take them.
            ValueNotEncodableError: an argument has no form in JSON, as an object without fields, NaN, or a dict with numbers
                as keys; or it is bytes, and the parameter has no annotation to say so.
            ValueTooLargeError: the arguments are larger than one message of the broker.
            UnknownActorError: what is served under that name is no workflow.
            BrokerFeatureError: the broker is known to acknowledge what it has not synced to disk, and not trusted.
            BrokerError: it may have been accepted or not; to submit it again under the same `job_id` is safe.
        """
        self._client.check_awaited("submit")
        return self._client.submit_job(workflow, args, kwargs, job_id=job_id or "", tenant=self._options.tenant)


def _on_its_loop(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]:
    """Refuses a call from a program without an event loop, where nobody would await the coroutine."""

    @functools.wraps(method)
    def checked(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        client.check_awaited(method.__name__)
        return method(client, *args, **kwargs)

    signature = inspect.signature(method)
    returned = f"Coroutine[Any, Any, {signature.return_annotation}]"  # for `help`, which finds no `async` here
    cast("Any", checked).__signature__ = signature.replace(return_annotation=returned)
    return checked


class Client(Caller):
    """A process that only calls. Made by `connect`.

    Its asynchronous methods raise `RuntimeError` if it was opened without an event loop: there they are for `run`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str | None = None,
        tenant: str = "",
        connect: Connect | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.time,
        advice: str = "",
    ) -> None:
        super().__init__(self, DEFAULT_OPTIONS)
        self._advice = advice
        entropy = random.randbytes(6) if random is not None else None
        self.name = _client_name(name) if name is not None else random_token("client", entropy)
        self._tenant = check_token(tenant, "tenant") if tenant else ""
        access = presented(settings.broker, self.name, new_secret())
        self._settings = msgspec.structs.replace(settings, broker=access)
        self._connect = connect
        self._random = random
        self._clock = clock
        self._process: Process | None = None
        self._context: CallContext | None = None
        self._outer: CallContext | None = None
        self._thread: _LoopThread | None = None
        self._rejoining: asyncio.Task[None] | None = None
        self._jobs: Jobs | None = None
        self._is_durable = False

    @property
    def context(self) -> CallContext:
        """The context of calls made through this client.

        Raises:
            RuntimeError: the client is not open.
        """
        if self._context is None:
            raise RuntimeError(_NOT_OPEN)
        return self._context

    @property
    def process(self) -> Process:
        """Its part in the runtime."""
        if self._process is None:
            raise RuntimeError(_NOT_OPEN)
        return self._process

    async def __aenter__(self) -> Client:
        try:
            await self._open()
        except BrokerError as error:
            raise _for_users(error, self._advice) from None
        self._enter_context()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._leave_context()
        await self._close()

    def __enter__(self) -> Client:
        self._thread = _LoopThread(f"nalar-{self.name}")
        try:
            self._thread.run(self._open())
        except BaseException as error:
            self._thread.close()
            if isinstance(error, BrokerError):
                raise _for_users(error, self._advice) from None
            raise
        self._enter_context()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave_context()
        if self._thread is not None:
            self._thread.run(self._close())
            self._thread.close()
            self._thread = None

    def _enter_context(self) -> None:
        self._outer = current_context.get()
        current_context.set(self._context)

    def _leave_context(self) -> None:
        """Another task may leave than the one that entered; its context is not ours to change."""
        if current_context.get() is self._context:
            current_context.set(self._outer)

    async def _open(self) -> None:
        self._process = await self._join()
        self._context = CallContext(self._process.calls, tenant=self._tenant)

    async def _join(self) -> Process:
        process = Process(
            self._settings,
            name=self.name,
            role="client",
            connect=self._connect,
            lease_in_thread=self._connect is None,
            random=self._random,
            clock=self._clock,
        )
        await process.start()
        process.declared_lost.add_done_callback(self._begin_rejoining)
        return process

    def _begin_rejoining(self, declared_lost: asyncio.Future[None]) -> None:
        if not declared_lost.cancelled() and self._process is not None:
            self._rejoining = asyncio.get_running_loop().create_task(self._rejoin(self._process))

    async def _rejoin(self, former: Process) -> None:
        """The program stood still and was given up: its calls have failed by now, the next ones come from another life."""
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.close()
        await former.aclose()
        while True:
            try:
                self._process = await self._join()
                break
            except BrokerError:
                await asyncio.sleep(_REJOIN_PAUSE_S)
        if self._context is not None:
            self._context.caller = self._process.calls

    async def _close(self) -> None:
        rejoining, self._rejoining = self._rejoining, None
        if rejoining is not None:
            await cancel_all([rejoining])
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.close()
        process, self._process, self._context = self._process, None, None
        if process is not None:
            await process.aclose(CallCancelledError("the client has closed", started=True))

    @_on_its_loop
    async def wait_for(self, name: str, timeout_s: float = 10.0) -> None:
        """Returns once somebody serves the actor of `name`; on the client's loop.

        Raises:
            UnknownActorError: nobody did within `timeout_s`.
        """
        actor, _ = _actor_and_method(name)
        if not await self.process.wait_for(actor, timeout_s):
            raise UnknownActorError(nobody_serves(actor, self.process.table.known_actors()), actor=actor)

    async def submit_job(
        self, workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, job_id: str, tenant: str | None
    ) -> JobHandle:
        """As `submit`, on behalf of a tenant, or of the client's if that is None."""
        check_token(workflow, "workflow")
        jobs = await self.jobs(to_submit=True)
        info = self.process.table.info(workflow)
        if info is not None and info.kind != "workflow":
            raise no_workflow(workflow, info.kind)
        given = _job_arguments(workflow, args, kwargs, info.methods.get("", "") if info is not None else None)
        id = await jobs.submit(workflow, write_value(given), job_id, self._tenant if tenant is None else tenant)
        return JobHandle(self._opened_jobs, id)

    def job(self, id: str) -> JobHandle:
        """A job that was submitted by anybody, whether it is known or not: `await client.job("first").result()`.

        In a program without an event loop `client.run(client.job("first").result)`. Nothing is asked of the broker before that.

        Raises:
            AddressError: the id is no token.
        """
        return JobHandle(self._opened_jobs, id)

    async def _opened_jobs(self) -> Jobs:
        return await self.jobs()

    @_on_its_loop
    async def jobs(self, *, to_submit: bool = False) -> Jobs:
        """All jobs of the namespace.

        Raises:
            BrokerFeatureError: jobs are to be submitted, and the broker is known to acknowledge what it has not synced.
        """
        if to_submit and not self._is_durable:
            if not self._settings.trust_broker:
                await check_durable(self.process.transport)
            self._is_durable = True
        if self._jobs is None:
            process = self.process
            self._jobs = await Jobs.open(process.transport, process.subjects, is_alive=process.table.is_alive)
        return self._jobs

    @_on_its_loop
    async def questions(self) -> list[Question]:
        """What programs have asked (`nalar_mq.ask`) and nobody has answered yet, the oldest first."""
        return await (await self._open_questions()).waiting(self.process.calls.is_alive)

    @_on_its_loop
    async def answer(self, id: str, value: Any) -> None:
        """Answers a question; when it returns, the answer counts, and no loss of a process undoes that.

        Args:
            id: of the question, as in `questions()`.
            value: as JSON has it, or what becomes that.

        Raises:
            UnknownQuestionError: nobody waits for an answer to that.
            QuestionClosedError: another answer came first, or the deadline has passed.
            AnswerError: the value does not fit the schema of the question.
            BrokerError: it may count or not; to answer again is safe.
        """
        questions = await self._open_questions()
        await questions.answer(id, from_json(to_json(value)), self.process.calls.is_alive)

    async def _open_questions(self) -> Questions:
        return await Questions.open(self.process.transport, self.process.subjects)

    def run(self, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What an asynchronous method comes to, in a program without an event loop: `client.run(client.submit, "report")`.

        Args:
            method: of this client, or of a job that it has submitted.
            args, kwargs: what it takes.

        Raises:
            RuntimeError: the client runs on an event loop of the program.
        """
        if self._thread is None:
            raise RuntimeError("this client runs on your own event loop: await the coroutine instead")

        async def on_the_loop() -> T:
            return await method(*args, **kwargs)

        return self._thread.run(on_the_loop())

    def check_awaited(self, name: str) -> None:
        """Raises `RuntimeError` where nobody would await what the asynchronous method of that name returns."""
        if self._thread is not None and not self._thread.is_current():
            raise RuntimeError(
                f"`{name}` is asynchronous, and this client was opened without an event loop: write "
                f"`client.run(client.{name}, ...)`, or open it with `async with connect()` and await it"
            )

    @_on_its_loop
    async def trace(self, wanted: Future[Any] | str = "") -> Trace:
        """The calls of one run as a tree: which call made which, where and when each of them ran, and how it ended.

        Workers remember the last 10,000 calls each has run, for as long as they live. The tree begins at
        the root of the run, even if a call in the middle of it is named.

        Args:
            wanted: a future of this client, or the id of a call in hexadecimal, of a session, or of a job; the run that
                began last if empty.

        Raises:
            UnknownCallError: no worker remembers such a call.
        """
        table = self.process.table
        workers = [Address(name, member.incarnation) for name, member in table.members.items() if member.role == "worker"]
        views = await self.process.lookout.ask(workers, records=True)
        nodes = {name: member.node for name, member in table.members.items()}
        return trace_of(wanted.id.hex() if isinstance(wanted, Future) else wanted, views, nodes)

    @_on_its_loop
    async def migrate(self, actor: str, session: str, *, to: str, instance: str = "") -> Migration:
        """Moves a session with its state, its waiting calls and the results of its former ones to worker `to`.

        It is used meanwhile: no call of it begins for some milliseconds, none is lost, and their order stays.

        Raises:
            MigrationError: it is where it was; the message says why.
        """
        migrated = await self.process.calls.migrate(actor, f"{session}/{instance}" if instance else session, to)
        if migrated.refusal:
            raise MigrationError(migrated.refusal)
        return Migration(migrated.frozen_s, migrated.size)

    @_on_its_loop
    async def drain(
        self, worker: str, *, grace_s: float = 30.0, on_progress: Callable[[Drainage], None] | None = None
    ) -> Drainage:
        """Has a worker finish what it has begun, move its sessions to other workers, and end; returns when it is gone.

        No call fails for it, with two exceptions: what still runs when `grace_s` are over is lost as with any worker that
        ends, and a session that keeps its state in memory, which cannot move, ends with `SessionLostError` then. The worker
        is not started again.

        Args:
            worker: its name.
            grace_s: seconds, 0 or more.
            on_progress: hears now and then, on the client's loop, what is left to be done.

        Raises:
            DrainError: there is no such worker, it is drained already, the grace period is none, or it was lost meanwhile.
        """
        if not grace_s >= 0:
            raise DrainError(f"a grace period of {grace_s:g} s cannot be: give one of 0 s or more", worker)
        members = self.process.table.members
        member = members.get(worker)
        if member is None or member.role != "worker":
            known = ", ".join(sorted(name for name, member in members.items() if member.role == "worker")) or "none"
            what = f"{worker!r} is a client" if member is not None else f"there is no worker {worker!r}"
            raise DrainError(f"{what}; workers are: {known}", worker)
        return await self.process.calls.drain(Address(worker, member.incarnation), grace_s, on_progress)

    @_on_its_loop
    async def look(self) -> list[View]:
        """How many calls each other live process has in hand; those that do not answer in time are left out."""
        others = [(name, member) for name, member in self.process.table.members.items() if name != self.process.name]
        return await self.process.lookout.ask([Address(name, member.incarnation) for name, member in others])

    @_on_its_loop
    async def members(self) -> list[tuple[str, Member]]:
        """All live processes by name, this one included."""
        return sorted(self.process.table.members.items())


class Migration(NamedTuple):
    """A session that has moved.

    Attributes:
        frozen_s: for how long none of its calls could begin.
        size_bytes: of the state that went over.
    """

    frozen_s: float
    size_bytes: int


def _job_arguments(
    workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any], signature: str | None
) -> list[Any] | dict[str, Any]:
    """Arguments as they stand in the message of a job, by name if any is; None for `signature` if nobody serves the workflow.

    Raises:
        ArgumentError: it is known already that the job would fail.
        ValueNotEncodableError: one of them cannot be said in JSON.
    """
    try:
        check_fit(signature or "", args, kwargs)
    except TypeError as error:
        raise ArgumentError(f"{workflow}: {error}", actor=workflow) from None
    known = parameters_of(signature or "")
    names = list(known.annotations)[: known.positional]

    def plain(name: str, value: Any) -> Any:
        annotation = known.annotations.get(name, "")
        what = f"argument {name!r} of {workflow}"
        if value is None and name in known.none_by_default:
            return None
        try:
            value = check(value, wanted_type(annotation), what)
            if type(value) in _BYTES and signature is not None and annotation in _SAYS_NOTHING:
                raise ValueNotEncodableError("bytes arrive as a text unless the parameter is annotated `bytes`")
            return json_argument(value)
        except ArgumentError as error:
            error.actor = workflow
            raise
        except ValueNotEncodableError as error:
            text = f"{what} cannot be submitted, since arguments of jobs travel as JSON: {error}"
            raise ValueNotEncodableError(text, actor=workflow) from None

    by_position = [plain(names[place] if place < len(names) else str(place), value) for place, value in enumerate(args)]
    by_name = {name: plain(name, value) for name, value in kwargs.items()}
    if not by_name:
        return by_position
    given = dict(zip(names, by_position, strict=False))
    if len(args) > len(names) or given.keys() & by_name.keys():
        raise ArgumentError(f"{workflow}: give the arguments of a job by name", actor=workflow)
    return given | by_name


def _actor_and_method(name: str) -> tuple[str, str]:
    if not is_text(name):
        what = "what is called is named by a text, as 'workflow', 'tool' or 'agent.method'"
        raise ArgumentError(f"{what}, not by {name!r}")
    actor, _, method = name.partition(".")
    return actor, method


def _client_name(name: str) -> str:
    """By which everybody knows that it serves nothing."""
    check_token(name, "client name")
    return check_token(name if is_client_name(name) else f"{CLIENT_PREFIX}{name}", "client name")


def _for_users(error: BrokerError, advice: str) -> BrokerError:
    """Without the way through our code, which says nothing to whoever has named a broker that is not there."""
    if isinstance(error, BrokerUnreachableError) and advice:
        error = BrokerUnreachableError(f"{error}: {advice}", error.url)
    return error.with_traceback(None)


class _LoopThread:
    """An event loop in a thread, for clients of programs that have none."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
