"""What takes the places of agents, tools and workflows in unmodified Python.

A stand-in behaves as what it replaces. Called from rewritten code it gives a future, called from anywhere else the value;
called where no runtime is, it runs what it replaced. A class stand-in still answers `isinstance`, can be subclassed, and
gives class attributes; what it constructs looks like an instance of the class, but lives in a worker: its methods are calls,
and its attributes are read from there.

Stand-ins may be passed on and stored: they travel by name, an instance by session, number and constructor arguments as well.
A method that returns its own instance gives the caller the stand-in for it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from nalar_mq import classes, moves, values
from nalar_mq.actor import ActorSpec, MethodSpec
from nalar_mq.call_context import CallContext, CallOptions, current_context
from nalar_mq.errors import MalformedMessageError, NalarError

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
    return ClassStandIn(spec) if isinstance(spec.target, type) else FunctionStandIn(spec)


def original_of(found: Any) -> Any:
    """What a stand-in stands for; anything else is itself."""
    is_stand_in = isinstance(found, FunctionStandIn) or type(found) is ClassStandIn
    return vars(found)["__wrapped__"] if is_stand_in else found


def _begin(context: CallContext, spec: ActorSpec, method: MethodSpec, options: CallOptions, args: Any, kwargs: Any) -> Any:
    """Makes the call: a future, or what plain Python returns for an async function or a generator."""
    label = f"{spec.name}.{method.name}" if method.name else spec.name
    method.check_arguments(label, args, kwargs)
    args = tuple([moves.collected(x) for x in args])

    def call() -> Any:
        return context.caller.call(context, spec.name, method.name, args, kwargs, options)

    match method.style:
        case "sync":
            return call()
        case "async":
            return _awaited(call)
        case "generator":
            return _pieces(call().stream())
        case "async_generator":
            return _async_pieces(call().stream())


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
        begun = _begin(context, self._spec, self._method, _PLAIN_OPTIONS, args, kwargs)
        return moves.delivered(begun) if self._method.style == "sync" else begun

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
    if isinstance(actor, ClassStandIn):
        session, _, number = key.partition("/") if spec.stateful else ("", "", "")
        actor._nalar_homes[id(instance)] = (session, number, init)  # pyright: ignore[reportPrivateUsage]


def unsettle(spec: ActorSpec, instance: Any) -> None:
    """The instance lives here no more."""
    _, actor = vars(spec.target).get("__nalar_stand_in__", (None, None))
    if isinstance(actor, ClassStandIn):
        actor._nalar_homes.pop(id(instance), None)  # pyright: ignore[reportPrivateUsage]


class ClassStandIn:
    """Stands for the class of an agent."""

    __nalar_actor__ = True

    def __init__(self, spec: ActorSpec) -> None:
        self._nalar_spec = spec
        self._nalar_type = _instance_type(spec)
        self._nalar_made: weakref.WeakValueDictionary[_Home, InstanceStandIn] = weakref.WeakValueDictionary()
        self._nalar_homes: dict[int, _Home] = {}
        self.__name__ = spec.target.__name__
        self.__qualname__ = spec.target.__qualname__
        self.__module__ = spec.target.__module__
        self.__doc__ = spec.target.__doc__
        self.__wrapped__ = spec.target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Constructs an instance in a worker; without a runtime, here."""
        context = current_context.get()
        if context is None:
            return self._nalar_spec.target(*args, **kwargs)
        context.check_cancelled()
        spec = self._nalar_spec
        inspect.signature(spec.target).bind(*args, **kwargs)
        args, kwargs = moves.deep((args, kwargs))
        init = values.encode_arguments(args, kwargs) if args or kwargs else b""
        context.constructed += 1
        number = str(context.constructed)
        instance = number if context.is_root else f"{context.call_id.hex()}-{number}"
        home = (context.session, instance if spec.stateful else "", init)
        made = self._nalar_made[home] = self._nalar_instance(home)
        moves.noted(context.caller.call(context, spec.name, CONSTRUCT, (), {}, _options_of(made)))
        return made

    def _nalar_instance(self, home: _Home) -> InstanceStandIn:
        session, instance, init = home
        options = CallOptions(session=session or None, instance=instance, init=init)
        return self._nalar_type(self._nalar_spec, options)

    def __nalar_reference__(self) -> tuple[Any, ...]:
        return (classes.name_of(self._nalar_spec.target),)

    def __nalar_reference_of__(self, instance: object) -> tuple[Any, ...] | None:
        """What an instance in this process travels as; None for one that no call reaches."""
        home = self._nalar_homes.get(id(instance))
        return None if home is None else (*self.__nalar_reference__(), *home)

    def __nalar_referred__(self, *home: Any) -> Any:
        """The class, an instance, or a method of one, as in `__nalar_reference__`."""
        if not home:
            return self
        if [type(part) for part in home] not in ([str, str, bytes], [str, str, bytes, str]):
            raise MalformedMessageError("not a reference to an instance")
        session, instance, init, *method = home
        key: _Home = (session, instance, init)
        found = self._nalar_made.get(key)
        if found is None:
            found = self._nalar_made[key] = self._nalar_instance(key)
        return getattr(found, method[0]) if method else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._nalar_spec.target.__qualname__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nalar_spec.target, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._nalar_spec.target)  # type: ignore[arg-type]

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._nalar_spec.target)  # type: ignore[arg-type]

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._nalar_spec.target,)

    def __or__(self, other: Any) -> Any:
        return self._nalar_spec.target | other

    def __ror__(self, other: Any) -> Any:
        return other | self._nalar_spec.target

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._nalar_spec.target

    def __hash__(self) -> int:
        return hash(self._nalar_spec.target)

    def __repr__(self) -> str:
        return repr(self._nalar_spec.target)


