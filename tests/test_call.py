"""A call from its start to its end, as the caller hears it."""

import asyncio
import itertools
import random
import re
import socket
from contextlib import suppress

import psutil
import pytest
import requests

from tests.standins import poll
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import HANDSHAKE, dial, frame


async def test_greeting(server: Server) -> None:
    """A caller hears the greeting, and the call stays open until the caller hangs up."""
    async with dial(server.url) as phone:
        await phone.hears(noise(GREETING))
        await phone.hang_up()
    assert phone.ws.close_code == 1000
    ended = await server.until_ended(phone.call_sid)
    assert re.fullmatch(r"hung up; first audio \d+ ms; sent (\d\.\d) s, heard \1 s", ended)


async def test_parameters(server: Server) -> None:
    """The TwiML's text and model are used instead of the settings."""
    async with dial(server.url, parameters={"text": "Guten Tag.", "model": "aura-2-lara-de"}) as p:
        await p.hears(noise("Guten Tag.", "aura-2-lara-de"))


async def test_awkward_parameters(server: Server) -> None:
    """A parameter that is called like Twilio's media does not hide a start."""
    async with dial(server.url, parameters={"text": "Hm.", "event": "media", "payload": "x"}) as p:
        await p.hears(noise("Hm."))


async def test_blank_model(server: Server) -> None:
    """A template's value that is empty names no voice."""
    async with dial(server.url, parameters={"text": "Hm.", "model": " "}) as phone:
        await phone.hears(noise("Hm."))


@pytest.mark.parametrize("times", [1, 120])
async def test_text_is_not_logged(closes_after_speech: Server, times: int) -> None:
    """What is said to a caller, in one piece or in several, is not logged, not even at DEBUG."""
    text = "Between you and me. " * times
    async with dial(closes_after_speech.url, parameters={"text": text}) as phone:
        assert await phone.until_closed() == 1000
    await closes_after_speech.until_ended(phone.call_sid)
    assert "Between you and me" not in closes_after_speech.log


async def test_caller_is_not_listened_to(server: Server) -> None:
    """The caller's voice, before, during and after the speech, changes nothing."""
    async with dial(server.url, start=False) as phone:
        await phone.start()
        await phone.voice(50)
        await phone.hears(noise(GREETING))
        await phone.voice(50)
        await phone.hang_up()


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_streaming(server: Server, deepgram: Deepgram, framing: str) -> None:
    """The first frame leaves before the body has ended, in whole frames but the last."""
    go = asyncio.Event()
    audio = noise(framing) + b"odd"
    answer = Answer(audio, framing=framing, write_sizes=(1001, 333, 1), gate=go)
    text = deepgram.answer(f"streamed, {framing}", answer)
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until(lambda: len(phone.received) == 960)
        go.set()
        await phone.hears(audio)
        assert [size for size in phone.media_sizes[:-1] if size % 160] == []


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("sizes", [(1,), (159,), (161,), (3, 1, 70_000)])
async def test_every_byte(
    server: Server, deepgram: Deepgram, framing: str, sizes: tuple[int, ...]
) -> None:
    """Every byte arrives, in order, once, whatever the sizes of Deepgram's chunks."""
    text = deepgram.answer(
        f"every byte {framing} {sizes}", Answer(framing=framing, write_sizes=sizes)
    )
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.hears(noise(text))


async def test_less_than_a_frame(server: Server, deepgram: Deepgram) -> None:
    """Speech of less than 20 ms is heard, too."""
    text = deepgram.answer("tick", Answer(b"12345"))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.hears(b"12345")
        assert phone.media_sizes == [5]


async def test_small_messages(server: Server, deepgram: Deepgram) -> None:
    """A message has at most 0.4 s of audio: on a slow link, too, the first is soon through."""
    text = deepgram.answer("in small messages", Answer(noise("small") * 9, write_sizes=(30_000,)))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.hears(noise("small") * 9)
    assert max(phone.media_sizes) == 3200


@pytest.mark.parametrize("text", ["...", "😊", "*** \n ***"])
async def test_nothing_to_say(deepgram: Deepgram, text: str) -> None:
    """A text without a letter or a digit is nothing to say, and not asked for."""
    script = f"async def script(call):\n    yield {text!r}\n    yield 'After it.'\n"
    async with Server({"DEEPGRAM_URL": deepgram.url}, script) as server, dial(server.url) as phone:
        await phone.hears(noise("After it."))
    assert not deepgram.asked(text)


