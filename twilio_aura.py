"""Play Deepgram Aura text-to-speech to people who call a Twilio number.

    pip install -r requirements.txt
    cp .env.example .env        # then put your DEEPGRAM_API_KEY into it
    ngrok http 5000             # in another terminal, and leave it running
    python twilio_aura.py

It prints the TwiML to paste into a TwiML Bin. Twilio then opens a websocket for every call, a
bidirectional Media Stream. A pair of tasks serves it: the receiver takes the stream SID, key
presses and marks; the sender runs `script`, and streams Deepgram's 8 kHz mulaw as it arrives.

To change what callers hear, pass a script of your own to `main`, as the README shows.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import errno
import faulthandler
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
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, NamedTuple

import requests
from dotenv import load_dotenv
from urllib3.util.ssl_ import create_urllib3_context  # of the urllib3 that requests needs
from websockets import ConnectionClosed, Headers, Request, Response, ServerConnection
from websockets.asyncio.server import Server as ListeningServer
from websockets.asyncio.server import serve

log = logging.getLogger("twilio_aura")


# --- What is said ---------------------------------------------------------------------------------

# An async iterable is spoken while it is written. The clients of language models also send None.
Text = str | AsyncIterable[str | None]
Script = Callable[["Call"], Coroutine[Any, Any, object]]


async def script(call: Call) -> None:
    """Say the text of the TwiML's <Parameter name="text">, or else the greeting."""
    await call.say(call.parameters.get("text", "").strip() or call.settings.greeting)


# --- A call ---------------------------------------------------------------------------------------

START_SECONDS = 10.0  # for Twilio's `start`, which usually comes at once
# How long a text may bring no audio. Then the call is closed, and the TwiML goes on. It is enough
# for three tries to connect to Deepgram (7.5 s), or for retries after a 429 (8 s), not for both.
MAX_SILENCE_SECONDS = 9.0
MARK_GRACE_SECONDS = 3.0  # for a mark to return once playback should have ended
CLOSE_SECONDS = 2.0  # for the closing handshake, and for what a script or a text does at its end
TWILIO_SECONDS = 5.0  # for Twilio's REST API to accept a connection and to answer
TWILIO_ADVICE = {  # by HTTP status
    400: "check the TwiML",
    401: "check TWILIO_AUTH_TOKEN",
    404: "check TWILIO_API_URL: regions other than the US have others",
}
STOP_SECONDS = 1.0  # after a rejected redirect, for the `stop` of a caller who has just hung up
MAX_UNREAD_DIGITS = 100  # Some scripts take none, and a caller may press keys for hours.
MULAW = {"encoding": "audio/x-mulaw", "sampleRate": 8000}
BYTES_PER_SECOND = 8000  # of that
# The messages to Twilio have exactly these keys: others cause warning 31951. They are not made by
# json.dumps, since it would search all the audio for something to escape.
MEDIA = '{"event": "media", "streamSid": "%s", "media": {"payload": "%s"}}'
MARK = '{"event": "mark", "streamSid": "%s", "mark": {"name": "%s"}}'
CLEAR = '{"event": "clear", "streamSid": "%s"}'


