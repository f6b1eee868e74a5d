"""Let whoever calls a Twilio number hear Deepgram's Aura text-to-speech.

    pip install -r requirements.txt
    echo DEEPGRAM_API_KEY=your-key > .env
    python twilio_aura.py            and in another terminal: ngrok http 5000

At its start the server prints the TwiML to paste into a TwiML Bin. For every call Twilio then
opens a websocket to it (a bidirectional Media Stream), which a pair of tasks serves: the receiver
takes the stream SID, key presses and marks; the sender runs `script` and sends what Deepgram
makes of its texts as 8 kHz mulaw, from the first bytes on.

To change what is said, edit `script`: it is the one place.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hmac
import itertools
import json
import logging
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Self, TypeVar

import requests
from dotenv import dotenv_values
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError
from urllib3.util import Retry
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

log = logging.getLogger("twilio_aura")

# --- Settings -------------------------------------------------------------------------------------

# What a setting must match, and how that is said. A range is of whole numbers.
ANY = (r".+", "text")
SECRET = (r"[!-~]+", "printable ASCII without spaces; copy it again")
YES_OR_NO = (r"yes|no", "yes or no")
LEVEL = (r"DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR")
HTTP_URL = (r"https?://[\w.-]+(:[0-9]{1,5})?(/[^\s?#]*)?", "a URL such as https://api.deepgram.com")
WSS_URL = (
    r"((https|wss)://)?[\w.-]+(:[0-9]+)?(/[\w./~%+-]*)?",
    "a URL such as wss://example.com/twilio",
)

T = TypeVar("T", str, int, bool)


class SettingsError(Exception):
    """A setting is missing or wrong; the message is one sentence that says the way out."""


def checked(name: str, text: str, valid: range | tuple[str, str]) -> str | int | bool:
    """Return the value that `text` is for the setting `name`; raise SettingsError if it is none."""
    if isinstance(valid, range):
        must = f"a whole number from {valid.start} to {valid.stop - 1}"
        if re.fullmatch("[0-9]{1,9}", text) and int(text) in valid:
            return int(text)
    else:
        pattern, must = valid
        if re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL):
            return text.lower() == "yes" if valid is YES_OR_NO else text
    raise SettingsError(f"{name} must be {must}{'' if valid is SECRET else f', not {text!r}'}.")


def setting(default: T, valid: range | tuple[str, str], about: str) -> T:
    """Declare a field of Settings: what it must be, and a line on what it is for."""
    return dataclasses.field(
        default=default, repr=valid is not SECRET, metadata={"valid": valid, "about": about}
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, checked; the names in the environment are the same in capitals."""

    deepgram_api_key: str = setting("", SECRET, "your key, from console.deepgram.com; required")
    deepgram_url: str = setting("https://api.deepgram.com", HTTP_URL, "whom to ask for speech")
    deepgram_model: str = setting("aura-asteria-en", ANY, "the voice, unless the TwiML sets one")
    deepgram_concurrency: int = setting(15, range(1, 1001), "requests at once, as your plan allows")
    greeting: str = setting("Hello, how are you today?", ANY, "said unless the TwiML sets a text")
    close_after_speech: bool = setting(
        False, YES_OR_NO, "yes: go on with the TwiML once all is heard"
    )
    cache_mb: int = setting(16, range(100_001), "MiB of speech to keep in memory")
    host: str = setting("localhost", ANY, "address to listen on; 0.0.0.0 for every one")
    port: int = setting(5000, range(65536), "port to listen on; 0 for any free one")
    tls_cert: str = setting("", ANY, "PEM file with the certificate chain, to serve TLS")
    tls_key: str = setting("", ANY, "PEM file with its private key")
    public_url: str = setting("", WSS_URL, "where Twilio connects to; if empty, ngrok is asked")
    twilio_auth_token: str = setting("", SECRET, "lets only Twilio in; from console.twilio.com")
    max_calls: int = setting(500, range(1, 100_001), "calls at once; more are refused")
    drain_seconds: int = setting(30, range(86_401), "how long a stop waits for sentences to end")
    log_level: str = setting("INFO", LEVEL, "DEBUG, INFO, WARNING or ERROR")

    @classmethod
    def load(cls) -> Self:
        """Read the environment and, for what it lacks, `.env` in the current directory.

        An empty setting is one that is not set. Raises SettingsError.
        """
        try:
            given = dotenv_values(".env", encoding="utf-8-sig")
            given |= {name: text for name, text in os.environ.items() if text.strip()}
        except (OSError, UnicodeError) as error:
            raise SettingsError(f".env cannot be read ({error}): save it as UTF-8.") from None
        values: dict[str, Any] = {
            field.name: checked(field.name.upper(), text, field.metadata["valid"])
            for field in dataclasses.fields(cls)
            if (text := (given.get(field.name.upper()) or "").strip())
        }
        if "deepgram_api_key" not in values:
            raise SettingsError(
                "DEEPGRAM_API_KEY is not set: write DEEPGRAM_API_KEY=your-key into .env "
                "(console.deepgram.com has keys)."
            )
        return cls(**values)

    @classmethod
    def help(cls) -> str:
        """Return a line per setting as `.env.example` has it, each after what it is for."""
        return "\n".join(
            f"# {field.metadata['about']}\n"
            f"{field.name.upper()}={'no' if field.default is False else field.default}"
            for field in dataclasses.fields(cls)
        )

    def tls(self) -> ssl.SSLContext | None:
        """Return what serves TLS, None for plain; raise SettingsError if it can't."""
        if not self.tls_cert and not self.tls_key:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:
            raise SettingsError(
                f"TLS_CERT={self.tls_cert!r} and TLS_KEY={self.tls_key!r} cannot be used "
                f"({error.strerror or error}): set both to PEM files that belong together."
            ) from None
        return context


