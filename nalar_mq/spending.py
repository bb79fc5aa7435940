"""What calls cost, declared by the code that runs: tokens by `nalar_mq.agents.llm`, anything else by `spend` in a tool.

    spend ──▶ the process that runs the call: sums by account (`columns.Account`) ──reports──▶ views: all processes together

What counts is what was spent, not what came of it. A call that fails, is cancelled or runs again after the loss of its worker
has cost what its attempts have spent up to then, each of them; so has one whose answer comes twice from two workers. What is
answered from a journal or a record runs nothing and costs nothing. Sums are kept in the memory of processes and controllers:
what a process spends in the last quarter of a second before it is killed is not told any more, and a controller that begins
later knows only what the living have spent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite
from typing import Final, TypeAlias

from nalar_mq.call_context import current_context

TOKENS: Final = "tokens"
LONGEST_UNIT: Final = 32

Spender: TypeAlias = Callable[[float, str], None]
"""Takes an amount and its unit. Any thread."""

_spender: ContextVar[Spender | None] = ContextVar("nalar_spender", default=None)


def spend(amount: float, unit: str = TOKENS) -> None:
    """The running call has cost so much; its session, job, workflow, agent and tenant have, too. Any thread.

    It counts at once and stays counted, whatever becomes of the call; an attempt that is made again counts again. Controllers
    learn of it with the next report, a quarter of a second later as a rule. The agents of `nalar_mq.agents.llm` declare their
    tokens themselves. Where no call runs nothing is counted, so a tool's file works by itself, too. In a child process
    (`isolation="process"`) it counts when the call has ended, and is lost if the child is killed; calls that run
    as a batch bear equal parts.

    Args:
        amount: finite, and not negative.
        unit: what is counted, such as `tokens`, `usd` or `searches`; sums of different units are apart.

    Raises:
        ValueError: the amount or the unit is none.
    """
    if not (isfinite(amount) and amount >= 0):
        raise ValueError(f"an amount that is spent is finite and not negative, not {amount!r}")
    if not 0 < len(unit) <= LONGEST_UNIT:
        raise ValueError(f"a unit has 1 to {LONGEST_UNIT} characters, not {len(unit)}")
    spender = _spender.get()
    if spender is None:
        context = current_context.get()
        slot = None if context is None else context.slot
        if slot is None:
            return
        spender = slot.spend
    if amount:
        spender(float(amount), unit)


@contextmanager
def spent_by(spender: Spender) -> Generator[None]:
    """What is spent inside goes to `spender`, whatever call runs."""
    token = _spender.set(spender)
    try:
        yield
    finally:
        _spender.reset(token)
