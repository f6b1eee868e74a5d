"""Callers as light as can be: what they measure is to be the server's time, not their own.

Ready-made bytes go out on a bare asyncio transport, and of what comes only the moment is taken. The
telephone of the tests, which checks every message, takes more time for a call than the server does.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from tests.standins.telephone import MULAW

T = TypeVar("T")
WAIT_SECONDS = 60  # for what should come at once, before giving up
NO_TEXT = ""  # of a call that names none, and so hears the greeting


def frame(message: object) -> bytes:
    """Return `message` as a websocket frame from a client, masked with zeros, which is free."""
    data = json.dumps(message).encode()
    short = len(data) < 126
    length = bytes([0x80 | len(data)]) if short else struct.pack(">BH", 0x80 | 126, len(data))
    return b"\x81" + length + b"\0\0\0\0" + data


def start(text: str) -> bytes:
    """Return Twilio's `start` for a call on which `text` is to be said."""
    fields = {
        "streamSid": f"MZ{random.getrandbits(128):032x}",
        "callSid": f"CA{random.getrandbits(128):032x}",
        "mediaFormat": MULAW,
        "customParameters": {"text": text} if text else {},
    }
    return frame({"event": "start", "sequenceNumber": "1", "start": fields})


HANDSHAKE = (
    b"GET /twilio HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
CONNECTED = frame({"event": "connected", "protocol": "Call", "version": "1.0.0"})
STOP = frame({"event": "stop", "sequenceNumber": "3", "streamSid": "MZ"})
VOICE = frame(
    {
        "event": "media",
        "sequenceNumber": "2",
        "media": {"track": "inbound", "chunk": "1", "timestamp": "5", "payload": "//" * 107},
        "streamSid": "MZ" + "0" * 32,
    }
)
PING, PONG = b"\x89\x80\0\0\0\0", b"\x8a\x00"
CLOSE = b"\x88\x82\0\0\0\0" + struct.pack(">H", 1000)


class BenchmarkCall(asyncio.Protocol):
    """A call from Twilio, as light as can be: ready-made bytes out, and the time of what comes."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._expected = b""
        self._came: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._expected in data and not self._came.done():
            self._came.set_result(time.perf_counter())
        if data[0] == 0x89:  # a ping, which keeps the connection alive if answered
            self.transport.write(bytes([0x8A, 0x80 | data[1]]) + b"\0\0\0\0" + data[2:][: data[1]])
        if returned := re.search(rb'"mark": \{"name": "([^"]+)"', data):
            name = returned[1].decode()
            self.transport.write(frame({"event": "mark", "mark": {"name": name}}))

    def connection_lost(self, _: Exception | None) -> None:
        if not self._came.done():
            self._came.cancel()
        self.closed.set_result(None)

    def send(self, data: bytes, until: bytes) -> asyncio.Future[float]:
        """Send `data`; the future is the moment at which `until` comes back."""
        if self.closed.done():
            raise ConnectionError("the server has closed this call")
        self._expected, self._came = until, asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self._came

    async def hang_up(self, *, stop: bool = True) -> None:
        """End the call and wait for the end of the connection."""
        self.transport.write(STOP + CLOSE if stop else CLOSE)
        await self.closed


async def connect(url: str) -> BenchmarkCall:
    """Open a connection on which nothing has been said."""
    host, _, port = urlsplit(url).netloc.partition(":")
    _, caller = await asyncio.get_running_loop().create_connection(BenchmarkCall, host, int(port))
    return caller


async def call(url: str) -> BenchmarkCall:
    """Open a call, up to where `start` is to be sent."""
    caller = await connect(url)
    await caller.send(HANDSHAKE, until=b" 101 ")
    caller.transport.write(CONNECTED)
    return caller


async def all_of(coming: Iterable[Awaitable[T]]) -> list[T]:
    """Return what all of `coming` comes to; raise TimeoutError if one does not come."""
    async with asyncio.timeout(WAIT_SECONDS):
        return await asyncio.gather(*coming)


async def first_frames(url: str, texts: Sequence[str], apart_seconds: float = 0.0) -> list[float]:
    """Call once for each text; return the milliseconds from each `start` to its first frame.

    All calls are open before the first `start`. With no time apart, the clock of every one runs
    from the moment before the first of them.
    """
    callers = await all_of(call(url) for _ in texts)
    starts = [start(text) for text in texts]
    coming, began = [], time.perf_counter()
    due = [began + number * apart_seconds for number in range(len(texts))]
    for caller, data, at in zip(callers, starts, due, strict=True):
        if apart_seconds:
            await asyncio.sleep(at - time.perf_counter())
        coming.append(caller.send(data, until=b'"media"'))
    came = await all_of(coming)
    await all_of(caller.hang_up() for caller in callers)
    return [(moment - at) * 1000 for moment, at in zip(came, due, strict=True)]


async def heard(url: str, calls: int) -> list[BenchmarkCall]:
    """Open so many calls; return them when all have heard the greeting."""
    callers = await all_of(call(url) for _ in range(calls))
    await all_of(caller.send(start(NO_TEXT), until=b'"mark"') for caller in callers)
    await all_of(caller.send(PING, until=PONG) for caller in callers)
    return callers


async def spread(
    url: str, calls: int, seconds: float, *, talking: bool
) -> list[asyncio.Task[None]]:
    """Open so many calls evenly within so many seconds; return when all have heard the greeting.

    If they are `talking`, they send their voice from `start` on, until these tasks are cancelled.
    """
    greeted = asyncio.Semaphore(0)

    async def talk(starts_at: float) -> None:
        await asyncio.sleep(starts_at - time.perf_counter())
        caller = await call(url)
        hearing = caller.send(start(NO_TEXT), until=b'"mark"')
        hearing.add_done_callback(lambda it: None if it.cancelled() else greeted.release())
        while not caller.closed.done():
            if talking:
                caller.transport.write(5 * VOICE)
            starts_at += 0.1
            await asyncio.sleep(max(0, starts_at - time.perf_counter()))

    began = time.perf_counter()
    tasks = [asyncio.create_task(talk(began + number * seconds / calls)) for number in range(calls)]
    await all_of(greeted.acquire() for _ in range(calls))
    return tasks


@asynccontextmanager
async def slow_link(url: str, kilobits_per_second: int) -> AsyncIterator[str]:
    """Run a proxy to `url` that is so slow towards each caller; yield its URL.

    What the server sends too fast queues without limit, as in networks whose buffers are too large.
    """
    loop, (host, _, port) = asyncio.get_running_loop(), urlsplit(url).netloc.partition(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def from_server() -> None:
            free_at = loop.time()
            while data := await loop.sock_recv(server, 1000):
                free_at = max(free_at, loop.time()) + len(data) * 8 / 1000 / kilobits_per_second
                await asyncio.sleep(free_at - loop.time())
                writer.write(data)

        async def to_server() -> None:
            while data := await reader.read(1000):
                await loop.sock_sendall(server, data)

        with socket.socket() as server:
            server.setblocking(False)
            await loop.sock_connect(server, (host, int(port)))
            ways = [asyncio.create_task(from_server()), asyncio.create_task(to_server())]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        writer.close()

    async with await asyncio.start_server(carry, "127.0.0.1", 0) as proxy:
        yield f"ws://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
