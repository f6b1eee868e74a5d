"""Who is let in, plain HTTP, code that blocks, and the greeting that is fetched at the start."""

import asyncio
import faulthandler
import itertools
import re
import signal
import ssl
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twilio.request_validator import RequestValidator
from websockets import Headers
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import twilio_aura
from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.ngrok import Ngrok, tunnel
from tests.standins.process import Server, reserved_ports
from tests.standins.telephone import HANDSHAKE, dial, sign
from tests.standins.twilio import TOKEN

VECTORS_TOKEN = "12345"
VECTORS = {  # Twilio's, for this token
    "wss://example.com/media": "7PR3qMkpDyEJtMrVOY/LDyNq8J8=",
    "wss://example.com/media/": "T+WBXwUXC0/CyoZ1DA+p9ilZORs=",
    "wss://example.com:443/media": "zyyJQiPZXIGCLy3HYdHEfry0yDg=",
}


async def rejected(url: str, **headers: str) -> int:
    """Return the status that rejects a handshake with these headers."""
    with pytest.raises(InvalidStatus) as caught:
        async with dial(url, headers=headers):
            pass
    return caught.value.response.status_code


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


def with_signature(signature: bytes) -> bytes:
    """Return the handshake with this signature."""
    return HANDSHAKE.removesuffix(b"\r\n") + b"X-Twilio-Signature: " + signature + b"\r\n\r\n"


# The handshake


async def test_no_compression(server: Server) -> None:
    """Compression, which would cost every call memory and time, is not agreed to."""
    async with connect(server.url, compression="deflate", proxy=None) as ws:
        assert ws.request is not None
        assert ws.response is not None
        assert "Sec-WebSocket-Extensions" in ws.request.headers
        assert "Sec-WebSocket-Extensions" not in ws.response.headers


@pytest.mark.parametrize("origin", ["https://example.com", "http://localhost:5000", "null"])
async def test_browsers(server: Server, origin: str) -> None:
    """A browser's page, which says its origin, is rejected: Twilio has none."""
    assert await rejected(server.url, Origin=origin) == 403


@pytest.mark.parametrize("path", ["/", "/twilio/", "/twilio2", "/twilio?x=1", "/healthz/"])
async def test_other_paths(server: Server, path: str) -> None:
    """Any path but /twilio, a usual mistake, is a 404 before the upgrade, and is named."""
    since = len(server.log)
    assert await rejected(server.url.replace("/twilio", path)) == 404
    await server.until(lambda: f"the path must be /twilio, not '{path}'\n" in server.log[since:])


async def test_max_calls(deepgram: Deepgram) -> None:
    """More than MAX_CALLS at once are rejected with 503, and let in again when there is room."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "MAX_CALLS": "5"}) as server:
        enough = asyncio.Event()
        statuses: list[int] = []

        async def call() -> None:
            try:
                async with dial(server.url) as phone:
                    statuses.append(101)
                    await phone.until_heard(noise(GREETING))
                    await enough.wait()
                    await phone.hang_up()
            except InvalidStatus as error:
                statuses.append(error.response.status_code)
            if len(statuses) == 20:
                enough.set()

        await asyncio.gather(*(call() for _ in range(20)))
        assert sorted(statuses) == [101] * 5 + [503] * 15
        await server.logged("WARNING rejected a call: MAX_CALLS=5 reached")
        await server.until(lambda: server.log.count(" ended: ") == 5)
        async with dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))


def accept_queue() -> int:
    """Return how many connections Linux lets wait for a server, whatever that server wants."""
    path = Path("/proc/sys/net/core/somaxconn")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.skipif(accept_queue() < 1024, reason="the system lets fewer wait")
async def test_backlog(deepgram: Deepgram) -> None:
    """450 connections at once are taken while the server is busy: none is to try again later."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        server.signal(signal.SIGSTOP)
        opening = [asyncio.open_connection("127.0.0.1", server.port) for _ in range(450)]
        connections = await asyncio.gather(*opening)
        server.signal(signal.SIGCONT)
        for _, writer in connections:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize("has_tls", [False, True])
