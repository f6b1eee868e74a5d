"""Hear it without a phone: place a simulated call to the real server, and keep what was heard.

    python -m tests.demo
    python -m tests.demo --text "Guten Morgen." --model aura-2-viktoria-de --out morgen.wav
    python -m tests.demo --script menu.py --keys '1,2,*'

With a DEEPGRAM_API_KEY, in the environment or in .env, the voice is Deepgram's; without one, an
offline stand-in's. The exit status is 0 only if the caller heard everything.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

try:
    from dotenv import dotenv_values
    from streamdouble.audio import ulaw_to_wav
    from websockets.exceptions import WebSocketException

    from tests.standins import voice
    from tests.standins.deepgram import KEY, Deepgram
    from tests.standins.process import PROXY_VARIABLES, Server
    from tests.standins.telephone import BYTES_PER_SECOND, Telephone, dial
except ImportError as error:
    print(f"{error}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

SETTINGS = ("DEEPGRAM_API_KEY", "DEEPGRAM_URL", "DEEPGRAM_MODEL", "GREETING")
SILENCE_SECONDS = 15.0  # in which nothing happens; the server itself gives up after about 10
PAUSE_SECONDS = 1.0  # after what was heard, before a key is pressed or the caller hangs up
LONG_SECONDS = 20.0
CHARACTERS_PER_SECOND = 15


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

    def on_message(self, sender: str, message: str | bytes) -> None:
        """Print one of the call's messages; of the many with sound, only the first."""
        match json.loads(message):
            case {"event": "media", "media": {"payload": payload}}:
                if not self._sounds:
                    self.tell(sender, "media, the first sound")
                self._sounds.append(len(base64.b64decode(payload)))
            case {"event": "mark", "mark": {"name": name}} if sender == "server":
                seconds = sum(self._sounds) / BYTES_PER_SECOND
                self.tell(sender, f"mark {name}, after {len(self._sounds)} media, {seconds:.1f} s")
                self._sounds.clear()
            case {"event": "mark", "mark": {"name": name}}:
                self.tell(sender, f"mark {name}: the caller has heard what came before it")
            case {"event": "start", "start": {"callSid": call_sid, "customParameters": parameters}}:
                named = " with the parameter " * bool(parameters) + ", ".join(parameters)
                self.tell(sender, f"start of call {call_sid}{named}")
            case {"event": "dtmf", "dtmf": {"digit": digit}}:
                self.tell(sender, f"the caller presses {digit}")
            case {"event": "stop"}:
                self.tell(sender, "stop, the caller hangs up")
            case {"event": event}:
                self.tell(sender, event)


async def listen(phone: Telephone, keys: list[str]) -> None:
    """Press each of `keys` when all was heard; return when nothing more is said after the last."""

    def progress() -> tuple[int, int, int]:
        return len(phone.events), len(phone.heard), len(phone.echoed_marks)

    def complete() -> bool:
        marks = phone.named("mark")
        return bool(marks) and progress() == (len(phone.events), len(phone.received), len(marks))

    async def until_progress(seen: tuple[int, int, int]) -> None:
        await phone.until(lambda: progress() != seen)

    async def until_quiet() -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(PAUSE_SECONDS if complete() else SILENCE_SECONDS):
                    await until_progress(progress())

    await until_quiet()
    for key in keys:
        await phone.press(key)
        await until_quiet()
    heard, received = len(phone.heard) / BYTES_PER_SECOND, len(phone.received) / BYTES_PER_SECOND
    if not complete() or not phone.heard:
        raise NotHeard(
            f"nothing happened for {SILENCE_SECONDS:.0f} s, and the caller had heard {heard:.1f} s "
            f"of {received:.1f} s"
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


def keep(heard: bytes, out: Path) -> None:
    """Write what was heard, if anything was, in place of an older recording."""
    if heard:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent) as directory:
            recording = Path(directory) / "call.wav"
            ulaw_to_wav(heard, recording)
            recording.replace(out)


