"""What a script can do, and what becomes of one that fails."""

import asyncio

import pytest

from tests.standins.deepgram import GREETING, Answer, Deepgram, noise, said
from tests.standins.process import MODULE, Server
from tests.standins.telephone import dial


async def test_default_script(deepgram: Deepgram) -> None:
    """The module on its own says the greeting, or the TwiML's text."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, MODULE) as server:
        async with dial(server.url) as phone:
            await phone.hears(noise(GREETING))
        async with dial(server.url, parameters={"text": "Another text."}) as phone:
            await phone.hears(noise("Another text."))


MENU = '''
async def script(call):
    """Repeat each key."""
    yield "Press a key."
    while (key := await call.digit()) != "#":
        yield f"You pressed {key}."
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
        await phone.press("2")
        assert await phone.until_closed() == 1000
        assert phone.received == said("Press a key.", "You pressed 7.", "You pressed 8.", "Bye.")
        assert len(phone.named("clear")) == 4


COUNT = """
async def script(call):
    yield "Press keys."
    keys = 0
    while await call.digit(0):
        keys += 1
    yield f"You pressed {keys} keys."
"""


async def test_keys_do_not_pile_up(deepgram: Deepgram) -> None:
    """Of the keys that no one waits for, the last hundred are remembered."""
    go = asyncio.Event()
    deepgram.answer("Press keys.", Answer(write_sizes=(1, 5000), gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}, COUNT) as server, dial(server.url) as phone:
        for _ in range(150):
            await phone.press("1")
        await phone.ws.send("x" * 1000)  # so that the keys before it have come
        await server.logged("ignored an unexpected message")
        go.set()
        await phone.hears(said("Press keys.", "You pressed 100 keys."))


TIMES_OUT = """
async def script(call):
    yield f"After 0.2 s: {await call.digit(0.2)!r}."
    yield f"At once: {await call.digit(0)!r}."
    yield f"A key: {await call.digit(1000)}."
    yield f"Without a number: {await call.digit()}."
"""


async def test_digit_with_a_time_out(deepgram: Deepgram) -> None:
    """A script that waits so many seconds for a key gets "" if none comes, else the key."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, TIMES_OUT) as server,
        dial(server.url) as phone,
    ):
        await phone.until_returned(2)
        await phone.press("7")
        await phone.until_returned(3)
        await phone.press("8")
        texts = "After 0.2 s: ''.", "At once: ''.", "A key: 7.", "Without a number: 8."
        await phone.hears(said(*texts))


TWO_WAIT = """
async def script(call):
    waiting = [asyncio.create_task(call.digit()) for _ in range(2)]
    yield "Press two keys."
    yield " and ".join([await task for task in waiting])
"""


async def test_two_tasks_wait_for_a_digit(deepgram: Deepgram) -> None:
    """Two tasks of a script may wait for a key at once: each key goes to one of them."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, TWO_WAIT) as server,
        dial(server.url) as phone,
    ):
        await phone.until_returned()
        await phone.press("4")
        await phone.press("5")
        await phone.hears(said("Press two keys.", "4 and 5"))


CHANGES_VOICE = """
async def script(call):
    yield f"I am {call.model}."
    call.model = "aura-2-lara-de"
    yield "Und ich bin Lara."
"""


@pytest.mark.parametrize("model", ["aura-asteria-en", "aura-2-thalia-en"])
async def test_model(deepgram: Deepgram, model: str) -> None:
    """The voice is the TwiML's or the setting's; the script may change it between texts."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, CHANGES_VOICE) as server:
        parameters = {"model": model} if model != "aura-asteria-en" else {}
        async with dial(server.url, parameters=parameters) as phone:
            first = noise(f"I am {model}.", model)
            await phone.hears(first + noise("Und ich bin Lara.", "aura-2-lara-de"))


CHOOSES_ITS_END = """
async def script(call):
    yield "Press a key."
    call.close_after_speech = await call.digit() == "1"
"""


