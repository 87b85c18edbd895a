"""Whether clicks still meet their impressions: a sequential test on the rate at which they do, in event time.

Time is cut into bins. Of each bin are counted the impressions, and the clicks that met theirs. How many of these were
to be expected follows from the impressions before and from the click rate by age of the impression, learned from this
same traffic; so neither a rush nor a lull of impressions looks like broken clicks. The clicks are counted when they are
read and not when their examples leave, or a label wait of impressions would have turned negative before anything shows.

Clicks fewer than a share `ratio` of the expected ones are broken, no fewer are the world's business: shoppers who like
less, another mix of products, a policy that has to learn again. Two sums of log likelihood ratios stand for "(almost)
none come" and "half of the least healthy rate"; each starts again at 0 (CUSUM). As long as clicks come independently of
each other and at least at that share of the expected rate, any start of a sum reaches the threshold h with probability
exp(-h) at most. So `num_bins` bins raise num_bins x 2 exp(-h) false alarms on average at most, and h follows from
`FALSE_ALARM_MS`. No bin counts for more than h / `LEAST_BINS`: a hiccup is no outage. When clicks stop, the alarm comes
with the bin in which `detection_clicks` expected clicks are missing, but not before `LEAST_BINS` bins have passed.

Pure: nothing here knows Kafka or the clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FALSE_ALARM_MS: Final = 365 * 86_400_000
"""At most one false alarm in so much event time, over all watches of a process."""
LEAST_BINS: Final = 10
BINS_IN_A_WAIT: Final = 60
MEMORY_BINS: Final = 3_600
MEMORY_CLICKS: Final = 3_000
"""What was learned fades with the longer of both."""
RECOVERY_EVIDENCE: Final = math.log(1_000)
LOST_BELOW: Final = 0.8
"""When fewer of an outage's clicks have come in the end, the others are taken for lost."""

_EDGES: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 600])
"""Ages of impressions in bins, between which clicks are taken for equally likely."""
HORIZON: Final = int(_EDGES[-1])
NUM_AGES: Final = len(_EDGES) - 1
_AGE_OF_LAG: Final = np.searchsorted(_EDGES, np.arange(HORIZON), side="right") - 1

FloatArray = NDArray[np.float64]


