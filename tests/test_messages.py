"""Whatever comes in over the websocket, the greeting is heard, or the call ends in plain words."""

import asyncio
import json
import os
import random
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.benchmark import callers
from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import MULAW, dial

BAD: dict[str, str | bytes] = {
    "not JSON": "not json{",
    "not an object": "[]",
    "a number": "17",
    "huge": "1" * 10_000,
    "infinite": '{"event": "mark", "mark": {"name": 1e999}}',
    "deep": "[" * 30_000,
    "deep objects": '{"event":' * 5000,
    "no event": "{}",
    "event is no text": '{"event": ["media"]}',
    "unknown event": '{"event": "transcript", "text": "hi"}',
    "media without audio": '{"event": "media"}',
    "binary": b"\x00\xff\x00",
    "binary JSON": b'{"event": "stop"}',
    "mark without a name": '{"event": "mark", "mark": {}}',
    "mark of a wrong type": '{"event": "mark", "mark": 7}',
    "no digit": '{"event": "dtmf", "dtmf": {"digit": "x"}}',
    "two digits": '{"event": "dtmf", "dtmf": {"digit": "12"}}',
    "empty digit": '{"event": "dtmf", "dtmf": {"digit": ""}}',
    "digit of a wrong type": '{"event": "dtmf", "dtmf": {"digit": 1}}',
    "lone surrogate": '{"event": "\\ud800", "\\udfff": "\\ud800"}',
    "NUL": '{"event": "\\u0000"}',
    "empty": "",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", BAD)
async def test_bad_message(server: Server, name: str, when: str) -> None:
    """A message that Twilio does not send is ignored, with one warning, and all is heard."""
    lines = len(server.log.splitlines())
    async with dial(server.url, start=False) as phone:
        if when == "after":
            await phone.start()
        await phone.send_raw(BAD[name])
        await phone.send_raw(BAD[name])
        if when == "before":
            await phone.start()
        await phone.until_heard(noise(GREETING))
        assert phone.heard == noise(GREETING)
        await phone.hang_up()
    await server.logged(f"{phone.call_sid} ended: hung up")
    levels = [line.split()[2] for line in server.log.splitlines()[lines:]]
    assert sorted(levels) == ["INFO", "INFO", "WARNING"]


async def test_all_bad_messages(closes_after_speech: Server, deepgram: Deepgram) -> None:
    """All of them in one call: one warning that shows the first, the others at DEBUG only."""
    go = asyncio.Event()
    text = deepgram.answer("all bad messages", Answer(gate=go))
    async with dial(closes_after_speech.url, parameters={"text": text}) as phone:
        for message in BAD.values():
            await phone.send_raw(message)
        go.set()
        assert await phone.until_closed() == 1000
        assert phone.heard == noise(text)
    await closes_after_speech.logged(f"{phone.call_sid} ended: completed")
    lines = [
        line
        for line in closes_after_speech.log.splitlines()
        if f"{phone.call_sid}: ignored" in line
    ]
    levels = [line.split()[2] for line in lines]
    assert levels == ["WARNING", *["DEBUG"] * (len(BAD) - 1)]
    for line, message in zip(lines, BAD.values(), strict=True):
        assert f"unexpected message: {message!a}".startswith(line.partition("ignored an ")[2])


async def test_mark_never_sent(closes_after_speech: Server) -> None:
    """A mark that is not the last one sent says nothing of what has been heard."""
    async with dial(closes_after_speech.url, speed=0.5) as phone:
        await phone.until_mark()
        await phone.send("mark", mark={"name": "4711"})
        assert await phone.until_closed() == 1000
        assert phone.heard == noise(GREETING)


async def test_second_start(server: Server) -> None:
    """A second start is ignored: the call keeps its stream SID and says its own text."""
    async with dial(server.url) as phone:
        fields = phone.start_fields(text="another") | {"streamSid": "MZother"}
        await phone.send("start", start=fields)
        await phone.until_heard(noise(GREETING))
        assert phone.heard == noise(GREETING)
        await phone.hang_up()
    await server.logged(f"{phone.call_sid}: ignored an unexpected message")


@pytest.mark.parametrize(
    "start",
    [
        {"callSid": 7, "customParameters": None},
        {"customParameters": {"text": 7, "model": None, "1": "\ud800\x00"}},
        {"customParameters": ["text"], "callSid": "CA\n2026-11-22 INFO forged"},
        {"mediaFormat": MULAW | {"more": [1]}, "more": {}},
        {"mediaFormat": None},
    ],
)
async def test_odd_start(server: Server, start: dict[str, Any]) -> None:
    """What a start has too much, too little or of a wrong type is done without."""
    async with dial(server.url, start=False) as phone:
        await phone.send("start", start={"streamSid": phone.stream_sid, **start})
        await phone.until_heard(noise(GREETING))
        assert phone.heard == noise(GREETING)
    assert "\n2026-11-22 INFO forged" not in server.log


@pytest.mark.parametrize("key", ["mediaFormat", "callSid", "customParameters", "accountSid"])
async def test_start_lacks(server: Server, key: str) -> None:
    """Only the stream SID is indispensable."""
    async with dial(server.url, start=False) as phone:
        fields = phone.start_fields()
        del fields[key]
        await phone.send("start", start=fields)
        await phone.until_heard(noise(GREETING))


@pytest.mark.parametrize(
    "wrong", [{"encoding": "audio/opus"}, {"sampleRate": 16000}, {"channels": 2}]
)
async def test_other_format(server: Server, wrong: dict[str, Any]) -> None:
    """A start whose format is not the one that we speak ends that call."""
    async with dial(server.url, start=False) as phone:
        await phone.send("start", start=phone.start_fields() | {"mediaFormat": MULAW | wrong})
        assert await phone.until_closed() == 1008
        assert phone.events == []
    await server.logged(f"WARNING call {phone.call_sid} ended: the stream is not 8 kHz mulaw")


@pytest.mark.parametrize("start", [None, [], "MZ", 7, {}, {"streamSid": ""}, {"streamSid": 7}])
async def test_impossible_start(impatient: Server, start: Any) -> None:
    """A start that has no stream SID is none."""
    async with dial(impatient.url, start=False) as phone:
        await phone.send("start", start=start)
        assert await phone.until_closed() == 1008
        assert phone.ws.close_reason == "no start within 1 s"
        assert phone.events == []


async def test_no_start(impatient: Server) -> None:
    """A connection that sends no start is closed, whatever else it sends."""
    async with dial(impatient.url, start=False) as phone:
        await phone.voice(3)
        assert await phone.until_closed() == 1008
        assert phone.ws.close_reason == "no start within 1 s"
    await impatient.logged(r"WARNING connection from \(.*\) ended: no start within 1 s")


async def test_large_message(server: Server) -> None:
    """A message over 64 KiB closes its connection with 1009 and touches no other."""
    async with dial(server.url, speed=0.5) as other, dial(server.url) as phone:
        await other.until_sound()
        await phone.send_raw("x" * 64 * 1024)
        await phone.voice()
        # Of a text message that is a byte too long, the head and no more: that must be enough.
        phone.ws.transport.write(b"\x81\xff" + (64 * 1024 + 1).to_bytes(8, "big") + b"mask")
        assert await phone.until_closed() == 1009
        await other.until_heard(noise(GREETING))
        assert other.heard == noise(GREETING)
    line = await server.logged(f"WARNING call {phone.call_sid} ended: connection failed")
    assert "1009 (message too big)" in line


async def test_many_keys(server: Server, deepgram: Deepgram) -> None:
    """Keys beyond those that a script could ever want are forgotten, but still interrupt."""
    go = asyncio.Event()
    text = deepgram.answer("many keys", Answer(write_sizes=(1, 5000), gate=go))
    async with dial(server.url, parameters={"text": text}, speed=0.01) as phone:
        for _ in range(300):
            await phone.press("1")
        await phone.send("unknown")
        await server.logged(f"{phone.call_sid}: ignored")  # so the keys before it have come
        go.set()
        await phone.until_mark()
        await phone.press("1")
        await phone.until(lambda: phone.events[-1] == ("clear", ""))


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
            line = await server.logged(f"{phone.call_sid} ended: ")
            assert outcome in line
            assert "; the peer did not acknowledge the close; " in line
            phone.drop()
        async with dial(server.url) as phone:
            await phone.until_heard(noise(GREETING))
        server.signal()
        assert await server.end() == 0


async def test_hang_up_amid_much(deepgram: Deepgram) -> None:
    """A hang-up is quiet also when the other side first reads all that was still to be sent."""
    sound = random.Random(1).randbytes(2_300_000)  # more than the network's buffers take
    text = deepgram.answer("much", Answer(sound, write_sizes=(100_000,)))
    loop = asyncio.get_running_loop()

    async def call(server: Server, close: bytes) -> None:
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.setblocking(False)
            await loop.sock_connect(line, ("127.0.0.1", server.port))
            await loop.sock_sendall(line, callers.HANDSHAKE)
            assert b" 101 " in await loop.sock_recv(line, 4096)
            await loop.sock_sendall(line, callers.CONNECTED + callers.start(text))
            await asyncio.sleep(1)  # until nothing more fits in
            await loop.sock_sendall(line, close)
            line.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(line, 65536):
                pass

    settings = {"DEEPGRAM_URL": deepgram.url}
    async with Server(settings, flags=(), MAX_BUFFERED_SECONDS=1e9) as server:
        endings = (callers.CLOSE, callers.STOP + callers.CLOSE, b"") * 5
        await asyncio.gather(*(call(server, close) for close in endings))
        server.signal()
        assert await server.end() == 0
        assert server.log.count("ended: hung up") == len(endings)
        assert "ERROR" not in server.log


# Arbitrary and almost valid messages

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
VALID: list[dict[str, Any]] = [
    {"event": "connected", "protocol": "Call", "version": "1.0.0"},
    {"event": "start", "start": {"streamSid": "MZ1", "callSid": "CA1", "mediaFormat": MULAW}},
    {"event": "media", "media": {"track": "inbound", "payload": "//8="}},
    {"event": "dtmf", "dtmf": {"track": "inbound_track", "digit": "1"}},
    {"event": "mark", "mark": {"name": "1"}},
]


@st.composite
def almost_valid(draw: st.DrawFn) -> str:
    """Return one of Twilio's messages with one thing in it lost, added, changed or broken."""
    message = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    inner = message.get(message["event"])
    place = draw(st.sampled_from([message, inner])) if isinstance(inner, dict) else message
    key = draw(st.sampled_from(sorted(place)) | st.text())
    if draw(st.booleans()):
        place.pop(key, None)
    else:
        place[key] = draw(json_values)
    text = json.dumps(message, ensure_ascii=draw(st.booleans()), separators=(", ", ":"))
    if draw(st.booleans()):
        text = text[: draw(st.integers(0, len(text)))]
    return text.encode(errors="replace").decode()


messages = st.lists(
    st.text() | st.binary() | json_values.map(json.dumps) | almost_valid(), min_size=20, max_size=20
)


@given(before=messages, after=messages)
@hypothesis_settings(
    max_examples=250 if os.environ.get("CI") else 25,  # 10 000 messages, or 1000
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
async def test_any_messages(
    server: Server, before: list[str | bytes], after: list[str | bytes]
) -> None:
    """Among arbitrary and almost valid messages, the greeting is sent, unless one is a key."""
    async with dial(server.url, start=False) as phone:
        for message in before:
            if "start" not in str(message):  # of which the first, and be it another's, counts
                await phone.send_raw(message)
        await phone.start()
        for message in after:
            await phone.send_raw(message)
        await phone.until(lambda: bool(phone.named("mark") or phone.named("clear")))
        assert noise(GREETING).startswith(phone.received)
        assert phone.received == noise(GREETING) or phone.named("clear")
        await phone.hang_up()
