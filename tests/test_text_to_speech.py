"""What Deepgram is asked, over which connection, and what becomes of its answer."""

import asyncio
import contextlib
import gzip
import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path

import pytest
import trustme

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import KEY, Answer, Deepgram, noise, said
from tests.standins.process import PROXY_VARIABLES
from tests.standins.relay import Relay
from twilio_aura import READ_BYTES, Settings, SpeechFailed, StartError, TextToSpeech, Utterance

VOICE = "aura-asteria-en"
QUERY = "encoding=mulaw&sample_rate=8000&container=none"
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# How long we wait, at most, for a connection (in three tries), for an answer, and for a better one.
WAITS_SECONDS = (
    3 * twilio_aura.CONNECT_SECONDS,
    twilio_aura.READ_SECONDS,
    twilio_aura.RETRY_SECONDS,
)
FOR_EVER = 20.0  # seconds: longer than a machine stands still, shorter than a test may take
GZIPPED = gzip.compress(bytes(999))
BUSY = Answer(status=429, body=b"busy", framing="length")
ADVICE = {
    302: "check DEEPGRAM_URL",
    400: "check DEEPGRAM_OPTIONS and the voice, which call.model, the TwiML or DEEPGRAM_MODEL sets",
    401: "check DEEPGRAM_API_KEY",
    402: "add credit",
    403: "check DEEPGRAM_API_KEY and DEEPGRAM_MODEL",
    404: "check DEEPGRAM_URL",
    413: "status.deepgram.com",
    422: "status.deepgram.com",
    429: "lower DEEPGRAM_CONCURRENCY",
    500: "status.deepgram.com",
    503: "status.deepgram.com",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset what else decides how Deepgram is reached, and whom we believe."""
    for name in (*PROXY_VARIABLES, *BUNDLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing run out unless the test shortens it."""
    for name in ("CONNECT_SECONDS", "READ_SECONDS", "MAX_RESPONSE_SECONDS", "MAX_IDLE_SECONDS"):
        monkeypatch.setattr(twilio_aura, name, FOR_EVER)


@pytest.fixture
async def deepgram() -> AsyncIterator[Deepgram]:
    """Return a stand-in for Deepgram of the test's own."""
    async with Deepgram() as running:
        yield running


@pytest.fixture
async def tts(deepgram: Deepgram) -> TextToSpeech:
    """Return what is tested, with no setting but the key and the URL."""
    return text_to_speech(deepgram.url)


def text_to_speech(url: str, **settings: object) -> TextToSpeech:
    """Return what is tested, with these settings."""
    values = {"deepgram_api_key": KEY, "deepgram_url": url, **settings}
    return TextToSpeech(Settings(**values))  # type: ignore[arg-type]


async def hear(speaker: TextToSpeech | Utterance, text: str = "", model: str = VOICE) -> bytes:
    """Return all the audio of `text`, or of an utterance."""
    utterance = speaker
    if isinstance(speaker, TextToSpeech):
        utterance = speaker.utterance(text, model)
    assert isinstance(utterance, Utterance)
    heard = b""
    while audio := await utterance.read():
        heard += audio
    assert utterance.failure is None
    return heard


async def fail(
    tts: TextToSpeech, text: str, model: str = VOICE, heard: bytearray | None = None
) -> SpeechFailed:
    """Return what `text` fails with; add to `heard` the audio before that."""
    utterance = tts.utterance(text, model)
    while audio := await utterance.read():
        if heard is not None:
            heard += audio
    assert isinstance(utterance.failure, SpeechFailed)
    return utterance.failure


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what the module has logged."""
    return [record for record in caplog.records if record.name == "twilio_aura"]


# The request


@pytest.mark.parametrize("model", ["aura-2-lara-de", "x&encoding=linear16#/../?y=\r\nz: 1"])
async def test_request(tts: TextToSpeech, deepgram: Deepgram, model: str) -> None:
    """The request is what Deepgram documents, with the key in a header, whatever the voice is."""
    text = "Grüße, “quoted” — 東京"
    assert await hear(tts, text, model) == noise(text, model)
    (request,) = deepgram.requests
    assert request.model == model
    target, _, quoted = request.target.partition("&model=")
    assert target == f"/v1/speak?{QUERY}"
    assert not set(quoted) & set("&#/?\r\n")
    assert json.loads(request.body) == {"text": text}
    assert request.headers["authorization"] == f"Token {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"


async def test_options(deepgram: Deepgram) -> None:
    """DEEPGRAM_OPTIONS is in the query of every request, as it is."""
    options = "speed=0.9&mip_opt_out=true&tag=phone&tag=two%20words"
    tts = text_to_speech(deepgram.url, deepgram_options=options)
    await hear(tts, "With options.")
    assert deepgram.requests[0].target == f"/v1/speak?{QUERY}&{options}&model={VOICE}"


async def test_flux(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """A voice whose name begins with flux- is requested at /v2/speak, with the same query."""
    model = "flux-alexis-en"
    assert await hear(tts, "In flux.", model) == noise("In flux.", model)
    assert deepgram.requests[0].target == f"/v2/speak?{QUERY}&model={model}"


async def test_netrc(deepgram: Deepgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~/.netrc with a login for Deepgram's host does not take the key's place."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert await hear(text_to_speech(deepgram.url), "Who am I?") == noise("Who am I?")


async def test_cookies(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Cookies, as a load balancer sets them, are not kept."""
    deepgram.default.headers["Set-Cookie"] = "balancer=1; Path=/"
    for text in ("No cookie yet.", "And no cookie now."):
        await hear(tts, text)
    assert [request.headers.get("cookie") for request in deepgram.requests] == [None, None]


async def test_redirect(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Text and key go to DEEPGRAM_URL and not to where an answer points."""
    there = {"Location": f"{deepgram.url}/v1/speak?model=elsewhere"}
    moved = Answer(status=307, body=b"moved", headers=there, framing="length")
    text = deepgram.answer("redirected", moved, Answer())
    assert str(await fail(tts, text)) == "Deepgram answered 307"
    assert len(deepgram.requests) == 1


# The answer


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_sound_as_it_comes(tts: TextToSpeech, deepgram: Deepgram, framing: str) -> None:
    """Audio is heard as it comes, however its end is told, and in whatever sizes it is written."""
    go = asyncio.Event()
    answer = Answer(framing=framing, write_sizes=(1601, 333), gate=go)
    utterance = tts.utterance(deepgram.answer("as it comes", answer), VOICE)
    heard = b""
    while len(heard) < 1600:
        heard += await utterance.read()
    assert not go.is_set()
    go.set()
    assert heard + await hear(utterance) == noise("as it comes")


async def test_octet_stream(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Audio may also be called application/octet-stream, as Deepgram's specification has it."""
    headers = {"Content-Type": "application/octet-stream"}
    text = deepgram.answer("octets", Answer(headers=headers))
    assert await hear(tts, text) == noise(text)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(body=b'{"err_msg": "no"}'), "Deepgram answered 200"),
        (Answer(body=b"<html>", headers={"Content-Type": "Text/HTML"}), "Deepgram answered 200"),
        (Answer(headers={"Content-Encoding": "gzip"}), "Deepgram answered 200"),
        (Answer(GZIPPED, headers={"Content-Encoding": "gzip"}), "Deepgram answered 200"),
        (Answer(status=206), "Deepgram answered 206"),
        (Answer(b""), "Deepgram sent no audio, or not all"),
        (Answer(b"", framing="length"), "Deepgram sent no audio, or not all"),
        (Answer(b"", framing="close"), "Deepgram sent no audio, or not all"),
    ],
)
async def test_not_audio(
    tts: TextToSpeech, deepgram: Deepgram, answer: Answer, reason: str
) -> None:
    """What is not audio, or is compressed, is a failure, and never noise in the caller's ear."""
    text = deepgram.answer("not audio", answer, Answer())
    heard = bytearray()
    failure = await fail(tts, text, heard=heard)
    assert str(failure) == reason
    assert not failure.permanent
    assert heard == b""
    assert await hear(tts, text) == noise(text)


