"""The README's script for a language model, with the real clients and a stand-in for their server.

These tests are skipped where the clients are not installed; .ci/run installs them.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.standins.deepgram import Deepgram, noise, said
from tests.standins.http import HttpRequest
from tests.standins.model import KEY, Model
from tests.standins.process import Server
from tests.standins.readme import blocks
from tests.standins.telephone import Telephone, dial

pytestmark = pytest.mark.timeout(120)  # Importing openai-agents takes seconds of the processor.

HELLO = "Hello! I know something about every number."
QUESTION = "Type one, then press the pound key."
SORRY = "Sorry, I cannot think of anything right now."
FIRST = "Forty-two is twice three times seven."  # of an answer, whose sentences are these two
LAST = "Its digits add up to six."


def block(word: str) -> str:
    """Return the README's script that has this word."""
    (found,) = (block for block in blocks("python") if word in block)
    return found


@pytest.fixture(params=["openai", "agents"])
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the README's script for the package of this name, with a caller who has time."""
    if not find_spec(request.param):
        pytest.skip(f"{request.param} is not installed")
    source = block("AsyncOpenAI")
    if request.param == "agents":
        top, _, _ = source.partition("@functools.cache")
        _, _, end = source.partition("async def script")
        source = f"{top}{block('Runner')}\nasync def script{end}"
    assert source.count("async def answer(") == source.count("count=20)") == 1
    path = tmp_path / "answer.py"
    path.write_text(source.replace("count=20)", "count=20, seconds=1000)"), encoding="utf-8")
    return path


@asynccontextmanager
async def question(script: Path, model: Model) -> AsyncIterator[tuple[Server, Telephone]]:
    """Yield a server that has its settings in .env, and a caller who has asked about 42."""
    dotenv = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": model.url,
        "OPENAI_AGENTS_DISABLE_TRACING": "1",  # Its makers are not on this machine.
    }
    lines = [f"{name}={value}\n" for name, value in dotenv.items()]
    script.with_name(".env").write_text("".join(lines), encoding="utf-8")
    async with Deepgram() as deepgram:
        settings = {**dict.fromkeys(dotenv), "DEEPGRAM_URL": deepgram.url}
        async with (
            Server(settings, script, cwd=script.parent) as server,
            dial(server.url) as phone,
        ):
            await phone.hears(said(HELLO, QUESTION))
            for key in "42#":
                await phone.press(key)
            await model.until(lambda: len(model.requests) == 1)
            yield server, phone


def asked(request: HttpRequest) -> str:
    """Return what the caller has asked, in a request of either form."""
    body = json.loads(request.body)
    return str((body.get("messages") or body.get("input"))[-1]["content"])


async def test_answer(script: Path) -> None:
    """An answer is heard whole, and its first sentence while the model goes on."""
    async with Model() as model, question(script, model) as (_, phone):
        assert asked(model.requests[0]) == "42"
        model.write("Forty-two is twice ", "three times seven. ", "Its ")
        await phone.until(lambda: phone.heard.endswith(noise(FIRST)))
        model.write("digits add up ", "to six.", "")
        await phone.hears(said(HELLO, QUESTION, FIRST, LAST, QUESTION))
        assert model.abandoned == 0


async def test_key_and_hang_up(script: Path) -> None:
    """A key closes the model's stream, though much of it is yet to be said; so does a hang-up."""
    async with Model() as model, question(script, model) as (server, phone):
        since = len(server.log)
        model.write(f"{FIRST} ", *["It is the answer to everything, and so on. "] * 200)
        await phone.until(lambda: noise(FIRST) in phone.heard)
        await phone.press("7")
        await model.until(lambda: model.abandoned == 1)
        await phone.press("#")
        await model.until(lambda: len(model.requests) == 2)
        assert asked(model.requests[1]) == "7"
        model.write("Seven is the luckiest of all. ", "It ")
        await phone.until(lambda: phone.heard.endswith(noise("Seven is the luckiest of all.")))
        await phone.hang_up()
        await model.until(lambda: model.abandoned == 2)
        server.signal()
        assert await server.end() == 0
        assert server.complaints(since) == []


async def test_error(script: Path) -> None:
    """An error of the model is raised by `say`: the script logs it, says so, and goes on."""
    async with Model(status=500) as model, question(script, model) as (server, phone):
        await phone.hears(said(HELLO, QUESTION, SORRY, QUESTION))
        model.status = 401
        await phone.press("4")
        await phone.press("#")
        await phone.hears(said(HELLO, QUESTION, SORRY, QUESTION, SORRY, QUESTION))
        errors = server.lines(" ERROR the model failed: ")
        assert [re.findall("code: ([0-9]+)", line) for line in errors] == [["500"], ["401"]]
