"""What a dead letter's line goes through before it may be sent again: completed, edited, judged.

Each step is a function of its own that `streams.dead_letter_replay` is given: the whole line of a letter that was cut
comes from the record it stood in, an edit is a program of the operator's, and the judge says what the joiner would.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition

from streams.contracts.codec import EventDecoder, lines_of
from streams.contracts.dead_letters import DeadLetter
from streams.contracts.events import Click, Impression
from streams.contracts.settings import JoinSettings
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.dead_letters import STALL_S

EDIT_TIMEOUT_S: Final = 300.0

Edit = Callable[[Sequence[bytes]], Sequence[bytes]]
"""Gives a line for each line, in the same order."""
WholeLine = Callable[[DeadLetter], bytes]
"""Gives the line of a letter, whole; LookupError says why it cannot."""


class Judge:
    """Says what the joiner would say of a line that reaches it now."""

    def __init__(self, settings: JoinSettings, now_ms: int) -> None:
        self._decoders: dict[str, EventDecoder[Any]] = {
            IMPRESSIONS: EventDecoder(Impression),
            CLICKS: EventDecoder(Click),
        }
        self._latest_ms = now_ms + settings.max_future_skew_ms
        self._earliest_ms = now_ms - settings.max_event_age_ms if settings.max_event_age_ms else 0
        self._window_from_ms = now_ms - settings.attribution_window_ms

    def fault(self, topic: str, line: bytes) -> tuple[str | None, bool]:
        """Return why the line would be a dead letter, or None, and whether its event is older than the window."""
        decoded = self._decoders[topic].decode_batch(line)
        if decoded.bad:
            return decoded.bad[0].reason, False
        if len(decoded.events) != 1:
            return f"event: {len(decoded.events)} in one line; expected one", False
        time_ms = decoded.events[0].occurred_at_ms
        if time_ms > self._latest_ms:
            return f"occurred_at_ms: {time_ms} is still ahead of the clock", False
        if time_ms < self._earliest_ms:
            return f"occurred_at_ms: {time_ms} is older than GENCO_MAX_EVENT_AGE_MS allows", False
        return None, time_ms < self._window_from_ms


def unedited(lines: Sequence[bytes]) -> Sequence[bytes]:
    """Return the lines as they are."""
    return lines


def edit_with(command: str) -> Edit:
    """Return an edit that gives the lines to a program and takes what it prints. There is no shell.

    Raises:
        ValueError: If the command cannot be split into words.
    """
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--edit {command!r}: {error}; quote it as a shell would want it") from None
    if not argv:
        raise ValueError("--edit: no command; expected a program that reads lines and prints as many")

    def edit(lines: Sequence[bytes]) -> Sequence[bytes]:
        if not lines:
            return lines
        try:
            done = subprocess.run(  # noqa: S603 - the program is whatever the operator named, and gets no shell
                argv, input=b"\n".join(lines) + b"\n", capture_output=True, timeout=EDIT_TIMEOUT_S, check=False
            )
        except OSError as error:
            raise ValueError(f"--edit: cannot run {argv[0]} ({error.strerror}); nothing was sent") from None
        except subprocess.TimeoutExpired:
            raise ValueError(f"--edit: {argv[0]} did not end within {EDIT_TIMEOUT_S:.0f} s; nothing was sent") from None
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["nothing"]
            raise ValueError(
                f"--edit: {argv[0]} ended with code {done.returncode} and said {said[0][:200]!r}; nothing was sent. "
                "Select only lines that it can read (--reason, --topic)"
            )
        edited = done.stdout.removesuffix(b"\n").split(b"\n") if done.stdout else []
        if len(edited) != len(lines):
            raise ValueError(
                f"--edit: {argv[0]} got {len(lines)} lines and printed {len(edited)}; it must print one for each "
                "(jq: use -c); nothing was sent"
            )
        return edited

    return edit


class OriginReader:
    """Fetches the whole line of a letter that was cut from the record it stood in, if that is still kept."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._held: tuple[TopicPartition, int] | None = None
        self._lines: list[bytes] = []

    def __call__(self, letter: DeadLetter) -> bytes:
        """Return the whole line.

        Raises:
            LookupError: If it cannot be had; the text says why.
        """
        if not letter.is_cut:
            return letter.line
        if letter.index < 0:
            raise LookupError("line: cut, and its place in the record is unknown")
        place = TopicPartition(letter.topic, letter.partition)
        if self._held != (place, letter.offset):
            value = self._value(place, letter.offset)
            # As the decoder counts them.
            self._lines = lines_of(value)
            self._held = (place, letter.offset)
        if letter.index >= len(self._lines) or not self._lines[letter.index].startswith(letter.line):
            raise LookupError("line: cut, and another one stands at its place now; was the topic made anew?")
        return self._lines[letter.index]

    def _value(self, place: TopicPartition, offset: int) -> bytes:
        gone = LookupError(f"line: cut, and its record is no longer in {place.topic}")
        if place.partition not in (self._consumer.partitions_for_topic(place.topic) or ()):
            raise gone
        first, end = self._consumer.beginning_offsets([place])[place], self._consumer.end_offsets([place])[place]
        if not first <= offset < end:
            raise gone
        self._consumer.assign([place])
        self._consumer.seek(place, offset)
        deadline = time.monotonic() + STALL_S
        while time.monotonic() < deadline:
            for record in self._consumer.poll(timeout_ms=500, max_records=1).get(place, ()):
                if record.offset != offset:
                    raise gone
                return record.value or b""
        raise LookupError(f"line: cut, and the broker did not give its record of {place.topic}")
