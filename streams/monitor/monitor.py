"""The monitor itself: examples and facts in, alerts out. No Kafka, no Redis, no clock.

`add` takes a record of the topic `examples`, `tick` is called every few seconds. What a tick costs does not depend on
the traffic but for the decisions that mature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from streams.contracts.alerts import Alert, Cause
from streams.contracts.examples import ExampleBatch, LabelKind
from streams.monitor.calibration import CalibrationChecks
from streams.monitor.diagnosis import OVERRIDING, Diagnosis, Episodes, Finding
from streams.monitor.distributions import Stability
from streams.monitor.findings import findings_of
from streams.monitor.maturing import Maturing, PartitionClocks
from streams.monitor.minutes import Minutes
from streams.monitor.models import Model, Models
from streams.monitor.reading import Arrivals, IntArray, Reader, version_name
from streams.monitor.tallies import Slices, Step, step_of
from streams.monitor.traffic import Delays, Lateness, Mix, PolicyHealth

ACCEPTED_AFTER_MS: Final = {Cause.MIX_MOVED: 3_600_000, Cause.WORLD_CHANGED: 600_000}
"""After so long what has changed may be the usual."""
SHOWN_SLICES: Final = 20
SHOWN_AFTER_MS: Final = 60_000
"""Servers follow a switch, and what they have decided is shown, within so long."""
_PREDICTION_BINS: Final = np.linspace(-8.0, 2.0, 21)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorBounds:
    """What the monitor must know of the loop, and its bounds."""

    model_id: str = "default"
    attribution_window_ms: int = 600_000
    label_wait_ms: int = 60_000
    warm_examples: int = 20_000
    """Matured decisions with a prediction before any test of labels begins."""
    stale_ms: int = 60_000
    """A model that is so far behind the newest example is a ticket; five times as much a page."""
    late_ms: int = 60_000
    """Examples that are written so long after they were due are late."""
    ignored_fields: frozenset[str] = frozenset({"hour", "minute", "weekday", "day"})
    """Fields of the context that change by themselves, so that their mix says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What was learned elsewhere since the last tick."""

    is_held: bool = False
    """A pin or a freeze holds the pointer, or learning is frozen: the model that serves is to stay what it is."""
    exploration: float = 1.0
    """Share of the traffic beside the uniform one that explores."""
    refused: str = ""
    """Why the gate refused the newest snapshot; empty: it did not."""
    num_mismatched: int = 0
    """Logged propensities that their own snapshot does not repeat."""
    num_recomputed: int = 0
    num_dead_letters: int = 0
    """Records of the topic `dead_letters` that came since the last tick."""
    lag: int = 0
    """Records that this monitor has not read yet."""
    known_cause: Cause | None = None
    """Of an alert that somebody else has raised and that fires: what is seen here follows from it."""


@dataclass(slots=True)
class _Tally:
    """Facts added up over the life of the process, or in a row."""

    refused_since_ms: int | None = None
    stale_since_ms: int | None = None
    late_since_ms: int | None = None
    num_mismatched: int = 0
    num_recomputed: int = 0
    num_letters: float = 0.0
    num_events: float = 0.0
    """Both of about the last ten ticks."""
    usual_norms: dict[str, float] = field(default_factory=dict)
    norm_jump: dict[str, float] = field(default_factory=dict)
    num_not_finite: int = 0
    new_unmatched: int = 0


class Monitor:
    """Everything that is known about the loop of one model."""

    def __init__(self, bounds: MonitorBounds) -> None:
        self.bounds = bounds
        self.models = Models()
        self.clocks = PartitionClocks()
        self.maturing = Maturing(bounds.attribution_window_ms)
        self.checks = CalibrationChecks(bounds.warm_examples)
        self.minutes = Minutes()
        self.mix, self.policy, self.delays = Mix(), PolicyHealth(), Delays()
        self.predictions = Stability()
        self.lateness = Lateness(bounds.label_wait_ms)
        self.products, self.elements, self.versions = Slices(), Slices(), Slices()
        self.reader = Reader(bounds.ignored_fields)
        self.diagnosis, self.episodes = Diagnosis(), Episodes(bounds.model_id)
        self.facts = Facts()
        self.tally = _Tally()
        self.findings: list[Finding] = []
        self.newest_ms = 0
        """Newest impression that may be learned."""
        self.num_unknown = 0
        """Examples of unknown label."""
        self.last_arrivals = Arrivals()
        """Of the last step."""
        self._arrivals = Arrivals()
        self._num_unmatched = self._num_not_finite = 0
        self._changed_since_ms: int | None = None
        self._distrusted_until_ms = self._explained_until_ms = 0
        self._shrunk_to_ms = 0
        """Event time up to which impressions may have been decided while exploration was shrunk."""

    @property
    def base_rate(self) -> float:
        """Click rate of the last minutes, as a probability that is neither 0 nor 1."""
        return self.minutes.base_rate

    def assign(self, partitions: set[int], now_ms: int) -> None:
        """Watch these partitions from now on."""
        self.clocks.assign(partitions, now_ms)
        self.maturing.begin()

    def set_model(self, model: Model) -> None:
        """Take the model that serves from now on."""
        self.models.add(model)
        usual, jump = self.tally.usual_norms, {}
        for name, norm in model.norms.items():
            before = usual.get(name)
            if not np.isfinite(norm) or (before is not None and norm > 10.0 * max(before, 1.0)):
                jump[name] = norm
            else:
                usual[name] = norm if before is None else 0.9 * before + 0.1 * norm
        self.tally.norm_jump = jump

    def add(self, batch: ExampleBatch, partition: int, written_ms: IntArray | int, now_ms: int) -> None:
        """Take examples of a partition. Those of unknown label move the clock and count nowhere else.

        Args:
            batch: N examples; a few thousand at a time cost least.
            partition: Where they came from.
            written_ms: When their records were written, (N,) or one for all.
            now_ms: The time.
        """
        if not len(batch):
            return
        self.clocks.note(partition, int(batch.occurred_at_ms.max()), now_ms)
        written_N = np.broadcast_to(written_ms, len(batch))
        is_unknown_N = batch.has_kind(LabelKind.UNKNOWN)
        if is_unknown_N.any():
            self.num_unknown += int(is_unknown_N.sum())
            batch, written_N = batch.take(np.flatnonzero(~is_unknown_N)), written_N[~is_unknown_N]
        if len(batch):
            self._add_known(batch, written_N)

    def _add_known(self, batch: ExampleBatch, written_N: IntArray) -> None:
        current_N, reference_N = self.models.predict(batch)
        self.maturing.add(self.reader.rows(batch, current_N, reference_N))
        is_late_N = batch.has_kind(LabelKind.LATE_POSITIVE)
        shown = batch.take(np.flatnonzero(~is_late_N)) if is_late_N.any() else batch
        self.newest_ms = max(self.newest_ms, int(batch.occurred_at_ms.max()))
        if len(shown):
            self._arrivals.add(self.reader.arrivals(shown))
            self.lateness.observe(written_N[~is_late_N] - shown.occurred_at_ms)
        self._count_predictions(current_N[~is_late_N])

    def _count_predictions(self, probability_N: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        known = probability_N[(probability_N > 0.0) & (probability_N < 1.0)]
        bins = np.bincount(np.digitize(np.log(known / (1.0 - known)), _PREDICTION_BINS))
        self.predictions.observe((str(place), count) for place, count in enumerate(bins.tolist()) if count)

    def tick(self, now_ms: int, facts: Facts | None = None) -> list[Alert]:
        """Judge what has come and return the records for the topic `alerts`.

        Args:
            now_ms: The time.
            facts: What was learned elsewhere; None: nothing.
        """
        self._take_facts(facts or Facts(), now_ms)
        step = self._mature(now_ms)
        self.last_arrivals, self._arrivals = self._arrivals, Arrivals()
        self.lateness.tick()
        current = self.models.current
        if self.last_arrivals.num:
            self.mix.observe(self.last_arrivals.products, self.reader.fields(self.last_arrivals.contexts))
            is_shrunk = self.clocks.reached_ms(now_ms) < self._shrunk_to_ms
            epsilon = current.epsilon if current is not None else 0.01
            self.policy.observe(self.last_arrivals, epsilon, is_shrunk=is_shrunk)
        if step is not None:
            self.delays.observe(step.delays)
            is_trusted, is_explained = now_ms >= self._distrusted_until_ms, now_ms < self._explained_until_ms
            self.checks.observe(step, now_ms, is_trusted=is_trusted, is_explained=is_explained)
            self.minutes.observe(now_ms, step, self.checks, self.policy)
        is_calm = self.diagnosis.cause is None and self.checks.is_quiet and not self.mix.is_suspected
        if is_calm and self.models.renew_reference(now_ms):
            self.checks.renew_reference()
        return self._judge(now_ms)

    def _mature(self, now_ms: int) -> Step | None:
        rows = self.maturing.matured(self.clocks.reached_ms(now_ms))
        self.tally.new_unmatched = self.maturing.num_unmatched - self._num_unmatched
        self._num_unmatched = self.maturing.num_unmatched
        if rows is None:
            return None
        for slices in (self.products, self.elements, self.versions):
            slices.fade()
        self.products.add(rows.product, rows)
        self.versions.add(rows.version, rows)
        for place in range(rows.element.shape[1]):
            self.elements.add(rows.element[:, place], rows)
        return step_of(rows, self.base_rate)

    def _take_facts(self, facts: Facts, now_ms: int) -> None:
        self.facts, tally = facts, self.tally
        if facts.exploration < 1.0:
            self._shrunk_to_ms = now_ms + SHOWN_AFTER_MS
        tally.num_mismatched += facts.num_mismatched
        tally.num_recomputed += facts.num_recomputed
        tally.num_not_finite = self.models.num_not_finite - self._num_not_finite
        self._num_not_finite = self.models.num_not_finite
        tally.num_letters = 0.9 * tally.num_letters + facts.num_dead_letters
        tally.num_events = 0.9 * tally.num_events + facts.num_dead_letters + self._arrivals.num
        tally.refused_since_ms = _since(tally.refused_since_ms, bool(facts.refused), now_ms)
        is_stale = self.staleness_ms > self.bounds.stale_ms and not facts.is_held
        tally.stale_since_ms = _since(tally.stale_since_ms, is_stale, now_ms)
        is_late = self.lateness.seconds * 1000 > self.bounds.late_ms
        tally.late_since_ms = _since(tally.late_since_ms, is_late, now_ms)

    @property
    def staleness_ms(self) -> int:
        """How far the model that serves is behind the newest example, in event time; 0 without a model."""
        current = self.models.current
        return max(0, self.newest_ms - current.trained_to_ms) if current is not None else 0

    def _judge(self, now_ms: int) -> list[Alert]:
        before = self.diagnosis.cause
        self.findings = findings_of(self, now_ms)
        if self.facts.known_cause is not None:
            self.diagnosis.cause = None
            active: list[Finding] = []
        else:
            active = self.diagnosis.update(self.findings, now_ms)
        # Labels are wrong until the last decision of this time has matured.
        until_ms = now_ms + self.bounds.attribution_window_ms + 60_000
        if self.diagnosis.cause is OVERRIDING:
            self._distrusted_until_ms = until_ms
        if self.facts.known_cause is not None:
            self._explained_until_ms = until_ms
        if self.diagnosis.cause is not before and (before is not None or self.diagnosis.cause is OVERRIDING):
            # What else they found was an effect.
            self.checks.reset()
        self._accept(now_ms)
        return self.episodes.update(active, now_ms)

    def _accept(self, now_ms: int) -> None:
        """Take another mix for usual after a while, and another world when the model that serves has learned it."""
        cause = self.diagnosis.cause
        self._changed_since_ms = _since(self._changed_since_ms, cause in ACCEPTED_AFTER_MS, now_ms)
        if cause is None or self._changed_since_ms is None:
            return
        if now_ms - self._changed_since_ms < ACCEPTED_AFTER_MS[cause]:
            return
        if cause is Cause.MIX_MOVED:
            self.mix.accept()
            self.checks.forget_levels()
        elif not self.checks.is_calibrated or not self.models.renew_reference(now_ms, force=True):
            return
        self.checks.renew_reference()
        self.checks.reset()
        self._changed_since_ms = None

    def slices(self) -> Mapping[str, list[tuple[str, float, float, float]]]:
        """Return kind -> (name, ratio of clicks to predictions, and its interval) of the largest slices."""
        kinds: dict[str, tuple[Slices, Callable[[int], str]]] = {
            "product": (self.products, self.reader.products.names.__getitem__),
            "element": (self.elements, self.reader.elements.names.__getitem__),
            "version": (self.versions, version_name),
        }
        return {
            kind: [(name_of(code), ratio.value, ratio.low, ratio.high) for code, ratio in slices.largest(SHOWN_SLICES)]
            for kind, (slices, name_of) in kinds.items()
        }


def _since(before: int | None, is_so: bool, now_ms: int) -> int | None:
    """Return since when something is so, None if it is not."""
    if not is_so:
        return None
    return now_ms if before is None else before
