"""What the stand-ins need of HTTP/1.1: a request is read whole, a response written as told.

No library lets a server break HTTP in all the ways that a network does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.standins.tcp import reset

ENDLESS_BYTES = 2**40  # nobody waits for so many


class HttpRequest(NamedTuple):
    """A request as it came; the names of its headers in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(kw_only=True)
class Response:
    """What is done with one request.

    Attributes:
        status: The HTTP status.
        body: None is what the stand-in has to say.
        headers: In addition, or instead of the default ones.
        framing: How the end of the body is told: chunked, length or close (as HTTP/1.0).
        write_sizes: Sizes in bytes in which the body is written; the last one goes on.
        interim_status: Of a response that comes first, at once, such as 103; 0 is none.
        delay_seconds: Until the response's head and first byte.
        gate: Waited for after the first write.
        pause_seconds: After every write.
        is_endless: Whether the body begins anew each time it ends.
        stop_after: Bytes of the body (0: with the head, -1: before it), then `failure` happens.
        failure: cut (close the connection), reset (with RST) or stall (write nothing more).
        sent_bytes: How much of its body has been written so far, over all requests.
    """

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    framing: str = "chunked"
    write_sizes: Sequence[int] = (1000,)
    interim_status: int = 0
    delay_seconds: float = 0.0
    gate: asyncio.Event | None = None
    pause_seconds: float = 0.0
    is_endless: bool = False
    stop_after: int | None = None
    failure: str = "cut"
    sent_bytes: int = field(default=0, init=False, repr=False)


async def read_request(reader: asyncio.StreamReader) -> HttpRequest:
    """Return the next request; raise IncompleteReadError when the other side has closed."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return HttpRequest(method, target, headers, body)


async def respond(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    response: Response,
    headers: Mapping[str, str],
    body: bytes,
) -> bool:
    """Answer as `response` says; return whether the connection is good for another request.

    Args:
        reader: Where the request came from.
        writer: Where the response goes.
        response: How it is answered.
        headers: The default ones.
        body: Unless `response` has one.
    """
    if response.body is not None:
        body = response.body
    length = len(body)
    if response.is_endless:
        length = ENDLESS_BYTES
    version = "1.1"
    headers = {**headers, **response.headers}
    match response.framing:
        case "chunked":
            headers["Transfer-Encoding"] = "chunked"
        case "length":
            headers["Content-Length"] = str(length)
        case _:
            version = "1.0"
            headers["Connection"] = "close"
    if response.interim_status:
        writer.write(b"HTTP/1.1 %d Whatever\r\n\r\n" % response.interim_status)
    await asyncio.sleep(response.delay_seconds)
    if response.stop_after == -1:
        return await _break_off(response, reader, writer)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/{version} {response.status} Whatever\r\n{lines}\r\n"
    writer.write(head.encode("latin-1"))
    if response.stop_after == 0:
        return await _break_off(response, reader, writer)
    sizes = list(response.write_sizes)
    position = 0
    end = length if response.stop_after is None else response.stop_after
    while position < end:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        start = position % len(body)
        piece = body[start : start + min(size, end - position)]
        chunked = response.framing == "chunked"
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await writer.drain()
        position += len(piece)
        response.sent_bytes += len(piece)
        if response.gate:
            await response.gate.wait()
        await asyncio.sleep(response.pause_seconds)
    if response.stop_after is not None:
        return await _break_off(response, reader, writer)
    if response.framing == "chunked":
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return response.framing != "close"


async def _break_off(
    response: Response, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    await writer.drain()
    if response.failure == "stall":
        await reader.read()  # until the other side gives up
    if response.failure == "reset":
        reset(writer.transport)
    return False
