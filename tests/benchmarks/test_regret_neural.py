"""The neural ensemble of the regret benchmark: its poolings against plain formulas, its search against all cards."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from benchmarks.regret.policies import VARIANTS, neural_mil
from benchmarks.regret.policies.neural_mil import (
    _NeuralMil,
    additive,
    attention,
    best_weighted_mean,
    noisy_or,
)
from benchmarks.regret.run import play_policy
from benchmarks.regret.traffic import Traffic
from benchmarks.regret.worlds import BATCH
from tests.benchmarks.small_worlds import RENEWED, TINY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make so small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neural_mil, "STEPS", 3)


def made(name: str, traffic: Traffic, seed: int = 0) -> _NeuralMil:
    policy = VARIANTS[name].load()(traffic.facts(), seed)
    assert isinstance(policy, _NeuralMil)
    return policy


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


LOGIT, SCORE, APPEAL = [0.3, -1.2, 0.8], [0.5, 2.0, -1.0], -2.5


def pooled(pooling: Callable[..., torch.Tensor], *elements: list[float], appeal: float = APPEAL) -> float:
    """Return the click probability of one card and one member."""
    log_odds_MN = pooling(*(torch.tensor([[values]]) for values in elements), torch.tensor([[appeal]]))
    assert log_odds_MN.shape == (1, 1)
    return sigmoid(log_odds_MN.item())


def test_additive_pooling_is_the_sum() -> None:
    assert pooled(additive, LOGIT) == pytest.approx(sigmoid(-2.5 + 0.3 - 1.2 + 0.8))


def test_attention_pooling_is_a_weighted_mean_and_the_sum_if_attention_is_even() -> None:
    weights = [math.exp(score) for score in SCORE]
    mean = sum(w * logit for w, logit in zip(weights, LOGIT, strict=True)) / sum(weights)
    assert pooled(attention, LOGIT, SCORE) == pytest.approx(sigmoid(APPEAL + 3 * mean))
    assert pooled(attention, LOGIT, [0.7] * 3) == pytest.approx(pooled(additive, LOGIT))


def test_noisy_or_pooling_clicks_if_one_element_does() -> None:
    none = math.prod(1 - sigmoid(APPEAL + logit - math.log(3)) for logit in LOGIT)
    assert pooled(noisy_or, LOGIT) == pytest.approx(1 - none)


@pytest.mark.parametrize("appeal", [-40.0, 40.0])
def test_noisy_or_pooling_stays_finite_where_clicks_are_certain_or_never_come(appeal: float) -> None:
    logit_MNS = torch.tensor([[LOGIT]], requires_grad=True)
    log_odds_MN = noisy_or(logit_MNS, torch.tensor([[appeal]]))
    log_odds_MN.sum().backward()  # type: ignore[no-untyped-call]
    assert logit_MNS.grad is not None
    assert torch.isfinite(log_odds_MN).all()
    assert torch.isfinite(logit_MNS.grad).all()
    assert logit_MNS.grad.abs().max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_member_shows_what_it_likes_best(name: str) -> None:
    """Additive: no other element of one slot is better; the others: no other card is."""
    traffic = Traffic(RENEWED, 5, BATCH)
    policy, catalog = made(name, traffic), traffic.catalog(0.0)
    policy.catalog(catalog)
    for weight in policy._weights.values():
        weight.requires_grad_(False).mul_(3.0)  # effects far apart
    batch = next(iter(traffic.batches()))
    requests = traffic.request_batch(batch, catalog).take(np.arange(20))
    context_NC = torch.from_numpy(requests.context(traffic.facts()))
    shown_NS = policy._best(context_NC, requests.candidates, slice(1, 2))
    for i, shown in enumerate(shown_NS):
        cards = np.array(list(itertools.product(*requests.candidates[i])))
        if name == "neural-additive":
            cards = cards[(cards != shown).sum(axis=1) <= 1]
        product = torch.full((len(cards),), int(requests.product[i]))
        liked = policy._logit(product, context_NC[i].expand(len(cards), -1), torch.from_numpy(cards))[1]
        at_shown = liked[torch.from_numpy((cards == shown).all(axis=1))]
        assert at_shown.item() == pytest.approx(liked.max().item(), abs=1e-5)
        assert liked.std() > 0.05


def test_weighted_mean_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    value_NSA, score_NSA = (2 * torch.randn(200, 3, 5, generator=generator) for _ in range(2))
    places = torch.tensor(list(itertools.product(range(5), repeat=3)))

    def mean(place_NS: torch.Tensor) -> torch.Tensor:
        weight_NS = score_NSA.gather(2, place_NS[..., None])[..., 0].softmax(1)
        return (weight_NS * value_NSA.gather(2, place_NS[..., None])[..., 0]).sum(1)

    best_N = torch.stack([mean(place.expand(200, -1)) for place in places]).amax(0)
    torch.testing.assert_close(mean(best_weighted_mean(value_NSA, score_NSA)), best_N)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns(name: str) -> None:
    """Uniform play has regret 1 +- .03 over the last two batches; the weakest of four policy seeds had .10."""
    traffic = Traffic(TINY, 5, 6 * BATCH)
    assert play_policy(made(name, traffic), traffic).regret(traffic.reference(), 1 / 3) < 0.5


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", VARIANTS)
def test_it_plays_new_elements_rich_content_and_late_labels(name: str) -> None:
    # Whoever shows what is no candidate is refused by the world.
    traffic = Traffic(RENEWED, 5, 4 * BATCH)
    assert len(play_policy(made(name, traffic), traffic).obtained) == 4


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", VARIANTS)
def test_it_follows_from_its_seed(name: str) -> None:
    outcomes = []
    for seed in (1, 1, 2):
        traffic = Traffic(TINY, 5, 2 * BATCH)
        outcomes.append(play_policy(made(name, traffic, seed), traffic).obtained)
    assert outcomes[0] == outcomes[1] != outcomes[2]


@pytest.mark.parametrize("name", VARIANTS)
def test_members_begin_apart_and_follow_from_the_seed(name: str) -> None:
    first, again, other = (made(name, Traffic(TINY, 5, BATCH), seed)._weights for seed in (1, 1, 2))
    for part, weight in first.items():
        assert torch.equal(weight, again[part])
        assert not torch.equal(weight, other[part])
        assert len(weight.detach().flatten(1).unique(dim=0)) == neural_mil.MEMBERS


def test_element_is_its_id_and_its_content() -> None:
    traffic = Traffic(TINY, 5, BATCH)
    policy, catalog = made("neural-additive", traffic), traffic.catalog(0.0)
    policy.catalog(catalog)
    w = {part: weight.detach().numpy() for part, weight in policy._weights.items()}
    content = catalog.content[1, 3]
    expected = w["id"][2, 1, 3] + content @ w["content"][2, 1]
    np.testing.assert_allclose(policy._vectors()[2, 1, 3].detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert abs(content).min() > 0.01


def test_appeal_is_that_of_product_and_context() -> None:
    policy = made("neural-additive", Traffic(RENEWED, 5, BATCH))
    w = {part: weight.detach().double() for part, weight in policy._weights.items()}
    context = torch.linspace(-1.0, 1.0, policy.facts.context_size)
    appeal = policy._appeal(torch.tensor([1]), context[None])[3, 0].item()
    by_product = w["product"][3, 1] + w["product_context"][3, 1] @ context.double()
    assert appeal == pytest.approx((w["bias"][3, 0] + w["context"][3] @ context.double() + by_product).item(), rel=1e-5)


@pytest.mark.usefixtures("few_steps")
def test_examples_count_as_often_as_the_bootstrap_drew_them() -> None:
    traffic = Traffic(TINY, 5, 2 * BATCH)
    policy = made("neural-noisy-or", traffic)
    play_policy(policy, traffic)
    weight_NM = policy._replay[-1]
    assert weight_NM.shape == (2 * BATCH, neural_mil.MEMBERS)
    # 16,000 draws of Poisson(1): five standard errors of the mean are .04, of the variance .07.
    assert weight_NM.mean().item() == pytest.approx(1.0, abs=0.04)
    assert weight_NM.var().item() == pytest.approx(1.0, abs=0.07)
    assert torch.corrcoef(weight_NM.T).triu(1).abs().max() < 0.15
