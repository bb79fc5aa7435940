"""The result of a call: a value that is not there yet.

States and their only transitions:

    pending ──resolve(payload)──▶ resolved
       └──────fail(error)───────▶ failed

The first terminal state wins; later ones are ignored. `resolve` and `fail` are called on the event loop of the runtime that
owns the future; everything else may be called from any thread. The value arrives as bytes and is decoded when somebody
first looks at it; who passes a future on without looking passes the bytes on. Of a large value only the handle arrives, and
who looks first reads it: in a thread, or while he awaits the future. From the moment somebody has looked, the
decoded object is the value, so that a caller who changes a list it was given passes the changed list on, as in plain Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar, cast, overload

import msgspec

from nalar_mq import values
from nalar_mq.call_context import CallContext, Caller, current_context
from nalar_mq.claims import Held
from nalar_mq.errors import CallCancelledError, CallTimeoutError, StreamRestartedError, WireError
from nalar_mq.event_loop import BlockingLoopError, running_loop
from nalar_mq.history import History

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T_co = TypeVar("T_co", covariant=True)

PENDING = 0
RESOLVED = 1
FAILED = 2

_UNREAD: Any = object()
_ends = itertools.count(1)
_lock = threading.Lock()  # held for a few instructions; one for all futures keeps each of them small
STREAM_WINDOW = 64  # chunks a producer may be ahead of its consumer


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What a future's owner keeps of it when it has ended; times are those of the owner's loop, 0 for none."""

    parent: bytes = b""
    dependencies: tuple[bytes, ...] = ()
    executor: str = ""
    consumers: tuple[str, ...] = ()
    session: str = ""
    job: str = ""
    priority: int = 0
    deadline: float | None = None
    made: float = 0.0
    ended: float = 0.0


NO_FACTS: Final = Facts()


class FutureInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What its owner knows of a future. Times are in seconds since the epoch.

    Attributes:
        id: of the future, which is that of its call, in hexadecimal.
        actor: `actor` or `actor.method`.
        parent: id of the call that made it, its creator; empty for a program's own calls.
        dependencies: ids of the futures that are among its arguments and had no value when it was made.
        executor: the process that has the call; empty before it is sent.
        consumers: processes that its value is pushed to, besides the owner.
        session: that the call belongs to.
        job: that it belongs to, or empty.
        priority: higher runs earlier.
        deadline_at: when it fails at the latest; None for never.
        state: `pending`, `resolved`, `failed` or `cancelled`.
        made_at: when the call was made; None if that is still on its way from another thread.
        ended_at: None while it has not.
    """

    id: str
    actor: str
    parent: str
    dependencies: tuple[str, ...]
    executor: str
    consumers: tuple[str, ...]
    session: str
    job: str
    priority: int
    deadline_at: float | None
    state: str
    made_at: float | None
    ended_at: float | None


class Future(values.Deferred, Generic[T_co]):
    """The result of one call. Await it, ask for its `value`, or pass it on as an argument.

    Attributes:
        id: 16 bytes, the id of the call.
        actor: `actor` or `actor.method`, for people.
        ended_as: of one that has ended, the runtime's number for it: greater than that of any that ended before.
        facts: of one that has ended, for its owner's runtime; `info` is for people.
    """

    __slots__ = (
        "__weakref__",
        "_caller",
        "_chunks",
        "_error",
        "_history",
        "_payload",
        "_state",
        "_value",
        "_waiters",
        "actor",
        "ended_as",
        "facts",
        "id",
        "seen",
    )

    def __init__(self, caller: Caller, id: bytes, actor: str, history: History | None = None) -> None:
        self._history = history
        self.id = id
        self.actor = actor
        self.ended_as = 0
        self.seen = False
        self.facts = NO_FACTS
        self._caller = caller
        self._state = PENDING
        self._payload: bytes | Held | None = None
        self._value: Any = _UNREAD
        self._error: BaseException | None = None
        self._waiters: list[Callable[[], object]] | None = None
        self._chunks: ChunkBuffer | None = None

    # What the owner's runtime does with it, on its loop.

    def resolve(self, payload: bytes | Held) -> bool:
        """Gives it its encoded value, or the handle of a large one; False if it had ended before."""
        if self._state:
            return False
        self._payload = payload
        self._end(RESOLVED)
        return True

    def fail(self, error: BaseException) -> bool:
        """Ends it without a value; False if it had ended before."""
        if self._state:
            return False
        self._error = error
        self._end(FAILED)
        return True

    def _end(self, state: int) -> None:
        with _lock:
            self._state = state
            self.ended_as = next(_ends)
            waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            try:
                if isinstance(waiter, _Countdown):
                    waiter(state == FAILED)
                else:
                    waiter()
            except Exception as error:  # one of them must not keep the others waiting
                self._caller.loop.call_exception_handler({"message": f"a waiter of {self!r} failed", "exception": error})
        if self._chunks is not None:
            self._close_stream(self._chunks)

    def _close_stream(self, chunks: ChunkBuffer) -> None:
        """Ends a stream; a producer that had finished before it heard of the stream has sent all pieces as one list.

        The value of a callee that is no generator is the only piece.
        """
        if isinstance(self._payload, Held) and not chunks.received and not chunks.closed:
            self._caller.loop.create_task(self._close_large_stream(chunks))
        else:
            self._fill_and_close(chunks)

    async def _close_large_stream(self, chunks: ChunkBuffer) -> None:
        with contextlib.suppress(Exception):  # as below
            await self
        self._fill_and_close(chunks)

    def _fill_and_close(self, chunks: ChunkBuffer) -> None:
        pieces: object = None
        if self._state == RESOLVED and not chunks.received and self._payload is not None:
            with contextlib.suppress(WireError):  # who comes to the end of the stream looks at the value, and learns
                if not isinstance(self._payload, Held):
                    pieces = values.decode(self._payload)
                elif self._value is not _UNREAD:
                    pieces = self._value
        with _lock:
            if not chunks.closed and pieces is not None:
                found = cast("list[object]", pieces) if isinstance(pieces, list) else [pieces]
                chunks.waiting.extend(values.encode(piece) for piece in found)
            chunks.closed = True
        chunks.close()

    def chunk(self, number: int, payload: bytes | Held, attempt: int) -> None:
        """Takes one piece of a stream."""
        if self._chunks is not None:
            self._chunks.put(number, payload, attempt)

    # What anybody may ask of it, from any thread.

    def available(self) -> bool:
        """True once it has ended, with a value or with an error; never waits."""
        if self._history is not None:
            return self._caller.witness.look(self, self._history)
        return self._state != PENDING

    def has_ended(self) -> bool:
        """What `available` says, for the runtime: a job does not remember that somebody looked."""
        return self._state != PENDING

    def failed(self) -> bool:
        """True once it has ended with an error; never waits."""
        return self.available() and self._state == FAILED

    def has_failed(self) -> bool:
        """What `failed` says, for the runtime: a job does not remember that somebody looked."""
        return self._state == FAILED

    @property
    def state(self) -> str:
        """`pending`, `resolved`, `failed`, or `cancelled`: for people.

        Unlike `available` and `failed`, a job does not remember what it showed: a workflow that goes by it may go another way
        in another attempt.
        """
        if self._state != FAILED:
            return "resolved" if self._state else "pending"
        return "cancelled" if isinstance(self._error, CallCancelledError) else "failed"

    def info(self) -> FutureInfo:
        """What this process knows of the call: who made it, who has it, what it waits for, when it began and ended."""
        return self._caller.info(self)

    def set_priority(self, priority: int) -> None:
        """Gives the call another priority: while it is queued it moves among the others there, and what it calls inherits it.

        A session with several calls takes the highest of theirs. Whoever waits for a future lends it its own priority.
        """
        self._caller.prioritise(self, priority)

    def value(self, timeout: float | None = None) -> T_co:
        """Waits for the value and returns it; the same object each time.

        Blocks the calling thread; on an event loop use `await`. `timeout` is in seconds and ends the waiting, not the call.

        Raises:
            CallTimeoutError: `timeout` or the deadline of the call passed.
            BaseException: whatever the call raised; `CallError` for what went wrong on the way.
        """
        if timeout is not None and self._history is not None:
            self._wait_once(timeout, self._history)
        elif self._state == PENDING:
            self._block(timeout)
        return self._look()

    def _wait_once(self, timeout: float, history: History) -> None:
        """Waits in a job: where a former attempt waited in vain, this one does, too, and at once."""
        number = history.look()
        if history.was_unseen(number):
            self._caller.witness.go_on(history)
            raise self._too_late(timeout)
        try:
            if self._state == PENDING:
                self._block(timeout)
        except CallTimeoutError:
            self._caller.witness.note_unseen(history, number)
            raise

    def _block(self, timeout: float | None) -> None:
        if running_loop() is self._caller.loop:
            raise BlockingLoopError(f"value() of {self.actor}", "`await future`")
        done = threading.Event()
        if not self.on_end(done.set):
            return
        slot = _slot_for(self)
        if slot is not None:
            slot.give_up()
        try:
            ended = done.wait(timeout)
        finally:
            if slot is not None:
                slot.take_back()
        if not ended:
            self.forget(done.set)
            raise self._too_late(timeout)

    def _too_late(self, timeout: float | None) -> CallTimeoutError:
        text = f"{self.actor} had no value after {timeout} s; it still runs"
        return CallTimeoutError(text, call_id=self.id.hex(), actor=self.actor)

    def _look(self) -> T_co:
        self.seen = True
        if self._state == FAILED:
            assert self._error is not None
            raise self._error.with_traceback(None)  # else each look would lengthen it
        if self._value is _UNREAD:
            payload = self._payload
            if isinstance(payload, bytes):
                self._keep(values.decode(payload))
            else:
                assert payload is not None
                self._keep(_read(payload, self._caller, f"value() of {self.actor}, which is large,"))
        return self._value  # type: ignore[no-any-return]

    def _keep(self, value: Any) -> None:
        with _lock:
            if self._value is _UNREAD:
                self._value = value

    def __await__(self) -> Generator[Any, None, T_co]:
        """Waits without blocking the loop; the same value and errors as `value`."""
        return self.arrival() if self._history is None else self._arrival_in_job(self._history)

    if not TYPE_CHECKING:  # type checkers are to say that it has none

        def __aiter__(self) -> Any:
            raise TypeError(f"a future is awaited: for what {self.actor} yields, write `async for piece in future.stream()`")

    def _arrival_in_job(self, history: History) -> Generator[Any, None, T_co]:
        with _Wait(history, self._caller, self.id) as wait:
            yield from wait.as_before()
            return (yield from self.arrival())

    def arrival(self) -> Generator[Any, None, T_co]:
        """What `await` does, for the runtime: a job does not remember that somebody waited."""
        if self._state == PENDING:
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            wake = _Wake(waiter, loop, direct=loop is self._caller.loop)
            if self.on_end(wake):
                slot = _slot_for(self)
                if slot is not None:
                    slot.give_up()
                try:
                    yield from waiter
                finally:
                    self.forget(wake)
                    if slot is not None:
                        slot.take_back()
        if isinstance(self._payload, Held) and self._value is _UNREAD:
            with waiting():
                self._keep((yield from _read_later(self._payload, self._caller).__await__()))
        return self._look()

    @property
    def history(self) -> History | None:
        """Of the call of a job that made it; None outside jobs."""
        return self._history

    @property
    def caller(self) -> Caller:
        """The runtime that owns it."""
        return self._caller

    def on_end(self, waiter: Callable[[], object]) -> bool:
        """Calls `waiter` once, on the loop, when it ends; False (and no call) if it has ended already."""
        with _lock:
            if self._state:
                return False
            if self._waiters is None:
                self._waiters = [waiter]
            else:
                self._waiters.append(waiter)
        return True

    def forget(self, waiter: Callable[[], object]) -> None:
        """Takes a waiter back; harmless if it was called or never there."""
        with _lock:
            if self._waiters is not None and waiter in self._waiters:
                self._waiters.remove(waiter)

    def error(self) -> BaseException | None:
        """The error it ended with, or None; never waits, and does not count as having looked."""
        return self._error

    def cancel(self, reason: str = "cancelled by its caller") -> None:
        """Says that nobody wants the result: the call ends where it stands, its children too; the future fails at once."""
        self._caller.cancel(self, reason)

    def stream(self) -> Stream[Any]:
        """The pieces that the callee yields, as they come; for callees that are generators.

        The iterator works with `for` in a thread and `async for` on a loop, and slows the callee down to its own pace. The
        value of a call that is streamed is None; of a generator's call that is not, the list of its pieces.

        In a job all pieces come when the callee has ended, as one outcome in the journal: another attempt sees the same.

        Raises (while iterating):
            StreamRestartedError: pieces had been taken when the call had to begin again.
        """
        with _lock:
            is_first = self._chunks is None
            if self._chunks is None:
                self._chunks = ChunkBuffer()
        if is_first:
            if self._state:
                self._close_stream(self._chunks)
            if self._history is None:
                self._caller.credit(self, STREAM_WINDOW)
        return Stream(self, self._chunks, self._caller)

    @property
    def later(self) -> T_co:
        """This future, typed as its value: for passing it on as an argument."""
        return cast(T_co, self)

    # How it travels inside the arguments of another call.

    def ref(self) -> bytes:
        """Its id."""
        return self.id

    def payload(self) -> bytes | None:
        """Its encoded value; None while it has none, or if it is large and nobody has looked; raises its error.

        In a job, one that nobody has looked at stands for its id whether it has ended or not, so that the same program makes
        the same call however long things take.
        """
        if self._history is not None and not self.seen:
            return None
        return self.encoded()

    def encoded(self) -> bytes | None:
        """Its encoded value as it is now; otherwise as `payload`."""
        if self._state == PENDING:
            return None
        if self._state == FAILED:
            self._look()
        if isinstance(self._payload, Held):
            return None if self._value is _UNREAD else values.encode(self._value)
        if self._value is not _UNREAD and type(self._value) not in _IMMUTABLE:
            return values.encode(self._value)
        return self._payload

    def needs_await(self) -> bool:
        """True if it has failed or its value is large: for the runtime, which has to await such a one."""
        return self._state == FAILED or isinstance(self._payload, Held)

    def held(self) -> Held | None:
        """The handle of its value, if that is too large for a message."""
        return self._payload if isinstance(self._payload, Held) else None

    def __repr__(self) -> str:
        state = ("pending", "resolved", "failed")[self._state]
        return f"<Future {self.actor} {self.id.hex()[-8:]} {state}>"


def _read(payload: bytes | Held, caller: Caller, what: str) -> Any:
    if not isinstance(payload, Held):
        return values.decode(payload)
    if running_loop() is caller.loop:
        raise BlockingLoopError(what, "`await`")
    return payload.value_in_thread()


async def _read_later(held: Held, caller: Caller) -> Any:
    if asyncio.get_running_loop() is caller.loop:
        return await held.value()
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(held.value(), caller.loop))


_IMMUTABLE = frozenset({int, str, bytes, float, bool, type(None)})


def _slot_for(*futures: Future[Any]) -> Any:
    """The slot of the running call, which is about to wait for the futures and so lends them its priority."""
    context: CallContext | None = current_context.get()
    if context is None or context.slot is None:
        return None
    for future in futures:
        future._caller.lend_priority(future, context.priority)  # pyright: ignore[reportPrivateUsage]
    return context.slot


class _Wait:
    """A wait of a job on the loop, which asyncio may cut short: what the program sees then, another attempt has to see again.

    So a cut is journaled like a look that found nothing. In a later attempt the same wait does not end before it is cut again.
    """

    __slots__ = ("_caller", "_history", "_is_repeated", "_number")

    def __init__(self, history: History, caller: Caller, what: bytes) -> None:
        self._history = history
        self._caller = caller
        self._number = history.wait(what)
        self._is_repeated = history.was_unseen(self._number)
        if self._is_repeated:
            history.waits_again(self._number)

    def __enter__(self) -> _Wait:
        return self

    def as_before(self) -> Generator[Any, None, None]:
        """Returns at once, or, if a former attempt's wait was cut here, never."""
        if self._is_repeated:
            with waiting():
                yield from asyncio.get_running_loop().create_future()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        context = current_context.get()
        if kind is not asyncio.CancelledError or (context is not None and context.cancelled):
            return  # a call that is cancelled as a whole sees nothing that another attempt would have to see
        if self._is_repeated:
            self._caller.witness.cut_again(self._history, self._number)
        else:
            self._caller.witness.note_unseen(self._history, self._number)


