"""The reward model equals its formulas, finds planted effects, grows, and stays finite."""

import math

import numpy as np
import pytest
import torch

from learner.design import Layout, Rows, design
from learner.reward_model import LEARNED, RewardModel, RewardModelSettings, provisional_weight

LAYOUT = Layout(slots=2, content=2, context=3, products=4, elements=6)


def batch(rng: np.random.Generator, n: int, layout: Layout = LAYOUT) -> tuple[Rows, torch.Tensor]:
    content_EF = np.random.default_rng(99).standard_normal((layout.elements, layout.content))
    per_slot = layout.elements // layout.slots
    chosen = np.stack([rng.integers(per_slot, size=n) + s * per_slot for s in range(layout.slots)], 1)
    rows = Rows(
        product=torch.from_numpy(rng.integers(layout.products, size=n)),
        context=torch.from_numpy(rng.standard_normal((n, layout.context))).float(),
        chosen=torch.from_numpy(chosen),
        content=torch.from_numpy(content_EF[chosen]).float(),
    )
    return rows, torch.from_numpy((rng.random(n) < 0.1).astype(np.float64))


def learned(num_batches: int, n: int = 200, **settings: object) -> RewardModel:
    model = RewardModel(RewardModelSettings(**settings))  # type: ignore[arg-type]
    model.grow(LAYOUT)
    rng = np.random.default_rng(0)
    for _ in range(num_batches):
        rows, label_N = batch(rng, n)
        model.learn(rows, label_N, torch.ones(n))
    return model


def reference(
    num_batches: int, n: int, forgetting: tuple[float, ...], warm: int, every: int
) -> tuple[np.ndarray, list[float]]:
    """The formulas of the module, in double precision and without any of its short cuts."""
    scales = {"bias": 1.0, "context": 0.2, "content": 0.04, "content_context": 0.016, "content_pair": 0.012}
    scales |= {"product": 0.7, "element": 0.08}
    group = {name: LAYOUT.columns[name].flatten().numpy() for name in scales}
    D, K, rng = LAYOUT.size, len(forgetting), np.random.default_rng(0)
    precision = np.zeros((K, D))
    for name, columns in group.items():
        precision[:, columns] = scales[name] ** -2.0
    prior_mean = np.zeros(D)
    prior_mean[0] = -3.3
    theta, H, g, weight, seen, due = (
        np.tile(prior_mean, (K, 1)),
        np.zeros((K, D, D)),
        np.zeros((K, D)),
        np.full(K, 1 / K),
        0,
        every,
    )
    for _ in range(num_batches):
        rows, label = batch(rng, n)
        y = label.numpy()
        x = design(rows, LAYOUT)
        hot = np.zeros((n, x.num_hot + 1))
        for column in x.hot.T.numpy():
            hot[np.arange(n), column] = 1
        X = np.concatenate([x.dense.numpy(), hot[:, :-1]], 1).astype(np.float64)
        logits = X @ theta.T
        p = 1 / (1 + np.exp(-logits))
        loss = -np.log(np.where(y[:, None] > 0, p, 1 - p)).sum(0)
        for again in range(2 if seen < warm else 1):
            if again:
                logits = X @ theta.T
            q = 1 / (1 + np.exp(-(logits @ weight)))
            w = np.maximum(q * (1 - q), 1e-4)
            new = []
            for k, f in enumerate(forgetting):
                keep = (1 - f) ** (n / 1000)
                pk = 1 / (1 + np.exp(-logits[:, k]))
                Hk = keep * H[k] + X.T @ (X * w[:, None])
                gk = keep * g[k] + X.T @ (w * logits[:, k] + y - pk)
                theta[k] = np.linalg.solve(Hk + np.diag(precision[k]), gk + precision[k] * prior_mean)
                new.append((Hk, gk, np.linalg.inv(Hk + np.diag(precision[k]))))
        H, g = np.stack([h for h, _, _ in new]), np.stack([v for _, v, _ in new])
        value = np.log(weight) - 0.5 * loss
        value = np.exp(value - value.max())
        share = 1 - 0.95 ** (n / 1000)
        weight = (1 - share) * value / value.sum() + share / K
        seen += n
        if seen >= due:
            due = seen + every
            for k in range(K):
                for name in LEARNED:
                    c = group[name]
                    a = max(4.0, 0.1 * len(c))
                    squares = (theta[k, c] ** 2 + np.diag(new[k][2])[c]).sum()
                    precision[k, c] = (len(c) + a) / (squares + a * scales[name] ** 2)
    return weight @ theta, weight.tolist()


def test_coefficients_equal_the_formulas() -> None:
    model = learned(12, memories=(0.0, 0.05), warm_examples=1_000, variance_every=1_000)
    mean_D, weights = reference(12, 200, (0.0, 0.05), 1_000, 1_000)
    np.testing.assert_allclose(model.mean().numpy(), mean_D, atol=2e-4)
    assert model.memory_weights == pytest.approx(weights, abs=1e-4)


