"""A stand-in for OpenAI's server: it writes an answer when, and as far as, a test has it do so.

It knows both forms in which an answer is streamed: chat completions, which the servers of most
models have, and responses, which openai-agents asks for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from tests.standins.http import HttpRequest, Response, read_request, respond
from tests.standins.tcp import Listener

KEY = "a-key-of-a-model"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Model(Listener):
    """The stand-in: `async with Model() as model`, then `model.url`.

    Attributes:
        requests: The requests that came.
        abandoned: How many connections a client has closed before the end of the answer.
        status: Of the answers; those other than 200 are errors.
    """

    def __init__(self, status: int = 200) -> None:
        super().__init__()
        self.requests: list[HttpRequest] = []
        self.abandoned = 0
        self.status = status
        self._parts = asyncio.Queue[str]()

    @property
    def url(self) -> str:
        """The value for OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def write(self, *parts: str) -> None:
        """Go on with the answer; "" is its end."""
        for part in parts:
            self._parts.put_nowait(part)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, unless its client leaves."""
        request = await read_request(reader)
        self.requests.append(request)
        self.changed()
        status = self.status
        if request.headers.get("authorization") != f"Bearer {KEY}":
            status = 401
        if status != 200:
            await respond(reader, writer, error(status), {}, b"")
            return
        answering = asyncio.create_task(self._answer(request, writer))
        leaving = asyncio.create_task(reader.read())
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.abandoned += 1
                self.changed()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, request: HttpRequest, writer: asyncio.StreamWriter) -> None:
        """Write server-sent events."""
        form = chat_completion if request.target == "/v1/chat/completions" else response
        writer.write(HEAD)
        async for event in form(self._written()):
            writer.write(f"data: {json.dumps(event)}\n\n".encode())
            await writer.drain()
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()

    async def _written(self) -> AsyncGenerator[str]:
        while part := await self._parts.get():
            yield part


async def chat_completion(parts: AsyncGenerator[str]) -> AsyncGenerator[dict[str, Any]]:
    """Yield the chunks of a chat completion; some models' first one, and the last, have no text."""
    fields = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    yield {**fields, "choices": []}
    yield {**fields, "choices": [choice({"role": "assistant", "content": None})]}
    async for part in parts:
        yield {**fields, "choices": [choice({"content": part})]}
    yield {**fields, "choices": [choice({}, "stop")]}
    yield {**fields, "choices": [], "usage": usage}


def choice(delta: dict[str, str | None], finish_reason: str | None = None) -> dict[str, Any]:
    """Return what has the text of a chunk."""
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


async def response(parts: AsyncGenerator[str]) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a response that a client needs: its text, as written and as a whole."""
    text = ""
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    async for part in parts:
        text += part
        yield {"type": "response.output_text.delta", "sequence_number": 1, "delta": part, **place}
    said = {"type": "output_text", "text": text, "annotations": []}
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    whole = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": "completed",
        "output": [{**message, "content": [said]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 1,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 1,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 2,
        },
    }
    yield {"type": "response.completed", "sequence_number": 2, "response": whole}


def error(status: int) -> Response:
    """Return OpenAI's answer to a request that is not to be made again."""
    fields = {"message": "No, thank you.", "type": "some_error", "param": None, "code": None}
    return Response(
        status=status,
        body=json.dumps({"error": fields}).encode(),
        headers={"Content-Type": "application/json", "x-should-retry": "false"},
        framing="length",
    )
