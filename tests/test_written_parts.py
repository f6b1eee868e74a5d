"""How a text is spoken while it is being written."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.standins.deepgram import Answer, Deepgram, noise, said
from tests.standins.process import Server
from tests.standins.telephone import dial

SCRIPT = """
import os

async def write(call):
    # What the caller's parameters say, and a pause wherever they have a gate.
    try:
        for part in call.parameters["parts"].split("|"):
            while part.startswith("/") and not os.path.exists(part):
                await asyncio.sleep(0.01)
            if part == "fail":
                raise ZeroDivisionError("the model is gone")
            if part == "wait":
                await asyncio.sleep(1.4)
            if part == "seven":
                yield 7
            yield {"fail": "", "wait": "", "None": None}.get(part, "" if part[:1] == "/" else part)
    finally:
        print(call.sid, "the model has stopped", file=sys.stderr, flush=True)

async def script(call):
    text = write(call)  # so that it is closed, and not only garbage
    yield text
    yield "After it."
"""


@pytest_asyncio.fixture(scope="module")
async def writing(deepgram: Deepgram) -> AsyncIterator[Server]:
    """Return a server whose script speaks texts while it writes them."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with Server(settings, SCRIPT) as running:
        yield running
        assert "never retrieved" not in running.log


async def test_while_it_is_written(writing: Server, deepgram: Deepgram, tmp_path: Path) -> None:
    """A sentence is asked for when it is complete, the next one while it is spoken; one mark."""
    gate, second_gate = tmp_path / "gate", tmp_path / "second gate"
    parts = f"The first| one. The|{gate}| second one. |{second_gate}|The| rest"
    async with dial(writing.url, parameters={"parts": parts}) as phone:
        await phone.until(lambda: len(phone.received) == len(noise("The first one.")))
        assert not deepgram.asked("The")
        gate.touch()
        await phone.until(
            lambda: len(phone.heard) >= len(said("The first one.", "The second one."))
        )
        assert phone.named("mark") == []
        assert f"{phone.call_sid} the model has stopped" not in writing.log
        second_gate.touch()
        assert await phone.until_closed() == 1000
        pieces = "The first one.", "The second one.", "The rest"
        assert phone.heard == said(*pieces, "After it.")
        assert len(phone.named("mark")) == 2
    assert [len(deepgram.asked(piece)) for piece in pieces] == [1, 1, 1]


async def test_list(writing: Server, deepgram: Deepgram, tmp_path: Path) -> None:
    """A list without a full stop is spoken line by line, while it is being written."""
    gate = tmp_path / "gate"
    async with dial(writing.url, parameters={"parts": f"- apples\n|-|{gate}| pears\n|"}) as phone:
        await phone.until(lambda: phone.received == noise("- apples"))
        gate.touch()
        assert await phone.until_closed() == 1000
        assert phone.heard == said("- apples", "- pears", "After it.")
    assert not deepgram.asked("-")


async def test_next_sentence_ahead(writing: Server, deepgram: Deepgram) -> None:
    """While a sentence is spoken the next one is asked for, and none after that."""
    go = asyncio.Event()
    deepgram.answer("Ahead one.", Answer(gate=go))
    async with dial(
        writing.url, parameters={"parts": "Ahead one. |Ahead two. |Ahead three. "}
    ) as phone:
        await phone.until_sound()
        await deepgram.until_asked("Ahead two.")
        assert not deepgram.asked("Ahead three.")
        go.set()
        assert await phone.until_closed() == 1000


async def test_no_gap(deepgram: Deepgram) -> None:
    """Written faster than it is spoken, a text is heard without silence in between."""
    pieces = [f"Without gap, sentence {word}." for word in ("alpha", "bravo", "carol", "delta")]
    # It plays so slowly that only a server that waits for it would leave a gap.
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, SCRIPT) as server,
        dial(server.url, parameters={"parts": " |".join(pieces)}, speed=0.02) as phone,
    ):
        await phone.until(lambda: len(phone.received) == len(said(*pieces)))
        assert len(phone.heard) < len(noise(pieces[0]))


async def test_long_text(server: Server, deepgram: Deepgram) -> None:
    """A str of over 2000 characters is cut, too, the next piece asked for while one is spoken."""
    sentences = [f"This is sentence number {number:03} of so many." for number in range(57)]
    pieces = [" ".join(sentences[at : at + 7]) for at in range(0, 56, 7)]  # of under 300 characters
    pieces.append(sentences[56])
    go = asyncio.Event()
    deepgram.answer(pieces[0], Answer(gate=go))
    async with dial(server.url, parameters={"text": " ".join(sentences)}) as phone:
        await phone.until_sound()
        await deepgram.until_asked(pieces[1])
        assert not deepgram.asked(pieces[2])
        go.set()
        await phone.hears(said(*pieces))
        assert len(phone.named("mark")) == 1
    assert [len(deepgram.asked(piece)) for piece in pieces] == [1] * len(pieces)


