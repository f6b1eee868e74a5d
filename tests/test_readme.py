"""What the README says is so, its nginx, Caddy and HAProxy included."""

import asyncio
import functools
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import GREETING, Deepgram, noise, said
from tests.standins.process import MODULE, ROOT, Server, reserved_ports
from tests.standins.telephone import Telephone, dial, sign
from tests.standins.twilio import TOKEN, TwilioApi

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in this language."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(pattern, README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


SOURCE = MODULE.read_text(encoding="utf-8")
MENU, ANSWER = blocks("python")
COMMANDS = [line for line in blocks("sh")[0].splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    """Each command installs a file that is here, and runs what understands --help."""
    install, run = command.split(" && ")
    assert (ROOT / install.removeprefix("pip install -r ")).is_file()
    python, *arguments = shlex.split(run)
    assert python == "python"
    subprocess.run(
        [sys.executable, *arguments, "--help"], cwd=ROOT, check=True, capture_output=True
    )


def test_three_commands() -> None:
    """There is one to hear it, one to test it, and one to answer calls."""
    assert [command.split("python ")[1] for command in COMMANDS] == [
        "-m tests.demo",
        "-m pytest",
        "twilio_aura.py",
    ]


def test_settings() -> None:
    """What is written like a setting is one."""
    names = set(re.findall(r"`([A-Z]+_?[A-Z_]*)(?:=[^`]*)?`", README))
    assert len(names) > 8
    assert names <= set(twilio_aura.SETTINGS)


def test_twiml() -> None:
    """The TwiML is what the server prints, and <Say> comes when the stream is over."""
    (twiml,) = blocks("xml")
    assert twiml.strip() == twilio_aura.TWIML.format(url="wss://YOUR-HOST/twilio")
    assert [verb.tag for verb in ET.fromstring(twiml)] == ["Connect", "Say"]
    for parameter in re.findall(r"`(<Parameter .*?/>)`", README):
        assert set(ET.fromstring(parameter).attrib) == {"name", "value"}


def write(path: Path, source: str) -> Path:
    """Write one of the README's scripts into a file of its own."""
    path.write_text(source, encoding="utf-8")
    return path


def menu_prompt(greeting: str = "") -> bytes:
    """Return the audio of the menu's prompt."""
    return noise(f"{greeting}Press 1 for our opening hours, 0 for a person, or star to hang up.")


HOURS = "We are open from nine to five."
TO_A_PERSON = "One moment, please."


@asynccontextmanager
async def calling(
    deepgram: Deepgram, program: Path, speed: float = 1000.0
) -> AsyncIterator[tuple[Telephone, TwilioApi]]:
    """Yield a call to this program, and what it asks of Twilio."""
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}
    async with (
        TwilioApi() as twilio,
        Server(settings, program, TWILIO_API=twilio.url) as server,
        dial(
            server.url,
            parameters={"name": "Ada"},
            headers=sign(server.url, TOKEN),
            speed=speed,
        ) as phone,
    ):
        twilio.phones.append(phone)
        yield phone, twilio


@pytest.mark.parametrize(
    ("keys", "after", "twiml"),
    [
        ({1: "1", 3: "*"}, [HOURS, None, "Goodbye."], "<Hangup/>"),
        ({1: "7", 2: "0"}, [None, TO_A_PERSON], "<Dial>+15550100</Dial>"),
        ({}, [None, None, "Goodbye."], "<Hangup/>"),
    ],
)
async def test_menu(
    deepgram: Deepgram, tmp_path: Path, keys: dict[int, str], after: list[str | None], twiml: str
) -> None:
    """The menu works as a file of its own: keys after texts, silence, and both its ends."""
    menu = MENU if keys else MENU.replace("digit(5)", "digit(0.1)")
    async with calling(deepgram, write(tmp_path / "menu.py", menu)) as (phone, twilio):
        for number, key in keys.items():
            await phone.until_returned(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    heard = menu_prompt("Hello Ada. ")
    for text in after:
        heard += menu_prompt() if text is None else noise(text)
    assert phone.received == heard
    assert list(twilio.twiml.values()) == [f"<Response>{twiml}</Response>"]


async def test_key_during_the_menus_answer(deepgram: Deepgram, tmp_path: Path) -> None:
    """A key that is pressed while the menu answers is taken without another prompt."""
    async with calling(deepgram, write(tmp_path / "menu.py", MENU), speed=1.0) as (phone, twilio):
        for number, key in enumerate("10", 1):
            await phone.until_mark(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    assert phone.received == menu_prompt("Hello Ada. ") + noise(HOURS) + noise(TO_A_PERSON)
    assert list(twilio.twiml.values()) == ["<Response><Dial>+15550100</Dial></Response>"]


async def test_answer(deepgram: Deepgram, tmp_path: Path) -> None:
    """So does the answer that is spoken while it is written, in less than thirty lines."""
    assert len(ANSWER.splitlines()) < 30
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, write(tmp_path / "answer.py", ANSWER)) as server,
        dial(server.url) as phone,
    ):
        await phone.until_mark()
        for key in "42#":
            await phone.press(key)
        await phone.until_mark(2)
    assert phone.received == said(
        "Hello! Press some digits, then the pound key.",
        "You pressed 42, then pound.",
        "That is all I know.",
        "Ask me more!",
    )


