"""What a future may do while rewritten code runs: the functions that `nalar_mq.rewrite` puts around expressions.

A future only *moves* in rewritten code. Whoever is no rewritten code sees values:

    rewritten function ──call()──▶ rewritten function      futures go in and come out
                       ──call()──▶ actor                   futures go in, a future comes out
                       ──call()──▶ container's own method  elements move, keys are values
                       ──call()──▶ anything else           values go in, in depth; called from the user's own frame
    anything else      ─────────▶ rewritten function       `given_back` and `yielded` turn what leaves it into values
    anything else      ─────────▶ actor                    `delivered` waits for the value

Who calls is read from the frame: a rewritten function that runs directly below `call` was called by rewritten code; below any
other frame, C code included, it was not. Functions are known as rewritten by the last constant of their code.

Values in depth are made in `nalar_mq.depth`; the order of errors and the end of a run are in `nalar_mq.runs`.
"""

# What runs through here is of any type whatever.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations
import __future__

import builtins
import collections
import concurrent.futures
import contextlib
import dis
import functools
import inspect
import operator
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeGuard, cast

from nalar_mq.depth import CONTAINERS, KEEPS, LEAVES, VIEWS, deep, force, is_rewritten_callable, storage, takes_futures, value
from nalar_mq.future import Future
from nalar_mq.origins import MARK, AnyFuture, is_rewritten, living, user_frame
from nalar_mq.readings import class_of, refuse_change
from nalar_mq.runs import Guard, carry_over, handled, journal, mark, noted, settled, wait_in_order

_Thunk = Callable[[], Any]

# Calls.


def call(f: Any, /, *args: Any, **kwargs: Any) -> _Thunk:
    """Prepares `f(*args, **kwargs)`; the caller calls what it gets for the result, which may be a future.

    What is rewritten has run already then. What is not runs when the user's frame calls it, so that code that looks at its
    caller (warnings, logging, named tuples, `locals()`) sees the user's frame.
    """
    kind = type(f)
    if kind is types.FunctionType:
        consts = f.__code__.co_consts
        if consts and consts[-1] is MARK:
            return [f(*args, **kwargs)].pop
    elif kind is types.MethodType:
        function: Any = f.__func__
        if type(function) is types.FunctionType and is_rewritten(function.__code__):
            return [function(f.__self__, *args, **kwargs)].pop
    return _dispatch(f, args, kwargs)


_CALL: Final = call.__code__


