"""Play Deepgram Aura text-to-speech to people who call a Twilio number.

    pip install -r requirements.txt
    cp .env.example .env        # then put your DEEPGRAM_API_KEY into it
    ngrok http 5000             # in another terminal, and leave it running
    python twilio_aura.py

It prints the TwiML to paste into a TwiML Bin. Twilio then opens a websocket for every call, a
bidirectional Media Stream. A pair of tasks serves it: the receiver takes the stream SID, key
presses and marks; the sender runs `script` and streams Deepgram's 8 kHz mulaw as it arrives.

To change what callers hear, edit `script`, nothing else, or pass one of your own to `main`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import difflib
import errno
import functools
import gc
import hmac
import inspect
import json
import logging
import os
import re
import signal
import ssl
import sys
import threading
import time
from asyncio import timeout
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import requests
from dotenv import load_dotenv
from websockets import ConnectionClosed, Headers, Request, Response, ServerConnection
from websockets.asyncio.server import serve

log = logging.getLogger("twilio_aura")


# --- What is said ---------------------------------------------------------------------------------

# An async iterable is spoken while it is written. Language models' clients also send None.
Text = str | AsyncIterable[str | None]
Script = Callable[["Call"], AsyncGenerator[Text]]


async def script(call: Call) -> AsyncGenerator[Text]:
    """Yield the texts to speak, in order.

    Each `yield` returns once the caller has heard the text or interrupted it with a key. A script
    may use the attributes that `Call` lists, and its methods `digit`, `hang_up` and `redirect`.
    """
    text = call.parameters.get("text", "").strip()
    yield text or call.settings.greeting


# --- A call ---------------------------------------------------------------------------------------

TWILIO_API = "https://api.twilio.com/2010-04-01"
TWILIO_SECONDS = 5.0  # for its API to accept a connection, and then to answer
START_SECONDS = 10.0  # Twilio sends `start` at once
# The next message, of 0.4 s at most, waits until Twilio has only this much left to play. More would
# delay a `clear` on a slow link.
MAX_BUFFERED_SECONDS = 2.6
MAX_SPEED = 10.0  # times real time: a long text leaves room for other calls' first sounds
MAX_SILENCE_SECONDS = 9.0  # then we close, and the TwiML goes on about 1 s later
MARK_GRACE_SECONDS = 3.0  # for a mark after playback should have ended
CLOSE_SECONDS = 2.0  # for the closing handshake, and then for what a script does at its end
MAX_UNREAD_DIGITS = 100  # some scripts take none
# The messages to Twilio, with exactly these keys: others cause warning 31951. Not by json.dumps,
# which would search all the audio for something to escape.
MEDIA = '{"event": "media", "streamSid": "%s", "media": {"payload": "%s"}}'
MARK = '{"event": "mark", "streamSid": "%s", "mark": {"name": "%s"}}'
CLEAR = '{"event": "clear", "streamSid": "%s"}'


class Call:
    """One call: what a script may use, and the pair of tasks that serves it.

    Attributes:
        settings: The server's.
        sid: Twilio's call SID.
        parameters: The TwiML's <Parameter>s, by name.
        model: The voice; a script may change it between texts.
        close_after_speech: Whether to end the stream when the script returns, so that the TwiML
            goes on; a script may change it.
    """

    def __init__(self, ws: ServerConnection, settings: Settings, tts: TextToSpeech) -> None:
        self.settings = settings
        self.sid = ""
        self.parameters: dict[str, str] = {}
        self.model = settings.deepgram_model
        self.close_after_speech = settings.close_after_speech
        self._ws = ws
        self._tts = tts
        self._account_sid = ""
        self._stream_sid = ""  # empty until `start` has come
        self._digits = collections.deque[str](maxlen=MAX_UNREAD_DIGITS)
        self._returned_mark = ""
        self._draining = False
        self._changed = asyncio.Event()  # set by each message but media, and by a drain
        self._playback = Playback()
        # Around the text that is being spoken, else None: a key press makes it expire.
        self._text_timeout: asyncio.Timeout | None = None
        self._stop_reason = "hung up"
        self._ended: asyncio.Future[tuple[int, str]] = asyncio.Future()  # close code, reason

    def __str__(self) -> str:
        return f"call {self.sid or self._ws.remote_address}"

    async def digit(self, seconds: float | None = None) -> str:
        """Return the next key pressed, or already pressed; "" after so many seconds without one."""
        try:
            async with timeout(seconds):
                while not self._digits:
                    # A script may wait for a key in another task while it speaks.
                    if self._draining and not self._text_timeout:
                        self.end(1000, "drained")
                    await self._change()
                return self._digits.popleft()
        except TimeoutError:
            return ""

    async def hang_up(self) -> None:
        """Have Twilio end the call; see `redirect`."""
        await self.redirect("<Response><Hangup/></Response>")

    async def redirect(self, twiml: str) -> None:
        """Have Twilio go on with `twiml`, such as a <Dial>, in place of what follows </Connect>.

        This needs TWILIO_AUTH_TOKEN. If Twilio rejects it or does not answer, the stream is closed,
        so that what follows </Connect> is run. It does not return: the script is cancelled with the
        end of the call, as by a hang-up. After that, as in a script's `finally`, it does nothing.
        """
        if self._ended.done():
            return
        self._stop_reason = "redirected"  # Twilio may end the stream before it answers
        url = f"{TWILIO_API}/Accounts/{self._account_sid}/Calls/{self.sid}.json"
        login = (self._account_sid, self.settings.twilio_auth_token)
        try:
            response = await in_thread(
                requests.post, url, {"Twiml": twiml}, auth=login, timeout=TWILIO_SECONDS
            )
            response.raise_for_status()
        except requests.RequestException as error:
            log.error(
                "%s: Twilio did not redirect it (%s): "
                "check TWILIO_AUTH_TOKEN, the TwiML and the network",
                self,
                error,
            )
            self.end(1000, "not redirected")
        await asyncio.Event().wait()  # until `run` cancels the script

    def end(self, code: int, reason: str) -> None:
        """End the call with this close code, unless it has ended already."""
        if not self._ended.done():
            self._ended.set_result((code, reason))

    async def run(self, script: Script) -> None:
        """Serve the call until one of the pair, or the server, calls `end`."""
        receiver = asyncio.create_task(self._receive())
        sender = asyncio.create_task(self._send(script))
        code, reason = await self._ended
        # close() may abort the transport, and we do, so that websockets does not later. If it has
        # closed itself meanwhile, after its last data, asyncio raises AttributeError.
        with suppress(AttributeError):
            try:
                async with timeout(CLOSE_SECONDS):
                    await self._ws.close(code, reason)
            except TimeoutError:
                reason += "; the peer did not acknowledge the close"
            self._ws.transport.abort()
        receiver.cancel()
        sender.cancel()
        await asyncio.wait([receiver, sender], timeout=CLOSE_SECONDS)
        log.info("%s ended: %s; %s", self, reason, self._playback.summary())

    def drain(self) -> None:
        """End the call after its current text, or where the script waits for a key."""
        self._draining = True
        self._changed.set()

    async def _change(self) -> None:
        """Wait for the next message or a drain."""
        self._changed.clear()  # no await since the caller's check, so that none is missed
        await self._changed.wait()

    async def _until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` is true."""
        while not condition():
            await self._change()

    # The receiver task: what Twilio tells us.

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._ws.recv(decode=False)
                if self._stream_sid and b'"payload"' in message:
                    continue  # the caller's audio, 50 messages a second: spare the parsing
                self._on_message(message)
                self._changed.set()
        except ConnectionClosed as closed:
            # websockets closed first: no answer to pings, too large a message, a protocol error.
            if closed.sent and not closed.rcvd_then_sent:
                self.end(closed.sent.code, f"connection failed: {closed}")
            else:
                self.end(1000, self._stop_reason)

    def _on_message(self, message: bytes) -> None:
        try:
            data = json.loads(message)
            match data["event"]:
                case "connected":
                    pass
                case "start":
                    self._on_start(data["start"])
                case "dtmf":
                    self._on_digit(data["dtmf"]["digit"])
                case "mark":
                    self._returned_mark = data["mark"]["name"]
                case "stop":
                    self.end(1000, self._stop_reason)
                case _:
                    raise ValueError("an unknown event")
        except Exception:  # it may have any shape
            log.warning("%s: ignored an unexpected message: %.200a", self, message)

    def _on_start(self, start: dict[str, Any]) -> None:
        stream_sid = clean_sid(start["streamSid"])
        if self._stream_sid or not stream_sid:
            raise ValueError("a second start, or an empty one")
        parameters = start.get("customParameters") or {}
        self.parameters = {name: str(value) for name, value in parameters.items()}
        self.model = self.parameters.get("model", "").strip() or self.model
        self.sid = clean_sid(start.get("callSid"))
        self._account_sid = clean_sid(start.get("accountSid"))
        self._stream_sid = stream_sid
        self._playback = Playback()  # whose clock starts now
        log.info("%s started", self)

    def _on_digit(self, digit: str) -> None:
        self._digits.append(digit)
        if self._text_timeout and self._playback.ends_at:  # not before the text's first sound
            self._text_timeout.reschedule(0)
            self._text_timeout = None

    # The sender task: what we say.

    async def _send(self, script: Script) -> None:
        try:
            async with timeout(START_SECONDS):
                await self._until(lambda: self._stream_sid)
        except TimeoutError:
            self.end(1008, f"no start within {START_SECONDS:.0f} s")
            return
        try:
            await self._run_script(script)
        except SpeechFailed as failure:
            self.end(1011, str(failure))
        except BaseException as error:  # cancelled: by `run` once ended, else by the script
            if isinstance(error, Exception) or not self._ended.done():
                log.exception("%s: the script failed", self)
                self.end(1011, "the script failed")

    async def _run_script(self, script: Script) -> None:
        """Say the texts of `script`, then wait for the end of the call."""
        async with aclosing(script(self)) as texts:
            async for text in texts:
                await self._say(text)
                if self._draining:
                    break
        if self.close_after_speech and not self._draining:
            self.end(1000, "completed")
        await self._until(lambda: self._draining)  # unless `run` cancels this first
        self.end(1000, "drained")

    async def _say(self, text: Text) -> None:
        """Return when the caller has heard `text`, or pressed a key; raise what prevented it.

        A failure is raised only after the audio before it was heard. So a TimeoutError that arrives
        here means a key press, which ends the text even if it has failed.
        """
        failure: Exception | None = None
        try:
            async with timeout(None) as self._text_timeout:
                try:
                    await self._stream(text)
                except Exception as error:
                    failure = error
                await self._until_heard()
        except TimeoutError:
            self._playback.clear()
            await self._emit(CLEAR % self._stream_sid)
            return
        finally:
            self._text_timeout = None
        if failure:
            raise failure

    async def _stream(self, text: Text) -> None:
        """Send Twilio the speech of `text` as it comes, but not too far ahead of what plays."""
        try:
            async with (
                timeout(MAX_SILENCE_SECONDS) as silence,
                aclosing(self._tts.speak(text, self.model)) as chunks,
            ):
                async for audio in chunks:
                    ahead = self._playback.ahead_seconds()
                    if ahead > MAX_BUFFERED_SECONDS:
                        await asyncio.sleep(ahead - MAX_BUFFERED_SECONDS)
                    elif ahead:  # not before the first sound
                        await asyncio.sleep(ahead / MAX_SPEED)
                    await self._emit(MEDIA % (self._stream_sid, b64encode(audio).decode()))
                    self._playback.add(audio)
                    silence.reschedule(self._playback.ends_at + MAX_SILENCE_SECONDS)
        except TimeoutError:
            if silence.expired():
                raise SpeechFailed(f"no audio for {MAX_SILENCE_SECONDS:.0f} s") from None
            raise  # `text` raised it

    async def _until_heard(self) -> None:
        """Wait for a mark, which Twilio returns when all before it has been played."""
        name = str(time.monotonic())  # another one each time
        try:
            async with timeout(self._playback.ahead_seconds() + MARK_GRACE_SECONDS):
                await self._emit(MARK % (self._stream_sid, name))
                await self._until(lambda: self._returned_mark == name)
        except TimeoutError:
            log.warning("%s: no mark came back: does the TwiML have <Start>, not <Connect>?", self)
        self._playback.ends_at = 0.0  # not clear(): it was heard

    async def _emit(self, message: str) -> None:
        with suppress(ConnectionClosed):  # the receiver ends the call, and says why
            await self._ws.send(message)


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Await what `function` returns, in a thread of its own, since requests blocks.

    A daemon thread: an executor's may come late, and would hold up the exit of the process.
    """
    result = Future[Any]()
    result.set_running_or_notify_cancel()  # nobody can cancel it

    def run() -> None:
        try:
            result.set_result(function(*args, **kwargs))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


def clean_sid(sid: object) -> str:
    """Return `sid` with nothing in it but what is fit for a URL, a message and the log."""
    return re.sub("[^A-Za-z0-9_-]", "", str(sid or ""))[:64]


class Playback:
    """How much audio Twilio was sent on one call, and has played, by our clock.

    Attributes:
        ends_at: When all that was sent will have been played, by time.monotonic(), which is the
            event loop's time; 0.0 once a mark or a `clear` says that nothing plays.
    """

    def __init__(self) -> None:
        self.ends_at = 0.0
        self._started_at = time.monotonic()
        self._sent_seconds = 0.0
        self._cleared_seconds = 0.0
        self._first_sent_at = 0.0

    def add(self, audio: bytes) -> None:
        """Count `audio` as sent."""
        now = time.monotonic()
        seconds = len(audio) / BYTES_PER_SECOND
        self._first_sent_at = self._first_sent_at or now
        self._sent_seconds += seconds
        self.ends_at = max(self.ends_at, now) + seconds

    def ahead_seconds(self) -> float:
        """Return how much has been sent but not yet played."""
        return max(0.0, self.ends_at - time.monotonic())

    def clear(self) -> None:
        """Count what has not yet been played as never to be heard."""
        self._cleared_seconds += self.ahead_seconds()
        self.ends_at = 0.0

    def summary(self) -> str:
        """Return, for the log, how soon the first audio was sent, and how much was heard."""
        if not self._first_sent_at:
            return "no audio sent"
        first_ms = (self._first_sent_at - self._started_at) * 1000
        heard = self._sent_seconds - self._cleared_seconds - self.ahead_seconds()
        return (
            f"first audio {first_ms:.0f} ms; sent {self._sent_seconds:.1f} s, heard {heard:.1f} s"
        )


# --- Deepgram -------------------------------------------------------------------------------------

BYTES_PER_SECOND = 8000  # of mulaw at 8 kHz
FRAME_BYTES = 160  # 20 ms; whole frames avoid the jitter that some callers hear
MAX_CHUNK_BYTES = 20 * FRAME_BYTES  # 0.4 s: on a slow link, too, the first sound is soon through
FORMAT = "encoding=mulaw&sample_rate=8000&container=none"  # a WAV header would be a click
CONNECT_SECONDS = 2.5  # a lost packet is resent after 1 s; three tries fit MAX_SILENCE_SECONDS
READ_SECONDS = 5.0  # without a byte; Deepgram's first usually comes after 0.2 to 0.4 s
MAX_RESPONSE_SECONDS = 120.0  # Deepgram sends 2000 characters' speech within some 20 s
RETRY_PAUSES_SECONDS = (0.25, 0.5)  # after 429 and 5xx; a broken connection is retried at once
ADVICE = {  # by HTTP status
    400: "check DEEPGRAM_MODEL, DEEPGRAM_OPTIONS, or the TwiML's model parameter",
    401: "check DEEPGRAM_API_KEY",
    402: "add credit at console.deepgram.com",
    403: "this key may not use this model: check DEEPGRAM_API_KEY and DEEPGRAM_MODEL",
    429: "lower DEEPGRAM_CONCURRENCY, or ask Deepgram for more requests at once",
}
DEFAULT_ADVICE = "see status.deepgram.com, and check DEEPGRAM_URL and the network"


class SpeechFailed(Exception):
    """Synthesis failed or is incomplete; the reason must fit a close frame (123 bytes)."""

    def __init__(self, reason: str, advice: str = DEFAULT_ADVICE, permanent: bool = False) -> None:
        super().__init__(reason)
        self.advice = advice
        self.permanent = permanent  # a retry cannot succeed


class Piece(NamedTuple):
    """What is requested: a text, and the voice that is to say it."""

    model: str
    text: str


class Speech:
    """The mulaw audio of one piece of text, to which a thread appends as Deepgram sends it."""

    def __init__(self) -> None:
        self.audio = bytearray()
        self.loop = asyncio.get_running_loop()
        self.failure: SpeechFailed | None = None
        self.changed = asyncio.Event()
        self.is_complete = False  # or has failed
        self.fetching: asyncio.Task[None]  # kept here: asyncio holds tasks only weakly

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the audio as it comes, in whole frames but for its end; raise SpeechFailed."""
        position = 0
        while not self.is_complete or position < len(self.audio):
            size = min(MAX_CHUNK_BYTES, len(self.audio) - position)
            if not self.is_complete:
                size -= size % FRAME_BYTES
            if size:
                yield bytes(self.audio[position : position + size])
                position += size
            else:  # the thread appends first, and then has `changed` set: none is missed
                self.changed.clear()
                await self.changed.wait()
        if self.failure:
            raise self.failure


