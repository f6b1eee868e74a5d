"""Settings: where they come from, what is wrong with them, and what is said about it."""

import asyncio
import dataclasses
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import twilio_aura
from tests.standins.deepgram import GREETING, KEY, Deepgram, noise
from tests.standins.process import (
    GREETING_SCRIPT,
    MODULE,
    ROOT,
    Server,
    environment,
    reserved_ports,
)
from tests.standins.telephone import dial

EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
# Nobody may read root's files, nor listen on a port below 1024. (What is imported is there.)
AS_NOBODY = f"{GREETING_SCRIPT}\nimport os\nif os.getuid() == 0: os.setuid(65534)\n"


async def fails(pattern: str, settings: Mapping[str, str | None], **options: Any) -> None:
    """Check that the server ends at once, with status 2 and one plain sentence."""
    async with Server(settings, **options) as server:
        assert await server.end() == 2
        assert server.output == ""
        assert re.fullmatch(rf"{pattern}\n", server.log), server.log


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"DEEPGRAM_API_KEY": "two words"}, "DEEPGRAM_API_KEY must be printable ASCII"),
        ({"DEEPGRAM_URL": "api.deepgram.com"}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"DEEPGRAM_CONCURRENCY": "0"}, "DEEPGRAM_CONCURRENCY must be a whole number from 1 to"),
        ({"CACHE_MB": "-1"}, "CACHE_MB must be a whole number from 0 to .*, not '-1'"),
        ({"CACHE_MB": "9" * 5000}, "CACHE_MB must be a whole number from 0 to "),
        ({"PORT": "http"}, "PORT must be a whole number from 0 to .*, not 'http'"),
        ({"PORT": "65536"}, "PORT must be a whole number from 0 to 65535, not '65536'"),
        ({"PUBLIC_URL": "example.com:65536"}, "PUBLIC_URL must be a URL such as wss://example.com"),
        ({"MAX_CALLS": "many"}, "MAX_CALLS must be a whole number from 1 to "),
        ({"DRAIN_SECONDS": "1.5"}, "DRAIN_SECONDS must be a whole number from 0 to "),
        ({"CLOSE_AFTER_SPEECH": "maybe"}, "CLOSE_AFTER_SPEECH must be yes or no, not 'maybe'"),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"),
        ({"PUBLIC_URL": "ws://example.com"}, "PUBLIC_URL must be a URL such as wss://example.com"),
        ({"DEEPGRAM_URL": "http://[oops"}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"DEEPGRAM_URL": "https://..."}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"HOST": "a..b"}, r"Cannot listen on a\.\.b:0 \(.*\): check HOST and PORT"),
        ({"HOST": "host.invalid"}, r"Cannot listen on host\.invalid:0 \(.*\): check HOST and PORT"),
        ({"TWILIO_AUTH_TOKEN": "a b"}, "TWILIO_AUTH_TOKEN must be printable ASCII"),
    ],
)
async def test_wrong(settings: dict[str, str | None], pattern: str) -> None:
    """A wrong setting is named in one plain sentence, with the way out; the status is 2."""
    # With a token there is no warning that it is missing.
    await fails(rf"{pattern}.*\.", {"TWILIO_AUTH_TOKEN": "12345", **settings})


@pytest.mark.parametrize("key", [None, "  "])
async def test_no_key(tmp_path: Path, key: str | None) -> None:
    """Who has no key is told where it was looked for, whether there is a file, and what to do."""
    path = re.escape(str(tmp_path / ".env"))
    pattern = rf"DEEPGRAM_API_KEY is neither set nor in {path}\. "
    missing = r"No such file: `cp \.env\.example \.env`, then put one there, from .*\."
    await fails(pattern + missing, {"DEEPGRAM_API_KEY": key}, cwd=tmp_path)
    (tmp_path / ".env").write_text("PORT=0\n")
    there = r"Put one there, from console\.deepgram\.com\."
    await fails(pattern + there, {"DEEPGRAM_API_KEY": key}, cwd=tmp_path)


async def test_secrets_are_not_shown() -> None:
    """A secret that is wrong is not repeated, nor is any secret in the repr of the settings."""
    async with Server({"DEEPGRAM_API_KEY": "s3cret s3cret"}) as server:
        await server.end()
        assert "s3cret" not in server.log
    settings = twilio_aura.Settings(deepgram_api_key="s3cret", twilio_auth_token="s3cret")
    assert "s3cret" not in repr(settings)


