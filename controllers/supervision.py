"""When a worker process is started, restarted, ended or given up: pure decisions over one slot.

A slot is a place for one worker process on a node. Its life:

                 Tick, due           Ready
    WAITING ───────────────> STARTING ─────> READY
       ^                        │              │
       └──── Exited ────────────┴──────────────┤      at once, or after a pause that doubles with each failure in a row
                                               │
    FAILED <── Exited, too often or for good ──┤
                                               │ Stop
    STOPPED <── Exited ──── STOPPING <─────────┘      SIGTERM first, SIGKILL when the time to drain is over
       ^                                       │
       └──── Exited, drained ──────────────────┘      somebody else has wanted that

A failure is an exit, asked for by nobody. The successor of a process that served for `healthy_after_s` is started at once:
calls wait for it. A process that serves tells so, several times a lease; one that is silent for a lease stands still and is
killed. Its silence is counted in periods that this controller saw pass at their pace, so that one which stood still itself
judges nobody for it.

A slot that never had a process that served is given up after `max_failures` of them in a row, or at once if the process ends
with `EXIT_CONFIG`, which says that another start would not help. A slot that has served goes on for ever: what ends its
processes may pass, and between two of them it serves. One that ends with `EXIT_REPLACED` is given up in any case: somebody
else has its name, and two that take it from each other would serve nobody. One that ends with `EXIT_LOST` stood still for so
long that the others gave it up; its successor is started like that of any other process that has served. One that
drains already when the next controller of the node comes is `Leaving`: it gets the time of a drain, and then a successor.

Failures of which each comes within `calm_s` of the one before are `Crashes`: people are told of those until a worker has been
calm for so long.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final, TypeAlias

import msgspec

from nalar_mq.exits import EXIT_CONFIG, EXIT_DRAINED, EXIT_REPLACED

_PERIODS: Final = 12


class Phase(Enum):
    """Where a slot is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How patient the supervision is; after `silence_s` without a word, a process that serves stands still.

    A node has at most `most_workers`. Where they outlive their controller, they wait for its successor for `orphan_s`, and it
    for each of them for `rejoin_s`.
    A process that drains gets `drain_timeout_s` for what runs, and `closing_s` to leave, anew whenever sessions have moved.
    """

    start_timeout_s: float = 180.0
    drain_timeout_s: float = 30.0
    closing_s: float = 15.0
    healthy_after_s: float = 2.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 10.0
    max_failures: int = 5
    calm_s: float = 60.0
    silence_s: float = math.inf
    rejoin_s: float = 15.0
    orphan_s: float = 60.0
    most_workers: int = 64

    @property
    def period_s(self) -> float:
        """How often the silence of a process is looked at."""
        return self.silence_s / _PERIODS


class Crashes(msgspec.Struct, frozen=True):
    """Failures of a slot, one soon after the other: how many, the first and the last on the loop's clock, and why the last."""

    count: int
    since: float
    last: float
    reason: str


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One place for a worker process.

    Attributes:
        name: name of the worker, the same for every process in this slot.
        due: when the phase ends by itself, on the loop's clock.
        ready_at: when the present process became ready; infinite before that.
        silent_for: periods since the present process, which is ready, was last heard.
        failures: how many in a row; 0 in a slot that was given up at once.
        has_served: a process in this slot has been ready.
        reason: why it failed, once it has.
        crashes: its last failures; None if there are none yet.
    """

    name: str
    phase: Phase = Phase.WAITING
    due: float = -math.inf
    ready_at: float = math.inf
    silent_for: int = 0
    failures: int = 0
    has_served: bool = False
    reason: str = ""
    crashes: Crashes | None = None

    @property
    def is_over(self) -> bool:
        """True if nothing will happen in it any more."""
        return self.phase in (Phase.STOPPED, Phase.FAILED)

    @property
    def is_unwanted(self) -> bool:
        """True if it is to be empty, or has become so at somebody's wish."""
        return self.phase in (Phase.STOPPING, Phase.STOPPED)

    @property
    def stands_still(self) -> bool:
        """True if its process has been silent for longer than it may be."""
        return self.silent_for > _PERIODS

    def crashes_at(self, now: float, limits: Limits) -> Crashes | None:
        """Its failures, if it has not been calm for a while since the last one."""
        crashes = self.crashes
        return crashes if crashes is not None and now - crashes.last < limits.calm_s else None


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Ready(msgspec.Struct, frozen=True):
    """The process serves."""


class Heard(msgspec.Struct, frozen=True):
    """The process lives."""


class Moving(msgspec.Struct, frozen=True):
    """The process drains, and gets on with it."""


class Leaving(msgspec.Struct, frozen=True):
    """The process drains since before this controller was there; it may take `timeout_s`, and is to have a successor."""

    timeout_s: float


class Exited(msgspec.Struct, frozen=True):
    """The process is gone; `spread`, between 0 and 1, keeps slots from starting again all at once."""

    code: int
    reason: str = ""
    spread: float = 0.0


