"""Python values as bytes and back: typed, exact, and without running any code that the bytes name.

A value is one MessagePack item. What MessagePack has, it is: None, booleans, integers of 64 bits, floats, text, bytes, lists,
and dicts with keys of those. Everything else is an extension item with one of the codes below, whose body is again one
MessagePack item (or raw bytes where it says so), so plain data is written and read in C and costs nothing here.

    code  value                   body
    1     a future without value  raw: its id, 16 bytes
    2     int beyond 64 bits      raw: two's complement, big-endian
    3     str with surrogates     raw: UTF-8 with "surrogatepass"
    4     tuple                   [item, ...]
    5     set                     [item, ...] in the order of their bytes, so that equal sets are equal bytes
    6     frozenset               as 5
    7     dict with other keys    [key, value, key, value, ...]
    8     bytearray               raw
    9     uuid.UUID               raw: 16 bytes
    10    a standard-library      [word, part, ...], the words in `_BUILDERS`
          or numpy value
    11    a class                 "module:qualname"
    12    a function of a module  "module:qualname"
    13    an instance             [class name, part, ...], the parts by the shape of the class (see `nalar_mq.classes`)
    14    an actor                ["module:qualname", part, ...] of a stand-in for unmodified Python (see `nalar_mq.stub`)
    15    an iterator or a view   ["iterator", "keys", "values" or "items", item, ...]: read to its end when it is written

A future inside a value is written as its value where it has one, and managed state as a plain list, dict or value. Sharing is
not kept: an object that stands in two places arrives as two. Nesting is limited to `MAX_DEPTH`, which also ends structures
that contain themselves.
"""

from __future__ import annotations

import datetime as dt
import enum
import itertools
import re
import sys
import traceback as traceback_module
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, Final, NamedTuple, cast

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

from nalar_mq import classes, readings
from nalar_mq.annotations import check, from_json, to_json
from nalar_mq.classes import Deferred
from nalar_mq.errors import (
    CallError,
    MalformedMessageError,
    NalarError,
    RemoteError,
    RemoteTraceback,
    UnknownClassError,
    ValueNotEncodableError,
)
from nalar_mq.syntax import uncollected

__all__ = [
    "MAX_DEPTH",
    "Deferred",
    "Failure",
    "check",
    "decode",
    "decode_arguments",
    "decode_error",
    "encode",
    "encode_arguments",
    "encode_error",
    "from_json",
    "to_json",
]

MAX_DEPTH: Final = 100

_FUTURE: Final = 1
_INT: Final = 2
_TEXT: Final = 3
_TUPLE: Final = 4
_SET: Final = 5
_FROZENSET: Final = 6
_DICT: Final = 7
_BYTEARRAY: Final = 8
_UUID: Final = 9
_BUILT: Final = 10
_CLASS: Final = 11
_FUNCTION: Final = 12
_INSTANCE: Final = 13
_ACTOR: Final = 14
_PIECES: Final = 15

_ID_SIZE: Final = 16
_PATH_SHOWN: Final = 120
_MOST_PIECES: Final = 1_000_000
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_TEXT_ONLY: Final = frozenset({str})
_NOTHING: Final[Mapping[str, object]] = {}
_MANY_BYTES: Final = 2**20  # a buffer that grows would be copied more than once, and no other thread would run meanwhile
_NATIVE_INT: Final = range(-(2**63), 2**64)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.decode


class _MeetsExtensionError(Exception):
    """The bytes are more than plain MessagePack."""


def _meet_extension(code: int, body: memoryview) -> object:
    raise _MeetsExtensionError(code)


_decode_plain: Final = msgspec.msgpack.Decoder(ext_hook=_meet_extension).decode
_decode_plain_arguments: Final = msgspec.msgpack.Decoder(tuple[list[Any], dict[str, Any]], ext_hook=_meet_extension).decode
_PLAIN_SIZE: Final = 1024  # for more bytes an attempt that fails would cost more than it saves


def encode(value: object, deps: list[Deferred] | None = None, what: str = "value") -> bytes:
    """The bytes of `value`.

    Equal plain values give equal bytes. Each `Deferred` without a value is appended to `deps`.

    Raises:
        ValueNotEncodableError: a part of it cannot travel, or is unresolved and `deps` is None; the message begins with
            `what` and the path to the part.
    """
    if type(value) in _SCALARS:
        if type(value) is bytes and _MANY_BYTES < len(value) < 2**32:
            return b"\xc6" + len(value).to_bytes(4, "big") + value
        try:
            return _encode(value)
        except (OverflowError, UnicodeEncodeError):
            pass  # it is written with care below
    known = len(deps) if deps else 0
    writer = _Writer(deps)
    try:
        return _encode(writer.pack(value, 0))
    except (OverflowError, UnicodeEncodeError, _Refused, RecursionError):
        return _encode_carefully(value, writer, known, what)


