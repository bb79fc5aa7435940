from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import gc
import importlib
import inspect
import json.decoder
import linecache
import statistics
import sys
import textwrap
import threading
import traceback
import typing
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nalar_mq import origins, runs
from nalar_mq.finder import RewritingFinder
from nalar_mq.rewrite import rewrite_source
from tests.actor_threads import Calls, stand_in

_TOOLS = """
def echo(x):
    return x

def fail(message="broken"):
    raise ValueError(message)

def meet(x):
    BARRIER.wait(20)
    return x

BARRIER = None
TOOLS = [echo, fail, meet]
"""


class Apps:
    """Imports programs as a runtime would: rewritten, with actors in the places of their tools."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = Calls()
        self.loaded: list[str] = []
        self.finder = RewritingFinder([folder], on_module=self._stand_in, plain=lambda _: {"echo", "fail", "meet"})

    def _stand_in(self, module: ModuleType) -> None:
        stand_in(module, self.calls)

    def load(self, source: str, name: str = "") -> Any:
        name = name or f"rewritten_app_{len(self.loaded)}_{id(self)}"
        (self.folder / f"{name}.py").write_text(_TOOLS + textwrap.dedent(source))
        self.loaded.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    def line_of(self, module: Any, text: str) -> int:
        lines = Path(module.__file__).read_text().splitlines()
        return next(i for i, line in enumerate(lines, 1) if text in line)


@pytest.fixture
def apps(tmp_path: Path) -> Iterator[Apps]:
    made = Apps(tmp_path)
    sys.path.insert(0, str(tmp_path))
    limit = sys.getrecursionlimit()
    made.finder.install()
    yield made
    made.finder.uninstall()
    sys.setrecursionlimit(limit)
    sys.path.remove(str(tmp_path))
    for name in made.loaded:
        sys.modules.pop(name, None)


# Overlap: `meet` ends only once as many calls of it run at the same time as the barrier says.

OVERLAPPING = {
    "names": (2, "a = meet(1); b = meet(2); return [a, b]", [1, 2]),
    "operands": (2, "a = meet(1)\nb = meet(2)\nreturn a + b", 3),
    "unpacked_tuple": (2, "a, b = meet(1), meet(2)\nreturn b, a", (2, 1)),
    "comprehension": (4, "return [meet(x) for x in range(4)]", [0, 1, 2, 3]),
    "dict_comprehension": (3, "return {k: meet(k) for k in 'abc'}", {"a": "a", "b": "b", "c": "c"}),
    "append": (3, "out = []\nfor x in range(3):\n    out.append(meet(x))\nreturn out", [0, 1, 2]),
    "extend": (3, "out = []\nout.extend(meet(x) for x in range(3))\nreturn out", [0, 1, 2]),
    "augmented_list": (2, "out = []\nout += [meet(1)]\nout += [meet(2)]\nreturn out", [1, 2]),
    "dict_store": (3, "out = {}\nfor k in 'abc':\n    out[k] = meet(k)\nreturn out", {"a": "a", "b": "b", "c": "c"}),
    "setdefault": (2, "out = {}\nfor k in 'ab':\n    out.setdefault(k, meet(k))\nreturn out", {"a": "a", "b": "b"}),
    "default_dict": (
        2,
        "import collections\nd = collections.defaultdict(list)\nfor k in 'ab':\n    d[k].append(meet(k))\nreturn dict(d)",
        {"a": ["a"], "b": ["b"]},
    ),
    "attribute": (2, "h = Holder(meet(1))\nh.y = meet(2)\nreturn h.x + h.y", 3),
    "constructor": (2, "hs = [Holder(meet(x)) for x in (1, 2)]\nreturn [h.x for h in hs]", [1, 2]),
    "dataclass": (2, "rs = [Record(meet(x)) for x in (1, 2)]\nreturn [r.x for r in rs]", [1, 2]),
    "arguments_of_actor": (3, "return [echo(meet(x)) for x in range(3)]", [0, 1, 2]),
    "arguments_in_containers": (2, "return echo({'a': [meet(1)], 'b': (meet(2),)})", {"a": [1], "b": (2,)}),
    "own_function": (3, "return [wrapped(x) for x in range(3)]", [0, 1, 2]),
    "own_method": (2, "return [Holder(0).ask(x) for x in range(2)]", [0, 1]),
    "lambda": (2, "f = lambda x: meet(x)\nreturn [f(1), f(2)]", [1, 2]),
    "generator_in_loop": (3, "return [x for x in each(3)]", [0, 1, 2]),
    "generator_to_list": (3, "return list(each(3))", [0, 1, 2]),
    "generator_to_sum": (3, "return sum(each(3))", 3),
    "generator_expression_to_join": (2, "return ','.join(meet(x) for x in 'ab')", "a,b"),
    "yield_from": (2, "return list(outer(2))", [0, 1]),
    "map": (3, "return list(map(meet, range(3)))", [0, 1, 2]),
    "zip": (2, "xs = [meet(1), meet(2)]\nreturn [(a, b) for a, b in zip('ab', xs)]", [("a", 1), ("b", 2)]),
    "conditional": (2, "a = meet(1) if True else None\nb = None or meet(2)\nreturn [a, b]", [1, 2]),
    "unrelated_print": (2, "a = meet(1)\nstr('x')\nlen([a])\nb = meet(2)\nreturn a, b", (1, 2)),
    "membership_of_keys": (
        2,
        "d = {}\nfor k in 'ab':\n    if k not in d:\n        d[k] = meet(k)\nreturn d",
        {"a": "a", "b": "b"},
    ),
    "statement_in_try": (2, "try:\n    return [meet(1), meet(2)]\nfinally:\n    pass", [1, 2]),
    "partial": (2, "import functools\np = functools.partial(wrapped)\nreturn [p(1), p(2)]", [1, 2]),
    "star_arguments": (2, "xs = [meet(1), meet(2)]\nreturn pack(*xs)", (1, 2)),
}

_DRIVER = """
import dataclasses

