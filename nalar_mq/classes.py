"""Classes by name, and how an instance is taken apart and put together without running its code.

A class travels as `module:qualname`. The name is looked up only in modules that are loaded already, through their
dictionaries, so that no import and no module `__getattr__` runs. The main module travels under the name it has as a file
(`app` for `python app.py`), and a name of that form is found in `__main__` again where no module of that name is loaded: a
program and a worker that loaded the same file understand each other.

`shape_of` decides, once for a class, how its instances travel. The same decision is taken on both sides, so bytes cannot
name a class that would not have been sent:

    object      __dict__ and __slots__; dataclasses, attrs classes and plain classes. Restored by `object.__new__`.
    subclass    of a built-in container or scalar: the built-in value, and __dict__ and __slots__.
    struct      a msgspec.Struct: its fields, through its C constructor (which runs a `__post_init__` if there is one).
    model       a pydantic model: its dictionaries, without validation.
    enum        the name of the member, or the value of a composite flag.
    exception   args and attributes, through the constructor of the built-in exception it derives from.
    refused     with the reason: classes of the standard library, of C extensions, local classes, classes that define
                `__del__` (restoring one with chosen attributes would be a way to have it run) or their own pickling.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple, cast

import msgspec

from nalar_mq.errors import UnknownClassError

_NO_INSTANCES = 1 << 7  # Py_TPFLAGS_DISALLOW_INSTANTIATION
_PLAIN_STDLIB = frozenset({"argparse:Namespace"})
_WORD_BYTES = 8


class Deferred:
    """Something that stands for a value that may not be there yet; the runtime's futures are."""

    __slots__ = ()

    def ref(self) -> bytes:
        """The id of the future, 16 bytes."""
        raise NotImplementedError

    def payload(self) -> bytes | None:
        """The encoded value, or None while there is none. Raises the error of a future that failed."""
        raise NotImplementedError


class BuiltinBase(NamedTuple):
    """How the built-in part of an instance of a subclass is read and written, past anything the subclass overrides."""

    read: Callable[[Any], Any]
    fill: Callable[[Any, Any], object] | None = None


def _fill_ordered(target: OrderedDict[Any, Any], items: dict[Any, Any]) -> None:
    for key, value in items.items():
        OrderedDict[Any, Any].__setitem__(target, key, value)


def _read_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    return dict(dict[Any, Any].items(value))


def _read_ordered(value: OrderedDict[Any, Any]) -> dict[Any, Any]:
    return dict(OrderedDict[Any, Any].items(value))


def _read_list(value: list[Any]) -> list[Any]:
    return list(list[Any].__iter__(value))


def _read_tuple(value: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple[Any, ...].__iter__(value))


def _read_set(value: set[Any]) -> set[Any]:
    return set(set[Any].__iter__(value))


def _read_frozenset(value: frozenset[Any]) -> frozenset[Any]:
    return frozenset(frozenset[Any].__iter__(value))


def _read_bytearray(value: bytearray) -> bytearray:
    return bytearray(bytearray.__iter__(value))


_BUILTIN_BASES: Mapping[type, BuiltinBase] = types.MappingProxyType(
    {
        str: BuiltinBase(str.__str__),
        int: BuiltinBase(int.__index__),
        float: BuiltinBase(float.__float__),
        complex: BuiltinBase(complex.__complex__),
        bytes: BuiltinBase(bytes.__bytes__),
        tuple: BuiltinBase(_read_tuple),
        frozenset: BuiltinBase(_read_frozenset),
        list: BuiltinBase(_read_list, list[Any].extend),
        set: BuiltinBase(_read_set, set[Any].update),
        bytearray: BuiltinBase(_read_bytearray, bytearray.extend),
        OrderedDict: BuiltinBase(_read_ordered, _fill_ordered),
        dict: BuiltinBase(_read_dict, dict[Any, Any].update),
    }
)


class Shape(NamedTuple):
    """How instances of one class travel.

    Attributes:
        kind: one of the words in the module's header.
        name: `module:qualname`; for a refused class the reason in words.
        slots: the descriptors of its `__slots__`, by name.
        skip: attributes that are left behind, being caches of what can be computed again.
        base: the built-in class of a `subclass` or `exception`.
    """

    kind: str
    name: str
    slots: Mapping[str, Any] = types.MappingProxyType({})
    skip: frozenset[str] = frozenset()
    base: type = object


