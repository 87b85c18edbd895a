"""One of several processes that learn together, as `test_followers.py` starts them. Arguments: task, folder."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.checkpoint import pack, unpack
from learner.followers import dismiss, follow, learner_maker
from learner.online import LearnerSettings, OnlineLearner
from learner.workers import ProcessGroup
from streams.contracts.catalog import Element, Product
from streams.contracts.examples import ExampleBatch, decode_examples
from streams.contracts.growing import FeatureLimits
from tests.learner.scene import record

SLOTS = {slot: [f"{slot}{i}" for i in range(4)] for slot in ("title", "image")}
SIZES = (90, 1, 257, 64, 3, 400, 1, 130)
"""Of the batches: odd ones, which two processes share unevenly, and single examples, of which one has none."""


def settings() -> LearnerSettings:
    before = LearnerSettings(num_draws=8, features=FeatureLimits(content_size=4))
    small = replace(before.generator, cards=8, group_size=4, examples_per_step=50)
    # Beyond the warm-up, so that traits, prior variances and the test of change have their turn.
    change = replace(before.reward_model.change, warm_examples=300)
    model = replace(before.reward_model, warm_examples=300, variance_every=200, change=change)
    return replace(before, generator=small, reward_model=model)


def catalog(seed: int, names: dict[str, list[str]]) -> tuple[dict[str, Element], dict[str, Product]]:
    rng = np.random.default_rng(seed)
    elements = {
        name: Element(element_id=name, slot=slot, features=tuple(rng.standard_normal(3)), text=f"{slot} {seed}")
        for slot, ids in names.items()
        for name in ids
    }
    return elements, {f"p{seed}": Product(product_id=f"p{seed}", slots={s: tuple(ids) for s, ids in names.items()})}


def batch(number: int, size: int) -> ExampleBatch:
    rng = np.random.default_rng(number)
    title, image, product = rng.integers(4, size=size), rng.integers(4, size=size), rng.integers(3, size=size)
    device = rng.integers(2, size=size)
    logit = -1.5 + np.array([-0.7, 0.0, 0.4, 0.9])[title] + np.array([0.5, 0.0, -0.5, 0.2])[image] * (2 * device - 1)
    clicked = rng.random(size) < 1 / (1 + np.exp(-logit))
    columns = {
        "product_id": [f"p{p}" for p in product],
        "context": [json.dumps({"device": ("ios", "web")[d]}) for d in device],
        "candidates": [SLOTS] * size,
        "creative": [{"title": f"title{t}", "image": f"image{i}"} for t, i in zip(title, image, strict=True)],
        "slot_propensities": [{"title": 0.25, "image": 0.25}] * size,
        "propensity": [1 / 16] * size,
        "label": clicked.astype(int).tolist(),
        "reward": clicked.astype(float).tolist(),
        "delay_ms": [1_000 if c else None for c in clicked],
    }
    return decode_examples(record(0, number, size, **columns))


def scenario(make_learner: Callable[[], OnlineLearner]) -> OnlineLearner:
    """Learn uneven batches, changes of the catalog, nothing new, nothing at all; once go back to a checkpoint."""
    learner = make_learner()
    learner.apply_catalog(*catalog(0, SLOTS))
    for number, size in enumerate(SIZES):
        learner.update(batch(number, size))
        if number == 2:
            assert learner.update(batch(2, SIZES[2])).num_learned == 0  # all of them are known
            assert learner.update(ExampleBatch.empty()).num_learned == 0
        if number == 4:
            saved = pack(*learner.state())
            learner.update(batch(100, 77))
            # What `Worker` does to undo an update.
            learner = make_learner()
            learner.restore(*unpack(saved))
            learner.apply_catalog(*catalog(1, {"title": ["title4"], "image": ["image1"]}))
    return learner


def write(folder: Path, name: str, learner: OnlineLearner) -> None:
    (folder / f"{name}.safetensors").write_bytes(pack(*learner.state()))


def learn(folder: Path) -> None:
    """Lead or follow through the scenario, and leave the learner in the folder."""
    group = ProcessGroup("cpu")
    if group.rank:
        learner = follow(group)
        assert learner is not None
    else:
        learner = scenario(learner_maker(settings(), "cpu", group))
        dismiss(group)
    write(folder, f"rank{group.rank}", learner)


def go_on_for_ever(folder: Path) -> None:
    """Learn one batch after the other until another process is gone."""
    group = ProcessGroup("cpu", timedelta(seconds=3))
    (folder / f"pid{group.rank}").write_text(str(os.getpid()))
    if group.rank:
        follow(group)
        return
    learner, number = learner_maker(settings(), "cpu", group)(), 0
    while True:
        learner.update(batch(number, 50))
        number += 1
        (folder / "learned").write_text(str(number))
        time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks: dict[str, Any] = {"learn": learn, "go_on_for_ever": go_on_for_ever}
    tasks[sys.argv[1]](Path(sys.argv[2]))
