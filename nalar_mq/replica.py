"""One running copy of an actor type: its mailbox, its instances, and how it runs what the mailbox gives out."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from nalar_mq import values
from nalar_mq.actor import ActorSpec
from nalar_mq.errors import ArgumentError, StateSchemaError
from nalar_mq.logs import logger
from nalar_mq.mailbox import Mailbox
from nalar_mq.schema import upgraded
from nalar_mq.session_state import Entries, SessionState
from nalar_mq.state import Arrival, bind, field_fits, state_of
from nalar_mq.stores import Kept, Stores
from nalar_mq.stub import settle, unsettle

_log = logger(__name__)


class Replica:
    """An actor type in this worker.

    Attributes:
        spec: what it is.
        mailbox: its pending calls.
        holders: the id of the call that holds a session, of stateful actors.
        held: sessions of stateful actors whose state is in memory, each with the keys of its instances.
        instances: by their keys; one that is not there has to be made.
        workflow: its name if it is a workflow, else empty.
        uses_loop: its async code runs on the loop.

    Instances of a stateful agent are kept per session and construction; an agent without state has one instance for each
    set of constructor arguments. They are made in threads, since constructors may load models.
    """

    def __init__(self, spec: ActorSpec, loop: asyncio.AbstractEventLoop, stores: Stores | None = None) -> None:
        self.spec = spec
        self.stores = stores if spec.is_kept else None
        self.mailbox = Mailbox(concurrency=spec.concurrency, per_session=spec.stateful)
        self.holders: dict[str, bytes] = {}
        self.held: dict[str, set[str]] = {}
        self.is_pumping = False
        self.workflow = spec.name if spec.kind == "workflow" else ""
        is_driver = spec.transparent and spec.kind == "workflow"
        self.uses_loop = not is_driver and spec.directives.isolation == "thread"
        self._loop = loop
        self.instances: dict[str, Any] = {}
        self._last_used: dict[str, float] = {}
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def has_instance(self, key: str) -> bool:
        """True if there is an instance under `key`."""
        return key in self.instances

    def has_used(self, key: str) -> bool:
        """A call of the instance under `key` has ended; False if there is none."""
        if key not in self.instances:
            return False
        self._last_used[key] = self._loop.time()
        return True

    def make(self, key: str, init: bytes, kept: Kept | None = None, arrival: Arrival | None = None) -> Any:
        """The instance under `key`, made if there is none, in a thread.

        Args:
            key: of the instance.
            init: arguments of its constructor, as they travel.
            kept: where its state is, if the caller knows.
            arrival: its state, if the caller has it.

        Raises:
            BaseException: whatever the constructor or `on_start` raises.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            found = self.instances.get(key)
            if found is None:
                args, kwargs = values.decode_arguments(init) if init else ([], {})
                found = self._constructed(key, args, kwargs, kept, arrival)
                if self.spec.transparent:
                    settle(self.spec, found, key, init)
                self._hook(found, "on_start")
                self.instances[key] = found
                self._last_used[key] = self._loop.time()
            return found

    def _constructed(
        self, key: str, args: list[Any], kwargs: dict[str, Any], kept: Kept | None, arrival: Arrival | None
    ) -> Any:
        target: Any = self.spec.target
        try:
            if not self.spec.managed:
                return target(*args, **kwargs)
            found = target.__new__(target, *args, **kwargs)
            self._bind(found, key, kept, arrival)
            state = state_of(found)
            state.is_beginning = self.spec.transparent
            found.__init__(*args, **kwargs)
            state.end_beginning()
            return found
        except TypeError as error:
            below = error.__traceback__ and error.__traceback__.tb_next
            if args or kwargs or below is not None:
                raise
            who = f"agent {self.spec.name!r} is made with arguments, so that only a workflow that makes it can call it"
            raise ArgumentError(f"{who}: {error}") from None

    def _bind(self, instance: object, key: str, kept: Kept | None, arrival: Arrival | None) -> None:
        state = SessionState(f"{self.spec.name}[{key}]", is_kept=True)
        if arrival is not None and kept is not None:
            state.kept = kept
            self._check_kinds(kept, key)
            arrival.bind(instance, state)
            return
        entries: Entries = {}
        if self.stores is not None:
            state.kept = kept or self.stores.session(self.spec.name, key)
            entries = self.stores.load(state.kept)
            if state.kept.session.is_kept and (state.kept.session.schema or 1) != self.spec.state_version:
                entries = self._upgraded(self.stores, state.kept, key, entries)
            self._check_kinds(state.kept, key)
        bind(instance, state, entries)

    def _upgraded(self, stores: Stores, kept: Kept, key: str, entries: Entries) -> Entries:
        """What a former version of the agent has kept, as the present one keeps it; that is durable when it returns."""
        header, where = kept.session.header, f"{self.spec.name}[{key}]"
        assert header is not None
        version = header.schema or 1
        target = self.spec.target
        assert isinstance(target, type)
        changes = upgraded(target, self.spec.upgrades, where, version, header.kinds, entries)
        stores.change(kept, changes, schema=self.spec.state_version, kinds=self.spec.managed_kinds)
        _log.info("session.upgraded", actor=self.spec.name, session=key, version=self.spec.state_version, former=version)
        return stores.load(kept)

    def _check_kinds(self, kept: Kept, key: str) -> None:
        """Raises `StateSchemaError` if what was kept are other fields than the class has now."""
        header = kept.session.header
        for name, kind in header.kinds.items() if header is not None else ():
            now, target = self.spec.managed_kinds.get(name), self.spec.target
            is_same = now == kind or (isinstance(target, type) and field_fits(target, name, kind))
            if not is_same and header is not None and header.sums.get(name, (0, 0))[0]:
                is_what = f"is a {now} now" if now else "is not there any more"
                raise StateSchemaError(
                    f"{self.spec.name}[{key}] was kept with a {kind} {name!r}, which {is_what}: bring the field back, or say "
                    f"with @upgrade({self.spec.state_version}) what becomes of it"
                )

    def _hook(self, instance: Any, name: str) -> None:
        hook: Callable[[], Coroutine[Any, Any, None] | None] | None = getattr(instance, name, None)
        if not callable(hook):
            return
        result = hook()
        if inspect.iscoroutine(result):
            asyncio.run_coroutine_threadsafe(result, self._loop).result()

    def idle(self, prefix: str, before: float) -> list[str]:
        """Keys that begin with `prefix` and have not been used since `before`."""
        return [key for key, at in list(self._last_used.items()) if at < before and key.startswith(prefix)]

    def was_used_since(self, at: float) -> bool:
        """True if a call of any instance has ended since then, or an instance was made."""
        return any(used >= at for used in list(self._last_used.values()))

    def take_out(self, key: str) -> Any | None:
        """The instance under `key`, for `end`: whoever asks for it from now on gets another."""
        instance = self.instances.pop(key, None)
        self._last_used.pop(key, None)
        self._making.pop(key, None)
        return instance

    def end(self, instance: Any | None) -> None:
        """Ends an instance that has been taken out, with its `on_stop`; in a thread."""
        if instance is None:
            return
        if self.spec.transparent:
            unsettle(self.spec, instance)
        try:
            self._hook(instance, "on_stop")
        except Exception as error:
            _log.warning("agent.on_stop_failed", actor=self.spec.name, error=repr(error))

    def stop(self) -> None:
        """Ends all instances; in a thread."""
        for key in list(self.instances):
            self.end(self.take_out(key))
