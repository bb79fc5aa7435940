"""What controllers decide, and the records in which it travels.

    leader ──States──▶ NS.states, and NS-control/states     what holds: routes, priorities, limits, permissions; all of it
    leader ──Acts────▶ NS-acts/acts                         what is to happen once; there for one lease
    leader ──Ranks───▶ NS.ranks.<process>                   priorities of many sessions, as columns; changes, now and then all
    leader ──Decided─▶ NS.decided, kept in NS-decisions     what was decided and refused, and why: for people, as JSON

Each record bears the *term* of the leader that wrote it: the revision of the key by which it became one, so that of two leaders
the later one has the higher term. Records in key-value buckets are written by compare-and-set against what the leader has
written there itself; a new one begins by writing over what it finds, and from then on the former one's writes are refused.
Whoever obeys refuses records of a lower term than it has seen, see `nalar_mq.standing`.
"""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

import msgspec

from nalar_mq.errors import MalformedMessageError, UnsupportedVersionError
from nalar_mq.messages import WIRE_VERSION


class Route(msgspec.Struct, frozen=True, tag="route"):
    """All calls of a session to an agent go to one instance."""

    session: str
    agent: str
    instance: str
    reason: str = ""


class Weights(msgspec.Struct, frozen=True, tag="weights"):
    """Calls to an agent go to these instances, in proportion to the weights."""

    agent: str
    instances: tuple[str, ...]
    weights: tuple[float, ...]
    reason: str = ""


class SetPriority(msgspec.Struct, frozen=True, tag="priority"):
    """A session has this priority everywhere, or at one agent."""

    session: str
    value: int
    agent: str = ""
    reason: str = ""


class Limit(msgspec.Struct, frozen=True, tag="limit"):
    """At most so many calls run at once at each instance of an agent: all of them, or those of a session, tenant or job.

    Attributes:
        refuses: there are none, and those that have not begun fail at once instead of waiting; `running` is 0 then.
    """

    agent: str
    running: int
    session: str = ""
    tenant: str = ""
    reason: str = ""
    job: str = ""
    refuses: bool = False


class Allow(msgspec.Struct, frozen=True, tag="allow"):
    """These agents, workflows and tenants may call an agent; once there is such a rule, nobody else may."""

    agent: str
    callers: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    reason: str = ""


class Migrate(msgspec.Struct, frozen=True, tag="migrate"):
    """A session moves from one instance of an agent to another, with its pending calls and its state."""

    session: str
    agent: str
    source: str
    target: str
    reason: str = ""


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """An instance finishes what it has begun and stops; with an agent, only its replica there."""

    instance: str
    agent: str = ""
    reason: str = ""


class Provision(msgspec.Struct, frozen=True, tag="provision"):
    """Another instance of an agent starts on a node.

    Attributes:
        worker: that serves it from then on; named by who orders it, not by the policy; empty if no worker there can.
    """

    agent: str
    node: str
    reason: str = ""
    worker: str = ""


State: TypeAlias = Route | Weights | SetPriority | Limit | Allow
Act: TypeAlias = Migrate | Kill | Provision
ACTS: Final = (Migrate, Kill, Provision)
NO_RANK: Final = -32768


class Refused(msgspec.Struct, frozen=True):
    """An action that did not take effect, in words, and why."""

    action: str
    reason: str


class Ranking(msgspec.Struct, frozen=True):
    """Priorities of many sessions: of how many, and why."""

    sessions: int
    reason: str


class Unused(msgspec.Struct, frozen=True):
    """Reports of a process that could not be used: the type of the error, the last reason, and how many there were."""

    process: str
    error: str
    reason: str
    count: int


