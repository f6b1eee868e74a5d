"""The demo, run as a user runs it, with scripts of a user's own."""

import asyncio
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from streamdouble import g711
from streamdouble.audio import load_wav

import twilio_aura
from tests.standins.deepgram import KEY, Answer, Deepgram, noise, said
from tests.standins.process import environment

SCRIPT = """
import asyncio
import os
import sys
import time
import twilio_aura

async def script(call):
    {body}

if __name__ == "__main__":
    sys.exit(twilio_aura.main(script))
"""
RETURNED = "caller hangs up: the script has returned"


async def run(*command: str, cwd: Path, **settings: str) -> asyncio.subprocess.Process:
    """Start Python with this command, and without settings but these."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, *command),
        cwd=cwd,
        env=environment(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def demo(cwd: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run the demo in `cwd`; return its exit status, output and error output."""
    process = await run("-m", "tests.demo", *arguments, cwd=cwd, **settings)
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def write(body: str, file: Path) -> str:
    """Write a script, of which this is the body, into `file`; return the file's name."""
    file.write_text(SCRIPT.format(body=body.strip().replace("\n", "\n    ")))
    return str(file)


class User:
    """Someone who has a key for Deepgram, and writes scripts in a directory."""

    def __init__(self, directory: Path, deepgram: Deepgram) -> None:
        self.directory = directory
        self.settings = {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}

    async def tries(self, body: str, *arguments: str) -> tuple[int, str, str]:
        """Run the demo of a script; return its exit status, output and error output."""
        file = write(body, self.directory / "script.py")
        arguments = "--fast", "--script", file, *arguments
        return await demo(self.directory, *arguments, **self.settings)

    async def hears(self, body: str, *arguments: str) -> list[str]:
        """Return what is printed of a call that succeeds, without the times."""
        status, output, errors = await self.tries(body, *arguments)
        assert (status, errors) == (0, "")
        lines = re.sub("^ +[0-9.]+ s  ", "", output, flags=re.MULTILINE).split("\n")
        assert lines[0].startswith("Deepgram: http://127.0.0.1:")
        return [line for line in lines[1:] if line]

    async def fails(self, body: str, *arguments: str) -> str:
        """Return why a call fails."""
        status, _, errors = await self.tries(body, *arguments)
        assert status == 1
        _, is_said, why = errors.partition("\nThe caller did not hear everything: ")
        assert is_said
        assert self.settings["DEEPGRAM_API_KEY"] not in why
        return why

    def assert_recorded(self, *texts: str) -> None:
        """Check that the recording has these texts, byte for byte."""
        heard = g711.decode(said(*texts))
        assert np.array_equal(recording(self.directory), heard)


@pytest.fixture
def user(tmp_path: Path, deepgram: Deepgram) -> User:
    """Return a user."""
    return User(tmp_path, deepgram)


def recording(directory: Path) -> np.ndarray:
    """Return the samples of call.wav, which is mono, and for a telephone."""
    samples, rate = load_wav(directory / "call.wav")
    assert (rate, samples.shape[1]) == (8000, 1)
    return samples[:, 0]


def heard(text: str, model: str = "aura-asteria-en") -> str:
    """Return the line that says that the whole of `text` was heard."""
    return f'caller hears: "{text}" {len(noise(text, model)) / 8000:.1f} s'


def all_heard(*texts: str) -> str:
    """Return the last line, if the whole of these texts was heard."""
    seconds = sum(map(len, map(noise, texts))) / 8000
    return f"The caller heard all {seconds:.1f} s: listen to call.wav."


# Scripts


async def test_script_that_takes_its_time(user: User) -> None:
    """A script that looks something up between its texts is heard to its end, however long."""
    body = """
yield "One."
print("looking up")
await asyncio.sleep(2.5)
yield "Two."
await asyncio.sleep(1.2)
yield "Three."
"""
    texts = "One.", "Two.", "Three."
    one, two, three = map(heard, texts)
    lines = await user.hears(body)
    assert lines == [one, "looking up", two, three, RETURNED, all_heard(*texts)]
    user.assert_recorded(*texts)


@pytest.mark.parametrize("keys", ["", "5"])
async def test_another_task_waits(user: User, keys: str) -> None:
    """A script that says more while another of its tasks waits for a key is heard to its end."""
    body = """
waiting = asyncio.create_task(call.digit())
for text in "One.", "Two.":
    yield text
    await asyncio.sleep(1.2)
waiting.cancel()
yield "Three."
"""
    lines = await user.hears(body, "--keys", keys)
    presses = [f"caller presses {key}" for key in keys]
    assert lines[:-1] == [heard("One."), *presses, heard("Two."), heard("Three."), RETURNED]


