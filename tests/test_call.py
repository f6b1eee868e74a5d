"""A call: what a script may do with it, what keys and Twilio's messages do to it, how it ends.

Most of it in the process, on a `Line`; at the end on sockets, with the server in its own process.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, cast

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from websockets import ConnectionClosedError, ServerConnection
from websockets.asyncio.server import serve

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise, said
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, MULAW, dial, frame
from tests.standins.wire import Line, Voice, settle
from twilio_aura import Call, Settings, SpeechFailed, TextToSpeech

STAYS_OPEN = Settings()  # when the script returns
SENTENCES = "This is the first sentence.", "And this is the second one."


async def written(*parts: str) -> AsyncIterator[str]:
    """Write a text, part after part."""
    for part in parts:
        yield part


# say


async def test_say() -> None:
    """A text has been said when its mark has returned."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("One."))
        await line.until_mark()
        await settle()
        assert not saying.done()
        line.return_marks()
        assert await saying is True
        assert line.story == "media mark"
        assert line.audio == noise("One.")


@pytest.mark.parametrize("is_written", [False, True])
async def test_say_pieces(is_written: bool) -> None:
    """Of a text of several pieces, each is heard in order, and one mark comes after them all."""
    text = " ".join(SENTENCES)
    async with Line() as line:
        assert await line.call.say(written(*text) if is_written else text)
        assert line.story == "media mark"
        assert line.audio == said(*SENTENCES)


@pytest.mark.parametrize("text", ["", " \n", "...", "😊", "*** \n ***"])
async def test_say_nothing(text: str) -> None:
    """A text without a letter or a digit has been said at once, and is not asked for."""
    async with Line() as line:
        assert await line.call.say(text)
        assert await line.call.say(written(text))
        assert line.audio == b""
        assert line.tts.pieces == []


NO_TEXTS: dict[str, Callable[[], Any]] = {
    "NoneType": lambda: None,
    "int": lambda: 42,
    "bytes": lambda: b"bytes",
    "list": lambda: ["a list"],
    "function": lambda: written,
    "coroutine": settle,
}


@pytest.mark.parametrize("kind", NO_TEXTS)
async def test_say_no_text(kind: str) -> None:
    """What is no text is a TypeError, whose words say what a text is; the script may go on."""
    value = NO_TEXTS[kind]()
    async with Line() as line:
        with pytest.raises(TypeError) as raised:
            await line.call.say(value)
        assert str(raised.value) == f"a text is a str or an async iterable of str, not {kind}"
        assert await line.call.say("It goes on.")
        assert line.audio == noise("It goes on.")
    if asyncio.iscoroutine(value):
        await value


async def test_say_beside_another() -> None:
    """A `say` beside another waits for its turn, and asks for nothing before."""
    async with Line(returns_marks=False) as line:
        both = [line.begin(line.call.say(text)) for text in ("One.", "Two.")]
        await line.until_mark()
        await settle()
        assert line.tts.texts == ["One."]
        line.returns_marks = True
        line.return_marks()
        assert await asyncio.gather(*both) == [True, True]
        assert line.story == "media mark media mark"
        assert line.audio == said("One.", "Two.")
        assert len(set(line.named("mark"))) == 2


async def test_say_in_another_voice() -> None:
    """The voice is the setting's or the TwiML's, and a script may change it between two texts."""
    for parameters, model in ({}, "aura-asteria-en"), ({"model": "aura-luna-en"}, "aura-luna-en"):
        async with Line(parameters=parameters) as line:
            await line.call.say("Hello.")
            line.call.model = "aura-2-lara-de"
            await line.call.say("Guten Tag.")
            assert line.tts.pieces == [(model, "Hello."), ("aura-2-lara-de", "Guten Tag.")]
            assert line.audio == noise("Hello.", model) + noise("Guten Tag.", "aura-2-lara-de")


# What goes wrong with a text


async def test_speech_fails() -> None:
    """What fails is raised by its `say`, once what came before was heard; the script may go on."""
    async with Line(returns_marks=False) as line:
        line.tts.fails("It fails.", "Deepgram answered 500", noise("before"))
        saying = line.begin(line.call.say("It fails."))
        await line.until_mark()
        await settle()
        assert not saying.done()
        line.returns_marks = True
        line.return_marks()
        with pytest.raises(SpeechFailed, match=r"^Deepgram answered 500$"):
            await saying
        assert await line.call.say("It goes on.")
        assert line.audio == said("before", "It goes on.")


@pytest.mark.parametrize(("letter", "size"), [("x", 123), ("é", 61)])
async def test_long_reason(letter: str, size: int) -> None:
    """A script may raise it with any reason, of which the close frame has what fits."""

    async def script(_: Call) -> None:
        raise SpeechFailed(letter * 300)

    async with Line(script) as line:
        assert await line.ended() == (1011, letter * size)


async def test_speech_of_a_written_text_fails() -> None:
    """A failure stops whoever writes the text at once, while what came before is still heard."""
    stopped = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        try:
            yield "This is a whole sentence. And half"
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with Line(returns_marks=False) as line:
        line.tts.fails("This is a whole sentence.", "Deepgram answered 500", noise("before"))
        saying = line.begin(line.call.say(text()))
        await stopped.wait()
        await line.until_mark()
        assert not saying.done()
        line.return_marks()
        with pytest.raises(SpeechFailed):
            await saying


FAILURES = [
    ValueError("the model is gone"),
    TimeoutError("the model timed out"),  # which is not the call's own
    ConnectionClosedError(None, None),  # a websocket to the model, which is not the call's
]


