"""Updates that no model can follow are left out, bit for bit, and the learner keeps its pace whatever comes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner import guard
from learner.crash_points import CrashPoint
from learner.feed import Rebalanced, SeekRequest
from learner.guard import Quarantine
from learner.lease import LeaseHeldError
from learner.online import OnlineLearner
from learner.updates import Update, in_order
from streams.contracts.catalog import Catalog
from streams.contracts.examples import ExampleBatch, decode_examples
from tests.learner.scene import (
    PARTITIONS,
    CrashAt,
    Crashed,
    Kafka,
    Scene,
    record,
    state_of,
    without_crash,
)

SIZE = 20
POISON = "poison"


def poisoned(part: str) -> type[OnlineLearner]:
    """Return a learner that one product drives out of its mind, in one part or another, after it changed everything."""

    class Poisoned(OnlineLearner):
        def update(self, batch: ExampleBatch) -> Any:
            report = super().update(batch)
            if POISON in batch.product_id:
                if part == "raises":
                    raise FloatingPointError("coefficients that are not finite")
                if part == "reward_model":
                    self.reward_model.core.theta_KD[0, 0] = float("nan")
                if part == "generator":
                    name = next(iter(self.generator.weights))
                    self.generator.weights[name] = self.generator.weights[name] * float("inf")
            return report

    return Poisoned


def poisoned_scene(directory: Path, part: str, *places: tuple[int, int]) -> Scene:
    kafka = Kafka.filled(8, SIZE)
    for partition, offset in places:
        kafka.examples[partition][offset] = record(partition, offset, SIZE, product_id=[POISON] * SIZE)
    scene = Scene(directory, kafka, update_max_examples=2 * SIZE)
    learner = scene.learner

    def make() -> OnlineLearner:
        return poisoned(part)(learner().settings)

    scene.make_learner = make
    return scene


def without(scene: Scene, left_out: set[int]) -> OnlineLearner:
    """Apply the recorded updates but these to a learner that never meets the poison."""
    learner, done = scene.learner(), dict.fromkeys(range(PARTITIONS), 0)
    for update in scene.kafka.updates:
        places = [(p, o) for p, until in sorted(update.until.items()) for o in range(done[p], until)]
        done |= update.until
        if update.number not in left_out:
            batches = [decode_examples(scene.kafka.examples[p][o]) for p, o in places]
            learner.update(in_order(ExampleBatch.concat(batches)))
    return learner


def quarantined(scene: Scene) -> list[dict[str, Any]]:
    return Quarantine(scene.settings.checkpoint_dir).lines()


@pytest.mark.parametrize("part", ["raises", "reward_model", "generator"])
def test_update_that_spoils_the_model_is_left_out_and_undone(tmp_path: Path, part: str) -> None:
    scene = poisoned_scene(tmp_path, part, (0, 3), (1, 6))
    worker = scene.run()
    lines = quarantined(scene)
    assert [set(line) for line in lines] == [{"update", "from", "until", "examples", "reason"}] * 2
    left_out = {line["update"] for line in lines}
    for line, (partition, offset) in zip(lines, [(0, 3), (1, 6)], strict=True):
        assert line["from"][str(partition)] <= offset < line["until"][str(partition)]
    # Vocabulary, memory of decisions, optimizer: all as if the examples had never come.
    assert state_of(worker._learner) == state_of(without(scene, left_out))
    assert POISON not in worker._learner.features.freeze().products
    assert worker.failure is None
    assert scene.kafka.committed == scene.ends()


def test_poison_in_every_record_leaves_a_learner_that_knows_nothing_and_runs(tmp_path: Path) -> None:
    scene = poisoned_scene(tmp_path, "raises", *[(p, o) for p in range(PARTITIONS) for o in range(8)])
    worker = scene.run()
    assert worker._learner.num_updates == 0
    assert len(quarantined(scene)) == len(scene.kafka.updates)


@pytest.mark.parametrize(
    "point", [CrashPoint.UPDATE_RECORDED, CrashPoint.CHECKPOINT_RENAMED, CrashPoint.SNAPSHOT_SHOWN]
)
def test_crash_beside_a_poisoned_update_changes_nothing(tmp_path: Path, point: CrashPoint) -> None:
    scene = poisoned_scene(tmp_path, "raises", (0, 1))
    with pytest.raises(Crashed):
        scene.run(CrashAt(point, 1))
    worker = scene.run()
    (line,) = quarantined(scene)
    assert state_of(worker._learner) == state_of(without(scene, {line["update"]}))
    assert [u.number for u in scene.kafka.updates] == list(range(1, len(scene.kafka.updates) + 1))


def test_error_of_the_program_is_not_taken_for_one_of_the_examples(tmp_path: Path) -> None:
    scene = poisoned_scene(tmp_path, "raises", (0, 0))

    class Broken(OnlineLearner):
        def update(self, batch: ExampleBatch) -> Any:
            raise KeyError("no such column")

    scene.make_learner = Broken
    with pytest.raises(KeyError, match="no such column"):
        scene.run()
    assert not quarantined(scene)


def test_quarantine_keeps_the_newest_lines_and_one_for_each_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guard.MAX_LINES == 1_000
    monkeypatch.setattr(guard, "MAX_LINES", 5)
    quarantine = Quarantine(tmp_path)
    for number in [*range(1, 8), 7]:
        quarantine.add(number, {"until": {"0": number}}, ValueError("x" * 5_000))
    assert [line["update"] for line in quarantine.lines()] == [3, 4, 5, 6, 7]
    assert (tmp_path / "quarantine.ndjson").stat().st_size < 5 * 1_200


# -- catalog ---------------------------------------------------------------------------------------------------------


def test_portions_in_which_the_catalog_comes_do_not_change_the_model(tmp_path: Path) -> None:
    scenes = []
    for portion in (1, 2, 500):
        kafka = Kafka.filled(4, SIZE)
        for i in (2, 0, 1):
            kafka.add_element(f"t{i}", float(i))
        product = b'{"product_id": "p0", "slots": {"title": ["t1", "t9"]}}'
        kafka.catalog.append((b"product/p0", product))
        scene = Scene(tmp_path / str(portion), kafka, update_max_examples=2 * SIZE)
        scene.catalog_portion = portion
        scenes.append(scene.run())
    first, *others = [state_of(worker._learner) for worker in scenes]
    assert all(other == first for other in others)


def test_repeated_update_takes_the_catalog_as_far_as_it_was_known_then(tmp_path: Path) -> None:
    kafka = Kafka.filled(6, SIZE)
    kafka.add_element("t0", 0.5)
    scene = Scene(tmp_path, kafka, update_max_examples=2 * SIZE, checkpoint_interval_ms=3_600_000)
    with pytest.raises(Crashed):
        scene.run(CrashAt(CrashPoint.UPDATE_LEARNED, 3))
    # Came while nobody was there: the repeated updates must not know it.
    kafka.add_element("t1", 1.5)
    kafka.add_element("t0", -1.0)
    scene.settings = scene.settings.model_copy(update={"checkpoint_interval_ms": 2_000})
    worker = scene.run()
    assert [u.catalog_until for u in kafka.updates] == [1, 1, 1, 3, 3, 3]
    assert state_of(worker._learner) == state_of(without_crash(scene)[0])


def test_catalog_record_that_compaction_removed_is_not_waited_for(tmp_path: Path) -> None:
    kafka = Kafka.filled(1)
    scene = Scene(tmp_path, kafka)
    log = scene.worker()._catalog
    for i in range(3):
        kafka.add_element(f"t{i}", float(i))
    poll = log._consumer.poll

    def compacted(**options: int) -> Any:
        return {place: [r for r in records if r.offset != 1] for place, records in poll(**options).items()}

    log._consumer.poll = compacted
    changed: Catalog = log.take(2)
    assert (list(changed.elements), log.taken_until) == (["t0"], 2)
    assert list(log.take(3).elements) == ["t2"]


# -- pace ------------------------------------------------------------------------------------------------------------


def test_learner_that_is_behind_makes_updates_of_full_size_and_skips_nothing(tmp_path: Path) -> None:
    # Hours of records lie there; one interval brings far more than an update holds.
    scene = Scene(tmp_path, Kafka.filled(40, SIZE), update_max_examples=10 * SIZE, update_interval_ms=60_000)
    waiting = []

    def watch(point: CrashPoint) -> None:
        if point is CrashPoint.UPDATE_PLANNED:
            waiting.append(workers[0].feed.backlog.num_examples)

    workers = [scene.worker(watch)]
    scene.worker = lambda at: workers[0]  # type: ignore[method-assign]
    worker = scene.run()
    assert [update.num_examples for update in scene.kafka.updates] == [10 * SIZE] * 8
    assert worker._learner.reward_model.num_examples == 40 * SIZE * PARTITIONS
    # One update and what may come meanwhile, not the hours.
    assert max(waiting) <= 2 * 10 * SIZE + SIZE


def test_quiet_learner_makes_small_updates_at_every_interval(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(10, SIZE), update_max_examples=10_000)
    scene.run(rng=np.random.default_rng(3))
    sizes = [update.num_examples for update in scene.kafka.updates]
    assert sum(sizes) == 10 * SIZE * PARTITIONS
    # At most four records came in a second, and one interval may pass while the lease is taken.
    assert max(sizes) <= 2 * 4 * SIZE


def test_full_backlog_does_not_keep_out_what_a_recorded_update_needs(tmp_path: Path) -> None:
    # Recorded by a learner with larger updates than this one may have: all of partition 1, of which nothing waits.
    kafka = Kafka.filled(10, SIZE)
    kafka.append(Update(number=1, until={1: 10}, catalog_until=0, num_examples=10 * SIZE))
    scene = Scene(tmp_path, kafka, update_max_examples=SIZE)
    worker = scene.run()
    assert kafka.updates[0].until == {1: 10}
    assert [u.num_examples for u in kafka.updates[1:]] == [SIZE] * 10
    assert state_of(worker._learner) == state_of(without_crash(scene)[0])


def test_rebalance_in_the_middle_loses_and_repeats_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(6, SIZE), update_max_examples=3 * SIZE)
    seen = []

    def rebalance(point: CrashPoint) -> None:
        seen.append(point)
        if seen.count(CrashPoint.UPDATE_LEARNED) == 2 and point is CrashPoint.UPDATE_LEARNED:
            workers[0].feed.put(Rebalanced())
            workers[0].feed.seeks.extend(SeekRequest(p, scene.kafka.committed.get(p, 0)) for p in range(PARTITIONS))

    workers = [scene.worker(rebalance)]
    scene.worker = lambda at: workers[0]  # type: ignore[method-assign]
    worker = scene.run()
    assert worker._learner.reward_model.num_examples == 6 * SIZE * PARTITIONS
    assert state_of(worker._learner) == state_of(without_crash(scene)[0])


def test_records_that_retention_removed_are_passed_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(6, SIZE))
    scene.kafka.earliest = {0: 4}
    scene.kafka.committed = {0: 4}
    worker = scene.run()
    assert worker._learner.reward_model.num_examples == (2 + 6) * SIZE


def test_checkpoint_directory_that_was_lost_begins_at_the_first_record(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "a", Kafka.filled(6, SIZE))
    expected = state_of(scene.run()._learner)
    # Kafka's committed offsets are at the end; without a checkpoint they say nothing.
    assert scene.kafka.committed == scene.ends()
    scene.settings = scene.settings.model_copy(update={"checkpoint_dir": tmp_path / "b"})
    scene.kafka.examples[0].append(record(0, 6, SIZE))
    scene.kafka.examples[1].append(record(1, 6, SIZE))
    worker = scene.run()
    assert state_of(worker._learner) == state_of(without_crash(scene)[0]) != expected


def test_disk_that_is_full_for_a_while_does_not_stop_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, Kafka.filled(6, SIZE), update_max_examples=SIZE)
    worker = scene.worker()
    save, failures = worker._checkpoints.save, []

    def full(*arguments: Any) -> Path:
        if len(failures) < 2:
            failures.append(dict(scene.kafka.committed))
            raise OSError(28, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(worker._checkpoints, "save", full)
    scene.worker = lambda at: worker  # type: ignore[method-assign]
    scene.run()
    assert failures == [{}, {}]
    assert scene.kafka.committed == scene.ends()


# -- lease -----------------------------------------------------------------------------------------------------------


def test_learner_that_takes_over_repeats_what_the_other_recorded_meanwhile(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(6, SIZE), update_max_examples=3 * SIZE)
    waiting = scene.worker()  # has read the checkpoint, and waits for the lease
    scene.run()
    scene.worker = lambda at: waiting  # type: ignore[method-assign]
    numbers = [u.number for u in scene.kafka.updates]
    scene.kafka.committed.clear()
    scene.run()
    assert [u.number for u in scene.kafka.updates] == numbers, "nothing is recorded twice"
    assert state_of(waiting._learner) == state_of(without_crash(scene)[0])


def test_learner_that_was_paused_while_another_ran_ends(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(2, SIZE))
    worker = scene.run()
    worker._publisher.holds_lease = False  # it ran out
    scene.registry.epoch += 1  # somebody took it, and is gone again
    scene.now_s += 100.0
    with pytest.raises(LeaseHeldError, match="ran while this one was paused"):
        worker.turn()


def test_learner_whose_lease_ran_out_unnoticed_goes_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Kafka.filled(2, SIZE))
    worker = scene.run()
    worker._publisher.holds_lease = False
    scene.now_s += 100.0
    worker.turn()
    assert worker._publisher.fence.epoch == 2


def test_quarantine_line_is_json_of_one_line(tmp_path: Path) -> None:
    Quarantine(tmp_path).add(1, {"from": {"0": 0}}, ValueError("two\nlines"))
    (line,) = (tmp_path / "quarantine.ndjson").read_text().splitlines()
    assert json.loads(line)["from"] == {"0": 0}