class InstanceStandIn:
    """Stands for an instance of an agent that lives in a worker."""

    def __init__(self, spec: ActorSpec, options: CallOptions) -> None:
        object.__setattr__(self, "_nalar_spec", spec)
        object.__setattr__(self, "_nalar_options", options)

    @property  # isinstance() asks for it
    def __class__(self) -> Any:  # type: ignore[misc]  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._nalar_spec.target

    def __getattr__(self, name: str) -> Any:
        spec: ActorSpec = object.__getattribute__(self, "_nalar_spec")
        method = spec.methods.get(name)
        if method is not None:
            return MethodStandIn(self, spec, method, self._nalar_options)
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        attribute = inspect.getattr_static(spec.target, name, None)
        if isinstance(attribute, (staticmethod, classmethod)):
            return getattr(spec.target, name)
        context = _required(spec)
        return context.caller.call(context, spec.name, "." + name, (), {}, self._nalar_options).value()

    def __setattr__(self, name: str, value: Any) -> None:
        self._nalar_change("=" + name, moves.deep(value))

    def __delattr__(self, name: str) -> None:
        self._nalar_change("-" + name)

    def _nalar_change(self, what: str, *args: Any) -> None:
        spec: ActorSpec = self._nalar_spec
        if not spec.stateful:
            raise AttributeError(
                f"{spec.name}.{what[1:]} is changed from outside, but {spec.name!r} is not stateful: "
                f"put `stateful = true` into its table in nalar.toml"
            )
        context = _required(spec)
        context.caller.call(context, spec.name, what, args, {}, self._nalar_options).value()

    def __nalar_reference__(self) -> tuple[Any, ...]:
        options = _options_of(self)
        return (classes.name_of(self._nalar_spec.target), options.session or "", options.instance, options.init)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"an instance of {self._nalar_spec.name!r} lives in a worker and cannot be copied or pickled here")


def _options_of(instance: InstanceStandIn) -> CallOptions:
    options: CallOptions = object.__getattribute__(instance, "_nalar_options")
    return options


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
        begun = _begin(context, self._spec, self._method, self._options, args, kwargs)
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


def _instance_type(spec: ActorSpec) -> type[InstanceStandIn]:
    """The type of a class's instances here, with those special methods that the class has."""
    body: dict[str, Any] = {name: _special(name) for name in _DUNDERS if name in spec.methods}
    body["__nalar_actor__"] = "__call__" in body
    return type(spec.target.__name__, (InstanceStandIn,), body)


def _special(name: str) -> Callable[..., Any]:
    def special(self: InstanceStandIn, *args: Any, **kwargs: Any) -> Any:
        return moves.deep(InstanceStandIn.__getattr__(self, name)(*args, **kwargs))

    def leave(self: InstanceStandIn, kind: Any, error: Any, traceback: Any) -> Any:
        return special(self, kind, error, None)  # a traceback cannot travel

    def call(self: InstanceStandIn, *args: Any, **kwargs: Any) -> Any:
        spec: ActorSpec = object.__getattribute__(self, "_nalar_spec")
        begun = _begin(_required(spec), spec, spec.methods[name], _options_of(self), args, kwargs)
        return moves.delivered(begun) if spec.methods[name].style == "sync" else begun

    return {"__call__": call, "__exit__": leave, "__aexit__": leave}.get(name, special)
