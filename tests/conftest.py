"""What the tests share: one stand-in for Deepgram, and one server that needs no settings.

A server that lives through so many faults shows after each test that it has left no mark.
"""

import re
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
import trustme

from tests.standins.deepgram import KEY, Deepgram
from tests.standins.process import Server

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

# A background job of a shell's script ignores SIGINT, and so would all the processes it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest_asyncio.fixture(scope="session")
async def deepgram() -> AsyncIterator[Deepgram]:
    """Return the stand-in for Deepgram."""
    async with Deepgram() as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def shared_server(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server with no setting but the key and Deepgram's stand-in."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as running:
        yield running


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """Return the server that tests share, and check what it has logged of this one."""
    since = len(shared_server.log)
    yield shared_server
    logged = shared_server.log[since:]
    assert KEY not in logged
    assert "never retrieved" not in logged
    failed = re.findall(r"(.*)\nTraceback ", logged)
    # websockets before 17 says so of whatever it rejects.
    assert [line for line in failed if "opening handshake failed" not in line] == []


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Return a PEM file with a key and a certificate for 127.0.0.1, and what trusts it."""
    authority = trustme.CA()
    pem = tmp_path_factory.mktemp("tls") / "127.0.0.1.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return pem, trust
