"""The whole learner with a small planted world: it learns, repeats itself, and goes on after a restart."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from learner import online
from learner.online import LearnerSettings, OnlineLearner
from serving.policy import Choice, DecisionRequest, Policy, UniformPolicy
from streams.contracts.catalog import Element, Product
from streams.contracts.codec import encode_context
from streams.contracts.examples import ExampleBatch
from streams.contracts.growing import FeatureLimits
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import PolicySnapshot, unpack_tensors, verify
from tests.builders import changed

KEY = b"k" * 32
SMALL = LearnerSettings(num_draws=16, features=FeatureLimits(content_size=4))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over several threads differ in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class World:
    """Six products with three slots of five elements, whose effects come from content, pairs and the device."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.z = rng.standard_normal((3, 5, 3))
        self.main, self.device = 0.25 * rng.standard_normal((3, 3)), 0.25 * rng.standard_normal((2, 3, 3))
        self.pair, self.appeal = 0.15 * rng.standard_normal((3, 3, 3, 3)), 0.5 * rng.standard_normal(6)
        names = {s: tuple(f"{s}{e}" for e in range(5)) for s in "abc"}
        self.products = {f"p{i}": Product(product_id=f"p{i}", slots=names) for i in range(6)}
        self.elements = {
            f"{s}{e}": Element(element_id=f"{s}{e}", slot=s, features=tuple(self.z[i, e]))
            for i, s in enumerate("abc")
            for e in range(5)
        }

    def requests(self, rng: np.random.Generator, n: int) -> list[DecisionRequest]:
        ids, devices = list(self.products), ("ios", "web")
        out = []
        for product, device, seed in zip(
            rng.integers(6, size=n), rng.integers(2, size=n), rng.integers(2**62, size=n), strict=True
        ):
            slots = {s: list(names) for s, names in self.products[ids[product]].slots.items()}
            out.append(DecisionRequest(ids[product], {"device": devices[device]}, slots, {}, int(seed)))
        return out

    def click_probability(self, request: DecisionRequest, creative: dict[str, str]) -> float:
        z = [self.z[s, int(e[1])] for s, e in enumerate(creative.values())]
        w = self.main + self.device[int(request.context["device"] == "web")]
        logit = -3.0 + self.appeal[int(request.product_id[1])] + sum(z[s] @ w[s] for s in range(3))
        logit += sum(z[s] @ self.pair[s, t] @ z[t] for t in range(3) for s in range(t))
        return float(1 / (1 + np.exp(-logit)))


def batch_of(requests: list[DecisionRequest], choices: list[Choice], label: Any, number: int) -> ExampleBatch:
    n = len(requests)
    return ExampleBatch.from_columns(
        {
            "decision_id": [f"{number}.{i}" for i in range(n)],
            "occurred_at_ms": 1_000 * number + np.arange(n),
            "product_id": [r.product_id for r in requests],
            "context": [encode_context(dict(r.context)) for r in requests],
            "candidates": [r.candidates for r in requests],
            "creative": [c.creative for c in choices],
            "slot_propensities": [c.slot_propensities for c in choices],
            "propensity": [c.propensity for c in choices],
            "model_id": ["m"] * n,
            "epoch": [0] * n,
            "policy_version": [0] * n,
            "source": ["policy"] * n,
            "holdout": [c.holdout for c in choices],
            "seed": [0] * n,
            "survival_probability": [1.0] * n,
            "label": np.asarray(label, np.int8),
            "reward": np.asarray(label, np.float64),
            "label_kind": ["final"] * n,
            "delay_ms": [None] * n,
        }
    )


def snapshot_of(learner: OnlineLearner, **changes: Any) -> PolicySnapshot:
    values: dict[str, Any] = {
        "model_id": "m",
        "epoch": 1,
        "version": learner.num_updates,
        "parent_sha256": None,
        "trained_through": {"0": 5},
        "due_ms_quantiles": [],
        "created_at_ms": 9,
        "signing_key": KEY,
    }
    return learner.snapshot(**values | changes)


def batches(num: int, n: int, seed: int = 1) -> list[ExampleBatch]:
    """Batches of uniform play, so that they do not depend on the learner."""
    world, rng = World(), np.random.default_rng(seed)
    out = []
    for number in range(num):
        requests = world.requests(rng, n)
        choices = UniformPolicy().choose(requests)
        p = np.array([world.click_probability(r, c.creative) for r, c in zip(requests, choices, strict=True)])
        out.append(batch_of(requests, choices, rng.random(n) < p, number))
    return out


def learner_of(settings: LearnerSettings = SMALL) -> OnlineLearner:
    learner, world = OnlineLearner(settings), World()
    learner.apply_catalog(world.elements, world.products)
    return learner


