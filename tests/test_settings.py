"""Settings: where they come from, what is wrong with them, and what is said about it."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import twilio_aura
from tests.standins.deepgram import GREETING, KEY, Deepgram, noise
from tests.standins.process import MODULE, ROOT, Server, environment, refusal
from tests.standins.telephone import dial

EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"DEEPGRAM_API_KEY": "two words"}, "DEEPGRAM_API_KEY must be printable ASCII"),
        ({"DEEPGRAM_URL": "api.deepgram.com"}, "DEEPGRAM_URL must be a URL such as https://"),
        ({"DEEPGRAM_CONCURRENCY": "0"}, "DEEPGRAM_CONCURRENCY must be a whole number from 1 to"),
        ({"CACHE_MB": "-1"}, "CACHE_MB must be a whole number from 0 to 65535, not '-1'"),
        ({"CACHE_MB": "9" * 5000}, "CACHE_MB must be a whole number from 0 to "),
        ({"PORT": "http"}, "PORT must be a whole number from 0 to 65535, not 'http'"),
        ({"PORT": "65536"}, "PORT must be a whole number from 0 to 65535, not '65536'"),
        ({"MAX_CALLS": "many"}, "MAX_CALLS must be a whole number from 1 to "),
        ({"DRAIN_SECONDS": "1.5"}, "DRAIN_SECONDS must be a whole number from 0 to "),
        ({"CLOSE_AFTER_SPEECH": "maybe"}, "CLOSE_AFTER_SPEECH must be yes or no, not 'maybe'"),
        ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"),
        ({"HOST": "a..b"}, "Cannot listen on a..b:0 "),
        ({"HOST": "host.invalid"}, "Cannot listen on host.invalid:0 "),
        ({"TWILIO_AUTH_TOKEN": "a b"}, "TWILIO_AUTH_TOKEN must be printable ASCII"),
    ],
)
async def test_wrong(settings: dict[str, str | None], sentence: str) -> None:
    """A wrong setting is named in one plain sentence, with the way out; the status is 2."""
    assert (await refusal(settings)).startswith(sentence)


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_no_key(tmp_path: Path, key: str | None) -> None:
    """Who has no key is told where it was looked for, and what to do."""
    sentence = await refusal({"DEEPGRAM_API_KEY": key}, cwd=tmp_path)
    assert f"DEEPGRAM_API_KEY is neither set nor in {tmp_path}/.env: " in sentence
    assert "`cp .env.example .env`" in sentence


async def test_secrets_are_not_shown() -> None:
    """A secret that is wrong is not repeated, nor is any secret in the repr of the settings."""
    assert "s3cret" not in await refusal({"DEEPGRAM_API_KEY": "s3cret s3cret"})
    settings = twilio_aura.Settings(deepgram_api_key="s3cret", twilio_auth_token="s3cret")
    assert "s3cret" not in repr(settings)


# .env


SAYS_ITS_OWN = """
import os

async def script(call):
    yield call.settings.greeting
    yield os.environ["MY_OWN"]
"""


async def test_dotenv(tmp_path: Path, deepgram: Deepgram) -> None:
    """What the environment lacks comes from .env in the current directory, a script's own, too."""
    lines = [
        f"\ufeffDEEPGRAM_API_KEY={KEY}",  # as a Windows editor saves it
        f"DEEPGRAM_URL='{deepgram.url}/'",
        'GREETING="Grüezi, ${NAME}, #1"',
        "DEEPGRAM_MODEL=aura-luna-en",
        "PORT=70000",  # that the real environment wins over
        "CLOSE_AFTER_SPEECH=YES",
        "LOG_LEVEL=",
        "MY_OWN=Mine.",
    ]
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
    settings = {"DEEPGRAM_API_KEY": None, "DEEPGRAM_MODEL": "aura-zeus-en", "NAME": "Ada"}
    async with (
        Server(settings, SAYS_ITS_OWN, cwd=tmp_path) as server,
        dial(server.url) as phone,
    ):
        assert await phone.until_closed() == 1000
        voice = "aura-zeus-en"
        assert phone.heard == noise("Grüezi, Ada, #1", voice) + noise("Mine.", voice)
    assert "is not a setting" not in server.log


@pytest.mark.parametrize("yes", ["yes", "TRUE", "on", "1"])
@pytest.mark.parametrize("no", ["no", "False", "off", "0"])
def test_yes_and_no(monkeypatch: pytest.MonkeyPatch, yes: str, no: str) -> None:
    """CLOSE_AFTER_SPEECH takes what people write."""
    monkeypatch.setenv("DEEPGRAM_API_KEY", KEY)
    for text, value in ((yes, True), (no, False)):
        monkeypatch.setenv("CLOSE_AFTER_SPEECH", text)
        assert twilio_aura.Settings.load().close_after_speech is value


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
async def test_dotenv_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    """A .env that is not UTF-8 is a plain sentence, not a traceback."""
    (tmp_path / ".env").write_bytes("GREETING=Grüezi\n".encode(encoding))
    assert f"Cannot read {tmp_path}/.env, which must be UTF-8 " in await refusal({}, cwd=tmp_path)


async def test_dotenv_that_cannot_be_parsed(tmp_path: Path, deepgram: Deepgram) -> None:
    """A line that cannot be parsed is warned of, with its number."""
    text = f"DEEPGRAM_API_KEY={KEY}\nGREETING='It's Ann's bakery'\n"
    (tmp_path / ".env").write_text(text)
    settings = {"DEEPGRAM_API_KEY": None, "DEEPGRAM_URL": deepgram.url}
    async with Server(settings, cwd=tmp_path) as server, dial(server.url) as phone:
        await phone.hears(noise(GREETING))
        assert len(server.lines("WARNING [Pp]ython-dotenv could not parse .* line 2")) == 1


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
        (line,) = server.lines("is not a setting")
        assert line.endswith(f"/.env: {written} is not a setting; did you mean {meant}?")


# .env.example and --help


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Return what `command` printed, of an environment without settings."""
    return subprocess.run(command, capture_output=True, text=True, env=environment({}), check=False)


def test_help() -> None:
    """--help prints what the module does, and its settings as .env.example has them."""
    done = run(sys.executable, str(MODULE), "--help")
    assert (twilio_aura.__doc__ or "?") in done.stdout
    assert EXAMPLE.split("\n\n", 1)[1].strip() in done.stdout


def test_example() -> None:
    """Each setting has its default and a line in .env.example, and no other stands there."""
    example = EXAMPLE.split("\n\n", 1)[1]
    pairs = re.findall(r"^# (.+)\n([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert len(pairs) * 2 == len(example.splitlines())
    expected = {
        field.name.upper(): (field.metadata["about"], field.metadata["default"])
        for field in dataclasses.fields(twilio_aura.Settings)
    }
    assert {name: (about, default) for about, name, default in pairs} == expected


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
    for name in twilio_aura.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert f'GREETING="{twilio_aura.Settings.load().greeting}"' == quoted
