"""The wire: what goes in comes out, its bytes are pinned, and bytes that are no packet are refused by type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.errors import MalformedMessageError, UnsupportedVersionError, WireError
from nalar_mq.messages import (
    WIRE_VERSION,
    Abandon,
    Accepted,
    ActorInfo,
    Arrived,
    Begun,
    Bequest,
    Bye,
    Call,
    CallRecord,
    Cancel,
    Chunk,
    Consume,
    Credit,
    Crossing,
    Drain,
    Drainage,
    Explanation,
    Fail,
    Forward,
    Forwarded,
    Frame,
    Gone,
    Load,
    Locate,
    Located,
    Look,
    Lost,
    Member,
    Message,
    Migrate,
    Migrated,
    Outcome,
    Pack,
    Packet,
    Parked,
    Piece,
    Place,
    Prioritise,
    Probe,
    Reading,
    Release,
    Resolve,
    Returned,
    Running,
    Seal,
    Seen,
    Settled,
    StoreOpening,
    Taken,
    Thaw,
    Unseen,
    Voided,
    Want,
    decode_journal,
    decode_load,
    decode_look,
    decode_lost,
    decode_member,
    decode_packet,
    decode_place,
    decode_running,
    decode_seen,
    encode_call_record,
    encode_frame,
    encode_message,
    encode_packet,
    encode_record,
    encode_seen,
    salvage_frame,
)

ID = bytes(range(16))
EXPLAINED = (Explanation(4.5, "sent to w", "why"),)
RECORD = CallRecord(ID, b"p", "analyst", "read", "s", "j", "o", 2, 1, 1.5, 2.5, 3.5, "failed", "m:E")


def _fields(struct: type[Message]) -> st.SearchStrategy[Message]:
    """A struct of any values its fields allow, within what MessagePack can hold."""
    integers = st.integers(-(2**63), 2**64 - 1)
    of_type = {
        "int": integers,
        "bytes": st.binary(max_size=40),
        "str": st.text(max_size=20),
        "bool": st.booleans(),
        "tuple[str, ...]": st.lists(st.text(max_size=8), max_size=3).map(tuple),
        "tuple[bytes, ...]": st.lists(st.binary(max_size=8), max_size=3).map(tuple),
        "float | None": st.none() | st.floats(allow_nan=False),
        "float": st.floats(allow_nan=False),
        "dict[str, str]": st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
        "dict[str, tuple[int, int]]": st.dictionaries(st.text(max_size=8), st.tuples(integers, integers), max_size=3),
        "list[tuple[str, int, bytes | None]]": st.lists(
            st.tuples(st.text(max_size=8), integers, st.none() | st.binary(max_size=20)), max_size=3
        ),
        "list[tuple[bytes, bytes, float, bool]]": st.lists(
            st.tuples(st.binary(max_size=8), st.binary(max_size=8), st.floats(allow_nan=False), st.booleans()), max_size=3
        ),
        "list[tuple[bytes, bytes]]": st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=3),
        "Call": st.builds(Call, integers.map(str).map(str.encode), st.text(max_size=8), st.text(max_size=8), st.binary()),
    }
    names = struct.__struct_fields__
    return st.builds(struct, **{name: of_type[str(struct.__annotations__[name])] for name in names})


A_MESSAGE = st.one_of([_fields(struct) for struct in Message.__args__])

SMALL = st.integers(0, 2**63)


@given(st.lists(A_MESSAGE, max_size=80), SMALL, SMALL, SMALL, SMALL)
def test_a_frame_comes_out_as_it_went_in(sent: list[Message], source: int, target: int, seq: int, ack: int) -> None:
    frame = Frame(WIRE_VERSION, source, target, seq, ack, tuple(sent))
    assert decode_packet(encode_packet(frame)) == frame
    assert encode_frame(source, target, seq, ack, [encode_message(message) for message in sent]) == encode_packet(frame)
    assert salvage_frame(encode_packet(frame)) == (frame, 0)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 64, 65_535, 65_536])
def test_frames_of_every_length_are_put_together_alike(count: int) -> None:
    frame = Frame(WIRE_VERSION, 1, 2, 3, 4, (Cancel(b"i"),) * count)
    assert encode_frame(1, 2, 3, 4, [encode_message(Cancel(b"i"))] * count) == encode_packet(frame)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_packet_or_an_error_of_the_wire(data: bytes) -> None:
    records = (decode_member, decode_place, decode_lost, decode_running, decode_load, decode_look, decode_seen)
    for decode in (decode_packet, salvage_frame, *records):
        try:
            decode(data)
        except WireError:
            continue


@given(A_MESSAGE, st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_makes_a_packet_or_an_error_of_the_wire(message: Message, place: int, value: int) -> None:
    data = bytearray(encode_packet(Frame(WIRE_VERSION, 1, 2, 3, 4, (message, Want(ID)))))
    data[place % len(data)] = value
    for decode in (decode_packet, salvage_frame):
        try:
            decode(bytes(data))
        except WireError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x97\x65\x01\x01\x01\x01\x00\xdd\xff\xff\xff\xff",
        b"\x91" * 5_000,
        b"\x94\x66\x01\x01\xa1\xff",
        encode_packet(Bye(WIRE_VERSION, 1)) + b"\x00",
    ],
    ids=["nothing", "no type", "four thousand million messages", "deep", "no integer", "too much"],
)
def test_what_is_no_packet_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode_packet(data)
    with pytest.raises(MalformedMessageError):
        salvage_frame(data)


def test_another_version_is_refused_as_such() -> None:
    with pytest.raises(UnsupportedVersionError) as caught:
        decode_packet(encode_packet(Bye(WIRE_VERSION + 1, 1)))
    assert caught.value.version == WIRE_VERSION + 1
    with pytest.raises(UnsupportedVersionError):
        salvage_frame(encode_packet(Frame(WIRE_VERSION + 1, 1, 1, 1, 1)))
    with pytest.raises(UnsupportedVersionError):
        decode_place(encode_record(Place(WIRE_VERSION + 1, "p", 1)))


def test_an_unreadable_message_leaves_the_others_readable() -> None:
    parts = [encode_message(Want(ID)), b"\x92\xcc\xc8\x01", b"\xc0", encode_message(Cancel(ID))]
    frame, unreadable = salvage_frame(encode_frame(1, 2, 3, 4, parts))
    assert frame == Frame(WIRE_VERSION, 1, 2, 3, 4, (Want(ID), Cancel(ID)))
    assert unreadable == 2


def test_fields_that_a_later_sender_appends_are_ignored() -> None:
    data = encode_message(Want(ID))
    longer = bytes((data[0] + 1,)) + data[1:] + b"\xa5later"
    assert decode_packet(encode_frame(1, 2, 3, 4, [longer])) == Frame(WIRE_VERSION, 1, 2, 3, 4, (Want(ID),))


def test_fields_with_defaults_may_be_missing() -> None:
    packet = decode_packet(encode_frame(1, 2, 3, 4, [b"\x92\x04\xc4\x01i"]))
    assert packet == Frame(WIRE_VERSION, 1, 2, 3, 4, (Cancel(b"i"),))


def test_tags_are_never_shared() -> None:
    tags = [
        s.__struct_config__.tag
        for s in (
            Call,
            Resolve,
            Fail,
            Cancel,
            Consume,
            Chunk,
            Credit,
            Want,
            Probe,
            Locate,
            Located,
            Settled,
            Prioritise,
            Parked,
            Returned,
            Drain,
            Drainage,
            Bequest,
            Accepted,
        )
    ]
    assert tags == list(range(1, 20))
    packets = [s.__struct_config__.tag for s in (Frame, Gone, Bye, Member, Place, Lost, Running, Load, Look, Seen, Pack, Seal)]
    assert packets == [101, 102, 103, 201, 202, 203, 204, 205, 206, 207, 208, 209]
    assert [s.__struct_config__.tag for s in (Outcome, Unseen, Reading, Begun, Voided)] == [1, 2, 3, 4, 5]


def _samples() -> dict[str, bytes]:
    """One of each kind, with no field left at its default."""
    call = Call(
        ID,
        "analyst",
        "read",
        b"\x92\x90\x80",
        session="s",
        instance="i",
        init=b"n",
        deps=(b"d",),
        parent=b"p",
        job="j",
        priority=2,
        timeout_s=1.5,
        number=3,
        holds=("a/s",),
        cast=True,
        attempt=1,
        trace="t",
        budget=0.5,
        lost=("w/1",),
        failures=4,
        caller="c",
        tenant="t",
        workflow="w",
    )
    return {
        "call": encode_message(call),
        "resolve": encode_message(Resolve(ID, b"v", ("w",))),
        "fail": encode_message(Fail(ID, "m:E", "text", b"p", "trace", ("w",), ("a.b", "c"))),
        "cancel": encode_message(Cancel(ID, "why")),
        "consume": encode_message(Consume(ID, "w", 7)),
        "chunk": encode_message(Chunk(ID, 1, b"c", 2)),
        "credit": encode_message(Credit(ID, 9)),
        "want": encode_message(Want(ID)),
        "parked": encode_message(Parked(ID, False)),
        "prioritise": encode_message(Prioritise(ID, -2)),
        "release": encode_message(Release("w.1.0a")),
        "migrate": encode_message(Migrate(ID, "a", "s", "w")),
        "migrated": encode_message(Migrated(ID, "no", 0.5, 7)),
        "piece": encode_message(
            Piece(
                ID,
                1,
                "last",
                "a",
                "s",
                "b",
                [("f", 2, b"d"), ("f", 3, None)],
                [(b"c", b"r", 1.5, True)],
                4,
                {"f": "list"},
                {"f": (1, 2)},
                [(b"k", b"v")],
            )
        ),
        "taken": encode_message(Taken(ID, 1, "no", "b")),
        "thaw": encode_message(Thaw(ID)),
        "abandon": encode_message(Abandon(ID)),
        "forward": encode_message(Forward("o", 3, Call(ID, "a", "m", b"p"), 2)),
        "crossing": encode_message(Crossing("o", 3, "a", "s", 4)),
        "arrived": encode_message(Arrived("a", "s", "b", 4)),
        "forwarded": encode_message(Forwarded(ID, "w", 3, 2, "a", "s", "b", 1)),
        "returned": encode_message(Returned(Call(ID, "a", "m", b"p"))),
        "drain": encode_message(Drain(ID, 0.5)),
        "drainage": encode_message(Drainage(ID, "no", True, 1, 2, 3, 4, 5, 6, 7, ("w",))),
        "bequest": encode_message(Bequest(ID, "b", "/f", True)),
        "accepted": encode_message(Accepted(ID, "no")),
        "probe": encode_message(Probe(ID, ID, ID, ("a/s",))),
        "locate": encode_message(Locate(5, ("j",), ("w/1",))),
        "located": encode_message(Located(5, (ID,), ("j",))),
        "settled": encode_message(Settled(ID, True)),
        "pack": encode_record(
            Pack(
                WIRE_VERSION,
                (
                    Begun("j", b"p", "v"),
                    Outcome("j", b"p", Resolve(ID, b"v"), 0.5),
                    Unseen("j", b"p", 1, 2),
                    Reading("j", b"p", 1, 0.5),
                    Voided("j", b"p", (ID,)),
                ),
            )
        ),
        "seal": encode_record(Seal(WIRE_VERSION, "w")),
        "frame": encode_frame(1, 2, 3, 4, [encode_message(Want(ID))]),
        "gone": encode_packet(Gone(WIRE_VERSION, 2, 1, 3)),
        "bye": encode_packet(Bye(WIRE_VERSION, 2, 3, True)),
        "lost": encode_record(Lost(WIRE_VERSION, 2)),
        "running": encode_record(Running(WIRE_VERSION, "w", 2, 9, "answer", 1, 3, 5, 6, ("w/1",), 2, 7)),
        "load": encode_record(Load(WIRE_VERSION, 2, 3, {"a": (4, 5)})),
        "look": encode_record(Look(WIRE_VERSION, 8, True, ID)),
        "seen": encode_seen(
            Seen(WIRE_VERSION, 8, 2, 1, True, 0.5, 1.5, 3, 4, {"a": (5, 6)}, explanations=EXPLAINED),
            [encode_call_record(RECORD)],
        ),
        "place": encode_record(Place(WIRE_VERSION, "w", 2, "b")),
        "storeopening": encode_record(StoreOpening(WIRE_VERSION, "t", "w", 2, "h", "/f/1", "3.4")),
        "member": encode_record(
            Member(WIRE_VERSION, 2, "n", "worker", 7, {"a": ActorInfo("tool", {"": "(q: str) -> str"})}, True, "f", ("b",))
        ),
    }


@pytest.mark.parametrize("count", [0, 1, 16, 70_000])
def test_answers_of_every_length_are_put_together_alike(count: int) -> None:
    head = Seen(WIRE_VERSION, 8, 2, 1, True, 0.5, 1.5, 3, 4, {"a": (5, 6)}, explanations=EXPLAINED)
    data = encode_seen(head, [encode_call_record(RECORD)] * count)
    expected = Seen(WIRE_VERSION, 8, 2, 1, True, 0.5, 1.5, 3, 4, {"a": (5, 6)}, (RECORD,) * count, EXPLAINED)
    assert decode_seen(data) == expected


GOLDEN = {
    "call": (
        "dc001901c410000102030405060708090a0b0c0d0e0fa7616e616c797374a472656164c403929080a173a169c4016e91c40164c40170a1"
        "6a02cb3ff80000000000000391a3612f73c301a174cb3fe000000000000091a3772f310400a163a174a177"
    ),
    "resolve": "9402c410000102030405060708090a0b0c0d0e0fc4017691a177",
    "fail": "9903c410000102030405060708090a0b0c0d0e0fa36d3a45a474657874c40170a5747261636591a17792a3612e62a16300",
    "cancel": "9304c410000102030405060708090a0b0c0d0e0fa3776879",
    "consume": "9405c410000102030405060708090a0b0c0d0e0fa17707",
    "chunk": "9506c410000102030405060708090a0b0c0d0e0f01c4016302",
    "credit": "9307c410000102030405060708090a0b0c0d0e0f09",
    "release": "9214a6772e312e3061",
    "want": "9208c410000102030405060708090a0b0c0d0e0f",
    "parked": "930ec410000102030405060708090a0b0c0d0e0fc2",
    "prioritise": "930dc410000102030405060708090a0b0c0d0e0ffe",
    "migrate": "9515c410000102030405060708090a0b0c0d0e0fa161a173a177",
    "migrated": "9516c410000102030405060708090a0b0c0d0e0fa26e6fcb3fe000000000000007",
    "piece": (
        "9d17c410000102030405060708090a0b0c0d0e0f01a46c617374a161a173a1629293a16602c4016493a16603c09194c40163c40172cb"
        "3ff8000000000000c30481a166a46c69737481a1669201029192c4016bc40176"
    ),
    "taken": "9518c410000102030405060708090a0b0c0d0e0f01a26e6fa162",
    "thaw": "9219c410000102030405060708090a0b0c0d0e0f",
    "abandon": "921ac410000102030405060708090a0b0c0d0e0f",
    "forward": (
        "951ba16f03dc001901c410000102030405060708090a0b0c0d0e0fa161a16dc40170a0a0c40090c400a000c00090c200a0c0900000a0a0a002"
    ),
    "crossing": "961ca16f03a161a17304",
    "arrived": "951da161a173a16204",
    "forwarded": "991ec410000102030405060708090a0b0c0d0e0fa1770302a161a173a16201",
    "returned": "940fdc001901c410000102030405060708090a0b0c0d0e0fa161a16dc40170a0a0c40090c400a000"
    "c00090c200a0c0900000a0a0a0a0c2",
    "drain": "9310c410000102030405060708090a0b0c0d0e0fcb3fe0000000000000",
    "drainage": "9c11c410000102030405060708090a0b0c0d0e0fa26e6fc30102030405060791a177",
    "bequest": "9512c410000102030405060708090a0b0c0d0e0fa162a22f66c3",
    "accepted": "9313c410000102030405060708090a0b0c0d0e0fa26e6f",
    "probe": (
        "9509c410000102030405060708090a0b0c0d0e0fc410000102030405060708090a0b0c0d0e0fc410000102030405060708090a0b0c0d0e"
        "0f91a3612f73"
    ),
    "locate": "940a0591a16a91a3772f31",
    "located": "940b0591c410000102030405060708090a0b0c0d0e0f91a16a",
    "settled": "930cc410000102030405060708090a0b0c0d0e0fc3",
    "pack": (
        "93ccd001959404a16ac40170a1769601a16ac401709402c410000102030405060708090a0b0c0d0e0fc4017690cb3fe00000"
        "00000000c29502a16ac4017001029503a16ac4017001cb3fe00000000000009405a16ac4017091c410000102030405060708"
        "090a0b0c0d0e0f"
    ),
    "seal": "93ccd101a177",
    "frame": "97650101020304919208c410000102030405060708090a0b0c0d0e0f",
    "gone": "956601020103",
    "bye": "9567010203c3",
    "lost": "93cccb0102",
    "running": "9dcccc01a1770209a6616e737765720103050691a3772f310207",
    "load": "95cccd01020381a161920405",
    "look": ("95ccce0108c3c410000102030405060708090a0b0c0d0e0f"),
    "seen": (
        "9dcccf01080201c3cb3fe0000000000000cb3ff8000000000000030481a161920506919ec410000102030405060708090a0b0c0d0e0fc4"
        "0170a7616e616c797374a472656164a173a16aa16f0201cb3ff8000000000000cb4004000000000000cb400c000000000000a66661696c"
        "6564a36d3a459193cb4012000000000000a973656e7420746f2077a3776879"
    ),
    "place": "95ccca01a17702a162",
    "storeopening": "98ccdf01a174a17702a168a42f662f31a3332e34",
    "member": (
        "9bccc90102a16ea6776f726b65720781a1619aa4746f6f6c81a0af28713a2073747229202d3e20737472c2a0cb4082c000000000000000"
        "c0c2c2c3a16691a16290"
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_bytes_of_each_kind_are_pinned(kind: str) -> None:
    assert _samples()[kind].hex() == GOLDEN[kind], "the wire has changed: can older processes still read it?"


def test_every_kind_has_its_bytes_pinned() -> None:
    kinds = [*Message.__args__, *Packet.__args__, Place, Member, Lost, Running, Load, Look, Seen, Pack, Seal, StoreOpening]
    assert sorted(GOLDEN) == sorted(kind.__name__.lower() for kind in kinds)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_journal_are_refused_by_type(data: bytes) -> None:
    try:
        decode_journal(data)
    except WireError:
        pass
    else:
        assert data[1:3] in (b"\xcc\xd0", b"\xcc\xd1")
