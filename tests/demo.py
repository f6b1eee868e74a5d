"""Hear it without a phone: a simulated caller calls the real server, and what was heard is kept.

    python -m tests.demo
    python -m tests.demo --text "Guten Morgen." --model aura-2-viktoria-de --out morgen.wav
    python -m tests.demo --script menu.py --param name=Ann --keys '1,+2,*'

With a DEEPGRAM_API_KEY the voice is Deepgram's; without one, an offline stand-in's. The server has
all your settings, from the environment and .env, but for HOST, PORT, TLS_CERT, TLS_KEY,
TWILIO_AUTH_TOKEN and TWILIO_API_URL: nothing is sent to Twilio. The exit status is 0 only if the
caller heard all, and nothing is wrong in the server's log, of which warnings and errors are shown.
The times are those of the recording, in which there are no pauses with --fast.

For a caller of your own there is the server alone, with the offline voice and all your settings;
and for a server that is running, the caller alone, who does not know what the script waits for:

    python -m tests.demo --serve --script menu.py
    python -m tests.demo --call ws://localhost:5000/twilio --keys 1,2
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import site
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

try:
    from websockets.exceptions import ConnectionClosed, WebSocketException

    import twilio_aura
    from tests.standins import Observable, voice
    from tests.standins.deepgram import KEY, Deepgram
    from tests.standins.observed import TELLS, observe
    from tests.standins.process import MODULE, PROXY_VARIABLES, ROOT, Server
    from tests.standins.telephone import BYTES_PER_SECOND, Telephone, dial, sign
    from tests.standins.twilio import TOKEN, TwilioApi
except ImportError as error:
    how = "pip install -r tests/demo-requirements.txt && python -m tests.demo"
    print(f"{error}. Run this in the directory of twilio_aura.py: {how}", file=sys.stderr)
    sys.exit(2)

OWN_SETTINGS = {"HOST": "127.0.0.1", "PORT": "0", "TWILIO_AUTH_TOKEN": TOKEN}
FOR_A_SLOW_VOICE = {"READ_SECONDS": 60.0, "MAX_SILENCE_SECONDS": 60.0}  # on a busy machine
STOP_SECONDS = 5.0  # for the server and its script, which may do something at its end
TICK_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
# Of a caller who does not know what the script does: after the first he presses the next key, after
# the second he hangs up.
QUIET_SECONDS = 2.0
SILENCE_SECONDS = 10.0
HARMLESS = re.compile(r"\S+ \S+ (?:INFO|DEBUG) ")  # lines of the server's log
COMPLAINT = re.compile(
    r"\S+ \S+ (?:WARNING|ERROR|CRITICAL) |.+:\d+: \w*Warning: |Exception ignored in"
)


class NoSuccess(Exception):
    """Something went wrong; the message says what in one sentence."""


class NotHeard(NoSuccess):
    """The caller did not hear everything; the message says why."""

    def __init__(self, why: object) -> None:
        super().__init__(f"The caller did not hear everything: {why}")


# --- The server -----------------------------------------------------------------------------------


class ObservedServer(Server):
    """The server; it tells what its script does, and its complaints are printed as they come.

    Args:
        settings: Its environment.
        script: A file, or None for the module's own; in a test, it may be a function.
        phones: Those that call it, which are to notice what it tells.
        verbose: Whether to print all that it logs.
        constants: Attributes of the module that are set.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        script: Path | Callable[..., object] | None,
        phones: Sequence[Observable],
        verbose: bool,
        constants: Mapping[str, Any],
    ) -> None:
        # With -P, as with `python FILE`, modules are not looked for in the current directory.
        super().__init__(
            settings, script, before=observe, cwd=Path.cwd(), flags=["-P"], **constants
        )
        self.has_complained = False
        self._phones = phones
        self._verbose = verbose

    def changed(self) -> None:
        super().changed()
        for phone in self._phones:
            phone.changed()

    def _take_log(self, line: str) -> None:
        super()._take_log(line)
        if self._verbose or not HARMLESS.match(line):
            print(line, end="", file=sys.stderr, flush=True)
        if COMPLAINT.match(line):
            self.has_complained = True

    async def stop(self) -> None:
        """Have it stop, and read all that it has to say."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.signal()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self.end()


# --- The caller -----------------------------------------------------------------------------------


class Caller:
    """Hears a call, prints what happens in it, and plays the caller's part as a subclass says.

    Args:
        options: The command line's.
        patience: For how many seconds nothing may happen.
    """

    phone: Telephone

    def __init__(self, options: argparse.Namespace, patience: float) -> None:
        self.keys: list[str] = list(options.keys)  # still to be pressed
        self.patience = options.patience or patience
        self.longest = options.longest
        self.verbose = options.verbose
        self.has_hung_up = False
        self.is_all_heard = True  # so far
        self.is_sounding = False  # from a text's first sound on, until all of it was heard
        self.idle_seconds = 0.0
        self.received = 0  # messages from the server
        self.sounds: list[tuple[int, float, int]] = []  # number of the message, time, bytes
        self._began_at = time.monotonic()
        self._heard_bytes = 0  # before the text that sounds
        self._has_pressed = False  # a key while it sounds
        self._has_ticked = False
        self._held_back: list[str] = []  # lines that come after that of a text

    # What a subclass decides

    def is_in_text(self) -> bool:
        """Return whether a text is being spoken, so that its line is still to come."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Return whether nothing happens, and the caller will not wait for ever."""
        raise NotImplementedError

    async def act(self) -> None:
        """Do what a caller does now, if anything; raise NotHeard if there is no point in it."""
        raise NotImplementedError

    def has_news(self) -> bool:
        """Return whether to act now."""
        return self._has_ticked or self.must_press()

    # What is printed

    def print(self, what: str) -> None:
        """Print what happens now; if it is while a text is spoken, then after the text's line."""
        line = self._line(time.monotonic(), what)
        if self.is_in_text():
            self._held_back.append(line)
        else:
            print(line, flush=True)

    def print_text(self, began_at: float, what: str) -> None:
        """Print the line of a text, and then what was held back for it."""
        self._held_back.insert(0, self._line(began_at, what))
        self.print_rest()

    def print_rest(self) -> None:
        """Print what was held back."""
        for line in self._held_back:
            print(line, flush=True)
        self._held_back.clear()

    def _line(self, at: float, what: str) -> str:
        return f"{at - self._began_at:6.1f} s  {what}"

    # What is heard

    def on_message(self, sender: str, message: str | bytes) -> None:
        """Take note of a message between Twilio and the server."""
        fields = json.loads(message)
        if sender == "server":
            self.received += 1
        match sender, fields:
            case "server", {"event": "media", "media": {"payload": payload}}:
                size = len(base64.b64decode(payload))
                fields["media"]["payload"] = f"{size} bytes"
                if not self.is_sounding:
                    self.begin_sound()
                self.sounds.append((self.received, time.monotonic(), size))
            case "server", {"event": "clear"}:
                self.end_sound(is_heard=False)
            case "Twilio", {"event": "mark"}:
                self.end_sound(is_heard=True)
        if self.verbose:
            self.print(f"{sender}: {json.dumps(fields)}")

    def begin_sound(self) -> None:
        """Take note that a text begins to sound."""
        self.is_sounding = True
        self._heard_bytes = len(self.phone.heard)
        self._has_pressed = False

    def end_sound(self, is_heard: bool) -> None:  # noqa: ARG002 - a subclass may ask
        """Take note that all of it was heard, or that it was cut off."""
        self.is_sounding = False

    # What is done

    async def converse(self) -> None:
        """Play the caller's part until the call is over; raise NotHeard if it would never be."""
        self._began_at = time.monotonic()
        ticking = asyncio.create_task(self._tick())
        try:
            while not self.has_hung_up and not self.phone.has_ended:
                await self.phone.until(lambda: self.has_news() or self.phone.has_ended)
                self._has_ticked = False
                with suppress(ConnectionClosed):
                    await self.act()
                self._check_length()
        finally:
            ticking.cancel()

    def _check_length(self) -> None:
        heard_seconds = len(self.phone.heard) / BYTES_PER_SECOND
        if max(heard_seconds, time.monotonic() - self._began_at) > self.longest:
            raise NotHeard(
                f"the call has not ended after {self.longest:g} s; if no loop in the script goes "
                "on for ever, --longest allows more"
            )

    async def _tick(self) -> None:
        """Count the idle seconds, though not those in which the whole machine stands still."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.idle_seconds += TICK_SECONDS
            if not self.is_idle():
                self.idle_seconds = 0.0
            self._has_ticked = True
            self.phone.changed()

    def next_key(self) -> str:
        """Return the next key with what stands before it, or "" if none is left."""
        return next(iter(self.keys), "")

    def must_press(self) -> bool:
        """Return whether it is time for the next key, whatever the script waits for."""
        key = self.next_key()
        if not key.startswith("+"):
            return key.startswith("@")
        is_heard = len(self.phone.heard) > self._heard_bytes
        return self.is_sounding and is_heard and not self._has_pressed

    async def press(self) -> None:
        """Press the next key."""
        key = self.keys.pop(0).lstrip("+@")
        self._has_pressed = self.is_sounding
        self.idle_seconds = 0.0
        self.print(f"caller presses {key}")
        await self.phone.press(key)

    async def hang_up(self, why: str) -> None:
        """Hang up, and say why."""
        if self.keys:
            why += f"; not pressed: {','.join(self.keys)}"
        self.print(f"caller hangs up: {why}")
        self.has_hung_up = True
        await self.phone.hang_up()

    def ended(self) -> str:
        """Return how the server has ended the call."""
        return f"{self.phone.ws.close_code} {self.phone.ws.close_reason}".strip()


class FollowingCaller(Caller):
    """Knows what the script does, since the server's process tells."""

    def __init__(
        self, options: argparse.Namespace, server: ObservedServer, twilio: TwilioApi
    ) -> None:
        super().__init__(options, PATIENCE_SECONDS)
        self._server = server
        self._twilio = twilio
        self._followed = 0  # characters of what the server has told
        self._unread_keys = 0
        self._is_pausing = False
        # What is known of the script.
        self._texts = 0  # that it says, and that wait for their turn
        self._waits: dict[int, dict[str, Any]] = {}
        self._has_returned = False

    def is_in_text(self) -> bool:
        return self._texts > 0

    def is_idle(self) -> bool:
        for wait in self._waits.values():
            if wait["seconds"] is not None and (self._is_pausing or not wait["goes_on"]):
                return False  # The script's own time-out ends this.
        return True

    def has_news(self) -> bool:
        return super().has_news() or self._followed < len(self._server.output)

    # What the script does

    async def follow(self) -> None:
        """Follow the script in all that it has told, and print what it has printed."""
        while self._followed < len(self._server.output):
            line, _, _ = self._server.output[self._followed :].partition("\n")
            self._followed += len(line) + 1
            printed, _, told = line.partition(TELLS)
            if printed:
                print(printed, flush=True)
            if told:
                await self._follow(json.loads(told))

    def skip_announcement(self) -> None:
        """Print what the script's file prints, but not where the server listens."""
        printed, _, _ = self._server.output.partition("Listening on ")
        print(printed, end="", flush=True)
        self._followed = len(self._server.output)

    async def _follow(self, event: dict[str, Any]) -> None:
        if event["event"] not in ("waits", "waited", "asked") or event.get("key"):
            self.idle_seconds = 0.0
        match event:
            case {"event": "speaks"}:
                self._texts += 1
                self._end_pause()
            case {"event": "spoke", "text": text, "heard": heard, "sent": sent}:
                await self.phone.until(lambda: self.received >= sent or self.phone.has_ended)
                self._end_text(text, heard, sent)
            case {"event": "waits", "wait": wait}:
                self._waits[wait] = event
            case {"event": "waited", "wait": wait, "key": key}:
                self._waits.pop(wait, None)
                if key:
                    self._unread_keys -= 1
                else:
                    if self.next_key() == "w" and not self._texts:
                        self._begin_pause()  # The time has run out before this was followed.
                    self._end_pause()
            case {"event": "returned"}:
                self._has_returned = True
        if event.get("gets"):
            self.print(f'script gets "{event["gets"]}"')

    def _end_text(self, text: str, heard: bool | None, sent: int) -> None:
        """Print what was heard of a text, after which the server had sent so many messages."""
        self._texts -= 1
        sounds = [sound for sound in self.sounds if sound[0] <= sent]
        del self.sounds[: len(sounds)]
        quoted = '"' + " ".join(text.split()) + '"'
        if not heard:
            self.is_all_heard = False
        if sounds and heard:
            seconds = sum(size for _, _, size in sounds) / BYTES_PER_SECOND
            what = f"caller hears: {quoted} {seconds:.1f} s"
        elif sounds:
            what = f"caller hears only the beginning of: {quoted}"
        elif heard:
            what = f"caller hears nothing: there is nothing to say in {json.dumps(text)}"
        else:
            what = f"caller does not hear: {quoted}"
        began_at = sounds[0][1] if sounds else time.monotonic()
        self.print_text(began_at, what)

    def _begin_pause(self) -> None:
        if not self._is_pausing:
            self._is_pausing = True
            self.print("caller presses nothing")

    def _end_pause(self) -> None:
        if self._is_pausing and self.next_key() == "w":
            self.keys.pop(0)
            self.idle_seconds = 0.0
        self._is_pausing = False

    # What the caller does

    async def act(self) -> None:
        await self.follow()
        key = self.next_key()
        is_awaited = bool(self._waits) and not self._unread_keys
        if self.must_press():
            await self.press()
        elif self._texts or self.phone.has_ended:
            return
        elif is_awaited and key and key[0] not in "+w":
            await self.press()
        elif self._has_returned:
            await self.hang_up("the script has returned")
        elif is_awaited and key:
            self._begin_pause()
            if self.idle_seconds >= self.patience:
                raise NotHeard(
                    f"{key} in --keys would never end: the script waits for a key, and has no "
                    f"time-out within {self.patience:g} s"
                )
        elif is_awaited and not all(w["goes_on"] for w in self._waits.values()):
            await self.hang_up("the script waits for a key, and none is left in --keys")
        elif self.idle_seconds >= self.patience:
            await self._lose_patience()

    async def press(self) -> None:
        self._unread_keys += 1
        await super().press()

    async def _lose_patience(self) -> None:
        """Hang up on a script that waits for a key; on any other, raise NotHeard."""
        seconds = f"{self.patience:g} s"
        if not self._waits or self._unread_keys:
            raise NotHeard(f"for {seconds} the script neither said anything nor waited for a key")
        await self.hang_up(f"for {seconds} the script has only waited for a key")

    def conclude(self) -> None:
        """Print how the call has ended; raise NotHeard unless the script wants it so."""
        twiml = self._twilio.twiml.get(self.phone.call_sid)
        if twiml:
            self.print(f"script ends the call with {twiml}")
        elif self.ended() == "1000 completed":
            self.print(f"server ends the call: {self.ended()}")
        elif not self.has_hung_up:
            raise NotHeard(f"the call ended: {self.ended()}")


