"""The policy's propensities are exact, its choices repeatable, and its parts agree with the definition."""

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from serving.policy import DecisionRequest, Policy, PolicySettings, UniformPolicy
from streams.contracts.catalog import Element
from streams.contracts.encoders import ContentEncoder
from streams.contracts.growing import GrowingFeatureSpec
from streams.contracts.snapshot import (
    GateVerdict,
    SnapshotError,
    SnapshotManifest,
    pack_pairs,
    pack_tensors,
    unpack_pairs,
)

SLOTS = {"title": ("t0", "t1", "t2"), "image": ("i0", "i1"), "tag": ("g0", "g1", "g2", "g3")}
DRAWS, WIDTH, HIDDEN = 12, 5, 7


def spec_of() -> Any:
    features = GrowingFeatureSpec()
    for device in ("ios", "web"):
        features.context({"device": device})
    for product in ("p0", "p1"):
        features.product(product)
    for slot, ids in SLOTS.items():
        for element_id in ids:
            features.element(slot, element_id)
    return features.freeze()


def tensors_of(seed: int = 0, scale: float = 0.6) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    spec = spec_of()
    num_slots, size, num_elements = len(spec.slots), spec.content_size, len(spec.elements)
    columns, products, pairs = len(spec.context), len(spec.products), num_slots * (num_slots - 1) // 2
    width = size - 1  # fewer numbers stand in pairs
    shapes = {
        "content": (num_slots, size),
        "content_context": (num_slots, size, columns),
        "content_pair": (pairs, width, width),
    }
    particular = {
        "mean.bias": (1,),
        "mean.context": (columns,),
        "product": (products, 1 + columns),
        "element": (num_elements, 1 + columns),
        "trait": (num_elements, size),
        "trait_root": (num_elements, size, size),
    }
    generator = {
        "content": (size, WIDTH),
        "element": (num_elements, WIDTH),
        "slot": (num_slots, WIDTH),
        "context": (num_slots, columns, WIDTH),
        "product": (products, WIDTH),
        "chosen": (num_slots, num_slots, WIDTH, WIDTH),
        "hidden_in": (WIDTH, HIDDEN),
        "hidden_bias": (HIDDEN,),
        "hidden_out": (HIDDEN, WIDTH),
    }
    out = {f"mean.{name}": scale * rng.standard_normal(shape) for name, shape in shapes.items()}
    out |= {f"draws.{n}": out[f"mean.{n}"] + 0.5 * scale * rng.standard_normal((DRAWS, *s)) for n, s in shapes.items()}
    out |= {f"generator.{name}": 0.4 * rng.standard_normal(shape) for name, shape in generator.items()}
    out |= {name: scale * rng.standard_normal(shape) for name, shape in particular.items()}
    out["element_content"] = 0.5 * rng.standard_normal((num_elements, size))
    out["element_sd"] = scale * rng.random((num_elements, 1 + columns))
    together = np.array([(0, 3), (4, 1), (2, 6)])
    out["pair"] = scale * rng.standard_normal(len(together))
    out["pair_sd"] = scale * rng.random(len(together))
    encoder = {f"encoder.{name}": array for name, array in ContentEncoder(size).tensors().items()}
    floats = {name: np.asarray(array, np.float32) for name, array in out.items()}
    return floats | encoder | {"pairs": pack_pairs(together)}


def policy_of(epsilon: float = 0.1, **changes: Any) -> Policy:
    return Policy(spec_of(), tensors_of(), PolicySettings(epsilon=epsilon, **changes), "sha")


def request_of(seed: int = 0, **changes: Any) -> DecisionRequest:
    values: dict[str, Any] = {"product_id": "p1", "context": {"device": "web"}, "candidates": SLOTS, "seed": seed}
    return DecisionRequest(**values | changes)


def creatives(candidates: Any = SLOTS) -> list[dict[str, str]]:
    return [dict(zip(candidates, ids, strict=True)) for ids in itertools.product(*candidates.values())]


