"""The simulated world: its truth is exact, seeded, calibrated, and moves only when told to.

Every random test has a fixed seed, so it passes or fails always; the stated standard errors say what the bounds mean.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from genco import world as world_module
from genco.world import DEVICES, HOURS, SEGMENTS, Requests, World, regret
from genco.world_config import DEMO_WORLD, WorldConfig

SMALL = WorldConfig(
    seed=5, num_products=2, slots=("title", "image", "tag"), elements_per_slot=4, candidates_per_slot=3, content_size=2
)


@pytest.fixture(scope="module")
def demo() -> World:
    return World(DEMO_WORLD)


def all_cells(world: World, hours: range = range(HOURS)) -> Requests:
    """Every product in every context at every hour, once."""
    grid = np.array(
        list(itertools.product(range(world.config.num_products), range(len(DEVICES)), range(len(SEGMENTS)), hours))
    )
    return Requests(product=grid[:, 0], device=grid[:, 1], segment=grid[:, 2], hour=grid[:, 3])


def random_creatives(world: World, requests: Requests, rng: np.random.Generator, now_s: float = 0.0) -> np.ndarray:
    candidates = np.array([world.candidates(product, now_s) for product in range(world.config.num_products)])
    choice = rng.integers(world.config.candidates_per_slot, size=(len(requests), len(world.config.slots)))
    return np.take_along_axis(candidates[requests.product], choice[:, :, None], axis=2)[:, :, 0]


def additive_play(world: World, requests: Requests) -> np.ndarray:
    """The best that a player can do who knows each element's mean effect in its cell, and no pair."""
    candidates = np.array([world.candidates(product, 0.0) for product in range(world.config.num_products)])
    num_slots, width = candidates.shape[1:]
    play = np.empty((len(requests), num_slots), dtype=np.int64)
    combinations = np.array(list(itertools.product(range(width), repeat=num_slots)))
    for row in range(len(requests)):
        numbers = candidates[requests.product[row]][np.arange(num_slots), combinations]
        one = Requests(
            **{
                name: np.full(len(numbers), getattr(requests, name)[row])
                for name in ("product", "device", "segment", "hour")
            }
        )
        probability = world.click_probability(one, numbers, 0.0)
        logit = np.log(probability / (1 - probability))
        for slot in range(num_slots):
            means = [logit[combinations[:, slot] == choice].mean() for choice in range(width)]
            play[row, slot] = candidates[requests.product[row], slot, int(np.argmax(means))]
    return play


def test_same_seed_gives_same_world_and_another_seed_another() -> None:
    one, two, other = World(DEMO_WORLD), World(DEMO_WORLD), World(replace(DEMO_WORLD, seed=99))
    requests = one.requests(np.random.default_rng(1), 50, now_s=0.0)
    again = two.requests(np.random.default_rng(1), 50, now_s=0.0)
    creatives = random_creatives(one, requests, np.random.default_rng(2))

    assert one.catalog(0.0) == two.catalog(0.0)
    assert one.request_dicts(requests, 0.0) == two.request_dicts(again, 0.0)
    assert np.array_equal(one.click_probability(requests, creatives, 0.0), two.click_probability(again, creatives, 0.0))
    assert one.catalog(0.0) != other.catalog(0.0)
    assert not np.allclose(one.uniform(requests, 0.0), other.uniform(requests, 0.0))


def test_truth_does_not_depend_on_the_order_of_questions() -> None:
    config = replace(SMALL, drift_every_s=10.0, new_elements_every_s=15.0)
    forward, late = World(config), World(config)
    times = [0.0, 12.0, 47.0, 160.0, 12.0]  # more eras than are kept, and back
    seen = [forward.best(all_cells(forward), now_s) for now_s in times]

    assert np.array_equal(late.best(all_cells(late), 160.0), seen[3])
    assert np.array_equal(late.best(all_cells(late), 12.0), seen[1])
    assert np.array_equal(seen[1], seen[4])


def test_best_and_uniform_of_a_small_world_are_those_of_brute_force() -> None:
    world = World(SMALL)
    requests = all_cells(world)
    table = []
    for choice in itertools.product(range(3), repeat=3):
        creatives = np.array([world.candidates(p, 0.0)[range(3), choice] for p in range(2)])[requests.product]
        table.append(world.click_probability(requests, creatives, 0.0))

    np.testing.assert_allclose(world.best(requests, 0.0), np.max(table, axis=0), rtol=1e-12)
    np.testing.assert_allclose(world.uniform(requests, 0.0), np.mean(table, axis=0), rtol=1e-12)


