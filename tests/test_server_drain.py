"""How the server ends: whoever is being spoken to hears the text out, and nobody holds it up.

What a draining call does at each point of its script is in test_call.py.
"""

import asyncio
import atexit
import io
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

import twilio_aura
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, Stream, dial, frame

NEVER = 0.0001  # seconds of audio played in a second


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_nobody_on_the_line(deepgram: Deepgram, signum: int) -> None:
    """With nobody on the line a stop is immediate, even with a connection that asks nothing."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}
    async with Server(settings, HANDSHAKE_SECONDS=1000) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        server.signal(signum)
        assert await server.end() == 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_drain(deepgram: Deepgram, signum: int) -> None:
    """Who is being spoken to hears the sentence out, whoever is not is let go, nobody gets in."""
    go = asyncio.Event()
    text = deepgram.answer(f"drained by {signum}", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}) as server:
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
            await connected.start()  # it was let in before, so it is told what becomes of it
            assert await connected.until_closed() == 1000
            go.set()
            assert await listening.until_closed() == 1000
            assert listening.heard == noise(text)
        assert await server.end() == 0
        for phone in (idle, listening, connected):
            assert (await server.until_ended(phone.call_sid)).startswith("drained;")
        assert "Traceback" not in server.log


async def test_asked_while_draining(deepgram: Deepgram) -> None:
    """While draining, who had connected before is told 503: health check and caller alike."""
    requests = [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", HANDSHAKE]
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}
    async with Server(settings, HANDSHAKE_SECONDS=1000) as server:
        early = [await asyncio.open_connection("127.0.0.1", server.port) for _ in requests]
        async with dial(server.url, speed=NEVER) as phone:
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


def replace_stderr() -> None:
    """Put something in place of sys.stderr that is no file, as a script may to collect its log."""
    sys.stderr = io.StringIO()


async def test_drain_without_a_stderr(deepgram: Deepgram) -> None:
    """A script that has put something in place of sys.stderr drains as any other."""
    text = "This is heard to its end."
    async with Server({"DEEPGRAM_URL": deepgram.url}, before=replace_stderr) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.until_sound()
            server.signal()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise(text)
        assert await server.end() == 0


# Cut off


async def test_second_signal(deepgram: Deepgram) -> None:
    """A second signal ends it at once."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}) as server:
        async with dial(server.url, speed=NEVER) as phone:
            await phone.until_mark()
            server.signal(signal.SIGINT)
            await server.until_draining()
            server.signal(signal.SIGINT)
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        assert (await server.until_ended(phone.call_sid)).startswith("cut off by shutdown;")


async def test_drain_seconds(deepgram: Deepgram) -> None:
    """When DRAIN_SECONDS have elapsed, not the 25 of the default, the rest are cut off."""
    async with Server({"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1"}) as server:
        async with asyncio.timeout(15), dial(server.url, speed=NEVER) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        assert (await server.until_ended(phone.call_sid)).startswith("cut off by shutdown;")


async def tidies_up(call: twilio_aura.Call) -> None:
    """Say something, and write down that the call is over, which takes a while."""
    try:
        await call.say("Never heard out.")
    finally:
        await asyncio.sleep(0.3)
        print("tidied up", flush=True)


async def test_script_that_tidies_up(deepgram: Deepgram) -> None:
    """With DRAIN_SECONDS=0, too, a script that is cut off has some time for what it does then."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "0"}
    async with Server(settings, tidies_up, CLOSE_SECONDS=20.0) as server:
        async with dial(server.url, speed=NEVER) as phone:
            await phone.until_mark()
            server.signal()
            assert await phone.until_closed() == 1001
        assert await server.end() == 0
        assert server.output.endswith("tidied up\n")


class MutePhone:
    """A caller's side that takes what comes, and answers nothing, not even a close."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stream = Stream()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writer.write(HANDSHAKE)
        await self._reader.readuntil(b"\r\n\r\n")
        self._send(self._stream.start_message())
        await self._server.until_started(self._stream.call_sid)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    def _send(self, message: str) -> None:
        self._writer.write(frame(json.loads(message)))

    async def hang_up(self) -> None:
        """Send `stop`, and wait for the close that it causes."""
        self._send(self._stream.stop_message())
        opcode = 0
        while opcode != 8:
            first, length = await self._reader.readexactly(2)
            opcode = first & 15
            if length == 126:
                length = int.from_bytes(await self._reader.readexactly(2))
            await self._reader.readexactly(length)