@pytest.mark.parametrize("failure", FAILURES, ids=[type(failure).__name__ for failure in FAILURES])
async def test_text_fails(failure: Exception) -> None:
    """What a text raises is raised by its `say`, once its complete sentences were heard."""

    async def text() -> AsyncIterator[str]:
        yield "This is a whole sentence. And half"
        raise failure

    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say(text()))
        await line.until_mark()
        await settle()
        assert not saying.done()
        line.return_marks()
        with pytest.raises(type(failure)) as raised:
            await saying
        assert raised.value is failure
        assert line.audio == noise("This is a whole sentence.")


async def test_key_after_a_text_has_failed() -> None:
    """A key that silences what came before a failure ends the text like any; the log has it."""

    async def text() -> AsyncIterator[str]:
        yield "This is a whole sentence. "
        raise ValueError("the model is gone")

    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say(text()))
        await line.until_mark()
        line.press("1")
        assert await saying is False
        assert line.story == "media mark clear"
        complaint = line.complaint()
        assert complaint.startswith(f"ERROR call {line.call_sid}: the text failed\nTraceback")
        assert complaint.endswith("ValueError: the model is gone")


@pytest.mark.parametrize("is_key", [True, False])
async def test_text_fails_when_it_is_stopped(is_key: bool) -> None:
    """What a text raises as a key or a hang-up stops it is in the log, since nobody raises it."""

    async def text() -> AsyncIterator[str]:
        try:
            yield "This is a whole sentence. "
            await asyncio.Event().wait()
        finally:
            raise ValueError("the database is gone")

    async def script(call: Call) -> None:
        assert await call.say(text()) is False

    async with Line(script, returns_marks=False) as line:
        await line.until(lambda: bool(line.audio))
        if is_key:
            line.press("1")
        else:
            line.stop()
        await line.ended()
        complaint = line.complaint()
        assert complaint.startswith("ERROR the text failed as it was stopped\nTraceback")
        assert complaint.endswith("ValueError: the database is gone")


async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that leaves the caller in silence for too long has failed; the script may go on."""
    async with Line() as line:
        speech = line.tts.held("It hangs.")
        with monkeypatch.context() as patch:
            patch.setattr(twilio_aura, "MAX_SILENCE_SECONDS", 0.05)
            with pytest.raises(SpeechFailed, match=r"^no audio for 0 s$"):
                await line.call.say("It hangs.")
        assert speech.listeners == 0
        assert await line.call.say("It goes on.")
        assert line.audio == noise("It goes on.")


async def test_silence_after_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silence that is too long counts from the end of what is being played."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with Line() as line:
        speech = line.tts.held("It hangs.")
        saying = line.begin(line.call.say("It hangs."))
        await settle()
        monkeypatch.setattr(twilio_aura, "MAX_SILENCE_SECONDS", 0.05)
        speech.add(bytes(3200))
        with pytest.raises(SpeechFailed):
            await saying
        assert loop.time() - began > 0.44


# Keys and what is being said


async def test_key_while_sending() -> None:
    """A key stops the text: a `clear` comes at once, and nothing of the text after it."""
    async with Line() as line:
        speech = line.tts.held("Interrupted.", noise("sent"))
        saying = line.begin(line.call.say("Interrupted."))
        await line.until_sound()
        line.press("5")
        assert await saying is False
        speech.add(noise("too late"))
        speech.end()
        await settle()
        assert line.story == "media clear"
        assert await line.call.digit() == "5"


async def test_key_while_playing() -> None:
    """A key also stops what has all been sent, and is still being played."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("Interrupted."))
        await line.until_mark()
        line.press("5")
        assert await saying is False
        assert line.story == "media mark clear"


@pytest.mark.parametrize("is_key_first", [False, True])
async def test_key_as_sound_comes(is_key_first: bool) -> None:
    """The `clear` comes last, however close together the key and the next sound come."""
    for steps in range(12):
        async with Line() as line:
            speech = line.tts.held("Interrupted.", bytes(160))
            line.begin(line.call.say("Interrupted."))
            await line.until_sound()
            for is_key in (is_key_first, not is_key_first):
                if is_key:
                    line.press("5")
                else:
                    speech.add(bytes(160))
                for _ in range(steps):
                    await asyncio.sleep(0)
            await line.until_clear()
            speech.add(bytes(1600))
            speech.end()
            await settle()
            assert line.story == "media clear"


async def test_two_keys() -> None:
    """Of two keys the first stops the text and both are kept, however close together they come."""
    for steps in range(12):
        async with Line() as line:
            line.tts.held("Interrupted.", bytes(160))
            saying = line.begin(line.call.say("Interrupted."))
            await line.until_sound()
            line.press("1")
            for _ in range(steps):
                await asyncio.sleep(0)
            line.press("2")
            assert await saying is False
            assert await line.call.digit() + await line.call.digit() == "12"
            assert line.story == "media clear"


async def test_key_before_sound() -> None:
    """A key pressed before there is anything to interrupt does not cost the caller the text."""
    async with Line() as line:
        speech = line.tts.held("Late.")
        saying = line.begin(line.call.say("Late."))
        await settle()
        line.press("1")
        await settle()
        speech.add(noise("Late."))
        speech.end()
        assert await saying is True
        assert await line.call.digit() == "1"


async def test_key_with_a_mark() -> None:
    """A key that comes together with a text's mark interrupts neither that text nor the next."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("One."))
        await line.until_mark()
        line.returns_marks = True
        line.return_marks()
        line.press("1")
        assert await saying is True
        assert await line.call.say("Two.")
        assert line.story == "media mark media mark"


async def test_key_that_must_wait() -> None:
    """What must be heard is not interrupted; the key is kept, and does not stop the next text."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("This must be heard.", interruptible=False))
        await line.until_mark()
        line.press("1")
        await settle()
        line.returns_marks = True
        line.return_marks()
        assert await saying is True
        assert await line.call.say("This may be interrupted.")
        assert line.story == "media mark media mark"
        assert await line.call.digit() == "1"


