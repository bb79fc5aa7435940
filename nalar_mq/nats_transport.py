"""`Transport` over NATS: a connection, and what is opened over it.

    nats_key_value    buckets with watches        nats_objects    object stores
    nats_streams      work queues and ledgers     nats_service    services
    nats_connection   publish, subscribe, request
    nats_client       nats-py with a data path of our own; nats_reader: what arrives
    nats_errors       what goes wrong

Only these modules know nats-py, and only through this one does anything else reach them.
"""

from __future__ import annotations

import contextlib

from nalar_mq.errors import BrokerError
from nalar_mq.nats_client import NatsClient
from nalar_mq.nats_connection import NatsConnection
from nalar_mq.nats_key_value import open_bucket
from nalar_mq.nats_objects import open_object_store
from nalar_mq.nats_service import NatsService
from nalar_mq.nats_streams import open_ledger, open_work_queue
from nalar_mq.transport import KeyValue, Ledger, ObjectStore, Service, ServiceEndpoint, WorkQueue


class NatsTransport(NatsConnection):
    """The connection of one process to a NATS server; made by `connect`. See `Transport` for what it promises."""

    def __init__(self, client: NatsClient, request_timeout_s: float) -> None:
        super().__init__(client, request_timeout_s)
        self._services: list[NatsService] = []

    async def key_value(self, bucket: str, *, ttl_s: float | None = None) -> KeyValue:
        """Opens a bucket, creating it where it does not exist; one that exists is used as it is, whatever its ttl."""
        return await open_bucket(self, bucket, ttl_s)

    async def work_queue(self, name: str, subjects: list[str]) -> WorkQueue:
        """Opens a durable queue over subject filters, creating it where it does not exist, adding filters it lacks."""
        return await open_work_queue(self, name, subjects)

    async def ledger(
        self, name: str, subjects: list[str], *, max_age_s: float | None = None, per_subject: int | None = None
    ) -> Ledger:
        """Opens a ledger over subject filters, creating it where it does not exist; one that exists is used as it is."""
        return await open_ledger(self, name, subjects, max_age_s, per_subject)

    async def object_store(self, bucket: str, *, max_age_s: float | None = None) -> ObjectStore:
        """Opens an object store, creating it where it does not exist."""
        return await open_object_store(self, bucket, max_age_s)

    async def serve(self, name: str, endpoints: list[ServiceEndpoint], *, version: str, description: str = "") -> Service:
        """Runs a service that the `nats micro` commands can list, inspect and call; requests are handled at once."""
        service = NatsService(self, name, endpoints, version=version, description=description)
        self._services.append(service)
        try:
            await service.start()
        except BaseException:
            await service.stop()
            raise
        return service

    async def aclose(self) -> None:
        """Ends what is served, sends what is pending and closes; idempotent."""
        if not self.is_closed:
            for service in self._services:
                with contextlib.suppress(BrokerError):
                    await service.stop()
        await super().aclose()
