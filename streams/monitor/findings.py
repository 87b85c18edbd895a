"""What may be wrong, in the order in which one thing explains another, with the numbers that say so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from streams.contracts.alerts import Cause, Severity
from streams.monitor.calibration import BROKEN, VANISHED
from streams.monitor.diagnosis import Finding
from streams.monitor.evidence import wilson
from streams.monitor.traffic import SKEWED_SHARE, delay_name

if TYPE_CHECKING:
    from streams.monitor.monitor import Monitor

PERSIST_MS: Final = 60_000
"""What is read off a clock must have been so for so long."""
DEAD_LETTER_SHARE: Final = 0.01
MIN_LETTERS: Final = 20.0
_SHOWN: Final = 5

Evidence = dict[str, float | str]


def findings_of(monitor: Monitor, now_ms: int) -> list[Finding]:
    """Return every finding, on or off, the explaining ones first."""
    return [
        *_join(monitor),
        *_learner_facts(monitor, now_ms),
        *_lateness(monitor, now_ms),
        *_policy(monitor),
        _mix(monitor),
        *_models(monitor),
    ]


def _join(monitor: Monitor) -> list[Finding]:
    delays, lateness, tally = monitor.delays, monitor.lateness, monitor.tally
    vanished = monitor.checks.detectors["vanished"].alarmed
    early = lateness.early_share
    letters = tally.num_letters / tally.num_events if tally.num_letters >= MIN_LETTERS else 0.0
    return [
        Finding(
            name="LedgerImbalance",
            cause=Cause.JOIN_BROKEN,
            severity=Severity.PAGE,
            is_on=tally.new_unmatched > 0,
            summary=f"{tally.new_unmatched} late positives matured whose negatives never came",
            evidence={"unmatched": float(monitor.maturing.num_unmatched)},
        ),
        Finding(
            name="DLQSurge",
            cause=Cause.JOIN_BROKEN,
            severity=Severity.PAGE,
            is_on=letters > DEAD_LETTER_SHARE,
            is_suspected=letters > DEAD_LETTER_SHARE / 2,
            summary=f"{letters:.1%} of the events become dead letters",
            evidence={"dead_letter_share": letters},
        ),
        Finding(
            name="LabelDelayShift",
            cause=Cause.JOIN_BROKEN,
            severity=Severity.TICKET,
            is_on=delays.has_shifted or early > SKEWED_SHARE,
            is_suspected=delays.num_moved > 0 or early > 0,
            summary=(
                f"clicks take {delay_name(delays.median_bin)} instead of {delay_name(delays.usual_median_bin)}, "
                f"{delays.negative_share:.1%} come before their impressions, {early:.1%} of the examples before they "
                "are due: clocks disagree, or clicks are delivered late"
            ),
            evidence={
                "delay_psi": delays.index,
                "median_delay": delay_name(delays.median_bin),
                "usual_median_delay": delay_name(delays.usual_median_bin),
                "negative_delay_share": delays.negative_share,
                "early_share": early,
            },
        ),
        Finding(
            name="CalibrationBroken",
            cause=Cause.JOIN_BROKEN,
            severity=Severity.PAGE,
            is_on=monitor.checks.has_vanished.is_on,
            is_suspected=monitor.checks.detectors["vanished"].is_suspicious,
            summary=(
                f"{vanished.clicks:.0f} clicks where a model of before expects {vanished.expected:.0f}: below "
                f"{VANISHED:.0%}, so clicks are missing rather than fewer"
            ),
            evidence=_calibration_evidence(monitor),
        ),
    ]


def _lateness(monitor: Monitor, now_ms: int) -> list[Finding]:
    stale_s, late_s = monitor.staleness_ms / 1000, monitor.lateness.seconds
    bounds = monitor.bounds
    is_old = monitor.staleness_ms > 5 * bounds.stale_ms
    return [
        Finding(
            name="ConsumerLagGrowing",
            cause=Cause.PIPELINE_LATE,
            severity=Severity.PAGE,
            is_on=_persists(monitor.tally.late_since_ms, now_ms, 3 * PERSIST_MS),
            is_suspected=monitor.tally.late_since_ms is not None,
            summary=f"examples are written {late_s:.0f} s after they were due; expected at most "
            f"{bounds.late_ms / 1000:.0f} s",
            evidence={"late_seconds": late_s, "unread_records": float(monitor.facts.lag)},
        ),
        Finding(
            name="ModelStale",
            cause=Cause.PIPELINE_LATE,
            severity=Severity.PAGE if is_old else Severity.TICKET,
            is_on=_persists(monitor.tally.stale_since_ms, now_ms, PERSIST_MS),
            is_suspected=monitor.tally.stale_since_ms is not None,
            summary=f"the model that serves has learned nothing of the last {stale_s:.0f} s of examples; expected at "
            f"most {bounds.stale_ms / 1000:.0f} s",
            evidence={"stale_seconds": stale_s, "late_seconds": late_s},
        ),
    ]


def _learner_facts(monitor: Monitor, now_ms: int) -> list[Finding]:
    tally = monitor.tally
    jump = ", ".join(f"{name} {norm:.3g}" for name, norm in tally.norm_jump.items())
    usual: Evidence = {f"usual_{name}": norm for name, norm in tally.usual_norms.items()}
    return [
        Finding(
            name="WeightNormJump",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=bool(tally.norm_jump) or tally.num_not_finite > 0,
            summary=f"the model that serves has {jump or 'usual norms'} and predicted {tally.num_not_finite} times no "
            "number",
            evidence=usual | tally.norm_jump | {"not_finite": float(tally.num_not_finite)},
        ),
        Finding(
            name="ModelRejected",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=_persists(tally.refused_since_ms, now_ms, PERSIST_MS),
            is_suspected=tally.refused_since_ms is not None,
            summary=f"the gate refuses what is learned: {monitor.facts.refused}",
            evidence={"reasons": monitor.facts.refused[:200]},
        ),
        Finding(
            name="PropensityMismatch",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=tally.num_mismatched > 0 or monitor.policy.num_inconsistent > 0,
            summary=f"{tally.num_mismatched} of {tally.num_recomputed} logged propensities are not those of their "
            f"snapshot, {monitor.policy.num_inconsistent} of the last are not the product of those of their slots",
            evidence={
                "mismatched": float(tally.num_mismatched),
                "recomputed": float(tally.num_recomputed),
                "inconsistent": float(monitor.policy.num_inconsistent),
            },
        ),
    ]


def _policy(monitor: Monitor) -> list[Finding]:
    policy = monitor.policy
    evidence: Evidence = {
        "entropy_ratio": policy.entropy_ratio,
        "usual_entropy_ratio": policy.usual_entropy_ratio,
        "min_scaled_propensity": policy.min_scaled,
        "effective_sample_ratio": policy.effective_ratio,
        "audit_mean": policy.audit_mean,
    }
    return [
        Finding(
            name="PropensityCollapse",
            cause=Cause.POLICY_COLLAPSED,
            severity=Severity.PAGE,
            is_on=policy.num_collapsed >= 2 or policy.is_below_floor,
            is_suspected=policy.num_collapsed > 0,
            summary=f"the policy has {policy.entropy_ratio:.1%} of the entropy of uniform play; usual are "
            f"{policy.usual_entropy_ratio:.1%}",
            evidence=evidence,
        ),
        Finding(
            name="PropensityAudit",
            cause=Cause.POLICY_COLLAPSED,
            severity=Severity.TICKET,
            is_on=policy.num_audits_failed >= 2,
            is_suspected=policy.num_audits_failed > 0,
            summary=f"the mean of 1 / (p |A|) is {policy.audit_mean:.2f}; expected 1: creatives are not shown as often "
            "as their propensities say",
            evidence=evidence | {f"audit_{slot}": mean for slot, mean in list(policy.audit_by_slot.items())[:8]},
        ),
    ]


def _mix(monitor: Monitor) -> Finding:
    moved: list[tuple[str, float]] = sorted(monitor.mix.moved.items(), key=lambda item: -item[1])[:_SHOWN]
    evidence: Evidence = {"prediction_psi": monitor.predictions.index}
    evidence.update(moved)
    text = ", ".join(f"{name} ({index:.2f})" for name, index in moved)
    return Finding(
        name="MixShift",
        cause=Cause.MIX_MOVED,
        severity=Severity.TICKET,
        is_on=bool(moved),
        is_suspected=monitor.mix.is_suspected,
        summary=f"other traffic than before, by stability index: {text}",
        evidence=evidence,
    )


def _models(monitor: Monitor) -> list[Finding]:
    """Return who predicts wrongly: the learner alone, or the reference too."""
    checks = monitor.checks
    recent, detectors = checks.recent, checks.detectors
    evidence = _calibration_evidence(monitor)
    is_worse, has_moved = checks.is_worse_than_reference.is_on, checks.has_reference_moved.is_on
    is_unexplained = not has_moved and not any(
        detectors[name].is_suspicious
        for name in ("reference_below", "reference_above", "reference_holdout_below", "reference_holdout_above")
    )
    bounds = f"{BROKEN[0]:g} to {BROKEN[1]:g}"
    return [
        Finding(
            name="LearnerWorseThanReference",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=is_worse,
            is_suspected=detectors["reference_predicts_better"].is_suspicious,
            summary=f"a model of before predicts better: {recent.reference.ratio:.2f} clicks for each predicted one, "
            f"against {recent.all.ratio:.2f} of the one that serves",
            evidence=evidence,
        ),
        Finding(
            name="CalibrationBroken",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=checks.is_broken.is_on and (is_worse or is_unexplained),
            summary=f"{recent.all.ratio:.2f} clicks for each predicted one, expected {bounds}; a model of before has "
            f"{recent.reference.ratio:.2f}",
            evidence=evidence,
        ),
        Finding(
            name="NEWorseThanBaseRate",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=checks.is_worse_than_base.is_on and (is_worse or is_unexplained),
            summary=f"normalized entropy is {recent.normalized_entropy:.3f}; the click rate alone predicts better",
            evidence=evidence,
        ),
        Finding(
            name="CalibrationBroken",
            cause=Cause.WORLD_CHANGED,
            severity=Severity.PAGE,
            is_on=checks.is_broken.is_on and has_moved and not is_worse,
            summary=f"{recent.all.ratio:.2f} clicks for each predicted one, expected {bounds}; a model of before has "
            f"{recent.reference.ratio:.2f}: shoppers answer otherwise",
            evidence=evidence,
        ),
        Finding(
            name="ExternalDrift",
            cause=Cause.WORLD_CHANGED,
            severity=Severity.TICKET,
            is_on=has_moved and not is_worse,
            summary=f"a model of before predicts {recent.reference.expected:.0f} clicks and "
            f"{recent.reference.clicks:.0f} came; the one that serves has {recent.all.ratio:.2f}",
            evidence=evidence,
        ),
        Finding(
            name="RewardDropVsHoldout",
            cause=Cause.LEARNER_BROKE,
            severity=Severity.PAGE,
            is_on=checks.is_worse_than_uniform.is_on,
            summary="the policy earns less than uniform play",
            evidence=evidence,
        ),
    ]


def _calibration_evidence(monitor: Monitor) -> Evidence:
    checks = monitor.checks
    recent = checks.recent
    policy, uniform = recent.policy_arm, recent.uniform_arm
    low, high = wilson(uniform.clicks, uniform.num)
    evidence: Evidence = {
        "calibration_ratio": recent.all.ratio,
        "usual_calibration_ratio": checks.level.value,
        "reference_calibration_ratio": recent.reference.ratio,
        "holdout_calibration_ratio": recent.holdout.ratio,
        "normalized_entropy": recent.normalized_entropy,
        "loss_against_reference": recent.loss_against_reference,
        "reward_policy": policy.clicks / policy.num if policy.num else math.nan,
        "reward_holdout": uniform.clicks / uniform.num if uniform.num else math.nan,
        "reward_holdout_low": low,
        "reward_holdout_high": high,
        "decisions": recent.all.num,
        "clicks": recent.all.clicks,
    }
    evidence |= {f"evidence_{name}": round(detector.evidence, 2) for name, detector in checks.detectors.items()}
    return evidence


def _persists(since_ms: int | None, now_ms: int, for_ms: int) -> bool:
    return since_ms is not None and now_ms - since_ms >= for_ms
