"""The README's nginx, Caddy, Apache and HAProxy do what it says of them."""

import asyncio
import functools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import pytest
from websockets.exceptions import InvalidStatus

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import GREETING, Deepgram, noise
from tests.standins.process import Server, reserved_ports
from tests.standins.readme import blocks
from tests.standins.telephone import dial, sign
from tests.standins.twilio import TOKEN


class Proxy(NamedTuple):
    """What runs the README's block as one process, which writes to its directory only.

    Attributes:
        language: The block's; the first one is run.
        arguments: What the program is called with, before the configuration.
        before: What the configuration has in front of the block.
        after: And behind it.
    """

    language: str
    arguments: str
    before: str = ""
    after: str = ""


MODULES = ("mpm_event", "authz_core", "socache_shmcb", "ssl", "proxy", "proxy_http")
# By the names of their programs, which are also those of Debian's packages.
PROXIES = {
    "nginx": Proxy(
        "nginx",
        "-e stderr -p . -c",
        """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {}
http {
access_log off; client_body_temp_path body; proxy_temp_path proxy;
fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
""",
        "}",
    ),
    # Without its ports 80 and 2019.
    "caddy": Proxy(
        "caddyfile",
        "run --adapter caddyfile --config",
        "{\n\tadmin off\n\tauto_https disable_redirects\n\tdefault_bind 127.0.0.1\n}\n",
    ),
    # As in Debian's ports.conf, and with its modules; root's threads are nobody's.
    "apache2": Proxy(
        "apache",
        "-X -d . -f",
        "\n".join(
            [
                "ServerName localhost\nDefaultRuntimeDir .\nPidFile apache.pid",
                "ErrorLog error.log\nListen 443\nUser #65534\nGroup #65534",
                *(
                    f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so"
                    for name in MODULES
                ),
                "",
            ]
        ),
    ),
    "haproxy": Proxy("haproxy", "-db -f"),
}


def program(name: str) -> str | None:
    """Return the path of a proxy's program, if it is installed."""
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where this proxy is not installed."""
    reason = f"{name} is not installed (Debian package: {name})"
    return pytest.mark.skipif(not program(name), reason=reason)


def is_listening(port: int) -> bool:
    """Return whether somebody accepts connections at `port`."""
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def running(
    name: str, directory: Path, edits: dict[str, str], is_up: Callable[[], bool]
) -> AsyncIterator[None]:
    """Run a proxy with the README's block, in which nothing but the keys of `edits` is replaced."""
    proxy = PROXIES[name]
    configuration = proxy.before + blocks(proxy.language)[0] + proxy.after
    assert {there: configuration.count(there) for there in edits} == dict.fromkeys(edits, 1)
    # All at once: one of the ports may begin with 5000.
    found = "|".join(map(re.escape, edits))
    file = directory / "conf"
    file.write_text(re.sub(found, lambda match: edits[match[0]], configuration))
    home = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(directory))
    process = await asyncio.create_subprocess_exec(
        program(name) or name,
        *proxy.arguments.split(),
        file,
        cwd=directory,
        env=os.environ | home,
    )
    try:
        await poll(lambda: is_up() or process.returncode is not None)
        assert process.returncode is None
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# One server behind each of them: a signed call is heard, and an unsigned one rejected

CERTIFICATE = "/etc/letsencrypt/live/example.com/fullchain.pem"
KEY = "/etc/letsencrypt/live/example.com/privkey.pem"


@asynccontextmanager
async def proxied(
    name: str, deepgram: Deepgram, pem: Path, directory: Path, edits: dict[str, str]
) -> AsyncIterator[str]:
    """Yield the URL at which a proxy passes calls on to a server that wants them signed.

    PUBLIC_URL is not set: the Host header has to come through unchanged.
    """
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}
    with reserved_ports(2) as (port, spare_port):
        async with Server(settings) as server:
            public, aura = f"127.0.0.1:{port}", f"127.0.0.1:{server.port}"
            certificate = {CERTIFICATE: str(pem), KEY: str(pem)}
            usual = {
                "nginx": {"listen 443": f"listen {public}", "127.0.0.1:5000": aura, **certificate},
                # The certificate that Caddy would get by itself.
                "caddy": {
                    "example.com {": f"{public} {{\n\ttls {pem} {pem}",
                    "127.0.0.1:5000": aura,
                },
                "apache2": {
                    "Listen 443": f"Listen {public}",
                    "*:443": public,
                    "127.0.0.1:5000": aura,
                    **certificate,
                },
                "haproxy": {
                    "bind :443": f"bind {public}",
                    "/etc/haproxy/example.com.pem": str(pem),
                    "10.0.0.11:5000": aura,
                    "10.0.0.12:5000": aura,
                    "127.0.0.1:8404": f"127.0.0.1:{spare_port}",
                },
            }
            here = usual[name] | edits
            async with running(name, directory, here, lambda: is_listening(port)):
                yield f"wss://{public}/twilio"