def logit(
    tensors: dict[str, np.ndarray[Any, Any]], request: DecisionRequest, creative: dict[str, str], m: int
) -> float:
    """The creative logit of draw m, written down from the definition."""
    spec, settings = spec_of(), PolicySettings()
    context = spec.context_row(request.context)
    chosen = [(spec.slot_index[s], spec.element_index[spec.slot_index[s], e]) for s, e in creative.items()]
    num_elements, size = tensors["element_content"].shape
    normal = np.random.default_rng(settings.noise_seed).standard_normal((num_elements, size + 1, DRAWS), np.float32)
    normal = settings.thompson_scale * normal[:, :, m]
    content, own = tensors["element_content"] + tensors["trait"], tensors["element"][:, 0].copy()
    content = content + np.einsum("efg,eg->ef", tensors["trait_root"], normal[:, :size])
    own += tensors["element_sd"][:, 0] * normal[:, size]
    pairs = dict(zip(map(frozenset, unpack_pairs(tensors["pairs"]).tolist()), tensors["pair"], strict=True))
    total = 0.0
    for s, e in chosen:
        weights = tensors["draws.content"][m, s] + tensors["draws.content_context"][m, s] @ context
        total += float(content[e] @ weights + own[e] + tensors["element"][e, 1:] @ context)
    for (s, a), (t, b) in itertools.combinations(sorted(chosen), 2):
        pair = tensors["draws.content_pair"][m, t * (t - 1) // 2 + s]
        total += float(content[a][: len(pair)] @ pair @ content[b][: len(pair)])
        total += float(pairs.get(frozenset((a, b)), 0.0))
    return total


EXPLORED = pytest.mark.parametrize("explored", [1.0, 0.25, 0.0])


@EXPLORED
def test_propensities_of_all_creatives_add_up_to_one(explored: float) -> None:
    policy, request = policy_of().exploring(explored), request_of()
    joint = [policy.propensity(request, creative)[1] for creative in creatives()]
    assert sum(joint) == pytest.approx(1.0, abs=1e-12)
    assert min(joint) == pytest.approx(0.1 / 24)


@EXPLORED
def test_slot_propensities_multiply_to_the_joint_and_are_conditionals(explored: float) -> None:
    policy, request = policy_of().exploring(explored), request_of()
    joint = {tuple(c.values()): policy.propensity(request, c)[1] for c in creatives()}
    for creative in creatives():
        slots, whole = policy.propensity(request, creative)
        assert math.prod(slots.values()) == pytest.approx(whole, rel=1e-12)
        title, image, _ = creative.values()
        both = sum(p for key, p in joint.items() if key[:2] == (title, image))
        first = sum(p for key, p in joint.items() if key[0] == title)
        assert slots["title"] == pytest.approx(first, rel=1e-9)
        assert slots["image"] == pytest.approx(both / first, rel=1e-9)


@EXPLORED
def test_propensity_equals_the_frequency_over_seeds(explored: float) -> None:
    policy, n = policy_of().exploring(explored), 20_000
    choices = policy.choose([request_of(seed) for seed in range(n)])
    counts: dict[tuple[str, ...], int] = {}
    for choice in choices:
        key = tuple(choice.creative.values())
        counts[key] = counts.get(key, 0) + 1
    expected = {tuple(c.values()): n * policy.propensity(request_of(), c)[1] for c in creatives()}
    assert (max(expected.values()) > n * 0.9 * (1 - explored)) or explored == 1.0
    chi2 = sum((counts.get(key, 0) - e) ** 2 / e for key, e in expected.items())
    # 23 degrees of freedom: above 75 in one run of 5 million; the seeds are fixed.
    assert chi2 < 75
    assert np.mean([c.holdout for c in choices]) == pytest.approx(0.1, abs=0.012)  # five standard deviations and more
    assert all(c.propensity == policy.propensity(request_of(), c.creative)[1] for c in choices[:50])


def test_each_draw_finds_the_best_creative_of_its_own_effects() -> None:
    """Coordinate ascent may end in a local optimum; after the relay it does so for few draws."""
    tensors, request = tensors_of(), request_of()
    (winners,) = policy_of().winners([request])
    hits = 0
    for m, places in enumerate(winners):
        values = {tuple(c.values()): logit(tensors, request, c, m) for c in creatives()}
        won = tuple(ids[a] for ids, a in zip(SLOTS.values(), places, strict=True))
        hits += values[won] > max(values.values()) - 1e-4
    assert hits >= 0.8 * DRAWS


def test_same_request_and_seed_give_the_same_choice_whatever_the_batch() -> None:
    requests = [
        request_of(s, product_id=f"p{s % 3}", context={"device": ("ios", "web", "tv")[s % 3], "x": s})
        for s in range(150)
    ]
    alone = policy_of()
    one_by_one = [alone.choose([request])[0] for request in requests]
    assert policy_of().choose(requests) == one_by_one
    assert alone.choose(requests[::-1]) == one_by_one[::-1]


def test_order_of_the_context_does_not_matter_but_the_seed_does() -> None:
    policy = policy_of()
    one = request_of(3, context={"device": "web", "n": 1})
    two = request_of(3, context={"n": 1, "device": "web"})
    assert policy.choose([one]) == policy.choose([two])
    assert len({tuple(policy.choose([request_of(s)])[0].creative.values()) for s in range(60)}) > 1


def test_without_draws_that_agree_epsilon_is_all_that_is_left() -> None:
    policy = policy_of(epsilon=1.0)
    assert policy.propensity(request_of(), creatives()[5])[1] == pytest.approx(1 / 24)
    assert all(choice.holdout for choice in policy.choose([request_of(s) for s in range(20)]))


def test_unknown_product_context_slot_and_elements_are_decided() -> None:
    candidates = {"title": ("t0", "new"), "banner": ("b0", "b1", "b2")}
    policy = policy_of()
    request = request_of(candidates=candidates, product_id="?", context={"planet": "mars", "x": float("nan")})
    choices = policy.choose([request_of(s, candidates=candidates, product_id="?") for s in range(50)])
    assert {tuple(c.creative) for c in choices} == {("title", "banner")}
    joint = [policy.propensity(request, creative)[1] for creative in creatives(candidates)]
    assert sum(joint) == pytest.approx(1.0, abs=1e-12)


def test_content_in_the_request_speaks_for_an_unseen_element() -> None:
    """The best content there is under the mean, with only content effects, must win over one without content."""
    tensors = tensors_of()
    for name in tensors:
        if name.endswith(("content_pair", "content_context", "element", "element_sd", "trait", "trait_root", "pair")):
            tensors[name] = np.zeros_like(tensors[name])
        if name.startswith("draws.") and name.removeprefix("draws.") in ("content",):
            tensors[name] = np.repeat(tensors["mean.content"][None], DRAWS, 0)
    policy = Policy(spec_of(), tensors, PolicySettings(epsilon=0.01))
    best = 4.0 * np.sign(tensors["mean.content"][0])
    content = {"new": Element(element_id="new", slot="title", features=tuple(float(x) for x in best))}
    candidates = {"title": ("t0", "new", "other")}
    _, joint = policy.propensity(request_of(candidates=candidates, content=content), {"title": "new"})
    assert joint > 0.99
    _, without = policy.propensity(request_of(candidates=candidates), {"title": "new"})
    assert without < 0.5


def test_slots_of_one_card_may_come_in_any_order() -> None:
    turned = dict(reversed(SLOTS.items()))
    policy = policy_of()
    one = {tuple(sorted(c.items())): policy.propensity(request_of(), c)[1] for c in creatives()}
    two = [policy.propensity(request_of(candidates=turned), c)[1] for c in creatives(turned)]
    assert sum(two) == pytest.approx(1.0, abs=1e-12)
    assert list(policy.choose([request_of(candidates=turned)])[0].creative) == list(turned)
    assert len(one) == len(two)


def test_credits_add_up_to_the_creative_logit_of_the_mean() -> None:
    tensors = tensors_of()
    for name in ("trait_root", "element_sd"):
        tensors[name] = np.zeros_like(tensors[name])
    request, creative = request_of(), creatives()[7]
    policy, doubled = (Policy(spec_of(), tensors, PolicySettings(thompson_scale=scale), "sha") for scale in (0.2, 0.4))
    credits = policy.credits(request, creative)
    mean = {name.replace("mean.", "draws."): w[None] for name, w in tensors.items() if name.startswith("mean.")}
    whole = logit(tensors | mean, request, creative, 0)
    assert sum(c.credit for c in credits.values()) == pytest.approx(whole, abs=1e-4)
    context = spec_of().context_row(request.context)
    appeal = float(tensors["mean.bias"][0] + tensors["product"][1, 0])
    appeal += float(context @ (tensors["mean.context"] + tensors["product"][1, 1:]))
    expected = 1 / (1 + math.exp(-(whole + appeal)))
    assert policy.expected_ctr(request, creative) == pytest.approx(expected, abs=1e-5)
    for choice in policy.choose([request_of(seed) for seed in range(8)]):
        assert choice.expected_ctr == pytest.approx(policy.expected_ctr(request, choice.creative), abs=1e-6)
    assert all(credit.sd > 0 for credit in credits.values())
    # The draws are spread by the Thompson scale; what is shown is the posterior's own deviation.
    assert doubled.credits(request, creative)["title"].sd == pytest.approx(credits["title"].sd / 2)


def test_effects_of_pairs_are_left_out_of_wide_cards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, creative = tensors_of(), creatives()[0]
    index = [spec_of().element_index[s, e] for s, e in enumerate(creative.values())]
    tensors["pairs"], tensors["pair"] = pack_pairs(np.array([index[:2]])), np.array([2.0], np.float32)
    tensors["pair_sd"] = np.zeros(1, np.float32)
    with_pairs = Policy(spec_of(), tensors, PolicySettings()).credits(request_of(), creative)
    monkeypatch.setattr("serving.search.MAX_PAIRED", 5)
    without = Policy(spec_of(), tensors, PolicySettings()).credits(request_of(), creative)
    shares = {slot: with_pairs[slot].credit - without[slot].credit for slot in creative}
    assert list(shares.values()) == pytest.approx([1.0, 1.0, 0.0], abs=1e-5)


def test_caches_stay_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.policy.MAX_SOLVED", 4)
    monkeypatch.setattr("serving.policy.MAX_CARDS", 3)
    monkeypatch.setattr("serving.policy.MAX_DECKS", 1)
    monkeypatch.setattr("serving.search.MAX_CARDS", 2)
    requests = [
        request_of(s, candidates={"title": SLOTS["title"][: 1 + s % 3], "tag": (*SLOTS["tag"][s % 2 :], f"x{s}")})
        for s in range(40)
    ]
    small = policy_of()
    first = small.choose(requests)
    monkeypatch.undo()
    assert first == policy_of().choose(requests)
    assert len(small._solved) <= 4
    assert len(small._cards) <= 3


@pytest.mark.parametrize("candidates", [{}, {"title": ()}, {"title": ("t0", "t0")}])
@pytest.mark.parametrize("policy", [UniformPolicy(), policy_of()])
def test_requests_without_choice_are_refused(policy: Policy | UniformPolicy, candidates: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        policy.choose([request_of(candidates=candidates)])


@pytest.mark.parametrize("creative", [{}, {"title": "t0"}, {"title": "t0", "image": "nope", "tag": "g0"}])
def test_propensity_of_a_creative_outside_the_candidates_is_refused(creative: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"creative fills|no candidate"):
        policy_of().propensity(request_of(), creative)


def test_uniform_policy_is_uniform() -> None:
    choices = Policy.uniform().choose([request_of(seed) for seed in range(6_000)])
    counts = np.unique([tuple(c.creative.values()) for c in choices], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    # 23 degrees of freedom: above 75 in one run of 5 million; the seeds are fixed.
    assert ((counts - 250.0) ** 2 / 250.0).sum() < 75
    assert all(c.propensity == pytest.approx(1 / 24) and c.holdout and c.expected_ctr is None for c in choices)


def blob_of(
    tensors: dict[str, np.ndarray[Any, Any]], spec: bytes | None = None, settings: bytes | None = None
) -> bytes:
    extra = {
        "vocabulary": spec if spec is not None else spec_of().to_json(),
        "settings": settings if settings is not None else msgspec.json.encode(PolicySettings()),
    }
    return pack_tensors(tensors | {name: np.frombuffer(data, np.uint8) for name, data in extra.items()})


def manifest_of(**changes: Any) -> SnapshotManifest:
    values: dict[str, Any] = {
        "model_id": "m",
        "epoch": 0,
        "version": 0,
        "sha256": "sha",
        "num_bytes": 0,
        "feature_spec_hash": spec_of().hash,
        "gate": GateVerdict(accepted=True),
        "created_at_ms": 0,
    }
    return SnapshotManifest(**values | changes)


def test_snapshot_decides_like_the_policy_it_was_made_of() -> None:
    policy = Policy.from_snapshot(blob_of(tensors_of()), manifest_of())
    requests = [request_of(seed) for seed in range(20)]
    assert policy.choose(requests) == policy_of(epsilon=0.01).choose(requests)


@pytest.mark.parametrize(
    ("blob", "manifest"),
    [
        (lambda: blob_of(tensors_of(), spec=b"{}"), {}),
        (lambda: blob_of(tensors_of(), spec=GrowingFeatureSpec().freeze().to_json()), {}),
        (lambda: blob_of(tensors_of(), settings=b'{"epsilon":2}'), {}),
        (lambda: blob_of(tensors_of(), settings=b'{"max_sweeps":1000000}'), {}),
        (lambda: blob_of(tensors_of(), settings=b"[]"), {}),
        (lambda: blob_of(tensors_of()), {"feature_spec_hash": "other"}),
        (lambda: blob_of({k: w for k, w in tensors_of().items() if k != "mean.bias"}), {}),
        (lambda: blob_of(tensors_of() | {"mean.extra": np.zeros(1, np.float32)}), {}),
        (lambda: blob_of(tensors_of() | {"draws.content_pair": np.zeros((DRAWS, 4, 7, 7), np.float32)}), {}),
    ],
)
def test_snapshot_that_contradicts_itself_is_refused(blob: Any, manifest: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError):
        Policy.from_snapshot(blob(), manifest_of(**manifest))


def test_pairs_deviate_in_what_is_explained_and_in_no_draw_that_is_played() -> None:
    tensors = tensors_of()
    index = [spec_of().row_of("title", "t1"), spec_of().row_of("image", "i1")]
    tensors["pairs"], tensors["pair"] = pack_pairs(np.array([index])), np.array([1.0], np.float32)
    known, unsure = (
        Policy(spec_of(), tensors | {"pair_sd": np.array([sd], np.float32)}, PolicySettings(), "sha")
        for sd in (0.0, 3.0)
    )
    requests = [request_of(seed) for seed in range(20)]
    assert known.choose(requests) == unsure.choose(requests)
    context_C = known.spec.context_row({})
    title, image = (list(SLOTS).index(slot) for slot in ("title", "image"))
    first, second = sorted((title, image))
    pairs = [p.card_effects(requests[0], context_C).pair[second][first] for p in (known, unsure)]
    difference_LAB = pairs[1] - pairs[0]
    assert not difference_LAB[-1].any()  # the posterior mean
    moved_AB = difference_LAB[:-1].any(0)
    assert moved_AB.sum() == 1
    assert 1.0 < difference_LAB[:-1, moved_AB].std() < 5.0
