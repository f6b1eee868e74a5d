"""A stand-in for Twilio's REST API: the one request that changes a call in progress.

It is strict about path, login and form, as Twilio is, and then does what Twilio does: it ends the
call's stream, so that the new TwiML is run.
"""

from __future__ import annotations

import asyncio
import base64
import http
import re
import xml.etree.ElementTree as ET
from typing import Self
from urllib.parse import parse_qs

from tests.standins import Observable
from tests.standins.http import HttpRequest, read_request
from tests.standins.telephone import ACCOUNT_SID, Telephone

TOKEN = "a-token-that-signs"  # and also the password


class TwilioApi(Observable):
    """`async with TwilioApi() as twilio`, then `Server({…}, TWILIO_API=twilio.url)`.

    Attributes:
        twiml: What each request asked for, by the call SID in its path.
        requests: All requests that came.
        answered: How many of them have been answered.
        status: What is answered to a request in which nothing is wrong.
        gate: Where there is one, it is waited for before an answer.
        phones: The calls in progress; one that is redirected gets a `stop`, if `ends_streams`.
    """

    def __init__(self, status: int = 200, *, ends_streams: bool = True) -> None:
        super().__init__()
        self.twiml: dict[str, str] = {}
        self.requests: list[HttpRequest] = []
        self.answered = 0
        self.status = status
        self.gate: asyncio.Event | None = None
        self.phones: list[Telephone] = []
        self._ends_streams = ends_streams
        self._hanging_up: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/2010-04-01"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await read_request(reader)
            self.requests.append(request)
            self.changed()
            if self.gate:
                await self.gate.wait()
            status = self._handle(request)
            reason = http.HTTPStatus(status).phrase
            head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
            await writer.drain()
            self.answered += 1
            self.changed()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _handle(self, request: HttpRequest) -> int:
        """Do what `request` asks for; return the status."""
        path = rf"/2010-04-01/Accounts/{ACCOUNT_SID}/Calls/(CA\w+)\.json"
        found = re.fullmatch(path, request.target)
        if request.method != "POST" or not found:
            return 404
        login = base64.b64encode(f"{ACCOUNT_SID}:{TOKEN}".encode()).decode()
        if request.headers.get("authorization") != f"Basic {login}":
            return 401
        form = parse_qs(request.body.decode())
        if list(form) != ["Twiml"] or not is_twiml(form["Twiml"][0]):
            return 400
        if self.status == 200:
            self.twiml[found[1]] = form["Twiml"][0]
            for phone in self.phones:
                if phone.call_sid == found[1] and self._ends_streams:
                    hanging_up = asyncio.create_task(phone.hang_up())
                    self._hanging_up.add(hanging_up)
                    hanging_up.add_done_callback(self._hanging_up.discard)
        self.changed()
        return self.status


def is_twiml(text: str) -> bool:
    """Return whether Twilio would take it for TwiML."""
    try:
        return ET.fromstring(text).tag == "Response"
    except ET.ParseError:
        return False
