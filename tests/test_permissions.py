"""Permissions of processes at a real broker: nobody speaks in the name of another one, or hears what is for another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from waiting import PATIENCE_S, until

from nalar_mq.actions import Allow, States, encode_decision
from nalar_mq.address import Subjects
from nalar_mq.app import load_app
from nalar_mq.broker import find_nats_server
from nalar_mq.cli import run_command
from nalar_mq.client import connect
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.errors import AddressError, BrokerAuthError, UnknownJobError
from nalar_mq.messages import WIRE_VERSION, ActorInfo, Bye, Member, decode_member, encode_packet, encode_record
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.permissions import Role, as_configuration, permissions_of
from nalar_mq.streams import lay_out
from nalar_mq.transport import Delivered, Ledger
from nalar_mq.worker import Worker

APP = Path(__file__).parent / "apps" / "jobs_app.py"
SUBJECTS = Subjects("nalar")
USERS = {
    "one": Role.WORKER,
    "two": Role.WORKER,
    "client-a": Role.CLIENT,
    "client-b": Role.CLIENT,
    "other": Role.VISITOR,
    "of-acme": Role.VISITOR,
}
TENANTS = {"of-acme": "acme"}


def configuration(folder: Path) -> str:
    def user(name: str, permissions: str) -> str:
        return f"{{ user: {json.dumps(name)}, password: secret, {permissions} }}\n"

    users = [
        user(name, as_configuration([permissions_of(SUBJECTS, name, role, TENANTS.get(name, ""))]))
        for name, role in USERS.items()
    ]
    return (
        f'listen: "127.0.0.1:-1"\nports_file_dir: {json.dumps(str(folder))}\n'
        f"jetstream {{ store_dir: {json.dumps(str(folder))} }}\n"
        f"authorization {{ users: [\n{user('admin', '')}{''.join(users)}] }}\n"
    )


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    """A broker of an operator who has given each process the permissions that `nalar permissions` prints."""
    (tmp_path / "server.conf").write_text(configuration(tmp_path))
    with (tmp_path / "log").open("w") as log:
        server = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", str(tmp_path / "server.conf"), stdout=log, stderr=log
        )
    try:
        ports = tmp_path / f"nats-server_{server.pid}.ports"
        await until(lambda: ports.exists() and b"]" in ports.read_bytes(), "the broker did not start")
        found: str = json.loads(ports.read_bytes())["nats"][0]
        async with await NatsTransport.connect(access(found, "admin"), name="admin") as transport:
            await lay_out(transport, SUBJECTS, 6.0)
        yield found
    finally:
        server.terminate()
        await server.wait()


def access(url: str, user: str) -> BrokerAccess:
    return BrokerAccess(urls=(url,), user=user, password="secret")


async def connected(url: str, user: str) -> NatsTransport:
    inbox = "" if USERS.get(user) is Role.VISITOR else SUBJECTS.inbox(user)
    return await NatsTransport.connect(access(url, user), name=user, inbox=inbox)


def settings(url: str, user: str) -> Settings:
    return Settings(broker=access(url, user), node="here")


async def test_a_runtime_works_within_its_permissions(url: str) -> None:
    app = load_app(APP)
    async with (
        Worker(app, settings(url, "one"), name="one"),
        Worker(app, settings(url, "two"), name="two"),
        connect(settings=settings(url, "client-a"), name="client-a") as client,
    ):
        await client.wait_for("answer")
        assert await client.call("echo", "x") == "x"
        handle = await client.submit("answer", question="HOW?", job_id="first")
        await handle.result(timeout=PATIENCE_S)
        large = "x" * 1_000_000
        assert len(str(await client.call("answer", large))) > len(large)
        assert {view.name for view in await client.look()} == {"one", "two"}
        visitor = await nats.connect(url, user="other", password="secret")
        try:
            answer = await visitor.request("nalar.call.answer", b'{"question": "WHO?"}', timeout=PATIENCE_S)
            assert answer.headers is None, answer.headers
            await visitor.publish("nalar.job.answer", b'{"question": "WHEN?"}', headers={"Nats-Msg-Id": "second"})
            await (await client.job("second")).result(timeout=PATIENCE_S)
            kept = await visitor.jetstream().get_last_msg("nalar-results", "nalar.result.second")
            assert json.loads(kept.data or b"")["state"] == "done"
            heard = await visitor.subscribe("nalar.decided")
            async with await connected(url, "admin") as admin:
                served = await admin.subscribe("nalar.overview", lambda asked: admin.publish(asked.reply, b"seen"))
                assert (await visitor.request("nalar.overview", b"", timeout=PATIENCE_S)).data == b"seen"
                await served.unsubscribe()
                admin.publish("nalar.decided", b"{}")
                assert (await heard.next_msg(timeout=PATIENCE_S)).data == b"{}"
                await (await admin.ledger("nalar-decisions", ["nalar.decided"])).append("nalar.decided", b"{}")
            assert (await visitor.jetstream().get_last_msg("nalar-decisions", "nalar.decided")).data == b"{}"
        finally:
            await visitor.close()


async def test_on_whose_behalf_a_visitor_publishes_jobs_is_up_to_who_runs_the_broker(url: str) -> None:
    async with (
        Worker(load_app(APP), settings(url, "one"), name="one"),
        connect(settings=settings(url, "client-a"), name="client-a") as client,
        await NatsTransport.connect(access(url, "of-acme"), name="of-acme") as acme,
        await NatsTransport.connect(access(url, "other"), name="other") as other,
    ):
        await client.wait_for("on_behalf")
        header = {"Nalar-Tenant": "acme"}
        for visitor, subject, id in (
            (other, "on_behalf.acme", "forged"),
            (acme, "on_behalf", "no"),
            (acme, "on_behalf.b", "b"),
        ):
            visitor.publish(f"nalar.job.{subject}", b"[]", headers={**header, "Nats-Msg-Id": id})
            await visitor.flush()
        # The broker answers with its own right to publish: what it is made to say there is no job of that tenant.
        other.publish("$JS.API.INFO", b"", reply="nalar.job.on_behalf.acme")
        await other.flush()
        jobs = await client.jobs()

        async def is_refused() -> bool:
            return any(["without Nalar-Tenant" in letter.cause async for letter in jobs.dead_letters()])

        await until(is_refused, "it ran, or never came")
        acme.publish("nalar.job.on_behalf.acme", b"[]", headers={**header, "Nats-Msg-Id": "right"})
        assert await (await client.job("right")).result(timeout=PATIENCE_S) == ["acme", "acme"]
        for id in ("forged", "no", "b"):
            with pytest.raises(UnknownJobError):
                await jobs.status(id)


async def test_nobody_publishes_in_the_name_of_another(url: str) -> None:
    others = ("nalar.box.client-a.one", "nalar.states", "$KV.nalar-members.client-a", f"{SUBJECTS.inbox('client-a')}.x")
    others += ("$JS.API.STREAM.CREATE.spy", "$JS.API.STREAM.UPDATE.nalar-results", "$JS.API.STREAM.DELETE.KV_nalar-members")
    attempts = {
        "client-b": (
            *others,
            "nalar.look.client-a.one",
            "nalar.seen.client-a.one",
            "nalar.load.one",
            "nalar.report.client-a",
            "nalar.journal.one.1",
            "$KV.nalar-control.states",
        ),
        "two": others,
        "other": (*others, "nalar.result.first", "$KV.nalar-places.x", "nalar.job.answer.acme"),
        "of-acme": ("nalar.call.answer", "nalar.job.answer", "nalar.job.answer.beta"),
    }
    heard: list[Delivered] = []
    async with await NatsTransport.connect(access(url, "admin"), name="admin") as admin:
        for subject in {subject for subjects in attempts.values() for subject in subjects}:
            await admin.subscribe(subject, heard.append)
        for user, subjects in attempts.items():
            async with await connected(url, user) as forger:
                for subject in subjects:
                    forger.publish(subject, b"forged")
                await forger.flush()
        await admin.flush()
        assert not heard
        admin.publish(others[0], b"")
        await admin.flush()
        assert heard, "those who may are heard"


@pytest.mark.parametrize("user", ["client-b", "two", "other"])
async def test_nobody_hears_what_is_for_another(url: str, user: str) -> None:
    theirs = ("nalar.box.client-a.*", "nalar.box.*.client-b", "nalar.seen.client-a.*", "nalar.ranks.client-a")
    async with await connected(url, user) as spy:
        for subject in (*theirs, f"{SUBJECTS.inbox('client-a')}.>", "$KV.>", "$SYS.>", ">"):
            with pytest.raises(BrokerAuthError, match="does not allow"):
                await spy.subscribe(subject, lambda _: None)


async def _holds(ledger: Ledger, subject: str) -> bool:
    return await ledger.last(subject) is not None


async def test_what_jetstream_passes_on_is_in_nobodys_name(url: str) -> None:
    """The broker publishes wherever it is asked to answer: frames and records that come that way are not believed."""
    forged_frame = encode_packet(Bye(WIRE_VERSION, 1 << 62))  # ends every channel to whoever is believed to have sent it
    actors = {"stolen": ActorInfo("workflow", {}, False, "", None, 0, 0, None, False, False)}
    forged_states = encode_decision(States(WIRE_VERSION, 1 << 40, 1, (Allow("echo", ("nobody",)),)))
    forged_record = encode_record(Member(WIRE_VERSION, 1 << 62, "n", "worker", 1, actors))
    async with (
        Worker(load_app(APP), settings(url, "one"), name="one") as worker,
        await connected(url, "client-b") as forger,
        await connected(url, "other") as visitor,
    ):
        endpoint = worker.process.endpoint
        results = "nalar-results"
        forger.publish("nalar.result.frame", forged_frame)
        forger.publish("nalar.result.states", forged_states)
        forger.publish("nalar.result.record", forged_record)
        ledger = await forger.ledger(results, ["nalar.result.*"])
        await until(lambda: _holds(ledger, "nalar.result.record"), "the stream does not keep it")
        for subject in ("nalar.states", "$KV.nalar-control.states"):
            forger.publish(f"$JS.API.DIRECT.GET.{results}.nalar.result.states", b"", reply=subject)
        for subject in ("nalar.look.one.two", "nalar.seen.one.two", "nalar.load.two", "nalar.box.one.two"):
            forger.publish(f"$JS.API.DIRECT.GET.{results}.nalar.result.frame", b"", reply=subject)
        await until(lambda: endpoint.stats.indirect == 1, "the copy never came")
        assert worker.process.lookout.unreadable == 2
        assert worker.process.telemetry.unreadable == 1
        wanted = {"stream_name": results, "config": {"name": "p", "ack_policy": "none", "deliver_policy": "all"}}
        await visitor.request(f"$JS.API.CONSUMER.CREATE.{results}.p", json.dumps(wanted).encode(), timeout_s=PATIENCE_S)
        visitor.publish(f"$JS.API.CONSUMER.MSG.NEXT.{results}.p", b"", reply="nalar.box.one.two")
        await until(lambda: endpoint.stats.indirect == 2, "the delivery never came")
        forger.publish(f"$JS.API.STREAM.MSG.GET.{results}", b'{"seq": 1}', reply="nalar.box.one.two")
        await until(lambda: endpoint.stats.malformed == 1, "the message never came")
        bucket = await forger.key_value("nalar-members")
        for name in ("two", "one"):
            forger.publish(f"$JS.API.DIRECT.GET.{results}.nalar.result.record", b"", reply=f"$KV.nalar-members.{name}")

            async def is_forged(name: str = name) -> bool:
                entry = await bucket.get(name)
                return entry is not None and entry.value == b""

            await until(is_forged, "the record never came")
        assert not worker.process.table.replicas("stolen")
        assert "two" not in worker.process.table.members

        async def is_back() -> bool:
            entry = await bucket.get("one")
            return entry is not None and bool(entry.value)

        await until(is_back, "the record of the worker did not come back")
        assert not worker.closed.done()
        async with connect(settings=settings(url, "client-a"), name="client-a") as client:
            assert client.process.membership.unreadable >= 1
            assert await client.call("echo", "x") == "x"
            assert not worker.process.enforcement.standing.states


async def test_a_service_answers_nobody_in_its_own_name_elsewhere(url: str) -> None:
    """Whoever asks chooses where the answer goes: not into a box, where it would be a frame, nor into a bucket."""
    heard: list[Delivered] = []
    async with (
        Worker(load_app(APP), settings(url, "one"), name="one") as worker,
        await NatsTransport.connect(access(url, "admin"), name="admin") as admin,
    ):
        for subject in ("nalar.box.two.one", "$KV.nalar-members.one"):
            await admin.subscribe(subject, heard.append)
        asker = await nats.connect(url, user="other", password="secret")
        try:
            for reply in ("nalar.box.two.one", "$KV.nalar-members.one"):
                await asker.publish("nalar.call.answer", b'{"question": "WHO?"}', reply=reply)
                await asker.publish("$SRV.PING", b"", reply=reply)
            await asker.request("nalar.call.answer", b'{"question": "WHO?"}', timeout=PATIENCE_S)
        finally:
            await asker.close()
        await admin.flush()
        assert not [message for message in heard if message.reply == "" and message.subject.startswith("nalar.box")]
        assert all(decode_member(m.data).incarnation == worker.process.me.incarnation for m in heard if m.subject[0] == "$")


async def test_a_client_serves_nothing_whatever_it_says(url: str) -> None:
    actors = {"secret": ActorInfo("tool", {}, False, "", None, 0, 0, None, False, False)}
    async with (
        connect(settings=settings(url, "client-a"), name="client-a") as client,
        await connected(url, "client-b") as liar,
    ):
        bucket = await liar.key_value("nalar-members")
        await bucket.put("client-b", encode_record(Member(WIRE_VERSION, 1, "n", "worker", 1, actors)))
        membership = client.process.membership
        await until(lambda: membership.unreadable > 0, "the record never came")
        assert not client.process.table.replicas("secret")


async def test_a_process_with_too_few_permissions_is_told_so(url: str) -> None:
    with pytest.raises(BrokerAuthError, match="nalar permissions"):
        async with connect(settings=settings(url, "other"), name="client-c"):
            pass


def test_a_client_is_known_by_its_name() -> None:
    with pytest.raises(AddressError, match="client-"):
        permissions_of(SUBJECTS, "one", Role.CLIENT)
    with pytest.raises(AddressError, match="client"):
        permissions_of(SUBJECTS, "client-a", Role.WORKER)


def test_the_command_prints_a_block_for_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["permissions", "n-1", "n-2", "--namespace", "here"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("permissions {\n  publish { allow: [\n")
    for subject in ('"here.box.*.n-1"', '"here.box.n-2.*"', '"$KV.here-members.n-2"'):
        assert printed.count(subject) == 1
    assert run_command(["permissions", "n-1", "--role", "client"]) == 2
    assert "client-" in capsys.readouterr().err