def test_best_creative_gets_the_best_rate_and_no_random_one_more(demo: World) -> None:
    rng = np.random.default_rng(3)
    requests = demo.requests(rng, 5_000, now_s=0.0)
    best = demo.best(requests, 0.0)

    np.testing.assert_allclose(
        demo.click_probability(requests, demo.best_creatives(requests, 0.0), 0.0), best, rtol=1e-12
    )
    for _ in range(20):
        creatives = random_creatives(demo, requests, rng)
        assert (demo.click_probability(requests, creatives, 0.0) <= best * (1 + 1e-12)).all()


def test_uniform_is_the_mean_over_random_creatives(demo: World) -> None:
    rng = np.random.default_rng(4)
    requests = demo.requests(rng, 100_000, now_s=0.0)
    difference = demo.click_probability(requests, random_creatives(demo, requests, rng), 0.0) - demo.uniform(
        requests, 0.0
    )
    standard_error = difference.std() / np.sqrt(len(difference))

    assert standard_error < 0.0001  # .25 % of the click rate
    assert abs(difference.mean()) < 4 * standard_error


@pytest.mark.parametrize(
    "config",
    [
        DEMO_WORLD,
        replace(DEMO_WORLD, seed=1, click_rate=0.02, product_sd=1.2),
        replace(DEMO_WORLD, num_products=1, slots=("title",), click_rate=0.3),
        replace(DEMO_WORLD, content_size=64, hidden_traits=6),
    ],
)
def test_uniform_play_has_the_configured_click_rate(config: WorldConfig) -> None:
    world = World(config)
    # calibration draws 200,000 creatives: a standard error of .3 % of the rate
    assert world.uniform(all_cells(world), 0.0).mean() == pytest.approx(config.click_rate, rel=0.012)


def test_default_world_has_much_to_win_and_needs_pairs(demo: World) -> None:
    requests = all_cells(demo, hours=range(12, 13))
    best, uniform = demo.best(requests, 0.0), demo.uniform(requests, 0.0)
    obtained = demo.click_probability(requests, additive_play(demo, requests), 0.0)

    assert 2.5 < best.mean() / uniform.mean() < 3.0
    assert 0.25 < regret(best.sum(), obtained.sum(), uniform.sum()) < 0.6
    assert (obtained > uniform).mean() > 0.95  # yet play without pairs is far better than chance


def test_products_differ_more_than_creatives(demo: World) -> None:
    rng = np.random.default_rng(5)
    requests = demo.requests(rng, 50_000, now_s=0.0)
    probability = demo.click_probability(requests, random_creatives(demo, requests, rng), 0.0)
    logit = np.log(probability / (1 - probability))
    of_product = np.array([logit[requests.product == product].mean() for product in range(DEMO_WORLD.num_products)])
    same_hour_and_context = replace(requests, hour=np.zeros_like(requests.hour))
    uniform = demo.uniform(same_hour_and_context, 0.0)
    appeal = np.log(uniform / (1 - uniform))
    creative = demo.click_probability(same_hour_and_context, random_creatives(demo, requests, rng), 0.0)

    assert of_product.std() > 0.6
    assert of_product.std() > 1.5 * (np.log(creative / (1 - creative)) - appeal).std()


def test_strengths_are_standard_deviations_of_a_card() -> None:
    none = dict.fromkeys(("product_sd", "context_sd", "hour_sd", "content_sd", "own_sd", "pair_sd"), 0.0)
    quiet = WorldConfig(
        **none,
        context_element_sd=0.0,
        num_products=200,
        elements_per_slot=200,
        candidates_per_slot=4,
        slots=("a", "b", "c"),
    )
    for name in (*none, "context_element_sd"):
        world = World(replace(quiet, **{name: 0.5}))
        rng = np.random.default_rng(6)
        requests = world.requests(rng, 20_000, now_s=0.0)
        probability = world.click_probability(requests, random_creatives(world, requests, rng), 0.0)
        assert np.log(probability / (1 - probability)).std() == pytest.approx(0.5, rel=0.25), (
            name
        )  # few devices and segments


