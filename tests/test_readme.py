"""What the README says is so; test_readme_proxies.py and test_models.py have more of it."""

import ast
import asyncio
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.exceptions import InvalidMessage, InvalidStatus

import twilio_aura
from tests.standins.deepgram import GREETING, Deepgram, noise, said
from tests.standins.process import MODULE, ROOT, Server
from tests.standins.readme import README, blocks
from tests.standins.telephone import Telephone, dial, sign
from tests.standins.twilio import TOKEN, TwilioApi

SOURCE = MODULE.read_text(encoding="utf-8")
MENU, ORDER, _, _, DIALS = blocks("python")
COMMANDS = [line for line in blocks("sh")[0].splitlines() if line and not line.startswith("#")]
OF_OTHERS = {
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "OPENAI_AGENTS_DISABLE_TRACING",
    "PYTHONPATH",
}  # variables that are no settings


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
    names |= set(re.findall(r"^([A-Z_]+)=\S+$", README, re.MULTILINE))
    assert len(names) > 8
    assert names - OF_OTHERS <= set(twilio_aura.SETTINGS)


def test_twiml() -> None:
    """The TwiML is what the server prints; <Say> comes when the stream is over."""
    plain, with_parameters = blocks("xml")
    assert plain.strip() == twilio_aura.TWIML.format(url="wss://YOUR-HOST/twilio")
    for twiml in (plain, with_parameters):
        assert [verb.tag for verb in ET.fromstring(twiml)] == ["Connect", "Say"]
    parameters = ET.fromstring(with_parameters).findall("Connect/Stream/Parameter")
    assert [parameter.get("name") for parameter in parameters] == ["text", "model", "from"]
    for parameter in re.findall(r"`(<Parameter .*?/>)`", README):
        assert set(ET.fromstring(parameter).attrib) == {"name", "value"}


def test_dials() -> None:
    """The TwiML that brings a caller back is TwiML, with addresses that are whole."""
    values: dict[str, str] = {}
    exec(DIALS, values)  # noqa: S102 (the README's own)
    dial = ET.fromstring(values["TO_A_PERSON"]).find("Dial")
    assert dial is not None
    assert dial.attrib == {"action": values["BIN"]}
    verbs = ET.fromstring(values["AND_BACK"])
    assert [verb.tag for verb in verbs] == ["Dial", "Redirect"]
    assert verbs[1].text == values["BIN"]
    assert values["BIN"].startswith("https://")


def test_curl() -> None:
    """The command that places a call has the three fields that Twilio wants, and TwiML."""
    (command,) = [block for block in blocks("sh") if block.startswith("curl ")]
    words = shlex.split(command.replace("\\\n", " "))
    fields = dict(
        words[index + 1].split("=", 1)
        for index, word in enumerate(words)
        if word == "--data-urlencode"
    )
    assert set(fields) == {"To", "From", "Twiml"}
    stream = ET.fromstring(fields["Twiml"]).find("Connect/Stream")
    assert stream is not None
    assert stream.get("url") == "wss://YOUR-HOST/twilio"


def test_controls() -> None:
    """The examples of Deepgram's controls are Python strings with one control each."""
    examples = re.findall(r"`(r['\"].*?['\"])`", README)
    assert len(examples) == 2
    for example in examples:
        assert len(twilio_aura.CONTROL.findall(ast.literal_eval(example))) == 1


# The scripts, as printed


PROMPT = "Press 1 for our opening hours, 0 for a person, or star to hang up."
HOURS = "We are open from nine to five."
TO_A_PERSON = "One moment, please."
HANGUP = "<Response><Hangup/></Response>"
DIAL = "<Response><Dial>+15550100</Dial></Response>"


@asynccontextmanager
async def calling(
    deepgram: Deepgram, file: Path, source: str, speed: float = 1000.0
) -> AsyncIterator[tuple[Telephone, TwilioApi]]:
    """Write a script into `file`, and yield a call to it, and what it asks of Twilio."""
    await asyncio.to_thread(file.write_text, source, encoding="utf-8")
    async with TwilioApi() as twilio:
        settings = {"TWILIO_AUTH_TOKEN": TOKEN, "TWILIO_API_URL": twilio.url}
        async with (
            Server({"DEEPGRAM_URL": deepgram.url, **settings}, file) as server,
            dial(server.url, headers=sign(server.url, TOKEN), speed=speed) as phone,
        ):
            twilio.phones.append(phone)
            yield phone, twilio


