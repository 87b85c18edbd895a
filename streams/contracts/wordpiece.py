"""Split a text into the word pieces of a BERT vocabulary, uncased: what its models were trained on.

Clean (control characters away, one kind of space), lower case, accents away, punctuation and CJK characters apart, then
the longest pieces that the vocabulary has, from left to right.

References:
    Devlin et al. (2019), BERT. Wu et al. (2016), Google's Neural Machine Translation System (word pieces).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping

MAX_WORD = 100
"""Longer words are unknown, as they were in training; the search for pieces is quadratic in them."""

_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def word_pieces(text: str, vocabulary: Mapping[str, int], max_tokens: int) -> list[int]:
    """Return the token ids of a text between [CLS] and [SEP], at most `max_tokens` with both.

    Args:
        text: Any text.
        vocabulary: Piece -> id; pieces that continue a word start with ##. Holds [CLS], [SEP] and [UNK].
        max_tokens: At least 2; what is beyond is cut off.
    """
    ids = [vocabulary["[CLS]"]]
    for word in _words(text):
        ids += _pieces(word, vocabulary)
        if len(ids) >= max_tokens:
            break
    return [*ids[: max_tokens - 1], vocabulary["[SEP]"]]


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    ids: list[int] = []
    start = 0
    while start < len(word) <= MAX_WORD:
        prefix = "##" if start else ""
        end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary), None)
        if end is None:
            break
        ids.append(vocabulary[prefix + word[start:end]])
        start = end
    # A word is known as a whole or not at all.
    return ids if start == len(word) else [vocabulary["[UNK]"]]


def _words(text: str) -> Iterator[str]:
    for chunk in "".join(_cleaned(text)).split():
        plain = "".join(c for c in unicodedata.normalize("NFD", chunk) if unicodedata.category(c) != "Mn").lower()
        word = ""
        for character in plain:
            if _is_punctuation(character):
                if word:
                    yield word
                yield character
                word = ""
            else:
                word += character
        if word:
            yield word


def _cleaned(text: str) -> Iterator[str]:
    for character in text:
        code = ord(character)
        if character in "\t\n\r" or unicodedata.category(character) == "Zs":
            yield " "
        elif any(low <= code <= high for low, high in _CJK):
            yield f" {character} "
        elif code not in (0, 0xFFFD) and not unicodedata.category(character).startswith("C"):
            yield character


def _is_punctuation(character: str) -> bool:
    # ASCII signs such as $ and ^ count although Unicode has them as symbols.
    return ("!" <= character <= "~" and not character.isalnum()) or unicodedata.category(character).startswith("P")
