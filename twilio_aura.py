"""Play Deepgram Aura text-to-speech to people who call a Twilio number.

    pip install -r requirements.txt
    cp .env.example .env        # then put your DEEPGRAM_API_KEY into it
    ngrok http 5000             # in another terminal, and leave it running
    python twilio_aura.py

It prints the TwiML to paste into a TwiML Bin. For every call Twilio then opens a websocket to it (a
bidirectional Media Stream), which a pair of tasks serves: the receiver takes the stream SID, key
presses and marks; the sender runs `script` and streams Deepgram's 8 kHz mulaw as it arrives.

To change what callers hear, edit `script`, nothing else, or pass one of your own to `main`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import hmac
import io
import json
import logging
import os
import re
import signal
import ssl
import sys
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

try:
    from asyncio import Timeout  # Python 3.10 lacks it

    import requests
    from dotenv.parser import parse_stream
    from websockets import ConnectionClosed, Headers, Request, Response, ServerConnection, State
    from websockets.asyncio.server import broadcast, serve
except ImportError as error:
    need = f"Python 3.11 or newer, and {sys.executable} -m pip install -r requirements.txt"
    print(f"{error}: this needs {need}", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("twilio_aura")
# The same message once a second at most (else a cache hit): what fails must not fill the log.
log_error = functools.lru_cache(lambda message, _second: log.error("%s", message))

# --- What is said ---------------------------------------------------------------------------------
Text = str | AsyncIterable[str]
Script = Callable[["Call"], AsyncGenerator[Text, None]]


async def script(call: Call) -> AsyncGenerator[Text, None]:
    """Yield the texts to speak, in order.

    Each `yield` returns once the caller has heard the text or interrupted it with a key. A text may
    also be an async iterable of its pieces, spoken while it is written. `call.parameters` has the
    TwiML's <Parameter>s, and `await call.digit()` is the next key pressed.
    """
    yield call.parameters.get("text") or call.settings.greeting


# --- A call ---------------------------------------------------------------------------------------
MULAW = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}  # Twilio's only format
BYTES_PER_SECOND = 8000
FRAME_BYTES = 160  # 20 ms; whole frames avoid the jitter that some callers hear
MAX_MEDIA_BYTES = 20 * FRAME_BYTES  # 0.4 s: on a slow link, too, the first sound is soon through
MAX_BUFFERED_SECONDS = 10.0  # sent ahead of what plays: a `clear` queues behind no more than that
START_SECONDS = 10.0  # Twilio sends `start` at once
MAX_SILENCE_SECONDS = 9.0  # then we close, and Twilio runs the <Say>: about 10 s of silence in all
MARK_GRACE_SECONDS = 3.0  # for a mark after playback should have ended
CLOSE_SECONDS = 2.0  # for the closing handshake, and for what a script does at its end


class Call:
    """One call: the state a script may use, and the two tasks that serve it."""

    def __init__(self, ws: ServerConnection, settings: Settings, tts: TextToSpeech) -> None:
        self.settings = settings
        self.sid = ""  # Twilio's call SID
        self.parameters: dict[str, str] = {}  # the TwiML's <Parameter>s
        self._ws, self._tts, self._loop = ws, tts, asyncio.get_running_loop()
        self._stream_sid = self._digits = ""  # the digits that the script has not yet taken
        self._changed = asyncio.Event()  # set after each message but media, and by drain()
        self._ended: asyncio.Future[tuple[int, str]] = self._loop.create_future()  # code, outcome
        self._draining = self._warned = False
        self._interrupt: Timeout | None = None  # a key press makes it expire
        # Loop time at which all sent will have been played; 0.0: nothing unheard, inf: unknown.
        self._unheard_until = 0.0
        # For the log: loop times and seconds of audio. Audio itself is for the cache alone to keep.
        self._started_at = self._first_frame_at = self._sent_seconds = self._heard_seconds = 0.0
        self._speech_times: list[float] = []

    def __str__(self) -> str:
        return f"call {self.sid}" if self.sid else f"connection from {self._ws.remote_address}"

    async def digit(self) -> str:
        """Return the next DTMF digit, pressed now or during speech; for the script's own task."""
        await self._until(lambda: self._digits, pausing=True)
        digit, self._digits = self._digits[0], self._digits[1:]
        return digit

    async def run(self, script: Script) -> None:
        """Serve the call until either task, or a drain, ends it; both are gone afterwards."""
        pair = [asyncio.create_task(self._receive()), asyncio.create_task(self._send(script))]
        code, outcome = await self._ended
        if code != 1011:  # else the script may be ending already, and has time for it
            pair[1].cancel()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._ws.close(code, outcome)
        except TimeoutError:
            self._ws.transport.abort()
            outcome += "; the peer did not acknowledge the close"
        while (await asyncio.wait(pair, timeout=CLOSE_SECONDS))[1]:
            pair[1].cancel()  # again: its end hangs, or Python 3.11's wait_for() swallowed it
        times = *(self._speech_times or [0.0, 0.0]), self._first_frame_at
        ms = [f"{max(0, at - self._started_at) * 1000:.0f} ms" if at else "-" for at in times]
        log.log(
            logging.INFO if code == 1000 else logging.WARNING,
            f"{self} ended: {outcome}; queued {ms[0]}, first byte {ms[1]}, first frame {ms[2]}"
            f"; sent {self._sent_seconds:.1f} s, heard {self._heard_seconds:.1f} s",
        )

    def end(self, code: int, outcome: str) -> None:
        """End the call with this close code, unless it has ended already."""
        if not self._ended.done():
            self._ended.set_result((code, outcome))

    def drain(self) -> None:
        """End the call at the next pause in speech."""
        self._draining = True
        self._changed.set()

    async def _until(self, condition: Callable[[], object], pausing: bool = False) -> None:
        """Wait until a message makes `condition` true; if `pausing`, a drain ends the call."""
        while not condition():
            if pausing and self._draining and not self._interrupt:
                self.end(1000, "drained")
            self._changed.clear()
            await self._changed.wait()

    # The receiver task: what Twilio tells us.
    async def _receive(self) -> None:
        try:
            while True:
                message = await self._ws.recv()
                # Skip audio (50 messages/s) unparsed; but a parameter in `start` may be "payload".
                if self._stream_sid and isinstance(message, str) and '"payload"' in message:
                    continue
                self._on_message(message)
                self._changed.set()
        except ConnectionClosed as closed:
            if closed.sent and not closed.rcvd_then_sent:  # websockets closed it, not the caller
                self.end(closed.sent.code, f"connection failed: {closed}")
            else:
                self.end(1000, "hung up")

    def _on_message(self, message: str | bytes) -> None:
        event: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(message) if isinstance(message, str) else None
        match event:
            case {"event": "connected"}:
                pass
            case {"event": "start", "start": {"streamSid": str(sid)}} if not self._stream_sid:
                self._stream_sid, self._started_at, start = sid, self._loop.time(), event["start"]
                if isinstance(got := start.get("mediaFormat"), dict) and got | MULAW != got:
                    self.end(1008, "the stream is not 8 kHz mulaw")
                if re.fullmatch("[0-9A-Za-z]{1,64}", call_sid := str(start.get("callSid") or "")):
                    self.sid = call_sid  # it is fit to be logged
                if isinstance(parameters := start.get("customParameters"), dict):
                    self.parameters = {n: v for n, v in parameters.items() if isinstance(v, str)}
                log.info("%s started", self)
            case {"event": "dtmf", "dtmf": {"digit": str(key)}} if re.fullmatch("[0-9*#A-D]", key):
                self._digits = (self._digits + key)[:100]  # a script may never take them
                if self._interrupt and self._unheard_until:
                    self._interrupt.reschedule(0)
                    self._interrupt = None
                    # call_soon: once the time-out has stopped the sender; broadcast: never waits.
                    self._loop.call_soon(broadcast, [self._ws], self._message("clear"))
            case {"event": "mark", "mark": {"name": str(name)}}:
                if name == f"{self._sent_seconds:.6f}":  # else it is of an interrupted text
                    self._unheard_until = 0.0
            case {"event": "stop"}:
                self.end(1000, "hung up")
            case _:
                level = logging.DEBUG if self._warned else logging.WARNING
                log.log(level, "%s: ignored an unexpected message: %.200a", self, message)
                self._warned = True

    # The sender task: what we say.
    async def _send(self, script: Script) -> None:
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._until(lambda: self._stream_sid and not self._ended.done())
            async with contextlib.aclosing(script(self)) as texts:
                async for text in texts:
                    await self._say(text)
                    await self._until(lambda: not self._draining, pausing=True)
            if self.settings.close_after_speech:
                self.end(1000, "completed")
            await self._until(lambda: False, pausing=True)  # hang-up or drain
        except BaseException:  # a script may raise a cancellation or a TaskGroup's, too
            if not self._stream_sid:
                self.end(1008, f"no start within {START_SECONDS:.0f} s")
            elif self._ws.state is State.OPEN and not self._ended.done():
                log.exception("%s: the script failed", self)
                self.end(1011, "the script failed")

    async def _say(self, text: Text) -> None:
        """Return when the caller has heard `text` or pressed a key; raise SpeechFailed."""
        sent_before, self._unheard_until = self._sent_seconds, 0.0
        model = self.parameters.get("model") or self.settings.deepgram_model
        try:
            async with (
                asyncio.timeout(None) as interrupt,
                asyncio.timeout(MAX_SILENCE_SECONDS) as silence,
                contextlib.aclosing(self._tts.synthesize(text, model)) as speeches,
            ):
                self._interrupt = interrupt
                try:
                    await self._stream(speeches, silence)
                    await self._until_heard()
                except Exception as error:  # of Deepgram, or of the text: what came before is heard
                    await speeches.aclose()
                    with contextlib.suppress(asyncio.CancelledError):  # a key hides no failure
                        await self._until_heard()
                    if isinstance(error, SpeechFailed):
                        self.end(1011, str(error))  # at once: a script's end may take long
                    raise
                finally:
                    self._interrupt = None
                    unheard = max(0.0, self._unheard_until - self._loop.time())
                    self._heard_seconds += max(0.0, self._sent_seconds - sent_before - unheard)
        except TimeoutError:
            if silence.expired():
                self.end(1011, f"no audio for {MAX_SILENCE_SECONDS:.0f} s")
            if silence.expired() or not interrupt.expired():  # the time-out is the text's own
                raise

    async def _stream(self, speeches: AsyncIterable[Speech], silence: asyncio.Timeout) -> None:
        async for speech in speeches:
            self._speech_times = self._speech_times or speech.times
            async for audio in speech.chunks(FRAME_BYTES, MAX_MEDIA_BYTES):
                seconds = len(audio) / BYTES_PER_SECOND
                ahead = self._unheard_until - self._loop.time()
                if ahead > 0:  # paced: the more is buffered, the slower, down to real time
                    await asyncio.sleep(seconds * ahead / MAX_BUFFERED_SECONDS)
                await self._ws.send(self._message("media", "payload", b64encode(audio).decode()))
                now = self._loop.time()
                self._first_frame_at = self._first_frame_at or now
                self._sent_seconds += seconds
                self._unheard_until = max(self._unheard_until, now) + seconds
                silence.reschedule(self._unheard_until + MAX_SILENCE_SECONDS)

    async def _until_heard(self) -> None:
        await self._ws.send(self._message("mark", "name", f"{self._sent_seconds:.6f}"))
        try:
            async with asyncio.timeout_at(self._unheard_until + MARK_GRACE_SECONDS):
                await self._until(lambda: not self._unheard_until)
        except TimeoutError:
            self._unheard_until = float("inf")  # unconfirmed: counts as unheard

    def _message(self, event: str, key: str = "", value: str = "") -> str:
        """Return a message for Twilio with exactly its keys: others are warning 31951."""
        field = f', "{event}": {{"{key}": "{value}"}}' if key else ""
        return f'{{"event": "{event}", "streamSid": {json.dumps(self._stream_sid)}{field}}}'


