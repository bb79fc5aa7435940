"""A service over NATS, as the `nats micro` commands list, inspect and call it (ADR-32).

Each endpoint is a subject in the queue group `q`; `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` ask for what stands behind them,
of all services, of those of a name, or of one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from nalar_mq.errors import ValueTooLargeError
from nalar_mq.event_loop import cancel_all
from nalar_mq.nats_connection import NatsConnection
from nalar_mq.transport import Delivered, Handler, ServiceEndpoint, ServiceFailure, ServiceRequest, Subscription

# pyright: reportPrivateUsage=false


class NatsService:
    """Endpoints, and the answers to discovery that the `nats micro` commands ask for (ADR-32)."""

    def __init__(
        self, connection: NatsConnection, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str
    ) -> None:
        self._connection = connection
        self._identity: dict[str, Any] = {
            "name": name,
            "id": connection.client._nuid.next().decode(),
            "version": version,
            "metadata": {},
        }
        self._description = description
        self._endpoints = [_Endpoint(endpoint) for endpoint in endpoints]
        self._roots = {endpoint.subject.partition(".")[0] for endpoint in endpoints}
        self._started = datetime.now(UTC)
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens for requests and for discovery."""
        subscribe = self._connection.subscribe
        opening = [subscribe(one.subject, self._on_request(one), queue="q") for one in self._endpoints]
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            scopes = ("", f".{self._identity['name']}", f".{self._identity['name']}.{self._identity['id']}")
            opening.extend(subscribe(f"$SRV.{verb}{scope}", self._on_discovery(describe)) for scope in scopes)
        self._subscriptions.extend(await asyncio.gather(*opening))

    async def stop(self, patience_s: float | None = None) -> None:
        """Takes no more requests; cancels those that are not answered in time."""
        while self._subscriptions:
            await self._subscriptions.pop().unsubscribe()
        if self._tasks:
            limit_s = self._connection.request_timeout_s if patience_s is None else patience_s
            _, late = await asyncio.wait(self._tasks, timeout=limit_s)
            await cancel_all(late)

    def _on_request(self, endpoint: _Endpoint) -> Handler:
        def answer(message: Delivered) -> None:
            task = asyncio.create_task(self._answer(endpoint, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return answer

    async def _answer(self, endpoint: _Endpoint, message: Delivered) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        data, headers = await endpoint.handle(message)
        endpoint.busy_s += loop.time() - begun_s
        if not self._may_answer(message.reply):
            return
        try:
            self._connection.publish(message.reply, data, headers=headers)
        except ValueTooLargeError as error:
            self._connection.publish(message.reply, b"", headers=endpoint.failed(error))

    def _on_discovery(self, describe: Callable[[], dict[str, Any]]) -> Handler:
        def answer(message: Delivered) -> None:
            if self._may_answer(message.reply):
                self._connection.publish(message.reply, json.dumps(describe()).encode())

        return answer

    def _may_answer(self, reply: str) -> bool:
        """An answer leaves under our name: it goes to no subject that means something to the broker or to our own kind."""
        return bool(reply) and not reply.startswith("$") and reply.partition(".")[0] not in self._roots

    def _ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response", **self._identity}

    def _info(self) -> dict[str, Any]:
        endpoints = [endpoint.described() for endpoint in self._endpoints]
        return {
            "type": "io.nats.micro.v1.info_response",
            **self._identity,
            "description": self._description,
            "endpoints": endpoints,
        }

    def _stats(self) -> dict[str, Any]:
        started = self._started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        endpoints = [endpoint.stats() for endpoint in self._endpoints]
        return {"type": "io.nats.micro.v1.stats_response", **self._identity, "started": started, "endpoints": endpoints}


class _Endpoint:
    """One subject of a service and its counters."""

    def __init__(self, endpoint: ServiceEndpoint) -> None:
        self.subject = endpoint.subject
        self.busy_s = 0.0
        self._endpoint = endpoint
        self._requests = 0
        self._errors = 0
        self._last_error = ""

    async def handle(self, message: Delivered) -> tuple[bytes, dict[str, str] | None]:
        """The answer to a request: its bytes, and the headers of a failure."""
        self._requests += 1
        try:
            request = ServiceRequest(message.subject, message.data, message.headers or {})
            return await self._endpoint.handler(request), None
        except Exception as error:
            return b"", self.failed(error)

    def failed(self, error: Exception) -> dict[str, str]:
        """Counts a failure; returns the headers that tell of it."""
        code, text = (error.code, error.description) if isinstance(error, ServiceFailure) else (500, str(error) or repr(error))
        self._errors += 1
        self._last_error = f"{code}:{text}"
        return {"Nats-Service-Error": text, "Nats-Service-Error-Code": str(code)}

    def described(self) -> dict[str, Any]:
        return {
            "name": self._endpoint.name,
            "subject": self.subject,
            "queue_group": "q",
            "metadata": dict(self._endpoint.metadata),
        }

    def stats(self) -> dict[str, Any]:
        busy_ns = int(self.busy_s * 1e9)
        return {
            "name": self._endpoint.name,
            "subject": self.subject,
            "queue_group": "q",
            "num_requests": self._requests,
            "num_errors": self._errors,
            "last_error": self._last_error,
            "processing_time": busy_ns,
            "average_processing_time": busy_ns // max(self._requests, 1),
        }