class ListeningCaller(Caller):
    """Knows nothing of the script but what is heard.

    Where it is quiet after a text, he presses the next key, or hangs up in the end.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, SILENCE_SECONDS)
        self._has_heard = False  # a text to its end
        self._is_pausing = False

    def is_in_text(self) -> bool:
        return self.is_sounding

    def is_idle(self) -> bool:
        return not self.is_sounding

    def begin_sound(self) -> None:
        super().begin_sound()
        if self._is_pausing:
            self.keys.pop(0)
            self._is_pausing = False

    def end_sound(self, is_heard: bool) -> None:
        super().end_sound(is_heard)
        if not self.sounds:
            return
        self._has_heard = True
        began_at = self.sounds[0][1]
        seconds = sum(size for _, _, size in self.sounds) / BYTES_PER_SECOND
        self.sounds.clear()
        if is_heard:
            self.print_text(began_at, f"caller hears {seconds:.1f} s")
        else:
            self.is_all_heard = False
            self.print_text(began_at, "caller hears only the beginning of something")

    async def act(self) -> None:
        key = self.next_key()
        is_quiet = self._has_heard and self.idle_seconds >= QUIET_SECONDS
        if self.must_press():
            await self.press()
        elif is_quiet and key == "w" and not self._is_pausing:
            self._is_pausing = True
            self.print("caller presses nothing")
        elif is_quiet and key and key[0] not in "+w":
            await self.press()
        elif self.idle_seconds >= self.patience:
            await self.hang_up(f"nothing was heard for {self.patience:g} s")

    def conclude(self) -> None:
        """Print how the call has ended; raise NotHeard unless it is well."""
        if self.is_sounding:
            self.end_sound(is_heard=False)
        if not self.has_hung_up and self.phone.ws.close_code != 1000:
            raise NotHeard(f"the call ended: {self.ended()}")
        if not self.has_hung_up:
            self.print(f"server ends the call: {self.ended()}")
        if not self.phone.heard:
            raise NotHeard("nothing was said")


# --- The call -------------------------------------------------------------------------------------


def server_settings() -> dict[str, str]:
    """Return what is set of the server's settings; raise StartError if one of them is wrong."""
    inherited = os.environ.copy()
    try:
        twilio_aura.read_dotenv()
        names = [*twilio_aura.SETTINGS, *PROXY_VARIABLES]
        # In a copy of .env.example the key is empty, which counts as not set.
        settings = {name: os.environ[name] for name in names if os.environ.get(name, "").strip()}
        os.environ["DEEPGRAM_API_KEY"] = settings.get("DEEPGRAM_API_KEY", KEY)
        twilio_aura.Settings.load()  # Those that the demo replaces may be wrong, too.
    finally:
        # A script has its own variables no sooner than without the demo.
        os.environ.clear()
        os.environ.update(inherited)
    return settings


