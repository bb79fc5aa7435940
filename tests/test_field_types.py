"""Which types of managed fields are the same, by what is kept of them."""

from __future__ import annotations

import collections.abc
import datetime
import enum
import sys
import typing
from typing import TYPE_CHECKING, Any, Generic, NewType, Protocol, TypedDict, TypeVar

import pytest

from nalar_mq import ManagedDict, ManagedList, ManagedValue
from nalar_mq.field_types import classes_in, describe, fits, kind_in

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]  # pyright: ignore  # noqa: F401

T = TypeVar("T")
Number = NewType("Number", int)
Alias = list[int]


class Animal: ...


class Dog(Animal): ...


class Box(Generic[T]): ...


class Speaks(Protocol): ...


class Row(TypedDict):
    number: int


class Colour(enum.Enum):
    RED = 1


class Holder:
    class Inner: ...

    list = None


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (ManagedList[int], "list[int]"),
        ("ManagedList[int]", "list[int]"),
        ("ManagedList[Alias]", "list[list[int]]"),
        (ManagedList, "list"),
        (ManagedList[Any], "list"),
        (ManagedList[object], "list"),
        (ManagedList[T], "list"),  # type: ignore[valid-type]
        (ManagedList[Number], "list[int]"),
        (ManagedList["Animal"], "list[Animal]"),
        ("ManagedList['Animal | None']", "list[Animal | None]"),
        (ManagedList[Holder.Inner], "list[Holder.Inner]"),
        (ManagedList[typing.Optional[Dog]], "list[Dog | None]"),  # noqa: UP045
        (ManagedList[typing.List[int]], "list[list[int]]"),  # noqa: UP006
        (ManagedList[typing.Literal["a", 1]], "list[int | str]"),
        (ManagedList[typing.Annotated[int, "x"]], "list[int]"),
        (ManagedList[tuple[int, ...]], "list[tuple[int, ...]]"),
        (ManagedList[Box[int]], "list[Box[int]]"),
        (ManagedList[Row], "list[dict]"),
        (ManagedList[Colour], "list[Colour]"),
        (ManagedList[datetime.datetime], "list[datetime]"),
        (ManagedList[Speaks], "list"),
        (ManagedList[collections.abc.Sequence[int]], "list"),
        ("ManagedList[Missing]", "list"),
        ("ManagedDict[str, Missing]", "dict[str, Any]"),
        ("ManagedDict[str, dict[int, Missing | None]]", "dict[str, dict[int, Any]]"),
        ("ManagedList[", "list"),
        (ManagedDict[str, Any], "dict[str, Any]"),
        (ManagedValue[int], "value[int]"),
        ("list[int]", "list[int]"),
        (list[int], "list[int]"),
        (dict, "dict"),
    ],
)
def test_a_field_is_kept_with_what_it_holds(annotation: Any, words: str) -> None:
    assert describe(kind_in(words), annotation, __name__, Animal) == words


def test_names_in_a_function_and_in_a_class() -> None:
    class Local: ...

    assert describe("list", ManagedList[Local], __name__, Animal) == "list[Local]"
    assert describe("list", "ManagedList[Local]", __name__, Animal) == "list"
    assert describe("list", "ManagedList[list[int]]", __name__, Holder) == "list[list[int]]"
    assert describe("list", "ManagedList[Inner]", __name__, Holder) == "list[Holder.Inner]"


def test_a_module_that_is_renamed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe("list", "ManagedList[Animal]", __name__, Animal)
    monkeypatch.setitem(sys.modules, "renamed", sys.modules[__name__])
    monkeypatch.setattr(Animal, "__module__", "renamed")
    assert describe("list", "ManagedList[Animal]", "renamed", Animal) == before


@pytest.mark.parametrize(
    ("kept", "present", "is_same"),
    [
        ("list[int]", "list[int]", True),
        ("list[int]", "list[str]", False),
        ("list[int]", "list[float]", True),
        ("list[float]", "list[int]", False),
        ("list[int]", "list[int | str]", True),
        ("list[int | str]", "list[str | int]", True),
        ("list[int | str]", "list[int]", False),
        ("list[None | int]", "list[int]", False),
        ("list[int]", "list", True),
        ("list", "list[int]", True),
        ("list[Any]", "list[int]", True),
        ("list[Dog]", "list[Animal]", True),
        ("list[Animal]", "list[Dog]", False),
        ("list[Dog | None]", "list[Animal | None]", True),
        ("list[Cat]", "list[Animal]", False),
        ("list[list[int]]", "list[list]", True),
        ("dict[str, list[int]]", "dict[str, list[str]]", False),
        ("dict[str, int]", "dict[int, int]", False),
        ("list[tuple[int, int]]", "list[tuple[int, ...]]", True),
        ("list[tuple[int, ...]]", "list[tuple[int, int]]", False),
        ("list[int]", "value[int]", False),
        ("list", "dict", False),
        ("list[", "list[int]", True),
    ],
)
def test_what_may_stay(kept: str, present: str, is_same: bool) -> None:
    classes = classes_in("ManagedDict[Dog, Box[Animal]]", __name__, Animal)
    assert classes == [ManagedDict, Dog, Box, Animal]
    assert fits(kept, present, classes) is is_same
