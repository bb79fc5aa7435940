"""Names, addresses and subjects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.address import Address, Subjects, check_token, is_token, random_token
from nalar_mq.errors import AddressError
from nalar_mq.memory_transport import subject_matches

TOKENS = st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "A-z_0", "-", "x" * 128])
def test_tokens_are_taken_as_they_are(name: str) -> None:
    assert is_token(name)
    assert check_token(name) == name


@pytest.mark.parametrize("name", ["", " ", "a.b", "*", ">", "a b", "a\n", "\u00fc", "\u0661", "x" * 129, "a/b", "$SRV"])
def test_what_cannot_be_a_token_is_refused_with_its_role(name: str) -> None:
    assert not is_token(name)
    with pytest.raises(AddressError, match="session"):
        check_token(name, "session")


def test_a_long_bad_name_is_shown_shortened() -> None:
    with pytest.raises(AddressError) as caught:
        check_token("." * 10_000)
    assert len(str(caught.value)) < 300


@given(TOKENS, TOKENS, TOKENS)
def test_a_box_names_both_sides_and_falls_under_one_filter_only(to: str, sender: str, other: str) -> None:
    subjects = Subjects()
    box = subjects.box(to, sender)
    assert subjects.box_sender(box) == sender
    assert subject_matches(subjects.box_filter(to), box)
    assert subject_matches(subjects.box_filter(other), box) == (other == to)


@given(TOKENS, TOKENS)
def test_namespaces_keep_apart(one: str, other: str) -> None:
    there = Subjects(other)
    assert subject_matches(Subjects(one).box_filter("w"), there.box("w", "c")) == (one == other)
    assert (Subjects(one).members_bucket == there.members_bucket) == (one == other)


def test_a_namespace_is_a_token() -> None:
    with pytest.raises(AddressError, match="namespace"):
        Subjects("a.b")


def test_random_tokens_are_tokens_and_differ() -> None:
    assert is_token(random_token("client"))
    assert random_token("client") != random_token("client")
    assert random_token("w", b"\x01\x02") == "w-0102"


def test_the_later_life_of_a_name_is_greater() -> None:
    assert Address("w", 2) > Address("w", 1)
    assert Address("w", 1) == Address("w", 1)


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*.c", "a.b.c", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*", "a.b", False),
        ("a.b.c", "a.b", False),
    ],
)
def test_wildcards_match_as_the_broker_matches_them(pattern: str, subject: str, matches: bool) -> None:
    assert subject_matches(pattern, subject) is matches