# What the server cannot have


async def test_port_in_use() -> None:
    """A port in use is named, with who may hold it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        pattern = rf"Cannot listen on 127\.0\.0\.1:{port} \(address already in use\): .*AirPlay.*\."
        await fails(pattern, {"PORT": port, "TWILIO_AUTH_TOKEN": "12345"})


def unprivileged_port_start() -> int:
    """Return the first port that Linux gives everyone."""
    path = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.skipif(unprivileged_port_start() <= 443, reason="everyone may listen on any port")
async def test_privileged_port() -> None:
    """A port below 1024 takes a privilege, which is named; this is nothing of AirPlay's."""
    pattern = r"Cannot listen on 127\.0\.0\.1:443 \(permission denied\): .*CAP_NET_BIND_SERVICE.*\."
    await fails(pattern, {"PORT": "443", "TWILIO_AUTH_TOKEN": "12345"}, script=AS_NOBODY)


@pytest.mark.parametrize("name", ["TLS_CERT", "TLS_KEY"])
async def test_missing_pem(name: str) -> None:
    """A file that is missing is named."""
    pattern = r".* cannot be read \(No such file or directory: missing\.pem\)\."
    await fails(pattern, {name: "missing.pem", "TWILIO_AUTH_TOKEN": "12345"})


async def test_unreadable_files(tmp_path: Path) -> None:
    """Who may not read a file is told so, and not how to write one."""
    secret = tmp_path / "root.pem"
    secret.write_text("secret")
    secret.chmod(0)
    pattern = rf".* cannot be read \(Permission denied: {secret}\)\."
    settings = {"TLS_CERT": str(secret), "TWILIO_AUTH_TOKEN": "12345"}
    await fails(pattern, settings, script=AS_NOBODY)
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"DEEPGRAM_API_KEY={KEY}")
    dotenv.chmod(0)
    pattern = rf"Cannot read {dotenv}: Permission denied\."
    await fails(pattern, {}, script=AS_NOBODY, cwd=tmp_path)


async def test_wrong_pem(tmp_path: Path) -> None:
    """Each way in which a certificate and a key can't be used has its own sentence."""
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
    for cert, key_name, problem in (
        ("junk", "key", "must be PEM files, the certificate chain and its private key .*"),
        ("cert", "cert", "must be PEM files, the certificate chain and its private key .*"),
        ("cert", "other", "do not belong together: the key is not the certificate's"),
        ("cert", "protected", "cannot be used, since the key has a password: remove it with .*"),
    ):
        settings = {"TLS_CERT": cert, "TLS_KEY": key_name, "TWILIO_AUTH_TOKEN": "12345"}
        await fails(f"TLS_CERT={cert} and TLS_KEY={key_name} {problem}.", settings, cwd=tmp_path)


# .env


async def test_dotenv(tmp_path: Path, deepgram: Deepgram) -> None:
    """What the environment lacks comes from .env in the current directory; empty is not set."""
    lines = [
        f"\ufeffDEEPGRAM_API_KEY={KEY}",  # as a Windows editor saves it
        f"DEEPGRAM_URL='{deepgram.url}/'",
        'GREETING="Grüezi from .env for ${HOME}, #1"',
        "DEEPGRAM_MODEL=aura-luna-en",
        "PORT=70000",  # that the real environment wins over
        "CLOSE_AFTER_SPEECH=YES",
        "LOG_LEVEL=",
        "ANOTHER_PROGRAM=1",
    ]
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
    async with (
        Server(
            {"DEEPGRAM_API_KEY": None, "DEEPGRAM_MODEL": "aura-zeus-en"}, cwd=tmp_path
        ) as server,
        dial(server.url) as phone,
    ):
        assert await phone.until_closed() == 1000
        assert phone.heard == noise("Grüezi from .env for ${HOME}, #1", "aura-zeus-en")
    assert "is not a setting" not in server.log


@pytest.mark.parametrize("yes", ["yes", "TRUE", "on", "1"])
@pytest.mark.parametrize("no", ["no", "False", "off", "0"])
def test_yes_and_no(monkeypatch: pytest.MonkeyPatch, yes: str, no: str) -> None:
    """CLOSE_AFTER_SPEECH takes what people write."""
    monkeypatch.setenv("DEEPGRAM_API_KEY", KEY)
    for text, value in ((yes, True), (no, False)):
        monkeypatch.setenv("CLOSE_AFTER_SPEECH", text)
        assert twilio_aura.Settings.load().close_after_speech is value


