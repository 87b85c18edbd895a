"""A dead letter reads back as it was written, those of older joiners too, and nothing else passes for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts.codec import MAX_LINE_BYTES, encode_mark
from streams.contracts.dead_letters import (
    CUT_BYTES,
    MAX_REASON_BYTES,
    DeadLetter,
    encode_replayed,
    replayed_of,
)

LINE = b'{"schema_version": 2}'
LETTER = DeadLetter("clicks", 3, 41, 7, "schema_version: Invalid enum value 2", LINE, len(LINE))
HEADERS = [
    ("reason", b"schema_version: Invalid enum value 2"),
    ("topic", b"clicks"),
    ("partition", b"3"),
    ("offset", b"41"),
    ("index", b"7"),
    ("length", b"21"),
]


def test_letter_is_written_as_documented() -> None:
    assert LETTER.encode() == (LINE, HEADERS)


def test_letter_of_a_joiner_before_length_still_reads() -> None:
    letter = DeadLetter.decode(LINE, HEADERS[:-1])
    assert letter == LETTER
    assert not letter.is_cut


def test_old_letter_that_fills_the_old_cut_counts_as_cut() -> None:
    assert DeadLetter.decode(b"x" * CUT_BYTES, HEADERS[:-1]).is_cut
    assert not DeadLetter.decode(b"x" * (CUT_BYTES - 1), HEADERS[:-1]).is_cut
    whole = [*HEADERS[:-1], ("length", str(CUT_BYTES).encode())]
    assert not DeadLetter.decode(b"x" * CUT_BYTES, whole).is_cut


@given(
    topic=st.sampled_from(["impressions", "clicks"]),
    partition=st.integers(0, 10_000),
    offset=st.integers(0, 2**63 - 1),
    index=st.integers(-1, 10_000),
    reason=st.text(st.characters(codec="utf-8"), max_size=200),
    line=st.binary(max_size=200),
    missing=st.integers(0, 2**40),
)
def test_what_was_written_reads_back(
    topic: str, partition: int, offset: int, index: int, reason: str, line: bytes, missing: int
) -> None:
    letter = DeadLetter(topic, partition, offset, index, reason, line, len(line) + missing)
    assert DeadLetter.decode(*letter.encode()) == letter


@pytest.mark.parametrize(("size", "kept"), [(MAX_LINE_BYTES, MAX_LINE_BYTES), (MAX_LINE_BYTES + 1, CUT_BYTES)])
def test_line_is_kept_whole_up_to_the_limit_and_cut_beyond(size: int, kept: int) -> None:
    line = b"x" * (size - 1) + b"y"
    read = DeadLetter.decode(*DeadLetter("clicks", 0, 0, 0, "r", line, size).encode())
    assert read.line == line[:kept]
    assert read.length == size
    assert read.is_cut == (kept < size)


@given(reason=st.text(max_size=2 * MAX_REASON_BYTES) | st.just("\ud800" * 300) | st.just("x" + "€" * 2_000))
def test_any_reason_fits_and_is_cut_between_characters(reason: str) -> None:
    _, headers = DeadLetter("clicks", 0, 0, 0, reason, b"x", 1).encode()
    written = dict(headers)["reason"]
    assert len(written) <= MAX_REASON_BYTES
    assert reason.encode("utf-8", "backslashreplace").startswith(written)
    written.decode()
    assert len(written) > MAX_REASON_BYTES - 4 or written == reason.encode("utf-8", "backslashreplace")


def changed(name: str, content: bytes | None) -> list[tuple[str, bytes | None]]:
    return [(n, content if n == name else c) for n, c in HEADERS]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([], "header topic is missing"),
        (None, "header topic is missing"),
        (HEADERS[1:], "header reason is missing"),
        (changed("offset", None), "header offset is missing"),
        (changed("topic", b"examples"), "header topic is 'examples'; expected one of impressions, clicks"),
        (changed("topic", b"\xff"), "header topic is"),
        (changed("partition", b"-1"), "header partition is b'-1'; expected a whole number from 0"),
        (changed("offset", b"1_0"), "header offset"),
        (changed("offset", b" 1"), "header offset"),
        (changed("offset", b"9223372036854775808"), "header offset"),
        (changed("offset", b"9" * 5_000), "header offset"),
        (changed("index", b"-2"), "header index"),
        (changed("index", b""), "header index"),
        (changed("length", b"20"), "header length is 20; the value has 21 bytes"),
        (encode_replayed(3)[1], "the mark of a replay"),
        ([*HEADERS, *encode_replayed(3)[1]], "the mark of a replay"),
        (encode_mark(3)[1], "header topic is missing"),
    ],
)
def test_what_is_no_letter_is_refused_with_the_cause(headers: list[tuple[str, bytes]] | None, said: str) -> None:
    with pytest.raises(ValueError, match="no dead letter") as refused:
        DeadLetter.decode(LINE, headers)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200


def test_mark_names_its_letter_and_a_letter_is_no_mark() -> None:
    assert encode_replayed(12) == (b"", [("replayed", b"12")])
    assert replayed_of(encode_replayed(12)[1]) == 12
    assert replayed_of(HEADERS) is None
    assert replayed_of(None) is None


@pytest.mark.parametrize("content", [b"", b"x", b"-3", None])
def test_unreadable_mark_is_a_mark_of_no_letter(content: bytes | None) -> None:
    assert replayed_of([("replayed", content)]) == -1
