"""How a text is cut: where a reader would cut it, soon at its beginning, and nothing of it is lost.

In the examples, a | stands for each cut.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twilio_aura import (
    MAX_CHARACTERS,
    MAX_PIECE_CHARACTERS,
    SECOND_PIECE_CHARACTERS,
    is_speakable,
    length_of_piece,
)

LATER = 9  # pieces have been requested, so the rules for the first ones no longer count
TEXTS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
NAME = r"""\{"word": "Siobhan O. Kelly", "pronounce": "ʃɪˈvɔːn. A, b; c"\}"""
PAUSE = r"\{pause:500ms\}"


def cut(parts: Iterable[str], number: int = LATER) -> list[str]:
    """Return the pieces of a text that is written in these parts, each as soon as it can be had."""
    pieces: list[str] = []
    rest = ""
    for part, is_written in [*((part, False) for part in parts), ("", True)]:
        rest += part
        while length := length_of_piece(rest[:MAX_CHARACTERS], number, False, is_written):
            pieces.append(rest[:length])
            rest = rest[length:]
            number += is_speakable(pieces[-1])
    assert rest == ""
    return pieces


def said(pieces: Iterable[str]) -> list[str]:
    """Return what is requested for `pieces`."""
    return [piece.strip() for piece in pieces if is_speakable(piece)]


def tokens(text: str) -> list[str]:
    """Return `text` in parts as language models write them: white space comes with what follows."""
    return re.findall(r"\s?[^\s]{1,5}|\s", text)


def check(example: str, number: int = 0, is_paused: bool = False, is_written: bool = False) -> None:
    """Check that `example` is cut first at its |; one that has none has to wait for more."""
    text = example.replace("|", "")
    length = length_of_piece(text, number, is_paused, is_written)
    assert text[:length] == example.partition("|")[0] * ("|" in example)


# Sentences, in texts of the kind that language models write


def examples() -> list[str]:
    """Return the examples."""
    return [example.strip() for example in TEXTS.split("\n---\n")]


def test_number_of_examples() -> None:
    """There are fifty, and no text stands there twice."""
    assert len(set(examples())) == 50


@pytest.mark.parametrize("example", examples())
def test_example(example: str) -> None:
    """Written letter by letter, or token by token, a text is cut where a reader would cut it."""
    expected = said(example.split("|"))
    text = example.replace("|", "")
    assert said(cut(text)) == expected
    assert said(cut(tokens(text))) == expected


@pytest.mark.parametrize(
    "example",
    [
        "We have approx. five left.| One",  # a small letter
        "Call them, write to them, etc. and wait.| Then",
        '"Really!" she said.| Then',
        "I use Yahoo! in the morning.| Then",
        "Take no. 5 on the left.| Then",  # a digit
        "Wait! 3 are left.| Then",
        "It was so. ..| What is it?| Then",  # a full stop
        "Ask Prof. Miller.| Then",  # a capital with up to three more letters
        "Ask Capt. Miller.| Then",
        "Il Dott. Rossi arriva.| Poi",
        "Ask J. R. Miller.| Then",
        "**Dr. Smith** is here.| Then",
        "_Dr. Smith_ is here.| Then",
        "Yes. That is right.| Then",  # which looks the same
        "Right.| That is it.| Then",
        "Sure!| That is right.| Then",  # an abbreviation has no exclamation mark
        "Press 1. Then wait.| Then",  # a number of up to two digits, as a list has
        "Room 101.| Then wait.| Then",
        "He left in 2023.| It was",
    ],
)
def test_what_ends_a_sentence(example: str) -> None:
    """An end before a small letter, a digit or a full stop is none, nor an abbreviation's."""
    assert said(cut(example.replace("|", ""))) == said(example.split("|"))


# The first pieces, while the text is being written


@pytest.mark.parametrize(
    "example",
    [
        "Good morning to you.| How are you today? I am",
        "Hi. Welcome to us all.| How are you today? I am",
        "These are nineteen. I",  # characters
        "These are of twenty.| I",
        "Good morning to you.",  # It may have been an abbreviation.
        "Good morning to you. ",
        "Good morning to you\n|",
        "おはようございます。今日はいい天気ですね。|は",
    ],
)
def test_first_sentence(example: str) -> None:
    """The first piece is the first sentence, unless that is so short that speech would stop."""
    check(example)


def test_later_sentences() -> None:
    """Any other piece is as many whole sentences as there are, and as fit."""
    sentence = "This one has forty characters, I think. "
    check("It is so. It is not. It was.| It", number=1)
    check(f"{sentence * 7}".rstrip() + "| " + sentence * 2, number=1)  # 319 would be too many


