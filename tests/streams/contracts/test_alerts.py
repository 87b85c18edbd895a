"""Records of the topic `alerts`."""

import pytest

from streams.contracts.alerts import Alert, Cause, Severity

ALERT = Alert(
    alert_id="JoinRateDrop-1",
    name="JoinRateDrop",
    cause=Cause.JOIN_BROKEN,
    severity=Severity.PAGE,
    model_id="default",
    state="firing",
    since_ms=1,
    occurred_at_ms=2,
    summary="12 clicks where 240 were expected",
    evidence={"clicks": 12.0, "topic": "clicks"},
)


def test_record_survives_its_bytes() -> None:
    assert Alert.from_bytes(ALERT.to_bytes()) == ALERT


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"{", "Invalid JSON"),
        (ALERT.to_bytes().replace(b"join broken", b"bad luck"), "cause"),
        (ALERT.to_bytes().replace(b'"schema_version":1', b'"schema_version":2'), "schema_version"),
        (ALERT.model_copy(update={"summary": "x" * 501}).to_bytes(), "summary"),
    ],
)
def test_what_is_no_record_is_refused_with_its_field(value: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"not a record of the topic alerts: .*{said}"):
        Alert.from_bytes(value)
