"""Measure the server beside the least that could be done, and print one table.

The server runs as a process of its own on one core; a stand-in for Deepgram, which takes 200 ms to
its first byte, and the callers share another. The column "floor" has what the same callers measure
of a `websockets` server that answers `start` with a ready-made frame and throws all else away; for
new texts it has what plain `requests` takes to the first byte, in a thread a text, on the server's
core. The stand-in's 200 ms are taken off wherever the table says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http.client import HTTPConnection, HTTPResponse
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests import floor
from tests.callers import (
    CONNECTED,
    GREETING,
    HANDSHAKE,
    PING,
    PONG,
    VOICE,
    WAIT_SECONDS,
    all_of,
    connect,
    first_frames,
    heard,
    start,
)
from tests.chart import Bar, chart
from tests.server import MODULE, Server

DEEPGRAM_MS = 200.0
SERVER_CORE, CALLERS_CORE = 0, 1


@dataclasses.dataclass
class Row:
    """A line of the table; what was measured is as it should be if it is at most `limit`."""

    what: str
    unit: str
    floor: float | None
    ours: float
    limit: float | None
    requests: float | None = None  # that Deepgram saw in a round


# --- Processes ------------------------------------------------------------------------------------

CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def pin(core: int) -> None:
    """Keep this process, and those it starts from now on, on `core`, where that can be done."""
    if sys.platform == "linux" and len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[core]})


@asynccontextmanager
async def running(core: int, *command: str, **settings: str) -> AsyncIterator[Process]:
    """Run `command` on `core` with these settings, until the block ends."""
    pin(core)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=Path(__file__).parent,  # has no .env
        env=Server({"PYTHONPATH": str(MODULE.parent), **settings}).environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    pin(CALLERS_CORE)
    try:
        yield Process(child)
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


class Process:
    """A process that was started, and what it costs."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self._system = psutil.Process(child.pid)
        self.url = ""

    async def line(self) -> str:
        """Return its next line of output."""
        assert self._child.stdout
        async with asyncio.timeout(WAIT_SECONDS):
            line = await self._child.stdout.readline()
        if not line:
            raise RuntimeError("a process ended before it said all")
        return line.decode()

    async def round(self) -> list[float]:
        """Have it do a round, and return the milliseconds of each caller."""
        assert self._child.stdin
        self._child.stdin.write(b"\n")
        return [seconds * 1000 for seconds in json.loads(await self.line())]

    async def listening(self) -> Process:
        """Return it when it has said where it listens."""
        while not (said := re.search(r"\w+://127\.0\.0\.1:\d+", await self.line())):
            pass
        self.url = said[0]
        return self

    def cpu_seconds(self) -> float:
        """Return the processor time it has used so far."""
        with contextlib.suppress(OSError):  # Linux has it to the nanosecond, of the first thread
            return int(Path(f"/proc/{self._child.pid}/schedstat").read_text().split()[0]) / 1e9
        times = self._system.cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> int:
        """Return what it has in memory."""
        return int(self._system.memory_info().rss)

    def threads(self) -> int:
        """Return how many threads it has."""
        return int(self._system.num_threads())

    def files(self) -> int:
        """Return how many sockets and other files it has open."""
        count = "num_handles" if sys.platform == "win32" else "num_fds"
        return int(getattr(self._system, count)())


@asynccontextmanager
async def server(deepgram: Process, **settings: str) -> AsyncIterator[Process]:
    """Run the real server, with the greeting kept."""
    settings = {"DEEPGRAM_URL": deepgram.url, "MAX_CALLS": "2000", **settings}
    async with running(SERVER_CORE, str(MODULE), **settings) as process:
        await process.listening()
        await first_frames(process.url, [GREETING])
        yield process


@asynccontextmanager
async def websockets_floor() -> AsyncIterator[Process]:
    """Run the server that only answers and throws away."""
    async with running(SERVER_CORE, "-m", "tests.floor", "websockets") as process:
        await process.listening()
        await first_frames(process.url, [GREETING])
        yield process


@asynccontextmanager
async def requests_floor(
    deepgram: Process, callers: int, apart_seconds: float
) -> AsyncIterator[Process]:
    """Run the threads that only post, a round of which begins at an empty line."""
    arguments = ("requests", deepgram.url, str(callers), str(apart_seconds))
    async with running(SERVER_CORE, "-m", "tests.floor", *arguments) as process:
        yield process


def ask(process: Process, method: str, path: str, body: str = "") -> HTTPResponse:
    """Return what `process` answers to an HTTP request."""
    connection = HTTPConnection(urlsplit(process.url).netloc, timeout=WAIT_SECONDS)
    connection.request(method, path, body, floor.HEADERS)
    return connection.getresponse()


async def requests_seen(deepgram: Process) -> int:
    """Return how many requests the stand-in has had, this one included."""
    response = await asyncio.to_thread(ask, deepgram, "POST", floor.SPEAK, '{"text": "How many?"}')
    return int(response.headers["dg-request-id"].removeprefix("request-"))


