"""What goes wrong with a NATS server, in our errors: what nats-py raises, and the names that no server would take.

An error says what can be done about it, and shows URLs without their secrets. JetStream tells its errors apart by numbers:
those that several modules know stand here.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

from nalar_mq.config import BrokerAccess
from nalar_mq.errors import (
    AddressError,
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    BrokerFullError,
    BrokerTimeoutError,
    BrokerUnreachableError,
)
from nalar_mq.stand_in import loaded_when_used

with loaded_when_used("aiohttp"):
    import nats.errors
    import nats.js.errors

WRONG_REVISION: Final = (10071, 10164)
NO_STREAM: Final = 10059
_NO_JETSTREAM: Final = (10039, 10076)
_NOT_YET: Final = 10008
_NO_ROOM: Final = (10002, 10023, 10028, 10047, 10077, 10122)
_DISK_FULL: Final = "no space left on device"

_SUBJECT = re.compile(r"[^\s.]+(\.[^\s.]+)*")
_BUCKET = re.compile(r"[A-Za-z0-9_-]+")


def connect_error(url: str, error: Exception, access: BrokerAccess) -> BrokerError:
    """What nats-py raised while it connected to `url`, as one of ours."""
    where = shown(url)
    text = str(error).removeprefix("nats: ").strip("'\" ")
    if "authentication timeout" in text.lower():
        return BrokerUnreachableError(f"the broker at {where} did not get the credentials in time", where)
    if "authorization" in text.lower() or "authentication" in text.lower():
        return BrokerAuthError(f"the broker at {where} refuses {_refused(access, url)}")
    if isinstance(error, ImportError):
        return BrokerAuthError(f"these credentials or this kind of URL need another package: {error}")
    if access.creds_file and not isinstance(error, (OSError, nats.errors.Error)):
        return BrokerAuthError(f"{access.creds_file} holds no credentials of NATS")
    if access.nkey_seed_file and not isinstance(error, (OSError, nats.errors.Error)):
        return BrokerAuthError(f"{access.nkey_seed_file} holds no seed of an nkey")
    if isinstance(error, ssl.SSLError):
        return BrokerUnreachableError(f"TLS with the broker at {where} fails: {error.reason or text}", where)
    if isinstance(error, nats.errors.SecureConnWantedError):
        return BrokerUnreachableError(f"the broker at {where} does not speak TLS, which was asked for", where)
    if "INFO" in text or isinstance(error, (TimeoutError, nats.errors.ProtocolError)):
        return BrokerUnreachableError(f"no NATS server answers at {where}", where)
    if ("invalid" in text and "url" in text) or isinstance(error, ValueError):
        return BrokerUnreachableError(f"{where!r} is not the URL of a broker: write it as nats://host:4222", where)
    return BrokerUnreachableError(f"no broker can be reached at {where}: {text or repr(error)}", where)


def _refused(access: BrokerAccess, url: str) -> str:
    if access.token and access.user:
        return (
            f"the credentials given: either `nalar up` has been started anew, and .nalar/runtime.json has the present ones, or "
            f"another client has the name {access.user!r}"
        )
    is_given = access.token or access.user or access.creds_file or access.nkey_seed_file or "@" in url
    if is_given:
        return "the credentials given"
    return (
        "a connection without credentials: those of `nalar up` are in .nalar/runtime.json beside its app; "
        "name the app by --app, or run this in its folder"
    )


def shown(url: str) -> str:
    """`url` without user, password and token."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def named(doing: str, error: Exception) -> BrokerError:
    """What nats-py raised while it was `doing` something, as one of ours."""
    code = getattr(error, "err_code", None)
    if code in _NO_ROOM or _DISK_FULL in str(error):
        text = "give JetStream more storage, or remove data; restart a server whose disk was full"
        return BrokerFullError(f"{doing}: the broker has no room for it ({error}): {text}")
    if code == _NOT_YET:
        return BrokerTimeoutError(f"{doing}: JetStream has nobody who leads it yet ({error})")
    if isinstance(error, nats.js.errors.NoStreamResponseError | nats.js.errors.ServiceUnavailableError) or (
        code in _NO_JETSTREAM
    ):
        return BrokerFeatureError(f"{doing}: JetStream does not answer: enable it at the broker (`nats-server --jetstream`)")
    return BrokerError(f"{doing}: {str(error).removeprefix('nats: ') or repr(error)}")


def checked_subject(subject: str) -> str:
    """`subject`, if it is one. Raises `AddressError`."""
    if _SUBJECT.fullmatch(subject) is None:
        raise AddressError(f"subject {subject[:140]!r} is not allowed")
    return subject


def checked_pattern(subject: str) -> str:
    """`subject`, if it can be subscribed to. Raises `AddressError`."""
    tokens = checked_subject(subject).split(".")
    if ">" in tokens[:-1]:
        raise AddressError(f"subject {subject[:140]!r} is not allowed: '>' can only be its last token")
    return subject


def checked_bucket(name: str) -> str:
    """`name`, if a bucket, a queue or a ledger can have it. Raises `AddressError`."""
    if _BUCKET.fullmatch(name) is None:
        raise AddressError(f"bucket or queue {name[:140]!r} is not allowed: A-Z, a-z, 0-9, '_' and '-' are")
    return name
