"""Turn the Open Bandit dataset (ZOZO Research) into our event log: one decision for each row, with its true propensity.

The data set holds, for each logging policy (`random`, `bts`) and campaign (`all`, `men`, `women`), a folder
`{policy}/{campaign}` with the log `{campaign}.csv` and the items in `item_context.csv`. A row is one impression of one
item at one position. Here a campaign is a product with the single slot `item`; the position and the hashed features of
the user are the context. Item ids count from 0 in each campaign, so catalogs of two campaigns must not be mixed.

What the data lacks: clicks have no time of their own, so each gets that of its impression plus `CLICK_DELAY_MS`. The
affinities of users to items are left out: they belong neither to a request nor to an element.

References:
    Saito et al. (2020), Open Bandit Dataset and Pipeline, arXiv 2008.07146.
"""

import csv
import math
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from streams.contracts.decision_ids import NUM_ROUTES, make_decision_id

POLICIES = ("random", "bts")
CAMPAIGNS = ("all", "men", "women")
SLOT = "item"
CLICK_DELAY_MS = 1000

# Public on purpose: it proves nothing, it gives the ids of a log their usual form, the same at every import.
IMPORT_KEY = b"genco import obd"
# The logs of the six pairs of policy and campaign number their rows apart, so that their decision ids differ too.
MAX_ROWS = 2**28

_LOG_COLUMNS = ("timestamp", "item_id", "position", "click", "propensity_score")
_ITEM_COLUMNS = ("item_id", "item_feature_0")
_HASH_DIGITS = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_END_US = 4_070_908_800_000_000  # the year 2099: our events end with 2099, and a click comes after its impression

Record = dict[str, Any]
"""An event or a catalog record as JSON has it."""


@dataclass(frozen=True, slots=True)
class ObdLog:
    """Where the log lies that one policy left in one campaign."""

    policy: str
    campaign: str
    events_path: Path
    items_path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedLog:
    """A log in memory, by column: about 40 bytes a row, .5 GB for the 12 million rows of the largest log.

    Rows are in order of time; rows of the same time keep the order of the file.
    """

    log: ObdLog
    elements: list[Record]
    product: Record
    num_rows: int
    """Rows of the file; the columns below hold those that could be read."""
    skipped: dict[str, int]
    """Rows that could not be read, by the column at fault; `columns` where their number is wrong."""
    row_number: npt.NDArray[np.int64]
    """Place in the file, from 0."""
    time_ms: npt.NDArray[np.int64]
    item_id: npt.NDArray[np.int64]
    click: npt.NDArray[np.int64]
    propensity: npt.NDArray[np.float64]
    context: npt.NDArray[np.int64]
    """Index into `contexts`, which holds each distinct one once."""
    contexts: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSummary:
    """What became of one log; rows = impressions + the sum of `skipped`."""

    out: Path
    rows: int
    impressions: int
    clicks: int
    skipped: dict[str, int]
    first_ms: int | None
    """Time of the first event, None if there is none."""
    last_ms: int | None


def find_logs(source: Path) -> list[ObdLog]:
    """Find the logs at or below a folder: the root of the data set, a policy's folder or a campaign's.

    Raises:
        ValueError: If there is none, or a log lies without its items.
    """
    source = Path(os.path.abspath(source))  # "." and ".." get their names
    roots = (source, source.parent, source.parent.parent, *sorted(source.glob("*/")))
    logs = []
    for policy in POLICIES:
        for campaign in CAMPAIGNS:
            paths = (root / policy / campaign / f"{campaign}.csv" for root in roots)
            path = next((path for path in paths if path.is_relative_to(source) and path.is_file()), None)
            if path is not None:
                logs.append(ObdLog(policy, campaign, path, path.with_name("item_context.csv")))
    if not logs:
        raise ValueError(
            f"{source} holds no log of the Open Bandit dataset; looked for {{policy}}/{{campaign}}/{{campaign}}.csv "
            f"with policy {' or '.join(POLICIES)} and campaign {' or '.join(CAMPAIGNS)}; "
            "give the folder that contains random/ or bts/, or one of the folders below it"
        )
    for log in logs:
        if not log.items_path.is_file():
            raise ValueError(f"{log.items_path} is missing; the items must lie beside {log.events_path.name}")
    return logs


