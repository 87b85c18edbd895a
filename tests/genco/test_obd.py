"""The import of the Open Bandit dataset: nothing lost, nothing invented, bad input told apart from good."""

import csv
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from genco.obd import CLICK_DELAY_MS, IMPORT_KEY, events, find_logs, load, write_log
from streams.contracts.catalog import Element, Product
from streams.contracts.decision_ids import issued_at_ms, route_of, verify_decision_id
from streams.contracts.events import Click, Impression, impression_fault

ROOT = Path(__file__).parents[2]
SLICE = ROOT / "tests" / "data" / "obd"
FULL = ROOT.parent / "shared" / "data" / "obd"


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def of_type(records: list[dict], name: str) -> list[dict]:
    return [record for record in records if record["type"] == name]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Callable[[list[str]], None]], Path]:
    """Return a function that copies the slice and lets its caller damage the lines of the log."""

    def copy(damage: Callable[[list[str]], None]) -> Path:
        shutil.copytree(SLICE / "random", tmp_path / "random")
        path = tmp_path / "random" / "all" / "all.csv"
        lines = path.read_text().splitlines()
        damage(lines)
        path.write_text("\n".join(lines) + "\n")
        return tmp_path

    return copy


def set_cell(lines: list[str], row: int, column: str, value: str) -> None:
    cells = lines[row + 1].split(",")
    cells[lines[0].split(",").index(column)] = value
    lines[row + 1] = ",".join(cells)


def test_slice_gives_an_impression_for_each_row_and_a_click_for_each_click() -> None:
    (log,) = find_logs(SLICE)
    loaded = load(log)
    records = list(events(loaded))
    impressions, clicks = of_type(records, "impression"), of_type(records, "click")
    rows = csv_rows(SLICE / "random" / "all" / "all.csv")
    clicked = {impressions[n]["decision_id"] for n, row in enumerate(rows) if row["click"] == "1"}

    assert (log.policy, log.campaign, loaded.num_rows, loaded.skipped) == ("random", "all", 1000, {})
    assert len(impressions) == 1000
    assert {click["decision_id"] for click in clicks} == clicked
    assert len(clicks) == len(clicked) == 2
    for impression, row in zip(impressions, rows, strict=True):
        assert impression["creative"] == {"item": f"i{row['item_id']}"}
        assert impression["context"]["position"] == row["position"]
        assert impression["context"]["user_feature_2"] == row["user_feature_2"][:8]


def test_first_row_is_this_impression() -> None:
    (log,) = find_logs(SLICE)

    assert next(events(load(log))) == {
        "type": "impression",
        "schema_version": 1,
        "decision_id": "0.016e9ab5c7ca00000000.23027c4b0f835b10",
        "occurred_at_ms": 1574553634762,
        "product_id": "obd-all",
        "context": {
            "position": "3",
            "user_feature_0": "81ce123c",
            "user_feature_1": "03a5648a",
            "user_feature_2": "c2e4f76c",
            "user_feature_3": "f97571b9",
        },
        "candidates": {"item": [f"i{item}" for item in range(80)]},
        "creative": {"item": "i14"},
        "slot_propensities": {"item": 0.0125},
        "propensity": 0.0125,
        "model_id": "obd-random",
        "epoch": 0,
        "policy_version": 0,
        "source": "policy",
        "holdout": True,
        "seed": 0,
        "survival_probability": 1.0,
    }


def test_events_are_valid_and_in_order_of_time_with_clicks_after_their_impressions() -> None:
    (log,) = find_logs(SLICE)
    seen: dict[str, int] = {}
    last_ms = 0
    for event in events(load(log)):
        assert event["occurred_at_ms"] >= last_ms
        last_ms = event["occurred_at_ms"]
        if event["type"] == "impression":
            impression = msgspec.convert(event, Impression)
            assert impression_fault(impression) is None
            seen[impression.decision_id] = impression.occurred_at_ms
        else:
            click = msgspec.convert(event, Click)
            assert click.occurred_at_ms == seen[click.decision_id] + CLICK_DELAY_MS
            assert click.reward == 1.0
    assert len(seen) == 1000


def test_decision_ids_go_round_the_routes_and_carry_time_and_mac() -> None:
    (log,) = find_logs(SLICE)
    impressions = of_type(list(events(load(log), num_routes=7)), "impression")
    ids = [impression["decision_id"] for impression in impressions]

    assert [route_of(decision_id) for decision_id in ids] == [row % 7 for row in range(1000)]
    assert [issued_at_ms(decision_id) for decision_id in ids] == [event["occurred_at_ms"] for event in impressions]
    assert len(set(ids)) == 1000
    for decision_id in ids:
        verify_decision_id(decision_id, IMPORT_KEY)
    with pytest.raises(ValueError, match=r"num_routes is 0; must be in \[1, 65536\]"):
        next(events(load(log), num_routes=0))


