"""Write the golden files of schema version 1, with `PYTHONPATH=. python tests/data/v1/make.py --overwrite`.

The files are what a release wrote, so that the next one can show that it still reads them. Make them again only for a
new schema version, in a folder of its own; a test that fails on them has found a break of the format.
"""

import sys
from pathlib import Path

from streams.contracts.codec import encode_batch
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Click, Impression
from streams.contracts.examples import LabelKind
from streams.contracts.impressions import encode_impressions
from tests.builders import Labeled, examples_value

FOLDER = Path(__file__).parent
KEY = b"golden" * 6
START_MS = 1_764_000_000_000


def golden_impressions() -> list[Impression]:
    """Return impressions that between them use every field, type and odd character that version 1 allows."""
    return [
        Impression(
            schema_version=1,
            decision_id=make_decision_id(7, START_MS, 1, KEY),
            occurred_at_ms=START_MS + 123,
            product_id="p123",
            context={"device": "ios", "hour": 13, "temperature": -3.5, "returning": True, "whole": 2.0},
            candidates={"title": ["t1", "t2"], "image": ["i1", "i9"], "highlight": ["h1"]},
            creative={"title": "t2", "image": "i9", "highlight": "h1"},
            slot_propensities={"title": 0.31, "image": 0.08, "highlight": 1.0},
            propensity=0.31 * 0.08,
            model_id="default",
            epoch=3,
            policy_version=42,
            source="policy",
            holdout=False,
            seed=2**63 - 1,
            survival_probability=1.0,
        ),
        Impression(
            schema_version=1,
            decision_id=make_decision_id(65535, START_MS + 1, 2**32 - 1, KEY),
            occurred_at_ms=START_MS + 60_000,
            product_id='商品 "1" 😀',
            context={},
            # Not in alphabetical order: the order of slots has a meaning.
            candidates={"z": ["é", "a:b"], "a": ['"quoted"', "back\\slash"]},
            creative={"z": "é", "a": "back\\slash"},
            slot_propensities={"z": 0.5, "a": 0.5},
            propensity=0.25,
            model_id="other_model",
            epoch=0,
            policy_version=0,
            source="uniform",
            holdout=True,
            seed=0,
            survival_probability=0.125,
        ),
        Impression(
            schema_version=1,
            decision_id="an id of another system",
            occurred_at_ms=0,
            product_id="p",
            context={"big": 2**53, "small": -(2**53), "text": "", "line": "a\nb\u2028c"},
            candidates={"only": ["e"]},
            creative={"only": "e"},
            slot_propensities={"only": 1e-3},
            propensity=1e-3,
            model_id="m",
            epoch=2**53 - 1,
            policy_version=2**53 - 1,
            source="last_good",
            holdout=False,
            seed=1,
            survival_probability=1e-6,
        ),
    ]


def golden_clicks() -> list[Click]:
    """Return clicks on two of the impressions, and one on none."""
    first, second, _ = golden_impressions()
    return [
        Click(schema_version=1, decision_id=first.decision_id, occurred_at_ms=first.occurred_at_ms + 4_000),
        Click(schema_version=1, decision_id=second.decision_id, occurred_at_ms=START_MS + 90_000, reward=19.95),
        Click(schema_version=1, decision_id="nobody's", occurred_at_ms=4_102_444_799_999, reward=0.0),
    ]


def golden_labels() -> list[Labeled]:
    """Return each impression with its label: all three kinds."""
    first, second, third = golden_impressions()
    one, two, _ = golden_clicks()
    return [
        (first, LabelKind.FINAL, one),
        (second, LabelKind.LATE_POSITIVE, two),
        (third, LabelKind.PROVISIONAL, None),
    ]


def main() -> int:
    """Write the files."""
    files = {
        "impressions.ndjson": encode_batch(golden_impressions()),
        "impressions.arrow": encode_impressions(golden_impressions()),
        "clicks.ndjson": encode_batch(golden_clicks()),
        "examples.arrow": examples_value(golden_labels()),
    }
    if sys.argv[1:] != ["--overwrite"] and any((FOLDER / name).exists() for name in files):
        sys.stderr.write(
            "golden files exist; they are what an earlier release wrote. Say --overwrite if you mean it.\n"
        )
        return 1
    for name, data in files.items():
        (FOLDER / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
