"""`genco dead-letters`: shows what could not be read, and sends it back.

What is shown was written by strangers: everything that is no printable character is escaped before it meets a terminal.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

from kafka import KafkaConsumer
from kafka.errors import KafkaError

from streams.clients import UnreachableError, kafka_consumer, kafka_producer
from streams.contracts.settings import JoinSettings, KafkaSettings, load
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.dead_letter_lines import Judge, OriginReader, edit_with, unedited
from streams.dead_letter_replay import Plan, prepare, send
from streams.dead_letters import Found, Group, Scan, Selection, group_letters
from streams.telemetry import now_ms

EXAMPLE_CHARACTERS: Final = 100


def show(selection: Selection, *, as_json: bool) -> int:
    """Print the selected letters: a table of their causes, or one JSON object each."""
    with _consumer(load(KafkaSettings)) as consumer:
        scan = Scan(consumer)
        letters = scan.letters(selection)
        try:
            for line in map(json_line, letters) if as_json else table(group_letters(letters)):
                print(line)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has enough, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    _tell_strangers(scan)
    return 0


def replay(selection: Selection, *, edit: str | None, force: bool, dry_run: bool) -> int:
    """Send the selected letters back.

    Raises:
        ValueError: If none of them can be sent, or the edit fails.
    """
    settings = load(JoinSettings)
    editor = unedited if edit is None else edit_with(edit)
    with _consumer(settings) as consumer, _consumer(settings) as origins:
        scan = Scan(consumer)
        plan = prepare(
            scan.letters(selection),
            judge=Judge(settings, now_ms()),
            whole_line=OriginReader(origins),
            edit=editor,
            force=force,
        )
    with plan:
        _tell_strangers(scan)
        for line in plan_lines(plan, scan.num_passed_over, settings.attribution_window_ms):
            print(line, flush=True)
        if plan.num_selected and not plan.ready.total():
            raise ValueError(
                f"none of {plan.num_selected} letters can be sent, for the causes above; mend the lines with --edit, "
                "or select others"
            )
        if dry_run:
            print("dry run: nothing was sent")
        if dry_run or not plan.ready.total():
            return 0
        with _answers(settings):
            producer = kafka_producer(settings)
            try:
                sent = send(plan, producer)
            finally:
                producer.close(timeout=10)
    print(f"sent and marked as replayed: {_counts(sent)}")
    return 0


def table(groups: Iterable[Group]) -> Iterator[str]:
    """Yield the lines of the table; each group has a second one with an example."""
    rows = [("topic", "letters", "replayed", "first", "last", "cause")]
    examples = [""]
    for group in groups:
        counts = (str(group.num_letters), str(group.num_replayed))
        rows.append((group.topic, *counts, time_text(group.first_ms), time_text(group.last_ms), printable(group.cause)))
        example = printable(group.example.decode("utf-8", "backslashreplace"), EXAMPLE_CHARACTERS)
        examples.append(f"\n    such as: {example}")
    if len(rows) == 1:
        yield "no dead letters"
        return
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    for row, example in zip(rows, examples, strict=True):
        topic, num_letters, num_replayed, first, last, cause = row
        yield (
            f"{topic:{wide[0]}}  {num_letters:>{wide[1]}}  {num_replayed:>{wide[2]}}  {first:{wide[3]}}  "
            f"{last:{wide[4]}}  {cause}{example}"
        )


def json_line(found: Found) -> str:
    """Return a letter as one line of JSON: its line as `line` if it is UTF-8, else as `line_base64`."""
    letter = found.letter
    row: dict[str, Any] = {
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "index": letter.index,
        "reason": letter.reason,
        "length": letter.length,
        "cut": letter.is_cut,
        "letter_offset": found.offset,
        "written_at": time_text(found.time_ms),
        "replayed": found.is_replayed,
    }
    try:
        row["line"] = letter.line.decode()
    except UnicodeDecodeError:
        row["line_base64"] = base64.b64encode(letter.line).decode()
    return json.dumps(row)


def plan_lines(plan: Plan, num_passed_over: int, window_ms: int) -> Iterator[str]:
    """Yield what a replay will do, and what it leaves out and why."""
    if num_passed_over:
        yield f"{num_passed_over} were replayed before and are passed over; --again sends them too"
    if not plan.num_selected:
        yield "no dead letters to replay"
        return
    yield f"of {plan.num_selected} letters {plan.ready.total()} can be sent: {_counts(plan.ready)}"
    for key, num in plan.refused.most_common():
        topic, cause = key
        yield f"left out: {num} of {topic}, the first at {plan.first_refused[key]}: {printable(cause)}"
    if plan.num_forced:
        yield f"forced: {plan.num_forced} will be dead letters again"
    if plan.num_beyond_window:
        yield (
            f"late: {plan.num_beyond_window} are older than the attribution window ({window_ms / 1000:g} s): their "
            "counterparts, if they came in time, wait no longer, so such an impression counts as not clicked"
        )


def printable(text: str, most: int | None = None) -> str:
    """Return text that is safe on a terminal, cut after so many characters of its own."""
    head = text if most is None else text[:most]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)
    return safe if len(head) == len(text) else safe + "..."


def time_text(time_ms: int) -> str:
    """Return a time in UTC, as ISO 8601."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _counts(by_topic: dict[str, int]) -> str:
    return ", ".join(f"{by_topic.get(topic, 0)} {topic}" for topic in (IMPRESSIONS, CLICKS))


def _tell_strangers(scan: Scan) -> None:
    if scan.num_strangers:
        print(
            f"{scan.num_strangers} records are no dead letters and left aside; the first: "
            f"{printable(scan.first_stranger)}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _consumer(settings: KafkaSettings) -> Iterator[KafkaConsumer]:
    with _answers(settings):
        consumer = kafka_consumer(settings)
        try:
            yield consumer
        finally:
            consumer.close()


@contextlib.contextmanager
def _answers(settings: KafkaSettings) -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise UnreachableError(
            f"the Kafka broker at {settings.kafka_bootstrap_servers} does not go on ({type(error).__name__}: {error}); "
            "check it, then run the same command again"
        ) from error
