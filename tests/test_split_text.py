"""How a text is cut: where a reader would cut it, and nothing of it is lost."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.standins.deepgram import KEY, Deepgram, noise
from twilio_aura import Settings, TextToSpeech, split_text

MOST = 300  # characters of a piece
TEXTS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")


async def written(parts: Sequence[str | None]) -> AsyncIterator[str | None]:
    """Yield these parts, as a language model's client does."""
    for part in parts:
        yield part


async def cut(*parts: str | None) -> list[str]:
    """Return the pieces of a text that is written in these parts."""
    return [piece async for piece in split_text(written(parts))]


def said(pieces: Sequence[str]) -> list[str]:
    """Return what is to be said of `pieces`: those with a letter or a digit."""
    return [piece.strip() for piece in pieces if any(map(str.isalnum, piece))]


# The cuts a reader would make, in texts of the kind that language models write


def examples() -> list[str]:
    """Return the examples; a | stands for each cut, and what cannot be said may be left out."""
    return [example.strip() for example in TEXTS.split("\n---\n")]


def test_number_of_examples() -> None:
    """There are fifty, and no text stands there twice."""
    assert len(set(examples())) == 50


@pytest.mark.parametrize("example", examples())
async def test_example(example: str) -> None:
    """Written letter by letter, or word by word, a text is cut where a reader would cut it."""
    expected = said(example.split("|"))
    text = example.replace("|", "")
    assert said(await cut(*text)) == expected
    words = text.replace(" ", "\0 ").replace("\n", "\0\n").split("\0")  # as models' tokens are
    assert said(await cut(*words)) == expected


async def test_none_and_empty() -> None:
    """None and empty parts, as a model's client sends them first and last, are skipped."""
    assert await cut(None, "", "First. ", None, "Last.", "", None) == ["First.", " Last."]


async def test_other_types() -> None:
    """A part that is no str fails with its type's name."""
    with pytest.raises(TypeError, match="int"):
        await cut("One. ", 7)  # type: ignore[arg-type]


# Long texts


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("word " * 100, "word "),
        ("one, two, three " * 30, ","),  # a comma
        ("これは長い文で、" * 60, "、"),  # a comma without white space after it
        ("Here is a sentence. " * 20, "."),
        ("a" * 1000, "a"),  # nothing to cut at
    ],
)
async def test_long_sentence(text: str, ends: str) -> None:
    """What is longer than a piece may be is cut after a sentence, a comma, a word, or anywhere."""
    pieces = await cut(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= MOST
    assert len(pieces[0]) > MOST / 2
    assert pieces[0].endswith(ends)


async def test_waits_for_no_full_stop() -> None:
    """A sentence that never ends is said before it has been written."""
    pieces = split_text(written(["word "] * 70 + [None] * 5))
    first = await anext(pieces)
    assert 200 < len(first) <= MOST
    await pieces.aclose()


# Whatever is written, in whatever parts

characters = st.sampled_from("ab Z1.,!?。、」\"'*…\n")
texts = st.text(characters, max_size=700) | st.text(max_size=400)


@given(st.lists(texts, max_size=6))
async def test_pieces(parts: Sequence[str]) -> None:
    """The pieces are the text; none is too long, and all but the last have something to say."""
    pieces = await cut(*parts)
    assert "".join(pieces) == "".join(parts)
    assert all(len(piece) <= MOST for piece in pieces)
    for piece in pieces[:-1]:
        assert said([piece]) or len(piece) == MOST


@given(st.text(characters | st.characters(), min_size=2001, max_size=5000))
@hypothesis_settings(max_examples=20)
async def test_pieces_of_a_str(text: str) -> None:
    """A str of over 2000 characters is cut by the same rules."""
    pieces = [piece async for piece in split_text(text)]
    assert "".join(pieces) == text
    assert all(len(piece) <= MOST for piece in pieces)


@given(st.lists(st.text(characters, max_size=200), max_size=6))
@hypothesis_settings(max_examples=30)
async def test_requests(parts: Sequence[str]) -> None:
    """Each piece with a letter or a digit is asked for, without white space around; no other is."""
    async with Deepgram() as deepgram:
        settings = Settings(deepgram_api_key=KEY, deepgram_url=deepgram.url)
        audio = TextToSpeech(settings).speak(written(parts), "a-voice")
        heard = b"".join([chunk async for chunk in audio])
        pieces = said(await cut(*parts))
        assert heard == b"".join(noise(piece, "a-voice") for piece in pieces)
        assert {request.text for request in deepgram.requests} == set(pieces)
