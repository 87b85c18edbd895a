"""Recent impressions survive a checkpoint, and do not repeat what they share."""

import json

from learner.gate import Logged
from learner.recent import pack_recent, unpack_recent
from serving.policy import DecisionRequest


def logged(i: int, candidates: dict[str, list[str]]) -> Logged:
    request = DecisionRequest(f"p{i % 2}", {"device": "ios", "hour": i}, candidates)
    return Logged(request, {slot: ids[0] for slot, ids in candidates.items()}, 0.25, i % 3 == 0)


def test_impressions_survive_json_with_the_order_of_their_slots() -> None:
    one, other = {"title": ["t1", "t2"], "image": ["i1"]}, {"image": ["i1"], "title": ["t1", "t2"]}
    recent = [logged(i, candidates) for i, candidates in enumerate([one, other, {}, dict(one), {"title": ["t1"]}])]
    found = list(unpack_recent(json.loads(json.dumps(pack_recent(recent)))))
    assert found == recent
    assert [list(f.request.candidates) for f in found] == [list(r.request.candidates) for r in recent]


def test_shared_candidates_are_written_once() -> None:
    wide = {f"slot{s}": [f"element-{s}-{e}" for e in range(50)] for s in range(8)}
    recent = [logged(i, {slot: list(ids) for slot, ids in wide.items()}) for i in range(2_048)]
    assert len(pack_recent(recent)["candidates"]) == 1
    assert len(json.dumps(pack_recent(recent))) < 1_000_000 < len(json.dumps([r.request.candidates for r in recent]))