def without_proxy(settings: Mapping[str, str]) -> dict[str, str]:
    """Return what is set so that no proxy stands before the stand-ins."""
    others = settings.get("no_proxy") or settings.get("NO_PROXY", "")
    return dict.fromkeys(["no_proxy", "NO_PROXY"], f"127.0.0.1,{others}")


def name_unknown_voices(deepgram: Deepgram) -> None:
    """Print which voices were asked for that Deepgram does not have."""
    for model in sorted({asked.model for asked in deepgram.requests if asked.status == 400}):
        print(
            f"The voice {model} is unknown: Deepgram's list of November 2026 does not have it.",
            file=sys.stderr,
        )


def print_how_to_start(script: Path) -> None:
    """Print how the server is started with `script`, if Python would not find the module there."""
    places = [str(script.parent), *site.getsitepackages(), site.getusersitepackages()]
    places += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if not PathFinder.find_spec("twilio_aura", places):
        here = Path.cwd()
        root, file = (
            path.relative_to(here) if path.is_relative_to(here) else path for path in (ROOT, script)
        )
        print(
            f"To start the server itself: PYTHONPATH={root} python {file}\n"
            "(without it: ModuleNotFoundError: No module named 'twilio_aura')"
        )


def recording(phone: Telephone) -> bytes:
    """Return what was heard, with the pauses in it."""
    parts: list[bytes | bytearray] = []
    position = 0
    for seconds, heard_bytes in phone.pauses:
        parts.append(phone.heard[position:heard_bytes])
        parts.append(b"\xff" * round(seconds * BYTES_PER_SECOND))  # silence
        position = heard_bytes
    return b"".join([*parts, phone.heard[position:]])


