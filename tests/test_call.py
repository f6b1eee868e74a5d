"""A call from its start to its end, as the caller, the script and the log see it."""

import asyncio
import contextlib
import random
import re
from typing import Any

import psutil
import pytest

from tests.benchmark import callers
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import MODULE, Server
from tests.standins.telephone import Telephone, dial


async def hears(phone: Telephone, audio: bytes) -> None:
    """Wait until `audio` was heard, byte for byte, no less and no more."""
    await phone.until_heard(audio)
    assert phone.heard == phone.received == audio


async def ended(server: Server, phone: Telephone) -> str:
    """Return the line in the log that the call has ended with."""
    return await server.logged(f"call {phone.call_sid} ended: ")


async def test_greeting(server: Server) -> None:
    """A caller hears the greeting, and the call stays open until the caller hangs up."""
    async with dial(server.url) as phone:
        await hears(phone, noise(GREETING))
        await phone.hang_up()
    assert phone.ws.close_code == 1000
    line = await ended(server, phone)
    assert re.search(
        r"INFO call \w+ ended: hung up; queued \d+ ms, first byte \d+ ms, first frame \d+ ms; "
        r"sent (\d\.\d) s, heard \1 s$",
        line,
    )
    assert f"INFO call {phone.call_sid} started" in server.log


async def test_parameters(server: Server) -> None:
    """The TwiML's text and model are used instead of the settings."""
    async with dial(server.url, parameters={"text": "Guten Tag.", "model": "aura-2-lara-de"}) as p:
        await hears(p, noise("Guten Tag.", "aura-2-lara-de"))


async def test_default_script(deepgram: Deepgram) -> None:
    """The module on its own says the greeting, or the TwiML's text."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, MODULE) as server:
        async with dial(server.url) as phone:
            await hears(phone, noise(GREETING))
        async with dial(server.url, parameters={"text": "Another text."}) as phone:
            await hears(phone, noise("Another text."))


async def test_awkward_parameters(server: Server) -> None:
    """A parameter that is called like Twilio's media does not hide a start."""
    async with dial(server.url, parameters={"text": "Hm.", "event": "media", "payload": "x"}) as p:
        await hears(p, noise("Hm."))


