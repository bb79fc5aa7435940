"""What only a real connection can show: refusals at the first connect, brokers that stall, strangers that send rubbish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from waiting import until

from nalar_mq.broker import EmbeddedBroker, find_nats_server
from nalar_mq.config import BrokerAccess
from nalar_mq.errors import (
    AddressError,
    BrokerAuthError,
    BrokerError,
    BrokerFeatureError,
    BrokerTimeoutError,
    BrokerUnreachableError,
    ObjectDamagedError,
    ValueTooLargeError,
)
from nalar_mq.nats_client import NatsClient
from nalar_mq.nats_transport import NatsTransport
from nalar_mq.transport import Delivered

PATIENCE_S = 60.0


@pytest.fixture
async def transport(broker_access: BrokerAccess, namespace: str) -> AsyncIterator[NatsTransport]:
    async with await NatsTransport.connect(broker_access, name=namespace) as transport:
        yield transport


@pytest.fixture
async def own_broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(tmp_path / "data") as broker:
        yield broker


@contextlib.asynccontextmanager
async def plain_server(folder: Path, config: str) -> AsyncIterator[str]:
    """A nats-server with a configuration of our own; gives host:port."""
    (folder / "server.conf").write_text(f'listen: "127.0.0.1:-1"\nports_file_dir: "{folder}"\n{config}')
    process = await asyncio.create_subprocess_exec(
        find_nats_server(), "-c", str(folder / "server.conf"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    ports = folder / f"nats-server_{process.pid}.ports"
    try:
        await until(lambda: ports.exists() and "nats" in ports.read_text())
        yield ports.read_text().partition("127.0.0.1:")[0].rpartition("//")[2] + "127.0.0.1:" + _port(ports)
    finally:
        process.kill()
        await process.wait()


def _port(ports: Path) -> str:
    return ports.read_text().partition("127.0.0.1:")[2].partition('"')[0]


async def refusal(access: BrokerAccess) -> BrokerError:
    """The error of a connect that must fail soon."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(BrokerError) as caught:
            await NatsTransport.connect(access, name="test")
    return caught.value


# The first connect


GARBAGE = ["", "nats://", "nats://:4222", "nats://host:port", "nats://127.0.0.1:99999999", "nats://" + "x" * 300, "::::"]
GARBAGE += ["http://127.0.0.1", "ftp://x:1", "nats://a b:4222", "nats://[::1", "nats://127.0.0.1:0", "tls://:@:", "\x00"]


@pytest.mark.parametrize("url", GARBAGE)
async def test_garbage_for_a_url_is_an_error_of_ours(url: str) -> None:
    assert isinstance(await refusal(BrokerAccess(urls=(url,))), BrokerUnreachableError)


async def test_no_url_is_an_error_of_ours() -> None:
    assert isinstance(await refusal(BrokerAccess(urls=())), BrokerUnreachableError)


