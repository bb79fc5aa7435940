"""The live picture of everything: reports of all processes folded into numpy columns, for policies to look at. Pure.

    reported: futures, sessions, kinds ──settle──▶ parents, depths, work ahead ◀── queries of policies

* `settle` connects what has been folded since the last time: who made whom, how deep, and what follows what. Rows, names and
  figures are of the last `settle`; it costs what has changed, not what there is.
* What a policy asks of all futures is one pass over columns; what it asks of one is a look-up.

How much work is ahead of a future (`remaining`) is learnt from what followed earlier calls of its kind in their sessions: its
own mean time, and what was ahead of the call that began next (temporal differences).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from nalar_mq.address import Address
from nalar_mq.columns import QUEUED, RUNNING, WAITING, EngineFigures, Serves, bucket_floor_s

from .processes import Process
from .reported import Reported
from .tables import Floats, Ints, Longs

_RATE: Final = 0.05
_TRIES: Final = 3  # settlements in which a parent that was not told of yet is looked for
_DEEPEST: Final = 1024
_NOT_HELD: Final = -1


class Replica(NamedTuple):
    """What runs calls of an agent in one worker; its worker's name is the name of the instance."""

    agent: str
    worker: str
    incarnation: int
    node: str
    queued: int
    running: int
    concurrency: int
    is_draining: bool

    @property
    def load(self) -> float:
        """Calls in hand for each that it can run at once."""
        return (self.queued + self.running) / self.concurrency


class Node(NamedTuple):
    """A machine or GPU: its workers, and what its processes report of its resources, used and available."""

    name: str
    workers: tuple[str, ...]
    resources: Mapping[str, tuple[float, float]]


class Engine(NamedTuple):
    """A model server that processes ask.

    Attributes:
        name: its host, port and path.
        workers: those who ask it.
        running, waiting: requests that it works on, and that wait there; `waiting` is None if it does not say.
        cache_used: of its KV cache, from 0 to 1; None if it does not say.
        tokens_per_s: that it writes.
        requests, errors: of all these workers, that have ended, and that it has failed or refused.
    """

    name: str
    workers: tuple[str, ...]
    running: int
    waiting: int | None
    cache_used: float | None
    tokens_per_s: float
    requests: int
    errors: int


def _engine_of(name: str, told: Sequence[tuple[Process, EngineFigures]]) -> Engine:
    """What it says of itself if it does, by who was heard last; else what those who ask it have in hand, together."""
    figures = [each for _, each in told]
    whole = next((each for each in reversed(figures) if each.is_whole), None)
    return Engine(
        name,
        tuple(sorted(process.name for process, _ in told)),
        sum(each.running for each in figures) if whole is None else whole.running,
        None if whole is None else whole.waiting,
        None if whole is None else whole.cache_used,
        sum(each.tokens_per_s for each in figures) if whole is None else whole.tokens_per_s,
        sum(each.requests for each in figures),
        sum(each.errors for each in figures),
    )


