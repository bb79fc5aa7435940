"""What is read from an agent's attribute refuses to be changed, and is else what it was: by itself, and in a plain workflow."""

from __future__ import annotations

import asyncio
import bisect
import copy
import json
import pickle
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import attrs
import msgspec
import numpy as np
import pydantic
import pytest

from nalar_mq import readings, values
from nalar_mq.app import App, load_app
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import CopyChangedError
from nalar_mq.memory_transport import MemoryHub
from nalar_mq.worker import Worker


@dataclass
class Plain:
    tags: list[Any] = field(default_factory=lambda: [1])

    def moved(self) -> Plain:
        return type(self)([*self.tags, 9])


@dataclass(frozen=True)
class Frozen:
    tags: list[Any] = field(default_factory=lambda: [1])


@dataclass(slots=True)
class Slotted:
    tags: list[Any] = field(default_factory=lambda: [1])


class Told(Plain):
    told: int = 0

    def __init_subclass__(cls) -> None:
        Told.told += 1


@attrs.define
class Attrs:
    tags: list[Any] = attrs.Factory(lambda: [1])


class Model(pydantic.BaseModel):
    tags: list[Any] = pydantic.Field(default_factory=lambda: [1])


class Struct(msgspec.Struct):
    tags: list[Any] = msgspec.field(default_factory=lambda: [1])


class Bag(list[Any]):
    pass


Pair = namedtuple("Pair", "tags rest")

CONTAINERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [3, [2], 1],
    "dict": lambda: {"a": [1]},
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(b"ab"),
    "deque": lambda: deque([[1]], 5),
    "OrderedDict": lambda: OrderedDict(a=[1]),
    "defaultdict": lambda: defaultdict(list, a=[1]),
    "Counter": lambda: Counter("aab"),
    "Bag": lambda: Bag([1, [2]]),
}
OBJECTS: dict[str, Callable[[], Any]] = {cls.__name__: cls for cls in (Plain, Frozen, Slotted, Told, Attrs, Model, Struct)}
OTHERS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: ([1], 2),
    "Pair": lambda: Pair([1], 2),
    "nested": lambda: {"k": [{"deep": Plain([[1]])}]},
}
EVERYTHING = {**CONTAINERS, **OBJECTS, **OTHERS}


