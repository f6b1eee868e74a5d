"""Measure the server beside two others on the same libraries, in one run, and print one table.

The server runs as a process of its own on one core; a stand-in for Deepgram, which takes 200 ms to
its first byte, and the callers share another. The others take turns with it, on the same core:

- "simplest" awaits the whole clip, with `requests` in the event loop, before it sends it
  (simplest.py). A round of it is enough, since it serves one caller after the other, and
  where that takes minutes, there is none.
- "baseline" is the least that could be done (baseline.py): a `websockets` server that answers
  `start` with a ready-made frame and discards all else; for new texts what plain `requests` takes
  to the first byte, in a thread a text.

Deepgram's 200 ms are taken off all figures of new texts; cached text is new to the simplest.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from tests.benchmark.baseline import HEADERS, SPEAK
from tests.benchmark.callers import (
    CONNECTED,
    HANDSHAKE,
    NO_TEXT,
    PING,
    PONG,
    VOICE,
    WAIT_SECONDS,
    all_of,
    connect,
    first_frames,
    heard,
    slow_link,
    spread,
    start,
)
from tests.benchmark.chart import Bar, chart
from tests.standins.deepgram import Answer, Deepgram
from tests.standins.process import MODULE, Server, program
from tests.standins.telephone import BYTES_PER_SECOND, Telephone, dial

DEEPGRAM_MS = 200.0
SERVER_CORE, CALLERS_CORE = 0, 1


@dataclasses.dataclass
class Row:
    """A line of the table; our figure is as it should be if it is at most `target`."""

    what: str
    unit: str
    target: float | None
    requests: float | None = None  # of ours, that Deepgram saw in a round
    simplest: float | None = None
    baseline: float | None = None
    ours: float = math.nan


# --- Processes ------------------------------------------------------------------------------------

CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def pin(core: int) -> None:
    """Keep this process, and those it starts from now on, on `core`, where that can be done."""
    if sys.platform == "linux" and len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[core]})


class Process:
    """A process that was started, and what it costs."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self._system = psutil.Process(child.pid)
        self.url = ""

    async def line(self, pattern: str) -> str:
        """Return what `pattern` matches in the next line of output in which it does."""
        assert self._child.stdout
        async with asyncio.timeout(WAIT_SECONDS):
            while line := await self._child.stdout.readline():
                if match := re.search(pattern, line.decode()):
                    return match[0]
        raise RuntimeError("a process ended before it said all")

    async def first_frames(self, texts: Sequence[str], apart_seconds: float) -> list[float]:
        """Call once for each of `texts`; return the milliseconds to each first frame.

        The baseline of new texts serves nobody: it posts each text once, up to the first byte.
        """
        if self.url.startswith("ws:"):
            return await first_frames(self.url, texts, apart_seconds)
        assert self._child.stdin
        task = json.dumps([list(dict.fromkeys(texts)), apart_seconds])
        self._child.stdin.write(f"{task}\n".encode())
        return [seconds * 1000 for seconds in json.loads(await self.line(r"^\[.*"))]

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


Program = Callable[[], AbstractAsyncContextManager[Process]]


@asynccontextmanager
async def running(core: int, *command: str, **settings: str) -> AsyncIterator[Process]:
    """Run `command` on `core` with these settings, from when it says its URL to the block's end."""
    pin(core)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=Path(__file__).parent,  # has no .env
        env=Server(settings).environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    pin(CALLERS_CORE)
    process = Process(child)
    try:
        process.url = await process.line(r"\w+://127\.0\.0\.1:\d+")
        yield process
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


@asynccontextmanager
async def ours(deepgram_url: str, script: str = "", **settings: str) -> AsyncIterator[Process]:
    """Run the real server, with the greeting fetched."""
    command = ("-c", program(script)) if script else (str(MODULE),)
    settings = {"DEEPGRAM_URL": deepgram_url, "MAX_CALLS": "2000", **settings}
    async with running(SERVER_CORE, *command, **settings) as process:
        await asyncio.sleep(3 * DEEPGRAM_MS / 1000)
        yield process


