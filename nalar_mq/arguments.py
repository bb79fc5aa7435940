"""Arguments of a call as somebody types them at a shell.

    question=How far is the moon?   by name
    limit:=3                        by name, as JSON and nothing else
    "How far is the moon?"          by position

A value is taken as it stands where the parameter is annotated `str`; elsewhere as JSON if it is JSON, else as it stands.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, TypeAlias

import msgspec

from nalar_mq.errors import ConfigError
from nalar_mq.syntax import parse, parse_expression

Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]

_NAMED = re.compile(r"([^\W\d]\w*)(:?=)(.*)", re.DOTALL)
_TEXT_ANNOTATIONS: Final = frozenset({"str"})
_OPTIONAL_TEXT_ANNOTATIONS: Final = frozenset({"str | None", "None | str", "Optional[str]", "typing.Optional[str]"})
_TYPES: Final[dict[str, Any]] = {
    each.__name__: each for each in (str, int, float, bool, bytes, list, dict, tuple, set, frozenset)
}


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a callee's parameters.

    Attributes:
        annotations: readable annotation by name, in order, empty where there is none.
        positional: how many of them, from the first, can be given by position.
        takes_any_name: it has a `**kwargs`, or nothing is known of it.
        none_by_default: the names of those that are None where nothing is given, so that None may be given whatever they are.
    """

    annotations: dict[str, str] = {}
    positional: int = 0
    takes_any_name: bool = True
    none_by_default: frozenset[str] = frozenset()


def parameters_of(signature: str) -> Parameters:
    """Reads a signature as `str(inspect.signature(f))` writes it; one that is not Python yields that nothing is known."""
    start = signature.find("(")
    try:
        tree = parse(f"def f{signature[start:]}: ..." if start >= 0 else "")
        spec = tree.body[0].args if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        spec = None
    if spec is None:
        return Parameters()
    by_position = [*spec.posonlyargs, *spec.args]
    annotations = {arg.arg: _readable(arg.annotation) for arg in [*by_position, *spec.kwonlyargs]}
    defaults = [
        *zip(reversed(by_position), reversed(spec.defaults), strict=False),
        *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
    ]
    return Parameters(
        annotations=annotations,
        positional=len(by_position),
        takes_any_name=spec.kwarg is not None,
        none_by_default=frozenset(
            arg.arg for arg, default in defaults if isinstance(default, ast.Constant) and default.value is None
        ),
    )


def wanted_type(annotation: str) -> Any:
    """What a readable annotation says as far as the built-in types can say it; `Any` stands for every other part of it."""
    try:
        return _type(parse_expression(annotation.strip()))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return Any


def _type(node: ast.expr) -> Any:
    match node:
        case ast.Name(name):
            return _TYPES.get(name, Any)
        case ast.Constant(None):
            return None
        case ast.BinOp(left, ast.BitOr(), right):
            arms = _type(left), _type(right)
            return Any if Any in arms else arms[0] | arms[1]
        case ast.Subscript(ast.Name("Optional") | ast.Attribute(ast.Name("typing"), "Optional"), inner):
            wanted = _type(inner)
            return Any if wanted is Any else wanted | None
        case ast.Subscript(ast.Name("list" | "set" | "frozenset" as name), inner):
            return _TYPES[name][_type(inner)]
        case ast.Subscript(ast.Name("dict" as name), ast.Tuple([key, item])):
            return _TYPES[name][_type(key), _type(item)]
        case _:
            return Any


def check_fit(signature: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Returns if a callee with that signature, as `parameters_of` reads it, takes these arguments, or nothing is known of it.

    Raises:
        TypeError: it does not; says which is missing or too many.
    """
    start = signature.find("(")
    try:
        tree = parse(f"def f{signature[start:]}: ..." if start >= 0 else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if tree.body and isinstance(tree.body[0], ast.FunctionDef):
        _signature_of(tree.body[0].args).bind(*args, **kwargs)


def _signature_of(spec: ast.arguments) -> inspect.Signature:
    by_position = [*spec.posonlyargs, *spec.args]
    optional = len(by_position) - len(spec.defaults)
    made = [
        inspect.Parameter(
            arg.arg,
            inspect.Parameter.POSITIONAL_ONLY if number < len(spec.posonlyargs) else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if number < optional else None,
        )
        for number, arg in enumerate(by_position)
    ]
    if spec.vararg is not None:
        made.append(inspect.Parameter(spec.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        empty = inspect.Parameter.empty if default is None else None
        made.append(inspect.Parameter(arg.arg, inspect.Parameter.KEYWORD_ONLY, default=empty))
    if spec.kwarg is not None:
        made.append(inspect.Parameter(spec.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(made)


def parse_arguments(words: Sequence[str], json_text: str | None, parameters: Parameters) -> Arguments:
    """Positional and named arguments out of words, or out of one JSON object or array.

    Raises:
        ConfigError: the JSON is not an object or array, a name is unknown or given twice.
    """
    if json_text is not None:
        if words:
            raise ConfigError("arguments are given by words and by --json: choose one of the two")
        return _from_json(json_text)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        named = _NAMED.fullmatch(word)
        if named is None:
            args.append(_value(word, _annotation_at(len(args), parameters)))
            continue
        name, sign, text = named.groups()
        _check_name(name, kwargs, parameters)
        kwargs[name] = _json_value(name, text) if sign == ":=" else _value(text, parameters.annotations.get(name, ""))
    return args, kwargs


def _from_json(text: str) -> Arguments:
    try:
        value: dict[str, Any] | list[Any] = msgspec.json.decode(text, type=dict[str, Any] | list[Any])
    except msgspec.ValidationError:
        raise ConfigError("--json: an object (arguments by name) or an array (by position) is needed") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"--json: not JSON: {error}") from None
    return ([], value) if isinstance(value, dict) else (value, {})


def _json_value(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{name}:= needs JSON: {error}; for plain text write {name}={text}") from None


def _value(text: str, annotation: str) -> Any:
    if annotation in _TEXT_ANNOTATIONS or (annotation in _OPTIONAL_TEXT_ANNOTATIONS and text != "null"):
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _annotation_at(position: int, parameters: Parameters) -> str:
    if position >= parameters.positional:
        return ""
    return list(parameters.annotations.values())[position]


def _check_name(name: str, given: dict[str, Any], parameters: Parameters) -> None:
    if name in given:
        raise ConfigError(f"argument {name!r} is given twice")
    if parameters.takes_any_name or name in parameters.annotations:
        return
    known = list(parameters.annotations)
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}" if known else "it takes none"
    raise ConfigError(f"there is no parameter {name!r}: {hint}")


def _readable(annotation: ast.expr | None) -> str:
    if annotation is None:
        return ""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation)
