"""Hear it without a phone: place a simulated call to the real server, and keep what was heard.

    python -m tests.demo
    python -m tests.demo --text "Guten Morgen." --model aura-2-viktoria-de --out morgen.wav

With a DEEPGRAM_API_KEY, in the environment or in .env, it is Deepgram that speaks; without one, a
stand-in with an offline voice. The exit status is 0 only if the caller heard everything.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from dotenv import dotenv_values
from streamdouble.audio import ulaw_to_wav
from websockets.exceptions import WebSocketException

from tests import voice
from tests.deepgram import KEY, Deepgram
from tests.server import QUIET, Server
from tests.telephone import BYTES_A_SECOND, Telephone, dial

SETTINGS = ("DEEPGRAM_API_KEY", "DEEPGRAM_URL", "DEEPGRAM_MODEL", "GREETING")
SILENCE_SECONDS = 15.0  # in which nothing happens; the server itself gives up after about 10
LINGER_SECONDS = 1.0  # once all was heard: more may be said, or the server close the call
LONG_SECONDS = 20.0
CHARACTERS_A_SECOND = 15


class NotHeard(Exception):
    """The caller did not hear everything; the message says why in one sentence."""


class Narrator:
    """Prints a call as it happens, with the milliseconds since its first message."""

    def __init__(self) -> None:
        self._began = 0.0
        self._sounds: list[int] = []  # sizes in bytes, since the last mark

    def tell(self, who: str, what: str) -> None:
        """Print that `who` does `what` now."""
        now = time.perf_counter()
        self._began = self._began or now
        print(f"{(now - self._began) * 1000:7.0f} ms  {who}: {what}", flush=True)

    def overhear(self, who: str, message: str | bytes) -> None:
        """Print one of the call's messages; of the many with sound, only the first."""
        match json.loads(message):
            case {"event": "media", "media": {"payload": payload}}:
                if not self._sounds:
                    self.tell(who, "media, the first sound")
                self._sounds.append(len(base64.b64decode(payload)))
            case {"event": "mark", "mark": {"name": name}} if who == "server":
                seconds = sum(self._sounds) / BYTES_A_SECOND
                self.tell(who, f"mark {name}, after {len(self._sounds)} media, {seconds:.1f} s")
                self._sounds.clear()
            case {"event": "mark", "mark": {"name": name}}:
                self.tell(who, f"mark {name}: the caller has heard what came before it")
            case {"event": "start", "start": {"callSid": call_sid, "customParameters": given}}:
                named = " with the parameter " * bool(given) + ", ".join(given)
                self.tell(who, f"start of call {call_sid}{named}")
            case {"event": "stop"}:
                self.tell(who, "stop, the caller hangs up")
            case {"event": event}:
                self.tell(who, event)


async def listen(phone: Telephone) -> None:
    """Return when all that was said has been heard, and nothing more is said."""

    def progress() -> tuple[int, int, int]:
        return len(phone.events), len(phone.heard), len(phone.returned)

    def complete() -> bool:
        marks = phone.named("mark")
        return bool(marks) and progress() == (len(phone.events), len(phone.sent), len(marks))

    def progressed() -> bool:
        return progress() != seen

    seen = progress()
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(LINGER_SECONDS if complete() else SILENCE_SECONDS):
                await phone.until(progressed)
            seen = progress()
    if not complete() or not phone.heard:
        raise NotHeard(
            f"nothing happened for {SILENCE_SECONDS:.0f} s, and the caller had heard "
            f"{len(phone.heard) / BYTES_A_SECOND:.1f} s of {len(phone.sent) / BYTES_A_SECOND:.1f} s"
        )


def transcript(heard: bytes, made: dict[bytes, str]) -> str:
    """Return what is said in `heard`, if it is whole pieces of what the voice has `made`."""
    texts = []
    while heard:
        audio = max(filter(heard.startswith, made), key=len, default=b"")
        if not audio:
            raise NotHeard("what the caller heard is not, byte for byte, what the voice made")
        texts.append(made[audio])
        heard = heard[len(audio) :]
    return " ".join(texts)


