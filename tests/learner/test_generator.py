"""The generator in torch equals its numpy twin, and learns what its rewards say."""

import itertools

import numpy as np
import pytest
import torch

from learner.generator import Cards, Generator, GeneratorSettings
from learner.generator_training import advantages, rewards, train_step
from serving.pointer import Pointer

S, A, F, C, P, E = 3, 4, 5, 6, 2, 9


def generator_of(scale: float = 0.5, **settings: object) -> Generator:
    generator = Generator(F, GeneratorSettings(width=8, hidden=6, **settings), seed=1)  # type: ignore[arg-type]
    generator.grow(slots=S, context=C, products=P, elements=E)
    rng = torch.Generator().manual_seed(2)
    if scale:
        generator.weights = {n: scale * torch.randn(w.shape, generator=rng) for n, w in generator.weights.items()}
    return generator


def cards_of(n: int = 5, *, whole: bool = False) -> Cards:
    rng = torch.Generator().manual_seed(3)
    mask = torch.ones(n, S, A, dtype=torch.bool)
    if not whole:
        mask[:, 1, 3] = False  # a slot with three candidates
        mask[0, 2] = False  # a card without the last slot
    candidate = torch.randint(-1, E, (n, S, A), generator=rng)
    return Cards(
        product=torch.randint(-1, P, (n,), generator=rng),
        context=torch.randn(n, C, generator=rng),
        candidate=candidate.masked_fill(~mask, -1),
        mask=mask,
        content=torch.randn(n, S, A, F, generator=rng) * mask[..., None],
    )


