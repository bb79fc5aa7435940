"""Everything that travels, as tagged, array-encoded msgspec structs in MessagePack.

Two layers. A *packet* is what one NATS message holds: `Frame` (sequenced, with messages inside), `Gone` or `Bye`. A *message*
is what one actor runtime says to another inside a frame. Each struct is an array whose first element is its integer tag, so
fields may be appended with defaults and old readers ignore what they do not know; a change that old readers would
misunderstand raises `WIRE_VERSION`, and a frame of another version is refused as a whole.

Arguments and results are `payload`: bytes made by `nalar_mq.values`, opaque here, decoded once, where they are used; large
ones are kept elsewhere, and a claim stands in their place (see `nalar_mq.claims`).

Who says what:

    owner -> executor       Call, Cancel, Consume, Credit, Probe, Settled, Prioritise
    executor -> owner       Resolve, Fail, Chunk, Parked, Returned
    executor -> consumer    Resolve, Fail
    consumer -> owner       Want
    who resumes -> worker   Locate, answered by Located
    owner -> anybody        Release
    whoever drains a worker Drain, answered by Drainage; worker -> worker: Bequest, answered by Accepted

A future's id is the id of its call. The process that sends a call is the owner of that call's future, and is also the one
who answers for every future the call depends on: `deps` are ids the executor does not have yet and will get pushed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from nalar_mq.errors import MalformedMessageError, UnsupportedVersionError

WIRE_VERSION: Final = 1


class Call(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """Run `method` of `actor`.

    Attributes:
        id: 16 bytes, unique; also the id of the future.
        actor: name of the actor type.
        method: name of the method; empty for tools and workflows.
        payload: encoded `[args, kwargs]`.
        session: the session the call belongs to.
        instance: which instance of a stateful actor within the session; empty for the only one.
        init: encoded constructor arguments of that instance; empty for none.
        deps: ids of futures that stand in `payload` and have no value yet.
        parent: id of the call that made this one; empty at the root.
        job: the job it belongs to; empty outside jobs.
        priority: higher runs earlier.
        timeout_s: seconds that remain until its deadline; None for no deadline.
        number: position in the order of its sender's calls to its session, from 1; 0 where order does not matter.
        holds: `actor/session/instance` of every session that the callers above hold while they wait.
        cast: nobody wants the result.
        attempt: 0 for the first, higher for retries of the same id.
        trace: W3C `traceparent` of the caller; empty for none.
        budget: what the call may still spend, in the unit of its workflow; None for no limit.
        lost: `name/incarnation` of processes whose loss brought this attempt; they are held to be lost by who gets it.
        failures: attempts of the job that ended with an error; then what failed in them is tried again, the rest is not.
        epoch: in a job, which making of this id by its owner it is; 0 outside jobs.
        caller: the agent, tool or workflow that makes it; empty for a program outside.
        tenant: on whose behalf; empty for nobody's.
        workflow: the outermost one that made it, itself or by others; empty where there is none.
    """

    id: bytes
    actor: str
    method: str
    payload: bytes
    session: str = ""
    instance: str = ""
    init: bytes = b""
    deps: tuple[bytes, ...] = ()
    parent: bytes = b""
    job: str = ""
    priority: int = 0
    timeout_s: float | None = None
    number: int = 0
    holds: tuple[str, ...] = ()
    cast: bool = False
    attempt: int = 0
    trace: str = ""
    budget: float | None = None
    lost: tuple[str, ...] = ()
    failures: int = 0
    epoch: int = 0
    caller: str = ""
    tenant: str = ""
    workflow: str = ""


class Resolve(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """The future `id` has the value `payload`; it was also pushed to the processes named in `pushed`."""

    id: bytes
    payload: bytes
    pushed: tuple[str, ...] = ()


class Fail(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """The future `id` has no value and never will.

    Attributes:
        id: of the future.
        kind: `module:qualname` of the exception's type.
        text: its message, for people.
        payload: encoded `[args, fields]` of the exception, or empty.
        traceback: of the callee, for people.
        pushed: as in `Resolve`.
        path: the calls the error has come through, from this one down to where it was raised, as `actor.method`.
        epoch: of the call that it answers: it ends no other one of the same id. A value needs none, since it is the same.
    """

    id: bytes
    kind: str
    text: str
    payload: bytes = b""
    traceback: str = ""
    pushed: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    epoch: int = 0


class Cancel(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=4):
    """Nobody wants the result of `id` any more; `reason` is for people."""

    id: bytes
    reason: str = ""


class Consume(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=5):
    """Push the value of `id` straight to the process `name` of `incarnation` as well."""

    id: bytes
    name: str
    incarnation: int


class Chunk(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=6):
    """Piece `number` (from 1) of the stream `id`, of the given attempt."""

    id: bytes
    number: int
    payload: bytes
    attempt: int = 0


class Credit(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=7):
    """The consumer of `id` wants its pieces as a stream, and takes those up to number `limit`."""

    id: bytes
    limit: int


class Want(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=8):
    """A consumer still waits for `id`: its owner pushes what it has, or remembers who asked."""

    id: bytes


class Probe(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=9):
    """Looks for a circle of calls that wait for each other: `origin` waits, directly or not, for `id`.

    Attributes:
        id: the call whose executor is asked what it waits for.
        origin: the queued call that began to look.
        least: the lowest id among the queued calls met so far; of a circle only that one is failed.
        path: the sessions met, as `actor/session`, for the message.
    """

    id: bytes
    origin: bytes
    least: bytes
    path: tuple[str, ...] = ()


class Locate(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=10):
    """Which calls of these jobs do you have whose owner is gone? Asked before a job goes on, answered with `Located`.

    Attributes:
        number: of the question, for the answer.
        jobs: ids of jobs.
        lost: `name/incarnation` of processes that the asker holds to be lost; so does the answerer from then on.
    """

    number: int
    jobs: tuple[str, ...]
    lost: tuple[str, ...] = ()


class Located(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=11):
    """Answer to `Locate`.

    Attributes:
        number: of the question.
        ids: calls of those jobs that are queued, run or have ended here, and whose owner is gone.
        journaled: those of the jobs of which calls that ended stand in the answerer's journal.
    """

    number: int
    ids: tuple[bytes, ...]
    journaled: tuple[str, ...] = ()


class Settled(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=12):
    """The outcome of call `id` of a job is durable: its executor may forget it.

    Attributes:
        id: of the call.
        again: the call itself will be made again, so that what it has observed is still needed.
    """

    id: bytes
    again: bool = False


class Prioritise(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=13):
    """The call `id` has another priority from now on, and so have the calls it makes."""

    id: bytes
    priority: int


class Parked(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=14):
    """The call `id` of a job waits for nothing but people or time, for as long as that takes; or for something else again."""

    id: bytes
    is_parked: bool = True


class Release(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=20):
    """The sender, who answers for the large value `name`, needs it no more; for a process that sees the folder it lies in."""

    name: str


class Migrate(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=21):
    """The receiver is to move a session that it holds; it answers `Migrated`.

    Attributes:
        id: of the migration, 16 bytes.
        actor: whose session.
        session: its name; with an instance, `session/instance`.
        target: name of the worker it is to go to.
    """

    id: bytes
    actor: str
    session: str
    target: str


class Migrated(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=22):
    """Answer to `Migrate`.

    Attributes:
        id: of the migration.
        refusal: why the session is where it was; empty if it has moved.
        frozen_s: for how long no call of it could begin.
        size: bytes of state that went over.
    """

    id: bytes
    refusal: str = ""
    frozen_s: float = 0.0
    size: int = 0


class Piece(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=23):
    """A part of a session on its way to another worker.

    Attributes:
        id: of the migration.
        number: of the part, from 1.
        step: `""` for a part; `prepare` if the receiver is to make an instance of what it has; `last` if nothing follows;
            `begun` if the data of its only entry goes on in the next part.
        actor, session: as in `Migrate`.
        store: that the session comes from.
        changes: entries: field, order, and data, which is missing where the entry is gone.
        outcomes: of former calls: id, result, seconds since 1970, whether of a job.
        schema, kinds: of the session, as in its header.
        sums: of the last part: by field how many entries there are, and the xor of their checksums.
        rows: entries as they stand in that store, each with its checksum, in the order of their keys.
    """

    id: bytes
    number: int
    step: str
    actor: str
    session: str
    store: str
    changes: list[tuple[str, int, bytes | None]] = []
    outcomes: list[tuple[bytes, bytes, float, bool]] = []
    schema: int = 0
    kinds: dict[str, str] = {}
    sums: dict[str, tuple[int, int]] = {}
    rows: list[tuple[bytes, bytes]] = []


class Taken(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=24):
    """Answer to `Piece`, when it is durable.

    Attributes:
        id: of the migration.
        number: of the part.
        refusal: why the session cannot come here; empty if it can.
        store: where it is.
    """

    id: bytes
    number: int
    refusal: str = ""
    store: str = ""


class Thaw(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=25):
    """The directory names the receiver's store: the session is served there from now on. What waited for it came before."""

    id: bytes


