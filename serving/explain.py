"""Explain a product's card: which candidate earns what, for whom, how sure that is, and which pairs work together.

Everything is a fact about a snapshot and the card's candidates; no traffic is read. What is compared:

- `uplift` of a candidate: by how much the creative's logit rises when it takes the place of an average candidate of its
  slot, while the other slots are played as the policy plays them now (`serving.credits` has the sums).
- `clicks`: the same as a ratio of click rates minus one, 0.12 for 12 % more clicks.
- Intervals hold the true value with probability 0.9, as far as the model is right; `best` is the share of the posterior
  draws in which a candidate is its slot's best.
- Fields of the context that are not given are averaged over: every known value of a category counts the same, numbers
  stand at their mean. Effects are linear in the context, so this is exact; how often the policy shows a candidate is
  averaged over `MIXED` contexts.

Shapes: L = M + 1 posterior draws with the mean last, T slots of a card, A candidates of a slot, C context columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.credits import CardEffects, deviation, half_width
from serving.explanation import (
    ContextCredits,
    ElementCredit,
    Explanation,
    PairCredit,
    SlotCredits,
    Taste,
    Uplift,
    Verdict,
)
from serving.policy import DecisionRequest, Policy
from streams.contracts.catalog import Element
from streams.contracts.features import ContextValue, FeatureSpec

FloatArray = NDArray[np.float32]

MAX_CANDIDATES: Final = 1024
"""Of a card that is explained."""
MAX_ROWS: Final = 16_384
"""Candidates times contexts of an answer; beyond it one slot must be asked for."""
MAX_PAIRS: Final = 10
"""Pairs to each side, and tastes, that are shown."""
MIXED: Final = 8
"""Contexts over which the policy's play is averaged where fields are not given."""
SMALL_UPLIFT: Final = math.log(1.1)
"""An interval within this much of 0 says that a candidate is average, and not that nothing is known."""


class QuestionError(ValueError):
    """What was asked for cannot be explained; `field` says which part of the question is meant."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which card, and for whom."""

    product_id: str
    candidates: Mapping[str, Sequence[str]]
    """Slot -> element ids, in slot order."""
    content: Mapping[str, Element] = field(default_factory=dict)
    """Element id -> its content, for elements that the snapshot may not know."""
    context: Mapping[str, ContextValue] = field(default_factory=dict)
    """Fields that are given."""
    slot: str | None = None
    """Only this slot, and pairs with it."""


def explain(policy: Policy, question: Question) -> Explanation:
    """Explain a card.

    Raises:
        QuestionError: If there is no such slot, no candidate, or more than can be answered.
    """
    others = [c for c in policy.spec.columns if c.value is not None and c.field not in question.context]
    _check(question, 1 + len(others))
    whole = _View(policy, question, question.context, None)
    contexts, tastes = [], []
    for column in others:
        if column.value is None:
            continue
        view = _View(policy, question, {**question.context, column.field: column.value}, whole.effects.pair)
        contexts.append(ContextCredits(field=column.field, value=column.value, slots=view.slots()))
        tastes += view.tastes(whole, column.field, column.value)
    # The clearest first: how far from 0 in units of what is not known.
    tastes.sort(key=lambda t: abs(t.difference.uplift) / max(t.difference.sd, 1e-9), reverse=True)
    pairs = sorted(whole.pairs(), key=lambda pair: pair.effect.uplift)
    return Explanation(
        product_id=question.product_id,
        product_known=question.product_id in policy.spec.product_index,
        context=dict(question.context),
        averaged_over=list(dict.fromkeys(c.field for c in policy.spec.columns if c.field not in question.context)),
        slots=whole.slots(),
        contexts=contexts,
        tastes=tastes[:MAX_PAIRS],
        good_pairs=[pair for pair in pairs[: -MAX_PAIRS - 1 : -1] if pair.effect.uplift > 0],
        bad_pairs=[pair for pair in pairs[:MAX_PAIRS] if pair.effect.uplift < 0],
    )