@pytest.mark.parametrize("mark", [",", ";", ":", " –", " —", "،", ',"'])
def test_clause(mark: str) -> None:
    """The first piece may end after a clause that is long enough; a sentence goes first."""
    clause = "word " * 8
    check(clause[: -len(mark)] + mark + "| and")
    check(clause[: -len(mark) - 1] + mark + " and")
    check(clause[: -len(mark)] + mark + " so.| And")
    check(clause[: -len(mark)] + mark + "and")  # as in 10:30
    check("word " * 30 + mark + " and", number=1)
    check("word " * 50 + mark + " and", number=2)


def test_second_piece() -> None:
    """What the second piece has of a sentence is so short that it is written in time."""
    check("word " * 35, number=1)
    check("word " * 35 + "|word", number=1)
    check("word " * 20 + "so,| " + "word " * 16, number=1)
    check("word " * 34 + "so.| And", number=1)
    check("word " * 50, number=2)


@pytest.mark.parametrize("mark", "、，；：")
def test_clause_without_white_space(mark: str) -> None:
    """Where a language has no white space, a clause needs none after it."""
    check("これは長い" * 8 + mark + "|で")
    check("これは長い" * 7 + "これ" + mark + "で")


# A writer who pauses


@pytest.mark.parametrize(
    "example",
    [
        "Let me check that for you.|",
        "Hi.|",
        "I asked Prof.|",
        "Let me check that for you.| One mo",
        "One mo",
        "One moment, please, and",
        "はい。|",
    ],
)
def test_pause(example: str) -> None:
    """When its writer pauses, what is complete is said, however short, and nothing else."""
    check(example, is_paused=True)
    check(example, number=LATER, is_paused=True)


def test_end() -> None:
    """When a text has been written, all of it is said, the first sentence first."""
    check("One mo|", is_written=True)
    check("Hi.|", is_written=True)
    check("Good morning to you.| One mo", is_written=True)
    check("Good morning to you. One mo|", number=1, is_written=True)


# Long texts


@pytest.mark.parametrize("mark", [",", ";", ":", " –"])
def test_long_sentence(mark: str) -> None:
    """A sentence that is too long for one piece is cut after the last clause that fits."""
    text = f"one two{mark} three " * 30
    pieces = cut([text])
    assert "".join(pieces) == text
    assert [piece for piece in pieces[:-1] if not piece.endswith(mark)] == []
    assert 280 < len(pieces[0]) <= MAX_PIECE_CHARACTERS + 1


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("word " * 100, "word "),
        ("word, " + "word " * 100, "word,"),  # a clause, however short
        ("これは長い文で、" * 60, "、"),
        ("Here is a sentence. " * 20, "."),
    ],
)
def test_long_text(text: str, end: str) -> None:
    """What is too long is cut after sentences, else after a clause, else after a word."""
    pieces = cut([text])
    assert "".join(pieces) == text
    assert pieces[0].endswith(end)
    assert max(map(len, pieces)) <= MAX_PIECE_CHARACTERS + 1


def test_nothing_to_cut_at() -> None:
    """A word is never cut, up to what Deepgram takes at all."""
    assert list(map(len, cut(["a" * 5000]))) == [2000, 2000, 1000]


def test_waits_for_no_full_stop() -> None:
    """A sentence that never ends is said before it has been written, wherever it begins."""
    check("word " * 60 + "|" + "word " * 2, number=LATER)
    check(" " * 1900 + "word " * 19 + "|word ", number=LATER)


# Inline controls


@pytest.mark.parametrize("control", [NAME, PAUSE, r"\{. A, b" + "\n" + r". C, d\}"])
def test_control(control: str) -> None:
    """A control is never cut, over line ends and full stops, and ends nothing itself."""
    for number in (0, LATER):
        check(f"Please ask for {control} at the door.| Then", number)
        check(f"Please ask at the door for {control}.| Then", number)
        check(f"Please ask at the door.| {control} Then", number)
        check(f"{control} Please ask at the door.| Then", number)
        check(f"Please ask for {control} at the door and", number)
    text = f"Please ask for {control} at the door. {control} Then wait, Mr. {control}. Good."
    pieces = ["Please ask for * at the door.", "* Then wait, Mr. *.", "Good."]
    expected = [piece.replace("*", control) for piece in pieces]
    assert said(cut(text)) == said(cut(tokens(text))) == expected


@pytest.mark.parametrize("number", [0, 1, LATER])
def test_control_that_is_not_closed(number: int) -> None:
    """A control cannot be cut before it is closed, and what comes before it goes ahead alone."""
    opened = "\\{" + "so. Be it, then\n" * 100
    check(f"{opened}", number)
    check(f"{opened}", number, is_paused=True)
    check(f"Ask {opened}"[:170], number, is_paused=True)
    check(f"Good morning to you.| {opened}", number)


