"""Nodes that report to a global controller as workers do, over a real broker; no calls run on them.

Driven by lines on its standard input, each answered by one line: how many reports are ready and not sent.

    load       every future begins; reports are ready to be sent
    change     a thirtieth of the futures each end, begin, and begin to run; reports are ready to be sent
    publish    what is ready is sent, up to a bound of what a broker holds back for a slow reader, and the broker has it
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

from nalar_mq import event_loop
from nalar_mq.address import Subjects
from nalar_mq.changes import Changes, Tracked
from nalar_mq.columns import DONE, QUEUED, RUNNING, WAITING, Serves
from nalar_mq.config import BrokerAccess
from nalar_mq.messages import Call
from nalar_mq.nats_transport import NatsTransport

_SHARE = 30
_SESSION = 8  # futures of a session on two nodes together
_HEAD_BYTES = 64 * 1024
_AT_ONCE_BYTES = 16 * 1024 * 1024


class Node:
    """One node: agents, and so many live futures of them."""

    def __init__(self, number: int, agents: list[str], futures: int, seed: int) -> None:
        self.name = f"node-{number}"
        self.changes = Changes(self.name, 1, self.name)
        self.changes.set_serves({agent: Serves("agent", concurrency=32) for agent in agents})
        self._number = number
        self._agents = agents
        self._futures = futures
        self._random = random.Random(seed * 1000 + number)
        self._live: list[Tracked] = []
        self._made = 0
        self._parent = b""

    def load(self, now: float) -> None:
        """All its futures begin."""
        for _ in range(self._futures):
            self._begin(now)

    def change(self, now: float) -> None:
        """A tenth of them changes."""
        pick, live = self._random.randrange, self._live
        for _ in range(-(-self._futures // _SHARE)):
            place = pick(len(live))
            future, live[place] = live[place], live[-1]
            live.pop()
            self.changes.end(future, DONE, now)
            self._begin(now)
            self.changes.change(live[pick(len(live))], RUNNING, now)
        queued = sum(future.state == QUEUED for future in live[:100])
        self.changes.set_queues(dict.fromkeys(self._agents, (queued, 32)))

    def _begin(self, now: float) -> None:
        self._made += 1
        place = self._made % (_SESSION // 2)
        session = f"s{self._made // (_SESSION // 2)}-{self._number // 2}"
        id = self._random.randbytes(16)
        if not place:
            self._parent = id
        agent = self._agents[place % len(self._agents)]
        call = Call(id, agent, "run", b"", session=session, parent=self._parent if place else b"", timeout_s=600.0)
        self._live.append(self.changes.begin(call, now, QUEUED if place else WAITING, f"tenant-{self._made % 5}"))


async def main() -> None:
    """Follows the lines until they end."""
    loop = asyncio.get_running_loop()
    plan = json.loads(sys.stdin.readline())
    access = BrokerAccess(urls=tuple(plan["urls"]), token=plan["token"])
    subjects = Subjects(plan["namespace"])
    nodes = [Node(number, agents, plan["futures"], plan["seed"]) for number, agents in plan["nodes"]]
    transport = await NatsTransport.connect(access, name=f"nodes-{plan['nodes'][0][0]}")
    ready: list[tuple[str, bytes]] = []
    try:
        while command := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            if command == "publish":
                room = _AT_ONCE_BYTES
                while ready and room > 0:
                    subject, data = ready.pop()
                    transport.publish(subject, data)
                    room -= len(data)
                await transport.flush()
            else:
                for node in nodes:
                    (node.load if command == "load" else node.change)(loop.time())
                limit = transport.max_payload - _HEAD_BYTES
                ready = [(subjects.report(n.name), data) for n in nodes for data in n.changes.reports(loop.time(), limit)]
                ready.reverse()
            print(json.dumps({"reports": len(ready)}), flush=True)
    finally:
        await transport.aclose()


if __name__ == "__main__":
    event_loop.run(main())
