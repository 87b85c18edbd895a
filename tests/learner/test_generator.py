"""The generator in torch equals its compiled twin in every variant, and what it gives are probabilities."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.generator import VARIANTS, Cards, Generator, GeneratorSettings
from serving import pointer as twin_module
from serving.pointer import Asked, Pointer

S, A, F, C, P, E = 3, 4, 5, 6, 2, 9


def generator_of(scale: float = 0.5, **settings: object) -> Generator:
    generator = Generator(F, GeneratorSettings(width=8, hidden=6, **settings), seed=1)  # type: ignore[arg-type]
    generator.grow(slots=S, context=C, products=P, elements=E)
    rng = torch.Generator().manual_seed(2)
    if scale:
        for name, weight in generator.weights.items():
            generator.weights[name] = scale * torch.randn(weight.shape, generator=rng)
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


def twin_of(generator: Generator) -> Pointer:
    return Pointer({name: w.numpy() for name, w in generator.weights.items()}, generator.settings.variant)


def asked_of(pointer: Pointer, cards: Cards, row: int, slots: list[int]) -> Asked:
    """Return what the twin is asked about a card that has these slots and no others."""
    has = [cards.mask[row, s].numpy() for s in slots]
    content, index = (
        np.concatenate([numbers[row, s].numpy()[h] for s, h in zip(slots, has, strict=True)])
        for numbers in (cards.content, cards.candidate)
    )
    first = np.cumsum([0, *(h.sum() for h in has)]).astype(np.uint64)
    return Asked(slots, pointer.keys(content, index), first, int(cards.product[row]), cards.context[row].numpy())


def every_creative() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(A), repeat=S)))[None]


def log_probability(generator: Generator, cards: Cards, chosen: torch.Tensor) -> torch.Tensor:
    return generator.log_probabilities(cards, chosen).gather(-1, chosen[..., None])[..., 0]


def test_twins_know_the_same_variants() -> None:
    assert VARIANTS == twin_module.VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_twin_gives_the_same_log_probabilities(variant: str) -> None:
    generator, cards = generator_of(variant=variant), cards_of()
    pointer = twin_of(generator)
    chosen = torch.randint(0, 3, (5, 7, S), generator=torch.Generator().manual_seed(5))
    log_pi = log_probability(generator, cards, chosen)
    for row, slots in [(0, [0, 1]), *((row, slots) for row in range(1, 5) for slots in ([0, 1, 2], [2, 0, 1]))]:
        twin = pointer.log_probabilities(asked_of(pointer, cards, row, slots), chosen[row][:, slots].numpy())
        np.testing.assert_allclose(twin, log_pi[row][:, slots].numpy(), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_probabilities_of_all_creatives_add_up_to_one(variant: str) -> None:
    generator, cards, every = generator_of(1.0, variant=variant), cards_of(4, whole=True), every_creative()
    log_pi = log_probability(generator, cards, every.expand(4, -1, -1)).sum(-1)
    np.testing.assert_allclose(log_pi.exp().sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_follow_the_probabilities_in_both(variant: str) -> None:
    generator, cards, n = generator_of(1.0, variant=variant), cards_of(1, whole=True), 20_000
    pi = log_probability(generator, cards, every_creative())[0].sum(-1).exp().numpy()
    pointer = twin_of(generator)
    uniform = np.random.default_rng(0).random((n, S))
    twin = pointer.propose(asked_of(pointer, cards, 0, list(range(S))), uniform)
    sampled = generator.sample(cards, n, torch.Generator().manual_seed(0)).numpy()
    for places in (twin, sampled[0]):
        count = np.bincount(places @ np.array([A * A, A, 1]), minlength=A**S)
        often = pi * n > 5
        chi2 = ((count - n * pi)[often] ** 2 / (n * pi)[often]).sum()
        # At most 63 degrees of freedom: above 140 in one run of 10 million; the seeds are fixed.
        assert chi2 < 140


def test_confident_variant_orders_each_card_by_its_own_entropies() -> None:
    generator, cards = generator_of(1.0, variant="confident"), cards_of(40, whole=True)
    key, base = generator._keys(cards, generator.weights), generator._base(cards, generator.weights)
    order = generator._order(cards, base, key, generator.weights)
    # Without a choice: every slot first, all others absent.
    entropies = torch.zeros(40, S)
    for s in range(S):
        alone = dataclasses.replace(cards, mask=cards.mask & (torch.arange(S) == s)[:, None])
        log_pi = generator.log_probabilities(alone, torch.zeros(40, 1, S, dtype=torch.long))[:, 0, s]
        entropies[:, s] = -(log_pi.exp() * log_pi).sum(-1)
    assert torch.equal(order, entropies.argsort(1))
    assert len(order.unique(dim=0)) > 1


def test_variants_see_what_they_may() -> None:
    """What is chosen in one slot moves another only if it comes before it."""
    cards = cards_of(1, whole=True)
    chosen = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 0, 1]]])
    by_first, by_last = {}, {}
    for variant in VARIANTS:
        log_pi = generator_of(variant=variant).log_probabilities(cards, chosen)[0]
        by_first[variant] = float((log_pi[1, 2] - log_pi[0, 2]).abs().max())
        by_last[variant] = float((log_pi[2, 0] - log_pi[0, 0]).abs().max())
    assert by_first["parallel"] == by_last["parallel"] == by_last["autoregressive"] == 0.0
    assert by_first["autoregressive"] > 0.01
    assert (by_first["confident"] > 0.01) != (by_last["confident"] > 0.01)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sideways.*autoregressive"):
        GeneratorSettings(variant="sideways")
    with pytest.raises(ValueError, match=r"sideways.*autoregressive"):
        Pointer({}, "sideways")


def test_a_high_temperature_makes_proposals_differ_more() -> None:
    generator, cards = generator_of(0.7), cards_of(1, whole=True)
    pointer = twin_of(generator)
    asked, uniform = asked_of(pointer, cards, 0, list(range(S))), np.random.default_rng(0).random((400, S))
    distinct = [len(np.unique(pointer.propose(asked, uniform, t), axis=0)) for t in (0.1, 1.0, 4.0)]
    assert distinct[0] < distinct[1] < distinct[2]


def test_hidden_numbers_are_bent_as_torch_bends_them() -> None:
    number = torch.cat([torch.linspace(-12, 12, 4_001), torch.linspace(-1e-3, 1e-3, 101)])
    bent = number.numpy().copy()
    twin_module._bend(bent)
    np.testing.assert_allclose(bent, number.tanh().numpy(), atol=5e-7)


def test_a_new_generator_is_uniform_and_appended_rows_change_nothing() -> None:
    for variant in VARIANTS:
        chosen = torch.zeros(5, 1, S, dtype=torch.long)
        new = generator_of(scale=0.0, variant=variant).log_probabilities(cards_of(), chosen)
        assert float(new[1, 0, 0, 0]) == pytest.approx(np.log(1 / 4), abs=1e-6)
        assert float(new[1, 0, 1, 0]) == pytest.approx(np.log(1 / 3), abs=1e-6)
        generator = generator_of(variant=variant)
        before = generator.log_probabilities(cards_of(), chosen)
        generator.grow(slots=S, context=C, products=P + 3, elements=E + 4)
        torch.testing.assert_close(generator.log_probabilities(cards_of(), chosen), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_never_leave_the_candidates(variant: str) -> None:
    cards = cards_of()
    sampled = generator_of(3.0, variant=variant).sample(cards, 200, torch.Generator().manual_seed(0))
    assert int(sampled[:, :, 1].max()) <= 2
    assert not sampled[0, :, 2].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_finite_differences(variant: str) -> None:
    generator, cards = generator_of(variant=variant), cards_of()
    chosen = torch.randint(0, 3, (5, 4, S), generator=torch.Generator().manual_seed(5))
    cards = dataclasses.replace(cards, context=cards.context.double(), content=cards.content.double())
    weights = {name: w.double().requires_grad_() for name, w in generator.weights.items()}
    has = cards.mask.any(-1)[:, None]

    def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
        log_pi = generator.log_probabilities(cards, chosen, w).gather(-1, chosen[..., None])[..., 0]
        return (log_pi * has).square().sum()

    names = [name for name in weights if name != "chosen" or variant != "parallel"]
    gradients = torch.autograd.grad(loss(weights), [weights[name] for name in names])
    fixed = {name: w.detach() for name, w in weights.items()}
    for name, gradient in zip(names, gradients, strict=True):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        ends = [float(loss(fixed | {name: fixed[name] + h * step})) for h in (1e-5, -1e-5)]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-6)
