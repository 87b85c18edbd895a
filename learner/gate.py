"""The gate before publication: may this version be served, and if not, why?

Pure functions of numbers that were measured elsewhere: `probe` asks a policy about recent impressions, `judge` compares
all numbers with their bounds. Checks that need data are silent until there is enough of it, so a young model can be
published; what was measured is in the verdict in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.value_watch import ValueWatch
from serving.policy import DecisionRequest, Policy
from streams.contracts.snapshot import GateVerdict


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSettings:
    """Bounds of the gate."""

    max_norm: float = 1000.0
    """Largest norm of the posterior mean or of the generator in any case."""
    max_norm_ratio: float = 4.0
    """Largest growth of a norm since the last published version, once it is above `norm_floor`."""
    norm_floor: float = 10.0
    min_examples: int = 2_000
    """Examples and clicks from which calibration and entropy are judged."""
    min_clicks: int = 50
    calibration: tuple[float, float] = (0.5, 2.0)
    """Allowed ratio of observed to expected clicks."""
    max_normalized_entropy: float = 1.2
    """Log loss in units of that of the mean click rate; 1 is a model that knows nothing but this rate."""
    min_effective_size: float = 200.0
    """Effective sample size from which the off-policy estimate over the last impressions is judged."""
    max_loss: float = 0.3
    """Refused if the estimate's upper bound is below the logged click rate by this share of it, see
    `learner.value_watch`."""
    golden: int = 8
    """Recent impressions that travel with a version as its golden batch."""
    max_golden_shift: float = 1.5
    """Largest mean absolute log ratio of the click rates of the published version's golden batch, then and now."""
    golden_updates: int = 600
    """Updates after which a published version is too old to be compared so."""
    probes: int = 96
    """Recent impressions that the policy is asked about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Progressive validation over the last examples: each was predicted before it was learned."""

    num_examples: float = 0.0
    """Impressions, each counted once."""
    num_clicks: float = 0.0
    expected_clicks: float = 0.0
    log_loss: float = 0.0
    """Sum over the examples, in nats."""

    def __add__(self, other: Validation) -> Validation:
        """Return the sums of both."""
        return Validation(
            num_examples=self.num_examples + other.num_examples,
            num_clicks=self.num_clicks + other.num_clicks,
            expected_clicks=self.expected_clicks + other.expected_clicks,
            log_loss=self.log_loss + other.log_loss,
        )

    def metrics(self) -> dict[str, float]:
        """Return click rate, calibration, log loss and normalized entropy, as far as they are defined."""
        if not self.num_examples:
            return {}
        rate = self.num_clicks / self.num_examples
        out = {"ctr": rate, "log_loss": self.log_loss / self.num_examples}
        if self.num_clicks > 0:
            out["calibration"] = self.expected_clicks / self.num_clicks
        if 0 < rate < 1:
            entropy = -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
            out["normalized_entropy"] = out["log_loss"] / entropy
        return out


@dataclass(frozen=True, slots=True)
class Logged:
    """An impression as it was logged, with the label it had when it was learned first."""

    request: DecisionRequest
    creative: Mapping[str, str]
    propensity: float
    label: int