@pytest.mark.parametrize("text", ["", " ", " \n "])
async def test_empty_parameter(server: Server, text: str) -> None:
    """A parameter of white space, as of an empty template, is no text: the greeting is said."""
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.hears(noise(GREETING))


async def test_close_after_speech(closes_after_speech: Server) -> None:
    """With CLOSE_AFTER_SPEECH the call is closed, but not before all has been heard."""
    async with dial(closes_after_speech.url) as phone:
        assert await phone.until_closed() == 1000
        assert phone.heard == noise(GREETING)
    assert (await closes_after_speech.until_ended(phone.call_sid)).startswith("completed;")


async def test_deadlines(deepgram: Deepgram) -> None:
    """Without a start a call ends before one that hears nothing, if its time-out is shorter."""
    text = deepgram.answer("says nothing", Answer(stop_after=-1, failure="stall"))
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, START_SECONDS=1, MAX_SILENCE_SECONDS=4) as server,
        dial(server.url, start=False) as no_start,
        dial(server.url, parameters={"text": text}) as silent,
    ):
        assert await no_start.until_closed() == 1008
        assert not silent.has_ended  # both clocks are the server's
        assert await silent.until_closed() == 1011


# Hang-up


MOMENTS = ["connected", "started", "speaking", "heard"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["stop", "stop only", "close", "drop"])
async def test_hang_up(server: Server, deepgram: Deepgram, moment: str, how: str) -> None:
    """A hang-up at any moment, in any way, ends the call quietly, and the next one works."""
    go = asyncio.Event()
    text = f"hang-up {moment} {how}"
    deepgram.answer(
        text, Answer(write_sizes=(1, 1000) if moment == "started" else (1000,), gate=go)
    )
    before = len(server.log)
    async with dial(server.url, start=False) as phone:
        if moment != "connected":
            await phone.start(text=text)
            await deepgram.until_asked(text)
        if moment == "speaking":
            await phone.until_sound()
        if moment == "heard":
            go.set()
            await phone.until_heard(noise(text))
        match how:
            case "drop":
                phone.drop()
            case "stop only":
                await phone.send("stop", stop={"callSid": phone.call_sid})
                assert await phone.until_closed() == 1000
            case _:
                await phone.hang_up(stop=how == "stop")
        await server.until(lambda: "ended: hung up" in server.log[before:])
    go.set()
    assert server.complaints(before) == []
    async with dial(server.url) as phone:
        await phone.hears(noise(GREETING))


@pytest.mark.parametrize(
    ("seconds", "max_silence_seconds", "outcome"), [(0.3, 1000, "completed"), (500, 1, "no audio")]
)
async def test_peer_that_reads_nothing(
    deepgram: Deepgram, seconds: float, max_silence_seconds: float, outcome: str
) -> None:
    """Who stops reading is let go, whether the network still takes all of the speech or not."""
    sound = random.Random(0).randbytes(int(seconds * 8000))
    text = deepgram.answer(f"{seconds} s for nobody", Answer(sound, write_sizes=(100_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url, "CLOSE_AFTER_SPEECH": "yes"}
    async with Server(
        settings,
        BYTES_PER_SECOND=80_000_000,  # as if all had been played as soon as it was sent
        MAX_SILENCE_SECONDS=max_silence_seconds,
        MARK_GRACE_SECONDS=0.3,
        CLOSE_SECONDS=0.5,
    ) as server:
        async with dial(server.url, start=False) as phone:
            phone.ws.transport.pause_reading()
            await phone.start(text=text)
            ended = await server.until_ended(phone.call_sid)
            assert ended.startswith(outcome)
            assert "; the peer did not acknowledge the close; " in ended
            phone.drop()
        async with dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))
        server.signal()
        assert await server.end() == 0


