"""Who is let in, what is asked over plain HTTP, and how the server ends."""

import asyncio
import signal
import ssl
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from twilio.request_validator import RequestValidator
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from tests.deepgram import KEY, Answer, Deepgram, noise
from tests.server import Server, edited
from tests.telephone import dial
from twilio_aura import pieces, signed_by_twilio

GREETING = noise("Hello, how are you today?")
TOKEN = "12345"
VECTORS = {
    "wss://example.com/media": "7PR3qMkpDyEJtMrVOY/LDyNq8J8=",
    "wss://example.com/media/": "T+WBXwUXC0/CyoZ1DA+p9ilZORs=",
    "wss://example.com:443/media": "zyyJQiPZXIGCLy3HYdHEfry0yDg=",
}


async def http(server: Server, method: str, path: str) -> requests.Response:
    """Ask `server` over plain HTTP."""
    url = f"http://127.0.0.1:{server.port}{path}"
    return await asyncio.to_thread(requests.request, method, url, timeout=10)


async def refused(url: str, **headers: str) -> int:
    """Return the status that a handshake with these headers is refused with."""
    with pytest.raises(InvalidStatus) as caught:
        async with dial(url, headers=headers):
            pass
    return caught.value.response.status_code


# The handshake


async def test_no_compression(server: Server) -> None:
    """Compression, which would cost every call memory and time, is not agreed to."""
    async with connect(server.url, compression="deflate", proxy=None) as ws:
        assert ws.request is not None
        assert ws.response is not None
        assert "Sec-WebSocket-Extensions" in ws.request.headers
        assert "Sec-WebSocket-Extensions" not in ws.response.headers


@pytest.mark.parametrize("path", ["/", "/twilio/", "/twilio2", "/twilio?x=1", "/healthz/"])
async def test_other_paths(server: Server, path: str) -> None:
    """Any path but /twilio is a 404 before the upgrade."""
    assert await refused(server.url.replace("/twilio", path)) == 404


@pytest.mark.parametrize("written", VECTORS)
@pytest.mark.parametrize("ours", VECTORS)
def test_vectors(ours: str, written: str) -> None:
    """Twilio's vectors: with and without slash and :443 a URL is the same; https is not wss."""
    assert signed_by_twilio(TOKEN, ours, VECTORS[written])
    assert not signed_by_twilio(TOKEN, ours, "6HZQ7Cq/dSYDCAiy3qRA6PZfACI=")
    assert not signed_by_twilio("54321", ours, VECTORS[written])


hosts = st.from_regex(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z]+)+", fullmatch=True)


@given(token=st.from_regex("[0-9a-f]{32}", fullmatch=True), host=hosts)
def test_against_twilio(token: str, host: str) -> None:
    """What Twilio's own validator computes is accepted, and nothing else is."""
    url = f"wss://{host}/twilio"
    signature = RequestValidator(token).compute_signature(url, {})
    assert signed_by_twilio(token, url, signature)
    assert not signed_by_twilio(token, url + "x", signature)
    assert not signed_by_twilio(token, url.replace("wss", "https"), signature)
    assert not signed_by_twilio(token + "0", url, signature)
    assert not signed_by_twilio(token, url, "")
    assert not signed_by_twilio(token, url, "\xe9" + signature)


def sign(url: str) -> dict[str, str]:
    """Return the header with which Twilio connects to `url`."""
    return {"X-Twilio-Signature": RequestValidator(TOKEN).compute_signature(url, {})}


async def test_signature(deepgram: Deepgram) -> None:
    """With an auth token, only a handshake that Twilio signed is upgraded; else it is a 403."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    async with Server(settings) as server:
        assert "TWILIO_AUTH_TOKEN is not set" not in server.log
        public = server.url.replace("ws://", "wss://")
        async with dial(server.url, headers=sign(public)) as phone:
            await phone.until_heard(GREETING)
        async with dial(server.url, headers=sign(public + "/")):
            pass
        assert await refused(server.url) == 403
        assert await refused(server.url, **sign("wss://example.com/twilio")) == 403
        assert await refused(server.url, **{"X-Twilio-Signature": "\xe9"}) == 403
        assert await refused(server.url, **sign(public), Host="example.com") == 403  # a second one
        await server.logged("WARNING refused a handshake that Twilio did not sign for 'wss://127")
        server.signal()
        assert await server.end() == 0
        assert TOKEN not in server.log.replace("127.0.0.1", "")
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
        async with dial(server.url, headers=sign("wss://voice.example.com/twilio")) as phone:
            await phone.until_heard(GREETING)
        assert await refused(server.url, **sign(server.url.replace("ws:", "wss:"))) == 403


async def test_no_auth_token(server: Server) -> None:
    """Without an auth token the server says, once, what that means."""
    assert server.log.count("anyone who finds the address can spend your Deepgram credit") == 1


async def test_max_calls(deepgram: Deepgram) -> None:
    """More than MAX_CALLS at once are refused with 503, and let in again when there is room."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "MAX_CALLS": "5"}) as server:
        for _ in range(2):
            statuses: list[int] = []
            everyone = asyncio.Event()

            async def call(statuses: list[int], everyone: asyncio.Event) -> None:
                try:
                    async with dial(server.url) as phone:
                        await phone.until_heard(GREETING)
                        statuses.append(101)
                        await everyone.wait()
                        await phone.hang_up()
                    await server.logged(f"{phone.call_sid} ended")
                except InvalidStatus as error:
                    statuses.append(error.response.status_code)

            async with asyncio.TaskGroup() as callers:
                for _ in range(20):
                    callers.create_task(call(statuses, everyone))
                while len(statuses) < 20:
                    await asyncio.sleep(0.01)
                everyone.set()
            assert sorted(statuses) == [101] * 5 + [503] * 15
        await server.logged("WARNING refused a call: MAX_CALLS=5 are under way")