async def test_half_open(
    deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], has_tls: bool
) -> None:
    """Who connects and does not go on is let go soon, so that he does not hold a file open."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TLS_CERT": str(certificate[0]) if has_tls else None}
    async with Server(settings, HANDSHAKE_SECONDS=0.2) as server:
        async with asyncio.timeout(8):  # by default websockets waits for 10 s, and TLS for 60 s
            for sent in (b"", HANDSHAKE[:50]):
                assert await exchange(server, sent) == b""


# The signature


def is_signed(signature: str, public_url: str, token: str = TOKEN, **headers: str) -> bool:
    """Return whether a handshake with this signature and these headers is let in."""
    fields = Headers(headers | {"X-Twilio-Signature": signature})
    return twilio_aura.is_signed(fields, token, public_url)


@pytest.mark.parametrize(
    "public_url", [*VECTORS, "https://example.com/media", "WSS://example.com/media"]
)
def test_vectors(public_url: str) -> None:
    """Twilio's vectors: with and without slash and :443 a URL is the same; https is not wss."""
    for signature in VECTORS.values():
        assert is_signed(signature, public_url, VECTORS_TOKEN, Host="127.0.0.1")
    for signature in (
        "6HZQ7Cq/dSYDCAiy3qRA6PZfACI=",
        *sign("wss://example.com/media", "54321").values(),
        *sign("wss://example.com/mediax", VECTORS_TOKEN).values(),
        *sign("wss://127.0.0.1/twilio", VECTORS_TOKEN).values(),
    ):
        assert not is_signed(signature, public_url, VECTORS_TOKEN, Host="127.0.0.1")


HOST = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z]+)+(:[1-9][0-9]{0,4})?"


@given(host=st.from_regex(HOST, fullmatch=True))
@hypothesis_settings(max_examples=30)
def test_against_twilio(host: str) -> None:
    """What Twilio's own validator computes for the Host is accepted, and nothing else is."""

    def signature(url: str) -> str:
        return str(RequestValidator(TOKEN).compute_signature(url, {}))

    url = f"wss://{host}/twilio"
    good = signature(url)
    assert sign(url, TOKEN) == {"X-Twilio-Signature": good}
    assert is_signed(good, "", TOKEN, Host=host)
    for bad in (signature(url + "x"), signature(url.replace("wss", "https")), "", good + "\xa0"):
        assert not is_signed(bad, "", TOKEN, Host=host)


def test_path_in_host() -> None:
    """A Host has no say in the path: what Twilio signed for another service is not let in."""
    signature = sign("wss://example.com/media", TOKEN)["X-Twilio-Signature"]
    assert not is_signed(signature, "", Host="example.com/media")
    signature = sign("wss://example.com/twilio", TOKEN)["X-Twilio-Signature"]
    assert is_signed(signature, "", Host="example.com")


async def test_signature(deepgram: Deepgram) -> None:
    """With a token, only a handshake that Twilio signed is upgraded; else it is a 403."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    async with Server(settings) as server:
        assert "TWILIO_AUTH_TOKEN is not set" not in server.log
        await server.logged("WARNING set PUBLIC_URL: ")
        good = sign(server.url, TOKEN)
        async with dial(server.url, headers=good) as phone:
            await phone.until_heard(noise(GREETING))
        assert await rejected(server.url, **good, Host="example.com") == 403  # a second one
        for handshake in (
            with_signature(b"none"),
            with_signature(b"\xe9"),
            with_signature(b"\x80\xff" + good["X-Twilio-Signature"].encode()),
            with_signature(b"none").replace(b"localhost", b"\xe9\xff"),
        ):
            assert (await exchange(server, handshake)).startswith(b"HTTP/1.1 403 ")
        server.signal()
        assert await server.end() == 0
        assert TOKEN not in server.log
        assert KEY not in server.log
        assert "Traceback" not in server.log


async def test_what_is_wrong_with_a_signature(deepgram: Deepgram) -> None:
    """A handshake that has no signature is told from one whose signature does not match."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}
    async with Server(settings) as server:
        assert await rejected(server.url) == 403
        assert await server.logged(" WARNING .* without X-Twilio-Signature: .* proxy does not pass")
        assert not server.lines("does not match")
        assert await rejected(server.url, **sign("wss://example.com/twilio", TOKEN)) == 403
        line = await server.logged("X-Twilio-Signature does not match")
        assert f"'wss://127.0.0.1:{server.port}/twilio'" in line
        for hint in ("PUBLIC_URL", "TWILIO_AUTH_TOKEN", "subaccount or region"):
            assert hint in line


