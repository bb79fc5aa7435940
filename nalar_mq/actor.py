"""What a user writes with: `@agent`, `@tool`, `@workflow`, `@method`, and what the runtime knows of each actor.

    @tool
    async def search(query: str) -> list[str]: ...

    @agent(stateful=True)
    class Analyst:
        @method
        async def analyse(self, question: str) -> Report: ...

    @workflow
    async def answer(question: str) -> str:
        found = search(question)                    # Future[list[str]], at once
        report = await Analyst.analyse(found.later) # passing a future on waits for nothing
        return report.text

Type checkers see `Future[R]` for a call and `R` for an awaited one. On an instance (`Analyst().analyse("...")`) a method is
the plain method, for unit tests; `search.function` is the plain function.
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast, overload

from nalar_mq.address import check_token
from nalar_mq.annotations import check
from nalar_mq.call_context import DEFAULT_OPTIONS, CallOptions, require_context
from nalar_mq.directives import Directives, Kind
from nalar_mq.errors import AddressError, ArgumentError, DirectiveError
from nalar_mq.future import Future
from nalar_mq.schema import Step, steps_of, version_of
from nalar_mq.state import declare, descriptions_of

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Plain_co = TypeVar("Plain_co", covariant=True)
C = TypeVar("C", bound=type[Any])
_SPEC = "__nalar_actor_spec__"
_EXACT: frozenset[Any] = frozenset({str, int, float, bool, bytes})  # what has exactly such a type needs no closer look

Style = Literal["async", "sync", "async_generator", "generator"]


def style_of(function: Callable[..., Any]) -> Style:
    """How a function has to be run."""
    plain = inspect.unwrap(function)
    if inspect.isasyncgenfunction(plain):
        return "async_generator"
    if inspect.iscoroutinefunction(plain):
        return "async"
    return "generator" if inspect.isgeneratorfunction(plain) else "sync"


def label_of(actor: str, method: str) -> str:
    """`actor` or `actor.method`; also for an attribute, of which the name says by a sign what is done to it."""
    method = method.lstrip(".=-+")
    return f"{actor}.{method}" if method else actor


class MethodSpec:
    """One thing an actor can be asked to do: a method of an agent, or the function that a tool or workflow is."""

    def __init__(self, name: str, function: Callable[..., Any], *, bound: bool) -> None:
        self.name = name
        self.label = name
        self.result_label = f"the result of {name}"
        self.function = function
        self.style: Style = style_of(function)
        self.is_async = self.style in ("async", "async_generator")
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if bound else 0 :]
        self.signature = signature.replace(parameters=parameters)
        self._fewest, self._most = _positional_bounds(parameters)

    def named(self, actor: str) -> MethodSpec:
        """This one, which from now on bears the label `actor` or `actor.method`."""
        self.label = label_of(actor, self.name)
        self.result_label = f"the result of {self.label}"
        return self

    def check_arguments(self, actor: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `ArgumentError` if the arguments do not fit the signature."""
        if not kwargs and self._fewest <= len(args) <= self._most:
            return
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{actor}{self.signature}: {error}", actor=actor) from None

    @functools.cached_property
    def batch(self) -> Callable[..., Any] | None:
        """What runs several calls at once: the function beside this one whose name ends in `_batch`, if there is one.

        It takes the list of the calls' only arguments and returns the list of their results, in that order.
        """
        plain = inspect.unwrap(self.function)
        path = f"{plain.__qualname__}_batch".split(".")
        found: Any = sys.modules.get(plain.__module__)
        for name in path:
            found = getattr(found, name, None)
        return found if inspect.isfunction(found) else None

    def fitted(self, actor: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, checked against the signature and made to fit the annotations.

        Raises:
            ArgumentError: they do not fit.
        """
        if not kwargs and [*map(type, args)] == self._exact:
            return args, kwargs
        self.check_arguments(actor, tuple(args), kwargs)
        by_position, rest, by_name, others = self._wanted
        for position, value in enumerate(args):
            name, wanted = by_position[position] if position < len(by_position) else rest
            if wanted is not Any and not (type(value) is wanted and wanted in _EXACT) and not self._begins_as(name, value):
                args[position] = check(value, wanted, f"argument {name!r} of {actor}")
        for name, value in kwargs.items():
            wanted = by_name.get(name, others)
            if wanted is not Any and not self._begins_as(name, value):
                kwargs[name] = check(value, wanted, f"argument {name!r} of {actor}")
        return args, kwargs

    def _begins_as(self, name: str, value: Any) -> bool:
        """True for the None of `name: int = None`, which may also be given."""
        return value is None and name in self.signature.parameters and self.signature.parameters[name].default is None

    @functools.cached_property
    def _exact(self) -> list[Any] | None:
        """What the types of positional arguments are that need no closer look; None where all of them need one."""
        wanted = [wanted for _, wanted in self._wanted[0]]
        return wanted if self._most == len(wanted) and _EXACT.issuperset(wanted) else None

    @functools.cached_property
    def _wanted(self) -> tuple[list[tuple[str, Any]], tuple[str, Any], dict[str, Any], Any]:
        """Annotations by position, of further positions, by name, and of further names; `Any` where nothing is wanted."""
        by_position: list[tuple[str, Any]] = []
        rest: tuple[str, Any] = ("", Any)
        by_name: dict[str, Any] = {}
        others: Any = Any
        for parameter in self.signature.parameters.values():
            wanted = self.annotations.get(parameter.name, Any)
            if parameter.kind is parameter.VAR_POSITIONAL:
                rest = (parameter.name, wanted)
            elif parameter.kind is parameter.VAR_KEYWORD:
                others = wanted
            else:
                by_name[parameter.name] = wanted
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    by_position.append((parameter.name, wanted))
        return by_position, rest, by_name, others

    @functools.cached_property
    def annotations(self) -> dict[str, Any]:
        """Parameter and return annotations as types; those that cannot be resolved are left out."""
        plain = inspect.unwrap(self.function)
        try:
            return typing.get_type_hints(plain, include_extras=True)
        except Exception:
            return {name: hint for name, hint in getattr(plain, "__annotations__", {}).items() if not isinstance(hint, str)}

    def __str__(self) -> str:
        return f"{self.name}{self.signature}"


def _positional_bounds(parameters: list[inspect.Parameter]) -> tuple[int, int]:
    """Fewest and most positional arguments that fit without a closer look; (1, 0) where only a closer look tells."""
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return 1, 0
    fewest = sum(p.default is p.empty for p in positional)
    endless = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return fewest, 1 << 30 if endless else len(positional)


class ActorSpec:
    """What the runtime knows of an actor type.

    Attributes:
        name: a token, unique in an app.
        kind: `agent`, `tool` or `workflow`.
        target: the user's class or function.
        directives: validated, with defaults.
        methods: by name; a tool or workflow has the one method "".
        managed: it has managed state.
        upgrades: what brings kept state of former versions to the next one.
        state_version: of its managed state.
        is_kept: its managed state is in the store of its worker, and survives it.
        is_replicated: it survives the loss of its machine as well.
        stateful: calls of one session go, one at a time and in order, to one instance.
        transparent: unmodified Python named in a manifest, whose drivers are rewritten.
        doc: first line of the docstring.
        version: of a workflow's code; empty if it is not known.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        target: Callable[..., Any],
        directives: Directives,
        methods: dict[str, MethodSpec],
        *,
        transparent: bool = False,
    ) -> None:
        try:
            self.name = check_token(name, f"name of {kind}")
        except AddressError as error:
            raise DirectiveError(str(error)) from None
        self.kind: Kind = kind
        self.target = target
        fields = declare(target, directives.managed) if kind == "agent" and isinstance(target, type) else {}
        self._fields = tuple(fields)
        self.managed = bool(fields)
        self.upgrades: dict[int, Step] = steps_of(target) if fields and isinstance(target, type) else {}
        self.state_version = version_of(self.upgrades)
        self.directives = directives.validated(kind, name, managed=self.managed)
        self.is_kept = self.managed and self.directives.durability != "memory"
        self.is_replicated = self.is_kept and self.directives.durability == "replicated"
        self.methods = {key: method.named(name) for key, method in methods.items()}
        self.stateful = bool(self.directives.stateful) or self.managed
        self.transparent = transparent
        self.doc = (inspect.getdoc(target) or "").partition("\n")[0]
        self.version = self.directives.version

    @functools.cached_property
    def managed_kinds(self) -> dict[str, str]:
        """What its managed fields hold, by name: `list[int]`. Not before its module has been run."""
        return descriptions_of(self.target, self._fields) if isinstance(self.target, type) else {}

    def check_complete(self) -> None:
        """To be called when the target's module has been run: what the directives name must be there.

        Raises:
            DirectiveError: it is not.
        """
        hook = self.directives.preemptable
        if not hook:
            return
        holder = self.target if self.kind == "agent" else inspect.getmodule(self.target)
        if not callable(getattr(holder, hook, None)):
            raise DirectiveError(f"{self.kind} {self.name!r}: 'preemptable' names {hook!r}, which is not a function there")

    @property
    def concurrency(self) -> int:
        """Calls that one replica runs at once: 256 where everything is async, else 32, unless a directive says."""
        if self.directives.concurrency is not None:
            return self.directives.concurrency
        return 256 if all(method.is_async for method in self.methods.values()) else 32


