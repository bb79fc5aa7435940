from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import itertools
import math
import os
import random
import re
import subprocess
import sys
import threading
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypedDict

import attrs
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq import classes, errors, values
from nalar_mq.errors import (
    ArgumentError,
    CallCancelledError,
    CallTimeoutError,
    MalformedMessageError,
    NotConnectedError,
    OverloadedError,
    RemoteError,
    RemoteTraceback,
    UnknownClassError,
    ValueNotEncodableError,
    WaitCycleError,
)
from nalar_mq.values import check, decode, encode, from_json, to_json


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    name: str
    tags: tuple[str, ...] = ()


@dataclasses.dataclass
class Computed:
    width: int
    area: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError("negative")
        self.area = self.width**2

    @functools.cached_property
    def lock(self) -> Any:
        return threading.Lock()


class Struct(msgspec.Struct, frozen=True):
    name: str
    parts: list[Any] = []


class Model(pydantic.BaseModel):
    name: str
    when: dt.datetime | None = None
    _secret: int = pydantic.PrivateAttr(default=0)


class OpenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", frozen=True)
    name: str


@attrs.define
class Attr:
    x: int
    y: list[int] = attrs.field(factory=list)


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Pair(NamedTuple):
    left: Any
    right: Any = 0


OldPair = collections.namedtuple("OldPair", "a b")


class Plain:
    def __init__(self, a: Any) -> None:
        self.a = a
        self.calls = 1

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]


class Slotted:
    __slots__ = ("__hidden", "a", "unset")

    def __init__(self, a: Any) -> None:
        self.a = a
        self.__hidden = "h"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.a, self.__hidden) == (other.a, other.__hidden)

    __hash__ = None  # type: ignore[assignment]


class Names(list[str]):
    def append(self, value: str) -> None:
        raise AssertionError("not on the way")

    def __iter__(self) -> Any:
        raise AssertionError("not on the way")


class Text(str):
    lang: str


class Ratio(float):
    pass


class Big(int):
    pass


class Table(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("not on the way")


class Deep(OrderedDict[str, int]):
    pass


class AppError(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.detail = detail


class Dangerous:
    def __del__(self) -> None:
        DELETED.append(getattr(self, "path", ""))


DELETED: list[str] = []


class Pickled:
    def __reduce__(self) -> Any:
        return (os.getcwd, ())


class Future(values.Deferred):
    __slots__ = ("data", "error", "id")

    def __init__(self, id: bytes, data: bytes | None = None, error: Exception | None = None) -> None:
        self.id = id
        self.data = data
        self.error = error

    def ref(self) -> bytes:
        return self.id

    def payload(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        return self.data


def module_function() -> int:
    return 7


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(
            map(same, list.__iter__(a) if isinstance(a, list) else a, list.__iter__(b) if isinstance(b, list) else b)
        )
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(dict.items(a), dict.items(b), strict=True))
    return same(vars(a), vars(b)) if type(a) is Point else bool(a == b)


def label(value: Any) -> str:
    """The same in every process: without addresses, and sets in order."""
    text = str(sorted(map(label, value))) if isinstance(value, (set, frozenset)) else str(value)
    return re.sub(r" at 0x\w+", "", text)[:60]


EXACT: list[Any] = [
    None, True, False, 0, -1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**5000, -(2**5000),
    0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 1 + 2j, complex(math.inf, -0.0),
    "", "text", "a\ud800b", "\x00", "日本", b"", b"\xff" * 300, bytearray(b"abc"),
    [], [1, "a", [None, [2.5]]], (), (1,), (1, (2, [3])), [(), ((),)],
    set(), {1, 2}, {"a", (1, 2), None}, frozenset({frozenset(), 1}),
    {}, {"a": 1}, {1: "a", None: 2, (1, 2): 3, "x": {b"k": 1.5}, 2**70: 1}, {"\ud800": 1}, {frozenset({1}): 2}, {True: 1},
    dt.date(2026, 1, 2), dt.time(1, 2, 3, 4), dt.time(1, 2, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, 3, 4, 5, 6),
    dt.datetime(2026, 1, 2, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=2), "X")),
    dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1), dt.datetime.min, dt.datetime.max,
    dt.timedelta(days=-1, microseconds=5), dt.timedelta.max, dt.UTC, dt.timezone(dt.timedelta(minutes=-90)),
    zoneinfo.ZoneInfo("Asia/Tokyo"),
    Decimal("1.10"), Decimal("-Infinity"), Decimal("1E+999999"), Fraction(1, 3), uuid.UUID(int=5),
    Path("/a/b"), PurePosixPath("x/../y"), PureWindowsPath("C:/x"), range(1, 10, 3), slice(1, None), ...,
    deque([1, (2,)], maxlen=5), deque(), OrderedDict([("b", 1), ("a", (2,))]), Counter("aab"), Counter({"a": -1}),
    defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2}), types.SimpleNamespace(a=1, b=(2,)),
    re.compile("a+", re.I | re.S), re.compile(rb"x"),
    Colour.RED, Colour.GREEN, Level.HIGH, Word.YES, Access.READ, Access.READ | Access.WRITE, Access(0),
    Pair(1, (2,)), OldPair(1, [2]), Point(1, "a"), Point(1, Point(2, [Pair(3)])), Frozen(name="n", tags=("a",)),
    Computed(3), Struct("n", [(1, 2)]), Attr(1, [2]), Plain([1, (2,)]), Slotted((1,)),
    Model(name="m", when=dt.datetime(2026, 1, 1)),
    OpenModel(name="m", more=(1, 2)), Ratio(1.5), Big(2**80), Deep(a=1), int, Point, Colour, module_function,
    collections.namedtuple, subprocess.Popen,
]  # fmt: skip


