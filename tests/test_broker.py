"""The embedded broker as a child process: started, found, killed, restarted, refused."""

from __future__ import annotations

from nalar_mq.config import BrokerAccess


async def test_session_fixture_gives_a_broker_with_a_token(broker_access: BrokerAccess, namespace: str) -> None:
    assert broker_access.token
    assert namespace