class Abandon(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=26):
    """The session stays where it is: the receiver drops what it has of it."""

    id: bytes


class Forward(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=27):
    """A call that came to where its session was before.

    Attributes:
        name, incarnation: of its owner.
        call: as the owner made it.
        hops: how often it has been forwarded, this time included.
    """

    name: str
    incarnation: int
    call: Call
    hops: int = 1


class Crossing(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=28):
    """Follows what its owner has sent of a session to where that was before, and comes back as `Arrived` from where it is.

    Attributes:
        name, incarnation: of the owner.
        actor, session: as in `Migrate`.
        number: of the question; its owner asks anew when it hears that somebody was lost.
    """

    name: str
    incarnation: int
    actor: str
    session: str
    number: int = 0


class Arrived(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=29):
    """Answer to `Crossing`, from where the session is: all that the owner sent before is there.

    Attributes:
        actor, session: as in `Migrate`.
        store: where the session is.
        number: of the question.
    """

    actor: str
    session: str
    store: str
    number: int = 0


class Forwarded(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=30):
    """A call has been sent after its session, and its owner is told where.

    Attributes:
        id: of the call.
        name, incarnation: of the worker that has it now.
        hops: how often it has been forwarded.
        actor, session: as in `Migrate`.
        store: where the session is.
        attempt: of the call: sent again, it goes a way of its own.
    """

    id: bytes
    name: str
    incarnation: int
    hops: int
    actor: str
    session: str
    store: str
    attempt: int = 0


