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
    assert float(advantages(rewarded, 0.05, 0.5).abs().max()) < 1e-4


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


def test_only_variants_with_an_order_learn_that_two_choices_belong_together() -> None:
    """Of two slots with two candidates each (0, 0) and (1, 1) win: in parallel no distribution gives both above 1/4."""
    cards = cards_of(4)
    cards.mask[:, :, 2:] = False
    cards.mask[:, 2] = False
    winners = torch.tensor([[0, 0, 0], [1, 1, 0]]).expand(4, -1, -1)
    surprise = {}
    for variant in VARIANTS:
        generator = generator_of(variant=variant)
        generator.weights["chosen"] = 0.1 * torch.randn(S, S, 8, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(300):
            weights = {name: w.requires_grad_() for name, w in generator.weights.items()}
            log_pi = generator.log_probabilities(cards, winners, weights).gather(-1, winners[..., None])
            loss = -log_pi[:, :, :2, 0].sum(-1).mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            with torch.no_grad():
                generator.optimizer.step({n: g for n, g in zip(weights, gradients, strict=True) if g is not None})
        surprise[variant] = float(loss.detach())
    assert surprise["parallel"] > 2 * np.log(2) - 1e-3
    assert surprise["autoregressive"] < np.log(2) + 0.1
    assert surprise["confident"] < np.log(2) + 0.1


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


def test_unseen_cards_are_new_but_like_the_old_ones() -> None:
    cards, rng = cards_of(400, whole=False), torch.Generator().manual_seed(0)
    changed = unseen(cards, 1.0, rng)
    assert (changed.product == -1).all()
    assert torch.equal(changed.mask, cards.mask)  # all cards but the first have the same slots and sizes here
    is_new = (changed.candidate == -1) & changed.mask
    share_B = is_new.sum((1, 2)) / changed.mask.sum((1, 2))
    # Of some cards few, of some all; 400 of them.
    assert float(share_B.min()) < 0.1
    assert float(share_B.max()) > 0.9
    assert 0.4 < float(share_B.mean()) < 0.6
    known = {tuple(row.tolist()) for row in cards.content.flatten(0, 2)}
    assert all(tuple(row.tolist()) in known for row in changed.content[changed.mask & ~is_new])
    made_up = changed.content[is_new]
    assert not any(tuple(row.tolist()) in known for row in made_up)
    # Normal numbers in, numbers of the same spread out; the mean of a slot is of few candidates.
    assert float(made_up.std()) == pytest.approx(float(cards.content[cards.mask].std()), rel=0.15)
    assert not changed.content[~changed.mask].any()


def test_no_share_of_unseen_cards_changes_nothing() -> None:
    cards = cards_of(16, whole=False)
    same = unseen(cards, 0.0, torch.Generator().manual_seed(0))
    for name in ("product", "context", "candidate", "content"):
        assert torch.equal(getattr(same, name), getattr(cards, name))
