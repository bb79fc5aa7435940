"""What a controller sees, in a few rows for people: `nalar top`. Pure.

    asker ──▶ NS.overview ──▶ the leader ──Overview, as JSON──▶ asker

Rows are cut where there are too many, the most loaded and the longest waiting ones first: the answer fits into a message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

from nalar_mq.actions import Decided
from nalar_mq.columns import CREATED, QUEUED, STATES
from nalar_mq.errors import MalformedMessageError, MissedReportError

from .view import View

AGENTS: Final = 200
NODES: Final = 200
WORKERS: Final = 64
WAITS: Final = 20
DECISIONS: Final = 20
ENGINES: Final = 64
SPENT: Final = 40


class AgentRow(msgspec.Struct, frozen=True):
    """An agent, tool or workflow, over all its instances; times are means of lately, in seconds."""

    name: str
    kind: str
    instances: int
    queued: int
    running: int
    load: float
    imbalance: float
    work_s: float
    wait_s: float


class NodeRow(msgspec.Struct, frozen=True):
    """A machine: the first of its workers, how many there are, their calls, and resources, used and available."""

    name: str
    workers: tuple[str, ...]
    count: int
    queued: int
    running: int
    resources: dict[str, tuple[float, float]]


class EngineRow(msgspec.Struct, frozen=True):
    """A model server: how many workers ask it, and what it does; None is what it does not say."""

    name: str
    workers: int
    running: int
    waiting: int | None
    cache_used: float | None
    tokens_per_s: float
    requests: int
    errors: int


class SpentRow(msgspec.Struct, frozen=True):
    """What a tenant or a workflow has cost."""

    scope: str
    name: str
    unit: str
    amount: float


class WaitRow(msgspec.Struct, frozen=True):
    """A call that waits to begin."""

    future: str
    session: str
    call: str
    worker: str
    state: str
    waited_s: float
    priority: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader sees and does.

    Attributes:
        controller, policy, term: who leads.
        error: why the policy gives no answer, or cannot be loaded as it is now; empty if all is well.
        rounds: it has made.
        round_s: how long the last one took.
        processes, futures, sessions: of which it knows.
        unused: reports that were refused, by the reason; not those after a gap, which are told anew.
        nodes, agents, waits, engines, spent: rows.
        decisions: the last ones, the newest last.
    """

    controller: str
    policy: str
    term: int
    rounds: int
    round_s: float
    processes: int
    futures: int
    sessions: int
    unused: dict[str, int]
    nodes: tuple[NodeRow, ...]
    agents: tuple[AgentRow, ...]
    waits: tuple[WaitRow, ...]
    decisions: tuple[Decided, ...]
    error: str = ""
    engines: tuple[EngineRow, ...] = ()
    spent: tuple[SpentRow, ...] = ()


def overview_of(
    view: View,
    *,
    controller: str,
    policy: str,
    term: int,
    rounds: int,
    round_s: float,
    decisions: Iterable[Decided],
    error: str = "",
) -> Overview:
    """The rows of a view, with who looks at it."""
    return Overview(
        controller=controller,
        policy=policy,
        term=term,
        rounds=rounds,
        round_s=round(round_s, 6),
        processes=len(view.processes),
        futures=len(view.futures),
        sessions=len(view.sessions),
        unused={error: count for error, count in view.refused.items() if error != MissedReportError.__name__},
        nodes=node_rows(view),
        agents=agent_rows(view),
        waits=wait_rows(view),
        decisions=tuple(decisions)[-DECISIONS:],
        error=error,
        engines=engine_rows(view),
        spent=spent_rows(view),
    )


def engine_rows(view: View) -> tuple[EngineRow, ...]:
    """The engines, those with the most requests first."""
    rows = [
        EngineRow(engine.name, len(engine.workers), *engine[2:5], round(engine.tokens_per_s, 1), engine.requests, engine.errors)
        for engine in view.engines.values()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.running - (row.waiting or 0), row.name))[:ENGINES])


def spent_rows(view: View) -> tuple[SpentRow, ...]:
    """What tenants and workflows have cost, those that have spent most first."""
    rows = [
        SpentRow(scope, name, unit, round(amount, 6))
        for scope in ("tenant", "workflow")
        for unit in view.spending.units()
        for name, amount in view.spending.totals(scope, unit).items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.unit, row.scope, -row.amount, row.name))[:SPENT])


def agent_rows(view: View) -> tuple[AgentRow, ...]:
    """The agents, the most loaded ones first."""
    times = _times(view)
    rows = [
        AgentRow(
            name,
            serves.kind,
            len(replicas),
            sum(replica.queued for replica in replicas),
            sum(replica.running for replica in replicas),
            round(view.load(name), 3),
            round(view.imbalance(name), 3),
            *times.get(name, (0.0, 0.0)),
        )
        for name, serves in view.agents.items()
        for replicas in [view.replicas(name)]
    ]
    return tuple(sorted(rows, key=lambda row: (-row.load, row.name))[:AGENTS])


def _times(view: View) -> dict[str, tuple[float, float]]:
    """Mean times of work and of waiting, over the methods of each agent."""
    found: dict[str, list[tuple[float, float]]] = {}
    for number, (agent, _) in enumerate(view.kinds):
        found.setdefault(agent, []).append((float(view.service_s[number]), float(view.wait_s[number])))
    return {agent: (_mean(work for work, _ in times), _mean(wait for _, wait in times)) for agent, times in found.items()}


def _mean(values: Iterable[float]) -> float:
    seen = [value for value in values if value > 0]
    return round(sum(seen) / len(seen), 6) if seen else 0.0


def node_rows(view: View) -> tuple[NodeRow, ...]:
    """The nodes, those with the most calls in hand first."""
    queued: dict[str, int] = {}
    running: dict[str, int] = {}
    for agent in view.agents:
        for replica in view.replicas(agent):
            queued[replica.node] = queued.get(replica.node, 0) + replica.queued
            running[replica.node] = running.get(replica.node, 0) + replica.running
    rows = [
        NodeRow(
            node.name,
            node.workers[:WORKERS],
            len(node.workers),
            queued.get(node.name, 0),
            running.get(node.name, 0),
            dict(node.resources),
        )
        for node in view.nodes.values()
        if node.workers
    ]
    return tuple(sorted(rows, key=lambda row: (-row.queued - row.running, row.name))[:NODES])


def wait_rows(view: View) -> tuple[WaitRow, ...]:
    """The calls that have waited the longest and have not begun."""
    futures, live = view.futures, view.live
    state = futures.state[live]
    waiting = live[(state == QUEUED) | (state == CREATED)]
    longest = waiting[np.argsort(futures.arrived[waiting], kind="stable")[:WAITS]]
    return tuple(
        WaitRow(
            view.id_of(row).hex(),
            view.sessions.name(int(futures.session[row])),
            ".".join(filter(None, view.kinds[int(futures.kind[row])])),
            view.worker_of(row),
            STATES[int(futures.state[row])],
            round(waited_s, 3),
            int(futures.priority[row]),
        )
        for row, waited_s in zip(longest.tolist(), view.waited(longest).tolist(), strict=True)
    )


def encode_overview(overview: Overview) -> bytes:
    """JSON of it."""
    return msgspec.json.encode(overview)


def decode_overview(data: bytes) -> Overview:
    """Reads it.

    Raises:
        MalformedMessageError: it is none.
    """
    try:
        return msgspec.json.decode(data, type=Overview)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