def test_hour_moves_the_rate_but_not_the_best_creative(demo: World) -> None:
    requests = demo.requests(np.random.default_rng(7), 500, now_s=0.0)
    night, evening = (replace(requests, hour=np.full(500, hour)) for hour in (8, 20))

    assert np.array_equal(demo.best_creatives(night, 0.0), demo.best_creatives(evening, 0.0))
    assert (demo.best(night, 0.0) < demo.best(evening, 0.0)).all()
    assert (demo.uniform(night, 0.0) < demo.uniform(evening, 0.0)).all()


def test_best_creative_depends_on_product_and_on_context(demo: World) -> None:
    requests = all_cells(demo, hours=range(1))
    best = demo.best_creatives(requests, 0.0)
    of_first = best[requests.product == 0]

    assert len(np.unique(of_first, axis=0)) > 1
    assert len(np.unique(best[(requests.device == 0) & (requests.segment == 0)], axis=0)) > 10


def test_products_have_candidate_subsets_of_their_own(demo: World) -> None:
    catalog = demo.catalog(0.0)
    of_slot = {slot: {e["element_id"] for e in catalog.elements if e["slot"] == slot} for slot in DEMO_WORLD.slots}

    assert [product["product_id"] for product in catalog.products] == [f"p{n}" for n in range(30)]
    for product in catalog.products:
        for slot, candidates in product["slots"].items():
            assert len(set(candidates)) == 6
            assert set(candidates) <= of_slot[slot]
    assert len({tuple(product["slots"]["title"]) for product in catalog.products}) > 20


def test_creative_outside_the_candidates_is_refused(demo: World) -> None:
    requests = demo.requests(np.random.default_rng(8), 10, now_s=0.0)
    creatives = demo.best_creatives(requests, 0.0)
    allowed = set(demo.candidates(int(requests.product[4]), 0.0)[1].tolist())
    stranger = next(number for number in range(DEMO_WORLD.elements_per_slot) if number not in allowed)
    wrong = creatives.copy()
    wrong[4, 1] = stranger
    unborn = creatives.copy()
    unborn[4, 1] += DEMO_WORLD.elements_per_slot  # the same place, but not alive yet

    with pytest.raises(ValueError, match=f"image-{stranger} of creative 4 is not a candidate"):
        demo.click_probability(requests, wrong, 0.0)
    with pytest.raises(ValueError, match="of creative 4 is not a candidate"):
        demo.click_probability(requests, unborn, 0.0)
    with pytest.raises(ValueError, match=r"shape \(10, 3\); must be \(10, 4\)"):
        demo.click_probability(requests, creatives[:, :3], 0.0)


def test_drift_moves_the_truth_at_its_period_only() -> None:
    world = World(replace(DEMO_WORLD, drift_every_s=60.0, drift_rate=1.0))
    requests = world.requests(np.random.default_rng(9), 2_000, now_s=0.0)
    before = world.best_creatives(requests, 0.0)
    best, uniform = world.best(requests, 61.0).sum(), world.uniform(requests, 61.0).sum()
    kept = world.click_probability(requests, before, 61.0).sum()

    assert np.array_equal(world.best(requests, 0.0), world.best(requests, 59.9))
    assert world.catalog(0.0) == world.catalog(61.0)  # tastes move, elements stay
    assert regret(best, kept, uniform) > 0.7  # yesterday's best is little better than chance


def test_drift_rate_says_how_much_is_new() -> None:
    regrets = []
    for rate in (0.05, 0.3, 1.0):
        world = World(replace(DEMO_WORLD, drift_every_s=60.0, drift_rate=rate))
        requests = world.requests(np.random.default_rng(10), 2_000, now_s=0.0)
        kept = world.click_probability(requests, world.best_creatives(requests, 0.0), 60.0)
        regrets.append(regret(world.best(requests, 60.0).sum(), kept.sum(), world.uniform(requests, 60.0).sum()))

    assert 0 < regrets[0] < regrets[1] < regrets[2]


def test_drift_keeps_the_strength_of_tastes() -> None:
    world = World(replace(DEMO_WORLD, drift_every_s=1.0))
    requests = world.requests(np.random.default_rng(11), 2_000, now_s=0.0)
    lift = [world.best(requests, now).mean() / world.uniform(requests, now).mean() for now in (0.0, 50.0, 100.0, 150.0)]

    assert min(lift) > 2.0
    assert max(lift) < 5.0


