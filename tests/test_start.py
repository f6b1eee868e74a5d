"""The start: what is printed, what the server cannot have, and what it takes from the system."""

import asyncio
import os
import resource
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from websockets.exceptions import InvalidHandshake

import twilio_aura
from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise
from tests.standins.http import Response
from tests.standins.ngrok import Ngrok, tunnel
from tests.standins.process import PROXY_VARIABLES, Server, refusal, reserved_ports
from tests.standins.telephone import dial
from twilio_aura import Settings, StartError

# What is printed


async def test_twiml(deepgram: Deepgram) -> None:
    """The start prints the address and the TwiML to paste, with the public URL if it is known."""
    url = "https://voice.example.com/"
    async with Server({"DEEPGRAM_URL": deepgram.url, "PUBLIC_URL": url}) as server:
        server.signal()
        assert await server.end() == 0
        assert server.output == (
            f"Listening on ws://127.0.0.1:{server.port}/twilio. The TwiML to paste:\n\n"
            "<Response>\n"
            '  <Connect><Stream url="wss://voice.example.com/twilio"/></Connect>\n'
            "  <Say>Sorry, our voice service is not available. Please call again later.</Say>\n"
            "</Response>\n"
        )


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("voice.example.com", "wss://voice.example.com/twilio"),
        ("https://voice.example.com/", "wss://voice.example.com/twilio"),
        ("WSS://voice.example.com:8443", "wss://voice.example.com:8443/twilio"),
        ("https://example.com/voice/", "wss://example.com/voice"),
    ],
)
def test_stream_url(address: str, url: str) -> None:
    """An address is given with a scheme and a path, or without."""
    assert twilio_aura.stream_url(address) == url


