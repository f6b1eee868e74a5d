"""What becomes of a call when Deepgram does well, does badly, or does nothing at all."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import Telephone, dial

SAID = f"No, {KEY}!"
SHAPES = {  # of an error: its body and headers, by the request id that is in them
    "legacy": ({"err_code": "TTS_CODE", "err_msg": SAID, "request_id": "legacy"}, {}),
    "modern": ({"category": "TTS_CODE", "message": SAID, "request_id": "modern"}, {}),
    "text": (f"TTS_CODE: {SAID}\n", {"dg-request-id": "text"}),
    "empty": ("", {"dg-error": f"TTS_CODE: {SAID}", "dg-request-id": "empty"}),
    "odd": (f'["TTS_CODE \xff", NaN {SAID}', {"dg-request-id": "odd"}),
}
ADVICE = {
    400: "check DEEPGRAM_MODEL",
    401: "check DEEPGRAM_API_KEY",
    402: "credit",
    403: "check DEEPGRAM_API_KEY",
    413: "",
    415: "",
    422: "",
    429: "lower DEEPGRAM_CONCURRENCY",
    500: "status.deepgram.com",
    503: "status.deepgram.com",
    529: "status.deepgram.com",
    504: "status.deepgram.com",
    302: "check DEEPGRAM_URL",
    404: "check DEEPGRAM_URL",
}


async def closed(phone: Telephone, code: int = 1011) -> None:
    """Wait until the server closes the call, so that the caller hears the <Say>."""
    assert await phone.until_closed() == code


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


async def test_key_is_never_cut_in_two(server: Server, deepgram: Deepgram) -> None:
    """Of a long error message that repeats the key, no part of the key is logged."""
    for number, before in enumerate(range(360, 400, 3)):
        body = f"long {number} " + "x" * before + KEY
        text = deepgram.answer(f"repeats the key {number}", Answer(status=400, body=body.encode()))
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)
        assert KEY[:3] not in await server.logged(f"long {number} x")


# Failures


@pytest.mark.parametrize("status", ADVICE)
async def test_status(server: Server, deepgram: Deepgram, status: int) -> None:
    """A status that is no 200 ends the call with 1011; 429 and 5xx after two more tries."""
    before = len(server.log)

    async def call(shape: str) -> None:
        fields, headers = SHAPES[shape]
        body = (fields if isinstance(fields, str) else json.dumps(fields)).encode("latin-1")
        answer = Answer(status=status, body=body, headers=headers, framing="length")
        text = deepgram.answer(f"status {status} {shape}", answer)
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)
            assert phone.received == b""
        assert len(deepgram.asked(text)) == (3 if status == 429 or status >= 500 else 1)
        assert f"Deepgram answered {status};" in await server.logged(f"{phone.call_sid} ended")
        (line,) = re.findall(rf'.* ERROR .*["( ]{shape}[")].*', server.log[before:])
        assert re.search(rf"Deepgram answered {status}: .*TTS_CODE.*No, \[key\]!", line)
        assert ADVICE[status] in line

    await asyncio.gather(*map(call, SHAPES))
    assert KEY not in server.log


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
    assert one.connection == two.connection == three.connection


@pytest.mark.parametrize("status", [400, 503])
async def test_error_that_trickles(deepgram: Deepgram, status: int) -> None:
    """An error whose body does not end holds up neither the answer nor, for long, a slot."""
    body, forever = b"a long story", asyncio.Event()
    answer = Answer(status=status, body=body, write_sizes=(6,), gate=forever, framing="length")
    text = deepgram.answer(f"trickling {status}", answer)
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1"}
    async with Server(settings, READ_SECONDS=1000) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)
        assert await server.logged(f"ERROR Deepgram answered {status}: a long ")
        async with dial(server.url, parameters={"text": "after the trickle"}) as phone:
            await phone.until_heard(noise("after the trickle"))
    forever.set()


async def test_too_long_is_not_retried(server: Server, deepgram: Deepgram) -> None:
    """A 413 is not tried again, though it says when."""
    too_long = Answer(status=413, body=b"too long", headers={"Retry-After": "0"})
    text = deepgram.answer("too long", too_long)
    async with dial(server.url, parameters={"text": text}) as phone:
        await closed(phone)
    assert len(deepgram.asked(text)) == 1


async def test_redirect_is_not_followed(server: Server, deepgram: Deepgram) -> None:
    """Text and key go to DEEPGRAM_URL and not to where an answer points."""
    there = {"Location": f"{deepgram.url}/v1/speak?model=elsewhere"}
    moved = Answer(status=307, body=b"moved", headers=there, framing="length")
    text = deepgram.answer("redirected", moved, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await closed(phone)
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
        await closed(phone)  # Deepgram had begun to answer
    reason = "Deepgram closed the connection mid-response"
    assert reason in await server.logged(f"{phone.call_sid} ended")
    assert len(deepgram.asked(text)) == 1


async def test_three_tries(server: Server, deepgram: Deepgram) -> None:
    """After three tries nothing more is tried."""
    text = deepgram.answer("always breaks", Answer(stop_after=-1))
    async with dial(server.url, parameters={"text": text}) as phone:
        await closed(phone)
    assert len(deepgram.asked(text)) == 3
    assert await server.logged("ERROR the connection to Deepgram failed: .*without response")


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("failure", ["cut", "reset", "stall"])
async def test_mid_response(
    impatient: Server, deepgram: Deepgram, framing: str, failure: str
) -> None:
    """Of a body that is cut short or stalls, what came is played out; then the call fails."""
    answer = Answer(framing=framing, stop_after=2500, failure=failure)
    text = deepgram.answer(f"mid-response {framing} {failure}", answer)
    async with dial(impatient.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert len(phone.named("mark")) == 1
        assert phone.heard == noise(text)[: len(phone.heard)]
        assert len(phone.heard) == 2500 or failure == "reset"  # an RST may overtake data
    await impatient.logged(f"{phone.call_sid} ended")
    assert "invalid literal" not in impatient.log  # urllib3's words, not int()'s
    assert len(deepgram.asked(text)) == 1
    async with dial(impatient.url, parameters={"text": deepgram.answer(text, Answer())}) as phone:
        await phone.until_heard(noise(text))  # what was not complete is not cached


async def test_piece_fails(server: Server, deepgram: Deepgram) -> None:
    """Of a long text nothing is said after the piece that failed."""
    first, second = ("The first piece. " * 117).strip(), ("The second piece. " * 110).strip()
    deepgram.answer(first, Answer(stop_after=2500))
    async with dial(server.url, parameters={"text": f"{first} {second}"}) as phone:
        await closed(phone)
        assert phone.heard == phone.received == noise(first)[:2500]
    assert "Deepgram closed the connection mid-response" in await server.logged(
        f"{phone.call_sid} ended"
    )


@pytest.mark.parametrize("after", [-1, 0])
async def test_silence(impatient: Server, deepgram: Deepgram, after: int) -> None:
    """Deepgram accepting the request and saying nothing fails in time, and is asked once."""
    text = deepgram.answer(f"silence {after}", Answer(stop_after=after, failure="stall"))
    async with dial(impatient.url, parameters={"text": text}) as phone:
        await closed(phone)
    assert len(deepgram.asked(text)) == 1
    assert "Deepgram timed out" in await impatient.logged(f"{phone.call_sid} ended")


async def test_trickle(deepgram: Deepgram) -> None:
    """Sound that comes more slowly than one speaks keeps neither a caller nor a slot for ever."""
    text = deepgram.answer("trickle", Answer(write_sizes=(1,), pause_seconds=0.2))
    async with Server({"DEEPGRAM_URL": deepgram.url}, READ_SECONDS=2) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)
        assert "Deepgram is slower than real time" in await server.logged(f"{phone.call_sid} ended")


async def test_without_end(deepgram: Deepgram) -> None:
    """Sound without end ends all the same, before it fills the memory."""
    text = deepgram.answer("endless", Answer(noise("endless") * 100, write_sizes=(10_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(settings, MAX_SPEECH_SECONDS=10, MAX_BUFFERED_SECONDS=1e9) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)
            assert 80_000 <= len(phone.received) <= 80_000 + 2**16
        assert "Deepgram sent more than 10 s of audio" in await server.logged(
            f"{phone.call_sid} ended"
        )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(body=b'{"err_msg": "no"}'), "Deepgram answered 200 with 'application/json';"),
        (Answer(body=b"<html>", headers={"Content-Type": "Text/HTML"}), "200 with 'Text/HTML';"),
        (Answer(b""), "Deepgram sent no audio"),
        (Answer(b"", framing="length"), "Deepgram sent no audio"),
    ],
)
async def test_not_audio(server: Server, deepgram: Deepgram, answer: Answer, said: str) -> None:
    """A 200 that is not audio is a failure, and never noise in the caller's ear."""
    text = deepgram.answer(f"not audio: {said} {answer}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert phone.received == b""
    assert said in await server.logged(f"{phone.call_sid} ended")


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
            await closed(phone)
        assert await server.logged(f"{phone.call_sid} ended: the connection to Deepgram failed")


async def test_unreachable_for_many(nowhere: str) -> None:
    """What fails for many is logged once a second at most, and for each call in a line."""

    async def call(server: Server, number: int) -> None:
        async with dial(server.url, parameters={"text": f"for many {number}"}) as phone:
            await closed(phone)
        await server.logged(f"{phone.call_sid} ended: the connection to Deepgram failed")

    async with Server({"DEEPGRAM_URL": nowhere}) as server:
        await asyncio.gather(*(call(server, number) for number in range(30)))
        lines = server.lines("ERROR the connection to Deepgram failed")
        assert len(lines) <= len({line.split(",")[0] for line in lines}) + 1


async def test_back_in_reach() -> None:
    """A failure is not cached: the next caller tries afresh."""
    async with Deepgram() as away:
        pass
    async with Server({"DEEPGRAM_URL": away.url}) as server:
        await server.logged("could not prefetch the greeting")
        async with Deepgram(port=away.port), dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))