async def test_peer_that_does_not_answer(deepgram: Deepgram) -> None:
    """Who does not answer a close is let go after CLOSE_SECONDS."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "0"}
    async with Server(settings, CLOSE_SECONDS=0.2) as server, MutePhone(server):
        server.signal()
        async with asyncio.timeout(8):  # websockets itself waits for 10 s
            assert await server.end() == 0
        assert server.lines("ended: cut off by shutdown; the peer did not acknowledge the close;")


async def test_cut_off_of_who_is_closing(deepgram: Deepgram) -> None:
    """A call that is closing already keeps no other from being cut off, nor the process alive."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1000"}
    async with Server(settings, CLOSE_SECONDS=1.5) as server:
        async with MutePhone(server) as closing, dial(server.url, speed=NEVER) as phone:
            await phone.until_mark()
            await closing.hang_up()
            server.signal()
            await server.until_draining()
            server.signal()
            assert await phone.until_closed() == 1001
            assert await server.end() == 0
        assert server.lines("ended: hung up; the peer did not acknowledge the close;")
        assert "Traceback" not in server.log


# Scripts that hold it up


async def catches_everything(call: twilio_aura.Call) -> None:
    """Go on, whatever happens."""
    while True:
        with suppress(BaseException):
            await call.say("Again.")
            await call.digit(1)


async def has_a_thread(call: twilio_aura.Call) -> None:
    """Wait in a thread for what never comes."""
    await asyncio.to_thread(time.sleep, 1000)
    await call.say("Never said.")


async def has_an_executor(call: twilio_aura.Call) -> None:
    """Wait so in a thread of its own, which Python joins when `main` has returned."""
    await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(), time.sleep, 1000)
    await call.say("Never said.")


@pytest.mark.parametrize("script", [catches_everything, has_a_thread, has_an_executor])
async def test_script_that_goes_on(deepgram: Deepgram, script: twilio_aura.Script) -> None:
    """A script that does not end with its call keeps the process for some seconds, and no more."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "0"}
    async with Server(settings, script, CLOSE_SECONDS=0.2, EXIT_SECONDS=1.0) as server:
        async with dial(server.url) as phone:
            await server.until_started(phone.call_sid)
            await phone.hang_up()
        await server.until_ended(phone.call_sid)
        if script is catches_everything:
            warning = f" WARNING call {phone.call_sid}: its script goes on: "
            assert len(server.lines(warning)) == 1
        server.signal()
        async with asyncio.timeout(15):
            await server.end()
    assert "Timeout (0:00:01)!" in server.full_log  # with what each thread was at


async def test_script_that_goes_on_when_the_greeting_is_rejected(deepgram: Deepgram) -> None:
    """Nor does it keep a server that ends without a signal."""
    go = asyncio.Event()
    answer = Answer(status=402, body=b"no", write_sizes=[1], gate=go)
    greeting = deepgram.answer("rejected while a script goes on", answer)
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": greeting, "DRAIN_SECONDS": "0"}
    script = catches_everything
    async with Server(settings, script, CLOSE_SECONDS=0.2, EXIT_SECONDS=1.0) as server:
        async with dial(server.url) as phone:
            await phone.until_sound()
            go.set()
            await phone.until_closed()
        async with asyncio.timeout(15):
            assert await server.end() == 1


async def computes(call: twilio_aura.Call) -> None:
    """Keep the event loop busy for ever."""
    print(call, flush=True)
    while True:
        pass


async def sleeps(call: twilio_aura.Call) -> None:
    """Stop the event loop for longer than anybody waits."""
    print(call, flush=True)
    time.sleep(1000)  # noqa: ASYNC251


@pytest.mark.parametrize("script", [computes, sleeps])
async def test_script_that_blocks(deepgram: Deepgram, script: twilio_aura.Script) -> None:
    """A script that blocks the event loop does not hold up the end, and its place is named."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "1"}
    async with Server(settings, script, EXIT_SECONDS=0.5) as server, dial(server.url) as phone:
        await server.until(lambda: phone.call_sid in server.output)
        server.signal()
        async with asyncio.timeout(15):
            assert await server.end() == 1
    _, _, trace = server.full_log.partition("Timeout (0:00:01.500000)!\n")
    assert f'File "{__file__}", line ' in trace
    assert f" in {script.__name__}\n" in trace


