"""Policies that come with the runtime. Each is short enough to be read at one look, and to be copied and changed.

The first three are what a controller does if nobody tells it otherwise: `default()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Final

import numpy as np

from nalar_mq.columns import QUEUED

from .policy import (
    LEVELS,
    Action,
    Composed,
    SetPriorities,
    by_rank,
    kill,
    limit,
    migrate,
    provision,
    route,
    set_priority,
)
from .view import View


class LeastLoaded:
    """Calls go to where less is waiting."""

    def decide(self, view: View) -> Iterable[Action]:
        """Weights for agents of which an instance has more than it can run at once, and another one much less of it.

        The least loaded instance has the weight 1; all are rounded, so that they change when the loads do and not all the time.
        """
        for agent in view.agents:
            serving = view.serving(agent)
            loads = [replica.load for replica in serving]
            if not loads or max(loads) <= 1:
                continue
            weights = [max(round((1 + min(loads)) / (1 + load), 1), 0.1) for load in loads]
            if min(weights) < 1:
                yield route(agent, [replica.worker for replica in serving], weights, reason="by what is queued and running")


class HeadOfLine:
    """Sessions that wait behind a long call go to instances that have room."""

    def __init__(self, running_s: float = 0.5, moves: int = 8) -> None:
        self.running_s = running_s
        self.moves = moves

    def decide(self, view: View) -> Iterable[Action]:
        """At most `moves` sessions leave an instance at a time, the longest waiting first."""
        given: Counter[str] = Counter()
        for agent, worker, rows in view.queued_behind(self.running_s):
            rested = [replica.worker for replica in view.serving(agent) if replica.load < 1 and replica.worker != worker]
            if view.agents[agent].stateful or not rested:
                continue
            waiting = dict.fromkeys(view.futures.session[rows[np.argsort(-view.waited(rows))]].tolist())
            for session in list(waiting)[: self.moves]:
                target = min(rested, key=lambda name: given[name])
                given[target] += 1
                reason = f"behind a call of more than {self.running_s:g} s"
                yield migrate(view.sessions.name(session), agent, worker, target, reason=reason)


class Reallocation:
    """An agent that cannot follow, or has no instance, gets one where there is room for it; one that idles makes room.

    An instance ends in one round, and another one begins in a later one: never is more reserved than there is.
    """

    def __init__(self, busy: float = 2.0, idle: float = 0.2) -> None:
        self.busy = busy
        self.idle = idle

    def decide(self, view: View) -> Iterable[Action]:
        """One instance for the busiest agent, and one less of the idlest one that reserves the same."""
        agents, rooms = view.agents, tuple(view.nodes)
        for agent in [agent for agent, serves in view.able.items() if serves.resources and agent not in agents]:
            place = next((node for node in rooms if view.has_room(node, agent) and view.spare(agent, node)), "")
            if place:
                yield provision(agent, place, reason=f"nobody serves {agent!r}")
        loads = {agent: view.load(agent) for agent in agents if agents[agent].resources and view.serving(agent)}
        taker = max(loads, key=lambda agent: loads[agent], default="")
        if not taker or loads[taker] < self.busy:
            return
        reason = f"{taker!r} has {loads[taker]:.1f} calls for each that it can run"
        nodes = [node for node in rooms if view.has_room(node, taker)]
        if nodes:
            yield provision(taker, nodes[0], reason=reason)
        spare = [agent for agent in loads if len(view.serving(agent)) > max(agents[agent].min_instances, 1)]
        givers = [agent for agent in spare if agents[taker].resources.keys() <= agents[agent].resources.keys()]
        giver = min(givers, key=lambda agent: loads[agent], default="")
        if giver and loads[giver] <= self.idle:
            idlest = min(view.serving(giver), key=lambda replica: replica.load)
            yield kill(idlest.worker, giver, reason=f"{reason}, {giver!r} has {loads[giver]:.1f}")


class Overload:
    """An agent that cannot follow gets another instance on a node of which a worker that does not serve it has room."""

    def __init__(self, busy: float = 2.0) -> None:
        self.busy = busy

    def decide(self, view: View) -> Iterable[Action]:
        """One instance on a node, for each agent of which one there has too much, and none has room."""
        reserving = [agent for agent, serves in view.agents.items() if serves.resources]
        for node, agent in ((node, agent) for node in view.nodes for agent in reserving):
            loads = [replica.load for replica in view.serving(agent) if replica.node == node]
            if not loads or max(loads) < self.busy or min(loads) < 1:
                continue
            if view.spare(agent, node) and view.has_room(node, agent):
                yield provision(agent, node, reason=f"one of {node!r} has {max(loads):.1f} calls for each that it can run")


def default() -> Composed:
    """Route by load, move what waits behind long calls, give instances to those who need them."""
    return Composed(LeastLoaded(), HeadOfLine(), Reallocation())


class ShortestRemaining:
    """Sessions with the least work ahead go first: late stages of the call graph before early ones."""

    def decide(self, view: View) -> Iterable[Action]:
        """Ranks every live future by the work that is ahead of it in its session."""
        yield by_rank(view, view.remaining(view.live), reason="the least work ahead first")


class LongestFirst:
    """Sessions with the most work ahead go first, such as those that have re-entered: the last of all ends sooner."""

    def decide(self, view: View) -> Iterable[Action]:
        """Ranks every live future by the work that is ahead of it in its session."""
        yield by_rank(view, -view.remaining(view.live), reason="the most work ahead first")


class SessionAffinity:
    """A session stays with the instance of an agent that it has been to, unless that has too much to do."""

    def __init__(self, agents: Iterable[str] = (), most_load: float = 4.0) -> None:
        self.agents = tuple(agents)
        self.most_load = most_load

    def decide(self, view: View) -> Iterable[Action]:
        """For the named agents, or for all of them."""
        for agent in self.agents or view.agents:
            loads = {replica.worker: replica.load for replica in view.serving(agent)}
            for session, worker in view.homes(agent):
                if loads.get(worker, np.inf) <= self.most_load:
                    yield route(session, agent, worker, reason="it has been there before")


class HighPriority:
    """One session goes before all others, and does not wait where a sibling has room."""

    def __init__(self, session: str, value: int = 100) -> None:
        self.session = session
        self.value = value

    def decide(self, view: View) -> Iterable[Action]:
        """Raises its priority, and moves it."""
        if self.session not in view.sessions:
            return
        yield set_priority(self.session, self.value, reason="it was asked for")
        rows = view.rows_in(self.session)
        for row in rows[view.futures.state[rows] == QUEUED].tolist():
            agent, worker = view.agent_of(row), view.worker_of(row)
            idle = [replica.worker for replica in view.serving(agent) if replica.load < 1 and replica.worker != worker]
            if idle and not view.agents[agent].stateful:
                yield migrate(self.session, agent, worker, idle[0], reason="it waits, and there is room")


class FairShare:
    """Tenants that use less than their share go before those that use more."""

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self.shares = shares or {}

    def decide(self, view: View) -> Iterable[Action]:
        """Ranks tenants by their live futures, each in proportion to its share; all shares are 1 unless told otherwise."""
        sessions = view.sessions.used()
        tenants = view.session_tenant[sessions]
        shares = np.array([self.shares.get(name, 1.0) for name in view.tenants])
        used = np.bincount(tenants, weights=view.session_live[sessions], minlength=len(shares)) / shares
        ranks = np.argsort(np.argsort(-used, kind="stable"))
        values = np.minimum(ranks, LEVELS - 1).astype(np.int32)
        yield SetPriorities(sessions, values[tenants], "tenants that use less go first")


class DeadlineFirst:
    """Who can wait least goes first: by the time to the deadline that the work ahead leaves."""

    def decide(self, view: View) -> Iterable[Action]:
        """Ranks every live future by its slack."""
        slack_s = view.futures.deadline[view.live] - view.now - view.remaining(view.live)
        yield by_rank(view, slack_s, reason="the least time to spare first")


class BudgetLimits:
    """Tenants, sessions and jobs that have spent what they may begin nothing more."""

    def __init__(
        self,
        tenants: Mapping[str, float] | None = None,
        per_session: float = np.inf,
        per_job: float = np.inf,
        unit: str = "tokens",
        refuses: bool = False,
    ) -> None:
        self.tenants, self.most, self.unit, self.refuses = tenants or {}, (per_session, per_job), unit, refuses

    def decide(self, view: View) -> Iterable[Action]:
        """Nothing of theirs begins any more at any agent: it waits until they may spend more, or, if so wanted, is refused."""
        spent, unit = view.spending, self.unit
        over = [("tenant", name, most) for name, most in self.tenants.items() if spent.total("tenant", name, unit) >= most]
        for scope, most, names in zip(("session", "job"), self.most, (view.sessions, view.jobs), strict=True):
            over += [(scope, name, most) for name in spent.over(scope, most, unit) if name in names]
        for (scope, name, most), agent in product(over, view.agents):
            why = f"{scope} {name!r} has spent {most:g} {unit}"
            yield limit(agent, 0, **{scope: name}, refuses=self.refuses, reason=why)


# Those that say nothing before they are told what about, with an example of it.
MADE_WITH_ARGUMENTS: Final[Mapping[str, str]] = {
    "HighPriority": '"ann"',
    "BudgetLimits": '{"acme": 1e6}, per_job=20_000',
}
