"""A stand-in for Deepgram's `POST /v1/speak`, with every fault as a switch.

It answers on a real socket, byte by byte as told. `python -m tests.standins.deepgram` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.standins.http import Response, read_request, respond
from tests.standins.tcp import Listener, tls_context

KEY = "a-key-that-costs-money"
GREETING = "Hello, how are you today?"  # the default
NAMES = {  # of voices, by family and language, in November 2026; of Flux's, which are more, a few
    ("aura", "en"): "angus arcas asteria athena helios hera luna orion orpheus perseus stella zeus",
    ("aura-2", "en"): (
        "amalthea andromeda apollo arcas aries asteria athena atlas aurora callista cora "
        "cordelia delia draco electra harmonia helena hera hermes hyperion iris janus juno "
        "jupiter luna mars minerva neptune odysseus ophelia orion orpheus pandora phoebe pluto "
        "saturn selene thalia theia vesta zeus"
    ),
    ("aura-2", "es"): (
        "agustina alvaro antonia aquila carina celeste diana estrella gloria javier luciano "
        "nestor olivia selena silvia sirio valerio"
    ),
    ("aura-2", "de"): "aurelia elara fabian julius kara lara viktoria",
    ("aura-2", "nl"): "beatrix cornelia daphne hestia lars leda rhea roman sander",
    ("aura-2", "fr"): "agathe hector",
    ("aura-2", "it"): "cesare cinzia demetra dionisio elio flavio livia maia melia perseo",
    ("aura-2", "ja"): "ama ebisu fujin izanami uzume",
    ("flux", "en"): "alexis bruce cole haley heather jack priya rufus",
}
VOICES = [
    f"{family}-{name}-{language}"
    for (family, language), names in NAMES.items()
    for name in names.split()
]


def noise(text: str, model: str = "aura-asteria-en") -> bytes:
    """Return about half a second of bytes that are this text's and model's, and no other's."""
    seeded = random.Random(f"{model} {text}")
    return seeded.randbytes(seeded.randrange(3000, 5000))


def said(*texts: str) -> bytes:
    """Return the noise of these texts, one after the other."""
    return b"".join(map(noise, texts))


@dataclass
class Answer(Response):
    """What is done with one request; its other fields are those of `Response`.

    Attributes:
        audio: The body of a 200; None is `Deepgram.voice` of the text.
        delay_seconds_per_character: In addition to `delay_seconds`. Aura takes 0.0004; a clip that
            comes only as a whole, as Flux's, is one of 1/150 with `write_sizes` larger than it.
    """

    audio: bytes | None = None
    delay_seconds_per_character: float = 0.0


@dataclass
class Request:
    """One request as it came: its text and model, the rest of its query, headers in lower case."""

    text: str
    model: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    at: float
    status: int = 0  # of the answer


class Head(NamedTuple):
    """One HEAD: on which connection, and when."""

    connection: int
    at: float