class Call:
    """One call: what a script may use, and the pair of tasks that serves it.

    A script uses these attributes, and `say`, `ask`, `digit`, `hang_up` and `redirect`. The server
    uses `serve`, `drain` and `end`.

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
        self._playback = Playback()
        self._turn = asyncio.Lock()  # of the one `say` that may speak
        self._has_spoken = False
        self._is_speaking = False
        self._is_interruptible = False  # by a key
        self._interruption: asyncio.Timeout  # around a text; `_interrupt` makes it expire
        self._is_draining = False
        self._stop_reason = "hung up"  # what it means when Twilio ends the stream
        self._ended: asyncio.Future[tuple[int, str]] = asyncio.Future()  # close code, reason
        self._news = News()  # set by a message, by a drain and by the end of the call

    def __str__(self) -> str:
        return f"call {self.sid or 'without a SID'}"

    # What a script calls.

    async def say(self, text: Text, interruptible: bool = True) -> bool:
        """Speak `text`; return True once the caller has heard it, False if a key interrupted it.

        Args:
            text: A str, or an async iterable of str, which is spoken while it is written.
            interruptible: Whether a key stops it once it sounds. All keys are kept for `digit` and
                `ask`.

        Raises:
            SpeechFailed: Deepgram has failed, or nothing has come for MAX_SILENCE_SECONDS.
            TypeError: `text` is no text.
            Exception: What `text` raises. The whole sentences before a failure are heard first.
        """
        if not isinstance(text, (str, AsyncIterable)):
            kind = type(text).__name__
            raise TypeError(f"a text is a str or an async iterable of str, not {kind}")
        async with self._turn:
            if self._is_draining and self._has_spoken:  # The first text is said all the same.
                self.end(1000, "drained")
            await self._raise_if_ended()
            self._has_spoken = True
            utterance = self._tts.utterance(text, self.model)
            self._is_speaking = True
            self._is_interruptible = interruptible
            try:
                return await self._speak(utterance)
            finally:
                self._is_speaking = False
                self._is_interruptible = False
                self._news.set()  # for a `digit` in another task, which ends a call that drains
                await utterance.close()

    async def ask(self, text: Text, count: int = 1, seconds: float = 5) -> str:
        """Say `text`, unless a key is waiting already, and return the keys pressed.

        Args:
            text: As for `say`; raises the same.
            count: How many keys are awaited. Of several, a # ends them early, and is not returned.
            seconds: How long to wait for each key, once the text has been said.
        """
        if not self._digits:
            await self.say(text)
        keys = ""
        while len(keys) < count:
            key = await self.digit(seconds)
            if not key or (key == "#" and count > 1):
                break
            keys += key
        return keys

    async def digit(self, seconds: float | None = None) -> str:
        """Return the next key pressed, or already pressed; "" after so many seconds without one."""
        await self._end_if_draining()
        try:
            async with timeout(seconds):
                while not self._digits:  # Another task of the script may have taken what came.
                    await self._news.next()
                    await self._end_if_draining()
        except TimeoutError:
            return ""
        return self._digits.popleft()

    async def hang_up(self) -> None:
        """Have Twilio end the call; see `redirect`."""
        await self.redirect("<Response><Hangup/></Response>")

    async def redirect(self, twiml: str) -> None:
        """Have Twilio go on with `twiml`, such as a <Dial>, in place of what follows </Connect>.

        This needs TWILIO_AUTH_TOKEN. If Twilio rejects it or does not answer, the stream is closed,
        so that what follows </Connect> is run. It does not return: the script is cancelled with the
        end of the call, as by a hang-up.
        """
        await self._raise_if_ended()
        self._stop_reason = "redirected"  # Twilio may end the stream before it answers.
        problem = await self._ask_twilio(twiml)
        if problem:
            log.error("%s: Twilio did not redirect it: %s", self, problem)
            self.end(1000, "not redirected")
        await self._until(self._ended.done)
        await self._raise_if_ended()  # unless `serve` has cancelled the script by now

    async def _ask_twilio(self, twiml: str) -> str:
        """Have Twilio go on with `twiml`; return what went wrong, for the log, or ""."""
        if not self.settings.twilio_auth_token:
            return "hang_up and redirect need TWILIO_AUTH_TOKEN"
        account = f"{self.settings.twilio_api_url}/2010-04-01/Accounts/{self._account_sid}"
        url = f"{account}/Calls/{self.sid}.json"
        login = (self._account_sid, self.settings.twilio_auth_token)
        try:
            async with timeout(TWILIO_SECONDS):
                status, body = await in_thread(post_twiml, url, login, twiml)
        except (TimeoutError, requests.RequestException) as error:
            return f"no answer ({excerpt(error)}); check TWILIO_API_URL and the network"
        if 200 <= status < 300:
            return ""
        self._stop_reason = "hung up"  # A `stop` that comes now is not due to the redirect.
        if re.search('"code": ?21220', body):  # The call is not in progress any more.
            self.end(1000, "hung up")
        else:
            await asyncio.sleep(STOP_SECONDS)
        await self._raise_if_ended()
        return f"{status} {excerpt(body)}; {TWILIO_ADVICE.get(status, 'check TWILIO_API_URL')}"

    async def _end_if_draining(self) -> None:
        """End the call if it drains and nothing is being said; raise CancelledError if it ended."""
        if self._is_draining and not self._is_speaking:
            self.end(1000, "drained")
        await self._raise_if_ended()

    async def _raise_if_ended(self) -> None:
        """Raise CancelledError if the call has ended, for a script that has caught that of `serve`.

        The sleep keeps the event loop free if the script catches it again and again.
        """
        if self._ended.done():
            await asyncio.sleep(0.1)
            raise asyncio.CancelledError

    async def _until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` is true."""
        while not condition():
            await self._news.next()

    # What the server calls.

    async def serve(self, script: Script) -> None:
        """Serve the call until the receiver, the sender or the server calls `end`."""
        receiver = asyncio.create_task(self._receive())
        sender = asyncio.create_task(self._perform(script))
        code, reason = await self._ended
        if not await self._close(code, reason):
            reason += "; the peer did not acknowledge the close"
        receiver.cancel()
        sender.cancel()
        # The sender waits for CLOSE_SECONDS for a text to end, so we wait somewhat longer.
        await asyncio.wait([receiver, sender], timeout=1.5 * CLOSE_SECONDS)
        if not sender.done():
            log.warning("%s: its script goes on: it has to let asyncio.CancelledError pass", self)
        level = logging.INFO if self._stream_sid else logging.DEBUG
        log.log(level, "%s ended: %s; %s", self, reason, self._playback.summary())

    def drain(self) -> None:
        """End the call after its current text, or where the script waits for a key."""
        self._is_draining = True
        self._news.set()

    def end(self, code: int, reason: str) -> None:
        """End the call with this close code, unless it has ended already."""
        if not self._ended.done():
            self._ended.set_result((code, reason))
            self._news.set()

    async def _close(self, code: int, reason: str) -> bool:
        """Close the websocket; return whether the peer acknowledged that within CLOSE_SECONDS."""
        # If the transport has just closed by itself, transport.abort(), which websockets calls as
        # well, raises AttributeError. Then the connection is closed, as we want it.
        with suppress(AttributeError):
            try:
                async with timeout(CLOSE_SECONDS):
                    await self._ws.close(code, as_close_reason(reason))
            except TimeoutError:
                self._ws.transport.abort()  # else websockets waits for 10 s more after `serve`
                return False
        return True

    # The receiver task: what Twilio tells us.

    async def _receive(self) -> None:
        """Take Twilio's messages until the connection is closed."""
        try:
            while True:
                message = await self._ws.recv(decode=False)
                # The caller's audio comes 50 times a second, so it is not even parsed. (In `start`,
                # a <Parameter> may be called payload.)
                if not self._stream_sid or b'"payload"' not in message:
                    self._on_message(message)
        except ConnectionClosed as closed:
            # `sent` and `rcvd` are close frames, each None if there was none.
            if closed.sent and not closed.rcvd_then_sent:
                # websockets closed first, since a ping was not answered or a message is too large.
                # (Or we did: then the call has ended already, and this changes nothing.)
                self.end(closed.sent.code, f"connection failed: {closed}")
            elif closed.rcvd and closed.rcvd.code == 1001:
                self.end(1000, "the proxy closed it (1001)")
            else:
                self.end(1000, self._stop_reason)

    def _on_message(self, message: bytes) -> None:
        event: object = None
        try:
            fields = json.loads(message)
            event = fields["event"]
            match event:
                case "connected":
                    pass
                case "start":
                    self._on_start(fields["start"])
                case "dtmf":
                    self._digits.append(fields["dtmf"]["digit"])
                    self._interrupt()
                case "mark":
                    self._returned_mark = fields["mark"]["name"]
                case "stop":
                    self.end(1000, self._stop_reason)
                case _:
                    raise ValueError  # as for any odd message
        except Exception:  # The message may have any shape.
            size = len(message)
            log.warning("%s: ignored a message of %d bytes, event %s", self, size, excerpt(event))
            log.debug("%s: the message was %s", self, excerpt(message))
        self._news.set()

    def _on_start(self, start: dict[str, Any]) -> None:
        stream_sid = clean_sid(start["streamSid"])
        if self._stream_sid or not stream_sid:
            raise ValueError  # The message is ignored.
        parameters = start.get("customParameters") or {}
        self.parameters = {name: str(value) for name, value in parameters.items()}
        self.model = self.parameters.get("model", "").strip() or self.model
        self.sid = clean_sid(start.get("callSid"))
        self._account_sid = clean_sid(start.get("accountSid"))
        self._stream_sid = stream_sid
        self._playback.started_at = time.monotonic()
        log.info("%s started", self)
        media_format = start.get("mediaFormat") or MULAW
        if not MULAW.items() <= media_format.items():
            log.error("%s: leave audioFormat and sampleRate out of <Stream>", self)
            self.end(1008, "the stream is not mulaw at 8000 Hz")

    def _interrupt(self) -> None:
        """Stop the text that is being spoken, if a key may do so and some of it has been sent."""
        if self._is_interruptible and self._playback.is_playing:
            self._is_interruptible = False
            self._interruption.reschedule(0)  # A time that is long over: it expires now.

    # The sender task: what we say.

    async def _perform(self, script: Script) -> None:
        """Run `script` once `start` has come; end the call when it has returned or failed."""
        try:
            async with timeout(START_SECONDS):
                await self._until(lambda: self._stream_sid)
        except TimeoutError:
            self.end(1008, f"no start within {START_SECONDS:.0f} s")
        await self._raise_if_ended()  # also if it has a wrong media format
        try:
            returned = await script(self)
        except SpeechFailed as failure:
            self.end(1011, str(failure))
        except BaseException as error:  # SystemExit, too, which would end the server
            if self._ended.done() and isinstance(error, asyncio.CancelledError):
                return  # `serve` has cancelled the script.
            log.exception("%s: the script failed", self)
            self.end(1011, "the script failed")
        else:
            await self._after_script(returned)

    async def _after_script(self, returned: object) -> None:
        """End the call; if it is to stay open, only when the caller hangs up or it drains."""
        if returned is not None:
            kind = type(returned).__name__
            log.warning("%s: the script returned a %s: `await call.say(text)` says it", self, kind)
        if not self.close_after_speech:
            await self._until(lambda: self._is_draining or self._ended.done())
        self.end(1000, "drained" if self._is_draining else "completed")

    async def _speak(self, utterance: Utterance) -> bool:
        """Speak; return False if a key interrupts it. Raise a failure once the rest was heard."""
        try:
            async with timeout(None) as self._interruption:
                await self._stream(utterance)
                await self._until_heard()
        except TimeoutError:  # A key has interrupted it.
            await self._silence(utterance)
            return False
        except asyncio.CancelledError:  # The script has a time-out around `say`, or the call ended.
            await self._silence(utterance)
            raise
        if utterance.failure:
            raise utterance.failure
        return True

    async def _stream(self, utterance: Utterance) -> None:
        """Send the speech of `utterance` as it comes, but not too far ahead of what plays."""
        try:
            async with timeout(MAX_SILENCE_SECONDS) as silence:
                while audio := await utterance.read():
                    pause_seconds = self._playback.pause_seconds(audio)
                    if pause_seconds:
                        await asyncio.sleep(pause_seconds)
                    await self._send(MEDIA % (self._stream_sid, b64encode(audio).decode()))
                    self._playback.add(audio)
                    silence.reschedule(self._playback.ends_at + MAX_SILENCE_SECONDS)
        except TimeoutError:  # What was sent has been played long ago.
            self._playback.clear()
            raise SpeechFailed(f"no audio for {MAX_SILENCE_SECONDS:.0f} s") from None

    async def _until_heard(self) -> None:
        """Wait for a mark, which Twilio returns when all before it has been played."""
        name = str(time.monotonic())  # another one each time
        try:
            async with timeout(self._playback.ahead_seconds() + MARK_GRACE_SECONDS):
                await self._send(MARK % (self._stream_sid, name))
                await self._until(lambda: self._returned_mark == name)
        except TimeoutError:
            log.warning("%s: no mark came back: does the TwiML have <Start>, not <Connect>?", self)
        self._playback.is_playing = False

    async def _silence(self, utterance: Utterance) -> None:
        """Have Twilio throw away what it has not played; log what the text has raised meanwhile."""
        self._playback.clear()
        await self._send(CLEAR % self._stream_sid)
        failure = utterance.failure
        if failure and not isinstance(failure, SpeechFailed):  # which `_fetch` has logged
            log.error("%s: the text failed", self, exc_info=failure)

    async def _send(self, message: str) -> None:
        with suppress(ConnectionClosed):  # The receiver ends the call, and says why.
            await self._ws.send(message)