def encode_arguments(
    args: Sequence[object], kwargs: Mapping[str, object], deps: list[Deferred] | None = None, names: Sequence[str] = ()
) -> bytes:
    """The bytes of `[args, kwargs]`; `names` are those of the positional parameters, for messages only.

    Raises:
        ValueNotEncodableError: as in `encode`, with the name of the argument.
    """
    if not kwargs and _SCALARS.issuperset(map(type, args)):
        try:
            return _encode((args, _NOTHING))
        except (OverflowError, UnicodeEncodeError):
            pass  # they are written with care below
    value = [list(args), dict(kwargs)]
    known = len(deps) if deps else 0
    writer = _Writer(deps)
    try:
        return _encode(writer.pack(value, 0))
    except (OverflowError, UnicodeEncodeError, _Refused, RecursionError):
        labels = [*names[: len(args)], *(str(number) for number in range(len(names) + 1, len(args) + 1))]
        return _encode_carefully(value, writer, known, "arguments", [*labels, *kwargs])


def decode(data: bytes, resolve: Callable[[bytes], object] | None = None) -> Any:
    """The value that `encode` made `data` of; `resolve` gives what stands in the place of an unresolved future.

    Raises:
        UnknownClassError: a part is of a class that this process has not loaded.
        MalformedMessageError: the bytes are not a value, or hold a future and `resolve` is None.
    """
    if resolve is None and len(data) <= _PLAIN_SIZE:
        try:
            return _decode_plain(data)
        except Exception:
            pass  # the attempt below says what is wrong with it
    reader = _Reader(resolve)
    try:
        return _decode(data, ext_hook=reader.read_extension)
    except NalarError:
        raise
    except Exception as error:
        if error is reader.failure:
            raise
        raise MalformedMessageError(f"not a value: {error}") from None


