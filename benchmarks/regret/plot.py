"""Draws the regret of each policy over time, a panel for each world.

Shapes: B batches, W windows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from benchmarks.regret.policies import ENTRIES, OURS
from benchmarks.regret.pool import Results
from benchmarks.regret.worlds import BATCH

WINDOWS: Final = 20
"""Points of a curve; each is the regret of its part of the run."""
COLUMNS: Final = 2
LEGEND_COLUMNS: Final = 3
"""Names beside each other below a panel."""


def draw(results: Results, path: Path) -> None:
    """Write the picture; its kind follows from the name of the file."""
    picture(results).savefig(path, dpi=130)


def picture(results: Results) -> Figure:
    """Return the picture: a panel for each world, bands of one standard error over seeds."""
    worlds = list(dict.fromkeys(run.world for run in results.outcomes))
    rows = math.ceil(len(worlds) / COLUMNS)
    columns = min(COLUMNS, len(worlds))
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Line2D] = {}
    for panel, world in zip(panels, worlds, strict=False):
        names = [name for name in ENTRIES if any((r.world, r.policy) == (world, name) for r in results.outcomes)]
        for name in names:
            curve_RW, end_W = _curves(results, world, name)
            mean_W = curve_RW.mean(axis=0)
            color = _color(name)
            (handles[name],) = panel.plot(
                end_W, mean_W, color=color, linewidth=2.4 if name == OURS else 1.2, zorder=3 if name == OURS else 2
            )
            if len(curve_RW) > 1:
                se_W = curve_RW.std(axis=0, ddof=1) / math.sqrt(len(curve_RW))
                panel.fill_between(end_W, mean_W - se_W, mean_W + se_W, color=color, alpha=0.15, linewidth=0)
        panel.set_title(world)
        panel.set_ylim(0, 1.1)
        panel.set_xlim(0, None)
        panel.set_xlabel("impressions")
        panel.set_ylabel("regret (0 best, 1 uniform)")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    for panel in panels[len(worlds) :]:
        panel.set_visible(False)
    ordered = [name for name in ENTRIES if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(LEGEND_COLUMNS * columns, len(ordered)),
        frameon=False,
    )
    return figure


def _color(name: str) -> tuple[float, ...]:
    """Return the color of a policy, the same in every picture."""
    if name == OURS:
        return (0.0, 0.0, 0.0)
    peers = [peer for peer in ENTRIES if peer != OURS]
    color: tuple[float, ...] = mpl.colormaps["tab20"](2 * peers.index(name) % 20 + 2 * peers.index(name) // 20)
    return color


def _curves(results: Results, world: str, policy: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (seeds, W) regret in each window, mean over the repeats, and the (W,) impressions at their ends."""
    of_seed: dict[int, list[NDArray[np.float64]]] = {}
    ends = np.zeros(0, np.int64)
    for run, outcome in results.outcomes.items():
        if (run.world, run.policy) != (world, policy):
            continue
        reference = results.references[world, run.seed]
        parts = np.array_split(np.arange(len(outcome.obtained)), min(WINDOWS, len(outcome.obtained)))
        best, obtained, uniform = (
            np.array([np.asarray(values)[part].sum() for part in parts])
            for values in (reference.best, outcome.obtained, reference.uniform)
        )
        of_seed.setdefault(run.seed, []).append((best - obtained) / (best - uniform))
        ends = np.array([(part[-1] + 1) * BATCH for part in parts])
    return np.array([np.mean(curves, axis=0) for curves in of_seed.values()]), ends
