"""`genco learn --once LOG`: learn from a log that ends, and leave a checkpoint and a policy in a folder.

No Kafka and no Redis: the log goes through the joiner's and the learner's own code in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from rich.console import Console

from genco.folders import require_folder
from learner.followers import dismiss, follow, learner_maker
from learner.once import LoggedUpdate, LogLearner, OnceReport
from learner.online import LearnerSettings
from learner.updates import Update, effective
from learner.workers import join_group, own_device
from streams.contracts.catalog import Element, Product
from streams.contracts.examples import EXAMPLE_SCHEMA, ExampleBatch, decode_examples, example_record
from streams.contracts.settings import LearnSettings, load
from streams.contracts.snapshot import SnapshotManifest
from streams.example_spans import SpanRule
from streams.log_examples import ArchiveCursor, LogSummary, log_kind, log_updates
from streams.replay import ReplaySummary, read_log
from streams.telemetry import now_ms

POLICY: Final = "policy.safetensors"
MANIFEST: Final = "manifest.json"
TELL_EVERY_S: Final = 5.0
Records = Iterable[Element | Product]


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Learn a log and return the report; None as a follower of another process (`learner.followers`).

    Args:
        arguments: Those of `genco.learn_arguments`.
        console: Where progress is told.

    Raises:
        ValueError: If there is no log, or the options do not fit it or each other.
        CheckpointError: If there are checkpoints that cannot be used.
        ConfigurationError: If a setting in the environment is wrong.
        OSError: If the folder cannot be written.
        RuntimeError: If another of several processes is gone.
    """
    if arguments.out is None:
        raise ValueError("--once needs --out DIR, a folder for checkpoints, policy and manifest")
    require_folder(arguments.json)
    settings = _settings(arguments)
    device = own_device(settings.device)
    group = join_group(device)
    if group is not None and group.rank > 0:
        follow(group)
        return None
    learner = LogLearner(
        learner_maker(LearnerSettings.from_settings(settings), device, group),
        arguments.out,
        checkpoint_every=arguments.checkpoint_every,
    )
    if arguments.resume:
        learner.resume()
    elif learner.has_checkpoint:
        raise ValueError(f"{arguments.out} holds checkpoints; go on from them with --resume, or choose another folder")
    summary = LogSummary()
    updates = _updates(arguments, settings, summary)
    started = time.monotonic()
    report = learner.learn(updates, max_updates=arguments.max_updates, progress=_Progress(console, started))
    seconds = time.monotonic() - started
    if group is not None:
        dismiss(group)
    manifest = _write_policy(learner, settings, arguments.out) if learner.number else None
    result = _result(report, summary, manifest, seconds)
    _show(result, console)
    return result


def _settings(arguments: argparse.Namespace) -> LearnSettings:
    """Return the live learner's settings, with the command line's; Kafka and Redis are not used."""
    has_key = any(os.environ.get(f"GENCO_SIGNING_KEY{suffix}") for suffix in ("", "_FILE"))
    return load(
        LearnSettings,
        kafka_bootstrap_servers="none:1",
        redis_url="redis://none",
        signing_key=None if has_key else "unsigned" * 4,
        attribution_window_ms=None if arguments.window is None else int(arguments.window * 1_000),
        label_wait_ms=None if arguments.label_wait is None else int(arguments.label_wait * 1_000),
        seed=arguments.seed,
        device=arguments.device,
    )


# -- updates ---------------------------------------------------------------------------------------------------------


def _updates(
    arguments: argparse.Namespace, settings: LearnSettings, summary: LogSummary
) -> Callable[[], Iterator[LoggedUpdate]]:
    """Return what begins the log; each time the summary starts anew."""
    rule = SpanRule(
        label_wait_ms=settings.label_wait_ms,
        attribution_window_ms=settings.attribution_window_ms,
        span_ms=int(arguments.span * 1_000),
        min_examples=arguments.min_examples,
    )
    kind = log_kind(arguments.once)
    catalog = _catalog(arguments.catalog) if arguments.catalog else []
    if arguments.updates is None:
        return lambda: _by_spans(arguments.once, rule, catalog, summary.clear())
    if kind != ".parquet":
        raise ValueError(f"--updates needs an archive, whose examples have offsets; {arguments.once} is {kind}")
    recorded = _recorded(arguments.updates)
    return lambda: _by_offsets(arguments.once, recorded, catalog, summary.clear())


def _by_spans(log: Path, rule: SpanRule, catalog: Records, summary: LogSummary) -> Iterator[LoggedUpdate]:
    waiting = list(catalog)
    for update in log_updates(log, rule, summary):
        yield _logged(update.log, update.span, update.examples, [*waiting, *update.catalog])
        waiting.clear()


def _by_offsets(
    archive: Path, recorded: list[Update], catalog: list[Element | Product], summary: LogSummary
) -> Iterator[LoggedUpdate]:
    """Yield the updates that a live learner recorded."""
    cursor, catalog_until = ArchiveCursor(archive, summary), 0
    for update in recorded:
        tables = [cursor.take(partition, until) for partition, until in sorted(update.until.items())]
        examples = pa.concat_tables(tables)
        if update.num_examples not in (None, examples.num_rows):
            summary.skip(
                f"update {update.number}",
                f"examples missing from the archive: {examples.num_rows} found, {update.num_examples} recorded",
            )
        records = catalog[catalog_until : update.catalog_until]
        catalog_until = max(catalog_until, update.catalog_until)
        yield _logged("updates", update.number, examples, records)