class TextToSpeech:
    """Deepgram text-to-speech: those who want the same text share one request, or the cache."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = settings.deepgram_url.rstrip("/")
        self._query = f"{FORMAT}&{settings.deepgram_options}".rstrip("&")
        self._session = requests.Session()
        self._session.auth = self._authorize  # a header alone would lose to ~/.netrc
        self._session.mount(
            self._url, requests.adapters.HTTPAdapter(pool_maxsize=settings.deepgram_concurrency)
        )
        self._slots = asyncio.Semaphore(settings.deepgram_concurrency)  # first come, first served
        self._in_flight: dict[Piece, Speech] = {}
        self._cache = collections.OrderedDict[Piece, Speech]()  # the least recently used first
        self._cache_bytes = 0

    async def speak(self, text: Text, model: str) -> AsyncGenerator[bytes]:
        """Yield the mulaw audio of `text`; raise SpeechFailed, or what `text` raises."""
        if isinstance(text, str) and len(text) <= MAX_CHARACTERS:
            if is_speakable(text):
                async for chunk in self._get(Piece(model, text.strip())).chunks():
                    yield chunk
            return
        speeches = asyncio.Queue[Speech | None]()  # holds one, then None
        writer = asyncio.create_task(self._request_pieces(text, model, speeches))
        try:
            while speech := await speeches.get():
                speeches.task_done()  # join() returns: the next piece is requested
                async for chunk in speech.chunks():
                    yield chunk
            await writer  # raises what `text` has raised
        finally:
            writer.cancel()
            await asyncio.wait([writer], timeout=CLOSE_SECONDS)

    async def _request_pieces(
        self, text: Text, model: str, speeches: asyncio.Queue[Speech | None]
    ) -> None:
        """Put the speech of each piece of `text` into `speeches`, and None at the end.

        A task of its own, so that it runs ahead of the speech; and only one, since a `timeout()`
        in `text` must exit in the task that it entered in.
        """
        try:
            async with aclosing(split_text(text)) as pieces:
                async for piece in pieces:
                    if is_speakable(piece):
                        await speeches.join()  # until the piece before is being spoken
                        speeches.put_nowait(self._get(Piece(model, piece.strip())))
        finally:
            speeches.put_nowait(None)

    def _get(self, piece: Piece) -> Speech:
        """Return the speech of `piece`: cached, being fetched for somebody, or requested now."""
        if piece in self._cache:
            self._cache.move_to_end(piece)
            return self._cache[piece]
        if piece not in self._in_flight:
            speech = Speech()
            self._in_flight[piece] = speech
            speech.fetching = asyncio.create_task(self._fetch(speech, piece))
        return self._in_flight[piece]

    async def _fetch(self, speech: Speech, piece: Piece) -> None:
        """Fetch `speech` to its end, even if its callers hang up: it will be cached."""
        try:
            async with self._slots, timeout(MAX_RESPONSE_SECONDS):
                await in_thread(self._download, speech, piece)
        except SpeechFailed as failure:
            speech.failure = failure
        except TimeoutError:
            speech.failure = SpeechFailed("Deepgram is too slow")  # its thread is left alone
        except RuntimeError as error:  # a thread cannot start
            speech.failure = SpeechFailed("no thread for Deepgram", f"{error}; raise TasksMax")
        except Exception as error:  # requests' and urllib3's have no common base
            reason = "the connection to Deepgram failed"
            speech.failure = SpeechFailed(reason, f"{error}; {DEFAULT_ADVICE}")
        del self._in_flight[piece]
        speech.is_complete = True
        speech.changed.set()
        if speech.failure:
            log.error("%s: %s", speech.failure, speech.failure.advice)
        else:
            self._cache_speech(speech, piece)

    def _cache_speech(self, speech: Speech, piece: Piece) -> None:
        """Cache `speech` in place of what has not been used for longest."""
        self._cache[piece] = speech
        self._cache_bytes += len(speech.audio)
        while self._cache_bytes > self._settings.cache_mb * 2**20:
            _, evicted = self._cache.popitem(last=False)
            self._cache_bytes -= len(evicted.audio)

    def _download(self, speech: Speech, piece: Piece) -> None:
        """Append what Deepgram sends to `speech`; raise SpeechFailed, or whatever goes wrong."""
        with self._post(piece) as response:
            for chunk in audio_chunks(response):
                speech.audio += chunk
                speech.loop.call_soon_threadsafe(speech.changed.set)
        if not speech.audio:
            raise SpeechFailed("Deepgram sent no audio")

    def _post(self, piece: Piece) -> requests.Response:
        """Return the response, after three tries at most; a read time-out is not tried again."""
        for pause_seconds in RETRY_PAUSES_SECONDS:
            try:
                response = self._post_once(piece)
            except requests.ConnectionError:
                continue  # without a pause: perhaps the connection had idled too long
            if response.status_code != 429 and response.status_code < 500:
                return response
            response.close()
            time.sleep(pause_seconds)
        return self._post_once(piece)

    def _post_once(self, piece: Piece) -> requests.Response:
        version = "v1"  # it does not know Flux, Deepgram's newest voices
        if piece.model.startswith("flux-"):
            version = "v2"
        return self._session.post(
            f"{self._url}/{version}/speak?{self._query}",
            params={"model": piece.model},
            json={"text": piece.text},
            headers={"Accept-Encoding": "identity"},  # compressed audio comes only as a whole
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            stream=True,
        )

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Token {self._settings.deepgram_api_key}"
        return request


def audio_chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body of Deepgram's `response` as it comes; raise SpeechFailed if it is no audio."""
    status = response.status_code
    content_type = response.headers.get("Content-Type", "no type")
    if status != 200 or not content_type.startswith(("audio/", "application/octet-stream")):
        message = response.raw.read1(400).decode(errors="replace")  # not all: it may trickle
        raise SpeechFailed(
            f"Deepgram answered {status}",
            f"{content_type:.40} {message!a}; {ADVICE.get(status, DEFAULT_ADVICE)}",
            permanent=400 <= status < 408,
        )
    while chunk := response.raw.read1(2**16):  # iter_content() would wait for more
        yield chunk


