"""The figures: those of the README, then those that are only for developers."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import statistics
import time
from collections.abc import Sequence
from functools import partial
from urllib.parse import urlsplit

import requests

from tests.benchmark.callers import GREETING, KEY_PRESS, VOICE, call, greeted, start, wait_ms
from tests.benchmark.processes import Process, deepgram, medians, servers
from tests.benchmark.report import FIRST_BYTE_MS, Rows
from tests.benchmark.simplest import HEADERS, SPEAK
from tests.standins.telephone import HANDSHAKE

# asyncio reads into 256 KiB. Whether glibc maps and unmaps them for each message depends on what a
# process has freed before, and adds a third to the processor time of any program.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22)}
FEW = {"DEEPGRAM_CONCURRENCY": "15", "CACHE_MB": "1"}
MESSAGES = 10_000
TALKERS = 1000
INBOUND = "processor time of an inbound message, µs"
IDLE = "memory of the idle server, MB"
TALKING = "memory of a call, of 1000 that talk, KB"
session = requests.Session()
session.trust_env = False  # no proxy


async def waits(stand_in: Process, programs: Sequence[str], quiet_seconds: float = 0.0) -> Rows:
    """Return the longest waits, each after so many quiet seconds."""
    one = {
        "1 caller, new text": partial(wait_ms, 1, 1, 0),
        "1 caller, text said before": partial(wait_ms, 1, 0, 0),
    }
    hundred = {
        "100 callers, new texts": partial(wait_ms, 100, 100, 1),
        "100 callers, text said before": partial(wait_ms, 100, 0, 1),
    }
    with servers(stand_in, *programs, scripted=quiet_seconds > 0) as processes:
        rows = await medians(3, one, processes, quiet_seconds)
        simplest = processes.pop("simplest", None)
        rows |= await medians(3, hundred, processes, quiet_seconds)
        if simplest:
            # A hundred wait so long for it that one round is enough, of both at the same time.
            with servers(stand_in, "simplest") as another:
                both = zip(hundred.values(), (simplest, another["simplest"]), strict=True)
                slow = await asyncio.gather(*(measure(process) for measure, process in both))
            for what, ms in zip(hundred, slow, strict=True):
                rows[what] = {"simplest": ms, **rows[what]}
    return rows


async def costs(stand_in: Process, programs: Sequence[str]) -> Rows:
    """Return what a message and a call cost, and the idle server."""
    with servers(stand_in, *programs, settings=MALLOC) as processes:
        rows = await medians(5, {INBOUND: inbound_us}, processes)
    if "baseline" in programs:
        us = rows[INBOUND]
        rows["the same, in the baseline's"] = {name: us[name] / us["baseline"] for name in us}
    kilobytes: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(min(len(programs), 3)):  # each with servers that have just started
        with servers(stand_in, *programs) as processes:
            rows[IDLE] = {name: process.memory_kb() / 1024 for name, process in processes.items()}
            for name, process in processes.items():
                kilobytes[name].append(await call_kb(process))
    rows[TALKING] = {name: statistics.median(kb) for name, kb in kilobytes.items()}
    return rows


async def inbound_us(process: Process) -> float:
    """Return the processor time of a message of a caller's voice, if each is read by itself.

    Messages that queue are read together and cost a quarter of that.
    """
    callers = await greeted(process.url, 200)
    before = process.cpu_seconds()
    due = time.perf_counter()
    for caller in itertools.islice(itertools.cycle(callers), MESSAGES):
        while time.perf_counter() < due:
            pass  # no sleep is so short
        caller.writer.write(VOICE)
        due += 1e-4
    await asyncio.gather(*(caller.ping() for caller in callers))
    us = (process.cpu_seconds() - before) / MESSAGES * 1e6
    await asyncio.gather(*(caller.hang_up() for caller in callers))
    return us


async def call_kb(process: Process) -> float:
    """Return what each of 1000 calls that come within some 3 s, and talk, adds to the memory."""
    callers = []
    talking = []

    async def talk() -> None:
        caller = await call(process.url)
        callers.append(caller)
        talking.append(asyncio.create_task(caller.talk()))
        await caller.hear(start(GREETING))

    before = process.memory_kb()
    async with asyncio.TaskGroup() as calls:
        for _ in range(TALKERS):
            calls.create_task(talk())
            await asyncio.sleep(0.002)
    await asyncio.sleep(1)
    added = process.memory_kb() - before
    for caller in callers:
        caller.writer.close()
    await asyncio.gather(*talking)
    return added / TALKERS


async def parts(stand_in: Process, modules: Sequence[str]) -> Rows:
    """Return the developers' figures of these modules on loopback, and the baseline's."""
    near = await waits(stand_in, modules)
    rows = {f"{what}, ms": row for what, row in near.items()}
    with servers(stand_in, "baseline", *modules) as processes:
        ours = {name: processes[name] for name in modules}
        what = "new text, 1 caller, beyond Deepgram's first byte, ms"
        rows |= await medians(5, {what: beyond_ms}, {"baseline": stand_in, **ours})
        what = "text said before, 100 at once, 99th percentile, ms"
        rows |= await medians(9, {what: partial(wait_ms, 100, 0, 0, rank=98)}, processes)
        what = "text said before, 500 at once, from the first connection on, ms"
        rows |= await medians(5, {what: arrival_ms}, processes)
        for callers, texts in ((100, 1), (100, 100), (200, 200), (500, 500)):
            what = f"new texts: {texts}, callers at once: {callers}, ms"
            rows |= await medians(3, {what: partial(wait_ms, callers, texts, 0)}, ours)
    with deepgram(clip_seconds=60) as slow, servers(slow, *modules) as processes:
        what = "key press 4 s into a minute's text, on 256 kbit/s, until the clear, ms"
        rows |= await medians(3, {what: clear_ms}, processes)
    with deepgram(clip_seconds=0.5) as quick:
        left = await left_by_hang_ups(quick)
        for what, figure in zip(("threads", "files", "KB of memory"), left, strict=True):
            rows[f"left by 2000 hang-ups: {what}"] = {"ours": figure}
    return rows


async def beyond_ms(process: Process) -> float:
    """Return a wait for a new text, without Deepgram's; if that is `process`, of `requests`."""
    if process.url.startswith("ws:"):
        return await wait_ms(1, 1, 0, process) - FIRST_BYTE_MS
    text = {"text": "New text."}
    began = time.perf_counter()
    response = session.post(process.url + SPEAK, json=text, headers=HEADERS, stream=True)
    chunks = response.iter_content(None)
    next(chunks)
    ms = (time.perf_counter() - began) * 1000
    for _ in chunks:
        pass  # else the connection could not be used again
    return ms - FIRST_BYTE_MS


