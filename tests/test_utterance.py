"""One text on its way to speech: what of it is requested when, and what its writer notices.

What is requested comes at once, or when the test lets it, and no request is made of anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

import twilio_aura
from tests.standins import Observable
from tests.standins.deepgram import noise, said
from tests.standins.wire import settle
from twilio_aura import Piece, Speech, SpeechFailed, Utterance

FIRST = "This is the first sentence."
SECOND = "That was the second one."
THIRD = "Here is the third one."


class Voice(Observable):
    """Stands for TextToSpeech: `voice.request` is what an Utterance requests its pieces with.

    Attributes:
        pieces: What was requested, in order.
        speeches: The last speech of each piece.

    Args:
        waits: Whether a speech comes when the test calls `speak`, in place of at once.
    """

    def __init__(self, *, waits: bool = False) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.speeches: dict[str, Speech] = {}
        self._waits = waits

    def request(self, piece: str) -> Speech:
        self.pieces.append(piece)
        self.speeches[piece] = Speech(Piece("", piece))
        if not self._waits:
            self.speak(piece)
        self.changed()
        return self.speeches[piece]

    def speak(self, piece: str, failure: SpeechFailed | None = None) -> None:
        """Let the speech of `piece` come, or fail after it."""
        speech = self.speeches[piece]
        speech.add(noise(piece))
        speech.failure = failure
        speech.end()

    async def until_asked(self, *pieces: str) -> None:
        """Wait until these pieces, and no others, were requested."""
        await self.until(lambda: len(self.pieces) >= len(pieces))
        assert self.pieces == list(pieces)


class Writer(Observable):
    """A text that the test writes: `Utterance(writer.text(), …)`, then `writer.write(…)`.

    Attributes:
        tasks: Those in which the text has run.
        has_stopped: Whether the text has come to its end, or was stopped.
        exit_gate: What the text waits for at its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks: set[object] = set()
        self.has_stopped = False
        self.exit_gate = asyncio.Event()
        self.exit_gate.set()
        self._parts: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._end = StopAsyncIteration()

    def write(self, *parts: str | BaseException | None) -> None:
        """Write these parts; an exception is raised."""
        for part in parts:
            self._parts.put_nowait(part)

    def end(self) -> None:
        """Have the text end."""
        self.write(self._end)

    async def text(self) -> AsyncGenerator[str | None]:
        try:
            while (part := await self._parts.get()) is not self._end:
                self.tasks.add(asyncio.current_task())
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            self.tasks.add(asyncio.current_task())
            self.has_stopped = True
            self.changed()
            await self.exit_gate.wait()

    async def until_stopped(self) -> None:
        """Wait until the text has come to its end, or was stopped."""
        await self.until(lambda: self.has_stopped)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no writer pause, however busy the machine is."""
    monkeypatch.setattr(twilio_aura, "TEXT_PAUSE_SECONDS", 1000)


@pytest.fixture
def voice() -> Voice:
    """Return a voice that speaks at once."""
    return Voice()


@pytest.fixture
def slow_voice() -> Voice:
    """Return a voice that speaks when the test says so."""
    return Voice(waits=True)


async def written(*parts: Any) -> AsyncIterator[Any]:
    """Yield these parts, as a language model's client does; an exception is raised."""
    for part in parts:
        if isinstance(part, BaseException):
            raise part
        yield part


async def hear(utterance: Utterance) -> bytes:
    """Return all the audio of `utterance`, which does not fail."""
    heard = b""
    while audio := await utterance.read():
        heard += audio
    assert utterance.failure is None
    return heard


async def hear_until_failure(utterance: Utterance) -> tuple[bytes, BaseException]:
    """Return all the audio of `utterance`, and what it failed with after it."""
    heard = b""
    while audio := await utterance.read():
        heard += audio
    assert utterance.failure is not None
    return heard, utterance.failure


# What is requested


