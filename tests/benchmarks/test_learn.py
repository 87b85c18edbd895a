"""The learning benchmark: its traffic is learned whole, and its command tells what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.learn.command import OF_EACH, ONE_THREAD
from benchmarks.learn.ours import PARTS, Clock
from benchmarks.learn.traffic import CANDIDATES, Traffic
from streams.contracts.decision_ids import issued_at_ms
from streams.contracts.examples import decode_examples


def test_traffic_is_what_it_says_and_the_same_again() -> None:
    traffic = Traffic(num_products=3)
    batch, shown = decode_examples(traffic.record(1)), traffic.shown(1)
    assert traffic.record(1) == Traffic(num_products=3).record(1) != traffic.record(0)
    assert len(batch) == len(shown) == len(set(batch.decision_id))
    assert batch.creative == [each.creative for each in shown]
    assert batch.candidates == [each.request["candidates"] for each in shown]
    assert batch.label.tolist() == [each.clicked for each in shown]
    assert 0.01 < batch.label.mean() < 0.2
    assert {len(ids) for card in batch.candidates for ids in card.values()} == {CANDIDATES}
    assert [issued_at_ms(decision_id) for decision_id in batch.decision_id] == batch.occurred_at_ms.tolist()
    assert set(batch.product_id) == traffic.products.keys()


def test_clock_tells_medians() -> None:
    clock = Clock()
    for _ in range(3):
        with clock.part("a"):
            pass
    assert 0.0 <= clock.seconds("a") < 1.0
    assert clock.seconds("a", "a") == 2 * clock.seconds("a")
    assert 0.0 <= clock.processor_seconds("a") < 1.0


@pytest.mark.long
def test_command_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("vowpalwabbit")
    path = tmp_path / "learn.json"
    command = ["bench", "learn", "--impressions", "5000", "--products", "", "--json", str(path)]
    subprocess.run([sys.executable, "-m", "genco", *command], env=os.environ | ONE_THREAD, check=True, timeout=170)
    result = json.loads(path.read_text())
    assert result["impressions_per_second"] > 0
    assert result["vw_slates_impressions_per_second"] > 0
    assert result["update_1000_ms"] > 0
    assert result["bytes_per_decision"] == pytest.approx(9.0)
    assert set(result["microseconds"]) == set(PARTS)
    assert all(value > 0 for value in result["microseconds"].values())
    assert set(result["by_products"]["30"]) == set(OF_EACH)
