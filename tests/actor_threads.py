"""Actors for tests of rewriting: each call runs in a thread of its own, its arguments and results travel as bytes."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nalar_mq import moves, values
from nalar_mq.future import Future


class _NoCaller:
    loop = object()

    def cancel(self, future: Any, reason: str) -> None:
        raise NotImplementedError

    def credit(self, future: Any, limit: int) -> None:
        raise NotImplementedError


class Calls:
    """Runs calls; a seeded delay varies the order in which they end."""

    def __init__(self, seed: int = 0, max_delay_s: float = 0.002) -> None:
        self._random = random.Random(seed)
        self._max_delay_s = max_delay_s
        self._lock = threading.Lock()
        self.by_id: dict[bytes, Future[Any]] = {}
        self.count = 0

    def start(self, what: str, f: Any, args: Any, kwargs: Any, pool: ThreadPoolExecutor | None = None) -> Future[Any]:
        future: Future[Any] = Future(_NoCaller(), os.urandom(16), what)  # type: ignore[arg-type]
        deps: list[values.Deferred] = []
        payload = values.encode_arguments(args, kwargs, deps)
        with self._lock:
            self.by_id[future.id] = future
            self.count += 1
            delay_s = self._random.random() * self._max_delay_s
        work = (future, f, payload, delay_s)
        if pool is None:
            threading.Thread(target=self._run, args=work, daemon=True).start()
        else:
            pool.submit(self._run, *work)
        return future

    def _run(self, future: Future[Any], f: Any, payload: bytes, delay_s: float) -> None:
        time.sleep(delay_s)
        try:
            args, kwargs = values.decode_arguments(payload, lambda id: self._peek(id))
            future.resolve(values.encode(f(*args, **kwargs)))
        except BaseException as error:
            future.fail(error)

    def _peek(self, id: bytes) -> Any:
        future = self.by_id[id]
        done = threading.Event()
        if future.on_end(done.set):
            done.wait(30)
        error = future.error()
        if error is not None:
            raise error
        payload = future.payload()
        assert payload is not None
        return values.decode(payload)


class ToolActor:
    __nalar_actor__ = True

    def __init__(self, calls: Calls, function: Any) -> None:
        self.calls = calls
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return moves.delivered(self.calls.start(self.function.__name__, self.function, args, kwargs))


class MethodActor:
    __nalar_actor__ = True

    def __init__(self, instance: InstanceActor, name: str) -> None:
        self.instance = instance
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return moves.delivered(vars(self.instance)["_start"](self.name, args, kwargs))


class InstanceActor:
    """One agent: its calls run one after the other."""

    def __init__(self, calls: Calls, cls: type, args: Any, kwargs: Any) -> None:
        pool = ThreadPoolExecutor(1)
        made: list[Any] = []
        self._cls = cls
        self._made = calls.start(cls.__name__, lambda *a, **k: made.append(cls(*a, **k)), args, kwargs, pool)

        def start(name: str, args: Any, kwargs: Any) -> Future[Any]:
            return calls.start(name, lambda *a, **k: getattr(made[0], name)(*a, **k), args, kwargs, pool)

        def read(name: str) -> Any:
            return calls.start(name, lambda: getattr(made[0], name), (), {}, pool).value()

        self._start = start
        self._read = read

    @property
    def __class__(self) -> Any:
        return self._cls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if callable(getattr(vars(self)["_cls"], name, None)):
            return MethodActor(self, name)
        return vars(self)["_read"](name)


class AgentActor:
    __nalar_actor__ = True

    def __init__(self, calls: Calls, cls: type) -> None:
        self.calls = calls
        self.cls = cls

    def __call__(self, *args: Any, **kwargs: Any) -> InstanceActor:
        return InstanceActor(self.calls, self.cls, args, kwargs)

    def __instancecheck__(self, x: object) -> bool:
        return isinstance(x, self.cls)


def stand_in(module: Any, calls: Calls) -> None:
    """Puts actors in the places of the tools and agents of a module."""
    for original in [*getattr(module, "TOOLS", ()), *getattr(module, "AGENTS", ())]:
        actor = AgentActor(calls, original) if isinstance(original, type) else ToolActor(calls, original)
        moves.stand_in(original, actor)
        setattr(module, original.__name__, actor)
