"""JSON against a JSON schema: as much of the language as types and models are written down in.

`schema_of` writes the schema of a type, `problem_of` judges a value by any such schema, without the type. Of what it does not
know (`format`, conditions, `$dynamicRef`) it takes no notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import msgspec

Schema = Mapping[str, Any]
_DEEPEST: Final = 100
_KINDS: Final[dict[str, Callable[[Any], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value)),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def schema_of(wanted: Any) -> dict[str, Any]:
    """The schema of a type or of a pydantic model; a schema is its own.

    Raises:
        TypeError: values of that type have no JSON, or not one kind of it.
    """
    if isinstance(wanted, Mapping):
        return dict(cast("Schema", wanted))
    if hasattr(wanted, "model_json_schema"):
        return dict(wanted.model_json_schema())
    return msgspec.json.schema(wanted)


def problem_of(value: Any, schema: Schema) -> str:
    """What is wrong with a value, and where; empty if nothing is."""
    return next(_Judge(schema).problems(value, schema, "$", 0), "")


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


class _Judge:
    def __init__(self, root: Schema) -> None:
        self._root = root

    def problems(self, value: Any, schema: Any, at: str, depth: int) -> Iterator[str]:
        if schema is True or depth > _DEEPEST:
            return
        if not isinstance(schema, Mapping):
            yield f"nothing is allowed at {at}"
            return
        known = cast("Schema", schema)
        if "$ref" in known:
            yield from self.problems(value, self._referred(known["$ref"]), at, depth + 1)
        yield from self._kind_problems(value, known, at)
        yield from self._choice_problems(value, known, at, depth)
        if isinstance(value, dict):
            yield from self._object_problems(cast("dict[str, Any]", value), known, at, depth)
        elif value.__class__ is list:
            yield from self._array_problems(value, known, at, depth)
        elif isinstance(value, str):
            yield from _text_problems(value, known, at)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from _number_problems(value, known, at)

    def _referred(self, pointer: str) -> Any:
        found: Any = self._root
        for word in pointer.removeprefix("#").strip("/").split("/"):
            known = cast("Schema", found if isinstance(found, Mapping) else {})
            found = known.get(word.replace("~1", "/").replace("~0", "~"), True)
        return found

    def _kind_problems(self, value: Any, schema: Schema, at: str) -> Iterator[str]:
        kinds = schema.get("type", ())
        names: list[str] = [kinds] if isinstance(kinds, str) else list(kinds)
        if names and not any(_KINDS.get(name, _anything)(value) for name in names):
            yield f"{' or '.join(names)} is wanted at {at}, not {_shown(value)}"

    def _choice_problems(self, value: Any, schema: Schema, at: str, depth: int) -> Iterator[str]:
        if "const" in schema and value != schema["const"]:
            yield f"{_shown(schema['const'])} is wanted at {at}, not {_shown(value)}"
        if "enum" in schema and value not in schema["enum"]:
            yield f"one of {', '.join(map(_shown, schema['enum']))} is wanted at {at}, not {_shown(value)}"
        for part in schema.get("allOf", ()):
            yield from self.problems(value, part, at, depth + 1)
        for word in ("anyOf", "oneOf"):
            first = [next(self.problems(value, part, at, depth + 1), "") for part in schema.get(word, ())]
            if first and all(first):
                yield " or ".join(dict.fromkeys(first))

    def _object_problems(self, value: dict[str, Any], schema: Schema, at: str, depth: int) -> Iterator[str]:
        fields = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{name!r} is missing at {at}"
        for name, part in value.items():
            if name in fields:
                yield from self.problems(part, fields[name], f"{at}.{name}", depth + 1)
            elif schema.get("additionalProperties", True) is False:
                yield f"{name!r} is not known at {at}"
            else:
                yield from self.problems(part, schema.get("additionalProperties", True), f"{at}.{name}", depth + 1)

    def _array_problems(self, value: list[Any], schema: Schema, at: str, depth: int) -> Iterator[str]:
        first = schema.get("prefixItems", ())
        rest = schema.get("items", True)
        for number, part in enumerate(value):
            yield from self.problems(part, first[number] if number < len(first) else rest, f"{at}[{number}]", depth + 1)
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at} has {len(value)} items, which are too {'few' if len(value) < schema.get('minItems', 0) else 'many'}"


def _text_problems(value: str, schema: Schema, at: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"the text at {at} is too {'short' if len(value) < schema.get('minLength', 0) else 'long'}"
    if "pattern" in schema and re.search(schema["pattern"], value) is None:
        yield f"the text at {at} does not match {schema['pattern']!r}"


def _number_problems(value: float, schema: Schema, at: str) -> Iterator[str]:
    bounds: dict[str, tuple[str, Callable[[float], bool]]] = {
        "minimum": ("at least", lambda bound: value >= bound),
        "maximum": ("at most", lambda bound: value <= bound),
        "exclusiveMinimum": ("above", lambda bound: value > bound),
        "exclusiveMaximum": ("below", lambda bound: value < bound),
        "multipleOf": ("a multiple of", lambda bound: value % bound == 0),
    }
    for word, (said, holds) in bounds.items():
        if word in schema and not holds(schema[word]):
            yield f"{_shown(value)} at {at} must be {said} {_shown(schema[word])}"


def _anything(_: Any) -> bool:
    return True


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
