"""The few tokens of NATS that an auth callout takes: what the broker asks, and what it is answered, signed. Pure.

    request     header.claims.signature of the broker, over a subject that only the broker can publish to
    answer      header.claims.signature of the issuer, whose public key stands in the broker's configuration

Claims are JSON, signatures Ed25519 over `header.claims`, all three in base64 for URLs without padding; keys are nkeys (ADR-26).
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import msgspec

from nalar_mq.errors import MalformedMessageError
from nalar_mq.permissions import Permissions

ACCOUNT: Final = "$G"  # of a server that has no accounts in its configuration
_HEADER: Final = b'{"typ":"JWT","alg":"ed25519-nkey"}'
_NO_LIMITS: Final = {"subs": -1, "data": -1, "payload": -1}


class ConnectOptions(msgspec.Struct, frozen=True):
    """What somebody presents who connects."""

    user: str = ""
    password: str = msgspec.field(name="pass", default="")
    token: str = msgspec.field(name="auth_token", default="")

    def __repr__(self) -> str:
        return f"ConnectOptions(user={self.user!r})"


class _Server(msgspec.Struct, frozen=True):
    id: str


class _Asked(msgspec.Struct, frozen=True):
    server_id: _Server
    user_nkey: str
    connect_opts: ConnectOptions = ConnectOptions()


class _Claims(msgspec.Struct, frozen=True):
    nats: _Asked


class Request(msgspec.Struct, frozen=True):
    """What the broker wants to know.

    Attributes:
        server: id of the broker.
        user: a key that the broker has made for this connection.
        presented: by whoever connects.
    """

    server: str
    user: str
    presented: ConnectOptions


def read_request(data: bytes) -> Request:
    """What the broker asks; who signed it is not looked at: the subject it came on is closed to all others.

    Raises:
        MalformedMessageError: it makes no sense.
    """
    try:
        _, claims, _ = data.split(b".")
        asked = msgspec.json.decode(base64.urlsafe_b64decode(claims + b"=="), type=_Claims).nats
    except (ValueError, msgspec.MsgspecError) as error:
        raise MalformedMessageError(f"not an authorization request: {error}") from None
    return Request(asked.server_id.id, asked.user_nkey, asked.connect_opts)


class Issuer:
    """A key that signs answers; it lives as long as this object."""

    def __init__(self) -> None:
        # It takes long to load, only who embeds a broker signs, and it has no types.
        nkeys: Any = import_module("nkeys")
        self._key: Any = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT))
        self.public: str = self._key.public_key.decode()

    def grant(self, request: Request, name: str, granted: Permissions) -> bytes:
        """The answer that lets somebody in as `name`, with these permissions."""
        allowed = {"pub": {"allow": granted.publish}, "sub": {"allow": granted.subscribe}}
        user = self._token(request.user, ACCOUNT, {**allowed, **_NO_LIMITS, "type": "user"}, name)
        return self._answer(request, {"jwt": user.decode()})

    def refuse(self, request: Request, reason: str) -> bytes:
        """The answer that lets nobody in; the broker writes `reason` into its log."""
        return self._answer(request, {"error": reason})

    def _answer(self, request: Request, said: Mapping[str, str]) -> bytes:
        return self._token(request.user, request.server, {**said, "type": "authorization_response"})

    def _token(self, subject: str, audience: str, claims: Mapping[str, Any], name: str = "") -> bytes:
        body = msgspec.json.encode(
            {
                "jti": os.urandom(16).hex(),
                "iat": int(time.time()),
                "iss": self.public,
                "sub": subject,
                "aud": audience,
                "name": name,
                "nats": {**claims, "version": 2},
            }
        )
        signed = _encoded(_HEADER) + b"." + _encoded(body)
        return signed + b"." + _encoded(self._key.sign(signed))


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
