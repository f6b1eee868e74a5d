"""A telephone: the Twilio side of a Media Stream, on a real websocket.

It plays what it is sent in order, returns each mark when the audio before it has been played, and
at a `clear` throws the rest away and returns the marks in it, as Twilio does. It keeps to the
protocol and holds the server to it: a message that Twilio would warn about raises
ProtocolViolation in the test.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from tests.standins import Observable

BYTES_PER_SECOND = 8000
ACCOUNT_SID = "AC" + "0" * 32
MULAW = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}


# The handshake as bytes, for tests that write to a socket themselves.
HANDSHAKE = (
    b"GET /twilio HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(message: object) -> bytes:
    """Return `message` as a websocket frame from a client, masked with zeros, which is free."""
    data = json.dumps(message).encode()
    short = len(data) < 126
    length = bytes([0x80 | len(data)]) if short else struct.pack(">BH", 0x80 | 126, len(data))
    return b"\x81" + length + b"\0\0\0\0" + data


def sign(url: str, token: str) -> dict[str, str]:
    """Return the header with which Twilio connects to `url`, be it ws or wss behind a proxy."""
    signed = "wss://" + url.partition("://")[2]
    digest = hmac.digest(token.encode(), signed.encode(), "sha1")
    return {"X-Twilio-Signature": base64.b64encode(digest).decode()}


class ProtocolViolation(AssertionError):
    """The server sent what Twilio would warn about (31950, 31951)."""


class Stream(Observable):
    """Twilio's side of one call's stream: the messages that it sends, and what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stream_sid = "MZ" + secrets.token_hex(16)
        self.call_sid = "CA" + secrets.token_hex(16)
        self._sequence = 0

    def message(self, event: str, **fields: Any) -> str:
        """Return one of Twilio's messages."""
        self._sequence += 1
        return json.dumps(
            {
                "event": event,
                "sequenceNumber": str(self._sequence),
                "streamSid": self.stream_sid,
                **fields,
            }
        )

    def connected_message(self) -> str:
        """Return `connected`, which comes first, without the fields of the others."""
        return json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"})

    def start_message(self, **parameters: str) -> str:
        """Return `start`, with these <Parameter>s."""
        return self.message("start", start=self.start_fields(**parameters))

    def start_fields(self, **parameters: str) -> dict[str, Any]:
        """Return what `start` has besides its event."""
        return {
            "accountSid": ACCOUNT_SID,
            "streamSid": self.stream_sid,
            "callSid": self.call_sid,
            "tracks": ["inbound"],
            "mediaFormat": MULAW,
            "customParameters": parameters,
        }

    def voice_message(self, chunk: int = 0) -> str:
        """Return the caller's silence, 20 ms of it."""
        payload = base64.b64encode(b"\xff" * 160).decode()
        media = {
            "track": "inbound",
            "chunk": str(chunk + 1),
            "timestamp": str(chunk * 20),
            "payload": payload,
        }
        return self.message("media", media=media)

    def digit_message(self, digit: str) -> str:
        """Return that a key was pressed."""
        return self.message("dtmf", dtmf={"track": "inbound_track", "digit": digit})

    def mark_message(self, name: str) -> str:
        """Return the mark of this name."""
        return self.message("mark", mark={"name": name})

    def stop_message(self) -> str:
        """Return `stop`, with which a call ends."""
        return self.message("stop", stop={"accountSid": ACCOUNT_SID, "callSid": self.call_sid})

    def check(self, message: str | bytes) -> tuple[str, str | bytes]:
        """Return the event of the server's `message`, and its payload or name, if it has any."""
        if isinstance(message, bytes):
            raise ProtocolViolation("a binary message (31950)")
        fields = json.loads(message)
        match fields:
            case {"event": "media", "streamSid": sid, "media": {"payload": str(payload)}}:
                keys = {"event", "streamSid", "media"}, {"payload"}
                try:
                    what: str | bytes = base64.b64decode(payload, validate=True)
                except binascii.Error as error:
                    raise ProtocolViolation(f"a payload that is not base64: {error}") from error
            case {"event": "mark", "streamSid": sid, "mark": {"name": str(name)}}:
                keys = {"event", "streamSid", "mark"}, {"name"}
                what = name
            case {"event": "clear", "streamSid": sid}:
                keys = {"event", "streamSid"}, set()
                what = ""
            case _:
                raise ProtocolViolation(f"not a message Twilio knows (31951): {message[:200]}")
        event = str(fields["event"])
        inner = fields.get(event, {})
        if (set(fields), set(inner)) != keys or sid != self.stream_sid:
            raise ProtocolViolation(f"extra keys or a wrong streamSid (31951): {message[:200]}")
        return event, what


