"""What a user tells the runtime about one actor, by decorator or by `nalar.toml`: the same fields and the same checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from nalar_mq.address import LONGEST_TOKEN
from nalar_mq.errors import DirectiveError

Kind: TypeAlias = Literal["agent", "tool", "workflow"]
Durability: TypeAlias = Literal["memory", "node", "replicated"]
Isolation: TypeAlias = Literal["thread", "process"]

DEFAULT_TIMEOUT_S = 600.0
MOST_RESOURCES = 256  # that a node has, or an actor wants


class Directives(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The directives of one actor. Building one checks nothing; `validated` does.

    Attributes:
        stateful: calls of one session go, in order, to the same instance, and the session never moves; None lets the
            runtime decide by looking at the class.
        batchable: calls that wait may be run together as one batch: by the function `NAME_batch` beside the function
            `NAME`, which takes the list of their only arguments and returns the list of results. An actor has at least one.
        preemptable: name of the function or method that interrupts a running call; empty for none.
        min_instances: replicas that are kept even without load.
        max_instances: replicas that calls are routed to at most, the longest-lived ones; None for no bound.
        resources: what a replica reserves, by name (`cpu`, `gpu`, `memory_gb`, or a name of the user's own).
        concurrency: calls that one replica runs at once; None for the default of its kind.
        timeout_s: seconds from call to deadline; None (in TOML `inf`) for no deadline.
        retries: how often a call is sent again after its worker was lost.
        priority: priority of calls that name none; higher runs earlier.
        durability: what a session's managed state survives: `memory` nothing, `node` the loss of its worker,
            `replicated` that of its machine, too; None for `node` with managed state.
        isolation: synchronous code runs in a thread of the worker or in a child process.
        managed: names of fields that unmodified code annotates as `list` or `dict` in the body of its class, and that are
            kept as managed state.
        version: of a workflow's code, which decides whether jobs that it has begun may go on; empty for a digest of the code.
    """

    stateful: bool | None = None
    batchable: bool = False
    preemptable: str = ""
    min_instances: int = 1
    max_instances: int | None = None
    resources: dict[str, float] = {}
    concurrency: int | None = None
    timeout_s: float | None = DEFAULT_TIMEOUT_S
    retries: int = 0
    priority: int = 0
    durability: Durability | None = None
    isolation: Isolation = "thread"
    managed: list[str] = []
    version: str = ""

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Directives:
        """Makes directives from names and values as they stand in a file, with names and types checked.

        Raises:
            DirectiveError: a name is unknown or a value has the wrong type.
        """
        for problem in value_problems(values):
            raise DirectiveError(problem.text)
        return msgspec.convert(dict(values), cls)

    def validated(self, kind: Kind, name: str = "", *, managed: bool = False) -> Directives:
        """Returns the same directives with numbers normalised (an infinite `timeout_s` is None).

        Args:
            kind: what they are for; a function has no state, and a workflow is not batched.
            name: the actor's name, for the message.
            managed: the class keeps managed state.

        Raises:
            DirectiveError: a value has the wrong type or is out of range, or two directives contradict each other.
        """
        values = msgspec.structs.asdict(self)
        for problem in value_problems(values):
            raise DirectiveError(_said_of(kind, name, problem))
        checked = msgspec.convert(values, Directives)
        for problem in conflicts(checked, kind, managed=managed):
            raise DirectiveError(_said_of(kind, name, problem))
        if checked.timeout_s is not None and math.isinf(checked.timeout_s):
            checked = msgspec.structs.replace(checked, timeout_s=None)
        return checked


class Problem(NamedTuple):
    """What is wrong with the directive `key`."""

    key: str
    text: str