@pytest.mark.parametrize("times", [1, 120])
async def test_text_is_not_logged(closes_after_speech: Server, times: int) -> None:
    """What is said to a caller, in one piece or in several, is not logged, not even at DEBUG."""
    text = "Between you and me. " * times
    async with dial(closes_after_speech.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1000
    await ended(closes_after_speech, phone)
    assert "Between you and me" not in closes_after_speech.log


async def test_caller_is_not_listened_to(server: Server) -> None:
    """The caller's voice, before, during and after the speech, changes nothing."""
    async with dial(server.url, start=False) as phone:
        await phone.start()
        await phone.voice(50)
        await hears(phone, noise(GREETING))
        await phone.voice(50)
        await phone.hang_up()
    assert f"{phone.call_sid}: ignored" not in server.log


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_streaming(server: Server, deepgram: Deepgram, framing: str) -> None:
    """The first frame leaves before the body has ended, in whole frames but the last."""
    go = asyncio.Event()
    audio = noise(framing) + b"odd"
    answer = Answer(audio, framing=framing, write_sizes=(1001, 333, 1), gate=go)
    text = deepgram.answer(f"streamed, {framing}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until(lambda: len(phone.received) == 960)
        go.set()
        await hears(phone, audio)
        assert [size for size in phone.media_sizes[:-1] if size % 160] == []


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("sizes", [(1,), (159,), (161,), (3, 1, 70_000)])
async def test_every_byte(
    server: Server, deepgram: Deepgram, framing: str, sizes: tuple[int, ...]
) -> None:
    """Every byte arrives, in order, once, whatever the sizes of Deepgram's chunks."""
    text = deepgram.answer(
        f"every byte {framing} {sizes}", Answer(framing=framing, write_sizes=sizes)
    )
    async with dial(server.url, parameters={"text": text}) as phone:
        await hears(phone, noise(text))


async def test_less_than_a_frame(server: Server, deepgram: Deepgram) -> None:
    """Speech of less than 20 ms is heard, too."""
    text = deepgram.answer("tick", Answer(b"12345"))
    async with dial(server.url, parameters={"text": text}) as phone:
        await hears(phone, b"12345")
        assert phone.media_sizes == [5]


def sentences(number: int) -> tuple[str, list[str]]:
    """Return a text of so many pieces, and the pieces."""
    words = [f"This is sentence number {n:03} of so many." for n in range(number * 50)]
    pieces = [" ".join(words[at : at + 50]) for at in range(0, number * 50, 50)]
    assert len(pieces[0]) == 1999
    return " ".join(pieces), pieces


async def test_long_text(server: Server, deepgram: Deepgram) -> None:
    """A text of over 2000 characters is asked for in pieces, the next one ahead, heard in order."""
    text, pieces = sentences(4)
    go = asyncio.Event()
    deepgram.answer(pieces[0], Answer(gate=go))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_sound()
        await deepgram.until_asked(pieces[1])  # while the first is still being spoken
        assert not deepgram.asked(pieces[2])
        go.set()
        await hears(phone, b"".join(map(noise, pieces)))
        assert len(phone.named("mark")) == 1
    assert [len(deepgram.asked(piece)) for piece in pieces] == [1, 1, 1, 1]


async def test_small_messages(server: Server, deepgram: Deepgram) -> None:
    """A message has at most 0.4 s of audio: on a slow link, too, the first is soon through."""
    text = deepgram.answer("in small messages", Answer(noise("small") * 9, write_sizes=(30_000,)))
    async with dial(server.url, parameters={"text": text}) as phone:
        await hears(phone, noise("small") * 9)
    assert max(phone.media_sizes) == 3200


async def test_nothing_to_say(closes_after_speech: Server, deepgram: Deepgram) -> None:
    """White space is nothing to say: Deepgram is not asked, and the call goes on."""
    async with dial(closes_after_speech.url, parameters={"text": " \n "}) as phone:
        assert await phone.until_closed() == 1000
        assert phone.received == b""
    assert not [request for request in deepgram.requests if not request.text.strip()]


async def test_close_after_speech(closes_after_speech: Server) -> None:
    """With CLOSE_AFTER_SPEECH the call is closed, but not before all has been heard."""
    async with dial(closes_after_speech.url) as phone:
        assert await phone.until_closed() == 1000
        assert phone.heard == noise(GREETING)
    assert "ended: completed;" in await ended(closes_after_speech, phone)


async def test_mark_never_returns(deepgram: Deepgram) -> None:
    """A mark that never returns is not waited for longer than the audio and a little more."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, MARK_GRACE_SECONDS=0.5, MAX_SILENCE_SECONDS=1000) as server,
        dial(server.url, returns_marks=False, speed=1) as phone,
    ):
        assert await phone.until_closed() == 1000
        assert phone.heard == phone.received == noise(GREETING)
        mark_at, closed_at = phone.times[-1], asyncio.get_running_loop().time()
        assert closed_at - mark_at >= 0.5
        assert "heard 0.0 s" in await ended(server, phone)  # for all that is known


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


async def test_not_too_far_ahead(deepgram: Deepgram) -> None:
    """Twilio is sent little ahead of what plays, so that a `clear` never queues behind much."""
    sound = noise("far") * 12
    text = deepgram.answer("far ahead", Answer(sound[:32_000], write_sizes=(32_000,)))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, MAX_BUFFERED_SECONDS=1.0) as server,
        dial(server.url, parameters={"text": text}) as phone,
    ):
        await hears(phone, sound[:32_000])
        sent_seconds = 0.0
        for size, at in zip(phone.media_sizes, phone.times, strict=False):  # without the mark
            sent_seconds += size / 8000
            assert sent_seconds - (at - phone.times[0]) <= 1.4  # MAX_BUFFERED_SECONDS and a message


async def test_too_long_in_the_queue(deepgram: Deepgram) -> None:
    """Who would wait in silence for too long hears the <Say>, whatever is to blame."""
    go = asyncio.Event()
    greeting = deepgram.answer("takes its time", Answer(gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    async with Server(settings, MAX_SILENCE_SECONDS=1) as server:
        await deepgram.until_asked(greeting)
        async with dial(server.url, parameters={"text": "never begun"}) as phone:
            assert await phone.until_closed() == 1011
            assert phone.received == b""
        assert "no audio for 1 s; queued -," in await ended(server, phone)
    go.set()
    assert not deepgram.asked("never begun")


async def test_deadlines(deepgram: Deepgram) -> None:
    """Without a start a call ends before one that hears nothing, if its time-out is shorter."""
    text = deepgram.answer("says nothing", Answer(stop_after=-1, failure="stall"))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, START_SECONDS=1, MAX_SILENCE_SECONDS=4) as server,
        dial(server.url, start=False) as no_start,
        dial(server.url, parameters={"text": text}) as silent,
    ):
        assert await no_start.until_closed() == 1008
        assert not server.lines(f"{silent.call_sid} ended")  # both clocks are the server's
        assert await silent.until_closed() == 1011


async def test_audio_is_not_kept(deepgram: Deepgram) -> None:
    """A call that stays open keeps nothing of what was said on it, beside the cache."""
    sound = noise("two minutes") * 300
    go = asyncio.Event()
    text = deepgram.answer("two minutes", Answer(sound[:960_000], write_sizes=(96_000,), gate=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "0", "DEEPGRAM_CONCURRENCY": "30"}
    async with (
        Server(settings, MAX_BUFFERED_SECONDS=1e9, flags=()) as server,
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
            await hears(phone, sound[:960_000])
        assert process.memory_info().rss - before < 15 * 2**20  # of 29 MB of audio


CHECK_GARBAGE_COLLECTOR = """
import gc

async def script(call):
    yield f"Is it frozen? {gc.get_freeze_count() > 10_000}"
"""


async def test_garbage_collector(deepgram: Deepgram) -> None:
    """What was imported is not searched for garbage when calls come: that takes 45 ms."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, CHECK_GARBAGE_COLLECTOR) as server,
        dial(server.url) as phone,
    ):
        await hears(phone, noise("Is it frozen? True"))


# Keys


async def test_key_while_sending(closes_after_speech: Server, deepgram: Deepgram) -> None:
    """A key press stops the sending, then clears; what Deepgram sends later is not passed on."""
    go = asyncio.Event()
    text = deepgram.answer("interrupted in the middle", Answer(gate=go))
    async with dial(closes_after_speech.url, parameters={"text": text}) as phone:
        await phone.until_sound()
        await phone.press("5")
        assert await phone.until_closed() == 1000
        assert phone.events[-1] == ("clear", "")
        assert phone.named("mark") == []
    go.set()
    async with dial(closes_after_speech.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_key_amid_much_to_send(closes_after_speech: Server, deepgram: Deepgram) -> None:
    """However much is ready to be sent, the clear comes last: what came after it would be heard."""
    text = deepgram.answer("much to send", Answer(noise("much") * 480, write_sizes=(100_000,)))
    async with dial(closes_after_speech.url, parameters={"text": text}, speed=1) as phone:
        await phone.until_sound()
        await phone.press("5")
        assert await phone.until_closed() == 1000
        assert phone.events[-1] == ("clear", "")
    assert len(deepgram.asked(text)) == 1


async def test_key_as_sound_comes(server: Server, deepgram: Deepgram) -> None:
    """The clear comes last also if the next sound comes at the same moment as the key."""

    async def call(number: int) -> None:
        sound = random.Random(number).randbytes(160_000)
        text = deepgram.answer(f"steady {number}", Answer(sound, write_sizes=(160,)))
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.until_sound()
            await asyncio.sleep(number / 1000)
            await phone.press("5")
            await phone.until(lambda: bool(phone.named("clear")))
            await phone.send("unknown")
            await server.logged(f"{phone.call_sid}: ignored")
            await phone.hang_up()
        assert phone.events[-1] == ("clear", "")

    for number in range(0, 60, 20):
        await asyncio.gather(*map(call, range(number, number + 20)))


async def test_key_while_playing(closes_after_speech: Server) -> None:
    """A key press also interrupts what has been sent and is still being played."""
    async with dial(closes_after_speech.url, speed=0.01) as phone:
        await phone.until_mark()
        await phone.press("#")
        assert await phone.until_closed() == 1000
        assert [event for event, _ in phone.events][-2:] == ["mark", "clear"]
    line = await ended(closes_after_speech, phone)
    sent, heard = re.findall(r"(\d\.\d) s", line)
    assert float(heard) < float(sent)


async def test_what_was_heard(deepgram: Deepgram) -> None:
    """What is logged as heard is what a mark confirms, else what can have played since."""
    sound = noise("heard")[:3200] * 25
    text = deepgram.answer("heard", Answer(sound, write_sizes=(80_000,)))
    async with Server({"DEEPGRAM_URL": deepgram.url}, MAX_BUFFERED_SECONDS=1e9) as server:
        async with dial(server.url, parameters={"text": text}) as quick:
            await hears(quick, sound)
            await quick.hang_up()
        assert "sent 10.0 s, heard 10.0 s" in await ended(server, quick)
        async with dial(server.url, parameters={"text": text}, speed=1) as interrupted:
            await interrupted.until_mark()
            await interrupted.until(lambda: len(interrupted.heard) >= 6400)
            await interrupted.press("1")
            await interrupted.until(lambda: interrupted.events[-1][0] == "clear")
            await interrupted.hang_up()
        line = await ended(server, interrupted)
        assert re.search(r"sent 10\.0 s, heard (0\.[89]|[1-9]\.\d) s", line)
        async with dial(server.url, parameters={"text": text}, returns_marks=False) as unmarked:
            await unmarked.until_mark()
            await unmarked.hang_up()
        assert re.search(r"sent 10\.0 s, heard \d\.\d s", await ended(server, unmarked))


async def test_key_before_speech(server: Server, deepgram: Deepgram) -> None:
    """A key pressed before there is anything to interrupt does not cost the caller the speech."""
    go = asyncio.Event()
    text = "late"
    deepgram.answer(text, Answer(noise(text), write_sizes=(1, 5000), gate=go))
    async with dial(server.url, parameters={"text": text}) as phone:
        await deepgram.until_asked(text)
        await phone.press("1")
        await phone.send("unknown")
        await server.logged(f"{phone.call_sid}: ignored")  # so the key before it has come
        go.set()
        await hears(phone, noise(text))


TWO_TEXTS = """
async def script(call):
    yield "One."
    yield "Two."
"""


async def test_key_right_after_a_mark(deepgram: Deepgram) -> None:
    """A key that comes together with a text's mark does not interrupt the text after it."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, TWO_TEXTS) as server,
        dial(server.url, returns_marks=False) as phone,
    ):
        await phone.until_mark()
        mark = {"event": "mark", "mark": {"name": phone.named("mark")[0]}}
        key = {"event": "dtmf", "dtmf": {"digit": "1"}}
        phone.ws.transport.write(callers.frame(mark) + callers.frame(key))
        await hears(phone, noise("One.") + noise("Two."))
        assert phone.named("clear") == []


MENU = '''
async def script(call):
    """Repeat each key."""
    yield "Press a key."
    while (key := await call.digit()) != "#":
        yield f"You pressed {key}."
    try:
        async with asyncio.timeout(0.01):
            await call.digit()
    except TimeoutError:
        yield "Too slow."
    yield "Bye."
'''


async def test_menu(deepgram: Deepgram) -> None:
    """A script hears keys, those pressed in mid-speech too, and goes on after each text."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}, MENU) as menu,
        dial(menu.url, speed=0.01) as phone,
    ):
        await phone.until_mark()
        await phone.press("7")  # interrupts
        await phone.until_mark(2)
        assert phone.received == noise("Press a key.") + noise("You pressed 7.")
        await phone.press("8")
        await phone.until_mark(3)
        await phone.press("#")
        await phone.until_mark(4)
        await phone.press("1")
        await phone.until_mark(5)
        await phone.press("2")
        assert await phone.until_closed() == 1000
        texts = ["Press a key.", "You pressed 7.", "You pressed 8.", "Too slow.", "Bye."]
        assert phone.received == b"".join(map(noise, texts))
        assert len(phone.named("clear")) == 5


COUNT = """
async def script(call):
    yield "Press keys."
    keys = 0
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.01):
                await call.digit()
            keys += 1
    yield f"You pressed {keys} keys."
"""


async def test_keys_do_not_pile_up(deepgram: Deepgram) -> None:
    """Of the keys that no one waits for, the first hundred are remembered."""
    go = asyncio.Event()
    deepgram.answer("Press keys.", Answer(write_sizes=(1, 5000), gate=go))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, COUNT) as server,
        dial(server.url) as phone,
    ):
        for _ in range(150):
            await phone.press("1")
        await phone.send("unknown")
        await server.logged(f"{phone.call_sid}: ignored")  # so the keys before it have come
        go.set()
        await hears(phone, noise("Press keys.") + noise("You pressed 100 keys."))


