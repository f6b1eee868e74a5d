"""Who is let in, what is asked over plain HTTP, and how the server ends."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twilio.request_validator import RequestValidator
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from tests.benchmark import callers
from tests.standins import poll
from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.process import GREETING_SCRIPT, Server
from tests.standins.telephone import dial

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


async def rejected(url: str, **headers: str) -> int:
    """Return the status that rejects a handshake with these headers."""
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
    assert await rejected(server.url.replace("/twilio", path)) == 404


def sign(url: str, token: str = TOKEN) -> dict[str, str]:
    """Return the header with which Twilio connects to `url`."""
    return {"X-Twilio-Signature": RequestValidator(token).compute_signature(url, {})}


@pytest.mark.parametrize("public_url", [*VECTORS, "WSS://example.com/media"])
async def test_vectors(deepgram: Deepgram, public_url: str) -> None:
    """Twilio's vectors: with and without slash and :443 a URL is the same; https is not wss."""
    settings = {"TWILIO_AUTH_TOKEN": TOKEN, "PUBLIC_URL": public_url}
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        assert '<Stream url="wss://example.com' in server.output
        for signature in VECTORS.values():
            async with dial(server.url, headers={"X-Twilio-Signature": signature}):
                pass
        for headers in (
            {"X-Twilio-Signature": "6HZQ7Cq/dSYDCAiy3qRA6PZfACI="},
            sign("wss://example.com/media", "54321"),
            sign("wss://example.com/mediax"),
        ):
            assert await rejected(server.url, **headers) == 403


hosts = st.from_regex(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z]+)+", fullmatch=True)


