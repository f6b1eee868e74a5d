"""The start: what is printed, what the server cannot have, and what it takes from the system."""

import asyncio
import resource
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from websockets.exceptions import InvalidHandshake

from tests.standins.deepgram import GREETING, KEY, Deepgram, noise
from tests.standins.process import GREETING_SCRIPT, Server, refusal, reserved_ports
from tests.standins.telephone import dial

# Nobody may read root's files, nor listen on a port below 1024. (What is imported is there.)
AS_NOBODY = f"{GREETING_SCRIPT}\nimport os\nif os.getuid() == 0: os.setuid(65534)\n"


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


def tunnel(url: str, addr: str) -> str:
    """Return one of the tunnels that ngrok's agent lists."""
    return f'{{"public_url": "{url}", "config": {{"addr": "{addr}"}}}}'


OTHER = tunnel("https://other.ngrok.app", "http://localhost:1")
OURS = tunnel("https://ours.ngrok.app", "http://localhost:PORT")
HTTP = tunnel("http://ours.ngrok.app", "http://localhost:PORT")
TCP = tunnel("tcp://1.tcp.ngrok.io:12345", "localhost:PORT")
INTERNAL = tunnel("https://ours.internal", "http://localhost:PORT")
LONGER_PORT = tunnel("https://longer.ngrok.app", "http://localhost:1PORT")


@pytest.mark.parametrize(
    ("answer", "public_url", "host"),
    [
        (f'{{"tunnels": [{OTHER}, {OURS}]}}', "", "ours.ngrok.app"),
        (f'{{"tunnels": [{HTTP}, {TCP}, {INTERNAL}, {OURS}]}}', "", "ours.ngrok.app"),
        (f'{{"tunnels": [{OURS}]}}', "ours.example.com", "ours.example.com"),
        (f'{{"tunnels": [{LONGER_PORT}]}}', "", "YOUR-HOST"),
        (f'{{"tunnels": [{HTTP}]}}', "", "YOUR-HOST"),
        (f'{{"tunnels": [{TCP}]}}', "", "YOUR-HOST"),
        (f'{{"tunnels": [{INTERNAL}]}}', "", "YOUR-HOST"),
        ('{"tunnels": [7]}', "", "YOUR-HOST"),
        ("PORT", "", "YOUR-HOST"),
    ],
)
async def test_ngrok(deepgram: Deepgram, answer: str, public_url: str, host: str) -> None:
    """Without PUBLIC_URL it is ngrok's public https address for our port, or else a hint."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
        writer.write(answer.replace("PORT", str(port)).encode())
        writer.close()

    agent = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{agent.sockets[0].getsockname()[1]}/api/tunnels"
    settings = {"DEEPGRAM_URL": deepgram.url, "PUBLIC_URL": public_url}
    with reserved_ports(1) as (port,):
        server = Server({**settings, "PORT": str(port)}, NGROK_API=address)
        async with agent, server:
            server.signal()
            assert await server.end() == 0
        hint = (
            "\nReplace YOUR-HOST: the ngrok agent here has no public https URL for port "
            f"{port}.\nOr run `ngrok http {port}` first, or set PUBLIC_URL, and restart.\n"
        )
        assert f'url="wss://{host}/twilio"' in server.output
        assert (hint in server.output) == (host == "YOUR-HOST")


# What the server cannot have


async def test_port_in_use() -> None:
    """A port in use is named, with who may hold it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = await refusal({"PORT": port})
        assert sentence.startswith(f"Cannot listen on 127.0.0.1:{port} ")
        assert "AirPlay" in sentence


async def test_address_that_is_not_here() -> None:
    """An address of nobody here, as ::1 without IPv6, is named, with the way out."""
    sentence = await refusal({"HOST": "192.0.2.1"}, flags=("-W", "error"))
    assert sentence.startswith("Cannot listen on 192.0.2.1:0 ")
    advice = "set HOST=127.0.0.1" if sys.version_info < (3, 13) else "check HOST and PORT"
    assert advice in sentence


def unprivileged_port_start() -> int:
    """Return the first port that Linux gives everyone."""
    path = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.skipif(unprivileged_port_start() <= 443, reason="everyone may listen on any port")
async def test_privileged_port() -> None:
    """A port below 1024 takes a privilege, which is named; this is nothing of AirPlay's."""
    sentence = await refusal({"PORT": "443"}, script=AS_NOBODY)
    assert sentence.startswith("Cannot listen on 127.0.0.1:443 ")
    assert "CAP_NET_BIND_SERVICE" in sentence
    assert "AirPlay" not in sentence


@pytest.mark.parametrize("name", ["TLS_CERT", "TLS_KEY"])
async def test_missing_pem(name: str) -> None:
    """A PEM file that is missing is a plain sentence with its name."""
    sentence = await refusal({name: "missing.pem"})
    assert f"{name}=missing.pem" in sentence
    assert "No such file or directory" in sentence


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
        sentence = await refusal({"TLS_CERT": str(secret)}, script=AS_NOBODY)
        assert "Permission denied" in sentence
    with unreadable(".env", f"DEEPGRAM_API_KEY={KEY}") as dotenv:
        sentence = await refusal({}, script=AS_NOBODY, cwd=dotenv.parent)
        assert f"Cannot read {dotenv}, " in sentence
        assert "Permission denied" in sentence


async def test_wrong_pem(tmp_path: Path) -> None:
    """A certificate and a key that cannot be used are a plain sentence, with OpenSSL's words."""
    authority = trustme.CA()
    ours, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(ours.private_key_pem.bytes(), None)
    protected = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    for name, pem in {
        "cert": ours.cert_chain_pems[0].bytes(),
        "key": ours.private_key_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "protected": protected,
        "junk": b"junk",
    }.items():
        (tmp_path / name).write_bytes(pem)
    for cert, key_name in (
        ("junk", "key"),
        ("cert", "cert"),
        ("cert", "other"),
        ("cert", "protected"),
    ):
        sentence = await refusal({"TLS_CERT": cert, "TLS_KEY": key_name}, cwd=tmp_path)
        assert sentence.startswith(f"Cannot use TLS_CERT={cert} with TLS_KEY={key_name} (")


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


async def test_script_that_is_none() -> None:
    """A script that is no async generator function is refused in one sentence."""
    for source in ("def script(call): return 'Hello'", "async def script(call): pass"):
        assert "async generator function" in await refusal({}, script=source)


# Open files

needs_prlimit = pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is Linux's")


@needs_prlimit
@pytest.mark.parametrize(
    ("limits", "raised"),
    [("256:5000", 5000), ("256:15000", 10_240), ("15000:15000", 15_000), ("64:64", 64)],
)
async def test_file_limit_is_raised(deepgram: Deepgram, limits: str, raised: int) -> None:
    """The soft limit of open files is raised to the hard one, at most to 10 240."""
    if int(limits.split(":")[1]) > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip("the system grants fewer files")
    script = (
        "import resource\n"
        "async def script(call):\n"
        "    yield f'Up to {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files.'\n"
    )
    prefix = ["prlimit", f"--nofile={limits}"]
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, script, prefix=prefix) as server,
        dial(server.url) as phone,
    ):
        await phone.hears(noise(f"Up to {raised} files."))
