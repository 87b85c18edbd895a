"""Impression and Click: what happened, as it stands on Kafka, one JSON object each.

Every field of schema version 1 is required except `Click.reward`; fields that this version does not know are ignored;
another schema version is refused. The propensities are those of the policy that decided, fixed at that moment: nothing
downstream recomputes them for learning.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

SCHEMA_VERSION: Final = 1
MAX_SLOTS: Final = 32
MAX_CANDIDATES: Final = 1024
MAX_CONTEXT_FIELDS: Final = 64
PROPENSITY_TOLERANCE: Final = 1e-6
"""Relative: the product of the slot propensities may differ from `propensity` by rounding."""

Identifier = Annotated[str, Meta(min_length=1, max_length=128)]
TimestampMs = Annotated[int, Meta(ge=0, lt=4_102_444_800_000)]
"""Unix milliseconds, before the year 2100: a value in microseconds or seconds-as-float is caught here."""
Probability = Annotated[float, Meta(gt=0.0, le=1.0)]
ContextField = Annotated[str, Meta(min_length=1, max_length=64)]
ContextValue = Annotated[str, Meta(max_length=256)] | Annotated[int, Meta(ge=-(2**53), le=2**53)] | float | bool
Source = Literal["policy", "last_good", "uniform"]


class Impression(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A creative was shown: all that is needed to learn from it off-policy.

    `candidates`, `creative` and `slot_propensities` have the same slots; the order of `creative` is the slot order.
    """

    schema_version: Literal[1]
    decision_id: Identifier
    occurred_at_ms: TimestampMs
    product_id: Identifier
    context: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=64)], ContextValue], Meta(max_length=MAX_CONTEXT_FIELDS)
    ]
    candidates: Annotated[
        dict[Identifier, Annotated[list[Identifier], Meta(min_length=1, max_length=MAX_CANDIDATES)]],
        Meta(min_length=1, max_length=MAX_SLOTS),
    ]
    creative: dict[str, str]
    slot_propensities: dict[str, Probability]
    """Given the earlier slots, in slot order."""
    propensity: Probability
    """Product of the slot propensities."""
    model_id: Identifier
    epoch: Annotated[int, Meta(ge=0, lt=2**53)]
    policy_version: Annotated[int, Meta(ge=0, lt=2**53)]
    source: Source
    """The rung of the ladder that decided."""
    holdout: bool
    """The uniform share chose it."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    survival_probability: Probability
    """Below 1 while the event log drops events: chance that this one survived."""


class Click(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A user acted on an impression."""

    schema_version: Literal[1]
    decision_id: Identifier
    occurred_at_ms: TimestampMs
    reward: Annotated[float, Meta(ge=0.0, le=1e9)] = 1.0
    """Worth of the click, for instance a conversion's value."""


Event = Impression | Click


def impression_fault(impression: Impression) -> str | None:
    """Return what contradicts itself in an impression, or None. The types and ranges are msgspec's to check."""
    candidates = impression.candidates
    creative = impression.creative
    propensities = impression.slot_propensities
    if creative.keys() != candidates.keys():
        return f"creative: slots are {sorted(creative)}; expected those of candidates, {sorted(candidates)}"
    if propensities.keys() != creative.keys():
        return f"slot_propensities: slots are {sorted(propensities)}; expected those of creative, {sorted(creative)}"
    for slot, element_id in creative.items():
        if element_id not in candidates[slot]:
            return f"creative.{slot}: {element_id[:80]!r} is not among its candidates"
    product = 1.0
    for value in propensities.values():
        product *= value
    if not abs(product - impression.propensity) <= PROPENSITY_TOLERANCE * product:
        return f"propensity: {impression.propensity!r}; expected the product of slot_propensities, {product!r}"
    return None