@pytest.mark.parametrize(("interim_status", "tries"), [(100, 1), (102, 2), (103, 2)])
async def test_interim_answer(
    tts: TextToSpeech, deepgram: Deepgram, interim_status: int, tries: int
) -> None:
    """An interim answer is not taken for the real one, nor is that for the next text's."""
    text = deepgram.answer("after an interim", Answer(interim_status=interim_status), Answer())
    assert await hear(tts, text) == noise(text)
    assert await hear(tts, "the next text") == noise("the next text")
    assert len(deepgram.asked(text)) == tries
    assert deepgram.connections == tries


async def test_interim_answer_always(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Where each try has an interim answer, the text fails."""
    text = deepgram.answer("always an interim", Answer(interim_status=103))
    assert str(await fail(tts, text)) == "the connection to Deepgram failed"
    assert len(deepgram.asked(text)) == deepgram.connections == 3


async def test_warnings(
    tts: TextToSpeech, deepgram: Deepgram, caplog: pytest.LogCaptureFixture
) -> None:
    """What Deepgram warns of is logged, and what it says is heard."""
    answer = Answer(headers={"dg-warnings": "PRON-001: not in the text " + "x" * 5000})
    text = deepgram.answer("with a warning", answer)
    assert await hear(tts, text) == noise(text)
    (record,) = logged(caplog)
    assert record.levelno == logging.WARNING
    assert "PRON-001: not in the text" in record.message
    assert len(record.message) < 500


# Failures


@pytest.mark.parametrize("status", ADVICE)
async def test_status(
    tts: TextToSpeech,
    deepgram: Deepgram,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names the status, the voice, Deepgram's own words and what to do; never the text."""
    monkeypatch.setattr(twilio_aura, "RETRY_SECONDS", 0.0)
    text = deepgram.answer(f"secret {status}", Answer(status=status, body=b"Deepgram's words"))
    failure = await fail(tts, text, "a-voice")
    assert str(failure) == f"Deepgram answered {status}"
    assert failure.permanent == (status in (400, 401, 402, 403, 404))
    assert len(deepgram.asked(text)) == 1
    (record,) = logged(caplog)
    assert record.levelno == logging.ERROR
    assert record.message.startswith(f"Deepgram answered {status} for the voice 'a-voice': ")
    assert "Deepgram's words" in record.message
    assert ADVICE[status] in record.message
    assert "secret" not in record.message
    assert KEY not in record.message


@pytest.mark.parametrize("answer", [Answer(status=400), Answer(stop_after=-1)])
async def test_length_of_the_log(
    tts: TextToSpeech, deepgram: Deepgram, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure is one line that is no longer than others, whatever is in a voice or an answer."""
    forged = "\n2026-11-30 00:00:00,000 ERROR call CA00 ended: forged"
    answer.body = forged.encode() * 2000
    answer.headers = {"Content-Type": "text/" + "x" * 5000}
    text = deepgram.answer("forged", answer)
    await fail(tts, text, f"{forged} {'x' * 50_000}")
    (record,) = logged(caplog)
    assert record.message.isprintable()
    assert len(record.message) < 1000


async def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    """That Deepgram is out of reach is said in the log, with the reason."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        tts = text_to_speech(f"http://127.0.0.1:{bound.getsockname()[1]}")
        failure = await fail(tts, "nobody listens", "x" * 50_000)
    assert str(failure) == "the connection to Deepgram failed"
    assert not failure.permanent
    (record,) = logged(caplog)
    assert "refused" in record.message
    assert "check DEEPGRAM_URL and the network" in record.message
    assert len(record.message) < 1000


async def test_back_in_reach() -> None:
    """A failure is not cached: the next caller tries afresh."""
    async with Deepgram() as away:
        pass
    tts = text_to_speech(away.url)
    await fail(tts, "Are you there?")
    async with Deepgram(port=away.port):
        assert await hear(tts, "Are you there?") == noise("Are you there?")


async def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that does not come about fails in time, after three tries."""
    monkeypatch.setattr(twilio_aura, "CONNECT_SECONDS", 0.1)
    with contextlib.ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # What is beyond the backlog is not answered.
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        began = time.monotonic()
        tts = text_to_speech(f"http://127.0.0.1:{full.getsockname()[1]}")
        assert str(await fail(tts, "black hole")) == "the connection to Deepgram failed"
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("after", [-1, 0])
async def test_silence(
    tts: TextToSpeech, deepgram: Deepgram, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deepgram accepting the request and saying nothing fails in time, and is asked once."""
    monkeypatch.setattr(twilio_aura, "READ_SECONDS", 0.1)
    text = deepgram.answer("silence", Answer(stop_after=after, failure="stall"))
    assert str(await fail(tts, text)) == "the connection to Deepgram failed"
    assert len(deepgram.asked(text)) == 1


def test_time_outs_fit_the_silence() -> None:
    """Whatever hangs has failed before the caller's silence is too long."""
    assert max(WAITS_SECONDS) < twilio_aura.MAX_SILENCE_SECONDS


@pytest.mark.parametrize("failure", ["cut", "reset"])
async def test_broken_connection(tts: TextToSpeech, deepgram: Deepgram, failure: str) -> None:
    """A connection that breaks before the answer is tried again at once, twice at most."""
    broken = Answer(stop_after=-1, failure=failure)
    text = deepgram.answer("breaks twice", broken, broken, Answer())
    assert await hear(tts, text) == noise(text)
    text = deepgram.answer("always breaks", broken)
    assert str(await fail(tts, text)) == "the connection to Deepgram failed"
    assert len(deepgram.asked(text)) == 3


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("failure", ["cut", "reset", "stall"])
@pytest.mark.parametrize("after", [0, 2500])
async def test_mid_response(
    tts: TextToSpeech,
    deepgram: Deepgram,
    framing: str,
    failure: str,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a body that is cut short or stalls, what came is heard; it fails, and is not cached."""
    if failure == "stall":
        monkeypatch.setattr(twilio_aura, "READ_SECONDS", 0.2)
    broken = Answer(framing=framing, stop_after=after, failure=failure)
    text = deepgram.answer("mid-response", broken, Answer())
    heard = bytearray()
    await fail(tts, text, heard=heard)
    assert heard == noise(text)[: len(heard)]
    if failure == "cut":  # A RST may overtake data, and a busy machine a short time-out.
        assert after - READ_BYTES < len(heard) <= after
    assert len(deepgram.asked(text)) == 1
    monkeypatch.setattr(twilio_aura, "READ_SECONDS", FOR_EVER)
    assert await hear(tts, text) == noise(text)


async def test_piece_that_fails(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Of a long text nothing is said after the piece that failed, and all before it."""
    sentences = [f"So {'word ' * 40}{word}." for word in ("alpha", "bravo", "carol")]
    deepgram.answer(sentences[1], Answer(stop_after=2500))
    heard = bytearray()
    await fail(tts, " ".join(sentences), heard=heard)
    assert heard == noise(sentences[0]) + noise(sentences[1])[:2500]


async def test_endless_audio(
    tts: TextToSpeech, deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audio without an end is a failure, is not kept, and its connection is closed."""
    monkeypatch.setattr(twilio_aura, "MAX_SPEECH_BYTES", 100_000)
    answer = Answer(is_endless=True, write_sizes=(10_000,))
    text = deepgram.answer("endless", answer, Answer())
    heard = bytearray()
    assert str(await fail(tts, text, heard=heard)) == "Deepgram does not come to an end"
    assert 100_000 <= len(heard) < 120_000
    await deepgram.until(lambda: deepgram.under_way == 0)
    assert await hear(tts, text) == noise(text)


@pytest.mark.parametrize("status", [302, 400, 500])
async def test_endless_error(
    tts: TextToSpeech, deepgram: Deepgram, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an error without an end no more is read than says what is wrong."""
    monkeypatch.setattr(twilio_aura, "RETRY_SECONDS", 0.0)
    answer = Answer(status=status, body=b"no " * 1000, is_endless=True)
    text = deepgram.answer("endless error", answer)
    assert str(await fail(tts, text)) == f"Deepgram answered {status}"
    await deepgram.until(lambda: deepgram.under_way == 0)


async def test_error_that_stalls(
    tts: TextToSpeech, deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error whose words do not come is told by its status."""
    monkeypatch.setattr(twilio_aura, "READ_SECONDS", 1.0)
    answer = Answer(status=400, body=b"a long story", stop_after=6, failure="stall")
    text = deepgram.answer("stalling error", answer)
    assert str(await fail(tts, text)) == "Deepgram answered 400"


async def test_trickle(deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that trickles for too long fails, its slot is free, and its thread ends."""
    monkeypatch.setattr(twilio_aura, "MAX_RESPONSE_SECONDS", 0.2)
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    threads = set(threading.enumerate())
    trickle = Answer(is_endless=True, write_sizes=(1,), pause_seconds=0.02)
    text = deepgram.answer("trickles", trickle, Answer())
    assert str(await fail(tts, text)) == "Deepgram is too slow"
    await deepgram.until(lambda: deepgram.under_way == 0)
    await poll(lambda: set(threading.enumerate()) <= threads)
    monkeypatch.setattr(twilio_aura, "MAX_RESPONSE_SECONDS", FOR_EVER)
    assert await hear(tts, text) == noise(text)


async def test_head_that_does_not_come(deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a thread hangs in, its slot is free after some time."""
    monkeypatch.setattr(twilio_aura, "MAX_RESPONSE_SECONDS", 0.1)
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    text = deepgram.answer("hangs", Answer(stop_after=-1, failure="stall"), Answer())
    assert str(await fail(tts, text)) == "Deepgram is too slow"
    monkeypatch.setattr(twilio_aura, "MAX_RESPONSE_SECONDS", FOR_EVER)
    assert await hear(tts, text) == noise(text)


async def test_no_thread(
    deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no thread can start for a moment, a text fails, and the next try is made."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    with monkeypatch.context() as patches:
        patches.setattr(threading.Thread, "start", start)
        assert str(await fail(tts, "No thread.")) == "Deepgram could not be asked"
    assert "can't start new thread" in caplog.text
    assert await hear(tts, "No thread.") == noise("No thread.")


async def test_threads_of_its_own(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """A text waits for none of a script's threads, and the process's exit for none of a text's."""
    go = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(go.wait)) for _ in range(100)]
    await asyncio.sleep(0)
    of_script = set(threading.enumerate())
    deepgram.default.gate = asyncio.Event()
    hearing = asyncio.create_task(hear(tts, "meanwhile"))
    try:
        async with asyncio.timeout(FOR_EVER):
            await deepgram.until_asked("meanwhile")
        assert [thread.daemon for thread in set(threading.enumerate()) - of_script] == [True]
    finally:
        go.set()
        deepgram.default.gate.set()
        await asyncio.gather(*busy)
    assert await hearing == noise("meanwhile")


# Another try


class Clock:
    """Stands for the module `time` where the pauses between tries are not to be waited for."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.now = 0.0
        self.on_pause: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.on_pause()

    time = staticmethod(time.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that the module goes by, and which goes on only while it sleeps."""
    clock = Clock()
    monkeypatch.setattr(twilio_aura, "time", clock)
    return clock


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_retry(tts: TextToSpeech, deepgram: Deepgram, status: int, clock: Clock) -> None:
    """After 429 and 5xx it is tried again, over the same connection, and heard."""
    busy = Answer(status=status, body=b"busy")
    text = deepgram.answer("four times busy", *[busy] * 4, Answer())
    assert await hear(tts, text) == noise(text)
    assert clock.pauses == [0.25, 0.5, 1.0, 1.0]
    assert deepgram.connections == 1


async def test_retries_end(tts: TextToSpeech, deepgram: Deepgram, clock: Clock) -> None:
    """It is tried again for as long as the caller's silence allows, and no longer."""
    text = deepgram.answer("always busy", BUSY)
    failure = await fail(tts, text)
    assert str(failure) == "Deepgram answered 429"
    assert not failure.permanent
    assert 7.5 < sum(clock.pauses) <= 8 < twilio_aura.MAX_SILENCE_SECONDS
    assert len(deepgram.asked(text)) == len(clock.pauses) + 1


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [("2", 2, 2), ("0.1", 0.25, 0.25), ("1000", 7.9, 8), ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 1)],
)
async def test_retry_after(
    tts: TextToSpeech,
    deepgram: Deepgram,
    retry_after: str,
    least: float,
    most: float,
    clock: Clock,
) -> None:
    """Where Deepgram says when to try again, that is waited for, if there is time for it."""
    busy = Answer(status=429, body=b"busy", headers={"Retry-After": retry_after})
    text = deepgram.answer("busy for a while", busy, Answer())
    assert await hear(tts, text) == noise(text)
    (pause,) = clock.pauses
    assert least <= pause <= most


async def test_too_long_is_not_retried(tts: TextToSpeech, deepgram: Deepgram, clock: Clock) -> None:
    """A 413 is not tried again, though it says when."""
    too_long = Answer(status=413, body=b"too long", headers={"Retry-After": "0"})
    text = deepgram.answer("too long", too_long)
    await fail(tts, text)
    assert len(deepgram.asked(text)) == 1
    assert clock.pauses == []


@pytest.fixture
def impatient_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tries follow each other fast, and for ever."""
    monkeypatch.setattr(twilio_aura, "RETRY_SECONDS", 1000.0)
    monkeypatch.setattr(twilio_aura, "MAX_RESPONSE_SECONDS", 1000.0)
    monkeypatch.setattr(twilio_aura, "FIRST_RETRY_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(twilio_aura, "MAX_RETRY_WAIT_SECONDS", 0.02)


@pytest.mark.usefixtures("impatient_retries")
async def test_caller_who_has_gone_ends_the_trying(deepgram: Deepgram) -> None:
    """Nothing is tried again for a caller who has gone, and his slot is the next one's."""
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    text = deepgram.answer("busy and gone", BUSY)
    utterance = tts.utterance(text, VOICE)
    reading = asyncio.create_task(utterance.read())
    await deepgram.until(lambda: len(deepgram.asked(text)) >= 3)
    reading.cancel()
    await utterance.close()
    async with asyncio.timeout(FOR_EVER):
        assert await hear(tts, "the next one") == noise("the next one")


async def test_caller_who_goes_before_another_try(deepgram: Deepgram, clock: Clock) -> None:
    """Nor is anything asked for him who has gone while we waited to ask again."""
    tts = text_to_speech(deepgram.url)
    text = deepgram.answer("busy, then gone", BUSY)
    utterance = tts.utterance(text, VOICE)
    clock.on_pause = utterance.stop
    while await utterance.read():
        pass
    await deepgram.until(lambda: len(deepgram.asked(text)) == 1)
    assert len(clock.pauses) == 1


@pytest.mark.usefixtures("impatient_retries")
async def test_two_processes_share_a_plan() -> None:
    """Where two processes have the whole plan each, all of their callers are heard."""
    go = asyncio.Event()
    async with Deepgram(default=Answer(gate=go), concurrency=2) as deepgram:
        two = [text_to_speech(deepgram.url, deepgram_concurrency=2) for _ in range(2)]
        texts = [f"number {number} of six" for number in range(6)]
        hearing = [
            asyncio.create_task(hear(two[number % 2], text)) for number, text in enumerate(texts)
        ]
        await deepgram.until(lambda: any(each.status == 429 for each in deepgram.requests))
        go.set()
        assert await asyncio.gather(*hearing) == [noise(text) for text in texts]
        assert deepgram.most_under_way == 2


# Sharing and caching


async def test_shared(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """A text that is being fetched is fetched once; each caller hears it from its beginning."""
    go = asyncio.Event()
    text = deepgram.answer("shared by all", Answer(gate=go))
    first = tts.utterance(text, VOICE)
    beginning = await first.read()
    hearing = [asyncio.create_task(hear(tts, text)) for _ in range(50)]
    go.set()
    assert set(await asyncio.gather(*hearing)) == {noise(text)}
    assert beginning + await hear(first) == noise(text)
    assert len(deepgram.requests) == 1


async def test_shared_failure(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """A failure reaches all who wait, and the next caller tries afresh."""
    text = deepgram.answer("shared failure", Answer(status=400, body=b"no"), Answer())
    failures = await asyncio.gather(*(fail(tts, text) for _ in range(10)))
    assert {str(failure) for failure in failures} == {"Deepgram answered 400"}
    assert len(deepgram.requests) == 1
    assert await hear(tts, text) == noise(text)


async def test_cached(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Speech once fetched is not fetched again, unless it is for another voice."""
    for model in (VOICE, VOICE, "aura-luna-en", VOICE):
        assert await hear(tts, "cached", model) == noise("cached", model)
    assert [request.model for request in deepgram.requests] == [VOICE, "aura-luna-en"]


async def test_cached_by_piece(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """A sentence that was said in one text is not fetched again for another."""
    first = "This is the first sentence."
    for rest in ("One more.", "Another one."):
        assert await hear(tts, f"{first} {rest}") == said(first, rest)
    asked = {request.text for request in deepgram.requests}
    assert asked == {first, "One more.", "Another one."}
    assert len(deepgram.requests) == 3


async def test_fetched_though_gone(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """What was begun is fetched to its end when its caller has gone, and is cached."""
    go = asyncio.Event()
    text = deepgram.answer("begun", Answer(gate=go))
    utterance = tts.utterance(text, VOICE)
    await utterance.read()
    await utterance.close()
    go.set()
    await deepgram.until(lambda: deepgram.under_way == 0)
    assert await hear(tts, text) == noise(text)
    assert len(deepgram.requests) == 1


async def test_audio_whose_end_is_not_told(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """Audio that ends with its connection is heard, and not cached, since it may not be all."""
    text = deepgram.answer("as HTTP/1.0", Answer(framing="close"))
    for number in (1, 2):
        assert await hear(tts, text) == noise(text)
        assert len(deepgram.asked(text)) == number


async def test_least_recently_used(deepgram: Deepgram) -> None:
    """Over CACHE_MB, the speech that was not used for longest is the first to go."""
    sound = noise("large") * 200
    for name in "abc":
        deepgram.answer(f"large {name}", Answer(sound[:500_000], write_sizes=(50_000,)))
    tts = text_to_speech(deepgram.url, cache_mb=1)
    for name in "abacbca":
        await hear(tts, f"large {name}")
    # Two of three fit: c pushes out b, b pushes out a, and a pushes out b again.
    assert [len(deepgram.asked(f"large {name}")) for name in "abc"] == [2, 2, 1]


async def test_no_cache(deepgram: Deepgram) -> None:
    """With CACHE_MB=0 every call asks afresh, and still shares what is under way."""
    go = asyncio.Event()
    text = deepgram.answer("not cached", Answer(gate=go))
    tts = text_to_speech(deepgram.url, cache_mb=0)
    hearing = [asyncio.create_task(hear(tts, text)) for _ in range(2)]
    await deepgram.until_asked(text)
    go.set()
    assert await asyncio.gather(*hearing) == [noise(text)] * 2
    await hear(tts, text)
    assert len(deepgram.asked(text)) == 2


# The queue


async def test_queue(deepgram: Deepgram) -> None:
    """At most DEEPGRAM_CONCURRENCY are under way; the others wait, first come, first served."""
    go = asyncio.Event()
    deepgram.default.gate = go
    tts = text_to_speech(deepgram.url, deepgram_concurrency=2)
    texts = [f"number {number} in the queue" for number in range(6)]
    hearing = []
    for text in texts:
        hearing.append(asyncio.create_task(hear(tts, text)))
        await asyncio.sleep(0)
    await deepgram.until(lambda: deepgram.under_way == 2)
    go.set()
    assert await asyncio.gather(*hearing) == [noise(text) for text in texts]
    assert deepgram.most_under_way == 2
    asked = [request.text for request in deepgram.requests]
    assert {*asked[:2]} == {*texts[:2]}  # The two threads may have overtaken each other.
    assert sorted(asked) == texts


async def test_first_come_first_served(deepgram: Deepgram) -> None:
    """Texts that wait for their turn are asked for in the order in which they were wanted."""
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    texts = [f"number {number} in the queue" for number in range(6)]
    await asyncio.gather(*(hear(tts, text) for text in texts))
    assert [request.text for request in deepgram.requests] == texts


async def test_nobody_waits_for_the_abandoned(deepgram: Deepgram) -> None:
    """What is queued and waited for by nobody any more is not requested; the next one is."""
    go = asyncio.Event()
    deepgram.answer("in front", Answer(gate=go))
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    first = asyncio.create_task(hear(tts, "in front"))
    await deepgram.until_asked("in front")
    gone = [tts.utterance(f"number {number}", VOICE) for number in range(30)]
    reading = [asyncio.create_task(utterance.read()) for utterance in gone]
    together = asyncio.create_task(hear(tts, "number 7"))  # He wants what another wanted, too.
    await asyncio.sleep(0)
    for task, utterance in zip(reading, gone, strict=True):
        task.cancel()
        await utterance.close()
    last = asyncio.create_task(hear(tts, "number 99"))
    again = asyncio.create_task(hear(tts, "number 3"))  # He comes when the other has gone.
    await asyncio.sleep(0)
    go.set()
    await first
    assert await together == noise("number 7")
    assert await last == noise("number 99")
    assert await again == noise("number 3")
    asked = [request.text for request in deepgram.requests]
    assert sorted(asked) == ["in front", "number 3", "number 7", "number 99"]


async def test_piece_ahead_is_wanted(deepgram: Deepgram) -> None:
    """A piece that is requested ahead of the one that is spoken counts as waited for."""
    go = asyncio.Event()
    first, second = "This is the first sentence.", "And the second one."
    deepgram.answer(first, Answer(gate=go))
    tts = text_to_speech(deepgram.url, deepgram_concurrency=2)
    utterance = tts.utterance(f"{first} {second}", VOICE)
    await utterance.read()
    await deepgram.until_asked(second)
    go.set()
    await hear(utterance)


# Connections


async def test_one_connection(tts: TextToSpeech, deepgram: Deepgram) -> None:
    """One connection serves text after text; closed by Deepgram meanwhile, it costs no failure."""
    for number in range(5):
        assert await hear(tts, f"warm {number}") == noise(f"warm {number}")
    assert deepgram.connections == 1
    deepgram.drop_connections()
    assert await hear(tts, "stale") == noise("stale")
    assert deepgram.connections == 2
    text = deepgram.answer("stale at the moment of use", Answer(stop_after=-1), Answer())
    assert await hear(tts, text) == noise(text)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return an authority that nobody trusts by default."""
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return what serves TLS as localhost."""
    return certified(authority, "localhost")


def certified(authority: trustme.CA, name: str) -> ssl.SSLContext:
    """Return what serves TLS under this name."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    """Return a file with the authority's certificate."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def trusted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the authority trusted."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))


@pytest.mark.usefixtures("trusted")
async def test_connections(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests at once keep their connections, for which the certificates are read once."""
    read: list[object] = []
    load = ssl.SSLContext.load_verify_locations

    def load_verify_locations(context: ssl.SSLContext, *args: object, **kwargs: object) -> None:
        read.append(context)
        load(context, *args, **kwargs)  # type: ignore[arg-type]

    async with Deepgram(tls=tls, host="localhost") as deepgram:
        monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", load_verify_locations)
        tts = text_to_speech(deepgram.url, deepgram_concurrency=15)
        for turn in range(2):
            deepgram.default.gate = asyncio.Event()
            texts = [f"turn {turn} number {number}" for number in range(15)]
            hearing = [asyncio.create_task(hear(tts, text)) for text in texts]
            await deepgram.until(lambda: deepgram.under_way == 15)
            deepgram.default.gate.set()
            assert await asyncio.gather(*hearing) == [noise(text) for text in texts]
        assert deepgram.connections == 15
    assert len(read) == 1


async def until_renewed(deepgram: Deepgram, times: int) -> None:
    """Wait until a connection was warmed so many times more."""
    enough = len(deepgram.heads) + times
    async with asyncio.timeout(FOR_EVER):
        await deepgram.until(lambda: len(deepgram.heads) >= enough)


@contextlib.asynccontextmanager
async def keeping_warm(tts: TextToSpeech) -> AsyncIterator[None]:
    """Keep a connection warm meanwhile."""
    task = asyncio.create_task(tts.keep_warm())
    try:
        yield
    finally:
        task.cancel()


@pytest.mark.usefixtures("trusted")
async def test_warm_connection(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a quiet time a new text comes over a connection that was open before, from afar too."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.5)
    async with (
        Deepgram(tls=tls) as deepgram,
        Relay(deepgram.port, 0.02, closes_after_seconds=0.6) as relay,
    ):
        tts = text_to_speech(f"https://localhost:{relay.port}")
        async with keeping_warm(tts):
            for number in count():  # A busy machine may be too late for it once.
                await until_renewed(deepgram, 4)
                before = deepgram.connections
                text = f"number {number} after a quiet time"
                assert await hear(tts, text) == noise(text)
                if deepgram.requests[-1].connection <= before:
                    break


async def test_forgotten_connections(deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody loses a call where a NAT has forgotten the idle connections without a word."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.2)
    async with Relay(deepgram.port, 0.01) as relay:
        tts = text_to_speech(f"http://127.0.0.1:{relay.port}")
        async with keeping_warm(tts):
            for number in range(3):
                assert await hear(tts, f"number {number}") == noise(f"number {number}")
                relay.forget()
                await until_renewed(deepgram, 2)  # the second only once the first has come back


async def test_machine_that_slept(deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has idled for too long is not used, though nothing has kept a connection warm."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.1)
    async with Relay(deepgram.port) as relay:
        tts = text_to_speech(f"http://127.0.0.1:{relay.port}")
        assert await hear(tts, "before") == noise("before")
        relay.forget()
        await asyncio.sleep(0.2)
        assert await hear(tts, "after") == noise("after")
    assert deepgram.connections == 2


async def test_warming_harms_nobody(
    deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A HEAD that hangs takes nobody's turn, is given up, and is not worth a line in the log."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.02)
    deepgram.head_answer = Answer(stop_after=-1, failure="stall")
    tts = text_to_speech(deepgram.url, deepgram_concurrency=1)
    async with keeping_warm(tts):
        for text in ("while it hangs", "when it was given up"):
            await until_renewed(deepgram, 1)
            assert await hear(tts, text) == noise(text)
    assert logged(caplog) == []


async def test_renewal_while_a_text_is_fetched(
    deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being fetched goes on when the idle connections are closed."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.02)
    go = asyncio.Event()
    deepgram.answer("fetched meanwhile", Answer(gate=go))
    tts = text_to_speech(deepgram.url)
    hearing = asyncio.create_task(hear(tts, "fetched meanwhile"))
    await deepgram.until_asked("fetched meanwhile")
    async with keeping_warm(tts):
        await until_renewed(deepgram, 3)
    go.set()
    assert await hearing == noise("fetched meanwhile")


async def test_interim_answer_to_a_head(
    deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which an answer to a HEAD is still to come is not used."""
    monkeypatch.setattr(twilio_aura, "MAX_IDLE_SECONDS", 0.02)
    deepgram.head_answer = Answer(status=404, interim_status=103, delay_seconds=5)
    tts = text_to_speech(deepgram.url)
    async with keeping_warm(tts):
        await until_renewed(deepgram, 2)
        assert await hear(tts, "not over that one") == noise("not over that one")


# Whom we believe, and the way there


@pytest.fixture
def bundles(bundle: Path) -> Path:
    """Return a directory with the authority's certificate, as OpenSSL wants it."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, which knows the file's name")
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(bundle)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    directory = bundle.parent / "authorities"
    directory.mkdir()
    shutil.copy(bundle, directory / f"{name}.0")
    return directory


@pytest.mark.parametrize("variable", BUNDLES)
@pytest.mark.parametrize("form", ["bundle", "bundles"])
async def test_bundle(
    tls: ssl.SSLContext,
    variable: str,
    form: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE name a file or a directory with authorities."""
    monkeypatch.setenv(variable, str(request.getfixturevalue(form)))
    async with Deepgram(tls=tls, host="localhost") as deepgram:
        assert await hear(text_to_speech(deepgram.url), "trusted") == noise("trusted")


@pytest.mark.usefixtures("trusted")
async def test_address(authority: trustme.CA) -> None:
    """A Deepgram of one's own may have an address and no name."""
    async with Deepgram(tls=certified(authority, "127.0.0.1")) as deepgram:
        assert await hear(text_to_speech(deepgram.url), "trusted") == noise("trusted")


@pytest.mark.parametrize("variable", BUNDLES)
@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_wrong_bundle(
    variable: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that cannot be read is named at the start."""
    path = tmp_path / "bundle.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(StartError, match=f"bundle.pem.*{variable}"):
        text_to_speech("https://127.0.0.1:1")


async def test_unknown_authority(tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture) -> None:
    """Who is vouched for by an authority that we do not know is told nothing."""
    async with Deepgram(tls=tls, host="localhost") as deepgram:
        failure = await fail(text_to_speech(deepgram.url), "a secret")
        assert str(failure) == "the connection to Deepgram failed"
        assert deepgram.requests == []
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


@pytest.mark.usefixtures("trusted")
async def test_wrong_host_name(authority: trustme.CA, caplog: pytest.LogCaptureFixture) -> None:
    """So is who is vouched for under another name."""
    tls = certified(authority, "deepgram.example")
    async with Deepgram(tls=tls, host="localhost") as deepgram:
        failure = await fail(text_to_speech(deepgram.url), "a secret")
        assert str(failure) == "the connection to Deepgram failed"
        assert deepgram.requests == []
    assert "match" in caplog.text


async def test_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is used for Deepgram."""
    async with Deepgram() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        tts = text_to_speech("http://deepgram.invalid")
        assert await hear(tts, "by proxy") == noise("by proxy")
    assert proxy.requests[0].target.startswith("http://deepgram.invalid/v1/speak?")


class Proxy(Relay):
    """A proxy that connects whoever asks it to, always to the same port."""

    targets: tuple[str, ...] = ()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.targets += (head.rpartition(" HTTP/1.")[0],)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        await super().serve(reader, writer)


@pytest.mark.usefixtures("trusted")
async def test_proxy_for_tls(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one for https, through which we talk to Deepgram alone, and believe nobody else."""
    for name in ("deepgram.invalid", "other.invalid"):
        async with (
            Deepgram(tls=certified(authority, name)) as deepgram,
            Proxy(deepgram.port) as proxy,
        ):
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            tts = text_to_speech("https://deepgram.invalid")
            if name == "deepgram.invalid":
                assert await hear(tts, "by proxy") == noise("by proxy")
                assert proxy.targets == ("CONNECT deepgram.invalid:443",)
            else:
                await fail(tts, "by proxy")
                assert deepgram.requests == []
