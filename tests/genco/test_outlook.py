"""What the monitor learns from the registry: the policy, what the gate refused, and which propensities are not its."""

from collections.abc import Iterator

import numpy as np
import pytest
import redis

from genco.outlook import RegistryOutlook
from genco.services import RedisServer
from serving.policy import DecisionRequest, Policy
from streams.contracts.examples import ExampleBatch
from streams.contracts.registry import (
    Version,
    blob_key,
    candidate_key,
    current_key,
    epoch_key,
    freeze_key,
    manifest_key,
    switches_key,
)
from streams.contracts.settings import MonitorSettings
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, pack_tensors, sign
from streams.registry import Registry
from streams.registry_actions import Operator, Order
from tests.builders import batch_of, changed, shown
from tests.serving.test_policy import SLOTS, spec_of, tensors_of
from tests.snapshots import KEY, snapshot


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
def settings(server: RedisServer) -> MonitorSettings:
    return MonitorSettings(
        kafka_bootstrap_servers="127.0.0.1:1",
        redis_url=server.client_settings()["GENCO_REDIS_URL"],  # type: ignore[arg-type]  # pydantic makes it a secret
        signing_key=KEY.decode(),  # type: ignore[arg-type]
    )


@pytest.fixture
def registry(settings: MonitorSettings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_url.get_secret_value()) as client:
        client.flushall()
        yield client


def publish(registry: redis.Redis, version: int) -> PolicySnapshot:
    spec = spec_of()
    tensors = tensors_of(version) | {
        "vocabulary": np.frombuffer(spec.to_json(), np.uint8),
        "settings": np.frombuffer(b'{"epsilon": 0.05}', np.uint8),
    }
    made = snapshot("default", 1, version, blob=pack_tensors(tensors), feature_spec_hash=spec.hash)
    manifest = made.manifest
    registry.set(blob_key("default", 1, version), made.blob)
    registry.set(manifest_key("default", 1, version), manifest.model_dump_json())
    pointer = {"epoch": 1, "version": version, "revision": version, "sha256": manifest.sha256}
    registry.hset(current_key("default"), mapping=pointer)
    return made


def decided(made: PolicySnapshot, share: float = 1.0) -> ExampleBatch:
    """Twelve decisions of a policy of which a share explores, as they are logged."""
    policy = Policy.from_snapshot(made.blob, made.manifest).exploring(share)
    requests = [DecisionRequest("p1", {"device": "ios"}, SLOTS, seed=seed) for seed in range(12)]
    candidates = {slot: list(ids) for slot, ids in SLOTS.items()}
    return batch_of(
        [
            shown(
                f"d{request.seed}",
                product_id="p1",
                context={"device": "ios"},
                candidates=candidates,
                creative=choice.creative,
                slot_propensities=choice.slot_propensities,
                propensity=choice.propensity,
                epoch=1,
                policy_version=made.manifest.version,
            )
            for request, choice in zip(requests, policy.choose(requests), strict=True)
        ]
    )


def test_policy_is_told_once_and_predicts_what_it_expects(settings: MonitorSettings, registry: redis.Redis) -> None:
    outlook = RegistryOutlook(settings)
    assert outlook.look(1_000, []).model is None
    made = publish(registry, 1)
    model = outlook.look(2_000, []).model
    assert model is not None
    assert (model.version, model.since_ms, model.epsilon) == (Version(1, 1), 2_000, 0.05)
    batch, policy = decided(made), Policy.from_snapshot(made.blob, made.manifest)
    request = DecisionRequest("p1", {"device": "ios"}, SLOTS)
    expected = [policy.expected_ctr(request, creative) for creative in batch.creative]
    assert model.predictor.predict(batch) == pytest.approx(expected, abs=1e-5)
    assert outlook.look(3_000, []).model is None


def test_propensities_of_another_policy_are_mismatches(settings: MonitorSettings, registry: redis.Redis) -> None:
    outlook, batch = RegistryOutlook(settings), decided(publish(registry, 1))
    look = outlook.look(1_000, [])
    look = outlook.look(2_000, [batch])
    assert (look.num_recomputed, look.num_mismatched) == (12, 0)
    wrong = changed(batch, propensity={3: 0.123})
    look = outlook.look(3_000, [wrong])
    assert (look.num_recomputed, look.num_mismatched) == (12, 1)
    unknown = changed(batch, policy_version=[2] * 12)
    assert outlook.look(4_000, [unknown]).num_recomputed == 0


def test_propensities_are_those_of_any_share_that_has_explored(
    settings: MonitorSettings, registry: redis.Redis
) -> None:
    outlook, made = RegistryOutlook(settings), publish(registry, 1)
    registry.set(epoch_key("default"), "1")
    operator = Operator(Registry(registry, "default"), registry, lambda record: None)
    outlook.look(1_000, [])
    before, after = decided(made), decided(made, share=0.25)
    assert not np.allclose(before.propensity, after.propensity)
    assert outlook.look(2_000, [after]).num_mismatched > 0
    for share in (0.25, 0.5):
        operator.explore(share, Order("ann", 1_000))
    for batch in (before, after, decided(made, share=0.5)):
        look = outlook.look(3_000, [batch])
        assert (look.exploration, look.num_recomputed, look.num_mismatched) == (0.5, 12, 0)
    assert outlook.look(4_000, [decided(made, share=0.75)]).num_mismatched > 0
    # Who has come later knows it from the registry's audit.
    late = RegistryOutlook(settings)
    late.look(5_000, [])
    assert late.look(6_000, [after]).num_mismatched == 0


def test_examples_of_unknown_label_are_not_repeated(settings: MonitorSettings, registry: redis.Redis) -> None:
    outlook, batch = RegistryOutlook(settings), decided(publish(registry, 1))
    outlook.look(1_000, [])
    nobody_knows = changed(batch, label_kind=["unknown"] * 12, propensity={3: 0.123})
    assert outlook.look(2_000, [nobody_knows]).num_recomputed == 0


def test_frozen_learning_holds_the_model_even_while_redis_is_away(
    settings: MonitorSettings, registry: redis.Redis
) -> None:
    outlook = RegistryOutlook(settings)
    publish(registry, 1)
    assert not outlook.look(1_000, []).is_held
    registry.hset(switches_key("default"), mapping={"learning_frozen": "1", "exploration": "0.5"})
    assert outlook.look(2_000, []).is_held
    registry.set(epoch_key("default"), "no number")
    look = outlook.look(3_000, [])
    assert (look.is_held, look.exploration) == (True, 0.5)


def test_freeze_and_refusal_are_told_an_old_refusal_is_not(settings: MonitorSettings, registry: redis.Redis) -> None:
    outlook = RegistryOutlook(settings)
    publish(registry, 2)
    registry.set(freeze_key("default"), "1")
    verdict = GateVerdict(accepted=False, reasons=("norm_mean is 2000",))
    for version, refused in ((1, ""), (3, "norm_mean is 2000")):
        manifest = snapshot("default", 1, version).manifest.model_copy(update={"gate": verdict})
        registry.set(candidate_key("default"), sign(manifest, KEY).model_dump_json())
        look = outlook.look(1_000, [])
        assert (look.is_held, look.refused) == (True, refused)
