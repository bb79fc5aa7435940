"""The calls of one run as a tree, made of what the workers remember. Pure: no I/O, no clock.

A call stands below the one that made it. One whose maker nobody remembers begins a tree of its own, so that a run which is
half forgotten is still shown, in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from nalar_mq.errors import UnknownCallError
from nalar_mq.lookout import View
from nalar_mq.messages import CallRecord

WIDTH: Final = 80
_LEAST_NAME: Final = 16
_LONGEST_PLACE: Final = 28
_TIME: Final = 8
_DEEPEST: Final = 8  # levels that are shown by indentation; deeper ones by their number


class TracedCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a run. Times are in seconds; those of different machines agree as well as their clocks do.

    Attributes:
        id: of the call, in hexadecimal.
        parent: id of the call that made it; empty for a root.
        depth: 0 for the first call of a tree, one more for each call in between.
        name: `actor` or `actor.method`; of an instance that unmodified Python makes, reads or changes: `actor()`,
            `actor.attribute`, `actor.attribute =`.
        state: `queued`, `running`, `waiting`, `done`, `failed` or `cancelled`.
        error: `module:qualname` of the error it ended with; empty without one.
        worker, node: where it ran, or waits to.
        owner: the process that made it.
        session, job: what it belongs to; `job` is empty outside jobs.
        priority, attempt: as it had them in the end.
        arrived_at: when it came to its worker, in seconds since the epoch.
        start_s: from the arrival of the root to its own.
        waited_s: from its arrival until it began to run, or until now, or until it ended without having run.
        ran_s: from then to its end, or until now; what it waited for others is part of that. None if it has not begun.
    """

    id: str
    parent: str
    depth: int
    name: str
    state: str
    error: str
    worker: str
    node: str
    owner: str
    session: str
    job: str
    priority: int
    attempt: int
    arrived_at: float
    start_s: float
    waited_s: float
    ran_s: float | None


class Trace(msgspec.Struct, frozen=True):
    """A run. `str(trace)` shows it as a tree in 80 columns.

    Attributes:
        wanted: the id that was asked for; empty for the last run.
        calls: each followed by those it made, which are in the order of their arrival.
    """

    wanted: str
    calls: tuple[TracedCall, ...]

    def __str__(self) -> str:
        return "\n".join(lines_of(self.calls))


class _Found(msgspec.Struct, frozen=True):
    """A record, who told it, and when the call arrived, in seconds since the epoch."""

    record: CallRecord
    view: View
    arrived_s: float


_Children = Mapping[bytes, Sequence[_Found]]


def trace_of(wanted: str, views: Iterable[View], nodes: Mapping[str, str]) -> Trace:
    """The run that `wanted`, a call in hexadecimal, a session or a job, belongs to; all of them if it is in several.

    Args:
        wanted: the run that began last if empty.
        views: what the workers remember.
        nodes: node by name of the worker.

    Raises:
        UnknownCallError: nobody remembers it.
    """
    found = _latest(views)
    heads = [_head_of(each, found) for each in found.values() if _is_meant(each.record, wanted)]
    if not heads:
        raise UnknownCallError(wanted)
    chosen = {head.record.id: head for head in sorted(heads, key=_by_arrival)}
    if not wanted:
        last = max(heads, key=_by_arrival)
        chosen = {last.record.id: last}
    children: dict[bytes, list[_Found]] = {}
    for each in sorted(found.values(), key=_by_arrival):
        children.setdefault(each.record.parent, []).append(each)
    passed: set[bytes] = set()
    return Trace(wanted, tuple(call for head in chosen.values() for call in _walk(head, children, nodes, passed)))


def _latest(views: Iterable[View]) -> dict[bytes, _Found]:
    """One record of each call: of its last attempt, and of its end if it has ended."""
    found: dict[bytes, _Found] = {}
    for view in views:
        for record in view.records:
            former = found.get(record.id)
            if former is None or _weight(former.record) < _weight(record):
                found[record.id] = _Found(record, view, record.arrived_s + view.ahead_s)
    return found


def _weight(record: CallRecord) -> tuple[int, float]:
    return record.attempt, record.ended_s


def _by_arrival(found: _Found) -> tuple[float, bytes]:
    return found.arrived_s, found.record.id


def _is_meant(record: CallRecord, wanted: str) -> bool:
    return not wanted or wanted in (record.session, record.job) or record.id.hex() == wanted.lower()


def _head_of(found: _Found, all_found: Mapping[bytes, _Found]) -> _Found:
    """The first call of its tree that anybody remembers."""
    passed = {found.record.id}
    while (maker := all_found.get(found.record.parent)) is not None and maker.record.id not in passed:
        found = maker
        passed.add(found.record.id)
    return found


