"""`genco policy` on a real Redis and the embedded broker: what it prints, does and writes down, and how it fails."""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from rich.console import Console

from genco.cli import main
from genco.policy_diff import difference
from genco.policy_tables import show_difference, show_listing
from genco.services import MockBroker, RedisServer
from learner.publisher import Fence, Outcome, Publisher
from serving.policy import PolicySettings
from streams.contracts.growing import GrowingFeatureSpec
from streams.contracts.registry import Version
from streams.contracts.settings import KafkaSettings
from streams.contracts.snapshot import GateVerdict, PolicySnapshot, SnapshotManifest, sign
from streams.contracts.topics import partition_counts
from streams.control_log import ControlLog
from streams.registry import Registry
from tests.serving.test_policy import SLOTS, blob_of, manifest_of, tensors_of

KEY = "0123456789abcdef0123456789abcdef"


def snapshot(model: str, version: int, blob: bytes | None = None, epoch: int = 1, **changes: Any) -> PolicySnapshot:
    blob = blob_of(tensors_of(seed=version)) if blob is None else blob
    manifest = manifest_of(
        model_id=model,
        epoch=epoch,
        version=version,
        sha256=hashlib.sha256(blob).hexdigest(),
        num_bytes=len(blob),
        created_at_ms=1_764_000_000_000 + 1_000 * version,
        metrics={"log_loss": 0.5 / version, "calibration": 1.0},
        **changes,
    )
    return PolicySnapshot(sign(manifest, KEY.encode()), blob)


@pytest.fixture(scope="module")
def broker() -> Iterator[MockBroker]:
    with MockBroker(partition_counts(1)) as started:
        yield started


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


