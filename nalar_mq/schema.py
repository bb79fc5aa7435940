"""State that was kept by a former version of an agent, brought to the present one.

    @agent
    class Notebook:
        notes: ManagedList[Note]

        @upgrade(1)
        @staticmethod
        def texts_become_notes(state: dict[str, Any]) -> dict[str, Any]:
            return {"notes": [Note(text) for text in state["notes"]]}

The version of an agent's state is one more than the highest that it upgrades, 1 without any. A session that was kept by a
lower one is upgraded, step by step, when it is first called, and what came of that is committed before anything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

from nalar_mq.errors import DirectiveError, NalarError, StateSchemaError
from nalar_mq.session_state import Entries
from nalar_mq.state import entries_from, plain_from
from nalar_mq.store import Change

F = TypeVar("F")

Step = Callable[[dict[str, Any]], dict[str, Any]]

_MARK: Final = "__nalar_upgrade__"


def upgrade(version: int) -> Callable[[F], F]:
    """Marks a static method of an agent that brings state of `version` to the next one.

    It takes the fields by name, as plain lists, dicts and values, and returns those of the next version in the same way.
    It is run once for each session, and again if the worker is lost before that was committed.

    Raises:
        DirectiveError: `version` is below 1.
    """
    if version < 1:
        raise DirectiveError(f"@upgrade({version}): the first version of an agent's state is 1")

    def mark(function: F) -> F:
        if not _is_static(function):
            raise DirectiveError(f"@upgrade({version}) stands above @staticmethod: an upgrade has no instance")
        setattr(function, _MARK, version)
        return function

    return mark


def _is_static(found: object) -> bool:
    return isinstance(found, staticmethod)


def steps_of(cls: type) -> dict[int, Step]:
    """The upgrades of an agent's class, by the version that they upgrade.

    Raises:
        DirectiveError: two upgrade the same version.
    """
    steps: dict[int, Step] = {}
    for name in dir(cls):
        found: object = inspect.getattr_static(cls, name, None)
        version = getattr(found, _MARK, None) if _is_static(found) else None
        if version is None:
            continue
        if version in steps:
            raise DirectiveError(f"class {cls.__qualname__}: two methods are marked @upgrade({version})")
        steps[version] = getattr(cls, name)
    return steps


def version_of(steps: Mapping[int, Step]) -> int:
    """The version of state that an agent with those upgrades has."""
    return max(steps, default=0) + 1


def upgraded(
    cls: type, steps: Mapping[int, Step], where: str, version: int, kinds: Mapping[str, str], entries: Entries
) -> list[Change]:
    """What is to be changed in a session that was kept as `version`.

    Args:
        cls: of the agent.
        steps: its upgrades.
        where: the session, for messages.
        version: of what was kept.
        kinds: of the fields that were kept.
        entries: of the session.

    Raises:
        StateSchemaError: it cannot be brought to the present version.
    """
    wanted = version_of(steps)
    if version > wanted:
        raise StateSchemaError(f"{where} was kept by version {version} of its agent, and this one is version {wanted}")
    try:
        state = plain_from(kinds, entries)
        for step in range(version, wanted):
            function = steps.get(step)
            if function is None:
                raise StateSchemaError(
                    f"{where} was kept by version {step} of its agent, and nothing brings it to version {step + 1}: "
                    f"mark what does with @upgrade({step})"
                )
            state = _checked(function(state), where, step)
        after = entries_from(cls, state)
    except NalarError as error:
        if isinstance(error, StateSchemaError):
            raise
        raise StateSchemaError(f"{where} cannot be upgraded from version {version}: {error}") from error
    except Exception as error:
        raise StateSchemaError(f"{where} cannot be upgraded from version {version}: {error!r}") from error
    stays = {(field, order) for field, some in after.items() for order, _ in some}
    gone: list[Change] = [
        (field, order, None) for field, some in entries.items() for order, _ in some if (field, order) not in stays
    ]
    return [*gone, *((field, order, data) for field, some in after.items() for order, data in some)]


def _checked(state: object, where: str, step: int) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise StateSchemaError(f"{where}: @upgrade({step}) must return the fields as a dict, and returned {state!r:.60}")
    return cast("dict[str, Any]", state)