def test_script_files(tmp_path: Path) -> None:
    """A script file has the module's --help and exit statuses."""
    for source in (MENU, ANSWER):
        command = [sys.executable, str(write(tmp_path / "script.py", source))]
        environment = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--help"], env=environment, capture_output=True, check=True
        )
        assert b"usage: script.py" in done.stdout
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
        assert done.returncode == 2
        assert done.stderr.startswith(b"DEEPGRAM_API_KEY is neither set nor in ")


def test_tour() -> None:
    """The parts stand in the module in the order of the tour."""
    _, tour = README.split("from top to bottom:")
    names = re.findall(r"`(\w+)`", tour.split("\n\n")[0])
    assert len(names) > 8
    places = [
        re.search(rf"^(?:class|def|async def) {name}\b", SOURCE, re.MULTILINE) for name in names
    ]
    assert [place.start() for place in places if place] == sorted(
        place.start() if place else -1 for place in places
    )


def test_outcomes() -> None:
    """Each way in which a call ends is explained, with its close code."""
    outcomes = re.findall(r'\.end\((\d{4}), f?"([^"]+)"', SOURCE)
    assert len(outcomes) >= 6
    for reason in (
        "no audio for {MAX_SILENCE_SECONDS:.0f} s",
        "the connection to Deepgram failed",
        "no thread for Deepgram",
    ):
        assert f'"{reason}"' in SOURCE
        outcomes.append(("1011", reason))
    for code, outcome in outcomes:
        text = outcome.format(**vars(twilio_aura))
        row = next(row for row in README.splitlines() if row.startswith("|") and text in row)
        assert code in row or outcome == "hung up"


def test_deployment() -> None:
    """The time systemd and Docker give a stop is more than DRAIN_SECONDS; the files are here."""
    drain_seconds = twilio_aura.Settings.drain_seconds
    stops = re.findall(r"(?:TimeoutStopSec=|--stop-timeout )(\d+)", README)
    assert len(stops) == 2
    assert all(int(seconds) > drain_seconds for seconds in stops)
    for copied in re.findall(r"^COPY (\S+) ", blocks("dockerfile")[0], re.MULTILINE):
        assert (ROOT / copied).is_file()


def test_links() -> None:
    """What is linked to in the repository is there."""
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / target).exists()


async def test_limits_of_a_handshake(deepgram: Deepgram) -> None:
    """With the limits of the unit and the container, a head too large for Twilio is rejected."""
    for block in (*blocks("ini"), *blocks("dockerfile")):
        (line,) = re.findall(r"\bWEBSOCKETS_.*", block)
        limits = dict(limit.split("=") for limit in line.split())
        async with Server({"DEEPGRAM_URL": deepgram.url, **limits}) as server:
            async with dial(server.url) as phone:
                await phone.until_heard(noise(GREETING))
            for headers in ({f"X-{n}": "x" for n in range(64)}, {"X": "x" * 2048}):
                with pytest.raises(InvalidStatus) as caught:
                    await dial(server.url, headers=headers).__aenter__()
                assert caught.value.response.status_code == 431


# nginx and Caddy: a signed call is heard through each, an unsigned one rejected

# What there is around the README's block. One process each, which writes to tmp_path only.
NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {pem}; ssl_certificate_key {pem};
{block}}} }}
"""
# Without its ports 80 and 2019, and for loopback only.
CADDY = """
{{
    admin off
    auto_https disable_redirects
    default_bind 127.0.0.1
}}
{block}"""
PROXIES = {
    "nginx": (NGINX, "nginx", ["-e", "stderr", "-p", ".", "-c"]),
    "caddy": (CADDY, "caddyfile", ["run", "--adapter", "caddyfile", "--config"]),
}


def is_listening(port: int) -> bool:
    """Return whether somebody accepts connections at `port`."""
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("name", PROXIES)
async def test_signed_call(
    name: str, deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """PUBLIC_URL is not set: the Host header has to come through unchanged."""
    program = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if not program:
        pytest.skip(f"{name} is not installed (Debian package: {name})")
    pem, trust = certificate
    around, language, arguments = PROXIES[name]
    (block,) = blocks(language)
    assert block.count("127.0.0.1:5000") == 1
    with reserved_ports(1) as (port,):
        async with Server({"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}) as server:
            block = block.replace("127.0.0.1:5000", f"127.0.0.1:{server.port}")
            # The certificate that Caddy would get by itself.
            block = block.replace("example.com {", f"127.0.0.1:{port} {{\n\ttls {pem} {pem}")
            (tmp_path / "conf").write_text(around.format(port=port, pem=pem, block=block))
            home = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(tmp_path))
            process = await asyncio.create_subprocess_exec(
                program, *arguments, tmp_path / "conf", cwd=tmp_path, env=os.environ | home
            )
            try:
                await poll(lambda: is_listening(port) or process.returncode is not None)
                assert process.returncode is None
                url = f"wss://127.0.0.1:{port}/twilio"
                async with dial(url, headers=sign(url, TOKEN), ssl=trust) as phone:
                    await phone.until_heard(noise(GREETING))
                    assert phone.heard == noise(GREETING)
                with pytest.raises(InvalidStatus) as caught:
                    await dial(url, ssl=trust).__aenter__()
                assert caught.value.response.status_code == 403
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()


# HAProxy, two of our processes behind it, and a restart of each while calls come

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
