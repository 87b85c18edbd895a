"""The generator learns what its rewards say: by their gradient, and from refined winners."""

import dataclasses

import numpy as np
import pytest
import torch

from learner.generator import VARIANTS, Cards, Generator, GeneratorSettings
from learner.generator_cards import unseen
from learner.generator_rewards import Judge
from learner.generator_training import GeneratorReport, advantages, train_step

S, A, F, C, P, E = 3, 4, 5, 6, 2, 9
EVERY = torch.cartesian_prod(*[torch.arange(A)] * S)[None]


def cards_of(n: int = 8, *, whole: bool = True) -> Cards:
    rng = torch.Generator().manual_seed(3)
    mask = torch.ones(n, S, A, dtype=torch.bool)
    if not whole:
        mask[:, 1, 3] = False
        mask[0, 2] = False
    return Cards(
        product=torch.randint(P, (n,), generator=rng),
        context=torch.randn(n, C, generator=rng),
        candidate=torch.randint(E, (n, S, A), generator=rng).masked_fill(~mask, -1),
        mask=mask,
        content=torch.randn(n, S, A, F, generator=rng) * mask[..., None],
    )


def effects_of(draws: int = 3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    # The last content number stands in no pair.
    shapes = {"content": (S, F), "content_context": (S, F, C), "content_pair": (3, F - 1, F - 1)}
    effects = {name: 0.3 * torch.randn(draws, *shape, generator=rng) for name, shape in shapes.items()}
    return effects | {"element": 0.3 * torch.randn(E, 1 + C, generator=rng)}


def generator_of(**settings: object) -> Generator:
    values = {"cards": 8, "unseen_share": 0.0} | settings
    generator = Generator(F, GeneratorSettings(width=8, hidden=6, **values), seed=1)  # type: ignore[arg-type]
    generator.grow(slots=S, context=C, products=P, elements=E)
    return generator


def train(
    generator: Generator, steps: int, draws: int = 1, leash: dict[str, torch.Tensor] | None = None
) -> GeneratorReport:
    cards, judge, rng = cards_of(), Judge(effects_of(draws)), torch.Generator().manual_seed(6)
    return [train_step(generator, cards, judge, leash, rng) for _ in range(steps)][-1]


def attained(generator: Generator, reward: float) -> float:
    """Return a mean reward as a share of the way from uniform to best play."""
    judged = Judge(effects_of(1)).cards(cards_of(), torch.zeros(8, dtype=torch.long))
    every = judged.rewards(EVERY.expand(8, -1, -1)).total
    best, mean = float(every.max(1).values.mean()), float(every.mean())
    return (reward - mean) / (best - mean)


def test_rewards_equal_the_definition() -> None:
    cards, effects = cards_of(2), effects_of()
    chosen, draw = torch.tensor([[[0, 1, 2]], [[3, 0, 1]]]), torch.tensor([2, 0])
    found = Judge(effects).cards(cards, draw).rewards(chosen)
    for b in range(2):
        m, total = int(draw[b]), 0.0
        z = [cards.content[b, s, chosen[b, 0, s]] for s in range(S)]
        for s in range(S):
            element = effects["element"][cards.candidate[b, s, chosen[b, 0, s]]]
            weights = effects["content"][m, s] + effects["content_context"][m, s] @ cards.context[b]
            total += float(z[s] @ weights + element[0] + element[1:] @ cards.context[b])
        pairs = [
            float(z[s][: F - 1] @ effects["content_pair"][m, t * (t - 1) // 2 + s] @ z[t][: F - 1])
            for t in range(S)
            for s in range(t)
        ]
        assert float(found.total[b, 0]) == pytest.approx(total + sum(pairs), abs=1e-5)
        assert float(found.marginal[b, 0].sum()) == pytest.approx(total + 2 * sum(pairs), abs=1e-5)


def test_an_unknown_element_has_no_effect_of_its_own() -> None:
    cards = cards_of(2)
    unknown = dataclasses.replace(cards, candidate=torch.full_like(cards.candidate, -1))
    effects, chosen, draw = effects_of(), torch.zeros(2, 1, S, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    plain = effects | {"element": torch.zeros_like(effects["element"])}
    found = Judge(effects).cards(unknown, draw).rewards(chosen).total
    torch.testing.assert_close(found, Judge(plain).cards(cards, draw).rewards(chosen).total)


def test_refined_creatives_cannot_be_improved_in_any_one_slot() -> None:
    cards, start = cards_of(whole=False), torch.zeros(8, 2, S, dtype=torch.long)
    start[:, 1] = torch.tensor([3, 2, 1])
    start[0, :, 2] = 0
    judged = Judge(effects_of(3)).cards(cards, torch.arange(8) % 3)
    refined = judged.refined(start, sweeps=12)
    value = judged.rewards(refined).total
    assert (value >= judged.rewards(start).total - 1e-5).all()
    assert not refined[0, :, 2].any()
    for s in range(S):
        for place in range(A):
            other = refined.clone()
            other[:, :, s] = place
            allowed = cards.mask[:, s, place][:, None]
            assert (judged.rewards(other).total <= value + 1e-5)[allowed.expand_as(value)].all()


def test_advantages_of_equal_creatives_are_zero() -> None:
    judged = Judge(effects_of()).cards(cards_of(2), torch.zeros(2, dtype=torch.long))
    rewarded = judged.rewards(torch.zeros(2, 5, S, dtype=torch.long))
    assert float(advantages(rewarded, 0.05).abs().max()) < 1e-4


def test_policy_gradient_alone_finds_rewarding_creatives() -> None:
    generator = generator_of(distillation=0.0, entropy=0.05, group_size=16)
    first, last = train(generator, 1), train(generator, 120)
    assert attained(generator, last.reward) > 0.7
    assert last.entropy < first.entropy


@pytest.mark.parametrize("variant", VARIANTS)
def test_imitation_alone_finds_rewarding_creatives(variant: str) -> None:
    generator = generator_of(policy_gradient=0.0, entropy=0.0, variant=variant)
    first, last = train(generator, 1), train(generator, 120)
    assert attained(generator, last.reward) > 0.7
    # Winners, improbable at first, have become probable.
    assert last.distillation < 0.5 * first.distillation
    assert first.distillation == pytest.approx(S * np.log(A), abs=1e-4)


def test_the_leash_holds_back() -> None:
    divergence = {}
    for leash in (0.0, 30.0):
        generator = generator_of(leash=leash)
        divergence[leash] = train(generator, 40, leash=dict(generator.weights)).divergence
    assert divergence[30.0] < 0.2 * divergence[0.0]


def test_only_the_free_variants_learn_that_two_choices_belong_together() -> None:
    """Two slots that are good together only if equal: in parallel half of all pairs are wrong."""
    cards = dataclasses.replace(
        cards_of(8), candidate=torch.full((8, S, A), -1), mask=torch.zeros(8, S, A, dtype=torch.bool)
    )
    cards.mask[:, :2, :2] = True
    cards.content.zero_()
    cards.content[:, :2, 0, 0], cards.content[:, :2, 1, 0] = 1.0, -1.0
    effects = {name: torch.zeros_like(w) for name, w in effects_of(1).items()}
    effects["content_pair"][0, 0, 0, 0] = 1.0
    judge, reward = Judge(effects), {}
    for variant in VARIANTS:
        generator, rng = generator_of(variant=variant, entropy=0.1), torch.Generator().manual_seed(0)
        # A start that has broken no symmetry yet: both elements equally likely in the first slot.
        generator.weights["chosen"] = 0.1 * torch.randn(S, S, 8, 8, generator=rng)
        generator.settings = dataclasses.replace(generator.settings, policy_gradient=0.0, entropy=0.5)
        for _ in range(150):
            train_step(generator, cards, judge, None, rng)
        sampled = generator.sample(cards, 200, rng)
        reward[variant] = float(judge.cards(cards, torch.zeros(8, dtype=torch.long)).rewards(sampled).total.mean())
    assert reward["autoregressive"] > reward["parallel"] + 0.2
    assert reward["confident"] > reward["parallel"] + 0.2


def test_a_generator_proposes_by_content_what_it_has_never_seen() -> None:
    generator, rng = generator_of(unseen_share=0.5), torch.Generator().manual_seed(8)
    train(generator, 200)
    judge, draw = Judge(effects_of(1)), torch.zeros(40, dtype=torch.long)
    new = Cards(
        product=torch.full((40,), -1),
        context=torch.randn(40, C, generator=rng),
        candidate=torch.full((40, S, A), -1),
        mask=torch.ones(40, S, A, dtype=torch.bool),
        content=torch.randn(40, S, A, F, generator=rng),
    )
    judged = judge.cards(new, draw)
    reward = float(judged.rewards(generator.sample(new, 64, rng)).total.mean())
    every = judged.rewards(EVERY.expand(40, -1, -1)).total
    best, mean = float(every.max(1).values.mean()), float(every.mean())
    assert (reward - mean) / (best - mean) > 0.3


def test_unseen_cards_keep_to_what_a_slot_may_hold() -> None:
    cards, rng = cards_of(64, whole=False), torch.Generator().manual_seed(0)
    changed = unseen(cards, 1.0, rng)
    assert (changed.product == -1).all()
    assert torch.equal(changed.mask, cards.mask)  # all cards but the first have the same slots and sizes here
    known = {(s, tuple(cards.content[b, s, a].tolist())) for b in range(64) for s in range(S) for a in range(A)}
    for b in range(64):
        for s in range(S):
            assert all((s, tuple(row.tolist())) in known for row in changed.content[b, s])
    forgotten = (changed.candidate == -1) & changed.mask
    assert 0.4 < float(forgotten.sum() / changed.mask.sum()) < 0.6
    for name in ("product", "context", "candidate", "content"):
        assert torch.equal(getattr(unseen(cards, 0.0, rng), name), getattr(cards, name))