class _OneWait:
    """One wait for several futures, of which a job remembers if it is cut short; they are all of one call."""

    __slots__ = ("_futures", "_kind", "_wait")

    def __init__(self, futures: Sequence[Future[Any]], kind: bytes) -> None:
        self._futures = futures
        self._kind = kind
        self._wait: _Wait | None = None

    async def __aenter__(self) -> None:
        history = self._futures[0].history if self._futures else None
        if history is not None:
            self._wait = _Wait(history, self._futures[0].caller, self._futures[0].id + self._kind)
            with self._wait:
                await _Awaitable(self._wait.as_before())

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wait is not None:
            self._wait.__exit__(kind)


class _Awaitable(Generic[T]):
    """A generator of the runtime, for `await`."""

    __slots__ = ("_generator",)

    def __init__(self, generator: Generator[Any, None, T]) -> None:
        self._generator = generator

    def __await__(self) -> Generator[Any, None, T]:
        return self._generator


class _Wake:
    """Wakes one awaiting task, on whichever loop it runs."""

    __slots__ = ("direct", "loop", "waiter")

    def __init__(self, waiter: asyncio.Future[None], loop: asyncio.AbstractEventLoop, *, direct: bool) -> None:
        self.waiter = waiter
        self.loop = loop
        self.direct = direct

    def __call__(self) -> None:
        if self.direct:
            self._set()
        else:
            with contextlib.suppress(RuntimeError):  # that loop has closed: nobody waits there
                self.loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)


