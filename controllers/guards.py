"""What stands between a policy and the world: every action is valid, in reason, and not too soon, or is refused. Pure.

* *Validity*: agents, workers, nodes and sessions are in the view; an instance serves the agent, and the app of a node has
  it; a session of a `stateful` agent never moves, and one whose state is somewhere is not routed away from it; bounds on
  instances and resources hold.
* *Rate*: of each sort of act only so many are admitted in a while.
* *Cooldown*: what an act has been about is left alone for a while.
* *Floods*: of more actions than can be meant, the rest is refused at once.

What has been promised but cannot be seen yet, instances that start and those that stop, is counted in, for a while.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final, NamedTuple

import msgspec
import numpy as np

from .policy import (
    ACTS,
    Act,
    Action,
    Allow,
    Kill,
    Limit,
    Migrate,
    Provision,
    Route,
    SetPriorities,
    SetPriority,
    State,
    Weights,
    key_of,
)
from .view import Node, View

MOST_PRIORITY: Final = 1000


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How much a policy may do.

    Attributes:
        actions: in one answer.
        kills, provisions, migrations: in `window_s`.
        window_s: seconds that the rates are about.
        cooldown_s: seconds in which an instance is not acted on again, nor a node for an agent that reserves nothing there.
        rest_s: seconds in which a session is not moved again.
        settling_s: seconds in which an instance that starts or stops is taken to be on its way.
    """

    actions: int = 10_000
    kills: int = 30
    provisions: int = 30
    migrations: int = 500
    window_s: float = 60.0
    cooldown_s: float = 10.0
    rest_s: float = 1.0
    settling_s: float = 30.0


class Refusal(NamedTuple):
    """An action that does not take effect; None stands for all actions beyond the bound."""

    action: Action | None
    reason: str


class Verdict(NamedTuple):
    """What becomes of the actions of one answer."""

    states: tuple[State, ...]
    acts: tuple[Act, ...]
    refusals: tuple[Refusal, ...]


class _Promise(msgspec.Struct):
    """An act that has been admitted; over once the view shows it.

    Attributes:
        had: for a provision: instances of the agent on the node that were there or promised before.
    """

    at: float
    act: Act
    had: int = 0

    def is_over(self, view: View) -> bool:
        match self.act:
            case Kill(instance, agent):
                return (
                    instance not in (replica.worker for replica in view.replicas(agent))
                    if agent
                    else instance not in view.workers
                )
            case Provision(agent, node):
                return _instances(view, agent, node) > self.had
            case _:
                return True


def _instances(view: View, agent: str, node: str) -> int:
    return sum(replica.node == node for replica in view.replicas(agent))


