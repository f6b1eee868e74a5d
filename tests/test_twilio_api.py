"""How a script ends its call by Twilio's REST API, with `hang_up` or `redirect`."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import cast

import pytest
import requests

import twilio_aura
from tests.standins import poll
from tests.standins.deepgram import Deepgram
from tests.standins.http import Response
from tests.standins.process import Server
from tests.standins.telephone import dial, sign
from tests.standins.twilio import TOKEN, TwilioApi
from tests.standins.wire import Line, settle
from twilio_aura import Call, Settings, beginning, clean_sid, excerpt, in_thread

DIAL = "<Response><Dial>+15550100</Dial></Response>"
HANG_UP = "<Response><Hangup/></Response>"


async def hangs_up(call: Call) -> None:
    """Hang up after a text."""
    await call.say("Goodbye.")
    await call.hang_up()
    raise AssertionError("it goes on")


async def dials(call: Call) -> None:
    """Have Twilio dial after a text."""
    await call.say("One moment, please.")
    await call.redirect(DIAL)
    raise AssertionError("it goes on")


def knowing(url: str) -> Settings:
    """Return settings with the token that Twilio knows, for its API at this URL."""
    return Settings(twilio_auth_token=TOKEN, twilio_api_url=url)


@pytest.fixture
def soon_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no `stop` after a rejection."""
    monkeypatch.setattr(twilio_aura, "STOP_SECONDS", 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for Twilio's answer for a moment only."""
    monkeypatch.setattr(twilio_aura, "TWILIO_SECONDS", 0.3)


# What works


@pytest.mark.parametrize("status", [200, 201, 204])
@pytest.mark.parametrize(("script", "twiml"), [(dials, DIAL), (hangs_up, HANG_UP)])
async def test_redirect(script: twilio_aura.Script, twiml: str, status: int) -> None:
    """Twilio goes on with the TwiML, by any success; the script is over, like the call."""
    async with TwilioApi(status) as twilio, Line(script, settings=knowing(twilio.url)) as line:
        twilio.phones.append(line)
        assert await line.ended() == (1000, "redirected")
        assert twilio.twiml == {line.call_sid: twiml}
        assert line.story == "media mark"
        assert TOKEN not in "".join(line.log)


def test_default_url() -> None:
    """By default it is Twilio's API of the US."""
    assert Settings().twilio_api_url == "https://api.twilio.com"


async def test_stream_ends_before_the_answer() -> None:
    """The call has been redirected, also where Twilio ends the stream before it answers."""
    async with TwilioApi() as twilio, Line(dials, settings=knowing(twilio.url)) as line:
        twilio.gate = asyncio.Event()
        await twilio.until(lambda: len(twilio.requests) == 1)
        line.stop()
        assert await line.ended() == (1000, "redirected")
        twilio.gate.set()


@pytest.mark.parametrize(("script", "twiml"), [(dials, DIAL), (hangs_up, HANG_UP)])
async def test_redirect_in_a_drain(script: twilio_aura.Script, twiml: str) -> None:
    """A drain lets a script hang up, or redirect its call, after its current text."""
    async with (
        TwilioApi() as twilio,
        Line(script, settings=knowing(twilio.url), returns_marks=False) as line,
    ):
        twilio.phones.append(line)
        await line.until_mark()
        line.call.drain()
        line.return_marks()
        assert await line.ended() == (1000, "redirected")
        assert twilio.twiml == {line.call_sid: twiml}


@pytest.mark.usefixtures("soon_rejected")
async def test_odd_sids() -> None:
    """SIDs in the path of a request are letters, digits, - and _, whatever has come."""
    async with (
        TwilioApi() as twilio,
        Line(hangs_up, settings=knowing(twilio.url), start=False) as line,
    ):
        odd = {"callSid": "../CA_1?x=\r\n-\u0663", "accountSid": "A/C#1"}
        line.feed(line.message("start", start=line.start_fields() | odd))
        assert await line.ended() == (1000, "not redirected")
        assert line.complaint()
        (request,) = twilio.requests
        assert request.target == "/2010-04-01/Accounts/AC1/Calls/CA_1x-.json"


# What does not


REJECTIONS: list[tuple[Response | tuple[int, int], str, str]] = [
    ((400, 12100), '400 \'{"code": 12100, "message": "Document parse failure"', "check the TwiML"),
    ((401, 20003), '401 \'{"code": 20003, "message": "Authenticate"', "check TWILIO_AUTH_TOKEN"),
    (
        (404, 20404),
        '404 \'{"code": 20404, ',
        "TWILIO_API_URL: regions other than the US have others",
    ),
    ((429, 20429), '429 \'{"code": 20429, "message": "Too Many Requests"', "TWILIO_API_URL"),
    ((500, 20500), '500 \'{"code": 20500, "message": "An internal', "TWILIO_API_URL"),
    (Response(status=502, body=b"<h1>\nBad"), "502 '<h1>\\nBad'", "TWILIO_API_URL"),
    (Response(status=103), "103 ", "TWILIO_API_URL"),
    (Response(status=500, body=b"x" * 1000, is_endless=True), "500 'xxx", "TWILIO_API_URL"),
    (Response(status=500, body=b"cut short", stop_after=3), "500 'cut'", "TWILIO_API_URL"),
]


@pytest.mark.parametrize(("answer", "words", "advice"), REJECTIONS)
@pytest.mark.usefixtures("soon_rejected")
async def test_rejected(answer: Response | tuple[int, int], words: str, advice: str) -> None:
    """Where Twilio rejects it the stream is closed; the log has its words, and what to check."""
    twilio = TwilioApi(response=answer) if isinstance(answer, Response) else TwilioApi(*answer)
    async with twilio, Line(dials, settings=knowing(twilio.url)) as line:
        assert await line.ended() == (1000, "not redirected")
        complaint = line.complaint()
        started = f"ERROR call {line.call_sid}: Twilio did not redirect it: {words}"
        assert complaint.startswith(started)
        assert complaint.endswith(advice)
        assert len(complaint) < 400
        assert TOKEN not in complaint
        assert "<Dial>" not in complaint


@pytest.mark.usefixtures("soon_rejected")
async def test_twilio_redirects() -> None:
    """The TwiML and the token are not sent on to where Twilio's answer points."""
    async with TwilioApi() as other, TwilioApi() as twilio:
        for status in (301, 302, 307, 308):
            twilio.response = Response(status=status, headers={"Location": other.url}, body=b"")
            async with Line(dials, settings=knowing(twilio.url)) as line:
                assert await line.ended() == (1000, "not redirected")
                assert f"Twilio did not redirect it: {status} " in line.complaint()
        assert other.connections == 0


@pytest.mark.usefixtures("impatient")
async def test_answer_that_trickles() -> None:
    """An answer that goes on and on is not waited for for long."""
    response = Response(body=b"{}", write_sizes=(1,), pause_seconds=0.1, is_endless=True)
    async with (
        TwilioApi(response=response) as twilio,
        Line(dials, settings=knowing(twilio.url)) as line,
    ):
        assert await line.ended() == (1000, "not redirected")
        assert "Twilio did not redirect it: no answer (TimeoutError()); " in line.complaint()


@pytest.mark.usefixtures("soon_rejected")
async def test_answer_without_an_end() -> None:
    """Of an answer without an end little is read."""
    response = Response(status=500, body=bytes(100_000), write_sizes=(100_000,), is_endless=True)
    async with (
        TwilioApi(response=response) as twilio,
        Line(dials, settings=knowing(twilio.url)) as line,
    ):
        assert await line.ended() == (1000, "not redirected")
        assert line.complaint()
    assert response.sent_bytes < 50_000_000


async def nobody_answers(url: str) -> None:
    """Assert what becomes of a call where there is no answer at this URL."""
    async with Line(hangs_up, settings=knowing(url)) as line:
        assert await line.ended() == (1000, "not redirected")
        complaint = line.complaint()
        assert "Twilio did not redirect it: no answer (" in complaint
        assert complaint.endswith("); check TWILIO_API_URL and the network")


@pytest.mark.usefixtures("impatient")
async def test_no_answer() -> None:
    """Where Twilio does not answer, the stream is closed as well."""
    async with TwilioApi() as twilio:
        twilio.gate = asyncio.Event()
        await nobody_answers(twilio.url)
        twilio.gate.set()


async def test_nobody_listens() -> None:
    """So it is where nobody listens at TWILIO_API_URL."""
    with socket.socket() as closed:  # bound, but not listening: it refuses connections
        closed.bind(("127.0.0.1", 0))
        await nobody_answers(f"http://127.0.0.1:{closed.getsockname()[1]}")


async def test_without_a_token() -> None:
    """Without TWILIO_AUTH_TOKEN nobody is asked, and one line says what is missing."""
    async with TwilioApi() as twilio:
        async with Line(dials, settings=Settings(twilio_api_url=twilio.url)) as line:
            assert await line.ended() == (1000, "not redirected")
            assert line.complaint().endswith(": hang_up and redirect need TWILIO_AUTH_TOKEN")
        assert twilio.connections == 0


# A call that is over already


@pytest.mark.parametrize(
    "body", [b'{"code": 21220, "message": "Call is not in-progress."}', b'{"code":21220}']
)
async def test_call_is_over(body: bytes) -> None:
    """Where Twilio says that the call is over, the caller has hung up: that is no error."""
    async with (
        TwilioApi(response=Response(status=400, body=body, framing="length")) as twilio,
        Line(dials, settings=knowing(twilio.url)) as line,
    ):
        assert await line.ended() == (1000, "hung up")


async def test_call_is_unknown_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it where Twilio no longer knows the call, whose `stop` then comes."""
    monkeypatch.setattr(twilio_aura, "STOP_SECONDS", 1000)
    async with TwilioApi(404) as twilio, Line(dials, settings=knowing(twilio.url)) as line:
        await twilio.until(lambda: twilio.answered == 1)
        await settle()
        assert not line.closed
        line.stop()
        code, reason = await line.ended()
        assert code == 1000
        assert reason in ("hung up", "redirected")  # if the answer came after `stop`


async def test_hang_up_while_twilio_is_asked() -> None:
    """A caller who hangs up meanwhile is no error, whatever Twilio then answers."""
    threads = threading.active_count()
    async with TwilioApi(404) as twilio:
        twilio.gate = asyncio.Event()
        async with Line(hangs_up, settings=knowing(twilio.url)) as line:
            await twilio.until(lambda: len(twilio.requests) == 1)
            line.stop()
            await line.ended()
            twilio.gate.set()
            await poll(lambda: threading.active_count() == threads)
            await settle()


# Threads


async def test_amid_much_work() -> None:
    """Twilio is asked at once, however many threads the script keeps busy."""
    enough = threading.Event()
    work = [asyncio.create_task(asyncio.to_thread(enough.wait)) for _ in range(64)]
    async with TwilioApi() as twilio, Line(hangs_up, settings=knowing(twilio.url)) as line:
        twilio.phones.append(line)
        assert await line.ended() == (1000, "redirected")
    enough.set()
    await asyncio.gather(*work)


async def test_exit_while_twilio_is_asked(deepgram: Deepgram) -> None:
    """A second signal ends the process, though Twilio has not answered yet."""
    async with TwilioApi() as twilio:
        twilio.gate = asyncio.Event()
        settings = {"TWILIO_AUTH_TOKEN": TOKEN, "TWILIO_API_URL": twilio.url}
        async with (
            Server(
                {"DEEPGRAM_URL": deepgram.url, **settings}, hangs_up, TWILIO_SECONDS=1000
            ) as server,
            dial(server.url, headers=sign(server.url, TOKEN)) as phone,
        ):
            await twilio.until(lambda: len(twilio.requests) == 1)
            server.signal()
            await server.until_draining()
            server.signal()
            assert await phone.until_closed() == 1001
            assert await server.end() == 0
        twilio.gate.set()


async def test_in_thread() -> None:
    """What blocks runs in a daemon thread, and returns, or raises, what it would here."""

    def function(*args: int, **kwargs: int) -> tuple[object, ...]:
        return args, kwargs, threading.current_thread().daemon

    assert await in_thread(function, 1, a=2) == ((1,), {"a": 2}, True)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


# What somebody else has written


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("", "''"),
        (b"\n 2026 INFO forged", r"b'\n 2026 INFO forged'"),
        ("a \u2028 \x1b[31m", r"'a \u2028 \x1b[31m'"),
        (None, "None"),
        ("x" * 198, "'" + "x" * 198 + "'"),
        ("x" * 199, "'" + "x" * 59 + " ... " + "x" * 134 + "'"),
        (ValueError("x" * 1_000_000 + " the cause"), None),
    ],
)
def test_excerpt(foreign: object, shown: str | None) -> None:
    """An excerpt is printable ASCII, the beginning and the end, 200 characters at most."""
    text = excerpt(foreign)
    assert len(text) <= 200
    assert text == shown or (shown is None and text.endswith(" the cause')"))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], ""),
        ([b"\xffn", b"o\n"], "\ufffdno\n"),
        ([b"x" * 1999, b"y", b"never read"], "x" * 1999 + "y"),
        ([b"cut", requests.exceptions.ChunkedEncodingError()], "cut"),
        ([requests.exceptions.ConnectionError()], ""),
    ],
)
def test_beginning(parts: list[bytes | Exception], text: str) -> None:
    """Of a body some 2000 bytes are read, or what has come where its connection breaks."""

    class Body:
        def iter_content(self, _: int) -> Iterator[bytes]:
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield part

    assert beginning(cast("requests.Response", Body())) == text


@pytest.mark.parametrize(
    ("sid", "clean"),
    [
        ("CA0123456789abcdef", "CA0123456789abcdef"),
        ("../CA_1?x=\r\n-\u0663", "CA_1x-"),
        (None, ""),
        (7, "7"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_clean_sid(sid: object, clean: str) -> None:
    """A SID is fit for a URL, a message and the log, whatever has come."""
    assert clean_sid(sid) == clean