class Decided(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a leader has to tell of one round; nothing is told of a round in which nothing is new.

    Attributes:
        version: `WIRE_VERSION`.
        controller: its name.
        policy: what it asks.
        term, number: of the lead, and of the round within the life of the controller.
        at_s: seconds since 1970.
        took_lead: it leads from now on.
        began: states that hold from now on, and did not, or differently.
        ended: states that hold no more.
        ranked: sessions that are given priorities at once; told when the reason changes, or when there are none any more.
        acts: what is to happen.
        refused: actions that were not admitted; the same refusal is told once a minute.
        reports: reports that were not used, of each process and sort once a minute.
        error: why the policy gave no answer; then all stays as it was.
        left_out: how many of all these are not named, for want of room.
    """

    version: int
    controller: str
    policy: str = ""
    term: int = 0
    number: int = 0
    at_s: float = 0.0
    took_lead: bool = False
    began: tuple[State, ...] = ()
    ended: tuple[State, ...] = ()
    ranked: Ranking | None = None
    acts: tuple[Act, ...] = ()
    refused: tuple[Refused, ...] = ()
    reports: tuple[Unused, ...] = ()
    error: str = ""
    left_out: int = 0


class Leader(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=232):
    """Value of the leader's key: who leads, while it is there."""

    version: int
    name: str
    incarnation: int


class States(msgspec.Struct, array_like=True, frozen=True, tag=233):
    """All that holds. A record of the same term with a higher number, or of a higher term, replaces it."""

    version: int
    term: int
    number: int
    states: tuple[State, ...] = ()


class Order(msgspec.Struct, array_like=True, frozen=True):
    """An act with its number within the term, and the incarnations of the processes that it means."""

    number: int
    act: Act
    incarnations: dict[str, int] = {}


class Acts(msgspec.Struct, array_like=True, frozen=True, tag=234):
    """The acts of the last lease. Each is done once, by whom it concerns."""

    version: int
    term: int
    number: int
    orders: tuple[Order, ...] = ()


class Ranks(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=235):
    """Priorities of sessions of one process, by the slots of its reports up to `report`.

    Attributes:
        number: grows within the term; one that does not follow the last is used all the same.
        is_whole: sessions that are not named have none.
        sessions: slots, `<u4`.
        values: priorities, `<i2`; `NO_RANK` for none.
    """

    version: int
    term: int
    number: int
    incarnation: int
    report: int
    is_whole: bool
    sessions: bytes
    values: bytes


Record: TypeAlias = Leader | States | Acts | Ranks
_T = TypeVar("_T", Leader, States, Acts, Ranks)
_encoder = msgspec.msgpack.Encoder()


def encode_decision(record: Record) -> bytes:
    """Bytes of a record."""
    return _encoder.encode(record)


def state_bytes(state: State) -> int:
    """How much room a state takes in a record."""
    return len(_encoder.encode(state))


def decode_decision(data: bytes, kind: type[_T]) -> _T:
    """Reads a record.

    Raises:
        MalformedMessageError, UnsupportedVersionError: it is none of that kind.
    """
    try:
        record = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if record.version != WIRE_VERSION:
        raise UnsupportedVersionError(record.version)
    if isinstance(record, Ranks) and (len(record.sessions) % 4 or len(record.sessions) != 2 * len(record.values)):
        raise MalformedMessageError("as many priorities as sessions are needed")
    return record


def encode_decided(decided: Decided) -> bytes:
    """JSON of what a leader tells."""
    return msgspec.json.encode(decided)


def decode_decided(data: bytes) -> Decided:
    """Reads it.

    Raises:
        MalformedMessageError, UnsupportedVersionError: it is none.
    """
    try:
        decided = msgspec.json.decode(data, type=Decided)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if decided.version != WIRE_VERSION:
        raise UnsupportedVersionError(decided.version)
    return decided


def describe(action: State | Act) -> str:
    """An action in words, without its reason."""
    match action:
        case Route():
            return f"session {action.session} of {action.agent} goes to {action.instance}"
        case Weights():
            shares = ", ".join(f"{name} {weight:g}" for name, weight in zip(action.instances, action.weights, strict=False))
            return f"calls to {action.agent} go to {shares}"
        case SetPriority():
            return f"session {action.session} has priority {action.value}" + (f" at {action.agent}" if action.agent else "")
        case Limit():
            groups = {"session": action.session, "tenant": action.tenant, "job": action.job}
            whose = "".join(f" of {what} {name}" for what, name in groups.items() if name)
            if action.refuses:
                return f"calls{whose} to {action.agent} are refused"
            return f"at most {action.running} calls{whose} run at once at each instance of {action.agent}"
        case Allow():
            known = [*action.callers, *(f"tenant {tenant}" for tenant in action.tenants)]
            return f"{action.agent} may be called by {', '.join(known) or 'nobody'}"
        case Migrate():
            return f"session {action.session} of {action.agent} moves from {action.source} to {action.target}"
        case Kill():
            return f"{action.agent or 'all'} of {action.instance} stops"
        case Provision():
            return f"another {action.agent} starts on {action.node}"
