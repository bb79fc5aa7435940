"""Tries a policy without any effect: on what is there now, or on what was recorded.

A rehearsal asks the policy, checks the answer by the same guards as a controller, and tells what a controller would tell of it.
What it would have done does not happen, so the view goes on as if nothing had been decided. On a recording, time is that of the
recording: the same policy says the same about it, however often it is asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from nalar_mq.actions import Decided, Unused

from .audit import AuditTrail
from .deciding import PERIOD_S, Decider, decision_of
from .governing import Governor
from .guards import Bounds
from .observer import FIRST_SIGHT_S, Folding
from .recording import Recorded
from .reported import Incoming
from .view import View


class Rehearsal:
    """A policy that is asked and checked, and nothing more.

    Attributes:
        rounds: how often it has been asked.
        failures: how often it gave no answer.
        refused: actions that were not admitted, each time they were said.
    """

    def __init__(self, decider: Decider, bounds: Bounds | None = None) -> None:
        self._decider = decider
        self._governor = Governor(bounds)
        self._now = 0.0
        self._audit = AuditTrail("", str(decider), clock=lambda: self._now)
        self.rounds = 0
        self.failures = 0
        self.refused = 0

    async def step(
        self, view: View, now: float, complaints: Iterable[Unused] = (), *, at_s: float | None = None
    ) -> list[Decided]:
        """Asks once; returns what is new. `at_s` is what that says of the time, `now` if left out."""
        self._now = now if at_s is None else at_s
        decision = await decision_of(self._decider, self._governor, view, now)
        if not decision.error:
            self._governor.changed_states(decision)
        self.rounds += 1
        self.failures += bool(decision.error)
        self.refused += len(decision.refusals)
        self._audit.note(0, decision, complaints, now)
        return self._audit.take()


async def replay(rehearsal: Rehearsal, recorded: Iterable[Recorded], view: View) -> AsyncIterator[Decided]:
    """Asks a policy four times a second of a recording, as a controller does; `view` is folded on the way.

    Raises:
        RecordingError: while the recording is read.
    """
    folding = Folding(view)
    due = FIRST_SIGHT_S
    for report in recorded:
        while report.at_s >= due:
            folding.settle(due)
            for entry in await rehearsal.step(view, due, folding.complaints()):
                yield entry
            due += PERIOD_S
        folding.take([Incoming(report.sender, report.data, report.at_s)])
    folding.settle(due)
    for entry in await rehearsal.step(view, due, folding.complaints()):
        yield entry
