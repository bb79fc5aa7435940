"""`nalar.toml`: which plain classes and functions are agents, tools and workflows, and their directives.

    [runtime]                       optional: how `nalar up` and `nalar run` start it
    namespace = "nalar"
    workers = 2
    engine_url = "http://host:8000" an OpenAI-compatible model server, unless the environment names one
    engine_model = "name"           its model

    [agents.planner]                the name that others call
    source = "flow:Planner"         module:attribute; the module is looked for beside this file first
    timeout_s = 30                  directives, see `nalar_mq.directives`

    [tools.search]
    source = "flow:search"

    [workflows.answer]
    source = "flow:answer"

Whatever is not known is refused, with the line it stands on.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

import msgspec

from nalar_mq.address import is_token
from nalar_mq.directives import DIRECTIVE_NAMES, Directives, Kind, conflicts, did_you_mean, value_problems
from nalar_mq.errors import DirectiveError, ManifestError
from nalar_mq.toml_lines import KeyPath, TomlLines

MANIFEST_NAME: Final = "nalar.toml"
_KINDS: Final[dict[str, Kind]] = {"agents": "agent", "tools": "tool", "workflows": "workflow"}
_TABLES: Final = (*_KINDS, "runtime")
_SOURCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_MAX_SIZE_BYTES: Final = 1 << 20


class ActorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One actor of a manifest.

    Attributes:
        name: what others call; a token.
        module: dotted name of the module, looked for beside the manifest first.
        attribute: dotted name of the class or function in it.
        line: where its table begins, for messages.
        source_line: where its `source` stands.
    """

    kind: Kind
    name: str
    module: str
    attribute: str
    directives: Directives
    line: int
    source_line: int


class RuntimeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The table `[runtime]`; None and empty text stand for what is not given."""

    namespace: str = ""
    workers: int | None = None
    engine_url: str = ""
    engine_model: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest that has been checked as far as that goes without importing what it names."""

    path: Path
    actors: tuple[ActorEntry, ...]
    runtime: RuntimeEntry = RuntimeEntry()

    @property
    def folder(self) -> Path:
        """Where the modules it names are looked for first."""
        return self.path.parent


