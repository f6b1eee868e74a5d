"""A call in the test's own process: the test is Twilio, and no socket and no Deepgram is needed.

`Wire` is what a `Call` uses of a websocket, `Voice` what it uses of a `TextToSpeech`; `Line` serves
a call with both. Nothing here waits for a clock.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any, Self, TypeVar, cast

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.frames import OK_CLOSE_CODES, Close

import twilio_aura
from tests.standins import Observable
from tests.standins.deepgram import noise
from tests.standins.telephone import Stream
from twilio_aura import Call, Piece, Settings, Speech, SpeechFailed, Text, TextToSpeech, Utterance

Result = TypeVar("Result")


class Wire(Stream):
    """A websocket's server side; `wire.connected()` and its like are what Twilio sends.

    Attributes:
        sent: What the call sent, in order: ("media", bytes), ("mark", name), ("clear", "").
        closed: The code and the reason with which the call closed it, if it has.
        is_aborted: Whether the call aborted the transport.
        returns_marks: Whether each mark comes back at once, else when `return_marks` is called.
        hangs: Whether nobody answers a close, until the transport is aborted.
    """

    def __init__(self, *, returns_marks: bool = True, hangs: bool = False) -> None:
        super().__init__()
        self.sent: list[tuple[str, str | bytes]] = []
        self.closed: tuple[int, str] | None = None
        self.is_aborted = False
        self.returns_marks = returns_marks
        self.hangs = hangs
        self.remote_address = ("192.0.2.1", 50_000)
        self.transport = SimpleNamespace(abort=self._abort)
        self._incoming = deque[bytes]()
        self._marks: list[str] = []
        self._end: ConnectionClosed | None = None

    # What has come

    @property
    def audio(self) -> bytes:
        """All audio that the call sent, cleared or not."""
        return b"".join(what for what in self.named("media") if isinstance(what, bytes))

    @property
    def story(self) -> str:
        """The messages that the call sent, in order, by name; several media in a row are one."""
        return re.sub("media( media)+", "media", " ".join(name for name, _ in self.sent))

    def named(self, event: str) -> list[str | bytes]:
        """Return the content of the messages of this name."""
        return [what for name, what in self.sent if name == event]

    async def until_sound(self) -> None:
        """Wait for the first audio."""
        await self.until(lambda: bool(self.audio))

    async def until_mark(self, count: int = 1) -> None:
        """Wait until so many marks have come, returned or not."""
        await self.until(lambda: len(self.named("mark")) >= count)

    async def until_clear(self, count: int = 1) -> None:
        """Wait until so many `clear`s have come."""
        await self.until(lambda: len(self.named("clear")) >= count)

    # What Twilio does

    def feed(self, message: str | bytes) -> None:
        """Send `message` as it is."""
        self._incoming.append(message.encode() if isinstance(message, str) else message)
        self.changed()

    def connected(self) -> None:
        """Send `connected`, which comes first."""
        self.feed(self.connected_message())

    def start(self, **parameters: str) -> None:
        """Send `start`, with these <Parameter>s."""
        self.feed(self.start_message(**parameters))

    def voice(self) -> None:
        """Send 20 ms of the caller's silence."""
        self.feed(self.voice_message())

    def press(self, digit: str) -> None:
        """Press a key."""
        self.feed(self.digit_message(digit))

    def mark(self, name: str) -> None:
        """Return the mark of this name."""
        self.feed(self.mark_message(name))

    def return_marks(self) -> None:
        """Return the marks that have not been returned."""
        while self._marks:
            self.mark(self._marks.pop(0))

    def stop(self) -> None:
        """Send `stop`, with which a call ends."""
        self.feed(self.stop_message())

    def disconnect(self, code: int = 1000, reason: str = "") -> None:
        """Close it from Twilio's side; 1006 is a lost network."""
        if code == 1006:
            self._close(None, None, None)
        else:
            self._close(Close(code, reason), Close(code, reason), True)

    def fail(self, code: int, reason: str) -> None:
        """Close it as websockets does by itself, such as with 1011 where pings are not answered."""
        self._close(None, Close(code, reason), None)

    async def hang_up(self) -> None:
        """End the stream, as Twilio does when its API has been asked for that."""
        self.stop()
        self.disconnect()

    # What a call does

    async def recv(self, decode: bool | None = None) -> bytes:
        """Return what has come, then raise how it was closed."""
        assert decode is False
        await Observable.until(self, lambda: bool(self._incoming or self._end))
        if self._incoming:
            return self._incoming.popleft()
        assert self._end
        raise self._end

    async def send(self, message: str) -> None:
        """Take `message`, or raise how it was closed."""
        if self.closed or self._end:
            await Observable.until(self, lambda: self._end is not None)
            assert self._end
            raise self._end
        name, what = self.check(message)
        self.sent.append((name, what))
        if name == "mark":
            self._marks.append(str(what))
        if self.returns_marks:
            self.return_marks()
        self.changed()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Take the close, and answer it, or hang."""
        assert len(reason.encode()) <= 123  # what a close frame has room for
        self.closed = (code, reason)
        self.changed()
        if self.hangs:
            await Observable.until(self, lambda: self._end is not None)
        self._close(Close(code, reason), Close(code, reason), False)

    def _abort(self) -> None:
        self.is_aborted = True
        self._close(None, Close(*self.closed) if self.closed else None, None)

    def _close(self, received: Close | None, sent: Close | None, in_turn: bool | None) -> None:
        if self._end is None:
            codes = {close.code if close else 1006 for close in (received, sent)}
            kind = ConnectionClosedOK if codes <= OK_CLOSE_CODES else ConnectionClosedError
            self._end = kind(received, sent, in_turn)
        self.changed()


class Voice:
    """A `TextToSpeech` without requests: a piece's speech is its `noise`, and is there at once.

    Attributes:
        pieces: What was asked for, in order.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._speeches: dict[str, Speech] = {}

    @property
    def texts(self) -> list[str]:
        """What was asked for, in order, whatever the voice."""
        return [piece.text for piece in self.pieces]

    def held(self, text: str, audio: bytes = b"") -> Speech:
        """Return the speech of `text`, `audio` so far: the test adds to it, and ends it."""
        speech = self._speeches[text] = Speech(Piece("", text))
        speech.audio += audio
        return speech

    def says(self, text: str, audio: bytes) -> str:
        """Have `audio` be the speech of `text`; return `text`."""
        self.held(text, audio).end()
        return text

    def fails(self, text: str, reason: str = "Deepgram answered 400", audio: bytes = b"") -> str:
        """Have the speech of `text` fail after `audio`; return `text`."""
        speech = self.held(text, audio)
        speech.failure = SpeechFailed(reason)
        speech.end()
        return text

    def forget(self, text: str) -> None:
        """Keep the speech of `text` no longer."""
        del self._speeches[text]

    def utterance(self, text: Text, model: str) -> Utterance:
        """Return `text` as an utterance in this voice."""
        return Utterance(text, functools.partial(self._request, model))

    def _request(self, model: str, text: str) -> Speech:
        self.pieces.append(Piece(model, text))
        if text not in self._speeches:
            speech = Speech(self.pieces[-1])
            speech.audio += noise(text, model)
            speech.end()
            return speech
        return self._speeches[text]


