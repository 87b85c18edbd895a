"""The learner's worker between a Kafka and a Redis that a test plays, turn by turn, in one thread."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from kafka import TopicPartition

from learner.catalog_log import CatalogLog
from learner.crash_points import CrashPoint, Hook, go_on
from learner.feed import InboxRecord, RecordsLost
from learner.online import LearnerSettings, OnlineLearner
from learner.publisher import Fence, Outcome
from learner.updates import Update, effective, in_order
from learner.worker import Connections, Worker
from streams.contracts.catalog import Catalog, Element, catalog_key
from streams.contracts.examples import ExampleBatch, decode_examples, encode_examples
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import PolicySnapshot
from streams.contracts.topics import CATALOG

PARTITIONS = 2
START_MS = 1_764_000_000_000


class Crashed(BaseException):
    """The process is gone."""


def record(partition: int, offset: int, size: int = 50, **changes: Any) -> bytes:
    """Make the examples of a record, the same for the same place."""
    rng = np.random.default_rng([partition, offset])
    title = rng.integers(3, size=size)
    clicked = rng.random(size) < np.array([0.05, 0.1, 0.3])[title]
    columns: dict[str, Any] = {
        "decision_id": [f"{partition}.{offset}.{i}" for i in range(size)],
        "occurred_at_ms": [START_MS + 1_000 * offset + i for i in range(size)],
        "product_id": ["p1"] * size,
        "context": ['{"device":"ios"}'] * size,
        "candidates": [{"title": ["t0", "t1", "t2"]}] * size,
        "creative": [{"title": f"t{t}"} for t in title],
        "slot_propensities": [{"title": 1 / 3}] * size,
        "propensity": [1 / 3] * size,
        "model_id": ["default"] * size,
        "epoch": [0] * size,
        "policy_version": [0] * size,
        "source": ["uniform"] * size,
        "holdout": [True] * size,
        "seed": [0] * size,
        "survival_probability": [1.0] * size,
        "label": clicked.astype(int).tolist(),
        "reward": clicked.astype(float).tolist(),
        "label_kind": ["final"] * size,
        "delay_ms": [1_000 if c else None for c in clicked],
    }
    return encode_examples(columns | changes)


@dataclass
class Kafka:
    """The topics, and what the group has committed; outlives every process."""

    examples: list[list[bytes]]
    """For each partition its records."""
    catalog: list[tuple[bytes, bytes]] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    committed: dict[int, int] = field(default_factory=dict)
    earliest: dict[int, int] = field(default_factory=dict)

    @classmethod
    def filled(cls, length: int, size: int = 50) -> "Kafka":
        return cls([[record(p, o, size) for o in range(length)] for p in range(PARTITIONS)])

    def add_element(self, name: str, *features: float) -> None:
        element = Element(element_id=name, slot="title", features=features)
        self.catalog.append((catalog_key(element), element.model_dump_json().encode()))

    def append(self, update: Update) -> int:
        self.updates.append(Update.from_bytes(update.model_dump_json().encode()))
        return len(self.updates)

    def since(self, offset: int, epoch: int) -> tuple[list[Update], int]:
        return effective(self.updates[offset:], epoch), len(self.updates)

    def close(self) -> None:
        pass


class CatalogConsumer:
    """What `CatalogLog` needs of a KafkaConsumer; portions of a size that the test decides."""

    def __init__(self, kafka: Kafka, portion: int) -> None:
        self._kafka, self._portion, self._at = kafka, portion, 0

    def partitions_for_topic(self, _: str) -> set[int]:
        return {0}

    def assign(self, _: Any) -> None:
        pass

    def seek_to_beginning(self, *_: Any) -> None:
        self._at = 0

    def seek(self, _: TopicPartition, offset: int) -> None:
        self._at = offset

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        found = [
            SimpleNamespace(offset=self._at + i, key=key, value=value)
            for i, (key, value) in enumerate(self._kafka.catalog[self._at :][: min(self._portion, max_records)])
        ]
        self._at += len(found)
        return {TopicPartition(CATALOG, 0): found} if found else {}

    def close(self) -> None:
        pass


@dataclass
class Registry:
    """What Redis holds; outlives every process."""

    epoch: int = 0
    learning_frozen: bool = False
    shown: list[Any] = field(default_factory=list)
    published: list[PolicySnapshot] = field(default_factory=list)


class Publisher:
    """Stands for the one that writes to Redis; the lease of a process that died has run out."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.fence = Fence()
        self.holds_lease = False

    def acquire(self) -> bool:
        self._registry.epoch = self.fence.epoch = max(self._registry.epoch, self.fence.epoch) + 1
        self.holds_lease = True
        return True

    def renew(self) -> bool:
        return True

    def learning_is_frozen(self) -> bool:
        return self._registry.learning_frozen

    def release(self) -> None:
        self.holds_lease = False

    def show(self, manifest: Any) -> None:
        self._registry.shown.append(manifest)

    def publish(self, snapshot: PolicySnapshot) -> Outcome:
        self._registry.published.append(snapshot)
        self.fence.revision += 1
        return Outcome.PUBLISHED