async def place_call(
    caller: Caller,
    url: str,
    headers: dict[str, str],
    options: argparse.Namespace,
    phones: list[Any],
) -> None:
    """Call `url`, and keep what was heard; raise NotHeard, OSError or WebSocketException."""
    async with dial(
        url,
        start=False,
        headers=headers,
        speed=options.speed,
        on_message=caller.on_message,
        close_timeout=STOP_SECONDS,
    ) as phone:
        caller.phone = phone
        phones.append(phone)
        await phone.start(**dict(options.param))
        try:
            await caller.converse()
        except AssertionError as violation:  # of the protocol
            raise NotHeard(violation) from None
        finally:
            if phone.heard:
                is_fast = options.speed > 1
                voice.write_wav(phone.heard if is_fast else recording(phone), options.out)


async def demo(
    options: argparse.Namespace,
    script: Path | Callable[..., object] | None,
    constants: Mapping[str, object],
) -> None:
    """Have the server called; raise NoSuccess, or StartError, or OSError."""
    settings = server_settings()
    async with AsyncExitStack() as stack:
        if "DEEPGRAM_API_KEY" in settings:
            print(f"Deepgram: {settings.get('DEEPGRAM_URL', 'the real one')}")
        else:
            deepgram = await stack.enter_async_context(Deepgram(voice.speak, knows_voices=True))
            stack.callback(name_unknown_voices, deepgram)
            settings |= {"DEEPGRAM_API_KEY": KEY, "DEEPGRAM_URL": deepgram.url}
            constants = {**FOR_A_SLOW_VOICE, **constants}
            print("Deepgram: a stand-in with an offline voice, without a DEEPGRAM_API_KEY")
        if isinstance(script, Path):
            print_how_to_start(script)
        seconds = len(dict(options.param).get("text", "")) / 15  # characters a second
        if seconds > 20 * options.speed:
            print(f"It takes about {seconds:.0f} s to listen to; --fast does not wait.")
        print(flush=True)
        twilio = await stack.enter_async_context(TwilioApi())
        settings |= OWN_SETTINGS | without_proxy(settings)
        settings.pop("TLS_CERT", None)
        settings["TWILIO_API_URL"] = twilio.url
        settings.setdefault("PUBLIC_URL", "wss://demo.invalid")  # else the server would ask ngrok
        settings["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        constants = {
            "MAX_BUFFERED_SECONDS": twilio_aura.MAX_BUFFERED_SECONDS * options.speed,
            "PAUSE_SHARE": twilio_aura.PAUSE_SHARE / options.speed,
            **constants,
        }
        server = ObservedServer(settings, script, twilio.phones, options.verbose, constants)
        await stack.enter_async_context(server)
        if not server.port:
            why = "see above"
            if not server.full_log:
                why = "its file has to call twilio_aura.main(script)"
            raise NotHeard(f"the server did not start: {why}")
        caller = FollowingCaller(options, server, twilio)
        caller.skip_announcement()
        headers = sign(twilio_aura.stream_url(settings["PUBLIC_URL"]), TOKEN)
        try:
            await place_call(caller, server.url, headers, options, twilio.phones)
        finally:
            await server.stop()
            if twilio.phones:
                await caller.follow()
                caller.print_rest()
        caller.conclude()
        print_result(caller, options)
        if server.has_complained:
            raise NoSuccess("It is no success: the server's log has a warning or an error, above.")


