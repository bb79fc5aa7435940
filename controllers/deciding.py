"""Where the decisions of a controller come from: a policy that came with the runtime, or a user's own.

View ──▶ policy ──▶ guards ──▶ Decision; with its error where there is no answer, and then all stays as it was
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import Final, Protocol, cast

from nalar_mq.errors import PolicyError, PolicyLoadError, PolicyTimeoutError
from nalar_mq.logs import logger

from . import policies
from .governing import Decision, Governor
from .policy import Action, Policy
from .policy_file import PolicyFile
from .view import View

PERIOD_S: Final = 0.25
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 10.0
_log = logger(__name__)


class Decider(Protocol):
    """Where decisions come from; `str` says what people call it."""

    @property
    def trouble(self) -> str:
        """What is wrong with what it asks, though it may still answer; empty if nothing is."""
        ...

    async def decide(self, view: View) -> Iterable[Action]:
        """What is wanted.

        Raises:
            PolicyError: there is no answer.
        """
        ...


class Trusted:
    """A policy that came with the runtime: it runs where it is asked."""

    def __init__(self, policy: Policy, name: str = "") -> None:
        self._policy = policy
        self._name = name or type(policy).__name__

    def __str__(self) -> str:
        return self._name

    @property
    def trouble(self) -> str:
        """Nothing."""
        return ""

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        return self._policy.decide(view)


class Reloaded:
    """The policy in a file, as the file is now; the former one where it cannot be loaded.

    One that did not answer in time is left alone for a while, each time for longer: its loops take a processor from all others.

    Attributes:
        trouble: why the file cannot be loaded as it is now; empty if it can.
    """

    def __init__(self, file: PolicyFile) -> None:
        self.trouble = ""
        self._file = file
        self._pause_s = _FIRST_PAUSE_S
        self._rests_until = 0.0
        self._overdue = ""

    def __str__(self) -> str:
        return str(self._file)

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        now = asyncio.get_running_loop().time
        if self._file.has_changed():
            await self._load()
        if now() < self._rests_until:
            raise PolicyTimeoutError(self._overdue)
        try:
            actions = await self._file.decide(view)
        except PolicyTimeoutError as error:
            self._overdue = str(error)
            self._rests_until = now() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            raise
        self._pause_s = _FIRST_PAUSE_S
        return actions

    async def _load(self) -> None:
        try:
            await self._file.load()
        except PolicyLoadError as error:
            self.trouble = str(error)
            raise
        self.trouble, self._pause_s, self._rests_until = "", _FIRST_PAUSE_S, 0.0
        _log.info("policy.loaded", file=str(self._file))


async def decider_of(name: str | None) -> Decider:
    """The policy of that name: `FILE.py:Name` is a user's own, `ShortestRemaining` came with the runtime; None for the default.

    Raises:
        PolicyLoadError: there is no such policy.
    """
    if name is None:
        return Trusted(policies.default(), "default")
    if ":" not in name:
        return Trusted(_shipped(name))
    file = PolicyFile(name)
    await file.load()
    return Reloaded(file)


def _shipped(name: str) -> Policy:
    shipped = {
        key: found for key, found in vars(policies).items() if inspect.isclass(found) and found.__module__ == policies.__name__
    }
    if name in policies.MADE_WITH_ARGUMENTS:
        raise PolicyLoadError(
            f"{name} does nothing unless it is told what: write a file with `from {policies.__name__} import {name}` and "
            f"`Mine = {name}({policies.MADE_WITH_ARGUMENTS[name]})`, and name it as FILE.py:Mine"
        )
    if name not in shipped:
        known = ", ".join(key for key in shipped if key not in policies.MADE_WITH_ARGUMENTS)
        raise PolicyLoadError(f"{name!r} names no policy: write it as FILE.py:Name, or take one of {known}")
    return cast(Policy, shipped[name]())


async def decision_of(decider: Decider, governor: Governor, view: View, now: float) -> Decision:
    """What a policy says to a view, checked; if it says nothing, the decision has the error.

    Args:
        decider: the policy.
        governor: what has been decided so far.
        view: as of its last `settle`.
        now: on the clock of the view.
    """
    try:
        actions = await decider.decide(view)
        return governor.decide(view, actions, now)
    except PolicyError as error:
        return governor.fail(str(error), now)
    except Exception as error:
        return governor.fail(f"{type(error).__name__}: {error}", now)
