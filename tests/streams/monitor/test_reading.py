"""Numbers that are made of examples, against the same written down one by one."""

import math

import numpy as np
import pytest

from streams.contracts.examples import ExampleBatch
from streams.monitor.models import Model, Models, Version
from streams.monitor.reading import Reader, version_name
from tests.builders import batch_of, shown

CANDIDATES = {"title": ["t1", "t2", "t3"], "image": ["i1", "i2"]}


def batch() -> ExampleBatch:
    """Three decisions of a policy that shows t1 and i1 with .9 each, and else the rest evenly."""
    common = {"candidates": CANDIDATES, "epoch": 2, "policy_version": 7}
    return batch_of(
        [
            shown(
                "a",
                creative={"title": "t1", "image": "i1"},
                slot_propensities={"title": 0.9, "image": 0.9},
                propensity=0.81,
                context={"device": "ios", "hour": 3, "price": 12.34},
                **common,
            ),
            shown(
                "b",
                creative={"title": "t2", "image": "i1"},
                slot_propensities={"title": 0.05, "image": 0.9},
                propensity=0.045,
                context={"device": "web", "hour": 4, "price": 11.9},
                holdout=True,
                **common,
            ),
            shown("c", product_id="q", source="uniform"),
        ]
    )


def test_arrivals_are_sums_over_the_decisions() -> None:
    reader = Reader(frozenset({"hour"}))
    found = reader.arrivals(batch())
    assert (found.num, found.num_holdout, found.num_fallback, found.num_inconsistent) == (3, 1, 1, 0)
    assert found.surprise == pytest.approx(-math.log(0.81) - math.log(0.045))
    assert found.log_actions == pytest.approx(2 * math.log(6))
    assert found.weight == pytest.approx(1 / (6 * 0.81) + 1 / (6 * 0.045) + 1)
    assert found.min_scaled == pytest.approx(6 * 0.045)
    assert found.slot_weight == pytest.approx({"title": 1 / 2.7 + 1 / 0.15 + 1, "image": 2 / 1.8})
    assert found.products == {"p": 2, "q": 1}
    assert reader.fields(found.contexts) == {"device": {"ios": 1, "web": 1}, "price": {"1e+01": 2}}


def test_propensity_that_is_not_the_product_of_its_slots_is_seen() -> None:
    wrong = batch_of([shown("a", propensity=0.5), shown("b")])
    assert Reader().arrivals(wrong).num_inconsistent == 1


def test_mean_weight_of_a_true_policy_is_one() -> None:
    rng = np.random.default_rng(6)
    p = {"t1": 0.9, "t2": 0.05, "t3": 0.05}
    drawn = rng.choice(list(p), size=4_000, p=list(p.values())).tolist()
    impressions = [
        shown(
            str(n),
            candidates={"title": list(p)},
            creative={"title": e},
            slot_propensities={"title": p[e]},
            propensity=p[e],
        )
        for n, e in enumerate(drawn)
    ]
    found = Reader().arrivals(batch_of(impressions))
    # Four standard errors.
    assert found.weight / found.num == pytest.approx(1.0, abs=0.12)


def test_rows_name_elements_and_versions_also_of_a_part_of_a_record() -> None:
    reader = Reader()
    part = ExampleBatch(batch().columns.slice(1, 2))
    rows = reader.rows(part, np.array([0.1, 0.2]), np.array([np.nan, 0.3]))
    names = [[reader.elements.names[code] for code in codes if code >= 0] for codes in rows.element.tolist()]
    assert names == [["title=t2", "image=i1"], ["title=t1"]]
    assert [version_name(code) for code in rows.version.tolist()] == ["2.7", "0.0"]
    assert rows.is_holdout.tolist() == [True, False]


class Constant:
    def __init__(self, value: float) -> None:
        self._value = value

    def predict(self, batch: ExampleBatch) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.full(len(batch), self._value)


def test_no_model_predicts_what_it_has_learned_or_what_was_shown_before_it_served() -> None:
    models = Models()
    models.add(Model(Version(1, 1), since_ms=5_000, trained_to_ms=1_000, predictor=Constant(0.1)))
    assert models.renew_reference(5_000)
    models.add(Model(Version(1, 2), since_ms=9_000, trained_to_ms=6_000, predictor=Constant(0.2)))
    times = [1_000, 1_001, 8_999, 9_000]
    current, reference = models.predict(batch_of([shown(str(t), t) for t in times]))
    assert current.tolist()[1:] == [0.1, 0.1, 0.2]
    assert np.isnan(current[0])
    assert np.isnan(reference[0])
    assert reference.tolist()[1:] == [0.1, 0.1, 0.1]
    assert models.num_not_finite == 0
    assert not models.renew_reference(6_000)
    assert models.renew_reference(6_000, force=True)
