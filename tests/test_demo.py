"""The demo, run as a user runs it, and the voice it has without Deepgram."""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from streamdouble import g711
from streamdouble.audio import load_wav

from tests.deepgram import KEY, Answer, Deepgram, noise
from tests.demo import SETTINGS
from tests.server import MODULE, QUIET
from tests.voice import speak

GREETING = "Hello, how are you today?"


async def demo(cwd: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run the demo in `cwd`; return its exit status, output and error output."""
    inherited = {k: v for k, v in os.environ.items() if k not in {*SETTINGS, *QUIET}}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.demo", *arguments),
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(MODULE.parent), **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def recording(path: Path) -> np.ndarray:
    """Return the samples of a mono WAV file for a telephone."""
    samples, rate = load_wav(path)
    assert (rate, samples.shape[1]) == (8000, 1)
    return samples[:, 0]


def assert_in_order(text: str, *parts: str) -> None:
    position = 0
    for part in parts:
        position = text.index(part, position) + len(part)


def assert_refused(status: int, errors: str) -> None:
    assert status != 0
    assert "Traceback" not in errors
    assert KEY not in errors


# The demo


async def test_greeting(tmp_path: Path) -> None:
    """Without a key, an account or an option the greeting is heard, and kept as call.wav."""
    status, output, errors = await demo(tmp_path)
    assert (status, errors) == (0, "")
    assert_in_order(
        output,
        "a stand-in with an offline voice",
        "server:   ws://127.0.0.1:",
        "Twilio: connected",
        "Twilio: start of call CA",
        "server: media, the first sound",
        "server: mark 1, after",
        "Twilio: mark 1: the caller has heard",
        "Twilio: stop",
        "ended: hung up",
        "The caller heard all",
    )
    samples = recording(tmp_path / "call.wav")
    assert 1 < len(samples) / 8000 < 3
    assert samples.std() > 500


async def test_long_text_in_another_voice(tmp_path: Path) -> None:
    """A text longer than Deepgram takes at once is heard from its first word to its last."""
    text = " ".join(f"Esta es la frase número {number}." for number in range(75))
    assert len(text) > 2000
    options = "--fast", "--model", "aura-2-celeste-es", "--out", "long.wav"
    status, output, errors = await demo(tmp_path, "--text", text, *options)
    assert (status, errors) == (0, "")
    assert "with the parameter text, model" in output
    assert len(recording(tmp_path / "long.wav")) / 8000 > 60


async def test_deepgram(deepgram: Deepgram, tmp_path: Path) -> None:
    """With a key in .env it is Deepgram that is heard, byte for byte."""
    (tmp_path / ".env").write_text(f"DEEPGRAM_API_KEY={KEY}\nDEEPGRAM_URL={deepgram.url}\n")
    status, output, errors = await demo(tmp_path, "--fast")
    assert (status, errors) == (0, "")
    assert f"Deepgram: {deepgram.url}\n" in output
    assert np.array_equal(recording(tmp_path / "call.wav"), g711.decode(noise(GREETING)))


async def test_wrong_key(deepgram: Deepgram, tmp_path: Path) -> None:
    """A key that Deepgram refuses is told in the server's own words."""
    key = "a-wrong-key"
    status, _, errors = await demo(tmp_path, DEEPGRAM_API_KEY=key, DEEPGRAM_URL=deepgram.url)
    assert_refused(status, errors)
    assert "The caller did not hear everything: " in errors
    assert "Deepgram answered 401" in errors
    assert "check DEEPGRAM_API_KEY" in errors
    assert key not in errors


async def test_speech_cut_short(deepgram: Deepgram, tmp_path: Path) -> None:
    """When Deepgram breaks off, what was heard is kept, and it is not a success."""
    audio = noise("cut short")
    text = deepgram.answer("cut short", Answer(audio=audio, stop_after=2000))
    settings = {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
    status, _, errors = await demo(tmp_path, "--fast", "--text", text, **settings)
    assert_refused(status, errors)
    assert "the call ended: 1011 Deepgram broke off" in errors
    assert np.array_equal(recording(tmp_path / "call.wav"), g711.decode(audio[:2000]))


async def test_server_that_does_not_start(tmp_path: Path) -> None:
    """What the server says about its settings is passed on."""
    status, _, errors = await demo(tmp_path, DEEPGRAM_API_KEY=KEY, DEEPGRAM_URL="nonsense")
    assert_refused(status, errors)
    assert "the server did not start: DEEPGRAM_URL must be a URL" in errors


async def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    """No call is placed when what is heard could not be kept."""
    status, output, errors = await demo(tmp_path, "--out", "nowhere/call.wav")
    assert_refused(status, errors)
    assert output == ""
    assert "'nowhere/call.wav' cannot be written: " in errors


# The voice


def test_voice_is_speech() -> None:
    """The voice has the length and the loudness of speech, is not clipped, and has no offset."""
    samples = g711.decode(speak(GREETING, "aura-asteria-en")).astype(float)
    assert 1.5 < len(samples) / 8000 < 2.5
    assert -30 < 20 * np.log10(samples.std() / 2**15) < -15
    assert np.abs(samples).max() < 30000
    assert abs(samples.mean()) < 10
    power = np.abs(np.fft.rfft(samples)) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / 8000)
    assert power[(hertz > 80) & (hertz < 3400)].sum() > 0.9 * power.sum()
    assert np.abs(samples[-160:]).max() < 500  # the last sound has ended


def pitch_hertz(samples: np.ndarray) -> float:
    """Return how high a voice is, by the delay at which its loud moments repeat themselves."""
    lowest, highest = 8000 // 70, 8000 // 400  # in samples
    pitches = []
    for start in range(0, len(samples) - 480, 160):
        moment = samples[start : start + 480].astype(float)
        if moment.std() > 800:
            likeness = np.correlate(moment, moment, "full")[479:]
            pitches.append(8000 / (highest + likeness[highest:lowest].argmax()))
    return float(np.median(pitches))


def test_voice_of_each_model() -> None:
    """Another model is another voice; a language that is not known is taken for English."""
    asteria, orion, unknown = (
        g711.decode(speak(GREETING, f"aura-{name}")) for name in ("asteria-en", "orion-en", "x-xx")
    )
    assert pitch_hertz(asteria) > 1.3 * pitch_hertz(orion)
    assert 1 < len(unknown) / 8000 < 3


def test_voice_is_the_same_in_every_thread() -> None:
    """Threads that speak at once get each its own text, and the same for the same text."""
    texts = [f"You are number {number}." for number in range(10)]
    with ThreadPoolExecutor(10) as threads:
        first, second = (
            list(threads.map(speak, texts, ["aura-luna-en"] * len(texts))) for _ in range(2)
        )
    assert first == second == [speak(text, "aura-luna-en") for text in texts]
    assert len(set(first)) == len(texts)
