"""What an explanation holds: the answer of the API and the JSON of the command line, as msgspec structs."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from streams.contracts.features import ContextValue

Verdict = Literal["better", "worse", "average", "unclear", "unknown"]
"""Of an interval: above 0, below it, around it and narrow, around it and wide; unknown: not in the snapshot."""


class Uplift(Struct, frozen=True, kw_only=True):
    """A difference in logits with its uncertainty, and the ratio of click rates that it makes."""

    uplift: Annotated[float, Meta(examples=[0.114])]
    sd: Annotated[float, Meta(ge=0, examples=[0.055])]
    """Posterior standard deviation."""
    low: Annotated[float, Meta(examples=[0.021])]
    high: Annotated[float, Meta(examples=[0.207])]
    """Ends of the 90 % interval."""
    clicks: Annotated[float, Meta(examples=[0.117])]
    """Ratio of click rates minus one; 0.12: 12 % more clicks."""
    clicks_low: Annotated[float, Meta(examples=[0.021])]
    clicks_high: Annotated[float, Meta(examples=[0.222])]
    verdict: Verdict


class ElementCredit(Struct, frozen=True, kw_only=True):
    """A candidate of a slot."""

    element_id: Annotated[str, Meta(examples=["t2"])]
    share: Annotated[float, Meta(ge=0, le=1, examples=[0.47])]
    """How often the policy shows it now, in [0, 1]."""
    credit: Annotated[float, Meta(examples=[0.08])]
    """Its share of the creative's logit, pairs half and half: credits of a creative add up to its creative logit."""
    credit_sd: Annotated[float, Meta(ge=0, examples=[0.06])]
    uplift: Uplift
    """Against the slot's average candidate."""
    best: Annotated[float, Meta(ge=0, le=1, examples=[0.81])]
    """Probability of being the slot's best: share of the posterior draws."""


class SlotCredits(Struct, frozen=True, kw_only=True):
    """The candidates of a slot, highest uplift first."""

    slot: Annotated[str, Meta(examples=["title"])]
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


CandidatesFrom = Literal["catalog", "snapshot", "given"]
"""Where the card's candidates come from. `snapshot`: the catalog has no card of the product, so every element that the
snapshot knows counts as a candidate, those of other products too."""


class SnapshotName(Struct, frozen=True, kw_only=True):
    """Which snapshot was explained."""

    model_id: str
    epoch: int
    version: int
    max_event_time_ms: int
    """Newest impression that it has learned from."""


class CardCredits(Struct, frozen=True, kw_only=True):
    """Answer of GET /v1/credits/{product_id}."""

    snapshot: SnapshotName
    candidates_from: CandidatesFrom
    explanation: Explanation
