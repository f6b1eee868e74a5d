"""The README's HAProxy, two of our processes behind it, and a restart of each while calls come."""

import asyncio
import functools
import os
import re
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.deepgram import Deepgram, noise
from tests.readme import blocks
from tests.server import Server, reserved_ports
from tests.telephone import dial
from tests.waiting import poll

CALLERS = 12  # on the line at any time, with half a second of audio at twice its speed each
SPEED = 2.0
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def configuration(replacements: dict[str, str]) -> str:
    """Return the README's HAProxy configuration with nothing but these replaced."""
    (text,) = blocks("haproxy")
    for there, here in replacements.items():
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    return text


def has_waiting(port: int, connections: int) -> bool:
    """Return whether the kernel holds so many that the listener on `port` has yet to accept."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == "0A" and int(local.split(":")[1], 16) == port:
            return int(queues.split(":")[1], 16) >= connections
    return False


def all_up(port: int) -> bool:
    """Return whether HAProxy says, as to the README's `curl`, that both processes are up."""
    asking = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        asking.request("GET", "/")
        return asking.getresponse().status == 200
    except ConnectionRefusedError:
        return False  # HAProxy itself is not up yet
    finally:
        asking.close()


async def until_calls(server: Server, number: int) -> None:
    """Wait until `server` has been given so many more calls."""
    before = server.log.count(" started\n")
    await server.until(lambda: server.log.count(" started\n") >= before + number)


@asynccontextmanager
async def haproxy(configuration: Path, all_up_port: int) -> AsyncIterator[None]:
    """Run HAProxy in the foreground."""
    assert HAPROXY
    process = await asyncio.create_subprocess_exec(HAPROXY, "-db", "-f", configuration)
    try:
        await poll(lambda: all_up(all_up_port))
        yield
    finally:
        process.kill()
        await process.wait()


class RepeatCaller:
    """Somebody who calls again and again, and wants other words to be said each time."""

    def __init__(self, url: str, trust: ssl.SSLContext, name: str) -> None:
        self.calls = 0
        self._url = url
        self._trust = trust
        self._name = name

    async def call(self) -> None:
        """Place a call and hear it out."""
        self.calls += 1
        text = f"{self._name}, call {self.calls}"
        async with dial(
            self._url, parameters={"text": text}, speed=SPEED, ssl=self._trust
        ) as phone:
            await phone.until_heard(noise(text))
            assert phone.heard == noise(text)

    async def keep_calling(self, enough: asyncio.Event) -> None:
        """Place one call after the other."""
        while not enough.is_set():
            await self.call()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp, which is Linux's")
@pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (Debian package: haproxy)")
async def test_rolling_restart(
    deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """Both processes are restarted in turn; every call gets through and is heard in full."""
    async with AsyncExitStack() as stack:
        public, all_up_port, *ports = stack.enter_context(reserved_ports(4))
        pem, trust = certificate
        here = tmp_path / "haproxy.cfg"
        here.write_text(
            configuration(
                {
                    "bind :443 ": f"bind 127.0.0.1:{public} ",
                    "/etc/haproxy/example.com.pem": str(pem),
                    "127.0.0.1:8404": f"127.0.0.1:{all_up_port}",
                    "10.0.0.11:5000": f"127.0.0.1:{ports[0]}",
                    "10.0.0.12:5000": f"127.0.0.1:{ports[1]}",
                }
            )
        )

        async def start(port: int) -> Server:
            server = Server({"DEEPGRAM_URL": deepgram.url, "PORT": str(port)})
            return await stack.enter_async_context(server)

        async def stop(server: Server) -> str:
            server.signal(signal.SIGTERM)
            server.signal(signal.SIGCONT)
            assert await server.end() == 0
            return server.log

        servers = {port: await start(port) for port in ports}
        await stack.enter_async_context(haproxy(here, all_up_port))
        url = f"wss://127.0.0.1:{public}/twilio"
        callers = [RepeatCaller(url, trust, f"caller {number}") for number in range(CALLERS)]
        late = [RepeatCaller(url, trust, f"late caller {number}") for number in range(CALLERS)]
        enough = asyncio.Event()
        logs = []
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.keep_calling(enough))
            for port, other in (ports, reversed(ports)):
                await until_calls(servers[port], CALLERS)
                # Calls that the kernel has taken, but not yet the process, when it is to stop.
                servers[port].signal(signal.SIGSTOP)
                for caller in late:
                    group.create_task(caller.call())
                await poll(functools.partial(has_waiting, port, CALLERS // 3))
                logs.append(await stop(servers[port]))
                await until_calls(servers[other], CALLERS)
                servers[port] = await start(port)
                await poll(lambda: all_up(all_up_port))
                await until_calls(servers[port], CALLERS)
            enough.set()
        assert all(re.search(r"draining [1-9][0-9]* call\(s\)", log) for log in logs)
        logs += [await stop(server) for server in servers.values()]
        outcomes = re.findall(r" ended: ([^;]+);", "".join(logs))
        assert set(outcomes) <= {"hung up", "drained"}
        # Each call was served, and by one process only.
        assert len(outcomes) == sum(caller.calls for caller in callers + late)
