"""The embedded broker with a gate: each process speaks in its own name only, and what they keep there is laid out for them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import msgspec

from nalar_mq.address import Subjects
from nalar_mq.broker import EmbeddedBroker
from nalar_mq.config import LEASE_S, BrokerAccess
from nalar_mq.gate import Gate
from nalar_mq.identity import new_secret
from nalar_mq.nats_jwt import Issuer
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.streams import lay_out


class GuardedBroker:
    """A broker of our own for one namespace; an async context manager.

    Args:
        data_dir, port, needs_port: as for `EmbeddedBroker`.
        namespace: whose permissions it gives.
        lease_s: after which the record of a silent process goes.
        token, node_key: the secrets of a former one whose processes are to come back; made anew if empty.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        namespace: str,
        port: int | None = None,
        needs_port: bool = True,
        lease_s: float = LEASE_S,
        token: str = "",
        node_key: str = "",
    ) -> None:
        self._issuer = Issuer()
        self._token = token or new_secret()
        self._node_key = node_key or new_secret()
        self._subjects = Subjects(namespace)
        self._lease_s = lease_s
        self._stack = AsyncExitStack()
        self.server = EmbeddedBroker(data_dir, port=port, needs_port=needs_port, issuer=self._issuer.public)

    @property
    def client_access(self) -> BrokerAccess:
        """For whoever may use the runtime."""
        return BrokerAccess(urls=(self.server.url,), token=self._token, data_dir=str(self.server.data_dir))

    @property
    def node_access(self) -> BrokerAccess:
        """For whoever starts workers and controllers, each with the access that `identity.issued` makes of it."""
        return msgspec.structs.replace(self.client_access, node_key=self._node_key)

    async def __aenter__(self) -> Self:
        """Returns when others can connect and find everything.

        Raises:
            BrokerStartError: the server does not start.
        """
        try:
            await self._stack.enter_async_context(self.server)
            transport = await self._stack.enter_async_context(await NatsTransport.connect(self.server.access, name="gate"))
            gate = Gate(
                transport,
                self._subjects,
                self._issuer,
                token=self._token,
                node_key=self._node_key,
                lease_s=self._lease_s,
            )
            await gate.start()
            self._stack.push_async_callback(gate.aclose)
            await lay_out(transport, self._subjects, self._lease_s)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
