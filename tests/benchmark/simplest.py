"""What the benchmark compares with: the simplest way to do it, as the first demos did.

The whole clip is awaited, with `requests` in the event loop, and sent in one message. Meanwhile
nobody else is served. `python -m tests.benchmark.simplest URL` asks the Deepgram at URL.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys

import requests
from websockets.asyncio.server import ServerConnection, serve

from tests.benchmark.baseline import HEADERS, SPEAK
from tests.standins.deepgram import GREETING


async def serve_call(ws: ServerConnection) -> None:
    """Say what `start` asks for; stop at a key."""
    async for message in ws:
        fields = json.loads(message)
        if fields["event"] == "start":
            stream_sid = fields["start"]["streamSid"]
            text = fields["start"]["customParameters"].get("text", GREETING)
            clip = requests.post(  # noqa: ASYNC210 (that is the point)
                sys.argv[1] + SPEAK, headers=HEADERS, json={"text": text}, timeout=10
            ).content
            media = {"payload": base64.b64encode(clip).decode()}
            await ws.send(json.dumps({"event": "media", "streamSid": stream_sid, "media": media}))
            mark = {"name": "1"}
            await ws.send(json.dumps({"event": "mark", "streamSid": stream_sid, "mark": mark}))
        elif fields["event"] == "dtmf":
            await ws.send(json.dumps({"event": "clear", "streamSid": stream_sid}))


async def main() -> None:
    """Serve until killed."""
    async with serve(serve_call, "127.0.0.1", 0, compression=None) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
