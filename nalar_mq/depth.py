"""Values in the place of futures, in depth, and what is known of the user's classes.

`deep` puts values in the place of futures inside the same list, dict, deque or object, so that who shares it sees them too;
tuples are made again. While no future is alive it does nothing, so rewritten code that calls no actor scans nothing.
"""

# What runs through here is of any type whatever.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, Generic, Protocol, cast

from nalar_mq.future import Future
from nalar_mq.origins import AnyFuture, Origin, is_rewritten, living, user_frame

PLAIN_NAMES: Final = "_@plain"  # in a rewritten module: the names of its definitions that were left as they are

LEAVES: Final = frozenset(
    {
        int,
        str,
        float,
        bool,
        type(None),
        bytes,
        complex,
        range,
        type,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.ModuleType,
        type(...),
    }
)


def force(future: AnyFuture) -> Any:
    """Waits for the value; an error gets a note that names the line of the call, unless it arises there."""
    try:
        return future.value()
    except Exception as error:
        origin = living.get(id(future))
        if origin is not None:
            _add_origin(error, origin, user_frame())
        raise


def _add_origin(error: BaseException, origin: Origin, frame: types.FrameType | None) -> None:
    if frame is not None and frame.f_lineno == origin.line and frame.f_code.co_filename == origin.filename:
        return
    note = f'raised by the call at File "{origin.filename}", line {origin.line}'
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def value(x: Any) -> Any:
    """`x`, or its value if it is a future."""
    return force(x) if isinstance(x, Future) else x


def deep(x: Any) -> Any:
    """`x` with values in the place of all futures in it."""
    if type(x) in LEAVES:
        return x
    if isinstance(x, Future):
        return force(x)
    return _Walk().visit(x) if living else x


_Types = tuple[type[Any], ...]

_DICTS: Final[tuple[dict[Any, Any], ...]] = ({}, OrderedDict())

VIEWS: Final[_Types] = tuple(type(view) for d in _DICTS for view in (d.keys(), d.values(), d.items()))

_ITERABLES: Final[tuple[Any, ...]] = ([], (), {}, {}.values(), {}.items(), deque[Any]())

_ITERATORS: Final[_Types] = (
    zip,
    enumerate,
    reversed,
    map,
    filter,
    *(type(iter(cast("Iterable[Any]", x))) for x in _ITERABLES),
    type(reversed(list[Any]())),
    *(t for t in vars(itertools).values() if isinstance(t, type)),
)

CONTAINERS: Final[_Types] = (list, dict, tuple, deque, set, frozenset)


