"""What is read from an attribute of an agent that lives in a worker: a copy, which can be read and refuses to be changed.

In plain Python `shelf.books.append(x)` changes the shelf; of a copy, the change would be lost without a word. So what is read
is of a class made here, derived from the one it had, whose mutators raise `CopyChangedError`:

    list, dict, set, bytearray, deque,     an equal one, whose methods and operators that change it refuse
    OrderedDict, defaultdict, Counter
    an object of a user's class            itself; its attributes, and its items if it has any, cannot be set or deleted
    a numpy array                          itself, set to be read only
    what can hold none of these            itself

That goes for everything inside, and for whoever has it, under whatever name. `isinstance`, `==`, `repr` and `__class__` say
what they would say of the original; so does `type(x)` in rewritten code (`class_of`). Copies made of it (`list(x)`, `x[:]`,
`x + y`, `copy.copy`, `type(x)(...)`) are plain ones, in which what was inside still refuses, as it would still be the agent's.
It travels as what it is a copy of.

Not noticed is what goes around the methods of an object: `object.__setattr__`, its `__dict__`, a method of its own that calls
`super().append`, and C code that writes into lists, of which `heapq` is noticed in rewritten code.
Exceptions, members of enumerations and objects of classes that do not let themselves be derived from stay as they are.
"""

# What is read is of any type whatever.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import contextlib
import enum
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, Final

import msgspec

from nalar_mq.errors import CopyChangedError

_ITEMS: Final = ("__setitem__", "__delitem__", "clear", "pop")
_SEQUENCE: Final = (*_ITEMS, "__iadd__", "__imul__", "append", "extend", "insert", "remove", "reverse")
_MAPPING: Final = (*_ITEMS, "__ior__", "popitem", "setdefault", "update")
_MUTATORS: Final[dict[type, tuple[str, ...]]] = {
    list: (*_SEQUENCE, "sort"),
    deque: (*_SEQUENCE, "appendleft", "extendleft", "popleft", "rotate"),
    bytearray: _SEQUENCE,
    dict: _MAPPING,
    OrderedDict: (*_MAPPING, "move_to_end"),
    defaultdict: (*_MAPPING, "__missing__"),
    Counter: (*_MAPPING, "subtract", "__iadd__", "__isub__", "__iand__"),
    set: (
        *("__iand__", "__ior__", "__isub__", "__ixor__", "add", "clear", "difference_update", "discard", "intersection_update"),
        *("pop", "remove", "symmetric_difference_update", "update"),
    ),
}
_LEAVES: Final = frozenset({type(None), bool, int, float, complex, str, bytes, range, slice, type(...)})
_PATHS: Final = frozenset({PurePath, PurePosixPath, PureWindowsPath, type(Path())})  # they note in themselves what they compute
_ORIGINAL: Final = "__nalar_original__"


def lent(x: Any) -> Any:
    """`x`, which nobody else has, as it is given to whoever reads it from an agent."""
    kind = type(x)
    if kind in _LEAVES:
        return x
    copy = _COPIES.get(kind)
    if copy is not None:
        return copy(x)
    if isinstance(x, (BaseException, enum.Enum, type)) or kind in _PATHS or hasattr(kind, "__nalar_reference__"):
        return x
    if isinstance(x, tuple):
        return _lent_tuple(x)
    if kind is frozenset:
        return frozenset(map(lent, x))
    if kind.__module__ == "numpy" and hasattr(x, "setflags"):
        x.setflags(write=False)
        return x
    return _lent_object(x) if kind.__flags__ & _HEAP_TYPE else x


def class_of(x: Any) -> type[Any]:
    """The class `x` had before it was read."""
    kind = type(x)
    original: type[Any] = kind.__dict__.get(_ORIGINAL, kind)
    return original


def is_lent(x: Any) -> bool:
    """True for what was read from an agent, if it could be changed."""
    return _ORIGINAL in type(x).__dict__


def refuse_change(f: Any, args: tuple[Any, ...]) -> None:
    """Raises if the function `f` of C code would change what was read, past its methods.

    Raises:
        CopyChangedError: it would.
    """
    if args and is_lent(args[0]) and getattr(f, "__module__", "") == "_heapq":
        raise _error(args[0])


_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _error(x: Any) -> CopyChangedError:
    name = class_of(x).__qualname__
    return CopyChangedError(
        f"this {name} was read from an attribute of an agent, so it is a copy, and what is changed in it would be lost: "
        f"change it in a method of the agent, or make a copy of your own"
    )


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise _error(self)


# Containers, which are made again: an object cannot leave the class of a builtin container.


def _copied(kind: Any, fill: Callable[[Any, Any], object]) -> Callable[[Any], Any]:
    def copy(x: Any) -> Any:
        made: Any = kind.__new__(_lending(kind))
        fill(made, x)
        return made

    return copy


