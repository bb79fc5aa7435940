"""What takes the places of agents, tools and workflows in unmodified Python.

A stand-in behaves as what it replaces. Called from rewritten code it gives a future, called from anywhere else the value;
called where no runtime is, it runs what it replaced. A class stand-in is a class: its attributes are those of the class it
stands for, a class derived from it derives from that one, and its instances live in workers: their methods are calls, and
their attributes are read from there, as copies that refuse to be changed (see `nalar_mq.readings`).

Stand-ins may be passed on and stored: they travel by name, an instance by session, number and constructor arguments as well.
A method that returns its own instance gives the caller the stand-in for it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from nalar_mq import classes, depth, moves, readings, runs, values
from nalar_mq.actor import ActorSpec, MethodSpec
from nalar_mq.call_context import CallContext, CallOptions, current_context
from nalar_mq.errors import MalformedMessageError, NalarError, RemoteError

CONSTRUCT = "+"  # names no method of Python's: the call that makes an instance
_ARITHMETIC = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor"),
)
_DUNDERS = frozenset(
    f"__{name}__"
    for name in (
        *("call", "len", "length_hint", "iter", "next", "reversed", "getitem", "setitem", "delitem", "contains", "bool"),
        *("str", "repr", "format", "bytes", "eq", "ne", "lt", "le", "gt", "ge", "hash", "enter", "exit"),
        *("aenter", "aexit", "aiter", "anext", "int", "float", "complex", "index", "round", "trunc", "floor", "ceil"),
        *("neg", "pos", "abs", "invert", "fspath"),
        *(prefix + name for name in _ARITHMETIC for prefix in ("", "r", "i") if (prefix, name) != ("i", "divmod")),
    )
)


def public_functions(cls: type) -> dict[str, Callable[..., Any]]:
    """What instances of `cls` can be asked to do: its functions, special methods that Python calls included."""
    found: dict[str, Callable[..., Any]] = {}
    for name in dir(cls):
        attribute = inspect.getattr_static(cls, name)
        if inspect.isfunction(attribute) and (not name.startswith("__") or name in _DUNDERS):
            found[name] = attribute
    return found


def stand_in(spec: ActorSpec) -> Any:
    """What takes the place of `spec.target` in the user's modules."""
    return AgentType(spec) if isinstance(spec.target, type) else FunctionStandIn(spec)


def original_of(found: Any) -> Any:
    """What a stand-in stands for; anything else is itself."""
    if isinstance(found, FunctionStandIn):
        return found.__wrapped__  # type: ignore[attr-defined]  # pyright: ignore
    return found._nalar_spec.target if isinstance(found, AgentType) else found  # pyright: ignore[reportPrivateUsage]


def _begin(
    context: CallContext,
    spec: ActorSpec,
    method: MethodSpec,
    options: CallOptions,
    args: Any,
    kwargs: Any,
    *,
    shares: bool = False,
) -> Any:
    """Makes the call: a future, or what plain Python returns for an async function or a generator.

    A call that can reach an instance which the caller reaches, too, overlaps with no other call: what it does to the
    instance is seen by all later calls, and it sees what all earlier ones did.
    """
    label = f"{spec.name}.{method.name}" if method.name else spec.name
    method.check_arguments(label, args, kwargs)
    args = tuple([moves.collected(x) for x in args])
    shares = shares or _holds_instance((args, kwargs))
    if shares:
        runs.settle_calls()

    def call() -> Any:
        return context.caller.call(context, spec.name, method.name, args, kwargs, options)

    match method.style:
        case "sync":
            future = call()
            if shares:
                runs.noted(future)
                runs.settle_calls()
            return future
        case "async":
            return _awaited(call)
        case "generator":
            return _pieces(call().stream())
        case "async_generator":
            return _async_pieces(call().stream())


def _holds_instance(x: Any, depth: int = 3) -> bool:
    """True if an instance of an agent stands in `x`, as far as plain containers and methods show it."""
    if isinstance(type(x), AgentType) or type(x) is MethodStandIn:
        return True
    kind = readings.class_of(x)
    if not depth or kind not in (list, tuple, set, frozenset, dict):
        return False
    elements: Iterable[Any] = [*x.values()] if kind is dict else x
    return any(_holds_instance(element, depth - 1) for element in elements)


