"""An app: the actors that a user's files define, loaded and checked.

A Python file names its actors by decorators: whatever decorated thing is visible in it is served. A manifest names plain
classes and functions; the modules beside it are rewritten while they are imported, so that futures are transparent in them
(see `nalar_mq.rewrite`), and stand-ins take the places of the actors. Agents and tools themselves run as they are written.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nalar_mq import moves
from nalar_mq.actor import ActorSpec, MethodSpec, function_spec, spec_of
from nalar_mq.directives import did_you_mean
from nalar_mq.errors import AppError, ConfigError, DirectiveError
from nalar_mq.logs import logger
from nalar_mq.manifest import MANIFEST_NAME, ActorEntry, Manifest, load_manifest
from nalar_mq.rewrite import RewritingFinder
from nalar_mq.stub import original_of, public_functions, stand_in

_log = logger(__name__)
_MUTATORS = frozenset(
    {
        *("append", "appendleft", "add", "extend", "insert", "remove", "discard", "pop", "popleft", "popitem"),
        *("clear", "update", "setdefault", "sort", "reverse"),
    }
)


class App:
    """The actors of one app by name, and the file that named them."""

    def __init__(self, path: Path, actors: dict[str, ActorSpec], finder: RewritingFinder | None = None) -> None:
        for spec in actors.values():
            spec.check_complete()
        self.path = path
        self.actors = actors
        self._finder = finder

    def unload(self) -> None:
        """Modules of the app that are imported from now on are not rewritten."""
        if self._finder is not None:
            self._finder.uninstall()


def load_app(path: Path) -> App:
    """Loads a `nalar.toml`, a folder with one, or a Python file with decorated actors.

    Raises:
        ManifestError: the manifest is wrong; the message has its line.
        AppError: a module cannot be imported, or lacks what the manifest names.
        DirectiveError: directives of an actor are wrong, or two actors have one name.
    """
    path = path.resolve()
    if path.is_dir():
        path = path / MANIFEST_NAME
    if not path.exists():
        raise AppError(f"{path}: there is no such file: an app is a nalar.toml, a folder with one, or a Python file")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return _ManifestLoader(load_manifest(path)).load() if path.suffix == ".toml" else _load_file(path)


def _load_file(path: Path) -> App:
    module = _imported(path.stem, path)
    actors: dict[str, ActorSpec] = {}
    for found in vars(module).values():
        spec = spec_of(found)
        if spec is None:
            continue
        other = actors.setdefault(spec.name, spec)
        if other is not spec:
            raise DirectiveError(
                f"{path}: two actors have the name {spec.name!r}: {_where(other.target)} and {_where(spec.target)}; "
                "give one of them another one with `name=`"
            )
    if not actors:
        raise AppError(f"{path}: there is no @agent, @tool or @workflow in it; unmodified Python needs a nalar.toml")
    return App(path, actors)


class _ManifestLoader:
    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._actors: dict[str, ActorSpec] = {}
        self._finder = RewritingFinder(
            [manifest.folder], on_module=self._replace_in, skip=self._is_foreign, plain=self._plain_names
        )

    def load(self) -> App:
        """Imports foreign modules first, so that the app's own find the stand-ins in them."""
        self._finder.install()
        try:
            names = dict.fromkeys(entry.module for entry in self._manifest.actors)
            own = [name for name in names if self._file_of(name) is not None]
            for name in [*[name for name in names if name not in own], *own]:
                module = _imported(name, self._file_of(name))
                self._replace_in(module)
        except BaseException:
            self._finder.uninstall()
            raise
        return App(self._manifest.path, self._actors, self._finder)

    def _file_of(self, module: str) -> Path | None:
        base = self._manifest.folder.joinpath(*module.split("."))
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.exists():
                return candidate
        return None

    @staticmethod
    def _is_foreign(module: str) -> bool:
        return module.partition(".")[0] == "nalar_mq"

    def _plain_names(self, module: str) -> set[str]:
        return {
            entry.attribute.partition(".")[0]
            for entry in self._manifest.actors
            if entry.module == module and entry.kind != "workflow"
        }

    def _replace_in(self, module: ModuleType) -> None:
        for entry in self._manifest.actors:
            if entry.module == module.__name__ and entry.name not in self._actors:
                self._replace(entry, module)

    def _replace(self, entry: ActorEntry, module: ModuleType) -> None:
        holder: Any = module
        *path, last = entry.attribute.split(".")
        for name in path:
            holder = self._member(entry, holder, name)
        target = original_of(self._member(entry, holder, last))
        spec = self._spec(entry, target)
        self._actors[entry.name] = spec
        if spec_of(target) is None:
            replacement = stand_in(spec)
            setattr(holder, last, replacement)
            moves.stand_in(target, replacement)

    def _member(self, entry: ActorEntry, holder: Any, name: str) -> Any:
        try:
            return getattr(holder, name)
        except AttributeError:
            known = tuple(found for found in vars(holder) if not found.startswith("_"))
            message = f"module {entry.module!r} has no {entry.attribute!r}: {did_you_mean(name, known)}"
            raise AppError(f"{self._manifest.path}:{entry.line}: {message}") from None

    def _spec(self, entry: ActorEntry, target: Any) -> ActorSpec:
        decorated = spec_of(target)
        try:
            if decorated is not None:
                return ActorSpec(entry.name, decorated.kind, decorated.target, entry.directives, decorated.methods)
            if entry.kind == "agent":
                return self._agent_spec(entry, target)
            if isinstance(target, type) or not callable(target):
                raise DirectiveError(f"{entry.kind} {entry.name!r}: {entry.attribute!r} is not a function; name it in [agents]")
            return function_spec(entry.kind, entry.name, target, entry.directives, transparent=True)
        except DirectiveError as error:
            raise DirectiveError(f"{self._manifest.path}:{entry.line}: {error}") from None

    def _agent_spec(self, entry: ActorEntry, target: Any) -> ActorSpec:
        if not isinstance(target, type):
            raise DirectiveError(f"agent {entry.name!r}: {entry.attribute!r} is not a class; name it in [tools] or [workflows]")
        cls: type[Any] = target
        methods = {name: MethodSpec(name, function, bound=True) for name, function in public_functions(cls).items()}
        spec = ActorSpec(entry.name, "agent", cls, entry.directives, methods, transparent=True)
        if entry.directives.stateful is None and not spec.directives.batchable:
            place = changes_itself(cls)
            if place:
                spec.stateful = True
                _log.info("app.agent_is_stateful", agent=entry.name, because=f"it changes itself at {place}")
        return spec


