"""What Deepgram is asked, and what becomes of a call when it does badly or nothing at all."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import dial

ADVICE = {
    302: "check DEEPGRAM_URL",
    400: "check DEEPGRAM_MODEL, DEEPGRAM_OPTIONS",
    401: "check DEEPGRAM_API_KEY",
    402: "credit",
    403: "check DEEPGRAM_API_KEY",
    404: "check DEEPGRAM_URL",
    413: "status.deepgram.com",
    429: "lower DEEPGRAM_CONCURRENCY",
    500: "status.deepgram.com",
    503: "status.deepgram.com",
}


async def test_request(server: Server, deepgram: Deepgram) -> None:
    """The request is what Deepgram documents, with the key in a header and nowhere else."""
    text = "Grüße, “quoted” — 東京"
    async with dial(server.url, parameters={"text": text, "model": "aura-2-lara-de"}) as phone:
        await phone.until_mark()
    (request,) = deepgram.asked(text)
    assert request.target == (
        "/v1/speak?encoding=mulaw&sample_rate=8000&container=none&model=aura-2-lara-de"
    )
    assert json.loads(request.body) == {"text": text}
    assert request.headers["authorization"] == f"Token {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"


async def test_options(deepgram: Deepgram) -> None:
    """DEEPGRAM_OPTIONS is in the query of every request, as it is."""
    options = "speed=0.9&mip_opt_out=true&tag=phone&tag=two%20words"
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_OPTIONS": options}
    async with (
        Server(settings) as server,
        dial(server.url, parameters={"text": "With options."}) as phone,
    ):
        await phone.hears(noise("With options."))
    (request,) = deepgram.asked("With options.")
    assert request.target == (
        "/v1/speak?encoding=mulaw&sample_rate=8000&container=none"
        "&speed=0.9&mip_opt_out=true&tag=phone&tag=two%20words&model=aura-asteria-en"
    )


async def test_flux(server: Server, deepgram: Deepgram) -> None:
    """A voice whose name begins with flux- is requested at /v2/speak, with the same query."""
    model = "flux-alexis-en"
    async with dial(server.url, parameters={"text": "In flux.", "model": model}) as phone:
        await phone.hears(noise("In flux.", model))
    (request,) = deepgram.asked("In flux.")
    assert request.target == (
        f"/v2/speak?encoding=mulaw&sample_rate=8000&container=none&model={model}"
    )


async def test_netrc(deepgram: Deepgram, tmp_path: Path) -> None:
    """A ~/.netrc with a login for Deepgram's host does not take the key's place."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    settings = {"DEEPGRAM_URL": deepgram.url, "NETRC": str(tmp_path / "netrc")}
    async with Server(settings) as server, dial(server.url) as phone:
        await phone.until_heard(noise(GREETING))


async def test_proxy() -> None:
    """A proxy in the environment is used for Deepgram."""
    async with Deepgram() as proxy:
        settings = {"DEEPGRAM_URL": "http://deepgram.invalid", "http_proxy": proxy.url}
        async with Server(settings) as server, dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))
    assert proxy.requests[0].target.startswith("http://deepgram.invalid/v1/speak?")


# Failures


@pytest.mark.parametrize("status", ADVICE)
async def test_status(server: Server, deepgram: Deepgram, status: int) -> None:
    """A status that is no 200 ends the call with 1011; 429 and 5xx after two more tries."""
    text = f"status {status}"
    deepgram.answer(text, Answer(status=status, body=b"no", framing="length"))
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.received == b""
        assert phone.ws.close_reason == f"Deepgram answered {status}"
    assert len(deepgram.asked(text)) == (3 if status == 429 or status >= 500 else 1)


