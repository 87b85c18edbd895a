"""`genco bench regret`: its options and what it does with them.

Light to import, for every `genco` command builds its parser.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.regret.policies import ABLATIONS, ENTRIES, OURS, REGISTRY

if TYPE_CHECKING:
    from benchmarks.regret.pool import Results
    from benchmarks.regret.run import Run

MAX_SEEDS = 1_000


def add_parser(benches: Any) -> None:
    """Add the command to the parser of `genco bench`."""
    parser = benches.add_parser(
        "regret",
        help="how well we and others learn, over simulated worlds with paired seeds",
        description="Normalized regret (0 best play, 1 uniform play) of policies that learn while they play.",
    )
    parser.add_argument("--worlds", type=_names, metavar="A,B", help="default: all")
    parser.add_argument("--policies", type=_names, metavar="A,B", help="default: all that are installed")
    parser.add_argument(
        "--ablations", action="store_true", help="play ours without one of its parts each, for the peers"
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=range(6), metavar="0-5", help="of the worlds: 0-5 or 1,4,7 (0-5)"
    )
    parser.add_argument(
        "--repeats", type=_from(1), default=1, metavar="N", help="policy seeds a world seed (%(default)s)"
    )
    parser.add_argument(
        "--impressions", type=_from(1_000), metavar="N", help="length of a run (200000); whole thousands"
    )
    parser.add_argument("--workers", type=_from(1), default=os.cpu_count() or 1, metavar="N", help="processes (cores)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep results here; default: the user's cache folder")
    parser.add_argument("--fresh", action="store_true", help="run what is in the cache too")
    parser.add_argument("--obd", type=Path, metavar="DIR", help="replay this Open Bandit log instead of the worlds")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the regret over time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark.

    Raises:
        ValueError: If an option names what does not exist, or a file cannot be written.
    """
    from rich.console import Console

    from benchmarks.regret.cache import ResultCache, default_folder
    from benchmarks.regret.report import summarize, tables
    from benchmarks.regret.run import Run
    from benchmarks.regret.worlds import IMPRESSIONS, WORLDS
    from genco.folders import require_folder

    for path in (arguments.json, arguments.plot):
        require_folder(path)
    console = Console(stderr=True)
    worlds = _known("world", arguments.worlds or list(WORLDS), list(WORLDS))
    default = [OURS, *ABLATIONS] if arguments.ablations else list(REGISTRY)
    policies = _installed(_known("policy", arguments.policies or default, list(ENTRIES)), arguments, console)
    if arguments.obd:
        return _replay(arguments, [name for name in policies if ENTRIES[name].worlds is None], console)
    runs = [
        Run(
            world=world,
            policy=policy,
            seed=seed,
            repeat=repeat,
            impressions=arguments.impressions or IMPRESSIONS,
        )
        for seed in arguments.seeds
        for repeat in range(arguments.repeats)
        for world in worlds
        for policy in policies
        if world in (ENTRIES[policy].worlds or (world,))
    ]
    results = _execute(runs, ResultCache(arguments.cache or default_folder()), arguments, console)
    summary = summarize(results) | {
        "impressions": arguments.impressions or IMPRESSIONS,
        "seeds": list(arguments.seeds),
        "repeats": arguments.repeats,
    }
    for table in tables(summary):
        Console().print(table)
    _write(arguments.json, summary)
    if arguments.plot:
        from benchmarks.regret.plot import draw

        draw(results, arguments.plot)
    return 0


def _replay(arguments: argparse.Namespace, policies: list[str], console: Any) -> int:
    from rich.console import Console

    from benchmarks.regret.obd import replay
    from benchmarks.regret.report import replay_tables

    summary = replay(arguments.obd, policies, say=console.print)
    for table in replay_tables(summary):
        Console().print(table)
    _write(arguments.json, summary)
    return 0


def _write(path: Path | None, summary: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def _execute(runs: list[Run], cache: Any, arguments: argparse.Namespace, console: Any) -> Results:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from benchmarks.regret.pool import execute

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=None)

        def started(done: int, total: int) -> None:
            progress.update(task, total=total, completed=done)
            progress.console.print(f"{done} of {total} results are in {cache.folder}")

        def finished(label: str) -> None:
            progress.update(task, advance=1, description=label)

        return execute(
            runs, cache, workers=arguments.workers, fresh=arguments.fresh, started=started, finished=finished
        )


def _installed(policies: list[str], arguments: argparse.Namespace, console: Any) -> list[str]:
    """Return the policies whose libraries are there; one that was asked for by name must be."""
    missing = {p: [lib for lib in ENTRIES[p].needs if find_spec(lib) is None] for p in policies}
    for policy, libraries in missing.items():
        if libraries and arguments.policies:
            raise ValueError(
                f"policy {policy} needs {', '.join(libraries)}; install the extra: pip install -e '.[bench]'"
            )
        if libraries:
            console.print(f"without {policy}: {', '.join(libraries)} not installed (extra bench)")
    return [policy for policy in policies if not missing[policy]]


def _known(kind: str, names: list[str], known: list[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {kind} {name!r}; expected some of {', '.join(known)}")
    return names


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _seeds(text: str) -> list[int]:
    """Read seeds such as 0-5 or 1,4,7.

    Example:
        >>> _seeds("0-2,7")
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds; expected such as 0-5 or 1,4,7")
        first = int(match[1])
        seeds += range(first, int(match[2] or first) + 1)
    if not 1 <= len(set(seeds)) <= MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} names {len(set(seeds))} seeds; expected 1 to {MAX_SEEDS}")
    return list(dict.fromkeys(seeds))


def _from(least: int) -> Any:
    def whole(text: str) -> int:
        if not (text.isdecimal() and len(text) <= 9 and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return whole