def _direct(f: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call from rewritten code, futures and all; frames below see it as such."""
    return f(*args, **kwargs)


_DIRECT: Final = _direct.__code__


def _dispatch(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Thunk:
    if isinstance(f, Future):
        return call(force(f), *args, **kwargs)
    kind = type(f)
    f = _actor_for(f, kind)
    kind = type(f)
    if getattr(kind, "__nalar_actor__", False):
        return [noted(_direct(f, args, kwargs))].pop
    if kind is types.BuiltinFunctionType:
        return _builtin(f, args, kwargs)
    if isinstance(f, type):
        return _class(f, args, kwargs)
    if kind is functools.partial:
        return call(f.func, *f.args, *args, **{**f.keywords, **kwargs})
    method: Any = getattr(kind, "__call__", None)  # noqa: B004
    if type(method) is types.FunctionType and is_rewritten(method.__code__):
        return [_direct(method, (f, *args), kwargs)].pop
    return _foreign(f, args, kwargs)


def stand_in(original: Any, actor: Any) -> None:
    """Has rewritten code call `actor` wherever it calls the function or class `original`, under whatever name."""
    original.__nalar_stand_in__ = (original, actor)


def _actor_for(f: Any, kind: type) -> Any:
    if kind is types.FunctionType or isinstance(f, type):
        entry: Any = f.__dict__.get("__nalar_stand_in__")
        if entry is not None and entry[0] is f:  # decorators copy the attributes of what they wrap
            return entry[1]
    return f


def _foreign(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Thunk:
    receiver = getattr(f, "__self__", None)
    if isinstance(receiver, (threading.Thread, concurrent.futures.ThreadPoolExecutor)):
        args = carry_over(receiver, f.__name__, args)
    elif f in _DRAINING_DESCRIPTORS if type(f) is types.MethodDescriptorType else False:
        args = tuple(_drained(a) for a in args)
    deep(receiver if receiver is not None else f)
    return functools.partial(f, *[deep(a) for a in args], **{k: deep(a) for k, a in kwargs.items()})


def _class(f: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Thunk:
    rule = _TYPE_RULES.get(f) if type(f) is type else None
    if rule is not None:
        return [rule(f, args, kwargs)].pop
    if takes_futures(f):
        return [_direct(f, args, kwargs)].pop
    return _foreign(f, args, kwargs)


def _builtin(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Thunk:
    receiver = f.__self__
    if receiver is None or type(receiver) is types.ModuleType:
        rule = _FUNCTION_RULES.get(f)
        return [rule(f, args, kwargs)].pop if rule is not None else _foreign(f, args, kwargs)
    for base, rules in _METHOD_RULES.items():
        if isinstance(receiver, base):
            rule = rules.get(f.__name__)
            if rule is not None:
                return [rule(f, args, kwargs)].pop
            break
    if type(receiver) is str:
        return functools.partial(f, *[deep(_drained(a)) for a in args], **{k: deep(a) for k, a in kwargs.items()})
    return _foreign(f, args, kwargs)


# Rules: how builtins that only store, hand over or count their arguments are called.


_Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _shallow(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return f(*map(value, args), **kwargs)


def _stores(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The last argument moves, those before it (index, key) are values."""
    return f(*map(deep, args[:-1]), *args[-1:], **kwargs)


def _inserts(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _stores(f, args, kwargs)


def _looks_up(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument is a key, those after it move."""
    return f(*map(deep, args[:1]), *args[1:], **kwargs)


def _keyed(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All arguments are values; the receiver is not looked at."""
    return f(*map(deep, args), **{k: deep(a) for k, a in kwargs.items()})


def _gathers(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Elements move from an iterable into a container."""
    return f(*[_drained(value(a)) for a in args], **kwargs)


def _gathers_pairs(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return f(*[_pairs(_drained(value(a))) for a in args], **kwargs)


def _consumes(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All elements are needed, so a generator may run to its end before the first value is waited for."""
    return f(*[deep(_drained(value(a))) for a in args], **{k: deep(a) for k, a in kwargs.items()})


def _maps(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 and (is_rewritten_callable(args[0]) or getattr(type(args[0]), "__nalar_actor__", False)):
        return _mapped(args[0], [iter(iterated(a)) for a in args[1:]])
    return _keyed(f, args, kwargs)


def _mapped(f: Any, sources: list[Iterator[Any]]) -> Iterator[Any]:
    """`map` for functions that may return futures."""
    for parts in zip(*sources, strict=False):
        yield yielded(call(f, *parts)())


def _evaluates(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`eval` and `exec` in the user's frame, of which a copy with values is shown to them."""
    frame = user_frame()
    source, *namespaces = map(deep, args)
    if frame is None:
        return f(source, *namespaces, **kwargs)
    if isinstance(source, (str, bytes)):
        flags = frame.f_code.co_flags & _FUTURE_FLAGS
        source = compile(source, "<string>", f.__name__, flags, dont_inherit=True)
    if not namespaces:
        namespaces = [frame.f_globals, deep(_visible(locals))]
    return f(source, *namespaces, **{k: deep(a) for k, a in kwargs.items()})


def _drained(x: Any) -> Any:
    return [*_driven(x)] if _is_rewritten_generator(x) else x


def collected(x: Any) -> Any:
    """A generator of rewritten code, as an argument of an actor: an iterator over what it yields, futures and all."""
    return iter([*_driven(x)]) if _is_rewritten_generator(x) else x


def _pairs(x: Any) -> Any:
    if type(x) not in (list, tuple, zip, enumerate):
        return x if isinstance(x, dict) else deep(x)
    return [_pair(value(element)) for element in x]


def _pair(x: Any) -> Any:
    if type(x) in (tuple, list) and len(x) == 2:
        return deep(x[0]), x[1]
    return deep(x)


_METHOD_RULES: Final[dict[type, dict[str, _Rule]]] = {
    list: {
        "append": _stores,
        "insert": _inserts,
        **dict.fromkeys(("pop", "copy", "clear", "reverse"), _keyed),
        "extend": _gathers,
        "__len__": _keyed,
        "__getitem__": _keyed,
    },
    dict: {
        **dict.fromkeys(("get", "setdefault", "pop"), _looks_up),
        **dict.fromkeys(("copy", "clear", "items", "values", "keys", "popitem", "move_to_end"), _keyed),
        "update": _gathers_pairs,
        "__len__": _keyed,
        "__contains__": _keyed,
        "__getitem__": _keyed,
    },
    deque: {
        **dict.fromkeys(("append", "appendleft"), _stores),
        "insert": _inserts,
        **dict.fromkeys(("extend", "extendleft"), _gathers),
        **dict.fromkeys(("pop", "popleft", "copy", "clear", "reverse", "rotate"), _keyed),
    },
    set: {
        **dict.fromkeys(("add", "discard", "remove", "pop", "clear", "copy"), _keyed),
        **dict.fromkeys(("update", "union", "difference", "intersection"), _consumes),
    },
}

_FUNCTION_RULES: Final[dict[Any, _Rule]] = {
    **dict.fromkeys((len, id, isinstance, issubclass, callable, iter, getattr, hasattr), _shallow),
    **dict.fromkeys((sum, sorted, min, max), _consumes),
    **dict.fromkeys((print, repr, abs, round, chr, ord, hash, any, all, divmod, pow, next), _keyed),
    **dict.fromkeys((eval, exec), _evaluates),
}

_TYPE_RULES: Final[dict[Any, _Rule]] = {
    **dict.fromkeys((bool, type), _shallow),
    **dict.fromkeys((list, tuple, deque), _gathers),
    **dict.fromkeys((dict, OrderedDict), _gathers_pairs),
    **dict.fromkeys((set, frozenset, collections.Counter), _consumes),
    **dict.fromkeys((str, int, float, complex, bytes, bytearray, range, slice, enumerate, zip, reversed, filter), _keyed),
    map: _maps,
    defaultdict: _looks_up,
}

_DRAINING_DESCRIPTORS: Final[frozenset[Any]] = frozenset({str.join, bytes.join})

_FUTURE_FLAGS: Final[int] = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

_LAZY: Final = frozenset({zip, enumerate, reversed, iter})


def called(f: Any) -> Any:
    """What a call in rewritten code calls in the place of `f`, given arguments by `argument`.

    Functions and what neither calls back nor iterates are called as they are, from the user's own frame. C code that may call
    back gets a frame of this module between, so that who is called by it sees that it is not called by rewritten code.
    """
    kind = type(f)
    if kind is types.FunctionType:
        consts = f.__code__.co_consts
        return f if consts and consts[-1] is MARK else _actor_call(f)
    if kind is types.MethodType:
        function: Any = f.__func__
        if type(function) is types.FunctionType:
            consts = function.__code__.co_consts
            if consts and consts[-1] is MARK:
                return f
    elif kind is types.BuiltinFunctionType:
        names = _NATIVE_METHODS.get(type(f.__self__))
        return f if names is not None and f.__name__ in names else _called_builtin(f)
    elif kind is type:
        return _called_class(f)
    return _called_other(f)


def _actor_call(f: Any) -> Any:
    actor = _actor_for(f, type(f))
    return f if actor is f else functools.partial(_noted_call, actor)


def _noted_call(actor: Any, /, *args: Any, **kwargs: Any) -> Any:
    return noted(_direct(actor, args, kwargs))


def _called_builtin(f: Any) -> Any:
    if type(f.__self__) is types.ModuleType:
        if f in _NATIVE_FUNCTIONS or f.__module__ in _NATIVE_MODULES or (f in _EVALUATING and not living):
            return f
        if f in _FRAME_FUNCTIONS:
            return functools.partial(_FRAME_FUNCTIONS[f], f)
    else:
        rules = _rules_of(f)
        if rules is None or f.__name__ not in rules:
            deep(f.__self__)
    return functools.partial(_through, f)


def _called_other(f: Any) -> Any:
    if isinstance(f, Future):
        return called(force(f))
    if getattr(type(f), "__nalar_actor__", False):
        return functools.partial(_noted_call, f)
    if isinstance(f, type):
        return _called_class(f)
    receiver = getattr(f, "__self__", None)
    if isinstance(receiver, (threading.Thread, concurrent.futures.ThreadPoolExecutor)):
        return functools.partial(_with_scope, f)
    if type(f) is functools.partial:
        return functools.partial(_through_partial, f)
    deep(receiver if receiver is not None else f)
    if type(f) is types.MethodType or is_rewritten_callable(getattr(type(f), "__call__", None)):  # noqa: B004
        return f
    return functools.partial(_through, f)


def _called_class(f: type[Any]) -> Any:
    if f is map:
        return _map
    if f is type:
        return _type
    if type(f) is type and f in _NATIVE_TYPES:
        return f
    actor = _actor_for(f, type(f))
    if actor is not f:
        return functools.partial(_noted_call, actor)
    starter: Any = f.__init__
    if type(starter) is types.FunctionType:
        return f
    parts: tuple[Any, ...] = (f.__new__, type(f).__call__)
    return f if any(type(part) is types.FunctionType for part in parts) else functools.partial(_through, f)


def _through(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    refuse_change(f, args)
    return f(*args, **kwargs)


def _type(*args: Any, **kwargs: Any) -> Any:
    """`type(x)`, of what was read from an agent as of its original; a class made by `type` is of the user's module."""
    if len(args) == 1 and not kwargs:
        return class_of(args[0])
    frame = user_frame()
    if len(args) == 3 and frame is not None:
        args = (*args[:2], {"__module__": frame.f_globals.get("__name__"), **args[2]})
    return type(*args, **kwargs)


def _through_partial(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    return call(f.func, *f.args, *args, **{**f.keywords, **kwargs})()


def _with_scope(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    return f(*carry_over(f.__self__, f.__name__, args), **kwargs)


def _map(*args: Any) -> Any:
    return _maps(map, args, {})


def argument(f: Any, x: Any, position: int) -> Any:
    """`x` as `f` may be given it at `position`, which is -1 for a keyword."""
    kind = type(x)
    if kind in LEAVES or not (living or kind is types.GeneratorType):
        return x
    return _argument(f, x, position)


def _argument(f: Any, x: Any, position: int) -> Any:
    f = value(f)
    kind = type(f)
    if is_rewritten_callable(f) or getattr(type(_actor_for(f, kind)), "__nalar_actor__", False):
        return x
    if kind is types.BuiltinFunctionType:
        rules = _rules_of(f)
        rule = _FUNCTION_RULES.get(f) if rules is None else rules.get(f.__name__)
    else:
        rule = _TYPE_RULES.get(f) if kind is type else None
    if rule is not None:
        return _ARGUMENT_RULES[rule](x, position)
    if kind is functools.partial or is_rewritten_callable(getattr(kind, "__call__", None)):  # noqa: B004
        return x
    if isinstance(f, type):
        return x if takes_futures(f) else deep(x)
    return deep(_drained(x)) if kind is types.BuiltinFunctionType and type(f.__self__) in (str, bytes) else deep(x)


def _rules_of(f: Any) -> dict[str, _Rule] | None:
    """How the methods of what `f` is bound to treat their arguments; None for functions."""
    receiver = f.__self__
    if receiver is None or type(receiver) is types.ModuleType:
        return None
    return next((rules for base, rules in _METHOD_RULES.items() if isinstance(receiver, base)), {})


_ARGUMENT_RULES: Final[dict[_Rule, Callable[[Any, int], Any]]] = {
    _shallow: lambda x, position: value(x),
    _stores: lambda x, position: x,
    _inserts: lambda x, position: deep(x) if position == 0 else x,
    _looks_up: lambda x, position: deep(x) if position == 0 else x,
    _keyed: lambda x, position: deep(x),
    _gathers: lambda x, position: _drained(value(x)),
    _gathers_pairs: lambda x, position: x if position < 0 else _pairs(_drained(value(x))),
    _consumes: lambda x, position: deep(_drained(value(x))),
    _maps: lambda x, position: x,
    _evaluates: lambda x, position: deep(x),
}

_NATIVE_METHODS: Final[dict[type, frozenset[str]]] = {
    str: frozenset(dir(str)) - {"join", "maketrans", "translate"},
    bytes: frozenset(dir(bytes)) - {"join"},
    list: frozenset({"append", "insert", "pop", "copy", "clear", "reverse"}),
    deque: frozenset({"append", "appendleft", "insert", "pop", "popleft", "copy", "clear", "reverse", "rotate"}),
    set: frozenset({"add", "discard", "remove", "pop", "copy", "clear"}),
    **dict.fromkeys(
        (dict, defaultdict, OrderedDict),
        frozenset({"get", "setdefault", "pop", "copy", "clear", "items", "values", "keys", "popitem", "move_to_end"}),
    ),
}

_NATIVE_FUNCTIONS: Final = frozenset(
    {len, id, isinstance, issubclass, callable, hasattr, print, repr, abs, round, ord, chr, hash, divmod, pow, globals}
)

_NATIVE_TYPES: Final = frozenset({str, int, float, bool, complex, bytes, bytearray, range, slice, object, Future})


def _visible(f: Any, /, *args: Any) -> Any:
    """`locals()`, `vars()` and `dir()` as the user's frame sees them, without names of ours."""
    if args:
        return f(deep(args[0]))
    frame = user_frame()
    assert frame is not None
    names = frame.f_locals
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # functions; modules and class bodies give the names themselves
        names = {name: x for name, x in names.items() if not name.startswith("_@")}
    return sorted(names) if f is dir else names


def _evaluated(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _evaluates(f, args, kwargs)


_NATIVE_MODULES: Final = frozenset({"_warnings", "sys", "time", "math", "posix", "nt", "io", "_io"})

_EVALUATING: Final = frozenset({eval, exec})

_FRAME_FUNCTIONS: Final[dict[Any, Callable[..., Any]]] = {
    **dict.fromkeys((locals, vars, dir), _visible),
    **dict.fromkeys((eval, exec), _evaluated),
}


def call_guarded(f: Any, start: int, /, *args: Any, **kwargs: Any) -> _Thunk:
    """`call` in a guarded body: unless an actor is called, all calls made since `start`, for arguments, have ended before."""
    f = value(f)
    if getattr(type(_actor_for(f, type(f))), "__nalar_actor__", False):
        return call(f, *args, **kwargs)
    made = journal.made[start:]
    del journal.made[start:]
    wait_in_order(made)
    return call(f, *map(deep, args), **{k: deep(a) for k, a in kwargs.items()})


def call_for_iteration(f: Any, /, *args: Any, **kwargs: Any) -> _Thunk:
    """`call` where a loop takes the result apart at once, so that elements may pass through `zip` and the like."""
    if type(f) in (type, types.BuiltinFunctionType) and f in _LAZY:
        return functools.partial(f, *[iterated(a) for a in args], **{k: deep(a) for k, a in kwargs.items()})
    return call(f, *args, **kwargs)


# What leaves rewritten code.


_CALL_OPCODES: Final = frozenset(dis.opmap[n] for n in ("CALL", "CALL_KW", "CALL_FUNCTION_EX") if n in dis.opmap)

_CACHE_OPCODE: Final = dis.opmap.get("CACHE", 0)


def _takes_futures_back(callee: types.CodeType, caller: types.FrameType | None) -> bool:
    """True if rewritten code called `callee` itself, by a call that can be seen in its source."""
    if caller is None:
        return False
    code = caller.f_code
    if code is _CALL or code is _DIRECT:
        return True
    name = callee.co_name
    if not is_rewritten(code) or (name.startswith("__") and name.endswith("__") and name != "__call__"):
        return False
    at = caller.f_lasti
    instructions = code.co_code
    while at > 0 and instructions[at] == _CACHE_OPCODE:
        at -= 2
    return instructions[at] in _CALL_OPCODES


def given_back(x: Any) -> Any:
    """What a rewritten function returns: as it is to rewritten code, in values to all others."""
    if type(x) in LEAVES or not living:
        return x
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    return x if _takes_futures_back(frame.f_code, frame.f_back) else deep(x)


def yielded(x: Any) -> Any:
    """What a rewritten generator yields: as it is to a loop in rewritten code, in values to all others."""
    if type(x) in LEAVES or not living:
        return x
    frame = sys._getframe(1).f_back  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code is _DELEGATED:
        outer = frame.f_back
        frame = outer.f_back if outer is not None else None
    if frame is not None and frame.f_code is _DRIVEN:
        return x
    return deep(x)


def delivered(future: AnyFuture) -> Any:
    """What a stand-in's method gives to whoever called it: the future to rewritten code, its value to all others.

    To be called directly from the method that was called.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    noted(future, frame.f_back)
    return future if _takes_futures_back(frame.f_code, frame.f_back) else force(future)


# Iteration.


def _is_rewritten_generator(x: Any) -> TypeGuard[types.GeneratorType[Any, Any, Any]]:
    if type(x) is not types.GeneratorType:
        return False
    code = x.gi_code  # pyright: ignore[reportUnknownMemberType]
    return code is _MAPPED or is_rewritten(code)


def _driven(generator: Iterable[Any]) -> Iterator[Any]:
    for x in generator:  # noqa: UP028 - the frame of this function is what `yielded` looks for
        yield x


def _delegated(generator: Any) -> Any:
    return (yield from generator)


_DRIVEN: Final = _driven.__code__

_DELEGATED: Final = _delegated.__code__

_MAPPED: Final = _mapped.__code__


def iterated(x: Any) -> Any:
    """What a loop in rewritten code iterates over in the place of `x`."""
    if isinstance(x, Future):
        x = force(x)
    return _driven(x) if _is_rewritten_generator(x) else x


def unpacked_each(x: Any) -> Any:
    """`iterated`, for a loop whose target takes each element apart."""
    x = iterated(x)
    return x if type(x) in (enumerate, zip) else map(value, x)


def deep_each(x: Any) -> Any:
    """`iterated`, with elements that are values in depth."""
    return map(deep, iterated(x))


def delegated(x: Any) -> Any:
    """What `yield from` in rewritten code delegates to in the place of `x`."""
    source: Any = value(x)
    return _delegated(source) if _is_rewritten_generator(source) else _each_in_values(source)


def _each_in_values(x: Any) -> Any:
    return map(deep, cast("Iterable[Any]", x)) if isinstance(x, CONTAINERS + VIEWS) else x


# Stores and operators that care about what they are given.


def kept_item(x: Any, container: Any) -> Any:
    """`x` as it may be stored under a key of `container`."""
    if type(x) in LEAVES or not living:
        return x
    container = value(container)
    if type(container) in (list, dict, deque, defaultdict, OrderedDict):
        return x
    setter: Any = getattr(type(container), "__setitem__", None)
    if isinstance(container, (list, dict)) and setter in (list.__setitem__, dict.__setitem__):
        return x
    return x if is_rewritten_callable(setter) else deep(x)


def kept_attribute(x: Any, holder: Any, name: str) -> Any:
    """`x` as it may be stored as the attribute `name` of `holder`."""
    if type(x) in LEAVES or not living:
        return x
    cls = type(value(holder))
    if storage(cls) == KEEPS and not hasattr(getattr(cls, name, None), "__set__"):
        return x
    return deep(x)


def searched(x: Any) -> Any:
    """`x` as the right side of `in`: the values of a dict are not looked at, the elements of a list are."""
    x = value(x)
    return x if isinstance(x, (dict, str, set, frozenset)) else deep(x)


def added(x: Any, target: Any) -> Any:
    """`x` as it is given to `target += x`: to a list its elements move."""
    if type(target) is list:
        return _drained(value(x))
    deep(target)
    return deep(x)


def settle_item(container: Any, key: Any) -> None:
    """Puts the value in the place of a future under a key, before an operator changes it."""
    if not living:
        return
    if isinstance(container, dict):
        old: Any = dict.get(container, key)
        if isinstance(old, Future):
            container[key] = force(old)
    elif isinstance(container, (list, deque)):
        with contextlib.suppress(IndexError, TypeError):
            old = container[operator.index(key)]  # pyright: ignore[reportUnknownVariableType]
            if isinstance(old, Future):
                container[key] = force(old)


def settle_attribute(holder: Any, name: str) -> None:
    """Puts the value in the place of a future in an attribute, before an operator changes it."""
    if not living:
        return
    attributes = getattr(holder, "__dict__", None)
    if type(attributes) is dict and isinstance(attributes.get(name), Future):
        attributes[name] = force(attributes[name])


# Under these names rewritten modules find the functions above; no name of the user's can be one of them.


NAMES: Final[Mapping[str, Any]] = types.MappingProxyType(
    {
        "_@called": called,
        "_@argument": argument,
        "_@call": call,
        "_@call_iter": call_for_iteration,
        "_@call_guarded": call_guarded,
        "_@value": value,
        "_@deep": deep,
        "_@return": given_back,
        "_@yield": yielded,
        "_@iter": iterated,
        "_@unpack_each": unpacked_each,
        "_@deep_each": deep_each,
        "_@delegate": delegated,
        "_@item": kept_item,
        "_@attribute": kept_attribute,
        "_@in": searched,
        "_@add": added,
        "_@settle_item": settle_item,
        "_@settle_attribute": settle_attribute,
        "_@mark": mark,
        "_@settled": settled,
        "_@guard": Guard,
        "_@handled": handled,
        "_@NameError": builtins.NameError,
    }
)