async def _awaited(call: Callable[[], Any]) -> Any:
    return await call()


def _pieces(stream: Iterator[Any]) -> Iterator[Any]:
    yield from stream


async def _async_pieces(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for piece in stream:
        yield piece


_PLAIN_OPTIONS = CallOptions()


class FunctionStandIn:
    """Stands for a tool or workflow."""

    __nalar_actor__ = True

    def __init__(self, spec: ActorSpec) -> None:
        self._spec = spec
        self._method = spec.methods[""]
        functools.update_wrapper(self, spec.target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function itself: a future in rewritten code, else the value."""
        context = current_context.get()
        if context is None:
            return self._spec.target(*args, **kwargs)
        context.check_cancelled()
        if self._runs_here(context):
            return self._spec.target(*args, **kwargs)
        begun = _begin(context, self._spec, self._method, _PLAIN_OPTIONS, args, kwargs)
        return moves.delivered(begun) if self._method.style == "sync" else begun

    def _runs_here(self, context: CallContext) -> bool:
        """True for sync code called by async code on the runtime's loop: it blocks the loop, as it says."""
        if self._spec.kind != "tool" or self._method.style not in ("sync", "generator"):
            return False
        return asyncio._get_running_loop() is context.caller.loop  # the public one raises where there is none

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __nalar_reference__(self) -> tuple[Any, ...]:
        return (classes.name_of(self._spec.target),)

    def __nalar_referred__(self) -> FunctionStandIn:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._spec.target.__qualname__  # copied as itself, pickled by name, as what it stands for

    def __repr__(self) -> str:
        return repr(self._spec.target)


_Home = tuple[str, str, bytes]  # session, number of the instance in it, constructor arguments: where calls reach it


def settle(spec: ActorSpec, instance: Any, key: str, init: bytes) -> None:
    """Makes an instance that lives here, under the key of its replica, known to those that it is passed on to."""
    _, actor = vars(spec.target).get("__nalar_stand_in__", (None, None))
    if isinstance(actor, AgentType):
        session, _, number = key.partition("/") if spec.stateful else ("", "", "")
        actor._nalar_homes[id(instance)] = (session, number, init)  # pyright: ignore[reportPrivateUsage]


def unsettle(spec: ActorSpec, instance: Any) -> None:
    """The instance lives here no more."""
    _, actor = vars(spec.target).get("__nalar_stand_in__", (None, None))
    if isinstance(actor, AgentType):
        actor._nalar_homes.pop(id(instance), None)  # pyright: ignore[reportPrivateUsage]


class InstanceStandIn:
    """Stands for an instance of an agent that lives in a worker."""

    _nalar_spec: ActorSpec

    def __init__(self, options: CallOptions, *, shares: bool = False) -> None:
        object.__setattr__(self, "_nalar_options", options)
        object.__setattr__(self, "_nalar_shares", shares)

    def __getattr__(self, name: str) -> Any:
        spec = _spec_of(self)
        method = spec.methods.get(name)
        if method is not None:
            return MethodStandIn(self, spec, method, _options_of(self))
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        attribute = inspect.getattr_static(spec.target, name, None)
        if isinstance(attribute, (staticmethod, classmethod)):
            return getattr(spec.target, name)
        context = _required(spec)
        return readings.lent(context.caller.call(context, spec.name, "." + name, (), {}, _options_of(self)).value())

    def __setattr__(self, name: str, value: Any) -> None:
        _change(self, "=" + name, depth.deep(value))

    def __delattr__(self, name: str) -> None:
        _change(self, "-" + name)

    def __nalar_reference__(self) -> tuple[Any, ...]:
        options = _options_of(self)
        return (classes.name_of(_spec_of(self).target), options.session or "", options.instance, options.init)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"an instance of {_spec_of(self).name!r} lives in a worker and cannot be copied or pickled here")


def _options_of(instance: InstanceStandIn) -> CallOptions:
    options: CallOptions = object.__getattribute__(instance, "_nalar_options")
    return options


def _shares(instance: InstanceStandIn) -> bool:
    """True if it can reach instances that others reach, too."""
    return bool(object.__getattribute__(instance, "_nalar_shares"))


def _spec_of(instance: InstanceStandIn) -> ActorSpec:
    spec: ActorSpec = object.__getattribute__(instance, "_nalar_spec")
    return spec


def _change(instance: InstanceStandIn, what: str, *args: Any) -> None:
    spec = _spec_of(instance)
    if not spec.stateful:
        raise AttributeError(
            f"{spec.name}.{what[1:]} is changed from outside, but {spec.name!r} is not stateful: "
            f"put `stateful = true` into its table in nalar.toml"
        )
    context = _required(spec)
    context.caller.call(context, spec.name, what, args, {}, _options_of(instance)).value()


class AgentType(type):
    """The type of the classes that stand for agents' classes."""

    __nalar_actor__ = True
    _nalar_spec: ActorSpec
    _nalar_homes: dict[int, _Home]
    _nalar_made: weakref.WeakValueDictionary[_Home, InstanceStandIn]

    def __new__(cls, *what: Any, **kwargs: Any) -> Any:
        """The stand-in for the class of a spec; for a class that a user derives from one, that class."""
        if len(what) != 1:
            return _derived(*what, **kwargs)
        spec: ActorSpec = what[0]
        body: dict[str, Any] = {name: _special(name) for name in _DUNDERS if name in spec.methods}
        body["__nalar_actor__"] = "__call__" in body
        body["_nalar_spec"] = spec
        body["_nalar_homes"] = {}
        body["_nalar_made"] = weakref.WeakValueDictionary()
        return super().__new__(cls, spec.target.__name__, (InstanceStandIn,), body)

    def __init__(cls, *what: Any, **kwargs: Any) -> None:
        super().__init__(cls.__name__, (InstanceStandIn,), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Constructs an instance in a worker; without a runtime, here."""
        spec = cls._nalar_spec
        context = current_context.get()
        if context is None:
            return spec.target(*args, **kwargs)
        context.check_cancelled()
        inspect.signature(spec.target).bind(*args, **kwargs)
        args, kwargs = depth.deep((args, kwargs))
        init = values.encode_arguments(args, kwargs) if args or kwargs else b""
        context.constructed += 1
        number = str(context.constructed)
        instance = number if context.is_root else f"{context.call_id.hex()}-{number}"
        home = (context.session, instance if spec.stateful else "", init)
        shares = _holds_instance((args, kwargs))
        if shares:
            runs.settle_calls()
        made = cls._nalar_made[home] = cls._nalar_instance(home, shares=shares)
        runs.noted(context.caller.call(context, spec.name, CONSTRUCT, (), {}, _options_of(made)))
        if shares:
            runs.settle_calls()
        return made

    def _nalar_instance(cls, home: _Home, *, shares: bool) -> InstanceStandIn:
        session, instance, init = home
        made: InstanceStandIn = InstanceStandIn.__new__(cls)  # type: ignore[arg-type]  # pyright: ignore
        InstanceStandIn.__init__(made, CallOptions(session=session or None, instance=instance, init=init), shares=shares)
        return made

    def __nalar_reference__(cls) -> tuple[Any, ...]:
        return (classes.name_of(cls._nalar_spec.target),)

    def __nalar_reference_of__(cls, instance: object) -> tuple[Any, ...] | None:
        """What an instance in this process travels as; None for one that no call reaches."""
        home = cls._nalar_homes.get(id(instance))
        return None if home is None else (classes.name_of(cls._nalar_spec.target), *home)

    def __nalar_referred__(cls, *home: Any) -> Any:
        """The class, an instance, or a method of one, as in `__nalar_reference__`."""
        if not home:
            return cls
        if [type(part) for part in home] not in ([str, str, bytes], [str, str, bytes, str]):
            raise MalformedMessageError("not a reference to an instance")
        session, instance, init, *method = home
        key: _Home = (session, instance, init)
        found = cls._nalar_made.get(key)
        if found is None:
            found = cls._nalar_made[key] = cls._nalar_instance(key, shares=True)
        return getattr(found, method[0]) if method else found

    def __getattribute__(cls, name: str) -> Any:
        if name.startswith(("_nalar_", "__nalar_")):
            return type.__getattribute__(cls, name)
        target = type.__getattribute__(cls, "_nalar_spec").target
        return inspect.signature(target) if name == "__signature__" else getattr(target, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(cls._nalar_spec.target, name, value)

    def __instancecheck__(cls, instance: object) -> bool:
        return type.__instancecheck__(cls, instance) or isinstance(instance, original_of(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(cls, subclass) or issubclass(subclass, original_of(cls))

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls._nalar_spec.target

    def __hash__(cls) -> int:
        return hash(cls._nalar_spec.target)

    def __repr__(cls) -> str:
        return repr(cls._nalar_spec.target)


def _derived(name: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any) -> Any:
    plain = tuple(original_of(base) for base in bases)
    meta, _, kwargs = types.prepare_class(name, plain, kwargs)
    return meta(name, plain, body, **kwargs)


class MethodStandIn:
    """A bound method of an instance that lives in a worker."""

    __nalar_actor__ = True

    def __init__(self, instance: InstanceStandIn, spec: ActorSpec, method: MethodSpec, options: CallOptions) -> None:
        self.__self__ = instance
        self.__name__ = method.name
        self.__func__ = method.function
        self.__doc__ = method.function.__doc__
        self._spec = spec
        self._method = method
        self._options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method itself: a future in rewritten code, else the value."""
        context = _required(self._spec)
        shares = _shares(self.__self__)
        begun = _begin(context, self._spec, self._method, self._options, args, kwargs, shares=shares)
        return moves.delivered(begun) if self._method.style == "sync" else begun

    def __nalar_reference__(self) -> tuple[Any, ...]:
        return (*self.__self__.__nalar_reference__(), self.__name__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodStandIn) and (self.__self__, self.__name__) == (other.__self__, other.__name__)

    def __hash__(self) -> int:
        return hash((id(self.__self__), self.__name__))


def _required(spec: ActorSpec) -> CallContext:
    context = current_context.get()
    if context is None:
        raise InstanceOutlivedError(spec.name)
    context.check_cancelled()
    return context


class InstanceOutlivedError(NalarError):
    """An instance made inside a workflow was used after the workflow had ended."""

    def __init__(self, actor: str) -> None:
        super().__init__(f"this instance of {actor!r} was made in a workflow and cannot be used outside of one")
        self.actor = actor


def _special(name: str) -> Callable[..., Any]:
    def special(self: InstanceStandIn, *args: Any, **kwargs: Any) -> Any:
        return depth.deep(InstanceStandIn.__getattr__(self, name)(*args, **kwargs))

    def leave(self: InstanceStandIn, kind: Any, error: Any, traceback: Any) -> Any:
        return special(self, kind, error, None)  # a traceback cannot travel

    def call(self: InstanceStandIn, *args: Any, **kwargs: Any) -> Any:
        spec = _spec_of(self)
        begun = _begin(_required(spec), spec, spec.methods[name], _options_of(self), args, kwargs, shares=_shares(self))
        return moves.delivered(begun) if spec.methods[name].style == "sync" else begun

    def following(self: InstanceStandIn) -> Any:
        try:
            return special(self)
        except RemoteError as error:
            if error.type_name == "builtins:StopIteration":
                raise StopIteration from None
            raise

    made: dict[str, Callable[..., Any]] = {"__call__": call, "__next__": following, "__exit__": leave, "__aexit__": leave}
    return made.get(name, special)


def method_of_instance(spec: ActorSpec, name: str) -> MethodSpec | None:
    """What `name` asks for beside methods, of unmodified Python: to read or write an attribute, or just the instance."""
    if spec.transparent and spec.kind == "agent":
        if name == CONSTRUCT:
            return MethodSpec(name, _made, bound=True).named(spec.name)
        if name[:1] == ".":
            return MethodSpec(name, _attribute_reader(name[1:]), bound=True).named(spec.name)
        if name[:1] == "=":
            return MethodSpec(name, _attribute_writer(name[1:]), bound=True).named(spec.name)
        if name[:1] == "-":
            return MethodSpec(name, _attribute_deleter(name[1:]), bound=True).named(spec.name)
    return None


def _made(instance: object) -> None:
    """The instance is there; nothing else was asked for."""


def _attribute_reader(name: str) -> Callable[..., Any]:
    def read(instance: object) -> Any:
        return getattr(instance, name)

    return read


def _attribute_writer(name: str) -> Callable[..., Any]:
    def write(instance: object, value: Any) -> None:
        setattr(instance, name, value)

    return write


def _attribute_deleter(name: str) -> Callable[..., Any]:
    def delete(instance: object) -> None:
        delattr(instance, name)

    return delete
