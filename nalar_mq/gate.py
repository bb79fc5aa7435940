"""Says to the broker who is let in, and as whom: the other end of its auth callout. What is presented stands in `identity`.

    token alone                                     a visitor
    token, user `client-...`, password              that client, if the name is free or was taken with the same password
    user, password made of the node key             that worker or controller
    anything else                                   refused, and logged

A name of a client is free if nobody has had it in this run, or who had it last has been gone for a lease: its record in
`NS-members` has expired. The names of a hundred thousand clients are remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import OrderedDict
from typing import Final

from nalar_mq.address import CLIENT_PREFIX, Subjects, is_client_name, is_token
from nalar_mq.config import LEASE_S
from nalar_mq.errors import BrokerAuthError, BrokerError, NalarError, WireError
from nalar_mq.event_loop import cancel_all
from nalar_mq.identity import role_of
from nalar_mq.logs import logger
from nalar_mq.nats_jwt import ConnectOptions, Issuer, read_request
from nalar_mq.permissions import Role, permissions_of
from nalar_mq.transport import Delivered, Subscription, Transport

REQUESTS: Final = "$SYS.REQ.USER.AUTH"
_REMEMBERED: Final = 100_000
_log = logger(__name__)


async def can_be(transport: Transport, subjects: Subjects, name: str) -> bool:
    """True if the credentials of a connection let it be process `name`: it may hear what is for that one.

    Raises:
        BrokerError: the broker does not answer.
    """
    try:
        subscription = await transport.subscribe(subjects.box(name, "*"), lambda _: None)
    except BrokerAuthError:
        return False
    await subscription.unsubscribe()
    return True


class Refused(NalarError):
    """Whoever connects is not let in; the text says why, to whoever runs the broker."""


class Gate:
    """Answers the broker from `start` to `aclose`.

    Args:
        transport: the connection of the gate, which may do all.
        subjects: of the namespace that permissions are for.
        issuer: signs the answers.
        token, node_key: see `identity`.
        lease_s: after which the record of a silent process goes.

    Attributes:
        granted, refused: how many were let in and how many not.
    """

    def __init__(
        self, transport: Transport, subjects: Subjects, issuer: Issuer, *, token: str, node_key: str, lease_s: float = LEASE_S
    ) -> None:
        self._transport = transport
        self._subjects = subjects
        self._issuer = issuer
        self._token = token
        self._node_key = node_key
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._holders: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._subscription: Subscription | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.granted = 0
        self.refused = 0

    async def start(self) -> None:
        """When it returns, others can connect."""
        self._subscription = await self._transport.subscribe(REQUESTS, self._on_request)

    async def aclose(self) -> None:
        """Lets nobody in any more; idempotent."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        await cancel_all(self._answering)

    def _on_request(self, message: Delivered) -> None:
        if message.subject == REQUESTS and message.reply and message.headers is None:  # else JetStream has passed it on
            task = self._loop.create_task(self._answer(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Delivered) -> None:
        try:
            request = read_request(message.data)
        except WireError as error:
            _log.warning("identity.request_unreadable", error=str(error))
            return
        name = request.presented.user
        try:
            name, role = await self.identify(request.presented)
            answer = self._issuer.grant(request, name, permissions_of(self._subjects, name, role))
            self.granted += 1
            _log.debug("identity.granted", process=name, role=role)
        except (Refused, BrokerError) as error:
            answer = self._issuer.refuse(request, str(error))
            self.refused += 1
            _log.warning("identity.refused", process=name[:140], reason=str(error))
        self._transport.publish(message.reply, answer)

    async def identify(self, presented: ConnectOptions) -> tuple[str, Role]:
        """Who that is.

        Raises:
            Refused: nobody who may come in.
            BrokerError: the members could not be read.
        """
        name = presented.user
        if presented.token:
            if not hmac.compare_digest(presented.token.encode(), self._token.encode()):
                raise Refused("the token is not that of this run")
            if not name:
                return Role.VISITOR.value, Role.VISITOR
            await self._take(name, hashlib.sha256(presented.password.encode()).digest())
            return name, Role.CLIENT
        role = role_of(self._node_key, name, presented.password) if is_token(name) else None
        if role is None:
            raise Refused("neither the token of this run nor credentials made of its node key")
        return name, role

    async def _take(self, name: str, secret: bytes) -> None:
        """Has the name of a client belong to whoever has `secret`."""
        if not is_client_name(name) or not is_token(name):
            raise Refused(f"the token is for names that begin with {CLIENT_PREFIX!r}")
        holder = self._holders.get(name)
        if holder is not None and not hmac.compare_digest(holder[0], secret) and not await self._is_free(name, holder[1]):
            raise Refused("another client has this name")
        self._holders[name] = secret, self._loop.time()
        self._holders.move_to_end(name)
        if len(self._holders) > _REMEMBERED:
            self._holders.popitem(last=False)

    async def _is_free(self, name: str, taken_at: float) -> bool:
        if self._loop.time() - taken_at < self._lease_s:
            return False
        members = await self._transport.key_value(self._subjects.members_bucket, ttl_s=self._lease_s)
        return await members.get(name) is None
