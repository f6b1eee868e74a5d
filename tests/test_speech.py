"""The audio of one piece of text, which grows, and which any number of listeners read."""

import asyncio
import threading

import pytest

import twilio_aura
from tests.standins.deepgram import noise
from tests.standins.wire import settle
from twilio_aura import FRAME_BYTES, MAX_CHUNK_BYTES, Piece, Speech, SpeechFailed

PIECE = Piece("aura-asteria-en", "some sound")
SOUND = noise("some sound") * 10  # of more than one chunk, with an odd end


def fetched(sound: bytes = SOUND, failure: SpeechFailed | None = None) -> Speech:
    """Return a speech to which all its audio has come."""
    speech = Speech(PIECE)
    speech.add(sound)
    speech.failure = failure
    speech.end()
    return speech


async def read(speech: Speech) -> list[bytes]:
    """Return the audio of `speech`, as it is read."""
    chunks: list[bytes] = []
    while chunk := await speech.read(sum(map(len, chunks))):
        chunks.append(chunk)
    return chunks


async def test_all_of_it() -> None:
    """All of the audio is read, in whole frames up to its end, and never much of it at once."""
    chunks = await read(fetched())
    assert b"".join(chunks) == SOUND
    assert {len(chunk) for chunk in chunks[:-1]} == {MAX_CHUNK_BYTES}
    assert 0 < len(chunks[-1]) <= MAX_CHUNK_BYTES


async def test_as_it_comes() -> None:
    """What comes is read at once, but for the beginning of a frame, which waits for the rest."""
    speech = Speech(PIECE)
    reading = asyncio.create_task(speech.read(0))
    for at in range(FRAME_BYTES):
        await settle()
        assert not reading.done()
        speech.add(SOUND[at : at + 1])
    assert await reading == SOUND[:FRAME_BYTES]
    speech.add(b"?")
    reading = asyncio.create_task(speech.read(FRAME_BYTES))
    await settle()
    assert not reading.done()
    speech.end()
    assert await reading == b"?"
    assert await speech.read(FRAME_BYTES + 1) == b""


async def test_listeners() -> None:
    """Each who listens hears it from its beginning, whenever he comes, while it is added to."""
    speech = Speech(PIECE)
    listening = [asyncio.create_task(read(speech)) for _ in range(10)]

    def fetch() -> None:
        for at in range(0, len(SOUND), 333):
            speech.add(SOUND[at : at + 333])

    fetching = threading.Thread(target=fetch)
    fetching.start()
    await speech.read(0)
    listening += [asyncio.create_task(read(speech)) for _ in range(10)]
    await asyncio.to_thread(fetching.join)
    speech.end()
    listening += [asyncio.create_task(read(speech)) for _ in range(10)]
    for chunks in await asyncio.gather(*listening):
        assert b"".join(chunks) == SOUND


async def test_failure() -> None:
    """What has come before a failure is read to its odd end."""
    speech = fetched(SOUND[:1001], SpeechFailed("it failed"))
    assert await read(speech) == [SOUND[:1001]]


async def test_failure_while_it_is_awaited() -> None:
    """Who waits for audio is told when none comes."""
    speech = Speech(PIECE)
    reading = asyncio.create_task(speech.read(0))
    await asyncio.sleep(0)
    speech.failure = SpeechFailed("it failed")
    speech.end()
    assert await reading == b""


async def test_add_after_the_end() -> None:
    """The thread that adds to a speech that is over is told to stop, and adds nothing."""
    speech = fetched(b"all")
    with pytest.raises(SpeechFailed):
        speech.add(b"and more")
    assert speech.audio == b"all"


async def test_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that adds without an end."""
    monkeypatch.setattr(twilio_aura, "MAX_SPEECH_BYTES", 1000)
    speech = Speech(PIECE)
    speech.add(bytes(1001))
    with pytest.raises(SpeechFailed, match="does not come to an end"):
        speech.add(b"and more")
    assert len(speech.audio) == 1001