def read_catalog(log: ObdLog) -> tuple[list[Record], Record]:
    """Return the elements, in order of item id, and the product of a log's campaign.

    Raises:
        ValueError: If the item file is malformed: without the full set of candidates no propensity means anything.
    """
    features: dict[int, float] = {}
    texts: dict[int, str] = {}
    with log.items_path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.DictReader(lines, quoting=csv.QUOTE_NONE)
        header = _checked_header(reader.fieldnames or (), _ITEM_COLUMNS, log.items_path)
        hashed = [name for name in header if name.startswith("item_feature_") and name not in _ITEM_COLUMNS]
        for row in reader:
            item, feature, text = _item(row, hashed, f"line {reader.line_num} of {log.items_path}")
            if item in features:
                raise ValueError(f"line {reader.line_num} of {log.items_path} has item_id {item} again; must differ")
            features[item], texts[item] = feature, text
    if not features:
        raise ValueError(f"{log.items_path} holds no items; expected a line for each item of the campaign")
    mean = math.fsum(features.values()) / len(features)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in features.values()) / len(features))
    elements: list[Record] = [
        {
            "schema_version": 1,
            "element_id": f"i{item}",
            "slot": SLOT,
            "features": [(features[item] - mean) / (spread or 1.0)],
            "text": texts[item],
        }
        for item in sorted(features)
    ]
    candidates = [element["element_id"] for element in elements]
    return elements, {"schema_version": 1, "product_id": f"obd-{log.campaign}", "slots": {SLOT: candidates}}


def load(log: ObdLog) -> LoadedLog:
    """Read a log and its items; rows that cannot be read are skipped and counted.

    Raises:
        ValueError: If the item file or the header of the log is malformed, or the log has too many rows.
    """
    elements, product = read_catalog(log)
    parse = _RowParser(item_ids=product["slots"][SLOT])
    columns = [array(code) for code in "qqiidi"]
    contexts: dict[tuple[str, ...], int] = {}
    skipped: Counter[str] = Counter()
    num_rows = 0
    with log.events_path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, quoting=csv.QUOTE_NONE)  # a stray quote must not swallow the lines after it
        header = _checked_header(next(reader, []), _LOG_COLUMNS, log.events_path)
        users = [name for name in header if name.startswith("user_feature_")]
        pick = itemgetter(*(header.index(name) for name in (*_LOG_COLUMNS, *users)))
        for num_rows, cells in enumerate(_cells(reader), start=1):
            try:
                if len(cells) != len(header):
                    raise _BadRowError("columns")
                *values, context = parse(pick(cells))
            except _BadRowError as error:
                skipped[error.column] += 1
                continue
            row = (num_rows - 1, *values, contexts.setdefault(context, len(contexts)))
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"{log.events_path} has {num_rows} rows; at most {MAX_ROWS} get decision ids, split it by time"
        )
    order = np.argsort(np.array(columns[1]), kind="stable")
    number, time_us, item_id, click, propensity, context_index = (np.array(column)[order] for column in columns)
    return LoadedLog(
        log=log,
        elements=elements,
        product=product,
        num_rows=num_rows,
        skipped=dict(skipped),
        row_number=number,
        time_ms=time_us // 1000,
        item_id=item_id,
        click=click,
        propensity=propensity,
        context=context_index,
        contexts=[dict(zip(("position", *users), values, strict=True)) for values in contexts],
    )


def events(loaded: LoadedLog, num_routes: int = 64) -> Iterator[Record]:
    """Yield the impressions and clicks of a log in order of event time, a click after its impression.

    Each is a plain dictionary of our event, and `type`, which says which. Impressions share their `candidates` and
    `context` with others: do not change them.

    Args:
        loaded: The log.
        num_routes: How many routes the decision ids have; the rows of the file go round them.

    Raises:
        ValueError: If `num_routes` is out of range.
    """
    if not 1 <= num_routes <= NUM_ROUTES:
        raise ValueError(f"num_routes is {num_routes}; must be in [1, {NUM_ROUTES}]")
    waiting: deque[Record] = deque()  # clicks; all come equally late, so they are in order
    for row in range(len(loaded.time_ms)):
        impression = _impression(loaded, row, num_routes)
        while waiting and waiting[0]["occurred_at_ms"] <= impression["occurred_at_ms"]:
            yield waiting.popleft()
        yield impression
        if loaded.click[row]:
            waiting.append(
                {
                    "type": "click",
                    "schema_version": 1,
                    "decision_id": impression["decision_id"],
                    "occurred_at_ms": impression["occurred_at_ms"] + CLICK_DELAY_MS,
                    "reward": 1.0,
                }
            )
    yield from waiting


def write_log(source: Path, out: Path, num_routes: int = 64) -> list[ImportSummary]:
    """Write each log at `source` as newline-delimited JSON: first its elements and product, then its events.

    Args:
        source: A folder, as for `find_logs`.
        out: A folder, which gets `{policy}-{campaign}.ndjson` for each log; or one file, whose name ends in `.ndjson`.
        num_routes: How many routes the decision ids have.

    Returns:
        A summary for each log. A file stands under its name only when it is complete.

    Raises:
        ValueError: If nothing is found, something is malformed as a whole, or several logs would go to one file.
    """
    logs = find_logs(source)
    if out.suffix != ".ndjson":
        return [_write_file(load(log), out / f"{log.policy}-{log.campaign}.ndjson", num_routes) for log in logs]
    if len(logs) > 1:
        names = ", ".join(f"{log.policy}/{log.campaign}" for log in logs)
        raise ValueError(f"{source} holds {names}, but {out} is one file; give a folder, or the folder of one log")
    return [_write_file(load(logs[0]), out, num_routes)]


