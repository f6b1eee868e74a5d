#!/usr/bin/env bash
# Pipecat's serializer for Twilio sends the first sound of an utterance late, and the last one never,
# when the speech has another sample rate than the telephone.
#
# Seen with pipecat-ai 1.14.0 on Python 3.11.7.
#
# Twilio wants 8000 samples a second. TwilioFrameSerializer converts what it is given with a resampler
# that keeps its state from chunk to chunk, so that no seams are heard. Such a filter holds audio back;
# but nothing tells it where speech ends. What it holds then waits for more audio, and if that comes
# more than 0.2 seconds later, as the next utterance does, it is thrown away. One would expect speech
# to come out as long as it went in, and chunk by chunk, as it does at 8000 samples a second.
#
# Why it matters here: 24000 samples a second are the pipeline's default. Every utterance then loses its
# last 37 ms, and nothing is sent before the eighth chunk of 20 ms has come. Words that end softly do
# not show it. A program that resamples speech has to flush the resampler at the end of each utterance;
# one that has its speech made at 8000 samples a second needs none.
#
# What was seen: an utterance of one second, the last 20 ms of which are loud and the rest of which is
# silent, half a second's pause, and another, silent utterance, all in chunks of 20 ms.
#
#    8000 Hz: 1.000 s sent for 1 s, from chunk 1 on; the loud end: 20 ms with it, 0 ms later
#   16000 Hz: 0.948 s sent for 1 s, from chunk 6 on; the loud end: 0 ms with it, 0 ms later
#   24000 Hz: 0.963 s sent for 1 s, from chunk 8 on; the loud end: 0 ms with it, 0 ms later
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check pipecat-ai==1.14.0
LOGURU_LEVEL=WARNING "$dir/venv/bin/python" -W ignore - <<'PYTHON'
import asyncio
import json
import math
import struct
import sys
from base64 import b64decode

from pipecat.frames.frames import OutputAudioRawFrame
from pipecat.serializers.twilio import TwilioFrameSerializer

SILENT = {0xFF, 0x7F, 0xFE, 0x7E}  # the mulaw of -8 to 8


def chunk(rate: int, loud: bool) -> OutputAudioRawFrame:
    """Return 20 ms of audio."""
    samples = [
        round(loud * 20000 * math.sin(2 * math.pi * 1000 * i / rate)) for i in range(rate // 50)
    ]
    audio = struct.pack(f"<{len(samples)}h", *samples)
    return OutputAudioRawFrame(audio=audio, sample_rate=rate, num_channels=1)


async def utterance(serializer: TwilioFrameSerializer, rate: int, loud_end: bool) -> list[bytes]:
    """Return the mulaw that each of 50 chunks brings."""
    sent = []
    for number in range(50):
        message = await serializer.serialize(chunk(rate, loud_end and number == 49))
        sent.append(b64decode(json.loads(message)["media"]["payload"]) if message else b"")
    return sent


def loud_ms(sent: list[bytes]) -> int:
    """Return how many ms are loud, to the next 20 ms."""
    loud = sum(byte not in SILENT for byte in b"".join(sent))
    return -(-loud // 160) * 20


async def main() -> None:
    as_before = True
    for rate in 8000, 16000, 24000:
        params = TwilioFrameSerializer.InputParams(auto_hang_up=False)
        serializer = TwilioFrameSerializer("MZ0", params=params)
        first = await utterance(serializer, rate, loud_end=True)
        await asyncio.sleep(0.5)
        second = await utterance(serializer, rate, loud_end=False)
        seconds = sum(map(len, first)) / 8000
        since = next(number for number, audio in enumerate(first, 1) if audio)
        heard = loud_ms(first), loud_ms(second)
        print(
            f"{rate:5} Hz: {seconds:.3f} s sent for 1 s, from chunk {since} on; "
            f"the loud end: {heard[0]} ms with it, {heard[1]} ms later"
        )
        if rate == 8000:
            as_before &= (seconds, since, heard) == (1, 1, (20, 0))
        else:
            as_before &= seconds < 0.98 and since > 3 and heard == (0, 0)
    if not as_before:
        sys.exit("This has changed.")


asyncio.run(main())
PYTHON
