"""`genco bench codec`: decoding batches of impressions, against `json.loads` and one pydantic model a line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from streams.contracts.codec import EventDecoder, encode_batch
from streams.contracts.events import Impression

BATCH: Final = 256
ROUNDS: Final = 9
SECONDS_A_ROUND: Final = 0.5
SLOTS: Final = ("title", "image", "highlight", "tag")

Identifier = Annotated[str, Field(min_length=1, max_length=128)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class PlainImpression(BaseModel):
    """The same fields and ranges as `Impression`, as one would write them with pydantic."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1]
    decision_id: Identifier
    occurred_at_ms: Annotated[int, Field(ge=0, lt=4_102_444_800_000)]
    product_id: Identifier
    context: dict[str, str | int | float | bool]
    candidates: dict[Identifier, list[Identifier]]
    creative: dict[str, str]
    slot_propensities: dict[str, Probability]
    propensity: Probability
    model_id: Identifier
    epoch: Annotated[int, Field(ge=0)]
    policy_version: Annotated[int, Field(ge=0)]
    source: Literal["policy", "last_good", "uniform"]
    holdout: bool
    seed: Annotated[int, Field(ge=0)]
    survival_probability: Probability


def _batch() -> bytes:
    """Return a record of 256 impressions with 4 slots x 6 candidates."""
    return encode_batch(
        Impression(
            schema_version=1,
            decision_id=f"7.0192f3c4a5b6{number:08x}.1c9f5d41a07be362",
            occurred_at_ms=1_764_000_000_123 + number,
            product_id=f"p{number % 30}",
            context={"device": "ios", "hour": 13, "segment": "u7"},
            candidates={slot: [f"{slot}-{k}" for k in range(6)] for slot in SLOTS},
            creative={slot: f"{slot}-{number % 6}" for slot in SLOTS},
            slot_propensities=dict.fromkeys(SLOTS, 0.5),
            propensity=0.0625,
            model_id="default",
            epoch=3,
            policy_version=42,
            source="policy",
            holdout=False,
            seed=8127 + number,
            survival_probability=1.0,
        )
        for number in range(BATCH)
    )


def _plain(value: bytes) -> list[PlainImpression]:
    return [PlainImpression(**json.loads(line)) for line in value.splitlines()]


def _rate(decode: Callable[[bytes], Any], value: bytes) -> float:
    """Return impressions a second over one round."""
    started = time.perf_counter()
    batches = 0
    while (elapsed := time.perf_counter() - started) < SECONDS_A_ROUND:
        decode(value)
        batches += 1
    return batches * BATCH / elapsed


def run() -> dict[str, Any]:
    """Return medians over rounds in which the two take turns, so that a slow moment of the machine hits both."""
    value = _batch()
    decoder = EventDecoder(Impression)
    if len(decoder.decode_batch(value).events) != BATCH or len(_plain(value)) != BATCH:
        raise RuntimeError("the benchmark's own batch does not decode")
    ours, plain = [], []
    for _ in range(ROUNDS):
        ours.append(_rate(decoder.decode_batch, value))
        plain.append(_rate(_plain, value))
    return {
        "impressions_per_second": statistics.median(ours),
        "plain_json_per_second": statistics.median(plain),
        "ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
        "bytes_per_impression": len(value) / BATCH,
        "rounds": ROUNDS,
    }
