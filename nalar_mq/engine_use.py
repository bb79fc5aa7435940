"""What a process asks of model servers, and what those say of themselves. Pure: no I/O, and time is an argument.

    ChatClient ──▶ EngineUse, one for each server ──┐
                                                    ├──▶ EngineFigures, told in reports (`columns`)
    the server's /metrics ──▶ Metrics ──────────────┘

vLLM and llama.cpp say how many requests they work on and how many wait, of all who ask them, and how many tokens they have
written; vLLM also how full its KV cache is. Of a server that says nothing, or not to us, only our own requests are known.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from nalar_mq.columns import LONGEST_NAME, MOST_ENGINES, EngineFigures

_RUNNING: Final = ("vllm:num_requests_running", "llamacpp:requests_processing")
_WAITING: Final = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")
_CACHE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "llamacpp:kv_cache_usage_ratio")
_TOKENS: Final = ("vllm:generation_tokens_total", "llamacpp:tokens_predicted_total")


class Metrics(NamedTuple):
    """What a server says of all its requests; `cache_used` from 0 to 1, None if it does not say; `tokens` written so far."""

    running: int
    waiting: int
    cache_used: float | None
    tokens: float


def read_metrics(text: str) -> Metrics | None:
    """What a page in the format of Prometheus says; None if it is that of no model server that we know.

    Of several engines behind one page the requests and tokens are added, and the fullest cache counts.
    """
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
        words = rest.rpartition("}")[2].split()
        if name.startswith("#") or not words:
            continue
        try:
            value = float(words[0])
        except ValueError:
            continue
        if isfinite(value) and value >= 0:
            found.setdefault(name.strip(), []).append(value)
    running, waiting, cache, tokens = (
        next((found[name] for name in names if name in found), None) for names in (_RUNNING, _WAITING, _CACHE, _TOKENS)
    )
    if running is None:
        return None
    return Metrics(int(sum(running)), int(sum(waiting or ())), max(cache) if cache else None, sum(tokens or ()))


class EngineUse:
    """One server as this process uses it. Any thread.

    Attributes:
        url: as it is asked.
        api_key: what it is asked with.
        name: what it is called in reports: host, port and path, without the rest.
    """

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url
        self.api_key = api_key
        parts = urlsplit(url)
        self.name = f"{parts.netloc.rpartition('@')[2]}{parts.path.removesuffix('/v1')}"[:LONGEST_NAME]
        self._lock = threading.Lock()
        self._running = 0
        self._ended = 0
        self._failed = 0
        self._tokens = 0
        self._former: tuple[bool, float, float] | None = None

    @contextmanager
    def request(self) -> Generator[None]:
        """A request runs. What an exception ends has failed, unless it was cut by who asked."""
        with self._lock:
            self._running += 1
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            with self._lock:
                self._running -= 1
                self._ended += 1
                self._failed += failed

    @property
    def is_idle(self) -> bool:
        """No request runs."""
        return not self._running

    def write(self, tokens: int) -> None:
        """It has written so many tokens for us."""
        with self._lock:
            self._tokens += tokens

    def figures(self, metrics: Metrics | None, now: float) -> EngineFigures:
        """What is to be told of it; `metrics` is what it says itself. Tokens per second are those since the last time."""
        with self._lock:
            running, ended, failed, tokens = self._running, self._ended, self._failed, float(self._tokens)
        is_whole = metrics is not None
        written = tokens if metrics is None else metrics.tokens
        former, self._former = self._former, (is_whole, now, written)
        rate = 0.0
        if former is not None and former[0] == is_whole and now > former[1]:
            rate = max(written - former[2], 0.0) / (now - former[1])
        if metrics is None:
            return EngineFigures(running, None, None, round(rate, 3), ended, failed, is_whole)
        return EngineFigures(metrics.running, metrics.waiting, metrics.cache_used, round(rate, 3), ended, failed, is_whole)


class EngineUses:
    """All servers that a process has asked, the first `MOST_ENGINES` of them. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[tuple[str, str], EngineUse] = {}

    def of(self, url: str, api_key: str) -> EngineUse:
        """The one of a server."""
        with self._lock:
            use = self._uses.get((url, api_key))
            if use is None:
                use = EngineUse(url, api_key)
                if len(self._uses) < MOST_ENGINES:
                    self._uses[url, api_key] = use
            return use

    def forget(self, use: EngineUse) -> bool:
        """It is not told of any more, unless a request runs there, which False says."""
        with self._lock:
            if use.is_idle:
                self._uses.pop((use.url, use.api_key), None)
            return use.is_idle

    def all(self) -> list[EngineUse]:
        """All of them."""
        with self._lock:
            return list(self._uses.values())


engine_uses: ContextVar[EngineUses | None] = ContextVar("nalar_engine_uses", default=None)
"""Where the requests of the running code are counted."""
