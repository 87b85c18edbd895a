"""Learning a log that ends: the same bytes whether it stops on the way, is killed, or meets what cannot be learned."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoint import CheckpointError, CheckpointStore
from learner.crash_points import CrashPoint
from learner.once import LoggedUpdate, LogLearner, OnceReport
from learner.online import LearnerSettings, OnlineLearner
from learner.updates import in_order
from streams.contracts.catalog import Element
from streams.contracts.examples import ExampleBatch, decode_examples
from tests.learner.scene import CrashAt, Crashed, record, state_of

SIZE = 60
COUNT = 7
POISON = "poison"


def settings() -> LearnerSettings:
    start = LearnerSettings(num_draws=2)
    small = replace(start.generator, cards=8, group_size=4, winners=2, examples_per_step=50)
    return replace(start, generator=small, gate=replace(start.gate, probes=8))


class Spoiled(OnlineLearner):
    """One product drives it out of its mind."""

    def update(self, batch: ExampleBatch) -> Any:
        report = super().update(batch)
        if POISON in batch.product_id:
            self.reward_model.core.theta_KD[0, 0] = float("nan")
        return report


def log(count: int = COUNT, *poisoned: int) -> Iterator[LoggedUpdate]:
    for place in range(count):
        changes = {"product_id": [POISON] * SIZE} if place in poisoned else {}
        element = Element(element_id=f"t{place % 3}", slot="title", features=(float(place),))
        yield LoggedUpdate(
            log="log",
            place=place * 10,
            examples=decode_examples(record(0, place, SIZE, **changes)),
            elements={element.element_id: element} if place % 2 else {},
            products={},
        )


def learner_in(directory: Path, **options: Any) -> LogLearner:
    return LogLearner(lambda: Spoiled(settings()), directory, **options)


def sha256(learner: LogLearner) -> str:
    return learner.snapshot(model_id="m", created_at_ms=0, signing_key=b"k").manifest.sha256


def test_n_and_then_m_updates_equal_n_and_m(tmp_path: Path) -> None:
    whole = learner_in(tmp_path / "whole")
    report = whole.learn(log)
    assert (report.updates, report.examples, report.learned) == (COUNT, COUNT * SIZE, COUNT * SIZE)
    for first in (1, 3, 6):
        directory = tmp_path / str(first)
        learner_in(directory).learn(log, max_updates=first)
        second = learner_in(directory)
        second.resume()
        report = second.learn(log)
        assert (report.resumed_at, report.updates, second.number) == (first, COUNT - first, COUNT)
        assert state_of(second.learner) == state_of(whole.learner)
        assert sha256(second) == sha256(whole)


def test_log_that_has_grown_is_gone_on_with(tmp_path: Path) -> None:
    whole = learner_in(tmp_path / "whole")
    whole.learn(log)
    grown = learner_in(tmp_path / "grown")
    grown.learn(lambda: log(4))
    grown = learner_in(tmp_path / "grown")
    grown.resume()
    grown.learn(log)
    assert sha256(grown) == sha256(whole)
    assert grown.learn(log).updates == COUNT - 4, "there is nothing more to learn"


@pytest.mark.parametrize(
    "point",
    [
        CrashPoint.UPDATE_LEARNED,
        CrashPoint.CHECKPOINT_WRITTEN,
        CrashPoint.CHECKPOINT_RENAMED,
        CrashPoint.CHECKPOINT_COMPLETE,
    ],
)
def test_run_that_was_killed_and_resumed_equals_the_one_that_was_not(tmp_path: Path, point: CrashPoint) -> None:
    whole = learner_in(tmp_path / "whole")
    whole.learn(log)
    for life in range(1, 3):
        killed = learner_in(tmp_path / "killed", checkpoint_every=2 * SIZE, at=CrashAt(point, life))
        killed.resume()
        with pytest.raises(Crashed):
            killed.learn(log)
    last = learner_in(tmp_path / "killed", checkpoint_every=2 * SIZE)
    last.resume()
    last.learn(log)
    assert state_of(last.learner) == state_of(whole.learner)


@pytest.mark.parametrize("poisoned", [(0,), (3, 4), (6,), tuple(range(COUNT))])
@pytest.mark.parametrize("every", [SIZE, 3 * SIZE, 10**9])
def test_update_that_spoils_the_model_is_left_out_and_undone(
    tmp_path: Path, poisoned: tuple[int, ...], every: int
) -> None:
    learner = learner_in(tmp_path / "poisoned", checkpoint_every=every)
    report = learner.learn(lambda: log(COUNT, *poisoned))
    clean = OnlineLearner(settings())
    expected = OnceReport(resumed_at=0)
    for place, update in enumerate(log()):
        if update.elements:
            clean.apply_catalog(update.elements, {})
        if place not in poisoned:
            expected.learned += clean.update(in_order(update.examples)).num_learned
            expected.validation += clean.newest_validation
    assert state_of(learner.learner) == state_of(clean)
    assert (report.updates, report.examples) == (COUNT, COUNT * SIZE)
    assert (report.learned, report.validation) == (expected.learned, expected.validation)
    assert report.skipped == {"quarantined": SIZE * len(poisoned)}
    lines = learner._quarantine.lines()
    assert [(line["update"], line["place"]) for line in lines] == [(place + 1, place * 10) for place in poisoned]
    assert all("reward_model.core.theta" in str(line["reason"]) for line in lines)


def test_checkpoint_of_a_live_learner_is_not_gone_on_with(tmp_path: Path) -> None:
    tensors, state = Spoiled(settings()).state()
    CheckpointStore(tmp_path).save(1, tensors, {"learner": state, "number": 1, "learned_until": {"0": 3}})
    with pytest.raises(CheckpointError, match="live learner"):
        learner_in(tmp_path).resume()


def test_validation_is_over_all_examples_predicted_before_they_were_learned(tmp_path: Path) -> None:
    first = learner_in(tmp_path).learn(log, max_updates=1)
    # Nothing was known, so each prediction is the prior's.
    prior = OnlineLearner(settings()).reward_model.settings.core.bias_mean
    assert first.validation.num_examples == SIZE
    assert first.validation.expected_clicks == pytest.approx(SIZE / (1 + math.exp(-prior)), rel=1e-6)