def class_of(value: object) -> type[Any]:
    """The class an object really has, whatever a proxy says."""
    return type(value)


def main_name() -> str:
    """The name under which the main module is known to other processes."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    path = getattr(main, "__file__", None)
    return PurePath(path).stem if path else "__main__"


def name_of(thing: Any) -> str:
    """`module:qualname` of a class or function, as other processes know it."""
    module = thing.__module__
    return f"{main_name() if module == '__main__' else module}:{thing.__qualname__}"


def find(name: str) -> Any:
    """The class or function of that name in the modules that are loaded; runs nothing.

    Raises:
        UnknownClassError: there is none.
    """
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name == main_name():
        module = sys.modules.get("__main__")
    if module is None or not qualname:
        raise UnknownClassError(name)
    found: Any = module
    for part in qualname.split("."):
        if found is not module and not isinstance(found, type):
            raise UnknownClassError(name)
        try:
            found = vars(found)[part]
        except (KeyError, TypeError):
            raise UnknownClassError(name) from None
    return found


def find_class(name: str) -> type:
    """As `find`, for classes only."""
    found = find(name)
    if not isinstance(found, type):
        raise UnknownClassError(name)
    return found


def is_importable(thing: Any) -> bool:
    """True if the name of `thing` leads back to it."""
    try:
        return find(name_of(thing)) is thing
    except UnknownClassError:
        return False


def shape_of(cls: type[Any]) -> Shape:
    """How instances of `cls` travel."""
    return _shape_of(cast("Any", cls))


@functools.lru_cache(maxsize=4096)
def _shape_of(cls: type[Any]) -> Shape:
    if not is_importable(cls):
        local = "<locals>" in cls.__qualname__
        return Shape("refused", f"{'local class' if local else 'class that cannot be found by its name:'} {name_of(cls)}")
    if issubclass(cls, enum.Enum):
        return Shape("enum", name_of(cls))
    if _defines(cls, "__del__"):
        return Shape("refused", f"{name_of(cls)} (it defines __del__)")
    if issubclass(cls, BaseException):
        return _exception_shape(cls)
    if issubclass(cls, msgspec.Struct):
        return Shape("struct", name_of(cls))
    if _is_model(cls):
        return Shape("model", name_of(cls), slots=_slots(cls))
    return _subclass_shape(cls) or _object_shape(cls)


def state_of(value: Any, shape: Shape) -> dict[str, Any]:
    """The attributes of an instance."""
    state = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in shape.skip}
    for name, slot in shape.slots.items():
        try:
            state[name] = slot.__get__(value)
        except AttributeError:
            continue
    return state


def set_state(value: Any, shape: Shape, state: dict[str, Any]) -> None:
    """Gives a bare instance its attributes, past any `__setattr__`.

    Raises:
        AttributeError: the class has no room for one of them.
    """
    if not shape.slots:
        if state:
            value.__dict__.update(state)
        return
    rest = dict(state)
    for name, slot in shape.slots.items():
        if name in rest:
            slot.__set__(value, rest.pop(name))
    if rest:
        value.__dict__.update(rest)


def restore_object(cls: type[Any], shape: Shape, state: dict[str, Any]) -> object:
    """An instance of a class of shape `object`, without its constructor."""
    value: object = object.__new__(cls)
    set_state(value, shape, state)
    return value


def split_subclass(value: Any, shape: Shape) -> tuple[Any, dict[str, Any]]:
    """The built-in value and the attributes of an instance of a class of shape `subclass`."""
    return _BUILTIN_BASES[shape.base].read(value), state_of(value, shape)


def restore_subclass(cls: type, shape: Shape, content: Any, state: dict[str, Any]) -> object:
    """An instance of a class of shape `subclass`, without its constructor.

    Raises:
        TypeError: `content` does not fit the built-in class.
    """
    base = cast("Any", shape.base)
    fill = _BUILTIN_BASES[base].fill
    value: object = base.__new__(cls, content) if fill is None else base.__new__(cls)
    if fill is not None:
        fill(value, content)
    set_state(value, shape, state)
    return value


def restore_exception(cls: type, shape: Shape, args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    """An instance of a class of shape `exception`, through the constructor of its built-in base only.

    Raises:
        TypeError: `args` do not fit the built-in base.
    """
    base = cast("Any", shape.base)
    error: Exception = base.__new__(cls, *args)
    base.__init__(error, *args)
    error.args = args
    attributes = dict(state)
    for name in _builtin_attributes(base):
        if name in attributes:
            setattr(error, name, attributes.pop(name))
    set_state(error, shape, attributes)
    return error


def split_exception(error: BaseException, shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The args and the attributes of an exception; its cause, context and traceback stay behind."""
    state = state_of(error, shape)
    for name in _builtin_attributes(shape.base):
        item = getattr(error, name, None)
        if item is not None:
            state[name] = item
    return error.args, state


