"""How many calls of a session, a tenant or a job may run at once in one mailbox. Pure.

A group of calls is named by its session, its tenant and its job; an empty one stands for all. A call is in every group that
fits it, and runs while all of them have room. One that waits for others does not count; it resumes at once, even if that makes
one too many for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import TypeAlias

Group: TypeAlias = tuple[str, str, str]
"""Session, tenant and job; empty for all."""


def groups_with(session: str, tenant: str, job: str) -> Iterator[Group]:
    """All groups that a call of these may be in: at most eight."""
    sessions, tenants, jobs = [("", name) if name else ("",) for name in (session, tenant, job)]
    return product(sessions, tenants, jobs)


class Limits:
    """The limits of one mailbox, and what counts in them.

    Args:
        limits: the most calls at once, by group.
    """

    def __init__(self, limits: Mapping[Group, int]) -> None:
        self._limits = dict(limits)
        self._counts: dict[Group, int] = dict.fromkeys(limits, 0)

    def groups_of(self, session: str, tenant: str, job: str) -> tuple[Group, ...]:
        """The limited groups that a call is in."""
        return tuple(group for group in groups_with(session, tenant, job) if group in self._limits)

    def room_in(self, group: Group) -> int:
        """How many more may run; negative if there are too many."""
        return self._limits[group] - self._counts[group]

    def full_among(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """Those that have no room."""
        return tuple(group for group in groups if self._counts[group] >= self._limits[group])

    def enter(self, groups: tuple[Group, ...]) -> None:
        """One more call counts in them."""
        for group in groups:
            self._counts[group] += 1

    def leave(self, groups: tuple[Group, ...]) -> None:
        """One call less does."""
        for group in groups:
            self._counts[group] -= 1
