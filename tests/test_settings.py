"""Settings: where they come from, what is wrong with them, and what is said about it."""

import asyncio
import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import twilio_aura
from tests.deepgram import KEY, Deepgram, noise
from tests.server import MODULE, Server
from tests.telephone import dial

ROOT = MODULE.parent


async def refused(pattern: str, settings: Mapping[str, str | None], cwd: Path | str = "/") -> None:
    """Check that the server ends at once, with status 2 and one plain sentence."""
    async with Server(settings, cwd=cwd) as server:
        assert await server.end() == 2
        assert server.output == ""
        assert re.fullmatch(rf"{pattern}.*\.\n", server.log)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"DEEPGRAM_API_KEY": None}, "DEEPGRAM_API_KEY is not set: write "),
        ({"DEEPGRAM_API_KEY": "  "}, "DEEPGRAM_API_KEY is not set: write "),
        ({"DEEPGRAM_API_KEY": "two words"}, "DEEPGRAM_API_KEY must be printable ASCII"),
        ({"DEEPGRAM_URL": "api.deepgram.com"}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"DEEPGRAM_CONCURRENCY": "0"}, "DEEPGRAM_CONCURRENCY must be a whole number from 1 to"),
        ({"CACHE_MB": "-1"}, "CACHE_MB must be a whole number from 0 to .*, not '-1'"),
        ({"CACHE_MB": "9" * 5000}, "CACHE_MB must be a whole number from 0 to "),
        ({"PORT": "http"}, "PORT must be a whole number from 0 to 65535, not 'http'"),
        ({"PORT": "65536"}, "PORT must be a whole number from 0 to 65535, not '65536'"),
        ({"MAX_CALLS": "many"}, "MAX_CALLS must be a whole number from 1 to "),
        ({"DRAIN_SECONDS": "1.5"}, "DRAIN_SECONDS must be a whole number from 0 to "),
        ({"CLOSE_AFTER_SPEECH": "maybe"}, "CLOSE_AFTER_SPEECH must be yes or no, not 'maybe'"),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"),
        ({"PUBLIC_URL": "ws://example.com"}, "PUBLIC_URL must be a URL such as wss://example.com/"),
        ({"TLS_CERT": "missing.pem"}, "TLS_CERT='missing.pem' and TLS_KEY='' cannot be used"),
        ({"TLS_KEY": "missing.pem"}, "TLS_CERT='' and TLS_KEY='missing.pem' cannot be used"),
        ({"TLS_CERT": __file__, "TLS_KEY": __file__}, "TLS_CERT='.*' and TLS_KEY='.*' cannot "),
        ({"DEEPGRAM_URL": "http://[oops"}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"HOST": "a..b"}, "HOST=a..b with PORT=0 can't be listened on "),
        ({"HOST": "host.invalid"}, "HOST=host.invalid with PORT=0 can't be listened on "),
        ({"TWILIO_AUTH_TOKEN": "a b"}, "TWILIO_AUTH_TOKEN must be printable ASCII"),
    ],
)
async def test_wrong(settings: dict[str, str | None], pattern: str) -> None:
    """A wrong setting is named in one plain sentence, with the way out; the status is 2."""
    await refused(pattern, settings)


async def test_secrets_are_not_shown() -> None:
    """A secret that is wrong is not repeated, nor is any secret in the repr of the settings."""
    async with Server({"DEEPGRAM_API_KEY": "s3cret s3cret"}) as server:
        await server.end()
        assert "s3cret" not in server.log
    settings = twilio_aura.Settings(deepgram_api_key="s3cret", twilio_auth_token="s3cret")
    assert "s3cret" not in repr(settings)
    assert "port=5000" in repr(settings)


