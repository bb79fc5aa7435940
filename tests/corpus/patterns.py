"""Workflow code as people write it: plain Python that imports nothing of ours.

Each `p_*` function takes nothing and gives a value, or raises; run plainly and run over actors it must give the same.
`TOOLS` and `AGENTS` name what becomes actors.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import logging
import operator
import queue
import re
import string
import threading
import traceback
import types
import typing
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from enum import Enum

import stamina

# What becomes actors.


class ToolError(Exception):
    pass


class FatalToolError(ToolError):
    pass


@dataclass
class Report:
    title: str
    score: int
    tags: list[str] = field(default_factory=list)


def echo(x):
    return x


def add(a, b=1):
    return a + b


def upper(text):
    return text.upper()


def words(text):
    return text.split()


def split(text, separator=","):
    return [part.strip() for part in text.split(separator)]


def as_json(value):
    return json.dumps(value, sort_keys=True)


def pair(a, b):
    return (a, b)


def lookup(key):
    return {"a": 1, "b": 2, "c": 3}[key]


def report(title):
    return Report(title, len(title), [title[:1]])


def yes(x):
    return bool(x)


def nothing(*args):
    return None


def fail(message="broken"):
    raise ToolError(message)


def fail_if(condition, value="ok"):
    if condition:
        raise ToolError(f"failed on {value}")
    return value


def positive(x):
    if x < 0:
        raise ValueError("negative", x)
    return x


def total(numbers):
    return sum(numbers)


def options(*args, **kwargs):
    return [list(args), dict(sorted(kwargs.items()))]


class Analyst:
    style = "calm"

    def __init__(self, name, depth=1):
        self.name = name
        self.depth = depth
        self.seen = []

    def analyse(self, text):
        self.seen.append(text)
        return f"{self.name}:{text}:{self.depth}"

    def count(self):
        return len(self.seen)

    def remember(self, text):
        self.seen.append(text)

    def history(self):
        return list(self.seen)

    def refuse(self, text):
        raise FatalToolError(f"{self.name} refuses {text}")


class Counting:
    def __init__(self):
        self.n = 0

    def next(self):
        self.n += 1
        return self.n


ALIASES = {"add": add, "upper": upper, "echo": echo}
shout = upper
LOG: list[str] = []


# Helpers of the workflows: ordinary code.


@dataclass
class Section:
    heading: str
    body: str = ""
    notes: list = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    a: object
    b: object


@dataclass(order=True)
class Ranked:
    score: int
    name: str = field(compare=False)


@dataclass
class Derived:
    base: int
    twice: int = 0

    def __post_init__(self):
        self.twice = self.base * 2


@dataclass(slots=True)
class Slotted:
    x: object
    y: object = None


Point = namedtuple("Point", "x y")


class Named(typing.NamedTuple):
    key: str
    value: int


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def double(x):
    return add(x, x)


def chain(text, depth):
    if depth == 0:
        return text
    return chain(upper(text) + ".", depth - 1)


def numbers(n):
    for i in range(n):
        yield add(i, 10)


def retry(times):
    def decorate(f):
        @functools.wraps(f)
        def wrapper(*args, **kwargs):
            last = None
            for _ in range(times):
                try:
                    return f(*args, **kwargs)
                except ToolError as error:
                    last = error
            raise last

        return wrapper

    return decorate


class Flaky:
    def __init__(self, failures):
        self.failures = failures
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return fail_if(self.calls <= self.failures, x)


class Pipeline:
    limit = 3

    def __init__(self, names):
        self.names = names
        self.parts = {}
        self.result = None
        self.__secret = echo("s")

    @property
    def size(self):
        return add(len(self.parts), 0)

    @classmethod
    def of(cls, *names):
        return cls(list(names))

    @staticmethod
    def clean(text):
        return upper(text)

    def load(self):
        for name in self.names:
            self.parts[name] = self.clean(name)
        return self

    def run(self):
        self.load()
        self.result = ",".join(self.parts.values())
        return self.result + self.__secret


class LoudPipeline(Pipeline):
    def run(self):
        return super().run() + "!"

    def __repr__(self):
        return f"<Loud {self.result}>"


class Vector:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        return Vector(add(self.x, other.x), add(self.y, other.y))

    def __eq__(self, other):
        return isinstance(other, Vector) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None

    def __len__(self):
        return add(1, 1)

    def __getitem__(self, i):
        return echo((self.x, self.y)[i])

    def __iter__(self):
        yield echo(self.x)
        yield echo(self.y)

    def __contains__(self, x):
        return yes(x in (self.x, self.y))

    def __bool__(self):
        return yes(self.x)

    def __call__(self, k):
        return add(self.x, k)


class Bag(dict):
    def __setitem__(self, key, value):
        super().__setitem__(key, [value])


class Session:
    def __init__(self):
        self.log = []

    def __enter__(self):
        self.log.append(echo("enter"))
        return self

    def __exit__(self, kind, error, tb):
        self.log.append(echo("exit " + (kind.__name__ if kind else "clean")))
        return kind is ToolError


# Binding and arithmetic.


def p_add():
    a = add(1, 2)
    b = add(3, 4)
    return a + b


def p_nested_calls():
    return add(add(1, 2), add(3, add(4, 5)))


def p_chained_assignment():
    a = b = add(1, 2)
    return a, b, a is b


def p_augmented_name():
    x = 1
    for i in range(4):
        x += add(i)
    x *= add(1)
    return x


def p_augmented_attribute():
    o = types.SimpleNamespace(n=1)
    o.n += add(1)
    p = Pipeline([])
    p.count = add(2)
    p.count += add(3)
    p.count -= 1
    return o.n, p.count


def p_augmented_item():
    d = {"a": add(1)}
    d["a"] += add(2)
    xs = [add(1), add(2)]
    xs[add(0, 0)] += 10
    c = Counter()
    c[upper("x")] += add(1)
    return d, xs, dict(c)


def p_augmented_future_target():
    x = add(1)
    x += 1
    y = upper("a")
    y *= add(1)
    return x, y


def p_augmented_list():
    xs = []
    alias = xs
    xs += [upper("a")]
    xs += (upper("b"), upper("c"))
    return alias, xs is alias


def p_unary():
    return -add(1), not yes(0), ~add(1), +add(2)


def p_comparison_chain():
    return add(0) < add(1) < add(2), add(1) == 2 != add(3)


def p_is_none():
    x = nothing()
    return x is None, x is not None, echo(None) is None


def p_boolean_short_circuit():
    a = yes(0) and fail()
    b = yes(1) or fail()
    c = echo("") or upper("default")
    d = echo([]) or None
    return a, b, c, d


def p_conditional():
    return upper("yes") if yes(1) else fail(), (echo(0) or 5) if not yes(0) else 6


def p_walrus():
    out = []
    if (n := add(1)) > 1:
        out.append(n)
    while (m := add(len(out))) < 4:
        out.append(m)
    return out, n, m


def p_walrus_in_comprehension():
    kept = [y for x in range(4) if (y := add(x)) % 2]
    return kept, y


def p_floor_and_format():
    return add(7) // add(1), "%s-%s" % (upper("a"), add(1)), "{} {x}".format(upper("b"), x=add(2))


def p_matrix():
    rows = [[add(i, j) for j in range(3)] for i in range(3)]
    return [sum(row) for row in rows], list(zip(*rows))


# Text and foreign code.


def p_fstring():
    x = upper("abc")
    return f"{x} {x!r} {x:>6} {add(1):0{add(2)}d} {x=}"


def p_join():
    parts = [upper(w) for w in ["a", "b"]]
    return "\n".join(parts), ", ".join(upper(w) for w in "xy"), str.join("-", [upper("q"), upper("r")])


def p_join_generator():
    def gen():
        for w in ["a", "b"]:
            yield upper(w)

    return ",".join(gen())


def p_json_round_trip():
    answer = as_json({"a": [1, 2]})
    data = json.loads(answer)
    return data["a"], json.dumps({"r": upper("x"), "l": [add(1), (add(2),)]}, sort_keys=True)


def p_regular_expression():
    text = upper("a1b22")
    return re.findall(r"\d+", text), re.match(r"A", text).group(), re.sub("A", upper("z"), text)


def p_string_methods():
    text = echo("  Hello World ")
    return text.strip().lower().split(), text.startswith("  "), "World" in text, text[2:7], len(text)


def p_sorted():
    return sorted([upper("b"), upper("a")]), max(add(1), add(5)), min([add(3), add(2)]), sum(add(i) for i in range(3))


def p_sorted_by_key():
    items = ["ccc", "a", "bb"]
    return sorted(items, key=lambda w: add(len(w), 0)), max(items, key=lambda w: total([len(w)]))


def p_sorted_by_tool():
    return sorted([3, 1, 2], key=add), sorted(["b", "A"], key=upper)


def p_map_filter():
    return list(map(add, [1, 2], [3, 4])), list(filter(yes, [0, 1, 2])), [x for x in map(upper, "ab")]


def p_map_own_function():
    return list(map(double, range(3))), list(map(lambda x: add(x), range(2)))


def p_any_all():
    return any(yes(x) for x in [0, 0, 1]), all(yes(x) for x in [1, 0]), any([yes(0), yes(0)])


def p_reduce():
    return functools.reduce(add, [1, 2, 3], 0), functools.reduce(operator.add, [add(1), add(2)])


def p_print():
    out = io.StringIO()
    print(upper("a"), [upper("b")], {"k": add(1)}, file=out, sep="|")
    return out.getvalue()


def p_template():
    return string.Template("$a $b").substitute(a=upper("x"), b=add(1))


def p_logging():
    stream = io.StringIO()
    logger = logging.getLogger("corpus")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(funcName)s %(message)s"))
    logger.addHandler(handler)
    try:
        logger.warning("got %s", upper("x"))
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


def p_warning_location():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(upper("careful"), stacklevel=1)
    return str(caught[0].message), caught[0].filename.endswith("patterns.py"), caught[0].lineno > 0


def p_int_str_bytes():
    return int(echo("12")), str(add(1)), float(echo("1.5")), bytes(upper("a"), "ascii"), bool(yes(0))


def p_open_file(tmp=[]):
    buffer = io.StringIO(upper("line one\nline two"))
    return [line.strip() for line in buffer]


# Containers.


def p_list_of_results():
    xs = [add(i) for i in range(5)]
    return xs, xs[0], xs[-1], xs[1:3], len(xs)


def p_append_loop():
    out = []
    for w in ["a", "b", "c"]:
        out.append(upper(w))
    out.insert(0, upper("first"))
    out.extend(upper(w) for w in "yz")
    return out


def p_dict_of_results():
    results = {}
    for k in "abc":
        results[k] = lookup(k)
    return results, sum(results.values()), sorted(results.items(), key=lambda kv: -kv[1])


def p_dict_keys():
    d = {upper("a"): add(1)}
    d[upper("b")] = 2
    return d, d[upper("a")], upper("b") in d, d.get(upper("zz"), upper("none")), upper("q") not in d


def p_dict_comprehension():
    return {upper(k): lookup(k) for k in "abc" if lookup(k) > 1}


def p_set():
    s = {upper("a"), upper("A"), upper("b")}
    s.add(upper("c"))
    t = {upper(c) for c in "aab"}
    return sorted(s), sorted(t), upper("a") in s, sorted(s & t)


def p_tuple_key():
    d = {}
    d[upper("a"), add(1)] = 1
    d[(upper("b"), add(1))] = 2
    return d, d[("A", 2)]


def p_dict_methods():
    d = {"a": add(1)}
    d.setdefault("b", add(2))
    d.setdefault("a", add(5))
    d.update(c=add(3))
    d.update({"d": add(4)})
    d.update([("e", add(5))])
    popped = d.pop("a")
    return popped, d, list(d), list(d.values()), [(k, v + 1) for k, v in d.items()], d.get("zz")


def p_dict_merge():
    a = {"x": add(1)}
    return {**a, "y": add(2)}, a | {"z": add(3)}, dict(a, w=add(4)), dict([("k", add(1))])


def p_defaultdict():
    groups = defaultdict(list)
    for w in ["ab", "ac", "b"]:
        groups[upper(w)[0]].append(upper(w))
    counts = defaultdict(int)
    counts[upper("a")] += add(1)
    return dict(groups), dict(counts)


def p_counter():
    return Counter([upper(c) for c in "aab"]), Counter(upper(c) for c in "xyx").most_common(1)


def p_deque():
    q = deque([add(1)], maxlen=3)
    q.append(add(2))
    q.appendleft(add(0, 0))
    out = []
    while q:
        out.append(q.popleft())
    return out


def p_ordered_dict():
    d = OrderedDict()
    d["b"] = add(1)
    d["a"] = add(2)
    d.move_to_end("b")
    return list(d.items())


def p_in_list():
    xs = [upper("a"), upper("b")]
    return "A" in xs, upper("b") in xs, xs.index("B"), xs.count("A"), "C" not in xs


def p_equality_of_containers():
    return [add(1), add(2)] == [2, 3], {"a": add(1)} == {"a": 2}, (add(1), [add(2)]) == (2, [3]), [add(1)] < [add(2)]


def p_aliasing():
    xs = [upper("a")]
    ys = xs
    holder = {"xs": xs}
    json.dumps(xs)
    ys.append("B")
    return xs, holder["xs"] is xs, ys is xs


def p_mutate_result():
    xs = words("a b")
    xs.append("c")
    ys = xs
    ys[0] = upper("z")
    return xs, total([1, len(xs)])


def p_mutated_result_passed_on():
    xs = split("1, 2")
    xs.append("3")
    return as_json(xs)


def p_swap():
    xs = [add(1), add(2)]
    xs[0], xs[1] = xs[1], xs[0]
    a, b = add(3), add(4)
    a, b = b, a
    return xs, a, b


def p_delete():
    xs = [add(1), add(2), add(3)]
    del xs[add(0, 0)]
    d = {"a": add(1), "B": 2}
    del d[upper("b")]
    return xs, d


def p_slices():
    xs = echo([1, 2, 3, 4, 5])
    ys = list(xs)
    ys[add(0, 0) : add(1)] = [add(10)]
    return xs[add(0) :], xs[:: add(1)], ys


def p_nested_containers():
    data = {"a": [add(1), {"b": (add(2), [add(3)])}]}
    return json.dumps(data), data["a"][1]["b"][1][0] + 1, copy.deepcopy(data)


def p_list_operators():
    xs = [add(1)] + [add(2)]
    return xs * add(1), xs + words("a b"), [*xs, *words("c d")]


def p_list_of_keys():
    d = {"a": add(1), "b": add(2)}
    return list(d), sorted(d), list(d.keys()), max(d, key=d.get), dict(zip(d.keys(), d.values()))


def p_big_len_loop():
    big = [add(1)] + list(range(5000))
    n = 0
    for i in range(200):
        if len(big) > i:
            n += 1
    return n


def p_list_sort():
    xs = [add(3), add(1), add(2)]
    xs.sort()
    xs.reverse()
    return xs, xs.pop(), xs.remove(4), xs


def p_chain_iterators():
    xs = [add(1), add(2)]
    ys = [add(3)]
    return list(itertools.chain(xs, ys)), list(itertools.accumulate(xs)), list(itertools.product(xs, ys))


def p_groupby():
    ws = [upper(w) for w in ["a1", "a2", "b1"]]
    return {k: list(g) for k, g in itertools.groupby(ws, key=lambda w: w[0])}


def p_iter_next():
    it = iter([add(1), add(2)])
    first = next(it)
    rest = list(it)
    return first, rest, next(iter([]), upper("none"))


def p_view_after_change():
    d = {}
    values = d.values()
    d["a"] = add(1)
    return sum(values), json.dumps(list(values))


# Unpacking and arguments.


def p_unpack():
    a, b = pair(1, 2)
    (c, d), e = pair(pair(3, 4), 5)
    first, *rest = words("x y z")
    return a, b, c, d, e, first, rest


def p_unpack_in_loop():
    out = []
    for a, b in [pair(1, 2), pair(3, 4)]:
        out.append(a + b)
    for i, (a, b) in enumerate([pair(5, 6)]):
        out.append((i, a, b))
    return out, [x * y for x, y in [pair(2, 3)]]


def p_unpack_to_places():
    o = types.SimpleNamespace()
    d = {}
    o.a, d["b"] = add(1), add(2)
    [d["c"], o.d] = pair(3, 4)
    return vars(o), d


def p_zip_enumerate():
    names = ["a", "b"]
    values = [upper(n) for n in names]
    out = []
    for i, (n, v) in enumerate(zip(names, values)):
        out.append(f"{i}{n}{v}")
    for v in reversed(values):
        out.append(v)
    return out, dict(zip(names, values)), list(enumerate(values, 1))


def p_star_arguments():
    args = [add(1), add(2)]
    kwargs = {"b": add(3)}
    return add(*args), add(5, **kwargs), options(*words("a b"), *args, k=upper("v"), **kwargs), max(*args)


def p_default_arguments():
    def f(a, b=add(1), *rest, c=upper("c"), **more):
        return a, b, rest, c, more

    return f(add(0)), f(1, 2, add(3), c=4, d=add(5))


def p_keyword_arguments():
    return add(b=add(2), a=1), options(z=add(1), a=[upper("x")])


def p_tuple_in_and_out():
    t = pair(1, pair(2, 3))
    return t, t[1][0], isinstance(t, tuple), tuple(t), hash(t)


# Types, matching, attributes.


def p_isinstance():
    x = upper("a")
    return isinstance(x, str), type(x) is str, type(add(1)).__name__, callable(x), isinstance(report("x"), Report)


def p_match():
    def kind(x):
        match x:
            case {"a": v}:
                return "dict", v
            case [first, *rest]:
                return "list", first, rest
            case Report(title=t, score=s) if s > 1:
                return "report", t, s
            case str() as s:
                return "str", s
            case None:
                return "none"
            case _:
                return "other"

    return [
        kind(echo({"a": add(1)})),
        kind([add(1), add(2)]),
        kind(report("abc")),
        kind(upper("x")),
        kind(nothing()),
        kind(add(1)),
    ]


def p_match_value():
    match upper("red"):
        case "RED" | "BLUE" as c:
            return c, Colour(c.lower())
    return None


def p_enum():
    return Colour(echo("red")), Colour[upper("blue")], Colour.RED.value == echo("red")


def p_result_attributes():
    r = report("hello")
    r.tags.append("more")
    r.score += 1
    return r.title, r.score, r.tags, r


def p_getattr_setattr():
    o = types.SimpleNamespace()
    setattr(o, upper("a"), add(1))
    return getattr(o, upper("a")), hasattr(o, "B"), getattr(o, "zz", upper("d")), vars(o)


def p_simple_namespace():
    o = types.SimpleNamespace(a=add(1))
    o.items = []
    o.items.append(upper("x"))
    return repr(o), o == types.SimpleNamespace(a=2, items=["X"])


def p_id_and_hash():
    x = echo("text")
    return hash(x) == hash("text"), len({x, "text"})


# Dataclasses and objects.


def p_dataclass():
    s = Section(upper("head"), body=echo("body"))
    s.notes.append(upper("n"))
    return asdict(s), repr(s), s == Section("HEAD", "body", ["N"])


def p_dataclasses_in_list():
    sections = [Section(upper(h)) for h in "ab"]
    return [dataclasses.astuple(s) for s in sections], sorted(s.heading for s in sections)


def p_dataclass_replace():
    s = replace(Section("a"), heading=upper("b"))
    return s, dataclasses.fields(s)[0].name


def p_dataclass_frozen():
    f = Frozen(add(1), upper("x"))
    return f, hash(f) == hash(Frozen(2, "X")), {f: 1}[Frozen(2, "X")]


def p_dataclass_order():
    xs = [Ranked(add(2), "b"), Ranked(add(1), upper("a"))]
    return sorted(xs), min(xs), Ranked(add(1), "x") == Ranked(2, "y")


def p_dataclass_post_init():
    return Derived(add(1)), Derived(base=add(2)).twice


def p_dataclass_slots():
    s = Slotted(add(1))
    s.y = upper("y")
    return s, s.x + 1, asdict(s)


def p_namedtuple():
    p = Point(add(1), y=add(2))
    q = p._replace(x=add(5))
    n = Named(upper("k"), add(1))
    return p, q.x, p + q, n._asdict(), Point.__module__ == __name__


def p_object_to_json():
    p = Pipeline.of("a")
    p.result = upper("r")
    p.parts = {"x": [add(1)]}
    return json.dumps(p.__dict__, default=str), json.dumps(vars(p), sort_keys=True)


def p_class_workflow():
    return Pipeline.of("a", "b").run(), LoudPipeline(["c"]).run()


def p_inheritance():
    p = LoudPipeline(["x", "y"])
    p.run()
    return repr(p), str(p), f"{p}", isinstance(p, Pipeline), p.size


def p_property():
    p = Pipeline(["a"]).load()
    return p.size, p.size + 1, Pipeline.clean("q"), p.clean("r")


def p_operators_of_own_class():
    v = Vector(add(1), add(2)) + Vector(1, add(0))
    return v == Vector(3, 4), len(v), v[0], list(v), 3 in v, bool(v), v(1), v.x + v.y, [c for c in v]


def p_dict_subclass():
    b = Bag()
    b["a"] = add(1)
    return dict(b)


def p_class_attributes():
    class Config:
        name = upper("cfg")
        sizes = [add(i) for i in range(2)]

        def describe(self):
            return self.name, self.sizes

    Config.extra = add(1)
    return Config().describe(), Config.extra, Config.name


def p_nested_attribute_store():
    p = Pipeline([])
    p.child = Pipeline([])
    p.child.result = upper("deep")
    p.child.parts["k"] = add(1)
    return p.child.result, p.child.parts, json.dumps(p.child.parts)


def p_mangled_attribute():
    class Box:
        def __init__(self):
            self.__x = add(1)

        def get(self):
            return self.__x + 1

        def raw(self):
            return self.__x

    b = Box()
    return b.get(), b.raw(), vars(b)


def p_object_in_foreign_container():
    q = queue.Queue()
    p = Pipeline([])
    p.result = upper("x")
    q.put(p)
    q.put([add(1)])
    return q.get().result, q.get()


def p_attribute_error():
    x = upper("a")
    try:
        return x.nothing_here
    except AttributeError as error:
        return str(error)


# Control flow.


def p_if_on_result():
    if yes(1):
        a = "taken"
    elif fail():
        a = "no"
    else:
        a = "else"
    return a


def p_while_on_result():
    n = 0
    while yes(n < 3):
        n = add(n)
    else:
        n = add(n, 10)
    return n


def p_for_over_result():
    out = []
    for w in words("a b c"):
        if w == "b":
            continue
        out.append(upper(w))
    else:
        out.append("done")
    return out


def p_for_break():
    for i in range(10):
        if add(i) == 4:
            break
    else:
        i = -1
    return i


def p_range_of_result():
    return list(range(add(1))), [i for i in range(add(0), add(3))]


def p_assert():
    assert yes(1), fail()
    try:
        assert add(1) == 3, upper("why")
    except AssertionError as error:
        return error.args


def p_recursion():
    return chain("a", 5)


def p_recursive_tree():
    def walk(n):
        if n <= 1:
            return [add(n)]
        return walk(n // 2) + [add(n)] + walk(n - n // 2 - 1)

    return walk(9)


def p_fibonacci():
    def fib(n):
        return n if n < 2 else add(fib(n - 1), fib(n - 2))

    return fib(7)


def p_deep_recursion():
    def down(n):
        return 0 if n == 0 else 1 + down(n - 1)

    return down(400)


def p_closure():
    def make(n):
        base = add(n)

        def inner(x):
            nonlocal base
            base = add(base, x)
            return base

        return inner

    f = make(1)
    return f(1), f(2), f(3)


def p_lambda():
    f = lambda x, y=add(1): add(x, y)  # noqa: E731
    return f(1), f(2, 3), (lambda: upper("l"))() + "!"


def p_late_binding():
    fs = [lambda i=i: add(i) for i in range(3)]
    return [f() for f in fs]


def p_global_statement():
    global LATEST
    LATEST = upper("g")
    return LATEST, globals()["LATEST"]


def p_locals():
    a = add(1)
    return "{a}".format(**locals()), locals()["a"] + 1


def p_eval():
    a = add(1)
    return eval("a + 1"), eval("a * 2", {"a": add(2)})


def p_aliases():
    f = add
    return shout("a"), ALIASES["add"](1, 2), f(1), [g("x") for g in (upper, shout)]


def p_partial():
    p = functools.partial(add, 10)
    q = functools.partial(double, x=add(2))
    return p(add(1)), q(), list(map(p, [1, 2]))


def p_conditional_callee():
    return (add if yes(1) else upper)(1, 2), {True: upper}[yes(1)]("k")


def p_import_inside():
    import math

    return math.sqrt(add(15)), math.floor(add(1) / 2)


def p_numbers():
    return round(add(1) / 3, add(1)), divmod(add(6), add(1)), pow(add(1), 2), abs(-add(1))


# Generators.


def p_generator_loop():
    return [n + 1 for n in numbers(3)], list(numbers(2)), sum(numbers(3)), tuple(numbers(1))


def p_generator_foreign():
    return sorted(numbers(3), reverse=True), dict(enumerate(numbers(2))), list(zip(numbers(2), "ab"))


def p_generator_next():
    g = numbers(2)
    return next(g) + 1, next(g), next(g, "end")


def p_generator_send():
    def echoing():
        got = yield upper("first")
        while True:
            got = yield upper(got)

    g = echoing()
    return next(g), g.send("b"), g.send(upper("c"))


def p_yield_from():
    def inner():
        yield upper("a")
        return upper("result")

    def outer():
        r = yield from inner()
        yield r
        yield from [upper("x"), upper("y")]

    return list(outer()), ",".join(outer())


def p_generator_expression():
    g = (upper(w) for w in "abc")
    first = next(g)
    return first, list(g), max(add(i) for i in range(3))


def p_generator_lazy():
    made = []

    def gen():
        for i in itertools.count():
            made.append(i)
            yield add(i)

    out = []
    for x in gen():
        if x > 3:
            break
        out.append(x)
    return out, made, list(itertools.islice(gen(), 2))


def p_generator_into_map():
    return list(map(str, numbers(2))), [json.loads(x) for x in map(as_json, numbers(2))]


def p_generator_try():
    def gen():
        try:
            yield upper("a")
            yield fail("inside")
        except ToolError as error:
            yield str(error)
        finally:
            yield "end"

    return list(gen())


def p_contextmanager():
    @contextlib.contextmanager
    def tag(name):
        out.append(upper(name))
        yield upper("inside " + name)
        out.append("end")

    out = []
    with tag("t") as x:
        out.append(x)
    return out


# Errors.


def p_error_plain():
    return fail("boom")


def p_error_in_expression():
    return "x" + fail("deep") + "y"


def p_error_unused():
    x = fail("unused")  # noqa: F841
    return "never"


def p_error_in_list():
    xs = [fail_if(i == 2, i) for i in range(4)]
    return "never", len(xs)


def p_error_order():
    a = fail("first")
    b = int("not a number")
    return a, b


def p_error_two():
    a = fail("one")
    b = fail("two")
    return b, a


def p_error_caught():
    try:
        fail("caught")
    except ToolError as error:
        return type(error).__name__, error.args


def p_error_caught_on_binding():
    done = False
    try:
        x = fail("bound")
        done = True
    except ToolError as error:
        return done, str(error)
    return x


def p_error_caught_in_loop():
    out = []
    for i in range(4):
        try:
            out.append(fail_if(i % 2, i))
        except ToolError as error:
            out.append(str(error))
    return out


def p_error_call_outside_try():
    x = fail("outside")
    try:
        return x + "!"
    except ToolError:
        return "must not be caught"


def p_error_return_in_try():
    def f():
        try:
            return fail("returned")
        except ToolError:
            return "handled"
        finally:
            LOG.append("f")

    return f()


def p_error_from_function():
    def work():
        return fail("in work")

    try:
        return work()
    except ToolError as error:
        return "handled", str(error)


def p_error_stored_by_method():
    class Worker:
        def go(self):
            self.result = fail("stored")

    w = Worker()
    try:
        w.go()
    except ToolError as error:
        return "handled", str(error)
    return "missed"


def p_error_else_finally():
    order = []
    try:
        order.append(upper("body"))
    except ToolError:
        order.append("except")
    else:
        order.append(upper("else"))
    finally:
        order.append(upper("finally"))
    return order


def p_error_in_else():
    try:
        try:
            pass
        except ToolError:
            return "wrong"
        else:
            x = fail("else")
            return x
    except ToolError as error:
        return "outer", str(error)


def p_error_reraised():
    try:
        try:
            fail("inner")
        except ToolError as error:
            raise RuntimeError(upper("wrapped")) from error
    except RuntimeError as error:
        return error.args, type(error.__cause__).__name__, error.__cause__.args


def p_error_bare_raise():
    try:
        try:
            return fail("again")
        except ToolError:
            raise
    except Exception as error:
        return repr(error)


def p_error_finally_order():
    log = []

    def f():
        try:
            x = fail("f")
            log.append("after")
            return x
        finally:
            log.append("cleanup")

    try:
        f()
    except ToolError:
        log.append("caught")
    return log


def p_error_value():
    try:
        return [positive(x) for x in (1, -1, -2)]
    except ValueError as error:
        return error.args


def p_error_group():
    try:
        raise ExceptionGroup("g", [ValueError(upper("a")), ToolError(upper("b"))])
    except* ToolError as group:
        found = [str(e) for e in group.exceptions]
    except* ValueError:
        pass
    return found


def p_error_lookup():
    try:
        return {"a": 1}[upper("b")]
    except KeyError as error:
        return error.args, lookup("a")


def p_error_type_of_value():
    try:
        return upper("a") + 1
    except TypeError as error:
        return str(error)


def p_error_traceback_lines():
    try:
        json.loads(upper("{bad"))
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [f.name for f in frames][:2], frames[0].line


def p_error_own_traceback():
    def inner():
        raise KeyError(upper("k"))

    try:
        inner()
    except KeyError as error:
        return [(f.name, f.line) for f in traceback.extract_tb(error.__traceback__)]


def p_suppress():
    out = ["a"]
    with contextlib.suppress(ToolError):
        out.append(fail())
        out.append("never")
    with contextlib.suppress(ToolError):
        x = fail()
        out.append(x)
    return out


def p_with_own_class():
    with Session() as s:
        s.log.append(upper("body"))
        fail("swallowed")
    return s.log


def p_with_binding_error():
    with Session() as s:
        x = fail("swallowed")
        s.log.append(x)
    return s.log


def p_exit_stack():
    log = []
    with contextlib.ExitStack() as stack:
        stack.callback(log.append, upper("cb"))
        s = stack.enter_context(Session())
        log.append(upper("in"))
    return log, s.log


def p_error_handled_by_retry():
    @retry(3)
    def flaky():
        return step("x")

    step = Flaky(2)
    return flaky(), step.calls


def p_error_retry_exhausted():
    step = Flaky(5)
    return retry(2)(step.__call__)("x")


def p_foreign_retry():
    step = Flaky(2)

    @stamina.retry(on=ToolError, attempts=4, wait_initial=0, wait_max=0, wait_jitter=0)
    def flaky(x):
        return step(x)

    return flaky("v"), step.calls


def p_foreign_retry_gives_up():
    calls = []

    @stamina.retry(on=ToolError, attempts=2, wait_initial=0, wait_max=0, wait_jitter=0)
    def broken():
        calls.append(1)
        return fail("always")

    try:
        broken()
    except ToolError as error:
        return str(error), len(calls)


def p_error_cause_is_earliest():
    try:
        a = fail("first")
        b = positive(-1)
        return a, b
    except ValueError:
        return "value"
    except ToolError as error:
        return "tool", str(error)


def p_error_in_comprehension_in_try():
    try:
        found = [fail_if(w == "b", w) for w in "abc"]
    except ToolError as error:
        found = [str(error)]
    return found


def p_error_in_dict_in_try():
    out = {"x": 0}
    try:
        out["x"] = fail("store")
    except ToolError:
        pass
    return out


def p_unhashable():
    try:
        return {words("a b"): 1}
    except TypeError as error:
        return "TypeError", str(error)


# Decorators and caches.


def p_lru_cache():
    calls = []

    @functools.lru_cache
    def cached(x):
        calls.append(x)
        return add(x)

    return cached(1), cached(1), cached(add(1)), calls, cached.cache_info().hits


def p_cached_property():
    class Lazy:
        @functools.cached_property
        def value(self):
            return upper("lazy")

    z = Lazy()
    return z.value, z.value, vars(z)


def p_own_decorator():
    def logged(f):
        @functools.wraps(f)
        def wrapper(*args):
            result = f(*args)
            log.append((f.__name__, result))
            return result

        return wrapper

    log = []

    @logged
    def work(x):
        return add(x)

    return work(1), work(2), log


def p_singledispatch():
    @functools.singledispatch
    def show(x):
        return "other", x

    @show.register
    def _(x: int):
        return "int", add(x)

    @show.register
    def _(x: str):
        return "str", upper(x)

    return show(add(1)), show(upper("a")), show(words("b"))


def p_total_ordering():
    @functools.total_ordering
    class Priority:
        def __init__(self, n):
            self.n = n

        def __eq__(self, other):
            return self.n == other.n

        def __lt__(self, other):
            return self.n < other.n

    a, b = Priority(add(1)), Priority(add(2))
    return a < b, a >= b, a == Priority(2), sorted([b, a])[0].n


# Threads.


def p_thread():
    out = []

    def work(x):
        out.append(add(x))

    threads = [threading.Thread(target=work, args=(add(i),)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sorted(out)


def p_thread_pool():
    with ThreadPoolExecutor(max_workers=3) as pool:
        futures = [pool.submit(double, i) for i in range(3)]
        mapped = list(pool.map(upper, ["a", "b"]))
        done = sorted(f.result() for f in as_completed(futures))
    return done, mapped


def p_thread_subclass():
    class Worker(threading.Thread):
        def run(self):
            self.result = add(1)

    w = Worker()
    w.start()
    w.join()
    return w.result


def p_thread_error():
    def work():
        return fail("in thread")

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
    try:
        return future.result()
    except ToolError as error:
        return str(error)


def p_lock():
    lock = threading.Lock()
    count = 0
    with lock:
        count += add(1)
    return count, lock.locked()


# Agents.


def p_agent():
    a = Analyst("ann")
    return a.analyse("x"), a.analyse("y"), a.count()


def p_agent_arguments():
    a = Analyst("bob", depth=add(2))
    b = Analyst(name=upper("c"), depth=1)
    return a.analyse("t"), b.analyse("u")


def p_agents_apart():
    a, b = Counting(), Counting()
    return a.next(), a.next(), b.next(), a.next()


def p_agent_order():
    a = Analyst("a")
    for w in "xyz":
        a.remember(w)
    return a.history()


def p_agent_in_dict():
    team = {n: Analyst(n) for n in ["x", "y"]}
    return {n: team[n].analyse("q") for n in team}


def p_agent_method_alias():
    a = Analyst("m")
    f = a.analyse
    return [f(w) for w in "ab"], a.count()


def p_agent_in_attribute():
    class Team:
        def __init__(self):
            self.analyst = Analyst("t")

        def ask(self, *questions):
            return [self.analyst.analyse(q) for q in questions]

    return Team().ask("a", upper("b"))


def p_agent_error():
    a = Analyst("e")
    try:
        return a.refuse("this")
    except ToolError as error:
        return type(error).__name__, str(error), a.analyse("ok")


def p_agent_future_argument():
    a = Analyst("f")
    return a.analyse(a.analyse(upper("in")))


def p_agent_mapped():
    a = Analyst("g")
    return list(map(a.analyse, "xy")), sorted("ba", key=a.analyse)


def p_agent_isinstance():
    a = Analyst("h")
    return isinstance(a, Analyst), isinstance(upper("a"), Analyst)


def p_agent_attributes():
    a = Analyst("attr", depth=add(3))
    a.remember("x")
    return a.name, a.depth + 1, a.style, a.seen


# Whole workflows.


def p_map_reduce():
    docs = ["a b c", "d e", "f"]
    parts = [words(d) for d in docs]
    counts = [len(p) for p in parts]
    return sum(counts), [w.upper() for p in parts for w in p]


def p_pipeline_of_tools():
    docs = ["x, y", "z"]
    summaries = [as_json(split(upper(d))) for d in docs]
    return "\n".join(f"{i}. {s}" for i, s in enumerate(summaries, 1))


def p_plan_and_execute():
    plan = json.loads(as_json([{"tool": "add", "args": [1, 2]}, {"tool": "upper", "args": ["z"]}]))
    results = []
    for step in plan:
        results.append(ALIASES[step["tool"]](*step["args"]))
    return "; ".join(map(str, results))


def p_refine_loop():
    draft = upper("draft")
    rounds = 0
    while len(draft) < 12 and rounds < 5:
        draft = upper(draft + ".rev")
        rounds += 1
    return draft, rounds


def p_vote():
    votes = Counter(upper(v) for v in ["a", "b", "a"])
    winner, count = votes.most_common(1)[0]
    return winner, count


def p_memo():
    memo = {}

    def get(k):
        if k not in memo:
            memo[k] = upper(k)
        return memo[k]

    return [get(k) for k in "aabba"], memo


def p_worklist():
    todo = deque(["abc"])
    out = []
    while todo:
        item = todo.popleft()
        if len(item) > 1:
            todo.extend([upper(item[:1]), upper(item[1:])])
        else:
            out.append(item)
    return out


def p_state_machine():
    state, trail = "start", []
    while state != "END":
        trail.append(state)
        state = {"start": "mid", "mid": "end"}.get(state, "end")
        state = upper(state) if state == "end" else echo(state)
    return trail, state


def p_class_with_results():
    class Run:
        def __init__(self, topic):
            self.topic = topic
            self.facts = []
            self.summary = None

        def gather(self):
            for w in words(self.topic):
                self.facts.append(upper(w))

        def summarise(self):
            self.summary = f"{len(self.facts)}: " + " ".join(self.facts)

    r = Run(echo("one two"))
    r.gather()
    r.summarise()
    return r.summary, vars(r)


def p_typed_iterator() -> Iterator[str]:
    def lines(text: str) -> Iterator[str]:
        for line in text.splitlines():
            yield upper(line)

    collected: list[str] = list(lines("a\nb"))
    first: str = collected[0]
    return [first, *collected]


TOOLS = [
    echo,
    add,
    upper,
    words,
    split,
    as_json,
    pair,
    lookup,
    report,
    yes,
    nothing,
    fail,
    fail_if,
    positive,
    total,
    options,
]
AGENTS = [Analyst, Counting]
PATTERNS = [function for name, function in list(globals().items()) if name.startswith("p_")]
__all__ = ["AGENTS", "PATTERNS", "TOOLS", "collections"]
