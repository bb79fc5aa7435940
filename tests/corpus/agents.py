"""Agents and tools in every role: constructors that fail, attributes, special methods, streams, references, async code.

As in `patterns`, each `p_*` function takes nothing and gives a value, or raises; `TOOLS` and `AGENTS` become actors.
"""

import asyncio, threading, time, functools, json, re, sys, traceback, collections, contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field


class Boom(Exception):
    def __init__(self, what, code):
        super().__init__(what, code)
        self.what = what
        self.code = code


class Store:
    kind = "store"

    def __init__(self, name, *, size=3):
        if size < 0:
            raise ValueError("size", size)
        self.name = name
        self.size = size
        self.items = {}

    def put(self, k, v):
        if len(self.items) >= self.size:
            raise Boom("full", self.size)
        self.items[k] = v
        return self

    def get(self, k):
        return self.items[k]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        return self.items[k]

    def __setitem__(self, k, v):
        self.items[k] = v

    def __contains__(self, k):
        return k in self.items

    def __iter__(self):
        return iter(list(self.items))

    def __repr__(self):
        return f"Store({self.name})"

    def __call__(self, x):
        return (self.name, x)

    def __enter__(self):
        self.items["in"] = 1
        return self

    def __exit__(self, *a):
        self.items["out"] = 1
        return a[0] is Boom if a else False

    def __eq__(self, o):
        return isinstance(o, Store) and o.name == self.name

    def __hash__(self):
        return hash(self.name)

    def stream(self, n):
        for i in range(n):
            yield f"{self.name}{i}"

    async def aget(self, k):
        await asyncio.sleep(0)
        return self.items[k]

    async def astream(self, n):
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    @property
    def count(self):
        return len(self.items)

    @classmethod
    def make(cls, name):
        return cls(name, size=9)

    @staticmethod
    def fmt(x):
        return f"<{x}>"

    def each(self, f, xs):
        return [f(x) for x in xs]

    async def __aenter__(self):
        self.items["ain"] = 1
        return self

    async def __aexit__(self, *a):
        self.items["aout"] = 1


def slow(x):
    time.sleep(0.01)
    return x


async def aslow(x):
    await asyncio.sleep(0.01)
    return x


def gen(n):
    for i in range(n):
        yield i * 2