@pytest.mark.parametrize("value", EXACT, ids=label)
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(decode(encode(value)), value)
    assert same(decode(encode([{"k": (value,)}])), [{"k": (value,)}])


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.timedeltas()
    | st.uuids()
)
keys = st.text(st.characters()) | st.integers() | st.binary() | st.none() | st.tuples(st.integers(), st.text())
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.builds(Point, st.integers(), inner)
    ),
    max_leaves=20,
)


@given(trees)
@settings(max_examples=300, deadline=None)
def test_any_tree_round_trips_and_encodes_the_same_twice(tree: Any) -> None:
    data = encode(tree)
    again = decode(data)
    assert same(again, tree)
    assert encode(again) == data


@given(st.sets(keys), st.randoms(use_true_random=False))
def test_equal_sets_are_equal_bytes(items: set[Any], rng: random.Random) -> None:
    shuffled = list(items)
    rng.shuffle(shuffled)
    assert encode(set(shuffled)) == encode(items)
    assert encode(frozenset(shuffled)) != encode(items)


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**20])
def test_many_bytes_are_encoded_as_few(size: int) -> None:
    data = bytes([size % 251]) * size
    assert encode(data) == msgspec.msgpack.encode(data)
    assert decode(encode(data)) == data


def test_subclasses_keep_class_content_and_attributes_without_their_own_methods() -> None:
    text = Text("hej")
    text.lang = "sv"
    back = decode(encode(text))
    assert type(back) is Text and back == "hej" and back.lang == "sv"
    names = Names(["a", "b"])
    assert list.__eq__(decode(encode(names)), ["a", "b"]) is True
    assert type(decode(encode(names))) is Names
    table = Table(a=1)
    assert type(decode(encode(table))) is Table and decode(encode(table)) == {"a": 1}


def test_constructors_do_not_run() -> None:
    value = Computed(3)
    value.width = -3
    _ = value.lock
    back = decode(encode(value))
    assert (back.width, back.area) == (-3, 9)
    assert "lock" not in vars(back)


def test_private_and_extra_parts_of_models_survive() -> None:
    model = Model(name="m")
    model._secret = 4
    back = decode(encode(model))
    assert back._secret == 4 and back.model_fields_set == {"name"}
    assert decode(encode(OpenModel(name="m", more=1))).more == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="<f4").reshape(2, 3),
        np.zeros((0, 3)),
        np.array(5),
        np.array(["a", "bc"]),
        np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        np.array(["2026-01-01"], dtype="M8[D]"),
        np.arange(10)[::2],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
    ],
    ids=str,
)
def test_numpy_arrays(array: Any) -> None:
    back = decode(encode(array))
    assert back.dtype == array.dtype and back.shape == array.shape and np.array_equal(back, array)
    assert back.flags.writeable