def _logged(log: str, place: int, examples: pa.Table, catalog: Records) -> LoggedUpdate:
    """Return an update as the learner takes it; of records of the same name the last one counts."""
    records = list(catalog)
    return LoggedUpdate(
        log=log,
        place=place,
        examples=_batch(examples),
        elements={record.element_id: record for record in records if isinstance(record, Element)},
        products={record.product_id: record for record in records if isinstance(record, Product)},
    )


def _batch(examples: pa.Table) -> ExampleBatch:
    batches = examples.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=EXAMPLE_SCHEMA)]
    return decode_examples(example_record(batches[0]))


def _recorded(path: Path) -> list[Update]:
    """Read the records of the topic `updates`, one a line.

    Raises:
        ValueError: If a line is none.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(Update.from_bytes(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    return effective(found)


def _catalog(path: Path) -> list[Element | Product]:
    """Read elements and products, one a line.

    Raises:
        ValueError: If a line is none: offsets of the catalog would no longer fit.
    """
    lines = ReplaySummary()
    records = list(read_log(path, lines))
    found = [record for record in records if isinstance(record, Element | Product)]
    if lines.skipped or len(found) < len(records):
        raise ValueError(f"{path} holds lines that are no element and no product ({lines.first_skipped or 'an event'})")
    return found


# -- what came of it -------------------------------------------------------------------------------------------------


class _Progress:
    """Tells now and then how far the log is learned."""

    def __init__(self, console: Console, started: float) -> None:
        self._console, self._started, self._told = console, started, started

    def __call__(self, report: OnceReport) -> None:
        now = time.monotonic()
        if now - self._told < TELL_EVERY_S:
            return
        self._told = now
        loss = report.validation.metrics().get("log_loss", float("nan"))
        rate = report.examples / (now - self._started)
        self._console.print(f"{report.examples:,} examples, log loss {loss:.5f}, {rate:,.0f} a second")


def _write_policy(learner: LogLearner, settings: LearnSettings, directory: Path) -> SnapshotManifest:
    """Write the policy and its manifest, which is signed if there is a key in the environment."""
    snapshot = learner.snapshot(
        model_id=settings.model_id, created_at_ms=now_ms(), signing_key=settings.signing_key_bytes()
    )
    manifest = snapshot.manifest
    if settings.signing_key.get_secret_value() == "unsigned" * 4:
        manifest = manifest.model_copy(update={"hmac": ""})
    for name, content in ((POLICY, snapshot.blob), (MANIFEST, manifest.model_dump_json(indent=2).encode())):
        temporary = directory / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.rename(directory / name)
    return manifest


def _result(
    report: OnceReport, summary: LogSummary, manifest: SnapshotManifest | None, seconds: float
) -> dict[str, Any]:
    learned = report.validation.num_examples
    return {
        "log": {
            "impressions": summary.impressions,
            "clicks": summary.clicks,
            "catalog": summary.catalog,
            "examples": summary.examples,
            "behind": summary.behind,
            "left_out": dict(summary.skipped),
            "first_left_out": summary.first_skipped,
        },
        "updates": report.updates,
        "resumed_at_update": report.resumed_at,
        "examples_learned": report.learned,
        "examples_skipped": dict(report.skipped),
        "progressive_validation": {"impressions": int(learned), **report.validation.metrics()},
        "seconds": round(seconds, 3),
        "impressions_per_second": round(learned / seconds, 1) if seconds > 0 else None,
        "policy": manifest
        and {
            "version": manifest.version,
            "sha256": manifest.sha256,
            "metrics": manifest.metrics,
            "gate": manifest.gate.model_dump(mode="json"),
        },
    }


def _show(result: dict[str, Any], console: Console) -> None:
    log, policy = result["log"], result["policy"]
    if log["left_out"]:
        console.print(
            f"left out: {json.dumps(log['left_out'])}; first: {log['first_left_out']}", markup=False, soft_wrap=True
        )
    if log["behind"]:
        console.print(f"{log['behind']} examples came after the update they belonged to; is the log sorted by time?")
    if result["examples_skipped"]:
        console.print(f"not learned: {json.dumps(result['examples_skipped'])}", markup=False, soft_wrap=True)
    for name, value in result["progressive_validation"].items():
        console.print(f"  {name} {value:.5g}" if isinstance(value, float) else f"  {name} {value}")
    console.print(
        f"{result['updates']} updates, {result['examples_learned']} examples learned, "
        f"{result['impressions_per_second']:,.0f} impressions a second",
        soft_wrap=True,
    )
    if policy is None:
        console.print("no update was made, so there is no policy")
        return
    verdict = "accepted" if policy["gate"]["accepted"] else "refused"
    console.print(
        f"policy version {policy['version']}, sha256 {policy['sha256']}: the gate {verdict} it", soft_wrap=True
    )
    for reason in policy["gate"]["reasons"]:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
