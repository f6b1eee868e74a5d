"""Callers as light as can be: what they measure is to be the server's time, not their own.

Ready-made bytes go out, and what comes is only searched for a word. The telephone of the tests,
which checks every message, takes more time for a call than the server does.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from contextlib import suppress
from urllib.parse import urlsplit

from tests.benchmark.processes import Process
from tests.standins.telephone import BYTES_PER_SECOND, HANDSHAKE, MULAW, frame

NEW_TEXT = "New text {}."
GREETING = ""  # the text of a call that is to hear the greeting, which has been said before
SID = "MZ" * 17
CONNECTED = frame({"event": "connected", "protocol": "Call", "version": "1.0.0"})
AUDIO = {"track": "inbound", "chunk": "1", "timestamp": "5", "payload": "//" * 107}
VOICE = frame({"event": "media", "sequenceNumber": "2", "media": AUDIO, "streamSid": SID})
KEY_PRESS = frame({"event": "dtmf", "streamSid": SID, "dtmf": {"digit": "1"}})
STOP = frame({"event": "stop", "sequenceNumber": "3", "streamSid": SID})
PING = b"\x89\x80\0\0\0\0"
PONG = b"\x8a\x00"
CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"  # 1000
numbers = itertools.count(1)


def start(text: str, **parameters: str) -> bytes:
    """Return Twilio's `start` for a call on which `text` is to be said."""
    parameters["text"] = text
    fields = {"streamSid": SID, "mediaFormat": MULAW, "customParameters": parameters}
    return frame({"event": "start", "sequenceNumber": "1", "start": fields})


class Caller:
    """A caller.

    Attributes:
        sound_at: When the first sound of the latest text came; infinite if the call was lost.
        gap_seconds: The longest silence within that text.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self.sound_at = math.inf
        self.gap_seconds = 0.0

    async def hear(self, request: bytes) -> None:
        """Send `request`; when all of a text has come, tell the server that it has been played."""
        self.writer.write(request)
        self.sound_at = math.inf
        self.gap_seconds = 0.0
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while b'"mark"' not in (message := await self._reader.readuntil(b'"}}')):
                now = time.perf_counter()
                if math.isinf(self.sound_at):
                    self.sound_at = plays_until = now
                self.gap_seconds = max(self.gap_seconds, now - plays_until)
                size = len(message.rpartition(b'"payload": "')[2]) * 3 / 4  # of its base64
                plays_until = max(plays_until, now) + size / BYTES_PER_SECOND
            name = message[:-3].rpartition(b'"')[2].decode()
            self.writer.write(frame({"event": "mark", "mark": {"name": name}}))

    async def wait_ms(self, request: bytes) -> float:
        """Return how long a text that `request` asks for takes to its first sound."""
        began = time.perf_counter()
        await self.hear(request)
        return (self.sound_at - began) * 1000

    async def talk(self) -> None:
        """Send the caller's voice, 50 messages a second, until the connection is closed."""
        while not self.writer.is_closing():
            self.writer.write(5 * VOICE)
            await asyncio.sleep(0.1)

    async def ping(self) -> None:
        """Return when the server has read all that was sent."""
        self.writer.write(PING)
        await self._reader.readuntil(PONG)

    async def hang_up(self) -> None:
        """End the call, and return when the server has closed the connection."""
        self.writer.write(STOP + CLOSE)
        with suppress(ConnectionError):
            await self._reader.read()
        self.writer.close()


async def call(url: str) -> Caller:
    """Open a call, up to where `start` is to be sent."""
    host, _, port = urlsplit(url).netloc.partition(":")
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(CONNECTED)
    return Caller(reader, writer)


async def greeted(url: str, number: int) -> list[Caller]:
    """Return so many callers who came at once and have heard the greeting."""

    async def one() -> Caller:
        caller = await call(url)
        await caller.hear(start(GREETING))
        return caller

    return await asyncio.gather(*(one() for _ in range(number)))


async def wait_ms(
    callers: int, new_texts: int, seconds: float, process: Process, rank: int = -1
) -> float:
    """Return the longest wait for the first sound, of callers who come within so many seconds.

    All calls are open before the first `start`, and each clock runs from when `start` is due.
    Without a new text all hear the greeting. Another `rank` is that in the order of the waits.
    """

    async def one(caller: Caller, number: int) -> float:
        due = began + number * seconds / callers
        if seconds:
            await asyncio.sleep(due - time.perf_counter())
        await caller.hear(start(texts[number % len(texts)]))
        return (caller.sound_at - due) * 1000

    texts = [NEW_TEXT.format(next(numbers)) for _ in range(new_texts)] or [GREETING]
    calls = await asyncio.gather(*(call(process.url) for _ in range(callers)))
    began = time.perf_counter()
    waits = await asyncio.gather(*(one(caller, number) for number, caller in enumerate(calls)))
    await asyncio.gather(*(caller.hang_up() for caller in calls))
    return sorted(waits)[rank]
