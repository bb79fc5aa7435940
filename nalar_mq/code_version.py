"""The version of a workflow's code: a digest that changes when what the workflow does may have changed.

It covers the workflow's function, and of its module whatever that uses by name: functions, classes and what is assigned to
names, and what those use in turn. Comments, docstrings, annotations, layout, the workflow's decorators, and everything else
in the module do not count, nor do agents, tools and other workflows, whose calls are in the journal whatever they do.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from nalar_mq.syntax import parse

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_UNCOUNTED = frozenset({"returns", "annotation", "type_comment", "ctx"})


class Versions:
    """The versions of workflows; a file that holds several is read once.

    Args:
        is_actor: tells agents, tools and workflows among what a module holds.
    """

    def __init__(self, is_actor: Callable[[Any], bool]) -> None:
        self._is_actor = is_actor
        self._sources: dict[str, _Source | None] = {}

    def of(self, function: Callable[..., Any]) -> str:
        """The version of the code of a workflow; empty if its source is not there."""
        plain: Any = inspect.unwrap(function)
        code: Any = getattr(plain, "__code__", None)
        source = self._source_at(code.co_filename) if isinstance(code, CodeType) else None
        workflow = source.functions.get((plain.__name__, code.co_firstlineno)) if source is not None else None
        if source is None or workflow is None:
            return ""
        bare = copy.copy(workflow)
        bare.decorator_list = []
        module = vars(sys.modules.get(plain.__module__, sys))
        used = source.used(workflow, bare, lambda name: self._is_actor(module.get(name)))
        digest = hashlib.blake2b(digest_size=6)
        for text in ("\0".join(_words(bare)), *sorted("\0".join(_words(statement)) for statement in used)):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0\0")
        return digest.hexdigest()

    def _source_at(self, path: str) -> _Source | None:
        if path not in self._sources:
            text = "".join(linecache.getlines(path))
            try:
                self._sources[path] = _Source(parse(text, path)) if text else None
            except SyntaxError:
                self._sources[path] = None
        return self._sources[path]


class _Source:
    """A file as a tree.

    Attributes:
        functions: by their names and first lines.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._body = tree.body
        self._by_name: dict[str, list[ast.stmt]] = {}
        self.functions: dict[tuple[str, int], ast.FunctionDef | ast.AsyncFunctionDef] = {}
        for statement in tree.body:
            for name in _bound(statement):
                self._by_name.setdefault(name, []).append(statement)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.setdefault((node.name, _first_line(node)), node)

    def used(self, workflow: ast.stmt, bare: ast.stmt, is_actor: Callable[[str], bool]) -> list[ast.stmt]:
        """The statements that bind the names that a workflow uses, directly or not; `bare` is what of it counts."""
        found = {id(workflow)}
        pending = [bare]
        while pending:
            for name in _names(pending.pop()):
                fresh = [] if is_actor(name) else [s for s in self._by_name.get(name, ()) if id(s) not in found]
                found.update(map(id, fresh))
                pending += fresh
        return [statement for statement in self._body if id(statement) in found and statement is not workflow]


def _first_line(node: _Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines or assigns."""
    if isinstance(statement, _Definition):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a tree uses, but for those in what does not count."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for _, parts in _fields(node):
        for part in parts:
            if isinstance(part, ast.AST):
                yield from _names(part)


def _words(node: ast.AST) -> Iterator[str]:
    """What a tree says, without positions and whatever else may differ while it says the same."""
    yield f"({type(node).__name__}"
    for field, parts in _fields(node):
        yield field
        for part in parts:
            if isinstance(part, ast.AST):
                yield from _words(part)
            else:
                yield repr(part)
    yield ")"


def _fields(node: ast.AST) -> Iterator[tuple[str, list[Any]]]:
    """What counts of a node; fields that are empty are left out, since versions of Python differ in having them."""
    fields: Iterator[tuple[str, Any]] = ast.iter_fields(node)
    for field, value in fields:
        parts: list[Any] = value if value.__class__ is list else [value]
        if field == "body" and isinstance(node, _Definition):
            parts = _without_docstring(node.body)
        if field not in _UNCOUNTED and parts and value is not None:
            yield field, parts


def _without_docstring(statements: list[ast.stmt]) -> list[Any]:
    first = statements[0] if statements else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return statements[1:] if is_text else statements
