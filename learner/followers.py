"""Several processes learn one model: the leader's calls, repeated by its followers.

Rank 0 leads: it alone reads Kafka, publishes and saves. Its learner tells the followers every call that changes it,
before it makes the call itself. They hold the same learner, so they come to the same sums in the same order
(`learner.workers`), and each takes its share of the core's Gram matrix. The rest, the traits and the generator every
process learns by itself, from the same examples and seeds: no time is saved there.

What is undone on the leader (`learner.guard`) is undone on the followers by the same calls: a new learner, the
checkpoint, the recorded updates. A process that dies ends all others with an error, for a sum without its share would
be wrong; `torchrun --max-restarts` starts all again, and the leader goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import msgspec
from pydantic import BaseModel
from torch import Tensor

from learner.checkpoint import pack, unpack
from learner.guard import UNLEARNABLE
from learner.online import LearnerSettings, OnlineLearner, UpdateReport
from learner.workers import ProcessGroup
from streams.contracts.catalog import Element, Product
from streams.contracts.examples import ExampleBatch, example_batch_of, example_record

logger = logging.getLogger(__name__)


class _Call(IntEnum):
    """What the leader tells, and in which form."""

    STOP = 0
    BEGIN = 1
    """A new learner: its settings as JSON."""
    CATALOG = 2
    """JSON of `_Changes`."""
    UPDATE = 3
    """A record as in the topic `examples`."""
    RESTORE = 4
    """The bytes of a checkpoint."""


class _Changes(BaseModel):
    """What `apply_catalog` takes; JSON keeps the order, which decides the rows of new names."""

    elements: dict[str, Element]
    products: dict[str, Product]


class LeadingLearner(OnlineLearner):
    """The learner of rank 0. Everything that changes it happens in the followers too.

    After a call that raised, a new one has to take its place: it may have changed some of the processes in part.
    """

    def __init__(self, settings: LearnerSettings, group: ProcessGroup) -> None:
        """Begin with nothing learned, in all processes.

        Raises:
            RuntimeError: Here as in all other calls: if a process is gone.
        """
        group.send(_Call.BEGIN, msgspec.json.encode(settings))
        super().__init__(settings, group.device, group)
        self._group = group

    def apply_catalog(self, elements: Mapping[str, Element], products: Mapping[str, Product]) -> None:
        """See `OnlineLearner`."""
        changes = _Changes(elements=dict(elements), products=dict(products))
        self._group.send(_Call.CATALOG, changes.model_dump_json().encode())
        super().apply_catalog(elements, products)

    def update(self, batch: ExampleBatch) -> UpdateReport:
        """See `OnlineLearner`."""
        self._group.send(_Call.UPDATE, example_record(batch.columns))
        return super().update(batch)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """See `OnlineLearner`."""
        self._group.send(_Call.RESTORE, pack(tensors, state))
        super().restore(tensors, state)


def learner_maker(settings: LearnerSettings, device: str, group: ProcessGroup | None) -> Callable[[], OnlineLearner]:
    """Return what makes the learner of this process: one of its own, or the leader's if there is a group."""
    if group is None:
        return lambda: OnlineLearner(settings, device)
    return lambda: LeadingLearner(settings, group)


def dismiss(group: ProcessGroup) -> None:
    """Tell the followers that it is over.

    Raises:
        RuntimeError: If one of them is gone.
    """
    group.send(_Call.STOP)
    group.leave()


def follow(group: ProcessGroup) -> OnlineLearner | None:
    """Repeat the leader's calls until it stops, and return the learner as it was then; None if there was none.

    Raises:
        RuntimeError: If another process is gone, or the leader went on after a call that failed here.
    """
    learner: OnlineLearner | None = None
    failure: Exception | None = None
    while True:
        kind, data = group.receive()
        call = _Call(kind)
        if call is _Call.STOP:
            group.leave()
            return learner
        if call is _Call.BEGIN:
            learner, failure = OnlineLearner(msgspec.json.decode(data, type=LearnerSettings), group.device, group), None
            continue
        if learner is None or failure is not None:
            raise RuntimeError(
                f"{call.name} came after a call that failed here and not on the leader, or before BEGIN; the processes "
                "hold different models: start them again"
            ) from failure
        repeat = _decoded(call, data)
        try:
            repeat(learner)
        except UNLEARNABLE as error:
            # The leader failed alike, says so, and begins anew.
            logger.info("a call failed; waiting for a new learner", extra={"call": call.name, "error": str(error)})
            failure = error


def _decoded(call: _Call, data: bytes) -> Callable[[OnlineLearner], object]:
    """Return the call that the leader made, to be made on another learner."""
    if call is _Call.CATALOG:
        changes = _Changes.model_validate_json(data)
        return lambda learner: learner.apply_catalog(changes.elements, changes.products)
    if call is _Call.UPDATE:
        batch = ExampleBatch(example_batch_of(data))
        return lambda learner: learner.update(batch)
    tensors, state = unpack(data)
    return lambda learner: learner.restore(tensors, state)
