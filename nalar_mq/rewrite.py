"""Rewrites a user's plain Python so that calls of actors may overlap and the result stays that of plain Python.

Each expression stands in one of three places:

    move    may be a future: the right side of a binding, an element of a list or tuple, a value of a dict, an argument,
            what is returned or yielded
    value   must not be a future itself: what is tested, iterated over, called, subscripted, asked for an attribute, `is`
    deep    must not hold a future either: operands, keys, `match` subjects, f-strings, what is raised or thrown away

`_Rewriter` gives every expression the place it stands in; what the functions it puts in do at run time is told in
`nalar_mq.moves`. Where names are read by code that is not rewritten (modules, class bodies, names that an `async def` uses)
bindings are deep. Bodies of `try` and `with` are guarded: what a statement there binds is deep and all calls made meanwhile
have ended, and names from outside that the body reads have their values before it begins, as errors of calls made outside
belong outside. In generators each statement of such a body that does not yield is guarded on its own. `async def` stays as
it is; functions inside it are rewritten.

File name, lines and columns are the user's. The names put in begin with `_@`, which no Python source can write.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from nalar_mq import origins
from nalar_mq.scopes import SCALAR_CALLS, Scope, bound_names, function_scope, own_nodes, parameters
from nalar_mq.syntax import parse

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_N = TypeVar("_N", bound=ast.AST)

_LAZY_CALLS: Final = frozenset({"zip", "enumerate", "reversed", "iter"})
_SHALLOW_CALLS: Final = frozenset({"len", "bool", "id", "isinstance"})
# Methods of containers and text that store or look up and call nothing back; what else has them is a plain method.
_SIMPLE_METHODS: Final = frozenset(
    {
        *("append", "appendleft", "popleft", "items", "keys", "values", "get", "setdefault", "add", "discard"),
        *("strip", "lstrip", "rstrip", "split", "splitlines", "lower", "upper", "title", "startswith", "endswith", "replace"),
    }
)
_NUMERIC: Final = (ast.Sub, ast.Div, ast.FloorDiv, ast.Pow, ast.LShift, ast.RShift)


def rewrite_source(source: str | bytes, filename: str, plain: Collection[str] = ()) -> types.CodeType:
    """Compiles a module so that futures may move in it.

    The code is to be run in a namespace that holds `moves.NAMES`. Definitions at the top of the module whose names are in
    `plain` stay as they are.

    Raises:
        SyntaxError: as `compile` does.
    """
    tree = parse(source, filename)
    kept = [_lines(node) for node in tree.body if _is_kept(node, plain)]
    rewritten = _Rewriter(tree, frozenset(plain)).module()
    code = compile(ast.fix_missing_locations(rewritten), filename, "exec", dont_inherit=True)
    return _marked(code, kept, outermost=True)


def _is_kept(node: ast.stmt, plain: Collection[str]) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name in plain


def _lines(node: Any) -> range:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return range(first, node.end_lineno + 1)


def _marked(code: types.CodeType, kept: Sequence[range], *, outermost: bool = False) -> types.CodeType:
    """The same code in which every rewritten function is known as such by its last constant."""
    if any(code.co_firstlineno in lines for lines in kept) and not outermost:
        return code
    consts = tuple(_marked(const, kept) if isinstance(const, types.CodeType) else const for const in code.co_consts)
    asynchronous = code.co_flags & (0x80 | 0x200)  # CO_COROUTINE, CO_ASYNC_GENERATOR
    is_function = code.co_flags & 0x2  # CO_NEWLOCALS: functions, not modules and classes
    if is_function and not asynchronous:
        consts = (*consts, origins.MARK)
    return code.replace(co_consts=consts)


class _Rewriter:
    """Rewrites one module; nodes are changed in place where they stay what they are."""

    def __init__(self, tree: ast.Module, plain: frozenset[str]) -> None:
        self._tree = tree
        self._plain = plain
        self._scope = Scope("module", None)
        every = [*bound_names(ast.walk(tree)), *(a.arg for a in ast.walk(tree) if isinstance(a, ast.arg))]
        self._module_names = frozenset(every)
        self._functions = frozenset(
            n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.decorator_list and every.count(n.name) == 1
        )
        self._depth = 0
        self._in_iterable = 0
        self._certain = True

    def module(self) -> ast.Module:
        body: list[ast.stmt] = []
        for statement in self._tree.body:
            body.extend([statement] if _is_kept(statement, self._plain) else self._statement(statement))
        self._tree.body = body
        return self._tree

    # Building blocks.

    def _ask(self, name: str, at: ast.AST, *arguments: ast.expr) -> ast.Call:
        function = ast.copy_location(ast.Name(f"_@{name}", ast.Load()), at)
        return ast.copy_location(ast.Call(function, list(arguments), []), at)

    def _text(self, text: str, at: ast.AST) -> ast.Constant:
        return ast.copy_location(ast.Constant(text), at)

    def _load(self, name: str, at: ast.AST) -> ast.Name:
        return ast.copy_location(ast.Name(name, ast.Load()), at)

    def _assign(self, name: str, source: ast.expr, at: ast.AST) -> ast.stmt:
        target = ast.copy_location(ast.Name(name, ast.Store()), at)
        return ast.copy_location(ast.Assign([target], source), at)

    def _temporary(self) -> str:
        self._scope.temporaries += 1
        return f"_@{self._scope.temporaries}"

    # What is known without running.

    def _is_value(self, node: ast.expr) -> bool:
        """True if the expression as written cannot be a future."""
        match node:
            case ast.Name(id=name):
                return not self._scope.may_be_future(name)
            case ast.BoolOp(values=operands):
                return self._is_value(operands[-1])
            case ast.IfExp(body=body, orelse=orelse):
                return self._is_value(body) and self._is_value(orelse)
            case ast.Call() as call:
                return self._is_scalar_call(call) or _is_super(call)
            case ast.Attribute() | ast.Subscript() | ast.NamedExpr() | ast.Starred():
                return False
            case _:
                return True

    def _is_clean(self, node: ast.expr) -> bool:
        """True if the expression as written is a value that holds no future."""
        match node:
            case ast.Constant() | ast.JoinedStr() | ast.UnaryOp() | ast.Compare() | ast.Lambda() | ast.GeneratorExp():
                return True
            case ast.BinOp(left=left, op=op, right=right):
                if not _has_plain_operand(node) or isinstance(op, (*_NUMERIC, ast.Mod)):
                    return True
                return self._is_clean(left) and self._is_clean(right)
            case ast.Name(id=name):
                return self._scope.is_scalar(name)
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
                return all(self._is_clean(e) for e in elements)
            case ast.IfExp(body=body, orelse=orelse):
                return self._is_clean(body) and self._is_clean(orelse)
            case ast.Call() as call:
                return self._is_scalar_call(call)
            case _:
                return False

    def _is_scalar_call(self, node: ast.Call) -> bool:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        plain = not any(isinstance(a, ast.Starred) for a in node.args) and all(k.arg for k in node.keywords)
        return plain and name in SCALAR_CALLS and name not in self._module_names

    # The places an expression may stand in.

    def _value(self, node: ast.expr) -> ast.expr:
        known = self._is_value(node)
        if isinstance(node, ast.NamedExpr):
            node.value = self._value(node.value) if self._walrus_moves(node.target.id) else self._full(node.value)
            return node
        moved = self._move(node)
        return moved if known else self._learn("value", node, moved)

    def _learn(self, how: str, node: ast.expr, moved: ast.expr) -> ast.expr:
        """Asks for the value; a name of this function keeps it, so that what runs later need not ask again."""
        scope = self._scope
        asked = self._ask(how, moved, moved)
        if not isinstance(node, ast.Name) or not self._certain or self._in_iterable:
            return asked
        if scope.kind != "function" or node.id not in scope.fixed or node.id in scope.exposed | scope.known:
            return asked
        scope.known.add(node.id)
        return ast.copy_location(ast.NamedExpr(ast.copy_location(ast.Name(node.id, ast.Store()), node), asked), node)

    def _maybe(self, rewrite: Callable[[ast.expr], ast.expr], node: ast.expr) -> ast.expr:
        """Rewrites what may not be evaluated."""
        before, self._certain = self._certain, False
        try:
            return rewrite(node)
        finally:
            self._certain = before

    def _deep(self, node: ast.expr) -> ast.expr:
        known = self._is_clean(node)
        moved = self._move(node)
        return moved if known else self._learn("deep", node, moved)

    def _full(self, node: ast.expr) -> ast.expr:
        """Deep, and in a guarded body after the end of all calls that were made for it."""
        if not self._scope.guarded or not _has_call(node):
            return self._deep(node)
        moved = self._move(node)
        if _has_yield(node):
            return self._ask("deep", moved, moved)
        return self._ask("settled", moved, self._ask("mark", moved), moved)

    def _test(self, node: ast.expr) -> ast.expr:
        return self._full(node) if self._scope.guarded and _has_call(node) else self._value(node)

    def _bound(self, node: ast.expr, name: str = "") -> ast.expr:
        """What is bound to a name of this scope."""
        scope = self._scope
        deep = scope.guarded or not scope.binds_futures or name in scope.globals or name in scope.exposed
        return self._full(node) if deep else self._move(node)

    def _iterated(self, node: ast.expr, target: ast.expr, *, guarded: bool) -> ast.expr:
        """What a loop iterates over, given what it binds each element to."""
        if self._is_range(node):
            return self._move(node)
        name = "iter"
        if guarded or not self._scope.binds_futures or not _is_flat(target) or self._binds_deep(target):
            name = "deep_each"
        elif not isinstance(target, ast.Name):
            name = "unpack_each"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _LAZY_CALLS and not guarded:
            moved: ast.expr = self._call(node, "call_iter")
        else:
            moved = self._full(node) if guarded else self._move(node)
        return self._ask(name, moved, moved)

    def _is_range(self, node: ast.expr) -> bool:
        named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
        return named and "range" not in self._module_names

    def _binds_deep(self, target: ast.expr) -> bool:
        scope = self._scope
        return any(isinstance(n, ast.Name) and n.id in (scope.exposed | scope.globals) for n in ast.walk(target))

    # Expressions in a moving place.

    def _move(self, node: ast.expr) -> ast.expr:
        rewrite = getattr(self, f"_move_{type(node).__name__.lower()}", None)
        if rewrite is None:
            return node
        result: ast.expr = rewrite(node)
        return result

    def _move_call(self, node: ast.Call) -> ast.expr:
        if _is_super(node):
            return node
        if self._is_scalar_call(node):
            return self._call_scalar(node)
        return self._call_native(node) if self._is_native(node) else self._call(node, "call")

    def _call_scalar(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        shallow = node.func.id in _SHALLOW_CALLS
        node.args = [self._value(a) if shallow else self._deep(a) for a in node.args]
        for keyword in node.keywords:
            keyword.value = self._deep(keyword.value)
        return node

    def _is_native(self, node: ast.Call) -> bool:
        """True if the call may stay a call, with what it calls and its arguments looked at one by one."""
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            return False
        if self._scope.guarded and not self._is_plain_call(node):
            return False
        if isinstance(node.func, ast.Name) or (self._scope.kind == "function" and not self._in_iterable):
            return True
        return self._passes_clean(node)

    def _passes_clean(self, node: ast.Call) -> bool:
        passed = [*node.args, *(k.value for k in node.keywords)]
        return all(self._is_clean(a) and not isinstance(a, ast.GeneratorExp) for a in passed)

    def _call_native(self, node: ast.Call) -> ast.expr:
        clean = self._passes_clean(node)
        function, key = node.func, ""
        if isinstance(function, ast.Name):
            key = function.id
        elif not clean:
            key = f"_@f{self._depth}"
        known = isinstance(function, ast.Name) and self._is_known_function(function.id)
        moved = self._move(function)
        if key.startswith("_@"):
            moved = ast.copy_location(ast.NamedExpr(ast.copy_location(ast.Name(key, ast.Store()), function), moved), function)
        known = known or (isinstance(function, ast.Attribute) and function.attr in _SIMPLE_METHODS)
        node.func = moved if known else self._ask("called", function, moved)
        self._depth += 1
        node.args = [self._passed(a, key, i) for i, a in enumerate(node.args)]
        for keyword in node.keywords:
            keyword.value = self._passed(keyword.value, key, -1)
        self._depth -= 1
        return node

    def _passed(self, node: ast.expr, key: str, position: int) -> ast.expr:
        if self._is_clean(node) and not isinstance(node, ast.GeneratorExp):
            return self._move(node)
        moved = self._move(node)
        at = ast.copy_location(ast.Constant(position), moved)
        return self._ask("argument", moved, self._load(key, moved), moved, at)

    def _is_known_function(self, name: str) -> bool:
        return name in self._functions and self._scope.is_global(name)

    def _call(self, node: ast.Call, helper: str) -> ast.Call:
        function = ast.copy_location(ast.Name(f"_@{helper}", ast.Load()), node)
        arguments = [self._move(node.func)]
        if self._scope.guarded and helper == "call" and not self._is_plain_call(node):
            function.id = "_@call_guarded"
            arguments.append(self._ask("mark", node))
        arguments.extend(self._argument(a) for a in node.args)
        keywords = node.keywords
        for keyword in keywords:
            keyword.value = self._move(keyword.value) if keyword.arg else self._value(keyword.value)
        prepared = ast.copy_location(ast.Call(function, arguments, keywords), node)
        return ast.copy_location(ast.Call(prepared, [], []), node)

    def _is_plain_call(self, node: ast.Call) -> bool:
        """True if no argument can be a call that fails."""
        return not any(_has_call(a) for a in node.args) and not any(_has_call(k.value) for k in node.keywords)

    def _argument(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Starred):
            node.value = self._ask("iter", node.value, self._move(node.value))
            return node
        return self._move(node)

    def _move_attribute(self, node: ast.Attribute) -> ast.expr:
        node.value = self._value(node.value)
        return node

    def _move_subscript(self, node: ast.Subscript) -> ast.expr:
        node.value = self._value(node.value)
        node.slice = self._key(node.slice)
        return node

    def _key(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Slice):
            return self._move_slice(node)
        if isinstance(node, ast.Tuple) and any(isinstance(e, ast.Slice) for e in node.elts):
            node.elts = [self._key(e) for e in node.elts]
            return node
        return self._deep(node)

    def _move_slice(self, node: ast.Slice) -> ast.expr:
        node.lower = self._deep(node.lower) if node.lower else None
        node.upper = self._deep(node.upper) if node.upper else None
        node.step = self._deep(node.step) if node.step else None
        return node

    def _move_boolop(self, node: ast.BoolOp) -> ast.expr:
        first, *middle, last = node.values
        tests = [self._value(first), *(self._maybe(self._value, v) for v in middle)]
        node.values = [*tests, self._maybe(self._move, last)]
        return node

    def _move_ifexp(self, node: ast.IfExp) -> ast.expr:
        node.test = self._value(node.test)
        node.body = self._maybe(self._move, node.body)
        node.orelse = self._maybe(self._move, node.orelse)
        return node

    def _move_namedexpr(self, node: ast.NamedExpr) -> ast.expr:
        node.value = self._move(node.value) if self._walrus_moves(node.target.id) else self._full(node.value)
        return node

    def _walrus_moves(self, name: str) -> bool:
        scope = self._scope
        while scope.kind == "comprehension" and scope.parent is not None:
            scope = scope.parent
        exempt = scope.guarded or name in scope.globals or name in scope.exposed
        return scope.kind == "function" and not exempt

    def _move_binop(self, node: ast.BinOp) -> ast.expr:
        operand = self._value if _has_plain_operand(node) else self._deep
        node.left = operand(node.left)
        node.right = operand(node.right)
        return node

    def _move_unaryop(self, node: ast.UnaryOp) -> ast.expr:
        node.operand = self._value(node.operand) if isinstance(node.op, ast.Not) else self._deep(node.operand)
        return node

    def _move_compare(self, node: ast.Compare) -> ast.expr:
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            node.left = self._value(node.left)
            node.comparators = [self._value(c) for c in node.comparators]
            return node
        if len(node.ops) == 1 and not isinstance(node.ops[0], (ast.In, ast.NotIn)):
            constant = any(isinstance(n, ast.Constant) for n in (node.left, node.comparators[0]))
            operand = self._value if constant else self._deep
            node.left = operand(node.left)
            node.comparators = [operand(node.comparators[0])]
            return node
        node.left = self._deep(node.left)
        last = len(node.ops) - 1
        for i, (op, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
            searched = isinstance(op, (ast.In, ast.NotIn)) and i == last and not self._is_clean(right)
            how = self._searched if searched else self._deep
            node.comparators[i] = how(right) if i == 0 else self._maybe(how, right)
        return node

    def _searched(self, node: ast.expr) -> ast.expr:
        return self._ask("in", node, self._move(node))

    def _move_joinedstr(self, node: ast.JoinedStr) -> ast.expr:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                part.value = self._deep(part.value)
                if part.format_spec is not None:
                    part.format_spec = self._move(part.format_spec)
        return node

    def _move_list(self, node: ast.List | ast.Tuple) -> ast.expr:
        node.elts = [self._argument(e) for e in node.elts]
        return node

    _move_tuple = _move_list

    def _move_set(self, node: ast.Set) -> ast.expr:
        node.elts = [self._argument(e) if isinstance(e, ast.Starred) else self._deep(e) for e in node.elts]
        return node

    def _move_dict(self, node: ast.Dict) -> ast.expr:
        for i, (key, content) in enumerate(zip(node.keys, node.values, strict=True)):
            node.keys[i] = self._deep(key) if key else None
            node.values[i] = self._move(content) if key else self._value(content)
        return node

    def _move_starred(self, node: ast.Starred) -> ast.expr:
        return self._argument(node)

    def _move_lambda(self, node: ast.Lambda) -> ast.expr:
        self._defaults(node.args)
        outer = self._scope
        self._scope = function_scope(node, outer, self._module_names)
        clean = self._is_clean(node.body)
        body = self._move(node.body)
        if self._scope.is_generator:
            clean = True
        node.body = body if clean else self._ask("return", body, body)
        self._scope = outer
        return node

    def _move_yield(self, node: ast.Yield) -> ast.expr:
        if node.value is not None:
            if self._scope.guarded:
                node.value = self._full(node.value)
            elif self._is_clean(node.value):
                node.value = self._move(node.value)
            else:
                moved = self._move(node.value)
                node.value = self._ask("yield", moved, moved)
        return node

    def _move_yieldfrom(self, node: ast.YieldFrom) -> ast.expr:
        moved = self._move(node.value)
        node.value = self._ask("delegate", moved, moved)
        return node

    def _comprehension(self, node: _Comprehension) -> Scope:
        outer = self._scope
        inner = Scope("comprehension", outer)
        inner.names = {n for g in node.generators for n in bound_names(ast.walk(g.target))}
        if not isinstance(node, ast.GeneratorExp):
            inner.known = outer.known - inner.names
        for i, generator in enumerate(node.generators):
            self._scope = outer if i == 0 else inner
            self._in_iterable += 1
            node.generators[i].iter = self._comprehended(generator)
            self._in_iterable -= 1
            self._scope = inner
            generator.ifs = [self._value(test) for test in generator.ifs]
        return outer

    def _comprehended(self, generator: ast.comprehension) -> ast.expr:
        scope = self._scope
        binds = scope.kind
        if not scope.binds_futures:
            scope.kind = "comprehension"
        try:
            return self._iterated(generator.iter, generator.target, guarded=False)
        finally:
            scope.kind = binds

    def _move_listcomp(self, node: ast.ListComp) -> ast.expr:
        outer = self._comprehension(node)
        node.elt = self._move(node.elt)
        self._scope = outer
        return node

    def _move_setcomp(self, node: ast.SetComp) -> ast.expr:
        outer = self._comprehension(node)
        node.elt = self._deep(node.elt)
        self._scope = outer
        return node

    def _move_dictcomp(self, node: ast.DictComp) -> ast.expr:
        outer = self._comprehension(node)
        node.key = self._deep(node.key)
        node.value = self._move(node.value)
        self._scope = outer
        return node

    def _move_generatorexp(self, node: ast.GeneratorExp) -> ast.expr:
        outer = self._comprehension(node)
        clean = self._is_clean(node.elt)
        moved = self._move(node.elt)
        node.elt = moved if clean else self._ask("yield", moved, moved)
        self._scope = outer
        return node

    # Statements.

    def _body(self, body: Iterable[ast.stmt], *, guarded: bool | None = None) -> list[ast.stmt]:
        """The statements of one branch; what it learns about names is not known after it."""
        scope = self._scope
        before, known = scope.guarded, set(scope.known)
        scope.guarded = before if guarded is None else guarded
        try:
            return [out for statement in body for out in self._in_body(statement)]
        finally:
            scope.guarded = before
            scope.known = known

    def _in_body(self, node: ast.stmt) -> list[ast.stmt]:
        """One statement; in a guarded body of a generator it is guarded on its own, since others run while it yields."""
        alone = self._scope.is_generator and self._scope.guarded and _calls_and_goes_on(node)
        rewritten = self._statement(node)
        if not alone:
            return rewritten
        return [ast.copy_location(ast.With([ast.withitem(self._ask("guard", node))], rewritten), node)]

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        rewrite = getattr(self, f"_do_{type(node).__name__.lower()}", None)
        bound = set(bound_names(own_nodes([node])))
        if isinstance(node, (ast.For, ast.While, ast.Try, ast.TryStar)):
            self._scope.known -= bound
        result: list[ast.stmt] = [node] if rewrite is None else rewrite(node)
        self._scope.known -= bound
        return result

    def _do_expr(self, node: ast.Expr) -> list[ast.stmt]:
        if isinstance(node.value, (ast.Yield, ast.YieldFrom)) or self._only_stores(node.value):
            node.value = self._move(node.value)
        elif not isinstance(node.value, ast.Constant):
            node.value = self._full(node.value)
        return [node]

    def _only_stores(self, node: ast.expr) -> bool:
        """True for `d.setdefault(k, x)` as a statement: `x` is not thrown away."""
        stores = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault"
        return stores and not self._scope.guarded

    def _do_return(self, node: ast.Return) -> list[ast.stmt]:
        if node.value is None:
            return [node]
        if self._scope.guarded or self._scope.is_generator:
            node.value = self._full(node.value)
        elif self._is_clean(node.value):
            node.value = self._move(node.value)
        else:
            moved = self._move(node.value)
            node.value = self._ask("return", moved, moved)
        return [node]

    def _do_assign(self, node: ast.Assign) -> list[ast.stmt]:
        if len(node.targets) > 1:
            return self._assign_many(node)
        target = node.targets[0]
        if isinstance(target, ast.Name):
            node.value = self._bound(node.value, target.id)
            return [node]
        if isinstance(target, (ast.Tuple, ast.List)):
            return self._assign_unpacked(node, target)
        if isinstance(target, (ast.Attribute, ast.Subscript)):
            return self._store(node, target)
        return [node]

    def _assign_many(self, node: ast.Assign) -> list[ast.stmt]:
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        deep = len(names) < len(node.targets) or any(self._binds_deep(t) for t in node.targets)
        node.value = self._full(node.value) if deep else self._bound(node.value)
        node.targets = [self._target(t) for t in node.targets]
        return [node]

    def _assign_unpacked(self, node: ast.Assign, target: ast.Tuple | ast.List) -> list[ast.stmt]:
        source = node.value
        moves_on = self._scope.binds_futures and not self._scope.guarded and not self._binds_deep(target)
        if not moves_on or not _is_flat(target):
            node.value = self._full(source)
        elif isinstance(source, (ast.Tuple, ast.List)) and not any(isinstance(e, ast.Starred) for e in source.elts):
            node.value = self._move(source)
        else:
            node.value = self._ask("iter", source, self._move(source))
        node.targets = [self._target(target)]
        return [node]

    def _store(self, node: ast.Assign | ast.AnnAssign, target: ast.Attribute | ast.Subscript) -> list[ast.stmt]:
        assert node.value is not None
        native = self._scope.guarded or not self._scope.binds_futures or self._is_clean(node.value)
        if native or isinstance(getattr(target, "slice", None), ast.Slice):
            node.value = self._full(node.value)
            self._target(target)
            return [node]
        before: list[ast.stmt] = []
        moved = self._move(node.value)
        holder = target.value
        if not isinstance(holder, ast.Name):
            content, place = self._temporary(), self._temporary()
            before = [self._assign(content, moved, node), self._assign(place, self._value(holder), node)]
            moved = self._load(content, node)
            target.value = holder = self._load(place, node)
            if isinstance(target, ast.Subscript):
                target.slice = self._key(target.slice)
        else:
            self._target(target)
        node.value = self._kept(moved, self._load(holder.id, holder), target)
        return [*before, node]

    def _kept(self, moved: ast.expr, holder: ast.expr, target: ast.Attribute | ast.Subscript) -> ast.expr:
        if isinstance(target, ast.Subscript):
            return self._ask("item", moved, moved, holder)
        return self._ask("attribute", moved, moved, holder, self._text(self._scope.mangled(target.attr), target))

    def _target(self, target: ast.expr) -> ast.expr:
        """The expressions inside of what is assigned to."""
        if isinstance(target, (ast.Attribute, ast.Starred)):
            target.value = self._value(target.value) if isinstance(target, ast.Attribute) else self._target(target.value)
        elif isinstance(target, ast.Subscript):
            target.value = self._value(target.value)
            target.slice = self._key(target.slice)
        elif isinstance(target, (ast.Tuple, ast.List)):
            target.elts = [self._target(e) for e in target.elts]
        return target

    def _do_annassign(self, node: ast.AnnAssign) -> list[ast.stmt]:
        if node.value is None:
            return [node]
        if isinstance(node.target, ast.Name):
            node.value = self._bound(node.value, node.target.id)
            return [node]
        return self._store(node, node.target)

    def _do_augassign(self, node: ast.AugAssign) -> list[ast.stmt]:
        if isinstance(node.target, ast.Name):
            return self._augment_name(node, node.target)
        before = self._settled_target(node.target, node)
        node.value = self._full(node.value)
        return [*before, node]

    def _augment_name(self, node: ast.AugAssign, target: ast.Name) -> list[ast.stmt]:
        before: list[ast.stmt] = []
        if self._scope.may_be_future(target.id):
            loaded = self._load(target.id, target)
            how = "value" if isinstance(node.op, ast.Add) else "deep"
            before = [self._assign(target.id, self._ask(how, target, loaded), node)]
        moves_on = isinstance(node.op, ast.Add) and self._scope.binds_futures and not self._scope.guarded
        if not moves_on or self._is_clean(node.value) or self._scope.is_scalar(target.id):
            node.value = self._full(node.value)
        else:
            node.value = self._ask("add", node.value, self._move(node.value), self._load(target.id, target))
        return [*before, node]

    def _settled_target(self, target: ast.Attribute | ast.Subscript, at: ast.AST) -> list[ast.stmt]:
        """Makes an augmented target safe to read: its holder and key are evaluated once, a future there replaced."""
        holder = self._value(target.value)
        key = self._key(target.slice) if isinstance(target, ast.Subscript) else None
        if isinstance(key, (ast.Slice, ast.Tuple)):
            target.value = holder
            return []
        before: list[ast.stmt] = []
        place, target.value = self._once(holder, before, at)
        if isinstance(target, ast.Subscript) and key is not None:
            second, target.slice = self._once(key, before, at)
            check = self._ask("settle_item", at, place, second)
        else:
            attribute = self._text(self._scope.mangled(getattr(target, "attr", "")), at)
            check = self._ask("settle_attribute", at, place, attribute)
        return [*before, ast.copy_location(ast.Expr(check), at)]

    def _once(self, node: ast.expr, before: list[ast.stmt], at: ast.AST) -> tuple[ast.expr, ast.expr]:
        """Two expressions for what is to be evaluated once."""
        if isinstance(node, ast.Constant):
            return self._again(node), node
        if isinstance(node, ast.Name):
            return self._load(node.id, at), node
        name = self._temporary()
        before.append(self._assign(name, node, at))
        return self._load(name, at), self._load(name, at)

    @staticmethod
    def _again(node: ast.Constant) -> ast.Constant:
        return ast.copy_location(ast.Constant(node.value), node)

    def _do_delete(self, node: ast.Delete) -> list[ast.stmt]:
        node.targets = [self._target(t) for t in node.targets]
        return [node]

    def _do_raise(self, node: ast.Raise) -> list[ast.stmt]:
        node.exc = self._full(node.exc) if node.exc else None
        node.cause = self._full(node.cause) if node.cause else None
        return [node]

    def _do_assert(self, node: ast.Assert) -> list[ast.stmt]:
        node.test = self._test(node.test)
        node.msg = self._full(node.msg) if node.msg else None
        return [node]

    def _do_if(self, node: ast.If | ast.While) -> list[ast.stmt]:
        node.test = self._test(node.test)
        node.body = self._body(node.body)
        node.orelse = self._body(node.orelse)
        return [node]

    _do_while = _do_if

    def _do_for(self, node: ast.For) -> list[ast.stmt]:
        node.iter = self._iterated(node.iter, node.target, guarded=self._scope.guarded)
        node.target = self._target(node.target)
        node.body = self._body(node.body)
        node.orelse = self._body(node.orelse)
        return [node]

    def _do_match(self, node: ast.Match) -> list[ast.stmt]:
        node.subject = self._full(node.subject)
        for case in node.cases:
            case.guard = self._test(case.guard) if case.guard else None
            case.body = self._body(case.body)
        return [node]

    def _do_with(self, node: ast.With) -> list[ast.stmt]:
        before = self._early(node.body, node)
        for item in node.items:
            item.context_expr = self._test(item.context_expr)
            if item.optional_vars is not None:
                item.optional_vars = self._target(item.optional_vars)
        if not self._scope.is_generator:
            node.items.append(ast.withitem(self._ask("guard", node)))
        node.body = self._body(node.body, guarded=True)
        return [*before, node]

    def _do_try(self, node: ast.Try | Any) -> list[ast.stmt]:
        before = self._early(node.body, node)
        node.body = self._guarded(node.body, node)
        for handler in node.handlers:
            if handler.type is not None:
                handler.type = self._deep(handler.type)
            handled = ast.copy_location(ast.Expr(self._ask("handled", handler)), handler)
            handler.body = [handled, *self._protected(handler.body, node)]
        if node.orelse:
            node.orelse = self._protected(node.orelse, node)
        node.finalbody = self._body(node.finalbody)
        return [*before, node]

    _do_trystar = _do_try

    def _protected(self, body: list[ast.stmt], node: Any) -> list[ast.stmt]:
        """A body that only a `finally` stands around, if anything."""
        return self._guarded(body, node) if node.finalbody else self._body(body)

    def _guarded(self, body: list[ast.stmt], at: ast.AST) -> list[ast.stmt]:
        inner = self._body(body, guarded=True)
        if self._scope.is_generator:
            return inner
        return [ast.copy_location(ast.With([ast.withitem(self._ask("guard", at))], inner), at)]

    def _early(self, body: list[ast.stmt], at: ast.AST) -> list[ast.stmt]:
        """Gives the names that a guarded body reads their values before it begins."""
        if self._scope.guarded or not self._scope.binds_futures:
            return []
        loaded = [n.id for top in body for n in ast.walk(top) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        names = [n for n in dict.fromkeys(loaded) if self._scope.may_be_future(n) or n == self._scope.self_name]
        return [self._value_if_bound(name, at) for name in names]

    def _value_if_bound(self, name: str, at: ast.AST) -> ast.stmt:
        look = ast.copy_location(ast.Expr(self._load(name, at)), at)
        wait = ast.copy_location(ast.Expr(self._ask("deep", at, self._load(name, at))), at)
        unbound = ast.ExceptHandler(self._load("_@NameError", at), None, [ast.copy_location(ast.Pass(), at)])
        return ast.copy_location(ast.Try([look], [ast.copy_location(unbound, at)], [wait], []), at)

    # Definitions.

    def _defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self._deep(d) for d in arguments.defaults]
        arguments.kw_defaults = [self._deep(d) if d else None for d in arguments.kw_defaults]

    def _do_functiondef(self, node: ast.FunctionDef) -> list[ast.stmt]:
        node.decorator_list = [self._value(d) for d in node.decorator_list]
        self._defaults(node.args)
        outer = self._scope
        self._scope = function_scope(node, outer, self._module_names)
        first = 1 if ast.get_docstring(node, clean=False) is not None else 0
        start = [
            self._assign(name, self._ask("deep", node.body[0], self._load(name, node.body[0])), node.body[0])
            for name in parameters(node.args)
            if name in self._scope.exposed
        ]
        node.body = [*node.body[:first], *start, *self._body(node.body[first:])]
        self._scope = outer
        return [node]

    def _do_asyncfunctiondef(self, node: ast.AsyncFunctionDef) -> list[ast.stmt]:
        node.decorator_list = [self._value(d) for d in node.decorator_list]
        self._defaults(node.args)
        outer = self._scope
        self._scope = Scope("module", outer)
        self._scope.names = {*parameters(node.args), *bound_names(own_nodes(node.body))}
        for body in _bodies(node):
            body[:] = [out for s in body for out in (self._statement(s) if isinstance(s, _DEFINITIONS) else [s])]
        self._scope = outer
        return [node]

    def _do_classdef(self, node: ast.ClassDef) -> list[ast.stmt]:
        node.decorator_list = [self._value(d) for d in node.decorator_list]
        node.bases = [self._argument(b) for b in node.bases]
        for keyword in node.keywords:
            keyword.value = self._deep(keyword.value)
        outer = self._scope
        self._scope = Scope("class", outer)
        self._scope.class_name = node.name
        self._scope.names = set(bound_names(own_nodes(node.body)))
        node.body = self._body(node.body)
        self._scope = outer
        return [node]


_DEFINITIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """All lists of statements that run in the same scope as the body of `node`."""
    pending: list[ast.AST] = [node]
    while pending:
        inner = pending.pop()
        for field in ("body", "orelse", "finalbody"):
            body: list[ast.stmt] | None = getattr(inner, field, None)
            if body:
                yield body
                pending.extend(s for s in body if not isinstance(s, _DEFINITIONS))
        pending.extend(getattr(inner, "handlers", ()))
        pending.extend(getattr(inner, "cases", ()))


def _is_super(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "super"


def _has_plain_operand(node: ast.BinOp) -> bool:
    """True if an operand is a constant, so that the operator does not look into the other one; `"%s" % x` does."""
    return isinstance(node.right, ast.Constant) or (isinstance(node.left, ast.Constant) and not isinstance(node.op, ast.Mod))


def _is_flat(target: ast.expr) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return all(isinstance(e.value if isinstance(e, ast.Starred) else e, ast.Name) for e in target.elts)
    return isinstance(target, ast.Name)


def _has_call(node: ast.expr) -> bool:
    return any(isinstance(n, (ast.Call, ast.YieldFrom)) for n in ast.walk(node))


def _calls_and_goes_on(statement: ast.stmt) -> bool:
    """True if a statement calls something and never yields."""
    nodes = list(own_nodes([statement]))
    return any(isinstance(n, ast.Call) for n in nodes) and not any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in nodes)


def _has_yield(node: ast.expr) -> bool:
    return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in ast.walk(node))