class Returned(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=15):
    """A worker has not begun this call, and will not: whoever made it sends it elsewhere, as another first time.

    Attributes:
        call: with the time that it has left.
        store: where its session is, if it comes back to be sent there in its order; empty if the worker drains.
        is_closing: the worker begins nothing any more, also of what nobody else serves.
    """

    call: Call
    store: str = ""
    is_closing: bool = False


class Drain(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=16):
    """The receiver is to move all that it has to other workers, and to end.

    Attributes:
        id: comes back with every `Drainage`.
        grace_s: how long what cannot move may go on.
    """

    id: bytes
    grace_s: float


class Drainage(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=17):
    """How far a worker has got with a `Drain`.

    Attributes:
        id: as in the `Drain`.
        refusal: why it does not drain; empty if it does.
        is_over: it has done all there was to do, and ends now.
        calls: that are waited for.
        jobs: that are waited for.
        sessions: that have yet to move.
        moved: sessions that were moved to other workers.
        stores: of managed state that another worker on the machine goes on with as a whole.
        lost: sessions that were ended because they cannot move.
        stayed: sessions that nobody could take; they are on the worker's disk, for whoever opens that.
        silent: workers that it has asked to go on with a store, and that did not answer.
    """

    id: bytes
    refusal: str = ""
    is_over: bool = False
    calls: int = 0
    jobs: int = 0
    sessions: int = 0
    moved: int = 0
    stores: int = 0
    lost: int = 0
    stayed: int = 0
    silent: tuple[str, ...] = ()


class Bequest(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=18):
    """A worker that drains asks another one on its machine to go on with one of its stores.

    Attributes:
        id: comes back with the answer.
        store: its id.
        folder: where it is.
        is_due: the receiver is to open it as soon as it is free, which is now; else it only says whether it would.
    """

    id: bytes
    store: str
    folder: str
    is_due: bool = False


