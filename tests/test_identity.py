"""The gate of the embedded broker: who is let in, as whom, and what others can do about it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE_S, until

from nalar_mq.address import Subjects
from nalar_mq.app import load_app
from nalar_mq.broker import read_node_key, read_runtime_file, remove_runtime_file, write_runtime_file
from nalar_mq.client import Client, connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import BrokerAuthError, MalformedMessageError
from nalar_mq.gate import REQUESTS, Gate, can_be
from nalar_mq.guarded_broker import GuardedBroker
from nalar_mq.identity import issued, password_of, presented, role_of
from nalar_mq.nats_jwt import ConnectOptions, Issuer, read_request
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.permissions import Permissions, Role
from nalar_mq.transport import Delivered
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "jobs_app.py"
LEASE_S = 3.0
SUBJECTS = Subjects("nalar")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[GuardedBroker]:
    async with GuardedBroker(tmp_path / "broker", namespace="nalar", lease_s=LEASE_S) as broker:
        yield broker


def worker(broker: GuardedBroker, name: str) -> Worker:
    access = issued(broker.node_access, name, Role.WORKER)
    return Worker(load_app(APP), Settings(broker=access, node="here", lease_s=LEASE_S), name=name)


def client(broker: GuardedBroker, name: str | None = None) -> Client:
    return connect(settings=Settings(broker=broker.client_access, lease_s=LEASE_S), name=name)


async def test_each_process_is_who_its_credentials_say(broker: GuardedBroker) -> None:
    async with worker(broker, "one"), worker(broker, "two"), client(broker) as caller:
        await caller.wait_for("answer")
        assert await caller.call("echo", "x") == "x"
        assert {name for name, _ in await caller.members()} == {"one", "two", caller.name}
        transport = caller.process.transport
        assert await can_be(transport, SUBJECTS, caller.name)
        for name in ("one", "client-other"):
            assert not await can_be(transport, SUBJECTS, name)


async def test_a_gate_that_is_slow_refuses_nobody(broker: GuardedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is whose machine has too much to do: the server itself would wait for two seconds."""
    identify = Gate.identify

    async def slowly(gate: Gate, presented: ConnectOptions) -> tuple[str, Role]:
        await asyncio.sleep(2.5)
        return await identify(gate, presented)

    monkeypatch.setattr(Gate, "identify", slowly)
    async with client(broker) as caller:
        assert await can_be(caller.process.transport, SUBJECTS, caller.name)


async def test_credentials_are_worth_nothing_under_another_name(broker: GuardedBroker) -> None:
    mine = issued(broker.node_access, "one", Role.WORKER)
    others = (
        msgspec.structs.replace(mine, user="two"),
        msgspec.structs.replace(mine, user="client-a"),
        msgspec.structs.replace(mine, user="client-a", token=broker.client_access.token + "x"),
        msgspec.structs.replace(mine, user="gate"),
        msgspec.structs.replace(mine, password="é"),
        BrokerAccess(urls=mine.urls, token="é"),
        issued(msgspec.structs.replace(broker.node_access, node_key="another"), "one", Role.WORKER),
        issued(broker.node_access, "client-a", Role.WORKER),
        issued(broker.node_access, "a.b", Role.WORKER),
        presented(broker.client_access, "one", "secret"),
        presented(broker.client_access, "client-a.b", "secret"),
        BrokerAccess(urls=mine.urls, token="of another run"),
        BrokerAccess(urls=mine.urls),
    )
    for access in others:
        with pytest.raises(BrokerAuthError, match="refuses"):
            await NatsTransport.connect(access, name="x")
    async with await NatsTransport.connect(mine, name="x") as transport:
        assert await can_be(transport, SUBJECTS, "one")