# --- Pieces of text -------------------------------------------------------------------------------

MAX_CHARACTERS = 2000  # of a request, says Deepgram
MAX_PIECE_CHARACTERS = 300  # of a text that is cut: nothing waits long for the end of a sentence
# Quotes, brackets and Markdown that close a sentence belong to it.
CLOSERS = re.escape("\"'”’»)]」』）*_~`")
# A full stop or its like before white space, with its word, which last_end checks; one that needs
# no white space, once another character follows; or a new line.
SENTENCE_END = re.compile(
    rf"\w*[.!?…؟۔।॥][{CLOSERS}]*(?=\s)"
    rf"|[。！？][。！？{CLOSERS}]*(?=[^。！？{CLOSERS}])"
    r"|\n"
)
# One letter or digit, two digits, or a capital with one or two letters: J. a.m. 1. 10. Dr. Mrs.
# (a _ is Markdown). "Yes." is one, too; then the next end decides: better late than within a name.
ABBREVIATION = re.compile(r"_*(\w|\d\d|[A-ZÀ-ÖØ-Þ]\w\w?)\.")
CLAUSE_END = re.compile(rf"[,;:–—،][{CLOSERS}]*(?=\s)|[、，；：][{CLOSERS}]*")
WORD_END = re.compile(r"\s")


