"""Simulated traffic for the monitor in virtual time: the loop without its processes.

Shoppers are those of `genco.world`, the policy is a mixture of good creatives of each card, and the model knows the
truth of a while ago. A scenario breaks one thing at a time that is known. Hours pass in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from genco.world import DEVICES, HOURS, NUM_CONTEXTS, SEGMENTS, Requests, World
from genco.world_config import WorldConfig
from streams.contracts.alerts import Alert, Cause
from streams.contracts.examples import EXAMPLE_SCHEMA, ExampleBatch
from streams.contracts.registry import Version
from streams.monitor.models import Model
from streams.monitor.monitor import Facts, Monitor, MonitorBounds

START_MS: Final = 1_764_000_000_000
STEP_S: Final = 10.0
LABEL_WAIT_S: Final = 10.0
WINDOW_S: Final = 30.0
EPSILON: Final = 0.02
DRAWS: Final = 32
DRIFT_S: Final = 1e6
"""World time of the second truth."""


@dataclass(kw_only=True, slots=True)
class Trouble:
    """What is wrong with the loop at the moment."""

    learned: float = 1.0
    """Share of the second truth in what the model knows, once it holds."""
    has_drifted: bool = False
    """The second truth holds."""
    appeal: float = 0.0
    """What everybody likes more, in logits."""
    bias: float = 0.0
    """Of the model, in logits; nan: the model is nan."""
    is_mix_moved: bool = False
    is_collapsed: bool = False
    skew_s: float = 0.0
    """The clock of half of the servers is ahead by so much."""
    clicks_arrive: float = 1.0
    """Share of the clicks that arrive."""
    learning_stops: bool = False
    refused: str = ""
    dead_letters: int = 0
    """In a step."""
    is_unknown: bool = False
    """Examples are written with the label kind `unknown`."""
    is_held: bool = False
    """Learning is frozen."""
    exploration: float = 1.0
    """What the registry says of it; what is shown does not follow."""


class _Predictor:
    """Knows two truths in some proportion; the column `seed` says which impression is which."""

    def __init__(self, drill: Drill, share: float, bias: float) -> None:
        self._drill, self._share, self._bias = drill, share, bias

    def predict(self, batch: ExampleBatch) -> np.ndarray[Any, np.dtype[np.float64]]:
        before, after = self._drill.logits[:, batch.seed - self._drill.first_seed]
        return 1.0 / (1.0 + np.exp(-(before + self._share * (after - before) + self._bias)))


class Drill:
    """A loop in virtual time around a monitor."""

    def __init__(
        self, *, rate: float = 40.0, seed: int = 0, drift_rate: float = 1.0, bounds: MonitorBounds | None = None
    ) -> None:
        self.world = World(WorldConfig(seed=5, num_products=8, drift_every_s=DRIFT_S, drift_rate=drift_rate))
        self.monitor = Monitor(
            bounds
            or MonitorBounds(
                attribution_window_ms=int(1000 * WINDOW_S), label_wait_ms=int(1000 * LABEL_WAIT_S), warm_examples=10_000
            )
        )
        self.rng = np.random.default_rng(seed)
        self.num_step = int(rate * STEP_S)
        self.now_s = 0.0
        self.first_seed = 0
        self.logits = np.empty((2, 0))
        self.alerts: list[tuple[float, Alert]] = []
        self.known_cause: Cause | None = None
        self._late: list[tuple[float, ExampleBatch]] = []
        self._version = 0
        self._trained_s = 0.0
        self._tables()

    # -- what never changes ---------------------------------------------------------------------------------------

    def _tables(self) -> None:
        """Draw the winners of each cell: mostly the best creative, with one or two other elements now and then."""
        world, config = self.world, self.world.config
        cells = np.arange(config.num_products * NUM_CONTEXTS)
        self.requests = Requests(
            product=cells // NUM_CONTEXTS,
            device=cells % NUM_CONTEXTS // len(SEGMENTS),
            segment=cells % len(SEGMENTS),
            hour=np.zeros_like(cells),
        )
        best = world.best_creatives(self.requests, 0.0)
        candidates = world.all_candidates(0.0)[self.requests.product]
        width, slots = config.candidates_per_slot, len(config.slots)
        winners = np.repeat(best[:, None], DRAWS, axis=1)
        other = self.rng.integers(width, size=winners.shape)
        others = np.take_along_axis(candidates[:, None], other[..., None], axis=3)[..., 0]
        self.winners = np.where(self.rng.random(winners.shape) < 0.3, others, winners)
        self.candidates = candidates
        self._ids = np.array([[world.element_id(s, e) for e in range(config.elements_per_slot)] for s in range(slots)])
        maps = [[(name, ids) for name, ids in each["candidates"].items()] for each in self._dicts()]
        self._candidate_maps = pa.array(maps, EXAMPLE_SCHEMA.field("candidates").type)
        texts = [
            f'{{"device":"{DEVICES[d]}","segment":"{SEGMENTS[s]}","hour":{h}}}'
            for d in range(len(DEVICES))
            for s in range(len(SEGMENTS))
            for h in range(HOURS)
        ]
        self._contexts = pa.array(texts)

    def _dicts(self) -> list[Any]:
        num = self.world.config.num_products
        zero = np.zeros(num, np.int64)
        return self.world.request_dicts(Requests(product=np.arange(num), device=zero, segment=zero, hour=zero), 0.0)

    # -- time -----------------------------------------------------------------------------------------------------

    def run(self, seconds: float, trouble: Trouble | Callable[[float], Trouble] | None = None) -> list[Alert]:
        """Let time pass; return the alerts that began to fire. A function of the seconds gives changing trouble."""
        begun, before = self.now_s, len(self.alerts)
        while self.now_s < begun + seconds - 1e-9:
            now = trouble(self.now_s - begun) if callable(trouble) else trouble or Trouble()
            self._step(now)
        return [alert for _, alert in self.alerts[before:] if alert.since_ms == alert.occurred_at_ms]

    def _step(self, trouble: Trouble) -> None:
        self.now_s += STEP_S
        now_ms = START_MS + int(1000 * self.now_s)
        self._publish(trouble, now_ms)
        self._keep_logits(self.num_step)
        batch, late = self._impressions(trouble)
        self._late.append((self.now_s, late))
        self.monitor.add(batch, 0, now_ms, now_ms)
        due = [each for at, each in self._late if at < self.now_s]
        self._late = self._late[-1:]
        for each in due:
            self.monitor.add(each, 0, now_ms, now_ms)
        facts = Facts(
            is_held=trouble.is_held,
            exploration=trouble.exploration,
            refused=trouble.refused,
            num_dead_letters=trouble.dead_letters,
            known_cause=self.known_cause,
        )
        for alert in self.monitor.tick(now_ms, facts):
            self.alerts.append((self.now_s, alert))

    def _publish(self, trouble: Trouble, now_ms: int) -> None:
        if trouble.learning_stops or trouble.refused:
            return
        self._version += 1
        self._trained_s = self.now_s - LABEL_WAIT_S
        share = trouble.learned if trouble.has_drifted else 0.0
        trained_ms = START_MS + int(1000 * self._trained_s) - 1
        model = Model(
            Version(1, self._version),
            since_ms=now_ms - int(1000 * (LABEL_WAIT_S + STEP_S)),
            trained_to_ms=trained_ms,
            predictor=_Predictor(self, share, trouble.bias),
            norms={"norm_mean": 5.0 if np.isfinite(trouble.bias) else float("nan")},
            epsilon=EPSILON,
        )
        self.monitor.set_model(model)

    def _keep_logits(self, num: int) -> None:
        """Forget all but the logits of the last step."""
        self.first_seed += self.logits.shape[1] - num if self.logits.shape[1] > num else 0
        self.logits = self.logits[:, -num:]

    # -- traffic --------------------------------------------------------------------------------------------------

    def _impressions(self, trouble: Trouble) -> tuple[ExampleBatch, ExampleBatch]:
        """Return the examples whose wait is over in this step, and their late positives."""
        rng, num = self.rng, self.num_step
        requests = self.world.requests(rng, num, 0.0)
        if trouble.is_mix_moved:
            requests = replace(requests, product=np.where(rng.random(num) < 0.6, 3, requests.product))
        creatives, slot_p, is_holdout = self._choose(requests, trouble)
        both = [self.world.click_probability(requests, creatives, at) for at in (0.0, DRIFT_S)]
        logits = np.array([np.log(p / (1 - p)) for p in both])
        self.logits = np.concatenate([self.logits, logits], axis=1)
        truth = logits[int(trouble.has_drifted)] + trouble.appeal
        is_click = rng.random(num) < 1.0 / (1.0 + np.exp(-truth))
        is_click &= rng.random(num) < trouble.clicks_arrive
        delays_ms = np.maximum(1, 1000 * self.world.delays(rng, num)).astype(np.int64)
        shown_s = self.now_s - LABEL_WAIT_S - STEP_S * np.sort(rng.random(num))[::-1]
        times_ms = START_MS + (1000 * shown_s).astype(np.int64)
        skewed_ms = np.where(rng.random(num) < 0.5, int(1000 * trouble.skew_s), 0)
        in_time = delays_ms <= 1000 * LABEL_WAIT_S
        columns = {
            "occurred_at_ms": times_ms + skewed_ms,
            "delay_ms": delays_ms - skewed_ms,
            "is_click": is_click & in_time,
            "holdout": is_holdout,
            "kind": np.where(is_click & in_time, "final", "provisional"),
        }
        if trouble.is_unknown:
            columns["kind"] = np.full(num, "unknown")
        batch = self._batch(requests, creatives, slot_p, columns)
        rows = np.flatnonzero(is_click & ~in_time)
        columns |= {"is_click": is_click, "kind": np.full(num, "unknown" if trouble.is_unknown else "late_positive")}
        return batch, self._batch(requests, creatives, slot_p, columns, rows)

    def _choose(self, requests: Requests, trouble: Trouble) -> tuple[Any, Any, Any]:
        """Return creatives, slot propensities given the earlier slots (N, S), and whether the uniform share chose."""
        rng, num = self.rng, len(requests)
        winners = self.winners[requests.cell]
        if trouble.is_collapsed:
            winners = np.repeat(winners[:, :1], DRAWS, axis=1)
        candidates = self.candidates[requests.cell]
        width, slots = candidates.shape[2], winners.shape[2]
        chosen = winners[np.arange(num), rng.integers(DRAWS, size=num)]
        uniform = np.take_along_axis(candidates, rng.integers(width, size=(num, slots))[..., None], axis=2)[..., 0]
        is_holdout = rng.random(num) < EPSILON
        creatives = np.where(is_holdout[:, None], uniform, chosen)
        agree = np.logical_and.accumulate(winners == creatives[:, None], axis=2).mean(axis=1)
        joint = (1 - EPSILON) * agree + EPSILON * float(width) ** -np.arange(1, slots + 1)
        slot_p = joint / np.concatenate([np.ones((num, 1)), joint[:, :-1]], axis=1)
        return creatives, slot_p, is_holdout

    def _batch(self, requests: Requests, creatives: Any, slot_p: Any, columns: Any, rows: Any = None) -> ExampleBatch:
        """Return the impressions of this step as examples, or some rows of them."""
        seed = self.first_seed + self.logits.shape[1] - len(requests) + np.arange(len(requests))
        if rows is not None:
            requests = Requests(**{each.name: getattr(requests, each.name)[rows] for each in fields(requests)})
            creatives, slot_p, seed = creatives[rows], slot_p[rows], seed[rows]
            columns = {name: column[rows] for name, column in columns.items()}
        num, slots = len(requests), self.world.config.slots
        context = (requests.device * len(SEGMENTS) + requests.segment) * HOURS + requests.hour
        offsets = pa.array(np.arange(num + 1) * len(slots), pa.int32())
        names = pa.array(np.tile(slots, num))
        elements = pa.array(self._ids[np.arange(len(slots)), creatives].ravel())
        is_click = columns["is_click"]
        values = {
            "decision_id": pa.array([f"d{s}" for s in seed.tolist()]),
            "occurred_at_ms": columns["occurred_at_ms"],
            "product_id": pa.array(self.world.product_ids).take(pa.array(requests.product)),
            "context": self._contexts.take(pa.array(context)),
            "candidates": self._candidate_maps.take(pa.array(requests.product)),
            "creative": pa.MapArray.from_arrays(offsets, names, elements),
            "slot_propensities": pa.MapArray.from_arrays(offsets, names, pa.array(slot_p.ravel())),
            "propensity": slot_p.prod(axis=1),
            "model_id": pa.array(["default"] * num),
            "epoch": np.ones(num, np.int64),
            "policy_version": np.full(num, self._version),
            "source": pa.array(["policy"] * num),
            "holdout": columns["holdout"],
            "seed": seed,
            "survival_probability": np.ones(num),
            "label": is_click.astype(np.int8),
            "reward": is_click.astype(np.float64),
            "label_kind": pa.array(columns["kind"]),
            "delay_ms": pa.array(columns["delay_ms"], mask=~is_click),
        }
        arrays = [pa.array(values[name]) for name in EXAMPLE_SCHEMA.names]
        return ExampleBatch(pa.RecordBatch.from_arrays(arrays, schema=EXAMPLE_SCHEMA))
