"""The reward model equals its formulas, finds planted effects, grows, forgets what is gone, and stays finite."""

import math

import numpy as np
import pytest
import torch

from learner.core import CoreSettings
from learner.design import Rows
from learner.rest import Memory, RestSettings
from learner.reward_model import RewardModel, RewardModelSettings, provisional_weight
from streams.contracts.growing import Freed

SLOTS, CONTENT, CONTEXT, PRODUCTS, ELEMENTS = 2, 2, 3, 4, 6
SIZES = {"slots": SLOTS, "content": CONTENT, "context": CONTEXT, "products": PRODUCTS, "elements": ELEMENTS}
CONTENT_EF = np.random.default_rng(99).standard_normal((ELEMENTS, CONTENT))


def batch(rng: np.random.Generator, n: int) -> tuple[Rows, torch.Tensor]:
    per_slot = ELEMENTS // SLOTS
    chosen = np.stack([rng.integers(per_slot, size=n) + s * per_slot for s in range(SLOTS)], 1)
    rows = Rows(
        product=torch.from_numpy(rng.integers(PRODUCTS, size=n)),
        context=torch.from_numpy(rng.standard_normal((n, CONTEXT))).float(),
        chosen=torch.from_numpy(chosen),
        content=torch.from_numpy(CONTENT_EF[chosen]).float(),
    )
    return rows, torch.from_numpy((rng.random(n) < 0.1).astype(np.float64))


def learned(num_batches: int, n: int = 200, **settings: object) -> RewardModel:
    model = RewardModel(RewardModelSettings(**settings))  # type: ignore[arg-type]
    model.grow(**SIZES)
    rng = np.random.default_rng(0)
    for _ in range(num_batches):
        rows, label_N = batch(rng, n)
        model.learn(rows, label_N, torch.ones(n))
    return model


