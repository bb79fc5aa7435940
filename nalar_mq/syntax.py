"""Python source as a tree, with no garbage collected meanwhile.

A finalizer that parses, as whatever shows a traceback does, makes CPython 3.11 lose count of the depth of the tree that it is
building, and raise a `SystemError`.
"""

from __future__ import annotations

import ast
import contextlib
import gc
from collections.abc import Generator


def parse(source: str | bytes, filename: str = "<unknown>") -> ast.Module:
    """The tree of a module. Raises `SyntaxError` as `ast.parse` does."""
    with uncollected():
        return ast.parse(source, filename)


def parse_expression(source: str) -> ast.expr:
    """The tree of an expression. Raises `SyntaxError` as `ast.parse` does."""
    with uncollected():
        return ast.parse(source, mode="eval").body


@contextlib.contextmanager
def uncollected() -> Generator[None]:
    """No garbage is collected until the end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