async def agen(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i


def boom(x):
    raise Boom(f"no {x}", 4)


def apply(f, x):
    return f(x)


def takes_cb(x, cb=None):
    return x if cb is None else cb(x)


def p_ctor_error():
    try:
        s = Store("a", size=-1)
    except ValueError as e:
        return ("caught", e.args)
    return "not"


def p_ctor_missing():
    try:
        Store()
    except TypeError as e:
        return "TypeError"


def p_ctor_bad_kw():
    try:
        Store("x", colour=1)
    except TypeError as e:
        return "TypeError"


def p_ctor_error_later():
    s = Store("a", size=-1)
    return "unused"


def p_attr():
    s = Store("a")
    s.put("x", slow(1))
    return (
        s.name,
        s.size,
        s.kind,
        s.items,
        s.count,
        s.fmt(2),
        type(s).__name__,
        isinstance(s, Store),
        repr(s),
        str(s),
        f"{s}",
        f"{s!r}",
    )


def p_setattr():
    s = Store("a")
    s.size = slow(7)
    s.extra = 3
    return s.size, s.extra, hasattr(s, "nope"), getattr(s, "nope", 5)


def p_augattr():
    s = Store("a")
    s.size += slow(7)
    return s.size


def p_missing():
    s = Store("a")
    try:
        s.nope
    except AttributeError as e:
        return "AttributeError"


def p_missing_method():
    s = Store("a")
    try:
        s.nope(3)
    except AttributeError as e:
        return "AttributeError"


def p_special():
    s = Store("a")
    s["k"] = slow(1)
    return (
        len(s),
        s["k"],
        "k" in s,
        "z" in s,
        list(s),
        [x for x in s],
        s(4),
        bool(s),
        sorted(s),
        s == Store("a"),
        s != Store("a"),
        s == Store("b"),
        {s: 1}[s],
    )


def p_with():
    with Store("w") as s:
        s.put("a", slow(1))
    return s.items


def p_with_err():
    with Store("w") as s:
        boom(1)
    return s.items


def p_stream():
    s = Store("g")
    return (
        list(s.stream(3)),
        [x for x in s.stream(2)],
        ",".join(s.stream(2)),
        list(gen(4)),
        sum(gen(4)),
        dict(enumerate(gen(2))),
    )


def p_stream_next():
    g = gen(3)
    return next(g), next(g), list(g), next(g, "end")


def p_full():
    s = Store("f", size=1)
    s.put("a", 1)
    try:
        s.put("b", 2)
        s.put("c", 3)
    except Boom as e:
        return e.what, e.code, s.items


def p_fluent():
    s = Store("f")
    t = s.put("a", 1)
    return type(t).__name__, t.items


def p_order():
    s = Store("o", size=100)
    for i in range(50):
        s.put(i, slow(i))
    return list(s.items)


def p_two():
    a, b = Store("a"), Store("b")
    a.put(1, 1)
    return a.items, b.items, a.name, b.name


async def p_async():
    a = await asyncio.gather(*(aslow(i) for i in range(5)))
    s = Store("as")
    s.put("k", 2)
    out = [x async for x in agen(3)]
    out2 = [x async for x in s.astream(3)]
    return a, await s.aget("k"), out, out2, slow(3)


async def p_async_err():
    try:
        await aslow()
    except TypeError:
        pass
    async with Store("z") as s:
        pass
    t = asyncio.create_task(aslow(1))
    async with asyncio.TaskGroup() as tg:
        u = tg.create_task(aslow(2))
    return await t, u.result(), s.items


def p_asyncrun():
    async def main():
        return await asyncio.gather(aslow(1), aslow(2))

    return asyncio.run(main())


def p_threads():
    out = []

    def work(i):
        out.append(slow(i))

    ts = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    [t.start() for t in ts]
    [t.join() for t in ts]
    return sorted(out)


def p_pool():
    with ThreadPoolExecutor(3) as p:
        f = [p.submit(slow, i) for i in range(4)]
        m = list(p.map(slow, range(3)))
        return [x.result() for x in f], m


def p_pool_agent():
    s = Store("p", size=100)
    with ThreadPoolExecutor(3) as p:
        list(p.map(lambda i: s.put(i, i), range(10)))
    return sorted(s.items)


def p_timer():
    out = []
    t = threading.Timer(0.01, lambda: out.append(slow(1)))
    t.start()
    t.join()
    return out


def p_thread_class():
    class T(threading.Thread):
        def run(self):
            self.out = slow(5)

    t = T()
    t.start()
    t.join()
    return t.out


def p_fn_arg():
    return apply(slow, 3)


def p_method_arg():
    s = Store("m")
    s.put("k", 9)
    return apply(s.get, "k")


def p_map():
    return list(map(slow, range(4))), [*map(slow, [1])], dict(zip("ab", map(slow, [1, 2])))


def p_filter():
    return (
        list(filter(slow, [0, 1, 2])),
        sorted([3, 1, 2], key=slow),
        max([1, 5, 2], key=slow),
        list(functools.reduce(lambda a, b: a + [slow(b)], [1, 2], [])),
    )


def p_unseen():
    boom(1)
    return "x"


def p_unseen_bound():
    x = boom(1)
    return "x"


def p_tool_args():
    try:
        slow(1, 2, 3)
    except TypeError:
        return "TypeError"


def p_ref():
    return slow.__name__, Store.__name__, Store.kind, Store.make("q").name, issubclass(Store, object), slow is slow


def p_subclass():
    class Sub(Store):
        def extra(self):
            return self.name + "!"

    return Sub("q").extra()


def p_partial():
    return functools.partial(slow, 3)()


def p_lru():
    @functools.lru_cache
    def f(x):
        return slow(x)

    return f(1) + f(1)


def p_gen_workflow():
    def inner():
        for i in range(3):
            yield slow(i)

    return list(inner())


def p_gen_try():
    def inner():
        for i in range(3):
            try:
                x = boom(i)
            except Boom as e:
                yield e.what

    return list(inner())


def p_gen_try2():
    def inner():
        d = {}
        try:
            d["a"] = boom(1)
            yield 1
        except Boom as e:
            yield ("caught", e.what)

    return list(inner())


def p_gen_try3():
    def inner():
        xs = []
        try:
            xs.append(boom(1))
        except Boom as e:
            yield ("caught", e.what)
        yield len(xs)

    return list(inner())


def p_gen_with():
    def inner():
        with contextlib.suppress(Boom):
            y = boom(2)
            yield "no"
        yield "after"

    return list(inner())


def p_ctxmanager():
    log = []

    @contextlib.contextmanager
    def cm():
        log.append(slow("in"))
        try:
            yield slow(1)
        except Boom as e:
            log.append(e.what)
        finally:
            log.append(slow("out"))

    with cm() as x:
        y = boom(x)
    return log


def p_class_level():
    class K:
        table = [slow(i) for i in range(3)]
        one = slow(1)

        def __init__(self):
            self.x = slow(2)

        def total(self):
            return self.x + self.one + sum(self.table)

    return K().total()


def p_doc():
    return (slow.__doc__, Store.__doc__)


def p_exc_type():
    try:
        boom(1)
    except Boom as e:
        return e.what, e.code, e.args, type(e) is Boom


def p_group():
    n = 0
    try:
        [boom(1), boom(2)]
    except* Boom as g:
        n = len(g.exceptions)
    return n


def p_print():
    print("hello from driver", slow(1))


def p_recursive_agent():
    s = Store("r")
    s.put("s", [1, 2])
    s.items
    return s.get("s") + [slow(3)]


def p_agents_dict():
    pool = {n: Store(n) for n in "abc"}
    for n, s in pool.items():
        s.put(n, slow(n))
    return {n: s.get(n) for n, s in pool.items()}


def p_method_ref():
    s = Store("r")
    put = s.put
    put(1, 2)
    return s.items, put.__name__


def p_each():
    return Store("q").each(slow, [1, 2])


def p_instance_arg():
    s = Store("q")
    s.put(1, 1)
    return slow(s).items


def p_del():
    s = Store("q")
    del s.size
    return hasattr(s, "size")


class Countdown:
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return self

    def __next__(self):
        if self.n <= 0:
            raise StopIteration
        self.n -= 1
        return self.n

    def __iadd__(self, k):
        self.n += k
        return self

    def __lt__(self, o):
        return self.n < o.n

    def __add__(self, k):
        return self.n + k

    def __radd__(self, k):
        return k + self.n

    def __neg__(self):
        return -self.n

    def __index__(self):
        return self.n

    def __getattr__(self, name):
        if name.startswith("dyn_"):
            return name[4:]
        raise AttributeError(name)


class Manager:
    def __init__(self, store, worker=None):
        self.store = store
        self.worker = worker

    def work(self, k):
        self.store.put(k, self.worker(k) if self.worker else slow(k))
        return len(self.store)

    def inner(self):
        return self.store

    def me_twice(self):
        return [self, self]

    def own(self):
        return Store("own").put("x", 1).get("x")


def total(xs):
    return sum(xs)


def joined(xs):
    return "".join(map(str, xs))


def lazily(n):
    return map(str, range(n))


def reversed_of(xs):
    return reversed(xs)


def squares(n):
    return (i * i for i in range(n))


def nested(x):
    return slow(slow(x)) + 1


def handed(store, k):
    return store.get(k)


async def anested(x):
    return slow(x) + await aslow(1)


def view():
    return {"a": 1, "b": 2}.items()


def kwonly(a, /, b=2, *c, d, **e):
    return [a, b, list(c), d, e]


def raises_in(f):
    return f.name


def p_iterator():
    return list(Countdown(3)), [x for x in Countdown(2)], next(Countdown(5))


def p_iadd():
    c = Countdown(1)
    d = c
    c += slow(2)
    return c.n, c is d, c + 1, 10 + c, -c, [1, 2, 3, 4][c], c < Countdown(9), c.dyn_x, hasattr(c, "other")


def p_views():
    d = {i: slow(i) for i in range(3)}
    return (
        total(d.values()),
        joined(d.keys()),
        joined(d.items()),
        total(x for x in [slow(1), slow(2)]),
        total(map(slow, [1, 2])),
        total(slow(i) for i in range(3)),
    )


def p_lazy():
    return list(lazily(3)), list(reversed_of([1, 2])), sum(squares(4)), dict(view()), [a for a, _ in view()], next(lazily(2))


def p_manager():
    s = Store("m", size=9)
    m = Manager(s)
    out = [m.work(i) for i in range(3)]
    return out, s.items, m.inner().name, m.inner() is s, len(m.me_twice()), m.own()


def p_manager_fn():
    s = Store("m", size=9)
    m = Manager(store=s, worker=slow)
    return m.work(1), s.items


def p_fluent_identity():
    s = Store("f")
    t = s.put(1, 2)
    return t is s, s.put(3, 4) == s, s.put(5, 6).get(5)


def p_handed():
    s = Store("h")
    s.put("k", slow(4))
    return handed(s, "k"), [handed(x, "k") for x in (s, s)], raises_in(s)


def p_nested():
    return nested(1)


def p_anested():
    return asyncio.run(anested(1))


async def p_anested_driver():
    return await anested(2)


def p_kwonly():
    r = [kwonly(1, d=slow(2)), kwonly(1, 2, 3, d=4, f=5)]
    try:
        kwonly(1)
    except TypeError:
        r.append("TypeError")
    try:
        kwonly(a=1, d=2)
    except TypeError:
        r.append("TypeError")
    return r


def p_ctor_future():
    return Store(slow("fut"), size=slow(4)).name


def p_ctor_error_order():
    log = []
    try:
        log.append(slow(1))
        s = Store("x", size=-5)
        log.append("not reached")
    except ValueError as e:
        log.append(e.args)
    return log


def p_ctor_error_used():
    s = Store("x", size=-5)
    try:
        s.put(1, 2)
    except ValueError as e:
        return "late"
    return "no"


def p_method_error_note():
    s = Store("n", size=0)
    try:
        s.put(1, 1)
    except Boom as e:
        return e.code


def p_exception_from_attr():
    s = Store("n")
    try:
        s.get("zz")
    except KeyError as e:
        return e.args


def p_closed_early():
    out = []
    for x in gen(1000):
        if x > 6:
            break
        out.append(x)
    return out


def p_zip_streams():
    return list(zip(gen(3), Store("z").stream(3))), [*gen(2), *gen(1)]


def p_yield_from_tool():
    def inner():
        yield from gen(3)
        return 5

    def outer():
        r = yield from inner()
        yield r

    return list(outer())


def p_dict_of_methods():
    s = Store("d")
    s.put("k", 1)
    table = {"get": s.get, "slow": slow}
    return table["get"]("k"), table["slow"](2), {n: f(x) for (n, f), x in zip(table.items(), ["k", 5])}


def p_sort_by_agent():
    s = Store("srt", size=9)
    for k, v in [("a", 3), ("b", 1), ("c", 2)]:
        s.put(k, v)
    return sorted("abc", key=s.get), min("abc", key=s.get), max("abc", key=lambda k: s.get(k))


def p_agent_default():
    def f(s=Store("dflt")):
        return s.name

    return f()


def p_nested_functions():
    s = Store("nf")

    def add(k):
        nonlocal s
        s = s.put(k, slow(k))
        return s

    add(1)
    add(2)
    return s.items


def p_global_registry():
    REGISTRY["s"] = Store("g")
    REGISTRY["s"].put(1, slow(1))
    return REGISTRY.pop("s").items


def p_isinstance():
    s = Store("i")
    return (
        isinstance(s, Store),
        isinstance(s, (int, Store)),
        isinstance(slow(1), Store),
        type(s) is Store,
        s.__class__ is Store,
        s.__class__.__name__,
    )


def p_raise_from():
    try:
        try:
            boom(1)
        except Boom as e:
            raise RuntimeError("outer") from e
    except RuntimeError as r:
        return type(r.__cause__).__name__, r.__cause__.code


def p_finally():
    log = []

    def f():
        try:
            return slow("r")
        finally:
            log.append(slow("f"))

    return f(), log


async def p_gather_errors():
    async def bad():
        return boom(1)

    r = await asyncio.gather(aslow(1), bad(), return_exceptions=True)
    return r[0], type(r[1]).__name__


async def p_to_thread():
    return await asyncio.to_thread(slow, 4)


async def p_timeout():
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)
    except TimeoutError:
        return slow("timed out")