# --- Deepgram -------------------------------------------------------------------------------------
SPEAK_PATH = "/v1/speak?encoding=mulaw&sample_rate=8000&container=none"
CONNECT_SECONDS = 2.5  # room for one lost packet, and three tries within MAX_SILENCE_SECONDS
READ_SECONDS = 5.0  # without a byte; Deepgram's first usually comes after 0.2 to 0.4 s
RETRY_PAUSES_SECONDS = (0.25, 0.5)  # after 429 and 5xx; a broken connection is retried at once
MAX_SPEECH_SECONDS = 600  # of audio; 2000 characters take two or three minutes
ADVICE = {  # by HTTP status, or by the number of an OSError
    errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE) or lower MAX_CALLS",
    400: "check DEEPGRAM_MODEL, or the TwiML's model parameter",
    401: "check DEEPGRAM_API_KEY",
    402: "add credit at console.deepgram.com",
    403: "this key may not use this model: check DEEPGRAM_API_KEY and DEEPGRAM_MODEL",
    429: "lower DEEPGRAM_CONCURRENCY, or ask Deepgram for more requests at once",
}
DEFAULT_ADVICE = "see status.deepgram.com, and check DEEPGRAM_URL and the network"

# Whole sentences, each with the quotes and brackets that it closes.
SENTENCES = r"""(?s:\S.{0,1999}(?:(?<=[。！？])|(?:(?<=[.!?…])|(?<=[.!?…]["'”’)\]]))(?=\s)))"""
# At most Deepgram's 2000 characters: to the end, or whole sentences, or whole words, or anything.
PIECE = rf"(?s:\S.{{0,1999}}\Z|{SENTENCES}|\S.{{0,1999}}(?=\s)|\S.{{0,1999}})"