async def split_text(text: Text) -> AsyncGenerator[str]:
    """Cut `text`, as it is written, into pieces (see length_of_piece); the last may be empty."""
    rest = ""
    async with aclosing(written_parts(text)) as parts:
        async for part in parts:
            rest += part
            while length := length_of_piece(rest):
                yield rest[:length]
                rest = rest[length:]
    yield rest


async def written_parts(text: Text) -> AsyncGenerator[str]:
    """Yield `text` as it is written, without the None that language models' clients send."""
    if isinstance(text, str):
        yield text
        return
    parts = aiter(text)
    try:
        async for part in parts:
            if part is not None:
                yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()  # so that its writer stops


def length_of_piece(text: str) -> int:
    """Return how much of `text` to say at once: whole sentences, or 0 if there is none yet.

    A sentence that is too long is cut after a clause, else after a word, else anywhere.
    """
    head = text[:MAX_PIECE_CHARACTERS]
    length = last_end(SENTENCE_END, head)
    if length or head == text:  # in the latter case, the sentence may still go on
        return length
    return last_end(CLAUSE_END, head) or last_end(WORD_END, head) or len(head)


def last_end(pattern: re.Pattern[str], text: str) -> int:
    """Return where the last match in `text` ends; 0 if there is none, or nothing to say before."""
    end = 0
    for match in pattern.finditer(text):
        if not ABBREVIATION.match(match[0]):
            end = match.end()
    if is_speakable(text[:end]):
        return end
    return 0