def decode_arguments(data: bytes, resolve: Callable[[bytes], object] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """What `encode_arguments` was given; also read from plain MessagePack `[[...], {...}]`.

    Raises:
        UnknownClassError, MalformedMessageError: as in `decode`.
    """
    if resolve is None and len(data) <= _PLAIN_SIZE:
        try:
            return _decode_plain_arguments(data)
        except Exception:
            pass  # as in `decode`
    value = decode(data, resolve)
    if value.__class__ is list and len(value) == 2:
        args, kwargs = value
        if args.__class__ is list and kwargs.__class__ is dict and _TEXT_ONLY.issuperset(map(type, kwargs)):
            return args, kwargs
    raise MalformedMessageError("arguments are not a list and a map of names")


def _encode_carefully(value: Any, failed: _Writer, known: int, what: str, labels: Sequence[str] = ()) -> bytes:
    """Second attempt, after the writer that lets scalars pass unseen has failed; it had `known` deps when it began."""
    deps = failed.deps
    if deps is not None:
        del deps[known:]
    writer = _CarefulWriter(deps)
    writer.drained = failed.drained
    try:
        return _encode(writer.pack(value, 0))
    except (_Refused, RecursionError):
        if not labels:
            raise ValueNotEncodableError(_blame(value, what, deps is not None)) from None
        parts = zip(labels, [*value[0], *value[1].values()], strict=True)
        refused = ((f"argument {label!r}", part) for label, part in parts if _refusal(part, deps is not None))
        what, part = next(refused, (what, value))
        raise ValueNotEncodableError(_blame(part, what, deps is not None)) from None


def _drained(iterator: Any) -> list[Any] | Exception:
    """What an iterator still gives, or the error it ends with."""
    try:
        return list(itertools.islice(iterator, _MOST_PIECES + 1))
    except Exception as error:
        return error


class _Refused(Exception):
    """A part cannot travel; the text says what it is."""


class _Writer:
    """Turns a value into one that msgspec writes as it is.

    Scalars pass unseen: integers beyond 64 bits and text with surrogates are rare, fail in msgspec, and are then written by
    a `_CarefulWriter`.
    """

    __slots__ = ("deps", "drained")

    def __init__(self, deps: list[Deferred] | None) -> None:
        self.deps = deps
        self.drained: dict[int, tuple[object, list[Any] | Exception]] = {}

    def scalar(self, value: Any) -> Any:
        return value

    def all_native(self, values: Iterable[Any]) -> bool:
        return _SCALARS.issuperset(map(type, values))

    def pack(self, value: object, depth: int) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return self.scalar(value)
        if depth > MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH} levels, or containing itself")
        packer = _PACKERS.get(kind)
        if packer is not None:
            return packer(self, value, depth + 1)
        if isinstance(value, Deferred):
            return self.pack_deferred(value)
        return self.pack_rare(value, depth + 1)

    def items(self, values: Iterable[Any], depth: int) -> list[Any]:
        pack = self.pack
        return [pack(value, depth) for value in values]

    def pack_list(self, value: list[Any], depth: int) -> Any:
        return value if self.all_native(value) else self.items(value, depth)

    def pack_tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        return Ext(_TUPLE, _encode(value if self.all_native(value) else self.items(value, depth)))

    def pack_set(self, value: set[Any] | frozenset[Any], depth: int) -> Any:
        code = _SET if isinstance(value, set) else _FROZENSET
        return Ext(code, _encode([Raw(item) for item in sorted(_encode(item) for item in self.items(value, depth))]))

    def pack_dict(self, value: dict[Any, Any], depth: int) -> Any:
        if not self.all_native(value):
            return Ext(_DICT, _encode(self.flat(value, depth)))
        if self.all_native(value.values()):
            return value
        pack = self.pack
        return {key: pack(item, depth) for key, item in value.items()}

    def flat(self, value: dict[Any, Any], depth: int) -> list[Any]:
        return self.items((part for pair in value.items() for part in pair), depth)

    def built(self, word: str, parts: Iterable[Any], depth: int) -> Ext:
        return Ext(_BUILT, _encode([word, *self.items(parts, depth)]))

    def pack_deferred(self, value: Deferred) -> Any:
        payload = value.payload()
        if payload is not None:
            return Raw(payload)
        if self.deps is None:
            raise _Refused("a future that has no value yet")
        self.deps.append(value)
        return Ext(_FUTURE, value.ref())

    def pack_iterator(self, value: Any, depth: int) -> Any:
        """An iterator can be read once only, so what it gave is kept for a second attempt."""
        if id(value) not in self.drained:
            self.drained[id(value)] = (value, _drained(value))
        pieces = self.drained[id(value)][1]
        if isinstance(pieces, Exception):
            raise pieces
        if len(pieces) > _MOST_PIECES:
            raise _Refused(f"an iterator that gives more than {_MOST_PIECES:,} values")
        return Ext(_PIECES, _encode(["iterator", *self.items(pieces, depth)]))

    def pack_rare(self, value: Any, depth: int) -> Any:
        plain = getattr(classes.class_of(value), "__nalar_plain__", None)
        if plain is not None:
            return self.pack(plain(value), depth)
        if readings.is_lent(value):
            packer = _PACKERS.get(readings.class_of(value))
            return packer(self, value, depth) if packer is not None else self.pack_instance(value, depth)
        reference = _reference_of(value)
        if reference is not None:
            return Ext(_ACTOR, _encode(reference))
        if isinstance(value, type):
            return Ext(_CLASS, _name(value))
        if isinstance(value, types.FunctionType):
            return Ext(_FUNCTION, _name(value))
        if isinstance(value, re.Pattern):
            return self.built("pattern", _pattern_parts(value), depth)
        if type(value).__module__.partition(".")[0] == "numpy":
            return self.pack_numpy(value, depth)
        return self.pack_instance(value, depth)

    def pack_numpy(self, value: Any, depth: int) -> Any:
        numpy: Any = sys.modules["numpy"]
        if type(value) is numpy.ndarray and not value.dtype.hasobject:
            descr = numpy.lib.format.dtype_to_descr(value.dtype)
            return self.built("array", (descr, value.shape, value.tobytes()), depth)
        if isinstance(value, numpy.generic) and not value.dtype.hasobject:
            return self.built("array scalar", (numpy.lib.format.dtype_to_descr(value.dtype), value.tobytes()), depth)
        raise _Refused(_describe(value))

    def pack_instance(self, value: Any, depth: int) -> Any:
        shape = classes.shape_of(readings.class_of(value))
        parts = _PARTS.get(shape.kind)
        if parts is None:
            raise _Refused(_describe(value))
        return Ext(_INSTANCE, _encode([shape.name, *self.items(parts(value, shape), depth)]))


