"""`genco learn`: the Faust agent that feeds the learner's thread.

The agent reads `examples` and hands each record on; offsets are acknowledged when the thread has them in a checkpoint.
Under `torchrun` rank 0 does so, and the other processes follow it (`learner.followers`).
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import faust
import torch

from learner.crash_points import Hook, go_on
from learner.feed import Feed, InboxRecord, Rebalanced, RecordsLost
from learner.followers import dismiss, follow, learner_maker
from learner.online import LearnerSettings
from learner.worker import Connections, Worker
from learner.workers import ProcessGroup, join_group, own_device
from streams.app import create_app, run_worker
from streams.clients import check_topics
from streams.contracts.settings import ConfigurationError, LearnSettings
from streams.contracts.topics import EXAMPLES
from streams.telemetry import MetricsServer

logger = logging.getLogger(__name__)


def create_learner_app(settings: LearnSettings, worker: Worker) -> faust.App:
    """Return the app with its agent; `run_worker` runs it."""
    app = create_app(settings, settings.learner_group)
    topic = app.topic(EXAMPLES, key_serializer="raw", value_serializer="raw", allow_empty=True)

    @app.agent(topic, concurrency=1)
    async def learn(stream: Any) -> None:
        async for event in stream.noack().events():
            while worker.feed.is_full:  # noqa: ASYNC110 - a flag of another thread
                await asyncio.sleep(0.02)
            message = event.message
            worker.feed.put(InboxRecord(message.partition, message.offset, event.value or b"", event.ack))

    @app.on_partitions_revoked.connect
    async def on_revoked(*_args: Any, signal: Any = None, **_: Any) -> None:
        worker.feed.acknowledgements.clear()
        worker.feed.put(Rebalanced())

    @app.task  # type: ignore[untyped-decorator]  # faust leaves it untyped
    async def serve_worker() -> None:
        while not app.should_stop:
            if worker.failure is not None:
                raise RuntimeError("the learner's thread failed") from worker.failure
            worker.acknowledge()
            while worker.feed.seeks:
                await _seek(app, worker.feed)
            await asyncio.sleep(0.1)

    return app


async def _seek(app: faust.App, feed: Feed) -> None:
    request = feed.seeks.popleft()
    place = faust.types.TP(EXAMPLES, request.partition)
    earliest = (await app.consumer.earliest_offsets(place))[place]
    if earliest > request.offset:
        feed.put(RecordsLost(request.partition, earliest))
    target = max(earliest, request.offset)
    logger.info("reading again from the checkpoint", extra={"partition": request.partition, "offset": target})
    await app.consumer.seek(place, target)


def _check_device(device: str) -> None:
    """Put a number on the device.

    Raises:
        ConfigurationError: If torch cannot.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigurationError(f"GENCO_DEVICE is {device!r}, which does not work here ({cause}); try cpu") from None


def _follow(group: ProcessGroup) -> None:
    """Follow the leader to its end: SIGTERM and Ctrl-C reach every process, and it still needs this one's sums."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    logger.info("follows the leader", extra={"rank": group.rank, "size": group.size, "device": group.device})
    follow(group)


def run(settings: LearnSettings, *, at: Hook = go_on) -> None:
    """Run the learner until SIGTERM. Does not return, except as a follower, when the leader has stopped.

    Args:
        settings: Those of the process.
        at: Called at every crash point.

    Raises:
        ConfigurationError: If a topic is missing, their partition counts differ, or there is no such device.
        CheckpointError: If there are checkpoints and none can be read.
        OSError: If the metrics port is taken.
        RuntimeError: If another process is gone, as a follower.
    """
    device = own_device(settings.device)
    _check_device(device)
    group = join_group(device)
    if group is not None and group.rank > 0:
        _follow(group)
        return
    check_topics(settings)
    metrics = MetricsServer(settings.metrics_host, settings.metrics_port) if settings.metrics_port else None
    make_learner = learner_maker(LearnerSettings.from_settings(settings), device, group)
    worker = Worker(settings, make_learner, Connections.open(settings), at=at)
    worker.start()
    try:
        run_worker(create_learner_app(settings, worker))
    finally:
        if worker.stop() and group is not None:
            dismiss(group)
        if metrics is not None:
            metrics.close()