def is_speakable(text: str) -> bool:
    """Return whether there is anything to say: Deepgram may reject a lone emoji or asterisk."""
    return any(map(str.isalnum, text))


# --- Settings -------------------------------------------------------------------------------------


class StartError(Exception):
    """The server cannot start; the message says why, and what to do."""


def whole_number(text: str, least: int = 0) -> int:
    """Return the number; raise a ValueError that says what it must be."""
    if not re.fullmatch("[0-9]{1,5}", text) or not least <= int(text) <= 65535:
        raise ValueError(f"a whole number from {least} to 65535, not {text!r}")
    return int(text)


positive_number = functools.partial(whole_number, least=1)


def yes_or_no(text: str) -> bool:
    """Return whether it is a yes; raise a ValueError that says what it must be."""
    if text.lower() in ("yes", "true", "on", "1"):
        return True
    if text.lower() in ("no", "false", "off", "0"):
        return False
    raise ValueError(f"yes or no, not {text!r}")


def http_url(text: str) -> str:
    """Return the URL; raise a ValueError that says what it must be."""
    if not re.match("https?://[^/]", text):
        raise ValueError(f"a URL such as https://api.deepgram.com, not {text!r}")
    return text


def level(text: str) -> str:
    """Return the level; raise a ValueError that says what it must be."""
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"DEBUG, INFO, WARNING or ERROR, not {text!r}")
    return text.upper()


