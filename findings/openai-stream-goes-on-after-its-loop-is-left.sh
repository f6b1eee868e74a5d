#!/usr/bin/env bash
# When the loop over an answer of OpenAI's asynchronous client is left before its end, the request
# goes on: the model writes its whole answer to a client that no longer reads it.
#
# Seen with openai 3.57.0 and anthropic 2.14.0 on Python 3.11.7; the first also on 3.12.1 and 3.13.0,
# and with openai 2.54.0.
#
# The client's source closes the response in a `finally`, so one would expect that to leave the loop,
# by `break` or because the generator around it is closed, ends the request. But leaving an `async
# for` closes nothing; the generators that the client has nested in each other are left to the garbage
# collector, and to asyncio, which often logs "aclose(): asynchronous generator is already running".
# The same loop around Anthropic's client ends its request at once, and so does OpenAI's when it is
# used by `async with`. So does a cancellation in the middle of a read: it is the orderly exit between
# two pieces of text that does not.
#
# Why it matters here: a caller who interrupts an answer, or hangs up, makes a voice program close the
# generator that feeds it. One that was written as in OpenAI's examples then keeps a connection, and
# pays for what nobody hears, each time. `async with await client.chat.completions.create(...) as
# stream:` around the loop, or `aclosing`, is all that it takes.
#
# What was seen, with a server on this machine that writes 40 words in two seconds, after 3 of which
# the generator around the loop is closed:
#
#   openai, async for:                        the server wrote 40 of 40 words
#   openai, async with and async for:         the server wrote 4 of 40 words
#   anthropic, async for:                     the server wrote 4 of 40 words
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check openai==3.57.0 anthropic==2.14.0
"$dir/venv/bin/python" - <<'PYTHON'
import asyncio
import json
import logging
import sys
from contextlib import aclosing

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

WORDS = 40
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
MESSAGES = [{"role": "user", "content": "When are you open?"}]
written = 0


def openai_event(word: str) -> bytes:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "a model"}
    return f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n".encode()


def anthropic_event(word: str) -> bytes:
    delta = {"type": "text_delta", "text": word}
    event = {"type": "content_block_delta", "index": 0, "delta": delta}
    return f"event: content_block_delta\ndata: {json.dumps(event)}\n\n".encode()


async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write words until all are written or the client is gone."""
    global written
    head = await reader.readuntil(b"\r\n\r\n")
    event = openai_event if b"/chat/completions" in head else anthropic_event
    writer.write(HEAD)
    try:
        for _ in range(WORDS):
            writer.write(event("word "))
            await writer.drain()
            written += 1
            await asyncio.sleep(0.05)
    except ConnectionError:
        pass
    writer.close()


async def main() -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    server = await asyncio.start_server(model, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="a key", max_retries=0)
    anthropic = AsyncAnthropic(base_url=url, api_key="a key", max_retries=0)

    async def openai_for():
        async for chunk in await openai.chat.completions.create(
            model="a model", messages=MESSAGES, stream=True
        ):
            yield chunk.choices[0].delta.content

    async def openai_with():
        async with await openai.chat.completions.create(
            model="a model", messages=MESSAGES, stream=True
        ) as stream:
            async for chunk in stream:
                yield chunk.choices[0].delta.content

    async def anthropic_for():
        async for event in await anthropic.messages.create(
            model="a model", max_tokens=100, messages=MESSAGES, stream=True
        ):
            yield event.delta.text

    global written
    seen = []
    for name, answer in {
        "openai, async for": openai_for,
        "openai, async with and async for": openai_with,
        "anthropic, async for": anthropic_for,
    }.items():
        written = heard = 0
        async with aclosing(answer()) as words:
            async for _ in words:
                heard += 1
                if heard == 3:
                    break
        await asyncio.sleep(4)
        seen.append(written)
        print(f"{name + ':':41} the server wrote {written} of {WORDS} words")
    if not (seen[0] == WORDS and seen[1] < 10 and seen[2] < 10):
        sys.exit("This has changed.")


asyncio.run(main())
PYTHON
