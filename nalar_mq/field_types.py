"""What a managed field holds, in words that are kept with it, and whether what was kept under other words may stay.

    list[int]    dict[str, list[Note] | None]    value[tuple[int, ...]]

A class of the user's is its name, wherever it is: a module that is renamed changes nothing. So do other spellings of the same
type. A field may come to hold more than before: `list[int]` may become `list[int | str]`, `list[float]`, `list[Any]`, or
`list[Base]` of a base class. What cannot be judged, such as a `Protocol`, a bare `list` or a name that is imported for type
checkers alone, is `Any`, which fits everything and which everything fits: only what is certain to be another type is refused.

What a call puts into a field is held against the same annotation (`Elements`), as `annotations.check` does it with arguments,
but nothing is converted: a dict is no dataclass there.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from nalar_mq.annotations import check, is_of
from nalar_mq.errors import ArgumentError, StateTypeError

_LONGEST: Final = 300  # in characters; a longer one says nothing
_ANY: Final = "Any"
_UNION: Final = "|"
_DEEPEST: Final = 20
_SPELLINGS: Final = {
    "List": "list",
    "Dict": "dict",
    "Set": "set",
    "FrozenSet": "frozenset",
    "Tuple": "tuple",
    "Type": "type",
    "NoneType": "None",
    "object": _ANY,
}
_UNIONS: Final = (typing.Union, types.UnionType)
_FORMS: Final = ("Annotated", "Literal", "Optional", "Union", "Callable")
_FITS_TOO: Final = frozenset({("bool", "int"), ("bool", "float"), ("int", "float")})


class _Type(NamedTuple):
    """A type: its name, those between its brackets, and its class where that is known."""

    name: str
    parts: tuple[_Type, ...] = ()
    cls: type[Any] | None = None

    def __str__(self) -> str:
        shown = [str(part) for part in self.parts]
        if self.name == _UNION:
            return " | ".join(sorted(shown))
        return f"{self.name}[{', '.join(shown)}]" if shown else self.name


_UNKNOWN: Final = _Type(_ANY)


_NUMBERS: Final[dict[Any, tuple[type[Any], ...]]] = {
    int: (int, bool),
    float: (float, int, bool),
    complex: (complex, float, int, bool),
}


class Elements:
    """What may be put into a field, or into one half of the pairs of a dict.

    Attributes:
        exact: classes whose very instances fit without being looked at.
    """

    __slots__ = ("_annotation", "_kind", "_parts", "exact")

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self.exact = frozenset(_exact(annotation))
        self._kind: Any = typing.get_origin(annotation)
        self._parts = [frozenset(_exact(part)) for part in typing.get_args(annotation)]

    def check(self, value: Any, what: str) -> None:
        """Raises `StateTypeError` if `value` does not fit; `what` names the field."""
        if self._fits_at_once(value):
            return
        try:
            fitted = check(value, self._annotation, what)
        except ArgumentError as error:
            raise StateTypeError(str(error)) from None
        is_made = fitted is not value and type(fitted) is not type(value) and not isinstance(value, (int, float))
        if is_made and not is_of(value, self._annotation):
            raise StateTypeError(f"{what} must be made a {type(fitted).__qualname__} before it is kept: {value!r:.120}")

    def _fits_at_once(self, value: Any) -> bool:
        """True for a list or dict of what fits without being looked at: to ask `check` takes twenty times as long."""
        if type(value) is not self._kind:
            return False
        parts = self._parts
        if self._kind is list:
            return parts[0].issuperset(map(type, value))
        return self._kind is dict and parts[0].issuperset(map(type, value)) and parts[1].issuperset(map(type, value.values()))


def _exact(annotation: Any) -> Iterable[type[Any]]:
    if annotation is None:
        return (types.NoneType,)
    if isinstance(annotation, type) and annotation in _NUMBERS:
        return _NUMBERS[annotation]
    if typing.get_origin(annotation) in _UNIONS:
        return [cls for arm in typing.get_args(annotation) for cls in _exact(arm)]
    return (annotation,) if isinstance(annotation, type) and not typing.get_args(annotation) else ()


def elements_of(annotation: Any, module: str, cls: type[Any]) -> tuple[Elements | None, ...]:
    """What stands between the brackets of a field, arguments as for `describe`; None for what everything fits."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, _names(module, cls))
        except Exception:
            return ()
    parts = typing.get_args(annotation)
    return tuple(None if part in (Any, object) or isinstance(part, typing.TypeVar) else Elements(part) for part in parts)


def describe(kind: str, annotation: Any, module: str, cls: type[Any]) -> str:
    """What a field holds: `kind` is `list`, `dict` or `value`, and `annotation` stands in the body of the class `cls`."""
    found = _resolved(annotation, module, cls)
    parts = tuple(found.parts)
    if not parts or all(part == _UNKNOWN for part in parts):
        return kind
    text = str(_Type(kind, parts))
    return text if len(text) <= _LONGEST else kind


def kind_in(text: str) -> str:
    """`list`, `dict` or `value`."""
    return text.partition("[")[0]


def fits(kept: str, present: str, classes: Iterable[type[Any]] = ()) -> bool:
    """True unless what was kept under the words `kept` is of another type than the field has now.

    Args:
        kept, present: as `describe` has put them.
        classes: those that the field names now.
    """
    known = {_name_of(cls): cls for cls in classes}
    return _fits(_parsed(kept), _parsed(present), known)


def classes_in(annotation: Any, module: str, cls: type[Any]) -> list[type[Any]]:
    """The classes that a field names, arguments as for `describe`."""
    found: list[type[Any]] = []

    def gather(one: _Type) -> None:
        if one.cls is not None:
            found.append(one.cls)
        for part in one.parts:
            gather(part)

    gather(_resolved(annotation, module, cls))
    return found


