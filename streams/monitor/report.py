"""What the monitor shows of itself: metrics, a line for each alert, and the heartbeat."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from streams.contracts.alerts import HEARTBEAT, Alert, Cause, Severity
from streams.monitor.monitor import Monitor

logger = logging.getLogger(__name__)

HEARTBEAT_MS: Final = 60_000


class MonitorReport:
    """Metrics of one monitor. Gauges that are not known yet are nan."""

    def __init__(self, model_id: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model_id = model_id
        self._heartbeat_ms = -HEARTBEAT_MS
        self._alarms: dict[str, int] = {}
        self._minute_alarms: dict[tuple[str, str], int] = {}

        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(name, text, list(labels), registry=registry)

        self._calibration = gauge("genco_calibration_ratio", "Clicks / predicted clicks.", ["model", "traffic"])
        self._slice = gauge("genco_slice_calibration_ratio", "The same by slice, the largest ones.", ["kind", "slice"])
        self._entropy = gauge("genco_normalized_entropy_ratio", "Log loss / entropy of the click rate.")
        self._against = gauge("genco_reference_log_loss_ratio", "Log loss / that of the reference model.")
        self._reward = gauge("genco_reward_mean", "Click rate of matured decisions.", ["policy"])
        self._evidence = gauge("genco_detector_evidence_nats", "Evidence of a sequential test.", ["detector"])
        self._threshold = gauge("genco_detector_threshold_nats", "Evidence at which it alarms.", ["detector"])
        self._detected = Counter(
            "genco_drift_detected", "Alarms of a detector.", ["detector", "signal"], registry=registry
        )
        self._alarm_rate = gauge("genco_drift_alarm_ratio", "Alarms for each look.", ["detector", "signal"])
        self._by_chance = gauge(
            "genco_drift_chance_ratio", "Chance that as many random alarms hit an hour.", ["detector", "signal"]
        )
        self._psi = gauge("genco_feature_psi", "Stability index of the mix.", ["feature"])
        self._prediction_psi = gauge("genco_prediction_psi", "Stability index of the predictions.")
        self._delay_psi = gauge("genco_label_delay_psi", "Stability index of the delays of clicks.")
        self._policy_entropy = gauge("genco_policy_entropy_ratio", "Entropy of the policy / of uniform play.")
        self._min = gauge("genco_propensity_min_ratio", "Smallest propensity / that of uniform play.")
        self._effective = gauge("genco_effective_sample_ratio", "Effective sample size of 1 / p for each decision.")
        self._audit = gauge("genco_propensity_audit_ratio", "Mean of 1 / (p |A|); 1 is right.", ["slot"])
        self._mismatched = gauge("genco_propensity_mismatches", "Logged propensities that no snapshot repeats.")
        self._fallback = gauge("genco_fallback_ratio", "Share of decisions by a lower rung of the ladder.")
        self._norm = gauge("genco_weight_norm", "Norms of the weights that serve.", ["part"])
        self._late = gauge("genco_example_lateness_seconds", "How long after they were due examples are written.")
        self._stale = gauge("genco_model_staleness_seconds", "How far the policy is behind the newest example.")
        self._lag = gauge("genco_monitor_lag_records", "Records that the monitor has not read.")
        self._waiting = gauge("genco_monitor_waiting_examples", "Examples whose labels may still change.")
        self._left_out = gauge("genco_monitor_left_out_examples", "Examples that were not judged.", ["cause"])
        self._firing = gauge("genco_alert_firing", "1 while an alert fires.", ["name", "cause", "severity"])
        self._heartbeat = gauge("genco_monitor_heartbeat_timestamp_seconds", "When the monitor judged last.")

    def state(self, monitor: Monitor, now_ms: int) -> None:
        """Set the gauges."""
        self._labels(monitor)
        self._detectors(monitor)
        self._traffic(monitor)
        self._heartbeat.set(now_ms / 1000)
        self._firing.clear()
        for alert in monitor.episodes.firing:
            self._firing.labels(alert.name, alert.cause.value, alert.severity.value).set(1)

    def _labels(self, monitor: Monitor) -> None:
        recent = monitor.checks.recent
        for model, traffic, counts in (
            ("current", "all", recent.all),
            ("current", "holdout", recent.holdout),
            ("reference", "all", recent.reference),
            ("reference", "holdout", recent.reference_holdout),
        ):
            self._calibration.labels(model, traffic).set(counts.ratio)
        for policy, counts in (("learned", recent.policy_arm), ("holdout", recent.uniform_arm)):
            self._reward.labels(policy).set(counts.clicks / counts.num if counts.num else math.nan)
        self._entropy.set(recent.normalized_entropy)
        self._against.set(recent.loss_against_reference)
        self._slice.clear()
        for kind, slices in monitor.slices().items():
            for name, ratio, _, _ in slices:
                self._slice.labels(kind, name).set(ratio)

    def _detectors(self, monitor: Monitor) -> None:
        for name, detector in monitor.checks.detectors.items():
            self._evidence.labels(name).set(detector.evidence)
            self._threshold.labels(name).set(detector.threshold)
            self._detected.labels("sequential", name).inc(detector.num_alarms - self._alarms.get(name, 0))
            self._alarms[name] = detector.num_alarms
        chance = monitor.minutes.by_chance()
        for (signal, name), scored in monitor.minutes.detectors.items():
            key = signal, name
            self._detected.labels(name, signal).inc(scored.num_alarms - self._minute_alarms.get(key, 0))
            self._minute_alarms[key] = scored.num_alarms
            self._alarm_rate.labels(name, signal).set(scored.rate)
            self._by_chance.labels(name, signal).set(chance[key])

    def _traffic(self, monitor: Monitor) -> None:
        policy, arrivals, tally = monitor.policy, monitor.last_arrivals, monitor.tally
        for name, stability in monitor.mix.features.items():
            self._psi.labels(name).set(stability.index)
        self._prediction_psi.set(monitor.predictions.index)
        self._delay_psi.set(monitor.delays.index)
        self._policy_entropy.set(policy.entropy_ratio)
        self._min.set(policy.min_scaled)
        self._effective.set(policy.effective_ratio)
        self._audit.labels("all").set(policy.audit_mean)
        for slot, mean in policy.audit_by_slot.items():
            self._audit.labels(slot).set(mean)
        self._mismatched.set(tally.num_mismatched)
        self._fallback.set(arrivals.num_fallback / arrivals.num if arrivals.num else math.nan)
        current = monitor.models.current
        for part, norm in (current.norms if current is not None else {}).items():
            self._norm.labels(part).set(norm)
        self._late.set(monitor.lateness.seconds)
        self._stale.set(monitor.staleness_ms / 1000)
        self._lag.set(monitor.facts.lag)
        self._waiting.set(monitor.maturing.num_waiting)
        self._left_out.labels("too_late").set(monitor.maturing.num_too_late)
        self._left_out.labels("no_room").set(monitor.maturing.num_dropped)
        self._left_out.labels("unknown_label").set(monitor.num_unknown)

    def tell(self, alerts: Iterable[Alert]) -> None:
        """Write a line for each alert that begins or ends."""
        for alert in alerts:
            extra = {"alert": alert.name, "cause": alert.cause.value, "severity": alert.severity.value}
            if alert.state == "resolved":
                logger.info(f"alert is over: {alert.summary}", extra=extra)
            elif alert.since_ms == alert.occurred_at_ms:
                logger.warning(f"alert: {alert.summary}", extra=extra | {"evidence": alert.evidence})

    def heartbeat(self, now_ms: int) -> list[Alert]:
        """Return the record that says that the monitor lives, if it is due."""
        if now_ms - self._heartbeat_ms < HEARTBEAT_MS:
            return []
        self._heartbeat_ms = now_ms
        return [
            Alert(
                alert_id=HEARTBEAT,
                name=HEARTBEAT,
                cause=Cause.PIPELINE_LATE,
                severity=Severity.TICKET,
                model_id=self._model_id,
                state="firing",
                since_ms=now_ms,
                occurred_at_ms=now_ms,
                summary="the monitor works; if this record is missing for three minutes, nobody watches",
            )
        ]