def test_host_that_is_not_known(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a public URL the TwiML has a gap, and it is said how to fill it."""
    twilio_aura.announce(Settings(), 5000, "")
    printed = capsys.readouterr().out
    assert '<Stream url="wss://YOUR-HOST/twilio"/>' in printed
    assert printed.endswith(
        "\nReplace YOUR-HOST: no ngrok agent here has a public https URL for port 5000.\n"
        "Or run `ngrok http 5000` first, or set PUBLIC_URL, and restart.\n"
    )
    assert caplog.messages == []


def test_token_without_a_public_url(caplog: pytest.LogCaptureFixture) -> None:
    """With a token and no public URL, a warning says that a handshake itself names what to sign."""
    for public_url in ("https://voice.example.com", ""):
        assert caplog.messages == []
        twilio_aura.announce(Settings(twilio_auth_token="12345"), 5000, public_url)
    (warning,) = caplog.messages
    assert warning.startswith("set PUBLIC_URL: ")


async def test_no_auth_token(server: Server) -> None:
    """Without an auth token the server says, once, what that means."""
    assert len(server.lines("TWILIO_AUTH_TOKEN is not set: anyone can spend your Deepgram")) == 1


async def test_names_that_are_no_settings(deepgram: Deepgram, tmp_path: Path) -> None:
    """A line tells what .env has besides settings, without the values."""
    (tmp_path / ".env").write_text("PROT=7\nMY_OWN=s3cret\n")
    async with Server({"DEEPGRAM_URL": deepgram.url}, cwd=tmp_path) as server:
        line = await server.logged("besides settings")
        assert line.endswith(f" INFO {tmp_path}/.env has, besides settings: MY_OWN, PROT")
        assert "s3cret" not in server.log


# ngrok


@pytest.fixture
async def ngrok(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ngrok]:
    """Return the agent that is asked."""
    async with Ngrok() as agent:
        monkeypatch.setattr(twilio_aura, "NGROK_API", agent.url)
        yield agent


OURS = tunnel("https://ours.ngrok.app", 5000)
OTHER = tunnel("https://other.ngrok.app", 1)
HTTP = tunnel("http://ours.ngrok.app", 5000)
TCP = tunnel("tcp://1.tcp.ngrok.io:12345", 5000)
INTERNAL = tunnel("https://ours.internal", 5000)
NO_ADDRESS = {"public_url": "https://other.ngrok.app", "config": {}}
LONGER_PORT = tunnel("https://longer.ngrok.app", 15000)


def test_where_ngrok_is() -> None:
    """It is asked where it listens by default."""
    assert twilio_aura.NGROK_API == "http://127.0.0.1:4040/api/tunnels"


@pytest.mark.parametrize(
    ("tunnels", "url"),
    [
        ([OTHER, OURS], "https://ours.ngrok.app"),
        ([HTTP, TCP, INTERNAL, NO_ADDRESS, OURS], "https://ours.ngrok.app"),
        ([LONGER_PORT], ""),
        ([HTTP], ""),
        ([TCP], ""),
        ([INTERNAL], ""),
        ([7], ""),
        ([], ""),
    ],
)
async def test_ngrok(ngrok: Ngrok, tunnels: list[object], url: str) -> None:
    """Of the tunnels only one counts that is public, speaks https, and leads to our port."""
    ngrok.lists(*tunnels)
    assert await asyncio.to_thread(twilio_aura.ngrok_url, 5000) == url


@pytest.mark.parametrize(
    "response", [Response(body=b"<html>"), Response(stop_after=-1), Response(status=500)]
)
async def test_no_ngrok(ngrok: Ngrok, response: Response) -> None:
    """Where something else answers, or nothing, there is no URL, and no error."""
    ngrok.response = response
    assert await asyncio.to_thread(twilio_aura.ngrok_url, 5000) == ""


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
async def test_ngrok_is_not_behind_a_proxy(
    ngrok: Ngrok, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The agent is asked directly, whatever the way out is."""
    for variable in PROXY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with reserved_ports(1) as (port,):  # where nobody listens
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        ngrok.lists(OURS)
        assert await asyncio.to_thread(twilio_aura.ngrok_url, 5000) == "https://ours.ngrok.app"


async def test_ngrok_in_the_twiml(deepgram: Deepgram) -> None:
    """Without PUBLIC_URL the TwiML has ngrok's, and with it ngrok is not asked."""
    with reserved_ports(1) as (port,):
        async with Ngrok() as ngrok:
            ngrok.lists(tunnel("https://ours.ngrok.app", port))
            for public_url, host in (("", "ours.ngrok.app"), ("example.com", "example.com")):
                settings = {"PORT": str(port), "PUBLIC_URL": public_url}
                settings["DEEPGRAM_URL"] = deepgram.url
                async with Server(settings, NGROK_API=ngrok.url) as server:
                    assert f'<Stream url="wss://{host}/twilio"/>' in server.output
                    assert ngrok.connections == 1


async def test_mute_ngrok(deepgram: Deepgram) -> None:
    """An agent that does not answer delays the start a little, and no more."""
    async with Ngrok() as ngrok:
        ngrok.response = Response(stop_after=-1, failure="stall")
        settings = {"DEEPGRAM_URL": deepgram.url}
        async with (
            asyncio.timeout(15),
            Server(settings, NGROK_API=ngrok.url) as server,
            dial(server.url) as phone,
        ):
            assert "YOUR-HOST" in server.output
            await phone.hears(noise(GREETING))


# What the server cannot have


async def test_port_in_use() -> None:
    """A port in use is named, with who may hold it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = await refusal({"PORT": port})
        assert sentence.startswith(f"Cannot listen on 127.0.0.1:{port} ")
        assert "AirPlay" in sentence


@pytest.mark.parametrize("host", ["a..b", "host.invalid"])
async def test_no_host(host: str) -> None:
    """What is no name, or nobody's, is named."""
    sentence = await refusal({"HOST": host})
    assert sentence.startswith(f"Cannot listen on {host}:0 ")
    assert "check HOST and PORT" in sentence


async def test_address_that_is_not_here() -> None:
    """An address of nobody here, as ::1 without IPv6, is named, with the way out."""
    sentence = await refusal({"HOST": "192.0.2.1"}, flags=("-W", "error"))
    assert sentence.startswith("Cannot listen on 192.0.2.1:0 ")
    advice = "set HOST=127.0.0.1" if sys.version_info < (3, 13) else "check HOST and PORT"
    assert advice in sentence


def become_nobody() -> None:
    """Give up root's privileges: to read any file, and to listen on a port below 1024."""
    if os.getuid() == 0:
        os.setuid(65534)


def unprivileged_port_start() -> int:
    """Return the first port that Linux gives everyone."""
    path = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.skipif(unprivileged_port_start() <= 443, reason="everyone may listen on any port")
async def test_privileged_port() -> None:
    """A port below 1024 takes a privilege, which is named; this is nothing of AirPlay's."""
    sentence = await refusal({"PORT": "443"}, before=become_nobody)
    assert sentence.startswith("Cannot listen on 127.0.0.1:443 ")
    assert "CAP_NET_BIND_SERVICE" in sentence
    assert "AirPlay" not in sentence


@contextmanager
def unreadable(name: str, text: str) -> Iterator[Path]:
    """Yield the path of a file that nobody may read, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / name
        path.write_text(text)
        path.chmod(0)
        yield path


async def test_unreadable_files() -> None:
    """Who may not read a file is told so."""
    with unreadable("root.pem", "secret") as secret:
        sentence = await refusal({"TLS_CERT": str(secret)}, before=become_nobody)
        assert f"Cannot use TLS_CERT={secret} " in sentence
        assert "Permission denied" in sentence
    with unreadable(".env", f"DEEPGRAM_API_KEY={KEY}") as dotenv:
        sentence = await refusal({}, before=become_nobody, cwd=dotenv.parent)
        assert f"Cannot read {dotenv}, " in sentence
        assert "Permission denied" in sentence


# TLS


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with PEM files that fit each other, or do not."""
    authority = trustme.CA()
    ours, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(ours.private_key_pem.bytes(), None)
    protected = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    directory = tmp_path_factory.mktemp("pems")
    for name, pem in {
        "cert": ours.cert_chain_pems[0].bytes(),
        "key": ours.private_key_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "protected": protected,
        "junk": b"junk",
    }.items():
        (directory / name).write_bytes(pem)
    return directory


@pytest.mark.parametrize(
    ("cert", "key"),
    [
        ("junk", "key"),
        ("cert", "cert"),
        ("cert", "other"),
        ("cert", "protected"),
        ("cert", ""),
        ("", "key"),
        ("missing", "key"),
    ],
)
def test_wrong_pem(pems: Path, monkeypatch: pytest.MonkeyPatch, cert: str, key: str) -> None:
    """A certificate and a key that cannot be used are a plain sentence, with OpenSSL's words."""
    monkeypatch.chdir(pems)
    with pytest.raises(StartError) as raised:
        twilio_aura.tls_context(Settings(tls_cert=cert, tls_key=key))
    assert str(raised.value).startswith(f"Cannot use TLS_CERT={cert} with TLS_KEY={key} (")
    assert ("No such file" in str(raised.value)) == (cert in ("", "missing"))


@pytest.mark.parametrize("names", [["TLS_CERT", "TLS_KEY"], ["TLS_CERT"]])
async def test_tls(
    deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], names: list[str]
) -> None:
    """With a certificate the server speaks TLS itself; its file may have the key, too."""
    pem, trust = certificate
    settings = dict.fromkeys(names, str(pem))
    async with Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server:
        assert server.output.startswith(f"Listening on wss://127.0.0.1:{server.port}/twilio")
        async with dial(server.url, ssl=trust) as phone:
            await phone.until_heard(noise(GREETING))
        with pytest.raises((OSError, InvalidHandshake)):
            async with dial(server.url.replace("wss", "ws")):
                pass