class Holder:
    def __init__(self, x):
        self.x = x
    def ask(self, x):
        return meet(x)

@dataclasses.dataclass
class Record:
    x: object

def wrapped(x):
    return meet(x)

def pack(*args):
    return args

def each(n):
    for i in range(n):
        yield meet(i)

def outer(n):
    yield from each(n)

def driver():
"""


@pytest.mark.parametrize("name", OVERLAPPING)
def test_independent_calls_overlap(name: str, apps: Apps) -> None:
    parties, body, expected = OVERLAPPING[name]
    module = apps.load(_DRIVER + textwrap.indent(body, "    "))
    module.BARRIER = threading.Barrier(parties)
    assert runs.run(module.driver) == expected


def test_a_result_thrown_away_is_waited_for(apps: Apps) -> None:
    module = apps.load("""
        DONE = []
        def note(x):
            DONE.append(x)
        TOOLS.append(note)
        def driver():
            note("a")
            return list(DONE)
    """)
    assert runs.run(module.driver) == ["a"]


# Errors.


def test_a_late_error_names_the_line_of_the_call(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            x = fail("late")  # the call
            y = echo(1)
            return f"{y}{x}"
    """)
    with pytest.raises(ValueError, match="late") as caught:
        runs.run(module.driver)
    line = apps.line_of(module, "# the call")
    assert caught.value.__notes__ == [f'raised by the call at File "{module.__file__}", line {line}']


def test_an_error_where_the_call_stands_has_no_note(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            return "x" + fail("here")
    """)
    with pytest.raises(ValueError, match="here") as caught:
        runs.run(module.driver)
    assert not hasattr(caught.value, "__notes__")


def test_an_unseen_error_fails_the_run_after_all_its_calls(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            a = fail("unseen")
            b = echo(1)
            return "done"
    """)
    with pytest.raises(ValueError, match="unseen"):
        runs.run(module.driver)


