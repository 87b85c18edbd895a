"""Replay of a real log: the estimate is right where the truth is known, and every log below the folder is played."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.regret.obd import as_labels, estimate, snips
from benchmarks.regret.policies.base import BenchPolicy, CatalogNow, Choice, Labels, RequestBatch
from benchmarks.regret.policies.beta_ts import BetaTs
from benchmarks.regret.policies.uniform import Uniform
from benchmarks.regret.report import replay_tables
from genco.cli import main
from genco.obd import LoadedLog, ObdLog

ROWS, ITEMS = 6_000, 4
SLICE = Path(__file__).parents[2] / "tests" / "data" / "obd"


class AlwaysFirst(BenchPolicy):
    def catalog(self, catalog: CatalogNow) -> None:
        pass

    def choose(self, requests: RequestBatch) -> Choice:
        return Choice(requests.candidates[:, :, 0])

    def learn(self, labels: Labels) -> None:
        pass


@pytest.fixture(scope="module")
def log() -> LoadedLog:
    """Item 0 is clicked half of the time, the others a tenth; item 0 is shown less than it should be."""
    rng = np.random.default_rng(1)
    share = np.array([0.1, 0.3, 0.3, 0.3])
    item = rng.choice(ITEMS, size=ROWS, p=share)
    click = (rng.random(ROWS) < np.where(item == 0, 0.5, 0.1)).astype(np.int64)
    contexts = [{"position": str(p), "user_feature_2": u} for p in (1, 2, 3) for u in "ab"]
    return LoadedLog(
        log=ObdLog("random", "all", Path("log"), Path("items")),
        elements=[{"element_id": f"i{i}", "features": [0.1 * i], "text": f"f1:{i}"} for i in range(ITEMS)],
        product={},
        num_rows=ROWS,
        skipped={},
        row_number=np.arange(ROWS),
        time_ms=1_574_553_600_000 + 1000 * np.arange(ROWS),
        item_id=item,
        click=click,
        propensity=share[item],
        context=rng.integers(len(contexts), size=ROWS),
        contexts=contexts,
    )


def test_a_policy_that_always_shows_one_item_gets_that_items_click_rate(log: LoadedLog) -> None:
    labels, facts, catalog = as_labels(log)
    value = estimate(AlwaysFirst(facts, 0), labels, catalog)
    shown = labels.chosen[1000:, 0] == 0  # the first batch only teaches
    assert value["snips"] == pytest.approx(labels.label[1000:][shown].mean())
    assert value["effective_size"] == pytest.approx(shown.sum())


def test_uniform_play_gets_the_mean_over_items_whatever_the_log_showed(log: LoadedLog) -> None:
    labels, facts, catalog = as_labels(log)
    value = estimate(Uniform(facts, 0), labels, catalog)
    assert value["se"] is not None
    assert value["snips"] == pytest.approx(0.2, abs=3 * value["se"])
    assert value["se"] < 0.015
    assert labels.label.mean() < 0.17  # .14, which is not what uniform play would get


def test_a_learner_is_estimated_to_do_better_than_uniform_play(log: LoadedLog) -> None:
    labels, facts, catalog = as_labels(log)
    assert (estimate(BetaTs(facts, 0), labels, catalog)["snips"] or 0) > 0.4


def test_without_overlap_nothing_is_quoted() -> None:
    assert snips(np.zeros(3), np.ones(3, np.int64)) == {"snips": None, "se": None, "effective_size": 0.0}


def test_the_context_is_position_user_and_hour(log: LoadedLog) -> None:
    labels, facts, catalog = as_labels(log)
    assert (facts.devices, facts.segments) == (("1", "2", "3"), ("a", "b"))
    context = log.contexts[log.context[7]]
    assert facts.devices[labels.requests.device[7]] == context["position"]
    assert facts.segments[labels.requests.segment[7]] == context["user_feature_2"]
    assert labels.requests.hour[0] == 0
    assert labels.requests.hour[3_600] == 1
    assert catalog.content.shape == (1, ITEMS, 8)


def test_the_command_refuses_a_log_of_less_than_two_batches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "regret", "--obd", str(SLICE), "--policies", "uniform"]) == 1
    assert "expected at least 2000, two batches" in capsys.readouterr().err


def test_the_command_replays_the_logs_of_a_folder(
    log: LoadedLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.regret.obd.find_logs", lambda _: [log.log])
    monkeypatch.setattr("benchmarks.regret.obd.load", lambda _: log)
    path = tmp_path / "out.json"
    assert main(["bench", "regret", "--obd", str(tmp_path), "--policies", "uniform,beta-ts", "--json", str(path)]) == 0
    summary = json.loads(path.read_text("utf-8"))
    entry = summary["obd"]["random-all"]
    assert entry["rows"] == ROWS
    assert entry["policies"].keys() == {"uniform", "beta-ts"}
    assert entry["policies"]["uniform"].keys() == {"snips", "se", "effective_size"}
    assert [table.row_count for table in replay_tables(summary)] == [2]
    assert "random-all" in capsys.readouterr().out