def test_world_without_drift_and_new_elements_stands_still(demo: World) -> None:
    requests = demo.requests(np.random.default_rng(12), 100, now_s=0.0)

    assert np.array_equal(demo.best(requests, 0.0), demo.best(requests, 1e9))
    assert demo.catalog(0.0) == demo.catalog(1e9)


def test_new_elements_replace_the_oldest() -> None:
    world = World(replace(DEMO_WORLD, new_elements_every_s=30.0, new_elements=2))
    before, same, after = world.catalog(0.0), world.catalog(29.0), world.catalog(30.0)
    old = {element["element_id"]: element for element in before.elements}
    new = {element["element_id"]: element for element in after.elements}

    assert before == same
    assert len(old) == len(new) == 4 * 12
    assert old.keys() - new.keys() == {f"{slot}-{n}" for slot in DEMO_WORLD.slots for n in (0, 1)}
    assert new.keys() - old.keys() == {f"{slot}-{n}" for slot in DEMO_WORLD.slots for n in (12, 13)}
    assert all(new[element_id] == old[element_id] for element_id in old.keys() & new.keys())
    for old_product, new_product in zip(before.products, after.products, strict=True):
        for slot in DEMO_WORLD.slots:
            kept = [e for e in old_product["slots"][slot] if e in new]
            assert new_product["slots"][slot][: len(kept)] == kept
            assert len(new_product["slots"][slot]) == 6


def test_retired_element_is_no_candidate_and_a_new_one_can_be_best() -> None:
    world = World(replace(SMALL, new_elements_every_s=30.0))
    requests = all_cells(world, hours=range(1))
    before, after = world.best_creatives(requests, 0.0), world.best_creatives(requests, 30.0)
    retired = (before == 0).any(axis=1)

    assert retired.any()
    with pytest.raises(ValueError, match=r"is not a candidate of p\d at 30.0 s"):
        world.click_probability(requests, before, 30.0)
    assert (after == SMALL.elements_per_slot).any()
    assert (after > 0).all()


def test_delays_have_their_median_spread_and_cap(demo: World) -> None:
    delays = demo.delays(np.random.default_rng(13), 50_000)
    # standard error of the median of the logarithm: 1.25 * .8 / sqrt(50,000) = .0045
    assert np.log(np.median(delays)) == pytest.approx(np.log(2.0), abs=0.02)
    assert np.quantile(delays, 0.8413) == pytest.approx(2.0 * np.exp(0.8), rel=0.03)
    assert delays.min() > 0
    assert delays.max() == 20.0
    assert np.median(
        World(replace(SMALL, delay_median_s=60.0, delay_cap_s=3600.0)).delays(np.random.default_rng(14), 50_000)
    ) == pytest.approx(60.0, rel=0.02)


def test_requests_are_ready_for_json_and_cover_all_contexts(demo: World) -> None:
    requests = demo.requests(np.random.default_rng(15), 3_000, now_s=0.0)
    dicts = demo.request_dicts(requests, 0.0)
    slots = {product["product_id"]: product["slots"] for product in demo.catalog(0.0).products}

    assert json.loads(json.dumps(dicts)) == dicts
    assert all(request["candidates"] == slots[request["product_id"]] for request in dicts)
    assert {request["product_id"] for request in dicts} == set(slots)
    assert {request["context"]["device"] for request in dicts} == set(DEVICES)
    assert {request["context"]["segment"] for request in dicts} == set(SEGMENTS)
    assert {request["context"]["hour"] for request in dicts} == set(range(24))


def test_catalog_is_plain_data_with_text(demo: World) -> None:
    catalog = demo.catalog(0.0)
    texts = [element["text"] for element in catalog.elements if element["slot"] == "title"]

    assert json.loads(json.dumps(catalog.elements)) == catalog.elements
    assert json.loads(json.dumps(catalog.products)) == catalog.products
    assert all(len(element["features"]) == 6 and np.isfinite(element["features"]).all() for element in catalog.elements)
    assert all(len(text.split()) >= 4 for text in texts)
    assert len(set(texts)) >= 10
    assert World(replace(SMALL, slots=("banner",))).catalog(0.0).elements[0]["text"].startswith("banner ")


