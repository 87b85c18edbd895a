"""Explanations of a card: what they compare, what they average over, and what they refuse."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from serving.explain import (
    MAX_CANDIDATES,
    Question,
    QuestionError,
    average_context,
    explain,
    mixed_contexts,
    read_context,
)
from serving.explanation import ElementCredit, Explanation
from serving.policy import DecisionRequest, Policy, PolicySettings
from streams.contracts.catalog import Element
from streams.contracts.features import ContextColumn, FeatureSpec
from streams.contracts.snapshot import pack_pairs
from tests.serving.test_policy import SLOTS, creatives, policy_of, request_of, spec_of, tensors_of

WEB = {"device": "web"}


def question_of(**changes: Any) -> Question:
    values: dict[str, Any] = {"product_id": "p1", "candidates": SLOTS, "context": WEB}
    return Question(**values | changes)


def elements_of(explanation: Explanation, slot: str) -> dict[str, ElementCredit]:
    (found,) = [s for s in explanation.slots if s.slot == slot]
    return {element.element_id: element for element in found.elements}


def test_shares_are_how_often_the_policy_shows_a_candidate() -> None:
    policy, request = policy_of(), request_of()
    found = explain(policy, question_of())
    joint = {tuple(c.values()): policy.propensity(request, c)[1] for c in creatives()}
    for t, (slot, ids) in enumerate(SLOTS.items()):
        shown = {e: sum(p for key, p in joint.items() if key[t] == e) for e in ids}
        assert {e: c.share for e, c in elements_of(found, slot).items()} == pytest.approx(shown, abs=1e-5)


def test_uplift_is_what_the_click_rate_of_played_cards_gains() -> None:
    """Against expected logits of whole cards, with the other slots drawn as they are played."""
    policy, request = policy_of(), request_of()
    found = explain(policy, question_of())
    shares = [{e: c.share for e, c in elements_of(found, slot).items()} for slot in SLOTS]
    logits = {}
    for creative in creatives():
        ctr = policy.expected_ctr(request, creative)
        logits[tuple(creative.values())] = math.log(ctr / (1 - ctr))
    for t, (slot, ids) in enumerate(SLOTS.items()):
        others = list(itertools.product(*[list(s) for s in SLOTS.values()]))
        worth = {
            e: sum(logits[c] * math.prod(shares[s][c[s]] for s in range(len(c)) if s != t) for c in others if c[t] == e)
            for e in ids
        }
        mean = sum(worth.values()) / len(worth)
        credits = elements_of(found, slot)
        for e in ids:
            assert credits[e].uplift.uplift == pytest.approx(worth[e] - mean, abs=2e-4)
            # The ratio of click rates is that of a card with this candidate and one with an average one.
            ratio = (1 + math.exp(-mean)) / (1 + math.exp(-worth[e]))
            assert credits[e].uplift.clicks == pytest.approx(ratio - 1, rel=1e-3, abs=1e-4)
        assert sum(c.best for c in credits.values()) == pytest.approx(1.0)
        assert [c.uplift.uplift for c in credits.values()] == sorted(c.uplift.uplift for c in credits.values())[::-1]


def test_credits_of_a_policy_that_plays_one_card_add_up_to_its_logit() -> None:
    tensors = tensors_of()
    for name in ("trait_root", "element_sd", "pair_sd"):
        tensors[name] = np.zeros_like(tensors[name])
    for name in ("content", "content_context", "content_pair"):
        tensors[f"draws.{name}"] = np.repeat(tensors[f"mean.{name}"][None], 12, 0)
    policy = Policy(spec_of(), tensors, PolicySettings(epsilon=0.0), "sha")
    (choice,) = policy.choose([request_of()])
    assert choice.expected_ctr is not None
    found = explain(policy, question_of())
    total = sum(elements_of(found, slot)[e].credit for slot, e in choice.creative.items())
    appeal = policy.appeal("p1", policy.spec.context_row(WEB))
    assert total + appeal == pytest.approx(math.log(choice.expected_ctr / (1 - choice.expected_ctr)), abs=1e-4)
    assert all(elements_of(found, slot)[e].share == 1.0 for slot, e in choice.creative.items())


def test_uncertainty_is_the_posteriors_and_not_that_of_the_thompson_scale() -> None:
    tensors = tensors_of()
    for name in ("trait_root", "element_sd", "pair_sd"):
        tensors[name] = np.zeros_like(tensors[name])
    # The same uncertainty, stored narrower: the mean of what is played stays, so the deviation halves with the scale.
    policies = [Policy(spec_of(), tensors, PolicySettings(epsilon=1.0, thompson_scale=s), "sha") for s in (0.2, 0.4)]
    wide, narrow = (elements_of(explain(policy, question_of()), "title") for policy in policies)
    for element_id, element in wide.items():
        assert element.uplift.sd > 0
        assert element.uplift.sd == pytest.approx(2 * narrow[element_id].uplift.sd, rel=1e-4)
        assert element.uplift.low < element.uplift.uplift < element.uplift.high
        assert element.uplift.clicks_low < element.uplift.clicks < element.uplift.clicks_high


def test_effects_with_the_context_widen_the_intervals_though_no_draw_plays_them() -> None:
    tensors = tensors_of()
    for name in ("trait_root", "element_sd", "pair_sd"):
        tensors[name] = np.zeros_like(tensors[name])
    for name in ("content", "content_context", "content_pair"):
        tensors[f"draws.{name}"] = np.repeat(tensors[f"mean.{name}"][None], 12, 0)
    tensors["element_sd"][:, 2] = 3.0  # the column of device=web
    policy = Policy(spec_of(), tensors, PolicySettings(epsilon=1.0))
    web, ios = (elements_of(explain(policy, question_of(context={"device": d})), "tag") for d in ("web", "ios"))
    both = elements_of(explain(policy, question_of(context={})), "tag")
    for element_id, element in web.items():
        # A candidate against the mean of four: sqrt(3 / 4) of the deviation, which 12 draws tell to a fifth.
        assert element.uplift.sd == pytest.approx(3.0 * math.sqrt(3 / 4), rel=0.6)
        assert ios[element_id].uplift.sd == pytest.approx(0.0, abs=1e-5)
        assert both[element_id].uplift.sd == pytest.approx(element.uplift.sd / 2, rel=1e-4)


def test_what_is_not_given_is_averaged_over_its_known_values() -> None:
    policy = policy_of(epsilon=1.0)  # every card alike, so that only effects differ
    whole = explain(policy, question_of(context={}))
    assert whole.averaged_over == ["device"]
    assert [(c.field, c.value) for c in whole.contexts] == [("device", "ios"), ("device", "web")]
    given = [explain(policy, question_of(context={"device": device})) for device in ("ios", "web")]
    for slot in SLOTS:
        for element_id, element in elements_of(whole, slot).items():
            parts = [elements_of(e, slot)[element_id] for e in given]
            assert element.uplift.uplift == pytest.approx(np.mean([p.uplift.uplift for p in parts]), abs=1e-5)
    assert [c.slots for c in whole.contexts] == [e.slots for e in given]
    assert all(e.contexts == [] and e.tastes == [] and e.averaged_over == [] for e in given)


def test_tastes_are_the_clear_differences_between_a_context_and_the_whole() -> None:
    tensors = tensors_of()
    for name in ("draws.content_context", "mean.content_context", "element_sd"):
        tensors[name] = np.zeros_like(tensors[name])
    tensors["element"][:, 1:] = 0.0
    index = spec_of().element_index[0, "t1"]
    tensors["element"][index, 1:] = 2.0, -2.0  # title t1 is for ios
    found = explain(Policy(spec_of(), tensors, PolicySettings(epsilon=1.0), "sha"), question_of(context={}))
    best = {(taste.value, taste.element_id): taste.difference for taste in found.tastes}
    assert {key[1] for key in best} == {"t0", "t1", "t2"}
    # 2 for one of three titles: 4 / 3 over their mean.
    assert best["ios", "t1"].uplift == pytest.approx(4 / 3, abs=1e-4)
    assert best["web", "t1"].uplift == pytest.approx(-4 / 3, abs=1e-4)
    assert (best["ios", "t1"].verdict, best["web", "t1"].verdict) == ("better", "worse")


def test_strongest_pairs_come_first_on_their_side() -> None:
    tensors = tensors_of()
    for name in tensors:
        if "content_pair" in name:
            tensors[name] = np.zeros_like(tensors[name])
    spec = spec_of()
    places = [(spec.element_index[0, "t0"], spec.element_index[1, "i1"])]
    tensors["pairs"], tensors["pair"] = pack_pairs(np.array(places)), np.array([1.2], np.float32)
    found = explain(Policy(spec, tensors, PolicySettings(), "sha"), question_of())
    first = found.good_pairs[0]
    assert (first.slots, first.element_ids) == (("title", "image"), ("t0", "i1"))
    # 1.2 in a table of 3 x 2, less the means of its row and its column, plus that of all.
    assert first.effect.uplift == pytest.approx(1.2 * (1 - 1 / 3 - 1 / 2 + 1 / 6), abs=1e-5)
    assert found.bad_pairs[0].element_ids == ("t0", "i0")
    assert {p.slots for p in (*found.good_pairs, *found.bad_pairs)} == {("title", "image")}


def test_one_slot_holds_only_itself_and_its_pairs() -> None:
    whole, one = (explain(policy_of(), question_of(context={}, slot=slot)) for slot in (None, "image"))
    assert [s.slot for s in one.slots] == ["image"]
    assert elements_of(one, "image") == elements_of(whole, "image")
    assert all([s.slot for s in context.slots] == ["image"] for context in one.contexts)
    assert all("image" in pair.slots for pair in (*one.good_pairs, *one.bad_pairs))
    assert {taste.slot for taste in one.tastes} <= {"image"}


def test_unseen_elements_and_products_are_told_apart() -> None:
    candidates = {"title": ("t0", "new", "t1"), "banner": ("b0", "b1")}
    content = {"new": Element(element_id="new", slot="title", features=(1.0, -1.0))}
    found = explain(policy_of(), question_of(product_id="?", candidates=candidates, content=content))
    assert not found.product_known
    titles = elements_of(found, "title")
    assert titles["new"].uplift.verdict == "unknown"
    assert titles["new"].credit != 0.0  # its content speaks for it
    assert titles["t0"].uplift.verdict != "unknown"
    assert {e.uplift.verdict for e in elements_of(found, "banner").values()} == {"unknown"}
    assert explain(policy_of(), question_of()).product_known


def test_verdicts_follow_from_the_intervals() -> None:
    for slot in explain(policy_of(), question_of()).slots:
        for element in slot.elements:
            uplift = element.uplift
            covers = uplift.low <= 0 <= uplift.high
            narrow = covers and max(-uplift.low, uplift.high) <= math.log(1.1)
            assert uplift.verdict == (
                "average" if narrow else "unclear" if covers else "better" if uplift.low > 0 else "worse"
            )


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"slot": "nope"}, "slot", "it has title, image, tag"),
        ({"candidates": {}}, "product_id", "has no candidates"),
        ({"candidates": {"title": ()}}, "product_id", "has no candidates"),
        ({"candidates": {"title": tuple(map(str, range(MAX_CANDIDATES + 1)))}}, "product_id", "at most 1024"),
    ],
)
def test_questions_without_answer_are_refused(changes: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(QuestionError, match=reason) as caught:
        explain(policy_of(), question_of(**changes))
    assert caught.value.field == field


def test_answers_that_would_be_too_long_ask_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.explain.MAX_ROWS", 12)
    with pytest.raises(QuestionError, match="ask for one slot"):
        explain(policy_of(), question_of(context={}))
    assert explain(policy_of(), question_of(context={}, slot="tag")).slots
    assert explain(policy_of(), question_of()).slots


SPEC = FeatureSpec(
    slots=("title",),
    context=(
        ContextColumn(field="device", value="ios"),
        ContextColumn(field="device", value="web"),
        ContextColumn(field="member", value=True),
        ContextColumn(field="member", value=False),
        ContextColumn(field="hour", mean=12.0, sd=4.0),
        *(ContextColumn(field="segment", value=f"u{n}") for n in range(11)),
    ),
    products=(),
    elements=(),
    content_size=1,
    encoder="hash-1:1",
)


def test_contexts_are_read_with_the_types_that_the_snapshot_knows() -> None:
    text = {"device": "ios", "member": "TRUE", "hour": "14", "segment": "u3"}
    assert read_context(SPEC, text) == {"device": "ios", "member": True, "hour": 14.0, "segment": "u3"}
    assert read_context(SPEC, {"member": "false"}) == {"member": False}


@pytest.mark.parametrize(
    ("fields", "field", "known"),
    [
        ({"planet": "mars"}, "context.planet", "device, member, hour, segment"),
        ({"device": "tv"}, "context.device", "it knows ios, web"),
        ({"hour": "noon"}, "context.hour", "any number"),
        ({"hour": "nan"}, "context.hour", "any number"),
    ],
)
def test_contexts_that_the_snapshot_does_not_know_are_refused(fields: dict[str, str], field: str, known: str) -> None:
    with pytest.raises(QuestionError, match=known) as caught:
        read_context(SPEC, fields)
    assert caught.value.field == field


def test_mixed_contexts_go_through_the_values_evenly_and_keep_what_is_given() -> None:
    contexts = mixed_contexts(SPEC, {"device": "ios", "hour": 3})
    assert all((c["device"], c["hour"]) == ("ios", 3) for c in contexts)
    assert sorted(c["member"] for c in contexts) == [False] * 4 + [True] * 4
    assert len({c["segment"] for c in contexts}) == len(contexts) == 8
    assert mixed_contexts(SPEC, {"device": "ios", "member": True, "segment": "u1"}) == [
        {"device": "ios", "member": True, "segment": "u1"}
    ]


def test_average_context_is_the_mean_of_all_contexts_at_the_mean_hour() -> None:
    every = [
        {"device": d, "member": m, "segment": f"u{n}", "hour": 12.0}
        for d in ("ios", "web")
        for m in (True, False)
        for n in range(11)
    ]
    np.testing.assert_allclose(average_context(SPEC, {}), SPEC.context_matrix(every).mean(0), atol=1e-6)
    np.testing.assert_allclose(average_context(SPEC, every[0]), SPEC.context_row(every[0]), atol=1e-6)


def test_explaining_changes_no_decision() -> None:
    requests = [DecisionRequest("p1", WEB, SLOTS, {}, seed) for seed in range(30)]
    policy = policy_of()
    explain(policy, question_of(context={}))
    assert policy.choose(requests) == policy_of().choose(requests)