def print_result(caller: Caller, options: argparse.Namespace) -> None:
    """Print how much was heard, and where it is."""
    seconds = len(caller.phone.heard) / BYTES_PER_SECOND
    if not seconds:
        print("\nNothing was said, so there is no recording.")
    elif caller.is_all_heard:
        print(f"\nThe caller heard all {seconds:.1f} s: listen to {options.out}.")
    else:
        heard = f"{seconds:.1f} s, but not all that was to be said"
        print(f"\nThe caller heard {heard}: listen to {options.out}.")


async def call_running_server(options: argparse.Namespace) -> None:
    """Call a server that is running already; raise NoSuccess, or StartError, or OSError."""
    settings = server_settings()
    headers = {}
    if "TWILIO_AUTH_TOKEN" in settings:
        url = twilio_aura.stream_url(settings.get("PUBLIC_URL", options.call))
        headers = sign(url, settings["TWILIO_AUTH_TOKEN"])
    caller = ListeningCaller(options)
    await place_call(caller, options.call, headers, options, [])
    caller.conclude()
    print_result(caller, options)


async def serve(script: Path | None) -> int:
    """Run the server with the offline voice; return its exit status."""
    settings = server_settings()
    if script:
        print_how_to_start(script)
    async with Deepgram(voice.speak, knows_voices=True) as deepgram:
        print("Deepgram: a stand-in with an offline voice", flush=True)
        environment = {
            **os.environ,
            **without_proxy(settings),
            "DEEPGRAM_API_KEY": KEY,
            "DEEPGRAM_URL": deepgram.url,
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{ROOT}",
        }
        command = [sys.executable, str(script or MODULE)]
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, start_new_session=True
        )

        def pass_on(signum: int, _: object) -> None:
            process.send_signal(signum)

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, pass_on)
        return await process.wait()


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
    if not re.fullmatch(r"([+@]?[0-9*#A-D]|w|,)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,+2,@3,w,# (see --help)")
    return re.findall(r"[+@]?[^,+@]", text)


