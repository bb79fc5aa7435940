"""Which actors each worker of a node serves at first, where the node's capacities are told. Pure.

Actors that reserve nothing are served by all workers. Of the others each gets its least number of instances, whatever is left
for them; then they get one more in turn, in the order of their names, while the capacities hold it and they have not as many as
they may have. An instance goes to the worker that has the fewest of such actors. A resource of which no capacity is told is not
reserved. Every worker of the node comes to the same, from its app and its place among the workers. One that is added later
serves the actor that it was added for, and those that reserve nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from nalar_mq.columns import Serves


def assigned(actors: Mapping[str, Serves], place: int, workers: int, capacities: Mapping[str, float]) -> frozenset[str]:
    """The actors that worker number `place` of so many serves; the first one is number 0."""
    plan = _Plan(actors, workers, capacities)
    return frozenset(actor for actor in actors if actor not in plan.instances or place in plan.instances[actor])


def added(actors: Mapping[str, Serves], agent: str, capacities: Mapping[str, float]) -> frozenset[str]:
    """The actors that a worker serves which is added for `agent`."""
    free = {name for name, serves in actors.items() if not serves.resources.keys() & capacities.keys()}
    return frozenset(free | ({agent} & actors.keys()))


class _Plan:
    """The instances of all actors that reserve something, by the numbers of their workers."""

    def __init__(self, actors: Mapping[str, Serves], workers: int, capacities: Mapping[str, float]) -> None:
        self._actors = actors
        self._workers = workers
        self._left = dict(capacities)
        self._loads = [0] * workers
        names = sorted(actor for actor, serves in actors.items() if serves.resources.keys() & capacities.keys())
        self.instances: dict[str, list[int]] = {actor: [] for actor in names}
        for turn in range(workers):
            for actor in names:
                if turn < actors[actor].min_instances:
                    self._add(actor)
        while sum(self._fits(actor) and self._add(actor) for actor in names):
            pass  # each of them had its turn

    def _fits(self, actor: str) -> bool:
        serves = self._actors[actor]
        has_room = all(amount <= self._left.get(name, amount) + 1e-9 for name, amount in serves.resources.items())
        return has_room and (serves.max_instances is None or len(self.instances[actor]) < serves.max_instances)

    def _add(self, actor: str) -> bool:
        """False if every worker has it."""
        free = [place for place in range(self._workers) if place not in self.instances[actor]]
        if not free:
            return False
        place = min(free, key=lambda place: (self._loads[place], place))
        self.instances[actor].append(place)
        self._loads[place] += 1
        for name, amount in self._actors[actor].resources.items():
            if name in self._left:
                self._left[name] -= amount
        return True
