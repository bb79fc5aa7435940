"""What a process tells the controllers of its calls: numbered reports whose parts are columns of bytes.

    worker: Changes ──Report 1, 2, 3, …──▶ NS.report.<worker> ──▶ every global controller, and whoever else listens
            Changes ◀──────Again────────── NS.again.<worker>  ◀── a controller that has missed one

A future has a *slot* in its process from its first report to its last; of what happens to it only the change is told. One that
begins and ends between two reports is never told of, it only counts. Sessions and jobs have slots, too, for as long as futures
that have been told of belong to them, or a session is held; their names travel once. A *kind*, an actor and one of its
methods, has a number for the life of the process.

    Report      number, time, and columns:
      opened, closed      slots of sessions and jobs that are taken, with their names, and that are free again
      begun               futures told of for the first time: slot, id, parent, kind, session, job, state, times, dependencies
      changed, moved      futures in another state since then, or with another priority
      ended               futures that are gone, and how
      queues              what is queued and running, by actor; all of it, where any has changed
      tallies, buckets    calls that have ended in this process's life, by kind: how many, seconds of waiting and of work, and
                          how many of them waited and worked for how long; those numbers that have changed
      held, let_go        sessions whose state is here, by agent
      engines             model servers that the process asks: what runs and waits there, and how fast
      accounts, spent     what calls have cost in this process's life, by account: what it is for, and those sums that have
                          changed

Who misses a number knows it, and asks for everything anew: the answer is reports like any other that are marked as pieces 1 to
n of a whole, which replaces all that was known of the process. There slots are given anew if there were many, from 0 on in the
order in which they are told of. So no slot beyond `FEW_SLOTS` is far beyond how many the process has taken since it told
everything, and a report that names one is refused: room for all slots below would cost whoever takes it in.

Times are seconds on the clock of the process; the report says what that shows. All columns are little-endian and of fixed width
(`BEGUN` and its like say which), so that numpy can take them as they are. `nalar_mq.changes` makes reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, inf
from typing import Final

import msgspec

from nalar_mq.address import LONGEST_TOKEN
from nalar_mq.directives import MOST_RESOURCES
from nalar_mq.errors import MalformedReportError, UnsupportedVersionError
from nalar_mq.messages import WIRE_VERSION

CREATED: Final = 1  # waits for arguments
QUEUED: Final = 2
RUNNING: Final = 3
WAITING: Final = 4  # for others, in the middle of its run
STATES: Final = {CREATED: "created", QUEUED: "queued", RUNNING: "running", WAITING: "waiting"}

DONE: Final = 0
FAILED: Final = 1
CANCELLED: Final = 2

NO_JOB: Final = 0xFFFF_FFFF
MOST_SLOTS: Final = 1 << 22
FEW_SLOTS: Final = 1 << 16  # that a process may have at any time, however little it has told of
MOST_KINDS: Final = 4096
MOST_PIECES: Final = 4096
MOST_ACCOUNTS: Final = 16_384  # of each of `SCOPES`
MOST_ENGINES: Final = 64
LONGEST_NAME: Final = 2 * LONGEST_TOKEN + 1  # session/instance


class Serves(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a report tells of an actor that its process serves.

    Attributes:
        kind: `agent`, `tool` or `workflow`.
        stateful: its sessions never move.
        concurrency: calls that its replica runs at once.
        min_instances, max_instances: bounds on its replicas; None for no bound.
        resources: what a replica reserves, by name.
    """

    kind: str
    stateful: bool = False
    concurrency: int = 1
    min_instances: int = 1
    max_instances: int | None = None
    resources: dict[str, float] = {}


