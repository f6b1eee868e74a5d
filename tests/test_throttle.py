"""Nobody can fill the log: of a kind of warning or error, five lines a second are the most."""

import asyncio
import collections
import contextlib
import logging
import re
import shutil

import psutil
import pytest

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import Deepgram
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, dial
from tests.standins.twilio import TOKEN

MAX_PER_SECOND = 5


class Log(logging.Logger):
    """A logger with a throttle, and a clock of its own.

    Attributes:
        lines: What was let through.
        seconds: What its clock shows.
    """

    def __init__(self, name: str, throttle: twilio_aura.Throttle) -> None:
        super().__init__(name)
        self.lines: list[str] = []
        self.seconds = 0.0
        self.addFilter(self._date)
        self.addFilter(throttle)
        self.addFilter(self._keep)

    def _date(self, record: logging.LogRecord) -> bool:
        record.created = self.seconds
        return True

    def _keep(self, record: logging.LogRecord) -> bool:
        self.lines.append(record.getMessage())
        return False


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Return a log in place of the module's, so that the throttle itself logs there, too."""
    log = Log("twilio_aura", twilio_aura.Throttle())
    monkeypatch.setattr(twilio_aura, "log", log)
    return log


def test_five_of_a_kind(log: Log) -> None:
    """Five lines that differ only in their arguments are let through in a second, of each kind."""
    for number in range(100):
        log.warning("this, %d", number)
        log.error("that, %d", number)
    assert log.lines == [f"{kind}, {number}" for number in range(5) for kind in ("this", "that")]


def test_it_forgets(log: Log) -> None:
    """In the next second a kind is logged again, and how many lines of it were dropped is told."""
    for second in (7.9, 8.0, 9.5):
        log.seconds = second
        log.lines.clear()
        for number in range(12):
            log.warning("this, %d", number)
        let_through = [f"this, {number}" for number in range(5)]
        if second > 7.9:
            let_through.insert(0, "7 more lines like this: this, %d")
        assert log.lines == let_through
    log.lines.clear()
    for second in range(10, 13):
        log.seconds = second
        log.warning("that")
    assert log.lines == ["7 more lines like this: this, %d", "that", "that", "that"]


def test_count_before_the_next_call(log: Log) -> None:
    """How many lines were dropped is told before the next line, though it is one of a call."""
    for number in range(12):
        log.warning("this, %d", number)
    log.seconds = 1.0
    log.info("a call")
    assert log.lines[5:] == ["7 more lines like this: this, %d", "a call"]


def test_lines_of_calls(log: Log) -> None:
    """The INFO lines of the calls themselves are all let through, and no other lines are."""
    websockets = Log("websockets.server", twilio_aura.Throttle())
    for _ in range(100):
        log.info("call started")
        log.debug("call ended")
        websockets.info("connection open")
    assert collections.Counter(log.lines) == {"call started": 100, "call ended": 5}
    assert websockets.lines == 5 * ["connection open"]


# In a server


def assert_few_of_a_kind(server: Server) -> None:
    """Check the records of each second but those of calls; the ones of a kind begin alike."""
    records = re.findall(r"^(\S+ [\d:]+),\d+ ([A-Z]+ .{30})", server.log, re.MULTILINE)
    kinds = collections.Counter(record for record in records if "INFO call" not in record[1])
    assert kinds
    assert max(kinds.values()) <= MAX_PER_SECOND


async def send(server: Server, junk: bytes) -> None:
    """Connect, send `junk`, and wait until the server has closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(junk)
    with contextlib.suppress(ConnectionError):
        assert b" 101 " not in await reader.readline()
        await reader.read()
    writer.close()


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
async def test_junk_before_the_handshake(deepgram: Deepgram, level: str) -> None:
    """Whatever strangers send, and however often, it is some lines a second, at DEBUG, too."""
    kinds = [
        b"GET / HTTP/1.1\r\n\r\nGE",  # websockets logs a traceback for each
        b"HEAD / HTTP/1.0\r\n\r\n",  # websockets before 17, too
        HANDSHAKE,  # without a signature
        HANDSHAKE.removesuffix(b"\r\n") + b"X-Twilio-Signature: none\r\n\r\n",
        HANDSHAKE.replace(b"/twilio", b"/other"),
    ]

    async def client() -> None:
        for junk in 5 * kinds:
            await send(server, junk)

    settings = {"TWILIO_AUTH_TOKEN": TOKEN, "LOG_LEVEL": level}
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        await asyncio.gather(*(client() for _ in range(20)))
        server.signal()
        assert await server.end() == 0
        assert_few_of_a_kind(server)


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is Linux's")
async def test_out_of_files(deepgram: Deepgram) -> None:
    """Out of descriptors the server does not fill the log, either, and recovers."""
    prefix = ["prlimit", "--nofile=64:64"]
    # Not in debug mode, in which no two of asyncio's messages are alike.
    flags = ("-W", "error")
    settings = {"DEEPGRAM_URL": deepgram.url}
    # Nobody else's connection is closed meanwhile.
    async with Server(settings, prefix=prefix, flags=flags, HANDSHAKE_SECONDS=1000) as server:
        process = psutil.Process(server.process.pid)  # which prlimit has become
        async with dial(server.url) as first:
            await first.until_mark()
            writers = []
            for _ in range(100):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writers.append(writer)
            await poll(lambda: process.num_fds() >= 63)
            await server.logged("ERROR socket.accept")
            await first.press("1")  # who is there is served
            for writer in writers:
                writer.transport.abort()
            await first.hang_up()
        async with dial(server.url) as phone:
            await phone.until_mark()
        assert_few_of_a_kind(server)