class Reference:
    """The formulas of the modules, in double precision, example by example, without any of their short cuts."""

    def __init__(self, memories: tuple[Memory, ...], n: int, warm: int, every: int) -> None:
        self.memories, self.n, self.warm, self.every = memories, n, warm, every
        K, S, F, C = len(memories), SLOTS, CONTENT, CONTEXT
        sizes = {"bias": 1, "context": C, "content": S * F, "content_context": S * F * C, "content_pair": F * F}
        self.sd = {"bias": 1.0, "context": 0.2, "content": 0.04, "content_context": 0.016, "content_pair": 0.012}
        ends = np.cumsum(list(sizes.values()))
        self.group = {name: slice(e - size, e) for (name, size), e in zip(sizes.items(), ends, strict=True)}
        D = int(ends[-1])
        self.precision = np.tile(np.concatenate([np.full(sizes[g], self.sd[g] ** -2.0) for g in sizes]), (K, 1))
        self.m0 = np.zeros(D)
        self.m0[0] = -3.3
        self.theta, self.H, self.g = np.tile(self.m0, (K, 1)), np.zeros((K, D, D)), np.zeros((K, D))
        self.weight, self.seen, self.due = np.full(K, 1 / K), 0, every
        self.prior = {
            "product": np.tile([0.7**2] + [0.2**2] * C, (K, 1, 1)),
            "element": np.tile([0.08**2] + [0.03**2] * C, (K, 1, 1)),
            "pair": np.array([[[(0.03 * memory.pair_width) ** 2]] for memory in memories]),
        }
        rows = {"product": PRODUCTS, "element": ELEMENTS, "pair": ELEMENTS**2}
        self.mean = {t: np.zeros((K, rows[t], v.shape[2])) for t, v in self.prior.items()}
        self.var = {t: np.tile(v, (1, rows[t], 1)) for t, v in self.prior.items()}
        self.d, self.V = np.zeros((ELEMENTS, F)), np.tile(np.eye(F) * 0.3**2, (ELEMENTS, 1, 1))

    def x(self, context: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        z = CONTENT_EF[chosen] + self.d[chosen]
        parts = [np.ones(1), context, z.ravel(), np.einsum("sf,c->sfc", z, context).ravel(), np.outer(*z).ravel()]
        return np.concatenate(parts)

    def particular(self, product: int, context: np.ndarray, chosen: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
        x = np.concatenate([[1.0], context])
        pair = ("pair", int(chosen[0]) * ELEMENTS + int(chosen[1]), np.ones(1))
        return [("product", product, x), *(("element", int(e), x) for e in chosen), pair]

    def rest(self, k: int, terms: list[tuple[str, int, np.ndarray]]) -> float:
        return sum(float(self.mean[t][k, row] @ x) for t, row, x in terms)

    def update(self, rows: Rows, label: torch.Tensor) -> None:
        product, context = rows.product.numpy(), rows.context.double().numpy()
        chosen, y, K = rows.chosen.numpy(), label.numpy(), len(self.memories)
        sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
        keep = [(1 - memory.forget) ** (self.n / 1000) for memory in self.memories]
        X = np.stack([self.x(c, e) for c, e in zip(context, chosen, strict=True)])
        terms = [self.particular(int(p), c, e) for p, c, e in zip(product, context, chosen, strict=True)]
        rest = np.array([[self.rest(k, term) for k in range(K)] for term in terms])
        logits = X @ self.theta.T + rest
        first = sigmoid(logits)
        if self.seen == 0:
            rate = (y.sum() + sigmoid(-3.3)) / (len(y) + 1)
            logits = np.full_like(logits, np.log(rate / (1 - rate)))
        for _ in range(12 if self.seen < self.warm else 1):
            before = logits
            q = sigmoid(logits @ self.weight)
            w = np.maximum(q * (1 - q), 1e-4)
            H = [keep[k] * self.H[k] + X.T @ (X * w[:, None]) for k in range(K)]
            response = w[:, None] * (logits - rest) + y[:, None] - sigmoid(logits)
            g = [keep[k] * self.g[k] + X.T @ response[:, k] for k in range(K)]
            for k in range(K):
                A = H[k] + np.diag(self.precision[k])
                self.theta[k] = np.linalg.solve(A, g[k] + self.precision[k] * self.m0)
            logits = X @ self.theta.T + rest
            if np.abs(logits - before).mean() < 0.02:
                break
        self.H, self.g = np.array(H), np.array(g)
        core = X @ self.theta.T
        for k in range(K):
            for term, c, label_n in zip(terms, core[:, k], y, strict=True):
                p = sigmoid(c + self.rest(k, term))
                v = sum(float((self.var[t][k, row] * x * x).sum()) for t, row, x in term)
                for t, row, x in term:
                    gain = self.var[t][k, row] * x
                    self.mean[t][k, row] += gain * (label_n - p) / (1 + p * (1 - p) * v)
                    self.var[t][k, row] -= gain**2 * p * (1 - p) / (1 + p * (1 - p) * v)
        self.seen += self.n
        if self.seen >= self.due:
            self.due = self.seen + self.every
            self.learn_variances()
        value = np.log(self.weight) + 0.5 * np.log(np.where(y[:, None] > 0, first, 1 - first)).sum(0)
        value = np.exp(value - value.max())
        share = 1 - 0.95 ** (self.n / 1000)
        self.weight = (1 - share) * value / value.sum() + share / K
        if self.seen >= self.warm:
            served = (core + np.array([[self.rest(k, term) for k in range(K)] for term in terms])) @ self.weight
            self.learn_traits(served, context, chosen, y)
        for k, f in enumerate(memory.forget for memory in self.memories):
            for t in self.prior:
                self.mean[t][k] *= (1 - f / 2) ** (self.n / 1000)
                self.var[t][k] = self.prior[t][k] + (self.var[t][k] - self.prior[t][k]) * (1 - f) ** (self.n / 1000)

    def learn_variances(self) -> None:
        for k in range(len(self.memories)):
            posterior = np.diag(np.linalg.inv(self.H[k] + np.diag(self.precision[k])))
            for name in ("content", "content_context", "content_pair"):
                c = self.group[name]
                n = c.stop - c.start
                a = max(4.0, 0.1 * n)
                alike = [j for j, other in enumerate(self.memories) if other.forget == self.memories[k].forget]
                squares = ((self.theta[alike][:, c] ** 2).mean(0) + posterior[c]).sum()
                self.precision[k, c] = (n + a) / (squares + a * self.sd[name] ** 2)

    def learn_traits(self, logit: np.ndarray, context: np.ndarray, chosen: np.ndarray, y: np.ndarray) -> None:
        theta = self.weight @ self.theta
        main = theta[self.group["content"]].reshape(SLOTS, CONTENT)
        by_context = theta[self.group["content_context"]].reshape(SLOTS, CONTENT, CONTEXT)
        pair = theta[self.group["content_pair"]].reshape(CONTENT, CONTENT)
        for eta, c, (a, b), label in zip(logit, context, chosen, y, strict=True):
            z = CONTENT_EF[[a, b]] + self.d[[a, b]]
            g = [main[0] + by_context[0] @ c + pair @ z[1], main[1] + by_context[1] @ c + pair.T @ z[0]]
            u = [self.V[a] @ g[0], self.V[b] @ g[1]]
            v = g[0] @ u[0] + g[1] @ u[1]
            p = 1 / (1 + np.exp(-eta))
            w = p * (1 - p)
            for e, gain in ((a, u[0]), (b, u[1])):
                self.d[e] += gain * (label - p) / (1 + w * v)
                self.V[e] -= np.outer(gain, gain) * w / (1 + w * v)


def test_everything_learned_equals_the_formulas() -> None:
    memories, n = (Memory(), Memory(forget=0.05), Memory(pair_width=4.0)), 200
    settings = {"memories": memories, "warm_examples": 1_000, "variance_every": 1_000}
    model = learned(12, n, **settings)
    reference = Reference(memories, n, warm=1_000, every=1_000)
    rng = np.random.default_rng(0)
    for _ in range(12):
        reference.update(*batch(rng, n))
    effects = model.effects(2, torch.Generator().manual_seed(0), content_size=CONTENT, num_products=PRODUCTS)
    theta = reference.weight @ reference.theta
    for name, columns in reference.group.items():
        np.testing.assert_allclose(effects.mean[name].flatten().numpy(), theta[columns], atol=2e-4)
    assert model.memory_weights == pytest.approx(reference.weight.tolist(), abs=1e-4)
    mean = {t: np.tensordot(reference.weight, reference.mean[t], 1) for t in reference.mean}
    np.testing.assert_allclose(effects.product, mean["product"], atol=2e-4)
    np.testing.assert_allclose(effects.element, mean["element"], atol=2e-4)
    variance = np.tensordot(reference.weight, reference.var["element"], 1)
    np.testing.assert_allclose(effects.element_sd, np.sqrt(variance), atol=1e-4)
    for (a, b), value in zip(effects.pairs, effects.pair, strict=True):
        assert value == pytest.approx(mean["pair"][a * ELEMENTS + b, 0], abs=2e-4)
    np.testing.assert_allclose(effects.trait, reference.d, atol=2e-4)
    covariance = np.einsum("efh,egh->efg", effects.trait_root, effects.trait_root)
    np.testing.assert_allclose(covariance, reference.V, atol=1e-4)


def test_draws_of_the_core_have_the_posterior_covariance() -> None:
    model = learned(5, memories=(Memory(),))
    draws_MD = model._core_draws(4_000, torch.Generator().manual_seed(0)).double()
    precision_DD = model.core._H_JDD[0].double() + torch.diag(model.core._precision(0))
    covariance_DD = torch.linalg.inv(precision_DD) * model.settings.thompson_scale**2
    error_MD = draws_MD - model._core_mean()
    # Mahalanobis distances of D-dimensional normals: mean D, here within 4 % (their mean has deviation .4 %).
    distance = (error_MD @ torch.linalg.inv(covariance_DD) * error_MD).sum(1).mean()
    assert float(distance) == pytest.approx(model.layout.size, rel=0.04)


def test_growing_changes_no_prediction() -> None:
    model = learned(8, warm_examples=200)
    rows, _ = batch(np.random.default_rng(1), 30)
    before = model.predict(rows)
    model.grow(slots=3, content=3, context=5, products=9, elements=12)
    wide = Rows(
        rows.product,
        torch.nn.functional.pad(rows.context, (0, 2)),
        torch.nn.functional.pad(rows.chosen, (0, 1), value=-1),
        torch.nn.functional.pad(rows.content, (0, 1, 0, 1)),
    )
    torch.testing.assert_close(model.predict(wide), before, atol=1e-6, rtol=1e-5)
    model.learn(wide, torch.zeros(30), torch.ones(30))
    assert torch.isfinite(model.predict(wide)).all()


def test_names_and_columns_that_come_one_by_one_find_room() -> None:
    model = learned(2)
    for number in range(1, 12):
        names = {"products": PRODUCTS + number, "elements": ELEMENTS + number}
        for columns in (CONTEXT + number - 1, CONTEXT + number):
            model.grow(**SIZES | names | {"context": columns})
    effects = model.effects(2, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS + 11)
    assert effects.product.shape == (PRODUCTS + 11, 1 + CONTEXT + 11)
    assert effects.element.shape == effects.element_sd.shape == (ELEMENTS + 11, 1 + CONTEXT + 11)
    assert effects.trait.shape == (ELEMENTS + 11, CONTENT)


def test_names_that_are_gone_leave_nothing_to_those_that_take_their_rows() -> None:
    model = learned(10, warm_examples=200)
    effects = model.effects(2, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS)
    assert abs(effects.element[1]).max() > 0
    model.reset(Freed(elements=(1,), products=(2,)))
    after = model.effects(2, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS)
    assert not after.element[1].any()
    assert not after.trait[1].any()
    assert not after.product[2].any()
    assert 1 not in after.pairs
    # The others are as they were.
    np.testing.assert_array_equal(np.delete(after.element, 1, 0), np.delete(effects.element, 1, 0))
    kept = ~(effects.pairs == 1).any(1)
    np.testing.assert_array_equal(after.pairs, effects.pairs[kept])
    np.testing.assert_array_equal(after.pair, effects.pair[kept])


def test_slots_and_context_columns_that_are_gone_begin_anew_and_change_no_other_prediction() -> None:
    model = learned(10, warm_examples=200)
    rows, _ = batch(np.random.default_rng(1), 30)
    bare = Rows(rows.product, rows.context * torch.tensor([1.0, 0.0, 1.0]), rows.chosen, rows.content)
    bare.chosen[:, 1] = -1
    bare.content[:, 1] = 0.0
    before = model.predict(bare)
    model.reset(Freed(slots=(1,), context=(1,)))
    torch.testing.assert_close(model.predict(bare), before, atol=1e-6, rtol=1e-5)
    effects = model.effects(2, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS)
    for name in ("content", "content_context"):
        assert effects.mean[name][0].abs().max() > 0
        assert not effects.mean[name][1].any()
    assert not effects.mean["content_pair"].any()
    assert not effects.mean["content_context"][:, :, 1].any()
    assert not effects.mean["context"][1]
    assert not effects.product[:, 2].any()
    model.learn(rows, torch.zeros(30), torch.ones(30))
    # What the others know is kept through the next update, too.
    assert float((torch.logit(model.predict(bare)) - torch.logit(before)).abs().max()) < 0.5


def test_pairs_beyond_their_limit_push_out_those_that_were_not_seen_for_longest() -> None:
    model = RewardModel(RewardModelSettings(rest=RestSettings(max_pairs=4)))
    model.grow(**SIZES)
    rng = np.random.default_rng(0)
    for pairs in ([(0, 3), (0, 4), (1, 3), (1, 4)], [(0, 3), (0, 4), (1, 3)], [(2, 5), (0, 3)]):
        chosen = np.array(pairs * 20)
        rows = Rows(
            torch.zeros(len(chosen), dtype=torch.int64),
            torch.from_numpy(rng.standard_normal((len(chosen), CONTEXT))).float(),
            torch.from_numpy(chosen),
            torch.from_numpy(CONTENT_EF[chosen]).float(),
        )
        model.learn(rows, torch.ones(len(chosen)), torch.ones(len(chosen)))
    effects = model.effects(1, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS)
    found = {tuple(pair): value for pair, value in zip(effects.pairs.tolist(), effects.pair, strict=True)}
    assert found.keys() == {(0, 3), (0, 4), (1, 3), (2, 5)}
    assert found[0, 3] > found[0, 4] > 0


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.2, 0.6])
def test_predictions_are_calibrated_from_the_first_batches_at_any_click_rate(rate: float) -> None:
    model = RewardModel()
    model.grow(**SIZES)
    rng = np.random.default_rng(3)
    for _ in range(4):
        rows, _ = batch(rng, 1_000)
        model.learn(rows, torch.from_numpy((rng.random(1_000) < rate).astype(np.float64)), torch.ones(1_000))
    rows, _ = batch(rng, 1_000)
    deviation = (rate * (1 - rate) / 4_000) ** 0.5
    assert float(model.predict(rows).mean()) == pytest.approx(rate, abs=4 * deviation)


