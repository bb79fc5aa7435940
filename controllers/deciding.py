"""Where the decisions of a controller come from: a policy that came with the runtime, or a user's own.

View ──▶ policy ──▶ guards ──▶ Decision; with its error where there is no answer, and then all stays as it was
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Final, Protocol, cast

from nalar_mq.errors import PolicyError, PolicyLoadError
from nalar_mq.logs import logger

from . import policies
from .governing import Decision, Governor
from .policy import Action, Policy
from .policy_file import PolicyFile
from .view import View

PERIOD_S: Final = 0.25
_log = logger(__name__)


class Decider(Protocol):
    """Where decisions come from; `str` says what people call it."""

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

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        return self._policy.decide(view)


class Reloaded:
    """The policy in a file, as the file is now; the former one where it cannot be loaded."""

    def __init__(self, file: PolicyFile) -> None:
        self._file = file

    def __str__(self) -> str:
        return str(self._file)

    async def decide(self, view: View) -> Iterable[Action]:
        """What the policy says."""
        if self._file.has_changed():
            await self._file.load()
            _log.info("policy.loaded", file=str(self._file))
        return await self._file.decide(view)


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
