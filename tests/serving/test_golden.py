"""A server serves a policy only if it says what the learner says that it says."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from serving.golden import answer, check, shift
from serving.metrics import ServingMetrics, totals
from serving.policy import DecisionRequest, Policy, UniformPolicy
from serving.policy_holder import PolicyHolder
from serving.refresher import Refresher
from serving.snapshot_store import LastGood, SnapshotStore
from streams.contracts.snapshot import GoldenAnswer, SnapshotError, SnapshotManifest
from tests.serving.conftest import KEY, NOW_MS, make_snapshot
from tests.serving.test_policy import SLOTS, blob_of, manifest_of, tensors_of

REQUEST = DecisionRequest("p1", {"device": "ios", "hour": 13, "new": True}, SLOTS)
CREATIVE = {"title": "t2", "image": "i0", "tag": "g3"}


@pytest.fixture(scope="module")
def blob() -> bytes:
    return blob_of(tensors_of())


def policy_of(blob: bytes) -> Policy:
    return Policy.from_snapshot(blob, manifest_of(sha256=hashlib.sha256(blob).hexdigest(), num_bytes=len(blob)))


def manifest_with(*golden: GoldenAnswer) -> SnapshotManifest:
    return manifest_of(golden=golden)


def test_answers_are_the_policys_own(blob: bytes) -> None:
    policy = policy_of(blob)
    golden = answer(policy, REQUEST, CREATIVE)
    assert golden.expected_ctr == policy.expected_ctr(REQUEST, CREATIVE)
    every = [dict(zip(SLOTS, ids, strict=True)) for ids in itertools.product(*SLOTS.values())]
    total = sum(math.exp(answer(policy, REQUEST, creative).log_probability) for creative in every)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_manifest_brings_the_batch_through_json_bit_for_bit(blob: bytes) -> None:
    manifest = manifest_with(answer(policy_of(blob), REQUEST, CREATIVE))
    read = SnapshotManifest.model_validate_json(manifest.model_dump_json())
    assert read == manifest
    assert read.canonical_bytes() == manifest.canonical_bytes()
    assert [type(v) for v in read.golden[0].context.values()] == [str, int, bool]


def test_same_policy_passes_and_another_does_not(blob: bytes) -> None:
    policy = policy_of(blob)
    manifest = manifest_with(answer(policy, REQUEST, CREATIVE))
    check(policy, manifest)
    check(UniformPolicy(), manifest_with())
    for other in (policy_of(blob_of(tensors_of(seed=1))), UniformPolicy()):
        with pytest.raises(SnapshotError) as caught:
            check(other, manifest)
        assert caught.value.reason == "golden"


@pytest.mark.parametrize("changes", [{"expected_ctr": 0.5}, {"log_probability": -0.1}, {"log_probability": 1e308}])
def test_other_numbers_are_refused(blob: bytes, changes: dict[str, float]) -> None:
    policy = policy_of(blob)
    golden = answer(policy, REQUEST, CREATIVE).model_copy(update=changes)
    with pytest.raises(SnapshotError, match="golden request 1"):
        check(policy, manifest_with(answer(policy, REQUEST, CREATIVE), golden))


def test_shift_is_how_far_the_click_rates_moved(blob: bytes) -> None:
    policy = policy_of(blob)
    golden = answer(policy, REQUEST, CREATIVE)
    assert shift(policy, (golden,)) == 0.0
    assert shift(policy, ()) == 0.0
    half, double = (golden.model_copy(update={"expected_ctr": golden.expected_ctr * k}) for k in (0.5, 1.5))
    assert shift(policy, (half, double)) == pytest.approx((math.log(2) + math.log(1.5)) / 2)


def test_mismatch_keeps_the_last_good_policy_and_says_why(
    redis_db: redis.Redis, tmp_path: Path, metrics: ServingMetrics, publish: Callable[..., None], blob: bytes
) -> None:
    holder = PolicyHolder()
    refresher = Refresher(
        store=SnapshotStore(redis_db, "default", KEY),
        holder=holder,
        last_good=LastGood(tmp_path, "default", KEY),
        listen_client=None,
        model_id="default",
        interval_s=0.02,
        metrics=metrics,
        now_ms=lambda: NOW_MS,
    )
    spec_hash = manifest_of().feature_spec_hash
    golden = answer(policy_of(blob), REQUEST, CREATIVE)
    wrong = golden.model_copy(update={"expected_ctr": 0.9})
    for version, batch, is_served in ((1, golden, True), (2, wrong, False), (3, golden, True)):
        made = make_snapshot(version, blob=blob, feature_spec_hash=spec_hash, golden=(batch,))
        publish(redis_db, *made, revision=version)
        assert refresher.refresh() is is_served
        assert ("golden request 0" in (refresher.fault or "")) is not is_served
        assert holder.current.manifest is not None
        assert holder.current.manifest.version == (1 if version == 2 else version)
    assert totals(metrics.model_rejected) == {("golden",): 1}
    fetched = refresher._last_good.load()
    assert fetched is not None
    assert fetched.manifest.golden == (golden,)