def test_an_error_that_was_handled_does_not_fail_the_run(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            try:
                fail("handled")
            except ValueError:
                return "fine"
    """)
    assert runs.run(module.driver) == "fine"


def test_the_error_of_an_earlier_call_goes_first(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            a = fail("first")
            return int("x")
    """)
    with pytest.raises(ValueError, match="first"):
        runs.run(module.driver)


def test_errors_in_threads_the_user_starts_belong_to_the_run(apps: Apps) -> None:
    module = apps.load("""
        import threading
        def work():
            x = fail("in a thread")
        def driver():
            t = threading.Thread(target=work)
            t.start()
            t.join()
            return 1
    """)
    with pytest.raises(ValueError, match="in a thread"):
        runs.run(module.driver)


def test_threads_inherit_the_variables_that_are_carried(apps: Apps) -> None:
    variable: ContextVar[str] = ContextVar("carried")
    module = apps.load("""
        import threading
        from concurrent.futures import ThreadPoolExecutor
        VARIABLE = None
        def look():
            return VARIABLE.get("nothing")
        def driver():
            found = []
            t = threading.Thread(target=lambda: found.append(look()))
            t.start()
            t.join()
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(look).result())
                found.extend(pool.map(lambda _: look(), [1]))
            return found
    """)
    module.VARIABLE = variable
    token = variable.set("inherited")
    try:
        assert runs.run(module.driver, carried=(variable,)) == ["inherited"] * 3
    finally:
        variable.reset(token)


def test_tracebacks_show_the_users_lines(apps: Apps) -> None:
    module = apps.load("""
        def inner(x):
            return {}[x]  # it breaks here
        def driver():
            return inner(echo("k"))  # the driver
    """)
    with pytest.raises(KeyError) as caught:
        runs.run(module.driver)
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = [(f.name, f.lineno) for f in frames if f.filename == module.__file__]
    assert own == [("driver", apps.line_of(module, "# the driver")), ("inner", apps.line_of(module, "# it breaks here"))]
    origins.strip(caught.value)
    assert all("moves.py" not in f.filename for f in traceback.extract_tb(caught.value.__traceback__))


# What is not rewritten.


def test_foreign_callers_of_rewritten_functions_and_actors_get_values(apps: Apps) -> None:
    module = apps.load("""
        def driver(x):
            return [echo(x)]
    """)
    assert module.driver(1) == [1]
    assert module.echo(2) == 2
    assert list(map(module.driver, [3])) == [[3]]
    assert sorted([2, 1], key=module.echo) == [1, 2]


async def test_async_drivers_stay_as_they_are(apps: Apps) -> None:
    module = apps.load("""
        async def driver(x):
            def inner(y):
                return [y, str(y)]
            return inner(x)
        def capture():
            x = echo("seen")
            async def later():
                return x.upper()
            return later
    """)
    assert await module.driver(1) == [1, "1"]
    later = runs.run(module.capture)
    assert await later() == "SEEN"


def test_definitions_named_plain_are_not_marked(apps: Apps) -> None:
    module = apps.load("def driver():\n    return (lambda: 1)()\n")
    assert origins.is_rewritten(module.driver.__code__)
    original = module.TOOLS[0]
    assert not origins.is_rewritten(original.__code__)


def test_aliases_of_originals_are_recognised_when_called(apps: Apps) -> None:
    module = apps.load("""
        BY_NAME = {"echo": echo}
        def driver():
            return [BY_NAME["echo"](x) for x in "ab"]
    """)
    before = apps.calls.count
    assert runs.run(module.driver) == ["a", "b"]
    assert apps.calls.count == before + 2


# Importing.


