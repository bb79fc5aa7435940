"""The names of one module of a user's code, and what is known of them without running it: which can never be a future."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, Literal

_CONSTRUCTORS: Final = frozenset({"list", "dict", "set", "tuple", "frozenset"})
SCALAR_CALLS: Final = frozenset({"len", "int", "float", "str", "bool", "ord", "chr", "repr", "hash", "id", "isinstance"})


class Scope:
    """The names of one module, class, function or comprehension, and what is known of them."""

    def __init__(self, kind: Literal["module", "class", "function", "comprehension"], parent: Scope | None) -> None:
        self.kind = kind
        self.parent = parent
        self.names: set[str] = set()
        self.scalars: frozenset[str] = frozenset()
        self.values: frozenset[str] = frozenset()
        self.known: set[str] = set()
        self.fixed: frozenset[str] = frozenset()
        self.exposed: frozenset[str] = frozenset()
        self.globals: set[str] = set()
        self.self_name = ""
        self.class_name = ""
        self.is_generator = False
        self.guarded = False
        self.temporaries = 0

    @property
    def binds_futures(self) -> bool:
        """True if names bound here are read by rewritten code only."""
        return self.kind == "function" or self.kind == "comprehension"

    def may_be_future(self, name: str) -> bool:
        """True if a future may be bound to the name here."""
        if name in self.known:
            return False
        scope: Scope | None = self
        while scope is not None:
            if name in scope.globals:
                return False
            if name in scope.names and scope.binds_futures:
                return name not in scope.values and name != scope.self_name
            scope = scope.parent
        return False

    def is_global(self, name: str) -> bool:
        """True if the name is looked up in the module."""
        scope: Scope | None = self
        while scope is not None and scope.kind != "module":
            if name in scope.names and name not in scope.globals:
                return False
            scope = scope.parent
        return True

    def is_scalar(self, name: str) -> bool:
        """True if the name is bound to numbers, text and the like only."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names and scope.binds_futures:
                return name in scope.scalars
            scope = scope.parent
        return False

    def mangled(self, name: str) -> str:
        """The name as Python stores it: private names of classes bear the class's."""
        scope: Scope | None = self
        while scope is not None and not scope.class_name:
            scope = scope.parent
        if scope is None or not name.startswith("__") or name.endswith("__"):
            return name
        return f"_{scope.class_name.lstrip('_')}{name}"