def load_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest; `path` is the file or the folder that holds `nalar.toml`.

    Raises:
        ManifestError: it cannot be read, is not TOML, or holds something unknown, wrong or double.
        DirectiveError: a directive is unknown, wrong or contradicts another one; the message begins with file and line.
    """
    file = path / MANIFEST_NAME if path.is_dir() else path
    return _Reader(file, _read_text(file)).manifest()


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_SIZE_BYTES:
            raise ManifestError(f"larger than {_MAX_SIZE_BYTES} bytes, which no manifest needs", str(file))
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ManifestError("there is no such file", str(file)) from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error.reason} at byte {error.start}", str(file)) from None
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror}", str(file)) from None


class _Reader:
    """Turns the text of one manifest into a `Manifest`; knows the line of every key for messages."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._lines = TomlLines(text)
        try:
            self._tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"\(at line (\d+), column \d+\)", str(error))
            raise ManifestError(f"not TOML: {error}", str(file), int(at[1]) if at else len(text.splitlines())) from None
        except RecursionError:
            raise ManifestError("not TOML that can be read: nested too deeply", str(file)) from None

    def manifest(self) -> Manifest:
        for table in self._tables:
            if table not in _TABLES:
                self._refuse((table,), f"unknown table or key {table!r}: {did_you_mean(table, _TABLES)}")
        actors = tuple(self._actors())
        if not actors:
            self._refuse((), 'names no actor: add a table such as [workflows.NAME] with source = "module:function"')
        return Manifest(path=self._file.resolve(), actors=actors, runtime=self._runtime())

    def _actors(self) -> Iterator[ActorEntry]:
        seen: dict[str, tuple[str, str]] = {}
        for table, kind in _KINDS.items():
            for name, values in self._table((table,), self._tables.get(table, {})).items():
                key = (table, name)
                if name in seen:
                    first = f"{'.'.join(seen[name])} on line {self._lines.of(seen[name])}"
                    self._refuse(key, f"two actors are named {name!r}: here and {first}")
                seen[name] = key
                yield self._actor(key, kind, values)

    def _actor(self, key: tuple[str, str], kind: Kind, values: object) -> ActorEntry:
        name = key[1]
        if not is_token(name):
            self._refuse(key, f"{name!r} cannot be the name of an actor: 1 to 128 of A-Z, a-z, 0-9, '_' and '-' can")
        table = dict(self._table(key, values))
        if "source" not in table:
            self._refuse(key, f"{kind} {name!r} has no 'source': add source = \"module:attribute\"")
        module, attribute = self._source((*key, "source"), table.pop("source"))
        directives = self._directives(key, kind, table)
        line, source_line = self._lines.of(key), self._lines.of((*key, "source"))
        return ActorEntry(
            kind=kind,
            name=name,
            module=module,
            attribute=attribute,
            directives=directives,
            line=line,
            source_line=source_line,
        )

    def _source(self, key: tuple[str, ...], value: object) -> tuple[str, str]:
        if not isinstance(value, str):
            self._refuse(key, f"'source' must be text such as \"flow:answer\", not {value!r}")
        is_file = ".py:" in value
        if is_file or _SOURCE.fullmatch(value) is None:
            hint = " (the name of the module, without .py)" if is_file else ""
            self._refuse(key, f'\'source\' must be "module:attribute", such as "flow:answer", not {value!r}{hint}')
        module, _, attribute = value.partition(":")
        return module, attribute

    def _directives(self, key: tuple[str, str], kind: Kind, table: Mapping[str, Any]) -> Directives:
        said = f"{kind} {key[1]!r}: "
        for problem in value_problems(table):
            text = problem.text
            if problem.key not in DIRECTIVE_NAMES:
                text = f"unknown key {problem.key!r}: {did_you_mean(problem.key, ('source', *DIRECTIVE_NAMES))}"
            self._refuse_directive((*key, problem.key), said + text)
        directives = Directives.of(table)
        for problem in conflicts(directives, kind):
            self._refuse_directive((*key, problem.key), said + problem.text)
        return directives.validated(kind, key[1])

    def _runtime(self) -> RuntimeEntry:
        table = self._table(("runtime",), self._tables.get("runtime", {}))
        for name, value in table.items():
            key = ("runtime", name)
            if name not in _RUNTIME_KEYS:
                self._refuse(key, f"unknown key {name!r} in [runtime]: {did_you_mean(name, tuple(_RUNTIME_KEYS))}")
            wanted_type, wanted_text = _RUNTIME_KEYS[name]
            try:
                msgspec.convert(value, wanted_type)
            except msgspec.ValidationError:
                self._refuse(key, f"{name!r} must be {wanted_text}, not {value!r}")
        runtime = msgspec.convert(dict(table), RuntimeEntry)
        if runtime.namespace and not is_token(runtime.namespace):
            self._refuse(("runtime", "namespace"), f"{runtime.namespace!r} cannot be a namespace: use A-Z, a-z, 0-9, '_', '-'")
        if runtime.engine_model and not runtime.engine_url:
            self._refuse(("runtime", "engine_model"), "'engine_model' needs 'engine_url': which server has that model?")
        if runtime.workers is not None and runtime.workers < 1:
            self._refuse(("runtime", "workers"), f"'workers' must be 1 or more, not {runtime.workers}")
        return runtime

    def _table(self, key: KeyPath, value: object) -> Mapping[str, Any]:
        if not _is_table(value):
            self._refuse(key, f"{'.'.join(key)} must be a table, not {value!r}")
        return value

    def _refuse(self, key: KeyPath, message: str) -> NoReturn:
        raise ManifestError(message, str(self._file), self._lines.of(key))

    def _refuse_directive(self, key: KeyPath, message: str) -> NoReturn:
        raise DirectiveError(f"{self._file}:{self._lines.of(key)}: {message}")


_RUNTIME_KEYS: Final[dict[str, tuple[Any, str]]] = {
    "namespace": (str, "text"),
    "workers": (int, "a whole number"),
    "engine_url": (str, "text"),
    "engine_model": (str, "text"),
}


def _is_table(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