def as_close_reason(text: str) -> str:
    """Return as much of `text` as fits a close frame: 123 bytes of UTF-8."""
    return text.encode()[:123].decode(errors="ignore")


MAX_BUFFERED_SECONDS = 3.0  # of audio at Twilio. More would delay a `clear` on a slow link.
# Each pause is this share of what is buffered. So texts that are well ahead do less, and the event
# loop has time for calls that have no sound yet.
PAUSE_SHARE = 0.1


class Playback:
    """How much audio Twilio was sent on one call, and has played, by our clock.

    Attributes:
        started_at: When the call has started.
        is_playing: Whether something was sent, and no mark and no `clear` has said that it is over.
        ends_at: When all that was sent will have been played, by time.monotonic(), which is the
            event loop's time.
    """

    def __init__(self) -> None:
        self.started_at = 0.0
        self.is_playing = False
        self.ends_at = 0.0
        self._first_sent_at = 0.0
        self._sent_seconds = 0.0
        self._cleared_seconds = 0.0

    def ahead_seconds(self) -> float:
        """Return how much has been sent but not yet played."""
        if not self.is_playing:
            return 0.0
        return max(0.0, self.ends_at - time.monotonic())

    def pause_seconds(self, audio: bytes) -> float:
        """Return how long to wait before `audio` is sent; 0.0 if nothing is buffered."""
        ahead = self.ahead_seconds()
        excess = ahead + len(audio) / BYTES_PER_SECOND - MAX_BUFFERED_SECONDS
        return max(ahead * PAUSE_SHARE, excess)

    def add(self, audio: bytes) -> None:
        """Count `audio` as sent."""
        now = time.monotonic()
        seconds = len(audio) / BYTES_PER_SECOND
        self.ends_at = now + self.ahead_seconds() + seconds
        self.is_playing = True
        self._first_sent_at = self._first_sent_at or now
        self._sent_seconds += seconds

    def clear(self) -> None:
        """Count what has not yet been played as never to be heard."""
        self._cleared_seconds += self.ahead_seconds()
        self.is_playing = False

    def summary(self) -> str:
        """Return, for the log, how soon the first audio was sent, and how much was heard."""
        if not self._first_sent_at:
            return "no audio sent"
        first_ms = (self._first_sent_at - self.started_at) * 1000
        heard = self._sent_seconds - self._cleared_seconds - self.ahead_seconds()
        return (
            f"first audio {first_ms:.0f} ms; sent {self._sent_seconds:.1f} s, heard {heard:.1f} s"
        )


MAX_FOREIGN_BYTES = 2000  # of an answer that says what is wrong


def post_twiml(url: str, login: tuple[str, str], twiml: str) -> tuple[int, str]:
    """Ask Twilio to go on with `twiml` on the call at `url`; return status and body of its answer.

    Raises:
        requests.RequestException: There was no answer.
    """
    with requests.post(
        url,
        {"Twiml": twiml},
        auth=login,
        timeout=TWILIO_SECONDS,
        allow_redirects=False,
        stream=True,
    ) as response:
        return response.status_code, beginning(response)


def beginning(response: requests.Response) -> str:
    """Return the body of `response`, or so much of it as says what is wrong."""
    body = b""
    with suppress(requests.RequestException):  # What has come is enough to go by.
        for part in response.iter_content(MAX_FOREIGN_BYTES):
            body += part
            if len(body) >= MAX_FOREIGN_BYTES:
                break
    return body.decode(errors="replace")


def excerpt(foreign: object) -> str:
    """Return somebody else's text as the log takes it: in ASCII, 200 characters at most."""
    text = ascii(foreign)
    if len(text) > 200:  # The end is kept, too, since requests' exceptions have the cause there.
        text = f"{text[:60]} ... {text[-135:]}"
    return text


UNFIT_FOR_A_SID = re.compile("[^A-Za-z0-9_-]")


def clean_sid(sid: object) -> str:
    """Return `sid` with nothing in it but what is fit for a URL, a message and the log."""
    return UNFIT_FOR_A_SID.sub("", str(sid or ""))[:64]


class News(asyncio.Event):
    """Tells whoever waits that something has changed."""

    async def next(self) -> None:
        """Wait for the next set(), which wakes all who wait.

        One that came before this call is lost, so look for what has changed right before it.
        """
        self.clear()
        await self.wait()


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Await what `function` returns, in a thread of its own, since requests blocks.

    It is a daemon thread. An executor's threads may all be busy, with a script's own work; and the
    process would wait for them at its exit.
    """
    result = Future[Any]()
    result.set_running_or_notify_cancel()  # else a time-out cancels it, and set_result raises

    def run() -> None:
        try:
            result.set_result(function(*args, **kwargs))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


# --- Deepgram -------------------------------------------------------------------------------------

FRAME_BYTES = 160  # 20 ms; whole frames avoid the jitter that some callers hear
MAX_CHUNK_BYTES = 20 * FRAME_BYTES  # 0.4 s, so that a slow link, too, soon has the first sound
MAX_SPEECH_BYTES = 8_000_000  # of a piece; 300 characters take some 200 KB


class SpeechFailed(Exception):
    """Synthesis failed or is incomplete."""

    def __init__(self, reason: str, advice: str = "", permanent: bool = False) -> None:
        super().__init__(reason)
        self.advice = advice
        self.permanent = permanent  # a retry cannot succeed


class Piece(NamedTuple):
    """What is requested: some sentences, and the voice that is to say them."""

    model: str
    text: str


class Speech:
    """The mulaw audio of one piece, to which a thread appends as Deepgram sends it.

    Attributes:
        listeners: How many utterances speak it, or are going to.
        failure: Why there is no more audio, if that is so.
        is_over: Whether no more audio comes, be it for a failure.
        is_whole: Whether Deepgram has said where the audio ends, and all has come.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.audio = bytearray()
        self.listeners = 0
        self.failure: SpeechFailed | None = None
        self.is_over = False
        self.is_whole = False
        self.fetching: asyncio.Task[None]  # kept here, since asyncio holds tasks only weakly
        self._loop = asyncio.get_running_loop()
        self._news = News()

    def add(self, audio: bytes) -> None:
        """Append `audio`, in a thread; raise SpeechFailed if the download is to stop."""
        # It is over if the time-out of `_fetch` has expired.
        if self.is_over or len(self.audio) > MAX_SPEECH_BYTES:
            raise SpeechFailed("Deepgram does not come to an end")
        self.audio += audio
        self._loop.call_soon_threadsafe(self._news.set)

    def end(self) -> None:
        """Tell who listens that no more audio comes."""
        self.is_over = True
        self._news.set()

    async def read(self, position: int) -> bytes:
        """Return audio from `position` on, in whole frames but for its end; b"" after that.

        At most 0.4 s are returned. If nothing has come yet, wait.
        """
        while True:
            size = min(MAX_CHUNK_BYTES, len(self.audio) - position)
            if not self.is_over:
                size -= size % FRAME_BYTES
            if size or self.is_over:
                return bytes(self.audio[position : position + size])
            await self._news.next()


