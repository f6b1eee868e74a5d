"""What the benchmark compares with: the simplest way to do it, as the first demos did.

The whole clip is awaited, with `requests` in the event loop, and sent in one message. Meanwhile
nobody else is served. `DEEPGRAM_URL=… python -m tests.benchmark.simplest simplest` runs it;
`baseline`, for developers, is the least that can be done with `websockets`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys

import requests
from websockets.asyncio.server import ServerConnection, serve

from tests.standins.deepgram import GREETING, KEY

SPEAK = "/v1/speak?model=aura-asteria-en&encoding=mulaw&sample_rate=8000&container=none"
HEADERS = {"Authorization": f"Token {KEY}", "Accept-Encoding": "identity"}


async def simplest(ws: ServerConnection) -> None:
    """Say what `start` asks for."""
    async for message in ws:
        fields = json.loads(message)
        if fields["event"] == "start":
            text = fields["start"]["customParameters"]["text"] or GREETING
            clip = requests.post(  # noqa: ASYNC210 (that is the point)
                os.environ["DEEPGRAM_URL"] + SPEAK, headers=HEADERS, json={"text": text}, timeout=10
            ).content
            await ws.send(media(fields["start"]["streamSid"], clip))
            await ws.send(mark(fields["start"]["streamSid"]))


async def baseline(ws: ServerConnection) -> None:
    """Answer a call with what is ready, then discard what comes."""
    await ws.recv()  # connected
    await ws.recv()  # start
    await ws.send(media("MZ", bytes(3200)))
    await ws.send(mark("MZ"))
    async for _ in ws:
        pass


def media(sid: str, audio: bytes) -> str:
    """Return the message that has `audio` played."""
    payload = base64.b64encode(audio).decode()
    return json.dumps({"event": "media", "streamSid": sid, "media": {"payload": payload}})


def mark(sid: str) -> str:
    """Return the message that asks for an answer when all has been played."""
    return json.dumps({"event": "mark", "streamSid": sid, "mark": {"name": "1"}})


async def main() -> None:
    """Serve until killed."""
    handler = {"simplest": simplest, "baseline": baseline}[sys.argv[1]]
    async with serve(handler, "127.0.0.1", 0, compression=None, backlog=1024) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