BROKEN = """
async def script(call):
    yield "One."
    yield str(1 / 0)
"""


async def test_broken_script(deepgram: Deepgram) -> None:
    """A script that raises ends its own call with 1011, and the log says where it raised."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, BROKEN) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
            assert phone.heard == noise("One.")
        assert "the script failed" in await ended(server, phone)
        assert server.log.count("ZeroDivisionError") == 1


CANCELS_ITSELF = """
async def script(call):
    yield "One."
    raise asyncio.CancelledError
"""


async def test_script_that_cancels_itself(deepgram: Deepgram) -> None:
    """A script that raises CancelledError, as a task of its own may, has failed as well."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, CANCELS_ITSELF) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        assert "the script failed" in await ended(server, phone)


HANGS_AT_ITS_END = """
async def script(call):
    try:
        yield call.parameters["text"]
    finally:
        await asyncio.sleep(3600)
"""


async def test_script_that_hangs_at_its_end(deepgram: Deepgram) -> None:
    """A script whose end takes long keeps no caller in silence, and not for ever."""
    text = deepgram.answer("rejected, at an end that hangs", Answer(status=400, body=b"no"))
    async with Server(
        {"DEEPGRAM_URL": deepgram.url}, HANGS_AT_ITS_END, CLOSE_SECONDS=0.3
    ) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            assert await phone.until_closed() == 1011
            assert phone.ws.close_reason == "Deepgram answered 400"
        await ended(server, phone)
        async with dial(server.url, parameters={"text": "hung up"}) as phone:
            await phone.until_sound()
            await phone.hang_up()
        assert "ended: hung up" in await ended(server, phone)


