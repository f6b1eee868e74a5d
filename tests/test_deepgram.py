"""What becomes of a call when Deepgram does well, does badly, or does nothing at all."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.deepgram import KEY, Answer, Deepgram, noise
from tests.server import Server
from tests.telephone import Telephone, dial
from twilio_aura import pieces

SAID = f"No, {KEY}!"
SHAPES = {  # of an error: its body and headers, by the request id that is in them
    "legacy": ({"err_code": "TTS_CODE", "err_msg": SAID, "request_id": "legacy"}, {}),
    "modern": ({"category": "TTS_CODE", "message": SAID, "request_id": "modern"}, {}),
    "text": (f"TTS_CODE: {SAID}", {"dg-request-id": "text"}),
    "empty": ("", {"dg-error": f"TTS_CODE: {SAID}", "dg-request-id": "empty"}),
    "odd": ('["\xff", NaN', {"dg-error": f"TTS_CODE: {SAID}", "dg-request-id": "odd"}),
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
        await phone.until_heard(noise("Hello, how are you today?"))


async def test_proxy() -> None:
    """A proxy in the environment is used for Deepgram."""
    async with Deepgram() as proxy:
        settings = {"DEEPGRAM_URL": "http://deepgram.invalid", "http_proxy": proxy.url}
        async with Server(settings) as server, dial(server.url) as phone:
            await phone.until_heard(noise("Hello, how are you today?"))
    assert proxy.requests[0].target.startswith("http://deepgram.invalid/v1/speak?")


async def test_key_is_never_cut_in_two(hasty: Server, deepgram: Deepgram) -> None:
    """Of a long error message that repeats the key, no part of the key is logged."""
    for number, before in enumerate(range(270, 300, 3)):
        told = {"err_msg": "x" * before + KEY, "request_id": f"long {number}"}
        answer = Answer(status=400, body=json.dumps(told).encode())
        text = deepgram.answer(f"repeats the key {number}", answer)
        async with dial(hasty.url, parameters={"text": text}) as phone:
            await closed(phone)
        assert KEY[:3] not in await hasty.logged(rf"request long {number}\)")


# Failures


@pytest.mark.parametrize("status", ADVICE)
async def test_status(hasty: Server, deepgram: Deepgram, status: int) -> None:
    """A status that is no 200 ends the call with 1011; 429 and 5xx after two more tries."""
    before = len(hasty.log)

    async def call(shape: str) -> None:
        told, headers = SHAPES[shape]
        body = (told if isinstance(told, str) else json.dumps(told)).encode("latin-1")
        answer = Answer(status=status, body=body, headers=headers, framing="length")
        text = deepgram.answer(f"status {status} {shape}", answer)
        async with dial(hasty.url, parameters={"text": text}) as phone:
            await closed(phone)
            assert phone.events == []
        assert len(deepgram.asked(text)) == (3 if status == 429 or status >= 500 else 1)
        assert f"Deepgram answered {status}" in await hasty.logged(f"{phone.call_sid} ended")
        (line,) = re.findall(rf".* ERROR .*request {shape}\).*", hasty.log[before:])
        assert f"Deepgram answered {status}: TTS_CODE: No, [key]!" in line
        assert ADVICE[status] in line

    await asyncio.gather(*map(call, SHAPES))
    assert KEY not in hasty.log


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_retry(server: Server, deepgram: Deepgram, status: int) -> None:
    """A request that fails twice and then succeeds is heard; the tries back off."""
    bad = Answer(status=status, body=b"busy", framing="length")
    text = deepgram.answer(f"twice {status}", bad, bad, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    one, two, three = deepgram.asked(text)
    assert 0.2 < two.at - one.at < three.at - two.at


@pytest.mark.parametrize(
    ("header", "least", "most"), [("1", 1, 3), ("3600", 3, 5), ("soon", 0.2, 2), ("0.5", 0.2, 2)]
)
async def test_retry_after(
    server: Server, deepgram: Deepgram, header: str, least: float, most: float
) -> None:
    """Retry-After is honoured within reason, and nonsense in it is not."""
    busy = Answer(status=429, body=b"busy", headers={"Retry-After": header})
    text = deepgram.answer(f"retry after {header}", busy, Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    one, two = deepgram.asked(text)
    assert least <= two.at - one.at < most


async def test_too_long_is_not_retried(hasty: Server, deepgram: Deepgram) -> None:
    """A 413 is not tried again, whatever its Retry-After."""
    too_long = Answer(status=413, body=b"too long", headers={"Retry-After": "0"})
    text = deepgram.answer("too long", too_long)
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
    assert len(deepgram.asked(text)) == 1


async def test_redirect_is_not_followed(hasty: Server, deepgram: Deepgram) -> None:
    """Text and key go to DEEPGRAM_URL and not to where an answer points."""
    there = {"Location": f"{deepgram.url}/v1/speak?model=elsewhere"}
    moved = Answer(status=307, body=b"moved", headers=there, framing="length")
    text = deepgram.answer("redirected", moved, Answer())
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert phone.events == []
    assert len(deepgram.asked(text)) == 1


@pytest.mark.parametrize("then", ["cut", "reset"])
@pytest.mark.parametrize("after", [-1, 0])
async def test_broken_connection(hasty: Server, deepgram: Deepgram, then: str, after: int) -> None:
    """A connection that breaks before the response is tried again, twice at most."""
    broken = Answer(stop_after=after, then=then)
    text = deepgram.answer(f"breaks {then} {after}", broken, broken, Answer())
    async with dial(hasty.url, parameters={"text": text}) as phone:
        if after == -1:
            await phone.until_heard(noise(text))
            return
        await closed(phone)  # Deepgram had begun to answer
    assert "Deepgram broke off" in await hasty.logged(f"{phone.call_sid} ended")


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("then", ["cut", "reset", "stall"])
async def test_breaks_off(hasty: Server, deepgram: Deepgram, framing: str, then: str) -> None:
    """Of a body that is cut short or stalls, what came is played out; then the call fails."""
    text = deepgram.answer(
        f"breaks off {framing} {then}", Answer(framing=framing, stop_after=2500, then=then)
    )
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert len(phone.named("mark")) == 1
        assert phone.heard == noise(text)[: len(phone.heard)]
        assert len(phone.heard) == 2500 or then == "reset"  # an RST may overtake data
    assert len(deepgram.asked(text)) == 1
    async with dial(hasty.url, parameters={"text": deepgram.answer(text, Answer())}) as phone:
        await phone.until_heard(noise(text))  # what was not complete has not been kept


async def test_piece_breaks_off(hasty: Server, deepgram: Deepgram) -> None:
    """Of a long text nothing is said after the piece that failed."""
    first, second = pieces("The first piece. " * 110 + "The second piece. " * 110)
    deepgram.answer(first, Answer(stop_after=2500))
    async with dial(hasty.url, parameters={"text": f"{first} {second}"}) as phone:
        await closed(phone)
        assert phone.heard == phone.sent == noise(first)[:2500]
    assert "Deepgram broke off" in await hasty.logged(f"{phone.call_sid} ended")


@pytest.mark.parametrize("after", [-1, 0])
async def test_silence(hasty: Server, deepgram: Deepgram, after: int) -> None:
    """Deepgram accepting the request and saying nothing fails in time, and is asked once."""
    text = deepgram.answer(f"silence {after}", Answer(stop_after=after, then="stall"))
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
    assert len(deepgram.asked(text)) == 1
    assert "Deepgram fell silent" in await hasty.logged(f"{phone.call_sid} ended")


async def test_trickle(hasty: Server, deepgram: Deepgram) -> None:
    """Sound that comes more slowly than one speaks keeps neither a caller nor a slot for ever."""
    text = deepgram.answer("trickle", Answer(pieces=(1,), pause_seconds=0.2))
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
    await hasty.logged("Deepgram sends more slowly than one speaks")
    assert "more slowly" in await hasty.logged(f"{phone.call_sid} ended")


async def test_without_end(hasty: Server, deepgram: Deepgram) -> None:
    """Sound without end ends all the same, before it fills the memory."""
    text = deepgram.answer("endless", Answer(noise("endless") * 100, pieces=(10_000,)))
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert 80_000 <= len(phone.sent) <= 80_000 + 2**16
    assert "sends without end" in await hasty.logged(f"{phone.call_sid} ended")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(body=b'{"err_msg": "no"}'), "Deepgram sent application/json, not audio"),
        (Answer(body=b"<html>", headers={"Content-Type": "Text/HTML; x"}), "sent text/html, not"),
        (Answer(b"RIFF\x24\0\0\0WAVEfmt " + bytes(400)), "Deepgram sent a WAV header"),
        (Answer(b"RIFF\x24\0\0\0WAVEfmt " + bytes(400), pieces=(1,)), "sent a WAV header"),
        (Answer(b""), "Deepgram sent no audio"),
        (Answer(b"", framing="length"), "Deepgram sent no audio"),
    ],
)
async def test_not_audio(hasty: Server, deepgram: Deepgram, answer: Answer, said: str) -> None:
    """A 200 that is not audio is a failure, and never noise in the caller's ear."""
    text = deepgram.answer(f"not audio: {said} {answer}", answer)
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await closed(phone)
        assert phone.events == []
    assert said in await hasty.logged(f"{phone.call_sid} ended")


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
        assert await server.logged("WARNING serving all the same")
        async with dial(server.url) as phone:
            await closed(phone)
            # The third try comes half a second after the second.
            assert asyncio.get_running_loop().time() - phone.started_at >= 0.4
        assert await server.logged(f"{phone.call_sid} ended: the connection to Deepgram failed")