def _pairs(x: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    return ((lent(key), lent(item)) for key, item in x.items())


def _fill_ordered(made: Any, x: Any) -> None:
    for key, item in _pairs(x):
        OrderedDict.__setitem__(made, key, item)


def _fill_default(made: Any, x: Any) -> None:
    defaultdict.__init__(made, x.default_factory)
    dict.update(made, _pairs(x))


_COPIES: Final[dict[type, Callable[[Any], Any]]] = {
    list: _copied(list, lambda made, x: list.extend(made, map(lent, x))),
    deque: _copied(deque, lambda made, x: deque.__init__(made, map(lent, x), x.maxlen)),
    bytearray: _copied(bytearray, bytearray.__init__),
    set: _copied(set, lambda made, x: set.update(made, map(lent, x))),
    dict: _copied(dict, lambda made, x: dict.update(made, _pairs(x))),
    Counter: _copied(Counter, lambda made, x: dict.update(made, _pairs(x))),
    OrderedDict: _copied(OrderedDict, _fill_ordered),
    defaultdict: _copied(defaultdict, _fill_default),
}


def _lent_tuple(x: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [lent(part) for part in tuple.__iter__(x)]
    same = all(new is old for new, old in zip(parts, tuple.__iter__(x), strict=True))
    return x if same else tuple.__new__(type(x), parts)


# Objects, which change their class.


def _lent_object(x: Any) -> Any:
    attributes: Any = getattr(x, "__dict__", {})
    for name, item in list(attributes.items()):
        attributes[name] = lent(item)
    for cls in type(x).__mro__[:-1]:
        for member in vars(cls).values():
            if isinstance(member, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError, TypeError):  # it has no value; it cannot be set
                    member.__set__(x, lent(member.__get__(x)))
    _lend_items(x)
    with contextlib.suppress(TypeError):  # as of a class whose objects have another layout
        _CLASS.__set__(x, _lending(type(x)))
    return x


def _lend_items(x: Any) -> None:
    """What stands in an object that is also a container."""
    if isinstance(x, list):
        list.__setitem__(x, slice(None), [lent(item) for item in list.__iter__(x)])
    elif isinstance(x, dict):
        for key, item in list(dict.items(x)):
            dict.__setitem__(x, key, lent(item))


_CLASS: Final[Any] = object.__dict__["__class__"]

_made: Final[weakref.WeakKeyDictionary[type, type[Any]]] = weakref.WeakKeyDictionary()


def _lending(kind: type[Any]) -> type[Any]:
    """The class of what is read as a `kind`; `kind` itself if none can be made."""
    made = _made.get(kind)
    if made is None:
        made = _made[kind] = _derived(kind)
    return made


class _Unseen:
    """A class that derives from this one before a class of the user's does not tell that one of itself."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _derived(kind: type[Any]) -> type[Any]:
    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__class__": property(lambda self: kind),
        "__reduce_ex__": _reduce,
        _ORIGINAL: kind,
    }
    if issubclass(kind, msgspec.Struct):
        body.update(_of_struct(kind))
    else:  # structs may not define these two
        body["__slots__"] = ()
        body["__new__"] = lambda cls, *args, **kwargs: kind.__new__(kind, *args, **kwargs)
    base = next((cls for cls in kind.__mro__ if cls in _MUTATORS), None)
    if base is not kind:
        body.update(dict.fromkeys(("__setattr__", "__delattr__"), _refuse))
    if kind is set:
        body["__repr__"] = lambda self: repr(set(self))  # without the name of its class
    refused = _MUTATORS[base] if base is not None else [name for name in _IN_PLACE if hasattr(kind, name)]
    body.update(dict.fromkeys(refused, _refuse))
    calls_original = {"__call__": lambda cls, *args, **kwargs: kind(*args, **kwargs)}  # `type(x)(...)` makes a plain one
    try:
        meta: Any = type(type(kind).__name__, (type(kind),), calls_original)
        made: type[Any] = _unseen(meta, kind, body)
    except Exception:
        return kind
    return made


def _of_struct(kind: Any) -> dict[str, Any]:
    """What a struct does only with one of its very own class."""

    def copied(self: Any) -> Any:
        copy = kind.__copy__(self)
        _CLASS.__set__(copy, kind)
        return copy

    def equal(self: Any, other: Any) -> Any:
        return kind.__eq__(copied(self), copied(other) if is_lent(other) and class_of(other) is kind else other)

    return {"__copy__": copied, "__eq__": equal, "__hash__": lambda self: kind.__hash__(copied(self))}


def _unseen(meta: Any, kind: type[Any], body: dict[str, Any]) -> Any:
    """A class that derives from `kind`, of which a `__init_subclass__` of the user's is not told."""
    if isinstance(kind.__init_subclass__, types.BuiltinMethodType):
        return meta(kind.__name__, (kind,), body)
    if type(kind) is type and kind.__dictoffset__:
        made = meta(kind.__name__, (_WithDict,), body)
        made.__bases__ = (kind,)
        return made
    return meta(kind.__name__, (_Unseen, kind), body)


class _WithDict:
    """Has the layout of most classes of users."""


_IN_PLACE: Final = (
    *("__setitem__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"),
    *("__ior__", "__iand__", "__ixor__", "__ilshift__", "__irshift__", "__ipow__", "__imatmul__"),
)


def _reduce(self: Any, protocol: Any) -> Any:
    """As of the original: copies and pickles of what was read are plain."""
    original = class_of(self)
    if original in _MUTATORS:
        return _plain(self, original).__reduce_ex__(protocol)
    reduced = super(type(self), self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    function, args, *rest = reduced
    function = original if function is type(self) else function
    return (function, tuple(original if arg is type(self) else arg for arg in args), *rest)


def _plain(x: Any, original: type[Any]) -> Any:
    if original is defaultdict:
        return defaultdict(x.default_factory, x)
    return deque(x, x.maxlen) if original is deque else original(x)