class EngineFigures(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a report tells of a model server that its process has asked.

    Attributes:
        running, waiting: requests that it works on, and that wait there; `waiting` is None if it does not say.
        cache_used: of its KV cache, from 0 to 1; None if it does not say.
        tokens_per_s: that it has written lately.
        requests, errors: of this process, in its life, that have ended, and that the server has failed or refused.
        is_whole: the first four are of the server as a whole, as it says itself; else they are of this process's requests.
    """

    running: int
    waiting: int | None = None
    cache_used: float | None = None
    tokens_per_s: float = 0.0
    requests: int = 0
    errors: int = 0
    is_whole: bool = False


class Named(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Slots and the names that stand in them from now on; `tenants` is empty if all of them are."""

    slots: bytes
    names: tuple[str, ...]
    tenants: tuple[str, ...] = ()


class Begun(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Columns of futures that are told of for the first time; `deps` has the ids of all, one after the other."""

    slots: bytes
    ids: bytes
    parents: bytes
    kinds: bytes
    sessions: bytes
    jobs: bytes
    priorities: bytes
    states: bytes
    arrived: bytes
    began: bytes
    deadlines: bytes
    budgets: bytes
    dep_counts: bytes
    deps: bytes


class Account(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What spending is summed for, from 0 on; named once, by a number that no other account of the process ever has.

    Attributes:
        number: grows from account to account; one that was dropped to make room is opened again under another number.
        scope: one of `SCOPES`.
        name: of the session, job and so on.
        unit: of the amounts, such as `tokens`.
    """

    number: int
    scope: str
    name: str
    unit: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """All that is text in it."""
        return self.scope, self.name, self.unit


class Columns(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The columns of everything else, by their names in `CHANGED`, `QUEUES` and so on."""

    columns: tuple[bytes, ...]


BEGUN: Final = {
    "slots": "<u4",
    "ids": "<u8,<u8",
    "parents": "<u8,<u8",
    "kinds": "<u2",
    "sessions": "<u4",
    "jobs": "<u4",
    "priorities": "<i4",
    "states": "<u1",
    "arrived": "<f8",
    "began": "<f8",
    "deadlines": "<f8",
    "budgets": "<f4",
    "dep_counts": "<u2",
}
CHANGED: Final = {"slots": "<u4", "states": "<u1", "at": "<f8"}
MOVED: Final = {"slots": "<u4", "priorities": "<i4"}
ENDED: Final = {"slots": "<u4", "outcomes": "<u1"}
TALLIES: Final = {"kinds": "<u2", "ended": "<u4", "failed": "<u4", "waited_s": "<f8", "ran_s": "<f8"}
BUCKETS: Final = {"kinds": "<u2", "is_work": "<u1", "buckets": "<u1", "counts": "<u4"}
HELD: Final = {"kinds": "<u2", "sessions": "<u4"}
SPENT: Final = {"accounts": "<u4", "amounts": "<f8"}
SCOPES: Final = ("session", "job", "workflow", "agent", "tenant")
_ABSENT: Final = Columns(())
NOBODY: Final = Named(b"", ())


class Report(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=230, kw_only=True):
    """One report. See the module for its parts.

    Attributes:
        version: `WIRE_VERSION`.
        name, incarnation: the process.
        node: the machine or GPU it runs on.
        number: from 1, one more for each report of this incarnation.
        now_s: its clock.
        piece, pieces: which piece of a whole, from 1, and of how many; 0 and 0 for changes.
        draining: it takes no new calls.
        serves: the actors it serves; None if that has not changed.
        resources: used and available amounts, by name; None if that has not changed.
        kinds_before: kinds told of before.
        kinds: further kinds, as actor and method.
        accounts: further accounts.
        able: the actors of its app, which it could serve; None if that has not changed.
        accounts_from: for each of `SCOPES` the number below which its accounts are not told of any more; empty for 0.
        engines: model servers that the process has asked, by host, port and path; None if nothing of that has changed.
    """

    version: int
    name: str
    incarnation: int
    node: str
    number: int
    now_s: float
    piece: int = 0
    pieces: int = 0
    draining: bool = False
    serves: dict[str, Serves] | None = None
    resources: dict[str, tuple[float, float]] | None = None
    kinds_before: int = 0
    kinds: tuple[tuple[str, str], ...] = ()
    sessions: Named = NOBODY
    sessions_closed: bytes = b""
    jobs: Named = NOBODY
    jobs_closed: bytes = b""
    begun: Begun | None = None
    changed: Columns = _ABSENT
    moved: Columns = _ABSENT
    ended: Columns = _ABSENT
    queues: dict[str, tuple[int, int]] | None = None
    tallies: Columns = _ABSENT
    buckets: Columns = _ABSENT
    held: Columns = _ABSENT
    let_go: Columns = _ABSENT
    spent: Columns = _ABSENT
    accounts: tuple[Account, ...] = ()
    able: dict[str, Serves] | None = None
    accounts_from: tuple[int, ...] = ()
    engines: dict[str, EngineFigures] | None = None


class Again(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=231):
    """Asks the incarnation of a process to tell everything anew."""

    version: int
    incarnation: int


_encoder = msgspec.msgpack.Encoder()
_reports = msgspec.msgpack.Decoder(Report)
_requests = msgspec.msgpack.Decoder(Again)
_TABLES: Final = {
    "changed": CHANGED,
    "moved": MOVED,
    "ended": ENDED,
    "tallies": TALLIES,
    "buckets": BUCKETS,
    "held": HELD,
    "let_go": HELD,
    "spent": SPENT,
}


def width_of(column: str) -> int:
    """Bytes of one element of a column whose type is written as in `BEGUN`."""
    return sum(int(part[2:]) for part in column.split(","))


_WIDTHS: Final = {name: tuple(map(width_of, table.values())) for name, table in _TABLES.items()}
_BEGUN_WIDTHS: Final = tuple(width_of(BEGUN[name]) for name in Begun.__struct_fields__ if name != "deps")


def encode_report(report: Report | Again) -> bytes:
    """Bytes of a report, or of the request for everything anew."""
    return _encoder.encode(report)


def decode_again(data: bytes) -> Again:
    """Reads an `Again`.

    Raises:
        MalformedReportError, UnsupportedVersionError: it is none.
    """
    try:
        request = _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedReportError(str(error)) from None
    if request.version != WIRE_VERSION:
        raise UnsupportedVersionError(request.version)
    return request


def decode_report(data: bytes) -> Report:
    """Reads a report; its columns have whole elements and equal lengths, what stands in them is not looked at.

    Raises:
        MalformedReportError, UnsupportedVersionError: it is none.
    """
    try:
        report = _reports.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedReportError(str(error)) from None
    if report.version != WIRE_VERSION:
        raise UnsupportedVersionError(report.version)
    _check_head(report)
    _check_columns(report)
    return report


def _check_head(report: Report) -> None:
    if report.number < 1 or report.incarnation < 0 or not abs(report.now_s) < inf:
        raise MalformedReportError("its number, incarnation or time is out of range")
    if not 0 <= report.piece <= report.pieces <= MOST_PIECES or bool(report.piece) != bool(report.pieces):
        raise MalformedReportError(f"piece {report.piece} of {report.pieces}")
    if report.kinds_before < 0 or report.kinds_before + len(report.kinds) > MOST_KINDS:
        raise MalformedReportError(f"more than {MOST_KINDS} kinds")
    accounts = tuple(text for one in report.accounts for text in one.texts)
    actors = (*(report.serves or ()), *(report.queues or ()), *(report.able or ()), *(report.engines or ()), *accounts)
    if max(len(report.serves or ()), len(report.queues or ()), len(report.able or ())) > MOST_KINDS:
        raise MalformedReportError(f"more than {MOST_KINDS} actors")
    serves = (*(report.serves or {}).values(), *(report.able or {}).values())
    resources = [[*(report.resources or ())], *([*each.resources] for each in serves)]
    if max(map(len, resources)) > MOST_RESOURCES:
        raise MalformedReportError(f"more than {MOST_RESOURCES} resources")
    kinds = (name for kind in report.kinds for name in kind)
    strings = (report.name, report.node, *kinds, *actors, *(name for named in resources for name in named))
    if any(len(name) > LONGEST_NAME for name in strings):
        raise MalformedReportError(f"a name of more than {LONGEST_NAME} characters")
    if any(queued < 0 or running < 0 for queued, running in (report.queues or {}).values()):
        raise MalformedReportError("a queue of negative length")
    if any(not (0 <= used < inf and 0 <= whole < inf) for used, whole in (report.resources or {}).values()):
        raise MalformedReportError("an amount of a resource that is none")
    if any(not 0 <= amount < inf for each in serves for amount in each.resources.values()):
        raise MalformedReportError("a reserved amount that is none")
    _check_engines(report.engines or {})


def _check_engines(engines: dict[str, EngineFigures]) -> None:
    if len(engines) > MOST_ENGINES:
        raise MalformedReportError(f"more than {MOST_ENGINES} engines")
    for told in engines.values():
        figures = (told.running, told.waiting or 0, told.cache_used or 0.0, told.tokens_per_s, told.requests, told.errors)
        if not all(0 <= figure < inf for figure in figures):
            raise MalformedReportError("a figure of an engine that is none")


def _check_columns(report: Report) -> None:
    for named, closed in ((report.sessions, report.sessions_closed), (report.jobs, report.jobs_closed)):
        if len(named.slots) != 4 * len(named.names) or len(named.tenants) not in (0, len(named.names)) or len(closed) % 4:
            raise MalformedReportError("names and slots differ in number")
        if named.names and max(map(len, named.names)) > LONGEST_NAME:
            raise MalformedReportError(f"a name of more than {LONGEST_NAME} characters")
        if named.tenants and max(map(len, named.tenants)) > LONGEST_NAME:
            raise MalformedReportError(f"a tenant of more than {LONGEST_NAME} characters")
    for table, widths in _WIDTHS.items():
        told: Columns = getattr(report, table)
        if told is not _ABSENT and told.columns and not _fit(told.columns, widths):
            raise MalformedReportError(f"columns of {table!r} differ in length")
    if report.begun is not None:
        columns = msgspec.structs.astuple(report.begun)
        if not _fit(columns, _BEGUN_WIDTHS) or len(report.begun.deps) % 16:
            raise MalformedReportError("columns of 'begun' differ in length")


def _fit(columns: Sequence[bytes], widths: Sequence[int]) -> bool:
    if len(columns) < len(widths):
        return False
    count = len(columns[0]) // widths[0]
    return [count * width for width in widths] == list(map(len, columns[: len(widths)]))


def bucket_of(seconds: float) -> int:
    """Number of the bucket for a time: four for each doubling, from a microsecond to two weeks."""
    fraction, exponent = frexp(seconds if seconds > 1e-6 else 1e-6)
    bucket = 4 * exponent + int(8 * fraction) + 76
    return bucket if bucket < 255 else 255


def bucket_floor_s(bucket: int) -> float:
    """The least time that falls into a bucket."""
    return float((4 + bucket % 4) / 8 * 2.0 ** (bucket // 4 - 20))