TIDIES_UP = """
async def script(call):
    try:
        yield call.parameters["text"]
    finally:
        await asyncio.sleep(0.1)
        print(call.sid, "is tidied up", file=sys.stderr, flush=True)
"""


async def test_script_has_time_to_end(deepgram: Deepgram) -> None:
    """When Deepgram fails or the caller hangs up, a script may do something at its end."""
    text = deepgram.answer("rejected, and tidied up", Answer(status=400, body=b"no"))
    async with Server({"DEEPGRAM_URL": deepgram.url}, TIDIES_UP) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            assert await phone.until_closed() == 1011
        await server.logged(f"{phone.call_sid} is tidied up")
        async with dial(server.url, parameters={"text": "hung up, and tidied up"}) as phone:
            await phone.until_sound()
            await phone.hang_up()
        await server.logged(f"{phone.call_sid} is tidied up")


WAITS_WITH_A_TIME_OUT = """
async def script(call):
    while await asyncio.wait_for(call.digit(), 1000) != "#":
        yield "Not pound."
    while await asyncio.wait_for(call.digit(), 1000):
        pass
"""


async def test_key_and_hang_up_at_once(deepgram: Deepgram) -> None:
    """A hang-up ends a call though Python 3.11's wait_for() takes the key and not the cancel."""
    key = {"event": "dtmf", "dtmf": {"digit": "#"}}
    async with Server(
        {"DEEPGRAM_URL": deepgram.url}, WAITS_WITH_A_TIME_OUT, CLOSE_SECONDS=0.3
    ) as server:
        async with dial(server.url) as phone:
            await server.logged(f"{phone.call_sid} started")
            phone.ws.transport.write(callers.frame(key) + callers.STOP)
            assert await phone.until_closed() == 1000
        assert "ended: hung up" in await ended(server, phone)