@pytest.mark.parametrize("how", ["key", "hang-up", "failure", "stop"])
async def test_model_is_stopped(deepgram: Deepgram, tmp_path: Path, how: str) -> None:
    """Whatever ends a text stops at once whoever writes it, and nothing more is asked for."""
    parts = f"Stopped by {how}. |{tmp_path / 'gate'}|Never by {how}."
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "0"}
    if how == "failure":
        deepgram.answer(f"Stopped by {how}.", Answer(stop_after=2000))
    async with Server(settings, SCRIPT) as server:
        async with dial(server.url, parameters={"parts": parts}) as phone:
            await phone.until_sound()
            match how:
                case "key":
                    await phone.press("5")
                    await phone.until(lambda: ("clear", "") in phone.events)
                case "hang-up":
                    await phone.hang_up()
                case "failure":
                    assert await phone.until_closed() == 1011
                case "stop":
                    server.signal()
            await server.logged(f"{phone.call_sid} the model has stopped")
        assert "Traceback" not in server.log
    assert not deepgram.asked(f"Never by {how}.")


async def test_model_is_stopped_while_it_waits(deepgram: Deepgram) -> None:
    """So is one that is two sentences ahead, and so waits for the first to be spoken."""
    go = asyncio.Event()
    deepgram.answer("Long first.", Answer(gate=go))
    parts = "Long first. |Second, ahead. |Third, never. |Fourth. "
    async with (
        Server(
            {"DEEPGRAM_URL": deepgram.url},
            SCRIPT,
            MARK_GRACE_SECONDS=1000,
            MAX_SILENCE_SECONDS=1000,
        ) as server,
        dial(server.url, parameters={"parts": parts}, returns_marks=False) as phone,
    ):
        await phone.until_sound()
        await deepgram.until_asked("Second, ahead.")
        await phone.press("5")
        await server.logged(f"{phone.call_sid} the model has stopped")  # not only at the end
        await phone.until(lambda: phone.heard.endswith(noise("After it.")))
    go.set()
    assert not deepgram.asked("Third, never.")


async def test_model_is_stopped_by_a_failure_ahead(deepgram: Deepgram) -> None:
    """When the next sentence fails, the model stops at once; the one before it is heard."""
    go = asyncio.Event()
    deepgram.answer("Good, ahead.", Answer(gate=go))
    deepgram.answer("Bad, ahead.", Answer(status=400, body=b"no"))
    parts = "Good, ahead. |Bad, ahead. |Never after the bad one. |And more. "
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, SCRIPT) as server,
        dial(server.url, parameters={"parts": parts}, speed=0.5) as phone,
    ):
        await phone.until_sound()
        await server.logged("ERROR Deepgram answered 400")
        go.set()
        await server.logged(f"{phone.call_sid} the model has stopped")
        assert len(phone.heard) < len(noise("Good, ahead."))
        assert await phone.until_closed() == 1011
        assert phone.heard == noise("Good, ahead.")
    assert not deepgram.asked("Never after the bad one.")


HANGS_WHEN_STOPPED = """
async def write():
    try:
        yield "Before it hangs. "
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(3600)

async def script(call):
    yield write()
    yield "After it hung."
"""


async def test_model_that_hangs_when_stopped(deepgram: Deepgram) -> None:
    """A model whose end hangs keeps no caller in silence: neither after a key nor for ever."""
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(
        settings, HANGS_WHEN_STOPPED, CLOSE_SECONDS=0.3, MAX_SILENCE_SECONDS=3
    ) as server:
        async with dial(server.url) as phone:
            await phone.until(lambda: len(phone.heard) == len(noise("Before it hangs.")))
            assert await phone.until_closed() == 1011
            assert phone.ws.close_reason == "no audio for 3 s"
        async with dial(server.url, speed=0.5) as phone:
            await phone.until_sound()
            await phone.press("1")
            await phone.until(lambda: phone.heard.endswith(noise("After it hung.")))
        await server.logged(f"{phone.call_sid} ended: hung up")


async def test_drain(deepgram: Deepgram, tmp_path: Path) -> None:
    """A drain lets the text that is being written end, and no other one begin."""
    gate = tmp_path / "gate"
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(settings, SCRIPT) as server:
        parts = f"Drained one. |{gate}|Drained two."
        async with dial(server.url, parameters={"parts": parts}) as phone:
            await phone.until_sound()
            server.signal()
            await server.until_draining()
            gate.touch()
            assert await phone.until_closed() == 1000
            assert phone.heard == said("Drained one.", "Drained two.")
        assert await server.end() == 0