async def test_dotenv_in_another_encoding(tmp_path: Path) -> None:
    """A .env that is not UTF-8 is a plain sentence, not a traceback."""
    (tmp_path / ".env").write_bytes("GREETING=Grüezi".encode("utf-16"))
    await fails(
        rf"Cannot read {tmp_path}/\.env: it is not UTF-8, so save it as UTF-8\.", {}, cwd=tmp_path
    )


@pytest.mark.parametrize("before", ["", "\n\n# a comment\n\n  \n"])
async def test_dotenv_that_cannot_be_parsed(tmp_path: Path, before: str) -> None:
    """A line that cannot be parsed is named, and does not leave its setting at the default."""
    (tmp_path / ".env").write_text(f"{before}GREETING='It's Ann's bakery'\nPORT=1\n")
    line = before.count("\n") + 1
    pattern = rf'Cannot parse {tmp_path}/\.env, line {line}: write NAME="value"\.'
    await fails(pattern, {}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("CLOSE_AFTER_SPEACH", "CLOSE_AFTER_SPEECH"),
        ("port", "PORT"),
        ("PROT", "PORT"),
        ("DEEPGRAM_KEY", "DEEPGRAM_API_KEY"),
    ],
)
async def test_misspelt_name(tmp_path: Path, deepgram: Deepgram, written: str, meant: str) -> None:
    """A name in .env that is nearly a setting's is warned of, with what was probably meant."""
    (tmp_path / ".env").write_text(f"{written}=0\nCOMPOSE_PROJECT_NAME=voice\n")
    async with Server({"DEEPGRAM_URL": deepgram.url}, cwd=tmp_path) as server:
        path = re.escape(str(tmp_path / ".env"))
        (line,) = server.lines("is not a setting")
        assert re.search(
            f"WARNING {path}: {written} is not a setting; did you mean {meant}\\?", line
        )


# What is printed


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Return what `command` printed, of an environment without settings."""
    return subprocess.run(command, capture_output=True, text=True, env=environment({}), check=False)


def test_help() -> None:
    """--help prints what the module does, and its settings as .env.example has them."""
    done = run(sys.executable, str(MODULE), "--help")
    assert (twilio_aura.__doc__ or "?") in done.stdout
    assert EXAMPLE.split("\n\n", 1)[1].strip() in done.stdout


@pytest.mark.parametrize(
    ("without", "why"),
    [
        ("requests", "import of requests halted; None in sys.modules"),  # as if not installed
        ("asyncio", "cannot import name 'Timeout' from 'asyncio' (unknown location)"),
    ],
)
def test_what_is_needed(without: str, why: str) -> None:
    """An older Python, or one without the packages, is told what is needed, in a line."""
    lack = {"requests": "None", "asyncio": "types.ModuleType('asyncio')"}[without]
    program = f"import sys, types; sys.modules[{without!r}] = {lack}; import twilio_aura"
    done = run(sys.executable, "-c", program)
    need = f"Python 3.11 or newer, and {sys.executable} -m pip install -r requirements.txt"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{why}: this needs {need}\n"


def test_example() -> None:
    """Each setting has its default and a line in .env.example, and no other stands there."""
    example = EXAMPLE.split("\n\n", 1)[1]
    pairs = re.findall(r"^# (.+)\n([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert len(pairs) * 2 == len(example.splitlines())
    expected = {
        field.name.upper(): "no" if field.default is False else str(field.default)
        for field in dataclasses.fields(twilio_aura.Settings)
    }
    assert {name: default for _, name, default in pairs} == expected


async def test_example_works(tmp_path: Path, deepgram: Deepgram) -> None:
    """The example with a key in it is good as it is, but for who Deepgram is here."""
    filled = EXAMPLE.replace("DEEPGRAM_API_KEY=", f"DEEPGRAM_API_KEY={KEY}")
    (tmp_path / ".env").write_text(filled, encoding="utf-8")
    settings = {"DEEPGRAM_API_KEY": None, "DEEPGRAM_URL": deepgram.url}
    async with Server(settings, cwd=tmp_path) as server, dial(server.url) as phone:
        await phone.until_heard(noise(GREETING))


def test_quotes_in_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that .env.example quotes is what it looks like."""
    (quoted,) = re.findall(r'GREETING="[^\n]*"', EXAMPLE)
    (tmp_path / ".env").write_text(f"DEEPGRAM_API_KEY={KEY}\n{quoted}\n")
    monkeypatch.chdir(tmp_path)
    for name in twilio_aura.FIELDS:
        monkeypatch.delenv(name, raising=False)
    assert f'GREETING="{twilio_aura.Settings.load().greeting}"' == quoted


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
LONGER_PORT = tunnel("https://longer.ngrok.app", "http://localhost:1PORT")