def _walk(head: _Found, children: _Children, nodes: Mapping[str, str], passed: set[bytes]) -> Iterable[TracedCall]:
    ahead = [(head, 0)]
    while ahead:
        found, depth = ahead.pop()
        id = found.record.id
        if id in passed:
            continue
        passed.add(id)
        yield _traced(found, depth, head, nodes)
        ahead.extend((child, depth + 1) for child in reversed(children.get(id, ())))


def _traced(found: _Found, depth: int, head: _Found, nodes: Mapping[str, str]) -> TracedCall:
    record, worker = found.record, found.view.name
    until_s = record.ended_s or found.view.now_s
    return TracedCall(
        id=record.id.hex(),
        parent=record.parent.hex(),
        depth=depth,
        name=_name(record.actor, record.method),
        state=record.state,
        error=record.error,
        worker=worker,
        node=nodes.get(worker, ""),
        owner=record.owner,
        session=record.session,
        job=record.job,
        priority=record.priority,
        attempt=record.attempt,
        arrived_at=round(found.arrived_s, 6),
        start_s=_span(head.arrived_s, found.arrived_s),
        waited_s=_span(record.arrived_s, record.began_s or until_s),
        ran_s=_span(record.began_s, until_s) if record.began_s else None,
    )


def _name(actor: str, method: str) -> str:
    """As one would write it in Python; what stubs of unmodified Python do to an instance has signs for methods."""
    match method[:1], method[1:]:
        case "", _:
            return actor
        case "+", _:
            return f"{actor}()"
        case ".", attribute:
            return f"{actor}.{attribute}"
        case "=", attribute:
            return f"{actor}.{attribute} ="
        case "-", attribute:
            return f"del {actor}.{attribute}"
        case _:
            return f"{actor}.{method}"


def _span(begin_s: float, end_s: float) -> float:
    return round(max(0.0, end_s - begin_s), 6)


def lines_of(calls: Sequence[TracedCall]) -> list[str]:
    """The calls as lines of at most 80 characters, names and places of any length cut to what there is room for."""
    place = min(_LONGEST_PLACE, max([len("WORKER"), *(len(_place(call)) for call in calls)]))
    name = max(_LEAST_NAME, WIDTH - place - 3 * (_TIME + 1) - 1)
    lines = [f"{'CALL':<{name}} {'START':>{_TIME}} {'WAITED':>{_TIME}} {'RAN':>{_TIME}} WORKER"]
    for call, (branch, below) in zip(calls, _branches(calls), strict=True):
        shown = _cut(f"{branch}{_plain(call.name)}", name)
        times = " ".join(f"{_seconds(time_s):>{_TIME}}" for time_s in (call.start_s, call.waited_s, call.ran_s))
        lines.append(f"{shown:<{name}} {times} {_cut_middle(_place(call), place)}".rstrip())
        if call.state != "done":
            lines.append(_cut(f"{below}  {_plain(call.state)}{': ' if call.error else ''}{_plain(call.error)}", WIDTH))
    return lines


def _branches(calls: Sequence[TracedCall]) -> list[tuple[str, str]]:
    """What stands before each call, and before a further line of it."""
    shown: list[tuple[str, str]] = []
    goes_on: set[int] = set()  # depths at which a further call follows below
    for position in range(len(calls) - 1, -1, -1):
        depth = calls[position].depth
        has_children = position + 1 < len(calls) and calls[position + 1].depth > depth
        stem = "".join("│  " if level in goes_on else "   " for level in range(1, min(depth, _DEEPEST)))
        branch = ("├─ " if depth in goes_on else "└─ ") if depth else ""
        if depth > _DEEPEST:
            branch = f"{branch}({depth}) "
        rest = ("│  " if depth in goes_on else "   ") if depth else ""
        shown.append((stem + branch, stem + rest + ("│" if has_children else "")))
        goes_on = {level for level in goes_on if level < depth} | {depth}
    return shown[::-1]


def _place(call: TracedCall) -> str:
    """The worker; with its node where the name does not begin with it."""
    worker = _plain(call.worker)
    return worker if worker.startswith(call.node) else f"{_plain(call.node)}/{worker}"


def _seconds(time_s: float | None) -> str:
    if time_s is None:
        return "-"
    return f"{time_s:.3f}" if time_s < 1_000 else f"{time_s:.0f}" if time_s < 10**_TIME else f"{time_s:.1e}"


def _plain(text: str) -> str:
    """Names come from the wire: what would do something to a terminal is shown, not done."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _cut_middle(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    half = (size - 1) // 2
    return f"{text[: size - 1 - half]}…{text[len(text) - half :]}"
