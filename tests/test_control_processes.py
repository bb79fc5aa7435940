"""Worker processes, a real broker and a global controller: what a policy wants is so."""

from __future__ import annotations

import asyncio
from pathlib import Path

from controlled import Mind, controller_of
from waiting import PATIENCE_S, until

from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.policy import allow, kill, provision, route
from nalar_mq.errors import NotAllowedError

APP = Path(__file__).parent / "apps" / "governed_app.py"


async def test_worker_processes_report_and_obey(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=6.0, state=str(tmp_path))
    mind = Mind()
    async with (
        LocalController(APP, settings, workers=2) as node,
        controller_of(broker_access, namespace, mind, lease_s=6.0) as controller,
        connect(settings=settings) as client,
    ):
        await node.ready()
        view = controller.view
        await until(lambda: len(view.replicas("where")) == 2, "both workers report")
        await until(lambda: view.nodes["here"].resources.keys() >= {"cpu", "memory_gb"}, "they tell of their machine")
        second = node.pids["here-2"]
        mind.wanted = (route("where", ["here-2"], [1.0]),)

        async def all_there() -> bool:
            return {await client.call("where") for _ in range(20)} == {second}

        async with asyncio.timeout(PATIENCE_S):
            while not await all_there():
                await asyncio.sleep(0.05)
        mind.wanted = (kill("here-2", "where"),)
        await until(lambda: [replica.worker for replica in view.replicas("where")] == ["here-1"], "it is served by one")
        assert {await client.call("where") for _ in range(20)} == {node.pids["here-1"]}
        mind.wanted = (provision("where", "here"), allow("where", callers=["nobody"]))
        await until(lambda: len(view.replicas("where")) == 2, "it is served by both again")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await client.call("where")
                except NotAllowedError:
                    break
                await asyncio.sleep(0.05)


async def test_places_of_one_agent_go_to_another_while_both_are_called(
    broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=6.0, state=str(tmp_path))
    mind = Mind()
    async with (
        LocalController(APP, settings, workers=4, capacities={"slot": 4}) as node,
        controller_of(broker_access, namespace, mind, lease_s=6.0) as controller,
        connect(settings=settings) as client,
    ):
        await node.ready()
        view = controller.view

        def served() -> tuple[int, int]:
            return len(view.replicas("left")), len(view.replicas("right"))

        await until(lambda: served() == (2, 2) and len(view.replicas("where")) == 4, "the slots are shared out")
        pids: dict[str, set[int]] = {"left": set(), "right": set()}
        is_over = False

        async def work(actor: str) -> None:
            while not is_over:
                pids[actor].add(await client.call(actor))

        working = [asyncio.create_task(work(actor)) for actor in ("left", "right") * 4]
        await until(lambda: all(len(found) == 2 for found in pids.values()), "each of two processes is called")
        mind.wanted = (provision("right", "here"),)
        await until(lambda: controller.governor.history, "it is decided")
        assert "has 0 of slot left" in str(controller.governor.history[-1].refusals)
        mind.wanted = (kill("here-1", "left"), provision("right", "here"))
        await until(lambda: served() == (1, 3), "a slot changes hands")
        pids["left"].clear()
        await until(lambda: len(pids["right"]) == 3 and pids["left"], "all of them are called")
        is_over = True
        await asyncio.gather(*working)
        assert node.pids["here-1"] in pids["right"]
        assert len(pids["left"]) == 1
