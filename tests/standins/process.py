"""The real server, as a process of its own, with its log at hand."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import twilio_aura
from tests.standins import Observable
from tests.standins.deepgram import KEY

ROOT = Path(__file__).parent.parent.parent
MODULE = ROOT / "twilio_aura.py"
PROXY_VARIABLES = {
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
}
# What is logged where the event loop stands still: by the server, by asyncio's debug mode, and by
# faulthandler, which names each thread and where it is, with an empty line between two of them.
STANDS_STILL = re.compile(
    r".* WARNING .*the event loop stood still"
    r"|.* WARNING Executing <"
    r"|Timeout \(\d+:\d\d:\d\d"
    r"|(?:Current t|T)hread 0x"
    r'|  File ".*", line \d+ in '
    r"|  (?:\.\.\.|<.*>)$"
    r"|$"
)


async def says_greeting(call: twilio_aura.Call) -> None:
    """Do as the module's own script does, which its user may change."""
    await call.say(call.parameters.get("text", "").strip() or call.settings.greeting)


def environment(settings: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment with these settings and no others; None unsets."""
    others = {*twilio_aura.SETTINGS, *PROXY_VARIABLES, *settings}
    inherited = {k: v for k, v in os.environ.items() if k not in others}
    inherited["PYTHONPATH"] = str(ROOT)
    inherited["PYTHONMALLOC"] = "pymalloc"  # -X dev has a slow one, for faults of C code
    return inherited | {name: value for name, value in settings.items() if value is not None}


@contextmanager
def reserved_ports(number: int) -> Iterator[list[int]]:
    """Yield ports that nobody is given while no server listens on them.

    A socket that is bound to one, with SO_REUSEADDR and without listening, lets servers have it.
    """
    sockets = [socket.socket() for _ in range(number)]
    try:
        for reserving in sockets:
            reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserving.bind(("127.0.0.1", 0))
        yield [reserving.getsockname()[1] for reserving in sockets]
    finally:
        for reserving in sockets:
            reserving.close()


def program(
    script: Callable[..., object] | Path | None,
    before: Callable[[], object] | None = None,
    **constants: object,
) -> str:
    """Return a program that serves `script`; for the arguments see `Server`."""
    lines = ["import runpy, sys", "import twilio_aura"]
    for name, value in constants.items():
        assert hasattr(twilio_aura, name)
        lines.append(f"twilio_aura.{name} = {value!r}")
    if before:
        lines.append(f"{imported(before, lines)}()")
    match script:
        case None:
            lines.append("sys.exit(twilio_aura.main())")
        case Path():  # `python FILE` looks beside FILE for other modules.
            lines.append(f"sys.path.insert(0, {str(script.parent)!r})")
            lines.append(f"runpy.run_path({str(script)!r}, run_name='__main__')")
        case _:
            lines.append(f"sys.exit(twilio_aura.main({imported(script, lines)}))")
    return "\n".join(lines)


def imported(function: Callable[..., object], lines: list[str]) -> str:
    """Add the line that imports `function`; return its name."""
    assert function.__qualname__ == function.__name__, "it can be imported"
    lines.append(f"from {function.__module__} import {function.__name__}")
    return function.__name__


class Server(Observable):
    """`async with Server({"DEEPGRAM_URL": …}) as server`, then `server.url`.

    Attributes:
        output: What it has written to stdout.
        log: What it has written to stderr, without what is there only because the event loop stood
            still, as it may where the whole machine did.
        full_log: All that it has written to stderr.
        port: Where it listens.

    Args:
        settings: Its environment, on top of a key, a free port and 127.0.0.1. None unsets.
        script: A function of a module, which is imported there; by default one that says the text
            of the TwiML or the greeting. Or a file, which is run as `python FILE` does. Or None
            for the module's own.
        before: A function of a module, which is called there before anything else.
        cwd: Where it runs, and looks for `.env`.
        prefix: A command that runs it, such as prlimit.
        flags: Python's own; by default every warning is an error.
        constants: Attributes of the module that are set, such as START_SECONDS=1. By default a mark
            and the exit may be late, so that no test fails where the whole machine stops for some
            seconds.
    """

    def __init__(
        self,
        settings: Mapping[str, str | None],
        script: Callable[..., object] | Path | None = says_greeting,
        *,
        before: Callable[[], object] | None = None,
        cwd: Path | str = "/",
        prefix: Sequence[str] = (),
        flags: Sequence[str] = ("-W", "error", "-X", "dev"),
        **constants: object,
    ) -> None:
        super().__init__()
        defaults = {"DEEPGRAM_API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0"}
        constants = {"MARK_GRACE_SECONDS": 1000.0, "EXIT_SECONDS": 1000.0, **constants}
        self.environment = environment({**defaults, **settings})
        source = program(script, before, **constants)
        self.command = [*prefix, sys.executable, *flags, "-c", source]
        self.cwd = cwd
        self.output = ""
        self.log = ""
        self.full_log = ""
        self.port = 0
        self._streams = 2

    @property
    def url(self) -> str:
        """Where Twilio connects to."""
        scheme = "wss" if self.environment.get("TLS_CERT") else "ws"
        return f"{scheme}://{self.environment['HOST']}:{self.port}/twilio"

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            cwd=self.cwd,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**26,  # bytes of a line
        )
        self._readers = [
            asyncio.create_task(self._read(self._take_output, self.process.stdout)),
            asyncio.create_task(self._read(self._take_log, self.process.stderr)),
        ]
        await self.until(lambda: "</Response>" in self.output or self.ended)
        if match := re.search(r"Listening on \S+:(\d+)/", self.output):
            self.port = int(match[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.ended:  # kill() of one that has just ended takes its exit status from asyncio
            self.process.kill()
        await self.end()

    @property
    def ended(self) -> bool:
        """Whether all it had to say has been read."""
        return self._streams == 0

    async def _read(self, take: Callable[[str], None], stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while line := await stream.readline():
            take(line.decode(errors="replace"))
            self.changed()
        self._streams -= 1
        self.changed()

    def _take_output(self, line: str) -> None:
        self.output += line

    def _take_log(self, line: str) -> None:
        self.full_log += line
        if not STANDS_STILL.match(line):
            self.log += line

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true, which a line of output makes true."""
        await super().until(lambda: condition() or self.ended)
        if not condition():
            raise AssertionError(self.full_log)

    def lines(self, pattern: str) -> list[str]:
        """Return the lines of the log that `pattern` matches in."""
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def complaints(self, since: int = 0) -> list[str]:
        """Return what the log has, from this position on, besides the INFO lines of calls."""
        return [line for line in self.log[since:].splitlines() if " INFO " not in line]

    async def logged(self, pattern: str) -> str:
        """Wait for a line of the log that `pattern` matches in, and return it."""
        await self.until(lambda: bool(self.lines(pattern)))
        return self.lines(pattern)[0]

    async def until_started(self, call_sid: str) -> None:
        """Wait until a call's `start` has come."""
        await self.logged(f" INFO call {call_sid} started$")

    async def until_ended(self, call_sid: str) -> str:
        """Wait until a call has ended; return how, as the log has it."""
        line = await self.logged(f" INFO call {call_sid} ended: ")
        return line.partition(" ended: ")[2]

    async def until_draining(self) -> None:
        """Wait until a signal has come, while there are calls."""
        await self.logged(" INFO draining ")

    def signal(self, signum: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        # asyncio's own way takes the exit status of a process that has just ended from asyncio.
        os.kill(self.process.pid, signum)

    async def end(self) -> int:
        """Wait for its end; return its exit status."""
        status = await self.process.wait()
        await asyncio.gather(*self._readers)
        return status


async def refusal(settings: Mapping[str, str | None], **options: Any) -> str:
    """Run a server that cannot start; return the one sentence with which it ends, with status 2."""
    async with Server({"TWILIO_AUTH_TOKEN": "12345", **settings}, **options) as server:
        assert await server.end() == 2
        assert server.output == ""
        assert server.log.endswith(".\n")
        assert server.log.count("\n") == 1
        return server.log