class Telephone(Stream):
    """One call, made by `dial`.

    Attributes:
        heard: The mulaw bytes played to the caller so far.
        received: The mulaw bytes that came, played or not.
        media_sizes: The sizes of the media messages' audio, in bytes.
        events: What came, in order: ("media", bytes), ("mark", name), ("clear", "").
        times: The event loop's time of each event.
        echoed_marks: The names of the marks echoed, played or cleared.
        pauses: The seconds of silence before a sound, and how many bytes had been heard before it.

    Args:
        speed: Seconds of audio played in a second.
        returns_marks: Whether marks are echoed.
        on_message: Is called with the sender (Twilio or server) and every message.
    """

    def __init__(
        self,
        ws: ClientConnection,
        *,
        speed: float = 1000.0,
        returns_marks: bool = True,
        on_message: Callable[[str, str | bytes], None] = lambda _sender, _message: None,
    ) -> None:
        super().__init__()
        self.ws = ws
        self.heard = bytearray()
        self.received = bytearray()
        self.media_sizes: list[int] = []
        self.events: list[tuple[str, str | bytes]] = []
        self.times: list[float] = []
        self.echoed_marks: list[str] = []
        self.pauses: list[tuple[float, int]] = []
        self._on_message = on_message
        self._speed = speed  # seconds of audio played in a second
        self._returns_marks = returns_marks
        self._buffer: asyncio.Queue[tuple[str, str | bytes]] = asyncio.Queue()
        self._cleared = asyncio.Event()
        self.has_ended = False
        self._violation: ProtocolViolation | None = None

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._listener = self._group.create_task(self._listen())
        self._player = self._group.create_task(self._play())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.cancel()
        self._player.cancel()
        await self._group.__aexit__(None, None, None)
        if self.ws.state is not State.CLOSED:
            await self.ws.close()
        if self._violation and exc[0] is None:
            raise self._violation

    # What the caller and Twilio do

    async def send(self, event: str, **fields: Any) -> None:
        """Send one of Twilio's messages."""
        await self.send_raw(self.message(event, **fields))

    async def send_raw(self, message: str | bytes) -> None:
        """Send `message` as it is."""
        await self.ws.send(message)
        self._on_message("Twilio", message)

    async def connected(self) -> None:
        """Send `connected`, which comes first."""
        await self.send_raw(self.connected_message())

    async def start(self, **parameters: str) -> None:
        """Send `start`, with these <Parameter>s."""
        await self.send_raw(self.start_message(**parameters))

    async def voice(self, messages: int = 1) -> None:
        """Send so many 20 ms messages of the caller's silence."""
        for chunk in range(messages):
            await self.send_raw(self.voice_message(chunk))

    async def press(self, digit: str) -> None:
        """Press a key."""
        await self.send_raw(self.digit_message(digit))

    async def hang_up(self, *, stop: bool = True) -> None:
        """End the call from this side, as a caller does."""
        if stop:
            await self.send_raw(self.stop_message())
        await self.ws.close()

    def drop(self) -> None:
        """Lose the network: no stop, no close frame (1006)."""
        self.ws.transport.abort()

    # What a test waits for

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true, or the call over (which is an error unless it is)."""
        await super().until(lambda: condition() or self.has_ended)
        if self._violation:
            raise self._violation
        if not condition():
            raise AssertionError(f"the call ended: {self.ws.close_code} {self.ws.close_reason}")

    async def until_sound(self) -> None:
        """Wait for the first media message."""
        await self.until(lambda: bool(self.media_sizes))

    async def until_mark(self, count: int = 1) -> None:
        """Wait until so many marks have come (with a speed, played or not)."""
        await self.until(lambda: len(self.named("mark")) >= count)

    async def until_returned(self, count: int = 1) -> None:
        """Wait until so many marks have been returned, so that all before them was played."""
        await self.until(lambda: len(self.echoed_marks) >= count)

    async def until_heard(self, audio: bytes) -> None:
        """Wait until the caller has heard this, last of all, and a mark has come after it."""
        await self.until(lambda: len(self.heard) >= len(audio) and self.events[-1][0] == "mark")
        assert self.heard.endswith(audio)

    async def hears(self, audio: bytes) -> None:
        """Wait until `audio` was heard, byte for byte, no less and no more."""
        await self.until_heard(audio)
        assert self.heard == self.received == audio

    async def until_closed(self) -> int:
        """Wait until the server has closed the call; return the close code."""
        await self._listener
        if self._violation:
            raise self._violation
        return self.ws.close_code or 1006

    def named(self, event: str) -> list[str | bytes]:
        """Return the payloads of the events of this name."""
        return [what for name, what in self.events if name == event]

    # What comes

    async def _listen(self) -> None:
        try:
            async for message in self.ws:
                self._on_message("server", message)
                event = self.check(message)
                self.events.append(event)
                self.times.append(asyncio.get_running_loop().time())
                match event:
                    case "media", bytes(audio):
                        self.received += audio
                        self.media_sizes.append(len(audio))
                        self._buffer.put_nowait(event)
                    case "mark", _:
                        self._buffer.put_nowait(event)
                    case _:
                        await self._clear()
                self.changed()
        except ConnectionClosed:
            pass
        except ProtocolViolation as violation:
            self._violation = violation
            self.ws.transport.abort()
        finally:
            self.has_ended = True
            self.changed()

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        ended_at = loop.time()
        while True:
            is_gap = self._buffer.empty()
            _, what = await self._buffer.get()
            if isinstance(what, bytes):
                self._cleared.clear()
                # Where this process was stopped for a while, it plays on as if it had not been.
                begun_at = loop.time() if is_gap else ended_at
                if is_gap:
                    self.pauses.append((begun_at - ended_at, len(self.heard)))
                ended_at = begun_at + len(what) / BYTES_PER_SECOND / self._speed
                try:
                    async with asyncio.timeout_at(ended_at):
                        await self._cleared.wait()
                        ended_at = loop.time()
                        elapsed = ended_at - begun_at
                        what = what[: int(elapsed * self._speed * BYTES_PER_SECOND)]
                except TimeoutError:
                    pass
                self.heard += what
            else:
                await self._return_mark(what)
            self.changed()

    async def _clear(self) -> None:
        self._cleared.set()
        while not self._buffer.empty():
            _, what = self._buffer.get_nowait()
            if isinstance(what, str):
                await self._return_mark(what)

    async def _return_mark(self, name: str) -> None:
        if self._returns_marks and self.ws.state is State.OPEN:
            with suppress(ConnectionClosed):
                await self.send_raw(self.mark_message(name))
                self.echoed_marks.append(name)


@asynccontextmanager
async def dial(
    url: str,
    *,
    start: bool = True,
    parameters: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
    speed: float = 1000.0,
    returns_marks: bool = True,
    on_message: Callable[[str, str | bytes], None] = lambda _sender, _message: None,
    **options: Any,
) -> AsyncIterator[Telephone]:
    """Place a call to `url`, as Twilio does: `connected`, then `start` with `parameters`."""
    ws = await connect(
        url,
        user_agent_header="Twilio.TmeWs/1.0",
        additional_headers=headers,
        compression=None,
        proxy=None,
        max_size=None,
        **options,
    )
    async with Telephone(
        ws, speed=speed, returns_marks=returns_marks, on_message=on_message
    ) as phone:
        await phone.connected()
        if start:
            await phone.start(**(parameters or {}))
        yield phone
