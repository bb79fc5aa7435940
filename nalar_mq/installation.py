"""What is installed beside us, seen without importing any of it: this must work where a package is missing."""

from __future__ import annotations

import operator
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec
from typing import Final

from nalar_mq.exits import EXIT_CONFIG, EXIT_OK

_PACKAGE: Final = "nalar-mq"
_HOT_MODULE: Final = "nalar_mq.channel"  # one of those that `compile_hot_path.py` compiles
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?(?P<limits>[^;]*);?(?P<condition>.*)")
_LIMIT = re.compile(r"(>=|<=|==|!=|>|<)\s*([0-9.]+)")
_COMPARED: Final[dict[str, Callable[[list[int], list[int]], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class State(Enum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at.
        state: `WRONG` if nothing works without it, `WARNING` if something does not.
        found: what is there.
        advice: what to do about it; empty if nothing needs to be done.
        code: the exit code that this finding calls for.
    """

    check: str
    state: State
    found: str
    advice: str = ""
    code: int = EXIT_OK

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.state.value:<8} {self.check}: {self.found}{advice}"


def exit_code(findings: Sequence[Finding]) -> int:
    """The code of the first finding that is wrong; 0 if none is."""
    return next((finding.code for finding in findings if finding.state is State.WRONG), EXIT_OK)


def examine_installation() -> list[Finding]:
    """Findings about Python and the packages that ours requires."""
    try:
        ours = metadata.metadata(_PACKAGE)
    except metadata.PackageNotFoundError:
        return [
            examine_python(platform.python_version(), ""),
            Finding(_PACKAGE, State.WARNING, "runs without being installed", "`pip install` its folder"),
        ]
    python = examine_python(platform.python_version(), ours["Requires-Python"])
    code = "its hot modules are compiled" if is_compiled() else "plain Python"
    ours_found = Finding(_PACKAGE, State.OK, f"{ours['Version']}, {code}")
    return [python, ours_found, *examine_packages(metadata.requires(_PACKAGE) or [], _installed_version)]


def is_compiled() -> bool:
    """True if the code that runs was compiled when it was built: `NALAR_COMPILE=1 pip install` of a checkout."""
    spec = find_spec(_HOT_MODULE)
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)


def examine_python(version: str, limits: str) -> Finding:
    """Whether Python is one that we run on; `limits` as in `>=3.11`."""
    found = f"{platform.python_implementation()} {version}"
    if is_within(version, limits):
        return Finding("python", State.OK, found)
    return Finding("python", State.WRONG, found, f"install Python {limits}", EXIT_CONFIG)


def examine_packages(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """One finding for each requirement that belongs to no extra.

    One that holds under a condition only can be done without, so its absence is a warning.
    """
    for requirement in requirements:
        parts = _REQUIREMENT.fullmatch(requirement)
        if parts is None or "extra ==" in parts["condition"]:
            continue
        name, limits = parts["name"], parts["limits"].strip()
        version = version_of(name)
        if version is not None and is_within(version, limits):
            yield Finding(name, State.OK, version)
            continue
        state, code = (State.WARNING, EXIT_OK) if parts["condition"] else (State.WRONG, EXIT_CONFIG)
        found = f"not installed, {limits} is wanted" if version is None else f"{version}, {limits} is wanted"
        yield Finding(name, state, found, f"`pip install '{name}{limits}'`", code)


def is_within(version: str, limits: str) -> bool:
    """True if the numbers of `version` satisfy all of `limits`, written as in `>=2.16,<3`."""
    return all(_COMPARED[sign](_numbers(version), _numbers(bound)) for sign, bound in _LIMIT.findall(limits))


def _numbers(version: str) -> list[int]:
    numbers = [int(number) for number in re.findall(r"\d+", (re.match(r"[\d.]*", version) or [""])[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
