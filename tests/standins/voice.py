"""An offline voice, eSpeak NG's, as 8 kHz mulaw: what the caller hears can be listened to."""

from __future__ import annotations

import ctypes
import os
import threading
import zlib
from functools import cache

import espeakng_loader
import numpy as np
from streamdouble import g711

SAMPLE_RATE = 8000
RUMBLE_HZ = 60  # no voice is lower; what is there is an offset, which clicks at both ends
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
    return g711.encode(to_telephone(np.frombuffer(bytes(_spoken), np.int16), rate))


def to_telephone(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return 16-bit `samples` at 8000 Hz, without what that can't carry, nor an offset."""
    seconds = -(-len(samples) // rate)  # whole ones: a length of small factors transforms quickly
    spectrum = np.fft.rfft(samples, seconds * rate)
    spectrum[: seconds * RUMBLE_HZ] = 0
    resampled = np.fft.irfft(spectrum[: seconds * SAMPLE_RATE // 2 + 1], seconds * SAMPLE_RATE)
    resampled = resampled[: round(len(samples) * SAMPLE_RATE / rate)] * (SAMPLE_RATE / rate)
    return np.clip(np.round(resampled), -32768, 32767).astype(np.int16)
