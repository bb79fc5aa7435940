"""From what a policy says to what is published: versions, reasons, and only what has changed. Pure.

What a leader publishes is numbered within its term. States are published whole when any of them has changed. Acts are published
with those of the last lease, each with the incarnations it means. Priorities of many sessions go to the processes that have
those sessions, by the slots of their own reports: what has changed, and everything every now and then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from nalar_mq.actions import NO_RANK, Act, Acts, Order, Provision, Ranks, State, States, state_bytes
from nalar_mq.messages import WIRE_VERSION

from .guards import Bounds, Guards, Refusal
from .policy import Action, Kill, Migrate, SetPriorities, key_of
from .tables import Ints
from .view import View

HISTORY: Final = 256
_STATES_BYTES: Final = 512 * 1024
_RANKS_AT_ONCE: Final = 100_000
_WHOLE_EVERY: Final = 32

_Values = npt.NDArray[np.int16]


class Decision(NamedTuple):
    """What came of one answer of a policy.

    Attributes:
        number: from 1.
        at_s: when, on the clock of the view.
        states: what holds from then on, apart from priorities of many.
        began, ended: those of them that did not hold before, or differently; those that held before and do no more.
        ranked: sessions that were given priorities at once, and why.
        acts: what is to happen.
        refusals: what was not admitted, and why.
        error: why there was no answer; then everything stays as it was.
    """

    number: int
    at_s: float
    states: tuple[State, ...] = ()
    ranked: tuple[int, str] = (0, "")
    acts: tuple[Act, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    error: str = ""
    began: tuple[State, ...] = ()
    ended: tuple[State, ...] = ()


class Governor:
    """What a leader has decided.

    Attributes:
        states: what holds.
        history: the last decisions in which something has changed, or gone wrong.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._guards = Guards(bounds)
        self._decided = 0
        self._published = 0
        self._ordered = 0
        self._orders: deque[tuple[float, Order]] = deque()
        self._acts_at = 0.0
        self._term = 0
        self._ranks = _RankBook()
        self.states: tuple[State, ...] = ()
        self.wanted: SetPriorities | None = None
        self.history: deque[Decision] = deque(maxlen=HISTORY)

    def begin_term(self, term: int, states: tuple[State, ...]) -> tuple[States, Acts]:
        """Leads from now on; what held under the former leader holds on, and its acts are over."""
        self._term = term
        self._published = self._ordered = 0
        self._orders.clear()
        self._ranks = _RankBook()
        self.states = states
        self.wanted = None
        return self._next_states(), Acts(WIRE_VERSION, term, 0)

    def decide(self, view: View, actions: Iterable[Action], now: float) -> Decision:
        """Checks what a policy says; the caller publishes what `changes` gives."""
        verdict = self._guards.check(view, actions, now)
        ranks = [state for state in verdict.states if isinstance(state, SetPriorities)]
        states, refusals = _fitting(state for state in verdict.states if not isinstance(state, SetPriorities))
        self.wanted = ranks[-1] if ranks else None
        self._decided += 1
        ranked = (len(self.wanted.sessions), self.wanted.reason) if self.wanted is not None else (0, "")
        began, ended = _difference(self.states, states)
        refused = (*verdict.refusals, *refusals)
        decision = Decision(self._decided, now, states, ranked, verdict.acts, refused, began=began, ended=ended)
        if states != self.states or verdict.acts or decision.refusals:
            self.history.append(decision)
        return decision

    def fail(self, error: str, now: float) -> Decision:
        """Notes that there was no answer."""
        self._decided += 1
        decision = Decision(self._decided, now, self.states, error=error)
        if not self.history or self.history[-1].error != error:
            self.history.append(decision)
        return decision

    def changed_states(self, decision: Decision) -> States | None:
        """What to publish if other states hold now."""
        if decision.states == self.states:
            return None
        self.states = decision.states
        return self._next_states()

    def _next_states(self) -> States:
        self._published += 1
        return States(WIRE_VERSION, self._term, self._published, self.states)

    def ordered_acts(self, view: View, decision: Decision, lease_s: float) -> Acts | None:
        """What to publish if something is to happen, or nothing has been published for a while.

        That is what was to happen within the last lease. It is published even if there is nothing, so that there is always
        something of this leader which a former one would have to write over.
        """
        if not decision.acts and decision.at_s < self._acts_at + lease_s / 3:
            return None
        self._acts_at = decision.at_s
        while self._orders and self._orders[0][0] <= decision.at_s - lease_s:
            self._orders.popleft()
        for act in decision.acts:
            self._ordered += 1
            self._orders.append((decision.at_s, _order(view, self._ordered, act)))
        return Acts(WIRE_VERSION, self._term, self._ordered, tuple(order for _, order in self._orders))

    def changed_ranks(self, view: View) -> Iterator[tuple[str, Ranks]]:
        """What to send to which process."""
        return self._ranks.changes(view, self.wanted, self._term)