async def test_the_name_of_a_client_is_its_own_while_it_lives(broker: GuardedBroker) -> None:
    async with client(broker, "ann") as ann:
        assert ann.name == "client-ann"
        with pytest.raises(BrokerAuthError, match="client-ann"):
            async with client(broker, "ann"):
                pass
        assert await can_be(ann.process.transport, SUBJECTS, "client-ann")

    async def is_free() -> bool:
        try:
            async with client(broker, "client-ann"):
                return True
        except BrokerAuthError:
            return False

    await until(is_free, "the name is never free again")


async def test_other_nats_clients_use_the_token_alone(broker: GuardedBroker) -> None:
    async with worker(broker, "one"), client(broker) as caller:
        await caller.wait_for("answer")
        visitor = await nats.connect(broker.client_access.urls[0], token=broker.client_access.token)
        try:
            answer = await visitor.request("nalar.call.echo", b'["x"]', timeout=PATIENCE_S)
            assert answer.data == b'"x"'
            await visitor.publish("nalar.job.echo", b'["y"]', headers={"Nats-Msg-Id": "first"})
            assert await (await caller.job("first")).result(timeout=PATIENCE_S) == "y"
            kept = await visitor.jetstream().get_last_msg("nalar-results", "nalar.result.first")
            assert json.loads(kept.data or b"")["value"] == "y"
            heard = await visitor.subscribe("nalar.box.>")
            await caller.call("echo", "z")
            with pytest.raises(nats.errors.TimeoutError):
                await heard.next_msg(timeout=0.2)
        finally:
            await visitor.close()


async def test_a_broker_that_is_killed_knows_everybody_again(broker: GuardedBroker) -> None:
    async with worker(broker, "one") as serving, client(broker) as caller:
        await caller.wait_for("answer")
        handle = await caller.submit("echo", "kept", job_id="first")
        await handle.result(timeout=PATIENCE_S)
        assert broker.server.pid is not None
        os.kill(broker.server.pid, signal.SIGKILL)

        async def is_lost() -> bool:
            return not caller.process.transport.is_connected

        await until(is_lost, "the loss is never seen")
        assert await caller.options(timeout_s=PATIENCE_S, retries=3).call("echo", "x") == "x"
        assert broker.server.restarts == 1
        async with worker(broker, "two"), client(broker) as another:
            assert await another.options(timeout_s=PATIENCE_S).call("echo", "y") == "y"
        assert await (await caller.job("first")).result(timeout=PATIENCE_S) == "kept"
        assert not serving.closed.done()


