"""A call from its start to its end, as the caller, the script and the log see it."""

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.deepgram import Answer, Deepgram, noise
from tests.server import Server, edited
from tests.telephone import Telephone, dial

GREETING = "Hello, how are you today?"


async def hears(phone: Telephone, audio: bytes) -> None:
    """Wait until `audio` was heard, byte for byte, no less and no more."""
    await phone.until_heard(audio)
    assert phone.heard == phone.sent == audio


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


async def test_awkward_parameters(server: Server, deepgram: Deepgram) -> None:
    """What no one can speak is left out of a text, and a nested `media` does not hide a start."""
    text = "a\x00b\ud800c\x1b"
    async with dial(server.url, parameters={"text": text, "event": "media", "payload": "x"}) as p:
        await hears(p, noise("a b c"))
    assert deepgram.asked("a b c")


async def test_text_is_not_logged(server: Server) -> None:
    """What is said to a caller is nobody else's business: the log does not have it."""
    async with dial(server.url, parameters={"text": "Between you and me."}) as phone:
        await hears(phone, noise("Between you and me."))
        await phone.hang_up()
    await ended(server, phone)
    assert "Between you and me" not in server.log


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
    """The first frame leaves before the body has ended, in whole frames but for the last."""
    go = asyncio.Event()
    audio = noise(framing) + b"odd"
    answer = Answer(audio, framing=framing, pieces=(1001, 333, 1), hold=go)
    text = deepgram.answer(f"streamed, {framing}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until(lambda: len(phone.sent) == 960)
        go.set()
        await hears(phone, audio)
        assert [size for size in phone.frames[:-1] if size % 160] == []


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("pieces", [(1,), (159,), (161,), (3, 1, 70_000)])
async def test_every_byte(
    server: Server, deepgram: Deepgram, framing: str, pieces: tuple[int, ...]
) -> None:
    """Every byte arrives, in order, once, whatever the sizes of Deepgram's chunks."""
    text = deepgram.answer(f"every byte {framing} {pieces}", Answer(framing=framing, pieces=pieces))
    async with dial(server.url, parameters={"text": text}) as phone:
        await hears(phone, noise(text))


async def test_less_than_a_frame(server: Server, deepgram: Deepgram) -> None:
    """Speech of less than 20 ms is heard, too."""
    text = deepgram.answer("tick", Answer(b"12345"))
    async with dial(server.url, parameters={"text": text}) as phone:
        await hears(phone, b"12345")
        assert phone.frames == [5]


async def test_long_text(server: Server, deepgram: Deepgram) -> None:
    """A text of over 2000 characters is asked for in pieces, the next one ahead, heard in order."""
    sentences = [f"This is sentence number {number:03} of so many." for number in range(200)]
    pieces = [" ".join(sentences[at : at + 50]) for at in range(0, 200, 50)]
    assert len(pieces[0]) == 1999
    go = asyncio.Event()
    deepgram.answer(pieces[0], Answer(hold=go))
    async with dial(server.url, parameters={"text": " ".join(sentences)}) as phone:
        await phone.until_sound()
        await deepgram.until_asked(pieces[1])  # while the first is still being spoken
        assert not deepgram.asked(pieces[2])
        go.set()
        await hears(phone, b"".join(map(noise, pieces)))
        assert len(phone.named("mark")) == 1
    assert [len(deepgram.asked(piece)) for piece in pieces] == [1, 1, 1, 1]


async def test_nothing_to_say(closing: Server, deepgram: Deepgram) -> None:
    """White space is nothing to say: Deepgram is not asked, and the call goes on."""
    async with dial(closing.url, parameters={"text": " \n "}) as phone:
        assert await phone.until_closed() == 1000
        assert phone.events == []
    assert not [request for request in deepgram.requests if not request.text.strip()]


async def test_close_after_speech(closing: Server) -> None:
    """With CLOSE_AFTER_SPEECH the call is closed, but not before all has been heard."""
    async with dial(closing.url) as phone:
        assert await phone.until_closed() == 1000
        assert phone.heard == noise(GREETING)
    assert "ended: spoken;" in await ended(closing, phone)


async def test_mark_never_returns(deepgram: Deepgram, tmp_path: Path) -> None:
    """A mark that never returns is not waited for longer than the audio and a little more."""
    module = edited(tmp_path, MARK_SECONDS=0.3, SILENCE_SECONDS=1000)
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, module=module) as server,
        dial(server.url, returns_marks=False, speed=1) as phone,
    ):
        assert await phone.until_closed() == 1000
        assert phone.heard == phone.sent == noise(GREETING)
        mark_at, closed_at = phone.times[-1], asyncio.get_running_loop().time()
        assert closed_at - mark_at >= 0.3


