"""How a script ends its call by Twilio's REST API, with `hang_up` or `redirect`."""

import asyncio
from pathlib import Path

import pytest

from tests.standins.deepgram import Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import dial, sign
from tests.standins.twilio import TOKEN, TwilioApi

DIAL = "<Response><Dial>+15550100</Dial></Response>"
LEAVES = f"""
async def script(call):
    try:
        yield "Press a key."
        if await call.digit() == "0":
            await call.redirect("{DIAL}")
        else:
            await call.hang_up()
        print(call.sid, "goes on", flush=True)
    finally:
        print(call.sid, "is over", flush=True)
"""


@pytest.fixture
def settings(deepgram: Deepgram) -> dict[str, str]:
    """Return the settings of a server whose token is the one that Twilio knows."""
    return {"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}


async def leaving(server: Server, key: str, twilio: TwilioApi) -> tuple[int, str]:
    """Press `key` on a call; return the close code, and how the call has ended."""
    async with dial(server.url, headers=sign(server.url, TOKEN)) as phone:
        twilio.phones.append(phone)
        await phone.until_returned()
        await phone.press(key)
        code = await phone.until_closed()
        assert phone.heard == noise("Press a key.")
    await server.until(lambda: f"{phone.call_sid} is over" in server.output)
    assert server.output.count("goes on") == 0
    return code, (await server.until_ended(phone.call_sid)).partition(";")[0]


@pytest.mark.parametrize(("key", "twiml"), [("0", DIAL), ("*", "<Response><Hangup/></Response>")])
async def test_redirect(settings: dict[str, str], key: str, twiml: str) -> None:
    """A script hangs up, or has Twilio go on with other TwiML; then it is over, like the call."""
    async with TwilioApi() as twilio, Server(settings, LEAVES, TWILIO_API=twilio.url) as server:
        assert await leaving(server, key, twilio) == (1000, "redirected")
        assert list(twilio.twiml.values()) == [twiml]
        assert TOKEN not in server.log
        assert " WARNING " not in server.log
        assert " ERROR " not in server.log


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
async def test_redirect_rejected(settings: dict[str, str], status: int) -> None:
    """Where Twilio rejects it, the stream is closed, so that the caller is not left in silence."""
    async with (
        TwilioApi(status) as twilio,
        Server(settings, LEAVES, TWILIO_API=twilio.url) as server,
    ):
        assert await leaving(server, "0", twilio) == (1000, "not redirected")
        (line,) = server.lines(" ERROR ")
        assert f"Twilio did not redirect it ({status} " in line
        assert "check TWILIO_AUTH_TOKEN" in line
        assert TOKEN not in server.log
        assert "<Dial>" not in server.log


async def test_redirect_without_an_answer(settings: dict[str, str]) -> None:
    """Where Twilio does not answer, it is the same."""
    async with TwilioApi() as twilio:
        twilio.gate = asyncio.Event()
        async with Server(settings, LEAVES, TWILIO_API=twilio.url, TWILIO_SECONDS=0.5) as server:
            assert await leaving(server, "*", twilio) == (1000, "not redirected")
            assert len(server.lines(" ERROR ")) == 1
        twilio.gate.set()


async def test_redirect_with_a_wrong_token(settings: dict[str, str]) -> None:
    """Without TWILIO_AUTH_TOKEN, Twilio rejects it like any wrong one."""
    del settings["TWILIO_AUTH_TOKEN"]
    async with TwilioApi() as twilio, Server(settings, LEAVES, TWILIO_API=twilio.url) as server:
        assert await leaving(server, "*", twilio) == (1000, "not redirected")
        (line,) = server.lines(" ERROR ")
        assert "Twilio did not redirect it (401 " in line
    assert twilio.twiml == {}


async def test_hang_up_while_redirecting(settings: dict[str, str]) -> None:
    """A caller who hangs up while Twilio is being asked is no error."""
    async with TwilioApi(404) as twilio:
        twilio.gate = asyncio.Event()
        async with Server(settings, LEAVES, TWILIO_API=twilio.url) as server:
            async with dial(server.url, headers=sign(server.url, TOKEN)) as phone:
                await phone.until_returned()
                await phone.press("*")
                await twilio.until(lambda: len(twilio.requests) == 1)
                await phone.hang_up()
            await server.until_ended(phone.call_sid)
            twilio.gate.set()
            await twilio.until(lambda: twilio.answered == 1)
            await asyncio.sleep(0.1)  # for the server's thread to read it
            server.signal()
            assert await server.end() == 0
            assert " ERROR " not in server.log
            assert "Exception" not in server.log


ALWAYS_HANGS_UP = """
async def script(call):
    try:
        yield "Hang up."
        await call.digit()
    finally:
        await call.hang_up()
        print(call.sid, "is over", flush=True)
"""


async def test_redirect_after_the_end(settings: dict[str, str]) -> None:
    """Once the caller has hung up, Twilio is not asked to end the call, and the script goes on."""
    async with (
        TwilioApi() as twilio,
        Server(settings, ALWAYS_HANGS_UP, TWILIO_API=twilio.url) as server,
    ):
        async with dial(server.url, headers=sign(server.url, TOKEN)) as phone:
            await phone.until_returned()
            await phone.hang_up()
        await server.until(lambda: f"{phone.call_sid} is over" in server.output)
        assert twilio.requests == []


BUSY = """
import os, time

def block():
    while not os.path.exists(os.environ["ENOUGH"]):
        time.sleep(0.05)

async def script(call):
    blocked = [asyncio.create_task(asyncio.to_thread(block)) for _ in range(64)]
    yield "Goodbye."
    await call.hang_up()
"""


async def test_redirect_amid_much_work(settings: dict[str, str], tmp_path: Path) -> None:
    """Twilio is asked at once, however many threads the script keeps busy."""
    enough = tmp_path / "enough"
    settings["ENOUGH"] = str(enough)
    async with TwilioApi() as twilio, Server(settings, BUSY, TWILIO_API=twilio.url) as server:
        async with dial(server.url, headers=sign(server.url, TOKEN)) as phone:
            twilio.phones.append(phone)
            assert await phone.until_closed() == 1000
        assert (await server.until_ended(phone.call_sid)).startswith("redirected;")
        enough.touch()


async def test_redirect_does_not_hold_up_the_exit(settings: dict[str, str]) -> None:
    """A second signal ends the process, though Twilio has not answered yet."""
    async with TwilioApi() as twilio:
        twilio.gate = asyncio.Event()
        async with Server(settings, LEAVES, TWILIO_API=twilio.url, TWILIO_SECONDS=1000) as server:
            async with dial(server.url, headers=sign(server.url, TOKEN)) as phone:
                await phone.until_returned()
                await phone.press("*")
                await twilio.until(lambda: len(twilio.requests) == 1)
                server.signal()
                await server.until_draining()
                server.signal()
                assert await phone.until_closed() == 1001
            assert await server.end() == 0
        twilio.gate.set()


async def test_odd_sids(deepgram: Deepgram) -> None:
    """SIDs in the path of a request are letters, digits, - and _, whatever has come."""
    script = "async def script(call):\n    await call.hang_up()\n    yield ''\n"
    async with (
        TwilioApi() as twilio,
        Server({"DEEPGRAM_URL": deepgram.url}, script, TWILIO_API=twilio.url) as server,
        dial(server.url, start=False) as phone,
    ):
        odd = {"callSid": "../CA_1?x=\r\n-\u0663", "accountSid": "A/C#1"}
        await phone.send("start", start=phone.start_fields() | odd)
        assert await phone.until_closed() == 1000
    (request,) = twilio.requests
    assert request.target == "/2010-04-01/Accounts/AC1/Calls/CA_1x-.json"