async def p_async_agents():
    a, b = Store("a"), Store("b")
    a.put("x", 1)
    b.put("x", 2)
    return await asyncio.gather(a.aget("x"), b.aget("x")), a.get("x"), len(a)


def p_async_in_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, aslow(3)).result()


def put_in(d, k, x):
    d[k] = boom(x)


def p_gen_stored():
    def inner():
        d = {}
        for i in range(2):
            try:
                if i == 0:
                    put_in(d, "a", i)
                yield "went on"
                put_in(d, "b", i)
                yield "not reached"
            except Boom as e:
                yield e.what
            finally:
                d.clear()

    return list(inner())


def p_gen_with_stored():
    @contextlib.contextmanager
    def kept():
        reached = 0
        with contextlib.suppress(Boom):
            put_in({}, "a", 1)
            reached = 1
        yield reached

    with kept() as reached:
        return reached


REGISTRY = {}
TOOLS = [
    slow,
    aslow,
    gen,
    agen,
    boom,
    apply,
    takes_cb,
    total,
    joined,
    lazily,
    reversed_of,
    squares,
    nested,
    handed,
    anested,
    view,
    kwonly,
    raises_in,
]
AGENTS = [Store, Countdown, Manager]
PATTERNS = [function for name, function in list(globals().items()) if name.startswith("p_")]
