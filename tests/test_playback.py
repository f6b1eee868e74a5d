"""How far ahead of what plays Twilio is sent audio, and what is counted as heard."""

import asyncio
import contextlib
import re
import time

import psutil

import twilio_aura
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import dial


async def test_not_too_far_ahead(deepgram: Deepgram) -> None:
    """Twilio is sent little ahead of what plays, so that a `clear` never queues behind much."""
    sound = noise("far") * 12
    text = deepgram.answer("far ahead", Answer(sound[:32_000], write_sizes=(32_000,)))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, MAX_BUFFERED_SECONDS=1.0) as server,
        dial(server.url, parameters={"text": text}) as phone,
    ):
        await phone.hears(sound[:32_000])
        sent_seconds = 0.0
        for size, at in zip(phone.media_sizes, phone.times, strict=False):  # without the mark
            sent_seconds += size / 8000
            assert sent_seconds - (at - phone.times[0]) < 2.0  # MAX_BUFFERED_SECONDS and a message


async def test_first_sounds_first(deepgram: Deepgram) -> None:
    """A long text pauses after each of its messages, so that other callers hear something."""
    text = deepgram.answer("long", Answer(noise("long") * 12, write_sizes=(32_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with (
        # The next message comes after 400 s.
        Server(settings, MAX_SPEED=0.001, MAX_SILENCE_SECONDS=1000) as server,
        dial(server.url, parameters={"text": text}) as phone,
        dial(server.url, parameters={"text": "short"}) as other,
    ):
        await phone.until_sound()
        await other.until_sound()
        assert len(phone.media_sizes) == 1


def test_gap_by_the_clock() -> None:
    """What is sent after a gap is played from then on, and not from where the gap began."""
    playback = twilio_aura.Playback()
    playback.add(bytes(80))  # 0.01 s
    time.sleep(0.05)
    assert playback.ahead_seconds() == 0.0
    sent_at = time.monotonic()
    playback.add(bytes(8000))
    assert playback.ends_at >= sent_at + 1.0


async def test_gap(deepgram: Deepgram) -> None:
    """Speech with a gap in it, and longer than a silence may be, is heard to its end."""
    go = asyncio.Event()
    sound = (noise("gap") * 15)[:44_000]
    text = deepgram.answer("a gap", Answer(sound, write_sizes=(40_000, 4000), gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, MARK_GRACE_SECONDS=2.5, MAX_SILENCE_SECONDS=2) as server,
        dial(server.url, parameters={"text": text}, speed=1) as phone,
    ):
        await phone.until_sound()
        await asyncio.sleep(2.2)  # of 5 s of sound
        go.set()
        assert await phone.until_closed() == 1000
        assert phone.heard == sound


async def test_what_was_heard(deepgram: Deepgram) -> None:
    """What is logged as heard is what a mark confirms, or, of what was cleared, what had played."""
    sound = noise("heard")[:3200] * 25
    text = deepgram.answer("heard", Answer(sound, write_sizes=(80_000,)))
    async with Server(
        {"DEEPGRAM_URL": deepgram.url}, MAX_BUFFERED_SECONDS=1e9, MAX_SPEED=1e9
    ) as server:
        async with dial(server.url, parameters={"text": text}) as quick:
            await quick.hears(sound)
            await quick.hang_up()
        assert "sent 10.0 s, heard 10.0 s" in await server.until_ended(quick.call_sid)
        async with dial(server.url, parameters={"text": text}, speed=1) as interrupted:
            await interrupted.until_mark()
            await interrupted.until(lambda: len(interrupted.heard) >= 6400)
            await interrupted.press("1")
            await interrupted.until(lambda: interrupted.events[-1][0] == "clear")
            await interrupted.hang_up()
        ended = await server.until_ended(interrupted.call_sid)
        assert re.search(r"sent 10\.0 s, heard (0\.[89]|[1-9]\.\d) s", ended)
        async with dial(server.url, parameters={"text": text}, returns_marks=False) as unmarked:
            await unmarked.until_mark()
            await unmarked.hang_up()
        ended = await server.until_ended(unmarked.call_sid)
        assert re.search(r"sent 10\.0 s, heard \d\.\d s", ended)


async def test_mark_never_returns(deepgram: Deepgram) -> None:
    """A mark that never returns is waited for a little, and the log names the usual mistake."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, MARK_GRACE_SECONDS=0.5, MAX_SILENCE_SECONDS=1000) as server,
        dial(server.url, returns_marks=False, speed=1) as phone,
    ):
        assert await phone.until_closed() == 1000
        assert phone.heard == phone.received == noise(GREETING)
        assert asyncio.get_running_loop().time() - phone.times[-1] >= 0.5
        warning = f"WARNING call {phone.call_sid}: no mark came back: does the TwiML have "
        assert len(server.lines(warning)) == 1


async def test_audio_is_not_kept(deepgram: Deepgram) -> None:
    """A call that stays open keeps nothing of what was said on it, beside the cache."""
    sound = noise("two minutes") * 300
    go = asyncio.Event()
    text = deepgram.answer("two minutes", Answer(sound[:960_000], write_sizes=(96_000,), gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "0", "DEEPGRAM_CONCURRENCY": "30"}
    async with (
        Server(settings, MAX_BUFFERED_SECONDS=1e9, MAX_SPEED=1e9, flags=()) as server,
        contextlib.AsyncExitStack() as calls,
    ):
        process = psutil.Process(server.process.pid)
        phones = []
        for number in range(30):
            deepgram.answers[f"{text} {number}"] = deepgram.answers[text]
            call = dial(server.url, parameters={"text": f"{text} {number}"})
            phones.append(await calls.enter_async_context(call))
        for phone in phones:
            await phone.until_sound()
        before = process.memory_info().rss
        go.set()
        for phone in phones:
            await phone.hears(sound[:960_000])
        assert process.memory_info().rss - before < 15 * 2**20  # of 29 MB of audio
