"""A stand-in for Twilio's REST API: the one request that changes a call in progress.

It is strict about path, login and form, as Twilio is, and then does what Twilio does: it ends the
call's stream, so that the new TwiML is run.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import xml.etree.ElementTree as ET
from urllib.parse import parse_qs

from tests.standins.http import HttpRequest, Response, read_request, respond
from tests.standins.tcp import Listener
from tests.standins.telephone import ACCOUNT_SID, Telephone
from tests.standins.wire import Wire

TOKEN = "a-token-that-signs"  # and also the password
CODES = {400: 21220, 401: 20003, 404: 20404, 429: 20429, 500: 20500}  # the usual one of a status
MESSAGES = {
    12100: "Document parse failure",
    20003: "Authenticate",
    20404: "The requested resource {path} was not found",
    20429: "Too Many Requests",
    20500: "An internal server error has occurred",
    21220: "Call is not in-progress. Cannot redirect.",
}


class TwilioApi(Listener):
    """`async with TwilioApi() as twilio`, then `Server({"TWILIO_API_URL": twilio.url, …})`.

    Attributes:
        twiml: What each request asked for, by the call SID in its path.
        requests: All requests that came.
        answered: How many of them have been answered.
        status: What is answered to a request in which nothing is wrong.
        code: Twilio's, of that status if it is an error; 0 is the usual one.
        response: What is done in place of that, such as to trickle; the call then goes on.
        gate: Where there is one, it is waited for before an answer.
        phones: The calls in progress; one that is redirected gets a `stop`, if `ends_streams`.
    """

    def __init__(
        self,
        status: int = 200,
        code: int = 0,
        *,
        response: Response | None = None,
        ends_streams: bool = True,
    ) -> None:
        super().__init__()
        self.twiml: dict[str, str] = {}
        self.requests: list[HttpRequest] = []
        self.answered = 0
        self.status = status
        self.code = code
        self.response = response
        self.gate: asyncio.Event | None = None
        self.phones: list[Telephone | Wire] = []
        self._ends_streams = ends_streams
        self._hanging_up: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The value for TWILIO_API_URL."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        request = await read_request(reader)
        self.requests.append(request)
        self.changed()
        if self.gate:
            await self.gate.wait()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        await respond(reader, writer, self._handle(request), headers, b"{}")
        self.answered += 1
        self.changed()

    def _handle(self, request: HttpRequest) -> Response:
        """Do what `request` asks for; return what is answered."""
        path = rf"/2010-04-01/Accounts/{ACCOUNT_SID}/Calls/(CA\w+)\.json"
        found = re.fullmatch(path, request.target)
        if request.method != "POST" or not found:
            return error(404, 20404, request.target)
        login = base64.b64encode(f"{ACCOUNT_SID}:{TOKEN}".encode()).decode()
        if request.headers.get("authorization") != f"Basic {login}":
            return error(401, 20003, request.target)
        form = parse_qs(request.body.decode())
        if list(form) != ["Twiml"] or not is_twiml(form["Twiml"][0]):
            return error(400, 12100, request.target)
        if self.response:
            return self.response
        if self.status >= 300:
            code = self.code or CODES.get(self.status, 20500)
            return error(self.status, code, request.target)
        self.twiml[found[1]] = form["Twiml"][0]
        for phone in self.phones:
            if phone.call_sid == found[1] and self._ends_streams:
                hanging_up = asyncio.create_task(phone.hang_up())
                self._hanging_up.add(hanging_up)
                hanging_up.add_done_callback(self._hanging_up.discard)
        self.changed()
        call = {"sid": found[1], "account_sid": ACCOUNT_SID, "status": "in-progress"}
        return answer(self.status, call | {"direction": "inbound", "uri": request.target})


def answer(status: int, fields: dict[str, object]) -> Response:
    """Return a response that is JSON."""
    return Response(status=status, body=json.dumps(fields).encode(), framing="length")


def error(status: int, code: int, path: str) -> Response:
    """Return Twilio's answer to a request that it rejects."""
    fields = {
        "code": code,
        "message": MESSAGES[code].format(path=path),
        "more_info": f"https://www.twilio.com/docs/errors/{code}",
        "status": status,
    }
    return answer(status, fields)


def is_twiml(text: str) -> bool:
    """Return whether Twilio would take it for TwiML."""
    try:
        return ET.fromstring(text).tag == "Response"
    except ET.ParseError:
        return False