def spec_of(target: object) -> ActorSpec | None:
    """The spec of a decorated class or function; None for anything else, subclasses of agents included."""
    if isinstance(target, type):
        found = target.__dict__.get(_SPEC)
        return found if isinstance(found, ActorSpec) else None
    return target.spec if isinstance(target, FunctionStub) else None


class CallStub(Generic[P, R_co]):
    """Stands for one method of an actor at the caller: calling it makes a future.

    Raises (when called):
        ArgumentError: the arguments do not fit the signature.
        NotConnectedError: there is no runtime here.
        ValueNotEncodableError, ValueTooLargeError: an argument cannot travel.
    """

    __nalar_actor__ = True
    __slots__ = ("_label", "_method", "_options", "spec")

    def __init__(self, spec: ActorSpec, method: MethodSpec, options: CallOptions = DEFAULT_OPTIONS) -> None:
        self.spec = spec
        self._method = method
        self._options = options
        self._label = f"{spec.name}.{method.name}" if method.name else spec.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Future[R_co]:
        """Makes the call; the future is there at once."""
        context = require_context(self._label)
        self._method.check_arguments(self._label, args, kwargs)
        return context.caller.call(context, self.spec.name, self._method.name, args, kwargs, self._options)

    def cast(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Makes the call and wants no result; it still runs to its end, and its error is logged where it ran."""
        context = require_context(self._label)
        self._method.check_arguments(self._label, args, kwargs)
        context.caller.call(context, self.spec.name, self._method.name, args, kwargs, self._options.but(cast=True))

    def options(
        self,
        *,
        session: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = -1.0,
        retries: int | None = None,
    ) -> CallStub[P, R_co]:
        """The same stub with other options for the calls made through it; those left out stay as they are.

        Args:
            session: the session its calls belong to, in place of the caller's.
            priority: higher runs earlier.
            timeout_s: seconds until the deadline, never later than the caller's own; None for no deadline.
            retries: how often the call may be sent again after its worker was lost.

        Raises:
            AddressError: the session is no token.
            ArgumentError: one of the others is no number.
        """
        options = self._options.with_given(session=session, priority=priority, timeout_s=timeout_s, retries=retries)
        return CallStub(self.spec, self._method, options)

    def __repr__(self) -> str:
        return f"<{self.spec.kind} {self._label}>"


class FunctionStub(CallStub[P, R_co]):
    """A decorated tool or workflow. `function` is the plain function that was decorated."""

    def __init__(self, spec: ActorSpec, function: Callable[..., Any]) -> None:
        super().__init__(spec, spec.methods[""])
        self.function = function
        functools.update_wrapper(self, function)


class Method(Generic[P, R_co, Plain_co]):
    """A public method of an agent: on the class a stub, on an instance the plain method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        functools.update_wrapper(cast(Any, self), function)
        self._stubs: dict[type, CallStub[Any, Any]] = {}

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> CallStub[P, R_co]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Callable[P, Plain_co]: ...
    def __get__(self, instance: object | None, owner: type) -> CallStub[P, R_co] | Callable[P, Plain_co]:
        if instance is not None:
            return cast("Callable[P, Plain_co]", self.function.__get__(instance, owner))
        stub = self._stubs.get(owner)
        if stub is None:
            spec = spec_of(owner)
            if spec is None:
                raise DirectiveError(f"class {owner.__qualname__} has methods marked @method but is not marked @agent")
            stub = self._stubs[owner] = CallStub(spec, spec.methods[self.name])
        return stub


@overload
def method(
    function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Method[P, R, Coroutine[Any, Any, R]]: ...
@overload
def method(
    function: Callable[Concatenate[Any, P], AsyncIterator[R]],
) -> Method[P, list[R], AsyncIterator[R]]: ...
@overload
def method(
    function: Callable[Concatenate[Any, P], Iterator[R]],
) -> Method[P, list[R], Iterator[R]]: ...
@overload
def method(function: Callable[Concatenate[Any, P], R]) -> Method[P, R, R]: ...
def method(function: Callable[..., Any]) -> Any:
    """Marks a public method of an agent: what others may call."""
    made: Any = Method[Any, Any, Any](function)
    return made


@overload
def agent(cls: C, /) -> C: ...
@overload
def agent(*, name: str | None = None, **directives: Any) -> Callable[[C], C]: ...
def agent(cls: Any = None, /, *, name: str | None = None, **directives: Any) -> Any:
    """Makes a class an agent. Its name is `name`, or the name of the class.

    The runtime makes the instances, without arguments: one for each session if `stateful` or with managed state (fields that
    are annotated as `ManagedList`, `ManagedDict` or `ManagedValue`), else one in each replica.
    `async def on_start(self)` and `async def on_stop(self)`, or plain ones, mark its life.

    Raises:
        DirectiveError: a directive is unknown, wrong or contradicts another, or no method is marked `@method`.
    """

    def decorate(target: C) -> C:
        methods = {
            attribute: MethodSpec(attribute, found.function, bound=True)
            for attribute in dir(target)
            if isinstance(found := inspect.getattr_static(target, attribute), Method)
        }
        if not methods:
            raise DirectiveError(f"agent {target.__name__!r} has no method marked @method, so nobody could call it")
        setattr(target, _SPEC, ActorSpec(name or target.__name__, "agent", target, Directives.of(directives), methods))
        return target

    return decorate if cls is None else decorate(cls)


class _FunctionDecorator:
    """`@tool` and `@workflow`, bare or with directives, typed by the function they decorate."""

    def __init__(self, kind: Kind, name: str | None = None, directives: dict[str, Any] | None = None) -> None:
        self._kind: Kind = kind
        self._name = name
        self._directives = directives or {}

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> FunctionStub[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, AsyncIterator[R]], /) -> FunctionStub[P, list[R]]: ...
    @overload
    def __call__(self, function: Callable[P, Iterator[R]], /) -> FunctionStub[P, list[R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> FunctionStub[P, R]: ...
    @overload
    def __call__(self, /, *, name: str | None = None, **directives: Any) -> _FunctionDecorator: ...
    def __call__(self, function: Any = None, /, *, name: str | None = None, **directives: Any) -> Any:
        """Decorates a function, or returns a decorator that knows `name` and the directives.

        Raises:
            DirectiveError: a directive is unknown, wrong or contradicts another.
        """
        if function is None:
            Directives.of(directives).validated(self._kind, name or "")
            return _FunctionDecorator(self._kind, name, directives)
        spec = function_spec(self._kind, self._name or function.__name__, function, Directives.of(self._directives))
        stub: Any = FunctionStub[Any, Any](spec, function)
        return stub


def function_spec(
    kind: Kind, name: str, function: Callable[..., Any], directives: Directives, *, transparent: bool = False
) -> ActorSpec:
    """The spec of a tool or workflow."""
    methods = {"": MethodSpec("", function, bound=False)}
    return ActorSpec(name, kind, function, directives, methods, transparent=transparent)


tool = _FunctionDecorator("tool")
"""Makes a function a tool: others call it and get a future. Sync code runs in a thread, async code on the loop."""

workflow = _FunctionDecorator("workflow")
"""Makes a function a workflow: a function that drives agents and tools, and that clients may start."""
