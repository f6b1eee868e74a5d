"""The demo, run as a user runs it, and the voice it has without Deepgram."""

import asyncio
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from streamdouble import g711
from streamdouble.audio import load_wav

from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.process import GREETING_SCRIPT, environment
from tests.standins.voice import speak

MAIN = """
import sys
import twilio_aura
{script}
if __name__ == "__main__":
    sys.exit(twilio_aura.main(script))
"""


async def start(
    cwd: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start the demo in `cwd`."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.demo", *arguments),
        cwd=cwd,
        env=environment(settings or {}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def demo(
    cwd: Path, *arguments: str, script: str = GREETING_SCRIPT, **settings: str
) -> tuple[int, str, str]:
    """Run the demo in `cwd` with this script; return its exit status, output and error output."""
    (cwd / "script.py").write_text(MAIN.format(script=script))
    process = await start(cwd, "--script", "script.py", *arguments, settings=settings)
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def recording(path: Path) -> np.ndarray:
    """Return the samples of a mono WAV file for a telephone."""
    samples, rate = load_wav(path)
    assert (rate, samples.shape[1]) == (8000, 1)
    return samples[:, 0]


def names(directory: Path) -> list[str]:
    """Return the names of the files in `directory`."""
    return sorted(path.name for path in directory.iterdir())


def assert_in_order(text: str, *parts: str) -> None:
    position = 0
    for part in parts:
        position = text.index(part, position) + len(part)


def assert_failed(status: int, errors: str) -> None:
    assert status != 0
    assert "Traceback" not in errors
    assert KEY not in errors


# The demo


async def test_default(tmp_path: Path) -> None:
    """Without an option the module's own script is heard, and kept as call.wav."""
    process = await start(tmp_path, "--fast")
    output, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert b"The caller heard all" in output
    assert len(recording(tmp_path / "call.wav"))


async def test_greeting(tmp_path: Path) -> None:
    """Without a key or an account the greeting is heard, and kept as call.wav."""
    status, output, errors = await demo(tmp_path)
    assert (status, errors) == (0, "")
    assert_in_order(
        output,
        "a stand-in with an offline voice",
        "server:   ws://127.0.0.1:",
        "Twilio: connected",
        "Twilio: start of call CA",
        "server: media, the first sound",
        "server: mark ",
        "Twilio: mark ",
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


KEYS = """
async def script(call):
    yield "Press a key."
    while (key := await call.digit()) != "#":
        yield f"You pressed {key}."
    yield "Bye."
"""


async def test_keys(deepgram: Deepgram, tmp_path: Path) -> None:
    """Keys are pressed in turn, each when what was said before has been heard."""
    settings = {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
    status, output, errors = await demo(
        tmp_path, "--fast", "--keys", "1,2,#", script=KEYS, **settings
    )
    assert (status, errors) == (0, "")
    assert_in_order(output, "presses 1", "server: mark", "presses 2", "presses #", "heard all")
    texts = ["Press a key.", "You pressed 1.", "You pressed 2.", "Bye."]
    heard = g711.decode(b"".join(map(noise, texts)))
    assert np.array_equal(recording(tmp_path / "call.wav"), heard)


async def test_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C leaves no empty recording, nor does it destroy an older one."""
    silent = "async def script(call):\n    await call.digit()\n    yield 'Never.'\n"
    (tmp_path / "script.py").write_text(MAIN.format(script=silent))
    (tmp_path / "older.wav").write_bytes(b"older")
    for out in ("call.wav", "older.wav"):
        process = await start(tmp_path, "--script", "script.py", "--out", out)
        assert process.stdout
        await process.stdout.readuntil(b"Twilio: start")
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
        assert process.returncode == 130
        assert b"You rang off" in errors
    assert (tmp_path / "older.wav").read_bytes() == b"older"
    assert names(tmp_path) == ["older.wav", "script.py"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--script", "nowhere.py"], "there is no file 'nowhere.py'"),
        (["--out", "nowhere/call.wav"], "'nowhere/call.wav' cannot be written"),
        (["--out", "."], "'.' cannot be written"),
    ],
)
async def test_missing_part(tmp_path: Path, arguments: list[str], said: str) -> None:
    """What is missing is said in one line, before a call is placed for nothing."""
    process = await start(tmp_path, *arguments)
    output, errors = await process.communicate()
    assert process.returncode == 2
    assert output == b""
    assert errors.decode().splitlines()[-1].endswith(said)


async def test_missing_package(tmp_path: Path) -> None:
    """A package that is missing is named, with the command that installs it."""
    (tmp_path / "streamdouble.py").write_text("raise ImportError('No module named streamdouble')")
    process = await start(tmp_path)
    _, errors = await process.communicate()
    assert process.returncode == 2
    said = "No module named streamdouble: pip install -r tests/requirements.txt\n"
    assert errors.decode() == said


async def test_wrong_key(deepgram: Deepgram, tmp_path: Path) -> None:
    """A key that Deepgram rejects is told in the server's own words."""
    key = "a-wrong-key"
    status, _, errors = await demo(tmp_path, DEEPGRAM_API_KEY=key, DEEPGRAM_URL=deepgram.url)
    assert_failed(status, errors)
    assert "The caller did not hear everything: " in errors
    assert "Deepgram answered 401" in errors
    assert "check DEEPGRAM_API_KEY" in errors
    assert key not in errors


async def test_speech_cut_short(deepgram: Deepgram, tmp_path: Path) -> None:
    """When Deepgram closes mid-response, what was heard is kept, and it is not a success."""
    audio = noise("cut short")
    text = deepgram.answer("cut short", Answer(audio=audio, stop_after=2000))
    settings = {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
    status, _, errors = await demo(tmp_path, "--fast", "--text", text, **settings)
    assert_failed(status, errors)
    assert "the call ended: 1011 the connection to Deepgram failed" in errors
    assert np.array_equal(recording(tmp_path / "call.wav"), g711.decode(audio[:2000]))


async def test_server_that_does_not_start(tmp_path: Path) -> None:
    """What the server says about its settings is passed on."""
    status, _, errors = await demo(tmp_path, DEEPGRAM_API_KEY=KEY, DEEPGRAM_URL="nonsense")
    assert_failed(status, errors)
    assert "the server did not start: DEEPGRAM_URL must be a URL" in errors


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
