"""Settings as frozen objects. A file comes first, then the environment, then a flag; the environment is read only here.

Where the broker is found, first match wins:

    1. `--nats URL` or `--context NAME`
    2. `NALAR_NATS_URL`
    3. `NATS_URL`
    4. `NATS_CONTEXT`, a context of the `nats` command by name
    5. `.nalar/runtime.json` beside the app, written by `nalar up`
    6. the context that `nats context select` made the default one

A URL of 1 to 3 is completed by what it does not say itself: `NATS_CREDS`, `NATS_NKEY`, `NATS_USER`, `NATS_PASSWORD`,
`NATS_TOKEN`, `NATS_CA`, `NATS_CERT`, `NATS_KEY`. A runtime file and a context bring their own credentials.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from nalar_mq.address import DEFAULT_NAMESPACE, check_token
from nalar_mq.errors import AddressError, ConfigError

DEFAULT_PORT: Final = 4222
_SCHEMES: Final = {"nats": DEFAULT_PORT, "tls": DEFAULT_PORT, "ws": 80, "wss": 443}
_URL_EXAMPLE: Final = "write it as nats://host:4222 (or tls://, ws://, wss://; several with commas between them)"


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to reach a NATS server. `urls` are tried in turn; empty fields are not used. Secrets never appear in logs.

    With a token, `user` and `password` say who comes with it; `node_key` makes credentials for others (`identity`).
    `data_dir` is where the server keeps its data, if that is known to be on this machine.
    """

    urls: tuple[str, ...]
    token: str = ""
    user: str = ""
    password: str = ""
    creds_file: str = ""
    nkey_seed_file: str = ""
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    node_key: str = ""
    data_dir: str = ""

    def __repr__(self) -> str:
        means = [name for name in self.__struct_fields__ if name not in ("urls", "data_dir") and getattr(self, name)]
        return f"BrokerAccess(urls={self.urls!r}, with={means!r})"


