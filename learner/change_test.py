"""Has the world changed? A sequential test on what the model is for: that creatives earn what they are said to.

The log loss of what the policy shows hardly tells: after a change the longest memory still predicts best, and nobody
explores. What changes at once is that the clicks which the chosen creatives were to add do not come. So the slope of
the clicks on the creative's part c of the logit is watched: 1 while the world is as learned, 1 - d after a change. With
p the click probability before an example is learned, y its label and s its weight, the log-likelihood ratio of the two,
to second order, is

    sum s [ - d c (y - p) - d^2 c^2 p (1 - p) / 2 ]

and its cumulative sum, never below 0, passing h is a change (Page 1954). Under no change that happens less often than
once in e^h beginnings of a sum. The product's appeal is no part of c: a season or a new product is not a change of
taste.

A change widens what is known of tastes, so that exploration comes back by itself.

References:
    Page (1954), Continuous Inspection Schemes. Lorden (1971), Procedures for Reacting to a Change in Distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeSettings:
    """Settings of the test."""

    deficit: float = 0.3
    """d: share of the creatives' effect that is lost in the change it looks for, in (0, 1]."""
    threshold: float = 6.0
    """h, in nats; infinity: never. In quiet traffic 6 was passed once in 3,000 batches of 1,000."""
    widening: float = 0.5
    """Share of what is known of tastes that a change takes away, in [0, 1)."""
    warm_examples: int = 10_000
    """Examples before it begins: the first effects are mostly noise."""

    def __post_init__(self) -> None:
        """Refuse what is no test."""
        if not (0.0 < self.deficit <= 1.0 and self.threshold > 0.0 and 0.0 <= self.widening < 1.0):
            raise ValueError(
                f"change test with deficit {self.deficit}, threshold {self.threshold} and widening {self.widening}; "
                "expected (0, 1], above 0 and [0, 1)"
            )


class ChangeTest:
    """The cumulative sum."""

    def __init__(self, settings: ChangeSettings) -> None:
        self.settings = settings
        self.evidence = 0.0
        """In nats; a change at the threshold."""
        self.num_changes = 0
        """Changes so far."""

    def observe(self, creative_N: Tensor, probability_N: Tensor, label_N: Tensor, weight_N: Tensor) -> bool:
        """Take a batch that is not learned yet and return whether the world has changed.

        Args:
            creative_N: The creative's part of the logit.
            probability_N: Click probability.
            label_N: 0 or 1.
            weight_N: Weight of each example.
        """
        deficit = self.settings.deficit
        lost = float((weight_N * creative_N * (probability_N - label_N)).sum())
        information = float((weight_N * creative_N.square() * probability_N * (1.0 - probability_N)).sum())
        self.evidence = max(0.0, self.evidence + deficit * lost - deficit**2 * information / 2)
        if self.evidence < self.settings.threshold:
            return False
        self.evidence = 0.0
        self.num_changes += 1
        return True

    def state(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {"evidence": self.evidence, "num_changes": self.num_changes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the place of the test whose `state` this was."""
        self.evidence, self.num_changes = state["evidence"], state["num_changes"]
