"""The demo: what it prints and records of a call, and how it plays the caller's part."""

import asyncio
import json
import os
import re
import signal
import sys
import time
import wave
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

import twilio_aura
from tests import demo
from tests.standins.deepgram import GREETING, KEY, Answer, Deepgram, noise, said
from tests.standins.observed import TELLS
from tests.standins.process import PROXY_VARIABLES, ROOT, Server, environment
from tests.standins.telephone import Telephone
from tests.standins.twilio import TOKEN, TwilioApi
from tests.standins.voice import LINEAR
from twilio_aura import Call

SCRIPTS = Path(__file__).with_name("scripts")
RETURNED = "caller hangs up: the script has returned"
UNHURRIED = {"BLOCKED_SECONDS": 1000.0, "DUMP_SECONDS": 1000.0}  # the machine may stand still


class User:
    """Someone who has a key for Deepgram, and runs the demo in a directory."""

    def __init__(self, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.capture = capture

    async def tries(
        self, script: Callable[..., object] | None, *arguments: str
    ) -> tuple[int, str, str]:
        """Run the demo of a script; return its exit status, output and error output."""
        self.capture.readouterr()
        status = await demo.run(["--fast", *arguments], script, **UNHURRIED)
        return status, *self.capture.readouterr()

    async def hears(self, script: Callable[..., object] | None, *arguments: str) -> list[str]:
        """Return what is printed of a call that succeeds, without the times."""
        status, output, errors = await self.tries(script, *arguments)
        assert (status, errors) == (0, "")
        lines = re.sub("^ +[0-9.]+ s  ", "", output, flags=re.MULTILINE).split("\n")
        assert lines[0].startswith("Deepgram: http://127.0.0.1:")
        return [line for line in lines[1:] if line]

    async def fails(self, script: Callable[..., object] | None, *arguments: str) -> str:
        """Return why a call fails: the sentence, and before it what the server has logged."""
        status, _, errors = await self.tries(script, *arguments)
        assert status == 1
        assert KEY not in errors
        log, is_said, why = errors.rpartition("\nThe caller did not hear everything: ")
        assert is_said
        return why.rstrip("\n") + "\n" + log

    def recording(self) -> list[int]:
        """Return the samples of call.wav, which is mono, and for a telephone."""
        with wave.open(str(self.directory / "call.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
            return array("h", file.readframes(file.getnframes())).tolist()

    def assert_recorded(self, *texts: str) -> None:
        """Check that the recording has these texts, byte for byte."""
        assert self.recording() == decoded(said(*texts))


@pytest.fixture
def user(
    tmp_path: Path,
    deepgram: Deepgram,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> User:
    """Return a user, with no settings but the key and where Deepgram is."""
    for name in (*twilio_aura.SETTINGS, *PROXY_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEEPGRAM_API_KEY", KEY)
    monkeypatch.setenv("DEEPGRAM_URL", deepgram.url)
    monkeypatch.chdir(tmp_path)
    return User(tmp_path, capsys)


def decoded(mulaw: bytes) -> list[int]:
    """Return `mulaw` as samples."""
    return [LINEAR[code] for code in mulaw]


def heard(text: str, model: str = "aura-asteria-en") -> str:
    """Return the line that says that the whole of `text` was heard."""
    return f'caller hears: "{text}" {len(noise(text, model)) / 8000:.1f} s'


def all_heard(*texts: str) -> str:
    """Return the last line, if the whole of these texts was heard."""
    return f"The caller heard all {len(said(*texts)) / 8000:.1f} s: listen to call.wav."


# Scripts


async def takes_its_time(call: Call) -> None:
    await call.say("One.")
    print("looking up")
    await asyncio.sleep(0.5)
    await call.say("Two.")


async def test_script_that_takes_its_time(user: User) -> None:
    """A script that looks something up between its texts is heard to its end."""
    assert await user.hears(takes_its_time) == [
        heard("One."),
        "looking up",
        heard("Two."),
        RETURNED,
        all_heard("One.", "Two."),
    ]
    user.assert_recorded("One.", "Two.")


async def says_after_a_pause(call: Call) -> None:
    await call.say("First.")
    await asyncio.sleep(0.5)
    await call.say("Second.")


async def test_times_and_pauses(user: User, deepgram: Deepgram) -> None:
    """A text's time is when it began, and the recording has the pauses as the caller heard them."""
    clips = [noise(text) + noise(text) for text in ("First.", "Second.")]
    first, second = (clip[: twilio_aura.MAX_CHUNK_BYTES] for clip in clips)  # sent as a whole
    deepgram.answer("First.", Answer(audio=first, write_sizes=[len(first)]))
    deepgram.answer("Second.", Answer(audio=second, write_sizes=[len(second)]))
    assert await demo.run([], says_after_a_pause, **UNHURRIED) == 0
    output, _ = user.capture.readouterr()
    began, began_again, ended = map(float, re.findall(r"^ +([0-9.]+) s  ", output, re.MULTILINE))
    seconds = len(first) / 8000
    assert began_again - began >= seconds + 0.5 - 0.1  # since these are rounded
    assert ended - began_again >= seconds - 0.1
    samples = user.recording()
    silence = next(position for position, sample in enumerate(samples) if sample)
    assert samples[silence:][: len(first)] == decoded(first)
    pause = samples[silence + len(first) : -len(second)]
    assert len(pause) >= 0.5 * 8000
    assert not any(pause)
    assert samples[-len(second) :] == decoded(second)


async def speaks_beside_a_wait(call: Call) -> None:
    waiting = asyncio.create_task(call.digit())
    await call.say("One.")
    await asyncio.sleep(0.5)
    await call.say("Two.")
    waiting.cancel()


async def test_another_task_waits(user: User) -> None:
    """A script that says more while another of its tasks waits for a key is heard to its end."""
    lines = await user.hears(speaks_beside_a_wait)
    assert lines[:-1] == [heard("One."), heard("Two."), RETURNED]


async def only_listens(call: Call) -> None:
    async def listen() -> None:
        while True:
            await call.digit(0.2)

    await call.say("One.")
    await asyncio.create_task(listen())


async def test_nothing_but_another_task_waits(user: User) -> None:
    """A script of which only another task waits is hung up on in the end; that is a success."""
    lines = await user.hears(only_listens, "--patience", "1")
    hangs_up = "caller hangs up: for 1 s the script has only waited for a key"
    assert lines == [heard("One."), hangs_up, all_heard("One.")]


async def writes(call: Call) -> None:
    async def answer() -> AsyncIterator[str | None]:
        for part in "This is\n written,", None, " word by word.", " Slowly, and then no more.":
            await asyncio.sleep(0)
            yield part

    await call.say(answer())


async def test_text_that_is_being_written(user: User, deepgram: Deepgram) -> None:
    """A text that is spoken while it is written is printed as a whole, and spoken as it is."""
    text = "This is written, word by word. Slowly, and then no more."
    before = len(deepgram.requests)
    (line, *_) = await user.hears(writes)
    assert line.startswith(f'caller hears: "{text}" ')
    pieces = [asked.text for asked in deepgram.requests[before:] if asked.text != GREETING]
    # The piece that is requested ahead may overtake the one before it.
    assert sorted(" ".join(pieces).split()) == sorted(text.split())


async def says_two_at_once(call: Call) -> None:
    await asyncio.gather(call.say("One."), call.say("Two."))


async def test_two_texts_at_once(user: User) -> None:
    """Of two texts that are said at once, one waits for its turn."""
    lines = await user.hears(says_two_at_once)
    assert lines[:-1] == [heard("One."), heard("Two."), RETURNED]


async def breaks_off(call: Call) -> None:
    try:
        await asyncio.wait_for(call.say("A text that never comes."), 0.2)
    except TimeoutError:
        await call.say("Sorry.")


async def test_text_that_the_script_breaks_off(user: User, deepgram: Deepgram) -> None:
    """A text that the script does not wait for is said not to be heard."""
    deepgram.answer("A text that never comes.", Answer(delay_seconds=1000))
    lines = await user.hears(breaks_off)
    not_heard = 'caller does not hear: "A text that never comes."'
    assert lines[:-1] == [not_heard, heard("Sorry."), RETURNED]


async def says_nothing(_call: Call) -> None:
    pass


async def test_silent_script(user: User) -> None:
    """A script that says nothing is a success, and leaves no recording, nor destroys an older."""
    (user.directory / "call.wav").write_bytes(b"older")
    lines = await user.hears(says_nothing)
    assert lines == [RETURNED, "Nothing was said, so there is no recording."]
    assert (user.directory / "call.wav").read_bytes() == b"older"


async def says_parameters(call: Call) -> None:
    name, text, of = (call.parameters[name] for name in ("name", "text", "of"))
    await call.say(f"{name} has {text} of {of}.")


async def test_parameters(user: User) -> None:
    """The script gets the parameters of the TwiML, of which text and model are two."""
    options = "--param", "name=Ann", "--param", "of=a=b", "--text", "a cat", "--model", "aura-x-en"
    lines = await user.hears(says_parameters, *options)
    assert lines[0] == heard("Ann has a cat of a=b.", "aura-x-en")


async def test_file(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is run as Python runs it: what is beside it can be imported, wherever the demo is."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    apple = "An apple is one euro."
    lines = await user.hears(None, "--script", str(SCRIPTS / "shop.py"))
    assert lines == ["opening the shop", heard(apple), RETURNED, all_heard(apple)]


async def test_file_that_serves_nothing(user: User) -> None:
    """Of a file that does not call `main`, it is said that it has to."""
    why = await user.fails(None, "--script", str(SCRIPTS / "serves_nothing.py"))
    assert why == "the server did not start: its file has to call twilio_aura.main(script)\n"


async def test_variable_of_dotenv(user: User) -> None:
    """What is only in .env is missing while a script's file is imported, as without the demo."""
    (user.directory / ".env").write_text("SHOP=the corner shop\n")
    why = await user.fails(None, "--script", str(SCRIPTS / "reads_too_early.py"))
    assert why.startswith("the server did not start: see above\n")
    assert "KeyError: 'SHOP'" in why


# Keys


async def repeats_keys(call: Call) -> None:
    await call.say("Press a key.")
    while (key := await call.digit()) != "#":
        await call.say(f"You pressed {key}.")
    await call.say("Bye.")


async def test_keys(user: User) -> None:
    """Keys are pressed in turn, each when the script waits for one."""
    texts = "Press a key.", "You pressed 1.", "You pressed 2.", "Bye."
    assert await user.hears(repeats_keys, "--keys", "1,2,#") == [
        heard("Press a key."),
        "caller presses 1",
        'script gets "1"',
        heard("You pressed 1."),
        "caller presses 2",
        'script gets "2"',
        heard("You pressed 2."),
        "caller presses #",
        'script gets "#"',
        heard("Bye."),
        RETURNED,
        all_heard(*texts),
    ]
    user.assert_recorded(*texts)


async def test_no_keys_left(user: User) -> None:
    """Where the script waits for a key, and there is none, the caller hangs up."""
    lines = await user.hears(repeats_keys, "--keys", "1")
    hangs_up = "caller hangs up: the script waits for a key, and none is left in --keys"
    assert lines[-3:-1] == [heard("You pressed 1."), hangs_up]


async def test_keys_left(user: User) -> None:
    """Keys that the script did not wait for are named."""
    lines = await user.hears(repeats_keys, "--keys", "#,1,w")
    assert lines[-2] == f"{RETURNED}; not pressed: 1,w"


async def asks(call: Call) -> None:
    await call.say("Welcome.", interruptible=False)
    number = await call.ask("Your number?", 4, seconds=1000)
    await call.say(f"It is {number}.")


async def test_question(user: User) -> None:
    """Where the script asks for several keys, what it gets is one line."""
    assert await user.hears(asks, "--keys", "12#") == [
        heard("Welcome."),
        heard("Your number?"),
        *(f"caller presses {key}" for key in "12#"),
        'script gets "12"',
        heard("It is 12."),
        RETURNED,
        all_heard("Welcome.", "Your number?", "It is 12."),
    ]


async def test_keys_typed_ahead(user: User) -> None:
    """A key after an @ is pressed at once, whether or not the script waits for one."""
    told = await user.hears(asks, "--keys", "@1@2#")
    texts = [line for line in told if line.startswith("caller hears")]
    assert texts == [heard("Welcome."), heard("It is 12.")]
    presses = [line for line in told if line.startswith("caller presses")]
    assert presses == [f"caller presses {key}" for key in "12#"]


async def waits_in_two_tasks(call: Call) -> None:
    waiting = [asyncio.create_task(call.digit()) for _ in range(2)]
    await call.say("Press two keys.")
    await call.say(" and ".join([await task for task in waiting]))


async def test_two_tasks_wait(user: User) -> None:
    """Where two tasks wait for a key, each gets one."""
    lines = await user.hears(waits_in_two_tasks, "--keys", "4,5")
    pressed = [line for key in "45" for line in (f"caller presses {key}", f'script gets "{key}"')]
    assert lines[:-1] == [heard("Press two keys."), *pressed, heard("4 and 5"), RETURNED]


async def speaks_long(call: Call) -> None:
    await call.say("A long text.")
    await call.say(f"You pressed {await call.digit()}.", interruptible=False)
    await call.say(f"And {await call.digit()}.")


async def test_keys_during_speech(user: User, deepgram: Deepgram) -> None:
    """A key after a + is pressed when some of the text was heard, and cuts it off, if it may."""
    long = noise("long") * 200
    deepgram.answer("A long text.", Answer(audio=long))
    lines = await user.hears(speaks_long, "--keys", "+5,+6,7")
    assert lines[:-1] == [
        'caller hears only the beginning of: "A long text."',
        "caller presses 5",
        'script gets "5"',
        heard("You pressed 5."),
        "caller presses 6",
        'script gets "6"',
        heard("And 6."),
        f"{RETURNED}; not pressed: 7",
    ]
    assert lines[-1].endswith("but not all that was to be said: listen to call.wav.")


async def times_out(call: Call) -> None:
    for seconds in 0.3, 0.3, None:
        await call.say(f"You pressed {await call.digit(seconds) or 'nothing'}.")


async def test_pause(user: User) -> None:
    """At a w nothing is pressed, until the script's time-out; the next key is awaited again."""
    lines = await user.hears(times_out, "--keys", "w,w,#")
    nothing = ["caller presses nothing", heard("You pressed nothing.")]
    pressed = ["caller presses #", 'script gets "#"', heard("You pressed #."), RETURNED]
    assert lines[:-1] == [*nothing, *nothing, *pressed]


async def test_pause_that_is_over(user: User) -> None:
    """A time-out uses up a w also where it is over before the demo has noticed the wait."""
    told = [
        {"event": "waits", "sent": 0, "wait": 1, "seconds": 0.1, "goes_on": False},
        {"event": "waited", "sent": 0, "wait": 1, "key": "", "gets": ""},
    ]
    output = "".join(f"{TELLS}{json.dumps(event)}\n" for event in told)
    server: Any = SimpleNamespace(output=output)
    caller = demo.FollowingCaller(demo.parse(["--keys", "w,1"]), server, TwilioApi())
    await caller.follow()
    assert caller.keys == ["1"]
    assert "caller presses nothing\n" in user.capture.readouterr().out


async def times_out_before_speech(call: Call) -> None:
    await call.digit(0.3)
    await call.say("Press now.", interruptible=False)
    await call.digit()


async def test_pause_until_speech(user: User) -> None:
    """Before a key during speech nothing is pressed either, where the script waits for one."""
    lines = await user.hears(times_out_before_speech, "--keys", "+5")
    pressed = ["caller presses 5", 'script gets "5"']
    assert lines[:-1] == ["caller presses nothing", heard("Press now."), *pressed, RETURNED]


async def is_busy(call: Call) -> None:
    async def block() -> None:
        for _ in range(3):
            print("tick", flush=True)
            time.sleep(0.2)  # noqa: ASYNC251 - it shall block

    blocking = asyncio.create_task(block())
    await call.say(await call.digit())
    await call.say(await call.digit())
    await blocking


async def test_key_on_its_way(user: User) -> None:
    """While a key is on its way to a script, which is busy, the caller does nothing else."""
    lines = await user.hears(is_busy, "--keys", "1,2")
    told = [line for line in lines if line != "tick"]
    assert told[:-1] == [
        line
        for key in "12"
        for line in (f"caller presses {key}", f'script gets "{key}"', heard(key))
    ] + [RETURNED]


async def waits_long(call: Call) -> None:
    await call.digit(1.5)
    await call.say("A slow text.")


async def test_patience(user: User, deepgram: Deepgram) -> None:
    """A script that waits for longer than the patience, or for its speech, may do so."""
    deepgram.answer("A slow text.", Answer(delay_seconds=1.5))
    lines = await user.hears(waits_long, "--keys", "w", "--patience", "1")
    assert lines[:-1] == ["caller presses nothing", heard("A slow text."), RETURNED]


async def has_its_own_time_out(call: Call) -> None:
    try:
        await asyncio.wait_for(call.digit(), 0.5)
    except TimeoutError:
        await call.say("Too late.")


async def test_time_out_of_the_scripts_own(user: User) -> None:
    """A time-out around the wait for a key is one as well."""
    lines = await user.hears(has_its_own_time_out, "--keys", "w")
    assert lines[:-1] == ["caller presses nothing", heard("Too late."), RETURNED]


async def only_waits(call: Call) -> None:
    await call.digit()


async def test_key_that_would_never_come(user: User) -> None:
    """Where a w or a + would wait for ever, since there is no time-out, a sentence says so."""
    assert await user.fails(only_waits, "--keys", "+5", "--patience", "1") == (
        "+5 in --keys would never end: the script waits for a key, and has no time-out within 1 s\n"
    )


# Ends


async def hangs_up(call: Call) -> None:
    await call.say("One.")
    await call.hang_up()
    await call.say("Never.")


DIAL = "<Response><Dial>+15550100</Dial></Response>"


async def redirects(call: Call) -> None:
    await call.say("One.")
    await call.redirect(DIAL)
    await call.say("Never.")


@pytest.mark.parametrize(
    ("script", "twiml"), [(hangs_up, "<Response><Hangup/></Response>"), (redirects, DIAL)]
)
async def test_script_that_ends_the_call(
    user: User, script: Callable[..., object], twiml: str
) -> None:
    """A script that hangs up or redirects the call succeeds, and its TwiML is printed."""
    lines = await user.hears(script)
    assert lines == [heard("One."), f"script ends the call with {twiml}", all_heard("One.")]
    user.assert_recorded("One.")


async def redirects_wrongly(call: Call) -> None:
    await call.redirect("<Hangup/>")


async def test_redirect_that_is_rejected(user: User) -> None:
    """TwiML that Twilio would reject is a failure, which the server's log explains."""
    why = await user.fails(redirects_wrongly)
    assert why.startswith("the call ended: 1000 not redirected\n")
    assert "Twilio did not redirect it: 400 " in why


async def fails_in_the_middle(call: Call) -> None:
    await call.say("One.")
    await call.say(str(1 // len(call.parameters)))


async def test_script_that_fails(user: User) -> None:
    """A script that raises is a failure, with the line that raised; what was heard is kept."""
    why = await user.fails(fails_in_the_middle)
    assert why.startswith("the call ended: 1011 the script failed\n")
    assert "await call.say(str(1 // len(call.parameters)))" in why
    assert "ZeroDivisionError" in why
    user.assert_recorded("One.")


async def hangs(call: Call) -> None:
    await call.say("One.")
    await asyncio.sleep(3600)


async def polls_for_ever(call: Call) -> None:
    await call.say("One.")
    while True:
        await call.digit(0)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("script", [hangs, polls_for_ever])
async def test_script_that_hangs(user: User, script: Callable[..., object]) -> None:
    """A script that does nothing for too long is a failure, which one sentence explains."""
    why = await user.fails(script, "--patience", "1")
    assert why == "for 1 s the script neither said anything nor waited for a key\n"
    user.assert_recorded("One.")


async def speaks_the_text(call: Call) -> None:
    await call.say(call.parameters["text"])


async def test_speech_cut_short(user: User, deepgram: Deepgram) -> None:
    """When Deepgram closes mid-response, what was heard is kept, and it is not a success."""
    audio = noise("cut short")
    deepgram.answer("cut short", Answer(audio=audio, stop_after=2000))
    why = await user.fails(speaks_the_text, "--text", "cut short")
    assert re.match("the call ended: 1011 .*Deepgram", why)
    assert user.recording() == decoded(audio[:2000])


async def catches_the_failure(call: Call) -> None:
    try:
        await call.say("fails")
    except twilio_aura.SpeechFailed:
        await call.say("Sorry.")


async def test_failure_that_the_script_catches(user: User, deepgram: Deepgram) -> None:
    """A call that was saved is heard to its end, but no success, since the log has an error."""
    deepgram.answer("fails", Answer(status=400, body=b"No.", framing="length"))
    status, output, errors = await user.tries(catches_the_failure)
    assert 'caller does not hear: "fails"' in output
    assert heard("Sorry.") in output
    assert "but not all that was to be said" in output
    assert status == 1
    assert " ERROR Deepgram answered 400 " in errors
    assert errors.endswith("It is no success: the server's log has a warning or an error, above.\n")


async def never_ends(call: Call) -> None:
    while True:
        await call.say("Hi.")


async def test_script_that_never_ends(user: User) -> None:
    """A script that says something for ever is ended when so many seconds have been heard."""
    why = await user.fails(never_ends, "--longest", "20")
    assert why == (
        "the call has not ended after 20 s; if no loop in the script goes on for ever, --longest "
        "allows more\n"
    )
    assert len(user.recording()) > 20 * 8000


# Settings


OF_THE_DEMO = {"HOST", "PORT", "TLS_CERT", "TLS_KEY", "TWILIO_AUTH_TOKEN", "TWILIO_API_URL"}
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


async def prints_settings(call: Call) -> None:
    for name in twilio_aura.SETTINGS:
        print(f"{name}={getattr(call.settings, name.lower())}")
    print("SHOP=" + os.environ["SHOP"], "in", Path.cwd())
    await call.say("That is all.")


@pytest.mark.parametrize("in_dotenv", [True, False])
async def test_settings(user: User, monkeypatch: pytest.MonkeyPatch, in_dotenv: bool) -> None:
    """Every setting, and a variable of the script's own, reaches it from .env or environment."""
    key = {name: os.environ[name] for name in ("DEEPGRAM_API_KEY", "DEEPGRAM_URL")}
    assert {*key, *VALUES, *OF_THE_DEMO} == set(twilio_aura.SETTINGS)
    settings = key | VALUES
    settings |= {"SHOP": "the corner shop", "TWILIO_AUTH_TOKEN": "of-a-real-account"}
    settings |= {"http_proxy": "http://127.0.0.1:9"}  # not for the stand-ins
    if in_dotenv:
        dotenv = "".join(f"{name}='{value}'\n" for name, value in settings.items())
        (user.directory / ".env").write_text(dotenv + "PORT=1\nTLS_CERT=nowhere.pem\n")
        settings = dict.fromkeys(key, "")  # what is empty counts as not set
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    lines = await user.hears(prints_settings)
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
        ("DEEPGRAM_API_KEY", "a-wrong-key", " ERROR Deepgram answered 401 "),
        ("DEEPGRAM_URL", "nonsense", "DEEPGRAM_URL must be a URL"),
        ("PORT", "nonsense", "PORT must be a whole number"),  # though the demo has another
    ],
)
async def test_wrong_setting(
    user: User, monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    """A setting that is wrong is told in the server's own words."""
    monkeypatch.setenv(name, value)
    errors = await user.fails(hangs_up)
    assert why in errors
    assert "Traceback" not in errors


# The command line


async def test_verbose(user: User) -> None:
    """With --verbose Twilio's messages and the whole log are printed as well."""
    status, output, errors = await user.tries(hangs_up, "--verbose")
    assert status == 0
    for message in ("Twilio: connected", "Twilio: start", "server: media", "server: mark"):
        sender, _, event = message.partition(" ")
        assert f'  {sender} {{"event": "{event}"' in output
    assert max(map(len, output.splitlines())) < 500  # without the sound
    assert re.search("INFO call CA.* ended: redirected", errors)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--script", "nowhere.py"], "there is no file 'nowhere.py'"),
        (["--out", "nowhere/call.wav"], "'nowhere/call.wav' cannot be written"),
        (["--out", "."], "'.' cannot be written"),
        (["--keys", "1,x"], "'1,x' is not like 1,+2,@3,w,# (see --help)"),
        (["--keys", "1,+w"], "'1,+w' is not like 1,+2,@3,w,# (see --help)"),
        (["--param", "name"], "'name' is not like name=Ann"),
        (["--param", "=Ann"], "'=Ann' is not like name=Ann"),
        (["--call", "ws://x", "--fast"], "a server that is running has its own script and time"),
        (["--call", "ws://x", "--serve"], "argument --serve: not allowed with argument --call"),
    ],
)
async def test_wrong_option(user: User, arguments: list[str], why: str) -> None:
    """What is wrong is said in one line, before a call is placed for nothing."""
    with pytest.raises(SystemExit) as caught:
        await user.tries(None, *arguments)
    assert caught.value.code == 2
    output, errors = user.capture.readouterr()
    assert output == ""
    assert errors.splitlines()[-1].endswith(why)


async def test_keys_in_help(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of --help tells how keys are written."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        await user.tries(None, "--help")
    output, _ = user.capture.readouterr()
    keys = "  --keys 1,+2,@3,w  1 when awaited, +2 in speech, @3 at once, w lets time pass"
    assert keys in output.splitlines()


# One half of it


async def answers(call: Call) -> None:
    await call.say(f"Press a key, {call.parameters['name']}.")
    await call.say(f"You pressed {await call.digit()}.")
    await call.say(f"And {await call.digit()!r}.")
    call.close_after_speech = True


async def test_caller_alone(
    user: User, deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who cannot follow the script presses keys where it is quiet, or in what he hears."""
    monkeypatch.setattr(demo, "QUIET_SECONDS", 0.3)
    async with Server({"DEEPGRAM_URL": deepgram.url}, answers) as server:
        arguments = "--call", server.url, "--keys", "1,+2", "--param", "name=Ann"
        status = await demo.run(list(arguments))
    output, errors = user.capture.readouterr()
    assert (status, errors) == (0, "")
    seconds = [len(noise(text)) / 8000 for text in ("Press a key, Ann.", "And '2'.")]
    assert re.sub("^ +[0-9.]+ s  ", "", output, flags=re.MULTILINE).split("\n")[:-3] == [
        f"caller hears {seconds[0]:.1f} s",
        "caller presses 1",
        "caller hears only the beginning of something",
        "caller presses 2",
        f"caller hears {seconds[1]:.1f} s",
        "server ends the call: 1000 completed",
    ]
    assert user.recording()[-len(noise("And '2'.")) :] == decoded(noise("And '2'."))


async def test_caller_who_hears_no_more(user: User, server: Server, deepgram: Deepgram) -> None:
    """A caller who hears no more hangs up; who hears nothing, or a call that fails, has to say."""
    call = ["--call", server.url, "--patience", "3", "--param"]
    deepgram.answer("Fails.", Answer(status=400, body=b"No.", framing="length"))
    calls = [demo.run([*call, f"text={text}"]) for text in ("Hello.", "...", "Fails.")]
    assert await asyncio.gather(*calls) == [0, 1, 1]
    output, errors = user.capture.readouterr()
    assert output.count("caller hangs up: nothing was heard for 3 s\n") == 2
    assert "The caller did not hear everything: nothing was said\n" in errors
    assert "The caller did not hear everything: the call ended: 1011 Deepgram " in errors


async def test_caller_who_lets_time_pass(user: User) -> None:
    """A caller who cannot follow the script presses nothing until another text begins."""
    caller = demo.ListeningCaller(demo.parse(["--keys", "w,1", "--patience", "1000"]))
    ws = AsyncMock()
    caller.phone = Telephone(ws)
    for presses in "nothing", "1":
        caller.begin_sound()
        caller.sounds.append((1, 0.0, 800))
        caller.end_sound(is_heard=True)
        caller.idle_seconds = 100.0
        for _ in range(2):
            await caller.act()
        output, _ = user.capture.readouterr()
        assert output.count(f"caller presses {presses}\n") == output.count("presses") == 1
    ws.send.assert_awaited_once()


async def test_caller_who_signs(
    user: User, deepgram: Deepgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TWILIO_AUTH_TOKEN the caller's handshake is signed, for PUBLIC_URL or the URL called."""
    public = {"PUBLIC_URL": "https://voice.example.com"}
    settings = {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}
    for more in {}, public:
        async with Server({**settings, **more, "CLOSE_AFTER_SPEECH": "yes"}) as server:
            monkeypatch.delenv("TWILIO_AUTH_TOKEN", raising=False)
            assert await demo.run(["--call", server.url]) == 1
            assert "HTTP 403" in user.capture.readouterr().err
            for name, value in {"TWILIO_AUTH_TOKEN": TOKEN, **more}.items():
                monkeypatch.setenv(name, value)
            assert await demo.run(["--call", server.url]) == 0


async def run(*command: str, cwd: Path, **settings: str) -> asyncio.subprocess.Process:
    """Start Python with this command, and without settings but these."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, *command),
        cwd=cwd,
        env=environment(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_server_alone(user: User) -> None:
    """The server alone has the offline voice and all settings, and ends as the server does."""
    settings = {"HOST": "127.0.0.1", "PORT": "0", "CLOSE_AFTER_SPEECH": "yes"}
    settings |= {"DEEPGRAM_API_KEY": "a-key-that-is-not-used", "PUBLIC_URL": "voice.example.com"}
    process = await run("-m", "tests.demo", "--serve", cwd=user.directory, **settings)
    assert process.stdout
    while not (line := await process.stdout.readline()).startswith(b"Listening on "):
        assert line
    url = line.split()[2].decode().rstrip(".")
    assert await demo.run(["--call", url, "--patience", "20"]) == 0
    samples = user.recording()
    assert len(samples) > 8000
    assert max(samples) > 2000
    process.send_signal(signal.SIGTERM)
    _, log = await process.communicate()
    assert process.returncode == 0
    assert b" ended: completed; " in log