async def test_gap(deepgram: Deepgram, tmp_path: Path) -> None:
    """Speech with a gap in it, and longer than a silence may be, is heard to its end."""
    module = edited(tmp_path, MARK_SECONDS=0.8, SILENCE_SECONDS=2)
    go = asyncio.Event()
    sound = noise("gap") * 4
    text = deepgram.answer("a gap", Answer(sound[:12_000], pieces=(8000, 4000), hold=go))
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, module=module) as server,
        dial(server.url, parameters={"text": text}, speed=1) as phone,
    ):
        await phone.until_sound()
        await asyncio.sleep(2.2)  # after 1 s of sound
        go.set()
        assert await phone.until_closed() == 1000
        assert phone.heard == sound[:12_000]


async def test_not_too_far_ahead(deepgram: Deepgram, tmp_path: Path) -> None:
    """Twilio is not sent more ahead of what plays than it would keep."""
    sound = noise("far") * 12
    text = deepgram.answer("far ahead", Answer(sound[:32_000], pieces=(32_000,)))
    module = edited(tmp_path, AHEAD_SECONDS=0.5)
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, module=module) as server,
        dial(server.url, parameters={"text": text}) as phone,
    ):
        await hears(phone, sound[:32_000])
        sent_seconds = 0.0
        for frame, at in zip(phone.frames, phone.times, strict=False):  # without the mark
            sent_seconds += frame / 8000
            assert sent_seconds - (at - phone.times[0]) <= 3  # AHEAD_SECONDS, a message of 2 s


async def test_too_long_in_the_queue(deepgram: Deepgram, tmp_path: Path) -> None:
    """Who would wait in silence for too long hears the <Say>, whatever is to blame."""
    go = asyncio.Event()
    greeting = deepgram.answer("takes its time", Answer(hold=go))
    settings = {"DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    async with Server(
        {"DEEPGRAM_URL": deepgram.url, **settings}, module=edited(tmp_path, SILENCE_SECONDS=1)
    ) as server:
        await deepgram.until_asked(greeting)
        async with dial(server.url, parameters={"text": "never begun"}) as phone:
            assert await phone.until_closed() == 1011
            assert phone.events == []
        assert "no sound for 1 s" in await ended(server, phone)
    go.set()
    assert not deepgram.asked("never begun")


# Keys


