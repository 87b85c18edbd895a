"""The same join with Quix Streams, for comparison, as its users would write it.

    python benchmarks/peers/quix_join.py join BROKER GROUP STATE_DIR IMPRESSIONS CLICKS TARGET WINDOW_MS
    python benchmarks/peers/quix_join.py pass BROKER GROUP STATE_DIR IMPRESSIONS TARGET

`join`: impressions and clicks, one event a record, keyed by decision id, with the event's time as the record's; a left
interval join in which a click counts for the impression of the same key when it comes within the window after it. JSON
in, JSON out. The library reads the two topics of a partition in the order of their times, so every impression comes out
once when it is read, without a click, and a second time together with its click.

What it does not do: it waits for no label (each impression is a negative first), checks no event, and never forgets a
key (state expires only when the same key comes again), so its RocksDB grows with every decision.

Settings in its favor: no changelog topics, so its state would be lost with the machine, and the largest commit interval
that keeps a restart within seconds. `pass` sends the impressions on as they are: the most that its loop can do.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quixstreams import Application


def with_click(impression: Mapping[str, Any], click: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a labeled impression."""
    if click is None:
        return {**impression, "label": 0, "reward": 0.0, "delay_ms": None}
    delay_ms = click["occurred_at_ms"] - impression["occurred_at_ms"]
    return {**impression, "label": 1, "reward": click["reward"], "delay_ms": delay_ms}


def create_app(broker: str, group: str, state_dir: str) -> Application:
    """Return an app on fresh state that begins at the start of its topics."""
    return Application(
        broker_address=broker,
        consumer_group=group,
        auto_offset_reset="earliest",
        state_dir=state_dir,
        commit_interval=5.0,
        use_changelog_topics=False,
        auto_create_topics=False,
        loglevel=logging.WARNING,
    )


def join(app: Application, impressions: str, clicks: str, target: str, window_ms: int) -> None:
    """Declare the join."""
    left = app.dataframe(app.topic(impressions, value_deserializer="json"))
    right = app.dataframe(app.topic(clicks, value_deserializer="json"))
    joined = left.join_interval(right, how="left", on_merge=with_click, grace_ms=window_ms, forward_ms=window_ms)
    joined.to_topic(app.topic(target, value_serializer="json"))


def pass_through(app: Application, impressions: str, target: str) -> None:
    """Declare a pipeline without a join."""
    app.dataframe(app.topic(impressions, value_deserializer="json")).to_topic(
        app.topic(target, value_serializer="json")
    )


def main(arguments: Sequence[str]) -> None:
    """Run one of the two until SIGTERM."""
    mode, broker, group, state_dir, *topics = arguments
    app = create_app(broker, group, state_dir)
    if mode == "join":
        impressions, clicks, target, window_ms = topics
        join(app, impressions, clicks, target, int(window_ms))
    else:
        pass_through(app, *topics)
    app.run()


if __name__ == "__main__":
    main(sys.argv[1:])