def _resolved(annotation: Any, module: str, cls: type[Any]) -> _Type:
    """The annotation of a field, with forward references followed as far as that goes."""
    return _of(annotation, _names(module, cls), 0)


def _names(module: str, cls: type[Any]) -> dict[str, Any]:
    inner = {name: found for name, found in vars(cls).items() if isinstance(found, type)}  # not fields of the name of a type
    return {**vars(typing), **inner, **vars(sys.modules.get(module, typing))}


def _of(annotation: Any, names: dict[str, Any], depth: int) -> _Type:
    if depth > _DEEPEST:
        return _UNKNOWN
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        with contextlib.suppress(Exception):
            return _of(eval(annotation, dict(names)), names, depth + 1)
        with contextlib.suppress(SyntaxError):
            return _of_syntax(ast.parse(annotation.strip(), mode="eval").body, names, depth)
        return _UNKNOWN
    if annotation is None or annotation is type(None):
        return _Type("None")
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _of(args[0], names, depth + 1)
    if origin in _UNIONS:
        return _union(_of(arg, names, depth + 1) for arg in args)
    if origin is typing.Literal:
        return _union(_of(type(arg), names, depth + 1) for arg in args)
    if isinstance(annotation, typing.NewType):
        return _of(annotation.__supertype__, names, depth + 1)
    named = origin or annotation
    if not isinstance(named, type) or _is_open(named):
        return _UNKNOWN
    if typing.is_typeddict(named):
        return _Type("dict")
    parts = tuple(_Type("...") if arg is ... else _of(arg, names, depth + 1) for arg in args)
    if parts and all(part == _UNKNOWN for part in parts):
        parts = ()
    name = _name_of(named)
    return _UNKNOWN if name == _ANY else _Type(name, parts, named if named.__module__ != "builtins" else None)


def _of_syntax(node: ast.expr, names: dict[str, Any], depth: int) -> _Type:
    """What cannot be evaluated, since a name in it is not there at run time: that name is `Any`."""
    match node:
        case ast.Subscript(value=value, slice=inner):
            outer = _of_syntax(value, names, depth + 1)
            elements = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if outer.name in ("Literal", "Callable") or outer == _UNKNOWN:
                return _UNKNOWN
            parts = [_of_syntax(element, names, depth + 1) for element in elements]
            if outer.name == "Annotated":
                return parts[0]
            if outer.name in ("Optional", "Union"):
                return _union([*parts, *([_Type("None")] if outer.name == "Optional" else [])])
            return outer._replace(parts=tuple(parts) if any(part != _UNKNOWN for part in parts) else ())
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([_of_syntax(left, names, depth + 1), _of_syntax(right, names, depth + 1)])
        case ast.Constant(value=None):
            return _Type("None")
        case ast.Constant(value=value) if value is ...:
            return _Type("...")
        case ast.Constant(value=str(text)):
            return _of(text, names, depth + 1)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            with contextlib.suppress(Exception):
                return _of(eval(ast.unparse(node), dict(names)), names, depth + 1)
            return _Type(name) if name in _FORMS else _UNKNOWN
        case _:
            return _UNKNOWN


def _is_open(cls: type[Any]) -> bool:
    """True for what is fulfilled by classes that do not name it: nobody can tell by names."""
    return cls.__module__ == collections.abc.__name__ or bool(getattr(cls, "_is_protocol", False))


def _name_of(cls: type[Any]) -> str:
    name = cls.__qualname__.rpartition("<locals>.")[2]
    return _SPELLINGS.get(name, name)


def _union(members: Iterable[_Type]) -> _Type:
    found: dict[str, _Type] = {}
    for member in members:
        for one in member.parts if member.name == _UNION else (member,):
            found[str(one)] = one
    if _ANY in found or not found:
        return _UNKNOWN
    return next(iter(found.values())) if len(found) == 1 else _Type(_UNION, tuple(found[key] for key in sorted(found)))


def _parsed(text: str) -> _Type:
    try:
        return _of_words(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _UNKNOWN


def _of_words(node: ast.expr) -> _Type:
    match node:
        case ast.Subscript(value=value, slice=inner):
            elements = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return _of_words(value)._replace(parts=tuple(map(_of_words, elements)))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([_of_words(left), _of_words(right)])
        case ast.Name() | ast.Attribute() | ast.Constant():
            return _Type(ast.unparse(node))
        case _:
            return _UNKNOWN


def _fits(kept: _Type, present: _Type, known: dict[str, type[Any]]) -> bool:
    if _ANY in (kept.name, present.name):
        return True
    if _UNION in (kept.name, present.name):
        olds = kept.parts if kept.name == _UNION else (kept,)
        news = present.parts if present.name == _UNION else (present,)
        return all(any(_fits(old, new, known) for new in news) for old in olds)
    if kept.name != present.name:
        return (kept.name, present.name) in _FITS_TOO or _is_base(known.get(present.name), kept.name)
    if not kept.parts or not present.parts:
        return True
    if kept.name == "tuple" and present.parts[-1].name == "...":
        return all(_fits(old, present.parts[0], known) for old in kept.parts if old.name != "...")
    if len(kept.parts) != len(present.parts):
        return False
    return all(_fits(old, new, known) for old, new in zip(kept.parts, present.parts, strict=True))


def _is_base(cls: type[Any] | None, name: str) -> bool:
    """True if a class of that name is derived from `cls`."""
    seen: set[type[Any]] = set()
    waiting = [] if cls is None else [cls]
    while waiting:
        for derived in type.__subclasses__(waiting.pop()):
            if derived not in seen:
                seen.add(derived)
                waiting.append(derived)
    return any(_name_of(derived) == name for derived in seen)