async def test_hang_up_amid_much(deepgram: Deepgram) -> None:
    """A hang-up is quiet also when the other side first reads all that was still to be sent."""
    sound = random.Random(1).randbytes(8_000_000)  # more than the network's buffers take
    text = deepgram.answer("much", Answer(sound, write_sizes=(100_000,)))
    start = {"event": "start", "start": {"streamSid": "MZ1", "customParameters": {"text": text}}}
    loop = asyncio.get_running_loop()

    async def call(server: Server, close: bytes, pause_seconds: float) -> None:
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.setblocking(False)
            await loop.sock_connect(line, ("127.0.0.1", server.port))
            await loop.sock_sendall(line, HANDSHAKE)
            assert b" 101 " in await loop.sock_recv(line, 4096)
            await loop.sock_sendall(line, frame(start))
            await asyncio.sleep(1)  # until nothing more fits in
            await loop.sock_sendall(line, close)
            line.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):  # if it took longer than CLOSE_SECONDS
                while await loop.sock_recv(line, 65536):
                    await asyncio.sleep(pause_seconds)

    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(
        settings, flags=(), MAX_BUFFERED_SECONDS=1e9, MAX_SPEED=1e9, CLOSE_SECONDS=0.3
    ) as server:
        stop = frame({"event": "stop"})
        close = b"\x88\x82\0\0\0\0\x03\xe8"  # 1000
        endings = list(itertools.product((close, stop + close, stop, b""), (0, 0.002))) * 5
        await asyncio.gather(*(call(server, *ending) for ending in endings))
        server.signal()
        assert await server.end() == 0
        assert server.log.count("ended: hung up") == len(endings)
        assert "Traceback" not in server.log


# Many


async def test_hundred_calls(server: Server, deepgram: Deepgram) -> None:
    """A hundred calls at once each hear their own text, while Deepgram is asked 15 at once."""
    go = asyncio.Event()
    texts = [f"You are caller number {number}." for number in range(100)]
    deepgram.most_under_way = 0

    async def call(text: str) -> None:
        deepgram.answer(text, Answer(gate=go))
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.hears(noise(text))

    async with asyncio.TaskGroup() as callers:
        for text in texts:
            callers.create_task(call(text))
        await deepgram.until(lambda: deepgram.under_way == 15)
        go.set()
    assert deepgram.most_under_way == 15


async def test_no_call_waits_for_another(server: Server, deepgram: Deepgram) -> None:
    """While Deepgram keeps fourteen callers waiting, others are served."""
    go = asyncio.Event()
    texts = [
        deepgram.answer(f"slow {number}", Answer(write_sizes=(1, 5000), gate=go))
        for number in range(14)
    ]

    async def call(text: str) -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.hears(noise(text))

    slow = [asyncio.create_task(call(text)) for text in texts]
    for text in texts:
        await deepgram.until_asked(text)
    await asyncio.gather(*(call(f"quick {number}") for number in range(5)))
    assert not any(task.done() for task in slow)
    go.set()
    await asyncio.gather(*slow)


async def test_nothing_is_left(server: Server, deepgram: Deepgram) -> None:
    """After hundreds of calls that hung up somewhere, no thread and no socket of theirs is left."""
    process = psutil.Process(server.process.pid)

    async def call(number: int) -> None:
        text = deepgram.answer(f"left {number % 40}", Answer(write_sizes=(100,)))
        async with dial(server.url, start=number % 7 > 0, parameters={"text": text}) as phone:
            if number % 3:
                await asyncio.sleep(number % 10 / 500)
            else:
                await phone.until_sound() if number % 7 else None
            if number % 2:
                phone.drop()

    for _ in range(4):
        await asyncio.gather(*map(call, range(100)))
    await deepgram.until(lambda: deepgram.under_way == 0)
    health = f"http://127.0.0.1:{server.port}/healthz"
    while (await asyncio.to_thread(requests.get, health, timeout=10)).json() != {"calls": 0}:
        await asyncio.sleep(0.01)
    await poll(lambda: process.num_threads() == 1)
    await poll(
        lambda: not [c for c in process.net_connections() if c.raddr and c.laddr[1] == server.port]
    )
    assert len(process.net_connections()) <= 1 + 15  # it listens; connections are kept warm


CHECK_GARBAGE_COLLECTOR = """
import gc

async def script(call):
    yield f"Is it frozen? {gc.get_freeze_count() > 10_000}"
"""


async def test_garbage_collector(deepgram: Deepgram) -> None:
    """What was imported is not searched for garbage when calls come: that takes 45 ms."""
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, CHECK_GARBAGE_COLLECTOR) as server,
        dial(server.url) as phone,
    ):
        await phone.hears(noise("Is it frozen? True"))
