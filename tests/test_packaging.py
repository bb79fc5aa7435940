from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
FOLDERS = {"nalar_mq": "nalar_mq", "agents": "nalar_mq/agents", "controllers": "nalar_mq/controllers"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")


def run(*command: str | Path, cwd: Path, timeout_s: float = 100, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(folder: Path) -> Path:
    """A copy of the checkout, so that nothing of earlier builds gets into one."""
    copy = folder / "source"
    copy.mkdir()
    for part in FOLDERS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "compile_hot_path.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout."""
    copy = copied(tmp_path_factory.mktemp("build"))
    run(*PIP, "wheel", *OFFLINE, "-w", "out", ".", cwd=copy)
    return next((copy / "out").glob("nalar_mq-*.whl"))


def test_the_wheel_holds_every_module_once_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"{target}/{path.name}" for folder, target in FOLDERS.items() for path in (ROOT / folder).glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert len(names) == len(set(names))
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"nalar_mq"}
    assert "nalar_mq/py.typed" in names


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "nalar = nalar_mq.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_the_installed_wheel_is_imported_from_where_it_lies(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "import nalar_mq.controllers.supervision as s, nalar_mq.agents as a, nalar_mq as n; print(s.__file__, a.__file__)"
    printed = run(sys.executable, "-P", "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert all(path.startswith(str(tmp_path / "site" / "nalar_mq")) for path in printed.split())


USER = """\
from nalar_mq import Future, tool


@tool
async def search(query: str) -> list[str]:
    return [query]


found: Future[list[str]] = search("whales")
"""


def test_type_checkers_see_an_editable_install(tmp_path):
    copy, user = copied(tmp_path), tmp_path / "user"
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet")
    alone = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(*pip, *alone, "--editable", copy, cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))  # where setuptools is
    user.mkdir()
    (user / "search.py").write_text(USER)
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "search.py"]
    done = subprocess.run(command, cwd=user, env=outside, capture_output=True, text=True, timeout=300)
    assert "Success" in done.stdout, done.stdout + done.stderr


def test_links_show_the_two_folders_inside_the_package():
    for name in ("agents", "controllers"):
        assert (ROOT / "nalar_mq" / name).is_symlink()
        assert (ROOT / "nalar_mq" / name).resolve() == ROOT / name


def test_vllm_is_not_among_what_setup_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["local"]
    assert not [line for line in wanted if "vllm" in line]


def test_scripts_can_be_run():
    for name in ("setup", "check", "test", "bench", "demo"):
        assert os.access(ROOT / "scripts" / name, os.X_OK), name
        run("bash", "-n", ROOT / "scripts" / name, cwd=ROOT)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