async def rejection(url: str, trust: ssl.SSLContext, headers: dict[str, str] | None = None) -> int:
    """Place a call that is rejected; return the status."""
    with pytest.raises(InvalidStatus) as caught:
        await dial(url, headers=headers, ssl=trust).__aenter__()
    return caught.value.response.status_code


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in PROXIES])
async def test_signed_call(
    name: str, deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """A signed call is heard through the README's block, an unsigned one is rejected."""
    pem, trust = certificate
    async with proxied(name, deepgram, pem, tmp_path, {}) as url:
        async with dial(url, headers=sign(url, TOKEN), ssl=trust) as phone:
            await phone.hears(noise(GREETING))
        assert await rejection(url, trust) == 403


@pytest.mark.parametrize(
    ("name", "line", "instead", "statuses"),
    [
        pytest.param(name, line, instead, statuses, marks=needs(name), id=f"{name}: {line.strip()}")
        for name, line, instead, statuses in [
            # From 1.29.7 on, nginx speaks HTTP/1.1 unless told otherwise. 502: websockets 15, 16.
            ("nginx", "proxy_http_version 1.1;", "proxy_http_version 1.0;", {502, 505}),
            ("nginx", "proxy_set_header Upgrade $http_upgrade;", "", {426}),
            ("nginx", "proxy_set_header Connection upgrade;", "", {426}),
            ("nginx", "proxy_set_header Host $http_host;", "", {403}),
            ("apache2", "ProxyPreserveHost On", "", {403}),
            ("apache2", " upgrade=websocket\n", "\n", {426}),
        ]
    ],
)
async def test_missing_line(
    name: str,
    line: str,
    instead: str,
    statuses: set[int],
    deepgram: Deepgram,
    certificate: tuple[Path, ssl.SSLContext],
    tmp_path: Path,
) -> None:
    """Without a line of the block, a signed call is rejected; with which status, the block says."""
    (block,) = blocks(PROXIES[name].language)
    assert all(str(status) in block for status in statuses)
    pem, trust = certificate
    async with proxied(name, deepgram, pem, tmp_path, {line: instead}) as url:
        assert await rejection(url, trust, sign(url, TOKEN)) in statuses


def test_apaches_threads() -> None:
    """Apache has more threads than there are calls, in as many processes as it may have."""
    (block,) = blocks("apache")
    processes, threads = map(
        int, re.findall(r"^(?:ServerLimit|MaxRequestWorkers) (.*)", block, re.MULTILINE)
    )
    assert threads == processes * 25  # Debian's ThreadsPerChild
    assert threads > twilio_aura.Settings.max_calls


@needs("caddy")
def test_stream_close_delay(tmp_path: Path) -> None:
    """The line that lets calls survive a reload of Caddy is one from 2.7 on."""
    caddy = program("caddy") or "caddy"
    file = tmp_path / "conf"
    file.write_text(blocks("caddyfile")[1])
    version = subprocess.run([caddy, "version"], capture_output=True, text=True, check=True).stdout
    adapted = subprocess.run(
        [caddy, "adapt", "--adapter", "caddyfile", "--config", file], capture_output=True, text=True
    )
    is_old = [int(number) for number in re.findall(r"\d+", version)[:2]] < [2, 7]
    assert bool(adapted.returncode) == is_old
    assert ("stream_close_delay" in adapted.stderr) == is_old


# HAProxy, two of our processes behind it, and a restart of each while calls come

CALLERS = 12  # on the line at any time, with half a second of audio at twice its speed each
SPEED = 2.0


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
            await phone.hears(noise(text))

    async def keep_calling(self, enough: asyncio.Event) -> None:
        """Place one call after the other."""
        while not enough.is_set():
            await self.call()


@needs("haproxy")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp, which is Linux's")
async def test_rolling_restart(
    deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """Both processes are restarted in turn; every call gets through and is heard in full."""
    async with AsyncExitStack() as stack:
        public, all_up_port, *ports = stack.enter_context(reserved_ports(4))
        pem, trust = certificate

        async def start(port: int) -> Server:
            # The module's own script: it says the TwiML's text.
            server = Server({"DEEPGRAM_URL": deepgram.url, "PORT": str(port)}, None)
            return await stack.enter_async_context(server)

        async def stop(server: Server) -> str:
            server.signal(signal.SIGTERM)
            server.signal(signal.SIGCONT)
            assert await server.end() == 0
            return server.log

        servers = {port: await start(port) for port in ports}
        edits = {
            "bind :443": f"bind 127.0.0.1:{public}",
            "/etc/haproxy/example.com.pem": str(pem),
            "127.0.0.1:8404": f"127.0.0.1:{all_up_port}",
            "10.0.0.11:5000": f"127.0.0.1:{ports[0]}",
            "10.0.0.12:5000": f"127.0.0.1:{ports[1]}",
        }
        await stack.enter_async_context(
            running("haproxy", tmp_path, edits, lambda: all_up(all_up_port))
        )
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
        assert all(re.search(r"draining [1-9]", log) for log in logs)
        logs += [await stop(server) for server in servers.values()]
        outcomes = re.findall(r" ended: ([^;]+);", "".join(logs))
        assert set(outcomes) <= {"hung up", "drained"}
        # Each call was served, and by one process only.
        assert len(outcomes) == sum(caller.calls for caller in callers + late)