class Guards:
    """Checks what one policy says, again and again; remembers what it has admitted."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._admitted: deque[tuple[float, Act]] = deque()
        self._promises: list[_Promise] = []
        self._last: dict[tuple[str, ...], float] = {}

    def check(self, view: View, actions: Iterable[Action], now: float) -> Verdict:
        """Sorts the actions; at most one of each key remains, of states the last."""
        self._forget(now)
        since = now - self._bounds.settling_s
        self._promises = [promise for promise in self._promises if promise.at > since and not promise.is_over(view)]
        round_ = _Round(view, [promise.act for promise in self._promises])
        wanted, refusals = self._unique(actions)
        states: list[State] = []
        acts: list[Act] = []
        for action in wanted:
            reason = round_.problem(action)
            if not reason and isinstance(action, ACTS):
                reason = self._haste(action, now, is_bounded=round_.is_bounded(action))
            if reason:
                refusals.append(Refusal(action, reason))
            elif isinstance(action, ACTS):
                acts.append(action)
                had = round_.instances(action.agent, action.node) if isinstance(action, Provision) else 0
                self._promises.append(_Promise(now, action, had))
                round_.promise(action)
                self._admitted.append((now, action))
                self._last[key_of(action)] = now
            else:
                states.append(action)
        return Verdict(tuple(states), tuple(acts), tuple(refusals))

    def _unique(self, actions: Iterable[Action]) -> tuple[list[Action], list[Refusal]]:
        wanted: dict[tuple[str, ...], Action] = {}
        refusals: list[Refusal] = []
        rest = iter(actions)
        for action in islice(rest, self._bounds.actions):
            if problem := _mistyped(action):
                refusals.append(Refusal(None, problem))
            else:
                wanted[key_of(action)] = action
        if next(rest, None) is not None:
            refusals.append(Refusal(None, f"more than {self._bounds.actions} actions in one answer"))
        return list(wanted.values()), refusals

    def _forget(self, now: float) -> None:
        bounds = self._bounds
        while self._admitted and self._admitted[0][0] <= now - max(bounds.window_s, bounds.settling_s):
            self._admitted.popleft()
        if len(self._last) > 2 * bounds.actions:
            self._last = {key: at for key, at in self._last.items() if at > now - max(bounds.cooldown_s, bounds.rest_s)}

    def _haste(self, act: Act, now: float, *, is_bounded: bool) -> str:
        bounds = self._bounds
        since_s = now - self._last.get(key_of(act), -math.inf)
        rest_s = bounds.rest_s if isinstance(act, Migrate) else 0.0 if is_bounded else bounds.cooldown_s
        if since_s < rest_s:
            return f"the same was admitted before: not again within {rest_s:g} s"
        most = {Kill: bounds.kills, Provision: bounds.provisions, Migrate: bounds.migrations}[type(act)]
        lately = sum(type(other) is type(act) and at > now - bounds.window_s for at, other in self._admitted)
        if lately >= most:
            return f"{lately} of its sort within {bounds.window_s:g} s are all that is admitted"
        return ""


class _Round:
    """One answer, against one view and against what has been promised."""

    def __init__(self, view: View, promised: Iterable[Act]) -> None:
        self._view = view
        self._agents = view.agents
        self._able = view.able
        self._workers = view.workers
        self._nodes = view.nodes
        self._starting: Counter[tuple[str, str]] = Counter()
        self._stopping: set[tuple[str, str]] = set()
        for act in promised:
            self.promise(act)

    def instances(self, agent: str, node: str) -> int:
        """Instances of an agent on a node that are there or promised."""
        return _instances(self._view, agent, node) + self._starting[agent, node]

    def promise(self, act: Act) -> None:
        """Counts an act in."""
        if isinstance(act, Provision):
            self._starting[act.agent, act.node] += 1
        elif isinstance(act, Kill):
            self._stopping.add((act.instance, act.agent))

    def is_bounded(self, act: Act) -> bool:
        """True for an instance that reserves something: there cannot be more than the node has room for."""
        return isinstance(act, Provision) and bool(self._able[act.agent].resources)

    def problem(self, action: Action) -> str:
        """Why an action is not valid; empty if it is."""
        match action:
            case Route():
                return self._session(action.session) or self._instance(action.agent, action.instance) or self._state(action)
            case Weights():
                return self._weights(action)
            case SetPriority():
                return self._session(action.session) or (self._agent(action.agent) if action.agent else "") or _priority(action)
            case SetPriorities():
                return self._priorities(action)
            case Limit():
                return self._limit(action)
            case Allow():
                return self._agent(action.agent)
            case Migrate():
                return self._migrate(action)
            case Kill():
                return self._kill(action)
            case Provision():
                return self._provision(action)

    def _session(self, session: str) -> str:
        return "" if session in self._view.sessions else f"there is no session {session!r}"

    def _agent(self, agent: str) -> str:
        return "" if agent in self._agents else f"nobody serves an agent {agent!r}"

    def _instance(self, agent: str, instance: str) -> str:
        if problem := self._agent(agent):
            return problem
        if instance not in self._workers:
            return f"there is no worker {instance!r}"
        found = [replica for replica in self._view.replicas(agent) if replica.worker == instance]
        if not found:
            return f"{instance!r} does not serve {agent!r}"
        if found[0].is_draining or not self._stopping.isdisjoint(((instance, ""), (instance, agent))):
            return f"{instance!r} is about to stop"
        return ""

    def _state(self, action: Route) -> str:
        holder = self._view.holder(action.session, action.agent)
        if holder in ("", action.instance):
            return ""
        return f"the state of session {action.session!r} is at {holder!r}: it has to be migrated"

    def _weights(self, action: Weights) -> str:
        if len(action.instances) != len(action.weights) or not action.instances:
            return "as many weights as instances are needed, and one at least"
        if not all(0 <= weight < math.inf for weight in action.weights) or not sum(action.weights) > 0:
            return "weights have to be numbers from 0, and one of them more than that"
        problems = (self._instance(action.agent, instance) for instance in action.instances)
        return next(filter(None, problems), "")

    def _priorities(self, action: SetPriorities) -> str:
        sessions, values = np.asarray(action.sessions), np.asarray(action.values)
        if sessions.shape != values.shape or sessions.ndim != 1:
            return "as many values as sessions are needed"
        if not (np.issubdtype(sessions.dtype, np.integer) and np.issubdtype(values.dtype, np.integer)):
            return "numbers of sessions and priorities are integers"
        if not len(sessions):
            return ""
        if sessions.min() < 0 or sessions.max() >= self._view.sessions.room or not self._view.sessions.uses[sessions].all():
            return "there is no session of such a number"
        return "" if abs(values).max() <= MOST_PRIORITY else f"priorities are from -{MOST_PRIORITY} to {MOST_PRIORITY}"

    def _limit(self, action: Limit) -> str:
        if action.running < 0:
            return f"{action.running} calls at once: 0 is the least"
        if action.refuses and action.running:
            return f"{action.running} calls at once and none: what is refused has a limit of 0"
        if action.job and action.job not in self._view.jobs:
            return f"there is no job {action.job!r}"
        return self._agent(action.agent) or (self._session(action.session) if action.session else "")

    def _migrate(self, action: Migrate) -> str:
        problem = self._session(action.session) or self._instance(action.agent, action.target)
        if problem:
            return problem
        if action.source not in self._workers:
            return f"there is no worker {action.source!r}"
        if action.source == action.target:
            return f"{action.source!r} is both ends of the way"
        if self._agents[action.agent].stateful:
            return f"{action.agent!r} is stateful: its sessions never move"
        holder = self._view.holder(action.session, action.agent)
        if holder not in ("", action.source):
            return f"the state of session {action.session!r} is at {holder!r}, not at {action.source!r}"
        return ""

    def _kill(self, action: Kill) -> str:
        if action.instance not in self._workers:
            return f"there is no worker {action.instance!r}"
        if action.agent and (problem := self._instance(action.agent, action.instance)):
            return problem
        for agent in (action.agent,) if action.agent else self._agents:
            replicas = [replica.worker for replica in self._view.serving(agent)]  # one that drains will be gone
            left = [worker for worker in replicas if self._stopping.isdisjoint(((worker, ""), (worker, agent)))]
            least = max(
                self._agents[agent].min_instances, 1
            )  # of none nobody would know, to call it or to have it served again
            if action.instance in left and len(left) <= least:
                return f"{agent!r} would have fewer than {least} instances"
        return ""

    def _provision(self, action: Provision) -> str:
        serves = self._able.get(action.agent)
        if serves is None:
            return f"no app has an agent {action.agent!r}"
        node = self._nodes.get(action.node)
        if node is None:
            return f"there is no node {action.node!r}"
        if not self._view.could_serve(action.agent, action.node):
            return f"the app of {action.node!r} has no {action.agent!r}"
        starting = sum(count for (agent, _), count in self._starting.items() if agent == action.agent)
        if serves.max_instances is not None and len(self._view.replicas(action.agent)) + starting >= serves.max_instances:
            return f"{action.agent!r} has its {serves.max_instances} instances"
        return self._resources(node, serves.resources)

    def _resources(self, node: Node, wanted: Mapping[str, float]) -> str:
        for name, amount in wanted.items():
            left = self._view.left(node.name, name)
            promised = sum(
                count * self._able[agent].resources.get(name, 0.0)
                for (agent, place), count in self._starting.items()
                if place == node.name and agent in self._able
            )
            if promised + amount > left:
                return f"{node.name!r} has {max(left - promised, 0.0):g} of {name} left, and {amount:g} are needed"
        return ""


def _mistyped(action: Action) -> str:
    """What is wrong with the types in it: a policy is Python that nobody has checked."""
    if not isinstance(action, Action):
        return f"{type(action).__name__} is no action"
    if isinstance(action, SetPriorities):
        arrays = isinstance(action.sessions, np.ndarray) and isinstance(action.values, np.ndarray)
        return "" if arrays else "SetPriorities takes arrays"
    try:
        msgspec.convert(msgspec.to_builtins(action), type(action))
    except (msgspec.ValidationError, TypeError) as error:
        return f"{type(action).__name__}: {error}"
    return ""


def _priority(action: SetPriority) -> str:
    return "" if abs(action.value) <= MOST_PRIORITY else f"priorities are from -{MOST_PRIORITY} to {MOST_PRIORITY}"
