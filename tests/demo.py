"""Hear it without a phone: a simulated caller calls the real server, and what was heard is kept.

    python -m tests.demo
    python -m tests.demo --text "Guten Morgen." --model aura-2-viktoria-de --out morgen.wav
    python -m tests.demo --script menu.py --keys '1,2,*'

With a DEEPGRAM_API_KEY the voice is Deepgram's; without one, an offline stand-in's. The server has
all your settings, from the environment and .env, but for HOST, PORT, TLS_CERT, TLS_KEY and
TWILIO_AUTH_TOKEN: nothing is sent to Twilio. The exit status is 0 only if the caller heard all.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

try:
    from websockets.exceptions import ConnectionClosed, WebSocketException

    import twilio_aura
    from tests.standins import voice
    from tests.standins.deepgram import KEY, Deepgram
    from tests.standins.observed import TELLS
    from tests.standins.process import PROXY_VARIABLES, ROOT, Server
    from tests.standins.telephone import BYTES_PER_SECOND, Telephone, dial, sign
    from tests.standins.twilio import TOKEN, TwilioApi
except ImportError as error:
    print(f"{error}: pip install -r tests/demo-requirements.txt", file=sys.stderr)
    sys.exit(2)

OWN_SETTINGS = {"HOST": "127.0.0.1", "PORT": "0", "TLS_CERT": "", "TLS_KEY": ""}
FOR_A_SLOW_VOICE = {"MAX_CHARACTERS": 150, "MAX_PIECE_CHARACTERS": 150, "READ_SECONDS": 60.0}


class NotHeard(Exception):
    """The caller did not hear everything; the message says why in one sentence."""


# --- The server -----------------------------------------------------------------------------------


class ObservedServer(Server):
    """The server, which passes on each line that it prints."""

    on_line: Callable[[str], None]
    passed_on = 0

    def changed(self) -> None:
        new = self.output[self.passed_on :]
        self.passed_on += len(new)
        for line in new.splitlines():
            self.on_line(line)
        super().changed()

    async def stop(self) -> None:
        """Have it stop, and read all that it has to say."""
        if self.process.returncode is None:
            self.signal()
        with suppress(TimeoutError):
            async with asyncio.timeout(10):  # its script may do something at its end
                await self.end()


# --- The caller -----------------------------------------------------------------------------------


class Caller:
    """Plays the caller's part, by what the script tells of its own, and prints the call.

    Args:
        keys: What the caller presses, as `keys` returns it.
        verbose: Whether to print Twilio's messages, too.
        patience: How many seconds the script may neither speak nor wait.
    """

    def __init__(self, keys: list[str], verbose: bool, patience: float) -> None:
        self.heard_seconds: list[float | None] = []  # of each text; None if it was cut off
        self.is_sounding = False
        self._sound_bytes = 0  # of the text that is sounding, as far as it has come
        self._heard_bytes = 0  # before it
        self.told: list[str] = []  # lines from the server's process, not yet followed
        self._keys = keys
        self._verbose = verbose
        self._patience = patience
        self._phone: Telephone | None = None
        self._began_at = time.monotonic()
        self._has_hung_up = False
        self._unread_keys = 0
        self._is_pausing = False
        # What is known of the script.
        self._idle_moments = 0  # tenths of the patience, since it last did something
        self._is_speaking = False
        self._texts = 0  # that are over
        self._interrupted = -1  # the number of the text in which a key was pressed
        self._waits: dict[int, dict[str, Any]] = {}
        self._has_returned = False

    def print(self, what: str) -> None:
        """Print what happens now."""
        print(f"{time.monotonic() - self._began_at:6.1f} s  {what}", flush=True)

    # What is heard, by Twilio's messages

    def on_message(self, sender: str, message: str | bytes) -> None:
        """Take note of a message between Twilio and the server."""
        fields = json.loads(message)
        match sender, fields:
            case "server", {"event": "media", "media": {"payload": payload}}:
                size = len(base64.b64decode(payload))
                fields["media"]["payload"] = f"{size} bytes"
                self._begin_sound()
                self._sound_bytes += size
            case "server", {"event": "mark"}:
                self._begin_sound()  # of a text that may have none
            case "server", {"event": "clear"}:
                self._end_sound(None)
            case "Twilio", {"event": "mark"}:
                self._end_sound(self._sound_bytes / BYTES_PER_SECOND)
        if self._verbose:
            self.print(f"{sender}: {json.dumps(fields)}")

    def _begin_sound(self) -> None:
        if self._phone and not self.is_sounding:
            self.is_sounding = True
            self._sound_bytes = 0
            self._heard_bytes = len(self._phone.heard)

    def _end_sound(self, seconds: float | None) -> None:
        if self.is_sounding:  # else it is a mark that was cleared
            self.is_sounding = False
            self.heard_seconds.append(seconds)

    # What the script does, by lines from the server's process

    def on_line(self, line: str) -> None:
        """Remember what the script tells, or prints, until it can be followed."""
        self.told.append(line)
        if self._phone:
            self._phone.changed()

    async def follow(self, phone: Telephone) -> None:
        """Follow the script in all that it has told."""
        while self.told:
            printed, _, told = self.told.pop(0).partition(TELLS)
            if printed:
                print(printed, flush=True)
            event = json.loads(told or "{}")
            if event.get("event") not in ("waits", "waited") or event.get("key"):
                self._idle_moments = 0
            match event:
                case {"event": "speaks"}:
                    self._is_speaking = True
                    self._end_pause()
                case {"event": "spoke", "text": text}:
                    await phone.until(lambda: len(self.heard_seconds) > self._texts)
                    self._end_text(text)
                case {"event": "waits", "wait": wait}:
                    self._waits[wait] = event
                case {"event": "waited", "wait": wait, "key": key}:
                    self._waits.pop(wait, None)
                    if key:
                        self._unread_keys -= 1
                    else:
                        self._end_pause()
                case {"event": "returned"}:
                    self._has_returned = True

    def _end_text(self, text: str) -> None:
        quoted = '"' + " ".join(text.split()) + '"'
        seconds = self.heard_seconds[self._texts]
        if seconds is None:
            self.print(f"caller hears only the beginning of: {quoted}")
        else:
            self.print(f"caller hears: {quoted} {seconds:.1f} s")
        self._texts += 1
        self._is_speaking = False

    def _end_pause(self) -> None:
        if self._is_pausing and self._keys[0] == "w":
            self._keys.pop(0)
            self._idle_moments = 0
        self._is_pausing = False

    # What the caller does

    async def converse(self, phone: Telephone) -> None:
        """Play the caller's part until the call is over; raise NotHeard if it would never be."""
        self._phone = phone
        counting = asyncio.create_task(self._count_idle_moments(phone))
        try:
            while not self._has_hung_up and not phone.has_ended:
                await phone.until(lambda: self._has_news(phone))
                await self.follow(phone)
                with suppress(ConnectionClosed):
                    await self._act(phone)
        finally:
            counting.cancel()

    def _has_news(self, phone: Telephone) -> bool:
        is_late = self._idle_moments >= 10
        return bool(self.told) or self._may_interrupt(phone) or is_late or phone.has_ended

    def _may_interrupt(self, phone: Telephone) -> bool:
        """Return whether some of a text has been heard, and a key is to be pressed in it."""
        key = next(iter(self._keys), "")
        if not key.startswith("+") or self._interrupted == self._texts:
            return False
        if len(self.heard_seconds) != self._texts or not self.is_sounding:
            return False
        return len(phone.heard) > self._heard_bytes

    async def _act(self, phone: Telephone) -> None:
        """Do what a caller does now, if anything."""
        key = next(iter(self._keys), "")
        is_awaited = bool(self._waits) and not self._unread_keys
        if self._may_interrupt(phone):
            self._interrupted = self._texts
            await self._press(phone)
        elif self._is_speaking or self._has_hung_up:
            return
        elif is_awaited and key and key[0] not in "+w":
            await self._press(phone)
        elif self._has_returned:
            await self._hang_up(phone, "the script has returned")
        elif is_awaited and key and not self._is_pausing:
            self._is_pausing = True
            self.print("caller presses nothing")
        elif is_awaited and not key and not all(w["goes_on"] for w in self._waits.values()):
            await self._hang_up(phone, "the script waits for a key, and none is left in --keys")
        elif self._idle_moments >= 10:
            await self._lose_patience(phone)

    async def _press(self, phone: Telephone) -> None:
        key = self._keys.pop(0).removeprefix("+")
        self.print(f"caller presses {key}")
        self._unread_keys += 1
        await phone.press(key)

    async def _hang_up(self, phone: Telephone, why: str) -> None:
        if self._keys:
            why += f"; not pressed: {','.join(self._keys)}"
        self.print(f"caller hangs up: {why}")
        self._has_hung_up = True
        await phone.hang_up()

    async def _count_idle_moments(self, phone: Telephone) -> None:
        """Lose patience bit by bit, since the whole machine may stop: that is no idle script."""
        while True:
            await asyncio.sleep(self._patience / 10)
            self._idle_moments += 1
            for wait in self._waits.values():
                if wait["seconds"] is not None and (self._is_pausing or not wait["goes_on"]):
                    self._idle_moments = 0
            if self._is_speaking:
                self._idle_moments = 0
            phone.changed()

    async def _lose_patience(self, phone: Telephone) -> None:
        """Hang up on a script that waits for a key; on any other, raise NotHeard."""
        seconds = f"{self._patience:g} s"
        if not self._waits or self._unread_keys:
            raise NotHeard(f"for {seconds} the script neither said anything nor waited for a key")
        if self._keys:
            raise NotHeard(
                f"{self._keys[0]} in --keys would never end: the script waits for a key, and has "
                f"no time-out within {seconds}"
            )
        await self._hang_up(phone, f"for {seconds} the script has only waited for a key")

    def conclude(self, phone: Telephone, twilio: TwilioApi) -> None:
        """Print how the call has ended; raise ConnectionError unless the script wants it so."""
        how = f"{phone.ws.close_code} {phone.ws.close_reason}"
        if phone.call_sid in twilio.twiml:
            self.print(f"script ends the call with {twilio.twiml[phone.call_sid]}")
        elif how == "1000 completed":
            self.print(f"server ends the call: {how}")
        elif not self._has_hung_up:
            raise ConnectionError(f"the call ended: {how}")