def test_catalog_has_every_item_with_standardized_feature_and_hashes() -> None:
    (log,) = find_logs(SLICE)
    loaded = load(log)
    elements = [msgspec.to_builtins(Element.model_validate(element).model_dump()) for element in loaded.elements]
    values = [element["features"][0] for element in elements]
    first = csv_rows(log.items_path)[0]

    assert [element["element_id"] for element in elements] == [f"i{item}" for item in range(80)]
    assert sum(values) / 80 == pytest.approx(0, abs=1e-9)
    assert sum(value**2 for value in values) / 80 == pytest.approx(1)
    assert elements[0]["text"] == " ".join(f"f{n}:{first[f'item_feature_{n}'][:8]}" for n in (1, 2, 3))
    assert Product.model_validate(loaded.product).slots == {"item": tuple(f"i{item}" for item in range(80))}


@pytest.mark.parametrize(("second", "expected"), [("5", [-1.0, 1.0]), ("3", [0.0, 0.0])])
def test_item_feature_is_centered_and_scaled_unless_constant(
    second: str, expected: list[float], tmp_path: Path
) -> None:
    shutil.copytree(SLICE / "random", tmp_path / "random")
    (tmp_path / "random" / "all" / "item_context.csv").write_text(f",item_id,item_feature_0\n0,1,{second}\n1,0,3\n")

    elements = load(find_logs(tmp_path)[0]).elements

    assert [element["element_id"] for element in elements] == ["i0", "i1"]
    assert [element["features"] for element in elements] == [[value] for value in expected]


@pytest.mark.parametrize("policy", ["random", "bts"])
def test_all_rows_of_the_sample_arrive_with_their_clicks_and_propensities(policy: str, tmp_path: Path) -> None:
    if not FULL.is_dir():
        pytest.skip(f"the sample of the Open Bandit dataset is not at {FULL}")
    rows = csv_rows(FULL / policy / "all" / "all.csv")
    (summary,) = write_log(FULL / policy, tmp_path)
    records = read(tmp_path / f"{policy}-all.ndjson")
    impressions, clicks = of_type(records, "impression"), of_type(records, "click")

    assert len(impressions) == len(rows) == summary.rows == summary.impressions == 10_000
    assert len(clicks) == summary.clicks == sum(row["click"] == "1" for row in rows) > 30
    assert summary.skipped == {}
    assert [event["propensity"] for event in impressions] == [float(row["propensity_score"]) for row in rows]
    assert all(event["slot_propensities"] == {"item": event["propensity"]} for event in impressions)
    assert {event["holdout"] for event in impressions} == {policy == "random"}
    assert len({event["decision_id"] for event in impressions}) == 10_000
    assert [click["decision_id"] for click in clicks] == [
        event["decision_id"] for event, row in zip(impressions, rows, strict=True) if row["click"] == "1"
    ]