LEASE_S = 6.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of a runtime needs to know.

    Attributes:
        broker: how to reach it.
        namespace: first token of all subjects and buckets.
        node: name of the machine or GPU.
        lease_s: seconds after which a silent process is dead; the same for all processes of a namespace.
        trust_broker: jobs are accepted even if the broker is known to acknowledge what it has not synced to disk.
        local_store: folder for large values that processes on this machine give each other; `off` for none; if empty,
            `NALAR_LOCAL_STORE`, else `nalar-<user>` in the folder for temporary files.
        state: folder for the managed state of sessions; if empty, `NALAR_STATE`, else `.nalar/state` beside the app.
        adopts_state: sessions that were kept under another broker are entered in this one's directory: it is the app's own.
        ends_since_s: the runtime ends with a call that was made then, in seconds since 1970: what has been kept since then of
            sessions that nobody named is removed at the end. None if it goes on.
    """

    broker: BrokerAccess
    namespace: str = DEFAULT_NAMESPACE
    node: str = ""
    lease_s: float = LEASE_S
    trust_broker: bool = False
    local_store: str = ""
    state: str = ""
    adopts_state: bool = False
    ends_since_s: float | None = None


def find_state(given: str, beside: Path, *, environ: Mapping[str, str] | None = None) -> Path:
    """The folder for the managed state of sessions that `Settings.state` means, for the app in the folder `beside`."""
    env = os.environ if environ is None else environ
    chosen = given or env.get("NALAR_STATE", "")
    return Path(chosen) if chosen else beside / ".nalar" / "state"


def find_local_store(given: str = "", *, environ: Mapping[str, str] | None = None) -> Path | None:
    """The folder for large values that `Settings.local_store` means; None for none."""
    env = os.environ if environ is None else environ
    chosen = given or env.get("NALAR_LOCAL_STORE", "")
    if chosen == "off":
        return None
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"nalar-{os.geteuid()}"


_ADVICE = (
    "start one with `nalar up APP`, or name one by --nats or NATS_URL, or by --app the app of one that is up for another folder"
)


def load_settings(
    *,
    nats: str | None = None,
    context: str | None = None,
    runtime: BrokerAccess | None = None,
    namespace: str | None = None,
    app_namespace: str = "",
    node: str = "",
    trust_broker: bool = False,
    environ: Mapping[str, str] | None = None,
    advice: str = _ADVICE,
    died: str = "",
) -> Settings:
    """Settings of a process that uses a broker which is already there.

    Args:
        nats: URL given by hand.
        context: name of a context of the `nats` command, given by hand.
        runtime: what the runtime file beside the app says; None if there is none.
        namespace: given by hand; else `NALAR_NAMESPACE` counts.
        app_namespace: what the manifest or the runtime file says, which counts after these.
        node: name of the machine or GPU.
        trust_broker: given by hand; else `NALAR_TRUST_BROKER` counts.
        environ: stands in for the environment of the process.
        advice: what to do if no broker is named, for whoever asks.
        died: what was up and how to have it again, if that is known, in place of the advice.

    Raises:
        ConfigError: no broker is named anywhere, or what names it cannot be understood.
    """
    env = os.environ if environ is None else environ
    access = find_broker(nats=nats, context=context, runtime=runtime, environ=env)
    if access is None:
        raise ConfigError(f"no broker is known: {died or advice}")
    chosen = find_namespace(namespace, app_namespace, environ=env)
    return Settings(broker=access, namespace=chosen, node=node, trust_broker=trusts_broker(trust_broker, environ=env))


def trusts_broker(given: bool = False, *, environ: Mapping[str, str] | None = None) -> bool:
    """True if the user says so by hand or by `NALAR_TRUST_BROKER`: a broker that does not sync may keep jobs."""
    env = os.environ if environ is None else environ
    return given or env.get("NALAR_TRUST_BROKER", "").lower() in ("1", "true", "yes", "on")


def find_namespace(namespace: str | None = None, app_namespace: str = "", *, environ: Mapping[str, str] | None = None) -> str:
    """The namespace given by hand, else `NALAR_NAMESPACE`, else what the app says, else the default one.

    Raises:
        ConfigError: it cannot be a token of a subject.
    """
    env = os.environ if environ is None else environ
    chosen = namespace or env.get("NALAR_NAMESPACE") or app_namespace or DEFAULT_NAMESPACE
    try:
        return check_token(chosen, "namespace")
    except AddressError as error:
        raise ConfigError(str(error)) from None


def find_broker(
    *,
    nats: str | None = None,
    context: str | None = None,
    runtime: BrokerAccess | None = None,
    selected_context: bool = True,
    environ: Mapping[str, str] | None = None,
) -> BrokerAccess | None:
    """How to reach the broker that is named first in the order above, or None if none is named.

    Args:
        nats: URL given by hand.
        context: name of a context given by hand.
        runtime: what the runtime file beside the app says.
        selected_context: the context that is selected for the `nats` command counts too.
        environ: stands in for the environment of the process.

    Raises:
        ConfigError: what names the broker cannot be understood.
    """
    named = find_named_broker(nats=nats, context=context, runtime=runtime, selected_context=selected_context, environ=environ)
    return named.access if named is not None else None


class NamedBroker(NamedTuple):
    """How to reach a broker, and what names it."""

    source: str
    access: BrokerAccess


def find_named_broker(
    *,
    nats: str | None = None,
    context: str | None = None,
    runtime: BrokerAccess | None = None,
    selected_context: bool = True,
    environ: Mapping[str, str] | None = None,
) -> NamedBroker | None:
    """As `find_broker`, and says what names it."""
    env = os.environ if environ is None else environ
    if nats and context:
        raise ConfigError("--nats and --context both name a broker: give one of them")
    if nats:
        return _named_by("--nats", nats, runtime, env)
    if context:
        return NamedBroker("--context", _access_from_context(context, env))
    for variable in ("NALAR_NATS_URL", "NATS_URL"):
        if env.get(variable):
            return _named_by(variable, env[variable], runtime, env)
    if env.get("NATS_CONTEXT"):
        return NamedBroker("NATS_CONTEXT", _access_from_context(env["NATS_CONTEXT"], env))
    if runtime is not None:
        return NamedBroker("the runtime file that `nalar up` wrote", runtime)
    selected = _selected_context(env) if selected_context else ""
    return NamedBroker(f"the selected context {selected!r}", _access_from_context(selected, env)) if selected else None


def _named_by(source: str, text: str, runtime: BrokerAccess | None, env: Mapping[str, str]) -> NamedBroker:
    """The broker at a URL; with the credentials of what is up beside the app if it is that one and none are given."""
    access = _with_environment(access_from_url(text, source), env)
    is_running = runtime is not None and access == BrokerAccess(urls=runtime.urls)
    return NamedBroker(source, runtime if runtime is not None and is_running else access)


def access_from_url(text: str, source: str = "the broker's URL") -> BrokerAccess:
    """Reads one URL or several with commas; what stands before `@` becomes credentials and leaves the URL.

    Args:
        text: as a user wrote it; scheme and port may be missing.
        source: where it was written, for the message.

    Raises:
        ConfigError: it is not a URL of a NATS server, or two of them carry different credentials.
    """
    urls: list[str] = []
    secrets: set[tuple[str, str, str]] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        split = _split_url(part, source)
        urls.append(_plain_url(split))
        if split.username is not None:
            secrets.add(_credentials(split))
    if not urls:
        raise ConfigError(f"{source}: the URL is empty: {_URL_EXAMPLE}")
    if len(secrets) > 1:
        raise ConfigError(f"{source}: the URLs carry different credentials: give the same ones in each, or use --context")
    token, user, password = secrets.pop() if secrets else ("", "", "")
    return BrokerAccess(urls=tuple(urls), token=token, user=user, password=password)


def _split_url(part: str, source: str) -> SplitResult:
    shown = part.rpartition("@")[2]
    wrong = ConfigError(f"{source}: {shown!r} is not the URL of a NATS server: {_URL_EXAMPLE}")
    try:
        split = urlsplit(part if "://" in part else f"nats://{part}")
        port_is_good = split.port is None or 0 < split.port < 65536
    except ValueError:
        raise wrong from None
    host = split.hostname or ""
    if split.scheme not in _SCHEMES or not host or not port_is_good or not _is_host(host):
        raise wrong
    if split.query or split.fragment or (split.path not in ("", "/") and split.scheme in ("nats", "tls")):
        raise wrong
    return split


def _is_host(host: str) -> bool:
    return ":" in host or all(
        label and label.replace("-", "a").replace("_", "a").isalnum() for label in host.rstrip(".").split(".")
    )


def _plain_url(split: SplitResult) -> str:
    host = split.hostname or ""
    bracketed = f"[{host}]" if ":" in host else host
    return f"{split.scheme}://{bracketed}:{split.port or _SCHEMES[split.scheme]}{split.path.rstrip('/')}"


def _credentials(split: SplitResult) -> tuple[str, str, str]:
    user = unquote(split.username or "")
    if split.password is None:
        return user, "", ""
    return "", user, unquote(split.password)


def _with_environment(access: BrokerAccess, env: Mapping[str, str]) -> BrokerAccess:
    if access.token or access.user:
        names: tuple[tuple[str, str], ...] = _TLS_VARIABLES
    else:
        names = _CREDENTIAL_VARIABLES + _TLS_VARIABLES
    found = {field: env[variable] for field, variable in names if env.get(variable)}
    for field, variable in names:
        if field.endswith("_file") and field in found:
            found[field] = _existing_file(found[field], variable, env)
    if found.get("user") and not found.get("password") and "token" not in found:
        found["token"] = found.pop("user")
    return msgspec.structs.replace(access, **found)


_CREDENTIAL_VARIABLES: Final = (
    ("creds_file", "NATS_CREDS"),
    ("nkey_seed_file", "NATS_NKEY"),
    ("user", "NATS_USER"),
    ("password", "NATS_PASSWORD"),
    ("token", "NATS_TOKEN"),
)
_TLS_VARIABLES: Final = (("tls_ca_file", "NATS_CA"), ("tls_cert_file", "NATS_CERT"), ("tls_key_file", "NATS_KEY"))


class _Context(msgspec.Struct, frozen=True):
    """What we read of a context file of the `nats` command; its other fields concern that command alone."""

    url: str = ""
    token: str = ""
    user: str = ""
    password: str = ""
    creds: str = ""
    nkey: str = ""
    cert: str = ""
    key: str = ""
    ca: str = ""
    nsc: str = ""


def _context_folder(env: Mapping[str, str]) -> Path:
    home = Path(env.get("HOME") or Path.home())
    return Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "nats"


def _selected_context(env: Mapping[str, str]) -> str:
    try:
        return (_context_folder(env) / "context.txt").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _access_from_context(name: str, env: Mapping[str, str]) -> BrokerAccess:
    folder = _context_folder(env) / "context"
    path = folder / f"{name}.json"
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{name!r} is not the name of a context of the nats command")
    try:
        context = msgspec.json.decode(path.read_bytes(), type=_Context)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise ConfigError(f"the nats command has no context {name!r} (known: {known}): see `nats context ls`") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a context of the nats command: {error}") from None
    if context.nsc and not context.creds:
        raise ConfigError(f"{path}: credentials by 'nsc' are not supported: name a 'creds' file")
    return _access_of(context, str(path), env)


def _access_of(context: _Context, source: str, env: Mapping[str, str]) -> BrokerAccess:
    access = access_from_url(context.url or "nats://127.0.0.1:4222", source)
    files = {"creds_file": context.creds, "nkey_seed_file": context.nkey}
    files |= {"tls_ca_file": context.ca, "tls_cert_file": context.cert, "tls_key_file": context.key}
    found = {field: _existing_file(name, source, env) for field, name in files.items() if name}
    secrets = {"token": context.token, "user": context.user, "password": context.password}
    if context.user and not context.password and not context.token:
        secrets = {"token": context.user}
    return msgspec.structs.replace(access, **found, **{field: value for field, value in secrets.items() if value})


def _existing_file(name: str, source: str, env: Mapping[str, str]) -> str:
    home = env.get("HOME") or str(Path.home())
    path = Path(home + name[1:]) if name == "~" or name.startswith("~/") else Path(name)
    if not path.is_file():
        raise ConfigError(f"{source}: there is no file {str(path)!r}")
    return str(path.resolve())


class EngineAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to reach a model server. An empty `model` means the first one it names; the key never appears in logs."""

    url: str
    api_key: str = ""
    model: str = ""

    def __repr__(self) -> str:
        return f"EngineAccess(url={self.url!r}, model={self.model!r}, with_key={bool(self.api_key)})"