class Utterance:
    """One text on its way to speech: its pieces are requested while it is written.

    Two at most are under way: the one that is being spoken and the one after it.

    Attributes:
        failure: What Deepgram or the text has failed with, if one has; whichever came first.
    """

    def __init__(self, text: Text, request: Callable[[str], Speech]) -> None:
        self.failure: BaseException | None = None
        self._request = request
        self._speeches = collections.deque[Speech]()
        self._spoken_bytes = 0  # of the first speech
        self._text = ""
        self._position = 0  # in `_text`: what is before it has been requested
        self._requested = 0  # so far
        self._is_written = False  # to its end
        self._is_stopped = False
        self._news = News()  # set when something was written, or requested
        self._writer: asyncio.Task[None] | None = None
        if isinstance(text, str):
            self._text = text
            self._is_written = True
        else:
            self._writer = asyncio.create_task(self._write(aiter(text)))

    async def read(self) -> bytes:
        """Return the next audio, at most 0.4 s; b"" at the end or at a failure."""
        while await self._until_speech():
            speech = self._speeches[0]
            audio = await speech.read(self._spoken_bytes)
            if audio:
                self._spoken_bytes += len(audio)
                return audio
            if speech.failure:
                self.failure = self.failure or speech.failure
                self.stop()
                break
            self._speeches.popleft().listeners -= 1
            self._spoken_bytes = 0
        return b""

    def stop(self) -> None:
        """Want no more speech, and have the text's writer stop."""
        for speech in self._speeches:
            speech.listeners -= 1
        self._speeches.clear()
        if self._writer and not self._is_stopped:  # A second time would break off its clean-up.
            self._writer.cancel()
        self._is_stopped = True

    async def close(self) -> None:
        """Stop, and give the text CLOSE_SECONDS for what it does at its end."""
        self.stop()
        if self._writer:
            await asyncio.wait([self._writer], timeout=CLOSE_SECONDS)

    async def _write(self, parts: AsyncIterator[str | None]) -> None:
        """Take the text's parts in one task: a time-out in a generator cannot move to another."""
        try:
            await self._take(parts)
            self._is_written = True
        except BaseException as error:  # SystemExit, too, which would end the server
            if not self._is_stopped:
                self.failure = error
            elif not isinstance(error, asyncio.CancelledError):
                log.error("the text failed as it was stopped", exc_info=error)
        self._news.set()

    async def _take(self, parts: AsyncIterator[str | None]) -> None:
        """Add the parts to the text, MAX_CHARACTERS ahead at most, and close them at the end."""
        try:
            async for part in parts:
                if self._is_stopped:  # The text has caught its cancellation.
                    break
                if part:  # Clients of models send empty parts while the model is busy.
                    self._text = self._text[self._position :] + part
                    self._position = 0
                    self._news.set()
                while len(self._text) - self._position > MAX_CHARACTERS:
                    await self._news.next()
        finally:
            if isinstance(parts, AsyncGenerator):
                await parts.aclose()

    async def _until_speech(self) -> bool:
        """Wait until there is a speech to read; return False if none will come."""
        is_paused = False
        while not self._speeches:
            if self._request_next(is_paused):
                await asyncio.sleep(0)  # Much of a text may be mere punctuation.
            elif self._is_written or self.failure:
                return False
            else:
                is_paused = not await self._goes_on()
        self._request_next()  # so that the second piece is there when the first has been spoken
        return True

    async def _goes_on(self) -> bool:
        """Wait for more of the text; return False if none comes within TEXT_PAUSE_SECONDS."""
        try:
            async with timeout(TEXT_PAUSE_SECONDS):
                await self._news.next()
        except TimeoutError:
            return False
        return True

    def _request_next(self, is_paused: bool = False) -> bool:
        """Take the next piece, if two are not under way, and request it if there is a word in it.

        Return whether anything was taken.
        """
        if len(self._speeches) == 2 or self._position == len(self._text):
            return False
        text = self._text[self._position : self._position + MAX_CHARACTERS]
        # A text that has failed is like one that pauses: its whole sentences are said.
        is_paused = is_paused or self.failure is not None
        length = length_of_piece(text, self._requested, is_paused, self._is_written)
        self._position += length
        self._news.set()  # for `_take`
        words = text[:length].strip()
        if is_speakable(words):
            self._requested += 1
            speech = self._request(words)
            speech.listeners += 1
            self._speeches.append(speech)
        return length > 0


FORMAT = "encoding=mulaw&sample_rate=8000&container=none"  # a WAV header would be a click
# More than the 1 s after which a lost packet is resent; three tries fit MAX_SILENCE_SECONDS.
CONNECT_SECONDS = 2.5
READ_SECONDS = 5.0  # without a byte; Deepgram's first usually comes after 0.2 to 0.4 s
READ_BYTES = 5 * FRAME_BYTES  # 0.1 s of audio
MAX_RESPONSE_SECONDS = 120.0  # Deepgram sends a piece within some seconds
RETRY_SECONDS = 8.0  # from the first try to the last
FIRST_RETRY_WAIT_SECONDS = 0.25  # before another try; each wait is twice as long as the last one
MAX_RETRY_WAIT_SECONDS = 1.0
MAX_IDLE_SECONDS = 30.0  # Some NATs forget a connection that has idled for a minute.
DEEPGRAM_ADVICE = {  # by HTTP status
    400: "check DEEPGRAM_OPTIONS and the voice, which call.model, the TwiML or DEEPGRAM_MODEL sets",
    401: "check DEEPGRAM_API_KEY",
    402: "add credit at console.deepgram.com",
    403: "this key may not use this voice: check DEEPGRAM_API_KEY and DEEPGRAM_MODEL",
    429: "lower DEEPGRAM_CONCURRENCY, or ask Deepgram for more requests at once",
}
DEFAULT_ADVICE = "see status.deepgram.com, and check DEEPGRAM_URL and the network"