async def demo(
    text: str, model: str, out: Path, script: Path | None, keys: list[str], fast: bool
) -> None:
    """Place the call and print it; raise NotHeard, or whatever kept the caller from hearing."""
    values = {**dotenv_values(".env", encoding="utf-8-sig", interpolate=False), **os.environ}
    settings = {name: values.get(name) for name in SETTINGS}
    parameters = {name: value for name, value in (("text", text), ("model", model)) if value}
    narrator = Narrator()
    made: dict[bytes, str] = {}

    def speak(text: str, model: str) -> bytes:
        audio = voice.speak(text, model)
        made[audio] = text
        return audio

    async with contextlib.AsyncExitStack() as stack:
        if settings["DEEPGRAM_API_KEY"]:
            # Deepgram may be behind a proxy.
            settings |= {name: os.environ.get(name) for name in PROXY_VARIABLES}
            print(f"Deepgram: {settings['DEEPGRAM_URL'] or 'the real one'}")
        else:
            deepgram = await stack.enter_async_context(Deepgram(speak))
            settings |= {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
            print("Deepgram: a stand-in with an offline voice, without a DEEPGRAM_API_KEY")
        pacing = {"MAX_BUFFERED_SECONDS": 1e9, "MAX_SPEED": 1e9} if fast else {}
        program = Server(settings, script, cwd="/", prefix=(), flags=(), **pacing)
        server = await stack.enter_async_context(program)
        if not server.port:
            why = server.log.strip() or "its file has to call twilio_aura.main(script)"
            raise NotHeard(f"the server did not start: {why}")
        print(f"server:   {server.url}")
        seconds = len(text) / CHARACTERS_PER_SECOND
        if seconds > LONG_SECONDS and not fast:
            print(f"It takes about {seconds:.0f} s to listen to; --fast does not wait.")
        print(flush=True)

        call_sid = ""
        speed = 1000.0 if fast else 1.0
        try:
            async with dial(
                server.url, parameters=parameters, speed=speed, on_message=narrator.on_message
            ) as phone:
                call_sid = phone.call_sid
                try:
                    await listen(phone, keys)
                finally:
                    keep(bytes(phone.heard), out)
                await phone.hang_up()
            narrator.tell("server", await server.logged(f"{call_sid} ended"))
            said = transcript(bytes(phone.heard), made) if made else text
            if text and not script and visible(said) != visible(text):
                raise NotHeard("the server said something other than --text, or not all of it")
        except (NotHeard, AssertionError, OSError, WebSocketException) as error:
            # What the server says about it may still be under way.
            with contextlib.suppress(TimeoutError, AssertionError):
                async with asyncio.timeout(SILENCE_SECONDS):
                    await server.until(lambda: server.ended or f"{call_sid} ended" in server.log)
            reason = "the server has ended" if server.ended else error
            raise NotHeard(f"{reason}. The server's log:\n{server.log.strip()}") from error
        seconds = len(phone.heard) / BYTES_PER_SECOND
        print(f"\nThe caller heard all {seconds:.1f} s: listen to {out}.")


def writable(name: str) -> Path:
    """Return the path of a file that can be written, before a call is placed for nothing."""
    path = Path(name)
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written")
    return path


def script_file(name: str) -> Path:
    """Return the path of the script in a file that exists."""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name!r}")
    return Path(name).absolute()


def digits(text: str) -> list[str]:
    """Return the keys in `text`, with or without commas in between."""
    if not re.fullmatch("[0-9*#A-D,]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of 0 to 9, *, # and A to D")
    return re.findall("[^,]", text)


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
    parser.add_argument(
        "--script", type=script_file, metavar="FILE", help="a script in a file of your own"
    )
    parser.add_argument(
        "--keys",
        type=digits,
        default=[],
        help="keys that the caller presses, each after what was said, such as 1,2,#",
    )
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
