"""Keeps the right to learn: two learners of one model would mix their updates, so only the lease's holder goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import redis

from learner import worker_metrics as metrics
from learner.publisher import Publisher
from streams.clients import UnreachableError

logger = logging.getLogger(__name__)


class LeaseHeldError(RuntimeError):
    """Another learner of the same model is running, or ran while this one was paused."""


class LeaseKeeper:
    """Takes the lease, prolongs it, and tells when it was taken anew."""

    def __init__(self, publisher: Publisher, *, model_id: str, lease_ms: int, clock: Callable[[], float]) -> None:
        """Take what the lease is kept with.

        Args:
            publisher: Holds the lease.
            model_id: For messages.
            lease_ms: How long the lease lasts without being prolonged.
            clock: Seconds, only forward.
        """
        self._publisher = publisher
        self._model_id = model_id
        self._lease_s = lease_ms / 1000
        self._clock = clock
        # The lease of a learner that died runs out by itself.
        self._deadline = clock() + 2 * self._lease_s
        self._renewed_at = -self._lease_s
        self._epoch: int | None = None
        self._held = False
        self.is_alone = False
        """Whether this learner is the only one of its model, as far as is known."""
        self.is_new = False
        """Whether the lease was taken since the caller last set this to False."""

    def keep(self) -> bool:
        """Prolong the lease, or take it, when it is time; tell whether this learner is the only one of its model.

        While Redis does not answer, a learner that held the lease goes on: others cannot take it there either. A lease
        that a publication found gone, as Redis was emptied, is taken again at once.

        Raises:
            LeaseHeldError: If another learner holds it for longer than one that died could, or has held it since.
        """
        was_lost = self._held and not self._publisher.holds_lease
        if not was_lost and self._clock() - self._renewed_at < self._lease_s / 3:
            return self.is_alone
        self._renewed_at = self._clock()
        try:
            if not (self._publisher.holds_lease and self._publisher.renew()):
                self._acquire()
        except redis.RedisError as error:
            logger.warning("Redis does not answer; training goes on", extra={"error": str(error)})
        except UnreachableError as error:
            # Without its pin or freeze an empty registry must not be published to.
            logger.warning("Redis was emptied and Kafka does not answer", extra={"error": str(error)})
        self._held = self._publisher.holds_lease
        metrics.lease.set(self._held)
        return self.is_alone

    def _acquire(self) -> None:
        self.is_alone = self._publisher.acquire()
        if not self.is_alone:
            if self._epoch is not None or self._clock() > self._deadline:
                raise LeaseHeldError(
                    f"another learner of the model {self._model_id} is running; stop it first, "
                    "or learn another model with GENCO_MODEL_ID"
                )
            return
        epoch = self._publisher.fence.epoch
        if self._epoch is not None and epoch != self._epoch + 1:
            raise LeaseHeldError(
                f"another learner of the model {self._model_id} ran while this one was paused (epoch {self._epoch}, "
                f"now {epoch}); start again from the checkpoint"
            )
        self._epoch, self.is_new = epoch, True
        logger.info("this learner publishes now", extra={"epoch": epoch})