async def takes_time_at_its_end(goes_on: asyncio.Event) -> AsyncIterator[str]:
    """Write until it is stopped, and then wait for `goes_on`."""
    try:
        yield "This is a whole sentence. And half"
        await asyncio.Event().wait()
    finally:
        await goes_on.wait()


async def test_key_silences_first() -> None:
    """The `clear` waits for nothing that the text still does; nor does a second key meanwhile."""
    goes_on = asyncio.Event()
    async with Line() as line:
        saying = line.begin(line.call.say(takes_time_at_its_end(goes_on)))
        await line.until_sound()
        line.press("1")
        await line.until_clear()
        line.press("2")
        await settle()
        assert not saying.done()
        goes_on.set()
        assert await saying is False
        assert line.story == "media clear"
        assert await line.call.digit() + await line.call.digit() == "12"


async def test_say_is_cancelled() -> None:
    """A script's own time-out around `say` silences the text, and the next one is heard."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("Given up."))
        await line.until_mark()
        saying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saying
        assert line.story == "media mark clear"
        line.returns_marks = True
        line.return_marks()
        assert await line.call.say("It goes on.")
        assert line.audio == said("Given up.", "It goes on.")


async def test_text_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text whose own end hangs is not waited for for long."""
    goes_on = asyncio.Event()
    async with Line() as line:
        saying = line.begin(line.call.say(takes_time_at_its_end(goes_on)))
        await line.until_sound()
        with monkeypatch.context() as patch:
            patch.setattr(twilio_aura, "CLOSE_SECONDS", 0.05)
            line.press("1")
            assert await saying is False
        assert await line.call.say("After it.")
        goes_on.set()


# digit and ask


async def test_digit() -> None:
    """`digit` returns a key that waits, or comes; "" after so many seconds without one."""
    async with Line() as line:
        line.press("1")
        line.press("2")
        await settle()
        assert [await line.call.digit(seconds) for seconds in (1000, 0, 0, 0.05)] == [*"12", "", ""]
        for seconds in (1000, None):
            waiting = line.begin(line.call.digit(seconds))
            await settle()
            line.press("3")
            assert await waiting == "3"


async def test_digits_that_nobody_reads() -> None:
    """Of the keys that no one waits for the last hundred are kept; the next one interrupts."""
    async with Line() as line:
        speech = line.tts.held("Press keys.")
        saying = line.begin(line.call.say("Press keys."))
        for number in range(150):
            line.press(str(number % 10))
        await settle()
        speech.add(noise("Press keys."))
        await line.until_sound()
        line.press("#")
        assert await saying is False
        keys = [await line.call.digit(0) for _ in range(101)]
        assert keys == [*(str(number % 10) for number in range(51, 150)), "#", ""]


async def test_two_tasks_wait_for_a_digit() -> None:
    """Of two tasks that wait for a key, each key goes to one, and the other waits on."""
    async with Line() as line:
        tasks = {line.begin(line.call.digit()) for _ in range(2)}
        await settle()
        line.press("4")
        await settle()
        (first,) = (task for task in tasks if task.done())
        line.press("5")
        assert (await first, await (tasks - {first}).pop()) == ("4", "5")


@pytest.mark.parametrize(
    ("count", "ahead", "meanwhile", "afterwards", "answer", "left", "story"),
    [
        (1, "", "", "7", "7", "", "media mark"),
        (1, "", "7", "", "7", "", "media mark clear"),
        (1, "7", "", "", "7", "", ""),
        (1, "", "", "#", "#", "", "media mark"),
        (1, "", "", "", "", "", "media mark"),  # none in time
        (1, "", "", "78", "7", "8", "media mark"),
        (4, "", "", "1234", "1234", "", "media mark"),
        (4, "", "1", "234", "1234", "", "media mark clear"),
        (4, "12", "", "34", "1234", "", ""),
        (4, "", "", "12#4", "12", "4", "media mark"),
        (4, "", "", "#", "", "", "media mark"),
        (4, "", "", "12", "12", "", "media mark"),  # no more in time
    ],
)
async def test_ask(
    count: int, ahead: str, meanwhile: str, afterwards: str, answer: str, left: str, story: str
) -> None:
    """`ask` says its text, unless a key waits already, and returns so many keys, or up to a #."""
    is_late = answer == ahead + meanwhile + afterwards and len(answer) < count
    async with Line(returns_marks=False) as line:

        async def press(keys: str) -> None:
            for key in keys:
                line.press(key)
            await settle()

        await press(ahead)
        asking = line.begin(line.call.ask("Your number?", count, 0.1 if is_late else 1000))
        if not ahead:
            await line.until_mark()
        await press(meanwhile)
        line.return_marks()
        await press(afterwards)
        assert await asking == answer
        assert await line.call.digit(0) == left
        assert line.story == story


async def test_ask_nothing() -> None:
    """`ask` with an empty text says nothing, and waits for keys."""
    async with Line() as line:
        asking = line.begin(line.call.ask("", 4))
        await settle()
        for key in "1234":
            line.press(key)
        assert await asking == "1234"
        assert line.audio == b""