class Deepgram(Listener):
    """The stand-in: `async with Deepgram() as deepgram`, then `deepgram.url`.

    Attributes:
        answers: What is answered, by text, in turn; the last one stays.
        head_answer: What is answered to any HEAD; it can have no body.
        requests: The POST requests that came.
        heads: The HEAD requests that came; they need no login, and are not under way.
        under_way: How many POST requests that were not rejected are being answered.

    Args:
        voice: Returns the mulaw audio for a text and a model.
        default: The answer to texts that `answers` has none for.
        port: Where it listens, on 127.0.0.1; 0 picks a free port.
        host: What `url` calls it; the other name it has is localhost.
        tls: What it serves TLS with, such as `tls_context`; None is plain HTTP.
        concurrency: The plan's: a request beyond so many under way is answered 429.
        knows_voices: Whether a voice that is not one of VOICES is answered 400.
    """

    def __init__(
        self,
        voice: Callable[[str, str], bytes] = noise,
        default: Answer | None = None,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        concurrency: int | None = None,
        knows_voices: bool = False,
    ) -> None:
        super().__init__(port, tls)
        self.voice = voice
        self.default = default or Answer()
        self.answers: dict[str, list[Answer]] = {}
        self.head_answer = Answer(status=404, framing="length")
        self.requests: list[Request] = []
        self.heads: list[Head] = []
        self.under_way = self.most_under_way = 0
        self.concurrency = concurrency
        self.knows_voices = knows_voices
        self._host = host

    @property
    def url(self) -> str:
        """The value for DEEPGRAM_URL."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{self._host}:{self.port}"

    def answer(self, text: str, *answers: Answer) -> str:
        """Give these answers to the requests for `text`, in turn; return `text`."""
        self.answers[text] = list(answers)
        return text

    def asked(self, text: str) -> list[Request]:
        """Return the requests there were for `text`."""
        return [request for request in self.requests if request.text == text]

    async def until_asked(self, text: str) -> None:
        """Wait for the first request for `text`."""
        await self.until(lambda: bool(self.asked(text)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests that come."""
        number = self.connections
        while await self._serve_request(reader, writer, number):
            pass

    async def _serve_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> bool:
        """Return whether the connection is good for another request."""
        method, target, headers, body = await read_request(reader)
        now = asyncio.get_running_loop().time()
        if method == "HEAD":
            self.heads.append(Head(number, now))
            self.changed()
            return await respond(reader, writer, self.head_answer, {}, b"")
        text = str(json.loads(body)["text"])
        model = parse_qs(urlsplit(target).query)["model"][0]
        request = Request(text, model, target, headers, body, number, now)
        self.requests.append(request)
        rejection = self._rejection(method, request)
        if rejection:
            request.status = rejection.status
            self.changed()
            return await self._answer(request, rejection, reader, writer)
        planned = self.answers.get(text) or [self.default]
        answer = planned.pop(0) if len(planned) > 1 else planned[0]
        request.status = answer.status
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.changed()
        try:
            return await self._answer(request, answer, reader, writer)
        finally:
            self.under_way -= 1
            self.changed()

    def _rejection(self, method: str, request: Request) -> Answer | None:
        """Return what Deepgram would say against `request`, if anything."""
        if request.headers.get("authorization") != f"Token {KEY}":
            return error(401, "INVALID_AUTH", "Invalid credentials.")
        if method != "POST" or urlsplit(request.target).path != path_of(request.model):
            return Answer(status=404, body=b"Not Found", framing="length")
        if self.knows_voices and request.model not in VOICES:
            return error(400, "Bad Request", "No such model/version combination found.")
        if self.concurrency is not None and self.under_way >= self.concurrency:
            return error(429, "TOO_MANY_REQUESTS", "Too many requests. Please try again later")
        return None

    async def _answer(
        self,
        request: Request,
        answer: Answer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        audio = answer.audio
        if audio is None and answer.body is None:
            audio = self.voice(request.text, request.model)
        headers = {
            "Content-Type": "application/json" if audio is None else "audio/mulaw;rate=8000",
            "dg-request-id": f"request-{len(self.requests)}",
        }
        await asyncio.sleep(answer.delay_seconds_per_character * len(request.text))
        return await respond(reader, writer, answer, headers, audio or b"")


def path_of(model: str) -> str:
    """Return where Deepgram knows `model`."""
    return "/v2/speak" if model.startswith("flux-") else "/v1/speak"


def error(status: int, code: str, message: str) -> Answer:
    """Return Deepgram's answer to a request that it rejects."""
    body = {"err_code": code, "err_msg": message, "request_id": "f1a2b3c4"}
    return Answer(status=status, body=json.dumps(body).encode(), framing="length")


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-seconds", type=float, default=0.2)
    parser.add_argument("--delay-seconds-per-character", type=float, default=0.0)
    parser.add_argument("--clip-bytes", type=int, help="of every text's speech, then all the same")
    parser.add_argument("--write-bytes", type=int, default=4000)
    parser.add_argument("--pause-seconds", type=float, default=0.05, help="after every write")
    parser.add_argument("--tls", type=Path, help="PEM file with a certificate and its key")
    arguments = parser.parse_args()
    default = Answer(
        delay_seconds=arguments.delay_seconds,
        delay_seconds_per_character=arguments.delay_seconds_per_character,
        write_sizes=[arguments.write_bytes],  # by default ten times as fast as it is spoken
        pause_seconds=arguments.pause_seconds,
    )
    if arguments.clip_bytes:
        default.audio = random.Random(0).randbytes(arguments.clip_bytes)
    tls = tls_context(arguments.tls) if arguments.tls else None
    async with Deepgram(default=default, port=arguments.port, tls=tls) as deepgram:
        print(deepgram.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