async def test_signature_behind_a_proxy(deepgram: Deepgram) -> None:
    """What counts behind a proxy that rewrites Host is PUBLIC_URL."""
    settings = {"TWILIO_AUTH_TOKEN": TOKEN, "PUBLIC_URL": "https://voice.example.com"}
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        async with dial(server.url, headers=sign("wss://voice.example.com/twilio", TOKEN)) as phone:
            await phone.until_heard(noise(GREETING))
        assert server.complaints() == []
        assert await rejected(server.url, **sign(server.url, TOKEN)) == 403


async def test_signature_behind_ngrok(deepgram: Deepgram) -> None:
    """What counts without PUBLIC_URL is what ngrok said at the start, and not the Host."""
    with reserved_ports(1) as (port,):
        async with Ngrok() as ngrok:
            ngrok.lists(tunnel("https://ours.ngrok.app", port))
            settings = {"TWILIO_AUTH_TOKEN": TOKEN, "PORT": str(port)}
            settings["DEEPGRAM_URL"] = deepgram.url
            async with Server(settings, NGROK_API=ngrok.url) as server:
                good = sign("wss://ours.ngrok.app/twilio", TOKEN)
                async with dial(server.url, headers=good) as phone:
                    await phone.until_heard(noise(GREETING))
                assert server.complaints() == []
                assert await rejected(server.url, **sign(server.url, TOKEN)) == 403


# Plain HTTP


async def http(server: Server, method: str, path: str) -> requests.Response:
    """Ask `server` over plain HTTP."""
    url = f"http://127.0.0.1:{server.port}{path}"
    return await asyncio.to_thread(requests.request, method, url, timeout=10)


