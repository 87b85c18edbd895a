"""What is planted is found: the effects of elements, in rank and size, with intervals that hold what they say.

A learner sees creatives that were shown at random, and the explanation of its policy is compared with the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.design import Rows
from learner.generator import Generator
from learner.reward_model import RewardModel
from serving.credits import deviation, half_width
from serving.explain import Question, explain
from serving.explanation import Explanation, SlotCredits
from serving.policy import DecisionRequest, Policy, PolicySettings
from streams.contracts.encoders import ContentEncoder
from streams.contracts.features import FeatureSpec
from streams.contracts.growing import FeatureLimits, GrowingFeatureSpec
from streams.contracts.snapshot import pack_pairs

SLOTS, ELEMENTS, PRODUCTS, CONTENT, DRAWS = 3, 8, 4, 4, 32
NUM_WORLDS = 12
DEVICES = ("ios", "web")
BATCH, BATCHES = 2_000, 25
CARD = {f"s{s}": tuple(f"s{s}e{e}" for e in range(ELEMENTS)) for s in range(SLOTS)}
Floats = NDArray[np.float64]


class World:
    """Effects by content and of the elements themselves, on the whole and by device, and pairs by content."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng([seed, 77])
        self.z = rng.standard_normal((SLOTS, ELEMENTS, CONTENT))
        content = 0.1 * rng.standard_normal((SLOTS, CONTENT))
        by_device = 0.05 * rng.standard_normal((2, SLOTS, CONTENT))
        main = np.einsum("sef,sf->se", self.z, content) + 0.1 * rng.standard_normal((SLOTS, ELEMENTS))
        main = main + np.einsum("sef,dsf->dse", self.z, by_device)
        self.main: Floats = main + 0.03 * rng.standard_normal(main.shape)
        """(2, S, E)"""
        weights = 0.05 * rng.standard_normal((SLOTS, SLOTS, CONTENT, CONTENT))
        self.pair: Floats = np.einsum("saf,stfg,tbg->stab", self.z, weights, self.z)
        """[s, t], s < t: (E, E)"""
        self.appeal = 0.5 * rng.standard_normal(PRODUCTS)

    def batch(self) -> tuple[Rows, torch.Tensor]:
        """Return creatives that were shown at random, and who clicked."""
        product, device = self.rng.integers(PRODUCTS, size=BATCH), self.rng.integers(2, size=BATCH)
        shown = self.rng.integers(ELEMENTS, size=(BATCH, SLOTS))
        logit = -2.5 + self.appeal[product]
        for t in range(SLOTS):
            logit = logit + self.main[device, t, shown[:, t]]
            logit = logit + sum(self.pair[s, t, shown[:, s], shown[:, t]] for s in range(t))
        label = self.rng.random(BATCH) < 1 / (1 + np.exp(-logit))
        rows = Rows(
            product=torch.from_numpy(product),
            context=torch.nn.functional.one_hot(torch.from_numpy(device), 2).float(),
            chosen=torch.from_numpy(shown + ELEMENTS * np.arange(SLOTS)),
            content=torch.from_numpy(self.z[np.arange(SLOTS), shown]).float(),
        )
        return rows, torch.from_numpy(label.astype(np.float64))

    def uplift(self, main: Floats) -> Floats:
        """Return (S, E): each element against the mean of its slot, the other slots uniform."""
        worth = main.copy()
        for t in range(SLOTS):
            for s in range(t):
                worth[s] += self.pair[s, t].mean(1)
                worth[t] += self.pair[s, t].mean(0)
        centered: Floats = worth - worth.mean(1, keepdims=True)
        return centered

    def interaction(self, s: int, t: int) -> Floats:
        """Return (E, E): what pairs of two slots add beyond their parts."""
        pair = self.pair[s, t]
        centered: Floats = pair - pair.mean(0) - pair.mean(1, keepdims=True) + pair.mean()
        return centered


def spec_of() -> FeatureSpec:
    features = GrowingFeatureSpec(FeatureLimits(content_size=CONTENT))
    for device in DEVICES:
        features.context({"device": device})
    for number in range(PRODUCTS):
        features.product(f"p{number}")
    for slot, ids in CARD.items():
        for element_id in ids:
            features.element(slot, element_id)
    return features.freeze()


def learned(world: World, seed: int) -> Policy:
    """Return a uniform policy that has learned what the world showed."""
    sizes = {"slots": SLOTS, "context": 2, "products": PRODUCTS, "elements": SLOTS * ELEMENTS}
    model = RewardModel()
    model.grow(content=CONTENT, **sizes)
    for _ in range(BATCHES):
        rows, label_N = world.batch()
        model.learn(rows, label_N, torch.ones(BATCH))
    effects = model.effects(DRAWS, torch.Generator().manual_seed(seed), content_size=CONTENT, num_products=PRODUCTS)
    generator = Generator(CONTENT)
    generator.grow(**sizes)
    tensors = {f"draws.{n}": w.numpy() for n, w in effects.draws.items() if n.startswith("content")}
    tensors |= {f"mean.{n}": w.numpy() for n, w in effects.mean.items()}
    tensors |= {f"generator.{n}": w.detach().numpy() for n, w in generator.weights.items()}
    names = ("product", "element", "element_sd", "trait", "trait_root", "pair", "pair_sd")
    tensors |= {n: getattr(effects, n) for n in names}
    tensors["element_content"] = world.z.reshape(-1, CONTENT).astype(np.float32)
    tensors["pairs"] = pack_pairs(effects.pairs)
    tensors |= {f"encoder.{n}": w for n, w in ContentEncoder(CONTENT).tensors().items()}
    settings = PolicySettings(epsilon=1.0, thompson_scale=model.settings.thompson_scale, noise_seed=seed)
    return Policy(spec_of(), tensors, settings, "sha")


