"""Writes a typed client module for an app: for programs that call its actors and cannot import them.

Each tool and workflow becomes a function, each agent a class, with the parameters, defaults and types of the original. A
type that a caller has without importing the app (built-in types and those of a few modules of the standard library) stands
as it is; every other one becomes `Any`, since its module is just what the caller does not have.
"""

from __future__ import annotations

import collections.abc
import inspect
import keyword
import re
import types
import typing
from typing import Any, Final

from nalar_mq.actor import ActorSpec, MethodSpec
from nalar_mq.app import App

_KNOWN_MODULES: Final = ("datetime", "decimal", "pathlib", "uuid")
_STREAMS: Final = (
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
)
_PLAIN_DEFAULTS: Final = (str, int, float, bool, bytes, type(None))
_BARE_CONTAINERS: Final = {
    "dict": "dict[Any, Any]",
    "list": "list[Any]",
    "set": "set[Any]",
    "frozenset": "frozenset[Any]",
    "tuple": "tuple[Any, ...]",
}
_HEAD: Final = '''"""A typed client, written by `nalar stubs`: change the app and write it again, not this file."""

from __future__ import annotations

'''


class _Signature:
    """How one callee is declared in the module, and how its arguments are passed on.

    Arguments without a default go by position, others by name, so that one can be left out. A default that cannot be
    written down is left to the callee: the parameter is then None unless given.
    """

    def __init__(self, method: MethodSpec, reserved: str) -> None:
        self.declared: list[str] = []
        self.passed: list[str] = []
        self.left_out: dict[str, str] = {}
        self.result = _result(method)
        self._reserved = reserved
        self._named_only = False
        for parameter in method.signature.parameters.values():
            self._add(parameter, _type(method.annotations.get(parameter.name, Any)))

    def call(self, call: str, name: str) -> str:
        """The expression that makes the call."""
        optional = ", ".join(f"{key!r}: {value}" for key, value in self.left_out.items())
        given = [f"**{{k: v for k, v in {{{optional}}}.items() if v is not None}}"] if optional else []
        return f"{call}({', '.join([repr(name), *self.passed, *given])})"

    def _add(self, parameter: inspect.Parameter, hint: str) -> None:
        name = _identifier(parameter.name)
        name = f"{name}_" if name == self._reserved else name
        if parameter.kind is parameter.VAR_POSITIONAL:
            self._named_only = True
            self.declared.append(f"*{name}: {hint}")
            self.passed.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            self.declared.append(f"**{name}: {hint}")
            self.passed.append(f"**{name}")
        else:
            self._add_single(parameter, name, hint)

    def _add_single(self, parameter: inspect.Parameter, name: str, hint: str) -> None:
        if parameter.kind is parameter.KEYWORD_ONLY and not self._named_only:
            self._named_only = True
            self.declared.append("*")
        by_name = self._named_only or parameter.default is not parameter.empty
        passed = f"{parameter.name}={name}" if by_name and parameter.kind is not parameter.POSITIONAL_ONLY else name
        if parameter.default is parameter.empty:
            self.declared.append(f"{name}: {hint}")
            self.passed.append(passed)
        elif type(parameter.default) in _PLAIN_DEFAULTS:
            self.declared.append(f"{name}: {hint} = {parameter.default!r}")
            self.passed.append(passed)
        else:
            self.declared.append(f"{name}: {hint if hint == 'Any' else f'{hint} | None'} = None")
            self.left_out[parameter.name] = name


def client_module(app: App) -> str:
    """The text of the module: Python that mypy and pyright accept in strict mode."""
    parts = [_agent_class(spec) if spec.kind == "agent" else _function(spec) for spec in app.actors.values()]
    body = "\n\n".join(parts)
    imports = [f"import {name}" for name in _KNOWN_MODULES if re.search(rf"\b{name}\.", body)]
    typing_names = [name for name in ("Any", "Literal") if re.search(rf"\b{name}\b", body)]
    imports += [f"from typing import {', '.join(typing_names)}"] if typing_names else []
    ours = "from nalar_mq.client import Client\nfrom nalar_mq.future import Future\n"
    return _HEAD + "".join(f"{line}\n" for line in imports) + ("\n" if imports else "") + ours + "\n\n" + body


def _function(spec: ActorSpec) -> str:
    signature = _Signature(spec.methods[""], "client")
    lines = [
        f"def {_identifier(spec.name)}({', '.join(['client: Client', *signature.declared])}) -> Future[{signature.result}]:",
        f"    {_docstring(spec)}",
        f"    return {signature.call('client.call', spec.name)}",
    ]
    return "\n".join(lines) + "\n"


def _agent_class(spec: ActorSpec) -> str:
    lines = [
        f"class {_identifier(spec.name)}:",
        f"    {_docstring(spec)}",
        "",
        "    def __init__(self, client: Client, session: str | None = None) -> None:",
        "        self._caller = client.options(session=session)",
    ]
    for method in spec.methods.values():
        signature = _Signature(method, "self")
        call = signature.call("self._caller.call", f"{spec.name}.{method.name}")
        lines += [
            "",
            f"    def {method.name}({', '.join(['self', *signature.declared])}) -> Future[{signature.result}]:",
            f"        return {call}",
        ]
    return "\n".join(lines) + "\n"


def _result(method: MethodSpec) -> str:
    hint = method.annotations.get("return", Any)
    if method.style not in ("generator", "async_generator"):
        return _type(hint)
    pieces = typing.get_args(hint) if typing.get_origin(hint) in _STREAMS else ()
    return f"list[{_type(pieces[0]) if pieces else 'Any'}]"


def _type(hint: Any) -> str:
    """A type as the module writes it."""
    if hint is None or hint is type(None):
        return "None"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin is typing.Literal:
        return f"Literal[{', '.join(repr(arg) for arg in args)}]" if all(type(a) in _PLAIN_DEFAULTS for a in args) else "Any"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(arg) for arg in args))
    if isinstance(origin, type) and origin.__module__ == "builtins":
        return f"{origin.__name__}[{', '.join('...' if arg is ... else _type(arg) for arg in args) or '()'}]"
    if isinstance(hint, type) and hint.__module__ == "builtins":
        return _BARE_CONTAINERS.get(hint.__name__, hint.__name__)
    if isinstance(hint, type) and hint.__module__ in _KNOWN_MODULES:
        return f"{hint.__module__}.{hint.__qualname__}"
    return "Any"


def _identifier(name: str) -> str:
    text = re.sub(r"\W", "_", name)
    text = f"_{text}" if text[0].isdigit() else text
    return f"{text}_" if keyword.iskeyword(text) else text


def _docstring(spec: ActorSpec) -> str:
    text = spec.doc or f"Calls {spec.kind} {spec.name}."
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"""{escaped}"""'
