"""What the joiner says when clicks cease, and what it hears: the alert `JoinRateDrop`, its actions, and the operator.

Redis and the topic `control` may take seconds to answer, so a thread of its own asks them; the join never waits for it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from streams.actions import Responder, parse_table, try_to_respond
from streams.clients import redis_client
from streams.contracts.alerts import Alert, Cause, Severity
from streams.contracts.settings import ConfigurationError, JoinSettings, RedisSettings
from streams.control_log import ControlLog
from streams.join_guard import Notice
from streams.join_rate import bin_ms, detection_clicks, threshold
from streams.registry import Registry
from streams.registry_actions import Operator
from streams.telemetry import now_ms

logger = logging.getLogger(__name__)

JOIN_RATE_DROP: Final = "JoinRateDrop"
ACCEPT: Final = "genco policy accept-clicks"
ASK_EVERY_S: Final = 5.0
REDIS_TIMEOUT_S: Final = 2.0


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


class Desk:
    """Answers alerts, and asks what the operator says, in a thread of its own.

    Args:
        settings: Of the joiner. Without `redis_url` nothing is done because of an alert: the monitor may.

    Raises:
        ConfigurationError: If GENCO_ALERT_ACTIONS is no table of actions.
    """

    def __init__(self, settings: JoinSettings) -> None:
        self._control = ControlLog(settings)
        self._model_id = settings.model_id
        self._respond = _responder(settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="desk")
        self._answers: deque[Future[Alert]] = deque()
        self._question: Future[int] | None = None
        self._ask_at = 0.0
        self._accepted_ms = 0

    def take(self, alert: Alert) -> None:
        """Do what is to be done because of an alert."""
        if self._respond is not None:
            self._answers.append(self._thread.submit(self._respond, alert))

    def answered(self) -> Iterator[Alert]:
        """Yield the alerts that were taken and because of which something was done, with what."""
        while self._answers and self._answers[0].done():
            yield self._answers.popleft().result()

    def accepted_ms(self) -> int:
        """Return when an operator last accepted the click rate, as far as is known; ask again now and then."""
        if self._question is not None and self._question.done():
            self._accepted_ms = max(self._accepted_ms, self._question.result())
            self._question = None
        if self._question is None and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_EVERY_S
            self._question = self._thread.submit(self._ask)
        return self._accepted_ms

    def close(self) -> None:
        """Wait for nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> int:
        try:
            record = self._control.newest(self._model_id)
        except (OSError, ConfigurationError) as error:
            logger.warning("the topic control cannot be read; asking again", extra={"cause": str(error)})
            return 0
        return 0 if record is None else record.state.clicks_accepted_ms


def _responder(settings: JoinSettings) -> Callable[[Alert], Alert] | None:
    try:
        table = parse_table(settings.alert_actions)
    except ValueError as error:
        raise ConfigurationError(f"GENCO_ALERT_ACTIONS: {error}") from None
    if settings.redis_url is None:
        return None
    connection = RedisSettings(redis_url=settings.redis_url, model_id=settings.model_id)
    # Without retries, so that no action is sent twice.
    client = redis_client(connection, timeout_s=REDIS_TIMEOUT_S, retries=0)
    registry = Registry(client, settings.model_id)
    responder = Responder(
        registry,
        Operator(registry, client, ControlLog(settings).append),
        table,
        exploration=settings.shrunk_exploration,
        who="genco join",
        now_ms=now_ms,
    )
    return lambda alert: try_to_respond(responder, alert)