class TextToSpeech:
    """Deepgram text-to-speech: who wants the same text shares one request, or the cache."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = settings.deepgram_url
        self._query = f"{FORMAT}&{settings.deepgram_options}".rstrip("&")
        self._context = client_tls_context()
        self._session = self._new_session()
        self._renewed_at = time.time()  # Unlike monotonic(), it goes on while a machine sleeps.
        self._slots = asyncio.Semaphore(settings.deepgram_concurrency)  # first come, first served
        self._in_flight: dict[Piece, Speech] = {}
        self._cache = collections.OrderedDict[Piece, Speech]()  # the least recently used first
        self._cache_bytes = 0

    def utterance(self, text: Text, model: str) -> Utterance:
        """Return `text` as an utterance in this voice."""
        return Utterance(text, functools.partial(self._get, model))

    def _get(self, model: str, text: str) -> Speech:
        """Return the speech of `text`: cached, being fetched for somebody, or requested now."""
        piece = Piece(model, text)
        if piece in self._cache:
            self._cache.move_to_end(piece)
            return self._cache[piece]
        if piece not in self._in_flight:
            speech = Speech(piece)
            self._in_flight[piece] = speech
            speech.fetching = asyncio.create_task(self._fetch(speech))
        return self._in_flight[piece]

    async def _fetch(self, speech: Speech) -> None:
        """Fetch `speech` when there is a slot, if somebody still waits for it then.

        Once begun it is fetched to its end, even if its listeners leave: it is billed anyway, and
        is cached.
        """
        try:
            async with self._slots:
                if speech.listeners:
                    async with timeout(MAX_RESPONSE_SECONDS):
                        await in_thread(self._download, speech)
        except SpeechFailed as failure:
            speech.failure = failure
        except TimeoutError:  # The thread sees that it is over when the next bytes come.
            speech.failure = SpeechFailed("Deepgram is too slow", DEFAULT_ADVICE)
        except Exception as error:  # such as: can't start new thread
            speech.failure = SpeechFailed("Deepgram could not be asked", excerpt(error))
        del self._in_flight[speech.piece]
        speech.end()
        if speech.failure:
            voice = excerpt(speech.piece.model)
            log.error("%s for the voice %s: %s", speech.failure, voice, speech.failure.advice)
        elif speech.is_whole:
            self._cache_speech(speech)

    def _cache_speech(self, speech: Speech) -> None:
        """Cache `speech` in place of what has not been used for longest."""
        self._cache[speech.piece] = speech
        self._cache_bytes += len(speech.audio)
        while self._cache_bytes > self._settings.cache_mb * 2**20:
            _, evicted = self._cache.popitem(last=False)
            self._cache_bytes -= len(evicted.audio)

    # In a thread.

    def _download(self, speech: Speech) -> None:
        """Add what Deepgram sends to `speech`; raise SpeechFailed."""
        try:
            with self._post_patiently(speech) as response:
                check_audio(response)
                is_chunked = "Transfer-Encoding" in response.headers
                # iter_content yields each chunk of a chunked body as it comes, whatever the size.
                # Of any other body it waits until it has so many bytes.
                read_bytes = MAX_CHUNK_BYTES if is_chunked else READ_BYTES
                for audio in response.iter_content(read_bytes):
                    speech.add(audio)
        except requests.RequestException as error:
            advice = f"{excerpt(error)}; {DEFAULT_ADVICE}"
            raise SpeechFailed("the connection to Deepgram failed", advice) from None
        size = int(response.headers.get("Content-Length", 0))  # urllib3 1.26 does not check it.
        if not speech.audio or len(speech.audio) < size:
            raise SpeechFailed("Deepgram sent no audio, or not all", DEFAULT_ADVICE)
        speech.is_whole = is_chunked or size > 0  # Else nobody knows whether it was cut short.

    def _post_patiently(self, speech: Speech) -> requests.Response:
        """Return Deepgram's answer; after 429 and 5xx, retry while there is time and a listener."""
        give_up_at = time.monotonic() + RETRY_SECONDS
        wait_seconds = FIRST_RETRY_WAIT_SECONDS
        while True:
            response = self._post_reconnecting(speech.piece)
            is_busy = response.status_code == 429 or response.status_code >= 500
            left_seconds = give_up_at - time.monotonic()
            if not is_busy or left_seconds < 0 or not speech.listeners:
                return response
            beginning(response)  # If that is all of it, the connection is kept.
            response.close()
            wanted_seconds = max(wait_seconds, retry_after_seconds(response))
            time.sleep(min(wanted_seconds, left_seconds))  # The last try is after RETRY_SECONDS.
            if not speech.listeners:
                return response
            wait_seconds = min(2 * wait_seconds, MAX_RETRY_WAIT_SECONDS)

    def _post_reconnecting(self, piece: Piece) -> requests.Response:
        """Return Deepgram's answer; if there is no connection, or it breaks, try twice more."""
        for _ in range(2):
            with suppress(requests.ConnectionError):
                return self._post(piece)
        return self._post(piece)

    def _post(self, piece: Piece) -> requests.Response:
        """Return Deepgram's answer; raise requests' exceptions."""
        version = "v2" if piece.model.startswith("flux-") else "v1"  # v1 does not know Flux
        return self._fresh_session().post(
            f"{self._url}/{version}/speak?{self._query}",
            params={"model": piece.model},
            json={"text": piece.text},
            headers={"Accept-Encoding": "identity"},  # Compressed audio comes only as a whole.
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            stream=True,
        )

    # Connections.

    async def keep_warm(self) -> None:
        """Replace all idle connections by a new one, twice in MAX_IDLE_SECONDS.

        A NAT forgets a connection that idles, without a word to either side, and a request on it
        would hang. A new one costs two round trips, so it is made before it is needed. It has a new
        session, since nothing but a session's end closes its idle connections.
        """
        while True:
            await asyncio.sleep(MAX_IDLE_SECONDS / 2)
            session = self._new_session()
            with suppress(Exception):  # If something is wrong, the next request says so.
                await in_thread(session.head, self._url, timeout=1, allow_redirects=False)
            self._session.close()  # of idle connections only: what is being fetched goes on
            self._session = session
            self._renewed_at = time.time()

    def _fresh_session(self) -> requests.Session:
        """Return the session, without idle connections if keep_warm is late: the machine slept."""
        if time.time() - self._renewed_at > MAX_IDLE_SECONDS:
            self._session.close()
            self._renewed_at = time.time()
        return self._session

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        # Else requests searches the environment for each request, which takes time.
        session.proxies = requests.utils.get_environ_proxies(self._url)
        session.trust_env = False  # Else ~/.netrc may replace this header:
        session.headers["Authorization"] = f"Token {self._settings.deepgram_api_key}"
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # none are kept
        pool_size = self._settings.deepgram_concurrency
        session.mount(self._url, DeepgramAdapter(self._context, pool_size))
        return session


class DeepgramAdapter(requests.adapters.HTTPAdapter):
    """Connects to Deepgram.

    All connections have one TLS context. By itself, requests has each new connection read the file
    of root certificates. That takes so much processor time that other calls wait.
    """

    def __init__(self, context: ssl.SSLContext, pool_size: int) -> None:
        self._context = context
        super().__init__(pool_maxsize=pool_size)

    def build_connection_pool_key_attributes(self, request: Any, *_: Any) -> Any:
        """Return what makes a pool: what requests does for `verify=True`, and our context."""
        host, options = super().build_connection_pool_key_attributes(request, verify=True)
        return host, {**options, "ssl_context": self._context}

    def cert_verify(self, *_: Any) -> None:
        """Do nothing, where requests names the file of certificates."""

    def send(self, *args: Any, **options: Any) -> requests.Response:
        """Return Deepgram's answer; raise requests' exceptions, one for an interim answer, too."""
        response = super().send(*args, **options)
        if response.status_code < 200:
            # The final answer is still to come, and would be taken for the next request's.
            response.close()
            raise requests.ConnectionError(f"an interim answer, {response.status_code}")
        return response


