from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalar_mq.config import (
    BrokerAccess,
    EngineAccess,
    Settings,
    access_from_url,
    engine_variables,
    find_broker,
    find_engine,
    find_namespace,
    load_settings,
)
from nalar_mq.errors import ConfigError

RUNTIME = BrokerAccess(urls=("nats://127.0.0.1:4111",), token="t")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def add_context(env: dict[str, str], name: str, *, selected: bool = False, text: str | None = None, **fields: str) -> None:
    folder = Path(env.get("XDG_CONFIG_HOME") or Path(env["HOME"]) / ".config") / "nats"
    (folder / "context").mkdir(parents=True, exist_ok=True)
    (folder / "context" / f"{name}.json").write_text(json.dumps(fields) if text is None else text)
    if selected:
        (folder / "context.txt").write_text(name + "\n")


def test_order_of_the_places(env):
    def url(**given) -> str | None:
        access = find_broker(environ=env, **given)
        return access.urls[0].rpartition("/")[2] if access else None

    assert url() is None
    add_context(env, "picked", selected=True, url="nats://picked:1")
    add_context(env, "other", url="nats://other:1")
    assert url() == "picked:1"
    assert url(selected_context=False) is None
    assert url(runtime=RUNTIME) == "127.0.0.1:4111"
    env["NATS_CONTEXT"] = "other"
    assert url(runtime=RUNTIME) == "other:1"
    env["NATS_URL"] = "nats://plain:1"
    assert url(runtime=RUNTIME) == "plain:1"
    env["NALAR_NATS_URL"] = "nats://ours:1"
    assert url(runtime=RUNTIME) == "ours:1"
    assert url(context="other", runtime=RUNTIME) == "other:1"
    assert url(nats="flag:1", runtime=RUNTIME) == "flag:1"
    with pytest.raises(ConfigError, match="give one of them"):
        url(nats="flag:1", context="other")


def test_a_url_is_completed_by_the_credentials_of_what_is_up_there(env):
    up = BrokerAccess(urls=("nats://127.0.0.1:4222",), token="secret")
    assert find_broker(nats="127.0.0.1:4222", runtime=up, environ=env) == up
    assert find_broker(runtime=up, environ=env | {"NATS_URL": "nats://127.0.0.1:4222"}) == up
    for other in ("nats://127.0.0.1:4223", "nats://other@127.0.0.1:4222"):
        found = find_broker(nats=other, runtime=up, environ=env)
        assert found is not None
        assert found.token != "secret"


def test_no_broker_says_what_to_do(env):
    with pytest.raises(ConfigError, match=r"nalar up APP.*--nats or NATS_URL"):
        load_settings(environ=env)


def test_settings(env):
    settings = load_settings(nats="localhost", node="n1", app_namespace="app", environ=env)
    assert settings == Settings(broker=BrokerAccess(urls=("nats://localhost:4222",)), namespace="app", node="n1")


def test_namespace(env):
    assert find_namespace(environ=env) == "nalar"
    assert find_namespace(None, "app", environ=env) == "app"
    env["NALAR_NAMESPACE"] = "env"
    assert find_namespace(None, "app", environ=env) == "env"
    assert find_namespace("flag", "app", environ=env) == "flag"
    with pytest.raises(ConfigError, match=r"namespace 'a\.b' is not allowed"):
        find_namespace("a.b", environ=env)


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("localhost", ["nats://localhost:4222"]),
        ("10.0.0.1:99", ["nats://10.0.0.1:99"]),
        ("nats://a, tls://b:5", ["nats://a:4222", "tls://b:5"]),
        ("wss://a/path", ["wss://a:443/path"]),
        ("[::1]:4222", ["nats://[::1]:4222"]),
        ("nats://my_host.example.", ["nats://my_host.example.:4222"]),
    ],
)
def test_urls(text, urls):
    assert access_from_url(text) == BrokerAccess(urls=tuple(urls))


def test_credentials_leave_the_url():
    assert access_from_url("nats://me:p%40ss@h") == BrokerAccess(urls=("nats://h:4222",), user="me", password="p@ss")
    assert access_from_url("nats://tok@h") == BrokerAccess(urls=("nats://h:4222",), token="tok")
    with pytest.raises(ConfigError, match="different credentials"):
        access_from_url("nats://a:b@h,nats://c:d@i")