def test_written_log_starts_with_its_catalog_and_is_the_same_again(tmp_path: Path) -> None:
    (summary,) = write_log(SLICE, tmp_path / "new" / "log.ndjson")
    records = read(summary.out)
    (again,) = write_log(SLICE, tmp_path / "folder")

    assert [name for name, _ in itertools.groupby(record["type"] for record in records)][:3] == [
        "element",
        "product",
        "impression",
    ]
    assert Counter(record["type"] for record in records) == {
        "element": 80,
        "product": 1,
        "impression": 1000,
        "click": 2,
    }
    assert (summary.rows, summary.impressions, summary.clicks) == (1000, 1000, 2)
    assert summary.first_ms == records[81]["occurred_at_ms"] == 1574553634762
    assert summary.last_ms == records[-1]["occurred_at_ms"] == 1574601708670
    assert again.out == tmp_path / "folder" / "random-all.ndjson"
    assert again.out.read_bytes() == summary.out.read_bytes()
    assert os.listdir(tmp_path / "folder") == ["random-all.ndjson"]  # no temporary file stays


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "log.ndjson"
    out.write_text("old")

    def fail(record: object) -> bytes:
        raise OSError("disk is full")

    monkeypatch.setattr(msgspec.json, "encode", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_log(SLICE, out)
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.ndjson"]


@pytest.mark.parametrize("below", ["", "random", "random/all"])
def test_log_is_found_from_each_level(below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (log,) = find_logs(SLICE / below)
    monkeypatch.chdir(SLICE / below)

    assert log.events_path == SLICE / "random" / "all" / "all.csv"
    assert find_logs(Path()) == [log]


def test_every_policy_and_campaign_is_found_and_only_below_the_source(tmp_path: Path) -> None:
    for policy, campaign in itertools.product(("random", "bts"), ("men", "women", "all")):
        folder = tmp_path / "open_bandit_dataset" / policy / campaign
        folder.mkdir(parents=True)
        shutil.copy(SLICE / "random" / "all" / "all.csv", folder / f"{campaign}.csv")
        shutil.copy(SLICE / "random" / "all" / "item_context.csv", folder)
    found = find_logs(tmp_path)
    ids = [{e["decision_id"] for e in events(load(log)) if e["type"] == "impression"} for log in found]

    assert len(found) == 6
    assert [log.campaign for log in find_logs(tmp_path / "open_bandit_dataset" / "bts")] == ["all", "men", "women"]
    assert [log.policy for log in find_logs(tmp_path / "open_bandit_dataset" / "bts" / "men")] == ["bts"]
    assert len(set.union(*ids)) == 6_000  # the same row of two logs is two decisions
    for log in found:
        event = next(events(load(log)))
        assert (event["model_id"], event["holdout"]) == (f"obd-{log.policy}", log.policy == "random")
    assert {load(log).product["product_id"] for log in found} == {"obd-all", "obd-men", "obd-women"}
    with pytest.raises(ValueError, match="is one file; give a folder"):
        write_log(tmp_path, tmp_path / "log.ndjson")


def test_wrong_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for \{policy\}/\{campaign\}/\{campaign\}.csv .* random/ or bts/"):
        find_logs(tmp_path)
    with pytest.raises(ValueError, match="holds no log"):
        find_logs(tmp_path / "absent")
    shutil.copytree(SLICE / "random", tmp_path / "random")
    (tmp_path / "random" / "all" / "item_context.csv").unlink()
    with pytest.raises(ValueError, match=r"item_context\.csv is missing"):
        find_logs(tmp_path)


def test_bad_rows_are_counted_by_reason_and_skipped(broken: Callable[..., Path], tmp_path: Path) -> None:
    def damage(lines: list[str]) -> None:
        set_cell(lines, 0, "timestamp", "yesterday")
        set_cell(lines, 1, "timestamp", "1969-12-31 23:59:59+00:00")
        set_cell(lines, 2, "timestamp", "2100-01-01 00:00:00+00:00")
        set_cell(lines, 3, "item_id", "80")
        set_cell(lines, 4, "item_id", "")
        set_cell(lines, 5, "position", "4")
        set_cell(lines, 6, "click", "2")
        for row, value in enumerate(["0", "1.5", "nan", "x", "-0.1"]):
            set_cell(lines, 7 + row, "propensity_score", value)
        lines[13] = lines[13][:40]  # row 12 cut short
        lines[14] += ",1"
        set_cell(lines, 14, "user_feature_0", "x" * 200_000)  # csv refuses such a cell
        set_cell(lines, 15, "user_feature_0", '"quoted')  # swallows nothing
        lines.insert(500, "")

    (summary,) = write_log(broken(damage), tmp_path / "out")

    assert summary.skipped == {
        "timestamp": 3,
        "item_id": 2,
        "position": 1,
        "click": 1,
        "propensity_score": 5,
        "columns": 3,
    }
    assert (summary.rows, summary.impressions, summary.clicks) == (1000, 985, 2)


def test_rows_out_of_order_are_sorted_by_time_and_equal_times_keep_their_order(broken: Callable[..., Path]) -> None:
    def damage(lines: list[str]) -> None:
        lines[1:11] = reversed(lines[1:11])
        for row in (20, 21, 22):
            set_cell(lines, row, "timestamp", "2019-11-24 00:00:00")  # without a zone: UTC
            set_cell(lines, row, "item_id", str(row))

    impressions = of_type(list(events(load(find_logs(broken(damage))[0]))), "impression")
    times = [impression["occurred_at_ms"] for impression in impressions]

    assert times == sorted(times)
    assert [impression["creative"]["item"] for impression in impressions[:3]] == ["i20", "i21", "i22"]
    assert times[0] == 1574553600000
    assert [route_of(impression["decision_id"]) for impression in impressions[3:13]] == list(range(9, -1, -1))


def test_wrong_header_is_refused_with_what_was_expected(broken: Callable[..., Path]) -> None:
    def damage(lines: list[str]) -> None:
        lines[0] = lines[0].replace("propensity_score", "pscore")

    with pytest.raises(ValueError, match=r"all.csv lacks propensity_score; expected at least timestamp, .* got ,"):
        load(find_logs(broken(damage))[0])


def test_empty_log_is_refused(broken: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="got nothing"):
        load(find_logs(broken(list.clear))[0])


def test_log_of_a_header_alone_gives_no_events(broken: Callable[..., Path], tmp_path: Path) -> None:
    (summary,) = write_log(broken(lambda lines: lines.__delitem__(slice(1, None))), tmp_path / "out")

    assert (summary.rows, summary.impressions, summary.first_ms, summary.last_ms) == (0, 0, None, None)
    assert len(read(summary.out)) == 81


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("80,79,0.5,a,b,c", "has item_id 79 again"),
        ("80,x,0.5,a,b,c", "has item_id 'x' and item_feature_0 '0.5'"),
        ("80,80,nan,a,b,c", "item_feature_0 'nan'; expected"),
        ("80", "has item_id ''"),
    ],
)
def test_malformed_item_is_refused(line: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(SLICE / "random", tmp_path / "random")
    with (tmp_path / "random" / "all" / "item_context.csv").open("a") as file:
        file.write(line + "\n")

    with pytest.raises(ValueError, match=message):
        load(find_logs(tmp_path)[0])
