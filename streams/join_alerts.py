"""What the joiner says when clicks cease: the alert `JoinRateDrop`, made of a guard's notice."""

from __future__ import annotations

from typing import Final

from streams.contracts.alerts import Alert, Cause, Severity
from streams.contracts.settings import JoinSettings
from streams.join_guard import Notice
from streams.join_rate import bin_ms, detection_clicks, threshold

JOIN_RATE_DROP: Final = "JoinRateDrop"
ACCEPT: Final = "genco policy accept-clicks"


def alert_of(notice: Notice, settings: JoinSettings, num_watches: int, now_ms: int) -> Alert:
    """Return the record that tells of an outage.

    Args:
        notice: What the guard says.
        settings: Of the joiner.
        num_watches: Among which it shares the false alarms.
        now_ms: The wall clock.
    """
    outage = notice.outage
    share = outage.observed / outage.expected if outage.expected else 0.0
    h = threshold(bin_ms(settings.label_wait_ms), num_watches)
    numbers = f"{outage.observed} of {outage.expected:.0f} expected clicks have come"
    if notice.end is not None:
        summary = f"{numbers} since the outage began: {notice.end}; learning goes on"
    else:
        state = "the watermark is held" if notice.is_holding else "impressions leave as unknown"
        summary = (
            f"{numbers} for {outage.num_shown} impressions: {state}; at most {outage.false_negatives_at_most} clicked "
            "impressions left as negatives before"
        )
    return Alert(
        alert_id=notice.alert_id,
        name=JOIN_RATE_DROP,
        cause=Cause.JOIN_BROKEN,
        severity=Severity.PAGE,
        model_id=settings.model_id,
        state="firing" if notice.end is None else "resolved",
        since_ms=notice.began_at_ms,
        occurred_at_ms=now_ms,
        summary=summary,
        evidence={
            "partitions": ",".join(map(str, notice.partitions))[:200],
            "clicks_expected": round(outage.expected, 1),
            "clicks_observed": float(outage.observed),
            "click_share": round(share, 4),
            "impressions": float(outage.num_shown),
            "false_negatives_at_most": float(outage.false_negatives_at_most),
            "false_negatives_expected": round(outage.false_negatives, 1),
            "detection_clicks": round(detection_clicks(settings.join_drop_ratio, h), 1),
            "clicks_ceased_at_seconds": outage.since_ms / 1000,
            "held_at_seconds": notice.held_at_ms / 1000,
        },
        actions=_actions(notice),
    )


def _actions(notice: Notice) -> list[str]:
    if notice.end is not None:
        return []
    done = "held the watermark" if notice.is_holding else "let impressions leave as unknown"
    return [f"{done}; ends when clicks come again, or, if the world has changed: {ACCEPT}"]
