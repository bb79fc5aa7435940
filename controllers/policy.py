"""What a policy is, and what it may decide. Pure.

    class Mine:
        def decide(self, view: View) -> Iterable[Action]:
            for replica in view.replicas("analyst"):
                if replica.load > 10:
                    yield kill(replica.worker, reason="it is beyond help")

A policy is asked again and again, and says each time all that it wants. Actions are of two sorts:

* *states* hold until the next answer: `route`, `set_priority`, `limit`, `allow`. What is not said again holds no more.
* *acts* happen once: `migrate`, `kill`, `provision`.

An instance of an agent is named by its worker. What a policy says is checked by `guards` before it takes effect; what is
refused is told with the reason, and harms nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol, TypeAlias, overload

import msgspec
import numpy as np

from nalar_mq.actions import ACTS, Act, Allow, Kill, Limit, Migrate, Provision, Route, SetPriority, Weights

from .tables import Floats, Ints
from .view import View

__all__ = [
    "ACTS",
    "Act",
    "Action",
    "Allow",
    "Composed",
    "Kill",
    "Limit",
    "Migrate",
    "Policy",
    "Provision",
    "Route",
    "SetPriorities",
    "SetPriority",
    "State",
    "Weights",
    "allow",
    "by_rank",
    "kill",
    "limit",
    "migrate",
    "provision",
    "route",
    "set_priority",
]
LEVELS: Final = 16


class SetPriorities(msgspec.Struct, frozen=True, eq=False):
    """`SetPriority` for many sessions at once, by their numbers in the view; where one has its own, that holds."""

    sessions: Ints
    values: Ints
    reason: str = ""


State: TypeAlias = Route | Weights | SetPriority | SetPriorities | Limit | Allow
Action: TypeAlias = State | Act


class Policy(Protocol):
    """Whoever decides: a pure function of the view, as far as it does not remember anything."""

    def decide(self, view: View) -> Iterable[Action]:
        """All that should be so now, and all that should happen now."""
        ...


@overload
def route(first: str, second: str, third: str, *, reason: str = "") -> Route: ...
@overload
def route(first: str, second: Sequence[str], third: Sequence[float], *, reason: str = "") -> Weights: ...
def route(first: str, second: str | Sequence[str], third: str | Sequence[float], *, reason: str = "") -> Route | Weights:
    """`route(session, agent, instance)`, or `route(agent, instances, weights)`."""
    if isinstance(second, str) and isinstance(third, str):
        return Route(first, second, third, reason)
    if isinstance(second, str) or isinstance(third, str):
        raise TypeError("route takes a session, an agent and an instance, or an agent, instances and weights")
    return Weights(first, tuple(second), tuple(map(float, third)), reason)


def set_priority(session: str, value: int, agent: str = "", *, reason: str = "") -> SetPriority:
    """The priority of a session everywhere, or at one agent; higher runs earlier."""
    return SetPriority(session, value, agent, reason)


def limit(
    agent: str,
    running: int,
    *,
    session: str = "",
    tenant: str = "",
    job: str = "",
    refuses: bool = False,
    reason: str = "",
) -> Limit:
    """At most `running` calls at once at each instance; of a session, tenant or job, if one is named.

    The others wait; with 0 and `refuses` they fail with `NotAllowedError`, as do those that wait already.
    """
    return Limit(agent, running, session, tenant, reason, job, refuses)


def allow(agent: str, *, callers: Iterable[str] = (), tenants: Iterable[str] = (), reason: str = "") -> Allow:
    """Who may call an agent, by the name of the caller or of the tenant."""
    return Allow(agent, tuple(callers), tuple(tenants), reason)


def migrate(session: str, agent: str, source: str, target: str, *, reason: str = "") -> Migrate:
    """Moves a session of an agent between two instances."""
    return Migrate(session, agent, source, target, reason)


def kill(instance: str, agent: str = "", *, reason: str = "") -> Kill:
    """Stops an instance."""
    return Kill(instance, agent, reason)


def provision(agent: str, node: str, *, reason: str = "") -> Provision:
    """Starts an instance."""
    return Provision(agent, node, reason)


def by_rank(view: View, keys: Floats, *, reason: str = "", levels: int = LEVELS) -> SetPriorities:
    """Priorities of all sessions with live futures: those whose best future has the least key get the highest.

    Each priority goes to as many futures as any other, but for equal keys: those get the same.

    Args:
        view: the picture.
        keys: of the futures in `view.live`, in that order.
        reason: for people.
        levels: how many priorities there are, from 0.
    """
    futures = view.futures.session.take(view.live)
    # numpy sorts whole columns with wide instructions: several times as fast as it partitions them at a few bounds.
    places = np.arange(1, levels) * len(keys) // levels
    ranks = np.full(len(keys), levels - 1, np.int16)
    for bound in np.sort(keys)[places] if len(keys) else keys:
        ranks -= keys >= bound
    values = np.full(view.sessions.room, -1, np.int16)
    np.maximum.at(values, futures, ranks)
    sessions = np.flatnonzero(values >= 0).astype(np.int32)
    return SetPriorities(sessions, values[sessions].astype(np.int32), reason)


def key_of(action: Action) -> tuple[str, ...]:
    """What an action is about: of two states about the same the later one holds, and no act is done twice at a time."""
    match action:
        case Route():
            return "route", action.session, action.agent
        case Weights():
            return "weights", action.agent
        case SetPriority():
            return "priority", action.session, action.agent
        case SetPriorities():
            return ("priorities",)
        case Limit():
            return "limit", action.agent, action.session, action.tenant, action.job
        case Allow():
            return "allow", action.agent
        case Migrate():
            return "migrate", action.session, action.agent
        case Kill():
            return "kill", action.instance, action.agent
        case Provision():
            return "provision", action.agent, action.node


class Composed:
    """Several policies as one; where two speak about the same, the later one is heard."""

    def __init__(self, *policies: Policy) -> None:
        self._policies = policies

    def decide(self, view: View) -> Iterable[Action]:
        """What all of them want."""
        wanted: dict[tuple[str, ...], Action] = {}
        for policy in self._policies:
            for action in policy.decide(view):
                key = key_of(action)
                former = wanted.get(key)
                if isinstance(action, SetPriorities) and isinstance(former, SetPriorities):
                    action = _merged(former, action)
                wanted[key] = action
        return wanted.values()


def _merged(former: SetPriorities, later: SetPriorities) -> SetPriorities:
    kept = ~np.isin(former.sessions, later.sessions)
    sessions = np.concatenate((former.sessions[kept], later.sessions))
    values = np.concatenate((former.values[kept], later.values))
    return SetPriorities(sessions, values, "; ".join(filter(None, (former.reason, later.reason))))