def test_numpy_scalars_and_refused_arrays() -> None:
    for scalar in (np.float32(1.5), np.int64(3), np.bool_(True), np.datetime64("2026-01-01")):
        assert type(decode(encode(scalar))) is type(scalar) and decode(encode(scalar)) == scalar
    with pytest.raises(ValueNotEncodableError):
        encode(np.array([object()]))


def test_futures_with_a_value_are_embedded_and_others_named() -> None:
    done, open_, key = Future(b"d" * 16, encode((1, 2))), Future(b"o" * 16), Future(b"k" * 16)
    deps: list[values.Deferred] = []
    data = encode({"a": [done, {"b": (open_,)}], "c": Point(1, key)}, deps)
    assert deps == [open_, key]
    back = decode(data, lambda id: f"value of {id[:1].decode()}")
    assert back == {"a": [(1, 2), {"b": ("value of o",)}], "c": Point(1, "value of k")}


def test_deps_are_named_once_for_each_place_even_if_the_first_attempt_fails() -> None:
    earlier, future = Future(b"x" * 16), Future(b"o" * 16)
    deps: list[values.Deferred] = [earlier]
    encode([future, 2**70], deps)
    assert deps == [earlier, future]


def test_futures_in_wrong_places() -> None:
    with pytest.raises(ValueNotEncodableError, match=r"value -> \['a'\]\[0\]: a future that has no value yet"):
        encode({"a": [Future(b"o" * 16)]})
    with pytest.raises(ZeroDivisionError):
        encode([Future(b"o" * 16, error=ZeroDivisionError())], [])
    data = encode(Future(b"o" * 16), [])
    with pytest.raises(MalformedMessageError):
        decode(data)
    with pytest.raises(KeyError):
        decode(encode([(Future(b"o" * 16),)], []), {}.__getitem__)


def local_instance() -> Any:
    class Local:
        pass

    return Local()


async def pieces() -> Any:
    yield 1


def holding(value: Any) -> Any:
    plain = Plain(1)
    plain.a = value
    return plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"a": [1, 2, 3, pieces()]}, r"x -> \['a'\]\[3\]: async_generator"),
        (lambda: [lambda: 1], r"x -> \[0\]: lambda"),
        (lambda: (1, local_instance()), r"x -> \[1\]: instance of local class .*Local"),
        (lambda: holding(threading.Lock()), r"x -> \.a: instance of .*lock"),
        (lambda: Pickled(), "its own pickling"),
        (lambda: Dangerous(), "__del__"),
        (lambda: object(), "x: object"),
        (lambda: {1: {2: itertools.count()}}, r"x -> \[1\]\[2\]: .*count"),
        (lambda: defaultdict(lambda: 1), "factory is a lambda"),
        (lambda: Struct("n", [memoryview(b"")]), r"x -> \.parts\[0\]: memoryview"),
        (lambda: Point(1, types), r"x -> \.y: module"),
        (lambda: {type("Made", (), {})}, "Made"),
        (lambda: [StopIteration(1)], "StopIteration"),
        (lambda: Model, None),
    ],
)
def test_what_cannot_travel_is_named_with_its_path(make: Any, message: str | None) -> None:
    if message is None:
        assert decode(encode(make())) is make()
        return
    with pytest.raises(ValueNotEncodableError, match=message):
        encode(make(), what="x")


def test_open_files_and_sockets_are_refused(tmp_path: Path) -> None:
    with (
        open(tmp_path / "f", "w") as file,
        pytest.raises(ValueNotEncodableError, match=r"argument 'log' -> \[0\]: .*TextIOWrapper"),
    ):
        values.encode_arguments((1, [file]), {}, names=("n", "log"))