# What is shared and cached


async def test_shared(server: Server, deepgram: Deepgram) -> None:
    """A text that is being fetched is fetched once; each caller hears it from its beginning."""
    go = asyncio.Event()
    text = deepgram.answer("shared by all", Answer(gate=go))

    async def call() -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.until_sound()
            go.set()
            await phone.until_heard(noise(text))
            assert phone.heard == noise(text)

    async with dial(server.url, parameters={"text": text}) as first:
        await first.until_sound()
        await asyncio.gather(*(call() for _ in range(50)))
        await first.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_shared_failure(server: Server, deepgram: Deepgram) -> None:
    """A failure reaches all who wait, and the next caller tries afresh."""
    text = deepgram.answer(
        "shared failure", Answer(status=400, body=b"no", delay_seconds=0.3), Answer()
    )

    async def call() -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            await closed(phone)

    await asyncio.gather(*(call() for _ in range(10)))
    assert len(deepgram.asked(text)) == 1
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))


async def test_cached(server: Server, deepgram: Deepgram) -> None:
    """Speech once fetched is not fetched again, unless it is for another voice."""
    text = "cached"
    for model in ("aura-asteria-en", "aura-asteria-en", "aura-luna-en", "aura-asteria-en"):
        async with dial(server.url, parameters={"text": text, "model": model}) as phone:
            await phone.until_heard(noise(text, model))
            assert phone.heard == noise(text, model)
    assert len(deepgram.asked(text)) == 2