async def test_key_while_sending(closing: Server, deepgram: Deepgram) -> None:
    """A key press stops the sending, then clears; what Deepgram sends later is not passed on."""
    go = asyncio.Event()
    text = deepgram.answer("interrupted in the middle", Answer(hold=go))
    async with dial(closing.url, parameters={"text": text}) as phone:
        await phone.until_sound()
        await phone.press("5")
        assert await phone.until_closed() == 1000
        assert phone.events[-1] == ("clear", "")
        assert phone.named("mark") == []
    go.set()
    async with dial(closing.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_key_amid_much_to_send(closing: Server, deepgram: Deepgram) -> None:
    """However much is ready to be sent, the clear comes last: what came after it would be heard."""
    text = deepgram.answer("much to send", Answer(noise("much to send") * 480, pieces=(100_000,)))
    async with dial(closing.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1000
    async with dial(closing.url, parameters={"text": text}, speed=1) as phone:
        await phone.until_sound()
        await phone.press("5")
        assert await phone.until_closed() == 1000
        assert phone.events[-1] == ("clear", "")
    assert len(deepgram.asked(text)) == 1


async def test_key_while_playing(closing: Server) -> None:
    """A key press also interrupts what has been sent and is still being played."""
    async with dial(closing.url, speed=0.01) as phone:
        await phone.until_mark()
        await phone.press("#")
        assert await phone.until_closed() == 1000
        assert [event for event, _ in phone.events] == ["media", "mark", "clear"]
    line = await ended(closing, phone)
    assert "heard 0.0 s" in line


async def test_key_before_speech(server: Server, deepgram: Deepgram) -> None:
    """A key pressed before there is anything to interrupt does not cost the caller the speech."""
    go = asyncio.Event()
    text = "late"
    deepgram.answer(text, Answer(noise(text), pieces=(1, 5000), hold=go))
    async with dial(server.url, parameters={"text": text}) as phone:
        await deepgram.until_asked(text)
        await phone.press("1")
        go.set()
        await hears(phone, noise(text))


MENU = '''
async def script(call: Call) -> AsyncGenerator[str, None]:
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


async def test_menu(deepgram: Deepgram, tmp_path: Path) -> None:
    """A script hears keys, those pressed in mid-speech too, and goes on after each text."""
    module = edited(tmp_path, MENU)
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}, module=module) as menu,
        dial(menu.url, speed=0.01) as phone,
    ):
        await phone.until_mark()
        await phone.press("7")  # interrupts
        await phone.until_mark(2)
        assert phone.sent == noise("Press a key.") + noise("You pressed 7.")
        await phone.press("8")
        await phone.until_mark(3)
        await phone.press("#")
        await phone.until_mark(4)
        await phone.press("1")
        await phone.until_mark(5)
        await phone.press("2")
        assert await phone.until_closed() == 1000
        texts = ["Press a key.", "You pressed 7.", "You pressed 8.", "Too slow.", "Bye."]
        assert phone.sent == b"".join(map(noise, texts))
        assert len(phone.named("clear")) == 5


COUNT = """
async def script(call: Call) -> AsyncGenerator[str, None]:
    yield "Press keys."
    keys = 0
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.01):
                await call.digit()
            keys += 1
    yield f"You pressed {keys} keys."
"""


async def test_keys_do_not_pile_up(deepgram: Deepgram, tmp_path: Path) -> None:
    """Of the keys that no one waits for, the first hundred are remembered."""
    go = asyncio.Event()
    deepgram.answer("Press keys.", Answer(pieces=(1, 5000), hold=go))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, module=edited(tmp_path, COUNT)) as server,
        dial(server.url) as phone,
    ):
        for _ in range(150):
            await phone.press("1")
        await phone.send("unknown")
        await server.logged(f"{phone.call_sid}: ignored")  # so the keys before it have come
        go.set()
        await hears(phone, noise("Press keys.") + noise("You pressed 100 keys."))


async def test_broken_script(deepgram: Deepgram, tmp_path: Path) -> None:
    """A script that raises ends its own call with 1011, and the log says where it raised."""
    broken = "async def script(call: Call) -> AsyncGenerator[str, None]:\n"
    module = edited(tmp_path, broken + "    yield 'One.'\n    yield str(1 / 0)\n")
    async with Server({"DEEPGRAM_URL": deepgram.url}, module=module) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
            assert phone.heard == noise("One.")
        assert await server.logged("ZeroDivisionError")
        assert "the script failed" in await ended(server, phone)


# Hang-up

MOMENTS = ["connected", "started", "speaking", "heard"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["stop", "stop only", "close", "drop"])
async def test_hang_up(server: Server, deepgram: Deepgram, moment: str, how: str) -> None:
    """A hang-up at any moment, in any way, ends the call quietly, and the next one works."""
    go = asyncio.Event()
    text = f"hang-up {moment} {how}"
    deepgram.answer(text, Answer(pieces=(1, 1000) if moment == "started" else (1000,), hold=go))
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
        deepgram.answer(text, Answer(hold=go))
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
        deepgram.answer(f"slow {number}", Answer(pieces=(1, 5000), hold=go)) for number in range(14)
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
    first = deepgram.answer("first in the queue", Answer(hold=go))
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


async def test_first_come_first_served(deepgram: Deepgram) -> None:
    """Texts that wait for their turn are asked for in the order in which they were wanted."""
    go = asyncio.Event()
    greeting = deepgram.answer("in front of the queue", Answer(hold=go))
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
    greeting = deepgram.answer("in front of the two", Answer(hold=go))
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