def test_arguments_are_named_in_messages() -> None:
    with pytest.raises(ValueNotEncodableError, match=r"argument 'b' -> \[0\]: lambda"):
        values.encode_arguments((1, [lambda: 1]), {"c": 2}, names=("a", "b"))
    with pytest.raises(ValueNotEncodableError, match="argument '2': lambda"):
        values.encode_arguments((1, lambda: 1), {})
    with pytest.raises(ValueNotEncodableError, match="argument 'c': lambda"):
        values.encode_arguments((1,), {"c": lambda: 1}, names=("a",))
    assert values.decode_arguments(values.encode_arguments((1, (2,)), {"c": 3})) == ([1, (2,)], {"c": 3})
    for wrong in (1, [], [1, 2], [[], {}, 1], [{}, []], [[], {1: 2}], ([], {})):
        with pytest.raises(MalformedMessageError):
            values.decode_arguments(encode(wrong))


def test_structures_that_contain_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append({"again": (loop,)})
    with pytest.raises(ValueNotEncodableError, match="containing itself"):
        encode(loop)
    plain = Plain(1)
    plain.a = plain
    with pytest.raises(ValueNotEncodableError, match="containing itself"):
        encode(plain)
    deep: Any = 1
    for _ in range(values.MAX_DEPTH):
        deep = (deep,)
    assert same(decode(encode(deep)), deep)


def instance(name: str, *parts: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(13, msgspec.msgpack.encode([name, *parts])))


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",
        "tempfile:_TemporaryFileCloser",
        "threading:Thread",
        "builtins:object",
        "builtins:type",
        "os:system",
        "nowhere:Thing",
        "tests.test_values:Dangerous",
        f"{__name__}:Dangerous",
        f"{__name__}:Pickled",
        f"{__name__}:module_function",
        f"{__name__}:Plain.__init__",
        f"{__name__}:os.path",
        "",
        ":",
        ":x",
    ],
)
def test_bytes_cannot_make_instances_of_other_classes(name: str) -> None:
    with pytest.raises(UnknownClassError) as caught:
        decode(instance(name, {"path": "/tmp/x"}))
    assert caught.value.class_name == name
    assert "/tmp/x" not in DELETED


@pytest.mark.parametrize("parts", [(), (1,), ([],), ({"nope": 1},), ({"a": 1}, 2)])
def test_instances_with_wrong_parts_are_malformed(parts: tuple[Any, ...]) -> None:
    for cls in (Slotted, Struct, Model, Frozen, Colour, AppError, Names):
        if cls is Model and parts == ({"a": 1}, 2):
            continue
        with contextlib.suppress(MalformedMessageError):
            decode(instance(f"{__name__}:{cls.__name__}", *parts))


def test_functions_and_builtins_by_name() -> None:
    for thing in (len, os.system):
        with pytest.raises(ValueNotEncodableError):
            encode(thing)
    with pytest.raises(MalformedMessageError):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(12, msgspec.msgpack.encode("posix:system"))))


def test_decoding_imports_nothing() -> None:
    assert "this" not in sys.modules
    with pytest.raises(UnknownClassError):
        decode(instance("this:s"))
    assert "this" not in sys.modules


MAIN = """
import dataclasses, sys
sys.path.insert(0, {path!r})
from nalar_mq import values

@dataclasses.dataclass
class Report:
    title: str

if __name__ == "__main__":
    data = values.encode(Report("t"))
    assert b"mainapp:Report" in data and b"__main__" not in data
    assert values.decode(data) == Report("t")
    sys.stdout.buffer.write(data)
"""


def test_classes_of_the_main_module_travel_under_its_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = tmp_path / "mainapp.py"
    app.write_text(MAIN.format(path=str(Path(values.__file__).parent.parent)))
    data = subprocess.run([sys.executable, str(app)], check=True, capture_output=True).stdout
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = __import__("mainapp")
    try:
        assert decode(data) == module.Report("t")
        assert encode(module.Report("t")) == data
    finally:
        del sys.modules["mainapp"]


BOMBS = [
    b"",
    b"\xc1",
    b"\x91" * 100_000 + b"\xc0",
    b"\x81\xa1a" * 100_000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x04",
    b"\x81\x91\x01\x01\x00",
    b"\xc7\x00\x63",
    b"\xc7\x0c\xff" + b"\xff" * 12,
]


@pytest.mark.parametrize("data", BOMBS, ids=lambda data: repr(data[:12]))
def test_bombs_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode(data)