def baseline(**settings: str) -> AbstractAsyncContextManager[Process]:
    """Run the baseline of what is cached."""
    return running(SERVER_CORE, "-m", "tests.benchmark.baseline", "websockets", **settings)


def posts(deepgram_url: str) -> AbstractAsyncContextManager[Process]:
    """Run the baseline of new texts."""
    return running(SERVER_CORE, "-m", "tests.benchmark.baseline", "requests", deepgram_url)


def simplest(deepgram_url: str, **settings: str) -> AbstractAsyncContextManager[Process]:
    """Run the simplest way."""
    return running(SERVER_CORE, "-m", "tests.benchmark.simplest", deepgram_url, **settings)


async def medians(
    rounds: int, measure: Callable[[Process], Awaitable[float]], **programs: Program
) -> dict[str, float]:
    """Return the median of each program, of so many rounds in which they take turns."""
    figures: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            async with run() as process:
                figures[name].append(await measure(process))
    return {name: statistics.median(values) for name, values in figures.items()}


def up(process: Process) -> Program:
    """Return a program that is `process`, which runs already and goes on."""
    return lambda: nullcontext(process)


def ask(process: Process, method: str, path: str, body: str = "") -> HTTPResponse:
    """Return what `process` answers to an HTTP request."""
    connection = HTTPConnection(urlsplit(process.url).netloc, timeout=WAIT_SECONDS)
    connection.request(method, path, body, HEADERS)
    return connection.getresponse()


async def requests_seen(deepgram: Process) -> int:
    """Return how many requests the stand-in has had, this one included."""
    response = await asyncio.to_thread(ask, deepgram, "POST", SPEAK, '{"text": "How many?"}')
    return int(response.headers["dg-request-id"].removeprefix("request-"))


# --- First frames ---------------------------------------------------------------------------------


class Burst(NamedTuple):
    """Callers who come together; without texts they hear the greeting, which is cached."""

    what: str
    callers: int
    texts: int
    rounds: int
    target_ms: float
    apart_seconds: float = 0.0
    fresh: bool = False  # each round on a server just started


BURSTS = (
    Burst("cached text, one caller", 1, 0, 100, 2),
    Burst("cached text, 100 callers at once, 99th percentile", 100, 0, 9, 20),
    Burst("cached text, 500 callers at once, 99th percentile", 500, 0, 7, 85),
    Burst("new text, one caller", 1, 1, 31, 3.5),
    Burst("new text, 100 callers at once, one text, the last of them", 100, 1, 9, 40),
    Burst("new text, 500 callers at once, 500 texts, the last of them", 500, 500, 7, 600),
    Burst(
        "new text, 100 callers within a second, 100 texts, server just started, the last of them",
        *(100, 100, 5, 15, 0.01, True),
    ),
)
MAX_SIMPLEST_CALLERS = 100  # 20 s
numbers = itertools.count(1)


