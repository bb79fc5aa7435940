"""Imports an app's own modules rewritten; all others as they are."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from nalar_mq import depth, moves
from nalar_mq.rewrite import rewrite_source

_RECURSION_LIMIT: Final = 3000


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    """Loads one module from its source, rewritten; no byte code is kept."""

    def __init__(self, fullname: str, path: str, finder: RewritingFinder) -> None:
        super().__init__(fullname, path)
        self._finder = finder

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return rewrite_source(self.get_data(path), path, self._finder.plain(fullname))

    def exec_module(self, module: types.ModuleType) -> None:
        names = vars(module)
        names.update(moves.NAMES)
        names[depth.PLAIN_NAMES] = frozenset(self._finder.plain(module.__name__))
        super().exec_module(module)
        self._finder.on_module(module)


def is_rewritten_module(module: types.ModuleType) -> bool:
    """True if the module was loaded through a `RewritingFinder`."""
    return type(getattr(getattr(module, "__spec__", None), "loader", None)) is _RewritingLoader


def _nothing(_: object) -> None:
    return None


def _no_names(_: str) -> tuple[str, ...]:
    return ()


def _never(_: str) -> bool:
    return False


class RewritingFinder(importlib.abc.MetaPathFinder):
    """Rewrites the app's own modules when they are imported.

    Args:
        roots: folders whose modules are the app's; installed packages under them are not.
        on_module: called with each rewritten module after its body ran.
        skip: True for modules, by full name, that are to be imported as they are.
        plain: the names of the definitions at the top of a module, by its full name, that stay as they are: actors.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        on_module: Callable[[types.ModuleType], None] | None = None,
        skip: Callable[[str], bool] | None = None,
        plain: Callable[[str], Collection[str]] | None = None,
    ) -> None:
        self.roots = tuple(root.resolve() for root in roots)
        self.on_module = on_module or _nothing
        self.plain = plain or _no_names
        self._skip = skip or _never

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the app; None for all others."""
        if self._skip(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader or spec.origin is None:
            return None
        if not self._is_of_app(Path(spec.origin)):
            return None
        spec.loader = _RewritingLoader(fullname, spec.origin, self)
        return spec

    def _is_of_app(self, file: Path) -> bool:
        file = Path(os.path.abspath(file))
        for root in self.roots:
            for candidate in (file, file.resolve()):
                if candidate.is_relative_to(root):
                    inside = candidate.relative_to(root).parent
                    return not any(_is_environment(root, parent) for parent in [inside, *inside.parents])
        return False

    def install(self) -> None:
        """Puts the finder first. Rewritten calls take two frames each, so the recursion limit is raised to match."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
            sys.setrecursionlimit(max(sys.getrecursionlimit(), _RECURSION_LIMIT))

    def uninstall(self) -> None:
        """Takes the finder away; modules it has loaded stay."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _is_environment(root: Path, folder: Path) -> bool:
    return folder.name in {"site-packages", "dist-packages"} or (folder != Path() and (root / folder / "pyvenv.cfg").exists())
