"""A session moves to another worker while it is used.

    source                                             target
      │── Piece ... ──────────────────────────────────▶│  into its store as staged, and into the fields of the instance to be;
      │◀────────────────────────────────────── Taken ──│  a few are on their way at a time
      │── Piece "prepare" ────────────────────────────▶│  makes the instance
      │── Piece ... what was changed meanwhile ───────▶│  the same; again and again, until what was changed is little
      │  freeze: no call begins, the running one ends
      │── Piece ... what was changed since ───────────▶│
      │── Piece "last" ───────────────────────────────▶│  checks number and checksums of all entries, syncs
      │◀────────────────────────────────────── Taken ──│
      │  marks the session as leaving, durably
      │  compare-and-set in the directory: the session is in the target's store
      │── Forward ... the calls that wait ────────────▶│
      │── Thaw ───────────────────────────────────────▶│  serves
      │  deletes its copy in pieces; a mark stays, and calls that still come are forwarded

Others are served meanwhile. A piece has about 128 KB, so that neither loop is held by one for long. Those before "prepare" have
rows: entries as they stand in the source's store, each with its checksum, in the order of their keys. The source takes them out
without looking into them, and the target compares them with their checksums and puts them side by side. Pieces are written in
the background of the target's store (`committer`), several in one transaction; each is durable before it is `Taken`, and what
calls commit goes first. The first piece has the version of the agent, so that a target that cannot serve it says so at once.

Whoever cannot go on says so: the source with `Abandon`, the target with a refusal in `Taken`. Then the target takes no more
pieces of that try, and deletes what it has; a later try begins after that.

Only the source changes the directory, and when it does not hear what became of that, it reads until it knows. A copy that is
staged, leaving or left is served by nobody unless the directory names its store (`settle`). Who finds one after a crash, and
the directory still names the other store, writes that entry once more as it is before he acts on it: a change that a dead
source may have sent is refused from then on.

Order. Who forwards a call tells its owner where to (`Forwarded`). The owner sends nothing more of that session until a
`Crossing`, which goes the same way as its former calls, has come back as `Arrived` from where the session is: then all of
those are there. If one of those who pass on is lost meanwhile, what it had in its hands counts as lost with it and is sent
again under the same ids, and the question is asked anew, with another number: what comes in answer to the former one does not
count. A call that comes back from a worker of which its owner has not yet heard that it was sent there (`Returned` has
overtaken `Forwarded`) waits for such a question too, and goes again as another attempt: by that, late notices are told apart.

    owner                        source                       target, lost with 1 and 2               its successor
      │── 1, 2 ─────────────────▶│── Forward 1, 2 ───────────▶╳
      │── 3 ────────────────────▶│  the way of 1 and 2 has ended: 3 may not go another one before them
      │◀─ Forwarded 1, 2 ────────│
      │◀─ Returned 3 ────────────│
      │── Crossing ─────────────▶│
      │◀─ Arrived ───────────────│
      │  hears that target is lost
      │── 1, 2, 3 ──────────────────────────────────────────────────────────────────────────────────▶│

For this the source remembers which process it passed the calls of an owner to. Until the owner's `Crossing`, which follows
the last of them and goes to that same process, all calls of that owner go there or come back as `Returned`, never begun:
also when the store is open elsewhere by now, or the session has come back here. If that process is lost, the source answers
the `Crossing` itself. It does the same with the calls of an owner to which it has given back former ones because it drains,
once the session has left. And when `Arrived` has come, the owner still waits while one of its calls is at another process than
the one that has the session: it will hear that the call has ended there, or where it went, or that it was lost.

A worker with several stores can find a session in more than one of them, since it may have left one for another and that has
been opened here later; where none of them has it now, the directory decides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Protocol

from nalar_mq.address import Address, Subjects
from nalar_mq.errors import BrokerError, KeyConflictError, MigrationError, NalarError, StoreError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.logs import logger
from nalar_mq.messages import (
    WIRE_VERSION,
    Abandon,
    Arrived,
    Call,
    Crossing,
    Forward,
    Forwarded,
    Message,
    Migrate,
    Migrated,
    Piece,
    Place,
    Returned,
    Taken,
    Thaw,
    decode_place,
    encode_record,
)
from nalar_mq.placement import RoutingTable
from nalar_mq.places import Places
from nalar_mq.state import Arrival
from nalar_mq.store import (
    CHECKSUM_BYTES,
    HERE,
    LEAVING,
    LEFT,
    STAGED,
    Change,
    Commit,
    Departure,
    Lump,
    Outcome,
    Row,
    Session,
    Store,
    Write,
    lump_of,
)
from nalar_mq.stores import Kept, Stores
from nalar_mq.transport import KeyValue, Transport

PIECE_BYTES: Final = 128 * 1024
_MESSAGE_BYTES: Final = 512 * 1024
_READ_AT_ONCE: Final = 4
_ON_THE_WAY: Final = 32  # while a transaction of the target is synced, the next one gathers
_ENTRY_BYTES: Final = 128  # what an entry counts beside its data
_FEW_BYTES: Final = 64 * 1024  # of changed entries that may wait for the freeze
_ROUNDS: Final = 10
_PATIENCE_S: Final = 60.0
_RETRY_S: Final = 0.2
_LEFT_KEPT: Final = 100_000
_PASSED_KEPT: Final = 100_000
_log = logger(__name__)

Key = tuple[str, str]
"""Actor and session of what moves."""


class Holder(Protocol):
    """The part of a worker that runs the calls of sessions."""

    def refusal(self, actor: str) -> str:
        """Why sessions of that agent can neither leave nor come; empty if they can."""
        ...

    def is_loaded(self, key: Key) -> bool:
        """True if an instance of the session is in memory."""
        ...

    def freeze(self, key: Key) -> None:
        """No call of the session begins."""
        ...

    async def quiet(self, key: Key) -> None:
        """Returns when no call of the session runs and nothing of it is being committed."""
        ...

    def thaw(self, key: Key) -> None:
        """Calls of the session begin."""
        ...

    def release(self, key: Key) -> list[Forward]:
        """Lets the session go, thawed: its instance, and the calls that have not begun, which are returned."""
        ...

    def take_forwarded(self, forward: Forward) -> None:
        """A call that came to where its session was before."""
        ...

    def arrival(self, key: Key, version: int) -> Arrival | None:
        """What gathers a session that comes, kept by that version of its agent; None if a call is to read it from the store.

        Raises:
            MigrationError: it cannot be served here.
        """
        ...

    async def stage(self, key: Key, kept: Kept, arrival: Arrival) -> None:
        """Makes an instance of what has come."""
        ...


class _Leaving:
    """A session on its way out of this worker."""

    def __init__(self, order: Migrate, asker: Address | None, kept: Kept, target: Address) -> None:
        self.id = order.id
        self.key: Key = (order.actor, order.session)
        self.asker = asker
        self.kept = kept
        self.target = target
        self.store = ""
        self.changed: dict[tuple[str, int], int] = {}
        self.outcomes: list[Outcome] = []
        self.number = 0
        self.size = 0
        self.room = asyncio.Semaphore(_ON_THE_WAY)
        self.taken: dict[int, asyncio.Future[None]] = {}
        self.failure: MigrationError | None = None

    @property
    def session(self) -> Session:
        """It as it is in the store that it leaves, whatever other stores of this worker know of it."""
        return self.kept.committer.store.session(*self.key)

    def fail(self, error: MigrationError) -> None:
        self.failure = self.failure or error
        for taken in self.taken.values():
            if not taken.done():
                taken.set_exception(error)
                taken.exception()
        for _ in range(_ON_THE_WAY):
            self.room.release()


class _Coming:
    """A session on its way into this worker."""

    def __init__(self, source: Address, store: str, key: Key, kept: Kept, arrival: Arrival | None) -> None:
        self.source = source
        self.store = store
        self.key = key
        self.kept = kept
        self.arrival = arrival
        self.is_complete = False
        self.begun = b""
        self.work: asyncio.Queue[Piece | None] = asyncio.Queue()  # None once it was given up
        self.task: asyncio.Task[None] | None = None


class Migrations:
    """The sessions that leave this worker, come to it, or have left it. Everything is for the loop.

    Args:
        transport, subjects, table, places: of the process.
        me: its address.
        stores: where sessions are kept.
        holder: runs their calls.
        tell: sends a message to a process.
    """

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        table: RoutingTable,
        places: Places,
        me: Address,
        stores: Stores,
        holder: Holder,
        tell: Callable[[Address, Message], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._subjects = subjects
        self._table = table
        self._places = places
        self._me = me
        self._stores = stores
        self._holder = holder
        self._tell = tell
        self._bucket: KeyValue | None = None
        self._leaving: dict[Key, _Leaving] = {}
        self._leaving_by_id: dict[bytes, _Leaving] = {}
        self._coming: dict[bytes, _Coming] = {}
        self._staging: set[Key] = set()
        self._dropping: dict[Key, asyncio.Event] = {}
        self._settling: dict[Key, asyncio.Task[None]] = {}
        self._served: dict[Key, int] = {}
        self._left: OrderedDict[Key, str] = OrderedDict()
        self._passed_to: OrderedDict[tuple[Key, Address], Address] = OrderedDict()
        self._parked: dict[str, list[Forward | Crossing]] = {}
        self._looking_further: set[Key] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.moved_out = 0
        self.moved_in = 0

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # What the worker asks and tells.

    def passes_on(self, key: Key, owner: Address, call: Call, hops: int = 0) -> bool:
        """True if the call of `owner` is not for this worker: it has been sent to where its session is, or back."""
        store = self._left_to(key)
        if store is not None:
            self._send_on(store, Forward(owner.name, owner.incarnation, call, hops + 1))
        elif self._passed_to.get((key, owner), owner) not in (owner, self._me):
            self._tell(owner, Returned(call, self._store_of(key)))
        else:
            return False
        return True

    def _store_of(self, key: Key) -> str:
        return self._left_to(key) or self._stores.session(*key).committer.store.id

    def _left_to(self, key: Key) -> str | None:
        """The store that a session has left to; None if it is here, perhaps since that store has been opened here."""
        store = self._left.get(key)
        if store is None or not self._is_mine(store):
            return store
        del self._left[key]
        return None

    def _is_mine(self, store: str) -> bool:
        return store in self._stores.ids or store in self._stores.replicated_ids

    def on_stores_opened(self) -> None:
        """This worker has opened further stores: sessions that have left it may have come to one of those since.

        Where they are now, the marks in all its stores say; what was noted of them before would send their calls in a circle.
        """
        self._left.clear()

    def look(self, key: Key) -> None:
        """A call has come for a session that is not in memory: if it is not simply here, finds out where it is."""
        if key in self._settling or key in self._leaving or any(coming.key == key for coming in self._coming.values()):
            return
        kept = self._stores.session(*key)
        standing = self._standing(key, kept)
        other = kept.session.header.other if kept.session.header is not None else ""
        is_undecided = self._stores.is_undecided(*key) or self._is_mine(other)
        is_doubtful = (standing == LEFT or not kept.session.is_kept) and is_undecided
        if standing == LEFT and not is_doubtful:
            self._note_left(key, other)
        elif standing != HERE or is_doubtful:
            self._holder.freeze(key)
            self._settling[key] = self._start(self._settle(key, kept))
        elif not kept.session.is_kept:
            self._stores.assign(*key, kept.committer.store.id)  # stores that are opened from now on change nothing of that

    def on_commit(self, key: Key, changes: Iterable[Change], outcome: Outcome) -> None:
        """A call of a session has been committed."""
        leaving = self._leaving.get(key)
        if leaving is not None:
            leaving.changed.update(((field, order), _ENTRY_BYTES + len(data or b"")) for field, order, data in changes)
            leaving.outcomes.append(outcome)

    def on_lost(self, address: Address, given_back: Iterable[Message]) -> None:
        """That process is gone; it may not have had the messages that are given back."""
        for message in given_back:
            if isinstance(message, Crossing):
                key = message.actor, message.session
                self._tell(Address(message.name, message.incarnation), Arrived(*key, self._store_of(key), message.number))
        for passed in [passed for passed in self._passed_to if passed[1] == address]:
            del self._passed_to[passed]
        for leaving in [leaving for leaving in self._leaving.values() if leaving.target == address]:
            leaving.fail(MigrationError(f"worker {address.name!r} was lost while the session was on its way to it"))
        for id, coming in [(id, coming) for id, coming in self._coming.items() if coming.source == address]:
            del self._coming[id]
            if coming.task is not None:
                coming.task.cancel()
            self._settling[coming.key] = self._start(self._settle(coming.key, coming.kept))

    def on_table_changed(self) -> None:
        """Perhaps somebody has opened a store that is waited for."""
        for store in [store for store in self._parked if self._table.holder(store) is not None]:
            for message in self._parked.pop(store):
                self._send_on(store, message)

    # Leaving.

    def on_migrate(self, asker: Address, order: Migrate) -> None:
        """Somebody wants a session to move."""
        self._start(self._answer(asker, order))

    async def _answer(self, asker: Address, order: Migrate) -> None:
        try:
            frozen_s, size = await self.move(order)
        except NalarError as error:
            self._tell(asker, Migrated(order.id, str(error) or repr(error)))
        except Exception as error:
            _log.exception("session.migration_failed", actor=order.actor, session=order.session)
            self._tell(asker, Migrated(order.id, repr(error)))
        else:
            self._tell(asker, Migrated(order.id, "", frozen_s, size))

    async def move(self, order: Migrate) -> tuple[float, int]:
        """Moves a session; returns for how many seconds none of its calls could begin, and the bytes that went over.

        Raises:
            MigrationError: it stays where it is.
        """
        leaving = self._checked(order)
        if leaving is None:
            return 0.0, 0
        began = self._loop.time()
        self._leaving[leaving.key] = self._leaving_by_id[leaving.id] = leaving
        try:
            async with asyncio.timeout(None) as patience:
                try:
                    await self._send_all(leaving)  # the session serves meanwhile: this may take as long as it takes
                    patience.reschedule(self._loop.time() + _PATIENCE_S)
                    revision = await self._revision(leaving.key)
                except BaseException:
                    self._tell(leaving.target, Abandon(leaving.id))
                    raise
                frozen_s = await self._hand_over(leaving, patience, revision)
        except TimeoutError:
            raise MigrationError(f"it took longer than {_PATIENCE_S:.0f} s: a call of the session runs that long") from None
        except (StoreError, BrokerError) as error:
            raise MigrationError(str(error)) from error
        finally:
            del self._leaving[leaving.key], self._leaving_by_id[leaving.id]
        self.moved_out += 1
        actor, session = leaving.key
        _log.info(
            "session.migrated",
            actor=actor,
            session=session,
            to=leaving.target.name,
            bytes=leaving.size,
            frozen_ms=round(frozen_s * 1e3, 2),
            took_ms=round((self._loop.time() - began) * 1e3, 2),
        )
        return frozen_s, leaving.size

    def _checked(self, order: Migrate) -> _Leaving | None:
        """None if it is there already."""
        key = order.actor, order.session
        refusal = self._holder.refusal(order.actor)
        if refusal:
            raise MigrationError(refusal)
        member = self._table.members.get(order.target)
        if member is None:
            known = ", ".join(sorted(name for name, m in self._table.members.items() if m.role == "worker"))
            raise MigrationError(f"there is no worker {order.target!r}; there are: {known}")
        if order.target == self._me.name:
            return None
        if order.actor not in member.actors or not (member.stores or member.replicated) or member.draining:
            why = "takes no new sessions" if member.draining else f"does not keep sessions of {order.actor!r}"
            raise MigrationError(f"worker {order.target!r} {why}")
        if key in self._leaving:
            raise MigrationError(f"session {order.session!r} of {order.actor!r} is on its way elsewhere")
        kept = self._stores.session(*key)
        if self._left_to(key) is not None or self._standing(key, kept) != HERE or key in self._settling:
            raise MigrationError(f"session {order.session!r} of {order.actor!r} is not in worker {self._me.name!r} any more")
        if not kept.session.is_kept and self._stores.is_undecided(*key):
            raise MigrationError(
                "only the directory knows in which store of this worker the session is: call it once before it moves"
            )
        return _Leaving(order, None, kept, Address(order.target, member.incarnation))

    async def _send_all(self, leaving: _Leaving) -> None:
        """Pre-copy: all that is in the store, an instance there, and what was changed meanwhile until that is little."""
        store, after = leaving.kept.committer.store, b""
        session = leaving.session
        outcomes = await asyncio.to_thread(store.outcomes, session)
        await self._send(leaving, [], outcomes, session=session)
        while True:
            pieces, after = await asyncio.to_thread(_read, store, session, after)
            for rows in pieces:
                large = rows.pop() if rows and len(rows[-1][1]) > _MESSAGE_BYTES else None
                if rows:
                    await self._send_piece(leaving, [], rows=rows)
                if large is not None:
                    await self._send(leaving, list(_checked(leaving.key, [large]).changes()))
            if not after:
                break
        await self._send(leaving, [], step="prepare", waits=True, session=session)
        for _ in range(_ROUNDS):
            if sum(leaving.changed.values()) <= _FEW_BYTES:
                break
            await self._send_changed(leaving)

    async def _send_changed(self, leaving: _Leaving, step: str = "") -> None:
        """Sends what calls have changed since the last time, and waits until the other side has it."""
        session = leaving.session
        changed, leaving.changed = leaving.changed, {}
        outcomes, leaving.outcomes = leaving.outcomes, []
        changes = await asyncio.to_thread(leaving.kept.committer.store.entries, session, changed)
        *former, last = _pieces(changes)
        for some in former:
            await self._send(leaving, some)
        await self._send(leaving, last, outcomes, step=step, waits=True, session=session)

    async def _send(
        self,
        leaving: _Leaving,
        changes: list[Change],
        outcomes: Iterable[Outcome] = (),
        *,
        step: str = "",
        waits: bool = False,
        session: Session | None = None,
    ) -> None:
        """Sends a part; an entry that is too large for a message goes in several, and so do the outcomes of many calls."""
        *former, with_changes = _batches(outcomes)
        for batch in former:
            await self._send_piece(leaving, [], batch, session=session)
        small = [change for change in changes if len(change[2] or b"") <= _MESSAGE_BYTES]
        large = [(field, order, data) for field, order, data in changes if data is not None and len(data) > _MESSAGE_BYTES]
        if large and small:
            await self._send_piece(leaving, small)
            small = []
        for field, order, data in large:
            starts = range(0, len(data), _MESSAGE_BYTES)
            for start in starts:
                part: list[Change] = [(field, order, data[start : start + _MESSAGE_BYTES])]
                await self._send_piece(leaving, part, step="begun" if start != starts[-1] else "")
        await self._send_piece(leaving, small, with_changes, step=step, waits=waits, session=session)

    async def _send_piece(
        self,
        leaving: _Leaving,
        changes: list[Change],
        outcomes: Iterable[Outcome] = (),
        *,
        step: str = "",
        waits: bool = False,
        session: Session | None = None,
        rows: list[Row] | None = None,
    ) -> None:
        await leaving.room.acquire()
        if leaving.failure is not None:
            raise leaving.failure
        leaving.number += 1
        taken: asyncio.Future[None] = self._loop.create_future()
        leaving.taken[leaving.number] = taken
        rows = rows or []
        leaving.size += sum(len(data) for _, _, data in changes if data is not None)
        leaving.size += sum(len(value) - CHECKSUM_BYTES for _, value in rows)
        header = None if session is None else session.header
        actor, name = leaving.key
        self._tell(
            leaving.target,
            Piece(
                leaving.id,
                leaving.number,
                step,
                actor,
                name,
                leaving.kept.committer.store.id,
                changes,
                list(outcomes),
                0 if header is None else header.schema,
                {} if header is None else header.kinds,
                {} if session is None else session.sums,
                rows,
            ),
        )
        if waits:
            await taken

    def on_taken(self, taken: Taken) -> None:
        """The other worker has a part, or refuses the session."""
        leaving = self._leaving_by_id.get(taken.id)
        if leaving is None:
            return
        if taken.refusal:
            leaving.fail(MigrationError(taken.refusal))
            return
        leaving.store = taken.store
        leaving.room.release()
        future = leaving.taken.pop(taken.number, None)
        if future is not None and not future.done():
            future.set_result(None)

    async def _hand_over(self, leaving: _Leaving, patience: asyncio.Timeout, revision: int) -> float:
        key = leaving.key
        self._holder.freeze(key)
        is_known = True
        began = self._loop.time()
        try:
            await self._holder.quiet(key)
            began = self._loop.time()
            await self._send_changed(leaving, "last")
            patience.reschedule(None)  # from here on it goes to its end
            await self._mark(leaving, LEAVING, leaving.store)
            is_known = False
            if not await self._enter(leaving, revision):
                is_known = True
                await self._mark(leaving, HERE, "")
                raise MigrationError("the directory was changed by somebody else meanwhile")
        except BaseException:
            if is_known:
                self._tell(leaving.target, Abandon(leaving.id))
                self._holder.thaw(key)
            raise
        self._let_go(leaving)
        return self._loop.time() - began

    def _let_go(self, leaving: _Leaving) -> None:
        key, store = leaving.key, leaving.store
        self._note_left(key, store)
        self._send_all_on(key, store)
        if self._table.holder(store) == leaving.target:
            self._tell(leaving.target, Thaw(leaving.id))
        self._start(self._delete(key, leaving.kept, store))

    async def _mark(self, leaving: _Leaving, standing: str, other: str) -> None:
        session = leaving.session
        header = session.header
        kinds = {} if header is None else header.kinds
        schema = 0 if header is None else header.schema
        await self._write(leaving.kept, Commit(session, [], b"", b"", False, schema, kinds, standing, other))

    async def _delete(self, key: Key, kept: Kept, store: str) -> None:
        """Deletes the copy that stays behind, some of it at a time, so that others' commits get through."""
        try:
            await self._empty(Kept(kept.committer, kept.committer.store.session(*key)), store, LEAVING)
        except NalarError as error:
            _log.warning("session.copy_stays", actor=key[0], session=key[1], error=str(error))

    async def _empty(self, kept: Kept, store: str, standing: str) -> None:
        """Deletes all entries of a session, some at a time; the mark stays that it is in the other store."""
        while True:
            await self._write(kept, Departure(kept.session, store, standing), in_background=True)
            if kept.session.standing != LEFT:
                return  # it has come back meanwhile
            rest, _ = await asyncio.to_thread(kept.committer.store.rows, kept.session, b"", 1)
            if not rest:
                return

    async def _write(self, kept: Kept, write: Write, *, in_background: bool = False) -> None:
        done: asyncio.Future[None] = self._loop.create_future()

        def tell(error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_settle, done, error)

        kept.committer.put(write, tell, in_background=in_background)
        await done

    def _note_left(self, key: Key, store: str) -> None:
        self._left[key] = store
        self._left.move_to_end(key)
        self._stores.unassign(*key)
        self._places.learn(self._places.key_in_store(*key), store)
        if len(self._left) > _LEFT_KEPT:
            self._left.popitem(last=False)  # the mark in the store says the same

    def _send_on(self, store: str, message: Forward | Crossing) -> None:
        holder = self._table.holder(store)
        if isinstance(message, Forward):
            passed = _key_of(message), Address(message.name, message.incarnation)
            if self._passed_to.get(passed, holder) != holder:
                self._tell(passed[1], Returned(message.call, store))
                return
            if holder is not None:
                self._note_passed(*passed, holder)
        if holder is None:
            self._parked.setdefault(store, []).append(message)
            if (key := _key_of(message)) not in self._looking_further:
                self._looking_further.add(key)
                self._start(self._look_further(store, key))
            return
        self._tell(holder, message)
        if isinstance(message, Forward):
            owner, call = Address(message.name, message.incarnation), message.call
            key = _key_of(call)
            self._tell(owner, Forwarded(call.id, holder.name, holder.incarnation, message.hops, *key, store, call.attempt))

    def give_back_parked(self) -> None:
        """This worker leaves: calls that wait for somebody to open the store of their session wait at their owners."""
        parked, self._parked = self._parked, {}
        for store, messages in parked.items():
            for message in messages:
                if isinstance(message, Forward):
                    self._tell(Address(message.name, message.incarnation), Returned(message.call, store))

    async def _look_further(self, store: str, key: Key) -> None:
        """Nobody has that store open, and perhaps nobody ever will: the session may have gone on from there before."""
        try:
            named = await self._named(self._places.key_in_store(*key))
        finally:
            self._looking_further.discard(key)
        parked = self._parked.get(store, ())
        mine = [message for message in parked if _key_of(message) == key]
        if not mine or named in ("", store):
            return
        self._parked[store] = [message for message in parked if _key_of(message) != key]
        if key in self._left:
            self._note_left(key, named)
        for message in mine:
            self._send_on(named, message)

    def _note_passed(self, key: Key, owner: Address, to: Address) -> None:
        self._passed_to[key, owner] = to
        if len(self._passed_to) > _PASSED_KEPT:
            self._passed_to.popitem(last=False)

    def on_given_back(self, key: Key, owner: Address) -> None:
        """A call that has not begun has gone back to its owner: later ones are not sent on before it."""
        self._note_passed(key, owner, owner)

    def _send_all_on(self, key: Key, store: str) -> None:
        """The session is in another worker's store: so are its calls that have not begun, from now on."""
        for forward in self._holder.release(key):
            self._send_on(store, forward)

    # The directory.

    async def _directory(self) -> KeyValue:
        if self._bucket is None:
            self._bucket = await self._transport.key_value(self._subjects.places_bucket)
        return self._bucket

    async def _revision(self, key: Key) -> int:
        """Of the entry of a session that is in a store of this worker."""
        bucket = await self._directory()
        entry = await bucket.get(self._places.key_in_store(*key))
        if entry is None or not self._is_mine(_store_in(entry.value)):
            raise MigrationError("the directory does not say that the session is here: call it once before it moves")
        return entry.revision

    async def _enter(self, leaving: _Leaving, revision: int) -> bool:
        """Has the directory name the other store; False if it cannot, and the session is still here."""
        name, record = self._places.key_in_store(*leaving.key), _entry(leaving.store)
        while True:
            try:
                bucket = await self._directory()
                await bucket.update(name, record, revision)
                return True
            except (KeyConflictError, BrokerError) as error:
                named = await self._named(name)
                if named == leaving.store:
                    return True
                if isinstance(error, KeyConflictError):
                    return False
                # The change may be on its way yet: one more write of the entry as it is, and it cannot come any more.
                return await self._fence(name, leaving.kept.committer.store.id) == leaving.store

    async def _named(self, name: str) -> str:
        """The store that the directory names, as soon as the broker says."""
        while True:
            try:
                entry = await (await self._directory()).get(name)
                return "" if entry is None else _store_in(entry.value)
            except BrokerError:
                await asyncio.sleep(_RETRY_S)

    async def _fence(self, name: str, expected: str) -> str:
        """The store that the directory names; if it is `expected`, no change that was sent before can come any more."""
        while True:
            try:
                bucket = await self._directory()
                entry = await bucket.get(name)
                named = "" if entry is None else _store_in(entry.value)
                if entry is None or named != expected:
                    return named
                await bucket.update(name, _entry(expected), entry.revision)
                return named
            except KeyConflictError:
                continue
            except BrokerError:
                await asyncio.sleep(_RETRY_S)

    async def _settle(self, key: Key, kept: Kept) -> None:
        """What becomes of a session that is neither simply here nor simply gone: a crash has left it so."""
        try:
            await self._settle_now(key, kept)
        except NalarError as error:
            _log.error("session.not_settled", actor=key[0], session=key[1], error=str(error))
        finally:
            del self._settling[key]
            self._holder.thaw(key)

    async def _settle_now(self, key: Key, kept: Kept) -> None:
        name, mine = self._places.key_in_store(*key), kept.committer.store.id
        header = kept.session.header
        if header is None or header.standing == LEFT:
            named = await self._named(name)
            if not named or self._is_mine(named):
                self._stores.assign(*key, named or mine)
                return
        elif header.standing == STAGED:
            named = await self._named(name)
            if named != mine:
                named = await self._fence(name, header.other)
            if named == mine:
                self._serve(key, kept)
                return
            await self._empty(kept, named, STAGED)
        elif header.standing == LEAVING:
            named = await self._fence(name, mine)
            if named == mine:
                changes = Commit(kept.session, [], b"", b"", False, header.schema, header.kinds)
                await self._write(kept, changes)
                return
            self._start(self._delete(key, kept, named))
        else:
            return
        if named:
            self._note_left(key, named)
            self._send_all_on(key, named)

    # Coming.

    def on_piece(self, source: Address, piece: Piece) -> None:
        """A part of a session that another worker sends here."""
        coming = self._coming.get(piece.id)
        if coming is None:
            if piece.number != 1:
                return  # of one that was given up
            try:
                coming = self._welcome(source, piece)
            except NalarError as error:
                self._tell(source, Taken(piece.id, piece.number, str(error)))
                return
            self._coming[piece.id] = coming
            coming.task = self._start(self._receive(piece.id, coming))
        coming.work.put_nowait(piece)

    def _welcome(self, source: Address, piece: Piece) -> _Coming:
        key = piece.actor, piece.session
        refusal = self._holder.refusal(piece.actor)
        if refusal:
            raise MigrationError(refusal)
        kept = self._stores.session(*key)
        # What has left may still be marked as leaving, until its copy is deleted.
        is_here = key not in self._left and kept.session.is_kept and self._standing(key, kept) in (HERE, LEAVING)
        is_busy = key in self._settling or key in self._leaving or key in self._staging
        if is_here or is_busy or self._holder.is_loaded(key):
            raise MigrationError(f"worker {self._me.name!r} has session {piece.session!r} of {piece.actor!r} already")
        arrival = self._holder.arrival(key, piece.schema or 1)
        self._holder.freeze(key)
        self._left.pop(key, None)
        return _Coming(source, piece.store, key, kept, arrival)

    async def _receive(self, id: bytes, coming: _Coming) -> None:
        try:
            await self._until_dropped(coming.key)
            if coming.kept.session.is_kept:  # it was here before: what is left of that goes first
                await self._empty(coming.kept, coming.store, coming.kept.session.standing)
            while not coming.is_complete:
                piece = await coming.work.get()
                if piece is None or id not in self._coming:
                    return  # what it has put is deleted by now, or will be after that
                await self._take(id, coming, piece)
                await asyncio.sleep(0)  # many pieces may have come at once: whatever else there is goes between
        except Exception as error:
            if not isinstance(error, NalarError):
                _log.exception("session.staging_failed", actor=coming.key[0], session=coming.key[1])
            self._tell(coming.source, Taken(id, 0, str(error) or repr(error)))
            await self._drop(id, coming)

    async def _take(self, id: bytes, coming: _Coming, piece: Piece) -> None:
        store, session = coming.kept.committer.store, coming.kept.session
        if piece.step == "begun":
            coming.begun += piece.changes[0][2] or b""
            self._tell(coming.source, Taken(id, piece.number, "", store.id))
            return
        if coming.begun:
            field, order, data = piece.changes[0]
            piece.changes[0], coming.begun = (field, order, coming.begun + (data or b"")), b""
        outcomes = [Outcome(*outcome) for outcome in piece.outcomes]
        lump, changes = _checked(coming.key, piece.rows), piece.changes
        write = Commit(session, changes, b"", b"", False, piece.schema, piece.kinds, STAGED, piece.store, outcomes, lump)
        if coming.arrival is not None:
            for field, entries in lump.entries.items():
                coming.arrival.take_field(field, entries)
            coming.arrival.take(changes)
        if piece.step == "":
            coming.kept.committer.put(write, self._when_taken(id, coming, piece.number), in_background=True)
            return
        await self._write(coming.kept, write, in_background=True)
        if id not in self._coming:
            return
        if piece.step == "prepare" and coming.arrival is not None:
            await self._stage(id, coming, coming.arrival)
        if piece.step == "last":
            if session.sums != piece.sums:
                raise MigrationError(f"what came of session {coming.key[1]!r} is not what was sent")
            coming.is_complete = True
        self._tell(coming.source, Taken(id, piece.number, "", store.id))

    async def _stage(self, id: bytes, coming: _Coming, arrival: Arrival) -> None:
        self._staging.add(coming.key)
        try:
            await self._holder.stage(coming.key, coming.kept, arrival)
        finally:
            self._staging.discard(coming.key)
        if id not in self._coming:  # given up meanwhile
            self._send_all_on(coming.key, coming.store)

    def _when_taken(self, id: bytes, coming: _Coming, number: int) -> Callable[[Exception | None], None]:
        answer = Taken(id, number, "", coming.kept.committer.store.id)

        def done(error: Exception | None) -> None:
            if error is not None:
                self._tell(coming.source, Taken(id, number, str(error)))
                self._start(self._drop(id, coming))
            else:
                self._tell(coming.source, answer)

        def tell(error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(done, error)

        return tell

    async def _drop(self, id: bytes, coming: _Coming) -> None:
        if self._coming.pop(id, None) is None:
            return
        key = coming.key
        coming.work.put_nowait(None)
        self._note_left(key, coming.store)
        self._send_all_on(key, coming.store)
        await self._until_dropped(key)
        dropped = self._dropping[key] = asyncio.Event()
        try:
            with contextlib.suppress(NalarError):
                await self._empty(coming.kept, coming.store, STAGED)
        finally:
            del self._dropping[key]
            dropped.set()

    async def _until_dropped(self, key: Key) -> None:
        """A copy of a former try may be on its way out yet: what comes now must not go with it."""
        while key in self._dropping:
            await self._dropping[key].wait()

    def on_abandon(self, id: bytes) -> None:
        """The session stays where it was."""
        coming = self._coming.get(id)
        if coming is not None:
            self._start(self._drop(id, coming))

    def on_thaw(self, id: bytes) -> None:
        """The session is served here from now on."""
        coming = self._coming.pop(id, None)
        if coming is None:
            return
        self.moved_in += 1
        self._left.pop(coming.key, None)
        self._serve(coming.key, coming.kept)
        self._places.learn(self._places.key_in_store(*coming.key), coming.kept.committer.store.id)
        self._holder.thaw(coming.key)

    def _serve(self, key: Key, kept: Kept) -> None:
        """The session is here from now on; the store says so soon, and the directory says it already."""
        kept.session.serve()
        self._served[key] = self._served.get(key, 0) + 1
        self._start(self._note_served(key, kept))

    async def _note_served(self, key: Key, kept: Kept) -> None:
        header = kept.session.header
        try:
            if header is not None:
                await self._write(kept, Commit(kept.session, [], b"", b"", False, header.schema, header.kinds))
        except NalarError as error:
            _log.warning("session.mark_stays", actor=key[0], session=key[1], error=str(error))
        finally:
            self._served[key] -= 1
            if not self._served[key]:
                del self._served[key]

    def _standing(self, key: Key, kept: Kept) -> str:
        return HERE if key in self._served else kept.session.standing

    def on_forward(self, forward: Forward) -> None:
        """A call that came to where its session was before."""
        owner, call = Address(forward.name, forward.incarnation), forward.call
        if not self.passes_on(_key_of(call), owner, call, forward.hops):
            self._holder.take_forwarded(forward)

    def on_crossing(self, crossing: Crossing) -> None:
        """An owner wants to know when all that it has sent is where the session is."""
        key = crossing.actor, crossing.session
        if key not in self._left and not self._holder.is_loaded(key):
            with contextlib.suppress(NalarError):  # of a session that cannot be read, its calls hear
                self.look(key)
        settling = self._settling.get(key)
        if settling is None:
            self._cross(key, crossing)
        else:
            settling.add_done_callback(lambda _: None if settling.cancelled() else self._cross(key, crossing))

    def _cross(self, key: Key, crossing: Crossing) -> None:
        owner = Address(crossing.name, crossing.incarnation)
        passed_to, store = self._passed_to.get((key, owner), self._me), self._left_to(key)
        if passed_to != owner or store is not None:  # what was given back waits for this worker's end, if the session stays
            self._passed_to.pop((key, owner), None)
        if passed_to == owner or self._table.is_lost(passed_to):
            self._tell(owner, Arrived(*key, self._store_of(key), crossing.number))
        elif passed_to != self._me:
            self._tell(passed_to, crossing)
        elif store is not None:
            self._send_on(store, crossing)
        else:
            self._tell(owner, Arrived(*key, self._store_of(key), crossing.number))

    async def aclose(self) -> None:
        """Gives up what is on its way; what is in doubt is found out by whoever opens the store next."""
        await cancel_all(self._tasks)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _checked(key: Key, rows: list[Row]) -> Lump:
    lump = lump_of(rows)
    if lump is None:
        raise MigrationError(f"session {key[1]!r} of {key[0]!r} is damaged: an entry does not match its checksum")
    return lump


def _read(store: Store, session: Session, after: bytes) -> tuple[list[list[Row]], bytes]:
    """The rows of a few pieces, of one if it is large, and where the next ones begin; that is empty after the last one."""
    pieces: list[list[Row]] = []
    while True:
        rows, after = store.rows(session, after, PIECE_BYTES)
        pieces.append(rows)
        if not after or len(pieces) == _READ_AT_ONCE or len(rows[-1][1]) > PIECE_BYTES:
            return pieces, after


def _pieces(changes: list[Change]) -> Iterable[list[Change]]:
    """The changes in parts of about `PIECE_BYTES`; at least one part."""
    piece: list[Change] = []
    size = 0
    for change in changes:
        piece.append(change)
        size += len(change[2] or b"") + _ENTRY_BYTES
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    yield piece


def _batches(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """The outcomes in parts of about `PIECE_BYTES`, at least one part, the last one small enough to go with changes."""
    batches: list[list[Outcome]] = [[]]
    size = 0
    for outcome in outcomes:
        batches[-1].append(outcome)
        size += len(outcome.payload) + 64
        if size >= PIECE_BYTES:
            batches.append([])
            size = 0
    return batches


def _key_of(message: Call | Forward | Crossing) -> Key:
    if isinstance(message, Crossing):
        return message.actor, message.session
    call = message.call if isinstance(message, Forward) else message
    return call.actor, f"{call.session}/{call.instance}" if call.instance else call.session


def _entry(store: str) -> bytes:
    return encode_record(Place(WIRE_VERSION, "", 0, store))


def _store_in(value: bytes | None) -> str:
    try:
        return "" if value is None else decode_place(value).store
    except WireError:
        return ""