def visible(text: str) -> str:
    """Return `text` without its white space and control characters."""
    return "".join(c for c in text if c.isprintable() and not c.isspace())


async def demo(text: str, model: str, out: Path, fast: bool) -> None:
    """Place the call and print it; raise NotHeard, or whatever kept the caller from hearing."""
    given = {**dotenv_values(".env", encoding="utf-8-sig"), **os.environ}
    settings = {name: given.get(name) for name in SETTINGS}
    parameters = {name: told for name, told in (("text", text), ("model", model)) if told}
    narrator = Narrator()
    made: dict[bytes, str] = {}

    def speak(text: str, model: str) -> bytes:
        audio = voice.speak(text, model)
        made[audio] = text
        return audio

    async with contextlib.AsyncExitStack() as stack:
        if settings["DEEPGRAM_API_KEY"]:
            settings |= {name: os.environ.get(name) for name in QUIET}  # Deepgram may be behind it
            print(f"Deepgram: {settings['DEEPGRAM_URL'] or 'the real one'}")
        else:
            deepgram = await stack.enter_async_context(Deepgram(speak))
            settings |= {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
            print("Deepgram: a stand-in with an offline voice, without a DEEPGRAM_API_KEY")
        server = await stack.enter_async_context(Server(settings, flags=()))
        if not server.port:
            raise NotHeard(f"the server did not start: {server.log.strip()}")
        print(f"server:   {server.url}")
        seconds = len(text) / CHARACTERS_A_SECOND
        if seconds > LONG_SECONDS and not fast:
            print(f"It takes about {seconds:.0f} s to listen to; --fast does not wait.")
        print(flush=True)

        call_sid = ""
        try:
            async with dial(
                server.url,
                parameters=parameters,
                speed=1000.0 if fast else 1.0,
                overhear=narrator.overhear,
            ) as phone:
                call_sid = phone.call_sid
                try:
                    await listen(phone)
                finally:
                    ulaw_to_wav(bytes(phone.heard), out)
                await phone.hang_up()
            narrator.tell("server", await server.logged(f"{call_sid} ended"))
            said = transcript(bytes(phone.heard), made) if made else text
            if text and visible(said) != visible(text):
                raise NotHeard("the server said something other than --text, or not all of it")
        except (NotHeard, AssertionError, OSError, WebSocketException) as error:
            # What the server says about it may still be under way.
            with contextlib.suppress(TimeoutError, AssertionError):
                async with asyncio.timeout(SILENCE_SECONDS):
                    await server.until(lambda: server.ended or f"{call_sid} ended" in server.log)
            reason = "the server has ended" if server.ended else error
            raise NotHeard(f"{reason}. Its log:\n{server.log.strip()}") from error
        seconds = len(phone.heard) / BYTES_A_SECOND
        print(f"\nThe caller heard all {seconds:.1f} s: listen to {out}.")


def writable(name: str) -> Path:
    """Return the path of a file that can be written, before a call is placed for nothing."""
    try:
        with Path(name).open("wb"):
            return Path(name)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written: {error.strerror}") from None


def main() -> int:
    """Place the call that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text", type=str.strip, default="", help="what is said (default: the greeting)"
    )
    parser.add_argument("--model", default="", help="the voice (default: DEEPGRAM_MODEL)")
    parser.add_argument("--out", type=writable, default="call.wav", help="default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="don't listen in real time")
    arguments = parser.parse_args()
    try:
        asyncio.run(demo(**vars(arguments)))
    except KeyboardInterrupt:
        print("\nYou rang off before the caller had heard everything.", file=sys.stderr)
        return 130
    except (NotHeard, AssertionError, OSError, UnicodeError) as error:
        print(f"\nThe caller did not hear everything: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