async def split_text(text: Text) -> AsyncGenerator[str, None]:
    """Cut `text` into requests, at sentence ends if possible, as it is written; raise TypeError."""
    if not isinstance(text, str | AsyncIterable):
        raise TypeError(f"a script yields str or async iterables of str, not {type(text).__name__}")
    rest = text if isinstance(text, str) else ""
    if isinstance(text, AsyncIterable):
        parts: Any = aiter(text)
        closing: Any = contextlib.aclosing if hasattr(parts, "aclose") else contextlib.nullcontext
        async with closing(parts):  # so that whoever is writing stops, too
            async for part in parts:
                rest = (rest + part).lstrip()
                while cut := re.match(PIECE if len(rest) > 2000 else SENTENCES, rest):
                    yield cut[0].rstrip()
                    rest = rest[cut.end() :].lstrip()
    for piece in re.findall(PIECE, rest.strip()):
        yield piece.rstrip()


class SpeechFailed(Exception):
    """Synthesis failed or is incomplete: why, in the few words that fit into a close frame."""

    def __init__(self, reason: str, advice: str = DEFAULT_ADVICE, permanent: bool = False) -> None:
        super().__init__(reason)
        self.advice, self.permanent = advice, permanent  # permanent: a retry cannot succeed


class Speech:
    """The mulaw audio of one piece of text, to which a thread appends as Deepgram sends it."""

    def __init__(self) -> None:
        self.audio, self.loop = bytearray(), asyncio.get_running_loop()
        self.failure: SpeechFailed | None = None
        self.times = [0.0, 0.0]  # loop times of the request and of the first byte, 0.0: not yet
        self.changed, self.ended = asyncio.Event(), asyncio.Event()
        self.fetching: asyncio.Task[None]

    async def chunks(self, unit: int, max_bytes: int) -> AsyncGenerator[bytes, None]:
        """Yield audio as it comes, in multiples of `unit` bytes but the end; raise SpeechFailed."""
        position = 0
        while not self.ended.is_set() or position < len(self.audio):
            size = min(max_bytes, len(self.audio) - position)
            if size := size if self.ended.is_set() else size - size % unit:
                yield bytes(self.audio[position : position + size])
                position += size
            else:
                self.changed.clear()
                await self.changed.wait()
        if self.failure:  # a fresh exception: the shared one would collect every caller's traceback
            raise SpeechFailed(str(self.failure))


