"""The policies on a real log: the Open Bandit dataset, replayed.

A log has what its own policy showed, so nobody's regret is known. Each policy learns the log batch by batch, and before
each batch it is asked what it would show: the click rate that this would have had is estimated by self-normalized
importance weighting (SNIPS), weight = probability of the logged item under the policy / its logged propensity. The
probability is a share of `ASKED` choices, for Thompson sampling has no other. A campaign is a product with the single
slot `item`; of the context are told the position, one feature of the user and the hour of the day.

With the few clicks of the small sample the standard errors are as large as the click rates: it shows that everybody can
play a real log, and no more.

References:
    Saito et al. (2020), Open Bandit Dataset and Pipeline, arXiv 2008.07146.
    Swaminathan and Joachims (2015), The Self-Normalized Estimator for Counterfactual Learning.

Shapes: N rows of a batch, S = 1 slot, A = E items, F content numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.regret.policies import ENTRIES
from benchmarks.regret.policies.base import (
    FINAL,
    PROVISIONAL,
    BenchPolicy,
    CatalogNow,
    Facts,
    Ints,
    Labels,
    RequestBatch,
)
from benchmarks.regret.worlds import BATCH
from genco.obd import SLOT, LoadedLog, find_logs, load
from streams.contracts.encoders import ContentEncoder

FloatArray = NDArray[np.float64]

ASKED: Final = 40
"""Choices from which the probability of the logged item is estimated."""
CONTENT_SIZE: Final = 8
USER_FEATURE: Final = "user_feature_2"


def replay(folder: Path, policies: Sequence[str], say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Replay every log below a folder with every policy.

    Returns:
        `obd.{log}`: `rows`, `clicks`, `click_rate` and for each policy `policies.{name}`: `snips`, its standard error
        `se` and the `effective_size` of the estimate in rows.

    Raises:
        ValueError: If there is no log, or one has fewer than two batches.
    """
    out: dict[str, Any] = {}
    for log in find_logs(folder):
        loaded = load(log)
        name = f"{log.policy}-{log.campaign}"
        rows = len(loaded.click)
        if rows < 2 * BATCH:
            raise ValueError(f"log {name} has {rows} rows; expected at least {2 * BATCH}, two batches")
        out[name] = {
            "rows": rows,
            "clicks": int(loaded.click.sum()),
            "click_rate": float(loaded.click.mean()),
            "policies": {},
        }
        labels, facts, catalog = as_labels(loaded)
        for policy in policies:
            say(f"{name}: {policy}")
            played = ENTRIES[policy].load()(facts, seed=0)
            out[name]["policies"][policy] = estimate(played, labels, catalog)
    return {"obd": out}


def as_labels(loaded: LoadedLog) -> tuple[Labels, Facts, CatalogNow]:
    """Return a log as what the policies are told; its propensities are those that were logged."""
    num_items, n = len(loaded.elements), len(loaded.click)
    positions, position = np.unique([c["position"] for c in loaded.contexts], return_inverse=True)
    users, user = np.unique([c.get(USER_FEATURE, "") for c in loaded.contexts], return_inverse=True)
    facts = Facts(
        num_products=1,
        num_slots=1,
        num_candidates=num_items,
        num_elements=num_items,
        content_size=CONTENT_SIZE,
        devices=tuple(positions.tolist()),
        segments=tuple(users.tolist()),
        slots=(SLOT,),
    )
    encoder = ContentEncoder(CONTENT_SIZE)
    content = np.array([encoder.encode(SLOT, element["features"], element["text"]) for element in loaded.elements])
    requests = RequestBatch(
        product=np.zeros(n, np.int64),
        device=position[loaded.context].astype(np.int64),
        segment=user[loaded.context].astype(np.int64),
        hour=loaded.time_ms // 3_600_000 % 24,
        candidates=np.broadcast_to(np.arange(num_items), (n, 1, num_items)),
    )
    labels = Labels(
        number=np.arange(n),
        requests=requests,
        chosen=loaded.item_id[:, None],
        propensity=loaded.propensity[:, None],
        label=loaded.click,
        kind=np.where(loaded.click > 0, FINAL, PROVISIONAL),
        occurred_ms=loaded.time_ms,
        delay_ms=np.zeros(n, np.int64),
        weight=np.ones(n),
    )
    candidates = np.arange(num_items)[None, None]
    return labels, facts, CatalogNow(0, content[None].astype(np.float32), candidates)


def estimate(policy: BenchPolicy, labels: Labels, catalog: CatalogNow) -> dict[str, float | None]:
    """Let a policy learn a log in order, and estimate what it would have shown; the first batch only teaches."""
    policy.catalog(catalog)
    weights, clicks = [], []
    for start in range(0, len(labels), BATCH):
        batch = labels.take(np.arange(start, min(start + BATCH, len(labels))))
        if start:
            weights.append(_probability(policy, batch.requests, batch.chosen) / batch.propensity[:, 0])
            clicks.append(batch.label)
        policy.learn(batch)
    return snips(np.concatenate(weights), np.concatenate(clicks))


def _probability(policy: BenchPolicy, requests: RequestBatch, logged: Ints) -> FloatArray:
    """Return the (N,) share of `ASKED` choices that are the logged ones."""
    again = requests.take(np.tile(np.arange(len(requests)), ASKED))
    agrees = (policy.choose(again).chosen == np.tile(logged, (ASKED, 1))).all(axis=1)
    share: FloatArray = agrees.reshape(ASKED, len(requests)).mean(axis=0)
    return share


def snips(weight: FloatArray, reward: Ints) -> dict[str, float | None]:
    """Return the self-normalized estimate, its standard error and the effective number of rows; null without overlap.

    Example:
        >>> snips(np.array([2.0, 0.0, 2.0]), np.array([1, 1, 0]))["snips"]
        0.5
    """
    total = float(weight.sum())
    if total == 0:
        return {"snips": None, "se": None, "effective_size": 0.0}
    value = float((weight * reward).sum()) / total
    se = math.sqrt(float((weight**2 * (reward - value) ** 2).sum())) / total
    return {"snips": value, "se": se, "effective_size": total**2 / float((weight**2).sum())}