class Accepted(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=19):
    """Answer to a `Bequest`.

    Attributes:
        id: as in the `Bequest`.
        refusal: why it cannot; empty if it will.
    """

    id: bytes
    refusal: str = ""


Message = (
    Call
    | Resolve
    | Fail
    | Cancel
    | Consume
    | Chunk
    | Credit
    | Want
    | Probe
    | Locate
    | Located
    | Settled
    | Prioritise
    | Parked
    | Release
    | Migrate
    | Migrated
    | Piece
    | Taken
    | Thaw
    | Abandon
    | Forward
    | Crossing
    | Arrived
    | Forwarded
    | Returned
    | Drain
    | Drainage
    | Bequest
    | Accepted
)


class Frame(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=101):
    """Messages of one loop turn from one incarnation to another.

    Attributes:
        version: `WIRE_VERSION` of the sender.
        source: incarnation of the sender.
        target: incarnation of the receiver that the sender means.
        seq: number of the frame on this channel, from 1; 0 for a bare acknowledgement.
        ack: highest frame received in order from the other side.
        messages: in order.
    """

    version: int
    source: int
    target: int
    seq: int
    ack: int
    messages: tuple[Message, ...] = ()


class Gone(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=102):
    """Answer to a frame that came too late: nothing more will pass between `target` and `answered`.

    Attributes:
        version: `WIRE_VERSION` of the sender.
        source: incarnation that lives here now; higher than `target` if that one is no more, equal if it is `answered` that
            is held to be no more.
        target: incarnation that the frame was for.
        answered: incarnation that the frame came from.
    """

    version: int
    source: int
    target: int
    answered: int


class Bye(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=103):
    """The incarnation `source` has closed; nothing more comes from it.

    Attributes:
        version: `WIRE_VERSION` of the sender.
        source: incarnation of the sender.
        received: the highest frame that it took from the receiver, later ones were read by nobody; None if it does not say.
        was_settled: all that it had sent, to anybody, was read.
    """

    version: int
    source: int
    received: int | None = None
    was_settled: bool = False


Packet = Frame | Gone | Bye


