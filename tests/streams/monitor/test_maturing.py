"""Each decision counts once, by its strongest label, when nothing can change it any more."""

from typing import Any

import numpy as np

from streams.monitor.maturing import IDLE_MS, Maturing, PartitionClocks
from streams.monitor.reading import Rows

WINDOW_MS = 30_000


def rows(*labels: tuple[int, int, str]) -> Rows:
    """Rows of (key, time, kind), kind `-`: negative, `+`: positive, `late`: late positive."""
    num = len(labels)
    kinds = np.array([kind for _, _, kind in labels])
    values: dict[str, Any] = {
        "key": np.array([key for key, _, _ in labels]),
        "time_ms": np.array([time for _, time, _ in labels]),
        "is_click": kinds != "-",
        "is_late": kinds == "late",
        "delay_ms": np.zeros(num, np.int64),
        "is_holdout": np.zeros(num, np.bool_),
        "version": np.zeros(num, np.int64),
        "product": np.zeros(num, np.int32),
        "element": np.zeros((num, 8), np.int32),
        "current": np.zeros(num),
        "reference": np.zeros(num),
    }
    return Rows(**values)


def labels(found: Rows | None) -> dict[int, bool]:
    assert found is not None
    assert len(set(found.key.tolist())) == len(found)
    return dict(zip(found.key.tolist(), found.is_click.tolist(), strict=True))


def test_strongest_label_wins_in_any_order_and_repetition_changes_nothing() -> None:
    maturing = Maturing(WINDOW_MS)
    maturing.add(rows((1, 100, "-"), (2, 200, "+"), (3, 300, "-")))
    maturing.add(rows((3, 300, "late"), (1, 100, "-")))
    maturing.add(rows((2, 200, "-"), (3, 300, "-")))
    assert maturing.matured(WINDOW_MS + 9_999) is None
    assert labels(maturing.matured(WINDOW_MS + 10_000)) == {1: False, 2: True, 3: True}
    assert (maturing.num_waiting, maturing.num_unmatched) == (0, 0)


def test_what_comes_after_its_bucket_has_matured_is_counted_and_left_out() -> None:
    maturing = Maturing(WINDOW_MS)
    maturing.add(rows((1, 100, "-")))
    maturing.matured(WINDOW_MS + 10_000)
    maturing.add(rows((1, 100, "late"), (2, 15_000, "-")))
    assert maturing.num_too_late == 1
    assert labels(maturing.matured(WINDOW_MS + 20_000)) == {2: False}


def test_late_positive_without_its_negative_is_an_imbalance_unless_reading_began_between_them() -> None:
    maturing = Maturing(WINDOW_MS)
    maturing.add(rows((1, 100, "late")))
    maturing.add(rows((2, 40_000, "late"), (3, 40_000, "-"), (3, 40_000, "late")))
    maturing.matured(200_000)
    assert maturing.num_unmatched == 1


def test_memory_is_bounded() -> None:
    maturing = Maturing(WINDOW_MS, max_rows=2)
    maturing.add(rows((1, 100, "-"), (2, 200, "-")))
    maturing.add(rows((3, 300, "-")))
    assert (maturing.num_waiting, maturing.num_dropped) == (2, 1)


def test_clock_waits_for_every_partition_but_not_for_an_idle_one() -> None:
    clocks = PartitionClocks()
    clocks.assign({0, 1}, now_ms=1_000)
    clocks.note(0, 900, now_ms=1_000)
    assert clocks.reached_ms(2_000) == 0
    clocks.note(1, 500, now_ms=2_000)
    assert clocks.reached_ms(2_000) == 500
    clocks.note(0, 70_000, now_ms=71_000)
    assert clocks.reached_ms(2_001 + IDLE_MS) == 70_000
    assert clocks.reached_ms(10 * IDLE_MS) == 70_000
