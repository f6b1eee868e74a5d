"""The real server, as a process of its own, with its log at hand."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.deepgram import KEY

MODULE = Path(__file__).parent.parent / "twilio_aura.py"
QUIET = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}


class Server:
    """`async with Server({"DEEPGRAM_URL": …}) as server`, then `server.url`.

    Args:
        settings: Its environment, on top of a key, a free port and 127.0.0.1. None unsets.
        cwd: Where it runs, and looks for `.env`.
        module: What is run.
        flags: Python's own; by default every warning is an error.
    """

    def __init__(
        self,
        settings: Mapping[str, str | None],
        *,
        cwd: Path | str = "/",
        module: Path = MODULE,
        flags: Sequence[str] = ("-W", "error", "-X", "dev"),
    ) -> None:
        names = set(
            re.findall(
                r"^([A-Z_]+)=", (MODULE.parent / ".env.example").read_text("utf-8"), re.MULTILINE
            )
        )
        environment = {k: v for k, v in os.environ.items() if k not in names | QUIET}
        defaults = {"DEEPGRAM_API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0"}
        self.environment = environment | {
            name: value for name, value in {**defaults, **settings}.items() if value is not None
        }
        self.command = [sys.executable, *flags, str(module)]
        self.cwd = cwd
        self.output = ""  # stdout
        self.log = ""  # stderr
        self.port = 0
        self._streams = 2
        self._changed = asyncio.Condition()

    @property
    def url(self) -> str:
        """Where Twilio is to connect to."""
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
            async with self._changed:
                setattr(self, name, getattr(self, name) + line.decode(errors="replace"))
                self._changed.notify_all()
        async with self._changed:
            self._streams -= 1
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`, which a line of output makes true."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition() or self.ended)
        if not condition():
            raise AssertionError(self.log)

    async def logged(self, pattern: str) -> str:
        """Wait for a line of the log that `pattern` matches in, and return it."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [line for line in self.log.splitlines() if re.search(pattern, line)]
            return bool(found)

        await self.until(look)
        return found[0]

    def signal(self, signum: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(signum)

    async def end(self) -> int:
        """Wait for its end; return its exit status."""
        status = await self.process.wait()
        await asyncio.gather(*self._readers)
        return status


def edited(directory: Path, script: str = "", **constants: float) -> Path:
    """Return a copy of the module with another `script` or less patience, as a user may edit it."""
    source = MODULE.read_text(encoding="utf-8")
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", source, flags=re.MULTILINE)
        assert count == 1, name
    if script:
        source, count = re.subn(
            r"^async def script\(.*?(?=^# ---)",
            lambda _: script + "\n\n",
            source,
            flags=re.MULTILINE | re.DOTALL,
        )
        assert count == 1
    copy = directory / "twilio_aura.py"
    copy.write_text(source, encoding="utf-8")
    return copy
