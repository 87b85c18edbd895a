"""How large a simulated world is, how strong its effects are, and how it changes."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """Size, strengths and dynamics of a world; strengths are standard deviations in logits of a random card."""

    seed: int = 0
    num_products: int = 30
    slots: tuple[str, ...] = ("title", "image", "highlight", "tag")
    elements_per_slot: int = 12
    """Elements alive in a slot, over all products."""
    candidates_per_slot: int = 6
    """Elements of a slot that one product may use; each product has a subset of its own."""
    content_size: int = 6
    """Content features of an element."""
    hidden_traits: int | None = None
    """None: an element acts through its content features. A number: through so many hidden traits, non-linearly,
    and the content features are a noisy linear mixture of them."""
    click_rate: float = 0.04
    """Click rate of uniform play at time 0, over all products and contexts."""

    product_sd: float = 0.8
    """Appeal of the products."""
    context_sd: float = 0.3
    """Device and segment on the appeal, half of its variance particular to the product."""
    hour_sd: float = 0.2
    """The hour of the day on the appeal."""
    content_sd: float = 0.16
    """Main effects of the elements that content explains."""
    own_sd: float = 0.1
    """Main effects of the elements that no content explains."""
    pair_sd: float = 0.3
    """Interactions of pairs of slots, bilinear in the traits of their elements."""
    context_element_sd: float = 0.14
    """Device and segment with the traits of the elements."""
    trait_deviation: float = 0.5
    """How far an element's traits are from its content, in standard deviations of a content feature."""

    delay_median_s: float = 2.0
    delay_sigma: float = 0.8
    """Standard deviation of the delay's logarithm."""
    delay_cap_s: float = 20.0
    """No click comes later than this."""

    drift_every_s: float | None = None
    """Tastes (the effects of content, pairs and contexts, not the traits) move every so many seconds; None: never."""
    drift_rate: float = 0.3
    """Share of the variance of the tastes that is new after a move; 1 forgets all."""
    new_elements_every_s: float | None = None
    """Every so many seconds new elements replace the oldest ones wherever those were candidates; None: never."""
    new_elements: int = 1
    """How many elements of each slot are replaced at a time."""

    def __post_init__(self) -> None:
        counts = ("num_products", "elements_per_slot", "candidates_per_slot", "content_size", "new_elements")
        for name in counts:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (field.name for field in fields(self) if field.name.endswith("_sd")):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a finite number, at least 0")
        for name in ("delay_sigma", "trait_deviation"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a finite number, at least 0")
        for name in ("delay_median_s", "delay_cap_s", "drift_every_s", "new_elements_every_s"):
            value = getattr(self, name)
            _require(value is None or (math.isfinite(value) and value > 0), name, value, "a finite number above 0")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        _require(bool(self.slots) and all(self.slots), "slots", self.slots, "at least one name, none empty")
        _require(len(set(self.slots)) == len(self.slots), "slots", self.slots, "names that differ")
        for name in ("candidates_per_slot", "new_elements"):
            rule = f"at most elements_per_slot ({self.elements_per_slot})"
            _require(getattr(self, name) <= self.elements_per_slot, name, getattr(self, name), rule)
        _require(self.hidden_traits is None or self.hidden_traits >= 1, "hidden_traits", self.hidden_traits, "above 0")
        _require(0 < self.click_rate < 1, "click_rate", self.click_rate, "between 0 and 1")
        _require(0 < self.drift_rate <= 1, "drift_rate", self.drift_rate, "in (0, 1]")

    @property
    def num_creatives(self) -> int:
        """How many creatives each product has."""
        return int(self.candidates_per_slot ** len(self.slots))


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name} of the world is {value!r}; must be {rule}")


DEMO_WORLD = WorldConfig(seed=3)
"""Uniform play 4.0 %, best play 10.8 % (2.7 times), the best without regard to pairs 8.2 %."""