def read_context(spec: FeatureSpec, fields: Mapping[str, str]) -> dict[str, ContextValue]:
    """Return a context that was written as text, with the values that the snapshot knows.

    Raises:
        QuestionError: If it does not know a field or a value.
    """
    out: dict[str, ContextValue] = {}
    for name, text in fields.items():
        columns = [c for c in spec.columns if c.field == name]
        values = {str(c.value).lower() if isinstance(c.value, bool) else str(c.value): c.value for c in columns}
        value = values.get(text, values.get(text.lower()))
        if not columns:
            known = ", ".join(dict.fromkeys(c.field for c in spec.columns)) or "none"
            raise QuestionError(f"context.{name[:80]}", f"the snapshot knows no such field; it knows {known[:400]}")
        if value is not None:
            out[name] = value
            continue
        known = ", ".join(str(c.value) for c in columns if c.value is not None)
        if any(c.value is None for c in columns):
            number = _number(text)
            if number is not None:
                out[name] = number
                continue
            known = f"{known}, any number" if known else "any number"
        raise QuestionError(
            f"context.{name[:80]}", f"the snapshot knows no value {text[:80]!r}; it knows {known[:400]}"
        )
    return out


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check(question: Question, num_contexts: int) -> None:
    candidates = question.candidates
    if not candidates or not all(candidates.values()):
        raise QuestionError("product_id", f"{question.product_id[:80]!r} has no candidates")
    if question.slot is not None and question.slot not in candidates:
        raise QuestionError(
            "slot", f"the card has no slot {question.slot[:80]!r}; it has {', '.join(candidates)[:400]}"
        )
    num_candidates = sum(map(len, candidates.values()))
    if num_candidates > MAX_CANDIDATES:
        raise QuestionError(
            "product_id", f"the card has {num_candidates} candidates; at most {MAX_CANDIDATES} are explained"
        )
    asked = len(candidates[question.slot]) if question.slot else num_candidates
    if asked * num_contexts > MAX_ROWS:
        raise QuestionError(
            "slot",
            f"{asked} candidates in {num_contexts} contexts are more than {MAX_ROWS} rows; ask for one slot, or give "
            "fields of the context",
        )


# -- one context ------------------------------------------------------------------------------------------------------


class _View:
    """A card in a context, the fields that are not given averaged over."""

    def __init__(
        self,
        policy: Policy,
        question: Question,
        context: Mapping[str, ContextValue],
        pair: Sequence[Sequence[FloatArray]] | None,
    ) -> None:
        spec, self._question = policy.spec, question
        self._names = list(question.candidates)
        self._asked = [t for t, name in enumerate(self._names) if question.slot in (None, name)]
        self._known = [
            [(spec.slot_index.get(name, -1), e) in spec.element_index for e in ids]
            for name, ids in question.candidates.items()
        ]
        requests = [
            DecisionRequest(question.product_id, c, question.candidates, question.content)
            for c in mixed_contexts(spec, context)
        ]
        self._played = _played(policy, requests)
        context_C = average_context(spec, context)
        self.effects: CardEffects = policy.card_effects(requests[0], context_C, pair)
        self._credit = self.effects.credit(self._played)
        worth = self.effects.worth(self._played)
        self.uplift = [worth_LA - worth_LA.mean(1, keepdims=True) for worth_LA in worth]
        self._reach = half_width(policy.num_draws)
        # The logit of the card with an average candidate in slot t: what a ratio of click rates refers to.
        played = [float(play_A @ credit_LA[-1]) for play_A, credit_LA in zip(self._played, self._credit, strict=True)]
        card = policy.appeal(question.product_id, context_C) + sum(played)
        self._card = card
        self._average = [
            card - float(play_A @ uplift_LA[-1]) for play_A, uplift_LA in zip(self._played, self.uplift, strict=True)
        ]

    def slots(self) -> list[SlotCredits]:
        """Return the credits of the slots that were asked for."""
        return [
            SlotCredits(
                slot=self._names[t],
                elements=sorted(self._elements(t), key=lambda element: element.uplift.uplift, reverse=True),
            )
            for t in self._asked
        ]

    def _elements(self, t: int) -> list[ElementCredit]:
        ids = self._question.candidates[self._names[t]]
        uplift_LA, credit_LA = self.uplift[t], self._credit[t]
        best_A = np.bincount(uplift_LA[:-1].argmax(1), minlength=len(ids)) / (len(uplift_LA) - 1)
        credit_sd_A = deviation(credit_LA)
        return [
            ElementCredit(
                element_id=element_id,
                share=round(float(self._played[t][a]), 6),
                credit=float(credit_LA[-1, a]),
                credit_sd=float(credit_sd_A[a]),
                uplift=self._measured(uplift_LA[:, a], self._average[t], is_known=self._known[t][a]),
                best=float(best_A[a]),
            )
            for a, element_id in enumerate(ids)
        ]

    def tastes(self, whole: _View, name: str, value: str | bool) -> list[Taste]:
        """Return the candidates whose uplift here differs clearly from that of another view."""
        found = []
        for t in self._asked:
            for a, element_id in enumerate(self._question.candidates[self._names[t]]):
                difference_L = self.uplift[t][:, a] - whole.uplift[t][:, a]
                measured = self._measured(difference_L, self._average[t], is_known=self._known[t][a])
                if measured.verdict in ("better", "worse"):
                    found.append(
                        Taste(field=name, value=value, slot=self._names[t], element_id=element_id, difference=measured)
                    )
        return found

    def pairs(self) -> list[PairCredit]:
        """Return the pairs with the slots that were asked for, the strongest `MAX_PAIRS` to each side of slots."""
        found = []
        for t, row in enumerate(self.effects.pair):
            for s in range(len(row)):
                if t in self._asked or s in self._asked:
                    found += self._pairs(t, s)
        return found

    def _pairs(self, t: int, s: int) -> list[PairCredit]:
        names = self._names[s], self._names[t]
        first, second = (self._question.candidates[name] for name in names)
        effect_LAB = self.effects.interaction(t, s)
        order = np.argsort(effect_LAB[-1], axis=None)
        picked = dict.fromkeys([*order[:MAX_PAIRS].tolist(), *order[-MAX_PAIRS:].tolist()])
        out = []
        for a, b in (divmod(place, len(first)) for place in picked):
            is_known = self._known[t][a] and self._known[s][b]
            effect = self._measured(effect_LAB[:, a, b], self._card, is_known=is_known)
            out.append(PairCredit(slots=names, element_ids=(first[b], second[a]), effect=effect))
        return out

    def _measured(self, value_L: FloatArray, base: float, *, is_known: bool) -> Uplift:
        mean, sd = float(value_L[-1]), float(deviation(value_L))
        low, high = mean - self._reach * sd, mean + self._reach * sd
        clicks, clicks_low, clicks_high = (_ratio(base, logit) - 1.0 for logit in (mean, low, high))
        return Uplift(
            uplift=mean,
            sd=sd,
            low=low,
            high=high,
            clicks=clicks,
            clicks_low=clicks_low,
            clicks_high=clicks_high,
            verdict=_verdict(low, high) if is_known else "unknown",
        )


