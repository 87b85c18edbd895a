"""Ours without one of its parts each: what the parts are worth in the closed loop.

Prior standard deviations of `NOTHING` leave an effect out: no click moves it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Final

import numpy as np

from benchmarks.regret.policies.base import FINAL, LATE_POSITIVE, CatalogNow, Facts, Labels
from benchmarks.regret.policies.genco import Genco
from learner.change_test import ChangeSettings
from learner.core import CoreSettings, PriorScales
from learner.generator import GeneratorSettings
from learner.online import LearnerSettings, OnlineLearner
from learner.rest import Memory, RestSettings
from learner.reward_model import RewardModelSettings
from serving.ascent import IntArray
from serving.policy import Policy
from serving.search import Problem

NOTHING: Final = 1e-6
WINDOW_MS: Final = 540_000
"""The window of the world `delays` without its label wait."""


class _Ablation(Genco):
    """Ours with other settings."""

    changes: ClassVar[dict[str, Any]] = {}
    """Of `LearnerSettings`."""

    def make_learner(self, seed: int) -> OnlineLearner:
        """Return a learner that lacks a part."""
        return OnlineLearner(replace(LearnerSettings(seed=seed), **self.changes))


class _Model(_Ablation):
    """Ours with other settings of the reward model."""

    def __init_subclass__(cls, **changes: Any) -> None:
        """Take the changes of `RewardModelSettings`."""
        cls.changes = {"reward_model": RewardModelSettings(**changes)}


_NO_REST: Final = RestSettings(product_context=NOTHING, element=NOTHING, element_context=NOTHING, pair=NOTHING)


class NoRest(_Model, rest=_NO_REST):
    """No effects of single elements, none of products with the context; the products' own appeal stays."""


class NoPairs(_Model, rest=RestSettings(pair=NOTHING), core=CoreSettings(scales=PriorScales(content_pair=NOTHING))):
    """No effects of pairs, neither of content nor of elements."""


class NoTraits(_Model, trait_scale=0.0):
    """Elements are what their content says."""


class NoAppeal(_Model, rest=RestSettings(product=NOTHING, product_context=NOTHING)):
    """No product has an appeal of its own."""


class FixedVariances(_Model, core=CoreSettings(learn_variances=False)):
    """Prior variances stay where they start."""


class OneMemory(_Model, memories=(Memory(),)):
    """The memory that forgets nothing, alone."""


class SamePairs(_Model, memories=(Memory(), Memory(forget=0.01))):
    """No memory expects more of pairs than the others."""


class NoChangeTest(_Model, change=ChangeSettings(threshold=math.inf)):
    """Nothing widens what is known."""


class NoContent(Genco):
    """Elements are names only."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(replace(facts, content_size=0), seed)

    def catalog(self, catalog: CatalogNow) -> None:
        """Tell of the elements without their content."""
        nothing = np.zeros((*catalog.content.shape[:2], 0), np.float32)
        super().catalog(replace(catalog, content=nothing))


class NoGenerator(_Ablation):
    """The draws start from their best main effects."""

    changes: ClassVar = {"proposals": 0}


class CreativeCredit(_Ablation):
    """The generator's slots all get the credit of the whole creative."""

    changes: ClassVar = {"generator": GeneratorSettings(slot_credit=0.0)}


class _Raw(Policy):
    def _winners(self, problem: Problem, start_RT: IntArray) -> IntArray:
        return start_RT[np.arange(problem.num_draws) % len(start_RT)]


class _RawLearner(OnlineLearner):
    def _policy(self, identity: str) -> Policy:
        settings = replace(self._policy_settings(), temperature=1.0)
        return _Raw(self._spec, self._tensors(), settings, identity)


class RawGenerator(Genco):
    """What the generator proposes is shown as it is."""

    def make_learner(self, seed: int) -> OnlineLearner:
        """Return a learner whose policy does not refine."""
        return _RawLearner(LearnerSettings(seed=seed, proposals=32))


class _PlainLearner(OnlineLearner):
    @property
    def late_share(self) -> float:
        return 0.0


class LabelsAsTheyCome(Genco):
    """Provisional negatives count like final ones."""

    def make_learner(self, seed: int) -> OnlineLearner:
        """Return a learner that corrects no weight."""
        return _PlainLearner(LearnerSettings(seed=seed))


class WaitsForTheWindow(Genco):
    """Nothing is learned before the attribution window is over; then every label is final."""

    def __init__(self, facts: Facts, seed: int) -> None:
        super().__init__(facts, seed)
        self._waiting: Labels | None = None

    def learn(self, labels: Labels) -> None:
        """Keep the labels; learn those whose window is over."""
        is_late = labels.kind == LATE_POSITIVE
        fresh = labels.take(np.flatnonzero(~is_late))
        known = fresh if self._waiting is None else Labels.concat([self._waiting, fresh])
        clicked = np.isin(known.number, labels.number[is_late])
        label = np.where(clicked, 1, known.label)
        known = replace(known, label=label, kind=np.full(len(known), FINAL))
        now_ms = fresh.occurred_ms.max(initial=0)
        is_over = known.occurred_ms <= now_ms - WINDOW_MS
        self._waiting = known.take(np.flatnonzero(~is_over))
        super().learn(known.take(np.flatnonzero(is_over)))