# --- What is said ---------------------------------------------------------------------------------


async def script(call: Call) -> AsyncGenerator[str, None]:
    """Yield, one after the other, the texts that are said on this call.

    It goes on after a `yield` when the caller has heard that text or interrupted it with a key.
    `call.parameters` has the TwiML's <Parameter>s; `await call.digit()` is the next key pressed.
    """
    yield call.parameters.get("text") or call.settings.greeting


# --- A call ---------------------------------------------------------------------------------------

FRAME_BYTES = 160  # 20 ms; whole frames avoid the jitter that some callers hear
BYTES_A_SECOND = 8000  # mulaw, 8000 Hz, mono
MESSAGE_BYTES = 100 * FRAME_BYTES  # as base64 within the 32 KiB that websockets buffers
AHEAD_SECONDS = 300.0  # Twilio buffers 10 minutes and discards what is more (warning 31931)
START_SECONDS = 10.0  # Twilio sends `start` at once
SILENCE_SECONDS = 9.0  # a caller in silence for longer gets the <Say>, after about 10 s in all
MARK_SECONDS = 3.0  # how late a mark may be when by the clock all has been heard
CLOSE_SECONDS = 2.0  # for the closing handshake
DIGITS = frozenset("0123456789*#ABCD")
MULAW = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
UNSPEAKABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control, lone surrogates


