"""What the benchmark compares with, for developers: aiohttp as server and client.

`DEEPGRAM_URL=… python -m tests.benchmark.with_aiohttp` runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl

from aiohttp import ClientSession, TCPConnector, web

from tests.benchmark.simplest import HEADERS, SPEAK, mark, media


async def main() -> None:
    """Serve until killed."""

    async def serve_call(request: web.Request) -> web.WebSocketResponse:
        """Say what `start` asks for, as it comes."""
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        async for message in ws:
            fields = json.loads(message.data)
            if fields["event"] == "start":
                sid = fields["start"]["streamSid"]
                text = {"text": fields["start"]["customParameters"]["text"]}
                async with session.post(url, json=text, headers=HEADERS) as response:
                    async for audio in response.content.iter_any():
                        await ws.send_str(media(sid, audio))
                await ws.send_str(mark(sid))
        return ws

    url = os.environ["DEEPGRAM_URL"] + SPEAK
    context = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))
    async with ClientSession(connector=TCPConnector(limit=0, ssl=context)) as session:
        app = web.Application()
        app.router.add_get("/twilio", serve_call)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(f"ws://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
