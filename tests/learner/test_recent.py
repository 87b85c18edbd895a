"""Recent impressions are given back as they were shown, and a checkpoint does not repeat what they share."""

import json
from typing import Any

import numpy as np

from learner.candidate_sets import CandidateShelf
from learner.parsing import ExampleParser
from learner.recent import RecentImpressions
from streams.contracts.examples import ExampleBatch
from tests.builders import batch_of, shown


def examples(cards: list[dict[str, list[str]]]) -> ExampleBatch:
    impressions = [
        shown(
            f"d{i}",
            product_id=f"p{i % 2}",
            context={"device": "ios", "hour": i % 3},
            candidates=candidates,
            creative={slot: ids[-1] for slot, ids in reversed(candidates.items())},
            slot_propensities={slot: 1 / len(ids) for slot, ids in candidates.items()},
            propensity=0.25,
        )
        for i, candidates in enumerate(cards)
    ]
    return batch_of(impressions)


def recent_of(cards: list[dict[str, list[str]]], max_size: int) -> RecentImpressions:
    recent, batch = RecentImpressions(max_size), examples(cards)
    recent.add(batch, ExampleParser().parse(batch), np.arange(len(batch)))
    return recent


def restored(recent: RecentImpressions, max_size: int) -> RecentImpressions:
    again, state = RecentImpressions(max_size), json.loads(json.dumps(recent.state()))
    again.restore(state, CandidateShelf().make)
    return again


CARDS: list[dict[str, list[str]]] = [
    {"title": ["t1", "t2"], "image": ["i1"]},
    {"image": ["i1"], "title": ["t1", "t2"]},
    {"title": ["t1"]},
    {"title": ["t1", "t2"], "image": ["i1"]},
]


def test_impressions_are_those_that_were_shown_before_and_after_a_checkpoint() -> None:
    recent = recent_of(CARDS, 10)
    for each in (recent, restored(recent, 10)):
        assert len(each) == len(CARDS)
        for i, card in enumerate(CARDS):
            logged: Any = each[i].logged
            assert (logged.request.product_id, logged.propensity, logged.label) == (f"p{i % 2}", 0.25, 0)
            assert logged.request.context == {"device": "ios", "hour": i % 3}
            assert [(slot, list(ids)) for slot, ids in logged.request.candidates.items()] == list(card.items())
            assert logged.creative == {slot: ids[-1] for slot, ids in card.items()}


def test_only_the_newest_are_kept() -> None:
    for each in (recent_of(CARDS, 2), restored(recent_of(CARDS, 2), 2)):
        assert [each[i].product_id for i in range(len(each))] == ["p0", "p1"]
        assert each[-1].context["hour"] == 0


def test_state_is_the_same_for_what_was_restored_and_then_went_on() -> None:
    """After a restart the same values are other objects."""
    batch = examples(CARDS * 2)
    one, two = RecentImpressions(7), RecentImpressions(7)
    one_parser, two_parser = ExampleParser(), ExampleParser()
    for first in (0, 4):
        rows = np.arange(first, first + 4)
        one.add(batch, one_parser.parse(batch), rows)
        two.add(batch, two_parser.parse(batch), rows)
        two = restored(two, 7)
        two_parser = ExampleParser()
    assert one.state() == two.state()
    assert json.dumps(one.state()) == json.dumps(two.state())


def test_shared_candidates_are_written_once() -> None:
    wide = {f"slot{s}": [f"element-{s}-{e}" for e in range(50)] for s in range(8)}
    state = recent_of([wide] * 300, 300).state()
    assert len(state["sets"]) == 1
    assert len(state["contexts"]) == 3
    assert len(json.dumps(state)) < 50_000 < 300 * len(json.dumps(wide))
