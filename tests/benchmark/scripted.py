"""A module that is measured, with a script that says another text for each key.

`python -m tests.benchmark.scripted MAX_IDLE_SECONDS PATH` runs it. Scripts were async generators,
and `texts` is one. Since then they are functions, and `script` is one.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections.abc import AsyncGenerator
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

TOKEN_SECONDS = 0.05


async def written(text: str) -> AsyncGenerator[str]:
    """Yield `text` as a language model writes it, 20 tokens a second."""
    for token in re.findall(r"\s*\w+|\S", text):
        await asyncio.sleep(TOKEN_SECONDS)
        yield token


async def texts(call: Any) -> AsyncGenerator[Any]:
    """Yield the text of the call, or else the greeting, then another one for each key."""
    text = call.parameters.get("text") or call.settings.greeting
    if "written" in call.parameters:
        yield written(text)
    else:
        yield text
    for number in itertools.count():
        await call.digit()
        yield f"{text} {number}."


async def script(call: Any) -> None:
    """Say the texts."""
    async for text in texts(call):
        await call.say(text)


def main(max_idle_seconds: float, path: str) -> int:
    """Serve the module at `path`; return its exit status."""
    spec = spec_from_file_location("twilio_aura", path)
    assert spec
    assert spec.loader
    module: Any = module_from_spec(spec)
    sys.modules["twilio_aura"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    module.MAX_IDLE_SECONDS = max_idle_seconds
    del sys.argv[1:]
    if hasattr(module, "Utterance"):
        return int(module.main(script))
    return int(module.main(texts))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2]))
