"""How far ahead of what plays Twilio is sent audio, and what is counted as heard."""

from __future__ import annotations

import asyncio
import gc
import re
import time
import weakref
from itertools import pairwise

import pytest

import twilio_aura
from tests.standins.deepgram import noise
from tests.standins.wire import Line, settle
from twilio_aura import MAX_BUFFERED_SECONDS, Playback, Settings, Speech

SECOND = bytes(8000)  # of audio
MESSAGE = bytes(3200)  # with 0.4 s, as it is sent


class Clock:
    """Time that passes only where somebody sleeps, or a test says so: nobody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        self._sleep = asyncio.sleep
        monkeypatch.setattr(twilio_aura, "time", self)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    def monotonic(self) -> float:
        """Return the time, as the module asks for it."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.now += seconds
        await self._sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the module then has."""
    return Clock(monkeypatch)


def playing(seconds: float) -> Playback:
    """Return a playback that has so much still to play."""
    playback = Playback()
    playback.add(bytes(round(seconds * 8000)))
    return playback


# The pacing


def test_first_sound_waits_for_nothing(clock: Clock) -> None:
    """The first sound is sent at once, and so is one after a gap, or after a `clear`."""
    assert Playback().pause_seconds(MESSAGE) == 0.0
    gap = playing(1)
    clock.now += 1.5
    assert gap.pause_seconds(MESSAGE) == 0.0
    cleared = playing(1)
    cleared.clear()
    assert cleared.pause_seconds(MESSAGE) == 0.0


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("audio", [b"\0", MESSAGE])
def test_pacing_has_no_jump(audio: bytes) -> None:
    """The more there is to play, the longer the pause, and never by more than there is more."""
    steps = [number / 100 for number in range(601)]  # up to 6 s ahead
    pauses = [playing(ahead).pause_seconds(audio) for ahead in steps]
    growth = [later - earlier for earlier, later in pairwise(pauses)]
    assert min(growth) >= 0.0
    assert max(growth) < 0.01 + 1e-9


@pytest.mark.usefixtures("clock")
def test_pacing_bounds() -> None:
    """After the pause there is still something to play, and no more is sent than 3 s of it."""
    for number in range(1, 601):
        ahead = number / 100
        pause = playing(ahead).pause_seconds(MESSAGE)
        assert pause < ahead
        assert ahead - pause + 0.4 <= MAX_BUFFERED_SECONDS + 1e-9
    assert MAX_BUFFERED_SECONDS == 3.0


async def test_pacing_of_a_call(clock: Clock) -> None:
    """A long text is sent much faster than it is spoken, up to 3 s ahead, and stays so far ahead.

    It pauses after each message, so that the first sounds of other calls come in between.
    """
    sent_at: list[float] = []
    ahead: list[float] = []  # right after each message

    class Watched(Line):
        async def send(self, message: str) -> None:
            await super().send(message)
            if "media" in message:
                sent_at.append(clock.now)
                ahead.append(len(self.audio) / 8000 - (clock.now - sent_at[0]))

    async with Watched() as line:
        line.tts.says("A long text.", 20 * SECOND)
        assert await line.call.say("A long text.")
    assert line.audio == 20 * SECOND
    assert max(ahead) <= 3.0 + 1e-6
    enough = next(number for number, seconds in enumerate(ahead) if seconds > 2.5)
    assert sent_at[enough] - sent_at[0] < 2.0
    assert min(ahead[enough:]) > 2.5
    assert min(later - earlier for earlier, later in pairwise(sent_at)) > 0.01


async def test_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speech with a gap in it that is longer than a silence may be is heard to its end."""
    monkeypatch.setattr(Playback, "pause_seconds", lambda *_: 0.0)
    async with Line() as line:
        speech = line.tts.held("A gap.")
        saying = line.begin(line.call.say("A gap."))
        await settle()
        monkeypatch.setattr(twilio_aura, "MAX_SILENCE_SECONDS", 0.05)
        speech.add(60 * SECOND)
        await line.until(lambda: len(line.audio) == len(60 * SECOND))
        await asyncio.sleep(0.2)  # of the minute that is being played
        speech.add(SECOND)
        speech.end()
        assert await saying
        assert line.audio == 61 * SECOND


# What is counted


def test_counts(clock: Clock) -> None:
    """What was sent is heard when it has been played; of what was cleared, what had been played."""
    playback = Playback()
    assert playback.summary() == "no audio sent"
    playback.started_at = clock.now
    clock.now += 0.25
    playback.add(10 * SECOND)
    assert playback.ahead_seconds() == pytest.approx(10)
    clock.now += 2
    assert playback.summary() == "first audio 250 ms; sent 10.0 s, heard 2.0 s"
    playback.clear()
    assert playback.ahead_seconds() == 0.0
    clock.now += 60
    playback.add(5 * SECOND)
    clock.now += 1
    playback.clear()
    assert playback.summary() == "first audio 250 ms; sent 15.0 s, heard 3.0 s"
    playback.add(SECOND)
    playback.is_playing = False  # as a mark says
    assert playback.summary() == "first audio 250 ms; sent 16.0 s, heard 4.0 s"


def test_gap_by_the_clock(clock: Clock) -> None:
    """What is sent after a gap is played from then on, and not from where the gap began."""
    playback = playing(1)
    clock.now += 0.5
    playback.add(SECOND)
    assert playback.ends_at == pytest.approx(clock.now + 1.5)
    clock.now += 10
    assert playback.ahead_seconds() == 0.0
    playback.add(SECOND)
    assert playback.ends_at == pytest.approx(clock.now + 1)


async def test_counts_of_a_call(clock: Clock) -> None:
    """The log line counts from `start`, to the first of all sounds, and all that was cleared."""
    async with Line(start=False) as line:
        clock.now += 100  # until `start`
        line.start()
        await settle()
        clock.now += 0.25  # until the first sound
        for text in "One.", "Two.":
            line.returns_marks = False
            line.tts.says(text, 10 * SECOND)
            saying = line.begin(line.call.say(text))
            await line.until_mark(1 if text == "One." else 2)
            clock.now = line.call._playback.ends_at - 2  # noqa: SLF001
            line.press("1")
            assert await saying is False
        line.stop()
        await line.ended()
        ended = line.ends[0].partition("; ")[2]
        assert ended == "first audio 250 ms; sent 20.0 s, heard 16.0 s"


async def test_heard_by_its_mark() -> None:
    """All has been heard when its mark returns, however early that is by our clock."""
    async with Line() as line:
        line.tts.says("Heard.", SECOND)
        assert await line.call.say("Heard.")
        line.stop()
        await line.ended()
        assert re.search(r"; sent 1\.0 s, heard 1\.0 s$", line.ends[0])


async def test_audio_is_not_kept() -> None:
    """A call that stays open keeps nothing of what was said on it."""
    async with Line(twilio_aura.script, {"text": "Heard."}, Settings()) as line:
        speech: Speech | None = line.tts.held("Heard.", noise("Heard."))
        assert speech
        speech.end()
        kept = weakref.ref(speech)
        await line.until_mark()
        await settle()
        speech = None
        line.tts.forget("Heard.")
        gc.collect()
        assert kept() is None
        assert not line.closed
