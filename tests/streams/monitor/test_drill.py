"""Healthy traffic raises nothing; each trouble raises the right cause, and no other, within a stated time.

Forty impressions a second, of which three are clicked. Times are those of the trouble's first impression plus what is
said here, label wait and attribution window (40 s) included. Each scenario goes on from the same healthy time.
"""

import copy
import itertools
from collections.abc import Callable

import pytest

from streams.contracts.alerts import Alert, Cause
from tests.monitor_drill import START_MS, Drill, Trouble

NOT_A_NUMBER = float("nan")


@pytest.fixture(scope="module")
def healthy() -> Drill:
    drill = Drill()
    drill.run(2_400)
    return drill


def test_healthy_traffic_raises_nothing(healthy: Drill) -> None:
    assert healthy.alerts == []
    monitor = healthy.monitor
    assert monitor.checks.is_warm
    assert monitor.checks.recent.all.ratio == pytest.approx(1.0, abs=0.08)
    assert monitor.checks.recent.normalized_entropy < 1.0
    assert monitor.policy.audit_mean == pytest.approx(1.0, abs=0.2)
    assert monitor.maturing.num_unmatched == monitor.maturing.num_too_late == 0
    assert max(each.index for each in monitor.mix.features.values()) < 0.1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_two_hours_of_healthy_traffic_raise_nothing(seed: int) -> None:
    drill = Drill(seed=seed)
    drill.run(7_200)
    assert drill.alerts == []


def learns_in_half_an_hour(seconds: float) -> Trouble:
    return Trouble(has_drifted=True, learned=min(1.0, seconds / 1_800))


SCENARIOS: dict[str, tuple[Trouble | Callable[[float], Trouble], str, Cause, float]] = {
    "world-drift": (learns_in_half_an_hour, "ExternalDrift", Cause.WORLD_CHANGED, 180.0),
    "world-demand": (Trouble(appeal=0.5), "ExternalDrift", Cause.WORLD_CHANGED, 300.0),
    "learner-nan": (Trouble(bias=NOT_A_NUMBER), "WeightNormJump", Cause.LEARNER_BROKE, 30.0),
    "learner-bias": (Trouble(bias=0.5), "LearnerWorseThanReference", Cause.LEARNER_BROKE, 300.0),
    "learner-refused": (Trouble(refused="norm_mean is nan"), "ModelRejected", Cause.LEARNER_BROKE, 120.0),
    "learning-stops": (Trouble(learning_stops=True), "ModelStale", Cause.PIPELINE_LATE, 180.0),
    "mix-shift": (Trouble(is_mix_moved=True), "MixShift", Cause.MIX_MOVED, 780.0),
    "policy-collapse": (Trouble(is_collapsed=True), "PropensityCollapse", Cause.POLICY_COLLAPSED, 180.0),
    "clock-skew": (Trouble(skew_s=30.0), "LabelDelayShift", Cause.JOIN_BROKEN, 60.0),
    "clicks-stop": (Trouble(clicks_arrive=0.0), "CalibrationBroken", Cause.JOIN_BROKEN, 120.0),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_raises_its_cause_and_no_other_in_time(healthy: Drill, name: str) -> None:
    trouble, alert_name, cause, within_s = SCENARIOS[name]
    drill = copy.deepcopy(healthy)
    begun_s = drill.now_s
    alerts = drill.run(max(300.0, within_s), trouble)
    first = alerts[0]
    assert (first.name, first.cause) == (alert_name, cause)
    assert (first.since_ms - START_MS) / 1000 - begun_s <= within_s
    assert {alert.cause for alert in alerts} == {cause}
    assert Alert.from_bytes(first.to_bytes()) == first
    assert first.evidence


def test_alert_is_repeated_ends_after_the_trouble_and_nothing_follows(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    (first,) = drill.run(300, Trouble(clicks_arrive=0.0))
    assert sum(alert.alert_id == first.alert_id for _, alert in drill.alerts) >= 3
    drill.run(900)
    last = drill.alerts[-1][1]
    assert (last.alert_id, last.state) == (first.alert_id, "resolved")
    assert {alert.alert_id for _, alert in drill.alerts} == {first.alert_id}


@pytest.mark.long
def test_world_that_the_policy_has_learned_is_the_usual_one(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    before = drill.monitor.models.reference
    drill.run(3_600, learns_in_half_an_hour)
    newest = {alert.alert_id: alert for _, alert in drill.alerts}
    assert [(alert.name, alert.cause, alert.state) for alert in newest.values()] == [
        ("ExternalDrift", Cause.WORLD_CHANGED, "resolved"),
        ("CalibrationBroken", Cause.WORLD_CHANGED, "resolved"),
    ]
    assert drill.monitor.episodes.firing == []
    assert drill.monitor.models.reference is not before
    assert drill.monitor.checks.recent.reference.ratio == pytest.approx(1.0, abs=0.1)


def test_labels_are_not_judged_while_the_join_rate_drop_of_the_joiner_fires(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    drill.known_cause = Cause.JOIN_BROKEN
    assert drill.run(300, Trouble(clicks_arrive=0.0)) == []
    drill.known_cause = None
    assert drill.run(300) == []


def test_examples_of_unknown_label_count_nowhere(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    newest_ms = drill.monitor.newest_ms
    # The learner learns none of them either, and is not behind for it.
    assert drill.run(300, Trouble(clicks_arrive=0.0, is_unknown=True, learning_stops=True)) == []
    assert drill.monitor.num_unknown == 12_000
    assert drill.monitor.newest_ms == newest_ms
    assert drill.monitor.maturing.num_waiting == 0
    assert drill.run(300) == []
    assert drill.monitor.checks.recent.all.ratio == pytest.approx(1.0, abs=0.15)


def test_learner_that_is_frozen_is_not_stalled(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    assert drill.run(300, Trouble(learning_stops=True, is_held=True)) == []
    assert drill.monitor.staleness_ms > 200_000


def test_policy_whose_exploration_was_shrunk_has_not_collapsed(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    usual = drill.monitor.policy.usual_entropy_ratio
    assert drill.run(300, Trouble(is_collapsed=True, exploration=0.0)) == []
    assert drill.monitor.policy.entropy_ratio < 0.2 * usual
    assert drill.run(300) == []
    assert drill.monitor.policy.usual_entropy_ratio == pytest.approx(usual, rel=0.05)
    (alert,) = drill.run(180, Trouble(is_collapsed=True))
    assert alert.name == "PropensityCollapse"


def test_flood_of_dead_letters_breaks_the_join_and_a_few_do_not(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    assert drill.run(120, Trouble(dead_letters=1)) == []
    (alert,) = drill.run(120, Trouble(dead_letters=20))
    assert (alert.name, alert.cause) == ("DLQSurge", Cause.JOIN_BROKEN)


@pytest.mark.long
def test_detectors_beat_random_alarms_of_the_same_rate(healthy: Drill) -> None:
    drill = copy.deepcopy(healthy)
    quiet = {key: scored.num_alarms for key, scored in drill.monitor.minutes.detectors.items()}
    drill.run(900, Trouble(has_drifted=True, learned=0.0))
    chance = drill.monitor.minutes.by_chance()
    for signal, name in itertools.product(("calibration", "click_rate"), ("adwin", "page_hinkley")):
        scored = drill.monitor.minutes.detectors[signal, name]
        assert quiet[signal, name] == 0
        # It fell into the quarter of an hour of the drift; as many random alarms would hit it with this chance.
        assert scored.num_alarms >= 1
        assert 0.0 < chance[signal, name] < 1.0