async def test_impatient_signals(deepgram: Deepgram) -> None:
    """More signals, where a script blocks the event loop, do not put the end off."""
    settings = {"DEEPGRAM_URL": deepgram.url, "DRAIN_SECONDS": "2"}
    async with Server(settings, computes, EXIT_SECONDS=0.5) as server, dial(server.url) as phone:
        await server.until(lambda: phone.call_sid in server.output)
        async with asyncio.timeout(15):
            while server.process.returncode is None:
                with suppress(ProcessLookupError):  # It has just ended.
                    server.signal(signal.SIGINT)
                await asyncio.sleep(0.5)
            assert await server.end() == 1


def test_limit_of_the_end() -> None:
    """What is left when all calls were cut off has some seconds, and no more."""
    assert 2 * twilio_aura.CLOSE_SECONDS < twilio_aura.EXIT_SECONDS < 10


# The greeting


@pytest.mark.parametrize("is_draining", [False, True])
async def test_rejected_greeting(deepgram: Deepgram, is_draining: bool) -> None:
    """When Deepgram rejects the greeting, calls are drained, and none is cut off if they were."""
    rejection, speech = asyncio.Event(), asyncio.Event()
    greeting = deepgram.answer(
        f"rejected, {is_draining=}",
        Answer(status=402, body=b"no", write_sizes=[1], gate=rejection),
    )
    text = deepgram.answer(f"not cut off, {is_draining=}", Answer(gate=speech))
    settings = {"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}
    async with Server(settings) as server:
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.until_sound()
            if is_draining:
                server.signal()
                await server.until_draining()
            rejection.set()
            await server.logged(" ERROR Deepgram answered 402")
            speech.set()
            assert await phone.until_closed() == 1000
            assert phone.heard == noise(text)
        assert await server.end() == (0 if is_draining else 1)


async def test_greeting_that_is_rejected_in_a_call(deepgram: Deepgram) -> None:
    """A caller who is to hear the greeting that Deepgram rejects hears the <Say> instead."""
    rejection = asyncio.Event()
    greeting = deepgram.answer(
        "no credit", Answer(status=402, body=b"no", write_sizes=[1], gate=rejection)
    )
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        async with dial(server.url) as phone:
            await server.until_started(phone.call_sid)
            rejection.set()
            assert await phone.until_closed() == 1011
        assert await server.end() == 1


# After the end


def linger() -> None:
    """Have the process live on when `main` has returned, until there is a file of this name."""

    def wait() -> None:
        print("main has returned", flush=True)
        while not Path("enough").exists():
            time.sleep(0.01)

    atexit.register(wait)


async def test_signal_after_the_end(deepgram: Deepgram, tmp_path: Path) -> None:
    """A signal that comes when the server has just ended says nothing, and changes nothing."""
    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(settings, before=linger, cwd=tmp_path) as server:
        server.signal()
        await server.until(lambda: "main has returned" in server.output)
        server.signal()
        await asyncio.sleep(0.1)  # for the process to take it
        (tmp_path / "enough").touch()
        assert await server.end() == 0
        assert server.complaints() == server.lines("TWILIO_AUTH_TOKEN")


async def test_sound_after_the_end(tmp_path: Path) -> None:
    """Deepgram does not hold up the end, and what it sends after that is dropped quietly."""
    go = asyncio.Event()
    async with Deepgram(default=Answer(gate=go)) as deepgram:
        settings = {"DEEPGRAM_URL": deepgram.url}
        async with Server(settings, before=linger, cwd=tmp_path, READ_SECONDS=1000) as server:
            await deepgram.until_asked(GREETING)
            server.signal()
            await server.until(lambda: "main has returned" in server.output)
            go.set()
            await deepgram.until(lambda: deepgram.under_way == 0)
            await asyncio.sleep(0.1)  # for the server's thread to read it
            (tmp_path / "enough").touch()
            assert await server.end() == 0
            assert server.lines("Traceback|Exception|Error") == []
