"""The demo with nothing but what it needs: no account, few packages, and a voice of its own."""

import asyncio
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from streamdouble import g711
from streamdouble.audio import load_wav

import twilio_aura
from tests.demo import run as run_here
from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram
from tests.standins.process import ROOT
from tests.standins.voice import resampled, speak, to_mulaw, write_wav
from tests.test_demo import UNHURRIED, run

EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")


async def demo(cwd: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run the demo in `cwd`, as its user does; return its exit status, output and error output."""
    process = await run("-m", "tests.demo", *arguments, cwd=cwd, **settings)
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def recording(file: Path) -> np.ndarray:
    """Return the samples of a recording, which is mono, and for a telephone."""
    samples, rate = load_wav(file)
    assert (rate, samples.shape[1]) == (8000, 1)
    return samples[:, 0]


@pytest.mark.parametrize("dotenv", ["", EXAMPLE], ids=["nothing", "example"])
async def test_default(tmp_path: Path, dotenv: str) -> None:
    """Without an option or a key, as .env.example has none, the greeting is heard and kept."""
    (tmp_path / ".env").write_text(dotenv, encoding="utf-8")
    status, output, errors = await demo(tmp_path)
    if "stood still" not in errors:  # the machine, and the server of which this is a warning
        assert (status, errors) == (0, "")
    assert "a stand-in with an offline voice" in output
    assert f'caller hears: "{GREETING}" 1.' in output
    assert "The caller heard all 1." in output
    samples = recording(tmp_path / "call.wav")
    assert len(samples) / 8000 > 1
    assert samples.std() > 500


async def test_long_text_in_another_voice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of several pieces is heard from its first word to its last."""
    for name in twilio_aura.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    text = " ".join(f"Esta es la frase número {number}." for number in range(15))
    assert len(text) > twilio_aura.MAX_PIECE_CHARACTERS
    options = ["--fast", "--model", "aura-2-celeste-es", "--out", str(tmp_path / "long.wav")]
    assert await run_here([*options, "--text", text], None, **UNHURRIED) == 0
    output, errors = capsys.readouterr()
    assert f'caller hears: "{text}" ' in output
    assert errors == ""
    assert len(recording(tmp_path / "long.wav")) / 8000 > 15


async def test_ctrl_c(tmp_path: Path, deepgram: Deepgram) -> None:
    """Ctrl-C before anything was heard leaves no recording, nor does it destroy an older one."""

    async def ring_off(*arguments: str) -> None:
        arguments = "--verbose", "--text", "Never.", *arguments
        process = await run("-m", "tests.demo", *arguments, cwd=tmp_path, **settings)
        assert process.stdout
        await process.stdout.readuntil(b'Twilio: {"event": "start"')
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
        assert process.returncode == 130
        assert errors.endswith(b"You rang off before the caller had heard everything.\n")
        assert b"Traceback" not in errors

    settings = {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
    deepgram.answer("Never.", Answer(delay_seconds=1000))
    (tmp_path / "older.wav").write_bytes(b"older")
    await asyncio.gather(ring_off(), ring_off("--out", "older.wav"))
    assert (tmp_path / "older.wav").read_bytes() == b"older"
    assert not (tmp_path / "call.wav").exists()


@pytest.mark.parametrize("package", ["espeakng_loader", "websockets", "dotenv"])
async def test_missing_package(tmp_path: Path, package: str) -> None:
    """A package that is missing is named, with the command that installs it."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}')")
    status, _, errors = await demo(tmp_path)
    assert status == 2
    assert errors == (
        f"No module named {package}. Run this in the directory of twilio_aura.py: "
        "pip install -r tests/demo-requirements.txt && python -m tests.demo\n"
    )


async def test_needs_few_packages(tmp_path: Path) -> None:
    """The demo imports none of the packages that only the tests need."""
    requirements = Path(__file__).with_name("requirements.txt").read_text().split()
    process = await run("-c", "import sys, tests.demo; print(*sys.modules)", cwd=tmp_path)
    output, _ = await process.communicate()
    imported = set(output.decode().split())
    assert "espeakng_loader" in imported
    assert imported & {name.replace("-", "_") for name in requirements} == set()


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


def test_voice_without_an_offset() -> None:
    """Where eSpeak's sound has an offset, which would click at both ends, the voice has none."""
    samples = g711.decode(speak("Six sick sheep. " * 3, "aura-asteria-en")).astype(float)
    assert abs(samples.mean()) < 5


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
@pytest.mark.parametrize(
    ("hertz", "least", "most"),
    [(0, -0.1, 0.1), (300, -0.1, 0.1), (3300, -0.3, 0.1), (4750, -200, -40), (7000, -200, -50)],
)
def test_resampling(rate: int, hertz: int, least: float, most: float) -> None:
    """A tone that a telephone carries is as loud as before, any higher one is gone."""
    phases = [2 * math.pi * hertz * sample / rate for sample in range(rate)]
    tone = np.array(resampled([round(10000 * math.cos(phase)) for phase in phases], rate))
    assert len(tone) == 8000
    before = 10000.0
    if hertz:
        before /= math.sqrt(2)
    middle = tone[500:-500]
    assert least <= 20 * np.log10(np.sqrt(np.mean(middle**2)) / before) <= most


def test_mulaw_is_the_nearest() -> None:
    """Every sample becomes a mulaw code that no other is nearer to, and silence the usual one."""
    samples = np.arange(-32768, 32768)
    codes = g711.decode(bytes(range(256))).astype(int)
    nearest = np.abs(samples[:, None] - codes[None, :]).min(axis=1)
    chosen = g711.decode(to_mulaw(samples.tolist())).astype(int)
    assert np.array_equal(np.abs(samples - chosen), nearest)
    assert to_mulaw([0, 0.0]) == b"\xff\xff"


def test_wav(tmp_path: Path) -> None:
    """A recording is a WAV file of 16-bit samples, which are G.711's for each mulaw code."""
    write_wav(bytes(range(256)), tmp_path / "all.wav")
    samples, rate = load_wav(tmp_path / "all.wav")
    assert (rate, samples.shape) == (8000, (256, 1))
    assert np.array_equal(samples[:, 0], g711.decode(bytes(range(256))))
