"""Nobody can fill the log: of a kind of warning or error, five lines a second are the most."""

import asyncio
import collections
import contextlib
import re
import shutil

import psutil
import pytest

from tests.standins import poll
from tests.standins.deepgram import Answer, Deepgram
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, dial
from tests.standins.twilio import TOKEN

MAX_PER_SECOND = 5


def assert_few_of_a_kind(server: Server) -> None:
    """Check the warnings and errors of each second, of which those of a kind begin alike."""
    kinds = collections.Counter(
        re.findall(r"^(\S+ [\d:]+),\d+ (?:WARNING|ERROR) (.{20})", server.log, re.MULTILINE)
    )
    assert kinds
    assert max(kinds.values()) <= MAX_PER_SECOND


async def send(server: Server, junk: bytes) -> None:
    """Connect, send `junk`, and wait until the server has closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(junk)
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()


async def send_often(server: Server, junk: bytes) -> None:
    """Do so three hundred times, from thirty clients at once."""

    async def client() -> None:
        for _ in range(10):
            await send(server, junk)

    await asyncio.gather(*(client() for _ in range(30)))
    await asyncio.sleep(0.1)  # so that no line is still under way


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\nGE",  # websockets logs a traceback for each
        HANDSHAKE,  # without a signature
        HANDSHAKE.replace(b"/twilio", b"/other"),
    ],
)
async def test_junk_before_the_handshake(deepgram: Deepgram, junk: bytes) -> None:
    """Whatever strangers send, and however often, it is some lines a second."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}
    async with Server(settings) as server:
        await send_often(server, junk)
        assert_few_of_a_kind(server)


async def test_junk_on_a_call(deepgram: Deepgram) -> None:
    """An empty stream SID is no start, and a thousand of them are some lines."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with dial(server.url, start=False) as phone:
            for _ in range(1000):
                await phone.send("start", start={"streamSid": "", "callSid": "CA1"})
            await phone.hang_up()
        await server.logged(" ended: hung up")
        assert " started" not in server.log
        assert_few_of_a_kind(server)


async def test_failures_of_many(deepgram: Deepgram) -> None:
    """What fails for many at once is logged some times, and each call with its end."""
    calls = 30

    async def call(server: Server, number: int) -> None:
        text = deepgram.answer(f"fails for many {number}", Answer(status=400, body=b"no"))
        async with dial(server.url, parameters={"text": text}) as phone:
            assert await phone.until_closed() == 1011
        await server.until_ended(phone.call_sid)

    settings = {"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": str(calls)}
    async with Server(settings) as server:
        await asyncio.gather(*(call(server, number) for number in range(calls)))
        assert_few_of_a_kind(server)


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is Linux's")
async def test_out_of_files(deepgram: Deepgram) -> None:
    """Out of descriptors the server does not fill the log, either, and recovers."""
    prefix = ["prlimit", "--nofile=64:64"]
    # Not in debug mode, in which no two of asyncio's messages are alike.
    flags = ("-W", "error")
    async with Server({"DEEPGRAM_URL": deepgram.url}, prefix=prefix, flags=flags) as server:
        process = psutil.Process(server.process.pid)  # which prlimit has become
        async with dial(server.url) as first:
            await first.until_mark()
            writers = []
            for _ in range(100):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writers.append(writer)
            await poll(lambda: process.num_fds() >= 63)
            await asyncio.sleep(1)  # in which asyncio tries to accept the others
            await first.press("1")  # who is there is served
            for writer in writers:
                writer.transport.abort()
            await first.hang_up()
        async with dial(server.url) as phone:
            await phone.until_mark()
        assert_few_of_a_kind(server)
