"""Measure how long a caller waits, beside the simplest way to do it, and print one table.

The servers run on one core; the callers, and a stand-in for Deepgram that takes 200 ms to its first
byte and then streams ten times as fast as one speaks, on another. The figures are medians of rounds
in which the programs take turns.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import psutil

from tests.benchmark.figures import costs, parts, waits
from tests.benchmark.processes import CALLERS_CORE, COMMANDS, deepgram, pin
from tests.benchmark.report import chart, figure, table


async def main() -> None:
    """Measure, print and draw what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="where to draw the chart")
    parser.add_argument("--all", action="store_true", help="what developers ask for, too")
    parser.add_argument("--module", type=Path, help="all of it for another twilio_aura.py, too")
    given = parser.parse_args()
    modules = ["ours"]
    if given.module:
        COMMANDS["other"] = [str(given.module.absolute())]
        modules.append("other")
        given.all = True
    programs = ["ours"]
    if given.all:
        programs = ["baseline", *modules]
    pin(psutil.Process(), CALLERS_CORE)
    with deepgram(clip_seconds=3) as stand_in:
        rows = await waits(stand_in)
        head = "longest wait for the first sound; 100 come within a second"
        print(table(head, ["simplest", "ours"], rows, "ms"), flush=True)
        if given.svg:
            given.svg.write_text(chart(rows), encoding="utf-8")
        us, megabytes, kilobytes = await costs(stand_in, programs)
        print(f"\nA core holds {figure(1e6 / 50 / us['ours'], 'calls')}.")
        print(f"A call takes {figure(kilobytes['ours'], 'KB')} of memory.")
        print(f"The idle server takes {figure(megabytes['ours'], 'MB')}.", flush=True)
        if given.all:
            rows = {
                "processor time of an inbound message, µs": us,
                "the same, in the baseline's": {name: us[name] / us["baseline"] for name in us},
                "memory of the idle server, MB": megabytes,
                "memory of a call, of 1000 that talk, KB": kilobytes,
                **await parts(stand_in, modules),
            }
            print("\n" + table("for developers", programs, rows, ""))


if __name__ == "__main__":
    asyncio.run(main())