async def test_model_that_fails(writing: Server, deepgram: Deepgram) -> None:
    """What was complete when the writing failed is heard; then it is the script's failure."""
    async with dial(writing.url, parameters={"parts": "It fails. |But now|fail"}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.heard == noise("It fails.")
        assert phone.ws.close_reason == "the script failed"
    await writing.logged(f"{phone.call_sid} ended: the script failed")
    assert writing.log.count("ZeroDivisionError: the model is gone") == 1
    assert not deepgram.asked("But now")


async def test_key_when_a_model_has_failed(deepgram: Deepgram) -> None:
    """A key that silences what was complete when the writing failed ends that text like any."""
    sound = noise("It fails in a moment.") * 5
    deepgram.answer("It fails in a moment.", Answer(sound, write_sizes=(100_000,)))
    parts = "It fails in a moment. |fail"
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, SCRIPT) as server,
        dial(server.url, parameters={"parts": parts}, speed=1) as phone,
    ):
        await phone.until_mark()
        await phone.press("1")
        await phone.until_mark(2)
        assert phone.received == sound + noise("After it.")
        assert len(phone.named("clear")) == 1


async def test_part_that_is_no_text(writing: Server) -> None:
    """A part that is no str is the script's failure, None excepted."""
    async with dial(writing.url, parameters={"parts": "Nothing follows. |None|"}) as phone:
        assert await phone.until_closed() == 1000
        assert phone.heard == said("Nothing follows.", "After it.")
    async with dial(writing.url, parameters={"parts": "A number follows. |seven"}) as phone:
        assert await phone.until_closed() == 1011
        assert phone.heard == noise("A number follows.")
    assert writing.lines("TypeError: .*int")


async def test_pause(deepgram: Deepgram, tmp_path: Path) -> None:
    """The silence that is too long counts from the end of what was heard."""
    settings = {"DEEPGRAM_URL": deepgram.url}
    sound = (noise("a pause") * 11)[:32_000]  # 4 s
    deepgram.answer("A pause.", Answer(sound))
    async with Server(settings, SCRIPT, MAX_SILENCE_SECONDS=1) as server:
        parts = f"A pause. |wait|Then more. |{tmp_path / 'never'}|"
        async with dial(server.url, parameters={"parts": parts}) as phone:
            assert await phone.until_closed() == 1011
            assert phone.heard == sound + noise("Then more.")
        await server.logged(f"{phone.call_sid} ended: no audio for 1 s")


async def test_nothing_written(writing: Server) -> None:
    """White space and empty parts are nothing."""
    async with dial(writing.url, parameters={"parts": " |\n|| "}) as phone:
        assert await phone.until_closed() == 1000
        assert phone.heard == noise("After it.")


async def test_cached(writing: Server, deepgram: Deepgram) -> None:
    """Sentences are cached one by one, whatever the parts in which they are written."""
    for parts in ("Cached one. |Cached two.", "Cac|hed one. Cached| two."):
        async with dial(writing.url, parameters={"parts": parts}) as phone:
            assert await phone.until_closed() == 1000
            assert phone.heard == said("Cached one.", "Cached two.", "After it.")
    assert [len(deepgram.asked(text)) for text in ("Cached one.", "Cached two.")] == [1, 1]


ITERATOR = """
class Words:
    def __init__(self):
        self.words = ["No ", "generator. ", "But ", "good."]
    def __aiter__(self):
        return self
    async def __anext__(self):
        if not self.words:
            raise StopAsyncIteration
        return self.words.pop(0)

async def script(call):
    yield Words()
"""


async def heard(deepgram: Deepgram, script: str) -> bytes:
    """Return all that a caller hears of `script`."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with Server(settings, script) as server, dial(server.url) as phone:
        assert await phone.until_closed() == 1000
        return bytes(phone.heard)


async def test_any_async_iterable(deepgram: Deepgram) -> None:
    """Any async iterable will do, also one that cannot be closed."""
    assert await heard(deepgram, ITERATOR) == said("No generator.", "But good.")


WITHIN_A_TIME_OUT = """
async def write():
    try:
        async with asyncio.timeout(0.3):
            yield "Quick at first. "
            yield "And then. "
            await asyncio.sleep(1000)
    except TimeoutError:
        yield "That is all."

async def script(call):
    yield write()
"""


async def test_time_out_around_what_it_writes(deepgram: Deepgram) -> None:
    """A generator is run by one task, so that a time-out may be around what it yields."""
    expected = said("Quick at first.", "And then.", "That is all.")
    assert await heard(deepgram, WITHIN_A_TIME_OUT) == expected


TIMES_OUT = """
async def write():
    yield "It times out. "
    raise TimeoutError("the model timed out")

async def script(call):
    yield write()
"""


async def test_time_out_of_its_own(deepgram: Deepgram) -> None:
    """A time-out of the model's is not taken for the server's own."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, TIMES_OUT) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
            assert phone.ws.close_reason == "the script failed"
        assert await server.logged("TimeoutError: the model timed out")