def test_draws_have_the_posterior_covariance() -> None:
    model = learned(5, memories=(0.0,))
    draws_MD = model.draw(4_000, torch.Generator().manual_seed(0)).double()
    precision_DD = model._H_KDD[0].double() + torch.diag(model._precision(0))
    covariance_DD = torch.linalg.inv(precision_DD) * model.settings.thompson_scale**2
    error_MD = draws_MD - model.mean()
    # Mahalanobis distances of D-dimensional normals: mean D, here within 2 % (their mean has deviation .4 %).
    distance = (error_MD @ torch.linalg.inv(covariance_DD) * error_MD).sum(1).mean()
    assert float(distance) == pytest.approx(LAYOUT.size, rel=0.02)


def test_planted_effects_are_recovered() -> None:
    rng = np.random.default_rng(3)
    layout = Layout(slots=2, content=0, context=0, products=3, elements=8)
    effect = np.array([-0.6, -0.2, 0.2, 0.6, -0.45, -0.15, 0.15, 0.45])
    appeal = np.array([-1.0, 0.0, 1.0])
    model = RewardModel(RewardModelSettings(memories=(0.0,)))
    model.grow(layout)
    for _ in range(30):
        product = rng.integers(3, size=1000)
        chosen = np.stack([rng.integers(4, size=1000), 4 + rng.integers(4, size=1000)], 1)
        p = 1 / (1 + np.exp(-(-2.5 + appeal[product] + effect[chosen].sum(1))))
        rows = Rows(torch.from_numpy(product), torch.zeros(1000, 0), torch.from_numpy(chosen), torch.zeros(1000, 2, 0))
        model.learn(rows, torch.from_numpy((rng.random(1000) < p).astype(np.float64)), torch.ones(1000))
    cards = torch.tensor([[a, 4 + a] for a in range(4)])
    rows = Rows(torch.zeros(4, dtype=torch.long), torch.zeros(4, 0), cards, torch.zeros(4, 2, 0))
    credit_NS, sd_NS = model.credits(rows)
    found = torch.cat([credit_NS[:, 0] - credit_NS[:, 0].mean(), credit_NS[:, 1] - credit_NS[:, 1].mean()]).numpy()
    # The seed is fixed, so this is no question of chance.
    assert np.abs(found - effect).max() < 0.2
    assert float(sd_NS.max()) < 0.3
    assert np.argsort(found[:4]).tolist() == [0, 1, 2, 3]


def test_credits_add_up_to_the_creative_part_of_the_logit() -> None:
    model = learned(5)
    rows, _ = batch(np.random.default_rng(1), 30)
    credit_NS, sd_NS = model.credits(rows)
    p = model.predict(rows)
    bare = Rows(rows.product, rows.context, torch.full_like(rows.chosen, -1), torch.zeros_like(rows.content))
    creative_N = torch.logit(p) - torch.logit(model.predict(bare))
    torch.testing.assert_close(credit_NS.sum(1).double(), creative_N, atol=1e-4, rtol=0)
    assert bool((sd_NS > 0).all())


def test_growing_changes_no_prediction() -> None:
    model = learned(4)
    rows, _ = batch(np.random.default_rng(1), 30)
    before = model.predict(rows)
    model.grow(Layout(slots=3, content=2, context=5, products=9, elements=12))
    wide = Rows(
        rows.product,
        torch.nn.functional.pad(rows.context, (0, 2)),
        torch.nn.functional.pad(rows.chosen, (0, 1), value=-1),
        torch.nn.functional.pad(rows.content, (0, 0, 0, 1)),
    )
    torch.testing.assert_close(model.predict(wide), before)
    assert torch.isfinite(model.draw(4, torch.Generator().manual_seed(0))).all()


def test_elements_beyond_the_cap_have_no_effect_of_their_own() -> None:
    model = RewardModel(RewardModelSettings(max_elements=2))
    model.grow(LAYOUT)
    assert model.layout.elements == 2
    assert model.effects(model.mean(), content_size=2, num_elements=6)["element"].shape == (6,)


def test_weight_zero_teaches_nothing() -> None:
    model = learned(3, memories=(0.0,))
    before = model.mean()
    rows, label_N = batch(np.random.default_rng(5), 100)
    model.learn(rows, label_N, torch.zeros(100))
    torch.testing.assert_close(model.mean(), before, atol=1e-5, rtol=0)


def test_extreme_rows_are_mended_with_jitter_and_stay_finite() -> None:
    model = learned(2)
    rows, label_N = batch(np.random.default_rng(5), 100)
    huge = Rows(rows.product, rows.context * 1e4, rows.chosen, rows.content * 1e3)
    model.learn(huge, label_N, torch.ones(100))
    assert torch.isfinite(model.mean()).all()


def test_not_finite_rows_leave_the_model_as_it_was() -> None:
    model = learned(2)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    rows, label_N = batch(np.random.default_rng(5), 10)
    bad = Rows(rows.product, rows.context * math.nan, rows.chosen, rows.content)
    with pytest.raises(FloatingPointError, match="nothing learned"):
        model.learn(bad, label_N, torch.ones(10))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors().items())


def test_provisional_weights_undo_the_bias_of_not_waiting() -> None:
    """With click rate p and late share q, weighted negatives and all positives give back the rate p."""
    p, q = 0.04, 0.3
    negatives, positives = 1 - p * (1 - q), p
    weight = float(provisional_weight(torch.tensor([p]), q))
    assert positives / (positives + weight * negatives) == pytest.approx(p)
    assert float(provisional_weight(torch.tensor([p]), 0.0)) == 1.0
