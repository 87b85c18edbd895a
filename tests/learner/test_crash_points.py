"""Whatever the moment of a crash, the learner that starts again ends with the weights of one that never crashed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from learner.crash_points import CrashPoint
from learner.updates import effective
from tests.learner.scene import (
    PARTITIONS,
    CrashAt,
    Crashed,
    Kafka,
    Scene,
    state_of,
    without_crash,
)

RECORDS = 12
"""In each partition."""
SIZE = 20


def scene_in(directory: Path) -> Scene:
    kafka = Kafka.filled(RECORDS, SIZE)
    for i in range(3):
        kafka.add_element(f"t{i}", float(i), 1.0)
    return Scene(directory, kafka, update_max_examples=3 * SIZE)


def check(scene: Scene, learner: object) -> None:
    """Check that everything was learned once, and that the model is that of the recorded updates."""
    expected, shas = without_crash(scene)
    assert state_of(learner) == state_of(expected)
    assert expected.reward_model.num_examples == RECORDS * SIZE * PARTITIONS
    numbers = [update.number for update in effective(scene.kafka.updates)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert scene.kafka.committed == dict.fromkeys(range(PARTITIONS), RECORDS)
    for snapshot in scene.registry.published:
        assert snapshot.manifest.sha256 == shas[snapshot.manifest.version]
    order = [(s.manifest.epoch, s.manifest.version) for s in scene.registry.published]
    assert order == sorted(set(order)), "no server may be asked to go back"


@pytest.mark.parametrize("visit", [1, 2])
@pytest.mark.parametrize("point", CrashPoint)
def test_learner_that_crashed_equals_the_one_that_did_not(tmp_path: Path, point: CrashPoint, visit: int) -> None:
    undisturbed = scene_in(tmp_path / "undisturbed")
    expected = undisturbed.run()
    scene = scene_in(tmp_path / "crashed")
    with pytest.raises(Crashed, match=point):
        scene.run(CrashAt(point, visit))
    worker = scene.run()
    # All records lie there from the beginning, so both made the same updates.
    assert state_of(worker._learner) == state_of(expected._learner)
    assert [u.until for u in scene.kafka.updates] == [u.until for u in undisturbed.kafka.updates]
    check(scene, worker._learner)


@pytest.mark.parametrize("point", CrashPoint)
def test_learner_that_crashes_at_every_start_arrives_all_the_same(tmp_path: Path, point: CrashPoint) -> None:
    scene = scene_in(tmp_path)
    rng = np.random.default_rng(list(point.encode()))
    for life in range(3):
        # Records come in other portions in every life, and the process dies a little later each time.
        with pytest.raises(Crashed, match=point):
            scene.run(CrashAt(point, 1 + life // 2), rng=rng)
    worker = scene.run(rng=rng)
    check(scene, worker._learner)


def test_every_point_is_passed_in_the_order_that_makes_a_crash_harmless(tmp_path: Path) -> None:
    passed: list[CrashPoint] = []
    scene_in(tmp_path).run(passed.append)
    first = list(dict.fromkeys(passed))
    assert first == list(CrashPoint)
    count = Counter(passed)
    assert count[CrashPoint.UPDATE_PLANNED] == count[CrashPoint.UPDATE_LEARNED] >= 5
    assert count[CrashPoint.CHECKPOINT_COMPLETE] >= 2