DIRECTIVE_NAMES: tuple[str, ...] = Directives.__struct_fields__


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """The tail of a message about an unknown name: the closest known one, or all of them."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def value_problems(values: Mapping[str, object]) -> Iterator[Problem]:
    """Unknown names and values of the wrong type, each on its own."""
    for key, value in values.items():
        if key not in _WANTED:
            yield Problem(key, f"unknown directive {key!r}: {did_you_mean(key, DIRECTIVE_NAMES)}")
            continue
        wanted_type, wanted_text = _WANTED[key]
        try:
            msgspec.convert(value, wanted_type)
        except (msgspec.ValidationError, TypeError):
            yield Problem(key, f"{key!r} must be {wanted_text}, not {_shown(value)}")


def conflicts(directives: Directives, kind: Kind, *, managed: bool = False) -> Iterator[Problem]:
    """Values out of range, then pairs of directives that cannot both hold; the types are taken to be right."""
    yield from _out_of_range(directives)
    yield from _contradictions(directives, kind, managed)


def _out_of_range(d: Directives) -> Iterator[Problem]:
    if d.min_instances < 0:
        yield Problem("min_instances", f"'min_instances' must be 0 or more, not {d.min_instances}")
    if d.max_instances is not None and d.max_instances < 1:
        yield Problem("max_instances", f"'max_instances' must be 1 or more, not {d.max_instances}")
    if d.concurrency is not None and d.concurrency < 1:
        yield Problem("concurrency", f"'concurrency' must be 1 or more, not {d.concurrency}")
    if d.timeout_s is not None and not d.timeout_s > 0:
        yield Problem("timeout_s", f"'timeout_s' must be above 0 seconds, or inf for no deadline, not {d.timeout_s:g}")
    if d.retries < 0:
        yield Problem("retries", f"'retries' must be 0 or more, not {d.retries}")
    if d.preemptable and not d.preemptable.isidentifier():
        yield Problem("preemptable", f"'preemptable' must be the name of a function, not {d.preemptable!r}")
    if len(d.resources) > MOST_RESOURCES:
        yield Problem("resources", f"'resources' may name {MOST_RESOURCES} of them, not {len(d.resources)}")
    for resource, amount in d.resources.items():
        if len(resource) > LONGEST_TOKEN:
            yield Problem("resources", f"resource {resource[:40]!r}... has a name of more than {LONGEST_TOKEN} characters")
        if not (math.isfinite(amount) and amount >= 0):
            yield Problem("resources", f"resource {resource!r} must be a finite number, 0 or more, not {amount:g}")


def _contradictions(d: Directives, kind: Kind, managed: bool) -> Iterator[Problem]:
    keeps = "managed state" if managed else "'stateful'" if d.stateful else ""
    if d.max_instances is not None and 1 <= d.max_instances < d.min_instances:
        yield Problem("min_instances", f"'min_instances' {d.min_instances} is above 'max_instances' {d.max_instances}")
    if kind != "agent" and d.stateful:
        yield Problem("stateful", f"a {kind} is a function and cannot be 'stateful': make it an agent")
    if kind == "workflow" and d.batchable:
        yield Problem("batchable", "a workflow drives its own calls and cannot be 'batchable'")
    if kind != "workflow" and d.version:
        yield Problem("version", f"'version' is about jobs that go on, and a {kind} has none: it belongs to a workflow")
    if kind == "workflow" and d.isolation == "process":
        yield Problem("isolation", "a workflow makes calls and must run in its worker: remove 'isolation'")
    if d.batchable and keeps:
        yield Problem("batchable", f"'batchable' contradicts {keeps}: sessions run one by one; remove one of the two")
    if d.isolation == "process" and keeps:
        yield Problem("isolation", f"'isolation' \"process\" contradicts {keeps}, which lives in the worker")
    if kind != "agent" and d.managed:
        yield Problem("managed", f"'managed' is about the fields of an agent, and a {kind} has none")
    if managed and d.stateful is not None:
        said = "a stateful session never moves, one with managed state may" if d.stateful else "it belongs to sessions"
        yield Problem("stateful", f"'stateful' contradicts managed state: {said}; remove one of the two")
    if not managed and d.durability in ("node", "replicated"):
        yield Problem("durability", f"'durability' {d.durability!r} is about managed state, and this {kind} has none")


_WANTED: dict[str, tuple[Any, str]] = {
    "stateful": (bool | None, "true or false"),
    "batchable": (bool, "true or false"),
    "preemptable": (str, "the name of a function"),
    "min_instances": (int, "a whole number"),
    "max_instances": (int | None, "a whole number"),
    "resources": (dict[str, float], "a table of numbers such as {cpu = 2, gpu = 1}"),
    "concurrency": (int | None, "a whole number"),
    "timeout_s": (float | None, "a number of seconds"),
    "retries": (int, "a whole number"),
    "priority": (int, "a whole number"),
    "durability": (Durability | None, "'memory', 'node' or 'replicated'"),
    "managed": (list[str], "a list of names of fields"),
    "isolation": (Isolation, "'thread' or 'process'"),
    "version": (str, "text"),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _said_of(kind: Kind, name: str, problem: Problem) -> str:
    return f"{kind} {name!r}: {problem.text}" if name else problem.text
