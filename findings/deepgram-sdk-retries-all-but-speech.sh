#!/usr/bin/env bash
# Deepgram's SDK tries a rejected request again by itself, three times in all, but not a request for
# speech: that is made once, whatever `max_retries` says.
#
# Seen with deepgram-sdk 7.17.0 on Python 3.11.7.
#
# Its README promises retries for the statuses 408, 429 and 5xx, and shows how to set their number;
# its client's default is two. Both hold for requests whose response is read whole. `speak` streams
# its response, and streamed requests do not go through the code that retries; the option for their
# number is accepted, and ignored. One would expect an option of a call either to work or to be
# rejected. Moreover `generate` returns at once, without having sent anything: the request is made,
# and its failure raised, when the first chunk is asked for, away from any `try` around the call.
#
# Why it matters here: 429 is what Deepgram answers when too many texts are synthesized at once, so
# it comes just when many callers are on the line, and goes away by itself. A program that relies on
# the SDK for this leaves them in silence, and tests with any other endpoint would not have shown it.
# It has to queue or to retry on its own.
#
# What was seen, with a server on this machine that answers 429 with "Retry-After: 1":
#
#   list the models:                    ApiError after 3 requests
#   speak, calling generate only:       returned after 0 requests
#   speak:                              ApiError after 1 request
#   speak, max_retries=5:               ApiError after 1 request
#   speak, asynchronous, max_retries=5: ApiError after 1 request
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check deepgram-sdk==7.17.0
"$dir/venv/bin/python" - <<'PYTHON'
import asyncio
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from deepgram import AsyncDeepgramClient, DeepgramClient
from deepgram.environment import DeepgramClientEnvironment

BODY = b'{"err_code": "TOO_MANY_REQUESTS", "err_msg": "Too many requests."}'
requests = []


class Busy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        requests.append(self.path)
        self.send_response(429)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
environment = DeepgramClientEnvironment(base=url, production=url, agent=url, agent_rest=url)
client = DeepgramClient(api_key="a key", environment=environment)
async_client = AsyncDeepgramClient(api_key="a key", environment=environment)
SPEECH = {"text": "Hello.", "encoding": "mulaw", "sample_rate": 8000, "container": "none"}
FIVE = {"max_retries": 5}


async def speak_async() -> None:
    speech = async_client.speak.v1.audio.generate(**SPEECH, request_options=FIVE)
    async for _ in speech:
        pass


seen = []
for name, action in {
    "list the models": lambda: client.manage.v1.models.list(),
    "speak, calling generate only": lambda: client.speak.v1.audio.generate(**SPEECH),
    "speak": lambda: list(client.speak.v1.audio.generate(**SPEECH)),
    "speak, max_retries=5": lambda: list(
        client.speak.v1.audio.generate(**SPEECH, request_options=FIVE)
    ),
    "speak, asynchronous, max_retries=5": lambda: asyncio.run(speak_async()),
}.items():
    requests.clear()
    try:
        action()
        outcome = "returned"
    except Exception as error:
        outcome = type(error).__name__
    seen.append((outcome, len(requests)))
    print(f"{name + ':':35} {outcome} after {len(requests)} request{'s' * (len(requests) != 1)}")
if seen != [("ApiError", 3), ("returned", 0), ("ApiError", 1), ("ApiError", 1), ("ApiError", 1)]:
    sys.exit("This has changed.")
PYTHON
