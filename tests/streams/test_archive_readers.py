"""The archive opens in pyarrow, DuckDB and polars, as a data set with its folders as columns, maps and all."""

from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.dataset as ds
import pytest

from streams.archive_chunk import Chunk
from streams.archive_folder import ArchiveFolder
from streams.archive_store import Store
from streams.contracts.examples import EXAMPLE_SCHEMA, decode_examples, encode_examples

FIRST_MS = 1_796_094_000_000  # 2026-12-01 03:00 UTC
CANDIDATES = {"title": ["t1", "t2"], "image": ["i1"]}


def example(number: int) -> dict[str, Any]:
    is_clicked = number % 3 == 0
    return {
        "decision_id": f"d{number}",
        "occurred_at_ms": FIRST_MS + number * 600_000,
        "product_id": "p1",
        "context": '{"device":"ios","hour":13}',
        "candidates": CANDIDATES,
        "creative": {"title": "t2", "image": "i1"},
        "slot_propensities": {"title": 0.25, "image": 1.0},
        "propensity": 0.25,
        "model_id": "default",
        "epoch": 3,
        "policy_version": 42,
        "source": "policy",
        "holdout": number % 2 == 0,
        "seed": number,
        "survival_probability": 1.0,
        "label": int(is_clicked),
        "reward": float(is_clicked),
        "label_kind": "final",
        "delay_ms": 900 if is_clicked else None,
    }


def record(first: int) -> bytes:
    examples = [example(number) for number in range(first, first + 10)]
    return encode_examples({f.name: [row[f.name] for row in examples] for f in EXAMPLE_SCHEMA})


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks of 20 examples over 7 hours, an unreadable record, and a chunk that was never committed."""
    root = tmp_path_factory.mktemp("archive") / "examples"
    folder = ArchiveFolder(Store(str(root)))
    for first, is_committed in ((0, True), (2, True), (5, False)):
        chunk = Chunk(3, first, 0.0)
        for offset in (first, first + 1):
            assert chunk.add(offset, record(offset * 10)) is None
        if first == 2:
            chunk.add(4, b"no arrow")
        journal = folder.stage(chunk)
        if is_committed:
            folder.publish(journal)
    assert list((root / "_staging").iterdir())
    return root


def test_pyarrow_reads_the_folder(archive: Path) -> None:
    data = ds.dataset(archive, format="parquet", partitioning="hive")
    table = data.to_table().sort_by("occurred_at_ms")
    assert table["decision_id"].to_pylist() == [f"d{number}" for number in range(40)]
    assert table["partition"].unique().to_pylist() == [3]
    assert table["offset"].to_pylist() == [number // 10 for number in range(40)]
    assert table["candidates"].to_pylist()[7] == list(CANDIDATES.items())
    assert data.to_table(filter=ds.field("hour") == 3)["decision_id"].to_pylist() == [f"d{n}" for n in range(6)]


def test_pyarrow_gives_back_the_examples_that_came(archive: Path) -> None:
    table = ds.dataset(archive, format="parquet", partitioning="hive").to_table(columns=EXAMPLE_SCHEMA.names)
    columns = table.sort_by("occurred_at_ms").to_pydict()
    again = decode_examples(encode_examples(columns | {n: map(dict, columns[n]) for n in MAPS}))
    assert again.creative == [{"title": "t2", "image": "i1"}] * 40
    assert again.slot_propensities == [{"title": 0.25, "image": 1.0}] * 40
    assert again.candidates == [CANDIDATES] * 40
    assert again.seed.tolist() == list(range(40))


MAPS = ("candidates", "creative", "slot_propensities")


def test_duckdb_reads_the_files(archive: Path) -> None:
    query = f"""
        select decision_id, "partition", "offset", candidates['title'], slot_propensities['title'], date, hour, delay_ms
        from read_parquet('{archive}/**/*.parquet', hive_partitioning = true) order by occurred_at_ms
    """  # noqa: S608 - a folder of ours
    with duckdb.connect() as connection:
        rows = connection.execute(query).fetchall()
    assert [row[0] for row in rows] == [f"d{number}" for number in range(40)]
    assert rows[0][1:] == (3, 0, ["t1", "t2"], 0.25, date(2026, 12, 1), 3, 900)
    assert rows[39][1:] == (3, 3, ["t1", "t2"], 0.25, date(2026, 12, 1), 9, 900)


def test_polars_reads_the_files(archive: Path) -> None:
    frame = pl.scan_parquet(f"{archive}/**/*.parquet", hive_partitioning=True).sort("occurred_at_ms").collect()
    assert frame["decision_id"].to_list() == [f"d{number}" for number in range(40)]
    assert frame["offset"].to_list() == [number // 10 for number in range(40)]
    creative = frame["creative"].to_list()[5]  # a list of pairs before polars knew maps
    pairs = creative if isinstance(creative, dict) else {pair["key"]: pair["value"] for pair in creative}
    assert pairs == {"title": "t2", "image": "i1"}
    assert frame.filter(pl.col("hour") == 9)["date"].unique().to_list() == [date(2026, 12, 1)]
    assert frame.filter(pl.col("hour") == 9).height == 4