@pytest.mark.parametrize("seconds", [None, 0.2])
async def test_nothing_but_another_task_waits(user: User, seconds: float | None) -> None:
    """A script of which only another task waits is hung up on in the end; that is a success."""
    body = f"""
async def listen():
    while True:
        await call.digit({seconds})
yield "One."
await asyncio.create_task(listen())
"""
    lines = await user.hears(body, "--patience", "2")
    hangs_up = "caller hangs up: for 2 s the script has only waited for a key"
    assert lines == [heard("One."), hangs_up, all_heard("One.")]


async def test_text_that_is_being_written(user: User) -> None:
    """A text that is spoken while it is written is printed as a whole; an empty one is as well."""
    body = """
async def answer():
    for part in "This is\\n written,", None, " word by word.", " Slowly.":
        await asyncio.sleep(0.1)
        yield part
yield answer()
yield ""
"""
    pieces = "This is", "written, word by word.", "Slowly."
    seconds = sum(map(len, map(noise, pieces))) / 8000
    assert await user.hears(body) == [
        f'caller hears: "This is written, word by word. Slowly." {seconds:.1f} s',
        'caller hears: "" 0.0 s',
        RETURNED,
        all_heard(*pieces),
    ]


async def test_silent_script(user: User) -> None:
    """A script that says nothing is a success, and leaves no recording, nor destroys an older."""
    (user.directory / "call.wav").write_bytes(b"older")
    lines = await user.hears("for text in []:\n    yield text")
    assert lines == [RETURNED, "Nothing was said, so there is no recording."]
    assert (user.directory / "call.wav").read_bytes() == b"older"


async def test_modules_beside_the_script(user: User) -> None:
    """A script may import what is beside it, wherever the demo is run."""
    (user.directory / "shop").mkdir()
    (user.directory / "shop" / "prices.py").write_text("APPLE = 'An apple is one euro.'\n")
    file = write("import prices\nyield prices.APPLE", user.directory / "shop" / "shop.py")
    status, _, errors = await demo(user.directory, "--fast", "--script", file, **user.settings)
    assert (status, errors) == (0, "")
    user.assert_recorded("An apple is one euro.")


# Keys


MENU = """
yield "Press a key."
while (key := await call.digit()) != "#":
    yield f"You pressed {key}."
yield "Bye."
"""


@pytest.mark.parametrize("keys", ["1,2,#", "12#"])
async def test_keys(user: User, keys: str) -> None:
    """Keys are pressed in turn, each when the script waits for one."""
    texts = "Press a key.", "You pressed 1.", "You pressed 2.", "Bye."
    assert await user.hears(MENU, "--keys", keys) == [
        heard("Press a key."),
        "caller presses 1",
        heard("You pressed 1."),
        "caller presses 2",
        heard("You pressed 2."),
        "caller presses #",
        heard("Bye."),
        RETURNED,
        all_heard(*texts),
    ]
    user.assert_recorded(*texts)


async def test_no_keys_left(user: User) -> None:
    """Where the script waits for a key, and there is none, the caller hangs up."""
    lines = await user.hears(MENU, "--keys", "1")
    hangs_up = "caller hangs up: the script waits for a key, and none is left in --keys"
    assert lines[-3:-1] == [heard("You pressed 1."), hangs_up]


async def test_keys_left(user: User) -> None:
    """Keys that the script did not wait for are named."""
    lines = await user.hears(MENU, "--keys", "#,1,w")
    assert lines[-2] == f"{RETURNED}; not pressed: 1,w"


async def test_two_tasks_wait(user: User) -> None:
    """Where two tasks wait for a key, each gets one."""
    body = """
waiting = [asyncio.create_task(call.digit()) for _ in range(2)]
yield "Press two keys."
yield " and ".join([await task for task in waiting])
"""
    lines = await user.hears(body, "--keys", "4,5")
    presses = ["caller presses 4", "caller presses 5"]
    assert lines[:-2] == [heard("Press two keys."), *presses, heard("4 and 5")]


async def test_key_during_speech(tmp_path: Path) -> None:
    """A key after a + cuts off the text of which some has been heard; the next is awaited."""
    body = """
yield "A long text."
yield f"You pressed {await call.digit()}."
yield f"And {await call.digit()}."
"""
    long = noise("long") * 200
    async with Deepgram() as deepgram:
        deepgram.answer("A long text.", Answer(audio=long))
        lines = await User(tmp_path, deepgram).hears(body, "--keys", "+5,6")
    assert lines[:-1] == [
        "caller presses 5",
        'caller hears only the beginning of: "A long text."',
        heard("You pressed 5."),
        "caller presses 6",
        heard("And 6."),
        RETURNED,
    ]
    assert lines[-1].endswith("all but what was cut off: listen to call.wav.")
    rest = g711.decode(noise("You pressed 5.") + noise("And 6."))
    samples = recording(tmp_path)
    beginning = samples[: -len(rest)]
    assert 160 <= len(beginning) < len(long)
    assert np.array_equal(beginning, g711.decode(long[: len(beginning)]))
    assert np.array_equal(samples[-len(rest) :], rest)


