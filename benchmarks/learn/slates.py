"""Vowpal Wabbit's slates on the same impressions: what a card got is the cost of every slot.

Its input is text; making the text is not counted. Options as in `genco bench regret`, where it plays as well.
"""

from __future__ import annotations

import time
from typing import Final

import vowpalwabbit

from benchmarks.learn.traffic import CANDIDATES, Shown, Traffic
from benchmarks.regret.policies.vw import OPTIONS
from streams.example_records import EXAMPLES_PER_RECORD

WARM_UP_RECORDS: Final = 1


def measure(num_products: int, impressions: int) -> dict[str, float]:
    """Return how many impressions it learns in a second, and in a second of processor time.

    Args:
        num_products: Of the world.
        impressions: How many are learned while the clock runs.
    """
    traffic = Traffic(num_products=num_products)
    workspace = vowpalwabbit.Workspace(f"--slates {OPTIONS}")
    actions = {
        element_id: f"|A {element_id} {' '.join(f'f{g}:{x:.4f}' for g, x in enumerate(element.features))}"
        for element_id, element in traffic.elements.items()
    }
    seconds, used, learned = 0.0, 0.0, 0
    for number in range(WARM_UP_RECORDS + -(-impressions // EXAMPLES_PER_RECORD)):
        cards = [_lines(shown, actions) for shown in traffic.shown(number)]
        started, used_before = time.perf_counter(), time.process_time()
        for lines in cards:
            workspace.learn(lines)
        if number >= WARM_UP_RECORDS:
            seconds += time.perf_counter() - started
            used += time.process_time() - used_before
            learned += len(cards)
    return {"impressions_per_second": learned / seconds, "impressions_per_processor_second": learned / used}


def _lines(shown: Shown, actions: dict[str, str]) -> list[str]:
    """Return an impression as VW reads it: the card and its cost, each slot's candidates, and what each slot showed."""
    context, cost = shown.request["context"], -float(shown.clicked)
    shared = f"slates shared {cost} |C d{context['device']} s{context['segment']} |P {shown.request['product_id']}"
    candidates = shown.request["candidates"]
    offered = [f"slates action {s} {actions[e]}" for s, ids in enumerate(candidates.values()) for e in ids]
    chosen = [
        f"slates slot {ids.index(shown.creative[slot])}:{1 / CANDIDATES} |S s{s}"
        for s, (slot, ids) in enumerate(candidates.items())
    ]
    return [shared, *offered, *chosen]
