"""One cause at a time, the explaining one, and alerts that neither flicker nor repeat themselves."""

from typing import Any

from streams.contracts.alerts import Cause, Severity
from streams.monitor.diagnosis import CLEAR_MS, COOL_DOWN_MS, HOLD_MS, REPEAT_MS, Diagnosis, Episodes, Finding

CAUSES = {
    "join": Cause.JOIN_BROKEN,
    "mix": Cause.MIX_MOVED,
    "learner": Cause.LEARNER_BROKE,
    "world": Cause.WORLD_CHANGED,
}


def finding(name: str, is_on: bool, is_suspected: bool = False, **evidence: Any) -> Finding:
    return Finding(
        name=name,
        cause=CAUSES[name],
        severity=Severity.PAGE,
        is_on=is_on,
        is_suspected=is_suspected,
        summary=f"{name} is wrong",
        evidence=evidence,
    )


def findings(*on: str, suspected: str = "") -> list[Finding]:
    return [finding(name, name in on, name == suspected) for name in CAUSES]


def names(found: list[Finding]) -> list[str]:
    return [each.name for each in found]


def test_first_finding_gives_the_cause_and_its_effects_are_no_alerts() -> None:
    assert names(Diagnosis().update(findings("mix", "learner", "world"), 0)) == ["mix"]


def test_finding_waits_for_a_suspected_one_before_it_but_not_for_ever() -> None:
    diagnosis = Diagnosis()
    assert diagnosis.update(findings("world", suspected="mix"), 0) == []
    assert diagnosis.update(findings("world", suspected="mix"), HOLD_MS - 1) == []
    assert names(diagnosis.update(findings("world", suspected="mix"), HOLD_MS)) == ["world"]


def test_cause_stays_until_it_is_over_and_only_a_broken_join_takes_its_place() -> None:
    diagnosis = Diagnosis()
    diagnosis.update(findings("world"), 0)
    assert names(diagnosis.update(findings("learner", "world"), 1_000)) == ["world"]
    assert diagnosis.update(findings("learner"), CLEAR_MS - 1) == []
    assert names(diagnosis.update(findings("learner"), 1_000 + CLEAR_MS)) == ["learner"]
    assert names(diagnosis.update(findings("join", "learner"), 2_000 + CLEAR_MS)) == ["join"]


def test_alert_is_repeated_ends_late_and_cools_down() -> None:
    episodes, wrong = Episodes("default"), [finding("world", True, ratio=0.5, unknown=float("nan"))]
    (first,) = episodes.update(wrong, 0)
    assert (first.state, first.evidence) == ("firing", {"ratio": 0.5})
    assert episodes.update(wrong, REPEAT_MS - 1) == []
    (again,) = episodes.update(wrong, REPEAT_MS)
    assert (again.alert_id, again.since_ms, again.occurred_at_ms) == (first.alert_id, 0, REPEAT_MS)
    assert episodes.update([], REPEAT_MS + CLEAR_MS - 1) == []
    end_ms = REPEAT_MS + CLEAR_MS
    assert [alert.state for alert in episodes.update([], end_ms)] == ["resolved"]
    assert episodes.update(wrong, end_ms + COOL_DOWN_MS - 1) == []
    assert [alert.state for alert in episodes.update(wrong, end_ms + COOL_DOWN_MS)] == ["firing"]


def test_alert_ends_at_once_when_another_cause_explains_it() -> None:
    episodes = Episodes("default")
    episodes.update([finding("world", True)], 0)
    ended = {alert.name: alert for alert in episodes.update([finding("join", True)], 1_000)}
    assert (ended["world"].state, ended["join"].state) == ("resolved", "firing")
    assert ended["world"].summary == "an effect of another cause: join broken"