def changes_itself(cls: type) -> str:
    """`file:line` of the first place outside `__init__` where a method changes `self`; empty if there is none."""
    for base in cls.__mro__[:-1]:
        try:
            source, first_line = inspect.getsourcelines(base)
            tree = ast.parse(textwrap.dedent("".join(source)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "__init__" and node.args.args:
                line = _change_of(node, node.args.args[0].arg)
                if line:
                    return f"{Path(inspect.getsourcefile(base) or '?').name}:{first_line + line - 1}"
    return ""


def _change_of(function: ast.FunctionDef | ast.AsyncFunctionDef, this: str) -> int:
    for node in ast.walk(function):
        if not isinstance(node, (ast.stmt, ast.expr)):
            continue
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
            targets = [node.func.value]
        if any(_is_part_of(target, this) for target in targets):
            return node.lineno
    return 0


def _is_part_of(target: ast.expr, this: str) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return any(_is_part_of(element, this) for element in target.elts)
    inside = target
    while isinstance(inside, (ast.Attribute, ast.Subscript, ast.Starred)):
        inside = inside.value
    return inside is not target and isinstance(inside, ast.Name) and inside.id == this


def _imported(name: str, file: Path | None) -> ModuleType:
    """Imports a module; one of the same name from another file, of an app loaded earlier, makes room."""
    known = sys.modules.get(name)
    if known is not None and file is not None and Path(getattr(known, "__file__", None) or "").resolve() != file.resolve():
        del sys.modules[name]
    try:
        return importlib.import_module(name)
    except ConfigError:
        raise
    except SyntaxError as error:
        raise AppError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except ModuleNotFoundError as error:
        if error.name == name:
            message = f"there is no module {name!r}: it is looked for beside the app's file, then on Python's path"
            raise AppError(message) from None
        raise _import_failure(name, error) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failure(name, error) from error


def _import_failure(name: str, error: BaseException) -> AppError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return AppError(f"{where}module {name!r} cannot be imported: {type(error).__name__}: {error}")


def _where(target: Callable[..., Any]) -> str:
    try:
        _, line = inspect.getsourcelines(target)
        return f"{Path(inspect.getsourcefile(target) or '?').name}:{line}"
    except (OSError, TypeError):
        return repr(target)