def test_deep_extensions_are_malformed() -> None:
    body = b"\xc0"
    for _ in range(3000):
        body = msgspec.msgpack.encode(msgspec.msgpack.Ext(4, b"\x91" + body))
    with pytest.raises(MalformedMessageError):
        decode(body)


@pytest.mark.parametrize(
    "parts",
    [
        ["array", "|O", [1], b"\0" * 8],
        ["array", "<f8", [10**12], b"\0" * 8],
        ["array", "<f8", [10**12], b""],
        ["array", "V0", [10**15], b""],
        ["array", "nonsense", [1], b""],
        ["array", [["a", "<U999999999"]], [1], b""],
        ["array scalar", "<f8", b""],
        ["zone", "../../etc/passwd"],
        ["zone", "Mars/Base"],
        ["path", "Popen", "x"],
        ["pattern", "(", 0],
        ["pattern", "(" * 5000 + ")" * 5000, 0],
        ["fraction", 1, 0],
        ["decimal", "x"],
        ["datetime", 1],
        ["datetime", 0, 0, 0, 0, 0, 0, 0, 0, None],
        ["complex", "x", 1],
        ["defaultdict", None, 1],
        ["deque", 1, None],
        ["deque", [], -1],
        ["namespace", {1: 2}],
        ["timezone", 5],
        ["ellipsis", 1],
        [["x"]],
        ["unknown"],
        [],
    ],
    ids=str,
)
def test_malformed_library_values(parts: list[Any]) -> None:
    with pytest.raises(MalformedMessageError):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(10, msgspec.msgpack.encode(parts))))


def mutate(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed.insert(at, rng.randrange(256))
        elif kind == 2:
            del changed[at : at + rng.randint(1, 4)]
        else:
            changed[at:at] = changed[rng.randrange(len(changed) + 1) :][: rng.randint(1, 8)]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_fifty_thousand_mutations_are_values_or_malformed() -> None:
    rng = random.Random(20261122)
    arrays = [np.arange(4), np.float64(2)]
    seeds = [encode(value) for value in [*EXACT, *arrays, AppError(1, detail="d"), OSError(2, "x", "f")]]
    seeds = [data for data in seeds if len(data) < 400]
    refused = 0
    for _ in range(50_000):
        try:
            decode(mutate(rng, rng.choice(seeds)), lambda id: id)
        except MalformedMessageError:
            refused += 1
    assert 10_000 < refused < 50_000


def round_trip(error: BaseException, actor: str = "") -> Exception:
    return values.decode_error(*values.encode_error(error), call_id="ab" * 16 if actor else "", actor=actor)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k", 2),
        FileNotFoundError(2, "No such file", "a.txt"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        AppError(3, detail="d"),
        ModuleNotFoundError("no", name="n"),
        ExceptionGroup("g", [ValueError(1), TypeError("t")]),
        subprocess.CalledProcessError(3, ["ls"], "out"),
        NotConnectedError("a.b"),
        OverloadedError("full", call_id="1", actor="a", retry_after_s=2.5),
        WaitCycleError("w", cycle=("a", "b")),
        CallTimeoutError("late", call_id="1", actor="a"),
        CallCancelledError("c", started=True),
    ],
    ids=repr,
)
def test_errors_come_back_of_their_type(error: Exception) -> None:
    back = round_trip(error)
    assert type(back) is type(error)
    assert str(back) == str(error) and repr(back) == repr(error)
    names = vars(error).keys() | {"filename", "errno", "object", "name", "returncode", "cmd"}
    assert [getattr(back, name, None) for name in names] == [getattr(error, name, None) for name in names]
    as_value = decode(encode([error]))[0]
    assert type(as_value) is type(error) and str(as_value) == str(error)


def test_errors_carry_the_traceback_of_the_callee() -> None:
    def fails() -> None:
        raise AppError(3, detail="d")

    with pytest.raises(AppError) as caught:
        fails()
    back = round_trip(caught.value, "tool.fails")
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "in fails" in str(back.__cause__) and "tool.fails" in str(back.__cause__)
    again = round_trip(back, "outer")
    assert "tool.fails" in str(again.__cause__) and "outer" in str(again.__cause__)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), GeneratorExit()])