def test_only_modules_under_the_roots_are_rewritten(apps: Apps, tmp_path: Path) -> None:
    environment = tmp_path / "venv" / "lib" / "site-packages"
    environment.mkdir(parents=True)
    (environment / "foreign_of_app.py").write_text("def f():\n    return 1\n")
    sys.path.insert(0, str(environment))
    try:
        foreign = importlib.import_module("foreign_of_app")
    finally:
        sys.path.remove(str(environment))
        sys.modules.pop("foreign_of_app", None)
    assert not origins.is_rewritten(foreign.f.__code__)
    import colorsys

    assert not origins.is_rewritten(colorsys.rgb_to_hsv.__code__)


def test_no_byte_code_is_written_and_the_source_is_the_users(apps: Apps, tmp_path: Path) -> None:
    module = apps.load("def driver(a, *, b=2):\n    '''Doc.'''\n    return a + b\n")
    assert not list(tmp_path.rglob("*.pyc"))
    assert "return a + b" in inspect.getsource(module.driver)
    assert module.driver.__doc__ == "Doc."
    assert str(inspect.signature(module.driver)) == "(a, *, b=2)"
    assert linecache.getline(module.__file__, module.driver.__code__.co_firstlineno).startswith("def driver")


def test_packages_and_relative_imports(apps: Apps, tmp_path: Path) -> None:
    package = tmp_path / "app_package_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import g\n")
    (package / "inner.py").write_text("def g(x):\n    return [x]\n")
    apps.loaded += ["app_package_of_test", "app_package_of_test.inner"]
    importlib.invalidate_caches()
    found = importlib.import_module("app_package_of_test")
    assert found.g(1) == [1]
    assert origins.is_rewritten(found.g.__code__)


def test_skipped_modules_are_imported_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "skipped_of_test.py").write_text("def f():\n    return 1\n")
    finder = RewritingFinder([tmp_path], skip=lambda name: name == "skipped_of_test")
    assert finder.find_spec("skipped_of_test", [str(tmp_path)]) is None


def test_syntax_errors_are_the_users() -> None:
    with pytest.raises(SyntaxError) as caught:
        rewrite_source("x = (\n", "app.py")
    assert caught.value.filename == "app.py"


class _ParsesWhenItEnds:
    """As the end of a task whose error nobody retrieved: it shows a traceback, for which Python parses."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        self.parse_at(12)

    def parse_at(self, depth: int) -> None:
        ast.parse("x") if depth == 0 else self.parse_at(depth - 1)


def test_garbage_that_parses_does_not_disturb_a_rewrite() -> None:
    source = f"x = [{', '.join(f'f({n}, a.b[{n}])' for n in range(300))}]"
    before = gc.get_threshold()
    gc.set_threshold(10)
    try:
        for _ in range(20):
            _ParsesWhenItEnds()
            rewrite_source(source, "app.py")
    finally:
        gc.set_threshold(*before)


def test_nothing_is_scanned_while_no_future_lives(apps: Apps) -> None:
    module = apps.load("""
        class Touchy(list):
            def __iter__(self):
                raise AssertionError("scanned")
        def driver():
            return str(len(Touchy([1]))) + type(Touchy()).__name__
    """)
    assert runs.run(module.driver) == "1Touchy"


def test_futures_are_not_kept_alive(apps: Apps) -> None:
    module = apps.load("""
        def driver():
            return sum([echo(i) for i in range(50)])
    """)
    before = origins.living_count()
    assert runs.run(module.driver) == sum(range(50))
    apps.calls.by_id.clear()
    gc.collect()
    assert origins.living_count() <= before


@pytest.mark.parametrize(
    "path",
    [Path(inspect.getfile(m)) for m in (argparse, ast, dataclasses, difflib, json.decoder, textwrap, statistics, typing)],
    ids=lambda p: p.stem,
)
def test_the_standard_library_compiles_rewritten(path: Path) -> None:
    code = rewrite_source(path.read_bytes(), str(path))
    assert code.co_filename == str(path)