@pytest.fixture(scope="module")
async def signed(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server that rejects what Twilio did not sign."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "ERROR"}
    async with Server(settings) as running:
        yield running


@given(host=hosts)
@hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_against_twilio(signed: Server, host: str) -> None:
    """What Twilio's own validator computes for the Host is accepted, and nothing else is."""

    async def status(signature: str) -> bytes:
        handshake = callers.HANDSHAKE.replace(b"localhost", host.encode())
        header = f"X-Twilio-Signature: {signature}\r\n\r\n".encode("latin-1")
        reader, writer = await asyncio.open_connection("127.0.0.1", signed.port)
        writer.write(handshake.removesuffix(b"\r\n") + header)
        line = await reader.readline()
        writer.transport.abort()
        return line.split()[1]

    url = f"wss://{host}/twilio"
    (good,) = sign(url).values()
    (other,) = sign(url + "x").values()
    (https,) = sign(url.replace("wss", "https")).values()
    assert await status(good) == b"101"
    for bad in (other, https, "", "\xe9" + good):
        assert await status(bad) == b"403"


async def test_signature(deepgram: Deepgram) -> None:
    """With an auth token, only a handshake that Twilio signed is upgraded; else it is a 403."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
    async with Server(settings) as server:
        assert "TWILIO_AUTH_TOKEN is not set" not in server.log
        public = server.url.replace("ws://", "wss://")
        async with dial(server.url, headers=sign(public)) as phone:
            await phone.until_heard(noise(GREETING))
        async with dial(server.url, headers=sign(public + "/")):
            pass
        assert await rejected(server.url) == 403
        assert await rejected(server.url, **sign("wss://example.com/twilio")) == 403
        assert await rejected(server.url, **{"X-Twilio-Signature": "\xe9"}) == 403
        assert await rejected(server.url, **sign(public), Host="example.com") == 403  # a second one
        await server.logged(
            "WARNING rejected a handshake: X-Twilio-Signature does not match 'wss://127"
        )
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
            await phone.until_heard(noise(GREETING))
        assert await rejected(server.url, **sign(server.url.replace("ws:", "wss:"))) == 403


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
        await server.logged("WARNING rejected a call: MAX_CALLS=5 reached")


@pytest.mark.parametrize("names", [["TLS_CERT", "TLS_KEY"], ["TLS_CERT"]])
async def test_tls(
    deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], names: list[str]
) -> None:
    """With a certificate the server speaks TLS itself; its file may have the key, too."""
    pem, trust = certificate
    settings = dict.fromkeys(names, str(pem))
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        assert server.output.startswith(f"Listening on wss://127.0.0.1:{server.port}/twilio")
        async with dial(server.url, ssl=trust) as phone:
            await phone.until_heard(noise(GREETING))
        with pytest.raises((OSError, InvalidHandshake)):
            async with dial(server.url.replace("wss", "ws")):
                pass


# Plain HTTP


async def test_health(closes_after_speech: Server) -> None:
    """GET /healthz tells the number of calls, as JSON; nothing of it is logged above DEBUG."""
    lines = len(closes_after_speech.log.splitlines())
    answer = await http(closes_after_speech, "GET", "/healthz")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"calls": 0}
    async with dial(closes_after_speech.url, start=False):
        assert (await http(closes_after_speech, "GET", "/healthz")).json() == {"calls": 1}
    head = await http(closes_after_speech, "HEAD", "/healthz")
    assert (head.status_code, head.content) == (200, b"")
    said = [
        line
        for line in closes_after_speech.log.splitlines()[lines:]
        if "ended: hung up" not in line
    ]
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
    response = await http(server, method, path)
    assert response.status_code == status
    assert status != 405 or response.headers["Allow"] == "GET, HEAD"
    assert server.log == before


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET /twilio HTTP/1.1\r\nHost: a\r\n\r\n", "Connection header"),
        (callers.HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"), "HTTP/1.0"),
        (b"POST /twilio HTTP/1.1\r\nContent-Length: 3\r\n\r\na=b", "request body"),
    ],
)
async def test_rejected_by_websockets(closes_after_speech: Server, sent: bytes, why: str) -> None:
    """A handshake that websockets rejects on its own is told at DEBUG, with the reason."""
    await exchange(closes_after_speech, sent, eof=True)
    pattern = rf"DEBUG rejected a handshake from \('127.0.0.1', \d+\): .*{why}"
    await closes_after_speech.logged(pattern)


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
        await phone.until_heard(noise(GREETING))
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
    text = deepgram.answer(f"drained by {signum}", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with (
            dial(server.url) as idle,
            dial(server.url, parameters={"text": text}) as listening,
            dial(server.url, start=False) as connected,
        ):
            await idle.until_heard(noise(GREETING))
            await listening.until_sound()
            server.signal(signum)
            await server.logged(r"INFO draining 3 call\(s\); a signal ends them at once")
            assert await idle.until_closed() == 1000
            with pytest.raises(OSError, match=r"Connect call failed|refused"):
                async with dial(server.url):
                    pass
            await connected.start()  # it was let in before, so it is served
            assert await connected.until_closed() == 1000
            assert connected.heard == noise(GREETING)
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise(text)
        assert await server.end() == 0
        for phone in (idle, listening, connected):
            await server.logged(f"{phone.call_sid} ended: drained")
        assert "Traceback" not in server.log


CONVERSATION = """
async def script(call):
    yield "Question."
    await call.digit()
    yield "Answer."
    yield "Never drained."
"""


async def test_drain_a_conversation(deepgram: Deepgram) -> None:
    """A script that waits for a key is over at once, one that speaks after its current text."""
    go = asyncio.Event()
    deepgram.answer("Answer.", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}, CONVERSATION) as server:
        async with dial(server.url) as waiting, dial(server.url) as listening:
            await waiting.until_heard(noise("Question."))
            await listening.until(lambda: bool(listening.echoed_marks))
            await listening.press("1")
            await deepgram.until_asked("Answer.")
            server.signal()
            assert await waiting.until_closed() == 1000
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise("Question.") + noise("Answer.")
        assert await server.end() == 0
    assert not deepgram.asked("Never drained.")


LISTENS_MEANWHILE = """
async def script(call):
    key = asyncio.create_task(call.digit())
    yield "Heard while it waits for a key."
    key.cancel()
"""


async def test_drain_while_a_key_is_waited_for(deepgram: Deepgram) -> None:
    """A script that waits for a key in another task meanwhile is not cut off in its text."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, LISTENS_MEANWHILE) as server:
        async with dial(server.url, speed=1) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise("Heard while it waits for a key.")
        assert await server.end() == 0


TWO_TEXTS = """
async def script(call):
    yield "The current text."
    yield call.parameters.get("next", "never asked for")
"""


@pytest.mark.parametrize("following", ["never asked for", "The current text."])
async def test_drain_stops_at_the_current_text(deepgram: Deepgram, following: str) -> None:
    """Of the text after the current one nothing is sent if it is cached, nor asked for if not."""
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": "The current text."}
    async with Server(settings, TWO_TEXTS) as server:
        async with dial(server.url, parameters={"next": following}, speed=1) as phone:
            await phone.until_sound()
            server.signal()
            await server.logged("draining")
            assert await phone.until_closed() == 1000
            assert phone.heard == phone.received == noise("The current text.")
        assert await server.end() == 0
    assert not deepgram.asked("never asked for")


WAITS_FIRST = """
async def script(call):
    await call.digit()
    yield "Pressed."
"""


async def test_drain_before_the_first_text(deepgram: Deepgram) -> None:
    """A call that is still to start when the server drains ends where its script first pauses."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, WAITS_FIRST) as server:
        async with dial(server.url, start=False) as phone:
            server.signal()
            await server.logged("draining")
            await phone.start()
            assert await phone.until_closed() == 1000
        assert await server.end() == 0
        await server.logged(f"{phone.call_sid} ended: drained")


SWALLOWS = """
async def script(call):
    yield "I never stop."
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.parametrize("signals", [1, 2])
async def test_drain_a_script_that_swallows_its_cancellation(
    deepgram: Deepgram, signals: int
) -> None:
    """The server exits, whatever a script does, and says why it was not tidy."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1" if signals == 1 else "1000"}
    async with Server(settings, SWALLOWS, CLOSE_SECONDS=0.2) as server:
        async with dial(server.url) as phone:
            await phone.until_heard(noise("I never stop."))
            await phone.until(lambda: bool(phone.echoed_marks))
            await phone.send("unknown")
            await server.logged("ignored")  # so the mark before it has come
            for _ in range(signals):
                server.signal()
                await server.logged("draining")
            assert await server.end() == 0
        assert server.lines("ERROR a script ignores its cancellation")


async def test_drain_seconds(deepgram: Deepgram) -> None:
    """When DRAIN_SECONDS have elapsed, the rest are closed with 1001."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1"}) as server:
        async with dial(server.url, returns_marks=False, speed=0.01) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        await server.logged(f"WARNING call {phone.call_sid} ended: cut off by shutdown")


