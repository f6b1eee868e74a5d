"""Settings: where they come from, what is wrong with them, and what is said about it."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

import twilio_aura
from tests.standins.deepgram import KEY
from tests.standins.process import MODULE, ROOT, environment, refusal
from twilio_aura import Settings, StartError

EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Return what loads the settings where nothing is set but the key and what it is given.

    What `.env` adds to the environment lasts as long as the test.
    """
    monkeypatch.chdir(tmp_path)

    def load(dotenv: str | bytes = "", **settings: str | None) -> Settings:
        os.environ.clear()
        os.environ.update(environment({"DEEPGRAM_API_KEY": KEY, **settings}))
        data = dotenv.encode() if isinstance(dotenv, str) else dotenv
        (tmp_path / ".env").write_bytes(data)
        twilio_aura.read_dotenv()
        return Settings.load()

    with mock.patch.dict(os.environ):
        yield load


def test_defaults(load: Load) -> None:
    """Who sets nothing but the key has Deepgram, Twilio and the limits that the README names."""
    settings = load()
    assert settings.deepgram_api_key == KEY
    assert settings.deepgram_url == "https://api.deepgram.com"
    assert settings.deepgram_model == "aura-asteria-en"
    assert settings.deepgram_concurrency == 15
    assert settings.twilio_api_url == "https://api.twilio.com"
    assert settings.max_calls == 300
    assert settings.drain_seconds == 25
    assert settings.close_after_speech is False


WHOLE_NUMBER = "must be a whole number from"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DEEPGRAM_API_KEY", "two words", "must be printable ASCII without spaces (copy it again)"),
        ("DEEPGRAM_API_KEY", "\u2018key\u2019", "must be printable ASCII without spaces (copy it"),
        ("DEEPGRAM_API_KEY", "key\x7f", "must be printable ASCII without spaces (copy it again)"),
        ("DEEPGRAM_URL", "api.deepgram.com", "must be a URL such as https://api.example.com, not "),
        ("DEEPGRAM_URL", "https://", "must be a URL such as https://api.example.com, not 'https:"),
        ("DEEPGRAM_URL", "https:///v1", "must be a URL such as https://api.example.com, not "),
        ("DEEPGRAM_URL", "http://[::1", "must be a URL such as https://api.example.com, not "),
        ("DEEPGRAM_URL", "http://a:port", "must be a URL such as https://api.example.com, not "),
        (
            "DEEPGRAM_URL",
            "http://me:secret@a",
            "must be a URL such as https://api.example.com, not ",
        ),
        ("DEEPGRAM_CONCURRENCY", "0", f"{WHOLE_NUMBER} 1 to 65535, not '0'"),
        ("CACHE_MB", "-1", f"{WHOLE_NUMBER} 0 to 65535, not '-1'"),
        ("CACHE_MB", "9" * 5000, f"{WHOLE_NUMBER} 0 to 65535, not "),
        ("PORT", "http", f"{WHOLE_NUMBER} 0 to 65535, not 'http'"),
        ("PORT", "65536", f"{WHOLE_NUMBER} 0 to 65535, not '65536'"),
        ("PORT", "\u0664", f"{WHOLE_NUMBER} 0 to 65535, not "),
        ("MAX_CALLS", "many", f"{WHOLE_NUMBER} 1 to 65535, not 'many'"),
        ("DRAIN_SECONDS", "1.5", f"{WHOLE_NUMBER} 0 to 65535, not '1.5'"),
        ("CLOSE_AFTER_SPEECH", "maybe", "must be yes or no, not 'maybe'"),
        ("LOG_LEVEL", "LOUD", "must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"),
        ("TWILIO_AUTH_TOKEN", "a b", "must be printable ASCII without spaces (copy it again)"),
        ("TWILIO_AUTH_TOKEN", "AC" + "0" * 32, "must be the auth token, not the Account SID above"),
        ("TWILIO_API_URL", "api.dublin.ie1.twilio.com", "must be a URL such as https://api.exa"),
    ],
)
def test_wrong(load: Load, name: str, value: str, sentence: str) -> None:
    """A wrong setting is named in one plain sentence, with the way out."""
    with pytest.raises(StartError) as raised:
        load(**{name: value})
    assert str(raised.value).startswith(f"{name} {sentence}")
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "is_used_as"),
    [
        ("DEEPGRAM_URL", "http://127.0.0.1:8080/deepgram/", "http://127.0.0.1:8080/deepgram"),
        ("DEEPGRAM_URL", "http://[::1]:8080", "http://[::1]:8080"),
        (
            "TWILIO_API_URL",
            "https://api.dublin.ie1.twilio.com/",
            "https://api.dublin.ie1.twilio.com",
        ),
        ("TWILIO_AUTH_TOKEN", " 12345\n", "12345"),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("DRAIN_SECONDS", "0", 0),
        ("PORT", "65535", 65535),
        *(("CLOSE_AFTER_SPEECH", yes, True) for yes in ("yes", "TRUE", "on", "1")),
        *(("CLOSE_AFTER_SPEECH", no, False) for no in ("no", "False", "off", "0")),
    ],
)
def test_right(load: Load, name: str, value: str, is_used_as: object) -> None:
    """A setting is taken as people write it."""
    assert getattr(load(**{name: value}), name.lower()) == is_used_as


