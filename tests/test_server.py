"""Who is let in, and what is asked over plain HTTP."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import requests
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twilio.request_validator import RequestValidator
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.standins.deepgram import GREETING, KEY, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, dial, sign
from tests.standins.twilio import TOKEN

VECTORS = {  # Twilio's, for the token 12345
    "wss://example.com/media": "7PR3qMkpDyEJtMrVOY/LDyNq8J8=",
    "wss://example.com/media/": "T+WBXwUXC0/CyoZ1DA+p9ilZORs=",
    "wss://example.com:443/media": "zyyJQiPZXIGCLy3HYdHEfry0yDg=",
}


async def http(server: Server, method: str, path: str) -> requests.Response:
    """Ask `server` over plain HTTP."""
    url = f"http://127.0.0.1:{server.port}{path}"
    return await asyncio.to_thread(requests.request, method, url, timeout=10)


async def rejected(url: str, **headers: str) -> int:
    """Return the status that rejects a handshake with these headers."""
    with pytest.raises(InvalidStatus) as caught:
        async with dial(url, headers=headers):
            pass
    return caught.value.response.status_code


async def test_no_compression(server: Server) -> None:
    """Compression, which would cost every call memory and time, is not agreed to."""
    async with connect(server.url, compression="deflate", proxy=None) as ws:
        assert ws.request is not None
        assert ws.response is not None
        assert "Sec-WebSocket-Extensions" in ws.request.headers
        assert "Sec-WebSocket-Extensions" not in ws.response.headers


async def test_browsers(server: Server) -> None:
    """A browser's page, which says its origin, is rejected: Twilio has none."""
    for origin in ("https://example.com", "http://localhost:5000", "null"):
        assert await rejected(server.url, Origin=origin) == 403


@pytest.mark.parametrize("path", ["/", "/twilio/", "/twilio2", "/twilio?x=1", "/healthz/"])
async def test_other_paths(server: Server, path: str) -> None:
    """Any path but /twilio is a 404 before the upgrade."""
    assert await rejected(server.url.replace("/twilio", path)) == 404


async def test_other_path_is_named(deepgram: Deepgram) -> None:
    """A handshake at another path, a usual mistake, is in the log; a crawler's request is not."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        assert await rejected(server.url.replace("/twilio", "/media\u20ac")) == 404
        assert (await http(server, "GET", "/robots.txt")).status_code == 404
        warning = "WARNING rejected a handshake: the path is /twilio, not '/media"
        assert await server.logged(warning)
        assert "robots" not in server.log


@pytest.mark.parametrize("public_url", [*VECTORS, "WSS://example.com/media"])
async def test_vectors(deepgram: Deepgram, public_url: str) -> None:
    """Twilio's vectors: with and without slash and :443 a URL is the same; https is not wss."""
    settings = {"TWILIO_AUTH_TOKEN": "12345", "PUBLIC_URL": public_url}
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        assert '<Stream url="wss://example.com' in server.output
        for signature in VECTORS.values():
            async with dial(server.url, headers={"X-Twilio-Signature": signature}):
                pass
        for headers in (
            {"X-Twilio-Signature": "6HZQ7Cq/dSYDCAiy3qRA6PZfACI="},
            sign("wss://example.com/media", "54321"),
            sign("wss://example.com/mediax", "12345"),
        ):
            assert await rejected(server.url, **headers) == 403


hosts = st.from_regex(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z]+)+", fullmatch=True)


