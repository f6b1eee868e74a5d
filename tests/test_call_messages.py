"""Whatever comes over the websocket, the greeting is heard, or the call ends in plain words."""

import json
import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.standins.deepgram import GREETING, Deepgram, noise
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
    "key without a digit": '{"event": "dtmf", "dtmf": {}}',
    "mark without a name": '{"event": "mark", "mark": {}}',
    "mark of a wrong type": '{"event": "mark", "mark": 7}',
    "lone surrogate": '{"event": "\\ud800", "\\udfff": "\\ud800"}',
    "NUL": '{"event": "\\u0000"}',
    "empty": "",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", BAD)
async def test_bad_message(server: Server, name: str, when: str) -> None:
    """A message that Twilio does not send is ignored, and all is heard."""
    async with dial(server.url, start=False) as phone:
        if when == "after":
            await phone.start()
        await phone.send_raw(BAD[name])
        if when == "before":
            await phone.start()
        await phone.hears(noise(GREETING))


async def test_all_bad_messages(deepgram: Deepgram) -> None:
    """All of them in one call change nothing, and the log shows the first."""
    async with Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with dial(server.url, start=False) as phone:
            for message in BAD.values():
                await phone.send_raw(message)
            await phone.start()
            await phone.hears(noise(GREETING))
        shown = r"WARNING call \(.*\): ignored an unexpected message: b'not json\{'$"
        assert server.lines(shown)


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


@pytest.mark.parametrize(
    "start",
    [
        {"callSid": 7, "customParameters": None},
        {"customParameters": {"1": "\ud800\x00"}},
        {"callSid": "CA\n2026-11-22 INFO forged", "accountSid": ["AC"]},
        {"mediaFormat": MULAW | {"more": [1]}, "more": {}},
        {"mediaFormat": None},
    ],
)
async def test_odd_start(server: Server, start: dict[str, Any]) -> None:
    """What a start has too much, too little or of a wrong type is done without."""
    async with dial(server.url, start=False) as phone:
        await phone.send("start", start={"streamSid": phone.stream_sid, **start})
        await phone.hears(noise(GREETING))
    assert "\n2026-11-22 INFO forged" not in server.log


async def test_parameters_are_text(deepgram: Deepgram) -> None:
    """A script finds a str in every parameter, whatever has come."""
    script = "async def script(call):\n    yield ' '.join(sorted(call.parameters.values()))\n"
    async with (
        Server({"DEEPGRAM_URL": deepgram.url}, script) as server,
        dial(server.url, start=False) as phone,
    ):
        start = phone.start_fields() | {"customParameters": {"a": 7, "b": "x", "c": [1]}}
        await phone.send("start", start=start)
        await phone.hears(noise("7 [1] x"))


@pytest.mark.parametrize("key", ["mediaFormat", "callSid", "customParameters", "accountSid"])
async def test_start_lacks(server: Server, key: str) -> None:
    """Only the stream SID is indispensable."""
    async with dial(server.url, start=False) as phone:
        fields = phone.start_fields()
        del fields[key]
        await phone.send("start", start=fields)
        await phone.until_heard(noise(GREETING))


@pytest.mark.parametrize("start", [None, [], "MZ", 7, {}, {"streamSid": ""}, {"streamSid": None}])
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
    await impatient.logged(r"INFO call \(.*\) ended: no start within 1 s; no audio sent$")


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
    ended = await server.until_ended(phone.call_sid)
    assert re.match(r"connection failed: .*1009 \(message too big\)", ended)


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


KINDS: dict[str, st.SearchStrategy[str | bytes]] = {
    "text and bytes": st.text() | st.binary(),
    "JSON": json_values.map(json.dumps),
    "almost valid": almost_valid(),
}
KINDS["all"] = st.one_of(*KINDS.values())


# Eight tests, since all 10 000 messages in one took too long on a busy machine.
@pytest.mark.parametrize("started", [False, True], ids=["before start", "after start"])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@hypothesis_settings(
    max_examples=32 if os.environ.get("CI") else 4,  # 1280 messages a test, or 160
    suppress_health_check=list(HealthCheck),
)
async def test_any_messages(server: Server, kind: str, started: bool, data: st.DataObject) -> None:
    """Among arbitrary and almost valid messages, the greeting is sent, unless one is a key."""
    messages = data.draw(st.lists(KINDS[kind], min_size=40, max_size=40))
    async with dial(server.url, start=started) as phone:
        for message in messages:
            if started or "start" not in str(message):  # the first start counts, be it another's
                await phone.send_raw(message)
        if not started:
            await phone.start()
        await phone.until(lambda: bool(phone.named("mark") or phone.named("clear")))
        assert noise(GREETING).startswith(phone.received)
        assert phone.received == noise(GREETING) or phone.named("clear")
        await phone.hang_up()
        assert phone.ws.close_code == 1000  # so that the last message has been received