def _reference_of(value: Any) -> tuple[Any, ...] | None:
    """What a stand-in for an actor, or the actor it stands for, travels as."""
    kind = classes.class_of(value)
    actor: Any
    tell = getattr(kind, "__nalar_reference__", None)
    if tell is not None:
        return cast("tuple[Any, ...]", tell(value))
    if kind is types.FunctionType or isinstance(value, type):
        original, actor = vars(value).get("__nalar_stand_in__", (None, None))
        return cast("tuple[Any, ...]", classes.class_of(actor).__nalar_reference__(actor)) if original is value else None
    original, actor = getattr(kind, "__nalar_stand_in__", (None, None))
    if original is not kind:
        return None
    reference = actor.__nalar_reference_of__(value)
    if reference is None:
        raise _Refused(f"an instance of the agent class {classes.name_of(kind)} that was not made in a workflow")
    return cast("tuple[Any, ...]", reference)


class _CarefulWriter(_Writer):
    __slots__ = ()

    def scalar(self, value: Any) -> Any:
        if type(value) is int and value not in _NATIVE_INT:
            return Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
        if type(value) is str and not _is_utf8(value):
            return Ext(_TEXT, value.encode("utf-8", "surrogatepass"))
        return value

    def all_native(self, values: Iterable[Any]) -> bool:
        return all(type(value) in _SCALARS and self.scalar(value) is value for value in values)


class _Judge(_CarefulWriter):
    """Finds out what cannot travel; leaves iterators as they are."""

    __slots__ = ()

    def pack_iterator(self, value: Any, depth: int) -> Any:
        raise _Refused(_describe(value))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(thing: Any) -> bytes:
    if not classes.is_importable(thing):
        raise _Refused(_describe(thing))
    return _encode(classes.name_of(thing))


