"""The worlds of the regret benchmark: what `genco.world` is told, how fast traffic is, and how late clicks come.

Time is event time. With `RATE` impressions a second, a batch of `BATCH` takes 20 seconds, and 200,000 impressions take
66 minutes. What moves in a world is timed in impressions, so every length of a run sees the same changes as far as it
goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from genco.world import World
from genco.world_config import WorldConfig

BATCH: Final = 1_000
"""Impressions between two updates of a policy."""
RATE: Final = 50.0
"""Impressions a second."""
IMPRESSIONS: Final = 200_000
"""Length of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchWorld:
    """A world, and how the labels of its clicks arrive."""

    config: WorldConfig
    label_wait_s: float | None = None
    """None: every label comes with the next update. A number: an impression is told so long after it, and clicks after
    that come as late positives."""
    attribution_window_s: float = 600.0
    """Clicks later than this are never told."""

    def __post_init__(self) -> None:
        if self.label_wait_s is not None and not 0 <= self.label_wait_s <= self.attribution_window_s:
            raise ValueError(
                f"label_wait_s is {self.label_wait_s}; must be in [0, attribution_window_s={self.attribution_window_s}]"
            )

    def make(self, seed: int) -> World:
        """Return the world of a seed."""
        return World(replace(self.config, seed=seed))


def _seconds(impressions: int) -> float:
    return impressions / RATE


def _config(**changes: object) -> WorldConfig:
    """Return 40 products with 4 slots x 8 candidates of 20 elements, changed as told; uniform play is clicked 3 %."""
    fields: dict[str, object] = {
        "num_products": 40,
        "elements_per_slot": 20,
        "candidates_per_slot": 8,
        "click_rate": 0.03,
    }
    return WorldConfig(**fields | changes)  # type: ignore[arg-type]


_INTERACTIONS: Final = _config()

WORLDS: Final[dict[str, BenchWorld]] = {
    # Best play gets some 3 times the clicks of uniform play; pairs of slots are .62 of the variance between creatives.
    "interactions": BenchWorld(config=_INTERACTIONS),
    # Half of the variance of tastes is new after every fifth of the run.
    "drift": BenchWorld(config=_config(drift_every_s=_seconds(40_000), drift_rate=0.5)),
    # One element of each slot is replaced every twentieth of the run: at the end all are other elements.
    "new-elements": BenchWorld(config=_config(new_elements_every_s=_seconds(10_000), new_elements=1)),
    # Half of the clicks come after the wait of three batches, 6 % after the window of thirty and are never known.
    "delays": BenchWorld(config=_config(delay_median_s=60.0, delay_sigma=1.5, delay_cap_s=3600.0), label_wait_s=60.0),
    # 216 creatives, so all is a matter of exploring well; fewer clicks and weaker effects, or it would be over at once.
    "single-product": BenchWorld(
        config=_config(
            num_products=1,
            slots=("title", "image", "tag"),
            elements_per_slot=6,
            candidates_per_slot=6,
            click_rate=0.02,
            content_sd=0.08,
            own_sd=0.06,
            pair_sd=0.12,
            context_element_sd=0.08,
        )
    ),
    # 50^8 creatives of each product, and 200 impressions of it in a run. Effects are weaker, or the best of so many
    # creatives would be clicked always.
    "big": BenchWorld(
        config=_config(
            num_products=1_000,
            slots=("title", "image", "highlight", "tag", "price", "badge", "background", "button"),
            elements_per_slot=100,
            candidates_per_slot=50,
            content_sd=0.08,
            own_sd=0.05,
            pair_sd=0.08,
            context_element_sd=0.06,
        )
    ),
    # Content as an embedding would be: 64 numbers, of which what acts is six hidden traits, not linearly.
    "rich-content": BenchWorld(config=_config(content_size=64, hidden_traits=6)),
}