def mixed_contexts(spec: FeatureSpec, given: Mapping[str, ContextValue]) -> list[dict[str, ContextValue]]:
    """Return contexts that hold what is given and, field by field, go through the known values of the others.

    Each field goes through its values in an order of its own, so that no two fields change in step.
    """
    others: dict[str, list[ContextValue]] = {}
    for column in spec.columns:
        if column.field not in given and column.value is not None:
            others.setdefault(column.field, []).append(column.value)
    if not others:
        return [dict(given)]
    rng = np.random.default_rng(0)
    orders = {name: [rng.permutation(len(values)) for _ in range(MIXED)] for name, values in others.items()}
    turns = {name: np.concatenate(order)[:MIXED] for name, order in orders.items()}
    return [dict(given) | {n: values[turns[n][k]] for n, values in others.items()} for k in range(MIXED)]


def average_context(spec: FeatureSpec, given: Mapping[str, ContextValue]) -> FloatArray:
    """Return the (C,) numbers of the average over all contexts that hold what is given."""
    row: FloatArray = spec.context_row(given)
    counts: dict[str, int] = {}
    for column in spec.columns:
        counts[column.field] = counts.get(column.field, 0) + (column.value is not None)
    for c, place in enumerate(spec.context):
        if place is not None and place.value is not None and place.field not in given:
            row[c] = 1.0 / counts[place.field]
    return row


def _played(policy: Policy, requests: Sequence[DecisionRequest]) -> list[FloatArray]:
    """Return how often the policy shows each candidate, (A,) for each slot, on average over the requests."""
    epsilon = policy.settings.epsilon
    winners_KMT = np.stack(policy.winners(requests))
    out = []
    for t, ids in enumerate(requests[0].candidates.values()):
        count_A = np.bincount(winners_KMT[:, :, t].ravel(), minlength=len(ids))
        share_A = (1.0 - epsilon) * count_A / winners_KMT[:, :, t].size + epsilon / len(ids)
        out.append(share_A.astype(np.float32))
    return out


def _ratio(base: float, change: float) -> float:
    """Return by what the click rate is multiplied when the logit changes; exp(change) where clicks are rare."""
    base = min(max(base, -30.0), 30.0)
    change = min(max(change, -30.0), 30.0)
    return (1.0 + math.exp(-base)) / (1.0 + math.exp(-base - change))


def _verdict(low: float, high: float) -> Verdict:
    if low > 0.0:
        return "better"
    if high < 0.0:
        return "worse"
    return "average" if low >= -SMALL_UPLIFT and high <= SMALL_UPLIFT else "unclear"
