"""An offline voice, eSpeak NG's, as 8 kHz mulaw: what the caller hears can be listened to."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import threading
import wave
import zlib
from array import array
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from operator import mul
from pathlib import Path

import espeakng_loader

SAMPLE_RATE = 8000
RUMBLE_HZ = 40  # no voice is lower; what is there is an offset, which clicks at both ends
ZERO_CROSSINGS = 9  # of the low-pass filter, on either side: from 4.7 kHz on 40 dB are lost
VARIANTS = ("m1", "m2", "m3", "m4", "m7", "f1", "f2", "f3", "f4", "f5")  # male and female
SPEAKS_LIKE = {"en": "en-us"}

# From eSpeak's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
DONT_EXIT = 0x8000
CHARS_UTF8 = 1
END_PAUSE = 0x1000  # without it the last sound is cut off
VOLUME, PITCH = 2, 3
SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

_lock = threading.Lock()  # eSpeak has one voice and one callback a process
_spoken = bytearray()  # 16-bit samples, as the callback has been given them


def _hear(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
    if samples:  # NULL at the end
        _spoken.extend(ctypes.string_at(samples, count * 2))
    return 0  # go on


_callback = SynthCallback(_hear)  # eSpeak holds no reference to it


@cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """Return the library, ready to speak, and its sample rate."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = os.fsencode(espeakng_loader.get_data_path())
    rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, DONT_EXIT)
    if rate < 1:
        raise OSError(f"eSpeak NG cannot use its data in {data!r}")
    library.espeak_SetSynthCallback(_callback)
    library.espeak_SetParameter(VOLUME, 80, 0)  # at 100 resampling overshoots
    return library, rate


def speak(text: str, model: str) -> bytes:
    """Return `text` as raw 8 kHz mulaw, the same for the same text and model.

    Args:
        text: What is said.
        model: A name such as aura-2-celeste-es: its last part is the language (English if eSpeak
            doesn't know it), and the whole decides whose voice it is.
    """
    with _lock:
        return _speak(text, model)


@cache  # eSpeak never says a thing twice in the same bytes
def _speak(text: str, model: str) -> bytes:
    library, rate = _espeak()
    language = model.rsplit("-", 1)[-1]
    pitch, variant = divmod(zlib.crc32(model.encode()), len(VARIANTS))
    for name in (SPEAKS_LIKE.get(language, language), SPEAKS_LIKE["en"]):
        if library.espeak_SetVoiceByName(f"{name}+{VARIANTS[variant]}".encode()) == 0:
            break
    library.espeak_SetParameter(PITCH, 40 + pitch % 21, 0)
    encoded = text.encode(errors="replace")
    size = ctypes.c_size_t(len(encoded) + 1)
    _spoken.clear()
    library.espeak_Synth(encoded, size, 0, 0, 0, CHARS_UTF8 | END_PAUSE, None, None)
    return to_mulaw(without_rumble(resampled(array("h", bytes(_spoken)), rate)))


# What a telephone makes of it


def resampled(samples: Sequence[int], rate: int) -> list[float]:
    """Return `samples`, of which `rate` are a second, at 8000 Hz, without what that can't carry."""
    phases = SAMPLE_RATE // math.gcd(SAMPLE_RATE, rate)
    step = rate // math.gcd(SAMPLE_RATE, rate)
    reach = ZERO_CROSSINGS * rate // SAMPLE_RATE
    kernels = [low_pass(phase / phases, reach, rate) for phase in range(phases)]
    padded = [0.0] * reach + [float(sample) for sample in samples] + [0.0] * reach
    result = []
    for position in range(0, len(samples) * phases, step):
        first, phase = divmod(position, phases)
        near = padded[first + 1 : first + 1 + 2 * reach]
        result.append(sum(map(mul, kernels[phase], near)))
    return result


def low_pass(offset: float, reach: int, rate: int) -> list[float]:
    """Return the weights of the `reach` samples on either side of a moment.

    They are a sinc's, which has a Hann window.

    Args:
        offset: How far the moment is behind a sample, in samples.
        reach: Samples on either side.
        rate: Samples in a second.
    """
    weights = []
    for index in range(1 - reach, reach + 1):
        distance = index - offset
        window = 0.5 + 0.5 * math.cos(math.pi * distance / reach)
        weights.append(window * sinc(distance * SAMPLE_RATE / rate))
    total = sum(weights)
    return [weight / total for weight in weights]


def sinc(x: float) -> float:
    """Return the normalized sinc: 1 at 0, and 0 at every other whole number."""
    if not x:
        return 1.0
    return math.sin(math.pi * x) / (math.pi * x)


def without_rumble(samples: Sequence[float]) -> list[float]:
    """Return `samples`, at 8000 Hz, without an offset and what is too low for a voice."""
    kept = 1 - 2 * math.pi * RUMBLE_HZ / SAMPLE_RATE
    result = []
    before = 0.0
    height = 0.0
    for sample in samples:
        height = kept * height + sample - before
        before = sample
        result.append(height)
    return result


def from_mulaw(code: int) -> int:
    """Return the 16-bit sample that a byte of mulaw stands for (G.711)."""
    bits = code ^ 0xFF
    exponent = bits >> 4 & 7
    magnitude = ((bits & 15) * 8 + 132 << exponent) - 132
    if bits & 0x80:
        return -magnitude
    return magnitude


LINEAR = [from_mulaw(code) for code in range(256)]
CODES = [*range(128), *range(255, 127, -1)]  # from the lowest sample to the highest
LIMITS = [(LINEAR[lower] + LINEAR[higher]) / 2 for lower, higher in pairwise(CODES)]


def to_mulaw(samples: Sequence[float]) -> bytes:
    """Return `samples` as the mulaw that is nearest."""
    return bytes([CODES[bisect(LIMITS, sample)] for sample in samples])


def write_wav(mulaw: bytes | bytearray, path: Path) -> None:
    """Write `mulaw` as a WAV file of 16-bit samples, in place of an older one when it is whole."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as directory:
        whole = Path(directory) / "whole.wav"
        with wave.open(str(whole), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(array("h", [LINEAR[code] for code in mulaw]))
        whole.replace(path)