async def test_tls(deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext]) -> None:
    """With TLS_CERT and TLS_KEY the server speaks TLS itself."""
    pem, trust = certificate
    settings = {"DEEPGRAM_URL": deepgram.url, "TLS_CERT": str(pem), "TLS_KEY": str(pem)}
    async with Server(settings) as server:
        assert server.output.startswith(f"Listening on wss://127.0.0.1:{server.port}/twilio")
        async with dial(server.url, ssl=trust) as phone:
            await phone.until_heard(GREETING)
        with pytest.raises((OSError, InvalidHandshake)):
            async with dial(server.url.replace("wss", "ws")):
                pass


# Plain HTTP


async def test_health(closing: Server) -> None:
    """GET /healthz tells the number of calls, as JSON; nothing of it is logged above DEBUG."""
    lines = len(closing.log.splitlines())
    answer = await http(closing, "GET", "/healthz")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"calls": 0}
    async with dial(closing.url, start=False):
        assert (await http(closing, "GET", "/healthz")).json() == {"calls": 1}
    head = await http(closing, "HEAD", "/healthz")
    assert (head.status_code, head.content) == (200, b"")
    said = [line for line in closing.log.splitlines()[lines:] if "ended: hung up" not in line]
    assert [line for line in said if " DEBUG " not in line] == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("HEAD", "/", 404),
        ("GET", "/healthz/x", 404),
        ("POST", "/healthz", 405),
        ("DELETE", "/twilio", 405),
        ("OPTIONS", "/", 405),
        ("GET", "/twilio", 426),
    ],
)
async def test_plain_http(server: Server, method: str, path: str, status: int) -> None:
    """What is no handshake is answered, and not logged."""
    before = server.log
    assert (await http(server, method, path)).status_code == status
    assert server.log == before


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


async def test_head(server: Server) -> None:
    """The answer to a HEAD ends with its headers."""
    answer = await exchange(server, b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")


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
    before = server.log
    assert not (await exchange(server, sent, eof=True)).startswith(b"HTTP/1.1 1")
    assert server.log == before
    async with dial(server.url) as phone:
        await phone.until_heard(GREETING)
    await server.logged(f"{phone.call_sid} ended")


# The end


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_nobody_on_the_line(deepgram: Deepgram, signum: int) -> None:
    """With nobody on the line a stop is immediate, even with a connection that asks nothing."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        server.signal(signum)
        assert await asyncio.wait_for(server.end(), 5) == 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_drain(deepgram: Deepgram, signum: int) -> None:
    """Who is being spoken to hears the sentence out, whoever is not is let go, nobody gets in."""
    go = asyncio.Event()
    text = deepgram.answer(f"drained by {signum}", Answer(hold=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with (
            dial(server.url) as idle,
            dial(server.url, parameters={"text": text}) as listening,
            dial(server.url, start=False) as connected,
        ):
            await idle.until_heard(GREETING)
            await listening.until_sound()
            server.signal(signum)
            await server.logged("INFO stopping: 3 calls are under way")
            assert await idle.until_closed() == 1000
            with pytest.raises(OSError, match=r"Connect call failed|refused"):
                async with dial(server.url):
                    pass
            await connected.start()  # it was let in before, so it is served
            assert await connected.until_closed() == 1000
            assert connected.heard == GREETING
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise(text)
        assert await server.end() == 0
        for phone in (idle, listening, connected):
            await server.logged(f"{phone.call_sid} ended: drained")
        assert "Traceback" not in server.log


async def test_drain_a_conversation(deepgram: Deepgram, tmp_path: Path) -> None:
    """A script that waits for a key is over at once, one that speaks after the text it is at."""
    module = edited(
        tmp_path,
        "async def script(call: Call) -> AsyncGenerator[str, None]:\n"
        "    yield 'One.'\n"
        "    await call.digit()\n"
        "    yield 'Two.'\n"
        "    yield 'Three.'\n",
    )
    go = asyncio.Event()
    deepgram.answer("Two.", Answer(hold=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}, module=module) as server:
        async with dial(server.url) as waiting, dial(server.url) as listening:
            await waiting.until_mark()
            await listening.until_mark()
            await listening.press("1")
            await deepgram.until_asked("Two.")
            server.signal()
            assert await waiting.until_closed() == 1000
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise("One.") + noise("Two.")
        assert await server.end() == 0


async def test_drain_seconds(deepgram: Deepgram) -> None:
    """When DRAIN_SECONDS are over, the rest are closed with 1001."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1"}) as server:
        async with dial(server.url, returns_marks=False, speed=0.01) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        await server.logged(f"WARNING call {phone.call_sid} ended: cut off")