def _difference(former: tuple[State, ...], states: tuple[State, ...]) -> tuple[tuple[State, ...], tuple[State, ...]]:
    """What holds and did not, or differently; and what held and does no more."""
    if former == states:
        return (), ()
    before, after = ({key_of(state): state for state in each} for each in (former, states))
    began = tuple(state for key, state in after.items() if before.get(key) != state)
    return began, tuple(state for key, state in before.items() if key not in after)


def _fitting(states: Iterable[State]) -> tuple[tuple[State, ...], list[Refusal]]:
    """As many states as one message holds."""
    room = _STATES_BYTES
    fitting: list[State] = []
    refusals: list[Refusal] = []
    for state in states:
        room -= state_bytes(state)
        if room >= 0:
            fitting.append(state)
        else:
            refusals.append(Refusal(state, f"the states of one answer take more than {_STATES_BYTES} bytes"))
    return tuple(fitting), refusals


def _order(view: View, number: int, act: Act) -> Order:
    """An act with the processes that it is about, in the lives that the policy has seen; who is to serve is chosen here."""
    if isinstance(act, Provision):
        spare = view.spare(act.agent, act.node)
        chosen = {spare[0].name: spare[0].incarnation} if spare else {}
        return Order(number, msgspec.structs.replace(act, worker=next(iter(chosen), "")), chosen)
    names = (act.instance,) if isinstance(act, Kill) else (act.source, act.target) if isinstance(act, Migrate) else ()
    return Order(number, act, {name: view.workers[name].incarnation for name in names})


class _Told:
    """What one process has been told."""

    def __init__(self, incarnation: int, rounds: int) -> None:
        self.incarnation = incarnation
        self.rounds = rounds
        self.sessions: Ints = np.zeros(0, np.int32)
        self.values: _Values = np.zeros(0, np.int16)


class _RankBook:
    """Priorities of sessions, and who has been told which: everybody once, since a former leader may have given some."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        self._has_ranked = False
        self._number = 0

    def changes(self, view: View, wanted: SetPriorities | None, term: int) -> Iterator[tuple[str, Ranks]]:
        workers = view.workers
        self._told = {name: told for name, told in self._told.items() if name in workers}
        self._has_ranked |= wanted is not None
        due = [name for name in workers if self._has_ranked or not self._has_told(name, workers[name].incarnation)]
        if not due:
            return
        values = np.full(view.sessions.room, NO_RANK, np.int16)
        if wanted is not None:
            values[wanted.sessions] = wanted.values
        for name in due:
            yield from self._for_process(name, *view.sessions_of(name), values, term)

    def _for_process(
        self, name: str, incarnation: int, report: int, sessions: Ints, values: _Values, term: int
    ) -> Iterator[tuple[str, Ranks]]:
        is_new = not self._has_told(name, incarnation)
        if is_new:
            self._told[name] = _Told(incarnation, len(self._told))
        told = self._told[name]
        mine = np.where(sessions >= 0, values[sessions], np.int16(NO_RANK))
        told.rounds += 1
        is_whole = is_new or told.rounds % _WHOLE_EVERY == 0 or len(mine) != len(told.values)
        if is_whole:
            changed = np.flatnonzero(mine != NO_RANK)
        else:
            other = (sessions != told.sessions) & (mine != NO_RANK)
            changed = np.flatnonzero((mine != told.values) | other)
        told.sessions, told.values = sessions.copy(), mine
        if not len(changed) and not is_whole:
            return
        for start in range(0, max(len(changed), 1), _RANKS_AT_ONCE):
            part = changed[start : start + _RANKS_AT_ONCE]
            self._number += 1
            slots, ranks = part.astype("<u4").tobytes(), mine[part].astype("<i2").tobytes()
            yield name, Ranks(WIRE_VERSION, term, self._number, incarnation, report, is_whole and not start, slots, ranks)

    def _has_told(self, name: str, incarnation: int) -> bool:
        told = self._told.get(name)
        return told is not None and told.incarnation == incarnation
