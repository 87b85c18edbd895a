"""`genco learn --once`: a log in any of its forms gives one model, an archive with its updates gives the live one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("torch")

from genco.cli import main
from genco.obd import write_log
from learner.online import LearnerSettings, OnlineLearner
from streams.archive_chunk import Chunk
from streams.archive_folder import ArchiveFolder
from streams.archive_store import Store
from streams.contracts.events import Click, Impression
from streams.contracts.examples import example_record
from streams.contracts.snapshot import SnapshotManifest, unpack_tensors, verify
from streams.example_spans import SpanRule
from streams.log_examples import LogSummary, log_updates
from tests.builders import clicked, shown
from tests.learner.scene import PARTITIONS, Kafka, Scene, record

OBD = Path(__file__).parents[1] / "data" / "obd"
START_MS = 1_764_000_000_000
FAST = ("--min-examples", "150", "--window", "600", "--label-wait", "10")


@pytest.fixture(autouse=True)
def _few_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENCO_PARTICLES", "2")


def learn(log: Path, out: Path, *options: str) -> dict[str, Any]:
    report = out.with_suffix(".json")
    assert main(["learn", "--once", str(log), "--out", str(out), "--json", str(report), *options]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def line(event: Impression | Click) -> str:
    kind = "impression" if isinstance(event, Impression) else "click"
    return json.dumps({"type": kind, **msgspec.to_builtins(event)})


def events(count: int = 600) -> list[Impression | Click]:
    """Make impressions of one product over two minutes across a full hour, and clicks up to a minute after them."""
    rng = np.random.default_rng(5)
    start_ms = START_MS // 3_600_000 * 3_600_000 - 60_000
    found: list[Impression | Click] = []
    for i in range(count):
        title = int(rng.integers(3))
        impression = shown(
            f"{rng.integers(100)}.{i}",
            start_ms + i * 200,
            candidates={"title": ["t0", "t1", "t2"]},
            creative={"title": f"t{title}"},
            slot_propensities={"title": 1 / 3},
            propensity=1 / 3,
        )
        found.append(impression)
        if rng.random() < (0.1, 0.2, 0.4)[title]:
            found.append(clicked(impression.decision_id, impression.occurred_at_ms + int(rng.exponential(15_000))))
    return sorted(found, key=lambda event: event.occurred_at_ms)


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def write_archive(directory: Path, partitions: Sequence[Sequence[bytes]], records_a_chunk: int = 4) -> Path:
    folder = ArchiveFolder(Store(str(directory)))
    for partition, values in enumerate(partitions):
        for first in range(0, len(values), records_a_chunk):
            chunk = Chunk(partition, first, 0.0)
            for offset, value in enumerate(values[first : first + records_a_chunk], first):
                assert chunk.add(offset, value) is None
            folder.publish(folder.stage(chunk))
    return directory


def joined_records(log: Path, partitions: int, size: int) -> list[list[bytes]]:
    """Return the examples of a log as a joiner of many partitions would write them."""
    rule = SpanRule(label_wait_ms=10_000, attribution_window_ms=600_000, min_examples=1)
    tables = [update.examples for update in log_updates(log, rule, LogSummary())]
    examples = pa.concat_tables(tables).combine_chunks()
    partition_N = np.array([hash_of(name) % partitions for name in examples.column("decision_id").to_pylist()])
    return [
        [
            example_record(batch)
            for batch in examples.filter(pa.array(partition_N == p)).combine_chunks().to_batches(max_chunksize=size)
        ]
        for p in range(partitions)
    ]


def hash_of(name: str) -> int:
    return sum(name.encode())


def test_events_arrow_and_archive_give_the_same_model(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log.ndjson", [line(event) for event in events()])
    expected = learn(log, tmp_path / "events", *FAST)
    assert expected["updates"] >= 3
    assert expected["log"]["impressions"] == expected["progressive_validation"]["impressions"] == 600
    assert expected["examples_learned"] > 600, "there are late positives"
    assert not expected["log"]["behind"]

    archive = write_archive(tmp_path / "archive", joined_records(log, 3, 40))
    assert len(list(archive.glob("date=*/hour=*"))) == 2
    found = learn(archive, tmp_path / "from_archive", *FAST)
    assert found["policy"]["sha256"] == expected["policy"]["sha256"]

    (tmp_path / "arrow").mkdir()
    for number, value in enumerate(joined_records(log, 1, 100)[0]):
        (tmp_path / "arrow" / f"{number:03d}.arrow").write_bytes(value)
    found = learn(tmp_path / "arrow", tmp_path / "from_arrow", *FAST)
    assert found["policy"]["sha256"] == expected["policy"]["sha256"]


def test_archive_with_its_updates_gives_the_live_learners_model(tmp_path: Path) -> None:
    kafka = Kafka.filled(6, 30)
    for i in range(2):
        kafka.add_element(f"t{i}", float(i), 1.0)
    scene = Scene(tmp_path / "live", kafka, update_max_examples=100)
    scene.make_learner = lambda: OnlineLearner(LearnerSettings.from_settings(scene.settings))
    scene.run(rng=np.random.default_rng(1))
    kafka.add_element("t2", 2.0, 1.0)  # in the middle of the log
    kafka.add_element("t1", -1.0, 1.0)
    for partition in range(PARTITIONS):
        kafka.examples[partition] += [record(partition, offset, 30) for offset in range(6, 9)]
    worker = scene.run(rng=np.random.default_rng(2))

    archive = write_archive(tmp_path / "archive", kafka.examples)
    updates = write_lines(tmp_path / "updates.ndjson", [update.model_dump_json() for update in kafka.updates])
    catalog = write_lines(tmp_path / "catalog.ndjson", [value.decode() for _, value in kafka.catalog])
    found = learn(archive, tmp_path / "out", "--updates", str(updates), "--catalog", str(catalog))
    assert found["policy"]["version"] == worker._number >= 4
    assert found["policy"]["sha256"] == scene.registry.published[-1].manifest.sha256
    assert not found["log"]["left_out"]


def test_archive_that_lacks_examples_of_an_update_says_so(tmp_path: Path) -> None:
    kafka = Kafka.filled(2, 30)
    Scene(tmp_path / "live", kafka).run()
    updates = write_lines(tmp_path / "updates.ndjson", [update.model_dump_json() for update in kafka.updates])
    archive = write_archive(tmp_path / "archive", [kafka.examples[0]])
    found = learn(archive, tmp_path / "out", "--updates", str(updates))
    assert found["log"]["left_out"] == {"examples missing from the archive": 1}
    assert "60 found, 120 recorded" in found["log"]["first_left_out"]


def test_run_in_two_parts_equals_the_run_in_one(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log.ndjson", [line(event) for event in events(400)])
    expected = learn(log, tmp_path / "whole", *FAST)
    learn(log, tmp_path / "parts", *FAST, "--max-updates", "1")
    found = learn(log, tmp_path / "parts", *FAST, "--resume")
    assert found["resumed_at_update"] == 1
    assert found["updates"] == expected["updates"] - 1
    assert found["policy"]["sha256"] == expected["policy"]["sha256"]


def test_bad_lines_are_counted_and_told_and_change_nothing(tmp_path: Path) -> None:
    lines = [line(event) for event in events(200)]
    expected = learn(write_lines(tmp_path / "good.ndjson", lines), tmp_path / "good", *FAST)
    bad = [*lines[:9], "{not json", *lines[9:50], '{"type": "view"}', "\x00", *lines[50:]]
    found = learn(write_lines(tmp_path / "bad.ndjson", bad), tmp_path / "bad", *FAST)
    assert sum(found["log"]["left_out"].values()) == 3
    assert "bad.ndjson line 10: " in found["log"]["first_left_out"]
    assert found["policy"]["sha256"] == expected["policy"]["sha256"]


def test_damaged_file_of_an_archive_is_left_out(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", Kafka.filled(4, 50).examples, records_a_chunk=2)
    damaged = sorted(archive.rglob("*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = learn(archive, tmp_path / "out")
    assert found["log"]["left_out"] == {"file of examples": 1}
    assert found["log"]["examples"] == 300


def test_real_log_leaves_a_policy_that_can_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENCO_SIGNING_KEY", "k" * 32)
    (summary,) = write_log(OBD, tmp_path / "log.ndjson")
    found = learn(tmp_path / "log.ndjson", tmp_path / "out", "--window", "86400", "--label-wait", "60")
    assert found["progressive_validation"]["impressions"] == summary.impressions
    assert found["progressive_validation"]["ctr"] == summary.clicks / summary.impressions
    manifest = SnapshotManifest.model_validate_json((tmp_path / "out" / "manifest.json").read_bytes())
    blob = (tmp_path / "out" / "policy.safetensors").read_bytes()
    verify(manifest, blob, b"k" * 32)
    assert manifest.sha256 == found["policy"]["sha256"]
    assert "mean.product" in unpack_tensors(blob)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--once", "nowhere", "--out", "OUT"], "no such log; expected a file or a folder"),
        (["--once", "LOG"], "--once needs --out DIR"),
        (["--out", "OUT"], "belong to --once LOG"),
        (["--once", "LOG", "--out", "OUT", "--updates", "LOG"], "--updates needs an archive"),
        (["--once", "LOG", "--out", "OUT", "--label-wait", "700"], "GENCO_LABEL_WAIT_MS is 700000; at most"),
        (["--once", "LOG", "--out", "OUT", "--catalog", "LOG"], "holds lines that are no element and no product"),
        (["--once", "LOG", "--out", "USED"], "go on from them with --resume"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    log = write_lines(tmp_path / "log.ndjson", [line(event) for event in events(20)])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "checkpoint-000000000001-0123456789abcdef.safetensors").write_bytes(b"")
    paths = {"LOG": str(log), "OUT": str(tmp_path / "out"), "USED": str(tmp_path / "used")}
    assert main(["learn", *(paths.get(option, option) for option in options)]) in (1, 78)
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    assert complaint in told[0]
