"""Calls that have gone another way than they were sent: given back by a worker that drains, or passed on after a session.

What a caller knows of a session that has moved, on the event loop:

    settled ──▶ crossing: a call came back, or somebody says that he has passed one on; those made from now on wait
       ▲           │  the question `Crossing` goes after all that may be on its way, from process to process
       └───────────┘  its answer `Arrived` has come, and no call is anywhere but where the session is

A later question makes answers to former ones void; the loss of a process that had the question, or that was to pass calls on,
has it asked again by whoever has a call of the session. So calls of a session reach it in their order, whichever way each has
gone.

Steps. Each time that a call is passed on its caller is told (`Forwarded`), and these may come in any order: a step counts only
after all that are known of the same attempt, and no step of a former attempt counts.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Protocol

from nalar_mq.address import Address
from nalar_mq.entries import Entry, number_of
from nalar_mq.future import Future
from nalar_mq.messages import Arrived, Call, Cancel, Credit, Crossing, Forwarded, Message, Returned
from nalar_mq.placement import RoutingTable
from nalar_mq.places import Places

_NO_HOPS: tuple[tuple[int, int], Address | None] = ((0, 0), None)


class _Crossing:
    """A session that has moved, of which former calls may still be on their way by where it was before.

    Attributes:
        source: who forwards them.
        actor, session: as stores name it.
        store: where the session is.
        number: of the question that follows them.
        waiting: calls that go when it has come back, and all others are where the session is.
        elsewhere: those that were not there when it had come back; None before that.
        is_looked_over: those will be looked over soon.
    """

    def __init__(self, source: Address, actor: str, session: str, store: str) -> None:
        self.source = source
        self.actor = actor
        self.session = session
        self.store = store
        self.number = 0
        self.waiting: list[Entry] = []
        self.elsewhere: list[Entry] | None = None
        self.is_looked_over = False


class _Calls(Protocol):
    """The part of `calls` that this needs."""

    me: Address
    loop: asyncio.AbstractEventLoop
    in_flight: dict[str, dict[str, int]]

    def tell(self, address: Address, message: Message) -> None: ...
    def lend(self, dep: Future[Any], consumer: Address, deadline: float | None) -> None: ...
    def move_on(self, entry: Entry, unsent: Call | None) -> None: ...
    def again(self, entry: Entry) -> None: ...
    def cast_again(self, sender: Address, call: Call) -> Entry: ...
    def on_table_changed(self) -> None: ...


class Crossings:
    """Follows the calls of one process that are passed on, and holds those that must not overtake them; on the loop.

    Attributes:
        open: sessions that have moved, by their place, while calls of theirs may still be on their way.
        hops: of calls that were passed on: attempt and number of the last step heard of, and who took it.
    """

    __slots__ = ("_calls", "_entries", "_numbers", "_places", "_returned", "_table", "hops", "open")

    def __init__(self, calls: _Calls, entries: dict[bytes, Entry], table: RoutingTable, places: Places) -> None:
        self._calls = calls
        self._entries = entries
        self._table = table
        self._places = places
        self._numbers = itertools.count(1)
        self._returned: dict[Address, dict[bytes, Call]] = {}
        self.open: dict[str, _Crossing] = {}
        self.hops: dict[bytes, tuple[tuple[int, int], Address | None]] = {}

    def on_returned(self, sender: Address, returned: Returned) -> None:
        """A call has come back from a worker that drains, or that has passed former ones of its session on."""
        call = returned.call
        if returned.is_closing:
            self._table.close(sender)
        if not returned.store and self._table.drain(sender):
            self._calls.on_table_changed()
        entry = self._entries.get(call.id) or (self._calls.cast_again(sender, call) if call.cast else None)
        if returned.store and entry is not None and entry.place not in self.open:
            self._begin(entry.place, sender, call, returned.store)
        if entry is None or entry.address is None or entry.is_kept:
            return
        if call.attempt < self._attempt(entry):
            return  # it was sent anew meanwhile, and is elsewhere
        store = self._places.store_known(entry.place) if entry.place else ""
        is_unheard_of = sender != entry.address  # it came there from another process, whose `Forwarded` is still on its way
        if is_unheard_of and entry.place and entry.place not in self.open:
            self._begin(entry.place, entry.address, call, store)
        if returned.store or is_unheard_of:
            self.hops.setdefault(call.id, _NO_HOPS)
            self._calls.move_on(entry, call)
            return
        if store and self._table.holder(store) == sender:
            self._returned.setdefault(sender, {})[call.id] = call
        else:
            self._calls.move_on(entry, call)

    def _attempt(self, entry: Entry) -> int:
        """Which attempt of the call is under way: what is heard of former ones tells where it was, not where it is."""
        return self.hops.get(entry.future.id, _NO_HOPS)[0][0] if entry.call is None else entry.call.attempt

    def on_forwarded(self, sender: Address, forwarded: Forwarded) -> None:
        """A call has been sent after its session: from now on others of that session wait until all are there."""
        key = self._places.key_in_store(forwarded.actor, forwarded.session)
        entry = self._entries.get(forwarded.id)
        if self._places.store_known(key) != forwarded.store and key not in self.open:
            # Heard of its second step before the first, the call and all that follow it go by where it was sent.
            source = sender if forwarded.hops == 1 or entry is None or entry.address is None else entry.address
            self._cross(key, _Crossing(source, forwarded.actor, forwarded.session, forwarded.store))
        step = forwarded.attempt, forwarded.hops
        if entry is None or entry.address is None or self.hops.get(forwarded.id, _NO_HOPS)[0] >= step:
            return
        if forwarded.attempt < self._attempt(entry):
            return  # it was sent anew meanwhile
        self.hops[forwarded.id] = step, sender
        self._has_moved(entry, entry.address, Address(forwarded.name, forwarded.incarnation))

    def _begin(self, key: str, source: Address, call: Call, store: str) -> None:
        session = f"{call.session}/{call.instance}" if call.instance else call.session
        self._cross(key, _Crossing(source, call.actor, session, store))

    def _cross(self, key: str, crossing: _Crossing) -> None:
        self._places.learn(key, crossing.store)
        self.open[key] = crossing
        self._ask(crossing)
        for sender, returned in self._returned.items():  # what has come back from there goes after the session, too
            here = [entry for id in returned if (entry := self._entries.get(id)) is not None and entry.place == key]
            for entry in here:
                if entry.address == sender:
                    self._calls.move_on(entry, returned.pop(entry.future.id))

    def _has_moved(self, entry: Entry, former: Address, address: Address) -> None:
        in_flight = self._calls.in_flight[entry.actor]
        in_flight[former.name] = in_flight.get(former.name, 1) - 1
        in_flight[address.name] = in_flight.get(address.name, 0) + 1
        entry.address = address
        self.look_over(entry.place)
        if self._table.is_lost(address):
            self._calls.move_on(entry, None)
            return
        id = entry.future.id
        if entry.cancelling:
            self._calls.tell(address, Cancel(id))
        if entry.credit:
            self._calls.tell(address, Credit(id, entry.credit))
        for dep in entry.depends or ():
            self._calls.lend(dep, address, entry.deadline)

    def on_arrived(self, arrived: Arrived) -> None:
        """All that was on its way has come to somebody; those calls that are not where the session is may be lost with him."""
        key = self._places.key_in_store(arrived.actor, arrived.session)
        crossing = self.open.get(key)
        if crossing is not None and arrived.number in (crossing.number, 0):  # who says none is of a former version
            crossing.store = arrived.store
            self._places.learn(key, arrived.store)
            crossing.elsewhere = [entry for entry in self._entries.values() if entry.place == key]
            self.look_over(key)

    def look_over(self, key: str) -> None:
        """Something has become of a call of that session: perhaps none is elsewhere any more, and those that wait can go."""
        crossing = self.open.get(key)
        if crossing is not None and crossing.elsewhere is not None and not crossing.is_looked_over:
            crossing.is_looked_over = True
            self._calls.loop.call_soon(self._end_if_all_are_there, key, crossing)

    def _end_if_all_are_there(self, key: str, crossing: _Crossing) -> None:
        crossing.is_looked_over = False
        if self.open.get(key) is not crossing or crossing.elsewhere is None:
            return
        there = None, self._table.holder(crossing.store)
        crossing.elsewhere = [e for e in crossing.elsewhere if e.future.id in self._entries and e.address not in there]
        if not crossing.elsewhere:
            self._end(key)

    def _end(self, key: str) -> None:
        crossing = self.open.pop(key, None)
        for entry in sorted(crossing.waiting, key=number_of) if crossing is not None else ():
            if entry.future.id in self._entries and entry.call is not None:
                self._calls.again(entry)

    def _ask(self, crossing: _Crossing) -> None:
        """Answers to what was asked before do not count: of what has gone another way since, they say nothing."""
        crossing.number = next(self._numbers)
        self._calls.tell(crossing.source, Crossing(*self._calls.me, crossing.actor, crossing.session, crossing.number))

    def take_returned(self, lost: Address) -> dict[bytes, Call]:
        """What came back from a process that is gone, and has waited here until it was."""
        return self._returned.pop(lost, {})

    def sent_anew(self, id: bytes, attempt: int) -> None:
        """The call begins another attempt: what is yet to be heard of former ones does not count."""
        self.hops[id] = (attempt, 0), None

    def forget(self, entry: Entry) -> None:
        """The call has ended."""
        self.look_over(entry.place)
        self.hops.pop(entry.future.id, None)

    def on_table_changed(self) -> None:
        """Somebody may hold the store where calls that wait are to go."""
        for key in self.open:
            self.look_over(key)

    def on_lost(self, lost: Address, was_settled: bool) -> None:
        """The lost process may have had them in its hands: to pass on, or to answer.

        Calls that it was to pass on are like calls that it had, unless all was read that it had sent. Those that are elsewhere
        are asked after there, if it was the one to ask.
        """
        for key, crossing in list(self.open.items()):
            sent = [entry for entry in self._entries.values() if entry.place == key and entry.address is not None]
            for entry in sent:
                if not was_settled and self.hops.get(entry.future.id, _NO_HOPS)[1] == lost:
                    self._calls.move_on(entry, None)
            left = [entry.address for entry in sent if entry.address is not None]
            if not left:
                self._end(key)
                continue
            if crossing.source == lost:
                crossing.source = left[0]
            crossing.elsewhere = None
            self._ask(crossing)
