"""A global controller over worker processes, and what tests have it decide."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from nalar_mq.address import Address, Subjects
from nalar_mq.client import Client
from nalar_mq.config import BrokerAccess
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.guards import Bounds
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.policy import Action, Policy
from nalar_mq.controllers.view import View
from nalar_mq.nats_transport import NatsTransport


class Mind:
    """A policy that wants what it is told to want."""

    def __init__(self) -> None:
        self.wanted: tuple[Action, ...] = ()

    def decide(self, view: View) -> Iterable[Action]:
        return self.wanted


@asynccontextmanager
async def controller_of(
    access: BrokerAccess, namespace: str, policy: Policy, *, lease_s: float, bounds: Bounds | None = None
) -> AsyncIterator[GlobalController]:
    """A global controller in this process, with a connection of its own."""
    async with (
        await NatsTransport.connect(access, name="control") as transport,
        GlobalController(
            transport,
            Subjects(namespace),
            Address("control", 1),
            Trusted(policy),
            lease_s=lease_s,
            bounds=bounds,
        ) as controller,
    ):
        yield controller


class ControlledSite:
    """Workers whose app writes into a folder and waits for gates there, a client, and a controller."""

    def __init__(self, folder: Path, node: LocalController, client: Client, controller: GlobalController, mind: Policy) -> None:
        self.folder = folder
        self.node = node
        self.client = client
        self.controller = controller
        self.mind = mind

    def open(self, gate: str) -> None:
        (self.folder / gate).touch()

    def written(self, name: str) -> list[str]:
        """What the app has written there, word by word."""
        path = self.folder / name
        return path.read_text().split() if path.exists() else []
