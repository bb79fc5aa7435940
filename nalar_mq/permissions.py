"""What a process may publish and subscribe to at the broker: the permissions that make the sender in a subject true. Pure.

A process publishes under its own name only (`NS.box.*.<me>`, `NS.report.<me>`, its own record in `NS-members`) and hears only
what is sent to it, besides what is for everybody. It creates and changes no stream: whoever may do that could have the broker
publish anywhere, or keep what others send each other. So the streams are laid out beforehand, by who runs the broker.

    worker       serves actors, answers calls and jobs
    client       calls; its name begins with `client-`, by which everybody knows that it serves nothing
    controller   reads all reports, publishes what holds and what is to be done
    visitor      any other NATS client: publishes jobs, calls and answers, reads results and decisions; it is no process

On whose behalf a call or job is made, processes say themselves. A visitor's are nobody's; one to which whoever runs the broker
has given a tenant publishes jobs of that tenant (`jobs`), and makes no calls, which could only be nobody's.

Of what processes share, each of them may write all: where sessions live, who has been declared lost, the state of jobs. The
journal of a process is written by others only when they take its jobs over. What a process is granted there lets it disturb
the others, and never lets it speak in their name.

Permissions are about subjects: which headers a message bears is its publisher's affair. So whoever may publish jobs of a
workflow may do so under any id, and have one that has failed run again (`jobs`).

JetStream publishes to any subject that it is asked to answer on, without a look at the permissions of who asks. What comes that
way is told apart by its form, and not believed: see `transport.is_direct`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from typing import Final, NamedTuple

from nalar_mq.address import CLIENT_PREFIX, Subjects, check_token, is_client_name
from nalar_mq.errors import AddressError

_API: Final = "$JS.API"


class Role(StrEnum):
    """What a process is for."""

    WORKER = "worker"
    CLIENT = "client"
    CONTROLLER = "controller"
    VISITOR = "visitor"


class Permissions(NamedTuple):
    """Subjects, wildcards included, that are allowed; everything else is not."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def permissions_of(subjects: Subjects, name: str, role: Role, tenant: str = "") -> Permissions:
    """The permissions of process `name`; those of a visitor are the same for every name.

    Args:
        subjects: of the namespace.
        name, role: of the process.
        tenant: of a visitor, which publishes jobs of this tenant then and nothing that is nobody's; empty for one without.

    Raises:
        AddressError: it is no name for a process of that role, or no tenant.
    """
    check_token(name, "process name")
    match role:
        case Role.VISITOR:
            return _of_visitors(subjects, check_token(tenant, "tenant") if tenant else "")
        case Role.CLIENT if not is_client_name(name):
            raise AddressError(f"{name!r} is no name of a client: those begin with {CLIENT_PREFIX!r}")
        case Role.CLIENT:
            publish, subscribe = _of_clients(subjects)
        case Role.WORKER | Role.CONTROLLER if is_client_name(name):
            raise AddressError(f"{name!r} is the name of a client: those of a {role} begin otherwise")
        case Role.WORKER:
            publish, subscribe = _of_workers(subjects)
        case Role.CONTROLLER:
            publish, subscribe = _of_controllers(subjects)
    own = _of_all(subjects, name)
    return Permissions((*own.publish, *publish), (*own.subscribe, *subscribe))


def as_configuration(granted: Iterable[Permissions]) -> str:
    """Permissions, of several processes together, as they stand in the configuration of a NATS server for a user."""
    several = tuple(granted)
    publish = [subject for one in several for subject in one.publish]
    subscribe = [subject for one in several for subject in one.subscribe]
    return f"permissions {{\n{_block('publish', publish)}{_block('subscribe', subscribe)}}}\n"


def _block(verb: str, allowed: Iterable[str]) -> str:
    lines = "".join(f"    {json.dumps(subject)}\n" for subject in dict.fromkeys(allowed))
    return f"  {verb} {{ allow: [\n{lines}  ] }}\n"


def _of_all(subjects: Subjects, me: str) -> Permissions:
    """What every process does: it says who it is, sends and receives frames, asks and is asked."""
    publish = (
        subjects.box("*", me),
        subjects.look("*", me),
        subjects.seen("*", me),
        subjects.load(me),
        subjects.report(me),
        subjects.again("*"),
        f"{_API}.INFO",
        *_reading(_bucket(subjects.members_bucket)),
        f"$KV.{subjects.members_bucket}.{me}",
        *_sharing_bucket(subjects.lost_bucket),
        *_reading(_bucket(subjects.leader_bucket)),
        *_reading(_bucket(subjects.control_bucket)),
        *_reading(_bucket(subjects.acts_bucket)),
        *_reading(_bucket(subjects.nodes_bucket)),
        *_reading(subjects.decisions_ledger),
        subjects.overview,
    )
    subscribe = (
        f"{subjects.inbox(me)}.>",
        subjects.box(me, "*"),
        subjects.look(me, "*"),
        subjects.seen(me, "*"),
        subjects.ranks(me),
        subjects.again(me),
        subjects.load("*"),
        subjects.report("*"),
        subjects.states,
        subjects.decided,
    )
    return Permissions(publish, subscribe)