async def test_asked_while_draining(deepgram: Deepgram) -> None:
    """While draining, who had connected before is told 503: health check and caller alike."""
    requests = [b"GET /healthz HTTP/1.0\r\n\r\n", callers.HANDSHAKE]
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        early = [await asyncio.open_connection("127.0.0.1", server.port) for _ in requests]
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal()
            await server.logged(r"draining 1 call\(s\)")
            for request, (reader, writer) in zip(requests, early, strict=True):
                writer.write(request)
                assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
                writer.close()
                await writer.wait_closed()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


LETS_IN_LATE = (
    GREETING_SCRIPT
    + """
late = asyncio.Event()
serve = twilio_aura.serve

class Connection(twilio_aura.Connection):
    async def handshake(self, process_request, *args):
        async def process_late(ws, request):
            print("a handshake has come", file=sys.stderr)
            await late.wait()
            return process_request(ws, request)

        await super().handshake(process_late, *args)

async def serve_late(*args, **options):
    listening = await serve(*args, **options | {"create_connection": Connection})
    close = listening.close
    listening.close = lambda **options: (late.set(), close(**options))
    return listening

twilio_aura.serve = serve_late
"""
)


async def test_drain_who_is_let_in_late(deepgram: Deepgram) -> None:
    """Whose handshake is answered in the moment in which the server stops is drained, too."""

    async def call() -> None:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1000
            assert phone.heard == noise(GREETING)

    async with Server({"DEEPGRAM_URL": deepgram.url}, LETS_IN_LATE) as server:
        calling = asyncio.create_task(call())
        await server.logged("a handshake has come")
        server.signal()
        await calling
        assert await server.end() == 0


