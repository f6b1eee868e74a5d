"""The server, in a process that tells what its script does: when it speaks, waits, and returns.

From outside one cannot know whether a silent script has come to its end, or asks a database.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import twilio_aura

TELLS = "observed: "  # begins each line of what is told, in the process's output
Texts = AsyncGenerator[twilio_aura.Text]


def serve(file: str) -> None:
    """Serve the script in `file` as `python FILE` does, else the module's own, and tell of it."""
    twilio_aura.Call = ObservedCall  # type: ignore[misc]
    if not file:
        sys.exit(twilio_aura.main())
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")
    sys.exit()


def tell(event: str, **fields: object) -> None:
    """Tell the demo, which reads what this process prints."""
    print(TELLS + json.dumps({"event": event, **fields}), flush=True)


class ObservedCall(twilio_aura.Call):
    """A call that tells what its script does."""

    waits = 0
    performer: asyncio.Task[Any] | None = None

    async def run(self, script: twilio_aura.Script) -> None:
        await super().run(lambda call: self.observed(script(call)))

    async def observed(self, texts: Texts) -> Texts:
        """Yield the script's texts; tell when one begins and ends, and when the caller may go."""
        self.performer = asyncio.current_task()
        async with aclosing(texts):
            async for text in texts:
                tell("speaks")
                said = [str(text)]
                if isinstance(text, AsyncIterable):
                    said = []
                    yield overheard(text, said)
                else:
                    yield text
                tell("spoke", text="".join(said))
        if not self.close_after_speech:
            tell("returned")

    async def digit(self, seconds: float | None = None) -> str:
        """Return the next key, and tell that the script waits for it; a `digit(0)` does not wait.

        Where the script waits in another task than it speaks in, it may go on without a key.
        """
        self.waits += 1
        wait = self.waits
        is_patient = seconds is None or seconds > 0
        if is_patient:
            goes_on = asyncio.current_task() is not self.performer
            tell("waits", wait=wait, seconds=seconds, goes_on=goes_on)
        key = ""
        try:
            key = await super().digit(seconds)
        finally:
            if is_patient or key:
                tell("waited", wait=wait, key=key)
        return key


async def overheard(text: AsyncIterable[str | None], said: list[str]) -> AsyncGenerator[str]:
    """Yield the parts of a text as they are written, and add them to `said`."""
    async with aclosing(twilio_aura.written_parts(text)) as parts:
        async for part in parts:
            said.append(str(part))
            yield part