# Scripts and the greeting


def is_no_coroutine(call: twilio_aura.Call) -> str:
    """Return what was meant to be said."""
    return call.settings.greeting


async def is_a_generator(call: twilio_aura.Call) -> AsyncIterator[str]:
    """Yield what was meant to be said."""
    yield call.settings.greeting


@pytest.mark.parametrize("script", [is_no_coroutine, is_a_generator])
async def test_script_that_is_none(script: twilio_aura.Script) -> None:
    """What is no async function, or yields, is refused in one sentence that shows what is meant."""
    assert "await call.say(text)" in await refusal({}, script=script)


@pytest.mark.parametrize("status", [400, 402])
async def test_rejected_greeting(deepgram: Deepgram, status: int) -> None:
    """A greeting that Deepgram will never accept ends the server, with status 1."""
    greeting = deepgram.answer(f"rejected with {status}", Answer(status=status, body=b"no"))
    async with Server({"DEEPGRAM_URL": deepgram.url, "GREETING": greeting}) as server:
        assert await server.end() == 1
        assert len(server.lines("CRITICAL Deepgram rejects the greeting, ")) == 1


# Open files


needs_prlimit = pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is Linux's")


async def says_limit(call: twilio_aura.Call) -> None:
    """Say how many files may be open."""
    await call.say(f"Up to {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files.")


@needs_prlimit
@pytest.mark.parametrize(
    ("limits", "raised"),
    [("256:5000", 5000), ("256:15000", 10_240), ("15000:15000", 15_000), ("64:64", 64)],
)
async def test_file_limit_is_raised(deepgram: Deepgram, limits: str, raised: int) -> None:
    """The soft limit of open files is raised to the hard one, at most to 10 240."""
    if int(limits.split(":")[1]) > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip("the system grants fewer files")
    prefix = ["prlimit", f"--nofile={limits}"]
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, says_limit, prefix=prefix) as server,
        dial(server.url) as phone,
    ):
        await phone.hears(noise(f"Up to {raised} files."))