@pytest.mark.parametrize(
    ("answer", "public_url", "host"),
    [
        (f'{{"tunnels": [{OTHER}, {OURS}]}}', "", "ours.ngrok.app"),
        (f'{{"tunnels": [{HTTP}, {OURS}]}}', "", "ours.ngrok.app"),
        (f'{{"tunnels": [{OURS}]}}', "ours.example.com", "ours.example.com"),
        (f'{{"tunnels": [{LONGER_PORT}]}}', "", "YOUR-HOST"),
        ('{"tunnels": [7]}', "", "YOUR-HOST"),
        ("PORT", "", "YOUR-HOST"),
    ],
)
async def test_ngrok(deepgram: Deepgram, answer: str, public_url: str, host: str) -> None:
    """Without PUBLIC_URL ngrok's agent is asked, if it publishes our port, and by https."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
        writer.write(answer.replace("PORT", str(port)).encode())
        writer.close()

    try:
        agent = await asyncio.start_server(serve, "127.0.0.1", 4040)
    except OSError:
        pytest.skip("something else, perhaps a real ngrok, listens on port 4040")
    settings = {"DEEPGRAM_URL": deepgram.url, "PUBLIC_URL": public_url}
    with reserved_ports(1) as (port,):
        async with agent, Server({**settings, "PORT": str(port)}) as server:
            server.signal()
            assert await server.end() == 0
        hint = (
            f"\nReplace YOUR-HOST: ngrok does not answer, or publishes another port than {port}.\n"
        )
        assert f'url="wss://{host}/twilio"' in server.output
        assert (hint in server.output) == (host == "YOUR-HOST")


# The limit of open files


needs_prlimit = pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit is Linux's")


@needs_prlimit
async def test_file_limit_is_raised(deepgram: Deepgram) -> None:
    """The soft limit of open files is raised to what the settings need."""
    script = (
        "import resource\n"
        "async def script(call):\n"
        "    yield f'Up to {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files.'\n"
    )
    settings = {"MAX_CALLS": "900", "DEEPGRAM_CONCURRENCY": "15"}
    async with (
        Server(
            {"DEEPGRAM_URL": deepgram.url, **settings},
            script,
            prefix=["prlimit", "--nofile=256:5000"],
        ) as server,
        dial(server.url) as phone,
    ):
        await phone.until_heard(noise("Up to 947 files."))
        assert "ulimit" not in server.log


@needs_prlimit
async def test_file_limit_too_low(deepgram: Deepgram) -> None:
    """Where the hard limit is lower, one warning says how many calls fit."""
    settings = {"DEEPGRAM_URL": deepgram.url, "MAX_CALLS": "900"}
    async with Server(settings, prefix=["prlimit", "--nofile=100:100"]) as server:
        (line,) = server.lines("ulimit")
        assert "WARNING raise ulimit -n 100: only 53 calls fit" in line


@needs_prlimit
async def test_out_of_files(deepgram: Deepgram) -> None:
    """Out of descriptors, the server says so once a second at most, and recovers."""
    prefix = ["prlimit", "--nofile=64:64"]
    async with Server({"DEEPGRAM_URL": deepgram.url}, prefix=prefix) as server:
        async with dial(server.url) as first:
            await first.until_heard(noise(GREETING))
            writers = []
            for _ in range(100):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writers.append(writer)
            line = await server.logged("ERROR cannot accept a call")
            assert "Too many open files; raise the limit of open files (ulimit -n" in line
            await first.press("1")  # who is there is served
            for writer in writers:
                writer.transport.abort()
            await first.hang_up()
        async with dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))
        assert "Traceback" not in server.log
        times = [line.split(",")[0] for line in server.lines("cannot accept a call")]
        assert len(times) <= len(set(times)) + 1
