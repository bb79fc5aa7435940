"""Whom the calls of a process hand on the messages that are for others in it: a worker has all of these, a client none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from nalar_mq.address import Address
from nalar_mq.history import History
from nalar_mq.messages import (
    Accepted,
    Bequest,
    Call,
    CallRecord,
    Cancel,
    Consume,
    Credit,
    Crossing,
    Drain,
    Explanation,
    Fail,
    Forward,
    Locate,
    Located,
    Message,
    Migrate,
    Piece,
    Prioritise,
    Probe,
    Resolve,
    Settled,
    Taken,
)


class Host(Protocol):
    """The part of a worker that runs calls."""

    def refusal(self, actor: str) -> str:
        """Why sessions of that agent can neither leave nor come; empty if they can."""
        ...

    def on_call(self, owner: Address, call: Call, now: float) -> None:
        """A call has arrived at `now`."""
        ...

    def on_cancel(self, owner: Address, cancel: Cancel) -> None:
        """Its owner does not want it any more."""
        ...

    def on_consume(self, owner: Address, consume: Consume) -> None:
        """Its result is to be pushed to one more process."""
        ...

    def on_credit(self, owner: Address, credit: Credit) -> None:
        """Its owner takes more pieces of its stream."""
        ...

    def on_prioritise(self, owner: Address, message: Prioritise) -> None:
        """Its owner has given it another priority."""
        ...

    def on_pushed(self, message: Resolve | Fail) -> None:
        """A value that a queued call depends on, or may soon."""
        ...

    def on_probe(self, probe: Probe) -> None:
        """Somebody looks for a circle of waiting calls."""
        ...

    def on_owner_lost(self, owner: Address) -> None:
        """Nobody is left who wants that process's calls."""
        ...

    def label_of(self, id: bytes) -> str:
        """The actor, and its method, of a call that runs here; empty if it does not."""
        ...

    def may_begin(self) -> bool:
        """False while others may hold this process to be lost: it begins nothing then."""
        ...

    def is_waiting(self, id: bytes) -> bool:
        """True if the call runs here and waits for others."""
        ...

    def take_forwarded(self, forward: Forward) -> None:
        """A call that another worker had before."""
        ...

    def explain(self, id: bytes) -> list[Explanation]:
        """What was decided here about a call."""
        ...

    def on_standstill(self, history: History) -> None:
        """A workflow that repeats a job waits, and does not do what it did before."""
        ...

    def mute(self) -> None:
        """What calls of jobs come to here is no answer to anybody any more."""
        ...

    def on_settled(self, owner: Address, settled: Settled) -> None:
        """The outcome of a call of a job is durable."""
        ...

    @property
    def completed(self) -> int:
        """Calls that have been run to their end."""
        ...

    def load(self) -> dict[str, tuple[int, int]]:
        """Queued and running calls by actor; those without any are left out."""
        ...

    def records(self) -> list[CallRecord]:
        """Calls that have not ended, and the last ones that have."""
        ...


class Resumption(Protocol):
    """The part of a process that knows of the former attempts at a job."""

    def on_locate(self, sender: Address, locate: Locate) -> None:
        """Somebody goes on with jobs of which calls may be here."""
        ...

    def on_located(self, sender: Address, located: Located) -> None:
        """A worker has answered."""
        ...


class Migrating(Protocol):
    """The part of a worker that moves sessions."""

    def on_migrate(self, asker: Address, order: Migrate) -> None:
        """Somebody wants a session to move."""
        ...

    def on_piece(self, source: Address, piece: Piece) -> None:
        """A part of a session that another worker sends here."""
        ...

    def on_taken(self, taken: Taken) -> None:
        """The other worker has a part, or refuses the session."""
        ...

    def on_thaw(self, id: bytes) -> None:
        """The session is served here from now on."""
        ...

    def on_abandon(self, id: bytes) -> None:
        """The session stays where it was."""
        ...

    def on_forward(self, forward: Forward) -> None:
        """A call that came to where its session was before."""
        ...

    def on_crossing(self, crossing: Crossing) -> None:
        """An owner wants to know when all that it has sent is where the session is."""
        ...

    def on_lost(self, address: Address, given_back: Iterable[Message]) -> None:
        """That process is gone; it may not have had the messages that are given back."""
        ...

    def on_table_changed(self) -> None:
        """The routing table has changed."""
        ...


class Draining(Protocol):
    """The part of a worker that leaves, or goes on with what others leave."""

    def on_drain(self, asker: Address, order: Drain) -> None:
        """Somebody wants this worker to move all it has elsewhere, and to end."""
        ...

    def on_bequest(self, sender: Address, bequest: Bequest) -> None:
        """A worker that drains has a store to give away."""
        ...

    def on_accepted(self, accepted: Accepted) -> None:
        """Another worker goes on with a store, or refuses to."""
        ...
