"""A stand-in for the ngrok agent's API on this machine, which lists its tunnels as told."""

from __future__ import annotations

import asyncio
import json

from tests.standins.http import Response, read_request, respond
from tests.standins.tcp import Listener


class Ngrok(Listener):
    """`async with Ngrok() as ngrok`, then `Server(…, NGROK_API=ngrok.url)`.

    Attributes:
        response: What it answers to any request.
    """

    response = Response()

    @property
    def url(self) -> str:
        """The value for NGROK_API."""
        return f"http://127.0.0.1:{self.port}/api/tunnels"

    def lists(self, *tunnels: object) -> None:
        """List these tunnels from now on."""
        body = json.dumps({"tunnels": tunnels}).encode()
        self.response = Response(body=body, framing="close")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        await read_request(reader)
        await respond(reader, writer, self.response, {"Content-Type": "application/json"}, b"")


def tunnel(url: str, port: int) -> dict[str, object]:
    """Return a tunnel that publishes this port at this URL."""
    return {"public_url": url, "config": {"addr": f"http://localhost:{port}"}}
