"""`genco bench decide`: its options and what it does with them. Light to import: every command builds its parser."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.learn.command import ONE_THREAD

SIZES: Final = ((4, 20), (8, 50))
"""Slots x candidates: what everything is told for, and the large card."""
IMPRESSIONS: Final = 10_000
SNAPSHOTS: Final = 3
SINGLES: Final = 1_000
BATCHES: Final = 16
LIMITS: Final = {
    "single.p50_us": 500.0,
    "single.p99_us": 1_200.0,
    "batch64.per_decision_us": 100.0,
    "large_ratio": 5.0,
    "http.p99_ms": 5.0,
    "http.errors": 0.0,
    "swap.errors": 0.0,
    "swap.added_p99_ms": 1.0,
    "blackhole.errors": 0.0,
}
"""What is aimed at, at most."""


def add_parser(benches: Any) -> None:
    """Add the command to the parser of `genco bench`."""
    parser = benches.add_parser(
        "decide",
        help="how long a decision takes, in process and over HTTP, beside Vowpal Wabbit",
        description="Decisions for cards of 4 slots x 20 candidates, one by one, in batches, and from a server.",
    )
    parser.add_argument("--rounds", type=_from(1), default=5, metavar="N", help="in process (%(default)s)")
    parser.add_argument(
        "--seconds", type=_from(4), default=20, metavar="N", help="of each load over HTTP (%(default)s)"
    )
    parser.add_argument("--rate", type=_from(1), default=500, metavar="N", help="HTTP requests a second (%(default)s)")
    parser.add_argument("--no-http", action="store_true", help="leave the server out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmark."""
    from rich.console import Console

    from genco.folders import require_folder

    require_folder(arguments.json)
    seconds = None if arguments.no_http else float(arguments.seconds)
    result = compare(arguments.rounds, seconds, say=Console(stderr=True).print, rate=arguments.rate)
    Console().print(_table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def compare(
    rounds: int,
    seconds: float | None,
    say: Callable[[str], None],
    *,
    rate: float = 500.0,
    sizes: Sequence[tuple[int, int]] = SIZES,
    impressions: int = IMPRESSIONS,
    singles: int = SINGLES,
    batches: int = BATCHES,
) -> dict[str, Any]:
    """Return all figures.

    Args:
        rounds: Of the measurement in process.
        seconds: Of each load over HTTP; None: no server.
        say: Told what happens.
        rate: Requests a second of each load.
        sizes: Slots and candidates of the card and of the large one.
        impressions: That the learner learns of each size.
        singles: Decisions one by one of a round.
        batches: Batches of 64 of a round.

    Raises:
        RuntimeError: If a part fails; with what it said last.
    """
    with tempfile.TemporaryDirectory(prefix="genco-") as name:
        folder = Path(name)
        for size in sizes:
            say(f"a learner for {size[0]} slots x {size[1]} candidates, {impressions} impressions")
            _apart("scene", f"train(Path({name!r}), m.Scene(*{size}), {impressions}, {SNAPSHOTS})")
        say(f"{rounds} rounds in process, one thread, and Vowpal Wabbit")
        options = f"rounds={rounds}, singles={singles}, batches={batches}"
        found = _apart("in_process", f"measure(Path({name!r}), {list(sizes)!r}, {options})")
        result = _named(found)
        if seconds is not None:
            from benchmarks.decide import served

            say(f"a server under {rate:.0f} requests a second: plain, with swaps, with silent Redis and Kafka")
            result |= served.measure(folder, sizes[0], SNAPSHOTS, seconds, rate)
    # Over the last five minutes, ours included: much more than there are cores says that the machine was too busy.
    return result | {"threads": 1, "rounds": rounds, "impressions": impressions, "load_average": os.getloadavg()[1]}


def _named(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures in process as the report has them."""
    card, large = found["sizes"]
    ratio = {name: large[name] / card[name] for name in ("single.p50_us", "batch64.per_decision_us")}
    return {
        **_nested(card),
        "large": _nested(large),
        "large_ratio": ratio["single.p50_us"],
        "large_batch64_ratio": ratio["batch64.per_decision_us"],
        "vw": found["vw"],
        "garbage_collector": found["garbage_collector"],
    }


def _nested(flat: dict[str, float]) -> dict[str, Any]:
    """Return a mapping of mappings.

    Example:
        >>> _nested({"single.p50_us": 1.0, "single.cold.p50_us": 2.0})
        {'single': {'p50_us': 1.0, 'cold': {'p50_us': 2.0}}}
    """
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        place = out
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return out


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a mapping with dotted names: the inverse of `_nested`."""
    out: dict[str, Any] = {}
    for name, value in nested.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _table(result: dict[str, Any]) -> Any:
    """Return every figure, with what is aimed at where that is said."""
    from rich.table import Table

    table = Table("figure", "measured", "aimed at, at most")
    for name, value in _flat(result).items():
        told = f"{value:,.2f}" if isinstance(value, float) else str(value)
        table.add_row(name, told, f"{LIMITS[name]:,.0f}" if name in LIMITS else "")
    return table


def _apart(module: str, call: str) -> Any:
    """Call a function of a module of this package in a process of its own, with one thread."""
    code = f"import json; from pathlib import Path; import benchmarks.decide.{module} as m; print(json.dumps(m.{call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed; it said: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _from(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= 10_000):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 10000")
        return int(text)

    return whole