def audio_chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body of Deepgram's `response` as it comes; raise SpeechFailed if it is no audio."""
    status, content_type = response.status_code, response.headers.get("Content-Type", "no type")
    if status != 200 or not re.match("(?i)audio/|application/octet-stream", content_type):
        body, headers = response.raw.read1(2**14), response.headers  # not all: it may trickle
        message = body.decode(errors="replace") or headers.get("dg-error", "")
        api_key = response.request.headers["Authorization"].removeprefix("Token ")
        # On one line; the key goes before truncation, which could leave a part of it.
        message = repr(message.replace(api_key, "[key]"))[1:-1][:400]
        request_id = headers.get("dg-request-id", "ID unknown")
        advice = f"{message} (request {request_id}); {ADVICE.get(status, DEFAULT_ADVICE)}"
        permanent = 400 <= status < 500 and status not in (408, 429)
        what = f"200 with {content_type[:20]!a}" if status == 200 else status
        raise SpeechFailed(f"Deepgram answered {what}", advice, permanent)
    started_at, received = time.monotonic(), 0
    while chunk := response.raw.read1(2**16):
        yield chunk
        received += len(chunk)
        if time.monotonic() - started_at > READ_SECONDS + received / BYTES_PER_SECOND:
            raise SpeechFailed("Deepgram is slower than real time")
        if received > MAX_SPEECH_SECONDS * BYTES_PER_SECOND:
            raise SpeechFailed(f"Deepgram sent more than {MAX_SPEECH_SECONDS} s of audio")
    if not received:
        raise SpeechFailed("Deepgram sent no audio")


