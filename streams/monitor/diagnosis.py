"""One cause for all that was found, and the alerts that follow from it.

Findings stand in the order in which they explain each other: when clicks do not arrive, predictions are wrong too, and
nothing is said of those. So the first finding that is on gives the cause, and only findings of that cause become
alerts. A finding waits a while if one before it is suspected, for the effect is often seen before its cause. What has
been said stays until it is over, unless the join breaks: then the former was an effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from streams.contracts.alerts import MAX_EVIDENCE, Alert, Cause, Severity

HOLD_MS: Final = 180_000
"""A finding waits so long at most for those before it."""
CLEAR_MS: Final = 300_000
"""An alert ends when its finding has been off for so long."""
COOL_DOWN_MS: Final = 600_000
"""An alert that has ended does not begin again before this has passed."""
REPEAT_MS: Final = 60_000
"""A firing alert is written again this often, with the numbers as they are now."""
OVERRIDING: Final = Cause.JOIN_BROKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that may be wrong, as of now."""

    name: str
    cause: Cause
    severity: Severity
    is_on: bool
    is_suspected: bool = False
    """Half of the evidence is there."""
    summary: str
    evidence: dict[str, float | str] = field(default_factory=dict)


class Latch:
    """On from an alarm until it has been well again without one for a while."""

    def __init__(self, clear_ms: int = 0) -> None:
        self._clear_ms = clear_ms
        self._last_bad_ms = 0
        self.is_on = False

    def update(self, now_ms: int, *, alarm: bool, is_well: bool) -> bool:
        """Take what was seen now and return whether it is on."""
        if alarm or (self.is_on and not is_well):
            self.is_on = True
            self._last_bad_ms = now_ms
        elif self.is_on and now_ms - self._last_bad_ms >= self._clear_ms:
            self.is_on = False
        return self.is_on


class Diagnosis:
    """Chooses the cause."""

    def __init__(self) -> None:
        self.cause: Cause | None = None
        self._held_since: dict[str, int] = {}
        self._last_on_ms = -CLEAR_MS

    def update(self, findings: Sequence[Finding], now_ms: int) -> list[Finding]:
        """Return the findings that shall be alerts now, all of one cause. A cause stays a while after its last finding.

        Args:
            findings: All there are, the explaining ones first.
            now_ms: The time.
        """
        ready = [finding for place, finding in enumerate(findings) if self._is_ready(findings, place, now_ms)]
        causes = [finding.cause for finding in ready]
        if OVERRIDING in causes:
            self.cause = OVERRIDING
        elif self.cause not in causes and now_ms - self._last_on_ms >= CLEAR_MS:
            self.cause = causes[0] if causes else None
        if self.cause in causes:
            self._last_on_ms = now_ms
        return [finding for finding in ready if finding.cause is self.cause]

    def _is_ready(self, findings: Sequence[Finding], place: int, now_ms: int) -> bool:
        finding = findings[place]
        key = f"{finding.name} {finding.cause}"
        if not finding.is_on:
            self._held_since.pop(key, None)
            return False
        since = self._held_since.setdefault(key, now_ms)
        if finding.cause is self.cause or now_ms - since >= HOLD_MS:
            return True
        before = findings[:place]
        return not any(other.is_suspected and other.cause is not finding.cause for other in before)


@dataclass(slots=True)
class _Episode:
    alert: Alert
    last_on_ms: int
    written_ms: int


class Episodes:
    """Makes records of the topic `alerts` of findings."""

    def __init__(self, model_id: str) -> None:
        self._model_id = model_id
        self._open: dict[tuple[str, Cause], _Episode] = {}
        self._ended_ms: dict[tuple[str, Cause], int] = {}

    @property
    def firing(self) -> list[Alert]:
        """The newest record of each alert that fires."""
        return [episode.alert for episode in self._open.values()]

    def update(self, findings: Sequence[Finding], now_ms: int) -> list[Alert]:
        """Return the records to write."""
        out = []
        on = {(finding.name, finding.cause): finding for finding in findings}
        for key, finding in on.items():
            episode = self._open.get(key)
            if episode is None:
                if now_ms - self._ended_ms.get(key, -COOL_DOWN_MS) < COOL_DOWN_MS:
                    continue
                out.append(self._begin(key, finding, now_ms))
                continue
            episode.last_on_ms = now_ms
            if now_ms - episode.written_ms >= REPEAT_MS:
                out.append(self._write(episode, now_ms, finding))
        causes = {finding.cause for finding in findings}
        for key in list(self._open):
            episode = self._open[key]
            is_explained = bool(causes) and episode.alert.cause not in causes
            if key not in on and (is_explained or now_ms - episode.last_on_ms >= CLEAR_MS):
                del self._open[key]
                self._ended_ms[key] = now_ms
                resolved = {"state": "resolved", "occurred_at_ms": now_ms}
                if is_explained:
                    resolved["summary"] = f"an effect of another cause: {next(iter(causes)).value}"
                out.append(episode.alert.model_copy(update=resolved))
        return out

    def _begin(self, key: tuple[str, Cause], finding: Finding, now_ms: int) -> Alert:
        alert = Alert(
            alert_id=f"{finding.name}-{now_ms}",
            name=finding.name,
            cause=finding.cause,
            severity=finding.severity,
            model_id=self._model_id,
            state="firing",
            since_ms=now_ms,
            occurred_at_ms=now_ms,
            summary=finding.summary[:500],
            evidence=_finite(finding.evidence),
        )
        self._open[key] = _Episode(alert, now_ms, now_ms)
        return alert

    def _write(self, episode: _Episode, now_ms: int, finding: Finding) -> Alert:
        changes = {"occurred_at_ms": now_ms, "summary": finding.summary[:500], "evidence": _finite(finding.evidence)}
        episode.alert = episode.alert.model_copy(update=changes)
        episode.written_ms = now_ms
        return episode.alert


def _finite(evidence: Mapping[str, float | str]) -> dict[str, float | str]:
    """Return the evidence without what is no number: JSON knows none of those."""
    kept = {name[:64]: value for name, value in evidence.items() if isinstance(value, str) or math.isfinite(value)}
    return dict(list(kept.items())[:MAX_EVIDENCE])