async def test_str(voice: Voice) -> None:
    """A str is cut, too: its first sentence comes first, then as many whole ones as fit."""
    text = f"{FIRST} " * 36
    assert await hear(Utterance(text, voice.request)) == said(*voice.pieces)
    assert voice.pieces == [FIRST, *[" ".join([FIRST] * 10)] * 3, " ".join([FIRST] * 5)]


@pytest.mark.parametrize("is_written", [False, True])
async def test_two_under_way(is_written: bool, slow_voice: Voice) -> None:
    """While a piece is spoken the next one is requested, and none after that."""
    pieces = [f"So {'word ' * 40}{word}." for word in ("alpha", "bravo", "carol", "delta")]
    text = " ".join(pieces)
    utterance = Utterance(written(*text) if is_written else text, slow_voice.request)
    hearing = asyncio.create_task(hear(utterance))
    for number, piece in enumerate(pieces):
        await slow_voice.until_asked(*pieces[: number + 2])
        await settle()
        assert slow_voice.pieces == pieces[: number + 2]
        slow_voice.speak(piece)
    assert await hearing == said(*pieces)


async def test_listeners(slow_voice: Voice) -> None:
    """A piece has a listener for as long as it is to be spoken."""
    utterance = Utterance(f"{FIRST} {SECOND}", slow_voice.request)
    hearing = asyncio.create_task(hear(utterance))
    await slow_voice.until_asked(FIRST, SECOND)
    assert [speech.listeners for speech in slow_voice.speeches.values()] == [1, 1]
    slow_voice.speak(FIRST)
    await settle()
    assert [speech.listeners for speech in slow_voice.speeches.values()] == [0, 1]
    slow_voice.speak(SECOND)
    await hearing
    assert [speech.listeners for speech in slow_voice.speeches.values()] == [0, 0]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        (" \n ", []),
        ("😊 *** …", []),
        (r"\{pause:500ms\}", []),
        ("4711.", ["4711."]),
        (f"  {FIRST}  ", [FIRST]),
        (f"***\n{FIRST}\n***\n", [f"***\n{FIRST}"]),
        (rf"{FIRST} \{{pause:500ms\}}", [FIRST]),
    ],
)
async def test_something_to_say(text: str, pieces: list[str], voice: Voice) -> None:
    """What has no letter and no digit is not requested, nor is white space around a piece."""
    assert await hear(Utterance(text, voice.request)) == said(*pieces)
    assert voice.pieces == pieces