def _of_clients(subjects: Subjects) -> Permissions:
    publish = (
        *_sharing_bucket(subjects.places_bucket),
        *_sharing_objects(subjects.claims_bucket),
        *_sharing_objects(subjects.results_bucket),
        *_reading(subjects.jobs_queue),
        *_removing(subjects.jobs_queue),
        subjects.job("*"),
        subjects.job("*", "*"),
        *_sharing(subjects.results_ledger, subjects.result("*")),
        *_sharing(subjects.dead_ledger, subjects.dead("*")),
        *_reading(subjects.running_ledger),
        *_sharing(subjects.questions_ledger, subjects.question("*")),
        *_sharing(subjects.answers_ledger, subjects.answered("*")),
        subjects.cancel("*"),
    )
    return Permissions(publish, (subjects.result("*"), subjects.answered("*")))


def _of_workers(subjects: Subjects) -> Permissions:
    clients = _of_clients(subjects)
    publish = (
        *clients.publish,
        *_sharing_bucket(subjects.stores_bucket),
        *_sharing_objects(subjects.snapshots_bucket),
        *_taking(subjects.jobs_queue),
        *_sharing(subjects.running_ledger, subjects.running("*")),
        *_sharing(subjects.journal_ledger, subjects.journal("*", "*")),
        *_sharing(subjects.replicas_ledger, subjects.replica("*")),
        "_INBOX.>",
    )
    subscribe = (*clients.subscribe, subjects.cancel("*"), subjects.call(">"), subjects.answer("*"), "$SRV.>")
    return Permissions(publish, subscribe)


def _of_controllers(subjects: Subjects) -> Permissions:
    publish = (
        subjects.states,
        subjects.ranks("*"),
        *_sharing_bucket(subjects.leader_bucket),
        *_sharing_bucket(subjects.control_bucket),
        *_sharing_bucket(subjects.acts_bucket),
        *_sharing_bucket(subjects.nodes_bucket),
        *_sharing(subjects.decisions_ledger, subjects.decided),
        subjects.inbox(">"),
        "_INBOX.>",
    )
    return Permissions(publish, (subjects.overview,))


def _of_visitors(subjects: Subjects, tenant: str) -> Permissions:
    publish = (
        subjects.job("*", tenant),
        *(() if tenant else (subjects.call(">"),)),  # calls are nobody's
        subjects.answer("*"),
        subjects.overview,
        "$SRV.>",
        f"{_API}.INFO",
        f"{_API}.STREAM.NAMES",
        f"{_API}.STREAM.LIST",
        *_reading(subjects.results_ledger),
        *_taking(subjects.results_ledger),
        *_reading(subjects.dead_ledger),
        *_reading(subjects.decisions_ledger),
        *_reading(f"OBJ_{subjects.results_bucket}"),
    )
    return Permissions(publish, ("_INBOX.>", subjects.result("*"), subjects.decided))


def _bucket(name: str) -> str:
    return f"KV_{name}"


def _reading(stream: str) -> tuple[str, ...]:
    """What it takes to read a stream, and to have its changes told."""
    return (
        f"{_API}.STREAM.INFO.{stream}",
        f"{_API}.STREAM.MSG.GET.{stream}",
        f"{_API}.DIRECT.GET.{stream}",
        f"{_API}.DIRECT.GET.{stream}.>",
        f"{_API}.CONSUMER.CREATE.{stream}",
        f"{_API}.CONSUMER.CREATE.{stream}.>",
        f"{_API}.CONSUMER.INFO.{stream}.*",
        f"{_API}.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    )


def _taking(stream: str) -> tuple[str, ...]:
    """What it takes to take messages out of a queue."""
    return (
        f"{_API}.CONSUMER.DURABLE.CREATE.{stream}.*",
        f"{_API}.CONSUMER.CREATE.{stream}.>",
        f"{_API}.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
    )


def _sharing(stream: str, subject: str) -> tuple[str, ...]:
    """What it takes to read a stream, to add to it, and to remove from it what is not needed any more."""
    return (*_reading(stream), subject, f"{_API}.STREAM.PURGE.{stream}", *_removing(stream))


def _removing(stream: str) -> tuple[str, ...]:
    """What it takes to remove single messages of a stream."""
    return (f"{_API}.STREAM.MSG.DELETE.{stream}",)


def _sharing_bucket(bucket: str) -> tuple[str, ...]:
    return (*_reading(_bucket(bucket)), f"$KV.{bucket}.>")


def _sharing_objects(bucket: str) -> tuple[str, ...]:
    return _sharing(f"OBJ_{bucket}", f"$O.{bucket}.>")