@pytest.mark.parametrize("status", ADVICE)
async def test_advice(deepgram: Deepgram, status: int) -> None:
    """The log has Deepgram's own words, and what to do about that status."""
    greeting = deepgram.answer(f"advice {status}", Answer(status=status, body=b"Deepgram's words"))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        line = await server.logged(f" ERROR Deepgram answered {status}: ")
        assert "Deepgram's words" in line
        assert ADVICE[status] in line


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_retry(server: Server, deepgram: Deepgram, status: int) -> None:
    """A request that fails twice and then succeeds is heard; each try waits for longer."""
    bad = Answer(status=status, body=b"busy", framing="length")
    text = deepgram.answer(f"twice {status}", bad, bad, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    one, two, three = deepgram.asked(text)
    assert two.at - one.at >= 0.25
    assert three.at - two.at >= 0.5


@pytest.mark.parametrize("status", [400, 503])
async def test_error_that_trickles(deepgram: Deepgram, status: int) -> None:
    """An error whose body does not end holds up neither the answer nor, for long, a slot."""
    body, forever = b"a long story", asyncio.Event()
    answer = Answer(status=status, body=body, write_sizes=(6,), gate=forever, framing="length")
    text = deepgram.answer(f"trickling {status}", answer)
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1"}
    async with Server(settings, READ_SECONDS=1000) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            assert await phone.until_closed() == 1011
        async with dial(server.url, parameters={"text": "after the trickle"}) as phone:
            await phone.until_heard(noise("after the trickle"))
    forever.set()


async def test_too_long_is_not_retried(server: Server, deepgram: Deepgram) -> None:
    """A 413 is not tried again, though it says when."""
    too_long = Answer(status=413, body=b"too long", headers={"Retry-After": "0"})
    text = deepgram.answer("too long", too_long)
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
    assert len(deepgram.asked(text)) == 1


async def test_redirect_is_not_followed(server: Server, deepgram: Deepgram) -> None:
    """Text and key go to DEEPGRAM_URL and not to where an answer points."""
    there = {"Location": f"{deepgram.url}/v1/speak?model=elsewhere"}
    moved = Answer(status=307, body=b"moved", headers=there, framing="length")
    text = deepgram.answer("redirected", moved, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.received == b""
    assert len(deepgram.asked(text)) == 1


@pytest.mark.parametrize("failure", ["cut", "reset"])
@pytest.mark.parametrize("after", [-1, 0])
async def test_broken_connection(
    server: Server, deepgram: Deepgram, failure: str, after: int
) -> None:
    """A connection that breaks before the response is tried again, twice at most."""
    broken = Answer(stop_after=after, failure=failure)
    text = deepgram.answer(f"breaks {failure} {after}", broken, broken, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        if after == -1:
            await phone.until_heard(noise(text))
            return
        assert await phone.until_closed() == 1011  # Deepgram had begun to answer
    assert len(deepgram.asked(text)) == 1


async def test_three_tries(server: Server, deepgram: Deepgram) -> None:
    """After three tries nothing more is tried."""
    text = deepgram.answer("always breaks", Answer(stop_after=-1))
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.ws.close_reason == "the connection to Deepgram failed"
    assert len(deepgram.asked(text)) == 3


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("failure", ["cut", "reset", "stall"])
async def test_mid_response(
    impatient: Server, deepgram: Deepgram, framing: str, failure: str
) -> None:
    """Of a body that is cut short or stalls, what came is played out; then the call fails."""
    answer = Answer(framing=framing, stop_after=2500, failure=failure)
    text = deepgram.answer(f"mid-response {framing} {failure}", answer)
    async with dial(impatient.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert len(phone.named("mark")) == 1
        assert phone.heard == noise(text)[: len(phone.heard)]
        assert len(phone.heard) == 2500 or failure == "reset"  # an RST may overtake data
    assert len(deepgram.asked(text)) == 1
    async with dial(impatient.url, parameters={"text": deepgram.answer(text, Answer())}) as phone:
        await phone.until_heard(noise(text))  # what was not complete is not cached


async def test_piece_fails(server: Server, deepgram: Deepgram) -> None:
    """Of a long text nothing is said after the piece that failed."""
    text = "This is one of so many sentences. " * 70
    piece = ("This is one of so many sentences. " * 8).strip()  # of at most 300 characters
    deepgram.answer(piece, Answer(stop_after=2500))
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.heard == phone.received == noise(piece)[:2500]


@pytest.mark.parametrize("after", [-1, 0])
async def test_silence(impatient: Server, deepgram: Deepgram, after: int) -> None:
    """Deepgram accepting the request and saying nothing fails in time, and is asked once."""
    text = deepgram.answer(f"silence {after}", Answer(stop_after=after, failure="stall"))
    async with dial(impatient.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
    assert len(deepgram.asked(text)) == 1


@pytest.mark.parametrize("trickling", ["head", "sound"])
async def test_trickle(trickling: str) -> None:
    """A response that only trickles frees its slot after a time, and its text is tried again."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mulaw\r\n\r\n"
        if trickling == "sound":
            writer.write(head)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    async with await asyncio.start_server(trickle, "127.0.0.1", 0) as upstream:
        url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
        settings = {"DEEPGRAM_URL": url, "DEEPGRAM_CONCURRENCY": "1"}
        async with Server(settings, MAX_RESPONSE_SECONDS=1, MAX_SILENCE_SECONDS=1000) as server:
            for _ in range(2):
                async with dial(server.url) as phone:
                    assert await phone.until_closed() == 1011
                    assert phone.ws.close_reason == "Deepgram is too slow"


NO_THREADS = """
import os, pathlib, threading
start = threading.Thread.start

def start_unless_forbidden(thread):
    if pathlib.Path(os.environ["FORBIDDEN"]).exists():
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = start_unless_forbidden

async def script(call):
    yield call.parameters["text"]
"""


async def test_no_thread(deepgram: Deepgram, tmp_path: Path) -> None:
    """Where no thread can start for a moment, the call fails, and the next one tries again."""
    forbidden = tmp_path / "forbidden"
    settings = {"DEEPGRAM_URL": deepgram.url, "FORBIDDEN": str(forbidden)}
    async with Server({**settings, "DEEPGRAM_CONCURRENCY": "1"}, NO_THREADS) as server:
        await server.logged("the greeting is ready")
        forbidden.touch()
        async with dial(server.url, parameters={"text": "No thread."}) as phone:
            assert await phone.until_closed() == 1011
        assert len(server.lines("ERROR no thread for Deepgram: can't start new thread; ")) == 1
        forbidden.unlink()
        async with dial(server.url, parameters={"text": "No thread."}) as phone:
            await phone.hears(noise("No thread."))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(body=b'{"err_msg": "no"}'), "Deepgram answered 200"),
        (Answer(body=b"<html>", headers={"Content-Type": "Text/HTML"}), "Deepgram answered 200"),
        (Answer(b""), "Deepgram sent no audio"),
        (Answer(b"", framing="length"), "Deepgram sent no audio"),
    ],
)
async def test_not_audio(server: Server, deepgram: Deepgram, answer: Answer, reason: str) -> None:
    """A 200 that is not audio is a failure, and never noise in the caller's ear."""
    text = deepgram.answer(f"not audio: {answer}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.received == b""
        assert phone.ws.close_reason == reason


async def test_octet_stream(server: Server, deepgram: Deepgram) -> None:
    """Audio may also be called application/octet-stream, as Deepgram's specification has it."""
    headers = {"Content-Type": "application/octet-stream"}
    text = deepgram.answer("octets", Answer(headers=headers))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))


@pytest.fixture
async def nowhere() -> AsyncIterator[str]:
    """Return a URL where connections are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


async def test_unreachable(nowhere: str) -> None:
    """With Deepgram out of reach the server warns and serves: the caller hears the <Say>."""
    async with Server({"DEEPGRAM_URL": nowhere}) as server:
        assert await server.logged("ERROR the connection to Deepgram failed: .*refused")
        assert await server.logged("WARNING could not prefetch the greeting")
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
            assert phone.ws.close_reason == "the connection to Deepgram failed"


async def test_back_in_reach() -> None:
    """A failure is not cached: the next caller tries afresh."""
    async with Deepgram() as away:
        pass
    async with Server({"DEEPGRAM_URL": away.url}) as server:
        await server.logged("could not prefetch the greeting")
        async with Deepgram(port=away.port), dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))


async def test_too_long_in_the_queue(deepgram: Deepgram) -> None:
    """Who would wait in silence for too long hears the <Say>, whatever is to blame."""
    go = asyncio.Event()
    greeting = deepgram.answer("takes its time", Answer(gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    async with Server(settings, MAX_SILENCE_SECONDS=1) as server:
        await deepgram.until_asked(greeting)
        async with dial(server.url, parameters={"text": "begun too late"}) as phone:
            assert await phone.until_closed() == 1011
            assert phone.received == b""
            assert phone.ws.close_reason == "no audio for 1 s"
    go.set()


# The greeting at the start


async def test_greeting_is_fetched_at_the_start(deepgram: Deepgram) -> None:
    """The greeting is asked for without a call, and the first call does not ask again."""
    greeting = "Fetched at the start"
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        await deepgram.until_asked(greeting)
        await server.logged("INFO the greeting is ready: Deepgram accepts the key and the voice$")
        async with dial(server.url) as phone:
            await phone.until_heard(noise(greeting))
    assert len(deepgram.asked(greeting)) == 1


async def test_wrong_key(deepgram: Deepgram) -> None:
    """A key that Deepgram rejects ends the server with status 1 and a line that says so."""
    greeting = "A greeting of several pieces. " * 100  # of which the first will do
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_API_KEY": "wrong", "GREETING": greeting}
    async with Server(settings) as server:
        assert await server.end() == 1
        assert server.lines("ERROR Deepgram answered 401: .*INVALID_AUTH.*; check DEEPGRAM_API_KEY")
        assert len(server.lines("CRITICAL Deepgram rejects the greeting")) == 1
        assert "Traceback" not in server.log


async def test_busy_at_the_start(deepgram: Deepgram) -> None:
    """Deepgram having too much to do is no reason not to serve: the next call is answered."""
    busy = Answer(status=429, body=b"busy", framing="length")
    greeting = deepgram.answer("busy at the start", busy, busy, busy, Answer())
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        await server.logged("WARNING could not prefetch the greeting")
        async with dial(server.url) as phone:
            await phone.until_heard(noise(greeting))


async def test_slow_greeting_delays_nothing(deepgram: Deepgram) -> None:
    """While the greeting is still being fetched, calls with another text are served."""
    greeting = deepgram.answer("never comes", Answer(stop_after=-1, failure="stall"))
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}
    async with Server(settings, READ_SECONDS=1000) as server:
        async with dial(server.url, parameters={"text": "meanwhile"}) as phone:
            await phone.until_heard(noise("meanwhile"))
        server.signal()
        assert await server.end() == 0
