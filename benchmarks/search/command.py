"""`genco bench search`: its options and what it does with them.

Light to import, for every `genco` command builds its parser.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


def add_parser(benches: Any) -> None:
    """Add the command to the parser of `genco bench`."""
    parser = benches.add_parser(
        "search",
        help="what a search of creatives finds for its evaluations, with and without the generator",
        description="Reward against evaluations, on a model that learned from a world with large cards.",
    )
    parser.add_argument(
        "--sizes", type=_sizes, default=[(8, 50)], metavar="SxA,...", help="slots x candidates of a card (8x50)"
    )
    parser.add_argument("--impressions", type=_from(1_000), default=40_000, metavar="N", help="learned (%(default)s)")
    parser.add_argument("--requests", type=_from(2), default=24, metavar="N", help="asked of each kind (%(default)s)")
    parser.add_argument("--seed", type=_from(0), default=0, metavar="N", help="of the world (%(default)s)")
    parser.add_argument("--variant", default="autoregressive", metavar="NAME", help="of the generator (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark.

    Raises:
        ValueError: If a file cannot be written.
    """
    from benchmarks.search import curve
    from genco.folders import require_folder
    from learner.generator import GeneratorSettings

    for path in (arguments.json, arguments.plot):
        require_folder(path)
    results = [
        curve.run(
            slots,
            candidates,
            impressions=arguments.impressions,
            requests=arguments.requests,
            seed=arguments.seed,
            generator=GeneratorSettings(variant=arguments.variant),
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
        for slots, candidates in arguments.sizes
    ]
    print("\n\n".join(curve.table(result) for result in results))  # noqa: T201
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": results}, indent=2) + "\n", "utf-8")
    if arguments.plot:
        from benchmarks.search.plot import draw

        draw(results, arguments.plot)
    return 0


def _sizes(text: str) -> list[tuple[int, int]]:
    """Read sizes of cards.

    Example:
        >>> _sizes("8x50,12x100")
        [(8, 50), (12, 100)]
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,2})x(\d{1,3})", part.strip())
        if match is None or int(match[1]) < 2 or int(match[2]) < 2:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; expected such as 8x50,12x100, from 2x2")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def _from(least: int) -> Any:
    def whole(text: str) -> int:
        if not (text.isdecimal() and len(text) <= 9 and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return whole
