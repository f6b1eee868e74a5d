"""One stand-in for Deepgram and few servers serve all the tests that need no settings of their own.

A server that lives through so many faults shows at its end that none of them has left a mark.
"""

import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
import trustme

from tests.standins.deepgram import KEY, Deepgram
from tests.standins.process import Server

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest_asyncio.fixture(scope="session")
async def deepgram() -> AsyncIterator[Deepgram]:
    """Return the stand-in for Deepgram."""
    async with Deepgram() as running:
        yield running


async def assert_clean_shutdown(server: Server) -> None:
    """Stop `server`, and check that its log has one end a call, and no traceback."""
    server.signal()
    assert await server.end() == 0
    assert KEY not in server.log
    assert "Traceback" not in server.log
    assert "never retrieved" not in server.log
    calls = re.findall(r"INFO (call \w+) started\n", server.log)
    assert [call for call in calls if server.log.count(f" {call} ended: ") != 1] == []


@pytest_asyncio.fixture(scope="session")
async def server(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server with no setting but the key and Deepgram's stand-in."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as running:
        yield running
        await assert_clean_shutdown(running)


@pytest_asyncio.fixture(scope="session")
async def closes_after_speech(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server that closes after speech, at the DEBUG level."""
    settings = {"CLOSE_AFTER_SPEECH": "yes", "LOG_LEVEL": "debug"}
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as running:
        yield running
        await assert_clean_shutdown(running)


@pytest_asyncio.fixture(scope="session")
async def impatient(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server that waits for neither callers nor Deepgram for long."""
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": "Hello in haste"}
    async with Server(settings, START_SECONDS=1.0, READ_SECONDS=0.5) as running:
        yield running
        await assert_clean_shutdown(running)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Return a PEM file with a key and a certificate for 127.0.0.1, and what trusts it."""
    authority = trustme.CA()
    pem = tmp_path_factory.mktemp("tls") / "127.0.0.1.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return pem, trust
