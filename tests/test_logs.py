"""Where events go, in a program of ours and in somebody else's."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import structlog
from nalar_mq.logs import configure_logs, logger

log = logger("a.b")
{first}
log.debug("seen.debug")
log.info("seen.info")
log.warning("seen.warning", url="nats://me:secret@host")
try:
    raise ValueError("why")
except ValueError:
    log.exception("seen.error")
log.bind(node="n").error("seen.bound")
assert structlog.is_configured() is {configured}
"""


def output(first: str, *, configured: bool) -> tuple[str, str]:
    program = PROGRAM.format(first=first, configured=configured)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_a_program_that_configured_nothing_sees_warnings_on_stderr() -> None:
    out, err = output("", configured=False)
    assert out == ""
    assert "seen.warning" in err
    assert "ValueError: why" in err
    assert "node=n" in err
    assert "secret" not in err
    assert "seen.info" not in err
    assert "seen.debug" not in err


def test_a_program_that_configured_structlog_gets_events_its_own_way() -> None:
    out, err = output("structlog.configure(processors=[structlog.processors.KeyValueRenderer()])", configured=True)
    assert "event='seen.info'" in out
    assert err == ""


def test_a_process_of_ours_logs_as_it_was_told() -> None:
    out, err = output("configure_logs('info')", configured=True)
    assert out == ""
    assert '"event": "seen.info"' in err
    assert "secret" not in err
    assert "seen.debug" not in err


def test_a_closed_stream_harms_nobody_who_logs() -> None:
    program = """
import sys
from nalar_mq.logs import configure_logs, logger

logger("a").error("before.configured")
configure_logs("info", as_json=True)
sys.stderr.close()
logger("a").error("after.closed", n=1)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
    assert "before.configured" in done.stderr
