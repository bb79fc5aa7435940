"""A worker that is drained: it takes nothing new, finishes what has begun, moves what it keeps to others, and leaves.

    serving ──▶ finishing ──▶ closing ──▶ left

    finishing   Others are told to send nothing new. Calls of actors without state that have not begun go back to their
                owners, who send them elsewhere (`Returned`); those that run are waited for, and so are jobs, unless they wait
                for people or time. Sessions in stores are served on meanwhile, or move. Sessions that are in memory alone
                cannot; they are served until they have been quiet for a second.
    closing     All that is waited for has ended, or the grace period has. What still runs is ended: owners send it again if
                they may, jobs go on elsewhere, and calls of sessions that cannot move end with `SessionLostError`. No call of
                a session in a store begins; those that wait go back to their owners. So do calls without state, even if
                nobody else serves them: what begins now would be lost. Calls that belong to one which still runs here, or
                holds a session, are let through, since it waits for them.
    left        `Bye` tells everybody which messages have been read; owners send the others, and what came back, to whoever
                has the sessions then, in their order. The stores are closed. A later call of a session that was in memory is
                told `StateLostError`, once.

What becomes of the sessions in a store:

    by bequest     A worker on the same machine which serves the same agents goes on with the store as a whole. It is asked
                   first (`Bequest`, `Accepted`), and opens the store the moment that it is closed here, or that this process
                   is killed. Those that could do it are asked together whether they would: of those that answer the one
                   with the least to do goes on with it, and nobody waits for the others then. One that is drained itself is
                   asked if there is no other: what it still runs may need the sessions. Sessions whose call takes long move
                   on their own before that, so that the others need not wait for it.
    by migration   If there is no such worker, all sessions move to others, idle ones from the disk, several at a time, each
                   to the one with the least to do (`migration`).
    not at all     If nobody else serves the agent, they stay on the disk for whoever opens the store next.

A process that is killed meanwhile is lost like any other: each session has one owner at each moment, the store or the
directory says which. Nobody waits for a worker that cannot be reached: what it was to take goes to another one or stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from nalar_mq.address import Address
from nalar_mq.door import Door
from nalar_mq.errors import BrokerError, CallError, NalarError, SessionLostError, StoreError
from nalar_mq.event_loop import cancel_all
from nalar_mq.execution import Execution, session_key_of
from nalar_mq.host import Host
from nalar_mq.intake import Intake
from nalar_mq.logs import logger
from nalar_mq.messages import Accepted, Bequest, Call, Drain, Drainage, Member, Migrate
from nalar_mq.migration import Key, Migrations
from nalar_mq.process import Process
from nalar_mq.replica import Replica
from nalar_mq.store import HERE, Session, Store
from nalar_mq.stores import Stores

GRACE_S: Final = 30.0
_LOOK_S: Final = 0.02
_LOOK_SHARE: Final = 20.0  # a look at 100,000 calls takes longer: the pause after it is so many times as long
_TELL_S: Final = 0.2
_QUIET_S: Final = 1.0  # a session in memory that nobody has called for so long is not in use
_LONG_S: Final = 0.25  # a session whose call has run for so long moves on its own
_LULL_S: Final = 1.0  # how long a moment is waited for in which no call of a session in a store runs
_YOUNG_S: Final = 1.0  # what has run for less when the grace period is over may end
_ANSWER_S: Final = 5.0  # for the broker and for other workers to answer in
_FURTHER_S: Final = 0.25  # for others to answer in when one has
_LAST_WORDS_S: Final = 0.5
_UNWIND_S: Final = 2.0  # for calls that have been ended
_INHERIT_S: Final = 60.0
_AT_ONCE: Final = 16  # sessions that move at a time
_TRIES: Final = 2
_log = logger(__name__)


class Draining:
    """How one worker leaves, and how it goes on with what others leave. Everything is for the loop.

    Args:
        process, host: of the worker.
        stores, migrations: where it keeps sessions, if it does.
        kept: agents whose sessions are in stores, and whether those are replicated.
        begin: has the worker drained, since somebody wants that, with a grace period in seconds.

    Attributes:
        moved: sessions that have moved to other workers.
    """

    def __init__(
        self,
        process: Process,
        host: Host,
        stores: Stores | None,
        migrations: Migrations | None,
        kept: Mapping[str, bool],
        begin: Callable[[float], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._calls = process.calls
        self._table = process.table
        self._host = host
        self._stores = stores
        self._migrations = migrations
        self._kept = kept
        self._begin = begin
        self._intake: Intake | None = None
        self._door: asyncio.Task[None] | None = None
        self._is_begun = False
        self.is_closing = False
        self._grace_until = 0.0
        self._swept = -1
        self._heirs: dict[str, Address] = {}
        self._unwilling: set[str] = set()
        self._silent: set[str] = set()
        self._asked: dict[bytes, asyncio.Future[str]] = {}
        self._askers: list[tuple[Address, bytes]] = []
        self._moves: dict[Key, asyncio.Task[None]] = {}
        self._failed: Counter[Key] = Counter()
        self._given: Counter[str] = Counter()
        self._emptying: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.moved = 0
        self._handed_over = 0
        self._lost: set[Key] = set()
        self._left_behind = 0

    # What others want.

    def on_drain(self, asker: Address, order: Drain) -> None:
        """Somebody wants this worker to leave: it begins, or says why not, and tells how far it has got."""
        refusal = ""
        if not order.grace_s >= 0:
            refusal = f"a grace period of {order.grace_s:g} s cannot be: give one of 0 s or more"
        elif self._is_begun:
            refusal = f"worker {self._process.name!r} is drained already"
        if refusal:
            self._calls.tell(asker, Drainage(order.id, refusal))
            return
        self._askers.append((asker, order.id))
        self._is_begun = True
        self._begin(order.grace_s)

    def on_bequest(self, sender: Address, bequest: Bequest) -> None:
        """A worker that drains has a store to give away."""
        folder = Path(bequest.folder)
        if self.is_closing:
            refusal = f"worker {self._process.name!r} is about to leave itself"
        elif self._stores is None or not self._stores.may_open(folder):
            refusal = f"worker {self._process.name!r} keeps no sessions in {folder.parent}"
        else:
            refusal = ""
            if bequest.is_due:
                self._start(self._inherit(folder, self._stores))
        self._calls.tell(sender, Accepted(bequest.id, refusal))

    async def _inherit(self, folder: Path, stores: Stores) -> None:
        process = self._process
        try:
            async with asyncio.timeout(_INHERIT_S):
                is_open = False
                while not is_open:
                    await asyncio.sleep(_LOOK_S)
                    adopts = process.settings.adopts_state
                    is_open = await stores.take(folder, process.transport, process.subjects, adopts=adopts)
            if self._migrations is not None:
                self._migrations.on_stores_opened()
            await process.membership.hold(stores.ids, stores.replicated_ids)
        except (NalarError, TimeoutError) as error:
            _log.warning("store.not_inherited", folder=str(folder), error=str(error) or repr(error))

    def on_accepted(self, accepted: Accepted) -> None:
        """Another worker goes on with a store, or refuses to."""
        asked = self._asked.get(accepted.id)
        if asked is not None and not asked.done():
            asked.set_result(accepted.refusal)

    # What becomes of calls that come meanwhile (`host.Gate`).

    def refusal(self, replica: Replica) -> CallError | None:
        """What calls of that actor end with; None if they do not."""
        return _session_lost(replica.spec.name) if self.is_closing and _is_in_memory(replica) else None

    def returns(self, owner: Address, call: Call, replica: Replica) -> bool:
        """True if the call goes back to its owner, who sends it elsewhere."""
        if self._calls.is_lost(owner) or (call.cast and call.deps):
            return False  # nobody would send it again, or it would not get what it depends on
        if not replica.spec.stateful:
            is_needed_here = bool(call.holds) or owner == self._process.me
            return bool(self._others(call.actor)) or (self.is_closing and not is_needed_here)
        return self.is_closing and replica.stores is not None and not call.holds

    def _others(self, actor: str) -> list[Address]:
        return [address for address in self._table.replicas(actor) if address != self._process.me]

    def _give_back(self) -> None:
        """Gives back what has not begun; of a session with a call that is let through, none."""
        self._swept = self._table.version
        waiting = [execution for execution in self._host.executions if not execution.started]
        let_through = {_key_of(one) for one in waiting if one.replica.stores is not None and one.call.holds}
        for execution in waiting:
            may_go = execution.following is None and _key_of(execution) not in let_through
            if may_go and self.returns(execution.owner, execution.call, execution.replica):
                self._host.give_back(execution)

    # Leaving.

    async def run(self, grace_s: float, intake: Intake | None, door: Door | None) -> Drainage:
        """Moves and finishes all there is, and leaves; returns what became of it.

        When it returns, nobody sends this process anything, and its stores are closed.
        """
        self._is_begun = True
        self._grace_until = self._loop.time() + grace_s
        self._intake = intake
        _log.info("worker.draining", worker=self._process.name, grace_s=grace_s)
        try:
            self._start(self._tell_askers())
            await self._announce(grace_s, door)
            await self._finish()
            await self._close()
        finally:
            await cancel_all([*self._tasks, *self._moves.values(), *([self._emptying] if self._emptying else [])])
        await self._leave()
        ended = self.progress(is_over=True)
        _log.info(
            "worker.drained",
            worker=self._process.name,
            moved=ended.moved,
            stores=ended.stores,
            lost=ended.lost,
            stayed=ended.stayed,
            silent=ended.silent,
        )
        return ended

    async def _announce(self, grace_s: float, door: Door | None) -> None:
        process = self._process
        self._table.drain(process.me)
        self._host.gate = self
        try:
            if not process.endpoint.connected_for_s():
                raise BrokerError("the broker is away: nobody can be told, and what is kept here stays here")
            async with asyncio.timeout(_ANSWER_S):
                await process.membership.drain()
        except (BrokerError, TimeoutError) as error:
            _log.warning("worker.drain_not_announced", worker=process.name, error=str(error) or "the broker does not answer")
        self._give_back()
        if door is not None:
            self._door = self._start(door.aclose(grace_s))
        if self._intake is not None:
            await self._intake.stop_taking()
        await self._find_heirs()

    def _is_alone(self) -> bool:
        """True if no worker is left that would take anything."""
        return not any(member.role == "worker" and not member.draining for member in self._table.members.values())

    async def _finish(self) -> None:
        """Returns when all that is waited for has ended, or has been ended, and all sessions that can move have moved."""
        has_ended, ready_at = False, math.inf
        self._emptying = self._loop.create_task(self._empty_stores())
        while True:
            if self._table.version != self._swept:
                self._give_back()
            now = self._loop.time()
            is_late = now >= self._grace_until
            if is_late and not has_ended:
                has_ended = True
                self._end_sessions()
                self._host.end_running(one for one in self._host.executions if one.started and one.began <= now - _YOUNG_S)
            self._move_long_ones()
            if not self._emptying.done() or self._moves or (not is_late and self._is_waiting()):
                ready_at = math.inf
            else:
                ready_at = min(ready_at, now)
                if is_late or now - ready_at >= _LULL_S or not self._is_used():
                    return
            await asyncio.sleep(max(_LOOK_S, _LOOK_SHARE * (self._loop.time() - now)))

    def _is_waiting(self) -> bool:
        """True if something has to end before this worker can close."""
        if (self._intake is not None and self._intake.at_work) or (self._door is not None and not self._door.done()):
            return True
        is_alone = self._is_alone()
        executions = self._host.executions
        if any(self._is_waited_for(execution, is_alone) for execution in executions):
            return True
        since = self._loop.time() - _QUIET_S
        return not is_alone and any(_is_in_memory(replica) and replica.was_used_since(since) for replica in self._host.replicas)

    def _is_used(self) -> bool:
        """True if a call of a session in a store runs: all others of that store would wait for it."""
        return any(one.started and not one.is_answered and one.replica.stores is not None for one in self._host.executions)

    def _is_waited_for(self, execution: Execution, is_alone: bool) -> bool:
        if execution.is_answered or execution.is_parked:
            return False
        return is_alone or execution.replica.stores is None

    def _end_sessions(self) -> None:
        for execution in self._host.executions:
            if _is_in_memory(execution.replica) and not execution.is_answered:
                self._lost.add(_key_of(execution))
                self._host.end_with(execution, _session_lost(execution.call.actor))

    async def _close(self) -> None:
        """Returns when nothing runs and nothing begins."""
        self.is_closing = True
        self._end_sessions()
        self._give_back()
        for replica in self._host.replicas:
            if _is_in_memory(replica):
                named = (key for key in replica.idle("", math.inf) if not key.startswith("auto-"))
                self._lost.update((replica.spec.name, key) for key in named)
        await self._while(
            lambda: any(not one.is_answered and one.replica.stores is not None for one in self._host.executions),
            max(self._grace_until, self._loop.time() + _UNWIND_S),
        )
        if self._intake is not None:
            await self._intake.aclose()
        self._host.end_running(self._host.executions)
        await self._while(lambda: any(one.started for one in self._host.executions), self._loop.time() + _UNWIND_S)
        await self._bequeath()

    async def _while(self, condition: Callable[[], bool], until: float) -> None:
        while True:
            if not condition() or self._loop.time() >= until:
                return
            await asyncio.sleep(_LOOK_S)

    async def _leave(self) -> None:
        """Nobody is read or told anything after this; what others have sent and nobody has read, they send elsewhere."""
        for asker, id in self._askers:
            self._calls.tell(asker, self.progress(id, is_over=True))
        endpoint = self._process.endpoint
        if self._migrations is not None:
            self._migrations.give_back_parked()
        await endpoint.drain(_LAST_WORDS_S)  # who hears that a session has moved answers, which is passed on
        endpoint.stop_reading()
        if self._migrations is not None:
            self._migrations.give_back_parked()  # what came meanwhile
        await endpoint.drain(_ANSWER_S)
        endpoint.leave()
        if self._migrations is not None:
            await self._migrations.aclose()
        if self._stores is not None:
            await self._stores.aclose()

    # Sessions in stores.

    async def _find_heirs(self) -> None:
        for committer in self._stores.all if self._stores is not None else ():
            await self._find_heir(committer.store, is_due=False)

    async def _find_heir(self, store: Store, *, is_due: bool) -> bool:
        """Finds a worker that goes on with a store as a whole, when that `is_due`; False if there is none."""
        while heir := self._chosen(store) or await self._willing(store):
            self._heirs[store.id] = heir
            if not is_due:
                return True
            answers = await self._ask([heir], store, is_due=True)
            if answers.get(heir) == "":
                return True
            self._note_unwilling(store, answers, [heir])
            del self._heirs[store.id]
        return False

    def _possible_heirs(self) -> list[Address]:
        """The workers that could go on with a store, and have not said no, the most suitable one first."""
        members, name = self._table.members, self._process.name
        me = members.get(name)
        names = heirs_among(members, name, me, self._kept) if me is not None else []
        ordered = sorted(set(names) - self._unwilling, key=lambda heir: (self._given[heir], self._table.busy(heir), heir))
        return [Address(name, members[name].incarnation) for name in ordered]

    def _chosen(self, store: Store) -> Address | None:
        """Who has said that it would go on with the store, if it still could."""
        chosen = self._heirs.pop(store.id, None)
        return chosen if chosen in self._possible_heirs() else None

    async def _willing(self, store: Store) -> Address | None:
        """Asks all that could go on with a store whether they would; the most suitable one of those."""
        while asked := self._possible_heirs():
            answers = await self._ask(asked, store, is_due=False)
            willing = [heir for heir in self._possible_heirs() if answers.get(heir) == ""]
            if willing:
                self._given[willing[0].name] += 1
                return willing[0]
            self._note_unwilling(store, answers, asked)
        return None

    def _note_unwilling(self, store: Store, answers: Mapping[Address, str], asked: Iterable[Address]) -> None:
        """They are asked nothing more."""
        for name, refusal in ((heir.name, answers.get(heir, "it does not answer")) for heir in asked):
            _log.info("store.not_taken", store=store.id, worker=name, reason=refusal)
            self._unwilling.add(name)
        self._silent.update(heir.name for heir in asked if heir not in answers)

    async def _ask(self, heirs: Iterable[Address], store: Store, *, is_due: bool) -> dict[Address, str]:
        """What they answer, all asked together: why not, or nothing; when one is willing, the others have to be quick."""
        folder, asked = str(store.folder.resolve()), dict[asyncio.Future[str], tuple[Address, bytes]]()
        for heir in heirs:
            bequest = Bequest(self._process.calls.fresh_id(), store.id, folder, is_due)
            answer: asyncio.Future[str] = self._loop.create_future()
            self._asked[bequest.id] = answer
            asked[answer] = heir, bequest.id
            self._calls.tell(heir, bequest)
        answers: dict[Address, str] = {}
        until, waiting = self._loop.time() + _ANSWER_S, set(asked)
        try:
            while waiting and self._loop.time() < until:
                timeout = until - self._loop.time()
                done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                answers |= {asked[answer][0]: answer.result() for answer in done}
                if "" in answers.values():
                    until = min(until, self._loop.time() + _FURTHER_S)
        finally:
            for _, id in asked.values():
                del self._asked[id]
        return answers

    async def _bequeath(self) -> None:
        """Has others go on with the stores; where nobody does after all, moves the sessions one by one."""
        if self._stores is None:
            return
        for committer in self._stores.all:
            if committer.store.id in self._heirs and await self._find_heir(committer.store, is_due=True):
                self._handed_over += 1
        await self._empty_stores()
        ends_since_s = self._process.settings.ends_since_s
        if ends_since_s is not None:  # a later run finds the sessions that have names, and nobody the others
            with contextlib.suppress(StoreError):
                await asyncio.to_thread(self._stores.forget_since, "auto-", ends_since_s)
            return
        for committer in self._stores.all:
            if committer.store.id not in self._heirs:
                # Of sessions that have left, marks stay there.
                count = functools.partial(_count, committer.store) if self.moved else committer.store.count
                self._left_behind += await asyncio.to_thread(count)
        if self._left_behind:
            _log.warning(
                "sessions.stay",
                worker=self._process.name,
                sessions=self._left_behind,
                hint="nobody else serves their agents now; they are on the disk of this worker, for whoever opens its store",
            )

    async def _empty_stores(self) -> None:
        """Moves all sessions of stores that no single worker goes on with."""
        stores, migrations = self._stores, self._migrations
        if stores is None or migrations is None:
            return
        while True:
            has_tried = False
            for store in [committer.store for committer in stores.all if committer.store.id not in self._heirs]:
                if not any(self._takers(actor) for actor in self._kept):
                    return
                after: tuple[str, str] | None = None
                while sessions := await asyncio.to_thread(store.sessions, after):
                    for session in sessions:
                        has_tried |= await self._begin_move(session, migrations)
                    after = sessions[-1].actor, sessions[-1].name
            while self._moves:
                await asyncio.wait(self._moves.values())
            if not has_tried:
                return

    async def _begin_move(self, session: Session, migrations: Migrations) -> bool:
        """Begins to move a session as soon as there is room; False if it is not here or cannot move."""
        key = session.actor, session.name
        if session.standing != HERE or key in self._moves or self._failed[key] >= _TRIES:
            return False
        takers = self._takers(session.actor)
        if not takers:
            return False
        while len(self._moves) >= _AT_ONCE:
            await asyncio.wait(self._moves.values(), return_when=asyncio.FIRST_COMPLETED)
        self._move(key, takers, migrations)
        return True

    def _move(self, key: Key, takers: list[str], migrations: Migrations) -> None:
        target = min(takers, key=lambda taker: (self._given[taker] + self._table.busy(taker), taker))
        self._given[target] += 1

        async def move() -> None:
            try:
                await migrations.move(Migrate(self._process.calls.fresh_id(), *key, target))
                self.moved += 1
            except NalarError as error:
                self._failed[key] += 1
                _log.info("session.not_moved", actor=key[0], session=key[1], to=target, reason=str(error))
            except Exception:
                self._failed[key] += 1
                _log.exception("session.not_moved", actor=key[0], session=key[1], to=target)
            finally:
                del self._moves[key]

        self._moves[key] = self._loop.create_task(move())

    def _takers(self, actor: str) -> list[str]:
        """Workers that sessions of that agent can move to."""
        if actor not in self._kept:
            return []
        names = [address.name for address in self._others(actor)]
        members = self._table.members
        return [name for name in names if (members[name].replicated if self._kept[actor] else members[name].stores)]

    def _move_long_ones(self) -> None:
        """Sessions in stores that go to another worker as a whole, and whose call has run for long."""
        if self._migrations is None or not self._heirs:
            return
        before = self._loop.time() - _LONG_S
        for execution in self._host.executions:
            if execution.replica.stores is None or not execution.started or execution.began > before or execution.is_answered:
                continue
            key = _key_of(execution)
            takers = self._takers(key[0])
            if takers and key not in self._moves and not self._failed[key] and len(self._moves) < _AT_ONCE:
                self._move(key, takers, self._migrations)

    # Telling.

    def progress(self, id: bytes = b"", *, is_over: bool = False) -> Drainage:
        """How far it has got."""
        executions = self._host.executions
        return Drainage(
            id,
            is_over=is_over,
            calls=sum(not one.is_answered for one in executions),
            jobs=0 if self._intake is None else self._intake.at_work,
            sessions=len(self._moves),
            moved=self.moved,
            stores=self._handed_over,
            lost=len(self._lost),
            stayed=self._left_behind,
            silent=tuple(sorted(self._silent)),
        )

    async def _tell_askers(self) -> None:
        while True:
            for asker, id in self._askers:
                self._calls.tell(asker, self.progress(id))
            await asyncio.sleep(_TELL_S)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Gives up what it was to go on with; whoever looks for free stores finds it."""
        await cancel_all(self._tasks)