def test_control_that_is_never_closed() -> None:
    """What looks like the beginning of a control hides nothing of a text that has been written."""
    text = r"Good morning to you. \{ This is no control. And so on."
    for pieces in (cut([text]), cut(text), cut(tokens(text))):
        assert said(pieces) == ["Good morning to you.", r"\{ This is no control. And so on."]


@pytest.mark.parametrize("size", [301, 1000, 1990])
def test_long_control(size: int) -> None:
    """However long a control is, it is in one piece; so is one that is longer than any piece."""
    control = "\\{" + ("so. Be it, " * 200)[: size - 4] + "\\}"
    text = f"Ask {control} now. " + "And then some more. " * 20
    for pieces in (cut([text]), cut(text), cut(tokens(text))):
        assert "".join(pieces) == text
        assert any(control in piece for piece in pieces)


def test_controls_only() -> None:
    """Controls are nothing to say: they go with the text after them, or are dropped."""
    for number in (0, LATER):
        check(f"{PAUSE}\n{NAME} ", number)
        check(f"{PAUSE}\n{NAME} \n", number, is_paused=True)
        check(f"{PAUSE}\n{NAME} Please ask at the door.| Then", number)
    assert said(cut(f"Ask here.\n{PAUSE}\nThen wait.")) == ["Ask here.", f"{PAUSE}\nThen wait."]
    assert said(cut(f"Ask here.\n{PAUSE}\n{PAUSE}")) == ["Ask here."]


@pytest.mark.parametrize(
    "text", ["4711.", "é", "東", "٣", "नमस्ते।", "a", f"{PAUSE} a", "\\}a", "\\{a"]
)
def test_is_speakable(text: str) -> None:
    """A letter or a digit, of any language, is something to say."""
    assert is_speakable(text)


@pytest.mark.parametrize("text", ["", " ", "…", "¡", "***", "_", "😊", "\0", PAUSE, NAME])
def test_is_not_speakable(text: str) -> None:
    """Marks, Markdown, an emoji and a control are not."""
    assert not is_speakable(text)


# Whatever is written, in whatever parts

CHARACTERS = st.sampled_from("ab Z1.,!?。、」\"'*…\n")
WORDS = [
    "word",
    "Word",
    "word ",
    "Dr. ",
    "it. ",
    "so, ",
    " – ",
    "\n",
    "5. ",
    "。",
    "\\",
    "\\{",
    "\\}",
]
LONG_ONES = ["a" * 299, "a" * 400, " " * 300, "word " * 60, PAUSE, f"{NAME} ", "\\{" + "b. C " * 80]
TEXTS_OF_ANY_KIND = (
    st.text(CHARACTERS, max_size=700)
    | st.text(max_size=400)
    | st.lists(st.sampled_from([*WORDS, *LONG_ONES]), max_size=30).map("".join)
)


@given(st.lists(st.tuples(TEXTS_OF_ANY_KIND, st.booleans()), max_size=6))
def test_pieces(written: Sequence[tuple[str, bool]]) -> None:
    """The pieces are the text, none is too long or cuts a word, and each has something to say."""
    number = 0
    rest = ""
    for text, is_paused, is_written in [*((*each, False) for each in written), ("", False, True)]:
        rest += text
        while rest:
            window = rest[:MAX_CHARACTERS]
            is_written = is_written and window == rest
            length = length_of_piece(window, number, is_paused, is_written)
            if length == 0:
                break
            assert 0 < length <= len(window)
            check_piece(window, length, number, is_written)
            number += is_speakable(window[:length])
            rest = rest[length:]
        assert len(rest) < MAX_CHARACTERS, "it waits, though no more can come"
    assert rest == ""


def check_piece(text: str, length: int, number: int, is_written: bool) -> None:
    """Check the piece of so many characters that was cut off `text`, after so many pieces."""
    control = re.compile(r"\\\{.*?(\\\}|\Z)", re.DOTALL)
    hidden = control.sub(lambda found: "\0" * len(found[0]), text)
    start = next((at for at, letter in enumerate(hidden, 1) if letter.isalnum()), len(text))
    limit = SECOND_PIECE_CHARACTERS if number == 1 else MAX_PIECE_CHARACTERS
    could_be_cut = re.search(r"\s\S", hidden[start : start + limit])
    assert length <= start + MAX_PIECE_CHARACTERS or not could_be_cut
    is_all = length == len(text) and (is_written or length == MAX_CHARACTERS)
    assert is_all or is_speakable(text[:length])
    before, after = hidden[:length][-1], hidden[length:][:1]
    assert not (before.isalnum() and after.isalnum())
    assert not before == after == "\0"
