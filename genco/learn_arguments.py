"""The options of `genco learn`, apart from what they need to run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_once(parser: argparse.ArgumentParser, positive: Callable[[str], float], whole: Callable[[str], int]) -> None:
    """Add the options of `genco learn --once`.

    Args:
        parser: Of the verb.
        positive: Reads a number above 0.
        whole: Reads a whole number.
    """
    once = parser.add_argument_group("from a log, without Kafka and Redis")
    once.add_argument(
        "--once", type=Path, metavar="LOG", help="learn this file or folder (.ndjson, .arrow or .parquet) and stop"
    )
    once.add_argument("--out", type=Path, metavar="DIR", help="folder for checkpoints, policy and manifest")
    once.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    once.add_argument("--max-updates", type=whole, metavar="N", help="stop after so many updates")
    once.add_argument(
        "--checkpoint-every", type=whole, default=100_000, metavar="N", help="after so many examples (%(default)s)"
    )
    once.add_argument(
        "--span", type=positive, default=1, metavar="S", help="an update takes whole spans of S seconds (%(default)s)"
    )
    once.add_argument(
        "--min-examples", type=whole, default=1_000, metavar="N", help="as many as hold N examples (%(default)s)"
    )
    once.add_argument(
        "--updates",
        type=Path,
        metavar="FILE",
        help="records of the topic updates, one a line: make the updates of the learner that wrote them (archive only)",
    )
    once.add_argument(
        "--catalog",
        type=Path,
        metavar="FILE",
        help="elements and products, one a line, for a log that lacks them; with --updates all records in their order",
    )
    once.add_argument("--window", type=positive, metavar="S", help="instead of GENCO_ATTRIBUTION_WINDOW_MS, in seconds")
    once.add_argument("--label-wait", type=positive, metavar="S", help="instead of GENCO_LABEL_WAIT_MS, in seconds")
    once.add_argument("--seed", type=whole, metavar="N", help="instead of GENCO_SEED")
    once.add_argument("--device", help="instead of GENCO_DEVICE")
    once.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
