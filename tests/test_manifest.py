from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.directives import Directives
from nalar_mq.errors import DirectiveError, ManifestError
from nalar_mq.manifest import load_manifest
from nalar_mq.toml_lines import TomlLines

GOOD = """\
[runtime]
namespace = "shop"
workers = 3
engine_url = "http://127.0.0.1:8000/v1"
engine_model = "tiny"

[agents.planner]
source = "flow:Planner"
stateful = true
timeout_s = 30
resources = { cpu = 2, gpu = 0.5 }

[tools.search]
source = "pkg.search:Index.find"
concurrency = 4
timeout_s = inf

[workflows.answer]
source = "flow:answer"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_manifest(text: str | bytes) -> Path:
        path = tmp_path / "nalar.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_manifest


def test_a_good_manifest(write, tmp_path):
    manifest = load_manifest(write(GOOD))
    planner, search, answer = manifest.actors
    assert (planner.kind, planner.name, planner.module, planner.attribute) == ("agent", "planner", "flow", "Planner")
    assert planner.directives == Directives(stateful=True, timeout_s=30, resources={"cpu": 2, "gpu": 0.5})
    assert (search.kind, search.module, search.attribute) == ("tool", "pkg.search", "Index.find")
    assert (search.directives.concurrency, search.directives.timeout_s) == (4, None)
    assert (answer.kind, answer.line, answer.directives) == ("workflow", 18, Directives())
    assert (manifest.runtime.namespace, manifest.runtime.workers, manifest.runtime.engine_model) == ("shop", 3, "tiny")
    assert manifest.folder == tmp_path


def test_a_folder_stands_for_the_manifest_in_it(write, tmp_path):
    write(GOOD)
    assert load_manifest(tmp_path) == load_manifest(tmp_path / "nalar.toml")


ONE = '[tools.a]\nsource = "m:f"\n'

REFUSED = [
    ("", 1, "names no actor"),
    ("[agent.a]\nsource = 'm:A'\n", 1, "did you mean 'agents'"),
    ("x = 1\n" + ONE, 1, "unknown table or key 'x'"),
    ("agents = 3\n", 1, "agents must be a table"),
    ("[agents]\na = 3\n", 2, "agents.a must be a table"),
    ("[[agents]]\nsource = 'm:A'\n", 1, "agents must be a table"),
    ("# hello\n\n[tools.a]\n", 3, "has no 'source'"),
    ("[tools.a]\nsource = 3\n", 2, "'source' must be text"),
    ("[tools.a]\nsource = 'm'\n", 2, '"module:attribute"'),
    ("[tools.a]\nsource = 'm.py:f'\n", 2, "without .py"),
    ("[tools.a]\nsource = '../m:f'\n", 2, '"module:attribute"'),
    ("[tools.a]\nsource = 'm:'\n", 2, '"module:attribute"'),
    ('[tools."a b"]\nsource = "m:f"\n', 1, "cannot be the name of an actor"),
    ('[tools."a.b"]\nsource = "m:f"\n', 1, "cannot be the name of an actor"),
    (f"[tools.{'a' * 129}]\nsource = 'm:f'\n", 1, "cannot be the name of an actor"),
    (ONE + '\n[workflows.a]\nsource = "m:g"\n', 4, "two actors are named 'a': here and tools.a on line 1"),
    (ONE + ONE, 3, "not TOML"),
    ("[tools.a\n", 1, "not TOML"),
    (ONE + "[runtime]\nworker = 2\n", 4, "did you mean 'workers'"),
    (ONE + "[runtime]\nworkers = 0\n", 4, "1 or more"),
    (ONE + "[runtime]\nworkers = true\n", 4, "a whole number"),
    (ONE + "[runtime]\nnamespace = 'a.b'\n", 4, "cannot be a namespace"),
    (ONE + "[runtime]\nengine_url = 3\n", 4, "must be text"),
    (ONE + "[runtime]\nengine_model = 'm'\n", 4, "needs 'engine_url'"),
    (b"\xff\xfe", 0, "not UTF-8"),
    ("x = " + "[" * 100_000, 0, "not TOML"),
]


@pytest.mark.parametrize(("text", "line", "says"), REFUSED)
def test_refused_with_its_line(write, text, line, says):
    path = write(text)
    with pytest.raises(ManifestError) as caught:
        load_manifest(path)
    assert says in str(caught.value)
    if line:
        assert str(caught.value).startswith(f"{path}:{line}: ")
        assert (caught.value.path, caught.value.line) == (str(path), line)


def test_a_missing_file(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        load_manifest(tmp_path / "nalar.toml")


WRONG_DIRECTIVES = [
    ("agents", "statefull = true", 3, "unknown key 'statefull': did you mean 'stateful'"),
    ("agents", "xyz = 1", 3, "known are source, stateful"),
    ("agents", "stateful = 1", 3, "'stateful' must be true or false, not 1"),
    ("agents", "max_instances = true", 3, "whole number"),
    ("agents", "max_instances = 1.5", 3, "whole number"),
    ("agents", "max_instances = 0", 3, "1 or more"),
    ("agents", "min_instances = -1", 3, "0 or more"),
    ("agents", "max_instances = 2\nmin_instances = 5", 4, "'min_instances' 5 is above 'max_instances' 2"),
    ("agents", "concurrency = 0", 3, "1 or more"),
    ("agents", "timeout_s = 0", 3, "above 0"),
    ("agents", "timeout_s = -3", 3, "above 0"),
    ("agents", "timeout_s = nan", 3, "above 0"),
    ("agents", "timeout_s = '3s'", 3, "a number of seconds"),
    ("agents", "retries = -1", 3, "0 or more"),
    ("agents", "priority = 'high'", 3, "whole number"),
    ("agents", "durability = 'disk'", 3, "'memory', 'node' or 'replicated'"),
    ("agents", "isolation = 'container'", 3, "'thread' or 'process'"),
    ("agents", "preemptable = true", 3, "the name of a function"),
    ("agents", "preemptable = 'a b'", 3, "the name of a function"),
    ("agents", "resources = 3", 3, "table of numbers"),
    ("agents", "resources = { gpu = 'one' }", 3, "table of numbers"),
    ("agents", "\n[agents.a.resources]\ncpu = -1", 4, "0 or more"),
    ("agents", f"resources = {{ {'x' * 129} = 1 }}", 3, "more than 128 characters"),
    ("agents", f"resources = {{ {', '.join(f'r{n} = 1' for n in range(257))} }}", 3, "may name 256"),
    ("agents", "stateful = true\nbatchable = true", 4, "'batchable' contradicts 'stateful'"),
    ("agents", "stateful = true\nisolation = 'process'", 4, "contradicts 'stateful'"),
    ("tools", "stateful = true", 3, "cannot be 'stateful'"),
    ("tools", "durability = 'node'", 3, "managed state"),
    ("agents", "durability = 'replicated'", 3, "this agent has none"),
    ("workflows", "stateful = true", 3, "cannot be 'stateful'"),
    ("workflows", "batchable = true", 3, "cannot be 'batchable'"),
    ("workflows", "isolation = 'process'", 3, "must run in its worker"),
]


@pytest.mark.parametrize(("table", "directives", "line", "says"), WRONG_DIRECTIVES)
def test_wrong_directives_are_refused_with_their_line(write, table, directives, line, says):
    path = write(f"[{table}.a]\nsource = 'm:A'\n{directives}\n")
    with pytest.raises(DirectiveError) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"{path}:{line}: {table[:-1]} 'a': ")
    assert says in str(caught.value)


def test_managed_state_contradicts_batches_and_processes():
    with pytest.raises(DirectiveError, match="agent 'x': 'batchable' contradicts managed state"):
        Directives(batchable=True).validated("agent", "x", managed=True)
    with pytest.raises(DirectiveError, match="contradicts managed state"):
        Directives(isolation="process").validated("agent", "x", managed=True)
    assert Directives(batchable=True).validated("agent", "x") == Directives(batchable=True)


def test_decorators_get_the_same_checks():
    with pytest.raises(DirectiveError, match="did you mean 'max_instances'"):
        Directives.of({"max_instance": 3})
    with pytest.raises(DirectiveError, match="'retries' must be a whole number"):
        Directives(retries="3").validated("tool", "t")  # type: ignore[arg-type]


def test_lines_are_found_through_strings_comments_and_brackets():
    text = '''\
# [agents.no]
title = "[agents.no]"   # = [x]
text = """
[agents.no]
key = 1
"""
raw = \'\'\'
[agents.no] """ \'\'\'
numbers = [
  1, # ] not yet
  2, "]",
]
inline = { a = 1, b = [1,
2] }
["agents" . 'a b'.c]
x . y = 1
"q=\\"" = 2
[[list]]
z = 1
'''
    parsed = tomllib.loads(text)
    lines = TomlLines(text)
    assert parsed["agents"]["a b"]["c"]["x"]["y"] == 1
    assert [lines.of((key,)) for key in ("title", "text", "raw", "numbers", "inline")] == [2, 3, 7, 9, 13]
    assert lines.of(("inline", "b")) == 13
    assert lines.of(("agents",)) == 15
    assert lines.of(("agents", "no")) == 15
    assert lines.of(("agents", "a b", "c", "x", "y")) == 16
    assert lines.of(("agents", "a b", "c", 'q="')) == 17
    assert lines.of(("list", "z")) == 19
    assert lines.of(("unknown",)) == 1


@given(st.text(alphabet="[]{}\"'#=.\n\\ab ", max_size=200))
def test_any_text_has_lines(text):
    assert 1 <= TomlLines(text).of(("a", "b")) <= text.count("\n") + 1


@given(st.lists(st.sampled_from(["a", "b-c", '"d e"', "'f.g'"]), min_size=1, max_size=4, unique=True), st.integers(0, 5))
def test_lines_of_tables_agree_with_tomllib(names, blank):
    text = "".join(f"[agents.{name}]\n" + "\n" * blank + f"k_{number} = '''\n[x]\n'''\n" for number, name in enumerate(names))
    lines = TomlLines(text)
    for number, name in enumerate(tomllib.loads(text)["agents"]):
        line = lines.of(("agents", name, f"k_{number}"))
        assert text.splitlines()[line - 1].startswith(f"k_{number} =")