class _Envelope(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=101):
    """A frame whose messages are left as they are, to salvage the good ones from a frame with a bad one."""

    version: int
    source: int
    target: int
    seq: int
    ack: int
    messages: tuple[msgspec.Raw, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_packets: msgspec.msgpack.Decoder[Packet] = msgspec.msgpack.Decoder(Packet)
_envelopes = msgspec.msgpack.Decoder(_Envelope)
_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

encode_packet = _encoder.encode
encode_message = _encoder.encode


def encode_frame(source: int, target: int, seq: int, ack: int, parts: Sequence[bytes]) -> bytes:
    """Bytes of a `Frame` whose messages are `parts`, each made by `encode_message` already."""
    head = _encoder.encode(Frame(WIRE_VERSION, source, target, seq, ack))
    return b"".join((head[:-1], _array_head(len(parts)), *parts))


def _array_head(length: int) -> bytes:
    if length < 16:
        return bytes((0x90 | length,))
    return b"\xdc" + length.to_bytes(2, "big") if length < 1 << 16 else b"\xdd" + length.to_bytes(4, "big")


def decode_packet(data: bytes) -> Packet:
    """Reads one packet.

    Raises:
        MalformedMessageError: the bytes are no packet, or a message in it is none.
        UnsupportedVersionError: the sender speaks another wire version.
    """
    try:
        packet = _packets.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if packet.version != WIRE_VERSION:
        raise UnsupportedVersionError(packet.version)
    return packet


def salvage_frame(data: bytes) -> tuple[Frame, int]:
    """Reads a frame of which some messages may be unreadable; returns it with the readable ones, and how many were not.

    A frame that could not be read at all would be sent again for ever; so what is readable is delivered, the rest counted.

    Raises:
        MalformedMessageError: not even the outer frame can be read.
        UnsupportedVersionError: the sender speaks another wire version.
    """
    try:
        envelope = _envelopes.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if envelope.version != WIRE_VERSION:
        raise UnsupportedVersionError(envelope.version)
    good: list[Message] = []
    for raw in envelope.messages:
        try:
            good.append(_messages.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    frame = Frame(envelope.version, envelope.source, envelope.target, envelope.seq, envelope.ack, tuple(good))
    return frame, len(envelope.messages) - len(good)


class ActorInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a member tells of one actor it serves: enough to route and to describe, nothing to import.

    Attributes:
        kind: `agent`, `tool` or `workflow`.
        methods: method name to readable signature; tools and workflows have the one name "".
        stateful: calls of one session go to the process that holds it.
        doc: first line of its docstring.
        timeout_s: seconds until the deadline of a call that names none; None for no deadline.
        retries: how often a call that names no number is sent again after its worker was lost.
        priority: of calls that name none and inherit none.
        max_instances: replicas that calls are routed to at most; None for no bound.
        is_kept: its sessions are in stores, not in the memory of a process.
        is_replicated: those stores are replicated.
    """

    kind: str
    methods: dict[str, str]
    stateful: bool = False
    doc: str = ""
    timeout_s: float | None = 600.0
    retries: int = 0
    priority: int = 0
    max_instances: int | None = None
    is_kept: bool = False
    is_replicated: bool = False


class Member(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=201):
    """Value of a key in the members bucket: one live process.

    Attributes:
        version: `WIRE_VERSION`.
        incarnation: which life of the process.
        node: name of the machine or GPU it runs on.
        role: `worker` or `client`.
        pid: its operating-system process id.
        actors: what it serves, by name.
        draining: it takes no new calls.
        folder: id of the local store that it reads and writes; empty for none.
        stores: ids of the stores of managed state that it has open, that for new sessions first.
        replicated: the same of those that are replicated.
    """

    version: int
    incarnation: int
    node: str
    role: str
    pid: int
    actors: dict[str, ActorInfo] = {}
    draining: bool = False
    folder: str = ""
    stores: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()


class Place(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=202):
    """Value of a key in the places bucket: the process that holds the memory of one session, or the store that keeps it.

    Attributes:
        version: `WIRE_VERSION`.
        name: the process; empty if a store keeps the session.
        incarnation: of the process.
        store: id of the store; empty if the session is in the memory of a process.
    """

    version: int
    name: str
    incarnation: int
    store: str = ""


class Lost(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=203):
    """Value of a key in the lost bucket: that incarnation of the process, and every earlier one, has been declared lost."""

    version: int
    incarnation: int


class Running(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=204):
    """The message on a job's running subject: who runs it.

    Attributes:
        version: `WIRE_VERSION`.
        name: the process; empty while the job waits for another attempt.
        incarnation: of the process.
        sequence: the message in the job queue that is being worked on.
        workflow: what runs.
        failures: attempts that ended with an error.
        losses: attempts that ended with the loss of their worker.
        begun: attempts that have begun before this one.
        life: how often the job has begun anew, without what it had done before.
        lost: `name/incarnation` of processes that were lost with parts of it.
        excused: losses that do not speak against the job, since it got further after them; less by those that a call of it
            has had before its own loss ended an attempt, which speak against it as well.
        seen: values that it had seen from its calls when that was found.
    """

    version: int
    name: str
    incarnation: int
    sequence: int
    workflow: str
    failures: int = 0
    losses: int = 0
    begun: int = 0
    life: int = 0
    lost: tuple[str, ...] = ()
    excused: int = 0
    seen: int = 0


class Load(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=205):
    """What a worker tells everybody of the calls it has in hand.

    Attributes:
        version: `WIRE_VERSION`.
        incarnation: which life of the process.
        number: grows from report to report; one that comes after a higher one is late.
        actors: queued and running calls by actor; those without any are left out, calls that wait for others are not counted.
    """

    version: int
    incarnation: int
    number: int
    actors: dict[str, tuple[int, int]] = {}


class Look(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=206):
    """Asks a process what it has in hand.

    Attributes:
        version: `WIRE_VERSION`.
        question: comes back with every piece of the answer.
        records: also about every call it has or remembers, not only how many there are.
        explain: id of a call about which it is to tell what was decided there; empty for none.
    """

    version: int
    question: int
    records: bool = False
    explain: bytes = b""


class Explanation(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Something that was decided about a call.

    Attributes:
        at_s: when, in seconds of the clock of the process that tells it.
        what: in words.
        reason: why; empty if whoever decided has not said.
    """

    at_s: float
    what: str
    reason: str = ""


class CallRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a worker knows of a call that it runs or has run. Times are seconds of its own clock.

    Attributes:
        id, parent, actor, method, session, job, priority, attempt: as in `Call`.
        owner: the process that made it.
        arrived_s: when it came.
        began_s: when it began to run; 0 if it has not, or never did.
        ended_s: when it ended; 0 if it has not.
        state: `queued`, `running`, `waiting` for others in the middle of its run, `done`, `failed` or `cancelled`.
        error: `module:qualname` of the error it ended with.
    """

    id: bytes
    parent: bytes
    actor: str
    method: str
    session: str
    job: str
    owner: str
    priority: int
    attempt: int
    arrived_s: float
    began_s: float = 0.0
    ended_s: float = 0.0
    state: str = ""
    error: str = ""


class Seen(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=207):
    """A piece of the answer to a `Look`.

    Attributes:
        version: `WIRE_VERSION`.
        question: as in the `Look`.
        incarnation: which life of the process answers.
        piece: from 1.
        is_last: no further piece follows.
        wall_s: seconds since the epoch, when the answer was made.
        now_s: the same moment on the clock of the records.
        futures: calls that this process has made and that have not ended.
        ended: calls that it has run to their end so far, remembered or not.
        actors: as in `Load`.
        records: of calls, in no order; a call that ended while the answer was made may stand in it twice.
        explanations: what was decided about the call that was asked for, in the order of time; in the first piece.
    """

    version: int
    question: int
    incarnation: int
    piece: int
    is_last: bool
    wall_s: float
    now_s: float
    futures: int
    ended: int
    actors: dict[str, tuple[int, int]] = {}
    records: tuple[CallRecord, ...] = ()
    explanations: tuple[Explanation, ...] = ()


class Outcome(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """In a journal: a call of a job has ended, and who made it may see that from now on.

    Attributes:
        job: id of the job.
        parent: id of the call that made it.
        result: how it ended; `Resolve` without a value for a call that nobody waits for.
        after_s: seconds since what `parent` observed before, or since it began.
        is_late: `parent` had ended before, and its program has seen nothing of this.
    """

    job: str
    parent: bytes
    result: Resolve | Fail
    after_s: float = 0.0
    is_late: bool = False


class Unseen(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """In a journal: the looks numbered `first` to `last` of the call `parent` found a future without a value."""

    job: str
    parent: bytes
    first: int
    last: int


class Reading(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """In a journal: the clock showed the call `parent`, which read it for the `number`-th time, `at_s` since the epoch."""

    job: str
    parent: bytes
    number: int
    at_s: float


class Begun(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=4):
    """In a journal: the workflow `parent` begins to observe, by code of that version; what was observed earlier is void."""

    job: str
    parent: bytes
    version: str


class Voided(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=5):
    """In a journal: the call `parent` has ended with a loss, and so have these calls of its: they are made again."""

    job: str
    parent: bytes
    ids: tuple[bytes, ...]


Observation = Outcome | Unseen | Reading | Begun | Voided


class Pack(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=208):
    """One message of a journal: what the calls of one process observed meanwhile, in order."""

    version: int
    observations: tuple[Observation, ...]


class Seal(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=209):
    """The last message of a journal: `name` has taken over from its writer, whatever that may still want to write."""

    version: int
    name: str


class Shipment(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=220):
    """What a replicated store has written, as its copies elsewhere are made of it.

    Attributes:
        version: `WIRE_VERSION`.
        commits: the number of the last transaction that it holds whole, once the last part is there.
        part, parts: this message holds that part, from 1, of so many.
        data: of all parts together: the writes, encoded by `replication`.
    """

    version: int
    commits: int
    part: int
    parts: int
    data: bytes


class StoreSeal(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=221):
    """Another copy of the store goes on from here: nothing of the former one is accepted after it.

    Attributes:
        version: `WIRE_VERSION`.
        copy: the one that goes on.
        commits: the number of the last transaction before it.
    """

    version: int
    copy: str
    commits: int


class StoreHolder(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=222):
    """Value of a key in the stores bucket, by the id of a replicated store: who has it open, and which copy of it.

    Attributes:
        version: `WIRE_VERSION`.
        copy: of the store.
        name, incarnation: of the process.
    """

    version: int
    copy: str
    name: str
    incarnation: int


class StoreOpening(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=223):
    """Value of a key in the places bucket, by the copy of a store: who has opened it last.

    Attributes:
        version: `WIRE_VERSION`.
        token: of the opening; the store has it, too.
        name, incarnation: of the process; empty and 0 once it has closed the store.
        host, folder: where the store was, for people; the machine, for those who open it, too.
        file: device and inode of the folder.
    """

    version: int
    token: str
    name: str
    incarnation: int
    host: str
    folder: str
    file: str


ReplicaMessage = Shipment | StoreSeal

JournalMessage = Pack | Seal

_members = msgspec.msgpack.Decoder(Member)
_places = msgspec.msgpack.Decoder(Place)
_losses = msgspec.msgpack.Decoder(Lost)
_runs = msgspec.msgpack.Decoder(Running)
_loads = msgspec.msgpack.Decoder(Load)
_looks = msgspec.msgpack.Decoder(Look)
_seen = msgspec.msgpack.Decoder(Seen)
_replicas: msgspec.msgpack.Decoder[ReplicaMessage] = msgspec.msgpack.Decoder(ReplicaMessage)
_holders = msgspec.msgpack.Decoder(StoreHolder)
_openings = msgspec.msgpack.Decoder(StoreOpening)
_journals: msgspec.msgpack.Decoder[JournalMessage] = msgspec.msgpack.Decoder(JournalMessage)


Record = Member | Place | Lost | Running | Load | Look | Seen | Pack | Seal | Shipment | StoreSeal | StoreHolder | StoreOpening


def encode_record(record: Record) -> bytes:
    """Bytes of what stands alone: a record for a key-value bucket or a ledger, or a report."""
    return _encoder.encode(record)


def decode_replica(data: bytes) -> ReplicaMessage:
    """Reads a message of the journal of a store.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_replicas, data)


def decode_holder(data: bytes) -> StoreHolder:
    """Reads a `StoreHolder`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_holders, data)


def decode_opening(data: bytes) -> StoreOpening:
    """Reads a `StoreOpening`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_openings, data)


