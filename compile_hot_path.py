"""A wheel in which the modules on the path of a call are compiled by mypyc: `NALAR_COMPILE=1 pip wheel .`.

What runs is the same source. Where it is installed, `nalar_mq/channel.py` and the others lie beside an extension module of the
same name, which Python imports in its place, and all of those share the library `nalar_mq__mypyc` at the top. Without the
variable nothing of this happens: a wheel, and a checkout in any case, is plain Python.

What is compiled: `MODULES`. All others stay plain Python: what crosses the wire, since msgspec is compiled, what runs seldom.

What is rewritten: `NATIVE`, structs of msgspec that never travel. An interpreter makes a struct in a tenth less time than an
object of a class with an `__init__`, so the source has structs; compiled code reaches the fields of a class of its own without
asking Python, and those of a struct only as an interpreter does. So each becomes a class with the same fields and an `__init__`
that takes them in the same order. All is done in a copy, in a temporary folder, where every line stays where it is: what a
traceback names is found in the source.

What compiled code gives up:

- its frames in a traceback have line and file, the latter as `nalar_mq/calls.py`, but no variables, and debuggers and profilers
  of Python do not step into it;
- the modules' functions, classes and methods cannot be replaced from outside (a test that patches one changes nothing);
- a generator expression that is an argument is made whole before the call: a list in its place;
- an argument of another type than the annotation says is a `TypeError`, where an interpreter would go on until it mattered;
- its classes have no `__slots__` to look at, and the rewritten ones neither `repr` of fields nor `msgspec.structs`.

What it gets wrong, so that a module with it is not compiled (`check`):

- where a `finally` awaits or yields, what another call has failed with may be raised at its end, as `async with` never does;
- an object of a generic class, or of one derived from a class of somebody else's, can be referred to weakly, and says nothing
  when it goes. Futures are generic, and stay plain Python.

Needed are a C compiler, the headers of Python, and some minutes.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import os
import shlex
import shutil
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

MODULES = (
    *("call_context", "calls", "changes", "channel", "crossings", "entries", "execution", "host", "invoker", "mailbox"),
    *("nats_reader", "placement", "places", "replica", "runner", "values", "witness"),
)
NATIVE = {
    "call_context": ("CallContext",),
    "changes": ("Tracked", "_Row"),
    "entries": ("Entry", "JobPart"),
    "execution": ("Execution", "Resumed"),
    "mailbox": ("_Entry",),
}
_SUSPENDS = (ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith)
_KNOWN_BASES = {"Exception", "NamedTuple", "Protocol", "enum.Enum", "msgspec.Struct"}
_HERE = Path(__file__).resolve().parent
_MYPY = "[mypy]\npython_version = {version}\nignore_missing_imports = True\ncache_dir = {cache}\n"


def arguments() -> dict[str, Any]:
    """What `setup` is called with. Everything that is made on the way goes into a folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="nalar-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dependencies = tomllib.loads((_HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {
        "setup_requires": ["mypy[mypyc]>=2.4,<3", *dependencies],  # mypyc reads their types, too
        "ext_modules": [Extension("nalar_mq__mypyc", [])],  # the others are known when mypyc has run
        "cmdclass": {"build_ext": _Compile, "editable_wheel": _NotEditable},
        "options": {"build": {"build_base": folder}},
    }


class _NotEditable(editable_wheel):
    def run(self) -> None:
        raise SystemExit("NALAR_COMPILE=1 makes a wheel, not an editable installation: that runs the source as it is")


class _Compile(build_ext):
    def run(self) -> None:
        if self.inplace or self.editable_mode:
            raise SystemExit("NALAR_COMPILE=1 makes a wheel, and puts nothing into the checkout: `pip wheel .`")
        _check_compiler()
        self.distribution.ext_modules = _extensions(Path(self.build_temp).resolve())
        self.reinitialize_command(self).ensure_finalized()  # with what is known only now
        super().run()


def _check_compiler() -> None:
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(command) is None:
        raise SystemExit(f"NALAR_COMPILE=1 needs a C compiler, and there is no {command!r}: install one, or leave it out")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit("NALAR_COMPILE=1 needs the headers of Python (python3-dev in Debian): install them, or leave it out")


def _extensions(folder: Path) -> list[Extension]:
    """The modules as C, made in that folder from a copy of the package."""
    from mypyc.build import mypycify  # there only where it is needed

    copy = folder / "source"
    shutil.copytree(
        _HERE / "nalar_mq", copy / "nalar_mq", ignore=shutil.ignore_patterns("__pycache__", "agents", "controllers")
    )
    for name, classes in NATIVE.items():
        file = copy / "nalar_mq" / f"{name}.py"
        file.write_text(with_native(file.read_text(encoding="utf-8"), classes), encoding="utf-8")
    for name in MODULES:
        check(name, (copy / "nalar_mq" / f"{name}.py").read_text(encoding="utf-8"))
    settings = copy / "mypy.ini"
    settings.write_text(_MYPY.format(version=sysconfig.get_python_version(), cache=folder / "mypy"), encoding="utf-8")
    files = [f"nalar_mq/{name}.py" for name in MODULES]
    with contextlib.chdir(copy):  # tracebacks name files as they are named here
        extensions = mypycify(
            ["--config-file", str(settings), *files],
            opt_level="2",
            debug_level="0",
            target_dir=str(folder / "c"),
            group_name="nalar_mq",
        )
    for extension in extensions:
        extension.extra_compile_args.append("-Wno-error")  # which mypyc asks for, and other compilers find other things
    return extensions


def check(name: str, source: str) -> None:
    """Refuses a module with what mypyc gets wrong."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    known = _KNOWN_BASES | {node.name for node in classes}
    for node in classes:
        if not {*map(ast.unparse, node.bases)} <= known:
            raise SystemExit(f"nalar_mq/{name}.py:{node.lineno}: class {node.name} has a base with which it cannot be compiled")
    for line in (line for node in ast.walk(tree) if isinstance(node, ast.Try) for line in node.finalbody):
        if any(isinstance(part, _SUSPENDS) for part in ast.walk(line)):
            raise SystemExit(f"nalar_mq/{name}.py:{line.lineno}: a `finally` that awaits or yields cannot be compiled")


def with_native(source: str, classes: tuple[str, ...]) -> str:
    """The source with those structs as classes with an `__init__`; no line of it is elsewhere than before."""
    lines = source.split("\n")
    structs = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for struct in (structs[name] for name in classes):
        fields = [node for node in struct.body if isinstance(node, ast.AnnAssign)]
        names = [ast.unparse(field.target) for field in fields]
        first, last = fields[0].lineno - 1, fields[-1].end_lineno or 0
        made = [
            f"    def __init__(self, {', '.join(map(ast.unparse, fields))}) -> None:",
            f"        {'; '.join(f'self.{name} = {name}' for name in names)}",
        ]
        lines[struct.lineno - 1] = f"class {struct.name}:"
        lines[first:last] = [*made, *[""] * (last - first - len(made))]
    return "\n".join(lines)
