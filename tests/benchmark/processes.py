"""The programs that are measured: each is a process, and the servers share a core of their own."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.standins.process import MODULE, Server

COMMANDS = {
    "simplest": ["-m", "tests.benchmark.simplest", "simplest"],
    "baseline": ["-m", "tests.benchmark.simplest", "baseline"],
    "ours": [str(MODULE)],
}
SETTINGS = {"DEEPGRAM_CONCURRENCY": "500", "MAX_CALLS": "2000"}
SERVERS_CORE = 0
CALLERS_CORE = -1  # the last one
CORES: list[int] = []
if hasattr(psutil.Process, "cpu_affinity"):  # not on a Mac
    CORES += psutil.Process().cpu_affinity()


def pin(process: psutil.Process, core: int) -> None:
    """Keep `process` on one of the cores, where the system can."""
    if CORES:
        process.cpu_affinity([CORES[core]])


class Process(psutil.Popen):
    """`with Process(…) as process`: a Python program that runs on `core`, and has said its URL."""

    def __init__(self, core: int, command: list[str], settings: Mapping[str, str]) -> None:
        super().__init__(
            [sys.executable, *command],
            cwd=Path(__file__).parent,  # has no .env
            env=Server({**SETTINGS, **settings}).environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        pin(self, core)
        said = "nothing"
        while said and "://127.0.0.1:" not in said:
            said = self.stdout.readline()
        assert said, f"{command} does not start"
        self.url = re.findall(r"\w+://[0-9.:]+", said)[0]

    def __exit__(self, *_: object) -> None:
        self.kill()
        super().__exit__(None, None, None)

    def cpu_seconds(self) -> float:
        """Return the processor time it has used so far."""
        times = self.cpu_times()
        return float(times.user + times.system)

    def memory_kb(self) -> float:
        """Return what it has in memory."""
        return float(self.memory_info().rss / 2**10)


def deepgram(clip_seconds: float) -> Process:
    """Run the stand-in for Deepgram, which streams a clip of this length for every text."""
    clip_bytes = str(int(clip_seconds * 8000))
    return Process(CALLERS_CORE, ["-m", "tests.standins.deepgram", "--clip-bytes", clip_bytes], {})


@contextmanager
def servers(stand_in: Process, *names: str, **settings: str) -> Iterator[dict[str, Process]]:
    """Run these programs side by side, with this stand-in for Deepgram."""
    settings["DEEPGRAM_URL"] = stand_in.url
    with ExitStack() as stack:
        processes = {}
        for name in names:
            process = Process(SERVERS_CORE, COMMANDS[name], settings)
            processes[name] = stack.enter_context(process)
        time.sleep(1)  # while they fetch the greeting
        yield processes


async def medians(
    rounds: int,
    measure: Callable[[Process], Awaitable[float]],
    processes: Mapping[str, Process],
    **known: float,
) -> dict[str, float]:
    """Return the medians of so many rounds in which the processes take turns, and what is known."""
    figures = {name: [value] for name, value in known.items()}
    for _ in range(rounds):
        for name, process in processes.items():
            figures.setdefault(name, []).append(await measure(process))
    return {name: statistics.median(values) for name, values in figures.items()}
