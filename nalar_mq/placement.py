"""Which process runs a call: the routing table and the choice from it. Pure: no I/O, no clock, randomness is handed in.

Calls of actors without state go to the replica with the shorter queue, of two chosen at random: close to the best choice at
the price of a few look-ups, and nobody has to be asked. How long a queue is, a caller works out from two things:

    in flight   the calls it has sent there itself and that have not ended; it always knows
    backlog     the calls of all others: what the worker last reported, less what the caller had in flight there then

Their sum is the reported length, plus what the caller has sent since, less what has come back since. It is never less than
what the caller has in flight, whatever a report that was long on its way says. Of two equal queues the one in the process
that reported less in all is taken. Reports of unknown processes and of former incarnations, and those that a later one has
overtaken, change nothing.

Workers that drain are not chosen, unless nobody else serves the actor: then what calls that have begun need is run there, until
they have said that they begin nothing any more.

Calls of a stateful actor go where the session is; the first one goes to the replica that ranks highest for the session's key
(rendezvous hashing), so that callers who begin at the same moment propose the same place.

What the global controller has decided comes first (`obey`): the instance of a session, then the shares of the instances of an
actor. Shares are kept by a sequence that spreads evenly (multiples of the golden ratio), each caller's from a point of its own,
so that also a few calls are divided as they should be; sessions that begin are divided by weighted rendezvous hashing. An
instance that is not there, drains, or has a share of nothing gets none; where no other is left, the actor has no shares.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from random import Random
from typing import Final, NamedTuple

import msgspec

from nalar_mq.actions import Route, State, Weights
from nalar_mq.address import Address
from nalar_mq.messages import ActorInfo, Load, Member

_NONE: Mapping[str, int] = {}
_GOLDEN: Final = (math.sqrt(5) - 1) / 2


class _Shares(NamedTuple):
    """Instances of an actor, their shares, and where in [0, 1) the part of each ends."""

    addresses: list[Address]
    weights: list[float]
    ends: list[float]
    reason: str


class RoutingTable:
    """Who serves what, as this process knows it.

    Attributes:
        version: grows with every change, so that a waiter can tell.
        is_governed: there are routes or shares.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._members: dict[str, Member] = {}
        self._replicas: dict[str, list[Address]] = {}
        self._leaving: dict[str, list[Address]] = {}
        self._infos: dict[str, ActorInfo] = {}
        self._last_infos: dict[str, ActorInfo] = {}
        self._holders: dict[str, Address] = {}
        self._buried: dict[str, int] = {}
        self._closing: set[Address] = set()
        self._reports: dict[str, Load] = {}
        self._backlog: dict[str, dict[str, int]] = {}
        self._busy: dict[str, int] = {}
        self._routes: dict[tuple[str, str], Route] = {}
        self._weights: dict[str, Weights] = {}
        self._shares: dict[str, _Shares] = {}
        self._point = random.random()
        self.is_governed = False
        self.version = 0

    @property
    def members(self) -> Mapping[str, Member]:
        """All live members by name."""
        return self._members

    def join(self, name: str, member: Member) -> Address | None:
        """Adds or replaces a member; returns the address of the former incarnation if there was another one.

        An incarnation that was lost stays lost here: its calls have been given to others.
        """
        if self._buried.get(name, -1) >= member.incarnation:
            return None
        former = self._members.get(name)
        if former is not None and former.incarnation > member.incarnation:
            return None
        self._members[name] = member
        self._rebuild()
        if former is not None and former.incarnation < member.incarnation:
            self._forget_load(name)
            return Address(name, former.incarnation)
        return None

    def drain(self, address: Address) -> bool:
        """Notes that a member takes no new calls, whatever its record says yet; True if that is new."""
        member = self._members.get(address.name)
        if member is None or member.incarnation != address.incarnation or member.draining:
            return False
        self._members[address.name] = msgspec.structs.replace(member, draining=True)
        self._rebuild()
        return True

    def close(self, address: Address) -> None:
        """Notes that a member which drains begins nothing any more."""
        if self.is_alive(address):
            self._closing.add(address)

    def leave(self, address: Address) -> bool:
        """Removes a member for good unless it is of a higher incarnation; True if it was there."""
        self._buried[address.name] = max(address.incarnation, self._buried.get(address.name, -1))
        member = self._members.get(address.name)
        if member is None or member.incarnation > address.incarnation:
            return False
        del self._members[address.name]
        self._rebuild()
        self._forget_load(address.name)
        return True

    def _rebuild(self) -> None:
        replicas: dict[str, list[Address]] = {}
        leaving: dict[str, list[Address]] = {}
        for name in sorted(self._members):
            member = self._members[name]
            for actor in member.actors:
                (leaving if member.draining else replicas).setdefault(actor, []).append(Address(name, member.incarnation))
        for actor, addresses in replicas.items():
            first = self._members[addresses[0].name].actors[actor]
            if first.max_instances is not None:
                # The longest-lived ones serve; everybody who has the same members leaves out the same others.
                addresses.sort(key=lambda address: (address.incarnation, address.name))
                del addresses[first.max_instances :]
        self._holders = {
            store: Address(name, member.incarnation)
            for name, member in self._members.items()
            for store in (*member.stores, *member.replicated)
        }
        self._closing = {address for address in self._closing if self.is_alive(address)}
        # Replaced, never changed: threads that make calls read them meanwhile.
        self._leaving = {actor: found for actor, found in leaving.items() if not replicas.get(actor)}
        served = (*replicas.items(), *self._leaving.items())
        self._infos = {actor: self._members[found[0].name].actors[actor] for actor, found in served if found}
        self._last_infos = {**self._last_infos, **self._infos}
        self._replicas = replicas
        self._divide()
        self.version += 1

    # What the global controller has decided.

    def obey(self, states: Iterable[State]) -> None:
        """Routes by these from now on, and by no others."""
        self._routes, self._weights = {}, {}
        for state in states:
            if isinstance(state, Route):
                self._routes[state.agent, state.session] = state
            elif isinstance(state, Weights):
                self._weights[state.agent] = state
        self.is_governed = bool(self._routes or self._weights)
        self._divide()

    def _divide(self) -> None:
        self._shares = {}
        for actor, weights in self._weights.items():
            wanted = {name: weight for name, weight in zip(weights.instances, weights.weights, strict=False) if weight > 0}
            addresses = [address for address in self._replicas.get(actor, ()) if address.name in wanted]
            if addresses:
                shares = [wanted[address.name] for address in addresses]
                ends = [end / sum(shares) for end in accumulate(shares)]
                self._shares[actor] = _Shares(addresses, shares, ends, weights.reason)

    def route_of(self, actor: str, session: str) -> tuple[Address, str] | None:
        """Where all calls of the session to the actor are to go, and why; None if that is not decided, or it is not there."""
        route = self._routes.get((actor, session))
        if route is None:
            return None
        address = next((found for found in self._replicas.get(actor, ()) if found.name == route.instance), None)
        return None if address is None else (address, route.reason)

    def ordered(self, actor: str, session: str) -> tuple[Address, str] | None:
        """Where the next call of the session to an actor without state is to go, and why; None if nobody has decided."""
        route = self.route_of(actor, session) if self._routes else None
        shares = self._shares.get(actor)
        if route is not None or shares is None:
            return route
        self._point = (self._point + _GOLDEN) % 1.0
        place = min(bisect_right(shares.ends, self._point), len(shares.addresses) - 1)
        return shares.addresses[place], shares.reason

    def is_shut(self, actor: str, name: str) -> bool:
        """True if the actor has shares, and process `name` has none of them."""
        shares = self._shares.get(actor)
        return shares is not None and all(address.name != name for address in shares.addresses)

    def is_alive(self, address: Address) -> bool:
        """True if that incarnation is a live member; draining ones are."""
        member = self._members.get(address.name)
        return member is not None and member.incarnation == address.incarnation

    def is_lost(self, address: Address) -> bool:
        """True if that incarnation has left, was lost or was replaced; False also for one that was never heard of."""
        member = self._members.get(address.name)
        is_replaced = member is not None and member.incarnation > address.incarnation
        return is_replaced or self._buried.get(address.name, -1) >= address.incarnation

    def holder(self, store: str) -> Address | None:
        """Who has that store of managed state open."""
        return self._holders.get(store)

    def store_of(self, address: Address, *, is_replicated: bool) -> str:
        """The store where that worker keeps new sessions; empty if it has none."""
        member = self._members.get(address.name)
        stores = () if member is None else member.replicated if is_replicated else member.stores
        return stores[0] if stores else ""

    def replicas(self, actor: str) -> list[Address]:
        """Where calls of the actor may go: everywhere it is served, up to its `max_instances`; empty if nowhere."""
        return self._replicas.get(actor, [])

    def info(self, actor: str) -> ActorInfo | None:
        """What the members tell of an actor, workers that are drained if no others serve it; any thread."""
        return self._infos.get(actor)

    def last_info(self, actor: str) -> ActorInfo | None:
        """What was last told of an actor, though perhaps nobody serves it any more; any thread."""
        return self._last_infos.get(actor)

    def kinds(self, actor: str) -> set[str]:
        """What an actor is to those who serve it, workers that are drained among them: one kind, unless two apps differ."""
        return {member.actors[actor].kind for member in self._members.values() if actor in member.actors}

    def known_actors(self) -> list[str]:
        """Names of all actors that somebody serves."""
        return sorted(self._replicas)

    def report(self, name: str, load: Load, in_flight: Mapping[str, Mapping[str, int]]) -> bool:
        """Notes what process `name` has in hand; False, and nothing is changed, if the report is late or nobody's.

        `in_flight` counts by actor and process name what this process has in flight.
        """
        member, former = self._members.get(name), self._reports.get(name)
        if member is None or member.incarnation != load.incarnation:
            return False
        if former is not None and former.number >= load.number:
            return False
        self._forget_load(name)
        self._reports[name] = load
        for actor, (queued, running) in load.actors.items():
            others = queued + running - in_flight.get(actor, _NONE).get(name, 0)
            if others > 0:
                self._backlog.setdefault(actor, {})[name] = others
        self._busy[name] = sum(queued + running for queued, running in load.actors.values())
        return True

    def busy(self, name: str) -> int:
        """Calls that the worker has in hand, as it last reported."""
        return self._busy.get(name, 0)

    def _forget_load(self, name: str) -> None:
        load = self._reports.pop(name, None)
        self._busy.pop(name, None)
        for actor in load.actors if load is not None else ():
            backlog = self._backlog.get(actor)
            if backlog is not None and backlog.pop(name, 0) and not backlog:
                del self._backlog[actor]

    def choose(self, actor: str, in_flight: Mapping[str, int]) -> Address | None:
        """The replica for a call without state; `in_flight` counts the actor's calls of this process by process name.

        None if nobody serves the actor; if only workers do that are drained, one of them that still begins something.
        """
        replicas = self._replicas.get(actor) or [one for one in self._leaving.get(actor, ()) if one not in self._closing]
        if not replicas:
            return None
        count = len(replicas)
        if count == 1:
            return replicas[0]
        first = int(self._random.random() * count)
        second = int(self._random.random() * (count - 1))
        if second >= first:
            second += 1
        one, other = replicas[first], replicas[second]
        backlog = self._backlog.get(actor, _NONE)
        here = in_flight.get(one.name, 0) + backlog.get(one.name, 0)
        there = in_flight.get(other.name, 0) + backlog.get(other.name, 0)
        if here == there:
            here, there = self._busy.get(one.name, 0), self._busy.get(other.name, 0)
        return one if here <= there else other

    def rank(self, actor: str, key: str, *, or_leaving: bool = False) -> Address | None:
        """The replica that ranks highest for `key`; the same at everybody who has the same members.

        If the session that `key` names (`places`) has a route it is that, and among replicas with shares the larger ones rank
        highest more often. With `or_leaving`, a worker that is drained if nobody else serves the actor.
        """
        if self._routes and (route := self.route_of(actor, key.partition(".")[2].partition(".")[0])) is not None:
            return route[0]
        if self._shares and (shares := self._shares.get(actor)) is not None:
            weighted = zip(shares.addresses, shares.weights, strict=True)
            return min(weighted, key=lambda pair: -math.log(_fraction(pair[0].name, key)) / pair[1])[0]
        replicas = self._replicas.get(actor) or (self._leaving.get(actor) if or_leaving else None)
        return max(replicas or (), key=lambda address: _weight(address.name, key), default=None)


def _weight(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}/{key}".encode(), digest_size=8).digest()


def _fraction(name: str, key: str) -> float:
    """Above 0 and at most 1; the same for the same arguments, and otherwise as if it were drawn."""
    return (int.from_bytes(_weight(name, key), "big") + 1) / (1 << 64)
