"""What is said: the module's own script, what others can do, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from websockets import ConnectionClosedError

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import GREETING, Deepgram, noise
from tests.standins.process import MODULE, Server
from tests.standins.telephone import dial
from tests.standins.wire import Line, settle
from twilio_aura import Call, Settings

# The module's own


async def test_module(deepgram: Deepgram) -> None:
    """The module on its own says the greeting, or the TwiML's text, and the call stays open."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, MODULE) as server:
        async with dial(server.url) as phone:
            await phone.hears(noise(GREETING))
            await phone.hang_up()
        assert (await server.until_ended(phone.call_sid)).startswith("hung up;")
        async with dial(server.url, parameters={"text": "Another text."}) as phone:
            await phone.hears(noise("Another text."))


@pytest.mark.parametrize(
    ("parameters", "model", "text"),
    [
        ({}, "aura-asteria-en", GREETING),
        ({"text": "Guten Tag.", "model": "aura-2-lara-de"}, "aura-2-lara-de", "Guten Tag."),
        ({"text": "", "model": ""}, "aura-asteria-en", GREETING),  # as of an empty template
        ({"text": " \n ", "model": " "}, "aura-asteria-en", GREETING),
    ],
)
async def test_default_script(parameters: dict[str, str], model: str, text: str) -> None:
    """The module's script says the TwiML's text in the TwiML's voice, or else the settings'."""
    async with Line(twilio_aura.script, parameters) as line:
        assert await line.ended() == (1000, "completed")
        assert line.tts.pieces == [(model, text)]


# Others


async def sub_menu(call: Call) -> str:
    """Ask until a key is pressed; return it."""
    while True:
        if key := await call.ask("Which one, please?", seconds=0.02):
            return key


async def test_sub_menu() -> None:
    """A menu may stand in a function of its own, which returns the choice."""

    async def script(call: Call) -> None:
        await call.say("Welcome.")
        await call.say(f"You have chosen {await sub_menu(call)}.")

    async with Line(script) as line:
        await line.until_mark(3)  # it has been said twice
        line.press("7")
        await line.ended()
        *questions, answer = line.tts.texts[1:]
        assert set(questions) == {"Which one, please?"}
        assert answer == "You have chosen 7."


@pytest.mark.parametrize("setting", [False, True])
@pytest.mark.parametrize("key", ["1", "2"])
async def test_close_after_speech(key: str, setting: bool) -> None:
    """A script decides, whatever the setting, whether the TwiML goes on when it returns."""

    async def script(call: Call) -> None:
        call.close_after_speech = await call.digit() == "1"

    async with Line(script, settings=Settings(close_after_speech=setting)) as line:
        line.press(key)
        if key == "1":
            assert await line.ended() == (1000, "completed")
        else:
            await settle()
            assert not line.closed


async def test_script_that_returns_a_text() -> None:
    """What a script returns is not said: the log says how to say it, and the call ends as usual."""

    async def script(_: Call) -> str:
        return "Hello."

    async with Line(script) as line:
        assert await line.ended() == (1000, "completed")
        assert line.sent == []
        assert line.complaint().endswith(
            ": the script returned a str: `await call.say(text)` says it"
        )


# Failures


async def raises(call: Call) -> None:
    """Say something, and then fail."""
    await call.say("One.")
    await call.say(str(1 / 0))


async def cancels_itself(call: Call) -> None:
    """Say something, and then raise what a task of its own may raise."""
    await call.say("One.")
    raise asyncio.CancelledError


async def has_a_websocket_of_its_own(call: Call) -> None:
    """Say something, and then raise what a websocket to a model does: it is not the call's."""
    await call.say("One.")
    raise ConnectionClosedError(None, None)


async def has_a_task_group(call: Call) -> None:
    """Say something, and wait for a key, while a task of the same group fails."""

    async def look_up() -> None:
        await asyncio.sleep(0.1)
        raise LookupError("the database is gone")

    async with asyncio.TaskGroup() as group:
        group.create_task(look_up())
        await call.say("One.")
        await call.digit()


async def exits(call: Call) -> None:
    """Say something, and then end the server, as it seems."""
    await call.say("One.")
    raise SystemExit(1)


async def interrupts(call: Call) -> None:
    """Say something, and then do as Ctrl-C does."""
    await call.say("One.")
    raise KeyboardInterrupt


async def speaks_a_text_that_exits(call: Call) -> None:
    """Say something, and then a text that ends the server, as it seems."""

    async def text() -> AsyncIterator[str]:
        yield ""
        raise SystemExit(1)

    await call.say("One.")
    await call.say(text())


async def speaks_a_text_that_interrupts(call: Call) -> None:
    """Say something, and then a text that does as Ctrl-C does."""

    async def text() -> AsyncIterator[str]:
        yield ""
        raise KeyboardInterrupt

    await call.say("One.")
    await call.say(text())


async def says_no_text(call: Call) -> None:
    """Say something, and then nothing that could be said."""
    await call.say("One.")
    await call.say(None)  # type: ignore[arg-type]


FAILING: list[tuple[Callable[[Call], Coroutine[Any, Any, None]], str, str]] = [
    (raises, "await call.say(str(1 / 0))", "ZeroDivisionError: division by zero"),
    (cancels_itself, "raise asyncio.CancelledError", "CancelledError"),
    (has_a_websocket_of_its_own, "raise ConnectionClosedError", "no close frame received or sent"),
    (has_a_task_group, "raise LookupError", "LookupError: the database is gone"),
    (exits, "raise SystemExit", "SystemExit: 1"),
    (interrupts, "raise KeyboardInterrupt", "KeyboardInterrupt"),
    (speaks_a_text_that_exits, "raise SystemExit", "SystemExit: 1"),
    (speaks_a_text_that_interrupts, "raise KeyboardInterrupt", "KeyboardInterrupt"),
    (says_no_text, "await call.say(None)", "async iterable of str, not NoneType"),
]


