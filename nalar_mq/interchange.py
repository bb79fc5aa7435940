"""Arguments and results as programs in other languages write and read them: JSON, or MessagePack without extensions.

Which of the two it is shows in the first byte: JSON begins with a character of ASCII, and a map, a list or a text in
MessagePack never does. An object holds arguments by name, an array by position; anything else is the only argument, and
nothing at all means none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, Final, NoReturn, cast

import msgspec

from nalar_mq.annotations import to_json
from nalar_mq.errors import MalformedMessageError, ValueNotEncodableError

_BOM: Final = b"\xef\xbb\xbf"


class Arguments(msgspec.Struct, frozen=True):
    """Arguments of a call; `is_json` tells in which form the caller wrote them, and wants the answer."""

    args: list[Any]
    kwargs: dict[str, Any]
    is_json: bool = True


def read_arguments(data: bytes) -> Arguments:
    """The arguments that another program has written.

    Raises:
        MalformedMessageError: they are neither JSON nor MessagePack, or a name is no text.
    """
    data = data.removeprefix(_BOM)
    is_json = not data or data[0] < 0x80
    if is_json and not data.strip():
        return Arguments([], {})
    value = _read(data, is_json)
    kind = value.__class__
    if kind is dict:
        if any(type(name) is not str for name in value):
            raise MalformedMessageError("arguments by name need names that are texts")
        return Arguments([], value, is_json)
    return Arguments(value if kind is list else [value], {}, is_json)


def write_value(value: object, *, is_json: bool = True) -> bytes:
    """A result for another program; what has no counterpart there gets the nearest one, as in `annotations.to_json`.

    Raises:
        ValueError: the value contains itself or is nested too deeply.
    """
    written = to_json(value)
    return written if is_json else msgspec.msgpack.encode(msgspec.json.decode(written))


def json_argument(value: object) -> Any:
    """An argument as JSON has it; what has no form there that says the same is refused, unlike in a result.

    Objects become their fields, sets and other sequences arrays, and bytes, dates and the like the texts that an annotation
    makes them of again.

    Raises:
        ValueNotEncodableError: it holds what has no such form.
    """
    try:
        plain = msgspec.to_builtins(value, enc_hook=_part)
        _check_plain(plain)
    except RecursionError:
        raise ValueNotEncodableError("it contains itself or is nested too deeply") from None
    except TypeError as error:
        raise error if isinstance(error, ValueNotEncodableError) else ValueNotEncodableError(str(error)) from None
    return plain


def _part(value: Any) -> Any:
    """For msgspec: what stands for a value that it does not know."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return value.tolist()
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return dict(cast("Any", value))
    if isinstance(value, Sequence | Set):
        return list(cast("Iterable[Any]", value))
    raise ValueNotEncodableError(f"an object of class {type(value).__qualname__} has no form in JSON")


def _check_plain(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueNotEncodableError(f"the number {value} has no form in JSON")
    if isinstance(value, dict):
        for name, item in cast("Mapping[Any, Any]", value).items():
            if not isinstance(name, str):
                raise ValueNotEncodableError(f"the key {name!r} of a dict would become a text in JSON")
            _check_plain(item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            _check_plain(item)


def _read(data: bytes, is_json: bool) -> Any:
    try:
        return msgspec.json.decode(data) if is_json else _msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedMessageError(f"{'not JSON' if is_json else 'neither JSON nor MessagePack'}: {error}") from None


def _refuse_extension(code: int, _data: memoryview) -> NoReturn:
    raise msgspec.ValidationError(f"extension {code} is not understood here")


_msgpack: Final = msgspec.msgpack.Decoder(ext_hook=_refuse_extension)