def norms(tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return the Euclidean norm of the posterior mean and of the generator."""
    out: dict[str, float] = {}
    for prefix in ("mean", "generator"):
        parts = [w for name, w in tensors.items() if name.startswith(f"{prefix}.") and name != "mean.bias"]
        out[f"norm_{prefix}"] = math.sqrt(sum(float(np.square(w, dtype=np.float64).sum()) for w in parts))
    return out


def probe(policy: Policy, logged: Sequence[Logged]) -> dict[str, float]:
    """Ask a policy about recent impressions.

    Returns:
        `entropy` (nats, mean over the requests) and `min_propensity` (smallest probability of any creative, the uniform
        share's) of the policy; and the self-normalized estimate of its click rate from the logged propensities
        (Swaminathan and Joachims 2015): `snips`, its standard error `snips_se`, the effective sample size
        `snips_effective_size`, and `logged_ctr`.
    """
    if not logged:
        return {}
    requests = [entry.request for entry in logged]
    entropies, smallest = [], 1.0
    for request, winners_MT in zip(requests, policy.winners(requests), strict=True):
        _, count = np.unique(winners_MT, axis=0, return_counts=True)
        uniform = math.exp(-sum(math.log(len(ids)) for ids in request.candidates.values()))
        epsilon = policy.settings.epsilon
        pi = (1 - epsilon) * count / len(winners_MT) + epsilon * uniform
        rest = epsilon * max(0.0, 1.0 - len(count) * uniform)
        tail = -rest * math.log(epsilon * uniform) if rest > 0 else 0.0
        entropies.append(float(-(pi * np.log(pi)).sum()) + tail)
        smallest = min(smallest, epsilon * uniform)
    joint = [p for _, p in policy.propensities(requests, [entry.creative for entry in logged])]
    weight = np.array(joint) / np.array([entry.propensity for entry in logged])
    label = np.array([entry.label for entry in logged], np.float64)
    out = {"entropy": float(np.mean(entropies)), "min_propensity": smallest, "logged_ctr": float(label.mean())}
    if weight.sum() > 0:
        estimate = float((weight * label).sum() / weight.sum())
        out["snips"] = estimate
        out["snips_se"] = float(np.sqrt((weight**2 * (label - estimate) ** 2).sum()) / weight.sum())
        out["snips_effective_size"] = float(weight.sum() ** 2 / (weight**2).sum())
    return out


def judge(
    tensors: Mapping[str, NDArray[Any]],
    *,
    before: Mapping[str, float] | None,
    validation: Validation,
    probed: Mapping[str, float],
    golden_shift: float | None = None,
    watch: ValueWatch | None = None,
    settings: GateSettings | None = None,
) -> GateVerdict:
    """Decide whether a version may be served.

    Args:
        tensors: Its tensors.
        before: `norms` of the last published version, None before the first.
        validation: Progressive validation over the last examples.
        probed: What `probe` measured.
        golden_shift: See `GateSettings.max_golden_shift`; None: there is nothing to compare with.
        watch: The off-policy estimate over the last impressions; None: there is none.
        settings: The bounds.
    """
    settings = settings or GateSettings()
    bad = [name for name, w in tensors.items() if w.dtype == np.float32 and not np.isfinite(w).all()]
    if bad:
        return GateVerdict(accepted=False, reasons=(f"{bad[0]} holds numbers that are not finite; expected none",))
    now = norms(tensors)
    metrics = validation.metrics()
    reasons = _judge_norms(now, before, settings)
    if validation.num_examples >= settings.min_examples and validation.num_clicks >= settings.min_clicks:
        reasons += _judge_validation(metrics, settings)
        # A young model moves that much, and may.
        reasons += _judge_shift(golden_shift, settings)
    reasons += _judge_probe(probed)
    if watch is not None and (loss := watch.reason()) is not None:
        reasons.append(loss)
    numbers = now | metrics | dict(probed) | {"num_validated": validation.num_examples}
    numbers |= {} if golden_shift is None else {"golden_shift": golden_shift}
    numbers |= {} if watch is None else watch.numbers()
    return GateVerdict(accepted=not reasons, reasons=tuple(reasons), numbers=numbers)


def _judge_norms(now: Mapping[str, float], before: Mapping[str, float] | None, settings: GateSettings) -> list[str]:
    reasons = []
    for name, norm in now.items():
        if norm > settings.max_norm:
            reasons.append(f"{name} is {norm:.3g}; expected at most {settings.max_norm:.3g}")
        if before is not None and norm > max(settings.norm_floor, settings.max_norm_ratio * before.get(name, 0.0)):
            reasons.append(
                f"{name} is {norm:.3g} after {before.get(name, 0.0):.3g}; expected at most "
                f"{settings.max_norm_ratio:.3g} times as much"
            )
    return reasons


def _judge_validation(metrics: Mapping[str, float], settings: GateSettings) -> list[str]:
    reasons = []
    low, high = settings.calibration
    if not low <= metrics.get("calibration", 1.0) <= high:
        reasons.append(f"expected / observed clicks is {metrics['calibration']:.3g}; expected {low:.3g} to {high:.3g}")
    if not metrics.get("normalized_entropy", 0.0) <= settings.max_normalized_entropy:
        reasons.append(
            f"normalized entropy is {metrics['normalized_entropy']:.3g}; expected at most "
            f"{settings.max_normalized_entropy:.3g}"
        )
    return reasons


def _judge_shift(shift: float | None, settings: GateSettings) -> list[str]:
    if shift is None or shift <= settings.max_golden_shift:
        return []
    return [
        f"click rates of the golden batch moved by a factor of {math.exp(shift):.3g}; expected at most "
        f"{math.exp(settings.max_golden_shift):.3g}"
    ]


def _judge_probe(probed: Mapping[str, float]) -> list[str]:
    if probed.get("min_propensity", 1.0) >= 0.0 and probed.get("entropy", 0.0) >= 0.0:
        return []
    return [
        f"policy has entropy {probed['entropy']:.3g} and smallest propensity {probed['min_propensity']:.3g}; "
        "expected numbers of at least 0"
    ]