def test_encode_reads_ids_back_and_refuses_others(demo: World) -> None:
    requests = demo.requests(np.random.default_rng(16), 20, now_s=0.0)
    best = demo.best_creatives(requests, 0.0)
    creatives = [
        {slot: demo.element_id(s, number) for s, (slot, number) in enumerate(zip(DEMO_WORLD.slots, row, strict=True))}
        for row in best.tolist()
    ]

    assert np.array_equal(demo.encode(creatives), best)
    with pytest.raises(ValueError, match="slot 'tag' of creative 1 is 'title-3'"):
        demo.encode([creatives[0], {**creatives[1], "tag": "title-3"}])
    with pytest.raises(ValueError, match="slot 'title' of creative 0 is ''"):
        demo.encode([{}])


def test_approximations_for_large_worlds_come_close_to_the_truth(demo: World, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = all_cells(demo, hours=range(12, 13))
    monkeypatch.setattr(world_module, "MAX_ENUMERATED", 1)
    approximate = World(DEMO_WORLD)
    best = approximate.best(requests, 0.0)
    chosen = approximate.click_probability(requests, approximate.best_creatives(requests, 0.0), 0.0)

    np.testing.assert_allclose(chosen, best, rtol=1e-12)
    assert (best <= demo.best(requests, 0.0) * (1 + 1e-12)).all()
    assert best.mean() > 0.998 * demo.best(requests, 0.0).mean()
    np.testing.assert_allclose(approximate.uniform(requests, 0.0), demo.uniform(requests, 0.0), rtol=0.05)
    assert not np.array_equal(approximate.uniform(requests, 0.0), demo.uniform(requests, 0.0))


def test_large_world_finds_creatives_far_above_random_ones() -> None:
    world = World(
        WorldConfig(num_products=50, slots=tuple("abcdefgh"), elements_per_slot=60, candidates_per_slot=50, pair_sd=0.2)
    )
    rng = np.random.default_rng(17)
    requests = world.requests(rng, 30, now_s=0.0)
    best = world.best(requests, 0.0)
    random = [world.click_probability(requests, random_creatives(world, requests, rng), 0.0) for _ in range(300)]

    assert (best > 1.2 * np.max(random, axis=0)).all()
    assert world.uniform(requests, 0.0).mean() == pytest.approx(np.mean(random), rel=0.03)


def test_hidden_traits_are_only_partly_linear_in_the_content() -> None:
    def share_explained(config: WorldConfig) -> float:
        world = World(config)
        elements = world.catalog(0.0).elements
        content = np.array([element["features"] for element in elements])
        requests = Requests(
            **{name: np.zeros(300, dtype=np.int64) for name in ("product", "device", "segment", "hour")}
        )
        probability = world.click_probability(requests, np.arange(300)[:, None], 0.0)
        effect = np.log(probability / (1 - probability))
        design = np.column_stack([content, np.ones(300)])
        fitted = design @ np.linalg.lstsq(design, effect, rcond=None)[0]
        return float(1 - (effect - fitted).var() / effect.var())

    linear = WorldConfig(
        num_products=1, slots=("title",), elements_per_slot=300, candidates_per_slot=300, own_sd=0, context_element_sd=0
    )
    assert share_explained(linear) > 0.999
    assert 0.2 < share_explained(replace(linear, content_size=64, hidden_traits=6)) < 0.85


def test_regret_is_zero_for_best_and_one_for_uniform_play() -> None:
    assert regret(3.0, 3.0, 1.0) == 0.0
    assert regret(3.0, 1.0, 1.0) == 1.0
    with pytest.raises(ValueError, match="needs best_sum > uniform_sum"):
        regret(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_products", 0),
        ("slots", ()),
        ("slots", ("title", "title")),
        ("candidates_per_slot", 13),
        ("new_elements", 13),
        ("content_size", 0),
        ("hidden_traits", 0),
        ("click_rate", 1.0),
        ("pair_sd", -0.1),
        ("product_sd", float("nan")),
        ("delay_median_s", 0.0),
        ("drift_every_s", 0.0),
        ("drift_rate", 0.0),
        ("new_elements_every_s", float("inf")),
        ("seed", -1),
    ],
)
def test_wrong_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} of the world is"):
        replace(DEMO_WORLD, **{field: value})


@pytest.mark.parametrize("now_s", [-1.0, float("nan")])
def test_time_before_the_world_is_refused(demo: World, now_s: float) -> None:
    with pytest.raises(ValueError, match="seconds since the world began"):
        demo.catalog(now_s)