@pytest.mark.parametrize(("script", "line_of_code", "error"), FAILING)
async def test_script_that_fails(
    script: Callable[[Call], Coroutine[Any, Any, None]], line_of_code: str, error: str
) -> None:
    """A script that raises ends its own call with 1011; the log has its traceback, once."""
    async with Line(script) as line:
        assert await line.ended() == (1011, "the script failed")
        assert line.audio == noise("One.")
        complaint = line.complaint()
        assert complaint.startswith(f"ERROR call {line.call_sid}: the script failed\n")
        assert error in complaint
        assert f'File "{__file__}"' in complaint
        assert line_of_code in complaint


# What a script does at its end


@pytest.mark.parametrize("how", ["hang-up", "failure", "drain", "cut-off"])
async def test_script_has_time_to_end(how: str) -> None:
    """Whatever ends a call, its script may do something at its end, which is waited for."""
    tidied_up = []

    async def script(call: Call) -> None:
        try:
            await call.say("One.")
            await call.say("Two.")
        finally:
            await asyncio.sleep(0.05)
            tidied_up.append(True)

    async with Line(script, returns_marks=False) as line:
        line.tts.fails("Two.", "Deepgram answered 400")
        await line.until_mark()
        match how:
            case "hang-up":
                line.stop()
            case "failure":
                line.returns_marks = True
                line.return_marks()
            case "drain":
                line.call.drain()
                line.return_marks()
            case _:
                line.call.end(1001, "cut off by shutdown")
        code, _ = await line.ended()
        assert code == {"failure": 1011, "cut-off": 1001}.get(how, 1000)
        assert tidied_up == [True]


async def test_script_that_fails_at_its_end() -> None:
    """What a script raises when the caller has hung up is in the log, too."""

    async def script(call: Call) -> None:
        try:
            await call.say("Hang up.")
        finally:
            raise ValueError("the database is full")

    async with Line(script, returns_marks=False) as line:
        await line.until_mark()
        line.stop()
        assert await line.ended() == (1000, "hung up")
        assert line.complaint().endswith("\nValueError: the database is full")


AFTER_THE_END: dict[str, Callable[[Call], Coroutine[Any, Any, object]]] = {
    "say": lambda call: call.say("Never said."),
    "ask": lambda call: call.ask("Never said."),
    "ask, a key waiting": lambda call: call.ask("Never said.", seconds=0),
    "digit": lambda call: call.digit(),
    "digit(0)": lambda call: call.digit(0),
    "hang_up": lambda call: call.hang_up(),
    "redirect": lambda call: call.redirect("<Response/>"),
}


@pytest.mark.parametrize("verb", AFTER_THE_END)
async def test_script_that_catches_everything(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its call has ended, a script that goes on gets nothing done, and the log names it."""
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 0.3)
    posted: list[object] = []
    monkeypatch.setattr(twilio_aura, "post_twiml", lambda *arguments: posted.append(arguments))
    caught: list[BaseException] = []
    enough = asyncio.Event()
    performers: list[asyncio.Task[Any] | None] = []

    async def script(call: Call) -> None:
        performers.append(asyncio.current_task())
        await call.say("Hang up.")
        while not enough.is_set() and len(caught) < 1000:
            try:
                await (AFTER_THE_END[verb] if caught else Call.digit)(call)
            except BaseException as error:
                caught.append(error)
        raise asyncio.CancelledError

    try:
        async with Line(script, settings=Settings(twilio_auth_token="12345")) as line:
            await line.until_mark()
            await settle()
            if verb == "ask, a key waiting":
                line.press("1")
                line.press("2")
            line.stop()
            assert await line.ended() == (1000, "hung up")
            assert len(caught) < 10  # It does not keep the event loop busy.
            await poll(lambda: len(caught) > 1)
            assert {type(error) for error in caught} == {asyncio.CancelledError}
            assert line.complaint() == (
                f"WARNING call {line.call_sid}: "
                "its script goes on: it has to let asyncio.CancelledError pass"
            )
            assert line.tts.texts == ["Hang up."]
            assert line.story == "media mark"
            assert posted == []
            enough.set()
            await asyncio.wait([task for task in performers if task])
    finally:
        enough.set()  # Else it would go on for ever.


async def test_script_that_swallows_its_end() -> None:
    """A script that catches its cancellation, and then returns, is over with its call."""

    async def script(call: Call) -> None:
        with suppress(BaseException):
            await call.digit()

    async with Line(script, settings=Settings()) as line:
        await settle()
        line.stop()
        assert await line.ended() == (1000, "hung up")


async def test_script_that_hangs_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script whose end hangs when the caller has hung up holds nothing up."""
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 0.05)
    goes_on = asyncio.Event()

    async def script(call: Call) -> None:
        try:
            await call.say("Hang up.")
        finally:
            await goes_on.wait()

    async with Line(script, returns_marks=False) as line:
        await line.until_mark()
        line.stop()
        assert await line.ended() == (1000, "hung up")
        assert "its script goes on" in line.complaint()
        goes_on.set()
