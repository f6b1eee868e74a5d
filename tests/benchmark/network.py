"""Developers' figures of what lies between a server and Deepgram, and of how long texts are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec

from tests.benchmark.callers import KEY_PRESS, NEW_TEXT, Caller, call, numbers, start, wait_ms
from tests.benchmark.processes import (
    QUIET_SECONDS,
    Measures,
    Process,
    deepgram,
    far_deepgram,
    medians,
    servers,
)
from tests.benchmark.report import Rows

# Of 75 characters; with ANSWER after it, of 980.
QUESTION = "Question {} is answered by this text, which says what there is to be said."
ANSWER = 12 * " No sentence of it has more words than callers bear in mind, if not fewer."
ANSWER += " And that is all."
# Of 126 characters, with a comma at 49.
WRITTEN = (
    "Your order number {} left our store last Monday, and it should be at your door before the end "
    "of this week, or early in next."
)
STREAM = ("--delay-seconds-per-character=0.0004",)
WHOLE = (f"--delay-seconds-per-character={1 / 150}", "--write-bytes=1000000")


async def network(modules: Sequence[str]) -> Rows:
    """Return these figures of the modules, and of aiohttp if that is installed."""
    rows: Rows = {}
    with (
        far_deepgram() as far,
        servers(far, *modules, scripted=True) as there,
        far_deepgram(idle="forgets") as hidden,
        servers(hidden, *modules, scripted=True) as behind,
    ):
        for figures in await asyncio.gather(  # since they wait for most of the time
            after_quiet("80 ms away", there), after_quiet("behind a NAT that forgets", behind)
        ):
            rows |= figures
    programs = list(modules)
    if find_spec("aiohttp"):
        programs.insert(0, "aiohttp")
    with (
        far_deepgram(round_trip_ms=0) as near,
        servers(near, *programs, scripted=True) as processes,
    ):
        burst = {"15 new texts at once, TLS, nothing open, ms": partial(wait_ms, 15, 15, 0)}
        rows |= await medians(5, burst, processes, QUIET_SECONDS)
    rows |= await lengths("0.4 ms a character", STREAM, modules)
    rows |= await lengths("the whole clip at once, 150 characters a second", WHOLE, modules)
    with deepgram(3) as stand_in, servers(stand_in, *modules, scripted=True) as processes:
        what = "126 characters, written at 20 tokens a second"
        rows |= await medians(3, {f"{what}, ms": partial(written_ms, "first sound")}, processes)
        rows |= await medians(1, {f"{what}: gap, ms": partial(written_ms, "gap")}, processes)
    return rows


async def lengths(how: str, options: Sequence[str], modules: Sequence[str]) -> Rows:
    """Return the waits for a long text, and for as much of it as should be waited for."""
    measures = {
        f"{how}: 980 characters, ms": partial(text_ms, QUESTION + ANSWER),
        f"{how}: their first sentence alone, ms": partial(text_ms, QUESTION),
    }
    with deepgram(0.2, *options) as slow, servers(slow, *modules) as processes:
        return await medians(3, measures, processes)


async def after_quiet(where: str, processes: Mapping[str, Process]) -> Rows:
    """Return the waits for new texts after a quiet minute, and how they compare with others."""
    again = f"{where}: new text, right after another, ms"
    first = f"{where}: first text of a call, after a quiet minute"
    later = f"{where}: later text of a call, after a quiet minute"
    measures: Measures = {
        again: partial(next_ms, 0.1),
        f"{first}, ms": first_ms,
        f"{later}, ms": partial(next_ms, QUIET_SECONDS),
    }
    rows = await medians(3, measures, processes)
    for what in (first, later):
        ratios = {name: rows[f"{what}, ms"][name] / rows[again][name] for name in processes}
        rows[f"{what} / right after another"] = ratios
    return rows


async def connected(process: Process) -> Caller:
    """Return a caller for whom a text has been said, so that there is an open connection."""
    while True:
        caller = await call(process.url)
        if math.isfinite(await caller.wait_ms(start(NEW_TEXT.format(next(numbers))))):
            return caller
        await caller.hang_up()  # It was lost, with a connection that was forgotten.


async def first_ms(process: Process) -> float:
    """Return a wait for the first text of a call, which is the first call after a quiet minute."""
    caller = await connected(process)
    await caller.hang_up()
    await asyncio.sleep(QUIET_SECONDS)
    return await text_ms(NEW_TEXT, process)


async def next_ms(pause_seconds: float, process: Process) -> float:
    """Return a wait for the second text of a call, so many seconds after the first."""
    caller = await connected(process)
    await asyncio.sleep(pause_seconds)
    ms = await caller.wait_ms(KEY_PRESS)
    await caller.hang_up()
    return ms


async def text_ms(text: str, process: Process) -> float:
    """Return a wait for `text`, with a number in it that makes it a new one."""
    caller = await call(process.url)
    ms = await caller.wait_ms(start(text.format(next(numbers))))
    await caller.hang_up()
    return ms


async def written_ms(what: str, process: Process) -> float:
    """Return a wait for a text that is being written, or the longest gap in it."""
    caller = await call(process.url)
    ms = await caller.wait_ms(start(WRITTEN.format(next(numbers)), written="yes"))
    await caller.hang_up()
    if what == "gap":
        return caller.gap_seconds * 1000
    return ms