class TextToSpeech:
    """Deepgram text-to-speech: one request per text in flight, an LRU cache of finished ones."""

    def __init__(self, settings: Settings) -> None:
        self._slots = asyncio.Semaphore(settings.deepgram_concurrency)  # first come, first served
        # Weak: what no call, no thread and no cache holds is wanted by nobody.
        self._speeches = weakref.WeakValueDictionary[tuple[str, str], Speech]()
        self._cache: dict[tuple[str, str], Speech] = {}  # the least recently used first
        self._cache_bytes, self._max_cache_bytes = 0, settings.cache_mb * 2**20
        url = settings.deepgram_url.rstrip("/") + SPEAK_PATH
        headers = {"Authorization": f"Token {settings.deepgram_api_key}"}
        self._request = requests.Request("POST", url, headers).prepare()
        # Its pool is last in, first out: the warmest first. (A Session would heed ~/.netrc's key.)
        self._adapter = requests.adapters.HTTPAdapter(pool_maxsize=settings.deepgram_concurrency)
        # Proxies and CA bundle, read from the environment once (per request: 0.1 ms).
        environment = requests.Session().merge_environment_settings(url, {}, True, None, None)
        self._options: Any = environment | {"timeout": (CONNECT_SECONDS, READ_SECONDS)}

    async def synthesize(self, text: Text, model: str) -> AsyncGenerator[Speech, None]:
        """Yield the speech of each piece of `text`, the next one being fetched meanwhile."""
        if isinstance(text, str) and 0 < len(text.strip()) <= 2000:  # one piece: saves 25 µs
            yield self._get((model, text.strip()))
            return
        speeches = asyncio.Queue[Speech | None]()

        async def write() -> None:  # one task for it all: a time-out may not span tasks
            async with contextlib.aclosing(split_text(text)) as pieces:
                async for piece in pieces:
                    await speeches.join()  # until the one before is being spoken
                    speeches.put_nowait(self._get((model, piece)))

        writer = asyncio.create_task(write())
        writer.add_done_callback(lambda _: speeches.put_nowait(None))
        try:
            while speech := await speeches.get():
                speeches.task_done()
                yield speech
            await writer
        finally:
            writer.cancel()
            while (await asyncio.wait([writer], timeout=CLOSE_SECONDS))[1]:
                writer.cancel()  # again: its end hangs, or it swallowed the first

    def _get(self, key: tuple[str, str]) -> Speech:
        if not (speech := self._speeches.get(key)) or speech.failure:  # still held by a call
            speech = self._speeches[key] = Speech()
            speech.fetching = asyncio.create_task(self._fetch(key, weakref.ref(speech)))
        if self._cache.pop(key, None):
            self._cache[key] = speech  # now the most recently used
        return speech

    async def _fetch(self, key: tuple[str, str], speech_ref: weakref.ref[Speech]) -> None:
        async with self._slots:
            if not (speech := speech_ref()):  # all hung up while it was queued: don't pay for it
                return
            speech.times[0] = speech.loop.time()
            # A daemon thread: the interpreter joins an executor's threads at exit.
            threading.Thread(target=self._download, args=(speech, *key), daemon=True).start()
            await speech.ended.wait()  # in any case: it is billed, and keeps the connection warm
        speech.changed.set()
        if speech.failure:
            log_error(f"{speech.failure}: {speech.failure.advice}", int(time.monotonic()))
        else:
            self._cache[key] = speech
            self._cache_bytes += len(speech.audio)
        while self._cache_bytes > self._max_cache_bytes:
            self._cache_bytes -= len(self._cache.pop(next(iter(self._cache))).audio)

    def _download(self, speech: Speech, model: str, text: str) -> None:
        """Fetch `speech`, in a thread of its own, since requests blocks."""
        response = None
        try:
            with self._post(model, text) as response:
                for chunk in audio_chunks(response):
                    speech.times[1] = speech.times[1] or speech.loop.time()
                    speech.audio += chunk
                    speech.loop.call_soon_threadsafe(speech.changed.set)
        except SpeechFailed as failure:
            speech.failure = failure
        except Exception as error:  # requests' and urllib3's, many; a ValueError is int()'s own
            cause: BaseException = error
            while (inner := cause.__cause__ or cause.__context__) and type(inner) is not ValueError:
                cause = inner
            reason = "the connection to Deepgram failed"
            if isinstance(cause, TimeoutError):
                reason = "Deepgram timed out"
            elif response is not None:
                reason = "Deepgram closed the connection mid-response"
            advice = ADVICE.get(getattr(cause, "errno", 0), DEFAULT_ADVICE)
            speech.failure = SpeechFailed(reason, f"{cause}; {advice}")
        with contextlib.suppress(RuntimeError):  # the event loop has ended, with the server
            speech.loop.call_soon_threadsafe(speech.ended.set)

    def _post(self, model: str, text: str) -> requests.Response:
        """Return the response, after three tries at most; silence is not tried again."""
        request = self._request.copy()
        request.prepare_url(request.url, {"model": model})
        request.prepare_body(None, None, json={"text": text})
        for pause_seconds in RETRY_PAUSES_SECONDS:
            with contextlib.suppress(requests.ConnectionError):  # perhaps it had idled too long
                response = self._adapter.send(request, **self._options)
                if response.status_code != 429 and response.status_code < 500:
                    return response
                response.raw.read1(2**14)  # else the connection could not be used again
                time.sleep(pause_seconds)
        return self._adapter.send(request, **self._options)


# --- Settings -------------------------------------------------------------------------------------
# What a setting must match, and how errors put it.
U16 = r"([0-5]?[0-9]{1,4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5]))))"
ANY = (r"[^\0]+", "text")
COUNT = (U16, "a whole number from 0 to 65535")
POSITIVE = (rf"(?!0+\Z){U16}", "a whole number from 1 to 65535")
SECRET = (r"[!-~]+", "printable ASCII without spaces (copy it again)")
YES_OR_NO = (r"(yes|true|on|1)|no|false|off|0", "yes or no")
LEVEL = (r"DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR")
HTTP_URL = (rf"https?://\w[\w.-]*(:{U16})?(/[^\s?#]*)?", "a URL such as https://api.deepgram.com")
WSS_URL = (rf"((https|wss)://)?[\w.-]+(:{U16})?(/[\w./~%+-]*)?", "a URL such as wss://example.com")