async def test_plain_http(deepgram: Deepgram) -> None:
    """GET /healthz tells the number of calls, what else is no handshake is rejected."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        await server.logged("the greeting is ready")
        since = len(server.log)
        answer = await http(server, "GET", "/healthz")
        assert (answer.status_code, answer.text) == (200, "0 calls\n")
        assert answer.headers["Content-Type"].startswith("text/plain")
        async with dial(server.url, start=False), dial(server.url, start=False):
            assert (await http(server, "GET", "/healthz")).text == "2 calls\n"
        for path in ("/", "/healthz/x", "/robots.txt"):
            assert (await http(server, "GET", path)).status_code == 404
        assert server.complaints(since) == []
        # websockets 15 and 16 log this, after they have answered.
        assert (await http(server, "GET", "/twilio")).status_code == 426


SPOILED_BY_A_PROXY = HANDSHAKE.replace(b"Connection: Upgrade\r\n", b"")
ODD_REQUESTS = [
    b"GET /healthz HTTP/1.0\r\n\r\n",
    b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /twilio HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /twilio HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /twilio HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET " + b"x" * 100_000,
    b"\x16\x03\x01\x02\x00\x01\x00",  # as TLS begins
    b"",
    HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    HANDSHAKE.replace(b"Version: 13", b"Version: 8"),
    HANDSHAKE.replace(b"/twilio", b"/\xe2\x82\xac"),
    HANDSHAKE.replace(b"GET", b"POST"),
    HANDSHAKE.replace(b"GET", b"HEAD"),
]


async def test_odd_requests(deepgram: Deepgram) -> None:
    """Whatever else is asked, it does not get in, does not hang, and disturbs no one.

    What is answered is websockets' own affair, and differs between its versions; why it rejects a
    handshake is logged at DEBUG, but not each frame.
    """
    settings = {"DEEPGRAM_URL": deepgram.url, "LOG_LEVEL": "DEBUG"}
    async with Server(settings) as server, dial(server.url) as phone:
        await phone.until_heard(noise(GREETING))
        assert (await exchange(server, SPOILED_BY_A_PROXY)).startswith(b"HTTP/1.1 426 ")
        await server.logged(r" INFO connection rejected \(426 ")
        for request in ODD_REQUESTS:
            assert b" 101 " not in (await exchange(server, request, eof=True))[:20], request
        await phone.hang_up()
        assert (await server.until_ended(phone.call_sid)).startswith("hung up;")
        assert server.lines(" DEBUG .*media") == []


# Code that blocks


@pytest.mark.parametrize(("seconds", "is_named"), [(0.9, False), (1.1, True), (70.0, True)])
async def test_standstill(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    is_named: bool,
) -> None:
    """An event loop that stood still for a second or more is told, with how long and what to do."""
    moments = itertools.count(0.0, seconds)
    monkeypatch.setattr(twilio_aura, "time", SimpleNamespace(monotonic=moments.__next__))
    monkeypatch.setattr(twilio_aura, "BEAT_SECONDS", 0)
    beating = asyncio.create_task(twilio_aura.name_what_blocks())
    for _ in range(3):
        await asyncio.sleep(0)
    beating.cancel()
    faulthandler.cancel_dump_traceback_later()
    assert (caplog.messages != []) == is_named
    for message in caplog.messages:
        assert message.startswith(f"the event loop stood still for {seconds:.1f} s, ")
        assert "asyncio.to_thread" in message


async def blocks(call: twilio_aura.Call) -> None:
    """Do what no script should."""
    time.sleep(2)  # noqa: ASYNC251
    await call.say("That took a while.")


async def test_what_blocks(deepgram: Deepgram) -> None:
    """While code still blocks the event loop, the log says where it is, and then for how long."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "PUBLIC_URL": "localhost"}
    async with (
        Server(settings, blocks, DUMP_SECONDS=1) as server,
        dial(server.url, headers=sign("wss://localhost/twilio", TOKEN)) as phone,
    ):
        await server.until(lambda: "Timeout (0:00:01)!" in server.full_log)
        assert phone.events == []
        await phone.hears(noise("That took a while."))
    line = blocks.__code__.co_firstlineno + 2
    assert f'File "{__file__}", line {line} in blocks\n' in server.full_log
    seconds = re.findall(r" WARNING the event loop stood still for (\S+) s, ", server.full_log)
    assert max(map(float, seconds)) >= 2
    # Where nothing is to be logged, the tests do not see what only shows that the machine is slow.
    assert server.complaints() == []


# The greeting


async def test_greeting_is_fetched_at_the_start(deepgram: Deepgram) -> None:
    """The greeting is fetched before anybody calls, so that the first caller has it at once."""
    greeting = "Fetched at the start."
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        await server.logged("INFO the greeting is ready")
        async with dial(server.url) as phone:
            await phone.hears(noise(greeting))
    assert len(deepgram.asked(greeting)) == 1


async def test_slow_greeting(deepgram: Deepgram) -> None:
    """A greeting that takes its time delays nobody who hears something else."""
    go = asyncio.Event()
    greeting = deepgram.answer("A slow greeting.", Answer(gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}
    async with Server(settings) as server:
        async with dial(server.url, parameters={"text": "Meanwhile."}) as phone:
            await phone.hears(noise("Meanwhile."))
        assert not server.lines("the greeting is ready")
        go.set()
        await server.logged("INFO the greeting is ready")


async def test_greeting_that_fails_for_now() -> None:
    """With Deepgram out of reach the server warns and serves, and the next caller tries again."""
    async with Deepgram() as away:
        pass
    async with Server({"DEEPGRAM_URL": away.url}) as server:
        await server.logged("WARNING could not prefetch the greeting")
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        async with Deepgram(port=away.port), dial(server.url) as phone:
            await phone.hears(noise(GREETING))


async def test_connection_is_kept_warm() -> None:
    """While nothing is requested, the server has a connection to Deepgram that was used lately."""
    async with Deepgram() as deepgram:
        async with Server({"DEEPGRAM_URL": deepgram.url}, MAX_IDLE_SECONDS=0.4) as server:
            await deepgram.until(lambda: len(deepgram.heads) >= 3)
            assert not server.lines(" ERROR ")
        assert len({head.connection for head in deepgram.heads}) == len(deepgram.heads)
