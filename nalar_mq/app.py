"""An app: the actors that a user's files define, loaded and checked.

A Python file names its actors by decorators: whatever decorated thing is visible in it is served. A manifest names plain
classes and functions; the modules beside it are rewritten while they are imported, so that futures are transparent in them
(see `nalar_mq.rewrite`), and stand-ins take the places of the actors. Agents and tools themselves run as they are written.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from nalar_mq import moves
from nalar_mq.actor import ActorSpec, MethodSpec, function_spec, spec_of
from nalar_mq.code_version import Versions
from nalar_mq.directives import did_you_mean
from nalar_mq.errors import AppError, ConfigError, DirectiveError
from nalar_mq.finder import RewritingFinder, is_rewritten_module
from nalar_mq.logs import logger
from nalar_mq.manifest import MANIFEST_NAME, ActorEntry, Manifest, load_manifest
from nalar_mq.stub import original_of, public_functions, stand_in
from nalar_mq.syntax import parse

_log = logger(__name__)
_MUTATORS = frozenset(
    {
        *("append", "appendleft", "add", "extend", "extendleft", "insert", "remove", "discard", "pop", "popleft", "popitem"),
        *("clear", "update", "setdefault", "sort", "reverse", "rotate", "move_to_end", "subtract", "put", "put_nowait"),
        *("difference_update", "intersection_update", "symmetric_difference_update"),
    }
)
_MUTATING_FUNCTIONS = frozenset(
    {"setattr", "delattr", "next", "heappush", "heappop", "heapify", "heapreplace", "heappushpop", "insort", "shuffle"}
)


class App:
    """The actors of one app by name, and the file that named them."""

    def __init__(self, path: Path, actors: dict[str, ActorSpec], finder: RewritingFinder | None = None) -> None:
        versions = Versions(_is_actor)
        for spec in actors.values():
            spec.check_complete()
            if spec.kind == "workflow" and not spec.version:
                spec.version = versions.of(spec.target)
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
    _put_first(path.parent)
    return _ManifestLoader(load_manifest(path)).load() if path.suffix == ".toml" else _load_file(path)


def _is_actor(found: Any) -> bool:
    return spec_of(found) is not None or original_of(found) is not found


def _put_first(folder: Path) -> None:
    """Has modules looked for in `folder` first; those of apps loaded earlier that have names of modules there make room."""
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != str(folder))]
    importlib.invalidate_caches()
    here = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or entry.is_dir()}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in here and is_rewritten_module(module) and not _is_under(module, folder):
            del sys.modules[name]


def _is_under(module: ModuleType, folder: Path) -> bool:
    return Path(module.__file__ or "").resolve().is_relative_to(folder)


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
    for spec in actors.values():
        problem = unbatched(spec)
        if problem:
            raise DirectiveError(f"{_where(spec.target)}: {problem}")
    if not actors:
        raise AppError(f"{path}: there is no @agent, @tool or @workflow in it; unmodified Python needs a nalar.toml")
    return App(path, actors)


def unbatched(spec: ActorSpec) -> str:
    """What is wrong with an actor that is `batchable`, and has no function that takes a batch; empty if nothing is."""
    if not spec.directives.batchable or any(method.batch is not None for method in spec.methods.values()):
        return ""
    wanted = " or ".join(f"`{method.function.__name__}_batch`" for method in spec.methods.values())
    return f"{spec.kind} {spec.name!r}: 'batchable' wants a function {wanted} beside it, which takes a list and returns one"


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
            lines = {entry.module: entry.source_line for entry in reversed(self._manifest.actors)}
            for name in sorted(lines, key=lambda name: self._file_of(name) is not None):
                module = _imported(name, self._file_of(name), f"{self._manifest.path}:{lines[name]}: ")
                self._replace_in(module)
        except BaseException:
            self._finder.uninstall()
            raise
        for entry in self._manifest.actors:
            problem = unbatched(self._actors[entry.name])
            if problem:
                self._finder.uninstall()
                raise DirectiveError(f"{self._manifest.path}:{entry.line}: {problem}")
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
            try:
                moves.stand_in(target, replacement)
            except (AttributeError, TypeError):
                where = f"{self._manifest.path}:{entry.source_line}: {entry.kind} {entry.name!r}"
                raise DirectiveError(
                    f"{where}: {entry.attribute!r} is built into Python or an extension: "
                    f"write a {'class' if entry.kind == 'agent' else 'function'} of your own around it"
                ) from None
            setattr(holder, last, replacement)

    def _member(self, entry: ActorEntry, holder: Any, name: str) -> Any:
        try:
            return getattr(holder, name)
        except AttributeError:
            names: list[str] = [*map(str, dir(holder))]
            known = tuple(found for found in names if not found.startswith("_"))
            message = f"module {entry.module!r} has no {entry.attribute!r}: {did_you_mean(name, known)}"
            raise AppError(f"{self._manifest.path}:{entry.source_line}: {message}") from None

    def _spec(self, entry: ActorEntry, target: Any) -> ActorSpec:
        decorated = spec_of(target)
        try:
            if decorated is not None:
                return ActorSpec(entry.name, decorated.kind, decorated.target, entry.directives, decorated.methods)
            if entry.kind == "agent":
                return self._agent_spec(entry, target)
            if isinstance(target, type):
                raise DirectiveError(f"{entry.kind} {entry.name!r}: {entry.attribute!r} is a class; name it in [agents]")
            if not callable(target) or not hasattr(target, "__qualname__"):
                raise DirectiveError(f"{entry.kind} {entry.name!r}: {entry.attribute!r} is not a function")
            return function_spec(entry.kind, entry.name, target, entry.directives, transparent=True)
        except DirectiveError as error:
            raise DirectiveError(f"{self._manifest.path}:{entry.source_line}: {error}") from None

    def _agent_spec(self, entry: ActorEntry, target: Any) -> ActorSpec:
        if not isinstance(target, type):
            advice = "is a function; name it in [tools] or [workflows]" if callable(target) else "is not a class"
            raise DirectiveError(f"agent {entry.name!r}: {entry.attribute!r} {advice}")
        cls: type[Any] = target
        methods = {name: MethodSpec(name, function, bound=True) for name, function in public_functions(cls).items()}
        spec = ActorSpec(entry.name, "agent", cls, entry.directives, methods, transparent=True)
        if entry.directives.stateful is None and not spec.directives.batchable and not spec.managed:
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
            tree = parse(textwrap.dedent("".join(source)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "__init__" and node.args.args:
                line = _change_of(node, node.args.args[0].arg)
                if line:
                    return f"{Path(inspect.getsourcefile(base) or '?').name}:{first_line + line - 1}"
    return ""


def _change_of(function: ast.FunctionDef | ast.AsyncFunctionDef, this: str) -> int:
    """The first line on which a function changes what its parameter `this` holds; 0 if there is none."""
    nodes = [node for node in ast.walk(function) if isinstance(node, (ast.stmt, ast.expr))]
    names = {this, *_aliases(nodes, this)}
    lines = [node.lineno for node in nodes if any(_is_part_of(target, names) for target in _changed_by(node, this, names))]
    return min(lines, default=0)


def _aliases(nodes: list[ast.stmt | ast.expr], this: str) -> Iterator[str]:
    """Names that are bound to something that `this` holds."""
    for node in nodes:
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and _is_part_of(node.iter, {this}):
            yield node.target.id
        if isinstance(node, ast.Assign) and _is_part_of(node.value, {this}):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _changed_by(node: ast.stmt | ast.expr, this: str, names: set[str]) -> list[ast.expr]:
    """The expressions that a node assigns to, or calls something that changes them."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        return [node.target]
    if not isinstance(node, ast.Call):
        return []
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    if isinstance(called, ast.Attribute) and name in _MUTATORS:
        return [_held(called.value, names - {this})]  # `self.add(x)` calls a method of its own
    return [_held(node.args[0], names)] if name in _MUTATING_FUNCTIONS and node.args else []