@pytest.mark.parametrize("key", [None, "", "  "])
def test_no_key(tmp_path: Path, load: Load, key: str | None) -> None:
    """Who has no key is told where it was looked for, and what to do."""
    with pytest.raises(StartError) as raised:
        load(DEEPGRAM_API_KEY=key)
    sentence = str(raised.value)
    assert f"DEEPGRAM_API_KEY is neither set nor in {tmp_path}/.env: " in sentence
    assert "`cp .env.example .env`" in sentence


async def test_refusal() -> None:
    """A server with a wrong setting ends with status 2, and says nothing but that sentence."""
    assert (await refusal({"MAX_CALLS": "many"})).startswith("MAX_CALLS must be ")


def test_secrets_are_not_shown(load: Load) -> None:
    """A secret that is wrong is not repeated, nor is any secret in the repr of the settings."""
    for name in ("DEEPGRAM_API_KEY", "TWILIO_AUTH_TOKEN"):
        with pytest.raises(StartError) as raised:
            load(**{name: "s3cret s3cret"})
        assert "s3cret" not in str(raised.value)
    assert "s3cret" not in repr(load(DEEPGRAM_API_KEY="s3cret", TWILIO_AUTH_TOKEN="s3cret"))


# .env


def test_dotenv(load: Load) -> None:
    """What the environment lacks comes from .env in the current directory, a script's own, too."""
    lines = [
        f"\ufeffDEEPGRAM_API_KEY={KEY}",  # as a Windows editor saves it
        'GREETING="Grüezi, ${NAME}, #1"',
        "DEEPGRAM_MODEL=aura-luna-en",
        "PORT=70000",  # that the real environment wins over
        "CLOSE_AFTER_SPEECH=YES",
        "LOG_LEVEL=",
        "MY_OWN=Mine.",
    ]
    settings = load(
        "\n".join(lines), DEEPGRAM_API_KEY=None, DEEPGRAM_MODEL="aura-zeus-en", PORT="0", NAME="Ada"
    )
    assert settings == Settings(
        deepgram_api_key=KEY,
        deepgram_model="aura-zeus-en",
        greeting="Grüezi, Ada, #1",
        port=0,
        close_after_speech=True,
    )
    assert os.environ["MY_OWN"] == "Mine."


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_empty_variable(load: Load, empty: str) -> None:
    """A variable that is set but empty counts as not set: .env fills it, or the default does."""
    dotenv = f"DEEPGRAM_API_KEY={KEY}\nGREETING=Hello.\nMY_OWN=Mine.\n"
    names = ("DEEPGRAM_API_KEY", "GREETING", "MY_OWN", "MAX_CALLS")
    settings = load(dotenv, **dict.fromkeys(names, empty))
    assert settings == Settings(deepgram_api_key=KEY, greeting="Hello.")
    assert os.environ["MY_OWN"] == "Mine."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_dotenv_in_another_encoding(tmp_path: Path, load: Load, encoding: str) -> None:
    """A .env that is not UTF-8 is a plain sentence, not a traceback."""
    with pytest.raises(StartError) as raised:
        load("GREETING=Grüezi\n".encode(encoding))
    assert str(raised.value).startswith(f"Cannot read {tmp_path}/.env, which must be UTF-8 (")


def test_dotenv_that_cannot_be_parsed(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """A line that cannot be parsed is warned of, with its number, and the others are taken."""
    assert load("GREETING='It's Ann's bakery'\nPORT=7\n") == Settings(KEY, port=7)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search("could not parse .* line 1$", record.getMessage())


def test_names_that_are_no_settings(load: Load, tmp_path: Path) -> None:
    """What .env has besides settings is told, so that a misspelt one is found; no value is."""
    load()
    (tmp_path / ".env").write_text("PROT=7\nMAX_CALLS=7\nMY_OWN=Mine.\nHOME=/\n")
    os.environ["HOME"] = "/home"
    assert twilio_aura.read_dotenv() == ["MY_OWN", "PROT"]


# .env.example and --help


def test_help() -> None:
    """--help prints what the module does, and its settings as .env.example has them."""
    done = subprocess.run(
        [sys.executable, str(MODULE), "--help"],
        capture_output=True,
        text=True,
        env=environment({}),
        check=False,
    )
    assert (twilio_aura.__doc__ or "?") in done.stdout
    assert EXAMPLE.split("\n\n", 1)[1].strip() in done.stdout


def test_example() -> None:
    """Each setting has its default and a line in .env.example, and no other stands there."""
    example = EXAMPLE.split("\n\n", 1)[1]
    pairs = re.findall(r"^# (.+)\n([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert len(pairs) * 2 == len(example.splitlines())
    expected = {
        field.name.upper(): (field.metadata["about"], field.metadata["default"])
        for field in dataclasses.fields(Settings)
    }
    assert {name: (about, default) for about, name, default in pairs} == expected


def test_example_works(load: Load) -> None:
    """The example with a key in it sets what is the default anyway."""
    dotenv = EXAMPLE.replace("DEEPGRAM_API_KEY=", f"DEEPGRAM_API_KEY={KEY}")
    assert load(dotenv, DEEPGRAM_API_KEY=None) == Settings(KEY)


def test_quotes_in_the_example(load: Load) -> None:
    """The value that .env.example quotes is what it looks like."""
    (quoted,) = re.findall(r'GREETING="[^\n]*"', EXAMPLE)
    assert f'GREETING="{load(quoted).greeting}"' == quoted
