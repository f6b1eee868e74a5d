"""What a beginner writes, and what he then reads: in the demo, and in the server's log.

Each mistake is a function, as a beginner would write it; mypy would have told of some.
"""

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import twilio_aura
from tests import demo
from tests.standins.process import PROXY_VARIABLES, ROOT
from twilio_aura import Call, Text


@pytest.fixture(autouse=True)
def _beginner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no key, no setting, and a directory of one's own."""
    for name in (*twilio_aura.SETTINGS, *PROXY_VARIABLES, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


async def forgets_await(call: Call) -> None:
    call.say("Hello.")  # type: ignore[unused-coroutine]


async def forgets_await_of_digit(call: Call) -> None:
    key = call.digit()
    await call.say(f"You pressed {key}.")


async def says_none(call: Call) -> None:
    await call.say(call.parameters.get("name"))  # type: ignore[arg-type]


async def says_a_number(call: Call) -> None:
    await call.say(42)  # type: ignore[arg-type]


async def says_bytes(call: Call) -> None:
    await call.say(b"Hello.")  # type: ignore[arg-type]


async def says_a_list(call: Call) -> None:
    await call.say(["Hello.", "Goodbye."])  # type: ignore[arg-type]


async def answer() -> AsyncIterator[str]:
    yield "An answer."


async def says_a_function(call: Call) -> None:
    await call.say(answer)  # type: ignore[arg-type]


async def returns_an_answer() -> str:
    return "An answer."


async def says_a_coroutine(call: Call) -> None:
    await call.say(returns_an_answer())  # type: ignore[arg-type]


async def writes_numbers() -> AsyncIterator[Any]:
    yield 42


async def says_written_numbers(call: Call) -> None:
    await call.say(writes_numbers())


async def yields(_call: Call) -> AsyncIterator[Text]:
    yield "Hello."


def forgets_async(call: Call) -> None:
    call.say("Hello.")  # type: ignore[unused-coroutine]


async def returns_a_text(_call: Call) -> str:
    return "Hello."


async def compares_with_a_number(call: Call) -> None:
    if await call.digit() == 1:  # type: ignore[comparison-overlap]
        await call.say("One.")


async def sleeps(call: Call) -> None:
    await call.say("One moment.")
    time.sleep(1.2)  # noqa: ASYNC251 - this is the mistake
    await call.say("Done.")


async def loops(call: Call) -> None:
    await call.say("One moment.")
    while True:
        pass


async def fails(call: Call) -> None:
    await call.say(f"You owe us {100 / 0} euros.")


async def fails_to_answer() -> AsyncIterator[str]:
    yield "The answer is this. "
    raise ConnectionError("the model is overloaded")


async def has_a_model_that_fails(call: Call) -> None:
    await call.say(fails_to_answer())


async def misses_a_parameter(call: Call) -> None:
    await call.say(f"Hello {call.parameters['name']}.")


async def says_spaces(call: Call) -> None:
    await call.say("   ")


async def misspells_the_voice(call: Call) -> None:
    call.model = "aura-asterix-en"
    await call.say("Hello.")


async def never_ends(call: Call) -> None:
    while True:
        await call.say("Hi.")


# What he wrote; what he then reads in the call's transcript, or in the sentence at its end; and in
# the server's log, which the demo shows: where it has the script's line, he sees where it is.
WARNED = "It is no success: the server's log has a warning or an error, above."
FAILED = "the call ended: 1011 the script failed"
NOT_STARTED = "the server did not start: see above"
NO_TEXT = "TypeError: a text is a str or an async iterable of str, not "
NO_SCRIPT = "A script is an async function that says `await call.say(text)`."
MISTAKES: list[tuple[Callable[..., object], list[str], list[str]]] = [
    (forgets_await, [WARNED], ["'Call.say' was never awaited", 'call.say("Hello.")']),
    (
        forgets_await_of_digit,
        [WARNED, 'caller hears: "You pressed <coroutine object Call.digit at 0x'],
        ["'Call.digit' was never awaited"],
    ),
    (says_none, [FAILED], [NO_TEXT + "NoneType", 'call.say(call.parameters.get("name"))']),
    (says_a_number, [FAILED], [NO_TEXT + "int", "call.say(42)"]),
    (says_bytes, [FAILED], [NO_TEXT + "bytes", 'call.say(b"Hello.")']),
    (says_a_list, [FAILED], [NO_TEXT + "list", 'call.say(["Hello.", "Goodbye."])']),
    (says_a_function, [FAILED], [NO_TEXT + "function", "call.say(answer)"]),
    (says_a_coroutine, [FAILED], [NO_TEXT + "coroutine", "call.say(returns_an_answer())"]),
    (says_written_numbers, [FAILED], ["TypeError: can only concatenate str", "say(writes_numb"]),
    (yields, [NOT_STARTED], [NO_SCRIPT]),
    (forgets_async, [NOT_STARTED], [NO_SCRIPT]),
    (returns_a_text, [WARNED], ["WARNING", "the script returned a str: `await call.say(text)`"]),
    (compares_with_a_number, ["caller presses 1", 'script gets "1"'], []),
    (sleeps, [WARNED], ["WARNING the event loop stood still for ", "asyncio.to_thread"]),
    (loops, ["for 2 s the script neither said anything nor waited"], ["in loops"]),
    (fails, [FAILED], ["ZeroDivisionError", "You owe us {100 / 0} euros."]),
    (
        has_a_model_that_fails,
        [FAILED, 'caller hears only the beginning of: "The answer is this."'],
        ["ConnectionError: the model is overloaded", "call.say(fails_to_answer())"],
    ),
    (misses_a_parameter, [FAILED], ["KeyError: 'name'", "{call.parameters['name']}."]),
    (says_spaces, ['caller hears nothing: there is nothing to say in "   "'], ["no audio sent"]),
    (
        misspells_the_voice,
        ["1011 Deepgram answered 400", "The voice aura-asterix-en is unknown"],
        ["ERROR Deepgram answered 400 for the voice 'aura-asterix-en'", "check", "call.model"],
    ),
    (never_ends, ["the call has not ended after 30 s", "--longest"], []),
]


@pytest.mark.parametrize(
    ("script", "read", "logged"), MISTAKES, ids=[script.__name__ for script, _, _ in MISTAKES]
)
async def test_mistake(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[..., object],
    read: list[str],
    logged: list[str],
) -> None:
    """The demo tells of the mistake, in its own words or in the server's."""
    constants = {"BLOCKED_SECONDS": 1000.0, "DUMP_SECONDS": 1000.0}  # The machine may stand still.
    patience = "20"
    if script in (sleeps, loops):
        constants = {"DUMP_SECONDS": 0.5}
    if script is loops:
        patience = "2"
        monkeypatch.setattr(demo, "STOP_SECONDS", 0.5)  # It has to be killed.
    options = ["--fast", "--verbose", "--keys", "1", "--patience", patience, "--longest", "30"]
    status = await demo.run(options, script, **constants)
    output, errors = capsys.readouterr()
    assert [words for words in read if words not in output + errors] == []
    assert [words for words in logged if words not in errors] == []
    is_noticed_by_ear = script in (compares_with_a_number, says_spaces)
    assert status == (0 if is_noticed_by_ear else 1)


async def test_sid_as_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Account SID in place of the token is told apart, though the demo sends Twilio nothing."""
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", "AC" + "0123456789abcdef" * 2)
    assert await demo.run([]) == 1
    _, errors = capsys.readouterr()
    assert "TWILIO_AUTH_TOKEN must be the auth token, not the Account SID above it." in errors


async def test_script_in_a_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where Python would not find the module, the demo says how the script is started."""
    monkeypatch.chdir(ROOT)
    script = Path("tests") / "scripts" / "shop.py"
    options = ["--fast", "--script", str(script), "--out", str(tmp_path / "call.wav")]
    assert await demo.run(options) == 0
    output, _ = capsys.readouterr()
    command = f"PYTHONPATH=. python {script}"
    assert f"To start the server itself: {command}\n" in output
    error = "ModuleNotFoundError: No module named 'twilio_aura'"
    assert error in output
    assert error in started(script)
    assert "usage: shop.py" in started(script, PYTHONPATH=".")


def started(script: Path, **environment: str) -> str:
    """Return what Python prints where it runs `script --help`."""
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