async def test_a_node_elsewhere_is_told_what_it_lacks(broker: GuardedBroker, tmp_path: Path) -> None:
    url = broker.server.url.replace("://", f"://{broker.client_access.token}@")
    command = [str(Path(sys.executable).with_name("nalar")), "worker", str(APP), "--nats", url]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "node.key" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_key_for_nodes_lies_beside_the_runtime_file_for_its_owner_only(tmp_path: Path) -> None:
    path = write_runtime_file(tmp_path, url="u", token="t", node_key="k")
    key = path.with_name("node.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert read_node_key(tmp_path) == "k"
    running = read_runtime_file(tmp_path)
    assert running is not None
    assert running.access == BrokerAccess(urls=("u",), token="t")
    remove_runtime_file(tmp_path)
    assert not key.exists()
    assert read_node_key(tmp_path) == ""


def test_what_is_handed_to_a_process_tells_nothing_of_others() -> None:
    access = BrokerAccess(urls=("nats://h:4222",), token="token", node_key="key", tls_ca_file="ca")
    given = issued(access, "one", Role.WORKER)
    assert (given.token, given.node_key, given.tls_ca_file) == ("", "", "ca")
    assert role_of("key", "one", given.password) is Role.WORKER
    assert role_of("key", "one", password_of("key", "one", Role.CONTROLLER)) is Role.CONTROLLER
    assert role_of("key", "one", password_of("key", "one", Role.CLIENT)) is None
    assert role_of("key", "two", given.password) is None
    assert issued(BrokerAccess(urls=access.urls, user="u", password="p"), "one", Role.WORKER).user == "u"


def test_what_a_client_presents_goes_with_a_token_only() -> None:
    urls = ("nats://h:4222",)
    assert presented(BrokerAccess(urls=urls, token="t"), "client-a", "s") == BrokerAccess(
        urls=urls, token="t", user="client-a", password="s"
    )
    for access in (
        BrokerAccess(urls=urls),
        BrokerAccess(urls=urls, user="u", password="p"),
        BrokerAccess(urls=urls, creds_file="f"),
    ):
        assert presented(access, "client-a", "s") == access


@given(st.binary() | st.binary().map(lambda data: b"e30." + base64.urlsafe_b64encode(data).rstrip(b"=") + b".e30"))
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        read_request(data)


async def test_what_jetstream_passes_on_is_no_question_to_the_gate(broker: GuardedBroker) -> None:
    """Whoever may read a stream can have the broker deliver it anywhere, here with a question of its own as the message."""
    access = broker.client_access
    mine = presented(access, "client-a", "secret")
    question = {"nats": {"server_id": {"id": "S"}, "user_nkey": "U", "connect_opts": {"auth_token": access.token}}}
    forged = b"h." + base64.urlsafe_b64encode(json.dumps(question).encode()).rstrip(b"=") + b".s"
    heard: list[Delivered] = []
    async with (
        await NatsTransport.connect(broker.server.access, name="admin") as admin,
        await NatsTransport.connect(access, name="visitor") as visitor,
        await NatsTransport.connect(mine, name="a", inbox=SUBJECTS.inbox("client-a")) as forger,
    ):
        await admin.subscribe(REQUESTS, heard.append)
        await admin.subscribe("$JS.ACK.>", heard.append)
        forger.publish("nalar.result.x", forged)
        forger.publish("$JS.API.DIRECT.GET.nalar-results.nalar.result.x", b"", reply=REQUESTS)
        wanted = {"stream_name": "nalar-results", "config": {"name": "p", "ack_policy": "none", "deliver_policy": "all"}}
        await visitor.request("$JS.API.CONSUMER.CREATE.nalar-results.p", json.dumps(wanted).encode(), timeout_s=PATIENCE_S)
        visitor.publish("$JS.API.CONSUMER.MSG.NEXT.nalar-results.p", b"", reply=REQUESTS)

        async def is_passed_on() -> bool:
            return len(heard) >= 2

        await until(is_passed_on, "nothing came")
        async with await NatsTransport.connect(access, name="later"):  # is answered after what came before
            pass
        assert [message for message in heard if message.data != forged and not message.subject.startswith("$SYS")] == []


def test_an_answer_is_for_the_connection_that_was_asked_about() -> None:
    claims = {"nats": {"server_id": {"id": "S"}, "user_nkey": "U", "connect_opts": {"user": "one", "pass": "p"}}}
    asked = read_request(b"h." + base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=") + b".s")
    assert repr(asked.presented) == "ConnectOptions(user='one')"
    issuer = Issuer()

    def claims_in(token: bytes | str) -> dict[str, object]:
        body = (token.encode() if isinstance(token, str) else token).split(b".")[1]
        return dict(json.loads(base64.urlsafe_b64decode(body + b"==")))

    answer = claims_in(issuer.grant(asked, "one", Permissions(("a",), ("b",))))
    assert (answer["aud"], answer["sub"], answer["iss"]) == ("S", "U", issuer.public)
    told = answer["nats"]
    assert isinstance(told, dict)
    user = claims_in(told["jwt"])
    assert (user["sub"], user["name"]) == ("U", "one")
    granted = user["nats"]
    assert isinstance(granted, dict)
    assert (granted["pub"], granted["sub"]) == ({"allow": ["a"]}, {"allow": ["b"]})
    refused = claims_in(issuer.refuse(asked, "no"))["nats"]
    assert isinstance(refused, dict)
    assert refused["error"] == "no"
    assert "jwt" not in refused