class SettingsError(Exception):
    """A setting is missing or wrong; the message says how to fix it."""


@dataclasses.dataclass(frozen=True, repr=False)  # some are secret
class Settings:
    """Every setting: its type, what it must be, what it is for; in capitals in the environment."""

    deepgram_api_key: Annotated[str, SECRET, "your key, from console.deepgram.com; required"] = ""
    deepgram_url: Annotated[str, HTTP_URL, "Deepgram API base URL"] = "https://api.deepgram.com"
    deepgram_model: Annotated[str, ANY, "voice, unless the TwiML sets a model"] = "aura-asteria-en"
    deepgram_concurrency: Annotated[int, POSITIVE, "concurrent requests your plan allows"] = 15
    greeting: Annotated[str, ANY, "what callers hear by default"] = "Hello, how are you today?"
    close_after_speech: Annotated[bool, YES_OR_NO, "yes: the TwiML goes on after the texts"] = False
    cache_mb: Annotated[int, COUNT, "speech cache in MiB, 0 to disable"] = 16
    host: Annotated[str, ANY, "address to listen on; 0.0.0.0 for all interfaces"] = "localhost"
    port: Annotated[int, COUNT, "port to listen on; 0 picks a free port"] = 5000
    tls_cert: Annotated[str, ANY, "PEM file with the certificate chain, to serve TLS"] = ""
    tls_key: Annotated[str, ANY, "PEM file with its private key, unless TLS_CERT has it"] = ""
    public_url: Annotated[str, WSS_URL, "URL in the TwiML; empty: ask the local ngrok agent"] = ""
    twilio_auth_token: Annotated[str, SECRET, "your token; rejects what Twilio did not sign"] = ""
    max_calls: Annotated[int, POSITIVE, "maximum concurrent calls; the rest get a 503"] = 500
    drain_seconds: Annotated[int, COUNT, "how long a shutdown waits for current texts"] = 30
    log_level: Annotated[str, LEVEL, "DEBUG, INFO, WARNING or ERROR"] = "INFO"

    @classmethod
    def load(cls) -> Settings:
        """Read the environment and, for what it lacks or has empty, `.env`; raise SettingsError."""
        path, texts, values = Path(".env").absolute(), dict[str, str](), dict[str, Any]()
        try:
            content = path.read_text("utf-8-sig") if path.exists() else ""
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", "it is not UTF-8, so save it as UTF-8")
            raise SettingsError(f"Cannot read {path}: {why}.") from None
        for name, text, (source, line), is_broken in parse_stream(io.StringIO(content)):
            if is_broken:
                line += source.removesuffix(source.lstrip()).count("\n")
                raise SettingsError(f'Cannot parse {path}, line {line}: write NAME="value".')
            if name and name not in FIELDS:
                for meant in difflib.get_close_matches(name.upper(), FIELDS, 1, cutoff=0.75):
                    log.warning("%s: %s is not a setting; did you mean %s?", path, name, meant)
            texts[name or ""] = text or ""
        texts |= {name: text for name, text in os.environ.items() if text.strip()}
        for name, (kind, valid, _) in FIELDS.items():
            if text := texts.get(name, "").strip():
                if not (match := re.fullmatch(valid[0], text, re.IGNORECASE | re.DOTALL)):
                    but = "" if valid is SECRET else f", not {text!r}"
                    raise SettingsError(f"{name} must be {valid[1]}{but}.")
                values[name.lower()] = bool(match[1]) if kind is bool else kind(text)
        if "deepgram_api_key" not in values:
            do = "Put" if path.exists() else "No such file: `cp .env.example .env`, then put"
            problem = f"is neither set nor in {path}. {do} one there, from console.deepgram.com"
            raise SettingsError(f"DEEPGRAM_API_KEY {problem}.")
        return cls(**values)


FIELDS = {n.upper(): get_args(t) for n, t in get_type_hints(Settings, include_extras=True).items()}


# --- The server -----------------------------------------------------------------------------------
PATH, HEALTH_PATH = "/twilio", "/healthz"
TWIML = """\
<Response>
  <Connect><Stream url="{url}"/></Connect>
  <Say>Sorry, our voice service is not available. Please call again later.</Say>
</Response>"""
OS_ADVICE = {
    errno.EADDRINUSE: "set another PORT, for ngrok, too (a Mac's AirPlay Receiver holds 5000)",
    errno.EACCES: "below 1024 it takes CAP_NET_BIND_SERVICE (see the README's systemd section)",
}