@pytest.mark.parametrize("name", EVERYTHING)
def test_it_is_else_what_it_was(name: str) -> None:
    original, read = EVERYTHING[name](), readings.lent(EVERYTHING[name]())
    assert read == original
    assert original == read
    assert repr(read) == repr(original)
    assert isinstance(read, type(original))
    assert read.__class__ is readings.class_of(read) is type(original)
    assert values.encode(read) == values.encode(original)
    for copied in (copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert type(copied) is type(original)
        assert copied == original
        assert not readings.is_lent(copied)
    assert type(copy.copy(read)) is type(original)


@pytest.mark.parametrize("name", [*OBJECTS, "Pair"])
def test_attributes_cannot_be_set_nor_what_stands_in_them_be_changed(name: str) -> None:
    read = readings.lent(EVERYTHING[name]())
    with pytest.raises(CopyChangedError if name != "Pair" else AttributeError):
        read.tags = []
    with pytest.raises((CopyChangedError, AttributeError)):
        del read.tags
    with pytest.raises(CopyChangedError, match=r"this list was read .* in a method of the agent"):
        read.tags.append(2)
    assert read == EVERYTHING[name]() or name == "Pair"


MUTATIONS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "list": (
        *(lambda x: x.append(1), lambda x: x.extend([1]), lambda x: x.insert(0, 1), lambda x: x.remove(1), lambda x: x.pop()),
        *(lambda x: x.clear(), lambda x: x.sort(key=str), lambda x: x.reverse(), lambda x: x.__setitem__(0, 1)),
        *(lambda x: x.__delitem__(0), lambda x: x.__iadd__([1]), lambda x: x.__imul__(2), lambda x: x[1].append(3)),
        *(random.shuffle, lambda x: bisect.insort(x, 1, key=str)),
    ),
    "dict": (
        *(lambda x: x.update(b=1), lambda x: x.setdefault("b", 1), lambda x: x.pop("a"), lambda x: x.popitem()),
        *(lambda x: x.clear(), lambda x: x.__ior__({}), lambda x: x.__setitem__("b", 1), lambda x: x.__delitem__("a")),
        *(lambda x: x["a"].append(2), lambda x: [each.append(1) for each in x.values()]),
    ),
    "set": (
        *(lambda x: x.add(1), lambda x: x.discard(1), lambda x: x.remove(1), lambda x: x.pop(), lambda x: x.clear()),
        *(lambda x: x.update({3}), lambda x: x.__ior__({3}), lambda x: x.__iand__({3}), lambda x: x.__isub__({1})),
        *(lambda x: x.__ixor__({1}), lambda x: x.difference_update({1}), lambda x: x.intersection_update({1})),
        *(lambda x: x.symmetric_difference_update({1}),),
    ),
    "bytearray": (lambda x: x.extend(b"c"), lambda x: x.__iadd__(b"c"), lambda x: x.__setitem__(0, 1), lambda x: x.pop()),
    "deque": (lambda x: x.appendleft(1), lambda x: x.popleft(), lambda x: x.rotate(1), lambda x: x[0].append(1)),
    "OrderedDict": (lambda x: x.move_to_end("a"), lambda x: x.__setitem__("b", 1), lambda x: x.popitem()),
    "defaultdict": (lambda x: x["missing"], lambda x: x["a"].append(1)),
    "Counter": (lambda x: x.update("b"), lambda x: x.subtract("a"), lambda x: x.__iadd__(x), lambda x: x.__setitem__("a", 0)),
    "Bag": (lambda x: x.append(1), lambda x: x[1].append(1), lambda x: setattr(x, "label", 1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_containers_refuse_whatever_changes_them(name: str) -> None:
    read = readings.lent(CONTAINERS[name]())
    for mutation in MUTATIONS[name]:
        with pytest.raises(CopyChangedError):
            mutation(read)
    assert read == CONTAINERS[name]()


def test_copies_are_plain_and_what_was_inside_is_still_the_agents() -> None:
    read = readings.lent([[1], 2])
    for mine in (read[:], read + read, list(read), read.copy(), [*read], type(read)(read), sorted(read, key=str)):
        mine.append(4)
        with pytest.raises(CopyChangedError):
            next(x for x in mine if isinstance(x, list)).append(5)
    assert json.dumps(read) == "[[1], 2]"
    moved = readings.lent(Plain()).moved()
    assert type(moved) is Plain
    moved.tags.append(10)
    assert moved.tags == [1, 9, 10]


def test_classes_of_users_are_not_told() -> None:
    before = Told.told
    assert readings.is_lent(readings.lent(Told()))
    assert Told.told == before


def test_paths_can_be_used() -> None:
    root, parts = readings.lent((Path("/data"), [PurePosixPath("a"), PureWindowsPath("b")]))
    assert root / "x.txt" == Path("/data/x.txt")
    assert (root / "x.txt").suffix == ".txt"
    assert [str(part) for part in parts] == ["a", "b"]
    assert root.parent == Path("/")
    assert {Path("/data"): 1}[root] == 1


class Key(msgspec.Struct, frozen=True):
    number: int


def test_frozen_structs_are_found_as_keys() -> None:
    key = readings.lent(Key(1))
    assert {Key(1): 2}[key] == 2
    assert {key: 2}[Key(1)] == 2
    assert hash(key) == hash(Key(1))
    assert readings.lent({Key(1): [2]})[Key(1)] == [2]


def test_arrays_are_read_only() -> None:
    read = readings.lent({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0] = 1


SHELF = """\
import heapq


class Book:
    def __init__(self, title):
        self.title = title
        self.notes = []


class Shelf:
    def __init__(self):
        self.items = [1]
        self.books = {"a": Book("Emma")}
        self.count = 0

    def add(self, item):
        self.items.append(item)
        return list(self.items)

    def total(self, items: list[int]):
        return sum(items)


def read():
    s = Shelf()
    x = s.items
    total = sum(x) + len(s.items) + s.books["a"].notes.count(1)
    mine = list(x)
    mine.append(5)
    s.count += 1
    s.count += 1
    return total, mine, type(x) is list, x == [1], [*x, 2], s.count, s.total(s.items), s.add(2)


def appends():
    s = Shelf()
    s.items.append(7)
    return s.add(99), s.items


def aliased():
    s = Shelf()
    x = s.items
    x.append(7)


def augmented():
    s = Shelf()
    x = s.items
    x += [7]


def augmented_attribute():
    s = Shelf()
    s.items += [7]


def assigned():
    s = Shelf()
    s.items[0] = 7


def deleted():
    s = Shelf()
    del s.items[0]


def passed_on():
    s = Shelf()
    change(s.items)


def change(x):
    x.append(1)


def looped():
    s = Shelf()
    for book in s.books.values():
        book.notes.append(1)


def attribute():
    s = Shelf()
    s.books["a"].title = "Persuasion"


def heap():
    s = Shelf()
    heapq.heappush(s.items, 0)


def after_a_future():
    s = Shelf()
    s.add(2)
    s.items.append(s.add(3))
"""
CHANGES = (
    *("appends", "aliased", "augmented", "augmented_attribute", "assigned", "deleted", "passed_on", "looped", "attribute"),
    *("heap", "after_a_future"),
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder, path = tmp_path_factory.mktemp("shelf"), list(sys.path)
    (folder / "shelf.py").write_text(SHELF)
    tables = ["[agents.shelf]\nsource = 'shelf:Shelf'\nstateful = true"]
    tables += [f"[workflows.{name}]\nsource = 'shelf:{name}'" for name in ("read", *CHANGES)]
    (folder / "nalar.toml").write_text("\n".join(tables))
    app = load_app(folder)
    yield app
    app.unload()
    sys.path[:] = path
    del sys.modules["shelf"]


def outcome(app: App, access: BrokerAccess, workflow: str) -> Any:
    settings = Settings(broker=access, namespace="readings", node="here")

    async def call() -> Any:
        hub = MemoryHub(seed=1)
        async with (
            Worker(app, settings, name="w", connect=hub.connect, lease_in_thread=False),
            connect(settings=settings, connect=hub.connect) as client,
        ):
            return await client.call(workflow)

    return asyncio.run(call())


def test_a_workflow_that_only_reads_gives_the_answer_of_plain_python(shelf: App, broker_access: BrokerAccess) -> None:
    plain: dict[str, Any] = {}
    exec(SHELF, plain)
    expected = plain["read"]()
    assert outcome(shelf, broker_access, "read") == expected


@pytest.mark.parametrize("workflow", CHANGES)
def test_a_workflow_that_changes_what_it_read_is_told(shelf: App, broker_access: BrokerAccess, workflow: str) -> None:
    with pytest.raises(CopyChangedError, match="change it in a method of the agent"):
        outcome(shelf, broker_access, workflow)