def secret(text: str) -> str:
    """Return the text if it fits into a header; raise a ValueError that does not repeat it."""
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("printable ASCII without spaces (copy it again)")
    return text


def setting(default: str, about: str, parse: Callable[[str], object] = str) -> Any:
    """Return a field of Settings; `parse` turns its text, such as the default, into its value."""
    metadata = {"default": default, "about": about, "parse": parse}
    return dataclasses.field(default=parse(default), metadata=metadata)


@dataclasses.dataclass(frozen=True, repr=False)  # some are secret
class Settings:
    """Every setting; in capitals in the environment and in `.env`."""

    deepgram_api_key: str = setting("", "your key, from console.deepgram.com; required", secret)
    deepgram_url: str = setting("https://api.deepgram.com", "Deepgram API base URL", http_url)
    deepgram_model: str = setting("aura-asteria-en", "voice, unless the TwiML sets a model")
    deepgram_options: str = setting("", "for Deepgram, such as speed=0.9&mip_opt_out=true")
    deepgram_concurrency: int = setting(
        "15", "concurrent requests your plan allows", positive_number
    )
    greeting: str = setting("Hello, how are you today?", "what callers hear by default")
    close_after_speech: bool = setting("no", "yes: the TwiML goes on after the texts", yes_or_no)
    cache_mb: int = setting("16", "speech cache in MiB, 0 to disable", whole_number)
    host: str = setting("localhost", "address to listen on; 0.0.0.0 for all interfaces")
    port: int = setting("5000", "port to listen on; 0 picks a free port", whole_number)
    tls_cert: str = setting("", "PEM file with the certificate chain, to serve TLS")
    tls_key: str = setting("", "PEM file with its private key, unless TLS_CERT has it")
    public_url: str = setting("", "URL in the TwiML; empty: ask the local ngrok agent")
    twilio_auth_token: str = setting(
        "", "your token, to let only Twilio in, and to hang up", secret
    )
    max_calls: int = setting("500", "maximum concurrent calls; the rest get a 503", positive_number)
    drain_seconds: int = setting("25", "how long a shutdown waits for current texts", whole_number)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", level)

    @classmethod
    def load(cls) -> Settings:
        """Read the environment and, for what it lacks, `.env`; raise StartError."""
        path = Path(".env").absolute()
        read_dotenv(path)
        values: dict[str, Any] = {}
        for name, field in SETTINGS.items():
            text = os.environ.get(name, "").strip() or field.metadata["default"]
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                raise StartError(f"{name} must be {error}.") from None
        if not values["deepgram_api_key"]:
            raise StartError(
                f"DEEPGRAM_API_KEY is neither set nor in {path}: `cp .env.example .env` if there "
                "is none, and put yours in, from console.deepgram.com."
            )
        return cls(**values)


SETTINGS = {field.name.upper(): field for field in dataclasses.fields(Settings)}


