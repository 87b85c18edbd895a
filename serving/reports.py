"""Takes what clients report, clicks and rendered cards: checks it, queues it, and says what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.event_log import EventLog
from serving.feedback import check_clicks, read_token
from serving.messages import Accepted, Fault, read_clicks, read_tokens
from serving.metrics import ServingMetrics
from streams.contracts.topics import CLICKS, IMPRESSIONS


class LogFullError(RuntimeError):
    """Nothing of a call could be queued; it may be sent again later."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("the event log is full")
        self.faults = list(faults)


@dataclass(frozen=True, slots=True)
class Reports:
    """Where reports go, and what decides which of them are believed."""

    event_log: EventLog
    metrics: ServingMetrics
    signing_key: bytes
    attribution_window_ms: int

    def clicks(self, body: bytes, now_ms: int) -> Accepted:
        """Take the clicks of a body.

        Raises:
            InvalidBodyError: If the body is refused as a whole.
            LogFullError: If none of the clicks has room.
        """
        good, rejected = check_clicks(read_clicks(body), self.signing_key, now_ms, self.attribution_window_ms)
        for fault in rejected:
            self.metrics.events_rejected.labels(CLICKS, fault.field).inc()
        left_out = [index for index, click in good if not self.event_log.offer_click(click)]
        return _accepted(len(good), left_out, rejected)

    def impressions(self, body: bytes, now_ms: int) -> Accepted:
        """Take the tokens of cards that have been rendered.

        Raises:
            InvalidBodyError: If the body is refused as a whole.
        """
        rejected: list[Fault] = []
        num_good = 0
        for index, token in enumerate(read_tokens(body)):
            try:
                impression = read_token(token, self.signing_key, now_ms)
            except ValueError as error:
                rejected.append(Fault(index=index, field=f"tokens[{index}]", reason=str(error)))
                self.metrics.events_rejected.labels(IMPRESSIONS, "token").inc()
            else:
                # Sampling under load is no refusal: the survivors stand for those that were dropped.
                self.event_log.offer_impression(impression)
                num_good += 1
        return _accepted(num_good, [], rejected)


def _accepted(num_good: int, left_out: Sequence[int], rejected: Sequence[Fault]) -> Accepted:
    reason = "the event log is full; send it again later"
    full = [Fault(index=index, field="event_log", reason=reason) for index in left_out]
    if full and len(full) == num_good:
        raise LogFullError([*rejected, *full])
    return Accepted(accepted=num_good - len(full), rejected=sorted([*rejected, *full], key=lambda f: f.index or 0))