def decode_member(data: bytes) -> Member:
    """Reads a `Member`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_members, data)


def decode_place(data: bytes) -> Place:
    """Reads a `Place`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_places, data)


def decode_lost(data: bytes) -> Lost:
    """Reads a `Lost`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_losses, data)


def decode_running(data: bytes) -> Running:
    """Reads a `Running`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_runs, data)


def decode_load(data: bytes) -> Load:
    """Reads a `Load`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_loads, data)


def decode_look(data: bytes) -> Look:
    """Reads a `Look`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_looks, data)


def decode_seen(data: bytes) -> Seen:
    """Reads a `Seen`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    return _record(_seen, data)


def encode_seen(head: Seen, records: Sequence[bytes]) -> bytes:
    """Bytes of a `Seen` like `head`, which has no records, with `records` made by `encode_call_record`."""
    start = _encoder.encode(msgspec.structs.replace(head, explanations=()))[:-2]
    return b"".join((start, _array_head(len(records)), *records, _encoder.encode(head.explanations)))


def encode_call_record(record: CallRecord) -> bytes:
    """Bytes of one record, for `encode_seen`."""
    return _encoder.encode(record)


def decode_journal(data: bytes) -> JournalMessage:
    """Reads a `Pack` or a `Seal`.

    Raises:
        MalformedMessageError, UnsupportedVersionError: as in `decode_packet`.
    """
    try:
        record = _journals.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if record.version != WIRE_VERSION:
        raise UnsupportedVersionError(record.version)
    return record


_R = TypeVar("_R", Member, Place, Lost, Running, Load, Look, Seen, ReplicaMessage, StoreHolder, StoreOpening)


def _record(decoder: msgspec.msgpack.Decoder[_R], data: bytes) -> _R:
    try:
        record = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if record.version != WIRE_VERSION:
        raise UnsupportedVersionError(record.version)
    return record