def test_errors_with_a_meaning_of_their_own_become_remote_errors(error: BaseException) -> None:
    back = round_trip(error, "a")
    assert isinstance(back, RemoteError)
    assert back.type_name == f"builtins:{type(error).__name__}" and back.actor == "a"


def test_errors_of_unknown_types_become_remote_errors() -> None:
    class LocalError(Exception):
        pass

    back = round_trip(LocalError("what"), "a.b")
    assert (
        isinstance(back, RemoteError)
        and str(back) == "test_errors_of_unknown_types_become_remote_errors.<locals>.LocalError: what"
    )
    with pytest.raises(pydantic.ValidationError) as caught:
        Model.model_validate({})
    assert isinstance(round_trip(caught.value), RemoteError)
    assert isinstance(values.decode_error("os:system", "ls", encode([["ls"], {}])), RemoteError)
    assert isinstance(values.decode_error(f"{__name__}:Plain", "ls", encode([["ls"], {}])), RemoteError)
    assert isinstance(values.decode_error("builtins:ValueError", "ls", b"\xc1"), RemoteError)


def test_errors_keep_what_can_travel() -> None:
    class Nasty:
        def __repr__(self) -> str:
            raise RuntimeError

        __str__ = __repr__

    error = ValueError("a", (i for i in ()), Nasty())
    error.kept = 1  # type: ignore[attr-defined]
    error.lost = threading.Lock()  # type: ignore[attr-defined]
    back: Any = round_trip(error)
    assert type(back) is ValueError and back.args[0] == "a" and back.args[1].startswith("<generator")
    assert back.kept == 1 and not hasattr(back, "lost")
    failure = values.encode_error(ValueError(Nasty(), "\ud800"))
    failure.text.encode()
    failure.traceback.encode()


class Options(TypedDict, total=False):
    depth: int


class Reader(Protocol):
    def read(self) -> str: ...


FITS: list[tuple[Any, Any, Any]] = [
    (1, int, 1),
    (True, int, True),
    (1, float, 1),
    (1.5, float, 1.5),
    ("a", str, "a"),
    ([1], list[int], [1]),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([1], set[int], {1}),
    ({"x": 1}, Point, Point(1)),
    (Point(1), Point, Point(1)),
    ({"name": "n"}, Struct, Struct("n")),
    ({"x": 1}, Attr, Attr(1)),
    ({"name": "n"}, Model, Model(name="n")),
    ([{"name": "n"}], list[Model], [Model(name="n")]),
    ([{"x": 1}, Point(2)], list[Point], [Point(1), Point(2)]),
    ({"x": 1}, Point | None, Point(1)),
    (None, Point | None, None),
    ({"name": "s"}, Point | Struct, Struct("s")),
    ("2026-01-02", dt.date, dt.date(2026, 1, 2)),
    ("2026-01-02", dt.date | None, dt.date(2026, 1, 2)),
    ("1.5", Decimal, Decimal("1.5")),
    ("green", Colour, Colour.GREEN),
    ("a", Literal["a", "b"], "a"),
    ({"depth": 1}, Options, {"depth": 1}),
    (5, Annotated[int, "doc"], 5),
    (5, "Unresolved", 5),
    (5, Any, 5),
    (object, Reader, object),
    (Plain(1), Plain, Plain(1)),
    ([Plain(1)], list[Plain], [Plain(1)]),
    (len, collections.abc.Callable[..., int], len),
    ([1], collections.abc.Sequence[int], [1]),
    ({"a": 1}, collections.abc.Mapping[str, int], {"a": 1}),
    (None, None, None),
    ("/tmp", Path, Path("/tmp")),
    ("a", str | int, "a"),
    (1, str | int, 1),
    (1, str | float, 1),
]