def client_tls_context() -> ssl.SSLContext:
    """Return a TLS context that trusts whom requests trusts; raise StartError."""
    path = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not path:
        path = requests.utils.DEFAULT_CA_BUNDLE_PATH
    context = create_urllib3_context()
    try:
        if Path(path).is_dir():
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(cafile=path)
    except OSError as error:
        raise StartError(
            f"Cannot read the certificates in {path} ({error}): check REQUESTS_CA_BUNDLE and "
            "CURL_CA_BUNDLE."
        ) from None
    return context


def check_audio(response: requests.Response) -> None:
    """Raise SpeechFailed unless `response` is audio as it was asked for."""
    status = response.status_code
    content_type = response.headers.get("Content-Type", "no type")
    encoding = response.headers.get("Content-Encoding", "")
    if "dg-warnings" in response.headers:
        log.warning("Deepgram warns: %s", excerpt(response.headers["dg-warnings"]))
    is_audio = content_type.startswith(("audio/", "application/octet-stream"))
    if status == 200 and is_audio and encoding in ("", "identity"):
        return
    answer = excerpt(f"{content_type} {encoding} {beginning(response)}")
    raise SpeechFailed(
        f"Deepgram answered {status}",
        f"{answer}; {DEEPGRAM_ADVICE.get(status, DEFAULT_ADVICE)}",
        permanent=400 <= status < 408,  # 408 and 429 may pass
    )


def retry_after_seconds(response: requests.Response) -> float:
    """Return how long Deepgram wants us to wait, or 0.0 if it does not say."""
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:  # It is a date.
        return 0.0


# --- Pieces of text -------------------------------------------------------------------------------

MAX_CHARACTERS = 2000  # of a request, says Deepgram
MAX_PIECE_CHARACTERS = 300  # since a long text takes Deepgram longer
FIRST_PIECE_CHARACTERS = 20  # at least, so that "Hi." takes the next sentence along
# The first piece of a text that is being written may end at a clause, if it has so many characters.
FIRST_CLAUSE_CHARACTERS = 40
# Where a second piece is cut in which no sentence ends. While the first piece is spoken, a model
# that writes 15 tokens a second writes so much.
SECOND_PIECE_CHARACTERS = 175
TEXT_PAUSE_SECONDS = 0.5  # If a text pauses for so long, what is complete is said.
# Deepgram's inline controls, such as \{pause:500ms\}. What CONTROL matches is not cut, so it also
# matches one whose end is still to be written. CLOSED_CONTROL is nothing to say by itself.
CONTROL = re.compile(r"\\\{.*?(?:\\\}|\Z)", re.DOTALL)
CLOSED_CONTROL = re.compile(r"\\\{.*?\\\}", re.DOTALL)
# Quotes, brackets and Markdown that close a sentence belong to it.
CLOSERS = re.escape("\"'”’»)]」』）*_~`")
# A full stop or its like at the end of a word; a Chinese or Japanese one anywhere; or a new line.
# Not each of them ends a sentence: see ends_sentence.
SENTENCE_END = re.compile(rf"[.!?…؟۔।॥][{CLOSERS}]*(?=\s|\Z)|[。！？]+[{CLOSERS}]*|\n")
# What is before the full stop of an abbreviation: a letter or a digit (J. a.m. 1.), two digits
# (10.), or a capital with one to three more letters (Dr. Capt.). "Yes." matches, too, and takes the
# next sentence along.
ABBREVIATION = re.compile(r"(?:\A|\W|_)(?:\w|\d\d|[A-ZÀ-ÖØ-Þ]\w{1,3})\Z")
CLAUSE_END = re.compile(rf"[,;:–—،][{CLOSERS}]*(?=\s)|[、，；：][{CLOSERS}]*")
WORD_END = re.compile(r"\s+")
SPEAKABLE = re.compile(r"[^\W_]")  # a letter or a digit


@functools.lru_cache(maxsize=1000)  # since a greeting is said to everybody
def length_of_piece(text: str, number: int, is_paused: bool, is_written: bool) -> int:
    """Return how many characters of `text` to request next, or 0 to wait for more of it.

    The first piece is the first sentence. Any other is all of the text, if it is written and fits,
    or as many sentences as fit. Where there is no whole sentence, see length_of_part.

    Args:
        text: What is written and has not been requested, MAX_CHARACTERS of it at most.
        number: How many pieces of the text have been requested.
        is_paused: Whether no more is to be expected soon.
        is_written: Whether the text has been written to its end.
    """
    text = CONTROL.sub(mask, text)
    first = SPEAKABLE.search(text)
    if not first:  # There is nothing to say: wait for what follows or, at the end, skip it.
        return len(text) if is_written or len(text) == MAX_CHARACTERS else 0
    start = first.end()  # No piece ends before this, so that each has a word in it.
    limit = min(start + MAX_PIECE_CHARACTERS, MAX_CHARACTERS - 1)  # More may follow MAX_CHARACTERS.
    ends = matches(SENTENCE_END, text, start, limit)
    sentences = [end.end() for end in ends if ends_sentence(end, is_paused)]
    if number == 0 and not is_paused:
        sentences = [end for end in sentences if end >= FIRST_PIECE_CHARACTERS]
    if number == 0 and sentences:
        return sentences[0]
    if is_written and len(text) <= limit:
        return len(text)
    if sentences:
        return sentences[-1]
    return length_of_part(text, number, start, limit)


def length_of_part(text: str, number: int, start: int, limit: int) -> int:
    """Return how much of a sentence to request that is too long, or still being written."""
    if number == 1:
        limit = min(limit, start + SECOND_PIECE_CHARACTERS)
    clauses = matches(CLAUSE_END, text, start, limit)
    if len(text) > limit:
        parts = clauses or matches(WORD_END, text, start, limit)
        return parts[-1].end() if parts else len(text)
    if number == 0 and clauses and clauses[-1].end() >= FIRST_CLAUSE_CHARACTERS:
        return clauses[-1].end()
    return 0  # What is written to its end and fits was taken before.


def mask(control: re.Match[str]) -> str:
    """Return as many characters as the control has, which end no word, clause or sentence."""
    return "\0" * len(control[0])


def matches(pattern: re.Pattern[str], text: str, start: int, limit: int) -> list[re.Match[str]]:
    """Return the matches of `pattern` in `text` that end between `start` and `limit`."""
    return [match for match in pattern.finditer(text) if start <= match.end() <= limit]


def ends_sentence(match: re.Match[str], is_paused: bool) -> bool:
    """Return whether a match of SENTENCE_END ends a sentence, by what is before and after it."""
    text = match.string
    mark = match[0][0]
    if mark == "\n":
        return True
    following = text[match.end() :].lstrip()[:1]
    if not following:
        return is_paused  # Else what comes may belong to it, or show that it goes on.
    if mark in "。！？":
        return True
    goes_on = following.islower() or following.isdigit() or following == "."  # . . . or .NET
    is_abbreviation = mark == "." and ABBREVIATION.search(text, 0, match.start())
    return not goes_on and not is_abbreviation


def is_speakable(text: str) -> bool:
    """Return whether there is anything to say: Deepgram may reject a lone emoji or asterisk."""
    return SPEAKABLE.search(CLOSED_CONTROL.sub("", text)) is not None


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
    """Return the URL without a final /; raise a ValueError that says what it must be."""
    if not re.fullmatch(r"https?://([^/:@\[\]]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?(/.*)?", text):
        raise ValueError(f"a URL such as https://api.example.com, not {text!r}")
    return text.rstrip("/")