async def test_back_in_reach() -> None:
    """A failure is not kept: the next caller tries afresh."""
    async with Deepgram() as away:
        pass
    async with Server({"DEEPGRAM_URL": away.url}) as server:
        await server.logged("serving all the same")
        async with Deepgram(port=away.port), dial(server.url) as phone:
            await phone.until_heard(noise("Hello, how are you today?"))


# What is shared and kept


async def test_shared(server: Server, deepgram: Deepgram) -> None:
    """A text that is being fetched is fetched once; each caller hears it from its beginning."""
    go = asyncio.Event()
    text = deepgram.answer("shared by all", Answer(hold=go))

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


async def test_shared_failure(hasty: Server, deepgram: Deepgram) -> None:
    """A failure reaches all who wait, and the next caller tries afresh."""
    text = deepgram.answer(
        "shared failure", Answer(status=400, body=b"no", delay_seconds=0.3), Answer()
    )

    async def call() -> None:
        async with dial(hasty.url, parameters={"text": text}) as phone:
            await closed(phone)

    await asyncio.gather(*(call() for _ in range(10)))
    assert len(deepgram.asked(text)) == 1
    async with dial(hasty.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))


async def test_kept(server: Server, deepgram: Deepgram) -> None:
    """Speech once fetched is not fetched again, unless it is for another voice."""
    text = "kept"
    for model in ("aura-asteria-en", "aura-asteria-en", "aura-luna-en", "aura-asteria-en"):
        async with dial(server.url, parameters={"text": text, "model": model}) as phone:
            await phone.until_heard(noise(text, model))
            assert phone.heard == noise(text, model)
    assert len(deepgram.asked(text)) == 2


