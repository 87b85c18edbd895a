"""The gatekeeper asks the candidate, compares it with what was published, and weighs what came since."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from learner.gate import GateSettings, Validation
from learner.gatekeeper import MAX_GOLDEN_CANDIDATES, Gatekeeper
from learner.recent import RecentImpression, RecentImpressions
from serving.golden import check
from serving.policy import Policy
from tests.learner.test_gate import GOOD
from tests.serving.test_golden import policy_of
from tests.serving.test_policy import SLOTS, blob_of, manifest_of, tensors_of


class Set:
    """Candidates as the learner keeps them."""

    def __init__(self, candidates: dict[str, tuple[str, ...]]) -> None:
        self.candidates, self.slots, self.elements = candidates, tuple(candidates), tuple(candidates.values())


def seen(num: int, candidates: dict[str, tuple[str, ...]] = SLOTS) -> RecentImpressions:
    """Impressions of uniform play."""
    recent = RecentImpressions(2_048)
    rng = np.random.default_rng(0)
    uniform = 1.0 / np.prod([len(ids) for ids in candidates.values()])
    for _ in range(num):
        places = [int(rng.integers(len(ids))) for ids in candidates.values()]
        made: Any = RecentImpression("p0", {"device": "ios"}, Set(candidates), places, uniform, int(rng.random() < 0.1))
        recent._kept.append(made)
    recent.num_added = num
    return recent


def judged(keeper: Gatekeeper, policy: Policy, parent: str | None, number: int, recent: RecentImpressions) -> Any:
    tensors = {"mean.content": np.ones((2, 2), np.float32)}
    return keeper.judge(
        policy,
        tensors,
        sha256=f"sha of {number}",
        parent_sha256=parent,
        recent=recent,
        validation=GOOD,
        num_updates=number,
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of(blob_of(tensors_of()))


def moved() -> Policy:
    """Every click rate is that of another planet."""
    tensors = tensors_of()
    tensors["mean.bias"] = tensors["mean.bias"] - 4.0
    return policy_of(blob_of(tensors))


def test_golden_batch_is_what_the_policy_says(policy: Policy) -> None:
    verdict, golden = judged(Gatekeeper(GateSettings(), 0), policy, None, 1, seen(100))
    assert verdict.accepted
    assert "golden_shift" not in verdict.numbers
    assert len(golden) == 8
    check(policy, manifest_of(golden=golden))


def test_large_cards_and_young_models_have_no_golden_batch(policy: Policy) -> None:
    large = {"title": tuple(f"t{n}" for n in range(MAX_GOLDEN_CANDIDATES + 1))}
    assert judged(Gatekeeper(GateSettings(), 0), policy, None, 1, seen(5, large))[1] == ()
    assert judged(Gatekeeper(GateSettings(), 0), policy, None, 1, seen(0))[1] == ()


def test_jump_from_the_published_version_is_refused_until_that_is_old(policy: Policy) -> None:
    keeper, other = Gatekeeper(GateSettings(golden_updates=3), 0), moved()
    judged(keeper, policy, None, 1, seen(100))
    for number, is_accepted in ((2, False), (3, False), (4, False), (5, True)):
        verdict, _ = judged(keeper, other, "sha of 1", number, seen(100))
        assert verdict.accepted is is_accepted
        assert ("golden batch moved" in str(verdict.reasons)) is not is_accepted
    assert judged(keeper, policy, "sha of 5", 6, seen(100))[0].numbers["golden_shift"] > 1.5


def test_young_model_may_jump(policy: Policy) -> None:
    keeper = Gatekeeper(GateSettings(), 0)
    judged(keeper, policy, None, 1, seen(100))
    verdict, _ = keeper.judge(
        moved(), {}, sha256="b", parent_sha256="sha of 1", recent=seen(100), validation=Validation(), num_updates=2
    )
    assert verdict.accepted
    assert verdict.numbers["golden_shift"] > 1.5


def test_impressions_are_weighed_once_by_the_version_before_they_were_learned(policy: Policy) -> None:
    keeper, recent = Gatekeeper(GateSettings(probes=1_000), 0), seen(300)
    assert "value_num" not in judged(keeper, policy, None, 1, recent)[0].numbers, "no version was there before them"
    assert "value_num" not in judged(keeper, policy, None, 2, recent)[0].numbers, "nothing came since"
    recent.num_added += 200
    numbers = judged(keeper, policy, None, 3, recent)[0].numbers
    assert numbers["value_num"] == 200
    new = [recent[-1 - i].logged for i in range(200)]
    joint = policy.propensities([each.request for each in new], [each.creative for each in new])
    weight = np.array([p for _, p in joint]) / new[0].propensity
    assert numbers["value_effective_size"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