def _zone_parts(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        return zone.key
    if type(zone) is dt.timezone:
        return _timezone_parts(zone)
    raise _Refused(f"time zone of type {type(zone).__qualname__}")


def _timezone_parts(zone: Any) -> tuple[Any, ...]:
    parts: tuple[Any, ...] = zone.__getinitargs__()
    return parts


def _pattern_parts(pattern: Any) -> tuple[Any, ...]:
    return (pattern.pattern, pattern.flags)


def _range_parts(value: Any) -> tuple[Any, ...]:
    return (value.start, value.stop, value.step)


def _decimal_parts(value: Any) -> tuple[str]:
    return (str(value),)


def _deque_parts(value: Any) -> tuple[Any, ...]:
    return (list(value), value.maxlen)


def _namespace_parts(value: object) -> tuple[dict[str, Any]]:
    return (dict(vars(value)),)


def _one_zone(zone: Any) -> tuple[Any]:
    return (_zone_parts(zone),)


def _pack_datetime(writer: _Writer, value: dt.datetime, depth: int) -> Any:
    clock = (value.hour, value.minute, value.second, value.microsecond, value.fold)
    return writer.built("datetime", (value.year, value.month, value.day, *clock, _zone_parts(value.tzinfo)), depth)


def _pack_time(writer: _Writer, value: dt.time, depth: int) -> Any:
    clock = (value.hour, value.minute, value.second, value.microsecond, value.fold)
    return writer.built("time", (*clock, _zone_parts(value.tzinfo)), depth)


def _word(word: str, parts: Callable[[Any], Iterable[Any]]) -> Callable[[_Writer, Any, int], Any]:
    return lambda writer, value, depth: writer.built(word, parts(value), depth)


def _pack_ordered(word: str) -> Callable[[_Writer, Any, int], Any]:
    return lambda writer, value, depth: Ext(_BUILT, _encode([word, *writer.flat(value, depth)]))


def _pack_defaultdict(writer: _Writer, value: Any, depth: int) -> Any:
    factory = value.default_factory
    if factory is not None and not isinstance(factory, type):
        raise _Refused(f"defaultdict whose factory is a {_describe(factory)}")
    return Ext(_BUILT, _encode(["defaultdict", writer.pack(cast("object", factory), depth), *writer.flat(value, depth)]))


def _pack_iterator(writer: _Writer, value: Any, depth: int) -> Any:
    return writer.pack_iterator(value, depth)


def _pack_view(word: str) -> Callable[[_Writer, Any, int], Any]:
    return lambda writer, value, depth: Ext(_PIECES, _encode([word, *writer.items(value, depth)]))


def _pack_raw(code: int, read: Callable[[Any], bytes]) -> Callable[[_Writer, Any, int], Any]:
    return lambda _writer, value, _depth: Ext(code, read(value))


_PATHS: Final[Mapping[str, type[PurePath]]] = types.MappingProxyType(
    {cls.__name__: cls for cls in (PosixPath, PurePosixPath, WindowsPath, PureWindowsPath)}
)

_EMPTY: Final[dict[Any, Any]] = {}
_VIEWS: Final[Mapping[str, Any]] = types.MappingProxyType(
    {"keys": _EMPTY.keys(), "values": _EMPTY.values(), "items": _EMPTY.items()}
)
_SOURCES: Final[Sequence[Any]] = (*_VIEWS.values(), list[Any](), (), set[Any](), deque[Any](), "", "é", b"", range(0))
_REVERSIBLE: Final[Sequence[Any]] = (*_VIEWS.values(), list[Any]())
_ITERATORS: Final[tuple[type, ...]] = (
    types.GeneratorType,
    *(map, filter, zip, enumerate, reversed),
    *(classes.class_of(iter(source)) for source in _SOURCES),
    *(classes.class_of(reversed(source)) for source in _REVERSIBLE),
)

_PACKERS: Final[Mapping[type, Callable[[_Writer, Any, int], Any]]] = {
    list: _Writer.pack_list,
    tuple: _Writer.pack_tuple,
    dict: _Writer.pack_dict,
    set: _Writer.pack_set,
    frozenset: _Writer.pack_set,
    bytearray: _pack_raw(_BYTEARRAY, bytes),
    uuid.UUID: _pack_raw(_UUID, lambda value: value.bytes),
    complex: _word("complex", lambda value: (value.real, value.imag)),
    dt.datetime: _pack_datetime,
    dt.time: _pack_time,
    dt.date: _word("date", lambda value: (value.year, value.month, value.day)),
    dt.timedelta: _word("timedelta", lambda value: (value.days, value.seconds, value.microseconds)),
    dt.timezone: _word("timezone", _timezone_parts),
    zoneinfo.ZoneInfo: _word("zone", _one_zone),
    Decimal: _word("decimal", _decimal_parts),
    Fraction: _word("fraction", lambda value: (value.numerator, value.denominator)),
    range: _word("range", _range_parts),
    slice: _word("slice", _range_parts),
    type(...): _word("ellipsis", lambda _value: ()),
    deque: _word("deque", _deque_parts),
    OrderedDict: _pack_ordered("ordered dict"),
    Counter: _pack_ordered("counter"),
    defaultdict: _pack_defaultdict,
    types.SimpleNamespace: _word("namespace", _namespace_parts),
    **{classes.class_of(view): _pack_view(word) for word, view in _VIEWS.items()},
    **dict.fromkeys(_ITERATORS, _pack_iterator),
    **{cls: _word("path", lambda value: (type(value).__name__, str(value))) for cls in _PATHS.values()},
}


def _object_parts(value: Any, shape: classes.Shape) -> Iterable[Any]:
    return (classes.state_of(value, shape),)


def _struct_parts(value: Any, _shape: classes.Shape) -> Iterable[Any]:
    names: tuple[str, ...] = value.__struct_fields__
    return ({name: getattr(value, name) for name in names},)


def _model_parts(value: Any, shape: classes.Shape) -> Iterable[Any]:
    slots = classes.state_of(value, shape)
    slots.pop("__dict__", None)
    fields = dict(value.__dict__)
    rest = {name: item for name, item in slots.items() if name not in fields and name.startswith("__pydantic_")}
    return (fields, rest)


def _enum_parts(value: Any, _shape: classes.Shape) -> Iterable[Any]:
    members: Mapping[str, Any] = value.__class__.__members__
    named = value.name is not None and value.name in members
    return (value.name,) if named else (None, value.value)


_PARTS: Final[Mapping[str, Callable[[Any, classes.Shape], Iterable[Any]]]] = {
    "object": _object_parts,
    "subclass": classes.split_subclass,
    "struct": _struct_parts,
    "model": _model_parts,
    "enum": _enum_parts,
    "exception": classes.split_exception,
}


class _Reader:
    """Reads the extension items of one value."""

    __slots__ = ("depth", "failure", "resolve")

    def __init__(self, resolve: Callable[[bytes], object] | None) -> None:
        self.resolve = resolve
        self.depth = 0
        self.failure: Exception | None = None

    def read_extension(self, code: int, body: memoryview) -> Any:
        unpack = _UNPACKERS.get(code)
        if unpack is None:
            raise MalformedMessageError(f"extension {code} is unknown")
        if self.depth > 2 * MAX_DEPTH:
            raise MalformedMessageError("a value is nested too deeply")
        self.depth += 1
        try:
            return unpack(self, body)
        finally:
            self.depth -= 1

    def item(self, body: memoryview) -> Any:
        return _decode(body, ext_hook=self.read_extension)

    def list(self, body: memoryview) -> list[Any]:
        items: Any = _decode(body, ext_hook=self.read_extension)
        if items.__class__ is not list:
            raise MalformedMessageError("the body of an extension is not an array")
        return items

    def future(self, body: memoryview) -> Any:
        if self.resolve is None or len(body) != _ID_SIZE:
            raise MalformedMessageError("a future stands where none is expected")
        try:
            return self.resolve(bytes(body))
        except Exception as error:
            self.failure = error
            raise

    def dict(self, body: memoryview) -> dict[Any, Any]:
        return _pairs(self.list(body))

    def built(self, body: memoryview) -> Any:
        word, *parts = self.list(body)
        build = _BUILDERS.get(word)
        if build is None:
            raise MalformedMessageError(f"no value is called {word!r}")
        return build(*parts)

    def cls(self, body: memoryview) -> type:
        return classes.find_class(self.item(body))

    def function(self, body: memoryview) -> Any:
        name = self.item(body)
        found = classes.find(name)
        if not isinstance(found, types.FunctionType):
            raise UnknownClassError(name)
        return found

    def instance(self, body: memoryview) -> Any:
        name, *parts = self.list(body)
        cls = classes.find_class(name)
        shape = classes.shape_of(cls)
        restore = _RESTORERS.get(shape.kind)
        if restore is None:
            raise UnknownClassError(name)
        return restore(cls, shape, *parts)

    def actor(self, body: memoryview) -> Any:
        name, *parts = self.list(body)
        found = classes.find(name)
        original, actor = getattr(found, "__nalar_stand_in__", (None, None))
        stand_in: Any = actor if original is found else found
        restore = getattr(classes.class_of(stand_in), "__nalar_referred__", None)
        if restore is None:
            raise UnknownClassError(name)
        return restore(stand_in, *parts)

    def pieces(self, body: memoryview) -> Any:
        word, *items = self.list(body)
        gather = _GATHERERS.get(word)
        if gather is None:
            raise MalformedMessageError(f"no iterator is called {word!r}")
        return gather(items)


_UNPACKERS: Final[Mapping[int, Callable[[_Reader, memoryview], Any]]] = {
    _FUTURE: _Reader.future,
    _INT: lambda _reader, body: int.from_bytes(body, "big", signed=True),
    _TEXT: lambda _reader, body: bytes(body).decode("utf-8", "surrogatepass"),
    _TUPLE: lambda reader, body: tuple(reader.list(body)),
    _SET: lambda reader, body: set(reader.list(body)),
    _FROZENSET: lambda reader, body: frozenset(reader.list(body)),
    _DICT: _Reader.dict,
    _BYTEARRAY: lambda _reader, body: bytearray(body),
    _UUID: lambda _reader, body: uuid.UUID(bytes=bytes(body)),
    _BUILT: _Reader.built,
    _CLASS: _Reader.cls,
    _FUNCTION: _Reader.function,
    _INSTANCE: _Reader.instance,
    _ACTOR: _Reader.actor,
    _PIECES: _Reader.pieces,
}

_GATHERERS: Final[Mapping[str, Callable[[list[Any]], Any]]] = {
    "iterator": iter,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "items": lambda items: dict(items).items(),
}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise MalformedMessageError("a key has no value")
    return dict(zip(items[::2], items[1::2], strict=True))


def _zone(parts: Any) -> dt.tzinfo | None:
    if parts is None:
        return None
    if isinstance(parts, str):
        return zoneinfo.ZoneInfo(parts)
    return _timezone(*parts)


def _timezone(offset: dt.timedelta, *name: str) -> dt.timezone:
    return dt.timezone(offset, *name) if name or offset else dt.UTC


def _datetime(*parts: Any) -> dt.datetime:
    *clock, fold, zone = parts
    return dt.datetime(*clock, fold=fold).replace(tzinfo=_zone(zone))


def _time(*parts: Any) -> dt.time:
    *clock, fold, zone = parts
    return dt.time(*clock, fold=fold).replace(tzinfo=_zone(zone))


def _timedelta(days: int, seconds: int, microseconds: int) -> dt.timedelta:
    return dt.timedelta(days, seconds, microseconds)


def _ordered_dict(*items: Any) -> Any:
    return OrderedDict(_pairs(list(items)))


def _deque(items: Any, maxlen: int | None) -> Any:
    return deque(cast("list[Any]", items), maxlen)


def _namespace(state: dict[str, Any]) -> Any:
    return types.SimpleNamespace(**state)


def _path(kind: str, text: str) -> PurePath:
    return _PATHS[kind](text)


def _ellipsis() -> Any:
    return ...


def _defaultdict(factory: Any, *items: Any) -> Any:
    if factory is not None and not isinstance(factory, type):
        raise MalformedMessageError("the factory of a defaultdict is not a class")
    return defaultdict(cast("Any", factory), _pairs(list(items)))


def _counter(*items: Any) -> Any:
    counter: Counter[Any] = Counter()
    dict[Any, Any].update(counter, _pairs(list(items)))
    return counter


def _array(descr: Any, shape: Any, data: bytes) -> Any:
    import numpy as np

    numpy: Any = np
    dtype = numpy.lib.format.descr_to_dtype(descr)
    if dtype.hasobject:
        raise MalformedMessageError("an array of objects cannot travel")
    if not data:
        return numpy.zeros(shape if 0 in shape else 0, dtype).reshape(shape)
    return numpy.frombuffer(data, dtype).reshape(shape).copy()


def _array_scalar(descr: Any, data: bytes) -> Any:
    return _array(descr, (1,), data)[0]


_BUILDERS: Final[Mapping[str, Callable[..., Any]]] = {
    "complex": complex,
    "datetime": _datetime,
    "time": _time,
    "date": dt.date,
    "timedelta": _timedelta,
    "timezone": _timezone,
    "zone": _zone,
    "decimal": Decimal,
    "fraction": Fraction,
    "range": range,
    "slice": slice,
    "ellipsis": _ellipsis,
    "deque": _deque,
    "ordered dict": _ordered_dict,
    "counter": _counter,
    "defaultdict": _defaultdict,
    "namespace": _namespace,
    "path": _path,
    "pattern": cast("Any", re.compile),
    "array": _array,
    "array scalar": _array_scalar,
}


def _restore_struct(cls: Any, _shape: classes.Shape, fields: dict[str, Any]) -> object:
    return cls(**fields)


def _restore_model(cls: Any, _shape: classes.Shape, fields: dict[str, Any], rest: dict[str, Any]) -> object:
    value = cls.__new__(cls)
    object.__setattr__(value, "__dict__", fields)
    for name, item in rest.items():
        if not name.startswith("__pydantic_"):
            raise MalformedMessageError(f"{name!r} is not a part of a model")
        object.__setattr__(value, name, item)
    return value


def _restore_enum(cls: Any, _shape: classes.Shape, name: str | None, *value: Any) -> object:
    if name is not None:
        return cls.__members__[name]
    if not issubclass(cls, enum.Flag) or type(value[0]) is not int:
        raise MalformedMessageError("a member of an enumeration has no name")
    return cls(value[0])


def _restore_exception(cls: type, shape: classes.Shape, args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    return classes.restore_exception(cls, shape, tuple(args), state)


_RESTORERS: Final[Mapping[str, Callable[..., Any]]] = {
    "object": classes.restore_object,
    "subclass": classes.restore_subclass,
    "struct": _restore_struct,
    "model": _restore_model,
    "enum": _restore_enum,
    "exception": _restore_exception,
}


def _describe(value: Any) -> str:
    """What a value that cannot travel is, in the words of a user."""
    if isinstance(value, types.FunctionType):
        return "lambda" if value.__name__ == "<lambda>" else f"local function {value.__qualname__}"
    if isinstance(value, type):
        return f"class {classes.name_of(value)}, which cannot be found by its name"
    cls = classes.class_of(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"instance of {classes.shape_of(cls).name}"


def _refusal(value: object, may_defer: bool) -> str | None:
    """Why a value cannot travel, with futures in it if it `may_defer`, or None if it can."""
    try:
        _encode(_Judge([] if may_defer else None).pack(value, 0))
    except _Refused as refused:
        return str(refused)
    except RecursionError:
        return "nested too deeply"
    return None


def _blame(value: object, what: str, may_defer: bool) -> str:
    """What cannot travel, and the path to its first such part: `...: what -> ['a'][3]: generator`."""
    path = ""
    refusal = _refusal(value, may_defer) or ""
    while len(path) < _PATH_SHOWN:
        culprit = next((found for found in _parts_of(value) if _refusal(found[1], may_defer)), None)
        if culprit is None:
            break
        path, value = path + culprit[0], culprit[1]
        refusal = _refusal(value, may_defer) or refusal
    place = f"{what} -> {path[:_PATH_SHOWN]}" if path else what
    return f"cannot travel between processes: {place}: {refusal}"


def _parts_of(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        items: Any = cast("Any", value).items()
        return [*((f"[{key!r}]", item) for key, item in items), *((f"[key {key!r}]", key) for key, _ in items)]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{number}]", item) for number, item in enumerate(cast("Iterable[Any]", value))]
    if isinstance(value, (set, frozenset)):
        return [("{...}", item) for item in cast("set[Any]", value)]
    if hasattr(value, "__struct_fields__"):
        return [(f".{name}", getattr(value, name)) for name in value.__struct_fields__]
    shape = classes.shape_of(classes.class_of(value))
    if shape.kind == "refused":
        return []
    return [(f".{name}", item) for name, item in classes.state_of(value, shape).items()]


_TRACEBACK_SHOWN: Final = 16_384
_TEXT_SHOWN: Final = 4_096


class Failure(NamedTuple):
    """An exception as the fields of a `Fail` message, in their order."""

    kind: str
    text: str
    payload: bytes
    traceback: str


def encode_error(error: BaseException) -> Failure:
    """The fields of a `Fail` for `error`. Never raises: what cannot travel of its args and attributes becomes text."""
    text = _safe_text(error)
    lines = _safe_text(error, _format, -_TRACEBACK_SHOWN)
    cls = classes.class_of(error)
    shape = classes.shape_of(cls)
    if shape.kind != "exception":
        return Failure(classes.name_of(cls), text, b"", lines)
    args, state = classes.split_exception(error, shape)
    state.pop("__notes__", None)
    kept = {name: item for name, item in state.items() if _refusal(item, False) is None}
    payload = encode([[arg if _refusal(arg, False) is None else _safe_text(arg, repr) for arg in args], kept])
    return Failure(shape.name, text, payload, lines)


def decode_error(
    kind: str,
    text: str,
    payload: bytes,
    traceback: str = "",
    call_id: str = "",
    actor: str = "",
    path: tuple[str, ...] = (),
) -> Exception:
    """The exception that `encode_error` was given, of the same type where this process has it loaded, else `RemoteError`.

    Its `__cause__` is a `RemoteTraceback`. Never raises.
    """
    error = _restore_error(kind, payload) or RemoteError(_remote_text(kind, text), type_name=kind)
    if isinstance(error, CallError):
        error.call_id = getattr(error, "call_id", "") or call_id
        error.actor = getattr(error, "actor", "") or actor
    if traceback:
        error.__cause__ = RemoteTraceback(traceback, call_id, actor, path)
    return error


def _restore_error(kind: str, payload: bytes) -> Exception | None:
    if not payload:
        return None
    try:
        args, state = decode(payload)
        cls = classes.find_class(kind)
        shape = classes.shape_of(cls)
        return classes.restore_exception(cls, shape, tuple(args), state) if shape.kind == "exception" else None
    except Exception:
        return None


def _remote_text(kind: str, text: str) -> str:
    name = kind.rpartition(":")[2]
    return f"{name}: {text}" if text else name


def _format(error: Any) -> str:
    with uncollected():
        return "".join(traceback_module.format_exception(error))


def _safe_text(value: object, show: Callable[[object], str] = str, size: int = _TEXT_SHOWN) -> str:
    """`show(value)`, cut to its first or last characters and fit for the wire, even if its class fails to show it."""
    try:
        text = show(value)
    except Exception:
        text = f"<{classes.class_of(value).__qualname__}>"
    shown = text[:size] if size > 0 else text[size:]
    return shown.encode("utf-8", "backslashreplace").decode()
