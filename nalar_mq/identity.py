"""Who a process is at the broker: what it presents when it connects, and who may have which name.

The embedded broker lets each process speak in its own name only (`permissions`). Three secrets of one run make that so. If it
is killed, the next one in its place goes on with the first two, which lie there still, and its processes come back:

    token       in `.nalar/runtime.json`: for whoever may use the runtime. Alone it makes a visitor. A client presents it with
                its name and a secret of its own: a name that begins with `client-` belongs to whoever came with it first, for
                as long as that one lives.
    node key    in `.nalar/node.key`: for who starts workers and controllers, `nalar worker` and `nalar controller`. What they
                hand to a process is made of the key and of its name and role, and is worth nothing under another one.
    gate        never leaves the process that embeds the broker, and may do all.

    process ──CONNECT: user, password, token──▶ broker ──request──▶ gate ──permissions, signed──▶ broker ──PONG──▶ process

The broker decides nothing itself: it asks the gate (`gate`) at each connection, by what NATS calls an auth callout, and lets in
with the permissions in the answer. A broker that is started again asks the same gate, so whoever was known is known again.

At a broker that only knows one token the rest of what a client presents says nothing, and every name is a claim.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

import msgspec

from nalar_mq.address import is_client_name
from nalar_mq.config import BrokerAccess
from nalar_mq.permissions import Role

_ISSUED: Final = (Role.WORKER, Role.CONTROLLER)


def new_secret() -> str:
    """Text that nobody can guess."""
    return secrets.token_hex(24)


def password_of(node_key: str, name: str, role: Role) -> str:
    """What process `name` presents as its password in that role."""
    return hmac.new(node_key.encode(), f"{role}:{name}".encode(), hashlib.sha256).hexdigest()


def issued(access: BrokerAccess, name: str, role: Role) -> BrokerAccess:
    """The access of one worker or controller, to be handed to it by whoever has the node key.

    Without a key it is what it was: such a broker knows no names, or `access` is that of an operator who has seen to it.
    """
    if not access.node_key:
        return access
    password = password_of(access.node_key, name, role)
    return msgspec.structs.replace(access, user=name, password=password, token="", node_key="")


def presented(access: BrokerAccess, name: str, secret: str) -> BrokerAccess:
    """The access of a client that has a token: its name and a secret of its own go with it."""
    if not access.token or access.user or access.creds_file or access.nkey_seed_file:
        return access
    return msgspec.structs.replace(access, user=name, password=secret)


def role_of(node_key: str, name: str, password: str) -> Role | None:
    """The role that `issued` made this password for; None if it did not, or the name is one of a client."""
    if is_client_name(name):
        return None
    given = password.encode()
    return next((role for role in _ISSUED if hmac.compare_digest(password_of(node_key, name, role).encode(), given)), None)