@pytest.mark.parametrize("is_written", [False, True])
async def test_much_without_anything_to_say(
    is_written: bool, voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long text with nothing to say all is looked at once, and other tasks get turns."""
    text = " *\n " * 200_000
    looked_at = 0
    turns = 0

    def length_of_piece(window: str, *others: Any) -> int:
        nonlocal looked_at
        looked_at += len(window)
        return find(window, *others)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    find = twilio_aura.length_of_piece
    monkeypatch.setattr(twilio_aura, "length_of_piece", length_of_piece)
    other_task = asyncio.create_task(other())
    try:
        assert await hear(Utterance(written(text) if is_written else text, voice.request)) == b""
    finally:
        other_task.cancel()
    assert len(text) <= looked_at < 1.1 * len(text)
    assert turns >= len(text) / twilio_aura.MAX_CHARACTERS


# While it is written


async def test_while_it_is_written(voice: Voice) -> None:
    """A sentence is requested when it is complete, whatever the parts in which it is written."""
    writer = Writer()
    utterance = Utterance(writer.text(), voice.request)
    hearing = asyncio.create_task(hear(utterance))
    writer.write("This is", None, " the first", "", " sentence", ".")
    await settle()
    assert voice.pieces == []
    writer.write(" That")
    await voice.until_asked(FIRST)
    writer.write(" was the", " second one", ". ")
    await settle()
    assert voice.pieces == [FIRST]
    writer.write("Here")
    await voice.until_asked(FIRST, SECOND)
    writer.end()
    assert await hearing == said(FIRST, SECOND, "Here")
    assert voice.pieces == [FIRST, SECOND, "Here"]


async def test_clause(voice: Voice) -> None:
    """The beginning of a long sentence is requested before the rest of it has been written."""
    clause = "If you would like to know when we are open today,"
    rest = "press one, and if you would like to talk to one of us, stay."
    writer = Writer()
    utterance = Utterance(writer.text(), voice.request)
    hearing = asyncio.create_task(hear(utterance))
    writer.write(*clause, " ")
    await voice.until_asked(clause)
    writer.write(*rest)
    writer.end()
    assert await hearing == said(clause, rest)


async def test_list(voice: Voice) -> None:
    """A list without a full stop is requested line by line."""
    writer = Writer()
    hearing = asyncio.create_task(hear(Utterance(writer.text(), voice.request)))
    writer.write("- apples, ripe and red\n", "-")
    await voice.until_asked("- apples, ripe and red")
    writer.write(" pears\n")
    await voice.until_asked("- apples, ripe and red", "- pears")
    writer.end()
    assert await hearing == said("- apples, ripe and red", "- pears")


async def test_pause(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is complete is requested when its writer pauses, and the writer does not notice."""
    monkeypatch.setattr(twilio_aura, "TEXT_PAUSE_SECONDS", 0.01)
    writer = Writer()
    hearing = asyncio.create_task(hear(Utterance(writer.text(), voice.request)))
    writer.write("Let me check that for you.", " One")
    await voice.until_asked("Let me check that for you.")
    writer.write(" moment.")
    await voice.until_asked("Let me check that for you.", "One moment.")
    writer.write(" Yes.")
    writer.end()
    assert await hearing == said("Let me check that for you.", "One moment.", "Yes.")
    assert len(writer.tasks) == 1


async def test_pause_with_empty_parts(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer who sends nothing but empty parts pauses: models' clients do so meanwhile."""
    monkeypatch.setattr(twilio_aura, "TEXT_PAUSE_SECONDS", 0.01)
    writer = Writer()
    hearing = asyncio.create_task(hear(Utterance(writer.text(), voice.request)))
    writer.write("Let me check that for you.")
    async with asyncio.timeout(20):
        while not voice.pieces:
            writer.write("", None)
            await asyncio.sleep(0)
    writer.end()
    assert await hearing == noise("Let me check that for you.")


async def test_after_a_pause(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in the middle of a sentence makes no end of what is written after it."""
    paused = asyncio.Event()

    def length_of_piece(text: str, number: int, is_paused: bool, is_written: bool) -> int:
        if is_paused:
            paused.set()
            monkeypatch.setattr(twilio_aura, "TEXT_PAUSE_SECONDS", 1000)
        return find(text, number, is_paused, is_written)

    find = twilio_aura.length_of_piece
    monkeypatch.setattr(twilio_aura, "length_of_piece", length_of_piece)
    monkeypatch.setattr(twilio_aura, "TEXT_PAUSE_SECONDS", 0.01)
    writer = Writer()
    hearing = asyncio.create_task(hear(Utterance(writer.text(), voice.request)))
    writer.write("The price is")
    await paused.wait()
    writer.write(" 3.")
    await settle()
    writer.write("50 Euro.")
    writer.end()
    assert await hearing == noise("The price is 3.50 Euro.")


async def test_one_task(voice: Voice) -> None:
    """A text is run by one task to its end, so that a time-out may be around what it yields."""

    async def text() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.1):
                yield f"{FIRST} "
                yield f"{SECOND} "
                await asyncio.sleep(1000)
        except TimeoutError:
            yield THIRD

    assert await hear(Utterance(text(), voice.request)) == said(FIRST, f"{SECOND} {THIRD}")


class Words:
    """An async iterable that is no generator, and cannot be closed."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def __aiter__(self) -> Words:
        return self

    async def __anext__(self) -> str:
        if not self.words:
            raise StopAsyncIteration
        return self.words.pop(0)


async def test_any_async_iterable(voice: Voice) -> None:
    """Any async iterable will do."""
    utterance = Utterance(Words("This is", " no generator.", " But", " good."), voice.request)
    assert await hear(utterance) == said("This is no generator.", "But good.")
    await utterance.close()


async def test_endless_text(voice: Voice) -> None:
    """A text is not written much further than it is spoken, and can be stopped where it waits."""
    sentences = 0
    has_stopped = False

    async def text() -> AsyncIterator[str]:
        nonlocal sentences, has_stopped
        try:
            while True:
                sentences += 1
                yield f"This is sentence number {sentences} of so many. "
        finally:
            has_stopped = True

    utterance = Utterance(text(), voice.request)
    heard = b""
    for _ in range(100):
        heard += await utterance.read()
        await settle()
    assert said(*voice.pieces).startswith(heard)
    ahead = sentences - " ".join(voice.pieces).count("sentence")
    assert 0 < ahead < twilio_aura.MAX_CHARACTERS / 30
    await utterance.close()
    assert has_stopped


# What goes wrong with it


@pytest.mark.parametrize("error", [ZeroDivisionError("the model is gone"), TimeoutError()])
async def test_text_that_fails(error: Exception, voice: Voice) -> None:
    """What a text raises comes after what was complete then; what was not is not requested."""
    writer = Writer()
    writer.write(f"{FIRST} But now", error)
    utterance = Utterance(writer.text(), voice.request)
    heard, raised = await hear_until_failure(utterance)
    assert heard == noise(FIRST)
    assert raised is error
    assert utterance.failure is error
    assert voice.pieces == [FIRST]
    await utterance.close()
    assert utterance.failure is error  # so that it can be logged where a key was faster


async def test_text_that_fails_after_a_sentence(voice: Voice) -> None:
    """What is complete is requested though it is short, and though nothing comes after it."""
    writer = Writer()
    writer.write("Well.", ZeroDivisionError())
    heard, _ = await hear_until_failure(Utterance(writer.text(), voice.request))
    assert heard == noise("Well.")


@pytest.mark.parametrize("part", [7, b"bytes", ["a list"]])
async def test_part_that_is_no_text(part: object, voice: Voice) -> None:
    """A part that is no str fails with its type's name."""
    utterance = Utterance(written(f"{FIRST} ", part, SECOND), voice.request)
    heard, error = await hear_until_failure(utterance)
    assert heard == noise(FIRST)
    assert isinstance(error, TypeError)
    assert type(part).__name__ in str(error)


async def test_text_that_cannot_be_iterated(voice: Voice) -> None:
    """So does a text that only seems to be an async iterable."""

    class Seeming:
        def __aiter__(self) -> int:
            return 7

    with pytest.raises(TypeError, match="int"):
        Utterance(Seeming(), voice.request)  # type: ignore[arg-type]


async def test_piece_that_fails(slow_voice: Voice) -> None:
    """Of a text nothing is heard or requested after the piece that failed."""
    pieces = [f"So {'word ' * 40}{word}." for word in ("alpha", "bravo", "carol")]
    utterance = Utterance(" ".join(pieces), slow_voice.request)
    hearing = asyncio.create_task(hear_until_failure(utterance))
    await slow_voice.until_asked(*pieces[:2])
    failure = SpeechFailed("it failed")
    slow_voice.speak(pieces[0], failure)
    assert await hearing == (noise(pieces[0]), failure)
    assert slow_voice.pieces == pieces[:2]
    assert slow_voice.speeches[pieces[1]].listeners == 0


# Its end


async def test_stop(slow_voice: Voice) -> None:
    """A text that is stopped wants no more speech, and its writer is stopped at once."""
    writer = Writer()
    writer.write(f"{FIRST} {SECOND} {THIRD}")
    utterance = Utterance(writer.text(), slow_voice.request)
    hearing = asyncio.create_task(hear(utterance))
    await slow_voice.until_asked(FIRST, SECOND)
    hearing.cancel()
    utterance.stop()
    assert [speech.listeners for speech in slow_voice.speeches.values()] == [0, 0]
    await writer.until_stopped()
    await utterance.close()
    assert [speech.listeners for speech in slow_voice.speeches.values()] == [0, 0]
    assert len(writer.tasks) == 1


async def test_close(voice: Voice) -> None:
    """To close a text is to stop it, and to wait for what it does at its end."""
    writer = Writer()
    writer.exit_gate.clear()
    utterance = Utterance(writer.text(), voice.request)
    writer.write(f"{FIRST} And")
    assert await utterance.read()
    closing = asyncio.create_task(utterance.close())
    await writer.until_stopped()
    await settle()
    assert not closing.done()
    writer.exit_gate.set()
    await closing


async def test_text_that_hangs_at_its_end(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text whose end hangs is not waited for, after a time."""
    monkeypatch.setattr(twilio_aura, "CLOSE_SECONDS", 0.01)
    writer = Writer()
    writer.exit_gate.clear()
    utterance = Utterance(writer.text(), voice.request)
    writer.write(f"{FIRST} And")
    assert await utterance.read()
    await utterance.close()
    assert writer.has_stopped
    writer.exit_gate.set()


async def test_text_that_fails_at_its_end(voice: Voice, caplog: pytest.LogCaptureFixture) -> None:
    """What a text raises as it is stopped is logged, wherever that was, and nobody raises it."""
    for parts in ([f"{FIRST} "], [f"{FIRST} " * 200, "It waits, being so far ahead."]):
        error = ZeroDivisionError()
        utterance = Utterance(stopping(error, *parts), voice.request)
        await settle()
        await utterance.close()
        assert utterance.failure is None
        (record,) = caplog.records
        caplog.clear()
        assert record.exc_info
        assert record.exc_info[1] is error


async def test_text_that_takes_time_at_its_end(voice: Voice) -> None:
    """It is cancelled once only, so that its clean-up is not broken off."""
    gate = asyncio.Event()
    cleaned_up = []

    async def text() -> AsyncIterator[str]:
        try:
            yield f"{FIRST} "
            await asyncio.sleep(1000)
        finally:
            await gate.wait()
            cleaned_up.append("all")

    utterance = Utterance(text(), voice.request)
    await settle()
    utterance.stop()
    await settle()
    closing = asyncio.create_task(utterance.close())
    await settle()
    gate.set()
    await closing
    assert cleaned_up == ["all"]


async def test_text_that_catches_its_cancellation(voice: Voice) -> None:
    """A text that writes on when it is stopped is closed at its next part."""
    closed = []

    async def text() -> AsyncIterator[str]:
        try:
            with suppress(asyncio.CancelledError):
                yield f"{FIRST} "
                await asyncio.sleep(1000)
            yield SECOND
            await asyncio.sleep(1000)
        finally:
            closed.append(True)

    utterance = Utterance(text(), voice.request)
    await settle()
    await utterance.close()
    assert closed


async def stopping(error: BaseException, *parts: str) -> AsyncIterator[str]:
    """Yield these parts, wait, and raise `error` when that is stopped."""
    try:
        for part in parts:
            yield part
        await asyncio.sleep(1000)
    finally:
        raise error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["while it is written", "at its end", "at its end, far ahead"])
def test_text_that_exits(error: BaseException, where: str) -> None:
    """What would end the process, raised in a text, does not get as far as the event loop."""

    async def speak() -> None:
        voice = Voice()
        if where == "while it is written":
            utterance = Utterance(written(f"{FIRST} And", error), voice.request)
            heard, raised = await hear_until_failure(utterance)
            assert heard == noise(FIRST)
            assert raised is error
        else:
            ahead = 200 if "far ahead" in where else 1
            utterance = Utterance(stopping(error, f"{FIRST} " * ahead, FIRST), voice.request)
            await settle()
            await utterance.close()
        await settle()

    try:
        asyncio.run(speak())
    except BaseException as escaped:
        pytest.fail(f"the event loop got {escaped!r}")