async def test_port_where_nobody_listens(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    error = await refusal(BrokerAccess(urls=(f"nats://secret@127.0.0.1:{port}",)))
    assert isinstance(error, BrokerUnreachableError)
    assert error.url == f"nats://127.0.0.1:{port}"
    assert error.url in str(error)
    assert "secret" not in str(error)
    assert capfd.readouterr() == ("", "")


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def speaks_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    await writer.drain()
    await reader.read()


async def endless_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            writer.write(b"x" * 10_000)
            await writer.drain()


async def broken_info(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"INFO {\xff\r\n")
    await writer.drain()
    await reader.read()


async def info_of_another_shape(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"INFO [1]\r\n")
    await writer.drain()
    await reader.read()


async def gives_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a server does that hears of credentials too late: it has not refused them."""
    writer.write(b'INFO {"server_id": "x", "version": "2.12.0", "proto": 1, "headers": true, "max_payload": 1048576}\r\n')
    await reader.readline()
    writer.write(b"-ERR 'Authentication Timeout'\r\n")
    await writer.drain()
    await reader.read()


@pytest.mark.parametrize("peer", [http, hangs_up, speaks_first, endless_line, broken_info, info_of_another_shape, gives_up])
async def test_port_at_which_nobody_lets_us_in_or_refuses_us(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        error = await refusal(BrokerAccess(urls=(f"nats://127.0.0.1:{port}",)))
    assert isinstance(error, BrokerUnreachableError)
    assert str(port) in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_wrong_token_is_refused_and_not_repeated(
    broker_access: BrokerAccess, token: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = await refusal(BrokerAccess(urls=broker_access.urls, token=token))
    assert isinstance(error, BrokerAuthError)
    assert "wrong" not in str(error)
    assert capfd.readouterr() == ("", "")


async def test_user_and_password(tmp_path: Path) -> None:
    async with plain_server(tmp_path, 'authorization { user: "u", password: "p" }') as place:
        url = f"nats://{place}"
        for access in (BrokerAccess(urls=(url,), user="u", password="p"), BrokerAccess(urls=(f"nats://u:p@{place}",))):
            async with await NatsTransport.connect(access, name="test") as transport:
                assert transport.url == url
        assert isinstance(await refusal(BrokerAccess(urls=(url,), user="u", password="x")), BrokerAuthError)


async def test_second_url_is_taken_if_the_first_is_dead(broker_access: BrokerAccess) -> None:
    access = BrokerAccess(urls=("nats://127.0.0.1:1", *broker_access.urls), token=broker_access.token)
    async with await NatsTransport.connect(access, name="test") as transport:
        assert transport.url == broker_access.urls[0]


@pytest.mark.parametrize("field", ["creds_file", "nkey_seed_file", "tls_ca_file", "tls_cert_file"])
async def test_credentials_that_are_absent_or_rubbish_name_their_file(
    broker_access: BrokerAccess, field: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    for _ in range(2):
        access = BrokerAccess(urls=broker_access.urls, **{field: str(file)})
        error = await refusal(access)
        assert isinstance(error, BrokerAuthError)
        file.write_text("rubbish")


async def test_tls_that_the_server_does_not_offer_is_not_given_up_silently(broker_access: BrokerAccess) -> None:
    url = broker_access.urls[0].replace("nats://", "tls://")
    error = await refusal(BrokerAccess(urls=(url,), token=broker_access.token))
    assert isinstance(error, BrokerUnreachableError)
    assert "TLS" in str(error)


async def test_tls_with_a_certificate_of_our_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command = [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    async with plain_server(tmp_path, f'tls {{ cert_file: "{cert}", key_file: "{key}" }}') as place:
        for scheme in ("tls", "nats"):
            access = BrokerAccess(urls=(f"{scheme}://{place}",), tls_ca_file=str(cert))
            async with await NatsTransport.connect(access, name="test") as transport:
                heard: list[int] = []
                await transport.subscribe("a", lambda message, heard=heard: heard.append(len(message.data)))  # type: ignore[misc]
                for _ in range(50):
                    transport.publish("a", b"x" * 200_000)
                await until(partial(heard.__eq__, [200_000] * 50))
        assert caplog.records == []
        error = await refusal(BrokerAccess(urls=(f"tls://{place}",)))
        assert isinstance(error, BrokerUnreachableError)
        assert "TLS" in str(error)


async def test_broker_without_jetstream_says_what_to_do(tmp_path: Path) -> None:
    async with (
        plain_server(tmp_path, "") as place,
        await NatsTransport.connect(BrokerAccess(urls=(f"nats://{place}",)), name="test") as transport,
    ):
        for opening in (transport.key_value("b"), transport.work_queue("q", ["q.*"]), transport.object_store("o")):
            with pytest.raises(BrokerFeatureError, match="--jetstream"):
                await opening
        await transport.flush()


async def test_subject_that_we_may_not_hear_is_refused(tmp_path: Path) -> None:
    config = 'authorization { users: [{ user: "u", password: "p", permissions: { subscribe: { deny: "Secret.>" } } }] }'
    async with (
        plain_server(tmp_path, config) as place,
        await NatsTransport.connect(BrokerAccess(urls=(f"nats://u:p@{place}",)), name="test") as transport,
    ):
        with pytest.raises(BrokerAuthError, match=r"Secret\.a"):
            await transport.subscribe("Secret.a", lambda message: None)
        heard: list[Delivered] = []
        await transport.subscribe("open.a", heard.append)
        transport.publish("open.a", b"x")
        await until(lambda: len(heard) == 1)


# Names


@pytest.mark.parametrize("subject", ["", ".", "a..b", "a b", "a\r\nPUB x 1\r\nx", "a.", ".a", "a\tb"])
async def test_subject_that_would_break_the_protocol_is_refused(transport: NatsTransport, subject: str) -> None:
    with pytest.raises(AddressError):
        transport.publish(subject, b"")
    with pytest.raises(AddressError):
        transport.publish("a", b"", reply=subject or " ")
    with pytest.raises(AddressError):
        await transport.subscribe(subject, lambda message: None)
    with pytest.raises(AddressError):
        await transport.subscribe("a", lambda message: None, queue=subject or " ")
    await transport.flush()


async def test_header_cannot_smuggle_a_line(transport: NatsTransport, namespace: str) -> None:
    heard: list[Delivered] = []
    await transport.subscribe(namespace, heard.append)
    with pytest.raises(AddressError):
        transport.publish(namespace, b"", headers={"a\r\nb": "c"})
    transport.publish(namespace, b"x", headers={"a": "b\r\nc: d"})
    await until(lambda: len(heard) == 1)
    assert dict(heard[0].headers or {}) == {"a": "b  c: d"}


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "a*", ">"])
async def test_bucket_names_are_checked(transport: NatsTransport, name: str) -> None:
    for opening in (transport.key_value(name), transport.work_queue(name, ["q"]), transport.object_store(name)):
        with pytest.raises(AddressError):
            await opening


@pytest.mark.parametrize("key", ["", ".", "a..b", "a b", "*", ">", "a.>"])
async def test_keys_are_checked(transport: NatsTransport, namespace: str, key: str) -> None:
    bucket = await transport.key_value(namespace)
    for operation in (bucket.get(key), bucket.put(key, b""), bucket.create(key, b""), bucket.delete(key)):
        with pytest.raises(AddressError):
            await operation


# Rubbish from strangers and servers


async def test_bytes_that_are_no_text_harm_nobody(
    transport: NatsTransport, broker_access: BrokerAccess, namespace: str
) -> None:
    heard: list[Delivered] = []
    await transport.subscribe(f"{namespace}.>", heard.append)
    host, port = broker_access.urls[0].removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await reader.readline()
    place = namespace.encode()
    writer.write(b'CONNECT {"auth_token": "%s", "headers": true, "verbose": false}\r\n' % broker_access.token.encode())
    writer.write(b"PUB %b.\xff\xfe 1\r\nx\r\n" % place)
    writer.write(b"PUB %b.a \xff\xfe 1\r\nx\r\n" % place)
    for block in (
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0 \xff\r\n\r\n",
        b"NATS/1.0 5\r\n\r\n",
        b"NATS/1.0\r\n\xff: \xff\r\n:\r\n\r\n",
        b"x",
    ):
        writer.write(b"HPUB %b.h %d %d\r\n%b\r\n" % (place, len(block), len(block), block))
    writer.write(b"PUB %b.last 0\r\n\r\nPING\r\n" % place)
    await writer.drain()
    await until(lambda: bool(heard) and heard[-1].subject == f"{namespace}.last")
    assert transport.is_connected
    assert len(heard) >= 3
    writer.close()
    await writer.wait_closed()


async def test_connection_that_the_server_ends_is_made_again(own_broker: EmbeddedBroker) -> None:
    states: list[bool] = []
    heard: list[bytes] = []
    async with await NatsTransport.connect(own_broker.access, name="test") as transport:
        transport.on_connection(states.append)
        await transport.subscribe("a", lambda message: heard.append(message.data))
        # Longer than a control line may be: the server answers with an error and hangs up.
        transport.publish("x" * 6000, b"")
        await until(lambda: states == [False, True])
        transport.publish("a", b"x")
        await until(lambda: heard == [b"x"])


async def test_listener_that_raises_does_not_keep_others_from_hearing(own_broker: EmbeddedBroker) -> None:
    states: list[bool] = []

    def bad(is_connected: bool) -> None:
        raise RuntimeError("on purpose")

    async with await NatsTransport.connect(own_broker.access, name="test") as transport:
        transport.on_connection(bad)
        transport.on_connection(states.append)
        os.kill(own_broker.pid or 0, signal.SIGKILL)
        await until(lambda: states == [False, True])
    assert states == [False, True]


# A broker that stalls


@contextlib.contextmanager
def stopped(broker: EmbeddedBroker) -> Iterator[None]:
    assert broker.pid is not None
    threads = [psutil.Process(thread.id) for thread in psutil.Process(broker.pid).threads()]
    os.kill(broker.pid, signal.SIGSTOP)
    while any(thread.status() != psutil.STATUS_STOPPED for thread in threads):
        time.sleep(0.001)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


async def test_operations_of_a_stalled_broker_end_in_time_and_late_answers_harm_nobody(own_broker: EmbeddedBroker) -> None:
    states: list[bool] = []
    patient = {"request_timeout_s": 2.0, "ping_interval_s": PATIENCE_S}
    async with await NatsTransport.connect(own_broker.access, name="test", **patient) as transport:
        transport.on_connection(states.append)
        bucket = await transport.key_value("b")
        queue = await transport.work_queue("q", ["q.*"])
        store = await transport.object_store("o")
        await queue.pull("q.*", batch=1, timeout_s=0.0, ack_wait_s=5.0)
        with stopped(own_broker):
            operations = [
                transport.flush(),
                transport.subscribe("a", lambda message: None),
                transport.request("a", b"", timeout_s=0.3),
                transport.key_value("c"),
                bucket.get("k"),
                bucket.put("k", b"1"),
                bucket.create("l", b"1"),
                bucket.entries(),
                queue.publish("q.a", b"1"),
                queue.pull("q.*", batch=1, timeout_s=0.1, ack_wait_s=5.0),
                queue.depth(),
                store.put("o", b"1"),
                store.get("o"),
            ]
            results = await asyncio.gather(*operations, return_exceptions=True)
            assert [type(result) for result in results] == [BrokerTimeoutError] * len(results)
            with pytest.raises(BrokerError):
                await anext(bucket.watch())
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(BrokerError):
                    await transport.flush()
                    break
        assert states == []


async def test_flood_into_a_stalled_broker_is_bounded_and_loses_the_oldest(own_broker: EmbeddedBroker) -> None:
    heard: list[bytes] = []
    async with (
        await NatsTransport.connect(own_broker.access, name="sender") as sender,
        await NatsTransport.connect(own_broker.access, name="receiver") as receiver,
    ):
        await receiver.subscribe("a", lambda message: heard.append(message.data[:8]))
        with stopped(own_broker):
            for number in range(1200):
                sender.publish("a", b"%08d" % number + b"x" * 65_536)
                await asyncio.sleep(0)
        await until(lambda: bool(heard) and heard[-1] == b"%08d" % 1199)
    assert sender.dropped > 0
    assert len(heard) == 1200 - sender.dropped
    assert heard == sorted(heard)


async def test_flood_of_a_live_broker_loses_nothing(transport: NatsTransport, namespace: str) -> None:
    heard: list[int] = []
    await transport.subscribe(namespace, lambda message: heard.append(len(message.data)))
    for number in range(300):
        transport.publish(namespace, b"x" * 100_000)
        if number % 20 == 0:
            await transport.flush()
    await until(lambda: len(heard) == 300)
    assert transport.dropped == 0


async def test_close_with_a_stalled_broker_ends(own_broker: EmbeddedBroker) -> None:
    transport = await NatsTransport.connect(own_broker.access, name="test", request_timeout_s=0.3)
    with stopped(own_broker):
        for _ in range(100):
            transport.publish("a", b"x" * 100_000)
        async with asyncio.timeout(PATIENCE_S):
            await transport.aclose()


async def test_close_while_the_broker_is_away_ends(own_broker: EmbeddedBroker) -> None:
    transport = await NatsTransport.connect(own_broker.access, name="test")
    await own_broker.aclose()
    await until(lambda: not transport.is_connected)
    async with asyncio.timeout(PATIENCE_S):
        await transport.aclose()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_close_leaves_no_task(broker_access: BrokerAccess, namespace: str) -> None:
    transport = await NatsTransport.connect(broker_access, name=namespace)
    await transport.subscribe(namespace, lambda message: None)
    await (await transport.key_value(namespace)).entries()
    await transport.aclose()
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_failed_connect_leaves_no_task() -> None:
    await refusal(BrokerAccess(urls=("nats://127.0.0.1:1",)))
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_watch_is_closed_with_its_consumer(transport: NatsTransport, namespace: str) -> None:
    bucket = await transport.key_value(namespace)
    for _ in range(5):
        await bucket.entries()
    async with asyncio.timeout(PATIENCE_S):
        while (await transport.jetstream.stream_info(f"KV_{namespace}")).state.consumer_count:
            await asyncio.sleep(0.01)


async def test_bucket_that_was_removed_is_an_error_of_ours(transport: NatsTransport, namespace: str) -> None:
    bucket = await transport.key_value(namespace)
    await transport.jetstream.delete_key_value(namespace)
    for operation in (bucket.get("k"), bucket.put("k", b""), bucket.entries()):
        with pytest.raises(BrokerError):
            await operation


async def test_queue_takes_more_subjects_when_it_is_opened_with_more(transport: NatsTransport, namespace: str) -> None:
    await transport.work_queue(namespace, [f"{namespace}.a"])
    queue = await transport.work_queue(namespace, [f"{namespace}.b"])
    for subject in ("a", "b"):
        await queue.publish(f"{namespace}.{subject}", b"1")
    assert await queue.depth() == 2
    with pytest.raises(ValueTooLargeError):
        await queue.publish(f"{namespace}.a", b"x" * (transport.max_payload + 1))


async def test_burst_beyond_every_buffer_of_one_turn_reaches_a_live_broker(transport: NatsTransport, namespace: str) -> None:
    heard: list[int] = []
    await transport.subscribe(namespace, lambda message: heard.append(int(message.data[:8])))
    for number in range(300):
        transport.publish(namespace, b"%08d" % number + b"x" * 100_000)
    await until(lambda: len(heard) == 300)
    assert heard == list(range(300))


async def test_nkey_seed_opens_the_broker(tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    file = tmp_path / "seed"
    file.write_bytes(seed)
    async with plain_server(tmp_path, f"authorization {{ users: [{{ nkey: {public} }}] }}") as place:
        access = BrokerAccess(urls=(f"nats://{place}",), nkey_seed_file=str(file))
        async with await NatsTransport.connect(access, name="test") as transport:
            await transport.flush()
        file.write_bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
        assert isinstance(await refusal(access), BrokerAuthError)


async def test_a_loop_that_stood_still_hears_the_answer_that_is_there(broker_access: BrokerAccess) -> None:
    async with await NatsTransport.connect(broker_access, name="test", request_timeout_s=0.2) as transport:
        asked = asyncio.ensure_future(transport.flush())
        await asyncio.sleep(0)
        time.sleep(2.0)  # what nobody should do to a loop
        await asked


@pytest.mark.slow
async def test_half_open_connection_is_found_out(own_broker: EmbeddedBroker) -> None:
    states: list[bool] = []
    async with await NatsTransport.connect(own_broker.access, name="test") as transport:
        transport.on_connection(states.append)
        with stopped(own_broker):
            await until(lambda: states == [False])
        await until(lambda: states == [False, True])
        await transport.flush()


async def test_objects_are_those_of_other_nats_clients(broker_access: BrokerAccess, namespace: str) -> None:
    data = os.urandom(3_000_000)
    async with await NatsTransport.connect(broker_access, name="test") as transport:
        store = await transport.object_store(namespace)
        theirs = await transport.jetstream.object_store(namespace)
        await theirs.put("theirs", data)
        assert await store.get("theirs") == data
        await store.put("ours", data)
        assert (await theirs.get("ours")).data == data
        await theirs.delete("theirs")
        assert await store.get("theirs") is None


async def test_of_objects_written_at_once_one_is_there_whole(broker_access: BrokerAccess, namespace: str) -> None:
    values = [os.urandom(2_000_000) for _ in range(4)]
    async with await NatsTransport.connect(broker_access, name="test") as transport:
        store = await transport.object_store(namespace)
        await asyncio.gather(*(store.put("one", value) for value in values))
        found = await store.get("one")
        assert found in values
        state = (await transport.jetstream.stream_info(f"OBJ_{namespace}")).state
        assert state.messages == 1 + 4, "pieces of the others are left"
        before = state.last_seq
        await store.put("one", found)
        assert (await transport.jetstream.stream_info(f"OBJ_{namespace}")).state.last_seq == before, "written again"
        await store.delete("one")
        assert (await transport.jetstream.stream_info(f"OBJ_{namespace}")).state.messages == 0


async def test_an_object_that_lacks_a_piece_is_damaged(broker_access: BrokerAccess, namespace: str) -> None:
    async with await NatsTransport.connect(broker_access, name="test") as transport:
        store = await transport.object_store(namespace)
        await store.put("one", os.urandom(2_000_000))
        await transport.jetstream.delete_msg(f"OBJ_{namespace}", 2)
        with pytest.raises(ObjectDamagedError, match="one"):
            await store.get("one")


@pytest.mark.parametrize("lost", [(0,), (1, 2), (4,), (0, 1, 2, 3, 4)])
async def test_answers_that_went_to_a_connection_which_is_gone_are_asked_for_again(
    transport: NatsTransport, namespace: str, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...]
) -> None:
    """A broker that stood still has answered in part before the client connected again: the rest alone is not the whole."""
    ledger = await transport.ledger(f"{namespace}-ledger", [f"{namespace}.l.*"])
    last = 0
    for number in range(5):
        last = await ledger.append(f"{namespace}.l.a", str(number).encode(), last=last)
    listen, readings = NatsClient.listen, list[str]()

    def losing(self: NatsClient, subject: str, listener: Callable[[Delivered], None]) -> int:
        readings.append(subject)
        answers, is_first = iter(range(100)), len(readings) == 1

        def hear(message: Delivered) -> None:
            if not is_first or "Status" in dict(message.headers or {}) or next(answers) not in lost:
                listener(message)

        return listen(self, subject, hear)

    monkeypatch.setattr(NatsClient, "listen", losing)
    assert [kept.data for kept in await ledger.read(f"{namespace}.l.a")] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(readings) == 2
