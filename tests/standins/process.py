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
GREETING_SCRIPT = """
async def script(call):
    yield call.parameters.get("text", "").strip() or call.settings.greeting
"""


def environment(settings: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment with these settings and no others; None unsets."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in {*twilio_aura.SETTINGS, *PROXY_VARIABLES}
    }
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


def program(script: str | Path | None, **constants: object) -> str:
    """Return a program that serves `script` as a file of one's own does, as the README's menu.

    Args:
        script: The source of `script` and of whatever it needs; or a file that has them; or None
            for the module's own.
        constants: Attributes of the module that are set, such as START_SECONDS=1.
    """
    lines = ["import asyncio, contextlib, runpy, sys", "import twilio_aura"]
    for name, value in constants.items():
        assert hasattr(twilio_aura, name)
        lines.append(f"twilio_aura.{name} = {value!r}")
    match script:
        case str():
            return "\n".join([*lines, script, "sys.exit(twilio_aura.main(script))"])
        case Path():
            return "\n".join([*lines, f"runpy.run_path({str(script)!r}, run_name='__main__')"])
        case None:
            return "\n".join([*lines, "sys.exit(twilio_aura.main())"])


class Server(Observable):
    """`async with Server({"DEEPGRAM_URL": …}) as server`, then `server.url`.

    Args:
        settings: Its environment, on top of a key, a free port and 127.0.0.1. None unsets.
        script: The source of a script, by default one that says the greeting; or a file that has
            it; or None for the module's own.
        cwd: Where it runs, and looks for `.env`.
        prefix: A command that runs it, such as prlimit.
        flags: Python's own; by default every warning is an error.
        constants: Attributes of the module that are set, such as START_SECONDS=1. By default a mark
            may be late, so that no test fails where the whole machine stops for some seconds.
    """

    def __init__(
        self,
        settings: Mapping[str, str | None],
        script: str | Path | None = GREETING_SCRIPT,
        *,
        cwd: Path | str = "/",
        prefix: Sequence[str] = (),
        flags: Sequence[str] = ("-W", "error", "-X", "dev"),
        **constants: object,
    ) -> None:
        super().__init__()
        defaults = {"DEEPGRAM_API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0"}
        constants = {"MARK_GRACE_SECONDS": 1000.0, **constants}
        self.environment = environment({**defaults, **settings})
        self.command = [*prefix, sys.executable, *flags, "-c", program(script, **constants)]
        self.cwd = cwd
        self.output = ""  # stdout
        self.log = ""  # stderr
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
            asyncio.create_task(self._read("output", self.process.stdout)),
            asyncio.create_task(self._read("log", self.process.stderr)),
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

    async def _read(self, name: str, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while line := await stream.readline():
            if b" WARNING Executing <" in line:
                continue  # asyncio's debug mode says so where the machine stood still
            setattr(self, name, getattr(self, name) + line.decode(errors="replace"))
            self.changed()
        self._streams -= 1
        self.changed()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`, which a line of output makes true."""
        await super().until(lambda: condition() or self.ended)
        if not condition():
            raise AssertionError(self.log)

    def lines(self, pattern: str) -> list[str]:
        """Return the lines of the log that `pattern` matches in."""
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def complaints(self, since: int) -> list[str]:
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
        self.process.send_signal(signum)

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
