"""A stand-in for Deepgram's `POST /v1/speak`, with every fault as a switch.

It answers on a real socket, byte by byte as told, so it speaks HTTP/1.1 itself: no library lets a
server break HTTP in all the ways that a network does. `python -m tests.standins.deepgram` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import parse_qs, urlsplit

from tests.standins import Observable
from tests.standins.http import read_request

KEY = "a-key-that-costs-money"
GREETING = "Hello, how are you today?"  # the default


def noise(text: str, model: str = "aura-asteria-en") -> bytes:
    """Return about half a second of bytes that are this text's and model's, and no other's."""
    seeded = random.Random(f"{model} {text}")
    return seeded.randbytes(seeded.randrange(3000, 5000))


def said(*texts: str) -> bytes:
    """Return the noise of these texts, one after the other."""
    return b"".join(map(noise, texts))


@dataclass
class Answer:
    """What is done with one request.

    Attributes:
        audio: The body of a 200; None is `Deepgram.voice` of the text.
        status: The HTTP status.
        body: Instead of audio, with whatever status.
        headers: In addition, or instead of the default ones.
        framing: How the end of the body is told: chunked, length or close.
        write_sizes: Sizes in bytes in which the body is written; the last one goes on.
        delay_seconds: Until the response's head and first byte.
        gate: Waited for after the first write.
        pause_seconds: After every write.
        stop_after: Bytes of the body (0: with the head, -1: before it), then `failure` happens.
        failure: cut (close the connection), reset (with RST) or stall (write nothing more).
    """

    audio: bytes | None = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    framing: str = "chunked"
    write_sizes: Sequence[int] = (1000,)
    delay_seconds: float = 0.0
    gate: asyncio.Event | None = None
    pause_seconds: float = 0.0
    stop_after: int | None = None
    failure: str = "cut"


@dataclass
class Request:
    """One request as it came: its text and model, the rest of its query, headers in lower case."""

    text: str
    model: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    at: float


class Deepgram(Observable):
    """The stand-in: `async with Deepgram() as deepgram`, then `deepgram.url`.

    Args:
        voice: Returns the mulaw audio for a text and a model.
        default: The answer to texts that `answers` has none for.
    """

    def __init__(
        self,
        voice: Callable[[str, str], bytes] = noise,
        default: Answer | None = None,
        port: int = 0,
    ) -> None:
        super().__init__()
        self.voice = voice
        self.default = default or Answer()
        self.answers: dict[str, list[Answer]] = {}  # by text; the last one stays
        self.requests: list[Request] = []
        self.connections = 0
        self.under_way = self.most_under_way = 0
        self.port = port
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """The value for DEEPGRAM_URL."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    def answer(self, text: str, *answers: Answer) -> str:
        """Give these answers to the requests for `text`, in turn; return `text`."""
        self.answers[text] = list(answers)
        return text

    def asked(self, text: str) -> list[Request]:
        """Return the requests there were for `text`."""
        return [request for request in self.requests if request.text == text]

    async def until_asked(self, text: str) -> None:
        """Wait for the first request for `text`."""
        await self.until(lambda: bool(self.asked(text)))

    def drop_connections(self) -> None:
        """Close every connection there is, as an idle time-out does."""
        for writer in list(self._writers):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.add(writer)
        try:
            while await self._serve_request(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> bool:
        """Return whether the connection is good for another request."""
        method, target, headers, body = await read_request(reader)
        text = str(json.loads(body)["text"])
        query = parse_qs(urlsplit(target).query)
        request = Request(
            text,
            query["model"][0],
            target,
            headers,
            body,
            number,
            asyncio.get_running_loop().time(),
        )
        planned = self.answers.get(text) or [self.default]
        answer = planned.pop(0) if len(planned) > 1 else planned[0]
        if headers.get("authorization") != f"Token {KEY}":
            answer = Answer(status=401, body=INVALID_AUTH)
        elif method != "POST" or urlsplit(target).path != path_of(request.model):
            answer = Answer(status=404, body=b"Not Found")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.requests.append(request)
        self.changed()
        try:
            return await self._answer(request, answer, reader, writer)
        finally:
            self.under_way -= 1
            self.changed()

    async def _answer(
        self,
        request: Request,
        answer: Answer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        body = answer.body
        if body is None:
            body = answer.audio
        if body is None:
            body = self.voice(request.text, request.model)
        is_audio = answer.body is None
        headers = {
            "Content-Type": "audio/mulaw;rate=8000" if is_audio else "application/json",
            "dg-request-id": f"request-{len(self.requests)}",
            **answer.headers,
        }
        if answer.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif answer.framing == "length":
            headers["Content-Length"] = str(len(body))
        else:
            headers["Connection"] = "close"
        await asyncio.sleep(answer.delay_seconds)
        if answer.stop_after == -1:
            return await self._break_off(answer, reader, writer)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} Whatever\r\n{lines}\r\n".encode("latin-1"))
        if answer.stop_after == 0:
            return await self._break_off(answer, reader, writer)
        sizes = list(answer.write_sizes)
        position = 0
        end = len(body) if answer.stop_after is None else answer.stop_after
        while position < end:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            piece = body[position : min(end, position + size)]
            chunked = answer.framing == "chunked"
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            position += len(piece)
            if answer.gate:
                await answer.gate.wait()
            await asyncio.sleep(answer.pause_seconds)
        if answer.stop_after is not None:
            return await self._break_off(answer, reader, writer)
        if answer.framing == "chunked":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return answer.framing != "close"

    async def _break_off(
        self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        await writer.drain()
        if answer.failure == "stall":
            await reader.read()  # until the other side gives up
        if answer.failure == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        return False


def path_of(model: str) -> str:
    """Return where Deepgram knows `model`."""
    return "/v2/speak" if model.startswith("flux-") else "/v1/speak"


INVALID_AUTH = json.dumps(
    {
        "err_code": "INVALID_AUTH",
        "err_msg": "Invalid credentials.",
        "request_id": "f1a2b3c4",
    }
).encode()


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-seconds", type=float, default=0.2)
    parser.add_argument("--clip-bytes", type=int, help="of every text's speech, then all the same")
    parser.add_argument("--write-bytes", type=int, default=4000)
    parser.add_argument("--pause-seconds", type=float, default=0.05, help="after every write")
    arguments = parser.parse_args()
    default = Answer(
        delay_seconds=arguments.delay_seconds,
        write_sizes=[arguments.write_bytes],  # by default ten times as fast as it is spoken
        pause_seconds=arguments.pause_seconds,
    )
    if arguments.clip_bytes:
        default.audio = random.Random(0).randbytes(arguments.clip_bytes)
    async with Deepgram(default=default, port=arguments.port) as deepgram:
        print(deepgram.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
