from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nalar_mq import runs
from nalar_mq.finder import RewritingFinder
from tests import actor_threads

FOLDER = Path(__file__).parent / "corpus"


def plainly(name: str) -> ModuleType:
    """A file of the corpus as an ordinary module."""
    spec = importlib.util.spec_from_file_location(f"plain_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PLAIN = plainly("patterns")
NAMES = [pattern.__name__ for pattern in PLAIN.PATTERNS]


@pytest.fixture(scope="module")
def rewritten() -> Any:
    calls = actor_threads.Calls()
    actors = {actor.__name__ for actor in [*PLAIN.TOOLS, *PLAIN.AGENTS]}
    finder = RewritingFinder([FOLDER], on_module=lambda m: actor_threads.stand_in(m, calls), plain=lambda _: actors)
    sys.path.insert(0, str(FOLDER))
    finder.install()
    try:
        import patterns  # type: ignore[import-not-found]

        yield patterns
    finally:
        finder.uninstall()
        sys.path.remove(str(FOLDER))
        del sys.modules["patterns"]


def _outcome(run: Any) -> tuple[str, str]:
    try:
        return "value", repr(run())
    except Exception as error:
        return "error", f"{type(error).__qualname__}{error.args!r}"


def test_corpus_is_large_enough() -> None:
    assert len(NAMES) >= 80
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rewritten_gives_what_plain_python_gives(name: str, rewritten: ModuleType) -> None:
    expected = _outcome(getattr(PLAIN, name))
    found = _outcome(lambda: runs.run(getattr(rewritten, name)))
    assert found == (expected[0], expected[1].replace("plain_patterns", "patterns"))