def _held(node: ast.expr, names: set[str]) -> ast.expr:
    """What is changed where `node` is the object itself: for a bare name, something that it holds."""
    return ast.Attribute(node, "", ast.Load()) if isinstance(node, ast.Name) and node.id in names else node


def _is_part_of(target: ast.expr, names: Collection[str]) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return any(_is_part_of(element, names) for element in target.elts)
    inside = target
    while isinstance(inside, (ast.Attribute, ast.Subscript, ast.Starred)):
        inside = inside.value
    return inside is not target and isinstance(inside, ast.Name) and inside.id in names


def _imported(name: str, file: Path | None, where: str = "") -> ModuleType:
    """Imports a module; one of the same name from another file makes room. `where` is who asks for it, for messages."""
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
            message = f"{where}there is no module {name!r}: it is looked for beside the app's file, then on Python's path"
            raise AppError(message) from None
        raise _import_failure(name, error) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failure(name, error) from error


def _import_failure(name: str, error: BaseException) -> AppError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return AppError(f"{where}module {name!r} cannot be imported: {said}")


def _where(target: Callable[..., Any]) -> str:
    try:
        _, line = inspect.getsourcelines(target)
        return f"{Path(inspect.getsourcefile(target) or '?').name}:{line}"
    except (OSError, TypeError):
        return repr(target)
