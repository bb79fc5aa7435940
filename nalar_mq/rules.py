"""What the decisions that hold say about one call: its priority, and whether it may be made. Pure.

Priority. The first of these that is there: the session's at this agent, the session's everywhere, its rank among many
(`Ranks`), the call's own.

Permission. An agent without a rule may be called by everybody. Once it has one, it may be called by those that the rule names,
and by nobody else: by agents, tools and workflows, by name; by calls of a tenant; and by processes whose program calls it, by
name, which is a client's or, for what comes in from outside, that of the worker which has taken it in. What a process says of
itself, its name, is seen to by the broker; that the agent it names is one of its own, by whoever asks here.
"""

from __future__ import annotations

from collections.abc import Iterable

from nalar_mq.actions import Allow, Limit, SetPriority, State
from nalar_mq.limits import Group, groups_with


class Priorities:
    """The priorities of sessions at one process."""

    def __init__(self) -> None:
        self._given: dict[tuple[str, str], SetPriority] = {}
        self._ranks: dict[str, int] = {}

    def take_states(self, states: Iterable[State]) -> list[SetPriority]:
        """Takes what holds from now on; returns what has changed, with that which holds no more as it was."""
        former = self._given
        self._given = {(state.session, state.agent): state for state in states if isinstance(state, SetPriority)}
        changed = [state for key, state in self._given.items() if former.get(key) != state]
        return changed + [state for key, state in former.items() if key not in self._given]

    def take_ranks(self, ranks: Iterable[tuple[str, int | None]], *, is_whole: bool) -> set[str]:
        """Takes ranks of sessions, None for those that have none any more; with `is_whole` others have none either.

        Returns:
            the sessions whose rank has changed.
        """
        former = self._ranks
        if is_whole:
            self._ranks = {session: rank for session, rank in ranks if rank is not None}
            gone = former.keys() - self._ranks.keys()
            return gone.union(session for session, rank in self._ranks.items() if former.get(session) != rank)
        changed: set[str] = set()
        for session, rank in ranks:
            if former.get(session) == rank:
                continue
            changed.add(session)
            if rank is None:
                del former[session]
            else:
                former[session] = rank
        return changed

    def holds(self, state: SetPriority) -> bool:
        """True if it is in force."""
        return self._given.get((state.session, state.agent)) == state

    def rank_of(self, session: str) -> int | None:
        """The rank of a session; None for none."""
        return self._ranks.get(session)

    def of(self, session: str, agent: str) -> int | None:
        """The priority of all calls of the session to the agent; None if each has its own."""
        given = self._given.get((session, agent)) or self._given.get((session, ""))
        return given.value if given is not None else self._ranks.get(session)


class Admission:
    """Who may call the agents that have a rule, and of whom they take no calls at present.

    Attributes:
        has_rules: there is any; every call asks.
    """

    def __init__(self) -> None:
        self._rules: dict[str, Allow] = {}
        self._shut: dict[str, dict[Group, Limit]] = {}
        self.has_rules = False

    def take_states(self, states: Iterable[State]) -> dict[str, set[Group] | None]:
        """Takes what holds from now on.

        Returns:
            the agents that may refuse now what they did not before: calls of which groups, or None where it may be any.
        """
        former, shut, states = self._rules, self._shut, tuple(states)
        self._rules = {state.agent: state for state in states if isinstance(state, Allow)}
        self._shut = {}
        for state in states:
            if isinstance(state, Limit) and state.refuses:
                self._shut.setdefault(state.agent, {})[state.session, state.tenant, state.job] = state
        self.has_rules = bool(self._rules or self._shut)
        newly = {agent: limits.keys() - shut.get(agent, {}).keys() for agent, limits in self._shut.items()}
        changed: dict[str, set[Group] | None] = {agent: groups for agent, groups in newly.items() if groups}
        for agent in former.keys() | self._rules.keys():
            if former.get(agent) != self._rules.get(agent):
                changed[agent] = None
        return changed

    def shut_by(self, agent: str, session: str, tenant: str, job: str) -> Limit | None:
        """The limit by which `agent` refuses a call of this session, tenant and job; None if there is none."""
        limits = self._shut.get(agent)
        if limits is None:
            return None
        return next((limits[group] for group in groups_with(session, tenant, job) if group in limits), None)

    def rule_against(self, agent: str, caller: str, tenant: str) -> Allow | None:
        """The rule that forbids a call of `agent`; None if it may be made.

        Args:
            agent: what is called.
            caller: the agent, tool or workflow that calls, or the process whose program does.
            tenant: of the call; empty for none.
        """
        rule = self._rules.get(agent)
        if rule is None or caller in rule.callers or (tenant and tenant in rule.tenants):
            return None
        return rule