async def arrival_ms(process: Process) -> float:
    """Return when all of 500 who connect at once have heard the first of the greeting."""
    began = time.perf_counter()
    callers = await greeted(process.url, 500)
    await asyncio.gather(*(caller.hang_up() for caller in callers))
    return (max(caller.sound_at for caller in callers) - began) * 1000


async def clear_ms(process: Process) -> float:
    """Press a key 4 s into the greeting, on a link of 256 kbit/s; return how long it goes on."""
    loop = asyncio.get_running_loop()
    came = b""
    with socket.create_connection(("127.0.0.1", urlsplit(process.url).port)) as link:
        link.sendall(HANDSHAKE)
        link.recv(1000)
        link.sendall(start(GREETING))
        link.setblocking(False)
        pressed_at = loop.time() + 4
        loop.call_at(pressed_at, link.send, KEY_PRESS)
        while b'"clear"' not in came:
            data = await loop.sock_recv(link, 1000)
            await asyncio.sleep(len(data) * 8 / 256_000)
            came = came[-10:] + data
    return (loop.time() - pressed_at) * 1000


async def left_by_hang_ups(stand_in: Process) -> list[float]:
    """Return the threads, files and KB that are left of 2000 calls that ended at any moment."""

    async def hang_up_sometime(number: int) -> None:
        async with room:
            caller = await call(process.url)
            caller.writer.write(start(f"Text {number}." * (number % 2)))
            await asyncio.sleep(random.uniform(0, 0.4))
            if number % 3 == 0:
                caller.writer.transport.abort()  # the network is lost
            await caller.hang_up()

    async def at_rest() -> list[float]:
        used = -1.0
        while used < process.cpu_seconds():
            used = process.cpu_seconds()
            await asyncio.sleep(1)
        return [process.num_threads(), process.num_fds(), process.memory_kb()]

    room = asyncio.Semaphore(100)
    with servers(stand_in, "ours", settings=FEW) as processes:
        process = processes["ours"]
        await asyncio.gather(*(hang_up_sometime(number) for number in range(300)))
        before = await at_rest()
        await asyncio.gather(*(hang_up_sometime(number) for number in range(300, 2300)))
        after = await at_rest()
    return [now - was for now, was in zip(after, before, strict=True)]