class View(Reported):
    """What has been reported, and what can be asked of it.

    Attributes:
        now: of the last `settle`.
        version: grows with each `settle`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.version = 0
        self._orphans: list[tuple[int, Ints, Longs]] = []
        self._replicas: dict[str, tuple[Replica, ...]] | None = None
        self._live: Ints | None = None
        self._able: Mapping[str, Serves] | None = None
        self._left: dict[str, dict[str, float]] | None = None

    # Settling.

    def settle(self, now: float) -> None:
        """Connects what has been folded since the last time; queries answer from here on as of `now`."""
        self.now = now
        self.version += 1
        self._replicas = None
        self._live = self._able = self._left = None
        self._count_sessions()
        rows = self.futures.settle()
        self._learn(rows)
        self._find_parents(rows)
        self._edges.settle(self.futures)
        self.sessions.settle()
        self.jobs.settle()

    def _count_sessions(self) -> None:
        """Where nothing is left in a session, no work was ahead of what began there last."""
        came, went, self._came, self._went = self._came, self._went, [], []
        room = len(self.session_live)
        if came:
            self.session_live += np.bincount(np.concatenate(came), minlength=room).astype(np.int32)
        if not went:
            return
        left = np.concatenate(went)
        self.session_live -= np.bincount(left, minlength=room).astype(np.int32)
        resting = np.unique(left[self.session_live[left] == 0])
        last = self._last_kind[resting]
        self._last_kind[resting] = -1
        ended = last[last >= 0]
        self._nudge(ended, self.service_s[ended])

    def _learn(self, rows: Ints) -> None:
        """What began in a session is what was ahead of the call that began there before it."""
        if not len(rows):
            return
        futures = self.futures
        rows = rows[np.lexsort((futures.birth[rows], futures.arrived[rows], futures.session[rows]))]
        kinds, sessions = futures.kind[rows], futures.session[rows]
        is_first = np.append(True, sessions[1:] != sessions[:-1])
        before = np.where(is_first, self._last_kind[sessions], np.append(np.int32(-1), kinds[:-1]))
        follows = before >= 0
        self._nudge(before[follows], self.service_s[before[follows]] + self._ahead_s[kinds[follows]])
        is_last = np.append(is_first[1:], True)
        self._last_kind[sessions[is_last]] = kinds[is_last]

    def _nudge(self, kinds: Ints, targets: Floats) -> None:
        """Moves what is ahead of each kind towards the mean of its targets, the further the more there are."""
        counts = np.bincount(kinds, minlength=len(self._ahead_s))
        sums = np.bincount(kinds, weights=targets, minlength=len(self._ahead_s))
        seen = np.flatnonzero(counts)
        share = 1.0 - (1.0 - _RATE) ** counts[seen]
        self._ahead_s[seen] += share * (sums[seen] / counts[seen] - self._ahead_s[seen])

    def _find_parents(self, rows: Ints) -> None:
        """Looks for the parents of new rows, and a few times more for those that have not been told of yet."""
        births = self.futures.birth
        waiting, self._orphans = self._orphans, []
        for tried, lost, born in [(0, rows, births[rows]), *waiting]:
            lost = self._adopt(lost[births[lost] == born])
            if len(lost) and tried + 1 < _TRIES:
                self._orphans.append((tried + 1, lost, births[lost]))

    def _adopt(self, rows: Ints) -> Ints:
        """Notes the parents of rows that are alive; returns those whose parents are not, or are not known."""
        futures = self.futures
        rows = rows[(futures.parent_high[rows] | futures.parent_low[rows]) != 0]
        parents = futures.find(futures.parent_high[rows], futures.parent_low[rows])
        found = parents >= 0
        known, lost = rows[found], rows[~found]
        futures.parent[known] = parents[found]
        futures.parent_birth[known] = futures.birth[parents[found]]
        self._deepen(known, parents[found])
        return lost

    def _deepen(self, rows: Ints, parents: Ints) -> None:
        depth = self.futures.depth
        for _ in range(_DEEPEST):
            deeper = depth[parents] + 1
            if np.array_equal(deeper, depth[rows]):
                return
            depth[rows] = np.minimum(deeper, _DEEPEST)

    # Queries.

    @property
    def live(self) -> Ints:
        """Rows of all live futures."""
        if self._live is None:
            self._live = self.futures.live()
        return self._live

    @property
    def nbytes(self) -> int:
        """Memory of the columns of futures and of what they wait for."""
        return self.futures.nbytes + self._edges.nbytes + self._slots.futures.nbytes

    @property
    def agents(self) -> Mapping[str, Serves]:
        """What is served anywhere, by name."""
        return {name: serves for process in self._processes.values() for name, serves in process.serves.items()}

    @property
    def able(self) -> Mapping[str, Serves]:
        """What could be served anywhere, though nobody may serve it now, by name."""
        if self._able is None:
            processes = self._processes.values()
            found = {name: serves for process in processes for name, serves in (process.able or {}).items()}
            self._able = {**found, **self.agents}
        return self._able

    @property
    def processes(self) -> Mapping[str, Address]:
        """All processes that report, by name."""
        return {process.name: process.address for process in self._processes.values()}

    @property
    def workers(self) -> Mapping[str, Address]:
        """The processes that serve something, by name."""
        return {process.name: process.address for process in self._processes.values() if process.serves}

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All nodes by name."""
        workers: dict[str, list[str]] = {}
        resources: dict[str, dict[str, tuple[float, float]]] = {}
        for process in self._processes.values():
            of_node = workers.setdefault(process.node, [])
            if process.serves:
                of_node.append(process.name)
            resources.setdefault(process.node, {}).update(process.resources)
        return {name: Node(name, tuple(sorted(workers[name])), resources[name]) for name in sorted(workers)}

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The model servers that any process asks, by host, port and path, as they were told of last."""
        told: dict[str, list[tuple[Process, EngineFigures]]] = {}
        for process in sorted(self._processes.values(), key=lambda process: process.heard_at):
            for name, figures in process.engines.items():
                told.setdefault(name, []).append((process, figures))
        return {name: _engine_of(name, told[name]) for name in sorted(told)}

    def left(self, node: str, resource: str) -> float:
        """How much of a resource of a node is neither used nor reserved by the instances there."""
        if self._left is None:
            self._left = {name: self._left_of(found) for name, found in self.nodes.items()}
        return self._left.get(node, {}).get(resource, 0.0)

    def _left_of(self, node: Node) -> dict[str, float]:
        """How much of each resource of a node is left."""
        reserved: dict[str, float] = {}
        for serves in (serves for worker in node.workers for serves in self._processes[worker].serves.values()):
            for name, amount in serves.resources.items():
                reserved[name] = reserved.get(name, 0.0) + amount
        known = {**dict.fromkeys(reserved, (0.0, 0.0)), **node.resources}
        return {name: whole - max(used, reserved.get(name, 0.0)) for name, (used, whole) in known.items()}

    def has_room(self, node: str, agent: str) -> bool:
        """True if a node has what another instance of an agent would reserve."""
        serves = self.able.get(agent)
        return serves is not None and all(self.left(node, name) >= amount for name, amount in serves.resources.items())

    def spare(self, agent: str, node: str) -> list[Address]:
        """The workers of a node that could serve an agent besides what they serve, those that serve the least first."""
        found = [
            (len(process.serves), process.name, process.address)
            for process in self._processes.values()
            if process.node == node and agent not in process.serves and not process.is_draining and process.could_serve(agent)
        ]
        return [address for _, _, address in sorted(found)]

    def could_serve(self, agent: str, node: str) -> bool:
        """True if a worker of the node has the agent in its app, or does not tell what is there: others of it would have it."""
        return any(process.node == node and process.could_serve(agent) for process in self._processes.values())

    def node_of(self, worker: str) -> str:
        """The node of a worker; empty if it is not known."""
        process = self._processes.get(worker)
        return process.node if process is not None else ""

    def replicas(self, agent: str) -> tuple[Replica, ...]:
        """Where an agent is served, by name of the worker."""
        if self._replicas is None:
            self._replicas = self._all_replicas()
        return self._replicas.get(agent, ())

    def _all_replicas(self) -> dict[str, tuple[Replica, ...]]:
        found: dict[str, list[Replica]] = {}
        for name in sorted(self._processes):
            process = self._processes[name]
            for agent, serves in process.serves.items():
                queued, running = process.queues.get(agent, (0, 0))
                replica = Replica(
                    agent,
                    name,
                    process.incarnation,
                    process.node,
                    queued,
                    running,
                    max(serves.concurrency, 1),
                    process.is_draining,
                )
                found.setdefault(agent, []).append(replica)
        return {agent: tuple(replicas) for agent, replicas in found.items()}

    def serving(self, agent: str) -> tuple[Replica, ...]:
        """Its replicas that take new calls."""
        return tuple(replica for replica in self.replicas(agent) if not replica.is_draining)

    def load(self, agent: str) -> float:
        """Calls in hand of all its replicas that take new ones, for each that those can run at once."""
        serving = self.serving(agent)
        return sum(r.queued + r.running for r in serving) / sum(r.concurrency for r in serving) if serving else 0.0

    def imbalance(self, agent: str) -> float:
        """The greatest load of its replicas as a multiple of their mean; 1 if they are all alike, or idle."""
        loads = [replica.load for replica in self.replicas(agent)]
        return max(loads) * len(loads) / sum(loads) if loads and sum(loads) else 1.0

    def holder(self, session: str, agent: str) -> str:
        """The worker that holds the state of a session of an agent; empty if none is known."""
        return self._held.get((self._agents.numbers.get(agent, _NOT_HELD), self.sessions.number(session)), "")

    def worker_at(self, place: int) -> str:
        """The worker by the number in the column `process`."""
        process = self._places[place]
        return process.name if process is not None else ""

    def agent_numbers(self) -> Mapping[str, int]:
        """Numbers of agents as in `kind_agent`."""
        return self._agents.numbers

    def worker_of(self, row: int) -> str:
        """The worker that has a live future."""
        return self.worker_at(int(self.futures.process[row]))

    def agent_of(self, row: int) -> str:
        """The agent that a live future calls."""
        return self.kinds[int(self.futures.kind[row])][0]

    def homes(self, agent: str) -> Iterator[tuple[str, str]]:
        """Sessions with live futures of an agent, by name, and the worker that has the latest of each."""
        futures, live = self.futures, self.live
        rows = live[self.kind_agent[futures.kind[live]] == self._agents.numbers.get(agent, -1)]
        rows = rows[np.argsort(futures.arrived[rows], kind="stable")]
        latest = dict(zip(futures.session[rows].tolist(), futures.process[rows].tolist(), strict=True))
        for session, place in latest.items():
            yield self.sessions.name(session), self.worker_at(place)

    def id_of(self, row: int) -> bytes:
        """The id of a live future."""
        high, low = int(self.futures.high[row]), int(self.futures.low[row])
        return high.to_bytes(8, "little") + low.to_bytes(8, "little")

    def find(self, id: bytes) -> int:
        """The row of a live future, -1 if there is none."""
        halves = np.frombuffer(id, "<u8").astype(np.uint64)
        return int(self.futures.find(halves[:1], halves[1:])[0])

    def rows_in(self, session: str) -> Ints:
        """Rows of the live futures of a session; one pass."""
        number = self.sessions.number(session)
        return self.live[self.futures.session[self.live] == number] if number >= 0 else self.live[:0]

    def waited(self, rows: Ints) -> Floats:
        """Seconds that each has waited before it began, until now if it has not."""
        futures = self.futures
        began = futures.began[rows]
        return np.maximum(np.where(began > 0.0, began, self.now) - futures.arrived[rows], 0.0)

    def ran(self, rows: Ints) -> Floats:
        """Seconds since each began to run, what it waited for others included; 0 for those that have not."""
        began = self.futures.began[rows]
        return np.where(began > 0.0, np.maximum(self.now - began, 0.0), 0.0)

    def remaining(self, rows: Ints) -> Floats:
        """Seconds of work that are ahead of each in its session, its own included."""
        kinds = self.futures.kind.take(rows)  # twice as fast as an index
        ahead_s = self._ahead_s.take(kinds)
        running = np.flatnonzero(self.futures.state.take(rows) == RUNNING)
        ahead_s[running] -= np.minimum(self.ran(rows[running]), self.service_s[kinds[running]])
        return np.maximum(ahead_s, 0.0)

    def quantile(self, agent: str, method: str, share: float, *, waiting: bool = False) -> float:
        """The time of work, or of waiting, that this share of the calls of a method stays below."""
        number = self._kind_numbers.get((agent, method))
        if number is None:
            return 0.0
        counts = self._histogram[number, :256] if waiting else self._histogram[number, 256:]
        passed = np.cumsum(counts)
        if not passed[-1]:
            return 0.0
        return bucket_floor_s(int(np.searchsorted(passed, share * passed[-1])) + 1)

    def waits(self) -> tuple[Ints, Ints]:
        """All pairs of a live future that waits and a live one it waits for: its arguments, or the calls it has made."""
        futures, edges = self.futures, self._edges
        still = edges.waits(futures)
        needed = futures.find(edges.high[still], edges.low[still])
        by_argument = needed >= 0
        self._adopt(self.live[futures.parents(self.live) < 0])
        parents = futures.parents(self.live)
        by_call = (parents >= 0) & (futures.state[parents] == WAITING)
        waiters = np.concatenate((edges.waiter[still][by_argument], parents[by_call]))
        return waiters, np.concatenate((needed[by_argument], self.live[by_call]))

    def blockers(self, row: int) -> Ints:
        """What a live future waits for."""
        waiters, needed = self.waits()
        found: Ints = needed[waiters == row]
        return found

    def blocked(self, row: int) -> Ints:
        """What waits for a live future."""
        waiters, needed = self.waits()
        found: Ints = waiters[needed == row]
        return found

    def queued_behind(self, running_s: float) -> Iterator[tuple[str, str, Ints]]:
        """Where all calls that can run at once have run for longer than `running_s`: agent, worker, and what is queued.

        Futures of sessions that something runs of there are left out: they would have to wait anywhere.
        """
        futures, live = self.futures, self.live
        names = self._agents.names
        agents = max(len(names), 1)
        places = futures.process[live].astype(np.int64) * agents + self.kind_agent[futures.kind[live]]
        is_running = (futures.state[live] == RUNNING) | (futures.state[live] == WAITING)
        is_long = (futures.state[live] == RUNNING) & (self.ran(live) > running_s)
        is_queued = futures.state[live] == QUEUED
        size = len(self._places) * agents
        long_ones, queued_ones = (np.bincount(places[which], minlength=size) for which in (is_long, is_queued))
        for place in np.flatnonzero((long_ones > 0) & (queued_ones > 0)).tolist():
            process, agent = self._places[place // agents], names[place % agents]
            if process is None or agent not in process.serves or long_ones[place] < process.serves[agent].concurrency:
                continue
            here = places == place
            queued, busy = live[is_queued & here], futures.session[live[is_running & here]]
            yield agent, process.name, queued[~np.isin(futures.session[queued], busy)]
