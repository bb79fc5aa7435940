"""Agents that talk to a model: plain classes that need no runtime and run under one, by naming them in `nalar.toml`.

    [agents.llm]
    source = "nalar_mq.agents.llm:Llm"

They reach the engine that the environment names (`NALAR_ENGINE_URL` or `OPENAI_BASE_URL`, see `nalar_mq.config`), else the
embedded model of this machine, which starts with the first call and is shared by all processes.

What the engine says of the tokens it has read and written counts as spent by the running call (`nalar_mq.spend`); of an answer
that is cut while it is streamed, only its pieces do.

    Llm           asynchronous, keeps nothing between calls
    BlockingLlm   the same for programs without `await`
    Chat          asynchronous, remembers its conversation
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeAlias

from nalar_mq.config import EngineAccess
from nalar_mq.engines import ChatClient, Completion, Engine, Messages, node_engine
from nalar_mq.errors import EngineUnreachableError
from nalar_mq.spending import spend

Prompt: TypeAlias = str | Sequence[Mapping[str, str]]

_SYSTEM = "You are a helpful assistant."
_REMEMBERED = 20
_AGAIN = 3  # requests that were cut, each by the end of another server


class Llm:
    """Answers prompts; keeps nothing between calls.

    Args:
        system: what the model is told about its task.
        max_tokens: the longest answer.
        temperature: 0 for the likeliest answer.
        engine: the model server; by default the one of this machine.
        options: further fields of each request, such as `seed`, `priority` or `frequency_penalty`.
    """

    def __init__(
        self,
        system: str = _SYSTEM,
        max_tokens: int = 256,
        temperature: float = 0.0,
        engine: Engine | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.system = system
        self.max_tokens = max_tokens
        self._line = _Line(engine or node_engine(), {"temperature": temperature, **(options or {})})

    async def chat(self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()) -> str:
        """The answer to a prompt, or to messages as `{"role": ..., "content": ...}`.

        Raises:
            EngineError: the model or its server is missing, does not answer, or refuses.
        """
        return (await self.complete(prompt, max_tokens, stop)).text.strip()

    async def complete(self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()) -> Completion:
        """As `chat`, with the tokens it took."""
        messages = _messages(prompt, self.system)
        limit = max_tokens or self.max_tokens
        return await self._line.complete(messages, limit, stop)

    async def stream(
        self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> AsyncGenerator[str, None]:
        """The answer in pieces, as they are written; closing the generator stops the server.

        Raises:
            EngineError: as in `chat`, also after some pieces.
        """
        messages = _messages(prompt, self.system)
        pieces = self._line.stream(messages, max_tokens or self.max_tokens, stop)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def on_stop(self) -> None:
        """Gives the engine up."""
        await self._line.aclose()


class BlockingLlm:
    """As `Llm`, for programs without `await`: each call waits for its answer. Safe to use from several threads."""

    def __init__(
        self,
        system: str = _SYSTEM,
        max_tokens: int = 256,
        temperature: float = 0.0,
        engine: Engine | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.system = system
        self.max_tokens = max_tokens
        self._options = {"temperature": temperature, **(options or {})}
        self._engine = engine or node_engine()

    def chat(self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()) -> str:
        """As `Llm.chat`."""
        return self.complete(prompt, max_tokens, stop).text.strip()

    def complete(self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()) -> Completion:
        """As `Llm.complete`."""
        return asyncio.run(self._complete(prompt, max_tokens, stop))

    def stream(self, prompt: Prompt, max_tokens: int | None = None, stop: Sequence[str] = ()) -> Generator[str, None, None]:
        """As `Llm.stream`."""
        line = _Line(self._engine, self._options)
        pieces = line.stream(_messages(prompt, self.system), max_tokens or self.max_tokens, stop)
        with asyncio.Runner() as runner:
            try:
                while (piece := runner.run(_next_piece(pieces))) is not None:
                    yield piece
            finally:
                runner.run(_close(pieces, line))

    def on_stop(self) -> None:
        """Gives the engine up."""
        self._engine.close()

    async def _complete(self, prompt: Prompt, max_tokens: int | None, stop: Sequence[str]) -> Completion:
        line = _Line(self._engine, self._options)
        try:
            return await line.complete(_messages(prompt, self.system), max_tokens or self.max_tokens, stop)
        finally:
            await line.hang_up()


class Chat:
    """A conversation: what was said stays in the agent, so each session has its own.

    Args:
        system: what the model is told about its task.
        max_tokens: the longest answer.
        engine: the model server; by default the one of this machine.
    """

    def __init__(self, system: str = _SYSTEM, max_tokens: int = 256, engine: Engine | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self._llm = Llm(system, max_tokens, engine=engine)

    async def say(self, text: str) -> str:
        """The answer to `text` after all that was said; a call that fails leaves the conversation as it was.

        The model is reminded of the last messages only, since its memory is limited.
        """
        question = {"role": "user", "content": text}
        recent = self.messages[-_REMEMBERED:]
        system = {"role": "system", "content": self._llm.system}
        reply = await self._llm.chat([system, *recent, question])
        self.messages = [*self.messages, question, {"role": "assistant", "content": reply}]
        return reply

    async def on_stop(self) -> None:
        """Gives the engine up."""
        await self._llm.on_stop()


class _Line:
    """A connection to an engine, made on first use, and again after the engine was replaced."""

    def __init__(self, engine: Engine, options: Mapping[str, object]) -> None:
        self._engine = engine
        self._options = options
        self._access: EngineAccess | None = None
        self._client: ChatClient | None = None

    async def complete(self, messages: Messages, max_tokens: int, stop: Sequence[str]) -> Completion:
        client, cuts = await self._dial(), 0
        while True:
            try:
                answer = await client.complete(messages, max_tokens=max_tokens, stop=stop, options=self._options)
            except EngineUnreachableError:
                cuts += 1
                if cuts > _AGAIN:
                    raise
                client = await self._redial(client)
            else:
                _spend(answer.prompt_tokens, answer.completion_tokens)
                return answer

    async def stream(self, messages: Messages, max_tokens: int, stop: Sequence[str]) -> AsyncGenerator[str, None]:
        client = await self._dial()
        has_begun = False
        try:
            async with aclosing(self._pieces(client, messages, max_tokens, stop)) as pieces:
                async for piece in pieces:
                    has_begun = True
                    yield piece
            return
        except EngineUnreachableError:
            if has_begun:
                raise
            client = await self._redial(client)
        async with aclosing(self._pieces(client, messages, max_tokens, stop)) as pieces:
            async for piece in pieces:
                yield piece

    def _pieces(
        self, client: ChatClient, messages: Messages, max_tokens: int, stop: Sequence[str]
    ) -> AsyncGenerator[str, None]:
        return client.stream(messages, max_tokens=max_tokens, stop=stop, options=self._options, on_tokens=_spend)

    async def hang_up(self) -> None:
        """Closes the connection and keeps the engine."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def aclose(self) -> None:
        """Closes the connection and gives the engine up."""
        await self.hang_up()
        self._engine.close()

    async def _dial(self) -> ChatClient:
        if self._client is None:
            access = await self._engine.ensure()
            if self._client is None:
                self._access = access
                self._client = ChatClient(access.url, access.model, access.api_key)
        return self._client

    async def _redial(self, failed: ChatClient) -> ChatClient:
        """A client for the engine that took the place of the one that failed; raises again if it is still the same."""
        if self._client is failed:
            access = await self._engine.ensure()
            if self._client is failed:  # else another call has come here first
                if access == self._access:
                    raise
                self._client = None
                await failed.aclose()
        return await self._dial()


def _spend(tokens_read: int, tokens_written: int) -> None:
    spend(tokens_read + tokens_written)


def _messages(prompt: Prompt, system: str) -> Messages:
    if not isinstance(prompt, str):
        return prompt
    user = {"role": "user", "content": prompt}
    return [{"role": "system", "content": system}, user] if system else [user]


async def _next_piece(pieces: AsyncGenerator[str, None]) -> str | None:
    return await anext(pieces, None)


async def _close(pieces: AsyncGenerator[str, None], line: _Line) -> None:
    await pieces.aclose()
    await line.hang_up()
