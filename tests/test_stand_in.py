"""Packages that are loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nalar_mq.stand_in import loaded_when_used


def in_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_the_broker_can_be_reached_without_the_packages_of_web_sockets():
    program = """
import sys, nalar_mq.nats_transport, nats.aio.transport
print("aiohttp" in sys.modules)
print(nats.aio.transport.aiohttp.WSMsgType.BINARY.name)
import aiohttp
print(aiohttp is sys.modules["aiohttp"], aiohttp.__name__, aiohttp.ClientSession.__name__)
"""
    assert in_python(program) == "False\nBINARY\nTrue aiohttp ClientSession\n"


def test_a_stand_in_loads_its_package_for_whoever_uses_it_first():
    program = """
import sys
from nalar_mq.stand_in import loaded_when_used
with loaded_when_used("wave"):
    import wave as first
    from wave import Error
import wave
print(first is wave, first.Error is Error is wave.Error, wave is sys.modules["wave"])
"""
    assert in_python(program) == "False True True\n"


def test_what_is_not_installed_is_not_there():
    with loaded_when_used("nobody_has_written_this"), pytest.raises(ImportError):
        import nobody_has_written_this  # type: ignore[import-not-found]  # noqa: F401