async def test_ask_waits_for_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ask` waits five seconds, or as many as it is told, and for each key anew."""
    keys = ["1", "2", "", "3", ""]
    waits = []

    async def digit(_: Call, seconds: float | None = None) -> str:
        waits.append(seconds)
        return keys.pop(0)

    monkeypatch.setattr(Call, "digit", digit)
    async with Line() as line:
        assert await line.call.ask("Your number?", 4) == "12"
        assert await line.call.ask("Your number?", 4, 7.5) == "3"
        assert waits == [5, 5, 5, 7.5, 7.5]


# A drain


async def ends(verb: Awaitable[object]) -> bool:
    """Return whether `verb` is cancelled, as it is with the end of its call."""
    try:
        await verb
    except asyncio.CancelledError:
        return True
    return False


VERBS: dict[str, Callable[[Call], Coroutine[Any, Any, object]]] = {
    "say": lambda call: call.say("Never said."),
    "ask": lambda call: call.ask("Never said."),
    "digit": lambda call: call.digit(),
    "digit(0)": lambda call: call.digit(0),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_drain_while_speaking(verb: str) -> None:
    """What is being said is heard out; with whatever comes next the call ends."""
    goes_on = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        yield SENTENCES[0] + " And"
        await goes_on.wait()
        yield SENTENCES[1].removeprefix("And")

    async with Line() as line:
        saying = line.begin(line.call.say(text()))
        await line.until_sound()
        line.call.drain()
        await settle()
        goes_on.set()
        assert await saying is True
        assert line.audio == said(*SENTENCES)
        assert not line.closed
        assert await ends(VERBS[verb](line.call))
        assert await line.ended() == (1000, "drained")
        assert "Never said." not in line.tts.texts


async def test_drain_while_a_key_is_awaited() -> None:
    """A script that waits for a key is over at once."""
    async with Line() as line:
        waiting = line.begin(line.call.digit())
        await settle()
        line.call.drain()
        assert await ends(waiting)
        assert await line.ended() == (1000, "drained")


async def test_drain_while_a_key_is_awaited_beside_speech() -> None:
    """If something is being said meanwhile, that is heard out before."""
    async with Line(returns_marks=False) as line:
        waiting = line.begin(line.call.digit())
        saying = line.begin(line.call.say("Press a key."))
        await line.until_mark()
        line.call.drain()
        await settle()
        assert not line.closed
        line.return_marks()
        assert await saying is True
        assert await ends(waiting)
        assert await line.ended() == (1000, "drained")


async def test_drain_while_a_text_waits_for_its_turn() -> None:
    """A text that waits for another one's end is not said."""
    async with Line(returns_marks=False) as line:
        first, second = (line.begin(line.call.say(text)) for text in ("One.", "Two."))
        await line.until_mark()
        line.call.drain()
        line.return_marks()
        assert await first is True
        assert await ends(second)
        assert await line.ended() == (1000, "drained")
        assert line.tts.texts == ["One."]


async def test_drain_while_interrupted() -> None:
    """A key interrupts the last text as any other."""
    async with Line(returns_marks=False) as line:
        saying = line.begin(line.call.say("Press a key."))
        await line.until_mark()
        line.call.drain()
        line.press("1")
        assert await saying is False
        assert await ends(line.call.digit())
        assert await line.ended() == (1000, "drained")


async def test_drain_before_start() -> None:
    """A call that drains before its `start` has come hears its first text, and ends."""
    async with Line(twilio_aura.script, start=False) as line:
        line.call.drain()
        await settle()
        assert not line.closed
        line.start()
        assert await line.ended() == (1000, "drained")
        assert line.audio == noise(GREETING)


@pytest.mark.parametrize("settings", [STAYS_OPEN, Settings(close_after_speech=True)])
async def test_drain_in_the_last_text(settings: Settings) -> None:
    """A call whose last text is heard in a drain has been drained, whatever its setting."""
    async with Line(twilio_aura.script, settings=settings, returns_marks=False) as line:
        await line.until_mark()
        line.call.drain()
        await settle()
        assert not line.closed
        line.return_marks()
        assert await line.ended() == (1000, "drained")
        assert line.audio == noise(GREETING)


async def test_drain_after_the_script() -> None:
    """A call that stays open after its script is over at once."""
    async with Line(twilio_aura.script, settings=STAYS_OPEN) as line:
        await line.until_mark()
        await settle()
        assert not line.closed
        line.call.drain()
        assert await line.ended() == (1000, "drained")


# Twilio's messages


BAD: dict[str, str | bytes] = {
    "not JSON": "not json{",
    "not an object": "[]",
    "a number": "17",
    "huge": "1" * 10_000,
    "deep": "[" * 30_000,
    "deep objects": '{"event":' * 5000,
    "no event": "{}",
    "event is no text": '{"event": ["media"]}',
    "unknown event": '{"event": "transcript", "text": "hi"}',
    "media without audio": '{"event": "media"}',
    "binary": b"\x00\xff\x00",
    "key without a digit": '{"event": "dtmf", "dtmf": {}}',
    "mark without a name": '{"event": "mark", "mark": {}}',
    "mark of a wrong type": '{"event": "mark", "mark": 7}',
    "lone surrogate": '{"event": "\\ud800", "\\udfff": "\\ud800"}',
    "NUL": '{"event": "\\u0000"}',
    "empty": "",
}


@pytest.mark.parametrize("is_started", [False, True])
@pytest.mark.parametrize("name", BAD)
async def test_bad_message(name: str, is_started: bool) -> None:
    """A message that Twilio does not send is ignored, and the log has a line about it."""
    async with Line(twilio_aura.script, start=is_started) as line:
        line.feed(BAD[name])
        if not is_started:
            line.start()
        assert await line.ended() == (1000, "completed")
        assert line.audio == noise(GREETING)
        assert re.match(
            rf"WARNING call .*: ignored a message of {len(BAD[name])} bytes, event .*$",
            line.complaint(),
        )


async def test_unknown_message_in_the_log() -> None:
    """Of an unknown message the log has its event and its size; the rest is for DEBUG."""
    message = '{"event": "transcript", "text": "+15550100 has pressed 1234"}'
    async with Line(twilio_aura.script) as line:
        line.feed(message)
        await line.ended()
        ignored = f"ignored a message of {len(message)} bytes, event 'transcript'"
        assert line.complaint() == f"WARNING call {line.call_sid}: {ignored}"
        (shown,) = (record for record in line.log if "+15550100" in record)
        assert shown.startswith("DEBUG ")


async def test_long_messages_in_the_log() -> None:
    """No line of the log has more than some 200 bytes of what somebody else has sent."""
    long = "\n INFO forged " * 4000
    async with Line(twilio_aura.script) as line:
        line.feed(json.dumps({"event": long}))
        line.feed(json.dumps({"event": "dtmf", "dtmf": long}))
        line.feed(long)
        await line.ended()
        assert len(line.complaints) == 3
        assert max(map(len, line.log)) < 400
        assert "\n" not in "".join(line.log)
        line.complaints.clear()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("m" * 50_000, "the connection to Deepgram failed"),
        ("mmm\ud800" + "m" * 50_000, "Deepgram could not be asked"),  # It is no text at all.
    ],
    ids=["long", "long, and not to be encoded"],
)
async def test_long_model_in_the_log(
    model: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor has the line of a failed request, if the TwiML's voice has 50 KB."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:  # bound, but not listening: it refuses connections
        closed.bind(("127.0.0.1", 0))
        settings = Settings(deepgram_url=f"http://127.0.0.1:{closed.getsockname()[1]}")
        async with Line(
            twilio_aura.script, parameters={"model": model}, tts=TextToSpeech(settings)
        ) as line:
            assert await line.ended() == (1011, reason)
            assert "for the voice 'mmm" in line.complaint()
            assert max(map(len, line.log)) < 700


async def test_caller_is_not_listened_to() -> None:
    """The caller's voice, before, during and after the speech, changes nothing."""
    async with Line(
        twilio_aura.script, settings=STAYS_OPEN, start=False, returns_marks=False
    ) as line:
        line.start()
        line.voice()
        await line.until_mark()
        line.voice()
        line.return_marks()
        line.voice()
        await settle()
        assert line.audio == noise(GREETING)
        assert not line.closed


async def test_mark_never_sent() -> None:
    """A mark that is not the last one sent says nothing of what has been heard."""
    async with Line(twilio_aura.script, returns_marks=False) as line:
        await line.until_mark()
        line.mark("4711")
        await settle()
        assert not line.closed
        line.return_marks()
        assert await line.ended() == (1000, "completed")


async def test_mark_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that never returns is waited for a little, and the log names the usual mistake."""
    monkeypatch.setattr(twilio_aura, "MARK_GRACE_SECONDS", 0.2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with Line(twilio_aura.script, returns_marks=False) as line:
        line.tts.says(GREETING, bytes(1600))
        assert await line.ended() == (1000, "completed")
        assert loop.time() - began > 0.39  # of the speech, and of grace
        assert line.complaint().endswith(
            ": no mark came back: does the TwiML have <Start>, not <Connect>?"
        )


async def test_awkward_parameters() -> None:
    """A parameter that is called like Twilio's media does not hide a `start`."""
    async with Line(
        twilio_aura.script, parameters={"text": "Hm.", "event": "media", "payload": "x"}
    ) as line:
        await line.ended()
        assert line.audio == noise("Hm.")


async def test_parameters_are_text() -> None:
    """A script finds a str in every parameter, whatever has come."""
    parameters = {}

    async def script(call: Call) -> None:
        parameters.update(call.parameters)

    async with Line(script, start=False) as line:
        start = line.start_fields() | {"customParameters": {"a": 7, "b": "x", "c": [1]}}
        line.feed(line.message("start", start=start))
        await line.ended()
        assert parameters == {"a": "7", "b": "x", "c": "[1]"}


@pytest.mark.parametrize(
    "start",
    [
        {"callSid": 7, "customParameters": None},
        {"customParameters": {"1": "\ud800\x00"}},
        {"callSid": "CA\n2026-11-22 INFO forged", "accountSid": ["AC"]},
        {"mediaFormat": MULAW | {"more": [1]}, "more": {}},
        {"mediaFormat": None},
        {},  # Only the stream SID is indispensable.
    ],
)
async def test_odd_start(start: dict[str, Any]) -> None:
    """What a `start` has too much, too little or of a wrong type is done without."""
    async with Line(twilio_aura.script, start=False) as line:
        line.feed(line.message("start", start={"streamSid": line.stream_sid, **start}))
        assert await line.ended() == (1000, "completed")
        assert line.audio == noise(GREETING)
        assert not re.search(r"\s(INFO )?forged", "".join(line.log))


@pytest.mark.parametrize("start", [None, [], "MZ", 7, {}, {"streamSid": ""}, {"streamSid": None}])
async def test_impossible_start(monkeypatch: pytest.MonkeyPatch, start: object) -> None:
    """A `start` that has no stream SID is none."""
    monkeypatch.setattr(twilio_aura, "START_SECONDS", 0.05)
    async with Line(twilio_aura.script, start=False) as line:
        line.feed(line.message("start", start=start))
        assert await line.ended() == (1008, "no start within 0 s")
        assert line.sent == []
        assert "event 'start'" in line.complaint()


async def test_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a `start` is closed, whatever else it sends, and no INFO line has it."""
    monkeypatch.setattr(twilio_aura, "START_SECONDS", 0.05)
    async with Line(twilio_aura.script, start=False) as line:
        line.press("1")
        assert await line.ended() == (1008, "no start within 0 s")
        assert line.log == [
            "DEBUG call without a SID ended: no start within 0 s; no audio sent",
        ]


async def test_second_start() -> None:
    """A second `start` is ignored: the call keeps its stream SID and says its own text."""
    async with Line(twilio_aura.script) as line:
        another = line.start_fields(text="another") | {"streamSid": "MZother"}
        line.feed(line.message("start", start=another))
        assert await line.ended() == (1000, "completed")
        assert line.audio == noise(GREETING)
        assert "event 'start'" in line.complaint()


@pytest.mark.parametrize(
    "media_format",
    [
        {"encoding": "audio/x-l16", "sampleRate": 8000, "channels": 1},
        {"encoding": "audio/x-mulaw", "sampleRate": 16_000, "channels": 1},
        {"encoding": "audio/x-mulaw"},
    ],
)
async def test_media_format(media_format: dict[str, object]) -> None:
    """A stream that is not mulaw at 8000 Hz would be noise: it is closed, and the log says why."""
    started = []

    async def script(call: Call) -> None:
        started.append(call)

    async with Line(script, start=False) as line:
        start = line.start_fields() | {"mediaFormat": media_format}
        line.feed(line.message("start", start=start))
        assert await line.ended() == (1008, "the stream is not mulaw at 8000 Hz")
        assert line.sent == []
        assert started == []
        assert line.complaint().endswith("leave audioFormat and sampleRate out of <Stream>")


# Arbitrary and almost valid messages


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


VALID: list[dict[str, Any]] = [
    {"event": "connected", "protocol": "Call", "version": "1.0.0"},
    {"event": "start", "start": {"streamSid": "MZ1", "callSid": "CA1", "mediaFormat": MULAW}},
    {"event": "media", "media": {"track": "inbound", "payload": "//8="}},
    {"event": "dtmf", "dtmf": {"track": "inbound_track", "digit": "1"}},
    {"event": "mark", "mark": {"name": "1"}},
]


@st.composite
def almost_valid(draw: st.DrawFn) -> str:
    """Return one of Twilio's messages with one thing in it lost, added, changed or broken."""
    message = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    inner = message.get(message["event"])
    place = draw(st.sampled_from([message, inner])) if isinstance(inner, dict) else message
    key = draw(st.sampled_from(sorted(place)) | st.text())
    if draw(st.booleans()):
        place.pop(key, None)
    else:
        place[key] = draw(json_values)
    text = json.dumps(message, ensure_ascii=draw(st.booleans()), separators=(", ", ":"))
    if draw(st.booleans()):
        text = text[: draw(st.integers(0, len(text)))]
    return text.encode(errors="replace").decode()


MESSAGES = st.one_of(st.text(), st.binary(), json_values.map(json.dumps), almost_valid())


@pytest.mark.parametrize("is_started", [False, True])
@given(messages=st.lists(MESSAGES, min_size=50, max_size=50))
@hypothesis_settings(
    max_examples=100 if os.environ.get("CI") else 10,  # 5000 messages, or 500
    suppress_health_check=list(HealthCheck),
)
async def test_any_messages(is_started: bool, messages: list[str | bytes]) -> None:
    """Among arbitrary and almost valid messages, the greeting is sent, and the call still ends."""
    async with Line(twilio_aura.script, settings=STAYS_OPEN, start=is_started) as line:
        line.tts.says(GREETING, b"greeting")
        for message in messages:
            if is_started or "start" not in str(message):  # the first start counts, be it another's
                line.feed(message)
        if not is_started:
            line.start()
        await line.until_mark()
        for message in messages:
            line.feed(message)
        line.stop()
        assert await line.ended() == (1000, "hung up")
        assert line.audio == b"greeting"
        line.complaints.clear()


# The end


PINGS = "sent 1011 (internal error) keepalive ping timeout; no close frame received"
HANG_UPS: dict[str, tuple[Callable[[Line], None], int, str]] = {
    "stop": (Line.stop, 1000, "hung up"),
    "close": (Line.disconnect, 1000, "hung up"),
    "lost": (lambda line: line.disconnect(1006), 1000, "hung up"),
    "proxy": (lambda line: line.disconnect(1001), 1000, "the proxy closed it (1001)"),
    "pings": (
        lambda line: line.fail(1011, "keepalive ping timeout"),
        *(1011, f"connection failed: {PINGS}"),
    ),
}
MOMENTS = ["connected", "started", "speaking", "playing", "waiting", "over"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", HANG_UPS)
async def test_hang_up(how: str, moment: str) -> None:
    """A hang-up in any way, at any moment, ends the call and its script; the log says which."""
    ended = []

    async def script(call: Call) -> None:
        try:
            await call.say("Hang up.")
            if moment == "waiting":
                await call.digit()
        finally:
            ended.append(True)

    async with Line(
        script, settings=STAYS_OPEN, start=moment != "connected", returns_marks=moment != "playing"
    ) as line:
        if moment in ("started", "speaking"):
            line.tts.held("Hang up.", b"" if moment == "started" else noise("Hang up."))
        if moment == "speaking":
            await line.until_sound()
        if moment in ("playing", "waiting", "over"):
            await line.until_mark()
        await settle()
        hang_up, code, reason = HANG_UPS[how]
        hang_up(line)
        assert await line.ended() == (code, reason)
        assert len(ended) == (moment != "connected")
        level = "DEBUG" if moment == "connected" else "INFO"
        assert re.match(rf"{level} call .* ended: {re.escape(reason)}; ", line.ends[0])


async def test_log_of_a_call() -> None:
    """The log has two lines of a call: that it started and, with what was heard, how it ended."""
    async with Line(twilio_aura.script, settings=STAYS_OPEN) as line:
        line.tts.says(GREETING, bytes(800))
        await line.until_mark()
        await settle()
        line.stop()
        await line.ended()
        started, ended = line.log
        assert started == f"INFO call {line.call_sid} started"
        assert re.fullmatch(
            rf"INFO call {line.call_sid} ended: hung up; "
            r"first audio \d+ ms; sent 0\.1 s, heard 0\.1 s",
            ended,
        )


async def test_peer_does_not_acknowledge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the peer does not answer a close, its connection is aborted, and the log says so."""
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 0.05)
    async with Line(twilio_aura.script, hangs=True) as line:
        assert await line.ended() == (1000, "completed")
        assert line.is_aborted
        assert "ended: completed; the peer did not acknowledge the close; first" in line.ends[0]


async def test_peer_is_gone_in_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter if its connection is lost just then, which makes asyncio's abort() raise.

    That is so where the last data is written as the time-out expires, as after a standstill.
    """
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 0.05)
    async with Line(twilio_aura.script, hangs=True) as line:

        def abort() -> None:
            line.disconnect(1006)
            raise AttributeError("'NoneType' object has no attribute 'call_soon'")

        line.transport.abort = abort
        assert await line.ended() == (1000, "completed")


async def test_second_end() -> None:
    """A call that is closing already is not ended again, by whomever."""
    async with Line(twilio_aura.script, hangs=True) as line:
        await line.until(lambda: bool(line.closed))
        line.call.end(1001, "cut off by shutdown")
        line.stop()
        line.disconnect()
        assert await line.ended() == (1000, "completed")


async def test_cut_off() -> None:
    """The server may end a call in the middle of anything."""
    async with Line(twilio_aura.script, returns_marks=False) as line:
        await line.until_mark()
        line.call.end(1001, "cut off by shutdown")
        assert await line.ended() == (1001, "cut off by shutdown")


# On sockets


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_streaming(server: Server, deepgram: Deepgram, framing: str) -> None:
    """The first frames leave before the body has ended, and all are whole but the last."""
    go = asyncio.Event()
    audio = noise(framing) + b"odd"
    answer = Answer(audio=audio, framing=framing, write_sizes=(1001, 333, 1), gate=go)
    text = deepgram.answer(f"streamed, {framing}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until(lambda: len(phone.received) >= 800)
        assert len(phone.received) <= 960
        go.set()
        await phone.hears(audio)
        assert [size for size in phone.media_sizes[:-1] if size % 160] == []


@pytest.mark.parametrize(
    ("framing", "sizes"),
    [("chunked", (1,)), ("chunked", (3, 1, 70_000)), ("length", (161,)), ("close", (159,))],
)
async def test_every_byte(
    server: Server, deepgram: Deepgram, framing: str, sizes: tuple[int, ...]
) -> None:
    """Every byte arrives, in order, once, however Deepgram sends it, in messages of 0.4 s."""
    audio = noise(framing) * 3
    answer = Answer(audio=audio, framing=framing, write_sizes=sizes)
    text = deepgram.answer(f"every byte {framing} {sizes}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.hears(audio)
    assert max(phone.media_sizes) <= 3200


async def test_text_is_not_logged(deepgram: Deepgram) -> None:
    """What is said to a caller is not logged, not even at DEBUG."""
    text = "Between you and me. " * 40
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes", "LOG_LEVEL": "debug"}
    async with Server(settings) as server, dial(server.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1000
        await server.until_ended(phone.call_sid)
        assert "Between you and me" not in server.full_log


WAYS = ["stop and close", "stop", "close", "drop", "drop in a message"]


@pytest.mark.parametrize("moment", ["connected", "started", "speaking", "heard"])
@pytest.mark.parametrize("how", WAYS)
async def test_hang_up_on_a_socket(
    server: Server, deepgram: Deepgram, how: str, moment: str
) -> None:
    """A hang-up at any moment, in any way, ends the call quietly, and the next one works."""
    go = asyncio.Event()
    text = f"hang-up {moment} {how}"
    deepgram.answer(
        text, Answer(write_sizes=(1, 1000) if moment == "started" else (1000,), gate=go)
    )
    before = len(server.log)
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
            case "stop and close":
                await phone.hang_up()
            case "stop":
                await phone.send_raw(phone.stop_message())
                assert await phone.until_closed() == 1000
            case "close":
                await phone.hang_up(stop=False)
            case "drop":
                phone.drop()
            case _:
                phone.ws.transport.write(frame({"event": "stop"})[:9])
                phone.drop()
        if moment != "connected":
            await server.until(lambda: "ended: hung up" in server.log[before:])
    go.set()
    async with dial(server.url) as phone:
        await phone.hears(noise(GREETING))
    assert server.complaints(before) == []


@pytest.mark.parametrize(
    ("seconds", "max_silence_seconds", "outcome"), [(0.3, 1000, "completed"), (500, 1, "no audio")]
)
async def test_peer_that_reads_nothing(
    deepgram: Deepgram, seconds: float, max_silence_seconds: float, outcome: str
) -> None:
    """Who stops reading is let go, whether the network still takes all of the speech or not."""
    sound = random.Random(0).randbytes(int(seconds * 8000))
    text = deepgram.answer(f"{seconds} s for nobody", Answer(audio=sound, write_sizes=(100_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with Server(
        settings,
        BYTES_PER_SECOND=80_000_000,  # as if all had been played as soon as it was sent
        MAX_SILENCE_SECONDS=max_silence_seconds,
        MARK_GRACE_SECONDS=0.3,
        CLOSE_SECONDS=0.5,
    ) as server:
        async with dial(server.url, start=False) as phone:
            phone.ws.transport.pause_reading()
            await phone.start(text=text)
            ended = await server.until_ended(phone.call_sid)
            assert ended.startswith(outcome)
            assert "; the peer did not acknowledge the close; " in ended
            if outcome == "no audio":
                assert not server.lines("no mark came back")  # since the TwiML is not to blame
            phone.drop()
        async with dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))
        server.signal()
        assert await server.end() == 0


CLOSE_FRAME = b"\x88\x82\0\0\0\0\x03\xe8"  # 1000
STOP_FRAME = frame({"event": "stop"})
SIZES = [*range(0, 100_000, 4000), 2_000_000]


@pytest.mark.parametrize(
    "ending",
    [CLOSE_FRAME, STOP_FRAME + CLOSE_FRAME, STOP_FRAME, b""],
    ids=["close", "stop and close", "stop", "nothing"],
)
async def test_hang_up_amid_much(
    ending: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hang-up is quiet also when the other side first reads all that was still to be sent.

    The server is in this process, since only so its buffers are small, and each rest is possible.
    """
    monkeypatch.setattr(twilio_aura.Playback, "pause_seconds", lambda *_: 0.0)
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 1000)
    caplog.set_level("INFO", "twilio_aura")
    tts = Voice()
    served = []
    loop = asyncio.get_running_loop()

    async def serve_call(ws: ServerConnection) -> None:
        try:
            await Call(ws, Settings(), cast("TextToSpeech", tts)).serve(twilio_aura.script)
        finally:
            served.append(ws)

    async def call(port: int, size: int) -> None:
        text = tts.says(f"of {size} bytes", bytes(size))
        start = {"streamSid": "MZ1", "customParameters": {"text": text}}
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.setblocking(False)
            await loop.sock_connect(line, ("127.0.0.1", port))
            await loop.sock_sendall(line, HANDSHAKE)
            assert b" 101 " in await loop.sock_recv(line, 4096)
            await loop.sock_sendall(line, frame({"event": "start", "start": start}))
            await asyncio.sleep(0.1)  # until nothing more fits in
            await loop.sock_sendall(line, ending)
            line.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(line, 65536):
                pass

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        async with serve(serve_call, sock=listening, compression=None):
            port = listening.getsockname()[1]
            await asyncio.gather(*(call(port, size) for size in SIZES))
            await poll(lambda: len(served) == len(SIZES))
    assert caplog.text.count(" ended: hung up; first audio") == len(SIZES) - 1
    assert caplog.text.count(" ended: hung up; no audio sent") == 1
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_large_message(server: Server) -> None:
    """A message over 64 KiB closes its connection with 1009 and touches no other."""
    async with dial(server.url, speed=0.5) as other, dial(server.url) as phone:
        await other.until_sound()
        await phone.send_raw("x" * 64 * 1024)
        await phone.voice()
        # Of a text message that is a byte too long, the head and no more: that must be enough.
        phone.ws.transport.write(b"\x81\xff" + (64 * 1024 + 1).to_bytes(8, "big") + b"mask")
        assert await phone.until_closed() == 1009
        await other.until_heard(noise(GREETING))
        assert other.heard == noise(GREETING)
    ended = await server.until_ended(phone.call_sid)
    assert re.match(r"connection failed: .*1009 \(message too big\)", ended)


# Many


async def test_hundred_calls(server: Server, deepgram: Deepgram) -> None:
    """A hundred calls at once each hear their own text, while Deepgram is asked 15 at once."""
    go = asyncio.Event()
    texts = [f"You are caller number {number}." for number in range(100)]
    deepgram.most_under_way = 0

    async def call(text: str) -> None:
        deepgram.answer(text, Answer(gate=go))
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.hears(noise(text))

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
            await phone.hears(noise(text))

    slow = [asyncio.create_task(call(text)) for text in texts]
    for text in texts:
        await deepgram.until_asked(text)
    await asyncio.gather(*(call(f"quick {number}") for number in range(5)))
    assert not any(task.done() for task in slow)
    go.set()
    await asyncio.gather(*slow)


async def test_nothing_is_left(server: Server, deepgram: Deepgram) -> None:
    """After hundreds of calls that hung up somewhere, no thread and no socket of theirs is left."""
    process = psutil.Process(server.process.pid)

    async def call(number: int) -> None:
        text = deepgram.answer(f"left {number % 40}", Answer(write_sizes=(100,)))
        async with dial(server.url, start=number % 7 > 0, parameters={"text": text}) as phone:
            if number % 3:
                await asyncio.sleep(number % 10 / 500)
            else:
                await phone.until_sound() if number % 7 else None
            if number % 2:
                phone.drop()

    for _ in range(3):
        await asyncio.gather(*map(call, range(100)))
    await deepgram.until(lambda: deepgram.under_way == 0)
    health = f"http://127.0.0.1:{server.port}/healthz"
    while (await asyncio.to_thread(requests.get, health, timeout=10)).text != "0 calls\n":
        await asyncio.sleep(0.01)
    await poll(lambda: process.num_threads() <= 2)  # its own, and at times faulthandler's
    await poll(
        lambda: not [c for c in process.net_connections() if c.raddr and c.laddr[1] == server.port]
    )
    # It listens; 15 connections, and one more, are kept for the requests to come.
    await poll(lambda: len(process.net_connections()) <= 1 + 16)