def play(world: World, rounds: int, n: int) -> tuple[list[float], list[float], list[PolicySnapshot]]:
    """Return the true click rates, served and uniform, of each round of a closed loop, and the snapshots."""
    learner, rng = learner_of(), np.random.default_rng(0)
    policy: Policy | UniformPolicy = UniformPolicy()
    served, uniform, snapshots = [], [], []
    for number in range(rounds):
        requests = world.requests(rng, n)
        choices = policy.choose(requests)
        p = np.array([world.click_probability(r, c.creative) for r, c in zip(requests, choices, strict=True)])
        others = UniformPolicy().choose(requests)
        uniform.append(np.mean([world.click_probability(r, c.creative) for r, c in zip(requests, others, strict=True)]))
        served.append(p.mean())
        learner.update(batch_of(requests, choices, rng.random(n) < p, number))
        parent = snapshots[-1].manifest.sha256 if snapshots else None
        snapshots.append(snapshot_of(learner, parent_sha256=parent))
        policy = Policy.from_snapshot(snapshots[-1].blob, snapshots[-1].manifest)
    return served, uniform, snapshots


def test_closed_loop_click_rate_ends_clearly_above_uniform() -> None:
    served, uniform, snapshots = play(World(), rounds=25, n=800)
    # True click rates, so chance enters only through what was learned; the seeds are fixed.
    assert np.mean(served[-5:]) > 1.5 * np.mean(uniform)
    verify(snapshots[-1].manifest, snapshots[-1].blob, KEY)
    assert all(s.manifest.gate.accepted for s in snapshots)
    assert snapshots[-1].manifest.gate.numbers["calibration"] == pytest.approx(1.0, abs=0.25)
    assert snapshots[-1].manifest.metrics["normalized_entropy"] < 1.0


def test_same_batches_give_the_same_bytes() -> None:
    one, two = learner_of(), learner_of()
    for batch in batches(4, 200):
        one.update(batch)
        two.update(batch)
    assert snapshot_of(one).manifest.sha256 == snapshot_of(two).manifest.sha256
    other = learner_of(LearnerSettings(seed=1, num_draws=16, features=FeatureLimits(content_size=4)))
    for batch in batches(4, 200):
        other.update(batch)
    assert snapshot_of(other).manifest.sha256 != snapshot_of(one).manifest.sha256


@pytest.mark.parametrize("n", [200, 1_200])
def test_restored_learner_goes_on_bit_for_bit(n: int) -> None:
    """With 1,200 examples a batch, prior variances have just been learned when the state is taken."""
    log = batches(12, n)
    whole, first, second = learner_of(), learner_of(), OnlineLearner(SMALL)
    for batch in log:
        whole.update(batch)
    for batch in log[:9]:
        first.update(batch)
    tensors, state = first.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    second.restore(saved, json.loads(json.dumps(state)))
    assert snapshot_of(second).manifest.sha256 == snapshot_of(first).manifest.sha256
    for batch in log[9:]:
        second.update(batch)
    assert snapshot_of(second).manifest.sha256 == snapshot_of(whole).manifest.sha256
    # Duplicates are known after a restart, too.
    assert second.update(log[3]).skipped == {"duplicate": n}


def test_snapshot_changes_nothing_that_is_learned() -> None:
    one, two = learner_of(), learner_of()
    for batch in batches(3, 150):
        one.update(batch)
        snapshot_of(one)
        two.update(batch)
    assert snapshot_of(one).manifest.sha256 == snapshot_of(two).manifest.sha256


def test_snapshot_before_any_example_can_be_played() -> None:
    for learner in (OnlineLearner(SMALL), learner_of()):
        snapshot = snapshot_of(learner)
        policy = Policy.from_snapshot(snapshot.blob, snapshot.manifest)
        requests = World().requests(np.random.default_rng(0), 5)
        assert all(0 < choice.propensity <= 1 for choice in policy.choose(requests))
        assert snapshot.manifest.gate.accepted


def test_bad_rows_are_skipped_with_a_reason_and_the_rest_is_learned() -> None:
    (batch,) = batches(1, 100)
    nowhere = {"a": "nowhere", "b": "b0", "c": "c0"}
    batch = changed(batch, propensity={3: np.nan}, creative={4: nowhere}, label={5: 7})
    report = learner_of().update(batch)
    assert report.skipped == {"bad_propensity": 1, "bad_creative": 1, "bad_label": 1}
    assert report.num_learned == 97


def test_empty_batch_and_batch_of_duplicates_change_nothing() -> None:
    learner = learner_of()
    (batch,) = batches(1, 50)
    learner.update(batch)
    before = snapshot_of(learner).manifest.sha256
    assert learner.update(batch.take([])).num_learned == 0
    assert learner.update(batch).num_learned == 0
    assert snapshot_of(learner).manifest.sha256 == before