class Stop(msgspec.Struct, frozen=True):
    """Somebody wants the slot empty; the process may take `timeout_s` to finish what has begun."""

    timeout_s: float


Event: TypeAlias = Tick | Ready | Heard | Moving | Leaving | Exited | Stop


class Action(Enum):
    """What is to be done to the process of a slot."""

    NONE = "none"
    START = "start"
    TERMINATE = "terminate"
    KILL = "kill"


def decide(slot: Slot, event: Event, now: float, limits: Limits) -> tuple[Slot, Action]:
    """The slot after `event` at `now`, and what to do; an event that does not concern the phase changes nothing."""
    if slot.is_over:
        return slot, Action.NONE
    match event:
        case Tick():
            return _on_tick(slot, now, limits)
        case Ready() if slot.phase is Phase.STARTING:
            return _to(slot, Phase.READY, due=now + limits.period_s, ready_at=now), Action.NONE
        case Heard():
            return msgspec.structs.replace(slot, silent_for=0), Action.NONE
        case Leaving() if slot.phase is Phase.STARTING:
            return msgspec.structs.replace(slot, due=now + event.timeout_s), Action.NONE
        case Moving() if slot.phase in (Phase.STARTING, Phase.STOPPING) and math.isfinite(slot.due):
            return msgspec.structs.replace(slot, due=max(slot.due, now + limits.closing_s)), Action.NONE
        case Exited():
            return _on_exit(slot, event, now, limits), Action.NONE
        case Stop():
            return _on_stop(slot, event, now)
        case _:
            return slot, Action.NONE


def _on_tick(slot: Slot, now: float, limits: Limits) -> tuple[Slot, Action]:
    if now < slot.due:
        return slot, Action.NONE
    match slot.phase:
        case Phase.WAITING:
            return _to(slot, Phase.STARTING, due=now + limits.start_timeout_s), Action.START
        case Phase.STARTING | Phase.STOPPING:
            return _to(slot, slot.phase), Action.KILL
        case Phase.READY:
            return _on_period(slot, now, limits)
        case _:
            return slot, Action.NONE


def _on_period(slot: Slot, now: float, limits: Limits) -> tuple[Slot, Action]:
    """One period of a process that is ready has passed; it does not count if we come so late that we stood still ourselves."""
    is_on_time = now - slot.due <= limits.period_s
    slot = msgspec.structs.replace(slot, due=now + limits.period_s, silent_for=slot.silent_for + is_on_time)
    return slot, Action.KILL if slot.stands_still else Action.NONE


def _on_exit(slot: Slot, event: Exited, now: float, limits: Limits) -> Slot:
    if slot.phase is Phase.STOPPING or event.code == EXIT_DRAINED:
        return _to(slot, Phase.STOPPED)
    why = event.reason or _why(event.code, slot)
    slot = msgspec.structs.replace(slot, crashes=_one_more(slot.crashes_at(now, limits), now, why))
    if event.code == EXIT_REPLACED or (event.code == EXIT_CONFIG and not slot.has_served):
        return _to(slot, Phase.FAILED, failures=0, reason=why)
    was_healthy = now - slot.ready_at >= limits.healthy_after_s
    failures = 1 if was_healthy else slot.failures + 1
    if failures >= limits.max_failures and not slot.has_served:
        return _to(slot, Phase.FAILED, failures=failures, reason=f"{why}, {failures} times in a row")
    pause_s = 0.0 if was_healthy else min(limits.first_pause_s * 2 ** min(failures - 1, 30), limits.longest_pause_s)
    return _to(slot, Phase.WAITING, due=now + pause_s * (1 + event.spread / 2), failures=failures)


def _one_more(before: Crashes | None, now: float, reason: str) -> Crashes:
    return Crashes(1, now, now, reason) if before is None else Crashes(before.count + 1, before.since, now, reason)


def _on_stop(slot: Slot, event: Stop, now: float) -> tuple[Slot, Action]:
    match slot.phase:
        case Phase.WAITING:
            return _to(slot, Phase.STOPPED), Action.NONE
        case Phase.STOPPING:
            return msgspec.structs.replace(slot, due=min(slot.due, now + event.timeout_s)), Action.NONE
        case _:
            return _to(slot, Phase.STOPPING, due=now + event.timeout_s), Action.TERMINATE


def _to(
    slot: Slot,
    phase: Phase,
    *,
    due: float = math.inf,
    ready_at: float = math.inf,
    failures: int | None = None,
    reason: str = "",
) -> Slot:
    kept = slot.failures if failures is None else failures
    has_served = slot.has_served or phase is Phase.READY
    return Slot(
        name=slot.name,
        phase=phase,
        due=due,
        ready_at=ready_at,
        failures=kept,
        has_served=has_served,
        reason=reason,
        crashes=slot.crashes,
    )


def _why(code: int, slot: Slot) -> str:
    if slot.stands_still:
        return "it stood still for longer than its lease and was killed"
    when = "while it served" if slot.phase is Phase.READY else "before it served"
    return f"it was ended by signal {-code} {when}" if code < 0 else f"it ended with code {code} {when}"
