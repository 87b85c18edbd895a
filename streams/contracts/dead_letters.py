"""Dead letters: lines that are no usable event, with the reason and the place they came from.

A dead letter is a record of the topic `dead_letters`, in the partition that its line came from. The value is the line;
the headers say the rest. A line that no decoder would take for its size alone is cut, and `length` tells.

Marks: a record with the header `replayed` and an empty value says that the letter at this offset of the same partition
was sent back to its topic. Letters are never changed or removed, only marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from streams.contracts.codec import MAX_LINE_BYTES
from streams.contracts.topics import CLICKS, IMPRESSIONS

MAX_REASON_BYTES: Final = 1024
CUT_BYTES: Final = 4096
"""What is kept of a line longer than `MAX_LINE_BYTES`. Until `length` came, of every line."""
REPLAYED_HEADER: Final = "replayed"
ORIGIN_HEADERS: Final = ("topic", "partition", "offset", "index")
"""Headers that say where a line stood. Two letters with the same ones are one that a crash made the joiner repeat."""

_SOURCES: Final = (IMPRESSIONS, CLICKS)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A line that could not be used, and where it stood."""

    topic: str
    partition: int
    offset: int
    index: int
    """Place of the line in its record, from 0, blank lines not counted; -1: unknown. The first joiners wrote -1 when
    they refused an event for its time, and `line` is then the event, written anew."""
    reason: str
    """Field and cause, for a person."""
    line: bytes
    length: int
    """Bytes of the whole line; more than `line` has if it was cut. Of a letter from before this header with exactly
    `CUT_BYTES`, which says nothing about the rest, one more than that."""

    @property
    def is_cut(self) -> bool:
        """Whether a part of the line is missing here."""
        return self.length > len(self.line)

    def encode(self) -> tuple[bytes, list[tuple[str, bytes]]]:
        """Return value and headers of the record."""
        value = self.line if len(self.line) <= MAX_LINE_BYTES else self.line[:CUT_BYTES]
        # A reason may quote what a client sent, lone surrogates included; it is cut between two characters.
        reason = self.reason.encode("utf-8", "backslashreplace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
        return value, [
            ("reason", reason.encode()),
            ("topic", self.topic.encode()),
            ("partition", str(self.partition).encode()),
            ("offset", str(self.offset).encode()),
            ("index", str(self.index).encode()),
            ("length", str(max(self.length, len(self.line))).encode()),
        ]

    @classmethod
    def decode(cls, value: bytes | None, headers: Iterable[tuple[str, bytes | None]] | None) -> Self:
        """Read a record of `dead_letters`.

        Raises:
            ValueError: If it is no dead letter; the text names the header and what is wrong with it.
        """
        found = {name: content for name, content in headers or () if content is not None}
        if REPLAYED_HEADER in found:
            raise ValueError("no dead letter: the mark of a replay")
        line = value or b""
        topic = _header(found, "topic").decode("utf-8", "replace")
        if topic not in _SOURCES:
            raise ValueError(f"no dead letter: header topic is {topic[:80]!r}; expected one of {', '.join(_SOURCES)}")
        length = len(line) + (len(line) == CUT_BYTES)
        if "length" in found:
            length = _number(found, "length")
            if length < len(line):
                raise ValueError(f"no dead letter: header length is {length}; the value has {len(line)} bytes")
        return cls(
            topic=topic,
            partition=_number(found, "partition"),
            offset=_number(found, "offset"),
            index=_number(found, "index", least=-1),
            reason=_header(found, "reason").decode("utf-8", "replace"),
            line=line,
            length=length,
        )


def encode_replayed(offset: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return value and headers of the mark that the letter at this offset of the same partition was replayed."""
    return b"", [(REPLAYED_HEADER, str(offset).encode())]


def replayed_of(headers: Sequence[tuple[str, bytes | None]] | None) -> int | None:
    """Return the offset that a mark names, or None for a record that is no mark.

    A mark whose offset cannot be read is one still, and names -1: no letter.
    """
    for name, content in headers or ():
        if name == REPLAYED_HEADER:
            return int(content) if content is not None and content.isdigit() else -1
    return None


def _header(found: dict[str, bytes], name: str) -> bytes:
    if name not in found:
        raise ValueError(f"no dead letter: header {name} is missing; expected reason, {', '.join(ORIGIN_HEADERS)}")
    return found[name]


def _number(found: dict[str, bytes], name: str, least: int = 0) -> int:
    text = _header(found, name)
    # Not int() alone, which takes blanks and underscores too. Kafka's offsets have 63 bits.
    number = int(text) if text.removeprefix(b"-").isdigit() and len(text) <= 20 else None
    if number is None or not least <= number < 2**63:
        raise ValueError(f"no dead letter: header {name} is {text[:40]!r}; expected a whole number from {least}")
    return number