GOES_ON = """
import pathlib, sys, time, twilio_aura
status = twilio_aura.main()
print("main has returned", flush=True)
while not pathlib.Path(__file__).with_name("enough").exists():
    time.sleep(0.01)
sys.exit(status)
"""


async def test_sound_after_the_end(tmp_path: Path) -> None:
    """What Deepgram sends when the server has ended is dropped quietly."""
    go = asyncio.Event()
    program = tmp_path / "program.py"
    program.write_text(GOES_ON)
    async with (
        Deepgram(default=Answer(gate=go)) as deepgram,
        Server({"DEEPGRAM_URL": deepgram.url}, program) as server,
    ):
        await deepgram.until_asked(GREETING)
        server.signal()
        await server.until(lambda: "main has returned" in server.output)
        go.set()
        await deepgram.until(lambda: deepgram.under_way == 0)
        await asyncio.sleep(0.1)  # for the server's thread to read it
        (tmp_path / "enough").touch()
        assert await server.end() == 0
        assert server.lines("Traceback|Exception|Error") == []


async def test_second_signal(deepgram: Deepgram) -> None:
    """A second signal ends it at once."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}) as server:
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal(signal.SIGINT)
            await server.logged(r"draining 1 call\(s\)")
            server.signal(signal.SIGINT)
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


async def test_rejected_greeting_while_draining(deepgram: Deepgram) -> None:
    """A greeting that is rejected only while the server drains cuts nobody off."""
    go = asyncio.Event()
    first = deepgram.answer(("The greeting waits. " * 99).strip(), Answer(gate=go))
    second = deepgram.answer("The second piece is rejected.", Answer(status=400, body=b"no"))
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": f"{first} {second}"}
    async with Server(settings) as server:
        await deepgram.until_asked(second)
        async with dial(server.url, parameters={"text": "Not cut off."}, speed=1) as phone:
            await phone.until_mark()
            server.signal()
            await server.logged("draining")
            go.set()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise("Not cut off.")
        assert await server.end() == 0


async def test_rejected_greeting_lets_callers_go(deepgram: Deepgram) -> None:
    """When Deepgram rejects the greeting, callers who are already there hear the <Say>."""
    greeting = deepgram.answer("no", Answer(status=402, body=b"no credit", delay_seconds=0.3))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        assert await server.end() == 1
        assert "CRITICAL Deepgram rejects the greeting, so every call would fail" in server.log


# Nothing accumulates


async def test_nothing_is_left(server: Server, deepgram: Deepgram) -> None:
    """After hundreds of calls that hung up somewhere, no thread and no socket of theirs is left."""
    process = psutil.Process(server.process.pid)

    async def call(number: int) -> None:
        text = deepgram.answer(f"left {number % 40}", Answer(write_sizes=(100,)))
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
    await poll(lambda: process.num_threads() <= 2)  # the main one and the one that asked ngrok
    await poll(
        lambda: not [c for c in process.net_connections() if c.raddr and c.laddr[1] == server.port]
    )
    assert len(process.net_connections()) <= 1 + 15  # it listens; connections are kept warm
