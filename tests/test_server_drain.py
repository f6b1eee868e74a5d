"""How the server ends: whoever is being spoken to hears the text out."""

import asyncio
import signal
from pathlib import Path

import pytest

from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, dial


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_nobody_on_the_line(deepgram: Deepgram, signum: int) -> None:
    """With nobody on the line a stop is immediate, even with a connection that asks nothing."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        server.signal(signum)
        assert await asyncio.wait_for(server.end(), 5) == 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_drain(deepgram: Deepgram, signum: int) -> None:
    """Who is being spoken to hears the sentence out, whoever is not is let go, nobody gets in."""
    go = asyncio.Event()
    text = deepgram.answer(f"drained by {signum}", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with (
            dial(server.url) as idle,
            dial(server.url, parameters={"text": text}) as listening,
            dial(server.url, start=False) as connected,
        ):
            await idle.until_heard(noise(GREETING))
            await listening.until_sound()
            server.signal(signum)
            await server.until_draining()
            assert await idle.until_closed() == 1000
            with pytest.raises(OSError, match=r"Connect call failed|refused"):
                async with dial(server.url):
                    pass
            await connected.start()  # it was let in before, so it is served
            assert await connected.until_closed() == 1000
            assert connected.heard == noise(GREETING)
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise(text)
        assert await server.end() == 0
        for phone in (idle, listening, connected):
            assert (await server.until_ended(phone.call_sid)).startswith("drained;")
        assert "Traceback" not in server.log


CONVERSATION = """
async def script(call):
    yield "Question."
    await call.digit()
    yield "Answer."
    yield "Never drained."
"""


async def test_drain_a_conversation(deepgram: Deepgram) -> None:
    """A script that waits for a key is over at once, one that speaks after its current text."""
    go = asyncio.Event()
    deepgram.answer("Answer.", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url}, CONVERSATION) as server:
        async with dial(server.url) as waiting, dial(server.url) as listening:
            await waiting.until_heard(noise("Question."))
            await listening.until_returned()
            await listening.press("1")
            await deepgram.until_asked("Answer.")
            server.signal()
            assert await waiting.until_closed() == 1000
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise("Question.") + noise("Answer.")
        assert await server.end() == 0
    assert not deepgram.asked("Never drained.")


LISTENS_MEANWHILE = """
async def script(call):
    key = asyncio.create_task(call.digit())
    yield "Heard while it waits for a key."
    key.cancel()
"""


async def test_drain_while_a_key_is_waited_for(deepgram: Deepgram) -> None:
    """A script that waits for a key in another task meanwhile is not cut off in its text."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, LISTENS_MEANWHILE) as server:
        async with dial(server.url, speed=1) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise("Heard while it waits for a key.")
        assert await server.end() == 0


TWO_TEXTS = """
async def script(call):
    yield "The current text."
    yield call.parameters.get("next", "never asked for")
"""


@pytest.mark.parametrize("following", ["never asked for", "The current text."])
async def test_drain_stops_at_the_current_text(deepgram: Deepgram, following: str) -> None:
    """Of the text after the current one nothing is sent if it is cached, nor asked for if not."""
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": "The current text."}
    async with Server(settings, TWO_TEXTS) as server:
        async with dial(server.url, parameters={"next": following}, speed=1) as phone:
            await phone.until_sound()
            server.signal()
            await server.until_draining()
            assert await phone.until_closed() == 1000
            assert phone.heard == phone.received == noise("The current text.")
        assert await server.end() == 0
    assert not deepgram.asked("never asked for")


WAITS_FIRST = """
async def script(call):
    await call.digit()
    yield "Pressed."
"""


async def test_drain_before_the_first_text(deepgram: Deepgram) -> None:
    """A call that is still to start when the server drains ends where its script first pauses."""
    async with Server({"DEEPGRAM_URL": deepgram.url}, WAITS_FIRST) as server:
        async with dial(server.url, start=False) as phone:
            server.signal()
            await server.until_draining()
            await phone.start()
            assert await phone.until_closed() == 1000
        assert await server.end() == 0


async def test_drain_seconds(deepgram: Deepgram) -> None:
    """When DRAIN_SECONDS have elapsed, the rest are closed with 1001."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1"}) as server:
        async with dial(server.url, returns_marks=False, speed=0.01) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        assert (await server.until_ended(phone.call_sid)).startswith("cut off by shutdown;")


async def test_asked_while_draining(deepgram: Deepgram) -> None:
    """While draining, who had connected before is told 503: health check and caller alike."""
    requests = [b"GET /healthz HTTP/1.0\r\n\r\n", HANDSHAKE]
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        early = [await asyncio.open_connection("127.0.0.1", server.port) for _ in requests]
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal()
            await server.until_draining()
            for request, (reader, writer) in zip(requests, early, strict=True):
                writer.write(request)
                assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
                writer.close()
                await writer.wait_closed()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


GOES_ON = """
import pathlib, sys, time, twilio_aura
status = twilio_aura.main()
print("main has returned", flush=True)
while not pathlib.Path(__file__).with_name("enough").exists():
    time.sleep(0.01)
sys.exit(status)
"""


async def test_sound_after_the_end(tmp_path: Path) -> None:
    """What Deepgram sends when the server has ended is dropped quietly."""
    go = asyncio.Event()
    program = tmp_path / "program.py"
    program.write_text(GOES_ON)
    async with (
        Deepgram(default=Answer(gate=go)) as deepgram,
        Server({"DEEPGRAM_URL": deepgram.url}, program) as server,
    ):
        await deepgram.until_asked(GREETING)
        server.signal()
        await server.until(lambda: "main has returned" in server.output)
        go.set()
        await deepgram.until(lambda: deepgram.under_way == 0)
        await asyncio.sleep(0.1)  # for the server's thread to read it
        (tmp_path / "enough").touch()
        assert await server.end() == 0
        assert server.lines("Traceback|Exception|Error") == []


async def test_second_signal(deepgram: Deepgram) -> None:
    """A second signal ends it at once."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}) as server:
        async with dial(server.url, speed=0.0001) as phone:
            await phone.until_mark()
            server.signal(signal.SIGINT)
            await server.until_draining()
            server.signal(signal.SIGINT)
            assert await phone.until_closed() == 1001
        assert await server.end() == 0


async def test_rejected_greeting_while_draining(deepgram: Deepgram) -> None:
    """A greeting that is rejected only while the server drains cuts nobody off."""
    go = asyncio.Event()
    sentences = [f"This is greeting number {number:03} of so many." for number in range(60)]
    first = deepgram.answer(" ".join(sentences[:7]), Answer(gate=go))  # under 300 characters
    second = deepgram.answer(" ".join(sentences[7:14]), Answer(status=400, body=b"no"))
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": " ".join(sentences)}
    async with Server(settings) as server:
        await deepgram.until_asked(first)
        await deepgram.until_asked(second)
        async with dial(server.url, parameters={"text": "Not cut off."}, speed=1) as phone:
            await phone.until_mark()
            server.signal()
            await server.until_draining()
            go.set()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise("Not cut off.")
        assert await server.end() == 0


async def test_rejected_greeting_lets_callers_go(deepgram: Deepgram) -> None:
    """When Deepgram rejects the greeting, callers who are already there hear the <Say>."""
    greeting = deepgram.answer("no", Answer(status=402, body=b"no credit", delay_seconds=0.3))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        async with dial(server.url) as phone:
            assert await phone.until_closed() == 1011
        assert await server.end() == 1