async def last_ms(burst: Burst, process: Process) -> float:
    """Return when the last caller heard the first frame, or the 99th percentile if it is cached."""
    texts = [f"New text {next(numbers)}." for _ in range(burst.texts)] or [NO_TEXT]
    said = texts * (burst.callers // len(texts))
    ms = sorted(await process.first_frames(said, burst.apart_seconds))
    return ms[-1] - DEEPGRAM_MS if burst.texts else ms[math.ceil(0.99 * len(ms)) - 1]


async def of_simplest(deepgram: Process, burst: Burst) -> dict[str, float]:
    """Return what the simplest way takes, if it does not take minutes."""
    if burst.callers > MAX_SIMPLEST_CALLERS:
        return {}
    async with simplest(deepgram.url) as process:
        rounds = 5 if burst.callers == 1 else 1
        return await medians(rounds, partial(last_ms, burst), simplest=up(process))


async def bursts(deepgram: Process) -> AsyncIterator[Row]:
    """Measure how soon callers hear the first frame."""
    # All at the same time, a process each: they do hardly more than wait.
    simple = await all_of(of_simplest(deepgram, burst) for burst in BURSTS)
    run_ours: Program = partial(ours, deepgram.url, DEEPGRAM_CONCURRENCY="500")
    run_posts: Program = partial(posts, deepgram.url)
    async with run_ours() as server, baseline() as answering, run_posts() as posting:
        for burst, figures in zip(BURSTS, simple, strict=True):
            others = {"baseline": run_posts, "ours": run_ours}
            if not burst.fresh:
                least = posting if burst.texts else answering
                others = {"baseline": up(least), "ours": up(server)}
            before = await requests_seen(deepgram)
            measured = partial(last_ms, burst)
            figures |= await medians(burst.rounds, measured, **others)
            seen = (await requests_seen(deepgram) - before - 1) / burst.rounds
            seen -= burst.texts + burst.fresh  # the baseline's, and the greeting
            yield Row(burst.what, "ms", burst.target_ms, seen, **figures)


# --- Processor time and memory --------------------------------------------------------------------

# asyncio reads into 256 KiB. Whether glibc maps and unmaps them for each message depends on what a
# process has freed before, and adds a third to the processor time of any of the three.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22)}


async def inbound_message(deepgram: Process) -> Row:
    """Measure what a message of a caller's voice costs, if each is read by itself.

    Messages that queue are read together and cost a quarter of that.
    """
    calls, messages, rounds = 200, 5000, 9

    async def microseconds(process: Process) -> float:
        before, due = process.cpu_seconds(), time.perf_counter()
        for caller in itertools.islice(itertools.cycle(callers[process]), messages):
            while time.perf_counter() < due:
                pass  # no sleep is so short
            caller.transport.write(VOICE)
            due += 1e-4
        await all_of(caller.send(PING, until=PONG) for caller in callers[process])
        return (process.cpu_seconds() - before) / messages * 1e6

    async with (
        Deepgram() as quick,  # else the simplest takes 40 s to greet so many
        simplest(quick.url, **MALLOC) as simple,
        baseline(**MALLOC) as answering,
        ours(deepgram.url, **MALLOC) as server,
    ):
        callers = {it: await heard(it.url, calls) for it in (simple, answering, server)}
        programs = {"simplest": up(simple), "baseline": up(answering), "ours": up(server)}
        figures = await medians(rounds, microseconds, **programs)
    room = 1e6 / 50 / figures["ours"]  # a caller sends 50 a second
    what = f"processor time of an inbound message (so a core holds {room:.0f} calls)"
    return Row(what, "µs", 1.05 * figures["baseline"], **figures)


async def idle_mb(process: Process) -> float:
    """Return the memory of a process that has only been started."""
    return process.memory_bytes() / 2**20


async def kilobytes_a_call(calls: int, seconds: float, talking: bool, process: Process) -> float:
    """Return what each of so many calls that come within so many seconds adds to the memory."""
    await all_of(caller.hang_up() for caller in await heard(process.url, 20))
    before = process.memory_bytes()
    tasks = await spread(process.url, calls, seconds, talking=talking)
    await asyncio.sleep(1)
    after = process.memory_bytes()
    for task in tasks:
        task.cancel()
    return (after - before) / calls / 1024


async def memory(deepgram: Process) -> AsyncIterator[Row]:
    """Measure the memory of the idle server, and what each call adds to it."""
    run_simplest: Program = partial(simplest, deepgram.url)
    others = {"simplest": run_simplest, "baseline": baseline}
    for concurrency, target_mb in (15, 33), (500, 34):
        run_ours: Program = partial(ours, deepgram.url, DEEPGRAM_CONCURRENCY=str(concurrency))
        figures = await medians(3, idle_mb, ours=run_ours, **others)
        what = f"memory of the idle server, DEEPGRAM_CONCURRENCY={concurrency}"
        yield Row(what, "MB", target_mb, **figures)
    for how, measured, target_kb in (
        ("500 that came at once", partial(kilobytes_a_call, 500, 0, False), None),
        ("500 that came within 3 s", partial(kilobytes_a_call, 500, 3, False), 24),
        (
            "1000 that came within 3 s and talk all the time",
            partial(kilobytes_a_call, 1000, 3, True),
            27,
        ),
    ):
        figures = await medians(1, measured, baseline=baseline, ours=partial(ours, deepgram.url))
        yield Row(f"memory of an open call, of {how}", "KB", target_kb, **figures)


async def hang_up_sometime(process: Process, number: int, chance: random.Random) -> None:
    """Call, and end the call at any moment, in any of the ways there are."""
    caller = await connect(process.url)
    talking = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(chance.uniform(0, 0.4)):
            await caller.send(HANDSHAKE, until=b" 101 ")
            talking = True
            caller.transport.write(CONNECTED)
            text = chance.choice([NO_TEXT, f"Hung up on {number}."])
            await caller.send(start(text), until=b'"mark"')
            await asyncio.Event().wait()
    if not talking or chance.random() < 0.3:
        caller.transport.abort()  # the network is lost
    await caller.hang_up(stop=chance.random() < 0.5)


async def at_rest(process: Process) -> tuple[int, int, float]:
    """Return the threads, sockets and other files, and MB that it has when all calls are over."""
    before, since = None, time.perf_counter()
    while time.perf_counter() - since < 1:
        health = (await asyncio.to_thread(ask, process, "GET", "/healthz")).read()
        await asyncio.sleep(0.1)
        has = health, process.threads(), process.files()
        if has != before or health != b'{"calls": 0}':
            before, since = has, time.perf_counter()
    return process.threads(), process.files(), process.memory_bytes() / 2**20


async def hang_ups(deepgram: Process) -> AsyncIterator[Row]:
    """Measure what is left of 2000 calls that ended at any moment."""
    chance, room = random.Random(2000), asyncio.Semaphore(100)

    async def one(number: int) -> None:
        async with room:
            await hang_up_sometime(process, number, chance)

    async with ours(deepgram.url, CACHE_MB="1") as process:
        await all_of(one(number) for number in range(-300, 0))
        before = await at_rest(process)
        await all_of(one(number) for number in range(2000))
        after = await at_rest(process)
    kinds = ("threads", "", 0), ("sockets and other files", "", 0), ("memory", "MB", 4)
    for (what, unit, target), was, now in zip(kinds, before, after, strict=True):
        yield Row(f"left after 2000 hang-ups: {what}", unit, target, ours=now - was)


# --- Keys, and texts that are being written -------------------------------------------------------

MINUTE = "This text takes a minute."
WRITTEN_SCRIPT = """
import time

async def written():
    for sentence in range(4):
        for word in ("A", "sentence", "of", f"{time.time_ns()}."):
            await asyncio.sleep(0.6 / 16)
            if sentence == 0 and word[-1] == ".":
                print(f"complete at {time.monotonic()}", flush=True)
            yield word + " "

async def script(call):
    yield written()
"""


async def ms_to_clear(phone: Telephone) -> float:
    """Press a key; return how long the speech goes on."""
    pressed_at = time.perf_counter()
    await phone.press("1")
    await phone.until(lambda: bool(phone.named("clear")))
    ms = (time.perf_counter() - pressed_at) * 1000
    phone.drop()
    return ms


async def slow_links() -> AsyncIterator[Row]:
    """Measure how soon a key press silences a long text, where what was sent queues."""

    async def clear(process: Process, kilobits_per_second: int) -> float:
        async with (
            slow_link(process.url, kilobits_per_second) as url,
            dial(f"{url}/twilio", parameters={"text": MINUTE}, speed=1) as phone,
        ):
            await asyncio.sleep(4)
            return await ms_to_clear(phone)

    async with Deepgram() as deepgram:
        deepgram.answer(MINUTE, Answer(audio=bytes(60 * BYTES_PER_SECOND), delay_seconds=0.2))
        async with ours(deepgram.url) as server, simplest(deepgram.url) as simple:
            for link, kilobits, target_ms in ("1 Mbit/s", 1000, 500), ("256 kbit/s", 256, 2000):
                simplest_ms, *ms = await all_of(
                    clear(process, kilobits) for process in (simple, *[server] * 5)
                )
                what = f"key press 4 s into a minute's text, link of {link}: until the clear"
                yield Row(what, "ms", target_ms, simplest=simplest_ms, ours=statistics.median(ms))


async def written_text() -> AsyncIterator[Row]:
    """Measure four sentences that are written within 0.6 s."""
    sound_ms, silence_ms, clear_ms, later = [], [], [], []
    async with (
        Deepgram(default=Answer(delay_seconds=DEEPGRAM_MS / 1000)) as deepgram,
        ours(deepgram.url, WRITTEN_SCRIPT) as server,
    ):
        url = f"{server.url}/twilio"
        for _ in range(5):
            async with dial(url, speed=1) as phone:
                complete_at = float((await server.line("complete at .*")).split()[-1])
                await phone.until_mark()
            sound_ms.append((phone.times[0] - complete_at) * 1000 - DEEPGRAM_MS)
            silence_ms.append(silence_seconds(phone) * 1000)
            async with dial(url, speed=1) as phone:
                await server.line("complete at .*")
                await phone.until_sound()
                before = len(deepgram.requests)
                clear_ms.append(await ms_to_clear(phone))
                await asyncio.sleep(1)
                later.append(len(deepgram.requests) - before)
    for what, unit, figures, target in (
        ("first sound after its first sentence is complete", "ms", sound_ms, 10),
        ("silence between its sentences", "ms", silence_ms, 0),
        ("key press meanwhile, until the clear", "ms", clear_ms, None),
        ("requests to Deepgram after the key press", "", later, 0),
    ):
        what = f"text written within 0.6 s, four sentences: {what}"
        yield Row(what, unit, target, ours=statistics.median(figures))


def silence_seconds(phone: Telephone) -> float:
    """Return for how long nothing was left to play between the first sound and the last."""
    silence, played_at = 0.0, phone.times[0]
    for (_, audio), at in zip(phone.events, phone.times, strict=True):
        if isinstance(audio, bytes):
            silence += max(0.0, at - played_at)
            played_at = max(played_at, at) + len(audio) / BYTES_PER_SECOND
    return silence


# --- What is printed ------------------------------------------------------------------------------


def figure(value: float | None, unit: str) -> str:
    """Return `value` with its unit, in three digits or so."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}".strip()


def table(rows: Sequence[Row]) -> str:
    """Return `rows` in GitHub's Markdown."""
    heads = ("", "simplest", "baseline", "ours", "target", "requests to Deepgram")
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = [figure(value, row.unit) for value in (row.simplest, row.baseline, row.ours)]
        target = "-" if row.target is None else f"≤ {figure(row.target, row.unit)}"
        missed = row.target is not None and row.ours > row.target
        cells = [row.what, *cells, target + " (missed)" * missed, figure(row.requests, "")]
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


def bars(rows: Sequence[Row]) -> dict[str, list[Bar]]:
    """Return what the chart shows: first frames, Deepgram's own time included."""
    shown = {}
    for burst, row in zip(BURSTS, rows, strict=False):
        deepgram_ms, library = (DEEPGRAM_MS, "requests") if burst.texts else (0.0, "websockets")
        figures = (
            ("ours", row.ours, "ours"),
            (f"baseline: {library} alone", row.baseline, "baseline"),
            ("the simplest way", row.simplest, "simplest"),
        )
        shown[row.what] = [
            Bar(label, ms + deepgram_ms, kind) for label, ms, kind in figures if ms is not None
        ]
    return shown


async def measure() -> AsyncIterator[Row]:
    """Yield the rows of the table as they are measured."""
    delay = str(DEEPGRAM_MS / 1000)
    async with running(
        CALLERS_CORE, "-m", "tests.standins.deepgram", "--delay-seconds", delay
    ) as deepgram:
        async for row in bursts(deepgram):
            yield row
        yield await inbound_message(deepgram)
        for measured in (memory(deepgram), slow_links(), written_text(), hang_ups(deepgram)):
            async for row in measured:
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
