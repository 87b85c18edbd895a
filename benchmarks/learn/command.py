"""`genco bench learn`: its options and what it does with them. Light to import: every command builds its parser."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

PRODUCTS: Final = 30
OF_EACH: Final = ("impressions_per_second", "impressions_per_processor_second", "update_1000_ms", "microseconds")
"""Figures of ours that are told for each number of products."""
ONE_THREAD: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


def add_parser(benches: Any) -> None:
    """Add the command to the parser of `genco bench`."""
    parser = benches.add_parser(
        "learn",
        help="how fast examples are learned on one core, beside Vowpal Wabbit's slates",
        description="Impressions of 4 slots x 20 candidates, from records in memory to a snapshot.",
    )
    parser.add_argument("--impressions", type=_impressions, default=30_000, metavar="N", help="a run (%(default)s)")
    parser.add_argument(
        "--products", type=_products, default=(300, 3_000), metavar="N,N", help=f"after that of {PRODUCTS} (300,3000)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmark."""
    from rich.console import Console

    from genco.folders import require_folder

    require_folder(arguments.json)
    result = compare(arguments.impressions, arguments.products, say=Console(stderr=True).print)
    out = Console(markup=False, highlight=False, soft_wrap=True)
    for name, value in result.items():
        out.print(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {json.dumps(value)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def compare(impressions: int, products: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures.

    Args:
        impressions: Of each run of ours; slates take a tenth.
        products: Numbers of products of further runs.
        say: Told what happens.

    Raises:
        RuntimeError: If a run fails; with what it said last.
    """
    say(f"ours, {PRODUCTS} products, one thread")
    ours = _measured("ours", PRODUCTS, impressions)
    say("VW slates, the same impressions")
    slates = _measured("slates", PRODUCTS, impressions // 10)
    by_products = {str(PRODUCTS): ours}
    for count in products:
        say(f"ours, {count} products")
        by_products[str(count)] = _measured("ours", count, impressions)
    return {
        **ours,
        **{f"vw_slates_{name}": value for name, value in slates.items()},
        "by_products": {count: {name: each[name] for name in OF_EACH} for count, each in by_products.items()},
        "impressions": impressions,
    }


def _measured(module: str, num_products: int, impressions: int) -> dict[str, Any]:
    """Run a measurement in a process of its own: with one thread, and with memory that nobody else has used."""
    code = f"import json, benchmarks.learn.{module} as m; print(json.dumps(m.measure({num_products}, {impressions})))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} with {num_products} products failed; it said: {done.stderr.strip()[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _impressions(text: str) -> int:
    if not (text.isdecimal() and 2_000 <= int(text) <= 10_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2000 to 10000000")
    return int(text)


def _products(text: str) -> tuple[int, ...]:
    counts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and 1 <= int(part) <= 100_000 for part in counts):
        raise argparse.ArgumentTypeError(f"{text!r} are not whole numbers from 1 to 100000 with commas between them")
    return tuple(map(int, counts))