TIMES_OUT = """
while (key := await call.digit(0.5)) != "#":
    yield f"You pressed {key or 'nothing'}."
"""


async def test_pause(user: User) -> None:
    """At a w nothing is pressed, until the script's time-out; the next key is awaited again."""
    lines = await user.hears(TIMES_OUT, "--keys", "w,w,#")
    nothing = ["caller presses nothing", heard("You pressed nothing.")]
    assert lines[:-1] == [*nothing, *nothing, "caller presses #", RETURNED]


async def test_pause_until_speech(user: User) -> None:
    """Before a key during speech nothing is pressed either, where the script waits for one."""
    lines = await user.hears(TIMES_OUT, "--keys", "+5,#")
    assert lines[0] == "caller presses nothing"
    presses = [line for line in lines if re.match("caller presses .$", line)]
    assert presses == ["caller presses 5", "caller presses #"]
    assert lines[-2] == RETURNED


async def test_key_on_its_way(user: User) -> None:
    """While a key is on its way to a script, which is busy, the caller does nothing else."""
    body = """
async def block():
    for _ in range(3):
        print("tick", flush=True)
        time.sleep(0.2)
blocking = asyncio.create_task(block())
yield await call.digit()
yield await call.digit()
"""
    lines = await user.hears(body, "--keys", "1,2")
    told = [line for line in lines if line != "tick"]
    assert told[:-1] == ["caller presses 1", heard("1"), "caller presses 2", heard("2"), RETURNED]


async def test_patience(user: User, deepgram: Deepgram) -> None:
    """A script that waits for longer than the patience, or for its speech, may do so."""
    deepgram.answer("A slow text.", Answer(delay_seconds=2.5))
    body = "await call.digit(2.5)\nyield 'A slow text.'"
    lines = await user.hears(body, "--keys", "w", "--patience", "2")
    assert lines[:-1] == ["caller presses nothing", heard("A slow text."), RETURNED]


async def test_time_out_of_the_scripts_own(user: User) -> None:
    """A time-out around the wait for a key is one as well."""
    body = """
try:
    await asyncio.wait_for(call.digit(), 0.5)
except TimeoutError:
    yield "Too late."
"""
    lines = await user.hears(body, "--keys", "w")
    assert lines[:-1] == ["caller presses nothing", heard("Too late."), RETURNED]


@pytest.mark.parametrize("key", ["w", "+5"])
async def test_key_that_would_never_come(user: User, key: str) -> None:
    """Where a w or a + would wait for ever, since there is no time-out, a sentence says so."""
    assert await user.fails("yield await call.digit()", "--keys", key, "--patience", "2") == (
        f"{key} in --keys would never end: the script waits for a key, and has no time-out "
        "within 2 s\n"
    )


# Ends


DIAL = "<Response><Dial>+15550100</Dial></Response>"


@pytest.mark.parametrize(
    ("end", "twiml"),
    [("hang_up()", "<Response><Hangup/></Response>"), (f"redirect('{DIAL}')", DIAL)],
)
async def test_script_that_ends_the_call(user: User, end: str, twiml: str) -> None:
    """A script that hangs up or redirects the call succeeds, and its TwiML is printed."""
    lines = await user.hears(f"yield 'One.'\nawait call.{end}\nyield 'Never.'")
    assert lines == [heard("One."), f"script ends the call with {twiml}", all_heard("One.")]
    user.assert_recorded("One.")


async def test_redirect_that_is_rejected(user: User) -> None:
    """TwiML that Twilio would reject is a failure, which the server's log explains."""
    why = await user.fails("yield 'One.'\nawait call.redirect('<Hangup/>')")
    assert why.startswith("the call ended: 1000 not redirected. ")
    assert "Twilio did not redirect it (400 " in why


async def test_script_that_fails(user: User) -> None:
    """A script that raises is a failure, with the line that raised; what was heard is kept."""
    why = await user.fails("yield 'One.'\nyield str(1 / 0)")
    assert why.startswith("the call ended: 1011 the script failed. ")
    assert "yield str(1 / 0)" in why
    assert "ZeroDivisionError" in why
    user.assert_recorded("One.")


@pytest.mark.parametrize("hanging", ["asyncio.sleep(3600)", "call.digit(0)"])
async def test_script_that_hangs(user: User, hanging: str) -> None:
    """A script that does nothing for too long is a failure, which one sentence explains."""
    body = f"yield 'One.'\nwhile True:\n    await {hanging}\n    await asyncio.sleep(0.1)"
    why = await user.fails(body, "--patience", "2")
    assert why == "for 2 s the script neither said anything nor waited for a key\n"
    user.assert_recorded("One.")


