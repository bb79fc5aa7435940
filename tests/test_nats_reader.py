"""Sorting what a NATS server sends: whatever the pieces it comes in, each message arrives once, and the rest in its order."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.nats_reader import Sorter, parsed_headers
from nalar_mq.transport import Delivered

_bodies = st.binary(max_size=60) | st.sampled_from([b"\r\n", b"MSG a 1 3\r\n", b"PING\r\n"])
_lines = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"a":1}\r\n', b"-ERR 'no'\r\n"])


def message(sid: int, body: bytes, reply: str = "", headers: bytes = b"") -> bytes:
    start = f"{'HMSG' if headers else 'MSG'} some.subject {sid} {reply + ' ' if reply else ''}"
    sizes = f"{len(headers)} " if headers else ""
    return f"{start}{sizes}{len(headers) + len(body)}\r\n".encode() + headers + body + b"\r\n"


def sorted_in_pieces(data: bytes, cuts: list[int]) -> tuple[list[Delivered], bytes]:
    found: list[Delivered] = []
    sorter = Sorter({b"1": found.append})
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return found, b"".join([sorter.sort(data[begin:end]) for begin, end in pairwise(places)])


@given(st.lists(st.tuples(st.sampled_from([1, 2]), _bodies) | _lines), st.lists(st.integers(0, 5000), max_size=12))
def test_every_cut_gives_the_same(commands: list[Any], cuts: list[int]):
    data = b"".join(command if type(command) is bytes else message(*command) for command in commands)
    found, others = sorted_in_pieces(data, cuts)
    assert [one.data for one in found] == [c[1] for c in commands if type(c) is tuple and c[0] == 1]
    assert others == b"".join(c if type(c) is bytes else message(*c) for c in commands if type(c) is bytes or c[0] == 2)


@given(st.integers(0, 200))
def test_reply_and_headers(cut: int):
    data = message(1, b"body", "answer.to", b"NATS/1.0\r\nA: b\r\nC:d: e\r\n\r\n") + message(
        1, b"", "", b"NATS/1.0 100 Idle\r\n\r\n"
    )
    found, others = sorted_in_pieces(data, [cut])
    assert others == b""
    assert found == [
        Delivered("some.subject", b"body", "answer.to", {"A": "b", "C": "d: e"}),
        Delivered("some.subject", b"", "", {"Status": "100", "Description": "Idle"}),
    ]


@pytest.mark.parametrize(
    "wrong",
    [b"MSG a\r\n", b"MSG a 1 x\r\n", b"MSG a 1 -9\r\n", b"M\r\n", b"MSG " + b"x" * 100_000],
    ids=lambda wrong: wrong[:9],
)
@given(cut=st.integers(0, 120_000))
def test_what_is_no_command_is_left_to_the_client(wrong: bytes, cut: int):
    data = message(1, b"before") + wrong + message(1, b"after")
    found, others = sorted_in_pieces(data, [cut])
    assert [one.data for one in found] == [b"before"]
    assert others == wrong + message(1, b"after")


def test_a_handler_that_fails_keeps_nobody_else_waiting(caplog: pytest.LogCaptureFixture):
    found: list[Delivered] = []

    def fail(delivered: Delivered) -> None:
        raise RuntimeError(delivered.subject)

    assert Sorter({b"1": fail, b"2": found.append}).sort(message(1, b"a") + message(2, b"b")) == b""
    assert [one.data for one in found] == [b"b"]


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        (b"NATS/1.0\r\n\r\n", None),
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
            {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Consumer": "7"},
        ),
        (b"NATS/1.0\r\nwithout colon\r\n:\r\nA:\xff\r\n\r\n", {"A": "�"}),
    ],
)
def test_headers(block: bytes, wanted: dict[str, str] | None):
    assert parsed_headers(block) == wanted