async def test_asked_while_draining(deepgram: Deepgram) -> None:
    """While draining, who had connected before is told 503: health check and caller alike."""
    requests = [
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /twilio HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        early = [await asyncio.open_connection("127.0.0.1", server.port) for _ in requests]
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal()
            await server.logged("stopping: 1 calls are under way")
            for request, (reader, writer) in zip(requests, early, strict=True):
                writer.write(request)
                assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
                writer.close()
                await writer.wait_closed()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


async def test_second_signal(deepgram: Deepgram) -> None:
    """A second signal ends it at once."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}) as server:
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal(signal.SIGINT)
            await server.logged("stopping: 1 calls are under way")
            server.signal(signal.SIGINT)
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


async def test_refused_greeting_lets_callers_go(deepgram: Deepgram) -> None:
    """When Deepgram refuses the key, callers who are already there hear the <Say>."""
    greeting = deepgram.answer("no", Answer(status=402, body=b"no credit", delay_seconds=0.3))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        assert await server.end() == 1
        assert "CRITICAL no call could be answered: not serving" in server.log


# Nothing accumulates


async def test_nothing_is_left(server: Server, deepgram: Deepgram) -> None:
    """After hundreds of calls that hung up somewhere, no thread and no socket of theirs is left."""
    process = psutil.Process(server.process.pid)

    async def call(number: int) -> None:
        text = deepgram.answer(f"left {number % 40}", Answer(pieces=(100,)))
        async with dial(server.url, start=number % 7 > 0, parameters={"text": text}) as phone:
            if number % 3:
                await asyncio.sleep(number % 10 / 500)
            else:
                await phone.until_sound() if number % 7 else None
            if number % 2:
                phone.drop()

    for _ in range(4):
        await asyncio.gather(*map(call, range(100)))
    await deepgram.until(lambda: deepgram.under_way == 0)
    while (await http(server, "GET", "/healthz")).json() != {"calls": 0}:
        await asyncio.sleep(0.01)
    while process.num_threads() > 2:  # the main one and the one that asked ngrok
        await asyncio.sleep(0.01)
    while [one for one in process.net_connections() if one.raddr and one.laddr[1] == server.port]:
        await asyncio.sleep(0.01)
    assert len(process.net_connections()) <= 1 + 15  # it listens; connections are kept warm


# Cutting texts


@given(st.text(st.sampled_from("ab .!?。\"'\n"), max_size=9000))
def test_pieces(text: str) -> None:
    """Pieces have at most 2000 characters, no white space around, and lose only white space."""
    cut = pieces(text)
    assert all(0 < len(piece) <= 2000 and piece == piece.strip() for piece in cut)
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_piece_ends() -> None:
    """A piece ends with a sentence, else with a word, else anywhere."""
    assert pieces(" \n ") == []
    assert pieces(" a. b ") == ["a. b"]
    assert pieces("a" * 2500) == ["a" * 2000, "a" * 500]
    assert pieces("word " * 500) == ["word " * 399 + "word", "word " * 99 + "word"]
    assert pieces("a" * 1999 + ". b") == ["a" * 1999 + ".", "b"]
    assert pieces('He said "' + "a " * 700 + '!" ' + "b " * 700) == [
        'He said "' + "a " * 700 + '!"',
        ("b " * 700).strip(),
    ]
    assert pieces("3.14 " * 399 + "e. " + "x " * 10) == ["3.14 " * 399 + "e.", ("x " * 10).strip()]
    assert pieces("あ" * 1500 + "。" + "い" * 1500) == ["あ" * 1500 + "。", "い" * 1500]