class _Walk:
    """One pass over everything reachable from a value through containers and the user's objects."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def visit(self, x: Any) -> Any:
        if type(x) in LEAVES:
            return x
        if isinstance(x, Future):
            return force(x)
        if id(x) in self.seen:
            return x
        if isinstance(x, tuple):
            return self._tuple(x)
        self.seen[id(x)] = x
        self._inside(x)
        return x

    def _inside(self, x: Any) -> None:
        if isinstance(x, (list, deque)):
            self._sequence(x)
        elif isinstance(x, dict):
            self._dict(x)
        elif isinstance(x, (set, frozenset)):
            for element in tuple(x):
                self.visit(element)
        elif isinstance(x, functools.partial):
            self.visit(x.args)
            self.visit(x.keywords)
        elif isinstance(x, types.MethodType):
            if not is_rewritten_callable(x):
                self.visit(x.__self__)
        elif isinstance(x, VIEWS + _ITERATORS):
            self._referents(x)
        elif storage(type(x)) != _FOREIGN:
            self._instance(x)

    def _sequence(self, x: list[Any] | deque[Any]) -> None:
        for i, old in enumerate(tuple(x)):
            if type(old) in LEAVES:
                continue
            new = self.visit(old)
            if new is not old and i < len(x) and x[i] is old:
                if isinstance(x, list):
                    list.__setitem__(x, i, new)
                else:
                    x[i] = new

    def _dict(self, x: dict[Any, Any]) -> None:
        for key, old in tuple(dict.items(x)):
            if type(key) not in LEAVES:
                self.visit(key)
            if type(old) in LEAVES:
                continue
            new = self.visit(old)
            if new is not old and dict.get(x, key) is old:
                dict.__setitem__(x, key, new)

    def _tuple(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = [self.visit(part) for part in x]
        if all(new is old for new, old in zip(parts, x, strict=True)):
            return x
        if type(x) is tuple:
            return tuple(parts)
        return tuple.__new__(type(x), parts)

    def _referents(self, x: Any) -> None:
        for inner in gc.get_referents(x):
            if isinstance(inner, CONTAINERS + VIEWS + _ITERATORS):
                self.visit(inner)

    def _instance(self, x: Any) -> None:
        attributes = getattr(x, "__dict__", None)
        if type(attributes) is dict:
            self._dict(attributes)
        for cls in type(x).__mro__[:-1]:
            for name in _slots(cls):
                self._slot(x, cls.__dict__.get(name))

    def _slot(self, x: Any, descriptor: Any) -> None:
        if isinstance(descriptor, types.MemberDescriptorType):
            with contextlib.suppress(AttributeError):
                old = descriptor.__get__(x)
                new = self.visit(old)
                if new is not old:
                    descriptor.__set__(x, new)


def _slots(cls: type) -> Sequence[str]:
    slots: Any = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]


_FOREIGN: Final = 0  # never looked into: futures are not stored there

_OURS: Final = 1  # looked into, but code that is not rewritten may read its attributes at any time

KEEPS: Final = 2  # only rewritten code reads its attributes, so futures may be stored there

_shapes: Final[weakref.WeakKeyDictionary[type, int]] = weakref.WeakKeyDictionary()

_NEUTRAL: Final = frozenset({object, Generic, Protocol})


def storage(cls: type) -> int:
    """How instances of the class are stored in and looked into: `FOREIGN`, `OURS` or `KEEPS`."""
    shape = _shapes.get(cls)
    if shape is None:
        shape = _shapes[cls] = _shape_of(cls)
    return shape


def _shape_of(cls: type) -> int:
    if hasattr(cls, "__nalar_reference__"):
        return _FOREIGN
    bases = [c for c in cls.__mro__ if c not in _NEUTRAL and c.__module__ != "abc"]
    ours = [c for c in bases if _is_rewritten_class(c)]
    if not ours:
        known = cls is types.SimpleNamespace or issubclass(cls, BaseException) or hasattr(cls, "__dataclass_fields__")
        return _OURS if known else _FOREIGN
    if len(ours) < len(bases) or any(c.__dict__.get("__slots__") for c in bases):
        return _OURS
    return KEEPS if _is_plain_storing(cls) else _OURS


def _is_plain_storing(cls: type) -> bool:
    setter: Any = cls.__setattr__
    frozen = getattr(getattr(cls, "__dataclass_params__", None), "frozen", False)
    return setter is object.__setattr__ or frozen or is_rewritten_callable(setter)


def _is_rewritten_class(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    names = getattr(module, PLAIN_NAMES, None)
    return names is not None and cls.__qualname__.partition(".")[0] not in names


def is_rewritten_callable(f: Any) -> bool:
    """True for functions and methods that may be given futures."""
    function = getattr(f, "__func__", f)
    return type(function) is types.FunctionType and is_rewritten(function.__code__)


def takes_futures(cls: type) -> bool:
    """True if making an instance only stores the arguments or gives them to rewritten code."""
    if type(cls).__call__ is not type.__call__ or storage(cls) == _FOREIGN:
        return False
    maker: Any = cls.__new__
    starter: Any = getattr(cls, "__init__")  # noqa: B009 - which one is asked of the class on purpose
    if maker is not object.__new__ and not is_rewritten_callable(maker):
        return False
    return is_rewritten_callable(starter) or _is_generated_init(cls, starter)


def _is_generated_init(cls: type, starter: Any) -> bool:
    if "__dataclass_fields__" not in cls.__dict__ or storage(cls) != KEEPS or type(starter) is not types.FunctionType:
        return False
    if starter.__code__.co_filename != "<string>":
        return False
    after = getattr(cls, "__post_init__", None)
    if after is not None and not is_rewritten_callable(after):
        return False
    return not any(hasattr(getattr(cls, f.name, None), "__set__") for f in dataclasses.fields(cls))