@pytest.mark.parametrize(("value", "annotation", "expected"), FITS, ids=label)
def test_check_accepts(value: Any, annotation: Any, expected: Any) -> None:
    result = check(value, annotation, "argument 'x'")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1", int),
        (1, str),
        (None, int),
        ([1, "a"], list[int]),
        ({"y": 1}, Point),
        ({"x": "no"}, Point),
        ({"nme": "n"}, Model),
        ({}, Point | Struct),
        ("blue", Colour),
        ("c", Literal["a", "b"]),
        (1, Plain),
        ([1], list[Plain]),
        (1, collections.abc.Callable[..., int]),
        ("2026-13-01", dt.date),
        (1.5, int | str),
        (1, None),
    ],
    ids=str,
)
def test_check_refuses(value: Any, annotation: Any) -> None:
    with pytest.raises(ArgumentError, match=r"argument 'x' must be .*, not "):
        check(value, annotation, "argument 'x'")


def test_check_says_what_was_expected_and_got() -> None:
    with pytest.raises(ArgumentError, match=r"^argument 'x' must be int, not str 'a'$"):
        check("a", int, "argument 'x'")
    with pytest.raises(ArgumentError, match=r"^argument 'x' must be list\[int\], not list \[1, 'a'\]: .*\[1\]"):
        check([1, "a"], list[int], "argument 'x'")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, None, 1.5, True]}, '{"a":[1,null,1.5,true]}'),
        (Point(1, (2, 3)), '{"x":1,"y":[2,3]}'),
        (Struct("n"), '{"name":"n","parts":[]}'),
        (Model(name="n"), '{"name":"n","when":null}'),
        ([Plain(Model(name="n"))], '[{"a":{"name":"n","when":null},"calls":1}]'),
        (Pair(1, 2), "[1,2]"),
        ({(1, 2): {3: Point(1)}}, '{"(1, 2)":{"3":{"x":1,"y":null}}}'),
        (2**70, "1180591620717411303424"),
        ([2**70, {1}, Point(2**70)], '[1180591620717411303424,[1],{"x":1180591620717411303424,"y":null}]'),
        (Path("/a"), '"/a"'),
        (1 + 2j, '"(1+2j)"'),
        (range(3), "[0,1,2]"),
        (np.arange(3), "[0,1,2]"),
        (np.float64(1.5), "1.5"),
        (dt.date(2026, 1, 2), '"2026-01-02"'),
        (Colour.GREEN, '"green"'),
        ("\ud800", '"\\ud800"'),
        (ValueError("x"), '{"error":"ValueError","message":"x"}'),
        (int, "\"<class 'int'>\""),
        (Text("t"), '"t"'),
    ],
    ids=label,
)
def test_to_json(value: Any, text: str) -> None:
    assert to_json(value).decode() == text


def test_json_of_loops_and_of_nonsense() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="itself"):
        to_json(loop)
    assert from_json(b'{"a":[1,2.5,null]}') == {"a": [1, 2.5, None]}
    for wrong in (b"", b"{", b"\xff", b"[" * 100_000, b"nan"):
        with pytest.raises(MalformedMessageError):
            from_json(wrong)


def test_every_error_of_the_runtime_travels() -> None:
    tree = [errors.NalarError]
    for cls in tree:
        tree.extend(cls.__subclasses__())
        assert classes.shape_of(cls).kind == "exception"
    assert len(tree) > 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: (i for i in range(3)),
        lambda: map(str, [1, 2]),
        lambda: zip("ab", [1, 2], strict=True),
        lambda: iter({"a": 1}),
        lambda: reversed([1, 2]),
        lambda: iter("aé"),
    ],
)
def test_iterators_arrive_as_iterators_over_what_was_left(make: Any) -> None:
    expected, sent = make(), make()
    next(expected)
    next(sent)
    back = decode(encode([sent, 2**70]))[0]
    assert iter(back) is back
    assert list(back) == list(expected)


def test_views_of_dicts_arrive_as_views() -> None:
    plain = {"a": 1, (2,): [3]}
    keys, contents, items = decode(encode((plain.keys(), plain.values(), plain.items())))
    assert keys == plain.keys() and list(items) == list(plain.items())
    assert list(contents) == [1, [3]] and len(contents) == 2
    assert type(keys) is type(plain.keys()) and type(items) is type(plain.items())


def test_an_iterator_that_fails_gives_its_own_error() -> None:
    def fails() -> Any:
        yield 1
        raise OverflowError("mine")

    with pytest.raises(OverflowError, match="mine"):
        encode([fails()])