def level(text: str) -> str:
    """Return the level; raise a ValueError that says what it must be."""
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"DEBUG, INFO, WARNING or ERROR, not {text!r}")
    return text.upper()


def secret(text: str) -> str:
    """Return the text if it fits into a header; raise a ValueError that does not repeat it."""
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("printable ASCII without spaces (copy it again)")
    if re.fullmatch("AC[0-9a-f]{32}", text):
        raise ValueError("the auth token, not the Account SID above it")
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
    close_after_speech: bool = setting("no", "yes: the TwiML goes on after the script", yes_or_no)
    cache_mb: int = setting("16", "speech cache in MiB, 0 to disable", whole_number)
    host: str = setting("localhost", "address to listen on; 0.0.0.0 for all interfaces")
    port: int = setting("5000", "port to listen on; 0 picks a free port", whole_number)
    tls_cert: str = setting("", "PEM file with the certificate chain, to serve TLS")
    tls_key: str = setting("", "PEM file with its private key, unless TLS_CERT has it")
    public_url: str = setting("", "URL in the TwiML; empty: ask the local ngrok agent")
    twilio_auth_token: str = setting(
        "", "your token, to let only Twilio in, and to hang up", secret
    )
    twilio_api_url: str = setting(
        "https://api.twilio.com", "Twilio API base URL; regions have others", http_url
    )
    max_calls: int = setting("300", "maximum concurrent calls; the rest get a 503", positive_number)
    drain_seconds: int = setting("25", "how long a shutdown waits for current texts", whole_number)
    log_level: str = setting("INFO", "DEBUG, INFO, WARNING or ERROR", level)

    @classmethod
    def load(cls) -> Settings:
        """Read the environment; raise StartError."""
        values: dict[str, Any] = {}
        for name, field in SETTINGS.items():
            text = os.environ.get(name, "").strip() or field.metadata["default"]
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                raise StartError(f"{name} must be {error}.") from None
        if not values["deepgram_api_key"]:
            raise StartError(
                f"DEEPGRAM_API_KEY is neither set nor in {DOTENV.absolute()}: `cp .env.example "
                ".env` if there is none, and put yours in, from console.deepgram.com."
            )
        return cls(**values)


SETTINGS = {field.name.upper(): field for field in dataclasses.fields(Settings)}
DOTENV = Path(".env")


