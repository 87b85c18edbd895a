"""What an explanation holds: the answer of the API and the JSON of the command line, as msgspec structs."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from streams.contracts.features import ContextValue

Verdict = Literal["better", "worse", "average", "unclear", "unknown"]
"""Of an interval: above 0, below it, around it and narrow, around it and wide; unknown: not in the snapshot."""


class Uplift(Struct, frozen=True, kw_only=True):
    """A difference in logits with its uncertainty, and the ratio of click rates that it makes."""

    uplift: float
    sd: float
    """Posterior standard deviation."""
    low: float
    high: float
    """Ends of the 90 % interval."""
    clicks: float
    """Ratio of click rates minus one; 0.12: 12 % more clicks."""
    clicks_low: float
    clicks_high: float
    verdict: Verdict


class ElementCredit(Struct, frozen=True, kw_only=True):
    """A candidate of a slot."""

    element_id: str
    share: float
    """How often the policy shows it now, in [0, 1]."""
    credit: float
    """Its share of the creative's logit, pairs half and half: credits of a creative add up to its creative logit."""
    credit_sd: float
    uplift: Uplift
    """Against the slot's average candidate."""
    best: float
    """Probability of being the slot's best: share of the posterior draws."""


class SlotCredits(Struct, frozen=True, kw_only=True):
    """The candidates of a slot, highest uplift first."""

    slot: str
    elements: list[ElementCredit]


class ContextCredits(Struct, frozen=True, kw_only=True):
    """The credits in one value of a categorical field."""

    field: str
    value: str | bool
    slots: list[SlotCredits]


class Taste(Struct, frozen=True, kw_only=True):
    """A candidate that does better or worse in a context than it does on the whole."""

    field: str
    value: str | bool
    slot: str
    element_id: str
    difference: Uplift
    """Uplift in this context minus uplift on the whole."""


class PairCredit(Struct, frozen=True, kw_only=True):
    """Two candidates, and what they add together beyond what each of them adds on average over the other's slot."""

    slots: tuple[str, str]
    element_ids: tuple[str, str]
    effect: Uplift


class Explanation(Struct, frozen=True, kw_only=True):
    """What a snapshot says about a card."""

    product_id: str
    product_known: bool
    """Whether the snapshot has an appeal for it; candidates are explained all the same."""
    context: dict[str, ContextValue]
    """What was given."""
    averaged_over: list[str]
    """Fields that were not."""
    slots: list[SlotCredits]
    contexts: list[ContextCredits]
    """A value of a categorical field each, of the fields that were not given."""
    tastes: list[Taste]
    """The clearest differences between contexts, at most 10."""
    good_pairs: list[PairCredit]
    bad_pairs: list[PairCredit]
    """Strongest first, at most 10."""
