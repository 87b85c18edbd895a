"""What each search finds, against its evaluations, for what the learner knows and for what it has never seen.

A reward is the creative logit of a draw's winner under that draw, 0 for random creatives and 1 for the best that any of
the searches found, `REFERENCE_STARTS` random starts among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.search.methods import METHODS, Request
from benchmarks.search.scene import KINDS, Scene
from learner.generator import GeneratorSettings
from serving.policy import Policy

REFERENCE_STARTS: Final = 32


def run(
    num_slots: int,
    num_candidates: int,
    *,
    impressions: int,
    requests: int,
    seed: int = 0,
    generator: GeneratorSettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Let a learner learn, and measure every search.

    Returns:
        `kinds.{kind}.{family}.{setting}`: `evaluations` (for each draw), `reward` (under the draws), `reward_mean`
        (under the posterior mean), `microseconds` (one request alone); and the sizes.
    """
    scene = Scene(num_slots, num_candidates, seed)
    started = time.process_time()
    learner = scene.learn(impressions, generator, say)
    policy = learner.policy()
    result: dict[str, Any] = {
        "slots": num_slots,
        "candidates": num_candidates,
        "variant": generator.variant,
        "impressions": impressions,
        "requests": requests,
        "draws": policy.num_draws,
        "coefficients": learner.reward_model.layout.size,
        "learning_cpu_s": time.process_time() - started,
        "generator_steps": learner.generator.optimizer.num_steps,
    }
    return result | {"kinds": {kind: _measure(scene, policy, kind, requests, say) for kind in KINDS}}


def _measure(scene: Scene, policy: Policy, kind: str, num: int, say: Callable[[str], None]) -> dict[str, Any]:
    rows: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for i, asked in enumerate(scene.requests(kind, num)):
        request = Request(policy, policy.problem(asked), np.random.default_rng([scene.seed, 4, i]))
        reference = request.ascents(REFERENCE_STARTS)
        best, best_mean = request.rewards(reference.winners)
        floor, floor_mean = request.rewards(request.random(policy.num_draws, 1)[:, 0])
        found = {}
        for family, settings in METHODS.items():
            for setting, search in settings.items():
                started = time.process_time()
                what = search(request)
                seconds = time.process_time() - started
                found[family, setting] = what, *request.rewards(what.winners), seconds
        for _, reward, _, _ in found.values():
            best = np.maximum(best, reward)
        scale, scale_mean = float((best - floor).mean()), best_mean - floor_mean
        for key, (what, reward, reward_mean, seconds) in found.items():
            share = float((reward - floor).mean()) / scale
            row = what.evaluations, share, (reward_mean - floor_mean) / scale_mean, 1e6 * seconds
            rows.setdefault(key, []).append(row)
    out: dict[str, Any] = {}
    for (family, setting), values in rows.items():
        evaluations, reward, reward_mean, microseconds = np.mean(values, 0).tolist()
        out.setdefault(family, {})[setting] = {
            "evaluations": evaluations,
            "reward": reward,
            "reward_se": float(np.std([v[1] for v in values], ddof=1) / np.sqrt(len(values))),
            "reward_mean": reward_mean,
            "microseconds": microseconds,
        }
    say(
        f"{kind}: "
        + "; ".join(f"{f} {s} {v['evaluations']:.0f} {v['reward']:.4f}" for f, x in out.items() for s, v in x.items())
    )
    return out


def table(result: dict[str, Any]) -> str:
    """Return a result for people: a line for each search, a pair of columns for each kind of request."""
    lines = [
        f"{result['slots']} slots x {result['candidates']} candidates: reward under the draws (evaluations for a draw)",
        " " * 58 + "".join(f"{kind:>22}" for kind in KINDS),
    ]
    for family, settings in result["kinds"][KINDS[0]].items():
        for setting in settings:
            cells = [result["kinds"][kind][family][setting] for kind in KINDS]
            row = "".join(f"{cell['reward']:>14.4f} ({cell['evaluations']:>5.0f})" for cell in cells)
            lines.append(f"{family + ', ' + setting:<58}{row}")
    return "\n".join(lines)