# --- What is measured -----------------------------------------------------------------------------


def percentile_99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


async def kept_text(ours: Process, deepgram: Process) -> AsyncIterator[Row]:
    """Measure how soon callers hear what is in memory."""
    async with websockets_floor() as least:
        for callers, rounds, limit in ((1, 100, 2), (100, 9, 30), (500, 7, 200)):
            before = await requests_seen(deepgram)
            figures: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for process, worst_ms in zip((least, ours), figures, strict=True):
                    frames_ms = await first_frames(process.url, [GREETING] * callers)
                    worst_ms.append(percentile_99(frames_ms))
            floor_ms, ours_ms = map(statistics.median, figures)
            seen = await requests_seen(deepgram) - before - 1
            who = f"{callers} callers at once, 99th percentile" if callers > 1 else "one caller"
            yield Row(f"text kept, {who}", "ms", floor_ms, ours_ms, limit, seen)


async def new_text(ours: Process, deepgram: Process) -> AsyncIterator[Row]:
    """Measure how soon callers hear what Deepgram is asked for, less Deepgram's own time."""
    numbers = itertools.count(1)
    for who, texts, callers, rounds, apart_seconds, limit in (
        ("one caller", 1, 1, 15, 0.0, 5),
        ("100 callers at once, one text, the last of them", 1, 100, 9, 0.0, 40),
        ("100 callers within a second, 100 texts, the last of them", 100, 100, 3, 0.01, 50),
        ("100 callers at once, 100 texts, the last of them", 100, 100, 7, 0.0, None),
        ("500 callers at once, 500 texts, the last of them", 500, 500, 7, 0.0, 600),
    ):
        last_ms, floor_ms = [], []
        async with requests_floor(deepgram, texts, apart_seconds) as least:
            before = await requests_seen(deepgram)
            for _ in range(rounds):
                said = [f"New text {next(numbers)}." for _ in range(texts)] * (callers // texts)
                last_ms.append(max(await first_frames(ours.url, said, apart_seconds)))
                floor_ms.append(max(await least.round()))
            seen = (await requests_seen(deepgram) - before - 1) / rounds - texts
        floors, figures = (statistics.median(ms) - DEEPGRAM_MS for ms in (floor_ms, last_ms))
        yield Row(f"new text, {who}", "ms", floors, figures, limit, seen)


async def inbound_message(ours: Process) -> Row:
    """Measure what a message of a caller's voice costs, in turns with the floor.

    Of the rounds the median counts: where other work delays the server, messages queue, are read
    together and cost less, so the least is no measure of an undisturbed round.
    """
    calls, ticks, rounds = 200, 50, 20
    async with websockets_floor() as least:
        lines = [(process, await heard(process.url, calls)) for process in (least, ours)]
        costs = []
        for process, callers in lines * rounds:
            before, began = process.cpu_seconds(), time.perf_counter()
            for tick in range(ticks):
                for caller in callers:
                    caller.transport.write(VOICE)
                await asyncio.sleep(began + tick * 0.01 - time.perf_counter())
            await all_of(caller.send(PING, until=PONG) for caller in callers)
            costs.append((process.cpu_seconds() - before) / (calls * ticks) * 1e6)
        for _, callers in lines:
            await all_of(caller.hang_up() for caller in callers)
    floor_us, ours_us = statistics.median(costs[::2]), statistics.median(costs[1::2])
    room = 1e6 / 50 / ours_us  # a caller sends 50 a second
    what = f"processor time of an inbound message (so a core holds {room:.0f} calls)"
    return Row(what, "µs", floor_us, ours_us, 1.1 * floor_us)


async def open_call(deepgram: Process, calls_at_once: int) -> tuple[float, float]:
    """Return the KB that each of 500 calls takes after its greeting, the floor's and ours."""
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for kilobytes, fresh in zip(figures, (websockets_floor(), server(deepgram)), strict=True):
            async with fresh as process:
                await all_of(caller.hang_up() for caller in await heard(process.url, 20))
                before = process.memory_bytes()
                for _ in range(0, 500, calls_at_once):
                    await heard(process.url, calls_at_once)
                kilobytes.append((process.memory_bytes() - before) / 500 / 1024)
    return statistics.median(figures[0]), statistics.median(figures[1])


async def hang_ups(deepgram: Process) -> AsyncIterator[Row]:
    """Measure what is left of 2000 calls that ended at any moment, in all the ways there are."""
    chance = random.Random(2000)
    room = asyncio.Semaphore(100)

    async def hung_up(process: Process, number: int) -> None:
        async with room:
            caller = await connect(process.url)
            talking = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0, 0.4)):
                    await caller.send(HANDSHAKE, until=b" 101 ")
                    talking = True
                    caller.transport.write(CONNECTED)
                    text = chance.choice([GREETING, f"Hung up on {number}."])
                    await caller.send(start(text), until=b'"mark"')
                    await asyncio.Event().wait()
            if not talking or chance.random() < 0.3:
                caller.transport.abort()  # the network is lost
            await caller.hang_up(stop=chance.random() < 0.5)

    async def left(process: Process) -> tuple[int, int, float]:
        """Return the threads, sockets and other files, and MB it has when all has come to rest."""
        before, at_rest_since = None, time.perf_counter()
        while time.perf_counter() - at_rest_since < 1:
            health = (await asyncio.to_thread(ask, process, "GET", "/healthz")).read()
            await asyncio.sleep(0.1)
            has = health, process.threads(), process.files()
            if has != before or health != b'{"calls": 0}':
                before, at_rest_since = has, time.perf_counter()
        return process.threads(), process.files(), process.memory_bytes() / 2**20

    async with server(deepgram, CACHE_MB="1") as process:
        await all_of(hung_up(process, number) for number in range(-300, 0))
        before = await left(process)
        await all_of(hung_up(process, number) for number in range(2000))
        after = await left(process)
    for what, unit, limit, was, now in zip(
        ("threads", "sockets and other files", "memory"),
        ("", "", "MB"),
        (0, 0, 4),
        before,
        after,
        strict=True,
    ):
        yield Row(f"left after 2000 hang-ups: {what}", unit, None, now - was, limit)


