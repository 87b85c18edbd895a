"""Recent impressions as a checkpoint holds them: JSON-able, each set of candidates once.

A card of eight slots with fifty candidates each names 400 elements, and the impressions of a product mostly have the
same; written out for each of 2,048 impressions they would be most of a checkpoint, and most of the time it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from learner.gate import Logged
from serving.policy import DecisionRequest


def pack_recent(recent: Iterable[Logged]) -> dict[str, Any]:
    """Return impressions as JSON-able values."""
    places: dict[tuple[tuple[str, ...], ...], int] = {}
    rows = []
    for entry in recent:
        key = tuple((slot, *ids) for slot, ids in entry.request.candidates.items())
        place = places.setdefault(key, len(places))
        rows.append(
            [entry.request.product_id, entry.request.context, place, entry.creative, entry.propensity, entry.label]
        )
    return {"candidates": [[list(slot) for slot in key] for key in places], "rows": rows}


def unpack_recent(packed: Mapping[str, Any]) -> Iterator[Logged]:
    """Yield the impressions that `pack_recent` was given."""
    candidates = [{slot: ids for slot, *ids in key} for key in packed["candidates"]]
    for product_id, context, place, creative, propensity, label in packed["rows"]:
        yield Logged(DecisionRequest(product_id, context, candidates[place]), creative, propensity, label)
