"""Records of the topic `control`: what is read, which one counts, and what is refused."""

import pytest

from streams.contracts.control import Action, AuditRecord, ControlRecord, PointerState, RegistryState, newest
from streams.contracts.registry import Version

POINTER = PointerState(epoch=3, version=42, revision=7, sha256="a" * 64)


def record(sequence: int, *, pin: str | None = None, written_at_ms: int = 1_000) -> ControlRecord:
    state = RegistryState(pointer=POINTER, pin=pin, epoch=3, revision=7, sequence=sequence)
    return ControlRecord(model_id="m", written_at_ms=written_at_ms, state=state)


def test_record_comes_back_as_it_was_sent() -> None:
    sent = record(4, pin="3:42")
    audit = AuditRecord(
        what=Action.PIN, who="ann@host", when_ms=5, reason="ctr fell ☹", before=RegistryState(), after=sent.state
    )
    sent = sent.model_copy(update={"audit": audit})
    got = ControlRecord.from_bytes(sent.model_dump_json().encode())
    assert got == sent
    assert got.state.pinned == Version(3, 42) == got.state.current


def test_bytes_of_the_first_release_are_still_read() -> None:
    text = (
        b'{"schema_version":1,"model_id":"m","written_at_ms":5,"state":{"pointer":null,"pin":"1:2","frozen":true,'
        b'"epoch":1,"revision":9,"sequence":3},"audit":{"what":"freeze","who":"a@b","when_ms":4,"reason":"",'
        b'"before":{"pin":"1:2"},"after":{"pin":"1:2","frozen":true}},"later":1}'
    )
    got = ControlRecord.from_bytes(text)
    assert (got.state.pinned, got.state.frozen, got.state.revision) == (Version(1, 2), True, 9)
    assert got.audit is not None
    assert got.audit.what is Action.FREEZE


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "EOF"),
        (b"{}", "model_id"),
        (b'{"model_id":"m","written_at_ms":1,"state":{"pin":"1"}}', r"state\.pin"),
        (b'{"model_id":"m","written_at_ms":1,"state":{"revision":-1}}', r"state\.revision"),
        (b'{"schema_version":2,"model_id":"m","written_at_ms":1,"state":{}}', "schema_version"),
    ],
)
def test_what_is_no_record_is_refused_with_the_reason(value: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"not a record of the topic control: .*{reason}"):
        ControlRecord.from_bytes(value)


def test_largest_sequence_counts_whatever_the_order_in_kafka() -> None:
    frozen, thawed = record(1, pin="3:1"), record(2)
    assert newest([frozen, thawed]) == newest([thawed, frozen]) == thawed
    later = record(2, written_at_ms=2_000)
    assert newest([frozen, thawed, later]) == later
    assert newest([]) is None


def test_revision_floor_is_above_what_could_be_published_since() -> None:
    assert record(1).revision_floor(1_000) == 7
    assert record(1).revision_floor(1_000 + 60_000) == 7 + 6_000
    assert record(1).revision_floor(0) == 7, "a clock that was set back takes nothing away"


def test_versions_are_read_as_people_and_keys_write_them() -> None:
    assert Version.parse("3.42") == Version.parse("3:42") == Version(3, 42)
    assert (Version(3, 42).key, str(Version(3, 42))) == ("3:42", "3.42")
    assert Version(2, 1) > Version(1, 99)
    for text in ("", "3", "3.", "-1.2", "3.4.5", "x" * 1_000):
        with pytest.raises(ValueError, match=r"expected EPOCH\.VERSION"):
            Version.parse(text)