@pytest.mark.parametrize(
    ("keys", "texts", "twiml"),
    [
        ({1: "1", 3: "*"}, [PROMPT, HOURS, PROMPT, "Goodbye."], HANGUP),
        ({1: "7", 2: "0"}, [PROMPT, PROMPT, TO_A_PERSON], DIAL),
    ],
)
async def test_menu(
    deepgram: Deepgram, tmp_path: Path, keys: dict[int, str], texts: list[str], twiml: str
) -> None:
    """The menu works as a file of its own: keys after texts, and both its ends."""
    async with calling(deepgram, tmp_path / "menu.py", MENU) as (phone, twilio):
        for number, key in keys.items():
            await phone.until_returned(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    assert phone.received == said(*texts)
    assert list(twilio.twiml.values()) == [twiml]


async def test_key_during_the_menus_answer(deepgram: Deepgram, tmp_path: Path) -> None:
    """A key that is pressed while the menu answers is taken without another prompt."""
    async with calling(deepgram, tmp_path / "menu.py", MENU, speed=1.0) as (phone, twilio):
        for number, key in enumerate("10", 1):
            await phone.until_mark(number)
            await phone.press(key)
        assert await phone.until_closed() == 1000
    assert phone.received == said(PROMPT, HOURS, TO_A_PERSON)
    assert list(twilio.twiml.values()) == [DIAL]


async def test_order(deepgram: Deepgram, tmp_path: Path) -> None:
    """The order number is asked for again until the caller confirms it, and is read back."""
    async with calling(deepgram, tmp_path / "order.py", ORDER) as (phone, twilio):
        for number, keys in {1: "12#", 2: "2", 3: "47#", 4: "1"}.items():
            await phone.until_returned(number)
            for key in keys:
                await phone.press(key)
        assert await phone.until_closed() == 1000
    question = "Type your order number, then the pound key."
    read_back = "You typed {}. Press 1 if that is right."
    end = "Thank you. Order 4, 7 will be with you tomorrow."
    texts = [question, read_back.format("1, 2"), question, read_back.format("4, 7"), end]
    assert phone.received == said(*texts)
    assert list(twilio.twiml.values()) == [HANGUP]


@pytest.mark.parametrize("source", [MENU, ORDER])
def test_script_files(tmp_path: Path, source: str) -> None:
    """A script file has the module's --help and exit statuses."""
    (tmp_path / "script.py").write_text(source, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, check=True)
    assert b"usage: script.py" in done.stdout
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"DEEPGRAM_API_KEY is neither set nor in ")


def test_script_in_a_directory(tmp_path: Path) -> None:
    """A script in a directory of its own finds the module with PYTHONPATH, and not without."""
    (tmp_path / "menu.py").write_text(MENU, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "menu.py"), "--help"]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True)
    assert b"ModuleNotFoundError: No module named 'twilio_aura'" in done.stderr
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, check=True)


# The tables, links and files


def test_tour() -> None:
    """The parts stand in the module in the order of the tour."""
    _, tour = README.split("from top to bottom:")
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", tour, re.MULTILINE)))
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
    ):
        assert f'"{reason}"' in SOURCE
        outcomes.append(("1011", reason))
    for code, outcome in outcomes:
        text = outcome.format(**vars(twilio_aura))
        row = next(row for row in README.splitlines() if row.startswith("|") and text in row)
        assert code in row or outcome in ("hung up", "the proxy closed it (1001)")


def test_what_a_script_has() -> None:
    """The table of what a script may use has all of it, and nothing else."""
    table = README.split("| a script has | |")[1].split("\n\n")[0]
    names = set(re.findall(r"`(?:await )?call\.(\w+)", table))
    public = {name for name in dir(twilio_aura.Call) if not name.startswith("_")}
    of_the_server = {"serve", "drain", "end"}
    attributes = {"settings", "sid", "parameters", "model", "close_after_speech"}
    assert names == public - of_the_server | attributes


def test_deployment() -> None:
    """The time systemd and Docker give a stop is more than DRAIN_SECONDS; the files are here."""
    drain_seconds = twilio_aura.Settings.drain_seconds
    stops = re.findall(r"(?:TimeoutStopSec=|--stop-timeout )(\d+)", README)
    assert len(stops) == 2
    assert all(int(seconds) > drain_seconds for seconds in stops)
    for copied in re.findall(r"^COPY (\S+) ", blocks("dockerfile")[0], re.MULTILINE):
        assert (ROOT / copied).is_file()


def test_links() -> None:
    """What is linked to in the repository is there; what is folded can be opened."""
    for target in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / target).exists()
    assert README.count("<details>") == README.count("</details>") == README.count("<summary>")


async def test_limits_of_a_handshake(deepgram: Deepgram) -> None:
    """With the limits of the unit and the container, a head too large for Twilio is rejected."""
    for block in (*blocks("ini"), *blocks("dockerfile")):
        (line,) = re.findall(r"\bWEBSOCKETS_.*", block)
        limits = dict(limit.split("=") for limit in line.split())
        async with Server({"DEEPGRAM_URL": deepgram.url, **limits}) as server:
            async with dial(server.url) as phone:
                await phone.until_heard(noise(GREETING))
            for headers in ({f"X-{n}": "x" for n in range(64)}, {"X": "x" * 2048}):
                with pytest.raises((InvalidStatus, InvalidMessage)):  # websockets 15 just closes
                    await dial(server.url, headers=headers).__aenter__()
