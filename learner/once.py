"""Learn from a log that ends: the updates come one after the other, without Kafka, Redis or a clock.

The learner, its updates, the guard and the checkpoints are those of the live loop. A checkpoint holds how far each log
was learned, so a run that goes on from one gives, bit for bit, what a run without a stop gives: every update that is
asked for is a function of the log alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from learner.checkpoint import CheckpointError, CheckpointStore
from learner.crash_points import CrashPoint, Hook, go_on
from learner.gate import Validation
from learner.guard import UNLEARNABLE, Quarantine, require_finite
from learner.online import OnlineLearner
from learner.updates import in_order
from streams.contracts.catalog import Element, Product
from streams.contracts.examples import ExampleBatch
from streams.contracts.snapshot import PolicySnapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoggedUpdate:
    """One update of a log."""

    log: str
    """Which log it is of."""
    place: int
    """Where in the log; increases within it."""
    examples: ExampleBatch
    elements: Mapping[str, Element]
    products: Mapping[str, Product]
    """The catalog's changes before it."""


@dataclass(slots=True)
class OnceReport:
    """What came of a run."""

    updates: int = 0
    examples: int = 0
    """Of this run; those of the checkpoint it began with are not counted."""
    learned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Examples not learned, by reason."""
    resumed_at: int = 0
    """Number of the update after which it went on; 0: it began with nothing."""
    validation: Validation = field(default_factory=Validation)
    """Progressive validation over all examples of this run: each was predicted before it was learned."""

    def copy(self) -> OnceReport:
        """Return one that does not change with this."""
        return replace(self, skipped=Counter(self.skipped))


class LogLearner:
    """A learner with a directory for its checkpoints and, at the end, its policy."""

    def __init__(
        self,
        make_learner: Callable[[], OnlineLearner],
        directory: Path,
        *,
        checkpoint_every: int = 100_000,
        at: Hook = go_on,
    ) -> None:
        """Begin with nothing learned.

        Args:
            make_learner: Returns a learner that has learned nothing; called again when an update has to be undone.
            directory: Of checkpoints and quarantine.
            checkpoint_every: Examples between two checkpoints.
            at: Called at the crash points.
        """
        self._make_learner = make_learner
        self._checkpoints = CheckpointStore(directory, at=at)
        self._quarantine = Quarantine(directory)
        self._directory = directory
        self._every = checkpoint_every
        self._at = at
        self._left_out: set[tuple[str, int]] = set()
        self._begin()

    def _begin(self) -> None:
        self.learner = self._make_learner()
        self.number = 0
        """Updates so far, those left out included."""
        self.report = OnceReport()
        self._places: dict[str, int] = {}
        self._saved = OnceReport()

    @property
    def has_checkpoint(self) -> bool:
        """Whether the directory holds one, whole or not."""
        return not self._checkpoints.is_empty()

    def resume(self) -> None:
        """Become the learner of the newest checkpoint; without one, begin with nothing.

        Raises:
            CheckpointError: If there are some and all are damaged, or they are a live learner's.
        """
        self._begin()
        checkpoint = self._checkpoints.load_newest()
        if checkpoint is None:
            return
        state = checkpoint.state
        if "places" not in state:
            raise CheckpointError(
                f"the checkpoints in {self._directory} are of a live learner, which knows offsets of Kafka instead of "
                "places in a log; choose another directory"
            )
        self.learner.restore(checkpoint.tensors, state["learner"])
        self.number = self.report.resumed_at = self._saved.resumed_at = state["number"]
        self._places = dict(state["places"])

    def learn(
        self,
        updates: Callable[[], Iterable[LoggedUpdate]],
        *,
        max_updates: int | None = None,
        progress: Callable[[OnceReport], None] = lambda report: None,
    ) -> OnceReport:
        """Learn the updates that this learner has not learned yet, and save it.

        Args:
            updates: Begins the log anew; called again after an update had to be undone.
            max_updates: Stop after so many.
            progress: Called after every update.

        Raises:
            CheckpointError: See `resume`.
            OSError: If the disk refuses a checkpoint.
        """
        while True:
            try:
                for update in updates():
                    if max_updates is not None and self.report.updates >= max_updates:
                        break
                    if update.place > self._places.get(update.log, -1):
                        self._apply(update)
                        progress(self.report)
            except _SpoiledError:
                continue
            if self.report.updates > self._saved.updates:
                self._save()
            return self.report

    def _apply(self, update: LoggedUpdate) -> None:
        number, is_left_out = self.number + 1, (update.log, update.place) in self._left_out
        try:
            if update.elements or update.products:
                self.learner.apply_catalog(update.elements, update.products)
            if len(update.examples) and not is_left_out:
                self._learn(update.examples)
        except UNLEARNABLE as error:
            if is_left_out:
                raise  # it failed without its examples: not their fault
            where = {"log": update.log, "place": update.place, "examples": len(update.examples)}
            self._quarantine.add(number, where, error)
            self._left_out.add((update.log, update.place))
            # The model may have changed in part; so back to what is known to be good, and past this update.
            saved = self._saved
            self.resume()
            self.report, self._saved = saved.copy(), saved
            raise _SpoiledError from error
        self.number = number
        self._places[update.log] = update.place
        self.report.updates += 1
        self.report.examples += len(update.examples)
        if is_left_out:
            self.report.skipped["quarantined"] += len(update.examples)
        self._at(CrashPoint.UPDATE_LEARNED)
        if is_left_out or self.report.examples - self._saved.examples >= self._every:
            self._save()

    def _learn(self, examples: ExampleBatch) -> None:
        learned = self.learner.update(in_order(examples))
        require_finite(self.learner)
        report = self.report
        report.learned += learned.num_learned
        report.skipped.update(learned.skipped)
        if learned.num_learned:
            report.validation += self.learner.newest_validation

    def _save(self) -> None:
        tensors, state = self.learner.state()
        self._checkpoints.save(
            self.number, tensors, {"learner": state, "number": self.number, "places": dict(self._places)}
        )
        self._saved = self.report.copy()
        self._at(CrashPoint.CHECKPOINT_COMPLETE)

    def snapshot(self, *, model_id: str, created_at_ms: int, signing_key: bytes) -> PolicySnapshot:
        """Return the policy as it is now.

        Raises:
            SnapshotError: If it is too large to be read again.
        """
        return self.learner.snapshot(
            model_id=model_id,
            epoch=0,
            version=self.number,
            parent_sha256=None,
            trained_through={},
            due_ms_quantiles=[],
            created_at_ms=created_at_ms,
            signing_key=signing_key,
        )


class _SpoiledError(Exception):
    """An update was undone; begin again from the checkpoint."""