def find_engine(environ: Mapping[str, str] | None = None) -> EngineAccess | None:
    """The model server of `NALAR_ENGINE_URL`, else of `OPENAI_BASE_URL`; None if neither is set.

    `OPENAI_API_KEY` alone names no server: prompts leave the machine only when a URL says so.
    """
    env = os.environ if environ is None else environ
    own = env.get("NALAR_ENGINE_URL", "")
    url = own or env.get("OPENAI_BASE_URL", "")
    if not url:
        return None
    prefix = "NALAR_ENGINE" if own else "OPENAI"
    return EngineAccess(url=url, api_key=env.get(f"{prefix}_API_KEY", ""), model=env.get(f"{prefix}_MODEL", ""))


def engine_variables(url: str, model: str, *, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What to add to the environment of a worker whose app names a model server; nothing if the environment names one."""
    if not url or find_engine(environ) is not None:
        return {}
    return {"NALAR_ENGINE_URL": url, "NALAR_ENGINE_MODEL": model}


def engine_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the processes of one user on this machine meet to share an engine: `NALAR_ENGINE_DIR`, else under the home."""
    env = os.environ if environ is None else environ
    if folder := env.get("NALAR_ENGINE_DIR"):
        return Path(folder)
    state = env.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "nalar" / "engine"
