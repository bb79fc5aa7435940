"""Managed lists, dicts and values against plain ones, and what calls leave behind in them."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalar_mq import ManagedDict, ManagedList, ManagedValue, agent, method, values
from nalar_mq.actor import spec_of
from nalar_mq.arguments import parameters_of
from nalar_mq.call_context import CallContext, current_context
from nalar_mq.errors import (
    ArgumentError,
    DirectiveError,
    StateMutatedError,
    StateTypeError,
    StateWriteError,
    ValueNotEncodableError,
)
from nalar_mq.session_state import SessionState
from nalar_mq.state import Arrival, bind, declare, entries_of


@dataclass
class Message:
    text: str
    tags: list[str]


@dataclass
class Letter(Message):
    to: str = "you"


class Notebook:
    items: ManagedList[Any]
    index: ManagedDict[Any, Any]
    title: ManagedValue[Any] = ManagedValue("untitled")
    other: int = 3


declare(Notebook)


class Session:
    """An instance as a worker has it, calls to it, and a store that gets nothing but changes."""

    def __init__(self, kind: type[Any] = Notebook) -> None:
        self.instance: Any = kind()
        self.state = SessionState("Notebook[s]", is_kept=True)
        self.stored: dict[tuple[str, int], bytes] = {}
        self.changed: dict[tuple[str, int], None] = {}
        self._numbers = itertools.count(1)
        bind(self.instance, self.state, {})

    def call(self, body: Callable[[Any], Any], *, fails: bool = False) -> int:
        """Runs `body` as a call; returns how many entries it wrote."""
        caller: Any = None
        context = CallContext(caller, next(self._numbers).to_bytes(16, "big"))
        token = current_context.set(context)
        self.state.begin(context)
        try:
            body(self.instance)
            changes = self.state.seal()
        except BaseException:
            self.state.roll_back()
            raise
        finally:
            current_context.reset(token)
        if fails:
            self.state.roll_back()
            return 0
        self.state.commit()
        for field, order, data in changes:
            self.changed[field, order] = None
            if data is None:
                self.stored.pop((field, order), None)
            else:
                self.stored[field, order] = data
        return len(changes)

    def reopened(self) -> Any:
        """Another instance, made of what has been stored."""
        entries: dict[str, list[tuple[int, bytes]]] = {}
        for (field, order), data in sorted(self.stored.items()):
            entries.setdefault(field, []).append((order, data))
        instance = type(self.instance)()
        bind(instance, SessionState("Notebook[s]", is_kept=True), entries)
        return instance


ITEMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
    st.tuples(st.integers(0, 3), st.text(max_size=2)),
    st.builds(Message, st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2)),
)
INDEXES = st.integers(-6, 6)
SLICES = st.builds(slice, st.none() | INDEXES, st.none() | INDEXES, st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))
SOME = st.lists(ITEMS, max_size=4)


def _iadd(x: Any, more: Any) -> None:
    x += more


def _imul(x: Any, times: int) -> None:
    x *= times


def _ior(x: Any, more: Any) -> None:
    x |= more


def _set(x: Any, key: Any, value: Any) -> None:
    x[key] = value


def _delete(x: Any, key: Any) -> None:
    del x[key]


def _op(name: str, *args: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    def run(x: Any, *given: Any) -> Any:
        return getattr(x, name)(*given)

    return st.tuples(st.just(run), *args)


LIST_OPS = st.one_of(
    _op("append", ITEMS),
    _op("extend", SOME),
    _op("insert", INDEXES, ITEMS),
    _op("pop"),
    _op("pop", INDEXES),
    _op("remove", ITEMS),
    _op("reverse"),
    _op("clear"),
    _op("index", ITEMS),
    _op("index", ITEMS, INDEXES, INDEXES),
    _op("count", ITEMS),
    _op("copy"),
    _op("__len__"),
    _op("__getitem__", INDEXES),
    _op("__getitem__", SLICES),
    _op("__contains__", ITEMS),
    st.tuples(st.just(_set), INDEXES, ITEMS),
    st.tuples(st.just(_set), SLICES, SOME),
    st.tuples(st.just(_delete), INDEXES | SLICES),
    st.tuples(st.just(_iadd), SOME),
    st.tuples(st.just(_imul), st.integers(-1, 2)),
    st.tuples(st.just(lambda x: x.sort(key=repr))),
    st.tuples(st.just(lambda x: x.sort())),
    st.tuples(st.just(lambda x: x.sort(key=repr, reverse=True))),
    st.tuples(st.just(lambda x, y: (x + y, y + x, x * 2, list(reversed(x)), x == y, x == list(x))), SOME),
    st.tuples(st.just(lambda x: (x < [1], x <= [1], x > [1], x >= [1]))),
)
KEYS = st.integers(0, 4) | st.sampled_from([True, 1.0, "a", b"a", (1, "a"), None])
PAIRS = st.dictionaries(KEYS, ITEMS, max_size=3)
DICT_OPS = st.one_of(
    st.tuples(st.just(_set), KEYS, ITEMS),
    st.tuples(st.just(_delete), KEYS),
    st.tuples(st.just(_ior), PAIRS),
    _op("get", KEYS),
    _op("get", KEYS, ITEMS),
    _op("pop", KEYS),
    _op("pop", KEYS, ITEMS),
    _op("popitem"),
    _op("setdefault", KEYS, ITEMS),
    _op("update", PAIRS),
    _op("clear"),
    _op("copy"),
    _op("__getitem__", KEYS),
    _op("__contains__", KEYS),
    st.tuples(st.just(lambda x: (list(x), list(x.keys()), list(x.values()), list(x.items()), len(x)))),
    st.tuples(st.just(lambda x: (list(reversed(x)), list(reversed(x.items())), list(reversed(x.values()))))),
    st.tuples(st.just(lambda x, y: (x | y, y | x, x == y, x == dict(x), x.keys() & y.keys() == set(x) & set(y))), PAIRS),
)


def _outcome(run: Callable[..., Any], on: Any, args: tuple[Any, ...]) -> Any:
    try:
        result = run(on, *args)
    except Exception as error:
        return type(error)
    return repr(result)


CALLS = st.lists(st.tuples(st.lists(LIST_OPS, max_size=5), st.lists(DICT_OPS, max_size=5), st.booleans()), max_size=8)


@given(CALLS)
def test_they_do_what_plain_ones_do_and_a_failed_call_leaves_no_trace(calls: Any) -> None:
    session = Session()
    plain_list: list[Any] = []
    plain_dict: dict[Any, Any] = {}
    for list_ops, dict_ops, fails in calls:
        before = list(plain_list), dict(plain_dict)

        def body(
            notebook: Notebook, list_ops: Any = list_ops, dict_ops: Any = dict_ops, model: Any = (plain_list, plain_dict)
        ) -> None:
            for run, *args in list_ops:
                assert _outcome(run, notebook.items, args) == _outcome(run, model[0], args)
            for run, *args in dict_ops:
                assert _outcome(run, notebook.index, args) == _outcome(run, model[1], args)

        session.call(body, fails=fails)
        if fails:
            plain_list, plain_dict = before
        for notebook in (session.instance, session.reopened()):
            assert notebook.items == plain_list
            assert repr(notebook.items) == repr(plain_list)
            assert repr(notebook.index) == repr(plain_dict)
            assert list(notebook.index) == list(plain_dict)


@settings(max_examples=50)
@given(CALLS, st.integers(0, 8), st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_session_that_moves_arrives_as_it_is(calls: Any, begun: int, sent: list[bool]) -> None:
    """After some calls all entries are sent, and after some of the later ones what has been changed since."""
    session = Session()
    arrival = Arrival(Notebook)
    there = Notebook()
    for number, (list_ops, dict_ops, fails) in enumerate([*calls, ([], [], False)]):
        if number == begun:
            session.changed = dict.fromkeys(sorted(session.stored))
        if number >= begun and sent[number % len(sent)]:
            arrival.take([(*entry, session.stored.get(entry)) for entry in session.changed])
            session.changed.clear()

        def body(notebook: Notebook, list_ops: Any = list_ops, dict_ops: Any = dict_ops) -> None:
            for run, *args in list_ops:
                _outcome(run, notebook.items, args)
            for run, *args in dict_ops:
                _outcome(run, notebook.index, args)

        session.call(body, fails=fails)
    arrival.bind(there, SessionState("Notebook[s]", is_kept=True))
    if begun > len(calls):
        session.changed = dict.fromkeys(sorted(session.stored))
    arrival.take([(*entry, session.stored.get(entry)) for entry in session.changed])
    assert repr(there.items) == repr(session.instance.items)
    assert repr(there.index) == repr(session.instance.index)
    assert entries_of(there._nalar_state) == entries_of(session.state)  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 4), st.booleans()), max_size=150))
def test_entries_keep_their_order_wherever_they_are_inserted(inserts: list[tuple[float, int, bool]]) -> None:
    session, plain = Session(), list[int]()
    for number, (where, count, fails) in enumerate(inserts):
        at = int(where * len(plain))
        session.call(
            lambda n, at=at, number=number, count=count: n.items.__setitem__(slice(at, at), [number] * count), fails=fails
        )
        if not fails:
            plain[at:at] = [number] * count
    assert session.instance.items == plain
    assert session.reopened().items == plain


def test_a_place_that_is_full_makes_room_around_it() -> None:
    session = Session()
    session.call(lambda n: n.items.extend(range(100)))
    plain = list(range(100))
    for number in range(200):
        session.call(lambda n, number=number: n.items.insert(50, -number), fails=number % 7 == 0)
        if number % 7:
            plain.insert(50, -number)
    assert session.instance.items == session.reopened().items == plain


def test_the_cost_of_a_change_follows_the_change() -> None:
    session = Session()
    assert session.call(lambda n: n.items.extend(range(20_000))) == 20_000
    assert session.call(lambda n: n.items.append(1)) == 1
    assert session.call(lambda n: n.items.insert(10_000, 1)) == 1
    assert session.call(lambda n: n.items.pop(0)) == 1
    assert session.call(lambda n: n.items.__setitem__(slice(5, 9), [1, 2])) == 4
    session.call(lambda n: n.index.update({number: number for number in range(1000)}))
    assert session.call(lambda n: n.index.update({5: 6})) == 1
    assert session.call(lambda n: setattr(n.title, "value", "x")) == 1


def test_a_nested_value_changed_in_place_is_an_error_that_names_it_and_changes_nothing() -> None:
    session = Session()
    session.call(lambda n: n.items.append(Message("a", ["x"])))
    session.call(lambda n: n.index.update(a=[1]))

    def careless(notebook: Notebook) -> None:
        notebook.index["b"] = 2
        notebook.items[0].tags.append("y")

    with pytest.raises(StateMutatedError, match=r"Notebook\[s\]\.items: .* assign it back.*'y'"):
        session.call(careless)
    with pytest.raises(StateMutatedError, match=r"\.index"):
        session.call(lambda n: n.index["a"].append(2))
    assert session.instance.items == [Message("a", ["x"])]
    assert session.instance.index == {"a": [1]}

    def careful(notebook: Notebook) -> None:
        message = notebook.items[0]
        message.tags.append("y")
        notebook.items[0] = message

    session.call(careful)
    assert session.instance.items == session.reopened().items == [Message("a", ["x", "y"])]


def test_a_value_that_was_set_and_changed_afterwards_is_an_error_too() -> None:
    session = Session()

    def careless(notebook: Notebook) -> None:
        mine = [1]
        notebook.index["a"] = mine
        mine.append(2)

    with pytest.raises(StateMutatedError):
        session.call(careless)
    assert session.instance.index == {}


def test_what_has_left_the_state_and_what_a_call_has_kept_may_be_changed() -> None:
    session, kept = Session(), []
    session.call(lambda n: n.items.extend([[1], [2]]))
    session.call(lambda n: n.items.pop().append(3))
    session.call(lambda n: kept.append(n.items[0]))
    kept[0].append(4)
    session.call(lambda n: n.items.append(5))
    assert session.instance.items == [[1], 5]


def test_only_the_call_that_holds_the_session_writes() -> None:
    session = Session()
    session.call(lambda n: n.items.append([1]))
    with pytest.raises(StateWriteError, match="can only be changed by a call"):
        session.instance.items.append(2)
    session.instance.items[0].append(2)  # a copy of its own
    assert session.instance.items == [[1]]

    def with_child(notebook: Notebook) -> None:
        notebook.items.append(2)
        caller: Any = None
        token = current_context.set(CallContext(caller, b"child"))
        try:
            assert notebook.items == [[1], 2]
            with pytest.raises(StateWriteError, match="another call holds the session"):
                notebook.items.append(3)
        finally:
            current_context.reset(token)

    session.call(with_child)
    assert session.instance.items == [[1], 2]


def test_a_value_that_cannot_travel_is_refused_where_it_is_set() -> None:
    session = Session()

    def body(notebook: Notebook) -> None:
        notebook.items.append(1)
        for refused in (lambda: notebook.items.extend([[2], body.__code__]), lambda: notebook.index.update({body.__code__: 1})):
            with pytest.raises(ValueNotEncodableError):
                refused()

    session.call(body)
    assert session.reopened().items == [1]


def test_a_value_begins_with_its_default_in_every_session() -> None:
    session = Session()
    assert session.instance.title.value == "untitled"
    session.call(lambda n: setattr(n.title, "value", ["a"]))
    assert session.instance.title.value == ["a"]
    session.call(lambda n: setattr(n.title, "value", "b"), fails=True)
    assert session.instance.title.value == session.reopened().title.value == ["a"]
    assert Session().instance.title.value == "untitled"
    assert Notebook().other == 3


def test_assigning_to_a_field_replaces_its_content() -> None:
    session = Session()

    def body(notebook: Any) -> None:
        notebook.items = [1, 2]
        notebook.items += [3]
        notebook.index = {"a": 1}
        notebook.index |= {"b": 2}
        with pytest.raises(TypeError, match=r"self\.title\.value"):
            notebook.title = "x"

    session.call(body)
    assert session.instance.items == [1, 2, 3]
    assert session.instance.index == {"a": 1, "b": 2}


def test_an_instance_of_nobody_behaves_like_a_plain_one() -> None:
    notebook = Notebook()
    notebook.items.append([1])
    notebook.items[0].append(2)
    notebook.index["a"] = 1
    notebook.title.value = "t"
    assert notebook.items == [[1, 2]]
    assert Notebook().items == []
    assert ManagedList([1]) + [2] == [1, 2]  # noqa: RUF005
    assert ManagedDict({"a": 1}) == {"a": 1}


def test_they_travel_as_plain_ones_and_are_seen_whole_by_bind() -> None:
    session = Session()
    session.call(lambda n: n.items.extend([1, [2]]))
    session.call(lambda n: n.index.update(a={"b": 1}))
    sent = values.decode(values.encode([session.instance.items, session.instance.index, session.instance.title]))
    assert sent == [[1, [2]], {"a": {"b": 1}}, "untitled"]
    assert type(sent[0]) is list and type(sent[1]) is dict
    copy = Notebook()
    bind(copy, SessionState("copy", is_kept=True), entries_of(session.state))
    assert copy.items == [1, [2]] and copy.index == {"a": {"b": 1}}


def _body(**annotations: str) -> dict[str, Any]:
    return {"__annotations__": annotations, "__module__": __name__, "m": method(lambda self: None)}


@pytest.mark.parametrize(
    ("directives", "said"),
    [
        ({"batchable": True}, "'batchable' contradicts managed state"),
        ({"stateful": True}, "'stateful' contradicts managed state: a stateful session never moves"),
        ({"stateful": False}, "'stateful' contradicts managed state"),
        ({"isolation": "process"}, "'isolation' \"process\" contradicts managed state"),
    ],
)
def test_directives_that_managed_state_contradicts(directives: dict[str, Any], said: str) -> None:
    with pytest.raises(DirectiveError, match=said):
        agent(**directives)(type("Wrong", (), _body(items="ManagedList[int]")))


def test_fields_are_found_by_their_annotations() -> None:
    parent = type("Parent", (), _body(items="ManagedList[NotDefinedYet]"))
    child = agent(type("Child", (parent,), _body(index="values.nothing", plain="list[int]")))
    spec = spec_of(child)
    assert spec is not None and spec.managed and spec.stateful
    plain = spec_of(agent(type("Plain", (), _body(plain="list[int]"))))
    assert plain is not None and not plain.managed and not plain.stateful
    with pytest.raises(DirectiveError, match="begins empty"):
        declare(type("Full", (), {**_body(items="ManagedList[int]"), "items": ManagedList([1])}))
    with pytest.raises(DirectiveError, match="cannot begin as 3"):
        declare(type("Full", (), {**_body(items="ManagedList[int]"), "items": 3}))


class Typed:
    texts: ManagedList[str]
    floats: ManagedList[float]
    messages: ManagedList[Message]
    many: ManagedList[list[int] | None]
    rows: ManagedList[dict[str, int]]
    kinds: ManagedList[Literal["a", "b"]]
    threads: ManagedDict[str, list[tuple[int, Message]]]
    orders: ManagedList[Sequence[int]]
    blobs: ManagedList[bytes]
    empty: ManagedValue[str] = ManagedValue(None)  # type: ignore[arg-type]
    anything: ManagedList[Any]
    unknown: ManagedList[Missing]  # type: ignore[name-defined]  # noqa: F821 - as with a name for type checkers alone
    counts: ManagedDict[str, int]
    title: ManagedValue[str] = ManagedValue("untitled")


declare(Typed)


def typed() -> Any:
    made = Typed()
    bind(made, SessionState("Typed[s]"), {})
    return made


FITTING: list[Callable[[Any], object]] = [
    lambda t: t.texts.extend(["a", "b"]),
    lambda t: t.texts.insert(0, "c"),
    lambda t: t.floats.extend([1, 1.5, True]),
    lambda t: t.messages.append(Message("a", ["x"])),
    lambda t: t.many.extend([[1], None, []]),
    lambda t: t.rows.append({"a": 1}),
    lambda t: t.rows.extend([Counter("a"), defaultdict(int, a=1), OrderedDict(a=1)]),
    lambda t: t.kinds.append("a"),
    lambda t: t.messages.append(Letter("a", [])),
    lambda t: t.threads.update(a=[(1, Letter("a", []))]),
    lambda t: t.orders.extend([[1], (1, 2)]),
    lambda t: t.blobs.append(bytearray(b"a")),
    lambda t: setattr(t.empty, "value", None),
    lambda t: t.anything.extend([1, "a", None]),
    lambda t: t.unknown.append(5),
    lambda t: t.counts.update(a=1),
    lambda t: t.counts.update(a=numpy.int64(1)),
    lambda t: t.floats.extend([numpy.float32(1.5), numpy.int64(1)]),
    lambda t: t.rows.append({"a": numpy.int8(1)}),
    lambda t: setattr(t.title, "value", "x"),
]
UNFIT: dict[str, Callable[[Any], object]] = {
    "append": lambda t: t.texts.append(5),
    "extend": lambda t: t.texts.extend(["a", 5]),
    "insert": lambda t: t.texts.insert(0, 5),
    "+=": lambda t: t.texts.__iadd__([5]),
    "item": lambda t: t.texts.__setitem__(0, 5),
    "slice": lambda t: t.texts.__setitem__(slice(None), [5]),
    "assignment": lambda t: setattr(t, "texts", [5]),
    "float": lambda t: t.floats.append("1.5"),
    "float of numpy": lambda t: t.counts.update(a=numpy.float64(1)),
    "class": lambda t: t.messages.append({"text": "a", "tags": []}),
    "inside": lambda t: t.many.append(["a"]),
    "inside a dict": lambda t: t.rows.append({"a": "b"}),
    "inside a pair": lambda t: t.threads.update(a=[(1, "a")]),
    "beside a derived one": lambda t: t.threads.update(a=[(1, Letter("a", [])), (2, 3)]),
    "inside a derived dict": lambda t: t.rows.append(defaultdict(str, a="b")),
    "literal": lambda t: t.kinds.append("c"),
    "key": lambda t: t.counts.__setitem__(1, 1),
    "dict value": lambda t: t.counts.__setitem__("a", "b"),
    "update": lambda t: t.counts.update(a="b"),
    "setdefault": lambda t: t.counts.setdefault("z", "b"),
    "ior": lambda t: t.counts.__ior__({"a": None}),
    "value": lambda t: setattr(t.title, "value", 5),
}


def test_arguments_of_derived_classes_fit_inside_lists_and_dicts() -> None:
    @agent
    class Post:
        @method
        async def send(self, letters: list[Message], by_name: dict[str, Message]) -> None: ...

    given = [[Letter("a", [])], {"a": Letter("b", [])}]
    spec = spec_of(Post).methods["send"]
    assert spec.fitted("Post.send", list(given), {})[0] == given
    with pytest.raises(ArgumentError, match=r"'by_name' of Post\.send must be dict"):
        spec.fitted("Post.send", [given[0], {"a": Letter("b", []), "b": 3}], {})


def test_none_may_be_given_for_what_is_none_by_default() -> None:
    @agent
    class Post:
        @method
        async def send(  # as programs have it whose author never heard of `Optional`
            self,
            text: str = None,  # type: ignore[assignment]  # noqa: RUF013
            *,
            count: int = None,  # type: ignore[assignment]  # noqa: RUF013
            many: int = 1,
        ) -> None: ...

    spec = spec_of(Post).methods["send"]
    assert spec.fitted("Post.send", [None], {"count": None}) == ([None], {"count": None})
    with pytest.raises(ArgumentError, match="'many'"):
        spec.fitted("Post.send", [None], {"many": None})
    known = parameters_of("(a: int, text: str = None, *, count: int = None, many: int = 1)")
    assert known.none_by_default == {"text", "count"}


@pytest.mark.parametrize("change", FITTING)
def test_what_is_of_the_type_of_a_field_may_be_put_into_it(change: Callable[[Any], object]) -> None:
    change(typed())


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_of_another_type_is_refused_and_changes_nothing(name: str) -> None:
    made = typed()
    made.texts.append("first")
    made.counts["a"] = 1
    before = [list(made.texts), dict(made.counts), made.title.value]
    with pytest.raises(StateTypeError, match=r"Typed\[s\]\.\w+ must be "):
        UNFIT[name](made)
    assert [list(made.texts), dict(made.counts), made.title.value] == before
    assert not any([made.floats, made.messages, made.many, made.rows, made.kinds])


def test_a_call_that_puts_another_type_into_a_field_leaves_no_trace() -> None:
    session = Session(Typed)
    session.call(lambda t: t.texts.append("a"))

    def careless(typed: Typed) -> None:
        typed.texts.append("b")
        typed.texts.append(5)  # type: ignore[arg-type]

    with pytest.raises(StateTypeError):
        session.call(careless)
    assert session.instance.texts == session.reopened().texts == ["a"]