def _builtin_attributes(base: type) -> tuple[str, ...]:
    if issubclass(base, OSError):
        return ("filename", "filename2")
    if issubclass(base, ImportError):
        return ("name", "path")
    if issubclass(base, (NameError, AttributeError)):
        return ("name",)
    return ()


def _exception_shape(cls: type) -> Shape:
    if not issubclass(cls, Exception) or issubclass(cls, (StopIteration, StopAsyncIteration)):
        return Shape("refused", f"{name_of(cls)} (it has a meaning of its own where it is raised)")
    base = next(part for part in cls.__mro__ if part.__module__ == "builtins")
    return Shape("exception", name_of(cls), slots=_slots(cls), base=base)


def _subclass_shape(cls: type) -> Shape | None:
    base = next((part for part in cls.__mro__ if part in _BUILTIN_BASES), None)
    if base is None:
        return None
    depth = cls.__mro__.index(base)
    if _pickles_itself(cls, depth) or _is_foreign(cls, depth):
        return Shape("refused", name_of(cls))
    return Shape("subclass", name_of(cls), slots=_slots(cls), skip=_cached_names(cls), base=base)


def _object_shape(cls: type) -> Shape:
    name = name_of(cls)
    in_stdlib = cls.__module__.partition(".")[0] in sys.stdlib_module_names
    if in_stdlib and name not in _PLAIN_STDLIB and not hasattr(cls, "__dataclass_fields__"):
        return Shape("refused", name)
    depth = cls.__mro__.index(object)
    if _pickles_itself(cls, depth):
        return Shape("refused", f"{name} (it defines its own pickling)")
    if _is_foreign(cls, depth) or not _fits_object(cls):
        return Shape("refused", f"{name} (its state is not in Python attributes)")
    return Shape("object", name, slots=_slots(cls), skip=_cached_names(cls))


def _defines(cls: type, name: str) -> bool:
    return any(name in vars(part) for part in cls.__mro__)


def _pickles_itself(cls: type, depth: int) -> bool:
    """True if one of the first `depth` classes of its order does."""
    generated = hasattr(cls, "__dataclass_fields__") or hasattr(cls, "__attrs_attrs__")
    if generated:
        return False
    hooks = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    return any(name in vars(part) for part in cls.__mro__[:depth] for name in hooks)


def _is_foreign(cls: type, depth: int) -> bool:
    """True if a class below the built-in one was not made by a class statement with a `__new__` of Python or none."""
    if cls.__flags__ & _NO_INSTANCES:
        return True
    return any(isinstance(vars(part).get("__new__"), types.BuiltinFunctionType) for part in cls.__mro__[:depth])


def _fits_object(cls: type) -> bool:
    words = len(_slots(cls)) + 2
    return cls.__basicsize__ <= object.__basicsize__ + words * _WORD_BYTES


def _slots(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in cls.__mro__:
        if part.__module__ == "builtins":
            continue
        for name, item in vars(part).items():
            if isinstance(item, types.MemberDescriptorType):
                found.setdefault(name, item)
    return found


def _cached_names(cls: type) -> frozenset[str]:
    parts = (vars(part).items() for part in cls.__mro__)
    return frozenset(name for items in parts for name, item in items if isinstance(item, functools.cached_property))


def _is_model(cls: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)