def _write_file(loaded: LoadedLog, out: Path, num_routes: int) -> ImportSummary:
    counts: Counter[str] = Counter()
    first_ms = last_ms = None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for element in loaded.elements:
                file.write(_line({"type": "element", **element}))
            file.write(_line({"type": "product", **loaded.product}))
            for event in events(loaded, num_routes):
                file.write(_line(event))
                counts[event["type"]] += 1
                last_ms = event["occurred_at_ms"]
                first_ms = last_ms if first_ms is None else first_ms
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return ImportSummary(
        out=out,
        rows=loaded.num_rows,
        impressions=counts["impression"],
        clicks=counts["click"],
        skipped=loaded.skipped,
        first_ms=first_ms,
        last_ms=last_ms,
    )


def _line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _impression(loaded: LoadedLog, row: int, num_routes: int) -> Record:
    log, number, time_ms = loaded.log, int(loaded.row_number[row]), int(loaded.time_ms[row])
    propensity = float(loaded.propensity[row])
    log_number = POLICIES.index(log.policy) * len(CAMPAIGNS) + CAMPAIGNS.index(log.campaign)
    return {
        "type": "impression",
        "schema_version": 1,
        "decision_id": make_decision_id(number % num_routes, time_ms, log_number * MAX_ROWS + number, IMPORT_KEY),
        "occurred_at_ms": time_ms,
        "product_id": loaded.product["product_id"],
        "context": loaded.contexts[loaded.context[row]],
        "candidates": loaded.product["slots"],
        "creative": {SLOT: f"i{loaded.item_id[row]}"},
        "slot_propensities": {SLOT: propensity},
        "propensity": propensity,
        "model_id": f"obd-{log.policy}",
        "epoch": 0,
        "policy_version": 0,
        "source": "policy",
        "holdout": log.policy == "random",
        "seed": 0,
        "survival_probability": 1.0,
    }


class _BadRowError(Exception):
    """A row of a log cannot be read."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


class _RowParser:
    """Turns the cells of `_LOG_COLUMNS` and the user features into numbers and a context, or says which is wrong."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self._items = {element_id.removeprefix("i"): int(element_id.removeprefix("i")) for element_id in item_ids}

    def __call__(self, cells: Sequence[str]) -> tuple[Any, ...]:
        """Return time in microseconds, item id, click, propensity and the values of the context."""
        timestamp, item, position, click, propensity, *users = cells
        if item not in self._items:
            raise _BadRowError("item_id")
        if position not in ("1", "2", "3"):
            raise _BadRowError("position")
        if click not in ("0", "1"):
            raise _BadRowError("click")
        context = (position, *(value[:_HASH_DIGITS] for value in users))
        return _time_us(timestamp), self._items[item], int(click), _propensity(propensity), context


def _time_us(cell: str) -> int:
    try:
        time = datetime.fromisoformat(cell)
    except ValueError:
        raise _BadRowError("timestamp") from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    time_us = (time - _EPOCH) // timedelta(microseconds=1)
    if not 0 <= time_us < _END_US:
        raise _BadRowError("timestamp")
    return time_us


def _propensity(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise _BadRowError("propensity_score") from None
    if not 0 < value <= 1:
        raise _BadRowError("propensity_score")
    return value


def _cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield the cells of each line that holds any; of a line that csv refuses, one cell that fits nothing."""
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a cell of more than 128 KiB
            cells = ["unreadable"]
        if cells:
            yield cells


def _item(row: Mapping[str, str | None], hashed: Sequence[str], where: str) -> tuple[int, float, str]:
    """Return id, numeric feature and text of an item."""
    item, feature = row["item_id"] or "", row["item_feature_0"] or ""
    try:
        value = float(feature)
    except ValueError:
        value = math.nan
    if not (item.isascii() and item.isdigit() and len(item) < 10 and math.isfinite(value)):
        raise ValueError(
            f"{where} has item_id {item!r} and item_feature_0 {feature!r}; expected up to 9 digits and a finite number"
        )
    text = " ".join(f"f{name.removeprefix('item_feature_')}:{(row[name] or '')[:_HASH_DIGITS]}" for name in hashed)
    return int(item), value, text


def _checked_header(header: Sequence[str], expected: Sequence[str], path: Path) -> list[str]:
    missing = [name for name in expected if name not in header]
    if missing:
        raise ValueError(
            f"header of {path} lacks {', '.join(missing)}; expected at least {', '.join(expected)}, "
            f"got {', '.join(header)[:200] or 'nothing'}; is this file of the Open Bandit dataset, and complete?"
        )
    return list(header)