async def test_port_in_use() -> None:
    """A port in use is named, with who may hold it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        await refused(
            f"HOST=127.0.0.1 with PORT={port} can't be listened on .*AirPlay", {"PORT": port}
        )


async def test_dotenv(tmp_path: Path, deepgram: Deepgram) -> None:
    """What the environment lacks comes from .env in the current directory; empty is not set."""
    lines = [
        "\ufeff# as a Windows editor saves it",
        f"DEEPGRAM_API_KEY={KEY}",
        f"DEEPGRAM_URL='{deepgram.url}/'",
        'GREETING="Grüezi from .env"',
        "DEEPGRAM_MODEL=aura-luna-en",
        "PORT=70000",  # that the real environment wins over
        "CLOSE_AFTER_SPEECH=YES",
        "LOG_LEVEL=",
    ]
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
    async with (
        Server(
            {"DEEPGRAM_API_KEY": None, "DEEPGRAM_MODEL": "aura-zeus-en"}, cwd=tmp_path
        ) as server,
        dial(server.url) as phone,
    ):
        assert await phone.until_closed() == 1000
        assert phone.heard == noise("Grüezi from .env", "aura-zeus-en")


async def test_unreadable_dotenv(tmp_path: Path) -> None:
    """A .env that is not UTF-8 is a plain sentence, not a traceback."""
    (tmp_path / ".env").write_bytes("GREETING=Grüezi".encode("utf-16"))
    await refused(r"\.env cannot be read", {}, cwd=tmp_path)


def test_help() -> None:
    """--help prints what the module does, and its settings as .env.example has them."""
    command = [sys.executable, str(MODULE), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert (twilio_aura.__doc__ or "?") in done.stdout
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert example.split("\n\n", 1)[1].strip() in done.stdout


def test_example() -> None:
    """Each setting has its default and a line in .env.example, and no other stands there."""
    example = (ROOT / ".env.example").read_text(encoding="utf-8").split("\n\n", 1)[1]
    pairs = re.findall(r"^# (.+)\n([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert len(pairs) * 2 == len(example.splitlines())
    expected = {
        field.name.upper(): "no" if field.default is False else str(field.default)
        for field in dataclasses.fields(twilio_aura.Settings)
    }
    assert {name: default for _, name, default in pairs} == expected


async def test_example_works(tmp_path: Path, deepgram: Deepgram) -> None:
    """The example with a key in it is good as it is, but for who Deepgram is here."""
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    filled = example.replace("DEEPGRAM_API_KEY=", f"DEEPGRAM_API_KEY={KEY}")
    (tmp_path / ".env").write_text(filled, encoding="utf-8")
    async with (
        Server({"DEEPGRAM_API_KEY": None, "DEEPGRAM_URL": deepgram.url}, cwd=tmp_path) as server,
        dial(server.url) as phone,
    ):
        await phone.until_heard(noise("Hello, how are you today?"))


# What is printed at the start


async def test_twiml(deepgram: Deepgram) -> None:
    """The start prints the address and the TwiML to paste, with the public URL if it is known."""
    url = "https://voice.example.com/"
    async with Server({"DEEPGRAM_URL": deepgram.url, "PUBLIC_URL": url}) as server:
        assert server.output == (
            f"Listening on ws://127.0.0.1:{server.port}/twilio. The TwiML to paste:\n\n"
            "<Response>\n"
            '  <Connect><Stream url="wss://voice.example.com/twilio"/></Connect>\n'
            "  <Say>Sorry, our voice service is not available. Please call again later.</Say>\n"
            "</Response>\n"
        )


NGROK = """{"tunnels": [
  {"public_url": "https://other.ngrok.app", "config": {"addr": "http://localhost:1"}},
  {"public_url": "https://ours.ngrok.app", "config": {"addr": "http://localhost:%d"}}
]}"""


@pytest.mark.parametrize(
    ("answer", "host"),
    [(NGROK, "ours.ngrok.app"), ('{"tunnels": [7]}', "YOUR-HOST"), ("%d", "YOUR-HOST")],
)
async def test_ngrok(deepgram: Deepgram, answer: str, host: str) -> None:
    """The public URL is asked of ngrok's agent, if it publishes our port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
        writer.write((answer % port if "%d" in answer else answer).encode())
        writer.close()

    try:
        agent = await asyncio.start_server(serve, "127.0.0.1", 4040)
    except OSError:
        pytest.skip("something else, perhaps a real ngrok, listens on port 4040")
    async with agent, Server({"DEEPGRAM_URL": deepgram.url, "PORT": str(port)}) as server:
        assert f'url="wss://{host}/twilio"' in server.output
