"""How texts are cut."""

from hypothesis import given
from hypothesis import strategies as st

from twilio_aura import split_text


async def cut(text: str) -> list[str]:
    """Return the pieces of a text."""
    return [piece async for piece in split_text(text)]


characters = st.sampled_from("ab .!?。\"'\n")


@given(st.text(characters, max_size=9000))
async def test_pieces(text: str) -> None:
    """Pieces have at most 2000 characters, no white space around, and lose only white space."""
    pieces = await cut(text)
    assert all(0 < len(piece) <= 2000 and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


async def test_piece_ends() -> None:
    """A piece ends with a sentence, else with a word, else anywhere."""
    assert await cut(" \n ") == []
    assert await cut(" a. b ") == ["a. b"]
    assert await cut("a" * 2500) == ["a" * 2000, "a" * 500]
    assert await cut("word " * 500) == ["word " * 399 + "word", "word " * 99 + "word"]
    assert await cut("a" * 1999 + ". b") == ["a" * 1999 + ".", "b"]
    assert await cut('He said "' + "a " * 700 + '!" ' + "b " * 700) == [
        'He said "' + "a " * 700 + '!"',
        ("b " * 700).strip(),
    ]
    number = "3.14 " * 399 + "e."
    assert await cut(f"{number} " + "x " * 10) == [number, ("x " * 10).strip()]
    assert await cut("あ" * 1500 + "。" + "い" * 1500) == ["あ" * 1500 + "。", "い" * 1500]
