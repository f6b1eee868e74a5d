#!/usr/bin/env bash
# The Twilio simulator streamdouble throws away the marks that wait behind cleared audio. Twilio
# returns them.
#
# Seen with streamdouble 0.3.0 and websockets 17.4 on Python 3.11.7.
#
# Twilio's documentation of Media Streams, at the `clear` message, says that Twilio empties its buffer
# and sends back the marks that were still in it. So after an interruption, too, every mark returns.
# The simulator promises full protocol fidelity, and its README gives the contrary as Twilio's way:
# audio that will not be played has no mark to return. One would expect it to do what is documented.
#
# Why it matters here: a server that takes each returned mark as a sign that its audio was heard passes
# all tests with this simulator. On a real call it believes that the interrupted sentence was heard to
# its end; or, if all its marks have one name, that the next sentence was, which has only begun. And a
# server that waits for the marks to return before it speaks again works on the telephone, and waits
# forever here. Marks at a `clear` need a test of one's own.
#
# What was seen: the server sends four seconds of audio with a mark behind each second, and clears
# after one second and a half.
#
#   marks that the server had back before it cleared: ['1']
#   marks that the server had back within five seconds after that: []
#   marks that Twilio's documentation would have it get: ['2', '3', '4']
#   the simulator's verdict: violations [], closed by None
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check streamdouble==0.3.0 websockets==17.4
"$dir/venv/bin/python" - <<'PYTHON'
import asyncio
import json
import sys
from base64 import b64encode

from streamdouble.audio import silence_frame
from streamdouble.session import SessionConfig, run_call
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

A_SECOND = b64encode(bytes([0x85, 0x05]) * 4000).decode()
before: list[str] = []
after: list[str] = []


async def speak(connection) -> None:
    marks = before

    async def send(event: str, **body: object) -> None:
        await connection.send(json.dumps({"event": event, "streamSid": stream_sid, **body}))

    async def interrupt() -> None:
        nonlocal marks
        await asyncio.sleep(1.5)
        marks = after
        await send("clear")

    interruption = None
    try:
        async for message in connection:
            data = json.loads(message)
            if data["event"] == "start":
                stream_sid = data["start"]["streamSid"]
                for name in "1234":
                    await send("media", media={"payload": A_SECOND})
                    await send("mark", mark={"name": name})
                interruption = asyncio.create_task(interrupt())
            elif data["event"] == "mark":
                marks.append(data["mark"]["name"])
    except ConnectionClosed:
        pass
    finally:
        if interruption:
            interruption.cancel()


async def main() -> None:
    async with serve(speak, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        config = SessionConfig(quiet_period_s=1)
        result = await run_call(url, [silence_frame()] * 325, config=config)  # 6.5 seconds
    print("marks that the server had back before it cleared:", before)
    print("marks that the server had back within five seconds after that:", after)
    documented = [name for name in "1234" if name not in before]
    print("marks that Twilio's documentation would have it get:", documented)
    print(f"the simulator's verdict: violations {result.violations}, closed by {result.closed_by}")
    if (before, after, result.clears_received) != (["1"], [], 1):
        sys.exit("This has changed.")


asyncio.run(main())
PYTHON
