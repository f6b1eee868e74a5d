"""What the README says is so."""

import dataclasses
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import twilio_aura
from tests.deepgram import Deepgram, noise
from tests.server import MODULE, Server, edited
from tests.telephone import dial

ROOT = MODULE.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = MODULE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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
    """The settings are those of the module, with their defaults and purposes."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*)`)? \| (.*) \|$", README, re.MULTILINE)
    assert rows == [
        (
            field.name.upper(),
            "no" if field.default is False else str(field.default),
            field.metadata["about"],
        )
        for field in dataclasses.fields(twilio_aura.Settings)
    ]


def test_twiml() -> None:
    """The TwiML is what the server prints, and <Say> comes when the stream is over."""
    whole, part = blocks("xml")
    assert whole == twilio_aura.TWIML.format(url="wss://YOUR-HOST/twilio") + "\n"
    assert [verb.tag for verb in ET.fromstring(whole)] == ["Connect", "Say"]
    assert {p.attrib["name"] for p in ET.fromstring(part)} == {"text", "model"}


async def test_example_script(deepgram: Deepgram, tmp_path: Path) -> None:
    """The menu works when it takes the place of the module's script."""
    (script,) = blocks("python")
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, module=edited(tmp_path, script)) as server,
        dial(server.url, parameters={"name": "Ada"}) as phone,
    ):
        for number, key in enumerate("17*", 1):
            await phone.until_mark(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    said = [request.text for request in deepgram.requests if request.text in script]
    assert said == [
        "We are open from nine to five.",
        "Please press 1, 2 or star.",
        "Goodbye.",
    ]
    menu = "Hello Ada. Press 1 for our opening hours, 2 for the address, or star to end."
    assert phone.sent == b"".join(map(noise, [menu, *said]))


def test_tour() -> None:
    """The parts stand in the module in the order of the tour."""
    _, tour = README.split("from top to bottom:")
    names = [
        name
        for row in re.findall(r"^\| (`.*`) \| ", tour.split("\n\n")[1], re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(names) > 8
    places = [
        re.search(rf"^(?:class|def|async def) {name}\b", SOURCE, re.MULTILINE) for name in names
    ]
    assert [place.start() for place in places if place] == sorted(
        place.start() if place else -1 for place in places
    )


def test_outcomes() -> None:
    """Each way in which a call ends is explained, with its close code."""
    outcomes = re.findall(r'\.end\((\d{4}), "([^"]+)"', SOURCE)
    assert len(outcomes) >= 6
    for code, outcome in outcomes:
        row = next(row for row in README.splitlines() if row.startswith("|") and outcome in row)
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