class Scene:
    """One Kafka, one Redis, one disk, and the processes that come and go."""

    def __init__(self, directory: Path, kafka: Kafka, **settings: Any) -> None:
        self.kafka, self.registry = kafka, Registry()
        self.settings = LearnSettings(
            kafka_bootstrap_servers="nowhere:1",
            redis_url="redis://nowhere",
            signing_key="k" * 32,
            checkpoint_dir=directory,
            particles=2,
            **{"checkpoint_interval_ms": 2_000, "update_interval_ms": 1_000, "update_max_examples": 150, **settings},
        )
        self.now_s = 0.0
        self.make_learner: Callable[[], OnlineLearner] = self.learner
        self.catalog_portion = 500

    def learner(self) -> OnlineLearner:
        settings = LearnerSettings.from_settings(self.settings)
        small = replace(settings.generator, cards=8, group_size=4, examples_per_step=50)
        return OnlineLearner(replace(settings, generator=small, gate=replace(settings.gate, probes=8)))

    def worker(self, at: Hook = go_on) -> Worker:
        """Start a process."""
        connections: Any = Connections(
            updates=self.kafka,  # type: ignore[arg-type]
            catalog=CatalogLog(CatalogConsumer(self.kafka, self.catalog_portion)),
            publisher=Publisher(self.registry),  # type: ignore[arg-type]
        )
        return Worker(self.settings, self.make_learner, connections, at=at, clock=lambda: self.now_s)

    def run(self, at: Hook = go_on, *, rng: np.random.Generator | None = None, turns: int = 200) -> Worker:
        """Run a process until it has learned everything and saved it, or crashes.

        Args:
            at: What happens at crash points.
            rng: Decides how many records come in a turn, and of which partition; None: all at once.
            turns: It must be done by then.
        """
        worker = self.worker(at)
        reading = {p: self.kafka.committed.get(p, 0) for p in range(len(self.kafka.examples))}
        for _ in range(turns):
            for partition in self._arriving(worker, reading, rng):
                offset = reading[partition]
                worker.feed.put(InboxRecord(partition, offset, *self._content(partition, offset)))
                reading[partition] = offset + 1
            worker.turn()
            worker.acknowledge()
            while worker.feed.seeks:
                seek = worker.feed.seeks.popleft()
                earliest = self.kafka.earliest.get(seek.partition, 0)
                if earliest > seek.offset:
                    worker.feed.put(RecordsLost(seek.partition, earliest))
                reading[seek.partition] = max(seek.offset, earliest)
            self.now_s += 1.0
            if worker._saved == worker._number and worker._learned_until == self.ends():
                return worker
        raise AssertionError(f"not done after {turns} turns: {worker._learned_until}, to come {worker._planned}")

    def ends(self) -> dict[int, int]:
        return {p: len(records) for p, records in enumerate(self.kafka.examples)}

    def _arriving(self, worker: Worker, reading: dict[int, int], rng: np.random.Generator | None) -> Iterator[int]:
        """Yield the partition of each record that comes in this turn."""
        number = 10_000 if rng is None else int(rng.integers(5))
        while number and not worker.feed.is_full:
            waiting = [p for p, end in self.ends().items() if reading[p] < end]
            if not waiting:
                return
            yield waiting[0] if rng is None else waiting[int(rng.integers(len(waiting)))]
            number -= 1

    def _content(self, partition: int, offset: int) -> tuple[bytes, Callable[[], None]]:
        def acknowledge() -> None:
            committed = self.kafka.committed
            committed[partition] = max(committed.get(partition, 0), offset + 1)

        return self.kafka.examples[partition][offset], acknowledge


def without_crash(scene: Scene) -> tuple[OnlineLearner, dict[int, str]]:
    """Apply the recorded updates to a new learner, without the worker; return it and the sha256 after each."""
    learner, done, catalog_until = scene.learner(), dict.fromkeys(range(PARTITIONS), 0), 0
    shas: dict[int, str] = {}
    for update in effective(scene.kafka.updates):
        changed = Catalog()
        for key, value in scene.kafka.catalog[catalog_until : update.catalog_until]:
            changed.apply(key, value)
        catalog_until = update.catalog_until
        if changed.elements:
            learner.apply_catalog(changed.elements, changed.products)
        values = [
            scene.kafka.examples[p][o] for p, until in sorted(update.until.items()) for o in range(done[p], until)
        ]
        learner.update(in_order(ExampleBatch.concat([decode_examples(value) for value in values])))
        done |= update.until
        shas[update.number] = sha256_of(learner)
    return learner, shas


def sha256_of(learner: OnlineLearner) -> str:
    snapshot = learner.snapshot(
        model_id="default",
        epoch=0,
        version=learner.num_updates,
        parent_sha256=None,
        trained_through={},
        due_ms_quantiles=[],
        created_at_ms=0,
        signing_key=b"k" * 32,
    )
    return snapshot.manifest.sha256


def state_of(learner: OnlineLearner) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return everything that a learner is, comparable bit for bit."""
    tensors, state = learner.state()
    return {name: tensor.cpu().numpy().tobytes() for name, tensor in tensors.items()}, state


class CrashAt:
    """A hook that ends the process when a point is reached for the n-th time."""

    def __init__(self, point: CrashPoint, visit: int) -> None:
        self.point, self.visits_left = point, visit

    def __call__(self, point: CrashPoint) -> None:
        if point is self.point:
            self.visits_left -= 1
            if self.visits_left == 0:
                raise Crashed(point)