@pytest_asyncio.fixture(scope="module")
async def signed(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server that rejects what Twilio did not sign."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "ERROR"}
    async with Server(settings) as running:
        yield running


@given(host=hosts)
@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_against_twilio(signed: Server, host: str) -> None:
    """What Twilio's own validator computes for the Host is accepted, and nothing else is."""

    async def status(signature: str) -> bytes:
        handshake = HANDSHAKE.replace(b"localhost", host.encode())
        header = f"X-Twilio-Signature: {signature}\r\n\r\n".encode("latin-1")
        reader, writer = await asyncio.open_connection("127.0.0.1", signed.port)
        writer.write(handshake.removesuffix(b"\r\n") + header)
        line = await reader.readline()
        writer.transport.abort()
        return line.split()[1]

    def signature(url: str) -> str:
        return str(RequestValidator(TOKEN).compute_signature(url, {}))

    url = f"wss://{host}/twilio"
    good = signature(url)
    assert sign(url, TOKEN) == {"X-Twilio-Signature": good}
    assert await status(good) == b"101"
    others = (signature(url + "x"), signature(url.replace("wss", "https")))
    for bad in (*others, "", "\xe9" + good, "\x80\xff", good + "\xa0"):
        assert await status(bad) == b"403"


async def test_signature(deepgram: Deepgram) -> None:
    """With an auth token, only a handshake that Twilio signed is upgraded; else it is a 403."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    async with Server(settings) as server:
        assert "TWILIO_AUTH_TOKEN is not set" not in server.log
        good = sign(server.url, TOKEN)
        async with dial(server.url, headers=good) as phone:
            await phone.until_heard(noise(GREETING))
        async with dial(server.url, headers=sign(server.url + "/", TOKEN)):
            pass
        assert await rejected(server.url) == 403
        assert await rejected(server.url, **sign("wss://example.com/twilio", TOKEN)) == 403
        assert await rejected(server.url, **{"X-Twilio-Signature": "\xe9"}) == 403
        assert await rejected(server.url, **good, Host="example.com") == 403  # a second one
        await server.logged("WARNING rejected a handshake: X-Twilio-Signature does not match 'wss:")
        server.signal()
        assert await server.end() == 0
        assert TOKEN not in server.log
        assert KEY not in server.log
        assert "Traceback" not in server.log


async def test_signature_behind_a_proxy(deepgram: Deepgram) -> None:
    """What counts behind a proxy that rewrites Host is PUBLIC_URL."""
    settings = {
        "DEEPGRAM_URL": deepgram.url,
        "TWILIO_AUTH_TOKEN": TOKEN,
        "PUBLIC_URL": "https://voice.example.com",
    }
    async with Server(settings) as server:
        async with dial(server.url, headers=sign("wss://voice.example.com/twilio", TOKEN)) as phone:
            await phone.until_heard(noise(GREETING))
        assert await rejected(server.url, **sign(server.url, TOKEN)) == 403


async def test_no_auth_token(server: Server) -> None:
    """Without an auth token the server says, once, what that means."""
    assert server.log.count("anyone can spend your Deepgram credit") == 1


async def test_max_calls(deepgram: Deepgram) -> None:
    """More than MAX_CALLS at once are rejected with 503, and let in again when there is room."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "MAX_CALLS": "5"}) as server:
        for _ in range(2):
            statuses: list[int] = []
            everyone = asyncio.Event()

            async def call(statuses: list[int], everyone: asyncio.Event) -> None:
                try:
                    async with dial(server.url) as phone:
                        await phone.until_heard(noise(GREETING))
                        statuses.append(101)
                        await everyone.wait()
                        await phone.hang_up()
                    await server.until_ended(phone.call_sid)
                except InvalidStatus as error:
                    statuses.append(error.response.status_code)

            async with asyncio.TaskGroup() as callers:
                for _ in range(20):
                    callers.create_task(call(statuses, everyone))
                while len(statuses) < 20:
                    await asyncio.sleep(0.01)
                everyone.set()
            assert sorted(statuses) == [101] * 5 + [503] * 15
        await server.logged("WARNING rejected a call: MAX_CALLS=5 reached")


def accept_queue() -> int:
    """Return how many connections Linux lets wait for a server, whatever that server wants."""
    path = Path("/proc/sys/net/core/somaxconn")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.skipif(accept_queue() < 1024, reason="the system lets fewer wait")
async def test_backlog(server: Server) -> None:
    """450 connections at once are taken while the server is busy: none is to try again later."""
    server.signal(signal.SIGSTOP)
    try:
        opening = [asyncio.open_connection("127.0.0.1", server.port) for _ in range(450)]
        connections = await asyncio.gather(*opening)
    finally:
        server.signal(signal.SIGCONT)
    for _, writer in connections:
        writer.close()
        await writer.wait_closed()


# Plain HTTP


async def test_health(deepgram: Deepgram) -> None:
    """GET /healthz tells the number of calls, as JSON, and is not logged."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        await server.logged("the greeting is ready")
        before = len(server.log)
        answer = await http(server, "GET", "/healthz")
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json() == {"calls": 0}
        assert server.complaints(before) == []
        async with dial(server.url, start=False):
            assert (await http(server, "GET", "/healthz")).json() == {"calls": 1}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/healthz/x", 404),
        ("GET", "/twilio", 426),
        ("OPTIONS", "/", 404),
    ],
)
async def test_plain_http(server: Server, method: str, path: str, status: int) -> None:
    """What is no handshake is answered, and not logged."""
    before = len(server.log)
    assert (await http(server, method, path)).status_code == status
    assert server.complaints(before) == []


@pytest.mark.parametrize(
    ("handshake", "status"),
    [
        (HANDSHAKE.replace(b"Connection: Upgrade\r\n", b""), 426),
        (HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    ],
)
async def test_rejected_by_websockets(deepgram: Deepgram, handshake: bytes, status: int) -> None:
    """What a proxy has spoiled websockets rejects on its own, and says so at DEBUG."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "LOG_LEVEL": "debug"}) as server:
        assert (await exchange(server, handshake)).startswith(b"HTTP/1.1 %d " % status)
        assert await server.logged(rf"INFO connection rejected \({status} ")


async def exchange(server: Server, sent: bytes, *, eof: bool = False) -> bytes:
    """Send these bytes to `server`; return all that it answers until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    if eof:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_health_as_haproxy_asks(server: Server) -> None:
    """HTTP/1.0 without a header is enough to ask for the health."""
    answer = await exchange(server, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /twilio HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /twilio HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET " + b"x" * 100_000,
        b"",
    ],
)
async def test_strangers(server: Server, sent: bytes) -> None:
    """Whatever else connects is let go without a word, and disturbs no one."""
    before = len(server.log)
    assert not (await exchange(server, sent, eof=True)).startswith(b"HTTP/1.1 1")
    assert server.complaints(before) == []
    async with dial(server.url) as phone:
        await phone.until_heard(noise(GREETING))
    await server.until_ended(phone.call_sid)