class ChunkBuffer:
    """The pieces of one stream that have come and were not taken yet."""

    __slots__ = ("attempt", "closed", "received", "restarted", "taken", "waiting", "wakers")

    def __init__(self) -> None:
        self.waiting: deque[bytes | Held] = deque()
        self.wakers: list[Callable[[], object]] = []
        self.attempt = 0
        self.received = 0
        self.taken = 0
        self.closed = False
        self.restarted = False

    def put(self, number: int, payload: bytes | Held, attempt: int) -> None:
        """Adds a piece; a later attempt replaces what nobody has taken, and ends the stream if somebody has."""
        if attempt > self.attempt:
            if self.taken:
                self.restarted = True
                self.close()
                return
            self.attempt = attempt
            self.received = 0
            self.waiting.clear()
        if attempt == self.attempt and number == self.received + 1:
            self.received = number
            self.waiting.append(payload)
            self._wake()

    def close(self) -> None:
        """No more pieces will come."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        with _lock:
            wakers, self.wakers = self.wakers, []
        for waker in wakers:
            waker()

    def on_change(self, waker: Callable[[], object]) -> bool:
        """Calls `waker` at the next change; False if there is something to take already."""
        with _lock:
            if self.waiting or self.closed:
                return False
            self.wakers.append(waker)
            return True


class Stream(Generic[T]):
    """Iterates over the pieces of a call; see `Future.stream`.

    A stream that is let go before its end (`close`, or nobody refers to it any more) cancels its call, so that leaving a loop
    early leaves no producer behind.
    """

    def __init__(self, future: Future[Any], chunks: ChunkBuffer, caller: Caller) -> None:
        self._future = future
        self._chunks = chunks
        self._caller = caller

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    def __iter__(self) -> Iterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._future.history is None:
            return await self._next()
        async with _OneWait([self._future], b"piece"):
            return await self._next()

    async def _next(self) -> T:
        while not self._chunks.waiting:
            if self._chunks.closed:
                self._raise_end()
                await _Awaitable(self._future.arrival())
                raise StopAsyncIteration
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            if self._chunks.on_change(_Wake(waiter, loop, direct=loop is self._caller.loop)):
                with waiting():
                    await waiter
        payload = self._take()
        if isinstance(payload, Held):
            with waiting():
                return cast(T, await _read_later(payload, self._caller))
        return cast(T, values.decode(payload))

    def __next__(self) -> T:
        while not self._chunks.waiting:
            if self._chunks.closed:
                self._raise_end()
                self._future.value()
                raise StopIteration
            if running_loop() is self._caller.loop:
                raise BlockingLoopError(f"next() of the stream of {self._future.actor}", "`async for`")
            changed = threading.Event()
            if self._chunks.on_change(changed.set):
                with waiting():
                    changed.wait()
        return cast(T, _read(self._take(), self._caller, f"next() of the stream of {self._future.actor}"))

    def close(self) -> None:
        """Takes no more pieces: a call that has not ended is cancelled. Idempotent; any thread."""
        if not self._chunks.closed and not self._future.has_ended():
            self._future.cancel("nobody reads its stream any more")

    def __del__(self) -> None:
        self.close()

    def _take(self) -> bytes | Held:
        chunks = self._chunks
        payload = chunks.waiting.popleft()
        chunks.taken += 1
        if chunks.taken % (STREAM_WINDOW // 2) == 0:
            self._caller.credit(self._future, chunks.taken + STREAM_WINDOW)
        return payload

    def _raise_end(self) -> None:
        if self._chunks.restarted:
            raise StreamRestartedError(
                f"the stream of {self._future.actor} began again after pieces of it had been taken",
                call_id=self._future.id.hex(),
                actor=self._future.actor,
            )


@contextlib.contextmanager
def waiting(*futures: Future[Any]) -> Generator[None]:
    """The running call gives up its slot inside the block: for waits that the runtime cannot see."""
    slot = _slot_for(*futures)
    if slot is None:
        yield
        return
    slot.give_up()
    try:
        yield
    finally:
        slot.take_back()


@overload
def gather(f1: Awaitable[T1], /) -> Awaitable[tuple[T1]]: ...
@overload
def gather(f1: Awaitable[T1], f2: Awaitable[T2], /) -> Awaitable[tuple[T1, T2]]: ...
@overload
def gather(f1: Awaitable[T1], f2: Awaitable[T2], f3: Awaitable[T3], /) -> Awaitable[tuple[T1, T2, T3]]: ...
@overload
def gather(
    f1: Awaitable[T1], f2: Awaitable[T2], f3: Awaitable[T3], f4: Awaitable[T4], /
) -> Awaitable[tuple[T1, T2, T3, T4]]: ...
@overload
def gather(*futures: Awaitable[T]) -> Awaitable[tuple[T, ...]]: ...
def gather(*futures: Awaitable[Any]) -> Awaitable[Any]:
    """The values of all futures, in their order.

    The first error to arrive is raised at once; the other calls go on.
    """
    return _gathered(futures)


async def _gathered(futures: tuple[Awaitable[Any], ...]) -> tuple[Any, ...]:
    pending = [f for f in futures if isinstance(f, Future)]
    if len(pending) != len(futures):
        return tuple(await asyncio.gather(*futures))
    async with _OneWait(pending, b"gather"):
        await _all_ended_or_one_failed(pending)
        for future in sorted([future for future in pending if future.needs_await()], key=_failed_first):
            await _Awaitable(future.arrival())
    return tuple([future.value() for future in pending])


def _failed_first(future: Future[Any]) -> tuple[bool, int]:
    return not future.has_failed(), future.ended_as


def _by_end(future: Future[Any]) -> int:
    return future.ended_as


async def _all_ended_or_one_failed(futures: list[Future[Any]]) -> None:
    loop = asyncio.get_running_loop()
    countdown = _Countdown(loop)
    for future in futures:
        is_near = loop is future._caller.loop  # pyright: ignore[reportPrivateUsage]
        if future.on_end(countdown if is_near else _from_afar(countdown, future)):
            countdown.left += 1
        elif future.has_failed():
            return
    if countdown.left and not countdown.waiter.done():
        with waiting(*futures):
            await countdown.waiter


class _Countdown:
    """Ends its waiter when a number of futures have ended, or one has failed: one waiter for all of them."""

    __slots__ = ("left", "waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.left = 0
        self.waiter: asyncio.Future[None] = loop.create_future()

    def __call__(self, has_failed: bool = False) -> None:
        self.left -= 1
        if (not self.left or has_failed) and not self.waiter.done():
            self.waiter.set_result(None)


def _from_afar(countdown: _Countdown, future: Future[Any]) -> Callable[[], object]:
    """For a future that ends on another loop than the one that waits."""
    loop = countdown.waiter.get_loop()

    def arrived() -> None:
        with contextlib.suppress(RuntimeError):  # that loop has closed: nobody waits there
            loop.call_soon_threadsafe(countdown, future.has_failed())

    return arrived


class as_completed(Generic[T]):  # noqa: N801 - named as in asyncio and concurrent.futures
    """Iterates over futures in the order in which they end; works with `async for` on a loop and `for` in a thread.

    Each item is a future that has ended: `await` it or ask for its `value` to get its value or error.
    """

    def __init__(self, futures: Iterable[Future[T]]) -> None:
        self._ended: deque[Future[T]] = deque()
        self._wake: Callable[[], object] | None = None
        self._left = 0
        self._loops: set[asyncio.AbstractEventLoop | None] = set()
        given = self._given = list(futures)
        _slot_for(*given)
        for future in given:
            self._left += 1
            self._loops.add(future._caller.loop)  # pyright: ignore[reportPrivateUsage]
            if not future.on_end(self._arrival(future)):
                self._ended.append(future)
        with _lock:
            self._ended = deque(sorted(self._ended, key=_by_end))

    def _arrival(self, future: Future[T]) -> Callable[[], None]:
        def arrived() -> None:
            with _lock:
                self._ended.append(future)
                wake, self._wake = self._wake, None
            if wake is not None:
                wake()

        return arrived

    def _on_next(self, wake: Callable[[], object]) -> bool:
        with _lock:
            if self._ended:
                return False
            self._wake = wake
            return True

    def __aiter__(self) -> AsyncIterator[Future[T]]:
        return self

    def __iter__(self) -> Iterator[Future[T]]:
        return self

    async def __anext__(self) -> Future[T]:
        if not self._left:
            raise StopAsyncIteration
        async with _OneWait(self._given, b"next"):
            while not self._ended:
                loop = asyncio.get_running_loop()
                waiter: asyncio.Future[None] = loop.create_future()
                if self._on_next(_Wake(waiter, loop, direct=False)):
                    with waiting():
                        await waiter
        self._left -= 1
        return self._ended.popleft()

    def __next__(self) -> Future[T]:
        if not self._left:
            raise StopIteration
        while not self._ended:
            if running_loop() in self._loops:
                raise BlockingLoopError("next() of as_completed", "`async for`")
            changed = threading.Event()
            if self._on_next(changed.set):
                with waiting():
                    changed.wait()
        self._left -= 1
        return self._ended.popleft()


ReturnWhen = Literal["FIRST_COMPLETED", "FIRST_EXCEPTION", "ALL_COMPLETED"]


class Waited(NamedTuple, Generic[T]):
    """What `wait` gives, both in the order of the futures it was given."""

    done: list[Future[T]]
    pending: list[Future[T]]


class wait(Generic[T]):  # noqa: N801 - named as in asyncio and concurrent.futures
    """Waits until some of the futures have ended; `await` it on a loop, or ask for its `value()` in a thread.

    It raises no error of theirs, and cancels none.

    Args:
        futures: what to wait for.
        timeout: seconds after which it gives what there is; None for no bound.
        return_when: what ends the waiting, as in `asyncio.wait`: all have ended, one has, or one has failed.
    """

    def __init__(
        self, futures: Iterable[Future[T]], *, timeout: float | None = None, return_when: ReturnWhen = "ALL_COMPLETED"
    ) -> None:
        if return_when not in ("FIRST_COMPLETED", "FIRST_EXCEPTION", "ALL_COMPLETED"):
            raise ValueError(f"return_when is {return_when!r}: FIRST_COMPLETED, FIRST_EXCEPTION or ALL_COMPLETED is allowed")
        self._futures = list(futures)
        self._timeout = timeout
        self._or_failed = return_when == "FIRST_EXCEPTION"
        self._wanted = min(1, len(self._futures)) if return_when == "FIRST_COMPLETED" else len(self._futures)

    def __await__(self) -> Generator[Any, None, Waited[T]]:
        return self._on_loop().__await__()

    def value(self) -> Waited[T]:
        """Waits in this thread.

        Raises:
            BlockingLoopError: this thread runs the loop that the futures depend on.
        """
        loop = running_loop()
        loops = [future._caller.loop for future in self._futures]  # pyright: ignore[reportPrivateUsage]
        if loop is not None and loop in loops:
            raise BlockingLoopError("wait().value()", "`await wait(...)`")
        enough = threading.Event()
        with self._watched(enough.set), waiting(*self._futures):
            enough.wait(self._timeout)
        return self._split()

    async def _on_loop(self) -> Waited[T]:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        async with _OneWait(self._futures, b"wait"):
            with self._watched(_Wake(waiter, loop, direct=False)), waiting(*self._futures):
                await asyncio.wait([waiter], timeout=self._timeout)
        return self._split()

    @contextlib.contextmanager
    def _watched(self, wake: Callable[[], object]) -> Generator[None]:
        """Calls `wake` once enough of them have ended, at once if they have already."""
        left = self._wanted
        watches: list[tuple[Future[T], Callable[[], None]]] = []

        def ended(future: Future[T]) -> None:
            nonlocal left
            with _lock:
                left -= 1
            if left == 0 or (self._or_failed and future.has_failed()):
                wake()

        if not left:
            wake()
        for future in self._futures:
            watch: Callable[[], None] = functools.partial(ended, future)
            if future.on_end(watch):
                watches.append((future, watch))
            else:
                watch()
        try:
            yield
        finally:
            for future, watch in watches:
                future.forget(watch)

    def _split(self) -> Waited[T]:
        ended = [future.available() for future in self._futures]
        return Waited(
            [future for future, has_ended in zip(self._futures, ended, strict=True) if has_ended],
            [future for future, has_ended in zip(self._futures, ended, strict=True) if not has_ended],
        )