@cache
def worlds() -> list[tuple[World, Policy, Explanation]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = []
        for seed in range(NUM_WORLDS):
            world = World(seed)
            policy = learned(world, seed)
            out.append((world, policy, explain(policy, Question(product_id="p0", candidates=CARD))))
        return out
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Compared:
    """Planted and found effects, and whether the interval holds the planted one."""

    planted: Floats
    found: Floats
    holds: NDArray[np.bool_]

    @property
    def slope(self) -> float:
        """Planted effect for one found: 1 where sizes are right, less where they are overstated."""
        return float(np.polyfit(self.found, self.planted, 1)[0])


def compared(slots: Sequence[tuple[Floats, SlotCredits]]) -> Compared:
    rows = [
        (truth, element.uplift)
        for truth_E, slot in slots
        for element in slot.elements
        for truth in [float(truth_E[CARD[slot.slot].index(element.element_id)])]
    ]
    return Compared(
        np.array([truth for truth, _ in rows]),
        np.array([uplift.uplift for _, uplift in rows]),
        np.array([uplift.low <= truth <= uplift.high for truth, uplift in rows]),
    )


def on_the_whole() -> list[tuple[Floats, SlotCredits]]:
    return [
        pair
        for world, _, explanation in worlds()
        for pair in zip(world.uplift(world.main.mean(0)), explanation.slots, strict=True)
    ]


def by_device() -> list[tuple[Floats, SlotCredits]]:
    return [
        pair
        for world, _, explanation in worlds()
        for context in explanation.contexts
        for pair in zip(world.uplift(world.main[DEVICES.index(str(context.value))]), context.slots, strict=True)
    ]


@pytest.mark.parametrize("slots", [on_the_whole, by_device])
def test_planted_effects_are_found_in_rank_and_size(slots: Callable[[], list[tuple[Floats, SlotCredits]]]) -> None:
    result = compared(slots())
    assert np.corrcoef(result.planted, result.found)[0, 1] > 0.95
    assert result.slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("slots", [on_the_whole, by_device])
def test_intervals_hold_the_planted_effects_as_often_as_they_say(
    slots: Callable[[], list[tuple[Floats, SlotCredits]]],
) -> None:
    """Over 80 worlds 96 % on the whole and 94 % by device, so they are a little wide; these 12 give .94 and .92.

    The variances of an element's trait, of its own effect and of its effects with the context are added as if they were
    independent, but clicks tell about their sum. Learned without traits it was 94 and 91 % (40 worlds); with one memory
    and without effects of elements with the context, which the worlds have, 92 and 85 %.
    """
    assert 0.86 <= compared(slots()).holds.mean() <= 0.98


def test_best_is_as_probable_as_it_says() -> None:
    """Candidates that are said to be their slot's best with probability p are so in a share p of the cases."""
    said, true = [], []
    for truth_E, slot in on_the_whole() + by_device():
        for element in slot.elements:
            said.append(element.best)
            true.append(element.element_id == CARD[slot.slot][int(truth_E.argmax())])
    is_sure = np.array(said) > 0.9
    assert is_sure.sum() > 20
    assert np.mean(np.array(true)[is_sure]) > 0.85
    # Brier score: saying 1 / 8 of everybody gives .109.
    assert np.mean((np.array(said) - np.array(true)) ** 2) < 0.06


def test_pairs_that_work_together_are_found_and_their_intervals_hold() -> None:
    planted, found, holds = [], [], []
    for world, policy, _ in worlds():
        request = DecisionRequest("p0", {}, CARD)
        effects = policy.card_effects(request, policy.spec.context_row({}))
        for t in range(SLOTS):
            for s in range(t):
                effect_LAB, truth_AB = effects.interaction(t, s), world.interaction(s, t).T
                planted.append(truth_AB.ravel())
                found.append(effect_LAB[-1].ravel())
                half_AB = half_width(DRAWS) * deviation(effect_LAB)
                holds.append((np.abs(effect_LAB[-1] - truth_AB) <= half_AB).ravel())
    assert np.corrcoef(np.concatenate(planted), np.concatenate(found))[0, 1] > 0.9
    # .955 here, a little wide: the memories' variances are averaged, and content and single pairs added as independent.
    assert 0.85 <= np.concatenate(holds).mean() <= 0.97


def test_pairs_that_are_shown_as_strongest_are_no_lucky_draws() -> None:
    """They are picked by what was found; shrinking by learned variances is what keeps their intervals honest."""
    holds = []
    for world, _, explanation in worlds():
        for pair in (*explanation.good_pairs, *explanation.bad_pairs):
            (s, a), (t, b) = (
                (list(CARD).index(n), CARD[n].index(e)) for n, e in zip(pair.slots, pair.element_ids, strict=True)
            )
            holds.append(pair.effect.low <= world.interaction(s, t)[a, b] <= pair.effect.high)
    assert len(holds) == 20 * NUM_WORLDS
    assert np.mean(holds) >= 0.85
