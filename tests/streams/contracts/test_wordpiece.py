"""Texts are split as the vocabulary's own tokenizer splits them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.wordpiece import word_pieces

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "shoe",
    "##s",
    "snow",
    "##shoe",
    "red",
    "!",
    "$",
    "[",
    "]",
    "sep",
    "温",
    "a",
]
VOCABULARY = {piece: number for number, piece in enumerate(PIECES)}


def pieces(text: str, max_tokens: int = 64) -> list[str]:
    return [PIECES[i] for i in word_pieces(text, VOCABULARY, max_tokens)]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", []),
        (" \t\n\r ", []),
        ("red shoes", ["red", "shoe", "##s"]),
        ("Snowshoes!", ["snow", "##shoe", "##s", "!"]),  # the longest piece first
        ("RÉD\u0301", ["red"]),
        ("re\u200bd\x00", ["red"]),
        ("red\u00a0shoe", ["red", "shoe"]),
        ("$red", ["$", "red"]),
        ("snowman red", ["[UNK]", "red"]),  # as a whole or not at all
        ("温red温", ["温", "red", "温"]),
        ("a" * 101, ["[UNK]"]),
        ("[SEP]", ["[", "sep", "]"]),  # a text cannot speak for the program
    ],
)
def test_text_becomes_its_pieces(text: str, want: list[str]) -> None:
    assert pieces(text) == ["[CLS]", *want, "[SEP]"]


def test_long_text_is_cut_between_its_ends() -> None:
    assert pieces("red " * 50, max_tokens=5) == ["[CLS]", "red", "red", "red", "[SEP]"]
    assert pieces("red", max_tokens=2) == ["[CLS]", "[SEP]"]


@given(st.text(max_size=200), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_any_text_is_bounded_and_known(text: str, max_tokens: int) -> None:
    ids = word_pieces(text, VOCABULARY, max_tokens)
    assert 2 <= len(ids) <= max_tokens
    assert (PIECES[ids[0]], PIECES[ids[-1]]) == ("[CLS]", "[SEP]")
    assert all(PIECES[i] not in ("[CLS]", "[SEP]", "[PAD]") for i in ids[1:-1])