async def test_fetched_though_hung_up(server: Server, deepgram: Deepgram) -> None:
    """Speech that was begun is fetched to its end when its caller hangs up, and is kept."""
    go = asyncio.Event()
    text = deepgram.answer("begun", Answer(hold=go))
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
        deepgram.answer(f"large {name}", Answer(sound[:500_000], pieces=(50_000,)))
    async with Server({"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "1"}) as server:
        for name in "abacbca":
            async with dial(server.url, parameters={"text": f"large {name}"}) as phone:
                await phone.until_mark()
    # Two of three fit: c pushes out b, b pushes out a, and a pushes out b again.
    assert [len(deepgram.asked(f"large {name}")) for name in "abc"] == [2, 2, 1]


async def test_keep_nothing(deepgram: Deepgram) -> None:
    """With CACHE_MB=0 every call asks afresh, and still shares what is under way."""
    go = asyncio.Event()
    text = deepgram.answer("not kept", Answer(hold=go))
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
            await phone.until_heard(noise("Hello, how are you today?"))
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
    """A key that Deepgram refuses ends the server with status 1 and a line that says so."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_API_KEY": "wrong"}) as server:
        assert await server.end() == 1
        assert re.search(
            r"ERROR Deepgram answered 401: INVALID_AUTH: Invalid credentials\. "
            r"\(request f1a2b3c4\); check DEEPGRAM_API_KEY\n",
            server.log,
        )
        assert "Traceback" not in server.log


async def test_busy_at_the_start(deepgram: Deepgram) -> None:
    """Deepgram having too much to do is no reason not to serve: the next call is answered."""
    busy = Answer(status=429, body=b"busy", framing="length")
    greeting = deepgram.answer("busy at the start", busy, busy, busy, Answer())
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        await server.logged("WARNING serving all the same")
        async with dial(server.url) as phone:
            await phone.until_heard(noise(greeting))


async def test_slow_greeting_delays_nothing(deepgram: Deepgram) -> None:
    """While the greeting is still being fetched, calls with another text are served."""
    greeting = deepgram.answer("never comes", Answer(stop_after=-1, then="stall"))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        async with dial(server.url, parameters={"text": "meanwhile"}) as phone:
            await phone.until_heard(noise("meanwhile"))
        server.signal()
        assert await server.end() == 0
        assert "Deepgram fell silent" not in server.log  # so neither call nor end waited for it
