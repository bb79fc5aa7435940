"""What nodes tell of workers that keep ending, and for how long it is there."""

from __future__ import annotations

import asyncio

from nalar_mq import simulation
from nalar_mq.address import Subjects
from nalar_mq.controllers.crash_reports import CrashRow, read_crashes, tell_crashes
from nalar_mq.event_loop import cancel_all
from nalar_mq.memory_transport import MemoryHub

SUBJECTS = Subjects("test")
LEASE_S = 3.0


class Node:
    """Workers that have ended as often as is said."""

    def __init__(self) -> None:
        self.rows: dict[str, CrashRow] = {}

    def crashes(self) -> dict[str, CrashRow]:
        return self.rows


def test_it_is_told_until_all_is_calm_and_goes_with_its_node() -> None:
    simulation.run(one_calms_down_and_one_is_killed())


def test_an_entry_that_cannot_be_read_hides_no_other() -> None:
    simulation.run(somebody_writes_nonsense())


async def one_calms_down_and_one_is_killed() -> None:
    hub, calm, killed = MemoryHub(1), Node(), Node()
    calm.rows = {"a-1": CrashRow("waiting", 3, 20.0, 1.0, "line\n  and line")}
    killed.rows = {"b-1": CrashRow("ready", 1, 5.0, 5.0, "why")}
    asker = await hub.connect("asker")
    telling = [
        asyncio.create_task(tell_crashes(await hub.connect(name), SUBJECTS, name, node, LEASE_S))
        for name, node in (("a", calm), ("b", killed))
    ]
    await asyncio.sleep(2 * LEASE_S)
    told = await read_crashes(asker, SUBJECTS, LEASE_S)
    assert told == {"a": {"a-1": CrashRow("waiting", 3, 20.0, 1.0, "line and line")}, "b": killed.rows}
    calm.rows = {}
    await asyncio.sleep(LEASE_S / 2)
    assert telling[0].done() and (await read_crashes(asker, SUBJECTS, LEASE_S)).keys() == {"b"}
    hub.kill("b")
    await cancel_all(telling[1:])
    await asyncio.sleep(2 * LEASE_S)
    assert await read_crashes(asker, SUBJECTS, LEASE_S) == {}


async def somebody_writes_nonsense() -> None:
    hub, node = MemoryHub(1), Node()
    node.rows = {"a-1": CrashRow("waiting", 3, 20.0, 1.0, "why")}
    asker = await hub.connect("asker")
    bucket = await asker.key_value(SUBJECTS.nodes_bucket, ttl_s=LEASE_S)
    telling = asyncio.create_task(tell_crashes(await hub.connect("a"), SUBJECTS, "a", node, LEASE_S))
    for key, value in (("x", b"{"), ("y", b"[1]"), ("z", b'{"w": {"state": 5}}')):
        await bucket.put(key, value)
    await asyncio.sleep(LEASE_S / 4)
    assert (await read_crashes(asker, SUBJECTS, LEASE_S)).keys() == {"a"}
    await cancel_all([telling])


def test_one_line_says_it_all() -> None:
    often = CrashRow("waiting", 7, 83.4, 2.0, "it ended with code 1 while it served")
    assert often.describe() == "has ended 7 times within 83 s, is waiting now: it ended with code 1 while it served"
    assert CrashRow("ready", 1, 5.0, 5.0, "why").describe() == "has ended once, 5 s ago, is ready now: why"