@pytest.mark.parametrize("setting", ["yes", "no"])
async def test_close_after_speech(deepgram: Deepgram, setting: str) -> None:
    """A script decides, whatever the setting, whether the TwiML goes on when it returns."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": setting}
    async with Server(settings, CHOOSES_ITS_END) as server:
        async with dial(server.url) as stays, dial(server.url) as closes:
            for phone, key in (stays, "2"), (closes, "1"):
                await phone.until_returned()
                await phone.press(key)
            assert await closes.until_closed() == 1000
            assert not stays.has_ended
            await stays.hang_up()
        assert (await server.until_ended(closes.call_sid)).startswith("completed;")
        assert (await server.until_ended(stays.call_sid)).startswith("hung up;")


# Scripts that fail


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
        assert server.log.count("ZeroDivisionError") == 1


CANCELS_ITSELF = """
async def script(call):
    yield "One."
    raise asyncio.CancelledError
"""


async def test_script_that_cancels_itself(deepgram: Deepgram) -> None:
    """A script that raises CancelledError, as a task of its own may, has failed as well."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, CANCELS_ITSELF) as server,
        dial(server.url) as phone,
    ):
        assert await phone.until_closed() == 1011


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


async def test_script_has_time_to_end_with_the_server(deepgram: Deepgram) -> None:
    """So it may when the server ends, which waits for it a little."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, TIDIES_UP) as server:
        async with dial(server.url, parameters={"text": "Until it drains."}) as phone:
            await phone.until_sound()
            server.signal()
            assert await phone.until_closed() == 1000
        assert await server.end() == 0
        assert f"{phone.call_sid} is tidied up" in server.log


FAILS_AT_ITS_END = """
async def script(call):
    try:
        yield "Hang up."
    finally:
        raise ValueError("the database is full")
"""


async def test_script_that_fails_at_its_end(deepgram: Deepgram) -> None:
    """What a script raises when the caller has hung up is in the log, too."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, FAILS_AT_ITS_END) as server:
        async with dial(server.url) as phone:
            await phone.until_sound()
            await phone.hang_up()
        assert (await server.until_ended(phone.call_sid)).startswith("hung up;")
        assert server.log.count("ValueError: the database is full") == 1


HAS_A_WEBSOCKET_OF_ITS_OWN = """
import websockets

async def script(call):
    yield "One."
    raise websockets.ConnectionClosedError(None, None)
"""


async def test_script_whose_own_websocket_closes(deepgram: Deepgram) -> None:
    """A script's websocket to a model, say, is not taken for the call's: the script has failed."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, HAS_A_WEBSOCKET_OF_ITS_OWN) as server,
        dial(server.url) as phone,
    ):
        assert await phone.until_closed() == 1011
        assert phone.ws.close_reason == "the script failed"


HANGS_AT_ITS_END = """
async def script(call):
    try:
        yield "Hang up."
    finally:
        await asyncio.sleep(3600)
"""


async def test_script_that_hangs_at_its_end(deepgram: Deepgram) -> None:
    """A script that does not end when the caller has hung up holds nothing up."""
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(settings, HANGS_AT_ITS_END, CLOSE_SECONDS=0.3) as server:
        async with dial(server.url) as phone:
            await phone.until_sound()
            await phone.hang_up()
        await server.until_ended(phone.call_sid)
        server.signal()
        assert await server.end() == 0


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
        assert server.log.count("ValueError: the database is gone") == 1


@pytest.mark.parametrize("value", ["None", "b'bytes'", "7", "['a list']"])
async def test_no_text(deepgram: Deepgram, value: str) -> None:
    """A script that yields what is no text has failed."""
    script = f"async def script(call):\n    yield {value}\n"
    async with Server({"DEEPGRAM_URL": deepgram.url}, script) as server, dial(server.url) as phone:
        assert await phone.until_closed() == 1011
        assert phone.ws.close_reason == "the script failed"