def read_dotenv() -> list[str]:
    """Add `.env` to the environment; return what in it is no setting, or raise StartError."""
    for name, value in list(os.environ.items()):
        if not value.strip():  # It counts as not set, but would hide what `.env` has.
            del os.environ[name]
    known = {*os.environ, *SETTINGS}
    path = DOTENV.absolute()
    try:
        load_dotenv(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise StartError(f"Cannot read {path}, which must be UTF-8 ({error}).") from None
    return sorted(os.environ.keys() - known)


# --- Code that blocks -----------------------------------------------------------------------------

BEAT_SECONDS = 0.1
BLOCKED_SECONDS = 1.0  # from which on a warning comes afterwards
DUMP_SECONDS = 5  # from which on a traceback comes while it lasts
STDERR = 2  # A script may put something in place of sys.stderr that is no file.
EXIT_SECONDS = 3 * CLOSE_SECONDS  # for what is left when all calls were cut off


async def name_what_blocks() -> None:
    """Say for how long code has blocked the event loop and, while it still does, where it is."""
    while True:
        faulthandler.dump_traceback_later(DUMP_SECONDS, file=STDERR)  # The next beat puts it off.
        began = time.monotonic()
        await asyncio.sleep(BEAT_SECONDS)
        seconds = time.monotonic() - began
        if seconds > BLOCKED_SECONDS:
            log.warning(
                "the event loop stood still for %.1f s, and every call with it: "
                "move what blocks into asyncio.to_thread, and use asyncio.sleep for time.sleep",
                seconds,
            )


def limit_exit(drain_seconds: int) -> None:
    """Have the process end some seconds after `drain_seconds`, whatever a script does.

    faulthandler has one timer, which name_what_blocks sets anew at each beat. So this is called
    twice: by the signal handler, in case the event loop is blocked and has no more beats; and by
    Server.run, once the beats are over.
    """
    faulthandler.dump_traceback_later(drain_seconds + EXIT_SECONDS, exit=True, file=STDERR)


# --- The server -----------------------------------------------------------------------------------

PATH = "/twilio"
HEALTH_PATH = "/healthz"
MAX_MESSAGE_BYTES = 2**16  # Twilio's have less than 1 KiB
HANDSHAKE_SECONDS = 3.0  # Each connection that says nothing holds a file open for so long.
BACKLOG = 1024  # With asyncio's 100, some of 150 simultaneous calls wait for 1 s.
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
        self._public_url = settings.public_url
        self._is_exit_limited = False
        self._exit_requests = asyncio.Queue[int]()  # of exit statuses

    async def run(self) -> int:
        """Serve until a signal; return the exit status, raise StartError if it cannot listen."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        listening = await self._listen()
        gc.freeze()  # Else the first calls wait while all that was imported is searched.
        background = [
            asyncio.create_task(self._prefetch_greeting()),
            asyncio.create_task(self._tts.keep_warm()),
            asyncio.create_task(name_what_blocks()),
        ]
        status = await self._exit_requests.get()
        for task in background:
            task.cancel()
        limit_exit(self._settings.drain_seconds)
        listening.close(close_connections=False)
        await asyncio.sleep(0)  # close() has made a task. Once that has begun, no call gets in.
        if self._calls:
            await self._drain()
        return status

    async def _listen(self) -> ListeningServer:
        """Start to listen, and print where, and the TwiML to paste."""
        settings = self._settings
        try:
            listening = await serve(
                self._serve_call,
                settings.host,
                settings.port,
                ssl=tls_context(settings),
                process_request=self._process_request,
                origins=[None],  # Twilio sends none; a browser's page has no business here.
                compression=None,  # Twilio offers none; it would cost each call memory.
                max_size=MAX_MESSAGE_BYTES,
                open_timeout=HANDSHAKE_SECONDS,
                backlog=BACKLOG,
                start_serving=False,  # until self._public_url is known
            )
            port = listening.sockets[0].getsockname()[1]
            if not self._public_url:
                self._public_url = await in_thread(ngrok_url, port)
            await listening.start_serving()
        except (OSError, UnicodeError) as error:  # the latter if HOST is no name at all
            advice = LISTEN_ADVICE.get(getattr(error, "errno", 0), "check HOST and PORT")
            raise StartError(
                f"Cannot listen on {settings.host}:{settings.port} ({error}): {advice}."
            ) from None
        announce(settings, port, self._public_url)
        return listening

    async def _serve_call(self, ws: ServerConnection) -> None:
        # websockets does not yield between _process_request and here, so that MAX_CALLS and a drain
        # miss no call.
        call = Call(ws, self._settings, self._tts)
        task: Any = asyncio.current_task()
        self._calls[task] = call
        task.add_done_callback(self._calls.pop)
        await call.serve(self._script)

    async def _prefetch_greeting(self) -> None:
        """Fetch the greeting, so that the first caller has it at once; exit if that is hopeless."""
        greeting = self._tts.utterance(self._settings.greeting, self._settings.deepgram_model)
        while await greeting.read():
            pass
        match greeting.failure:
            case None:
                log.info("the greeting is ready: Deepgram accepts the key and the voice")
            case SpeechFailed(permanent=True):
                log.critical("Deepgram rejects the greeting, so every call would fail: exiting")
                self._exit_requests.put_nowait(1)
            case _:
                log.warning("could not prefetch the greeting: the next call will retry")

    # The end.

    def _on_signal(self, *_: object) -> None:
        """Ask for the exit: at first when current texts were heard, then at once.

        Unlike loop.add_signal_handler's, it runs while a script blocks the event loop, too.
        """
        if not self._is_exit_limited:  # Another signal does not put the exit off.
            self._is_exit_limited = True
            limit_exit(self._settings.drain_seconds)
        with suppress(RuntimeError):  # The event loop has just ended.
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._exit_requests.put_nowait, 0)

    async def _drain(self) -> None:
        """Let each call hear its current text out, for DRAIN_SECONDS or until another signal."""
        log.info("draining %d call(s); a signal ends them at once", len(self._calls))
        for call in self._calls.values():
            call.drain()
        calls = asyncio.create_task(asyncio.wait(list(self._calls)))
        another_signal = asyncio.create_task(self._exit_requests.get())
        await asyncio.wait(
            [calls, another_signal],
            timeout=self._settings.drain_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for call in self._calls.values():
            call.end(1001, "cut off by shutdown")
        await calls

    # The handshake.

    def _process_request(self, ws: ServerConnection, request: Request) -> Response | None:
        """Return None to go on with the handshake, else the response to give instead."""
        if request.path == HEALTH_PATH:
            status = 200
            if not ws.server.is_serving():
                status = 503
            return ws.respond(status, f"{len(self._calls)} calls\n")
        if request.path != PATH:
            if "Upgrade" in request.headers:
                path = excerpt(request.path)
                log.warning("rejected a handshake: the path must be %s, not %s", PATH, path)
            return ws.respond(404, "Not found.\n")
        token = self._settings.twilio_auth_token
        if token and not is_signed(request.headers, token, self._public_url):
            return ws.respond(403, "Not signed by Twilio.\n")
        if len(self._calls) >= self._settings.max_calls:
            log.warning("rejected a call: MAX_CALLS=%d reached", self._settings.max_calls)
            return ws.respond(503, "Too many calls.\n")
        return None  # websockets itself gives a 503 when shutting down


def is_signed(headers: Headers, token: str, public_url: str) -> bool:
    """Return whether Twilio has signed the handshake.

    It signs the URL in the TwiML: `public_url` or, if that is empty, the one that Host makes. A
    final / and :443 may have been added or left out.
    """
    signature = "".join(headers.get_all("X-Twilio-Signature"))
    if not signature:
        log.warning(
            "rejected a handshake without X-Twilio-Signature: "
            "it is not Twilio's, or a proxy does not pass the header on"
        )
        return False
    # Without what follows a /, else Host could choose the path that must be signed.
    claimed_host = "".join(headers.get_all("Host")).partition("/")[0]
    url = stream_url(public_url or claimed_host)
    host, _, path = url.removeprefix("wss://").partition("/")
    for port in ("", ":443"):
        for slash in ("", "/"):
            signed = f"wss://{host.removesuffix(':443')}{port}/{path}{slash}"
            digest = hmac.digest(token.encode(), signed.encode(errors="replace"), "sha1")
            if hmac.compare_digest(b64encode(digest), signature.encode(errors="replace")):
                return True
    log.warning(
        "rejected a handshake: X-Twilio-Signature does not match %s; if this was Twilio, set "
        "PUBLIC_URL to the URL in the TwiML, and TWILIO_AUTH_TOKEN to the token of the account, "
        "subaccount or region that the number belongs to",
        excerpt(url),
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


def announce(settings: Settings, port: int, public_url: str) -> None:
    """Print where the server listens and the TwiML to paste."""
    scheme = "ws"
    if settings.tls_cert:
        scheme = "wss"
    print(f"Listening on {scheme}://{settings.host}:{port}{PATH}. The TwiML to paste:\n")
    print(TWIML.format(url=stream_url(public_url or "YOUR-HOST")), flush=True)
    if not public_url:
        print(
            f"\nReplace YOUR-HOST: no ngrok agent here has a public https URL for port {port}.\n"
            f"Or run `ngrok http {port}` first, or set PUBLIC_URL, and restart.",
            flush=True,
        )
        if settings.twilio_auth_token:
            log.warning("set PUBLIC_URL: without it, a handshake's Host says what must be signed")


def ngrok_url(port: int) -> str:
    """Return the public https URL that the local ngrok agent publishes `port` at, if any."""
    with suppress(Exception):  # there is no ngrok, or something else answers
        api = requests.get(NGROK_API, timeout=1, proxies={"http": ""})  # whatever HTTP_PROXY says
        for tunnel in api.json()["tunnels"]:
            url = str(tunnel["public_url"])
            is_public = url.startswith("https://") and not url.endswith(".internal")  # ngrok's own
            if is_public and str(tunnel["config"].get("addr")).endswith(f":{port}"):
                return url
    return ""


class Throttle(logging.Filter):
    """Lets through five lines of a kind a second, and says how many it dropped.

    Nobody can flood the log. The INFO lines of the calls themselves are all let through.
    """

    MAX_PER_SECOND = 5

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._counts = collections.Counter[str]()  # of this second, by format string

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is to be logged."""
        if int(record.created) != self._second:
            self._second = int(record.created)
            counts = self._counts
            self._counts = collections.Counter()  # before log.warning calls this filter again
            for kind, count in counts.items():
                if count > self.MAX_PER_SECOND:
                    log.warning("%d more lines like this: %s", count - self.MAX_PER_SECOND, kind)
        if record.name == log.name and record.levelno == logging.INFO:
            return True
        kind = str(record.msg)
        self._counts[kind] += 1
        return self._counts[kind] <= self.MAX_PER_SECOND


def raise_file_limit() -> None:
    """Allow as many open files as the system grants: 300 calls need more than a Mac's 256."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit.
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        soft, hard = getrlimit(RLIMIT_NOFILE)
        limit = max(soft, min(hard, MAX_OPEN_FILES))
        setrlimit(RLIMIT_NOFILE, (limit, hard))


def help_text() -> str:
    """Return what --help prints: what this is, and the settings as .env.example has them."""
    lines = [f"{__doc__}\nSettings, in the environment or in .env:\n"]
    for name, field in SETTINGS.items():
        lines.append(f"# {field.metadata['about']}\n{name}={field.metadata['default']}")
    return "\n".join(lines)


def main(script: Script = script) -> int:
    """Serve `script` as the command line and the settings say; return the exit status.

    The process then has to end within some seconds: limit_exit ends it otherwise.
    """
    argparse.ArgumentParser(
        description=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    throttle = Throttle()
    for name in (log.name, "websockets.server", "asyncio"):
        logging.getLogger(name).addFilter(throttle)
    try:
        if not inspect.iscoroutinefunction(script):
            raise StartError("A script is an async function that says `await call.say(text)`.")
        others = read_dotenv()
        settings = Settings.load()
        log.setLevel(settings.log_level)
        if settings.log_level == "DEBUG":
            logging.getLogger("websockets").setLevel(logging.INFO)  # its rejections, not its frames
        if others:
            log.info("%s has, besides settings: %s", DOTENV.absolute(), ", ".join(others))
        if not settings.twilio_auth_token:
            log.warning(
                "TWILIO_AUTH_TOKEN is not set: anyone can spend your Deepgram credit, and a "
                "script's hang_up and redirect fail"
            )
        raise_file_limit()
        return asyncio.run(Server(settings, script).run())
    except StartError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