def effects_of(draws: int = 3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    shapes = {"content": (S, F), "content_context": (S, F, C), "content_pair": (3, F, F)}
    effects = {name: 0.3 * torch.randn(draws, *shape, generator=rng) for name, shape in shapes.items()}
    return effects | {"element": 0.3 * torch.randn(E, 1 + C, generator=rng)}


def test_numpy_twin_gives_the_same_log_probabilities() -> None:
    generator, cards = generator_of(), cards_of()
    pointer = Pointer({name: w.numpy() for name, w in generator.weights.items()})
    chosen = torch.randint(0, 3, (5, 7, S), generator=torch.Generator().manual_seed(5))
    log_pi = generator.log_probabilities(cards, chosen).gather(-1, chosen[..., None])[..., 0]
    for b in range(5):
        slots = [s for s in range(S) if cards.mask[b, s].any()]
        keys = []
        for s in slots:
            has = cards.mask[b, s].numpy()
            keys.append(pointer.keys(cards.content[b, s].numpy()[has], cards.candidate[b, s].numpy()[has])[None])
        places = chosen[b : b + 1, :, slots].numpy()
        twin = pointer.log_probabilities(
            slots, keys, cards.product[b : b + 1].numpy(), cards.context[b : b + 1].numpy(), places
        )
        np.testing.assert_allclose(twin[0], log_pi[b][:, slots].numpy(), atol=1e-5)
        # The twin may be asked in any order of slots.
        turned = pointer.log_probabilities(
            slots[::-1],
            keys[::-1],
            cards.product[b : b + 1].numpy(),
            cards.context[b : b + 1].numpy(),
            places[..., ::-1],
        )
        np.testing.assert_allclose(turned[0][:, ::-1], twin[0], atol=1e-6)


def test_probabilities_of_all_creatives_add_up_to_one() -> None:
    generator, cards = generator_of(), cards_of(1, whole=True)
    every = torch.tensor(list(itertools.product(range(A), repeat=S)))[None]
    log_pi = generator.log_probabilities(cards, every).gather(-1, every[..., None])[..., 0].sum(-1)
    assert float(log_pi.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_samples_follow_the_probabilities_in_torch_and_numpy() -> None:
    generator, cards, n = generator_of(1.0), cards_of(1, whole=True), 20_000
    every = torch.tensor(list(itertools.product(range(A), repeat=S)))[None]
    pi = generator.log_probabilities(cards, every).gather(-1, every[..., None])[0, :, :, 0].sum(-1).exp().numpy()
    pointer = Pointer({name: w.numpy() for name, w in generator.weights.items()})
    keys = [pointer.keys(cards.content[0, s].numpy(), cards.candidate[0, s].numpy())[None] for s in range(S)]
    uniform = np.random.default_rng(0).random((1, n, S))
    twin = pointer.propose(range(S), keys, cards.product.numpy(), cards.context.numpy(), uniform)
    sampled = generator.sample(cards, n, torch.Generator().manual_seed(0)).numpy()
    for places in (twin[0], sampled[0]):
        count = np.bincount(places @ np.array([A * A, A, 1]), minlength=A**S)
        often = pi * n > 5
        chi2 = ((count - n * pi)[often] ** 2 / (n * pi)[often]).sum()
        # At most 63 degrees of freedom: above 140 in one run of 10 million; the seeds are fixed.
        assert chi2 < 140


def test_a_new_generator_is_uniform_and_appended_rows_change_nothing() -> None:
    chosen = torch.zeros(5, 1, S, dtype=torch.long)
    new = generator_of(scale=0.0).log_probabilities(cards_of(), chosen)
    assert float(new[1, 0, 0, 0]) == pytest.approx(np.log(1 / 4), abs=1e-6)
    assert float(new[1, 0, 1, 0]) == pytest.approx(np.log(1 / 3), abs=1e-6)
    generator = generator_of()
    before = generator.log_probabilities(cards_of(), chosen)
    generator.grow(slots=S, context=C, products=P + 3, elements=E + 4)
    torch.testing.assert_close(generator.log_probabilities(cards_of(), chosen), before)


def test_samples_never_leave_the_candidates() -> None:
    cards = cards_of()
    sampled = generator_of(3.0).sample(cards, 200, torch.Generator().manual_seed(0))
    assert int(sampled[:, :, 1].max()) <= 2
    assert not sampled[0, :, 2].any()


def test_rewards_equal_the_definition() -> None:
    cards, effects = cards_of(2, whole=True), effects_of()

    def own(element: int, context_C: torch.Tensor) -> torch.Tensor:
        return effects["element"][element, 0] + effects["element"][element, 1:] @ context_C

    chosen = torch.tensor([[[0, 1, 2]], [[3, 0, 1]]])
    draw = torch.tensor([2, 0])
    found = rewards(cards, chosen, effects, draw)
    for b in range(2):
        m, total = int(draw[b]), 0.0
        z = [cards.content[b, s, chosen[b, 0, s]] for s in range(S)]
        for s in range(S):
            element = int(cards.candidate[b, s, chosen[b, 0, s]])
            weights = effects["content"][m, s] + effects["content_context"][m, s] @ cards.context[b]
            total += float(z[s] @ weights) + (float(own(element, cards.context[b])) if element >= 0 else 0.0)
        pairs = [
            float(z[s] @ effects["content_pair"][m, t * (t - 1) // 2 + s] @ z[t]) for t in range(S) for s in range(t)
        ]
        assert float(found.total[b, 0]) == pytest.approx(total + sum(pairs), abs=1e-5)
        assert float(found.marginal[b, 0].sum()) == pytest.approx(total + 2 * sum(pairs), abs=1e-5)


def test_training_finds_rewarding_creatives_without_imitation() -> None:
    generator = generator_of(0.0, distillation=0.0, entropy=0.05, cards=8)
    cards, effects = cards_of(8, whole=True), effects_of(1)
    rng = torch.Generator().manual_seed(6)
    winners = torch.zeros(8, 1, S, dtype=torch.long)
    reports = [train_step(generator, cards, effects, winners, None, rng) for _ in range(120)]
    every = torch.tensor(list(itertools.product(range(A), repeat=S)))[None].expand(8, -1, -1)
    all_rewards = rewards(cards, every, effects, torch.zeros(8, dtype=torch.long)).total
    best, mean = float(all_rewards.max(1).values.mean()), float(all_rewards.mean())
    assert (reports[-1].reward - mean) / (best - mean) > 0.7
    assert reports[-1].entropy < reports[0].entropy


def test_imitation_makes_winners_likely_and_the_leash_holds_back() -> None:
    cards, effects, winners = cards_of(8, whole=True), effects_of(1), torch.full((8, 2, S), 2)
    reports = {}
    for leash in (0.0, 30.0):
        generator = generator_of(0.0, leash=leash, cards=8)
        published = dict(generator.weights)
        rng = torch.Generator().manual_seed(6)
        reports[leash] = [train_step(generator, cards, effects, winners, published, rng) for _ in range(40)][-1]
    assert reports[0.0].distillation < 0.8 * np.log(4) * S
    assert reports[30.0].divergence < 0.2 * reports[0.0].divergence


def test_a_gradient_that_is_not_finite_makes_no_step() -> None:
    generator = generator_of()
    before = dict(generator.weights)
    generator.step({"slot": torch.full((S, 8), torch.nan)})
    assert all(torch.equal(before[name], w) for name, w in generator.weights.items())
    assert generator.num_steps == 0


def test_advantages_of_equal_creatives_are_zero() -> None:
    cards = cards_of(2, whole=True)
    rewarded = rewards(cards, torch.zeros(2, 5, S, dtype=torch.long), effects_of(), torch.zeros(2, dtype=torch.long))
    assert float(advantages(rewarded, 0.05).abs().max()) < 1e-4
