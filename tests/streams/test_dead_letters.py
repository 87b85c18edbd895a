"""Dead letters are found, counted by cause, judged, mended and sent back once, impressions first."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

import streams.dead_letters as module
from streams.clients import UnreachableError
from streams.contracts.codec import MAX_LINE_BYTES, MAX_RECORD_BYTES, EventDecoder, encode_event
from streams.contracts.dead_letters import DeadLetter, encode_replayed, replayed_of
from streams.contracts.events import Click, Impression
from streams.contracts.settings import ConfigurationError, JoinSettings
from streams.contracts.topics import CLICKS, DEAD_LETTERS, IMPRESSIONS
from streams.dead_letter_lines import Judge, OriginReader, edit_with
from streams.dead_letter_replay import BATCH, CHUNK, Plan, prepare, send
from streams.dead_letters import MAX_GROUPS, OTHER_CAUSES, Found, Scan, Selection, cause_of, group_letters

NOW_MS = 1_764_000_000_000
SETTINGS = JoinSettings(kafka_bootstrap_servers="127.0.0.1:1", attribution_window_ms=600_000)


@dataclass
class Record:
    partition: int
    offset: int
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    timestamp: int = NOW_MS


@dataclass
class FakeConsumer:
    """A broker with records at given offsets; `ends` may lie beyond the last record, as after a transaction."""

    topics: dict[str, dict[int, list[Record]]]
    ends: dict[TopicPartition, int] = field(default_factory=dict)
    firsts: dict[TopicPartition, int] = field(default_factory=dict)
    polled: int = 0
    is_silent: bool = False
    _at: dict[TopicPartition, int] = field(default_factory=dict)

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(self.topics[topic]) if topic in self.topics else None

    def assign(self, places: Sequence[TopicPartition]) -> None:
        self._at = dict.fromkeys(places, 0)

    def seek_to_beginning(self, *places: TopicPartition) -> None:
        self._at = dict.fromkeys(places, 0)

    def seek(self, place: TopicPartition, offset: int) -> None:
        assert place in self._at
        self._at[place] = offset

    def position(self, place: TopicPartition) -> int:
        return self._at[place]

    def beginning_offsets(self, places: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {place: self.firsts.get(place, 0) for place in places}

    def end_offsets(self, places: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        def last(place: TopicPartition) -> int:
            return max((r.offset + 1 for r in self.topics[place.topic][place.partition]), default=0)

        return {place: self.ends.get(place, last(place)) for place in places}

    def poll(self, timeout_ms: int, max_records: int = 3) -> dict[TopicPartition, list[Record]]:
        if self.is_silent:
            return {}
        ((place, at),) = self._at.items()
        records = [r for r in self.topics[place.topic][place.partition] if r.offset >= at][:max_records]
        self.polled += len(records)
        self._at[place] = records[-1].offset + 1 if records else max(at, self.end_offsets([place])[place])
        return {place: records} if records else {}


def impression(number: int, time_ms: int = NOW_MS) -> Impression:
    return Impression(
        schema_version=1, decision_id=f"0.i{number}", occurred_at_ms=time_ms, product_id="p", context={},
        candidates={"title": ["t1"]}, creative={"title": "t1"}, slot_propensities={"title": 1.0}, propensity=1.0,
        model_id="default", epoch=0, policy_version=0, source="policy", holdout=False, seed=0, survival_probability=1.0,
    )  # fmt: skip


def click_line(number: int, time_ms: int = NOW_MS) -> bytes:
    return encode_event(Click(schema_version=1, decision_id=f"0.i{number}", occurred_at_ms=time_ms))


def letter(line: bytes = b"x", topic: str = CLICKS, **changes: Any) -> DeadLetter:
    values = {"partition": 0, "offset": 0, "index": 0, "reason": "r", "length": len(line)} | changes
    return DeadLetter(topic=topic, line=line, **values)


def found(what: DeadLetter, offset: int = 0, *, is_replayed: bool = False, time_ms: int = NOW_MS) -> Found:
    return Found(what, offset, time_ms, is_replayed)


def topic_of(*partitions: Sequence[DeadLetter | int]) -> FakeConsumer:
    """Return a consumer of dead letters; a number is the mark of the letter at this offset."""
    return FakeConsumer(
        {
            DEAD_LETTERS: {
                p: [
                    Record(p, offset, *(encode_replayed(item) if isinstance(item, int) else item.encode()))
                    for offset, item in enumerate(items)
                ]
                for p, items in enumerate(partitions)
            }
        }
    )


def offsets(consumer: FakeConsumer, **selection: Any) -> list[tuple[int, int]]:
    return [(f.letter.partition, f.offset) for f in Scan(consumer).letters(Selection(**selection))]


# -- finding -----------------------------------------------------------------------------------------------------------


def test_scan_finds_letters_of_all_partitions_and_knows_their_marks() -> None:
    consumer = topic_of([letter(offset=0), letter(offset=1), 0], [letter(partition=1), 7], [])
    letters = list(Scan(consumer).letters(Selection()))
    assert [(f.letter.partition, f.offset, f.is_replayed) for f in letters] == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
    ]


def test_marks_count_in_their_own_partition_alone() -> None:
    consumer = topic_of([letter()], [letter(partition=1), 0])
    assert [f.is_replayed for f in Scan(consumer).letters(Selection())] == [False, True]


def test_letter_that_a_crash_made_twice_counts_once() -> None:
    skewed = [letter(b"a", index=-1), letter(b"b", index=-1), letter(b"a", index=-1)]
    again = letter(b"other text", reason="of another version", offset=5)
    consumer = topic_of([letter(offset=5), letter(offset=5, index=1), again, letter(topic=IMPRESSIONS, offset=5)])
    assert offsets(consumer) == [(0, 0), (0, 1), (0, 3)]
    assert offsets(topic_of(skewed)) == [(0, 0), (0, 1)]


def test_memory_of_origins_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_ORIGINS", 2)
    consumer = topic_of([letter(offset=o) for o in (1, 2, 2, 3, 1)])
    assert offsets(consumer) == [(0, 0), (0, 1), (0, 3), (0, 4)]


def test_selection_admits_what_all_fields_admit() -> None:
    consumer = topic_of(
        [letter(offset=0, reason="context: bad"), letter(offset=1, topic=IMPRESSIONS), 0],
        [letter(partition=1, reason="context: bad")],
    )
    assert offsets(consumer, topic=CLICKS) == [(0, 0), (1, 0)]
    assert offsets(consumer, topic=CLICKS, partition=1) == [(1, 0)]
    assert offsets(consumer, reason="text: b") == [(0, 0), (1, 0)]
    assert offsets(consumer, limit=2) == [(0, 0), (0, 1)]
    assert offsets(consumer, limit=0) == []
    assert offsets(consumer, is_replayed=False) == [(0, 1), (1, 0)]
    assert offsets(consumer, is_replayed=False, limit=1) == [(0, 1)]


def test_times_include_since_and_exclude_until() -> None:
    consumer = topic_of([letter(offset=o) for o in range(3)])
    for number, record in enumerate(consumer.topics[DEAD_LETTERS][0]):
        record.timestamp = 1000 + number
    assert offsets(consumer, since_ms=1001) == [(0, 1), (0, 2)]
    assert offsets(consumer, until_ms=1001) == [(0, 0)]
    assert offsets(consumer, since_ms=1001, until_ms=1002) == [(0, 1)]


@pytest.mark.parametrize(
    "field_values",
    [{"topic": CLICKS}, {"reason": "r"}, {"partition": 0}, {"since_ms": 0}, {"until_ms": 0}, {"limit": 0}],
)
def test_any_filter_narrows(field_values: dict[str, Any]) -> None:
    assert Selection(**field_values).is_narrowed
    assert not Selection(is_replayed=False).is_narrowed


def test_limit_ends_the_reading() -> None:
    consumer = topic_of([letter()], [letter(partition=1, offset=o) for o in range(50)])
    assert len(offsets(consumer, limit=1)) == 1
    assert consumer.polled == 2  # the first partition, for its marks and for its letters


def test_strangers_are_counted_and_the_first_is_named() -> None:
    consumer = topic_of([letter(), letter(partition=4, offset=9)])
    consumer.topics[DEAD_LETTERS][0].append(Record(0, 2, None, []))
    scan = Scan(consumer)
    assert [f.offset for f in scan.letters(Selection())] == [0]
    assert scan.num_strangers == 2
    assert scan.first_stranger.startswith("partition 0 offset 1: no dead letter: its header partition is 4")


def test_offsets_without_records_and_removed_ones_are_passed() -> None:
    consumer = topic_of([letter(offset=o) for o in range(4)])
    place = TopicPartition(DEAD_LETTERS, 0)
    del consumer.topics[DEAD_LETTERS][0][0]
    consumer.firsts[place], consumer.ends[place] = 1, 9
    assert offsets(consumer) == [(0, 1), (0, 2), (0, 3)]


def test_what_is_written_during_the_scan_is_not_read() -> None:
    consumer = topic_of([letter(offset=o) for o in range(4)])
    consumer.ends[TopicPartition(DEAD_LETTERS, 0)] = 2
    assert offsets(consumer) == [(0, 0), (0, 1)]


def test_missing_topic_and_partition_are_told() -> None:
    with pytest.raises(ConfigurationError, match="dead_letters does not exist"):
        Scan(FakeConsumer({}))
    with pytest.raises(ValueError, match="partition 2: dead_letters has 2, 0 to 1"):
        offsets(topic_of([], []), partition=2)


def test_broker_that_gives_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.0)
    consumer = topic_of([letter()])
    consumer.is_silent = True
    with pytest.raises(UnreachableError, match="dead_letters partition 0"):
        offsets(consumer)


# -- causes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "cause"),
    [
        (
            "event: JSON is malformed: invalid character (byte 3)",
            "event: JSON is malformed: invalid character (byte 12)",
            "event: JSON is malformed: invalid character (byte N)",
        ),
        (
            "occurred_at_ms: 1764000000123 is 61000 ms after its record was written",
            "occurred_at_ms: 1764000000999 is 7261000 ms after its record was written",
            "occurred_at_ms: N is N ms after its record was written",
        ),
        (
            "creative.title: 't9' is not among its candidates",
            'creative.title: "it\'s" is not among its candidates',
            "creative.title: '...' is not among its candidates",
        ),
        (
            "creative: slots are ['a', 'b']; expected those of candidates, ['a']",
            "creative: slots are ['c']; expected those of candidates, []",
            "creative: slots are [...]; expected those of candidates, [...]",
        ),
        (
            "propensity: 0.25; expected the product of slot_propensities, 1e-05",
            "propensity: 0.125; expected the product of slot_propensities, 0.5",
            "propensity: N; expected the product of slot_propensities, N",
        ),
        ("event: 300000 bytes; at most 262144", "event: 300001 bytes; at most 262144", "event: N bytes; at most N"),
    ],
)
def test_same_fault_of_different_lines_is_one_cause(first: str, second: str, cause: str) -> None:
    assert cause_of(first) == cause_of(second) == cause


@pytest.mark.parametrize(
    "reason",
    [
        "schema_version: Invalid enum value 2",
        "decision_id: Expected `str` of length <= 128",
        "event: Object missing required field `occurred_at_ms`",
        "occurred_at_ms: Expected `int`, got `str`",
        "reward: Expected `float` >= 0.0",
    ],
)
def test_what_tells_the_fault_stays(reason: str) -> None:
    assert cause_of(reason) == reason


@given(st.text("ab 0123456789.-e", max_size=30), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))
def test_values_of_any_kind_are_left_out_of_the_cause(field: str, number: int, real: float, quoted: str) -> None:
    def reason(number: int, real: float, quoted: str) -> str:
        return f"{field}: {quoted!r} at byte {abs(number)} of {number + 10**6 * (1 if number >= 0 else -1)} [{real}]"

    assert cause_of(reason(number, real, quoted)) == cause_of(reason(-7, 0.5, "x"))


def test_groups_count_by_topic_and_cause_with_times_and_example() -> None:
    letters = [
        found(letter(b"one", reason="a: 'x'"), time_ms=5),
        found(letter(b"two", reason="a: 'y'"), time_ms=3, is_replayed=True),
        found(letter(b"three", reason="a: 'x'", topic=IMPRESSIONS), time_ms=9),
    ]
    first, second = group_letters(letters)
    assert (first.topic, first.cause, first.num_letters, first.num_replayed) == (CLICKS, "a: '...'", 2, 1)
    assert (first.first_ms, first.last_ms, first.example) == (3, 5, b"one")
    assert (second.topic, second.num_letters, second.num_replayed) == (IMPRESSIONS, 1, 0)


def test_number_of_groups_is_bounded_and_nothing_is_lost() -> None:
    letters = [found(letter(reason=f"field{n}x: bad")) for n in range(MAX_GROUPS + 50)]
    groups = group_letters(letters)
    assert len(groups) == MAX_GROUPS + 1
    assert sum(group.num_letters for group in groups) == len(letters)
    assert (groups[0].cause, groups[0].num_letters) == (OTHER_CAUSES, 50)


# -- judging and completing --------------------------------------------------------------------------------------------


def test_judge_says_what_the_joiner_would_say() -> None:
    judge = Judge(SETTINGS, NOW_MS)
    assert judge.fault(CLICKS, click_line(1)) == (None, False)
    assert judge.fault(IMPRESSIONS, encode_event(impression(1))) == (None, False)
    assert judge.fault(CLICKS, click_line(1, NOW_MS + 60_000)) == (None, False)
    assert "ahead" in str(judge.fault(CLICKS, click_line(1, NOW_MS + 60_001))[0])
    assert judge.fault(CLICKS, click_line(1, NOW_MS - 600_000)) == (None, False)
    assert judge.fault(CLICKS, click_line(1, NOW_MS - 600_001)) == (None, True)
    oldest_ms = NOW_MS - SETTINGS.max_event_age_ms
    assert judge.fault(CLICKS, click_line(1, oldest_ms)) == (None, True)
    assert "older than" in str(judge.fault(CLICKS, click_line(1, oldest_ms - 1))[0])
    any_age = SETTINGS.model_copy(update={"max_event_age_ms": 0})
    assert Judge(any_age, NOW_MS).fault(CLICKS, click_line(1, 0)) == (None, True)
    assert "missing required field" in str(judge.fault(IMPRESSIONS, click_line(1))[0])
    assert judge.fault(CLICKS, b" ")[0] == "event: 0 in one line; expected one"
    assert judge.fault(CLICKS, click_line(1) + b"\n" + click_line(2))[0] == "event: 2 in one line; expected one"


def origin_reader(value: bytes = b"a\n\n bb \ncc", **changes: Any) -> OriginReader:
    consumer = FakeConsumer({IMPRESSIONS: {0: []}, CLICKS: {0: [Record(0, o, value, []) for o in (4, 6)]}}, **changes)
    return OriginReader(consumer)


def test_whole_letter_needs_no_origin() -> None:
    assert OriginReader(FakeConsumer({}))(letter(b"whole")) == b"whole"


def test_cut_letter_is_completed_from_its_origin_counting_lines_as_the_decoder_does() -> None:
    read = origin_reader()
    assert read(letter(b" b", offset=4, index=1, length=4)) == b" bb "
    assert read(letter(b"c", offset=4, index=2, length=2)) == b"cc"
    assert read(letter(b"a", offset=6, index=0, length=2)) == b"a"


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (letter(b" b", offset=4, index=-1, length=4), "its place in the record is unknown"),
        (letter(b" b", offset=3, index=1, length=4), "no longer in clicks"),
        (letter(b" b", offset=5, index=1, length=4), "no longer in clicks"),
        (letter(b" b", offset=7, index=1, length=4), "no longer in clicks"),
        (letter(b" b", offset=4, index=1, length=4, partition=2), "no longer in clicks"),
        (letter(b" b", topic=IMPRESSIONS, length=4), "no longer in impressions"),
        (letter(b"zz", offset=4, index=1, length=4), "another one stands at its place"),
        (letter(b" b", offset=4, index=9, length=4), "another one stands at its place"),
    ],
)
def test_cut_letter_whose_origin_is_gone_is_refused(cut: DeadLetter, said: str) -> None:
    read = origin_reader(firsts={TopicPartition(CLICKS, 0): 4})
    with pytest.raises(LookupError, match=said):
        read(cut)


# -- editing -----------------------------------------------------------------------------------------------------------


def python(code: str, directory: Path) -> str:
    script = directory / "an edit.py"
    script.write_text(code)
    return f"{sys.executable} '{script}'"


def test_edit_gets_the_lines_and_gives_as_many(tmp_path: Path) -> None:
    upper = python("import sys\nfor line in sys.stdin: print(line.strip().upper())", tmp_path)
    assert edit_with(upper)([b"a", b"b c"]) == [b"A", b"B C"]
    assert edit_with(upper)([]) == []


def test_edit_has_no_shell(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    echo = python("import sys\nsys.stdin.read()\nprint(sys.argv[1:])", tmp_path)
    assert edit_with(f"{echo} ; touch {victim} $HOME")([b"a"]) == [f"[';', 'touch', '{victim}', '$HOME']".encode()]
    assert not victim.exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.stdin.read()", "got 2 lines and printed 0"),
        ("import sys; print(sys.stdin.read())", "got 2 lines and printed 3"),
        ("import sys; sys.exit('no such field')", "ended with code 1 and said 'no such field'; nothing was sent"),
    ],
)
def test_edit_that_fails_is_told_with_what_it_said(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was sent") as told:
        edit_with(python(code, tmp_path))([b"a", b"b"])
    assert said in str(told.value)


@pytest.mark.parametrize(("command", "said"), [("'", "quote"), (" ", "no command"), ("/none/such x", "cannot run")])
def test_command_that_is_none_is_told(command: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        edit_with(command)([b"a"])


# -- preparing and sending ---------------------------------------------------------------------------------------------


class Delivery:
    def __init__(self, error: KafkaError | None) -> None:
        self._error = error

    def get(self, timeout: float | None = None) -> None:
        if self._error is not None:
            raise self._error


class FakeProducer:
    """Keeps what was sent. Refuses the records named by topic and number; `full` raises in `send` itself."""

    def __init__(self, *refused: tuple[str, int], full: tuple[str, int] | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.log: list[Any] = []
        self._refused = refused
        self._full = full

    def send(self, topic: str, **record: Any) -> Delivery:
        number = sum(r["topic"] == topic for r in self.sent)
        if (topic, number) == self._full:
            raise KafkaTimeoutError("no room")
        self.sent.append({"topic": topic} | record)
        self.log.append(topic)
        return Delivery(KafkaTimeoutError("too late") if (topic, number) in self._refused else None)

    def flush(self, timeout: float | None = None) -> None:
        self.log.append("flush")

    def lines(self, topic: str, partition: int) -> list[bytes]:
        records = [r for r in self.sent if (r["topic"], r["partition"]) == (topic, partition)]
        return [line for r in records for line in r["value"].split(b"\n")]

    def marks(self, partition: int) -> list[int | None]:
        here = [r for r in self.sent if (r["topic"], r["partition"]) == (DEAD_LETTERS, partition)]
        assert all(r["value"] == b"" for r in here)
        return [replayed_of(r["headers"]) for r in here]


def plan_of(letters: Sequence[Found], **options: Any) -> Plan:
    judge = Judge(SETTINGS, NOW_MS)
    return prepare(iter(letters), judge=judge, whole_line=OriginReader(FakeConsumer({})), **options)


def mixed() -> Iterator[Found]:
    for number in range(3):
        for partition in range(2):
            offset = 2 * number
            yield found(letter(click_line(number), partition=partition), offset)
            yield found(letter(encode_event(impression(number)), IMPRESSIONS, partition=partition), offset + 1)


def test_lines_go_back_to_where_they_came_from_and_are_marked() -> None:
    producer = FakeProducer()
    with plan_of(sorted(mixed(), key=lambda f: f.letter.partition)) as plan:
        assert producer.sent == []
        sent = send(plan, producer)
    assert sent == {IMPRESSIONS: 6, CLICKS: 6}
    for partition in (0, 1):
        assert producer.lines(CLICKS, partition) == [click_line(n) for n in range(3)]
        assert producer.lines(IMPRESSIONS, partition) == [encode_event(impression(n)) for n in range(3)]
        assert producer.marks(partition) == [1, 3, 5, 0, 2, 4]


def test_impressions_are_flushed_before_the_first_click_and_marks_come_after_the_broker_has_the_lines() -> None:
    producer = FakeProducer()
    with plan_of(list(mixed())) as plan:
        send(plan, producer)
    steps = [step for step, before in zip(producer.log, [None, *producer.log], strict=False) if step != before]
    assert steps == [IMPRESSIONS, "flush", DEAD_LETTERS, "flush", CLICKS, "flush", DEAD_LETTERS, "flush"]


def test_records_hold_at_most_a_batch_of_one_partition_and_fit_a_broker() -> None:
    clicks = [found(letter(click_line(n)), n) for n in range(CHUNK + BATCH + 1)]
    big = encode_event(impression(1))[:-1] + b',"unknown":"' + b"x" * (MAX_LINE_BYTES - 1_000) + b'"}'
    impressions = [found(letter(big, IMPRESSIONS), 10_000 + n) for n in range(9)]
    producer = FakeProducer()
    with plan_of([*clicks, *impressions]) as plan:
        assert send(plan, producer) == {CLICKS: len(clicks), IMPRESSIONS: 9}
    records = [r for r in producer.sent if r["topic"] != DEAD_LETTERS]
    assert all(r["value"].count(b"\n") < BATCH and len(r["value"]) <= MAX_RECORD_BYTES for r in records)
    decoder = EventDecoder(Click)
    batches = [decoder.decode_batch(r["value"]).events for r in records if r["topic"] == CLICKS]
    assert [e.decision_id for events in batches for e in events] == [f"0.i{n}" for n in range(len(clicks))]
    assert producer.marks(0) == [f.offset for f in (*impressions, *clicks)]


def test_lines_that_would_be_dead_letters_again_are_left_out_and_counted() -> None:
    letters = [
        found(letter(b"{"), 1),
        found(letter(b"{{"), 2),
        found(letter(click_line(1)), 3),
        found(letter(b"cut", length=9), 4),
        found(letter(click_line(1, NOW_MS - 700_000)), 5),
    ]
    with plan_of(letters) as plan:
        assert (plan.num_selected, plan.ready, plan.num_forced, plan.num_beyond_window) == (5, {CLICKS: 2}, 0, 1)
        assert sum(plan.refused.values()) == 3
        assert plan.refused[CLICKS, "line: cut, and its record is no longer in clicks"] == 1
        assert plan.first_refused[CLICKS, "line: cut, and its record is no longer in clicks"] == "partition 0 offset 4"
        producer = FakeProducer()
        send(plan, producer)
    assert producer.marks(0) == [3, 5]


def test_force_sends_bad_lines_and_still_no_half_ones() -> None:
    letters = [found(letter(b"{"), 1), found(letter(b"cut", length=9), 2)]
    producer = FakeProducer()
    with plan_of(letters, force=True) as plan:
        assert (plan.ready, plan.num_forced, plan.refused.total()) == ({CLICKS: 1}, 1, 1)
        send(plan, producer)
    assert producer.lines(CLICKS, 0) == [b"{"]


def test_edit_gets_chunks_and_its_lines_are_judged_and_sent() -> None:
    sizes = []

    def mend(lines: Sequence[bytes]) -> list[bytes]:
        sizes.append(len(lines))
        return [line.replace(b'"at"', b'"occurred_at_ms"') for line in lines]

    good = [click_line(n) for n in range(CHUNK + 5)]
    letters = [found(letter(line.replace(b'"occurred_at_ms"', b'"at"')), n) for n, line in enumerate(good)]
    producer = FakeProducer()
    with plan_of([*letters, found(letter(b"hopeless"), CHUNK + 5)], edit=mend) as plan:
        assert plan.refused.total() == 1
        send(plan, producer)
    assert sizes == [CHUNK, 6]
    assert producer.lines(CLICKS, 0) == good


def test_chunks_are_bounded_in_bytes_too() -> None:
    sizes = []
    line = b"x" * MAX_LINE_BYTES
    plan_of(
        [found(letter(line), n) for n in range(40)], edit=lambda lines: sizes.append(len(lines)) or lines
    ).__exit__()
    assert sizes == [32, 8]


def test_failing_edit_leaves_no_file_open() -> None:
    def fail(lines: Sequence[bytes]) -> Sequence[bytes]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):  # an open spool would be a ResourceWarning, which is an error here
        plan_of([found(letter(click_line(1)))], edit=fail)


def test_what_the_broker_took_is_marked_though_it_refused_the_next() -> None:
    letters = [found(letter(click_line(n)), n) for n in range(3 * BATCH)]
    producer = FakeProducer((CLICKS, 1))
    with plan_of(letters) as plan, pytest.raises(RuntimeError, match=f"marked {2 * BATCH} letters, and refused"):
        send(plan, producer)
    assert producer.marks(0) == [*range(BATCH), *range(2 * BATCH, 3 * BATCH)]


def test_what_was_under_way_is_marked_when_the_producer_has_no_room() -> None:
    letters = [found(letter(click_line(n)), n) for n in range(2 * BATCH)]
    producer = FakeProducer(full=(CLICKS, 1))
    with plan_of(letters) as plan, pytest.raises(RuntimeError, match=f"marked {BATCH} letters.*no room"):
        send(plan, producer)
    assert producer.marks(0) == [*range(BATCH)]


def test_clicks_do_not_follow_impressions_that_were_refused() -> None:
    producer = FakeProducer((IMPRESSIONS, 0))
    with plan_of(list(mixed())) as plan, pytest.raises(RuntimeError, match="refused others"):
        send(plan, producer)
    assert CLICKS not in producer.log


@pytest.mark.parametrize("producer", [FakeProducer((DEAD_LETTERS, 0)), FakeProducer(full=(DEAD_LETTERS, 0))])
def test_marks_that_were_refused_are_told(producer: FakeProducer) -> None:
    with (
        plan_of([found(letter(click_line(1)))]) as plan,
        pytest.raises(RuntimeError, match=r"not all their marks.*duplicates"),
    ):
        send(plan, producer)
