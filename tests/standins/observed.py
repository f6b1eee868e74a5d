"""A call that tells what its script does: when it speaks, waits for a key, and returns.

From outside one cannot know whether a silent script has come to its end, or asks a database.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any

import twilio_aura

TELLS = "observed: "  # begins each line of what is told, in the process's output


def observe() -> None:
    """Have the server of this process tell of its calls, which come without TLS."""
    twilio_aura.Call = Call  # type: ignore[misc]
    twilio_aura.tls_context = without_tls  # .env may have TLS_CERT.


def without_tls(settings: twilio_aura.Settings) -> None:
    """Return None, for plain ws."""


class Call(twilio_aura.Call):
    """It has the name of what it stands for, which Python's warnings show."""

    sent = 0  # messages to Twilio
    waits = 0
    performer: asyncio.Task[Any] | None = None
    asker: asyncio.Task[Any] | None = None

    def tell(self, event: str, **fields: object) -> None:
        """Tell the demo, which reads what this process prints."""
        told = json.dumps({"event": event, "sent": self.sent, **fields})
        print(TELLS + told, flush=True)

    async def serve(self, script: twilio_aura.Script) -> None:
        await super().serve(functools.partial(self.perform, script))

    async def perform(self, script: twilio_aura.Script, call: twilio_aura.Call) -> object:
        """Run the script; tell when it has returned, so that the caller may go."""
        self.performer = asyncio.current_task()
        returned = await script(call)
        if not self.close_after_speech:
            self.tell("returned")
        return returned

    async def say(self, text: twilio_aura.Text, interruptible: bool = True) -> bool:
        """Speak; tell when it begins and ends, and what was said."""
        said = [str(text)]
        if isinstance(text, AsyncIterable):
            said = []
            text = overheard(text, said)
        heard = None  # if it raises
        self.tell("speaks")
        try:
            heard = await super().say(text, interruptible)
        finally:
            self.tell("spoke", text="".join(said), heard=heard)
        return heard

    async def ask(self, text: twilio_aura.Text, count: int = 1, seconds: float = 5) -> str:
        """Return the keys, and tell which the script gets."""
        self.asker = asyncio.current_task()
        try:
            keys = await super().ask(text, count, seconds)
        finally:
            self.asker = None
        self.tell("asked", gets=keys)
        return keys

    async def digit(self, seconds: float | None = None) -> str:
        """Return the next key, and tell that the script waits for it; a `digit(0)` does not wait.

        Where the script waits in another task than it speaks in, it may go on without a key.
        """
        self.waits += 1
        wait = self.waits
        if seconds != 0:
            goes_on = asyncio.current_task() is not self.performer
            self.tell("waits", wait=wait, seconds=seconds, goes_on=goes_on)
        key = ""
        try:
            key = await super().digit(seconds)
        finally:
            if seconds != 0 or key:
                is_asked = asyncio.current_task() is self.asker  # `ask` tells what it gets
                self.tell("waited", wait=wait, key=key, gets="" if is_asked else key)
        return key

    async def _send(self, message: str) -> None:
        self.sent += 1
        await super()._send(message)


async def overheard(text: AsyncIterable[str | None], said: list[str]) -> AsyncGenerator[str | None]:
    """Yield the parts of a text as they are written, and add them to `said`."""
    parts = aiter(text)
    try:
        async for part in parts:
            said.append(str(part or ""))
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()
