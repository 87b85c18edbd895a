"""The test on the click rate, against traffic whose every click is known: how soon, how often, what is lost."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from streams.join_rate import JoinRate, Outage, bin_ms, detection_clicks, threshold

WAIT_MS = 60_000
RATE, CTR, DELAY_S = 100, 0.02, 10.0


@dataclass
class Traffic:
    """A second of traffic after the other; clicks may stop, come late, or never."""

    rng: np.random.Generator
    watch: JoinRate
    ctr: float = CTR
    seconds: int = 0
    keep: Callable[[int], float] = lambda _: 1.0
    """Probability with which a click at this time in ms is delivered."""
    undelivered: list[tuple[int, int]] = field(default_factory=list)
    coming: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def go_on(self, seconds: int, rate: float = RATE) -> Outage | None:
        """Let time pass until there is an outage, or all of it."""
        for _ in range(seconds):
            begin_ms = self.seconds * 1000
            times = begin_ms + np.sort(self.rng.integers(0, 1000, self.rng.poisson(rate)))
            self.watch.shown(times)
            clicked = times[self.rng.random(len(times)) < self.ctr]
            delays = (1000 * self.rng.exponential(DELAY_S, len(clicked))).astype(int)
            for shown_ms, delay in zip(clicked.tolist(), delays.tolist(), strict=True):
                self.coming[(shown_ms + delay) // 1000].append((shown_ms, shown_ms + delay))
            for click in self.coming.pop(self.seconds, ()):
                if self.rng.random() < self.keep(click[1]):
                    self.watch.clicked(*click)
                else:
                    self.undelivered.append(click)
            self.seconds += 1
            had_outage = self.watch.outage is not None
            self.watch.advance(self.seconds * 1000)
            if self.watch.outage is not None and not had_outage:
                return self.watch.outage
        return None

    def stop_clicks(self, share: float = 0.0) -> None:
        begin_ms = 1000 * self.seconds
        self.keep = lambda time_ms: 1.0 if time_ms < begin_ms else share

    def mend(self) -> None:
        self.keep = lambda _: 1.0


def traffic(seed: int, ratio: float = 0.4) -> Traffic:
    found = Traffic(np.random.default_rng(seed), JoinRate(WAIT_MS, ratio))
    assert found.go_on(600 if ratio < 0.5 else 1200) is None
    assert found.watch.is_armed
    return found


@pytest.mark.parametrize(("rate", "seed"), [(20, 1), (RATE, 2), (1500, 3)])
def test_when_clicks_stop_the_alarm_comes_within_the_stated_number_of_clicks(rate: int, seed: int) -> None:
    scene = Traffic(np.random.default_rng(seed), JoinRate(WAIT_MS, 0.4))
    scene.go_on(3000 if rate == 20 else 400, rate)
    stopped = scene.seconds
    scene.stop_clicks()
    outage = scene.go_on(2000, rate)
    assert outage is not None
    in_a_bin = rate * CTR
    stated = detection_clicks(0.4, scene.watch.threshold)
    # The learned rate has an error of its own, of some percent.
    missing = (scene.seconds - stopped) * in_a_bin
    assert missing <= max(1.25 * stated + in_a_bin, 11 * in_a_bin)
    assert abs(outage.since_ms / 1000 - stopped) <= 15
    assert outage.observed <= 3


def test_the_stated_bounds_of_the_defaults() -> None:
    """The numbers of the runbook: four partitions and their sum, a label wait of a minute."""
    h = threshold(bin_ms(60_000), 5)
    assert detection_clicks(0.4, h) == pytest.approx(51.5, abs=0.1)
    assert detection_clicks(0.8, h) == pytest.approx(25.7, abs=0.1)


def test_a_drop_by_half_is_the_worlds_business_unless_the_ratio_says_otherwise() -> None:
    world = traffic(4)
    world.stop_clicks(0.5)
    assert world.go_on(3600) is None
    strict = traffic(5, ratio=0.8)
    strict.stop_clicks(0.5)
    assert strict.go_on(900) is not None


def test_the_false_negatives_are_bounded() -> None:
    """Counted from what was not delivered: clicks of impressions that were older than the label wait at the alarm."""
    for seed in range(5):
        scene = traffic(seed)
        scene.go_on(3000, 5)  # few impressions: it takes long, and many leave meanwhile
        scene.stop_clicks()
        outage = scene.go_on(4000, 5)
        assert outage is not None
        left_before_ms = outage.until_ms - WAIT_MS
        false = sum(shown_ms < left_before_ms for shown_ms, _ in scene.undelivered)
        assert false >= 15  # or the bound says nothing
        assert false <= outage.false_negatives_at_most


@pytest.mark.parametrize(
    "rate",
    [
        lambda second: 20 * (1 + 0.95 * math.sin(second / 1800 * 2 * math.pi)),
        lambda second: 500 if second // 90 % 2 == 0 else 0,
        lambda second: 300 if second // 40 % 2 == 0 else 5,
    ],
    ids=["a day in half an hour", "on and off", "rush and lull"],
)
def test_healthy_traffic_of_any_shape_raises_no_alarm(rate: Callable[[int], float]) -> None:
    scene = Traffic(np.random.default_rng(6), JoinRate(WAIT_MS, 0.4))
    for second in range(3600):
        assert scene.go_on(1, rate(second)) is None
    assert scene.watch.is_armed


def test_false_alarms_at_the_edge_are_no_more_frequent_than_stated() -> None:
    """Clicks at just the least healthy rate, and a threshold so low that alarms can be counted."""
    rng = np.random.default_rng(7)
    watch = JoinRate(WAIT_MS, 0.4)
    watch.threshold = h = 4.0
    watch.clicks_A[0], watch.shown_A[0] = 1e9, 5e10  # known for certain, and all at once
    num_bins, alarms = 20_000, 0
    for number in range(num_bins):
        watch.shown(np.full(100, number * 1000))
        for _ in range(rng.poisson(100 * 0.02 * 0.4)):
            watch.clicked(number * 1000, number * 1000)
        watch.advance((number + 1) * 1000)
        if watch.outage is not None:
            alarms += 1
            watch.end_outage()
    assert 5 <= alarms <= num_bins * 2 * math.exp(-h)


def test_a_hiccup_is_no_outage() -> None:
    scene = Traffic(np.random.default_rng(8), JoinRate(WAIT_MS, 0.4))
    scene.go_on(300, 3000)
    scene.keep = lambda _: 0.0
    assert scene.go_on(8, 3000) is None  # 480 clicks are missing
    for click in scene.undelivered:
        scene.watch.clicked(*click)
    scene.mend()
    assert scene.go_on(120, 3000) is None


def test_nothing_is_said_before_enough_is_known() -> None:
    scene = Traffic(np.random.default_rng(9), JoinRate(WAIT_MS, 0.4))
    scene.go_on(15)
    scene.stop_clicks()
    assert scene.go_on(600) is None
    assert not scene.watch.is_armed


def test_late_clicks_make_up_for_the_outage() -> None:
    scene = traffic(10)
    scene.stop_clicks()
    assert scene.go_on(200) is not None
    scene.go_on(120)
    assert not scene.watch.has_recovered
    assert scene.watch.share_recovered < 0.05
    for click in scene.undelivered:
        scene.watch.clicked(*click)
    scene.mend()
    scene.go_on(60)
    assert scene.watch.has_recovered
    assert scene.watch.share_recovered > 0.8
    scene.watch.end_outage()
    assert scene.go_on(600) is None


def test_clicks_that_come_anew_leave_the_lost_ones_missing() -> None:
    scene = traffic(11)
    scene.stop_clicks()
    assert scene.go_on(200) is not None
    scene.go_on(120)
    mended_ms = scene.seconds * 1000
    scene.mend()
    scene.go_on(60)
    assert scene.watch.has_recovered
    assert scene.watch.share_recovered < 0.5
    assert scene.watch.resumed_ms is not None
    assert abs(scene.watch.resumed_ms - mended_ms) <= 10_000
    assert scene.watch.recovered_bins > 10


def test_a_burst_of_late_clicks_is_no_recovery() -> None:
    scene = traffic(12)
    scene.stop_clicks()
    assert scene.go_on(200) is not None
    for click in scene.undelivered:
        scene.watch.clicked(*click)
    scene.go_on(5)
    assert not scene.watch.has_recovered
    scene.go_on(60)
    assert not scene.watch.has_recovered


def test_what_was_learned_goes_on_with_another_owner() -> None:
    scene = traffic(13)
    heir = JoinRate(WAIT_MS, 0.4)
    heir.learn_from(scene.watch.learned())
    assert heir.is_armed
    assert heir.rates() == pytest.approx(scene.watch.rates(), rel=0.01)
    other = JoinRate(6_000, 0.4)
    other.learn_from(scene.watch.learned())  # other bins
    other.learn_from({"bin_ms": 100, "clicks": [1.0], "shown": [2.0]})
    assert not other.is_armed


def test_a_found_outage_goes_on_with_another_owner() -> None:
    scene = traffic(14)
    scene.stop_clicks()
    outage = scene.go_on(200)
    assert outage is not None
    heir = JoinRate(WAIT_MS, 0.4)
    heir.learn_from(scene.watch.learned())
    heir.begin_outage(outage.since_ms, outage.until_ms)
    scene.watch = heir
    scene.go_on(60)
    assert not heir.has_recovered
    scene.mend()
    scene.go_on(90)
    assert heir.has_recovered


def test_accepting_the_world_learns_anew() -> None:
    scene = traffic(15)
    scene.ctr = CTR / 10
    assert scene.go_on(400) is not None
    scene.watch.end_outage(forget=True)
    assert not scene.watch.is_armed
    assert scene.go_on(1200) is None
    assert scene.watch.is_armed
    assert scene.watch.outage is None


def test_a_long_silence_costs_nothing_and_is_no_outage() -> None:
    scene = traffic(16)
    scene.watch.advance((scene.seconds + 30 * 86_400) * 1000)
    assert scene.watch.outage is None or scene.watch.outage.expected < 80
    scene = traffic(17)
    scene.coming.clear()
    scene.seconds += 10 * 86_400
    scene.go_on(30)
    assert scene.watch.outage is None


def test_impressions_that_come_late_with_their_clicks_are_no_outage() -> None:
    """A server was cut off: minutes of impressions, and the clicks that they had, come at once; others follow."""
    scene = traffic(18)
    now_ms = scene.seconds * 1000
    old = np.arange(now_ms - 300_000, now_ms - 1000, 2)
    scene.watch.shown(old)
    for shown_ms in old[scene.rng.random(len(old)) < CTR].tolist():
        clicked_ms = shown_ms + int(1000 * scene.rng.exponential(DELAY_S))
        if clicked_ms < now_ms:
            scene.watch.clicked(shown_ms, clicked_ms)
        else:
            scene.coming[clicked_ms // 1000].append((shown_ms, clicked_ms))
    assert scene.go_on(300) is None
    scene.stop_clicks()
    assert scene.go_on(60) is not None


def test_impressions_that_are_always_late_are_watched_all_the_same() -> None:
    """A clock that is wrong by some seconds, or an event that moved the watermark too far."""
    scene = traffic(19)
    watch = scene.watch

    class Late(JoinRate):
        def advance(self, watermark_ms: int) -> None:
            super().advance(watermark_ms + 5_000)

    scene.watch = Late(WAIT_MS, 0.4)
    assert scene.go_on(600) is None
    assert scene.watch.is_armed
    scene.stop_clicks()
    assert scene.go_on(60) is not None
    assert watch.outage is None


def test_traffic_that_ends_with_its_clicks_is_no_outage() -> None:
    scene = Traffic(np.random.default_rng(11), JoinRate(WAIT_MS, 0.4))
    assert scene.go_on(300, rate=700) is None
    scene.stop_clicks()
    assert scene.go_on(300, rate=0) is None
