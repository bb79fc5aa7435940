"""Values against annotations, and values as JSON: for arguments that were written by hand or by another program.

`check` is generous where Python is: an annotation that cannot be judged accepts everything, a class of the user's accepts its
instances, an int is a float. It is strict where a mistake would surface late: a text is no number and a list is no text.
"""

from __future__ import annotations

import enum
import inspect
import json
import numbers
import sys
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any, Final, cast

import msgspec

from nalar_mq.errors import ArgumentError, MalformedMessageError

_SHOWN = 120


def check(value: Any, annotation: Any, what: str) -> Any:
    """`value` as the parameter's annotation wants it: itself if it fits, or converted, as a dict to a dataclass.

    Dicts become dataclasses, structs, attrs classes and pydantic models; texts become dates, UUIDs, decimals and members of
    enumerations; lists become tuples and sets. `what` names the parameter in messages.

    Raises:
        ArgumentError: it does not fit.
    """
    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return value
    if isinstance(annotation, type) and _is_instance(value, annotation):
        return value
    try:
        return _convert(value, annotation)
    except _Unfit as unfit:
        reason = f": {unfit}" if str(unfit) else ""
        raise ArgumentError(f"{what} must be {_show_type(annotation)}, not {_show_value(value)}{reason}") from None


def is_of(value: Any, annotation: Any) -> bool:
    """True if a value is of an annotated type as it is: everything in it too, and objects of derived classes as well."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return is_of(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, arm) for arm in parts)
    try:
        if not isinstance(origin, type):
            if isinstance(annotation, type) and not typing.is_typeddict(annotation):
                return (
                    isinstance(value, (bytes, bytearray, memoryview))
                    if annotation is bytes
                    else _is_instance(value, annotation)
                )
            fitted = check(value, annotation, "")
            return fitted is value or type(fitted) is type(value)
        return isinstance(value, origin) and _are_of(value, origin, parts)
    except (ArgumentError, TypeError, RecursionError):
        return False


def to_json(value: Any) -> bytes:
    """JSON for people and programs in other languages: as faithful as JSON allows, never failing for want of a type.

    Objects become their attributes, sets lists, bytes base64, keys text, and what has no better form its `str`.

    Raises:
        ValueError: the value contains itself or is nested too deeply.
    """
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, OverflowError, UnicodeEncodeError, ValueError):
        pass
    except RecursionError:
        raise ValueError("a value that contains itself has no JSON") from None
    try:
        return json.dumps(_plain_keys(value), default=_any_plain, separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise ValueError("a value that contains itself has no JSON") from None


def from_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        MalformedMessageError: it is not JSON.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedMessageError(f"not JSON: {error}") from None


# Those of numpy are of these as well, and compute like Python's own.
_KINDS_OF_NUMBERS: Final[dict[type[Any], type[Any]]] = {
    int: numbers.Integral,
    float: numbers.Real,
    complex: numbers.Complex,
}


class _Unfit(Exception):
    """The value does not fit; the text says where, if that is not obvious."""


def _are_of(value: Any, origin: type[Any], parts: tuple[Any, ...]) -> bool:
    """True if what stands in a container is of the types between the brackets of its annotation."""
    if issubclass(origin, tuple):
        if parts[1:] == (...,):
            return all(is_of(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(is_of, value, parts))
    if issubclass(origin, Mapping):
        return len(parts) < 2 or all(is_of(key, parts[0]) and is_of(item, parts[1]) for key, item in value.items())
    if (
        len(parts) == 1
        and origin.__module__ in ("builtins", "collections", "collections.abc")
        and issubclass(type(value), Collection)
    ):
        return isinstance(value, str) or all(is_of(item, parts[0]) for item in value)
    return True


def _is_instance(value: Any, cls: type[Any]) -> bool:
    if cls in _KINDS_OF_NUMBERS:
        return isinstance(value, _KINDS_OF_NUMBERS[cls])
    if cls.__class__ is type:
        return isinstance(value, cls)
    try:
        return isinstance(value, cls)
    except TypeError:
        return False


def _convert(value: Any, annotation: Any) -> Any:
    if isinstance(annotation, (str, typing.TypeVar, typing.ForwardRef)):
        return value
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _convert(value, typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(annotation))
    if getattr(annotation, "_is_protocol", False):
        return value
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _member(annotation, value)
    try:
        if isinstance(annotation, type) and _is_model(annotation):
            return _instance(cast("type[Any]", annotation), value)
        target: Any = annotation
        return msgspec.convert(value, target, dec_hook=_instance)
    except msgspec.ValidationError as error:
        if is_of(value, annotation):  # an object of a derived class inside a list, which msgspec does not take
            return value
        raise _Unfit(_where(str(error))) from None
    except RecursionError:
        raise _Unfit("nested too deeply") from None
    except Exception:
        return _by_origin(value, origin or annotation)


def _convert_union(value: Any, arms: tuple[Any, ...]) -> Any:
    for arm in arms:
        if arm is not Any and isinstance(arm, type) and type(value) is arm:
            return value
    reason = ""
    for arm in arms:
        try:
            return check(value, arm, "") if arm is not types.NoneType else _none(value)
        except (_Unfit, ArgumentError) as error:
            reason = reason or (str(error) if isinstance(error, _Unfit) else "")
    raise _Unfit(reason)


def _none(value: Any) -> None:
    if value is not None:
        raise _Unfit


def _member(cls: type[enum.Enum], value: Any) -> enum.Enum:
    """The member that has the value, or else the name."""
    try:
        return cls(value)
    except ValueError:
        if isinstance(value, str) and value in cls.__members__:
            return cls[value]
        raise _Unfit(f"one of {', '.join(repr(member.value) for member in cls)}") from None


def _instance(cls: type[Any], value: Any) -> Any:
    """For classes that msgspec does not know: the value if it is an instance, or a path, a member or a model made of it."""
    make: Any = cls
    if getattr(cls, "_is_protocol", False) or not inspect.isclass(cls) or isinstance(value, cls):
        return value
    if issubclass(cls, enum.Enum):
        return _member(cls, value)
    if issubclass(cls, PurePath) and isinstance(value, str):
        return make(value)
    if not _is_model(cls):
        raise msgspec.ValidationError(f"Expected `{cls.__qualname__}`, got `{type(value).__name__}`")
    try:
        return make.model_validate(value)
    except ValueError as error:
        raise msgspec.ValidationError(str(error)) from None


def _by_origin(value: Any, origin: Any) -> Any:
    """The last resort for annotations that msgspec does not support: the outer class decides, or nothing does."""
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return value
    try:
        fits = isinstance(value, origin)
    except TypeError:
        return value
    if not fits:
        raise _Unfit
    return value


def _is_model(cls: type[Any]) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _where(message: str) -> str:
    """What msgspec says, if it points at a part of the value."""
    return message if "`$" in message or "\n" in message or "missing" in message else ""


def _show_type(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return cast("type[Any]", annotation).__qualname__
    return str(annotation).replace("typing.", "")


def _show_value(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "..."
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return f"{type(value).__name__} {shown}"


def _plain(value: Any) -> Any:
    """What stands for a value that JSON does not know; for msgspec, which asks again about the parts."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, BaseException):
        return {"error": type(value).__qualname__, "message": str(value)}
    if isinstance(value, (range, types.MappingProxyType)):
        return dict(cast("Mapping[Any, Any]", value)) if isinstance(value, types.MappingProxyType) else list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (str, int, float)):
        return _base_scalar(value)
    state = None if isinstance(value, (type, types.FunctionType)) else getattr(value, "__dict__", None)
    return dict(state) if state else str(value)


def _base_scalar(value: Any) -> Any:
    base = next(cls for cls in (str, int, float) if isinstance(value, cls))
    return base(value)


def _any_plain(value: Any) -> Any:
    """As `_plain`, for the standard library's encoder, which knows less."""
    if isinstance(value, (set, frozenset)):
        return list(cast("set[Any]", value))
    try:
        return _plain_keys(msgspec.to_builtins(value, enc_hook=_plain, str_keys=True))
    except Exception:
        return _plain_keys(_plain(value))


def _plain_keys(value: Any, depth: int = 0) -> Any:
    """The value with every key of its dicts as text, since JSON has no other."""
    if depth > 200:
        raise RecursionError
    if isinstance(value, dict):
        items = cast("Mapping[Any, Any]", value).items()
        return {key if isinstance(key, str) else _key(key): _plain_keys(item, depth + 1) for key, item in items}
    if isinstance(value, (list, tuple)):
        return [_plain_keys(item, depth + 1) for item in cast("list[Any]", value)]
    return value


def _key(key: Any) -> str:
    return json.dumps(key) if key is None or isinstance(key, (bool, int, float)) else str(key)
