"""Settings as frozen objects. A file comes first, then the environment, then a flag; the environment is read only here."""

from __future__ import annotations

import msgspec

from nalar_mq.address import DEFAULT_NAMESPACE


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to reach a NATS server. `urls` are tried in turn; empty fields are not used. Secrets never appear in logs."""

    urls: tuple[str, ...]
    token: str = ""
    user: str = ""
    password: str = ""
    creds_file: str = ""
    nkey_seed_file: str = ""
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of a runtime needs to know."""

    broker: BrokerAccess
    namespace: str = DEFAULT_NAMESPACE
    node: str = ""