def parameter(text: str) -> tuple[str, str]:
    """Return the name and the value of a <Parameter>."""
    name, is_there, value = text.partition("=")
    if not name or not is_there:
        raise argparse.ArgumentTypeError(f"{text!r} is not like name=Ann")
    return name, value


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; exit with a sentence if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--text", type=str.strip, default="", help="what is said (default: the greeting)")
    option("--model", default="", help="the voice (default: DEEPGRAM_MODEL)")
    option(
        "--param",
        type=parameter,
        action="append",
        default=[],
        metavar="name=Ann",
        help="a <Parameter> of the TwiML; may be given several times",
    )
    option("--script", type=script_file, metavar="FILE", help="a script in a file of your own")
    keys_help = "1 when awaited, +2 in speech, @3 at once, w lets time pass"
    option("--keys", type=keys, default=[], metavar="1,+2,@3,w", help=keys_help)
    option("--out", type=writable, default="call.wav", help="default: %(default)s")
    fast_help = "don't listen in real time, unless a + is in --keys"
    option("--fast", action="store_true", help=fast_help)
    option("--verbose", action="store_true", help="print Twilio's messages and all of the log, too")
    patience_help = (
        f"seconds for a script that neither speaks nor waits for a key (default: "
        f"{PATIENCE_SECONDS:g}), or with --call for silence (default: {SILENCE_SECONDS:g})"
    )
    option("--patience", type=float, metavar="S", help=patience_help)
    longest_help = "seconds for a script that may never end (default: %(default)g)"
    option("--longest", type=float, default=300.0, metavar="S", help=longest_help)
    option = parser.add_mutually_exclusive_group().add_argument
    option("--serve", action="store_true", help="only the server, with an offline voice")
    option("--call", metavar="URL", help="only the caller, for a server that is running")
    options = parser.parse_args(arguments)
    for name in ("text", "model"):
        if getattr(options, name):
            options.param.append((name, getattr(options, name)))
    if options.call and (options.script or options.fast):
        parser.error("a server that is running has its own script and time")
    options.speed = 1.0
    if options.fast and "+" not in "".join(options.keys):
        options.speed = 1000.0
    return options


async def run(
    arguments: list[str], script: Callable[..., object] | None = None, **constants: object
) -> int:
    """Do as the command line says; return the exit status.

    Args:
        arguments: The command line.
        script: In place of a file, in a test.
        constants: Attributes of the module that are set in the server, in a test.
    """
    options = parse(arguments)
    try:
        if options.serve:
            return await serve(options.script)
        if options.call:
            await call_running_server(options)
        else:
            await demo(options, script or options.script, constants)
    except NoSuccess as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except (twilio_aura.StartError, OSError, WebSocketException) as error:
        print(f"\n{NotHeard(error)}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Run it; return the exit status."""
    try:
        return asyncio.run(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nYou rang off before the caller had heard everything.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