async def idle(_: Call) -> None:
    """Leave it to the test to say and ask."""
    await asyncio.Event().wait()


async def settle() -> None:
    """Let everything run that waits neither for a clock nor for a message."""
    for _ in range(50):
        await asyncio.sleep(0)


class Line(Wire):
    """A call that is being served: `async with Line(script) as line`, then `line.press("1")`.

    At its end the caller hangs up, unless the call has ended. Then the test fails if a task of the
    call's is left, or a WARNING or ERROR, asyncio's included, that it has not taken.

    Attributes:
        call: The `Call` that is served.
        tts: The `Voice` that speaks.
        log: What was logged: of each its level, its message and its traceback.
        complaints: Those of it above INFO that the test has not taken.

    Args:
        script: By default it leaves it to the test to say and ask, such as `line.call.say("One.")`.
        parameters: The TwiML's.
        settings: By default the stream is closed when the script returns.
        start: Whether `start` has come.
        tts: What speaks in place of the `Voice`.
    """

    def __init__(
        self,
        script: twilio_aura.Script = idle,
        parameters: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        *,
        start: bool = True,
        tts: TextToSpeech | None = None,
        returns_marks: bool = True,
        hangs: bool = False,
    ) -> None:
        super().__init__(returns_marks=returns_marks, hangs=hangs)
        self.tts = Voice()
        self.log: list[str] = []
        self.complaints: list[str] = []
        self._script = script
        self._tasks: list[asyncio.Task[Any]] = []
        settings = settings or Settings(close_after_speech=True)
        speaks = tts or cast("TextToSpeech", self.tts)
        self.call = Call(cast("ServerConnection", self), settings, speaks)
        self.connected()
        if start:
            self.start(**(parameters or {}))

    async def __aenter__(self) -> Self:
        self._before = asyncio.all_tasks()
        self._handler = Handler(self)
        self._level = twilio_aura.log.level
        twilio_aura.log.setLevel("DEBUG")
        logging.getLogger().addHandler(self._handler)
        self.serving = asyncio.create_task(self.call.serve(self._script))
        self.serving.add_done_callback(lambda _: self.changed())
        if self._script == idle:
            await settle()  # so that `start` has come
        return self

    async def __aexit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.stop()
        for task in self._tasks:
            task.cancel()
        try:
            await self.serving
            await asyncio.wait([self.serving, *self._tasks])
            await settle()
        finally:
            logging.getLogger().removeHandler(self._handler)
            twilio_aura.log.setLevel(self._level)
        if not failure:
            tasks = asyncio.all_tasks() - self._before
            names = [getattr(task.get_coro(), "__qualname__", "") for task in tasks]
            assert [name for name in names if name.startswith(("Call.", "Utterance."))] == []
            assert self.complaints == []
            assert len(self.ends) == 1

    def begin(self, verb: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Begin what a task of a script does, such as `line.call.say("One.")`."""
        task = asyncio.create_task(verb)
        self._tasks.append(task)
        task.add_done_callback(lambda _: self.changed())
        return task

    def logged(self, level: str, line: str) -> None:
        """Take a line of the log."""
        self.log.append(f"{level} {line}")
        if level not in ("DEBUG", "INFO"):
            self.complaints.append(self.log[-1])
        self.changed()

    @property
    def ends(self) -> list[str]:
        """The lines that say how the call ended: one, when it has."""
        return [line for line in self.log if re.match(r"\w+ call [^:]+ ended: ", line)]

    def complaint(self) -> str:
        """Take the one WARNING or ERROR there is, and return it."""
        (complaint,) = self.complaints
        self.complaints.clear()
        return complaint

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`; fail if the call has ended without it."""
        await super().until(lambda: condition() or self.serving.done() or bool(self._failed()))
        for task in self._failed():
            task.result()
        if not condition():
            raise AssertionError("\n".join(self.log))

    def _failed(self) -> list[asyncio.Task[Any]]:
        ended = [task for task in self._tasks if task.done() and not task.cancelled()]
        return [task for task in ended if task.exception()]

    async def ended(self) -> tuple[int, str]:
        """Wait until the call has ended; return its close code and the reason."""
        await asyncio.shield(self.serving)
        assert self.closed
        return self.closed


class Handler(logging.Handler):
    """Hands what is logged to a `Line`."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of the log."""
        self._line.logged(record.levelname, self.format(record))
