"""What the stand-ins read of HTTP/1.1: one request, with the whole of its body."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class HttpRequest(NamedTuple):
    """A request as it came; the names of its headers in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


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