def own_nodes(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes that run in the same scope as `body`, and the definitions in it without their insides."""
    pending = list(body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend([*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)])
        elif isinstance(node, ast.ClassDef):
            pending.extend([*node.decorator_list, *node.bases, *node.keywords])
        elif isinstance(node, ast.Lambda):
            pending.extend([*node.args.defaults, *(d for d in node.args.kw_defaults if d)])
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            pending.extend(n for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            pending.append(node.generators[0].iter)
        else:
            pending.extend(ast.iter_child_nodes(node))


def bound_names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names that the nodes bind, import and define."""
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest


def parameters(arguments: ast.arguments) -> list[str]:
    """The names of all parameters."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [a.arg for a in (*every, arguments.vararg, arguments.kwarg) if a is not None]


def function_scope(node: ast.FunctionDef | ast.Lambda, parent: Scope, module_names: Collection[str]) -> Scope:
    """The scope of a function or lambda that stands in `parent`."""
    scope = Scope("function", parent)
    body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else [*node.body]
    own = list(own_nodes(body))
    scope.globals = {name for n in own if isinstance(n, ast.Global) for name in n.names}
    nonlocals = {name for n in own if isinstance(n, ast.Nonlocal) for name in n.names}
    given = parameters(node.args)
    scope.names = ({*bound_names(own), *given} | _walrus_names(own)) - scope.globals - nonlocals
    scope.is_generator = any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own)
    scope.exposed = frozenset(_names_in_async(body))
    scope.fixed = frozenset(scope.names - _nonlocals_inside(body))
    scope.scalars = _inferred(own, scope.fixed - set(given), module_names, _is_scalar)
    scope.values = scope.scalars | _inferred(own, scope.fixed - set(given), module_names, _is_never_future)
    scope.self_name = _self_name(node, parent, own)
    return scope


def _walrus_names(nodes: Iterable[ast.AST]) -> set[str]:
    return {n.target.id for n in nodes if isinstance(n, ast.NamedExpr)}


def _names_in_async(body: Iterable[ast.AST]) -> Iterator[str]:
    for node in body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.AsyncFunctionDef):
                yield from (n.id for n in ast.walk(inner) if isinstance(n, ast.Name))


def _nonlocals_inside(body: Iterable[ast.AST]) -> set[str]:
    return {name for top in body for n in ast.walk(top) if isinstance(n, ast.Nonlocal) for name in n.names}


def _self_name(node: ast.FunctionDef | ast.Lambda, parent: Scope, own: Sequence[ast.AST]) -> str:
    """The first parameter of a method, which is never a future unless the method binds it anew."""
    if parent.kind != "class" or isinstance(node, ast.Lambda):
        return ""
    first = [*node.args.posonlyargs, *node.args.args][:1]
    if any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list) or not first:
        return ""
    return "" if first[0].arg in set(bound_names(own)) else first[0].arg


_Test = Callable[[ast.expr, Collection[str], Collection[str]], bool]


def _inferred(own: Sequence[ast.AST], names: Collection[str], module_names: Collection[str], test: _Test) -> frozenset[str]:
    """Names of which every binding passes the test, given that the others in the result do."""
    candidates = set(names)
    bindings: dict[str, list[ast.expr | None]] = {}
    simple: set[int] = set()
    for node in own:
        for name, target, source in _simple_bindings(node, module_names):
            bindings.setdefault(name, []).append(source)
            simple.add(id(target))
    for node in own:
        if id(node) not in simple:
            candidates -= set(bound_names([node]))
    candidates &= bindings.keys()
    while True:
        wrong = {n for n in candidates if not all(b is None or test(b, candidates, module_names) for b in bindings[n])}
        if not wrong:
            return frozenset(candidates)
        candidates -= wrong


def _simple_bindings(node: ast.AST, module_names: Collection[str]) -> Iterator[tuple[str, ast.Name, ast.expr | None]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, target, node.value
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
        if isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.target, node.value
    elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name):
        called = node.iter.func.id
        target = node.target
        if called == "enumerate" and isinstance(target, ast.Tuple) and target.elts:
            target = target.elts[0]
        elif called != "range":
            return
        if isinstance(target, ast.Name) and called not in module_names:
            yield target.id, target, None


def _is_scalar(node: ast.expr, names: Collection[str], module_names: Collection[str]) -> bool:
    match node:
        case ast.Constant() | ast.JoinedStr() | ast.Compare():
            return True
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.UnaryOp(operand=operand):
            return _is_scalar(operand, names, module_names)
        case ast.BinOp(left=left, right=right):
            return _is_scalar(left, names, module_names) and _is_scalar(right, names, module_names)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_scalar(body, names, module_names) and _is_scalar(orelse, names, module_names)
        case ast.Name(id=name):
            return name in names
        case ast.Call(func=ast.Name(id=name)):
            return name in SCALAR_CALLS and name not in module_names
        case _:
            return False


def _is_never_future(node: ast.expr, names: Collection[str], module_names: Collection[str]) -> bool:
    match node:
        case ast.List() | ast.Tuple() | ast.Dict() | ast.Set() | ast.ListComp() | ast.SetComp() | ast.DictComp():
            return True
        case ast.BinOp() | ast.UnaryOp() | ast.Lambda() | ast.GeneratorExp():
            return True
        case ast.Call(func=ast.Name(id=name)) if name in _CONSTRUCTORS and name not in module_names:
            return True
        case ast.IfExp(body=body, orelse=orelse):
            return _is_never_future(body, names, module_names) and _is_never_future(orelse, names, module_names)
        case _:
            return _is_scalar(node, names, module_names)