class Connection(ServerConnection):
    """A connection that logs why its handshake failed, and closes however it was lost."""

    async def handshake(self, *args: Any) -> None:
        """Perform the opening handshake; log at DEBUG why websockets itself rejects one."""
        await super().handshake(*args)
        if exc := self.protocol.handshake_exc:
            log.debug("rejected a handshake from %s: %s", self.remote_address, exc.__cause__ or exc)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close it; quietly, if it was lost while its last data was sent."""
        with contextlib.suppress(AttributeError):  # asyncio's abort() raises it in that case
            await super().close(code, reason)


class Server:
    """Admission, active calls and graceful shutdown."""

    def __init__(self, settings: Settings, script: Script) -> None:
        self._settings, self._script, self._tts = settings, script, TextToSpeech(settings)
        self._calls: dict[asyncio.Task[Any], Call] = {}
        self._exits = asyncio.Queue[int]()  # each an exit status

    def _process_request(self, ws: ServerConnection, request: Request) -> Response | None:
        """Return None to go on with the handshake, else the response to give instead."""
        calls = len(self._calls)
        if request.method not in ("GET", "HEAD"):
            status, body = 405, "Method not allowed.\n"
        elif request.path == HEALTH_PATH:
            status, body = 200 if ws.server.is_serving() else 503, json.dumps({"calls": calls})
        elif request.path != PATH:
            status, body = 404, "Not found.\n"
        elif self._settings.twilio_auth_token and not self._is_signed(request.headers):
            status, body = 403, "Not signed by Twilio.\n"
        elif calls >= self._settings.max_calls:
            log.warning("rejected a call: MAX_CALLS=%d reached", calls)
            status, body = 503, "Too many calls.\n"
        else:
            return None  # websockets itself gives a 503 when shutting down
        response = ws.respond(status, body if request.method != "HEAD" else "")
        response.headers["Allow"] = "GET, HEAD"
        if request.path == HEALTH_PATH:
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
        return response

    def _is_signed(self, headers: Headers) -> bool:
        """Return whether Twilio signed the handshake, with or without a final / and :443."""
        token = self._settings.twilio_auth_token.encode()
        url = stream_url(self._settings.public_url or "".join(headers.get_all("Host")))
        host, _, path = url.removeprefix("wss://").replace(":443/", "/").partition("/")
        signature = "".join(headers.get_all("X-Twilio-Signature")).encode()
        for end in (f"/{path}", f"/{path}/", f":443/{path}", f":443/{path}/"):
            digest = b64encode(hmac.digest(token, f"wss://{host}{end}".encode(), "sha1"))
            if hmac.compare_digest(digest, signature):
                return True
        log.warning(
            f"rejected a handshake: X-Twilio-Signature does not match {url[:200]!a}; if this was "
            "Twilio, check TWILIO_AUTH_TOKEN, and set PUBLIC_URL to the URL in the TwiML"
        )
        return False

    async def _serve_call(self, ws: ServerConnection) -> None:
        task: Any = asyncio.current_task()
        self._calls[task] = Call(ws, self._settings, self._tts)
        task.add_done_callback(self._calls.pop)
        await self._calls[task].run(self._script)

    async def run(self) -> int:
        """Serve until a signal; return the exit status, raise SettingsError if it cannot listen."""
        loop, host, port = asyncio.get_running_loop(), self._settings.host, self._settings.port
        loop.set_exception_handler(on_loop_error)
        for sig in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(sig, self._exits.put_nowait, 0)
            except NotImplementedError:  # Windows
                signal.signal(sig, lambda *_: loop.call_soon_threadsafe(self._exits.put_nowait, 0))
        with contextlib.suppress(ImportError, ValueError):  # Windows has none; macOS allows less
            from resource import RLIMIT_NOFILE, getrlimit, setrlimit

            soft, hard = getrlimit(RLIMIT_NOFILE)  # -1: infinite
            others = self._settings.deepgram_concurrency + 32  # and whatever else is open
            limit = min(self._settings.max_calls + others, hard % 2**63)
            if 0 <= soft < limit:
                setrlimit(RLIMIT_NOFILE, (limit, hard))
            if limit < self._settings.max_calls + others:
                log.warning("raise ulimit -n %d: only %d calls fit", limit, max(0, limit - others))
        options: dict[str, Any] = {"create_connection": Connection, "max_size": 2**16}  # bytes
        options |= {"process_request": self._process_request, "ssl": tls_context(self._settings)}
        try:
            listening = await serve(self._serve_call, host, port, compression=None, **options)
        except (OSError, UnicodeError) as error:  # the latter of HOST
            advice = OS_ADVICE.get(getattr(error, "errno", 0), "check HOST and PORT")
            why = re.sub(r"(?i).*: |\[errno -?\d+\] |\)$", "", str(error))
            raise SettingsError(f"Cannot listen on {host}:{port} ({why}): {advice}.") from None
        prefetch = asyncio.create_task(self._prefetch())
        await asyncio.to_thread(announce, self._settings, listening.sockets[0].getsockname()[1])
        gc.freeze()  # else the first calls wait for 45 ms while all that was imported is searched
        status = await self._exits.get()
        prefetch.cancel()
        listening.close(close_connections=False)
        await asyncio.sleep(0)  # until it has closed: who is let in meanwhile is drained, too
        if self._calls:
            await self._drain(status)
        return status

    async def _prefetch(self) -> None:
        greeting, model = self._settings.greeting, self._settings.deepgram_model
        async for speech in self._tts.synthesize(greeting, model):
            await asyncio.wait([speech.fetching])
            if speech.failure and speech.failure.permanent:
                log.critical("Deepgram rejects the greeting, so every call would fail: exiting")
                self._exits.put_nowait(1)
                return
            if speech.failure:
                log.warning("could not prefetch the greeting: the next call will retry")

    async def _drain(self, status: int) -> None:
        seconds, first = self._settings.drain_seconds, asyncio.FIRST_COMPLETED
        log.info("draining %d call(s); a signal ends them at once", len(self._calls))
        ended = asyncio.ensure_future(asyncio.wait(list(self._calls)))
        signaled = asyncio.ensure_future(self._exits.get())
        for call in self._calls.values():
            call.drain()
        await asyncio.wait({ended, signaled}, timeout=seconds, return_when=first)
        for call in self._calls.values():
            call.end(1001, "cut off by shutdown")
        await asyncio.wait({ended}, timeout=3 * CLOSE_SECONDS)
        if not ended.done():
            log.error("a script ignores its cancellation: exiting all the same")
            os._exit(status)  # asyncio.run() would wait for it


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what asyncio could not do; a lack of file descriptors in one line."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        log_error(f"cannot accept a call: {error}; {ADVICE[error.errno]}", int(loop.time()))
    else:
        loop.default_exception_handler(context)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context, None for plain ws; raise SettingsError."""
    cert, key = settings.tls_cert or settings.tls_key, settings.tls_key or settings.tls_cert
    if not key:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        pem = Path(cert).read_text("latin-1") + Path(key).read_text("latin-1")
        context.load_cert_chain(cert, key, password=lambda: "")  # else OpenSSL prompts
    except OSError as error:  # ssl.SSLError is one, too
        problem = f"must be PEM files, the certificate chain and its private key ({error})"
        if not isinstance(error, ssl.SSLError):
            problem = f"cannot be read ({error.strerror}: {error.filename})"
        elif error.reason == "KEY_VALUES_MISMATCH":
            problem = "do not belong together: the key is not the certificate's"
        elif "ENCRYPTED" in pem:
            problem = "cannot be used, since the key has a password: remove it with openssl pkey"
        raise SettingsError(f"TLS_CERT={cert} and TLS_KEY={key} {problem}.") from None
    return context