# --- The call -------------------------------------------------------------------------------------


def server_settings() -> dict[str, str]:
    """Return the settings that are the server's; raise StartError if .env can't be read."""
    inherited = os.environ.copy()
    twilio_aura.read_dotenv(Path(".env").absolute())
    names = [*twilio_aura.SETTINGS, *PROXY_VARIABLES]
    settings = {name: os.environ[name] for name in names if name in os.environ}
    for name in os.environ.keys() - inherited.keys():
        del os.environ[name]  # a script has its own variables no sooner than without the demo
    settings |= OWN_SETTINGS
    settings["TWILIO_AUTH_TOKEN"] = TOKEN
    if not settings.get("PUBLIC_URL", "").strip():
        settings["PUBLIC_URL"] = "wss://demo.invalid"  # else the server would ask ngrok
    # The stand-ins for Deepgram and Twilio are behind no proxy.
    no_proxy = settings.get("no_proxy") or settings.get("NO_PROXY", "")
    settings["no_proxy"] = settings["NO_PROXY"] = f"127.0.0.1,{no_proxy}"
    settings["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return settings


async def demo(
    caller: Caller, text: str, model: str, script: Path | None, speed: float, out: Path
) -> None:
    """Place the call; raise NotHeard, or whatever else kept the caller from hearing."""
    settings = server_settings()
    constants: dict[str, Any] = {
        "MAX_BUFFERED_SECONDS": twilio_aura.MAX_BUFFERED_SECONDS * speed,
        "MAX_SPEED": twilio_aura.MAX_SPEED * speed,
    }
    async with AsyncExitStack() as stack:
        if settings.get("DEEPGRAM_API_KEY", "").strip():
            print(f"Deepgram: {settings.get('DEEPGRAM_URL') or 'the real one'}")
        else:
            deepgram = await stack.enter_async_context(Deepgram(voice.speak))
            settings |= {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
            constants |= FOR_A_SLOW_VOICE
            print("Deepgram: a stand-in with an offline voice, without a DEEPGRAM_API_KEY")
        seconds = len(text) / 15  # characters a second
        if seconds > 20 * speed:
            print(f"It takes about {seconds:.0f} s to listen to; --fast does not wait.")
        print(flush=True)
        twilio = await stack.enter_async_context(TwilioApi())
        constants["TWILIO_API"] = twilio.url
        serving = f"from tests.standins import observed\nobserved.serve({str(script or '')!r})"
        server = ObservedServer(settings, serving, cwd=Path.cwd(), flags=(), **constants)
        server.on_line = caller.on_line
        await stack.enter_async_context(server)
        if not server.port:
            why = server.log.strip() or "its file has to call twilio_aura.main(script)"
            raise NotHeard(f"the server did not start: {why}")
        caller.told.clear()  # by the server itself
        try:
            async with dial(
                server.url,
                parameters={n: value for n, value in (("text", text), ("model", model)) if value},
                headers=sign(twilio_aura.stream_url(settings["PUBLIC_URL"]), TOKEN),
                speed=speed,
                on_message=caller.on_message,
            ) as phone:
                twilio.phones.append(phone)
                try:
                    await caller.converse(phone)
                finally:
                    if phone.heard:
                        voice.write_wav(phone.heard, out)
            await server.stop()
            await caller.follow(phone)
            caller.conclude(phone, twilio)
        except (AssertionError, OSError, WebSocketException) as error:
            await server.stop()
            raise NotHeard(f"{error}. The server's log:\n{server.log.strip()}") from error
        seconds = len(phone.heard) / BYTES_PER_SECOND
        if not seconds:
            print("\nNothing was said, so there is no recording.")
        elif None not in caller.heard_seconds and not caller.is_sounding:
            print(f"\nThe caller heard all {seconds:.1f} s: listen to {out}.")
        else:
            print(f"\nThe caller heard {seconds:.1f} s, all but what was cut off: listen to {out}.")


# --- The command line -----------------------------------------------------------------------------


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


def keys(text: str) -> list[str]:
    """Return the keys in `text`, with or without commas in between."""
    if not re.fullmatch(r"(\+?[0-9*#A-D]|w|,)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,+2,w,# (see --help)")
    return re.findall(r"\+?[^,+]", text)


def main() -> int:
    """Place the call that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--text", type=str.strip, default="", help="what is said (default: the greeting)")
    option("--model", default="", help="the voice (default: DEEPGRAM_MODEL)")
    option("--script", type=script_file, metavar="FILE", help="a script in a file of your own")
    keys_help = "1 when awaited, +2 during speech, w lets time run out"
    option("--keys", type=keys, default=[], metavar="1,+2,w,#", help=keys_help)
    option("--out", type=writable, default="call.wav", help="default: %(default)s")
    option("--fast", action="store_true", help="don't listen in real time, unless a + is in --keys")
    option("--verbose", action="store_true", help="print Twilio's messages, too")
    patience_help = "for a script that neither speaks nor waits for a key (default: %(default)g)"
    option("--patience", type=float, default=60.0, metavar="SECONDS", help=patience_help)
    options = parser.parse_args()
    caller = Caller(options.keys, options.verbose, options.patience)
    speed = 1.0
    if options.fast and "+" not in "".join(options.keys):
        speed = 1000.0
    call = demo(caller, options.text, options.model, options.script, speed, options.out)
    try:
        asyncio.run(call)
    except KeyboardInterrupt:
        print("\nYou rang off before the caller had heard everything.", file=sys.stderr)
        return 130
    except (NotHeard, twilio_aura.StartError, OSError) as error:
        print(f"\nThe caller did not hear everything: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
