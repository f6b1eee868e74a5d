"""What the benchmark compares with: the least that could be done with the same libraries.

`python -m tests.benchmark.baseline websockets` answers and discards;
`python -m tests.benchmark.baseline requests URL` posts, in a thread a text.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import threading
import time
from collections.abc import Sequence

import requests
from websockets.asyncio.server import ServerConnection, serve

from tests.standins.deepgram import GREETING, KEY, noise

PAYLOAD = base64.b64encode(noise(GREETING)).decode()
MEDIA = json.dumps({"event": "media", "streamSid": "MZ0", "media": {"payload": PAYLOAD}})
MARK = json.dumps({"event": "mark", "streamSid": "MZ0", "mark": {"name": "1"}})
SPEAK = "/v1/speak?model=aura-asteria-en&encoding=mulaw&sample_rate=8000&container=none"
HEADERS = {"Authorization": f"Token {KEY}", "Accept-Encoding": "identity"}


async def answer_and_discard(ws: ServerConnection) -> None:
    """Answer `start` with a frame and a mark that are ready, then discard what comes."""
    await ws.recv()  # connected
    await ws.recv()  # start
    await ws.send(MEDIA)
    await ws.send(MARK)
    async for _ in ws:
        pass


async def websockets() -> None:
    """Serve until killed."""
    async with serve(answer_and_discard, "127.0.0.1", 0, compression=None) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


def post(session: requests.Session, url: str, text: str) -> float:
    """Fetch the speech of `text`; return the moment of its first byte."""
    with session.post(url + SPEAK, json={"text": text}, headers=HEADERS, stream=True) as response:
        chunks = response.iter_content(None)
        next(chunks)
        first_byte_at = time.perf_counter()
        for _ in chunks:
            pass
    return first_byte_at


def first_bytes(
    url: str, sessions: Sequence[requests.Session], texts: Sequence[str], apart_seconds: float
) -> list[float]:
    """Fetch each of `texts` in a thread of its own; return the seconds to each first byte."""
    seconds = [0.0] * len(texts)

    def fetch(number: int, asked_at: float) -> None:
        seconds[number] = post(sessions[number], url, texts[number]) - asked_at

    began, threads = time.perf_counter(), []
    for number in range(len(texts)):
        at = began + number * apart_seconds
        time.sleep(max(0.0, at - time.perf_counter()))
        threads.append(threading.Thread(target=fetch, args=(number, at)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return seconds


def posts(url: str) -> None:
    """For every line of input, [texts, seconds apart], print the seconds to each first byte."""
    print(url, flush=True)
    sessions: list[requests.Session] = []
    for line in sys.stdin:
        texts, apart_seconds = json.loads(line)
        sessions += [requests.Session() for _ in range(len(texts) - len(sessions))]
        print(json.dumps(first_bytes(url, sessions, texts, apart_seconds)), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["websockets"]:
            asyncio.run(websockets())
        case ["requests", url]:
            posts(url)