HAS_A_TASK_GROUP = """
async def look_up():
    await asyncio.sleep(0.1)
    raise ValueError("the database is gone")

async def script(call):
    async with asyncio.TaskGroup() as group:
        group.create_task(look_up())
        yield "One moment."
        await call.digit()
"""


async def test_script_whose_task_group_fails(deepgram: Deepgram) -> None:
    """What a script's task group raises is the script's failure, with its traceback."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, HAS_A_TASK_GROUP) as server:
        async with dial(server.url, speed=0.1) as phone:
            assert await phone.until_closed() == 1011
            assert phone.ws.close_reason == "the script failed"
        assert "the script failed" in await ended(server, phone)
        assert server.log.count("ValueError: the database is gone") == 1


@pytest.mark.parametrize("value", ["None", "b'bytes'", "7", "['a list']"])
async def test_no_text(deepgram: Deepgram, value: str) -> None:
    """A script that yields what is no text fails with a sentence that says what it may yield."""
    script = f"async def script(call):\n    yield {value}\n"
    async with Server({"DEEPGRAM_URL": deepgram.url}, script) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        assert await server.logged("a script yields str or async iterables of str, not ")
        assert "the script failed" in await ended(server, phone)


# Hang-up

MOMENTS = ["connected", "started", "speaking", "heard"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["stop", "stop only", "close", "drop"])
async def test_hang_up(server: Server, deepgram: Deepgram, moment: str, how: str) -> None:
    """A hang-up at any moment, in any way, ends the call quietly, and the next one works."""
    go = asyncio.Event()
    text = f"hang-up {moment} {how}"
    deepgram.answer(
        text, Answer(write_sizes=(1, 1000) if moment == "started" else (1000,), gate=go)
    )
    lines = len(server.log.splitlines())
    async with dial(server.url, start=False) as phone:
        if moment != "connected":
            await phone.start(text=text)
            await deepgram.until_asked(text)
        if moment == "speaking":
            await phone.until_sound()
        if moment == "heard":
            go.set()
            await phone.until_heard(noise(text))
        match how:
            case "drop":
                phone.drop()
            case "stop only":
                await phone.send("stop", stop={"callSid": phone.call_sid})
                assert await phone.until_closed() == 1000
            case _:
                await phone.hang_up(stop=how == "stop")
        await server.until(lambda: "ended: hung up" in "\n".join(server.log.splitlines()[lines:]))
    go.set()
    said = server.log.splitlines()[lines:]
    assert not [line for line in said if not re.search(" INFO .*(started|ended)", line)]
    async with dial(server.url) as phone:
        await hears(phone, noise(GREETING))


# Many


async def test_hundred_calls(server: Server, deepgram: Deepgram) -> None:
    """A hundred calls at once each hear their own text, while Deepgram is asked 15 at once."""
    go = asyncio.Event()
    texts = [f"You are caller number {number}." for number in range(100)]
    deepgram.most_under_way = 0

    async def call(text: str) -> None:
        deepgram.answer(text, Answer(gate=go))
        async with dial(server.url, parameters={"text": text}) as phone:
            await hears(phone, noise(text))

    async with asyncio.TaskGroup() as callers:
        for text in texts:
            callers.create_task(call(text))
        await deepgram.until(lambda: deepgram.under_way == 15)
        go.set()
    assert deepgram.most_under_way == 15


async def test_no_call_waits_for_another(server: Server, deepgram: Deepgram) -> None:
    """While Deepgram keeps fourteen callers waiting, others are served."""
    go = asyncio.Event()
    texts = [
        deepgram.answer(f"slow {number}", Answer(write_sizes=(1, 5000), gate=go))
        for number in range(14)
    ]

    async def call(text: str) -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            await hears(phone, noise(text))

    slow = [asyncio.create_task(call(text)) for text in texts]
    for text in texts:
        await deepgram.until_asked(text)
    await asyncio.gather(*(call(f"quick {number}") for number in range(5)))
    assert not any(task.done() for task in slow)
    go.set()
    await asyncio.gather(*slow)


async def test_queue(deepgram: Deepgram) -> None:
    """More than DEEPGRAM_CONCURRENCY wait their turn; who hangs up meanwhile is not paid for."""
    go = asyncio.Event()
    first = deepgram.answer("first in the queue", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1"}) as server:
        await deepgram.until(lambda: deepgram.under_way == 0)

        def call(text: str) -> Any:
            return dial(server.url, parameters={"text": text})

        async with call(first) as one, call("second, gone") as two, call("third") as three:
            await one.until_sound()
            await server.logged(f"{two.call_sid} started")
            await server.logged(f"{three.call_sid} started")
            await two.hang_up()
            await ended(server, two)
            assert not deepgram.asked("third")
            go.set()
            await hears(three, noise("third"))
            await three.hang_up()
            assert not re.search(r"queued 0 ms", await ended(server, three))
    assert not deepgram.asked("second, gone")


async def test_long_text_given_up(deepgram: Deepgram) -> None:
    """Of a long text whose caller hangs up, none of the pieces that wait is asked for."""
    go = asyncio.Event()
    first = deepgram.answer("in front of a long text", Answer(gate=go))
    text, pieces = sentences(3)
    text, pieces = text.replace("This", "That"), [piece.replace("This", "That") for piece in pieces]
    async with Server({"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "1"}) as server:
        await deepgram.until(lambda: deepgram.under_way == 0)

        def call(text: str) -> Any:
            return dial(server.url, parameters={"text": text})

        async with call(first) as one, call(text) as two:
            await one.until_sound()
            await server.logged(f"{two.call_sid} started")
            await two.hang_up()
            await ended(server, two)
            async with call("behind a long text") as three:
                await server.logged(f"{three.call_sid} started")
                go.set()
                await hears(three, noise("behind a long text"))
    assert not any(map(deepgram.asked, pieces))


async def test_first_come_first_served(deepgram: Deepgram) -> None:
    """Texts that wait for their turn are asked for in the order in which they were wanted."""
    go = asyncio.Event()
    greeting = deepgram.answer("in front of the queue", Answer(gate=go))
    texts = [f"number {number} in the queue" for number in range(4)]
    settings = {"DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server,
        contextlib.AsyncExitStack() as calls,
    ):
        await deepgram.until_asked(greeting)
        phones: list[Telephone] = []
        for text in texts:
            call = dial(server.url, parameters={"text": text})
            phones.append(await calls.enter_async_context(call))
            await server.logged(f"{phones[-1].call_sid} started")
        go.set()
        for phone, text in zip(phones, texts, strict=True):
            await hears(phone, noise(text))
    assert [request.text for request in deepgram.requests if request.text in texts] == texts


async def test_queued_together(deepgram: Deepgram) -> None:
    """Who waits for the same text as another hears it, though that other has hung up."""
    go = asyncio.Event()
    greeting = deepgram.answer("in front of the two", Answer(gate=go))
    settings = {"DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    wanted = {"text": "wanted by two"}
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server,
        dial(server.url, parameters=wanted) as one,
        dial(server.url, parameters=wanted) as two,
    ):
        await deepgram.until_asked(greeting)
        await server.logged(f"{one.call_sid} started")
        await server.logged(f"{two.call_sid} started")
        await one.hang_up()
        await ended(server, one)
        go.set()
        await hears(two, noise("wanted by two"))
    assert len(deepgram.asked("wanted by two")) == 1