class Desk:
    """An operator at a terminal, and a learner somewhere else."""

    def __init__(self, broker: MockBroker, client: redis.Redis, model: str, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call
        self.registry = Registry(client, model)
        self.publisher = Publisher(client, model, 60_000, Fence())
        self.control = ControlLog(
            KafkaSettings(
                kafka_bootstrap_servers=broker.bootstrap_servers, kafka_api_version="2.1", kafka_fetch_max_wait_ms=50
            )
        )
        assert self.publisher.acquire()
        for version in (1, 2, 3):
            self.publisher.publish(snapshot(model, version))


@pytest.fixture
def desk(broker: MockBroker, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Desk]:
    model = f"model-{uuid.uuid4().hex[:8]}"

    def call(*arguments: str, code: int = 0, **settings: str) -> Any:
        """Run the command in this process; return what it printed, parsed if it is JSON, or its complaint."""
        for name in [name for name in os.environ if name.startswith("GENCO_")]:
            monkeypatch.delenv(name)
        given = {"GENCO_SIGNING_KEY": KEY, "COLUMNS": "200", "GENCO_MODEL_ID": model}
        given |= broker.client_settings() | redis_server.client_settings() | settings
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert main(["policy", *arguments]) == code
        out, err = capsys.readouterr()
        if code:
            # Clients of tests before this one may still say something in their threads.
            said = [line for line in err.splitlines() if line.startswith("genco policy: ")]
            assert len(said) == 1, err
            return said[0]
        return json.loads(out) if "--json" in arguments else out

    # It would go on writing to the standard error of this test.
    monkeypatch.setattr("genco.cli.configure_logging", lambda _: None)
    with redis.Redis.from_url(redis_server.url, socket_timeout=5.0) as client:
        yield Desk(broker, client, model, call)


def test_list_shows_versions_marks_and_actions(desk: Desk) -> None:
    desk.call("pin", "1.2", "--who", "ann", "--reason", "drill \x1b[31m")
    desk.call("freeze", "--who", "bob")
    refused = snapshot(desk.model, 4, gate=GateVerdict(accepted=False, reasons=("calibration 3.1",)))
    desk.publisher.show(refused.manifest)
    text = desk.call("list")
    first, head, *rows = text.splitlines()
    assert first == f"model {desk.model}: current 1.2, revision 4, pinned to 1.2, frozen; 3 versions stored"
    assert head.split()[:3] == ["version", "made", "gate"]
    assert rows[0].split()[:2] == ["1.4", "refused"]
    assert "refused: calibration 3.1" in rows[0]
    assert [row.split()[0] for row in rows[1:4]] == ["1.3", "1.2", "1.1"]
    assert rows[2].split()[1:4] == ["current,", "pinned,", "frozen"]
    assert "2025-11-24T16:00:02.000Z" in rows[2]
    assert desk.registry.manifest(Version(1, 2)).sha256[:12] in rows[2]
    actions = rows[5:]
    assert "freeze by bob (current 1.2" in actions[0]
    assert (
        "pin by ann: drill \\x1b[31m (current 1.3, revision 3 -> current 1.2, revision 4, pinned to 1.2)" in actions[1]
    )
    found = desk.call("list", "--json", "--limit", "1")
    assert [row["version"] for row in found["versions"]] == ["1.4", "1.3", "1.2"], "what is current is always there"
    assert [record["who"] for record in found["audit"]] == ["bob"]
    assert found["stored"] == 3


def test_show_prints_the_manifest(desk: Desk) -> None:
    assert desk.call("show", "--json")["version"] == 3
    assert desk.call("show", "1", "--json")["metrics"] == {"log_loss": 0.5, "calibration": 1.0}
    text = desk.call("show", "1.3")
    assert text.startswith(f"model {desk.model}, version 1.3: current\n")
    assert desk.registry.manifest(Version(1, 3)).sha256 in text
    assert "log_loss" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("show", "1.9"), "version 1.9 of model '{model}' has no readable manifest"),
        (("show", "9"), "0 stored snapshots of model '{model}' have the version 9"),
        (("show", "newest"), "expected EPOCH.VERSION"),
        (("show", "--model-id", "other"), "nothing of model 'other' is current"),
        (("pin", "7.7"), "version 7.7 of model '{model}' is not stored in Redis; genco policy list"),
        (("rollback", "1.3", "--model-id", "other"), "Redis holds nothing of model 'other'; start genco learn"),
        (("freeze", "--who", "x" * 200), "who acts has 200 characters"),
    ],
)
def test_wrong_requests_are_one_line_that_helps(desk: Desk, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint.format(model=desk.model) in desk.call(*arguments, code=1)
    assert desk.registry.state().sequence == 0


def test_version_alone_must_be_unique(desk: Desk) -> None:
    desk.publisher.release()
    assert desk.publisher.acquire()
    desk.publisher.publish(snapshot(desk.model, 3, epoch=2))
    assert "have the version 3 (2.3, 1.3)" in desk.call("show", "3", code=1)


def test_actions_print_before_and_after_and_reach_kafka(desk: Desk) -> None:
    text = desk.call("rollback", "--reason", "ctr fell")
    assert text.splitlines() == [
        "before: current 1.3, revision 3",
        "after:  current 1.2, revision 4, frozen",
        "Publications are stored and not served until: genco policy unfreeze",
    ]
    record = desk.control.newest(desk.model)
    assert record is not None
    assert record.state == desk.registry.state()
    assert record.audit is not None
    assert (record.audit.what, record.audit.reason) == ("rollback", "ctr fell")
    assert "@" in record.audit.who
    assert desk.publisher.publish(snapshot(desk.model, 4)) is Outcome.FROZEN
    assert desk.call("freeze") == "nothing to do: current 1.2, revision 4, frozen\n"
    done = desk.call("pin", "current", "--json")
    assert (done["changed"], done["recorded"], done["after"]["pin"]) == (True, True, "1:2")
    assert desk.call("unpin").splitlines()[-1] == "Publications are still not served until: genco policy unfreeze"
    assert desk.call("unfreeze").splitlines()[-1] == "The pointer stays until the next publication."
    assert desk.publisher.publish(snapshot(desk.model, 5)) is Outcome.PUBLISHED
    done = desk.call("rollback", "1", "--no-freeze", "--json")
    assert (done["after"]["pointer"]["version"], done["after"]["frozen"]) == (1, False)
    assert desk.control.newest(desk.model).state.sequence == 5  # type: ignore[union-attr]


def test_action_without_kafka_is_done_and_the_gap_is_told(desk: Desk, capsys: Any) -> None:
    complaint = desk.call("freeze", code=1, GENCO_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert "Redis has done it, but it could not be written to the topic control (no Kafka broker answers" in complaint
    assert desk.registry.state().frozen


def test_redis_that_is_gone_is_one_line(desk: Desk) -> None:
    for action in ("list", "freeze"):
        assert "set GENCO_REDIS_URL" in desk.call(action, code=1, GENCO_REDIS_URL="redis://127.0.0.1:1")


def test_diff_of_two_stored_versions(desk: Desk) -> None:
    found = desk.call("diff", "1.1", "current", "--json")
    assert (found["first"]["version"], found["second"]["version"]) == ("1.1", "1.3")
    assert found["metrics"]["log_loss"] == [0.5, 0.5 / 3]
    assert "1.1 to 1.3, made +2.0 s later" in desk.call("diff", "1.1", "1.3")
    assert "signature" in desk.call("diff", "1.1", "1.3", code=1, GENCO_SIGNING_KEY="x" * 32)


# -- difference --------------------------------------------------------------------------------------------------------


def test_snapshot_differs_from_itself_in_nothing() -> None:
    same = snapshot("m", 1)
    found = difference((same.manifest, same.blob), (same.manifest, same.blob))
    assert found["settings"] == {}
    assert all(row["change"] == 0 for row in found["tensors"])
    assert found["largest"] == {"element": [], "product": []}
    assert all(row["added"] == row["removed"] == 0 for row in found["vocabulary"].values())
    console = Console(width=120, record=True, file=io.StringIO())
    show_difference(found, console)
    assert "Both have the same weights." in console.export_text()


def test_what_moved_is_named_whatever_row_it_has() -> None:
    """The second snapshot knows the same names in another order, one more and one less, and one number has moved."""
    spec = GrowingFeatureSpec()
    for device in ("ios", "web"):
        spec.context({"device": device})
    for product in ("p1", "p0"):
        spec.product(product)
    for slot, ids in SLOTS.items():
        for element_id in reversed([*ids[1:], "new"]):
            spec.element(slot, element_id)
    frozen = spec.freeze()
    tensors = tensors_of()
    before = snapshot("m", 1, blob_of(tensors))
    first = difference((before.manifest, before.blob), (before.manifest, before.blob))
    after_tensors = dict(tensors)
    old_rows = [*(("title", e) for e in SLOTS["title"]), *(("image", e) for e in SLOTS["image"])]
    old_rows += [("tag", e) for e in SLOTS["tag"]]
    rows = [
        old_rows.index(key) if (key := (frozen.slots[slot], name)) in old_rows else 0 for slot, name in frozen.elements
    ]
    for name, array in tensors.items():
        if name in ("element", "element_sd", "element_content", "trait", "trait_root", "generator.element"):
            after_tensors[name] = array[rows].copy()
        if name in ("product", "generator.product"):
            after_tensors[name] = array[::-1].copy()
    after_tensors["pairs"] = np.zeros(0, np.uint8)
    after_tensors["pair"] = after_tensors["pair_sd"] = np.zeros(0, np.float32)
    moved = frozen.row_of("tag", "g2")
    after_tensors["element"][moved, 0] += 2.0
    settings = msgspec.json.encode(PolicySettings(epsilon=0.25))
    after = snapshot("m", 2, blob_of(after_tensors, frozen.to_json(), settings))
    found = difference((before.manifest, before.blob), (after.manifest, after.blob))
    assert found["vocabulary"]["elements"] == {"first": 9, "second": 9, "added": 3, "removed": 3}
    assert found["settings"] == {"epsilon": [PolicySettings().epsilon, 0.25]}
    changed = {row["tensor"]: row["change"] for row in found["tensors"] if row["change"] > 1e-6}
    assert changed == {"element": pytest.approx(2.0, rel=1e-6)}
    (largest,) = found["largest"]["element"]
    assert (largest["name"], largest["change"]) == ("tag/g2", pytest.approx(2.0, rel=1e-6))
    assert largest["second"] - largest["first"] == pytest.approx(2.0, rel=1e-6)
    assert [row["tensor"] for row in first["tensors"]] == [row["tensor"] for row in found["tensors"]]


def test_version_that_left_redis_is_listed_as_such() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    row = {"version": "1.1", "marks": ["pinned"], "stored": False}
    state = {"pin": "1:1", "epoch": 1}
    show_listing({"model_id": "m", "state": state, "stored": 0, "versions": [row], "audit": []}, console)
    assert "nothing is current, pinned to 1.1; 0 versions stored" in console.export_text(clear=False)
    assert "not in Redis" in console.export_text()


def test_manifest_type_is_the_contract(desk: Desk) -> None:
    text = json.dumps(desk.call("show", "--json"))
    assert SnapshotManifest.model_validate_json(text) == desk.registry.manifest(Version(1, 3))
