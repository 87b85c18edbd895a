"""The alert that an outage makes, and the desk that answers it beside the join."""

import time
from collections.abc import Callable
from typing import Any

import pytest

import streams.join_alerts as module
from streams.clients import UnreachableError
from streams.contracts.alerts import Alert
from streams.contracts.control import ControlRecord, RegistryState
from streams.contracts.settings import ConfigurationError, JoinSettings
from streams.join_alerts import Desk, alert_of
from streams.join_guard import Notice
from streams.join_rate import Outage

OUTAGE = Outage(since_ms=900_000, until_ms=960_000, expected=60.0, observed=3, num_shown=3_000, false_negatives=9.0)


def settings(**changes: Any) -> JoinSettings:
    return JoinSettings(**{"kafka_bootstrap_servers": "127.0.0.1:1", **changes})


def notice(**changes: Any) -> Notice:
    fields: dict[str, Any] = {
        "alert_id": "JoinRateDrop-2-5",
        "partitions": (2, 3),
        "outage": OUTAGE,
        "began_at_ms": 970_000,
        "held_at_ms": 955_000,
        "is_holding": True,
    }
    return Notice(**fields | changes)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_the_alert_says_what_is_missing_what_was_lost_and_what_ends_it() -> None:
    alert = alert_of(notice(), settings(model_id="shop"), 5, 971_000)
    assert Alert.from_bytes(alert.to_bytes()) == alert
    assert (alert.name, alert.cause, alert.severity, alert.state) == ("JoinRateDrop", "join broken", "page", "firing")
    assert (alert.model_id, alert.since_ms, alert.occurred_at_ms) == ("shop", 970_000, 971_000)
    assert "3 of 60 expected clicks" in alert.summary
    assert "at most 19 clicked impressions left as negatives" in alert.summary
    evidence = alert.evidence
    assert evidence["partitions"] == "2,3"
    assert (evidence["click_share"], evidence["held_at_seconds"]) == (0.05, 955.0)
    assert evidence["detection_clicks"] == 51.5
    assert "genco policy accept-clicks" in alert.actions[0]


def test_the_alert_of_a_hold_that_has_let_go_and_of_one_that_is_over() -> None:
    passing = alert_of(notice(is_holding=False), settings(), 5, 1)
    assert "leave as unknown" in passing.summary
    over = alert_of(notice(end="late clicks have come"), settings(), 5, 1)
    assert (over.state, over.alert_id, over.actions) == ("resolved", passing.alert_id, [])
    assert "late clicks have come" in over.summary


def test_without_redis_the_desk_answers_nothing() -> None:
    desk = Desk(settings())
    desk.take(alert_of(notice(), settings(), 5, 1))
    assert list(desk.answered()) == []
    desk.close()


def test_the_desk_answers_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Responder:
        def __init__(self, *_: Any, **options: Any) -> None:
            assert (options["who"], options["exploration"]) == ("genco join", 0.25)

        def respond(self, alert: Alert) -> Alert:
            return alert.model_copy(update={"actions": ["done"]})

    monkeypatch.setattr(module, "Responder", Responder)
    desk = Desk(settings(redis_url="redis://127.0.0.1:1/0"))
    desk.take(alert_of(notice(), settings(), 5, 1))
    wait_for(lambda: [alert.actions for alert in desk.answered()] == [["done"]])
    assert list(desk.answered()) == []
    desk.close()


def test_the_desk_hears_when_an_operator_has_accepted_the_click_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [
        UnreachableError("away"),
        None,
        ControlRecord(model_id="default", written_at_ms=1, state=RegistryState(clicks_accepted_ms=77)),
    ]

    def newest(model_id: str) -> ControlRecord | None:
        assert model_id == "default"
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, OSError):
            raise found
        return found  # type: ignore[no-any-return]

    desk = Desk(settings())
    monkeypatch.setattr(module, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(desk._control, "newest", newest)
    assert desk.accepted_ms() == 0
    wait_for(lambda: desk.accepted_ms() == 77)
    desk.close()


def test_a_wrong_table_of_actions_ends_the_start_with_one_line() -> None:
    with pytest.raises(ConfigurationError, match="GENCO_ALERT_ACTIONS: 'JoinRateDrop=sleep' is no"):
        Desk(settings(alert_actions="JoinRateDrop=sleep"))
