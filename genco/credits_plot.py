"""Draws the credits of a card: a panel for each slot, a dot and an interval for each candidate, best on top.

What is known is told twice, by shape and by color, so that the picture reads in grey and to the color-blind: filled
triangles up (better) and down (worse), open circles (average, or not known yet). Colors of Okabe and Ito (2008).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from genco.credits_tables import WORDS
from serving.explanation import CardCredits, SlotCredits, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAWN: Final = 30
"""Candidates of a slot; of more, those at both ends are drawn."""
_COLUMNS: Final = 2
_NAME_LENGTH: Final = 28
_MARKS: Final[dict[Verdict, tuple[str, str, bool]]] = {
    "better": ("^", "#0072B2", True),
    "worse": ("v", "#D55E00", True),
    "average": ("o", "#333333", False),
    "unclear": ("o", "#999999", False),
    "unknown": ("x", "#999999", True),
}
"""Verdict -> shape, color, filled."""


def draw(found: CardCredits, path: Path) -> None:
    """Write the picture; its kind follows from the name of the file.

    Raises:
        ValueError: If the name has an ending that is no kind of picture.
        OSError: If the file cannot be written.
    """
    slots = found.explanation.slots
    columns = min(_COLUMNS, len(slots))
    rows = -(-len(slots) // columns)
    heights = [max(_num_drawn(slot) for slot in slots[r * columns : (r + 1) * columns]) for r in range(rows)]
    figure = Figure(figsize=(6.4 * columns, sum(0.28 * h + 0.9 for h in heights) + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=[h + 2 for h in heights]).flatten()
    for panel, slot in zip(panels, slots, strict=False):
        _panel(panel, slot)
    for panel in panels[len(slots) :]:
        panel.set_visible(False)
    explanation, snapshot = found.explanation, found.snapshot
    given = ", ".join(f"{name}={value}" for name, value in explanation.context.items()) or "everyone"
    figure.suptitle(
        f"Product {_plain(explanation.product_id)}, for {_plain(given)}: clicks against the slot's average candidate"
        f"\nmodel {_plain(snapshot.model_id)}, version {snapshot.epoch}.{snapshot.version}; bars are 90 % intervals",
        fontsize="medium",
    )
    used = {element.uplift.verdict for slot in slots for element in slot.elements}
    figure.legend(
        handles=[_handle(verdict) for verdict in _MARKS if verdict in used],
        loc="outside lower center",
        ncols=len(_MARKS),
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def _panel(panel: Axes, slot: SlotCredits) -> None:
    elements = slot.elements
    left_out = len(elements) - _num_drawn(slot)
    if left_out:
        elements = elements[: MOST_DRAWN // 2] + elements[-(MOST_DRAWN // 2) :]
    panel.axvline(0.0, color="#666666", linewidth=1)
    for place, element in enumerate(elements):
        uplift = element.uplift
        shape, color, filled = _MARKS[uplift.verdict]
        low, mid, high = (100 * value for value in (uplift.clicks_low, uplift.clicks, uplift.clicks_high))
        panel.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt", zorder=2)
        face = color if filled else "white"
        panel.plot([mid], [place], shape, color=color, markerfacecolor=face, markersize=7, zorder=3)
    panel.set_yticks(range(len(elements)), [f"{_plain(e.element_id)}  {e.share:.0%}" for e in elements])
    panel.set_ylim(len(elements) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:+g} %" if value else "0")
    panel.set_title(_plain(slot.slot) + (f" ({left_out} in the middle not drawn)" if left_out else ""), loc="left")
    panel.set_xlabel("change of the click rate; beside the names: how often it is shown now", fontsize="small")


def _num_drawn(slot: SlotCredits) -> int:
    return min(len(slot.elements), MOST_DRAWN)


def _handle(verdict: Verdict) -> Line2D:
    shape, color, filled = _MARKS[verdict]
    face = color if filled else "white"
    return Line2D([], [], marker=shape, color=color, markerfacecolor=face, linewidth=2, label=WORDS[verdict][0])


def _plain(text: str) -> str:
    """Return a name as the picture can show it: short, and without what would start a formula."""
    short = text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")
