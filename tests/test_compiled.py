"""A wheel with compiled hot modules: what is rewritten for it, when it is refused, and that it does the same."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_packaging import OFFLINE, PIP, ROOT, copied, run

pytestmark = pytest.mark.skipif(not (ROOT / "compile_hot_path.py").exists(), reason="needs a checkout")

STRUCTS = '''
import msgspec

class Other(msgspec.Struct, frozen=True):
    a: int

class Point(msgspec.Struct, eq=False, gc=False):
    """Where it is.

    Attributes:
        y: upwards.
    """

    x: int
    y: float = 1.5
    names: "list[str] | None" = None

    @property
    def sum(self) -> float:
        return self.x + self.y
'''
# The promises of channels, queues, futures and streams, real workflows and their tracebacks, and workers that are killed.
SHOWN = (
    *("test_channel.py", "test_mailbox.py", "test_future.py", "test_calls_edge.py", "test_claims.py"),
    *("test_corpus_runtime.py", "test_unmodified.py"),
    *("test_processes.py::test_a_worker_killed_under_load", "test_fire.py::test_killed_workers"),
)


@pytest.fixture(scope="module")
def hot_path() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_hot_path", ROOT / "compile_hot_path.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_struct_becomes_a_class_that_is_made_in_the_same_way(hot_path: ModuleType) -> None:
    rewritten = hot_path.with_native(STRUCTS, ("Point",))
    found: dict[str, Any] = {}
    exec(rewritten, found)
    point = found["Point"](2)
    assert (point.x, point.y, point.names, point.sum) == (2, 1.5, None, 3.5)
    other = found["Point"](1, names=["a"], y=2.0)
    assert (other.x, other.y, other.names, other.sum) == (1, 2.0, ["a"], 3.0)
    assert not hasattr(found["Point"], "__struct_fields__")
    assert found["Other"].__struct_fields__ == ("a",)


def test_no_line_of_the_source_is_elsewhere_than_before(hot_path: ModuleType) -> None:
    for name, classes in hot_path.NATIVE.items():
        source = (ROOT / "nalar_mq" / f"{name}.py").read_text()
        rewritten = hot_path.with_native(source, classes)
        functions, others = ([*map(_placed, _functions(text))] for text in (source, rewritten))
        assert [place for place in others if place[0] != "__init__"] == [
            place for place in functions if place[0] != "__init__"
        ], name
        assert len(others) == len(functions) + len(classes)
        assert rewritten.count("\n") == source.count("\n")


def _functions(text: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def _placed(function: ast.FunctionDef) -> tuple[str, int, str]:
    return function.name, function.lineno, ast.dump(function)


def test_all_that_is_compiled_and_rewritten_is_there(hot_path: ModuleType) -> None:
    assert {name for name in hot_path.MODULES if not (ROOT / "nalar_mq" / f"{name}.py").exists()} == set()
    assert hot_path.NATIVE.keys() <= set(hot_path.MODULES)


def test_no_compiled_module_has_what_cannot_be_compiled(hot_path: ModuleType) -> None:
    for name in hot_path.MODULES:
        hot_path.check(name, (ROOT / "nalar_mq" / f"{name}.py").read_text())
    with pytest.raises(SystemExit, match=r"nalar_mq/wrong\.py:5"):
        hot_path.check("wrong", "async def f(g):\n    try:\n        g()\n    finally:\n        await g.aclose()\n")
    for base in ("Generic[T]", "asyncio.StreamReader"):
        with pytest.raises(SystemExit, match=r"wrong\.py:2: class A has a base"):
            hot_path.check("wrong", f"class B(Exception): ...\nclass A({base}): ...\n")


def refused(folder: Path, *command: str, **env: str) -> str:
    environment = os.environ | {"NALAR_COMPILE": "1", "TMPDIR": str(folder)} | env
    source = copied(folder)
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0, done.stdout
    assert not list(folder.rglob("*.so"))
    return done.stdout + done.stderr


def test_without_a_c_compiler_it_says_so(tmp_path: Path) -> None:
    said = refused(tmp_path, *PIP, "wheel", *OFFLINE, "-w", "out", ".", CC="absent-cc")
    assert "needs a C compiler, and there is no 'absent-cc'" in said


def test_nothing_compiled_gets_into_a_checkout(tmp_path: Path) -> None:
    said = refused(tmp_path, *PIP, "install", *OFFLINE, "--target", "out", "--editable", ".")
    assert "makes a wheel, not an editable installation" in said
    again = tmp_path / "again"
    again.mkdir()
    said = refused(again, sys.executable, "setup.py", "build_ext", "--inplace")
    assert "puts nothing into the checkout" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_compiled_wheel_runs_workflows_and_outlives_a_killed_worker(tmp_path: Path) -> None:
    """Builds it from this very checkout, installs it where nothing else of us is, and runs tests of ours with it."""
    wheels = tmp_path / "wheels"
    before = {*ROOT.rglob("*.so")}
    run(*PIP, "wheel", *OFFLINE, "-w", str(wheels), ".", cwd=ROOT, NALAR_COMPILE="1", timeout_s=3000)
    assert {path for path in ROOT.rglob("*.so") if ".venv" not in path.parts} <= before
    python = compiled_python(next(wheels.glob("nalar_mq-*.whl")), tmp_path / "venv")
    program = "import nalar_mq, nalar_mq.channel as c; print(nalar_mq.__file__, c.__file__)"
    package, channel = run(python, "-P", "-c", program, cwd=tmp_path, PYTHONPATH="").split()
    assert package.startswith(str(tmp_path / "venv"))
    assert channel.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    assert "(compiled)" in run(python.parent / "nalar", "version", cwd=tmp_path, PYTHONPATH="")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", elsewhere / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    tests = [f"tests/{name}" for name in SHOWN]
    options = ("-m", "not slow", "-q", "-p", "no:cacheprovider")
    print(run(python, "-P", "-m", "pytest", *options, *tests, cwd=elsewhere, timeout_s=900, PYTHONPATH=str(elsewhere)))


def compiled_python(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment with that wheel and all that is installed here, but for what is editable here."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", str(wheel))
    run(*PIP, "--python", str(python), *install, cwd=folder, PYTHONPATH="")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "what-is-here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "bin" / "nats-server").symlink_to(Path(sysconfig.get_path("scripts")) / "nats-server")
    return python
