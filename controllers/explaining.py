"""Why a call ran where and when it did: what its processes tell, and what the controller had decided meanwhile. Pure.

What is told of a call is what happened to it in each process: it came, it was sent somewhere, it got another priority, its
session moved, it began, it ended. Of the history of decisions those count that were about its session, its agent or its worker
and held while it was there, also those that began before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import msgspec

from nalar_mq.actions import (
    Act,
    Allow,
    Decided,
    Kill,
    Limit,
    Migrate,
    Provision,
    Route,
    SetPriority,
    State,
    Weights,
    describe,
)
from nalar_mq.errors import UnknownCallError
from nalar_mq.lookout import View
from nalar_mq.messages import CallRecord

from .policy import key_of

CONTROLLER = "controller"


class Step(msgspec.Struct, frozen=True):
    """Something that happened to a call: seconds since 1970, the process that tells it, what, and why if that is known."""

    at_s: float
    where: str
    what: str
    reason: str = ""


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A call and all that is known to have happened to it, in the order of time."""

    id: str
    call: str
    session: str
    owner: str
    state: str
    steps: tuple[Step, ...]


_Record: TypeAlias = tuple[View, CallRecord]


def explained(id: bytes, views: Iterable[View], history: Iterable[Decided]) -> Explained:
    """All that is known of a call.

    Args:
        id: of the call.
        views: what the processes have answered, with records and what was decided about this call.
        history: the decisions, the oldest first.

    Raises:
        UnknownCallError: no process remembers it.
    """
    views = list(views)
    records = sorted(
        ((view, record) for view in views for record in view.records if record.id == id), key=lambda found: found[1].arrived_s
    )
    if not records:
        raise UnknownCallError(id.hex())
    steps = [step for found in records for step in _life(*found)]
    for view in views:
        steps += [Step(told.at_s + view.ahead_s, view.name, told.what, told.reason) for told in view.explanations]
    steps += _decisions(records, list(history))
    _, last = records[-1]
    return Explained(
        id=id.hex(),
        call=".".join(filter(None, (last.actor, last.method))),
        session=last.session,
        owner=last.owner,
        state=last.state,
        steps=tuple(sorted(dict.fromkeys(steps), key=lambda step: step.at_s)),
    )


def _life(view: View, record: CallRecord) -> Iterator[Step]:
    attempt = f", attempt {record.attempt}" if record.attempt else ""
    yield Step(record.arrived_s + view.ahead_s, view.name, f"came from {record.owner}{attempt}, priority {record.priority}")
    if record.began_s:
        waited_s = record.began_s - record.arrived_s
        yield Step(record.began_s + view.ahead_s, view.name, f"began after {waited_s:.3f} s")
    if record.ended_s:
        yield Step(record.ended_s + view.ahead_s, view.name, record.state + (f": {record.error}" if record.error else ""))


def _decisions(records: list[_Record], history: list[Decided]) -> Iterator[Step]:
    """Decisions that were about the call and held while it was there."""
    record = records[-1][1]
    workers = {view.name for view, _ in records}
    from_s = min(each.arrived_s + view.ahead_s for view, each in records)
    ends = [each.ended_s + view.ahead_s if each.ended_s else float("inf") for view, each in records]
    until_s = max(ends)
    holds: dict[tuple[str, ...], Step] = {}
    for entry in history:
        if entry.at_s > until_s:
            break
        is_meanwhile = entry.at_s >= from_s
        for state in (*entry.began, *entry.ended):
            former = holds.pop(key_of(state), None)
            if former is not None and is_meanwhile:
                yield former
        for state in entry.began:
            if _is_about(state, record):
                holds[key_of(state)] = Step(entry.at_s, CONTROLLER, describe(state), state.reason)
        if not is_meanwhile:
            continue
        for state in entry.ended:
            if _is_about(state, record):
                yield Step(entry.at_s, CONTROLLER, f"no more: {describe(state)}")
        for act in entry.acts:
            if _concerns(act, record, workers):
                yield Step(entry.at_s, CONTROLLER, describe(act), act.reason)
        for refused in entry.refused:
            if f"session {record.session} " in refused.action:
                yield Step(entry.at_s, CONTROLLER, f"refused: {refused.action}", refused.reason)
    yield from holds.values()


def _is_about(state: State, record: CallRecord) -> bool:
    match state:
        case Route():
            return (state.session, state.agent) == (record.session, record.actor)
        case SetPriority():
            return state.session == record.session and state.agent in ("", record.actor)
        case Limit():
            return state.agent == record.actor and state.session in ("", record.session) and state.job in ("", record.job)
        case Weights() | Allow():
            return state.agent == record.actor


def _concerns(act: Act, record: CallRecord, workers: set[str]) -> bool:
    match act:
        case Migrate():
            return (act.session, act.agent) == (record.session, record.actor)
        case Kill():
            return act.instance in workers and act.agent in ("", record.actor)
        case Provision():
            return act.agent == record.actor
