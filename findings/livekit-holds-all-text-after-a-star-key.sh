#!/usr/bin/env bash
# A single "*72" in an answer makes LiveKit Agents hold back the rest of that answer until the model
# has finished writing it, or has begun a new line.
#
# Seen with livekit-agents 1.8.9 on Python 3.11.7.
#
# AgentSession passes what a model writes through `filter_markdown` on its way to speech, unless told
# otherwise. An asterisk before anything but a space may open an emphasis, so the filter waits for the
# one that closes it. "Dial *72 to forward your calls." and "To repeat, press *." have none, so all that
# follows the asterisk stays in its buffer. One would expect it to give up at the end of the sentence,
# at the latest. No word is lost or changed; they come late, and all at once.
#
# Why it matters here: such texts are rare on a screen and ordinary on a telephone, whose keys are
# spoken of and whose codes begin with a star. The caller hears nothing for as long as the model
# writes. A program that streams texts to speech should clean them sentence by sentence, and a model
# that speaks on the telephone is best told to write "the star key".
#
# What was seen; a number is how many words the model had written when a piece of text came out:
#
#   in AgentSession by default: ['filter_markdown', 'filter_emoji']
#   Dial 72 to forward your calls. Then enter the number, and wait for the tone. Then hang up.
#     at words 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 18
#   Dial *72 to forward your calls. Then enter the number, and wait for the tone. Then hang up.
#     at words 2, 18
#   To repeat, press *. To end, press the pound key. We are open until five today. Goodbye.
#     at words 2, 3, 17
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check livekit-agents==1.8.9
"$dir/venv/bin/python" - <<'PYTHON'
import asyncio
import sys

from livekit.agents.voice.agent_session import DEFAULT_TTS_TEXT_TRANSFORMS
from livekit.agents.voice.transcription.filters import filter_markdown

REST = "to forward your calls. Then enter the number, and wait for the tone. Then hang up."
TEXTS = {
    f"Dial 72 {REST}": "soon",
    f"Dial *72 {REST}": "late",
    "To repeat, press *. To end, press the pound key. We are open until five today. Goodbye.": "late",
}


async def pieces(text: str) -> list[tuple[int, str]]:
    """Stream `text` word by word; return each piece, and how many words were written by then."""
    written = 0

    async def model():
        nonlocal written
        for word in text.split():
            written += 1
            yield word if written == 1 else " " + word

    return [(written, piece) async for piece in filter_markdown(model())]


async def main() -> None:
    print("in AgentSession by default:", DEFAULT_TTS_TEXT_TRANSFORMS)
    as_before = "filter_markdown" in DEFAULT_TTS_TEXT_TRANSFORMS
    for text, expected in TEXTS.items():
        total = len(text.split())
        seen = await pieces(text)
        print(text)
        print("  at words", ", ".join(str(at) for at, _ in seen))
        last = seen[-1][1]
        late = len(seen) <= 3 and len(last.split()) >= total - 3
        as_before &= late == (expected == "late") and "".join(piece for _, piece in seen) == text
    if not as_before:
        sys.exit("This has changed.")


asyncio.run(main())
PYTHON
