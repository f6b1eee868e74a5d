"""The programs that are measured: each is a process, and the servers share a core of their own."""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import certifi
import psutil
import trustme

from tests.benchmark.report import ROUND_TRIP_MS, Rows
from tests.standins.process import MODULE, Server

COMMANDS = {
    "simplest": ["-m", "tests.benchmark.simplest", "simplest"],
    "baseline": ["-m", "tests.benchmark.simplest", "baseline"],
    "aiohttp": ["-m", "tests.benchmark.with_aiohttp"],
    "ours": [str(MODULE)],
}
SETTINGS = {"DEEPGRAM_CONCURRENCY": "500", "MAX_CALLS": "2000"}
# A minute in which nothing is requested is 15 times as short here, and so is what goes with it.
MINUTE_SECONDS = 4.0  # then a connection that has idled is lost
QUIET_SECONDS = MINUTE_SECONDS + 0.5
MAX_IDLE_SECONDS = MINUTE_SECONDS / 2  # the module's 30
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
    """`with Process(…) as process`: a Python program that runs on `core`, and has said its URL.

    Attributes:
        settings: Of a stand-in for Deepgram: with which a server finds it.
    """

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
        self.settings = {"DEEPGRAM_URL": self.url}

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


Measures = Mapping[str, Callable[[Process], Awaitable[float]]]  # by what they measure


def deepgram(clip_seconds: float, *options: str) -> Process:
    """Run the stand-in for Deepgram, which streams a clip of this length for every text."""
    clip_bytes = str(int(clip_seconds * 8000))
    command = ["-m", "tests.standins.deepgram", "--clip-bytes", clip_bytes, *options]
    return Process(CALLERS_CORE, command, {})


@contextmanager
def far_deepgram(
    *, round_trip_ms: float = ROUND_TRIP_MS, idle: str = "closes"
) -> Iterator[Process]:
    """Run the stand-in with TLS and a clip of 3 s, behind a relay that makes it as far away.

    After a minute, the relay `closes` a connection that has idled, or `forgets` it, as a NAT does.
    """
    with tempfile.TemporaryDirectory() as directory:
        authority = trustme.CA()
        pem = Path(directory, "server.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
        bundle = Path(directory, "authorities.pem")  # as long as what requests has
        bundle.write_bytes(Path(certifi.where()).read_bytes() + authority.cert_pem.bytes())
        with deepgram(3, "--tls", str(pem)) as stand_in:
            relay = ["-m", "tests.standins.relay", "--target", stand_in.url.rpartition(":")[2]]
            relay += ["--delay-seconds", str(round_trip_ms / 2000)]
            relay += [f"--{idle}-after-seconds", str(MINUTE_SECONDS)]
            with Process(CALLERS_CORE, relay, {}) as far:
                far.url = far.url.replace("tcp:", "https:")
                far.settings = {"DEEPGRAM_URL": far.url, "REQUESTS_CA_BUNDLE": str(bundle)}
                yield far


@contextmanager
def servers(
    stand_in: Process,
    *names: str,
    scripted: bool = False,
    settings: dict[str, str] | None = None,
) -> Iterator[dict[str, Process]]:
    """Run these programs side by side, with this stand-in for Deepgram.

    Modules that are `scripted` are those of tests.benchmark.scripted.
    """
    with ExitStack() as stack:
        processes = {}
        for name in names:
            command = COMMANDS[name]
            if scripted and command[0] != "-m":
                command = ["-m", "tests.benchmark.scripted", str(MAX_IDLE_SECONDS), *command]
            process = Process(SERVERS_CORE, command, stand_in.settings | (settings or {}))
            processes[name] = stack.enter_context(process)
        time.sleep(1.5)  # while they fetch the greeting
        yield processes


async def medians(
    rounds: int,
    measures: Measures,
    processes: Mapping[str, Process],
    quiet_seconds: float = 0.0,
) -> Rows:
    """Return the medians of so many rounds in which the processes take turns, each after a rest."""
    figures = {(what, name): list[float]() for what in measures for name in processes}
    for _ in range(rounds):
        await asyncio.sleep(quiet_seconds)
        for what, name in figures:
            figures[what, name].append(await measures[what](processes[name]))
    return {
        what: {name: statistics.median(figures[what, name]) for name in processes}
        for what in measures
    }
