"""Sums up runs: means and standard errors over seeds, and differences of ours to each peer on the same seeds.

The repeats of a seed are averaged first, for they share its world: the standard errors are over seeds. With one seed
there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.regret.policies import OURS
from benchmarks.regret.pool import Results
from benchmarks.regret.run import TAIL


def summarize(results: Results) -> dict[str, Any]:
    """Return the JSON of all results: `worlds.{world}.policies.{name}` and `worlds.{world}.paired.{peer}`."""
    worlds: dict[str, Any] = {}
    for world in dict.fromkeys(run.world for run in results.outcomes):
        names = dict.fromkeys(run.policy for run in results.outcomes if run.world == world)
        worlds[world] = {
            "best_click_rate": _click_rate(results, world, "best"),
            "uniform_click_rate": _click_rate(results, world, "uniform"),
            "policies": {name: _policy(results, world, name) for name in names},
            "paired": {peer: _paired(results, world, peer) for peer in names if peer != OURS and OURS in names},
        }
    return {"worlds": worlds}


def regrets(results: Results, world: str, policy: str, share: float = 1.0) -> dict[int, float]:
    """Return seed -> normalized regret over the last share of the run, mean over the repeats."""
    of_seed: dict[int, list[float]] = {}
    for run, outcome in results.outcomes.items():
        if (run.world, run.policy) == (world, policy):
            reference = results.references[world, run.seed]
            of_seed.setdefault(run.seed, []).append(outcome.regret(reference, share))
    return {seed: statistics.fmean(values) for seed, values in of_seed.items()}


def _policy(results: Results, world: str, name: str) -> dict[str, Any]:
    outcomes = [o for run, o in results.outcomes.items() if (run.world, run.policy) == (world, name)]
    return {
        "overall": mean_se(list(regrets(results, world, name).values())),
        "last_20pct": mean_se(list(regrets(results, world, name, TAIL).values())),
        "runs": len(outcomes),
        "decide_us": statistics.median(o.decide_us for o in outcomes),
        "update_ms": statistics.median(o.update_ms for o in outcomes),
        "memory_mb": max(o.memory_mb for o in outcomes),
    }


def _paired(results: Results, world: str, peer: str) -> dict[str, Any]:
    """Return the regret of ours minus the peer's, over the seeds that both have played."""
    out: dict[str, Any] = {}
    for share, name in ((1.0, ""), (TAIL, "_last_20pct")):
        ours, theirs = regrets(results, world, OURS, share), regrets(results, world, peer, share)
        difference = mean_se([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        out |= {f"difference{name}": difference["mean"], f"se{name}": difference["se"]}
    return out


def _click_rate(results: Results, world: str, column: str) -> float:
    sums = [getattr(reference, column) for (name, _), reference in results.references.items() if name == world]
    impressions = next(run.impressions for run in results.outcomes if run.world == world)
    return sum(map(sum, sums)) / (impressions * len(sums))


def mean_se(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard error; null where there is none.

    Example:
        >>> mean_se([1.0, 3.0])
        {'mean': 2.0, 'se': 1.0}
    """
    if not values:
        return {"mean": None, "se": None}
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": se}


def tables(summary: dict[str, Any]) -> list[Table]:
    """Return a table for each world, for a terminal of 80 columns."""
    out = []
    for world, entry in summary["worlds"].items():
        rates = f"click rate uniform {entry['uniform_click_rate']:.2%}, best {entry['best_click_rate']:.2%}"
        table = _table(f"{world}: {rates}", "policy", "regret", "last 20 %", "difference", "us", "ms", "MB")
        runs = sorted({policy["runs"] for policy in entry["policies"].values()})
        num_runs = "-".join(map(str, runs))
        table.caption = f"{num_runs} runs; difference: {OURS} minus it; us a decision, ms an update"
        ranked = sorted(entry["policies"].items(), key=lambda item: item[1]["overall"]["mean"])
        for name, policy in ranked:
            paired = entry["paired"].get(name)
            table.add_row(
                f"[bold]{name}[/]" if name == OURS else name,
                _number(policy["overall"]["mean"], policy["overall"]["se"]),
                _number(policy["last_20pct"]["mean"], policy["last_20pct"]["se"]),
                _number(paired["difference"], paired["se"], sign="+") if paired else "",
                f"{policy['decide_us']:.1f}",
                f"{policy['update_ms']:.1f}",
                f"{policy['memory_mb']:.0f}",
            )
        out.append(table)
    return out


def replay_tables(summary: dict[str, Any]) -> list[Table]:
    """Return a table for each replayed log, for the terminal."""
    out = []
    for log, entry in summary["obd"].items():
        title = f"{log}: {entry['clicks']} clicks of {entry['rows']:,} rows, {entry['click_rate']:.2%}"
        table = _table(title, "policy", "click rate, %", "effective rows")
        for name, value in entry["policies"].items():
            mean, se = (None if value[part] is None else 100 * value[part] for part in ("snips", "se"))
            table.add_row(name, _number(mean, se), f"{value['effective_size']:.0f}")
        out.append(table)
    return out


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    return table


def _number(mean: float | None, se: float | None, sign: str = "") -> str:
    """Return a figure without its leading zero.

    Example:
        >>> _number(-0.0781, 0.0142, sign="+")
        '-.078±.014'
    """
    if mean is None:
        return "-"
    parts = [f"{mean:{sign}.3f}", *([] if se is None else [f"{se:.3f}"])]
    return "±".join(part.replace("0.", ".", 1) if part.lstrip("+-").startswith("0.") else part for part in parts)