async def test_speech_cut_short(user: User, deepgram: Deepgram) -> None:
    """When Deepgram closes mid-response, what was heard is kept, and it is not a success."""
    audio = noise("cut short")
    deepgram.answer("cut short", Answer(audio=audio, stop_after=2000))
    why = await user.fails("yield call.parameters['text']", "--text", "cut short")
    assert why.startswith("the call ended: 1011 ")
    assert "Deepgram" in why
    assert np.array_equal(recording(user.directory), g711.decode(audio[:2000]))


# Settings


OF_THE_DEMO = {"HOST", "PORT", "TLS_CERT", "TLS_KEY", "TWILIO_AUTH_TOKEN"}
VALUES = {
    "DEEPGRAM_MODEL": "aura-2-lara-de",
    "DEEPGRAM_OPTIONS": "speed=0.9",
    "DEEPGRAM_CONCURRENCY": "3",
    "GREETING": "Guten Tag.",
    "CLOSE_AFTER_SPEECH": "True",
    "CACHE_MB": "1",
    "PUBLIC_URL": "https://voice.example.com",
    "MAX_CALLS": "7",
    "DRAIN_SECONDS": "3",
    "LOG_LEVEL": "ERROR",
}


@pytest.mark.parametrize("in_dotenv", [True, False])
async def test_settings(user: User, in_dotenv: bool) -> None:
    """Every setting, and a variable of the script's own, reaches it from .env or environment."""
    assert {*user.settings, *VALUES, *OF_THE_DEMO} == set(twilio_aura.SETTINGS)
    user.settings |= VALUES
    user.settings |= {"SHOP": "the corner shop", "TWILIO_AUTH_TOKEN": "of-a-real-account"}
    user.settings |= {"http_proxy": "http://127.0.0.1:9"}  # not for the stand-ins
    if in_dotenv:
        dotenv = "".join(f"{name}='{value}'\n" for name, value in user.settings.items())
        (user.directory / ".env").write_text(dotenv + "PORT=1\nTLS_CERT=nowhere.pem\n")
        user.settings = {}
    body = """
for name in twilio_aura.SETTINGS:
    print(f"{name}={getattr(call.settings, name.lower())}")
print("SHOP=" + os.environ["SHOP"], "in", os.getcwd())
yield "That is all."
"""
    lines = await user.hears(body)
    for name, value in VALUES.items():
        assert f"{name}={value}" in lines
    assert f"SHOP=the corner shop in {user.directory}" in lines
    assert "of-a-real-account" not in "".join(lines)
    # DEEPGRAM_MODEL and CLOSE_AFTER_SPEECH, as the caller notices them.
    end = [heard("That is all.", "aura-2-lara-de"), "server ends the call: 1000 completed"]
    assert lines[-3:-1] == end


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DEEPGRAM_API_KEY", "a-wrong-key", "Deepgram answered 401: "),
        ("DEEPGRAM_URL", "nonsense", "the server did not start: DEEPGRAM_URL must be a URL"),
    ],
)
async def test_wrong_setting(user: User, name: str, value: str, why: str) -> None:
    """A setting that is wrong is told in the server's own words."""
    user.settings[name] = value
    errors = await user.fails("yield 'One.'")
    assert why in errors
    assert "Traceback" not in errors


# The command line


async def test_verbose(user: User) -> None:
    """With --verbose, and not without, Twilio's messages are printed as well."""
    terse = await user.hears("yield 'One.'")
    lines = await user.hears("yield 'One.'", "--verbose")
    assert [line for line in lines if not line.startswith(("Twilio: ", "server: "))] == terse
    for message in ("Twilio: connected", "Twilio: start", "server: media", "server: mark"):
        sender, _, event = message.partition(" ")
        assert [line for line in lines if line.startswith(f'{sender} {{"event": "{event}"')]
    assert max(map(len, lines)) < 500  # without the sound


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--script", "nowhere.py", "there is no file 'nowhere.py'"),
        ("--out", "nowhere/call.wav", "'nowhere/call.wav' cannot be written"),
        ("--out", ".", "'.' cannot be written"),
        ("--keys", "1,x", "'1,x' is not like 1,+2,w,# (see --help)"),
        ("--keys", "1,+w", "'1,+w' is not like 1,+2,w,# (see --help)"),
    ],
)
async def test_wrong_option(tmp_path: Path, option: str, value: str, said: str) -> None:
    """What is wrong is said in one line, before a call is placed for nothing."""
    status, output, errors = await demo(tmp_path, option, value)
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1].endswith(said)
