from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from nalar_mq import config, engines, values
from nalar_mq.agents.llm import BlockingLlm, Chat, Llm
from nalar_mq.agents.tools import Library, calculate, highlight, now, search
from nalar_mq.columns import EngineFigures
from nalar_mq.config import EngineAccess
from nalar_mq.engine_use import EngineUses, engine_uses
from nalar_mq.engines import ChatClient, Completion, EngineWatch, EventParser, LocalEngine, RemoteEngine
from nalar_mq.errors import EngineError, EngineRequestError, EngineUnreachableError
from nalar_mq.spending import spent_by

QUESTION = [{"role": "user", "content": "hi"}]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """An OpenAI-compatible server of the test's own, over real HTTP."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Handler = self.echo
        self.hung_up = asyncio.Event()
        self.metrics_page: tuple[int, str] = (404, "")
        self.metrics_asked = 0
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        try:
            return await self.reply(request)
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def metrics(self, _request: web.Request) -> web.Response:
        self.metrics_asked += 1
        status, text = self.metrics_page
        return web.Response(status=status, text=text)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first", "object": "model"}, {"id": "second"}]})

    async def echo(self, _request: web.Request) -> web.Response:
        words = " ".join(message["content"] for message in self.requests[-1]["messages"])
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
        choice = {"message": {"role": "assistant", "content": f"re: {words}"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})

    def says(self, status: int, body: str, **headers: str) -> None:
        async def reply(_request: web.Request) -> web.Response:
            return web.Response(status=status, text=body, headers=headers)

        self.reply = reply

    def streams(self, *pieces: bytes, hang: bool = False, cut: bool = False) -> None:
        async def reply(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            if hang:
                await asyncio.Event().wait()
            if cut and request.transport is not None:
                request.transport.abort()
            return response

        self.reply = reply


def event(**delta: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.chat)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/metrics", fake.metrics)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = site.name if not site.name.endswith(":0") else f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


async def test_a_completion_has_text_and_usage(server: FakeServer) -> None:
    async with ChatClient(server.url, "m", "secret") as client:
        done = await client.complete(QUESTION, max_tokens=7, stop=["\n"], options={"priority": 3})
    assert done == Completion("re: hi", "stop", prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    request = server.requests[0]
    assert (request["model"], request["max_tokens"], request["stop"], request["priority"]) == ("m", 7, ["\n"], 3)
    assert request["temperature"] == 0 and "stream" not in request
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_the_first_model_of_the_server_is_taken_if_none_is_named(server: FakeServer) -> None:
    async with ChatClient(server.url + "/v1/") as client:
        await client.complete(QUESTION)
        assert await client.models() == ["first", "second"]
    assert server.requests[0]["model"] == "first"
    assert "Authorization" not in server.headers[0]


async def test_tokens_count_as_spent(server: FakeServer) -> None:
    spent: list[tuple[float, str]] = []
    llm = Llm(engine=RemoteEngine(EngineAccess(url=server.url)))
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 12}}\n\n'
    with spent_by(lambda amount, unit: spent.append((amount, unit))):
        await llm.chat("hi")
        server.streams(event(content="a"), event(content="b"), usage, b"data: [DONE]\n\n")
        _ = [piece async for piece in llm.stream("hi")]
        server.streams(event(content="a"), event(content="b"), b"data: [DONE]\n\n")
        _ = [piece async for piece in llm.stream("hi")]
        server.streams(event(content="a"), hang=True)
        async with contextlib.aclosing(llm.stream("hi")) as pieces:
            assert await anext(pieces) == "a"
        server.says(500, "out of order")
        with pytest.raises(EngineRequestError):
            await llm.chat("hi")
    await llm.on_stop()
    assert spent == [(5.0, "tokens"), (42.0, "tokens"), (2.0, "tokens"), (1.0, "tokens")]
    assert server.requests[1]["stream_options"] == {"include_usage": True}


async def test_what_a_server_says_of_itself_is_told_and_what_we_ask_of_it(server: FakeServer) -> None:
    uses = EngineUses()
    engine_uses.set(uses)
    watch = EngineWatch(uses)
    assert await watch.look() == {}
    name = server.url.removeprefix("http://")
    async with ChatClient(server.url, "m") as client:
        await client.complete(QUESTION)
        server.metrics_page = (
            200,
            'vllm:num_requests_running{model_name="m"} 3.0\nvllm:num_requests_waiting{model_name="m"} 5.0\n'
            'vllm:kv_cache_usage_perc{model_name="m"} 0.25\nvllm:generation_tokens_total{model_name="m"} 100\n',
        )
        assert await watch.look() == {name: EngineFigures(3, 5, 0.25, 0.0, 1, 0, True)}
        server.metrics_page = (200, server.metrics_page[1].replace("100", "1000"))
        server.says(503, "busy")
        with pytest.raises(EngineRequestError):
            await client.complete(QUESTION)
        found = (await watch.look())[name]
        assert (found.requests, found.errors) == (2, 1)
        assert found.tokens_per_s > 0
        server.metrics_page = (500, "not now")
        assert (await watch.look())[name] == EngineFigures(0, None, None, 0.0, 2, 1)
        server.metrics_page = (404, "")
        await watch.look()
        asked = server.metrics_asked
        server.streams(event(content="a"), hang=True)
        async with contextlib.aclosing(client.stream(QUESTION)) as pieces:
            await anext(pieces)
            assert (await watch.look())[name] == EngineFigures(1, None, None, 0.0, 2, 1)
        assert server.metrics_asked == asked, "one that has none is not asked again"
        found = (await watch.look())[name]
        assert (found.running, found.requests, found.errors) == (0, 3, 1), "what we cut ourselves is no error"
        assert found.tokens_per_s > 0, "the piece that it has written"


async def test_a_server_that_refuses_to_be_asked_for_tokens_streams_all_the_same(server: FakeServer) -> None:
    async def strict(request: web.Request) -> web.StreamResponse:
        if "stream_options" in server.requests[-1]:
            return web.json_response({"error": {"message": "Extra inputs are not permitted: stream_options"}}, status=422)
        return web.Response(text=(event(content="a") + b"data: [DONE]\n\n").decode(), content_type="text/event-stream")

    server.reply = strict
    async with ChatClient(server.url, "m") as client:
        for _ in range(2):
            assert [piece async for piece in client.stream(QUESTION)] == ["a"]
        assert ["stream_options" in request for request in server.requests] == [True, False, False]
        server.says(422, "something else")
        with pytest.raises(EngineRequestError):
            _ = [piece async for piece in client.stream(QUESTION)]


async def test_pieces_of_a_stream_come_in_order(server: FakeServer) -> None:
    whole = event(role="assistant") + event(content="a") + b": ping\n\n" + event(content="é") + b'data: {"choices":[]}\n\n'
    server.streams(whole[:30], whole[30:31], whole[31:], b"data: [DONE]\n\n")
    async with ChatClient(server.url, "m") as client:
        assert [piece async for piece in client.stream(QUESTION)] == ["a", "é"]
    assert server.requests[0]["stream"] is True


@pytest.mark.parametrize("cut", [True, False])
async def test_a_stream_that_breaks_off_is_an_error(server: FakeServer, cut: bool) -> None:
    server.streams(event(content="a"), cut=cut)
    async with ChatClient(server.url, "m") as client:
        pieces = client.stream(QUESTION)
        assert await anext(pieces) == "a"
        with pytest.raises(EngineUnreachableError):
            await anext(pieces)


async def test_an_error_in_the_middle_of_a_stream(server: FakeServer) -> None:
    server.streams(event(content="a"), b'data: {"error": {"message": "out of memory"}}\n\n')
    async with ChatClient(server.url, "m") as client:
        with pytest.raises(EngineRequestError, match="out of memory"):
            _ = [piece async for piece in client.stream(QUESTION)]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, '{"error": {"message": "context too long"}}', "400: context too long"),
        (401, '{"error": "no"}', "401: no"),
        (500, "<html>", "500: <html>"),
        (200, "<html>", "cannot be read"),
        (200, '{"choices": []}', "no text"),
        (200, '{"choices": 1}', "cannot be read"),
        (200, '{"choices": [{"message": {"content": 5}}]}', "cannot be read"),
    ],
)
async def test_refusals_are_typed(server: FakeServer, status: int, body: str, message: str) -> None:
    server.says(status, body)
    async with ChatClient(server.url, "m") as client:
        with pytest.raises(EngineRequestError, match=message) as caught:
            await client.complete(QUESTION)
    assert caught.value.status == status
    back = values.decode_error(*values.encode_error(caught.value))
    assert isinstance(back, EngineRequestError) and back.status == status


async def test_a_busy_server_says_when_to_come_back(server: FakeServer) -> None:
    server.says(429, "{}", **{"Retry-After": "7"})
    async with ChatClient(server.url, "m") as client:
        with pytest.raises(EngineRequestError) as caught:
            await client.complete(QUESTION)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 7.0)


async def test_nobody_there(server: FakeServer) -> None:
    async with ChatClient("http://127.0.0.1:9", "m") as client:
        with pytest.raises(EngineUnreachableError, match=r"127\.0\.0\.1:9"):
            await client.complete(QUESTION)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_cancelled_request_hangs_up(server: FakeServer, streaming: bool) -> None:
    server.streams(event(content="a"), hang=True)
    begun = asyncio.Event()

    async def ask() -> None:
        async with ChatClient(server.url, "m") as client:
            if not streaming:
                begun.set()
                await client.complete(QUESTION)
            async with contextlib.aclosing(client.stream(QUESTION)) as pieces:
                async for _ in pieces:
                    begun.set()

    task = asyncio.create_task(ask())
    await asyncio.wait_for(begun.wait(), 60)
    if not streaming:
        async with asyncio.timeout(60):
            while not server.requests:
                await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.hung_up.wait(), 60)


async def test_a_consumer_that_stops_early_hangs_up(server: FakeServer) -> None:
    server.streams(event(content="a"), hang=True)
    llm = Llm(engine=RemoteEngine(EngineAccess(url=server.url, model="m")))
    async with contextlib.aclosing(llm.stream("hi")) as pieces:
        assert await anext(pieces) == "a"
    await asyncio.wait_for(server.hung_up.wait(), 60)
    await llm.on_stop()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1)), st.data())
def test_events_do_not_depend_on_how_the_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    stream = "".join(f": comment{end}data: {text}{end}{end}" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    parser = EventParser()
    pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [found for piece in pieces for found in parser.feed(piece)] == texts


def test_endless_events_are_refused() -> None:
    parser = EventParser()
    with pytest.raises(EngineRequestError):
        for _ in range(100):
            parser.feed(b"x" * 65_536)
    parser = EventParser()
    with pytest.raises(EngineRequestError):
        for _ in range(100):
            parser.feed(b"data: " + b"x" * 65_536 + b"\n")


def test_the_environment_names_the_engine() -> None:
    assert config.find_engine({"OPENAI_API_KEY": "k"}) is None
    both = {"OPENAI_BASE_URL": "http://a", "OPENAI_API_KEY": "k", "NALAR_ENGINE_URL": "http://b", "NALAR_ENGINE_MODEL": "m"}
    assert config.find_engine(both) == EngineAccess(url="http://b", model="m")
    del both["NALAR_ENGINE_URL"]
    found = config.find_engine(both)
    assert found == EngineAccess(url="http://a", api_key="k")
    assert "k'" not in repr(found)
    assert isinstance(engines.node_engine(both), RemoteEngine)
    assert isinstance(engines.node_engine({"NALAR_ENGINE_DIR": "/nowhere"}), LocalEngine)


async def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "MODEL_PACKAGE", "no-such-package-nalar")
    with pytest.raises(EngineError, match="nalar model install"):
        engines.model_path()
    engine = LocalEngine(tmp_path / "e")
    with pytest.raises(EngineError, match="nalar model install"):
        await engine.ensure()
    engine.close()


async def test_a_model_that_cannot_be_loaded_is_an_error_with_the_log(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    engine = LocalEngine(tmp_path / "e", model=broken)
    with pytest.raises(EngineError, match="its log"):
        await engine.ensure()
    engine.close()
    with pytest.raises(EngineError, match="no model file"):
        await LocalEngine(tmp_path / "e", model=tmp_path / "none.gguf").ensure()


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="NALAR_ENGINE_DIR"):
        await LocalEngine(tmp_path / "file" / "e").ensure()


def has_local_model() -> bool:
    with contextlib.suppress(EngineError):
        return engines.model_path().exists() and engines.importlib.util.find_spec("xllamacpp") is not None
    return False


needs_model = pytest.mark.skipif(not has_local_model(), reason="the embedded model is not installed")


def engine_pid(folder: Path) -> int:
    return int(json.loads((folder / "engine.json").read_bytes())["pid"])


async def ended(pid: int) -> None:
    await until(lambda: not Path(f"/proc/{pid}").exists(), "it goes on")


@needs_model
async def test_the_embedded_model_answers_is_shared_replaced_and_ends_with_its_last_user(tmp_path: Path) -> None:
    first, second = LocalEngine(tmp_path), LocalEngine(tmp_path)
    accesses = await asyncio.gather(first.ensure(), second.ensure(), first.ensure())
    assert len(set(map(repr, accesses))) == 1 and accesses[0] == accesses[1]
    assert (tmp_path / "engine.json").stat().st_mode & 0o077 == 0
    pid = engine_pid(tmp_path)
    llm = Llm(engine=first)
    assert "Paris" in await llm.chat("What is the capital of France?", max_tokens=12)
    assert "Paris" in "".join([piece async for piece in llm.stream("What is the capital of France?", max_tokens=12)])
    async with ChatClient(accesses[0].url, api_key="wrong") as intruder:
        with pytest.raises(EngineRequestError):
            await intruder.complete(QUESTION)

    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    assert "Paris" in await llm.chat("What is the capital of France?", max_tokens=12)
    successor = engine_pid(tmp_path)
    assert successor != pid

    await llm.on_stop()
    assert await second.ensure() == await second.ensure()
    assert engine_pid(tmp_path) == successor
    second.close()
    second.close()
    await ended(successor)
    assert not (tmp_path / "engine.json").exists()


USER = """
import asyncio, sys
from pathlib import Path
from nalar_mq.engines import LocalEngine
print(asyncio.run(LocalEngine(Path(sys.argv[1])).ensure()).url, flush=True)
sys.stdin.read()
"""


@needs_model
async def test_the_engine_outlives_who_started_it_and_ends_after_users_that_were_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", USER, str(tmp_path)], stdin=-1, stdout=-1) as user:
        assert user.stdout is not None
        url = (await asyncio.to_thread(user.stdout.readline)).decode().strip()
        engine = LocalEngine(tmp_path)
        assert (await engine.ensure()).url == url
        pid = engine_pid(tmp_path)
        user.kill()
    assert (await engine.ensure()).url == url
    engine.close()
    await ended(pid)


async def test_chat_remembers_what_was_answered_and_forgets_what_failed(server: FakeServer) -> None:
    chat = Chat(system="s", engine=RemoteEngine(EngineAccess(url=server.url, model="m")))
    assert await chat.say("one") == "re: s one"
    server.says(500, "no")
    with pytest.raises(EngineRequestError):
        await chat.say("lost")
    server.reply = server.echo
    assert await chat.say("two") == "re: s one re: s one two"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    await chat.on_stop()


async def test_a_broken_line_to_the_same_engine_is_not_tried_again(server: FakeServer) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    server.reply = cut
    llm = Llm(engine=RemoteEngine(EngineAccess(url=server.url, model="m")))
    with pytest.raises(EngineUnreachableError):
        await llm.chat("hi")
    assert len(server.requests) == 1
    await llm.on_stop()


async def test_the_blocking_agent_works_from_threads(server: FakeServer) -> None:
    llm = BlockingLlm("s", engine=RemoteEngine(EngineAccess(url=server.url, model="m")))
    answers = await asyncio.gather(*(asyncio.to_thread(llm.chat, f"n{number}") for number in range(5)))
    assert answers == [f"re: s n{number}" for number in range(5)]
    server.streams(event(content="a"), event(content="b"), b"data: [DONE]\n\n")
    assert await asyncio.to_thread(lambda: list(llm.stream("hi"))) == ["a", "b"]
    server.streams(event(content="a"), hang=True)
    assert await asyncio.to_thread(lambda: first_of(llm)) == "a"
    await asyncio.wait_for(server.hung_up.wait(), 60)
    llm.on_stop()


def first_of(llm: BlockingLlm) -> str:
    with contextlib.closing(llm.stream("hi")) as pieces:
        return next(pieces)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 * (3 + sqrt(16))", 14.0), ("-7 // 2", -4), ("2 ** 10", 1024), ("round(pi, 2)", 3.14), (" 1 ", 1), ("max(1, 2)", 2)],
)
def test_calculate(expression: str, value: float) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "x", "1 +", "9**9**9", "2**99999", "__import__('os')", "(1).real", "'a' * 9", "[1]", "1/0", "sqrt(-1)", "(-8)**0.5",
     "True", "lambda: 1", "sqrt(x=1)", "min()", "(" * 500, "1" * 1001, "1 if 1 else 2", "0 ** -1", "round(1.5, 'a')"],
)  # fmt: skip
def test_what_is_not_arithmetic_is_a_value_error(expression: str) -> None:
    with pytest.raises(ValueError):
        calculate(expression)


def test_now() -> None:
    assert now("Asia/Tokyo").endswith("+09:00")
    for wrong in ("Mars/Base", "../etc", ""):
        with pytest.raises(ValueError, match="no time zone"):
            now(wrong)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    (tmp_path / "a.md").write_text(
        "# Ferry\n\nThe ferry takes 35 minutes.\n\n## Price\n\nA ticket costs 8 euros. Children are free.\n"
    )
    (tmp_path / "b.txt").write_text("Puffins nest in April.\n\n" + "Filler sentence about nothing. " * 100)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.md").write_text("A ticket to nowhere.")
    (tmp_path / "d.bin").write_bytes(b"ticket")
    return tmp_path


def test_search_finds_passages_with_their_lines(documents: Path) -> None:
    best = search("What do tickets cost?", str(documents))[0]
    assert best.source == "a.md:7" and best.text.startswith("A ticket costs 8 euros.") and best.score > 0
    assert search("taking the ferry", str(documents))[0].source == "a.md:3"
    assert search("zeppelin", str(documents)) == []
    assert len(Library(str(documents)).search("filler", limit=2)) <= 2
    with pytest.raises(ValueError, match="no folder"):
        Library(str(documents / "none"))


def test_an_empty_folder_has_no_passages(tmp_path: Path) -> None:
    assert len(Library(str(tmp_path))) == 0 and search("x", str(tmp_path)) == []


def test_highlight_takes_the_sentences_that_matter() -> None:
    text = "The ferry is blue. A ticket costs 8 euros. Children are free."
    assert highlight("What does a ticket cost?", text) == "A ticket costs 8 euros."
    assert highlight("x", "") == ""


EXAMPLE = Path(__file__).parent.parent / "examples" / "analyst"


@needs_model
def test_the_example_runs_as_a_plain_program(tmp_path: Path) -> None:
    environment = {**os.environ, "NALAR_ENGINE_DIR": str(tmp_path)}
    for name in ("ANALYST_DOCS", "OPENAI_BASE_URL", "NALAR_ENGINE_URL"):
        environment.pop(name, None)
    command = [sys.executable, "workflow.py", "What is the capital of France?"]
    done = subprocess.run(command, cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert "Paris" in done.stdout.splitlines()[0]
    assert "geography.md:3" in done.stdout
    assert done.stderr == ""