def test_late_clicks_are_learned_and_move_the_late_share() -> None:
    learner = learner_of()
    (batch,) = batches(1, 400)
    clicked = np.flatnonzero(batch.label)
    learner.update(changed(batch, label=[0] * 400, label_kind=["provisional"] * 400))
    before = learner.late_share
    late = changed(batch.take(clicked), label_kind=["late_positive"] * len(clicked))
    report = learner.update(late)
    assert report.num_learned == len(clicked) > 0
    assert learner.late_share > before
    # Each impression counts once, its late click with it.
    assert report.metrics["ctr"] == pytest.approx(len(clicked) / 400)


def test_late_click_replaces_the_loss_of_the_negative_that_it_was() -> None:
    learner = learner_of()
    (batch,) = batches(1, 50)
    learner.update(changed(batch, label=[0] * 50, label_kind=["provisional"] * 50))
    before = learner.newest_validation
    assert (before.num_examples, before.num_clicks) == (50, 0)
    learner.update(changed(batch.take([7]), label=[1], label_kind=["late_positive"]))
    correction = learner.newest_validation
    assert (correction.num_examples, correction.num_clicks, correction.expected_clicks) == (0, 1, 0)
    # -log p + log(1 - p), at the probability of now: positive as long as a click is less likely than none.
    odds = np.exp(-correction.log_loss)
    assert 0 < odds / (1 + odds) < 0.2
    assert learner.metrics()["log_loss"] == pytest.approx((before.log_loss + correction.log_loss) / 50)


@pytest.mark.parametrize("size", [50, 299, 1_000])
def test_generator_makes_a_step_for_so_many_examples_whatever_the_updates_are(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    steps = []
    real = online.train_step

    def counted(*arguments: Any) -> Any:
        steps.append(learner.num_updates)
        return real(*arguments)

    monkeypatch.setattr(online, "train_step", counted)
    learner = learner_of()
    for batch in batches(-(-1_000 // size), size):
        learner.update(batch)
    learned = learner.reward_model.num_examples
    assert len(steps) == learned // SMALL.generator.examples_per_step
    restored = learner_of()
    restored.restore(*learner.state())
    assert restored._stepless == learned % SMALL.generator.examples_per_step


def test_new_products_slots_and_elements_are_learned_without_a_catalog() -> None:
    learner = learner_of()
    (batch,) = batches(1, 60)
    learner.update(batch)
    batch = changed(
        batch,
        product_id=["brand-new"] * 30,
        candidates=[{"a": ["a0", "fresh"], "banner": ["x", "y"]}] * 30,
        creative=[{"a": "fresh", "banner": "x"}] * 30,
        decision_id=[f"again.{i}" for i in range(60)],
    )
    assert learner.update(batch).num_learned == 60
    tensors = unpack_tensors(snapshot_of(learner).blob)
    assert tensors["draws.content"].shape[1] == 4
    assert tensors["product"].shape[0] == 7


def test_flood_of_names_is_counted_and_bounded() -> None:
    learner = OnlineLearner(LearnerSettings(num_draws=4, features=FeatureLimits(max_products=3, max_context_columns=5)))
    (batch,) = batches(1, 80)
    contexts = [encode_context({"who": f"user-{i}"}) for i in range(80)]
    report = learner.update(changed(batch, product_id=[f"flood-{i}" for i in range(80)], context=contexts))
    assert report.skipped["unknown_product_full"] > 0
    assert report.skipped["unknown_context_full"] > 0
    assert len(learner.features.freeze().products) == 3
    assert learner.reward_model.layout.context == 5


def test_learner_follows_the_process_settings() -> None:
    settings = LearnSettings.model_construct(seed=5, particles=7, epsilon=0.2, attribution_window_ms=1_000)
    made = LearnerSettings.from_settings(settings)
    assert (made.seed, made.num_draws, made.epsilon, made.horizon_ms) == (5, 7, 0.2, 3_000)
    assert snapshot_of(learner_of(made)).blob


def test_snapshot_that_is_not_finite_is_never_made() -> None:
    learner = learner_of()
    learner.update(batches(1, 50)[0])
    learner.generator.weights["slot"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        snapshot_of(learner)


def test_learner_that_knows_no_name_yet_has_a_policy_all_the_same() -> None:
    learner = OnlineLearner(LearnerSettings(num_draws=4, features=FeatureLimits(min_seen=1_000)))
    batch = batches(1, 50)[0]
    report = learner.update(batch)
    assert report.num_learned == 50
    spec = learner.features.freeze()
    assert (spec.products, spec.elements, spec.slots) == ((), (), ())
    assert snapshot_of(learner).blob
    request = DecisionRequest(product_id="p0", context={}, candidates={"title": ["a", "b"]}, seed=3)
    (choice,) = learner.policy().choose([request])
    assert 0 < choice.propensity < 1