# --- What is printed ------------------------------------------------------------------------------


def figure(value: float | None, unit: str) -> str:
    """Return `value` with its unit, in three digits or so."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}".strip()


def table(rows: Sequence[Row]) -> str:
    """Return `rows` in GitHub's Markdown."""
    lines = ["| | floor | ours | to be met | requests to Deepgram |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        cells = [row.what, figure(row.floor, row.unit), figure(row.ours, row.unit)]
        limit = "-" if row.limit is None else f"≤ {figure(row.limit, row.unit)}"
        missed = row.limit is not None and row.ours > row.limit
        cells += [limit + " (missed)" * missed, figure(row.requests, "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Return what this was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if named := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            model = named[1]
    cores = "a core for the server" if len(CORES) > 1 else "all on any core"
    packages = ", ".join(f"{name} {version(name)}" for name in ("websockets", "requests"))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{model}, {cores}; {platform.system()}, {python}, {packages}"


# What the issue that set these figures quotes of others, in ms, Deepgram's 200 included.
CHARTED = {
    "text kept, one caller": {"best of the others": 202.0},
    "text kept, 100 callers at once, 99th percentile": {},
    "text kept, 500 callers at once, 99th percentile": {},
    "new text, 100 callers at once, one text, the last of them": {
        "aiohttp both ways": 228.0,
        "pipecat": 1372.0,
        "Deepgram's demo": 18_700.0,
    },
    "new text, 100 callers within a second, 100 texts, the last of them": {
        "Deepgram's demo": 37_000.0
    },
    "new text, 500 callers at once, 500 texts, the last of them": {"aiohttp both ways": 391.0},
}


def bars(rows: Sequence[Row]) -> dict[str, list[Bar]]:
    """Return what the chart shows: first frames, Deepgram's own time included."""
    shown = {}
    for row in rows:
        if row.what in CHARTED and row.floor is not None:
            new = row.what.startswith("new")
            deepgram_ms, least = (DEEPGRAM_MS, "requests") if new else (0.0, "websockets")
            shown[row.what] = [
                Bar("ours", row.ours + deepgram_ms, "ours"),
                Bar(f"floor: {least} alone", row.floor + deepgram_ms, "floor"),
                *(Bar(who, ms, "others") for who, ms in CHARTED[row.what].items()),
            ]
    return shown


async def measure() -> AsyncIterator[Row]:
    """Yield the rows of the table as they are measured."""
    delay = str(DEEPGRAM_MS / 1000)
    async with running(CALLERS_CORE, "-m", "tests.deepgram", "--delay-seconds", delay) as deepgram:
        await deepgram.listening()
        async with server(deepgram) as ours:
            async for row in kept_text(ours, deepgram):
                yield row
            yield await inbound_message(ours)
        async with server(deepgram, DEEPGRAM_CONCURRENCY="500") as ours:
            async for row in new_text(ours, deepgram):
                yield row
        one_by_one, at_once = await open_call(deepgram, 1), await open_call(deepgram, 500)
        yield Row("memory of an open call, of 500 that came one by one", "KB", *one_by_one, 24)
        yield Row("memory of an open call, of 500 that came at once", "KB", *at_once, None)
        async for row in hang_ups(deepgram):
            yield row


async def main() -> None:
    """Measure all, and print and draw it as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--svg", type=Path, help="where to draw the chart")
    given = parser.parse_args()
    rows = []
    async for row in measure():
        print(f"{row.what}: {figure(row.ours, row.unit)}", file=sys.stderr, flush=True)
        rows.append(row)
    if given.svg:
        given.svg.write_text(chart(bars(rows)), encoding="utf-8")
    if given.json:
        print(json.dumps({"machine": machine(), "rows": list(map(dataclasses.asdict, rows))}))
    else:
        print(f"{table(rows)}\n\n{machine()}")


if __name__ == "__main__":
    asyncio.run(main())
