"""Small worlds for policies to look at, told of by real reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nalar_mq.changes import Changes, Tracked
from nalar_mq.columns import DONE, QUEUED, RUNNING, Serves
from nalar_mq.controllers.view import View
from nalar_mq.messages import Call


class World:
    """Processes that report to one view. Time is what `tick` makes of it."""

    def __init__(self) -> None:
        self.view = View()
        self.now = 100.0
        self.changes: dict[str, Changes] = {}
        self._queues: dict[str, dict[str, tuple[int, int]]] = {}
        self._calls = 0

    def worker(
        self,
        name: str,
        node: str = "n1",
        resources: dict[str, tuple[float, float]] | None = None,
        able: Mapping[str, Serves] | tuple[str, ...] | None = None,
        **serves: Serves | None,
    ) -> None:
        """A process that serves these agents; `able` are those of its app, if it tells them."""
        changes = self.changes[name] = Changes(name, 1, node)
        changes.set_serves({agent: what or Serves("agent") for agent, what in serves.items()})
        changes.set_resources(resources or {})
        if able is not None:
            changes.set_able(able if isinstance(able, Mapping) else dict.fromkeys(able, Serves("agent")))
        self._queues[name] = {}

    def queue(self, name: str, **queues: tuple[int, int]) -> None:
        """What it has queued and running, by agent."""
        self._queues[name] |= queues
        self.changes[name].set_queues(self._queues[name])

    def call(self, worker: str, agent: str, session: str, state: int = QUEUED, *, tenant: str = "", **fields: Any) -> Tracked:
        """A call that has come."""
        self._calls += 1
        id = fields.pop("id", self._calls.to_bytes(16, "big"))
        call = Call(id, agent, "run", b"", **{"session": session, "tenant": tenant, **fields})
        future = self.changes[worker].begin(call, self.now, QUEUED, tenant)
        if state != QUEUED:
            self.changes[worker].change(future, state, self.now)
        return future

    def spend(self, worker: str, future: Tracked, amount: float, unit: str = "tokens") -> None:
        """A call in a worker has cost something."""
        self.changes[worker].spend(future.call, "", amount, unit)

    def teach(self, worker: str, agent: str, seconds: float, session: str = "", times: int = 20) -> None:
        """Calls of an agent that take so long have been seen before; in one session, one after the other."""
        for number in range(times):
            future = self.call(worker, agent, session or f"earlier-{number}", RUNNING)
            self.tick(seconds)
            self.changes[worker].end(future, DONE, self.now)
            self.tick(0.0)

    def tick(self, seconds: float = 0.0) -> View:
        """Time passes, then everybody reports."""
        for name, changes in self.changes.items():
            for data in changes.reports(self.now, 1 << 20):
                self.view.fold(name, data, self.now)
        self.now += seconds
        self.view.settle(self.now)
        return self.view
