"""What a key press does to a call: it interrupts the speech, and the script hears it."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.standins.deepgram import Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import dial, frame

TELLS_KEYS = """
async def tell(call):
    while True:
        print(call.sid, "pressed", await call.digit(), flush=True)

async def script(call):
    telling = asyncio.create_task(tell(call))
    yield call.parameters["text"]
"""


@pytest_asyncio.fixture(scope="module")
async def tells_keys(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server whose script says a text, and prints each key as soon as it has come."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, TELLS_KEYS) as running:
        yield running


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
            await phone.hang_up()  # after which no more can come
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


async def test_key_before_speech(tells_keys: Server, deepgram: Deepgram) -> None:
    """A key pressed before there is anything to interrupt does not cost the caller the speech."""
    go = asyncio.Event()
    text = deepgram.answer("late", Answer(noise("late"), write_sizes=(1, 5000), gate=go))
    async with dial(tells_keys.url, parameters={"text": text}) as phone:
        await deepgram.until_asked(text)
        await phone.press("1")
        await tells_keys.until(lambda: f"{phone.call_sid} pressed 1\n" in tells_keys.output)
        go.set()
        await phone.hears(noise(text))


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
        phone.ws.transport.write(frame(mark) + frame(key))
        await phone.hears(noise("One.") + noise("Two."))
        assert phone.named("clear") == []


async def test_many_keys(tells_keys: Server, deepgram: Deepgram) -> None:
    """However many keys were pressed before, the first one in the speech interrupts it."""
    go = asyncio.Event()
    text = deepgram.answer("many keys", Answer(write_sizes=(1, 5000), gate=go))
    async with dial(tells_keys.url, parameters={"text": text}, speed=0.01) as phone:
        for _ in range(300):
            await phone.press("1")
        await phone.press("9")
        await tells_keys.until(lambda: f"{phone.call_sid} pressed 9\n" in tells_keys.output)
        go.set()
        await phone.until_mark()
        await phone.press("1")
        await phone.until(lambda: phone.events[-1] == ("clear", ""))