@pytest.mark.parametrize(
    "text",
    ["", " , ", "http://h", "nats://", "nats://:4222", "h:0", "h:70000", "h:port", "nats://h/x", "nats://h?a=b", "a b", "no!"],
)
def test_garbage_is_answered_by_a_right_url(text):
    with pytest.raises(ConfigError, match=r"^--nats: .*nats://host:4222"):
        access_from_url(text, "--nats")


def test_the_message_and_repr_keep_secrets():
    with pytest.raises(ConfigError) as caught:
        access_from_url("http://me:sesame@h")
    assert "sesame" not in str(caught.value)
    assert "sesame" not in repr(access_from_url("nats://me:sesame@h"))
    assert "sesame" not in repr(Settings(broker=access_from_url("nats://sesame@h")))


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        access = access_from_url(text)
    except ConfigError:
        return
    assert all(access_from_url(url).urls == (url,) for url in access.urls)


def test_environment_completes_a_url(env, tmp_path):
    creds = tmp_path / "me.creds"
    creds.write_text("x")
    env |= {"NATS_CREDS": str(creds), "NATS_USER": "me", "NATS_PASSWORD": "pw"}
    access = find_broker(nats="h", environ=env)
    assert access == BrokerAccess(urls=("nats://h:4222",), creds_file=str(creds), user="me", password="pw")
    access = find_broker(nats="nats://a:b@h", environ=env)
    assert access == BrokerAccess(urls=("nats://h:4222",), user="a", password="b")
    env["NATS_CREDS"] = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"NATS_CREDS: there is no file .*absent"):
        find_broker(nats="h", environ=env)


def test_a_user_without_password_is_a_token(env):
    env["NATS_USER"] = "tok"
    assert find_broker(nats="h", environ=env) == BrokerAccess(urls=("nats://h:4222",), token="tok")


def test_context_fields(env, tmp_path):
    (tmp_path / "c.creds").write_text("x")
    (tmp_path / "ca.pem").write_text("x")
    add_context(env, "prod", url="tls://a:1,tls://b:2", creds="~/c.creds", ca=str(tmp_path / "ca.pem"), description="d")
    access = find_broker(context="prod", environ=env)
    ca = str(tmp_path / "ca.pem")
    assert access == BrokerAccess(urls=("tls://a:1", "tls://b:2"), creds_file=str(tmp_path / "c.creds"), tls_ca_file=ca)
    add_context(env, "pw", url="a", user="u", password="p")
    assert find_broker(context="pw", environ=env) == BrokerAccess(urls=("nats://a:4222",), user="u", password="p")


def test_xdg_config_home(env, tmp_path):
    env["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    add_context(env, "here", selected=True, url="nats://here:1")
    assert find_broker(environ=env) == BrokerAccess(urls=("nats://here:1",))


def test_contexts_that_cannot_be_used(env):
    add_context(env, "one", url="nats://h")
    with pytest.raises(ConfigError, match=r"no context 'two' \(known: one\)"):
        find_broker(context="two", environ=env)
    with pytest.raises(ConfigError, match="not the name of a context"):
        find_broker(context="../one", environ=env)
    add_context(env, "broken", text="{")
    with pytest.raises(ConfigError, match=r"broken\.json: not a context"):
        find_broker(context="broken", environ=env)
    add_context(env, "nsc", url="nats://h", nsc="nsc://o/a/u")
    with pytest.raises(ConfigError, match="'nsc' are not supported"):
        find_broker(context="nsc", environ=env)
    add_context(env, "nofile", url="nats://h", creds="/absent")
    with pytest.raises(ConfigError, match="there is no file '/absent'"):
        find_broker(context="nofile", environ=env)


def test_the_app_names_a_model_server_where_the_environment_does_not():
    assert engine_variables("", "", environ={}) == {}
    named = engine_variables("http://h:1", "m", environ={})
    assert find_engine(named) == EngineAccess(url="http://h:1", model="m")
    assert engine_variables("http://h:1", "m", environ={"OPENAI_BASE_URL": "http://other"}) == {}