def stream_url(address: str) -> str:
    """Return `address` (scheme and path optional) as the wss URL for the TwiML."""
    host, slash, path = re.sub("(?i)^(https|wss)://", "", address).partition("/")
    return f"wss://{host}{(slash + path).rstrip('/') or PATH}"


def announce(settings: Settings, port: int) -> None:
    """Print where the server listens and the TwiML to paste; ask ngrok for its URL if need be."""
    address = settings.public_url
    with contextlib.suppress(Exception):  # there may be no ngrok, or something else may answer
        if not address:
            api = requests.get("http://127.0.0.1:4040/api/tunnels", timeout=1, proxies={"http": ""})
            ours = [t for t in api.json()["tunnels"] if t["config"]["addr"].endswith(f":{port}")]
            address = next(t["public_url"] for t in ours if t["public_url"].startswith("https://"))
    scheme = "wss" if settings.tls_cert or settings.tls_key else "ws"
    print(f"Listening on {scheme}://{settings.host}:{port}{PATH}. The TwiML to paste:\n")
    print(TWIML.format(url=stream_url(address or "YOUR-HOST")), flush=True)
    if not address:
        print(f"\nReplace YOUR-HOST: ngrok does not answer, or publishes another port than {port}.")
        print(f"Or run `ngrok http {port}` first, or set PUBLIC_URL, and restart.", flush=True)


def main(script: Script = script) -> int:
    """Serve `script` as the command line and the settings say; return the exit status."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = f"{__doc__}\nSettings, in the environment or in .env:\n"
    for name, (_, _, about) in FIELDS.items():
        default = getattr(Settings, name.lower())
        parser.description += f"\n# {about}\n{name}={'no' if default is False else default}"
    parser.parse_args()
    # At WARNING for the libraries, of which websockets logs a line per health check.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = Settings.load()
        log.setLevel(settings.log_level.upper())
        if not settings.twilio_auth_token:
            log.warning("TWILIO_AUTH_TOKEN is not set: anyone can spend your Deepgram credit")
        return asyncio.run(Server(settings, script).run())
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
