"""Draws what searches miss against their evaluations, a panel for each kind of request, a row for each size of card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.search.methods import FULL
from benchmarks.search.scene import KINDS

LEAST: Final = 1e-4
"""What a logarithmic scale shows of a search that misses nothing."""


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture of some results of `curve.run`."""
    mpl.use("Agg")
    figure = Figure(figsize=(4.2 * len(KINDS), 3.8 * len(results) + 0.9), layout="constrained")
    panels = figure.subplots(len(results), len(KINDS), squeeze=False, sharey="row", sharex="row")
    for row, result in zip(panels, results, strict=True):
        for panel, kind in zip(row, KINDS, strict=True):
            families = result["kinds"][kind]
            for number, (family, settings) in enumerate(families.items()):
                points = sorted((v["evaluations"], max(1.0 - v["reward"], LEAST)) for v in settings.values())
                style = "-o" if "propos" in family else "--s"
                panel.plot(*zip(*points, strict=True), style, color=f"C{number}", markersize=4, label=family)
            full = families[FULL[0]][FULL[1]]
            panel.axhline(max(1.0 - full["reward"], LEAST), color="gray", linewidth=0.8)
            panel.axvline(full["evaluations"] / 10, color="gray", linewidth=0.8, linestyle=":")
            panel.set(xscale="log", yscale="log", title=f"{result['slots']} x {result['candidates']}, {kind}")
            panel.grid(alpha=0.3)
        row[0].set_ylabel("reward missed, of what can be won")
    for panel in panels[-1]:
        panel.set_xlabel("scores of an element, for each draw")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("gray: 16 random starts (line), and a tenth of its evaluations (dots)", fontsize=10)
    figure.savefig(path, dpi=90)