def bin_ms(label_wait_ms: int) -> int:
    """Return how long a bin is: a sixtieth of the label wait, within reason."""
    return min(max(label_wait_ms // BINS_IN_A_WAIT, 50), 60_000)


def threshold(bin_length_ms: int, num_watches: int) -> float:
    """Return h: the log of how many false alarms there could be by chance if every bin were one."""
    return math.log(2 * num_watches * FALSE_ALARM_MS / bin_length_ms)


def detection_clicks(ratio: float, h: float) -> float:
    """Return after how many missing clicks an outage is found in which none come.

    Example:
        >>> round(detection_clicks(0.4, threshold(1_000, 5)))
        52
    """
    return h / (ratio - _alternatives(ratio)[0])


def _alternatives(ratio: float) -> tuple[float, float]:
    return ratio / 20, ratio / 2


ENDED: Final = 5.0
"""Impressions that were to be expected since the last one, by which traffic has ended: one lull in e^5 is as long."""
ENDED_MS: Final = 1_500
"""Event time without an impression that it takes at least: late ones come a second at a time."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What the test knows of clicks that do not come."""

    since_ms: int
    """Event time of its first bin."""
    until_ms: int
    """End of the last one."""
    expected: float
    """Clicks that should have met their impressions since it began."""
    observed: int
    """Those that did."""
    num_shown: int
    """Impressions since it began."""
    false_negatives: float
    """Expected number of those among the impressions older than a label wait whose click is missing: they left as
    negatives, and should not have."""

    @property
    def false_negatives_at_most(self) -> int:
        """A bound on their number that chance exceeds once in a thousand outages."""
        return math.ceil(self.false_negatives + 3.1 * math.sqrt(self.false_negatives))


class JoinRate:
    """Watches the clicks of some partitions together.

    Feed it with `shown` and `clicked`, then `advance` to the watermark.

    Args:
        label_wait_ms: After so long an impression without a click leaves as a negative.
        ratio: Share of the expected clicks, in (0, 1), from which on all is well.
        num_watches: How many there are in this process, which share the false alarms.
    """

    def __init__(self, label_wait_ms: int, ratio: float, num_watches: int = 1) -> None:
        self.bin_ms = bin_ms(label_wait_ms)
        self.ratio = ratio
        self.threshold = threshold(self.bin_ms, num_watches)
        self._wait_bins = -(-label_wait_ms // self.bin_ms)
        # With fewer clicks the rate is not known well enough: its error must stay far from what the ratio leaves.
        self._least_clicks = max(50.0, 16.0 / (1.0 - ratio) ** 2)
        self._r = np.array(_alternatives(ratio))
        self._shown: dict[int, int] = {}
        self._clicked: dict[int, FloatArray] = {}
        self._next: int | None = None
        # Impressions of the newest HORIZON bins, the newest first.
        self._lags = np.zeros(HORIZON)
        self.clicks_A: FloatArray = np.zeros(NUM_AGES)
        self.shown_A: FloatArray = np.zeros(NUM_AGES)
        self._sums = np.zeros(2)
        self._runs = [_Run(), _Run()]
        self._idle_bins = 0
        self.outage: Outage | None = None
        self._run = _Run()
        self._recovery = 0.0
        self.resumed_ms: int | None = None
        """Event time since which clicks seem to come again."""
        self.has_recovered = False
        """Whether that is certain."""
        self.recovered_bins = 0
        """For how many bins it has been."""

    # -- feeding ---------------------------------------------------------------------------------------------------

    def shown(self, times_ms: NDArray[np.int64]) -> None:
        """Note impressions. Of those behind `advance` only the clicks that are still to come are expected."""
        if len(times_ms):
            self._idle_bins = 0
        bins, counts = np.unique(times_ms // self.bin_ms, return_counts=True)
        for number, count in zip(bins.tolist(), counts.tolist(), strict=True):
            if self._next is None or number >= self._next:
                self._shown[number] = self._shown.get(number, 0) + count
            elif self._next - number <= HORIZON:
                self._lags[self._next - 1 - number] += count

    def clicked(self, shown_ms: int, clicked_ms: int) -> None:
        """Note a click that met its impression."""
        number = clicked_ms // self.bin_ms
        lag = max(0, number - shown_ms // self.bin_ms)
        if lag >= HORIZON:
            return
        # What comes behind the watermark counts when it comes.
        number = number if self._next is None else max(number, self._next)
        counts = self._clicked.get(number)
        if counts is None:
            counts = self._clicked[number] = np.zeros(NUM_AGES)
        counts[_AGE_OF_LAG[lag]] += 1

    def advance(self, watermark_ms: int) -> None:
        """Judge all bins that ended before the watermark."""
        end = watermark_ms // self.bin_ms
        place = self._first_busy(end) if self._next is None else self._next
        while place < end:
            self._next = place + 1
            self._close(place, self._shown.pop(place, 0), self._clicked.pop(place, None))
            # Through a long silence at once, or a clock that jumps would cost minutes.
            place = self._next if self._lags.any() else self._first_busy(end)
        self._next = place

    def _first_busy(self, end: int) -> int:
        return min((*self._shown, *self._clicked, end))

    # -- judging ---------------------------------------------------------------------------------------------------

    @property
    def is_armed(self) -> bool:
        """Whether enough clicks were seen to know how many to expect."""
        return bool(self.clicks_A.sum() >= self._least_clicks)

    def rates(self) -> FloatArray:
        """Return how many clicks an impression brings in a bin, by its age, (NUM_AGES,)."""
        return np.divide(self.clicks_A, self.shown_A, out=np.zeros(NUM_AGES), where=self.shown_A > 0)

    def _close(self, number: int, num_shown: int, clicks_A: FloatArray | None) -> None:
        self._lags[1:] = self._lags[:-1]
        self._lags[0] = num_shown
        shown_A = np.add.reduceat(self._lags, _EDGES[:-1])
        expected = float(self.rates() @ shown_A)
        observed = 0 if clicks_A is None else int(clicks_A.sum())
        if self.outage is not None:
            self._watch_recovery(self.outage, number, expected, observed, num_shown)
            return
        self._idle_bins = 0 if num_shown else self._idle_bins + 1
        # Where nothing is shown any more either, traffic has ended: the clicks still due are no sign of a broken join.
        has_ended = self._idle_bins * self.bin_ms > ENDED_MS and self._idle_bins * self._lags.mean() > ENDED
        if self.is_armed and not has_ended:
            self._test(number, expected, observed, num_shown)
        # While it looks like an outage nothing is learned, or a slow one would become what is expected.
        if self._sums.max() < self.threshold / 4:
            fade = 1.0 - min(1.0 / MEMORY_BINS, expected / MEMORY_CLICKS)
            self.shown_A = fade * self.shown_A + shown_A
            self.clicks_A = fade * self.clicks_A + (0.0 if clicks_A is None else clicks_A)

    def _test(self, number: int, expected: float, observed: int, num_shown: int) -> None:
        gains = observed * np.log(self._r / self.ratio) + (self.ratio - self._r) * expected
        self._sums += np.minimum(gains, self.threshold / LEAST_BINS)
        for place, run in enumerate(self._runs):
            if self._sums[place] <= 0.0:
                self._sums[place] = 0.0
                self._runs[place] = _Run(number + 1)
            else:
                run.add(expected, observed, num_shown)
        place = int(np.argmax(self._sums))
        if self._sums[place] >= self.threshold:
            self._run = self._runs[place]
            self.outage = self._outage(number, self._missing_among_old(self._run.first, number))

    def _watch_recovery(self, outage: Outage, number: int, expected: float, observed: int, num_shown: int) -> None:
        if number < self._run.first:
            return  # of the time before it, read again by a new owner
        self._run.add(expected, observed, num_shown)
        self.outage = self._outage(number, outage.false_negatives)
        gain = observed * math.log(1.0 / self.ratio) - (1.0 - self.ratio) * expected
        self._recovery += min(gain, RECOVERY_EVIDENCE / LEAST_BINS)
        if self._recovery <= 0.0:
            self._recovery, self.resumed_ms, self.has_recovered, self.recovered_bins = 0.0, None, False, 0
            return
        if self.resumed_ms is None:
            self.resumed_ms = number * self.bin_ms
        self.recovered_bins += self.has_recovered
        self.has_recovered |= self._recovery >= RECOVERY_EVIDENCE
        self._recovery = min(self._recovery, RECOVERY_EVIDENCE)

    def _outage(self, number: int, false_negatives: float) -> Outage:
        run = self._run
        return Outage(
            run.first * self.bin_ms,
            (number + 1) * self.bin_ms,
            run.expected,
            run.observed,
            run.num_shown,
            false_negatives,
        )

    def _missing_among_old(self, first: int, last: int) -> float:
        """Return how many clicks are missing of impressions that are older than the label wait by the end of a bin."""
        rates = self.rates()[_AGE_OF_LAG]
        missing = 0.0
        for back in range(min(last - first + 1, HORIZON)):
            lags = self._lags[back:]  # as they were `back` bins ago
            least = max(0, self._wait_bins - back)
            missing += float(rates[least : len(lags)] @ lags[least:])
        return missing

    # -- outages ---------------------------------------------------------------------------------------------------

    @property
    def share_recovered(self) -> float:
        """Share of the clicks expected since the outage began that have come."""
        return self._run.observed / self._run.expected if self._run.expected else 1.0

    def begin_outage(self, since_ms: int, until_ms: int) -> None:
        """Go on with an outage that another owner has found."""
        self._run = _Run(since_ms // self.bin_ms)
        self.outage = Outage(since_ms, until_ms, 0.0, 0, 0, 0.0)

    def end_outage(self, *, forget: bool = False) -> None:
        """Test again.

        Args:
            forget: What was to be expected, as the world has changed.
        """
        self.outage, self.resumed_ms = None, None
        self._recovery, self.has_recovered, self.recovered_bins = 0.0, False, 0
        self._sums[:] = 0.0
        self._runs = [_Run(), _Run()]
        if forget:
            self.clicks_A = np.zeros(NUM_AGES)
            self.shown_A = np.zeros(NUM_AGES)

    # -- what outlives the process ---------------------------------------------------------------------------------

    def learned(self) -> dict[str, Any]:
        """Return what is to be expected, JSON-able, in less than 400 bytes."""
        return {
            "bin_ms": self.bin_ms,
            "clicks": [float(f"{value:.4g}") for value in self.clicks_A],
            "shown": [float(f"{value:.4g}") for value in self.shown_A],
        }

    def learn_from(self, learned: Mapping[str, Any]) -> None:
        """Add what another owner has learned; what is of another shape is left out."""
        clicks_A, shown_A = (np.array(learned.get(name, ()), np.float64) for name in ("clicks", "shown"))
        if learned.get("bin_ms") == self.bin_ms and clicks_A.shape == shown_A.shape == (NUM_AGES,):
            self.clicks_A = self.clicks_A + clicks_A
            self.shown_A = self.shown_A + shown_A


@dataclass(slots=True)
class _Run:
    """Bins in a row in which a sum was above 0."""

    first: int = 0
    expected: float = 0.0
    observed: int = 0
    num_shown: int = 0

    def add(self, expected: float, observed: int, num_shown: int) -> None:
        self.expected += expected
        self.observed += observed
        self.num_shown += num_shown
