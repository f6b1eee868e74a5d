"""What the README says is so."""

import inspect
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import twilio_aura
from tests.deepgram import Deepgram, noise
from tests.readme import README, blocks
from tests.server import MODULE, ROOT, Server
from tests.telephone import dial

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
    assert names <= set(twilio_aura.FIELDS)


def test_twiml() -> None:
    """The TwiML is what the server prints, and <Say> comes when the stream is over."""
    (twiml,) = blocks("xml")
    assert twiml.strip() == twilio_aura.TWIML.format(url="wss://YOUR-HOST/twilio")
    assert [verb.tag for verb in ET.fromstring(twiml)] == ["Connect", "Say"]
    for parameter in re.findall(r"`(<Parameter .*?/>)`", README):
        assert ET.fromstring(parameter).attrib["name"] in ("text", "model")


def write(path: Path, source: str) -> Path:
    """Write one of the README's scripts into a file of its own."""
    path.write_text(source, encoding="utf-8")
    return path


async def test_menu(deepgram: Deepgram, tmp_path: Path) -> None:
    """The menu works as a file of its own."""
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with (
        Server(settings, write(tmp_path / "menu.py", MENU)) as server,
        dial(server.url, parameters={"name": "Ada"}) as phone,
    ):
        for number, key in enumerate("17*", 1):
            await phone.until_mark(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    texts = [
        "Hello Ada. Press 1 for our opening hours, or star to end.",
        "We are open from nine to five.",
        "Please press 1 or star.",
        "Goodbye.",
    ]
    assert phone.received == b"".join(map(noise, texts))


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
    texts = [
        "Hello! Press some digits, then the pound key.",
        "You pressed 42.",
        "That is all I know.",
        "Ask me something else.",
    ]
    assert phone.received == b"".join(map(noise, texts))


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
    outcomes.append(("1011", "no audio for {MAX_SILENCE_SECONDS:.0f} s"))
    assert len(outcomes) >= 6
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


def test_length() -> None:
    """The README is read in a sitting, and so is the module, whatever its `script` says."""
    assert len(README.splitlines()) <= 280
    script = inspect.getsource(twilio_aura.script)
    assert len(SOURCE.splitlines()) - len(script.splitlines()) <= 772
