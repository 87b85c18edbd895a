"""A plain Faust agent, for comparison: it reads each event of a topic and sends it on to another.

    python benchmarks/plain_faust.py BROKER GROUP SOURCE TARGET

What its users would write: one event a record, JSON values, `app.agent`, `await topic.send(value=...)`. No join, no
check of the events, no care about what a crash loses. Everything is as Faust sets it, but for the broker's address, and
what takes no part in the work: the web server, which would listen on every interface; the leader topic, which a broker
without topic administration cannot create; and debug lines, which its worker makes and does not write.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import faust


def create_app(broker: str, group: str, source: str, target: str) -> faust.App:
    """Return the app with its agent."""
    app = faust.App(
        group,
        broker=f"kafka://{broker}",
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
    )
    events = app.topic(source)
    forwarded = app.topic(target)

    @app.agent(events)
    async def forward(stream: Any) -> None:
        async for event in stream:
            await forwarded.send(value=event)

    return app


def main(arguments: Sequence[str]) -> None:
    """Run the agent until SIGTERM."""
    app = create_app(*arguments)
    logging.basicConfig(level="WARNING")
    faust.Worker(app, loglevel=None, override_logging=False, quiet=True).execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1:])
