"""Measure how long a caller waits, beside the simplest way to do it, and print one table.

The servers run on one core; the callers and a stand-in for Deepgram on another. It is 80 ms away,
speaks TLS, takes 200 ms to its first byte and then streams ten times as fast as one speaks. Before
each round there is a quiet minute (shortened, as are the limits for idle connections), after which
it has closed what was open. The figures are medians of rounds in which the programs take turns. If
anything else runs on the machine, `sudo chrt -f 1` before the command keeps it out (on Linux).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.benchmark.figures import IDLE, INBOUND, TALKING, costs, parts, waits
from tests.benchmark.network import network
from tests.benchmark.processes import (
    CALLERS_CORE,
    COMMANDS,
    QUIET_SECONDS,
    deepgram,
    far_deepgram,
    pin,
)
from tests.benchmark.report import Rows, chart, figure, table


async def main() -> None:
    """Measure, print and draw what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="where to draw the chart")
    parser.add_argument(
        "--all", action="store_true", help="what developers ask for, too; one row needs aiohttp"
    )
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
    with far_deepgram() as far:
        rows = await waits(far, ["simplest", "ours"], QUIET_SECONDS)
    head = "longest wait for the first sound (the 100 call within one second)"
    print(table(head, ["simplest", "ours"], rows, "ms"), flush=True)
    if given.svg:
        given.svg.write_text(chart(rows), encoding="utf-8")
    with deepgram(clip_seconds=3) as near:
        rows = await costs(near, programs)
        print(f"\nA core holds {figure(1e6 / 50 / rows[INBOUND]['ours'], 'calls')}.")
        print(f"A call takes {figure(rows[TALKING]['ours'], 'KB')} of memory.")
        print(f"The idle server takes {figure(rows[IDLE]['ours'], 'MB')}.", flush=True)
        if given.all:
            rows |= await parts(near, modules)
            rows |= await network(modules)
            print("\n" + comparison(rows, modules))


def comparison(rows: Rows, modules: Sequence[str]) -> str:
    """Return the developers' table, with a column that compares two modules."""
    programs = ["baseline", "aiohttp", *modules]
    compared = {what: dict(row) for what, row in rows.items()}
    if "other" in modules:
        programs.append("ours / other")
        for row in compared.values():
            if row.get("other"):
                row["ours / other"] = row["ours"] / row["other"]
    return table("for developers", programs, compared, "")


if __name__ == "__main__":
    asyncio.run(main())
