"""The learner's own thread: it takes records of `examples`, updates the model, publishes, and checkpoints.

The order that makes a crash harmless: record the update in the topic `updates`, apply it, publish, checkpoint, and only
then let Kafka's offsets be committed. On start the newest checkpoint is loaded, the updates recorded after it are
repeated, and the records before its offsets are skipped. So nothing is learned twice and nothing is lost. The same way
back is taken when an update cannot be learned: the model becomes that of the checkpoint, the updates after it are
repeated, and the one that failed is left out.

Torch runs here, away from the event loop that keeps the consumer group alive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis

from learner import worker_metrics as metrics
from learner.catalog_log import CatalogLog
from learner.checkpoint import CheckpointError, CheckpointStore
from learner.crash_points import CrashPoint, Hook, go_on
from learner.feed import Feed
from learner.guard import UNLEARNABLE, Quarantine, require_finite
from learner.lease import LeaseKeeper
from learner.online import OnlineLearner, UpdateReport
from learner.publisher import Fence, Outcome, Publisher
from learner.update_log import UpdateLog
from learner.updates import Update, concat, in_order
from streams.clients import kafka_consumer, redis_client, require_redis
from streams.contracts.examples import ExampleBatch, LabelKind
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import PolicySnapshot, SnapshotError
from streams.control_log import ControlLog
from streams.telemetry import now_ms

MAX_UNPUBLISHED = 600
"""Updates whose due times are kept while nothing is published."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connections:
    """What the learner writes to and reads from, besides the records of `examples`."""

    updates: UpdateLog
    catalog: CatalogLog
    publisher: Publisher

    @classmethod
    def open(cls, settings: LearnSettings) -> Connections:
        """Connect to Kafka and Redis.

        Raises:
            ConfigurationError: If a topic is missing, or Redis refuses the password or evicts.
            UnreachableError: If Kafka or Redis does not answer.
        """
        client = redis_client(settings, timeout_s=2.0, retries=1)
        require_redis(client)
        return cls(
            updates=UpdateLog(settings),
            catalog=CatalogLog(kafka_consumer(settings)),
            publisher=Publisher(client, settings.model_id, settings.lease_ms, Fence(), control=ControlLog(settings)),
        )

    def close(self) -> None:
        """Close the connections to Kafka."""
        self.updates.close()
        self.catalog.close()