def test_weight_zero_teaches_nothing() -> None:
    model = learned(3, memories=(Memory(),))
    rows, label_N = batch(np.random.default_rng(5), 100)
    before = model.predict(rows)
    model.learn(rows, label_N, torch.zeros(100))
    torch.testing.assert_close(model.predict(rows), before, atol=1e-6, rtol=1e-5)


def test_core_without_learned_variances_keeps_those_it_began_with() -> None:
    moved = learned(5, variance_every=200)
    kept = learned(5, variance_every=200, core=CoreSettings(learn_variances=False))
    start = kept.core._starting_variance()
    torch.testing.assert_close(kept.core._variance_JG, start.repeat(2, 1))
    assert not torch.allclose(moved.core._variance_JG, start)


def test_extreme_rows_are_mended_with_jitter_and_stay_finite() -> None:
    model = learned(2)
    rows, label_N = batch(np.random.default_rng(5), 100)
    huge = Rows(rows.product, rows.context * 1e4, rows.chosen, rows.content * 1e3)
    model.learn(huge, label_N, torch.ones(100))
    assert torch.isfinite(model.predict(rows)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_rows_leave_the_model_as_it_was(bad: float) -> None:
    model = learned(8, warm_examples=200)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    rows, label_N = batch(np.random.default_rng(5), 10)
    wrong = Rows(rows.product, rows.context * bad, rows.chosen, rows.content)
    with pytest.raises(FloatingPointError, match="nothing learned"):
        model.learn(wrong, label_N, torch.ones(10))
    after = model.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_restored_model_goes_on_bit_for_bit() -> None:
    whole, first = learned(12, warm_examples=600), learned(6, warm_examples=600)
    second = RewardModel(RewardModelSettings(warm_examples=600))
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()}, first.state())
    rng = np.random.default_rng(0)
    for number in range(12):
        rows, label_N = batch(rng, 200)
        if number >= 6:
            second.learn(rows, label_N, torch.ones(200))
    assert second.state() == whole.state()
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in whole.tensors().items())


def test_provisional_weights_undo_the_bias_of_not_waiting() -> None:
    """With click rate p and late share q, weighted negatives and all positives give back the rate p."""
    p, q = 0.04, 0.3
    negatives, positives = 1 - p * (1 - q), p
    weight = float(provisional_weight(torch.tensor([p]), q))
    assert positives / (positives + weight * negatives) == pytest.approx(p)
    assert float(provisional_weight(torch.tensor([p]), 0.0)) == 1.0