async def test_fetched_though_hung_up(server: Server, deepgram: Deepgram) -> None:
    """Speech that was begun is fetched to its end when its caller hangs up, and is cached."""
    go = asyncio.Event()
    text = deepgram.answer("begun", Answer(gate=go))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_sound()
        phone.drop()
        await server.logged(f"{phone.call_sid} ended")
    go.set()
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_least_recently_used(deepgram: Deepgram) -> None:
    """Over CACHE_MB, the speech that was not used for longest is the first to go."""
    sound = noise("large") * 200
    for name in "abc":
        deepgram.answer(f"large {name}", Answer(sound[:500_000], write_sizes=(50_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "1"}
    async with Server(settings, MAX_BUFFERED_SECONDS=1e9) as server:
        for name in "abacbca":
            async with dial(server.url, parameters={"text": f"large {name}"}) as phone:
                await phone.until_mark()
    # Two of three fit: c pushes out b, b pushes out a, and a pushes out b again.
    assert [len(deepgram.asked(f"large {name}")) for name in "abc"] == [2, 2, 1]


async def test_no_cache(deepgram: Deepgram) -> None:
    """With CACHE_MB=0 every call asks afresh, and still shares what is under way."""
    go = asyncio.Event()
    text = deepgram.answer("not cached", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "0"}) as server:

        def call() -> AbstractAsyncContextManager[Telephone]:
            return dial(server.url, parameters={"text": text})

        async with call() as one, call() as two:
            await one.until_sound()
            await two.until_sound()
            go.set()
            await one.until_heard(noise(text))
            await two.until_heard(noise(text))
        async with call() as three:
            await three.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 2


async def test_warm_connection() -> None:
    """One connection serves call after call; closed by Deepgram meanwhile, it costs no failure."""
    async with Deepgram() as deepgram, Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with dial(server.url) as phone:  # so the greeting has been fetched
            await phone.until_heard(noise(GREETING))
        for number in range(5):
            text = f"warm {number}"
            async with dial(server.url, parameters={"text": text}) as phone:
                await phone.until_heard(noise(text))
        assert deepgram.connections == 1
        deepgram.drop_connections()
        async with dial(server.url, parameters={"text": "stale"}) as phone:
            await phone.until_heard(noise("stale"))
        assert deepgram.connections == 2


async def test_connection_closed_at_the_moment_of_use(server: Server, deepgram: Deepgram) -> None:
    """A kept-alive connection that Deepgram closes as it is used costs no failure."""
    before = len(server.log)
    text = deepgram.answer("stale at once", Answer(stop_after=-1), Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
        await phone.hang_up()
    assert len(deepgram.asked(text)) == 2
    await server.logged(f"{phone.call_sid} ended")
    assert " WARNING " not in server.log[before:]


# The greeting at the start


async def test_greeting_is_fetched_at_the_start(deepgram: Deepgram) -> None:
    """The greeting is asked for without a call, and the first call does not ask again."""
    greeting = "Fetched at the start"
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        await deepgram.until_asked(greeting)
        async with dial(server.url) as phone:
            await phone.until_heard(noise(greeting))
    assert len(deepgram.asked(greeting)) == 1


async def test_wrong_key(deepgram: Deepgram) -> None:
    """A key that Deepgram rejects ends the server with status 1 and a line that says so."""
    greeting = "A greeting of two pieces. " * 100  # of which the first will do
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_API_KEY": "wrong", "GREETING": greeting}
    async with Server(settings) as server:
        assert await server.end() == 1
        assert re.search(
            r"ERROR Deepgram answered 401: .*INVALID_AUTH.*Invalid credentials\..*f1a2b3c4.*; "
            r"check DEEPGRAM_API_KEY\n(.* ERROR .*\n)?.* CRITICAL Deepgram rejects the greeting, ",
            server.log,
        )
        assert len(server.lines("CRITICAL Deepgram rejects the greeting")) == 1
        assert "could not prefetch" not in server.log
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