class Worker:
    """Runs the learner in a thread. The records of `examples` come through `feed`."""

    def __init__(
        self,
        settings: LearnSettings,
        make_learner: Callable[[], OnlineLearner],
        connections: Connections,
        *,
        at: Hook = go_on,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the newest checkpoint; nothing runs yet.

        Args:
            settings: Those of the process.
            make_learner: Returns a learner that has learned nothing; called again when an update has to be undone.
            connections: See there; `stop` closes them.
            at: Called at every crash point.
            clock: Seconds, only forward.

        Raises:
            CheckpointError: If there are checkpoints and none can be read.
        """
        self._settings = settings
        self._make_learner = make_learner
        self._connections = connections
        self._updates, self._catalog = connections.updates, connections.catalog
        self._publisher = connections.publisher
        self._at = at
        self._clock = clock
        self._checkpoints = CheckpointStore(settings.checkpoint_dir, at=at)
        self._quarantine = Quarantine(settings.checkpoint_dir)
        # Enough for the next update to be complete while one is learned.
        self.feed = Feed(2 * settings.update_max_examples, clock)
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self._left_out: set[int] = set()
        self._planned: deque[Update] = deque()
        self._learned_until: dict[int, int] = {}
        self._parent_sha256: str | None = None
        self._outcome: Outcome | None = None
        self._num_jittered = 0
        self._was_frozen = False
        # Of the examples since the last publication; of the newest updates, should there be none for long.
        self._due_ms: deque[np.ndarray[Any, np.dtype[np.int64]]] = deque(maxlen=MAX_UNPUBLISHED)
        self._lease = LeaseKeeper(self._publisher, model_id=settings.model_id, lease_ms=settings.lease_ms, clock=clock)
        self._updated_at = self._checkpointed_at = clock()
        self._resume()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Take a last checkpoint, give the lease back and end the thread; tell whether it has ended in order."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._connections.close()
        return self.failure is None and not self._thread.is_alive()

    def acknowledge(self) -> None:
        """Acknowledge what a checkpoint holds; called on the event loop."""
        while self.feed.acknowledgements:
            self.feed.acknowledgements.popleft()()
            self._at(CrashPoint.OFFSETS_ACKNOWLEDGED)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.turn()
            self._checkpoint()
            if self._publisher.holds_lease:
                self._publisher.release()
        except BaseException as error:
            logger.exception("the learner's thread failed")
            self.failure = error

    def turn(self) -> None:
        """Take in what has come, make the update that is due, and the checkpoint that is due."""
        self.feed.receive(0.02)
        metrics.paused.set(self.feed.is_full)
        if self._lease.keep():
            if self._lease.is_new:
                self._lease.is_new = False
                self._plan()
            if (update := self._next_update()) is not None:
                self._apply(update)
        if self._clock() - self._checkpointed_at >= self._settings.checkpoint_interval_ms / 1000:
            self._checkpoint()

    # -- updating --------------------------------------------------------------------------------------------------

    def _next_update(self) -> Update | None:
        """Return the update that is due, or None: a recorded one first."""
        backlog, settings = self.feed.backlog, self._settings
        if self._planned:
            return self._planned[0] if backlog.holds(self._planned[0].until) else None
        waited = self._clock() - self._updated_at >= settings.update_interval_ms / 1000
        if not (waited or backlog.num_examples >= settings.update_max_examples):
            return None
        until = backlog.bounds(settings.update_max_examples)
        if not until or self._waits_for_operator():
            return None
        return Update(
            number=self._number + 1,
            until=until,
            catalog_until=self._catalog.poll(),
            epoch=self._publisher.fence.epoch,
            num_examples=backlog.count(until),
        )

    def _waits_for_operator(self) -> bool:
        """Tell whether learning is frozen; asked as often as an update is due. What is recorded is repeated anyway."""
        is_frozen = self._publisher.learning_is_frozen()
        metrics.frozen.set(is_frozen)
        if is_frozen:
            self._updated_at = self._clock()  # asks again when the next one is due
        if is_frozen is not self._was_frozen:
            self._was_frozen = is_frozen
            state = "waits: learning is frozen, until genco policy unfreeze-learning" if is_frozen else "goes on"
            logger.warning(f"the learner {state}", extra={"update": self._number})
        return is_frozen

    def _apply(self, update: Update) -> None:
        if self._planned:
            self._planned.popleft()
        else:
            self._at(CrashPoint.UPDATE_PLANNED)
            self._updates_until = self._updates.append(update)
            self._at(CrashPoint.UPDATE_RECORDED)
        started = self._updated_at = self._clock()
        batch = concat(self.feed.backlog.take(update.until))
        self._tell_progress(update, 0 if batch is None else len(batch))
        if update.number in self._left_out:
            batch = None
        try:
            report = self._learn(update, batch)
        except UNLEARNABLE as error:
            self._leave_out(update, error)
            return
        self._number, self._epoch = update.number, update.epoch
        self._learned_until |= update.until
        self.feed.learned(update.until)
        self._at(CrashPoint.UPDATE_LEARNED)
        if update.number in self._left_out:
            # So that the next one that fails leads back to here and not further.
            self._checkpoint()
        if batch is None or report is None:
            return
        self._observe(report, batch)
        self._publish()
        metrics.step.observe(self._clock() - started)

    def _learn(self, update: Update, batch: ExampleBatch | None) -> UpdateReport | None:
        changed = self._catalog.take(update.catalog_until)
        if changed.elements or changed.products:
            self._learner.apply_catalog(changed.elements, changed.products)
        if batch is None:
            return None
        report = self._learner.update(in_order(batch))
        require_finite(self._learner)
        return report

    def _leave_out(self, update: Update, error: Exception) -> None:
        """Undo an update that failed, by going back to the checkpoint, and mark it to be passed over."""
        if update.number in self._left_out:
            raise error  # it failed without its examples: not their fault
        metrics.quarantined.inc()
        metrics.skipped.labels("quarantined").inc(update.num_examples or 0)
        where = {
            "from": {str(partition): self._learned_until.get(partition, 0) for partition in sorted(update.until)},
            "until": {str(partition): offset for partition, offset in sorted(update.until.items())},
            "examples": update.num_examples,
        }
        self._quarantine.add(update.number, where, error)
        self._left_out.add(update.number)
        self._resume()
        self._plan()
        self.feed.ask_again()

    def _tell_progress(self, update: Update, num_examples: int) -> None:
        metrics.to_repeat.set(len(self._planned))
        metrics.update_examples.observe(num_examples)
        self.feed.needs = self._planned[0].until if self._planned else None
        if update.num_examples not in (None, num_examples):
            logger.error(
                "a recorded update is repeated with other examples than it had; the model will differ from that time's",
                extra={"update": update.number, "examples": num_examples, "expected": update.num_examples},
            )

    def _observe(self, report: UpdateReport, batch: ExampleBatch) -> None:
        metrics.trained.inc(report.num_learned)
        for reason, count in report.skipped.items():
            metrics.skipped.labels(reason).inc(count)
        for name, gauge in metrics.validated.items():
            if (value := report.metrics.get(name)) is not None:
                gauge.set(value)
        first = ~batch.has_kind(LabelKind.LATE_POSITIVE)
        due_ms = batch.occurred_at_ms[first] + self._settings.label_wait_ms
        self._due_ms.append(due_ms)
        if len(due_ms):
            metrics.delay.set((now_ms() - int(due_ms.max())) / 1000)
        num_jittered = int(report.metrics["num_jittered"])
        metrics.jittered.inc(max(0, num_jittered - self._num_jittered))
        self._num_jittered = num_jittered

    # -- publishing ------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        try:
            snapshot = self._snapshot()
        except SnapshotError as error:
            metrics.published.labels("unusable").inc()
            logger.error("no snapshot could be made", extra={"version": self._number, "error": str(error)})
            return
        verdict = snapshot.manifest.gate
        if not verdict.accepted:
            metrics.published.labels("refused").inc()
            logger.warning("the gate refused a snapshot", extra={"version": self._number, "reasons": verdict.reasons})
        if not self._publisher.holds_lease:
            metrics.published.labels("no_lease").inc()
            return
        try:
            self._publisher.show(snapshot.manifest)
            self._at(CrashPoint.SNAPSHOT_SHOWN)
            if not verdict.accepted:
                return
            outcome = self._publisher.publish(snapshot)
            self._at(CrashPoint.SNAPSHOT_PUBLISHED)
        except redis.RedisError as error:
            metrics.published.labels("redis_error").inc()
            logger.warning("publication failed, the next one follows", extra={"error": str(error)})
            return
        self._note(outcome)
        if outcome is Outcome.PUBLISHED:
            self._parent_sha256 = snapshot.manifest.sha256
        if outcome.is_stored:
            # A hold may last for days: how long it lasted says nothing about the loop, and would fill the memory.
            self._due_ms.clear()

    def _note(self, outcome: Outcome) -> None:
        """Count what became of a publication, and say it when it is not what it was: a hold may last for days."""
        metrics.published.labels(outcome.value).inc()
        for hold in (Outcome.PINNED, Outcome.FROZEN):
            metrics.held.labels(hold.value).set(outcome is hold)
        if outcome is self._outcome:
            return
        before, self._outcome = self._outcome, outcome
        if outcome is Outcome.PUBLISHED:
            if before is not None:
                logger.info("snapshots are served again", extra={"version": self._number, "before": before.value})
        elif outcome.is_stored:
            logger.warning(
                "snapshots are stored and not served; learning goes on",
                extra={"version": self._number, "outcome": outcome.value},
            )
        else:
            logger.warning("snapshot not published", extra={"version": self._number, "outcome": outcome.value})

    def _snapshot(self) -> PolicySnapshot:
        due_ms = np.concatenate(self._due_ms) if self._due_ms else np.empty(0, np.int64)
        return self._learner.snapshot(
            model_id=self._settings.model_id,
            epoch=self._publisher.fence.epoch,
            version=self._number,
            parent_sha256=self._parent_sha256,
            trained_through={str(partition): offset for partition, offset in sorted(self._learned_until.items())},
            due_ms_quantiles=[float(q) for q in np.quantile(due_ms, np.linspace(0, 1, 11))] if len(due_ms) else [],
            created_at_ms=now_ms(),
            signing_key=self._settings.signing_key_bytes(),
        )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Save everything, if an update was made since, and release the offsets of what is saved."""
        started = self._checkpointed_at = self._clock()
        if self._number > self._saved:
            try:
                self._save()
            except OSError as error:
                metrics.checkpoint_failures.inc()
                logger.error("checkpoint failed; learning goes on without", extra={"error": str(error)})
                return
            metrics.checkpointed.set_to_current_time()
            metrics.checkpoint_pause.observe(self._clock() - started)
        self.feed.release(self._learned_until)
        self._at(CrashPoint.OFFSETS_RELEASED)

    def _save(self) -> None:
        tensors, state = self._learner.state()
        fence = self._publisher.fence
        self._checkpoints.save(
            self._number,
            tensors,
            {
                "learner": state,
                "number": self._number,
                "learned_until": {str(partition): offset for partition, offset in self._learned_until.items()},
                # Those still to be repeated must be found again.
                "updates_until": self._plan_from if self._planned else self._updates_until,
                "updates_epoch": self._epoch,
                "catalog_until": self._catalog.taken_until,
                "parent_sha256": self._parent_sha256,
                "epoch": fence.epoch,
                "revision": fence.revision,
            },
        )
        self._saved = self._number
        self._at(CrashPoint.CHECKPOINT_COMPLETE)

    def _resume(self) -> None:
        """Become the learner of the newest checkpoint."""
        self._learner = self._make_learner()
        self._planned.clear()
        self._number = self._epoch = self._updates_until = self._plan_from = self._num_jittered = catalog_until = 0
        self._learned_until, self._parent_sha256 = {}, None
        checkpoint = self._checkpoints.load_newest()
        if checkpoint is not None:
            state = checkpoint.state
            if "learned_until" not in state:
                raise CheckpointError(
                    f"the checkpoints in {self._settings.checkpoint_dir} are of genco learn --once, which knows no "
                    "offsets of Kafka; give this learner a directory of its own (GENCO_CHECKPOINT_DIR)"
                )
            self._learner.restore(checkpoint.tensors, state["learner"])
            self._number, self._epoch = state["number"], state.get("updates_epoch", 0)
            self._learned_until = {int(partition): offset for partition, offset in state["learned_until"].items()}
            self._updates_until, catalog_until = state["updates_until"], state["catalog_until"]
            self._parent_sha256 = state["parent_sha256"]
            self._num_jittered = self._learner.reward_model.num_jittered
            fence = self._publisher.fence
            fence.epoch = max(fence.epoch, state["epoch"])
            fence.revision = max(fence.revision, state["revision"])
        self._saved = self._number
        self._catalog.go_to(catalog_until)
        self.feed.restart(self._learned_until)
        logger.info("learner starts", extra={"update": self._number, "learned_until": self._learned_until})

    def _plan(self) -> None:
        """Read which updates are to be repeated: those recorded after the last one that this learner knows."""
        number, epoch = self._number, self._epoch
        if self._planned:
            number, epoch = self._planned[-1].number, self._planned[-1].epoch
        else:
            self._plan_from = self._updates_until
        recorded, self._updates_until = self._updates.since(self._updates_until, epoch)
        self._planned.extend(update for update in recorded if update.number > number)
        self.feed.needs = self._planned[0].until if self._planned else None
        metrics.to_repeat.set(len(self._planned))
        logger.info("updates to repeat", extra={"count": len(self._planned)})
