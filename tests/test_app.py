from __future__ import annotations

import itertools
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from nalar_mq.app import App, changes_itself, load_app
from nalar_mq.errors import AppError, ConfigError, DirectiveError, ManifestError

Write = Callable[..., Path]
TOOL = "[tools.f]\nsource = 'flow:f'\n"


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes an app into a folder of its own; what its loading changed is undone afterwards."""
    path, modules = list(sys.path), dict(sys.modules)
    written: list[Path] = []

    def app(manifest: str | None, **files: str) -> Path:
        folder = tmp_path / f"app{len(written)}"
        written.append(folder)
        folder.mkdir()
        if manifest is not None:
            (folder / "nalar.toml").write_text(manifest)
        for name, text in files.items():
            file = folder / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return folder

    yield app
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in modules]:
        del sys.modules[name]


def loaded(path: Path) -> App:
    app = load_app(path)
    app.unload()
    return app


def test_an_app_may_be_loaded_twice(write: Write) -> None:
    folder = write(TOOL, flow="def f(): return 1")
    first, second = loaded(folder), loaded(folder / "nalar.toml")
    assert first.actors["f"].target is second.actors["f"].target
    assert sys.modules["flow"].f() == 1


def test_apps_with_modules_of_the_same_names_are_apart(write: Write) -> None:
    folders = [write(TOOL, flow="import part\ndef f(): return part.X", part=f"X = {x}") for x in (1, 2)]
    assert [loaded(folder).actors["f"].target() for folder in [*folders, folders[0]]] == [1, 2, 1]


def test_a_guarded_main_does_not_run(write: Write) -> None:
    folder = write(TOOL, flow="def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(f())")
    assert loaded(folder).actors["f"].target() == 1


def test_packages_and_relative_imports(write: Write) -> None:
    manifest = "[tools.f]\nsource = 'kit.flow:f'\n[workflows.w]\nsource = 'kit.flow:w'\n"
    flow = "from . import more\nfrom .more import f, g\ndef w(): return f(1) + more.g(2)"
    more = "def f(x): return x\ndef g(x): return x"
    folder = write(manifest, kit____init__="", kit__flow=flow, kit__more=more)
    app = loaded(folder)
    assert app.actors["w"].target() == 3
    assert app.actors["f"].target.__module__ == "kit.more"


def test_a_nested_attribute(write: Write) -> None:
    flow = "class Kit:\n    class Inner:\n        def m(self): return 1\n    @staticmethod\n    def f(): return 2"
    app = loaded(write("[agents.inner]\nsource = 'flow:Kit.Inner'\n[tools.f]\nsource = 'flow:Kit.f'", flow=flow))
    assert set(app.actors["inner"].methods) == {"m"}
    assert sys.modules["flow"].Kit.f() == 2


WRONG = [
    ("a syntax error", TOOL, {"flow": "x = 1\ndef f(:"}, AppError, r"flow\.py:2: invalid syntax$"),
    (
        "a syntax error in what it imports",
        TOOL,
        {"flow": "import part\ndef f(): ...", "part": "x = = 1"},
        AppError,
        r"part\.py:1: invalid syntax$",
    ),
    ("no such import", TOOL, {"flow": "\nimport nowhere_at_all"}, AppError, r"flow\.py:2: .*No module named 'nowhere_at_all'$"),
    ("no such name", TOOL, {"flow": "from os import nothing_such"}, AppError, r"flow\.py:1: .*cannot import name"),
    ("an exception", TOOL, {"flow": "x = 1\nx / 0"}, AppError, r"flow\.py:2: .*ZeroDivisionError: division by zero$"),
    ("many lines", TOOL, {"flow": "raise ValueError('a\\nb')"}, AppError, r"flow\.py:1: .*ValueError: a b$"),
    ("an exit", TOOL, {"flow": "import sys\nsys.exit(3)"}, AppError, r"flow\.py:2: .*SystemExit: 3$"),
    (
        "a circle",
        TOOL,
        {"flow": "import part\ndef f(): ...", "part": "from flow import f"},
        AppError,
        r"part\.py:1: .*circular",
    ),
    ("no attribute", "\n" + TOOL, {"flow": "def ff(): ..."}, AppError, r"nalar\.toml:3: .*no 'f': did you mean 'ff'\?$"),
    ("no module", TOOL, {"other": ""}, AppError, r"nalar\.toml:2: there is no module 'flow'"),
    (
        "a function as agent",
        TOOL.replace("tools", "agents"),
        {"flow": "def f(): ..."},
        DirectiveError,
        r"toml:2: .*is a function",
    ),
    ("a class as tool", TOOL, {"flow": "class f: ..."}, DirectiveError, r"nalar\.toml:2: .*is a class; name it in \[agents\]$"),
    ("a value as tool", TOOL, {"flow": "f = 3"}, DirectiveError, r"nalar\.toml:2: .*is not a function$"),
    (
        "a value as agent",
        TOOL.replace("tools", "agents"),
        {"flow": "f = 3"},
        DirectiveError,
        r"nalar\.toml:2: .*is not a class$",
    ),
    (
        "a partial",
        TOOL,
        {"flow": "import functools\nf = functools.partial(int)"},
        DirectiveError,
        r"toml:2: .*is not a function$",
    ),
    ("a built-in", "[tools.f]\nsource = 'math:sqrt'", {}, DirectiveError, r"nalar\.toml:2: .*write a function of your own"),
    ("a C class", "[agents.f]\nsource = 'collections:OrderedDict'", {}, DirectiveError, r"toml:2: .*write a class of your own"),
    ("one name twice", TOOL + "[agents.f]\nsource = 'flow:F'", {"flow": ""}, ManifestError, r"two actors are named 'f'"),
]


@pytest.mark.parametrize(("manifest", "files", "error", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_told_in_one_line(
    write: Write, manifest: str, files: dict[str, str], error: type[ConfigError], says: str
) -> None:
    with pytest.raises(error) as raised:
        load_app(write(manifest, **files))
    assert "\n" not in str(raised.value)
    assert re.search(says, str(raised.value))


def test_after_a_failure_the_corrected_app_loads(write: Write) -> None:
    folder = write(TOOL, flow="def f(:")
    with pytest.raises(AppError):
        load_app(folder)
    (folder / "flow.py").write_text("def f(): return 1")
    assert loaded(folder).actors["f"].target() == 1


def test_two_decorated_actors_of_one_name(write: Write) -> None:
    text = "from nalar_mq import tool\n@tool\ndef f(): ...\n@tool(name='f')\ndef g(): ...\n"
    with pytest.raises(DirectiveError, match=r"two actors have the name 'f': .*:2 and .*:4"):
        load_app(write(None, decorated=text) / "decorated.py")


def test_a_file_without_actors(write: Write) -> None:
    with pytest.raises(AppError, match=r"unmodified Python needs a nalar\.toml"):
        load_app(write(None, empty="x = 1") / "empty.py")


class Steady:
    def __init__(self) -> None:
        self.items: list[int] = []

    def look(self, other: Changing) -> int:
        items = list(self.items)
        items.append(1)
        other.n = 2
        self.add(3)
        return len(items)

    def add(self, x: int) -> int:
        return x


class Changing:
    n = 0

    def set(self) -> None:
        self.n = 1


class Deep:
    def __init__(self) -> None:
        self.a: dict[str, list[int]] = {}

    def put(this) -> None:  # noqa: N805
        this.a["x"].append(1)


class Unpacking:
    def set(self) -> None:
        _, self.y = 1, 2


class Inherited(Changing):
    pass


class Aliased:
    def __init__(self) -> None:
        self.a: list[int] = []

    def put(self) -> None:
        kept = self.a
        kept.append(2)


class Counting:
    def __init__(self) -> None:
        self.numbers = itertools.count()

    def look(self) -> int:
        return next(self.numbers)


class Setting:
    def put(self, name: str) -> None:
        setattr(self, name, 3)


def test_a_class_that_changes_itself_is_found() -> None:
    assert changes_itself(Steady) == ""
    for cls, line in [
        (Changing, "self.n = 1"),
        (Deep, "append(1)\n\n\nclass Unp"),
        (Unpacking, "_, self.y"),
        (Inherited, "self.n = 1"),
        (Aliased, "kept.append(2)"),
        (Counting, "return next(self"),
        (Setting, "setattr(self, name"),
    ]:
        file, _, number = changes_itself(cls).partition(":")
        source = Path(__file__).read_text()
        assert file == "test_app.py"
        assert int(number) == source[: source.index(line)].count("\n") + 1


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """What is logged from the level of information on, however other tests have set up the logs."""
    before = structlog.get_config() if structlog.is_configured() else None
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    with capture_logs() as captured:
        yield captured
    if before is None:
        structlog.reset_defaults()
    else:
        structlog.configure(**before)


AGENT = "[agents.a]\nsource = 'flow:A'\n"
CHANGING = "class A:\n    def m(self):\n        self.x = 1\n"


@pytest.mark.parametrize(
    ("manifest", "flow", "stateful"),
    [
        (AGENT, CHANGING, True),
        (AGENT + "stateful = false\n", CHANGING, False),
        (AGENT + "stateful = true\n", "class A:\n    def m(self): ...\n", True),
        (AGENT, "class A:\n    def __init__(self):\n        self.x = 1\n    def m(self): ...\n", False),
    ],
)
def test_who_changes_itself_is_stateful_unless_the_manifest_says_otherwise(
    write: Write, logs: list[Any], manifest: str, flow: str, stateful: bool
) -> None:
    app = loaded(write(manifest, flow=flow))
    assert app.actors["a"].stateful is stateful
    told = [log for log in logs if log["event"] == "app.agent_is_stateful"]
    assert [log["because"] for log in told] == (["it changes itself at flow.py:3"] if manifest == AGENT and stateful else [])