def heirs_among(members: Mapping[str, Member], name: str, me: Member, kept: Iterable[str]) -> list[str]:
    """The workers that could go on with a store of the member `me` called `name`: on its machine, with all of its agents.

    If all of those are drained themselves, they are named all the same: what they still run may need the sessions.
    """

    def can(member: Member) -> bool:
        is_near = member.node == me.node or (member.folder != "" and member.folder == me.folder)
        infos = [member.actors.get(actor) for actor in kept]
        return is_near and all(info is not None and info.is_kept for info in infos)

    able = {other: member for other, member in members.items() if other != name and member.role == "worker" and can(member)}
    return [other for other, member in able.items() if not member.draining] or list(able)


def _is_in_memory(replica: Replica) -> bool:
    """True for an agent whose sessions cannot move: they are in the memory of this process alone."""
    return replica.spec.stateful and replica.stores is None


def _key_of(execution: Execution) -> Key:
    return execution.call.actor, session_key_of(execution.call)


def _count(store: Store) -> int:
    """Sessions that are served from the store."""
    count, after = 0, None
    while sessions := store.sessions(after):
        count += sum(session.standing == HERE for session in sessions)
        after = sessions[-1].actor, sessions[-1].name
    return count


def _session_lost(actor: str) -> SessionLostError:
    return SessionLostError(
        f"the worker that had this session of {actor!r} was drained, and what the session kept in memory cannot move: begin it "
        f"anew, or keep its state in managed fields with durability 'node'",
        actor=actor,
    )