def read_dotenv(path: Path) -> None:
    """Add `.env` to the environment, a script's own variables too; raise StartError."""
    known = {*SETTINGS, *os.environ}
    try:
        load_dotenv(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise StartError(f"Cannot read {path}, which must be UTF-8 ({error}).") from None
    for name in os.environ.keys() - known:  # of .env: a script's, unless nearly a setting's
        for meant in difflib.get_close_matches(name.upper(), SETTINGS, 1, cutoff=0.75):
            log.warning("%s: %s is not a setting; did you mean %s?", path, name, meant)


# --- The server -----------------------------------------------------------------------------------

PATH = "/twilio"
HEALTH_PATH = "/healthz"
MAX_MESSAGE_BYTES = 2**16  # Twilio's have less than 1 KiB
LISTEN_ADVICE = {
    errno.EADDRNOTAVAIL: "set HOST=127.0.0.1, or the address of an interface",
    errno.EADDRINUSE: "set another PORT, for ngrok, too (a Mac's AirPlay Receiver holds 5000)",
    errno.EACCES: "below 1024 it takes CAP_NET_BIND_SERVICE (see the README's systemd section)",
}


class Server:
    """Admission, active calls and graceful shutdown."""

    def __init__(self, settings: Settings, script: Script) -> None:
        self._settings = settings
        self._script = script
        self._tts = TextToSpeech(settings)
        self._calls: dict[asyncio.Task[None], Call] = {}
        self._exit_requests = asyncio.Queue[int]()  # of exit statuses

    async def run(self) -> int:
        """Serve until a signal; return the exit status, raise StartError if it cannot listen."""
        self._handle_signals()
        settings = self._settings
        try:
            listening = await serve(
                self._serve_call,
                settings.host,
                settings.port,
                ssl=tls_context(settings),
                process_request=self._process_request,
                origins=[None],  # Twilio sends none; a browser's page has no business here
                compression=None,
                max_size=MAX_MESSAGE_BYTES,
                backlog=1024,  # with asyncio's 100, some of 150 simultaneous calls wait for 1 s
            )
        except (OSError, UnicodeError) as error:  # the latter if HOST is no name at all
            advice = LISTEN_ADVICE.get(getattr(error, "errno", 0), "check HOST and PORT")
            raise StartError(
                f"Cannot listen on {settings.host}:{settings.port} ({error}): {advice}."
            ) from None
        prefetching = asyncio.create_task(self._prefetch_greeting())
        await in_thread(announce, settings, listening.sockets[0].getsockname()[1])
        gc.freeze()  # else the first calls wait for 45 ms while all that was imported is searched
        status = await self._exit_requests.get()
        prefetching.cancel()
        listening.close(close_connections=False)
        await asyncio.sleep(0)  # runs the task that close() started: now no call comes
        if self._calls:
            await self._drain()
        return status

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows: Ctrl-C ends it at once
                loop.add_signal_handler(signum, self._exit_requests.put_nowait, 0)

    async def _serve_call(self, ws: ServerConnection) -> None:
        call = Call(ws, self._settings, self._tts)
        task: Any = asyncio.current_task()
        self._calls[task] = call
        task.add_done_callback(self._calls.pop)
        await call.run(self._script)

    async def _prefetch_greeting(self) -> None:
        """Fetch the greeting, so that the first caller has it at once; exit if that is hopeless."""
        try:
            async for _ in self._tts.speak(self._settings.greeting, self._settings.deepgram_model):
                pass
            log.info("the greeting is ready: Deepgram accepts the key and the voice")
        except SpeechFailed as failure:
            if failure.permanent:
                log.critical("Deepgram rejects the greeting, so every call would fail: exiting")
                self._exit_requests.put_nowait(1)
            else:
                log.warning("could not prefetch the greeting: the next call will retry")

    async def _drain(self) -> None:
        """Let each call hear its current text out, but not for longer than DRAIN_SECONDS."""
        log.info("draining %d call(s); a signal ends them at once", len(self._calls))
        for call in self._calls.values():
            call.drain()
        cutting_off = asyncio.create_task(self._cut_off())
        await asyncio.wait(list(self._calls))
        cutting_off.cancel()

    async def _cut_off(self) -> None:
        """End all calls after DRAIN_SECONDS, or at another signal."""
        with suppress(TimeoutError):
            async with timeout(self._settings.drain_seconds):
                await self._exit_requests.get()
        for call in self._calls.values():
            call.end(1001, "cut off by shutdown")

    def _process_request(self, ws: ServerConnection, request: Request) -> Response | None:
        """Return None to go on with the handshake, else the response to give instead."""
        if request.path == HEALTH_PATH:
            status = 200 if ws.server.is_serving() else 503
            response = ws.respond(status, json.dumps({"calls": len(self._calls)}))
            del response.headers["Content-Type"]  # else there would be two
            response.headers["Content-Type"] = "application/json"
            return response
        if request.path != PATH:
            if "Upgrade" in request.headers:
                log.warning("rejected a handshake: the path is %s, not %.200a", PATH, request.path)
            return ws.respond(404, "Not found.\n")
        if self._settings.twilio_auth_token and not is_signed(request.headers, self._settings):
            return ws.respond(403, "Not signed by Twilio.\n")
        if len(self._calls) >= self._settings.max_calls:
            log.warning("rejected a call: MAX_CALLS=%d reached", self._settings.max_calls)
            return ws.respond(503, "Too many calls.\n")
        return None  # websockets itself gives a 503 when shutting down


def is_signed(headers: Headers, settings: Settings) -> bool:
    """Return whether Twilio signed the handshake, with or without a final / and :443."""
    url = stream_url(settings.public_url or "".join(headers.get_all("Host")))
    signature = "".join(headers.get_all("X-Twilio-Signature")).encode()
    host, _, path = url.removeprefix("wss://").partition("/")
    for port in ("", ":443"):  # Twilio may have signed any of these four
        for slash in ("", "/"):
            signed = f"wss://{host.removesuffix(':443')}{port}/{path}{slash}".encode()
            digest = hmac.digest(settings.twilio_auth_token.encode(), signed, "sha1")
            if hmac.compare_digest(b64encode(digest), signature):
                return True
    log.warning(
        "rejected a handshake: X-Twilio-Signature does not match %.200a; if this was Twilio, "
        "check TWILIO_AUTH_TOKEN, and set PUBLIC_URL to the URL in the TwiML",
        url,
    )
    return False


def stream_url(address: str) -> str:
    """Return `address` (scheme and path optional) as the wss URL for the TwiML."""
    address = re.sub("^[A-Za-z]+://", "", address).rstrip("/")
    if "/" not in address:
        address += PATH
    return f"wss://{address}"


# --- The start ------------------------------------------------------------------------------------

TWIML = """\
<Response>
  <Connect><Stream url="{url}"/></Connect>
  <Say>Sorry, our voice service is not available. Please call again later.</Say>
</Response>"""
NGROK_API = "http://127.0.0.1:4040/api/tunnels"
MAX_OPEN_FILES = 10_240  # a Mac grants no more


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context, None for plain ws; raise StartError."""
    if not settings.tls_cert and not settings.tls_key:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(
            settings.tls_cert,
            settings.tls_key or None,
            password=lambda: "",  # else OpenSSL prompts
        )
    except OSError as error:  # ssl.SSLError is one, too
        raise StartError(
            f"Cannot use TLS_CERT={settings.tls_cert} with TLS_KEY={settings.tls_key} ({error}): "
            "they must be PEM files, the certificate chain and its private key, which has no "
            "password."
        ) from None
    return context


def announce(settings: Settings, port: int) -> None:
    """Print where the server listens and the TwiML to paste."""
    scheme = "ws"
    if settings.tls_cert:
        scheme = "wss"
    address = settings.public_url or ngrok_url(port)
    print(f"Listening on {scheme}://{settings.host}:{port}{PATH}. The TwiML to paste:\n")
    print(TWIML.format(url=stream_url(address or "YOUR-HOST")), flush=True)
    if not address:
        print(
            f"\nReplace YOUR-HOST: the ngrok agent here has no public https URL for port {port}.\n"
            f"Or run `ngrok http {port}` first, or set PUBLIC_URL, and restart.",
            flush=True,
        )


def ngrok_url(port: int) -> str:
    """Return the public https URL that the local ngrok agent publishes `port` at, if any."""
    with suppress(Exception):  # there is no ngrok, or something else answers
        api = requests.get(NGROK_API, timeout=1, proxies={"http": ""})  # not by a proxy
        for tunnel in api.json()["tunnels"]:
            url = str(tunnel["public_url"])
            is_public = url.startswith("https://") and not url.endswith(".internal")  # ngrok's own
            if is_public and tunnel["config"]["addr"].endswith(f":{port}"):
                return url
    return ""


class Throttle(logging.Filter):
    """Lets through five warnings or errors of a kind a second: nobody can flood the log."""

    MAX_PER_SECOND = 5

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._counts = collections.Counter[str]()  # by format string

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is to be logged."""
        if record.levelno < logging.WARNING:
            return True
        if int(record.created) != self._second:
            self._second = int(record.created)
            self._counts.clear()
        self._counts[record.msg] += 1
        return self._counts[record.msg] <= self.MAX_PER_SECOND


def raise_file_limit() -> None:
    """Allow as many open files as the system grants: 500 calls need more than a Mac's 256."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        soft, hard = getrlimit(RLIMIT_NOFILE)
        limit = max(soft, min(hard, MAX_OPEN_FILES))
        setrlimit(RLIMIT_NOFILE, (limit, hard))


def main(script: Script = script) -> int:
    """Serve `script` as the command line and the settings say; return the exit status."""
    lines = [f"{__doc__}\nSettings, in the environment or in .env:\n"]
    for name, field in SETTINGS.items():
        lines.append(f"# {field.metadata['about']}\n{name}={field.metadata['default']}")
    argparse.ArgumentParser(
        description="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    throttle = Throttle()
    for name in (log.name, "websockets.server", "asyncio"):
        logging.getLogger(name).addFilter(throttle)
    try:
        if not inspect.isasyncgenfunction(script):
            raise StartError("A script is an async generator function: async def, with a yield.")
        settings = Settings.load()
        log.setLevel(settings.log_level)
        if settings.log_level == "DEBUG":
            logging.getLogger("websockets").setLevel(logging.INFO)  # its rejections, not its frames
        if not settings.twilio_auth_token:
            log.warning("TWILIO_AUTH_TOKEN is not set: anyone can spend your Deepgram credit")
        raise_file_limit()
        return asyncio.run(Server(settings, script).run())
    except StartError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