class Call:
    """One call: what the script may know of it, and the two tasks that serve it.

    Args:
        ws: The connection that Twilio opened for this call.
        settings: The server's settings.
        aura: What makes speech of texts.
    """

    def __init__(self, ws: ServerConnection, settings: Settings, aura: Aura) -> None:
        self.settings = settings
        self.sid = ""
        self.parameters: dict[str, str] = {}
        self._ws = ws
        self._aura = aura
        self._now = asyncio.get_running_loop().time
        self._stream_sid = ""
        self._started = asyncio.Event()
        self._digits: asyncio.Queue[str] = asyncio.Queue(maxsize=100)
        self._mark_numbers = itertools.count(1)
        self._marks: dict[str, asyncio.Event] = {}  # sent and not yet returned, by name
        self._interruptible: asyncio.Timeout | None = None  # around what is being said
        self._floor = asyncio.Lock()  # the script has it, except while it waits for the caller
        self._over: asyncio.Future[tuple[int, str]] = asyncio.Future()
        self._warned = False
        # For the log: moments by the event loop's clock (0: never), bytes.
        self._started_at = self._first_frame_at = 0.0
        self._first_speech: Speech | None = None
        self._sent = self._heard = 0

    def __str__(self) -> str:
        return f"call {self.sid}" if self.sid else f"connection from {self._ws.remote_address}"

    async def digit(self) -> str:
        """Return the next key pressed, also one pressed while something was being said.

        Only for the script itself, and not twice at once.
        """
        self._floor.release()
        try:
            return await self._digits.get()
        finally:
            await self._floor.acquire()

    async def run(self) -> None:
        """Serve the call until one of the pair, or a drain, ends it; nothing of it survives."""
        await self._floor.acquire()
        try:
            async with asyncio.TaskGroup() as group:
                pair = [group.create_task(self._receive()), group.create_task(self._send())]
                code, outcome = await asyncio.shield(self._over)
                for task in pair:
                    task.cancel()
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._ws.close(code, outcome)
        except TimeoutError:
            self._ws.transport.abort()  # it reads nothing, not even our close
        finally:
            self._log_end()

    async def drain(self) -> None:
        """End the call as soon as nobody is being spoken to."""
        async with self._floor:
            self.end(1000, "drained")

    def end(self, code: int, outcome: str) -> None:
        """End the call with this close code, unless something has ended it already."""
        if not self._over.done():
            self._over.set_result((code, outcome))

    def _log_end(self) -> None:
        code, outcome = self._over.result() if self._over.done() else (1011, "broken off")
        speech = self._first_speech or Speech()
        moments = speech.asked_at, speech.first_byte_at, self._first_frame_at
        log.log(
            logging.INFO if code == 1000 else logging.WARNING,
            "%s ended: %s; queued %s, first byte %s, first frame %s; sent %.1f s, heard %.1f s",
            self,
            outcome,
            *(f"{max(0.0, at - self._started_at) * 1000:.0f} ms" if at else "-" for at in moments),
            self._sent / BYTES_A_SECOND,
            self._heard / BYTES_A_SECOND,
        )

    # The receiver task: what Twilio tells us.

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._ws.recv()
                # The caller's voice, 50 messages a second, is not listened to, hence not parsed.
                # Once `start` has come with its free parameters, nothing else has a payload.
                if self._stream_sid and isinstance(message, str) and '"payload"' in message:
                    continue
                self._handle(message)
        except ConnectionClosed as closed:
            if closed.sent and not closed.rcvd_then_sent:  # websockets closed it, not the caller
                self.end(closed.sent.code, f"connection failed: {closed}")
            self.end(1000, "hung up")

    def _handle(self, message: str | bytes) -> None:
        event: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(message) if isinstance(message, str) else None
        match event:
            case {"event": "connected"}:
                pass
            case {"event": "start"} if not self._stream_sid:
                self._start(event.get("start"))
            case {"event": "dtmf", "dtmf": {"digit": str(digit)}} if digit in DIGITS:
                self._press(digit)
            case {"event": "mark", "mark": {"name": str(name)}} if name in self._marks:
                self._marks.pop(name).set()
            case {"event": "stop"}:
                self.end(1000, "hung up")
            case _:
                if not self._warned:
                    log.warning("%s: ignored what Twilio never sends (DEBUG shows it)", self)
                self._warned = True
                log.debug("%s: ignored %.200a", self, message)

    def _start(self, start: object) -> None:
        told = start if isinstance(start, dict) else {}
        match told.get("callSid"):
            case str(sid) if re.fullmatch("[0-9A-Za-z]{1,64}", sid):
                self.sid = sid
        match told.get("customParameters"):
            case dict(given):
                texts = {name: text for name, text in given.items() if isinstance(text, str)}
                self.parameters = {n: UNSPEAKABLE.sub(" ", text) for n, text in texts.items()}
        match told.get("streamSid"), told.get("mediaFormat", MULAW):
            case str(sid), dict(given) if sid and given.items() >= MULAW.items():
                self._stream_sid = sid
                self._started_at = self._now()
                self._started.set()
                log.info("%s started", self)
            case str(sid), _ if sid:
                self.end(1008, "the stream is not 8 kHz mulaw")
            case _:
                self.end(1008, "start without a stream SID")

    def _press(self, digit: str) -> None:
        if not self._digits.full():
            self._digits.put_nowait(digit)
        if self._interruptible and not self._interruptible.expired():
            self._interruptible.reschedule(0)
            self._interruptible = None

    # The sender task: what we say.

    async def _send(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._started.wait()
        except TimeoutError:
            return self.end(1008, f"no start within {START_SECONDS:.0f} s")
        try:
            async with contextlib.aclosing(script(self)) as texts:
                async for text in texts:
                    await self._say(text)
                    self._floor.release()
                    await asyncio.sleep(0)  # a drain that waits for the floor takes it now
                    await self._floor.acquire()
        except SpeechFailed as failure:
            self.end(1011, str(failure))
        except (Exception, asyncio.CancelledError):
            if self._ws.state is State.OPEN and not self._over.done():  # else the receiver says why
                log.exception("%s: the script failed", self)
                self.end(1011, "the script failed")
        else:
            if self.settings.close_after_speech:
                self.end(1000, "spoken")
            self._floor.release()

    async def _say(self, text: str) -> None:
        """Return when the caller has heard `text` or interrupted it; raise SpeechFailed."""
        sent = 0  # bytes
        playing_until = 0.0
        heard: asyncio.Event | None = None  # set when the mark returns
        failure: SpeechFailed | None = None
        model = self.parameters.get("model") or self.settings.deepgram_model
        try:
            # One deadline that moves on with what is sent; a key brings it forward to now.
            async with asyncio.timeout(SILENCE_SECONDS) as deadline:
                for speech in self._aura.speeches(text, model):
                    self._first_speech = self._first_speech or speech
                    async for audio in speech:
                        await asyncio.sleep(playing_until - AHEAD_SECONDS - self._now())
                        async with asyncio.timeout(SILENCE_SECONDS):  # else nobody reads it
                            await self._ws.send(media(self._stream_sid, audio))
                        if not sent:
                            self._interruptible = deadline
                        sent += len(audio)
                        now = self._now()
                        self._first_frame_at = self._first_frame_at or now
                        playing_until = max(playing_until, now) + len(audio) / BYTES_A_SECOND
                        if self._interruptible:
                            deadline.reschedule(playing_until + SILENCE_SECONDS)
                    if failure := speech.failure:
                        break
                if sent:
                    name = str(next(self._mark_numbers))
                    heard = self._marks[name] = asyncio.Event()
                    await self._ws.send(mark(self._stream_sid, name))
                    if self._interruptible:
                        deadline.reschedule(playing_until + MARK_SECONDS)
                    await heard.wait()
        except TimeoutError:
            if sent and not self._interruptible:
                broadcast([self._ws], clear(self._stream_sid))  # waits for no full buffer
                return
            if not heard:
                failure = SpeechFailed(f"no sound for {SILENCE_SECONDS:.0f} s")
        finally:
            del deadline  # knows the task, whose exception knows this frame: a cycle around speech
            self._interruptible = None
            unheard = 0 if heard and heard.is_set() else max(0.0, playing_until - self._now())
            self._sent += sent
            self._heard += sent - int(unheard * BYTES_A_SECOND)
        if failure:
            raise SpeechFailed(str(failure))


# --- Twilio's messages ----------------------------------------------------------------------------
# These keys and no others: a missing or an extra one is warning 31951.


def media(stream_sid: str, audio: bytes | bytearray) -> str:
    """Return the message that has Twilio play `audio`, raw 8 kHz mulaw, after what it has."""
    payload = base64.b64encode(audio).decode()
    return json.dumps({"event": "media", "streamSid": stream_sid, "media": {"payload": payload}})


def mark(stream_sid: str, name: str) -> str:
    """Return the message that comes back when the audio before it was played, or flushed."""
    return json.dumps({"event": "mark", "streamSid": stream_sid, "mark": {"name": name}})


def clear(stream_sid: str) -> str:
    """Return the message that has Twilio throw away what it has not yet played."""
    return json.dumps({"event": "clear", "streamSid": stream_sid})


# --- Deepgram -------------------------------------------------------------------------------------

CONNECT_SECONDS = 3.0  # room for one lost packet, and for two more tries before SILENCE_SECONDS
READ_SECONDS = 5.0  # without a byte; Deepgram's first usually comes after 0.2 to 0.4 s
RETRY_AFTER_SECONDS = 3.0  # is as much as a caller can wait for
MOST_SECONDS = 600  # of audio; 2000 characters take two or three minutes

# At most 2000 characters (more is a 413): all there is, or else up to the last end of a sentence,
# with or without a quote or bracket that it closes, or else of a word, or else 2000.
PIECE = re.compile(
    r"""\S(?: .{0,1999}\Z
         | .{0,1999}(?: (?<=[。！？]) | (?: (?<=[.!?…]) | (?<=[.!?…]["'”’)\]]) )(?=\s) )
         | .{0,1999}(?=\s)
         | .{0,1999} )""",
    re.DOTALL | re.VERBOSE,
)

ADVICE = {
    400: "check DEEPGRAM_MODEL, or the TwiML's model parameter",
    401: "check DEEPGRAM_API_KEY",
    402: "add credit at console.deepgram.com",
    403: "this key may not use this model: check DEEPGRAM_API_KEY and DEEPGRAM_MODEL",
    404: "check DEEPGRAM_URL",
    429: "lower DEEPGRAM_CONCURRENCY, or ask Deepgram for more requests at once",
}
THEIRS = "see status.deepgram.com, and check DEEPGRAM_URL and the network"


def pieces(text: str) -> list[str]:
    """Cut `text` into what Deepgram takes in a request, at sentence ends wherever possible."""
    return [piece.rstrip() for piece in PIECE.findall(text.strip())]


class SpeechFailed(Exception):
    """There is no speech, or not all of it.

    Args:
        reason: What happened, in the few words that fit into a close frame (123 bytes).
        advice: What to do about it.
        refused: Whether Deepgram would say no again.
    """

    def __init__(self, reason: str, advice: str = THEIRS, refused: bool = False) -> None:
        super().__init__(reason)
        self.advice = advice
        self.refused = refused


class Speech:
    """The mulaw audio of one text, which grows as Deepgram sends it.

    Iterating yields it from its beginning, in whole frames but for the last, as it comes; any
    number of callers may do so at once. `failure` then tells whether that was all.
    """

    def __init__(self) -> None:
        self.audio = bytearray()
        self.failure: SpeechFailed | None = None
        self.ended = asyncio.Event()
        self.wanted = 0  # by so many callers
        self.asked_at = self.first_byte_at = 0.0  # by the event loop's clock, 0 for not yet
        self._more = asyncio.Event()

    def add(self, chunk: bytes) -> None:
        """Append `chunk`, of any length."""
        self.first_byte_at = self.first_byte_at or asyncio.get_running_loop().time()
        self.audio += chunk
        self._wake()

    def end(self, failure: SpeechFailed | None) -> None:
        """Say that nothing more comes, and why if that is too early."""
        self.failure = failure
        self.ended.set()
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more.clear()

    async def __aiter__(self) -> AsyncIterator[bytearray]:
        position = 0
        while True:
            end = len(self.audio)
            if not self.ended.is_set():
                end -= end % FRAME_BYTES
            if position < end:
                end = min(end, position + MESSAGE_BYTES)
                yield self.audio[position:end]
                position = end
            elif self.ended.is_set():
                return
            else:
                await self._more.wait()


def audio_chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body of Deepgram's `response` as it comes; raise SpeechFailed if it is no audio."""
    if response.status_code != 200:
        raise refusal(response)
    content_type = response.headers.get("Content-Type", "no type").split(";")[0].lower()
    if not content_type.startswith(("audio/", "application/octet-stream")):
        raise SpeechFailed(f"Deepgram sent {content_type[:40]}, not audio")
    if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise SpeechFailed(f"Deepgram sent {coding[:40]}, not plain audio")
    began, received, head = time.monotonic(), 0, b""
    while chunk := response.raw.read1(2**16):
        if not received:
            head = chunk = head + chunk
            if head.startswith(b"RIFF"):
                raise SpeechFailed("Deepgram sent a WAV header")
            if len(head) < 4:
                continue
        yield chunk
        received += len(chunk)
        if time.monotonic() - began > READ_SECONDS + received / BYTES_A_SECOND:
            raise SpeechFailed("Deepgram sends more slowly than one speaks")
        if received > MOST_SECONDS * BYTES_A_SECOND:
            raise SpeechFailed("Deepgram sends without end")
    if not received:
        raise SpeechFailed("Deepgram sent no audio")


def refusal(response: requests.Response) -> SpeechFailed:
    """Return what Deepgram's error `response` says: JSON in one of two shapes, or plain text."""
    status, headers = response.status_code, response.headers
    api_key = response.request.headers["Authorization"].removeprefix("Token ")
    body = b""
    with contextlib.suppress(HTTPError):
        body = response.raw.read(2**14, decode_content=True)
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        told = {"message": headers.get("dg-error") or body.decode(errors="replace")}
    keys = ("err_code", "err_msg", "category", "message", "details")
    words = ": ".join(str(told[key]) for key in keys if told.get(key))
    request_id = told.get("request_id") or headers.get("dg-request-id") or "unknown"

    def quoted(text: str) -> str:
        # On one line, and without the key, of which cutting first could leave a part.
        text = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(text.split()).replace(api_key, "[key]")[:300]

    return SpeechFailed(
        f"Deepgram answered {status}",
        f"{quoted(words)} (request {quoted(str(request_id))}); {ADVICE.get(status, THEIRS)}",
        refused=400 <= status < 500 and status not in (408, 429),
    )


class Retries(Retry):
    """Two more tries after 429, 5xx or a broken connection; none after silence."""

    RETRY_AFTER_STATUS_CODES = frozenset()  # or a 413 with Retry-After would be tried again

    def get_backoff_time(self) -> float:
        """Return seconds: 0 after a broken connection, which most likely had idled too long."""
        return max(super().get_backoff_time(), 0.25 if self.history[-1].status else 0.0)

    def parse_retry_after(self, retry_after: str) -> float:
        """Return seconds, not too many, 0 for what is neither a number nor a date."""
        try:
            return min(super().parse_retry_after(retry_after), RETRY_AFTER_SECONDS)
        except InvalidHeader:
            return 0.0

    def increment(self, *args: Any, **kwargs: Any) -> Self:
        """Return what is left of the tries; raise a timeout rather than wait for a second one."""
        if isinstance(error := kwargs.get("error"), ReadTimeoutError):
            raise error
        return super().increment(*args, **kwargs)


class Aura:
    """Deepgram's text-to-speech; what is being fetched is shared, what was fetched is kept."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = settings.deepgram_url.rstrip("/") + "/v1/speak"
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(settings.deepgram_concurrency)  # first come, first served
        # A Session is for one thread at a time. Last in, first out: the warmest connection first.
        self._sessions = [self._session() for _ in range(settings.deepgram_concurrency)]
        self._coming: dict[tuple[str, str], Speech] = {}
        self._kept: dict[tuple[str, str], Speech] = {}  # the least recently used first
        self._kept_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def _session(self) -> requests.Session:
        session = requests.Session()
        # What the environment says of proxies and certificates, read once: at every request it
        # would cost 0.1 ms. Without it ~/.netrc, too, is out, which would win over the key here.
        environment = session.merge_environment_settings(self._url, {}, None, None, None)
        session.proxies, session.verify = environment["proxies"], environment["verify"]
        session.trust_env = False
        session.headers["Authorization"] = f"Token {self._settings.deepgram_api_key}"
        session.headers["Accept-Encoding"] = "identity"  # compressed, it would come all at once
        session.params = {"encoding": "mulaw", "sample_rate": "8000", "container": "none"}
        retries = Retries(
            total=2,
            allowed_methods={"POST"},
            status_forcelist={429, *range(500, 600)},
            raise_on_status=False,
            backoff_factor=0.25,
        )
        session.mount(self._url, HTTPAdapter(1, 1, max_retries=retries))
        return session

    async def warm_up(self) -> SpeechFailed | None:
        """Fetch the greeting; return why that failed, if it did."""
        for speech in self.speeches(self._settings.greeting, self._settings.deepgram_model):
            await speech.ended.wait()
            if speech.failure:
                return speech.failure
        return None

    def speeches(self, text: str, model: str) -> Iterator[Speech]:
        """Yield the speech of each piece of `text`, the next one being fetched meanwhile."""
        ours: list[Speech] = []
        try:
            for piece in pieces(text):
                ours.append(self._speech(model, piece))
                ours[-1].wanted += 1
                if len(ours) > 1:
                    yield ours[-2]
            yield from ours[-1:]
        finally:
            for speech in ours:
                speech.wanted -= 1

    def _speech(self, model: str, text: str) -> Speech:
        key = model, text
        if speech := self._kept.pop(key, None):
            self._kept[key] = speech  # now the most recently used
        elif not (speech := self._coming.get(key)):
            speech = self._coming[key] = Speech()
            task = self._loop.create_task(self._fetch(key, speech))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return speech

    async def _fetch(self, key: tuple[str, str], speech: Speech) -> None:
        # Not from a pool, whose threads would hold up the server's exit.
        thread = threading.Thread(target=self._download, args=(speech, *key), daemon=True)
        async with self._slots:
            if speech.wanted:  # else all who did have hung up, and it need not be paid for
                speech.asked_at = self._loop.time()
                try:
                    thread.start()
                except RuntimeError as error:  # the machine has no more
                    log.error("Deepgram was not asked: %s; lower DEEPGRAM_CONCURRENCY", error)
                    speech.end(SpeechFailed("Deepgram was not asked"))
                # Once begun it runs to its end: it is billed, and keeps the connection warm.
                await speech.ended.wait()
        del self._coming[key]
        if speech.ended.is_set() and not speech.failure:
            self._kept[key] = speech
            self._kept_bytes += len(speech.audio)
            while self._kept_bytes > self._settings.cache_mb * 2**20:
                oldest = self._kept.pop(next(iter(self._kept)))
                self._kept_bytes -= len(oldest.audio)

    def _download(self, speech: Speech, model: str, text: str) -> None:
        """Fetch the speech of `text`, in a thread of its own, since requests blocks."""

        def tell(callback: Callable[..., None], *args: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, with the server
                self._loop.call_soon_threadsafe(callback, *args)

        failure = None
        session = self._sessions.pop()
        trouble = "the connection to Deepgram failed"
        try:
            with session.post(
                self._url,
                params={"model": model},
                json={"text": text},
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                allow_redirects=False,
                stream=True,
            ) as response:
                trouble = "Deepgram broke off"
                for chunk in audio_chunks(response):
                    tell(speech.add, chunk)
        except SpeechFailed as error:
            failure = error
        except Exception as error:  # requests' and urllib3's, many, and whatever else
            cause: BaseException = error
            while inner := cause.__cause__ or cause.__context__:
                cause = inner  # the innermost says it plainly, if it is the system's
            if isinstance(cause, TimeoutError):
                trouble = "Deepgram fell silent"
            plain = cause if isinstance(cause, OSError) else type(error).__name__
            failure = SpeechFailed(trouble, f"{plain}; {THEIRS}")
        self._sessions.append(session)
        if failure:
            log.error("%s: %s", failure, failure.advice)
        tell(speech.end, failure)


# --- The server -----------------------------------------------------------------------------------

PATH = "/twilio"
HEALTH_PATH = "/healthz"
MAX_MESSAGE_BYTES = 64 * 1024  # Twilio's are under 1 KiB
NGROK_URL = "http://127.0.0.1:4040/api/tunnels"  # of ngrok's own agent
TWIML = """\
<Response>
  <Connect><Stream url="{url}"/></Connect>
  <Say>Sorry, our voice service is not available. Please call again later.</Say>
</Response>"""


def stream_url(address: str) -> str:
    """Return `address`, of which scheme and path may be missing, as the TwiML is to have it."""
    host, slash, path = re.sub("^(https|wss)://", "", address).partition("/")
    return f"wss://{host}{(slash + path).rstrip('/') or PATH}"


def signed_by_twilio(auth_token: str, url: str, signature: str) -> bool:
    """Return whether `signature` is Twilio's for a handshake with `url`, wss://HOST/PATH.

    The TwiML may have the URL with or without a trailing slash and :443; we can't know which.
    """
    host, _, path = url.removeprefix("wss://").rstrip("/").partition("/")
    host = host.removesuffix(":443")

    def signed(end: str, port: str) -> bytes:
        url = f"wss://{host}{port}/{path}{end}".encode()
        return base64.b64encode(hmac.digest(auth_token.encode(), url, "sha1"))

    return any(
        hmac.compare_digest(signed(end, port), signature.encode())
        for end, port in itertools.product(("", "/"), ("", ":443"))
    )


class Connection(ServerConnection):
    """A connection that can be closed however it was lost."""

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close it; quietly, if it was lost while its last data was sent."""
        with contextlib.suppress(AttributeError):  # of abort(), which asyncio then can't do
            await super().close(code, reason)


class Server:
    """Who is let in, the calls under way, and how they end when the server does."""

    def __init__(self, settings: Settings) -> None:
        self.aura = Aura(settings)
        self._settings = settings
        self._calls: set[Call] = set()
        self._nobody = asyncio.Event()  # set while there is no call
        self._nobody.set()
        self._draining = False

    def admit(self, ws: ServerConnection, request: Request) -> Response | None:
        """Return None to go on with the handshake, else the response to give instead."""
        answer = self._answer(request)
        if answer is None:
            return None
        response = ws.respond(*answer)
        if request.path == HEALTH_PATH:
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
        if request.method == "HEAD":
            response.body = b""
        return response

    def _answer(self, request: Request) -> tuple[int, str] | None:
        settings, headers = self._settings, request.headers
        if request.method not in ("GET", "HEAD"):
            return 405, "Only GET and HEAD.\n"
        if request.path == HEALTH_PATH:
            return 503 if self._draining else 200, json.dumps({"calls": len(self._calls)})
        if request.path != PATH:
            return 404, "Not found.\n"
        if token := settings.twilio_auth_token:
            url = stream_url(settings.public_url or "".join(headers.get_all("Host")))
            if not signed_by_twilio(token, url, "".join(headers.get_all("X-Twilio-Signature"))):
                log.warning(
                    "refused a handshake that Twilio did not sign for %.200a; if it was Twilio, "
                    "check TWILIO_AUTH_TOKEN, and set PUBLIC_URL to the URL in the TwiML",
                    url,
                )
                return 403, "Not signed by Twilio.\n"
        if self._draining:
            return 503, "Shutting down.\n"
        if len(self._calls) >= settings.max_calls:
            log.warning("refused a call: MAX_CALLS=%d are under way", settings.max_calls)
            return 503, "Too many calls.\n"
        return None

    async def serve_call(self, ws: ServerConnection) -> None:
        """Serve the call that Twilio opened `ws` for."""
        call = Call(ws, self._settings, self.aura)
        self._calls.add(call)
        self._nobody.clear()
        try:
            await call.run()
        finally:
            self._calls.remove(call)
            if not self._calls:
                self._nobody.set()

    async def drain(self) -> None:
        """Let no call in, and return when all have ended."""
        self._draining = True
        log.info("stopping: %d calls are under way; a second signal ends them", len(self._calls))
        leaving = [asyncio.create_task(call.drain()) for call in self._calls]
        asyncio.get_running_loop().call_later(self._settings.drain_seconds, self.cut_off)
        await self._nobody.wait()
        for task in leaving:
            task.cancel()

    def cut_off(self) -> None:
        """End every call at once."""
        for call in self._calls:
            call.end(1001, "cut off, the server stops")
        # Whatever a script still does: it may swallow its cancellation.
        asyncio.get_running_loop().call_later(2 * CLOSE_SECONDS, self._nobody.set)


def ngrok_address(port: int) -> str:
    """Return where an ngrok agent on this machine publishes `port`, or '' if none does."""
    try:
        tunnels = requests.get(NGROK_URL, timeout=1, proxies={"http": ""}).json()["tunnels"]
        addresses = {tunnel["config"]["addr"]: tunnel["public_url"] for tunnel in tunnels}
    except (requests.RequestException, ValueError, LookupError, TypeError):
        return ""
    found = (url for addr, url in addresses.items() if str(addr).endswith(f":{port}"))
    return next((url for url in found if re.fullmatch(WSS_URL[0], str(url))), "")


async def run(settings: Settings) -> int:
    """Serve until a signal, and return the exit status; raise SettingsError if that can't be."""
    loop = asyncio.get_running_loop()
    server = Server(settings)
    stop: asyncio.Future[int] = loop.create_future()  # with the exit status

    def on_signal() -> None:
        if stop.done():
            server.cut_off()
        else:
            stop.set_result(0)

    async def warm_up() -> None:
        failure = await server.aura.warm_up()
        if failure and failure.refused and not stop.done():
            log.critical("no call could be answered: not serving")
            stop.set_result(1)
        elif failure:
            log.warning("serving all the same: the next call tries again")

    for signum in (signal.SIGINT, signal.SIGTERM):
        # Not loop.add_signal_handler, which Windows lacks.
        signal.signal(signum, lambda *_: loop.call_soon_threadsafe(on_signal))

    try:
        listening = await serve(
            server.serve_call,
            settings.host,
            settings.port,
            ssl=settings.tls(),
            process_request=server.admit,
            create_connection=Connection,
            compression=None,
            close_timeout=CLOSE_SECONDS,
            max_size=MAX_MESSAGE_BYTES,
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: HOST can't be a host's name
        _, _, why = str(error).rpartition(": ")
        raise SettingsError(
            f"HOST={settings.host} with PORT={settings.port} can't be listened on ({why}): set "
            "PORT to a free one and give ngrok the same (a Mac's AirPlay Receiver holds 5000), or "
            "HOST to an address of this machine."
        ) from None
    greeting = asyncio.create_task(warm_up())
    await announce(settings, listening.sockets[0].getsockname()[1])
    status = await stop
    greeting.cancel()
    listening.close(close_connections=False)
    await server.drain()
    return status


async def announce(settings: Settings, port: int) -> None:
    """Print where the server listens and the TwiML to paste."""
    if not settings.twilio_auth_token:
        log.warning(
            "TWILIO_AUTH_TOKEN is not set: anyone who finds the address can spend your Deepgram "
            "credit"
        )
    address = settings.public_url or await asyncio.to_thread(ngrok_address, port) or "YOUR-HOST"
    scheme = "wss" if settings.tls_cert else "ws"
    print(f"Listening on {scheme}://{settings.host}:{port}{PATH}. The TwiML to paste:\n")
    print(TWIML.format(url=stream_url(address)), flush=True)


def main() -> int:
    """Run the server as the settings say; return the exit status."""
    argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=f"settings, in the environment or in .env:\n\n{Settings.help()}",
    ).parse_args()
    try:
        settings = Settings.load()
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
        )
        logging.getLogger("websockets").setLevel(logging.WARNING)  # a line per health check
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line per retry
        return asyncio.run(run(settings))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
